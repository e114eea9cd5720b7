"""How late the event loop runs: a timer that says by how much it was missed."""

import asyncio
from collections.abc import Callable

EVERY = 0.1  # seconds


class LagSampler:
    """Tells `observe`, ten times a second, how many seconds after its time a timer was called."""

    __slots__ = ("_due", "_handle", "_loop", "_observe")

    def __init__(self, loop: asyncio.AbstractEventLoop, observe: Callable[[float], None]) -> None:
        self._loop = loop
        self._observe = observe
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<LagSampler [{'off' if self._handle is None else 'on'}]>"

    def start(self) -> None:
        """Begin."""
        self._due = self._loop.time() + EVERY
        self._handle = self._loop.call_at(self._due, self._on_timer)

    def stop(self) -> None:
        """End."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _on_timer(self) -> None:
        self._observe(max(0.0, self._loop.time() - self._due))
        self.start()
