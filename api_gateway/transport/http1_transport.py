"""HTTP/1.1 to the upstreams: an `httpx.AsyncBaseTransport` on asyncio and httptools, with a pool of its own.

Why not httpx's: its pool loses a slot when a request is cancelled inside it (encode/httpcore#1093), and a gateway's
requests are cancelled whenever a client hangs up. Here a request that is cancelled closes its connection, at once and
without awaiting. Bytes travel as they are: no header is added, no body decoded, nothing held whole.

Failures are httpx's own: ConnectError and ConnectTimeout (nothing was sent), PoolTimeout (no connection came free),
ReadError (the connection broke), ReadTimeout (silence), RemoteProtocolError (what came was not HTTP); and
LocalResourcesExhausted, a ConnectError for which this process is the cause.

`request.extensions` may hold `target` (the raw request target, bytes), `timeout`, a dict of seconds: `connect`,
`pool`, `read` (for the answer's head), `idle` (between pieces of a body; `read` if absent), `hooks`, and `holder`,
whose share of the connections it takes. A response's `extensions` hold `reason_phrase`, and `switched` after a 101:
the answer, whose connection can be taken over.
"""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import httpx

from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.transport.connection import StaleConnection, UpstreamConnection
from api_gateway.transport.local_resources import LocalResourcesExhausted, is_local_exhaustion
from api_gateway.transport.pool import Pool
from api_gateway.transport.request import NO_BODY, LeanRequest, Origin
from api_gateway.transport.response import NO_LIMITS, NO_LISTENER, LeanResponse, UpstreamResponse

_REPEATABLE = IDEMPOTENT | {"TRACE"}


class UpstreamTransport(httpx.AsyncBaseTransport):
    """The transport of one upstream, with a pool for each of its targets.

    `max_connections` bounds each pool, `max_tunnels` the tunnels and event streams beside it, `idle_timeout` (seconds)
    is how long an unused connection is kept. `tls` is used for https targets.
    """

    def __init__(
        self,
        *,
        max_connections: int = 512,
        max_tunnels: int = 4096,
        idle_timeout: float = 60.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._max_connections = max_connections
        self._max_tunnels = max_tunnels
        self._idle_timeout = idle_timeout
        self._tls = tls
        self._is_retired = False
        self._pools: dict[tuple[str, str, int, str], Pool[UpstreamConnection]] = {}

    def __repr__(self) -> str:
        return f"<UpstreamTransport {self._pools!r}>"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return its response with the body still to come; close it to let go.

        If a reused connection dies before any byte of the answer, the request goes out once more on a new one,
        provided that its method is idempotent and it has no body (RFC 9110 section 9.2.2).
        """
        outgoing = request if isinstance(request, LeanRequest) else LeanRequest.of(request)
        pool = self.pool(outgoing.origin)
        extensions = outgoing.extensions
        if extensions.get("hooks", NO_LISTENER).upgrade:  # it is not worth a handshake
            pool.admit_tunnel(extensions.get("holder"))
        connection = pool.take_idle(extensions.get("holder")) or await self._wait(pool, outgoing)
        return await self.response_to(outgoing, connection.send(outgoing))

    async def response_to(self, request: LeanRequest, answer: UpstreamResponse) -> httpx.Response:
        """Wait for the head of an answer whose request is on its way; see `handle_async_request`."""
        is_repeated = False
        while True:
            try:
                await answer.wait_head()
            except StaleConnection:
                if is_repeated or request.method not in _REPEATABLE or request.framing is not None:
                    raise
                try:
                    connection = await self._wait(self.pool(request.origin), request, is_fresh=True)
                except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
                    raise httpx.ReadError(
                        f"{StaleConnection()}; once more: {error}"
                    ) from error  # it has been sent before
                answer, is_repeated = connection.send(request), True
            except BaseException:
                answer.close()
                raise
            else:
                return LeanResponse(answer)

    def pool(self, origin: Origin) -> Pool[UpstreamConnection]:
        """Return the connections to `origin`."""
        return self._pools.get(origin.key) or self._make_pool(origin)

    def resources(self) -> tuple[list[FairShares], list[FairShares]]:
        """Return the shares of the connections in use, and of the tunnels, of each target that has been used."""
        return [pool.shares for pool in self._pools.values()], [pool.tunnels for pool in self._pools.values()]

    def retire(self, origin: Origin) -> bool:
        """Keep no idle connection to `origin`, and forget it once none is left. Returns whether that is so."""
        pool = self._pools.get(origin.key)
        if pool is not None:
            pool.retire()
            if not pool.is_empty:
                return False
            del self._pools[origin.key]
        return True

    def change(self, max_connections: int, max_tunnels: int, idle_timeout: float, tls: ssl.SSLContext | None) -> None:
        """Take other limits; new connections use `tls`, and if that is another one, idle connections are closed."""
        self._max_connections, self._max_tunnels, self._idle_timeout = max_connections, max_tunnels, idle_timeout
        is_other, self._tls = tls is not self._tls, tls
        for key, pool in self._pools.items():
            pool.change(max_connections, max_tunnels, idle_timeout)
            if is_other and key[0] == "https":
                pool.close_idle()

    def retire_all(self) -> None:
        """Keep no idle connection at all: requests that still come here open their own."""
        self._is_retired = True
        for pool in self._pools.values():
            pool.retire()

    def revive(self) -> None:
        """Take back `retire_all`."""
        self._is_retired = False
        for pool in self._pools.values():
            pool.revive()

    async def _wait(
        self, pool: Pool[UpstreamConnection], request: LeanRequest, *, is_fresh: bool = False
    ) -> UpstreamConnection:
        def on_connect() -> None:
            request.has_begun = True

        timeouts = request.extensions.get("timeout", NO_LIMITS)
        return await pool.take(
            timeouts.get("connect"),
            timeouts.get("pool"),
            holder=request.extensions.get("holder"),
            is_fresh=is_fresh,
            on_connect=on_connect,
        )

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            pool.close()

    def _make_pool(self, origin: Origin) -> Pool[UpstreamConnection]:
        async def connect(seconds: float | None) -> UpstreamConnection:
            connection = await _connect(origin, self._tls if origin.scheme == "https" else None, seconds)
            connection.pool = pool
            return connection

        pool: Pool[UpstreamConnection] = Pool(
            connect,
            limit=self._max_connections,
            idle_timeout=self._idle_timeout,
            tunnels=FairShares(self._max_tunnels),
        )
        if self._is_retired:
            pool.retire()
        self._pools[origin.key] = pool
        return pool


async def _connect(origin: Origin, tls: ssl.SSLContext | None, seconds: float | None) -> UpstreamConnection:
    """Open a connection within that time."""
    loop = asyncio.get_running_loop()
    connection = UpstreamConnection(loop)
    place = f"{origin.address}:{origin.port}"
    try:
        async with asyncio.timeout(seconds):
            await loop.create_connection(
                lambda: connection,
                origin.address,
                origin.port,
                ssl=tls,
                server_hostname=None if tls is None else origin.host,
            )
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise httpx.ConnectTimeout(f"no connection to {place} within {seconds} s") from error
        if isinstance(error, OSError):
            kind = (
                LocalResourcesExhausted
                if is_local_exhaustion(error, origin.address, origin.port)
                else httpx.ConnectError
            )
            raise kind(f"no connection to {place}: {error.strerror or error}") from error
        raise
    if connection.is_closed:
        raise httpx.ConnectError(f"{place} closed the connection at once")
    return connection


def tls_context(
    ca_file: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return a context that verifies upstreams against the system's certificate store, or `ca_file` instead.

    `certificate` (with its `key`, if that is another file) is shown to upstreams that ask for one. Files are PEM;
    raises OSError (also ssl.SSLError) if they cannot be used.
    """
    context = ssl.create_default_context(cafile=ca_file)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


async def probe(
    transport: httpx.AsyncBaseTransport,
    url: str,
    seconds: float,
    *,
    address: str | None = None,
    keeps_connection: bool = True,
) -> int:
    """GET `url` for a health check and return the status; raises httpx.TransportError, also after `seconds`.

    `address` is where to connect instead of what the host of `url` stands for. Unless it `keeps_connection`, our own
    transport is left without one, and without a pool for that place.
    """
    target = httpx.URL(url)
    origin = Origin.of(target, address)
    headers = [(b"host", target.netloc), (b"user-agent", b"api-gateway-health")]
    extensions: dict[str, Any] = {"timeout": {"connect": seconds, "pool": seconds, "read": seconds}}
    request: httpx.Request
    if isinstance(transport, UpstreamTransport):
        extensions["target"] = target.raw_path
        request = LeanRequest("GET", origin, headers, NO_BODY, None, extensions)
    else:
        request = origin.plain_request("GET", headers, target.raw_path, stream=NO_BODY, extensions=extensions)
    try:
        response = await transport.handle_async_request(request)
        await response.aclose()
    finally:
        if isinstance(transport, UpstreamTransport) and not keeps_connection:
            transport.retire(origin)
    return response.status_code
