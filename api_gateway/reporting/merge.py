"""Merging of the snapshots of several workers: counts are summed, and the worst state wins. Values only."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from api_gateway.models import LimiterState
from api_gateway.reporting.issuer_snapshot import merge_issuers
from api_gateway.reporting.process_figures import merged_figures
from api_gateway.reporting.snapshot import (
    BreakerSnapshot,
    HostNameSnapshot,
    OutlierSnapshot,
    Status,
    TargetSnapshot,
    UpstreamSnapshot,
    WorkerSnapshot,
)
from api_gateway.reporting.tls_snapshot import merge_tls
from api_gateway.reporting.transitions import last_transitions
from api_gateway.reporting.unwritten_state import merged_errors
from api_gateway.resilience.breaker_history import TransitionRecord
from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.concurrency_limit import ConcurrencyState
from api_gateway.resilience.fair_shares import merge_states

_BADNESS = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
_GRAVITY: dict[Status, int] = {"pass": 0, "warn": 1, "fail": 2}
_SEVERITY = {Mode.AUTO: 0, Mode.OBSERVE: 1, Mode.FORCED_CLOSED: 2, Mode.FORCED_OPEN: 3}
_EXACT = frozenset({"memory", "store"})
_EVER = float("inf")


def merge(snapshots: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
    """Return one snapshot for all workers: counts summed, and the worst state of each breaker and target.

    Of workers that have ended (`is_over`) only the counts are used.
    """
    merged = WorkerSnapshot.blank()
    for snapshot in snapshots:
        merged.recorder.absorb(snapshot.recorder)
        merged.buckets += snapshot.buckets
        merged.bucket_limit = max(merged.bucket_limit, snapshot.bucket_limit)
        merged.overflowed += snapshot.overflowed
        merged.lag = max(merged.lag, snapshot.lag)
        merged.tasks += snapshot.tasks
        for name, figure in snapshot.history.items():
            merged.history[name] = merged.history.get(name, 0) + figure
    merged.process = merged_figures(snapshot.process for snapshot in snapshots)
    merged.limiter = _merge_limiters(snapshots)
    merged.client_store_error = next(
        (it.client_store_error for it in snapshots if it.client_store_error and not it.is_over), None
    )
    merged.unwritten = merged_errors(snapshot.unwritten for snapshot in snapshots if not snapshot.is_over)
    merged.resources = merge_states(state for snapshot in snapshots for state in snapshot.resources)
    merged.tls = merge_tls(snapshot.tls for snapshot in snapshots if not snapshot.is_over)
    merged.issuers = merge_issuers(snapshot.issuers for snapshot in snapshots if not snapshot.is_over)
    merged.is_over = all(snapshot.is_over for snapshot in snapshots)
    names = dict.fromkeys(name for snapshot in snapshots for name in snapshot.upstreams)
    for name in names:
        found = [snapshot for snapshot in snapshots if name in snapshot.upstreams]
        present = [snapshot for snapshot in found if not snapshot.is_over]
        if present or merged.is_over:
            merged.upstreams[name] = _merge_upstream(name, found, present or found)
            merged.histories[name] = _merge_histories(name, snapshots)
    return merged


def _merge_limiters(snapshots: Sequence[WorkerSnapshot]) -> LimiterState:
    states = [snapshot.limiter for snapshot in snapshots]
    present = [snapshot.limiter for snapshot in snapshots if not snapshot.is_over] or states
    return LimiterState(
        decision_source=min((state.decision_source for state in present), key=_EXACT.__contains__, default="memory"),
        gateway_processes=max((state.gateway_processes for state in present), default=1),
        calls=sum(state.calls for state in states),
        operations=sum(state.operations for state in states),
        failures=sum(state.failures for state in states),
        last_error=next((state.last_error for state in present if state.last_error), None),
        evicted_keys=max((state.evicted_keys for state in present), default=0),  # all workers use one store
        warning=next((state.warning for state in present if state.warning), None),
    )


def _merge_histories(name: str, snapshots: Sequence[WorkerSnapshot]) -> list[TransitionRecord]:
    """Return the last transitions in all workers, by time, each with the name of its worker."""
    transitions = [
        record if record.worker else replace(record, worker=snapshot.worker)
        for snapshot in snapshots
        for record in snapshot.histories.get(name, ())
    ]
    return last_transitions(transitions, len(snapshots))


def _merge_upstream(name: str, found: Sequence[WorkerSnapshot], present: Sequence[WorkerSnapshot]) -> UpstreamSnapshot:
    upstreams = [snapshot.upstreams[name] for snapshot in present]
    breaker = replace(
        _worst([upstream.breaker for upstream in upstreams]),
        opened_total=sum(snapshot.upstreams[name].breaker.opened_total for snapshot in found),
        rejected_total=sum(snapshot.upstreams[name].breaker.rejected_total for snapshot in found),
        slow_total=sum(snapshot.upstreams[name].breaker.slow_total for snapshot in found),
        would_open_total=sum(snapshot.upstreams[name].breaker.would_open_total for snapshot in found),
        would_reject_total=sum(snapshot.upstreams[name].breaker.would_reject_total for snapshot in found),
        workers={snapshot.worker: snapshot.upstreams[name].breaker.state for snapshot in present},
    )
    status = max((upstream.status for upstream in upstreams), key=_GRAVITY.__getitem__)
    keys = dict.fromkeys(target.key for upstream in upstreams for target in upstream.targets)
    everywhere = [snapshot.upstreams[name] for snapshot in found]
    targets = (_merge_target(key, upstreams, everywhere) for key in keys)
    reported = sorted((one for upstream in upstreams for one in upstream.names), key=_is_in_error)
    names = {(one.host, one.port): one for one in reported}  # the last of a name has an error, if any has
    return UpstreamSnapshot(status, breaker, tuple(targets), tuple(names.values()), _merge_concurrency(upstreams))


def _merge_concurrency(upstreams: Sequence[UpstreamSnapshot]) -> ConcurrencyState:
    """Return the sum of the workers' concurrency limits and requests in flight."""
    found = [upstream.concurrency for upstream in upstreams]
    limits = [concurrency.limit for concurrency in found if concurrency.limit is not None]
    return ConcurrencyState(sum(limits) if limits else None, sum(concurrency.in_flight for concurrency in found))


def _worst(breakers: Sequence[BreakerSnapshot]) -> BreakerSnapshot:
    """Return the breaker in the worst state, with the merged figures of all; the caller sums the totals."""
    worst = max(breakers, key=lambda breaker: (_BADNESS[breaker.state], -breaker.since))
    probes = [breaker.next_probe_at for breaker in breakers if breaker.next_probe_at is not None]
    latest = max(breakers, key=lambda breaker: -_EVER if breaker.opened_at is None else breaker.opened_at)
    return replace(
        worst,
        consecutive_failures=max(breaker.consecutive_failures for breaker in breakers),
        window_calls=sum(breaker.window_calls for breaker in breakers),
        window_failures=sum(breaker.window_failures for breaker in breakers),
        window_slow=sum(breaker.window_slow for breaker in breakers),
        mode=max((breaker.mode for breaker in breakers), key=_SEVERITY.__getitem__),
        ramp_share=min((breaker.ramp_share for breaker in breakers if breaker.ramp_share is not None), default=None),
        probes_in_flight=sum(breaker.probes_in_flight for breaker in breakers),
        one_principal=any(breaker.one_principal for breaker in breakers),
        next_probe_at=min(probes, default=None),
        opened_at=latest.opened_at,
        opened_cause=latest.opened_cause,
    )


def _merge_target(
    key: str, upstreams: Iterable[UpstreamSnapshot], everywhere: Iterable[UpstreamSnapshot]
) -> TargetSnapshot:
    """Return the target in its worst state. Ejections are summed over `everywhere`, with workers that have ended."""
    targets = [target for upstream in upstreams for target in upstream.targets if target.key == key]
    worst = min(targets, key=lambda target: (target.is_healthy, target.checks.at is None))
    passive = [target.passive for target in targets if target.passive is not None]
    times = [target.response_time for target in targets if target.response_time is not None]
    return replace(
        worst,
        in_flight=sum(target.in_flight for target in targets),
        share=min(target.share for target in targets),
        response_time=sum(times) / len(times) if times else None,
        passive=_merge_passive(
            passive,
            sum(
                target.passive.ejections_total
                for upstream in everywhere
                for target in upstream.targets
                if target.key == key and target.passive is not None
            ),
        ),
    )


def _merge_passive(passive: Sequence[OutlierSnapshot], ejections_total: int) -> OutlierSnapshot | None:
    if not passive:
        return None
    worst = max(passive, key=lambda one: (one.is_ejected, _BADNESS[one.state], one.consecutive_failures))
    probes = [one.next_probe_at for one in passive if one.next_probe_at is not None]
    return replace(
        worst,
        withheld=max(one.withheld for one in passive),
        one_principal=any(one.one_principal for one in passive),
        next_probe_at=min(probes, default=None),
        ejections_total=ejections_total,
    )


def _is_in_error(name: HostNameSnapshot) -> bool:
    return name.error is not None
