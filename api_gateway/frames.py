"""Where one direction of a WebSocket connection stands (RFC 6455 section 5.2): within a frame, or between two.

Only between two may a frame of ours be put in. Payloads are skipped, never looked at.
"""

GOING_AWAY = b"\x88\x02\x03\xe9"  # a close frame with status 1001, unmasked as servers send it

_CLOSE = 8
_SHORT, _MASK_BIT, _MASK_SIZE = 2, 0x80, 4
_LENGTH_BYTES = {126: 2, 127: 8}


class FrameEdges:
    """Follows a stream of frames by their heads."""

    __slots__ = ("_head", "_left", "has_closed")

    def __init__(self) -> None:
        self._head = b""  # of a frame whose head is not complete
        self._left = 0  # bytes of the payload still to come
        self.has_closed = False  # a close frame has come: nothing may follow it

    def __repr__(self) -> str:
        return f"<FrameEdges [{'between frames' if self.is_between else f'{self._left} bytes to come'}]>"

    @property
    def is_between(self) -> bool:
        """True if the next byte begins a frame."""
        return not self._left and not self._head

    def feed(self, data: bytes) -> None:
        """Follow what has been sent."""
        self._walk(data, stop=False)

    def rest(self, data: bytes) -> int | None:
        """Return how much of `data` belongs to the frame that has begun, or None if all does and more is to come."""
        return 0 if self.is_between else self._walk(data, stop=True)

    def _walk(self, data: bytes, *, stop: bool) -> int | None:
        """Return the offset of the first edge if asked to `stop` there."""
        at, size = 0, len(data)
        while at < size:
            if self._left:
                skipped = min(self._left, size - at)
                self._left -= skipped
                at += skipped
            else:
                at = self._read_head(data, at)
            if stop and self.is_between:
                return at
        return None

    def _read_head(self, data: bytes, at: int) -> int:
        """Take the bytes of a head; return the offset behind them."""
        head = self._head
        while at < len(data):
            wanted = _head_size(head)
            if len(head) == wanted:
                break
            taken = data[at : at + wanted - len(head)]
            head += taken
            at += len(taken)
        if len(head) == _head_size(head):
            self._left, self._head = _payload_size(head), b""
            self.has_closed |= head[0] & 0x0F == _CLOSE
        else:
            self._head = head
        return at


def _head_size(head: bytes) -> int:
    """Return how long a head is, as far as its beginning tells."""
    if len(head) < _SHORT:
        return _SHORT
    return _SHORT + _LENGTH_BYTES.get(head[1] & 0x7F, 0) + (_MASK_SIZE if head[1] & _MASK_BIT else 0)


def _payload_size(head: bytes) -> int:
    length = head[1] & 0x7F
    more = _LENGTH_BYTES.get(length, 0)
    return int.from_bytes(head[_SHORT : _SHORT + more], "big") if more else length
