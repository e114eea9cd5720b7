"""What a circuit breaker leaves behind of its moves: each one, and the calls that led to it. Values only."""

from dataclasses import dataclass

from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.call_windows import Counts


@dataclass(frozen=True, slots=True)
class Transition:
    """One move, when and why. In mode `observe` it is what would have been."""

    at: float
    source: State
    target: State
    cause: str
    mode: Mode = Mode.AUTO


@dataclass(frozen=True, slots=True)
class FailedCall:
    """A call that failed, or was slow; `detail` is its status or error. What is not known of it is None or empty."""

    at: float
    detail: str
    duration: float | None
    route: str
    request_id: str


@dataclass(frozen=True, slots=True)
class TransitionRecord:
    """A move and what led to it: the window's counts, and the last calls that failed since the move before.

    `number` counts the breaker's moves from 1. `next_probe_at` is None unless the move opened it. `worker` and
    `target_url` say whose breaker it is, once that is told with others: None is the upstream's own.
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
