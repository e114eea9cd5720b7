"""The limiter of a configuration with calendar quotas: buckets and counters are charged together or not at all.

Buckets are those of another limiter. Counters are in this process, so both are charged in one step that does not wait.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from api_gateway.limits.period_counters import MICROSECONDS, PeriodCounters, PeriodQuota, Standing, Warned
from api_gateway.models import Charge, Clock, Decision, LimiterState, Notice, Quota
from api_gateway.rate_limiter import NEVER_NS, MemoryLimiter, debts_of

OnWarned = Callable[[Sequence[Warned]], None]


class QuotaLimiter:
    """Charges buckets of `limiter`, and counters of calendar quotas. Implements `RateLimiter`.

    A charge whose quota is a `PeriodQuota` is one of a counter. In the `debts_ns` of a decision, the value of such a
    charge is the start of the period that was charged, in seconds since the epoch.
    """

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
        buckets = [charge for charge in charges if not isinstance(charge.quota, PeriodQuota)]
        if len(buckets) == len(charges):
            return self.buckets.decide(charges, now_ns)
        now_us = self._now_us()
        standings = self._standings(charges, now_us)
        refused = [
            one
            for charge, one in zip(_of_counters(charges), standings, strict=True)
            if one.wait_us(charge.increment_ns, now_us)
        ]
        if refused:
            return self._refusal(charges, standings, now_us, now_ns)
        decision = self.buckets.decide(buckets, now_ns)
        if not decision.allowed:
            if not decision.violated:
                decision.violated = (decision.quota,)
            return decision
        warned: list[Warned] = []
        for charge, one in zip(_of_counters(charges), standings, strict=True):
            warned += self.counters.charge(one, charge.increment_ns, now_us)
        if warned:
            self._on_warned(warned)
        return self._joined(charges, decision, now_us)

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Decide at once. Not used, because `decide` never returns None."""
        on_decision(self.decide(charges, now_ns))

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return each decision on its charge alone, without charging it."""
        return [self._preview(charge, self._now_us(), now_ns) for charge in charges]

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Settle a decision of this limiter; what was charged to a counter is corrected in the period of the charge."""
        kinds = [isinstance(change.quota, PeriodQuota) for change in changes]
        if True not in kinds:
            return self.buckets.settle(changes, decision, now_ns, settled_to)
        debts = debts_of(decision)
        of_buckets = replace(
            decision, debts_ns=tuple(debt for debt, is_period in zip(debts, kinds, strict=True) if not is_period)
        )
        left = [charge for charge in settled_to if not isinstance(charge.quota, PeriodQuota)]
        buckets = [change for change, is_period in zip(changes, kinds, strict=True) if not is_period]
        after = self.buckets.settle(buckets, of_buckets, now_ns, left)
        now_us = self._now_us()
        warned: list[Warned] = []
        for change, start in zip(changes, debts, strict=True):
            if isinstance(change.quota, PeriodQuota) and change.increment_ns:
                warned += self.counters.settle(change.key, change.quota, change.increment_ns, start, now_us)
        if warned:
            self._on_warned(warned)
        return self._joined(settled_to or changes, after, now_us, debts)

    async def refill(self, key: str) -> None:
        """Fill a bucket to its capacity."""
        await self.buckets.refill(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; it keeps its filled fraction."""
        await self.buckets.move(key, old, new, now_ns)

    def _standings(self, charges: Sequence[Charge], now_us: int) -> list[Standing]:
        return [
            self.counters.standing(charge.key, charge.quota, now_us)
            for charge in charges
            if isinstance(charge.quota, PeriodQuota)
        ]

    def _refusal(self, charges: Sequence[Charge], standings: Sequence[Standing], now_us: int, now_ns: int) -> Decision:
        """Return the longest refusal, of the counters and of the buckets."""
        known = iter(standings)
        decisions = [
            _decision(charge, next(known), now_us, now_ns)
            if isinstance(charge.quota, PeriodQuota)
            else self.buckets.preview(charge, now_ns)
            for charge in charges
        ]
        refusals = [decision for decision in decisions if not decision.allowed]
        longest = max(refusals, key=lambda one: (one.wait_ns == NEVER_NS, one.wait_ns))
        longest.violated = tuple([decision.quota for decision in refusals])
        return longest

    def _preview(self, charge: Charge, now_us: int, now_ns: int) -> Decision:
        if not isinstance(charge.quota, PeriodQuota):
            return self.buckets.preview(charge, now_ns)
        return _decision(charge, self.counters.standing(charge.key, charge.quota, now_us), now_us, now_ns)

    def _joined(
        self, charges: Sequence[Charge], decision: Decision, now_us: int, charged: Sequence[int] = ()
    ) -> Decision:
        """Return the decision of the tightest bucket or counter, after all were charged or settled.

        `charged` has the starts of the periods that were charged, instead of the present ones.
        """
        tightest = decision
        debts_of_buckets = iter(debts_of(decision))
        left = decision.quota.burst_ns - decision.reset_ns
        cost = next((charge.increment_ns for charge in charges if charge.key == decision.key), 0)
        debts, notices = [], []
        for index, charge in enumerate(charges):
            quota = charge.quota
            if not isinstance(quota, PeriodQuota):
                debts.append(next(debts_of_buckets))
                continue
            standing = self.counters.standing(charge.key, quota, now_us)
            debts.append(charged[index] if charged else standing.count.start)
            if standing.count.warned:
                notices.append(standing)
            if standing.left * cost < left * charge.increment_ns:
                left, cost = standing.left, charge.increment_ns
                tightest = _decision(charge, standing, now_us, decision.at_ns)
        if tightest is not decision:
            tightest.allowed, tightest.wait_ns, tightest.source = True, 0, decision.source
        tightest.debts_ns = tuple(debts)
        tightest.notices = tuple([_notice(standing, now_us) for standing in notices])
        return tightest

    def _now_us(self) -> int:
        """Return the wall clock in microseconds, rounded up, so that a rounded second is not before its beginning."""
        return math.ceil(self._wall_clock() * MICROSECONDS)


def _of_counters(charges: Sequence[Charge]) -> list[Charge]:
    return [charge for charge in charges if isinstance(charge.quota, PeriodQuota)]


def _decision(charge: Charge, standing: Standing, now_us: int, now_ns: int) -> Decision:
    wait_us = standing.wait_us(charge.increment_ns, now_us)
    quota = charge.quota
    return Decision(
        charge.key,
        quota,
        wait_us == 0,
        max(standing.left, 0) // quota.emission_ns,
        wait_us * 1000 if wait_us > 0 else wait_us,
        (standing.end * MICROSECONDS - now_us) * 1000,
        now_ns,
    )


def _notice(standing: Standing, now_us: int) -> Notice:
    """Return the notice of the last share that was reached."""
    quota = standing.quota
    return Notice(
        quota.policy,
        quota.warn_at[min(standing.count.warned, len(quota.warn_at)) - 1],
        max(standing.left, 0) // quota.emission_ns,
        standing.end - now_us // MICROSECONDS,
    )
