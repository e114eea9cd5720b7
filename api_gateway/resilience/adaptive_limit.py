"""The adaptive limit: the concurrency limit of an upstream, adjusted to its measured latency.

After Gradient2 of Netflix's concurrency-limits and Envoy's adaptive concurrency filter. Unlike Envoy's, it does not
refuse almost all requests to measure the baseline: it lowers the limit to about a third, for some tenths of a second
every half minute. Synchronous; `now` (monotonic seconds) is an argument.
"""

import math
from dataclasses import dataclass

WINDOW = 0.1  # seconds: the least length of a window, or twice the baseline if that is longer
MIN_SAMPLES = 20  # samples that a window needs
MAX_SAMPLES = 1_000  # samples that end a window before twice the baseline
INITIAL_LIMIT = 50.0  # the initial limit, within min_limit and max_limit
SMOOTHING = 0.2  # weight of the last window in the moving averages
LARGEST_STEP = 0.5  # the smallest factor by which a window reduces the limit, before smoothing
TRIMMED = 0.05  # share of the slowest samples that is dropped, because they may have other causes than a queue
BASELINE_INTERVAL = 30.0  # seconds between baseline measurements
BASELINE_RETRY_INTERVAL = 1.0  # seconds until the first one, and after one that still found a queue
BASELINE_SAMPLES = 60  # samples that end a measurement, or
MAX_BASELINE_TIME = 1.0  # seconds, if that is sooner
MARGIN = 0.5  # share of the limit without a queue that is allowed during a measurement


@dataclass(frozen=True, slots=True)
class AdaptivePolicy:
    """The range of the limit, and the latency to maintain as a multiple of the baseline."""

    min_limit: int = 10
    max_limit: int = 1000
    tolerance: float = 1.4


class GradientController:
    """A limit that keeps the latency of an upstream near `tolerance` times the latency without a queue, the baseline.

    States: normal, measuring the baseline (`is_measuring_baseline`).

    Normal: the time to the head of a response is averaged per window and smoothed. While it is at most `tolerance`
    times the baseline, the limit grows by its square root, which leaves room for a queue; above, it shrinks in
    proportion, at most by half; both are smoothed. The limit changes only if it was reached in the window, because
    otherwise the latency does not depend on it. The baseline follows lower latencies, and higher ones when few
    requests are in flight.

    Measuring: every `BASELINE_INTERVAL` seconds, if the limit is reached, it is lowered to a value that should leave
    no queue, until enough samples of the latency are collected. Measurements are at multiples of the interval on the
    clock, so that the processes of one machine measure together. If the latency fell about as much as the limit, there
    was still a queue: then the limit is lowered permanently, and the next measurement follows soon.
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
        self._before = 0.0  # seconds: the latency before the measurement
        self._samples: list[float] = []
        self._window_started = self._counted_from = now

    def __repr__(self) -> str:
        return f"<GradientController [{self.limit:.1f}, {self.latency} against {self.baseline} s]>"

    def change_policy(self, policy: AdaptivePolicy) -> None:
        """Apply another policy; limit and baseline are kept, within the new range."""
        self.policy = policy
        self.limit = self._within(self.limit)

    @property
    def allowed(self) -> float:
        """The limit in force: lowered during a baseline measurement."""
        if not self.is_measuring_baseline:
            return self.limit
        return max(float(self.policy.min_limit), self.limit * MARGIN / self.policy.tolerance)

    @property
    def unqueued(self) -> float:
        """The number of requests in flight that should leave no queue if the limit is right."""
        return max(float(self.policy.min_limit), self.limit / self.policy.tolerance)

    def add(self, seconds: float, now: float) -> bool:
        """Add a latency in seconds; return whether the window is full. No sample counts while a queue drains."""
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
        """Evaluate a full window. `is_met`: the limit was reached; `is_calm`: few requests were in flight."""
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
            self._window_started = self._counted_from = now + 2 * latency  # then most of the queue has been served

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
        return float(min(max(limit, self.policy.min_limit), self.policy.max_limit))


def _trimmed_mean(samples: list[float]) -> float:
    kept = sorted(samples)[: max(1, math.ceil(len(samples) * (1 - TRIMMED)))]
    return sum(kept) / len(kept)
