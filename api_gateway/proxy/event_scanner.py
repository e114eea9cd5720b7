"""Finds one number in a stream of server-sent events (HTML standard, section 9.2) whose data are JSON texts.

The data of each event pass through a `JsonScanner` as they arrive, so events may have any size; nothing is buffered.
"""

import re

from api_gateway.proxy.json_scanner import JsonScanner

_LINE_END = re.compile(rb"[\r\n]")
# Complete lines without effect, which are passed over as a whole: a step in Python for each takes 1 µs and more.
# Between events: empty lines, and lines other than those with data. Within an event: lines other than data.
_IDLE = re.compile(rb"(?:[\r\n]++|(?!data:[ \t]*+[^ \t\r\n])[^\r\n]++[\r\n])*+")
_OTHER_LINES = re.compile(rb"(?:(?!data:)[^\r\n]++(?:\r\n?+|\n))*+")
_DATA = b"data:"
_DONE = b"[DONE]"  # the data of the event with which services like OpenAI's end a stream
_MARK = b"\xef\xbb\xbf"  # of the byte order, which a stream may begin with
_EVENT_STEPS = 6  # that the end of an event takes, see `JsonScanner.steps`
_KEPT = 16  # bytes of an event's data that are kept to recognise it


class EventScanner:
    """Follows a stream; `value` is the number in the last complete event that has one, None without one so far.

    `is_done` is true once an event has said that it is the last one; many clients leave then, before the stream ends.
    """

    __slots__ = (
        "_begun",
        "_is_after_return",
        "_is_at_start",
        "_is_data",
        "_json",
        "_lines",
        "_start",
        "is_done",
        "value",
    )

    def __init__(self, path: tuple[str, ...]) -> None:
        """`path` are the reference tokens of a JSON pointer."""
        self.value: float | None = None
        self.is_done = False
        self._begun = b""  # how the data of the event begin
        self._json = JsonScanner(path)
        self._start: bytes | None = b""  # of a line; None once it is known whether the line `_is_data`
        self._is_data = False
        self._is_at_start = True  # of the stream, where a byte order mark is not part of the line
        self._is_after_return = False  # a following line feed belongs to the same line end
        self._lines = 0

    def __repr__(self) -> str:
        return f"<EventScanner {self.value}>"

    @property
    def steps(self) -> int:
        """The number of steps that have been taken, see `JsonScanner`; each line is one too, and an event several."""
        return self._lines + self._json.steps

    def feed(self, piece: bytes) -> None:
        """Follow a piece of the stream."""
        at, end = 0, len(piece)
        if self._is_after_return and end:
            self._is_after_return = False
            at = int(piece.startswith(b"\n"))
        while at < end:
            if self._start == b"" and not self._is_at_start:
                at = self._skip(piece, at)
                if at == end:
                    return
            found = _LINE_END.search(piece, at)
            self._line_part(piece[at : end if found is None else found.start()], is_over=found is not None)
            if found is None:
                return
            at = found.end()
            if found[0] == b"\r":
                self._is_after_return = at == end
                at += piece.startswith(b"\n", at)

    def _skip(self, piece: bytes, at: int) -> int:
        """Return the index after the lines without effect that begin at an index."""
        skipped = (_OTHER_LINES if self._begun else _IDLE).match(piece, at)
        end = skipped.end()  # type: ignore[union-attr]  # also matches nothing
        self._is_after_return = at < end == len(piece) and piece.endswith(b"\r")
        return end

    def finish(self) -> bool:
        """Follow the end of the stream, which also ends an event; return True, because it may end anywhere."""
        self._end_event()
        return True

    def _line_part(self, part: bytes, *, is_over: bool) -> None:
        self._lines += 1
        if self._start is not None:
            part = self._start + part
            if self._is_at_start and part.startswith(_MARK):
                self._is_at_start, part = False, part[len(_MARK) :]
            if not part and is_over:
                self._is_at_start = False
                self._end_event()
                return
            if len(part) < len(_DATA) and not is_over:
                self._start = part
                return
            self._is_at_start = False
            self._start, self._is_data = None, part.startswith(_DATA)
            part = part[len(_DATA) :]
        if self._is_data:
            self._data(part)
        if is_over:
            if self._is_data:
                self._data(b"\n")
            self._start = b""

    def _data(self, part: bytes) -> None:
        self._json.feed(part)
        if len(self._begun) < _KEPT:
            self._begun = (self._begun + part[:_KEPT])[:_KEPT]

    def _end_event(self) -> None:
        self._lines += _EVENT_STEPS
        if self._json.finish() and self._json.value is not None:
            self.value = self._json.value
        self.is_done = self.is_done or self._begun.strip() == _DONE
        self._begun = b""
        self._json.restart()
