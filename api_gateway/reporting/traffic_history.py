"""The traffic of the last hour: a point for each ten seconds, sampled by a timer from the recorder's counters.

Nothing is added to a request. A point has the differences of counters since the point before, and the percentiles of
the latencies in between. With several workers the supervisor samples, from their last reports, so that the points
survive a worker. An hour is 360 points of at most some 3 KB (`MAX_TIERS`, and one number for each reason): below 1 MB.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from api_gateway.eventloop.steps import Steps
from api_gateway.metrics import NO_ROUTE, Recorder
from api_gateway.observability.latency_series import SLICE, Tally, percentile
from api_gateway.observability.trace_exporter import EXPORTED

POINT_SECONDS = 10.0  # between two points
HISTORY_POINTS = 360  # an hour
MAX_TIERS = 20  # with a number of their own in a point; the others are counted as `_other`
SNAPSHOT_DELAY = 1.5  # seconds after which all workers have reported what happened before
UPSTREAM_ERROR = "upstream_5xx"  # the kind of an error status that an upstream sent
OTHER_TIERS = "_other"
PERCENTILES = (50, 90, 99)

Point = dict[str, Any]

_DISCONNECTED = 499
_EARLY = 1.0  # seconds


class TrafficHistory:
    """The points of the last hour, oldest first.

    A point has, in JSON's types: `at` (seconds since the epoch, its end), `seconds` (its length), `requests`,
    `refused` (responses 4xx that the gateway generated, without 499), `errors` (responses 5xx), `p50`, `p90` and
    `p99` (milliseconds, or null), `tiers` (requests by tier), `kinds` (what `refused` and `errors` count, by
    reason; `upstream_5xx` for error statuses of upstreams), and `lost` (`spans` of traces, and `lines` of the
    gateway's own output). Values of zero are left out of the last three.
    """

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=HISTORY_POINTS)
        self._before = _Totals()
        self._sampled_at: float | None = None

    def __repr__(self) -> str:
        return f"<TrafficHistory [{len(self._points)} points]>"

    @property
    def points(self) -> list[Point]:
        """The points, oldest first. They are not changed later."""
        return list(self._points)

    def restore(self, points: Iterable[Point]) -> None:
        """Replace the points by those of an earlier history."""
        self._points = deque(points, maxlen=HISTORY_POINTS)

    def sample(self, recorders: Sequence[Recorder], now: float, wall: float) -> None:
        """Add a point from the counters of all workers; `now` is monotonic seconds, `wall` since the epoch."""
        for _ in self.sample_in_steps(recorders, now, wall):
            pass

    def sample_in_steps(self, recorders: Sequence[Recorder], now: float, wall: float) -> Steps[None]:
        """Add a point as `sample` does, in steps."""
        totals = _Totals()
        for recorder in recorders:
            totals.add(recorder)
            yield
        latencies = yield from _latencies(recorders, now)
        before, self._before = self._before, totals
        seconds = POINT_SECONDS if self._sampled_at is None else max(SLICE, now - self._sampled_at)
        self._sampled_at = now
        kinds = totals.kinds - before.kinds  # without what is not above zero
        self._points.append(
            {
                "at": round(wall, 1),
                "seconds": round(seconds, 1),
                "requests": max(0, totals.requests - before.requests),
                "refused": max(0, totals.refused - before.refused),
                "errors": max(0, totals.errors - before.errors),
                **{f"p{percent}": _milliseconds(percentile(latencies, percent)) for percent in PERCENTILES},
                "tiers": _largest(totals.tiers - before.tiers),
                "kinds": dict(kinds),
                "lost": dict(totals.lost - before.lost),
            }
        )


class _Totals:
    """Sums of the counters that points are made of."""

    def __init__(self) -> None:
        self.requests = self.refused = self.errors = 0
        self.tiers: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def add(self, recorder: Recorder) -> None:
        """Add the counters of a worker."""
        for (_, _, status, source, tier), count in recorder.requests.items():
            self.requests += count
            self.tiers[tier] += count
            if status >= 500:  # noqa: PLR2004 - the class of server errors
                self.errors += count
                if source == "upstream":
                    self.kinds[UPSTREAM_ERROR] += count
            elif source == "gateway" and 400 <= status != _DISCONNECTED:  # noqa: PLR2004 - as above
                self.refused += count
        for (reason, status), count in recorder.reasons.items():
            if 400 <= status != _DISCONNECTED:  # noqa: PLR2004 - as above
                self.kinds[reason] += count
        self.lost["spans"] += recorder.trace_spans.total() - recorder.trace_spans[EXPORTED]
        self.lost["lines"] += recorder.dropped_lines["stdout"] + recorder.dropped_lines["stderr"]


def seconds_to_next(now: float) -> float:
    """Return the seconds until the next point is due: `SNAPSHOT_DELAY` after a multiple of `POINT_SECONDS`.

    A point that is due within a second counts as taken, because timers may end early.
    """
    passed = math.floor((now - SNAPSHOT_DELAY + _EARLY) / POINT_SECONDS)
    return (passed + 1) * POINT_SECONDS + SNAPSHOT_DELAY - now


def _latencies(recorders: Iterable[Recorder], now: float) -> Steps[dict[int, int]]:
    """Return the latencies, in logarithmic buckets, of the slices that have ended in the last `POINT_SECONDS`."""
    merged = Tally()
    last_ended = (math.floor(now / SLICE) - 0.5) * SLICE
    for recorder in recorders:
        for name, series in list(recorder.routes.items()):
            if name != NO_ROUTE and series.is_used:
                merged.add(series.last(POINT_SECONDS, last_ended))
                yield
    return merged.buckets


def _largest(tiers: Counter[str]) -> dict[str, int]:
    largest = tiers.most_common(MAX_TIERS)
    rest = tiers.total() - sum(count for _, count in largest)
    return dict(largest) | ({OTHER_TIERS: rest} if rest else {})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
