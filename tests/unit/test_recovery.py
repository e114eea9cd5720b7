"""No state sustains itself: whatever has happened before, what works again is used again, within a bounded time.

Breakers, ejection, slow start, the ramp, retry budgets and adaptive limits, on virtual time.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api_gateway.circuit_breaker import PROBE_HEAD_START, CircuitBreaker, Ticket
from api_gateway.errors import Unavailable
from api_gateway.models import Outcome
from api_gateway.resilience.adaptive_limit import AdaptivePolicy, GradientController
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from api_gateway.resilience.retry import RetryBudget
from api_gateway.upstreams.load_balancing import Picker, least_requests, rendezvous_hash, round_robin
from api_gateway.upstreams.outlier_detection import OutlierDetector, OutlierPolicy
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt, Upstream
from tests.cases import each
from tests.examples import examples

NOW = 1000.0
RECOVERY, LONGEST, RAMP, SLOW_START = 5.0, 40.0, 10.0, 10.0
POLICIES = [
    BreakerPolicy(
        failure_threshold=3,
        minimum_calls=10,
        recovery_timeout=RECOVERY,
        max_recovery_timeout=LONGEST,
        half_open_max_calls=probes,
        jitter=0.1,
        ramp=ramp,
    )
    for probes in (1, 3)
    for ramp in (0.0, RAMP)
]
SUCCESS, FAILURE, IGNORED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.IGNORED

# What a request may be: whether it may be repeated, and of whom it is
KINDS = [(is_safe, principal) for is_safe in (True, False) for principal in ("a", "b", "c", None)]


# The breaker


@dataclass
class Calls:
    """A breaker with the calls that it has admitted."""

    breaker: CircuitBreaker
    now: float = NOW
    open: list[tuple[Ticket, str | None]] = field(default_factory=list)

    def begin(self, *, is_safe: bool, principal: str | None) -> Ticket | None:
        ticket = self.breaker.admit(self.now, is_safe=is_safe, principal=principal)
        if ticket is not None:
            self.open.append((ticket, principal))
        return ticket

    def end(self, number: int, outcome: Outcome) -> None:
        ticket, principal = self.open.pop(number % len(self.open))
        self.breaker.settle(ticket, outcome, self.now, principal=principal)


STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.none() | st.sampled_from(Outcome), st.floats(0, 20), st.integers(0, 9)),
    max_size=40,
)


def past(breaker: CircuitBreaker, steps: Sequence[tuple[Any, Outcome | None, float, int]]) -> Calls:
    """Let calls begin and end; some never do."""
    calls = Calls(breaker)
    for (is_safe, principal), outcome, seconds, number in steps:
        calls.now += seconds
        calls.begin(is_safe=is_safe, principal=principal)
        if outcome is not None and calls.open:
            calls.end(number, outcome)
    return calls


def is_whole(breaker: CircuitBreaker, now: float) -> bool:
    """Whether the breaker admits everything, of which it takes note when it is asked for something."""
    breaker.advance(now)
    return breaker.state is State.CLOSED and breaker.is_transparent


@given(steps=STEPS, policy=st.sampled_from(POLICIES), kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
@settings(max_examples=examples(200), derandomize=True)
def test_a_breaker_closes_once_calls_succeed_whatever_was_before_and_whatever_calls_come(
    steps: list[Any], policy: BreakerPolicy, kinds: list[tuple[bool, str | None]]
) -> None:
    """Only safe ones, only unsafe ones, of one client or of several; and some before never ended."""
    calls = past(CircuitBreaker(policy, NOW, random.Random(1)), steps)
    end = calls.now + LONGEST * 1.1 + RECOVERY * 4 + RAMP + 30
    turn = 0
    while calls.now < end and not is_whole(calls.breaker, calls.now):
        calls.now += 0.5
        turn += 1
        is_safe, principal = kinds[turn % len(kinds)]
        if calls.begin(is_safe=is_safe, principal=principal) is not None:
            calls.end(-1, SUCCESS)
    assert is_whole(calls.breaker, calls.now), calls.breaker


@each("policy", POLICIES)
@each("is_other_safe", [True, False])
def test_a_client_whose_calls_always_fail_does_not_keep_a_breaker_open_for_one_whose_calls_succeed(
    policy: BreakerPolicy, *, is_other_safe: bool
) -> None:
    """Nor if the calls of the other may not be repeated, while its own, which yield, may be."""
    calls = Calls(CircuitBreaker(policy, NOW))
    for principal in ("bad", "good", "bad"):
        calls.begin(is_safe=True, principal=principal)
        calls.end(-1, FAILURE)
    assert calls.breaker.state is State.OPEN
    served = 0
    for _ in range(1200):
        calls.now += 0.1
        if calls.begin(is_safe=True, principal="bad") is not None:
            calls.end(-1, FAILURE)
        if calls.begin(is_safe=is_other_safe, principal="good") is not None:
            calls.end(-1, SUCCESS)
            served += 1
    assert served > 600
    assert str(calls.breaker.state) == "CLOSED"


@each("policy", POLICIES)
def test_probes_that_never_end_do_not_keep_a_breaker_from_closing(policy: BreakerPolicy) -> None:
    """Their places are free after the recovery timeout, and go to others first."""
    calls = Calls(CircuitBreaker(policy, NOW))
    for _ in range(3):
        calls.begin(is_safe=True, principal=None)
        calls.end(-1, FAILURE)
    end = NOW + RECOVERY * 3
    while calls.now < end:
        calls.now += 0.1
        calls.begin(is_safe=True, principal="holds them")
        if calls.begin(is_safe=True, principal="other") is not None:
            calls.end(-1, SUCCESS)
    assert calls.breaker.state is State.CLOSED


def test_the_ramp_ends_without_any_call() -> None:
    breaker = CircuitBreaker(POLICIES[-1], NOW)
    calls = Calls(breaker)
    for _ in range(3):
        calls.begin(is_safe=True, principal=None)
        calls.end(-1, FAILURE)
    for _ in range(3):
        calls.now += LONGEST
        calls.begin(is_safe=True, principal=None)
        calls.end(-1, SUCCESS)
    assert breaker.state is State.CLOSED
    calls.now += RAMP
    assert breaker.ramp_share(calls.now) is None
    assert breaker.would_admit(calls.now)
    calls.begin(is_safe=True, principal=None)
    assert breaker.is_transparent


# Targets


PICKERS: dict[str, Callable[[], Picker]] = {
    "round robin": lambda: round_robin,
    "least requests": lambda: least_requests(random.Random(1)),
    "hash": lambda: rendezvous_hash,
}


class Service:
    """An upstream with targets, each of which works or not, on virtual time."""

    def __init__(self, count: int, policy: BreakerPolicy, pick: Picker) -> None:
        self.now = NOW
        self.targets = [Target("abcdefgh"[number]) for number in range(count)]
        self.broken: set[str] = set()
        source = random.Random(1)
        outliers = OutlierDetector(
            OutlierPolicy(0.5, SLOW_START), make_breaker=lambda now: CircuitBreaker(policy, now, source)
        )
        breaker = CircuitBreaker(policy, NOW, source)
        self.upstream = Upstream("users", self.targets, breaker, pick, outliers=outliers)
        self.lost: list[Attempt] = []

    def ask(self, key: str = "", *, is_safe: bool = True, principal: str | None = None) -> bool:
        """Make one request; return whether it succeeded."""
        try:
            attempt = self.upstream.acquire(self.now, key, is_safe=is_safe, principal=principal)
        except Unavailable:
            return False
        is_good = attempt.target.url not in self.broken
        attempt.release(self.now, SUCCESS if is_good else FAILURE)
        return is_good

    def lose(self, key: str) -> None:
        """Make a request that never ends."""
        try:
            self.lost.append(self.upstream.acquire(self.now, key))
        except Unavailable:
            return

    def run(self, seconds: float, *, step: float = 0.25, safe: Sequence[bool] = (True,)) -> float:
        """Make requests of several clients; return the share that succeeded."""
        results: Counter[bool] = Counter()
        for number in range(round(seconds / step)):
            self.now += step
            key = f"client-{number % 7}"
            results[self.ask(key, is_safe=safe[number % len(safe)], principal=key)] += 1
        return results[True] / max(1, results.total())

    def is_whole(self) -> bool:
        in_service = all(target.breaker is None or is_whole(target.breaker, self.now) for target in self.targets)
        at_full_share = all(self.upstream.outliers.share(target, self.now) == 1 for target in self.targets)
        return in_service and at_full_share and is_whole(self.upstream.breaker, self.now)

    def recover(self, seconds: float, safe: Sequence[bool] = (True,)) -> bool:
        """Make requests until everything is in service; return whether it is within so many seconds."""
        end = self.now + seconds
        while self.now < end and not self.is_whole():
            self.run(5, safe=safe)
        return self.is_whole()


LONG_ENOUGH = 3 * LONGEST + 2 * RAMP + SLOW_START


@pytest.mark.parametrize("pick", PICKERS)
@given(
    policy=st.sampled_from(POLICIES),
    outages=st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.integers(0, 30), st.integers(0, 3)), max_size=5),
    safe=st.lists(st.booleans(), min_size=1, max_size=3),
)
# Targets on which requests never end, and which load balancing therefore does not select
@example(policy=POLICIES[0], outages=[({"a"}, 6, 1), ({"b"}, 8, 0)], safe=[False])
@example(policy=POLICIES[1], outages=[({"a"}, 18, 1), (set(), 12, 2)], safe=[False])
@settings(max_examples=examples(60), derandomize=True)
def test_once_every_target_works_all_are_in_service_with_their_full_share(
    pick: str, policy: BreakerPolicy, outages: list[tuple[set[str], int, int]], safe: list[bool]
) -> None:
    service = after(Service(3, policy, PICKERS[pick]()), outages)
    recovered = service.recover(LONG_ENOUGH, safe)
    assert recovered, [(target.url, target.breaker) for target in service.targets]
    assert service.run(20, safe=safe) == 1
    assert service.is_whole()


def after(service: Service, outages: list[tuple[set[str], int, int]]) -> Service:
    """Return the service when the outages are over."""
    for broken, seconds, lost in outages:
        service.broken = broken
        service.run(seconds)
        for number in range(lost):
            service.lose(f"lost-{number}")
    service.broken = set()
    return service


def ejected(service: Service, name: str, principal: str | None = None) -> Target:
    """Return the target of this name after it has failed and works again; its probe is not due yet."""
    service.broken = {name}
    (target,) = (one for one in service.targets if one.url == name)
    while target.breaker is None or target.breaker.state is not State.OPEN:
        service.now += 0.25
        service.ask(f"client-{round(service.now * 4)}", principal=principal)
    service.broken = set()
    return target


@each("pick", PICKERS)
@each("safe", [[True], [False], [True, False]], ids=["safe", "unsafe", "both"])
def test_a_probe_takes_the_next_request_whatever_load_balancing_selects(pick: str, safe: list[bool]) -> None:
    """A target on which a request never ends has the most requests in flight, so it would be selected for none."""
    service = Service(3, POLICIES[0], PICKERS[pick]())
    target = ejected(service, "b")
    target.in_flight += 1
    assert target.breaker is not None
    due = target.breaker.next_probe_at()
    assert due is not None
    service.run(due - service.now + 2, safe=safe)
    assert str(target.breaker.state) == "CLOSED"


@each("pick", PICKERS)
def test_a_request_that_may_not_be_repeated_is_no_probe_while_others_come(pick: str) -> None:
    service = Service(3, POLICIES[0], PICKERS[pick]())
    target = ejected(service, "b")
    service.broken = {"b"}
    probes: Counter[bool] = Counter()
    for number in range(2000):
        service.now += 0.1
        is_safe = number % 5 == 0
        attempt = service.upstream.acquire(service.now, f"client-{number % 7}", is_safe=is_safe)
        probes[is_safe] += attempt.is_probe
        attempt.release(service.now, FAILURE if attempt.target is target else SUCCESS)
    assert probes[True] > 3
    assert not probes[False]


@each("pick", PICKERS)
def test_a_retry_does_not_prefer_a_target_that_awaits_a_probe(pick: str) -> None:
    service = Service(3, POLICIES[0], PICKERS[pick]())
    target = ejected(service, "b")
    service.now += LONGEST
    failed, other = (one for one in service.targets if one is not target)
    target.in_flight += 1
    service.upstream.rebalance(lambda offered, _key: max(offered, key=lambda one: one.url != "b"))
    assert service.upstream.acquire(service.now, "", [failed]).target is other


@each("policy", POLICIES)
def test_a_target_returns_by_time_alone_without_any_request(policy: BreakerPolicy) -> None:
    """Otherwise it would prevent the ejection of others for as long as nobody probes it."""
    service = Service(2, policy, round_robin)
    target = ejected(service, "a")
    outliers, breaker = service.upstream.outliers, target.breaker
    assert breaker is not None
    due = breaker.next_probe_at()
    assert due is not None
    service.now = due + LONGEST - 0.1
    outliers.advance(service.now)
    assert breaker.state_at(service.now) is State.HALF_OPEN
    assert not outliers.may_eject(service.targets, service.targets[1])
    service.now = due + LONGEST
    outliers.advance(service.now)
    assert str(breaker.state) == "CLOSED"
    assert breaker.records[-1].cause == f"no probe for {LONGEST:g} s"
    assert outliers.share(target, service.now) == 0, "by slow start"
    assert outliers.may_eject(service.targets, service.targets[1])
    service.now += max(RAMP, SLOW_START)
    outliers.advance(service.now)
    assert service.is_whole()
    assert not outliers.abnormal


def test_the_breaker_of_an_upstream_does_not_close_without_a_probe() -> None:
    """Without requests its state has no effect, and nothing shows that the upstream works."""
    service = Service(2, POLICIES[0], round_robin)
    service.broken = {"a", "b"}
    while service.upstream.breaker.state is State.CLOSED:
        service.run(1)
    service.now += 10 * LONGEST
    service.upstream.outliers.advance(service.now)
    assert service.upstream.breaker.state_at(service.now) is State.HALF_OPEN


@each("pick", PICKERS)
@each("is_other_safe", [True, False])
def test_a_client_whose_requests_always_fail_does_not_keep_a_target_ejected(pick: str, *, is_other_safe: bool) -> None:
    """Although it makes nine of ten requests, and would make most probes."""
    service = Service(3, POLICIES[0], PICKERS[pick]())
    target = ejected(service, "b")
    assert target.breaker is not None
    returned = False
    for number in range(1200):
        service.now += 0.1
        is_bad = number % 10 != 0
        attempt = service.upstream.acquire(
            service.now, f"key-{number}", is_safe=is_bad or is_other_safe, principal="bad" if is_bad else "good"
        )
        attempt.release(service.now, FAILURE if is_bad and attempt.target is target else SUCCESS)
        returned = returned or target.breaker.state is State.CLOSED
    assert returned


@each("pick", PICKERS)
@each("policy", POLICIES)
@each("stays_broken", ["a", "b", "c"])
def test_when_all_but_one_target_recover_from_an_outage_of_all_the_upstream_serves_again(
    pick: str, policy: BreakerPolicy, stays_broken: str
) -> None:
    """Also if the one that stays broken is the last that was in service, which cannot be ejected."""
    service = Service(3, policy, PICKERS[pick]())
    service.run(5)
    service.broken = {"a", "b", "c"}
    service.run(60)
    assert service.upstream.breaker.state is not State.CLOSED
    service.broken = {stays_broken}
    service.run(LONG_ENOUGH, step=1)
    assert service.run(50) > 0.95


def test_a_probe_of_the_upstream_at_an_ejected_target_that_fails_costs_it_nothing() -> None:
    """The permit is free at once, and the next probe goes to a target in service."""
    policy = BreakerPolicy(failure_threshold=1, recovery_timeout=RECOVERY, max_recovery_timeout=RECOVERY)
    service = Service(2, policy, round_robin)
    service.broken = {"a", "b"}
    assert not any(service.ask() for _ in range(4))
    (ejected,) = (target for target in service.targets if target.breaker and target.breaker.state is State.OPEN)
    service.now += RECOVERY
    assert not service.ask(), "the probe goes to the target in service"
    service.now += RECOVERY
    service.broken = {ejected.url}
    assert not service.ask(), "the ejected one is probed"
    assert service.upstream.breaker.state is State.HALF_OPEN
    assert service.ask()
    assert str(service.upstream.breaker.state) == "CLOSED"


def test_an_ejected_target_returns_though_load_balancing_sends_it_only_requests_that_may_not_be_repeated() -> None:
    """By hash, clients that only read may all belong to other targets."""
    policy = BreakerPolicy(failure_threshold=1, recovery_timeout=RECOVERY)
    service = Service(2, policy, rendezvous_hash)
    homes: dict[str, list[str]] = {"a": [], "b": []}
    for number in range(50):
        attempt = service.upstream.acquire(NOW, f"client-{number}")
        attempt.release(NOW, SUCCESS)
        homes[attempt.target.url].append(f"client-{number}")
    writer, reader = homes["a"][0], homes["b"][0]
    service.broken = {"a"}
    service.ask(writer, is_safe=False)
    target = service.targets[0]
    assert target.breaker is not None
    assert target.breaker.state is State.OPEN
    service.broken = set()
    while service.now < NOW + RECOVERY + PROBE_HEAD_START + 1:
        service.now += 0.5
        assert service.ask(reader)
        assert service.ask(writer, is_safe=False)
    assert str(target.breaker.state) == "CLOSED"


def test_slow_start_ends_without_any_request() -> None:
    service = Service(2, POLICIES[0], round_robin)
    service.upstream.outliers.start_slow_start(service.targets[0], NOW)
    assert service.upstream.outliers.share(service.targets[0], NOW) == 0
    service.now += SLOW_START
    assert service.upstream.outliers.share(service.targets[0], service.now) == 1
    service.ask()
    assert not service.upstream.outliers.abnormal


@each("pick", PICKERS)
def test_a_client_that_is_alone_makes_every_probe_of_a_target_at_once(pick: str) -> None:
    """Nobody else could make it, so the client does not leave it to others after a probe that has failed."""
    service = Service(3, POLICIES[0], PICKERS[pick]())
    target = ejected(service, "b", principal="only")
    assert target.breaker is not None
    service.broken = {"b"}
    for _ in range(3):
        due = target.breaker.next_probe_at()
        assert due is not None
        service.now = due
        assert not service.ask("only", principal="only")


# The retry budget


@each(("share", "floor"), [(0.2, 0.0), (0.2, 1.0), (0.01, 0.0), (0.01, 0.1)])
def test_a_retry_budget_that_is_spent_refills_by_requests_and_by_time(share: float, floor: float) -> None:
    budget = RetryBudget(share, floor)
    now = NOW
    for _ in range(500):  # an outage under load
        now += 0.01
        budget.deposit(now)
        budget.withdraw(now)
    while budget.withdraw(now):
        pass
    for _ in range(round(1 / share) + 1):
        now += 60
        budget.deposit(now)
    assert budget.withdraw(now), "by requests, however rare"
    while budget.withdraw(now):
        pass
    if floor:
        assert budget.withdraw(now + 1 / floor + 1e-6), "by time"


# The adaptive limit


class Server:
    """An upstream of `places` that each take `service` seconds, in front of which `clients` ask again at once."""

    def __init__(self, clients: int, places: int, service: float) -> None:
        self.policy = AdaptivePolicy(min_limit=10, max_limit=1000)
        self.gradient = GradientController(self.policy, NOW)
        self.limit = ConcurrencyLimit(self.gradient, SINGLE_PRIORITY, source=random.Random(1))
        self.clients, self.places, self.service = clients, places, service
        self.now = NOW

    def run(self, seconds: float) -> float:
        """Return the mean number of requests in flight."""
        end, flights = self.now + seconds, []
        while self.now < end:
            admitted = 0
            for _ in range(self.clients):
                if self.limit.admits(0):
                    self.limit.acquire(0)
                    admitted += 1
            flights.append(admitted)
            took = self.service * max(1.0, admitted / self.places)
            self.now += took
            for _ in range(admitted):
                self.limit.observe(took, self.now)
                self.limit.release()
        return sum(flights) / len(flights)


@each("service", [0.05, 1.0])
@each("baseline", [0.01, 1.0, 100.0])
@each("latency", [0.01, 100.0])
def test_an_adaptive_limit_leaves_its_minimum_whatever_it_has_measured_before(
    service: float, baseline: float, latency: float
) -> None:
    """Few requests are in flight at the minimum, and so few samples come. Both are times the present latency."""
    places = 30
    server = Server(2 * places, places, service)
    server.gradient.limit = server.policy.min_limit
    server.gradient.baseline, server.gradient.latency = service * baseline, service * latency
    server.run(100 + 40 * service * baseline)
    assert server.run(30) > 0.7 * places


@pytest.mark.parametrize("factor", [2, 10])
def test_an_adaptive_limit_leaves_its_minimum_if_the_upstream_is_slower_for_good(factor: int) -> None:
    server = Server(60, 30, 0.1)
    server.run(40)
    server.service *= factor
    server.run(120)
    assert server.run(30) > 0.7 * 30
