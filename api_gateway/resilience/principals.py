"""Principals: the clients or addresses that a circuit breaker attributes calls to (see `principal_of`)."""

from dataclasses import dataclass

NEVER = float("-inf")


@dataclass(slots=True)
class RecentPrincipals:
    """Detects whether calls came from several principals: stores the last one, and the last time of any other.

    Exact for any number of principals, in constant memory. Times are monotonic seconds.
    """

    last: str | None = None
    last_at: float = NEVER
    other_at: float = NEVER

    def note(self, principal: str | None, now: float) -> None:
        """Record a call; None is an unknown principal, which counts as different from all others."""
        if principal is None:
            self.other_at = now
            return
        if principal != self.last:
            self.other_at = max(self.other_at, self.last_at)
            self.last = principal
        self.last_at = now

    def has_several_since(self, moment: float) -> bool:
        """Return whether another principal than the last one has called at that moment or later."""
        return self.other_at >= moment

    def has_other_since(self, principal: str, moment: float) -> bool:
        """Return whether another principal than `principal` has called at that moment or later."""
        return self.other_at >= moment or (self.last != principal and self.last_at >= moment)
