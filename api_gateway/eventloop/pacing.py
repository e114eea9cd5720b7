"""Long computations in steps, between which the event loop serves others.

A computation is a generator: it yields wherever it may pause, and returns its result.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

Steps = Generator[None, None, T]

MAX_STRETCH = 0.003  # seconds of computing between two turns of the loop


async def paced(steps: Steps[T], stretch: float = MAX_STRETCH) -> T:
    """Return the result; lets the event loop turn after every `stretch` seconds."""
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


def completed(steps: Steps[T]) -> T:
    """Return the result, without a pause."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def each(items: Iterable[tuple[K, V]], make: Callable[[K, V], T]) -> Steps[dict[K, T]]:
    """Return what `make` makes of each key and value, with a pause between any two.

    What `items` yields is copied first, so that it may change meanwhile.
    """
    made = {}
    for key, value in list(items):
        made[key] = make(key, value)
        yield
    return made
