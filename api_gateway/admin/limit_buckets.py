"""The endpoints at `/limits/{name}/buckets`: what one key of any limit has left, its reset, top-up and carry-over."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from api_gateway.admin.audit_log import AuditAction
from api_gateway.admin.client_schema import BucketView, SharingWorkers
from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Audited, Guarded
from api_gateway.admin.openapi import PROBLEM, REFUSAL_RESPONSES, STORE_REFUSAL, TOKEN
from api_gateway.admin.quota_changes import CarryOverRequest, HeldQuota, QuotaView, TopUpRequest
from api_gateway.admin.request_schema import RequestBody
from api_gateway.clients.api_keys import has_key
from api_gateway.errors import InvalidValue
from api_gateway.http1.headers import address_key, is_visible_ascii
from api_gateway.ip_addresses import is_address
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.limits.limit import Limit
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import Body, Charge, Client, ConcurrencySlot, Quota

router = APIRouter(
    tags=["limits"],
    responses={
        **REFUSAL_RESPONSES,
        422: {"description": "No such limit, a key that it cannot have, or another kind of limit.", **PROBLEM},
        **STORE_REFUSAL,
    },
    dependencies=[TOKEN],
)

ADDRESS_LIMIT = "address"  # the name of the limit by address that exists without an entry of `limits`
_MOST = 4096  # characters of a value


class KeyOfBucket(RequestBody):
    """A key of a limit, in a body."""

    key: list[str] = Field(
        description="The value of each part of the limit's key, in their order.", max_length=8, examples=[["acme"]]
    )
    tier: str | None = Field(
        default=None, description="Needed if the limit has allowances by tier, and does not count by client."
    )


class KeyedTopUp(TopUpRequest, KeyOfBucket):
    """The body of POST /limits/{name}/buckets/top-up."""


class KeyedCarryOver(CarryOverRequest, KeyOfBucket):
    """The body of POST /limits/{name}/buckets/carry-over."""


class KeyInFlight(Body):
    """The requests of one key in flight."""

    in_flight: int
    concurrent: int = Field(description="Maximum number of requests in flight.")
    processes: SharingWorkers = None


class KeyedBucket(Body):
    """The state of one key of a limit: a bucket, a quota, or requests in flight; the others are null."""

    limit: str
    key: list[str] = Field(description="The value of each part of the limit's key.")
    tier: str | None = Field(description="null if all tiers share the buckets of the limit.")
    bucket: BucketView | None
    quota: QuotaView | None
    concurrency: KeyInFlight | None
    confirmed: bool | None = Field(
        default=None,
        description="False if the client store is unavailable, see `GET /clients/{id}`; null without a client.",
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """One key of a limit: the values of its parts, the key of its bucket, its allowance, and the tier that has it."""

    limit: str
    values: list[str]
    tier: str | None
    key: str
    quota: Quota
    is_unverified: bool
    is_confirmed: bool | None

    @property
    def subject(self) -> str:
        """The subject in the audit log."""
        return f"{self.limit}: {', '.join(self.values)}"

    def held(self, context: AdminContext) -> HeldQuota:
        """Return the quota of the key. Raises InvalidValue if the limit is of another kind."""
        if not isinstance(self.quota, PeriodQuota):
            remedy = "which end by themselves" if isinstance(self.quota, ConcurrencyQuota) else "which reset fills"
            what = "requests in flight" if isinstance(self.quota, ConcurrencyQuota) else "a bucket"
            raise InvalidValue(
                f"path.name: only calendar quotas have top-ups and carry-over; '{self.limit}' has {what}, {remedy}."
            )
        return HeldQuota(
            context, self.limit, self.key, self.quota, _shown_at(self.limit), is_unverified=self.is_unverified
        )

    async def view(self, context: AdminContext) -> KeyedBucket:
        """Return the state of the key. Nothing is charged."""
        if isinstance(self.quota, PeriodQuota):
            return self.shown(quota=await self.held(context).look())
        if isinstance(self.quota, ConcurrencyQuota):
            (use,) = await context.slots.look([ConcurrencySlot(self.key, self.quota)])
            own = KeyInFlight(in_flight=use.in_flight, concurrent=use.concurrent, processes=use.processes)
            return self.shown(concurrency=own)
        charge = Charge(self.key, self.quota, 0, None, self.is_unverified)
        (one,) = await context.limiter.inspect([charge], context.clocks.monotonic_ns())
        return self.shown(bucket=BucketView.of(self.quota, one))

    def shown(
        self,
        *,
        bucket: BucketView | None = None,
        quota: QuotaView | None = None,
        concurrency: KeyInFlight | None = None,
    ) -> KeyedBucket:
        """Return the key with its state."""
        return KeyedBucket(
            limit=self.limit,
            key=self.values,
            tier=self.tier,
            bucket=bucket,
            quota=quota,
            concurrency=concurrency,
            confirmed=self.is_confirmed,
        )


@router.get("/limits/{name}/buckets", summary="The state of one key of a limit")
async def bucket(
    name: str,
    context: Guarded,
    key: Annotated[
        list[str] | None, Query(description="The value of a part of the limit's key; once for each part, in order.")
    ] = None,
    tier: Annotated[str | None, Query(description="See the body of reset.")] = None,
) -> KeyedBucket:
    """Return the state of a key: its bucket, its calendar quota, or its requests in flight.

    Nothing is charged. Every well-formed key has a bucket, so no key is unknown.
    """
    place = await _place(context, name, key or [], tier, "query")
    return await place.view(context)


@router.post("/limits/{name}/buckets/reset", summary="Fill the bucket of a key, or reset its quota")
async def reset_bucket(name: str, request: KeyOfBucket, context: Guarded, audit: Audited) -> KeyedBucket:
    """Fill the bucket of a key, or set the used tokens of a quota's current period to 0."""
    place = await _place(context, name, request.key, request.tier, "body")
    if isinstance(place.quota, ConcurrencyQuota):
        raise InvalidValue(
            f"path.name: '{name}' is a concurrency limit, which cannot be reset: a slot becomes free when its request"
            " ends."
        )
    if isinstance(place.quota, PeriodQuota):
        return place.shown(quota=await place.held(context).reset(audit, place.subject))
    before = _tokens(await place.view(context))
    async with audit.change(AuditAction.BUCKETS_FILLED, place.subject, before, _shown_at(name)):
        await context.limiter.refill(place.key)
    after = await place.view(context)
    await audit(AuditAction.BUCKETS_FILLED, place.subject, before, _tokens(after))
    return after


@router.post("/limits/{name}/buckets/top-up", summary="Add tokens to the quota of a key")
async def top_up_bucket(name: str, request: KeyedTopUp, context: Guarded, audit: Audited) -> KeyedBucket:
    """Add tokens, which are used when the quota of a period is used up, until they are used or expire.

    A key has one balance of top-ups for each quota: of two ends, the later one applies to all of it.
    """
    place = await _place(context, name, request.key, request.tier, "body")
    return place.shown(quota=await place.held(context).top_up(request, audit, place.subject))


@router.post("/limits/{name}/buckets/carry-over", summary="Set what was carried over to the quota of a key")
async def carry_over_bucket(name: str, request: KeyedCarryOver, context: Guarded, audit: Audited) -> KeyedBucket:
    """Set the carry-over of the current period: its tokens in addition to the quota.

    The next period is not affected.
    """
    place = await _place(context, name, request.key, request.tier, "body")
    return place.shown(quota=await place.held(context).carry_over(request, audit, place.subject))


def _tokens(state: KeyedBucket) -> dict[str, Any]:
    """Return the tokens of a bucket, for the audit log."""
    return {"limit": state.limit, "tokens": None if state.bucket is None else state.bucket.tokens}


def _shown_at(name: str) -> str:
    return f"GET /limits/{name}/buckets shows what the key has left"


async def _place(context: AdminContext, name: str, given: list[str], tier: str | None, where: str) -> _Place:
    """Return one key of a limit. `where` is the part of the request that has it. Raises InvalidValue."""
    limit = _limit(context, name)
    if len(given) != len(limit.key):
        raise InvalidValue(
            f"{where}.key: the limit '{name}' counts by {', '.join(limit.key)}: give {len(limit.key)}"
            f" {'value' if len(limit.key) == 1 else 'values in this order'}, got {len(given)}."
        )
    client: Client | None = None
    is_confirmed: bool | None = None
    values, shown = list[str](), list[str]()
    for index, (part, value) in enumerate(zip(limit.key, given, strict=True)):
        place = f"{where}.key[{index}]"
        _check(context, limit, part, value, place)
        if part == "client":
            found = await context.clients.inspect(value)
            client, is_confirmed = found.client, found.is_confirmed
            values.append(client.key)
            shown.append(value)
        else:
            values.append(address_key(value) if part == "address" else value)
            shown.append(values[-1])
    owner, quota = _allowance(context, limit, client, tier, where)
    key = f"peer:{values[0]}" if limit.index < 0 else limit.bucket_key(values, owner or "")
    return _Place(name, shown, owner, key, quota, limit.is_unverified(client), is_confirmed)


def _limit(context: AdminContext, name: str) -> Limit:
    explainer = context.explainer
    known = {limit.name: limit for limit in (*explainer.limits, *explainer.concurrency)}
    if explainer.address_quota is not None:
        known[ADDRESS_LIMIT] = Limit(ADDRESS_LIMIT, ("address",), explainer.address_quota, index=-1)
    found = known.get(name)
    if found is None:
        remedy = ""
        if name.upper() in context.clients.tiers:
            remedy = " That is a tier: its buckets are those of clients, at /clients/{id}."
        raise InvalidValue(
            f"path.name: there is no limit {name[:200]!r}; the limits are {', '.join(known) or 'none'}.{remedy}",
            extra={"limits": list(known)},
        )
    return found


def _check(context: AdminContext, limit: Limit, part: str, value: str, place: str) -> None:
    """Raise InvalidValue if a part of a key cannot have a value."""
    if has_key(value.encode("utf-8", "surrogatepass")):
        raise InvalidValue(f"{place}: an API key is no value of {part}; give the id of its client.")
    shown = repr(value[:200])
    if not 0 < len(value) <= _MOST:
        raise InvalidValue(f"{place}: a value of {part} has 1 to {_MOST} characters, got {len(value)}.")
    if part == "client" and not is_visible_ascii(value.encode("utf-8", "surrogatepass")):
        raise InvalidValue(f"{place}: a client id is 1 to 128 visible ASCII characters, got {shown}.")
    if part == "route":
        routes = list(context.route_names) if limit.routes is None else sorted(limit.routes)
        if value not in routes:
            raise InvalidValue(f"{place}: must be a route of the limit: {', '.join(routes)}; got {shown}.")
    if part == "address" and not is_address(value):
        raise InvalidValue(f"{place}: must be an IPv4 or IPv6 address, got {shown}.")


def _allowance(
    context: AdminContext, limit: Limit, client: Client | None, tier: str | None, where: str
) -> tuple[str | None, Quota]:
    """Return the allowance of a key, and the tier whose it is (None: of all). Raises InvalidValue."""
    tiers = [name for name in context.clients.tiers if limit.quota_of(name) is not None]
    if client is not None:
        if tier is not None:
            raise InvalidValue(f"{where}.tier: the client has the tier {client.quota.name}: remove it, got {tier!r}.")
        tier = client.quota.name
    elif not limit.quotas:
        if tier is not None:
            raise InvalidValue(f"{where}.tier: all tiers share the buckets of this limit: remove it, got {tier!r}.")
        assert limit.quota is not None  # noqa: S101 - a rule of the configuration
        return None, limit.quota
    quota = None if tier is None else limit.quota_of(tier.upper())
    if tier is None or quota is None:
        got = "nothing" if tier is None else repr(tier)
        whose = "" if client is None else f" of client {client.id!r}"
        raise InvalidValue(
            f"{where}.tier: the limit '{limit.name}' has an allowance for each of the tiers {', '.join(tiers)}, got"
            f" {got}{whose}."
        )
    return tier.upper(), quota
