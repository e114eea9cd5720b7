"""The history of requests: what was decided about each of the last ones, and why, in memory.

Records are bounded in number and bytes, and divided among clients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from api_gateway.models import NANOSECONDS, Charge, Decision, Exchange
from api_gateway.observability.request_record import (
    ENDED_FIELD,
    NUMBERS,
    REQUEST_OUTCOMES,
    SIZE_FIELD,
    Record,
    RequestOutcome,
    Settled,
    Values,
    number_of,
)

MAX_RECORDED_TEXT = 2_000  # characters of a path or a detail that are kept
_APART = 1 / NUMBERS  # seconds between two records at least, so that their numbers differ
_RECORD_BYTES = 1_000  # of a record without its texts, rounded up
_LIMIT_BYTES = 250  # of one limit that a record names
_BYTES_A_CHARACTER = 4  # at most
_SHARES = 8  # a client has at most such a part of a full ring
_MAX_SHARE = 1_000  # records, so that removing the first of a list stays cheap
_MAX_DESCRIBED = 512  # lists of charges whose description is remembered
_SERVER_ERROR, _CLIENT_DISCONNECTED = 500, 499


@dataclass(frozen=True, slots=True)
class HistoryLimits:
    """How many records of each outcome are kept, in how many bytes together, and for how many seconds at most."""

    successes: int
    refusals: int
    errors: int
    max_bytes: int
    max_age: float


class FairRing:
    """The last records, limited in number and bytes, and divided among clients.

    A full ring drops the oldest record of the client that adds one, if that client has more than its share, and
    otherwise a record of a client without recent ones. So no client, however many requests it sends, removes the
    records of all others.
    """

    __slots__ = ("_former", "_max_bytes", "_most", "_order", "_recent", "_share", "count", "size")

    def __init__(self, most: int, max_bytes: int) -> None:
        self._recent: dict[str, list[Values]] = {}  # by client, oldest first; none is empty
        self._former: dict[str, list[Values]] = {}  # of clients without a record since the last turn
        self._order: list[str] = []  # the clients in `_former`, and some not any more, longest inactive last
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

    def add(self, holder: str, record: Values, size: int) -> None:
        """Add a record of a client, of `size` bytes."""
        held = self._recent.get(holder)
        if held is None:
            held = self._recent[holder] = self._former.pop(holder, [])
        held.append(record)
        self.count += 1
        self.size += size
        while self.count and (self.count > self._most or self.size > self._max_bytes):
            if len(held) > self._share:
                self.count -= 1
                self.size -= held.pop(0)[SIZE_FIELD]
            else:
                self._drop_former(holder)

    @property
    def is_on(self) -> bool:
        """True if the ring keeps any record."""
        return self._most > 0

    def lists(self) -> list[list[Values]]:
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
        holder = self._order[-1]
        held = self._former[holder]
        self.count -= 1
        self.size -= held.pop(0)[SIZE_FIELD]
        if not held:
            del self._former[holder]


class RequestHistory:
    """Keeps the records of ended requests, of each outcome in a ring of its own, with a third of the bytes."""

    def __init__(self, limits: HistoryLimits) -> None:
        self._limits = limits
        self._successes, self._refusals, self._errors = (FairRing(0, 0) for _ in REQUEST_OUTCOMES)
        self._next = 0.0  # the time of the next record at the earliest
        self._described: dict[int, tuple[Sequence[Charge], tuple[Values, ...]]] = {}
        self.change(limits)

    def __repr__(self) -> str:
        return f"<RequestHistory [{', '.join(f'{count} {name}' for name, (count, _) in self.sizes().items())}]>"

    @property
    def limits(self) -> HistoryLimits:
        """The limits in force."""
        return self._limits

    @property
    def rings(self) -> tuple[FairRing, ...]:
        """The rings in the order of `REQUEST_OUTCOMES`."""
        return self._successes, self._refusals, self._errors

    def change(self, limits: HistoryLimits) -> None:
        """Apply other limits, and drop what exceeds them."""
        self._limits = limits
        for ring, most in zip(self.rings, (limits.successes, limits.refusals, limits.errors), strict=True):
            ring.limit(most, limits.max_bytes // len(REQUEST_OUTCOMES))

    def sizes(self) -> dict[RequestOutcome, tuple[int, int]]:
        """Return the number of records and their bytes by outcome."""
        return {name: (ring.count, ring.size) for name, ring in zip(REQUEST_OUTCOMES, self.rings, strict=True)}

    def record(self, exchange: Exchange, now: float) -> None:
        """Keep the record of an exchange that has ended at `now`, in seconds since the epoch."""
        if now < self._next:  # noqa: PLR1730 - `max` takes twice the time
            now = self._next
        self._next = now + _APART
        client = exchange.client
        status, reason, path, detail = exchange.status, exchange.reason, exchange.path, exchange.detail
        path = path if len(path) <= MAX_RECORDED_TEXT else f"{path[:MAX_RECORDED_TEXT]}..."
        size = _RECORD_BYTES + _BYTES_A_CHARACTER * len(path)
        outcome, ring = "success", self._successes
        if reason is not None or status >= _SERVER_ERROR:
            is_error = status >= _CLIENT_DISCONNECTED or exchange.source == "upstream"
            outcome, ring = ("error", self._errors) if is_error else ("refusal", self._refusals)
            if detail is not None:
                detail = detail if len(detail) <= MAX_RECORDED_TEXT else f"{detail[:MAX_RECORDED_TEXT]}..."
                size += _BYTES_A_CHARACTER * len(detail)
            size += sum([_LIMIT_BYTES + _BYTES_A_CHARACTER * len(one.detail) for one in exchange.failures])
        if not ring.is_on:
            return
        values: Values | None = None
        if exchange.decision is not None:
            values = self._decided(exchange, exchange.decision)
            size += _LIMIT_BYTES * len(exchange.charges)
        if client is None:
            holder, client_id, tier, tier_source = exchange.peer, None, None, None
        else:
            holder, client_id, tier, tier_source = client.key, client.id, client.quota.name, client.source
        ring.add(
            holder,
            (
                now,
                exchange.id,
                outcome,
                holder,
                client_id,
                tier,
                tier_source,
                exchange.peer,
                exchange.method,
                path,
                status,
                reason,
                detail,
                exchange.source,
                exchange.route,
                exchange.upstream,
                exchange.target,
                exchange.attempts,
                exchange.fallback,
                exchange.cost,
                exchange.bytes_in,
                exchange.bytes_out,
                exchange.started,
                exchange.sent_at,
                exchange.head_at,
                exchange.finished,
                values,
                exchange.failures,
                size,
            ),
            size,
        )

    def number_at(self, now: float) -> int:
        """Return a number that no record so far exceeds, and that is below those of all that follow.

        `now` is in seconds since the epoch.
        """
        number = number_of(max(self._next, now))
        self._next = (number + 1) / NUMBERS
        return number

    def records(self, now: float, after: int = 0) -> Iterator[Record | None]:
        """Yield the records whose number is above `after`, in no order, and None where the caller may pause.

        Records that are older than `max_age` are left out.
        """
        since = max((after + 1) / NUMBERS, now - self._limits.max_age)
        for ring in self.rings:
            for held in ring.lists():
                for values in reversed(held.copy()):
                    if values[ENDED_FIELD] < since:
                        break
                    yield Record._make(values)
                yield None

    def _decided(self, exchange: Exchange, decision: Decision) -> Values:
        """Return the values of a `Decided`."""
        charges = exchange.charges
        settled: tuple[Settled, ...] = ()
        if exchange.settlements:
            decision, charged, settled = _before_settlements(exchange)
        else:
            known = self._described.get(id(charges))
            charged = known[1] if known is not None and known[0] is charges else self._describe(charges)
        quota = decision.quota
        return (
            decision.allowed,
            decision.source,
            quota.policy,
            decision.key,
            decision.remaining,
            decision.wait_ns,
            charged,
            decision.debts_ns or (decision.reset_ns,),
            () if decision.allowed else tuple([one.policy for one in decision.violated or (quota,)]),
            settled,
        )

    def _describe(self, charges: Sequence[Charge]) -> tuple[Values, ...]:
        """Describe the charges of a request, and remember it: those of a header set are one list."""
        described = tuple([_charged(charge, charge.increment_ns) for charge in charges])
        if len(self._described) >= _MAX_DESCRIBED:
            self._described.clear()
        self._described[id(charges)] = charges, described  # the reference keeps the id from being used again
        return described


def _charged(charge: Charge, increment_ns: int) -> Values:
    """Return the values of a `Charged`."""
    quota = charge.quota
    return (
        quota.policy,
        charge.key,
        quota.emission_ns,
        quota.burst_ns,
        increment_ns,
        charge.own_cost,
        quota.is_calendar,
    )


def _before_settlements(exchange: Exchange) -> tuple[Decision, tuple[Values, ...], tuple[Settled, ...]]:
    """Return the decision as it was made, what it charged, and the changes of the cost since."""
    first = exchange.settlements[0]
    charged = tuple(
        [
            _charged(charge, charge.quota.cost_ns(first.charged if charge.own_cost is None else charge.own_cost))
            for charge in exchange.charges
        ]
    )
    settled = tuple([Settled(one.at_ns / NANOSECONDS, one.charged, one.cost) for one in exchange.settlements])
    return first.decision, charged, settled
