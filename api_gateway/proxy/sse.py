"""Event streams: a stream of server-sent events is ended between two events when the server stops.

The client reconnects by itself and sends the id of the last event it received (HTML standard, section 9.2), so no
event is lost.
"""

from api_gateway.http1.headers import Fields

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


def is_event_stream(fields: Fields) -> bool:
    """Return whether a response with these header fields is an event stream: `text/event-stream` without a length."""
    types = fields.get(b"content-type")
    return types is not None and types[0].lower().startswith(_TYPE) and b"content-length" not in fields
