"""The fallback limiter: while the shared store is unavailable, each process applies its share of every limit.

Charging N times the cost to an unchanged bucket has the effect of capacity/N and rate/N, so the arithmetic is the same
as with the store. N is the number of live gateway processes: a higher number is stricter, a lower one exceeds the
limit. A cost that would exceed the capacity is charged as the capacity, so that expensive requests remain possible.

For N processes with the largest cost c (capacity C, rate r, budget B), all together admit at most
max(C, N*c) + max(r, N*c/B)*d in any window of length d.
"""

from collections.abc import Callable, Iterable, Sequence

from api_gateway.models import Charge, Decision, Quota
from api_gateway.rate_limiter import MemoryLimiter, TatTable, settled


class FallbackLimiter:
    """Decides on a share of each bucket, and keeps the admitted costs until they are charged in the store."""

    def __init__(self, quotas: Iterable[Quota], *, bucket_limit: int) -> None:
        quotas = list(quotas)
        self.processes = 1
        self._limiter = MemoryLimiter(quotas, bucket_limit=bucket_limit)
        self._admitted: TatTable[int] = TatTable(max((quota.burst_ns for quota in quotas), default=1), bucket_limit)

    def __repr__(self) -> str:
        return f"<FallbackLimiter [1/{self.processes}, {len(self._admitted)} unsynced]>"

    def __len__(self) -> int:
        """Return the number of entries held."""
        return len(self._limiter) + len(self._admitted)

    def decide(
        self, charges: Sequence[Charge], known: Iterable[int], now_ns: int, *, may_be_charged: bool
    ) -> Decision:
        """Charge this process's share of all buckets, or of none.

        `known` has for each bucket the last TAT known from the store, on this process's clock. If the request
        `may_be_charged` in the store already, because the response was lost, it is not kept to be charged there.
        """
        for charge, tat_ns in zip(charges, known, strict=True):
            self._limiter.seed(charge.key, charge.quota, tat_ns, now_ns)
        decision = self._as_share(self._limiter.decide([self._scaled(charge) for charge in charges], now_ns))
        if decision.allowed and not may_be_charged:
            self.record_unsynced(charges, now_ns)
        return decision

    def inspect(self, charge: Charge, known_ns: int, now_ns: int) -> Decision:
        """Return the decision of this process's share of a bucket on a charge, without charging it."""
        self._limiter.seed(charge.key, charge.quota, known_ns, now_ns)
        return self._as_share(self._limiter.preview(self._scaled(charge), now_ns))

    def record_unsynced(self, charges: Iterable[Charge], now_ns: int) -> None:
        """Keep costs that were admitted without the store."""
        self._admitted.advance(now_ns)
        for charge in charges:
            admitted_ns = max(self._admitted.get(charge.key) or 0, now_ns) + charge.increment_ns
            self._admitted.put(charge.key, min(admitted_ns, now_ns + charge.quota.burst_ns))

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Settle a decision of this limiter; see `RateLimiter.settle`."""
        after = self._limiter.settle([self._scaled(charge) for charge in changes], decision, now_ns, settled_to)
        after.remaining //= self.processes
        for charge in changes:
            admitted_ns = self._admitted.get(charge.key) or 0
            # The whole admitted cost may be refunded: it has not been charged elsewhere.
            admitted_ns = settled(admitted_ns, charge.quota.burst_ns, charge.increment_ns, admitted_ns, now_ns)
            self._admitted.put(charge.key, admitted_ns)
        return after

    @property
    def has_unsynced(self) -> bool:
        """True while admitted costs are still to be charged in the store."""
        return len(self._admitted) > 0

    def take_unsynced(self, key: str, now_ns: int) -> int:
        """Remove and return the admitted cost of a bucket that has not been refilled since, in nanoseconds."""
        self._admitted.advance(now_ns)
        tat_ns = self._admitted.get(key)
        if tat_ns is None:
            return 0
        self._admitted.drop(key)
        return max(tat_ns - now_ns, 0)

    def reset(self, key: str) -> None:
        """Treat a bucket as full."""
        self._limiter.reset(key)
        self._admitted.drop(key)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; see `MemoryLimiter.change_quota`."""
        self._limiter.change_quota(key, old, new, now_ns)

    def change_quotas(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Convert all buckets to other quotas; see `MemoryLimiter.requote`."""
        quotas = list(quotas)
        self._limiter.change_quotas(quotas, quota_of, now_ns)
        self._admitted.period_ns = max(self._admitted.period_ns, *(quota.burst_ns for quota in quotas))

    def limit_buckets(self, bucket_limit: int) -> None:
        """Set the maximum number of buckets."""
        self._limiter.bucket_limit = self._admitted.limit = bucket_limit

    def _as_share(self, decision: Decision) -> Decision:
        """Convert a decision on scaled charges to the client's terms."""
        decision.remaining //= self.processes
        decision.source = "local_share"
        return decision

    def _scaled(self, charge: Charge) -> Charge:
        burst_ns, increment_ns = charge.quota.burst_ns, charge.increment_ns
        if increment_ns <= burst_ns:
            increment_ns = max(min(increment_ns * self.processes, burst_ns), -burst_ns)
        return Charge(charge.key, charge.quota, increment_ns)
