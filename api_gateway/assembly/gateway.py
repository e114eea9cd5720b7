"""Builds the runtime objects of a gateway from its configuration, starts and stops them, and changes them on reload.

A `Gateway` is one configuration and its runtime objects. It is immutable: a reload builds the next one, which keeps
objects by name (buckets, breakers, targets, pools, counters), creates new ones, and retires those no longer
configured. `plan` does everything that can fail and changes nothing; `commit` neither waits nor fails.

Long because the parts are started, changed and stopped in one order.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import httpx

from api_gateway.admin.breaker_overrides import BreakerOverrides, OverrideFile
from api_gateway.assembly.extensions import LoadedExtension, load_extensions
from api_gateway.assembly.history import history_limits
from api_gateway.assembly.issuers import Issuers
from api_gateway.assembly.pseudonym import pseudonym_of
from api_gateway.assembly.quotas import QuotaKeeping
from api_gateway.assembly.route_actions import mirrored_routes
from api_gateway.assembly.routes import cors_of, route_of
from api_gateway.assembly.stores import (
    REPLACED_WITHIN,
    Quotas,
    convert_buckets,
    hold_state_folder,
    limiter_of,
    move_buckets,
    registry_of,
    shared_store,
)
from api_gateway.assembly.tracing import Tracing, TracingPlan, tracing_plan
from api_gateway.assembly.upstreams import (
    LiveUpstream,
    TlsByFiles,
    UpstreamPlan,
    build_upstream,
    change_upstream,
    plan_upstream,
    rerank,
)
from api_gateway.assembly.usage import start_usage, usage_of
from api_gateway.clients.registry import ClientRegistry
from api_gateway.config import GatewayConfig
from api_gateway.demo import DemoUpstreams
from api_gateway.downstream.request_input import PARSED_HEADS
from api_gateway.downstream.states import ILLEGAL_EVENTS
from api_gateway.downstream.tls_terminator import TLS_COUNTERS
from api_gateway.errors import StartupError
from api_gateway.eventloop.lag_sampler import LagSampler
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.limits.concurrency import LocalSlots
from api_gateway.metrics import Recorder
from api_gateway.models import Client, Quota
from api_gateway.observability.decision_numbers import DecisionNumbers
from api_gateway.observability.request_history import RequestHistory
from api_gateway.printable_text import counted
from api_gateway.proxy.cors import CorsPolicy
from api_gateway.proxy.jwt_source import JwtSource
from api_gateway.proxy.mirroring import MIRROR_RESULTS, Mirrors
from api_gateway.proxy.open_exchanges import OpenExchanges
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.rate_limiter import MemoryLimiter, RateLimiter
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.priorities import PriorityClasses
from api_gateway.system.clocks import Clocks
from api_gateway.system.descriptor_limit import raise_descriptor_limit
from api_gateway.system.heap import trimmed
from api_gateway.system.output import process_output
from api_gateway.system.state_folder import own_folder
from api_gateway.transport.http1_transport import AnyTransport, UpstreamTransport
from api_gateway.transport.shielded import ShieldedTransport
from api_gateway.upstreams.dns import Resolve
from api_gateway.upstreams.upstream_client import UpstreamClient
from api_gateway.usage.ledger import UsageLedger

if TYPE_CHECKING:
    from api_gateway.assembly.stores import Limiter

logger = logging.getLogger(__name__)

MAX_RETIRED = 1_000  # upstreams kept that are no longer configured
_CLOSE_INTERVAL = 1.0  # seconds between checks of retired transports for their last response


@dataclass(frozen=True, slots=True)
class Gateway:
    """One configuration and its runtime objects."""

    config: GatewayConfig
    quotas: Quotas
    routes: tuple[Route, ...]
    table: RouteTable
    priorities: PriorityClasses
    upstreams: Mapping[str, LiveUpstream]
    limiter: "Limiter"  # of buckets
    charging: RateLimiter  # of requests: the same, or with counters of calendar quotas
    keeping: QuotaKeeping
    slots: LocalSlots  # of concurrency limits, that requests of this process hold
    clients: ClientRegistry
    recorder: Recorder
    overrides: BreakerOverrides
    event_loop_shedder: EventLoopShedder
    clocks: Clocks
    pseudonym: str  # of the deployment in `Via`, unless `server.via` is set
    numbers: DecisionNumbers
    usage: UsageLedger | None  # None if it is not counted
    history: RequestHistory
    tokens: JwtSource | None  # None unless tokens are a source of identities
    cors: CorsPolicy | None  # of routes without one of their own
    open_exchanges: OpenExchanges
    mirrors: Mirrors
    tracing: Tracing
    extensions: tuple[LoadedExtension, ...]

    @property
    def address_quota(self) -> Quota | None:
        """The quota of the address limit, None if it is disabled."""
        return self.quotas.address

    @property
    def route_names(self) -> list[str]:
        """The names of all routes."""
        return [route.name for route in self.routes]

    @property
    def accepts_keys(self) -> bool:
        """True if API keys are a source of identities."""
        return "api_key" in self.config.identity.sources

    @property
    def candidates(self) -> Mapping[str, Quota]:
        """Candidate quotas by the name of the quota in force."""
        return self.quotas.all_candidates

    @property
    def upstream_clients(self) -> dict[str, UpstreamClient]:
        """The client of each upstream by name."""
        return {name: live.upstream_client for name, live in self.upstreams.items()}


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration that can be applied. `upstreams` has None for those that do not change."""

    config: GatewayConfig
    quotas: Quotas
    routes: tuple[Route, ...]
    table: RouteTable
    priorities: PriorityClasses
    upstreams: Mapping[str, UpstreamPlan | None]
    tokens: JwtSource | None
    cors: CorsPolicy | None
    tracing: TracingPlan | None
    extensions: tuple[LoadedExtension, ...]


class Assembly:
    """Holds the gateway in force. Not to be used by several tasks at once.

    An upstream is live (in `gateway.upstreams`, with a monitor task) or retired (in `_retired`, without one); a reload
    can make a retired one live again. A retired transport is in `_closing` until its last response has ended.
    """

    gateway: Gateway

    def __init__(
        self,
        refusals: Counter[str],
        transports: Mapping[str, httpx.AsyncBaseTransport],
        resolve: Resolve,
        clocks: Clocks,
    ) -> None:
        self._refusals = refusals
        self._overrides = transports
        self._resolve = resolve
        self._clocks = clocks
        self._source = random.Random()  # noqa: S311 - spreads load and probes, guards nothing
        self._demo: DemoUpstreams | None = None
        self._retired: dict[str, LiveUpstream] = {}  # by name, in the order of retirement
        self._closing: set[ShieldedTransport] = set()
        self._monitor_tasks: dict[str, asyncio.Task[None]] = {}
        self._issuers = Issuers(clocks, self._on_withdrawal, self._on_key_fetch)

    def __repr__(self) -> str:
        return f"<Assembly [{len(self._monitor_tasks)} upstreams, {len(self._retired)} retired]>"

    @property
    def has_credentials(self) -> bool:
        """True if a request may have a valid credential."""
        gateway = self.gateway
        has_others = gateway.tokens is not None or "certificate" in gateway.config.identity.sources
        return has_others or not gateway.clients.keys.is_empty

    @asynccontextmanager
    async def live(self, config: GatewayConfig, replaced_within: float = REPLACED_WITHIN) -> AsyncIterator[Gateway]:
        """Start the gateway's parts in the order of their dependencies, and stop them in reverse order.

        For `replaced_within` see `hold_state_folder`.
        """
        async with AsyncExitStack() as stack:
            raise_descriptor_limit()
            stack.push_async_callback(self._stop_demo)
            await hold_state_folder(config, stack, replaced_within)
            if config.store.is_shared:
                await import_module("api_gateway.assembly.store_schema").hold_store_schema(config, stack)
            gateway = self.gateway = self._build(await self.plan(config), await pseudonym_of(config))
            stack.push_async_callback(gateway.clients.close)
            stack.push_async_callback(gateway.tracing.close)
            stack.push_async_callback(self._issuers.close)
            self._issuers.follow(gateway.tokens)
            try:
                await gateway.clients.load()
            except OSError as error:
                raise StartupError(f"state_dir: the client store cannot be opened: {error}") from error
            claimable = gateway.clients.claimable_count
            if claimable and "header" in config.identity.sources:
                clients = counted(claimable, "registered client")
                logger.info("%s can be claimed by %s alone, without a credential", clients, config.identity.header)
            await start_usage(gateway.usage, stack)
            following = asyncio.create_task(gateway.clients.follow(), name="client store")
            stack.push_async_callback(_cancelled, following)
            if not isinstance(gateway.limiter, MemoryLimiter):
                stack.push_async_callback(gateway.limiter.close)
                await gateway.limiter.start()
            stack.push_async_callback(gateway.slots.close)
            await gateway.slots.start()
            stack.push_async_callback(gateway.keeping.close)
            await gateway.keeping.open(config)
            gateway.keeping.follow_webhook(config.webhook)
            await gateway.overrides.refresh()
            modes = asyncio.create_task(gateway.overrides.follow_file(), name="modes of circuit breakers")
            stack.push_async_callback(_cancelled, modes)
            stack.push_async_callback(self._close_upstreams)
            stack.push_async_callback(gateway.mirrors.close)
            self._start_monitor(gateway.upstreams)
            closing = asyncio.create_task(self._close_retired_periodically(), name="retired transports")
            stack.push_async_callback(_cancelled, closing)
            stack.enter_context(trimmed())
            sampler = LagSampler(asyncio.get_running_loop(), gateway.event_loop_shedder.observe)
            sampler.start()
            stack.callback(sampler.stop)
            yield gateway

    async def plan(self, config: GatewayConfig) -> Plan:
        """Do everything that can fail when applying a configuration; change nothing. Raises StartupError."""
        if config.is_demo:
            config = await self._with_demo(config)
        if getattr(self, "gateway", None) is not None:
            await self.gateway.keeping.open(config)
        return await asyncio.to_thread(self._plan, config)

    def _plan(self, config: GatewayConfig) -> Plan:
        before = getattr(self, "gateway", None)
        live = {**self._retired, **(before.upstreams if before is not None else {})}
        cors = cors_of(config.cors)
        routes = tuple(route_of(section, cors) for section in config.routes)
        upstreams: dict[str, UpstreamPlan | None] = {}
        created: TlsByFiles = {}
        for name, section in config.upstreams.items():
            known = live.get(name)
            plan = plan_upstream(name, section, known, self._overrides.get(name), created)
            is_same = known is not None and not known.is_retired and section == known.section and plan.tls is known.tls
            upstreams[name] = None if is_same else plan
        ranks = {name: tier.rate if tier.priority is None else tier.priority for name, tier in config.tiers.items()}
        tokens = self._issuers.plan(config, None if before is None else before.tokens)
        return Plan(
            config,
            Quotas.of(config),
            routes,
            RouteTable(routes),
            PriorityClasses(ranks),
            upstreams,
            tokens,
            cors,
            tracing_plan(config),
            load_extensions(config),
        )

    def commit(self, plan: Plan) -> Gateway:
        """Put a planned configuration into force. Requests in progress end under the one that they began with."""
        before, config = self.gateway, plan.config
        now_ns = self._clocks.monotonic_ns()
        convert_buckets(before.limiter, before.clients, (before.config, config), (before.quotas, plan.quotas), now_ns)
        upstreams = {name: self._adopt_upstream(name, one, plan.priorities) for name, one in plan.upstreams.items()}
        for name, live in before.upstreams.items():
            if name not in upstreams:
                self._retire(name, live)
        before.recorder.extend(
            [route.name for route in plan.routes], upstreams, plan.quotas.tiers, config.metrics.percentiles
        )
        before.slots.follow(plan.quotas.slot_names)
        before.recorder.expect_mirrored(mirrored_routes(plan.routes), MIRROR_RESULTS)
        before.event_loop_shedder.change(config.server.max_event_loop_lag, plan.priorities)
        before.history.change(history_limits(config))
        before.overrides.follow({name: live.upstream_client.upstream.breaker for name, live in upstreams.items()})
        self._start_monitor(upstreams)
        self._issuers.follow(plan.tokens)
        before.tracing.follow(plan.tracing, config)
        self.gateway = replace(
            before,
            config=config,
            quotas=plan.quotas,
            routes=plan.routes,
            table=plan.table,
            priorities=plan.priorities,
            upstreams=upstreams,
            tokens=plan.tokens,
            charging=before.keeping.limiter(before.limiter, plan.quotas.limits, config),
            cors=plan.cors,
            extensions=plan.extensions,
        )
        before.keeping.follow_webhook(config.webhook)
        return self.gateway

    def _slots(self, config: GatewayConfig, limiter: "Limiter", recorder: Recorder) -> LocalSlots:
        if isinstance(limiter, MemoryLimiter):
            return LocalSlots(recorder.in_flight_by_limit)
        name = f"{self._source.getrandbits(64):016x}"
        slots: LocalSlots = shared_store().shared_slots(config, limiter, recorder.in_flight_by_limit, name)
        return slots

    def _on_key_fetch(self, issuer: str, succeeded: bool) -> None:  # noqa: FBT001 - a callback
        self.gateway.recorder.observe_key_fetch(issuer, succeeded=succeeded)

    def _on_withdrawal(self) -> None:
        """Have clients resolved anew, because a token that proved one may no longer be valid."""
        self.gateway.clients.bump_version()

    def _on_client_change(self, before: Client, after: Client) -> None:
        """Convert the buckets of a client whose tier has changed, under the limits in force."""
        gateway = self.gateway
        move_buckets(gateway.limiter, gateway.quotas.limits, before, after, self._clocks.monotonic_ns())

    def _build(self, plan: Plan, pseudonym: str) -> Gateway:
        config, quotas, clocks = plan.config, plan.quotas, self._clocks
        limiter = limiter_of(config, quotas.all, clocks)
        upstreams = {
            name: build_upstream(one, self._resolve, clocks.monotonic, self._source, plan.priorities)
            for name, one in plan.upstreams.items()
            if one is not None
        }
        recorder = self._recorder(plan, upstreams)
        keeping = QuotaKeeping(config, recorder, clocks)
        tracing = Tracing(recorder, clocks)
        tracing.follow(plan.tracing, config)
        slots = self._slots(config, limiter, recorder)
        slots.follow(quotas.slot_names)
        return Gateway(
            config=config,
            quotas=quotas,
            routes=plan.routes,
            table=plan.table,
            priorities=plan.priorities,
            upstreams=upstreams,
            limiter=limiter,
            charging=keeping.limiter(limiter, quotas.limits, config),
            keeping=keeping,
            slots=slots,
            clients=registry_of(config, quotas, clocks, self._on_client_change),
            recorder=recorder,
            overrides=BreakerOverrides(
                OverrideFile(own_folder(config.state_dir)),
                {name: live.upstream_client.upstream.breaker for name, live in upstreams.items()},
                clock=clocks.monotonic,
                wall_clock=clocks.wall,
            ),
            event_loop_shedder=EventLoopShedder(
                config.server.max_event_loop_lag,
                plan.priorities,
                source=self._source,
            ),
            clocks=clocks,
            pseudonym=pseudonym,
            usage=usage_of(config, clocks),
            history=RequestHistory(history_limits(config), recorder.requests_not_kept),
            numbers=DecisionNumbers(f"{self._source.getrandbits(32):08x}", clocks.monotonic_ns, clocks.wall),
            tokens=plan.tokens,
            cors=plan.cors,
            open_exchanges=OpenExchanges(),
            mirrors=Mirrors(
                clock=clocks.monotonic,
                draw=self._source.random,
                observe=recorder.observe_mirrored,
                in_flight=recorder.mirrored_in_flight,
            ),
            tracing=tracing,
            extensions=plan.extensions,
        )

    def _recorder(self, plan: Plan, upstreams: Iterable[str]) -> Recorder:
        """Return the recorder, which shares counters with connections, TLS and the output of the process."""
        recorder = Recorder(
            (route.name for route in plan.routes),
            upstreams,
            plan.quotas.tiers,
            plan.config.metrics.percentiles,
            self._clocks.monotonic(),
            self._refusals,
            *process_output().losses,
            PARSED_HEADS,
            ILLEGAL_EVENTS.counts,
        )
        recorder.expect_mirrored(mirrored_routes(plan.routes), MIRROR_RESULTS)
        recorder.tls_handshakes, recorder.tls_failures = TLS_COUNTERS.handshakes, TLS_COUNTERS.failures
        recorder.tls_reloads = TLS_COUNTERS.reloads
        return recorder

    # Upstreams

    def _adopt_upstream(self, name: str, plan: UpstreamPlan | None, priorities: PriorityClasses) -> LiveUpstream:
        """Return the upstream under its plan: the live one, a retired one, or a new one."""
        clock = self._clocks.monotonic
        live = self.gateway.upstreams.get(name) or self._retired.pop(name, None)
        if plan is None:
            assert live is not None  # noqa: S101 - it does not change
            rerank(live, priorities, self._source, clock())
            return live
        if live is None:
            return build_upstream(plan, self._resolve, clock, self._source, priorities)
        before = live.transports
        changed = change_upstream(plan, live, self._resolve, clock, self._source, priorities)
        self._retire_transports(one for one in before if one not in changed.transports)
        return changed

    def _retire(self, name: str, live: LiveUpstream) -> None:
        """Stop an upstream's monitor and close its idle connections; keep its state in case it is configured again."""
        self._monitor_tasks.pop(name).cancel()
        self._retire_transports(live.transports)
        self._retired[name] = replace(live, is_retired=True)
        while len(self._retired) > MAX_RETIRED:
            del self._retired[next(iter(self._retired))]

    def _retire_transports(self, transports: Iterable[AnyTransport]) -> None:
        for transport in transports:
            if isinstance(transport, UpstreamTransport):
                transport.retire_all()
            elif isinstance(transport, ShieldedTransport) and not transport.is_of(self._overrides.values()):
                self._closing.add(transport)

    async def _close_retired_periodically(self) -> None:
        """Close retired transports when their last exchange has ended; run until cancelled."""
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
        """Return the configuration with the demo services as upstreams; start them if necessary."""
        if self._demo is None:
            self._demo = DemoUpstreams()
            await self._demo.start()
        return config.model_validate({**config.model_dump(), **self._demo.sections()})

    async def _stop_demo(self) -> None:
        if self._demo is not None:
            await self._demo.stop()


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; raise the exception that it failed with before, if any."""
    await cancel_and_wait(task)
    with suppress(asyncio.CancelledError):
        await task
