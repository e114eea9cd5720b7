"""Numbers and times of the limiter's decisions, by which a log tells their order."""

from collections.abc import Callable
from itertools import count

from api_gateway.models import NANOSECONDS, Clock, Decision


class DecisionNumbers:
    """Numbers what changes the buckets, in the order of the process, and converts its times to those since the epoch.

    The difference between the clocks is measured once: a step of the wall clock does not change the order of times,
    nor the time between two decisions. `process` names the process, because each counts from 1.
    """

    __slots__ = ("_epoch_ns", "next", "process")

    def __init__(self, process: str, clock_ns: Callable[[], int], wall_clock: Clock) -> None:
        """`clock_ns` is the monotonic clock in nanoseconds, `wall_clock` is in seconds since the epoch."""
        self.process = process
        self._epoch_ns = int(wall_clock() * NANOSECONDS) - clock_ns()
        self.next: Callable[[], int] = count(1).__next__

    def __repr__(self) -> str:
        return f"<DecisionNumbers of {self.process} since {self._epoch_ns} ns>"

    def since_epoch(self, now_ns: int) -> int:
        """Convert a time of the monotonic clock, in nanoseconds."""
        return now_ns + self._epoch_ns

    def time_of(self, decision: Decision) -> int:
        """Return the time of a decision; that of the store is on the clock of the store."""
        return decision.at_ns if decision.source == "store" else decision.at_ns + self._epoch_ns
