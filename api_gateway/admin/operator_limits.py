"""Rate limits of operator traffic: failed attempts and public views by address, and requests by operator.

Each has its own buckets, so that failed attempts, even from an operator's own address, take no tokens from an operator
with a valid token, and no operator takes tokens from another.
"""

from collections.abc import Callable

from api_gateway.admin.operators import Operator
from api_gateway.errors import RateLimited
from api_gateway.http1.headers import address_key
from api_gateway.models import NANOSECONDS, Charge, Quota
from api_gateway.rate_limiter import MemoryLimiter

FAILURES = Quota.per_second("failed attempts", 1, 50)
OPEN_VIEWS = Quota.per_second("open views", 20, 100)
OPERATORS = Quota.per_second("operator", 100, 500)
LOG_LINES = Quota.per_second("log lines", 0.1, 5)
MAX_TRACKED_ADDRESSES = 16_384  # addresses with their own bucket; further ones share buckets


class OperatorLimits:
    """Token buckets of this process. The `charge_` methods take one token and raise RateLimited if there is none."""

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns = clock_ns
        self._failures = MemoryLimiter([FAILURES], bucket_limit=MAX_TRACKED_ADDRESSES)
        self._open_views = MemoryLimiter([OPEN_VIEWS], bucket_limit=MAX_TRACKED_ADDRESSES)
        self._operators = MemoryLimiter([OPERATORS])
        self._log_lines = MemoryLimiter([LOG_LINES])
        self._unlogged = 0

    def __repr__(self) -> str:
        return f"<OperatorLimits [{len(self._failures)} addresses failed]>"

    def charge_failure(self, address: str) -> None:
        """Charge a failed attempt to an address."""
        _charge(
            self._failures, address_key(address), FAILURES, self._clock_ns(), f"Failed attempts of address '{address}'"
        )

    def charge_view(self, address: str) -> None:
        """Charge a public view, which needs no token, to an address."""
        _charge(
            self._open_views, address_key(address), OPEN_VIEWS, self._clock_ns(), f"Requests of address '{address}'"
        )

    def charge_operator(self, operator: Operator) -> None:
        """Charge a request to an operator."""
        _charge(self._operators, operator.key, OPERATORS, self._clock_ns(), f"Requests of operator '{operator.name}'")

    def log_line(self) -> int | None:
        """Take a token for a log line: return the number of lines suppressed since the last one.

        None if this line must be suppressed, too.
        """
        charge = Charge("", LOG_LINES, LOG_LINES.cost_ns(1))
        if not self._log_lines.decide([charge], self._clock_ns()).allowed:
            self._unlogged += 1
            return None
        unlogged, self._unlogged = self._unlogged, 0
        return unlogged


def _charge(limiter: MemoryLimiter, key: str, quota: Quota, now_ns: int, what: str) -> None:
    decision = limiter.decide([Charge(key, quota, quota.cost_ns(1))], now_ns)
    if not decision.allowed:
        wait = decision.wait_ns / NANOSECONDS
        raise RateLimited(
            f"{what} exceed the limit of {quota.capacity} at once and {quota.rate:g} per second."
            f" Retry in {wait:.3f} s.",
            retry_after=wait,
        )
