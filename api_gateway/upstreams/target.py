"""A target, one address of an upstream, with its state. Values only, no decisions."""

from dataclasses import dataclass, field

from api_gateway.circuit_breaker import CircuitBreaker

_WEIGHT = 1 / 32  # of the last response in the mean: about a hundred responses determine it


@dataclass(slots=True)
class CheckRecord:
    """Results of a target's health checks; times are monotonic seconds."""

    at: float | None = None  # of the last check; None before the first
    finding: str | None = None
    is_good: bool = True
    consecutive: int = 0  # equal results, the last one included
    last_error: str | None = None
    last_error_at: float | None = None
    seconds: float | None = None  # that the last check took

    def note(self, now: float, *, is_good: bool, finding: str, seconds: float | None = None) -> None:
        """Record one result, and the seconds that the check took."""
        self.seconds = seconds
        self.consecutive = self.consecutive + 1 if is_good is self.is_good else 1
        self.at, self.finding, self.is_good = now, finding, is_good
        if not is_good:
            self.last_error, self.last_error_at = finding, now


@dataclass(eq=False, slots=True)
class Target:
    """One address of an upstream. `in_flight` counts attempts whose responses have not ended.

    `url` identifies it. If it results from resolving a name, `named` is the URL with the name, and `address` the IP
    address. `breaker` is its own, None if it cannot be ejected. `returned_at` is set during slow start; `withheld`
    counts consecutive bad calls that could not eject it because too few others could serve. `response_time` is the
    mean time to the head of its last responses, in seconds, None before the first.
    """

    url: str
    weight: int = 1
    is_healthy: bool = True
    in_flight: int = 0
    credit: int = field(default=0, repr=False)  # of smooth weighted round robin
    named: str | None = field(default=None, repr=False)
    address: str | None = field(default=None, repr=False)
    breaker: CircuitBreaker | None = field(default=None, repr=False)
    returned_at: float | None = field(default=None, repr=False)
    withheld: int = field(default=0, repr=False)
    ejections_total: int = field(default=0, repr=False)
    checks: CheckRecord = field(default_factory=CheckRecord, repr=False)
    response_time: float | None = field(default=None, repr=False)

    def note_response(self, seconds: float) -> None:
        """Include the time to the head of one response in the mean: each weighs 1/32 less than the one after it."""
        mean = self.response_time
        self.response_time = seconds if mean is None else mean + (seconds - mean) * _WEIGHT

    def forget_checks(self) -> None:
        """Reset the target to healthy because it is no longer checked."""
        self.is_healthy, self.checks = True, CheckRecord()
