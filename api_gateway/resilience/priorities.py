"""Priorities of tiers under overload, and the Retry-After of refused requests."""

import random
from bisect import bisect_left
from collections.abc import Mapping

MIN_CLASS_SHARE = 0.5  # share of a limit that the lowest priority can use
MAX_RETRY_AFTER = 3  # seconds; the shortest is 1


class PriorityClasses:
    """The tiers in the order in which they are shed, lowest first. Tiers of one rank have one priority.

    A priority is admitted while fewer requests than its share of the limit are in flight, whatever their priority. The
    shares rise evenly from one half to 1, so that each priority has slots that lower ones cannot use; and the lowest
    alone can use half of the limit, which keeps an upstream busy if its limit is twice its parallelism.
    """

    def __init__(self, ranks: Mapping[str, float]) -> None:
        """`ranks` maps tiers to ranks; the highest is shed last."""
        order = sorted(set(ranks.values()))
        self._by_tier = {tier: bisect_left(order, rank) for tier, rank in ranks.items()}
        count = max(1, len(order))
        rise = (1 - MIN_CLASS_SHARE) / (count - 1) if count > 1 else 0.0
        self.shares = tuple(1 - rise * (count - 1 - priority) for priority in range(count))

    def __repr__(self) -> str:
        return f"<PriorityClasses {[self.name(priority) for priority in range(len(self.shares))]}>"

    def __len__(self) -> int:
        return len(self.shares)

    def of(self, tier: str) -> int:
        """Return the priority of a tier, 0 for the lowest and for unknown tiers."""
        return self._by_tier.get(tier, 0)

    def name(self, priority: int) -> str:
        """Return the tiers of a priority, joined by "or"."""
        return " or ".join(tier for tier, its in self._by_tier.items() if its == priority)


SINGLE_PRIORITY = PriorityClasses({})


def retry_after(source: random.Random) -> float:
    """Return a random number of whole seconds, so that clients refused together do not retry together."""
    return float(source.randint(1, MAX_RETRY_AFTER))
