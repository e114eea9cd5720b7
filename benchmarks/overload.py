"""The service of each tier at three times the capacity of an upstream, with and without a concurrency limit.

`python -m benchmarks.overload` runs a gateway with an upstream that serves 20 requests concurrently in 100 ms each,
that is 200 requests per second. Requests are sent at random times (Poisson), independent of responses: first at a
fifth of the capacity, for the latencies without load, then at three times the capacity. The rates are low, so that no
processor is the bottleneck. Each row of the table is a tier: the share of 200 responses, and their latency from the
due time, also relative to the p99 without load (the lowest of all variants). The goodput is the rate of 200 responses
relative to the capacity. The first seconds of overload, in which an adaptive limit converges, are not counted.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api_gateway.admin.operator_token import token_file
from benchmarks.load import percentile
from benchmarks.processes import free_port, running

ROOT = Path(__file__).parent.parent
PLACES, SERVICE = 20, 0.1  # concurrent requests, and seconds for each
CAPACITY = PLACES / SERVICE
MIX = {"ENTERPRISE": 0.45, "PREMIUM": 0.45, "BASIC": 0.6, "FREE": 1.5}  # shares of the capacity: three times in total
QUIET = 0.2  # share of the capacity, for the latencies without load
PATIENCE = 10.0  # seconds that a client waits
CLIENTS = 32  # per tier, because a single client gets at most half of the slots
LIMITS: dict[str, dict[str, Any] | None] = {
    "no limit": None,
    "limit: 40": {"limit": 2 * PLACES},
    "adaptive": {"adaptive": {}},
}


@dataclass
class Tally:
    """Results of one tier: the seconds of successful responses, and the number of requests."""

    offered: int = 0
    good: list[float] = field(default_factory=list)
    refused: int = 0

    @property
    def share(self) -> float:
        """The share of successful responses."""
        return len(self.good) / self.offered if self.offered else 0.0


class Places:
    """A server with PLACES slots, each of which takes SERVICE seconds per request; a queue in front of it."""

    def __init__(self) -> None:
        self._free = PLACES
        self._waiting: deque[asyncio.WriteTransport] = deque()

    def enter(self, transport: asyncio.WriteTransport) -> None:
        """Queue a request. It is processed even if its client disconnects, as by most servers."""
        if self._free:
            self._free -= 1
            asyncio.get_running_loop().call_later(SERVICE, self._leave, transport)
        else:
            self._waiting.append(transport)

    def _leave(self, transport: asyncio.WriteTransport) -> None:
        transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        self._free += 1
        if self._waiting:
            self.enter(self._waiting.popleft())


class Upstream(asyncio.Protocol):
    """One connection to the upstream."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Queue each complete request."""
        *heads, self._buffer = (self._buffer + data).split(b"\r\n\r\n")
        for _ in heads:
            self._places.enter(self._transport)


class Asker(asyncio.Protocol):
    """One connection of a client of one tier, for sequential requests."""

    def __init__(self, client: str) -> None:
        self._request = f"GET /api/x HTTP/1.1\r\nHost: gateway\r\nX-Client-ID: {client}\r\n\r\n".encode()
        self._buffer = b""
        self._due = 0.0
        self.tally: Tally | None = None  # while a request is in flight

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self.transport = transport

    def ask(self, due: float, tally: Tally) -> None:
        """Send a request that is due at `due`."""
        self._due, self.tally = due, tally
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count a response when it is complete."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or self.tally is None:
            return
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < length:
            return
        seconds, self._buffer = time.monotonic() - self._due, b""
        if head[9:12] == b"200" and seconds <= PATIENCE:
            self.tally.good.append(seconds)
        else:
            self.tally.refused += 1
        self.tally = None


class Crowd:
    """Clients of all tiers, which send at random times, independently of each other."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._source = random.Random(1)  # noqa: S311 - the same times for every variant
        self._askers: dict[str, list[Asker]] = {tier: [] for tier in MIX}

    async def offer(self, scale: float, seconds: float, tallies: Mapping[str, Tally]) -> None:
        """Send the mix at `scale` times its rate for `seconds`."""
        rate = CAPACITY * sum(MIX.values()) * scale
        due = time.monotonic()
        end = due + seconds
        while (due := due + self._source.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            (tier,) = self._source.choices(list(MIX), list(MIX.values()))
            tallies[tier].offered += 1
            (await self._free(tier)).ask(due, tallies[tier])

    async def _free(self, tier: str) -> Asker:
        for asker in self._askers[tier]:
            if asker.tally is None and not asker.transport.is_closing():
                return asker
        loop, client = asyncio.get_running_loop(), name_of(tier, len(self._askers[tier]) % CLIENTS)
        _, asker = await loop.create_connection(lambda: Asker(client), "127.0.0.1", self._port)
        self._askers[tier].append(asker)
        return asker

    async def settle(self, tallies: Mapping[str, Tally]) -> None:
        """Wait for the counted responses, at most PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        mine = list(tallies.values())
        while time.monotonic() < end and any(asker.tally in mine for asker in self._all()):  # noqa: ASYNC110 - it is polled
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Close all connections."""
        for asker in self._all():
            asker.transport.abort()

    def _all(self) -> list[Asker]:
        return [asker for askers in self._askers.values() for asker in askers]


@dataclass
class Found:
    """Results of one variant of the limit."""

    name: str
    quiet: dict[str, Tally]
    loaded: dict[str, Tally]
    seconds: float
    limit: float | None = None

    @property
    def calm(self) -> list[float]:
        """The latencies without load in seconds, sorted."""
        return sorted(one for tally in self.quiet.values() for one in tally.good)

    @property
    def goodput(self) -> float:
        """The rate of successful responses relative to the capacity."""
        return sum(len(tally.good) for tally in self.loaded.values()) / self.seconds / CAPACITY


def name_of(tier: str, number: int) -> str:
    """Return the name of one of the clients of a tier."""
    return f"{tier.lower()}-{number}"


def configuration(port: int, upstream: int, concurrency: Mapping[str, Any] | None, state: Path) -> str:
    """Return the configuration of a gateway whose rate limits are never reached."""
    return json.dumps(
        {
            "server": {"port": port},
            "state_dir": str(state),
            "log": {"access": False},
            "address_limit": {"rate": 0},
            "tiers": {
                tier: {"rate": 100_000, "capacity": 1_000_000, "priority": rank}
                for rank, tier in enumerate(reversed(MIX))
            },
            "clients": {name_of(tier, number): {"tier": tier} for tier in MIX for number in range(CLIENTS)},
            "upstreams": {
                "up": {
                    "targets": [{"url": f"http://127.0.0.1:{upstream}"}],
                    "retry": {"attempts": 1},
                    "concurrency": concurrency,
                }
            },
            "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        }
    )


async def measure(name: str, seconds: float, settling: float, calm: float, folder: Path) -> Found:
    """Run one variant with a new upstream and a new gateway."""
    loop, port = asyncio.get_running_loop(), free_port()
    places = Places()
    upstream = await loop.create_server(lambda: Upstream(places), "127.0.0.1", 0, backlog=1024)
    with ExitStack() as stack:
        stack.callback(upstream.close)
        file = folder / "gateway.yaml"
        behind = upstream.sockets[0].getsockname()[1]
        file.write_text(configuration(port, behind, LIMITS[name], folder / "state"))
        command = [sys.executable, str(ROOT / "run_gateway.py"), "--config", str(file)]
        gateway = running(command, core=0, port=port, folder=folder)
        await loop.run_in_executor(None, stack.enter_context, gateway)
        crowd = Crowd(port)
        stack.callback(crowd.close)
        quiet, unseen, loaded = ({tier: Tally() for tier in MIX} for _ in range(3))
        await crowd.offer(QUIET / sum(MIX.values()), calm, quiet)
        await crowd.settle(quiet)
        await crowd.offer(1, settling, unseen)
        await crowd.offer(1, seconds, loaded)
        limit = await _limit(port, token_file(folder / "state").read_text().strip())
        await crowd.settle(loaded)
        crowd.close()
        await loop.run_in_executor(None, stack.close)
    return Found(name, quiet, loaded, seconds, limit)


async def _limit(port: int, token: str) -> float | None:
    """Return the present concurrency limit from the gateway's view."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\nConnection: close"
    writer.write(f"GET /health HTTP/1.1\r\n{fields}\r\n\r\n".encode())
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    limit: float | None = json.loads(body)["upstreams"]["up"]["concurrency"]["limit"]
    return limit


def table(found: Sequence[Found]) -> str:
    """Return the table, a row for each tier of each variant, followed by the goodputs."""
    calm = min((one.calm for one in found), key=lambda times: percentile(times, 0.99))
    before = [percentile(calm, 0.5), percentile(calm, 0.99)]
    lines = [
        "| | tier | offered/s | good | p50, ms | p99, ms | p99 to unloaded |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(_row(one, tier, before[1]) for one in found for tier in MIX),
        "",
        f"- unloaded: p50 {before[0] * 1000:,.0f} ms, p99 {before[1] * 1000:,.0f} ms",
    ]
    for one in found:
        limit = "" if one.limit is None else f"; the limit at the end: {one.limit:g}"
        lines.append(f"- {one.name}: goodput {one.goodput:.1%} of the capacity{limit}")
    return "\n".join(lines) + "\n"


def _row(found: Found, tier: str, before: float) -> str:
    tally = found.loaded[tier]
    cells = [f"{tally.offered / found.seconds:.0f}", f"{tally.share:.1%}", "-", "-", "-"]
    if tally.good:
        good = sorted(tally.good)
        p50, p99 = percentile(good, 0.5), percentile(good, 0.99)
        cells[2:] = [f"{p50 * 1000:,.0f}", f"{p99 * 1000:,.0f}", f"{p99 / before:.2f}"]
    return f"| {found.name} | {tier} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all variants and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="counted seconds for each variant")
    parser.add_argument("--settling", type=float, default=10, help="seconds of overload before them")
    parser.add_argument("--quiet", type=float, default=10, help="seconds without load before that")
    parser.add_argument("--only", choices=LIMITS, action="append", help="one variant; may be repeated")
    options = parser.parse_args(arguments)
    found = []
    for name in options.only or LIMITS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(asyncio.run(measure(name, options.seconds, options.settling, options.quiet, Path(folder))))
        sys.stderr.write(f"{name}: measured\n")
    sys.stdout.write(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
