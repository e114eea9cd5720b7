"""The operations of token_bucket.lua on counters of calendar quotas, alone or together with buckets.

A counter in the store is sixteen integers: the unit of its period (its index in `UNITS`), the beginning of the first
period, the latest count (start, used, carried, drawn, peak), the end of its period, the count before (start -1: none),
the balance of top-ups and its end, the resets; see `quota_state`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from api_gateway.limits.periods import UNITS
from api_gateway.limits.quota_decisions import (
    counter_allowance,
    counter_decision,
    joint_allowance,
    of_buckets,
    of_counters,
    refusal_of,
)
from api_gateway.limits.quota_state import (
    MICROSECONDS,
    UNITS_PER_TOKEN,
    Adjustment,
    PeriodQuota,
    QuotaCount,
    QuotaCounter,
    QuotaState,
    QuotaWarning,
    attach,
    standing_of,
    use,
)
from api_gateway.limits.script_batcher import ScriptOp
from api_gateway.limits.script_ops import LimiterPort, learn_late, write_debts
from api_gateway.models import Charge, Decision
from api_gateway.rate_limiter import debts_of, decision_of, joint_decision, take_each
from api_gateway.storage.redis_session import ScriptCall

MAX_ASKED = 3  # times that an operation is sent, each with what the store replied before
_NONE = -1
_FIELDS = 16
VALUES_OF_COUNTER = 1 + _FIELDS  # in a reply; the first one is whether the script must be asked again
_COUNT = 5


class UnreportedAmount(NamedTuple):
    """The cost that was admitted without the store in the period from `start`.

    `sent` of it is in operations without a reply: those that report it, and requests that the store may have charged
    before their replies were lost. The sent part is not sent again. The whole `amount` counts against this process's
    share until a reply to the same operation confirms the charge, or the period ends. So at most one share is admitted
    and never charged, however often replies are lost.

    `generation` is how many resets by operators this process knew of when the first of it was admitted. A reset of the
    key drops what is owed, so an operation that was begun under a smaller number is not about this.
    """

    start: int
    amount: int = 0
    sent: int = 0
    generation: int = 0


class CountersPort(Protocol):
    """The parts of the limiter that the operations use."""

    @property
    def buckets(self) -> LimiterPort:
        """The limiter of the buckets."""
        ...

    @property
    def counter_key(self) -> Callable[[str], str]:
        """Maps the key of a counter to its key in the store."""
        ...

    @property
    def generation(self) -> int:
        """See `UnreportedAmount`."""
        ...

    @property
    def warn(self) -> Callable[[Sequence[QuotaWarning]], None]:
        """Passes warnings on."""
        ...

    def began(self, key: str) -> int | None:
        """Return when the first period of a key began, by the last reading; None if it is not known."""
        ...

    def store_time(self) -> int:
        """Return the store's time in seconds since the epoch, by the last reading."""
        ...

    def note(self, key: str, counter: QuotaCounter | None, clock_us: int) -> None:
        """Keep a reading: a counter, and the store's time."""
        ...

    def report_owed(self, key: str) -> UnreportedAmount | None:
        """Return the cost that was charged to a counter without the store and is to be sent; None if there is none."""
        ...

    def settle_owed(self, key: str, sent: UnreportedAmount, *, is_charged: bool) -> None:
        """Forget an amount that was sent, or, if the store has not charged it, send it again."""
        ...

    def owe(self, key: str, change: int, start: int, *, is_sent: bool) -> None:
        """Note what a counter was charged without the store, which may have charged it if it `is_sent`."""
        ...

    def decide_without_store(self, charges: Sequence[Charge], *, may_be_charged: bool) -> Decision:
        """Decide by the policy for outages."""
        ...


def question(port: CountersPort, number: int, key: str, quota: PeriodQuota, cost: int) -> tuple[int, ...]:
    """Return the arguments of the script for one counter."""
    now = port.store_time()
    began = port.began(key)
    began = now if began is None else began
    period = quota.period(began, now)
    return (
        number,
        UNITS.index(quota.calendar.unit),
        quota.burst_ns,
        quota.carry_over * UNITS_PER_TOKEN,
        *period,
        began if quota.is_from_start else _NONE,
        cost,
    )


def read_counter(reply: Iterator[int]) -> tuple[bool, QuotaCounter | None]:
    """Return whether the script must be asked again, and the counter (None: there is none)."""
    is_unanswered = next(reply) == 1
    fields = [next(reply) for _ in range(_FIELDS)]
    if fields[0] == _NONE:
        return is_unanswered, None
    unit, began, *rest, balance, until, resets = fields
    latest, end, before = rest[:_COUNT], rest[_COUNT], rest[_COUNT + 1 :]
    counter = QuotaCounter(
        UNITS[unit],
        began,
        QuotaCount(*latest),
        end,
        None if before[0] == _NONE else QuotaCount(*before),
        balance,
        until,
        resets=resets,
    )
    return is_unanswered, counter


class QuotaChargeOp(ScriptOp):
    """Charges all buckets and counters of one request, or none; or one counter alone, without buckets."""

    __slots__ = (
        "_admission",
        "_asked",
        "_asked_ns",
        "_charges",
        "_debts",
        "_generation",
        "_limiter",
        "_on_decision",
        "_reported",
    )

    def __init__(
        self,
        limiter: CountersPort,
        charges: Sequence[Charge],
        now_ns: int,
        on_decision: Callable[[Decision], None],
        asked: int = 1,
    ) -> None:
        """`asked` is how often it has been sent, with this time."""
        super().__init__(limiter.counter_key(of_counters(charges)[0][0].key))
        self._limiter = limiter
        self._charges = charges
        self._asked_ns = now_ns
        self._on_decision = on_decision
        self._asked = asked
        self._reported: list[tuple[str, UnreportedAmount]] = []
        self._debts: Sequence[Charge] = ()  # of buckets, which this operation reports
        self._generation = 0  # at that admission, see `UnreportedAmount`
        self._admission: Decision | None = None  # by the policy for outages, though the store may have charged it

    def write(self, call: ScriptCall) -> None:
        """Append the charges, preceded by what was charged during an outage."""
        limiter, buckets, arguments = self._limiter, self._limiter.buckets, call.arguments
        of_tokens, counted = of_buckets(self._charges), of_counters(self._charges)
        numbers = [call.number(buckets.store_key(charge.key)) for charge in of_tokens]
        if buckets.fallback.has_debts:
            self._debts = write_debts(buckets, call, numbers, of_tokens, self._asked_ns)
        keys = [call.number(limiter.counter_key(charge.key)) for charge, _ in counted]
        for number, (charge, quota) in zip(keys, counted, strict=True):
            owed = limiter.report_owed(charge.key)
            if owed is not None:
                self._reported.append((charge.key, owed))
                arguments += ("correct", *question(limiter, number, charge.key, quota, owed.amount), owed.start)
        arguments += ("all", len(numbers), len(keys))
        for number, charge in zip(numbers, of_tokens, strict=True):
            arguments += (number, charge.quota.burst_ns, charge.increment_ns)
        for number, (charge, quota) in zip(keys, counted, strict=True):
            arguments += question(limiter, number, charge.key, quota, charge.increment_ns)

    def read_uncharged(self, clock_us: int, reply: Iterator[int]) -> Decision | None:
        """Read the reply of a script that has charged nothing for another reason.

        The decision is not passed on. Return the refusal by buckets and counters; None if they allow the request.
        """
        self.is_over = True
        return self._read(clock_us, reply, may_be_charged=False)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Compute the decision as the script has, or ask again."""
        self._read(clock_us, reply, may_be_charged=True)

    def _read(self, clock_us: int, reply: Iterator[int], *, may_be_charged: bool) -> Decision | None:
        """Note a reply, and complete unless `is_over`; return the refusal of the request, if any."""
        limiter, now_ns = self._limiter, clock_us * 1000
        limiter.buckets.offset_ns = now_ns - self._asked_ns
        of_tokens, counted = of_buckets(self._charges), of_counters(self._charges)
        taken = take_each([now_ns + next(reply) for _ in of_tokens], of_tokens, now_ns)
        readings = [read_counter(reply) for _ in counted]
        standings = []
        for (charge, quota), (_, counter) in zip(counted, readings, strict=True):
            limiter.note(charge.key, counter, clock_us)
            standings.append(standing_of(charge.key, quota, counter, clock_us // MICROSECONDS))
        for key, reported in self._reported:
            limiter.settle_owed(key, reported, is_charged=True)
        alone = [decision_of(one, *result, now_ns, "store") for one, result in zip(of_tokens, taken, strict=True)]
        alone += [
            counter_decision(charge, standing, clock_us, now_ns)
            for (charge, _), standing in zip(counted, standings, strict=True)
        ]
        is_unanswered = any(one for one, _ in readings)
        refused = None
        if not all(decision.allowed for decision in alone):
            refused = refusal_of(alone, [*of_tokens, *[charge for charge, _ in counted]])
            refused.source = "store"
        is_charged = may_be_charged and not is_unanswered and refused is None
        self._note_buckets(of_tokens, taken, now_ns, is_charged=is_charged)
        if is_charged:
            standings = self._charge(standings, [charge.increment_ns for charge, _ in counted], clock_us)
        if self._admission is not None:
            self._learn(self._admission, is_charged=is_charged)
        if self.is_over:  # the policy for outages has decided, or a concurrency limit
            return refused
        if is_unanswered:
            self._ask_again()
        elif refused is not None:
            self._on_decision(refused)
        elif not of_tokens:  # a counter alone, see `multi_node_quotas`
            allowed = counter_allowance(counted[0][0], standings[0], clock_us, now_ns)
            allowed.source = "store"
            self._on_decision(allowed)
        else:
            decision = joint_decision(of_tokens, taken, now_ns, "store")
            self._on_decision(joint_allowance(self._charges, decision, standings, clock_us))
        return refused

    def _note_buckets(
        self, charges: Sequence[Charge], taken: Sequence[tuple[int, int]], now_ns: int, *, is_charged: bool
    ) -> None:
        buckets = self._limiter.buckets
        for charge, (tat_ns, wait_ns) in zip(charges, taken, strict=True):
            given_back_ns = 0 if is_charged or wait_ns else charge.increment_ns  # not charged: another refused
            buckets.cache.put(charge, tat_ns - now_ns - given_back_ns, self._asked_ns)
            if buckets.fallback.has_debts and self._admission is None:
                buckets.fallback.confirm(charge.key, self._asked_ns)

    def _learn(self, admission: Decision, *, is_charged: bool) -> None:
        """Note whether the store has charged what the policy for outages has admitted before this late reply."""
        learn_late(self._limiter.buckets, of_buckets(self._charges), is_charged=is_charged)
        for charge, start in zip(self._charges, debts_of(admission), strict=True):
            if isinstance(charge.quota, PeriodQuota):
                admitted = UnreportedAmount(start, charge.increment_ns, generation=self._generation)
                self._limiter.settle_owed(charge.key, admitted, is_charged=is_charged)

    def _charge(self, standings: Sequence[QuotaState], costs: Sequence[int], clock_us: int) -> list[QuotaState]:
        """Charge the readings as the script has charged the counters; return the standings after it."""
        now, warned, after = clock_us // MICROSECONDS, list[QuotaWarning](), []
        for standing, cost in zip(standings, costs, strict=True):
            if cost:
                attach(standing)
                warned += use(standing, cost, now)
                self._limiter.note(standing.key, standing.counter, clock_us)
            after.append(standing_of(standing.key, standing.quota, standing.counter, now))
        if warned:
            self._limiter.warn(warned)
        return after

    def _ask_again(self) -> None:
        if self._asked >= MAX_ASKED:
            self._on_decision(self._limiter.decide_without_store(self._charges, may_be_charged=False))
            return
        again = QuotaChargeOp(self._limiter, self._charges, self._asked_ns, self._on_decision, self._asked + 1)
        self._limiter.buckets.batcher.submit(again)

    def lose_reports(self) -> None:
        """Count the debts that this operation reports against the shares: it is not known whether it was executed."""
        self._limiter.buckets.fallback.lose(self._debts, self._limiter.buckets.clock_ns())

    def fail(self) -> None:
        """Complete with a decision by the policy for outages."""
        if self.is_sent:
            self.lose_reports()
        decision = self._limiter.decide_without_store(self._charges, may_be_charged=self.is_sent)
        if self.is_sent and decision.allowed:
            self._admission, self._generation = decision, self._limiter.generation
        self._on_decision(decision)


class CounterOp(ScriptOp):
    """Reads a counter, or adjusts it: top-up, carry-over, reset."""

    __slots__ = ("_adjustment", "_asked", "_key", "_limiter", "_on_counter", "_quota")

    def __init__(
        self,
        limiter: CountersPort,
        key: str,
        quota: PeriodQuota,
        on_counter: Callable[[QuotaCounter | None, int], None],
        adjustment: Adjustment | None = None,
        asked: int = 1,
    ) -> None:
        """`on_counter` gets the counter and the store's time in microseconds; of a failure, None and -1."""
        super().__init__(limiter.counter_key(key))
        self._limiter = limiter
        self._key = key
        self._quota = quota
        self._on_counter = on_counter
        self._adjustment = adjustment
        self._asked = asked

    def write(self, call: ScriptCall) -> None:
        """Append a charge of 0, or the adjustment."""
        asked = question(self._limiter, call.number(self.key), self._key, self._quota, 0)
        if self._adjustment is None:
            call.arguments += ("all", 0, 1, *asked)
        else:
            call.arguments += ("adjust", *asked, *self._adjustment)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Complete with the counter, or ask again."""
        is_unanswered, counter = read_counter(reply)
        self._limiter.note(self._key, counter, clock_us)
        if self.is_over:
            return
        if is_unanswered and self._adjustment is not None:
            if self._asked >= MAX_ASKED:
                self._on_counter(None, _NONE)
                return
            again = CounterOp(
                self._limiter, self._key, self._quota, self._on_counter, self._adjustment, self._asked + 1
            )
            self._limiter.buckets.batcher.submit(again)
            return
        self._on_counter(counter, clock_us)

    def fail(self) -> None:
        """Complete without a counter."""
        self._on_counter(None, _NONE)


class CorrectOp(ScriptOp):
    """Charges or refunds the difference of a cost settlement.

    What the store does not charge is owed, as in an outage; a refund that fails leaves the counter unchanged.
    """

    __slots__ = ("_change", "_key", "_limiter", "_quota", "_start")

    def __init__(self, limiter: CountersPort, key: str, quota: PeriodQuota, change: int, start: int) -> None:
        """`start` is that of the period that was charged."""
        super().__init__(limiter.counter_key(key))
        self._limiter = limiter
        self._key = key
        self._quota = quota
        self._change = change
        self._start = start

    def write(self, call: ScriptCall) -> None:
        """Append the correction."""
        number = call.number(self.key)
        asked = question(self._limiter, number, self._key, self._quota, self._change)
        call.arguments += ("correct", *asked, self._start)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Do nothing: there is no reply."""

    def fail(self) -> None:
        """Keep the charge until the store can be charged, unless it may have been already."""
        if self._change > 0:
            self._limiter.owe(self._key, self._change, self._start, is_sent=self.is_sent)
