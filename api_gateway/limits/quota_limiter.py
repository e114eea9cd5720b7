"""The limiter of a configuration with calendar quotas: buckets and counters are charged together or not at all.

Buckets are those of another limiter. Counters are in this process, so both are charged in one step that does not wait.
"""

from collections.abc import Callable, Sequence
from math import ceil

from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.quota_decisions import (
    counter_decision,
    joint_allowance,
    of_buckets,
    of_counters,
    refusal_of,
    without_counters,
)
from api_gateway.limits.quota_state import MICROSECONDS, PeriodQuota, QuotaCounter, QuotaState, QuotaWarning
from api_gateway.models import Charge, Clock, Decision, LimiterState, Quota
from api_gateway.rate_limiter import MemoryLimiter, debts_of

OnWarned = Callable[[Sequence[QuotaWarning]], None]
_Present = tuple[Charge, QuotaCounter, int, int]  # with what is used after the charge, and the allowance


class QuotaLimiter:
    """Charges buckets of `limiter`, and counters of calendar quotas. Implements `RateLimiter`."""

    def __init__(
        self,
        limiter: MemoryLimiter,
        counters: PeriodCounters,
        *,
        wall_clock: Clock,
        on_warned: OnWarned = lambda _: None,
    ) -> None:
        """`on_warned` is called with the shares of allowances that a request has reached."""
        self.buckets = limiter
        self.counters = counters
        self._held = counters.counters
        self._wall_clock = wall_clock
        self._on_warned = on_warned

    def __repr__(self) -> str:
        return f"<QuotaLimiter of {self.buckets!r} and {self.counters!r}>"

    def __len__(self) -> int:
        return len(self.buckets) + len(self.counters)

    @property
    def bucket_limit(self) -> int:
        """Maximum number of buckets."""
        return self.buckets.bucket_limit

    @property
    def overflowed(self) -> int:
        """Number of decisions on shared buckets and counters."""
        return self.buckets.overflowed + self.counters.overflowed

    @overflowed.setter
    def overflowed(self, _: int) -> None:
        raise AttributeError("the limiters count")

    def state(self) -> LimiterState:
        """Return the state of the limiter of the buckets."""
        return self.buckets.state()

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Charge all buckets and counters, or none.

        Most counters are in a simple state, see `_present`; any other state is left to `decide_in_any_state`.
        """
        now_us = ceil(self._wall_clock() * MICROSECONDS)
        tokens: list[Charge] = []
        present = self._present(charges, tokens, now_us // MICROSECONDS)
        if present is None:
            decision = self.decide_in_any_state(charges, now_us, now_ns)
            decision.wall_us = now_us
            return decision
        decision = self.buckets.decide(tokens, now_ns)
        if present:
            decision.wall_us = now_us
            if decision.allowed:
                self._charge(charges, tokens, present, decision, now_us)
            else:
                decision.violated = decision.violated or (decision.quota,)
                decision.left = tuple([allowance - used + one.increment_ns for one, _, used, allowance in present])
        return decision

    def _present(self, charges: Sequence[Charge], tokens: list[Charge], now: int) -> list[_Present] | None:
        """Return the charges of counters if all of these are in the simple state, else None; add others to `tokens`.

        In that state the latest count is that of the current period and allows the charge, there are no top-ups, and
        no share to be warned of is reached. Then a charge changes `used` and `peak` alone.
        """
        held, present = self._held, []
        for charge in charges:
            quota = charge.quota
            if type(quota) is not PeriodQuota:
                tokens.append(charge)
                continue
            counter = held.get(charge.key)
            if counter is None or counter.balance or counter.unit != quota.calendar.unit:
                return None
            count = counter.count
            used, allowance = count.used + charge.increment_ns, quota.burst_ns + count.carried
            if used > allowance or not count.start <= now < counter.end:
                return None
            if quota.warn_at and max(used, count.peak) >= quota.warn_at[0] * allowance:
                return None
            present.append((charge, counter, used, allowance))
        return present

    def _charge(
        self,
        charges: Sequence[Charge],
        tokens: Sequence[Charge],
        present: Sequence[_Present],
        decision: Decision,
        now_us: int,
    ) -> None:
        """Charge counters in the simple state, and make the decision of the buckets that of the tightest of all."""
        left, cost = decision.quota.burst_ns - decision.reset_ns, tokens[0].increment_ns
        if len(tokens) > 1:
            cost = _increment_of(decision.key, tokens)
        debts_ns = decision.debts_ns or (decision.reset_ns,)
        for charge, counter, used, allowance in present:
            increment, count = charge.increment_ns, counter.count
            if increment:
                count.used = used
                if used > count.peak:  # noqa: PLR1730 - half the time of a call of `max`
                    count.peak = used
                self.counters.changed.add(charge.key)
            if (allowance - used) * cost < left * increment:  # as `joint_allowance` does
                left, cost, quota = allowance - used, increment, charge.quota
                decision.key, decision.quota = charge.key, quota
                decision.remaining = left // quota.emission_ns
                decision.reset_ns = (counter.end * MICROSECONDS - now_us) * 1000
        if len(present) == 1 and charge is charges[-1]:
            decision.debts_ns, decision.left = (*debts_ns, count.start), (allowance - used,)
            return
        decision.left = tuple([allowance - used for _, _, used, allowance in present])
        starts = [counter.count.start for _, counter, _, _ in present]
        if present[0][0] is charges[len(tokens)]:  # the counters are behind the buckets, as usual
            decision.debts_ns = (*debts_ns, *starts)
        else:
            decision.debts_ns = _in_order(charges, debts_ns, starts)

    def decide_in_any_state(self, charges: Sequence[Charge], now_us: int, now_ns: int) -> Decision:
        """Charge all buckets and counters, or none; `decide` is the same in less time for most requests."""
        counted = of_counters(charges)
        standings = self._standings(counted, now_us)
        for (charge, _), standing in zip(counted, standings, strict=True):
            if standing.wait_us(charge.increment_ns, now_us):
                return self._refusal(charges, now_us, now_ns)
        decision = self.buckets.decide(of_buckets(charges), now_ns)
        if not decision.allowed:
            decision.violated = decision.violated or (decision.quota,)
            decision.left = tuple([standing.left for standing in standings])
            return decision
        warned: list[QuotaWarning] = []
        for (charge, _), standing in zip(counted, standings, strict=True):
            warned += self.counters.charge(standing, charge.increment_ns, now_us)
        if warned:
            self._on_warned(warned)
        return joint_allowance(charges, decision, self._standings(counted, now_us), now_us)

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Decide at once. Not used, because `decide` never returns None."""
        on_decision(self.decide(charges, now_ns))

    def refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Return the refusal of a request, None if it would be allowed; see `RateLimiter.refusal`."""
        now_us = self.now_us()
        if all(decision.allowed for decision in self._previews(charges, now_us, now_ns)):
            return None
        decision = self.decide_in_any_state(charges, now_us, now_ns)
        decision.wall_us = now_us
        return decision

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return each decision on its charge alone, without charging it."""
        return self._previews(charges, self.now_us(), now_ns)

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Settle a decision of this limiter; counters are corrected in the period that was charged."""
        counted = of_counters(changes)
        if not counted:
            return self.buckets.settle(changes, decision, now_ns, settled_to)
        starts = debts_of(decision)
        after = self.buckets.settle(
            of_buckets(changes), without_counters(decision, changes), now_ns, of_buckets(settled_to)
        )
        now_us = self.now_us()
        warned: list[QuotaWarning] = []
        for change, start in zip(changes, starts, strict=True):
            if isinstance(change.quota, PeriodQuota) and change.increment_ns:
                warned += self.counters.settle(
                    change.key,
                    change.quota,
                    change.increment_ns,
                    start,
                    now_us,
                    is_unverified=change.is_unverified,
                )
        if warned:
            self._on_warned(warned)
        return joint_allowance(settled_to or changes, after, self._standings(counted, now_us), now_us, starts)

    async def refill(self, key: str) -> None:
        """Fill a bucket to its capacity."""
        await self.buckets.refill(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; it keeps its filled fraction."""
        await self.buckets.move(key, old, new, now_ns)

    def now_us(self) -> int:
        """Return the wall clock in microseconds, rounded up, so that a rounded second is not before its beginning."""
        return ceil(self._wall_clock() * MICROSECONDS)

    def _standings(self, counted: Sequence[tuple[Charge, PeriodQuota]], now_us: int) -> list[QuotaState]:
        return [self._standing(charge, quota, now_us) for charge, quota in counted]

    def _standing(self, charge: Charge, quota: PeriodQuota, now_us: int) -> QuotaState:
        return self.counters.standing(charge.key, quota, now_us, is_unverified=charge.is_unverified)

    def _refusal(self, charges: Sequence[Charge], now_us: int, now_ns: int) -> Decision:
        """Return the longest refusal, of the counters and of the buckets."""
        return refusal_of(self._previews(charges, now_us, now_ns), charges)

    def _previews(self, charges: Sequence[Charge], now_us: int, now_ns: int) -> list[Decision]:
        return [
            counter_decision(charge, self._standing(charge, charge.quota, now_us), now_us, now_ns)
            if isinstance(charge.quota, PeriodQuota)
            else self.buckets.preview(charge, now_ns)
            for charge in charges
        ]


def _in_order(charges: Sequence[Charge], debts_ns: Sequence[int], starts: Sequence[int]) -> tuple[int, ...]:
    """Return the debts of buckets and the starts of periods in the order of the charges."""
    buckets, counters = iter(debts_ns), iter(starts)
    return tuple([next(counters) if type(one.quota) is PeriodQuota else next(buckets) for one in charges])


def _increment_of(key: str, charges: Sequence[Charge]) -> int:
    for charge in charges:
        if charge.key == key:
            return charge.increment_ns
    return 0
