"""Lifetimes of pooled connections, on a clock that stands still: idle time, age, requests, and announcements."""

import asyncio
import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from api_gateway.transport.lifetime import ConnectionLifetime
from api_gateway.transport.pool import SWEEP_INTERVAL, Pool


class FakeLoop:
    """The clock and the timers of an event loop; time passes by `advance`."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._numbers = count()

    def time(self) -> float:
        return self._now

    def call_at(self, due: float, callback: Callable[..., object], *args: object) -> "FakeTimer":
        timer = FakeTimer(callback, args)
        heapq.heappush(self._timers, (due, next(self._numbers), timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self._now + seconds
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            self._now = max(self._now, due)
            if not timer.is_cancelled:
                timer.callback(*timer.args)
        self._now = end


class FakeTimer:
    """A timer of `FakeLoop`."""

    def __init__(self, callback: Callable[..., object], args: tuple[object, ...]) -> None:
        self.callback = callback
        self.args = args
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeConnection:
    """A pooled connection without a socket."""

    is_closed = is_reused = False
    idle_since = 0.0
    principal: str | None = None
    pool: "Pool[FakeConnection]"

    def __init__(self, loop: FakeLoop, lifetime: ConnectionLifetime | None) -> None:
        self.loop: Any = loop
        self.lifetime = lifetime

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.pool.discard(self)


class Scene:
    """A pool on a fake loop; `lifetime` is that of the next connection."""

    def __init__(self, idle_timeout: float = 4.0) -> None:
        self.loop = FakeLoop()
        self.lifetime: ConnectionLifetime | None = None
        self.pool: Pool[FakeConnection] = Pool(self._connect, limit=8, idle_timeout=idle_timeout)

    async def _connect(self, _seconds: float | None) -> FakeConnection:
        connection = FakeConnection(self.loop, self.lifetime)
        connection.pool = self.pool
        return connection

    async def open(self, announced: bytes | None = None, lifetime: ConnectionLifetime | None = None) -> FakeConnection:
        """Open a connection for a request whose response has this value of Keep-Alive."""
        self.lifetime = lifetime
        connection = await self.pool.acquire(None, None, is_fresh=True)
        if announced is not None:
            connection.lifetime = connection.lifetime or ConnectionLifetime()
            connection.lifetime.announce(announced)
        return connection

    async def release(
        self, announced: bytes | None = None, lifetime: ConnectionLifetime | None = None
    ) -> FakeConnection:
        """Open a connection and return it after the request."""
        connection = await self.open(announced, lifetime)
        self.pool.release(connection)
        return connection


@pytest.fixture
def scene() -> Scene:
    return Scene()


def lives_for(scene: Scene, connection: FakeConnection, seconds: float) -> bool:
    """Return whether the idle connection is closed this many seconds from now: not before, at most a sweep later."""
    scene.loop.advance(seconds - 0.001)
    was_open = not connection.is_closed
    scene.loop.advance(0.002 + SWEEP_INTERVAL)
    return was_open and connection.is_closed


@pytest.mark.parametrize(
    ("announced", "seconds"),
    [
        (None, 4),
        (b"timeout=5", 4),
        (b"timeout=3", 2),
        (b"timeout=2, max=100", 1),
        (b"max=100, Timeout=2", 1),
        (b"timeout = 2", 1),
        (b'timeout="2"', 1),
        (b"timeout=1", 0.5),
        (b"timeout=75", 4),
        (b"timeout=-3", 4),
        (b"timeout=2.5", 1),
        (b"timeout=2.5.1", 4),
        (b"timeout=5, timeout=2,timeout=3", 1),
        (b"xtimeout=2", 4),
        (b"timeout", 4),
        (b"timeout=" + b"2" * 200, 4),
        (b"", 4),
    ],
)
async def test_an_idle_connection_is_closed_before_the_upstream_closes_it(
    scene: Scene, announced: bytes | None, seconds: float
) -> None:
    """A second before the announced timeout, and after the pool's own idle timeout at the latest."""
    assert lives_for(scene, await scene.release(announced), seconds)
    assert scene.pool.is_empty


@pytest.mark.parametrize("announced", [b"timeout=0", b"max=0", b"timeout=0, max=9"])
async def test_an_announcement_of_the_end_closes_the_connection(scene: Scene, announced: bytes) -> None:
    assert (await scene.release(announced)).is_closed
    assert scene.pool.is_empty


async def test_connections_with_several_timeouts_are_closed_each_in_its_time(scene: Scene) -> None:
    """Whatever the order in which they became idle."""
    long = await scene.release(b"timeout=75")
    short = await scene.release(b"timeout=2")
    plain = await scene.release()
    assert lives_for(scene, short, 1)
    assert not long.is_closed
    assert lives_for(scene, long, 4 - 1 - 0.001 - SWEEP_INTERVAL)
    assert plain.is_closed


async def test_a_later_announcement_replaces_an_earlier_one(scene: Scene) -> None:
    connection = await scene.open(b"timeout=2")
    assert connection.lifetime is not None
    connection.lifetime.announce(b"timeout=4")
    scene.pool.release(connection)
    assert lives_for(scene, connection, 3)


async def served(scene: Scene, connection: FakeConnection, *announced: bytes | None) -> int:
    """Return how many requests the connection serves, one after the other; they announce these values."""
    requests = 1
    values = iter(announced)
    while True:
        value = next(values, None)
        if value is not None:
            connection.lifetime = connection.lifetime or ConnectionLifetime()
            connection.lifetime.announce(value)
        scene.pool.release(connection)
        if connection.is_closed or requests == 20:
            return requests
        assert scene.pool.acquire_idle() is connection
        requests += 1


@pytest.mark.parametrize(
    ("announced", "requests"),
    [
        ((), 20),
        ((b"max=3",), 4),
        ((b"max=3", b"max=2", b"max=1", b"max=0"), 4),
        ((b"max=3",) * 20, 4),
        ((b"timeout=5, max=1", b"timeout=5, max=9"), 2),
    ],
)
async def test_no_more_requests_are_sent_than_the_upstream_announces(
    scene: Scene, announced: tuple[bytes, ...], requests: int
) -> None:
    """`max` is the number of further requests: counted down by the upstream, told once, or always the same."""
    assert await served(scene, await scene.open(), *announced) == requests


@pytest.mark.parametrize("most", [1, 3])
async def test_max_requests_ends_a_connection(scene: Scene, most: int) -> None:
    assert await served(scene, await scene.open(lifetime=ConnectionLifetime(max_requests=most))) == most


async def test_max_age_ends_a_connection(scene: Scene) -> None:
    """An idle one when it has that age; one in use, when its response is complete."""
    idle = await scene.release(lifetime=ConnectionLifetime(expires_at=scene.loop.time() + 2))
    busy = await scene.open(lifetime=ConnectionLifetime(expires_at=scene.loop.time() + 2))
    assert lives_for(scene, idle, 2)
    assert not busy.is_closed
    scene.pool.release(busy)
    assert busy.is_closed
    assert scene.pool.is_empty


async def test_the_slot_of_an_ended_connection_goes_to_the_next_request(scene: Scene) -> None:
    scene.pool.change(1, 1, 4.0)
    connection = await scene.open(lifetime=ConnectionLifetime(max_requests=1))
    waiting = asyncio.create_task(scene.pool.acquire(None, 5.0))
    await asyncio.sleep(0)
    scene.lifetime = None
    scene.pool.release(connection)
    assert await waiting is not connection
    assert repr(scene.pool) == "<Pool [1 busy, 0 idle, 0 waiting]>"


async def test_a_changed_idle_timeout_applies_to_idle_connections(scene: Scene) -> None:
    connection = await scene.release()
    scene.pool.change(8, 8, 1.0)
    assert lives_for(scene, connection, 1)
    connection = await scene.release()
    scene.loop.advance(0.5)
    scene.pool.change(8, 8, 0.25)
    assert connection.is_closed


async def test_a_connection_that_is_used_again_rests_anew(scene: Scene) -> None:
    connection = await scene.release()
    scene.loop.advance(3.9)
    assert scene.pool.acquire_idle() is connection
    scene.loop.advance(100)
    assert not connection.is_closed
    scene.pool.release(connection)
    assert lives_for(scene, connection, 4)


def test_a_lifetime_without_limits_never_ends() -> None:
    lifetime = ConnectionLifetime()
    assert not lifetime.is_over(1e12)
    assert lifetime.idle_until(10.0, 4.0) == 14.0
    assert lifetime.idle_until(10.0, math.inf) == math.inf
