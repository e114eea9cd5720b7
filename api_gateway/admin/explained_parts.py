"""Parts of an explanation that need nothing but what they describe."""

from collections.abc import Iterable, Mapping
from typing import Literal

from api_gateway.admin.explain_schema import ConcurrencyExplained, ExplainedResult, FallbackExplained, SlotExplained
from api_gateway.errors import GatewayError, Reason
from api_gateway.limits.concurrency import SlotUse
from api_gateway.proxy.fallback import Fallback
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit

_OUTCOMES: Mapping[Reason, Literal["limited", "exceeds_capacity"]] = {
    Reason.RATE_LIMITED: "limited",
    Reason.CONCURRENCY_EXCEEDED: "limited",
    Reason.COST_EXCEEDS_CAPACITY: "exceeds_capacity",
}


def explained_result(error: GatewayError | None, fallback: FallbackExplained | None) -> ExplainedResult:
    """Return the outcome of a request with this error, if any, and this fallback of its route."""
    if error is None:
        detail = "Every bucket has enough tokens, and the upstream accepts requests."
        return ExplainedResult(outcome="allowed", status=None, reason=None, retry_after_seconds=None, detail=detail)
    if fallback is not None and fallback.used:
        detail = f"{error.detail} The fallback '{fallback.name}' responds."
        reason = error.reason.value
        return ExplainedResult(
            outcome="fallback", status=fallback.status, reason=reason, retry_after_seconds=None, detail=detail
        )
    return ExplainedResult(
        outcome=_OUTCOMES.get(error.reason, "refused"),
        status=error.status,
        reason=error.reason.value,
        retry_after_seconds=error.retry_after,
        detail=error.detail,
    )


def explained_fallback(fallback: Fallback, *, is_used: bool) -> FallbackExplained:
    """Return the fallback of a route, and whether it would respond."""
    status = fallback.status if fallback.upstream is None else None
    return FallbackExplained(name=fallback.name, status=status, used=is_used)


def explained_slots(uses: Iterable[SlotUse]) -> list[SlotExplained]:
    """Return the slots of concurrency limits as they are now."""
    return [
        SlotExplained(
            key=use.slot.key,
            policy=use.slot.quota.policy,
            in_flight=use.in_flight,
            concurrent=use.slot.quota.capacity,
            allowed=use.is_free,
        )
        for use in uses
    ]


def explained_concurrency(limit: ConcurrencyLimit, priority: int, holder: str | None) -> ConcurrencyExplained:
    """Return the concurrency limit of an upstream, as it applies to this request."""
    return ConcurrencyExplained(
        limit=round(limit.limit, 1),
        tier_limit=limit.class_limits[priority],
        in_flight=limit.in_flight,
        allowed=not limit.is_full_for(priority, holder),
    )
