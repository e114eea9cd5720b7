"""Chunked bodies (RFC 9112 section 7.1): those that are passed on as they were received, and where a body ends.

Plain chunks have a size of at most eight hexadecimal digits, no extension, and no trailers behind the last one. What
is not plain is left to the general parser, from the beginning of a chunk on.
"""

import re
from enum import Enum

MAX_CHUNK_BYTES = 2**63 - 1  # a larger size overflows the signed integers of many servers
MAX_CHUNKS = 256  # in one read; more are left to the parser, whose loop over chunks is not in Python

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})\r\n")
_SIZE_BEGUN = re.compile(rb"(?:[0-9A-Fa-f]{1,8}\r?)?")
# Whole chunks of up to 15 bytes, which a client may send by the thousands, with leading zeros and extensions.
_SMALL_CHUNKS = re.compile(
    rb"(?:0*+(?:%b))*+"
    % b"|".join(rb"[%x%X](?:;[^\r\n]*+)?+\r\n[\x00-\xff]{%d}\r\n" % (size, size, size) for size in range(1, 16))
)
_LINE_BREAK = b"\r\n"
_ANY_SIZE = re.compile(rb"0*[0-9A-Fa-f]{1,16}")  # further digits are an error of the parser
_ZEROS = re.compile(rb"0*(?=0)")  # that do not matter
_MAX_LINE = 32  # bytes that are held of an incomplete line, of which only the size and the emptiness matter
_LAST_BEGUN = (b"", b"\r")  # what may follow the size of the last chunk if its end has not arrived


class ChunkState(Enum):
    """The kind of data that follows the checked part of a chunked body."""

    ARRIVING = "arriving"  # more plain chunks
    ENDED = "ended"  # nothing
    NOT_PLAIN = "not plain"  # a chunk for the general parser, or more than MAX_CHUNKS
    INVALID = "invalid"  # bytes other than a line break at the end of a chunk


ARRIVING, ENDED, NOT_PLAIN, INVALID = ChunkState


class ChunkedBody:
    """A chunked body while it arrives. `content` is the number of bytes in the checked chunks, without their framing.

    `rest` is the input that follows the checked part; while the state is ARRIVING it is the beginning of a line, which
    is held until the line is complete.
    """

    __slots__ = ("_left", "content", "rest", "state")

    def __init__(self) -> None:
        self.state = ARRIVING
        self.content = 0
        self.rest = b""
        self._left = 0  # bytes of the current chunk that have not arrived, with the line break at its end

    def __repr__(self) -> str:
        return f"<ChunkedBody [{self.state.value}, {self.content} bytes]>"

    @property
    def is_left_to_parser(self) -> bool:
        """True once the input cannot be taken as plain chunks."""
        return self.state is NOT_PLAIN or self.state is INVALID

    def feed(self, data: bytes) -> bytes:
        """Check more input; return the part of it, after what was held, that has been checked."""
        if self.rest:
            data = self.rest + data
        position, size, chunks = 0, len(data), 0
        while True:
            if self._left:
                position = self._take_content(data, position, size)
                if self._left or self.state is INVALID:
                    break
            found = _SIZE.match(data, position)
            if found is None:
                if _SIZE_BEGUN.fullmatch(data, position) is None:
                    self.state = NOT_PLAIN
                break
            length = int(found[1], 16)
            if not length:
                position = self._take_last(data, position, found.end())
                break
            if chunks == MAX_CHUNKS:
                self.state = NOT_PLAIN
                break
            chunks += 1
            self._left = length + 2
            position = found.end()
        if position == size:
            self.rest = b""
            return data
        self.rest = data[position:]
        return data[:position]

    def _take_content(self, data: bytes, position: int, size: int) -> int:
        """Take what has arrived of the current chunk; return the position behind it."""
        left, there = self._left, size - position
        if there >= left:
            end = position + left
            if data[end - 2 : end] != _LINE_BREAK:
                self.state = INVALID
                return position
            self.content += left - 2
            self._left = 0
            return end
        if there == left - 1:  # half of the line break, which is held
            self.content += left - 2
            self._left = 2
            return size - 1
        self.content += there
        self._left = left - there
        return size

    def _take_last(self, data: bytes, position: int, end: int) -> int:
        """Take the last chunk, from `position` on, if only its end follows its size, which ends at `end`."""
        behind = data[end:]
        if behind == _LINE_BREAK:
            self.state = ENDED
            return len(data)
        if behind not in _LAST_BEGUN:
            self.state = NOT_PLAIN
        return position


class ChunkedEnd:
    """Finds the end of a chunked body in any form, so that the general parser is not given what follows it.

    It checks only the size of chunks: of a malformed body it finds no end, and the parser refuses it.
    """

    __slots__ = ("_is_last", "_left", "_line", "is_too_large")

    def __init__(self) -> None:
        self.is_too_large = False  # a chunk is larger than MAX_CHUNK_BYTES
        self._left = 0  # bytes of the current chunk that have not arrived, with the line break at its end
        self._line = b""  # the beginning of an incomplete line
        self._is_last = False  # the last chunk has begun, and trailers may follow

    def __repr__(self) -> str:
        return f"<ChunkedEnd [{'trailers' if self._is_last else f'{self._left} bytes left of a chunk'}]>"

    @property
    def announced(self) -> int:
        """The number of content bytes of the current chunk that have not arrived."""
        return max(0, self._left - 2)

    def find(self, data: bytes) -> int | None:
        """Return the position in `data` behind the end of the body, None if that does not end there."""
        position, size = 0, len(data)
        while position < size:
            if not self._left and not self._line and not self._is_last:
                position = _SMALL_CHUNKS.match(data, position).end()  # type: ignore[union-attr]  # it matches always
                if position == size:
                    break
            if self._left:
                taken = min(self._left, size - position)
                self._left -= taken
                position += taken
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line = _ZEROS.sub(b"", self._line + data[position:], 1)[:_MAX_LINE]
                return None
            line, self._line = self._line + data[position:end], b""
            position = end + 1
            if self._is_last:
                if line in _LAST_BEGUN:
                    return position
            elif (found := _ANY_SIZE.match(line)) is None:
                return None
            else:
                length = int(found[0], 16)
                self.is_too_large |= length > MAX_CHUNK_BYTES
                self._left, self._is_last = (length + 2, False) if length else (0, True)
        return None
