"""Which tiers are refused first under overload, and after how long a refused request may come back."""

import random
from bisect import bisect_left
from collections.abc import Mapping

MIN_CLASS_SHARE = 0.5  # of a limit that the lowest band may fill
MAX_RETRY_AFTER = 3  # seconds; the shortest is 1


class PriorityClasses:
    """The tiers in the order in which they are shed, lowest first. Tiers of one rank share a band.

    A band is admitted while less than its share of the limit is under way, whoever holds it. The shares rise evenly
    from one half to the whole, so that each band finds places which those below it cannot take; and the lowest
    alone can still fill half the limit, which keeps an upstream busy whose limit is twice what it works on at once.
    """

    def __init__(self, ranks: Mapping[str, float]) -> None:
        """`ranks` are by tier; the highest is shed last."""
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
        """Return the band of a tier; of one that is not known, the lowest."""
        return self._by_tier.get(tier, 0)

    def name(self, priority: int) -> str:
        """Return the tiers of a band."""
        return " or ".join(tier for tier, its in self._by_tier.items() if its == priority)


SINGLE_PRIORITY = PriorityClasses({})


def retry_after(source: random.Random) -> float:
    """Return whole seconds, differing, so that those refused together do not come back together."""
    return float(source.randint(1, MAX_RETRY_AFTER))
