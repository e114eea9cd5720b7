"""The response bodies of `/health`, kept in memory: one rendering serves everybody who asks at the same time.

A stranger's body is up to a second old. An operator's is newer: it is reused for ten times as long as it took to
render, so that rendering takes a tenth of the event loop's time at most, and for a second at most.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from api_gateway.models import Clock
from api_gateway.upstream_bodies import HealthView

MAX_AGE = 1.0  # seconds
REUSE = 10  # times the seconds that rendering took


@dataclass(frozen=True, slots=True)
class HealthBodies:
    """What `/health` says to an operator and to a stranger, as JSON, and until when it may be said."""

    full: bytes
    word: bytes
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

    async def word(self) -> bytes:
        """Return the body for a stranger."""
        is_recent = self._clock() < self._bodies.made_at + MAX_AGE
        return (self._bodies if is_recent else await self._renewed()).word

    async def full(self) -> bytes:
        """Return the body for an operator."""
        is_fresh = self._clock() < self._bodies.fresh_until
        return (self._bodies if is_fresh else await self._renewed()).full

    def expire(self) -> None:
        """Let no later request see what was rendered, or is being rendered: an operator has changed something."""
        self._bodies, self._rendering = _NEVER, None

    async def _renewed(self) -> HealthBodies:
        if self._rendering is None:
            self._rendering = asyncio.create_task(self._make(), name="health")
        return await asyncio.shield(self._rendering)  # of those who wait one may leave

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
