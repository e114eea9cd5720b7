"""The version of what gateways keep in a shared store: keys that a newer gateway has written are not used.

The first gateway writes the version. One that starts while the store is unavailable reads it as soon as it can.
"""

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

from api_gateway.assembly.shared_store import agreed_value
from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.eventloop.tasks import cancel_and_wait

logger = logging.getLogger(__name__)

STORE_SCHEMA = 1
_RETRY_AFTER = 1.0  # seconds, while the store is unavailable


def schema_key(prefix: str) -> str:
    """Return the key of the version, for the prefix of all keys."""
    return f"{prefix}:schema"


async def check_store_schema(config: GatewayConfig) -> bool:
    """Return whether the version could be read.

    Raises StartupError if it is that of a newer gateway, or not a version.
    """
    key = schema_key(config.store.prefix)
    found = await agreed_value(config, key, str(STORE_SCHEMA))
    if found is None:
        return False
    if found == str(STORE_SCHEMA):
        return True
    if not found.isdecimal() or not int(found):
        raise StartupError(
            f"store.prefix: the key '{key}' must be a version such as {STORE_SCHEMA}, got {found[:40]!r}; set"
            " store.prefix to a value that no other program uses"
        )
    raise StartupError(
        f"store.prefix: the keys that begin with '{config.store.prefix}:' were written by a newer gateway (schema"
        f" {found}, newest supported {STORE_SCHEMA}): start that gateway, or one that is as new; or set store.prefix"
        " to another value, to begin with full buckets and without registered clients. See docs/upgrading.md"
    )


async def hold_store_schema(
    config: GatewayConfig,
    stack: AsyncExitStack,
    stop: Callable[[], object] = lambda: signal.raise_signal(signal.SIGTERM),
) -> None:
    """Check the version now, else as soon as the store is available; then `stop` ends a gateway that is too old.

    Raises StartupError.
    """
    if not await check_store_schema(config):
        checking = asyncio.create_task(_check_later(config, stop), name="version of the store")
        stack.push_async_callback(cancel_and_wait, checking)


async def _check_later(config: GatewayConfig, stop: Callable[[], object]) -> None:
    try:
        while True:
            await asyncio.sleep(_RETRY_AFTER)
            if await check_store_schema(config):
                return
    except StartupError as error:
        logger.critical("%s. The gateway stops", error)
        stop()
