"""Views of upstreams, their targets, and issuers of tokens: the results of checks and fetches, in UTC times."""

from collections.abc import Mapping

from api_gateway.admin.utc_times import utc
from api_gateway.reporting.issuer_snapshot import IssuerSnapshot
from api_gateway.reporting.snapshot import HostNameSnapshot, OutlierSnapshot, TargetSnapshot, UpstreamSnapshot
from api_gateway.reporting.upstream_schema import (
    ActiveView,
    ConcurrencyView,
    IssuerView,
    NameView,
    OpeningView,
    PassiveView,
    TargetHealthView,
    TargetView,
    UpstreamView,
)
from api_gateway.resilience.breaker_policy import State
from api_gateway.system.clocks import Moment


def upstream_view(upstream: UpstreamSnapshot, now: Moment, concurrency: ConcurrencyView) -> UpstreamView:
    """Return the view of an upstream with its targets."""
    names = {"dns_names": [_name_view(name, now) for name in upstream.names]} if upstream.names else {}
    return UpstreamView(
        status=upstream.status,
        circuit_breaker=upstream.breaker.state.value,
        targets=[_target_view(target, now) for target in upstream.targets],
        concurrency=concurrency,
        **names,
    )


def issuer_views(issuers: Mapping[str, IssuerSnapshot], now: Moment) -> dict[str, IssuerView]:
    """Return the views of the issuers of tokens, by name."""
    return {
        name: IssuerView(
            status=one.status,
            keys=one.keys,
            fetched_at=None if one.fetched_at is None else utc(one.fetched_at, now),
            error=one.error,
        )
        for name, one in issuers.items()
    }


def target_health_view(target: TargetSnapshot, now: Moment) -> TargetHealthView:
    """Return a target's health: the results of health checks (`active`) and outlier detection (`passive`)."""
    return TargetHealthView(
        healthy=target.health,
        active=_active_view(target, now),
        passive=_passive_view(target.passive, now),
        slow_start_ratio=round(target.share, 3),
    )


def _target_view(target: TargetSnapshot, now: Moment) -> TargetView:
    health = target_health_view(target, now)
    return TargetView(
        url=target.url,
        healthy=target.health,
        in_flight=target.in_flight,
        active=health.active,
        passive=health.passive,
        slow_start_ratio=health.slow_start_ratio,
        response_seconds=None if target.response_time is None else round(target.response_time, 6),
        **({} if target.named is None else {"configured_url": target.named}),
    )


def _active_view(target: TargetSnapshot, now: Moment) -> ActiveView | None:
    checks = target.checks
    if checks.at is None:
        return None
    return ActiveView(
        result=checks.finding or "",
        at=utc(checks.at, now),
        passed=checks.is_good,
        consecutive=checks.consecutive,
        last_error=checks.last_error,
        last_error_at=None if checks.last_error_at is None else utc(checks.last_error_at, now),
    )


def _passive_view(passive: OutlierSnapshot | None, now: Moment) -> PassiveView | None:
    if passive is None:
        return None
    opened, probe_at = None, passive.next_probe_at
    if passive.opened_at is not None:
        opened = OpeningView(at=utc(passive.opened_at, now), detail=passive.opened_cause)
    return PassiveView(
        circuit_breaker=passive.state.value,
        ejected=passive.is_ejected,
        consecutive_failures=passive.consecutive_failures,
        last_opened=opened,
        next_probe_in_seconds=None if probe_at is None else round(max(0.0, probe_at - now.monotonic), 3),
        ejections_total=passive.ejections_total,
        not_ejected_detail=_reason_kept(passive),
    )


def _reason_kept(passive: OutlierSnapshot) -> str | None:
    if passive.state is State.OPEN and not passive.is_ejected:
        return "No other target is in rotation, so it receives requests although its breaker is OPEN."
    if passive.withheld:
        return (
            f"Its last consecutive failures ({passive.withheld}) did not count towards ejection: no other target is in"
            " rotation, or max_ejected_ratio of the targets are ejected already."
        )
    if passive.one_principal:
        return "All its failures belong to one client, and other clients use it too."
    return None


def _name_view(name: HostNameSnapshot, now: Moment) -> NameView:
    return NameView(
        host=name.host,
        port=name.port,
        addresses=list(name.addresses),
        queried_at=None if name.asked_at is None else utc(name.asked_at, now),
        error=name.error,
    )
