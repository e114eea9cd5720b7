"""The circuit breaker of an upstream or of one of its targets: admission of calls, and transitions by their outcomes.

Synchronous; `now` (monotonic seconds) is an argument; no logging, no waiting. Admission returns a ticket with the
generation of the state. An outcome from before the last transition is ignored, so that a slow failure from before an
outage cannot reopen a breaker that has recovered.

Long because it is one state machine: every method reads or changes the same state.
"""

import random
from collections import deque
from dataclasses import dataclass

from api_gateway.models import Outcome
from api_gateway.resilience.breaker_history import FailedCall, Transition, TransitionRecord
from api_gateway.resilience.breaker_policy import TRANSITIONS, BreakerPolicy, Event, Mode, State
from api_gateway.resilience.call_windows import Counts, CountWindow, TimeWindow, Window
from api_gateway.resilience.principals import RecentPrincipals
from api_gateway.resilience.ramp_up import RampUp
from api_gateway.resilience.rate_meter import RateMeter

MAX_RECORDS = 50
MAX_RECORDED_FAILURES = 10
IDEMPOTENT_PROBE_WAIT = 1.0  # seconds without a repeatable request, after which another one may be the probe
# Seconds for which some requests leave the next probe to others: those of a principal whose probe did not succeed, and
# those that may not be repeated.
PROBE_HEAD_START = 5.0
RATE_KNOWN_AFTER = 3.0  # seconds of being CLOSED after which the measured rate counts as the usual one
NO_SLOW_CALLS = float("inf")


@dataclass(frozen=True, slots=True)
class Ticket:
    """Admission of one call, valid for one generation of the breaker's state."""

    generation: int
    is_probe: bool


_UNCOUNTED = Ticket(-1, is_probe=False)  # no generation: the outcome of the call is ignored


class CircuitBreaker:
    """Admits or rejects calls by the outcomes of earlier ones. Not thread-safe.

    States CLOSED, OPEN and HALF_OPEN with the transitions of TRANSITIONS; the mode is independent of them, see `Mode`.
    `ramp` is set only while CLOSED in a mode that is not forced; `probes_in_flight` is above 0 only while HALF_OPEN.
    Every transition and change of mode begins a new generation, which invalidates all tickets. So does the loss of all
    probes, but only their permits are lost: outcomes of all generations since `_oldest_generation` count.
    """

    __slots__ = (
        "_admission_seekers",
        "_closed_ticket",
        "_due",
        "_failed_prober",
        "_failing_principals",
        "_failures",
        "_generation",
        "_is_streak_shared",
        "_last_idempotent_at",
        "_last_probe_at",
        "_meter",
        "_oldest_generation",
        "_open_time",
        "_principals",
        "_probe_successes",
        "_random",
        "_rate",
        "_reopened_by",
        "_streak_by",
        "_transition_count",
        "_vacant_since",
        "_window",
        "consecutive_failures",
        "is_transparent",
        "last_opened",
        "mode",
        "mode_until",
        "opened_total",
        "policy",
        "probes_in_flight",
        "ramp",
        "records",
        "rejected_total",
        "since",
        "slow_after",
        "slow_total",
        "state",
        "would_open_total",
        "would_reject_total",
    )

    def __init__(self, policy: BreakerPolicy, now: float, source: random.Random | None = None) -> None:
        """`source` is for the jitter of open times; without it there is none."""
        self.policy = policy
        self.state = State.CLOSED
        self.mode = Mode.AUTO
        self.mode_until: float | None = None
        self.since = now
        self.is_transparent = True  # CLOSED without ramp, and not forced open: `admit` checks nothing more
        self.slow_after = NO_SLOW_CALLS if policy.slow_call_duration is None else policy.slow_call_duration
        self.consecutive_failures = 0
        self.probes_in_flight = 0
        self.opened_total = self.rejected_total = self.slow_total = 0
        self.would_open_total = self.would_reject_total = 0  # in mode observe
        self.last_opened: Transition | None = None
        self.records: deque[TransitionRecord] = deque(maxlen=MAX_RECORDS)
        self.ramp: RampUp | None = None
        self._random = source
        self._window: Window = _window(policy)
        self._principals = RecentPrincipals()  # of every call that has ended
        self._failing_principals = RecentPrincipals()  # of failed or slow calls since the last transition
        self._streak_by: str | None = None  # the principal of the first of the consecutive failures
        self._is_streak_shared = False  # they are of several principals, or no principal can have caused one of them
        self._meter = RateMeter()
        self._failures: deque[FailedCall] = deque(maxlen=MAX_RECORDED_FAILURES)
        self._generation = self._oldest_generation = 0
        self._closed_ticket = Ticket(0, is_probe=False)  # shared by all calls of a generation
        self._probe_successes = 0
        self._last_probe_at = self._last_idempotent_at = now
        self._admission_seekers = RecentPrincipals()  # of requests for admission while the breaker was not CLOSED
        self._failed_prober: str | None = (
            None  # the principal of the last probe, unless it succeeded or no client can have caused its failure
        )
        self._reopened_by: str | None = None  # the principal of the failed probe that has opened it again
        self._vacant_since = now  # when the slot for the next probe became free
        self._transition_count = 0
        self._rate = 0.0  # usual calls per second; 0 if unknown
        self._open_time = 0.0  # seconds, of the last opening, without jitter
        self._due = now

    def __repr__(self) -> str:
        mode = "" if self.mode is Mode.AUTO else f" {self.mode},"
        return f"<CircuitBreaker [{self.state},{mode} {self.consecutive_failures} consecutive failures]>"

    # Admission

    def admit(self, now: float, *, is_safe: bool = True, principal: str | None = None) -> Ticket | None:
        """Return a ticket, which must be settled once, or None if the call is rejected.

        `is_safe`: the request may be repeated. One that may not be becomes a probe only if no repeatable request has
        arrived for IDEMPOTENT_PROBE_WAIT seconds, or none has become the probe for PROBE_HEAD_START seconds, for
        example because load balancing sends none of them to this target. `principal` is the client or address of the
        call, None if unknown. A principal whose last probe did not succeed gets the next one only after
        PROBE_HEAD_START seconds if others have requested admission, so that it cannot keep the breaker OPEN alone.
        """
        meter = self._meter
        meter.count += 1  # rejected calls too: the meter measures the demand
        if now >= meter.due:
            meter.mark(now)
        if self.is_transparent:
            return self._closed_ticket
        self.advance(now)
        ticket = self._admit_by_mode(now, is_safe=is_safe, principal=principal)
        self._admission_seekers.note(principal, now)
        if is_safe and (ticket is not None or not self._must_yield(principal, now)):
            self._last_idempotent_at = now
        return ticket

    def note_request(self, now: float, *, is_safe: bool, principal: str | None) -> None:
        """Record that a request arrived that could have been the probe, whether or not it requests admission here."""
        self._admission_seekers.note(principal, now)
        if is_safe and not self._must_yield(principal, now):
            self._last_idempotent_at = now

    def would_admit(self, now: float, *, is_safe: bool = True, principal: str | None = None) -> bool:
        """Return whether `admit` would return a ticket now; changes nothing."""
        mode = self.mode_at(now)
        return mode is not Mode.FORCED_OPEN and (
            mode is not Mode.AUTO or self._passes(now, is_safe=is_safe, principal=principal)
        )

    def state_at(self, now: float) -> State:
        """Return the state at `now`: an OPEN breaker counts as HALF_OPEN once its open time is over."""
        is_due = self.state is State.OPEN and now >= self._due and not self.mode_at(now).is_forced
        return State.HALF_OPEN if is_due else self.state

    def mode_at(self, now: float) -> Mode:
        """Return the mode at `now`: AUTO once `mode_until` has passed."""
        return Mode.AUTO if self.mode_until is not None and now >= self.mode_until else self.mode

    def refuses(self, now: float) -> bool:
        """Return whether all calls are rejected at `now`."""
        mode = self.mode_at(now)
        return mode is Mode.FORCED_OPEN or (mode is Mode.AUTO and self.state_at(now) is State.OPEN)

    def _admit_by_mode(self, now: float, *, is_safe: bool, principal: str | None) -> Ticket | None:
        if self.mode is Mode.FORCED_OPEN:
            self.rejected_total += 1
            return None
        if self.mode is Mode.FORCED_CLOSED:
            return self._closed_ticket if self.state is State.CLOSED else _UNCOUNTED
        ticket = self._admit_by_state(now, is_safe=is_safe, principal=principal)
        if ticket is None and self.mode is Mode.OBSERVE:
            self.would_reject_total += 1
            return _UNCOUNTED
        self.rejected_total += ticket is None
        return ticket

    def _admit_by_state(self, now: float, *, is_safe: bool, principal: str | None) -> Ticket | None:
        if not self._passes(now, is_safe=is_safe, principal=principal):
            return None
        if self.state is State.CLOSED:
            if self.ramp is not None:
                self.ramp.take(now)
            return self._closed_ticket
        if self.probes_in_flight >= self.policy.half_open_max_calls:
            # Probes without an outcome by now lose their permits, so that they cannot block the breaker.
            self._generation += 1
            self.probes_in_flight = 0
        self.probes_in_flight += 1
        self._last_probe_at = now
        self._failed_prober = principal
        return Ticket(self._generation, is_probe=self.mode is Mode.AUTO)

    def _passes(self, now: float, *, is_safe: bool, principal: str | None = None) -> bool:
        """Return whether the state admits a request now."""
        state = self.state_at(now)
        if state is State.CLOSED:
            return self.ramp is None or self.ramp.is_over(now) or self.ramp.wait(now) == 0
        if state is State.OPEN or (not is_safe and self._is_for_idempotent(now)):
            return False
        is_free = self.probes_in_flight < self.policy.half_open_max_calls or self.state is not state
        if not is_free and now - self._last_probe_at < self.policy.recovery_timeout:
            return False
        return not self._must_yield(principal, now)

    def _is_for_idempotent(self, now: float) -> bool:
        """Return whether the next probe is left to repeatable requests."""
        return now - self._last_idempotent_at < IDEMPOTENT_PROBE_WAIT and self._is_in_head_start(now)

    def _must_yield(self, principal: str | None, now: float) -> bool:
        """Return whether this principal must leave the next probe to others that requested admission meanwhile."""
        if principal is None or principal not in (self._failed_prober, self._reopened_by):
            return False
        if not self._is_in_head_start(now):
            return False
        opened_at = self.last_opened.at if self.last_opened else now
        return self._admission_seekers.has_other_since(principal, opened_at)

    def _is_in_head_start(self, now: float) -> bool:
        """Return whether the next probe has been possible for less than PROBE_HEAD_START seconds, or is not yet."""
        return now - self._probe_possible_since < PROBE_HEAD_START

    @property
    def _probe_possible_since(self) -> float:
        """When the next probe became possible, or will."""
        if self.probes_in_flight >= self.policy.half_open_max_calls:  # the last one was lost
            return self._last_probe_at + self.policy.recovery_timeout
        return self._due if self.state is State.OPEN else self._vacant_since

    # Results

    def settle(
        self,
        ticket: Ticket,
        outcome: Outcome,
        now: float,
        detail: str = "",
        *,
        duration: float | None = None,
        route: str = "",
        request_id: str = "",
        principal: str | None = "",
    ) -> Transition | None:
        """Record the outcome of an admitted call. Return the transition that it caused, or None.

        `duration` is the seconds from sending to the head of the response or to the failure. `detail` describes a
        failure; it, `route` and `request_id` go into the history. `principal` is the client or address of the call,
        None for a failure that no client can have caused. Failures of a single principal do not open the breaker while
        others have used it within `policy.window`.
        """
        principals = self._principals
        if principal is not None:
            if principal != principals.last:  # `RecentPrincipals.note` inlined: this is on the fast path
                principals.other_at, principals.last = principals.last_at, principal
            principals.last_at = now
        if ticket.generation != self._generation or outcome is Outcome.IGNORED:
            if ticket.generation == self._generation and self.state is State.HALF_OPEN:
                self.probes_in_flight -= 1
                self._vacant_since = now
            if ticket.generation < self._oldest_generation or outcome is Outcome.IGNORED:
                return None
        is_slow = duration is not None and duration >= self.slow_after
        if outcome is Outcome.SUCCESS and not is_slow and self.state is State.CLOSED:
            self._window.record(now, is_failure=False)
            self.consecutive_failures = 0
            return None
        if outcome is Outcome.FAILURE or is_slow:
            self.slow_total += is_slow
            self._failures.append(FailedCall(now, detail or _slowness(duration), duration, route, request_id))
        if self.state is State.HALF_OPEN:
            if ticket.generation == self._generation:
                self.probes_in_flight -= 1
            self._failed_prober = None if outcome is Outcome.SUCCESS and not is_slow else principal
            self._reopened_by = self._failed_prober or self._reopened_by
            return self._settle_probe(outcome, now, detail, duration if is_slow else None)
        self._note_failing_principal(principal, now, is_failure=outcome is Outcome.FAILURE)
        return self._count_bad_call(outcome, now, detail, is_slow=is_slow)

    def advance(self, now: float) -> Transition | None:
        """Apply changes that depend on time alone: the transition to HALF_OPEN, and the end of a mode or a ramp.

        `admit` applies them too and does not return the transition, so this one is in the history but not in the log.
        """
        if self.mode_until is not None and now >= self.mode_until:
            self.set_mode(Mode.AUTO, now)
        if self.ramp is not None and self.ramp.is_over(now):
            self.ramp = None
            self._refresh_flag()
        if self.state_at(now) is not self.state:
            return self._transition(Event.RECOVERY_DUE, now, f"open for {round(self._due - self.since, 1):g} s")
        return None

    def close_if_not_probed(self, now: float) -> Transition | None:
        """Close the breaker if a probe has been possible for `longest_open_time` and no call has become one.

        For breakers whose state has effects although there are no calls. Return the transition, or None.
        """
        if self.mode.is_forced or self.state_at(now) is not State.HALF_OPEN:
            return None
        unprobed = now - max(self._probe_possible_since, self._last_probe_at)
        if unprobed < self.policy.longest_open_time:
            return None
        self.advance(now)
        return self._transition(Event.NOT_PROBED, now, f"no probe for {round(unprobed, 1):g} s")

    def set_mode(self, mode: Mode, now: float, until: float | None = None) -> None:
        """Set the mode, until the time `until` or until the next call. Outcomes of calls in flight are ignored.

        After FORCED_OPEN, traffic returns by the ramp, as after an outage.
        """
        before, self.mode, self.mode_until = self.mode, mode, until
        if mode is before:
            return
        self._begin_generation()
        if mode is Mode.FORCED_OPEN and self.state is State.CLOSED:
            self._note_rate(now)
        if before is Mode.FORCED_OPEN and self.state is State.CLOSED:
            self._begin_ramp(now)
        if mode.is_forced:
            self.ramp = None
        self._refresh_flag()

    def change_policy(self, policy: BreakerPolicy, now: float) -> None:
        """Apply another policy. State, counts, history and tickets are kept.

        While OPEN, the remaining open time changes in proportion to `recovery_timeout`. A window of another length
        begins empty.
        """
        before, self.policy = self.policy, policy
        if policy == before:
            return
        self.slow_after = NO_SLOW_CALLS if policy.slow_call_duration is None else policy.slow_call_duration
        if (policy.window, policy.window_calls) != (before.window, before.window_calls):
            self._window = _window(policy)
        self.advance(now)
        open_time = self._open_time * policy.recovery_timeout / before.recovery_timeout
        open_time = min(open_time, policy.longest_open_time)
        if self.state is State.OPEN:
            self._due = self.since + (self._due - self.since) * open_time / self._open_time
        self._open_time = open_time
        if not policy.ramp:
            self.ramp = None
        self._refresh_flag()

    # Views

    def retry_after(self, now: float) -> float:
        """Return the seconds until a request may be admitted; `recovery_timeout` if forced open without an end."""
        mode = self.mode_at(now)
        if mode is Mode.FORCED_OPEN:
            return self.policy.recovery_timeout if self.mode_until is None else self.mode_until - now
        if mode is Mode.FORCED_CLOSED:
            return 0.0
        if self.state is State.OPEN:
            return max(0.0, self._due - now)
        return self.ramp.wait(now) if self.ramp is not None and not self.ramp.is_over(now) else 0.0

    def next_probe_at(self) -> float | None:
        """Return when the next probe is due (monotonic seconds); None unless OPEN and not forced."""
        return self._due if self.state is State.OPEN and not self.mode.is_forced else None

    def ramp_share(self, now: float) -> float | None:
        """Return the share of the rate before the outage that is admitted, 0 to 1; None without a ramp."""
        return self.ramp.share(now) if self.ramp is not None and not self.ramp.is_over(now) else None

    def refusal_reason(self, now: float) -> str:
        """Return why a request is rejected, as the end of a sentence that begins with 'The circuit breaker is'."""
        wait = self.retry_after(now)
        state = self.state_at(now)
        if self.mode_at(now) is Mode.FORCED_OPEN:
            end = "" if self.mode_until is None else f" for another {wait:.1f} s"
            return f"forced open by an operator{end}."
        if state is State.OPEN:
            cause = f" after {self.last_opened.cause}" if self.last_opened else ""
            return f"OPEN{cause}. Next probe in {wait:.1f} s."
        if state is State.HALF_OPEN:
            if self.would_admit(now):
                return "HALF_OPEN; requests that may be repeated, and those of other clients, have precedence."
            return "HALF_OPEN, and all its probes are in flight."
        return f"CLOSED, and its traffic is ramping up. Next call in {wait:.1f} s."

    def window_counts(self, now: float) -> Counts:
        """Return the counts of the window."""
        return self._window.counts(now)

    # Counting

    def _note_failing_principal(self, principal: str | None, now: float, *, is_failure: bool) -> None:
        """Record the principal of a failed or slow call."""
        self._failing_principals.note(principal, now)
        if not is_failure:
            return
        if self.consecutive_failures == 0:
            self._streak_by, self._is_streak_shared = principal, principal is None
        elif principal != self._streak_by:
            self._is_streak_shared = True

    def has_one_failing_principal(self, now: float) -> bool:
        """Return whether a threshold is reached, and the breaker is CLOSED because one principal has all the failures.

        A single principal opens it only if no other has called within `policy.window`.
        """
        return self.state is State.CLOSED and self._exceeded(now) is not None and self._threshold_reached(now) is None

    def _count_bad_call(self, outcome: Outcome, now: float, detail: str, *, is_slow: bool) -> Transition | None:
        is_failure = outcome is Outcome.FAILURE
        self._window.record(now, is_failure=is_failure, is_slow=is_slow)
        self.consecutive_failures = self.consecutive_failures + 1 if is_failure else 0
        cause = None if self.mode.is_forced else self._threshold_reached(now)
        if cause is None:
            return None
        return self._transition(Event.THRESHOLD_REACHED, now, f"{cause}; last: {detail}" if detail else cause)

    def _threshold_reached(self, now: float) -> str | None:
        """Return the threshold reached by calls of several principals, or of the only principal, or None."""
        since = now - self.policy.window
        is_alone = not self._principals.has_several_since(since)
        return self._exceeded(
            now,
            by_streak=is_alone or self._is_streak_shared,
            by_share=is_alone or self._failing_principals.has_several_since(since),
        )

    def _exceeded(self, now: float, *, by_streak: bool = True, by_share: bool = True) -> str | None:
        """Return a description of the first of the selected thresholds that is reached, or None."""
        policy = self.policy
        if by_streak and self.consecutive_failures >= policy.failure_threshold:
            return f"{self.consecutive_failures} consecutive failures"
        if not by_share:
            return None
        calls, failures, slow = self._window.counts(now)
        if calls < policy.minimum_calls:
            return None
        which, where = self._window.describe(calls)
        if failures / calls >= policy.failure_rate:
            return f"{failures} {which} calls failed{where}"
        if policy.slow_call_rate is not None and slow / calls >= policy.slow_call_rate:
            return f"{slow} {which} calls took {self.slow_after:g} s or longer{where}"
        return None

    def _settle_probe(self, outcome: Outcome, now: float, detail: str, slow: float | None) -> Transition | None:
        if outcome is Outcome.FAILURE:
            return self._transition(Event.PROBE_FAILED, now, f"probe failed: {detail}" if detail else "probe failed")
        if slow is not None:
            return self._transition(Event.PROBE_FAILED, now, f"probe failed: {_slowness(slow)}")
        self._probe_successes += 1
        if self._probe_successes >= self.policy.half_open_max_calls:
            return self._transition(Event.PROBES_SUCCEEDED, now, f"{self._probe_successes} probes succeeded")
        return None

    # Transitions

    def _transition(self, event: Event, now: float, cause: str) -> Transition:
        transition = Transition(now, self.state, TRANSITIONS[self.state, event], cause, self.mode)
        counts = self._window.counts(now)
        if transition.target is State.OPEN:
            self._open(transition)
        self.state, self.since = transition.target, now
        self._vacant_since = self._due if event is Event.RECOVERY_DUE else now
        self._begin_generation()
        self.consecutive_failures = self._probe_successes = 0
        self._window.clear()
        self._failing_principals = RecentPrincipals()
        if self.state is State.CLOSED:
            self._reopened_by = None
            self._begin_ramp(now)
        self._refresh_flag()
        self._record_transition(transition, counts)
        return transition

    def _open(self, transition: Transition) -> None:
        now = transition.at
        if transition.source is State.CLOSED:
            self._note_rate(now)
        self.ramp = None
        self._open_time = self._next_open_time(transition)
        spread = self.policy.jitter * self._random.random() if self._random is not None else 0.0
        self._due = now + self._open_time * (1 + spread)
        self._last_idempotent_at = now
        self.last_opened = transition
        if self.mode is Mode.OBSERVE:
            self.would_open_total += 1
        else:
            self.opened_total += 1

    def _next_open_time(self, transition: Transition) -> float:
        """Return the open time in seconds: the initial one if CLOSED for long enough, else twice the last one."""
        policy = self.policy
        was_stable = transition.source is State.CLOSED and transition.at - self.since >= policy.window
        if self._open_time == 0 or was_stable or policy.max_recovery_timeout is None:
            return policy.recovery_timeout
        return max(policy.recovery_timeout, min(2 * self._open_time, policy.max_recovery_timeout))

    def _note_rate(self, now: float) -> None:
        """Store the usual rate for the next ramp, unless a ramp is in progress or it was CLOSED only briefly."""
        is_whole = self.ramp is None or self.ramp.is_over(now)
        if is_whole and now - self.since >= RATE_KNOWN_AFTER:
            self._rate = self._meter.rate(now)

    def _begin_ramp(self, now: float) -> None:
        """Begin the ramp to the usual rate, or to the current demand if that is unknown."""
        if self.policy.ramp:
            self.ramp = RampUp(self._rate or self._meter.rate(now), self.policy.ramp, now)

    def _begin_generation(self) -> None:
        """Invalidate all tickets."""
        self._generation += 1
        self._oldest_generation = self._generation
        self._closed_ticket = Ticket(self._generation, is_probe=False)
        self.probes_in_flight = 0

    def _refresh_flag(self) -> None:
        is_plain = self.state is State.CLOSED and self.ramp is None
        self.is_transparent = is_plain and self.mode is not Mode.FORCED_OPEN

    def _record_transition(self, transition: Transition, counts: Counts) -> None:
        self._transition_count += 1
        record = TransitionRecord(
            number=self._transition_count,
            at=transition.at,
            source=transition.source,
            target=transition.target,
            cause=transition.cause,
            mode=transition.mode,
            counts=counts,
            failures=tuple(self._failures),
            next_probe_at=self.next_probe_at(),
        )
        self.records.append(record)
        self._failures.clear()


def _window(policy: BreakerPolicy) -> Window:
    return TimeWindow(policy.window) if policy.window_calls is None else CountWindow(policy.window_calls)


def _slowness(duration: float | None) -> str:
    return "" if duration is None else f"it took {duration:.3g} s"
