"""Tables as text, in columns."""

from collections.abc import Iterable, Sequence

from api_gateway.printable_text import printable

MAX_CELL = 80  # characters


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table. A cell is `-` for None, printable, and shortened to `MAX_CELL` characters."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    text = f"{value:g}" if isinstance(value, float) else printable(str(value))
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 3]}..."
