"""The connections to one origin: a bounded pool, last in first out, with a fair queue for whoever finds none free.

Last in first out lets the surplus of a quiet hour expire. Taking and giving back cost O(1) and do not wait; a closed
connection leaves the pool the moment it closes.

Of the connections in use each holder may have as many as are free, see `FairShares`; who has more under way waits, in
a queue of its own. The connection of a tunnel or an event stream is counted apart, by a bound and shares of its own.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import httpx

from api_gateway.resilience.fair_shares import FairShares


class OverShare(httpx.PoolTimeout):
    """No place came free in time for a holder that has others; the message says how many."""


class Pooled(Protocol):
    """What the pool knows of a connection. `holder` is who uses it, None for nobody in particular."""

    loop: asyncio.AbstractEventLoop
    is_closed: bool
    is_reused: bool
    idle_since: float
    holder: str | None

    def close(self) -> None:
        """Close now, and tell the pool by `discard`."""
        ...


C = TypeVar("C", bound=Pooled)


def _nothing() -> None:
    """Do nothing: nobody asks."""


class Pool(Generic[C]):
    """At most `limit` connections. Waiters are handed either a connection or the right to open one (None).

    `connect(seconds)` opens a connection, or raises; `idle_timeout` (seconds) is how long an unused one is kept.
    `shares` are of the connections in use, `tunnels` of those that carry tunnels and event streams beside the pool;
    both count what is refused.
    """

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
        self._apart: set[C] = set()  # carry tunnels and event streams, and have no slot
        self._waiters: dict[str | None, deque[asyncio.Future[C | None]]] = {}  # by holder; whose turn it is, first
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._is_retired = False

    def __repr__(self) -> str:
        busy = self._slots - len(self._idle)
        waiting = sum(map(len, self._waiters.values()))
        return f"<Pool [{busy} busy, {len(self._idle)} idle, {waiting} waiting]>"

    def take_idle(self, holder: str | None = None) -> C | None:
        """Return the connection that was used last, or None if every one is busy or the holder has its share."""
        if not self._idle or not self.shares.try_acquire(holder):
            return None
        connection, _ = self._idle.popitem()
        connection.holder = holder
        connection.is_reused = True
        return connection

    async def take(
        self,
        connect: float | None,
        wait: float | None,
        *,
        holder: str | None = None,
        is_fresh: bool = False,
        on_connect: Callable[[], None] = _nothing,
    ) -> C:
        """Return a connection for one request; an unused one if `is_fresh`. Times in seconds, None for no limit.

        `on_connect` is called before one is opened. Raises ConnectError, ConnectTimeout, and PoolTimeout when none
        came free in time.
        """
        while True:
            if self._is_closed:
                raise httpx.ConnectError("the transport is closed")
            if not is_fresh and (idle := self.take_idle(holder)) is not None:
                return idle
            if self.shares.admits(holder):
                if self._slots < self._limit:
                    self._slots += 1
                    self.shares.acquire(holder)
                    on_connect()
                    return await self._fill_slot(connect, holder)
                if self._idle:  # the longest idle one is closed for it; taken out here, so that the loop ends anyway
                    idle = next(iter(self._idle))
                    idle.close()
                    self._idle.pop(idle, None)
                    continue
            handed = await self._queue(wait, holder)
            if handed is None:
                on_connect()
                return await self._fill_slot(connect, holder)
            if not handed.is_closed:
                if is_fresh:
                    return await self._replace(handed, connect, holder)
                handed.is_reused = True
                return handed

    def give(self, connection: C) -> None:
        """Take back a connection that can serve again."""
        if self._apart and connection in self._apart:
            connection.close()
            return
        self.shares.release(connection.holder)
        if self._waiters:
            holder, waiter = self._next_waiter()
            if waiter is not None:
                connection.holder = holder
                waiter.set_result(connection)
                return
        self._idle[connection] = None
        if self._is_retired:
            connection.close()
            return
        connection.idle_since = connection.loop.time()
        if self._sweep_timer is None:
            self._sweep_timer = connection.loop.call_later(self._idle_timeout, self._sweep, connection.loop)

    def discard(self, connection: C) -> None:
        """Forget a closed connection, and let the next in the queue open one in its place."""
        if connection in self._apart:
            self._apart.remove(connection)
            self.tunnels.release(connection.holder)
            return
        if connection not in self._open:  # it failed while it was made: its slot is still its maker's
            return
        self._open.remove(connection)
        if connection in self._idle:
            del self._idle[connection]
        else:
            self.shares.release(connection.holder)
        self._free_slot()

    def set_apart(self, connection: C) -> None:
        """Count a connection among the tunnels, and let another take its slot. Raises OverShare, changing nothing."""
        holder = connection.holder
        self.admit_tunnel(holder)
        if connection not in self._open:  # it is closed
            return
        self._open.remove(connection)
        self._apart.add(connection)
        self.tunnels.acquire(holder)
        self.shares.release(holder)
        self._free_slot()

    def admit_tunnel(self, holder: str | None) -> None:
        """Raise OverShare if the holder may not have another tunnel."""
        if not self.tunnels.admits(holder):
            self.tunnels.refused += 1
            raise OverShare(self.tunnels.refusal(holder, "WebSockets and event streams"))

    def change(self, limit: int, max_tunnels: int, idle_timeout: float) -> None:
        """Take other limits. Connections above a lower one stay until they are closed."""
        self._limit, self._idle_timeout = limit, idle_timeout
        self.shares.total, self.tunnels.total = limit, max_tunnels
        while self._slots < limit:
            _, waiter = self._next_waiter()
            if waiter is None:
                break
            self._slots += 1
            waiter.set_result(None)

    def close_idle(self) -> None:
        """Close the connections that nobody uses."""
        for connection in list(self._idle):
            connection.close()

    def retire(self) -> None:
        """Keep no idle connection any more: those in use are closed when they are given back."""
        self._is_retired = True
        self.close_idle()

    def revive(self) -> None:
        """Keep idle connections again."""
        self._is_retired = False

    @property
    def is_empty(self) -> bool:
        """Tell whether there is neither a connection nor anybody who waits for one."""
        return self._slots == 0 and not self._apart

    def close(self) -> None:
        """Close every connection, and turn away who waits for one."""
        self._is_closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for waiter in [waiter for queue in self._waiters.values() for waiter in queue if not waiter.done()]:
            waiter.set_exception(httpx.ConnectError("the transport is closed"))
        self._waiters.clear()
        for connection in [*self._open, *self._apart]:
            connection.close()

    async def _fill_slot(self, seconds: float | None, holder: str | None) -> C:
        """Open a connection in a slot that is already the holder's."""
        try:
            connection = await self._connect(seconds)
        except BaseException:
            self.shares.release(holder)
            self._free_slot()
            raise
        connection.holder = holder
        self._open.add(connection)
        if self._is_closed:
            connection.close()
        return connection

    async def _replace(self, used: C, seconds: float | None, holder: str | None) -> C:
        """Close a connection and open another in its slot, which is the holder's."""
        self._open.remove(used)
        used.close()
        return await self._fill_slot(seconds, holder)

    async def _queue(self, seconds: float | None, holder: str | None) -> C | None:
        """Wait for a connection or for a slot (None); either is then the holder's."""
        waiter: asyncio.Future[C | None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(holder, deque()).append(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except BaseException as error:
            if waiter.cancelled():
                self._forget(waiter, holder)
            elif waiter.done() and waiter.exception() is None:
                self._hand_on(waiter.result(), holder)
            if isinstance(error, TimeoutError):
                raise self._no_place(holder, seconds) from error
            raise

    def _forget(self, waiter: "asyncio.Future[C | None]", holder: str | None) -> None:
        """Take a waiter out of its queue, near whose head it is: all wait for as long."""
        queue = self._waiters.get(holder)
        if queue is not None:
            with suppress(ValueError):
                queue.remove(waiter)
            if not queue:
                del self._waiters[holder]

    def _no_place(self, holder: str | None, seconds: float | None) -> httpx.PoolTimeout:
        self.shares.refused += 1
        if self.shares.held(holder):
            return OverShare(self.shares.refusal(holder, "connections to it"))
        return httpx.PoolTimeout(f"no connection came free within {seconds} s")

    def _next_waiter(self) -> "tuple[str | None, asyncio.Future[C | None] | None]":
        """Return who is next and may have one more connection, which is counted; holders take turns."""
        for holder, queue in self._waiters.items():
            while queue and queue[0].done():  # it was cancelled just now
                queue.popleft()
            if queue and self.shares.admits(holder):
                break
        else:
            return None, None
        del self._waiters[holder]
        waiter = queue.popleft()
        if queue:
            self._waiters[holder] = queue
        self.shares.acquire(holder)
        return holder, waiter

    def _hand_on(self, handed: C | None, holder: str | None) -> None:
        """Pass on what a waiter was handed but can no longer use."""
        if handed is None:
            self.shares.release(holder)
            self._free_slot()
        elif not handed.is_closed:
            self.give(handed)

    def _free_slot(self) -> None:
        """Let the next in the queue open a connection, or nobody."""
        _, waiter = self._next_waiter() if self._waiters else (None, None)
        if waiter is None:
            self._slots -= 1
        else:
            waiter.set_result(None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long."""
        self._sweep_timer = None
        for connection in list(self._idle):
            due = connection.idle_since + self._idle_timeout
            if due > loop.time():
                self._sweep_timer = loop.call_at(due, self._sweep, loop)
                return
            connection.close()
