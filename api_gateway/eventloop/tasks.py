"""Reliable cancellation of tasks.

One call of `cancel` may have no effect: `asyncio.wait_for` before Python 3.12 suppresses a cancellation that coincides
with the result, and the Redis client uses it to send commands.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any

_AGAIN_AFTER = 0.25  # seconds after which `cancel` is repeated, enough for a task to clean up


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended, even if the caller is cancelled meanwhile."""
    interruption = None
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        try:
            await asyncio.wait(running, timeout=_AGAIN_AFTER)
        except asyncio.CancelledError as cancelled:
            interruption = cancelled
        running = {task for task in running if not task.done()}
    if interruption is not None:
        raise interruption


async def run_to_completion(work: Coroutine[Any, Any, None]) -> None:
    """Await work to its end, even if the caller is cancelled meanwhile; that is raised afterwards."""
    running = asyncio.ensure_future(work)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await running
        raise


def check_cancelled() -> None:
    """Raise CancelledError if the current task was cancelled but the cancellation was suppressed."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
