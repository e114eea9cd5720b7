"""Failures of a transport put in our words, and how a failure is written into the record of its exchange."""

import httpx

from api_gateway.errors import (
    BadRequest,
    ClientDisconnected,
    GatewayError,
    Overloaded,
    Shed,
    UpstreamConnectError,
    UpstreamConnectTimeout,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.models import Exchange
from api_gateway.pool import OverShare

# httpx's failures in our words, most specific first. What the client is told names no address.
_TRANSLATION: tuple[tuple[type[Exception], type[GatewayError], str], ...] = (
    (httpx.PoolTimeout, Overloaded, "no connection to it came free in time"),
    (httpx.ConnectTimeout, UpstreamConnectTimeout, "it did not accept a connection in time"),
    (httpx.TimeoutException, UpstreamTimeout, "it was silent for too long"),
    (httpx.ConnectError, UpstreamConnectError, "no connection to it could be made"),
    (httpx.UnsupportedProtocol, UpstreamConnectError, "no connection to it could be made"),
    (httpx.ProtocolError, UpstreamProtocolError, "its answer was not valid HTTP"),
    (httpx.TransportError, UpstreamReset, "its connection broke before the answer was complete"),
)


def translate(error: Exception, upstream: str) -> GatewayError:
    """Put one of httpx's failures in our words."""
    if isinstance(error, httpx.LocalProtocolError):
        return BadRequest(f"The request cannot be sent on: {error}.")
    if isinstance(error, OverShare):
        return Overloaded(f"Upstream '{upstream}': {error}.", retry_after=1.0, extra={"upstream": upstream})
    kind, words = next((ours, words) for theirs, ours, words in _TRANSLATION if isinstance(error, theirs))
    retry_after = 1.0 if kind is Overloaded else None
    return kind(f"Upstream '{upstream}': {words}.", retry_after=retry_after, extra={"upstream": upstream})


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
    if isinstance(error, Shed) and exchange.upstream not in exchange.shed_by:
        exchange.shed_by += (exchange.upstream,)
