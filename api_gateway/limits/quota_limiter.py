"""The limiter of a configuration with calendar quotas: buckets and counters are charged together or not at all.

Buckets are those of another limiter. Counters are in this process, so both are charged in one step that does not wait.
"""

from collections.abc import Callable, Sequence
from math import ceil

from api_gateway.limits.period_counters import MICROSECONDS, Counter, PeriodCounters, PeriodQuota, Standing, Warned
from api_gateway.limits.quota_decisions import (
    counter_decision,
    joint_allowance,
    of_buckets,
    of_counters,
    refusal_of,
    without_counters,
)
from api_gateway.models import Charge, Clock, Decision, LimiterState, Quota
from api_gateway.rate_limiter import MemoryLimiter, debts_of

OnWarned = Callable[[Sequence[Warned]], None]


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
        """Charge all buckets and counters, or none."""
        tokens = [charge for charge in charges if type(charge.quota) is not PeriodQuota]
        if len(tokens) == len(charges):
            return self.buckets.decide(charges, now_ns)
        now_us = ceil(self._wall_clock() * MICROSECONDS)
        present = self.counters.present(charges, now_us // MICROSECONDS)
        if present is None:
            decision = self.decide_in_any_state(charges, now_us, now_ns)
            decision.wall_us = now_us
            return decision
        decision = self.buckets.decide(tokens, now_ns)
        decision.wall_us = now_us
        if not decision.allowed:
            decision.violated = decision.violated or (decision.quota,)
            return decision
        left, cost = decision.quota.burst_ns - decision.reset_ns, tokens[0].increment_ns
        if len(tokens) > 1:
            cost = next(charge.increment_ns for charge in tokens if charge.key == decision.key)
        decision.debts_ns = self._charge(charges, present, decision.debts_ns or (decision.reset_ns,))
        for charge, counter in present:  # as `joint_allowance` does
            count, increment, quota = counter.count, charge.increment_ns, charge.quota
            rest = quota.burst_ns + count.carried - count.used
            if rest * cost < left * increment:
                left, cost, decision.key, decision.quota = rest, increment, charge.key, quota
                decision.remaining = rest // quota.emission_ns
                decision.reset_ns = (counter.end * MICROSECONDS - now_us) * 1000
        return decision

    def _charge(
        self, charges: Sequence[Charge], present: Sequence[tuple[Charge, Counter]], debts_ns: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Charge counters in the simple state (see `PeriodCounters.present`).

        `debts_ns` are those of the buckets; returns those of all charges.
        """
        for charge, counter in present:
            if charge.increment_ns:
                count = counter.count
                count.used = used = count.used + charge.increment_ns
                count.peak = max(count.peak, used)
                self.counters.changed.add(charge.key)
        if len(present) == 1 and present[0][0] is charges[-1]:
            return (*debts_ns, present[0][1].count.start)
        buckets, counters = iter(debts_ns), iter(present)
        return tuple(
            [next(counters)[1].count.start if type(one.quota) is PeriodQuota else next(buckets) for one in charges]
        )

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
            return decision
        warned: list[Warned] = []
        for (charge, _), standing in zip(counted, standings, strict=True):
            warned += self.counters.charge(standing, charge.increment_ns, now_us)
        if warned:
            self._on_warned(warned)
        return joint_allowance(charges, decision, self._standings(counted, now_us), now_us)

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Decide at once. Not used, because `decide` never returns None."""
        on_decision(self.decide(charges, now_ns))

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
        warned: list[Warned] = []
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

    def _standings(self, counted: Sequence[tuple[Charge, PeriodQuota]], now_us: int) -> list[Standing]:
        return [self._standing(charge, quota, now_us) for charge, quota in counted]

    def _standing(self, charge: Charge, quota: PeriodQuota, now_us: int) -> Standing:
        return self.counters.standing(charge.key, quota, now_us, is_unverified=charge.is_unverified)

    def _refusal(self, charges: Sequence[Charge], now_us: int, now_ns: int) -> Decision:
        """Return the longest refusal, of the counters and of the buckets."""
        return refusal_of(self._previews(charges, now_us, now_ns))

    def _previews(self, charges: Sequence[Charge], now_us: int, now_ns: int) -> list[Decision]:
        return [
            counter_decision(charge, self._standing(charge, charge.quota, now_us), now_us, now_ns)
            if isinstance(charge.quota, PeriodQuota)
            else self.buckets.preview(charge, now_ns)
            for charge in charges
        ]
