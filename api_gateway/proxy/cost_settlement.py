"""Cost settlement: corrects the charge of a request to the cost that its upstream reports, or refunds it.

Settlement takes place before the response's head is sent, so that its rate limit fields show the corrected buckets.
"""

import logging
import re
from collections.abc import Callable, Sequence

from api_gateway.errors import GatewayError
from api_gateway.limits.concurrency import SlottedCharges
from api_gateway.metrics import NO_ROUTE, Recorder
from api_gateway.models import Charge, Decision, Exchange, Settlement
from api_gateway.proxy.content_cost import ContentCost
from api_gateway.proxy.fallback import STATIC
from api_gateway.rate_limiter import RateLimiter

MAX_COST = 1_000_000_000
_DECIMAL = re.compile(rb"[0-9]{1,10}(?:\.[0-9]{1,9})?")

logger = logging.getLogger(__name__)


class CostSettlement:
    """Charges or refunds the difference between the charged and the actual cost of a request.

    Settlement never refuses a request: a bucket may go into debt, which delays the client's next request. The
    candidate's buckets (`exchange.candidate`) are settled in the same manner, so that the results remain comparable.
    """

    def __init__(
        self,
        *,
        limiter: RateLimiter,
        clock_ns: Callable[[], int],
        recorder: Recorder,
        next_number: Callable[[], int] | None = None,
    ) -> None:
        """`next_number` numbers settlements, which are then recorded in the exchange; None: they are not recorded."""
        self._next_number = next_number
        self._limiter = limiter
        self._clock_ns = clock_ns
        self._recorder = recorder
        self._warned: set[str | None] = set()

    def __repr__(self) -> str:
        return f"<CostSettlement [{len(self._warned)} upstreams warned of]>"

    def on_cost(self, exchange: Exchange, given: Sequence[bytes]) -> None:
        """Settle to the value of `X-Gateway-Cost`: one decimal from 0 to 1e9 tokens.

        Any other value is ignored, counted, and logged once for each upstream.
        """
        cost = cost_of(given)
        if cost is None:
            self._recorder.settlements["unreadable"] += 1
            if exchange.upstream not in self._warned:
                self._warned.add(exchange.upstream)
                logger.warning(
                    "upstream %s: X-Gateway-Cost must be one decimal from 0 to %d and is ignored, got %r",
                    exchange.upstream,
                    MAX_COST,
                    [value[:40] for value in given[:3]],
                )
        else:
            self.settle(exchange, cost)

    def on_content_cost(self, exchange: Exchange, terms: ContentCost, cost: float | None, is_complete: bool) -> None:  # noqa: FBT001 - a callback
        """Settle to the cost that the content of a response states, or to the cost for responses without one (None).

        A response that was cut off costs the higher of the two, because the stated cost may cover its beginning only.
        """
        otherwise = exchange.cost if terms.otherwise is None else terms.otherwise
        if cost is None:
            self._recorder.settlements["unreadable"] += 1
            cost = otherwise
        self.settle(exchange, cost if is_complete else max(cost, otherwise))

    def on_failure(self, exchange: Exchange, error: GatewayError) -> None:
        """Refund the whole charge if nothing of the request was sent to an upstream and no response has begun."""
        if error.is_retry_safe and not exchange.status and not exchange.has_reached:
            self.settle(exchange, 0.0, is_whole=True)

    def on_late_decision(self, exchange: Exchange, decision: Decision) -> None:
        """Refund what a store has charged for an exchange that had ended before: nothing of it was sent.

        The exchange was recorded without a decision, so this does not settle its record.
        """
        if exchange.decision is not None or not decision.allowed:
            return
        charges, changes = _settled_to(exchange.charges, 0.0, is_whole=True)
        if any(change.increment_ns for change in changes):
            self._recorder.settlements["refunded"] += 1
            self._limiter.settle(changes, decision, self._clock_ns(), charges)

    def on_fallback(self, exchange: Exchange, error: GatewayError) -> None:
        """Count a fallback that replaces the response after `error`, and refund a static one like the error itself.

        A static fallback is free only if nothing of the request was sent to an upstream: otherwise the limits would
        not protect an upstream while it fails. A response of another upstream is charged.
        """
        self._recorder.fallbacks[exchange.route or NO_ROUTE, exchange.fallback or STATIC, error.reason.value] += 1
        if exchange.fallback == STATIC:
            self.on_failure(exchange, error)

    def settle(self, exchange: Exchange, cost: float, *, is_whole: bool = False) -> None:
        """Correct the charges of an admitted exchange to `cost` tokens.

        Limits with a cost of their own keep it, unless it `is_whole`: a refund of the whole charge.
        """
        decision = exchange.decision
        if decision is None or not decision.allowed or (cost == exchange.cost and not is_whole):
            return
        charges, changes = _settled_to(exchange.charges, cost, is_whole=is_whole)
        if not any(change.increment_ns for change in changes):
            exchange.cost = cost
            return
        self._recorder.settlements["charged" if cost > exchange.cost else "refunded"] += 1
        now_ns = self._clock_ns()
        if self._next_number is not None:
            exchange.settlements += (Settlement(now_ns, self._next_number(), decision, exchange.cost, cost),)
        exchange.cost, exchange.charges = cost, charges
        exchange.decision = self._limiter.settle(changes, decision, now_ns, charges)
        if exchange.candidate is not None and exchange.candidate[1].allowed:
            of_candidate, decision = exchange.candidate
            charges, changes = _settled_to(of_candidate, cost, is_whole=is_whole)
            exchange.candidate = charges, self._limiter.settle(changes, decision, now_ns, charges)


def _settled_to(charges: Sequence[Charge], cost: float, *, is_whole: bool) -> tuple[list[Charge], list[Charge]]:
    """Return the charges of a request of this cost, and how they differ from `charges`."""
    after: list[Charge] = []
    for charge in charges:
        own = cost if charge.own_cost is None or is_whole else charge.own_cost
        cost_ns = charge.quota.cost_ns(own)
        after.append(Charge(charge.key, charge.quota, cost_ns, charge.own_cost, charge.is_unverified))
    changes = [
        Charge(new.key, new.quota, new.increment_ns - old.increment_ns, is_unverified=new.is_unverified)
        for new, old in zip(after, charges, strict=True)
    ]
    if isinstance(charges, SlottedCharges):  # which a settlement does not change
        after = SlottedCharges(after, charges.slots)
    return after, changes


def cost_of(given: Sequence[bytes]) -> float | None:
    """Return the cost in the values of `X-Gateway-Cost`, in tokens, or None if they are invalid."""
    if len(given) != 1 or _DECIMAL.fullmatch(given[0]) is None:
        return None
    cost = float(given[0])
    return cost if cost <= MAX_COST else None
