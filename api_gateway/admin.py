"""The operator's endpoints: see health, metrics, breakers and clients, and change a client's tier."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from api_gateway.breaker_modes import BreakerOverrides, Override
from api_gateway.breaker_policy import Mode, State
from api_gateway.breaker_records import TransitionRecord
from api_gateway.clients import ClientRegistry
from api_gateway.clocks import Clocks, Moment
from api_gateway.crew import Aggregator
from api_gateway.diagnosis import nearest
from api_gateway.errors import (
    BadRequest,
    ClientIdInvalid,
    Forbidden,
    GatewayError,
    InternalError,
    InvalidValue,
    MethodNotAllowed,
    NoRoute,
    problem,
)
from api_gateway.explanation import Explainer
from api_gateway.explanation_bodies import ExplainRequest, Explanation
from api_gateway.exposition import PrometheusExposition
from api_gateway.headers import is_visible_ascii
from api_gateway.health_cache import HealthCache
from api_gateway.metrics import GATEWAY, Recorder
from api_gateway.metrics_bodies import LatencyView, MetricsView
from api_gateway.models import (
    NANOSECONDS,
    Body,
    BucketReset,
    BucketView,
    Charge,
    Client,
    ClientView,
    Decision,
    GrantChanged,
    GrantRequest,
    GrantView,
    HeavyClient,
    HeavyClients,
    Problem,
    Quota,
    TierChange,
    TierChanged,
    TierView,
)
from api_gateway.operator_gate import OPERATOR
from api_gateway.operators import Operator
from api_gateway.pacing import each, paced
from api_gateway.rate_limiter import RateLimiter
from api_gateway.reload_bodies import Reloaded
from api_gateway.reload_views import configuration_view, reload_view
from api_gateway.report import BreakerSnapshot
from api_gateway.request_paths import path_as_sent, unescaped
from api_gateway.shares import ResourceState
from api_gateway.target_views import upstream_view, utc, verdict_view, wall_time
from api_gateway.upstream_bodies import (
    BreakersView,
    BreakerThresholds,
    BreakerView,
    ClientStoreView,
    FailedCallView,
    HealthView,
    HistoryView,
    LagView,
    ModeChange,
    ModeChanged,
    ModeView,
    OpeningView,
    ResourceView,
    StoreView,
    TransitionRecordView,
)


class Lifecycle(StrEnum):
    """Where the gateway is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(slots=True)
class AdminContext:
    """Everything the operator's endpoints look at."""

    version: str
    limiter: RateLimiter
    clients: ClientRegistry
    aggregator: Aggregator
    clocks: Clocks
    explainer: Explainer
    overrides: BreakerOverrides
    lifecycle: Lifecycle = Lifecycle.STARTING
    health: HealthCache = field(init=False)

    def __post_init__(self) -> None:
        self.health = HealthCache(partial(health_view, self), self.clocks.monotonic)


def _context(request: Request) -> AdminContext:
    console: AdminContext = request.app.state.console
    return console


def _operator(request: Request) -> Operator:
    """Return the operator whom the gate admitted. A request that did not come through the gate has none."""
    operator: Operator | None = request.scope.get(OPERATOR)
    if operator is None:
        raise Forbidden("This endpoint is for operators.")
    return operator


def _guard(request: Request) -> AdminContext:
    _operator(request)
    return _context(request)


def _client_id(client_id: str) -> str:
    """Return the client id that a path names, in which a slash is spelt %2F."""
    name = unescaped(client_id)
    if not is_visible_ascii(name.encode()):
        raise ClientIdInvalid(f"A client id is 1 to 128 visible ASCII characters, got {name[:200]!r}.")
    return name


ClientId = Annotated[str, Depends(_client_id)]
Guarded = Annotated[AdminContext, Depends(_guard)]
Open = Annotated[AdminContext, Depends(_context)]

_PROBLEM: dict[str, Any] = {"model": Problem, "content": {"application/problem+json": {}}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "The bearer token is missing or not valid.", **_PROBLEM},
    403: {
        "description": "The caller is not an operator, or has only the role read; or a page of another origin.",
        **_PROBLEM,
    },
    413: {"description": "The body is larger than 64 KiB.", **_PROBLEM},
    429: {"description": "Too many requests of this token, or too many failed attempts of this address.", **_PROBLEM},
}
_CLIENT_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The client id is not 1 to 128 visible ASCII characters.", **_PROBLEM},
    **_REFUSALS,
}
_STORE_REFUSAL: dict[int | str, dict[str, Any]] = {
    503: {
        "description": "The store could not be used. The detail tells whether the change was not made, or may be.",
        **_PROBLEM,
    }
}
_TIER_REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"description": "No such tier, and the answer lists them; or another mistake in the body.", **_PROBLEM},
    **_STORE_REFUSAL,
}

open_router = APIRouter(tags=["health"])
# The gate checks the token; this says so in the schema.
_TOKEN = Security(
    HTTPBearer(
        scheme_name="operator",
        auto_error=False,
        description="A token of the configuration, or the generated one in the file that the start names.",
    )
)
guarded_router = APIRouter(tags=["operator"], responses=_REFUSALS, dependencies=[_TOKEN])
clients_router = APIRouter(tags=["clients"], responses=_CLIENT_REFUSALS, dependencies=[_TOKEN])
_ROUTERS = (open_router, guarded_router, clients_router)


# These three are answered by the gate, from memory; here they are described.


@open_router.get("/healthz", response_class=PlainTextResponse, summary="Liveness")
async def healthz() -> str:
    """Answer 200 while the event loop turns."""
    return "ok\n"


@open_router.get(
    "/readyz",
    response_class=PlainTextResponse,
    summary="Readiness",
    responses={503: {"description": "Starting or draining.", "content": {"text/plain": {}}}},
)
async def readyz(console: Open) -> Response:
    """Answer 200 while serving. Upstreams that are down do not make the gateway unready."""
    is_serving = console.lifecycle is Lifecycle.SERVING
    return PlainTextResponse(f"{console.lifecycle}\n", status_code=200 if is_serving else 503)


@open_router.get(
    "/health",
    summary="Health of the gateway and its upstreams",
    response_model=HealthView,
    responses={429: {"description": "Asked too often.", **_PROBLEM}},
)
async def health(console: Open) -> Response:
    """Answer 200 while the gateway itself serves; to anybody but an operator, the status word only."""
    return Response(await console.health.word(), media_type="application/json")


async def health_view(console: AdminContext) -> HealthView:
    """Return the health of the gateway and its upstreams, as operators see it."""
    report = await console.aggregator.gather()
    now = console.clocks.now()
    views = each(
        report.upstreams.items(),
        lambda name, upstream: upstream_view(upstream, now, report.recorder.concurrency(name, upstream)),
    )
    upstreams = await paced(views)
    words = {view.status for view in upstreams.values()}
    status: Literal["pass", "warn", "fail"] = "warn" if words & {"warn", "fail"} else "pass"
    if words == {"fail"}:
        status = "fail"
    elif (
        not report.limiter.is_whole
        or report.client_trouble is not None
        or report.configuration.problems
        or any(resource.status == "warn" for resource in report.resources)
    ):
        status = "warn"
    uptime = round(console.clocks.monotonic() - report.recorder.started, 3)
    return HealthView(
        status=status,
        version=console.version,
        uptime_seconds=uptime,
        upstreams=upstreams,
        store=StoreView(**asdict(report.limiter)),
        client_store=ClientStoreView(
            status="pass" if report.client_trouble is None else "warn", error=report.client_trouble
        ),
        configuration=configuration_view(report.configuration),
        event_loop=LagView(lag_seconds=round(report.lag, 6), shed=report.recorder.shed[GATEWAY].total()),
        resources=[_resource_view(resource) for resource in report.resources],
    )


@guarded_router.post(
    "/reload",
    summary="Reload the configuration",
    responses={
        422: {"description": "The configuration is wrong; the one before stays in force.", **_PROBLEM},
        500: {"description": "It could not be put into force; the one before stays in force.", **_PROBLEM},
        503: {"description": "The gateway drains, or its workers are being restarted.", **_PROBLEM},
    },
)
async def reload(request: Request, console: Guarded) -> Reloaded:
    """Read the configuration anew and put it into force in every worker, or change nothing.

    Requests, streams and connections go on; buckets, breakers and counts stay. The response names what has changed,
    and what of it needs a restart.
    """
    outcome = await console.aggregator.reload(f"POST /reload by {_who(request)}")
    return reload_view(outcome)


class MetricsFormat(StrEnum):
    """The two ways to show the metrics."""

    JSON = "json"
    PROMETHEUS = "prometheus"


@guarded_router.get(
    "/metrics",
    summary="All metrics, for people and for Prometheus",
    response_model=MetricsView,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
async def metrics(
    request: Request,
    console: Guarded,
    format: Annotated[MetricsFormat | None, Query()] = None,  # noqa: A002 - the public name
) -> Any:
    """Answer JSON, or exposition text where `?format=prometheus` or `Accept` asks for it."""
    report = await console.aggregator.gather()
    accept = request.headers.get("accept", "")
    asks_text = "application/openmetrics-text" in accept or "text/plain" in accept
    if format is MetricsFormat.PROMETHEUS or (format is None and asks_text):
        exposition = PrometheusExposition(
            report.recorder,
            report.upstreams,
            report.limiter,
            report.buckets,
            console.version,
            report.lag,
            report.tasks,
            report.resources,
            report.configuration,
        )
        body, content_type = await paced(exposition.render(accept))
        return Response(body, headers={"content-type": content_type})
    view = report.recorder.snapshot(
        console.clocks.monotonic(),
        report.upstreams,
        buckets=report.buckets,
        bucket_limit=report.bucket_limit,
        overflowed=report.overflowed,
        limiter=report.limiter,
        lag=report.lag,
    )
    return _shown(await paced(view))


@guarded_router.get("/metrics/latency", summary="Latency percentiles", response_model=LatencyView)
async def latency(console: Guarded) -> Response:
    """Answer the percentiles over the last minute, the last five minutes and since the start."""
    report = await console.aggregator.gather()
    return _shown(await paced(report.recorder.latency(console.clocks.monotonic())))


@guarded_router.get("/circuit-breakers", summary="Every circuit breaker", response_model=BreakersView)
async def circuit_breakers(console: Guarded) -> Response:
    """Answer state, mode, counts, thresholds, since when, when the next probe is due and why it last opened."""
    await console.overrides.look()
    report = await console.aggregator.gather()
    now = console.clocks.now()
    trouble = {} if console.overrides.trouble is None else {"modes_error": console.overrides.trouble}
    breakers = each(
        report.upstreams.items(),
        lambda name, upstream: _breaker_view(upstream.breaker, console.overrides.override(name), now),
    )
    targets = each(
        report.upstreams.items(),
        lambda _, upstream: {target.key: verdict_view(target, now) for target in upstream.targets},
    )
    return _shown(BreakersView(circuit_breakers=await paced(breakers), targets=await paced(targets), **trouble))


@guarded_router.post(
    "/circuit-breakers/{name}",
    summary="Put a circuit breaker into a mode",
    responses={
        404: {"description": "There is no circuit breaker of that name.", **_PROBLEM},
        422: {"description": "No such mode, or another mistake in the body.", **_PROBLEM},
        **_STORE_REFUSAL,
    },
)
async def set_mode(name: str, change: ModeChange, request: Request, console: Guarded) -> ModeChanged:
    """Force a breaker open or closed, only observe it, or leave it to itself again (`auto`).

    The mode holds for `duration_seconds`, or until it is changed, also over a restart. It is on disk before the
    response is sent; every worker of this gateway follows within a second. In `observe` calls are counted and
    transitions are made and shown, but nothing is refused.
    """
    _check_breaker(console, name)
    if change.mode == "auto" and change.duration_seconds is not None:
        raise InvalidValue(
            f"body.duration_seconds: auto ends what was set before and lasts, got {change.duration_seconds:g}."
        )
    override, wall = None, console.clocks.wall()
    if change.mode != "auto":
        until = None if change.duration_seconds is None else wall + change.duration_seconds
        override = Override(Mode(change.mode), wall, until, change.comment, _who(request))
    before = await console.overrides.set(name, override)
    return ModeChanged(name=name, previous=_mode_view(before), current=_mode_view(override))


@guarded_router.get(
    "/circuit-breakers/{name}/history",
    summary="A circuit breaker's last moves",
    responses={404: {"description": "There is no circuit breaker of that name.", **_PROBLEM}},
)
async def history(name: str, console: Guarded) -> HistoryView:
    """Answer the last 50 moves of each worker's breaker, the newest first, with what led to each.

    Among them are as many of the breakers of its targets, by `target_url`.
    """
    _check_breaker(console, name)
    report = await console.aggregator.gather(with_histories=True)
    now = console.clocks.now()
    moves = [_move_view(record, now) for record in reversed(report.histories.get(name, []))]
    return HistoryView(name=name, history=moves)


@guarded_router.post(
    "/explain",
    summary="What a request would be answered, and why",
    responses={
        400: {"description": "The client id is not 1 to 128 visible ASCII characters.", **_PROBLEM},
        422: {"description": "The path is not proxied, or the body is not a question.", **_PROBLEM},
    },
)
async def explain(question: ExplainRequest, console: Guarded) -> Explanation:
    """Answer who the client is, what the request costs, what every bucket says, and what would come of it.

    Nothing is charged, sent or moved by asking.
    """
    return await console.explainer.explain(question)


@guarded_router.get("/clients", summary="The heaviest clients")
async def heaviest_clients(
    console: Guarded,
    sort: Annotated[Literal["limited", "requests"], Query()] = "limited",
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> HeavyClients:
    """Answer who made most requests, or was limited most often, since the start: from counters for 1000 clients.

    Every client with more than a thousandth of all of them is among those counted.
    """
    recorder = (await console.aggregator.gather()).recorder
    chosen = recorder.limited_by_client if sort == "limited" else recorder.requests_by_client
    clients = [_heavy(console.clients, recorder, found.key) for found in chosen.heaviest(limit)]
    return HeavyClients(sort=sort, clients=clients)


@clients_router.post(
    "/clients/{client_id}/tier",
    summary="Set a client's tier",
    responses=_TIER_REFUSALS,
)
async def set_tier(client_id: ClientId, change: TierChange, console: Guarded) -> TierChanged:
    """Register the client for a tier. Effective for its next request, and stored when this answers.

    Gateways that share the store follow within a second. The bucket keeps its filled fraction: an upgrade brings
    relief at once, and changing back and forth gains nothing.
    """
    tier = _tier(console, change.tier)
    return await _move(console, *await console.clients.set_tier(client_id, tier))


@clients_router.post(
    "/clients/{client_id}/grants", summary="Give a client a tier for a while", responses=_TIER_REFUSALS
)
async def grant(client_id: ClientId, request: GrantRequest, console: Guarded) -> GrantChanged:
    """Give the client a tier until a moment, over whatever it has otherwise and in place of an earlier grant.

    It ends by itself on every gateway, by the clock of each one's machine: where clocks differ, so do the moments.
    """
    tier, until = _tier(console, request.tier), _until(request, console.clocks.wall())
    return await _regrant(console, until, *await console.clients.grant(client_id, tier, until))


@clients_router.delete("/clients/{client_id}/grants", summary="End a client's grant early", responses=_STORE_REFUSAL)
async def revoke(client_id: ClientId, console: Guarded) -> GrantChanged:
    """Return the client to what it has without its grant. One that has none stays as it is."""
    return await _regrant(console, None, *await console.clients.revoke(client_id))


@clients_router.post(
    "/clients/{client_id}/reset",
    summary="Fill a client's bucket",
    responses={503: {"description": "The store of the buckets could not be used.", **_PROBLEM}},
)
async def reset(client_id: ClientId, console: Guarded) -> BucketReset:
    """Fill the client's bucket, whatever it owes."""
    found = (await console.clients.inspect(client_id)).client
    held = await _bucket(console, found)
    await console.limiter.refill(found.key)
    holds = await _bucket(console, found)
    return BucketReset(
        client_id=client_id,
        tier=_tier_view(found.quota),
        tokens_before=_tokens(found.quota, held.reset_ns),
        tokens_after=_tokens(found.quota, holds.reset_ns),
    )


@clients_router.delete("/clients/{client_id}", summary="Return a client to the default tier", responses=_STORE_REFUSAL)
async def forget(client_id: ClientId, console: Guarded) -> TierChanged:
    """Remove the client's registration and its grant.

    It falls back to what the configuration says of it, else the default tier.
    """
    return await _move(console, *await console.clients.delete(client_id))


@clients_router.get("/clients/{client_id}", summary="A client's tier and bucket")
async def client(client_id: ClientId, console: Guarded) -> ClientView:
    """Answer the client's tier and the tokens it has now. Any well-formed id has a bucket, so none is unknown."""
    inspection = await console.clients.inspect(client_id)
    found, given = inspection.client, inspection.grant
    bucket = await _bucket(console, found)
    return ClientView(
        client_id=client_id,
        tier=_tier_view(found.quota),
        tier_source="default" if found.source == "address" else found.source,
        grant=given
        and GrantView(tier=given.tier, until=wall_time(given.until), tier_after=inspection.otherwise.quota.name),
        confirmed=inspection.is_confirmed,
        bucket=BucketView(
            tokens=_tokens(found.quota, bucket.reset_ns),
            capacity=found.quota.capacity,
            reset_after_seconds=round(bucket.reset_ns / NANOSECONDS, 3),
        ),
    )


def install(app: FastAPI, refused: Counter[str]) -> frozenset[str]:
    """Add the operator endpoints and their error handling to `app`; return the first segments of their paths.

    `refused` counts the problems that are answered, by reason.
    """
    app.state.refused = refused
    app.state.rendered_schemas = {}
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(GatewayError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_exception_handler(Exception, _answer_error)  # the framework raises it again, and the server logs it
    app.router.routes.insert(0, Route("/openapi.json", _schema))
    return frozenset(route.path.split("/")[1] for route in _routes(app))


async def _schema(request: Request) -> Response:
    """Answer the schema, which the framework would render anew for each request."""
    rendered: dict[str, Response] = request.app.state.rendered_schemas
    root = request.scope.get("root_path", "")
    if root not in rendered:
        schema = await asyncio.to_thread(request.app.openapi)  # the first time it takes long
        rendered[root] = JSONResponse({**schema, "servers": [{"url": root}]} if root else schema)
    return rendered[root]


async def _answer_error(request: Request, raised: Exception) -> Response:
    """Answer any error of an operator endpoint as problem details, and OPTIONS by the methods there are."""
    error = _in_our_words(raised)
    if isinstance(error, MethodNotAllowed):
        error.headers["allow"] = _allow(request)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": error.headers["allow"]})
    request.app.state.refused[error.reason] += 1
    return JSONResponse(
        problem(error, instance=path_as_sent(request.scope)),
        status_code=error.status,
        headers={**error.headers, "cache-control": "no-store"},
        media_type="application/problem+json",
    )


def _allow(request: Request) -> str:
    """Return the methods of the endpoints at the request's path, for the `Allow` field."""
    methods = {"OPTIONS"}
    for route in _routes(request.app):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _routes(app: FastAPI) -> Iterator[Route]:
    """Return the routes of the operator endpoints; an included router is not among the application's own."""
    routes = itertools.chain(app.routes, *(router.routes for router in _ROUTERS))
    return (route for route in routes if isinstance(route, Route))


def _in_our_words(raised: Exception) -> GatewayError:
    if isinstance(raised, GatewayError):
        return raised
    if isinstance(raised, RequestValidationError):
        return InvalidValue(f"{'; '.join(_mistake(item) for item in raised.errors())}.")
    if isinstance(raised, HTTPException):
        if raised.status_code == 404:  # noqa: PLR2004 - no endpoint of that name
            return NoRoute("There is nothing here. Requests to be proxied begin with /api/.")
        if raised.status_code == 405:  # noqa: PLR2004 - an endpoint, but not for this method
            return MethodNotAllowed("The endpoint does not take this method.")
        return BadRequest(str(raised.detail))
    return InternalError(f"The gateway failed: {type(raised).__name__}.")


def _mistake(item: Mapping[str, Any]) -> str:
    """Name place and value; of a value that is a whole body, only what is wrong with it."""
    given = item.get("input")
    value = f", got {given!r}" if isinstance(given, str | int | float) else ""
    return f"{'.'.join(map(str, item['loc']))}: {item['msg']}{value}"


def _shown(view: Body) -> Response:
    """Return a view as it is, where the framework would validate and copy it: a large one would hold the loop."""
    return Response(view.model_dump_json(by_alias=True, exclude_unset=True), media_type="application/json")


def _check_breaker(console: AdminContext, name: str) -> None:
    known = console.overrides.names
    if name not in known:
        hint = nearest(name, known) or f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}."
        raise NoRoute(f"There is no circuit breaker '{name}'{hint}")


def _who(request: Request) -> str:
    """Name the operator by token and address; a local one by the address alone."""
    operator = _operator(request)
    host = request.client.host if request.client is not None else "unknown"
    return host if operator.is_local else f"token '{operator.name}', from {host}"


def _tier(console: AdminContext, name: str) -> str:
    tier = name.upper()
    if tier not in console.clients.tiers:
        names = list(console.clients.tiers)
        raise InvalidValue(
            f"There is no tier '{name}'; the tiers are {', '.join(names)}.", extra={"tier": name, "tiers": names}
        )
    return tier


def _until(request: GrantRequest, now: float) -> float:
    """Return when a grant ends, in seconds since the epoch; so is `now`."""
    if request.until is not None and request.duration_seconds is not None:
        raise InvalidValue(
            "body: a grant has either until or duration_seconds, got"
            f" until: '{request.until.isoformat()}' and duration_seconds: {request.duration_seconds:g}."
        )
    if request.duration_seconds is not None:
        return now + request.duration_seconds
    if request.until is None:
        raise InvalidValue("body: a grant needs until or duration_seconds, got neither.")
    until = request.until.timestamp()
    if until <= now:
        raise InvalidValue(
            f"body.until: must lie in the future, got '{request.until.isoformat()}'; it is {wall_time(now)} now."
        )
    return until


async def _regrant(console: AdminContext, until: float | None, before: Client, after: Client) -> GrantChanged:
    changed = await _move(console, before, after)
    return GrantChanged(**changed.model_dump(), until=None if until is None else wall_time(until))


def _heavy(clients: ClientRegistry, recorder: Recorder, key: str) -> HeavyClient:
    found = clients.by_bucket_key(key)
    limits, made = recorder.limited_by_client.estimate(key), recorder.requests_by_client.estimate(key)
    return HeavyClient(
        client_id=found.id,
        tier_source=found.source,
        tier=found.quota.name,
        limited=limits.count,
        limited_error_bound=limits.error,
        requests=made.count,
        requests_error_bound=made.error,
    )


async def _move(console: AdminContext, before: Client, after: Client) -> TierChanged:
    """Take the bucket over to the new tier and report it."""
    held = await _bucket(console, before)
    await console.limiter.move(before.key, before.quota, after.quota, console.clocks.monotonic_ns())
    holds = await _bucket(console, after)
    return TierChanged(
        client_id=after.id,
        previous=_tier_view(before.quota),
        current=_tier_view(after.quota),
        tokens_before=_tokens(before.quota, held.reset_ns),
        tokens_after=_tokens(after.quota, holds.reset_ns),
        persisted=True,
    )


async def _bucket(console: AdminContext, client: Client) -> Decision:
    """Return the client's bucket as it is."""
    (decision,) = await console.limiter.inspect([Charge(client.key, client.quota, 0)], console.clocks.monotonic_ns())
    return decision


def _tokens(quota: Quota, debt_ns: int) -> float:
    return round((quota.burst_ns - debt_ns) / quota.emission_ns, 3)


def _tier_view(quota: Quota) -> TierView:
    return TierView(name=quota.name, rate=quota.rate, capacity=quota.capacity)


def _resource_view(resource: ResourceState) -> ResourceView:
    return ResourceView(
        resource=resource.resource,
        upstream=resource.upstream,
        limit=resource.limit,
        in_use=resource.in_use,
        rejected=resource.refused,
        status=resource.status,
    )


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


def _move_view(record: TransitionRecord, now: Moment) -> TransitionRecordView:
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
