"""The gateway with many routes, each to an upstream of its own, beside the gateway with one.

`python -m benchmarks.scale` runs both on one core, in turn with the load from the other, and prints for each the time
of its start, CPU per request, the size of a scrape with all series used, how long the scrape took, and the longest
time that a request to another endpoint took meanwhile. Requires Linux, two cores, nginx and wrk.
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.load import Failed, drive_case
from benchmarks.peers import GATEWAY
from benchmarks.processes import cpu_seconds, free_port, pinned, raise_file_limit, resident_bytes, running
from benchmarks.upstream import upstream

COUNT = 1000
WARM_UP = 2.0  # seconds
_CALM = 0.3  # seconds before each scrape
_TOKEN = secrets.token_hex(16)
_MB = 2**20
_LUA = """
local number = 0
request = function()
  number = number % {count} + 1
  return wrk.format("GET", string.format("/api/small/route-%04d/7", number))
end
"""


def configuration(count: int, folder: Path, port: int, origin: int, **settings: Any) -> dict[str, Any]:
    """Return a configuration with `count` routes to as many upstreams; `settings` are those of each upstream."""
    numbers = range(1, count + 1)
    return {
        "server": {"port": port},
        "state_dir": str(folder / "state"),
        "log": {"access": False},
        "admin": {"tokens": {"scale": {"role": "read", "token": _TOKEN}}},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000_000}},
        "upstreams": {
            f"upstream-{number:04d}": {"targets": [{"url": f"http://127.0.0.1:{origin}"}], **settings}
            for number in numbers
        },
        "routes": [
            {
                "name": f"route-{number:04d}",
                "path": f"/api/small/route-{number:04d}",
                "upstream": f"upstream-{number:04d}",
            }
            for number in numbers
        ],
    }


def as_yaml(value: Any, indent: str = "") -> str:
    """Return a configuration as people write it, in block style; text is quoted."""
    if isinstance(value, Mapping) and value:
        lines = (f"{indent}{name}:{_below(inner, indent)}" for name, inner in value.items())
        return "\n".join(lines)
    if isinstance(value, list) and value:
        return "\n".join(f"{indent}- {as_yaml(one, f'{indent}  ').lstrip()}" for one in value)
    return f"{indent}{json.dumps(value)}"


def _below(value: Any, indent: str) -> str:
    is_block = isinstance(value, Mapping | list) and bool(value)
    return f"\n{as_yaml(value, f'{indent}  ')}" if is_block else f" {json.dumps(value)}"


def case_of(count: int) -> Case:
    """Return the case: GET requests to all routes by turns."""
    return Case(f"{count} routes by turns", path="small/route-0001/7", lua=_LUA.format(count=count))


@dataclass
class Found:
    """Figures of the gateway with `count` routes: seconds, microseconds and bytes."""

    count: int
    start: float = 0.0
    memory: int = 0
    costs: list[float] = field(default_factory=list)  # CPU per request
    rates: list[float] = field(default_factory=list)
    scrape_bytes: int = 0
    scrape: float = 0.0
    longest: float = 0.0  # wait of another request during scrapes
    longest_before: float = 0.0  # the same without a scrape

    @property
    def cost(self) -> float:
        """The median of CPU per request."""
        return statistics.median(self.costs)


@contextmanager
def _gateway(found: Found, origin: int, core: int, settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Start the gateway; yield its process id and port."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        path = folder / "gateway.yaml"
        path.write_text(as_yaml(configuration(found.count, folder, port, origin, **settings)) + "\n")
        began = time.monotonic()
        command = [sys.executable, str(GATEWAY), "--config", str(path)]
        with running(command, core=core, port=port, folder=folder) as pid:
            found.start = time.monotonic() - began
            found.memory = resident_bytes(pid)
            yield pid, port


def _get(port: int, path: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {_TOKEN}"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def _longest_wait(port: int, until: threading.Event) -> float:
    """Request /healthz on one connection until the event is set; return the longest time of a response in seconds."""
    longest = 0.0
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        while not until.is_set():
            began = time.perf_counter()
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            longest = max(longest, time.perf_counter() - began)
            time.sleep(0.0005)
    return longest


def _scrape(port: int, found: Found, core: int, times: int = 5) -> None:
    """Scrape some times; the fastest scrape and the shortest of the longest waits count. Raises Failed."""
    scrapes: list[float] = []
    waits: list[float] = []
    calm: list[float] = []
    with pinned(core), ThreadPoolExecutor(1) as pool:
        for _ in range(times):
            with _waiting(pool, port, calm):
                time.sleep(_CALM)
            with _waiting(pool, port, waits):
                time.sleep(_CALM)
                began = time.perf_counter()
                status, body = _get(port, "/metrics?format=prometheus")
                scrapes.append(time.perf_counter() - began)
            if status != 200:  # noqa: PLR2004 - OK
                raise Failed(f"/metrics: status {status}: {body[:200]!r}")
    found.scrape_bytes, found.scrape = len(body), min(scrapes)
    found.longest, found.longest_before = min(waits), min(calm)


@contextmanager
def _waiting(pool: ThreadPoolExecutor, port: int, waits: list[float]) -> Iterator[None]:
    """Append the longest wait of other requests within this block."""
    done = threading.Event()
    waiting = pool.submit(_longest_wait, port, done)
    try:
        yield
    finally:
        done.set()
        waits.append(waiting.result())


def measure(
    counts: Sequence[int], *, rounds: int, seconds: float, settings: Mapping[str, Any], cores: Sequence[int]
) -> list[Found]:
    """Measure the gateway with each number of routes, in turns. Raises Failed."""
    results = [Found(count) for count in counts]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        origin = stack.enter_context(upstream(folder, cores[1]))
        started = [stack.enter_context(_gateway(found, origin, cores[0], settings)) for found in results]
        for number in range(rounds + 1):
            for found, (pid, port) in zip(results, started, strict=True):
                before = cpu_seconds(pid)
                driven = drive_case(
                    port,
                    case_of(found.count),
                    core=cores[1],
                    seconds=seconds if number else WARM_UP,
                    connections=64,
                )
                if number:
                    found.costs.append((cpu_seconds(pid) - before) / driven.requests * 1e6)
                    found.rates.append(driven.requests / driven.seconds)
        for found, (_, port) in zip(results, started, strict=True):
            _scrape(port, found, cores[1])
    return results


def table(results: Sequence[Found]) -> str:
    """Return the figures as a Markdown table, and the ratio of CPU per request to the first row."""
    columns = (
        *("routes", "start, s", "memory, MB", "requests/s", "CPU µs/request", "to one route"),
        *("scrape, KB", "scrape, ms", "longest wait meanwhile, ms", "without a scrape, ms"),
    )
    lines = [f"| {' | '.join(columns)} |", f"|{'---:|' * len(columns)}"]
    for found in results:
        ratios = [cost / first for cost, first in zip(found.costs, results[0].costs, strict=True)]
        cells = (
            f"{found.count:,}",
            f"{found.start:.2f}",
            f"{found.memory / _MB:,.0f}",
            f"{statistics.median(found.rates):,.0f}",
            f"{found.cost:,.1f}",
            f"{statistics.median(ratios):.2f}",
            f"{found.scrape_bytes / 1000:,.0f}",
            f"{found.scrape * 1e3:,.0f}",
            f"{found.longest * 1e3:.1f}",
            f"{found.longest_before * 1e3:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table. Return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--routes", type=int, default=COUNT, help="routes and upstreams (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of CPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a measurement (default: %(default)s)")
    parser.add_argument("--health-checks", action="store_true", help="check every upstream every five seconds")
    options = parser.parse_args(arguments)
    settings = {"health_check": {"path": "/api/small"}} if options.health_checks else {}
    raise_file_limit()
    try:
        results = measure(
            (1, options.routes),
            rounds=options.rounds,
            seconds=options.seconds,
            settings=settings,
            cores=sorted(os.sched_getaffinity(0))[:2],
        )
    except (Failed, RuntimeError) as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
