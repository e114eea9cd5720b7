"""The clocks that a gateway decides by, as one value that a test can replace."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from api_gateway.models import Clock


class Moment(NamedTuple):
    """One moment on both clocks, in seconds."""

    monotonic: float
    wall: float  # since the epoch

    def wall_of(self, at: float) -> float:
        """Return the time of day, in seconds since the epoch, of a moment on the monotonic clock."""
        return self.wall - (self.monotonic - at)


@dataclass(frozen=True, slots=True)
class Clocks:
    """The monotonic clock, in seconds and in integer nanoseconds, and the time of day in seconds since the epoch.

    Limiter, breakers, health checks, metrics and operator endpoints read these. Timeouts of connections are timers of
    the event loop, which has a clock of its own.
    """

    monotonic: Clock
    monotonic_ns: Callable[[], int]
    wall: Clock

    def now(self) -> Moment:
        """Return the present moment."""
        return Moment(self.monotonic(), self.wall())


SYSTEM_CLOCKS = Clocks(time.monotonic, time.monotonic_ns, time.time)
