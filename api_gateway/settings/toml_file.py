"""Reads configuration files in TOML, with the line of each value."""

import re
import tomllib
from bisect import bisect_right
from pathlib import Path

from api_gateway.settings.diagnostics import QUOTED, ConfigError, KeyPath, SettingsFile, settings_text

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
_STRING = re.compile(
    r'"""(?:\\.|(?!""").)*"{3,5}' + r"|'''(?:(?!''').)*'{3,5}" + r"""|"(?:\\.|[^"\\])*"|'[^']*'""", re.DOTALL
)
_PLAIN = re.compile(r"[^,\]}#\r\n]+")
_AT = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def read_toml(path: Path) -> SettingsFile:
    """Read a file of sections. Raises ConfigError if it cannot be read or is not TOML."""
    text = settings_text(path)
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError([f"{path}{_not_toml(str(error))}"]) from None
    lines = {tuple(map(str.lower, place)): line for place, line in toml_lines(text)}
    return SettingsFile(path, values, {place: f"{path}:{line}" for place, line in lines.items()})


def _not_toml(message: str) -> str:
    """Return line and problem without the quoted text of the file, which may be a secret."""
    at = _AT.search(message)
    problem = QUOTED.sub(lambda quoted: quoted[0] if len(quoted[2]) <= 2 else "'...'", _AT.sub("", message))  # noqa: PLR2004 - one character, maybe escaped
    line = f":{at[1]}" if at is not None and at[1] else ""
    return f"{line}: not TOML: {problem[:1].lower()}{problem[1:] or 'it cannot be read'}"


def toml_lines(text: str) -> list[tuple[KeyPath, int]]:
    """Return the place and line of each value of a valid TOML text; what encloses a value comes before it."""
    reader = _TomlLines(text)
    reader.read()
    return reader.lines


class _TomlLines:
    """Reads a valid text once; `_at` is where it is, and `_counts` how many tables each array of tables has so far."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._starts = [found.end() for found in re.finditer("\n", self._text)]
        self._at = 0
        self._counts: dict[KeyPath, int] = {}
        self._seen: set[KeyPath] = set()
        self.lines: list[tuple[KeyPath, int]] = []

    def read(self) -> None:
        """Fill `lines` with the place and line of each value."""
        table: KeyPath = ()
        self._skip()
        while self._at < len(self._text):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip()

    def _header(self) -> KeyPath:
        line = self._line()
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        parts = self._key()
        self._skip()
        self._at += 2 if is_array else 1
        place: KeyPath = ()
        for number, part in enumerate(parts, 1):
            place = (*place, part)
            self._mark(place, line)
            if is_array and number == len(parts):
                self._counts[place] = self._counts.get(place, 0) + 1
            if place in self._counts:
                place = (*place, str(self._counts[place] - 1))
                self._mark(place, line)
        return place

    def _pair(self, table: KeyPath) -> None:
        line, place = self._line(), table
        for part in self._key():
            place = (*place, part)
            self._mark(place, line)
        self._skip()
        self._at += 1  # the equals sign
        self._skip()
        self._value(place)

    def _value(self, place: KeyPath) -> None:
        first = self._text[self._at]
        if first == "{":
            self._items("}", place)
        elif first == "[":
            self._items("]", place)
        else:
            found = (_STRING if first in "\"'" else _PLAIN).match(self._text, self._at)
            self._at = len(self._text) if found is None else found.end()

    def _items(self, end: str, place: KeyPath) -> None:
        """Read an array, or an inline table."""
        self._at += 1
        index = 0
        self._skip()
        while self._at < len(self._text) and self._text[self._at] != end:
            if end == "}":
                self._pair(place)
            else:
                self._mark((*place, str(index)), self._line())
                self._value((*place, str(index)))
                index += 1
            self._skip()
            if self._text[self._at : self._at + 1] == ",":
                self._at += 1
                self._skip()
        self._at += 1

    def _key(self) -> list[str]:
        parts: list[str] = []
        while True:
            self._skip()
            found = _KEY.match(self._text, self._at)
            if found is None:
                return parts
            self._at = found.end()
            parts.append(tomllib.loads(f"key = {found[0]}")["key"] if found[0][0] in "\"'" else found[0])
            dot = _DOT.match(self._text, self._at)
            if dot is None:
                return parts
            self._at = dot.end()

    def _mark(self, place: KeyPath, line: int) -> None:
        if place not in self._seen:
            self._seen.add(place)
            self.lines.append((place, line))

    def _skip(self) -> None:
        found = _SPACE.match(self._text, self._at)
        self._at = self._at if found is None else found.end()

    def _line(self) -> int:
        return bisect_right(self._starts, self._at) + 1
