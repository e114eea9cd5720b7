"""A timer for a deadline that is often postponed and rarely reached, such as a connection's timeout.

Scheduling and cancelling an event loop timer for each request is expensive. A `DeadlineTimer` keeps its event loop
timer while the deadline is postponed, and schedules another one for the remaining time when that timer fires early.
"""

import asyncio
import math
from collections.abc import Callable


def _nothing() -> None:
    """Replace the callback of a stopped timer, which would otherwise keep the callback's owner alive."""


class DeadlineTimer:
    """Calls `on_expiry` once the deadline has passed. Postponing the deadline, the usual case, costs one assignment.

    States: off (`deadline` is infinite), due, stopped (off for ever). `deadline` is on the event loop's clock.
    """

    __slots__ = ("_due", "_handle", "_loop", "_on_expiry", "deadline")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expiry: Callable[[], None]) -> None:
        self.deadline = math.inf
        self._loop = loop
        self._on_expiry = on_expiry
        self._due = math.inf  # when the event loop timer fires; never later than the deadline
        self._handle: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<DeadlineTimer [{'off' if self.deadline == math.inf else f'due at {self.deadline:.3f}'}]>"

    def set(self, seconds: float | None) -> None:
        """Set the deadline to `seconds` from now; None turns the timer off."""
        if seconds is None:
            self.deadline = math.inf
            return
        self.deadline = deadline = self._loop.time() + seconds
        if deadline < self._due:
            self._arm(deadline)

    def clear(self) -> None:
        """Turn the timer off, but keep the event loop timer for the next deadline."""
        self.deadline = math.inf

    def stop(self) -> None:
        """Turn the timer off for ever, and release the callback and the event loop timer."""
        self._on_expiry = _nothing
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
            self._on_expiry()
        elif self.deadline != math.inf:
            self._arm(self.deadline)
