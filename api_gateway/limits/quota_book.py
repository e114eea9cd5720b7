"""Where operators read and change the counters of calendar quotas: in this process, or in the store."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from api_gateway.errors import ChangeUnconfirmed
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.period_store import CounterRow, PeriodJournal, row_of
from api_gateway.limits.quota_state import MICROSECONDS, Adjustment, PeriodQuota, QuotaCounter, QuotaState, standing_of

if TYPE_CHECKING:
    from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter


class QuotaBook(Protocol):
    """Counters by key. A change is stored when it is confirmed. `look` and `adjust` raise StoreUnavailable.

    `adjust` raises ChangeUnconfirmed if the change may have been made.
    """

    def keys(self) -> list[str]:
        """Return the keys of the counters in this process; empty if they are in the store."""
        ...

    def rows(self) -> list[CounterRow]:
        """Return the counters in this process as rows of their file, in one step; empty if they are in the store."""
        ...

    async def look(self, key: str, quota: PeriodQuota, *, is_unverified: bool = False) -> tuple[QuotaState, int]:
        """Return a counter as it is now, and the time in seconds since the epoch. `is_unverified`: see `Charge`."""
        ...

    async def adjust(self, key: str, quota: PeriodQuota, adjustment: Adjustment) -> tuple[QuotaState, int]:
        """Change a counter; return as `look`.

        A new one has the room of verified keys, because an operator has named it.
        """
        ...


class LocalBook:
    """The counters of this process, and their file. Implements `QuotaBook`."""

    def __init__(self, counters: PeriodCounters, journal: PeriodJournal, now_us: Callable[[], int]) -> None:
        self._counters = counters
        self._journal = journal
        self._now_us = now_us

    def __repr__(self) -> str:
        return f"<LocalBook of {self._counters!r}>"

    def keys(self) -> list[str]:
        """See `QuotaBook`."""
        return list(self._counters.counters)

    def rows(self) -> list[CounterRow]:
        """See `QuotaBook`."""
        return [row_of(key, counter) for key, counter in self._counters.counters.items()]

    async def look(self, key: str, quota: PeriodQuota, *, is_unverified: bool = False) -> tuple[QuotaState, int]:
        """See `QuotaBook`."""
        now_us = self._now_us()
        return self._counters.standing(key, quota, now_us, is_unverified=is_unverified), now_us // MICROSECONDS

    async def adjust(self, key: str, quota: PeriodQuota, adjustment: Adjustment) -> tuple[QuotaState, int]:
        """See `QuotaBook`."""
        now_us = self._now_us()
        if adjustment.amount:
            self._counters.top_up(key, quota, adjustment.amount, adjustment.until, now_us)
        if adjustment.carried >= 0:
            self._counters.carry(key, quota, adjustment.carried, now_us)
        if adjustment.is_reset:
            self._counters.reset(key, quota, now_us)
        await self._journal.write()
        if self._journal.error is not None:
            raise ChangeUnconfirmed(
                f"The change applies, but is not stored yet: {self._journal.error}.", retry_after=1
            )
        return await self.look(key, quota)


class StoreBook:
    """The counters in the store. Implements `QuotaBook`."""

    def __init__(self, limiter: "StoreQuotaLimiter") -> None:
        self._limiter = limiter

    def __repr__(self) -> str:
        return f"<StoreBook of {self._limiter!r}>"

    def keys(self) -> list[str]:
        """See `QuotaBook`."""
        return []

    def rows(self) -> list[CounterRow]:
        """See `QuotaBook`."""
        return []

    async def look(
        self,
        key: str,
        quota: PeriodQuota,
        *,
        is_unverified: bool = False,  # noqa: ARG002 - the store has room for all
    ) -> tuple[QuotaState, int]:
        """See `QuotaBook`."""
        return _standing(key, quota, *await self._limiter.counter(key, quota))

    async def adjust(self, key: str, quota: PeriodQuota, adjustment: Adjustment) -> tuple[QuotaState, int]:
        """See `QuotaBook`."""
        standing, now = _standing(key, quota, *await self._limiter.counter(key, quota, adjustment))
        if adjustment.is_reset:
            await self._limiter.publish_reset(key, standing.counter.resets)
        return standing, now


def _standing(key: str, quota: PeriodQuota, counter: QuotaCounter | None, clock_us: int) -> tuple[QuotaState, int]:
    now = clock_us // MICROSECONDS
    return standing_of(key, quota, counter, now), now
