"""The fallback limiter: while the shared store is unavailable, each process applies its share of every limit.

Charging N times the cost to an unchanged bucket has the effect of capacity/N and rate/N, so the arithmetic is the same
as with the store. N is the number of live gateway processes: a higher number is stricter, a lower one exceeds the
limit. A cost that would exceed the capacity is charged as the capacity, so that expensive requests remain possible.

For N processes with the largest cost c (capacity C, rate r, budget B), all together admit at most
max(C, N*c) + max(r, N*c/B)*d in any window of length d. Afterwards the store is charged for the debts of all shares.

If a reply is lost, the store may have charged the request or refused it. The request is not charged again, and its
cost counts against the share until it is refilled there, also after the store has replied to another request. So the
admitted cost for which the store is never charged is at most what the share admits, however often replies are lost.
"""

from collections.abc import Callable, Iterable, Sequence

from api_gateway.limits.share_debts import ShareDebts
from api_gateway.models import NANOSECONDS, Charge, Decision, DecisionSource, Quota, share_increment
from api_gateway.rate_limiter import MemoryLimiter, debts_of

_UNKNOWN_NS = 1 << 62  # later than any end: the policy `allow` has no bucket
_OWN = 1  # instead of the number of processes, for costs that are those of a share already


class FallbackLimiter:
    """Decides on a share of each bucket, and keeps the debts of the shares until they are charged in the store."""

    def __init__(self, quotas: Iterable[Quota], *, bucket_limit: int) -> None:
        quotas = list(quotas)
        self.processes = 1
        self._limiter = MemoryLimiter(quotas, bucket_limit=bucket_limit)
        self._debts = ShareDebts(max((quota.burst_ns for quota in quotas), default=1), bucket_limit)
        self._lost = ShareDebts(self._debts.table.period_ns, bucket_limit)  # costs whose replies were lost, scaled

    def __repr__(self) -> str:
        return f"<FallbackLimiter [1/{self.processes}, {len(self._debts)} unsynced]>"

    def __len__(self) -> int:
        """Return the number of entries held."""
        return len(self._limiter) + len(self._debts) + len(self._lost)

    def decide(
        self, charges: Sequence[Charge], known: Iterable[int], now_ns: int, *, may_be_charged: bool
    ) -> Decision:
        """Charge this process's share of all buckets, or of none.

        `known` has for each bucket the last TAT known from the store, on this process's clock. If the request
        `may_be_charged` in the store already, because the response was lost, it will not be charged there again,
        unless `learn` follows.
        """
        known = list(known)
        for charge, tat_ns in zip(charges, known, strict=True):
            self._begin(charge, tat_ns, now_ns)
        decision = self._as_share(self._limiter.decide([self._scaled(charge) for charge in charges], now_ns))
        if decision.allowed:
            self.record(charges, known, now_ns, may_be_charged=may_be_charged)
        return decision

    def inspect(self, charge: Charge, known_ns: int, now_ns: int, policy: DecisionSource = "local_share") -> Decision:
        """Return the decision of a policy on a charge, with the tokens of this process's share; nothing is charged."""
        self._begin(charge, known_ns, now_ns)
        scaled = self._scaled(charge)
        if policy == "local_share":
            return self._as_share(self._limiter.preview(scaled, now_ns))
        decision = self._as_share(self._limiter.preview(Charge(charge.key, charge.quota, 0), now_ns))
        decision.reset_ns += scaled.increment_ns if policy == "allow" else 0
        return decided_by(policy, decision)

    def record(self, charges: Sequence[Charge], known: Iterable[int], now_ns: int, *, may_be_charged: bool) -> None:
        """Keep costs that were admitted without the store; see `decide`."""
        for charge, tat_ns in zip(charges, known, strict=True):
            if charge.increment_ns:
                self._debts.charge(charge, tat_ns, self.processes, now_ns, is_held=may_be_charged)
        if may_be_charged:
            self.lose(charges, now_ns)

    def lose(self, charges: Iterable[Charge], now_ns: int) -> None:
        """Count costs against the shares that the store may not have been charged for, because there is no reply."""
        for charge in charges:
            if charge.increment_ns > 0:
                self._lost.charge(self._scaled(charge), 0, _OWN, now_ns, is_held=False)

    def learn(self, charges: Iterable[Charge], known: Iterable[int], now_ns: int, *, is_charged: bool) -> None:
        """Note a late reply: whether the store has charged costs that were recorded as ones that may be charged."""
        for charge, tat_ns in zip(charges, known, strict=True):
            if charge.increment_ns <= 0:
                continue
            back = Charge(charge.key, charge.quota, -self._scaled(charge).increment_ns)
            self._lost.refund(back, _UNKNOWN_NS, _OWN, now_ns)
            if not is_charged and not self._debts.release(charge, self.processes, now_ns):
                self._debts.charge(charge, tat_ns, self.processes, now_ns, is_held=False)

    def settle(
        self,
        changes: Sequence[Charge],
        known: Iterable[int],
        decision: Decision,
        now_ns: int,
        settled_to: Sequence[Charge] = (),
    ) -> Decision:
        """Settle a decision of this limiter; see `RateLimiter.settle`, and `decide` for `known`.

        What has been reported to the store is not refunded.
        """
        at_ns, is_share = decision.at_ns, decision.source == "local_share"
        changes = [
            charge
            if charge.increment_ns > 0 or self._debts.includes(charge.key, at_ns, now_ns)
            else Charge(charge.key, charge.quota, 0)
            for charge in changes
        ]
        after = self._limiter.settle([self._scaled(charge) for charge in changes], decision, now_ns, settled_to)
        after.remaining //= self.processes
        for charge, tat_ns, debt_ns in zip(changes, known, debts_of(decision), strict=True):
            if charge.increment_ns < 0:
                end_ns = self._limiter.charged_until(charge.key, at_ns, debt_ns) if is_share else _UNKNOWN_NS
                self._debts.refund(charge, end_ns, self.processes, now_ns)
            elif charge.increment_ns:
                self._debts.charge(charge, tat_ns, self.processes, now_ns, is_held=False)
        return after

    @property
    def has_debts(self) -> bool:
        """True while the store has still to be charged, or to confirm that it was."""
        return len(self._debts) > 0

    def report(self, charge: Charge, now_ns: int) -> int:
        """Return the part of this share's debt that the store does not hold, in nanoseconds; it counts as reported."""
        return self._debts.report(charge, self.processes, now_ns)

    def confirm(self, key: str, asked_ns: int) -> None:
        """End this process's share of a bucket: the store has answered a query of `asked_ns`, which had the report."""
        if self._debts.confirm(key, asked_ns):
            self._limiter.reset(key)  # the next share starts from the store's result

    def unreported(self, count: int) -> list[Charge]:
        """Return charges of 0 for up to `count` buckets whose debts are to be reported or confirmed."""
        return [Charge(key, quota, 0) for key, quota in self._debts.some(count)]

    def reset(self, key: str) -> None:
        """Treat a bucket as full."""
        self._limiter.reset(key)
        self._debts.drop(key)
        self._lost.drop(key)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; see `MemoryLimiter.change_quota`."""
        self._limiter.change_quota(key, old, new, now_ns)

    def change_quotas(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Convert all buckets to other quotas; see `MemoryLimiter.change_quotas`."""
        quotas = list(quotas)
        self._limiter.change_quotas(quotas, quota_of, now_ns)
        for table in (self._debts.table, self._lost.table):
            table.period_ns = max(table.period_ns, *(quota.burst_ns for quota in quotas))

    def limit_buckets(self, bucket_limit: int) -> None:
        """Set the maximum number of buckets."""
        self._limiter.bucket_limit = self._debts.table.limit = self._lost.table.limit = bucket_limit

    def _begin(self, charge: Charge, known_ns: int, now_ns: int) -> None:
        """Begin this process's share of a bucket, unless it has begun: with the debts that are known, or may be."""
        if len(self._lost):
            known_ns = max(known_ns, self._lost.until(charge, _OWN, now_ns))
        self._limiter.seed(charge.key, charge.quota, known_ns, now_ns)

    def _as_share(self, decision: Decision) -> Decision:
        """Convert a decision on scaled charges to one on the original charges."""
        decision.remaining //= self.processes
        decision.source = "local_share"
        decision.processes = self.processes
        return decision

    def _scaled(self, charge: Charge) -> Charge:
        increment_ns = share_increment(charge.increment_ns, charge.quota.burst_ns, self.processes)
        return Charge(charge.key, charge.quota, increment_ns)


def decided_by(policy: DecisionSource, decision: Decision) -> Decision:
    """Change the decision of a share to that of the policy `deny` or `allow`, which ignore tokens; return it."""
    if policy != "local_share":
        decision.source, decision.allowed = policy, policy == "allow"
        decision.wait_ns = 0 if decision.allowed else NANOSECONDS
    return decision
