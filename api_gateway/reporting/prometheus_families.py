"""Metric families in the pieces that are rendered at once, and histograms with the bounds of Prometheus."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from prometheus_client.core import HistogramMetricFamily, Metric

from api_gateway.observability.latency_series import Tally, WindowedSeries, value_of

# The bounds OpenTelemetry advises for http.server.request.duration, in seconds.
DURATION_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PIECE = 50  # rows of a family that are rendered at once


class SingleMetric:
    """What an encoder needs of a registry, around one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        """Yield that metric."""
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
    """Yield a histogram, each label value by itself: it is two dozen lines."""
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
    """Fold logarithmic buckets into the cumulative ones of a classic histogram."""
    cumulative: list[tuple[str, float]] = [
        (str(bound), sum(count for bucket, count in tally.buckets.items() if value_of(bucket) <= bound))
        for bound in DURATION_BOUNDS
    ]
    return [*cumulative, ("+Inf", sum(tally.buckets.values()))]
