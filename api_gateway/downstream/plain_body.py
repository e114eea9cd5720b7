"""The body of a request on the fast path: counted behind a plain head, or read by the general parser.

It belongs to the exchange in flight, then to what the exchange leaves behind: the rest of the body after an early
response.
"""

from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.states import ConnectionEvent
from api_gateway.http1.asgi import BodyReceiver


def begin_body(owner: ConnectionOwner, body: BodyReceiver, left: int) -> None:
    """Pass the next `left` bytes to `body`, or, if they are 0, what the parser reads of the body.

    If this has been done before, only the timeout changes.
    """
    if owner.receiving is not body:
        owner.receiving, owner.body_left = body, left
        owner.discarded = 0
        owner.timeouts.begin_body()
        owner.move(ConnectionEvent.BODY_AWAITED)
    owner.timeouts.await_body(owner)


def take_body(owner: ConnectionOwner, data: bytes) -> memoryview:
    """Pass on what belongs to the body; return what follows it, empty if there is more to come or nothing."""
    size = min(owner.body_left, len(data))
    owner.body_left -= size
    rest = memoryview(data)[size:]
    owner.reader.sink.on_body_piece(data[:size] if rest else data)
    if owner.state.is_ending:
        return rest[:0]
    if owner.body_left:
        owner.timeouts.await_body(owner)
    else:
        owner.reader.sink.on_body_complete()
    return rest
