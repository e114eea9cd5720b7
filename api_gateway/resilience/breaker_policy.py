"""States, modes, transitions and settings of a circuit breaker. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """CLOSED admits all calls, OPEN none, HALF_OPEN a few probes."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


class Mode(StrEnum):
    """The mode that an operator has set for a breaker; independent of its state.

    `auto` acts by the state. `observe` counts calls and changes the state as `auto` does, and rejects nothing.
    `forced_open` admits nothing, `forced_closed` everything; both keep the state unchanged.
    """

    AUTO = "auto"
    OBSERVE = "observe"
    FORCED_CLOSED = "forced_closed"
    FORCED_OPEN = "forced_open"

    @property
    def is_forced(self) -> bool:
        """True for the modes in which the state does not change."""
        return self is Mode.FORCED_CLOSED or self is Mode.FORCED_OPEN


class Event(StrEnum):
    """An event that causes a transition."""

    THRESHOLD_REACHED = "threshold reached"
    RECOVERY_DUE = "recovery due"
    PROBE_FAILED = "probe failed"
    PROBES_SUCCEEDED = "probes succeeded"
    NOT_PROBED = "not probed"


# All transitions. One that is not in the table is a defect and raises KeyError.
TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.CLOSED, Event.THRESHOLD_REACHED): State.OPEN,
        (State.OPEN, Event.RECOVERY_DUE): State.HALF_OPEN,
        (State.HALF_OPEN, Event.PROBE_FAILED): State.OPEN,
        (State.HALF_OPEN, Event.PROBES_SUCCEEDED): State.CLOSED,
        (State.HALF_OPEN, Event.NOT_PROBED): State.CLOSED,
    }
)


def diagram() -> str:
    """Return the table as a Mermaid state diagram, for the documentation."""
    moves = [f"    {source} --> {target}: {event}" for (source, event), target in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.CLOSED}", *moves])


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and how it recovers; durations in seconds.

    It opens after `failure_threshold` consecutive failures, or when the window has at least `minimum_calls` calls and
    the share of failures reaches `failure_rate`, or the share of calls of `slow_call_duration` or longer reaches
    `slow_call_rate`. The window has the calls of the last `window` seconds, or the last `window_calls` calls.

    It stays open for `recovery_timeout`, doubled with each consecutive opening up to `max_recovery_timeout` (None: not
    doubled), plus a random share of up to `jitter`. Then it admits up to `half_open_max_calls` concurrent probes, and
    closes when as many have succeeded. For `ramp` seconds after that only a part of the calls is admitted; see
    `RampUp`. After it has been closed for `window` seconds, the open time begins with `recovery_timeout` again.
    """

    failure_threshold: int = 5
    failure_rate: float = 0.5
    minimum_calls: int = 20
    window: float = 30.0
    recovery_timeout: float = 30.0
    half_open_max_calls: int = 1
    slow_call_duration: float | None = None
    slow_call_rate: float | None = None
    window_calls: int | None = None
    max_recovery_timeout: float | None = None
    jitter: float = 0.0
    ramp: float = 0.0

    @property
    def longest_open_time(self) -> float:
        """The longest time for which the breaker stays open, in seconds, without jitter."""
        return self.max_recovery_timeout or self.recovery_timeout
