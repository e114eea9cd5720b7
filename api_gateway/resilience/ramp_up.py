"""The way back to full traffic after an outage: what rate there was before it, and what part of it is admitted.

Synchronous; `now` (monotonic seconds) is an argument.
"""

from dataclasses import dataclass, field

MIN_RATE = 10.0  # calls a second that are always admitted: a person, or a small service, notices nothing
_WHOLE = 1 - 1e-9  # of a call: a sum of parts that should make one may come out a little below


@dataclass(slots=True)
class RampUp:
    """Admits a share of `rate` that grows from nothing to all of it in `length` seconds, and never less than FLOOR.

    It is a token bucket that refills at that growing rate and holds one second's worth: within any stretch of time no
    more calls pass than `between` says, and those of one second.
    """

    rate: float
    length: float
    began: float
    _tokens: float = MIN_RATE
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._at = self.began

    def is_over(self, now: float) -> bool:
        """Tell whether all calls are admitted again."""
        return now - self.began >= self.length

    def share(self, now: float) -> float:
        """Return the share of the rate that is admitted now, 0 to 1, the floor left out of account."""
        return min(1.0, max(0.0, (now - self.began) / self.length))

    def limit(self, now: float) -> float:
        """Return the calls a second that are admitted now."""
        return max(MIN_RATE, self.rate * self.share(now))

    def take(self, now: float) -> None:
        """Count a call that is admitted, as one is for which there is nothing to `wait`."""
        self._tokens, self._at = self._tokens_at(now) - 1, now

    def wait(self, now: float) -> float:
        """Return the seconds until a call is admitted, if nobody else comes before; 0 if it would be now."""
        missing = _WHOLE - self._tokens_at(now)
        return max(0.0, missing / self.limit(now))

    def between(self, start: float, end: float) -> float:
        """Return the calls that the rate admits from `start` to `end`: the integral of `limit`."""
        return self._until(end - self.began) - self._until(start - self.began)

    def _tokens_at(self, now: float) -> float:
        return min(self.limit(now), self._tokens + self.between(self._at, now))

    def _until(self, seconds: float) -> float:
        slope = self.rate / self.length
        crossing = MIN_RATE / slope if slope else seconds  # from here on the share is more than the floor
        if seconds <= crossing:
            return MIN_RATE * seconds
        return MIN_RATE * crossing + slope / 2 * (seconds * seconds - crossing * crossing)
