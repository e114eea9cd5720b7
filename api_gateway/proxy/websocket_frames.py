"""Follows frame boundaries in one direction of a WebSocket connection (RFC 6455 section 5.2).

The gateway may insert a frame only between two frames. Payloads are skipped without being read.
"""

GOING_AWAY = b"\x88\x02\x03\xe9"  # a close frame with status 1001, unmasked as servers send it

_CLOSE = 8
_SHORT, _MASK_BIT, _MASK_SIZE = 2, 0x80, 4
_LENGTH_BYTES = {126: 2, 127: 8}
# The size of a frame by the second byte of its header; 0 if further bytes contain the length.
_SIZES = [
    0 if byte & 0x7F in _LENGTH_BYTES else _SHORT + (byte & 0x7F) + (_MASK_SIZE if byte & _MASK_BIT else 0)
    for byte in range(256)
]


class FrameBoundary:
    """Follows a stream of frames by their headers.

    States: between frames; in a header (`_head`); in a payload (`_left`). `has_closed` once a close frame has begun.
    """

    __slots__ = ("_head", "_left", "has_closed")

    def __init__(self) -> None:
        self._head = b""  # the header of a frame whose length is not known yet
        self._left = 0  # bytes of the frame that have not arrived
        self.has_closed = False  # a close frame has begun, so no frame may follow it

    def __repr__(self) -> str:
        return f"<FrameBoundary [{'between frames' if self.is_between else f'{self._left} bytes left'}]>"

    @property
    def is_between(self) -> bool:
        """True if the next byte is the first byte of a frame."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> None:
        """Process bytes that have been sent."""
        data = self._head + data
        edge, last = self._left, len(data) - _SHORT
        while edge <= last:  # no function call per frame, because a peer may send very many small frames
            size = _SIZES[data[edge + 1]] or _long_size(data, edge)
            if not size:
                break
            if data[edge] & 0x0F == _CLOSE:
                self.has_closed = True
            edge += size
        self._head = data[edge:]
        self._left = max(0, edge - len(data))

    def rest(self, data: bytes) -> int | None:
        """Return the number of bytes of `data` that complete the current frame, or None if it remains incomplete."""
        at = 0
        while self._head and at < len(data):
            self.feed(data[at : at + 1])
            at += 1
        taken = min(self._left, len(data) - at)
        self._left -= taken
        return at + taken if self.is_between else None


def _long_size(data: bytes, edge: int) -> int:
    """Return the size of the frame at `edge`, which has an extended length; 0 if that is incomplete."""
    second = data[edge + 1]
    start = edge + _SHORT
    end = start + _LENGTH_BYTES[second & 0x7F]
    if end > len(data):
        return 0
    return end - edge + int.from_bytes(data[start:end], "big") + (_MASK_SIZE if second & _MASK_BIT else 0)
