"""The errors of requests that a rate limit refuses, and their problem details."""

import json
import math
from functools import lru_cache
from json.encoder import encode_basestring as quoted
from typing import Any

from api_gateway.errors import CostExceedsCapacity, GatewayError, RateLimited, StoreUnavailable, problem
from api_gateway.http1.headers import address_key
from api_gateway.models import Decision, Exchange
from api_gateway.rate_limiter import NEVER_NS

IS_BY_QUOTA = "policy"  # only the errors of `refusal` have this member
# Members of the problem details that differ between two refusals by the same quota, in their order.
_VARYING = (
    "detail",
    "instance",
    "request_id",
    "retry_after_seconds",
    "client_id",
    "tier",
    "cost",
    "remaining",
)


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
    extra = _members(
        quota.name.lower(), quota.capacity, quota.rate, client.id, client.quota.name, exchange.cost, decision.remaining
    )
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


def refusal_body(error: RateLimited, *, instance: str, request_id: str) -> str:
    """Return the problem details of an error of `refusal` in JSON, equal to `errors.problem`.

    What two refusals by the same quota have in common is rendered once: a client that does not wait must cost the
    gateway less than one whose requests are forwarded.
    """
    extra = error.extra
    a, b, c, d, e, f, g, h, end = _parts(extra["policy"], extra["limit"], extra["refill_per_second"])
    seconds = math.ceil((error.retry_after or 0.0) * 1000) / 1000
    return (
        f"{a}{quoted(error.detail)}{b}{quoted(instance)}{c}{quoted(request_id)}{d}{seconds}{e}{quoted(extra['client_id'])}"
        f"{f}{quoted(extra['tier'])}{g}{extra['cost']}{h}{extra['remaining']}{end}"
    )


@lru_cache(maxsize=1024, typed=True)  # typed: 1 and 1.0 differ in JSON
def _parts(policy: str, limit: int, rate: float) -> list[str]:
    """Return the problem details of refusals by a quota: what surrounds the values of `_VARYING`."""
    sample = RateLimited("", retry_after=0.0, extra=_members(policy, limit, rate, "", "", 0.0, 0))
    members = problem(sample, instance="", request_id="")
    assert tuple(name for name in members if name in _VARYING) == _VARYING  # noqa: S101 - `refusal_body` has this order
    values = {name: "\0" if name in _VARYING else json.dumps(value) for name, value in members.items()}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}").split("\0")


def _members(
    policy: str, limit: int, rate: float, client_id: str, tier: str, cost: float, remaining: int
) -> dict[str, Any]:
    extra: dict[str, Any] = {
        "violated-policies": [policy],
        "client_id": client_id,
        "tier": tier,
        "policy": policy,
        "cost": cost,
        "limit": limit,
        "refill_per_second": rate,
        "remaining": remaining,
    }
    return extra
