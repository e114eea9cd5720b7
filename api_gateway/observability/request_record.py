"""The record of one ended request, as it is shown."""

from typing import Literal, NamedTuple

from api_gateway.models import AttemptFailure, DecisionSource

RequestOutcome = Literal["success", "refusal", "error"]

REQUEST_OUTCOMES: tuple[RequestOutcome, ...] = ("success", "refusal", "error")
NUMBERS = 2**20  # in a second; the products with it are exact


class Charged(NamedTuple):
    """One limit that a request was charged to. Its units of time are those of `models.Quota`.

    `key` identifies the bucket; it may contain values of header fields, so it is not shown. `is_calendar`: it is a
    counter of a calendar quota, of which a decision states no debt.
    """

    name: str
    key: str
    emission_ns: int
    burst_ns: int
    increment_ns: int
    own_cost: float | None
    is_calendar: bool


class Settled(NamedTuple):
    """A change of the cost of a request, in tokens, `at` monotonic seconds."""

    at: float
    before: float
    after: float


class Decided(NamedTuple):
    """The decision of the limiter on one request, before settlements.

    `limit` is the limit that it is about, `key` that of its bucket, `refusing` are all that refused: also concurrency
    limits, which are not among those charged. `debts_ns` are the times until each bucket of `charges` was full, after
    the decision, which was made at `at_ns` on the clock of the buckets.
    """

    allowed: bool
    source: DecisionSource
    limit: str
    key: str
    remaining: int
    wait_ns: int
    charges: list[Charged]
    debts_ns: tuple[int, ...]
    at_ns: int
    refusing: tuple[str, ...]
    settled: tuple[Settled, ...]


class Record(NamedTuple):
    """One ended request. `started`, `sent_at`, `head_at` and `finished` are monotonic seconds, `ended` wall time."""

    ended: float
    id: str
    outcome: RequestOutcome
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
    decision: Decided | None
    failures: tuple[AttemptFailure, ...]

    @property
    def number(self) -> int:
        """The number of the record, different for each of a process, in the order of the ends of requests."""
        return number_of(self.ended)


def number_of(ended: float) -> int:
    """Return the number of the record with this time of its end."""
    return int(ended * NUMBERS)


def charged_cost(charged: Charged) -> float:
    """Return what was charged to a limit, in tokens."""
    return charged.increment_ns / charged.emission_ns


def tokens_after(decision: Decided) -> list[float | None]:
    """Return the tokens of each limit right after the decision; None if the decision does not state them."""
    charges = decision.charges
    if all(one.key != decision.key for one in charges):  # the decision is about a concurrency limit
        return [None for _ in charges]
    counted = [one for one in charges if not one.is_calendar]
    of_all = len(decision.debts_ns) == len(charges)
    debts = iter(decision.debts_ns if of_all or len(decision.debts_ns) == len(counted) else ())
    found: list[float | None] = []
    for one in charges:
        debt_ns = next(debts, None) if of_all or not one.is_calendar else None
        if one.is_calendar:
            found.append(float(decision.remaining) if one.name == decision.limit else None)
        else:
            found.append(None if debt_ns is None else (one.burst_ns - debt_ns) / one.emission_ns)
    return found
