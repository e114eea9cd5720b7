"""The history of a circuit breaker: its transitions, and the failed calls before each. Values only."""

from dataclasses import dataclass

from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.call_windows import Counts


@dataclass(frozen=True, slots=True)
class Transition:
    """One transition, with its time (monotonic seconds) and cause. In mode `observe` it has no effect."""

    at: float
    source: State
    target: State
    cause: str
    mode: Mode = Mode.AUTO


@dataclass(frozen=True, slots=True)
class FailedCall:
    """A failed or slow call; `detail` is its status or error. Unknown values are None or empty."""

    at: float
    detail: str
    duration: float | None
    route: str
    request_id: str


@dataclass(frozen=True, slots=True)
class TransitionRecord:
    """A transition with the counts of the window and the last bad calls since the previous transition.

    `number` counts the transitions of the breaker from 1. `next_probe_at` is None unless the transition opened it.
    `worker` and `target_url` identify the breaker in merged histories; `target_url` None is the upstream's breaker.
    """

    number: int
    at: float
    source: State
    target: State
    cause: str
    mode: Mode
    counts: Counts
    failures: tuple[FailedCall, ...]
    next_probe_at: float | None
    worker: str = ""
    target_url: str | None = None
