"""The gateway's own transport to an upstream: HTTP/1.1 on asyncio and httptools, with a pool for each of its targets.

httpx's transport is not used because its pool loses a slot when a request is cancelled inside it
(encode/httpcore#1093), and a gateway cancels requests whenever a client disconnects. Here a cancelled request closes
its connection at once, without awaiting. Bytes are forwarded unchanged: no header field is added, no body is decoded
or buffered completely.

Errors are httpx's: ConnectError and ConnectTimeout (nothing was sent), PoolTimeout (no connection became available),
ReadError (the connection was lost), ReadTimeout (no data in time), RemoteProtocolError (not valid HTTP); and
LocalResourcesExhausted, a ConnectError that this process causes.
"""

import asyncio
import math
import ssl
from functools import partial
from pathlib import Path

import httpx

from api_gateway.ip_addresses import is_address
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.system.x509 import load_pair, verifying_context
from api_gateway.transport.happy_eyeballs import FailedAddresses, connect_to_name
from api_gateway.transport.lifetime import ConnectionLifetime
from api_gateway.transport.local_resources import LocalResourcesExhausted, is_local_exhaustion
from api_gateway.transport.pool import Pool
from api_gateway.transport.protocol import UpstreamProtocol
from api_gateway.transport.request import Origin
from api_gateway.transport.upstream_connection import UpstreamConnection


class UpstreamTransport:
    """The connections to one upstream, with a pool for each of its targets.

    `max_connections` limits each pool, `max_tunnels` the tunnels and event streams of each target, `idle_timeout` the
    seconds for which an idle connection is kept, unless the upstream announces a shorter time. A connection serves at
    most `max_requests`, and no further request `max_age` seconds after it was opened. `tls` is used for https targets.

    States: open, or retired (`retire_all`: no idle connection is kept); `revive` returns to open.
    """

    def __init__(
        self,
        *,
        max_connections: int = 512,
        max_tunnels: int = 4096,
        idle_timeout: float = math.inf,
        max_requests: int | None = None,
        max_age: float | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._max_connections = max_connections
        self._max_tunnels = max_tunnels
        self._idle_timeout = idle_timeout
        self._max_requests, self._max_age = max_requests, max_age
        self._tls = tls
        self._is_retired = False
        self._failed_addresses = FailedAddresses()
        self._pools: dict[tuple[str, str, int, str], Pool[UpstreamConnection]] = {}

    def __repr__(self) -> str:
        return f"<UpstreamTransport {self._pools!r}>"

    def pool(self, origin: Origin) -> Pool[UpstreamConnection]:
        """Return the pool of `origin`, which is created if necessary."""
        return self._pools.get(origin.key) or self._make_pool(origin)

    def resources(self) -> tuple[list[FairShares], list[FairShares]]:
        """Return the shares of connections, and those of tunnels, one each for each pool."""
        return [pool.shares for pool in self._pools.values()], [pool.tunnels for pool in self._pools.values()]

    def retire(self, origin: Origin) -> bool:
        """Close idle connections to `origin` and keep none; return True if its pool was empty and is removed."""
        pool = self._pools.get(origin.key)
        if pool is not None:
            pool.retire()
            if not pool.is_empty:
                return False
            del self._pools[origin.key]
        return True

    def change(
        self,
        max_connections: int,
        max_tunnels: int,
        idle_timeout: float,
        tls: ssl.SSLContext | None,
        *,
        max_requests: int | None = None,
        max_age: float | None = None,
    ) -> None:
        """Apply other limits and, for new connections, `tls`, `max_requests` and `max_age`.

        If `tls` changes, idle https connections are closed; if one of the last two does, all idle connections are.
        """
        self._max_connections, self._max_tunnels, self._idle_timeout = max_connections, max_tunnels, idle_timeout
        is_other, self._tls = tls is not self._tls, tls
        has_other_life = (max_requests, max_age) != (self._max_requests, self._max_age)
        self._max_requests, self._max_age = max_requests, max_age
        for key, pool in self._pools.items():
            pool.change(max_connections, max_tunnels, idle_timeout)
            if has_other_life or (is_other and key[0] == "https"):
                pool.close_idle()

    def retire_all(self) -> None:
        """Close all idle connections and keep none; further requests open connections of their own."""
        self._is_retired = True
        for pool in self._pools.values():
            pool.retire()

    def revive(self) -> None:
        """Undo `retire_all`."""
        self._is_retired = False
        for pool in self._pools.values():
            pool.revive()

    async def aclose(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.close()

    def _make_pool(self, origin: Origin) -> Pool[UpstreamConnection]:
        async def connect(seconds: float | None) -> UpstreamConnection:
            tls = self._tls if origin.scheme == "https" else None
            connection = await _connect(origin, tls, seconds, self._failed_addresses)
            connection.pool = pool
            connection.lifetime = self._lifetime(connection.loop.time())
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

    def _lifetime(self, now: float) -> ConnectionLifetime | None:
        """Return the limits of a connection that is opened at `now`, None if there are none."""
        if self._max_requests is None and self._max_age is None:
            return None
        return ConnectionLifetime(
            max_requests=math.inf if self._max_requests is None else self._max_requests,
            expires_at=math.inf if self._max_age is None else now + self._max_age,
        )


async def _connect(
    origin: Origin, tls: ssl.SSLContext | None, seconds: float | None, failed: FailedAddresses
) -> UpstreamConnection:
    """Open a connection within `seconds`, for all addresses of a name and for TLS together.

    Raises ConnectTimeout, ConnectError or LocalResourcesExhausted.
    """
    loop = asyncio.get_running_loop()
    connection = UpstreamConnection(loop)
    protocol = partial(UpstreamProtocol, connection)
    place = f"{origin.address}:{origin.port}"
    try:
        async with asyncio.timeout(seconds):
            server_name = None if tls is None else origin.host
            if is_address(origin.address):
                await loop.create_connection(
                    protocol, origin.address, origin.port, ssl=tls, server_hostname=server_name
                )
            else:
                sock = await connect_to_name(origin.address, origin.port, failed)
                try:
                    await loop.create_connection(protocol, sock=sock, ssl=tls, server_hostname=server_name)
                except BaseException:
                    sock.close()
                    raise
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
        raise httpx.ConnectError(f"{place} closed the connection immediately")
    return connection


def tls_context(
    ca_file: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return a context that verifies upstreams by the system's certificate store, or by `ca_file` if it is given.

    `certificate` (with `key`, if that is a separate file) is the client certificate for upstreams that request one.
    Files are PEM. Raises OSError (ssl.SSLError is a subclass) if a file cannot be used.
    """
    context = verifying_context(ca_file)
    if certificate is not None:
        load_pair(context, certificate, key)
    return context


AnyTransport = UpstreamTransport | httpx.AsyncBaseTransport
