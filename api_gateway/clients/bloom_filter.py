"""Which client ids may be in a store, in bounded memory: "no" is certain, "perhaps" has to be looked up. No I/O.

A Bloom filter (Bloom 1970) over Python's own hash of strings, which nobody outside the process can foresee; so nobody
can choose ids that are taken for others, and filters are of no use to another process.
"""

_BITS_AN_ID = 64  # of those that are held in memory; so eight times as many get eight each, of which 2 % are mistaken
_PROBES = 4


class BloomFilter:
    """A set of ids that may say of a few others, too, that it holds them. Nothing is ever taken out."""

    __slots__ = ("_bits", "_mask")

    def __init__(self, limit: int) -> None:
        """Be right as a rule for several times `limit` ids; it takes 8 to 16 bytes for each of `limit`."""
        size = 1 << max(limit * _BITS_AN_ID - 1, 63).bit_length()
        self._mask = size - 1
        self._bits = bytearray(size // 8)

    def __repr__(self) -> str:
        return f"<BloomFilter [{len(self._bits)} bytes]>"

    def __contains__(self, client_id: str) -> bool:
        """Tell whether an id may have been added."""
        place = hash(client_id)
        step = place >> 32 | 1
        bits, mask = self._bits, self._mask
        for _ in range(_PROBES):
            if not bits[(place & mask) >> 3] & 1 << (place & 7):
                return False
            place += step
        return True

    def add(self, client_id: str) -> None:
        """Add an id."""
        place = hash(client_id)
        step = place >> 32 | 1
        bits, mask = self._bits, self._mask
        for _ in range(_PROBES):
            bits[(place & mask) >> 3] |= 1 << (place & 7)
            place += step

    def update(self, other: "BloomFilter") -> None:
        """Add what a filter for the same limit holds. Raises ValueError."""
        bits = other._bits  # noqa: SLF001 - of the same class
        if len(bits) != len(self._bits):
            raise ValueError(f"a filter of {len(bits)} bytes cannot be added to one of {len(self._bits)}")
        joined = int.from_bytes(self._bits, "little") | int.from_bytes(bits, "little")
        self._bits[:] = joined.to_bytes(len(self._bits), "little")
