"""A set of client ids in limited memory: "absent" is certain, "present" may be wrong. No I/O.

A Bloom filter (Bloom 1970) over Python's randomized hash of strings. Clients cannot predict the hash, so they cannot
choose ids that cause false positives; for the same reason a filter is valid in its own process only.
"""

_BITS_AN_ID = 64  # for `limit` ids; eight times as many have eight bits each, with 2 % false positives
_PROBES = 4  # bits set for each id


class BloomFilter:
    """A set of ids with false positives. Ids cannot be removed."""

    __slots__ = ("_bits", "_mask")

    def __init__(self, limit: int) -> None:
        """Allocate 8 to 16 bytes for each of `limit` ids. The filter remains useful for several times as many."""
        size = 1 << max(limit * _BITS_AN_ID - 1, 63).bit_length()
        self._mask = size - 1
        self._bits = bytearray(size // 8)

    def __repr__(self) -> str:
        return f"<BloomFilter [{len(self._bits)} bytes]>"

    def __contains__(self, client_id: str) -> bool:
        """Return whether an id may have been added; False is certain."""
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
        """Add the ids of a filter of the same size. Raises ValueError if the sizes differ."""
        bits = other._bits  # noqa: SLF001 - of the same class
        if len(bits) != len(self._bits):
            raise ValueError(f"a filter of {len(bits)} bytes cannot be added to one of {len(self._bits)}")
        joined = int.from_bytes(self._bits, "little") | int.from_bytes(bits, "little")
        self._bits[:] = joined.to_bytes(len(self._bits), "little")
