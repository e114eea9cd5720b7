"""What an answer tells of the limits: draft-ietf-httpapi-ratelimit-headers-11, and the older trio in delta seconds.

The constant parts are rendered once for each quota; an answer costs one formatting. Reads no clock.
"""

import math

from api_gateway.models import NANOSECONDS, Decision, HeaderList, Quota

NAMES = frozenset(
    {b"ratelimit-policy", b"ratelimit", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"}
)
_UP = NANOSECONDS - 1  # added before whole seconds are taken, so that they are rounded up


class LimitFields:
    """Renders decisions.

    `r` is the whole tokens left. While there are any, `t` is the time the quota takes to refill them, so that a client
    that spends r tokens in t seconds keeps to the rate; a request that has to wait is told how long.
    """

    def __init__(self) -> None:
        self._templates: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<LimitFields of {sorted(self._templates)}>"

    def lines(self, decision: Decision) -> bytes:
        """Return the fields as they go over the wire, each with its line break."""
        quota = decision.quota
        template = self._templates.get(quota.name)
        if template is None:
            template = self._templates[quota.name] = _template(quota)
        left = decision.remaining
        until_ns = decision.wait_ns if decision.wait_ns > 0 else left * quota.emission_ns
        effective = (until_ns + _UP) // NANOSECONDS or 1
        return template % (left, effective, left, (decision.reset_ns + _UP) // NANOSECONDS)

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
