"""Builds what limits and tiers rest on: the rate limiter, and the store of registered clients."""

import logging
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from api_gateway.client_records import ClientStore
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.models import Client, Quota
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.redis_clients import RedisClients
from api_gateway.redis_limiter import RedisLimiter
from api_gateway.sqlite_clients import SqliteClients
from api_gateway.state_folder import FolderInUse, StateError, StateFolder, own_folder
from api_gateway.store import StoreSession

logger = logging.getLogger(__name__)


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
        return SqliteClients(own_folder(config.state_dir))
    return RedisClients(_session(config), prefix=store.prefix)


def _session(config: GatewayConfig) -> StoreSession:
    try:
        return StoreSession(config.store.url.get_secret_value(), timeout=config.store.timeout)
    except OSError as error:
        raise StartupError(f"store.url: the files cannot be used: {error}") from error


def follow(limiter: MemoryLimiter | RedisLimiter, before: Client, after: Client) -> None:
    """Take a bucket over to a tier that was changed elsewhere, or has ended. In a shared store it moves by itself."""
    limiter.change_quota(before.key, before.quota, after.quota, time.monotonic_ns())
