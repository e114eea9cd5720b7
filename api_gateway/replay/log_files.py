"""Access logs as files: plain or gzip'd, rotated, in parts that processes can read at the same time."""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from api_gateway.replay.errors import ReplayError

BLOCK_BYTES = 4 * 1024 * 1024  # bytes that are read at a time
MAX_LINE_BYTES = 1024 * 1024  # bytes; what follows counts as another line
PART_BYTES = 64 * 1024 * 1024  # bytes of a plain file that one task reads
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class LogPart:
    """The lines of a file that begin from `begin` until before `end`; a compressed file is one part."""

    path: Path
    begin: int
    end: int
    is_compressed: bool


class BrokenFile(Exception):
    """A file cannot be read further, such as a compressed one that is cut off; the message says why."""


def log_parts(paths: Sequence[Path], size: int = PART_BYTES) -> list[LogPart]:
    """Return the parts of all files, in order; an empty file is one. Raises ReplayError if one cannot be read."""
    found: list[LogPart] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                is_compressed = file.read(2) == _GZIP
                end = file.seek(0, 2)
        except OSError as error:
            raise ReplayError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
        if is_compressed:
            found.append(LogPart(path, 0, end, is_compressed=True))
        else:
            found += [LogPart(path, at, min(at + size, end), is_compressed=False) for at in range(0, end or 1, size)]
    return found


def blocks_of(part: LogPart) -> Iterator[tuple[list[str], bool]]:
    """Yield the lines of a part, many at a time, and whether the last of them is complete.

    Lines are decoded as Latin-1, which any bytes are. Raises BrokenFile.
    """
    try:
        if part.is_compressed:
            with gzip.open(part.path, "rb") as file:
                yield from _blocks(file, None)
        else:
            with part.path.open("rb") as file:
                if part.begin:
                    file.seek(part.begin - 1)
                    file.readline()
                yield from _blocks(file, part.end)
    except (OSError, EOFError, zlib.error) as error:
        raise BrokenFile(str(error).lower().rstrip(".")) from None


def _blocks(file: "IO[bytes] | gzip.GzipFile", end: int | None) -> Iterator[tuple[list[str], bool]]:
    position = file.tell()
    while end is None or position < end:
        data = file.read(BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - position))
        if not data:
            return
        if not data.endswith(b"\n"):
            data += file.readline(MAX_LINE_BYTES)
        position += len(data)
        lines = data.decode("latin-1").split("\n")
        is_complete = not lines[-1]
        if is_complete:
            lines.pop()
        yield lines, is_complete
