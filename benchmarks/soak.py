"""Mixed load for hours, to detect growing resources: `python -m benchmarks.soak --minutes 60`.

About 150 clients per second of all kinds: plain requests, uploads, streams, WebSockets, clients that disconnect early,
a rate-limited one, some with new header values, and some that use an upstream which is unavailable for a quarter of
the time. Meanwhile the gateway's memory, descriptors, threads, tasks, requests in flight and metric series are
sampled. After a warm-up a line is fitted to each series (Theil-Sen: the median of the slopes between all pairs); one
that rises by more than `ALLOWED` over the run is not flat. After the last client, nothing may be in flight, and no
more descriptors may be open than before the first. The exit code is 1 if a series is not flat or a response was
unexpected. A run of a few minutes detects leftovers but not growing memory, which is stable only after five minutes.
Linux only.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from api_gateway.admin.operator_token import token_file
from benchmarks.peers import GATEWAY
from benchmarks.processes import free_port, resident_bytes, running
from benchmarks.target import steady_port
from benchmarks.visitors import LIMIT, Clients, come_and_go, serve

ALLOWED: Mapping[str, float] = {
    "memory, MB": 3.0,
    "descriptors": 5,
    "threads": 1,
    "tasks": 5,
    "in flight": 3,
    "series": 5,
}
WARM_UP = 0.25  # share of the time, and
LEAST_WARM_UP = 300.0  # seconds, at most half of the time: then caches and five minutes of metrics are full
NOTES = 600
POINTS = 120  # samples for the line
CALM = 4.0  # seconds after the last client
IDLE = 1.0  # seconds that an idle connection to an upstream is kept
_MB = 2**20


# The notes


@dataclass
class Notes:
    """Samples of the gateway, with their times."""

    times: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ALLOWED})

    def add(self, now: float, found: Mapping[str, float]) -> None:
        """Add a sample."""
        self.times.append(now)
        for name, value in found.items():
            self.values[name].append(value)

    def since(self, start: float) -> "Notes":
        """Return the samples from `start` on."""
        first = next((number for number, at in enumerate(self.times) if at >= start), len(self.times))
        return Notes(self.times[first:], {name: values[first:] for name, values in self.values.items()})


def rise(times: Sequence[float], values: Sequence[float]) -> float:
    """Return the rise of the fitted line from the first to the last sample (Theil-Sen)."""
    step = max(1, len(times) // POINTS)
    points = list(zip(times[::step], values[::step], strict=True))
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2) if t > s]
    return statistics.median(slopes) * (times[-1] - times[0]) if slopes else 0.0


async def look(pid: int, port: int, token: str) -> dict[str, float]:
    """Return a sample of the gateway's resources."""
    text = await _get(port, "/metrics?format=prometheus", token)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    values = dict(line.rsplit(" ", 1) for line in lines)
    return {
        "memory, MB": resident_bytes(pid) / _MB,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - only counted
        "threads": len(os.listdir(f"/proc/{pid}/task")),  # noqa: PTH208 - as above
        "tasks": float(values["gateway_event_loop_tasks"]),
        "in flight": float(values["gateway_http_requests_in_flight"]),
        "series": len(lines),
    }


async def _get(port: int, path: str, token: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nConnection: close"
    writer.write(f"GET {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
    try:
        return (await reader.read(-1)).decode().partition("\r\n\r\n")[2]
    finally:
        writer.transport.abort()


# Running


@contextmanager
def gateway(folder: Path, upstream: int, away: int) -> Iterator[tuple[int, int]]:
    """Run a gateway; yield its process id and port."""
    port = free_port()
    sections = {
        "server": {"port": port},
        "state_dir": str(folder / "state"),
        "log": {"access": False, "level": "error"},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 100_000, "capacity": 1_000_000}, "SMALL": {"rate": 1, "capacity": 10}},
        "clients": {"limited": {"tier": "SMALL"}},
        "upstreams": {
            name: {
                "targets": [{"url": f"http://127.0.0.1:{there}"}],
                "pool": {"idle_timeout": IDLE},
                "circuit_breaker": {"recovery_timeout": 2},
            }
            for name, there in (("up", upstream), ("away", away))
        },
        "routes": [
            {"name": "all", "path": "/api", "upstream": "up"},
            {"name": "away", "path": "/api/away", "upstream": "away"},
        ],
    }
    file = folder / "gateway.yaml"
    file.write_text(json.dumps(sections))
    command = [sys.executable, str(GATEWAY), "--config", str(file)]
    core = min(os.sched_getaffinity(0))
    with running(command, core=core, port=port, folder=folder) as pid:
        yield pid, port


@dataclass
class SoakResult:
    """Results of a soak."""

    notes: Notes
    before: Mapping[str, float]
    after: Mapping[str, float]
    clients: Clients

    def problems(self) -> list[str]:
        """Return a description of each problem."""
        found = [
            f"{name} rises by {risen:.2f}, {allowed:g} are allowed"
            for name, allowed in ALLOWED.items()
            if (risen := rise(self.notes.times, self.notes.values[name])) > allowed
        ]
        if self.after["in flight"]:
            found.append(f"{self.after['in flight']:g} requests are in flight after the last client")
        if self.after["descriptors"] > self.before["descriptors"]:
            found.append(f"{self.after['descriptors'] - self.before['descriptors']:g} descriptors are left open")
        return found + [f"{times} times {what}" for what, times in self.clients.unexpected.items()]

    def report(self) -> str:
        """Return the tables."""
        rows = ["| | before | least | most | rises by | allowed | after |", "|---|---:|---:|---:|---:|---:|---:|"]
        for name, allowed in ALLOWED.items():
            values = self.notes.values[name]
            cells = [self.before[name], min(values), max(values), rise(self.notes.times, values), allowed]
            rows.append(f"| {name} | {' | '.join(f'{cell:.4g}' for cell in (*cells, self.after[name]))} |")
        rows += ["", "| clients | responses by status |", "|---|---|"]
        for kind in dict.fromkeys(kind for kind, _ in self.clients.seen):
            answers = [
                f"{status or 'none'}: {times:,}"
                for (one, status), times in sorted(self.clients.seen.items())
                if one == kind
            ]
            rows.append(f"| {kind} | {', '.join(answers)} |")
        return "\n".join(rows) + "\n"


async def soak(seconds: float, folder: Path) -> SoakResult:
    """Run gateway, upstreams and clients for `seconds`."""
    loop = asyncio.get_running_loop()
    upstream = await asyncio.start_server(serve, "127.0.0.1", 0, limit=LIMIT, backlog=1024)
    away = steady_port()
    going = asyncio.ensure_future(come_and_go(away))
    started = gateway(folder, upstream.sockets[0].getsockname()[1], away)
    pid, port = await loop.run_in_executor(None, started.__enter__)
    try:
        token = token_file(folder / "state").read_text().strip()
        await look(pid, port, token)
        before = await look(pid, port, token)
        clients, notes, began = Clients(port), Notes(), time.monotonic()
        end = began + seconds
        coming = [asyncio.ensure_future(clients.come(visit, rate, end)) for visit, rate in clients.rates().items()]
        while time.monotonic() < end:
            await asyncio.sleep(max(1.0, seconds / NOTES))
            notes.add(time.monotonic(), await look(pid, port, token))
        await asyncio.gather(*coming)
        clients.go()
        await asyncio.sleep(CALM)
        after = await look(pid, port, token)
    finally:
        going.cancel()
        upstream.close()
        await loop.run_in_executor(None, started.__exit__, None, None, None)
    warm = max(seconds * WARM_UP, min(LEAST_WARM_UP, seconds / 2))
    return SoakResult(notes.since(began + warm), before, after, clients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the results, and return 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        verdict = asyncio.run(soak(options.minutes * 60, Path(folder)))
    problems = verdict.problems()
    sys.stdout.write(verdict.report())
    sys.stdout.write("\n" + ("\n".join(f"Not flat: {problem}" for problem in problems) or "Flat.") + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the gateway is stopped then too
    raise SystemExit(main())
