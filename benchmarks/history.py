"""The cost of the history of requests: CPU time of one record, in process, alternating with the loop without it.

    python -m benchmarks.history [--records 200000] [--rounds 5]

It prints minimum and median over the rounds of the time of a record, in nanoseconds and full rings: of a plain
successful request, of one with a new header set, of a refusal, and of a request for which there is no place. Then the
bytes that full rings take.
"""

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

from api_gateway.models import Charge, Client, Decision, Exchange, Quota
from api_gateway.observability.request_history import HistoryLimits, RequestHistory

LIMITS = HistoryLimits(successes=5_000, refusals=2_000, errors=2_000, max_bytes=16_777_216, max_age=3600)
CLIENTS = 200
KINDS = ("plain request", "new header set", "refusal", "no place")
QUOTA = Quota.per_second("FREE", 100, 1000)


def exchange_of(number: int, charges: list[list[Charge]], *, is_refused: bool) -> Exchange:
    """Return an ended exchange, as the fast path leaves it."""
    which = number % CLIENTS
    exchange = Exchange(f"{number:032x}", "GET", f"/api/users/{number % 97}", "127.0.0.1", number / 1000)
    charge = charges[which][0]
    exchange.client = Client(f"client-{which}", charge.key, QUOTA, "default")
    exchange.route, exchange.cost, exchange.charges = "users", 1.0, charges[which]
    at_ns = number * 1_000_000
    exchange.decision = Decision(charge.key, QUOTA, not is_refused, 500, 0, 5_000_000_000 + number, at_ns)
    if is_refused:
        exchange.status, exchange.reason, exchange.detail = 429, "rate_limited", "Client 'c' has no token left."
    else:
        exchange.upstream, exchange.target, exchange.attempts = "people", "http://10.0.0.1:8080", 1
        exchange.sent_at = exchange.head_at = number / 1000
        exchange.status, exchange.source, exchange.bytes_out = 200, "upstream", 300
    exchange.finished = number / 1000 + 0.01
    return exchange


def charges_of_clients() -> list[list[Charge]]:
    """Return the charges of each client."""
    return [[Charge(f"client:client-{one}", QUOTA, QUOTA.cost_ns(1))] for one in range(CLIENTS)]


def seconds(record: Callable[[Exchange, float], None], first: int, count: int, kind: str) -> float:
    """Return the CPU time of making and recording exchanges."""
    charges = charges_of_clients()
    began = time.process_time()
    for number in range(first, first + count):
        if kind == "new header set":
            charges[number % CLIENTS] = charges[number % CLIENTS].copy()
        record(exchange_of(number, charges, is_refused=kind == "refusal"), 1.8e9 + number / 1000)
    return time.process_time() - began


def _record_if_taken(history: RequestHistory, exchange: Exchange, now: float) -> None:
    """Record an exchange if the history has a place for it, which at this rate it has for one in a hundred."""
    if history.takes(exchange):
        history.record(exchange, now)


def nothing(_exchange: Exchange, _now: float) -> None:
    """Record nothing."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for kind in KINDS:
        history = RequestHistory(LIMITS)
        record = partial(_record_if_taken, history) if kind == "no place" else history.record
        seconds(record, 0, 20_000, kind)
        costs, first = [], 20_000
        for _ in range(options.rounds):
            gc.collect()
            without = seconds(nothing, first, options.records, kind)
            costs.append((seconds(record, first, options.records, kind) - without) / options.records * 1e9)
            first += options.records
        print(f"{kind}: {min(costs):.0f} ns, median {sorted(costs)[len(costs) // 2]:.0f} ns")  # noqa: T201
    tracemalloc.start()
    history = RequestHistory(LIMITS)
    before, _ = tracemalloc.get_traced_memory()
    seconds(history.record, 0, 6_000, KINDS[0])
    seconds(history.record, 6_000, 6_000, KINDS[2])
    after, _ = tracemalloc.get_traced_memory()
    sizes = history.sizes().values()
    count, stated = sum(count for count, _ in sizes), sum(size for _, size in sizes)
    print(f"{count} records: {after - before} bytes, stated {stated}")  # noqa: T201


if __name__ == "__main__":
    main()
