"""The endpoints at `/circuit-breakers`, and the views of breakers."""

from dataclasses import asdict

from fastapi import APIRouter, Request, Response

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.breaker_overrides import Override
from api_gateway.admin.breaker_schema import ModeChange
from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Audited, Guarded, who
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, STORE_REFUSAL, TOKEN, rendered
from api_gateway.admin.utc_times import utc, wall_time
from api_gateway.admin.views import target_health_view
from api_gateway.errors import InvalidValue, NoRoute
from api_gateway.eventloop.steps import each, run_in_steps
from api_gateway.reporting.snapshot import BreakerSnapshot
from api_gateway.reporting.upstream_schema import (
    BreakersView,
    BreakerThresholds,
    BreakerView,
    FailedCallView,
    HistoryView,
    ModeChanged,
    ModeView,
    OpeningView,
    TransitionRecordView,
)
from api_gateway.resilience.breaker_history import TransitionRecord
from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.settings.suggestions import nearest
from api_gateway.system.clocks import Moment

router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


@router.get("/circuit-breakers", summary="All circuit breakers", response_model=BreakersView)
async def circuit_breakers(context: Guarded) -> Response:
    """Return each breaker's state and its start, mode, counts, thresholds, next probe and last opening."""
    await context.overrides.refresh()
    snapshot = await context.aggregator.gather()
    now = context.clocks.now()
    error = {} if context.overrides.error is None else {"modes_error": context.overrides.error}
    breakers = each(
        snapshot.upstreams.items(),
        lambda name, upstream: _breaker_view(upstream.breaker, context.overrides.override(name), now),
    )
    targets = each(
        snapshot.upstreams.items(),
        lambda _, upstream: {target.key: target_health_view(target, now) for target in upstream.targets},
    )
    return rendered(
        BreakersView(circuit_breakers=await run_in_steps(breakers), targets=await run_in_steps(targets), **error)
    )


@router.post(
    "/circuit-breakers/{name}",
    summary="Set a circuit breaker's mode",
    responses={
        404: {"description": "There is no circuit breaker of that name.", **PROBLEM},
        422: {"description": "No such mode, or another mistake in the body.", **PROBLEM},
        **STORE_REFUSAL,
    },
)
async def set_mode(name: str, change: ModeChange, request: Request, context: Guarded, audit: Audited) -> ModeChanged:
    """Force a breaker open or closed, only observe it, or return it to `auto`.

    The mode lasts for `duration_seconds`, or until it is changed, and survives a restart. It is written to disk before
    the response is sent; every worker of this gateway applies it within a second. In `observe` the breaker counts
    calls and changes its state, but rejects nothing.
    """
    _check_breaker(context, name)
    if change.mode == "auto" and change.duration_seconds is not None:
        raise InvalidValue(f"body.duration_seconds: must be null with mode 'auto', got {change.duration_seconds:g}.")
    override, wall = None, context.clocks.wall()
    if change.mode != "auto":
        until = None if change.duration_seconds is None else wall + change.duration_seconds
        override = Override(Mode(change.mode), wall, until, change.comment, who(request))
    before = await context.overrides.set(name, override)
    changed = ModeChanged(name=name, previous=_mode_view(before), current=_mode_view(override))
    views = (view.model_dump(exclude_none=True) for view in (changed.previous, changed.current))
    await audit(AuditAction.BREAKER_MODE_SET, name, *views)
    return changed


@router.get(
    "/circuit-breakers/{name}/history",
    summary="A circuit breaker's last transitions",
    responses={404: {"description": "There is no circuit breaker of that name.", **PROBLEM}},
)
async def history(name: str, context: Guarded) -> HistoryView:
    """Return the last 50 transitions of the breaker in each worker, newest first, with their causes.

    The last 50 of the breakers of the upstream's targets are included; `target_url` names the target.
    """
    _check_breaker(context, name)
    snapshot = await context.aggregator.gather(with_histories=True)
    now = context.clocks.now()
    transitions = [_transition_view(record, now) for record in reversed(snapshot.histories.get(name, []))]
    return HistoryView(name=name, history=transitions)


def _check_breaker(context: AdminContext, name: str) -> None:
    known = context.overrides.names
    if name not in known:
        hint = nearest(name, known) or f"; existing: {', '.join(known)}."
        raise NoRoute(f"There is no circuit breaker '{name}'{hint}")


def _mode_view(override: Override | None) -> ModeView:
    if override is None:
        return ModeView(mode=Mode.AUTO.value)
    return ModeView(
        mode=override.mode.value,
        since=wall_time(override.since),
        until=None if override.until is None else wall_time(override.until),
        comment=override.comment,
        set_by=override.set_by,
    )


def _transition_view(record: TransitionRecord, now: Moment) -> TransitionRecordView:
    failures = [
        FailedCallView(
            at=utc(call.at, now),
            route=call.route or None,
            detail=call.detail,
            duration_seconds=None if call.duration is None else round(call.duration, 4),
            request_id=call.request_id or None,
        )
        for call in reversed(record.failures)
    ]
    given = {
        "at": utc(record.at, now),
        "from": record.source.value,
        "to": record.target.value,
        "detail": record.cause,
        "mode": record.mode.value,
        "window_calls": record.counts.calls,
        "window_failures": record.counts.failures,
        "window_slow_calls": record.counts.slow,
        "last_failures": failures,
        "next_probe_at": None if record.next_probe_at is None else utc(record.next_probe_at, now),
        "worker": record.worker or None,
        "target_url": record.target_url,
    }
    return TransitionRecordView.model_validate(given)


def _breaker_view(breaker: BreakerSnapshot, override: Override | None, now: Moment) -> BreakerView:
    calls, failures, slow = breaker.window_calls, breaker.window_failures, breaker.window_slow
    opened = None
    if breaker.opened_at is not None:
        opened = OpeningView(at=utc(breaker.opened_at, now), detail=breaker.opened_cause)
    several = {"workers": {name: state.value for name, state in breaker.workers.items()}} if breaker.workers else {}
    is_open, probe_at = breaker.state is State.OPEN, breaker.next_probe_at
    return BreakerView(
        state=breaker.state.value,
        since=utc(breaker.since, now),
        mode=Mode.AUTO.value if override is None else override.mode.value,
        override=None if override is None else _mode_view(override),
        consecutive_failures=breaker.consecutive_failures,
        window_calls=calls,
        window_failures=failures,
        window_failure_rate=round(failures / calls, 4) if calls else None,
        window_slow_calls=slow,
        window_slow_call_rate=round(slow / calls, 4) if calls else None,
        probes_in_flight=breaker.probes_in_flight,
        failures_of_one_client=breaker.one_principal,
        ramp_ratio=None if breaker.ramp_share is None else round(breaker.ramp_share, 3),
        opened_total=breaker.opened_total,
        rejected_total=breaker.rejected_total,
        slow_calls_total=breaker.slow_total,
        would_open_total=breaker.would_open_total,
        would_reject_total=breaker.would_reject_total,
        next_probe_in_seconds=round(max(0.0, probe_at - now.monotonic), 3)
        if is_open and probe_at is not None
        else None,
        last_opened=opened,
        thresholds=BreakerThresholds(**asdict(breaker.policy)),
        **several,
    )
