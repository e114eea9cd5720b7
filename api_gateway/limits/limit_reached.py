"""The error of a request that a quota refuses, and its problem details, most of which are rendered once."""

import json
import math
from collections.abc import Sequence
from json.encoder import encode_basestring as quoted
from typing import Any

from api_gateway.errors import RateLimited, problem
from api_gateway.limits.concurrency import ConcurrencyQuota
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import Client, Quota

_encode = json.JSONEncoder(ensure_ascii=False).encode

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


class LimitReached(RateLimited):
    """The error of a request that a quota refuses.

    The parts that refusals by one quota share are rendered once, and members are computed when they are read: a
    refused request must cost the gateway less than a forwarded one. `field_lines` are the header fields, as lines.
    """

    # Exceptions have a dictionary, too, but these attributes are not in it.
    __slots__ = (
        "_remaining",
        "_situation",
        "_template",
        "_violated",
        "detail",
        "field_lines",
        "headers",
        "retry_after",
    )

    def __init__(  # that of `GatewayError` takes twice the time for the same attributes
        self, template: "RefusalTemplate", retry_after: float, remaining: int, violated: Sequence[Quota] = ()
    ) -> None:
        """`violated` are the quotas that refuse the request, if there are several."""
        self._situation = f"{remaining} remain. Retry in {retry_after:.3f} s."
        self.detail = template.cause + self._situation
        self.retry_after = retry_after
        seconds = math.ceil(retry_after) or 1
        self.headers = {"retry-after": str(seconds)}
        self.field_lines = b"retry-after: %d\r\n" % seconds
        self._violated = violated
        self._template = template
        self._remaining = remaining

    def __str__(self) -> str:
        return self.detail

    @property
    def extra(self) -> dict[str, Any]:
        """The extension members, see `GatewayError`."""
        template = self._template
        return members_of(template.quota, template.client, template.cost, self._remaining, self._violated)

    def body(self, instance: str, request_id: str) -> bytes:
        """Return the problem details in JSON, equal to those of `errors.problem`."""
        if len(self._violated) > 1:
            return _encode(problem(self, instance=instance, request_id=request_id)).encode()
        start, a, b, c, d, end = self._template.parts
        seconds = math.ceil((self.retry_after or 0.0) * 1000) / 1000
        return (
            f"{start}{self._situation}{a}{quoted(instance)}{b}{quoted(request_id)}{c}{seconds}{d}{self._remaining}{end}"
        ).encode()


class RefusalTemplate:
    """The common parts of all refusals of one client by one bucket at one cost.

    These are the beginning of the detail (`cause`) and the `parts` of the problem details before, between and after
    the varying values: the rest of the detail, instance, request id, seconds and remaining tokens.
    """

    __slots__ = ("cause", "client", "cost", "parts", "quota")

    def __init__(self, template: "QuotaTemplate", holder: str, client: Client, cost: float) -> None:
        """`holder` is the subject and verb of the detail: the client, address or key that the quota limits."""
        self.quota = template.quota
        self.client = client
        self.cost = cost
        self.cause = f"{holder} {template.limits}{cost:g}, "
        a, b, c, d, e, f, g, h, end = template.parts
        told = f"{e}{quoted(client.id)}{f}{quoted(client.quota.name)}{g}{cost}{h}"
        self.parts = a + quoted(self.cause)[:-1], f'"{b}', c, d, told, end

    def __repr__(self) -> str:
        return f"<RefusalTemplate of {self.client.id!r} by {self.quota.name}>"


class QuotaTemplate:
    """The common parts of all refusals by one quota: of the detail, and the text around the `_VARYING` values."""

    __slots__ = ("limits", "parts", "quota")

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.limits = f"{allowance_in_words(quota)}; this request costs "
        sample = RateLimited("", retry_after=0.0, extra=members_of(quota, Client("", "", quota, "default"), 0.0, 0))
        members = problem(sample, instance="", request_id="")
        assert tuple(name for name in members if name in _VARYING) == _VARYING  # noqa: S101 - `body` has this order
        values = {name: "\0" if name in _VARYING else json.dumps(value) for name, value in members.items()}
        self.parts = ("{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}").split("\0")

    def __repr__(self) -> str:
        return f"<QuotaTemplate of {self.quota.name}>"


def allowance_in_words(quota: Quota) -> str:
    """Return in words what a quota allows."""
    if isinstance(quota, ConcurrencyQuota):
        return f"{quota.capacity} requests in flight" if quota.capacity > 1 else "one request in flight"
    if isinstance(quota, PeriodQuota):
        zone = (
            f"{quota.calendar.unit} of the client"
            if quota.is_from_start
            else f"{quota.calendar.unit} ({quota.calendar.zone.key})"
        )
        return f"{quota.capacity} tokens in each {zone}"
    return f"{quota.capacity} tokens at once and {quota.rate:g} per second"


def members_of(
    quota: Quota, client: Client, cost: float, remaining: int, violated: Sequence[Quota] = ()
) -> dict[str, Any]:
    """Return the extension members of the problem details of a refusal by a quota.

    `violated` are the quotas of all buckets that refuse, if there are several.
    """
    policy = quota.policy
    extra: dict[str, Any] = {
        "violated-policies": [one.policy for one in violated] or [policy],
        "client_id": client.id,
        "tier": client.quota.name,
        "policy": policy,
        "cost": cost,
        "limit": quota.capacity,
        "refill_per_second": quota.rate,
        "remaining": remaining,
    }
    if isinstance(quota, ConcurrencyQuota):
        for name in ("cost", "refill_per_second", "remaining"):
            del extra[name]
        extra["in_flight"] = quota.capacity
    if isinstance(quota, PeriodQuota):
        del extra["refill_per_second"]
        extra["period"], extra["time_zone"] = quota.calendar.unit, quota.calendar.zone.key
    return extra
