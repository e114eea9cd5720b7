"""The script that decides in the store, alone; test_limiter_invariants.py has what holds for every limiter."""

from api_gateway.models import NANOSECONDS, Quota
from tests.lua_store import LuaStore

SECOND = NANOSECONDS
START = 1_795_000_000 * SECOND
FREE = Quota.per_second("FREE", 1, 10)


def test_a_reported_debt_is_charged_up_to_the_stated_debt() -> None:
    """The last argument: that of an empty bucket, or twice that; a debt beyond it already is not reduced."""
    store = LuaStore(START // 1000)
    empty, most = FREE.burst_ns, 2 * FREE.burst_ns

    def debt_after(change_ns: int, most_ns: int) -> int:
        return store.call(["a"], "debt", 1, empty, change_ns, most_ns, 1, 1, empty, 0)[1]

    assert debt_after(4 * SECOND, empty) == 4 * SECOND
    assert debt_after(40 * SECOND, empty) == empty
    assert debt_after(4 * SECOND, most) == empty + 4 * SECOND
    assert debt_after(4 * SECOND, empty) == empty + 4 * SECOND
    assert debt_after(40 * SECOND, most) == most


def test_a_refund_gives_back_what_was_not_refilled_and_notifies_of_it() -> None:
    store = LuaStore(START // 1000)
    refund = "refund", 1, FREE.burst_ns
    store.call(["a"], 1, 1, FREE.burst_ns, 4 * SECOND)
    store.call(["a"], 1, 1, FREE.burst_ns, 3 * SECOND)
    store.now_us += 3_000_000
    # Of the first charge, which was owed until the fourth second, one second has not been refilled yet.
    assert store.call(["a"], *refund, 4 * SECOND, START + 4 * SECOND, "refunds", "x a")[1:] == [SECOND]
    assert store.call(["a"], 1, 1, FREE.burst_ns, 0)[1:] == [3 * SECOND]
    assert store.told == [("refunds", f"{SECOND} {store.now_us} x a")]
    store.now_us += 2_000_000
    assert store.call(["a"], *refund, 4 * SECOND, START + 4 * SECOND, "refunds", "x a")[1:] == [0]
    assert store.call(["b"], *refund, 4 * SECOND, START + 40 * SECOND, "refunds", "x b")[1:] == [0]
    assert len(store.told) == 1, "a refund of nothing is not published"


def test_it_returns_its_clock_and_the_debt_of_each_bucket_before() -> None:
    store = LuaStore(START // 1000 + 7)
    words = (2, 1, FREE.burst_ns, SECOND, 2, FREE.burst_ns, 2 * SECOND, 1, 2, FREE.burst_ns, 0)
    assert store.call(["a", "b"], *words) == [START // 1000 + 7, 0, 0, 2 * SECOND]


def test_what_is_refused_or_free_is_not_written() -> None:
    store = LuaStore(START // 1000)
    for cost_ns, writes in ((0, 0), (11 * SECOND, 0), (10 * SECOND, 1), (SECOND, 1), (0, 1)):
        store.call(["a"], 1, 1, FREE.burst_ns, cost_ns)
        assert store.writes == writes


def test_an_impossible_debt_is_that_of_an_empty_bucket() -> None:
    """As after a step back of the server's clock; twice the budget is possible, after a settlement."""
    store = LuaStore(START // 1000)
    burst = FREE.burst_ns
    store.call(["a"], "debt", 1, burst, 2 * burst, 2 * burst)
    assert store.call(["a"], 1, 1, burst, 0)[1] == 2 * burst
    store.now_us -= 1
    assert store.call(["a"], 1, 1, burst, 0)[1] == burst


def test_another_budget_keeps_the_filled_fraction_rounded_to_the_stricter_side() -> None:
    store = LuaStore(START // 1000)
    store.call(["a", "b"], 2, 1, FREE.burst_ns, 1, 2, FREE.burst_ns, 5 * SECOND)
    assert store.call(["a", "b"], 2, 1, 3 * SECOND, 0, 2, 3 * SECOND, 0)[1:] == [1, 1_500_000_001]
