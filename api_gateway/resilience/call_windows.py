"""Sliding windows of a circuit breaker: counts of calls, failures and slow calls, by time or by number of calls.

Synchronous; `now` (monotonic seconds) is an argument. Memory, and the time to record a call, are constant.
"""

from typing import ClassVar, NamedTuple, Protocol


class Counts(NamedTuple):
    """Calls in a window, and how many of them failed or were slow. A call may be both."""

    calls: int
    failures: int
    slow: int


class Window(Protocol):
    """A sliding window of calls."""

    def record(self, now: float, *, is_failure: bool, is_slow: bool = False) -> None:
        """Record one call at `now`: whether it failed, and whether it was slow."""
        ...

    def counts(self, now: float) -> Counts:
        """Return the counts in the window at `now`."""
        ...

    def clear(self) -> None:
        """Remove all calls."""
        ...

    def describe(self, calls: int) -> tuple[str, str]:
        """Return the words before and after 'calls' in a description of the window."""
        ...


class TimeWindow:
    """The calls of the last `span` seconds, in ten slices, which expire one at a time."""

    __slots__ = (
        "_calls",
        "_failures",
        "_numbers",
        "_slow",
        "_span",
        "_width",
    )

    SLICES: ClassVar = 10

    def __init__(self, span: float) -> None:
        self._span = span
        self._width = span / self.SLICES
        self.clear()

    def __repr__(self) -> str:
        return f"<TimeWindow [{self._span:g} s]>"

    def clear(self) -> None:
        """See `Window`."""
        self._numbers = [-1] * self.SLICES
        self._calls = [0] * self.SLICES
        self._failures = [0] * self.SLICES
        self._slow = [0] * self.SLICES

    def record(self, now: float, *, is_failure: bool, is_slow: bool = False) -> None:
        """See `Window`."""
        number = int(now / self._width)
        slot = number % self.SLICES
        if self._numbers[slot] != number:
            self._numbers[slot], self._calls[slot], self._failures[slot], self._slow[slot] = number, 0, 0, 0
        self._calls[slot] += 1
        if is_failure:
            self._failures[slot] += 1
        if is_slow:
            self._slow[slot] += 1

    def counts(self, now: float) -> Counts:
        """See `Window`."""
        oldest = int(now / self._width) - self.SLICES
        live = [slot for slot in range(self.SLICES) if self._numbers[slot] > oldest]
        return Counts(*(sum(column[slot] for slot in live) for column in (self._calls, self._failures, self._slow)))

    def describe(self, calls: int) -> tuple[str, str]:
        """See `Window`."""
        return f"of {calls}", f" within {self._span:g} s"


class CountWindow:
    """The last `size` calls, however old."""

    __slots__ = (
        "_calls",
        "_failures",
        "_marks",
        "_next",
        "_size",
        "_slow",
    )

    def __init__(self, size: int) -> None:
        self._size = size
        self.clear()

    def __repr__(self) -> str:
        return f"<CountWindow [{self._calls} of {self._size}]>"

    def clear(self) -> None:
        """See `Window`."""
        self._marks = bytearray(self._size)  # bit 0: failed, bit 1: slow
        self._next = self._calls = self._failures = self._slow = 0

    def record(self, now: float, *, is_failure: bool, is_slow: bool = False) -> None:  # noqa: ARG002 - required by the protocol
        """See `Window`."""
        oldest, cursor = self._marks[self._next], is_failure | is_slow << 1
        self._failures += is_failure - (oldest & 1)
        self._slow += is_slow - (oldest >> 1)
        self._marks[self._next] = cursor
        self._next = (self._next + 1) % self._size
        self._calls = min(self._calls + 1, self._size)

    def counts(self, now: float) -> Counts:  # noqa: ARG002 - as above
        """See `Window`."""
        return Counts(self._calls, self._failures, self._slow)

    def describe(self, calls: int) -> tuple[str, str]:
        """See `Window`."""
        return f"of the last {calls}", ""
