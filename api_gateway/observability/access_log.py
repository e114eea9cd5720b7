"""The access log: one JSON line for each exchange."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from json.encoder import encode_basestring_ascii as quoted

from api_gateway.models import Clock, Exchange

_MICROSECONDS = 1_000_000
_encode = json.JSONEncoder(separators=(",", ":")).encode


class AccessLog:
    """Passes each line to `write_line`, which must not block.

    A line is one formatting operation, as the general encoder costs several times as much; only text is JSON-escaped,
    which includes ids, paths and details. The values of an exchange are finite numbers.
    """

    def __init__(self, wall_clock: Clock, write_line: Callable[[str], object]) -> None:
        self._wall_clock = wall_clock
        self._write_line = write_line

    def write(self, exchange: Exchange) -> None:
        """Write the line of one finished exchange."""
        client, decision, reason, detail = exchange.client, exchange.decision, exchange.reason, exchange.detail
        client_id, tier = ("null", "null") if client is None else (quoted(client.id), quoted(client.quota.name))
        sent_at, head_at = exchange.sent_at, exchange.head_at
        self._write_line(
            f'{{"time":"{_timestamp(self._wall_clock())}","request_id":{quoted(exchange.id)}'
            f',"client_address":{quoted(exchange.peer)},"client_id":{client_id},"tier":{tier}'
            f',"method":{quoted(exchange.method)},"path":{quoted(exchange.path)},"status":{exchange.status}'
            f',"reason":{"null" if reason is None else quoted(reason)}'
            f',"detail":{"null" if detail is None else quoted(detail)}'
            f"{_origin(exchange.source, exchange.route, exchange.upstream, exchange.target)}"
            f',"attempts":{exchange.attempts}'
            f',"retry_reasons":{_encode(exchange.retried) if exchange.retried else "[]"}'
            f',"fallback":{"null" if exchange.fallback is None else quoted(exchange.fallback)}'
            f',"cost":{exchange.cost},"remaining":{"null" if decision is None else decision.remaining}'
            f',"bytes_received":{exchange.bytes_in},"bytes_sent":{exchange.bytes_out}'
            f',"duration_ms":{_milliseconds(exchange.finished - exchange.started)},"upstream_duration_ms":'
            f"{'null' if sent_at is None or head_at is None else _milliseconds(head_at - sent_at)}}}\n"
        )


def _milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with at most three decimals, of which at least one: as `repr` after `round`."""
    text = f"{seconds * 1000:.3f}"
    if text[-1] == "0":
        text = text.rstrip("0")
        return f"{text}0" if text[-1] == "." else text
    return text


def _timestamp(now: float) -> str:
    """Return the time in ISO 8601 with milliseconds; `datetime` renders a new second only."""
    second = int(now)
    microsecond = round((now - second) * _MICROSECONDS)  # as `datetime.fromtimestamp` rounds
    if microsecond == _MICROSECONDS:
        second, microsecond = second + 1, 0
    return f"{_second(second)}.{microsecond // 1000:03d}+00:00"


@lru_cache(maxsize=2)
def _second(second: int) -> str:
    """Return a whole second since 1970 in ISO 8601, without its offset from UTC."""
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds").removesuffix("+00:00")


@lru_cache(maxsize=1024)
def _origin(source: str, route: str | None, upstream: str | None, target: str | None) -> str:
    """Return the members that say where the response comes from, which are few for a configuration."""
    members = {"source": source, "route": route, "upstream": upstream, "target": target}
    return f",{_encode(members)[1:-1]}"
