"""The limiter of a configuration with calendar quotas whose buckets and counters are in a shared store.

One script call charges all buckets and counters of a request, or none; on a cluster, see `multi_node_quotas`. The
store's clock decides which period it is, so machines whose clocks differ share one period. While the store is
unavailable, the policy for outages decides: by `local_share`, each process admits its share of what was left by its
last reading. It is charged afterwards.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache

from api_gateway.errors import ChangeUnconfirmed, StoreUnavailable
from api_gateway.limits.fallback_limiter import decided_by
from api_gateway.limits.multi_node_quotas import MultiNodeQuotaCharge
from api_gateway.limits.quota_decisions import (
    counter_allowance,
    counter_decision,
    joint_allowance,
    of_buckets,
    of_counters,
    refusal_of,
    without_counters,
)
from api_gateway.limits.quota_ops import CorrectOp, CounterOp, QuotaChargeOp, UnreportedAmount
from api_gateway.limits.quota_state import (
    MICROSECONDS,
    Adjustment,
    PeriodQuota,
    QuotaCounter,
    QuotaState,
    QuotaWarning,
    attach,
    is_past,
    settle,
    standing_of,
)
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.models import NANOSECONDS, Charge, Clock, Decision, LimiterState, Quota
from api_gateway.rate_limiter import debts_of, joint_refusal
from api_gateway.storage.redis_session import StoreError


class StoreQuotaLimiter:
    """Charges buckets of `buckets`, and counters of calendar quotas in its store. Implements `RateLimiter`.

    `known` are the last readings of counters, at most as many as buckets; the oldest is dropped first. `owed` is what
    was admitted without the store, by key; limited in the same way.
    """

    def __init__(
        self,
        buckets: RedisLimiter,
        *,
        prefix: str,
        wall_clock: Clock,
        on_warned: Callable[[Sequence[QuotaWarning]], None] = lambda _: None,
    ) -> None:
        self.buckets = buckets
        self.known: dict[str, QuotaCounter] = {}
        self.owed: dict[str, UnreportedAmount] = {}
        self.generation = 0  # see `UnreportedAmount`
        buckets.on_reset = self.forget
        self.offset_us = 0  # of the store's clock, which is ahead of this process's by this time
        self.warn = on_warned
        self._prefix = prefix
        self._wall_clock = wall_clock
        self.counter_key = lru_cache(maxsize=65_536)(self._hashed)

    def __repr__(self) -> str:
        return f"<StoreQuotaLimiter of {self.buckets!r} [{len(self.known)} counters known, {len(self.owed)} owed]>"

    def __len__(self) -> int:
        return len(self.buckets) + len(self.known)

    @property
    def bucket_limit(self) -> int:
        """Maximum number of buckets."""
        return self.buckets.bucket_limit

    @property
    def overflowed(self) -> int:
        """Number of decisions on shared buckets."""
        return self.buckets.overflowed

    @overflowed.setter
    def overflowed(self, _: int) -> None:
        raise AttributeError("the limiter of the buckets counts")

    def state(self) -> LimiterState:
        """Return the state of the limiter of the buckets."""
        return self.buckets.state()

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Refuse from the cache of buckets, or decide by the policy for outages; None to ask the store."""
        if not of_counters(charges):
            return self.buckets.decide(charges, now_ns)
        if not self.buckets.batcher.is_usable:
            return self.decide_without_store(charges, may_be_charged=False)
        decision = self.buckets.decide(of_buckets(charges), now_ns)
        if decision is not None and not decision.violated:
            decision.violated = (decision.quota,)
        return None if decision is not None and self._may_refuse(charges) else decision

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """See `RateLimiter.decide_async`."""
        if not of_counters(charges):
            self.buckets.decide_async(charges, now_ns, on_decision)
        elif self.buckets.is_divided:
            MultiNodeQuotaCharge(self, charges, now_ns, on_decision).submit()
        else:
            self.buckets.batcher.submit(QuotaChargeOp(self, charges, now_ns, on_decision))

    def refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Return the refusal by the last readings or, without the store, by this process's share; None without one."""
        if not of_counters(charges):
            return self.buckets.refusal(charges, now_ns)
        if not self.buckets.batcher.is_usable:
            if self.buckets.policy != "local_share":
                return None
            shares = [*self._shares(charges), *self._bucket_shares(charges)]
            return None if all(share.allowed for share in shares) else self._refusal_of(shares)
        known, refusals = self.buckets.refusal(of_buckets(charges), now_ns), self.refusals(charges)
        if not refusals:
            return known
        refused = refusal_of(refusals)
        refused.source = "deny_cache"
        return refused if known is None else joint_refusal(known, refused)

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return each decision on its charge alone, without charging it."""
        buckets = iter(await self.buckets.inspect(of_buckets(charges), now_ns))
        return [
            await self._inspect(charge, charge.quota, now_ns)
            if isinstance(charge.quota, PeriodQuota)
            else next(buckets)
            for charge in charges
        ]

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Send the settlement to the store without waiting for it."""
        counted = of_counters(changes)
        if not counted:
            return self.buckets.settle(changes, decision, now_ns, settled_to)
        after = self.buckets.settle(
            of_buckets(changes), without_counters(decision, changes), now_ns, of_buckets(settled_to)
        )
        starts = debts_of(decision)
        standings = [
            self.correct(change, change.quota, decision, start)
            for change, start in zip(changes, starts, strict=True)
            if isinstance(change.quota, PeriodQuota)
        ]
        return joint_allowance(settled_to or changes, after, standings, self.store_us(), starts)

    def correct(self, change: Charge, quota: PeriodQuota, decision: Decision, start: int) -> QuotaState:
        """Charge or refund a difference in the period from `start`; return the standing after it."""
        now = self.store_time()
        if change.increment_ns and decision.source == "store":
            self.buckets.batcher.submit(CorrectOp(self, change.key, quota, change.increment_ns, start))
        elif change.increment_ns:
            self.owe(change.key, change.increment_ns, start, is_sent=False)
        standing = self._standing(change.key, quota, now)
        kept = standing.kept(start)
        if kept is None and change.increment_ns > 0:
            attach(standing)
            self.known[change.key] = standing.counter
        warned = settle(standing, kept, change.increment_ns, now)
        if warned:
            self.warn(warned)
        return standing_of(change.key, quota, standing.counter, now)

    async def refill(self, key: str) -> None:
        """Fill a bucket to its capacity."""
        await self.buckets.refill(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; it keeps its filled fraction."""
        await self.buckets.move(key, old, new, now_ns)

    async def counter(
        self, key: str, quota: PeriodQuota, adjustment: Adjustment | None = None
    ) -> tuple[QuotaCounter | None, int]:
        """Return a counter, after an adjustment, and the store's time in microseconds.

        Raises StoreUnavailable: ChangeUnconfirmed if there is an adjustment, which may have been made.
        """
        found: asyncio.Future[tuple[QuotaCounter | None, int]] = asyncio.get_running_loop().create_future()

        def on_counter(counter: QuotaCounter | None, clock_us: int) -> None:
            if not found.done():
                found.set_result((counter, clock_us))

        self.buckets.batcher.submit(CounterOp(self, key, quota, on_counter, adjustment))
        counter, clock_us = await found
        if clock_us < 0:
            if adjustment is not None:
                raise ChangeUnconfirmed(retry_after=1)
            raise StoreUnavailable("The store did not return the state of the quota.", retry_after=1)
        return counter, clock_us

    async def publish_reset(self, key: str, resets: int) -> None:
        """Have all processes that the store reaches forget what they admitted without it; others charge it later."""
        self.forget(key, resets)
        with suppress(*StoreError):
            await self.buckets.publish_reset(key, resets)

    def forget(self, key: str, resets: int) -> None:
        """Forget what was admitted without the store, and a reading from before a reset with this number."""
        self.buckets.forget(key)
        self.generation += 1
        self.owed.pop(key, None)
        known = self.known.get(key)
        if known is not None and known.resets < resets:
            del self.known[key]

    # See `quota_ops.CountersPort` and `multi_node_quotas.NodesPort`

    def decide_buckets(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Have the store decide on buckets alone."""
        self.buckets.decide_async(charges, now_ns, on_decision)

    def refund_buckets(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> None:
        """Refund what was charged to buckets."""
        back = [Charge(one.key, one.quota, -one.increment_ns, is_unverified=one.is_unverified) for one in charges]
        self.buckets.settle(back, decision, now_ns)

    def standing(self, key: str, quota: PeriodQuota) -> QuotaState:
        """Return the current standing by the last reading."""
        return self._standing(key, quota, self.store_time())

    def refusals(self, charges: Sequence[Charge]) -> list[Decision]:
        """Return the refusals of counters by their last readings."""
        now_us, now_ns = self.store_us(), self.buckets.clock_ns()
        found = [
            counter_decision(charge, self._standing(charge.key, quota, now_us // MICROSECONDS), now_us, now_ns)
            for charge, quota in of_counters(charges)
        ]
        return [decision for decision in found if not decision.allowed]

    def began(self, key: str) -> int | None:
        """Return when the first period of a key began, by the last reading."""
        known = self.known.get(key)
        return None if known is None or is_past(known, self.store_time()) else known.began

    def store_time(self) -> int:
        """Return the store's time in seconds, by the last reading."""
        return self.store_us() // MICROSECONDS

    def note(self, key: str, counter: QuotaCounter | None, clock_us: int) -> None:
        """Keep a reading."""
        self.offset_us = clock_us - self._now_us()
        self.known.pop(key, None)
        if counter is not None:
            self.known[key] = counter
            if len(self.known) > self.bucket_limit:
                del self.known[next(iter(self.known))]
            held = self.owed.get(key) if self.owed else None
            if held is not None and held.amount == held.sent and held.start < counter.count.start:
                del self.owed[key]  # the period has ended, and there is nothing to send

    def report_owed(self, key: str) -> UnreportedAmount | None:
        """Return the cost charged without the store that was not sent, which counts as sent from now on; else None."""
        held = self.owed.get(key) if self.owed else None
        if held is None or held.amount == held.sent:
            return None
        self.owed[key] = held._replace(sent=held.amount)
        return UnreportedAmount(held.start, held.amount - held.sent, generation=held.generation)

    def settle_owed(self, key: str, sent: UnreportedAmount, *, is_charged: bool) -> None:
        """Forget an amount that was sent, or, if the store has not charged it, send it again."""
        held = self.owed.get(key)
        if held is not None and held.start == sent.start and held.generation <= sent.generation:
            amount = held.amount - sent.amount if is_charged else held.amount
            self._keep(key, held._replace(amount=amount, sent=held.sent - sent.amount))

    def owe(self, key: str, change: int, start: int, *, is_sent: bool) -> None:
        """Note what a counter was charged without the store, which may have charged it if it `is_sent`."""
        held = self.owed.get(key)
        if held is None or held.start != start:  # of an earlier period: it no longer matters
            held = UnreportedAmount(start, generation=self.generation)
        sent = held.sent + (change if is_sent else 0)
        self._keep(key, held._replace(amount=held.amount + change, sent=sent))

    def decide_without_store(self, charges: Sequence[Charge], *, may_be_charged: bool) -> Decision:
        """Decide by the policy for outages: by `local_share`, by the share of what was left by the last reading."""
        now_ns, now_us = self.buckets.clock_ns(), self.store_us()
        of_tokens, counted = of_buckets(charges), of_counters(charges)
        if self.buckets.policy == "local_share":
            shares = self._shares(charges)
            if not all(share.allowed for share in shares):
                return self._refusal_of([*shares, *self._bucket_shares(charges)])
        if not of_tokens:
            return self._counter_without_store(*counted[0], now_ns, may_be_charged=may_be_charged)
        decision = self.buckets.decide_without_store(of_tokens, now_ns, may_be_charged=may_be_charged)
        if not decision.allowed:
            return decision
        standings = [
            self._charged(charge, quota, now_us // MICROSECONDS, may_be_charged=may_be_charged)
            for charge, quota in counted
        ]
        return joint_allowance(charges, decision, standings, now_us)

    def _counter_without_store(
        self, charge: Charge, quota: PeriodQuota, now_ns: int, *, may_be_charged: bool
    ) -> Decision:
        """Decide on a counter alone by the policy; its share has allowed the request."""
        if self.buckets.policy == "deny":
            return Decision(charge.key, quota, False, 0, NANOSECONDS, 0, now_ns, (), "deny")
        standing = self._charged(charge, quota, self.store_time(), may_be_charged=may_be_charged)
        decision = counter_allowance(charge, standing, self.store_us(), now_ns)
        decision.source = self.buckets.policy
        if decision.source == "local_share":
            decision.processes = self.buckets.fallback.processes
        return decision

    def _charged(self, charge: Charge, quota: PeriodQuota, now: int, *, may_be_charged: bool) -> QuotaState:
        """Note what the store is to be charged; return the standing after it, by `local_share` that of the share."""
        standing = self._standing(charge.key, quota, now)
        self.owe(charge.key, charge.increment_ns, standing.count.start, is_sent=may_be_charged)
        return self._share(charge.key, quota, now) if self.buckets.policy == "local_share" else standing

    def _shares(self, charges: Sequence[Charge]) -> list[Decision]:
        """Return the decision of this process's share of each counter."""
        now_us, now_ns = self.store_us(), self.buckets.clock_ns()
        return [
            counter_decision(charge, self._share(charge.key, quota, now_us // MICROSECONDS), now_us, now_ns)
            for charge, quota in of_counters(charges)
        ]

    def _bucket_shares(self, charges: Sequence[Charge]) -> list[Decision]:
        """Return the decision of this process's share of each bucket."""
        fallback, cache, now_ns = self.buckets.fallback, self.buckets.cache, self.buckets.clock_ns()
        return [fallback.inspect(charge, cache.last_tat(charge), now_ns) for charge in of_buckets(charges)]

    def _refusal_of(self, shares: Sequence[Decision]) -> Decision:
        refused = refusal_of(shares)
        refused.source = "local_share"
        refused.processes = self.buckets.fallback.processes
        return refused

    def _may_refuse(self, charges: Sequence[Charge]) -> bool:
        """Return whether a counter refuses a request, too, by the last readings: its wait may be the longer one."""
        now_us = self.store_us()
        return any(
            self._standing(charge.key, quota, now_us // MICROSECONDS).wait_us(charge.increment_ns, now_us)
            for charge, quota in of_counters(charges)
        )

    def _keep(self, key: str, held: UnreportedAmount) -> None:
        if held.amount or held.sent:
            self.owed[key] = held
            if len(self.owed) > self.bucket_limit:
                del self.owed[next(iter(self.owed))]
        else:
            self.owed.pop(key, None)

    def _share(self, key: str, quota: PeriodQuota, now: int) -> QuotaState:
        """Return the standing of this process's share: of what was left by the last reading, without what it owes."""
        standing = self._standing(key, quota, now)
        held = self.owed.get(key)
        standing.left = standing.left // self.buckets.fallback.processes
        if held is not None and held.start == standing.count.start:
            standing.left -= held.amount
        return standing

    def _standing(self, key: str, quota: PeriodQuota, now: int) -> QuotaState:
        return standing_of(key, quota, self.known.get(key), now)

    async def _inspect(self, charge: Charge, quota: PeriodQuota, now_ns: int) -> Decision:
        try:
            counter, clock_us = await self.counter(charge.key, quota)
        except StoreUnavailable:
            clock_us = self.store_us()
            standing = self._share(charge.key, quota, clock_us // MICROSECONDS)
            decision = counter_decision(charge, standing, clock_us, now_ns)
            decision.source = "local_share"
            decision.processes = self.buckets.fallback.processes
            return decided_by(self.buckets.policy, decision)
        standing = standing_of(charge.key, quota, counter, clock_us // MICROSECONDS)
        decision = counter_decision(charge, standing, clock_us, clock_us * 1000)
        decision.source = "store"
        return decision

    def _now_us(self) -> int:
        return math.ceil(self._wall_clock() * MICROSECONDS)

    def store_us(self) -> int:
        """Return the store's time in microseconds, by the last reading."""
        return self._now_us() + self.offset_us

    def _hashed(self, key: str) -> str:
        """Return the key of a counter in the store: of fixed length, without the client's id."""
        return f"{self._prefix}:quota:{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"
