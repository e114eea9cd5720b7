"""Costs after the decision: what an upstream says its answer has cost, and what was charged for nothing.

Both come before the answer's head goes out, so that its fields show the buckets as they are then.
"""

import logging
import re
from collections.abc import Callable, Sequence

from api_gateway.errors import GatewayError
from api_gateway.limits.ratelimit_headers import HEADER_NAMES, RateLimitHeaders
from api_gateway.metrics import NO_ROUTE, Recorder
from api_gateway.models import Charge, Decision, Exchange
from api_gateway.proxy.fallback import STATIC
from api_gateway.rate_limiter import RateLimiter

MAX_COST = 1_000_000_000
_DECIMAL = re.compile(rb"[0-9]{1,10}(?:\.[0-9]{1,9})?")

logger = logging.getLogger(__name__)


class CostSettlement:
    """Charges or gives back what a request has cost beyond, or below, what it was charged at first.

    Nobody is refused by it: who comes to owe waits longer with the next request. What is tried beside the limit
    (`exchange.trial`) is settled alike, so that it stays comparable.
    """

    def __init__(self, *, limiter: RateLimiter, clock_ns: Callable[[], int], recorder: Recorder) -> None:
        self._limiter = limiter
        self._clock_ns = clock_ns
        self._recorder = recorder
        self._fields = RateLimitHeaders()
        self._warned: set[str | None] = set()

    def on_cost(self, exchange: Exchange, given: Sequence[bytes]) -> None:
        """Settle on what the upstream told in `X-Gateway-Cost`: one decimal, 0 to 1e9. Anything else is ignored."""
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
            self._settle(exchange, cost)

    def on_failure(self, exchange: Exchange, error: GatewayError) -> None:
        """Give back everything, if the answer is ours and nothing of the request has reached an upstream."""
        if error.is_retry_safe and not exchange.status and not exchange.has_reached:
            self._settle(exchange, 0)

    def on_fallback(self, exchange: Exchange, error: GatewayError) -> None:
        """Count a fallback that takes over after `error`. A static one is charged for as an error would be.

        So it costs nothing, unless the request has reached an upstream: if that was free too, the limits would
        protect an upstream no longer just while it fails. What another upstream answers is charged for.
        """
        self._recorder.fallbacks[exchange.route or NO_ROUTE, exchange.fallback or STATIC, error.reason.value] += 1
        if exchange.fallback == STATIC:
            self.on_failure(exchange, error)

    def _settle(self, exchange: Exchange, cost: float) -> None:
        decision = exchange.decision
        if decision is None or not decision.allowed or cost == exchange.cost:
            return
        self._recorder.settlements["charged" if cost > exchange.cost else "refunded"] += 1
        exchange.cost = cost
        exchange.decision = decision = self._change(exchange.charges, decision, cost)
        if exchange.trial is not None and exchange.trial[1].allowed:
            self._change(*exchange.trial, cost)
        if exchange.response_headers:
            others = [pair for pair in exchange.response_headers if pair[0] not in HEADER_NAMES]
            exchange.response_headers = others + self._fields.headers(decision)

    def _change(self, charges: Sequence[Charge], decision: Decision, cost: float) -> Decision:
        """Bring buckets from what they were charged to `cost`."""
        changes = [
            Charge(charge.key, charge.quota, charge.quota.cost_ns(cost) - charge.increment_ns) for charge in charges
        ]
        return self._limiter.settle(changes, decision, self._clock_ns())


def cost_of(given: Sequence[bytes]) -> float | None:
    """Return the cost that an upstream has told, in tokens, or None if it cannot be read."""
    if len(given) != 1 or _DECIMAL.fullmatch(given[0]) is None:
        return None
    cost = float(given[0])
    return cost if cost <= MAX_COST else None
