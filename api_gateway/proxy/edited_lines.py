"""Header lines of a request that were edited for a route, kept with the meaning of its fields: clients repeat both."""

from typing import Protocol

EditedLines = tuple[object, bytes, bytes]  # the editor, the lines that it was given, and what it made of them
NOTHING_EDITED: EditedLines = None, b"", b""


class EditedLinesCache(Protocol):
    """An object that belongs to a header set, such as `HeaderFacts`, and keeps the last edited lines."""

    edited: EditedLines
