"""The overview on the dashboard, of all workers: the figures of the last minute, and a row for each upstream.

Values only.

Times are seconds since the epoch, durations of requests milliseconds.
"""

from dataclasses import asdict
from typing import Any

from api_gateway.eventloop.steps import Steps
from api_gateway.metrics import Recorder
from api_gateway.observability.latency_series import SLICE, Tally, WindowedSeries, percentile
from api_gateway.reporting.snapshot import TargetSnapshot, UpstreamSnapshot, WorkerSnapshot
from api_gateway.system.clocks import Moment

SPAN = 60.0  # seconds of the current figures
_PERCENTILES = (50, 90, 99)


def overview(snapshot: WorkerSnapshot, now: Moment) -> Steps[dict[str, Any]]:
    """Return the figures of the gateway, in JSON's types, in steps."""
    recorder, tally = snapshot.recorder, Tally()
    for series in list(recorder.routes.values()):
        if series.is_used:
            tally.add(series.last(SPAN, now.monotonic))
            yield
    uptime = max(now.monotonic - recorder.started, 1e-9)
    covered = min(SPAN - SLICE + now.monotonic % SLICE, uptime)
    return {
        "at": round(now.wall, 1),
        "uptime_seconds": round(uptime, 1),
        "workers": max((len(one.breaker.workers) for one in snapshot.upstreams.values()), default=0) or 1,
        "processes": snapshot.limiter.gateway_processes,
        "requests_per_second": round(tally.requests / covered, 2),
        "requests": tally.requests,
        "limited": tally.limited,
        "errors": tally.gateway_errors + tally.upstream_errors,
        **_percentiles(tally),
        "in_flight": recorder.in_flight,
        "total": recorder.requests.total(),
        "limit_buckets": snapshot.buckets,
        "decision_source": snapshot.limiter.decision_source,
        "event_loop_lag_ms": round(snapshot.lag * 1000, 2),
        "loaded_at": snapshot.configuration.loaded_at,
    }


def upstream_row(recorder: Recorder, name: str, upstream: UpstreamSnapshot, now: Moment) -> dict[str, Any]:
    """Return an upstream with its breaker, targets and the latencies of the last minute, in JSON's types."""
    breaker = upstream.breaker
    tally = recorder.upstreams.get(name, _NOTHING).last(SPAN, now.monotonic)
    policy = asdict(breaker.policy)
    return {
        "name": name,
        "status": upstream.status,
        "in_flight": upstream.concurrency.in_flight,
        "limit": None if upstream.concurrency.limit is None else round(upstream.concurrency.limit, 1),
        "calls": sum(tally.buckets.values()),
        **_percentiles(tally),
        "results": dict(recorder.attempt_results.get(name, ())),
        "breaker": {
            "state": breaker.state.value,
            "mode": breaker.mode.value,
            "since": _wall(breaker.since, now),
            "consecutive_failures": breaker.consecutive_failures,
            "window_calls": breaker.window_calls,
            "window_failures": breaker.window_failures,
            "window_slow": breaker.window_slow,
            "probes_in_flight": breaker.probes_in_flight,
            "opened_total": breaker.opened_total,
            "rejected_total": breaker.rejected_total,
            "ramp_share": None if breaker.ramp_share is None else round(breaker.ramp_share, 3),
            "next_probe_at": _wall(breaker.next_probe_at, now),
            "opened_at": _wall(breaker.opened_at, now),
            "opened_cause": breaker.opened_cause,
            "workers": {worker: state.value for worker, state in breaker.workers.items()},
            "policy": policy,
        },
        "targets": [_target(target, now) for target in upstream.targets],
        "names": [
            {"host": one.host, "port": one.port, "addresses": list(one.addresses), "error": one.error}
            for one in upstream.names
        ],
    }


_NOTHING = WindowedSeries()


def _target(target: TargetSnapshot, now: Moment) -> dict[str, Any]:
    passive = target.passive
    return {
        "key": target.key,
        "url": target.url,
        "healthy": target.health,
        "in_flight": target.in_flight,
        "share": round(target.share, 3),
        "response_ms": None if target.response_time is None else round(target.response_time * 1000, 1),
        "checked": target.checks.finding,
        "check_ms": None if target.checks.seconds is None else round(target.checks.seconds * 1000, 1),
        "check_error": target.checks.last_error,
        "ejected": passive is not None and passive.is_ejected,
        "breaker": None if passive is None else passive.state.value,
        "failures": 0 if passive is None else passive.consecutive_failures,
        "ejections": 0 if passive is None else passive.ejections_total,
        "cause": "" if passive is None else passive.opened_cause,
        "next_probe_at": None if passive is None else _wall(passive.next_probe_at, now),
    }


def _percentiles(tally: Tally) -> dict[str, float | None]:
    found = {f"p{percent}": percentile(tally.buckets, percent) for percent in _PERCENTILES}
    return {name: None if seconds is None else round(seconds * 1000, 2) for name, seconds in found.items()}


def _wall(at: float | None, now: Moment) -> float | None:
    return None if at is None else round(now.wall_of(at), 1)
