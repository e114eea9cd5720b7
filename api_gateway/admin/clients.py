"""The endpoints at `/clients`: registered clients, their tiers, grants and buckets."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.client_schema import (
    BucketReset,
    BucketView,
    ClientView,
    GrantChanged,
    GrantRequest,
    GrantView,
    HeavyClient,
    HeavyClients,
    LimitBucketView,
    LimitReset,
    RegisteredClient,
    RegisteredClients,
    SlotView,
    TierChange,
    TierChanged,
    TierView,
    tokens_of,
)
from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Audited, ClientId, Guarded
from api_gateway.admin.openapi import CLIENT_REFUSALS, PROBLEM, REFUSAL_RESPONSES, STORE_REFUSAL, TIER_REFUSALS, TOKEN
from api_gateway.admin.utc_times import wall_time
from api_gateway.clients.records import ClientRecord
from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import InvalidValue
from api_gateway.limits.limit import OwnBucket, client_buckets, limits_of_client, moved_buckets
from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, ConcurrencySlot, Decision, Quota, sharing_processes

overview_router = APIRouter(tags=["operator"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])


router = APIRouter(tags=["clients"], responses=CLIENT_REFUSALS, dependencies=[TOKEN])


@overview_router.get(
    "/clients",
    summary="The heaviest clients, or all registered clients",
    responses={422: {"description": "No such tier, or no such position.", **PROBLEM}, **STORE_REFUSAL},
)
async def list_clients(
    context: Guarded,
    sort: Annotated[Literal["limited", "requests", "bare"], Query()] = "limited",
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    tier: Annotated[str | None, Query(description="Registered clients of this tier, * for any, in pages.")] = None,
    after: Annotated[str, Query(description="With tier: `next` of the page before.", max_length=200)] = "",
) -> HeavyClients | RegisteredClients:
    """Return the clients with the most requests, refusals by rate limits, or claims of a bare id, since the start.

    A claim of a bare id is counted for clients that have keys or are verified only. The counts are estimates from 1000
    counters: every client with more than a thousandth of the total is included.

    With `tier`, return registered clients instead, in pages of about `limit`: more if the store returns more at once,
    fewer if few clients have the tier. A client that is registered throughout is in at least one page.
    """
    if tier is not None:
        return await _registered(context, None if tier == "*" else _tier(context, tier), after, limit)
    recorder = (await context.aggregator.gather()).recorder
    chosen = {
        "limited": recorder.limited_by_client,
        "requests": recorder.requests_by_client,
        "bare": recorder.bare_by_client,
    }[sort]
    clients = [_heavy(context.clients, recorder, found.key) for found in chosen.heaviest(limit)]
    return HeavyClients(sort=sort, clients=clients)


@router.post(
    "/clients/{client_id}/tier",
    summary="Set a client's tier",
    responses=TIER_REFUSALS,
)
async def set_tier(client_id: ClientId, change: TierChange, context: Guarded, audit: Audited) -> TierChanged:
    """Register the client with a tier. It is stored before the response and applies to the client's next request.

    Gateways that share the store apply it within a second. The bucket keeps its filled fraction: an upgrade takes
    effect at once, and changing back and forth gains no tokens.
    """
    tier = _tier(context, change.tier)
    async with audit.change(AuditAction.TIER_SET, client_id, _tier_of(context, client_id)):
        written = await context.clients.set_tier(client_id, tier)
    changed = await _move_bucket(context, *written)
    await audit(AuditAction.TIER_SET, client_id, *_tiers_of(changed, {}, {}))
    return changed


@router.post("/clients/{client_id}/grants", summary="Grant a client a tier temporarily", responses=TIER_REFUSALS)
async def grant(client_id: ClientId, request: GrantRequest, context: Guarded, audit: Audited) -> GrantChanged:
    """Grant the client a tier until a given time. It overrides the client's own tier and replaces an earlier grant.

    Each gateway ends the grant by its own clock: if clocks differ, so do the times at which it ends.
    """
    tier, until = _tier(context, request.tier), _until(request, context.clocks.wall())
    before = await _grant_of(context, client_id)
    async with audit.change(AuditAction.GRANT_SET, client_id, _tier_of(context, client_id) | before):
        written = await context.clients.grant(client_id, tier, until)
    changed = await _regrant(context, until, *written)
    await audit(AuditAction.GRANT_SET, client_id, *_tiers_of(changed, before, {"until": changed.until}))
    return changed


@router.delete("/clients/{client_id}/grants", summary="End a client's grant early", responses=STORE_REFUSAL)
async def revoke(client_id: ClientId, context: Guarded, audit: Audited) -> GrantChanged:
    """End the client's grant; its own tier applies again. Without a grant nothing changes."""
    before = await _grant_of(context, client_id)
    async with audit.change(AuditAction.GRANT_ENDED, client_id, _tier_of(context, client_id) | before):
        written = await context.clients.revoke(client_id)
    changed = await _regrant(context, None, *written)
    await audit(AuditAction.GRANT_ENDED, client_id, *_tiers_of(changed, before, {"until": None}))
    return changed


@router.post(
    "/clients/{client_id}/reset",
    summary="Fill a client's buckets",
    responses={503: {"description": "The store is unavailable.", **PROBLEM}},
)
async def reset(client_id: ClientId, context: Guarded, audit: Audited) -> BucketReset:
    """Fill the client's bucket, and its buckets of limits that count by client, or by client and route."""
    found = (await context.clients.inspect(client_id)).client
    buckets = _own_buckets(context, found)
    before = await _inspected(context, buckets)
    held = {
        "tokens": [
            tokens_of(own.quota, one.reset_ns, sharing_processes(one))
            for own, one in zip(buckets, before, strict=True)
        ]
    }
    shown_at = f"GET /clients/{client_id} shows the tokens"
    async with audit.change(AuditAction.BUCKETS_FILLED, client_id, held, shown_at):
        for bucket in buckets:
            await context.limiter.refill(bucket.key)
    after = await _inspected(context, buckets)
    own, *others = tokens = [
        _tokens_at(bucket.quota, one, bucket.quota, other)
        for bucket, one, other in zip(buckets, before, after, strict=True)
    ]
    views = ({"tokens": [one[name] for one in tokens]} for name in ("tokens_before", "tokens_after"))
    await audit(AuditAction.BUCKETS_FILLED, client_id, *views)
    return BucketReset(
        client_id=client_id,
        tier=_tier_view(found.quota),
        limits=[
            LimitReset(limit=bucket.limit or "", route=bucket.route, **one)
            for bucket, one in zip(buckets[1:], others, strict=True)
        ],
        **own,
    )


@router.delete("/clients/{client_id}", summary="Return a client to the default tier", responses=STORE_REFUSAL)
async def forget(client_id: ClientId, context: Guarded, audit: Audited) -> TierChanged:
    """Remove the client's registration, its grant and its keys.

    The client then has the tier that the configuration gives it, else the default tier.
    """
    record, _ = await context.clients.record_of(client_id)
    held = {"registered": record.tier, "until": _grant_end(context, record), "keys": [key.id for key in record.keys]}
    async with audit.change(AuditAction.CLIENT_REMOVED, client_id, _tier_of(context, client_id) | held):
        before, after = await context.clients.delete(client_id)
    changed = await _move_bucket(context, before, after)
    removed = {**held, "verified_only": before.is_verified_only}
    left: dict[str, Any] = {"registered": None, "until": None, "keys": [], "verified_only": after.is_verified_only}
    await audit(AuditAction.CLIENT_REMOVED, client_id, *_tiers_of(changed, removed, left))
    return changed


@router.get("/clients/{client_id}", summary="A client's tier and buckets")
async def client(client_id: ClientId, context: Guarded) -> ClientView:
    """Return the client's tier and its tokens now. Every well-formed id has a bucket, so no id is unknown."""
    inspection = await context.clients.inspect(client_id)
    found, given = inspection.client, inspection.grant
    buckets = _own_buckets(context, found)
    bucket, *others = await _inspected(context, buckets)
    return ClientView(
        client_id=client_id,
        tier=_tier_view(found.quota),
        tier_source="default" if found.source == "address" else found.source,
        grant=given
        and GrantView(tier=given.tier, until=wall_time(given.until), tier_after=inspection.without_grant.quota.name),
        verified_only=found.is_verified_only,
        confirmed=inspection.is_confirmed,
        bucket=BucketView.of(found.quota, bucket),
        limits=[
            LimitBucketView.of(own.quota, one, limit=own.limit or "", route=own.route)
            for own, one in zip(buckets[1:], others, strict=True)
        ],
        concurrency=await _slots(context, found),
    )


async def _registered(context: AdminContext, tier: str | None, after: str, limit: int) -> RegisteredClients:
    try:
        found, position = await context.clients.page(after, limit, tier)
    except ValueError:
        raise InvalidValue(f"after: must be next of a page, got {after!r}.") from None
    clients = [
        RegisteredClient(
            client_id=client.id,
            tier=client.quota.name,
            tier_source=client.source,
            grant_until=wall_time(record.grant.until) if client.source == "granted" and record.grant else None,
            keys=len(record.keys),
            verified_only=client.is_verified_only,
        )
        for client, record in found
    ]
    return RegisteredClients(clients=clients, next=position)


def _tier(context: AdminContext, name: str) -> str:
    tier = name.upper()
    if tier not in context.clients.tiers:
        names = list(context.clients.tiers)
        raise InvalidValue(
            f"There is no tier '{name}'; the tiers are {', '.join(names)}.", extra={"tier": name, "tiers": names}
        )
    return tier


def _until(request: GrantRequest, now: float) -> float:
    """Return when a grant ends. Both times are seconds since the epoch. Raises InvalidValue."""
    if request.until is not None and request.duration_seconds is not None:
        raise InvalidValue(
            "body: must have either until or duration_seconds, got"
            f" until: '{request.until.isoformat()}' and duration_seconds: {request.duration_seconds:g}."
        )
    if request.duration_seconds is not None:
        return now + request.duration_seconds
    if request.until is None:
        raise InvalidValue("body: must have until or duration_seconds, got neither.")
    until = request.until.timestamp()
    if until <= now:
        raise InvalidValue(
            f"body.until: must be in the future, got '{request.until.isoformat()}'; the time is {wall_time(now)}."
        )
    return until


async def _regrant(context: AdminContext, until: float | None, before: Client, after: Client) -> GrantChanged:
    changed = await _move_bucket(context, before, after)
    return GrantChanged(**changed.model_dump(), until=None if until is None else wall_time(until))


def _heavy(clients: ClientRegistry, recorder: Recorder, key: str) -> HeavyClient:
    found = clients.by_bucket_key(key)
    limits, made = recorder.limited_by_client.estimate(key), recorder.requests_by_client.estimate(key)
    bare = recorder.bare_by_client.estimate(key)
    return HeavyClient(
        client_id=found.id,
        tier_source=found.source,
        tier=found.quota.name,
        limited=limits.count,
        limited_error_bound=limits.error,
        requests=made.count,
        requests_error_bound=made.error,
        bare=bare.count,
        bare_error_bound=bare.error,
    )


async def _move_bucket(context: AdminContext, before: Client, after: Client) -> TierChanged:
    """Convert the buckets to the new tier, and report the tokens before and after of the tier's own."""
    bucket_before = await _bucket(context, before)
    for key, old, new in moved_buckets(context.explainer.limits, before, after):
        await context.limiter.move(key, old, new, context.clocks.monotonic_ns())
    bucket_after = await _bucket(context, after)
    return TierChanged(
        client_id=after.id,
        previous=_tier_view(before.quota),
        current=_tier_view(after.quota),
        persisted=True,
        **_tokens_at(before.quota, bucket_before, after.quota, bucket_after),
    )


def _tokens_at(old: Quota, before: Decision, new: Quota, after: Decision) -> dict[str, Any]:
    """Return the tokens of a bucket before and after a change, and the processes that share them, if any.

    If one of the decisions is on a share, both results are: a share begins with the filled fraction of the bucket.
    """
    processes = sharing_processes(before) or sharing_processes(after)
    return {
        "tokens_before": tokens_of(old, before.reset_ns, processes),
        "tokens_after": tokens_of(new, after.reset_ns, processes),
        "processes": processes,
    }


def _tiers_of(
    changed: TierChanged, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return tier and tokens before and after a change, for the audit log, with what else was and is in force."""
    shared = {} if changed.processes is None else {"processes": changed.processes}
    return (
        {"tier": changed.previous.name, "tokens": changed.tokens_before, **shared, **before},
        {"tier": changed.current.name, "tokens": changed.tokens_after, **shared, **after},
    )


def _tier_of(context: AdminContext, client_id: str) -> dict[str, Any]:
    """Return the tier in force as far as it is known in memory, for the audit log."""
    return {"tier": context.clients.by_id(client_id).quota.name}


async def _grant_of(context: AdminContext, client_id: str) -> dict[str, str | None]:
    """Return the end of the grant in force, for the audit log."""
    record, _ = await context.clients.record_of(client_id)
    return {"until": _grant_end(context, record)}


def _grant_end(context: AdminContext, record: ClientRecord) -> str | None:
    grant = record.grant
    return None if grant is None or grant.until <= context.clocks.wall() else wall_time(grant.until)


def _own_buckets(context: AdminContext, client: Client) -> list[OwnBucket]:
    return client_buckets(context.explainer.limits, client, context.route_names)


async def _slots(context: AdminContext, client: Client) -> list[SlotView]:
    """Return the client's requests in flight, by each concurrency limit that counts by client, or client and route."""
    own = limits_of_client(context.explainer.concurrency, client, context.route_names)
    uses = await context.slots.look([ConcurrencySlot(one.key, one.quota) for one in own])
    return [
        SlotView(
            limit=one.limit or "",
            route=one.route,
            in_flight=use.in_flight,
            concurrent=use.concurrent,
            processes=use.processes,
        )
        for one, use in zip(own, uses, strict=True)
    ]


async def _inspected(context: AdminContext, buckets: list[OwnBucket]) -> list[Decision]:
    """Return the state of each bucket, as a decision on cost 0."""
    charges = [Charge(bucket.key, bucket.quota, 0) for bucket in buckets]
    return await context.limiter.inspect(charges, context.clocks.monotonic_ns())


async def _bucket(context: AdminContext, client: Client) -> Decision:
    """Return the state of the client's bucket, as a decision on cost 0."""
    (decision,) = await context.limiter.inspect([Charge(client.key, client.quota, 0)], context.clocks.monotonic_ns())
    return decision


def _tier_view(quota: Quota) -> TierView:
    return TierView(name=quota.name, rate=quota.rate, capacity=quota.capacity)
