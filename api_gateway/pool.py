"""The connections to one origin: a bounded pool, last in first out, with a fair queue for whoever finds none free.

Last in first out lets the surplus of a quiet hour expire. Taking and giving back cost O(1) and do not wait; a closed
connection leaves the pool the moment it closes.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import httpx


class Pooled(Protocol):
    """What the pool knows of a connection."""

    loop: asyncio.AbstractEventLoop
    is_closed: bool
    is_reused: bool
    idle_since: float

    def close(self) -> None:
        """Close now, and tell the pool by `discard`."""
        ...


C = TypeVar("C", bound=Pooled)


def _nothing() -> None:
    """Do nothing: nobody asks."""


class Pool(Generic[C]):
    """At most `limit` connections. Waiters are handed either a connection or the right to open one (None).

    `connect(seconds)` opens a connection, or raises; `idle_timeout` (seconds) is how long an unused one is kept.
    """

    def __init__(self, connect: Callable[[float | None], Awaitable[C]], *, limit: int, idle_timeout: float) -> None:
        self._connect = connect
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._slots = 0  # connections open, being opened, or promised to a waiter
        self._open: set[C] = set()
        self._idle: dict[C, None] = {}  # the longest idle first
        self._waiters: deque[asyncio.Future[C | None]] = deque()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._is_retired = False

    def __repr__(self) -> str:
        busy = self._slots - len(self._idle)
        return f"<Pool [{busy} busy, {len(self._idle)} idle, {len(self._waiters)} waiting]>"

    def take_idle(self) -> C | None:
        """Return the connection that was used last, or None if every one is busy."""
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        connection.is_reused = True
        return connection

    async def take(
        self,
        connect: float | None,
        wait: float | None,
        *,
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
            if not is_fresh and (idle := self.take_idle()) is not None:
                return idle
            if self._slots < self._limit:
                self._slots += 1
                on_connect()
                return await self._fill_slot(connect)
            if self._idle:  # the longest idle one is closed for it; taken out here, so that the loop ends anyway
                idle = next(iter(self._idle))
                del self._idle[idle]
                idle.close()
                continue
            handed = await self._queue(wait)
            if handed is None:
                on_connect()
                return await self._fill_slot(connect)
            if not handed.is_closed:
                if is_fresh:
                    return await self._replace(handed, connect)
                handed.is_reused = True
                return handed

    def give(self, connection: C) -> None:
        """Take back a connection that can serve again."""
        if self._waiters:
            waiter = self._next_waiter()
            if waiter is not None:
                waiter.set_result(connection)
                return
        if self._is_retired:
            connection.close()
            return
        connection.idle_since = connection.loop.time()
        self._idle[connection] = None
        if self._sweep_timer is None:
            self._sweep_timer = connection.loop.call_later(self._idle_timeout, self._sweep, connection.loop)

    def discard(self, connection: C) -> None:
        """Forget a closed connection, and let the next in the queue open one in its place."""
        if connection not in self._open:  # it failed while it was made: its slot is still its maker's
            return
        self._open.remove(connection)
        self._idle.pop(connection, None)
        self._free_slot()

    def retire(self) -> None:
        """Keep no idle connection any more: those in use are closed when they are given back."""
        self._is_retired = True
        for connection in list(self._idle):
            connection.close()

    def revive(self) -> None:
        """Keep idle connections again."""
        self._is_retired = False

    @property
    def is_empty(self) -> bool:
        """Tell whether there is neither a connection nor anybody who waits for one."""
        return self._slots == 0

    def close(self) -> None:
        """Close every connection, and turn away who waits for one."""
        self._is_closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        while (waiter := self._next_waiter()) is not None:
            waiter.set_exception(httpx.ConnectError("the transport is closed"))
        for connection in list(self._open):
            connection.close()

    async def _fill_slot(self, seconds: float | None) -> C:
        """Open a connection in a slot that is already ours."""
        try:
            connection = await self._connect(seconds)
        except BaseException:
            self._free_slot()
            raise
        self._open.add(connection)
        if self._is_closed:
            connection.close()
        return connection

    async def _replace(self, used: C, seconds: float | None) -> C:
        """Close a connection and open another in its slot."""
        self._open.remove(used)
        used.close()
        return await self._fill_slot(seconds)

    async def _queue(self, seconds: float | None) -> C | None:
        """Wait for a connection or for a slot (None)."""
        waiter: asyncio.Future[C | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._hand_on(waiter.result())
            if isinstance(error, TimeoutError):
                raise httpx.PoolTimeout(f"no connection came free within {seconds} s") from error
            raise

    def _next_waiter(self) -> "asyncio.Future[C | None] | None":
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                return waiter
        return None

    def _hand_on(self, handed: C | None) -> None:
        """Pass on what a waiter was handed but can no longer use."""
        if handed is None:
            self._free_slot()
        elif not handed.is_closed:
            self.give(handed)

    def _free_slot(self) -> None:
        waiter = self._next_waiter()
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
