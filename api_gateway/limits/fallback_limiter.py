"""What a process admits by itself while the shared store cannot be used: its share of every bucket.

Charging N times the cost to a bucket of the same budget gives capacity/N at rate/N, so one arithmetic serves both
modes. N is the number of live gateway processes: too many is stricter, too few breaks the bound. A cost that would be
more than the whole bucket is charged as the whole bucket, so that what costs much stays possible.

Bounds, for N processes with the largest cost c (capacity C, rate r, budget B): together they admit at most
max(C, N*c) + max(r, N*c/B)*d in any window of length d.
"""

from collections.abc import Callable, Iterable, Sequence

from api_gateway.models import Charge, Decision, Quota
from api_gateway.rate_limiter import MemoryLimiter, TatTable, settled


class FallbackLimiter:
    """Decides on a share of each bucket, and remembers what it admitted until the store has been told."""

    def __init__(self, quotas: Iterable[Quota], *, bucket_limit: int) -> None:
        quotas = list(quotas)
        self.processes = 1
        self._limiter = MemoryLimiter(quotas, bucket_limit=bucket_limit)
        self._admitted: TatTable[int] = TatTable(max((quota.burst_ns for quota in quotas), default=1), bucket_limit)

    def __repr__(self) -> str:
        return f"<FallbackLimiter [1/{self.processes}, {len(self._admitted)} to be told]>"

    def __len__(self) -> int:
        """Return the entries held."""
        return len(self._limiter) + len(self._admitted)

    def decide(
        self, charges: Sequence[Charge], known: Iterable[int], now_ns: int, *, may_be_charged: bool
    ) -> Decision:
        """Charge this process's share of all buckets, or of none.

        `known` holds for each bucket the TAT that the store last told of it, on this process's clock. If the request
        `may_be_charged` in the store already, which did not say so, it is not charged there once more.
        """
        for charge, tat_ns in zip(charges, known, strict=True):
            self._limiter.seed(charge.key, charge.quota, tat_ns, now_ns)
        decision = self._as_share(self._limiter.decide([self._scaled(charge) for charge in charges], now_ns))
        if decision.allowed and not may_be_charged:
            self.record_unsynced(charges, now_ns)
        return decision

    def inspect(self, charge: Charge, known_ns: int, now_ns: int) -> Decision:
        """Return what this process's share of a bucket says to a charge, charging nothing."""
        self._limiter.seed(charge.key, charge.quota, known_ns, now_ns)
        return self._as_share(self._limiter.preview(self._scaled(charge), now_ns))

    def record_unsynced(self, charges: Iterable[Charge], now_ns: int) -> None:
        """Remember what was admitted without the store."""
        self._admitted.advance(now_ns)
        for charge in charges:
            admitted_ns = max(self._admitted.get(charge.key) or 0, now_ns) + charge.increment_ns
            self._admitted.put(charge.key, min(admitted_ns, now_ns + charge.quota.burst_ns))

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision:
        """Settle what was decided here; see `RateLimiter`."""
        after = self._limiter.settle([self._scaled(charge) for charge in charges], decision, now_ns)
        after.remaining //= self.processes
        for charge in charges:
            admitted_ns = self._admitted.get(charge.key) or 0
            # All of what was admitted here may be given back: it has not been charged anywhere else.
            admitted_ns = settled(admitted_ns, charge.quota.burst_ns, charge.increment_ns, admitted_ns, now_ns)
            self._admitted.put(charge.key, admitted_ns)
        return after

    @property
    def has_unsynced(self) -> bool:
        """True if something was admitted here that the store may not know of."""
        return len(self._admitted) > 0

    def take_unsynced(self, key: str, now_ns: int) -> int:
        """Return what was admitted here and has not been refilled since, in nanoseconds, and forget it."""
        self._admitted.advance(now_ns)
        tat_ns = self._admitted.get(key)
        if tat_ns is None:
            return 0
        self._admitted.drop(key)
        return max(tat_ns - now_ns, 0)

    def reset(self, key: str) -> None:
        """Take a bucket for full."""
        self._limiter.reset(key)
        self._admitted.drop(key)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Take a bucket from one quota to another."""
        self._limiter.change_quota(key, old, new, now_ns)

    def change_quotas(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Hold buckets of other quotas; see `MemoryLimiter.requote`."""
        quotas = list(quotas)
        self._limiter.change_quotas(quotas, quota_of, now_ns)
        self._admitted.period_ns = max(self._admitted.period_ns, *(quota.burst_ns for quota in quotas))

    def limit_buckets(self, bucket_limit: int) -> None:
        """Hold at most so many buckets."""
        self._limiter.bucket_limit = self._admitted.limit = bucket_limit

    def _as_share(self, decision: Decision) -> Decision:
        """Say of a decision on scaled charges what it means to the client."""
        decision.remaining //= self.processes
        decision.source = "local_share"
        return decision

    def _scaled(self, charge: Charge) -> Charge:
        burst_ns, increment_ns = charge.quota.burst_ns, charge.increment_ns
        if increment_ns <= burst_ns:
            increment_ns = max(min(increment_ns * self.processes, burst_ns), -burst_ns)
        return Charge(charge.key, charge.quota, increment_ns)
