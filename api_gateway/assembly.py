"""Builds the live parts of a gateway from its configuration, starts them and stops them."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import httpx

from api_gateway.assembly_stores import client_store, follow, limiter_of, state_folder
from api_gateway.assembly_upstreams import checking_transport, names_of, service_of, upkeep_of
from api_gateway.breaker_modes import ModeBoard, ModeFile
from api_gateway.clients import ClientRegistry
from api_gateway.config import GatewayConfig
from api_gateway.demo import DemoUpstreams
from api_gateway.errors import StartupError
from api_gateway.heap import keep_trimmed
from api_gateway.lag import LagSampler
from api_gateway.local_resources import raise_descriptor_limit
from api_gateway.metrics import Recorder
from api_gateway.models import Quota
from api_gateway.output import process_output
from api_gateway.overload import Bands, LagLimit
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.redis_limiter import RedisLimiter
from api_gateway.resolution import Resolve
from api_gateway.service import Service
from api_gateway.state_folder import own_folder
from api_gateway.tasks import end
from api_gateway.upkeep import Upkeep


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


@asynccontextmanager
async def live(
    config: GatewayConfig,
    rejections: Counter[str],
    transports: Mapping[str, httpx.AsyncBaseTransport],
    resolve: Resolve,
) -> AsyncIterator[Gateway]:
    """Bring the gateway to life in the order of dependence, and take it down in the opposite one."""
    async with AsyncExitStack() as stack:
        raise_descriptor_limit()
        if config.is_demo:
            demo = DemoUpstreams()
            await demo.start()
            stack.push_async_callback(demo.stop)
            config = config.model_validate({**config.model_dump(), **demo.sections()})
        stack.enter_context(state_folder(config))
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
        trimming = asyncio.create_task(keep_trimmed(), name="heap")
        stack.push_async_callback(_cancelled, trimming)
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
    limiter = limiter_of(config, quotas)
    bands = Bands({name: tier.rate if tier.priority is None else tier.priority for name, tier in config.tiers.items()})
    names = {name: names_of(section) for name, section in config.upstreams.items()}
    services = {
        name: service_of(name, section, transports.get(name), now, names[name], bands)
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
            on_change=partial(follow, limiter),
        ),
        services=services,
        upkeeps={
            name: upkeep_of(
                section, services[name], names[name], resolve, checking_transport(name, section, transports)
            )
            for name, section in config.upstreams.items()
        },
        recorder=Recorder(
            (route.name for route in config.routes),
            config.upstreams,
            tiers,
            config.metrics.percentiles,
            now,
            rejections,
            *process_output().losses,
        ),
        candidates=candidates,
        modes=ModeBoard(
            ModeFile(own_folder(config.state_dir)),
            {name: service.upstream.breaker for name, service in services.items()},
            clock=time.monotonic,
            wall_clock=time.time,
        ),
        bands=bands,
        lag=LagLimit(config.server.max_lag, bands, source=random.Random()),  # noqa: S311 - spreads load, guards nothing
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
