"""Builds the live parts of a gateway from its configuration, starts and stops them, and takes them over on reload.

A `Gateway` is one configuration and the parts that go by it. It is never changed: a reload builds the next one, which
adopts by name what lives (buckets, breakers, targets, pools, counts), makes what is new, and retires what is no more.
`plan` does all that may fail and changes nothing; `commit` does not wait and cannot be refused.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace

import httpx

from api_gateway.admin.breaker_overrides import BreakerOverrides, OverrideFile
from api_gateway.assembly.routes import route_of
from api_gateway.assembly.stores import Limiter, Quotas, limiter_of, registry_of, requote, state_folder
from api_gateway.assembly.upstreams import (
    LiveUpstream,
    UpstreamPlan,
    build_upstream,
    change_upstream,
    plan_upstream,
    rerank,
)
from api_gateway.clients.registry import ClientRegistry
from api_gateway.config import GatewayConfig
from api_gateway.demo import DemoUpstreams
from api_gateway.errors import StartupError
from api_gateway.eventloop.lag_sampler import LagSampler
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.metrics import Recorder
from api_gateway.models import Quota
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.priorities import PriorityClasses
from api_gateway.system.clocks import Clocks
from api_gateway.system.descriptor_limit import raise_descriptor_limit
from api_gateway.system.heap import trimmed
from api_gateway.system.output import process_output
from api_gateway.system.state_folder import own_folder
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.shielded import ShieldedTransport
from api_gateway.upstreams.dns import Resolve
from api_gateway.upstreams.upstream_client import UpstreamClient

logger = logging.getLogger(__name__)

MAX_RETIRED = 1_000  # upstreams remembered that are not configured any more
_CLOSE_INTERVAL = 1.0  # seconds between two looks at transports that wait for their last response


@dataclass(frozen=True, slots=True)
class Gateway:
    """One configuration and the live parts that go by it."""

    config: GatewayConfig
    quotas: Quotas
    routes: tuple[Route, ...]
    table: RouteTable
    priorities: PriorityClasses
    upstreams: Mapping[str, LiveUpstream]
    limiter: Limiter
    clients: ClientRegistry
    recorder: Recorder
    overrides: BreakerOverrides
    lag: EventLoopShedder
    clocks: Clocks

    @property
    def address_quota(self) -> Quota | None:
        """The quota of addresses of unregistered clients, None if they are not limited."""
        return self.quotas.address

    @property
    def candidates(self) -> Mapping[str, Quota]:
        """Quotas that are tried beside those of tiers."""
        return self.quotas.candidates

    @property
    def upstream_clients(self) -> dict[str, UpstreamClient]:
        """How to send to each upstream."""
        return {name: live.upstream_client for name, live in self.upstreams.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration that nothing stands in the way of. `upstreams` holds None for those that stay as they are."""

    config: GatewayConfig
    quotas: Quotas
    routes: tuple[Route, ...]
    table: RouteTable
    priorities: PriorityClasses
    upstreams: Mapping[str, UpstreamPlan | None]


class Assembly:
    """Holds the gateway that is in force. Not to be used by several tasks at once."""

    gateway: Gateway

    def __init__(
        self,
        rejections: Counter[str],
        transports: Mapping[str, httpx.AsyncBaseTransport],
        resolve: Resolve,
        clocks: Clocks,
    ) -> None:
        self._rejections = rejections
        self._overrides = transports
        self._resolve = resolve
        self._clocks = clocks
        self._demo: DemoUpstreams | None = None
        self._retired: dict[str, LiveUpstream] = {}  # by name, the one retired last at the end
        self._closing: set[ShieldedTransport] = set()
        self._monitor_tasks: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"<Assembly [{len(self._monitor_tasks)} upstreams, {len(self._retired)} retired]>"

    @asynccontextmanager
    async def live(self, config: GatewayConfig) -> AsyncIterator[Gateway]:
        """Bring the gateway to life in the order of dependence, and take it down in the opposite one."""
        async with AsyncExitStack() as stack:
            raise_descriptor_limit()
            stack.push_async_callback(self._stop_demo)
            stack.enter_context(state_folder(config))
            gateway = self.gateway = self._build(await self.plan(config))
            stack.push_async_callback(gateway.clients.close)
            try:
                await gateway.clients.load()
            except OSError as error:
                raise StartupError(f"state_dir: the client store cannot be opened: {error}") from error
            following = asyncio.create_task(gateway.clients.follow(), name="client store")
            stack.push_async_callback(_cancelled, following)
            if isinstance(gateway.limiter, RedisLimiter):
                stack.push_async_callback(gateway.limiter.close)
                await gateway.limiter.start()
            await gateway.overrides.refresh()
            modes = asyncio.create_task(gateway.overrides.follow_file(), name="modes of circuit breakers")
            stack.push_async_callback(_cancelled, modes)
            stack.push_async_callback(self._close_upstreams)
            self._start_monitor(gateway.upstreams)
            closing = asyncio.create_task(self._close_retired_periodically(), name="retired transports")
            stack.push_async_callback(_cancelled, closing)
            stack.enter_context(trimmed())
            sampler = LagSampler(asyncio.get_running_loop(), gateway.lag.observe)
            sampler.start()
            stack.callback(sampler.stop)
            yield gateway

    async def plan(self, config: GatewayConfig) -> Plan:
        """Do all that may fail on the way to a configuration. Nothing is changed by it. Raises StartupError."""
        if config.is_demo:
            config = await self._with_demo(config)
        return await asyncio.to_thread(self._plan, config)

    def _plan(self, config: GatewayConfig) -> Plan:
        before = getattr(self, "gateway", None)
        live = {**self._retired, **(before.upstreams if before is not None else {})}
        routes = tuple(route_of(section) for section in config.routes)
        upstreams: dict[str, UpstreamPlan | None] = {}
        for name, section in config.upstreams.items():
            known = live.get(name)
            plan = plan_upstream(name, section, known, self._overrides.get(name))
            is_same = known is not None and not known.is_retired and section == known.section and plan.tls is known.tls
            upstreams[name] = None if is_same else plan
        ranks = {name: tier.rate if tier.priority is None else tier.priority for name, tier in config.tiers.items()}
        return Plan(config, Quotas.of(config), routes, RouteTable(routes), PriorityClasses(ranks), upstreams)

    def commit(self, plan: Plan) -> Gateway:
        """Put a planned configuration into force. Requests that run go on under the one they began with."""
        before, config = self.gateway, plan.config
        now_ns = self._clocks.monotonic_ns()
        requote(before.limiter, before.clients, (before.config, config), (before.quotas, plan.quotas), now_ns)
        upstreams = {name: self._adopt_upstream(name, one, plan.priorities) for name, one in plan.upstreams.items()}
        for name, live in before.upstreams.items():
            if name not in upstreams:
                self._retire(name, live)
        before.recorder.extend(
            [route.name for route in plan.routes], upstreams, plan.quotas.tiers, config.metrics.percentiles
        )
        before.lag.change(config.server.max_event_loop_lag, plan.priorities)
        before.overrides.follow({name: live.upstream_client.upstream.breaker for name, live in upstreams.items()})
        self._start_monitor(upstreams)
        self.gateway = replace(
            before,
            config=config,
            quotas=plan.quotas,
            routes=plan.routes,
            table=plan.table,
            priorities=plan.priorities,
            upstreams=upstreams,
        )
        return self.gateway

    def _build(self, plan: Plan) -> Gateway:
        config, quotas, clocks = plan.config, plan.quotas, self._clocks
        limiter = limiter_of(config, quotas.all, clocks)
        upstreams = {
            name: build_upstream(one, self._resolve, clocks.monotonic, plan.priorities)
            for name, one in plan.upstreams.items()
            if one is not None
        }
        return Gateway(
            config=config,
            quotas=quotas,
            routes=plan.routes,
            table=plan.table,
            priorities=plan.priorities,
            upstreams=upstreams,
            limiter=limiter,
            clients=registry_of(config, quotas, limiter, clocks),
            recorder=Recorder(
                (route.name for route in plan.routes),
                upstreams,
                quotas.tiers,
                config.metrics.percentiles,
                clocks.monotonic(),
                self._rejections,
                *process_output().losses,
            ),
            overrides=BreakerOverrides(
                OverrideFile(own_folder(config.state_dir)),
                {name: live.upstream_client.upstream.breaker for name, live in upstreams.items()},
                clock=clocks.monotonic,
                wall_clock=clocks.wall,
            ),
            lag=EventLoopShedder(config.server.max_event_loop_lag, plan.priorities, source=random.Random()),  # noqa: S311 - spreads load, guards nothing
            clocks=clocks,
        )

    # Upstreams

    def _adopt_upstream(self, name: str, plan: UpstreamPlan | None, bands: PriorityClasses) -> LiveUpstream:
        """Return the upstream of that name under its plan: one that lives, one that is back, or a new one."""
        clock = self._clocks.monotonic
        live = self.gateway.upstreams.get(name) or self._retired.pop(name, None)
        if plan is None:
            assert live is not None  # noqa: S101 - it stays as it is
            rerank(live, bands, clock())
            return live
        if live is None:
            return build_upstream(plan, self._resolve, clock, bands)
        before = live.transports
        changed = change_upstream(plan, live, self._resolve, clock, bands)
        self._retire_transports(one for one in before if one not in changed.transports)
        return changed

    def _retire(self, name: str, live: LiveUpstream) -> None:
        """End the checks of an upstream and keep no idle connection to it; it is remembered, for it may come back."""
        self._monitor_tasks.pop(name).cancel()
        self._retire_transports(live.transports)
        self._retired[name] = replace(live, is_retired=True)
        while len(self._retired) > MAX_RETIRED:
            del self._retired[next(iter(self._retired))]

    def _retire_transports(self, transports: Iterable[httpx.AsyncBaseTransport]) -> None:
        for transport in transports:
            if isinstance(transport, UpstreamTransport):
                transport.retire_all()
            elif isinstance(transport, ShieldedTransport) and not transport.is_of(self._overrides.values()):
                self._closing.add(transport)

    async def _close_retired_periodically(self) -> None:
        """Close retired transports once nothing runs on them, until cancelled."""
        while True:
            await asyncio.sleep(_CLOSE_INTERVAL)
            for transport in [one for one in self._closing if one.is_idle]:
                self._closing.discard(transport)
                await transport.aclose()

    def _start_monitor(self, upstreams: Mapping[str, LiveUpstream]) -> None:
        for name, live in upstreams.items():
            if name not in self._monitor_tasks:
                self._monitor_tasks[name] = asyncio.create_task(live.monitor.run(), name=f"upkeep of {name}")

    async def _close_upstreams(self) -> None:
        await cancel_and_wait(*self._monitor_tasks.values())
        live = [*self.gateway.upstreams.values(), *self._retired.values()]
        for transport in {*self._closing, *(transport for one in live for transport in one.transports)}:
            await transport.aclose()

    # The demo

    async def _with_demo(self, config: GatewayConfig) -> GatewayConfig:
        """Return the configuration with the demo services as its upstreams; they are started when first needed."""
        if self._demo is None:
            self._demo = DemoUpstreams()
            await self._demo.start()
        return config.model_validate({**config.model_dump(), **self._demo.sections()})

    async def _stop_demo(self) -> None:
        if self._demo is not None:
            await self._demo.stop()


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task of ours and wait for its end; what it had failed with before is raised."""
    await cancel_and_wait(task)
    with suppress(asyncio.CancelledError):
        await task
