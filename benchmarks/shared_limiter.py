"""The limiter with a shared store: decisions per second, and the effect on the CPU time of the whole gateway.

`python -m benchmarks.shared_limiter` starts a store. First, 64 concurrent callers request decisions of the gateway's
limiter, of throttled-py and of limits (`pip install throttled-py limits`; the latter with redis-py), in turn with the
same store. Then the whole gateway is measured as in `benchmarks.compare`, alternately with buckets in memory and in
the store, and with one worker and two (these need nginx and wrk on the PATH).
"""

import argparse
import asyncio
import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.models import Charge, Decision, Quota
from api_gateway.storage.redis_session import StoreSession
from benchmarks import load
from benchmarks.processes import cpu_seconds, family, free_port, pinned, running, store_command
from benchmarks.upstream import upstream

ROOT = Path(__file__).parent.parent
CALLERS = 64
TOKENS, SECONDS = 1_000_000, 3600  # a quota that is neither used up nor expires during the measurement

Decide = Callable[[str], Awaitable[bool]]


@contextmanager
def store() -> Iterator[str]:
    """Run a store on core 1; yield its URL."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(store_command(port), core=1, port=port, folder=Path(folder)),
    ):
        yield f"redis://127.0.0.1:{port}/0"


async def ours(url: str) -> Decide:
    """Return the decision function of the gateway's limiter."""
    quota = Quota.per_second("all", TOKENS / SECONDS, TOKENS)
    limiter = RedisLimiter(
        StoreSession(url, timeout=1),
        [quota],
        policy="deny",
        deadline=1.0,
        processes=1,
        bucket_limit=1_000_000,
        prefix="benchmark",
        clock=time.monotonic,
        clock_ns=time.monotonic_ns,
        source=random.Random(1),  # noqa: S311 - names a process
    )
    await limiter.start()
    cost_ns, loop = quota.cost_ns(1), asyncio.get_running_loop()

    async def decide(client: str) -> bool:
        charges, now_ns = [Charge(client, quota, cost_ns)], time.monotonic_ns()
        decision = limiter.decide(charges, now_ns)
        if decision is None:
            answer: asyncio.Future[Decision] = loop.create_future()
            limiter.decide_async(charges, now_ns, answer.set_result)
            decision = await answer
        return decision.allowed

    return decide


async def throttled_py(url: str) -> Decide:
    """Return the decision function of throttled-py's GCRA."""
    throttled = importlib.import_module("throttled.asyncio")
    quota = throttled.rate_limiter.per_hour(TOKENS, burst=TOKENS)
    limiter = throttled.Throttled(using="gcra", quota=quota, store=throttled.RedisStore(server=url))

    async def decide(client: str) -> bool:
        return not (await limiter.limit(client)).limited

    return decide


async def limits(url: str) -> Decide:
    """Return the decision function of the sliding window counter of limits."""
    item = importlib.import_module("limits").RateLimitItemPerHour(TOKENS)
    storage = importlib.import_module("limits.aio.storage").RedisStorage(f"async+{url}", implementation="redispy")
    limiter = importlib.import_module("limits.aio.strategies").SlidingWindowCounterRateLimiter(storage)

    async def decide(client: str) -> bool:
        return bool(await limiter.hit(item, client))

    return decide


CONTESTANTS: dict[str, Callable[[str], Awaitable[Decide]]] = {
    "this gateway, RedisLimiter": ours,
    "throttled-py, GCRA": throttled_py,
    "limits, sliding window counter": limits,
}


async def decisions_a_second(name: str, url: str, seconds: float) -> tuple[float, float]:
    """Return decisions per second of 64 callers, each a different client, and CPU µs of this process per decision.

    Raises RuntimeError if one is refused, because a refusal takes a different time.
    """
    decide = await CONTESTANTS[name](url)
    await decide("first")
    count, end = 0, time.perf_counter() + seconds

    async def call(client: str) -> None:
        nonlocal count
        while time.perf_counter() < end:
            if not await decide(client):
                raise RuntimeError(f"{client} was refused")
            count += 1

    before = time.process_time()
    async with asyncio.TaskGroup() as group:
        for number in range(CALLERS):
            group.create_task(call(f"client-{number}"))
    return count / seconds, (time.process_time() - before) / count * 1e6


def run_contestant(name: str, url: str, seconds: float) -> tuple[float, float]:
    """Measure one limiter in a new process, on core 0 and with uvloop, as the gateway runs."""
    command = [sys.executable, "-m", "benchmarks.shared_limiter", "--contestant", name, url, str(seconds)]
    with pinned(0):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603
    if done.returncode:
        raise ModuleNotFoundError(done.stderr.strip().rpartition("\n")[2])
    rate, cpu = json.loads(done.stdout)
    return rate, cpu


def compare_decisions(rounds: int, seconds: float) -> Iterator[str]:
    """Yield the lines of a table of decisions per second."""
    found: dict[str, list[tuple[float, float]]] = {}
    with store() as url:
        for _ in range(rounds):
            for name in CONTESTANTS:
                try:
                    found.setdefault(name, []).append(run_contestant(name, url, seconds))
                except ModuleNotFoundError as missing:
                    sys.stderr.write(f"{name} is skipped: {missing}\n")
    yield "| 64 callers, one store | decisions/s | least to most | CPU µs/decision |"
    yield "|---|---:|---:|---:|"
    for name, figures in found.items():
        if figures:
            rates, cpus = zip(*figures, strict=True)
            spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
            yield f"| {name} | {statistics.median(rates):,.0f} | {spread} | {statistics.median(cpus):.1f} |"


def configuration(folder: Path, port: int, origin: int, url: str, workers: int) -> list[str]:
    """Write a gateway's configuration and return the command that runs it."""
    sections = {
        "server": {"port": port, "workers": workers},
        "store": {"url": url},
        "state_dir": str(folder / "state"),
        "log": {"access": False},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000_000}},
        "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{origin}"}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    file = folder / "gateway.yaml"
    file.write_text(json.dumps(sections))
    return [sys.executable, str(ROOT / "run_gateway.py"), "--config", str(file)]


@contextmanager
def gateway(origin: int, url: str, workers: int, core: int) -> Iterator[tuple[int, int]]:
    """Run a gateway; yield its port and process id."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = configuration(folder, port, origin, url, workers)
        with running(command, core=core, port=port, folder=folder) as pid:
            load.await_ready(port)
            yield port, pid


def compare_stores(rounds: int, seconds: float) -> Iterator[str]:
    """Yield the lines of a table: CPU per request of the whole gateway by the location of its buckets."""
    found: dict[str, list[float]] = {"memory": [], "store": []}
    with tempfile.TemporaryDirectory() as folder, upstream(Path(folder), 1) as origin, store() as url:
        for _ in range(rounds):
            for name, place in (("memory", "memory://"), ("store", url)):
                with gateway(origin, place, 1, 0) as (port, pid):
                    load.drive(port, "small", core=1, seconds=1, connections=64)
                    before = cpu_seconds(pid)
                    driven = load.drive(port, "small", core=1, seconds=seconds, connections=64)
                    found[name].append((cpu_seconds(pid) - before) / driven.requests * 1e6)
    medians = {name: statistics.median(values) for name, values in found.items()}
    yield "| whole gateway, buckets in | CPU µs/request | least to most | ratio |"
    yield "|---|---:|---:|---:|"
    for name, values in found.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        yield f"| {name} | {medians[name]:.1f} | {spread} | {medians[name] / medians['memory']:.2f} |"


def compare_workers(rounds: int, seconds: float) -> Iterator[str]:
    """Yield the lines of a table: requests per second of one worker and of two, without pinning.

    Upstream, load and store need cores too, so the result is meaningful only with more than two cores.
    """
    found: dict[int, list[float]] = {1: [], 2: []}
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, upstream(Path(folder), cores - 1) as origin:
        for _ in range(rounds):
            for workers, rates in found.items():
                with gateway(origin, "memory://", workers, 0) as (port, pid):
                    for one in family(pid):
                        with suppress(ProcessLookupError):
                            os.sched_setaffinity(one, set(range(cores)))
                    load.drive(port, "small", core=cores - 1, seconds=1, connections=64)
                    driven = load.drive(port, "small", core=cores - 1, seconds=seconds, connections=64)
                    rates.append(driven.requests / seconds)
    medians = {number: statistics.median(values) for number, values in found.items()}
    yield f"| workers, on {cores} cores | requests/s | least to most | ratio |"
    yield "|---|---:|---:|---:|"
    for number, values in found.items():
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        yield f"| {number} | {medians[number]:,.0f} | {spread} | {medians[number] / medians[1]:.2f} |"


def _contestant(name: str, url: str, seconds: str) -> None:
    figures: Any = importlib.import_module("uvloop").run(decisions_a_second(name, url, float(seconds)))
    sys.stdout.write(json.dumps(figures))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_limiter", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="(default: %(default)s)")
    parser.add_argument("--contestant", nargs=3, metavar=("NAME", "URL", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.contestant:
        _contestant(*options.contestant)
        return 0
    tables = [compare_decisions(options.rounds, options.seconds)]
    if shutil.which("nginx") and shutil.which("wrk"):
        tables += [compare_stores(options.rounds, options.seconds), compare_workers(options.rounds, options.seconds)]
    for table in tables:
        for line in table:
            sys.stdout.write(f"{line}\n")
        sys.stdout.write("\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
