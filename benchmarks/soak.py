"""Hours of mixed load: is the gateway after them what it was before? `python -m benchmarks.soak --minutes 60`.

Clients of every kind come at a fixed rate, some 150 a second: plain ones, uploads, streams, WebSockets, some that
leave half-way, one that is limited, some with headers never seen before, and some that want an upstream which is away
for a quarter of the time. Meanwhile the gateway's memory, descriptors, threads, requests in flight and metric series
are noted. After a warm-up each series of notes gets a line (Theil and Sen's: the median of the slopes between any two
notes); one that rises by more than `ALLOWED` from the first note to the last is not flat. When all clients have gone,
nothing may be in flight, and no more descriptors open than before the first came. Exits with 1 if anything is not flat
or an answer was not the one due. Linux only.
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
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations, count
from pathlib import Path

from benchmarks.peers import GATEWAY
from benchmarks.processes import free_port, resident_bytes, running

ALLOWED: Mapping[str, float] = {"memory, MB": 3.0, "descriptors": 5, "threads": 1, "in flight": 3, "series": 5}
WARM_UP = 0.25  # of the time, and
LEAST_WARM_UP = 60.0  # seconds, if there are so many: by then the caches of what headers mean are full
NOTES = 600
POINTS = 120  # of these a line is made
CALM = 4.0  # seconds after the last client
IDLE = 1.0  # seconds an unused connection to an upstream is kept
AWAY, PERIOD = 5.0, 20.0  # seconds the failing upstream is away, of so many
_MB = 2**20
_LIMIT = 2**20
_PATIENCE = 20.0
_SMALL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


# The upstream


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests: a stream, a WebSocket's handshake and its echo, or two bytes."""
    with suppress(OSError, EOFError, asyncio.LimitOverrunError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"\r\ntransfer-encoding: chunked" in head:
                await reader.readuntil(b"0\r\n\r\n")
            elif b"\r\ncontent-length: " in head:
                await reader.readexactly(int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))
            if b"\r\nupgrade: websocket" in head:
                writer.write(_SWITCH)
                while piece := await reader.read(_LIMIT):
                    writer.write(piece)
                break
            if head.startswith(b"get /api/stream"):
                writer.write(_CHUNKED)
                for _ in range(20):
                    writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.02)
                writer.write(b"0\r\n\r\n")
            else:
                writer.write(_SMALL)
    writer.transport.abort()


async def come_and_go(port: int) -> None:
    """Serve on that port, but for some seconds of every period."""
    while True:
        connected: set[asyncio.StreamWriter] = set()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.add(writer)  # noqa: B023 - the server ends before the next round
            await serve(reader, writer)
            connected.discard(writer)  # noqa: B023 - as above

        server = await asyncio.start_server(note, "127.0.0.1", port, limit=_LIMIT)
        await asyncio.sleep(PERIOD - AWAY)
        server.close()
        for writer in list(connected):
            writer.transport.abort()
        await asyncio.sleep(AWAY)


# The clients


class Unexpected(Exception):
    """An answer that was not the one due."""


@dataclass
class Clients:
    """Every kind of client; each method is one visit. `seen` counts answers by kind and status."""

    port: int
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    _idle: list[Streams] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    async def _connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=_LIMIT)

    async def _ask(self, streams: Streams, line: str, headers: str = "", body: bytes = b"") -> tuple[int, bytes]:
        """Send a request; return its answer's status and body."""
        reader, writer = streams
        writer.write(f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"\r\ntransfer-encoding: chunked" in head:
            answer = await reader.readuntil(b"0\r\n\r\n")
        else:
            answer = await reader.readexactly(int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))
        return int(head.split(b" ", 2)[1]), answer

    async def _visit(
        self, kind: str, expected: Sequence[int], line: str, headers: str = "", body: bytes = b""
    ) -> None:
        """Make one request on a connection of its own."""
        streams = await self._connect()
        try:
            status, _ = await self._ask(streams, line, headers, body)
        finally:
            streams[1].transport.abort()
        self._note(kind, status, expected)

    def _note(self, kind: str, status: int, expected: Sequence[int]) -> None:
        self.seen[kind, status] += 1
        if status not in expected:
            raise Unexpected(f"{kind}: status {status}")

    async def plain(self) -> None:
        """A GET on a connection that is kept."""
        streams = self._idle.pop() if self._idle else await self._connect()
        status, _ = await self._ask(streams, "GET /api/x")
        self._idle.append(streams)
        self._note("plain", status, [200])

    async def stranger(self) -> None:
        """A client with a trace id that nobody has seen, and one of a thousand names."""
        number = next(self._numbers)
        headers = f"X-Client-ID: client-{number % 1000}\r\ntraceparent: 00-{number:032x}-{number:016x}-01\r\n"
        await self._visit("stranger", [200], "GET /api/x", headers)

    async def upload(self) -> None:
        """A body of a length that is told."""
        await self._visit("upload", [200], "POST /api/x", "Content-Length: 20000\r\n", bytes(20_000))

    async def chunks(self) -> None:
        """A body in pieces."""
        body = (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 8 + b"0\r\n\r\n"
        await self._visit("chunks", [200], "POST /api/x", "Transfer-Encoding: chunked\r\n", body)

    async def stream(self) -> None:
        """An answer that takes its time."""
        await self._visit("stream", [200], "GET /api/stream")

    async def limited(self) -> None:
        """One client that asks ten times as often as it may."""
        await self._visit("limited", [200, 429], "GET /api/x", "X-Client-ID: limited\r\n")

    async def failing(self) -> None:
        """A request for the upstream that comes and goes."""
        await self._visit("failing", [200, 502, 503], "GET /api/away")

    async def talker(self) -> None:
        """A WebSocket: the handshake, and some bytes both ways."""
        reader, writer = await self._connect()
        try:
            writer.write(
                b"GET /api/x HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            head = await reader.readuntil(b"\r\n\r\n")
            self._note("talker", int(head.split(b" ", 2)[1]), [101])
            for _ in range(10):
                writer.write(bytes(1000))
                await reader.readexactly(1000)
        finally:
            writer.transport.abort()

    async def leaver(self) -> None:
        """One that leaves: before its answer, within it, or within its own body."""
        reader, writer = await self._connect()
        number = next(self._numbers) % 3
        if number == 2:  # noqa: PLR2004 - the third of three ways
            writer.write(b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf")
            await asyncio.sleep(0.02)
        else:
            writer.write(b"GET /api/stream HTTP/1.1\r\nHost: a\r\n\r\n")
            if number:
                await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        self.seen["leaver", 0] += 1

    def rates(self) -> dict[Callable[[], Awaitable[None]], float]:
        """Return every kind with its visits a second."""
        return {
            self.plain: 60,
            self.stranger: 30,
            self.upload: 10,
            self.chunks: 5,
            self.stream: 5,
            self.limited: 10,
            self.failing: 10,
            self.talker: 5,
            self.leaver: 10,
        }

    async def come(self, visit: Callable[[], Awaitable[None]], rate: float, until: float) -> None:
        """Let one kind come at its rate; return when the last one has gone."""
        began, number = time.monotonic(), 0
        under_way: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            number += 1
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            task = asyncio.ensure_future(self._guard(visit))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def _guard(self, visit: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await visit()
        except (Unexpected, OSError, EOFError, IndexError, ValueError) as problem:
            self.unexpected[f"{getattr(visit, '__name__', visit)}: {problem!r}"] += 1

    def go(self) -> None:
        """Close what was kept."""
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()


# The notes


@dataclass
class Notes:
    """What was seen of the gateway, and when."""

    times: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ALLOWED})

    def add(self, now: float, found: Mapping[str, float]) -> None:
        """Write down."""
        self.times.append(now)
        for name, value in found.items():
            self.values[name].append(value)

    def since(self, start: float) -> "Notes":
        """Return what was noted from then on."""
        first = next((number for number, at in enumerate(self.times) if at >= start), len(self.times))
        return Notes(self.times[first:], {name: values[first:] for name, values in self.values.items()})


def rise(times: Sequence[float], values: Sequence[float]) -> float:
    """Return by how much a line through the notes rises from the first to the last of them (Theil and Sen)."""
    step = max(1, len(times) // POINTS)
    points = list(zip(times[::step], values[::step], strict=True))
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2) if t > s]
    return statistics.median(slopes) * (times[-1] - times[0]) if slopes else 0.0


async def look(pid: int, port: int) -> dict[str, float]:
    """Return what the gateway holds now."""
    text = await _get(port, "/metrics?format=prometheus")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    in_flight = next(line for line in lines if line.startswith("gateway_http_requests_in_flight "))
    return {
        "memory, MB": resident_bytes(pid) / _MB,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),  # noqa: PTH208 - as many as there are, made no paths of
        "threads": len(os.listdir(f"/proc/{pid}/task")),  # noqa: PTH208 - as above
        "in flight": float(in_flight.split()[1]),
        "series": len(lines),
    }


async def _get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
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
class Verdict:
    """What a soak came to."""

    notes: Notes
    before: Mapping[str, float]
    after: Mapping[str, float]
    clients: Clients

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        found = [
            f"{name} rises by {risen:.2f}, {allowed:g} are allowed"
            for name, allowed in ALLOWED.items()
            if (risen := rise(self.notes.times, self.notes.values[name])) > allowed
        ]
        if self.after["in flight"]:
            found.append(f"{self.after['in flight']:g} requests are in flight when all clients have gone")
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
        rows += ["", "| clients | answers by status |", "|---|---|"]
        for kind in dict.fromkeys(kind for kind, _ in self.clients.seen):
            answers = [
                f"{status or 'none'}: {times:,}"
                for (one, status), times in sorted(self.clients.seen.items())
                if one == kind
            ]
            rows.append(f"| {kind} | {', '.join(answers)} |")
        return "\n".join(rows) + "\n"


async def soak(seconds: float, folder: Path) -> Verdict:
    """Run everything for so long."""
    loop = asyncio.get_running_loop()
    upstream = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_LIMIT, backlog=1024)
    away = free_port()
    going = asyncio.ensure_future(come_and_go(away))
    started = gateway(folder, upstream.sockets[0].getsockname()[1], away)
    pid, port = await loop.run_in_executor(None, started.__enter__)
    try:
        await look(pid, port)
        before = await look(pid, port)
        clients, notes, began = Clients(port), Notes(), time.monotonic()
        end = began + seconds
        coming = [asyncio.ensure_future(clients.come(visit, rate, end)) for visit, rate in clients.rates().items()]
        while time.monotonic() < end:
            await asyncio.sleep(max(1.0, seconds / NOTES))
            notes.add(time.monotonic(), await look(pid, port))
        await asyncio.gather(*coming)
        clients.go()
        await asyncio.sleep(CALM)
        after = await look(pid, port)
    finally:
        going.cancel()
        upstream.close()
        await loop.run_in_executor(None, started.__exit__, None, None, None)
    warm = max(seconds * WARM_UP, min(LEAST_WARM_UP, seconds / 2))
    return Verdict(notes.since(began + warm), before, after, clients)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print what was seen, and return 1 if something is wrong with it."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the gateway is stopped then, too
    raise SystemExit(main())
