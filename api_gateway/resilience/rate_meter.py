"""The rate of calls over the last ten seconds. Synchronous; `now` (monotonic seconds) is an argument."""

from collections import deque
from dataclasses import dataclass, field

_SPAN = 10.0  # seconds over which the rate is taken
_STEP = 1.0  # seconds between two marks


@dataclass(slots=True)
class RateMeter:
    """Calls a second over the last ten seconds. Whoever counts adds 1 to `count`, and marks when it is `due`."""

    count: int = 0
    due: float = 0.0
    _marks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=int(_SPAN / _STEP) + 1))

    def mark(self, now: float) -> None:
        """Note the count, behind the call that was counted last."""
        self._marks.append((now, self.count))
        self.due = now + _STEP

    def rate(self, now: float) -> float:
        """Return the average; over a second at least, so that two calls in a row are no stampede."""
        recent = [(at, count) for at, count in self._marks if now - at <= _SPAN]
        if not recent:
            return 0.0
        at, count = recent[0]
        return (self.count - count + 1) / max(_STEP, now - at)
