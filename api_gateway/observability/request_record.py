"""The record of one ended request, as it is shown."""

from typing import Literal, NamedTuple

from api_gateway.models import NANOSECONDS, AttemptFailure, DecisionSource, share_increment

RequestResult = Literal["success", "refusal", "error"]

REQUEST_RESULTS: tuple[RequestResult, ...] = ("success", "refusal", "error")
NUMBERS = 2**20  # in a second; the products with it are exact


class ChargeRecord(NamedTuple):
    """One limit that a request was charged to. Its units of time are those of `models.Quota`.

    `key` identifies the bucket; it may contain values of header fields, so it is not shown. `is_calendar`: it is a
    counter of a calendar quota.
    """

    name: str
    key: str
    emission_ns: int
    burst_ns: int
    increment_ns: int
    own_cost: float | None
    is_calendar: bool


class SettlementRecord(NamedTuple):
    """A change of the cost of a request, in tokens, `at` monotonic seconds."""

    at: float
    before: float
    after: float


class DecisionRecord(NamedTuple):
    """The decision of the limiter on one request, before settlements.

    `limit` is the limit that it is about, `key` that of its bucket, `refusing` are all that refused: also concurrency
    limits, which are not among those charged. `left` is what each of `charges` had left after the decision, in units
    of its quota; None if the decision does not state it. `processes` share the limits; what buckets had left is then
    that of whole ones, see `models.Decision`. It was made at `at_ns` on the clock of the buckets. `slots` are the
    concurrency limits that applied, by name, with the number of requests that each allows in flight.
    """

    allowed: bool
    source: DecisionSource
    limit: str
    key: str
    wait_ns: int
    charges: list[ChargeRecord]
    left: tuple[int | None, ...]
    processes: int
    at_ns: int
    refusing: tuple[str, ...]
    slots: tuple[tuple[str, int], ...]
    settled: tuple[SettlementRecord, ...]


class HistoryRecord(NamedTuple):
    """One ended request. `started`, `sent_at`, `head_at` and `finished` are monotonic seconds, `ended` wall time."""

    ended: float
    id: str
    trace_id: str | None
    result: RequestResult
    client_id: str | None
    tier: str | None
    tier_source: str | None
    client_address: str
    method: str
    path: str
    status: int
    reason: str | None
    detail: str | None
    source: str
    route: str | None
    upstream: str | None
    target: str | None
    attempts: int
    fallback: str | None
    cost: float
    bytes_in: int
    bytes_out: int
    started: float
    sent_at: float | None
    head_at: float | None
    finished: float
    decision: DecisionRecord | None
    failures: tuple[AttemptFailure, ...]

    @property
    def number(self) -> int:
        """The number of the record, different for each of a process, in the order of the ends of requests."""
        return number_of(self.ended)


def number_of(ended: float) -> int:
    """Return the number of the record with this time of its end."""
    return int(ended * NUMBERS)


def charged_cost(charged: ChargeRecord) -> float:
    """Return the charge to a limit, in tokens."""
    return charged.increment_ns / charged.emission_ns


class LimitState(NamedTuple):
    """The state of a limit at a decision, in tokens: before it, what it took, and after it.

    `before` and `after` are None if the decision does not state them. A counter of a calendar quota has no `rate`. If
    several `processes` share the limit, all figures are those of one share.
    """

    before: float | None
    taken: float
    after: float | None
    capacity: float
    rate: float
    processes: int


def states_of(decision: DecisionRecord) -> list[LimitState]:
    """Return the state of each limit that a decision charged, in their order."""
    return [_state_of(decision, one, left) for one, left in zip(decision.charges, decision.left, strict=True)]


def _state_of(decision: DecisionRecord, charged: ChargeRecord, left: int | None) -> LimitState:
    processes, cost = decision.processes, charged_cost(charged)
    capacity = charged.burst_ns / charged.emission_ns / processes
    if charged.is_calendar:
        rate, taken = 0.0, cost
        after = None if left is None else left / charged.emission_ns
    else:
        rate = NANOSECONDS / charged.emission_ns / processes
        taken = share_increment(charged.increment_ns, charged.burst_ns, processes) / charged.emission_ns / processes
        after = None if left is None else left / charged.emission_ns / processes
    before = after + taken if after is not None and decision.allowed else after
    return LimitState(before, taken, after, capacity, rate, processes)
