"""Ends tasks of ours, for certain.

A single cancellation may be lost in what a task waits for: `asyncio.wait_for` before Python 3.12 swallows one that
comes together with the result, and the Redis client sends its commands so.
"""

import asyncio
from typing import Any

_AGAIN_AFTER = 0.25  # seconds, enough for a task to tidy up


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end, also when cancelled itself meanwhile."""
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


def check_cancelled() -> None:
    """Raise CancelledError if this task was cancelled, and the cancellation was lost."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
