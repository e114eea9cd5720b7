"""How a target is chosen, the text of a refusal, and that every lease is returned exactly once."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import CircuitOpen, NoHealthyUpstream
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.upstreams.load_balancing import Picker, least_requests, rendezvous_hash, round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, Upstream
from tests.cases import each
from tests.examples import examples

NOW = 1000.0
KEYS = [f"client-{number}" for number in range(2000)]


def targets(**weights: int) -> list[Target]:
    return [Target(name, weight) for name, weight in weights.items()]


def upstream_of(pool: Sequence[Target], pick: Picker = round_robin, *, failure_threshold: int = 1) -> Upstream:
    policy = BreakerPolicy(failure_threshold=failure_threshold, recovery_timeout=30)
    return Upstream("users", pool, CircuitBreaker(policy, NOW), pick)


def urls(upstream: Upstream, count: int) -> str:
    return "".join(upstream.acquire(NOW, "").target.url for _ in range(count))


# Round robin


@each(
    ("weights", "turns"),
    [
        ({"a": 1}, "aaaa"),
        ({"a": 1, "b": 1, "c": 1}, "abcabc"),
        ({"a": 2, "b": 1}, "abaaba"),
        ({"a": 5, "b": 1, "c": 1}, "aabacaa" * 2),  # the example of nginx's own change
        ({"a": 3, "b": 2}, "ababa" * 2),
    ],
)
def test_round_robin_interleaves_by_weight(weights: dict[str, int], turns: str) -> None:
    assert urls(upstream_of(targets(**weights)), len(turns)) == turns


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=6))
@settings(max_examples=examples(50))
def test_round_robin_gives_each_its_weight_in_every_cycle(weights: list[int]) -> None:
    pool = [Target(str(number), weight) for number, weight in enumerate(weights)]
    for _ in range(2):
        counts = Counter(round_robin(pool, "").url for _ in range(sum(weights)))
        assert counts == {target.url: target.weight for target in pool}
        assert [target.credit for target in pool] == [0] * len(pool)


def test_round_robin_passes_over_what_is_unhealthy_and_takes_it_back() -> None:
    pool = targets(a=1, b=1, c=1)
    upstream = upstream_of(pool)
    pool[1].is_healthy = False
    assert urls(upstream, 4) == "acac"
    pool[1].is_healthy = True
    assert Counter(urls(upstream, 6)) == {"a": 2, "b": 2, "c": 2}


# Least requests


def test_least_requests_takes_the_less_loaded_of_two() -> None:
    idle, busy = targets(idle=1, busy=1)
    busy.in_flight = 1
    pick = least_requests(random.Random(1))
    assert {pick([idle, busy], "").url for _ in range(50)} == {"idle"}


@each(("small", "large", "chosen"), [(1, 2, "large"), (1, 3, "small"), (0, 1, "small")])
def test_least_requests_counts_load_per_weight(small: int, large: int, chosen: str) -> None:
    pool = [Target("small", 2, in_flight=small * 2), Target("large", 5, in_flight=large * 2)]
    pick = least_requests(random.Random(1))
    assert {pick(pool, "").url for _ in range(50)} == {chosen}


def test_least_requests_breaks_ties_by_chance() -> None:
    pick, pool = least_requests(random.Random(1)), targets(a=1, b=1, c=1, d=1)
    counts = Counter(pick(pool, "").url for _ in range(4000))
    assert all(900 < counts[target.url] < 1100 for target in pool)


def test_least_requests_never_takes_the_most_loaded() -> None:
    """Nor does it always take the least loaded, which would send every gateway to it at once."""
    pick, pool = least_requests(random.Random(1)), targets(a=1, b=1, c=1)
    for load, target in enumerate(pool):
        target.in_flight = load
    assert {pick(pool, "").url for _ in range(100)} == {"a", "b"}


def test_least_requests_has_no_choice_with_one_target() -> None:
    (only,) = targets(a=1)
    assert least_requests(random.Random(1))([only], "") is only


# Rendezvous hashing


def test_a_key_stays_with_its_target_whatever_the_order() -> None:
    pool = targets(a=1, b=1, c=1)
    home = {key: rendezvous_hash(pool, key) for key in KEYS}
    assert all(rendezvous_hash(pool[::-1], key) is home[key] for key in KEYS)


def test_losing_a_target_moves_only_its_own_keys() -> None:
    pool = targets(a=1, b=1, c=1, d=1)
    home = {key: rendezvous_hash(pool, key) for key in KEYS}
    rest = [target for target in pool if target.url != "b"]
    moved = {key for key in KEYS if rendezvous_hash(rest, key) is not home[key]}
    assert moved == {key for key in KEYS if home[key].url == "b"}


def test_the_keys_of_a_lost_target_spread_over_the_others() -> None:
    pool = targets(a=1, b=1, c=1, d=1)
    orphans = [key for key in KEYS if rendezvous_hash(pool, key).url == "b"]
    counts = Counter(rendezvous_hash([pool[0], *pool[2:]], key).url for key in orphans)
    assert all(counts[url] > len(orphans) / 5 for url in "acd")


def test_a_weight_is_a_share_of_the_keys() -> None:
    pool = targets(a=1, b=3)
    counts = Counter(rendezvous_hash(pool, key).url for key in KEYS)
    assert 0.70 < counts["b"] / len(KEYS) < 0.80


def test_more_weight_draws_keys_and_repels_none() -> None:
    before, after = targets(a=1, b=1, c=1), targets(a=1, b=2, c=1)
    moves = {(rendezvous_hash(before, key).url, rendezvous_hash(after, key).url) for key in KEYS}
    assert moves == {("a", "a"), ("b", "b"), ("c", "c"), ("a", "b"), ("c", "b")}


# Checkout


@each("pick", [round_robin, least_requests(random.Random(1)), rendezvous_hash])
@each("healthy", ["a", "bd", "acd"])
def test_an_unhealthy_target_is_never_chosen(pick: Picker, healthy: str) -> None:
    pool = targets(a=1, b=2, c=3, d=4)
    for target in pool:
        target.is_healthy = target.url in healthy
    upstream = upstream_of(pool, pick)
    assert {upstream.acquire(NOW, key).target.url for key in KEYS[:200]} == set(healthy)


@each("pick", [round_robin, least_requests(random.Random(1)), rendezvous_hash])
def test_a_retry_prefers_what_was_not_tried(pick: Picker) -> None:
    upstream = upstream_of(targets(a=1, b=1, c=1), pick)
    for key in KEYS[:50]:
        tried: list[Target] = []
        while len(tried) < 3:
            tried.append(upstream.acquire(NOW, key, tried).target)
        assert {target.url for target in tried} == {"a", "b", "c"}


def test_a_retry_takes_a_tried_target_rather_than_none() -> None:
    pool = targets(a=1, b=1)
    pool[1].is_healthy = False
    assert upstream_of(pool).acquire(NOW, "", tried=[pool[0]]).target is pool[0]


def test_targets_with_one_address_are_still_two() -> None:
    pool = [Target("a"), Target("a")]
    assert upstream_of(pool).acquire(NOW, "", tried=[pool[0]]).target is pool[1]


def test_without_a_healthy_target_there_is_no_upstream() -> None:
    pool = targets(a=1, b=1)
    for target in pool:
        target.is_healthy = False
    with pytest.raises(NoHealthyUpstream) as raised:
        upstream_of(pool).acquire(NOW, "")
    assert raised.value.detail == "Upstream 'users' has no healthy target: all 2 fail their health checks."
    assert (raised.value.retry_after, raised.value.extra) == (1, {"upstream": "users"})
    assert [target.in_flight for target in pool] == [0, 0]


def test_without_a_healthy_target_no_probe_is_used_up() -> None:
    (target,) = targets(a=1)
    upstream = opened([target])
    target.is_healthy = False
    with pytest.raises(NoHealthyUpstream):
        upstream.acquire(NOW + 30, "")
    assert (upstream.breaker.state, upstream.breaker.probes_in_flight) == (State.OPEN, 0)
    target.is_healthy = True
    assert upstream.acquire(NOW + 30, "").ticket.is_probe


# The breaker refuses


def opened(pool: Sequence[Target]) -> Upstream:
    """Return an upstream whose breaker opened at NOW, for 30 s."""
    upstream = upstream_of(pool)
    lease = upstream.acquire(NOW, "")
    assert lease.settle(Outcome.FAILURE, NOW, "status 503") is not None
    lease.release(NOW)
    return upstream


@each(("later", "retry_after", "next_probe"), [(0, 30, "30.0"), (17.5, 12.5, "12.5"), (29.5, 1, "0.5")])
def test_an_open_breaker_says_why_and_until_when(later: float, retry_after: float, next_probe: str) -> None:
    pool = targets(a=1)
    with pytest.raises(CircuitOpen) as raised:
        opened(pool).acquire(NOW + later, "")
    assert raised.value.detail == (
        "The circuit breaker of upstream 'users' is OPEN after 1 consecutive failures; last: status 503. "
        f"Next probe in {next_probe} s."
    )
    assert raised.value.retry_after == retry_after
    assert raised.value.extra == {"upstream": "users", "circuit_breaker": "OPEN"}
    assert pool[0].in_flight == 0


def test_a_half_open_breaker_reports_that_its_probes_are_in_progress() -> None:
    pool = targets(a=1)
    upstream = opened(pool)
    upstream.acquire(NOW + 30, "")
    with pytest.raises(CircuitOpen) as raised:
        upstream.acquire(NOW + 30, "")
    assert raised.value.detail == (
        "The circuit breaker of upstream 'users' is HALF_OPEN, and all its probes are in flight."
    )
    assert raised.value.retry_after == 1
    assert raised.value.extra == {"upstream": "users", "circuit_breaker": "HALF_OPEN"}
    assert pool[0].in_flight == 1


def test_an_open_breaker_without_a_past_names_no_cause() -> None:
    upstream = opened(targets(a=1))
    upstream.breaker.last_opened = None
    with pytest.raises(CircuitOpen, match=r"is OPEN\. Next probe in 30\.0 s\.$"):
        upstream.acquire(NOW, "")


# Leases


def test_a_lease_holds_its_target_until_released() -> None:
    (target,) = targets(a=1)
    upstream = upstream_of([target])
    one, other = upstream.acquire(NOW, ""), upstream.acquire(NOW, "")
    assert target.in_flight == 2
    one.settle(Outcome.SUCCESS, NOW)
    assert target.in_flight == 2
    one.release(NOW)
    other.release(NOW)
    assert target.in_flight == 0


@each("first", Outcome)
def test_only_the_first_settling_counts(first: Outcome) -> None:
    upstream = upstream_of(targets(a=1), failure_threshold=3)
    lease = upstream.acquire(NOW, "")
    lease.settle(first, NOW)
    for later in Outcome:
        assert lease.settle(later, NOW) is None
    lease.release(NOW)
    counted = {Outcome.SUCCESS: (1, 0), Outcome.FAILURE: (1, 1), Outcome.IGNORED: (0, 0)}
    assert upstream.breaker.window_counts(NOW)[:2] == counted[first]


def test_a_lease_returns_the_move_it_caused() -> None:
    move = upstream_of(targets(a=1)).acquire(NOW, "").settle(Outcome.FAILURE, NOW + 2, "status 500")
    assert move is not None
    assert (move.at, move.source, move.target) == (NOW + 2, State.CLOSED, State.OPEN)
    assert move.cause == "1 consecutive failures; last: status 500"


def test_a_released_probe_without_an_outcome_makes_room_for_the_next() -> None:
    upstream = opened(targets(a=1))
    upstream.acquire(NOW + 30, "").release(NOW + 30)
    assert (upstream.breaker.state, upstream.breaker.probes_in_flight) == (State.HALF_OPEN, 0)
    assert upstream.acquire(NOW + 30, "").settle(Outcome.SUCCESS, NOW + 30) is not None


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.sampled_from(Outcome)), max_size=60))
@settings(max_examples=examples(50))
def test_what_is_in_flight_is_what_is_leased(steps: list[tuple[bool, int, Outcome]]) -> None:
    pool, leases = targets(a=1, b=2), list[Attempt]()
    upstream = upstream_of(pool, least_requests(random.Random(1)), failure_threshold=1000)
    for gives_back, which, outcome in steps:
        if gives_back and leases:
            lease = leases.pop(which % len(leases))
            lease.settle(outcome, NOW)
            lease.release(NOW)
        else:
            leases.append(upstream.acquire(NOW, ""))
        assert [target.in_flight for target in pool] == [
            sum(one.target is target for one in leases) for target in pool
        ]


# How they show themselves


def test_reprs_show_the_state() -> None:
    pool = targets(a=1, b=2)
    pool[1].is_healthy = False
    upstream = opened(pool)
    assert repr(upstream) == "<Upstream 'users' [1 of 2 healthy, OPEN]>"
    assert repr(pool[1]) == ("Target(url='b', weight=2, is_healthy=False, in_flight=0)")


# Asked beforehand


@given(
    health=st.lists(st.booleans(), min_size=2, max_size=2),
    steps=st.lists(st.tuples(st.sampled_from((0.0, 5.0, 30.0)), st.none() | st.sampled_from(Outcome)), max_size=12),
)
def test_a_refusal_is_predicted_with_the_same_detail_and_without_a_transition(
    health: list[bool], steps: list[tuple[float, Outcome | None]]
) -> None:
    upstream, now = upstream_of(targets(a=2, b=1)), NOW
    for seconds, outcome in steps:
        now += seconds
        for target, is_healthy in zip(upstream.targets, health, strict=True):
            target.is_healthy = is_healthy
        held = [(target.in_flight, target.credit) for target in upstream.targets]
        state, rejected = upstream.breaker.state, upstream.breaker.rejected_total
        foretold = upstream.refusal(now)
        assert (upstream.breaker.state, upstream.breaker.rejected_total) == (state, rejected)
        assert [(target.in_flight, target.credit) for target in upstream.targets] == held
        if foretold is None:
            lease = upstream.acquire(now, "")
            if outcome is not None:  # else it never comes back
                lease.settle(outcome, now)
                lease.release(now)
            continue
        with pytest.raises((CircuitOpen, NoHealthyUpstream)) as raised:
            upstream.acquire(now, "")
        error = raised.value
        assert (type(foretold), foretold.detail, foretold.extra) == (type(error), error.detail, error.extra)
        assert foretold.retry_after == error.retry_after
