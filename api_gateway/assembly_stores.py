"""Builds what limits and tiers rest on: the rate limiter, and the store of registered clients."""

import random
import time

from api_gateway.client_records import ClientStore
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.models import Client, Quota
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.redis_clients import RedisClients
from api_gateway.redis_limiter import RedisLimiter
from api_gateway.sqlite_clients import SqliteClients
from api_gateway.store import StoreSession


def limiter_of(config: GatewayConfig, quotas: list[Quota]) -> MemoryLimiter | RedisLimiter:
    """Build the limiter; raises StartupError if the store cannot be used."""
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
        return StoreSession(config.store.url.get_secret_value(), timeout=config.store.timeout)
    except OSError as error:
        raise StartupError(f"store.url: the files cannot be used: {error}") from error


def follow(limiter: MemoryLimiter | RedisLimiter, before: Client, after: Client) -> None:
    """Take a bucket over to a tier that was changed elsewhere, or has ended. In a shared store it moves by itself."""
    limiter.change_quota(before.key, before.quota, after.quota, time.monotonic_ns())
