"""Builds what counts the usage of clients, and starts and stops it."""

import asyncio
from contextlib import AsyncExitStack

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.system.clocks import Clocks
from api_gateway.system.state_folder import own_folder
from api_gateway.usage.ledger import UsageLedger


def usage_of(config: GatewayConfig, clocks: Clocks) -> UsageLedger | None:
    """Return the ledger of usage under a configuration, None if usage is not counted."""
    section = config.usage
    if not section.enabled:
        return None
    return UsageLedger(
        own_folder(config.state_dir),
        clocks.wall,
        max_unregistered=section.max_unregistered_clients,
        retention_days=section.retention_days,
    )


async def start_usage(usage: UsageLedger | None, stack: AsyncExitStack) -> None:
    """Open the usage and write it periodically, until the stack is closed. Raises StartupError."""
    if usage is None:
        return
    try:
        await usage.open()
    except OSError as error:
        raise StartupError(f"usage.enabled: the usage cannot be counted: {error}") from error
    stack.push_async_callback(usage.close)
    stack.push_async_callback(cancel_and_wait, asyncio.create_task(usage.run(), name="usage"))
