"""Principals: on whose behalf calls are made, as far as a circuit breaker tells them apart (see `holder_of`).

Synchronous and without clock.
"""

from dataclasses import dataclass

NEVER = float("-inf")


@dataclass(slots=True)
class RecentPrincipals:
    """Whether calls came from several principals: it knows the last one, and when any other last called.

    That is exact for any number of principals, in constant memory: before the last one's calls came some other's.
    """

    last: str | None = None
    last_at: float = NEVER
    other_at: float = NEVER

    def note(self, principal: str | None, now: float) -> None:
        """Note a call; None is a principal that is not known and counts as another one than any."""
        if principal is None:
            self.other_at = now
            return
        if principal != self.last:
            self.other_at = max(self.other_at, self.last_at)
            self.last = principal
        self.last_at = now

    def has_several_since(self, moment: float) -> bool:
        """Tell whether others than the last principal have called at that moment or later."""
        return self.other_at >= moment

    def has_other_since(self, principal: str, moment: float) -> bool:
        """Tell whether anybody else than `principal` has called at that moment or later."""
        return self.other_at >= moment or (self.last != principal and self.last_at >= moment)
