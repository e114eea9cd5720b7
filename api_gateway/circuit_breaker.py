"""The circuit breaker of one upstream: a table of transitions, and the counts that trigger them.

Synchronous; `now` (monotonic seconds) is an argument; it neither logs nor waits. Admission hands out a ticket with the
generation of the state it was given in. A result that comes back after the state has changed carries an old
generation and changes nothing, so a slow failure from before an outage cannot reopen a breaker that has recovered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from api_gateway.models import Outcome


class State(StrEnum):
    """CLOSED lets all through, OPEN none, HALF_OPEN a few probes."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


class Event(StrEnum):
    """What can move a breaker."""

    THRESHOLD_REACHED = "threshold reached"
    RECOVERY_DUE = "recovery due"
    PROBE_FAILED = "probe failed"
    PROBES_SUCCEEDED = "probes succeeded"


# Every move there is. A move that is not here is a defect and raises KeyError.
TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.CLOSED, Event.THRESHOLD_REACHED): State.OPEN,
        (State.OPEN, Event.RECOVERY_DUE): State.HALF_OPEN,
        (State.HALF_OPEN, Event.PROBE_FAILED): State.OPEN,
        (State.HALF_OPEN, Event.PROBES_SUCCEEDED): State.CLOSED,
    }
)


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to open and how to recover; durations in seconds.

    It opens after `failure_threshold` consecutive failures, or when at least `minimum_calls` calls were counted
    inside `window` and the share of failures among them reaches `failure_rate`. After `recovery_timeout` it admits
    `half_open_max_calls` probes at once, and closes when as many have succeeded.
    """

    failure_threshold: int = 5
    failure_rate: float = 0.5
    minimum_calls: int = 20
    window: float = 30.0
    recovery_timeout: float = 30.0
    half_open_max_calls: int = 1


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to try the upstream once, valid for one generation of the breaker's state."""

    generation: int
    is_probe: bool


@dataclass(frozen=True, slots=True)
class Transition:
    """One move, when and why."""

    at: float
    source: State
    target: State
    cause: str


class CallWindow:
    """Calls and failures of the last `span` seconds, in ten slices; it forgets a slice at a time."""

    SLICES = 10

    def __init__(self, span: float) -> None:
        self._width = span / self.SLICES
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._numbers = [-1] * self.SLICES
        self._calls = [0] * self.SLICES
        self._failures = [0] * self.SLICES

    def record(self, now: float, *, is_failure: bool) -> None:
        """Count one call."""
        number = int(now / self._width)
        slot = number % self.SLICES
        if self._numbers[slot] != number:
            self._numbers[slot], self._calls[slot], self._failures[slot] = number, 0, 0
        self._calls[slot] += 1
        self._failures[slot] += is_failure

    def totals(self, now: float) -> tuple[int, int]:
        """Return calls and failures of the slices still inside the span."""
        oldest = int(now / self._width) - self.SLICES
        live = [slot for slot in range(self.SLICES) if self._numbers[slot] > oldest]
        return sum(self._calls[slot] for slot in live), sum(self._failures[slot] for slot in live)


class CircuitBreaker:
    """Counts outcomes and decides whether the upstream may be tried. Not thread-safe."""

    def __init__(self, policy: BreakerPolicy, now: float) -> None:
        self.policy = policy
        self.state = State.CLOSED
        self.since = now
        self.consecutive_failures = 0
        self.probes_in_flight = 0
        self.opened_total = 0
        self.rejected_total = 0
        self.last_opened: Transition | None = None
        self._window = CallWindow(policy.window)
        self._generation = 0
        self._closed_ticket = Ticket(0, is_probe=False)  # one for all: every call of a generation is alike
        self._probe_successes = 0
        self._last_probe_at = now

    def __repr__(self) -> str:
        return f"<CircuitBreaker [{self.state}, {self.consecutive_failures} consecutive failures]>"

    def admit(self, now: float) -> Ticket | None:
        """Return a ticket that must be settled once, or None when the upstream may not be tried."""
        if self.state is State.CLOSED:
            return self._closed_ticket
        self.advance(now)
        if self.would_admit(now):
            if self.probes_in_flight >= self.policy.half_open_max_calls:
                # Those that have not come back by now count as lost, so that none can lock us: their tickets are void.
                self._generation += 1
                self.probes_in_flight = 0
            self.probes_in_flight += 1
            self._last_probe_at = now
            return Ticket(self._generation, is_probe=True)
        self.rejected_total += 1
        return None

    def would_admit(self, now: float) -> bool:
        """Tell whether `admit` would give a ticket now; nothing moves by that."""
        state = self.state_at(now)
        if state is State.HALF_OPEN and self.state is state:
            is_free = self.probes_in_flight < self.policy.half_open_max_calls
            return is_free or now - self._last_probe_at >= self.policy.recovery_timeout
        return state is not State.OPEN

    def state_at(self, now: float) -> State:
        """Return the state with the move that time alone causes, which need not have been made yet."""
        is_due = self.state is State.OPEN and now - self.since >= self.policy.recovery_timeout
        return State.HALF_OPEN if is_due else self.state

    def settle(self, ticket: Ticket, outcome: Outcome, now: float, detail: str = "") -> Transition | None:
        """Count the outcome of an admitted try; `detail` says in words what failed. Returns the move it caused."""
        if ticket.generation != self._generation:
            return None
        if self.state is State.HALF_OPEN:
            return self._settle_probe(outcome, now, detail)
        if outcome is Outcome.FAILURE:
            return self._count_failure(now, detail)
        if outcome is Outcome.SUCCESS:
            self._window.record(now, is_failure=False)
            self.consecutive_failures = 0
        return None

    def advance(self, now: float) -> Transition | None:
        """Make the move that time alone causes: from OPEN to HALF_OPEN once the recovery timeout has passed."""
        if self.state_at(now) is not self.state:
            return self._move(Event.RECOVERY_DUE, now, f"{self.policy.recovery_timeout:g} s have passed")
        return None

    def retry_after(self, now: float) -> float:
        """Return the seconds until a probe may be let through, at least 0."""
        if self.state is State.OPEN:
            return max(0.0, self.since + self.policy.recovery_timeout - now)
        return 0.0

    def window_totals(self, now: float) -> tuple[int, int]:
        """Return calls and failures counted inside the window."""
        return self._window.totals(now)

    def _count_failure(self, now: float, detail: str) -> Transition | None:
        self._window.record(now, is_failure=True)
        self.consecutive_failures += 1
        cause = self._threshold_reached(now)
        if cause is None:
            return None
        return self._move(Event.THRESHOLD_REACHED, now, f"{cause}; last: {detail}" if detail else cause)

    def _threshold_reached(self, now: float) -> str | None:
        if self.consecutive_failures >= self.policy.failure_threshold:
            return f"{self.consecutive_failures} consecutive failures"
        calls, failures = self._window.totals(now)
        if calls >= self.policy.minimum_calls and failures / calls >= self.policy.failure_rate:
            return f"{failures} of {calls} calls failed within {self.policy.window:g} s"
        return None

    def _settle_probe(self, outcome: Outcome, now: float, detail: str) -> Transition | None:
        self.probes_in_flight -= 1
        if outcome is Outcome.FAILURE:
            return self._move(Event.PROBE_FAILED, now, f"probe failed: {detail}" if detail else "probe failed")
        if outcome is Outcome.SUCCESS:
            self._probe_successes += 1
            if self._probe_successes >= self.policy.half_open_max_calls:
                return self._move(Event.PROBES_SUCCEEDED, now, f"{self._probe_successes} probes succeeded")
        return None

    def _move(self, event: Event, now: float, cause: str) -> Transition:
        transition = Transition(now, self.state, TRANSITIONS[self.state, event], cause)
        self.state, self.since = transition.target, now
        self._generation += 1
        self._closed_ticket = Ticket(self._generation, is_probe=False)
        self.consecutive_failures = self.probes_in_flight = self._probe_successes = 0
        self._window.clear()
        if self.state is State.OPEN:
            self.opened_total += 1
            self.last_opened = transition
        return transition
