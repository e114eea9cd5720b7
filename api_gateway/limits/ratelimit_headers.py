"""RateLimit header fields (draft-ietf-httpapi-ratelimit-headers-11), and the X-RateLimit fields in delta seconds.

The constant parts are rendered once for each quota, and for each combination of quotas, so a response needs one
formatting operation. Reads no clock.
"""

import math
from collections.abc import Sequence

from api_gateway.limits.periods import PERIOD_LENGTHS
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.models import NANOSECONDS, Charge, Decision, HeaderList, Quota

HEADER_NAMES = frozenset(
    {b"ratelimit-policy", b"ratelimit", b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset"}
    | {b"x-quota-warning"}
)
_UP = NANOSECONDS - 1  # added before a division by NANOSECONDS, to round up


_MOST_COMBINATIONS = 4096  # of limits that apply together; more are rendered anew


class RateLimitHeaders:
    """Renders decisions as header fields: the remaining tokens of one bucket, and the policies of all.

    `r` is the number of whole tokens remaining, and `t` the time in which the quota refills as many: a client that
    spends r tokens in t seconds keeps to the rate. If no token remains, `t` is the time until there is one. Of a
    calendar quota, `t` is the time until its period ends, and `w` the length of a period (of a month, 31 days). For a
    refused request `r` is 0 and `t` agrees with `Retry-After`; X-RateLimit-Remaining is what remains for cheaper
    requests.
    """

    def __init__(self) -> None:
        self._templates: dict[str, tuple[str, str, str, bool]] = {}
        self._policies: dict[tuple[str, ...], str] = {}

    def __repr__(self) -> str:
        return f"<RateLimitHeaders of {sorted(self._templates)}>"

    def lines(self, decision: Decision, charges: Sequence[Charge] = ()) -> bytes:
        """Return the field lines in HTTP/1.1 format, each with its line break; `charges` are those of the decision."""
        quota = decision.quota
        template = self._templates.get(quota.name)
        if template is None:
            template = self._templates[quota.name] = _template(quota)
        policy, own, limit, is_period = template
        left = usable = decision.remaining
        if decision.wait_ns > 0:
            usable, until_ns = 0, decision.wait_ns
        elif is_period:
            until_ns = decision.reset_ns
        elif left:
            until_ns = left * quota.emission_ns
        else:
            until_ns = decision.reset_ns - quota.burst_ns + quota.emission_ns
        effective = (until_ns + _UP) // NANOSECONDS or 1
        if len(charges) > 1:
            names = tuple([charge.quota.name for charge in charges])
            policy = self._policies.get(names) or self._join(names, charges)
        lines = (
            f"{policy}{own}{usable};t={effective}{limit}{left}\r\n"
            f"x-ratelimit-reset: {(decision.reset_ns + _UP) // NANOSECONDS}\r\n"
        )
        if decision.notices:
            told = [f'"{one.policy}";at={one.share:g};r={one.remaining};t={one.seconds}' for one in decision.notices]
            lines += f"x-quota-warning: {', '.join(told)}\r\n"
        return lines.encode()

    def headers(self, decision: Decision, charges: Sequence[Charge] = ()) -> HeaderList:
        """Return the fields as pairs of name and value."""
        lines = (line.split(b": ", 1) for line in self.lines(decision, charges).splitlines())
        return [(name, value) for name, value in lines]

    def _join(self, names: tuple[str, ...], charges: Sequence[Charge]) -> str:
        """Return the line with the policies of all limits that apply together, and keep it."""
        if len(self._policies) >= _MOST_COMBINATIONS:
            self._policies.clear()
        line = self._policies[names] = f"ratelimit-policy: {', '.join([_policy(one.quota) for one in charges])}\r\n"
        return line


def _policy(quota: Quota) -> str:
    if isinstance(quota, PeriodQuota):
        window = PERIOD_LENGTHS[quota.calendar.unit]
    else:
        window = math.ceil(quota.burst_ns / NANOSECONDS)
    return f'"{quota.policy}";q={quota.capacity};w={window}'


def _template(quota: Quota) -> tuple[str, str, str, bool]:
    """Return the constant parts of a quota's field lines: its policy, the text before `r`, and the text after `t`.

    The last value is whether it is a calendar quota.
    """
    return (
        f"ratelimit-policy: {_policy(quota)}\r\n",
        f'ratelimit: "{quota.policy}";r=',
        f"\r\nx-ratelimit-limit: {quota.capacity}\r\nx-ratelimit-remaining: ",
        isinstance(quota, PeriodQuota),
    )
