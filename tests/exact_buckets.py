"""Token buckets by the textbook: a level in exact fractions of a token, refilled continuously, capped.

What every limiter is held against. It shares no arithmetic with them.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

from api_gateway.models import Charge, Decision, DecisionSource, Quota
from api_gateway.rate_limiter import NEVER_NS


class ExactBuckets:
    """Any number of buckets, each known by the instant at which it is full; `source` is what its decisions say."""

    def __init__(self, source: DecisionSource = "memory") -> None:
        self.source: DecisionSource = source
        self.full_at: dict[str, Fraction] = {}
        self.passed_ns = 0  # all the time that has passed, whatever the clock showed
        self._written: dict[str, tuple[int, Fraction]] = {}  # when, by that, and what was owed then

    def __repr__(self) -> str:
        return f"<ExactBuckets [{len(self.full_at)}]>"

    def owed(self, key: str, now_ns: int) -> Fraction:
        """Return the nanoseconds until a bucket is full."""
        return max(self.full_at.get(key, Fraction(now_ns)) - now_ns, Fraction(0))

    def owe(self, key: str, owed_ns: Fraction | int, now_ns: int) -> None:
        """Set what a bucket owes."""
        self.full_at[key] = Fraction(now_ns + owed_ns)
        self._written[key] = self.passed_ns, Fraction(owed_ns)

    def forget(self, key: str) -> None:
        """Take a bucket for full, because the limiter does: it may, once as much time has passed as was owed."""
        at_ns, owed_ns = self._written.pop(key)
        assert self.passed_ns - at_ns >= owed_ns, f"{key} is forgotten and still owes"
        del self.full_at[key]

    def refill(self, key: str) -> None:
        """Fill a bucket."""
        self.full_at.pop(key, None)
        self._written.pop(key, None)

    def level(self, key: str, quota: Quota, now_ns: int) -> Fraction:
        """Return the tokens a bucket holds; below 0 is what it owes beyond being empty."""
        return quota.capacity - self.owed(key, now_ns) / quota.emission_ns

    def heal(self, key: str, quota: Quota, now_ns: int) -> None:
        """Make a bucket empty that owes more than a bucket can: the clock has stepped back."""
        if self.level(key, quota, now_ns) < -quota.capacity:
            self.owe(key, quota.burst_ns, now_ns)

    def inspect(self, charge: Charge, now_ns: int) -> Decision:
        """Return what one bucket says to a charge, charging nothing."""
        level = self.level(charge.key, charge.quota, now_ns)
        if level < -charge.quota.capacity:
            level = Fraction(0)
        return self._said(charge, level, now_ns)

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Charge every bucket or none; return the tightest one's decision, or the longest refusal."""
        said = []
        for charge in charges:
            self.heal(charge.key, charge.quota, now_ns)
            said.append(self._said(charge, self.level(charge.key, charge.quota, now_ns), now_ns))
        refusals = [one for one in said if not one.allowed]
        if refusals:
            impossible = [one for one in refusals if one.wait_ns == NEVER_NS]
            longest = impossible[0] if impossible else max(refusals, key=lambda one: one.wait_ns)
            violated = tuple(one.quota for one in refusals) if len(charges) > 1 else ()
            return replace(longest, violated=violated)
        for charge in charges:
            if charge.increment_ns:
                self.owe(charge.key, self.owed(charge.key, now_ns) + charge.increment_ns, now_ns)
        return said[self.tightest(charges, now_ns)]

    def tightest(self, charges: Sequence[Charge], now_ns: int) -> int:
        """Return which bucket has, after the charges, tokens for the fewest further such requests."""
        further: list[tuple[bool, Fraction]] = []
        for charge in charges:
            level = self.level(charge.key, charge.quota, now_ns)
            cost = Fraction(charge.increment_ns, charge.quota.emission_ns)
            further.append((True, Fraction(0)) if cost == 0 else (False, level / cost))
        return min(range(len(charges)), key=further.__getitem__)

    def _said(self, charge: Charge, level: Fraction, now_ns: int) -> Decision:
        quota = charge.quota
        cost = Fraction(charge.increment_ns, quota.emission_ns)
        allowed = cost <= level
        wait_ns = Fraction(0) if allowed else (cost - level) * quota.emission_ns
        left = level - cost if allowed else level
        reset_ns = (quota.capacity - left) * quota.emission_ns
        assert wait_ns.denominator == reset_ns.denominator == 1
        return Decision(
            charge.key,
            quota,
            allowed,
            math.floor(max(left, Fraction(0))),
            NEVER_NS if cost > quota.capacity else int(wait_ns),
            int(reset_ns),
            now_ns,
            source=self.source,
        )

    def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Keep the share of the bucket that is filled."""
        if self.owed(key, now_ns):
            self.heal(key, old, now_ns)
            self.owe(key, self.owed(key, now_ns) / old.burst_ns * new.burst_ns, now_ns)


History = Sequence[tuple[int, Fraction | int]]  # instants, and what was admitted then


def assert_conforms(admitted: History, capacity: Fraction | int, per_ns: Fraction | int) -> None:
    """No window of any length d may hold more than capacity + per_ns * d."""
    totals = [Fraction(0), *accumulate(Fraction(cost) for _, cost in admitted)]
    for first, (begin, _) in enumerate(admitted):
        for last, (end, _) in enumerate(admitted[first:], first):
            assert totals[last + 1] - totals[first] <= capacity + per_ns * (end - begin)
