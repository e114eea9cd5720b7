"""The gateway with the additional path `/tables`, which returns the number of entries of each internal table.

`python -m benchmarks.tables <configuration>`. It accesses internals of the gateway, for measurements only.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from api_gateway.assembly.gateway import Gateway
from api_gateway.config import load_config
from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.metrics import Recorder
from api_gateway.process.message_log import configure_logging
from api_gateway.process.server import GatewayServer


def sizes(gateway: Gateway, fast_path: Any) -> dict[str, int]:
    """Return the number of entries of every table that clients can make grow."""
    clients: Any = gateway.clients
    limiter: Any = gateway.limiter
    keys = 0
    if isinstance(gateway.limiter, RedisLimiter):
        keys = limiter.store_key.cache_info().currsize
        tables = [*limiter.cache._current.values(), *limiter.cache._earlier.values(), limiter.fallback._debts.table]
        tables.append(limiter.fallback._limiter._table)
        refunds = [limiter.refunds.recent, limiter.fallback._limiter._refunds]
    else:
        tables, refunds = [limiter._table], [limiter._refunds]
    return {
        "buckets": len(limiter),
        "buckets to be freed": sum(len(part) for table in tables for part in table.retired),
        "refunds": sum(map(len, refunds)),
        "store keys": keys,
        "cached clients": len(clients._cache),
        "look-ups": len(clients._lookups._pending) + len(clients._lookups._late),
        "cached header sets": fast_path.headers._remembered.cache_info().currsize,
        "most frequent clients": len(gateway.recorder.requests_by_client) + len(gateway.recorder.limited_by_client),
        "metric series": series_of(gateway.recorder),
    }


def series_of(recorder: Recorder) -> int:
    """Return the number of labelled metric series."""
    counters = [value for value in vars(recorder).values() if isinstance(value, dict)]
    return sum(map(len, counters)) + sum(map(len, recorder.attempt_results.values()))


def main() -> int:
    """Run the gateway."""
    config = load_config(Path(sys.argv[1]))
    configure_logging(config.log)
    server = GatewayServer(config)
    app: Any = server._app
    app.add_api_route("/tables", lambda: sizes(app.state.gateway, app.fast_path.current))
    server.run()
    logging.shutdown()
    return 0 if server.started else 1


if __name__ == "__main__":
    raise SystemExit(main())
