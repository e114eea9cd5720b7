"""Token buckets: the arithmetic, the protocol of all limiters, and the limiter in memory.

A bucket is one integer, its theoretical arrival time (TAT): the time at which it will be full. With emission interval
T and budget B = capacity * T, the bucket has (B - max(0, TAT - now)) / T tokens, and a cost of c tokens is allowed if
and only if max(TAT, now) + c*T <= now + B. This is the generic cell rate algorithm (ITU-T I.371), equivalent to the
token bucket with continuous refill. All arithmetic is in integer nanoseconds; nothing here reads a clock.

Refusals and zero costs write nothing. Decisions are atomic because they run on one thread without awaiting; the
limiter is not thread-safe.

Long because arithmetic, tables and decisions have to agree.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Generic, Protocol, TypeVar

from api_gateway.models import Charge, Decision, DecisionSource, LimiterState, Quota

NEVER_NS = -1
OVERFLOW_SLOTS = 65_536
Noted = TypeVar("Noted")
_SWEEP = 8  # retired entries freed per decision: more than one decision can add, so none accumulate


class RateLimiter(Protocol):
    """A rate limiter, with its buckets in memory or in a store.

    `charges` has at least one bucket, and no bucket twice; `now_ns` is the process's monotonic clock. The length of a
    limiter is its number of entries in this process; `overflowed` counts decisions on a shared bucket, which are made
    when there are `bucket_limit` entries.
    """

    overflowed: int

    def __len__(self) -> int: ...

    @property
    def bucket_limit(self) -> int:
        """Maximum number of entries in this process."""
        ...

    def state(self) -> LimiterState:
        """Return the current source of decisions, and the figures of the store."""
        ...

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Charge all buckets or none, if that can be decided at once; return None if the store must decide.

        Returns the decision of the tightest bucket (see `Decision`) or, if any refuses, of the one with the longest
        wait.
        """
        ...

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Have the store decide after `decide` has returned None, and call `on_decision` once with the decision."""
        ...

    def refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Return the refusal of a request by what this process knows, None if that allows it; charge nothing.

        For requests that another kind of limit refuses, too.
        """
        ...

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return each bucket's decision on its charge alone, without charging it."""
        ...

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Charge or refund (increments below 0) the buckets that `decision` charged, for a cost settlement.

        Never refuses: a bucket may go into debt by up to a second capacity. Tokens that have been refilled since the
        decision are not refunded, so that no sequence of requests exceeds the quota. Returns the updated decision:
        that of the tightest bucket by the charges `settled_to`; without them, that of the same bucket as before.
        """
        ...

    async def refill(self, key: str) -> None:
        """Fill a bucket to its capacity."""
        ...

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; it keeps its filled fraction."""
        ...


def take(tat_ns: int, burst_ns: int, increment_ns: int, now_ns: int) -> tuple[int, int]:
    """Charge a bucket: return its new TAT and 0, or its unchanged TAT and the exact wait in nanoseconds.

    At `now_ns + wait` the same charge is allowed; one nanosecond earlier it is not. A charge above the budget is never
    allowed: its wait is `NEVER_NS`. Cost settlements can bring a bucket into debt by up to a second budget. A later
    TAT is only possible after a clock step backwards, or in a corrupt store; it is replaced by that of an empty
    bucket, which the caller must store.
    """
    base = max(tat_ns, now_ns)
    if base > now_ns + 2 * burst_ns:
        base = now_ns + burst_ns
    charged = base + increment_ns
    wait_ns = charged - (now_ns + burst_ns)
    if wait_ns <= 0:
        return charged, 0
    return base, wait_ns if increment_ns <= burst_ns else NEVER_NS


def take_each(tats_ns: Iterable[int], charges: Iterable[Charge], now_ns: int) -> list[tuple[int, int]]:
    """Return the results of `take` for several buckets, each by itself."""
    return [
        take(tat_ns, charge.quota.burst_ns, charge.increment_ns, now_ns)
        for tat_ns, charge in zip(tats_ns, charges, strict=True)
    ]


def settled(tat_ns: int, burst_ns: int, change_ns: int, charged_ns: int, now_ns: int) -> int:
    """Return the TAT of a bucket after a cost settlement: a charge (`change_ns` above 0) or a refund (below).

    `charged_ns` is the TAT right after the original charge. The part of it before `now_ns` has been refilled, and is
    not refunded: that would credit a client for time in which its bucket was full.
    """
    base = max(tat_ns, now_ns)
    if change_ns >= 0:
        return max(base, min(base + change_ns, now_ns + 2 * burst_ns))
    return max(base - min(-change_ns, max(charged_ns - now_ns, 0)), now_ns)


def rescale(tat_ns: int, old: Quota, new: Quota, now_ns: int) -> int:
    """Return the TAT with the same filled fraction of the bucket under `new`, rounded to the stricter side.

    An impossible TAT counts as that of an empty bucket, as in `take`.
    """
    healed_ns, _ = take(tat_ns, old.burst_ns, 0, now_ns)
    debt_ns = healed_ns - now_ns
    return now_ns - (-debt_ns * new.burst_ns // old.burst_ns)


class TatTable(Generic[Noted]):
    """TATs, or values that they are computed from, by key in two dicts (generations) that drop past entries.

    Entries are written to the current generation and read from both. When a generation is older than the longest debt,
    all TATs in the previous one are past. A bucket with a past TAT is full, as is one without an entry, so dropping it
    changes no decision. An entry is kept for at most two such periods after its last use, without a timer. After
    `advance`, callers may read and write `current` directly.
    """

    __slots__ = ("current", "limit", "period_ns", "previous", "retired", "rotated_at_ns")

    def __init__(self, period_ns: int, limit: int) -> None:
        """`period_ns` is the longest debt, which may be raised later; `limit` is the maximum number of entries."""
        self.period_ns = period_ns
        self.limit = limit
        self.current: dict[str, Noted] = {}
        self.previous: dict[str, Noted] = {}
        self.retired: list[dict[str, Noted] | dict[str, list[Refund]]] = []  # to be freed in steps
        self.rotated_at_ns = 0  # the first use rotates two empty generations

    def __repr__(self) -> str:
        return f"<TatTable [{len(self)} of {self.limit}]>"

    def __len__(self) -> int:
        """Return the number of entries; a key in both generations counts twice."""
        return len(self.current) + len(self.previous)

    def get(self, key: str) -> Noted | None:
        """Return the value of a key; None if it has none."""
        noted = self.current.get(key)
        return self.previous.get(key) if noted is None else noted

    def put(self, key: str, noted: Noted) -> bool:
        """Store the value of a key; return False if the table is full."""
        if key in self.current or len(self) < self.limit or self.previous.pop(key, None) is not None:
            self.current[key] = noted
            return True
        return False

    def drop(self, key: str) -> None:
        """Remove a key."""
        self.current.pop(key, None)
        self.previous.pop(key, None)

    def advance(self, now_ns: int) -> bool:
        """Begin a new generation if it is time, and free a few past entries. Return whether one has begun."""
        age_ns = now_ns - self.rotated_at_ns
        begins = not 0 <= age_ns < self.period_ns
        if age_ns >= self.period_ns:
            self._rotate(now_ns, are_both_past=age_ns >= 2 * self.period_ns)
        elif begins:  # the clock stepped back: restart the period
            self.rotated_at_ns = now_ns
        if self.retired:
            self._sweep()
        return begins

    def _rotate(self, now_ns: int, *, are_both_past: bool) -> None:
        if self.previous:
            self.retired.append(self.previous)
        if are_both_past and self.current:
            self.retired.append(self.current)
            self.previous = {}
        else:
            self.previous = self.current
        self.current = {}
        self.rotated_at_ns = now_ns

    def _sweep(self) -> None:
        """Free a few retired entries; freeing a large dict at once would block the event loop for milliseconds."""
        retired = self.retired[-1]
        for _ in range(min(_SWEEP, len(retired))):
            retired.popitem()
        if not retired:
            self.retired.pop()


class PreviousBuckets:
    """The buckets from before a change of quotas, each of which is converted at its next use.

    A bucket keeps the filled fraction that it had at the time of the change, as if all had been converted then.
    """

    def __init__(
        self, tables: Sequence[dict[str, int]], quota_of: Callable[[str, Quota], Quota], at_ns: int, until_ns: int
    ) -> None:
        """`quota_of` returns a bucket's quota before `at_ns` from its key and the quota after.

        From `until_ns` on all TATs are past.
        """
        self.tables = tables
        self.quota_of = quota_of
        self.until_ns = until_ns
        self._at_ns = at_ns

    def __repr__(self) -> str:
        return f"<PreviousBuckets [{len(self)}]>"

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def pop(self, key: str) -> int | None:
        """Remove and return a bucket's TAT; None if it has none here."""
        current, previous = (table.pop(key, None) for table in self.tables)
        return previous if current is None else current

    def converted(self, tat_ns: int, old: Quota, new: Quota) -> int:
        """Return a TAT under `old`, converted to `new`."""
        return rescale(tat_ns, old, new, self._at_ns) if tat_ns > self._at_ns else tat_ns


class MemoryLimiter:
    """Buckets in a table of this process, with one dict entry for each.

    At `bucket_limit` entries, a new key uses one of `OVERFLOW_SLOTS` shared buckets, selected by hash. A shared bucket
    admits no more for all its keys together than for one, and a later entry of such a key starts from it. So filling
    the table gains a client nothing, but clients without an entry may share a limit.
    """

    def __init__(self, quotas: Iterable[Quota], *, bucket_limit: int = 1_000_000) -> None:
        """Create the table for buckets of `quotas`. Only `change_quota` may add quotas with a longer budget."""
        self._table: TatTable[int] = TatTable(max((quota.burst_ns for quota in quotas), default=1), bucket_limit)
        self._overflow: dict[int, int] = {}
        self._earlier: list[PreviousBuckets] = []  # oldest first
        self._refunds = Refunds()
        self.overflowed = 0

    def __repr__(self) -> str:
        return f"<MemoryLimiter [{len(self)} of {self.bucket_limit} buckets, {self.overflowed} overflowed]>"

    def __len__(self) -> int:
        """Return the number of entries; a bucket in two generations counts twice."""
        return len(self._table) + sum(map(len, self._earlier))

    @property
    def bucket_limit(self) -> int:
        """Maximum number of entries; after a change of quotas, those not converted yet are not counted."""
        return self._table.limit

    @bucket_limit.setter
    def bucket_limit(self, limit: int) -> None:
        self._table.limit = limit

    def bucket_keys(self) -> Iterator[list[str]]:
        """Return the keys of the entries of each generation, as they are at the time; some may be in both."""
        yield list(self._table.current)
        yield list(self._table.previous)

    def tats(self) -> dict[str, int]:
        """Return the TATs of all buckets used since the last change of quotas; those of full ones may be past."""
        return {**self._table.previous, **self._table.current}

    def state(self) -> LimiterState:
        """Return the state of a limiter without a store."""
        return LimiterState()

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Charge all buckets or none; see `RateLimiter.decide`. Never returns None."""
        table = self._table
        if table.retired or not 0 <= now_ns - table.rotated_at_ns < table.period_ns:  # else `advance` has no effect
            self._advance(now_ns)
        if len(charges) > 1:
            return self._decide_all(charges, now_ns)
        charge = charges[0]
        quota, increment_ns = charge.quota, charge.increment_ns
        held_ns = table.current.get(charge.key)
        tat_ns = self._load(charge.key, quota) if held_ns is None else held_ns
        # `take` inlined for an allowed request, and below for a refused one: halves the time of the common cases.
        debt_ns = (tat_ns - now_ns if tat_ns > now_ns else 0) + increment_ns
        if debt_ns <= quota.burst_ns:
            if increment_ns and held_ns is not None:
                table.current[charge.key] = now_ns + debt_ns
            elif increment_ns:
                self._store(charge.key, now_ns + debt_ns)
            remaining = (quota.burst_ns - debt_ns) // quota.emission_ns
            return Decision(charge.key, quota, True, remaining, 0, debt_ns, now_ns)
        held_debt_ns = debt_ns - increment_ns
        if held_debt_ns <= 2 * quota.burst_ns and increment_ns <= quota.burst_ns:
            remaining = max(quota.burst_ns - held_debt_ns, 0) // quota.emission_ns
            return Decision(charge.key, quota, False, remaining, debt_ns - quota.burst_ns, held_debt_ns, now_ns)
        after_ns, wait_ns = take(tat_ns, quota.burst_ns, increment_ns, now_ns)
        if (wait_ns == 0 and increment_ns) or after_ns < tat_ns:
            self._store(charge.key, after_ns)
        return decision_of(charge, after_ns, wait_ns, now_ns)

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Decide at once. Not used, because `decide` never returns None."""
        on_decision(self.decide(charges, now_ns))

    def refusal(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Return the refusal of a request, None if it would be allowed; see `RateLimiter.refusal`."""
        if all(self.preview(charge, now_ns).allowed for charge in charges):
            return None
        return self.decide(charges, now_ns)

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return each bucket's decision on its charge, without charging it."""
        return [self.preview(charge, now_ns) for charge in charges]

    def preview(self, charge: Charge, now_ns: int) -> Decision:
        """Return a bucket's decision on a charge, without charging it."""
        tat_ns, wait_ns = take(
            self._load(charge.key, charge.quota), charge.quota.burst_ns, charge.increment_ns, now_ns
        )
        return decision_of(charge, tat_ns, wait_ns, now_ns)

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        """Settle a decision of this limiter; see `RateLimiter.settle`."""
        self._advance(now_ns)
        debts_ns = []
        for charge, debt_ns in zip(changes, debts_of(decision), strict=True):
            burst_ns = charge.quota.burst_ns
            before_ns = self._load(charge.key, charge.quota)
            charged_ns = self.charged_until(charge.key, decision.at_ns, debt_ns)
            tat_ns = settled(before_ns, burst_ns, charge.increment_ns, charged_ns, now_ns)
            if now_ns < tat_ns < before_ns:
                given_ns = before_ns - tat_ns
                self._refunds.note(charge.key, Refund(decision.at_ns, decision.at_ns + debt_ns, now_ns, given_ns))
            self._table.period_ns = max(self._table.period_ns, tat_ns - now_ns)  # an entry is kept until its TAT
            self._store(charge.key, tat_ns)
            debts_ns.append(tat_ns - now_ns)
        return decision_after(decision, settled_to or changes, debts_ns, now_ns, is_chosen_anew=bool(settled_to))

    def charged_until(self, key: str, at_ns: int, debt_ns: int) -> int:
        """Return the current end of a charge of `at_ns` that left the bucket with `debt_ns`; see `Refunds.end_of`."""
        return self._refunds.end_of(key, at_ns, at_ns + debt_ns)

    async def refill(self, key: str) -> None:
        """Fill a bucket to its capacity."""
        self.reset(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to another quota; it keeps its filled fraction."""
        self.change_quota(key, old, new, now_ns)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Convert a bucket to `new`, keeping its filled fraction. With budgets of equal length nothing changes."""
        self._advance(now_ns)
        self._table.period_ns = max(self._table.period_ns, new.burst_ns)
        tat_ns = self._load(key, old)
        if old.burst_ns != new.burst_ns and tat_ns > now_ns:
            tat_ns = rescale(tat_ns, old, new, now_ns)
            self._table.period_ns = max(self._table.period_ns, tat_ns - now_ns)  # a debt may exceed the budget
            self._store(key, tat_ns)

    def change_quotas(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Apply a change of quotas; every bucket keeps its filled fraction.

        `quota_of` returns the previous quota of a bucket from its key and its new quota. The duration does not depend
        on the number of buckets, because each is converted at its next use.
        """
        table = self._table
        self._advance(now_ns)
        table.period_ns = max(table.period_ns, *(quota.burst_ns for quota in quotas))
        until_ns = now_ns + 2 * table.period_ns
        self._earlier.append(PreviousBuckets((table.current, table.previous), quota_of, now_ns, until_ns))
        table.current, table.previous = {}, {}

    def _decide_all(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Evaluate every bucket first, then charge all or none; see `joint_decision`, which is inlined here.

        The tightest bucket has the smallest number of further such requests, tokens / cost.
        """
        current = self._table.current
        debts: list[int] = []
        are_held = True
        tightest, tightest_debt_ns = charges[0], -1
        fewest = math.inf  # further such requests
        for charge in charges:
            increment_ns, burst_ns = charge.increment_ns, charge.quota.burst_ns
            tat_ns = current.get(charge.key)
            if tat_ns is None:
                are_held = False
                tat_ns = self._load(charge.key, charge.quota)
            debt_ns = (tat_ns - now_ns if tat_ns > now_ns else 0) + increment_ns
            if debt_ns > burst_ns:
                return self._refuse_or_heal(charges, now_ns)
            debts.append(debt_ns)
            if increment_ns:
                further = (burst_ns - debt_ns) / increment_ns
                if further < fewest:
                    fewest, tightest, tightest_debt_ns = further, charge, debt_ns
        for charge, debt_ns in zip(charges, debts, strict=True):
            if charge.increment_ns:
                if are_held or charge.key in current:
                    current[charge.key] = now_ns + debt_ns
                else:
                    self._store(charge.key, now_ns + debt_ns)
        quota = tightest.quota
        reset_ns = debts[0] if tightest_debt_ns < 0 else tightest_debt_ns
        remaining = (quota.burst_ns - reset_ns) // quota.emission_ns
        return Decision(tightest.key, quota, True, remaining, 0, reset_ns, now_ns, tuple(debts))

    def _refuse_or_heal(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Decide on several buckets of which one refuses, or has an impossible TAT, see `take`."""
        tats = [self._load(charge.key, charge.quota) for charge in charges]
        taken = take_each(tats, charges, now_ns)
        refused = any(wait_ns for _, wait_ns in taken)
        for charge, tat_ns, (after_ns, _) in zip(charges, tats, taken, strict=True):
            if (not refused and charge.increment_ns) or after_ns < tat_ns:
                self._store(charge.key, after_ns)
        return joint_decision(charges, taken, now_ns)

    def reset(self, key: str) -> None:
        """Treat a bucket as full."""
        for earlier in self._earlier:
            earlier.pop(key)
        if self._table.get(key) or self._overflow:
            self._store(key, 0)

    def seed(self, key: str, quota: Quota, tat_ns: int, now_ns: int) -> None:
        """Set the TAT of a bucket to `tat_ns` if that is later than the current one."""
        self._advance(now_ns)  # otherwise the next decision could drop the generation that this is stored in
        if tat_ns > self._load(key, quota):
            self._table.period_ns = max(self._table.period_ns, tat_ns - now_ns)  # a debt may exceed the budget
            self._store(key, tat_ns)

    def _load(self, key: str, quota: Quota) -> int:
        """Return the TAT of a bucket, converted to `quota`, its current one."""
        tat_ns = self._table.get(key)
        if tat_ns is None and self._earlier:
            tat_ns = self._convert(key, quota)
        if tat_ns is None:
            # Also when the table has room again: the debt of a shared bucket applies to all its keys.
            return self._overflow.get(hash(key) % OVERFLOW_SLOTS, 0) if self._overflow else 0
        return tat_ns

    def _convert(self, key: str, quota: Quota) -> int | None:
        """Convert a bucket that was not used since a change of quotas; return its TAT, None if there is none."""
        for index in reversed(range(len(self._earlier))):
            tat_ns = self._earlier[index].pop(key)
            if tat_ns is not None:
                break
        else:
            return None
        passed = self._earlier[index:]
        quotas = [quota]
        for earlier in reversed(passed):
            quotas.append(earlier.quota_of(key, quotas[-1]))
        quotas.reverse()
        for earlier, old, new in zip(passed, quotas, quotas[1:], strict=False):
            tat_ns = earlier.converted(tat_ns, old, new)
        self._table.period_ns = max(self._table.period_ns, tat_ns - self._table.rotated_at_ns)
        self._store(key, tat_ns)
        return tat_ns

    def _store(self, key: str, tat_ns: int) -> None:
        if not self._table.put(key, tat_ns):
            slot = hash(key) % OVERFLOW_SLOTS
            self._overflow[slot] = max(tat_ns, self._overflow.get(slot, 0))
            self.overflowed += 1

    def _advance(self, now_ns: int) -> None:
        if not self._table.advance(now_ns):
            return
        self._table.retired += self._refunds.turn()
        while self._earlier and self._earlier[0].until_ns <= now_ns:
            self._table.retired += [table for table in self._earlier.pop(0).tables if table]
        if self._overflow:
            # After a clock step backwards, shared buckets are corrected here, others at their next use.
            latest_ns = now_ns + self._table.period_ns
            self._overflow = {
                slot: min(tat_ns, latest_ns) for slot, tat_ns in self._overflow.items() if tat_ns > now_ns
            }


class Refund:
    """A refund: when the charge was made, the TAT that it left, when it was refunded, and how much of it."""

    __slots__ = ("at_ns", "given_ns", "made_ns", "tat_ns")

    def __init__(self, at_ns: int, tat_ns: int, made_ns: int, given_ns: int) -> None:
        self.at_ns = at_ns
        self.tat_ns = tat_ns
        self.made_ns = made_ns
        self.given_ns = given_ns

    def __repr__(self) -> str:
        return f"<Refund [{self.given_ns} ns of the charge of {self.at_ns}]>"


class Refunds:
    """Recent refunds of buckets in debt, by which later charges end earlier.

    A debt is refilled in the order of its charges: a charge ends at the TAT that it left, and what of it lies in the
    future has not been refilled. If an earlier charge is refunded afterwards, it ends earlier by that. Without this
    record, two overlapping requests could both be refunded the same refilled tokens. Refunds of later charges do not
    matter. A bucket has at most `MOST` entries; the oldest are merged into one that applies to all charges of both,
    which makes refunds smaller, as does a refund at the instant of a charge: it counts as later. Entries are kept for
    two generations, as buckets are: earlier charges have been refilled, and are not refunded anyway.
    """

    MOST: ClassVar = 32

    def __init__(self) -> None:
        self._current: dict[str, list[Refund]] = {}
        self._previous: dict[str, list[Refund]] = {}

    def __repr__(self) -> str:
        return f"<Refunds of {len(self)} buckets>"

    def __len__(self) -> int:
        return len(self._current) + len(self._previous)

    def end_of(self, key: str, at_ns: int, tat_ns: int) -> int:
        """Return the current end of a charge of `at_ns` that left the TAT `tat_ns`."""
        end_ns = tat_ns
        for noted in (self._previous.get(key), self._current.get(key)):
            for one in noted or ():
                is_earlier = one.at_ns < at_ns or (one.at_ns == at_ns and one.tat_ns < tat_ns)
                if is_earlier and one.made_ns >= at_ns:
                    end_ns -= one.given_ns
        return end_ns

    def note(self, key: str, refund: Refund) -> None:
        """Record a refund. Its time and amount may be corrected when they are known."""
        noted = self._current.setdefault(key, [])
        noted.append(refund)
        if len(noted) > self.MOST:
            one, other = noted[:2]
            made_ns, given_ns = max(one.made_ns, other.made_ns), one.given_ns + other.given_ns
            first = one if one.at_ns < other.at_ns else other
            noted[:2] = [Refund(first.at_ns, first.tat_ns, made_ns, given_ns)]

    def turn(self) -> list[dict[str, list[Refund]]]:
        """Begin a generation; return the one that has ended, if it is not empty, to be freed in steps."""
        retired, self._previous, self._current = self._previous, self._current, {}
        return [retired] if retired else []


def tightest_of(charges: Sequence[Charge], debts_ns: Sequence[int]) -> int:
    """Return the index of the bucket that has tokens for the fewest further such requests; the first of equal ones.

    A bucket that is charged nothing has tokens for any number.
    """
    chosen, fewest = 0, math.inf
    for index, charge in enumerate(charges):
        increment_ns = charge.increment_ns
        if increment_ns:
            further = (charge.quota.burst_ns - debts_ns[index]) / increment_ns
            if further < fewest:
                chosen, fewest = index, further
    return chosen


def joint_decision(
    charges: Sequence[Charge], taken: Sequence[tuple[int, int]], now_ns: int, source: DecisionSource = "memory"
) -> Decision:
    """Return the decision on several buckets, from TAT and wait of each: of the tightest, or the longest refusal."""
    refusals = [index for index, (_, wait_ns) in enumerate(taken) if wait_ns]
    if refusals:
        binding = max(refusals, key=lambda index: (taken[index][1] == NEVER_NS, taken[index][1]))
        decision = decision_of(charges[binding], *taken[binding], now_ns, source)
        if len(charges) > 1:
            decision.violated = tuple([charges[index].quota for index in refusals])
            decision.debts_ns = _present_debts(charges, taken, now_ns)
        return decision
    debts_ns = [max(tat_ns - now_ns, 0) for tat_ns, _ in taken]
    index = tightest_of(charges, debts_ns)
    all_ns = tuple(debts_ns) if len(charges) > 1 else ()
    return decision_of(charges[index], *taken[index], now_ns, source, all_ns)


def joint_refusal(one: Decision, other: Decision | None) -> Decision:
    """Return the longer of two refusals of one request, which names the quotas of both; the first if it is alone."""
    if other is None:
        return one
    violated = (*(one.violated or (one.quota,)), *(other.violated or (other.quota,)))
    longest = max(one, other, key=lambda refused: (refused.wait_ns == NEVER_NS, refused.wait_ns))
    longest.violated = violated
    return longest


def _present_debts(charges: Sequence[Charge], taken: Sequence[tuple[int, int]], now_ns: int) -> tuple[int, ...]:
    """Return the times until buckets are full that are not charged, because some of them refuse."""
    charged = zip(charges, taken, strict=True)
    return tuple(
        [max(tat_ns - (0 if wait_ns else one.increment_ns) - now_ns, 0) for one, (tat_ns, wait_ns) in charged]
    )


def decision_of(
    charge: Charge,
    tat_ns: int,
    wait_ns: int,
    now_ns: int,
    source: DecisionSource = "memory",
    debts_ns: tuple[int, ...] = (),
) -> Decision:
    """Return the decision on one bucket, from its TAT after the decision and its wait."""
    debt_ns = max(tat_ns - now_ns, 0)
    quota = charge.quota
    remaining = max(quota.burst_ns - debt_ns, 0) // quota.emission_ns
    return Decision(charge.key, quota, wait_ns == 0, remaining, wait_ns, debt_ns, now_ns, debts_ns, source)


def debts_of(decision: Decision) -> tuple[int, ...]:
    """Return the times until each bucket that a decision charged is full, in the order of the charges."""
    return decision.debts_ns or (decision.reset_ns,)


def decision_after(
    decision: Decision, charges: Sequence[Charge], debts_ns: Sequence[int], now_ns: int, *, is_chosen_anew: bool
) -> Decision:
    """Return an earlier decision, updated to the current debts of its buckets, whose `charges` are in the same order.

    It is that of the same bucket or, if `is_chosen_anew`, of the tightest one.
    """
    if is_chosen_anew:
        index = tightest_of(charges, debts_ns)
    else:
        index = next((index for index, charge in enumerate(charges) if charge.key == decision.key), 0)
    quota, reset_ns = charges[index].quota, debts_ns[index]
    return replace(
        decision,
        key=charges[index].key,
        quota=quota,
        remaining=max(quota.burst_ns - reset_ns, 0) // quota.emission_ns,
        reset_ns=reset_ns,
        at_ns=now_ns,
        debts_ns=tuple(debts_ns) if len(debts_ns) > 1 else (),
    )
