"""One JSON line for each exchange, written from its record alone."""

import json
import sys
from datetime import UTC, datetime
from typing import TextIO

from api_gateway.models import Clock, Exchange


class AccessLog:
    """Writes to `stream` (standard output). The client's id and the path are data, so they are JSON-escaped."""

    def __init__(self, wall_clock: Clock, stream: TextIO | None = None) -> None:
        self._wall_clock = wall_clock
        self._stream = stream or sys.stdout

    def write(self, exchange: Exchange) -> None:
        """Write the line of one finished exchange."""
        client, decision = exchange.client, exchange.decision
        line = {
            "time": datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.id,
            "peer": exchange.peer,
            "client": client.id if client else None,
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
            "retried": exchange.retried,
            "fallback": exchange.fallback,
            "cost": exchange.cost,
            "remaining": decision.remaining if decision else None,
            "bytes_in": exchange.bytes_in,
            "bytes_out": exchange.bytes_out,
            "duration_ms": round(exchange.duration * 1000, 3),
            "upstream_ms": None if exchange.upstream_duration is None else round(exchange.upstream_duration * 1000, 3),
        }
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()
