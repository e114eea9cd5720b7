"""Finds one number in a JSON text that arrives in pieces, by a JSON pointer (RFC 6901), without buffering the text.

The state is bounded, whatever the text: the position in the pointer, the depth of a value that is skipped, and the
beginning of a name or number. Of members with the same name the last one counts, as for `json.loads`. A text that is
not valid JSON yields some number or none.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from enum import Enum

_SPACE = re.compile(rb"[ \t\r\n\xef\xbb\xbf]*")  # white space, and the bytes of a byte order mark
_SKIPPABLE = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)  # strings are passed as a whole
_STRING_PART = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_OPENINGS, _CLOSINGS = re.compile(rb"[{\[]+"), re.compile(rb"[}\]]+")
_SCALAR = re.compile(rb"[^,\]}\s]*")
_NUMBER = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_MAX_NUMBER = 64  # characters
_MAX_ESCAPED = 12  # bytes of the longest form of a character in a string: two escapes
_QUOTE, _BACKSLASH, _OPEN_OBJECT, _OPEN_ARRAY, _CLOSE_OBJECT, _CLOSE_ARRAY, _COLON, _COMMA = b'"\\{[}]:,'


class _State(Enum):
    """The token that the scanner expects next, or the one that it is within."""

    VALUE = "value"
    NAME = "name"
    IN_NAME = "in name"
    COLON = "colon"
    AFTER = "after value"
    SCALAR = "scalar"
    STRING = "string"
    SKIPPED = "skipped value"
    SKIPPED_STRING = "string of skipped value"
    END = "end"


class JsonScanner:
    """Follows a JSON text; `value` is the number at the pointer, None without one so far.

    A value is *on the path* if the tokens of the pointer lead to it or to something within it. The containers on the
    path that have been entered are at most as many as the pointer has tokens; all other containers are skipped.
    """

    __slots__ = (
        "_depth",
        "_indices",
        "_is_escaped",
        "_is_on_path",
        "_limit",
        "_path",
        "_start",
        "_state",
        "steps",
        "value",
    )

    def __init__(self, path: tuple[str, ...]) -> None:
        """`path` are the reference tokens of the pointer, see `settings.json_pointer`."""
        self._path = path
        self._limit = max((len(token) for token in path), default=0) * _MAX_ESCAPED
        self.steps = 0  # that have been taken, of this text and those before; each takes some 1 µs
        self.restart()

    def restart(self) -> None:
        """Begin a new text."""
        self.value: float | None = None
        self._state = _State.VALUE
        self._indices: list[int | None] = []  # of the entered containers: the index in an array, None for an object
        self._is_on_path = True  # the value that is expected or scanned
        self._depth = 0  # within a skipped value
        self._start = b""  # of a name or scalar, as far as it matters
        self._is_escaped = False  # a piece has ended after a backslash

    def __repr__(self) -> str:
        return f"<JsonScanner [{self._state.value}] {self.value}>"

    def feed(self, piece: bytes) -> None:
        """Follow a piece of the text."""
        at, end, steps = 0, len(piece), 0
        while at < end:
            at = _STEPS[self._state](self, piece, at)
            steps += 1
        self.steps += steps

    def finish(self) -> bool:
        """Follow the end of the text; return whether the text is whole."""
        if self._state is _State.SCALAR and not self._indices:
            self._end_scalar()
        return self._state is _State.END

    # Steps: each follows a part of a piece from an index on, and returns the index of the rest.

    def _expect_value(self, piece: bytes, at: int) -> int:
        at = _SPACE.match(piece, at).end()  # type: ignore[union-attr]  # also matches nothing
        if at == len(piece):
            return at
        byte = piece[at]
        if byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            self._enter(is_array=byte == _OPEN_ARRAY)
        elif byte == _QUOTE:
            self._state = _State.STRING
        elif byte in (_CLOSE_OBJECT, _CLOSE_ARRAY):  # an empty array
            self._leave()
        else:
            self._state, self._start = _State.SCALAR, b""
            return at
        return at + 1

    def _enter(self, *, is_array: bool) -> None:
        """Enter a container on the path, or skip another one, or one at the pointer itself."""
        if not self._is_on_path or len(self._indices) == len(self._path):
            self._state, self._depth = _State.SKIPPED, 1
        elif is_array:
            self._indices.append(0)
            self._choose(self._path[len(self._indices) - 1] == "0")
            self._state = _State.VALUE
        else:
            self._indices.append(None)
            self._state = _State.NAME

    def _leave(self) -> None:
        if self._indices:
            self._indices.pop()
        self._state = _State.AFTER if self._indices else _State.END

    def _choose(self, is_on_path: bool) -> None:  # noqa: FBT001 - the only argument
        """Determine whether the next value is on the path; if so, it replaces an earlier one of the same name."""
        self._is_on_path = is_on_path
        if is_on_path:
            self.value = None

    def _expect_name(self, piece: bytes, at: int) -> int:
        at = _SPACE.match(piece, at).end()  # type: ignore[union-attr]  # also matches nothing
        if at == len(piece):
            return at
        if piece[at] == _QUOTE:
            self._state, self._start = _State.IN_NAME, b""
        elif piece[at] == _CLOSE_OBJECT:
            self._leave()
        return at + 1

    def _in_name(self, piece: bytes, at: int) -> int:
        end, is_over = self._string_part(piece, at)
        if len(self._start) <= self._limit:
            self._start = (self._start + piece[at:end])[: self._limit + 1]
        if not is_over:
            return end
        self._choose(self._is_name(self._path[len(self._indices) - 1]))
        self._state = _State.COLON
        return end + 1

    def _is_name(self, token: str) -> bool:
        try:
            return bool(json.loads(b'"%b"' % self._start, strict=False) == token)
        except ValueError:  # cut off, as it is longer than the token, or not valid
            return False

    def _expect_colon(self, piece: bytes, at: int) -> int:
        at = piece.find(_COLON, at)
        if at < 0:
            return len(piece)
        self._state = _State.VALUE
        return at + 1

    def _after_value(self, piece: bytes, at: int) -> int:
        at = _SPACE.match(piece, at).end()  # type: ignore[union-attr]  # also matches nothing
        if at == len(piece):
            return at
        if piece[at] in (_CLOSE_OBJECT, _CLOSE_ARRAY):
            self._leave()
        elif piece[at] == _COMMA:
            index = self._indices[-1]
            if index is None:
                self._state = _State.NAME
            else:
                self._indices[-1] = index = index + 1
                self._choose(self._path[len(self._indices) - 1] == str(index))
                self._state = _State.VALUE
        return at + 1

    def _in_scalar(self, piece: bytes, at: int) -> int:
        end = _SCALAR.match(piece, at).end()  # type: ignore[union-attr]  # also matches nothing
        self._start = (self._start + piece[at:end])[: _MAX_NUMBER + 1]
        if end < len(piece):
            self._end_scalar()
        return end

    def _end_scalar(self) -> None:
        self._end_value()
        if not self._is_on_path or len(self._indices) < len(self._path) or len(self._start) > _MAX_NUMBER:
            return
        if _NUMBER.fullmatch(self._start):
            value = float(self._start)
            self.value = value if math.isfinite(value) else None

    def _end_value(self) -> None:
        self._state = _State.AFTER if self._indices else _State.END

    def _in_string(self, piece: bytes, at: int) -> int:
        end, is_over = self._string_part(piece, at)
        if is_over:
            self._end_value()
        return end + is_over

    def _in_skipped(self, piece: bytes, at: int) -> int:
        at = _SKIPPABLE.match(piece, at).end()  # type: ignore[union-attr]  # also matches nothing
        if at == len(piece):
            return at
        if piece[at] == _QUOTE:  # of a string that is not over
            self._state = _State.SKIPPED_STRING
            return at + 1
        opened = _OPENINGS.match(piece, at)
        if opened is not None:
            self._depth += opened.end() - at
            return opened.end()
        end = min(_CLOSINGS.match(piece, at).end(), at + self._depth)  # type: ignore[union-attr]  # nothing else is left
        self._depth -= end - at
        if not self._depth:
            self._end_value()
        return end

    def _in_skipped_string(self, piece: bytes, at: int) -> int:
        end, is_over = self._string_part(piece, at)
        if is_over:
            self._state = _State.SKIPPED
        return end + is_over

    def _string_part(self, piece: bytes, at: int) -> tuple[int, bool]:
        """Return the index of the closing quote and True, or the end of the piece and False."""
        if self._is_escaped:
            self._is_escaped = False
            at += 1
        end = _STRING_PART.match(piece, at).end()  # type: ignore[union-attr]  # also matches nothing
        if end == len(piece):
            return end, False
        if piece[end] == _BACKSLASH:  # the last byte
            self._is_escaped = True
            return end + 1, False
        return end, True

    def _at_end(self, piece: bytes, _at: int) -> int:
        return len(piece)


_STEPS: Mapping[_State, Callable[[JsonScanner, bytes, int], int]] = {
    _State.VALUE: JsonScanner._expect_value,  # noqa: SLF001 - its table
    _State.NAME: JsonScanner._expect_name,  # noqa: SLF001
    _State.IN_NAME: JsonScanner._in_name,  # noqa: SLF001
    _State.COLON: JsonScanner._expect_colon,  # noqa: SLF001
    _State.AFTER: JsonScanner._after_value,  # noqa: SLF001
    _State.SCALAR: JsonScanner._in_scalar,  # noqa: SLF001
    _State.STRING: JsonScanner._in_string,  # noqa: SLF001
    _State.SKIPPED: JsonScanner._in_skipped,  # noqa: SLF001
    _State.SKIPPED_STRING: JsonScanner._in_skipped_string,  # noqa: SLF001
    _State.END: JsonScanner._at_end,  # noqa: SLF001
}
