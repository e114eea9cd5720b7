"""The errors of requests that a rate limit refuses."""

from typing import Final

from api_gateway.errors import ConcurrencyExceeded, CostExceedsCapacity, GatewayError, StoreUnavailable
from api_gateway.http1.headers import address_key
from api_gateway.limits.concurrency import ConcurrencyQuota, slot_share
from api_gateway.limits.limit import LIMIT_PREFIX
from api_gateway.limits.limit_reached import (
    LimitReached,
    QuotaTemplate,
    RefusalTemplate,
    allowance_in_words,
    members_of,
)
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import Client, Decision, Exchange, Quota, sharing_processes
from api_gateway.rate_limiter import NEVER_NS

# Used last, by the name of the quota; names are those of the configuration.
_BY_QUOTA: Final[dict[str, QuotaTemplate]] = {}
# Used last, by the key of the bucket: a client that does not wait is refused by the same one again and again.
_BY_BUCKET: Final[dict[str, RefusalTemplate]] = {}
MOST_REMEMBERED_REFUSALS = 1_024  # entries of the latter, about 1.5 KB each


def refusal(exchange: Exchange, decision: Decision) -> GatewayError:
    """Return the error for a refused request: the limit that refused it, and the time until it would be allowed."""
    quota, client = decision.quota, exchange.client
    if decision.source == "deny":
        return StoreUnavailable(
            "The store of the rate limits is unavailable; no request is admitted without it.", retry_after=1
        )
    assert client is not None  # noqa: S101 - the client is identified before the limiter runs
    cost, remaining, key = exchange.cost, decision.remaining, decision.key
    if isinstance(quota, ConcurrencyQuota):
        wait = decision.retry_after or 0.0
        allowed, extra = allowance_in_words(quota), members_of(quota, client, cost, 0, decision.violated)
        processes = sharing_processes(decision)
        if processes is not None:
            extra["in_flight"] = share = slot_share(quota.capacity, processes)
            allowed += f"; the store is unavailable, so each of {processes} processes admits its share of {share}"
        return ConcurrencyExceeded(
            f"Limit '{quota.policy}' allows {allowed}. Retry in about {wait:.0f} s, when one has ended.",
            retry_after=wait,
            extra=extra,
        )
    is_named = key.startswith(LIMIT_PREFIX)
    if is_named:
        own = next((charge.own_cost for charge in exchange.charges if charge.key == key), None)
        cost = cost if own is None else own
    if decision.wait_ns == NEVER_NS:
        holder = _holder(exchange, client, decision, is_named=is_named)
        is_period = isinstance(quota, PeriodQuota)
        has = f"allows {allowance_in_words(quota)}" if is_period else f"has a bucket of {quota.capacity} tokens"
        return CostExceedsCapacity(
            f"{holder} {has}; this request costs {cost:g} tokens and can never be allowed.",
            extra=members_of(quota, client, cost, remaining, decision.violated),
        )
    template = _BY_BUCKET.get(key)
    if template is None or template.quota is not quota or template.client is not client or template.cost != cost:
        verb = "allows" if is_named else "is limited to"
        holder = f"{_holder(exchange, client, decision, is_named=is_named)} {verb}"
        if len(_BY_BUCKET) >= MOST_REMEMBERED_REFUSALS:
            _BY_BUCKET.clear()
        template = _BY_BUCKET[key] = RefusalTemplate(_of_quota(quota), holder, client, cost)
    return LimitReached(template, decision.retry_after or 0.0, remaining, decision.violated)


def _holder(exchange: Exchange, client: Client, decision: Decision, *, is_named: bool) -> str:
    """Return the subject of a refusal's detail: the client, address or key that the quota limits."""
    if is_named:
        return f"Limit '{decision.quota.policy}'"
    if decision.key == client.key:
        return f"Client '{client.id}' (tier {decision.quota.name})"
    return f"Address '{address_key(exchange.client_address)}'"


def _of_quota(quota: Quota) -> QuotaTemplate:
    template = _BY_QUOTA.get(quota.name)
    if template is None or template.quota is not quota:
        template = _BY_QUOTA[quota.name] = QuotaTemplate(quota)
    return template
