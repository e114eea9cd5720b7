"""The operations of the limiter on buckets in the store: charge, inspect, settle and refund."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, Protocol

from api_gateway.limits.cluster_batcher import ClusterScriptBatcher
from api_gateway.limits.deny_cache import DenyCache
from api_gateway.limits.fallback_limiter import FallbackLimiter
from api_gateway.limits.script_batcher import ScriptBatcher, ScriptOp
from api_gateway.limits.store_refunds import StoreRefunds
from api_gateway.models import Charge, Decision
from api_gateway.rate_limiter import Refund, decision_of, joint_decision, take, take_each, tightest_of
from api_gateway.storage.redis_session import ScriptCall


class LimiterPort(Protocol):
    """The parts of the limiter that its operations use."""

    fallback: FallbackLimiter
    cache: DenyCache
    batcher: ScriptBatcher | ClusterScriptBatcher
    refunds: StoreRefunds
    channel: str
    offset_ns: int
    clock_ns: Callable[[], int]
    policy: Literal["local_share", "deny", "allow"]

    @property
    def store_key(self) -> Callable[[str], str]:
        """Maps the key of a bucket to its key in the store."""
        ...

    def decide_without_store(
        self, charges: Sequence[Charge], now_ns: int, *, may_be_charged: bool = False
    ) -> Decision:
        """Decide by the policy for outages."""
        ...

    def inspect_without_store(self, charge: Charge, now_ns: int) -> Decision:
        """Return the decision of the policy for outages, without charging."""
        ...

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Settle a decision; see `RateLimiter.settle`."""
        ...


class ChargeOp(ScriptOp):
    """Charges all buckets of one request, or none."""

    __slots__ = ("_asked_ns", "_charges", "_is_admitted", "_limiter", "_on_decision", "_reported")

    def __init__(
        self, limiter: LimiterPort, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]
    ) -> None:
        super().__init__(limiter.store_key(charges[0].key))
        self._is_admitted = False  # by the policy for outages, though the store may have charged the request
        self._reported: Sequence[Charge] = ()
        self._limiter = limiter
        self._charges = charges
        self._asked_ns = now_ns
        self._on_decision = on_decision

    def write(self, call: ScriptCall) -> None:
        """Append the charges, preceded by this process's debts from an outage.

        Costs that shares admitted may bring a bucket into debt, as a cost settlement may; costs that the policy
        `allow` admitted at most empty it.
        """
        limiter, arguments = self._limiter, call.arguments
        if len(self._charges) == 1 and not limiter.fallback.has_debts:  # the common case
            charge = self._charges[0]
            arguments += (1, call.number(self.key), charge.quota.burst_ns, charge.increment_ns)
            return
        numbers = [call.number(limiter.store_key(charge.key)) for charge in self._charges]
        if limiter.fallback.has_debts:
            self._reported = write_debts(limiter, call, numbers, self._charges, self._asked_ns)
        arguments.append(len(numbers))
        for number, charge in zip(numbers, self._charges, strict=True):
            arguments += (number, charge.quota.burst_ns, charge.increment_ns)

    def read_uncharged(self, clock_us: int, reply: Iterator[int]) -> Decision | None:
        """Read the reply of a script that has charged nothing for another reason.

        The decision is not passed on. Return the refusal by the buckets; None if they allow the request.
        """
        if self._is_admitted:
            learn_late(self._limiter, self._charges, is_charged=False)
        now_ns, debts_ns = clock_us * 1000, [next(reply) for _ in self._charges]
        taken = take_each([now_ns + debt_ns for debt_ns in debts_ns], self._charges, now_ns)
        decision = joint_decision(self._charges, taken, now_ns, "store")
        self._charges = [Charge(charge.key, charge.quota, 0) for charge in self._charges]
        self.is_over = True
        self.read(clock_us, iter(debts_ns))
        return None if decision.allowed else decision

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Compute the decision from the buckets' debts, by the same rule as the script, and cache the readings."""
        limiter, charges, asked_ns = self._limiter, self._charges, self._asked_ns
        now_ns = clock_us * 1000
        limiter.offset_ns = now_ns - asked_ns
        if len(charges) == 1:
            charge = charges[0]
            after_ns, wait_ns = take(now_ns + next(reply), charge.quota.burst_ns, charge.increment_ns, now_ns)
            limiter.cache.put(charge, after_ns - now_ns, asked_ns)
            if self._is_admitted:
                learn_late(limiter, charges, is_charged=wait_ns == 0)
            elif limiter.fallback.has_debts:
                limiter.fallback.confirm(charge.key, asked_ns)
            if not self.is_over:
                self._on_decision(decision_of(charge, after_ns, wait_ns, now_ns, "store"))
            return
        taken = take_each([now_ns + next(reply) for _ in charges], charges, now_ns)
        decision = joint_decision(charges, taken, now_ns, "store")
        for charge, (tat_ns, wait_ns) in zip(charges, taken, strict=True):
            given_back_ns = 0 if decision.allowed or wait_ns else charge.increment_ns  # not charged: another refused
            limiter.cache.put(charge, tat_ns - now_ns - given_back_ns, asked_ns)
            if limiter.fallback.has_debts and not self._is_admitted:
                limiter.fallback.confirm(charge.key, asked_ns)
        if self._is_admitted:
            learn_late(limiter, charges, is_charged=decision.allowed)
        if not self.is_over:
            self._on_decision(decision)

    def lose_reports(self) -> None:
        """Count the debts that this operation reports against the shares: it is not known whether it was executed."""
        self._limiter.fallback.lose(self._reported, self._limiter.clock_ns())

    def fail(self) -> None:
        """Complete with a decision by the policy for outages."""
        limiter = self._limiter
        if self.is_sent:
            self.lose_reports()
        decision = limiter.decide_without_store(self._charges, limiter.clock_ns(), may_be_charged=self.is_sent)
        self._is_admitted = self.is_sent and decision.allowed
        self._on_decision(decision)


def write_debts(
    limiter: LimiterPort, call: ScriptCall, numbers: Sequence[int], charges: Sequence[Charge], asked_ns: int
) -> list[Charge]:
    """Append this process's debts of the buckets that are charged; return them as charges."""
    budgets, reported = 1 if limiter.policy == "allow" else 2, list[Charge]()
    for number, charge in zip(numbers, charges, strict=True):
        owed_ns, burst_ns = limiter.fallback.report(charge, asked_ns), charge.quota.burst_ns
        if owed_ns:
            call.arguments += ("debt", number, burst_ns, owed_ns, budgets * burst_ns)
            reported.append(Charge(charge.key, charge.quota, owed_ns))
    return reported


def learn_late(limiter: LimiterPort, charges: Sequence[Charge], *, is_charged: bool) -> None:
    """Note whether the store has charged costs that the policy for outages has admitted before the late reply."""
    known = [limiter.cache.last_tat(charge) for charge in charges]
    limiter.fallback.learn(charges, known, limiter.clock_ns(), is_charged=is_charged)


class MultiNodeCharge:
    """Charges buckets on several servers of a cluster: in the end all or none.

    Each bucket is charged on its server. If one refuses, the charges of the others are refunded; until then those
    buckets have too few tokens, never too many.
    """

    def __init__(
        self, limiter: LimiterPort, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]
    ) -> None:
        self._limiter = limiter
        self._charges = charges
        self._now_ns = now_ns
        self._callback = on_decision
        self._decisions: list[Decision | None] = [None] * len(charges)

    def __repr__(self) -> str:
        return f"<MultiNodeCharge [{self._decisions.count(None)} of {len(self._charges)} decisions pending]>"

    def submit(self) -> None:
        """Submit one operation for each bucket."""
        for index, charge in enumerate(self._charges):
            on_decision = partial(self._on_decision, index)
            self._limiter.batcher.submit(ChargeOp(self._limiter, [charge], self._now_ns, on_decision))

    def _on_decision(self, index: int, decision: Decision) -> None:
        self._decisions[index] = decision
        decisions = [known for known in self._decisions if known is not None]
        if len(decisions) < len(self._charges):
            return
        refusals = [known for known in decisions if not known.allowed]
        if not refusals:
            tightest = decisions[tightest_of(self._charges, [known.reset_ns for known in decisions])]
            # Each node has a clock of its own: so that the sum with `at_ns` is right for each bucket.
            tightest.debts_ns = tuple([known.reset_ns + known.at_ns - tightest.at_ns for known in decisions])
            self._callback(tightest)
            return
        for charge, known in zip(self._charges, decisions, strict=True):
            if known.allowed and charge.increment_ns:
                back = Charge(charge.key, charge.quota, -charge.increment_ns)
                self._limiter.settle([back], known, self._now_ns)
        longest = max(refusals, key=lambda known: (known.wait_ns < 0, known.wait_ns))
        longest.violated = tuple([known.quota for known in refusals])
        self._callback(longest)


class PeekOp(ScriptOp):
    """Reads one bucket without charging it."""

    __slots__ = ("_asked_ns", "_charge", "_limiter", "_seen")

    def __init__(self, limiter: LimiterPort, charge: Charge, now_ns: int, seen: asyncio.Future[Decision]) -> None:
        super().__init__(limiter.store_key(charge.key))
        self._limiter = limiter
        self._charge = charge
        self._asked_ns = now_ns
        self._seen = seen

    def write(self, call: ScriptCall) -> None:
        """Append a charge of 0."""
        call.arguments += (1, call.number(self.key), self._charge.quota.burst_ns, 0)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Complete with the bucket's decision on the charge."""
        now_ns, quota = clock_us * 1000, self._charge.quota
        tat_ns, wait_ns = take(now_ns + next(reply), quota.burst_ns, self._charge.increment_ns, now_ns)
        if not self._seen.done():
            self._seen.set_result(decision_of(self._charge, tat_ns, wait_ns, now_ns, "store"))

    def fail(self) -> None:
        """Complete with the decision of the policy for outages."""
        if not self._seen.done():
            limiter, charge = self._limiter, self._charge
            self._seen.set_result(limiter.inspect_without_store(charge, self._asked_ns))


class SettleOp(ScriptOp):
    """Charges the difference of a cost settlement. What the store does not charge is reported as an outage's debt."""

    __slots__ = ("_charge", "_limiter")

    def __init__(self, limiter: LimiterPort, charge: Charge) -> None:
        super().__init__(limiter.store_key(charge.key))
        self._limiter = limiter
        self._charge = charge

    def write(self, call: ScriptCall) -> None:
        """Append the charge, up to a debt of a second budget."""
        burst_ns = self._charge.quota.burst_ns
        call.arguments += ("debt", call.number(self.key), burst_ns, self._charge.increment_ns, 2 * burst_ns)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Do nothing: there is no reply."""

    def fail(self) -> None:
        """Keep the charge until the store can be charged, unless it may have been already."""
        limiter, charge = self._limiter, self._charge
        known = [limiter.cache.last_tat(charge)]
        limiter.fallback.record([charge], known, limiter.clock_ns(), may_be_charged=self.is_sent)


class RefundOp(ScriptOp):
    """Refunds a charge (increment below 0), and notifies all processes. A failure leaves the bucket unchanged."""

    __slots__ = ("_charge", "_end_ns", "_limiter", "_refund")

    def __init__(self, limiter: LimiterPort, charge: Charge, refund: Refund, end_ns: int) -> None:
        """`refund` is corrected by the reply. `end_ns` is the current end of the charge, on the store's clock."""
        super().__init__(limiter.store_key(charge.key))
        self._limiter = limiter
        self._charge = charge
        self._refund = refund
        self._end_ns = end_ns

    def write(self, call: ScriptCall) -> None:
        """Append the refund, and the rest of its notification."""
        limiter, charge = self._limiter, self._charge
        message = limiter.refunds.message(charge.key, self._refund)
        call.arguments += ("refund", call.number(self.key), charge.quota.burst_ns, -charge.increment_ns)
        call.arguments += (self._end_ns, limiter.channel, message)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Correct the refund to what the store has refunded, and when."""
        self._refund.given_ns = next(reply)
        self._refund.made_ns = clock_us * 1000

    def fail(self) -> None:
        """Correct the refund if the store has certainly not executed it."""
        if not self.is_sent:
            self._refund.given_ns = 0
