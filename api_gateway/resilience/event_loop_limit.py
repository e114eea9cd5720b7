"""Load shedding by priority while the event loop runs late. Synchronous; the random source is passed in."""

import math
import random
from collections import deque
from statistics import median

from api_gateway.errors import LoadShed
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses, retry_after

LAG_SAMPLES = 5  # samples whose median is the lag, so that one or two stalls shed no requests
PRIORITY_WIDTH = 0.5  # share of the maximum lag over which the refused share of a priority rises from 0 to 1
MAX_SHED_SHARE = 0.9  # the largest refused share of the highest priority
_GATEWAY = "The gateway itself is overloaded: its event loop runs {lag:.2f} s late, and the limit is {most:g} s."


class EventLoopShedder:
    """Sheds requests while the event loop runs later than `max_lag` seconds, before any work is done for them.

    The lag is the median of the last samples, so that a garbage collection or a single stall sheds nothing. Above
    `max_lag` a share of the lowest priority is refused, which rises to all of it at 1.5 times `max_lag`; then the next
    priority follows. Of the highest, 10 % are always admitted.
    """

    def __init__(
        self, max_lag: float | None, priorities: PriorityClasses = SINGLE_PRIORITY, *, source: random.Random
    ) -> None:
        """`max_lag` is the maximum lag in seconds; None: no load shedding."""
        self.max_lag = math.inf if max_lag is None else max_lag
        self.lag = 0.0
        self.is_over = False
        self._priorities = priorities
        self._random = source
        self._lags: deque[float] = deque(maxlen=LAG_SAMPLES)

    def __repr__(self) -> str:
        return f"<EventLoopShedder [{self.lag:.3f} of {self.max_lag:g} s]>"

    def change(self, max_lag: float | None, priorities: PriorityClasses) -> None:
        """Apply another limit or other priorities; the samples are kept."""
        self.max_lag = math.inf if max_lag is None else max_lag
        self._priorities = priorities
        self.is_over = self.lag > self.max_lag

    def observe(self, seconds: float) -> None:
        """Record a sample in seconds: the larger of a timer's delay and the duration of a loop iteration."""
        self._lags.append(seconds)
        self.lag = median(self._lags) if len(self._lags) == LAG_SAMPLES else 0.0
        self.is_over = self.lag > self.max_lag

    def share(self, priority: int) -> float:
        """Return the share of a priority's requests that is refused now, 0 to 1."""
        if not self.is_over:
            return 0.0
        share = (self.lag / self.max_lag - 1) / PRIORITY_WIDTH - priority
        return max(0.0, min(MAX_SHED_SHARE if priority == len(self._priorities) - 1 else 1.0, share))

    def sheds(self, priority: int) -> bool:
        """Decide at random, by `share`, whether one request is refused."""
        return self._random.random() < self.share(priority)

    def refusal(self, priority: int) -> LoadShed:
        """Return the error for a refused request of this priority."""
        tier, share = self._priorities.name(priority), self.share(priority)
        whose = f" of tier {tier}" if tier else ""
        return LoadShed(
            f"{_GATEWAY.format(lag=self.lag, most=self.max_lag)} {share:.0%} of the requests{whose} are refused.",
            retry_after=retry_after(self._random),
            extra={
                "tier": tier,
                "event_loop_lag_seconds": round(self.lag, 3),
                "max_event_loop_lag_seconds": self.max_lag,
            },
        )
