"""How results of checks change the health of a target, the findings of a check, and independent targets."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from api_gateway.upstreams.health_checks import HealthChecker, HealthPolicy, HealthThreshold, SendProbe, check
from api_gateway.upstreams.target import Target
from tests.cases import each
from tests.kit import FakeClock, soon
from tests.virtual_time import in_virtual_time

POLICY = HealthPolicy("/health", 0.001, 5, healthy_threshold=2, unhealthy_threshold=3, statuses=(range(200, 400),))
ONE_IS_ENOUGH = replace(POLICY, healthy_threshold=1, unhealthy_threshold=1)
URL = "http://10.0.0.1:9001"
NOW = 1000.0
CLOCK = FakeClock(NOW)


def judged(*, is_healthy: bool = True, policy: HealthPolicy = POLICY) -> tuple[HealthThreshold, Target]:
    target = Target(URL, is_healthy=is_healthy)
    return HealthThreshold(policy, target), target


def answering(status: int) -> SendProbe:
    async def ask(_url: str, _timeout: float) -> int:
        return status

    return ask


def failing(error: BaseException) -> SendProbe:
    async def ask(_url: str, _timeout: float) -> int:
        raise error

    return ask


async def silent(_url: str, _timeout: float) -> int:
    """Answer never."""
    never: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    return await never


# The health of a target


@each(
    ("is_healthy", "results", "changes"),  # + is a good result, - a bad one; * where the verdict changes
    [
        (True, "++++", "...."),
        (True, "---", "..*"),
        (True, "------", "..*..."),
        (True, "--+--+", "......"),
        (True, "--+---", ".....*"),
        (True, "---+-++", "..*...*"),
        (False, "--", ".."),
        (False, "++", ".*"),
        (False, "+-+-+", "....."),
        (False, "++---", ".*..*"),
    ],
)
def test_the_health_changes_after_enough_consecutive_contrary_results(
    is_healthy: bool,  # noqa: FBT001 - a table's column
    results: str,
    changes: str,
) -> None:
    judge, target = judged(is_healthy=is_healthy)
    for result, change in zip(results, changes, strict=True):
        assert judge.observe(is_good=result == "+", finding=result, now=NOW) == (change == "*")
        is_healthy ^= change == "*"
        assert target.is_healthy == is_healthy


def test_one_result_is_enough_where_the_policy_says_so() -> None:
    judge, target = judged(policy=ONE_IS_ENOUGH)
    for is_good in (False, True, False):
        assert judge.observe(is_good=is_good, finding="", now=NOW)
        assert target.is_healthy == is_good


def test_a_target_shows_that_it_was_checked_and_what_was_found() -> None:
    judge, target = judged()
    assert (target.checks.at, target.checks.finding) == (None, None)
    judge.observe(is_good=False, finding="status 503", now=NOW)
    assert (target.checks.at, target.checks.finding) == (NOW, "status 503")


def test_its_repr_shows_health_and_contrary_results() -> None:
    judge, _ = judged()
    judge.observe(is_good=False, finding="", now=NOW)
    assert repr(judge) == "<HealthThreshold [healthy, 1 contrary in a row]>"
    judge.observe(is_good=False, finding="", now=NOW)
    judge.observe(is_good=False, finding="", now=NOW)
    assert repr(judge) == "<HealthThreshold [unhealthy, 0 contrary in a row]>"


def test_a_target_shows_how_many_results_alike_came_in_a_row_and_its_last_error() -> None:
    judge, target = judged()
    for second, (is_good, finding) in enumerate([(True, "fine"), (False, "no"), (False, "worse"), (True, "fine")]):
        judge.observe(is_good=is_good, finding=finding, now=NOW + second)
        expected = (NOW + second, is_good, 1 if second != 2 else 2)
        assert (target.checks.at, target.checks.is_good, target.checks.consecutive) == expected
    assert (target.checks.last_error, target.checks.last_error_at) == ("worse", NOW + 2)


# One check


@pytest.mark.parametrize(("status", "is_good"), [(199, False), (200, True), (204, True), (205, False), (418, True)])
async def test_the_policy_says_which_statuses_are_good(status: int, is_good: bool) -> None:  # noqa: FBT001 - a table's column
    policy = replace(POLICY, statuses=(range(200, 205), range(418, 419)))
    judge, target = judged()
    await check(judge, policy, URL, answering(status), CLOCK)
    assert target.checks.is_good is is_good


@pytest.mark.parametrize(
    ("ask", "is_good", "finding"),
    [
        (answering(200), True, "status 200"),
        (answering(204), True, "status 204"),
        (answering(302), True, "status 302"),
        (answering(399), True, "status 399"),
        (answering(199), False, "status 199"),
        (answering(400), False, "status 400"),
        (answering(503), False, "status 503"),
        (failing(ConnectionRefusedError("connection refused")), False, "connection refused"),
        (failing(ValueError()), False, "ValueError"),
        (failing(TimeoutError("of its own")), False, "no response within 5 s"),
    ],
)
async def test_a_check_finds(ask: SendProbe, is_good: bool, finding: str) -> None:  # noqa: FBT001 - a table's column
    judge, target = judged(is_healthy=not is_good, policy=ONE_IS_ENOUGH)
    assert await check(judge, POLICY, URL, ask, CLOCK)
    assert (target.is_healthy, target.checks.finding) == (is_good, finding)


@in_virtual_time
async def test_silence_is_found_after_the_timeout() -> None:
    judge, target = judged()
    assert not await check(judge, replace(POLICY, timeout=0.001), URL, silent, CLOCK)
    assert target.checks.finding == "no response within 0.001 s"
    assert repr(judge) == "<HealthThreshold [healthy, 1 contrary in a row]>"


async def test_a_check_asks_the_health_path_with_its_timeout() -> None:
    asked: list[tuple[str, float]] = []

    async def ask(url: str, timeout: float) -> int:  # noqa: ASYNC109 - the seam's own signature
        asked.append((url, timeout))
        return 200

    await check(judged()[0], POLICY, URL, ask, CLOCK)
    assert asked == [(f"{URL}/health", 5)]


async def test_cancelling_a_check_passes_through_and_finds_nothing() -> None:
    judge, target = judged()
    task = asyncio.create_task(check(judge, POLICY, URL, silent, CLOCK))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (target.checks.at, target.is_healthy) == (None, True)


# Watching


@asynccontextmanager
async def watching(
    targets: Sequence[Target], ask: SendProbe, on_change: Callable[[Target], None] = lambda _: None
) -> AsyncIterator[HealthChecker]:
    """Watch for the length of a block, which may take 5 s; the end is a cancellation that passes through."""
    watch = HealthChecker(POLICY, lambda _: ask, on_change, clock=CLOCK, source=random.Random(1))
    watch.follow(targets)
    task = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(5):
            yield watch
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def scripted(statuses: Sequence[int]) -> tuple[SendProbe, asyncio.Event]:
    """Return an ask that answers these in turn and then no more, and what tells that they are used up."""
    left = list(statuses)
    done = asyncio.Event()

    async def ask(url: str, timeout: float) -> int:  # noqa: ASYNC109 - the seam's own signature
        if not left:
            done.set()
            return await silent(url, timeout)
        return left.pop(0)

    return ask, done


@in_virtual_time
async def test_a_change_of_health_is_reported_once() -> None:
    target = Target(URL)
    told: list[bool] = []
    ask, used_up = scripted([200, 500, 500, 500, 500, 500, 200, 200, 200, 500])
    async with watching([target], ask, lambda changed: told.append(changed.is_healthy)):
        await used_up.wait()
    assert told == [False, True]


@in_virtual_time
async def test_a_change_is_reported_for_its_target() -> None:
    good, bad = Target("http://good"), Target("http://bad")
    told: list[Target] = []
    changed = asyncio.Event()

    async def ask(url: str, _timeout: float) -> int:
        return 200 if url == "http://good/health" else 500

    def on_change(target: Target) -> None:
        told.append(target)
        changed.set()

    async with watching([good, bad], ask, on_change):
        await changed.wait()
    assert told == [bad]
    assert (good.is_healthy, bad.is_healthy) == (True, False)


@in_virtual_time
async def test_a_slow_target_delays_no_other() -> None:
    asked: Counter[str] = Counter()
    enough = asyncio.Event()

    async def ask(url: str, timeout: float) -> int:  # noqa: ASYNC109 - the seam's own signature
        asked[url] += 1
        if "slow" in url:
            return await silent(url, timeout)
        if asked[url] == 5:
            enough.set()
        return 200

    async with watching([Target("http://slow"), Target("http://fast")], ask):
        await enough.wait()
    assert asked["http://fast/health"] >= 5
    assert asked["http://slow/health"] == 1


class Pauses:
    """Takes the place of sleeping: notes how long it would have been; the first `short` of `count` end at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, *, short: int) -> None:
        self.seconds: list[float] = []
        self.are_over = asyncio.Event()
        self._count = count
        self._short = short
        monkeypatch.setattr("api_gateway.upstreams.health_checks.asyncio.sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if len(self.seconds) == self._count:
            self.are_over.set()
        if len(self.seconds) > self._short:
            await asyncio.get_running_loop().create_future()


async def test_a_target_is_asked_about_every_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread by a tenth, so that gateways started together do not ask together for ever."""
    pauses = Pauses(monkeypatch, 201, short=200)
    async with watching([Target(URL)], answering(200)):
        await pauses.are_over.wait()
    between = pauses.seconds[1:]
    assert all(0.0009 <= pause <= 0.0011 for pause in between)
    assert max(between) - min(between) > 0.0001
    assert sum(between) / 200 == pytest.approx(0.001, rel=0.02)


async def test_first_checks_spread_over_the_first_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else many targets, workers and gateways that start together would all ask at once."""
    pauses = Pauses(monkeypatch, 400, short=0)
    asked = 0

    async def ask(_url: str, _timeout: float) -> int:
        nonlocal asked
        asked += 1
        return 200

    async with watching([Target(URL) for _ in range(400)], ask):
        await pauses.are_over.wait()
    assert asked == 0
    assert all(0 <= pause < 0.001 for pause in pauses.seconds)
    quarters = Counter(int(pause / 0.00025) for pause in pauses.seconds)
    assert all(70 < quarters[quarter] < 130 for quarter in range(4))


@in_virtual_time
async def test_a_target_is_never_asked_twice_at_once() -> None:
    """Also when its response takes longer than the interval."""
    running = most = done = 0
    enough = asyncio.Event()

    async def ask(_url: str, _timeout: float) -> int:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.005)
        running -= 1
        done += 1
        if done == 4:
            enough.set()
        return 200

    async with watching([Target(URL)], ask):
        await enough.wait()
    assert most == 1


@in_virtual_time
async def test_new_targets_are_checked_and_those_that_are_gone_no_more() -> None:
    asked: Counter[str] = Counter()
    stays, goes, comes = (Target(f"http://{name}") for name in ("stays", "goes", "comes"))

    async def ask(url: str, _timeout: float) -> int:
        asked[url.split("/")[2]] += 1
        return 200

    async with watching([stays, goes], ask) as watch:
        await soon(lambda: asked["stays"] > 1 and asked["goes"] > 1, "both are checked")
        watch.follow([stays, comes])
        assert repr(watch) == "<HealthChecker [2 targets]>"
        await asyncio.sleep(0)
        asked.clear()
        await soon(lambda: asked["stays"] > 3 and asked["comes"] > 3, "the new one is checked")
    assert set(asked) == {"stays", "comes"}


@in_virtual_time
async def test_a_resolved_target_is_asked_by_its_name() -> None:
    asked: list[str] = []

    async def ask(url: str, _timeout: float) -> int:
        asked.append(url)
        return 200

    async with watching([Target(URL, named="http://users.internal", address="10.0.0.1")], ask):
        await soon(lambda: bool(asked), "it is checked")
    assert asked[0] == "http://users.internal/health"


async def test_the_time_that_a_check_took_is_recorded() -> None:
    clock = FakeClock(NOW)
    judge, target = judged()

    async def slow(_url: str, _timeout: float) -> int:
        clock.advance(0.25)
        return 200

    assert target.checks.seconds is None
    await check(judge, POLICY, URL, slow, clock)
    assert target.checks.seconds == 0.25
