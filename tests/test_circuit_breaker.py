"""The breaker's table of transitions, what triggers each, and a random walk against a model that keeps a plain log."""

import random
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

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

from api_gateway.circuit_breaker import CircuitBreaker, Ticket
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_history import FailedCall, Transition, TransitionRecord
from api_gateway.resilience.breaker_policy import TRANSITIONS, BreakerPolicy, Event, Mode, State, diagram
from api_gateway.resilience.call_windows import Counts
from tests.cases import each
from tests.examples import examples

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


@each(("state", "event"), sorted(set(product(State, Event)) - set(TRANSITIONS)))
def test_a_move_not_in_the_table_raises_and_changes_nothing(state: State, event: Event) -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.state = state
    with pytest.raises(KeyError):
        breaker._transition(event, NOW + 1, "a defect")
    assert (breaker.state, breaker.since, breaker.opened_total) == (state, NOW, 0)


@each("start", State)
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


def test_an_ignored_call_neither_counts_nor_ends_the_streak() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    for outcome in (FAILURE, IGNORED, FAILURE, IGNORED):
        assert call(breaker, outcome) is None
    assert breaker.window_counts(NOW)[:2] == (2, 2)
    assert call(breaker, FAILURE) is not None


def test_it_opens_at_the_failure_rate() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    for outcome in (FAILURE, SUCCESS, SUCCESS):
        assert call(breaker, outcome) is None
    move = call(breaker, FAILURE)
    assert move == Transition(NOW, CLOSED, OPEN, "2 of 4 calls failed within 10 s")


def test_a_failure_rate_of_too_few_calls_is_not_evaluated() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    assert [call(breaker, FAILURE) for _ in range(3)] == [None, None, None]
    assert breaker.window_counts(NOW)[:2] == (3, 3)


def test_a_lower_failure_rate_does_not_open_it() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    for outcome in (SUCCESS, SUCCESS, SUCCESS, FAILURE, SUCCESS, FAILURE):
        assert call(breaker, outcome) is None
    assert breaker.state is CLOSED


@each(("calls", "failures", "rate"), [(25, 7, 0.28), (100, 7, 0.07), (100, 55, 0.55), (20, 20, 1)])
def test_exactly_the_configured_failure_rate_opens_it(calls: int, failures: int, rate: float) -> None:
    """A share that has no exact double: 25 * 0.28 comes out above 7."""
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=1000, failure_rate=rate, minimum_calls=calls), NOW)
    for outcome in [SUCCESS] * (calls - failures) + [FAILURE] * (failures - 1):
        assert call(breaker, outcome) is None
    assert call(breaker, FAILURE) is not None


@each(("later", "opens"), [(0.0, True), (8.9, True), (10.0, False), (100.0, False)])
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
    assert breaker.advance(NOW + 30) == Transition(NOW + 30, OPEN, HALF_OPEN, "open for 30 s")
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


@each(
    ("policy", "detail", "cause"),
    [
        (BY_STREAK, "", "3 consecutive failures"),
        (BY_STREAK, "status 503", "3 consecutive failures; last: status 503"),
        (BY_RATE, "", "4 of 4 calls failed within 10 s"),
        (BY_RATE, "no response within 2 s", "4 of 4 calls failed within 10 s; last: no response within 2 s"),
    ],
)
def test_it_records_why_it_opened(policy: BreakerPolicy, detail: str, cause: str) -> None:
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
    assert (breaker.state, breaker.window_counts(NOW + 1)) == (OPEN, (0, 0, 0))


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
    assert (breaker.consecutive_failures, breaker.window_counts(now)) == (0, (0, 0, 0))
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


@each("outcome", Outcome)
def test_a_call_from_before_the_outage_is_no_probe(outcome: Outcome) -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    slow = admitted(breaker)
    for _ in range(3):
        call(breaker, FAILURE)
    probe = admitted(breaker, NOW + 30)
    assert breaker.settle(slow, outcome, NOW + 31) is None
    assert (breaker.state, breaker.probes_in_flight) == (HALF_OPEN, 1)
    assert breaker.settle(probe, SUCCESS, NOW + 31) is not None


@each("outcome", Outcome)
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


def test_an_upstream_that_responds_later_than_the_recovery_timeout_recovers() -> None:
    """Each probe has lost its permit by the time it succeeds, as long as further requests arrive."""
    breaker, now = probing(2)
    first, second = admitted(breaker, now), admitted(breaker, now)
    admitted(breaker, now + 30)
    assert breaker.settle(first, SUCCESS, now + 45) is None
    assert breaker.settle(second, SUCCESS, now + 45) == Transition(now + 45, HALF_OPEN, CLOSED, "2 probes succeeded")


def test_a_probe_opens_the_breaker_again_although_it_has_lost_its_permit() -> None:
    breaker, now = probing()
    lost = admitted(breaker, now)
    admitted(breaker, now + 30)
    assert breaker.settle(lost, FAILURE, now + 45) == Transition(now + 45, HALF_OPEN, OPEN, "probe failed")


@each("outcome", [SUCCESS, IGNORED])
def test_the_late_outcome_of_a_probe_does_not_free_the_permit_that_another_one_has(outcome: Outcome) -> None:
    """Giving it back again would let two through at once."""
    breaker, now = probing(2)
    lost = admitted(breaker, now)
    admitted(breaker, now)
    admitted(breaker, now + 30)
    admitted(breaker, now + 30)
    assert breaker.settle(lost, outcome, now + 31) is None
    assert breaker.probes_in_flight == 2
    assert breaker.admit(now + 31) is None


@each("outcome", Outcome)
def test_the_late_outcome_of_a_probe_from_before_a_change_of_mode_changes_nothing(outcome: Outcome) -> None:
    breaker, now = probing()
    lost = admitted(breaker, now)
    admitted(breaker, now + 30)
    breaker.set_mode(Mode.OBSERVE, now + 31)
    assert breaker.settle(lost, outcome, now + 32) is None
    assert breaker.state is HALF_OPEN


# Slow calls

BY_SLOWNESS = BreakerPolicy(
    failure_threshold=1000, minimum_calls=4, window=10, slow_call_duration=2, slow_call_rate=0.5
)


def took(breaker: CircuitBreaker, seconds: float | None, outcome: Outcome = SUCCESS) -> Transition | None:
    return breaker.settle(admitted(breaker), outcome, NOW, duration=seconds)


def test_it_opens_at_the_slow_call_rate_though_all_calls_succeeded() -> None:
    breaker = CircuitBreaker(BY_SLOWNESS, NOW)
    for seconds in (0.1, None, 2.0):
        assert took(breaker, seconds) is None
    assert breaker.window_counts(NOW) == (3, 0, 1)
    assert took(breaker, 7.0) == Transition(NOW, CLOSED, OPEN, "2 of 4 calls took 2 s or longer within 10 s")
    assert breaker.slow_total == 2


def test_a_slow_call_rate_of_too_few_calls_is_not_evaluated() -> None:
    breaker = CircuitBreaker(BY_SLOWNESS, NOW)
    assert [took(breaker, 60) for _ in range(3)] == [None, None, None]


def test_a_slow_ignored_call_is_not_counted() -> None:
    breaker = CircuitBreaker(BY_SLOWNESS, NOW)
    assert [took(breaker, 60, IGNORED) for _ in range(9)] == [None] * 9
    assert (breaker.slow_total, breaker.window_counts(NOW)) == (0, (0, 0, 0))


def test_without_a_duration_for_them_no_call_is_slow() -> None:
    breaker = CircuitBreaker(BY_RATE, NOW)
    assert [took(breaker, 3600) for _ in range(9)] == [None] * 9
    assert breaker.window_counts(NOW) == (9, 0, 0)


def test_a_slow_call_that_failed_is_both() -> None:
    breaker = CircuitBreaker(BY_SLOWNESS, NOW)
    took(breaker, 3, FAILURE)
    assert (breaker.window_counts(NOW), breaker.consecutive_failures) == ((1, 1, 1), 1)


def test_a_slow_success_breaks_the_streak_of_failures() -> None:
    breaker = CircuitBreaker(BY_SLOWNESS, NOW)
    took(breaker, 0.1, FAILURE)
    took(breaker, 3)
    assert breaker.consecutive_failures == 0


def test_a_slow_probe_is_a_failed_one() -> None:
    breaker = CircuitBreaker(BY_SLOWNESS, NOW)
    for _ in range(4):
        took(breaker, 2)
    move = breaker.settle(admitted(breaker, NOW + 30), SUCCESS, NOW + 33, duration=2.5)
    assert move == Transition(NOW + 33, HALF_OPEN, OPEN, "probe failed: it took 2.5 s")


# A window of calls


def test_it_opens_at_the_failure_rate_of_the_last_calls_however_old() -> None:
    breaker = CircuitBreaker(BreakerPolicy(failure_threshold=1000, minimum_calls=3, window_calls=4), NOW)
    for day, outcome in enumerate((FAILURE, SUCCESS, SUCCESS, SUCCESS, FAILURE)):
        assert call(breaker, outcome, NOW + day * 86_400) is None
    move = call(breaker, FAILURE, NOW + 5 * 86_400)
    assert move is not None
    assert move.cause == "2 of the last 4 calls failed"


# How long it stays open

GROWING = BreakerPolicy(failure_threshold=1, window=20, recovery_timeout=10, max_recovery_timeout=60)


def fail_again(breaker: CircuitBreaker, now: float) -> float:
    """Let the next probe fail as soon as it is due; return when."""
    due = now + breaker.retry_after(now)
    call(breaker, FAILURE, due)
    assert breaker.state is OPEN
    return due


def test_the_open_time_doubles_with_each_opening_in_a_row_up_to_its_maximum() -> None:
    breaker, now, waits = opened(GROWING), NOW, []
    for _ in range(5):
        waits.append(breaker.retry_after(now))
        now = fail_again(breaker, now)
    assert waits == [10, 20, 40, 60, 60]


@each(("closed_for", "then"), [(0, 40), (19.9, 40), (20, 10)])
def test_it_is_the_first_one_again_after_a_stable_period(closed_for: float, then: float) -> None:
    breaker = opened(GROWING)
    now = fail_again(breaker, NOW)
    now += breaker.retry_after(now)
    call(breaker, SUCCESS, now)
    assert breaker.state is CLOSED
    call(breaker, FAILURE, now + closed_for)
    assert breaker.retry_after(now + closed_for) == then


def test_without_a_maximum_it_stays_open_for_the_same_time_each_time() -> None:
    breaker, now = opened(BreakerPolicy(failure_threshold=1)), NOW
    for _ in range(4):
        assert breaker.retry_after(now) == 30
        now = fail_again(breaker, now)


def test_jitter_only_adds_and_retry_after_includes_it() -> None:
    policy, waits = replace(GROWING, jitter=0.5), set()
    for seed in range(50):
        breaker = CircuitBreaker(policy, NOW, random.Random(seed))
        call(breaker, FAILURE)
        wait = breaker.retry_after(NOW)
        assert 10 <= wait <= 15
        assert breaker.next_probe_at() == NOW + wait
        assert breaker.admit(NOW + wait - 0.001) is None
        assert breaker.admit(NOW + wait) is not None
        waits.add(round(wait, 2))
    assert len(waits) > 40, "breakers that opened together do not probe together"


# Which requests are probes


def test_an_unsafe_request_is_no_probe_while_safe_ones_come() -> None:
    breaker, now = probing()
    breaker._last_idempotent_at = now
    assert breaker.admit(now + 0.5, is_safe=False) is None
    assert not breaker.would_admit(now + 0.5, is_safe=False)
    assert admitted(breaker, now + 0.6).is_probe


def test_an_unsafe_request_is_the_probe_when_no_safe_one_has_come_for_a_second() -> None:
    breaker = opened()
    breaker.admit(NOW + 29.5)
    assert breaker.admit(NOW + 30.4, is_safe=False) is None
    ticket = breaker.admit(NOW + 30.5, is_safe=False)
    assert ticket is not None
    assert ticket.is_probe


def test_a_service_with_unsafe_requests_only_waits_no_longer_than_any() -> None:
    assert opened().admit(NOW + 30, is_safe=False) is not None


def test_while_closed_every_request_is_alike() -> None:
    assert CircuitBreaker(BY_STREAK, NOW).admit(NOW, is_safe=False) is not None


# The ramp

RAMPED = BreakerPolicy(failure_threshold=1, recovery_timeout=30, ramp=10, window=5)


def recovered(rate: int) -> tuple[CircuitBreaker, float]:
    """Return a breaker that had so many calls a second before its outage and has just closed, and the time."""
    breaker = CircuitBreaker(RAMPED, NOW)
    for number in range(20 * rate):
        call(breaker, SUCCESS, NOW + number / rate)
    call(breaker, FAILURE, NOW + 20)
    call(breaker, SUCCESS, NOW + 50)
    assert breaker.state is CLOSED
    return breaker, NOW + 50


def test_traffic_returns_gradually() -> None:
    breaker, now = recovered(100)
    assert not breaker.is_transparent
    passed = [breaker.admit(now + number / 200) is not None for number in range(2000)]
    assert sum(passed[:200]) < 30
    assert 850 * 0.5 < sum(passed) < 1100 * 0.5 + 20
    assert breaker.rejected_total == 2000 - sum(passed)
    assert [breaker.ramp_share(now + second) for second in (0, 5, 10)] == [0, 0.5, None]
    assert breaker.admit(now + 10) is not None
    assert breaker.is_transparent


def test_a_call_that_the_ramp_rejects_gets_retry_after() -> None:
    breaker, now = recovered(100)
    while breaker.admit(now) is not None:
        pass
    wait = breaker.retry_after(now)
    assert 0 < wait <= 0.1
    assert not breaker.would_admit(now)
    assert "its traffic is ramping up" in breaker.refusal_reason(now)
    assert breaker.would_admit(now + wait)


def test_calls_of_the_ramp_count_like_any() -> None:
    breaker, now = recovered(100)
    assert call(breaker, FAILURE, now + 1) is not None
    assert breaker.state is OPEN
    assert breaker.ramp_share(now + 1) is None


def test_a_rate_that_was_held_down_by_a_ramp_is_not_mistaken_for_the_usual_one() -> None:
    breaker, now = recovered(1000)
    usual = breaker._rate
    for number in range(10):
        call(breaker, SUCCESS, now + number / 100)
    call(breaker, FAILURE, now + 1)
    call(breaker, SUCCESS, now + 40)
    assert breaker.ramp is not None
    assert breaker.ramp.rate == usual > 900


def asked(breaker: CircuitBreaker, start: float, end: float, rate: int) -> None:
    """Ask for so many calls a second; those that are admitted succeed."""
    for number in range(int((end - start) * rate)):
        now = start + number / rate
        ticket = breaker.admit(now)
        if ticket is not None:
            breaker.settle(ticket, SUCCESS, now)


def test_after_a_forced_open_from_before_a_restart_traffic_grows_to_what_is_asked_for() -> None:
    breaker = CircuitBreaker(RAMPED, NOW)
    breaker.set_mode(Mode.FORCED_OPEN, NOW)
    asked(breaker, NOW, NOW + 60, 200)
    breaker.set_mode(Mode.AUTO, NOW + 60)
    assert breaker.ramp is not None
    assert breaker.ramp.rate == pytest.approx(200, rel=0.15)


def test_a_breaker_that_opens_in_its_first_seconds_takes_what_is_asked_for_as_the_rate() -> None:
    breaker = CircuitBreaker(RAMPED, NOW)
    call(breaker, FAILURE, NOW + 0.1)
    asked(breaker, NOW + 1, NOW + 30, 200)
    call(breaker, SUCCESS, NOW + 30.2)
    assert breaker.ramp is not None
    assert breaker.ramp.rate == pytest.approx(200, rel=0.15)


def test_an_outage_just_after_a_ramp_finds_the_rate_known() -> None:
    breaker, now = recovered(200)
    asked(breaker, now, now + 10.5, 200)
    call(breaker, FAILURE, now + 10.5)
    call(breaker, SUCCESS, now + 41)
    assert breaker.ramp is not None
    assert breaker.ramp.rate == pytest.approx(200, rel=0.15)


def test_a_burst_on_an_open_breaker_does_not_raise_a_known_rate() -> None:
    breaker = CircuitBreaker(RAMPED, NOW)
    asked(breaker, NOW, NOW + 20, 50)
    call(breaker, FAILURE, NOW + 20)
    asked(breaker, NOW + 20, NOW + 49, 500)
    call(breaker, SUCCESS, NOW + 50)
    assert breaker.ramp is not None
    assert breaker.ramp.rate == pytest.approx(50, rel=0.15)


# Modes


def test_forced_open_admits_nothing_until_it_ends() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.set_mode(Mode.FORCED_OPEN, NOW, NOW + 60)
    assert [breaker.admit(NOW + second) for second in (0, 30, 59.9)] == [None, None, None]
    assert (breaker.state, breaker.rejected_total, breaker.retry_after(NOW + 20)) == (CLOSED, 3, 40)
    assert breaker.refusal_reason(NOW + 20) == "forced open by an operator for another 40.0 s."
    assert breaker.would_admit(NOW + 60)
    assert breaker.admit(NOW + 60) is not None
    assert breaker.mode is Mode.AUTO


def test_forced_open_without_an_end_promises_no_time() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.set_mode(Mode.FORCED_OPEN, NOW)
    assert breaker.admit(NOW + 1e6) is None
    assert breaker.retry_after(NOW + 1e6) == breaker.policy.recovery_timeout
    assert breaker.refusal_reason(NOW) == "forced open by an operator."


def test_traffic_returns_gradually_after_forced_open() -> None:
    breaker = CircuitBreaker(RAMPED, NOW)
    for number in range(1000):
        call(breaker, SUCCESS, NOW + number / 100)
    breaker.set_mode(Mode.FORCED_OPEN, NOW + 10)
    breaker.set_mode(Mode.AUTO, NOW + 600)
    assert breaker.ramp is not None
    assert breaker.ramp.rate > 90


@each("state", State)
def test_forced_closed_admits_all_and_moves_nothing(state: State) -> None:
    ways = {CLOSED: (CircuitBreaker(BY_STREAK, NOW), NOW), OPEN: (opened(), NOW), HALF_OPEN: probing()}
    breaker, now = ways[state]
    breaker.set_mode(Mode.FORCED_CLOSED, now)
    for second in range(100):
        ticket = admitted(breaker, now + second)
        assert not ticket.is_probe
        assert breaker.settle(ticket, FAILURE, now + second) is None
    assert (breaker.state, breaker.rejected_total) == (state, 0)
    assert breaker.next_probe_at() is None


def test_failures_counted_while_it_was_forced_closed_open_it_afterwards() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.set_mode(Mode.FORCED_CLOSED, NOW)
    for _ in range(5):
        call(breaker, FAILURE)
    breaker.set_mode(Mode.AUTO, NOW)
    assert breaker.state is CLOSED
    assert call(breaker, FAILURE) is not None


def test_observe_moves_and_counts_and_refuses_nothing() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.set_mode(Mode.OBSERVE, NOW)
    for _ in range(3):
        call(breaker, FAILURE)
    assert (breaker.state, breaker.opened_total, breaker.would_open_total) == (OPEN, 0, 1)
    assert call(breaker, FAILURE, NOW + 1) is None
    assert (breaker.rejected_total, breaker.would_reject_total) == (0, 1)
    probe, other = admitted(breaker, NOW + 30), admitted(breaker, NOW + 30)
    assert not probe.is_probe, "it may be retried as any other"
    assert breaker.settle(other, FAILURE, NOW + 31) is None, "as if it had been refused"
    assert breaker.settle(probe, SUCCESS, NOW + 31) is not None
    assert [(record.mode, record.target) for record in breaker.records] == [
        (Mode.OBSERVE, OPEN),
        (Mode.OBSERVE, HALF_OPEN),
        (Mode.OBSERVE, CLOSED),
    ]


def test_what_is_on_its_way_when_the_mode_changes_counts_no_more() -> None:
    breaker, now = probing()
    probe = admitted(breaker, now)
    breaker.set_mode(Mode.OBSERVE, now)
    assert breaker.probes_in_flight == 0
    assert breaker.settle(probe, SUCCESS, now + 1) is None


def test_the_same_mode_again_only_moves_its_end() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    breaker.set_mode(Mode.OBSERVE, NOW, NOW + 5)
    ticket = admitted(breaker)
    breaker.set_mode(Mode.OBSERVE, NOW + 1, NOW + 50)
    breaker.advance(NOW + 5)
    assert breaker.mode is Mode.OBSERVE
    breaker.settle(ticket, SUCCESS, NOW + 5)
    assert breaker.window_counts(NOW + 5)[:2] == (1, 0)


@each(("mode", "refuses"), [("auto", True), ("forced_open", True), ("observe", False)])
def test_it_reports_whether_it_refuses(mode: str, refuses: bool) -> None:  # noqa: FBT001 - a table's column
    breaker = opened()
    breaker.set_mode(Mode(mode), NOW)
    assert breaker.refuses(NOW) == refuses
    assert not CircuitBreaker(BY_STREAK, NOW).refuses(NOW)


# The flight record


def test_each_move_is_written_down_with_what_led_to_it() -> None:
    breaker = CircuitBreaker(BY_STREAK, NOW)
    call(breaker, SUCCESS)
    for number in range(3):
        ticket = admitted(breaker)
        at = NOW + number
        breaker.settle(ticket, FAILURE, at, "status 503", duration=0.5, route="users", request_id=f"r{number}")
    call(breaker, SUCCESS, NOW + 40)
    first, second, third = breaker.records
    assert first == TransitionRecord(
        number=1,
        at=NOW + 2,
        source=CLOSED,
        target=OPEN,
        cause="3 consecutive failures; last: status 503",
        mode=Mode.AUTO,
        counts=Counts(4, 3, 0),
        failures=tuple(FailedCall(NOW + n, "status 503", 0.5, "users", f"r{n}") for n in range(3)),
        next_probe_at=NOW + 32,
    )
    assert (second.source, second.target, second.failures, second.next_probe_at) == (OPEN, HALF_OPEN, (), None)
    assert (third.number, third.target) == (3, CLOSED)


def test_the_record_holds_the_last_ten_failures_and_the_last_fifty_moves() -> None:
    breaker = CircuitBreaker(replace(BY_STREAK, failure_threshold=12), NOW)
    for number in range(12):
        breaker.settle(admitted(breaker), FAILURE, NOW, f"status 5{number:02}")
    assert [failure.detail for failure in breaker.records[0].failures] == [f"status 5{n:02}" for n in range(2, 12)]
    for number in range(1, 61):
        call(breaker, FAILURE, NOW + 30 * number)
    assert len(breaker.records) == 50
    assert breaker.records[-1].number == 121


# The diagram in the documentation


def test_the_diagram_shows_every_move() -> None:
    lines = diagram().splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> CLOSED"]
    assert len(lines) == 2 + len(TRANSITIONS)
    assert "    HALF_OPEN --> OPEN: probe failed" in lines


def test_the_diagram_in_the_documentation_is_current() -> None:
    page = (Path(__file__).parent.parent / "docs/circuit-breakers.md").read_text()
    assert f"```mermaid\n{diagram()}\n```" in page


# How it shows itself


def test_its_repr_shows_state_and_streak() -> None:
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
    probes: list[Try] = field(default_factory=list)  # out, with a permit
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
            self.probes = []  # the youngest is that old, so all lose their permits
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
        counts = tried.era == len(model.moves)  # also if it was a probe and has lost its permit
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
            assert breaker.window_counts(model.now)[:2] == (len(model.recent()), sum(model.recent()))

    @invariant()
    def the_wait_it_tells_is_true(self) -> None:
        wait = self.breaker.retry_after(self.model.now)
        assert 0 <= wait <= self.model.policy.recovery_timeout
        if self.model.state is OPEN:
            assert wait == max(0, self.model.moves[-1][0] + self.model.policy.recovery_timeout - self.model.now)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=examples(150), stateful_step_count=40)
