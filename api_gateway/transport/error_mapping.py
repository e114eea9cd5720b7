"""Errors of a transport, translated into the gateway's own."""

import httpx

from api_gateway.errors import (
    BadRequest,
    GatewayError,
    Overloaded,
    UpstreamConnectError,
    UpstreamConnectTimeout,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.transport.local_resources import LocalResourcesExhausted
from api_gateway.transport.pool import OverShare

# httpx's failures in our words, most specific first. What the client is told names no address.
_TRANSLATION: tuple[tuple[type[Exception], type[GatewayError], str], ...] = (
    (LocalResourcesExhausted, Overloaded, "this gateway has no descriptor or port left for a connection to it"),
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
    if isinstance(error.__cause__, LocalResourcesExhausted | httpx.PoolTimeout):
        error = error.__cause__
    if isinstance(error, httpx.LocalProtocolError):
        return BadRequest(f"The request cannot be sent on: {error}.")
    if isinstance(error, OverShare):
        return Overloaded(f"Upstream '{upstream}': {error}.", retry_after=1.0, extra={"upstream": upstream})
    kind, words = next((ours, words) for theirs, ours, words in _TRANSLATION if isinstance(error, theirs))
    retry_after = 1.0 if kind is Overloaded else None
    return kind(f"Upstream '{upstream}': {words}.", retry_after=retry_after, extra={"upstream": upstream})
