"""The errors of requests that a rate limit refuses."""

from typing import Final

from api_gateway.errors import ConcurrencyExceeded, CostExceedsCapacity, GatewayError, StoreUnavailable
from api_gateway.http1.headers import address_key
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.limits.limit import LIMIT_PREFIX
from api_gateway.limits.limit_reached import LimitReached, RefusalTemplate, allowance_in_words, members_of
from api_gateway.limits.period_counters import PeriodQuota
from api_gateway.models import Decision, Exchange
from api_gateway.rate_limiter import NEVER_NS

# Used last, by the name of the quota; names are those of the configuration.
_TEMPLATES: Final[dict[str, RefusalTemplate]] = {}


def refusal(exchange: Exchange, decision: Decision) -> GatewayError:
    """Return the error for a refused request: the limit that refused it, and the time until it would be allowed."""
    quota, client = decision.quota, exchange.client
    if decision.source == "deny":
        return StoreUnavailable(
            "The store of the rate limits is unavailable; no request is admitted without it.", retry_after=1
        )
    assert client is not None  # noqa: S101 - the client is identified before the limiter runs
    cost, remaining = exchange.cost, decision.remaining
    if isinstance(quota, ConcurrencyQuota):
        wait = decision.retry_after or 0.0
        allowed = allowance_in_words(quota)
        return ConcurrencyExceeded(
            f"Limit '{quota.policy}' allows {allowed}. Retry in about {wait:.0f} s, when one has ended.",
            retry_after=wait,
            extra=members_of(quota, client, cost, 0, decision.violated),
        )
    verb = "is limited to"
    if decision.key == client.key:
        holder = f"Client '{client.id}' (tier {quota.name})"
    elif decision.key.startswith(LIMIT_PREFIX):
        holder, verb = f"Limit '{quota.policy}'", "allows"
        own = next((charge.own_cost for charge in exchange.charges if charge.key == decision.key), None)
        cost = cost if own is None else own
    else:
        holder = f"Address '{address_key(exchange.peer)}'"
    if decision.wait_ns == NEVER_NS:
        is_period = isinstance(quota, PeriodQuota)
        has = f"allows {allowance_in_words(quota)}" if is_period else f"has a bucket of {quota.capacity} tokens"
        return CostExceedsCapacity(
            f"{holder} {has}; this request costs {cost:g} tokens and can never be allowed.",
            extra=members_of(quota, client, cost, remaining, decision.violated),
        )
    template = _TEMPLATES.get(quota.name)
    if template is None or template.quota is not quota:
        template = _TEMPLATES[quota.name] = RefusalTemplate(quota)
    wait = decision.retry_after or 0.0
    detail = f"{holder} {verb} {template.limits}{cost:g}, {remaining} remain. Retry in {wait:.3f} s."
    return LimitReached(detail, wait, template, client, cost, remaining, decision.violated)
