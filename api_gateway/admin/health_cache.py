"""The response bodies of `/health`, kept in memory: one rendering serves everybody who asks at the same time.

A stranger's body is up to a second old. An operator's is newer: it is reused for ten times as long as it took to
render, so that rendering takes a tenth of the event loop's time at most, and for a second at most.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from api_gateway.models import Clock
from api_gateway.reporting.upstream_schema import HealthView

MAX_AGE = 1.0  # seconds
REUSE = 10  # times the seconds that rendering took


@dataclass(frozen=True, slots=True)
class HealthBodies:
    """What `/health` says to an operator and to a stranger, as JSON, and until when it may be said."""

    detailed: bytes
    status_only: bytes
    made_at: float
    fresh_until: float


_NEVER = HealthBodies(b"", b"", -math.inf, -math.inf)


class HealthCache:
    """Renders on demand, at most one at a time."""

    def __init__(self, render: Callable[[], Awaitable[HealthView]], clock: Clock) -> None:
        self._render = render
        self._clock = clock
        self._bodies = _NEVER
        self._rendering: asyncio.Task[HealthBodies] | None = None

    def __repr__(self) -> str:
        return f"<HealthCache [{'rendering' if self._rendering else 'idle'}]>"

    async def status_only(self) -> bytes:
        """Return the body for a stranger. While many ask it is renewed in time, and nobody waits."""
        bodies = self._bodies
        age = self._clock() - bodies.made_at
        if age >= MAX_AGE:
            bodies = await self._renewed()
        elif age >= MAX_AGE / 2:
            self._start()
        return bodies.status_only

    async def detailed(self) -> bytes:
        """Return the body for an operator."""
        is_fresh = self._clock() < self._bodies.fresh_until
        return (self._bodies if is_fresh else await self._renewed()).detailed

    def expire(self) -> None:
        """Let no later request see what was rendered, or is being rendered: an operator has changed something."""
        self._bodies, self._rendering = _NEVER, None

    async def _renewed(self) -> HealthBodies:
        return await asyncio.shield(self._start())  # of those who wait one may leave

    def _start(self) -> "asyncio.Task[HealthBodies]":
        if self._rendering is None:
            self._rendering = asyncio.create_task(self._make(), name="health")
            self._rendering.add_done_callback(_retrieve)
        return self._rendering

    async def _make(self) -> HealthBodies:
        began, this = self._clock(), asyncio.current_task()
        try:
            view = await self._render()
            full = view.model_dump_json(exclude_unset=True).encode()
            word = HealthView(status=view.status).model_dump_json(exclude_unset=True).encode()
            now = self._clock()
            bodies = HealthBodies(full, word, now, now + min(REUSE * (now - began), MAX_AGE))
            if self._rendering is this:
                self._bodies = bodies
            return bodies
        finally:
            if self._rendering is this:
                self._rendering = None


def _retrieve(rendering: "asyncio.Task[HealthBodies]") -> None:
    """Take note of a failure that nobody may wait for; whoever asks next finds out by itself."""
    if not rendering.cancelled():
        rendering.exception()
