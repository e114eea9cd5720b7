"""The operations of token_bucket.lua on counters of calendar quotas, alone or together with buckets.

A counter in the store is sixteen integers: the unit of its period (its index in `UNITS`), the beginning of the first
period, the latest count (start, used, carried, drawn, peak), the end of its period, the count before (start -1: none),
the balance of top-ups and its end, the resets; see `period_standing`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from api_gateway.limits.period_standing import (
    MICROSECONDS,
    UNITS_PER_TOKEN,
    Adjustment,
    Count,
    Counter,
    PeriodQuota,
    Standing,
    Warned,
    attach,
    standing_of,
    use,
)
from api_gateway.limits.periods import UNITS
from api_gateway.limits.quota_decisions import (
    counter_allowance,
    counter_decision,
    joint_allowance,
    of_buckets,
    of_counters,
    refusal_of,
)
from api_gateway.limits.script_batcher import ScriptOp
from api_gateway.limits.script_ops import LimiterPort
from api_gateway.models import Charge, Decision
from api_gateway.rate_limiter import decision_of, joint_decision, take_each
from api_gateway.storage.redis_session import ScriptCall

MAX_ASKED = 3  # times that an operation is sent, each with what the store replied before
_NONE = -1
_FIELDS = 16
_COUNT = 5


class Owed(NamedTuple):
    """What was admitted without the store in the period from `start`.

    The store was sent `reported` of it, or may have been charged it with a request whose reply was lost. The whole
    `amount` counts against the share of this process until a reply shows that the store has charged it.
    """

    start: int
    amount: int = 0
    reported: int = 0


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
    def warn(self) -> Callable[[Sequence[Warned]], None]:
        """Passes warnings on."""
        ...

    def began(self, key: str) -> int | None:
        """Return when the first period of a key began, by the last reading; None if it is not known."""
        ...

    def store_time(self) -> int:
        """Return the store's time in seconds since the epoch, by the last reading."""
        ...

    def note(self, key: str, counter: Counter | None, clock_us: int) -> None:
        """Keep a reading: a counter, and the store's time."""
        ...

    def report_owed(self, key: str) -> tuple[int, Owed | None]:
        """Return what is to be reported of what was charged to a counter without the store; and all that was."""
        ...

    def confirm_owed(self, key: str, reported: Owed) -> None:
        """Forget what was reported before the store replied."""
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


def read_counter(reply: Iterator[int]) -> tuple[bool, Counter | None]:
    """Return whether the script must be asked again, and the counter (None: there is none)."""
    is_unanswered = next(reply) == 1
    fields = [next(reply) for _ in range(_FIELDS)]
    if fields[0] == _NONE:
        return is_unanswered, None
    unit, began, *rest, balance, until, resets = fields
    latest, end, before = rest[:_COUNT], rest[_COUNT], rest[_COUNT + 1 :]
    counter = Counter(
        UNITS[unit],
        began,
        Count(*latest),
        end,
        None if before[0] == _NONE else Count(*before),
        balance,
        until,
        resets=resets,
    )
    return is_unanswered, counter


class QuotaChargeOp(ScriptOp):
    """Charges all buckets and counters of one request, or none; or one counter alone, without buckets."""

    __slots__ = ("_asked", "_asked_ns", "_charges", "_limiter", "_on_decision", "_reported")

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
        self._reported: list[tuple[str, Owed]] = []

    def write(self, call: ScriptCall) -> None:
        """Append the charges, preceded by what was charged during an outage."""
        limiter, buckets, arguments = self._limiter, self._limiter.buckets, call.arguments
        of_tokens, counted = of_buckets(self._charges), of_counters(self._charges)
        numbers = [call.number(buckets.store_key(charge.key)) for charge in of_tokens]
        if buckets.fallback.has_debts:
            budgets = 1 if buckets.policy == "allow" else 2
            for number, charge in zip(numbers, of_tokens, strict=True):
                owed_ns, burst_ns = buckets.fallback.report(charge, self._asked_ns), charge.quota.burst_ns
                if owed_ns:
                    arguments += ("debt", number, burst_ns, owed_ns, budgets * burst_ns)
        keys = [call.number(limiter.counter_key(charge.key)) for charge, _ in counted]
        for number, (charge, quota) in zip(keys, counted, strict=True):
            unreported, owed = limiter.report_owed(charge.key)
            if owed is not None:
                self._reported.append((charge.key, owed))
                if unreported:
                    arguments += ("correct", *question(limiter, number, charge.key, quota, unreported), owed.start)
        arguments += ("all", len(numbers), len(keys))
        for number, charge in zip(numbers, of_tokens, strict=True):
            arguments += (number, charge.quota.burst_ns, charge.increment_ns)
        for number, (charge, quota) in zip(keys, counted, strict=True):
            arguments += question(limiter, number, charge.key, quota, charge.increment_ns)

    def read(self, clock_us: int, reply: Iterator[int]) -> None:
        """Compute the decision as the script has, or ask again."""
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
            limiter.confirm_owed(key, reported)
        if any(is_unanswered for is_unanswered, _ in readings):
            if not self.is_over:
                self._ask_again()
            return
        if self.is_over:  # the policy for outages has decided, and does not charge it again
            return
        alone = [decision_of(one, *result, now_ns, "store") for one, result in zip(of_tokens, taken, strict=True)]
        alone += [
            counter_decision(charge, standing, clock_us, now_ns)
            for (charge, _), standing in zip(counted, standings, strict=True)
        ]
        is_allowed = all(decision.allowed for decision in alone)
        for charge, (tat_ns, wait_ns) in zip(of_tokens, taken, strict=True):
            given_back_ns = 0 if is_allowed or wait_ns else charge.increment_ns  # not charged: another refused
            limiter.buckets.cache.put(charge, tat_ns - now_ns - given_back_ns, self._asked_ns)
            if limiter.buckets.fallback.has_debts:
                limiter.buckets.fallback.confirm(charge.key, self._asked_ns)
        if not is_allowed:
            refused = refusal_of(alone, [*of_tokens, *[charge for charge, _ in counted]])
            refused.source = "store"
            self._on_decision(refused)
            return
        standings = self._charge(standings, [charge.increment_ns for charge, _ in counted], clock_us)
        if not of_tokens:  # a counter alone, see `multi_node_quotas`
            allowed = counter_allowance(counted[0][0], standings[0], clock_us, now_ns)
            allowed.source = "store"
            self._on_decision(allowed)
            return
        decision = joint_decision(of_tokens, taken, now_ns, "store")
        self._on_decision(joint_allowance(self._charges, decision, standings, clock_us))

    def _charge(self, standings: Sequence[Standing], costs: Sequence[int], clock_us: int) -> list[Standing]:
        """Charge the readings as the script has charged the counters; return the standings after it."""
        now, warned, after = clock_us // MICROSECONDS, list[Warned](), []
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

    def fail(self) -> None:
        """Complete with a decision by the policy for outages."""
        self._on_decision(self._limiter.decide_without_store(self._charges, may_be_charged=self.is_sent))


class CounterOp(ScriptOp):
    """Reads a counter, or adjusts it: a top-up, what was carried over, a new beginning."""

    __slots__ = ("_adjustment", "_asked", "_key", "_limiter", "_on_counter", "_quota")

    def __init__(
        self,
        limiter: CountersPort,
        key: str,
        quota: PeriodQuota,
        on_counter: Callable[[Counter | None, int], None],
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
    """Charges or refunds the difference of a cost settlement. A failure is ignored: the counter stays unchanged."""

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
        """Do nothing."""
