"""The deny cache: the store's last results, by which some requests are refused without a query. It admits none."""

from collections.abc import Callable
from typing import NamedTuple

from api_gateway.models import Charge
from api_gateway.rate_limiter import TatTable

CLOCK_SKEW_DIVISOR = 1000  # the speeds of two clocks differ by less than 1/CLOCK_SKEW_DIVISOR
TICK_NS = 1000  # resolution of the store's clock


class CachedDebt(NamedTuple):
    """A bucket's debt at some time between the query and the response, on this process's clock."""

    asked_ns: int
    received_ns: int
    debt_ns: int

    def earliest_ns(self, now_ns: int) -> int:
        """Return the earliest possible TAT: the store read the bucket at once, and its clock is fast."""
        return self.asked_ns + self.debt_ns - (now_ns - self.asked_ns) // CLOCK_SKEW_DIVISOR

    def latest_ns(self, now_ns: int) -> int:
        """Return the latest possible TAT: the store read the bucket last, and its clock is slow."""
        return self.received_ns + self.debt_ns + (now_ns - self.asked_ns) // CLOCK_SKEW_DIVISOR + TICK_NS


class DenyCache:
    """Readings of the store by bucket, at most `limit` for each length of budget.

    Two states: `is_trusted` while notifications of refunds by other processes are received, else refunds may have been
    missed, and refusals from the cache are not certain. `renew` changes the state and moves all readings to the
    earlier ones, which serve only as an estimate for the policy that decides while the store is unavailable.
    """

    def __init__(self, limit: int, clock_ns: Callable[[], int]) -> None:
        self.limit = limit
        self.is_trusted = False
        self._clock_ns = clock_ns
        # By the length of a bucket's budget: a reading is not valid after a change of tier.
        self._current: dict[int, TatTable[CachedDebt]] = {}
        self._earlier: dict[int, TatTable[CachedDebt]] = {}  # refunds may have been missed since
        self._valid_from_ns = 0  # readings queried at this time or before are ignored

    def __repr__(self) -> str:
        return f"<DenyCache [{len(self)} buckets{'' if self.is_trusted else ', not trusted'}]>"

    def __len__(self) -> int:
        """Return the number of readings held."""
        return sum(map(len, [*self._current.values(), *self._earlier.values()]))

    def get(self, charge: Charge) -> CachedDebt | None:
        """Return the last reading of a bucket; None if there is none."""
        table = self._current.get(charge.quota.burst_ns)
        return table.get(charge.key) if table is not None else None

    def tat(self, charge: Charge, now_ns: int) -> int:
        """Return a bucket's TAT by its last reading, never later than the true one; 0 without a reading."""
        cached = self.get(charge)
        return cached.earliest_ns(now_ns) if cached is not None else 0

    def last_tat(self, charge: Charge) -> int:
        """Return an estimate of a bucket's TAT by any reading, also earlier ones; 0 without any."""
        earlier = self._earlier.get(charge.quota.burst_ns)
        readings = self.get(charge), earlier.get(charge.key) if earlier is not None else None
        return max((one.asked_ns + one.debt_ns for one in readings if one is not None), default=0)

    def put(self, charge: Charge, debt_ns: int, asked_ns: int) -> None:
        """Store a bucket's debt, which the store returned to a query that was sent at `asked_ns`."""
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
        """Remove a bucket, and ignore responses that are still to arrive. Returns the current time."""
        for table in self._current.values():
            table.drop(key)
        self._valid_from_ns = self._clock_ns()
        return self._valid_from_ns

    def forget(self, key: str) -> None:
        """Remove a bucket that was filled; earlier readings no longer count either."""
        self.drop(key)
        for table in self._earlier.values():
            table.drop(key)

    def renew(self, *, is_trusted: bool) -> None:
        """Demote all readings to earlier ones; `is_trusted` applies to the readings from now on."""
        self.is_trusted = is_trusted
        self._valid_from_ns = self._clock_ns()
        for burst_ns, table in self._current.items():
            if len(table):
                self._earlier[burst_ns] = table
        self._current = {}
