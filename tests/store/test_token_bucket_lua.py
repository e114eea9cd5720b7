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


def test_it_notifies_of_what_it_is_asked_to() -> None:
    store = LuaStore(START // 1000)
    store.call(["a"], "settle", 1, FREE.burst_ns, -SECOND, START, "publish", "refunds", "1 a")
    assert store.told == [("refunds", "1 a")]


def test_it_returns_its_clock_and_the_debt_of_each_bucket_before() -> None:
    store = LuaStore(START // 1000 + 7)
    words = (2, 1, FREE.burst_ns, SECOND, 2, FREE.burst_ns, 2 * SECOND, 1, 2, FREE.burst_ns, 0)
    assert store.call(["a", "b"], *words) == [START // 1000 + 7, 0, 0, 2 * SECOND]


def test_what_is_refused_or_free_is_not_written() -> None:
    store = LuaStore(START // 1000)
    for cost_ns, writes in ((0, 0), (11 * SECOND, 0), (10 * SECOND, 1), (SECOND, 1), (0, 1)):
        store.call(["a"], 1, 1, FREE.burst_ns, cost_ns)
        assert store.writes == writes
