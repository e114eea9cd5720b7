"""Which requests are admitted near the concurrency limit, which are refused first, and the text of the refusal."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import CircuitOpen, LoadShed, Reason, problem
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.event_loop_limit import LAG_SAMPLES, EventLoopShedder
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, Upstream
from tests.cases import each

NOW = 1000.0
TIERS = PriorityClasses({"FREE": 1, "BASIC": 5, "PREMIUM": 20, "ENTERPRISE": 100})
FREE, BASIC, PREMIUM, ENTERPRISE = range(4)


def limit_of(places: float, priorities: PriorityClasses = TIERS) -> ConcurrencyLimit:
    return ConcurrencyLimit(places, priorities, source=random.Random(1))


def upstream_of(limit: ConcurrencyLimit | None, *, failure_threshold: int = 1) -> Upstream:
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=failure_threshold, recovery_timeout=30), NOW)
    return Upstream("users", [Target("a"), Target("b")], breaker, round_robin, limit=limit)


# Priorities


def test_the_shares_rise_evenly_from_one_half_to_the_whole() -> None:
    assert TIERS.shares == pytest.approx((1 / 2, 2 / 3, 5 / 6, 1))
    assert PriorityClasses({"A": 1, "B": 2, "C": 3}).shares == (0.5, 0.75, 1)
    assert PriorityClasses({"A": 1}).shares == SINGLE_PRIORITY.shares == (1,)


def test_tiers_are_ordered_by_rank_and_those_of_one_rank_share_a_priority() -> None:
    priorities = PriorityClasses({"GOLD": 9, "A": 1, "B": 1, "SILVER": 4})
    assert [priorities.of(tier) for tier in ("A", "B", "SILVER", "GOLD")] == [0, 0, 1, 2]
    assert [priorities.name(priority) for priority in range(len(priorities))] == ["A or B", "SILVER", "GOLD"]
    assert priorities.of("unknown") == 0
    assert repr(priorities) == "<PriorityClasses ['A or B', 'SILVER', 'GOLD']>"


@given(ranks=st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_the_highest_priority_has_the_whole_limit_and_none_less_than_a_lower_one(ranks: list[float]) -> None:
    priorities = PriorityClasses({str(number): rank for number, rank in enumerate(ranks)})
    assert priorities.shares[-1] == 1
    assert list(priorities.shares) == sorted(priorities.shares)
    assert min(priorities.shares) >= 0.5
    for number, rank in enumerate(ranks):
        assert all(
            priorities.of(str(number)) >= priorities.of(str(other)) for other, its in enumerate(ranks) if its <= rank
        )


# The limit


@given(
    places=st.floats(1, 200),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 1000)), max_size=300),
)
def test_a_priority_is_admitted_exactly_while_less_than_its_share_is_in_flight(
    places: float, steps: list[tuple[bool, int, int]]
) -> None:
    upstream, leases = upstream_of(limit_of(places)), list[Attempt]()
    limit = upstream.limit
    assert limit is not None
    for gives_back, priority, which in steps:
        if gives_back and leases:
            leases.pop(which % len(leases)).release(NOW)
        elif len(leases) < places * TIERS.shares[priority]:
            leases.append(upstream.acquire(NOW, "", priority=priority))
        else:
            with pytest.raises(LoadShed):
                upstream.acquire(NOW, "", priority=priority)
        assert limit.in_flight == len(leases) == sum(target.in_flight for target in upstream.targets)


@given(places=st.integers(1, 100), flood=st.lists(st.integers(0, 2), max_size=300))
def test_no_flood_of_lower_priorities_takes_the_last_permits_of_the_highest(places: int, flood: list[int]) -> None:
    limit = limit_of(places)
    for priority in flood:
        if limit.admits(priority):
            limit.acquire(priority)
    kept = places - limit.in_flight
    assert kept >= int(places * (1 - TIERS.shares[PREMIUM]))
    for _ in range(kept):
        assert limit.admits(ENTERPRISE)
        limit.acquire(ENTERPRISE)
    assert not limit.admits(ENTERPRISE)


def test_without_a_limit_everything_goes() -> None:
    upstream = upstream_of(None)
    assert len([upstream.acquire(NOW, "", priority=FREE) for _ in range(1000)]) == 1000
    assert upstream.concurrency.limit is None
    assert upstream.concurrency.in_flight == 1000


def test_a_refusal_names_upstream_tier_limit_and_requests_in_flight() -> None:
    upstream = upstream_of(limit_of(4))
    leases = [upstream.acquire(NOW, "", priority=ENTERPRISE) for _ in range(3)]
    with pytest.raises(LoadShed) as raised:
        upstream.acquire(NOW, "", priority=BASIC)
    error = raised.value
    assert (error.status, error.reason, error.is_retry_safe) == (503, Reason.OVERLOADED, True)
    assert error.detail == (
        "Upstream 'users' is overloaded: 3 of at most 4 requests are in flight, and requests of tier BASIC are"
        " admitted below 3."
    )
    body = problem(error, instance="/api/users")
    told = ("upstream", "tier", "concurrency_limit", "tier_concurrency_limit", "in_flight")
    assert [body[key] for key in told] == ["users", "BASIC", 4, 3, 3]
    assert len(leases) == 3


def test_retry_after_is_random_from_one_to_three_whole_seconds() -> None:
    limit, lag = limit_of(1), lagging(0.5)
    for refusals in ([limit.refusal("users", FREE) for _ in range(300)], [lag.refusal(FREE) for _ in range(300)]):
        told = Counter(error.headers["retry-after"] for error in refusals)
        assert set(told) == {"1", "2", "3"}
        assert min(told.values()) > 60


def test_a_shed_request_uses_no_probe_of_the_breaker() -> None:
    upstream = upstream_of(limit_of(2))
    held = [upstream.acquire(NOW, "", priority=ENTERPRISE) for _ in range(2)]
    held[0].settle(Outcome.FAILURE, NOW)
    with pytest.raises(LoadShed):
        upstream.acquire(NOW + 30, "", priority=ENTERPRISE)
    assert upstream.breaker.probes_in_flight == 0
    for lease in held:
        lease.release(NOW + 30)
    assert upstream.acquire(NOW + 30, "", priority=ENTERPRISE).ticket.is_probe


def test_a_request_that_the_breaker_rejects_takes_no_permit() -> None:
    upstream = upstream_of(limit_of(2))
    upstream.acquire(NOW, "").settle(Outcome.FAILURE, NOW)
    with pytest.raises(CircuitOpen):
        upstream.acquire(NOW, "", priority=ENTERPRISE)
    assert upstream.concurrency.in_flight == 1


def test_a_refusal_is_predicted_without_taking_a_permit() -> None:
    upstream = upstream_of(limit_of(2))
    assert upstream.refusal(NOW, FREE) is None
    upstream.acquire(NOW, "")
    told = upstream.refusal(NOW, FREE)
    assert isinstance(told, LoadShed)
    assert ": 1 of at most 2 requests" in told.detail
    assert upstream.refusal(NOW, ENTERPRISE) is None
    assert upstream.concurrency.in_flight == 1


# The event loop's lag


def lagging(seconds: float, most: float | None = 0.25, priorities: PriorityClasses = TIERS) -> EventLoopShedder:
    """Return a limit whose loop has run late by so much for a while."""
    lag = EventLoopShedder(most, priorities, source=random.Random(1))
    for _ in range(LAG_SAMPLES):
        lag.observe(seconds)
    return lag


@each(
    ("times", "shares"),
    [
        (0.5, (0, 0, 0, 0)),
        (1.0, (0, 0, 0, 0)),
        (1.25, (0.5, 0, 0, 0)),
        (1.5, (1, 0, 0, 0)),
        (1.75, (1, 0.5, 0, 0)),
        (2.5, (1, 1, 1, 0)),
        (2.75, (1, 1, 1, 0.5)),
        (100, (1, 1, 1, 0.9)),
    ],
)
def test_the_higher_the_lag_the_more_priorities_are_shed_the_highest_last_and_never_all_of_it(
    times: float, shares: tuple[float, ...]
) -> None:
    lag = lagging(times * 0.25)
    assert tuple(lag.share(priority) for priority in range(4)) == pytest.approx(shares)
    for priority, share in enumerate(shares):
        assert sum(lag.sheds(priority) for _ in range(2000)) / 2000 == pytest.approx(share, abs=0.05)


def test_one_or_two_stalls_shed_no_request() -> None:
    """As a pause of the garbage collector, a machine that was asleep, and the first moments of the process are."""
    lag = EventLoopShedder(0.25, TIERS, source=random.Random(1))
    for number in range(100):
        lag.observe(30.0 if number % LAG_SAMPLES in (0, 1) else 0.001)
        assert not lag.is_over
        assert not lag.sheds(FREE)


def test_a_lasting_lag_is_detected_at_the_third_sample_and_so_is_its_end() -> None:
    lag = lagging(0.001)
    states = []
    for seconds in (1.0, 1.0, 1.0, 0.0, 0.0, 0.0):
        lag.observe(seconds)
        states.append(lag.is_over)
    assert states == [False, False, True, True, True, False]


def test_without_a_maximum_nothing_is_shed_and_the_lag_is_still_measured() -> None:
    lag = lagging(60.0, most=None)
    assert not lag.is_over
    assert lag.lag == 60.0
    assert lag.share(FREE) == 0


def test_its_refusal_says_that_it_is_the_gateway() -> None:
    error = lagging(0.3125).refusal(FREE)
    assert (error.status, error.reason) == (503, Reason.OVERLOADED)
    assert error.detail == (
        "The gateway itself is overloaded: its event loop runs 0.31 s late, and the limit is 0.25 s."
        " 50% of the requests of tier FREE are refused."
    )
    assert error.extra == {"tier": "FREE", "event_loop_lag_seconds": 0.312, "max_event_loop_lag_seconds": 0.25}
    assert "of tier" not in lagging(0.5, priorities=SINGLE_PRIORITY).refusal(0).detail


def test_reprs_show_the_state() -> None:
    limit = limit_of(7)
    limit.acquire(FREE)
    assert repr(limit) == "<ConcurrencyLimit [1 of 7]>"
    assert not limit.is_adaptive
    assert repr(lagging(0.5)) == "<EventLoopShedder [0.500 of 0.25 s]>"
