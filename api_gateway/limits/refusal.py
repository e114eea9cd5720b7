"""The errors of requests that a rate limit refuses, and their problem details."""

import json
import math
from json.encoder import encode_basestring as quoted
from typing import Any, Final

from api_gateway.errors import CostExceedsCapacity, GatewayError, RateLimited, StoreUnavailable, problem
from api_gateway.http1.headers import address_key
from api_gateway.models import Client, Decision, Exchange, Quota
from api_gateway.rate_limiter import NEVER_NS

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
    cost, remaining = exchange.cost, decision.remaining
    if decision.key == client.key:
        holder = f"Client '{client.id}' (tier {quota.name})"
    else:
        holder = f"Address '{address_key(exchange.peer)}'"
    if decision.wait_ns == NEVER_NS:
        return CostExceedsCapacity(
            f"{holder} has a bucket of {quota.capacity} tokens; this request costs {cost:g} tokens"
            " and can never be allowed.",
            extra=_members(quota, client, cost, remaining),
        )
    template = _TEMPLATES.get(quota.name)
    if template is None or template.quota is not quota:
        template = _TEMPLATES[quota.name] = _Template(quota)
    wait = decision.retry_after or 0.0
    detail = f"{holder}{template.limits}{cost:g}, {remaining} remain. Retry in {wait:.3f} s."
    return LimitReached(detail, wait, template, client, cost, remaining)


class LimitReached(RateLimited):
    """The error of a request that a quota refuses.

    What two refusals by the same quota have in common is rendered once, and members are made when they are read: a
    client that does not wait must cost the gateway less than one whose requests are forwarded.
    """

    def __init__(
        self, detail: str, retry_after: float, template: "_Template", client: Client, cost: float, remaining: int
    ) -> None:
        super().__init__(detail, retry_after=retry_after)
        self._template = template
        self._client = client
        self._cost = cost
        self._remaining = remaining

    @property
    def extra(self) -> dict[str, Any]:
        """The extension members, see `GatewayError`."""
        return _members(self._template.quota, self._client, self._cost, self._remaining)

    def body(self, instance: str, request_id: str) -> bytes:
        """Return the problem details in JSON, equal to those of `errors.problem`."""
        a, b, c, d, e, f, g, h, end = self._template.parts
        client = self._client
        seconds = math.ceil((self.retry_after or 0.0) * 1000) / 1000
        return (
            f"{a}{quoted(self.detail)}{b}{quoted(instance)}{c}{quoted(request_id)}{d}{seconds}{e}{quoted(client.id)}"
            f"{f}{quoted(client.quota.name)}{g}{self._cost}{h}{self._remaining}{end}"
        ).encode()


class _Template:
    """What all refusals by one quota have in common: part of the detail, and what surrounds the `_VARYING` values."""

    __slots__ = ("limits", "parts", "quota")

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.limits = (
            f" is limited to {quota.capacity} tokens at once and {quota.rate:g} per second; this request costs "
        )
        sample = RateLimited("", retry_after=0.0, extra=_members(quota, Client("", "", quota, "default"), 0.0, 0))
        members = problem(sample, instance="", request_id="")
        assert tuple(name for name in members if name in _VARYING) == _VARYING  # noqa: S101 - `body` has this order
        values = {name: "\0" if name in _VARYING else json.dumps(value) for name, value in members.items()}
        self.parts = ("{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}").split("\0")

    def __repr__(self) -> str:
        return f"<_Template of {self.quota.name}>"


_TEMPLATES: Final[dict[str, _Template]] = {}  # used last, by name of the quota; names are those of the configuration


def _members(quota: Quota, client: Client, cost: float, remaining: int) -> dict[str, Any]:
    policy = quota.name.lower()
    extra: dict[str, Any] = {
        "violated-policies": [policy],
        "client_id": client.id,
        "tier": client.quota.name,
        "policy": policy,
        "cost": cost,
        "limit": quota.capacity,
        "refill_per_second": quota.rate,
        "remaining": remaining,
    }
    return extra
