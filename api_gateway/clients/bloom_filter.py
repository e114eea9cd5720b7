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
        """Use 8 to 16 bytes for each of `limit` ids, once there is an id: a gateway without clients has none.

        The filter remains useful for several times as many.
        """
        self._mask = (1 << max(limit * _BITS_AN_ID - 1, 63).bit_length()) - 1
        self._bits = bytearray()

    def __repr__(self) -> str:
        return f"<BloomFilter [{self._size} bytes]>"

    @property
    def _size(self) -> int:
        return (self._mask + 1) // 8

    def __contains__(self, client_id: str) -> bool:
        """Return whether an id may have been added; False is certain."""
        place = hash(client_id)
        step = place >> 32 | 1
        bits, mask = self._bits, self._mask
        if not bits:
            return False
        for _ in range(_PROBES):
            if not bits[(place & mask) >> 3] & 1 << (place & 7):
                return False
            place += step
        return True

    def add(self, client_id: str) -> None:
        """Add an id."""
        if not self._bits:
            self._bits = bytearray(self._size)
        place = hash(client_id)
        step = place >> 32 | 1
        bits, mask = self._bits, self._mask
        for _ in range(_PROBES):
            bits[(place & mask) >> 3] |= 1 << (place & 7)
            place += step

    def update(self, other: "BloomFilter") -> None:
        """Add the ids of a filter of the same size. Raises ValueError if the sizes differ."""
        if other._size != self._size:  # noqa: SLF001 - of the same class
            raise ValueError(f"a filter of {other._size} bytes cannot be added to one of {self._size}")  # noqa: SLF001
        joined = int.from_bytes(self._bits, "little") | int.from_bytes(other._bits, "little")  # noqa: SLF001
        if joined:
            self._bits = bytearray(joined.to_bytes(self._size, "little"))
