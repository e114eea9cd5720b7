"""Counters of calendar quotas: exactly the allowance in each period, whatever the clock does."""

import random
from collections import Counter as Tally
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.periods import HOUR, UNITS, Calendar, Unit
from api_gateway.limits.quota_state import MICROSECONDS, NEVER_US, UNITS_PER_TOKEN, PeriodQuota, QuotaWarning

DAY = 24 * HOUR


def instant(text: str) -> int:
    """Return an instant in microseconds."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * MICROSECONDS


NOW = instant("2027-01-31 12:00:00")


def monthly(tokens: int = 10, unit: Unit = "month", zone: str = "UTC", **more: Any) -> PeriodQuota:
    """Return a quota."""
    return PeriodQuota.of("monthly", tokens, Calendar(unit, ZoneInfo(zone)), **more)


units_of = monthly().cost_ns


class Client:
    """A client of one quota, whose requests cost whole tokens by default."""

    def __init__(self, quota: PeriodQuota, now_us: int = NOW, key: str = "a") -> None:
        self.quota, self.now_us, self.key = quota, now_us, key
        self.counters = PeriodCounters(1000)
        self.warned: list[QuotaWarning] = []

    def spend(self, tokens: float = 1) -> bool:
        """Make a request; return whether it is admitted."""
        cost = units_of(tokens)
        standing = self.counters.standing(self.key, self.quota, self.now_us)
        if standing.wait_us(cost, self.now_us):
            return False
        self.warned += self.counters.charge(standing, cost, self.now_us)
        return True

    def spend_all(self) -> int:
        """Make requests until one is refused; return how many were admitted."""
        admitted = 0
        while self.spend():
            admitted += 1
        return admitted

    def wait(self, tokens: float = 1) -> float:
        """Return the wait in seconds."""
        standing = self.counters.standing(self.key, self.quota, self.now_us)
        return standing.wait_us(units_of(tokens), self.now_us) / MICROSECONDS

    @property
    def left(self) -> float:
        """The tokens that are left."""
        return self.counters.standing(self.key, self.quota, self.now_us).left / UNITS_PER_TOKEN

    @property
    def start(self) -> int:
        """The start of the period that is charged."""
        return self.counters.standing(self.key, self.quota, self.now_us).count.start

    def at(self, text: str) -> "Client":
        """Set the clock."""
        self.now_us = instant(text)
        return self

    def settle(self, change: float, start: int | None = None) -> None:
        """Correct the cost of a request."""
        units = units_of(abs(change)) * (1 if change > 0 else -1)
        started = self.start if start is None else start
        self.warned += self.counters.settle(self.key, self.quota, units, started, self.now_us)


def test_a_client_has_the_allowance_in_each_period_and_the_wait_is_exact() -> None:
    client = Client(monthly(10))
    assert client.spend_all() == 10
    assert client.wait() == 12 * HOUR  # 31 January, noon
    client.now_us += 12 * HOUR * MICROSECONDS - 1
    assert not client.spend()
    client.now_us += 1
    assert client.spend_all() == 10
    assert client.wait() == 28 * DAY


def test_the_allowance_of_a_leap_year_february_lasts_29_days() -> None:
    client = Client(monthly(1)).at("2028-02-01 00:00:00")
    assert client.spend_all() == 1
    assert client.wait() == 29 * DAY


@pytest.mark.parametrize(("day", "hours"), [("2027-03-28 00:00:00", 22), ("2027-10-31 00:00:00", 23)])
def test_a_day_with_a_change_of_clocks_has_one_allowance(day: str, hours: int) -> None:
    client = Client(monthly(5, "day", "Europe/Berlin")).at(day)  # 1:00 or 2:00 in Berlin
    assert client.spend_all() == 5
    assert client.wait() == hours * HOUR
    client.now_us += (hours * HOUR - 1) * MICROSECONDS
    assert client.spend_all() == 0


def test_fractions_of_tokens_are_counted_in_thousandths_rounded_up() -> None:
    client = Client(monthly(1))
    assert [client.spend(0.3) for _ in range(4)] == [True, True, True, False]
    assert client.spend(0.1)
    assert [units_of(cost) for cost in (0.0001, 0.1, 1e12)] == [1, 100, 10**15]


def test_a_cost_above_the_allowance_is_never_allowed_and_a_cost_of_zero_always() -> None:
    client = Client(monthly(10))
    assert client.wait(11) * MICROSECONDS == NEVER_US
    assert client.spend_all() == 10
    assert client.wait(0) == 0
    assert client.spend(0)
    assert client.wait(11) * MICROSECONDS == NEVER_US


def test_periods_from_the_start_begin_with_the_first_request() -> None:
    client = Client(monthly(10, is_from_start=True))
    assert client.spend_all() == 10
    assert client.wait() == 28 * DAY  # 31 January to 28 February, noon
    client.at("2027-02-28 12:00:00")
    assert client.spend_all() == 10
    client.at("2027-03-31 11:59:59")
    assert client.spend_all() == 0
    client.now_us += MICROSECONDS
    assert client.spend_all() == 10


# Clocks that step


def test_a_step_back_into_the_period_before_gives_no_second_allowance() -> None:
    client = Client(monthly(10)).at("2027-01-31 23:59:59")
    assert client.spend_all() == 10
    assert client.at("2027-02-01 00:00:01").spend_all() == 10
    for _ in range(3):
        assert client.at("2027-01-31 23:59:59").spend_all() == 0
        assert client.at("2027-02-01 00:00:01").spend_all() == 0


def test_a_step_back_returns_to_the_count_of_that_period() -> None:
    client = Client(monthly(10)).at("2027-01-31 23:59:59")
    assert [client.spend() for _ in range(4)] == [True] * 4
    assert client.at("2027-02-01 00:00:01").spend()
    assert client.at("2027-01-31 23:59:59").spend_all() == 6
    assert client.at("2027-02-01 00:00:01").spend_all() == 9


def test_a_step_back_beyond_the_counts_that_are_kept_gives_nothing() -> None:
    client = Client(monthly(10)).at("2027-05-10 00:00:00")
    assert client.spend_all() == 10
    assert client.at("2026-01-01 00:00:00").spend_all() == 0  # charged to May, the only count
    assert client.wait() == (instant("2027-06-01 00:00:00") - client.now_us) / MICROSECONDS
    assert client.at("2027-06-10 00:00:00").spend_all() == 10
    assert client.at("2026-01-01 00:00:00").spend_all() == 0  # charged to May, the earlier of two
    assert client.at("2027-06-10 00:00:00").spend_all() == 0
    assert client.at("2027-07-01 00:00:00").spend_all() == 10


def test_a_step_forward_and_back_loses_no_allowance() -> None:
    """The clock shows a later month for a while; afterwards each month has what was left of it."""
    client = Client(monthly(10)).at("2027-01-10 00:00:00")
    assert [client.spend() for _ in range(3)] == [True] * 3
    assert client.at("2027-04-01 00:00:00").spend()
    assert client.at("2027-01-10 00:00:01").spend_all() == 7
    for month in ("02", "03"):
        assert client.at(f"2027-{month}-10 00:00:00").spend_all() == 10
    assert client.at("2027-04-10 00:00:00").spend_all() == 9  # one was used before
    assert client.at("2027-05-10 00:00:00").spend_all() == 10


def test_the_wait_skips_a_later_period_that_is_used_up_already() -> None:
    client = Client(monthly(10)).at("2027-01-10 00:00:00")
    assert client.spend_all() == 10
    assert client.at("2027-02-10 00:00:00").spend_all() == 10
    client.at("2027-01-31 00:00:00")
    assert client.wait() == DAY + 28 * DAY
    client.now_us += int(client.wait()) * MICROSECONDS
    assert client.spend()


@given(
    tokens=st.integers(1, 5),
    unit=st.sampled_from(("hour", "day", "week", "month")),
    zone=st.sampled_from(("UTC", "Europe/Berlin", "Australia/Lord_Howe")),
    moves=st.lists(st.tuples(st.sampled_from((HOUR // 2, HOUR, 7 * HOUR, DAY, 8 * DAY, 40 * DAY)), st.integers(1, 9))),
)
@settings(deadline=None)
def test_a_clock_that_only_advances_admits_exactly_what_a_plain_model_does(
    tokens: int, unit: Unit, zone: str, moves: list[tuple[int, int]]
) -> None:
    """The model: one number for each period."""
    quota = monthly(tokens, unit, zone)
    client, used = Client(quota, instant("2027-03-20 00:00:00")), Tally[int]()
    for seconds, requests in moves:
        client.now_us += seconds * MICROSECONDS
        start = Calendar(unit, ZoneInfo(zone)).at(client.now_us // MICROSECONDS).start
        for cost in range(requests):
            expected = used[start] + cost <= tokens
            assert client.spend(cost) == (expected or not cost)
            used[start] += cost if expected else 0


@given(
    seed=st.integers(0, 2**32),
    steps=st.lists(st.integers(-90 * DAY, 90 * DAY), max_size=40),
)
@settings(deadline=None)
def test_whatever_the_clock_does_no_count_exceeds_the_allowance(seed: int, steps: list[int]) -> None:
    """Nor are there more counts than periods that the clock has shown."""
    source = random.Random(seed)
    unit = source.choice(UNITS)
    quota = monthly(4, unit, is_from_start=source.random() < 0.5)
    client = Client(quota)
    used, shown = Tally[int](), set[int]()
    for step in steps:
        client.now_us += step * source.choice((0, 1, MICROSECONDS, MICROSECONDS))
        for _ in range(source.randrange(6)):
            counter, now = client.counters.counters.get("a"), client.now_us // MICROSECONDS
            shown.add(quota.period(now if counter is None else counter.began, now).start)
            charged, wait = client.start, client.wait()
            if client.spend():
                used[charged] += 1
            else:
                assert wait > 0
    assert all(count <= 4 for count in used.values())
    assert len(used) <= len(shown)


# Settlement


def test_a_settlement_corrects_the_count_of_the_period_that_was_charged() -> None:
    client = Client(monthly(10)).at("2027-01-31 23:59:59")
    assert client.spend(8)
    charged = client.start
    client.settle(-5)
    assert client.left == 7
    client.at("2027-02-01 00:00:00")
    assert client.spend(10)
    client.settle(-3, charged)  # of a request of January
    assert client.left == 0
    assert client.at("2027-01-31 23:59:59").left == 10  # 8 - 5 - 3 were used
    client.settle(4, charged)
    assert client.left == 6


def test_a_refund_never_makes_an_allowance_larger() -> None:
    client = Client(monthly(10))
    assert client.spend(2)
    client.settle(-100)
    assert client.left == 10
    client.at("2027-04-01 00:00:00")
    assert client.spend(10)
    client.settle(-10, start=0)  # a period that is no longer known
    assert client.left == 0


def test_a_charge_afterwards_may_exceed_the_allowance_by_a_second_one() -> None:
    client = Client(monthly(10))
    assert client.spend(10)
    client.settle(7)
    assert client.left == -7
    client.settle(70)
    assert client.left == -10
    assert client.wait() == 12 * HOUR
    assert client.at("2027-02-01 00:00:00").left == 10  # debt ends with its period


# Top-ups and carry-over


def test_a_top_up_is_used_after_the_allowance_and_across_periods() -> None:
    client = Client(monthly(10))
    client.counters.top_up("a", client.quota, units_of(15), instant("2027-03-15 00:00:00") // MICROSECONDS, NOW)
    assert client.left == 25
    assert client.spend_all() == 25
    assert client.at("2027-02-01 00:00:00").spend_all() == 10
    client.counters.top_up("a", client.quota, units_of(5), 0, client.now_us)
    assert client.left == 0  # of no use: it has ended already


def test_what_is_left_of_a_top_up_is_kept_until_it_ends() -> None:
    client = Client(monthly(10))
    end = instant("2027-03-15 00:00:00") // MICROSECONDS
    client.counters.top_up("a", client.quota, units_of(15), end, NOW)
    assert client.spend(12)  # 10 of the allowance
    assert client.at("2027-02-01 00:00:00").left == 23
    client.counters.top_up("a", client.quota, units_of(2), end - DAY, client.now_us)  # the later end applies
    assert client.left == 25
    assert client.at("2027-03-14 23:59:59").left == 25
    assert client.at("2027-03-15 00:00:00").left == 10


def test_a_settlement_draws_nothing_from_a_top_up_that_has_expired() -> None:
    client = Client(monthly(10))
    client.counters.top_up("a", client.quota, units_of(5), NOW // MICROSECONDS + 10, NOW)
    assert client.spend(10)
    client.now_us += 10 * MICROSECONDS
    client.settle(3)
    count = client.counters.counters["a"].count
    assert (count.used, count.drawn) == (13 * UNITS_PER_TOKEN, 0)


def test_a_refund_returns_what_was_drawn_from_a_top_up_first() -> None:
    client = Client(monthly(10))
    client.counters.top_up("a", client.quota, units_of(5), instant("2027-03-15 00:00:00") // MICROSECONDS, NOW)
    assert client.spend(13)
    client.settle(-4)
    counter = client.counters.counters["a"]
    assert (counter.balance, counter.count.used) == (5000, 9000)
    assert client.left == 6


def test_what_is_left_is_carried_over_once_and_up_to_a_limit() -> None:
    client = Client(monthly(10, carry_over=4))
    assert client.spend(7)
    assert client.at("2027-02-10 00:00:00").left == 13
    assert client.spend(1)
    assert client.at("2027-03-10 00:00:00").left == 14  # 12 are left, of which 4 are carried over
    assert client.spend_all() == 14
    assert client.at("2027-04-10 00:00:00").left == 10
    assert client.spend_all() == 10
    assert client.at("2027-06-10 00:00:00").left == 14  # May was not used at all
    assert client.at("2027-08-10 00:00:00").left == 10  # after two months, it is a new client


def test_a_new_client_has_nothing_carried_over() -> None:
    assert Client(monthly(10, carry_over=4)).left == 10


def test_what_is_carried_over_can_be_set() -> None:
    client = Client(monthly(10))
    client.counters.carry("a", client.quota, units_of(3), NOW)
    assert client.spend_all() == 13
    assert client.at("2027-02-10 00:00:00").left == 10


def test_a_reset_gives_the_allowance_again() -> None:
    client = Client(monthly(10))
    assert client.spend_all() == 10
    client.counters.reset("a", client.quota, NOW)
    assert client.spend_all() == 10


# Warnings


def test_each_share_is_reported_once_in_a_period() -> None:
    client = Client(monthly(100, warn_at=(0.8, 0.95)))
    assert client.spend(79)
    assert not client.warned
    assert client.spend(1)
    assert [(one.share, one.used, one.allowance) for one in client.warned] == [(0.8, 80_000, 100_000)]
    client.settle(-40)
    assert client.spend(45)
    assert len(client.warned) == 1  # reached a second time
    assert client.spend(15)
    assert [one.share for one in client.warned] == [0.8, 0.95]
    client.at("2027-02-01 00:00:00").warned.clear()
    assert client.spend(100)
    assert [one.share for one in client.warned] == [0.8, 0.95]
    assert client.warned[0].period == (1801440000, 1803859200, 1798761600)


def test_a_settlement_can_reach_a_share() -> None:
    client = Client(monthly(100, warn_at=(1.0,)))
    assert client.spend(1)
    client.settle(150)
    assert [(one.share, one.used) for one in client.warned] == [(1.0, 151_000)]


@given(
    seed=st.integers(0, 2**32),
    unit=st.sampled_from(UNITS),
    is_from_start=st.booleans(),
    carry_over=st.sampled_from((0, 3)),
    steps=st.lists(st.integers(-40 * DAY, 40 * DAY), min_size=1, max_size=25),
)
@settings(deadline=None)
def test_a_refused_client_is_admitted_after_exactly_its_wait_whatever_the_clock_did(
    seed: int,
    unit: Unit,
    is_from_start: bool,  # noqa: FBT001 - drawn
    carry_over: int,
    steps: list[int],
) -> None:
    """Also after steps back, into periods that were used up before or not; a microsecond earlier it is refused."""
    source = random.Random(seed)
    client = Client(monthly(4, unit, "Europe/Berlin", is_from_start=is_from_start, carry_over=carry_over))
    refusals = 0
    for step in steps:
        client.now_us += step * MICROSECONDS + source.randrange(MICROSECONDS)
        cost = source.choice((1, 2, 0.5, 4))
        while client.spend(cost):
            pass
        refusals += 1
        standing = client.counters.standing(client.key, client.quota, client.now_us)
        wait_us, at = standing.wait_us(units_of(cost), client.now_us), client.now_us

        def would_wait(now_us: int, cost: float = cost) -> int:
            return client.counters.standing(client.key, client.quota, now_us).wait_us(units_of(cost), now_us)

        assert wait_us > 0
        assert would_wait(at + wait_us) == 0
        assert would_wait(at + wait_us - 1) == 1
        assert would_wait(at + wait_us // 2) == wait_us - wait_us // 2
    assert refusals == len(steps)


def test_the_wait_after_a_step_back_is_until_the_first_period_that_is_not_used_up() -> None:
    client = Client(monthly(2, "day")).at("2027-03-10 06:00:00")
    assert client.spend_all() == 2
    client.at("2027-03-11 06:00:00")
    assert client.spend_all() == 2
    client.at("2027-03-10 18:00:00")  # the clock steps back by half a day: both days are used up
    assert client.wait() == 30 * HOUR
    client.at("2027-03-08 18:00:00")  # and further: the earlier of both counts is charged
    assert client.wait() == 3 * DAY + 6 * HOUR
    client.now_us += round(client.wait()) * MICROSECONDS
    assert client.spend_all() == 2


# Bounds


def test_counters_that_have_ended_make_room_and_further_keys_share_counters() -> None:
    quota, counters = monthly(1, "day"), PeriodCounters(10)
    for number in range(10):
        charged(counters, f"a{number}", quota, NOW)
    assert len(counters) == 10
    admitted = sum(charged(counters, f"b{number}", quota, NOW) for number in range(20_000))
    assert len(counters) == 10
    assert admitted <= 4096  # shared counters, of one token each
    assert counters.overflowed == admitted
    later = NOW + 100 * DAY * MICROSECONDS
    for number in range(10):
        assert charged(counters, f"c{number}", quota, later)
    assert set(counters.counters) == {f"c{number}" for number in range(10)}


def charged(
    counters: PeriodCounters, key: str, quota: PeriodQuota, now_us: int, *, is_unverified: bool = False
) -> bool:
    """Make a request; return whether it is admitted."""
    standing = counters.standing(key, quota, now_us, is_unverified=is_unverified)
    if standing.wait_us(UNITS_PER_TOKEN, now_us):
        return False
    counters.charge(standing, UNITS_PER_TOKEN, now_us)
    return True


@pytest.mark.parametrize("is_before", [True, False])
def test_invented_keys_take_no_room_and_no_allowance_from_verified_ones(is_before: bool) -> None:  # noqa: FBT001
    quota, counters = monthly(2), PeriodCounters(50)
    invented = [f"invented {number}" for number in range(20_000)]

    def attack() -> None:
        for key in invented:
            charged(counters, key, quota, NOW, is_unverified=True)

    if is_before:
        attack()
    for number in range(50):
        assert [charged(counters, f"known {number}", quota, NOW) for _ in range(3)] == [True, True, False]
    attack()
    assert len(counters) == 100
    assert counters.unverified == 50
    for number in range(50):
        assert not charged(counters, f"known {number}", quota, NOW)
        assert counters.standing(f"known {number}", quota, NOW).left == 0
    spent = [charged(counters, invented[-1], quota, NOW, is_unverified=True) for _ in range(2)]
    assert not spent[-1], "their shared counters are used up, or hold this key alone, which has used two tokens"
    # Verified keys above the limit share counters, but none with invented keys.
    more = [charged(counters, f"further {number}", quota, NOW) for number in range(100)]
    assert sum(more) > 90
    assert len(counters) == 100
    # What was used up stays so when the period ends, and ended counters of both kinds make room.
    later = NOW + 200 * DAY * MICROSECONDS
    for number in range(60):
        assert charged(counters, f"new {number}", quota, later)
        charged(counters, f"new invented {number}", quota, later, is_unverified=True)
    assert (len(counters), counters.unverified) == (100, 50)


def test_a_settlement_of_an_invented_key_takes_no_room_either() -> None:
    quota, counters = monthly(2), PeriodCounters(10)
    for number in range(1000):
        counters.settle(f"invented {number}", quota, UNITS_PER_TOKEN, 0, NOW, is_unverified=True)
    assert (len(counters), counters.unverified) == (10, 10)
    assert all(charged(counters, f"known {number}", quota, NOW) for number in range(10))
    assert (len(counters), counters.unverified) == (20, 10)


def test_a_client_that_is_registered_later_keeps_its_count_and_moves_to_the_room_of_verified_keys() -> None:
    quota, counters = monthly(2, "day"), PeriodCounters(1)
    assert charged(counters, "a", quota, NOW, is_unverified=True)
    assert [charged(counters, "a", quota, NOW) for _ in range(2)] == [True, False]
    assert counters.unverified == 0
    assert charged(counters, "b", quota, NOW, is_unverified=True)
    assert (len(counters), counters.overflowed) == (2, 0)
    assert charged(counters, "b", quota, NOW)  # there is no room for another verified one: it stays
    assert (len(counters), counters.unverified, counters.overflowed) == (2, 1, 0)


def test_only_what_was_changed_is_to_be_stored() -> None:
    client = Client(monthly(2))
    client.counters.standing("b", client.quota, NOW)
    assert client.spend_all() == 2
    assert [key for key, _ in client.counters.take_changed()] == ["a"]
    assert client.counters.take_changed() == []
    assert not client.spend()
    assert client.counters.take_changed() == []  # refusals change nothing
    assert repr(client.counters) == "<PeriodCounters [1 verified and 0 other keys, each of 1000, 0 overflowed]>"
