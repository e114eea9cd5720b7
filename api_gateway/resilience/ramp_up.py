"""The ramp: the gradual increase of admitted traffic after a breaker has closed.

Synchronous; `now` (monotonic seconds) is an argument.
"""

from dataclasses import dataclass, field

MIN_RATE = 10.0  # calls per second that are always admitted, so that small services are not affected
_WHOLE = 1 - 1e-9  # one call, less the rounding error of a sum


@dataclass(slots=True)
class RampUp:
    """Admits calls at a rate that grows linearly from 0 to `rate` per second in `length` seconds, at least MIN_RATE.

    A token bucket with this growing rate and the capacity of one second: in any period at most `between` calls are
    admitted, plus those of one second.
    """

    rate: float
    length: float
    began: float
    _tokens: float = MIN_RATE
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._at = self.began

    def is_over(self, now: float) -> bool:
        """Return whether all calls are admitted again."""
        return now - self.began >= self.length

    def share(self, now: float) -> float:
        """Return the share of `rate` that is admitted now, 0 to 1, without regard to MIN_RATE."""
        return min(1.0, max(0.0, (now - self.began) / self.length))

    def limit(self, now: float) -> float:
        """Return the admitted calls per second now."""
        return max(MIN_RATE, self.rate * self.share(now))

    def take(self, now: float) -> None:
        """Take a token for an admitted call; a call is admitted if `wait` is 0."""
        self._tokens, self._at = self._tokens_at(now) - 1, now

    def wait(self, now: float) -> float:
        """Return the seconds until a call is admitted if no other call is before; 0 if it is admitted now."""
        missing = _WHOLE - self._tokens_at(now)
        return max(0.0, missing / self.limit(now))

    def between(self, start: float, end: float) -> float:
        """Return the calls that the rate admits from `start` to `end`: the integral of `limit`."""
        return self._until(end - self.began) - self._until(start - self.began)

    def _tokens_at(self, now: float) -> float:
        return min(self.limit(now), self._tokens + self.between(self._at, now))

    def _until(self, seconds: float) -> float:
        slope = self.rate / self.length
        crossing = MIN_RATE / slope if slope else seconds  # from here on the rate is above the floor
        if seconds <= crossing:
            return MIN_RATE * seconds
        return MIN_RATE * crossing + slope / 2 * (seconds * seconds - crossing * crossing)
