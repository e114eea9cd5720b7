"""What holds for every limiter, on one exact model and a virtual clock: memory, and the store's real script.

The numbers are those of the reference, section 10. "Both" are the memory limiter, and the limiter that asks a store,
on the real text of its script.

 1 conformance          both     test_no_window_admits_more_than_capacity_and_rate_allow
 2 no false denial      both     TestMemory, TestShared; test_every_decision_is_that_of_an_exact_token_bucket
 3 exact wait           both     as 2; test_the_exact_wait_of_governor
 4 header wait          both     test_a_client_that_waits_retry_after_is_admitted; deny cache: 20
 5 free refusals        both     TestMemory, TestShared
 6 range                both     TestMemory, TestShared
 7 clock                both     TestMemory, TestShared; test_a_step_back_heals_within_a_token, test_ten_idle_years_...
 8 eviction             both     TestMemory, TestShared
 9 memory bound         memory   test_rate_limiter.py, "Bounded memory"
10 change of tier       both     TestMemory, TestShared; test_changing_tiers_back_and_forth_gains_nothing
11 batch                store    test_a_batch_decides_as_one_after_the_other_would
12 isolation            both     TestMemory, TestShared; test_a_key_draws_on_its_own_bucket_only
13 all or nothing       both     TestMemory, TestShared; test_several_buckets_are_charged_all_or_nothing
14 equality             both     all of these: one model, to the nanosecond
15 expiry               store    TestShared
16 at most once         servers  test_script_batcher.py, test_what_may_have_been_executed_is_not_sent_again; and
                                 test_redis_limiter.py, test_replies_lost_after_execution_charge_once
17 deadline             servers  test_no_request_waits_longer_than_the_deadline_whatever_the_store_does
18 cancellation storm   servers  test_requests_cancelled_at_random_mix_up_no_decisions
19 script loss          servers  test_a_store_that_forgets_its_scripts_decides_as_ever
20 deny cache           store    TestRemembering; test_a_refusal_from_memory_ends_...; and test_redis_limiter.py,
                                 test_a_refund_reaches_the_deny_caches_of_others
21 leases               store    there are none, so L = 0: test_many_gateways_admit_what_one_bucket_holds
22 without the store    store    test_limits_hold_for_every_schedule_of_outages, test_each_bound_is_reached
23 header grammar       -        test_ratelimit_headers.py, test_the_fields_are_structured_and_...
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.limits.refusal import refusal
from api_gateway.limits.script_batcher import CONNECTIONS, ScriptBatcher
from api_gateway.limits.script_ops import ChargeOp, RefundOp, SettleOp
from api_gateway.models import NANOSECONDS, Charge, Client, Decision, DecisionSource, Exchange, Quota
from api_gateway.rate_limiter import NEVER_NS, MemoryLimiter, debts_of
from api_gateway.settings.rules import MAX_BUDGET, MAX_FILL
from tests.cases import each
from tests.exact_buckets import ExactBuckets, assert_conforms
from tests.kit import PATIENCE, soon
from tests.lua_store import DEADLINE, MICROSECOND, LuaLimiter, LuaStore
from tests.store_kit import EPSILON, Lateness, Proxy, StoreServer, asking, gateways

SECOND = NANOSECONDS
MILLISECOND = SECOND // 1000
START = 1_795_000_000 * SECOND
TEN_YEARS = 10 * 365 * 86_400 * SECOND

FREE = Quota.per_second("FREE", 1, 10)
ENTERPRISE = Quota.per_second("ENTERPRISE", 100, 1000)  # as FREE, it fills in 10 s
SLOW = Quota.per_second("SLOW", 0.5, 30)  # fills in 60 s
THIRD = Quota.per_second("THIRD", 3, 7)  # whose emission interval is not a whole number of nanoseconds
QUOTAS = (FREE, ENTERPRISE, SLOW, THIRD)
LONGEST_LAG_NS = round(DEADLINE * SECOND)  # from asking to hearing the answer

Drawn = st.SearchStrategy
quotas: Drawn[Quota] = st.builds(
    Quota.per_second,
    st.just("drawn"),
    st.sampled_from((0.1, 0.5, 1, 3, 7, 100)) | st.floats(0.01, 5000),
    st.integers(1, 1000),
)
costs: Drawn[float] = st.sampled_from((0, 0.1, 0.5, 1, 1, 1, 2.5)) | st.integers(0, 1200)
TOLD_WAIT = None  # instead of a gap: as long as the last refusal said
gaps: Drawn[int | None] = st.sampled_from((TOLD_WAIT, 0, 1)) | st.integers(0, 2 * SECOND) | st.integers(0, 30 * SECOND)
patient = settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
thorough = settings(patient, max_examples=60)
quick = settings(patient, max_examples=30)


def charge(quota: Quota, cost: float = 1, key: str = "a") -> Charge:
    return Charge(key, quota, quota.cost_ns(cost))


# The two


class Backend(Protocol):
    """A limiter and what it is kept in. `tick_ns` is the finest time it knows."""

    source: DecisionSource
    tick_ns: int
    heals_when_looked_at: bool

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision: ...

    def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]: ...

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision: ...

    def refill(self, key: str) -> None: ...

    def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None: ...

    def forget_what_is_full(self, now_ns: int) -> None: ...

    def kept(self) -> dict[str, Any]:
        """Return what is kept of each bucket."""
        ...

    def trial(self) -> Any:
        """Return a context of which nothing remains."""
        ...


def at_once(waiting: Any) -> Any:
    """Run what need not wait for anything."""
    return asyncio.run(waiting)


T = TypeVar("T")


class Memory:
    source: DecisionSource = "memory"
    tick_ns = 1
    heals_when_looked_at = False

    def __init__(self, known: Sequence[Quota]) -> None:
        self.known = known
        self.limiter = MemoryLimiter(known)
        self.steps: list[Callable[[MemoryLimiter], Any]] = []

    def do(self, step: Callable[[MemoryLimiter], T]) -> T:
        """Do it, and remember it for `trial`."""
        self.steps.append(step)
        return step(self.limiter)

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        return self.do(lambda limiter: limiter.decide(charges, now_ns))

    def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        return cast("list[Decision]", at_once(self.limiter.inspect(charges, now_ns)))

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision:
        return self.do(lambda limiter: limiter.settle(charges, decision, now_ns))

    def refill(self, key: str) -> None:
        self.do(lambda limiter: at_once(limiter.refill(key)))

    def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        self.do(lambda limiter: at_once(limiter.move(key, old, new, now_ns)))

    def forget_what_is_full(self, now_ns: int) -> None:
        self.do(lambda limiter: limiter._advance(now_ns))

    def kept(self) -> dict[str, Any]:
        return {**self.limiter._table.previous, **self.limiter._table.current}

    @contextmanager
    def trial(self) -> Iterator["Memory"]:
        twin = Memory(self.known)
        for step in self.steps:
            twin.do(step)
        yield twin


class Shared:
    source: DecisionSource = "store"
    tick_ns = MICROSECOND
    heals_when_looked_at = True

    def __init__(self, known: Sequence[Quota]) -> None:
        self.store = LuaStore(START // MICROSECOND)
        self.limiter = LuaLimiter(self.store, known)
        self.names: dict[str, str] = {}

    def _set(self, charges: Sequence[Charge], now_ns: int) -> None:
        self.store.now_us = now_ns // MICROSECOND
        for one in charges:
            self.names[self.limiter.store_key(one.key)] = one.key

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        self._set(charges, now_ns)
        return self.limiter.decided(charges, now_ns)

    def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        self._set(charges, now_ns)
        return cast("list[Decision]", at_once(self.limiter.inspect(charges, now_ns)))

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision:
        self._set(charges, now_ns)
        return self.limiter.settle(charges, decision, now_ns)

    def refill(self, key: str) -> None:
        at_once(self.limiter.refill(key))

    def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        self._set([], now_ns)
        at_once(self.limiter.move(key, old, new, now_ns))

    def forget_what_is_full(self, now_ns: int) -> None:
        self._set([], now_ns)
        self.store.sweep()

    def kept(self) -> dict[str, Any]:
        return {self.names[name]: value for name, value in self.store.values.items()}

    @contextmanager
    def trial(self) -> Iterator["Shared"]:
        now_us, values = self.store.now_us, dict(self.store.values)
        yield self
        self.store.now_us, self.store.values = now_us, values


BACKENDS = {"memory": Memory, "the script": Shared}
both = pytest.mark.parametrize("make", BACKENDS.values(), ids=BACKENDS)
Make = type[Memory] | type[Shared]


def up_to(tick_ns: int, length_ns: int) -> int:
    """Return a length of time in whole ticks, rounded up."""
    return -(-length_ns // tick_ns) * tick_ns


def assert_the_wait_is_exact(backend: Backend, asked: Sequence[Charge], decision: Decision, now_ns: int) -> None:
    """At the end of the wait the same request passes, one tick earlier it does not."""
    wait_ns = up_to(backend.tick_ns, decision.wait_ns)
    with backend.trial() as twin:
        assert not twin.decide(asked, now_ns + wait_ns - backend.tick_ns).allowed
        assert twin.decide(asked, now_ns + wait_ns).allowed


# Everything that can happen to buckets


class Open(NamedTuple):
    """A charge that can still be settled; the first has the number 0."""

    number: int
    decision: Decision
    charges: list[Charge]
    refunds_before: int


class Refund(NamedTuple):
    """What a bucket was given back: when, of which charge, and what it came to."""

    key: str
    at_ns: int
    number: int
    given_ns: Fraction


class Walk(RuleBasedStateMachine):
    """A limiter and exact buckets, side by side through whatever happens."""

    make: Make

    def __init__(self) -> None:
        super().__init__()
        self.backend: Backend = self.make(QUOTAS)
        self.exact = ExactBuckets(self.backend.source)
        self.now_ns = START
        self.held = {"a": FREE, "b": FREE, "c": SLOW, "{a}\0": THIRD, "limit:d:a|b": FREE, "limit:e:PAID:a": SLOW}
        self.open: list[Open] = []
        self.opened = 0
        self.refunds: list[Refund] = []

    def begin(self) -> None:
        """Let the limiter forget what it will; it may forget only what is full."""
        self.backend.forget_what_is_full(self.now_ns)
        kept = self.backend.kept()
        for key in list(self.exact.full_at):
            if key not in kept:
                self.exact.forget(key)

    def asked(self, keys: Sequence[str], share: float, weights: Sequence[float] = ()) -> list[Charge]:
        """Return charges of a share of each bucket, times its weight: limits may have costs of their own."""
        weighted = zip(keys, (*weights, *([1] * len(keys))), strict=False)
        return [
            charge(self.held[key], round(share * weight * self.held[key].capacity, 2), key) for key, weight in weighted
        ]

    def look(self, keys: Sequence[str]) -> None:
        """Ask for nothing, which heals what a clock that stepped back has left."""
        for key in keys:
            free = [Charge(key, self.held[key], 0)]
            assert self.backend.decide(free, self.now_ns) == self.exact.decide(free, self.now_ns)

    def kept_of_all_but(self, keys: set[str]) -> dict[str, Any]:
        return {key: value for key, value in self.backend.kept().items() if key not in keys}

    keys = st.lists(
        st.sampled_from(("a", "a", "a", "b", "c", "{a}\0", "limit:d:a|b", "limit:e:PAID:a")),
        min_size=1,
        max_size=5,
        unique=True,
    )
    weights = st.lists(st.sampled_from((0, 0.5, 1, 1, 2)), max_size=5)
    shares = st.sampled_from((0, 0.1, 0.1, 0.25, 0.5, 1, 1.01)) | st.floats(0, 1.2)

    @rule(keys=keys, share=shares, weights=weights)
    def decide(self, keys: list[str], share: float, weights: Sequence[float] = ()) -> None:
        self.begin()
        asked = self.asked(keys, share, weights)
        healing = {
            key for key in keys if self.exact.level(key, self.held[key], self.now_ns) < -self.held[key].capacity
        }
        before = self.kept_of_all_but(healing)
        decision = self.backend.decide(asked, self.now_ns)
        assert decision == self.exact.decide(asked, self.now_ns)
        assert 0 <= decision.remaining <= decision.quota.capacity
        if decision.allowed and any(one.increment_ns for one in asked):
            self.open.append(Open(self.opened, decision, asked, len(self.refunds)))
            self.opened += 1
        else:
            assert self.kept_of_all_but(healing) == before, "what is refused or free writes nothing"
        if decision.wait_ns > 0:
            assert_the_wait_is_exact(self.backend, asked, decision, self.now_ns)

    @rule(share=shares)
    def spend(self, share: float) -> None:
        self.decide(["a"], share)

    @rule(keys=keys, share=shares)
    def inspect(self, keys: list[str], share: float) -> None:
        self.begin()
        if self.backend.heals_when_looked_at:
            self.look(keys)
        asked, before = self.asked(keys, share), self.backend.kept()
        assert self.backend.inspect(asked, self.now_ns) == [self.exact.inspect(one, self.now_ns) for one in asked]
        assert self.backend.kept() == before, "who looks writes nothing"

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), factor=st.sampled_from((-1, -1, -0.5, 0.5, 3)))
    def settle(self, which: int, factor: float) -> None:
        self.begin()
        one = self.open.pop(which % len(self.open))
        self.look([part.key for part in one.charges])
        changes = [Charge(part.key, part.quota, int(part.increment_ns * factor)) for part in one.charges]
        owed = [self.exact.owed(change.key, self.now_ns) for change in changes]
        self.backend.settle(changes, one.decision, self.now_ns)
        debts_ns = debts_of(one.decision)
        for change, debt_ns, owed_ns in zip(changes, debts_ns, owed, strict=True):
            looked = self.backend.decide([Charge(change.key, change.quota, 0)], self.now_ns)
            if change.increment_ns >= 0:
                most_ns = max(owed_ns, min(owed_ns + change.increment_ns, Fraction(2 * change.quota.burst_ns)))
                assert looked.reset_ns == most_ns
            else:
                self.check_refund(one, change, debt_ns, owed_ns, looked.reset_ns)
            self.exact.owe(change.key, looked.reset_ns, self.now_ns)

    def check_refund(self, one: Open, change: Charge, debt_ns: int, owed_ns: Fraction, found_ns: int) -> None:
        """What was charged and has not been refilled is given back; charges before it, given back since, shift it."""
        of_earlier = [refund for refund in self.refunds if refund.key == change.key and refund.number < one.number]
        later = [refund for refund in self.refunds[one.refunds_before :] if refund in of_earlier]
        given_ns = sum((refund.given_ns for refund in later), Fraction(0))
        left_ns = one.decision.at_ns + debt_ns - given_ns - self.now_ns
        exact_ns = max(owed_ns - min(Fraction(-change.increment_ns), max(left_ns, Fraction(0))), Fraction(0))
        at_once = [
            refund
            for refund in self.refunds[: one.refunds_before]
            if refund in of_earlier and refund.at_ns >= one.decision.at_ns
        ]
        if at_once:  # at the instant of the charge, or later by a clock that has stepped back: less is given back
            assert exact_ns <= found_ns <= owed_ns
        else:
            assert found_ns == exact_ns
        self.refunds.append(Refund(change.key, self.now_ns, one.number, owed_ns - found_ns))

    def close(self, key: str) -> None:
        """Settle no more what was charged before an operator changed the bucket."""
        self.open = [one for one in self.open if key not in {part.key for part in one.charges}]

    @rule(key=st.sampled_from("abc"))
    def refill(self, key: str) -> None:
        self.begin()
        self.backend.refill(key)
        self.exact.refill(key)
        self.look([key])
        self.close(key)

    @rule(key=st.sampled_from("abc"), new=st.sampled_from(QUOTAS))
    def move(self, key: str, new: Quota) -> None:
        self.begin()
        self.backend.move(key, self.held[key], new, self.now_ns)
        self.exact.move(key, self.held[key], new, self.now_ns)
        self.held[key] = new
        owed_ns = self.backend.decide([Charge(key, new, 0)], self.now_ns).reset_ns
        excess_ns = owed_ns - self.exact.owed(key, self.now_ns)
        assert 0 <= excess_ns < (1 if self.backend.source == "memory" else 2), "rounded to the stricter side"
        if excess_ns:
            self.exact.owe(key, owed_ns, self.now_ns)
        self.close(key)

    gaps_ns = st.sampled_from((1, 1, MILLISECOND, SECOND, 10 * SECOND - 1, 10 * SECOND, 20 * SECOND, TEN_YEARS))

    @rule(gap_ns=gaps_ns | st.integers(0, 3 * SECOND) | st.integers(0, 30 * SECOND))
    def pass_time(self, gap_ns: int) -> None:
        gap_ns = up_to(self.backend.tick_ns, gap_ns)
        self.now_ns += gap_ns
        self.exact.passed_ns += gap_ns

    @rule(step_ns=st.sampled_from((1, SECOND, 10 * SECOND, 3600 * SECOND)) | st.integers(0, 40 * SECOND))
    def step_back(self, step_ns: int) -> None:
        self.now_ns -= up_to(self.backend.tick_ns, step_ns)
        self.open.clear()


class MemoryWalk(Walk):
    make = Memory


class SharedWalk(Walk):
    make = Shared

    @invariant()
    def a_key_lives_until_its_bucket_is_full_and_not_a_millisecond_longer(self) -> None:
        backend = cast("Shared", self.backend)
        for name, (_, expires_ms) in backend.store.values.items():
            full_at_ns = self.exact.full_at[backend.names[name]]
            assert 0 <= expires_ms * MILLISECOND - full_at_ns < MILLISECOND


TestMemory = MemoryWalk.TestCase
TestMemory.settings = settings(patient, max_examples=30, stateful_step_count=50)
TestShared = SharedWalk.TestCase
TestShared.settings = TestMemory.settings


def test_a_refund_beside_one_that_a_clock_stepping_back_made_later_gives_back_less() -> None:
    walk = SharedWalk()
    walk.spend(0.1)
    walk.pass_time(1)
    walk.settle(0, -1)
    walk.step_back(1)
    walk.spend(1.0)
    walk.settle(0, -1)


# One bucket, under every quota there may be


@both
@given(quota=quotas, steps=st.lists(st.tuples(gaps, costs), min_size=1, max_size=40))
@example(quota=THIRD, steps=[(0, 7), (0, 1), (TOLD_WAIT, 1), (0, 0.1), (TOLD_WAIT, 0.1)])
@thorough
def test_every_decision_is_that_of_an_exact_token_bucket(
    make: Make, quota: Quota, steps: list[tuple[int | None, float]]
) -> None:
    """Decision, tokens left, time to full and wait are the fractions' own; the wait is right to the nanosecond."""
    backend, now_ns, told_ns = make([quota]), START, 0
    exact = ExactBuckets(backend.source)
    for gap_ns, cost in steps:
        now_ns += up_to(backend.tick_ns, told_ns if gap_ns is TOLD_WAIT else gap_ns)
        asked = [charge(quota, cost)]
        decision = backend.decide(asked, now_ns)
        assert decision == exact.decide(asked, now_ns)
        told_ns = max(decision.wait_ns, 0)
        if decision.wait_ns > 0:
            assert_the_wait_is_exact(backend, asked, decision, now_ns)


@both
@given(
    quota=quotas,
    steps=st.lists(st.tuples(gaps, costs, st.sampled_from((0, 0, 0, 1, 3600))), min_size=1, max_size=40),
)
@thorough
def test_no_window_admits_more_than_capacity_and_rate_allow(
    make: Make, quota: Quota, steps: list[tuple[int | None, float, int]]
) -> None:
    """By the rate and the costs as written, before anything was rounded; a clock that steps back gains nothing."""
    backend, now_ns, passed_ns, told_ns = make([quota]), START, 0, 0
    admitted: list[tuple[int, Fraction]] = []
    for gap_ns, cost, step_back in steps:
        length_ns = up_to(backend.tick_ns, told_ns if gap_ns is TOLD_WAIT else gap_ns)
        passed_ns += length_ns
        now_ns += length_ns - step_back * SECOND
        decision = backend.decide([charge(quota, cost)], now_ns)
        told_ns = max(decision.wait_ns, 0)
        if decision.allowed:
            admitted.append((passed_ns, Fraction(str(cost))))
    assert_conforms(admitted, quota.capacity, Fraction(str(quota.rate)) / SECOND)


@both
@given(
    rate=st.sampled_from((1e-8, 1e-6, 0.1, 3)) | st.floats(1e-8, 5000),
    capacity=st.integers(1, 1000),
    spent=st.floats(0, 1),
    cost=st.floats(0.001, 1),
    since_ns=st.integers(0, 3 * SECOND),
)
@example(rate=1e-8, capacity=3, spent=1, cost=0.5, since_ns=SECOND - 1)
@thorough
def test_a_client_that_waits_retry_after_is_admitted(
    make: Make, rate: float, capacity: int, spent: float, cost: float, since_ns: int
) -> None:
    """By the header as it is sent, under every quota that may be configured, years long ones too."""
    assume(capacity / rate <= (MAX_FILL if make is Memory else MAX_BUDGET))
    quota = Quota.per_second("drawn", rate, capacity)
    backend, asked = make([quota]), charge(quota, cost * quota.capacity)
    backend.decide([charge(quota, spent * quota.capacity)], START)
    now_ns = START + up_to(backend.tick_ns, since_ns)
    refused = backend.decide([asked], now_ns)
    if refused.allowed:
        assert refused.retry_after is None
        return
    wait = sent_retry_after(asked, refused)
    assert wait is not None
    assert wait >= 1
    assert (wait - 1) * SECOND < refused.wait_ns <= wait * SECOND
    assert backend.decide([asked], now_ns + wait * SECOND).allowed


def sent_retry_after(asked: Charge, decision: Decision) -> int | None:
    """Return the seconds in the header of the gateway's response, None if it has none."""
    exchange = Exchange("id", "GET", "/", "192.0.2.7", 0.0, Client("c", asked.key, asked.quota, "default"))
    sent = refusal(exchange, decision).headers.get("retry-after")
    return None if sent is None else int(sent)


@both
@pytest.mark.parametrize("cost", [10.1, 1000])
def test_a_cost_above_capacity_is_never_admitted_nor_charged_and_has_no_wait(make: Make, cost: float) -> None:
    backend, asked = make([FREE]), charge(FREE, cost)
    decision = backend.decide([asked], START)
    assert (decision.allowed, decision.wait_ns, decision.retry_after) == (False, NEVER_NS, None)
    assert sent_retry_after(asked, decision) is None
    assert backend.kept() == {}


@both
def test_ten_idle_years_fill_the_bucket_and_no_more(make: Make) -> None:
    backend, later_ns = make([FREE]), START + TEN_YEARS
    assert backend.decide([charge(FREE, 10)], START).allowed
    assert backend.inspect([charge(FREE, 0)], later_ns)[0].remaining == 10
    assert backend.decide([charge(FREE, 10)], later_ns).allowed
    assert not backend.decide([charge(FREE, 0.1)], later_ns).allowed


@both
@pytest.mark.parametrize("cost", [0, 1, 11], ids=["free of charge", "refused", "never possible"])
@pytest.mark.parametrize("companions", [(), ("b",)], ids=["alone", "with another bucket"])
def test_a_step_back_heals_within_a_token(make: Make, cost: float, companions: tuple[str, ...]) -> None:
    """The first look, whatever its result, brings the bucket to "empty now"; from there it refills as ever."""
    backend, back_ns = make([FREE]), START - 3600 * SECOND
    assert backend.decide([charge(FREE, 10)], START).allowed
    backend.decide([charge(FREE, cost), *(charge(FREE, 1, key) for key in companions)], back_ns)
    assert not backend.decide([charge(FREE)], back_ns + SECOND - backend.tick_ns).allowed
    assert backend.decide([charge(FREE)], back_ns + SECOND).allowed
    assert backend.inspect([charge(FREE, 0)], back_ns + 11 * SECOND)[0].remaining == 10


ODD_KEYS = ("client:a", "client:{a}", "{client:}a", "client:a\0", "client:A", "client:" + "a" * 65_536, "client:ä", "")


@both
@given(order=st.permutations(ODD_KEYS))
@quick
def test_a_key_draws_on_its_own_bucket_only(make: Make, order: Sequence[str]) -> None:
    backend = make([FREE])
    for spent, key in enumerate(order, 1):
        assert backend.decide([charge(FREE, spent, key)], START).remaining == 10 - spent
    looked = backend.inspect([charge(FREE, 0, key) for key in order], START)
    assert [one.remaining for one in looked] == [10 - spent for spent, _ in enumerate(order, 1)]


def test_no_id_steers_a_key_of_the_store_into_a_slot() -> None:
    limiter = LuaLimiter(LuaStore(0), [FREE])
    names = {limiter.store_key(key) for key in ODD_KEYS}
    assert len(names) == len(ODD_KEYS)
    assert len({len(name) for name in names}) == 1
    assert all(name.isascii() and name.isprintable() and not set(name) & set("{}") for name in names)


# Several buckets, and a batch of requests


@both
@given(
    one=quotas,
    other=quotas,
    steps=st.lists(st.tuples(st.integers(0, 2 * SECOND), costs, costs), min_size=1, max_size=30),
)
@quick
def test_several_buckets_are_charged_all_or_nothing(
    make: Make, one: Quota, other: Quota, steps: list[tuple[int, float, float]]
) -> None:
    """For costs of zero too: allowed exactly if each would allow it alone, and else none of them is charged."""
    backend, now_ns = make([one, other]), START
    exact = ExactBuckets(backend.source)
    for gap_ns, cost, more in steps:
        now_ns += up_to(backend.tick_ns, gap_ns)
        asked = [charge(one, cost, "a"), charge(other, more, "b")]
        alone = [exact.inspect(part, now_ns) for part in asked]
        decision = backend.decide(asked, now_ns)
        assert decision.allowed == all(part.allowed for part in alone)
        assert decision == exact.decide(asked, now_ns)
        looked = backend.inspect([charge(one, 0, "a"), charge(other, 0, "b")], now_ns)
        assert looked == [exact.inspect(charge(one, 0, "a"), now_ns), exact.inspect(charge(other, 0, "b"), now_ns)]


@given(
    requests=st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), costs), min_size=1, max_size=3, unique_by=lambda part: part[0]),
        min_size=1,
        max_size=20,
    )
)
@thorough
def test_a_batch_decides_as_one_after_the_other_would(requests: list[list[tuple[str, float]]]) -> None:
    """In one call of the script, in the order in which they came, and with the same left in the store."""
    held = {"a": FREE, "b": SLOW, "c": THIRD}
    at_once, one_by_one = (LuaLimiter(LuaStore(START // MICROSECOND), QUOTAS) for _ in range(2))
    answers: list[Decision] = []
    at_once.wire.is_slow = True
    charges = [[charge(held[key], cost, key) for key, cost in request] for request in requests]
    for asked in charges:
        at_once.decide_async(asked, START, answers.append)
    at_once.wire.execute()
    at_once.wire.deliver()
    assert answers == [one_by_one.decided(asked, START) for asked in charges]
    assert at_once.wire.store.values == one_by_one.wire.store.values


def test_any_number_of_buckets_is_charged_in_one_call_of_the_script() -> None:
    store = LuaStore(START // MICROSECOND)
    limiter = LuaLimiter(store, QUOTAS)
    calls: list[int] = []
    call = store.call
    store.call = lambda keys, *arguments: calls.append(len(list(keys))) or call(keys, *arguments)  # type: ignore[method-assign,func-returns-value]
    asked = [charge(FREE, 1, f"limit:{number}:a") for number in range(5)]
    decision = limiter.decided(asked, START)
    assert (decision.allowed, len(decision.debts_ns), calls) == (True, 5, [5])


def test_a_refusal_from_memory_waits_for_all_buckets() -> None:
    """Also for one that allows the request by its earliest reading, and not by its latest."""
    fleet = Fleet([0])
    (limiter,) = fleet.limiters
    spent = [charge(FREE, 10, "a"), charge(SLOW, 30, "b")]
    limiter.decide_async(spent, fleet.clock_ns(0), lambda _: None)
    fleet.execute(0)
    fleet.pass_time(LONGEST_LAG_NS // 2)
    limiter.wire.deliver()
    fleet.pass_time(4 * SECOND - 1_000_000)
    asked = [charge(FREE, 4.5, "a"), charge(SLOW, 2, "b")]
    decision = fleet.decide(0, asked)
    assert decision is not None
    fleet.pass_time(up_to(MICROSECOND, decision.wait_ns))
    for one in asked:
        assert fleet.owed(one) + one.increment_ns <= one.quota.burst_ns


# Change of tier


@both
@given(old=quotas, new=quotas, share=st.floats(0, 1))
@example(old=Quota.per_second("drawn", 7, 4), new=Quota.per_second("drawn", 0.1, 2), share=0.6)
@thorough
def test_a_change_of_tier_keeps_the_share_of_the_bucket_that_is_filled(
    make: Make, old: Quota, new: Quota, share: float
) -> None:
    """To the nanosecond and to the stricter side; in the script as exactly as a double is."""
    backend, exact = make([old, new]), ExactBuckets()
    spend = [Charge("a", old, int(share * old.burst_ns))]
    backend.decide(spend, START)
    exact.decide(spend, START)
    backend.move("a", old, new, START)
    exact.move("a", old, new, START)
    found_ns = backend.decide([Charge("a", new, 0)], START).reset_ns
    rounding_ns = Fraction(0) if make is Memory else Fraction(new.burst_ns, 2**50)
    most_ns = Fraction(1) if make is Memory else max(Fraction(2), rounding_ns)
    assert -rounding_ns <= found_ns - exact.owed("a", START) < most_ns or found_ns == exact.owed("a", START)
    assert found_ns <= new.burst_ns


@both
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3 * SECOND), st.sampled_from((FREE, ENTERPRISE)), st.floats(0, 1)),
        min_size=1,
        max_size=40,
    )
)
@quick
def test_changing_tiers_back_and_forth_gains_nothing(make: Make, steps: list[tuple[int, Quota, float]]) -> None:
    """Whatever the tier, a bucket is one budget of 10 s: no window gives more than 1 + d / 10 s of it."""
    backend, held, now_ns = make(QUOTAS), FREE, START
    admitted: list[tuple[int, Fraction]] = []
    for gap_ns, tier, share in steps:
        now_ns += up_to(backend.tick_ns, gap_ns)
        backend.move("a", held, tier, now_ns)
        held = tier
        asked = charge(tier, share * tier.capacity)
        if backend.decide([asked], now_ns).allowed:
            admitted.append((now_ns, Fraction(asked.increment_ns, tier.burst_ns)))
    assert_conforms(admitted, 1, Fraction(1, 10 * SECOND))


@both
@given(steps=st.lists(st.tuples(st.sampled_from(QUOTAS), st.floats(0, 0.5)), max_size=40))
@quick
def test_no_change_of_tier_within_an_instant_yields_a_second_bucket(
    make: Make, steps: list[tuple[Quota, float]]
) -> None:
    backend, held, spent = make(QUOTAS), FREE, Fraction(0)
    for tier, share in steps:
        backend.move("a", held, tier, START)
        held = tier
        asked = charge(tier, share * tier.capacity)
        if backend.decide([asked], START).allowed:
            spent += Fraction(asked.increment_ns, tier.burst_ns)
    assert spent <= 1


# What others publish. The figures are facts taken from their test tables, restated for these limiters; sources and
# licences stand with each.


@both
def test_the_table_of_throttled_and_redis_cell(make: Make) -> None:
    """Five tokens, one a second.

    throttled/throttled rate_test.go (BSD-3-Clause); all but the last row also in brandur/redis-cell src/cell/mod.rs
    (MIT).
    """
    quota = Quota.per_second("q", 1, 5)
    backend = make([quota])
    table = [  # at ms, cost -> allowed, remaining, reset ms, wait ms
        (0, 6, False, 5, 0, NEVER_NS),
        (0, 1, True, 4, 1000, 0),
        (0, 1, True, 3, 2000, 0),
        (0, 1, True, 2, 3000, 0),
        (0, 1, True, 1, 4000, 0),
        (0, 1, True, 0, 5000, 0),
        (0, 1, False, 0, 5000, 1000),
        (3000, 1, True, 2, 3000, 0),
        (3100, 1, True, 1, 3900, 0),
        (4000, 1, True, 1, 4000, 0),
        (8000, 1, True, 4, 1000, 0),
        (9500, 1, True, 4, 1000, 0),
        (9500, 0, True, 4, 1000, 0),
        (9500, 2, True, 2, 3000, 0),
        (9500, 5, False, 2, 3000, 3000),
        (15000, 6, False, 5, 0, NEVER_NS),
    ]
    for row, (at, cost, allowed, remaining, reset, wait) in enumerate(table):
        found = backend.decide([charge(quota, cost)], START + at * MILLISECOND)
        wait_ns = wait if wait == NEVER_NS else wait * MILLISECOND
        expected = Decision("a", quota, allowed, remaining, wait_ns, reset * MILLISECOND, source=backend.source)
        assert found == expected, f"row {row}"


@both
@pytest.mark.parametrize(
    ("capacity", "table"),  # cost -> allowed, remaining; then ms to the next row
    [
        (
            10,
            [
                (1, True, 9, 1000),
                (1, True, 8, 1000),
                (1, True, 7, 1500),
                (0, True, 8, 3000),
                (0, True, 9, 0),
                (9, True, 0, 0),
                (1, False, 0, 3000),
                (0, True, 1, 60_000),
                (0, True, 10, 60_000),
                (10, True, 0, 29_000),
                (9, True, 0, 3000),
                (1, True, 0, 1000),
            ],
        ),
        (
            20,
            [
                (1, True, 19, 1000),
                (1, True, 18, 1000),
                (1, True, 17, 1500),
                (0, True, 18, 3000),
                (0, True, 19, 0),
                (19, True, 0, 0),
                (1, False, 0, 3000),
                (0, True, 1, 60_000),
                (0, True, 20, 1000),
            ],
        ),
    ],
    ids=["burst 10", "burst 20"],
)
def test_the_leaky_buckets_of_gubernator(make: Make, capacity: int, table: list[tuple[int, bool, int, int]]) -> None:
    """Ten per 30 s: mailgun/gubernator functional_test.go, TestLeakyBucket and ...WithBurst (Apache-2.0)."""
    quota = Quota("q", 1 / 3, capacity, 3 * SECOND, capacity * 3 * SECOND)
    backend, now_ns = make([quota]), START
    for row, (cost, allowed, remaining, pause) in enumerate(table):
        found = backend.decide([charge(quota, cost)], now_ns)
        assert (found.allowed, found.remaining) == (allowed, remaining), f"row {row}"
        now_ns += pause * MILLISECOND


@both
@given(capacity=st.integers(1, 10_000), further=st.integers(0, 50), parts=st.integers(1, 50))
@quick
def test_the_exact_wait_of_governor(make: Make, capacity: int, further: int, parts: int) -> None:
    """Exhausted, then kept so: no fraction of the told wait is enough, all of it is.

    The property accurate_not_until of boinkor-net/governor tests/proptests.rs (MIT).
    """
    quota = Quota.per_second("q", capacity, capacity)
    backend, now_ns = make([quota]), START
    backend.decide([charge(quota, capacity)], START)
    for _ in range(further):
        now_ns += up_to(backend.tick_ns, backend.decide([charge(quota)], now_ns).wait_ns)
        assert backend.decide([charge(quota)], now_ns).allowed
    wait_ns = backend.decide([charge(quota)], now_ns).wait_ns
    assert quota.emission_ns - backend.tick_ns * further <= wait_ns <= quota.emission_ns
    for part in range(parts):
        assert not backend.decide([charge(quota)], now_ns + wait_ns * part // parts).allowed
    assert backend.decide([charge(quota)], now_ns + up_to(backend.tick_ns, wait_ns)).allowed


# Many gateways on one store


class Fleet:
    """Gateways on one store, questions and replies under way, clocks that do not run alike."""

    def __init__(self, speeds_ppm: Sequence[int], known: Sequence[Quota] = QUOTAS) -> None:
        self.passed_ns = 0
        self.skip_ns = 0  # by which the store's clock has jumped
        self.store = LuaStore(START // MICROSECOND)
        self.speeds_ppm = speeds_ppm
        self.limiters: list[LuaLimiter] = []
        for number in range(len(speeds_ppm)):
            limiter = LuaLimiter(
                self.store,
                known,
                processes=len(speeds_ppm),
                remembers=True,
                clock_ns=lambda number=number: self.clock_ns(number),  # type: ignore[misc]  # no type for defaults
            )
            limiter.wire.is_slow = True
            limiter.refunds.name = f"{number:016x}"
            self.limiters.append(limiter)

    def clock_ns(self, number: int) -> int:
        """Return what a gateway's own clock shows."""
        return (number + 1) * 1_000_000 * SECOND + self.passed_ns + self.passed_ns * self.speeds_ppm[number] // 10**6

    def pass_time(self, gap_ns: int) -> None:
        self.passed_ns += gap_ns
        self.store.now_us = (START + self.passed_ns + self.skip_ns) // MICROSECOND

    @property
    def store_ns(self) -> int:
        return self.store.now_us * MICROSECOND

    @property
    def is_quiet(self) -> bool:
        return not any(one.wire.waiting or one.wire.under_way for one in self.limiters)

    def decide(self, number: int, asked: Sequence[Charge]) -> Decision | None:
        return self.limiters[number].decide(asked, self.clock_ns(number))

    def execute(self, number: int) -> None:
        """Have the store execute what a gateway has sent; whoever listens hears of refunds."""
        self.limiters[number].wire.execute()
        self.publish()

    def publish(self) -> None:
        told, self.store.told = self.store.told, []
        for _, message in told:
            for limiter in self.limiters:
                if limiter.cache.is_trusted:
                    limiter._on_refund(message)

    def owed(self, asked: Charge) -> int:
        """Return what the store says a bucket owes now, without a trace."""
        values = dict(self.store.values)
        _, debt = self.store.call([self.limiters[0].store_key(asked.key)], 1, 1, asked.quota.burst_ns, 0)
        self.store.values = values
        return debt


class Remembering(RuleBasedStateMachine):
    """What gateways remember of a store, whatever they learn from each other and whenever replies arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet([500, -500, 0])
        self.held = {"a": FREE, "b": SLOW}
        self.open: list[tuple[int, list[Charge], Decision]] = []
        self.left_ns = LONGEST_LAG_NS  # until the deadline of what is under way
        self.charged: dict[str, int] = dict.fromkeys(self.held, 0)  # how often
        # By gateway: of each bucket that a reply tells of, how often it was charged, and when the gateway had asked.
        self.under_way: dict[int, deque[dict[str, tuple[int, int]]]] = {number: deque() for number in range(3)}
        self.known: dict[tuple[int, str], int] = {}  # how often when a gateway last heard of the bucket

    numbers = st.sampled_from((0, 0, 0, 1, 2))
    keys = st.sampled_from((["a"], ["a"], ["a"], ["b"], ["a", "b"]))

    @rule(number=numbers, keys=keys, share=st.sampled_from((0, 0.1, 0.1, 0.5, 1, 1.1)), is_answered=st.booleans())
    def ask(self, number: int, keys: list[str], share: float, is_answered: bool) -> None:  # noqa: FBT001 - drawn
        asked = [charge(self.held[key], round(share * self.held[key].capacity, 2), key) for key in keys]
        decision = self.fleet.decide(number, asked)
        if decision is not None:
            self.check_refusal(number, asked, decision)
            return
        if self.fleet.is_quiet:
            self.left_ns = LONGEST_LAG_NS
        limiter = self.fleet.limiters[number]
        limiter.decide_async(asked, self.fleet.clock_ns(number), lambda answer: self.note(number, asked, answer))
        if is_answered:
            self.settle_down()

    def note(self, number: int, asked: list[Charge], answer: Decision) -> None:
        if answer.allowed:
            self.open.append((number, asked, answer))

    def check_refusal(self, number: int, asked: Sequence[Charge], decision: Decision) -> None:
        """The store would refuse it too, and does not make the client wait for longer, nor much less long."""
        assert (decision.allowed, decision.source) == (False, "deny_cache")
        (binding,) = (one for one in asked if one.key == decision.key)
        wait_ns = self.fleet.owed(binding) + binding.increment_ns - binding.quota.burst_ns
        assert wait_ns > 0
        assert (decision.wait_ns == NEVER_NS) == (binding.increment_ns > binding.quota.burst_ns)
        if decision.wait_ns != NEVER_NS and self.known.get((number, binding.key)) == self.charged[binding.key]:
            slowest_ns = max(one.quota.burst_ns for one in asked)  # all buckets must allow it afterwards
            most_ns = wait_ns + 2 * LONGEST_LAG_NS + slowest_ns // 250 + MICROSECOND
            assert wait_ns <= decision.wait_ns <= most_ns

    @rule(number=numbers)
    def execute(self, number: int) -> None:
        """Note which buckets the store has charged, and of which the reply tells."""
        wire = self.fleet.limiters[number].wire
        batch = list(wire.waiting)
        parts = [Charge(key, quota, 0) for key, quota in self.held.items()]
        before = [self.fleet.owed(part) for part in parts]
        self.fleet.execute(number)
        for part, owed_ns in zip(parts, before, strict=True):
            self.charged[part.key] += self.fleet.owed(part) > owed_ns
        if batch:
            told = {
                one.key: (self.charged[one.key], question._asked_ns)
                for question in batch
                if isinstance(question, ChargeOp)
                for one in question._charges
            }
            for question in batch:
                if isinstance(question, SettleOp | RefundOp):
                    told.pop(question._charge.key, None)
            self.under_way[number].append(told)

    @rule(number=numbers)
    def deliver(self, number: int) -> None:
        limiter = self.fleet.limiters[number]
        limiter.wire.deliver()
        if self.under_way[number]:
            for key, (charged, asked_ns) in self.under_way[number].popleft().items():
                if asked_ns > limiter.cache._valid_from_ns:  # else a refund may have come between, and it is ignored
                    self.known[number, key] = charged

    def settle_down(self) -> None:
        for number, queue in self.under_way.items():
            self.execute(number)
            while queue:
                self.deliver(number)

    @rule(gap_ns=st.sampled_from((1000, SECOND // 2, SECOND, 9 * SECOND, 10 * SECOND)) | st.integers(0, 12 * SECOND))
    def pass_time(self, gap_ns: int) -> None:
        if not self.fleet.is_quiet:
            gap_ns = min(gap_ns, self.left_ns)
            self.left_ns -= gap_ns
        self.fleet.pass_time(gap_ns)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 100), factor=st.sampled_from((-1, -0.5, 1)))
    def settle(self, which: int, factor: float) -> None:
        number, asked, decision = self.open.pop(which % len(self.open))
        changes = [Charge(one.key, one.quota, int(one.increment_ns * factor)) for one in asked]
        if self.fleet.is_quiet:
            self.left_ns = LONGEST_LAG_NS
        self.fleet.limiters[number].settle(changes, decision, self.fleet.clock_ns(number))

    @rule(number=numbers, share=st.sampled_from((0.1, 0.1, 0.5, 1)))
    def wait_until_it_passes(self, number: int, share: float) -> None:
        """By the store's clock; and then it does."""
        self.settle_down()
        asked = charge(self.held["a"], round(share * self.held["a"].capacity, 2))
        wait_ns = self.fleet.owed(asked) + asked.increment_ns - asked.quota.burst_ns
        if wait_ns > 0:
            self.fleet.pass_time(up_to(MICROSECOND, wait_ns))
        self.ask(number, ["a"], share, is_answered=True)

    @rule(number=numbers, key=st.sampled_from("ab"), new=st.none() | st.sampled_from(QUOTAS))
    def administer(self, number: int, key: str, new: Quota | None) -> None:
        """Change the tier, or fill the bucket."""
        limiter = self.fleet.limiters[number]
        if new is None:
            at_once(limiter.refill(key))
        else:
            self.settle_down()
            at_once(limiter.move(key, self.held[key], new, self.fleet.clock_ns(number)))
            self.held[key] = new
            self.open = [one for one in self.open if key not in {part.key for part in one[1]}]
        self.fleet.publish()

    @rule(number=numbers, is_deaf=st.booleans())
    def listen_anew(self, number: int, is_deaf: bool) -> None:  # noqa: FBT001 - drawn
        for limiter in self.fleet.limiters:
            if not limiter.cache.is_trusted:
                limiter._on_subscription(True)
        self.fleet.limiters[number]._on_subscription(not is_deaf)


TestRemembering = Remembering.TestCase
TestRemembering.settings = settings(patient, max_examples=40, stateful_step_count=60)


@given(
    speed_ppm=st.sampled_from((-500, 0, 500)),
    there_ns=st.integers(0, LONGEST_LAG_NS // 2),
    back_ns=st.integers(0, LONGEST_LAG_NS // 2),
    cost=st.sampled_from((0.1, 1, 5, 10)),
    share=st.floats(0, 1),
)
@example(speed_ppm=-500, there_ns=LONGEST_LAG_NS // 2, back_ns=0, cost=10, share=0.9)
@example(speed_ppm=500, there_ns=0, back_ns=LONGEST_LAG_NS // 2, cost=10, share=0.9)
@thorough
def test_a_refusal_from_memory_ends_no_later_than_the_stores_and_its_wait_no_earlier(
    speed_ppm: int, there_ns: int, back_ns: int, cost: float, share: float
) -> None:
    """However long question and reply took, and however fast the gateway's clock runs."""
    fleet, asked = Fleet([speed_ppm]), [charge(FREE, cost)]
    (limiter,) = fleet.limiters
    limiter.decide_async([charge(FREE, 10)], fleet.clock_ns(0), lambda _: None)
    fleet.pass_time(there_ns)
    fleet.execute(0)
    fleet.pass_time(back_ns)
    limiter.wire.deliver()
    until_ns = fleet.owed(asked[0]) + asked[0].increment_ns - FREE.burst_ns
    fleet.pass_time(int(until_ns * share))
    decision = fleet.decide(0, asked)
    if decision is not None:
        assert decision.wait_ns >= fleet.owed(asked[0]) + asked[0].increment_ns - FREE.burst_ns > 0
    fleet.pass_time(up_to(MICROSECOND, max(fleet.owed(asked[0]) + asked[0].increment_ns - FREE.burst_ns, 0)))
    assert fleet.decide(0, asked) is None, "the store is asked, and lets it pass"


@each("how", ["a refund", "a refill", "a change of tier and back"])
def test_a_reply_in_progress_while_a_bucket_is_filled_otherwise_is_not_remembered(how: str) -> None:
    fleet, asked = Fleet([0, 0]), [charge(FREE, 10)]
    answers: list[Decision] = []
    for number in range(2):
        fleet.limiters[number].decide_async(asked, fleet.clock_ns(number), answers.append)
        fleet.execute(number)
    fleet.limiters[0].wire.deliver()
    match how:
        case "a refund":
            fleet.limiters[0].settle([Charge("a", FREE, -FREE.burst_ns)], answers[0], fleet.clock_ns(0))
            fleet.execute(0)
        case "a refill":
            at_once(fleet.limiters[0].refill("a"))
        case _:
            at_once(fleet.limiters[0].move("a", FREE, SLOW, fleet.clock_ns(0)))
    fleet.publish()
    fleet.pass_time(1000)
    fleet.limiters[1].wire.deliver()
    assert [answer.allowed for answer in answers] == [True, False]
    assert fleet.decide(1, asked) is None, "the store is asked"


class Together:
    """Four gateways, and exact buckets that decide in the order in which the store does."""

    def __init__(self) -> None:
        self.fleet = Fleet([0, 0, 0, 0])
        self.exact = ExactBuckets("store")
        self.expected: dict[int, Decision] = {}
        self.answers: dict[int, Decision] = {}
        self.admitted: list[tuple[int, Fraction]] = []

    def ask(self, number: int, cost: float) -> None:
        asked, limiter = [charge(FREE, cost)], self.fleet.limiters[number]
        if self.fleet.decide(number, asked) is None:
            limiter.decide_async(asked, self.fleet.clock_ns(number), lambda _: None)
            question = limiter.wire.waiting[-1]
            assert isinstance(question, ChargeOp)
            question._on_decision = partial(self.answers.__setitem__, id(question))

    def execute(self, number: int) -> None:
        for question in self.fleet.limiters[number].wire.waiting:
            assert isinstance(question, ChargeOp)
            expected = self.expected[id(question)] = self.exact.decide(question._charges, self.fleet.store_ns)
            if expected.allowed:
                cost = Fraction(question._charges[0].increment_ns, FREE.emission_ns)
                self.admitted.append((self.fleet.passed_ns, cost))
        self.fleet.execute(number)

    def deliver(self, number: int) -> None:
        wire = self.fleet.limiters[number].wire
        batch = wire.under_way[0][0] if wire.under_way else []
        wire.deliver()
        for question in batch:
            assert self.answers.pop(id(question)) == self.expected.pop(id(question))


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("ask", "ask", "ask", "execute", "execute", "deliver", "pass")),
            st.integers(0, 3),
            st.sampled_from((0.5, 1, 1, 2.5, 10)),
            st.sampled_from((0, 1000, SECOND)) | st.integers(0, 3 * SECOND),
        ),
        max_size=120,
    )
)
@example(steps=[("ask", number % 4, 1, 0) for number in range(20)])
@thorough
def test_many_gateways_admit_what_one_bucket_holds(steps: list[tuple[str, int, float, int]]) -> None:
    """No more in any window, hence no more than the rate over all; and no less, decision by decision."""
    together = Together()
    for kind, number, cost, gap_ns in steps:
        match kind:
            case "ask":
                together.ask(number, cost)
            case "execute":
                together.execute(number)
            case "deliver":
                together.deliver(number)
            case _:
                together.fleet.pass_time(up_to(MICROSECOND, gap_ns))
    for number in range(4):
        together.execute(number)
        while together.fleet.limiters[number].wire.under_way:
            together.deliver(number)
    assert_conforms(together.admitted, FREE.capacity, Fraction(1, FREE.emission_ns))


# Without the store. The bounds are those of the reference, section 5.2, here in nanoseconds of the budget.


class Moment(NamedTuple):
    """What happened at once: what was admitted by whom, who had no store then, and what the store lost."""

    at_ns: int
    admitted_ns: int
    cut_off: frozenset[int]
    is_served: bool  # somebody had the store
    forgiven_ns: int  # the bucket was that much fuller afterwards, once


class Outages:
    """Gateways whose store goes and comes, for some or for all, and is not always what it was."""

    def __init__(self, count: int, quota: Quota) -> None:
        self.fleet = Fleet([0] * count, [quota])
        self.quota = quota
        self.count = count
        self.dearest_ns = 0
        self.moments: list[Moment] = []
        self.charged: list[tuple[int, int]] = []  # when, and how much, by the store, heard of or not
        self.copies: list[tuple[int, dict[str, tuple[str, int]], int]] = [(0, {}, 0)]  # with the charges so far

    def note(self, admitted_ns: int = 0, forgiven_ns: int = 0, missed: Sequence[int] = ()) -> None:
        away = {number for number, one in enumerate(self.fleet.limiters) if not one.wire.is_up}
        moment = Moment(
            self.fleet.passed_ns, admitted_ns, frozenset(away | {*missed}), len(away) < self.count, forgiven_ns
        )
        self.moments.append(moment)
        self.copies.append((self.fleet.passed_ns, dict(self.fleet.store.values), len(self.charged)))

    def ask(self, number: int, cost: float, fate: str = "answered") -> Decision:
        """Ask as a gateway does; unless it is "answered" the reply is "lost", or the question "unsent"."""
        asked, now_ns = [charge(self.quota, cost)], self.fleet.clock_ns(number)
        self.dearest_ns = max(self.dearest_ns, asked[0].increment_ns)
        limiter, answers = self.fleet.limiters[number], list[Decision]()
        decision = self.fleet.decide(number, asked)
        missed: tuple[int, ...] = ()
        if decision is None:
            limiter.decide_async(asked, now_ns, answers.append)
            if fate != "unsent":
                limiter.wire.execute()
                _, (_, debt_ns) = limiter.wire.under_way[-1]
                if debt_ns + asked[0].increment_ns <= self.quota.burst_ns:
                    self.charged.append((self.fleet.passed_ns, asked[0].increment_ns))
            if fate == "answered":
                limiter.wire.deliver()
            else:
                limiter.wire.lose()
                missed = (number,)
            (decision,) = answers
        self.note(asked[0].increment_ns if decision.allowed else 0, missed=missed)
        return decision

    def connect(self, numbers: Sequence[int], *, is_up: bool) -> None:
        for number in numbers:
            limiter = self.fleet.limiters[number]
            if limiter.wire.is_up != is_up:
                limiter.wire.is_up = is_up
                limiter._on_subscription(is_up)
        self.note()

    def pass_time(self, gap_ns: int) -> None:
        self.fleet.pass_time(gap_ns)
        self.note()

    def lose_keys(self) -> None:
        """Have the bucket evicted, or the store restarted: what it owed is forgiven."""
        owed_ns = self.fleet.owed(charge(self.quota))
        self.fleet.store.values.clear()
        self.note(forgiven_ns=owed_ns)

    def fail_over(self, lost_ns: int) -> None:
        """Have the writes of the last while lost: as much is forgiven as was spent by them, one bucket at most."""
        kept = max(
            index for index, (at_ns, *_) in enumerate(self.copies) if at_ns <= max(self.fleet.passed_ns - lost_ns, 0)
        )
        _, values, charges = self.copies[kept]
        self.fleet.store.values = dict(values)
        spent_ns = sum(cost_ns for _, cost_ns in self.charged[charges:])
        self.note(forgiven_ns=min(self.quota.burst_ns, spent_ns))

    def step(self, step_ns: int) -> None:
        """Have the store's clock jump: forward, refill comes early; back, nothing is gained."""
        self.fleet.skip_ns += step_ns
        self.fleet.pass_time(0)
        self.note(forgiven_ns=min(self.quota.burst_ns, max(step_ns, 0)))

    def bound_ns(self, window: Sequence[Moment]) -> Fraction:
        """Return what a window may hold: the store's bucket, and the share of everybody who was cut off in it."""
        length_ns, burst_ns = window[-1].at_ns - window[0].at_ns, self.quota.burst_ns
        cut_off = len(frozenset().union(*(one.cut_off for one in window)))
        share = max(Fraction(1, self.count), Fraction(self.dearest_ns, burst_ns))
        bound = cut_off * share * (burst_ns + length_ns)
        if any(one.is_served for one in window):
            bound += burst_ns + length_ns + sum(one.forgiven_ns for one in window)
        return bound

    def check(self) -> None:
        for first in range(len(self.moments)):
            admitted_ns = 0
            for last in range(first, len(self.moments)):
                admitted_ns += self.moments[last].admitted_ns
                assert admitted_ns <= self.bound_ns(self.moments[first : last + 1])


happenings = st.one_of(
    *[
        st.tuples(
            st.just("ask"),
            st.integers(0, 3),
            st.sampled_from((1, 1, 2, 4, 10)),
            st.sampled_from(("answered", "answered", "answered", "lost", "unsent")),
        )
    ]
    * 5,
    st.tuples(st.just("pass"), st.sampled_from((0, MICROSECOND, SECOND // 2, SECOND, 5 * SECOND, 12 * SECOND))),
    st.tuples(st.just("connect"), st.sets(st.integers(0, 3)), st.booleans()),
    st.tuples(st.just("connect"), st.just({0, 1, 2, 3}), st.booleans()),
    st.tuples(st.just("lose keys")),
    st.tuples(st.just("fail over"), st.sampled_from((MICROSECOND, SECOND, 5 * SECOND))),
    st.tuples(st.just("step"), st.sampled_from((-3600 * SECOND, -SECOND, SECOND, 4 * SECOND, 3600 * SECOND))),
)


@given(count=st.integers(1, 4), schedule=st.lists(happenings, max_size=40))
@settings(patient, max_examples=150)
def test_limits_hold_for_every_schedule_of_outages(count: int, schedule: list[tuple[Any, ...]]) -> None:
    """Down and up, for some or for all; lost replies; lost keys and writes; a clock that jumps."""
    outages = Outages(count, FREE)
    for kind, *details in schedule:
        match kind:
            case "ask":
                number, cost, fate = details
                outages.ask(number % count, cost, fate)
            case "pass":
                outages.pass_time(details[0])
            case "connect":
                outages.connect([number for number in details[0] if number < count], is_up=details[1])
            case "lose keys":
                outages.lose_keys()
            case "fail over":
                outages.fail_over(details[0])
            case "step":
                outages.step(details[0])
    outages.check()
    if not any(one.forgiven_ns for one in outages.moments):
        assert_conforms(outages.charged, FREE.burst_ns, 1)


def spend(outages: Outages, numbers: Sequence[int], cost: float = 1) -> float:
    """Have gateways ask in turn until each is refused; return what they were admitted."""
    spent, asking_still = 0.0, list(numbers)
    while asking_still:
        for number in list(asking_still):
            if outages.ask(number, cost).allowed:
                spent += cost
            else:
                asking_still.remove(number)
    return spent


ALL = range(4)
TWENTY = Quota.per_second("TWENTY", 2, 20)


def healthy(outages: Outages) -> float:
    return spend(outages, ALL)


def down_for_all(outages: Outages) -> float:
    outages.connect(ALL, is_up=False)
    return spend(outages, ALL)


def down_for_all_and_dear(outages: Outages) -> float:
    outages.connect(ALL, is_up=False)
    return spend(outages, ALL, 15)


def going_down(outages: Outages) -> float:
    """Gateway 0 spends the bucket, and knows; the others do not."""
    spent = spend(outages, [0])
    outages.connect(ALL, is_up=False)
    return spent + spend(outages, ALL)


def coming_up(outages: Outages) -> float:
    """Gateway 0 has told its share when it asks; the others have not when it spends the rest."""
    outages.connect(ALL, is_up=False)
    spent = spend(outages, ALL)
    outages.connect(ALL, is_up=True)
    return spent + spend(outages, [0]) + spend(outages, ALL)


def coming_up_in_turn(outages: Outages) -> float:
    """Every gateway tells its share with its first question: 5 - 1, three times, and nothing is left."""
    outages.connect(ALL, is_up=False)
    spent = spend(outages, ALL)
    outages.connect(ALL, is_up=True)
    return spent + spend(outages, ALL)


def one_cut_off(outages: Outages) -> float:
    outages.connect([3], is_up=False)
    return spend(outages, ALL)


def failed_over(outages: Outages) -> float:
    spent = sum(outages.ask(0, 4).allowed * 4.0 for _ in range(3))
    outages.pass_time(SECOND)
    spent += sum(outages.ask(0, 5).allowed * 5.0 for _ in range(2))
    outages.fail_over(SECOND // 2)
    return spent + spend(outages, ALL[1:])


def clock_forward(outages: Outages) -> float:
    spent = spend(outages, [0])
    outages.step(3 * SECOND)
    return spent + spend(outages, ALL[1:])


def clock_back(outages: Outages) -> float:
    spent = spend(outages, [0])
    outages.step(-3600 * SECOND)
    return spent + spend(outages, ALL[1:])


def evicted(outages: Outages) -> float:
    spent = outages.ask(0, 13).allowed * 13.0
    outages.lose_keys()
    return spent + spend(outages, ALL[1:])


REACHED = {  # C = 20, r = 2, N = 4
    "healthy: C": (healthy, 20),
    "down for all: C' = C": (down_for_all, 20),
    "down for all: C' = N * c_max": (down_for_all_and_dear, 60),
    "going down: a burst more, less the share of who knows": (going_down, 20 + 15),
    "coming up: a burst more, less the share of who has told": (coming_up, 20 + 15),
    "coming up in turn: next to nothing": (coming_up_in_turn, 20 + 3),
    "K of N cut off: C + K / N * C": (one_cut_off, 20 + 5),
    "writes lost: what was spent by them": (failed_over, 12 + 10 + 10),
    "clock forward: r * x": (clock_forward, 20 + 6),
    "clock back: nothing": (clock_back, 20),
    "evicted: C - level": (evicted, 13 + 20),
}


@each(("scenario", "admitted"), REACHED.values(), ids=REACHED)
def test_each_bound_is_reached(scenario: Callable[[Outages], float], admitted: float) -> None:
    """To the token, so that a bound is not looser than what happens."""
    outages = Outages(4, TWENTY)
    assert scenario(outages) == admitted
    outages.check()


# Real servers


async def test_requests_cancelled_at_random_mix_up_no_decisions(store: StoreServer) -> None:
    """Each has a key and a cost of its own, which its response shows; who stays is answered, and lanes go on."""
    source = random.Random(18)
    roomy = Quota.per_second("roomy", 0.001, 1000)

    async def request(limiter: RedisLimiter, number: int) -> None:
        decision = await asking(limiter, charge(roomy, number % 997 + 1, f"client-{number}"))
        assert (decision.key, decision.source) == (f"client-{number}", "store")
        assert decision.remaining == 1000 - (number % 997 + 1)

    async with gateways(store.url, roomy, deadline=PATIENCE) as (limiter,):
        await soon(lambda: limiter.batcher.connections == CONNECTIONS, "both lanes serve")
        kept: list[asyncio.Task[None]] = []
        for turn in range(60):
            tasks = [asyncio.create_task(request(limiter, 100 * turn + number)) for number in range(40)]
            source.shuffle(tasks)
            for task in tasks[:25]:
                asyncio.get_running_loop().call_later(source.choice((0, 0, 0.0005, 0.002)), task.cancel)
            kept += tasks[25:]
            await asyncio.sleep(source.choice((0, 0.001, 0.003)))
        await asyncio.gather(*kept)
        dispatcher = limiter.batcher
        assert isinstance(dispatcher, ScriptBatcher)
        await soon(lambda: not dispatcher._waiting, "nothing waits")
        assert limiter.batcher.failures == 0
        assert len(store.connections()) == CONNECTIONS + 1, "the lanes, and who beats the heart"
        await request(limiter, 9999)


@given(steps=st.lists(st.tuples(st.booleans(), st.sampled_from((0, 1, 3, 7))), min_size=5, max_size=30))
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
async def test_a_store_that_forgets_its_scripts_decides_as_ever(
    store: StoreServer, steps: list[tuple[bool, int]]
) -> None:
    """Each decision is that of exact buckets at the moment of the store's clock that it names."""
    quota, exact = Quota.per_second("quota", 50, 10), ExactBuckets("store")
    store.admin.flushall()
    async with gateways(store.url, quota, deadline=PATIENCE) as (limiter,):
        await soon(lambda: limiter.batcher.is_usable, "it is connected")
        for is_flushed, cost in steps:
            if is_flushed:
                store.admin.script_flush()
            limiter.cache.is_trusted = False  # so that the store is asked each time
            decision = await asking(limiter, charge(quota, cost))
            assert decision == exact.decide([charge(quota, cost)], decision.at_ns)
        assert limiter.batcher.failures == 0


SHORT_DEADLINE = 0.06


@pytest.mark.parametrize("seed", range(2))
async def test_no_request_waits_longer_than_the_deadline_whatever_the_store_does(
    store: StoreServer, seed: int
) -> None:
    """Late, deaf, without replies, cut off, stopped, gone and back, in any order; all policies of a gateway aside."""
    source = random.Random(seed)
    waits: list[tuple[float, float]] = []  # begin and duration

    async def request(limiter: RedisLimiter) -> None:
        begun = time.monotonic()
        await asking(limiter, charge(FREE, 0.1, f"client-{source.randrange(50)}"))
        waits.append((begun, time.monotonic() - begun))

    async with (
        Lateness() as lateness,
        Proxy(store) as proxy,
        gateways(proxy.url, FREE, deadline=SHORT_DEADLINE) as (limiter,),
    ):
        requests: list[asyncio.Task[None]] = []
        is_stopped = False
        for _ in range(25):
            match source.randrange(7):
                case 0:
                    proxy.delay = source.choice((0.0, 0.01, 0.1))
                case 1:
                    proxy.is_deaf = not proxy.is_deaf
                case 2:
                    proxy.loses_replies = not proxy.loses_replies
                case 3:
                    proxy.cut()
                case 4:
                    is_stopped = not is_stopped
                    store.pause() if is_stopped else store.resume()
                case 5 if not is_stopped:
                    store.restart_empty()
                case _:
                    proxy.delay, proxy.is_deaf, proxy.loses_replies = 0.0, False, False
            for _ in range(4):
                requests += [asyncio.create_task(request(limiter)) for _ in range(source.randrange(1, 20))]
                await asyncio.sleep(0.01)
        await asyncio.gather(*requests)
        store.resume()
    # The lag is known when its timer has run, which may be after the request that it delayed.
    assert max(lateness.without(*wait) for wait in waits) < SHORT_DEADLINE + EPSILON
    assert len(waits) == len(requests)
