"""The stage of admission that charges a request to all its limits, and takes a slot of each concurrency limit.

It does all of it or nothing. The slots are held until the exchange ends: `LocalSlots.release` is one of the observers
of ended exchanges, which are called once for every exchange, whatever ends it.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from api_gateway.limits.concurrency import LocalSlots, SlottedCharges, SlotUse, refusal_of_slots
from api_gateway.limits.limit import Limit
from api_gateway.limits.quota_decisions import refusal_of
from api_gateway.limits.refusal import refusal
from api_gateway.models import Charge, ConcurrencySlot, Decision, Quota
from api_gateway.proxy.admission import RequestPlan, StageResult, Wait
from api_gateway.proxy.candidate_limits import CandidateLimits
from api_gateway.proxy.limit_stage import LimitListStage, part_reader, values_of
from api_gateway.proxy.route_table import RouteTable
from api_gateway.rate_limiter import RateLimiter, joint_refusal


class ConcurrencyStage(LimitListStage):
    """Charges all limits of tokens and takes a slot of each concurrency limit: all or none."""

    def __init__(
        self,
        *,
        limiter: RateLimiter,
        address_quota: Quota | None,
        exempt: Collection[Any],
        limits: Sequence[Limit],
        concurrency: Sequence[Limit],
        routes: RouteTable,
        slots: LocalSlots,
        candidate_limits: CandidateLimits | None = None,
    ) -> None:
        """See `LimitListStage`. `concurrency` are the limits of requests in flight, `slots` who holds them."""
        super().__init__(
            limiter=limiter,
            address_quota=address_quota,
            exempt=exempt,
            limits=limits,
            routes=routes,
            candidate_limits=candidate_limits,
        )
        self._concurrency = tuple([(limit, tuple([part_reader(part) for part in limit.key])) for limit in concurrency])
        self._is_by_route = self._is_by_route or any(limit.routes is not None for limit in concurrency)
        self.slots = slots

    @property
    def concurrency(self) -> Sequence[Limit]:
        """See `RateLimitStage`."""
        return [limit for limit, _ in self._concurrency]

    def lacking(self, plan: RequestPlan) -> list[tuple[Limit, str]]:
        """See `RateLimitStage`."""
        return super().lacking(plan) + self._lacking(plan, self._concurrency)

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse the request if a slot is missing, else charge it, and take the slots if it is admitted."""
        charges = self._set_charges(plan)
        if isinstance(charges, SlottedCharges):
            refused = self.slots.refusal_by_all(charges, self._limiter, plan.now_ns)
            if refused is not None:
                return self._on_decision(plan, refused)
        decision = self._decide_at_once(charges, plan.now_ns)
        if decision is not None:
            outcome = self._on_decision(plan, decision)
            if outcome is None and isinstance(charges, SlottedCharges):
                self.slots.take(plan.exchange, charges.slots)
            return outcome
        if isinstance(charges, SlottedCharges):
            ask = partial(self.slots.ask, plan.exchange, self._limiter, charges, plan.now_ns)
        else:
            ask = partial(self._ask, charges, plan.now_ns)
        return Wait(ask, self._on_decision)

    def inspect(self, plan: RequestPlan) -> StageResult:
        """Ask for what is in flight, and for the decision of each bucket alone."""
        if plan.exchange.client is None:  # inspected after a refusal
            return None
        charges = self._set_charges(plan)
        if not isinstance(charges, SlottedCharges):
            return super().inspect(plan)
        return Wait.on(partial(self.slots.look, charges.slots), self._on_looked)

    def _on_looked(self, plan: RequestPlan, uses: list[SlotUse]) -> StageResult:
        plan.slot_uses = uses
        refused = None
        if not all(use.is_free for use in uses):
            refused = refusal_of_slots(uses, self.slots, plan.now_ns)
        inspect = partial(self._limiter.inspect, plan.exchange.charges, plan.now_ns)
        return Wait.on(inspect, partial(self._on_both, refused))

    def _on_both(self, refused: Decision | None, plan: RequestPlan, decisions: list[Decision]) -> StageResult:
        outcome = self._on_inspected(plan, decisions)
        if refused is None:
            return outcome
        by_tokens = None if outcome is None else refusal_of(decisions)
        return refusal(plan.exchange, joint_refusal(refused, by_tokens))

    def _compute(self, plan: RequestPlan, names: Sequence[str | None]) -> list[Charge]:
        charges, slots = super()._compute(plan, names), []
        client, method = plan.exchange.client, plan.exchange.method.upper()
        assert client is not None  # noqa: S101 - `IdentityStage` comes first
        tier = client.quota.name
        for limit, parts in self._concurrency:
            quota = limit.quota_of(tier)
            if quota is not None and any(limit.concerns(name, method) for name in names):
                values = values_of(parts, plan)
                if values is not None:
                    slots.append(ConcurrencySlot(limit.bucket_key(values, tier), quota))
        return SlottedCharges(charges, tuple(slots)) if slots else charges
