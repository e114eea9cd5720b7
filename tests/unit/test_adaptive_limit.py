"""An adaptive limit finds the capacity of an upstream, follows its changes, and stays unchanged if it is not reached.

The upstream is a simulated server of so many places, before which requests queue in their order; time is virtual.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from api_gateway.resilience.adaptive_limit import (
    BASELINE_INTERVAL,
    MIN_SAMPLES,
    WINDOW,
    AdaptivePolicy,
    GradientController,
)
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses
from tests.cases import each

NOW = 990.0  # a multiple of what lies between two looks
TIERS = PriorityClasses({"FREE": 1, "BASIC": 5, "PREMIUM": 20, "ENTERPRISE": 100})
FREE, BASIC, PREMIUM, ENTERPRISE = range(4)


@dataclass
class Span:
    """What happened in one stretch of time."""

    seconds: float = 0.0
    offered: Counter[int] = field(default_factory=Counter)
    done: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    least: float = float("inf")  # of the limit
    most: float = 0.0

    @property
    def rate(self) -> float:
        return self.done.total() / self.seconds

    def share(self, band: int) -> float:
        return self.done[band] / self.offered[band]


class Queue:
    """A server of `places` that each take `service` seconds, by chance if `spread` says how; open-loop arrivals."""

    def __init__(
        self, limit: ConcurrencyLimit, places: int, service: float, *, spread: Callable[[random.Random], float]
    ) -> None:
        self.limit, self.places, self.upstream_client, self.spread = limit, places, service, spread
        self.now = NOW
        self._source = random.Random(1)
        self._events: list[tuple[float, int, int, float | None]] = []
        self._count = self._busy = 0
        self._waiting: deque[tuple[int, float]] = deque()

    def run(self, seconds: float, *rates: float) -> Span:
        """Offer `rates` requests a second, by priority, for a while."""
        span, end = Span(seconds), self.now + seconds
        self._events = [event for event in self._events if event[3] is not None]
        heapq.heapify(self._events)
        for band, rate in enumerate(rates):
            if rate:
                self._push(self._source.expovariate(rate), band, None)
        while self._events and self._events[0][0] < end:
            self.now, _, band, since = heapq.heappop(self._events)
            span.least, span.most = min(span.least, self.limit.limit), max(span.most, self.limit.limit)
            if since is None:
                span.offered[band] += 1
                self._push(self._source.expovariate(rates[band]), band, None)
                self._arrive(band)
            else:
                span.done[band] += 1
                span.latencies.append(self.now - since)
                self._finish(since)
        self.now = end
        return span

    def _push(self, after: float, band: int, since: float | None) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + after, self._count, band, since))

    def _arrive(self, band: int) -> None:
        if self.limit.admits(band):
            self.limit.acquire(band)
            self._waiting.append((band, self.now))
            self._begin()

    def _begin(self) -> None:
        if self._waiting and self._busy < self.places:
            self._busy += 1
            band, since = self._waiting.popleft()
            self._push(self.upstream_client * self.spread(self._source), band, since)

    def _finish(self, since: float) -> None:
        self._busy -= 1
        self.limit.release()
        self.limit.observe(self.now - since, self.now)
        self._begin()


def constant(_source: random.Random) -> float:
    return 1.0


def exponential(source: random.Random) -> float:
    return source.expovariate(1.0)


def long_tailed(source: random.Random) -> float:
    return source.lognormvariate(-0.5, 1.0)


SPREADS = (constant, exponential, long_tailed)


def adaptive(bands: PriorityClasses = TIERS, **policy: float) -> ConcurrencyLimit:
    gradient = GradientController(AdaptivePolicy(**policy), NOW)  # type: ignore[arg-type]  # floor and ceiling are whole
    return ConcurrencyLimit(gradient, bands, source=random.Random(1))


def mix(capacity: float, times: float = 3) -> Sequence[float]:
    """Return what is offered by band: the two upper ones come to 0.9 of the capacity when all come to three times."""
    return [share * capacity * times / 3 for share in (1.5, 0.6, 0.45, 0.45)]


# What it converges to


@each("spread", SPREADS)
@each("places", [10, 100])
def test_at_three_times_its_capacity_an_upstream_is_fully_used_and_the_highest_priority_succeeds(
    places: int, spread: Callable[[random.Random], float]
) -> None:
    capacity = places / 0.05
    server = Queue(adaptive(), places, 0.05, spread=spread)
    server.run(15, *mix(capacity))
    span = server.run(40 if places == 10 else 20, *mix(capacity))  # ten times the requests, in half of the time
    assert span.rate > 0.93 * capacity
    assert span.share(ENTERPRISE) > 0.96
    assert span.share(ENTERPRISE) > span.share(PREMIUM) > span.share(BASIC) > span.share(FREE)
    assert span.share(FREE) < 0.05
    assert sum(span.latencies) / len(span.latencies) < 0.05 * 1.7


@each("spread", SPREADS)
def test_one_priority_alone_uses_the_upstream_fully_too(spread: Callable[[random.Random], float]) -> None:
    for bands, rates in ((SINGLE_PRIORITY, (600.0,)), (TIERS, (600.0, 0, 0, 0)), (TIERS, (0, 0, 0, 600.0))):
        server = Queue(adaptive(bands), 10, 0.05, spread=spread)
        server.run(15, *rates)
        assert server.run(40, *rates).rate > 0.92 * 200


def test_a_queue_that_is_there_from_the_start_is_not_mistaken_for_the_latency_of_the_upstream() -> None:
    server = Queue(adaptive(SINGLE_PRIORITY, max_limit=400, min_limit=400), 10, 0.05, spread=constant)
    server.run(5, 600)
    assert server.limit.in_flight == 400
    server.limit = adaptive(SINGLE_PRIORITY)
    server.limit._slots.in_use = 400
    server.run(60, 600)
    assert sum(latencies := server.run(20, 600).latencies) / len(latencies) < 0.05 * 1.7


# Up and down


def test_a_slower_upstream_is_detected_within_two_measurements_and_a_faster_one_at_once() -> None:
    server = Queue(adaptive(), 10, 0.05, spread=constant)
    server.run(20, *mix(200))
    server.upstream_client = 0.15
    server.run(2 * BASELINE_INTERVAL, *mix(200))
    slow = server.run(20, *mix(200))
    assert slow.rate > 0.9 * 10 / 0.15
    assert sum(slow.latencies) / len(slow.latencies) < 0.15 * 1.8
    server.upstream_client = 0.05
    server.run(5, *mix(200))
    assert server.run(20, *mix(200)).rate > 0.93 * 200


def test_a_larger_capacity_is_used_within_seconds() -> None:
    server = Queue(adaptive(), 10, 0.05, spread=constant)
    server.run(20, *mix(200))
    server.places = 60
    server.run(10, *mix(1200))
    assert server.run(20, *mix(1200)).rate > 0.9 * 1200


def test_a_measurement_lowers_the_limit_for_tenths_of_a_second_in_half_a_minute() -> None:
    server = Queue(adaptive(), 10, 0.05, spread=constant)
    server.run(BASELINE_INTERVAL + 10, *mix(200))
    span = server.run(BASELINE_INTERVAL - 10.5, *mix(200))
    low = 0.0
    while server.now < NOW + 3 * BASELINE_INTERVAL - 0.5:
        if server.run(0.02, *mix(200)).least < span.least:
            low += 0.02
    assert 0.2 < low < 1.5


# Bounds


@given(
    steps=st.lists(st.tuples(st.floats(1e-6, 60), st.floats(0, 5), st.booleans(), st.booleans()), max_size=60),
    floor=st.integers(1, 50),
    width=st.integers(0, 500),
    tolerance=st.floats(1.1, 10),
)
def test_the_limit_stays_between_minimum_and_maximum(
    steps: list[tuple[float, float, bool, bool]], floor: int, width: int, tolerance: float
) -> None:
    gradient, now = GradientController(AdaptivePolicy(floor, floor + width, tolerance), NOW), NOW
    for seconds, pause, is_met, is_calm in steps:
        now += pause
        for _ in range(MIN_SAMPLES + 1):
            now += seconds / 10
            if gradient.add(seconds, now):
                gradient.close_window(now, is_met=is_met, is_calm=is_calm)
        assert floor <= gradient.limit <= floor + width
        assert floor <= gradient.allowed <= floor + width


@given(latencies=st.lists(st.floats(1e-4, 10), min_size=1, max_size=40))
def test_a_limit_that_is_not_reached_does_not_change(latencies: list[float]) -> None:
    limit, now = adaptive(), NOW
    before = limit.limit
    for seconds in latencies:
        for _ in range(MIN_SAMPLES + 1):
            limit.acquire(FREE)
            now += max(WINDOW, seconds)
            limit.observe(seconds, now)
            limit.release()
    assert limit.limit == before


def windows(limit: ConcurrencyLimit, count: int, seconds: float, now: float) -> Iterator[float]:
    """Have one request after the other take `seconds`, with the limit met; yield the limit after each."""
    for _ in range(count):
        now += 0.05
        limit.admits(FREE)
        limit.observe(seconds, now)
        yield limit.limit


def test_it_grows_while_the_latency_keeps_and_shrinks_with_a_worse_one() -> None:
    limit = adaptive(SINGLE_PRIORITY)
    limit._slots.in_use = 1000
    *_, grown = windows(limit, 200, 0.01, NOW)
    assert grown > 55
    *_, worse = windows(limit, 200, 0.2, NOW + 200 * 0.05)
    assert worse < 0.7 * grown


def test_an_adaptive_limit_shows_its_state() -> None:
    limit = adaptive()
    assert limit.is_adaptive
    assert repr(limit) == "<ConcurrencyLimit [0 of 50]>"
    assert repr(GradientController(AdaptivePolicy(), NOW)) == "<GradientController [50.0, None against None s]>"
