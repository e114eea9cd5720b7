"""Token buckets: the arithmetic, the protocol every limiter speaks, and the limiter that lives in memory.

A bucket is one integer, its theoretical arrival time (TAT): the moment at which it will be full again. With emission
interval T and budget B = capacity * T, the bucket holds (B - max(0, TAT - now)) / T tokens, and a cost of c tokens
passes if and only if max(TAT, now) + c*T <= now + B. That is the generic cell rate algorithm (ITU-T I.371), which is
the token bucket with continuous refill. All arithmetic is in integer nanoseconds; nothing here reads a clock.

Refusals and zero costs write nothing. Decisions are atomic because they run on one thread without awaiting; the
limiter is not thread-safe.

Long because it is one subject: arithmetic, tables and the decision that is made of them have to agree.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from api_gateway.models import Charge, Decision, DecisionSource, LimiterState, Quota

NEVER_NS = -1
OVERFLOW_SLOTS = 65_536
Noted = TypeVar("Noted")
_SWEEP = 8  # retired entries freed per decision: more than one decision can add, so it always catches up


class RateLimiter(Protocol):
    """What the gateway asks of a limiter, wherever its buckets are kept.

    `charges` holds at least one bucket, and no bucket twice; `now_ns` is the process's monotonic clock. Its length is
    the number of entries in this process; `overflowed` counts the decisions made on a shared bucket because there
    was no room for another.
    """

    overflowed: int

    def __len__(self) -> int: ...

    @property
    def bucket_limit(self) -> int:
        """Entries in this process at most."""
        ...

    def state(self) -> LimiterState:
        """Return what decisions rest on now."""
        ...

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        """Charge all buckets or none, if that can be decided at once; None if the buckets' store must be asked.

        Returns the decision of the first bucket, or of the one that refuses longest.
        """
        ...

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """Have the store decide what `decide` could not, and call `on_decision` with the decision, once."""
        ...

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """Return what each bucket says to its charge by itself, charging nothing."""
        ...

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision:
        """Charge or give back (increments below 0) after the fact, to the buckets that `decision` charged.

        Never refuses: the bucket owes what it does not hold, up to its capacity. Nothing is given back that has been
        refilled since, so that no history admits more than the quota. Returns the decision as it stands then.
        """
        ...

    async def refill(self, key: str) -> None:
        """Fill a bucket."""
        ...

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Take a bucket from one quota to another, keeping the share of it that is filled."""
        ...


def take(tat_ns: int, burst_ns: int, increment_ns: int, now_ns: int) -> tuple[int, int]:
    """Charge a bucket: return its new TAT and 0, or the TAT it keeps and the exact wait in nanoseconds.

    At `now_ns + wait` the same charge passes; one nanosecond earlier it does not. A charge above the whole budget
    never passes: its wait is `NEVER_NS`. A bucket owes at most a second budget beyond being empty (what was settled
    later). A TAT beyond that has no other cause than a clock that stepped back, or a corrupted store, and is brought
    back to "empty now"; that repair is what the caller must store.
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
    """Return what `take` says of several buckets, each by itself."""
    return [
        take(tat_ns, charge.quota.burst_ns, charge.increment_ns, now_ns)
        for tat_ns, charge in zip(tats_ns, charges, strict=True)
    ]


def settled(tat_ns: int, burst_ns: int, change_ns: int, charged_ns: int, now_ns: int) -> int:
    """Return the TAT of a bucket after a later charge (`change_ns` above 0) or a refund (below).

    `charged_ns` is the TAT right after the charge that is settled. What lies before `now_ns` of it has been refilled:
    giving that back too would credit a client for time in which its bucket was full anyway.
    """
    base = max(tat_ns, now_ns)
    if change_ns >= 0:
        return max(base, min(base + change_ns, now_ns + 2 * burst_ns))
    return max(base - min(-change_ns, max(charged_ns - now_ns, 0)), now_ns)


def rescale(tat_ns: int, old: Quota, new: Quota, now_ns: int) -> int:
    """Return the TAT that leaves the same share of the bucket filled under `new`; rounded to the stricter side.

    A TAT that cannot be is brought back to "empty now", as `take` does.
    """
    healed_ns, _ = take(tat_ns, old.burst_ns, 0, now_ns)
    debt_ns = healed_ns - now_ns
    return now_ns - (-debt_ns * new.burst_ns // old.burst_ns)


class TatTable(Generic[Noted]):
    """TATs, or what they are worked out from, by key in two plain dicts, forgotten once they are past.

    Entries are written to the current generation and read from both. When a generation is older than the longest debt
    there can be, everything in the one before it is past, and a bucket whose TAT is past is full, which is the same as
    none: so dropping it changes no decision. An entry lives for at most two such periods after its last use, and
    needs no timer. `current` may be read and written directly by who has called `advance`.
    """

    __slots__ = ("current", "limit", "period_ns", "previous", "retired", "rotated_at_ns")

    def __init__(self, period_ns: int, limit: int) -> None:
        """`period_ns` is the longest debt, and may be raised later; `limit` bounds the entries."""
        self.period_ns = period_ns
        self.limit = limit
        self.current: dict[str, Noted] = {}
        self.previous: dict[str, Noted] = {}
        self.retired: list[dict[str, Noted] | dict[str, list[tuple[int, int]]]] = []  # to be freed piece by piece
        self.rotated_at_ns = 0  # the first use rotates two empty generations

    def __repr__(self) -> str:
        return f"<TatTable [{len(self)} of {self.limit}]>"

    def __len__(self) -> int:
        """Return the entries held; a key used in two generations counts twice."""
        return len(self.current) + len(self.previous)

    def get(self, key: str) -> Noted | None:
        """Return the TAT of a key, None if it has none."""
        noted = self.current.get(key)
        return self.previous.get(key) if noted is None else noted

    def put(self, key: str, noted: Noted) -> bool:
        """Keep the TAT of a key; False if the table is full."""
        if key in self.current or len(self) < self.limit or self.previous.pop(key, None) is not None:
            self.current[key] = noted
            return True
        return False

    def drop(self, key: str) -> None:
        """Forget a key."""
        self.current.pop(key, None)
        self.previous.pop(key, None)

    def advance(self, now_ns: int) -> bool:
        """Forget what is past; a little of it at a time. Returns whether a generation has begun."""
        age_ns = now_ns - self.rotated_at_ns
        begins = not 0 <= age_ns < self.period_ns
        if age_ns >= self.period_ns:
            self._rotate(now_ns, are_both_past=age_ns >= 2 * self.period_ns)
        elif begins:  # the clock stepped back: the generation begins anew
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
        """Free a few retired entries; freeing a large dict at once would stop the loop for milliseconds."""
        retired = self.retired[-1]
        for _ in range(min(_SWEEP, len(retired))):
            retired.popitem()
        if not retired:
            self.retired.pop()


class PreviousBuckets:
    """The buckets that were kept when quotas changed, each brought to its present quota when it is next used.

    Each gets the TAT that leaves the share of it filled that was filled at the moment of the change, as if all had
    been converted then.
    """

    def __init__(
        self, tables: Sequence[dict[str, int]], quota_of: Callable[[str, Quota], Quota], at_ns: int, until_ns: int
    ) -> None:
        """`quota_of` returns the quota of a bucket before `at_ns`, given the one after; all is past at `until_ns`."""
        self.tables = tables
        self.quota_of = quota_of
        self.until_ns = until_ns
        self._at_ns = at_ns

    def __repr__(self) -> str:
        return f"<PreviousBuckets [{len(self)}]>"

    def __len__(self) -> int:
        return sum(map(len, self.tables))

    def pop(self, key: str) -> int | None:
        """Take a bucket's TAT out, None if it has none here."""
        current, previous = (table.pop(key, None) for table in self.tables)
        return previous if current is None else current

    def converted(self, tat_ns: int, old: Quota, new: Quota) -> int:
        """Return a TAT under `new` that was kept under `old`."""
        return rescale(tat_ns, old, new, self._at_ns) if tat_ns > self._at_ns else tat_ns


class MemoryLimiter:
    """Buckets in a table of this process. A bucket costs one dict entry.

    `bucket_limit` bounds the entries. Beyond it a new key draws on one of 65,536 shared buckets, chosen by hash. A
    shared bucket admits no more to all its keys together than to one, and an entry made for such a key later starts
    from it; so nobody gains by filling the table, but strangers may then have to share.
    """

    def __init__(self, quotas: Iterable[Quota], *, bucket_limit: int = 1_000_000) -> None:
        """Hold buckets of any of `quotas`. A quota with a longer budget may only come in by `change_quota`."""
        self._table: TatTable[int] = TatTable(max((quota.burst_ns for quota in quotas), default=1), bucket_limit)
        self._overflow: dict[int, int] = {}
        self._earlier: list[PreviousBuckets] = []  # the oldest first
        self._refunds = Refunds()
        self.overflowed = 0

    def __repr__(self) -> str:
        return f"<MemoryLimiter [{len(self)} of {self.bucket_limit} buckets, {self.overflowed} overflowed]>"

    def __len__(self) -> int:
        """Return the entries held; a bucket used in two generations counts twice."""
        return len(self._table) + sum(map(len, self._earlier))

    @property
    def bucket_limit(self) -> int:
        """Entries held at most; for a while after a change of quotas, those from before it come on top."""
        return self._table.limit

    @bucket_limit.setter
    def bucket_limit(self, limit: int) -> None:
        self._table.limit = limit

    def state(self) -> LimiterState:
        """See `RateLimiter`; always "memory"."""
        return LimiterState()

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """See `RateLimiter`; it never takes asking."""
        table = self._table
        if table.retired or not 0 <= now_ns - table.rotated_at_ns < table.period_ns:  # else nothing would come of it
            self._advance(now_ns)
        if len(charges) > 1:
            return self._decide_all(charges, now_ns)
        charge = charges[0]
        quota, increment_ns = charge.quota, charge.increment_ns
        held_ns = table.current.get(charge.key)
        tat_ns = self._load(charge.key, quota) if held_ns is None else held_ns
        # A bucket that passes, `take` written out: the common case takes half the time so.
        debt_ns = (tat_ns - now_ns if tat_ns > now_ns else 0) + increment_ns
        if debt_ns <= quota.burst_ns:
            if increment_ns and held_ns is not None:
                table.current[charge.key] = now_ns + debt_ns
            elif increment_ns:
                self._store(charge.key, now_ns + debt_ns)
            remaining = (quota.burst_ns - debt_ns) // quota.emission_ns
            return Decision(charge.key, quota, True, remaining, 0, debt_ns, now_ns)
        after_ns, wait_ns = take(tat_ns, quota.burst_ns, increment_ns, now_ns)
        if (wait_ns == 0 and increment_ns) or after_ns < tat_ns:
            self._store(charge.key, after_ns)
        return decision_of(charge, after_ns, wait_ns, now_ns)

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        """See `RateLimiter`; nothing asks, because `decide` always decides."""
        on_decision(self.decide(charges, now_ns))

    async def inspect(self, charges: Sequence[Charge], now_ns: int) -> list[Decision]:
        """See `RateLimiter`."""
        return [self.preview(charge, now_ns) for charge in charges]

    def preview(self, charge: Charge, now_ns: int) -> Decision:
        """Return what one bucket says to a charge, charging nothing."""
        tat_ns, wait_ns = take(
            self._load(charge.key, charge.quota), charge.quota.burst_ns, charge.increment_ns, now_ns
        )
        return decision_of(charge, tat_ns, wait_ns, now_ns)

    def settle(self, charges: Sequence[Charge], decision: Decision, now_ns: int) -> Decision:
        """See `RateLimiter`."""
        self._advance(now_ns)
        debts_ns = []
        for charge, debt_ns in zip(charges, (decision.reset_ns, *decision.others_ns), strict=True):
            burst_ns = charge.quota.burst_ns
            before_ns = self._load(charge.key, charge.quota)
            charged_ns = decision.at_ns + debt_ns - self._refunds.since(charge.key, decision.at_ns)
            tat_ns = settled(before_ns, burst_ns, charge.increment_ns, charged_ns, now_ns)
            if now_ns < tat_ns < before_ns:
                self._refunds.note(charge.key, now_ns, before_ns - tat_ns)
            self._table.period_ns = max(self._table.period_ns, tat_ns - now_ns)  # remembered until it has paid
            self._store(charge.key, tat_ns)
            debts_ns.append(tat_ns - now_ns)
        return decision_after(decision, debts_ns, now_ns)

    async def refill(self, key: str) -> None:
        """See `RateLimiter`."""
        self.reset(key)

    async def move(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """See `RateLimiter`."""
        self.change_quota(key, old, new, now_ns)

    def change_quota(self, key: str, old: Quota, new: Quota, now_ns: int) -> None:
        """Move the bucket to `new`, keeping its filled share. Between budgets of one length nothing changes."""
        self._advance(now_ns)
        self._table.period_ns = max(self._table.period_ns, new.burst_ns)
        tat_ns = self._load(key, old)
        if old.burst_ns != new.burst_ns and tat_ns > now_ns:
            tat_ns = rescale(tat_ns, old, new, now_ns)
            self._table.period_ns = max(self._table.period_ns, tat_ns - now_ns)  # it may owe more than the budget
            self._store(key, tat_ns)

    def change_quotas(self, quotas: Iterable[Quota], quota_of: Callable[[str, Quota], Quota], now_ns: int) -> None:
        """Hold buckets of `quotas` from now on; each that is held keeps its filled share.

        `quota_of` returns the quota of a bucket until now, given its key and its quota from now on. Takes no longer
        for many buckets than for few: each is converted when it is next used.
        """
        table = self._table
        self._advance(now_ns)
        table.period_ns = max(table.period_ns, *(quota.burst_ns for quota in quotas))
        until_ns = now_ns + 2 * table.period_ns
        self._earlier.append(PreviousBuckets((table.current, table.previous), quota_of, now_ns, until_ns))
        table.current, table.previous = {}, {}

    def _decide_all(self, charges: Sequence[Charge], now_ns: int) -> Decision:
        """Evaluate every bucket first, then charge every one or none."""
        tats = [self._load(charge.key, charge.quota) for charge in charges]
        taken = take_each(tats, charges, now_ns)
        refused = any(wait_ns for _, wait_ns in taken)
        for charge, tat_ns, (after_ns, _) in zip(charges, tats, taken, strict=True):
            if (not refused and charge.increment_ns) or after_ns < tat_ns:
                self._store(charge.key, after_ns)
        return joint_decision(charges, taken, now_ns)

    def reset(self, key: str) -> None:
        """Take a bucket for full."""
        for earlier in self._earlier:
            earlier.pop(key)
        if self._table.get(key) or self._overflow:
            self._store(key, 0)

    def seed(self, key: str, quota: Quota, tat_ns: int, now_ns: int) -> None:
        """Take over what is known of a bucket from elsewhere: it is not full before `tat_ns`."""
        self._advance(now_ns)  # or the next decision would, and might drop the generation that this is put in
        if tat_ns > self._load(key, quota):
            self._store(key, tat_ns)

    def _load(self, key: str, quota: Quota) -> int:
        """Return the TAT of a bucket under `quota`, its present one."""
        tat_ns = self._table.get(key)
        if tat_ns is None and self._earlier:
            tat_ns = self._convert(key, quota)
        if tat_ns is None:
            # Also after the table has emptied: what a shared bucket still owes, its keys owe.
            return self._overflow.get(hash(key) % OVERFLOW_SLOTS, 0) if self._overflow else 0
        return tat_ns

    def _convert(self, key: str, quota: Quota) -> int | None:
        """Bring a bucket over from before the last changes of quotas, if it was not used since; return its TAT."""
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
            # Single buckets heal from a clock that stepped back when they are used, shared ones here.
            latest_ns = now_ns + self._table.period_ns
            self._overflow = {
                slot: min(tat_ns, latest_ns) for slot, tat_ns in self._overflow.items() if tat_ns > now_ns
            }


class Refunds:
    """What buckets were lately given back while they still owed: charges of before lie that much nearer than noted.

    Without it two requests that overlap could both be given back what has been refilled only once. A bucket has a
    few entries at most; older ones are counted as if they were newer, which gives back less. They are kept for two
    generations, as buckets are: what was charged before those has been refilled, and is not given back anyway.
    """

    MOST = 32

    def __init__(self) -> None:
        self._current: dict[str, list[tuple[int, int]]] = {}  # time and nanoseconds given back
        self._previous: dict[str, list[tuple[int, int]]] = {}

    def __repr__(self) -> str:
        return f"<Refunds of {len(self)} buckets>"

    def __len__(self) -> int:
        return len(self._current) + len(self._previous)

    def since(self, key: str, at_ns: int) -> int:
        """Return what the bucket was given back from `at_ns` on."""
        noted = (*self._previous.get(key, ()), *self._current.get(key, ()))
        return sum(given_ns for noted_ns, given_ns in noted if noted_ns >= at_ns)

    def note(self, key: str, now_ns: int, given_ns: int) -> None:
        """Remember a refund."""
        noted = self._current.setdefault(key, [])
        noted.append((now_ns, given_ns))
        if len(noted) > self.MOST:
            (_, one), (at_ns, other) = noted[:2]
            noted[:2] = [(at_ns, one + other)]

    def turn(self) -> list[dict[str, list[tuple[int, int]]]]:
        """Begin a generation; return the one that is over, if it holds anything, to be freed piece by piece."""
        retired, self._previous, self._current = self._previous, self._current, {}
        return [retired] if retired else []


def joint_decision(
    charges: Sequence[Charge], taken: Sequence[tuple[int, int]], now_ns: int, source: DecisionSource = "memory"
) -> Decision:
    """Return what the TAT and wait of every bucket come to: the first one's decision, or the longest refusal."""
    refusals = [index for index, (_, wait_ns) in enumerate(taken) if wait_ns]
    if refusals:
        binding = max(refusals, key=lambda index: (taken[index][1] == NEVER_NS, taken[index][1]))
        return decision_of(charges[binding], *taken[binding], now_ns, source)
    others_ns = tuple(max(tat_ns - now_ns, 0) for tat_ns, _ in taken[1:])
    return decision_of(charges[0], *taken[0], now_ns, source, others_ns)


def decision_of(
    charge: Charge,
    tat_ns: int,
    wait_ns: int,
    now_ns: int,
    source: DecisionSource = "memory",
    others_ns: tuple[int, ...] = (),
) -> Decision:
    """Return the decision on one bucket whose TAT is `tat_ns` after it."""
    debt_ns = max(tat_ns - now_ns, 0)
    quota = charge.quota
    remaining = max(quota.burst_ns - debt_ns, 0) // quota.emission_ns
    return Decision(charge.key, quota, wait_ns == 0, remaining, wait_ns, debt_ns, now_ns, others_ns, source)


def decision_after(decision: Decision, debts_ns: Sequence[int], now_ns: int) -> Decision:
    """Return an earlier decision as it stands now that its buckets owe `debts_ns`."""
    remaining = max(decision.quota.burst_ns - debts_ns[0], 0) // decision.quota.emission_ns
    return replace(decision, remaining=remaining, reset_ns=debts_ns[0], at_ns=now_ns, others_ns=tuple(debts_ns[1:]))
