"""Metric families in pieces that are rendered one at a time, and histograms with fixed bounds."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, islice
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.samples import Exemplar

from api_gateway.metrics import DURATION_BOUNDS, Recorder
from api_gateway.observability.latency_series import Tally, WindowedSeries, bucket_of, value_of
from api_gateway.observability.request_record import REQUEST_RESULTS
from api_gateway.reporting.process_figures import CPU, FIGURES
from api_gateway.reporting.tls_snapshot import TlsSnapshot

NO_EXEMPLARS: Mapping[tuple[str, int], tuple[str, float, float]] = {}
_PIECE = 50  # rows of a family that are rendered at once
_DIGITS = 6  # decimals of a sum of seconds


class SingleMetric:
    """A registry of one metric, for an encoder."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        """Yield the metric."""
        yield self._metric


def hook_families(recorder: Recorder) -> Iterator[Metric]:
    """Yield the calls of hooks of extensions, and the time that they took."""
    yield from family_in_pieces(
        CounterMetricFamily,
        "gateway_extension_calls",
        "Calls of hooks of extensions, by result: ok, error, timeout; still_running: timed out and not ended.",
        ["extension", "hook", "result"],
        recorder.hook_calls.items(),
    )
    yield from family_in_pieces(
        CounterMetricFamily,
        "gateway_extension_seconds",
        "Time that hooks of extensions took.",
        ["extension", "hook"],
        ((key, round(took / 1e9, _DIGITS)) for key, took in recorder.hook_ns.items()),
    )


def mirror_families(recorder: Recorder) -> Iterator[Metric]:
    """Yield the copies of requests of routes with a mirror."""
    yield from family_in_pieces(
        CounterMetricFamily,
        "gateway_mirrored_requests",
        "Copies of requests for the mirror of a route, by result.",
        ["route", "result"],
        recorder.mirrored.items(),
    )
    yield from family_in_pieces(
        GaugeMetricFamily,
        "gateway_mirrored_requests_in_flight",
        "Copies of requests that are being received or sent.",
        ["route"],
        (((route,), count) for route, count in recorder.mirrored_in_flight.items()),
    )


def access_families(recorder: Recorder) -> Iterator[Metric]:
    """Yield the counters of refused operators and their changes, and of client ids that were not proved."""
    for name, words, label, counts in (
        (
            "gateway_operator_refusals",
            "Refused requests to operator endpoints, by reason.",
            "reason",
            recorder.operator_refusals,
        ),
        (
            "gateway_operator_changes",
            "Changes by operators, by action.",
            "action",
            recorder.operator_changes,
        ),
        (
            "gateway_identity_would_refuse",
            "Requests that were admitted only because identity.mode is observe.",
            "reason",
            recorder.identity_would_refuse,
        ),
        (
            "gateway_identity_bare_client_ids",
            "Requests with the id of a client that should have been proved, but was not.",
            "result",
            recorder.bare_client_ids,
        ),
    ):
        family = CounterMetricFamily(name, words, labels=[label])
        for value, count in counts.items():
            family.add_metric([value], count)
        yield family


def history_families(history: Mapping[str, int], not_kept: Mapping[str, int]) -> Iterator[Metric]:
    """Yield the figures of the history of requests: its records by result, their bytes, and the requests without."""
    records = GaugeMetricFamily(
        "gateway_history_records", "Records of the last requests in memory, by result.", labels=["result"]
    )
    for result in REQUEST_RESULTS:
        records.add_metric([result], history.get(result, 0))
    yield records
    without = CounterMetricFamily(
        "gateway_history_requests_not_kept",
        "Requests without a record, as there were too many of them in a time, by result.",
        labels=["result"],
    )
    for result in REQUEST_RESULTS:
        without.add_metric([result], not_kept.get(result, 0))
    yield without
    size = history.get("bytes", 0)
    yield GaugeMetricFamily("gateway_history_bytes", "Bytes of these records, at most.", value=size)


def limit_families(recorder: Recorder) -> Iterator[Metric]:
    """Yield the counters of refusals by limit and tier, in force and by candidates."""
    for name, words, counts in (
        (
            "gateway_rate_limit_refusals",
            "Refusals by limit; a request that several limits refuse counts for each.",
            recorder.refusals_by_limit,
        ),
        (
            "gateway_rate_limit_candidate_refusals",
            "Allowed requests that the candidate of a limit would have refused.",
            recorder.candidate_refusals,
        ),
    ):
        family = CounterMetricFamily(name, words, labels=["limit", "tier"])
        for labels, count in counts.items():
            family.add_metric(labels, count)
        yield family
    warnings = CounterMetricFamily(
        "gateway_quota_warnings", "Shares of calendar quotas that were reached (warn_at).", labels=["limit"]
    )
    for limit, count in recorder.quota_warnings.items():
        warnings.add_metric([limit], count)
    yield warnings
    in_flight = GaugeMetricFamily(
        "gateway_concurrency_limit_requests_in_flight",
        "Requests in flight that hold a slot of a concurrency limit.",
        labels=["limit"],
    )
    for limit, count in recorder.in_flight_by_limit.items():
        in_flight.add_metric([limit], count)
    yield in_flight


def tls_families(recorder: Recorder, tls: TlsSnapshot) -> Iterator[Metric]:
    """Yield the handshakes of TLS, the reloads of certificates, and when these expire."""
    handshakes = CounterMetricFamily(
        "gateway_tls_handshakes", "Completed handshakes of TLS.", labels=["version", "session"]
    )
    for key, count in recorder.tls_handshakes.items():
        handshakes.add_metric(key.split("/"), count)
    yield handshakes
    for name, words, label, counts in (
        ("gateway_tls_handshake_failures", "Failed handshakes of TLS.", "reason", recorder.tls_failures),
        ("gateway_tls_certificate_reloads", "Reloads of certificates, by result.", "result", recorder.tls_reloads),
    ):
        family = CounterMetricFamily(name, words, labels=[label])
        for value, count in counts.items():
            family.add_metric([value], count)
        yield family
    expiry = GaugeMetricFamily(
        "gateway_tls_certificate_expiry_timestamp_seconds",
        "When a certificate of the listener for clients expires.",
        labels=["file", "name"],
    )
    for one in tls.certificates:
        expiry.add_metric([one.file, one.name], one.not_after)
    yield expiry


def trace_families(recorder: Recorder) -> Iterator[Metric]:
    """Yield the results of the export of spans, and the number of exchanges that wait to be exported."""
    spans = CounterMetricFamily("gateway_tracing_spans", "Spans of traces, by what became of them.", labels=["result"])
    for result, count in recorder.trace_spans.items():
        spans.add_metric([result], count)
    yield spans
    yield GaugeMetricFamily(
        "gateway_tracing_queue_exchanges", "Exchanges whose spans wait to be exported.", value=recorder.waiting_traces
    )


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
    name: str,
    words: str,
    label: str,
    series: Iterable[tuple[str, WindowedSeries]],
    bounds: tuple[float, ...] = DURATION_BOUNDS,
    exemplars: Mapping[tuple[str, int], tuple[str, float, float]] = NO_EXEMPLARS,
) -> Iterator[Metric]:
    """Yield a histogram in pieces: its head, and for each label value a line for each of `bounds`, and three more.

    `exemplars` are traces by label value and number of the bucket in `DURATION_BOUNDS`, see `Recorder`.
    """
    yield HistogramMetricFamily(name, words, labels=[label])
    by_value: dict[str, list[tuple[str, float, float]]] = {}
    for (value, _), exemplar in list(exemplars.items()):
        by_value.setdefault(value, []).append(exemplar)
    for value, one in series:
        family, total = HistogramMetricFamily(name, words, labels=[label]), one.total
        buckets = _classic(total, bounds)
        if value in by_value:
            buckets = _with_exemplars(buckets, bounds, by_value[value])
        family.add_metric([value], buckets, sum_value=round(total.total_seconds, _DIGITS))
        yield family


def _with_exemplars(
    buckets: Sequence[Any], bounds: tuple[float, ...], exemplars: Iterable[tuple[str, float, float]]
) -> list[Any]:
    """Return the buckets of a histogram, each with the exemplar that belongs to it, if there is one."""
    found = {bisect_left(bounds, took): (trace_id, took, at) for trace_id, took, at in exemplars}
    return [
        bucket
        if place not in found
        else (*bucket, Exemplar({"trace_id": found[place][0]}, round(found[place][1], _DIGITS), found[place][2]))
        for place, bucket in enumerate(buckets)
    ]


def without_head(piece: bytes) -> bytes:
    """Return the samples of a family without its HELP and TYPE lines."""
    while piece.startswith(b"# "):
        piece = piece.partition(b"\n")[2]
    return piece


def _classic(tally: Tally, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
    """Return the cumulative buckets of a classic histogram, computed from logarithmic buckets."""
    last = _last_buckets(bounds)
    counts = [0.0] * (len(bounds) + 1)
    for bucket, count in tally.buckets.items():
        counts[bisect_left(last, bucket)] += count
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))


@cache
def _last_buckets(bounds: tuple[float, ...]) -> tuple[int, ...]:
    """Return, for each bound, the last logarithmic bucket whose value is not above it."""
    found = []
    for bound in bounds:
        bucket = bucket_of(bound)
        found.append(bucket if value_of(bucket) <= bound else bucket - 1)
    return tuple(found)


def process_families(figures: Mapping[str, float]) -> Iterator[Metric]:
    """Yield a family for each figure that there is."""
    for name, words in FIGURES.items():
        if name in figures:
            kind = CounterMetricFamily if name == CPU else GaugeMetricFamily
            yield kind(name, words, value=figures[name])
