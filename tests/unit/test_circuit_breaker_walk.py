"""A random walk over the whole breaker: every policy, every mode, results in any order, late or never."""

import random
from dataclasses import dataclass

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
    precondition,
    rule,
)

from api_gateway.circuit_breaker import CircuitBreaker, Ticket
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_history import TransitionRecord
from api_gateway.resilience.breaker_policy import TRANSITIONS, BreakerPolicy, Mode, State
from api_gateway.resilience.ramp_up import RampUp
from tests.examples import examples

NOW = 1000.0
CLOSED, OPEN, HALF_OPEN = State.CLOSED, State.OPEN, State.HALF_OPEN
PAUSES = st.sampled_from((0.0, 0.01, 0.25, 0.5, 1.0, 2.0, 10.0, 60.0))

policies = st.builds(
    BreakerPolicy,
    failure_threshold=st.integers(1, 5),
    failure_rate=st.sampled_from((0.25, 0.5, 1.0)),
    minimum_calls=st.integers(1, 6),
    window=st.sampled_from((5.0, 20.0)),
    window_calls=st.none() | st.integers(6, 20),
    recovery_timeout=st.sampled_from((2.0, 10.0)),
    max_recovery_timeout=st.none() | st.sampled_from((10.0, 35.0)),
    half_open_max_calls=st.integers(1, 3),
    slow_call_duration=st.just(1.0),
    slow_call_rate=st.none() | st.sampled_from((0.5, 1.0)),
    jitter=st.sampled_from((0.0, 0.1, 1.0)),
    ramp=st.sampled_from((0.0, 10.0)),
)


@dataclass(eq=False)
class Try:
    """An admitted call, and how many moves and changes of mode there had been."""

    ticket: Ticket
    era: tuple[int, int]


class Walk(RuleBasedStateMachine):
    """What must hold whatever happens."""

    tries: Bundle[Try] = Bundle("tries")
    breaker: CircuitBreaker

    @initialize(policy=policies, seed=st.integers(0, 9))
    def begin(self, policy: BreakerPolicy, seed: int) -> None:
        self.now = NOW
        self.policy = policy
        self.breaker = CircuitBreaker(policy, NOW, random.Random(seed))
        self.mode, self.changes = Mode.AUTO, 0
        self.probes: list[Try] = []  # out, of this recovery, with a permit
        self.replaced: list[Try] = []  # out, of this recovery, whose permits others have got
        self.seen: list[TransitionRecord] = []
        self.ramp: RampUp | None = None
        self.ramped: list[float] = []  # when calls passed on the present ramp

    @property
    def era(self) -> tuple[int, int]:
        last = self.breaker.records[-1].number if self.breaker.records else 0
        return last, self.changes

    def follow(self) -> None:
        """Take note of what the breaker has done."""
        breaker = self.breaker
        if breaker.mode is not self.mode:  # set, or ended by itself
            self.mode, self.changes = breaker.mode, self.changes + 1
        number = self.seen[-1].number if self.seen else 0
        self.seen += [record for record in breaker.records if record.number > number]
        self.probes = [probe for probe in self.probes if probe.era == self.era]
        self.replaced = [probe for probe in self.replaced if probe.era == self.era]
        if breaker.ramp is not self.ramp:
            self.ramp, self.ramped = breaker.ramp, []

    @rule(seconds=PAUSES)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def look(self) -> None:
        self.breaker.advance(self.now)
        self.follow()

    @rule(mode=st.sampled_from(Mode), seconds=st.none() | st.sampled_from((0.5, 5.0, 60.0)))
    def set_mode(self, mode: Mode, seconds: float | None) -> None:
        state, rejected = self.breaker.state, self.breaker.rejected_total
        self.breaker.set_mode(mode, self.now, None if seconds is None else self.now + seconds)
        assert (self.breaker.state, self.breaker.rejected_total) == (state, rejected), "a mode is no move"
        self.follow()

    @rule(target=tries, is_safe=st.booleans())
    def admit(self, *, is_safe: bool) -> Try | MultipleResults[Try]:
        breaker = self.breaker
        foretold = breaker.would_admit(self.now, is_safe=is_safe)
        refused, would_refuse = breaker.rejected_total, breaker.would_reject_total
        ticket = breaker.admit(self.now, is_safe=is_safe)
        self.follow()
        assert (ticket is not None) == foretold
        assert breaker.rejected_total - refused == (ticket is None)
        if breaker.mode in (Mode.OBSERVE, Mode.FORCED_CLOSED):
            assert ticket is not None
            assert not ticket.is_probe
        if breaker.mode is Mode.FORCED_OPEN or (breaker.mode is Mode.AUTO and breaker.state is OPEN):
            assert ticket is None
        if ticket is None:
            return multiple()
        admitted = Try(ticket, self.era)
        if breaker.state is HALF_OPEN and ticket.generation == breaker._generation:
            self.replaced += [p for p in self.probes if p.ticket.generation != ticket.generation]
            self.probes = [p for p in self.probes if p.ticket.generation == ticket.generation] + [admitted]
            assert ticket.is_probe == (breaker.mode is Mode.AUTO)
            assert len(self.probes) <= self.policy.half_open_max_calls
        elif breaker.mode is Mode.AUTO or breaker.would_reject_total == would_refuse:
            self.ramped.append(self.now)
        return admitted

    @rule(
        tried=consumes(tries),
        outcome=st.sampled_from(Outcome),
        duration=st.none() | st.sampled_from((0.1, 1.0, 5.0)),
    )
    def settle(self, tried: Try, outcome: Outcome, duration: float | None) -> None:
        breaker = self.breaker
        is_counted = breaker.state is not HALF_OPEN or tried in self.probes or tried in self.replaced
        is_late = tried.era != self.era or not is_counted
        before = self.shown()
        move = breaker.settle(tried.ticket, outcome, self.now, "status 500", duration=duration)
        if tried in self.probes:
            self.probes.remove(tried)
        elif tried in self.replaced:
            self.replaced.remove(tried)
        if is_late:
            assert move is None
            assert self.shown() == before, "a result of another generation changes nothing"
        if move is not None:
            assert move.target is breaker.state
            assert move.mode is breaker.mode
            assert not breaker.mode.is_forced
        self.follow()

    @rule(steps=st.integers(1, 8))
    def fail_until_it_opens(self, steps: int) -> None:
        """Reach deep openings, which single steps seldom do."""
        for _ in range(steps):
            self.now += self.breaker.retry_after(self.now) if self.breaker.state is OPEN else 0.0
            ticket = self.breaker.admit(self.now)
            if ticket is not None:
                self.breaker.settle(ticket, Outcome.FAILURE, self.now)
            self.follow()

    @precondition(lambda self: self.breaker.state is HALF_OPEN and self.breaker.mode is Mode.AUTO)
    @rule()
    def recover(self) -> None:
        for _ in range(self.policy.half_open_max_calls):
            ticket = self.breaker.admit(self.now)
            if ticket is not None:
                self.breaker.settle(ticket, Outcome.SUCCESS, self.now)
            self.follow()

    def shown(self) -> tuple[object, ...]:
        breaker = self.breaker
        return (
            breaker.state,
            breaker.since,
            breaker.probes_in_flight,
            breaker.consecutive_failures,
            breaker.window_counts(self.now),
            breaker.slow_total,
            len(breaker.records),
        )

    # What holds

    @invariant()
    def every_move_is_in_the_table_and_follows_the_one_before(self) -> None:
        table = {(source, target) for (source, _), target in TRANSITIONS.items()}
        state = CLOSED
        for number, record in enumerate(self.seen, 1):
            assert record.number == number
            assert record.source is state
            assert (record.source, record.target) in table
            assert record.cause
            assert not record.mode.is_forced
            assert len(record.failures) <= 10
            state = record.target
        assert self.breaker.state is state
        assert len(self.breaker.records) == min(50, len(self.seen))

    @invariant()
    def openings_are_counted_by_what_they_were(self) -> None:
        openings = [record.mode for record in self.seen if record.target is OPEN]
        assert self.breaker.opened_total == openings.count(Mode.AUTO)
        assert self.breaker.would_open_total == openings.count(Mode.OBSERVE)

    @invariant()
    def there_are_never_more_probes_than_allowed(self) -> None:
        assert self.breaker.probes_in_flight == len(self.probes) <= self.policy.half_open_max_calls

    @invariant()
    def open_times_in_a_row_do_not_fall_and_keep_to_the_maximum(self) -> None:
        """The jitter apart, which only adds: twice the time is at least the time with all of its jitter."""
        policy, last, closed_at = self.policy, 0.0, float("inf")
        longest = max(policy.recovery_timeout, policy.max_recovery_timeout or 0.0)
        for record in self.seen:
            if record.target is CLOSED:
                closed_at = record.at
            if record.target is not OPEN:
                continue
            assert record.next_probe_at is not None
            wait = record.next_probe_at - record.at
            was_stable = record.source is CLOSED and record.at - closed_at >= policy.window
            base = policy.recovery_timeout if last == 0 or was_stable else max(last, min(2 * last, longest))
            base = base if policy.max_recovery_timeout is not None else policy.recovery_timeout
            assert base - 1e-9 <= wait <= base * (1 + policy.jitter) + 1e-9
            assert base <= longest
            last = base

    @invariant()
    def the_wait_it_tells_is_true(self) -> None:
        """Nobody gets through a moment before; a safe request gets through then, be it as a probe."""
        if self.breaker.would_admit(self.now) or self.breaker.state_at(self.now) is HALF_OPEN:
            return
        wait = self.breaker.retry_after(self.now)
        if self.breaker.mode_at(self.now) is Mode.FORCED_OPEN:
            return
        assert wait > 0
        early, then = self.now + wait * 0.999 - 1e-6, self.now + wait + 1e-6
        assert not self.breaker.would_admit(early)
        assert self.breaker.state_at(early) is not HALF_OPEN
        assert self.breaker.would_admit(then) or self.breaker.state_at(then) is HALF_OPEN

    @invariant()
    def the_ramp_lets_no_more_through_than_it_says(self) -> None:
        ramp, times = self.ramp, self.ramped
        if ramp is None or self.breaker.ramp is not ramp:
            return
        for first, start in enumerate(times):
            passed = len(times) - first
            assert passed <= ramp.between(start, times[-1]) + ramp.limit(start) + 1e-6

    @invariant()
    def it_says_of_itself_what_is_so(self) -> None:
        breaker = self.breaker
        assert str(breaker.state) in repr(breaker)
        if breaker.is_transparent:
            assert breaker.state is CLOSED
            assert breaker.ramp is None
            assert breaker.mode is not Mode.FORCED_OPEN
        assert (breaker.next_probe_at() is None) == (breaker.state is not OPEN or breaker.mode.is_forced)


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=examples(60))
