"""Buckets under changed quotas: each stays filled to the same fraction, however late it is used."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.assembly.stores import PreviousQuotas, Quotas
from api_gateway.clients.client_tiers import PreviousClients
from api_gateway.config import from_values
from api_gateway.models import Charge, Client, Quota
from api_gateway.rate_limiter import MemoryLimiter
from tests.cases import each

SECOND = 1_000_000_000
START = 10_000 * SECOND

quotas = st.builds(
    lambda rate, capacity: Quota.per_second("tier", rate, capacity),
    st.sampled_from((0.1, 1, 3, 20)),
    st.integers(1, 50),
)


def charge(quota: Quota, cost: float = 1, key: str = "a") -> Charge:
    return Charge(key, quota, quota.cost_ns(cost))


@given(
    before=quotas,
    changes=st.lists(st.tuples(quotas, st.integers(0, 30 * SECOND)), min_size=1, max_size=4),
    spent=st.integers(0, 50),
    used_after=st.integers(0, 60 * SECOND),
)
def test_a_bucket_that_is_used_late_is_what_it_would_be_had_it_been_converted_at_once(
    before: Quota, changes: list[tuple[Quota, int]], spent: int, used_after: int
) -> None:
    late, at_once = MemoryLimiter([before]), MemoryLimiter([before])
    now = START
    for limiter in (late, at_once):
        for _ in range(min(spent, before.capacity)):
            limiter.decide([charge(before)], now)
    quota = before
    for after, gap in changes:
        now += gap
        late.change_quotas([after], lambda _key, _present, old=quota: old, now)  # type: ignore[misc]
        at_once.change_quota("a", quota, after, now)
        quota = after
    now += used_after
    assert late.preview(charge(quota), now) == at_once.preview(charge(quota), now)
    assert late.decide([charge(quota)], now) == at_once.decide([charge(quota)], now)
    assert late.decide([charge(quota)], now) == at_once.decide([charge(quota)], now)


FREE, PAID = Quota.per_second("FREE", 1, 10), Quota.per_second("PAID", 10, 1000)


@pytest.fixture
def emptied() -> MemoryLimiter:
    limiter = MemoryLimiter([FREE])
    for key in "abc":
        for _ in range(10):
            limiter.decide([charge(FREE, 1, key)], START)
    limiter.change_quotas([PAID], lambda _key, _present: FREE, START)
    return limiter


def test_an_empty_bucket_stays_empty_and_is_counted(emptied: MemoryLimiter) -> None:
    assert len(emptied) == 3
    assert not emptied.decide([charge(PAID, 1, "a")], START).allowed
    assert len(emptied) == 3
    assert emptied.decide([charge(PAID, 1, "new")], START).remaining == 999


def test_a_bucket_that_is_refilled_after_the_change_is_full(emptied: MemoryLimiter) -> None:
    emptied.reset("a")
    assert emptied.decide([charge(PAID, 1, "a")], START).remaining == 999
    assert not emptied.decide([charge(PAID, 1, "b")], START).allowed


def test_what_is_never_used_again_is_forgotten_in_time(emptied: MemoryLimiter) -> None:
    now = START
    for _ in range(2000):
        now += SECOND
        emptied.decide([charge(PAID, 1, "other")], now)
    assert len(emptied) <= 2


def test_requests_of_several_buckets_convert_each(emptied: MemoryLimiter) -> None:
    charges = [charge(PAID, 1, key) for key in "ab"]
    assert not emptied.decide(charges, START).allowed
    assert emptied.decide(charges, START + PAID.emission_ns).allowed


def converted(limiter: MemoryLimiter, pairs: Iterable[tuple[Quota, Quota]]) -> None:
    for old, new in pairs:
        limiter.change_quotas([new], lambda _key, _present, old=old: old, START)  # type: ignore[misc]


def test_changing_back_and_forth_gains_nothing() -> None:
    limiter = MemoryLimiter([FREE])
    for _ in range(7):
        limiter.decide([charge(FREE)], START)
    converted(limiter, [(FREE, PAID), (PAID, FREE)] * 3)
    assert limiter.decide([charge(FREE, 0)], START).remaining == 3


# Limits, by name


def limits_with(**terms: Any) -> dict[str, Any]:
    limit = {"name": "own", "rate": 1, "capacity": 10} | terms
    return {"limits": [limit], "clients": {"rich": {"tier": "PREMIUM"}}}


@each(
    ("before", "after", "key", "left"),
    [
        ({}, {"capacity": 30}, "limit:own:client:a", 12),
        ({}, {"rate": 2}, "limit:own:client:a", 4),
        ({"key": "address"}, {"key": "address", "capacity": 20}, "limit:own:192.0.2.7", 8),
        ({}, {"tiers": {"PREMIUM": {"rate": 1, "capacity": 20}}}, "limit:own:client:rich", 8),
        ({"tiers": {"PREMIUM": {"rate": 1, "capacity": 20}}}, {}, "limit:own:client:rich", 4),
        (
            {"key": "address", "tiers": {"PREMIUM": {"rate": 1, "capacity": 20}}},
            {"key": "address", "tiers": {"PREMIUM": {"rate": 1, "capacity": 5}}},
            "limit:own:PREMIUM:192.0.2.7",
            2,
        ),
    ],
)
def test_the_buckets_of_a_limit_stay_filled_to_the_same_fraction(
    before: dict[str, Any], after: dict[str, Any], key: str, left: int
) -> None:
    old, new = (Quotas.of(from_values(limits_with(**terms))) for terms in (before, after))
    tier = "PREMIUM" if "rich" in key or "PREMIUM" in key else "FREE"
    (was,), (now,) = ((one.quota_of(tier),) for quotas in (old, new) for one in quotas.limits)
    assert was is not None
    assert now is not None
    rich = Client("rich", "client:rich", old.tiers["PREMIUM"], "configured")
    clients = PreviousClients(old.tiers, old.tiers["FREE"], {}, {"rich": rich})
    limiter = MemoryLimiter(old.all)
    limiter.decide([charge(was, was.capacity * 0.6, key)], START)
    limiter.change_quotas(new.all, PreviousQuotas(old, clients).of, START)
    assert limiter.preview(charge(now, 0, key), START).remaining == left


def test_a_limit_that_is_new_begins_with_full_buckets_and_a_candidates_are_converted_too() -> None:
    candidate = {"candidate": {"rate": 1, "capacity": 4}}
    old, new = (
        Quotas.of(from_values(limits_with(**terms)))
        for terms in (candidate, {"candidate": {"rate": 1, "capacity": 8}})
    )
    tried, now = old.limits[0].candidates["own"], new.limits[0].candidates["own"]
    limiter = MemoryLimiter(old.all)
    limiter.decide([charge(tried, 2, "candidate:limit:own:client:a")], START)
    clients = PreviousClients(old.tiers, old.tiers["FREE"], {}, {})
    limiter.change_quotas(new.all, PreviousQuotas(old, clients).of, START)
    assert limiter.preview(charge(now, 0, "candidate:limit:own:client:a"), START).remaining == 4
    assert limiter.preview(charge(now, 0, "limit:other:client:a"), START).remaining == 8
