"""A target that fails when told to, and notes every request it gets: `python -m benchmarks.target <port> <file>`.

It answers `GET /api/<number>`, and health checks on any other path. Its standard input tells it how, a word a line:
`up`, `errors` (half of its answers are 503), `slow` (two seconds late), `down` (it closes its port and its
connections). The notes outlive it: number and monotonic time of a request are appended to the file as it comes.
"""

import asyncio
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.processes import pinned

ROOT = Path(__file__).parent.parent
SLOW = 2.0  # seconds
ERRORS = 0.5  # share of answers
_READY = 10.0
_NOTE = struct.Struct("<Id")
_GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_BAD = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno"


class Service:
    """What all connections of a target have in common: how it answers, and where it notes what it was asked."""

    def __init__(self, port: int, notes: int) -> None:
        self.mode = "up"
        self.connections: set[Connection] = set()
        self.chance = random.Random(port)  # noqa: S311 - it decides which answers are errors
        self._port = port
        self._notes = notes
        self._server: asyncio.Server | None = None

    async def serve(self) -> None:
        """Serve, and do what standard input says, until it ends."""
        await self._listen()
        loop = asyncio.get_running_loop()
        words = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
        while word := (await words.readline()).decode().strip():
            self.mode = word
            if word == "down":
                self._hang_up()
            elif self._server is None:
                await self._listen()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self._port, backlog=4096)

    def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.transport.abort()

    def note(self, number: int) -> None:
        """Write down that a request came."""
        os.write(self._notes, _NOTE.pack(number, time.monotonic()))


class Connection(asyncio.Protocol):
    """One connection of a proxy; requests without bodies, one after the other."""

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self._service = service
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self.transport = transport
        self._service.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Be forgotten."""
        self._service.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Answer every request that is there."""
        *heads, self._buffer = (self._buffer + data).split(b"\r\n\r\n")
        service = self._service
        for head in heads:
            path = head.split(b" ", 2)[1]
            is_counted = path.startswith(b"/api/")
            if is_counted:
                service.note(int(path[5:]))
            fails = is_counted and service.mode == "errors" and service.chance.random() < ERRORS
            answer = _BAD if fails else _GOOD
            if service.mode == "slow":
                asyncio.get_running_loop().call_later(SLOW, self.transport.write, answer)
            else:
                self.transport.write(answer)


class Target:
    """A target from outside: a process that can be told how to serve, stopped, killed and started again."""

    def __init__(self, folder: Path, core: int) -> None:
        self.port = steady_port()
        self._file = folder / f"{self.port}.notes"
        self._file.touch()
        self._core = core
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Target on port {self.port} [{'running' if self._process else 'not running'}]>"

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = [sys.executable, "-m", "benchmarks.target", str(self.port), str(self._file)]
        with pinned(self._core):
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)  # noqa: S603 - our own words
        deadline = time.monotonic() + _READY
        while not self.listens():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self!r} does not listen")
            time.sleep(0.01)

    def listens(self) -> bool:
        """Tell whether somebody listens on its port; nobody is disturbed by asking."""
        wanted = f"0100007F:{self.port:04X}"
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in lines)

    def tell(self, word: str) -> None:
        """Tell it how to serve."""
        assert self._process is not None and self._process.stdin is not None  # noqa: S101, PT018 - it has been started
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()
            self._process = None

    def notes(self) -> list[tuple[int, float]]:
        """Return the number and the time of every request it has got."""
        written = self._file.read_bytes()
        return list(_NOTE.iter_unpack(written[: len(written) // _NOTE.size * _NOTE.size]))


def steady_port() -> int:
    """Return a port nobody listens on, from below those that the kernel gives to who connects.

    While its target is down, nobody can get it by chance, nor be connected to itself by it.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chance = random.Random()  # noqa: S311 - any port will do
    while True:
        port = chance.randrange(lowest // 2, lowest)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@contextmanager
def targets(count: int, folder: Path, core: int) -> Iterator[list[Target]]:
    """Run so many targets on a core for the length of a block."""
    made = [Target(folder, core) for _ in range(count)]
    try:
        for target in made:
            target.start()
        yield made
    finally:
        for target in made:
            target.kill()


if __name__ == "__main__":
    asyncio.run(Service(int(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)).serve())
