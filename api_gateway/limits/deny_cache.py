"""What the store last said of a bucket: enough to refuse a request without asking again."""

from typing import NamedTuple

SKEW = 1000  # two clocks differ in speed by less than a thousandth
TICK_NS = 1000  # of the store's clock


class CachedDebt(NamedTuple):
    """What a bucket owed in the store at some time between asking and hearing, by this process's clock."""

    asked_ns: int
    heard_ns: int
    debt_ns: int

    def earliest_ns(self, now_ns: int) -> int:
        """Return the TAT if the store was as early, and its clock as fast, as may be."""
        return self.asked_ns + self.debt_ns - (now_ns - self.asked_ns) // SKEW

    def latest_ns(self, now_ns: int) -> int:
        """Return the TAT if the store was as late, and its clock as slow, as may be."""
        return self.heard_ns + self.debt_ns + (now_ns - self.asked_ns) // SKEW + TICK_NS
