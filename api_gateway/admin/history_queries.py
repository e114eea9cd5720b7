"""Queries of the history of requests of one process, as JSON values.

The kinds of queries: `find` a request by its id, `list` those that ended after a number, `spent` by which requests
the tokens of a bucket were spent. A process is queried by itself or, if there are several, through the supervisor.
"""

import os
import re
from collections.abc import Callable, Mapping
from heapq import nlargest, nsmallest
from typing import Any

from api_gateway.admin.utc_times import wall_time
from api_gateway.clients.api_keys import without_keys
from api_gateway.eventloop.steps import Steps
from api_gateway.limits.concurrency import slot_share
from api_gateway.models import NANOSECONDS, WITHOUT_STORE, Clock
from api_gateway.observability.request_history import RequestHistory
from api_gateway.observability.request_record import (
    ChargeRecord,
    DecisionRecord,
    HistoryRecord,
    LimitState,
    charged_cost,
    states_of,
)
from api_gateway.printable_text import shown_method
from api_gateway.rate_limiter import NEVER_NS

MAX_FOUND = 20  # requests with one id
MAX_SPENDING = 100  # requests that have spent the tokens of one limit
STATUS = re.compile(r"[1-5](xx|[0-9]{2})")

Members = dict[str, Any]


class HistoryQueries:
    """Runs queries of the history of this process. Holds no state of its own."""

    def __init__(self, history: RequestHistory, wall_clock: Clock) -> None:
        self._history = history
        self._wall_clock = wall_clock

    def __repr__(self) -> str:
        return f"<HistoryQueries on {self._history!r}>"

    def run(self, query: Mapping[str, Any]) -> Steps[Members]:
        """Return the result of one query, in steps."""
        kind = query["kind"]
        if kind == "find":
            return self._find(query["id"])
        if kind == "spent":
            return self._spent(query["key"], query["started"])
        return self._list(query)

    def _find(self, request_id: str) -> Steps[Members]:
        kept = {result: count for result, (count, _) in self._history.sizes().items()}
        not_kept = dict(self._history.not_kept)
        found: list[HistoryRecord] = []
        oldest: float | None = None
        for record in self._history.records(self._wall_clock()):
            if record is None:
                yield
                continue
            if oldest is None or record.ended < oldest:
                oldest = record.ended
            if record.id == request_id:
                found.append(record)
        latest = nlargest(MAX_FOUND, found, key=_ended)
        requests = [_explained(record) for record in latest]
        return {"requests": requests, "kept": kept, "not_kept": not_kept, "oldest": oldest}

    def _list(self, query: Mapping[str, Any]) -> Steps[Members]:
        """Return the first requests after a number or, without one, the last ones; oldest first.

        `until` is the number up to which none is missing.
        """
        until = self._history.number_at(self._wall_clock())
        after, most = query["after"], query["limit"]
        matches = _filter(query)
        found = yield from self._select(matches, after or 0)
        if after is None:
            chosen = sorted(nlargest(most, found, key=_ended), key=_ended)
        else:
            chosen = nsmallest(most, found, key=_ended)
        not_kept = sum(self._history.not_kept.values())
        return {"requests": [_row(record) for record in chosen], "until": until, "not_kept": not_kept}

    def _spent(self, key: str, started: float) -> Steps[Members]:
        """Return the last requests that were charged to a bucket and arrived before `started`, newest first."""
        found = yield from self._select(
            lambda record: record.started <= started and _spent_at(record, key) is not None
        )
        latest = nlargest(MAX_SPENDING + 1, found, key=lambda record: record.started)
        return {"requests": [_spending(record, key) for record in latest]}

    def _select(self, matches: Callable[[HistoryRecord], bool], after: int = 0) -> Steps[list[HistoryRecord]]:
        found = []
        for record in self._history.records(self._wall_clock(), after):
            if record is None:
                yield
            elif matches(record):
                found.append(record)
        return found


def _ended(record: HistoryRecord) -> float:
    return record.ended


def _filter(query: Mapping[str, Any]) -> Callable[[HistoryRecord], bool]:
    """Return the predicate of a query: whether a record matches its filters."""
    status, wanted = query["status"], {name: query[name] for name in ("client_id", "reason", "route", "result")}
    exact = {name: value for name, value in wanted.items() if value is not None}

    def matches(record: HistoryRecord) -> bool:
        if status is not None and not _is_status(record.status, status):
            return False
        return all(getattr(record, name) == value for name, value in exact.items())

    return matches


def _is_status(status: int, wanted: str) -> bool:
    return str(status)[:1] == wanted[:1] if wanted.endswith("xx") else str(status) == wanted


def _spent_at(record: HistoryRecord, key: str) -> int | None:
    """Return the index of a bucket among those that a request was charged to; None if it was not."""
    decision = record.decision
    if decision is None or not decision.allowed:
        return None
    return next((index for index, one in enumerate(decision.charges) if one.key == key), None)


def _text(text: str | None) -> str | None:
    """Return a text of a client or an upstream without the secrets that may be in it."""
    return None if text is None else without_keys(text)


def _milliseconds(seconds: float) -> float:
    return round(max(seconds, 0.0) * 1000, 3)


def _row(record: HistoryRecord) -> Members:
    waited = None
    if record.sent_at is not None and record.head_at is not None:
        waited = _milliseconds(record.head_at - record.sent_at)
    return {
        "number": record.number,
        "time": wall_time(record.ended),
        "request_id": _text(record.id),
        "trace_id": record.trace_id,
        "result": record.result,
        "client_id": _text(record.client_id),
        "client_address": record.client_address,
        "tier": record.tier,
        "tier_source": record.tier_source,
        "method": shown_method(record.method),
        "path": _text(record.path),
        "status": record.status,
        "reason": record.reason,
        "detail": _text(record.detail),
        "source": record.source,
        "route": record.route,
        "upstream": record.upstream,
        "target": record.target,
        "attempts": record.attempts,
        "fallback": record.fallback,
        "cost": record.cost,
        "duration_ms": _milliseconds(record.finished - record.started),
        "upstream_duration_ms": waited,
        "bytes_received": record.bytes_in,
        "bytes_sent": record.bytes_out,
    }


def _explained(record: HistoryRecord) -> Members:
    """Return all that is known about a request.

    `_keys` are those of the limits that refused it, by the index of the limit, `_buckets` the state of their buckets,
    and `_started` its arrival: the process that got the request queries all for the requests that have spent the
    tokens.
    """
    decision = record.decision
    return {
        **_row(record),
        "decision": None if decision is None else _decision(decision),
        "limits": [] if decision is None else _limits(decision),
        "upstream_attempts": _attempts(record),
        "settlements": [
            {
                "after_ms": _milliseconds(one.at - record.started),
                "cost_before": one.before,
                "cost_after": one.after,
            }
            for one in (() if decision is None else decision.settled)
        ],
        "_keys": {} if decision is None else _refusing_keys(decision),
        "_buckets": {} if decision is None else _refusing_buckets(decision),
        "_started": record.started,
    }


def _refusing_keys(decision: DecisionRecord) -> dict[str, str]:
    charges = enumerate(decision.charges if decision.source != "deny" else ())
    return {str(index): one.key for index, one in charges if one.name in decision.refusing}


def _refusing_buckets(decision: DecisionRecord) -> dict[str, Members]:
    """Return the buckets of `_refusing_keys` as they were; a refusal leaves their tokens."""
    states = states_of(decision)
    return {index: _bucket(decision, states[int(index)]) for index in _refusing_keys(decision)}


def _bucket(decision: DecisionRecord, state: LimitState) -> Members:
    """Return a bucket at a decision, as `spent_tokens` compares it: its tokens before, rate and size in tokens.

    `_share` is the process to which the share belongs, None if the bucket is that of the whole limit.
    """
    return {
        "_before": state.before,
        "_at_ns": decision.at_ns,
        "_source": decision.source,
        "_share": os.getpid() if decision.source == "local_share" else None,
        "_rate": state.rate,
        "_burst": state.capacity,
    }


def _decision(decision: DecisionRecord) -> Members:
    return {
        "allowed": decision.allowed,
        "limit": decision.limit,
        "source": decision.source,
        "retry_after_seconds": _seconds_to_wait(decision.wait_ns),
    }


def _seconds_to_wait(wait_ns: int) -> float | None:
    return None if wait_ns in (0, NEVER_NS) else round(wait_ns / NANOSECONDS, 9)


def _limits(decision: DecisionRecord) -> list[Members]:
    rows = []
    for one, state in zip(decision.charges, states_of(decision), strict=True):
        allowed, wait_ns = one.name not in decision.refusing, 0
        if not allowed:
            wait_ns = decision.wait_ns if one.name == decision.limit else _wait_ns(one, state)
        rows.append(
            {
                "limit": one.name,
                "capacity": state.capacity,
                "refill_per_second": None if one.is_calendar else round(state.rate, 6),
                "cost": round(charged_cost(one), 6),
                "allowed": allowed,
                "tokens_before": None if state.before is None else round(state.before, 6),
                "tokens_after": None if state.after is None else round(state.after, 6),
                "confirmed": decision.source not in WITHOUT_STORE,
                "retry_after_seconds": _seconds_to_wait(wait_ns),
                "processes": state.processes if decision.source == "local_share" else None,
                "concurrent": None,
                "spent_by": None,
            }
        )
    slots = dict(decision.slots) | {name: None for name in decision.refusing if name not in dict(decision.slots)}
    charged = {one.name for one in decision.charges}
    return rows + [_slot(decision, name, most) for name, most in slots.items() if name not in charged]


def _slot(decision: DecisionRecord, name: str, concurrent: int | None) -> Members:
    """Return the row of a concurrency limit: of the requests in flight, nothing is kept."""
    names = ("capacity", "refill_per_second", "tokens_before", "tokens_after", "spent_by")
    processes = decision.processes if decision.source == "local_share" else None
    if processes is not None and concurrent is not None:
        concurrent = slot_share(concurrent, processes)
    wait = _seconds_to_wait(decision.wait_ns) if name == decision.limit else None
    row = {"limit": name, "cost": 1, "allowed": name not in decision.refusing, "retry_after_seconds": wait}
    row |= {"confirmed": decision.source not in WITHOUT_STORE}
    return row | {"concurrent": concurrent, "processes": processes} | dict.fromkeys(names)


def _wait_ns(charged: ChargeRecord, state: LimitState) -> int:
    """Return the wait of a limit that refuses, from its tokens; 0 if it is not known."""
    if charged.increment_ns > charged.burst_ns:
        return NEVER_NS
    if state.after is None or not state.rate:
        return 0
    return max(0, round((state.taken - state.after) / state.rate * NANOSECONDS))


def _attempts(record: HistoryRecord) -> list[Members]:
    """Return the attempts: those that have failed, and the last one if it has not."""
    rows = [
        {
            "upstream": one.upstream,
            "target": one.target,
            "started_after_ms": _milliseconds(one.started - record.started),
            "duration_ms": _milliseconds(one.ended - one.started),
            "status": one.status,
            "failure": one.failure,
            "detail": _text(one.detail) or None,
        }
        for one in record.failures
    ]
    if record.attempts > len(rows) and record.sent_at is not None:
        ended = record.finished if record.head_at is None else record.head_at
        is_response = record.head_at is not None and record.source == "upstream"
        rows.append(
            {
                "upstream": record.upstream,
                "target": record.target,
                "started_after_ms": _milliseconds(record.sent_at - record.started),
                "duration_ms": _milliseconds(ended - record.sent_at),
                "status": record.status if is_response else None,
                "failure": record.reason if record.fallback is None else None,
                "detail": None,
            }
        )
    return rows


def _spending(record: HistoryRecord, key: str) -> Members:
    """Return a request that was charged to a bucket.

    `_full`: it found the bucket full; `_left` are the tokens right after the decision, and `_charged_later` those that
    a settlement took.
    """
    index, decision = _spent_at(record, key), record.decision
    assert index is not None and decision is not None  # noqa: S101, PT018 - selected by this
    charged, state = decision.charges[index], states_of(decision)[index]
    before = state.before
    settled = bool(decision.settled) and charged.own_cost is None
    return {
        "number": record.number,
        "time": wall_time(record.ended),
        "request_id": _text(record.id),
        "client_id": _text(record.client_id),
        "method": shown_method(record.method),
        "path": _text(record.path),
        "status": record.status,
        "cost": round(record.cost if settled else charged_cost(charged), 6),
        "tokens_before": None if before is None else round(before, 6),
        "_full": before is not None and before >= state.capacity - 1e-6,
        "_started": record.started,
        "_left": state.after,
        "_charged_later": max(0.0, record.cost - charged_cost(charged)) if settled else 0.0,
        **_bucket(decision, state),
    }
