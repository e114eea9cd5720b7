"""The history of requests: what was decided about each of the last ones, and why, in memory.

The ended exchanges themselves are kept, and records are made of them when a request needs them. They are limited in
number, bytes, and number a second, and divided among clients. Keeping an exchange costs a request several times the
CPU time of its record, because its memory is not used again while it is in the processor's caches.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from api_gateway.models import NANOSECONDS, Charge, Clock, Decision, Exchange, HeaderList, processes_of
from api_gateway.observability.record_budget import RecordBudget
from api_gateway.observability.request_record import (
    NUMBERS,
    REQUEST_RESULTS,
    ChargeRecord,
    DecisionRecord,
    HistoryRecord,
    RequestResult,
    SettlementRecord,
    number_of,
)

Kept = tuple[float, Exchange, int]  # when it ended (wall time in seconds), and the bytes that it counts for

MAX_RECORDED_TEXT = 2_000  # characters of a path or a detail that are shown
_STEP = 64  # records after which a reader may pause
_APART = 1 / NUMBERS  # seconds between two records at least, so that their numbers differ
_RECORD_BYTES = 1_000  # of an exchange without its texts, rounded up
_LIMIT_BYTES = 250  # of one limit that a record names, and of one attempt
MAX_SUCCESS_PATH = 500  # characters of the path of a success that are kept
_BYTES_A_CHARACTER = 4  # at most
_SHARES = 8  # a client has at most such a part of a full ring
_MAX_SHARE = 1_000  # records
_SERVER_ERROR, _CLIENT_DISCONNECTED = 500, 499
_MAX_BUDGETS = 2  # a bucket is at most that many budgets from full, after a settlement


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """How many records of each result are kept, in how many bytes together, and for how many seconds at most.

    `per_second` are the records of each result that are added in a second at most, apart from bursts.
    """

    successes: int
    refusals: int
    errors: int
    max_bytes: int
    max_age: float
    per_second: tuple[float, float, float] = (10, 50, 50)  # of successes, refusals and errors

    @property
    def most(self) -> tuple[int, int, int]:
        """The number of records of each result."""
        return self.successes, self.refusals, self.errors


class FairRing:
    """The last records, limited in number and bytes, and divided among clients.

    A full ring drops the oldest record of the client that adds one, if that client has more than its share, and
    otherwise a record of a client without recent ones. So no client, however many requests it sends, removes the
    records of all others.
    """

    __slots__ = ("_former", "_max_bytes", "_most", "_order", "_recent", "_share", "count", "size")

    def __init__(self, most: int = 0, max_bytes: int = 0) -> None:
        self._recent: dict[str, deque[Kept]] = {}  # by client, oldest first; none is empty
        self._former: dict[str, deque[Kept]] = {}  # of clients without a record since the last turn
        self._order: list[str] = []  # the clients in `_former`, and some that were in it, longest inactive last
        self.count = self.size = 0
        self.limit(most, max_bytes)

    def __repr__(self) -> str:
        return f"<FairRing [{self.count} of {self._most} records, {self.size} of {self._max_bytes} bytes]>"

    def limit(self, most: int, max_bytes: int) -> None:
        """Change the limits, and drop what exceeds them."""
        self._most, self._max_bytes = most, max_bytes
        self._share = max(1, min(most // _SHARES, _MAX_SHARE))
        while self.count and (self.count > most or self.size > max_bytes):
            self._drop_former()

    def add(self, principal: str, record: Kept) -> None:
        """Add a record of a client."""
        held = self._recent.get(principal)
        if held is None:
            held = self._recent[principal] = self._former.pop(principal) if principal in self._former else deque()
        held.append(record)
        self.count += 1
        self.size += record[2]
        while self.count and (self.count > self._most or self.size > self._max_bytes):
            if len(held) > self._share:
                self.count -= 1
                self.size -= held.popleft()[2]
            else:
                self._drop_former(principal)

    def lists(self) -> list[deque[Kept]]:
        """Return the records of each client, oldest first."""
        return [*self._former.values(), *self._recent.values()]

    def _drop_former(self, adding: str | None = None) -> None:
        """Drop the oldest record of the client that has been inactive for longest: not of the one that is adding."""
        while not self._order or self._order[-1] not in self._former:
            if self._order:
                self._order.pop()
                continue
            self._former, self._recent = self._recent, {}  # nothing is left in `_former`
            if adding in self._former and len(self._former) > 1:
                self._recent[adding] = self._former.pop(adding)
            self._order = list(reversed(self._former))
        principal = self._order[-1]
        held = self._former[principal]
        self.count -= 1
        self.size -= held.popleft()[2]
        if not held:
            del self._former[principal]


class RequestHistory:
    """Keeps ended requests: those of each result apart, with a third of the bytes and a budget of their own.

    `not_kept` counts, by result, the requests for which the budget had no place.
    """

    def __init__(self, limits: HistoryLimits, not_kept: Counter[str] | None = None) -> None:
        self._rings = {result: FairRing() for result in REQUEST_RESULTS}
        self._budgets = {result: RecordBudget(1, 0) for result in REQUEST_RESULTS}
        self._of_successes, self._of_refusals, self._of_errors = self._budgets.values()
        self.not_kept = Counter(dict.fromkeys(REQUEST_RESULTS, 0)) if not_kept is None else not_kept
        self._next = 0.0  # the time of the next record at the earliest
        self.change(limits)

    def __repr__(self) -> str:
        return f"<RequestHistory [{', '.join(f'{count} {name}' for name, (count, _) in self.sizes().items())}]>"

    @property
    def limits(self) -> HistoryLimits:
        """The limits in force."""
        return self._limits

    def change(self, limits: HistoryLimits) -> None:
        """Apply other limits, and drop what exceeds them."""
        self._limits = limits
        share = limits.max_bytes // len(REQUEST_RESULTS)
        for result, most, rate in zip(REQUEST_RESULTS, limits.most, limits.per_second, strict=True):
            self._rings[result].limit(most, share)
            self._budgets[result].change(rate, most)

    def sizes(self) -> dict[RequestResult, tuple[int, int]]:
        """Return the number of records and their bytes by result."""
        return {result: (ring.count, ring.size) for result, ring in self._rings.items()}

    def observer(self, wall_clock: Clock) -> Callable[[Exchange], None]:
        """Return the observer of ended exchanges, which records an exchange if there is a place for it."""
        takes, record, not_kept = self.takes, self.record, self.not_kept
        successes, refusals = self._of_successes, self._of_refusals

        def observe(exchange: Exchange) -> None:
            status, finished = exchange.status, exchange.finished
            if exchange.reason is None and status < _SERVER_ERROR:  # `takes`, inlined for nearly all at a high rate
                if finished < successes.full_until:
                    not_kept["success"] += 1
                    return
            elif finished < refusals.full_until and status < _CLIENT_DISCONNECTED and exchange.source == "gateway":
                not_kept["refusal"] += 1
                return
            if takes(exchange):
                record(exchange, wall_clock())

        return observe

    def takes(self, exchange: Exchange) -> bool:
        """Return whether an exchange that has just ended is to be recorded, and count it if not."""
        result: RequestResult
        status = exchange.status
        if exchange.reason is None and status < _SERVER_ERROR:  # `request_result`, inlined
            result, budget = "success", self._of_successes
        elif status >= _CLIENT_DISCONNECTED or exchange.source == "upstream":
            result, budget = "error", self._of_errors
        else:
            result, budget = "refusal", self._of_refusals
        if exchange.finished >= budget.full_until:
            client = exchange.client
            if budget.takes(exchange.client_address if client is None else client.key, exchange.finished):
                return True
        self.not_kept[result] += 1
        return False

    def record(self, exchange: Exchange, now: float) -> None:
        """Keep an exchange that has ended at `now`, in seconds since the epoch, without its credential."""
        now = max(now, self._next)
        self._next = now + _APART
        organisation = None if exchange.credential is None else exchange.credential.organisation
        exchange.credential = None if organisation is None else _FormerCredential(organisation)
        result, client = request_result(exchange), exchange.client
        if result == "success" and len(exchange.path) > MAX_SUCCESS_PATH:
            exchange = replace(exchange, path=f"{exchange.path[:MAX_SUCCESS_PATH]}...")
        texts = len(exchange.path) + len(exchange.detail or "") + sum([len(one.detail) for one in exchange.failures])
        texts += len(organisation or "")
        parts = len(exchange.charges) + len(exchange.failures)
        self._rings[result].add(
            exchange.client_address if client is None else client.key,
            (now, exchange, _RECORD_BYTES + _LIMIT_BYTES * parts + _BYTES_A_CHARACTER * texts),
        )

    def number_at(self, now: float) -> int:
        """Return a number that no record so far exceeds, and that is below those of all that follow.

        `now` is in seconds since the epoch.
        """
        number = number_of(max(self._next, now))
        self._next = (number + 1) / NUMBERS
        return number

    def records(self, now: float, after: int = 0) -> Iterator[HistoryRecord | None]:
        """Yield the records whose number is above `after`, in no order, and None where the caller may pause.

        Records that are older than `max_age` are left out.
        """
        since = max((after + 1) / NUMBERS, now - self._limits.max_age)
        for held in [held for ring in self._rings.values() for held in ring.lists()]:
            for count, (ended, exchange, _) in enumerate(reversed(held.copy()), 1):
                if ended < since:
                    break
                yield _record_of(exchange, ended)
                if not count % _STEP:
                    yield None
            yield None


def request_result(exchange: Exchange) -> RequestResult:
    """Return how an exchange has ended."""
    if exchange.reason is None and exchange.status < _SERVER_ERROR:
        return "success"
    is_error = exchange.status >= _CLIENT_DISCONNECTED or exchange.source == "upstream"
    return "error" if is_error else "refusal"


def _record_of(exchange: Exchange, ended: float) -> HistoryRecord:
    client, decision = exchange.client, exchange.decision
    return HistoryRecord(
        ended=ended,
        id=exchange.id,
        trace_id=None if exchange.trace is None else exchange.trace.trace_id,
        result=request_result(exchange),
        client_id=None if client is None else client.id,
        tier=None if client is None else client.quota.name,
        tier_source=None if client is None else client.source,
        client_address=exchange.client_address,
        method=exchange.method,
        path=_shortened(exchange.path),
        status=exchange.status,
        reason=exchange.reason,
        detail=None if exchange.detail is None else _shortened(exchange.detail),
        source=exchange.source,
        route=exchange.route,
        upstream=exchange.upstream,
        target=exchange.target,
        attempts=exchange.attempts,
        fallback=exchange.fallback,
        cost=exchange.cost,
        bytes_in=exchange.bytes_in,
        bytes_out=exchange.bytes_out,
        started=exchange.started,
        sent_at=exchange.sent_at,
        head_at=exchange.head_at,
        finished=exchange.finished,
        decision=None if decision is None else _decided(exchange, decision),
        failures=exchange.failures,
    )


class _FormerCredential:
    """The part of a credential that the access log needs, whose thread may render the exchange later."""

    __slots__ = ("fields", "organisation")

    def __init__(self, organisation: str) -> None:
        self.organisation: str | None = organisation
        self.fields: HeaderList = []


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_RECORDED_TEXT else f"{text[:MAX_RECORDED_TEXT]}..."


def _decided(exchange: Exchange, decision: Decision) -> DecisionRecord:
    """Return the decision as it was made, what it charged, and the changes of the cost since."""
    settled: tuple[SettlementRecord, ...] = ()
    charges = exchange.charges
    if exchange.settlements:
        first = exchange.settlements[0]
        decision = first.decision
        charged = [
            _charged(one, one.quota.cost_ns(first.charged if one.own_cost is None else one.own_cost))
            for one in charges
        ]
        settled = tuple(
            [SettlementRecord(one.at_ns / NANOSECONDS, one.charged, one.cost) for one in exchange.settlements]
        )
    else:
        charged = [_charged(one, one.increment_ns) for one in charges]
    quota = decision.quota
    return DecisionRecord(
        allowed=decision.allowed,
        source=decision.source,
        limit=quota.policy,
        key=decision.key,
        wait_ns=decision.wait_ns,
        charges=charged,
        left=_left(charges, decision),
        processes=processes_of(decision),
        at_ns=decision.at_ns,
        refusing=() if decision.allowed else tuple([one.policy for one in decision.violated or (quota,)]),
        slots=tuple([(one.quota.policy, one.quota.capacity) for one in getattr(charges, "slots", ())]),
        settled=settled,
    )


def _left(charges: Sequence[Charge], decision: Decision) -> tuple[int | None, ...]:
    """Return the rest of each bucket and counter after a decision, in units of its quota; None if not stated.

    A cluster has several clocks, and buckets that no server could be asked for: a time until a bucket is full that no
    bucket can have is one of another clock. The policies `deny` and `allow` look at no bucket.
    """
    if decision.source in ("deny", "allow"):
        return (None,) * len(charges)
    counters: tuple[int, ...] = getattr(decision, "left", ())
    number = sum([one.quota.is_calendar for one in charges])
    debts_ns, of_all = decision.debts_ns, len(decision.debts_ns) == len(charges)
    if not of_all and len(debts_ns) != len(charges) - number:
        debts_ns = ()
    debts, left, found = iter(debts_ns), iter(counters if len(counters) == number else ()), list[int | None]()
    for one in charges:
        quota, is_own = one.quota, one.key == decision.key
        if quota.is_calendar:
            if of_all:
                next(debts)
            found.append(next(left, decision.remaining * quota.emission_ns if is_own else None))
            continue
        debt_ns = next(debts, decision.reset_ns if is_own else None)
        if debt_ns is None or not -quota.burst_ns <= debt_ns <= _MAX_BUDGETS * quota.burst_ns:
            found.append(None)
        else:
            found.append(quota.burst_ns - debt_ns)
    return tuple(found)


def _charged(charge: Charge, increment_ns: int) -> ChargeRecord:
    quota = charge.quota
    return ChargeRecord(
        quota.policy, charge.key, quota.emission_ns, quota.burst_ns, increment_ns, charge.own_cost, quota.is_calendar
    )
