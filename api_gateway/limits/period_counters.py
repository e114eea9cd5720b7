"""The table of calendar quotas in memory: a counter for each client and quota, in bounded number.

The arithmetic is that of `quota_state`; nothing here reads a clock or waits.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from api_gateway.limits.quota_state import (
    MICROSECONDS,
    PeriodQuota,
    QuotaCount,
    QuotaCounter,
    QuotaState,
    QuotaWarning,
    attach,
    is_past,
    settle,
    standing_of,
    use,
)

OVERFLOW_COUNTERS = 4096
_SWEEP = 2  # counters inspected for each one added: more than one, so that ended ones do not accumulate


@dataclass(slots=True)
class PeriodCounters:
    """Counters by key: at most `limit` of verified keys, and as many of unverified ones (see `Charge`).

    Beyond that, new keys of a kind share `OVERFLOW_COUNTERS` counters of each quota, selected by hash: a shared
    counter admits no more for all its keys together than for one. The kinds share nothing, so invented keys
    take neither room nor tokens from verified ones. A key whose client is registered meanwhile keeps its
    counter.

    `unverified` is the number of counters of unverified keys. `changed` are the keys that were changed since the last
    call of `take_changed`; shared counters are not among them.
    """

    limit: int
    overflowed: int = 0
    unverified: int = 0
    counters: dict[str, QuotaCounter] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    _overflow: dict[tuple[str, int, bool], QuotaCounter] = field(default_factory=dict)
    _order: deque[str] = field(default_factory=deque)

    def __repr__(self) -> str:
        verified = len(self) - self.unverified
        return (
            f"<PeriodCounters [{verified} verified and {self.unverified} other keys, each of {self.limit},"
            f" {self.overflowed} overflowed]>"
        )

    def __len__(self) -> int:
        return len(self.counters)

    def standing(self, key: str, quota: PeriodQuota, now_us: int, *, is_unverified: bool = False) -> QuotaState:
        """Return the counter of a key at an instant; nothing is changed."""
        counter = self.counters.get(key)
        if counter is None and self._overflow:
            counter = self._overflow.get(_slot(key, quota, is_unverified))
        standing = standing_of(key, quota, counter, now_us // MICROSECONDS)
        standing.is_unverified = is_unverified
        return standing

    def charge(self, standing: QuotaState, cost: int, now_us: int) -> list[QuotaWarning]:
        """Charge a cost that the standing allows, in the callback that determined it; return the due warnings."""
        if not cost:
            return []
        self._attach(standing)
        self.changed.add(standing.key)
        return use(standing, cost, now_us // MICROSECONDS)

    def settle(
        self,
        key: str,
        quota: PeriodQuota,
        change: int,
        start: int,
        now_us: int,
        *,
        is_unverified: bool = False,
    ) -> list[QuotaWarning]:
        """Charge (above 0) or refund (below 0) the difference of a cost that was charged in the period from `start`.

        Never refuses: the allowance may be exceeded by up to a second one. What was charged in a period that the
        counter no longer keeps is not refunded, and a charge is then made in the current period. If counts have begun
        anew since the charge, with another unit of periods, nothing is changed.
        """
        held = self.counters.get(key)
        if held is not None and held.unit != quota.calendar.unit:
            return []
        standing = self.standing(key, quota, now_us, is_unverified=is_unverified)
        kept = standing.kept(start) if key in self.counters else None
        if change > 0 and kept is None:
            self._attach(standing)
        warned = settle(standing, kept, change, now_us // MICROSECONDS)
        if change > 0 or kept is not None:
            self.changed.add(key)
        return warned

    def top_up(self, key: str, quota: PeriodQuota, amount: int, until: int, now_us: int) -> QuotaCounter:
        """Add to the balance that is used when the allowance is used up, and that can be used until `until` or later.

        A balance that has expired is lost; of two ends, the later one applies to the whole balance.
        """
        now = now_us // MICROSECONDS
        standing = self.standing(key, quota, now_us)
        self._attach(standing)
        counter = standing.counter
        valid = counter.valid_balance(now)
        counter.until = max(until, counter.until) if valid else until
        counter.balance = valid + amount
        self.changed.add(key)
        return counter

    def carry(self, key: str, quota: PeriodQuota, amount: int, now_us: int) -> QuotaCounter:
        """Set what was carried over to the current period."""
        standing = self.standing(key, quota, now_us)
        self._attach(standing).carried = amount
        self.changed.add(key)
        return standing.counter

    def reset(self, key: str, quota: PeriodQuota, now_us: int) -> None:
        """Set the used tokens of the current period to 0; used top-ups are not given back."""
        standing = self.standing(key, quota, now_us)
        count = self._attach(standing)
        count.used = count.peak = 0
        standing.counter.resets += 1
        self.changed.add(key)

    def take_changed(self) -> list[tuple[str, QuotaCounter]]:
        """Return the counters that were changed since the last call."""
        changed, self.changed = self.changed, set()
        return [(key, self.counters[key]) for key in changed if key in self.counters]

    def restore(self, stored: Iterable[tuple[str, QuotaCounter]]) -> None:
        """Add counters that were stored, up to the limits."""
        for key, counter in stored:
            if self._has_room(is_unverified=counter.is_unverified):
                self._put(key, counter)

    def _attach(self, standing: QuotaState) -> QuotaCount:
        """Attach the count of a standing to its counter, and the counter to the table."""
        counter = standing.counter
        if attach(standing):
            counter.is_unverified = standing.is_unverified
            self._add(standing.key, standing.quota, counter)
        elif counter.is_unverified and not standing.is_unverified and self._has_room(is_unverified=False):
            counter.is_unverified = False  # its client has been registered meanwhile
            self.unverified -= 1
        return standing.count

    def _has_room(self, *, is_unverified: bool) -> bool:
        return (self.unverified if is_unverified else len(self.counters) - self.unverified) < self.limit

    def _put(self, key: str, counter: QuotaCounter) -> None:
        held = self.counters.get(key)
        if held is None:
            self._order.append(key)
        else:
            self.unverified -= held.is_unverified
        self.counters[key] = counter
        self.unverified += counter.is_unverified

    def _add(self, key: str, quota: PeriodQuota, counter: QuotaCounter) -> None:
        now = counter.count.start
        for _ in range(min(_SWEEP, len(self._order))):
            oldest = self._order.popleft()
            held = self.counters.get(oldest)
            if held is not None and not is_past(held, now):
                self._order.append(oldest)
            elif held is not None:
                del self.counters[oldest]
                self.unverified -= held.is_unverified
        if key in self.counters or self._has_room(is_unverified=counter.is_unverified):
            self._put(key, counter)
        else:
            self._overflow[_slot(key, quota, counter.is_unverified)] = counter
            self.overflowed += 1


def _slot(key: str, quota: PeriodQuota, is_unverified: bool) -> tuple[str, int, bool]:  # noqa: FBT001 - part of a key
    return quota.name, hash(key) % OVERFLOW_COUNTERS, is_unverified
