"""Builds what limits and tiers rest on: quotas, the rate limiter, and the registry of clients with its store."""

import logging
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from api_gateway.clients.records import ClientStore
from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.clients.registry import ClientRegistry, PreviousClients
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.models import Client, Quota
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.storage.redis_session import StoreSession
from api_gateway.system.clocks import Clocks
from api_gateway.system.state_folder import FolderInUse, StateError, StateFolder, own_folder

logger = logging.getLogger(__name__)

Limiter = MemoryLimiter | RedisLimiter


@contextmanager
def state_folder(config: GatewayConfig) -> Iterator[None]:
    """Hold the state folder. Raises StartupError, for an unusable folder only if registered clients are kept there."""
    # True for a worker of uvicorn or gunicorn, which share the folder with the other workers of their server.
    is_worker = multiprocessing.parent_process() is not None or "gunicorn.arbiter" in sys.modules
    folder = None
    try:
        folder = StateFolder(config.state_dir, is_worker=is_worker)
    except StateError as error:
        if isinstance(error, FolderInUse) or not config.store.keeps_clients:
            raise StartupError(str(error)) from error
        logger.warning("%s; until then no circuit breaker can be put in another mode", error)
    try:
        yield
    finally:
        if folder is not None:
            folder.close()


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quotas of a configuration: of tiers, of candidates by the tier they would change, and of addresses."""

    tiers: Mapping[str, Quota]
    candidates: Mapping[str, Quota]
    address: Quota | None

    @classmethod
    def of(cls, config: GatewayConfig) -> "Quotas":
        """Return those that the configuration sets."""
        limit = config.address_limit
        return cls(
            {name: Quota.per_second(name, tier.rate, tier.capacity) for name, tier in config.tiers.items()},
            {
                name: Quota.per_second(f"{name} candidate", tier.candidate.rate, tier.candidate.capacity)
                for name, tier in config.tiers.items()
                if tier.candidate is not None
            },
            Quota.per_second("address", limit.rate, limit.capacity) if limit.rate else None,
        )

    @property
    def all(self) -> list[Quota]:
        """All of them."""
        return [*self.tiers.values(), *self.candidates.values(), *([self.address] if self.address else [])]


@dataclass(frozen=True, slots=True)
class PreviousQuotas:
    """Which quota each bucket had before a change."""

    quotas: Quotas
    clients: PreviousClients

    def of(self, key: str, present: Quota) -> Quota:
        """Return the quota that a bucket had; `present` is the one it has now."""
        kind, _, rest = key.partition(":")
        if kind == "peer":
            return self.quotas.address or present
        if kind == "candidate":
            own = self.clients.quota_of(rest)
            return self.quotas.candidates.get(own.name) or own
        return self.clients.quota_of(key)


def registry_of(config: GatewayConfig, quotas: Quotas, limiter: Limiter, clocks: Clocks) -> ClientRegistry:
    """Build the registry of clients; raises StartupError."""
    return ClientRegistry(
        quotas.tiers,
        config.default_tier,
        configured_clients(config),
        client_store(config),
        limit=config.store.max_cached_clients,
        deadline=config.store.decision_timeout,
        wall_clock=clocks.wall,
        on_change=partial(move_buckets, limiter, clocks.monotonic_ns),
    )


def configured_clients(config: GatewayConfig) -> dict[str, str]:
    """Return the tiers of the clients that stand in the configuration."""
    return {client_id: section.tier for client_id, section in config.clients.items()}


def requote(
    limiter: Limiter,
    clients: ClientRegistry,
    configs: tuple[GatewayConfig, GatewayConfig],
    quotas: tuple[Quotas, Quotas],
    now_ns: int,
) -> None:
    """Bring buckets and clients to another configuration. Both pairs hold what was before, and what is after."""
    before, after = configs
    clients.bump_version()
    store = after.store
    if isinstance(limiter, RedisLimiter):
        limiter.reconfigure(
            store.on_failure, max(store.min_gateway_processes, after.server.workers), store.max_buckets
        )
    else:
        limiter.bucket_limit = store.max_buckets
    old, new = quotas
    terms = (before.default_tier, before.clients), (after.default_tier, after.clients)
    if old == new and terms[0] == terms[1]:
        return
    earlier = clients.change_tiers(new.tiers, after.default_tier, configured_clients(after))
    limiter.change_quotas(new.all, PreviousQuotas(old, earlier).of, now_ns)


def limiter_of(config: GatewayConfig, quotas: list[Quota], clocks: Clocks) -> Limiter:
    """Build the limiter; raises StartupError if the store cannot be used."""
    store = config.store
    if not store.is_shared:
        return MemoryLimiter(quotas, bucket_limit=store.max_buckets)
    return RedisLimiter(
        _session(config),
        quotas,
        policy=store.on_failure,
        deadline=store.decision_timeout,
        processes=max(store.min_gateway_processes, config.server.workers),
        bucket_limit=store.max_buckets,
        prefix=store.prefix,
        clock=clocks.monotonic,
        clock_ns=clocks.monotonic_ns,
        source=random.Random(),  # noqa: S311 - names a process and spreads attempts, guards nothing
    )


def client_store(config: GatewayConfig) -> ClientStore:
    """Return the store of registered clients, which opens when it is loaded: the shared store, or a file.

    Raises StartupError.
    """
    store = config.store
    if not store.keeps_clients:
        return SqliteClientStore(own_folder(config.state_dir))
    return RedisClientStore(_session(config), prefix=store.prefix)


def _session(config: GatewayConfig) -> StoreSession:
    try:
        return StoreSession(config.store.url.get_secret_value(), timeout=config.store.timeout)
    except OSError as error:
        raise StartupError(f"store.url: the files cannot be used: {error}") from error


def move_buckets(limiter: Limiter, clock_ns: Callable[[], int], before: Client, after: Client) -> None:
    """Take a bucket over to a tier that was changed elsewhere, or has ended. In a shared store it moves by itself."""
    limiter.change_quota(before.key, before.quota, after.quota, clock_ns())
