"""The endpoints `/limits` and `/tiers`: what the configuration and the API say about limits, and live figures."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal

from fastapi import APIRouter
from pydantic import Field

from api_gateway.admin.context import AdminContext
from api_gateway.admin.dependencies import Guarded
from api_gateway.admin.openapi import REFUSAL_RESPONSES, TOKEN
from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import InvalidValue
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.limits.limit import LIMIT_PREFIX, Limit, limit_of
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.metrics import Recorder
from api_gateway.models import Body, Quota
from api_gateway.observability.heavy_hitters import Estimate
from api_gateway.rate_limiter import MemoryLimiter

router = APIRouter(tags=["limits"], responses=REFUSAL_RESPONSES, dependencies=[TOKEN])

_PEER = "peer:"  # of the keys of buckets of the address limit
_SHOWN = 10  # buckets with the most refusals, for each limit
_BATCH = 10_000  # keys counted before the event loop runs other tasks


class AllowanceView(Body):
    """The allowance of a limit: rate and capacity, quota and period, or requests in flight; for one tier or all."""

    tier: str | None = Field(description="The tier whose clients have it; null: all others that the limit applies to.")
    rate: float | None = Field(description="Tokens added per second; null for a calendar quota.")
    capacity: int | None = Field(description="Maximum number of tokens in a bucket; null for a calendar quota.")
    quota: int | None = Field(description="Tokens in each period; null for a bucket.")
    period: Literal["hour", "day", "week", "month"] | None = Field(description="Of a calendar quota.")
    time_zone: str | None = Field(description="Of a calendar quota.")
    concurrent: int | None = Field(description="Requests of one key in flight, of a concurrency limit.")


class HeavyBucket(Body):
    """A bucket with its refusals. The true count is at most `refusals`, and at least that minus the error bound."""

    value: str = Field(
        description="Value of the key, such as an address; of several parts, with | between them. Of a tier: the"
        " client."
    )
    refusals: int
    refusals_error_bound: int


class LimitView(Body):
    """A limit, and how it is used."""

    name: str
    kind: Literal["tier", "address", "limit"]
    key: list[str] = Field(description="What has a bucket of its own; of several, each combination.")
    allowances: list[AllowanceView]
    routes: list[str] | None = Field(description="null: all.")
    methods: list[str] | None = Field(description="null: all.")
    cost: float | None = Field(description="Of a request in this limit; null: the cost by its route.")
    configured_at: str = Field(description="The setting.", examples=["limits[0]", "tiers.FREE"])
    buckets: int | None = Field(
        description="Entries in memory, of which buckets have up to two and quotas one; null if they are in a store."
    )
    in_flight: int | None = Field(description="Requests in flight, of a concurrency limit.")
    refusals: int = Field(description="Refusals since the start.")
    heaviest: list[HeavyBucket] = Field(
        description="Buckets with the most refusals, as far as they are known. Of a tier: those of clients that have"
        " the tier now, with their refusals by all tiers that they had."
    )


class Limits(Body):
    """All limits, in the order in which a request is charged."""

    limits: list[LimitView]


class LimitsSnapshot(Body):
    """The state of all limits at an instant."""

    format: Literal[1]
    at_ns: int = Field(description="The time, in nanoseconds since the epoch, on the clock of the access log.")
    buckets: dict[str, dict[str, int]] = Field(
        description="By process and key: when the bucket will be full, in nanoseconds since the epoch."
    )
    counters: list[tuple[str | int | None, ...]] = Field(description="Of calendar quotas, as in their file.")


class TierOverview(Body):
    """A tier with its quota, and the names of further limits that apply to it."""

    name: str
    rate: float = Field(description="Tokens added per second.")
    capacity: int = Field(description="Maximum number of tokens in a bucket.")
    default: bool = Field(description="True for the tier of clients that are not registered.")
    limits: list[str] = Field(description="Names of further limits that apply to the tier.")


class Tiers(Body):
    """All tiers."""

    tiers: list[TierOverview]


@router.get("/limits", summary="All limits, with live figures")
async def limits(context: Guarded) -> Limits:
    """Return every limit: those of the tiers, of addresses, and of the configuration's list.

    Figures are those of all workers.
    """
    recorder = (await context.aggregator.gather()).recorder
    counts = await _counts(context)
    explainer = context.explainer
    views = [
        _view(name.lower(), "tier", ["client"], [(name, quota)], f"tiers.{name}")
        for name, quota in context.clients.tiers.items()
    ]
    address = explainer.address_quota
    if address is not None:
        views.append(_view("address", "address", ["address"], [(None, address)], "address_limit"))
    further = sorted([*explainer.limits, *explainer.concurrency], key=lambda limit: limit.index)
    views += [_limit_view(limit) for limit in further]
    refused = recorder.limited_by_bucket.heaviest(len(recorder.limited_by_bucket))
    return Limits(limits=[_with_figures(view, recorder, counts, refused, context.clients) for view in views])


@router.get("/limits/snapshot", summary="The state of all buckets and quotas, for api-gateway replay --from")
async def snapshot(context: Guarded) -> LimitsSnapshot:
    """Return the state of all limits at one instant, from which an access log can be replayed.

    Only buckets in memory are supported. They are copied in one step, which takes about 1 ms for 1,000 quotas or
    10,000 buckets.
    """
    limiter, numbers = context.limiter, context.numbers
    if not isinstance(limiter, MemoryLimiter):
        raise InvalidValue(
            "The buckets are in a store. `api-gateway replay --save FILE` writes a snapshot of the end of a log."
        )
    tats, rows, now_ns = limiter.tats(), context.quotas().rows(), context.clocks.monotonic_ns()
    buckets = {}
    for index, (key, tat_ns) in enumerate(tats.items(), 1):
        if tat_ns > now_ns:
            buckets[key] = numbers.since_epoch(tat_ns)
        if index % _BATCH == 0:
            await asyncio.sleep(0)
    return LimitsSnapshot(
        format=1, at_ns=numbers.since_epoch(now_ns), buckets={numbers.process: buckets}, counters=rows
    )


@router.get("/tiers", summary="All tiers")
async def tiers(context: Guarded) -> Tiers:
    """Return every tier, with the names of the further limits that apply to it."""
    further = sorted([*context.explainer.limits, *context.explainer.concurrency], key=lambda limit: limit.index)
    return Tiers(
        tiers=[
            TierOverview(
                name=name,
                rate=quota.rate,
                capacity=quota.capacity,
                default=quota is context.clients.default,
                limits=[limit.name for limit in further if limit.quota_of(name) is not None],
            )
            for name, quota in context.clients.tiers.items()
        ]
    )


def _limit_view(limit: Limit) -> LimitView:
    own: list[tuple[str | None, Quota]] = list(limit.quotas.items())
    if limit.quota is not None:
        own = [*own, *([(None, limit.quota)] if limit.tiers is None else _shared(limit, limit.quota))]
    return _view(
        limit.name,
        "limit",
        list(limit.key),
        own,
        f"limits[{limit.index}]",
        routes=None if limit.routes is None else sorted(limit.routes),
        methods=None if limit.methods is None else sorted(limit.methods),
        cost=limit.cost,
    )


def _shared(limit: Limit, quota: Quota) -> list[tuple[str | None, Quota]]:
    return [(tier, quota) for tier in sorted(limit.tiers or ()) if tier not in limit.quotas]


def _view(
    name: str,
    kind: Literal["tier", "address", "limit"],
    key: list[str],
    allowances: Sequence[tuple[str | None, Quota]],
    configured_at: str,
    *,
    routes: list[str] | None = None,
    methods: list[str] | None = None,
    cost: float | None = None,
) -> LimitView:
    return LimitView(
        name=name,
        kind=kind,
        key=key,
        allowances=[_allowance_view(tier, quota) for tier, quota in allowances],
        routes=routes,
        methods=methods,
        cost=cost,
        configured_at=configured_at,
        buckets=None,
        in_flight=None,
        refusals=0,
        heaviest=[],
    )


def _allowance_view(tier: str | None, quota: Quota) -> AllowanceView:
    values: dict[str, float | str] = {"rate": quota.rate, "capacity": quota.capacity}
    if isinstance(quota, PeriodQuota):
        calendar = quota.calendar
        values = {"quota": quota.capacity, "period": calendar.unit, "time_zone": calendar.zone.key}
    elif isinstance(quota, ConcurrencyQuota):
        values = {"concurrent": quota.capacity}
    return AllowanceView.model_validate({**dict.fromkeys(AllowanceView.model_fields), "tier": tier, **values})


def _with_figures(
    view: LimitView,
    recorder: Recorder,
    counts: dict[str, int] | None,
    refused: Sequence[Estimate],
    clients: ClientRegistry,
) -> LimitView:
    refusals = sum(count for (name, _), count in recorder.refusals_by_limit.items() if name == view.name)
    prefix = _PEER if view.kind == "address" else f"{LIMIT_PREFIX}{view.name}:"
    if view.kind == "tier":
        found = _of_tier(view.allowances[0].tier, refused, clients)
    else:
        found = ((one.key[len(prefix) :], one) for one in refused if one.key.startswith(prefix))
    heaviest = [
        HeavyBucket(value=value, refusals=one.count, refusals_error_bound=one.error)
        for value, one in islice(found, _SHOWN)
    ]
    in_flight = recorder.in_flight_by_limit.get(view.name) if view.kind == "limit" else None
    buckets = None if counts is None or view.kind == "tier" or in_flight is not None else counts.get(prefix, 0)
    figures = {"refusals": refusals, "heaviest": heaviest, "buckets": buckets, "in_flight": in_flight}
    return view.model_copy(update=figures)


def _of_tier(tier: str | None, refused: Sequence[Estimate], clients: ClientRegistry) -> Iterator[tuple[str, Estimate]]:
    """Yield the refusals by buckets of clients that have a tier now, each with the client."""
    for one in refused:
        if not one.key.startswith((LIMIT_PREFIX, _PEER)):
            client = clients.by_bucket_key(one.key)
            if client.quota.name == tier:
                yield client.id, one


async def _counts(context: AdminContext) -> dict[str, int] | None:
    """Return the number of buckets by the prefix of their keys; None if they are in a store."""
    if not isinstance(context.limiter, MemoryLimiter):
        return None
    counts: dict[str, int] = {}
    for keys in (*context.limiter.bucket_keys(), context.quotas().keys()):
        rest = iter(keys)
        while batch := list(islice(rest, _BATCH)):
            _count(batch, counts)
            await asyncio.sleep(0)
    return counts


def _count(keys: Iterable[str], counts: dict[str, int]) -> None:
    for key in keys:
        if key.startswith(LIMIT_PREFIX):
            prefix = f"{LIMIT_PREFIX}{limit_of(key)}:"
        elif key.startswith(_PEER):
            prefix = _PEER
        else:
            continue
        counts[prefix] = counts.get(prefix, 0) + 1
