"""Refuses requests by priority while the event loop runs late. Synchronous; the random source is an argument."""

import math
import random
from collections import deque
from statistics import median

from api_gateway.errors import LoadShed
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses, retry_after

LAG_SAMPLES = 5  # samples of the event loop's lag whose median counts: one stall, or two, shed nobody
PRIORITY_WIDTH = 0.5  # of the greatest lag that may be: what takes a band from the first refused to the last
MAX_SHED_SHARE = 0.9  # of the highest band's requests: some always pass
_GATEWAY = "The gateway itself is overloaded: its event loop runs {lag:.2f} s late, and {most:g} s is the most it may."


class EventLoopShedder:
    """How late the event loop may run, beyond which requests are refused before anything is done for them.

    What counts is the median of the last few samples, so that a pause of the garbage collector or one stall sheds
    nobody. From `max_lag` seconds on the lowest band is shed, a share that rises to all of it at one and a half times
    that; then the next. Of the highest, one in ten always passes.
    """

    def __init__(
        self, max_lag: float | None, priorities: PriorityClasses = SINGLE_PRIORITY, *, source: random.Random
    ) -> None:
        """`max_lag` is seconds; None sheds nobody."""
        self.max_lag = math.inf if max_lag is None else max_lag
        self.lag = 0.0
        self.is_over = False
        self._priorities = priorities
        self._random = source
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)

    def __repr__(self) -> str:
        return f"<EventLoopShedder [{self.lag:.3f} of {self.max_lag:g} s]>"

    def change(self, max_lag: float | None, priorities: PriorityClasses) -> None:
        """Take another limit or other bands; the samples stay."""
        self.max_lag = math.inf if max_lag is None else max_lag
        self._priorities = priorities
        self.is_over = self.lag > self.max_lag

    def observe(self, seconds: float) -> None:
        """Take in a sample: the worse of a timer's delay and a turn of the event loop."""
        self._lags.append(seconds)
        self.lag = median(self._lags) if len(self._lags) == LAG_SAMPLES else 0.0
        self.is_over = self.lag > self.max_lag

    def share(self, priority: int) -> float:
        """Return which share of a band's requests is refused now, 0 to 1."""
        if not self.is_over:
            return 0.0
        share = (self.lag / self.max_lag - 1) / PRIORITY_WIDTH - priority
        return max(0.0, min(MAX_SHED_SHARE if priority == len(self._priorities) - 1 else 1.0, share))

    def sheds(self, priority: int) -> bool:
        """Decide on one request."""
        return self._random.random() < self.share(priority)

    def refusal(self, priority: int) -> LoadShed:
        """Return the error that tells a request of that band that it came at a bad time."""
        tier, share = self._priorities.name(priority), self.share(priority)
        whose = f" of tier {tier}" if tier else ""
        return LoadShed(
            f"{_GATEWAY.format(lag=self.lag, most=self.max_lag)} {share:.0%} of the requests{whose} are refused now.",
            retry_after=retry_after(self._random),
            extra={
                "tier": tier,
                "event_loop_lag_seconds": round(self.lag, 3),
                "max_event_loop_lag_seconds": self.max_lag,
            },
        )
