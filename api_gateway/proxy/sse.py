"""Answers without an end of their own: a stream of server-sent events is ended between two of them.

Its reader comes back by itself, on another connection, and says which event it had last (the HTML standard, section
9.2). So a gateway that stops need not cut it off.
"""

from api_gateway.http1.asgi import ServerExtension
from api_gateway.http1.headers import Fields
from api_gateway.transport.response import UpstreamResponse

_TYPE = b"text/event-stream"
_EDGES = (b"\n\n", b"\r\n\r\n", b"\r\r")  # an event ends with an empty line
_LONGEST = 4


class EventStream:
    """Ends `answer` once the server stops and no event is half sent."""

    def __init__(self, extension: ServerExtension, answer: UpstreamResponse) -> None:
        self._extension = extension
        self._answer = answer
        self._tail = _EDGES[0]  # before the first event is between two as well
        extension.on_shutdown = self._on_stopping
        if extension.is_stopping:
            self._on_stopping()

    def __repr__(self) -> str:
        return f"<EventStream [{'between events' if self._tail.endswith(_EDGES) else 'within an event'}]>"

    def on_piece(self, piece: bytes) -> bool:
        """Note what is passed on; tell whether the stream shall end behind it."""
        self._tail = (self._tail + piece)[-_LONGEST:]
        return self._extension.is_stopping and self._tail.endswith(_EDGES)

    def _on_stopping(self) -> None:
        if self._tail.endswith(_EDGES) and not self._answer.pieces:
            self._answer.end_early()


def is_event_stream(fields: Fields) -> bool:
    """Tell whether an answer with these headers is a stream of events without an end of its own."""
    types = fields.get(b"content-type")
    return types is not None and types[0].lower().startswith(_TYPE) and b"content-length" not in fields


def event_stream(extension: ServerExtension | None, fields: Fields, answer: object) -> EventStream | None:
    """Return what ends the answer of these headers politely.

    None if it has an end of its own, or a content coding: of that only its decoder sees where an event ends.
    """
    if extension is None or b"content-encoding" in fields or not is_event_stream(fields):
        return None
    return EventStream(extension, answer) if isinstance(answer, UpstreamResponse) else None
