"""Draining: the server stops, and a connection ends without losing a request that its client is sending."""

from api_gateway.downstream.last_request import contains_last_request
from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.states import ConnectionEvent


def drain(owner: ConnectionOwner) -> None:
    """Close a connection gracefully. Idempotent.

    A response whose head has not been sent gets `Connection: close`. An idle connection stays open for `drain_linger`
    seconds, so that a request that was already sent gets a response with `Connection: close`.
    """
    if owner.state.is_draining:
        return
    owner.move(ConnectionEvent.DRAIN)
    if owner.pipeline.current is not None:
        owner.pipeline.current.stop()
    if owner.exchange is not None:
        owner.exchange.on_drain()
    announce_close(owner)


def announce_close(owner: ConnectionOwner) -> None:
    """Add `Connection: close` to the last pending response, unless its head has been sent."""
    last, exchange = owner.pipeline.last, owner.exchange
    if owner.held.data or owner.state.is_ending:  # repeated once the held requests have been parsed
        return
    if exchange is not None:
        exchange.keep_alive = exchange.keep_alive and exchange.is_head_sent
    elif last is not None and not last.is_response_complete:
        last.keep_alive = last.keep_alive and last.is_started
    else:
        drain_idle(owner)


def drain_idle(owner: ConnectionOwner) -> None:
    """Wait `drain_linger` seconds for one more request, which is served on the ASGI path."""
    owner.accepts_plain = False
    if owner.state.is_between:
        owner.timer.set(owner.limits.drain_linger)


def owes_response(owner: ConnectionOwner) -> bool:
    """Return whether a client that has ended its side gets the responses that are due.

    It does if it has sent a complete request that announces this end, by `Connection: close` or as one of HTTP/1.0
    (RFC 9112 section 9.6), wherever that request is: served, queued or held. Any other end counts as a disconnect. TCP
    reports both alike, and for a client that has disconnected, a stream would be forwarded without end.
    """
    exchange, last = owner.exchange, owner.pipeline.last
    if owner.state.is_ending:
        return False
    is_handshake = exchange.is_handshake if exchange is not None else last is not None and bool(last.upgrade)
    if owner.held.data and not is_handshake and contains_last_request(bytes(owner.held.data), owner.limits):
        return True
    if exchange is not None:
        return owner.receiving is None and not exchange.keep_alive
    return last is not None and not last.is_response_complete and last.is_body_complete and not last.keep_alive
