"""Which records are kept: all at low rates, so many a second at any rate, and always those of clients with few."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from api_gateway.observability.record_budget import RecordBudget

RATE, MOST = 10.0, 400  # a burst of 200 records


def kept(budget: RecordBudget, principal: str, start: float, seconds: float, rate: float) -> list[float]:
    """Send records of a client at a rate; return the times of those that were kept."""
    times = [start + number / rate for number in range(round(seconds * rate))]
    return [now for now in times if budget.takes(principal, now)]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3)), max_size=300), st.floats(1, 100), st.integers(8, 60))
def test_no_span_of_time_has_more_records_than_the_rate_and_one_burst(
    arrivals: list[tuple[int, float]], rate: float, most: int
) -> None:
    budget, now, times = RecordBudget(rate, most), 1000.0, []
    for principal, gap in arrivals:
        now += gap / rate
        if budget.takes(str(principal), now):
            times.append(now)
    for first, begin in enumerate(times):
        for last, end in enumerate(times[first:], first):
            assert last - first + 1 <= (end - begin) * rate + most / 2 + 1 + 1e-6


def test_at_the_rate_every_record_is_kept_of_one_client_or_of_many() -> None:
    budget = RecordBudget(RATE, MOST)
    assert len(kept(budget, "only", 1000.0, 600, RATE * 0.999)) == round(600 * RATE * 0.999)
    assert all(budget.takes(f"client-{number % 50}", 2000.0 + number / RATE) for number in range(5_000))


def test_a_burst_of_half_a_ring_is_kept_if_each_client_keeps_to_its_part() -> None:
    budget = RecordBudget(RATE, MOST)
    taken = sum(budget.takes(f"client-{number}", 1000.0) for number in range(1_000))
    assert MOST / 2 <= taken <= MOST / 2 + 1


def test_a_client_with_few_records_is_kept_beside_a_flood() -> None:
    """Also beside several, and each of those has its records spread over the time."""
    budget, quiet = RecordBudget(RATE, MOST), list[bool]()
    floods: dict[str, list[float]] = {"a": [], "b": []}
    for number in range(20_000):  # 100 seconds, in which each flood sends 100 records a second
        now = 1000.0 + number / 200
        principal = "ab"[number % 2]
        if budget.takes(principal, now):
            floods[principal].append(now)
        if number % 200 == 100:
            quiet.append(budget.takes("quiet", now))
    assert all(quiet)
    assert len(quiet) == 100
    total = sum(map(len, floods.values()))
    assert 0.8 * 100 * RATE <= total <= 100 * RATE + MOST / 2
    for times in floods.values():
        assert max(after - before for before, after in pairwise(times)) < 8 / RATE + 0.02


def test_invented_ids_are_bounded_together_and_remembered_in_bounded_memory() -> None:
    budget = RecordBudget(1_000.0, 10_000)
    taken = sum(budget.takes(f"invented-{number}", 1000.0 + number / 10_000) for number in range(20_000))
    assert 4_096 < taken <= 2 * 1_000 + 5_000 + 1
    assert len(budget._dues) <= 4_096


def test_a_reload_changes_rate_and_size() -> None:
    budget = RecordBudget(RATE, MOST)
    kept(budget, "a", 1000.0, 10, 1_000)
    budget.change(1_000, 100_000)
    assert len(kept(budget, "a", 1010.0, 10, 999)) == 9_990
