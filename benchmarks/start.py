"""What a start takes: CPU time and memory until the first response, as ratios to the import of the required packages.

`python -m benchmarks.start` starts each in turn, `--rounds` times, and prints the least CPU time, which other programs
disturb least, and the median of the resident memory. Wall time is not measured.
"""

import argparse
import http.client
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.processes import cpu_seconds, family, free_port, resident_bytes, running

ROOT = Path(__file__).parents[1]
FRAMEWORK = "fastapi, uvicorn, httpx, pydantic, pydantic_settings"
REQUIRED = f"{FRAMEWORK}, uvloop, httptools, yaml, prometheus_client, redis.asyncio"
UPSTREAM = '{"up": {"targets": [{"url": "http://127.0.0.1:9"}]}}'  # nothing listens there
ROUTE = '[{"name": "all", "path": "/api", "upstream": "up"}]'
VIEWS = ("/metrics", "/health", "/circuit-breakers", "/clients", "/limits", "/openapi.json")
CORE = 0
WORKERS = 2
_TRIES = 600  # to get the first response, 50 ms apart


class Figures(NamedTuple):
    """CPU seconds and resident bytes of a process and its descendants."""

    cpu: float
    memory: float

    @classmethod
    def of(cls, pid: int) -> "Figures":
        """Read those of a running process."""
        return cls(cpu_seconds(pid), resident_bytes(pid))


def import_figures(packages: str) -> Figures:
    """Return what it takes to import packages."""
    code = f"import {packages}; print(flush=True); input()"
    with subprocess.Popen(  # noqa: S603 - fixed arguments
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: S101, PT018 - both are pipes
        process.stdout.readline()
        found = Figures.of(process.pid)
        process.stdin.write(b"\n")
        process.stdin.close()
    return found


@contextmanager
def started(*options: str, is_demo: bool = False) -> Iterator[tuple[int, int]]:
    """Start a gateway that has served its first request; yield process id and port."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        env = {"GATEWAY_STATE_DIR": folder, "PYTHONPATH": str(ROOT)}
        if not is_demo:
            env |= {"GATEWAY_UPSTREAMS": UPSTREAM, "GATEWAY_ROUTES": ROUTE}
        command = [sys.executable, "-m", "api_gateway", "--port", str(port), *options]
        with running(command, core=CORE, port=port, folder=Path(folder), env=env) as pid:
            ask(port, "/api/users", 200 if is_demo else 502)
            while "Listening on" not in (Path(folder) / "output.log").read_text():  # not all workers are ready
                time.sleep(0.05)
            yield pid, port


def ask(port: int, path: str, status: int = 200) -> None:
    """Request a path until the response has this status. Raises RuntimeError."""
    for _ in range(_TRIES):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        found = connection.getresponse()
        found.read()
        connection.close()
        if found.status == status:
            return
        time.sleep(0.05)
    raise RuntimeError(f"{path} returned {found.status}, not {status}")


def start_figures(*options: str, is_demo: bool = False) -> Figures:
    """Return what a start takes, up to the first response."""
    with started(*options, is_demo=is_demo) as (pid, _):
        return Figures.of(pid)


def view_figures(*paths: str) -> Figures:
    """Return what a start takes with the first request of some operator endpoints."""
    with started() as (pid, port):
        for path in paths:
            ask(port, path)
        return Figures.of(pid)


def worker_figures() -> Figures:
    """Return what one of several workers takes: the mean of all, without the supervisor and its store."""
    with started("--workers", str(WORKERS)) as (pid, _):
        all_of_them, store = Figures.of(pid), _own(pid)
        return Figures((all_of_them.cpu - store.cpu) / WORKERS, (all_of_them.memory - store.memory) / WORKERS)


def _own(pid: int) -> Figures:
    """Return the figures of a supervisor and the store that it has started."""
    ticks = os.sysconf("SC_CLK_TCK")
    cpu = memory = 0.0
    for one in family(pid):
        command = Path(f"/proc/{one}/cmdline").read_bytes()
        if b"api_gateway.process.worker" not in command:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / ticks
            memory += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return Figures(cpu, memory)


MEASURED: dict[str, Callable[[], Figures]] = {
    "import of all required packages": lambda: import_figures(REQUIRED),
    "import of fastapi, uvicorn, httpx, pydantic and pydantic-settings": lambda: import_figures(FRAMEWORK),
    "gateway with one upstream": start_figures,
    "gateway with the demo services": lambda: start_figures(is_demo=True),
    "the gateway with one upstream, and the first `/metrics`": lambda: view_figures(VIEWS[0]),
    "the gateway with one upstream, and the first of all operator views": lambda: view_figures(*VIEWS),
    f"each of {WORKERS} workers": worker_figures,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.start")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    found: dict[str, list[Figures]] = {title: [] for title in MEASURED}
    for _ in range(options.rounds):
        for title, measure in MEASURED.items():
            found[title].append(measure())
    rows = {
        title: Figures(min(one.cpu for one in each), median(one.memory for one in each))
        for title, each in found.items()
    }
    base = next(iter(rows.values()))
    print("| | CPU time, s | ratio | memory, MB | ratio |\n|---|---:|---:|---:|---:|")  # noqa: T201 - a program
    for title, (cpu, memory) in rows.items():
        print(f"| {title} | {cpu:.2f} | {cpu / base.cpu:.2f} | {memory / 1e6:.0f} | {memory / base.memory:.2f} |")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
