"""Token buckets: the arithmetic, the protocol every limiter speaks, and the limiter that lives in memory.

A bucket is one integer, its theoretical arrival time (TAT): the moment at which it will be full again. With emission
interval T and budget B = capacity * T, the bucket holds (B - max(0, TAT - now)) / T tokens, and a cost of c tokens
passes if and only if max(TAT, now) + c*T <= now + B. That is the generic cell rate algorithm (ITU-T I.371), which is
the token bucket with continuous refill. All arithmetic is in integer nanoseconds; nothing here reads a clock.

Refusals and zero costs write nothing. Decisions are atomic because they run on one thread without awaiting; the
limiter is not thread-safe.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from api_gateway.models import Charge, Decision, Quota

NEVER = -1
OVERFLOW_SLOTS = 65_536
_SWEEP = 8  # retired entries freed per decision: more than one decision can add, so it always catches up


class RateLimiter(Protocol):
    """What the gateway asks of a limiter, wherever its buckets are kept."""

    async def acquire(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Charge all buckets or none. Returns the decision of the first bucket, or of the one that refuses longest."""
        ...

    def peek(self, key: str, quota: Quota, now_ns: int) -> Decision:
        """Return the bucket as it is, charging nothing."""
        ...

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Move the bucket from one quota to another, keeping the share of it that is filled."""
        ...


def take(tat_ns: int, burst_ns: int, increment_ns: int, now_ns: int) -> tuple[int, int]:
    """Charge a bucket: return its new TAT and 0, or the TAT it keeps and the exact wait in nanoseconds.

    At `now_ns + wait` the same charge passes; one nanosecond earlier it does not. A charge above the whole budget
    never passes: its wait is `NEVER`. A TAT beyond what a full debt explains (a clock that stepped back, a smaller
    budget than before) is brought back to "empty now", and that repair is what the caller must store.
    """
    base = min(max(tat_ns, now_ns), now_ns + burst_ns)
    charged = base + increment_ns
    wait_ns = charged - (now_ns + burst_ns)
    if wait_ns <= 0:
        return charged, 0
    return base, wait_ns if increment_ns <= burst_ns else NEVER


def rescale(tat_ns: int, old: Quota, new: Quota, now_ns: int) -> int:
    """Return the TAT that leaves the same share of the bucket filled under `new`; rounded to the stricter side."""
    debt_ns = min(max(tat_ns - now_ns, 0), old.burst_ns)
    return now_ns - (-debt_ns * new.burst_ns // old.burst_ns)


class MemoryLimiter:
    """Buckets in two plain dicts, forgotten once full.

    Entries are written to the current generation and read from both. When a generation is older than the largest
    budget of any quota, everything in the one before it is full again, and a full bucket is the same as none: so
    dropping it changes no decision. A bucket thus costs one dict entry, lives for at most two such periods after its
    last use, and needs no timer.

    `bucket_limit` bounds the entries. Beyond it a new key draws on one of 65,536 shared buckets, chosen by hash. A
    shared bucket admits no more to all its keys together than to one, and an entry made for such a key later starts
    from it; so nobody gains by filling the table, but strangers may then have to share.
    """

    def __init__(self, quotas: Iterable[Quota], *, bucket_limit: int = 1_000_000) -> None:
        """Hold buckets of any of `quotas`. A quota with a longer budget may only come in by `change_quota`."""
        self._period_ns = max((quota.burst_ns for quota in quotas), default=1)
        self._bucket_limit = bucket_limit
        self._current: dict[str, int] = {}
        self._previous: dict[str, int] = {}
        self._retired: list[dict[str, int]] = []
        self._overflow: dict[int, int] = {}
        self._rotated_at_ns = 0  # the first decision rotates two empty generations
        self.overflowed = 0

    def __repr__(self) -> str:
        return f"<MemoryLimiter [{len(self)} of {self._bucket_limit} buckets, {self.overflowed} overflowed]>"

    def __len__(self) -> int:
        """Return the entries held; a bucket used in two generations counts twice."""
        return len(self._current) + len(self._previous)

    @property
    def bucket_limit(self) -> int:
        """Entries held at most."""
        return self._bucket_limit

    async def acquire(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Charge all buckets or none; see `RateLimiter`. Never waits."""
        return self.decide(charges, now_ns)

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Decide without awaiting; see `RateLimiter.acquire`. `charges` holds at least one."""
        if self._retired or not 0 <= now_ns - self._rotated_at_ns < self._period_ns:
            self._advance(now_ns)
        if len(charges) > 1:
            return self._decide_all(charges, now_ns)
        charge = charges[0]
        quota, increment_ns = charge.quota, charge.increment_ns
        tat_ns = self._current.get(charge.key)
        if tat_ns is not None:
            # A warm bucket that passes, `take` written out: the common case takes half the time so.
            debt_ns = (tat_ns - now_ns if tat_ns > now_ns else 0) + increment_ns
            if debt_ns <= quota.burst_ns:
                if increment_ns:
                    self._current[charge.key] = now_ns + debt_ns
                return Decision(charge.key, quota, True, (quota.burst_ns - debt_ns) // quota.emission_ns, 0, debt_ns)
        else:
            tat_ns = self._load(charge.key)
        after_ns, wait_ns = take(tat_ns, quota.burst_ns, increment_ns, now_ns)
        if (wait_ns == 0 and increment_ns) or after_ns < tat_ns:
            self._store(charge.key, after_ns)
        return _decision(charge, after_ns, wait_ns, now_ns)

    def peek(self, key: str, quota: Quota, now_ns: int) -> Decision:
        """Return the bucket as it is, charging nothing."""
        tat_ns, wait_ns = take(self._load(key), quota.burst_ns, 0, now_ns)
        return _decision(Charge(key, quota, 0), tat_ns, wait_ns, now_ns)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Move the bucket to `new`, keeping its filled share. Between budgets of one length nothing changes."""
        self._advance(now_ns)
        self._period_ns = max(self._period_ns, new.burst_ns)
        tat_ns = self._load(key)
        if old.burst_ns != new.burst_ns and tat_ns > now_ns:
            self._store(key, rescale(tat_ns, old, new, now_ns))

    def _decide_all(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Evaluate every bucket first, then charge every one or none."""
        tats = [self._load(charge.key) for charge in charges]
        taken = [
            take(tat, charge.quota.burst_ns, charge.increment_ns, now_ns)
            for tat, charge in zip(tats, charges, strict=True)
        ]
        refusals = [index for index, (_, wait_ns) in enumerate(taken) if wait_ns]
        for charge, tat_ns, (after_ns, _) in zip(charges, tats, taken, strict=True):
            if (not refusals and charge.increment_ns) or after_ns < tat_ns:
                self._store(charge.key, after_ns)
        if not refusals:
            return _decision(charges[0], *taken[0], now_ns)
        binding = max(refusals, key=lambda index: (taken[index][1] == NEVER, taken[index][1]))
        return _decision(charges[binding], *taken[binding], now_ns)

    def _load(self, key: str) -> int:
        tat_ns = self._current.get(key)
        if tat_ns is None:
            tat_ns = self._previous.get(key)
            if tat_ns is None:
                # Also after the table has emptied: what a shared bucket still owes, its keys owe.
                return self._overflow.get(hash(key) % OVERFLOW_SLOTS, 0) if self._overflow else 0
        return tat_ns

    def _store(self, key: str, tat_ns: int) -> None:
        if key in self._current or len(self) < self._bucket_limit or self._previous.pop(key, None) is not None:
            self._current[key] = tat_ns
            return
        slot = hash(key) % OVERFLOW_SLOTS
        self._overflow[slot] = max(tat_ns, self._overflow.get(slot, 0))
        self.overflowed += 1

    def _advance(self, now_ns: int) -> None:
        age_ns = now_ns - self._rotated_at_ns
        if age_ns >= self._period_ns:
            self._rotate(now_ns)
        elif age_ns < 0:
            self._step_back(now_ns)
        if self._retired:
            self._sweep()

    def _rotate(self, now_ns: int) -> None:
        if self._previous:
            self._retired.append(self._previous)
        if now_ns - self._rotated_at_ns >= 2 * self._period_ns and self._current:
            self._retired.append(self._current)
            self._previous = {}
        else:
            self._previous = self._current
        self._current = {}
        self._overflow = {slot: tat_ns for slot, tat_ns in self._overflow.items() if tat_ns > now_ns}
        self._rotated_at_ns = now_ns

    def _step_back(self, now_ns: int) -> None:
        """Begin the generation anew after the clock stepped back. Single buckets heal when used, shared ones here."""
        self._rotated_at_ns = now_ns
        self._overflow = {slot: min(tat_ns, now_ns + self._period_ns) for slot, tat_ns in self._overflow.items()}

    def _sweep(self) -> None:
        """Free a few retired entries; freeing a large dict at once would stop the loop for milliseconds."""
        retired = self._retired[-1]
        for _ in range(min(_SWEEP, len(retired))):
            retired.popitem()
        if not retired:
            self._retired.pop()


def _decision(charge: Charge, tat_ns: int, wait_ns: int, now_ns: int) -> Decision:
    debt_ns = max(tat_ns - now_ns, 0)
    remaining = (charge.quota.burst_ns - debt_ns) // charge.quota.emission_ns
    return Decision(charge.key, charge.quota, wait_ns == 0, remaining, wait_ns, debt_ns)
