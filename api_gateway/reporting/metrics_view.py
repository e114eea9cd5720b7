"""Views of the metrics for JSON: totals since the start, and rates and percentiles by window."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Protocol

from api_gateway.eventloop.steps import Steps, each
from api_gateway.metrics import NO_ROUTE, Recorder
from api_gateway.models import LimiterState
from api_gateway.observability.latency_series import SLICE, WINDOWS, Tally, WindowedSeries, percentile
from api_gateway.reporting.metrics_schema import (
    BreakerCounts,
    IdentityCounts,
    LatencySeries,
    LatencyView,
    LatencyWindow,
    LimiterView,
    MetricsView,
    OutputView,
    OverloadView,
    RateSeries,
    RateWindow,
    RequestCounts,
)
from api_gateway.reporting.upstream_schema import ConcurrencyView, IssuerView, StoreView
from api_gateway.resilience.breaker_policy import Mode, State


class BreakerFigures(Protocol):
    """The counters and the state of a breaker that metrics show: a `BreakerSnapshot`, or a merged one."""

    @property
    def state(self) -> State: ...  # noqa: D102
    @property
    def mode(self) -> Mode: ...  # noqa: D102
    @property
    def opened_total(self) -> int: ...  # noqa: D102
    @property
    def rejected_total(self) -> int: ...  # noqa: D102
    @property
    def slow_total(self) -> int: ...  # noqa: D102
    @property
    def would_open_total(self) -> int: ...  # noqa: D102
    @property
    def would_reject_total(self) -> int: ...  # noqa: D102


class EjectionFigures(Protocol):
    """The figures of a target's own breaker."""

    @property
    def is_ejected(self) -> bool: ...  # noqa: D102
    @property
    def ejections_total(self) -> int: ...  # noqa: D102


class TargetFigures(Protocol):
    """The figures of a target."""

    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def health(self) -> bool | None: ...  # noqa: D102
    @property
    def passive(self) -> EjectionFigures | None: ...  # noqa: D102


class ConcurrencyFigures(Protocol):
    """Concurrency limit and requests in flight of an upstream."""

    @property
    def limit(self) -> float | None: ...  # noqa: D102
    @property
    def in_flight(self) -> int: ...  # noqa: D102


class UpstreamFigures(Protocol):
    """The figures of an upstream, in one worker or merged."""

    @property
    def breaker(self) -> BreakerFigures: ...  # noqa: D102
    @property
    def targets(self) -> Collection[TargetFigures]: ...  # noqa: D102
    @property
    def concurrency(self) -> ConcurrencyFigures: ...  # noqa: D102


def _nested(names: Iterable[str], counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return counts by two labels as one table for each first label in `names`."""
    tables: dict[str, dict[str, int]] = {name: {} for name in names}
    for (first, second), count in counts.items():
        if first in tables:
            tables[first][second] = count
    return tables


def _by_route(fallbacks: Mapping[tuple[str, str, str], int]) -> dict[str, dict[str, int]]:
    """Return the number of fallbacks used, by route and the reason of the failure."""
    found: dict[str, Counter[str]] = {}
    for (route, _, reason), count in fallbacks.items():
        found.setdefault(route, Counter())[reason] += count
    return {route: dict(counts) for route, counts in found.items()}


def _breaker_counts(_name: str, upstream: UpstreamFigures) -> BreakerCounts:
    breaker = upstream.breaker
    return BreakerCounts(
        state=breaker.state.value,
        opened_total=breaker.opened_total,
        rejected_total=breaker.rejected_total,
        mode=breaker.mode.value,
        slow_calls_total=breaker.slow_total,
        would_open_total=breaker.would_open_total,
        would_reject_total=breaker.would_reject_total,
    )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _rate_window(span: float, tally: Tally) -> RateWindow:
    requests = tally.requests or 1
    return RateWindow(
        requests=tally.requests,
        requests_per_second=round(tally.requests / span, 3),
        gateway_errors=tally.gateway_errors,
        upstream_errors=tally.upstream_errors,
        limited=tally.limited,
        error_rate=round((tally.gateway_errors + tally.upstream_errors) / requests, 6),
        limited_rate=round(tally.limited / requests, 6),
    )


def metrics_view(
    recorder: Recorder,
    now: float,
    upstreams: Mapping[str, UpstreamFigures],
    *,
    buckets: int,
    bucket_limit: int,
    overflowed: int,
    limiter: LimiterState,
    lag: float = 0.0,
    issuers: Mapping[str, IssuerView] | None = None,
) -> Steps[MetricsView]:
    """Return the metrics in steps. `now` is monotonic seconds, on the clock of the recorder; `lag` is seconds."""
    _, rates = yield from _merged(recorder, now)
    route_rates = yield from each(recorder.routes.items(), lambda _, series: _rates_of(recorder, [series], now))
    latency = yield from latency_view(recorder, now)
    breakers = yield from each(upstreams.items(), _breaker_counts)
    concurrency = yield from each(upstreams.items(), partial(concurrency_view, recorder))
    results = yield from each(recorder.attempt_results.items(), lambda _, counts: dict(counts))
    shed = yield from each(recorder.shed.items(), lambda _, counts: dict(counts))
    counts = RequestCounts(
        total=recorder.requests.total(),
        in_flight=recorder.in_flight,
        by_route=_sum_by(recorder, lambda key: key[0]),
        by_status=_sum_by(recorder, lambda key: str(key[2])),
        by_tier=_sum_by(recorder, lambda key: key[4]),
    )
    yield
    return MetricsView(
        uptime_seconds=round(now - recorder.started, 3),
        requests=counts,
        rates=rates,
        route_rates=route_rates,
        latency=latency,
        upstream_results=results,
        retries=_nested(recorder.upstreams, recorder.retries),
        retries_denied=_nested(recorder.upstreams, recorder.retries_denied),
        fallbacks=_by_route(recorder.fallbacks),
        mirrored=_nested(recorder.mirrored_in_flight, recorder.mirrored),
        refusals=dict(recorder.refusals),
        operator_refusals=dict(recorder.operator_refusals),
        identity=_identity_counts(recorder, issuers or {}),
        rate_limiter=LimiterView(
            allowed=dict(recorder.allowed),
            limited=dict(recorder.limited),
            would_refuse=dict(recorder.would_refuse),
            would_allow=dict(recorder.would_allow),
            settlements=dict(recorder.settlements),
            quota_warnings=dict(recorder.quota_warnings),
            in_flight=dict(recorder.in_flight_by_limit),
            buckets=buckets,
            max_buckets=bucket_limit,
            overflow_decisions=overflowed,
            decisions_by_source=dict(recorder.sources),
            store=StoreView(**asdict(limiter)),
        ),
        circuit_breakers=breakers,
        output=OutputView(dropped_lines=dict(recorder.dropped_lines), write_errors=dict(recorder.write_errors)),
        overload=OverloadView(event_loop_lag_seconds=round(lag, 6), upstreams=concurrency, shed=shed),
    )


def _identity_counts(recorder: Recorder, issuers: Mapping[str, IssuerView]) -> IdentityCounts:
    return IdentityCounts(
        would_refuse=dict(recorder.identity_would_refuse),
        bare_client_ids=dict(recorder.bare_client_ids),
        issuers=dict(issuers),
    )


def latency_view(recorder: Recorder, now: float) -> Steps[LatencyView]:
    """Return the percentiles of every series and window, in steps."""
    all_routes = yield from _merged(recorder, now)
    routes = yield from each(_named_routes(recorder), lambda _, series: _latency_of(recorder, [series], now))
    upstreams = yield from each(recorder.upstreams.items(), lambda _, series: _latency_of(recorder, [series], now))
    return LatencyView(overall=all_routes[0], routes=routes, upstreams=upstreams)


def concurrency_view(recorder: Recorder, name: str, upstream: UpstreamFigures) -> ConcurrencyView:
    """Return an upstream's concurrency limit, requests in flight, and requests refused since the start."""
    figures = upstream.concurrency
    limit = None if figures.limit is None else round(figures.limit, 1)
    return ConcurrencyView(limit=limit, in_flight=figures.in_flight, shed=recorder.shed[name].total())


def _merged(recorder: Recorder, now: float) -> Steps[tuple[LatencySeries, RateSeries]]:
    """Return the percentiles and rates of all routes together."""
    windows = [(name, span, Tally()) for name, span, _ in _windows(recorder, [], now)]
    for series in list(recorder.routes.values()):
        for (_, _, tally), (_, _, own) in zip(windows, _windows(recorder, [series], now), strict=True):
            tally.add(own)
        yield
    latency = LatencySeries(**{name: _latency_window(recorder, tally) for name, _, tally in windows})
    return latency, RateSeries(**{name: _rate_window(span, tally) for name, span, tally in windows})


def _named_routes(recorder: Recorder) -> list[tuple[str, WindowedSeries]]:
    return [(name, series) for name, series in recorder.routes.items() if name != NO_ROUTE]


def _sum_by(recorder: Recorder, label: Callable[[tuple[str, str, int, str, str]], str]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for key, count in recorder.requests.items():
        sums[label(key)] += count
    return dict(sums)


def _windows(recorder: Recorder, series: Sequence[WindowedSeries], now: float) -> Iterator[tuple[str, float, Tally]]:
    """Yield each window's name, the seconds it covers, and its counts."""
    uptime = max(now - recorder.started, 1e-9)
    for name, span in WINDOWS.items():
        merged = Tally()
        for one in series:
            merged.add(one.last(span, now))
        yield name, min(span - SLICE + now % SLICE, uptime), merged
    merged = Tally()
    for one in series:
        merged.add(one.total)
    yield "since_start", uptime, merged


def _latency_of(recorder: Recorder, series: Sequence[WindowedSeries], now: float) -> LatencySeries:
    return LatencySeries(
        **{name: _latency_window(recorder, tally) for name, _, tally in _windows(recorder, series, now)}
    )


def _latency_window(recorder: Recorder, tally: Tally) -> LatencyWindow:
    count = sum(tally.buckets.values())
    return LatencyWindow(
        count=count,
        mean_ms=round(tally.total_seconds / count * 1000, 3) if count else None,
        percentiles_ms={
            f"p{percent:g}": _milliseconds(percentile(tally.buckets, percent)) for percent in recorder.percentiles
        },
    )


def _rates_of(recorder: Recorder, series: Sequence[WindowedSeries], now: float) -> RateSeries:
    return RateSeries(**{name: _rate_window(span, tally) for name, span, tally in _windows(recorder, series, now)})
