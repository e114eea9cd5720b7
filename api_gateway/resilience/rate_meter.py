"""The rate of calls over the last ten seconds. Synchronous; `now` (monotonic seconds) is an argument."""

from collections import deque
from dataclasses import dataclass, field

_SPAN = 10.0  # seconds that the average covers
_STEP = 1.0  # seconds between marks


@dataclass(slots=True)
class RateMeter:
    """Calls per second over the last ten seconds. The caller increments `count`, and calls `mark` from `due` on."""

    count: int = 0
    due: float = 0.0
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=int(_SPAN / _STEP) + 1))

    def mark(self, now: float) -> None:
        """Store the current count. To be called after `count` was incremented."""
        self._marks.append((now, self.count))
        self.due = now + _STEP

    def rate(self, now: float) -> float:
        """Return the average rate, over at least one second, so that two close calls do not give a high rate."""
        recent = [(at, count) for at, count in self._marks if now - at <= _SPAN]
        if not recent:
            return 0.0
        at, count = recent[0]
        return (self.count - count + 1) / max(_STEP, now - at)
