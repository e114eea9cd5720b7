"""Which targets are eligible: ejection within its limits, probes by live requests, and slow start."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.errors import NoHealthyUpstream
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.upstreams.load_balancing import (
    LOAD_BOUND,
    Picker,
    least_requests,
    rendezvous_hash,
    round_robin,
    share_of_key,
)
from api_gateway.upstreams.outlier_detection import OutlierDetector, OutlierPolicy
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, Upstream
from tests.cases import each
from tests.examples import examples

NOW = 1000.0
POLICY = BreakerPolicy(failure_threshold=3, recovery_timeout=30)
NEVER = BreakerPolicy(failure_threshold=10_000, minimum_calls=10_000)


def upstream_of(
    count: int = 3,
    pick: Picker = round_robin,
    *,
    max_ejected_ratio: float = 0.5,
    slow_start: float = 0.0,
    policy: BreakerPolicy = POLICY,
    **options: Any,
) -> Upstream:
    """Return an upstream whose own breaker never opens, so that only its targets' do."""
    outliers = OutlierDetector(
        OutlierPolicy(max_ejected_ratio, slow_start), make_breaker=lambda now: CircuitBreaker(policy, now), **options
    )
    targets = [Target("abcdefgh"[number]) for number in range(count)]
    return Upstream("users", targets, CircuitBreaker(NEVER, NOW), pick, outliers=outliers)


def lease_on(upstream: Upstream, target: Target, now: float = NOW) -> Attempt:
    """Return a lease on that target, by having tried all others."""
    lease = upstream.acquire(now, "", [other for other in upstream.targets if other is not target])
    assert lease.target is target
    return lease


def fail(upstream: Upstream, target: Target, times: int = 3, now: float = NOW) -> None:
    for _ in range(times):
        lease = lease_on(upstream, target, now)
        lease.settle(Outcome.FAILURE, now, "status 503")
        lease.release(now)


def served(upstream: Upstream, count: int = 60, now: float = NOW) -> Counter[str]:
    """Let requests come and go; return how many each target had."""
    counts: Counter[str] = Counter()
    for number in range(count):
        lease = upstream.acquire(now, f"client-{number}")
        counts[lease.target.url] += 1
        lease.release(now)
    return counts


def ejected(upstream: Upstream, now: float = NOW) -> str:
    targets = upstream.targets
    return "".join(one.url for one in targets if upstream.outliers.is_ejected(targets, one, now))


# Ejection


@each("pick", [round_robin, least_requests(random.Random(1)), rendezvous_hash])
def test_a_target_whose_breaker_opens_gets_no_request(pick: Picker) -> None:
    upstream = upstream_of(3, pick)
    fail(upstream, upstream.targets[0])
    assert ejected(upstream) == "a"
    assert set(served(upstream)) == {"b", "c"}


def test_the_move_of_a_targets_breaker_is_on_the_lease_that_caused_it() -> None:
    upstream = upstream_of()
    target = upstream.targets[0]
    fail(upstream, target, 2)
    lease = lease_on(upstream, target)
    assert lease.target_transition is None
    assert lease.settle(Outcome.FAILURE, NOW, "status 503") is None, "the upstream's breaker did not move"
    assert lease.target_transition is not None
    assert (lease.target_transition.target, lease.target_transition.cause) == (
        State.OPEN,
        "3 consecutive failures; last: status 503",
    )
    lease.settle(Outcome.FAILURE, NOW)
    assert lease.target_transition is None, "settling once more causes nothing"
    assert target.ejections_total == 1


def test_failures_count_for_both_breakers() -> None:
    upstream = upstream_of()
    fail(upstream, upstream.targets[0], 2)
    assert upstream.breaker.consecutive_failures == 2
    assert [target.breaker and target.breaker.consecutive_failures for target in upstream.targets] == [2, 0, 0]


def test_what_was_in_progress_at_a_target_that_is_ejected_does_not_open_the_upstreams_breaker() -> None:
    """Nor what ends later at one that fails its checks, or is gone: others serve."""
    upstream = Upstream(
        "users",
        [Target("a"), Target("b"), Target("c")],
        CircuitBreaker(POLICY, NOW),
        round_robin,
        outliers=OutlierDetector(OutlierPolicy(0.5, 0.0), make_breaker=lambda now: CircuitBreaker(POLICY, now)),
    )
    leases = [upstream.acquire(NOW, "") for _ in range(60)]
    sick, ill, gone = ([lease for lease in leases if lease.target.url == url] for url in "abc")
    for lease in sick:
        lease.release(NOW, Outcome.FAILURE)
    assert (ejected(upstream), upstream.breaker.state) == ("a", State.CLOSED)
    ill[0].target.is_healthy = False
    for lease in ill:
        lease.release(NOW, Outcome.FAILURE)
    upstream.set_targets([*upstream.targets[:2], Target("d")], NOW)
    for lease in gone:
        lease.release(NOW, Outcome.FAILURE)
    assert upstream.breaker.state is State.CLOSED
    assert upstream.breaker.consecutive_failures < POLICY.failure_threshold


def test_when_the_last_target_in_service_fails_too_the_upstreams_breaker_opens() -> None:
    upstream = upstream_of(2)
    upstream.breaker = CircuitBreaker(POLICY, NOW)
    leases = [lease_on(upstream, target) for target in upstream.targets for _ in range(3)]
    for lease in leases:
        lease.release(NOW, Outcome.FAILURE)
    assert upstream.breaker.state is State.OPEN


def test_the_upstreams_probe_goes_to_a_target_in_service() -> None:
    upstream = upstream_of(2)
    upstream.breaker = CircuitBreaker(BreakerPolicy(failure_threshold=3, recovery_timeout=40), NOW)
    last = upstream.targets[1]
    leases = [lease_on(upstream, target) for target in upstream.targets for _ in range(3)]
    for lease in leases:
        lease.release(NOW, Outcome.FAILURE)
    assert upstream.breaker.state is State.OPEN
    probe = upstream.acquire(NOW + 40, "")
    assert (probe.ticket.is_probe, probe.target) == (True, last)


def test_a_request_that_may_not_be_repeated_is_no_probe_while_others_come() -> None:
    upstream = upstream_of(2)
    target = upstream.targets[0]
    fail(upstream, target)
    for tenth in range(12):
        now = NOW + 30 + tenth / 10
        upstream.acquire(now, "", [target]).release(now, Outcome.SUCCESS)
        assert upstream.acquire(now, "", is_safe=False).target is not target
    assert upstream.acquire(NOW + 33, "", is_safe=False).target is target, "none came for a second"


def test_calls_of_a_replaced_breaker_do_not_count_for_the_new_one() -> None:
    upstream = upstream_of(3)
    target = upstream.targets[0]
    leases = [lease_on(upstream, target) for _ in range(3)]
    target.breaker = CircuitBreaker(POLICY, NOW)
    for lease in leases:
        lease.release(NOW, Outcome.FAILURE)
    assert target.breaker.consecutive_failures == 0


def test_another_targets_success_does_not_excuse_a_target() -> None:
    """The upstream's own breaker sees no three failures in a row; the target's does."""
    upstream = upstream_of()
    bad, good, _ = upstream.targets
    for _ in range(3):
        fail(upstream, bad, 1)
        lease = lease_on(upstream, good)
        lease.release(NOW, Outcome.SUCCESS)
    assert ejected(upstream) == "a"
    assert upstream.breaker.consecutive_failures == 0


def test_one_target_alone_has_no_breaker() -> None:
    upstream = upstream_of(1)
    assert upstream.targets[0].breaker is None
    assert lease_on(upstream, upstream.targets[0]).target_ticket is None


def test_without_breakers_nothing_is_ejected() -> None:
    upstream = Upstream("users", [Target("a"), Target("b")], CircuitBreaker(NEVER, NOW), round_robin)
    fail(upstream, upstream.targets[0], 100)
    assert served(upstream) == {"a": 30, "b": 30}


@each(
    ("count", "max_ejected_ratio", "most"),
    [(1, 1, 0), (2, 0.5, 1), (2, 0.49, 0), (2, 1, 1), (3, 0.5, 1), (4, 0.5, 2), (5, 0.5, 2), (5, 1, 4), (5, 0, 0)],
)
def test_no_more_are_ejected_than_the_share_and_never_the_last(
    count: int, max_ejected_ratio: float, most: int
) -> None:
    upstream = upstream_of(count, max_ejected_ratio=max_ejected_ratio)
    leases = [lease_on(upstream, target) for _ in range(10) for target in upstream.targets]
    for lease in leases:
        lease.release(NOW, Outcome.FAILURE)
    assert len(ejected(upstream)) == most
    assert len(served(upstream)) == count - most


def test_failures_that_must_not_eject_are_counted_separately_until_a_success() -> None:
    upstream = upstream_of(2)
    first, last = upstream.targets
    fail(upstream, first)
    fail(upstream, last, 7)
    assert last.breaker is not None
    assert (last.withheld, last.breaker.consecutive_failures, last.breaker.state) == (7, 0, State.CLOSED)
    lease_on(upstream, last).release(NOW, Outcome.SUCCESS)
    assert last.withheld == 0


@pytest.mark.parametrize("healthy", [True, False])
def test_a_target_that_fails_its_checks_cannot_stand_in_for_one_that_would_be_ejected(*, healthy: bool) -> None:
    upstream = upstream_of(2)
    first, other = upstream.targets
    other.is_healthy = healthy
    for _ in range(5):
        lease = upstream.acquire(NOW, "", [other])
        lease.settle(Outcome.FAILURE, NOW)
        lease.release(NOW)
    assert ejected(upstream) == ("a" if healthy else "")
    assert set(served(upstream)) == ({"b"} if healthy else {"a"})
    assert first.ejections_total == healthy


def test_an_ejected_target_is_offered_again_once_the_others_fail_their_checks() -> None:
    upstream = upstream_of(2)
    fail(upstream, upstream.targets[0])
    upstream.targets[1].is_healthy = False
    assert ejected(upstream) == ""
    lease = upstream.acquire(NOW, "")
    assert (lease.target.url, lease.target_ticket) == ("a", None)
    lease.release(NOW, Outcome.FAILURE)
    upstream.targets[1].is_healthy = True
    assert ejected(upstream) == "a"


def test_with_no_healthy_target_none_is_offered() -> None:
    upstream = upstream_of(2)
    fail(upstream, upstream.targets[0])
    for target in upstream.targets:
        target.is_healthy = False
    with pytest.raises(NoHealthyUpstream):
        upstream.acquire(NOW, "")


# Probes


def test_an_ejected_target_is_tried_again_by_one_real_request_at_a_time() -> None:
    upstream = upstream_of(3)
    target = upstream.targets[0]
    fail(upstream, target)
    assert not served(upstream, now=NOW + 29.9)["a"]
    probe = lease_on(upstream, target, NOW + 30)
    assert probe.is_probe
    assert not probe.ticket.is_probe, "the upstream's breaker has nothing to do with it"
    assert not served(upstream, now=NOW + 30)["a"]
    probe.release(NOW + 31, Outcome.SUCCESS)
    assert served(upstream, now=NOW + 31) == {"a": 20, "b": 20, "c": 20}


def test_a_failed_probe_ejects_for_another_while_and_the_request_finds_another_target() -> None:
    upstream = upstream_of(3)
    target = upstream.targets[0]
    fail(upstream, target)
    probe = lease_on(upstream, target, NOW + 30)
    probe.settle(Outcome.FAILURE, NOW + 30, "upstream_timeout")
    probe.release(NOW + 30)
    assert ejected(upstream, NOW + 59) == "a"
    assert target.ejections_total == 1, "it has not been back"
    assert upstream.acquire(NOW + 30, "", [target]).target is not target


def test_a_probe_without_an_outcome_makes_room_for_the_next() -> None:
    upstream = upstream_of(2)
    fail(upstream, upstream.targets[0])
    lease_on(upstream, upstream.targets[0], NOW + 30).release(NOW + 30)
    assert lease_on(upstream, upstream.targets[0], NOW + 30).is_probe


def test_a_target_under_probe_still_counts_as_ejected() -> None:
    """So that its probe may fail without more being out than may be."""
    upstream = upstream_of(4)
    for target in upstream.targets[:2]:
        fail(upstream, target)
    probe = lease_on(upstream, upstream.targets[0], NOW + 30)
    fail(upstream, upstream.targets[2], 10, NOW + 30)
    assert ejected(upstream, NOW + 30) == ""  # both wait for a probe, and the third may not go
    probe.settle(Outcome.FAILURE, NOW + 30)
    assert ejected(upstream, NOW + 30) == "a"
    assert upstream.targets[2].withheld == 10


def test_a_probe_of_the_last_in_rotation_that_fails_leaves_it_there() -> None:
    upstream = upstream_of(2)
    target, other = upstream.targets
    fail(upstream, target)
    other.is_healthy = False
    lease = upstream.acquire(NOW + 30, "")
    assert lease.is_probe
    lease.release(NOW + 30, Outcome.FAILURE)
    assert target.breaker is not None
    assert (target.breaker.state, target.withheld) == (State.HALF_OPEN, 1)
    held = [upstream.acquire(NOW + 30, "") for _ in range(3)]
    assert {lease.target.url for lease in held} == {"a"}, "more than its breaker admits, as there is nobody else"


def test_slow_responses_eject_a_target_too_but_not_the_last() -> None:
    policy = BreakerPolicy(slow_call_duration=1, slow_call_rate=0.5, minimum_calls=2, recovery_timeout=30)
    upstream = upstream_of(2, policy=policy)
    for _ in range(10):
        lease = upstream.acquire(NOW, "")
        lease.settle(Outcome.SUCCESS, NOW, duration=2)
        lease.release(NOW)
    assert len(ejected(upstream)) == 1
    (left,) = [target for target in upstream.targets if target.url != ejected(upstream)]
    assert left.withheld > 0


# Slow start


@each("pick", [round_robin, least_requests(random.Random(2)), rendezvous_hash])
def test_a_target_that_returns_gets_its_share_gradually(pick: Picker) -> None:
    source = random.Random(1)
    upstream = upstream_of(2, pick, slow_start=10, draw=lambda _target, _key: source.random())
    target = upstream.targets[0]
    fail(upstream, target)
    lease_on(upstream, target, NOW + 30).release(NOW + 30, Outcome.SUCCESS)
    shares = [served(upstream, 1000, NOW + 30 + second)["a"] / 1000 for second in (0, 2.5, 5, 7.5, 10, 60)]
    assert shares[0] == 0
    assert shares == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.5], abs=0.06)
    assert repr(upstream.outliers) == "<OutlierDetector [0 abnormal]>"


@given(seconds=st.lists(st.floats(0, 12), min_size=2, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=examples(30))
def test_with_the_same_draws_it_never_gets_less_later(seconds: list[float], seed: int) -> None:
    """By key this holds for every single key: each moves over once and stays."""
    upstream = upstream_of(3, rendezvous_hash, slow_start=10)
    upstream.outliers.start_slow_start(upstream.targets[0], NOW)
    keys = [f"{seed}-{number}" for number in range(100)]
    had: set[str] = set()
    for second in sorted(seconds):
        upstream.outliers.abnormal.add(upstream.targets[0])
        has = set()
        for key in keys:
            lease = upstream.acquire(NOW + second, key)
            has |= {key} if lease.target is upstream.targets[0] else set()
            lease.release(NOW + second)
        assert had <= has
        had = has


def test_failed_health_checks_are_followed_by_a_slow_start_too() -> None:
    upstream = upstream_of(2, slow_start=10, draw=lambda _target, _key: 0.5)
    upstream.outliers.start_slow_start(upstream.targets[0], NOW)
    assert upstream.outliers.share(upstream.targets[0], NOW + 2.5) == 0.25
    assert set(served(upstream, now=NOW + 4.9)) == {"b"}
    assert set(served(upstream, now=NOW + 5.1)) == {"a", "b"}


def test_nothing_starts_slowly_at_the_start() -> None:
    upstream = upstream_of(3, slow_start=10, draw=lambda _target, _key: 1.0)
    assert served(upstream) == {"a": 20, "b": 20, "c": 20}
    assert not upstream.outliers.abnormal


def test_where_all_start_slowly_all_are_candidates() -> None:
    upstream = upstream_of(2, slow_start=10, draw=lambda _target, _key: 1.0)
    for target in upstream.targets:
        upstream.outliers.start_slow_start(target, NOW)
    assert served(upstream) == {"a": 30, "b": 30}


def test_a_retry_takes_a_target_that_starts_slowly_rather_than_one_that_failed() -> None:
    upstream = upstream_of(2, slow_start=10, draw=lambda _target, _key: 1.0)
    slow, other = upstream.targets
    upstream.outliers.start_slow_start(slow, NOW)
    assert upstream.acquire(NOW, "").target is other
    assert upstream.acquire(NOW, "", [other]).target is slow


def test_a_draw_by_key_is_even_and_the_same_every_time() -> None:
    one, other = Target("a"), Target("b")
    draws = [share_of_key(one, str(number)) for number in range(4000)]
    assert draws == [share_of_key(one, str(number)) for number in range(4000)]
    assert draws != [share_of_key(other, str(number)) for number in range(4000)]
    assert all(900 < count < 1100 for count in Counter(int(draw * 4) for draw in draws).values())


# Other targets


def test_new_targets_begin_with_a_breaker_and_a_full_share() -> None:
    upstream = upstream_of(1, slow_start=10)
    first, new = upstream.targets[0], Target("new")
    assert first.breaker is None
    upstream.set_targets([first, new], NOW)
    assert first.breaker is not None
    assert new.breaker is not None
    assert served(upstream) == {"a": 30, "new": 30}


def test_a_target_that_is_gone_gets_no_new_request_and_its_leases_run_on() -> None:
    upstream = upstream_of(3)
    gone = upstream.targets[0]
    lease = lease_on(upstream, gone)
    upstream.set_targets(upstream.targets[1:], NOW)
    assert set(served(upstream)) == {"b", "c"}
    assert gone.in_flight == 1
    lease.settle(Outcome.FAILURE, NOW)
    lease.release(NOW)
    assert gone.in_flight == 0


def test_what_still_runs_on_a_target_that_is_gone_unsettles_nothing() -> None:
    upstream = upstream_of(3)
    gone = upstream.targets[0]
    leases = [lease_on(upstream, gone) for _ in range(3)]
    upstream.set_targets(upstream.targets[1:], NOW)
    for lease in leases:
        lease.release(NOW, Outcome.FAILURE)
    assert not upstream.outliers.abnormal


def test_of_fewer_targets_no_more_than_their_share_stays_ejected() -> None:
    """Those that are out longest return, slowly, to breakers that know nothing of them."""
    upstream = upstream_of(4, slow_start=10, draw=lambda _target, _key: 0.0)
    a, b, c, _ = upstream.targets
    fail(upstream, a)
    fail(upstream, b, now=NOW + 1)
    assert ejected(upstream, NOW + 1) == "ab"
    upstream.set_targets([a, b, c], NOW + 2)
    assert ejected(upstream, NOW + 2) == "b"
    assert upstream.outliers.share(a, NOW + 3) == 0.1
    assert a.ejections_total == 1


def test_the_only_target_that_is_left_is_not_ejected() -> None:
    """Found by the machine below."""
    upstream = upstream_of(2, max_ejected_ratio=1)
    first, _ = upstream.targets
    fail(upstream, first)
    upstream.set_targets([first], NOW)
    assert first.breaker is not None
    assert first.breaker.state is State.CLOSED


# Whatever happens


class Balancing(RuleBasedStateMachine):
    """Requests come, go and fail, health changes, targets come and go, time passes."""

    @initialize(
        weights=st.lists(st.integers(1, 3), min_size=1, max_size=6),
        pick=st.sampled_from(["round_robin", "least_requests", "hash"]),
        max_ejected_ratio=st.sampled_from([0.0, 0.34, 0.5, 1.0]),
    )
    def begin(self, weights: list[int], pick: str, max_ejected_ratio: float) -> None:
        source = random.Random(1)
        picks: dict[str, Picker] = {
            "round_robin": round_robin,
            "least_requests": least_requests(source),
            "hash": rendezvous_hash,
        }
        self.now, self.is_hash, self.names = NOW, pick == "hash", len(weights)
        self.leases: list[Attempt] = []
        self.policy = OutlierPolicy(max_ejected_ratio, slow_start=10)
        outliers = OutlierDetector(
            self.policy,
            draw=lambda _target, _key: source.random(),
            make_breaker=lambda now: CircuitBreaker(BreakerPolicy(2, recovery_timeout=5), now),
        )
        targets = [Target(f"t{number}", weight) for number, weight in enumerate(weights)]
        self.everyone = list(targets)
        self.upstream = Upstream("users", targets, CircuitBreaker(NEVER, NOW), picks[pick], outliers=outliers)

    @rule(key=st.integers(0, 20), tried=st.sets(st.integers(0, 5)))
    def request(self, key: int, tried: set[int]) -> None:
        targets = self.upstream.targets
        unsettled = set(self.upstream.outliers.abnormal)
        if not any(target.is_healthy for target in targets):
            with pytest.raises(NoHealthyUpstream):
                self.upstream.acquire(self.now, str(key))
            return
        away = [targets[number] for number in tried if number < len(targets)]
        out = [one for one in targets if self.upstream.outliers.is_ejected(targets, one, self.now)]
        before = {target: target.in_flight for target in targets}
        lease = self.upstream.acquire(self.now, str(key), away)
        self.leases.append(lease)
        assert lease.target.is_healthy
        assert lease.target not in out
        if self.is_hash and not unsettled:
            healthy = [target for target in targets if target.is_healthy]
            offered = [target for target in healthy if target not in away] or healthy
            load = sum(before[target] for target in offered) + 1
            fair = load * lease.target.weight / sum(target.weight for target in offered)
            assert before[lease.target] < LOAD_BOUND * fair

    @rule(which=st.integers(0, 50), outcome=st.sampled_from(Outcome), twice=st.booleans())
    def end(self, which: int, outcome: Outcome, *, twice: bool) -> None:
        if self.leases:
            lease = self.leases.pop(which % len(self.leases))
            for _ in range(1 + twice):
                lease.settle(outcome, self.now, "it")
            lease.release(self.now)

    @rule(which=st.integers(0, 5))
    def fails(self, which: int) -> None:
        """Let one target fail whatever it gets."""
        for lease in [one for one in self.leases if one.target.url == f"t{which}"]:
            lease.settle(Outcome.FAILURE, self.now)

    @rule(which=st.integers(0, 5))
    def is_checked(self, which: int) -> None:
        target = self.upstream.targets[which % len(self.upstream.targets)]
        target.is_healthy = not target.is_healthy
        if target.is_healthy:
            self.upstream.outliers.start_slow_start(target, self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(drop=st.sets(st.integers(0, 5)), new=st.integers(0, 2))
    def resolve(self, drop: set[int], new: int) -> None:
        kept = [target for number, target in enumerate(self.upstream.targets) if number not in drop]
        kept += [Target(f"n{self.names + number}") for number in range(new)]
        self.names += new
        if kept:
            self.upstream.set_targets(kept, self.now)
            self.everyone += [target for target in kept if target not in self.everyone]

    @invariant()
    def what_is_in_flight_is_what_is_leased(self) -> None:
        for target in getattr(self, "everyone", []):
            assert target.in_flight == sum(lease.target is target for lease in self.leases)

    @invariant()
    def no_more_are_out_than_may_be(self) -> None:
        if hasattr(self, "upstream"):
            out = [one for one in self.upstream.targets if one.breaker and one.breaker.state is not State.CLOSED]
            assert len(out) <= self.policy.max_ejected_ratio * len(self.upstream.targets)
            assert len(out) < len(self.upstream.targets)

    @invariant()
    def only_targets_that_are_there_are_unsettled(self) -> None:
        if hasattr(self, "upstream"):
            assert self.upstream.outliers.abnormal <= set(self.upstream.targets)

    @invariant()
    def one_that_is_healthy_is_always_offered(self) -> None:
        if hasattr(self, "upstream"):
            healthy = [target for target in self.upstream.targets if target.is_healthy]
            if healthy:
                offered = self.upstream.outliers.eligible(healthy, (), self.now, "")
                assert offered
                assert set(offered) <= set(healthy)


TestBalancing = Balancing.TestCase
TestBalancing.settings = settings(max_examples=examples(60), stateful_step_count=40)


# Bounded load and disruption


def held(targets: Sequence[Target], keys: int, most: int) -> None:
    """Send requests of one hot key and of others, none of which ends."""
    for number in range(most):
        rendezvous_hash(targets, f"hot-{number % keys}").in_flight += 1


@given(weights=st.lists(st.integers(1, 5), min_size=1, max_size=6), keys=st.integers(1, 10))
@settings(max_examples=examples(50))
def test_one_frequent_key_loads_no_target_beyond_its_limit(weights: list[int], keys: int) -> None:
    targets = [Target(str(number), weight) for number, weight in enumerate(weights)]
    held(targets, keys, 200)
    for target in targets:
        assert target.in_flight < LOAD_BOUND * 200 * target.weight / sum(weights) + 1


def test_a_key_returns_to_its_target_when_there_is_capacity() -> None:
    targets = [Target(name) for name in "abc"]
    home = rendezvous_hash(targets, "key")
    home.in_flight = 5
    second = rendezvous_hash(targets, "key")
    assert second is not home
    rest = [target for target in targets if target is not home]
    assert second is rendezvous_hash(rest, "key"), "the next best is whom it would go to without its home"
    home.in_flight = 0
    assert rendezvous_hash(targets, "key") is home


@given(count=st.integers(2, 8), lost=st.integers(0, 7))
@settings(max_examples=examples(25))
def test_losing_any_target_moves_its_keys_only(count: int, lost: int) -> None:
    targets = [Target(f"http://10.0.0.{number}", 1 + number % 3) for number in range(count)]
    gone = targets[lost % count]
    rest = [target for target in targets if target is not gone]
    for key in map(str, range(200)):
        home = rendezvous_hash(targets, key)
        assert home is gone or rendezvous_hash(rest, key) is home
