"""Buckets and calendar quotas in one step: all are charged or none, and the longest wait is exact."""

import random
from collections import Counter as Tally
from collections.abc import Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.periods import HOUR, Calendar, Unit
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.quota_state import PeriodQuota, QuotaWarning
from api_gateway.models import NANOSECONDS, Charge, Decision, Notice, Quota
from api_gateway.rate_limiter import NEVER_NS, MemoryLimiter
from tests.exact_buckets import ExactBuckets

FREE = Quota.per_second("FREE", 1, 10)
NOW = datetime(2027, 1, 31, 12, tzinfo=UTC).timestamp()


def quota(tokens: int, unit: Unit = "month", name: str = "", zone: str = "UTC", **more: Any) -> PeriodQuota:
    """Return a calendar quota."""
    return PeriodQuota.of(name or unit, tokens, Calendar(unit, ZoneInfo(zone)), **more)


class Gateway:
    """A limiter with fake clocks, of which the wall clock can step."""

    def __init__(self, *quotas: Quota, wall: float = NOW) -> None:
        self.quotas = quotas
        self.now_ns = 5_000 * NANOSECONDS
        self.wall_ns = int(wall) * NANOSECONDS
        self.warned: list[QuotaWarning] = []
        self.limiter = QuotaLimiter(
            MemoryLimiter([one for one in quotas if not isinstance(one, PeriodQuota)]),
            PeriodCounters(1000),
            wall_clock=lambda: self.wall_ns / NANOSECONDS,
            on_warned=self.warned.extend,
        )

    def charges(self, cost: float = 1, key: str = "a") -> list[Charge]:
        """Return the charges of a request."""
        return [Charge(f"{one.name}:{key}", one, one.cost_ns(cost)) for one in self.quotas]

    def decide(self, cost: float = 1, key: str = "a") -> Decision:
        """Make a request."""
        return self.limiter.decide(self.charges(cost, key), self.now_ns)

    def advance(self, seconds: float) -> None:
        """Advance both clocks."""
        self.now_ns += round(seconds * NANOSECONDS)
        self.wall_ns += round(seconds * NANOSECONDS)

    def settle(self, decision: Decision, before: float, after: float) -> Decision:
        """Correct the cost of a request."""
        changes = [Charge(f"{one.name}:a", one, one.cost_ns(after) - one.cost_ns(before)) for one in self.quotas]
        return self.limiter.settle(changes, decision, self.now_ns, self.charges(after))

    async def left(self) -> list[int]:
        """Return what remains of each."""
        return [one.remaining for one in await self.limiter.inspect(self.charges(0), self.now_ns)]


async def test_a_request_that_a_quota_refuses_charges_no_bucket_and_the_other_way_round() -> None:
    gateway = Gateway(FREE, quota(12))
    assert all(gateway.decide().allowed for _ in range(10))
    refused = gateway.decide()
    assert (refused.key, refused.wait_ns, refused.violated) == ("FREE:a", NANOSECONDS, (FREE,))
    assert await gateway.left() == [0, 2]
    gateway.advance(5)
    assert [gateway.decide().allowed for _ in range(3)] == [True, True, False]
    assert await gateway.left() == [3, 0]


def test_a_client_that_waits_for_the_end_of_the_period_is_admitted_and_a_nanosecond_earlier_not() -> None:
    gateway = Gateway(FREE, quota(2))
    gateway.advance(1 / 3)
    assert [gateway.decide().allowed for _ in range(2)] == [True, True]
    refused = gateway.decide()
    assert refused.key == "month:a"
    assert refused.wait_ns == pytest.approx(12 * HOUR * NANOSECONDS - NANOSECONDS / 3, abs=1000)
    gateway.advance((refused.wait_ns - 2000) / NANOSECONDS)
    assert not gateway.decide().allowed
    gateway.advance(2e-6)
    assert gateway.decide().allowed


def test_the_wait_is_the_longest_of_all_and_all_that_refuse_are_named() -> None:
    hourly, daily = quota(1, "hour"), quota(1, "day")
    gateway = Gateway(Quota.per_second("FREE", 1, 1), hourly, daily)
    assert gateway.decide().allowed
    refused = gateway.decide()
    assert (refused.key, refused.wait_ns) == ("day:a", 12 * HOUR * NANOSECONDS)
    assert [one.name for one in refused.violated] == ["FREE", "hour", "day"]
    gateway.advance(1)
    assert [one.name for one in gateway.decide().violated] == ["hour", "day"]
    assert gateway.decide(key="b").allowed


def test_the_tightest_limit_is_the_one_with_the_fewest_further_requests() -> None:
    gateway = Gateway(FREE, quota(12))
    first = gateway.decide(2)
    assert (first.key, first.remaining, first.allowed) == ("FREE:a", 8, True)
    gateway.advance(10)
    second = gateway.decide(5)
    assert (second.key, second.remaining, second.wait_ns) == ("FREE:a", 5, 0)
    gateway.advance(10)
    third = gateway.decide(1)
    assert (third.key, third.remaining) == ("month:a", 4)
    assert third.reset_ns == (12 * HOUR - 20) * NANOSECONDS


def test_a_cost_above_an_allowance_is_never_allowed_and_one_of_zero_always() -> None:
    gateway = Gateway(FREE, quota(5))
    assert gateway.decide(6).wait_ns == NEVER_NS
    assert gateway.decide(6).key == "month:a"
    assert gateway.decide(11).wait_ns == NEVER_NS
    assert gateway.decide(5).allowed
    assert gateway.decide(0).allowed


async def test_a_settlement_corrects_buckets_and_counters_and_names_the_tightest_again() -> None:
    gateway = Gateway(FREE, quota(12), quota(100, "day"))
    decision = gateway.decide(8)
    after = gateway.settle(decision, 8, 2)
    assert await gateway.left() == [8, 10, 98]
    assert (after.key, after.remaining, after.allowed) == ("FREE:a", 8, True)
    again = gateway.settle(after, 2, 15)
    assert await gateway.left() == [0, 0, 85]
    assert (again.key, again.remaining) == ("FREE:a", 0)
    assert gateway.decide(1).wait_ns == 12 * HOUR * NANOSECONDS


async def test_a_refund_after_the_end_of_the_period_does_not_enlarge_the_next_one() -> None:
    gateway = Gateway(FREE, quota(10, "hour"))
    decision = gateway.decide(10)
    gateway.advance(HOUR)
    assert gateway.decide(10).allowed
    gateway.settle(decision, 10, 0)
    assert await gateway.left() == [0, 0]


def test_a_wall_clock_that_steps_gives_no_second_allowance_while_buckets_follow_the_monotonic_one() -> None:
    gateway = Gateway(FREE, quota(3))
    assert all(gateway.decide().allowed for _ in range(3))
    for step in (-HOUR, -40 * 24 * HOUR, HOUR):
        gateway.wall_ns += step * NANOSECONDS
        gateway.now_ns += 10 * NANOSECONDS
        refused = gateway.decide()
        assert not refused.allowed
        assert refused.wait_ns > 0


def test_shares_are_reported_once_and_told_in_every_response_of_the_period() -> None:
    gateway = Gateway(Quota.per_second("FREE", 1000, 1000), quota(10, warn_at=(0.5, 0.9)))
    assert gateway.decide(4).notices == ()
    half = gateway.decide(2)
    assert half.notices == (Notice("month", 0.5, 4, 12 * HOUR),)
    assert [(one.share, one.used) for one in gateway.warned] == [(0.5, 6000)]
    assert gateway.decide(0).notices == half.notices
    assert gateway.decide(4).notices == (Notice("month", 0.9, 0, 12 * HOUR),)
    assert [one.share for one in gateway.warned] == [0.5, 0.9]
    gateway.advance(12 * HOUR)
    assert gateway.decide(1).notices == ()


async def test_without_quotas_the_limiter_is_that_of_the_buckets() -> None:
    gateway = Gateway(FREE)
    decision = gateway.decide(3)
    assert (decision.key, decision.remaining, decision.notices) == ("FREE:a", 7, ())
    assert gateway.settle(decision, 3, 1).remaining == 9
    await gateway.limiter.refill("FREE:a")
    await gateway.limiter.move("FREE:a", FREE, FREE, gateway.now_ns)
    heard: list[Decision] = []
    gateway.limiter.decide_async(gateway.charges(), gateway.now_ns, heard.append)
    assert heard[0].remaining == 9
    assert len(gateway.limiter) == 1
    assert (gateway.limiter.overflowed, gateway.limiter.bucket_limit) == (0, 1_000_000)
    assert gateway.limiter.state().decision_source == "memory"


class Model:
    """Buckets by the textbook, and one number for each period."""

    def __init__(self) -> None:
        self.buckets = ExactBuckets()
        self.used: Tally[tuple[str, int]] = Tally()

    def decide(self, charges: Sequence[Charge], now_ns: int, now: int) -> bool:
        """Charge everything or nothing."""
        buckets = [charge for charge in charges if not isinstance(charge.quota, PeriodQuota)]
        fits = all(self.buckets.inspect(charge, now_ns).allowed for charge in buckets)
        tallies = []
        for charge in charges:
            if isinstance(charge.quota, PeriodQuota):
                place = charge.key, charge.quota.calendar.at(now).start
                tallies.append((place, charge.increment_ns))
                fits &= not charge.increment_ns or self.used[place] + charge.increment_ns <= charge.quota.burst_ns
        if fits:
            self.buckets.decide(buckets, now_ns)
            for place, units in tallies:
                self.used[place] += units
        return fits


@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_every_decision_and_every_wait_is_that_of_a_plain_model(seed: int) -> None:
    """Random requests, costs and gaps, of two clients with a bucket and up to three quotas."""
    source = random.Random(seed)
    zone = source.choice(("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"))
    kinds: list[Unit] = source.sample(("hour", "day", "week", "month"), source.randint(1, 3))
    quotas = [quota(source.randint(1, 40), unit, zone=zone) for unit in kinds]
    # The days around a change of clocks in each of these zones.
    wall = source.choice(
        [
            datetime(2027, *day, tzinfo=UTC).timestamp()
            for day in ((3, 13), (3, 27), (4, 3), (10, 2), (10, 30), (11, 6))
        ]
    )
    gateway = Gateway(Quota.per_second("FREE", source.choice((0.01, 1, 7)), source.randint(1, 20)), *quotas, wall=wall)
    model, wait = Model(), 0
    for _ in range(60):
        gap = source.choice((0, 0, 1, 1800, HOUR, source.randrange(30 * HOUR), wait / NANOSECONDS))
        gateway.advance(int(gap * 1e6) / 1e6)  # a clock of microseconds
        for _ in range(source.randrange(4)):
            cost, key = source.choice((0, 0.5, 1, 1, 2, 5, 30)), source.choice("ab")
            now = gateway.wall_ns // NANOSECONDS
            decision = gateway.decide(cost, key)
            assert decision.allowed == model.decide(gateway.charges(cost, key), gateway.now_ns, now)
            if decision.wait_ns > 0:
                wait = decision.wait_ns + 1000
                _check_wait(gateway, model, cost, key, decision.wait_ns)


def _check_wait(gateway: Gateway, model: Model, cost: float, key: str, wait_ns: int) -> None:
    """The model refuses the same request until the wait is over, and allows it then."""
    for later_ns, is_allowed in ((wait_ns - 1000, False), (wait_ns, True)):
        trial = Model()
        trial.buckets.full_at = dict[str, Fraction](model.buckets.full_at)
        trial.used = model.used.copy()
        now = (gateway.wall_ns + later_ns) // NANOSECONDS
        assert trial.decide(gateway.charges(cost, key), gateway.now_ns + later_ns, now) == is_allowed


@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_the_short_way_of_a_decision_gives_the_same_result(seed: int) -> None:
    """Requests, settlements, top-ups, other quotas, steps of the clock: decisions, counters and warnings are equal."""
    source = random.Random(seed)
    more: dict[str, Any] = {
        "carry_over": source.choice((0, 5)),
        "warn_at": source.choice(((), (0.5, 1.0))),
        "is_from_start": source.random() < 0.3,
    }
    kinds = [
        FREE,
        Quota.per_second("OTHER", 100, 1000),
        quota(source.randint(1, 40), "hour", **more),
        quota(60, "day"),
    ]
    source.shuffle(kinds)
    short, whole = Gateway(*kinds), Gateway(*kinds)
    decisions: list[tuple[Decision, Decision, float, list[Quota]]] = []
    for _ in range(60):
        step = source.choice((0, 0, 0, 0.3, 60, HOUR / 2, HOUR, 25 * HOUR, -HOUR / 2, -2 * HOUR))
        for one in (short, whole):
            one.now_ns += round(max(step, 0) * NANOSECONDS)
            one.wall_ns += round(step * NANOSECONDS)
        what = source.random()
        if what < 0.8:
            cost, key = source.choice((0, 0.5, 1, 1, 1, 2, 7)), source.choice("aaab")
            ours = short.decide(cost, key)
            theirs = whole.limiter.decide_in_any_state(whole.charges(cost, key), whole.limiter.now_us(), whole.now_ns)
            assert ours == theirs
            assert (ours.debts_ns, ours.at_ns) == (theirs.debts_ns, theirs.at_ns)
            if ours.allowed and key == "a":
                decisions.append((ours, theirs, cost, list(short.quotas)))
        elif what < 0.9 and decisions:
            ours, theirs, cost, charged = decisions.pop(source.randrange(len(decisions)))
            if charged == list(short.quotas):
                after = source.choice((0, cost / 2, cost + 3))
                assert short.settle(ours, cost, after) == whole.settle(theirs, cost, after)
        elif what < 0.95:
            amount, until = source.randint(1, 5) * 1000, short.limiter.now_us() // 1_000_000 + HOUR
            for one in (short, whole):
                period = next(one for one in one.quotas if one.name == "hour")
                assert isinstance(period, PeriodQuota)
                one.limiter.counters.top_up("hour:a", period, amount, until, one.limiter.now_us())
        else:  # as a reload does
            kinds = [quota(source.randint(1, 40), "hour", **more) if one.name == "hour" else one for one in kinds]
            short.quotas = whole.quotas = tuple(kinds)
        assert short.limiter.counters.counters == whole.limiter.counters.counters
        assert short.limiter.counters.changed == whole.limiter.counters.changed
        assert short.warned == whole.warned


def test_never_is_the_longest_wait_of_a_bucket_and_a_quota() -> None:
    gateway = Gateway(FREE, quota(5))
    assert gateway.decide(5).allowed
    refused = gateway.decide(6)
    assert (refused.key, refused.wait_ns) == ("month:a", NEVER_NS)
    assert [one.name for one in refused.violated] == ["FREE", "month"]


def test_each_charge_in_the_short_way_is_to_be_stored() -> None:
    gateway = Gateway(FREE, quota(10))
    for _ in range(3):
        assert gateway.decide().allowed
        assert [key for key, _ in gateway.limiter.counters.take_changed()] == ["month:a"]
    gateway.decide(0)
    assert gateway.limiter.counters.take_changed() == []


def test_a_charge_from_before_a_change_of_the_period_does_not_begin_counts_anew() -> None:
    gateway = Gateway(FREE, quota(5, "day", name="q"))
    earlier = gateway.decide()
    old = gateway.quotas
    gateway.quotas = (FREE, quota(3, "month", name="q"))
    assert [gateway.decide().allowed for _ in range(4)] == [True] * 3 + [False]
    gateway.quotas = old
    gateway.settle(earlier, 1, 2)
    gateway.settle(earlier, 1, 0)
    gateway.quotas = (FREE, quota(3, "month", name="q"))
    assert not gateway.decide().allowed
