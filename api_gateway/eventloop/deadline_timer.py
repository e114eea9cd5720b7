"""One deadline that moves a lot and rarely passes, as those of connections do.

Arming and cancelling a timer of the event loop for every request costs more than the rest of keeping time. A
`DeadlineTimer` leaves its timer standing while the deadline moves on, and asks for the rest when it rings too early.
"""

import asyncio
import math
from collections.abc import Callable


def _nothing() -> None:
    """Stand in for what a stopped alarm called, whose owner it would otherwise keep."""


class DeadlineTimer:
    """Calls `ring` once the deadline has passed. Setting it to a later one, the usual case, costs an assignment."""

    __slots__ = ("_due", "_handle", "_loop", "_ring", "deadline")

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self.deadline = math.inf  # on the clock of the loop; infinity is never
        self._loop = loop
        self._ring = ring
        self._due = math.inf  # when the standing timer rings
        self._handle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<DeadlineTimer [{'off' if self.deadline == math.inf else f'due at {self.deadline:.3f}'}]>"

    def set(self, seconds: float | None) -> None:
        """Ring in `seconds`; None is never."""
        if seconds is None:
            self.deadline = math.inf
            return
        self.deadline = deadline = self._loop.time() + seconds
        if deadline < self._due:
            self._arm(deadline)

    def clear(self) -> None:
        """Do not ring. The timer stays, for whoever sets a deadline next."""
        self.deadline = math.inf

    def stop(self) -> None:
        """Never ring again, and let go of everything."""
        self._ring = _nothing
        self.deadline = self._due = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._due = due
        self._handle = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._handle, self._due = None, math.inf
        if self._loop.time() >= self.deadline:
            self.deadline = math.inf
            self._ring()
        elif self.deadline != math.inf:
            self._arm(self.deadline)
