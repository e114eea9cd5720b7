"""Where one direction of a WebSocket connection stands (RFC 6455 section 5.2): within a frame, or between two.

Only between two may a frame of ours be put in. Payloads are skipped, never looked at.
"""

GOING_AWAY = b"\x88\x02\x03\xe9"  # a close frame with status 1001, unmasked as servers send it

_CLOSE = 8
_SHORT, _MASK_BIT, _MASK_SIZE = 2, 0x80, 4
_LENGTH_BYTES = {126: 2, 127: 8}
# How long a frame is by the second byte of its head; 0 where further bytes hold the length.
_SIZES = [
    0 if byte & 0x7F in _LENGTH_BYTES else _SHORT + (byte & 0x7F) + (_MASK_SIZE if byte & _MASK_BIT else 0)
    for byte in range(256)
]


class FrameBoundary:
    """Follows a stream of frames by their heads."""

    __slots__ = ("_head", "_left", "has_closed")

    def __init__(self) -> None:
        self._head = b""  # of a frame whose length is not known yet
        self._left = 0  # bytes of the frame still to come
        self.has_closed = False  # a close frame has come: nothing may follow it

    def __repr__(self) -> str:
        return f"<FrameBoundary [{'between frames' if self.is_between else f'{self._left} bytes to come'}]>"

    @property
    def is_between(self) -> bool:
        """True if the next byte begins a frame."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> None:
        """Follow what has been sent."""
        data = self._head + data
        edge, last = self._left, len(data) - _SHORT
        while edge <= last:  # once for each frame, of which a peer may send very many: so nothing is called
            size = _SIZES[data[edge + 1]] or _long_size(data, edge)
            if not size:
                break
            if data[edge] & 0x0F == _CLOSE:
                self.has_closed = True
            edge += size
        self._head = data[edge:]
        self._left = max(0, edge - len(data))

    def rest(self, data: bytes) -> int | None:
        """Return how much of `data` belongs to the frame that has begun, or None if all does and more is to come."""
        at = 0
        while self._head and at < len(data):
            self.feed(data[at : at + 1])
            at += 1
        taken = min(self._left, len(data) - at)
        self._left -= taken
        return at + taken if self.is_between else None


def _long_size(data: bytes, edge: int) -> int:
    """Return how long the frame at `edge` is, whose length has bytes of its own; 0 while they are not complete."""
    second = data[edge + 1]
    start = edge + _SHORT
    end = start + _LENGTH_BYTES[second & 0x7F]
    if end > len(data):
        return 0
    return end - edge + int.from_bytes(data[start:end], "big") + (_MASK_SIZE if second & _MASK_BIT else 0)
