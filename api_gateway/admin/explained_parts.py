"""Parts of an explanation, each computed from the object that it describes."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from api_gateway.admin.explain_schema import (
    BucketExplained,
    ConcurrencyExplained,
    ExplainedResult,
    FallbackExplained,
    SlotExplained,
)
from api_gateway.errors import BadRequest, GatewayError, Reason
from api_gateway.limits.concurrency import SlotUse
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import NANOSECONDS, Charge, Decision, processes_of, share_increment, sharing_processes
from api_gateway.proxy.admission import StageResponse
from api_gateway.proxy.fallback import Fallback
from api_gateway.proxy.route_table import Route
from api_gateway.rate_limiter import NEVER_NS
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit

_DECISIONS: Mapping[Reason, Literal["limited", "exceeds_capacity"]] = {
    Reason.RATE_LIMITED: "limited",
    Reason.CONCURRENCY_EXCEEDED: "limited",
    Reason.COST_EXCEEDS_CAPACITY: "exceeds_capacity",
}


@dataclass(slots=True)
class ChargeOutlook:
    """A hypothetical charge, and the decision of its bucket."""

    charge: Charge
    decision: Decision

    @property
    def processes(self) -> int:
        """The number of processes that share the bucket."""
        return processes_of(self.decision)

    @property
    def charged_ns(self) -> int:
        """The charge of the request, in units of the whole bucket; for a counter, of this process's share."""
        quota, increment_ns = self.charge.quota, self.charge.increment_ns
        if isinstance(quota, PeriodQuota):
            return increment_ns
        return share_increment(increment_ns, quota.burst_ns, self.processes)

    @property
    def debt_ns(self) -> int:
        """Nanoseconds until the bucket is full, without the charge, which is not made; of a counter, its period."""
        if isinstance(self.charge.quota, PeriodQuota):
            return self.decision.reset_ns
        return self.decision.reset_ns - (self.charged_ns if self.decision.allowed else 0)

    @property
    def wait_ns(self) -> float:
        """Nanoseconds until the bucket allows the charge; infinity if it never does."""
        return float("inf") if self.decision.wait_ns == NEVER_NS else self.decision.wait_ns

    @property
    def charges_left(self) -> float:
        """The number of such charges that the bucket allows after this one."""
        left_ns = self.charge.quota.burst_ns - self.decision.reset_ns
        if isinstance(self.charge.quota, PeriodQuota):
            left_ns = self.decision.remaining * self.charge.quota.emission_ns - self.charge.increment_ns
        return left_ns / self.charged_ns if self.charged_ns else float("inf")


def explained_destination(route: Route, raw_target: bytes) -> str:
    """Return in words what responds to the requests of a route, and where a redirect of this request leads."""
    response = route.response
    if response is None:
        return f"upstream {route.upstream}"
    with suppress(BadRequest):  # the result says so
        for name, value in response.fields(raw_target):
            if name == b"location":
                return f"status {response.status}, to {value.decode('latin-1')}"
    return f"status {response.status}"


def explained_result(
    error: GatewayError | None, fallback: FallbackExplained | None, direct: StageResponse | None
) -> ExplainedResult:
    """Return the decision on a request with this error, if any, and this fallback of its route.

    `direct` is the response of the gateway in place of an upstream's, None if there is none.
    """
    if direct is not None:
        detail = f"The gateway responds itself, with the status {direct.status}."
        return ExplainedResult(
            decision="allowed", status=direct.status, reason=None, retry_after_seconds=None, detail=detail
        )
    if error is None:
        detail = "Every bucket has enough tokens, and the upstream accepts requests."
        return ExplainedResult(decision="allowed", status=None, reason=None, retry_after_seconds=None, detail=detail)
    if fallback is not None and fallback.used:
        detail = f"{error.detail} The fallback '{fallback.name}' responds."
        reason = error.reason.value
        return ExplainedResult(
            decision="fallback", status=fallback.status, reason=reason, retry_after_seconds=None, detail=detail
        )
    return ExplainedResult(
        decision=_DECISIONS.get(error.reason, "refused"),
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
            concurrent=use.concurrent,
            processes=use.processes,
            allowed=use.is_free,
        )
        for use in uses
    ]


def explained_concurrency(limit: ConcurrencyLimit, priority: int, principal: str | None) -> ConcurrencyExplained:
    """Return the concurrency limit of an upstream, as it applies to this request."""
    return ConcurrencyExplained(
        limit=round(limit.limit, 1),
        tier_limit=limit.class_limits[priority],
        in_flight=limit.in_flight,
        allowed=not limit.is_full_for(priority, principal),
    )


def explained_bucket(bucket: ChargeOutlook) -> BucketExplained:
    """Return the bucket of a charge as it is now."""
    charge, decision = bucket.charge, bucket.decision
    quota = charge.quota
    return BucketExplained(
        key=charge.key,
        policy=quota.policy,
        tokens=float(decision.remaining)
        if isinstance(quota, PeriodQuota)
        else round((quota.burst_ns - bucket.debt_ns) / quota.emission_ns / bucket.processes, 3),
        capacity=quota.capacity if bucket.processes == 1 else round(quota.capacity / bucket.processes, 6),
        processes=sharing_processes(decision),
        cost=round(charge.increment_ns / quota.emission_ns, 6),
        allowed=decision.allowed,
        retry_after_seconds=None if decision.wait_ns == NEVER_NS else decision.wait_ns / NANOSECONDS,
        reset_after_seconds=round(bucket.debt_ns / NANOSECONDS, 3),
    )
