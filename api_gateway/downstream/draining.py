"""Draining: the server stops, and a connection ends without losing a request that its client is sending."""

import re

from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.states import ConnectionEvent

_LAST_REQUEST = re.compile(rb"(?i)close| HTTP/1\.0")  # what a request that ends its connection contains


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
    """Tell whether a client that has ended its side is owed a response."""
    last = owner.pipeline.last
    if owner.state.is_ending:
        return False
    if owner.held.data and not (last is not None and last.upgrade) and _LAST_REQUEST.search(owner.held.data):
        return True
    if owner.exchange is not None:
        return owner.receiving is None and not owner.exchange.keep_alive
    return last is not None and not last.is_response_complete and last.is_body_complete and not last.keep_alive
