"""Event streams: a stream of server-sent events is ended between two events when the server stops.

The client reconnects by itself and sends the id of the last event it received (HTML standard, section 9.2), so no
event is lost.
"""

from api_gateway.http1.asgi import ServerExtension
from api_gateway.http1.headers import Fields
from api_gateway.transport.response import UpstreamResponse

_TYPE = b"text/event-stream"
_BOUNDARIES = (b"\n\n", b"\r\n\r\n", b"\r\r")  # an event ends with an empty line
_BOUNDARY_LENGTH = 4


class EventBoundaries:
    """Follows the bytes of a stream of events. The last ones determine the state: between events, or within one."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = _BOUNDARIES[0]  # the start of the stream counts as between events

    def __repr__(self) -> str:
        return f"<EventBoundaries [{'between events' if self.is_between else 'within an event'}]>"

    @property
    def is_between(self) -> bool:
        """True if no event is partially sent."""
        return self._tail.endswith(_BOUNDARIES)

    def follow(self, piece: bytes) -> None:
        """Follow a piece of the stream."""
        self._tail = (self._tail + piece)[-_BOUNDARY_LENGTH:]


class EventStream:
    """Ends `response` once the server stops and no event is partially sent."""

    def __init__(self, extension: ServerExtension, response: UpstreamResponse) -> None:
        self._extension = extension
        self._response = response
        self._events = EventBoundaries()
        extension.on_shutdown = self._on_shutdown
        if extension.is_stopping:
            self._on_shutdown()

    def __repr__(self) -> str:
        return f"<EventStream {self._events!r}>"

    @property
    def is_ending(self) -> bool:
        """True once the server stops: the stream may end before the upstream ends it."""
        return self._extension.is_stopping

    def on_piece(self, piece: bytes) -> bool:
        """Follow a forwarded piece; return whether the stream shall end after it."""
        self._events.follow(piece)
        return self._extension.is_stopping and self._events.is_between

    def _on_shutdown(self) -> None:
        if self._events.is_between and not self._response.pieces:
            self._response.end_early()


def is_event_stream(fields: Fields) -> bool:
    """Tell whether a response with these header fields is an event stream: `text/event-stream` without a length."""
    types = fields.get(b"content-type")
    return types is not None and types[0].lower().startswith(_TYPE) and b"content-length" not in fields


def event_stream(extension: ServerExtension | None, fields: Fields, response: object) -> EventStream | None:
    """Return the `EventStream` of a response with these header fields.

    None if it is not an event stream, or has a content coding, which hides the boundaries of events.
    """
    if extension is None or b"content-encoding" in fields or not is_event_stream(fields):
        return None
    return EventStream(extension, response) if isinstance(response, UpstreamResponse) else None
