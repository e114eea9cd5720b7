"""The composition root: builds the gateway from its configuration. The only place where everything meets.

`api_gateway.main:app` is what `uvicorn` is given. It is built when first asked for, so importing does nothing.
"""

import asyncio
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from fastapi import FastAPI

from api_gateway import __version__, admin
from api_gateway.access_log import AccessLog
from api_gateway.admin import Console, Phase
from api_gateway.auth import AdminGuard
from api_gateway.balancer import Upstream
from api_gateway.breaker_modes import ModeBoard, ModeFile
from api_gateway.breaker_policy import BreakerPolicy, Mode
from api_gateway.breaker_records import Transition
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.client_records import ClientStore
from api_gateway.clients import ClientRegistry
from api_gateway.config import (
    FallbackSection,
    GatewayConfig,
    RetrySection,
    RouteSection,
    UpstreamSection,
    load_config,
)
from api_gateway.crew import Alone, Crew
from api_gateway.demo import DemoUpstreams
from api_gateway.diagnosis import ConfigError
from api_gateway.explanation import Explainer
from api_gateway.express import Express
from api_gateway.fallback import Fallback
from api_gateway.gradient import AdaptivePolicy, Gradient
from api_gateway.guarded import GuardedTransport, http2_transport
from api_gateway.health import HealthPolicy
from api_gateway.lag import LagSampler
from api_gateway.link import Lane
from api_gateway.metrics import Recorder
from api_gateway.middleware import ASGIApp, Identify, Limit, Match, Proxy, Record, Relief, Split, Switch, is_proxied
from api_gateway.models import Client, Exchange, Quota
from api_gateway.output import process_output
from api_gateway.overload import Bands, ConcurrencyLimit, LagLimit
from api_gateway.picks import Pick, least_requests, rendezvous_hash, round_robin, share_of_key
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.redis_clients import RedisClients
from api_gateway.redis_limiter import RedisLimiter
from api_gateway.report import Report, UpstreamReport, moves_of
from api_gateway.request import Receive, Scope, Send
from api_gateway.resolution import Name, Resolve, look_up
from api_gateway.retry import RetryPolicy
from api_gateway.rotation import Draw, Rotation, RotationPolicy
from api_gateway.router import Router
from api_gateway.routes import CostRule, Route, RouteTable
from api_gateway.service import Service, Timeouts
from api_gateway.settlement import Settlement
from api_gateway.shadow import Shadow
from api_gateway.sqlite_clients import SqliteClients
from api_gateway.store import StoreSession
from api_gateway.targets import Target
from api_gateway.tasks import end
from api_gateway.transport import UpstreamTransport, tls_context
from api_gateway.upkeep import Upkeep

logger = logging.getLogger(__name__)

STARTUP_FAILED = 3  # uvicorn's own exit code for it
STOCK_SERVER_HEADERS = frozenset({b"date", b"server"})


class StartupError(Exception):
    """The gateway cannot start; the message says what is in the way."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """The live parts of one gateway."""

    config: GatewayConfig
    limiter: MemoryLimiter | RedisLimiter
    address_quota: Quota | None
    clients: ClientRegistry
    services: dict[str, Service]
    recorder: Recorder
    candidates: dict[str, Quota]
    modes: ModeBoard
    upkeeps: dict[str, Upkeep]
    bands: Bands
    lag: LagLimit


class GatewayApp(FastAPI):
    """The operator's endpoints, with the data plane in front of them.

    Below `/api` nothing of the framework runs unless somebody has added middleware of their own: it then sees those
    requests too.
    """

    def __init__(self, switch: Switch, **options: Any) -> None:
        super().__init__(**options)
        self.add_middleware(Split, switch=switch)
        self._switch = switch

    @property
    def lane(self) -> Lane | None:
        """The straight way for plain requests; none if somebody's middleware wants to see them."""
        return self._switch.lane if self._has_no_other_middleware else None

    @property
    def _has_no_other_middleware(self) -> bool:
        return len(self.user_middleware) == 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if self._has_no_other_middleware and scope["type"] == "http" and is_proxied(scope["path"]):
            await self._switch.data_plane(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(
    config: GatewayConfig | None = None,
    *,
    server_headers: frozenset[bytes] = frozenset(),
    refused: Counter[str] | None = None,
    transports: Mapping[str, httpx.AsyncBaseTransport] | None = None,
    crew: Crew | None = None,
    resolve: Resolve = look_up,
) -> FastAPI:
    """Build the gateway as an ASGI application; everything live begins with its lifespan.

    `server_headers` (lower case) are those the ASGI server writes on every answer by itself: the upstream's are left
    out in their favour, so that none comes twice. `refused` is where the server counts what it refuses by itself.
    `transports` take the place of the gateway's own for the upstreams they name, such as `httpx.ASGITransport` in a
    test; cancellation is kept out of them. `crew` is who else serves; nobody by default.
    `resolve` finds the addresses of upstreams with `resolve`; the event loop's resolver by default.
    Raises ConfigError when `config` is None and the sources are wrong.
    """
    settings = config or load_config()
    rejections: Counter[str] = Counter() if refused is None else refused
    switch = Switch()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _live(settings, rejections, transports or {}, resolve) as gateway:
            app.state.gateway = gateway
            switch.data_plane, switch.lane, explainer = _data_plane(gateway, server_headers)
            app.state.console = _console(gateway, explainer, crew or Alone())
            app.state.console.phase = Phase.SERVING
            yield
            app.state.console.phase = Phase.DRAINING

    app = GatewayApp(
        switch,
        title="API Gateway",
        version=__version__,
        description="The operator's endpoints. Everything below `/api/` is proxied and not described here.",
        lifespan=lifespan,
        redirect_slashes=False,
        license_info={"name": "MIT", "identifier": "MIT"},
    )
    admin.install(app)
    return app


def __getattr__(name: str) -> Any:
    """Build `app` when a server asks for it. A wrong configuration ends the process with a line for each mistake."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        app = create_app(server_headers=STOCK_SERVER_HEADERS)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(STARTUP_FAILED) from None
    globals()["app"] = app
    return app


@asynccontextmanager
async def _live(
    config: GatewayConfig,
    rejections: Counter[str],
    transports: Mapping[str, httpx.AsyncBaseTransport],
    resolve: Resolve,
) -> AsyncIterator[Gateway]:
    """Bring the gateway to life in the order of dependence, and take it down in the opposite one."""
    async with AsyncExitStack() as stack:
        if config.is_demo:
            demo = DemoUpstreams()
            await demo.start()
            stack.push_async_callback(demo.stop)
            config = config.model_validate({**config.model_dump(), **demo.sections()})
        gateway = _build(config, rejections, transports, resolve)
        stack.push_async_callback(gateway.clients.close)
        try:
            await gateway.clients.load()
        except OSError as error:
            raise StartupError(f"state_dir: the client store cannot be opened: {error}") from error
        following = asyncio.create_task(gateway.clients.keep_up(), name="client store")
        stack.push_async_callback(_cancelled, following)
        if isinstance(gateway.limiter, RedisLimiter):
            stack.push_async_callback(gateway.limiter.close)
            await gateway.limiter.start()
        await gateway.modes.look()
        modes = asyncio.create_task(gateway.modes.keep_up(), name="modes of circuit breakers")
        stack.push_async_callback(_cancelled, modes)
        for service in gateway.services.values():
            stack.push_async_callback(service.transport.aclose)
        for upkeep in gateway.upkeeps.values():
            stack.push_async_callback(upkeep.close)
        keeping = asyncio.create_task(_keep_up(gateway), name="health checks and names")
        stack.push_async_callback(_cancelled, keeping)
        sampler = LagSampler(asyncio.get_running_loop(), gateway.lag.observe)
        sampler.start()
        stack.callback(sampler.stop)
        yield gateway


def _build(
    config: GatewayConfig,
    rejections: Counter[str],
    transports: Mapping[str, httpx.AsyncBaseTransport],
    resolve: Resolve,
) -> Gateway:
    now = time.monotonic()
    tiers = {name: Quota.per_second(name, tier.rate, tier.capacity) for name, tier in config.tiers.items()}
    limit = config.address_limit
    address_quota = Quota.per_second("address", limit.rate, limit.capacity) if limit.rate else None
    candidates = {
        name: Quota.per_second(f"{name} candidate", tier.candidate.rate, tier.candidate.capacity)
        for name, tier in config.tiers.items()
        if tier.candidate is not None
    }
    quotas = [*tiers.values(), *candidates.values(), *([address_quota] if address_quota else [])]
    limiter = _limiter(config, quotas)
    bands = Bands({name: tier.rate if tier.priority is None else tier.priority for name, tier in config.tiers.items()})
    names = {name: _names(section) for name, section in config.upstreams.items()}
    services = {
        name: _service(name, section, transports.get(name), now, names[name], bands)
        for name, section in config.upstreams.items()
    }
    return Gateway(
        config=config,
        limiter=limiter,
        address_quota=address_quota,
        clients=ClientRegistry(
            tiers,
            config.default_tier,
            {client_id: section.tier for client_id, section in config.clients.items()},
            client_store(config),
            limit=config.store.client_limit,
            deadline=config.store.deadline,
            on_change=partial(_follow, limiter),
        ),
        services=services,
        upkeeps={
            name: _upkeep(section, services[name], names[name], resolve, _checking(name, section, transports))
            for name, section in config.upstreams.items()
        },
        recorder=Recorder(
            (route.name for route in config.routes),
            config.upstreams,
            tiers,
            config.metrics.percentiles,
            now,
            rejections,
            process_output().dropped,
            process_output().errors,
        ),
        candidates=candidates,
        modes=ModeBoard(
            ModeFile(config.state_dir),
            {name: service.upstream.breaker for name, service in services.items()},
            clock=time.monotonic,
            wall_clock=time.time,
        ),
        bands=bands,
        lag=LagLimit(config.server.max_lag, bands, source=random.Random()),  # noqa: S311 - spreads load, guards nothing
    )


def _limiter(config: GatewayConfig, quotas: list[Quota]) -> MemoryLimiter | RedisLimiter:
    store = config.store
    if not store.is_shared:
        return MemoryLimiter(quotas, bucket_limit=store.bucket_limit)
    return RedisLimiter(
        _session(config),
        quotas,
        policy=store.on_failure,
        deadline=store.deadline,
        processes=max(store.processes, config.server.workers),
        bucket_limit=store.bucket_limit,
        prefix=store.prefix,
        clock=time.monotonic,
        clock_ns=time.monotonic_ns,
        source=random.Random(),  # noqa: S311 - names a process and spreads attempts, guards nothing
    )


def client_store(config: GatewayConfig) -> ClientStore:
    """Return the store of registered clients, which opens when it is loaded: the shared store, or a file.

    Raises StartupError.
    """
    store = config.store
    if not store.keeps_clients:
        return SqliteClients(config.state_dir)
    return RedisClients(_session(config), prefix=store.prefix)


def _session(config: GatewayConfig) -> StoreSession:
    try:
        return StoreSession(config.store.url, timeout=config.store.timeout)
    except OSError as error:
        raise StartupError(f"store.url: the files cannot be used: {error}") from error


def _follow(limiter: MemoryLimiter | RedisLimiter, before: Client, after: Client) -> None:
    """Take a bucket over to a tier that was changed elsewhere, or has ended. In a shared store it moves by itself."""
    limiter.change_quota(before.key, before.quota, after.quota, time.monotonic_ns())


def _service(
    name: str,
    section: UpstreamSection,
    transport: httpx.AsyncBaseTransport | None,
    now: float,
    names: list[Name],
    bands: Bands,
) -> Service:
    picks: dict[str, Pick] = {
        "round_robin": round_robin,
        "least_requests": least_requests(random.Random()),  # noqa: S311 - spreads load, guards nothing
        "hash": rendezvous_hash,
    }
    targets = [target for one in names for target in one.targets]
    _, _, header = section.hash_on.partition(":")
    upstream = Upstream(
        name,
        targets,
        _breaker(section, now),
        picks[section.balance],
        rotation=_rotation(section),
        limit=_concurrency(section, bands, now),
    )
    return Service(
        upstream,
        _transport(name, section) if transport is None else GuardedTransport(transport),
        Timeouts(**section.timeouts.model_dump()),
        retry=_retry_policy(section.retry),
        hash_header=header.lower().encode() or None,
    )


def _retry_policy(section: RetrySection) -> RetryPolicy:
    return RetryPolicy(
        attempts=section.attempts,
        budget=section.budget,
        floor=section.floor,
        base=section.backoff.base,
        cap=section.backoff.cap,
        max_retry_after=section.max_retry_after,
        statuses=frozenset(section.statuses),
        max_body_bytes=section.max_body_bytes,
    )


def _names(section: UpstreamSection) -> list[Name]:
    return [Name(target.url, target.weight) for target in section.targets]


def _checking(
    name: str, section: UpstreamSection, transports: Mapping[str, httpx.AsyncBaseTransport]
) -> UpstreamTransport | GuardedTransport | None:
    """Return a transport for health checks alone, or None if there are none or somebody has brought their own."""
    return None if section.health_check is None or name in transports else _transport(name, section)


def _upkeep(
    section: UpstreamSection,
    service: Service,
    names: list[Name],
    resolve: Resolve,
    transport: UpstreamTransport | GuardedTransport | None,
) -> Upkeep:
    policy, check = None, section.health_check
    if check is not None:
        ranges = (spelt.split("-") for spelt in check.statuses)
        statuses = tuple(range(int(low), int(high) + 1) for low, high in ranges)
        policy = HealthPolicy(**check.model_dump(exclude={"statuses"}), statuses=statuses)
    return Upkeep(
        service,
        policy=policy,
        transport=transport,
        names=names if section.resolve is not None else (),
        interval=section.resolve or 0.0,
        resolve=resolve,
        clock=time.monotonic,
        source=random.Random(),  # noqa: S311 - spreads checks and questions, guards nothing
    )


def _breaker(section: UpstreamSection, now: float, **changes: float) -> CircuitBreaker:
    settings = section.circuit_breaker.model_dump(exclude={"per_target", "max_ejected"})
    return CircuitBreaker(BreakerPolicy(**settings | changes), now, random.Random())  # noqa: S311 - spreads probes


def _rotation(section: UpstreamSection) -> Rotation:
    return Rotation(
        RotationPolicy(section.circuit_breaker.max_ejected, section.slow_start),
        draw=share_of_key if section.balance == "hash" else _by_chance(random.Random()),  # noqa: S311 - as above
        # Traffic comes back to a target by its slow start, and by no ramp beside it.
        make_breaker=partial(_breaker, section, ramp=0.0) if section.circuit_breaker.per_target else None,
    )


def _by_chance(source: random.Random) -> Draw:
    return lambda _target, _key: source.random()


def _concurrency(section: UpstreamSection, bands: Bands, now: float) -> ConcurrencyLimit | None:
    concurrency, source = section.concurrency, random.Random()  # noqa: S311 - spreads load, guards nothing
    if concurrency is None:
        return None
    if concurrency.adaptive is not None:
        policy = AdaptivePolicy(**concurrency.adaptive.model_dump())
        return ConcurrencyLimit(Gradient(policy, now), bands, source=source)
    assert concurrency.limit is not None  # noqa: S101 - one of them is set
    return ConcurrencyLimit(concurrency.limit, bands, source=source)


def _transport(name: str, section: UpstreamSection) -> UpstreamTransport | GuardedTransport:
    tls = None
    if any(target.url.startswith("https:") for target in section.targets):
        try:
            tls = tls_context(section.tls.ca_file, section.tls.certificate, section.tls.key)
        except OSError as error:
            raise StartupError(f"upstreams.{name}.tls: the files cannot be used: {error}") from error
    pool = section.pool
    if not section.http2:
        return UpstreamTransport(max_connections=pool.max_connections, idle_timeout=pool.idle_timeout, tls=tls)
    try:
        return http2_transport(pool.max_connections, pool.idle_timeout, tls)
    except ImportError as error:
        raise StartupError(f"upstreams.{name}.http2: needs the package h2: pip install 'httpx[http2]'") from error


def _route(section: RouteSection) -> Route:
    return Route(
        name=section.name,
        path=section.path,
        upstream=section.upstream,
        strip_prefix=(section.strip_prefix or "").rstrip("/"),
        methods=frozenset(section.methods) if section.methods else None,
        host=section.host,
        cost=section.cost,
        costs=tuple(
            CostRule(frozenset(rule.methods) if rule.methods else None, rule.path, rule.cost, rule.candidate_cost)
            for rule in section.costs
        ),
        candidate_cost=section.candidate_cost,
        timeout=section.timeout,
        fallback=None if section.fallback is None else _fallback(section.fallback),
    )


def _fallback(section: FallbackSection) -> Fallback:
    if section.upstream is not None:
        return Fallback(section.upstream)
    return Fallback(
        None,
        section.status or 200,
        tuple((name.encode(), value.encode()) for name, value in section.headers.items()),
        section.body.encode(),
    )


def _router(gateway: Gateway, routes: list[Route], settlement: Settlement, server_headers: frozenset[bytes]) -> Router:
    config, recorder = gateway.config, gateway.recorder
    return Router(
        RouteTable(routes),
        gateway.services,
        clock=time.monotonic,
        max_body_bytes=config.server.max_body_bytes,
        protected=frozenset({config.identity.header.lower().encode()}),
        omit=server_headers,
        observe_try=recorder.observe_try,
        on_transition=_log_transition,
        on_target_move=_log_target_move,
        on_cost=settlement.on_cost,
        on_retry=recorder.observe_retry,
        on_denial=recorder.observe_denial,
        on_fallback=settlement.on_fallback,
        bands=gateway.bands,
        lag=gateway.lag,
    )


def _data_plane(gateway: Gateway, server_headers: frozenset[bytes]) -> tuple[ASGIApp, Express, Explainer]:
    """Build the steps of a proxied request, the straight way past them, and what explains both.

    Read from the inside out: what stands last sees a request first.
    """
    config, recorder = gateway.config, gateway.recorder
    routes = [_route(section) for section in config.routes]
    settlement = Settlement(limiter=gateway.limiter, clock_ns=time.monotonic_ns, recorder=recorder)
    router = _router(gateway, routes, settlement, server_headers)
    limit = Limit(
        Proxy(router=router),
        limiter=gateway.limiter,
        clock_ns=time.monotonic_ns,
        address_quota=gateway.address_quota,
        exempt=config.address_limit.exempt,
        shadow=_shadow(gateway, routes),
    )
    relief = Relief(limit, lag=gateway.lag, bands=gateway.bands)
    identify = Identify(
        Match(relief, router=router),
        clients=gateway.clients,
        header=config.identity.header,
        trusted_proxies=config.server.trusted_proxies,
    )
    record = Record(
        identify,
        clock=time.monotonic,
        recorder=recorder,
        observers=[
            recorder.observe,
            *([AccessLog(time.time, process_output().out.write).write] if config.log.access else []),
        ],
        on_failure=settlement.on_failure,
    )
    express = Express(
        record=record,
        identify=identify,
        limit=limit,
        router=router,
        lag=gateway.lag,
        clock=time.monotonic,
        clock_ns=time.monotonic_ns,
    )
    explainer = Explainer(
        identify=identify,
        router=router,
        limit=limit,
        limiter=gateway.limiter,
        lag=gateway.lag,
        header=config.identity.header,
        clock=time.monotonic,
        clock_ns=time.monotonic_ns,
    )
    return record, express, explainer


def _access_logs(config: GatewayConfig) -> list[Callable[[Exchange], None]]:
    return [AccessLog(time.time, process_output().out.write).write] if config.log.access else []


def _shadow(gateway: Gateway, routes: Iterable[Route]) -> Shadow | None:
    shadow = Shadow(
        limiter=gateway.limiter,
        clock_ns=time.monotonic_ns,
        recorder=gateway.recorder,
        candidates=gateway.candidates,
        routes=routes,
    )
    return None if shadow.is_empty else shadow


def _console(gateway: Gateway, explainer: Explainer, crew: Crew) -> Console:
    token = gateway.config.admin.token
    crew.enlist(partial(_look, gateway))
    return Console(
        version=__version__,
        guard=AdminGuard(token.get_secret_value() if token else None),
        limiter=gateway.limiter,
        clients=gateway.clients,
        crew=crew,
        clock=time.monotonic,
        clock_ns=time.monotonic_ns,
        explainer=explainer,
        modes=gateway.modes,
    )


def _look(gateway: Gateway) -> Report:
    """Return how this process stands."""
    now = time.monotonic()
    return Report(
        worker="",
        recorder=gateway.recorder,
        upstreams={
            name: UpstreamReport.of(service.upstream, now, gateway.upkeeps[name].names)
            for name, service in gateway.services.items()
        },
        buckets=len(gateway.limiter),
        bucket_limit=gateway.limiter.bucket_limit,
        overflowed=gateway.limiter.overflowed,
        limiter=gateway.limiter.state(),
        client_trouble=gateway.clients.trouble,
        histories={name: moves_of(service.upstream) for name, service in gateway.services.items()},
        lag=gateway.lag.lag,
        tasks=len(asyncio.all_tasks()),
    )


async def _keep_up(gateway: Gateway) -> None:
    """Check targets and follow names, until cancelled."""
    async with asyncio.TaskGroup() as group:
        for upkeep in gateway.upkeeps.values():
            group.create_task(upkeep.run())


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task of ours and wait for its end; what it had failed with before is raised."""
    await end(task)
    with suppress(asyncio.CancelledError):
        await task


def _log_transition(upstream: str, transition: Transition) -> None:
    level = logging.WARNING if transition.target == "OPEN" else logging.INFO
    logger.log(
        level,
        "circuit breaker %s%s: %s -> %s: %s",
        upstream,
        " (only observed)" if transition.mode is Mode.OBSERVE else "",
        transition.source,
        transition.target,
        transition.cause,
    )


def _log_target_move(upstream: str, target: Target, move: Transition) -> None:
    if move.target == "OPEN":
        words = "is" if move.source == "CLOSED" else "stays"
        logger.warning("upstream %s: target %s %s ejected: %s", upstream, target.url, words, move.cause)
    else:
        logger.info("upstream %s: target %s returns: %s", upstream, target.url, move.cause)
