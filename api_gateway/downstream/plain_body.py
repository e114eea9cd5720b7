"""The body of a request on the fast path: counted behind a plain head, or read by the general parser.

It belongs to the exchange in flight, then to what the exchange leaves behind: the rest of the body after an early
response, or the request cycle of the ASGI path that takes over.
"""

from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.request_cycle import RequestResponseCycle
from api_gateway.downstream.states import ConnectionEvent
from api_gateway.http1.asgi import BodyReceiver


def begin_body(owner: ConnectionOwner, body: BodyReceiver, left: int) -> None:
    """Pass the next `left` bytes to `body`, or, if they are 0, what the parser reads of the body.

    Without an effect but on the timeout if that is done already.
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


def take_over(owner: ConnectionOwner, cycle: RequestResponseCycle, body: bytes) -> None:
    """Serve a request of the fast path on the ASGI path, with what has arrived of its body and what follows."""
    owner.exchange = None
    owner.accepts_plain = False
    if body:
        cycle.feed(body)
    if owner.receiving is None:
        cycle.end_body()
    else:
        cycle.continue_from(owner.receiving)
        owner.receiving = cycle
    owner.move(ConnectionEvent.FALL_BACK)
    owner.pipeline.enqueue(owner, cycle)
    if owner.state.is_ending:
        return
    owner.timeouts.apply(owner)
    if owner.held.data:
        owner.held.replay_soon(owner)
    elif owner.state.is_held:
        owner.move(ConnectionEvent.RELEASE)
