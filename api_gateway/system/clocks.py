"""The clocks of a gateway, as one value that a test can replace."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from api_gateway.models import Clock


class Moment(NamedTuple):
    """One moment on the monotonic and on the wall clock, in seconds."""

    monotonic: float
    wall: float  # since the epoch

    def wall_of(self, at: float) -> float:
        """Convert a monotonic time to seconds since the epoch."""
        return self.wall - (self.monotonic - at)


@dataclass(frozen=True, slots=True)
class Clocks:
    """The monotonic clock, in seconds and in integer nanoseconds, and the wall clock in seconds since the epoch.

    Limiter, breakers, health checks, metrics and operator endpoints read these. Connection timeouts are timers of the
    event loop, which has its own clock.
    """

    monotonic: Clock
    monotonic_ns: Callable[[], int]
    wall: Clock

    def now(self) -> Moment:
        """Return the current time on both clocks."""
        return Moment(self.monotonic(), self.wall())


SYSTEM_CLOCKS = Clocks(time.monotonic, time.monotonic_ns, time.time)
