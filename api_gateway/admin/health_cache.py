"""Cache of the response bodies of `/health`: concurrent requests share one rendering.

The public body is at most one second old. The operators' body is reused for ten times as long as rendering took, at
most one second, so that rendering uses at most a tenth of the event loop's time.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from api_gateway.models import Clock

if TYPE_CHECKING:
    from api_gateway.reporting.upstream_schema import HealthView

MAX_AGE = 1.0  # seconds
REUSE = 10  # multiple of the rendering time for which the operators' body is reused


@dataclass(frozen=True, slots=True)
class HealthBodies:
    """One rendering as JSON: `detailed` for operators, fresh until `fresh_until`, and `status_only` for others."""

    detailed: bytes
    status_only: bytes
    made_at: float
    fresh_until: float


_NEVER = HealthBodies(b"", b"", -math.inf, -math.inf)


class HealthCache:
    """Renders on demand; concurrent requests share one rendering task.

    States: idle, and rendering while `_rendering` is set. `expire` detaches a rendering in progress: its result serves
    the requests that wait for it, but is not kept.
    """

    def __init__(self, render: Callable[[], "Awaitable[HealthView]"], clock: Clock) -> None:
        self._render = render
        self._clock = clock
        self._bodies = _NEVER
        self._rendering: asyncio.Task[HealthBodies] | None = None

    def __repr__(self) -> str:
        return f"<HealthCache [{'rendering' if self._rendering else 'idle'}]>"

    async def status_only(self) -> bytes:
        """Return the public body. From half of `MAX_AGE` on it is renewed in the background, so few requests wait."""
        bodies = self._bodies
        age = self._clock() - bodies.made_at
        if age >= MAX_AGE:
            bodies = await self._renewed()
        elif age >= MAX_AGE / 2:
            self._start()
        return bodies.status_only

    async def detailed(self) -> bytes:
        """Return the operators' body."""
        is_fresh = self._clock() < self._bodies.fresh_until
        return (self._bodies if is_fresh else await self._renewed()).detailed

    def expire(self) -> None:
        """Discard the bodies and the result of a rendering in progress, after an operator's change."""
        self._bodies, self._rendering = _NEVER, None

    async def _renewed(self) -> HealthBodies:
        return await asyncio.shield(self._start())  # a cancelled request must not cancel the rendering for others

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
            word = type(view)(status=view.status).model_dump_json(exclude_unset=True).encode()
            now = self._clock()
            bodies = HealthBodies(full, word, now, now + min(REUSE * (now - began), MAX_AGE))
            if self._rendering is this:
                self._bodies = bodies
            return bodies
        finally:
            if self._rendering is this:
                self._rendering = None


def _retrieve(rendering: "asyncio.Task[HealthBodies]") -> None:
    """Mark a failure as retrieved, because no request may be waiting for it; the next request renders again."""
    if not rendering.cancelled():
        rendering.exception()
