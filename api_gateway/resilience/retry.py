"""Retries: whether a failed attempt is repeated, the backoff before it, and the retry budget of an upstream.

No I/O; time and random source are passed in.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import ClassVar

from api_gateway.http1.headers import Fields
from api_gateway.http1.methods import IDEMPOTENT, KNOWN_METHODS
from api_gateway.resilience.rate_meter import RateMeter

NO_RETRY = float("inf")
_SECONDS = re.compile(rb"[0-9]{1,9}")
_MAX_DOUBLINGS = 30


class RetryDenied(StrEnum):
    """Why a failed attempt was not repeated, in the order of the checks."""

    ATTEMPTS = "attempts"  # the maximum number of attempts was made
    METHOD = "method"  # the request may have been processed, and neither its method nor a key makes it repeatable
    BODY = "body"  # the body was not kept, so it cannot be sent again
    BREAKER = "circuit_breaker"  # the breaker is not closed, or this attempt was its probe
    RETRY_AFTER = "retry_after"  # the upstream's Retry-After exceeds `max_retry_after`
    DEADLINE = "deadline"  # the deadline would have passed
    BUDGET = "budget"  # the retry budget is used up
    UNAVAILABLE = "unavailable"  # no target was available for the retry


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of retries; durations in seconds.

    `attempts` is the maximum per request, the first included. `budget` is the share of retries in live requests, 0
    disables them; `floor` is the number of additional retries per second. `base` and `cap` limit the backoff,
    `max_retry_after` the upstream's Retry-After. Responses with `statuses` are retried; bodies up to `max_body_bytes`
    are kept for retries.
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
    """A failed attempt: the facts that decide on a retry.

    `attempts`: the number of attempts so far, this one included. `is_sent`: the upstream may have received a part of
    the request. `is_repeatable`: the method is idempotent, or the request has an idempotency key. `is_replayable`: the
    body, if any, can be sent again from its start. `is_recovering`: the breaker is not closed, or this attempt was its
    probe. `is_elsewhere`: an untried target is available. `retry_after`: the response's Retry-After in seconds;
    `left`: the seconds until the deadline; None if there is none.
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
    """Limits retries to a share of live requests, so that they cannot amplify an outage.

    Each request adds `share` to the balance and each second `floor`, so that upstreams with few requests can retry
    too; each retry takes 1. The maximum balance is the share of the requests of the last `SPAN` seconds, because all
    failures of a hanging target appear at once, and at least `RESERVE`, which is also the initial balance. In total
    there are at most share * requests + floor * seconds + RESERVE retries. After Finagle's RetryBudget. `share` 0
    permits no retries.
    """

    __slots__ = (
        "_balance",
        "_counted_at",
        "_floor",
        "_max_balance",
        "_meter",
        "_share",
    )

    RESERVE: ClassVar = 10.0
    SPAN: ClassVar = 10.0  # seconds

    def __init__(self, share: float, floor: float = 0.0) -> None:
        self._share = share
        self._floor = floor if share > 0 else 0.0
        self._max_balance = self._balance = self.RESERVE if share > 0 else 0.0
        self._meter = RateMeter()
        self._counted_at: float | None = (
            None  # the time until which the floor was added; None before the first retry, while the balance is full
        )

    def __repr__(self) -> str:
        return f"<RetryBudget [{self._balance:.1f} retries left]>"

    def change(self, share: float, floor: float) -> None:
        """Apply another share and floor; the balance is kept within the new maximum."""
        if share > 0 and self._share <= 0:
            self._max_balance = self._balance = self.RESERVE
        elif share <= 0:
            self._max_balance = self._balance = 0.0
        self._share = share
        self._floor = floor if share > 0 else 0.0

    def deposit(self, now: float) -> None:
        """Add the share of one live request."""
        meter = self._meter
        meter.count += 1
        if now >= meter.due:
            self._measure(now)
        if self._balance < self._max_balance:
            self._balance = min(self._max_balance, self._balance + self._share)

    def withdraw(self, now: float = 0.0) -> bool:
        """Take one retry; return whether the balance permitted it."""
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
        """Adjust the maximum balance to the current rate of requests."""
        self._meter.mark(now)
        if self._share > 0:
            self._max_balance = max(self.RESERVE, self._share * self.SPAN * self._meter.rate(now))
            self._balance = min(self._balance, self._max_balance)


class RetryDecider:
    """Decides on the retries of one upstream by its policy and budget."""

    __slots__ = (
        "_source",
        "budget",
        "policy",
    )

    def __init__(self, policy: RetryPolicy, source: random.Random, budget: RetryBudget | None = None) -> None:
        self.policy = policy
        self.budget = budget or RetryBudget(policy.budget, policy.floor)
        self._source = source

    def __repr__(self) -> str:
        return f"<RetryDecider of {self.policy.attempts} attempts {self.budget!r}>"

    def succeeded_by(self, policy: RetryPolicy) -> "RetryDecider":
        """Return a decider with another policy and the same budget."""
        self.budget.change(policy.budget, policy.floor)
        return RetryDecider(policy, self._source, self.budget)

    def decide(self, failed: FailedAttempt, now: float) -> float | RetryDenied:
        """Return the seconds to wait before a retry, which is taken from the budget, or why there is none."""
        reason = _denial(failed, self.policy)
        if reason is not None:
            return reason
        wait = max(self._delay(failed), failed.retry_after or 0.0)
        if failed.left is not None and wait >= failed.left:
            return RetryDenied.DEADLINE
        return wait if self.budget.withdraw(now) else RetryDenied.BUDGET

    def _delay(self, failed: FailedAttempt) -> float:
        """Return the backoff: exponential with full jitter (Brooker 2015).

        The first retry on an untried target is immediate: the delay protects a target that failed, and the budget
        limits the additional load of the others.
        """
        if failed.is_elsewhere and failed.attempts == 1:
            return 0.0
        return self._source.uniform(0.0, max_delay(self.policy, failed.attempts))


def max_delay(policy: RetryPolicy, attempts: int) -> float:
    """Return the maximum backoff in seconds after this many attempts."""
    doublings = min(attempts - 1, _MAX_DOUBLINGS)
    return min(policy.cap, policy.base * float(2**doublings))


def _denial(failed: FailedAttempt, policy: RetryPolicy) -> RetryDenied | None:
    """Return the reason against a retry that does not depend on deadline and budget, or None."""
    objections = (
        (failed.attempts >= policy.attempts, RetryDenied.ATTEMPTS),
        (failed.is_sent and not failed.is_repeatable, RetryDenied.METHOD),
        (not failed.is_replayable, RetryDenied.BODY),
        (failed.is_recovering, RetryDenied.BREAKER),
        (failed.retry_after is not None and failed.retry_after > policy.max_retry_after, RetryDenied.RETRY_AFTER),
    )
    return next((reason for holds, reason in objections if holds), None)


def is_repeatable(method: str, fields: Fields) -> bool:
    """Return whether a request may be repeated: an idempotent method (RFC 9110, section 9.2.2), or a key.

    With `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header) the upstream processes the request only once. A
    request with an unknown method is never repeated.
    """
    return method in IDEMPOTENT or (method in KNOWN_METHODS and any(fields.get(b"idempotency-key", ())))


def retry_after_of(fields: Fields) -> float | None:
    """Return the `Retry-After` of a response in seconds (RFC 9110, section 10.2.3); None if absent or unusable.

    A date is relative to the response's `Date`, which is from the same clock; without that field, and for several
    values, the result is `NO_RETRY`.
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
