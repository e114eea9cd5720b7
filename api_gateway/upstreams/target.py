"""A target: one address of an upstream, with all that is known of it. Holds values, decides nothing."""

from dataclasses import dataclass, field

from api_gateway.circuit_breaker import CircuitBreaker


@dataclass(slots=True)
class CheckRecord:
    """What the health checks of a target have found; times are monotonic seconds."""

    at: float | None = None  # of the last one; None while there was none
    finding: str | None = None
    is_good: bool = True
    consecutive: int = 0  # results like the last, in a row
    last_error: str | None = None
    last_error_at: float | None = None

    def note(self, now: float, *, is_good: bool, finding: str) -> None:
        """Take in one result."""
        self.consecutive = self.consecutive + 1 if is_good is self.is_good else 1
        self.at, self.finding, self.is_good = now, finding, is_good
        if not is_good:
            self.last_error, self.last_error_at = finding, now


@dataclass(eq=False, slots=True)
class Target:
    """One address of an upstream. `in_flight` counts requests sent and not yet answered to the end.

    `url` is what it is called. Where that came from resolving a name, `named` is the URL with the name and `address`
    where to connect. `breaker` is its own, None where it can make no difference. `returned_at` is set while it starts
    slowly; `withheld` counts failures in a row that could not eject it, as too few others are left.
    """

    url: str
    weight: int = 1
    is_healthy: bool = True
    in_flight: int = 0
    credit: int = field(default=0, repr=False)  # of the smooth weighted round robin
    named: str | None = field(default=None, repr=False)
    address: str | None = field(default=None, repr=False)
    breaker: CircuitBreaker | None = field(default=None, repr=False)
    returned_at: float | None = field(default=None, repr=False)
    withheld: int = field(default=0, repr=False)
    ejections_total: int = field(default=0, repr=False)
    checks: CheckRecord = field(default_factory=CheckRecord, repr=False)

    def forget_checks(self) -> None:
        """Count as healthy: it is not checked any more."""
        self.is_healthy, self.checks = True, CheckRecord()
