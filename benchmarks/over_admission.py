"""Over-admission while the shared store fails: admitted requests of a client, compared with the upper bound.

`python -m benchmarks.over_admission` runs four gateways with one store and a small TCP proxy between each of them and
the store. One client sends five times its rate, distributed over the four, at a fixed rate independent of responses.
Each row is one failure. The output has the admitted requests, the upper bound, and the largest burst: the maximum over
all windows of admitted requests less the refill of the window. The bounds are those of docs/limits.md for a client
that all gateways know, with a capacity of C tokens and a rate of r; 2 % cover what the gateways learn of late. The
window of length d is the whole row, from the first request sent to the last response: on a busy machine the client is
late, and buckets are refilled meanwhile.

"Without the store" is the number of decisions that gateways made without it. In a row without an outage it must be 0:
on a machine that is too busy, a store that is in order does not respond in time, and some gateways decide on their
shares. Such a row shows another failure than it says, and is reported as not valid.

Each failure has a second row, in which the client is charged to three limits and a daily quota of Q tokens, of which
the quota is the tightest.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from benchmarks.processes import free_port, running, store_command

ROOT = Path(__file__).parent.parent
GATEWAYS = 4
RATE, CAPACITY = 100, 1000  # ENTERPRISE
OFFERED = 5 * RATE
QUOTA_PART = 0.75  # the quota of the second rows, as a part of C + r·d
LATE_KNOWLEDGE = 0.02
BY_STORE = ("store", "deny_cache")  # sources of decisions that the store has made
OPERATOR = "over-admission"  # the token
_OPERATOR = f"Authorization: Bearer {OPERATOR}"
READY = 10.0  # seconds for a store to become ready


class Store:
    """A store that can be killed, paused and restarted empty."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start the store empty, and wait until it responds."""
        command = store_command(self.port)
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)  # noqa: ASYNC220, S603 - our own
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            with suppress(OSError):
                await self.tell("PING")
                return
            await asyncio.sleep(0.02)
        raise RuntimeError(f"the store does not respond on port {self.port}")

    async def tell(self, command: str) -> None:
        """Send a command on a separate connection, and wait for the reply."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(command.encode() + b"\r\n")
        await reader.readline()
        writer.close()

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Link:
    """A proxy between one gateway and the store. `delay` delays replies by seconds; `is_mute` drops replies."""

    def __init__(self, store: Store) -> None:
        self.delay = 0.0
        self.is_mute = self.is_cut = False
        self._store = store
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        """Listen; return the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """Close all connections, and accept none until `is_cut` is reset."""
        self.is_cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def close(self) -> None:
        """Stop."""
        self._server.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if self.is_cut:
                return
            there, onward = await asyncio.open_connection("127.0.0.1", self._store.port)
            self._writers.add(onward)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, onward, is_back=False))
                group.create_task(self._pass(there, writer, is_back=True))
        except (OSError, ExceptionGroup):
            pass
        finally:
            writer.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, is_back: bool) -> None:
        try:
            while piece := await source.read(65_536):
                if is_back and self.delay:
                    await asyncio.sleep(self.delay)
                if not (is_back and self.is_mute):
                    sink.write(piece)
        finally:
            self._writers.discard(sink)
            sink.transport.abort()


@dataclass
class Scene:
    """The store and links that a failure acts on, and the length of the row; the failure is in its middle third."""

    store: Store
    links: list[Link]
    seconds: float

    async def until(self, part: float) -> None:
        """Sleep for this part of the row."""
        await asyncio.sleep(self.seconds * part)


async def healthy(scene: Scene) -> None:
    """No failure."""


async def flushed(scene: Scene) -> None:
    """Flush the scripts of the store repeatedly."""
    while True:
        await scene.store.tell("SCRIPT FLUSH")
        await asyncio.sleep(0.2)


def slowed(delay: float) -> Callable[[Scene], Awaitable[None]]:
    """Return a failure that delays every reply."""

    async def slow(scene: Scene) -> None:
        await scene.until(1 / 3)
        for link in scene.links:
            link.delay = delay
        await scene.until(1 / 3)
        for link in scene.links:
            link.delay = 0.0

    return slow


async def paused(scene: Scene) -> None:
    """Stop the store (SIGSTOP): it neither replies nor refuses connections."""
    await scene.until(1 / 3)
    scene.store.signal(signal.SIGSTOP)
    await scene.until(1 / 3)
    scene.store.signal(signal.SIGCONT)


async def killed(scene: Scene) -> None:
    """Kill the store, and start it empty a third later."""
    await scene.until(1 / 3)
    scene.store.kill()
    await scene.until(1 / 3)
    await scene.store.start()


async def muted(scene: Scene) -> None:
    """Let the store execute all commands, and drop its replies."""
    await scene.until(1 / 3)
    for link in scene.links:
        link.is_mute = True
    await scene.until(1 / 3)
    for link in scene.links:
        link.is_mute = False


async def half_cut(scene: Scene) -> None:
    """Disconnect every other gateway."""
    await scene.until(1 / 3)
    for link in scene.links[::2]:
        link.cut()
    await scene.until(1 / 3)
    for link in scene.links[::2]:
        link.is_cut = False


async def restarted(scene: Scene) -> None:
    """Kill the store and start it empty at once."""
    await scene.until(1 / 2)
    scene.store.kill()
    await scene.store.start()


@dataclass(frozen=True)
class Row:
    """A failure and its bound: a number of capacities, the rate, and a tolerance as a part of both.

    What a gateway admits before it learns of the others depends on the rate, also if a quota is the tightest limit.

    `quotas`, if not None, is the bound as a number of quotas, of a client with three limits and a quota.
    """

    name: str
    act: Callable[[Scene], Awaitable[None]]
    capacities: float
    why: str
    tolerance: float = 0.0
    quotas: float | None = None

    @property
    def is_in_time(self) -> bool:
        """True if the store responds in time throughout the row."""
        return not self.tolerance

    def bound(self, seconds: float, quota: int | None = None) -> float:
        """Return the upper bound of admitted requests in a window of this length; `quota` is that of the client."""
        by_buckets = CAPACITY * self.capacities + RATE * seconds
        by_quota = by_buckets if self.quotas is None or quota is None else self.quotas * quota
        return min(by_buckets, by_quota) + self.tolerance * by_buckets


def quota_of(seconds: float) -> int:
    """Return the quota of a row of this length."""
    return round(QUOTA_PART * (CAPACITY + RATE * seconds))


BUCKET_ROWS = (
    Row("healthy", healthy, 1, "C + r·d"),
    Row("SCRIPT FLUSH five times a second", flushed, 1, "C + r·d"),
    Row("replies 10 ms late", slowed(0.01), 1, "C + r·d"),
    Row("replies 60 ms late for a third of it", slowed(0.06), 1, "1.02 (C + r·d)", LATE_KNOWLEDGE),
    Row("store paused for a third of it", paused, 1, "1.02 (C + r·d)", LATE_KNOWLEDGE),
    Row("replies lost after execution for a third of it", muted, 1, "1.02 (C + r·d)", LATE_KNOWLEDGE),
    Row("2 of 4 gateways cut off for a third of it", half_cut, 1, "1.02 (C + r·d)", LATE_KNOWLEDGE),
    Row("store killed for a third of it, then empty", killed, 2, "1.02 (C + r·d + C)", LATE_KNOWLEDGE),
    Row("store restarted at once, then empty", restarted, 2, "1.02 (C + r·d + C)", LATE_KNOWLEDGE),
)
# Of these failures, by the function: gateways that are cut off admit their shares of what was left, while the others
# use all of it; an empty store has the whole quota again.
QUOTAS: dict[Callable[[Scene], Awaitable[None]], tuple[float, str]] = {
    half_cut: (1.5, "Q + K/N·Q"),
    killed: (2.0, "Q + Q"),
    restarted: (2.0, "Q + Q"),
}


def with_quota(row: Row) -> Row:
    """Return the row of the same failure with three limits and a quota."""
    quotas, why = QUOTAS.get(row.act, (1.0, "Q"))
    if row.tolerance:
        why = f"{why} + {row.why.replace('1.02', '0.02')}"
    return replace(row, name=f"{row.name}; three limits and a quota", quotas=quotas, why=why)


ROWS = tuple(chain.from_iterable((row, with_quota(row)) for row in BUCKET_ROWS))


@dataclass
class Tally:
    """The times of admitted requests (monotonic seconds), and the results of the others."""

    admitted: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    unlike: Counter[bytes] = field(default_factory=Counter)  # other statuses
    sources: Counter[str] = field(default_factory=Counter)  # of the decisions
    slowest: float = 0.0
    began: float = 0.0
    last: float = 0.0  # response

    @property
    def without_store(self) -> int:
        """The number of decisions that were made without the store."""
        return sum(count for source, count in self.sources.items() if source not in BY_STORE)

    def length(self, least: float) -> float:
        """Return the seconds from the first request to the last response, but not less than `least`."""
        return max(self.last - self.began, least)


class Prober(asyncio.Protocol):
    """One connection to a gateway, for sequential requests."""

    REQUEST = b"GET /api/x HTTP/1.1\r\nHost: gateway\r\nX-Client-ID: hot\r\n\r\n"

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._buffer = b""
        self._sent: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self.transport = transport

    @property
    def is_free(self) -> bool:
        """True if no request is in flight."""
        return self._sent is None

    def ask(self) -> None:
        """Send a request."""
        self._sent = time.monotonic()
        self.transport.write(self.REQUEST)

    def data_received(self, data: bytes) -> None:
        """Count a response when it is complete."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or self._sent is None:
            return
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < length:
            return
        now, tally = time.monotonic(), self._tally
        tally.last, tally.slowest = now, max(tally.slowest, now - self._sent)
        self._buffer, self._sent = b"", None
        status = head[9:12]
        if status == b"200":
            tally.admitted.append(now)
        elif status == b"429":
            tally.refused += 1
        else:
            tally.failed += 1
            tally.unlike[status] += 1


async def offer(ports: Sequence[int], seconds: float) -> Tally:
    """Send requests at a fixed rate, to the gateways in turn; connections are opened as needed."""
    tally, loop = Tally(), asyncio.get_running_loop()
    opened: list[list[Prober]] = [[] for _ in ports]
    began = tally.began = time.monotonic()
    for number in range(int(OFFERED * seconds)):
        await asyncio.sleep(max(0.0, began + number / OFFERED - time.monotonic()))
        place = number % len(ports)
        ready = next((one for one in opened[place] if one.is_free), None)
        if ready is None:
            _, ready = await loop.create_connection(lambda: Prober(tally), "127.0.0.1", ports[place])
            opened[place].append(ready)
        ready.ask()
    await asyncio.sleep(0.5)
    tally.failed += sum(not one.is_free for one in chain.from_iterable(opened))
    for one in chain.from_iterable(opened):
        one.transport.abort()
    return tally


def largest_burst(times: Sequence[float], rate: float) -> float:
    """Return the maximum over all windows of the requests less `rate` times the length."""
    best = lowest = 0.0
    lowest = float("inf")
    for count, at in enumerate(times):
        lowest = min(lowest, count - rate * at)
        best = max(best, count + 1 - rate * at - lowest)
    return best


def limits(quota: int | None) -> list[dict[str, object]]:
    """Return further limits: two buckets and a quota, of which the quota is the tightest; none for None."""
    if quota is None:
        return []
    return [
        {"name": "client", "rate": 2 * RATE, "capacity": 2 * CAPACITY},
        {"name": "route", "key": ["client", "route"], "rate": 3 * RATE, "capacity": 2 * CAPACITY},
        {"name": "daily", "quota": quota, "period": "day"},
    ]


def configuration(port: int, store: int, upstream: int, state: Path, quota: int | None = None) -> str:
    """Return the configuration of one of the gateways."""
    return json.dumps(
        {
            "server": {"port": port},
            "store": {"url": f"redis://127.0.0.1:{store}", "min_gateway_processes": GATEWAYS},
            "state_dir": str(state),
            "admin": {"token": OPERATOR},
            "log": {"access": False},
            "address_limit": {"rate": 0},
            "clients": {"hot": {"tier": "ENTERPRISE"}},
            "limits": limits(quota),
            "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{upstream}"}]}},
            "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        }
    )


async def sources_of(port: int) -> dict[str, int]:
    """Return how many decisions a gateway has made, by their source."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n%b\r\nConnection: close\r\n\r\n" % _OPERATOR.encode())
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    found: dict[str, int] = json.loads(body)["rate_limiter"]["decisions_by_source"]
    return found


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, asyncio.IncompleteReadError):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    writer.close()


async def measure(row: Row, seconds: float, folder: Path) -> Tally:
    """Run one row with a new store and new gateways."""
    loop = asyncio.get_running_loop()
    quota = None if row.quotas is None else quota_of(seconds)
    upstream = await asyncio.start_server(_answer, "127.0.0.1", 0)
    store = Store(folder)
    await store.start()
    links = [Link(store) for _ in range(GATEWAYS)]
    ports = [free_port() for _ in links]
    with ExitStack() as stack:
        stack.callback(store.kill)
        stack.callback(upstream.close)
        for index, (link, port) in enumerate(zip(links, ports, strict=True)):
            place = folder / f"gateway-{index}"
            place.mkdir()
            file = place / "gateway.yaml"
            listens_at = await link.start()
            stack.callback(link.close)
            origin = upstream.sockets[0].getsockname()[1]
            file.write_text(configuration(port, listens_at, origin, place / "state", quota))
            command = [sys.executable, str(ROOT / "run_gateway.py"), "--config", str(file)]
            gateway = running(command, core=index % 2, port=port, folder=place)
            await loop.run_in_executor(None, stack.enter_context, gateway)
        await asyncio.sleep(1)  # until the gateways know each other
        acting = asyncio.ensure_future(row.act(Scene(store, links, seconds)))
        tally = await offer(ports, seconds)
        acting.cancel()
        await asyncio.gather(acting, return_exceptions=True)
        for port in ports:
            tally.sources.update(await sources_of(port))
        store.signal(signal.SIGCONT)
        await loop.run_in_executor(None, stack.close)
    return tally


def bound_of(row: Row, tally: Tally, seconds: float) -> float:
    """Return the upper bound of a row that was to last for `seconds`."""
    return row.bound(tally.length(seconds), quota_of(seconds))


def line(row: Row, tally: Tally, seconds: float) -> str:
    """Return a row of the table."""
    bound = bound_of(row, tally, seconds)
    burst = largest_burst(tally.admitted, RATE)
    return (
        f"| {row.name} | {len(tally.admitted):,} | {bound:,.0f} | {len(tally.admitted) / bound:.2f} | {burst:,.0f} |"
        f" {tally.failed} | {tally.slowest * 1000:.0f} | {tally.without_store:,} | {row.why} |"
    )


async def run(seconds: float, names: Sequence[str]) -> bool:
    """Measure the rows whose name begins with one of `names`, by default all; return whether all bounds held."""
    sys.stdout.write(
        "| | admitted | bound | admitted / bound | largest burst | failed | slowest, ms | without the store |"
        " formula of the bound |\n|---|---:|---:|---:|---:|---:|---:|---:|---|\n"
    )
    holds = True
    for row in ROWS:
        if names and not any(row.name.startswith(name) for name in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            tally = await measure(row, seconds, Path(folder))
        sys.stdout.write(line(row, tally, seconds) + "\n")
        sys.stdout.flush()
        if tally.unlike:
            sys.stderr.write(f"{row.name}: {dict(tally.unlike)}\n")
        if row.is_in_time and tally.without_store:
            sys.stderr.write(
                f"{row.name}: not valid, {tally.without_store} decisions were made without the store, which did not"
                " respond in time: use a machine without other load\n"
            )
            holds = False
        holds = holds and len(tally.admitted) <= bound_of(row, tally, seconds)
    return holds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; the exit code is 1 if a bound was exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_admission", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="length of each row (default: %(default)s)")
    parser.add_argument("row", nargs="*", help="prefixes of the names of the rows to run (default: all)")
    options = parser.parse_args(arguments)
    return 0 if asyncio.run(run(options.seconds, options.row)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
