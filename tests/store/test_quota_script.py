"""Calendar quotas in a shared store: the real script decides as the counters in memory do, on a virtual clock."""

import asyncio
import random
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api_gateway.errors import ChangeUnconfirmed
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.periods import HOUR, UNITS, Calendar, Unit
from api_gateway.limits.quota_book import StoreBook
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.quota_ops import CounterOp
from api_gateway.limits.quota_state import MICROSECONDS, Adjustment, PeriodQuota, QuotaCounter, QuotaWarning, is_past
from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter
from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from api_gateway.rate_limiter import NEVER_NS, MemoryLimiter
from tests.cases import each
from tests.lua_store import LuaLimiter, LuaStore

FREE = Quota.per_second("FREE", 1, 10)
FREE_OF_COST = Quota.per_second("ANY", 1, 1)
ROOMY = Quota.per_second("ROOMY", 1000, 100_000)
DAY = 24 * HOUR


def instant(text: str) -> int:
    """Return an instant in microseconds."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * MICROSECONDS


NOW = instant("2027-01-31 12:00:00")


def quota(tokens: int, unit: Unit = "month", zone: str = "UTC", **more: Any) -> PeriodQuota:
    """Return a calendar quota."""
    return PeriodQuota.of(unit, tokens, Calendar(unit, ZoneInfo(zone)), **more)


class Machine:
    """A gateway with the store, whose clock is ahead of the store's by `skew` seconds."""

    def __init__(
        self, store: LuaStore, quotas: Sequence[Quota], skew: float = 0.0, processes: int = 1, **more: Any
    ) -> None:
        self.store, self.quotas, self.skew = store, quotas, skew
        self.warned: list[QuotaWarning] = []
        buckets = [one for one in quotas if not isinstance(one, PeriodQuota)]
        self.buckets = LuaLimiter(store, buckets, processes=processes, **more)
        self.buckets.refunds.name = f"{id(self):x}"
        self.limiter = StoreQuotaLimiter(
            self.buckets,
            prefix="test",
            wall_clock=lambda: store.now_us / MICROSECONDS + skew,
            on_warned=self.warned.extend,
        )

    @property
    def now_ns(self) -> int:
        """The clock of the buckets."""
        return self.store.now_us * 1000

    def charges(self, cost: float = 1, key: str = "a") -> list[Charge]:
        """Return the charges of a request."""
        return [
            Charge(f"{one.name}:{key}", one, 0 if one is FREE_OF_COST else one.cost_ns(cost)) for one in self.quotas
        ]

    def decide(self, cost: float = 1, key: str = "a") -> Decision:
        """Make a request."""
        heard: list[Decision] = []
        charges = self.charges(cost, key)
        decision = self.limiter.decide(charges, self.now_ns)
        if decision is not None:
            return decision
        self.limiter.decide_async(charges, self.now_ns, heard.append)
        assert len(heard) == 1
        return heard[0]

    def spend_all(self, key: str = "a") -> int:
        """Make requests until one is refused; return how many were admitted."""
        admitted = 0
        while self.decide(key=key).allowed:
            admitted += 1
        return admitted

    def settle(self, decision: Decision, before: float, after: float, key: str = "a") -> Decision:
        """Correct the cost of a request."""
        changes = [Charge(f"{one.name}:{key}", one, one.cost_ns(after) - one.cost_ns(before)) for one in self.quotas]
        return self.limiter.settle(changes, decision, self.now_ns, self.charges(after, key))

    async def counter(self, key: str = "a", adjustment: Any = None) -> QuotaCounter | None:
        """Return the counter of the first calendar quota."""
        period = next(one for one in self.quotas if isinstance(one, PeriodQuota))
        return (await self.limiter.counter(f"{period.name}:{key}", period, adjustment))[0]


def test_a_store_has_one_allowance_for_two_workers() -> None:
    store = LuaStore(NOW)
    first, second = (Machine(store, (ROOMY, quota(10))) for _ in range(2))
    admitted = [machine.decide().allowed for _ in range(8) for machine in (first, second)]
    assert admitted == [True] * 10 + [False] * 6
    refused = second.decide()
    assert refused.wait_ns == 12 * HOUR * NANOSECONDS
    store.now_us += 12 * HOUR * MICROSECONDS - 1
    assert not first.decide().allowed
    store.now_us += 1
    assert first.spend_all() == 10
    assert not second.decide().allowed


@each("skew", [-40 * DAY, -3700.5, -1.0, -0.3, 0.3, 1.0, 3700.5, 40 * DAY])
@each("is_from_start", [False, True])
def test_machines_whose_clocks_differ_share_the_period_of_the_store(skew: float, is_from_start: bool) -> None:  # noqa: FBT001
    store = LuaStore(NOW - MICROSECONDS // 2)
    period = quota(10, "hour", is_from_start=is_from_start)
    right, wrong = Machine(store, (ROOMY, period)), Machine(store, (ROOMY, period), skew)
    for _ in range(3):  # three hours
        assert [machine.decide().allowed for _ in range(6) for machine in (wrong, right)] == [True] * 10 + [False] * 2
        left_ns = wrong.decide().wait_ns
        assert left_ns == right.decide().wait_ns
        assert 0 < left_ns <= HOUR * NANOSECONDS
        store.now_us += left_ns // 1000


async def test_a_refused_request_charges_neither_bucket_nor_counter() -> None:
    store = LuaStore(NOW)
    machine = Machine(store, (FREE, quota(12)))
    assert machine.spend_all() == 10
    counter = await machine.counter()
    assert counter is not None
    assert counter.count.used == 10_000
    store.now_us += 5 * MICROSECONDS
    assert machine.spend_all() == 2
    assert (await machine.limiter.inspect(machine.charges(0), machine.now_ns))[0].remaining == 3


async def test_a_quota_in_debt_admits_and_charges_a_request_that_costs_it_nothing() -> None:
    """As the counters in memory do; the other limits are charged."""
    machine = Machine(LuaStore(NOW), (ROOMY, quota(10)))
    machine.settle(machine.decide(), 1, 15)
    assert not machine.decide().allowed
    of_bucket, of_counter = machine.charges(1)
    heard: list[Decision] = []
    machine.limiter.decide_async(
        [of_bucket, Charge(of_counter.key, of_counter.quota, 0)], machine.now_ns, heard.append
    )
    assert [decision.allowed for decision in heard] == [True]
    assert (await machine.limiter.inspect(machine.charges(0), machine.now_ns))[0].remaining == 100_000 - 15 - 1


def test_the_stores_clock_may_step_and_gives_no_second_allowance() -> None:
    store = LuaStore(instant("2027-02-10 00:00:00"))
    machine = Machine(store, (ROOMY, quota(10)))
    assert machine.spend_all() == 10
    for step in ("2027-01-10 00:00:00", "2026-11-01 00:00:00", "2027-02-20 00:00:00"):
        store.now_us = instant(step)
        assert machine.spend_all() == 0
    store.now_us = instant("2027-03-01 00:00:00")
    assert machine.spend_all() == 10


def test_a_share_is_reported_once_by_all_workers_together() -> None:
    store = LuaStore(NOW)
    first, second = (Machine(store, (ROOMY, quota(10, warn_at=(0.5, 0.9)))) for _ in range(2))
    for _ in range(5):
        assert first.decide().allowed
        decision = second.decide()
    assert [one.share for one in (*first.warned, *second.warned)] == [0.5, 0.9]
    assert [notice.share for notice in decision.notices] == [0.9]


async def test_top_ups_carry_over_and_resets_are_stored() -> None:
    store = LuaStore(NOW)
    machine, other = (Machine(store, (ROOMY, quota(10))) for _ in range(2))
    assert machine.spend_all() == 10
    end = NOW // MICROSECONDS + 2 * DAY
    counter = await other.counter(adjustment=Adjustment(5000, end))
    assert counter is not None
    assert (counter.balance, counter.until) == (5000, end)
    assert machine.spend_all() == 5
    await other.counter(adjustment=Adjustment(carried=3000))
    assert machine.spend_all() == 3
    await other.counter(adjustment=Adjustment(is_reset=1))
    assert machine.spend_all() == 13
    assert await other.counter("nobody") is None


def test_a_corrupt_counter_is_a_new_one() -> None:
    store = LuaStore(NOW)
    machine = Machine(store, (ROOMY, quota(3)))
    assert machine.spend_all() == 3
    (key,) = [key for key in store.values if ":quota:" in key]
    for wrong in ("", "garbage", "1 2 3", "1 " * 16):
        store.values[key] = (wrong, store.values[key][1])
        assert machine.spend_all() == 3


def test_keys_expire_when_they_have_no_effect_and_not_earlier() -> None:
    store = LuaStore(NOW)
    machine = Machine(store, (quota(3, "day"), ROOMY))
    assert machine.spend_all() == 3
    (key,) = [key for key in store.values if ":quota:" in key]
    assert store.values[key][1] == (NOW // MICROSECONDS + DAY // 2 + 3 * DAY) * 1000 + 999


# Without the store


def test_without_the_store_each_process_admits_its_share_of_what_was_left_and_charges_it_afterwards() -> None:
    store = LuaStore(NOW)
    machines = [Machine(store, (ROOMY, quota(100)), processes=2) for _ in range(2)]
    for machine in machines:
        assert machine.decide(10).allowed
    for machine in machines:  # the first read 90, the second 80
        machine.buckets.wire.is_up = False
    assert [machine.spend_all() for machine in machines] == [45, 40]
    assert machines[0].decide().source == "local_share"
    for machine in machines:
        machine.buckets.wire.is_up = True
        machine.decide(0)
    assert machines[0].spend_all() == 0  # 20 + 45 + 40 is more than 100


def test_what_was_reported_without_a_reply_counts_against_the_share() -> None:
    """As while the store is paused and asked from time to time: each question has the report, and no reply comes.

    No reply tells whether it was charged. So it counts until the period ends, and is then forgotten.
    """
    machine = Machine(LuaStore(NOW), (ROOMY, quota(100)), processes=2)
    wire = machine.buckets.wire
    assert machine.decide(10).allowed
    admitted = 0
    for _ in range(5):
        wire.is_up, wire.is_slow = False, False
        admitted += machine.spend_all()
        wire.is_up = wire.is_slow = True
        heard: list[Decision] = []
        machine.limiter.decide_async(machine.charges(), machine.now_ns, heard.append)
        wire.execute()  # later than the deadline
        wire.lose()
        assert [one.allowed for one in heard] == [False]
    assert admitted == 45
    wire.is_slow = False
    assert machine.decide(0).allowed
    assert machine.spend_all() == 100 - 10 - 45 - 5, "the report was charged once, and the five questions, too"
    assert len(machine.limiter.owed) == 1
    machine.store.now_us += DAY * MICROSECONDS
    assert machine.decide().allowed
    assert machine.limiter.owed == {}


def tell_all(*machines: Machine) -> None:
    """Have all machines hear of what was published."""
    store = machines[0].store
    for _, message in store.told:
        for machine in machines:
            machine.buckets._on_refund(message)
    store.told.clear()


async def test_a_reset_ends_what_processes_admitted_without_the_store() -> None:
    """What they have still to report is not charged, and what may have been charged counts against no share."""
    store = LuaStore(NOW)
    one, two, other = machines = [Machine(store, (ROOMY, quota(90)), processes=3) for _ in range(3)]
    for machine in machines:
        assert machine.decide(0).allowed
        machine.buckets.wire.is_up = False
        assert machine.spend_all() == 30
    other.buckets.wire.is_up = one.buckets.wire.is_up = two.buckets.wire.is_up = True
    wire = one.buckets.wire
    wire.is_slow = True
    one.limiter.decide_async(one.charges(), one.now_ns, lambda _: None)
    wire.lose_replies()  # with the report: it is not known whether it was executed
    wire.is_slow = False
    standing, _ = await StoreBook(other.limiter).adjust("month:a", quota(90), Adjustment(is_reset=1))
    assert standing.count.used == 0
    tell_all(*machines)
    assert [machine.limiter.owed for machine in machines] == [{}, {}, {}]
    for machine in machines:
        assert machine.decide(0).allowed
    for machine in machines:
        machine.buckets.wire.is_up = False
    assert [machine.spend_all() for machine in machines] == [30, 30, 30], "of the whole quota"
    for machine in machines:
        machine.buckets.wire.is_up = True
        machine.decide(0)
    assert await used(one) == 90


async def test_a_change_whose_reply_is_lost_may_have_been_made_and_says_so() -> None:
    machine = Machine(LuaStore(NOW), (ROOMY, quota(90)))
    wire = machine.buckets.wire
    wire.is_slow = True
    change = asyncio.create_task(machine.counter(adjustment=Adjustment(carried=3000)))
    await asyncio.sleep(0)
    wire.lose_replies()
    with pytest.raises(ChangeUnconfirmed, match="may or may not have been made: no response from the store"):
        await change
    wire.is_slow = False
    counter = await machine.counter()
    assert counter is not None
    assert counter.count.carried == 3000


async def test_a_reset_that_a_process_does_not_hear_of_leaves_what_it_admitted_to_be_charged() -> None:
    store = LuaStore(NOW)
    one, two = (Machine(store, (ROOMY, quota(90)), processes=3) for _ in range(2))
    assert two.decide(0).allowed
    two.buckets.wire.is_up = False
    assert two.spend_all() == 30
    await StoreBook(one.limiter).adjust("month:a", quota(90), Adjustment(is_reset=1))
    store.told.clear()
    two.buckets.wire.is_up = True
    two.decide(0)
    assert await used(one) == 30


async def test_after_a_reset_a_late_reply_to_an_earlier_request_changes_nothing() -> None:
    store = LuaStore(NOW)
    one, other = machines = [Machine(store, (ROOMY, quota(90)), processes=3) for _ in range(2)]
    assert one.decide(0).allowed
    wire = one.buckets.wire
    wire.is_slow = True
    heard: list[Decision] = []
    one.limiter.decide_async(one.charges(20), one.now_ns, heard.append)
    wire.execute()
    batch, (clock_us, *values) = wire.under_way[0]
    wire.lose()
    assert [one.source for one in heard] == ["local_share"]
    wire.is_slow = False
    await StoreBook(other.limiter).adjust("month:a", quota(90), Adjustment(is_reset=1))
    tell_all(*machines)
    wire.is_up = False
    assert one.spend_all() == 30
    for op in batch:
        op.read(clock_us, iter(values))
    assert one.limiter.owed["month:a"].amount == 30_000
    wire.is_up = True
    one.decide(0)
    assert await used(one) == 30


async def test_a_reading_that_already_has_the_reset_is_kept() -> None:
    store = LuaStore(NOW)
    one, other = machines = [Machine(store, (ROOMY, quota(90)), processes=3) for _ in range(2)]
    await StoreBook(other.limiter).adjust("month:a", quota(90), Adjustment(is_reset=1))
    assert one.decide(60).allowed
    tell_all(*machines)
    one.buckets.wire.is_up = False
    assert one.spend_all() == 10, "a third of what was left"


async def used(machine: Machine) -> int:
    """Return the tokens that the store holds as used."""
    counter = await machine.counter()
    return 0 if counter is None else counter.count.used // 1000


def test_a_settlement_without_the_store_corrects_what_is_charged_afterwards() -> None:
    store = LuaStore(NOW)
    machine = Machine(store, (ROOMY, quota(100)))
    machine.buckets.wire.is_up = False
    decision = machine.decide(50)
    machine.settle(decision, 50, 20)
    machine.buckets.wire.is_up = True
    assert machine.decide(0).allowed
    assert machine.spend_all() == 80


def test_a_bucket_that_is_known_to_refuse_does_not_hide_the_longer_wait_of_a_quota() -> None:
    store = LuaStore(NOW)
    slow = Quota.per_second("SLOW", 1, 2)
    machine = Machine(store, (slow, quota(2)), remembers=True)
    assert [machine.decide().allowed for _ in range(2)] == [True, True]
    for _ in range(2):
        refused = machine.decide()
        assert refused.wait_ns == 12 * HOUR * NANOSECONDS
        assert [one.name for one in refused.violated] == ["SLOW", "month"]
    other = Machine(store, (slow, quota(3)), remembers=True)
    assert [other.decide(key="b").allowed for _ in range(3)] == [True, True, False]
    assert other.decide(key="b").source == "deny_cache"


def test_without_the_store_the_wait_is_the_longest_of_quotas_and_buckets() -> None:
    store = LuaStore(NOW + HOUR // 2 * MICROSECONDS + (HOUR // 2 - 5) * MICROSECONDS)  # five seconds to the next hour
    slow = Quota.per_second("SLOW", 0.01, 2)
    machine = Machine(store, (slow, quota(2, "hour")))
    machine.buckets.wire.is_up = False
    assert [machine.decide().allowed for _ in range(2)] == [True, True]
    refused = machine.decide()
    assert (refused.key, refused.wait_ns) == ("SLOW:a", 100 * NANOSECONDS)
    assert [one.name for one in refused.violated] == ["hour", "SLOW"]
    store.now_us += 100 * MICROSECONDS
    assert machine.decide().allowed


def test_what_is_owed_to_an_unavailable_store_is_limited() -> None:
    machine = Machine(LuaStore(NOW), (ROOMY, quota(100)))
    machine.buckets.wire.is_up = False
    limit = machine.limiter.bucket_limit
    for number in range(limit + 50):
        machine.limiter.owe(f"invented {number}", 1000, 0, is_sent=False)
    assert len(machine.limiter.owed) == limit


def test_a_charge_from_before_a_change_of_the_period_does_not_begin_counts_in_the_store_anew() -> None:
    store = LuaStore(NOW)
    daily = PeriodQuota.of("q", 5, Calendar("day", ZoneInfo("UTC")))
    monthly = PeriodQuota.of("q", 3, Calendar("month", ZoneInfo("UTC")))
    before, after = Machine(store, (ROOMY, daily)), Machine(store, (ROOMY, monthly))
    earlier = before.decide()
    assert after.spend_all() == 3
    before.settle(earlier, 1, 2)
    before.settle(earlier, 1, 0)
    assert after.spend_all() == 0


# Against the counters in memory


@example(16503)  # the clock steps back to before the end of a counter that has expired
@given(seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_the_script_decides_as_the_counters_in_memory_do(seed: int) -> None:
    """Random requests, settlements, top-ups and steps of the clock; all decisions and counters are equal."""
    source = random.Random(seed)
    zone = source.choice(("UTC", "Europe/Berlin", "Australia/Lord_Howe"))
    period = quota(
        source.randint(1, 12),
        source.choice(UNITS),
        zone,
        is_from_start=source.random() < 0.5,
        carry_over=source.choice((0, 0, 3, 50)),
        warn_at=(0.5, 1.0),
    )
    store = LuaStore(NOW)
    machine = Machine(store, (FREE_OF_COST, period))
    warned: list[QuotaWarning] = []
    memory = QuotaLimiter(
        MemoryLimiter([FREE_OF_COST]),
        PeriodCounters(100),
        wall_clock=lambda: store.now_us / MICROSECONDS,
        on_warned=warned.extend,
    )
    pairs: list[tuple[Decision, Decision, float]] = []
    passed_ns = 0  # the clock of the buckets in memory does not step
    for _ in range(30):
        step = source.choice((0, 0, 1, HOUR // 2, HOUR, source.randrange(-3 * DAY, 9 * DAY), 33 * DAY))
        store.now_us += step * MICROSECONDS
        passed_ns += max(step, 0) * NANOSECONDS
        held = memory.counters.counters.get(f"{period.name}:a")
        if held is not None and is_past(held, store.now_us // MICROSECONDS):
            # As the store does, also if the clock steps back again. The process may have asked it nothing meanwhile.
            del memory.counters.counters[f"{period.name}:a"]
            machine.limiter.known.pop(f"{period.name}:a", None)
        kind = source.random()
        if kind < 0.6:
            cost = source.choice((0, 0.5, 1, 1, 2, 5, 30))
            ours, theirs = machine.decide(cost), memory.decide(machine.charges(cost), passed_ns)
            assert (ours.allowed, ours.wait_ns, ours.violated) == (theirs.allowed, theirs.wait_ns, theirs.violated)
            assert (ours.key, ours.remaining, ours.notices) == (theirs.key, theirs.remaining, theirs.notices)
            if ours.allowed:
                assert ours.debts_ns[1] == theirs.debts_ns[1]
                pairs.append((ours, theirs, cost))
        elif kind < 0.85 and pairs:
            ours, theirs, cost = pairs.pop(source.randrange(len(pairs)))
            after = cost + source.choice((-cost, -cost / 2, 1, 10))
            changes = [Charge(f"{one.name}:a", one, 0) for one in machine.quotas]
            changes[1].increment_ns = period.cost_ns(after) - period.cost_ns(cost)
            machine.limiter.settle(changes, ours, machine.now_ns, machine.charges(after))
            memory.settle(changes, theirs, passed_ns, machine.charges(after))
        elif kind < 0.95:
            amount, until = source.randrange(1, 9) * 1000, store.now_us // MICROSECONDS + source.randrange(40 * DAY)
            _adjust(machine, Adjustment(amount, until))
            memory.counters.top_up(f"{period.name}:a", period, amount, until, store.now_us)
        else:
            _adjust(machine, Adjustment(is_reset=1))
            memory.counters.reset(f"{period.name}:a", period, store.now_us)
        in_store, in_memory = _state(machine, period), _kept(memory.counters.counters.get(f"{period.name}:a"), store)
        assert in_store == in_memory, f"{in_store} {in_memory} after {kind}"
    assert [(one.share, one.period) for one in machine.warned] == [(one.share, one.period) for one in warned]


def _adjust(machine: Machine, adjustment: Adjustment) -> None:
    (period,) = [one for one in machine.quotas if isinstance(one, PeriodQuota)]
    machine.buckets.batcher.submit(
        CounterOp(machine.limiter, f"{period.name}:a", period, lambda _counter, _clock: None, adjustment)
    )


def _state(machine: Machine, period: PeriodQuota) -> tuple[int, ...] | None:
    """Return the counter in the store."""
    found = machine.store._get(machine.limiter.counter_key(f"{period.name}:a"))
    return None if found is None else _numbers(found)


def _numbers(value: str) -> tuple[int, ...]:
    """Return the integers of a counter in the store; resets are in letters, and left out if there are none."""
    *digits, last = value.split()
    if last.isdigit():
        return (*map(int, digits), int(last), 0)
    return (*map(int, digits), int("".join(str(ord(letter) - ord("a")) for letter in last)))


def _kept(counter: QuotaCounter | None, store: LuaStore) -> tuple[int, ...] | None:
    """Return a counter of memory in the format of the store."""
    if counter is None:
        return None
    before = counter.before
    count = counter.count
    fields = (
        *(UNITS.index(counter.unit), counter.began),
        *(count.start, count.used, count.carried, count.drawn, count.peak, counter.end),
        *(
            (-1, 0, 0, 0, 0)
            if before is None
            else (before.start, before.used, before.carried, before.drawn, before.peak)
        ),
        *(counter.balance, counter.until, counter.resets),
    )
    return None if is_past(counter, store.now_us // MICROSECONDS) else fields


def test_earlier_releases_and_this_one_read_the_counters_of_each_other() -> None:
    """An earlier release has fifteen integers, and takes all digits of a value for them; it drops the resets."""
    period = quota(10)
    machine = Machine(LuaStore(NOW), (ROOMY, period))
    key = machine.limiter.counter_key(f"{period.name}:a")
    value: str | None = ""
    for resets in range(1, 12):
        _adjust(machine, Adjustment(is_reset=1))
        value = machine.store._get(key)
        assert value
        assert len(re.findall(r"-?\d+", value)) == 15
        assert _numbers(value)[-1] == resets
    assert value
    assert value.endswith(" bb")
    until = NOW // MICROSECONDS + 3600
    machine.store.values[key] = (value.removesuffix(" bb"), machine.store.values[key][1])
    _adjust(machine, Adjustment(5000, until))
    assert _state(machine, period) == (*_numbers(value)[:13], 5000, until, 0)


def test_a_cost_above_the_allowance_is_never_allowed() -> None:
    machine = Machine(LuaStore(NOW), (ROOMY, quota(5)))
    assert machine.decide(6).wait_ns == NEVER_NS
    assert repr(machine.limiter).startswith("<StoreQuotaLimiter of <RedisLimiter [store,")
