"""The endpoints at `/clients/{id}/quotas`: what a client has used of its calendar quotas, top-ups and carry-over."""

from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.context import AdminContext, Audit, Audited, ClientId, Guarded
from api_gateway.admin.openapi import CLIENT_REFUSALS, TIER_REFUSALS, TOKEN
from api_gateway.admin.request_schema import RequestBody
from api_gateway.admin.utc_times import wall_time
from api_gateway.errors import InvalidValue
from api_gateway.limits.period_standing import UNITS_PER_TOKEN, Adjustment, PeriodQuota, Standing
from api_gateway.models import Body, Instant

router = APIRouter(tags=["quotas"], responses=CLIENT_REFUSALS, dependencies=[TOKEN])

MOST_TOKENS = 1_000_000_000_000


class TopUpRequest(RequestBody):
    """The body of POST /clients/{id}/quotas/{name}/top-up."""

    amount: int = Field(strict=True, description="Tokens that are added.", ge=1, le=MOST_TOKENS, examples=[5000])
    expires: Instant | None = Field(
        default=None,
        description="ISO 8601 with UTC offset; null: at the end of the present period.",
        examples=["2027-03-01T00:00:00Z"],
    )


class CarryOverRequest(RequestBody):
    """The body of POST /clients/{id}/quotas/{name}/carry-over."""

    amount: int = Field(
        strict=True, description="Tokens that the present period has besides the quota.", ge=0, le=MOST_TOKENS
    )


class QuotaView(Body):
    """A client's quota in the present period."""

    limit: str
    period: Literal["hour", "day", "week", "month"]
    time_zone: str
    starts: Literal["calendar", "client"]
    quota: int = Field(description="Tokens in each period.")
    used: float = Field(description="Tokens used of the quota and of what was carried over.")
    remaining: float = Field(description="Tokens left, with those of top-ups; below 0 after a settlement.")
    carried_over: float = Field(description="Tokens that were left of the period before.")
    top_up: float = Field(description="Tokens left of top-ups, which are used last.")
    top_up_expires: str | None = Field(description="UTC, ISO 8601; null without a top-up.")
    period_start: str = Field(description="UTC, ISO 8601.")
    period_end: str = Field(description="UTC, ISO 8601.")


class QuotaViews(Body):
    """The quotas of a client."""

    client_id: str
    quotas: list[QuotaView]


@router.get("/clients/{client_id}/quotas", summary="A client's calendar quotas")
async def quotas(client_id: ClientId, context: Guarded) -> QuotaViews:
    """Return the calendar quotas that count by client, as they are now. Nothing is charged."""
    found, is_unverified = await _quotas(context, client_id)
    views = [
        _view(name, quota, *await context.quotas().look(key, quota, is_unverified=is_unverified))
        for name, (key, quota) in found.items()
    ]
    return QuotaViews(client_id=client_id, quotas=views)


@router.post("/clients/{client_id}/quotas/{name}/top-up", summary="Add tokens to a quota", responses=TIER_REFUSALS)
async def top_up(client_id: ClientId, name: str, request: TopUpRequest, context: Guarded, audit: Audited) -> QuotaView:
    """Add tokens, which are used when the quota of a period is used up, until they are used or expire.

    A client has one balance of top-ups for each quota: of two ends, the later one applies to all of it.
    """
    key, quota = await _quota(context, client_id, name)
    before = await context.quotas().look(key, quota)
    standing, now = before
    until = standing.end if request.expires is None else int(request.expires.timestamp())
    if until <= now:
        raise InvalidValue(
            f"body.expires: must be in the future, got {wall_time(until)}; the time is {wall_time(now)}."
        )
    before_view = _view(name, quota, *before)
    if before_view.top_up + request.amount > MOST_TOKENS:
        raise InvalidValue(
            f"body.amount: {before_view.top_up:g} tokens are left of earlier top-ups, and the sum must be at most"
            f" {MOST_TOKENS:g}, got {request.amount}."
        )
    amount = request.amount * UNITS_PER_TOKEN
    after = _view(name, quota, *await context.quotas().adjust(key, quota, Adjustment(amount, until)))
    return await _recorded(audit, client_id, before_view, after)


@router.post(
    "/clients/{client_id}/quotas/{name}/carry-over", summary="Set what was carried over", responses=TIER_REFUSALS
)
async def carry_over(
    client_id: ClientId, name: str, request: CarryOverRequest, context: Guarded, audit: Audited
) -> QuotaView:
    """Set how many tokens the present period has besides the quota. The next period is not affected."""
    key, quota = await _quota(context, client_id, name)
    before = _view(name, quota, *await context.quotas().look(key, quota))
    carried = request.amount * UNITS_PER_TOKEN
    after = _view(name, quota, *await context.quotas().adjust(key, quota, Adjustment(carried=carried)))
    return await _recorded(audit, client_id, before, after)


@router.post("/clients/{client_id}/quotas/{name}/reset", summary="Give a quota anew", responses=TIER_REFUSALS)
async def reset_quota(client_id: ClientId, name: str, context: Guarded, audit: Audited) -> QuotaView:
    """Let nothing be used of the present period. Top-ups that were used are not given back."""
    key, quota = await _quota(context, client_id, name)
    before = _view(name, quota, *await context.quotas().look(key, quota))
    after = _view(name, quota, *await context.quotas().adjust(key, quota, Adjustment(is_reset=1)))
    return await _recorded(audit, client_id, before, after)


async def _recorded(audit: Audit, client_id: str, before: QuotaView, after: QuotaView) -> QuotaView:
    """Write a change to the audit log, and return what is in force."""
    shown = ("used", "carried_over", "top_up", "top_up_expires")
    views = ({"limit": view.limit, **{name: getattr(view, name) for name in shown}} for view in (before, after))
    await audit(AuditAction.QUOTA_CHANGED, client_id, *views)
    return after


async def _quotas(context: AdminContext, client_id: str) -> tuple[dict[str, tuple[str, PeriodQuota]], bool]:
    """Return the key and the quota of each limit that is a quota by client and applies to this client.

    The second result tells whether anyone could have invented the client's id.
    """
    client = (await context.clients.inspect(client_id)).client
    found = {}
    for limit in context.explainer.limits:
        quota = limit.quota_of(client.quota.name)
        if limit.is_by_client and isinstance(quota, PeriodQuota):
            found[limit.name] = limit.bucket_key((client.key,), client.quota.name), quota
    return found, not client.is_registered


async def _quota(context: AdminContext, client_id: str, name: str) -> tuple[str, PeriodQuota]:
    found, _ = await _quotas(context, client_id)
    if name not in found:
        names = ", ".join(found) or "none"
        raise InvalidValue(
            f"The client has no quota '{name}'; its quotas that count by client are: {names}.",
            extra={"quotas": list(found)},
        )
    return found[name]


def _view(name: str, quota: PeriodQuota, standing: Standing, now: int) -> QuotaView:
    counter, count = standing.counter, standing.count
    balance = counter.valid_balance(now)
    return QuotaView(
        limit=name,
        period=quota.calendar.unit,
        time_zone=quota.calendar.zone.key,
        starts="client" if quota.is_from_start else "calendar",
        quota=quota.capacity,
        used=count.used / UNITS_PER_TOKEN,
        remaining=standing.left / UNITS_PER_TOKEN,
        carried_over=count.carried / UNITS_PER_TOKEN,
        top_up=balance / UNITS_PER_TOKEN,
        top_up_expires=wall_time(counter.until) if balance else None,
        period_start=wall_time(count.start),
        period_end=wall_time(standing.end),
    )
