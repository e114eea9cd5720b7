"""Control of targets that fail on command: each is a process of `benchmarks.ailing`. Linux only."""

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.ailing import NOTE
from benchmarks.processes import pinned

ROOT = Path(__file__).parent.parent
_READY = 20.0


class Target:
    """A target process, whose mode can be set, and which can be stopped, killed and restarted."""

    def __init__(self, folder: Path, core: int) -> None:
        self.port = steady_port()
        self._file = folder / f"{self.port}.notes"
        self._file.touch()
        self._core = core
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Target on port {self.port} [{'running' if self._process else 'not running'}]>"

    def start(self) -> None:
        """Start the process and wait until it listens. Raises RuntimeError."""
        command = [sys.executable, "-m", "benchmarks.ailing", str(self.port), str(self._file)]
        with pinned(self._core):
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE)  # noqa: S603 - fixed arguments
        deadline = time.monotonic() + _READY
        while not self.listens():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self!r} does not listen")
            time.sleep(0.01)

    def listens(self) -> bool:
        """Return whether its port is listening, without connecting to it."""
        wanted = f"0100007F:{self.port:04X}"
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in lines)

    def tell(self, word: str) -> None:
        """Set its mode; see `benchmarks.ailing`."""
        assert self._process is not None and self._process.stdin is not None  # noqa: S101, PT018 - it has been started
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with suppress(OSError):
                    self._process.stdin.close()
            self._process = None

    def notes(self) -> list[tuple[int, float]]:
        """Return the number and time of every recorded request."""
        written = self._file.read_bytes()
        return list(NOTE.iter_unpack(written[: len(written) // NOTE.size * NOTE.size]))


def steady_port() -> int:
    """Return a free port below the range of ephemeral ports.

    So no connection gets this port while its target is down, and no connection attempt connects to itself.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chance = random.Random()  # noqa: S311 - any port is suitable
    while True:
        port = chance.randrange(lowest // 2, lowest)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


@contextmanager
def targets(count: int, folder: Path, core: int) -> Iterator[list[Target]]:
    """Run this number of targets on a core within this block."""
    made = [Target(folder, core) for _ in range(count)]
    try:
        for target in made:
            target.start()
        yield made
    finally:
        for target in made:
            target.kill()
