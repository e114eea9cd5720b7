"""Detection of local requests, by the process at the peer's end of the connection.

The look-up of the process runs in a thread, one at a time, within a share of a processor, once for each connection.
Its result applies to the connection, never to an address.
"""

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from api_gateway.admin.locality import LOOPBACK, is_direct
from api_gateway.http1.asgi import ADMIN, RELAYED, SERVER_EXTENSION, UNIX_PEER
from api_gateway.http1.headers import Network, fields_of, is_within
from api_gateway.models import Clock
from api_gateway.system.peer_process import EstablishedConnection, NotEstablished, PeerProcesses
from api_gateway.system.socket_table import Endpoint

logger = logging.getLogger(__name__)

MAX_WAITING = 32  # look-ups; further requests do not count as local
MAX_WAIT = 3.0  # seconds that a request waits for its look-up to begin
CPU_SHARE = 0.1  # of one processor, on average
CPU_BURST = 1.0  # seconds of processor time that look-ups may use at once
_LOG_INTERVAL = 60.0  # seconds between two log lines
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7))


class LocalProcesses:
    """A request is local if it comes over loopback, names a loopback host, and its process is not a proxy."""

    def __init__(
        self, peers: PeerProcesses, *, trusted_proxies: Collection[Network] = (), clock: Clock = time.monotonic
    ) -> None:
        """Peers in `trusted_proxies` are proxies, and never local."""
        self._peers = peers
        self._trusted = tuple(trusted_proxies)
        self._clock = clock
        self._results: WeakKeyDictionary[asyncio.Transport, bool] = WeakKeyDictionary()  # by TCP transport
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._allowance, self._since = CPU_BURST, clock()  # seconds of processor time
        self._silent_until = 0.0

    def __repr__(self) -> str:
        return f"<LocalProcesses [{len(self._results)} results, {self._waiting} waiting]>"

    async def is_local(self, scope: Mapping[str, Any]) -> bool:
        """Return whether the request of this ASGI scope is local; false if the peer cannot be examined."""
        if RELAYED in scope or not is_direct(fields_of(scope["headers"])) or not self._may_be_local(scope):
            return False
        extension = scope.get(SERVER_EXTENSION)
        if extension is None:  # another ASGI server: nothing identifies the connection, so the result is not kept
            return await self._look_up(scope, None) is True
        transport: asyncio.Transport = extension.connection.transport
        carrier = transport.get_extra_info("tcp_transport", transport)  # that of TLS, compiled, has no weak references
        result = self._results.get(carrier)
        if result is None and not transport.is_closing():
            result = await self._look_up(scope, transport)
            if result is not None:
                self._results[carrier] = result
        return result is True

    def _may_be_local(self, scope: Mapping[str, Any]) -> bool:
        """Return whether the connection may be an operator's. Unix sockets for clients are used by proxies."""
        client, server = scope.get("client"), scope.get("server")
        if client == UNIX_PEER:
            return ADMIN in scope
        return (
            client is not None
            and server is not None
            and is_within(client[0], LOOPBACK)
            and is_within(server[0], LOOPBACK)
            and not is_within(client[0], self._trusted)
        )

    async def _look_up(self, scope: Mapping[str, Any], transport: asyncio.Transport | None) -> bool | None:
        """Return whether the peer is local; None if the look-up could not be made, because too many are waiting."""
        try:
            examine = self._query(scope, transport)
        except (NotEstablished, OSError) as error:
            self._log(str(error))
            return False
        if not await self._take_turn():
            self._log("too many connections are waiting for their look-up")
            return None
        try:
            await self._pace()
            reason, cost = await asyncio.to_thread(_timed, examine)
            self._allowance -= cost
        finally:
            self._lock.release()
        if reason is not None:
            self._log(reason)
        return reason is None

    def _query(self, scope: Mapping[str, Any], transport: asyncio.Transport | None) -> Callable[[], None]:
        """Return the look-up to run in a thread. The socket is identified here, because it could be closed later."""
        if scope["client"] == UNIX_PEER:
            assert transport is not None  # noqa: S101 - only the gateway's own server has an admin listener
            return partial(self._peers.examine_process, *credentials(transport))
        inode = None if transport is None else os.fstat(_descriptor(transport)).st_ino
        connection = EstablishedConnection(Endpoint.of(*scope["server"]), Endpoint.of(*scope["client"]), inode)
        return partial(self._peers.examine, connection)

    async def _take_turn(self) -> bool:
        """Wait for earlier look-ups, at most `MAX_WAIT` seconds; return whether this one may run."""
        if self._waiting >= MAX_WAITING:
            return False
        self._waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT):
                await self._lock.acquire()
        except TimeoutError:
            return False
        finally:
            self._waiting -= 1
        return True

    async def _pace(self) -> None:
        """Wait until the processor time of earlier look-ups is within `CPU_SHARE`."""
        now = self._clock()
        self._allowance = min(CPU_BURST, self._allowance + (now - self._since) * CPU_SHARE)
        self._since = now
        if self._allowance < 0:
            await asyncio.sleep(-self._allowance / CPU_SHARE)

    def _log(self, reason: str) -> None:
        now = self._clock()
        if now >= self._silent_until:
            self._silent_until = now + _LOG_INTERVAL
            logger.info("operator request from this machine does not count as local: %s", reason)


def credentials(transport: asyncio.Transport) -> tuple[int, int]:
    """Return process id and user id of the peer of a Unix socket at its connect. Raises OSError, NotEstablished."""
    with socket.socket(fileno=os.dup(_descriptor(transport))) as duplicate:
        packed = duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    if pid <= 0:
        raise NotEstablished("the peer is in another PID namespace")
    return pid, uid


def _timed(examine: Callable[[], None]) -> tuple[str | None, float]:
    """Return why the peer is not local (None if it is), and the seconds of processor time used."""
    began = time.thread_time()
    reason = None
    try:
        examine()
    except NotEstablished as error:
        reason = str(error)
    return reason, time.thread_time() - began


def _descriptor(transport: asyncio.Transport) -> int:
    descriptor: int = transport.get_extra_info("socket").fileno()
    if descriptor < 0:
        raise NotEstablished("the connection is closed")
    return descriptor
