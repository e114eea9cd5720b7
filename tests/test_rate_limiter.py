"""Quotas, and how the memory limiter keeps its buckets. test_limiter_invariants.py has what holds for all limiters."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from api_gateway.rate_limiter import (
    NEVER_NS,
    OVERFLOW_SLOTS,
    MemoryLimiter,
    joint_decision,
    rescale,
    take,
    take_each,
    tightest_of,
)
from tests.cases import each
from tests.exact_buckets import ExactBuckets, assert_conforms
from tests.examples import examples

SECOND = NANOSECONDS
MILLISECOND = SECOND // 1000
START = 1_000_000 * SECOND  # some uptime

FREE = Quota.per_second("FREE", 1, 10)
BASIC = Quota.per_second("BASIC", 5, 50)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
ENTERPRISE = Quota.per_second("ENTERPRISE", 100, 1000)
TIERS = (FREE, BASIC, PREMIUM, ENTERPRISE)  # all fill in 10 s
SLOW = Quota.per_second("SLOW", 0.5, 30)  # fills in 60 s
THIRD = Quota.per_second("THIRD", 3, 7)  # whose emission interval is not a whole number of nanoseconds

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
thorough = settings(max_examples=examples(150))
quick = settings(max_examples=examples(50))


class Unforgetting:
    """A limiter that keeps every bucket for ever."""

    def __init__(self) -> None:
        self.tats: dict[str, int] = {}

    def decide(self, charge: Charge, now_ns: int) -> Decision:
        after_ns, wait_ns = take(self.tats.get(charge.key, 0), charge.quota.burst_ns, charge.increment_ns, now_ns)
        if wait_ns == 0:
            self.tats[charge.key] = after_ns
        debt_ns = max(after_ns - now_ns, 0)
        remaining = max(charge.quota.burst_ns - debt_ns, 0) // charge.quota.emission_ns
        return Decision(charge.key, charge.quota, wait_ns == 0, remaining, wait_ns, debt_ns)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        if key in self.tats:
            self.tats[key] = rescale(self.tats[key], old, new, now_ns)


def charge(quota: Quota, cost: float = 1, key: str = "a") -> Charge:
    return Charge(key, quota, quota.cost_ns(cost))


def drained(quota: Quota, now_ns: int, key: str = "a", **options: int) -> MemoryLimiter:
    """Return a limiter whose bucket `key` has just been emptied."""
    limiter = MemoryLimiter([quota], **options)
    assert limiter.decide([charge(quota, quota.capacity, key)], now_ns).allowed
    return limiter


def entries(limiter: MemoryLimiter) -> tuple[dict[str, int], dict[str, int], dict[int, int]]:
    return dict(limiter._table.current), dict(limiter._table.previous), dict(limiter._overflow)


# Quota


@each(
    ("rate", "capacity", "emission_ns", "burst_ns"),
    [
        (1, 10, SECOND, 10 * SECOND),
        (100, 1000, 10 * MILLISECOND, 10 * SECOND),
        (0.5, 30, 2 * SECOND, 60 * SECOND),
        (0.1, 1, 10 * SECOND, 10 * SECOND),  # 0.1 means a tenth, not the double nearest to it
        (3, 7, 333_333_334, 2_333_333_338),
        (7, 1, 142_857_143, 142_857_143),
        (1_000_000, 1_000_000_000, 1000, 1_000_000_000_000),
        (3_000_000_000, 2, 1, 2),
    ],
)
def test_a_token_takes_its_share_of_a_second_rounded_up_to_a_nanosecond(
    rate: float, capacity: int, emission_ns: int, burst_ns: int
) -> None:
    quota = Quota.per_second("q", rate, capacity)
    assert (quota.emission_ns, quota.burst_ns) == (emission_ns, burst_ns)
    assert (quota.name, quota.rate, quota.capacity) == ("q", rate, capacity)


@each(
    ("quota", "cost", "cost_ns"),
    [
        (FREE, 0, 0),
        (FREE, 0.1, 100 * MILLISECOND),
        (FREE, 10, FREE.burst_ns),
        (SLOW, 1.5, 3 * SECOND),
        (THIRD, 0.5, 166_666_667),
        (THIRD, 0.1, 33_333_334),
        (THIRD, 7, THIRD.burst_ns),
        (FREE, 1e-12, 1),
    ],
)
def test_a_cost_takes_its_share_of_the_budget_rounded_up_to_a_nanosecond(
    quota: Quota, cost: float, cost_ns: int
) -> None:
    assert quota.cost_ns(cost) == cost_ns


@each(("rate", "capacity"), [(0, 1), (-1, 1), (math.nan, 1), (math.inf, 1), (1, 0), (1, -5)])
def test_an_impossible_quota_is_refused_by_name_and_value(rate: float, capacity: int) -> None:
    with pytest.raises(ValueError, match="quota 'GOLD'") as raised:
        Quota.per_second("GOLD", rate, capacity)
    assert f"{rate!r} and {capacity!r}" in str(raised.value)


# One bucket


@each(("key", "cost"), [("a", 0), ("a", 1), ("a", 11), ("unknown", 0), ("unknown", 11)])
def test_refusals_and_zero_costs_write_nothing(key: str, cost: float) -> None:
    limiter = drained(FREE, START)
    before = entries(limiter)
    limiter.decide([charge(FREE, cost, key)], START)
    assert entries(limiter) == before


def test_a_refusal_does_not_carry_a_bucket_into_the_next_generation() -> None:
    limiter = MemoryLimiter([FREE])
    limiter.decide([charge(FREE, 0)], START)
    limiter.decide([charge(FREE, 10)], START + 9 * SECOND)
    assert not limiter.decide([charge(FREE, 2)], START + 10 * SECOND).allowed
    assert not limiter.decide([charge(FREE, 2), charge(FREE, 1, "b")], START + 10 * SECOND).allowed
    assert entries(limiter) == ({}, {"a": START + 19 * SECOND}, {})


@pytest.mark.parametrize("key", ["a", "unknown"])
def test_peeking_writes_nothing_and_shows_the_bucket(key: str) -> None:
    limiter = drained(FREE, START)
    before = entries(limiter)
    seen = limiter.preview(Charge(key, FREE, 0), START + 2500 * MILLISECOND)
    assert entries(limiter) == before
    assert (seen.key, seen.quota, seen.allowed, seen.wait_ns) == (key, FREE, True, 0)
    assert (seen.remaining, seen.reset_ns) == ((2, 7500 * MILLISECOND) if key == "a" else (10, 0))


async def test_acquiring_is_deciding() -> None:
    limiter, twin = MemoryLimiter([FREE]), MemoryLimiter([FREE])
    for cost in (4, 0, 7, 11):
        answers: list[Decision] = []
        limiter.decide_async([charge(FREE, cost)], START, answers.append)
        assert answers == [twin.decide([charge(FREE, cost)], START)]
    assert entries(limiter) == entries(twin)


# Retry-After


@each(("wait_ns", "retry_after"), [(0, None), (NEVER_NS, None), (1, 1e-9), (SECOND, 1.0), (2_140_000_000, 2.14)])
def test_retry_after_is_the_wait_in_seconds(wait_ns: int, retry_after: float | None) -> None:
    assert Decision("a", FREE, wait_ns == 0, 0, wait_ns, 0).retry_after == retry_after


# Forgetting


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[int, str, Quota | None, float]]:
    """Draw (gap, key, quota to change to, cost): mostly charges, with long idle gaps and exact periods."""
    gap = st.sampled_from((0, 0, 5 * SECOND, 10 * SECOND, 10 * SECOND - 1, 20 * SECOND, 60 * SECOND))
    gap |= st.integers(0, 3 * SECOND) | st.integers(0, 130 * SECOND)
    change = st.none() | st.none() | st.sampled_from((*TIERS, SLOW, THIRD))
    return draw(st.lists(st.tuples(gap, st.sampled_from("abc"), change, costs), min_size=1, max_size=60))


@given(script=scripts())
@thorough
def test_forgetting_changes_no_decision(script: list[tuple[int, str, Quota | None, float]]) -> None:
    """Over idle gaps and tier changes, also to tiers with longer budgets than it was made for."""
    limiter, oracle, now_ns = MemoryLimiter(TIERS), Unforgetting(), START
    held = dict.fromkeys("abc", FREE)
    for gap_ns, key, change, cost in script:
        now_ns += gap_ns
        if change:
            limiter.change_quota(key, held[key], change, now_ns)
            oracle.change_quota(key, held[key], change, now_ns)
            held[key] = change
        peeked = limiter.preview(Charge(key, held[key], 0), now_ns)
        assert peeked == oracle.decide(Charge(key, held[key], 0), now_ns)
        asked = charge(held[key], cost, key)
        assert limiter.decide([asked], now_ns) == oracle.decide(asked, now_ns)


@each("pauses", [(10, 10), (20,), (1000,)], ids=["turn by turn", "both at once", "long after"])
def test_a_full_bucket_is_forgotten(pauses: tuple[int, ...]) -> None:
    limiter, now_ns = drained(FREE, START), START
    assert len(limiter) == 1
    for pause in pauses:
        now_ns += pause * SECOND
        limiter.decide([charge(FREE, 0, "other")], now_ns)
    assert len(limiter) == 0
    assert "a" not in limiter._table.current | limiter._table.previous


def test_a_bucket_is_kept_for_as_long_as_the_longest_budget_of_all() -> None:
    limiter = MemoryLimiter([FREE, SLOW, THIRD])
    limiter.decide([charge(SLOW, 30)], START)
    for second in (10, 20, 30, 40, 50):
        limiter.decide([charge(FREE, 1, "other")], START + second * SECOND)
        assert limiter.preview(Charge("a", SLOW, 0), START + second * SECOND).remaining == second / 2


def test_a_bucket_in_use_is_kept_across_generations() -> None:
    limiter = drained(FREE, START)
    for second in range(1, 60):
        assert limiter.decide([charge(FREE)], START + second * SECOND).allowed
        assert not limiter.decide([charge(FREE, 0.01)], START + second * SECOND).allowed
        assert 1 <= len(limiter) <= 2


@pytest.mark.parametrize("pauses", [(10, 10), (20,)], ids=["turn by turn", "at once"])
def test_what_was_forgotten_is_freed_a_few_entries_per_decision(pauses: tuple[int, ...]) -> None:
    """Faster than decisions can add, and never a whole generation at once."""
    limiter, now_ns = MemoryLimiter([FREE]), START
    for number in range(101):
        limiter.decide([charge(FREE, 1, f"old-{number}")], START)
    for pause in pauses:
        assert limiter._table.retired == []
        now_ns += pause * SECOND
        limiter.decide([charge(FREE, 0, "new")], now_ns)
    left = [sum(map(len, limiter._table.retired))]
    for number in range(12):
        limiter.decide([charge(FREE, 1, f"new-{number}")], now_ns)
        left.append(sum(map(len, limiter._table.retired)))
    assert left == [93, 85, 77, 69, 61, 53, 45, 37, 29, 21, 13, 5, 0]
    assert limiter._table.retired == []
    assert len(limiter) == 12


def test_two_generations_retired_at_once_are_both_freed() -> None:
    limiter = drained(FREE, START)
    limiter.decide([charge(FREE, 1, "b")], START + 10 * SECOND)
    for _ in range(3):
        limiter.decide([charge(FREE, 0)], START + 60 * SECOND)
        assert len(limiter) == 0
    assert limiter._table.retired == []


# Change of tier


@each(
    ("old", "new", "remaining", "reset"),
    [(FREE, ENTERPRISE, 500, 5), (ENTERPRISE, FREE, 5, 5), (FREE, SLOW, 15, 30), (SLOW, FREE, 5, 5)],
)
def test_a_change_of_tier_keeps_the_filled_share(old: Quota, new: Quota, remaining: int, reset: int) -> None:
    limiter = MemoryLimiter([old])
    limiter.decide([charge(old, old.capacity / 2)], START)
    limiter.change_quota("a", old, new, START)
    seen = limiter.preview(Charge("a", new, 0), START)
    assert (seen.remaining, seen.reset_ns) == (remaining, reset * SECOND)


@pytest.mark.parametrize("spent_before", [0, 9], ids=["untouched", "full again"])
def test_a_full_bucket_is_full_in_every_tier(spent_before: int) -> None:
    limiter = MemoryLimiter([FREE])
    limiter.decide([charge(FREE, spent_before)], START - 9 * SECOND)
    before = entries(limiter)
    limiter.change_quota("a", FREE, SLOW, START)
    assert limiter.preview(Charge("a", SLOW, 0), START).remaining == 30
    assert entries(limiter) == before


@given(old=quotas, new=quotas, debt=st.floats(0, 3))
@thorough
def test_rescaling_errs_to_the_stricter_side_by_less_than_a_nanosecond(old: Quota, new: Quota, debt: float) -> None:
    tat_ns = START + int(debt * old.burst_ns)
    owed = rescale(tat_ns, old, new, START) - START
    possible_ns = tat_ns - START if tat_ns - START <= 2 * old.burst_ns else old.burst_ns  # else it is empty now
    exact = Fraction(possible_ns, old.burst_ns) * new.burst_ns
    assert 0 <= owed - exact < 1


# Several buckets


def test_all_buckets_are_charged_and_the_first_is_reported() -> None:
    limiter = MemoryLimiter([FREE, SLOW])
    decision = limiter.decide([charge(FREE, 4, "client"), charge(SLOW, 4, "peer")], START)
    assert (decision.key, decision.allowed, decision.remaining, decision.reset_ns) == ("client", True, 6, 4 * SECOND)
    assert limiter.preview(Charge("peer", SLOW, 0), START).remaining == 26


@pytest.mark.parametrize("order", [("client", "peer"), ("peer", "client")])
def test_what_one_bucket_refuses_is_charged_to_none(order: tuple[str, str]) -> None:
    limiter = drained(FREE, START, "peer")
    decision = limiter.decide([charge(FREE, 1, key) for key in order], START)
    assert (decision.key, decision.allowed, decision.wait_ns) == ("peer", False, SECOND)
    assert limiter.preview(Charge("client", FREE, 0), START).remaining == 10


@each(
    ("asked", "binding", "wait_ns"),
    [
        ([charge(FREE, 2, "client"), charge(SLOW, 2, "peer")], "peer", 4 * SECOND),
        ([charge(FREE, 5, "client"), charge(SLOW, 1, "peer")], "client", 5 * SECOND),
        ([charge(FREE, 11, "client"), charge(SLOW, 30, "peer")], "client", NEVER_NS),
        ([charge(FREE, 10, "client"), charge(SLOW, 31, "peer")], "peer", NEVER_NS),
        ([charge(FREE, 0, "client"), charge(SLOW, 1, "peer")], "peer", 2 * SECOND),
    ],
)
def test_the_longest_refusal_binds_and_never_is_the_longest(asked: list[Charge], binding: str, wait_ns: int) -> None:
    limiter = MemoryLimiter([FREE, SLOW])
    limiter.decide([charge(FREE, 10, "client"), charge(SLOW, 30, "peer")], START)
    before = entries(limiter)
    decision = limiter.decide(asked, START)
    assert (decision.key, decision.allowed, decision.wait_ns) == (binding, False, wait_ns)
    assert entries(limiter) == before


# Bounded memory


@given(steps=st.lists(st.tuples(gaps, st.sampled_from("abcd"), costs), min_size=1, max_size=40))
@quick
def test_all_keys_of_a_shared_bucket_get_what_one_would(steps: list[tuple[int | None, str, float]]) -> None:
    with patch("api_gateway.rate_limiter.OVERFLOW_SLOTS", 1):
        limiter, exact, now_ns, told_ns = MemoryLimiter([FREE], bucket_limit=0), ExactBuckets(), START, 0
        for gap_ns, key, cost in steps:
            now_ns += told_ns if gap_ns is TOLD_WAIT else gap_ns
            decision = limiter.decide([charge(FREE, cost, key)], now_ns)
            assert decision == replace(exact.decide([charge(FREE, cost, "all")], now_ns), key=key)
            told_ns = max(decision.wait_ns, 0)
    assert len(limiter) == 0


@given(
    bucket_limit=st.integers(0, 3),
    slots=st.integers(1, 3),
    steps=st.lists(
        st.tuples(
            st.integers(0, 2 * SECOND) | st.integers(0, 25 * SECOND),
            st.lists(st.sampled_from("abcdef"), min_size=1, max_size=2, unique=True),
            st.sampled_from((FREE, SLOW)),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=60,
    ),
)
@thorough
def test_no_key_gains_by_a_full_table(
    bucket_limit: int, slots: int, steps: list[tuple[int, list[str], Quota, int]]
) -> None:
    """Wherever its bucket was kept meanwhile, a key gets its quota at most."""
    admitted: dict[tuple[str, str], list[tuple[int, Fraction]]] = {}
    with patch("api_gateway.rate_limiter.OVERFLOW_SLOTS", slots):
        limiter, now_ns = MemoryLimiter([FREE, SLOW], bucket_limit=bucket_limit), START
        for gap_ns, names, quota, cost in steps:
            now_ns += gap_ns
            keys = [f"{quota.name}:{name}" for name in names]
            if limiter.decide([charge(quota, cost, key) for key in keys], now_ns).allowed:
                for key in keys:
                    admitted.setdefault((key, quota.name), []).append((now_ns, Fraction(cost)))
            assert len(limiter) <= bucket_limit
            assert len(limiter._overflow) <= slots
    for (_, name), history in admitted.items():
        quota = FREE if name == "FREE" else SLOW
        assert_conforms(history, Fraction(quota.capacity), Fraction(1, quota.emission_ns))


def test_an_entry_made_later_starts_from_its_shared_bucket() -> None:
    limiter = MemoryLimiter([FREE], bucket_limit=1)
    limiter.decide([charge(FREE, 1, "resident")], START)
    limiter.decide([charge(FREE, 0, "resident")], START + 10 * SECOND)
    limiter.decide([charge(FREE, 8, "newcomer")], START + 15 * SECOND)
    assert (len(limiter), limiter.overflowed) == (1, 1)
    decision = limiter.decide([charge(FREE, 3, "newcomer")], START + 20 * SECOND)
    assert (list(limiter._table.current), limiter.overflowed) == (["newcomer"], 1)
    assert decision.remaining == 10 - 8 + 5 - 3


def test_a_resident_keeps_its_own_bucket_while_the_table_is_full() -> None:
    """Also across a change of generation."""
    limiter = MemoryLimiter([FREE], bucket_limit=1)
    for second in (0, 9, 10, 11, 19, 20, 21):
        limiter.decide([charge(FREE, 1, "resident")], START + second * SECOND)
        limiter.decide([charge(FREE, 1, f"stranger-{second}")], START + second * SECOND)
    assert "resident" in limiter._table.current
    assert "resident" not in limiter._table.previous
    assert limiter.overflowed == 7


def test_shared_buckets_are_forgotten_once_full() -> None:
    limiter = MemoryLimiter([FREE], bucket_limit=0)
    limiter.decide([charge(FREE, 10)], START)
    limiter.decide([charge(FREE, 0)], START + 10 * SECOND - 1)
    assert len(limiter._overflow) == 1
    limiter.decide([charge(FREE, 0)], START + 10 * SECOND)
    assert limiter._overflow == {}


def test_invented_ids_hold_no_more_than_the_limit() -> None:
    """20,000 of them within three generations; what is being freed counts too."""
    limiter, most = MemoryLimiter([FREE], bucket_limit=500), 0
    for number in range(20_000):
        decision = limiter.decide([charge(FREE, 1, f"invented-{number}")], START + number * MILLISECOND)
        assert decision.allowed or decision.wait_ns <= SECOND
        most = max(most, len(limiter))
        assert sum(map(len, limiter._table.retired)) <= 500
    assert most == 500
    assert limiter.overflowed > 10_000
    assert len(limiter._overflow) <= OVERFLOW_SLOTS


# A clock that steps back


def test_a_shared_bucket_heals_from_a_step_back_too() -> None:
    limiter = drained(FREE, START, bucket_limit=0)
    back_ns = START - 3600 * SECOND
    assert limiter.decide([charge(FREE)], back_ns).wait_ns == SECOND
    assert limiter.decide([charge(FREE)], back_ns + SECOND).allowed


def test_forgetting_goes_on_after_a_step_back() -> None:
    limiter = drained(FREE, START)
    back_ns = START - 3600 * SECOND
    for second in (0, 10, 20):
        limiter.decide([charge(FREE, 0, "other")], back_ns + second * SECOND)
    assert len(limiter) == 0


def test_a_smaller_budget_finds_an_older_debt_no_larger_than_itself() -> None:
    after_ns, wait_ns = take(START + SLOW.burst_ns, FREE.burst_ns, FREE.emission_ns, START)
    assert (after_ns, wait_ns) == (START + FREE.burst_ns, SECOND)


# How it shows itself


def test_its_repr_shows_how_full_it_is() -> None:
    limiter = MemoryLimiter([FREE], bucket_limit=2)
    assert repr(limiter) == "<MemoryLimiter [0 of 2 buckets, 0 overflowed]>"
    for key in "abc":
        limiter.decide([charge(FREE, 1, key)], START)
    assert repr(limiter) == "<MemoryLimiter [2 of 2 buckets, 1 overflowed]>"
    assert (len(limiter), limiter.bucket_limit, limiter.overflowed) == (2, 2, 1)


def test_a_limiter_without_quotas_still_decides() -> None:
    """All its tiers may come in later, by a change."""
    limiter = MemoryLimiter([])
    limiter.change_quota("a", FREE, FREE, START)
    limiter.decide([charge(FREE, 10)], START)
    assert not limiter.decide([charge(FREE)], START + SECOND - 1).allowed


# After the fact


def tat_of(limiter: MemoryLimiter, quota: Quota, now_ns: int, key: str = "a") -> int:
    return max(limiter._load(key, quota), now_ns)


settlements = st.lists(
    st.tuples(
        st.sampled_from((0, 1, MILLISECOND)) | st.integers(0, 12 * SECOND),  # gap
        st.sampled_from(("charge", "charge", "settle", "settle")),
        st.sampled_from((0, 0, 0.5, 1, 3, 7)) | st.integers(0, 20),  # the cost, or what it is settled to
        st.integers(0, 5),  # which of the open ones
    ),
    min_size=2,
    max_size=40,
)


@given(quota=st.sampled_from((FREE, SLOW, THIRD)), script=settlements)
@example(  # two that overlap, both given back, after the bucket was full in between
    quota=FREE,
    script=[
        (0, "charge", 5, 0),
        (1, "charge", 5, 0),
        (1, "settle", 0, 0),
        (5500 * MILLISECOND, "charge", 3, 0),
        (500 * MILLISECOND, "settle", 0, 0),
    ],
)
@thorough
def test_giving_back_never_leaves_more_than_had_it_not_been_charged(
    quota: Quota, script: list[tuple[int, str, float, int]]
) -> None:
    """The other world knows from the start what each request will have cost, if that is less."""
    limiter, now_ns = MemoryLimiter([quota]), START
    events: list[list[int]] = []  # time, and nanoseconds as it turned out
    open_: list[tuple[Decision, int, int]] = []
    for gap_ns, kind, cost, which in script:
        now_ns += gap_ns
        if kind == "charge":
            decision = limiter.decide([charge(quota, cost)], now_ns)
            if decision.allowed:
                events.append([now_ns, quota.cost_ns(cost)])
                open_.append((decision, quota.cost_ns(cost), len(events) - 1))
        elif open_:
            decision, charged_ns, event = open_.pop(which % len(open_))
            change_ns = quota.cost_ns(cost) - charged_ns
            if tat_of(limiter, quota, now_ns) + change_ns > now_ns + 2 * quota.burst_ns:
                change_ns = 0  # what is forgiven beyond two budgets is another test's
            limiter.settle([Charge("a", quota, change_ns)], decision, now_ns)
            if change_ns < 0:
                events[event][1] += change_ns
            else:
                events.append([now_ns, change_ns])
        other_ns = 0
        for at_ns, cost_ns in events:
            other_ns = max(other_ns, at_ns) + cost_ns
        assert tat_of(limiter, quota, now_ns) >= max(other_ns, now_ns)


@given(quota=quotas, spent=st.floats(0, 1), cost=st.floats(0, 1), gap_ns=st.integers(0, SECOND))
@quick
def test_what_is_given_back_at_once_is_as_if_never_charged(
    quota: Quota, spent: float, cost: float, gap_ns: int
) -> None:
    limiter, now_ns = MemoryLimiter([quota]), START
    limiter.decide([charge(quota, spent * quota.capacity)], now_ns)
    now_ns += gap_ns
    before = limiter.preview(Charge("a", quota, 0), now_ns)
    decision = limiter.decide([charge(quota, cost * quota.capacity)], now_ns)
    if decision.allowed:
        refund = Charge("a", quota, -quota.cost_ns(cost * quota.capacity))
        after = limiter.settle([refund], decision, now_ns)
        assert (after.remaining, after.reset_ns) == (before.remaining, before.reset_ns)
        assert limiter.preview(Charge("a", quota, 0), now_ns) == before


@given(quota=quotas, spent=st.floats(0, 1), more=st.floats(0, 3), cost=st.floats(0.001, 1))
@quick
def test_a_later_charge_delays_by_exactly_its_time_and_never_beyond_a_second_budget(
    quota: Quota, spent: float, more: float, cost: float
) -> None:
    limiter, more_ns = MemoryLimiter([quota]), quota.cost_ns(more * quota.capacity)
    decision = limiter.decide([charge(quota, spent * quota.capacity)], START)
    after = limiter.settle([Charge("a", quota, more_ns)], decision, START)
    owed_ns = min(decision.reset_ns + more_ns, 2 * quota.burst_ns)
    assert after.reset_ns == owed_ns
    assert after.allowed
    assert after.remaining == max(quota.burst_ns - owed_ns, 0) // quota.emission_ns
    asked = charge(quota, cost * quota.capacity)
    next_one = limiter.decide([asked], START)
    exact_ns = owed_ns + asked.increment_ns - quota.burst_ns
    assert next_one.wait_ns == (NEVER_NS if asked.increment_ns > quota.burst_ns else max(exact_ns, 0))


def test_a_debt_is_remembered_until_it_is_paid() -> None:
    """Longer than a bucket can be empty: generations turn more slowly for it."""
    limiter, twin = MemoryLimiter([FREE]), Unforgetting()
    decision = limiter.decide([charge(FREE, 10)], START)
    limiter.settle([charge(FREE, 10)], decision, START)
    twin.tats["a"] = START + 20 * SECOND
    for after in (1, 9, 10, 11, 15, 19, 20, 21, 40):
        now_ns = START + after * SECOND
        assert limiter.decide([charge(FREE, 0, "other")], now_ns).allowed
        assert limiter.preview(Charge("a", FREE, 0), now_ns) == twin.decide(Charge("a", FREE, 0), now_ns)


def test_a_debt_is_remembered_until_it_is_paid_also_under_a_tier_with_a_longer_budget() -> None:
    limiter = MemoryLimiter([FREE, SLOW])
    limiter.decide([charge(FREE, 0)], START)
    decision = limiter.decide([charge(FREE, 10)], START + 1)
    limiter.settle([charge(FREE, 10)], decision, START + 1)
    limiter.change_quota("a", FREE, SLOW, START + 1)  # it owes two budgets, of 60 s now
    assert limiter.preview(Charge("a", SLOW, 0), START + 1).reset_ns == 120 * SECOND
    assert not limiter.decide([charge(SLOW, 30)], START + 120 * SECOND).allowed
    assert limiter.decide([charge(SLOW, 30)], START + 120 * SECOND + 1).allowed


def test_all_buckets_of_a_request_are_settled_each_by_its_own_debt() -> None:
    limiter = MemoryLimiter([FREE, SLOW])
    limiter.decide([charge(SLOW, 4, "b")], START)
    decision = limiter.decide([charge(FREE, 2), charge(SLOW, 2, "b")], START + SECOND)
    back = [Charge("a", FREE, -FREE.cost_ns(2)), Charge("b", SLOW, -SLOW.cost_ns(2))]
    after = limiter.settle(back, decision, START + SECOND)
    assert after.debts_ns == (0, 7 * SECOND)
    assert limiter.preview(Charge("b", SLOW, 0), START + SECOND).reset_ns == 7 * SECOND


def test_a_settlement_reports_the_tightest_bucket_by_what_it_was_settled_to() -> None:
    limiter = MemoryLimiter([FREE, SLOW])
    asked = [charge(FREE, 1), charge(SLOW, 1, "b")]
    decision = limiter.decide(asked, START)
    assert decision.key == "a"
    dear = [charge(FREE, 1), charge(SLOW, 28, "b")]
    changes = [Charge("a", FREE, 0), Charge("b", SLOW, SLOW.cost_ns(27))]
    after = limiter.settle(changes, decision, START, dear)
    assert (after.key, after.quota, after.remaining, after.reset_ns) == ("b", SLOW, 2, 56 * SECOND)
    assert after.debts_ns == (SECOND, 56 * SECOND)
    same = limiter.settle([Charge("a", FREE, 0), Charge("b", SLOW, -SECOND)], after, START)
    assert (same.key, same.reset_ns) == ("b", 55 * SECOND)


@each(
    ("costs", "key"),
    [((1, 1, 1), "c"), ((1, 8, 0), "b"), ((0, 0, 1), "c"), ((0, 0, 0), "a"), ((5, 15, 3.5), "a")],
)
def test_the_tightest_bucket_has_tokens_for_the_fewest_further_requests(costs: Sequence[float], key: str) -> None:
    asked = [charge(quota, cost, name) for quota, cost, name in zip((FREE, SLOW, THIRD), costs, "abc", strict=True)]
    found = MemoryLimiter([FREE, SLOW, THIRD]).decide(asked, START)
    assert found.key == key
    further = [(one.quota.burst_ns - debt_ns, one) for one, debt_ns in zip(asked, found.debts_ns, strict=True)]
    (chosen,) = (one for one in asked if one.key == key)
    left_ns = next(left for left, one in further if one is chosen)
    for other_ns, one in further:
        assert not one.increment_ns or other_ns * chosen.increment_ns >= left_ns * one.increment_ns
    assert found == joint_decision(asked, take_each([0, 0, 0], asked, START), START)


def test_what_is_remembered_of_refunds_is_bounded_and_forgotten() -> None:
    limiter, now_ns = MemoryLimiter([FREE]), START
    first = limiter.decide([charge(FREE, 1)], now_ns)
    for _ in range(1000):
        now_ns += 1
        decision = limiter.decide([charge(FREE, 1)], now_ns)
        limiter.settle([Charge("a", FREE, -SECOND)], decision, now_ns + 1)
        assert limiter.preview(Charge("a", FREE, 0), now_ns + 1).remaining == 9
    assert len(limiter._refunds._current["a"]) <= 32
    limiter.settle([Charge("a", FREE, -SECOND)], first, now_ns)
    assert len(limiter._refunds) == 1
    for later in (30, 60, 61):
        limiter.decide([charge(FREE, 1)], now_ns + later * SECOND)
    assert len(limiter._refunds) == 0
    assert not limiter._table.retired


def test_the_tightest_of_buckets_with_different_rates_is_that_of_the_fewest_requests() -> None:
    """Five requests are left of the one, and twenty of the other, which needs less time for each."""
    slow, fast = Quota.per_second("slow", 1, 10), Quota.per_second("fast", 20, 200)
    charges = [Charge("a", fast, fast.cost_ns(1)), Charge("b", slow, slow.cost_ns(1))]
    assert tightest_of(charges, [9 * SECOND, 5 * SECOND]) == 1
    assert tightest_of(charges, [SECOND * 39 // 4, SECOND]) == 0
