"""Long computations in steps, between which the event loop runs other callbacks.

A computation is a generator that yields where it may pause, and returns its result.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

Steps = Generator[None, None, T]

MAX_STRETCH = 0.003  # seconds of computation between two iterations of the event loop


async def run_in_steps(steps: Steps[T], stretch: float = MAX_STRETCH) -> T:
    """Run a computation and return its result, yielding to the event loop after every `stretch` seconds."""
    until = time.perf_counter() + stretch
    try:
        while True:
            next(steps)
            if time.perf_counter() >= until:
                await asyncio.sleep(0)
                until = time.perf_counter() + stretch
    except StopIteration as end:
        result: T = end.value
        return result


def run_at_once(steps: Steps[T]) -> T:
    """Run a computation without pauses and return its result."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def each(items: Iterable[tuple[K, V]], make: Callable[[K, V], T]) -> Steps[dict[K, T]]:
    """Return `make(key, value)` for each key, with a possible pause after each.

    `items` is copied first, so that the underlying mapping may change during pauses.
    """
    made = {}
    for key, value in list(items):
        made[key] = make(key, value)
        yield
    return made
