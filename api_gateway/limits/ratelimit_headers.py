"""What an answer tells of the limits: draft-ietf-httpapi-ratelimit-headers-11, and the older trio in delta seconds.

The constant parts are rendered once for each quota; an answer costs one formatting. Reads no clock.
"""

import math

from api_gateway.models import NANOSECONDS, Decision, HeaderList, Quota

HEADER_NAMES = frozenset(
    {b"ratelimit-policy", b"ratelimit", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"}
)
_UP = NANOSECONDS - 1  # added before whole seconds are taken, so that they are rounded up


class RateLimitHeaders:
    """Renders decisions.

    `r` is the whole tokens left, and `t` the time the quota takes to refill as many: a client that spends r tokens in
    t seconds keeps to the rate. Without a token left, `t` is the time until there is one. A request that has to wait
    is told r=0 and how long, in agreement with its `Retry-After`; X-RateLimit-Remaining says what is left for cheaper
    ones.
    """

    def __init__(self) -> None:
        self._templates: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<RateLimitHeaders of {sorted(self._templates)}>"

    def lines(self, decision: Decision) -> bytes:
        """Return the fields as they go over the wire, each with its line break."""
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
        return template % (usable, effective, left, (decision.reset_ns + _UP) // NANOSECONDS)

    def headers(self, decision: Decision) -> HeaderList:
        """Return the same as pairs."""
        lines = (line.split(b": ", 1) for line in self.lines(decision).splitlines())
        return [(name, value) for name, value in lines]


def _template(quota: Quota) -> bytes:
    """Return the header lines under this quota, with blanks for what differs from one answer to the next."""
    name = quota.name.lower().encode()  # letters, digits and "_.-", so no blank of its own
    window = math.ceil(quota.burst_ns / NANOSECONDS)
    return (
        b'ratelimit-policy: "%b";q=%d;w=%d\r\n'
        b'ratelimit: "%b";r=%%d;t=%%d\r\n'
        b"x-ratelimit-limit: %d\r\n"
        b"x-ratelimit-remaining: %%d\r\n"
        b"x-ratelimit-reset: %%d\r\n"
    ) % (name, quota.capacity, window, name, quota.capacity)
