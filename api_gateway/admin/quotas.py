"""The endpoints at `/clients/{id}/quotas`: what a client has used of its calendar quotas, top-ups and carry-over."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query

from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Audited, ClientId, Guarded
from api_gateway.admin.openapi import CLIENT_REFUSALS, TIER_REFUSALS, TOKEN
from api_gateway.admin.quota_changes import CarryOverRequest, HeldQuota, QuotaView, TopUpRequest
from api_gateway.errors import InvalidValue
from api_gateway.limits.limit import quotas_of_client
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import Body

router = APIRouter(tags=["quotas"], responses=CLIENT_REFUSALS, dependencies=[TOKEN])

OfRoute = Annotated[
    str | None, Query(description="The route, if the quota counts by client and route; else it has none.")
]


class QuotaViews(Body):
    """The quotas of a client."""

    client_id: str
    quotas: list[QuotaView]


@router.get("/clients/{client_id}/quotas", summary="A client's calendar quotas")
async def quotas(client_id: ClientId, context: Guarded) -> QuotaViews:
    """Return the calendar quotas that count by client, or by client and route, as they are now. Nothing is charged."""
    found = await _quotas(context, client_id)
    views = await asyncio.gather(*[quota.look() for quota in found.values()])
    return QuotaViews(client_id=client_id, quotas=views)


@router.post("/clients/{client_id}/quotas/{name}/top-up", summary="Add tokens to a quota", responses=TIER_REFUSALS)
async def top_up(
    client_id: ClientId,
    name: str,
    request: TopUpRequest,
    context: Guarded,
    audit: Audited,
    route: OfRoute = None,
) -> QuotaView:
    """Add tokens, which are used when the quota of a period is used up, until they are used or expire.

    A client has one balance of top-ups for each quota: of two ends, the later one applies to all of it.
    """
    return await (await _quota(context, client_id, name, route)).top_up(request, audit, client_id)


@router.post(
    "/clients/{client_id}/quotas/{name}/carry-over", summary="Set what was carried over", responses=TIER_REFUSALS
)
async def carry_over(
    client_id: ClientId,
    name: str,
    request: CarryOverRequest,
    context: Guarded,
    audit: Audited,
    route: OfRoute = None,
) -> QuotaView:
    """Set the carry-over of the current period: its tokens in addition to the quota.

    The next period is not affected.
    """
    return await (await _quota(context, client_id, name, route)).carry_over(request, audit, client_id)


@router.post("/clients/{client_id}/quotas/{name}/reset", summary="Reset a quota", responses=TIER_REFUSALS)
async def reset_quota(
    client_id: ClientId, name: str, context: Guarded, audit: Audited, route: OfRoute = None
) -> QuotaView:
    """Set the used tokens of the current period to 0. Used top-ups are not given back."""
    return await (await _quota(context, client_id, name, route)).reset(audit, client_id)


async def _quotas(context: AdminContext, client_id: str) -> dict[tuple[str, str | None], HeldQuota]:
    """Return the quotas that only this client has, by limit and route."""
    client = (await context.clients.inspect(client_id)).client
    return {
        (own.limit or "", own.route): HeldQuota(
            context,
            own.limit or "",
            own.key,
            own.quota,
            f"GET /clients/{client_id}/quotas shows the quota",
            route=own.route,
            is_unverified=not client.is_registered,
        )
        for own in quotas_of_client(context.explainer.limits, client, context.route_names)
        if isinstance(own.quota, PeriodQuota)
    }


async def _quota(context: AdminContext, client_id: str, name: str, route: str | None) -> HeldQuota:
    found = await _quotas(context, client_id)
    quota = found.get((name, route))
    if quota is not None:
        return quota
    names = list(dict.fromkeys(limit for limit, _ in found))
    routes = [own for limit, own in found if limit == name]
    if not routes:
        raise InvalidValue(
            f"The client has no quota '{name}'; its quotas that count by client are: {', '.join(names) or 'none'}."
            " Quotas by something else are at /limits/{name}/buckets.",
            extra={"quotas": names},
        )
    if routes == [None]:
        raise InvalidValue(f"query.route: the quota '{name}' counts by client alone: remove route, got {route!r}.")
    got = "nothing" if route is None else repr(route)
    raise InvalidValue(
        f"query.route: the quota '{name}' counts by client and route: set ?route= to one of"
        f" {', '.join(map(str, routes))}, got {got}."
    )
