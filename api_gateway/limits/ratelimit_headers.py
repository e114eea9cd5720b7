"""RateLimit header fields (draft-ietf-httpapi-ratelimit-headers-11), and the X-RateLimit fields in delta seconds.

The constant parts are rendered once for each quota, so a response needs one formatting operation. Reads no clock.
"""

import math

from api_gateway.models import NANOSECONDS, Decision, HeaderList, Quota

HEADER_NAMES = frozenset(
    {b"ratelimit-policy", b"ratelimit", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"}
)
_UP = NANOSECONDS - 1  # added before a division by NANOSECONDS, to round up


class RateLimitHeaders:
    """Renders decisions as header fields.

    `r` is the number of whole tokens remaining, and `t` the time in which the quota refills as many: a client that
    spends r tokens in t seconds keeps to the rate. If no token remains, `t` is the time until there is one. For a
    refused request `r` is 0 and `t` agrees with `Retry-After`; X-RateLimit-Remaining is what remains for cheaper
    requests.
    """

    def __init__(self) -> None:
        self._templates: dict[str, tuple[str, str]] = {}

    def __repr__(self) -> str:
        return f"<RateLimitHeaders of {sorted(self._templates)}>"

    def lines(self, decision: Decision) -> bytes:
        """Return the field lines in HTTP/1.1 format, each with its line break."""
        quota = decision.quota
        template = self._templates.get(quota.name)
        if template is None:
            template = self._templates[quota.name] = _template(quota)
        left = usable = decision.remaining
        if decision.wait_ns > 0:
            usable, until_ns = 0, decision.wait_ns
        elif left:
            until_ns = left * quota.emission_ns
        else:
            until_ns = decision.reset_ns - quota.burst_ns + quota.emission_ns
        effective = (until_ns + _UP) // NANOSECONDS or 1
        policy, limit = template
        return (
            f"{policy}{usable};t={effective}{limit}{left}\r\n"
            f"x-ratelimit-reset: {(decision.reset_ns + _UP) // NANOSECONDS}\r\n"
        ).encode()

    def headers(self, decision: Decision) -> HeaderList:
        """Return the fields as pairs of name and value."""
        lines = (line.split(b": ", 1) for line in self.lines(decision).splitlines())
        return [(name, value) for name, value in lines]


def _template(quota: Quota) -> tuple[str, str]:
    """Return what a quota determines of its field lines: what is before `r`, and what is between `t` and the rest."""
    name, window = quota.name.lower(), math.ceil(quota.burst_ns / NANOSECONDS)
    policy = f'ratelimit-policy: "{name}";q={quota.capacity};w={window}\r\nratelimit: "{name}";r='
    return policy, f"\r\nx-ratelimit-limit: {quota.capacity}\r\nx-ratelimit-remaining: "
