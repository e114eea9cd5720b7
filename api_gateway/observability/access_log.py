"""The access log: one JSON line for each exchange."""

import json
from collections.abc import Callable
from datetime import UTC, datetime

from api_gateway.models import Clock, Exchange

_encode = json.JSONEncoder(separators=(",", ":")).encode


class AccessLog:
    """Passes each line to `write_line`, which must not block. Client id and path are JSON-escaped."""

    def __init__(self, wall_clock: Clock, write_line: Callable[[str], object]) -> None:
        self._wall_clock = wall_clock
        self._write_line = write_line

    def write(self, exchange: Exchange) -> None:
        """Write the line of one finished exchange."""
        client, decision = exchange.client, exchange.decision
        line = {
            "time": datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.id,
            "client_address": exchange.peer,
            "client_id": client.id if client else None,
            "tier": client.quota.name if client else None,
            "method": exchange.method,
            "path": exchange.path,
            "status": exchange.status,
            "reason": exchange.reason,
            "detail": exchange.detail,
            "source": exchange.source,
            "route": exchange.route,
            "upstream": exchange.upstream,
            "target": exchange.target,
            "attempts": exchange.attempts,
            "retry_reasons": exchange.retried,
            "fallback": exchange.fallback,
            "cost": exchange.cost,
            "remaining": decision.remaining if decision else None,
            "bytes_received": exchange.bytes_in,
            "bytes_sent": exchange.bytes_out,
            "duration_ms": round(exchange.duration * 1000, 3),
            "upstream_duration_ms": None
            if exchange.upstream_duration is None
            else round(exchange.upstream_duration * 1000, 3),
        }
        self._write_line(f"{_encode(line)}\n")
