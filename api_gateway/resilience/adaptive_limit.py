"""How much may be under way at an upstream, found from how long its answers take.

After the gradient of Netflix's concurrency-limits (Gradient2) and Envoy's adaptive concurrency filter. Unlike Envoy's,
it never refuses everybody in order to measure: it lowers the limit to about a third, for some tenths of a second every
half minute. Synchronous and without clock.
"""

import math
from dataclasses import dataclass

WINDOW = 0.1  # seconds of a window at least; twice the undisturbed latency where that is more
MIN_SAMPLES = 20  # samples without which a window goes on
MAX_SAMPLES = 1_000  # samples after which a window knows enough
INITIAL_LIMIT = 50.0  # the limit before anything is known, within min_limit and max_limit
SMOOTHING = 0.2  # of the way to what a window says
LARGEST_STEP = 0.5  # what a window may leave of a limit, before smoothing
TRIMMED = 0.05  # of the samples: the slowest, which may have other causes than a queue
BASELINE_INTERVAL = 30.0  # seconds between two looks at the undisturbed latency
BASELINE_RETRY_INTERVAL = 1.0  # seconds until the next one, after one that was not low enough; and until the first
BASELINE_SAMPLES = 60  # that end a look, or
MAX_BASELINE_TIME = 1.0  # seconds, if that is sooner
MARGIN = 0.5  # of what should leave no queue is under way during such a look


@dataclass(frozen=True, slots=True)
class AdaptivePolicy:
    """The range of the limit, and the latency that is held, as a multiple of the undisturbed one."""

    min_limit: int = 10
    max_limit: int = 1000
    tolerance: float = 1.4


class GradientController:
    """A limit that holds the upstream's latency near `tolerance` times what it is without a queue.

    The time to the head of an answer is averaged window by window and smoothed, and compared with the `baseline`,
    what it was at the best of times. Below the tolerance the limit grows by its square root, which is room for a
    queue; above it shrinks in proportion, by half at most; both smoothed. Only a limit that was met in a window moves:
    one that nobody needs says nothing of the upstream, and stays. The baseline follows better times, and worse ones
    when little is under way; and every `BASELINE_INTERVAL` seconds of need the limit is lowered to what should leave
    no queue, until enough has been seen of the latency without one. These looks come at multiples of that time on the
    clock, so that the processes of one machine take them together. A look that finds the latency lowered as much as
    the limit has found a queue still: then the limit is lowered for good, and the next look comes soon.
    """

    __slots__ = (
        "_baseline_at",
        "_before",
        "_counted_from",
        "_samples",
        "_window_started",
        "baseline",
        "is_measuring_baseline",
        "latency",
        "limit",
        "policy",
    )

    def __init__(self, policy: AdaptivePolicy, now: float, start: float = INITIAL_LIMIT) -> None:
        self.policy = policy
        self.limit = self._within(start)
        self.baseline: float | None = None  # seconds
        self.latency: float | None = None  # seconds, smoothed
        self.is_measuring_baseline = False
        self._baseline_at = now + BASELINE_RETRY_INTERVAL
        self._before = 0.0  # seconds, the latency before a look
        self._samples: list[float] = []
        self._window_started = self._counted_from = now

    def __repr__(self) -> str:
        return f"<GradientController [{self.limit:.1f}, {self.latency} against {self.baseline} s]>"

    def change_policy(self, policy: AdaptivePolicy) -> None:
        """Go by another policy; what has been learnt of the upstream stays."""
        self.policy = policy
        self.limit = self._within(self.limit)

    @property
    def allowed(self) -> float:
        """The limit as it is now: lowered while it looks for the undisturbed latency."""
        if not self.is_measuring_baseline:
            return self.limit
        return max(self.policy.min_limit, self.limit * MARGIN / self.policy.tolerance)

    @property
    def unqueued(self) -> float:
        """What should leave no queue, if the limit is right."""
        return max(self.policy.min_limit, self.limit / self.policy.tolerance)

    def add(self, seconds: float, now: float) -> bool:
        """Take in one latency; tell whether a window is full. While the queue of before a look drains, none counts."""
        if now < self._counted_from:
            return False
        samples = self._samples
        samples.append(seconds)
        count = len(samples)
        if count < MIN_SAMPLES:
            return False
        if self.is_measuring_baseline:
            return count >= BASELINE_SAMPLES or now - self._counted_from >= MAX_BASELINE_TIME
        return now - self._window_started >= WINDOW and (
            now - self._window_started >= 2 * (self.baseline or 0.0) or count >= MAX_SAMPLES
        )

    def close_window(self, now: float, *, is_met: bool, is_calm: bool) -> None:
        """Draw the conclusions of a full window: `is_met` if the limit was, `is_calm` if little was under way."""
        seen = _trimmed_mean(self._samples)
        self._samples.clear()
        self._window_started = now
        if self.latency is None or self.baseline is None:
            self.latency = self.baseline = seen
        if self.is_measuring_baseline:
            self._end_baseline(seen, now)
            return
        self.latency += SMOOTHING * (seen - self.latency)
        if self.latency < self.baseline or is_calm:
            self.baseline = self.latency
        if is_met:
            self._adjust_limit(self.latency, self.baseline * self.policy.tolerance)
            self._measure_baseline_if_due(seen, now)

    def _adjust_limit(self, latency: float, held: float) -> None:
        limit = self.limit
        aim = limit + math.sqrt(limit) if latency <= held else limit * max(LARGEST_STEP, held / latency)
        self.limit = self._within(limit + SMOOTHING * (aim - limit))

    def _measure_baseline_if_due(self, latency: float, now: float) -> None:
        if now >= self._baseline_at:
            self.is_measuring_baseline, self._before = True, latency
            self._window_started = self._counted_from = (
                now + 2 * latency
            )  # by then most of what waits now has been served

    def _end_baseline(self, seen: float, now: float) -> None:
        tolerance, lowered = self.policy.tolerance, self.allowed / self.limit
        is_queue_left = seen < self._before * (lowered + 1 / tolerance) / 2
        if is_queue_left:
            self.limit = self._within(self.limit * lowered * tolerance)
        self._baseline_at = (
            now + BASELINE_RETRY_INTERVAL if is_queue_left else (now // BASELINE_INTERVAL + 1) * BASELINE_INTERVAL
        )
        self.latency = self.baseline = seen
        self.is_measuring_baseline = False

    def _within(self, limit: float) -> float:
        return min(max(limit, self.policy.min_limit), self.policy.max_limit)


def _trimmed_mean(samples: list[float]) -> float:
    kept = sorted(samples)[: max(1, math.ceil(len(samples) * (1 - TRIMMED)))]
    return sum(kept) / len(kept)
