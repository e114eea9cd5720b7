"""A connection pool for one origin: limited, last in first out, with a fair queue for requests that have to wait.

Last in first out lets connections that are no longer needed expire. Acquiring and releasing an idle connection take
constant time and do not wait; a closed connection leaves the pool at once.

Connections in use are divided into fair shares, see `FairShares`: requests of a principal that has used up its share
wait in a queue of their own. Connections of tunnels and event streams have a separate limit and separate shares.
"""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import httpx

from api_gateway.resilience.fair_shares import FairShares
from api_gateway.transport.lifetime import ConnectionLifetime

SWEEP_INTERVAL = 0.05  # seconds between two sweeps at least, because each visits all idle connections


class ShareExceeded(httpx.PoolTimeout):
    """No connection became available in time for a principal that uses others; the message says how many."""


class StaleConnection(httpx.ReadError):
    """A reused connection was closed before any byte of the response: the usual keep-alive race."""

    def __init__(self) -> None:
        super().__init__("a reused connection was closed before the response")


class PooledConnection(Protocol):
    """A connection as the pool uses it. `principal` is counted for it; None counts against the total only."""

    loop: asyncio.AbstractEventLoop
    is_closed: bool
    is_reused: bool
    idle_since: float
    lifetime: ConnectionLifetime | None
    principal: str | None

    def close(self) -> None:
        """Close the connection and call the pool's `discard`."""
        ...


C = TypeVar("C", bound=PooledConnection)


def _nothing() -> None:
    """Do nothing; the default of `on_connect`."""


class Pool(Generic[C]):
    """A pool of at most `limit` connections. A waiter receives a connection, or a slot to open one (None).

    `connect(seconds)` opens a connection or raises; `idle_timeout` is the time in seconds for which an idle connection
    is kept, which its lifetime may shorten. `shares` divides the connections in use, `tunnels` those of tunnels and
    event streams; both count refusals.

    A connection is idle (`_idle`), in use, or apart (`_tunnels_open`: a tunnel or event stream, which has no slot).
    The pool is open, retired (keeps no idle connection; `revive` returns to open), or closed.
    """

    __slots__ = (
        "_connect",
        "_idle",
        "_idle_timeout",
        "_is_closed",
        "_is_retired",
        "_limit",
        "_open",
        "_slots",
        "_sweep_due",
        "_sweep_timer",
        "_tunnels_open",
        "_waiters",
        "shares",
        "tunnels",
    )

    def __init__(
        self,
        connect: Callable[[float | None], Awaitable[C]],
        *,
        limit: int,
        idle_timeout: float,
        shares: FairShares | None = None,
        tunnels: FairShares | None = None,
    ) -> None:
        self._connect = connect
        self._limit = limit
        self._idle_timeout = idle_timeout
        self.shares = shares or FairShares(limit)
        self.tunnels = tunnels or FairShares(limit)
        self._slots = 0  # connections open, being opened, or promised to a waiter
        self._open: set[C] = set()
        self._idle: dict[C, None] = {}  # the longest idle first
        self._tunnels_open: set[C] = set()  # carry tunnels and event streams, and have no slot
        self._waiters: dict[str | None, deque[asyncio.Future[C | None]]] = {}  # by principal, in the order of turns
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweep_due = math.inf  # loop time of the timer
        self._is_closed = False
        self._is_retired = False

    def __repr__(self) -> str:
        busy = self._slots - len(self._idle)
        waiting = sum(map(len, self._waiters.values()))
        return f"<Pool [{busy} busy, {len(self._idle)} idle, {waiting} waiting]>"

    def acquire_idle(self, principal: str | None = None) -> C | None:
        """Return the most recently used idle connection; None if there is none or the principal's share is used up."""
        if not self._idle or not self.shares.try_acquire(principal):
            return None
        connection, _ = self._idle.popitem()
        connection.principal = principal
        connection.is_reused = True
        return connection

    async def acquire(
        self,
        connect: float | None,
        wait: float | None,
        *,
        principal: str | None = None,
        is_fresh: bool = False,
        on_connect: Callable[[], None] = _nothing,
    ) -> C:
        """Return a connection for one request; a new one if `is_fresh`.

        `connect` and `wait` limit opening and waiting, in seconds; None means unlimited. `on_connect` is called before
        a connection is opened. Raises ConnectError, ConnectTimeout, and PoolTimeout if none becomes available in time.
        """
        while True:
            if self._is_closed:
                raise httpx.ConnectError("the transport is closed")
            if not is_fresh and (idle := self.acquire_idle(principal)) is not None:
                return idle
            if self.shares.admits(principal):
                if self._slots < self._limit:
                    self._slots += 1
                    self.shares.acquire(principal)
                    on_connect()
                    return await self._fill_slot(connect, principal)
                if self._idle:  # replace the longest idle one; it is removed here too, so that the loop terminates
                    idle = next(iter(self._idle))
                    idle.close()
                    self._idle.pop(idle, None)
                    continue
            granted = await self._queue(wait, principal)
            if granted is None:
                on_connect()
                return await self._fill_slot(connect, principal)
            if not granted.is_closed:
                if is_fresh:
                    return await self._replace(granted, connect, principal)
                granted.is_reused = True
                return granted

    def release(self, connection: C) -> None:
        """Return a reusable connection to the pool: to the next waiter, or else to the idle ones."""
        if self._tunnels_open and connection in self._tunnels_open:
            connection.close()
            return
        now = connection.loop.time()
        lifetime = connection.lifetime
        if lifetime is not None and lifetime.is_over(now):
            connection.close()
            return
        self.shares.release(connection.principal)
        if self._waiters:
            principal, waiter = self._next_waiter()
            if waiter is not None:
                connection.principal = principal
                waiter.set_result(connection)
                return
        self._idle[connection] = None
        if self._is_retired:
            connection.close()
            return
        connection.idle_since = now
        due = now + self._idle_timeout if lifetime is None else lifetime.idle_until(now, self._idle_timeout)
        if due < self._sweep_due:
            self._schedule_sweep(due, connection.loop)

    def discard(self, connection: C) -> None:
        """Remove a closed connection, and give its slot to the next waiter."""
        if connection in self._tunnels_open:
            self._tunnels_open.remove(connection)
            self.tunnels.release(connection.principal)
            return
        if connection not in self._open:  # it failed while connecting: `_fill_slot` frees the slot
            return
        self._open.remove(connection)
        if connection in self._idle:
            del self._idle[connection]
        else:
            self.shares.release(connection.principal)
        self._free_slot()

    def move_to_tunnels(self, connection: C) -> None:
        """Count a connection as a tunnel and free its slot. Raises ShareExceeded, and then changes nothing."""
        principal = connection.principal
        self.admit_tunnel(principal)
        if connection not in self._open:  # closed already
            return
        self._open.remove(connection)
        self._tunnels_open.add(connection)
        self.tunnels.acquire(principal)
        self.shares.release(principal)
        self._free_slot()

    def admit_tunnel(self, principal: str | None) -> None:
        """Raise ShareExceeded if the principal's share of tunnels is used up."""
        if not self.tunnels.admits(principal):
            self.tunnels.refused += 1
            raise ShareExceeded(self.tunnels.refusal(principal, "WebSockets and event streams"))

    def change(self, limit: int, max_tunnels: int, idle_timeout: float) -> None:
        """Apply other limits. Connections above a lower limit are kept until they close."""
        self._limit, self._idle_timeout = limit, idle_timeout
        self.shares.total, self.tunnels.total = limit, max_tunnels
        if self._idle:
            self._sweep(next(iter(self._idle)).loop)
        while self._slots < limit:
            _, waiter = self._next_waiter()
            if waiter is None:
                break
            self._slots += 1
            waiter.set_result(None)

    def close_idle(self) -> None:
        """Close all idle connections."""
        for connection in list(self._idle):
            connection.close()

    def retire(self) -> None:
        """Close idle connections and keep none: connections in use are closed when they are returned."""
        self._is_retired = True
        self.close_idle()

    def revive(self) -> None:
        """Keep idle connections again."""
        self._is_retired = False

    @property
    def is_empty(self) -> bool:
        """True if there are no connections, open or being opened."""
        return self._slots == 0 and not self._tunnels_open

    def close(self) -> None:
        """Close all connections, and raise ConnectError in all waiters."""
        self._is_closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for waiter in [waiter for queue in self._waiters.values() for waiter in queue if not waiter.done()]:
            waiter.set_exception(httpx.ConnectError("the transport is closed"))
        self._waiters.clear()
        for connection in [*self._open, *self._tunnels_open]:
            connection.close()

    async def _fill_slot(self, seconds: float | None, principal: str | None) -> C:
        """Open a connection in a slot that is already counted for the principal."""
        try:
            connection = await self._connect(seconds)
        except BaseException:
            self.shares.release(principal)
            self._free_slot()
            raise
        connection.principal = principal
        self._open.add(connection)
        if self._is_closed:
            connection.close()
        return connection

    async def _replace(self, used: C, seconds: float | None, principal: str | None) -> C:
        """Close a connection and open another one in its slot, which is counted for the principal."""
        self._open.remove(used)
        used.close()
        return await self._fill_slot(seconds, principal)

    async def _queue(self, seconds: float | None, principal: str | None) -> C | None:
        """Wait for a connection or a slot (None), which is then counted for the principal. Raises PoolTimeout."""
        waiter: asyncio.Future[C | None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(principal, deque()).append(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except BaseException as error:
            if waiter.cancelled():
                self._forget(waiter, principal)
            elif waiter.done() and waiter.exception() is None:
                self._pass_on(waiter.result(), principal)
            if isinstance(error, TimeoutError):
                raise self._timeout_error(principal, seconds) from error
            raise

    def _forget(self, waiter: "asyncio.Future[C | None]", principal: str | None) -> None:
        """Remove a waiter from its queue; it is near the head, because all waiters have the same timeout."""
        queue = self._waiters.get(principal)
        if queue is not None:
            with suppress(ValueError):
                queue.remove(waiter)
            if not queue:
                del self._waiters[principal]

    def _timeout_error(self, principal: str | None, seconds: float | None) -> httpx.PoolTimeout:
        self.shares.refused += 1
        if self.shares.held(principal):
            return ShareExceeded(self.shares.refusal(principal, "connections to it"))
        return httpx.PoolTimeout(f"no connection became available within {seconds} s")

    def _next_waiter(self) -> "tuple[str | None, asyncio.Future[C | None] | None]":
        """Remove and return the next waiter whose principal is admitted, and count a connection for it.

        Principals take turns. Returns (None, None) if there is no such waiter.
        """
        for principal, queue in self._waiters.items():
            while queue and queue[0].done():  # cancelled, but not yet removed
                queue.popleft()
            if queue and self.shares.admits(principal):
                break
        else:
            return None, None
        del self._waiters[principal]
        waiter = queue.popleft()
        if queue:
            self._waiters[principal] = queue
        self.shares.acquire(principal)
        return principal, waiter

    def _pass_on(self, granted: C | None, principal: str | None) -> None:
        """Release a connection or slot that a cancelled waiter has received."""
        if granted is None:
            self.shares.release(principal)
            self._free_slot()
        elif not granted.is_closed:
            self.release(granted)

    def _free_slot(self) -> None:
        """Give a slot to the next waiter, or return it."""
        _, waiter = self._next_waiter() if self._waiters else (None, None)
        if waiter is None:
            self._slots -= 1
        else:
            waiter.set_result(None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close connections that have been idle for too long, and schedule the next sweep."""
        self._sweep_due = math.inf
        now = loop.time()
        for connection in list(self._idle):
            due = self._idle_until(connection)
            if due <= now:
                connection.close()
            elif due < self._sweep_due:
                self._sweep_due = due
        if self._sweep_due < math.inf:
            self._schedule_sweep(max(self._sweep_due, now + SWEEP_INTERVAL), loop)

    def _schedule_sweep(self, due: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self._sweep_due = due
        self._sweep_timer = loop.call_at(due, self._sweep, loop)

    def _idle_until(self, connection: C) -> float:
        if connection.lifetime is None:
            return connection.idle_since + self._idle_timeout
        return connection.lifetime.idle_until(connection.idle_since, self._idle_timeout)
