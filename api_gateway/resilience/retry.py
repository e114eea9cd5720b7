"""Retries: whether a try that failed is made once more, how long that waits, and the budget all of them share.

Pure: the random source is handed in, and so is the time. Sends nothing and knows no transport.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum

from api_gateway.http1.headers import Fields
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.resilience.rate_meter import RateMeter

NO_RETRY = float("inf")
_SECONDS = re.compile(rb"[0-9]{1,9}")
_MAX_DOUBLINGS = 30


class RetryDenied(StrEnum):
    """Why a failed try was not repeated, in the order in which that is asked."""

    ATTEMPTS = "attempts"  # it has been tried as often as it may be
    METHOD = "method"  # it may have had its effect, and neither its method nor a key says that once more is harmless
    BODY = "body"  # it was not kept, and cannot be sent again
    BREAKER = "circuit_breaker"  # the upstream is in trouble, or this was the probe that asked whether it still is
    RETRY_AFTER = "retry_after"  # the upstream asked for more time than a client should be kept waiting
    DEADLINE = "deadline"  # none of the request's time would be left
    BUDGET = "budget"  # retries have had their share of the requests
    UNAVAILABLE = "unavailable"  # there was no target to be had when it came to it


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a request is tried in all, and on which terms. Durations are seconds.

    `budget` is retries as a share of live requests, 0 turns them off; `floor` is how many a second there may be
    beside them. `base` and `cap` bound the back-off, `max_retry_after` what an upstream may ask to wait. `statuses`
    are tried again as failures are; bodies up to `max_body_bytes` are kept to be sent again.
    """

    attempts: int = 1
    budget: float = 0.0
    floor: float = 0.0
    base: float = 0.025
    cap: float = 0.25
    max_retry_after: float = 1.0
    statuses: frozenset[int] = frozenset()
    max_body_bytes: int = 65_536


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A try that failed, as far as that matters to another one.

    `attempts` were made so far, this one included. `is_sent`: some of the request may have reached the upstream.
    `is_repeatable`: its method is idempotent, or it carries a key by which the upstream knows it again.
    `is_replayable`: its body, if it has one, can be sent from its start. `is_recovering`: the breaker is not closed,
    or this was its probe. `is_elsewhere`: there is a target that has not been tried. `retry_after` is what the answer
    asked for, `left` what the deadline leaves; None where there is none.
    """

    attempts: int
    is_sent: bool
    is_repeatable: bool
    is_replayable: bool = True
    is_recovering: bool = False
    is_elsewhere: bool = False
    retry_after: float | None = None
    left: float | None = None


class RetryBudget:
    """Retries as a share of live requests, so that retrying cannot multiply an outage.

    Every request adds `share` to the balance and every second `floor`, so that a quiet service can retry too; every
    retry takes 1. What is kept is at most the share of the last `SPAN` seconds' requests, as a target that begins to
    hang shows all its failures at once, and never less than `RESERVE`, which is there from the start: over any run
    there are at most share * requests + floor * seconds + RESERVE retries. After Finagle's RetryBudget. `share` 0
    allows none at all.
    """

    RESERVE = 10.0
    SPAN = 10.0  # seconds

    def __init__(self, share: float, floor: float = 0.0) -> None:
        self._share = share
        self._floor = floor if share > 0 else 0.0
        self._max_balance = self._balance = self.RESERVE if share > 0 else 0.0
        self._meter = RateMeter()
        self._counted_at: float | None = None  # until when the floor is in the balance; full before the first retry

    def __repr__(self) -> str:
        return f"<RetryBudget [{self._balance:.1f} retries left]>"

    def change(self, share: float, floor: float) -> None:
        """Go on with another share and floor; the balance stays, within what may be kept."""
        if share > 0 and self._share <= 0:
            self._max_balance = self._balance = self.RESERVE
        elif share <= 0:
            self._max_balance = self._balance = 0.0
        self._share = share
        self._floor = floor if share > 0 else 0.0

    def deposit(self, now: float) -> None:
        """Count one live request."""
        meter = self._meter
        meter.count += 1
        if now >= meter.due:
            self._measure(now)
        if self._balance < self._max_balance:
            self._balance = min(self._max_balance, self._balance + self._share)

    def withdraw(self, now: float = 0.0) -> bool:
        """Take one retry if there is one."""
        if now >= self._meter.due:
            self._measure(now)
        if self._counted_at is not None and now > self._counted_at and self._balance < self._max_balance:
            self._balance = min(self._max_balance, self._balance + self._floor * (now - self._counted_at))
        self._counted_at = now if self._counted_at is None else max(now, self._counted_at)
        if self._balance < 1:
            return False
        self._balance -= 1
        return True

    def _measure(self, now: float) -> None:
        """Bring what may be kept up to the requests there are now."""
        self._meter.mark(now)
        if self._share > 0:
            self._max_balance = max(self.RESERVE, self._share * self.SPAN * self._meter.rate(now))
            self._balance = min(self._balance, self._max_balance)


class RetryDecider:
    """The retries of one upstream: its policy, its budget, and the chance in its back-off."""

    def __init__(self, policy: RetryPolicy, source: random.Random, budget: RetryBudget | None = None) -> None:
        self.policy = policy
        self.budget = budget or RetryBudget(policy.budget, policy.floor)
        self._source = source

    def __repr__(self) -> str:
        return f"<RetryDecider of {self.policy.attempts} attempts {self.budget!r}>"

    def succeeded_by(self, policy: RetryPolicy) -> "RetryDecider":
        """Return retries by another policy that draw on the same budget."""
        self.budget.change(policy.budget, policy.floor)
        return RetryDecider(policy, self._source, self.budget)

    def decide(self, failed: FailedAttempt, now: float) -> float | RetryDenied:
        """Return the seconds to wait before another try, which is taken off the budget; or why there is none."""
        reason = _denial(failed, self.policy)
        if reason is not None:
            return reason
        wait = max(self._delay(failed), failed.retry_after or 0.0)
        if failed.left is not None and wait >= failed.left:
            return RetryDenied.DEADLINE
        return wait if self.budget.withdraw(now) else RetryDenied.BUDGET

    def _delay(self, failed: FailedAttempt) -> float:
        """Return the back-off: exponential with full jitter (Brooker 2015).

        The first retry goes to a target that has not been tried at once: the pause is there to spare one that failed,
        and the budget bounds what is added to the others.
        """
        if failed.is_elsewhere and failed.attempts == 1:
            return 0.0
        return self._source.uniform(0.0, max_delay(self.policy, failed.attempts))


def max_delay(policy: RetryPolicy, attempts: int) -> float:
    """Return how long the back-off after so many attempts can be."""
    doublings = min(attempts - 1, _MAX_DOUBLINGS)
    return min(policy.cap, policy.base * float(2**doublings))


def _denial(failed: FailedAttempt, policy: RetryPolicy) -> RetryDenied | None:
    """Return what speaks against another try whatever is left of time and budget."""
    objections = (
        (failed.attempts >= policy.attempts, RetryDenied.ATTEMPTS),
        (failed.is_sent and not failed.is_repeatable, RetryDenied.METHOD),
        (not failed.is_replayable, RetryDenied.BODY),
        (failed.is_recovering, RetryDenied.BREAKER),
        (failed.retry_after is not None and failed.retry_after > policy.max_retry_after, RetryDenied.RETRY_AFTER),
    )
    return next((reason for holds, reason in objections if holds), None)


def is_repeatable(method: str, fields: Fields) -> bool:
    """Tell whether a request may be made twice: by its method (RFC 9110 section 9.2.2), or since it has a key.

    `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header) promises that the upstream acts on it once.
    """
    return method in IDEMPOTENT or any(fields.get(b"idempotency-key", ()))


def retry_after_of(fields: Fields) -> float | None:
    """Return what an answer's `Retry-After` asks for, in seconds (RFC 9110 section 10.2.3); None without a usable one.

    A date is taken relative to the answer's own `Date`, which the same clock wrote; without one it is `NO_RETRY`.
    """
    given = fields.get(b"retry-after", ())
    if len(given) != 1:
        return NO_RETRY if given else None
    if _SECONDS.fullmatch(given[0]) is not None:
        return float(given[0])
    asked, written = (_seconds_of(values) for values in (given, fields.get(b"date", ())))
    if asked is None:
        return None
    return NO_RETRY if written is None else max(0.0, asked - written)


def _seconds_of(dates: Iterable[bytes]) -> float | None:
    try:
        return parsedate_to_datetime(next(iter(dates), b"").decode("latin-1")).timestamp()
    except (ValueError, OverflowError):
        return None
