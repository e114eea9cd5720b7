"""The error that a request refused by a rate limit ends with."""

from api_gateway.errors import CostExceedsCapacity, GatewayError, RateLimited, StoreUnavailable
from api_gateway.http1.headers import address_key
from api_gateway.models import Decision, Exchange
from api_gateway.rate_limiter import NEVER_NS


def refusal(exchange: Exchange, decision: Decision) -> GatewayError:
    """Return the error that tells the client which limit refused it, and when the same request will pass."""
    quota, client = decision.quota, exchange.client
    if decision.source == "deny":
        return StoreUnavailable(
            "The store of the rate limits does not answer, and nothing is admitted without it.", retry_after=1
        )
    assert client is not None  # noqa: S101 - Identify came before
    is_peer = decision.key != client.key
    who = f"Address '{address_key(exchange.peer)}'" if is_peer else f"Client '{client.id}' (tier {quota.name})"
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
            f"The request costs {exchange.cost:g} tokens; the bucket of {who} holds {quota.capacity} at most.",
            extra=extra,
        )
    wait = decision.retry_after or 0.0
    return RateLimited(
        f"{who} may spend {quota.capacity} tokens at once and then {quota.rate:g} a second; this request costs"
        f" {exchange.cost:g} and {decision.remaining} are left. It passes in {wait:.3f} s.",
        retry_after=wait,
        extra=extra,
    )
