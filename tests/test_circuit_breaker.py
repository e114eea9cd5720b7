"""The breaker's table of moves, what triggers each, and a random walk against a model that keeps a plain log."""

from dataclasses import dataclass, field
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from api_gateway.circuit_breaker import (
    TRANSITIONS,
    BreakerPolicy,
    CircuitBreaker,
    Event,
    State,
    Ticket,
    Transition,
)
from api_gateway.models import Outcome

NOW = 1000.0
CLOSED, OPEN, HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN
SUCCESS, FAILURE, IGNORED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.IGNORED

BY_STREAK = BreakerPolicy(failure_threshold=3, minimum_calls=1000)
BY_RATE = BreakerPolicy(failure_threshold=1000, failure_rate=0.5, minimum_calls=4, window=10)


def admitted(breaker: CircuitBreaker, now: float = NOW) -> Ticket:
    ticket = breaker.admit(now)
    assert ticket is not None
    return ticket


def call(breaker: CircuitBreaker, outcome: Outcome, now: float = NOW, detail: str = "") -> Transition | None:
    return breaker.settle(admitted(breaker, now), outcome, now, detail)


def opened(policy: BreakerPolicy = BY_STREAK) -> CircuitBreaker:
    """Return a breaker that opened at NOW."""
    breaker = CircuitBreaker(policy, NOW)
    for _ in range(policy.failure_threshold):
        call(breaker, FAILURE)
    assert breaker.state is OPEN
    return breaker


def probing(probes: int = 1) -> tuple[CircuitBreaker, float]:
    """Return a breaker that is just HALF_OPEN, with that many probes to give, and the time."""
    breaker, due = opened(BreakerPolicy(failure_threshold=1, half_open_max_calls=probes)), NOW + 30
    breaker.advance(due)
    assert breaker.state is HALF_OPEN
    return breaker, due


# The table


@pytest.mark.parametrize(("state", "event"), sorted(set(product(State, Event)) - set(TRANSITIONS)))
def test_a_move_not_in_the_table_raises_and_changes_nothing(state: State, event: Event) -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.state = state
    with pytest.raises(KeyError):
        breaker._move(event, NOW + 1, "a defect")
    assert (breaker.state, breaker.since, breaker.opened_total) == (state, NOW, 0)


@pytest.mark.parametrize("start", State)
def test_from_every_state_every_state_can_be_reached(start: State) -> None:
    reached, before = {start}, set[State]()
    while reached != before:
        before = set(reached)
        reached |= {target for (source, _), target in TRANSITIONS.items() if source in before}
    assert reached == set(State)


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[CLOSED, Event.PROBE_FAILED] = OPEN  # type: ignore[index]  # what is tested


# CLOSED


def test_it_opens_at_so_many_consecutive_failures() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    assert [call(breaker, FAILURE, NOW + second) for second in (1, 2)] == [None, None]
    assert breaker.consecutive_failures == 2
    move = call(breaker, FAILURE, NOW + 3)
    assert move == Transition(NOW + 3, CLOSED, OPEN, "3 consecutive failures")
    assert (breaker.state, breaker.since, breaker.opened_total) == (OPEN, NOW + 3, 1)


def test_a_success_breaks_the_streak() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    for outcome in (FAILURE, FAILURE, SUCCESS, FAILURE, FAILURE):
        assert call(breaker, outcome) is None
    assert (breaker.state, breaker.consecutive_failures) == (CLOSED, 2)


def test_what_says_nothing_of_the_upstream_neither_counts_nor_breaks_the_streak() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    for outcome in (FAILURE, IGNORED, FAILURE, IGNORED):
        assert call(breaker, outcome) is None
    assert breaker.window_totals(NOW) == (2, 2)
    assert call(breaker, FAILURE) is not None


def test_it_opens_at_a_share_of_failures() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    for outcome in (FAILURE, SUCCESS, SUCCESS):
        assert call(breaker, outcome) is None
    move = call(breaker, FAILURE)
    assert move == Transition(NOW, CLOSED, OPEN, "2 of 4 calls failed within 10 s")


def test_a_share_of_too_few_calls_says_nothing() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    assert [call(breaker, FAILURE) for _ in range(3)] == [None, None, None]
    assert breaker.window_totals(NOW) == (3, 3)


def test_a_smaller_share_does_not_open_it() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    for outcome in (SUCCESS, SUCCESS, SUCCESS, FAILURE, SUCCESS, FAILURE):
        assert call(breaker, outcome) is None
    assert breaker.state is CLOSED


@pytest.mark.parametrize(("calls", "failures", "rate"), [(25, 7, 0.28), (100, 7, 0.07), (100, 55, 0.55), (20, 20, 1)])
def test_exactly_the_configured_share_opens_it(calls: int, failures: int, rate: float) -> None:
    """A share that has no exact double: 25 * 0.28 comes out above 7."""
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=1000, failure_rate=rate, minimum_calls=calls), NOW)
    for outcome in [SUCCESS] * (calls - failures) + [FAILURE] * (failures - 1):
        assert call(breaker, outcome) is None
    assert call(breaker, FAILURE) is not None


@pytest.mark.parametrize(("later", "opens"), [(0.0, True), (8.9, True), (10.0, False), (100.0, False)])
def test_failures_count_for_as_long_as_the_window(later: float, opens: bool) -> None:  # noqa: FBT001 - a table's column
    breaker = CircuitBreaker(BY_RATE, NOW)
    for outcome in (FAILURE, FAILURE, SUCCESS):
        call(breaker, outcome)
    call(breaker, SUCCESS, NOW + later)
    assert (call(breaker, FAILURE, NOW + later) is not None) == opens


# OPEN


def test_it_admits_nothing_until_the_recovery_timeout() -> None:
    breaker = opened()
    assert [breaker.admit(NOW + second) for second in (0, 10, 29.9)] == [None, None, None]
    assert (breaker.state, breaker.rejected_total) == (OPEN, 3)
    assert admitted(breaker, NOW + 30).is_probe
    assert (breaker.state, breaker.since, breaker.rejected_total) == (HALF_OPEN, NOW + 30, 3)


def test_time_alone_moves_it_to_half_open() -> None:
    breaker = opened()
    assert breaker.advance(NOW + 29.9) is None
    assert breaker.advance(NOW + 30) == Transition(NOW + 30, OPEN, HALF_OPEN, "30 s have passed")
    assert breaker.advance(NOW + 99) is None


def test_time_moves_no_closed_breaker() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    assert breaker.advance(NOW + 1000) is None
    assert breaker.state is CLOSED


def test_retry_after_counts_down_to_the_first_probe() -> None:
    breaker = opened()
    assert [breaker.retry_after(NOW + second) for second in (0, 12.5, 30, 31)] == [30, 17.5, 0, 0]
    breaker.advance(NOW + 30)
    assert breaker.retry_after(NOW + 30) == 0
    assert CircuitBreaker(BY_STREAK, NOW).retry_after(NOW) == 0


@pytest.mark.parametrize(
    ("policy", "detail", "cause"),
    [
        (BY_STREAK, "", "3 consecutive failures"),
        (BY_STREAK, "status 503", "3 consecutive failures; last: status 503"),
        (BY_RATE, "", "4 of 4 calls failed within 10 s"),
        (BY_RATE, "no answer within 2 s", "4 of 4 calls failed within 10 s; last: no answer within 2 s"),
    ],
)
def test_it_remembers_in_words_why_it_opened(policy: BreakerPolicy, detail: str, cause: str) -> None:
    breaker = CircuitBreaker(policy, NOW)
    assert breaker.last_opened is None
    while breaker.state is CLOSED:
        call(breaker, FAILURE, NOW, detail)
    assert breaker.last_opened == Transition(NOW, CLOSED, OPEN, cause)


def test_a_result_from_before_it_opened_changes_nothing() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    slow = admitted(breaker)
    for _ in range(3):
        call(breaker, FAILURE)
    assert breaker.settle(slow, SUCCESS, NOW + 1) is None
    assert (breaker.state, breaker.window_totals(NOW + 1)) == (OPEN, (0, 0))


# HALF_OPEN


@pytest.mark.parametrize("probes", [1, 3])
def test_it_admits_so_many_probes_at_once(probes: int) -> None:
    breaker, now = probing(probes)
    tickets = [admitted(breaker, now) for _ in range(probes)]
    assert breaker.admit(now) is None
    assert (breaker.probes_in_flight, breaker.rejected_total) == (probes, 1)
    assert all(ticket.is_probe for ticket in tickets)


@pytest.mark.parametrize("probes", [1, 3])
def test_it_closes_when_as_many_probes_succeeded(probes: int) -> None:
    breaker, now = probing(probes)
    for _ in range(probes - 1):
        assert call(breaker, SUCCESS, now) is None
    assert call(breaker, SUCCESS, now + 1) == Transition(now + 1, HALF_OPEN, CLOSED, f"{probes} probes succeeded")
    assert (breaker.state, breaker.since, breaker.probes_in_flight) == (CLOSED, now + 1, 0)


def test_what_was_counted_before_an_outage_is_forgotten_after_it() -> None:
    breaker, now = probing()
    call(breaker, SUCCESS, now)
    assert (breaker.consecutive_failures, breaker.window_totals(now)) == (0, (0, 0))
    assert breaker.last_opened is not None


@pytest.mark.parametrize(
    ("detail", "cause"), [("", "probe failed"), ("connection refused", "probe failed: connection refused")]
)
def test_one_failed_probe_opens_it_again(detail: str, cause: str) -> None:
    breaker, now = probing(3)
    call(breaker, SUCCESS, now)
    assert call(breaker, FAILURE, now + 1, detail) == Transition(now + 1, HALF_OPEN, OPEN, cause)
    assert breaker.last_opened == Transition(now + 1, HALF_OPEN, OPEN, cause)
    assert (breaker.opened_total, breaker.retry_after(now + 1)) == (2, 30)


def test_an_ignored_probe_gives_its_permit_back_and_counts_for_nothing() -> None:
    breaker, now = probing()
    assert call(breaker, IGNORED, now) is None
    assert (breaker.state, breaker.probes_in_flight) == (HALF_OPEN, 0)
    assert call(breaker, SUCCESS, now) is not None


@pytest.mark.parametrize("outcome", Outcome)
def test_a_call_from_before_the_outage_is_no_probe(outcome: Outcome) -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    slow = admitted(breaker)
    for _ in range(3):
        call(breaker, FAILURE)
    probe = admitted(breaker, NOW + 30)
    assert breaker.settle(slow, outcome, NOW + 31) is None
    assert (breaker.state, breaker.probes_in_flight) == (HALF_OPEN, 1)
    assert breaker.settle(probe, SUCCESS, NOW + 31) is not None


@pytest.mark.parametrize("outcome", Outcome)
def test_a_probe_of_an_earlier_recovery_changes_nothing_in_the_next(outcome: Outcome) -> None:
    breaker, now = probing(2)
    slow = admitted(breaker, now)
    call(breaker, FAILURE, now)
    current = admitted(breaker, now + 30)
    assert breaker.settle(slow, outcome, now + 31) is None
    assert (breaker.state, breaker.probes_in_flight) == (HALF_OPEN, 1)
    assert breaker.settle(current, SUCCESS, now + 31) is None
    assert call(breaker, SUCCESS, now + 31) is not None


def test_a_slow_failure_from_before_an_outage_cannot_open_a_recovered_breaker() -> None:
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=1), NOW)
    slow = admitted(breaker)
    call(breaker, FAILURE)
    call(breaker, SUCCESS, NOW + 30)
    assert breaker.settle(slow, FAILURE, NOW + 31) is None
    assert (breaker.state, breaker.consecutive_failures) == (CLOSED, 0)


def test_a_lost_probe_is_replaced_after_the_recovery_timeout() -> None:
    breaker, now = probing()
    admitted(breaker, now)
    assert breaker.admit(now + 29.9) is None
    replacement = admitted(breaker, now + 30)
    assert breaker.admit(now + 30) is None
    assert breaker.probes_in_flight == 1
    assert breaker.settle(replacement, SUCCESS, now + 31) is not None


@pytest.mark.parametrize("outcome", Outcome)
def test_a_lost_probe_that_comes_back_changes_nothing(outcome: Outcome) -> None:
    """Its permit has gone to another; giving it back again would let two through at once."""
    breaker, now = probing()
    lost = admitted(breaker, now)
    admitted(breaker, now + 30)
    assert breaker.settle(lost, outcome, now + 31) is None
    assert breaker.probes_in_flight == 1
    assert breaker.admit(now + 31) is None


# How it shows itself


def test_its_repr_tells_state_and_streak() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    call(breaker, FAILURE)
    assert repr(breaker) == "<CircuitBreaker [CLOSED, 1 consecutive failures]>"
    call(breaker, FAILURE)
    call(breaker, FAILURE)
    assert repr(breaker) == "<CircuitBreaker [OPEN, 0 consecutive failures]>"


# A random walk


@dataclass(eq=False)
class Try:
    """An admitted call as the model sees it; `era` counts the moves made before it."""

    ticket: Ticket
    era: int


@dataclass
class Model:
    """What a breaker is, kept as a log and lists, with no counts of its own."""

    policy: BreakerPolicy
    now: float = NOW
    state: State = CLOSED
    moves: list[tuple[float, State]] = field(default_factory=list)  # when, and where to
    calls: list[tuple[float, bool]] = field(default_factory=list)  # when, and whether it failed; since the last move
    probes: list[Try] = field(default_factory=list)  # out and not lost
    last_probe: float = NOW
    rejected: int = 0

    def move(self, state: State) -> None:
        self.state = state
        self.moves.append((self.now, state))
        self.calls, self.probes = [], []

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def recover(self) -> None:
        if self.state is OPEN and self.now - self.moves[-1][0] >= self.policy.recovery_timeout:
            self.move(HALF_OPEN)

    def may_try(self) -> bool:
        self.recover()
        if self.state is HALF_OPEN and len(self.probes) == self.policy.half_open_max_calls:
            if self.now - self.last_probe < self.policy.recovery_timeout:
                return False
            self.probes = []  # the youngest is that old, so all are lost
        return self.state is not OPEN

    def streak(self) -> int:
        failed = [is_failure for _, is_failure in self.calls]
        return len(failed) - (max((place for place, bad in enumerate(failed, 1) if not bad), default=0))

    def recent(self) -> list[bool]:
        """Calls of this tenth of the window and the nine before it."""
        tenth = self.policy.window / 10
        return [failed for at, failed in self.calls if self.now // tenth - at // tenth < 10]

    def count(self, outcome: Outcome) -> None:
        if outcome is IGNORED:
            return
        self.calls.append((self.now, outcome is FAILURE))
        if self.state is HALF_OPEN:
            if outcome is FAILURE:
                self.move(OPEN)
            elif len(self.calls) == self.policy.half_open_max_calls:
                self.move(CLOSED)
        elif outcome is FAILURE:
            recent = self.recent()
            is_often = (
                len(recent) >= self.policy.minimum_calls and sum(recent) / len(recent) >= self.policy.failure_rate
            )
            if is_often or self.streak() >= self.policy.failure_threshold:
                self.move(OPEN)


policies = st.builds(
    BreakerPolicy,
    failure_threshold=st.integers(1, 6),
    failure_rate=st.sampled_from((0.25, 0.5, 1.0)),
    minimum_calls=st.integers(1, 8),
    window=st.sampled_from((5.0, 20.0)),
    recovery_timeout=st.sampled_from((2.0, 10.0)),
    half_open_max_calls=st.integers(1, 3),
)


class Walk(RuleBasedStateMachine):
    """Calls and time in any order, results in any order and at any time later, or never."""

    tries: Bundle[Try] = Bundle("tries")
    breaker: CircuitBreaker
    model: Model

    @initialize(policy=policies)
    def begin(self, policy: BreakerPolicy) -> None:
        self.breaker, self.model = CircuitBreaker(policy, NOW), Model(policy)

    @rule(seconds=st.sampled_from((0.25, 0.5, 1.0, 2.0, 10.0)))
    def wait(self, seconds: float) -> None:
        self.model.wait(seconds)

    @rule()
    def look(self) -> None:
        before = self.breaker.state
        move = self.breaker.advance(self.model.now)
        self.model.recover()
        self.check_move(before, move)

    @rule(target=tries)
    def admit(self) -> Try | MultipleResults[Try]:
        before = self.breaker.state
        foretold, state = self.breaker.would_admit(self.model.now), self.breaker.state_at(self.model.now)
        assert self.breaker.state is before
        ticket = self.breaker.admit(self.model.now)
        assert (ticket is not None) == foretold
        assert self.breaker.state is state
        assert (ticket is not None) == self.model.may_try()
        assert before is self.breaker.state or (before, self.breaker.state) == (OPEN, HALF_OPEN)
        if ticket is None:
            self.model.rejected += 1
            return multiple()
        assert ticket.is_probe == (self.model.state is HALF_OPEN)
        admitted = Try(ticket, len(self.model.moves))
        if ticket.is_probe:
            self.model.probes.append(admitted)
            self.model.last_probe = self.model.now
        return admitted

    @rule(tried=consumes(tries), outcome=st.sampled_from(Outcome))
    def settle(self, tried: Try, outcome: Outcome) -> None:
        model, before = self.model, self.breaker.state
        move = self.breaker.settle(tried.ticket, outcome, model.now)
        counts = tried.era == len(model.moves) and (model.state is CLOSED or tried in model.probes)
        if tried in model.probes:
            model.probes.remove(tried)
        if counts:
            model.count(outcome)
        else:
            assert move is None
        self.check_move(before, move)

    def check_move(self, before: State, move: Transition | None) -> None:
        """Whatever moved it did so by the table and said so."""
        if move is None:
            assert self.breaker.state is before
            return
        assert (move.at, move.source, move.target) == (self.model.now, before, self.breaker.state)
        assert move.target in {target for (source, _), target in TRANSITIONS.items() if source is move.source}
        assert move.cause

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        breaker, model = self.breaker, self.model
        assert breaker.state is model.state
        assert breaker.rejected_total == model.rejected
        assert breaker.opened_total == sum(state is OPEN for _, state in model.moves)
        assert breaker.since == (model.moves[-1][0] if model.moves else NOW)
        assert breaker.probes_in_flight == len(model.probes) <= model.policy.half_open_max_calls
        if model.state is CLOSED:
            assert breaker.consecutive_failures == model.streak()
            assert breaker.window_totals(model.now) == (len(model.recent()), sum(model.recent()))

    @invariant()
    def the_wait_it_tells_is_true(self) -> None:
        wait = self.breaker.retry_after(self.model.now)
        assert 0 <= wait <= self.model.policy.recovery_timeout
        if self.model.state is OPEN:
            assert wait == max(0, self.model.moves[-1][0] + self.model.policy.recovery_timeout - self.model.now)


TestWalk = Walk.TestCase
TestWalk.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
