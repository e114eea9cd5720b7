"""Text of clients and upstreams as logs and terminals may show it: characters, methods, tables."""

import re
from collections.abc import Iterable, Sequence

MAX_CELL_WIDTH = 80  # characters
_SHOWN_NAMES = 3
OTHER_METHOD = "_OTHER"  # as in OpenTelemetry's conventions
# The method registry of IANA, of November 2026.
REGISTERED_METHODS = frozenset(
    {
        *("ACL", "BASELINE-CONTROL", "BIND", "CHECKIN", "CHECKOUT", "CONNECT", "COPY", "DELETE"),
        *("GET", "HEAD", "LABEL", "LINK", "LOCK", "MERGE", "MKACTIVITY", "MKCALENDAR"),
        *("MKCOL", "MKREDIRECTREF", "MKWORKSPACE", "MOVE", "OPTIONS", "ORDERPATCH", "PATCH", "POST"),
        *("PRI", "PROPFIND", "PROPPATCH", "PUT", "QUERY", "REBIND", "REPORT", "SEARCH"),
        *("TRACE", "UNBIND", "UNCHECKOUT", "UNLINK", "UNLOCK", "UPDATE", "UPDATEREDIRECTREF", "VERSION-CONTROL"),
    }
)
# One letter less than the shortest operator token that the settings accept: no credential is shown.
_SHORT_METHOD = re.compile(r"[A-Za-z-]{1,7}")


def printable(text: str) -> str:
    """Return the text with what is not printable (line breaks, escape sequences) in the form of Python's escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 route", "2 routes"."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def shown_method(method: str) -> str:
    """Return a method as logs, traces and histories show it.

    A registered one, in any letter case, or one of at most seven letters; for any other `OTHER_METHOD`, because a
    client that mixes up the parts of a request can send a credential as the method.
    """
    if method in REGISTERED_METHODS or _SHORT_METHOD.fullmatch(method) or method.upper() in REGISTERED_METHODS:
        return method
    return OTHER_METHOD


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    width: int = MAX_CELL_WIDTH,
    *,
    aligns_numbers: bool = False,
) -> list[str]:
    """Return the lines of a table. A cell is `-` for None, printable, and shortened to `width` characters.

    `aligns_numbers`: what begins with a digit is aligned right, except in the first column.
    """
    cells = [list(header), *([_cell(value, width) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(wide) if aligns_numbers and column and cell[:1].isdigit() else cell.ljust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def some_of(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    shown = list(names)
    more = len(shown) - _SHOWN_NAMES
    return ", ".join(shown[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def shortened(text: str, size: int) -> str:
    """Return at most `size` characters of the text; the last three show that there are more."""
    return text if len(text) <= size else f"{text[: size - 3]}..."


def _cell(value: object, width: int) -> str:
    if value is None or value == "":
        return "-"
    return shortened(f"{value:g}" if isinstance(value, float) else printable(str(value)), width)
