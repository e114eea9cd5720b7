"""Lines a second of `api-gateway replay`, on a log that it writes: `python -m benchmarks.replay --lines 10000000`.

The log needs about 660 bytes a line, and the sorted events a quarter of that, in a temporary folder.
"""

import argparse
import random
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from api_gateway.config import from_values
from api_gateway.models import Charge, Client, Exchange, Quota
from api_gateway.observability.access_log import AccessLog
from api_gateway.observability.decision_numbers import DecisionNumbers
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.replay.log_replay import replay_logs

TIERS = {"FREE": (1, 10), "BASIC": (5, 50), "PREMIUM": (20, 200)}
IN_PROGRESS = 200  # requests at the same time, which end in any order
ENDED_AT = 1_700_000_000.0  # seconds since the epoch, of all requests
GAP_NS = 2_000_000  # the longest time between two requests
UP = {"upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:1"}]}}}


def write_log(path: Path, lines: int, clients: int) -> None:
    """Write a log whose decisions a real limiter has made; a few clients send most requests."""
    rng = random.Random(1)  # noqa: S311 - not used for security
    quotas = [Quota.per_second(name, *limit) for name, limit in TIERS.items()]
    limiter = MemoryLimiter(quotas)
    known = [
        Client(f"client-{index}", f"client:client-{index}", quotas[index % len(quotas)], "registered")
        for index in range(clients)
    ]
    numbers, now_ns = DecisionNumbers("1", lambda: 0, lambda: 1_700_000_000.0), 1_000_000_000
    open_ones: list[Exchange] = []
    with path.open("w") as file:
        log = AccessLog(numbers=numbers)
        for index in range(lines):
            now_ns += rng.randrange(1, GAP_NS)
            client = known[int(rng.random() ** 2 * clients)]
            address = f"192.0.2.{index % 250}"
            exchange = Exchange(f"{index:032x}", "GET", f"/api/up/{index % 1000}", address, now_ns / 1e9, client)
            exchange.route, exchange.upstream, exchange.target, exchange.cost = "up", "up", "http://127.0.0.1:1", 1.0
            exchange.charges = [Charge(client.key, client.quota, client.quota.cost_ns(1))]
            exchange.number = numbers.next()
            exchange.decision = limiter.decide(exchange.charges, now_ns)
            exchange.status, exchange.finished = 200, exchange.started + 1
            open_ones.append(exchange)
            if len(open_ones) > IN_PROGRESS:
                place = rng.randrange(IN_PROGRESS)
                open_ones[place], open_ones[-1] = open_ones[-1], open_ones[place]
                file.write(log.line(open_ones.pop(), ENDED_AT))
        file.writelines(log.line(exchange, ENDED_AT) for exchange in open_ones)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a log, replay it under two configurations, and print the rate and the largest memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=None)
    options = parser.parse_args(arguments)
    candidate, current = from_values({**UP, "tiers": {"BASIC": {"rate": 2, "capacity": 20}}}), from_values(UP)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "access.log"
        write_log(path, options.lines, options.clients)
        found = replay_logs([path], candidate, current, jobs=options.jobs, folder=Path(folder))
    agreement = found.tally.current_agreement
    usage = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    sys.stdout.write(
        f"{options.lines} lines of {options.clients} clients in {found.seconds:.1f} s:"
        f" {options.lines / found.seconds:,.0f} lines a second, deciding in {found.processes} processes;"
        f" {agreement.same} of {agreement.compared} decisions as in the log;"
        f" at most {usage[0]} MB, and {usage[1]} MB in each process\n"
    )


if __name__ == "__main__":
    main()
