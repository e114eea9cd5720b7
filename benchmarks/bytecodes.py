"""How many bytecode instructions a request takes in the gateway, by the features of its route.

`python -m benchmarks.bytecodes` runs a gateway for each feature of `benchmarks.routing` in this process, counts the
instructions of its event loop while it serves requests of one connection, and prints them as a ratio to a plain route.
The count is the same on a busy machine. What happens within one instruction, such as compression, is not in it: see
`python -m benchmarks.routing` for CPU time.
"""

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from api_gateway.config import GatewayConfig
from api_gateway.process.server import GatewayServer
from benchmarks.routing import FEATURES, PLAIN, Feature, sections
from benchmarks.upstream import SMALL

_WARM_UP, _COUNTED = 20, 100  # requests
_PATIENCE = 120.0  # seconds that a gateway may take to start
_RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: origin\r\nContent-Type: application/json\r\nDate: Mon, 30 Nov 2026 00:00:00 GMT\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(SMALL), SMALL)
)


class Counter:
    """Counts the bytecode instructions of a thread, once `begin` was called there."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self) -> None:
        """Count the instructions of functions that this thread calls from now on."""
        sys.settrace(self._enter)

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, _frame: FrameType, event: str, _argument: object) -> Any:
        if event == "opcode":
            self.count += 1
        return self._step


@contextmanager
def _origin() -> Iterator[int]:
    """Run an upstream that responds to each read with the same response; yield its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65_536):
                connection.sendall(_RESPONSE)

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


@contextmanager
def _gateway(config: GatewayConfig) -> Iterator[GatewayServer]:
    """Run a gateway in a thread."""
    server = GatewayServer(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + _PATIENCE
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.05)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


def counted(feature: Feature, folder: Path, origin: int) -> float:
    """Return the instructions of a request to a route with a feature."""
    more = {"server": {"port": 0, "max_event_loop_lag": None}, "state_dir": folder, "log": {"access": False}}
    tiers = {"tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000}}}
    counter = Counter()
    with _gateway(GatewayConfig.model_validate({**more, **tiers, **sections(feature, origin)})) as server:
        listening = server.servers[0]
        fields = "".join(f"{name}: {value}\r\n" for name, value in feature.headers.items())
        head = f"GET /api/{feature.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n".encode()
        with socket.create_connection(listening.sockets[0].getsockname()[:2]) as client:
            for number in range(_WARM_UP + _COUNTED):
                if number == _WARM_UP // 2:
                    listening.get_loop().call_soon_threadsafe(counter.begin)
                if number == _WARM_UP:
                    counter.count = 0
                client.sendall(head)
                _receive(client, feature.status)
            return counter.count / _COUNTED


def _receive(client: socket.socket, status: int) -> None:
    """Receive a whole response with this status."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(65_536)
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 %d" % status):
        raise SystemExit(head.decode())
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    length = lines.get(b"content-length")
    while len(body) < int(length) if length is not None else not body.endswith(b"0\r\n\r\n"):
        body += client.recv(65_536)


def main(_arguments: Sequence[str] | None = None) -> int:
    """Count, and print a table."""
    with tempfile.TemporaryDirectory() as folder, _origin() as origin:
        plain = counted(Feature({}, 0), Path(folder, PLAIN), origin)
        print(f"{PLAIN:32} {plain:8.0f}")  # noqa: T201 - a program
        for number, (name, feature) in enumerate(FEATURES.items()):
            found = counted(feature, Path(folder, str(number)), origin)
            print(f"{name:32} {found:8.0f} {found / plain:6.3f}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
