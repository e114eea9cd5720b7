"""Errors of a transport translated into the gateway's own, who is at fault for them, and how the record notes them."""

from typing import NamedTuple

import httpx

from api_gateway.deadline import Deadline
from api_gateway.errors import (
    BadRequest,
    ClientDisconnected,
    Fault,
    GatewayError,
    LoadShed,
    Overloaded,
    UpstreamConnectError,
    UpstreamConnectTimeout,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.local_resources import OutOfResources
from api_gateway.models import Exchange, Outcome
from api_gateway.pool import OverShare

CLIENT_PAUSE = 1.0  # seconds for which a client keeps an upstream waiting, after which the upstream may have given up

# httpx's failures in our words, most specific first. What the client is told names no address.
_TRANSLATION: tuple[tuple[type[Exception], type[GatewayError], str], ...] = (
    (OutOfResources, Overloaded, "this gateway has no descriptor or port left for a connection to it"),
    (httpx.PoolTimeout, Overloaded, "no connection to it came free in time"),
    (httpx.ConnectTimeout, UpstreamConnectTimeout, "it did not accept a connection in time"),
    (httpx.TimeoutException, UpstreamTimeout, "it was silent for too long"),
    (httpx.ConnectError, UpstreamConnectError, "no connection to it could be made"),
    (httpx.UnsupportedProtocol, UpstreamConnectError, "no connection to it could be made"),
    (httpx.ProtocolError, UpstreamProtocolError, "its answer was not valid HTTP"),
    (httpx.TransportError, UpstreamReset, "its connection broke before the answer was complete"),
)


def translate(error: Exception, upstream: str) -> GatewayError:
    """Translate one of httpx's errors. A second sending that found no connection is the gateway's own error."""
    if isinstance(error.__cause__, OutOfResources | httpx.PoolTimeout):
        error = error.__cause__
    if isinstance(error, httpx.LocalProtocolError):
        return BadRequest(f"The request cannot be sent on: {error}.")
    if isinstance(error, OverShare):
        return Overloaded(f"Upstream '{upstream}': {error}.", retry_after=1.0, extra={"upstream": upstream})
    kind, words = next((ours, words) for theirs, ours, words in _TRANSLATION if isinstance(error, theirs))
    retry_after = 1.0 if kind is Overloaded else None
    return kind(f"Upstream '{upstream}': {words}.", retry_after=retry_after, extra={"upstream": upstream})


class ClientShare(NamedTuple):
    """What the client had to do with the end of an attempt.

    `has_sent_all`: the gateway has the whole request. `is_awaited`: the next piece of its body was being waited for.
    `waited` is how many seconds the client kept the upstream waiting, by sending or by reading slowly.
    """

    has_sent_all: bool = True
    is_awaited: bool = False
    waited: float = 0.0


NO_SHARE = ClientShare()

# What a fault says about the upstream. The principal of a TARGET's fault is nobody: see `CircuitBreaker.settle`.
OUTCOMES = {
    Fault.CLIENT: Outcome.IGNORED,
    Fault.UPSTREAM: Outcome.FAILURE,
    Fault.TARGET: Outcome.FAILURE,
    Fault.GATEWAY: Outcome.IGNORED,
    Fault.NOBODY: Outcome.IGNORED,
}


def fault_of(error: GatewayError, client: ClientShare = NO_SHARE) -> Fault:
    """Return who is at fault for a failed attempt: nobody instead of the upstream where it may be the client.

    | error | client | fault |
    |---|---|---|
    | its own, the gateway's, or the target's (connecting) | any | as the error's class says |
    | the connection broke | had not sent all of the request, or had kept the upstream waiting | nobody |
    | the upstream was silent | was the one waited for | nobody |
    | any other | any | upstream |
    """
    if error.fault is not Fault.UPSTREAM:
        return error.fault
    if isinstance(error, UpstreamTimeout):
        may_be_client = client.is_awaited
    else:
        may_be_client = not client.has_sent_all or client.waited >= CLIENT_PAUSE
    return Fault.NOBODY if may_be_client else Fault.UPSTREAM


def fault_of_status(status: int, client: ClientShare = NO_SHARE) -> Fault:
    """Return who is at fault for a status: for a server error the upstream, unless it came before all was sent."""
    if status < 500:  # noqa: PLR2004 - the class of server errors
        return Fault.CLIENT
    return Fault.UPSTREAM if client.has_sent_all else Fault.NOBODY


def fault_of_deadline(deadline: Deadline, spent: float, client: ClientShare) -> Fault:
    """Return who is at fault when a deadline ends an attempt on which the upstream has spent so many seconds.

    The client for a deadline of its own; else the upstream, if it had the whole request and at least half of the time.
    """
    if not deadline.is_upstream_fault:
        return Fault.CLIENT
    return Fault.UPSTREAM if client.has_sent_all and spent >= deadline.seconds / 2 else Fault.NOBODY


def note_failure(exchange: Exchange, error: GatewayError) -> None:
    """Write into the record why an exchange failed; of one whose client has left also that this was its end."""
    exchange.reason = error.reason.value
    note_shed(exchange, error)
    cause = str(error.__cause__ or "")
    exchange.detail = f"{error.detail} ({cause})" if cause else error.detail
    if isinstance(error, ClientDisconnected):
        exchange.status, exchange.source = error.status, "gateway"


def note_shed(exchange: Exchange, error: GatewayError) -> None:
    """Write down who had no room for it, once each: its upstream of the moment, or None for the gateway itself."""
    if isinstance(error, LoadShed) and exchange.upstream not in exchange.shed_by:
        exchange.shed_by += (exchange.upstream,)
