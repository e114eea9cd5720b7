"""Health checks: one GET on a transport, of which only the status counts."""

import httpx

from api_gateway.transport.http1_transport import AnyTransport, UpstreamTransport
from api_gateway.transport.pool import StaleConnection
from api_gateway.transport.request import NO_BODY, Origin, render_get
from api_gateway.transport.response import NO_LISTENER, TimeoutExtension, UpstreamResponse
from api_gateway.transport.upstream_connection import UpstreamConnection


async def probe(
    transport: AnyTransport,
    url: str,
    seconds: float,
    *,
    address: str | None = None,
    host: bytes | None = None,
    keeps_connection: bool = True,
) -> int:
    """Send a GET for a health check and return the status. Raises httpx.TransportError, also on a timeout.

    `seconds` limits each of connecting, waiting for a connection, and waiting for data. `address` replaces the address
    of the host in `url`, and `host` the value of `Host`. Unless `keeps_connection`, the pool of an `UpstreamTransport`
    for that address is retired.
    """
    target = httpx.URL(url)
    origin = Origin.of(target, address)
    headers = [(b"host", host or target.netloc), (b"user-agent", b"api-gateway-health")]
    timeouts: TimeoutExtension = {"connect": seconds, "pool": seconds, "read": seconds}
    if not isinstance(transport, UpstreamTransport):
        request = origin.plain_request(
            "GET", headers, target.raw_path, stream=NO_BODY, extensions={"timeout": timeouts}
        )
        response = await transport.handle_async_request(request)
        await response.aclose()
        return response.status_code
    head = render_get(target.raw_path, headers)
    pool = transport.pool(origin)
    try:
        connection = pool.acquire_idle(None)
        if connection is not None:
            try:
                return await _status(connection, head, timeouts)
            except StaleConnection:
                pass  # the upstream has closed it while it was idle
        return await _status(await pool.acquire(seconds, seconds, is_fresh=True), head, timeouts)
    finally:
        if not keeps_connection:
            transport.retire(origin)


async def _status(connection: UpstreamConnection, head: bytes, timeouts: TimeoutExtension) -> int:
    """Send a request and return the status of its response; the connection is closed if a body follows the head."""
    response = UpstreamResponse(connection, "GET", timeouts, NO_LISTENER)
    connection.start(response, head)
    try:
        await response.wait_head()
        return response.status
    finally:
        response.close()
