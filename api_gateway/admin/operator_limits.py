"""Limits on operator traffic: failed attempts and open views by address, and an allowance for each operator.

The three have tables of their own. Addresses that fail cannot use up what an operator with a valid token may do, also
not from the operator's own address; and a token that is used too often takes nothing from the others.
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
MAX_TRACKED_ADDRESSES = 16_384  # counted at once; further ones share buckets


class OperatorLimits:
    """Token buckets of this process. Every method charges one token and raises RateLimited if there is none."""

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
        """Count a failed attempt of an address."""
        _charge(self._failures, address_key(address), FAILURES, self._clock_ns(), f"Address '{address}' failed")

    def charge_view(self, address: str) -> None:
        """Count an open view that an address asked for."""
        _charge(self._open_views, address_key(address), OPEN_VIEWS, self._clock_ns(), f"Address '{address}' asked")

    def charge_operator(self, operator: Operator) -> None:
        """Count a request of an operator."""
        _charge(self._operators, operator.key, OPERATORS, self._clock_ns(), f"Operator '{operator.name}' asked")

    def log_line(self) -> int | None:
        """Return how many lines were left out since the last one if one may be written now, else None."""
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
            f"{what} too often: {quota.capacity} times at once, then {quota.rate:g} a second are allowed."
            f" Try again in {wait:.3f} s.",
            retry_after=wait,
        )
