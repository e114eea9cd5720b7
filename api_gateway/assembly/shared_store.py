"""Builds what uses the shared store. Imported only if there is one: the client library takes 6 MB and 70 ms."""

import logging
import random
from collections import Counter

from api_gateway.clients.redis_store import RedisClientStore
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.limits.concurrency_leases import LeasedSlots
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.models import Quota
from api_gateway.storage.redis_session import StoreError, StoreSession
from api_gateway.system.clocks import Clocks

logger = logging.getLogger(__name__)


def shared_limiter(config: GatewayConfig, quotas: list[Quota], clocks: Clocks) -> RedisLimiter:
    """Build the rate limiter. Raises StartupError if the TLS files of the store cannot be used."""
    store = config.store
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


def shared_slots(config: GatewayConfig, limiter: RedisLimiter, in_flight: Counter[str], worker: str) -> LeasedSlots:
    """Build the slots of concurrency limits. `worker` is a name that no other worker has."""
    return LeasedSlots(in_flight, limiter, worker=worker, prefix=config.store.prefix)


def shared_clients(config: GatewayConfig) -> RedisClientStore:
    """Build the client store. Raises StartupError."""
    return RedisClientStore(_session(config), prefix=config.store.prefix)


async def agreed_value(config: GatewayConfig, key: str, own: str) -> str | None:
    """Return the value of a key that all gateways share; if it has none, set it to `own`.

    None while the store is unavailable.
    """
    try:
        session = StoreSession(config.store.url.get_secret_value(), timeout=config.store.timeout)
        try:
            return await session.set_once(key, own)
        finally:
            await session.close()
    except StoreError as error:
        logger.debug("'%s' cannot be read from the store: %s", key, error)
        return None


def _session(config: GatewayConfig) -> StoreSession:
    try:
        return StoreSession(config.store.url.get_secret_value(), timeout=config.store.timeout)
    except OSError as error:
        raise StartupError(f"store.url: the files cannot be used: {error}") from error
