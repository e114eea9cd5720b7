"""Metric families in pieces that are rendered one at a time, and histograms with fixed bounds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from prometheus_client.core import HistogramMetricFamily, Metric

from api_gateway.observability.latency_series import Tally, WindowedSeries, value_of

# Seconds: the bounds that OpenTelemetry recommends for http.server.request.duration.
DURATION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PIECE = 50  # rows of a family that are rendered at once


class SingleMetric:
    """A registry of one metric, for an encoder."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        """Yield the metric."""
        yield self._metric


def family_in_pieces(
    kind: Callable[..., Any],
    name: str,
    words: str,
    labels: Sequence[str],
    rows: Iterable[tuple[Iterable[str], float]],
) -> Iterator[Metric]:
    """Yield a family in pieces of `_PIECE` rows (label values, and the value), at least one."""
    left = iter(rows)
    piece = list(islice(left, _PIECE))
    while True:
        family = kind(name, words, labels=labels)
        for values, value in piece:
            family.add_metric(list(values), value)
        yield family
        piece = list(islice(left, _PIECE))
        if not piece:
            return


def duration_histogram(
    name: str, words: str, label: str, series: Iterable[tuple[str, WindowedSeries]]
) -> Iterator[Metric]:
    """Yield a histogram in pieces: its head, and about 17 lines for each label value."""
    yield HistogramMetricFamily(name, words, labels=[label])
    for value, one in series:
        family, total = HistogramMetricFamily(name, words, labels=[label]), one.total
        family.add_metric([value], _classic(total), sum_value=total.total_seconds)
        yield family


def without_head(piece: bytes) -> bytes:
    """Return the samples of a family without its HELP and TYPE lines."""
    while piece.startswith(b"# "):
        piece = piece.partition(b"\n")[2]
    return piece


def _classic(tally: Tally) -> list[tuple[str, float]]:
    """Return the cumulative buckets of a classic histogram, computed from logarithmic buckets."""
    cumulative: list[tuple[str, float]] = [
        (str(bound), sum(count for bucket, count in tally.buckets.items() if value_of(bucket) <= bound))
        for bound in DURATION_BOUNDS
    ]
    return [*cumulative, ("+Inf", sum(tally.buckets.values()))]
