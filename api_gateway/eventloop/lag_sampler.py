"""Measures the lag of the event loop: how late a timer fires, or how long a ready callback waits after that.

The timer alone is not sufficient: a timer with an interval of 0.1 s is on time in a loop whose every iteration takes
0.1 s.
"""

import asyncio
import time
from collections.abc import Callable

SAMPLE_INTERVAL = 0.1  # seconds
HOPS = 2  # callbacks in a row: the first runs before pending socket events are processed, the second after


class LagSampler:
    """Calls `observe` with the lag of the event loop in seconds, every SAMPLE_INTERVAL while it is started."""

    __slots__ = ("_began", "_handle", "_hops", "_late", "_loop", "_observe")

    def __init__(self, loop: asyncio.AbstractEventLoop, observe: Callable[[float], None]) -> None:
        self._loop = loop
        self._observe = observe
        self._began = self._late = 0.0
        self._hops = 0
        self._handle: asyncio.Handle | None = None

    def __repr__(self) -> str:
        return f"<LagSampler [{'off' if self._handle is None else 'on'}]>"

    def start(self) -> None:
        """Sample until `stop`."""
        self._began = time.monotonic()
        self._handle = self._loop.call_later(SAMPLE_INTERVAL, self._on_timer)

    def stop(self) -> None:
        """Stop sampling; `start` may be called again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _on_timer(self) -> None:
        now = time.monotonic()
        self._late = now - self._began - SAMPLE_INTERVAL
        self._began, self._hops = now, HOPS
        self._handle = self._loop.call_soon(self._on_hop)

    def _on_hop(self) -> None:
        self._hops -= 1
        if self._hops:
            self._handle = self._loop.call_soon(self._on_hop)
            return
        self._observe(max(self._late, time.monotonic() - self._began))
        self.start()
