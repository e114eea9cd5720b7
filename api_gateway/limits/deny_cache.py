"""What the store last said of buckets: enough to refuse a request without asking again, never to admit one."""

from collections.abc import Callable
from typing import NamedTuple

from api_gateway.models import Charge
from api_gateway.rate_limiter import TatTable

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


class DenyCache:
    """Readings of the store by bucket. They are of use only while refunds by other processes are heard of.

    `is_trusted` tells that. Readings made before it became true again serve as the best guess for the policy that
    decides while the store is unavailable. `limit` bounds the buckets that are remembered.
    """

    def __init__(self, limit: int, clock_ns: Callable[[], int]) -> None:
        self.limit = limit
        self.is_trusted = False
        self._clock_ns = clock_ns
        # By the length of a bucket's budget: after a change of tier a reading says nothing.
        self._current: dict[int, TatTable[CachedDebt]] = {}
        self._earlier: dict[int, TatTable[CachedDebt]] = {}  # refunds may have been missed since
        self._valid_from_ns = 0  # what was asked no later may be wrong

    def __repr__(self) -> str:
        return f"<DenyCache [{len(self)} buckets{'' if self.is_trusted else ', not trusted'}]>"

    def __len__(self) -> int:
        """Return how many buckets are remembered."""
        return sum(map(len, [*self._current.values(), *self._earlier.values()]))

    def get(self, charge: Charge) -> CachedDebt | None:
        """Return the last reading of a bucket."""
        table = self._current.get(charge.quota.burst_ns)
        return table.get(charge.key) if table is not None else None

    def tat(self, charge: Charge, now_ns: int) -> int:
        """Return the TAT of a bucket by its last reading: never later than the true one."""
        cached = self.get(charge)
        return cached.earliest_ns(now_ns) if cached is not None else 0

    def last_tat(self, charge: Charge) -> int:
        """Return the TAT of a bucket by any reading, for want of anything better."""
        earlier = self._earlier.get(charge.quota.burst_ns)
        readings = self.get(charge), earlier.get(charge.key) if earlier is not None else None
        return max((one.asked_ns + one.debt_ns for one in readings if one is not None), default=0)

    def put(self, charge: Charge, debt_ns: int, asked_ns: int) -> None:
        """Keep what a bucket owed when the store was asked; it was asked at `asked_ns` or later."""
        if asked_ns <= self._valid_from_ns:
            return
        table = self._current.get(charge.quota.burst_ns)
        if table is None:
            table = TatTable(2 * charge.quota.burst_ns, self.limit)
            self._current[charge.quota.burst_ns] = table
        table.advance(asked_ns)
        cached = CachedDebt(asked_ns, self._clock_ns(), debt_ns)
        if charge.key in table.current:
            table.current[charge.key] = cached
        else:
            table.put(charge.key, cached)

    def drop(self, key: str) -> int:
        """Forget a bucket, also in replies that are under way. Returns the time of it."""
        for table in self._current.values():
            table.drop(key)
        self._valid_from_ns = self._clock_ns()
        return self._valid_from_ns

    def renew(self, *, is_trusted: bool) -> None:
        """Begin anew: what was read so far is no longer trusted. `is_trusted` holds for what is read from now on."""
        self.is_trusted = is_trusted
        self._valid_from_ns = self._clock_ns()
        for burst_ns, table in self._current.items():
            if len(table):
                self._earlier[burst_ns] = table
        self._current = {}
