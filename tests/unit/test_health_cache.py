"""The bodies of /health: rendered once for concurrent requests, and never older than promised."""

import asyncio
from collections.abc import Callable

import pytest

from api_gateway.admin.health_cache import HealthCache
from api_gateway.reporting.upstream_schema import HealthView
from tests.kit import FakeClock


class Rendering:
    """Renders a view whose version is its number, once it may; each takes `cost` seconds."""

    def __init__(self, clock: FakeClock, cost: float = 0.01) -> None:
        self.count = 0
        self.clock = clock
        self.cost = cost
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.fails = False

    async def __call__(self) -> HealthView:
        self.count += 1
        number = self.count
        await self.may_end.wait()
        self.clock.advance(self.cost)
        if self.fails:
            raise OSError("no report")
        return HealthView(status="pass", version=str(number))


@pytest.fixture
def made(clock: FakeClock) -> tuple[HealthCache, Rendering]:
    rendering = Rendering(clock)
    return HealthCache(rendering, clock), rendering


async def test_an_operator_sees_everything_and_others_the_status_word(made: tuple[HealthCache, Rendering]) -> None:
    cache, rendering = made
    assert await cache.detailed() == b'{"status":"pass","version":"1"}'
    assert await cache.status_only() == b'{"status":"pass"}'
    assert rendering.count == 1


@pytest.mark.parametrize(
    ("cost", "kept"), [(0.01, 0.1), (0.001, 0.01), (5.0, 1.0)], ids=["ten times the cost", "less", "a second at most"]
)
async def test_a_body_is_reused_in_proportion_to_its_cost(clock: FakeClock, cost: float, kept: float) -> None:
    rendering = Rendering(clock, cost)
    cache = HealthCache(rendering, clock)
    await cache.detailed()
    clock.advance(kept * 0.99)
    await cache.detailed()
    assert rendering.count == 1
    clock.advance(kept * 0.02)
    await cache.detailed()
    assert rendering.count == 2


async def test_an_unauthenticated_caller_gets_a_rendering_less_than_a_second_old(
    made: tuple[HealthCache, Rendering], clock: FakeClock
) -> None:
    cache, rendering = made
    await cache.status_only()
    clock.advance(0.49)
    await cache.status_only()
    assert rendering.count == 1
    clock.advance(0.6)
    await cache.status_only()
    assert rendering.count == 2


async def test_concurrent_callers_do_not_wait_for_the_status_word(
    made: tuple[HealthCache, Rendering], clock: FakeClock
) -> None:
    cache, rendering = made
    await cache.status_only()
    clock.advance(0.6)
    rendering.may_end.clear()
    assert await cache.status_only() == await cache.status_only() == b'{"status":"pass"}'
    await asyncio.sleep(0)
    rendering.may_end.set()
    await asyncio.sleep(0)
    assert rendering.count == 2
    clock.advance(0.45)
    await cache.status_only()
    assert rendering.count == 2


async def test_a_failure_without_waiters_reaches_the_next_caller(
    made: tuple[HealthCache, Rendering], clock: FakeClock
) -> None:
    cache, rendering = made
    await cache.status_only()
    clock.advance(0.6)
    rendering.fails = True
    assert await cache.status_only() == b'{"status":"pass"}'
    await asyncio.sleep(0)
    clock.advance(0.5)
    with pytest.raises(OSError, match="no report"):
        await cache.status_only()


@pytest.mark.parametrize("ask", [HealthCache.detailed, HealthCache.status_only])
async def test_all_who_ask_together_share_one_rendering(
    made: tuple[HealthCache, Rendering], ask: Callable[[HealthCache], "asyncio.Future[bytes]"]
) -> None:
    cache, rendering = made
    rendering.may_end.clear()
    waiting = [asyncio.ensure_future(ask(cache)) for _ in range(64)]
    await asyncio.sleep(0)
    waiting.pop().cancel()  # one leaves
    await asyncio.sleep(0)
    rendering.may_end.set()
    assert len(set(await asyncio.gather(*waiting))) == 1
    assert rendering.count == 1


async def test_after_a_change_no_caller_gets_an_older_rendering(made: tuple[HealthCache, Rendering]) -> None:
    cache, rendering = made
    await cache.detailed()
    cache.expire()
    assert b'"2"' in await cache.detailed()
    rendering.may_end.clear()
    cache.expire()
    before = asyncio.ensure_future(cache.detailed())
    await asyncio.sleep(0)
    cache.expire()  # while it is rendered
    after = asyncio.ensure_future(cache.detailed())
    await asyncio.sleep(0)
    rendering.may_end.set()
    assert b'"3"' in await before
    assert b'"4"' in await after
    assert b'"4"' in await cache.detailed()


async def test_a_failure_is_reported_to_all_who_wait_and_not_kept(made: tuple[HealthCache, Rendering]) -> None:
    cache, rendering = made
    rendering.fails = True
    found = await asyncio.gather(cache.detailed(), cache.status_only(), return_exceptions=True)
    assert [type(one) for one in found] == [OSError, OSError]
    rendering.fails = False
    assert b'"pass"' in await cache.status_only()
