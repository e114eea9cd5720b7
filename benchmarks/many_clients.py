"""The effect of a flood of invented client ids on clients within their limits, and on memory.

`python -m benchmarks.many_clients` runs one gateway on one core; upstream (nginx), store and load use the other. Two
clients stay within their limits: one of the ENTERPRISE tier sends 50 requests per second, one of FREE one every two
seconds, at fixed times independent of responses, and both at the start of each turn. At the same time a flood is sent
at a fixed rate, in short turns alternately from one known id and from new ids, each within its limits, so that only
the new ids make a difference. A quarter of the ids are sent in this manner, the others in one turn. Their address is
exempt from the address limit, so that they reach every table.
"""

import argparse
import asyncio
import http.client
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from api_gateway.clients.sqlite_store import CLIENTS_FILE, SqliteClientStore
from benchmarks.cases import CLIENT
from benchmarks.flood import Flooded, client_id
from benchmarks.load import Answer, Client, Failed, OpenLoop, await_ready, percentile
from benchmarks.processes import cpu_seconds, free_port, pinned, reset_peak, resident_bytes, running, store_command
from benchmarks.upstream import upstream

ROOT = Path(__file__).parent.parent
GATEWAY_CORE, LOAD_CORE = 0, 1
KNOWN = 0  # number of the known id
OFTEN, SELDOM = "asks-often", "asks-seldom"
RATES = {OFTEN: 50.0, SELDOM: 0.5}  # requests per second
REFUSALS = (429, 503)
STRETCHED = 4  # parts of the ids, of which all but the first are sent in one turn
IDLE_SHARE = 4  # the idle gateway is measured for this part of the time of a flood
HELD = 10_000  # registered clients in memory if they do not all fit
IDLE, ONE, MANY, STRETCH = "nobody", "one id", "ids that never repeat", "the same, at a stretch"
UNLIMITED = 1_000_000  # requests per second
SAMPLED_EVERY = 2.0  # seconds between samples of the tables


class Caller(Client):
    """A connection of a client within its limits, which counts its refused requests."""

    def __init__(self, port: int, name: str, refused: Counter[int]) -> None:
        self.request = f"GET /api/small HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: {name}\r\n\r\n".encode()
        self._refused = refused
        super().__init__(port)

    def check(self, answer: Answer) -> None:
        """See `Client`."""
        if answer.status in REFUSALS:
            self._refused[answer.status] += 1
        else:
            super().check(answer)


@dataclass
class Phase:
    """Results under one kind of load, a value for each turn."""

    rates: list[float] = field(default_factory=list)  # requests per second
    costs: list[float] = field(default_factory=list)  # microseconds of CPU time per request
    medians: list[float] = field(default_factory=list)  # milliseconds
    tails: list[float] = field(default_factory=list)  # milliseconds, the 99th percentile
    statuses: Counter[str] = field(default_factory=Counter)  # of the flood
    refused: Counter[int] = field(default_factory=Counter)  # of clients within their limits
    peak: int = 0  # bytes
    tables: Counter[str] = field(default_factory=Counter)  # largest number of entries


@dataclass
class Measured:
    """One row: bytes of resident memory before and after, and the phases."""

    start: int
    after: int = 0
    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in (IDLE, ONE, MANY, STRETCH)})


@dataclass(frozen=True)
class Row:
    """A configuration: where the buckets are, and whether all registered clients are in memory."""

    name: str
    has_store: bool = False
    client_limit: int | None = None


ROWS = (
    Row("memory", has_store=False),
    Row("store", has_store=True),
    Row("more registered clients than are held", client_limit=HELD),
)


def configuration(row: Row, folder: Path, port: int, behind: int, store: int) -> str:
    """Write the configuration of a gateway, and return its path."""
    section: dict[str, object] = {"url": f"redis://127.0.0.1:{store}"} if row.has_store else {}
    if row.client_limit is not None:
        section["max_cached_clients"] = row.client_limit
        register(folder / "state", 2 * row.client_limit)
    file = folder / "gateway.yaml"
    file.write_text(
        json.dumps(
            {
                "server": {"port": port},
                "store": section,
                "state_dir": str(folder / "state"),
                "log": {"access": False},
                "tiers": {
                    "FREE": {"rate": 1, "capacity": 10},
                    "ENTERPRISE": {"rate": 100, "capacity": 1000},
                    "UNLIMITED": {"rate": UNLIMITED, "capacity": UNLIMITED},
                },
                "clients": {
                    OFTEN: {"tier": "ENTERPRISE"},
                    CLIENT: {"tier": "UNLIMITED"},
                    client_id(KNOWN).decode(): {"tier": "UNLIMITED"},
                },
                "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{behind}"}]}},
                "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
            }
        )
    )
    return str(file)


def register(state: Path, count: int) -> None:
    """Register clients that will send no requests."""
    state.mkdir()

    async def create() -> None:
        clients = SqliteClientStore(state)
        await clients.load(limit=0)
        await clients.close()

    asyncio.run(create())
    with closing(sqlite3.connect(state / CLIENTS_FILE)) as connection, connection:
        connection.executemany(
            "INSERT INTO clients (id, tier, version, changed_at) VALUES (?, 'ENTERPRISE', ?, 0)",
            ((f"registered-{number}", number) for number in range(1, count + 1)),
        )


class Scene:
    """A running gateway and its measurements."""

    def __init__(self, pid: int, port: int, rate: float) -> None:
        self._pid, self._port, self._rate = pid, port, rate
        self._next = KNOWN + 1  # the next new id
        self.measured = Measured(start=resident_bytes(pid))

    def __repr__(self) -> str:
        return f"<Scene [{self._next - 1} ids so far]>"

    def run(self, name: str, requests: int) -> None:
        """Measure under one kind of load, for as long as this number of requests takes."""
        phase = self.measured.phases[name]
        reset_peak(self._pid)
        before = cpu_seconds(self._pid)
        with ExitStack() as stack:
            flood = None if name == IDLE else self._flood(name, requests)
            seconds = requests / self._rate
            often, seldom = (stack.enter_context(self._asking(client, phase)) for client in RATES)
            other = threading.Thread(target=seldom.run, args=(RATES[SELDOM], seconds))
            sampling = threading.Thread(target=self._sample, args=(phase, seconds))
            other.start()
            sampling.start()
            often.run(RATES[OFTEN], seconds)
            other.join()
            sampling.join()
            if flood is not None:
                self._take(phase, flood, before)
        measured = sorted(often.measured)
        phase.medians.append(percentile(measured, 0.5) * 1000)
        phase.tails.append(percentile(measured, 0.99) * 1000)
        phase.peak = max(phase.peak, resident_bytes(self._pid, peak=True))
        self.measured.after = resident_bytes(self._pid)

    def _flood(self, name: str, requests: int) -> "subprocess.Popen[str]":
        first, ids = (KNOWN, 1) if name == ONE else (self._next, requests)
        self._next += 0 if name == ONE else ids
        options = ["--rate", str(self._rate), "--count", str(requests), "--first", str(first), "--ids", str(ids)]
        command = [sys.executable, "-m", "benchmarks.flood", str(self._port), *options]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: S603 - fixed arguments

    def _take(self, phase: Phase, flood: "subprocess.Popen[str]", before: float) -> None:
        output, _ = flood.communicate()
        if flood.returncode:
            raise Failed(f"the flood exited with {flood.returncode}")
        done = Flooded(**json.loads(output))
        phase.rates.append(done.requests / done.seconds)
        phase.costs.append((cpu_seconds(self._pid) - before) / done.requests * 1e6)
        phase.statuses.update(done.statuses)

    @contextmanager
    def _asking(self, client: str, phase: Phase) -> Iterator[OpenLoop]:
        with closing(OpenLoop(partial(Caller, self._port, client, phase.refused))) as loop:
            loop.warm_up(connections=1)
            yield loop

    def _sample(self, phase: Phase, seconds: float) -> None:
        """Sample the tables, and keep the largest number of entries of each."""
        end = time.monotonic() + seconds
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)) as connection:
            while time.monotonic() < end:
                time.sleep(min(SAMPLED_EVERY, max(end - time.monotonic(), 0)))
                connection.request("GET", "/tables")
                phase.tables |= Counter(json.loads(connection.getresponse().read()))


def measure(row: Row, behind: int, *, ids: int, seconds: float, rounds: int) -> Measured:
    """Start a gateway and measure it: in turn with one id, many ids and idle, then with many ids in one turn."""
    port, store = free_port(), free_port()
    part = ids // (rounds * STRETCHED)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "store").mkdir()
        if row.has_store:
            stack.enter_context(running(store_command(store), core=LOAD_CORE, port=store, folder=folder / "store"))
        command = [sys.executable, "-m", "benchmarks.tables", configuration(row, folder, port, behind, store)]
        env = {"PYTHONPATH": str(ROOT)}
        pid = stack.enter_context(running(command, core=GATEWAY_CORE, port=port, folder=folder, env=env))
        await_ready(port)
        scene = Scene(pid, port, ids / seconds)
        for _ in range(rounds):
            scene.run(ONE, part)
            scene.run(MANY, part)
            scene.run(IDLE, part // IDLE_SHARE)
        for _ in range(rounds * (STRETCHED - 1)):
            scene.run(STRETCH, part)
        scene.run(ONE, part)
    return scene.measured


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def latencies_of(row: Row, measured: Measured) -> Iterator[str]:
    """Yield the lines for the clients within their limits."""
    usual = statistics.median(measured.phases[ONE].tails)
    for name, phase in measured.phases.items():
        rate = f"{statistics.median(phase.rates):,.0f}" if phase.rates else ""
        cost = f"{statistics.median(phase.costs):.0f}" if phase.costs else ""
        yield (
            f"| {row.name}: {name} | {rate} | {cost} | {_middle(phase.medians)} | {_middle(phase.tails)} |"
            f" {statistics.median(phase.tails) / usual:.2f} | {phase.refused.total()} |"
        )


def memory_of(row: Row, measured: Measured) -> str:
    """Return the line for resident memory, in MB."""
    figures = (measured.start, *(measured.phases[name].peak for name in (ONE, MANY, STRETCH)), measured.after)
    return f"| {row.name} | {' | '.join(f'{figure / 1e6:.0f}' for figure in figures)} |"


def tables_of(found: Sequence[tuple[Row, Measured]]) -> Iterator[str]:
    """Yield the lines for the largest numbers of entries."""
    most = [measured.phases[MANY].tables | measured.phases[STRETCH].tables for _, measured in found]
    for name in dict.fromkeys(name for tables in most for name in tables):
        yield f"| {name} | {' | '.join(f'{tables[name]:,}' for tables in most)} |"


def report(found: Sequence[tuple[Row, Measured]]) -> str:
    """Return the tables."""
    names = [row.name for row, _ in found]
    head = "| within its limits, beside | requests/s | CPU µs/request | p50, ms | p99, ms | to one id's | refused |"
    return "\n".join(
        [
            head,
            "|---|---:|---:|---:|---:|---:|---:|",
            *(line for row, measured in found for line in latencies_of(row, measured)),
            "",
            f"| resident memory, MB | at start | {ONE} | {MANY} | {STRETCH} | after |",
            "|---|---:|---:|---:|---:|---:|",
            *(memory_of(row, measured) for row, measured in found),
            "",
            f"| entries at most | {' | '.join(names)} |",
            f"|---|{'---:|' * len(names)}",
            *tables_of(found),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the tables; the exit code is 1 if a client within its limits was refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_clients", description=__doc__)
    parser.add_argument("--ids", type=int, default=1_000_000, help="number of ids (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="time to send them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: %(default)s)")
    parser.add_argument("row", nargs="*", help="prefixes of the names of the rows to run (default: all)")
    options = parser.parse_args(arguments)
    found = []
    with tempfile.TemporaryDirectory() as folder, upstream(Path(folder), LOAD_CORE) as behind, pinned(LOAD_CORE):
        for row in ROWS:
            if options.row and not row.name.startswith(tuple(options.row)):
                continue
            measured = measure(row, behind, ids=options.ids, seconds=options.seconds, rounds=options.rounds)
            found.append((row, measured))
            for line in (*latencies_of(row, measured), memory_of(row, measured)):
                sys.stderr.write(f"{line}\n")
            statuses = sum((phase.statuses for phase in measured.phases.values()), Counter[str]())
            sys.stderr.write(f"{row.name}: the responses to the flood were {dict(statuses)}\n")
    sys.stdout.write(report(found) + "\n")
    return 1 if any(phase.refused for _, measured in found for phase in measured.phases.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
