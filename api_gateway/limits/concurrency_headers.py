"""RateLimit header fields of a configuration with concurrency limits.

The draft knows the unit `concurrent-requests`, so `RateLimit-Policy` lists concurrency limits. `RateLimit` shows the
tightest bucket or quota, or the concurrency limit that refuses a request. The number of requests that would still be
admitted may change at any moment, so a concurrency limit has no `t` and is not compared with token limits.
"""

from collections.abc import Sequence

from api_gateway.limits.concurrency import ConcurrencyQuota, SlottedCharges
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.models import NANOSECONDS, Charge, Decision

_UP = NANOSECONDS - 1  # added before a division by NANOSECONDS, to round up
_LINE_END = b"\r\n"


class ConcurrencyHeaders(RateLimitHeaders):
    """Renders decisions on requests that may take slots; see `RateLimitHeaders`."""

    def lines(self, decision: Decision, charges: Sequence[Charge] = ()) -> bytes:
        """Return the field lines in HTTP/1.1 format, each with its line break; `charges` are those of the decision."""
        if not isinstance(charges, SlottedCharges):
            return super().lines(decision, charges)
        if not isinstance(decision.quota, ConcurrencyQuota):
            policy, _, rest = super().lines(decision, charges).partition(_LINE_END)
            return b"%b%b\r\n%b" % (policy, charges.policies, rest)
        names = tuple([charge.quota.name for charge in charges])
        policy = (self._policies.get(names) or self._join(names, charges)).removesuffix("\r\n").encode()
        quota = decision.quota
        return b'%b%b\r\nratelimit: "%b";r=0\r\nx-ratelimit-limit: %d\r\nx-ratelimit-remaining: 0\r\n%b' % (
            policy,
            charges.policies,
            quota.policy.encode(),
            quota.capacity,
            b"x-ratelimit-reset: %d\r\n" % ((decision.wait_ns + _UP) // NANOSECONDS),
        )
