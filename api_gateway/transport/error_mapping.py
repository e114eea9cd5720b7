"""Translates httpx's errors into the gateway's own."""

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
from api_gateway.transport.httpx_call import AbortedCallsExceeded
from api_gateway.transport.local_resources import LocalResourcesExhausted
from api_gateway.transport.pool import ShareExceeded
from api_gateway.transport.shielded import NoHttp2

# From httpx's error to the gateway's and its detail, most specific first. Details contain no addresses.
_TRANSLATION: tuple[tuple[type[Exception], type[GatewayError], str], ...] = (
    (LocalResourcesExhausted, Overloaded, "the gateway has no descriptor or port for another connection"),
    (httpx.PoolTimeout, Overloaded, "no connection became available in time"),
    (NoHttp2, UpstreamConnectError, "its target does not offer HTTP/2, which http2: true requires"),
    (httpx.ConnectTimeout, UpstreamConnectTimeout, "no connection was established in time"),
    (httpx.TimeoutException, UpstreamTimeout, "it sent no data in time"),
    (httpx.ConnectError, UpstreamConnectError, "no connection could be established"),
    (httpx.UnsupportedProtocol, UpstreamConnectError, "no connection could be established"),
    (httpx.ProtocolError, UpstreamProtocolError, "its response was not valid HTTP"),
    (httpx.TransportError, UpstreamReset, "the connection was lost before the response was complete"),
)


def translate(error: Exception, upstream: str) -> GatewayError:
    """Return the gateway's error for one of httpx's transport errors.

    If a request on a stale connection could not be sent again for lack of a connection, the lack determines the error.
    """
    if isinstance(error.__cause__, LocalResourcesExhausted | httpx.PoolTimeout):
        error = error.__cause__
    if isinstance(error, httpx.LocalProtocolError):
        return BadRequest(f"The request cannot be forwarded: {error}.")
    if isinstance(error, ShareExceeded | AbortedCallsExceeded):
        return Overloaded(f"Upstream '{upstream}': {error}.", retry_after=1.0, extra={"upstream": upstream})
    kind, words = next((kind, words) for httpx_error, kind, words in _TRANSLATION if isinstance(error, httpx_error))
    retry_after = 1.0 if kind is Overloaded else None
    return kind(f"Upstream '{upstream}': {words}.", retry_after=retry_after, extra={"upstream": upstream})
