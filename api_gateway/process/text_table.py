"""Tables as text, in columns."""

from collections.abc import Iterable, Sequence

from api_gateway.printable_text import printable

MAX_CELL_WIDTH = 80  # characters


def table(header: Sequence[str], rows: Iterable[Sequence[object]], width: int = MAX_CELL_WIDTH) -> list[str]:
    """Return the lines of a table. A cell is `-` for None, printable, and shortened to `width` characters."""
    cells = [list(header), *([_cell(value, width) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: object, width: int) -> str:
    if value is None or value == "":
        return "-"
    text = f"{value:g}" if isinstance(value, float) else printable(str(value))
    return text if len(text) <= width else f"{text[: width - 3]}..."
