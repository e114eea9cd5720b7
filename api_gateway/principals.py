"""Principals: on whose behalf calls are made, as far as a circuit breaker tells them apart (see `shares.holder_of`).

Synchronous and without clock.
"""


class Callers:
    """Whether calls came from several principals: it knows the last one, and when any other last called.

    That is exact for any number of principals, in constant memory: before the last one's calls came some other's.
    """

    __slots__ = ("last", "last_at", "other_at")

    def __init__(self) -> None:
        self.last: str | None = None
        self.last_at = self.other_at = float("-inf")

    def __repr__(self) -> str:
        return f"<Callers [last {self.last!r} at {self.last_at:.3f}, another at {self.other_at:.3f}]>"

    def note(self, principal: str | None, now: float) -> None:
        """Note a call; None is a principal that is not known and counts as another one than any."""
        if principal is None:
            self.other_at = now
            return
        if principal != self.last:
            self.other_at = max(self.other_at, self.last_at)
            self.last = principal
        self.last_at = now

    def are_several_since(self, moment: float) -> bool:
        """Tell whether others than the last principal have called at that moment or later."""
        return self.other_at >= moment
