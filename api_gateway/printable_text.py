"""Text of clients and upstreams as a terminal may show it, in lines and in tables."""

from collections.abc import Iterable, Sequence

MAX_CELL_WIDTH = 80  # characters


def printable(text: str) -> str:
    """Return the text with what is not printable (line breaks, escape sequences) in the form of Python's escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


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


def shortened(text: str, size: int) -> str:
    """Return at most `size` characters of the text; the last three show that there are more."""
    return text if len(text) <= size else f"{text[: size - 3]}..."


def _cell(value: object, width: int) -> str:
    if value is None or value == "":
        return "-"
    return shortened(f"{value:g}" if isinstance(value, float) else printable(str(value)), width)
