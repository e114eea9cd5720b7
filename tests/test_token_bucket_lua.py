"""The script that decides in the store, its real text under a virtual clock, against the memory limiter."""

from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.models import NANOSECONDS, Charge, Quota
from api_gateway.rate_limiter import NEVER, MemoryLimiter
from tests.lua_store import LuaLimiter, LuaStore

SECOND = NANOSECONDS
START = 1_795_000_000 * SECOND
FREE = Quota.per_second("FREE", 1, 10)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
SLOW = Quota.per_second("SLOW", 0.5, 30)
THIRD = Quota.per_second("THIRD", 3, 7)

thorough = settings(deadline=None, max_examples=150)
microseconds = st.sampled_from((0, 1, 250_000, 1_000_000)) | st.integers(0, 30_000_000)
costs = st.sampled_from((0, 0.1, 0.5, 1, 1, 2.5)) | st.integers(0, 40)
quotas = st.sampled_from((FREE, PREMIUM, SLOW, THIRD)) | st.builds(
    Quota.per_second, st.just("drawn"), st.sampled_from((0.1, 3, 7, 100)) | st.floats(0.01, 5000), st.integers(1, 1000)
)


def charge(quota: Quota, cost: float = 1, key: str = "a") -> Charge:
    return Charge(key, quota, quota.cost_ns(cost))


@given(quota=quotas, steps=st.lists(st.tuples(microseconds, costs, st.sampled_from("ab")), min_size=1, max_size=40))
@thorough
def test_it_decides_as_the_memory_limiter_to_the_nanosecond(quota: Quota, steps: list[tuple[int, float, str]]) -> None:
    """Invariants 1 to 3, 8, 12 and 14: there they are held against exact fractions, here against that."""
    memory, lua, now_ns = MemoryLimiter([quota]), LuaLimiter(START), START
    for gap_us, cost, key in steps:
        now_ns += gap_us * 1000
        asked = [charge(quota, cost, key)]
        assert lua.decide(asked, now_ns) == memory.decide(asked, now_ns)


@given(steps=st.lists(st.tuples(microseconds, costs, costs), min_size=1, max_size=30))
@thorough
def test_several_buckets_are_charged_all_or_none(steps: list[tuple[int, float, float]]) -> None:
    """Invariant 13."""
    memory, lua, now_ns = MemoryLimiter([FREE, SLOW]), LuaLimiter(START), START
    for gap_us, cost, other in steps:
        now_ns += gap_us * 1000
        asked = [charge(FREE, cost, "client"), charge(SLOW, other, "peer")]
        assert lua.decide(asked, now_ns) == memory.decide(asked, now_ns)
        for key, quota in (("client", FREE), ("peer", SLOW)):
            assert lua.peek(key, quota, now_ns) == memory.preview(Charge(key, quota, 0), now_ns)


@given(increments=st.lists(st.integers(0, 4 * SECOND), min_size=1, max_size=20))
@thorough
def test_a_batch_is_the_same_as_a_sequence_at_one_instant(increments: list[int]) -> None:
    """Invariant 11."""
    at_once, one_by_one = LuaStore(START // 1000), LuaStore(START // 1000)
    words = [word for increment in increments for word in (1, 1, FREE.burst_ns, increment)]
    batched = at_once.call(["a"], *words)[1:]
    assert batched == [one_by_one.call(["a"], 1, 1, FREE.burst_ns, increment)[1] for increment in increments]
    assert at_once.values == one_by_one.values


@given(quota=quotas, cost=costs, later_us=microseconds)
@thorough
def test_a_key_lives_until_its_bucket_is_full_and_not_a_millisecond_less(
    quota: Quota, cost: float, later_us: int
) -> None:
    """Invariants 5 and 15: what is refused or free leaves no key; what is charged leaves one that expires."""
    lua = LuaLimiter(START)
    decision = lua.decide([charge(quota, cost)], START)
    left = lua.store.pttl("a")
    if not decision.allowed or cost == 0:
        assert left is None
    else:
        assert left is not None
        assert 0 <= left * 1_000_000 - decision.reset_ns + START % 1_000_000 < 1_000_000
    lua.store.now_us += later_us
    if lua.store.pttl("a") is None and decision.allowed:
        assert later_us * 1000 >= decision.reset_ns, "an absent key is a full bucket"


@given(spent=st.integers(1, 10), step_us=st.integers(1, 86_400_000_000), cost=st.integers(1, 10))
@thorough
def test_a_clock_that_steps_back_admits_nothing_more_and_heals(spent: int, step_us: int, cost: int) -> None:
    """Invariant 7: what is refused then is refused for one budget at most, and the cost."""
    lua = LuaLimiter(START)
    lua.decide([charge(FREE, spent)], START)
    back_ns = START - step_us * 1000
    decision = lua.decide([charge(FREE, cost)], back_ns)
    assert decision.allowed <= (spent + cost <= 10)
    assert decision.wait_ns <= FREE.burst_ns + FREE.cost_ns(cost)
    assert lua.decide([charge(FREE, cost)], back_ns + FREE.burst_ns + FREE.cost_ns(cost)).allowed


def test_an_hour_back_heals_with_the_first_look() -> None:
    lua = LuaLimiter(START)
    lua.decide([charge(FREE, 10)], START)
    back_ns = START - 3600 * SECOND
    assert lua.decide([charge(FREE)], back_ns).wait_ns == SECOND
    assert lua.decide([charge(FREE)], back_ns + SECOND).allowed


@given(old=quotas, new=quotas, share=st.floats(0, 1))
@thorough
def test_a_change_of_tier_keeps_the_share_of_the_bucket_that_is_filled(old: Quota, new: Quota, share: float) -> None:
    """Invariant 10; doubles may round once more to the stricter side."""
    memory, lua = MemoryLimiter([old, new]), LuaLimiter(START)
    spend = [Charge("a", old, int(share * old.burst_ns))]
    memory.decide(spend, START)
    lua.decide(spend, START)
    memory.change_quota("a", old, new, START)
    expected, found = memory.preview(Charge("a", new, 0), START), lua.peek("a", new, START)
    assert 0 <= found.reset_ns - expected.reset_ns <= max(2, new.burst_ns // 2**50)


@given(
    spent=st.integers(1, 10),
    change=st.integers(-12, 30),
    gap_us=microseconds,
    other=st.integers(0, 5),
)
@thorough
def test_settling_is_that_of_the_memory_limiter(spent: int, change: int, gap_us: int, other: int) -> None:
    memory, lua = MemoryLimiter([FREE]), LuaLimiter(START)
    decision = memory.decide([charge(FREE, spent)], START)
    assert lua.decide([charge(FREE, spent)], START) == decision
    now_ns = START + gap_us * 1000
    between = [charge(FREE, other)]
    assert lua.decide(between, now_ns) == memory.decide(between, now_ns)
    later = [Charge("a", FREE, change * FREE.emission_ns)]
    assert lua.settle(later, decision, now_ns) == memory.settle(later, decision, now_ns).reset_ns
    assert lua.peek("a", FREE, now_ns) == memory.preview(Charge("a", FREE, 0), now_ns)


def test_a_debt_that_is_told_empties_the_bucket_at_most() -> None:
    store = LuaStore(START // 1000)
    assert store.call(["a"], "debt", 1, FREE.burst_ns, 4 * SECOND, 1, 1, FREE.burst_ns, 0)[1] == 4 * SECOND
    assert store.call(["a"], "debt", 1, FREE.burst_ns, 40 * SECOND, 1, 1, FREE.burst_ns, 0)[1] == FREE.burst_ns


def test_what_costs_more_than_a_bucket_holds_is_never_charged() -> None:
    """Invariant 6."""
    lua = LuaLimiter(START)
    assert lua.decide([charge(FREE, 10.1)], START).wait_ns == NEVER
    assert lua.store.values == {}


def test_it_tells_what_it_is_asked_to_tell() -> None:
    store = LuaStore(START // 1000)
    store.call(["a"], "settle", 1, FREE.burst_ns, -SECOND, START, "told", "refunds", "1 a")
    assert store.told == [("refunds", "1 a")]


def test_the_published_table_of_throttled_and_redis_cell() -> None:
    """Five tokens, one a second (throttled rate_test.go, BSD-3-Clause; redis-cell src/cell/mod.rs, MIT)."""
    quota, lua = Quota.per_second("five", 1, 5), LuaLimiter(START)
    rows = [(0, 1, 4), (0, 1, 3), (0, 3, 0), (0, 1, None), (1000, 1, 0), (2900, 2, None), (3000, 2, 0), (9000, 0, 5)]
    for at, cost, remaining in rows:
        decision = lua.decide([charge(quota, cost)], START + at * 1_000_000)
        assert (decision.remaining if decision.allowed else None) == remaining, (at, cost)
