"""Changes of one calendar quota by operators: top-up, carry-over, reset; and its view."""

from typing import Any, Literal

from pydantic import Field

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Audit
from api_gateway.admin.request_schema import RequestBody
from api_gateway.admin.utc_times import wall_time
from api_gateway.errors import InvalidValue
from api_gateway.limits.quota_state import UNITS_PER_TOKEN, Adjustment, PeriodQuota, QuotaState
from api_gateway.models import Body, Instant

MOST_TOKENS = 1_000_000_000_000


class TopUpRequest(RequestBody):
    """Tokens that are added to a quota."""

    amount: int = Field(strict=True, description="Tokens that are added.", ge=1, le=MOST_TOKENS, examples=[5000])
    expires: Instant | None = Field(
        default=None,
        description="ISO 8601 with UTC offset; null: at the end of the present period.",
        examples=["2027-03-01T00:00:00Z"],
    )


class CarryOverRequest(RequestBody):
    """The carry-over of the current period, in addition to the quota."""

    amount: int = Field(
        strict=True, description="Tokens that the current period has in addition to the quota.", ge=0, le=MOST_TOKENS
    )


class QuotaView(Body):
    """A quota in the current period."""

    limit: str
    route: str | None = Field(description="null unless the quota is that of a client, by client and route.")
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


class HeldQuota:
    """The counter of one key of a calendar quota, and its changes by operators."""

    def __init__(
        self,
        context: AdminContext,
        limit: str,
        key: str,
        quota: PeriodQuota,
        shown_at: str,
        *,
        route: str | None = None,
        is_unverified: bool = False,
    ) -> None:
        """`shown_at` says which endpoint shows the quota.

        `route`: of a client's quota by client and route. `is_unverified`: anyone could have invented the key.
        """
        self._book = context.quotas()
        self._limit = limit
        self._key = key
        self._quota = quota
        self._shown_at = shown_at
        self._route = route
        self._is_unverified = is_unverified

    def __repr__(self) -> str:
        return f"<HeldQuota [{self._key}]>"

    async def look(self) -> QuotaView:
        """Return the quota as it is now. Nothing is charged."""
        return self._view(*await self._book.look(self._key, self._quota, is_unverified=self._is_unverified))

    async def top_up(self, request: TopUpRequest, audit: Audit, subject: str) -> QuotaView:
        """Add tokens, which are used when the quota of a period is used up, until they are used or expire.

        There is one balance of top-ups: of two ends, the later one applies to all of it. Raises InvalidValue.
        """
        standing, now = await self._book.look(self._key, self._quota, is_unverified=self._is_unverified)
        before = self._view(standing, now)
        until = standing.end if request.expires is None else int(request.expires.timestamp())
        if until <= now:
            raise InvalidValue(
                f"body.expires: must be in the future, got {wall_time(until)}; the time is {wall_time(now)}."
            )
        if before.top_up + request.amount > MOST_TOKENS:
            raise InvalidValue(
                f"body.amount: {before.top_up:g} tokens are left of earlier top-ups, and the sum must be at most"
                f" {MOST_TOKENS:g}, got {request.amount}."
            )
        return await self._adjust(before, Adjustment(request.amount * UNITS_PER_TOKEN, until), audit, subject)

    async def carry_over(self, request: CarryOverRequest, audit: Audit, subject: str) -> QuotaView:
        """Set the carry-over of the current period: its tokens in addition to the quota.

        The next period is not affected.
        """
        carried = request.amount * UNITS_PER_TOKEN
        return await self._adjust(await self.look(), Adjustment(carried=carried), audit, subject)

    async def reset(self, audit: Audit, subject: str) -> QuotaView:
        """Set the used tokens of the current period to 0. Used top-ups are not given back."""
        return await self._adjust(await self.look(), Adjustment(is_reset=1), audit, subject)

    async def _adjust(self, before: QuotaView, adjustment: Adjustment, audit: Audit, subject: str) -> QuotaView:
        """Make a change, write it to the audit log, and return what is in force."""
        held = _recorded(before)
        async with audit.change(AuditAction.QUOTA_CHANGED, subject, held, self._shown_at):
            adjusted = await self._book.adjust(self._key, self._quota, adjustment)
        after = self._view(*adjusted)
        await audit(AuditAction.QUOTA_CHANGED, subject, held, _recorded(after))
        return after

    def _view(self, standing: QuotaState, now: int) -> QuotaView:
        counter, count, quota = standing.counter, standing.count, self._quota
        balance = counter.valid_balance(now)
        return QuotaView(
            limit=self._limit,
            route=self._route,
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


def _recorded(view: QuotaView) -> dict[str, Any]:
    """Return what the audit log has of a quota."""
    return {
        name: getattr(view, name) for name in ("limit", "route", "used", "carried_over", "top_up", "top_up_expires")
    }
