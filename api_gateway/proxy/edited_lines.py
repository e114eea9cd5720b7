"""Header lines of a request that were edited for a route, kept with the meaning of its fields: clients repeat both."""

from typing import Protocol

EditedLines = tuple[object, bytes, bytes]  # the editor, the lines that it was given, and what it made of them
NOTHING_EDITED: EditedLines = None, b"", b""


class KeepsEditedLines(Protocol):
    """What belongs to the header fields of requests, such as `HeaderFacts`, with the lines edited last."""

    edited: EditedLines
