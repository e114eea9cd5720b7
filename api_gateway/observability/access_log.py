"""The access log: one JSON line for each exchange."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quoted

from api_gateway.models import Decision, Exchange, Settlement
from api_gateway.observability.decision_numbers import DecisionNumbers
from api_gateway.printable_text import shown_method

# The members of a line, in their order; some lines lack some.
LINE_FIELDS = (
    "time",
    "request_id",
    "trace_id",
    "client_address",
    "client_id",
    "tier",
    "tier_source",
    "has_keys",
    "organisation",
    "method",
    "path",
    "status",
    "reason",
    "detail",
    "source",
    "route",
    "upstream",
    "target",
    "attempts",
    "retry_reasons",
    "fallback",
    "cost",
    "remaining",
    "bytes_received",
    "bytes_sent",
    "duration_ms",
    "upstream_duration_ms",
    "decision",
    "credential_check",
)
LINE_BYTES = 650  # usual size of a line without the path
_MICROSECONDS = 1_000_000
_ORGANISATION = '"organisation":'
_TRACE = '"trace_id":'
_REMEMBERED = 1024  # parts of lines of each kind
_encode = json.JSONEncoder(separators=(",", ":")).encode


class AccessLog:
    """Renders the lines; see `system.output` for the thread that does so and writes them.

    A line is three formatting operations, because the general encoder costs several times as much. What many lines
    have in common is remembered; only text is JSON-escaped, which includes ids, paths and details. The values of an
    exchange are finite numbers.
    """

    def __init__(self, redact: Callable[[str], str] = str, numbers: DecisionNumbers | None = None) -> None:
        """`redact` returns a part of a line without secrets that a client has put into a path or an id.

        `numbers` converts the times of decisions; by default they are taken to be since the epoch.
        """
        self._numbers = numbers or DecisionNumbers("0", lambda: 0, lambda: 0.0)
        self._epoch_ns = self._numbers.since_epoch(0)
        self._process = f',"process":{quoted(self._numbers.process)}'
        self._redact = redact
        self._response: Callable[..., tuple[str, str]] = lru_cache(maxsize=_REMEMBERED)(self._response_of)
        self._limits: Callable[..., str] = lru_cache(maxsize=_REMEMBERED)(self._limits_of)
        self._timestamp = ""  # of the times from `_from` until before `_until`, within one millisecond
        self._from = self._until = 0.0

    def line(self, exchange: Exchange, now: float) -> str:
        """Return the line of an exchange that has ended at `now`, in seconds since the epoch."""
        if not self._from <= now < self._until:
            self._set_timestamp(now)
        client, decision, credential = exchange.client, exchange.decision, exchange.credential
        organisation = None if credential is None else credential.organisation
        client_id = tier = tier_source = "null"
        if client is not None:
            client_id, tier = quoted(client.id), quoted(client.quota.name)
            tier_source = f'"{client.source}","has_keys":true' if client.has_keys else f'"{client.source}"'
        sent_at, head_at = exchange.sent_at, exchange.head_at
        duration = f"{(exchange.finished - exchange.started) * 1000:.3f}"
        if duration[-1] == "0":
            duration = _trimmed(duration)
        waited = "null" if sent_at is None or head_at is None else f"{(head_at - sent_at) * 1000:.3f}"
        if waited[-1] == "0":
            waited = _trimmed(waited)
        request = self._redact(
            f'{{"time":"{self._timestamp}","request_id":{quoted(exchange.id)}'
            f"{'' if exchange.trace is None else f',{_TRACE}{quoted(exchange.trace.trace_id)}'}"
            f',"client_address":{quoted(exchange.client_address)},"client_id":{client_id},"tier":{tier},"tier_source":{tier_source}'
            f"{'' if organisation is None else f',{_ORGANISATION}{quoted(organisation)}'}"
            f',"method":{quoted(shown_method(exchange.method))},"path":{quoted(exchange.path)}'
        )
        before, after = self._response(
            exchange.status,
            exchange.reason,
            exchange.source,
            exchange.route,
            exchange.upstream,
            exchange.target,
            exchange.attempts,
            exchange.retried,
            exchange.fallback,
            exchange.cost,
        )
        detail = "null" if exchange.detail is None else self._redact(quoted(exchange.detail))
        return (
            f"{request}{before}{detail}{after}{'null' if decision is None else decision.remaining}"
            f',"bytes_received":{exchange.bytes_in},"bytes_sent":{exchange.bytes_out}'
            f',"duration_ms":{duration},"upstream_duration_ms":{waited}'
            f',"decision":{"null" if decision is None else self._decision(exchange, decision)}'
            f"{'' if exchange.credential_check is None else self._check(*exchange.credential_check)}}}\n"
        )

    def _response_of(
        self,
        status: int,
        reason: str | None,
        source: str,
        route: str | None,
        upstream: str | None,
        target: str | None,
        attempts: int,
        retried: tuple[str, ...],
        fallback: str | None,
        cost: float,
    ) -> tuple[str, str]:
        """Return two parts of a line: from the status to the detail, and from there to the name `remaining`."""
        first = {"status": status, "reason": reason}
        origin = {"source": source, "route": route, "upstream": upstream, "target": target}
        rest = {"attempts": attempts, "retry_reasons": retried, "fallback": fallback, "cost": cost}
        before, after = f',{_encode(first)[1:-1]},"detail":', f',{_encode(origin | rest)[1:-1]},"remaining":'
        return self._redact(before), self._redact(after)

    def _decision(self, exchange: Exchange, decision: Decision) -> str:
        """Return the members by which the decision can be repeated: time, number, limits, and changes of its cost."""
        charges = exchange.charges
        names = (charges[0].quota.name,) if len(charges) == 1 else tuple([charge.quota.name for charge in charges])
        if not decision.quota.rate:  # a concurrency limit has refused the request, and nothing was charged
            names = ()
        cost, rest = exchange.cost, ""
        # Of a decision about a calendar period; other decisions have no such attribute.
        wall_us = getattr(decision, "wall_us", None) if len(charges) > 1 else None
        if exchange.settlements:
            rest = f',"settlements":[{",".join(map(self._settlement, exchange.settlements))}]'
            first = exchange.settlements[0]
            cost, decision = first.charged, first.decision
            rest = f',"remaining":{decision.remaining}{rest}'
            wall_us = getattr(decision, "wall_us", None)
        if wall_us is not None:
            rest = f',"wall_us":{wall_us}{rest}'
        at_ns = decision.at_ns if decision.source == "store" else decision.at_ns + self._epoch_ns
        return (
            f'{{"at_ns":{at_ns},"number":{exchange.number}'
            f'{self._limits(names, decision.quota.name, decision.source)},"wait_ns":{decision.wait_ns}'
            f',"cost":{_decimal(cost)}{rest}}}'
        )

    def _limits_of(self, charged: tuple[str, ...], limit: str, source: str) -> str:
        """Return the members that name the process, the limits charged, and the one that the decision is about."""
        members = {"source": source, "limits": charged, "limit": limit}
        return self._redact(f"{self._process},{_encode(members)[1:-1]}")

    def _settlement(self, settlement: Settlement) -> str:
        at_ns = self._numbers.since_epoch(settlement.at_ns)
        return f'{{"at_ns":{at_ns},"number":{settlement.number},"cost":{settlement.cost}}}'

    def _check(self, number: int, decision: Decision) -> str:
        """Return the member about the charge of the address for the verification of a credential."""
        at_ns = self._numbers.time_of(decision)
        members = f'"at_ns":{at_ns},"number":{number}{self._process},"source":"{decision.source}"'
        return f',"credential_check":{{{members}}}'

    def _set_timestamp(self, now: float) -> None:
        """Render the time in ISO 8601 with milliseconds; `datetime` renders a new second only."""
        second = int(now)
        microsecond = round((now - second) * _MICROSECONDS)  # as `datetime.fromtimestamp` rounds
        if microsecond == _MICROSECONDS:
            second, microsecond = second + 1, 0
        millisecond = microsecond // 1000
        self._timestamp = f"{_second(second)}.{millisecond:03d}+00:00"
        # Without the last microsecond, a part of which is rounded up.
        self._from, self._until = now, second + (millisecond * 1000 + 999) / _MICROSECONDS


def _trimmed(decimals: str) -> str:
    """Return a number with three decimals without trailing zeros but one: as `repr` after `round`."""
    text = decimals.rstrip("0")
    return f"{text}0" if text[-1] == "." else text


@lru_cache(maxsize=2)
def _second(second: int) -> str:
    """Return a whole second since 1970 in ISO 8601, without its offset from UTC."""
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds").removesuffix("+00:00")


@lru_cache(maxsize=_REMEMBERED)
def _decimal(number: float) -> str:
    """Return a number as Python writes it, for which it takes longer than for all numbers of a line together."""
    return repr(number)
