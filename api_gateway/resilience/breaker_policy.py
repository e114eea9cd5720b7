"""What a circuit breaker goes by: the states there are, every move between them, and the figures that make it move.

Values only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """CLOSED lets all through, OPEN none, HALF_OPEN a few probes."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"


class Mode(StrEnum):
    """What an operator makes of a breaker: its state stands beside it.

    `auto` acts by the state. `observe` counts and moves in the same way and refuses nothing. `forced_open` admits
    nothing, `forced_closed` all, and in both the state stays as it is.
    """

    AUTO = "auto"
    OBSERVE = "observe"
    FORCED_CLOSED = "forced_closed"
    FORCED_OPEN = "forced_open"

    @property
    def is_forced(self) -> bool:
        """True while nothing moves the state."""
        return self is Mode.FORCED_CLOSED or self is Mode.FORCED_OPEN


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


def diagram() -> str:
    """Return the table as a Mermaid state diagram, for the documentation."""
    moves = [f"    {source} --> {target}: {event}" for (source, event), target in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.CLOSED}", *moves])


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When to open and how to recover; durations in seconds.

    It opens after `failure_threshold` consecutive failures, or when at least `minimum_calls` calls were counted and
    the share of failures among them reaches `failure_rate`, or that of calls of `slow_call_duration` or longer
    reaches `slow_call_rate`. What counts are the calls of the last `window` seconds, or the last `window_calls`.

    It stays open for `recovery_timeout`, twice as long with each opening in a row up to `max_recovery_timeout` (None:
    always as long), and up to `jitter` of that longer by chance. Then it admits `half_open_max_calls` probes at once,
    and closes when as many have succeeded. For `ramp` seconds after that not all calls are admitted; see `RampUp`.
    It opens for its first time again once it has been closed for `window` seconds.
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
