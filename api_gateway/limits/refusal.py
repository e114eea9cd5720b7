"""The errors of requests that a rate limit refuses."""

from api_gateway.errors import CostExceedsCapacity, GatewayError, RateLimited, StoreUnavailable
from api_gateway.http1.headers import address_key
from api_gateway.models import Decision, Exchange
from api_gateway.rate_limiter import NEVER_NS


def refusal(exchange: Exchange, decision: Decision) -> GatewayError:
    """Return the error for a refused request: the limit that refused it, and the time until it would be allowed."""
    quota, client = decision.quota, exchange.client
    if decision.source == "deny":
        return StoreUnavailable(
            "The store of the rate limits is unavailable; no request is admitted without it.", retry_after=1
        )
    assert client is not None  # noqa: S101 - the client is identified before the limiter runs
    is_peer = decision.key != client.key
    holder = f"Address '{address_key(exchange.peer)}'" if is_peer else f"Client '{client.id}' (tier {quota.name})"
    extra = {
        "violated-policies": [quota.name.lower()],
        "client_id": client.id,
        "tier": client.quota.name,
        "policy": quota.name.lower(),
        "cost": exchange.cost,
        "limit": quota.capacity,
        "refill_per_second": quota.rate,
        "remaining": decision.remaining,
    }
    if decision.wait_ns == NEVER_NS:
        return CostExceedsCapacity(
            f"{holder} has a bucket of {quota.capacity} tokens; this request costs {exchange.cost:g} tokens"
            " and can never be allowed.",
            extra=extra,
        )
    wait = decision.retry_after or 0.0
    return RateLimited(
        f"{holder} is limited to {quota.capacity} tokens at once and {quota.rate:g} per second; this request costs"
        f" {exchange.cost:g}, {decision.remaining} remain. Retry in {wait:.3f} s.",
        retry_after=wait,
        extra=extra,
    )
