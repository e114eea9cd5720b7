"""Charges of one request to buckets and to counters of calendar quotas on several servers of a cluster."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from api_gateway.limits.quota_decisions import joint_allowance, of_buckets, of_counters, refusal_of
from api_gateway.limits.quota_ops import CountersPort, QuotaChargeOp
from api_gateway.limits.quota_state import PeriodQuota, QuotaState
from api_gateway.models import Charge, Decision
from api_gateway.rate_limiter import debts_of, joint_refusal


class NodesPort(CountersPort, Protocol):
    """The parts of the limiter that the charges use."""

    def decide_buckets(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Have the store decide on buckets alone."""
        ...

    def refund_buckets(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> None:
        """Refund what was charged to buckets."""
        ...

    def correct(self, change: Charge, quota: PeriodQuota, decision: Decision, start: int) -> QuotaState:
        """Charge or refund a difference in the period from `start`; return the standing after it."""
        ...

    def standing(self, key: str, quota: PeriodQuota) -> QuotaState:
        """Return the current standing by the last reading."""
        ...

    def refusals(self, charges: Sequence[Charge]) -> list[Decision]:
        """Return the refusals of counters by their last readings."""
        ...

    def store_us(self) -> int:
        """Return the store's time in microseconds, by the last reading."""
        ...


class MultiNodeQuotaCharge:
    """Charges buckets and counters on several servers: in the end all or none.

    The buckets are charged first, then the counters, each on its server. So a request that a bucket refuses is never
    charged to a counter. If a counter refuses, the buckets and the other counters are refunded; until then those have
    too few tokens, never too many. Of a counter that is refunded, a warning may have been given by then.
    """

    def __init__(
        self, limiter: NodesPort, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]
    ) -> None:
        self._limiter = limiter
        self._charges = charges
        self._buckets = of_buckets(charges)
        self._counters = of_counters(charges)
        self._now_ns = now_ns
        self._callback = on_decision
        self._decisions: list[Decision | None] = [None] * len(self._counters)

    def __repr__(self) -> str:
        return f"<MultiNodeQuotaCharge [{self._decisions.count(None)} of {len(self._counters)} counters pending]>"

    def submit(self) -> None:
        """Have the buckets decided on."""
        self._limiter.decide_buckets(self._buckets, self._now_ns, self._on_buckets)

    def _on_buckets(self, decision: Decision) -> None:
        if decision.allowed:
            for index, (charge, _) in enumerate(self._counters):
                on_decision = partial(self._on_counter, decision, index)
                op = QuotaChargeOp(self._limiter, [charge], self._now_ns, on_decision)
                self._limiter.buckets.batcher.submit(op)
            return
        refusals = self._limiter.refusals(self._charges)
        if refusals:  # as all must allow the request, the longest wait counts
            source = decision.source
            decision = joint_refusal(decision, refusal_of(refusals))
            decision.source = source
        self._callback(decision)

    def _on_counter(self, of_buckets: Decision, index: int, decision: Decision) -> None:
        self._decisions[index] = decision
        decisions = [known for known in self._decisions if known is not None]
        if len(decisions) < len(self._counters):
            return
        if all(known.allowed for known in decisions):
            self._allow(of_buckets, decisions)
        else:
            self._refuse(of_buckets, decisions)

    def _allow(self, of_buckets: Decision, decisions: Sequence[Decision]) -> None:
        starts = iter([debts_of(known)[0] for known in decisions])
        charged = [next(starts) if isinstance(charge.quota, PeriodQuota) else 0 for charge in self._charges]
        standings = [self._limiter.standing(charge.key, quota) for charge, quota in self._counters]
        others = [known.source for known in decisions if known.source != "store"]
        if others and of_buckets.source == "store":
            of_buckets.source = others[0]  # so that a settlement does not take it for one of the store alone
        self._callback(joint_allowance(self._charges, of_buckets, standings, self._limiter.store_us(), charged))

    def _refuse(self, of_buckets: Decision, decisions: Sequence[Decision]) -> None:
        self._limiter.refund_buckets(self._buckets, of_buckets, self._now_ns)
        for (charge, quota), known in zip(self._counters, decisions, strict=True):
            if known.allowed and charge.increment_ns:
                back = Charge(charge.key, quota, -charge.increment_ns)
                self._limiter.correct(back, quota, known, debts_of(known)[0])
        refused = refusal_of(decisions)
        self._callback(refused)
