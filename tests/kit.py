"""Building blocks of tests: a gateway on a free port, raw upstreams, a raw client, fake clocks.

Everything runs on loopback. Upstreams and clients are plain sockets, so that assertions are about bytes on the wire.
"""

import asyncio
import atexit
import copy
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from api_gateway.admin.locality import LoopbackRule
from api_gateway.config import GatewayConfig
from api_gateway.downstream.listener import connection_limits
from api_gateway.process.server import GatewayServer
from api_gateway.settings.server import ServerSection
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks

PATIENCE = 30.0  # seconds that a condition may take before a test fails
START_PATIENCE = 45.0  # seconds that a gateway may take to start: imports are slow on a busy machine
LIMITS = connection_limits(ServerSection())  # of downstream connections, by default


class FakeClock:
    """A clock in seconds that advances only by `advance`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        """Advance the clock; return the new time."""
        self.now += seconds
        return self.now


class FakeClocks:
    """The clocks of a gateway, which advance only by `advance`."""

    def __init__(self, monotonic: float = 1000.0, wall: float = 1_800_000_000.0) -> None:
        self._passed_ns = 0
        self._began = monotonic, wall

    @property
    def clocks(self) -> Clocks:
        """The value for `create_app`."""
        monotonic, wall = self._began
        return Clocks(
            monotonic=lambda: monotonic + self._passed_ns / 1e9,
            monotonic_ns=lambda: int(monotonic * 1e9) + self._passed_ns,
            wall=lambda: wall + self._passed_ns / 1e9,
        )

    def advance(self, seconds: float) -> None:
        """Advance all three clocks."""
        self._passed_ns += round(seconds * 1e9)


def eventually(condition: Callable[[], bool], what: str, within: float = PATIENCE) -> None:
    """Wait until `condition` is true; fail with `what` after `within` seconds."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, f"did not happen within {within:g} s: {what}"
        time.sleep(0.01)


async def soon(condition: Callable[[], bool], what: str, within: float = PATIENCE) -> float:
    """Wait in the event loop until `condition` is true; return the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within, f"did not happen within {within:g} s: {what}"
        await asyncio.sleep(0.002)
    return time.monotonic() - began


async def turns(count: int = 5) -> None:
    """Let the event loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextmanager
def case(*names: object) -> Iterator[None]:
    """Name one of the cases that a test goes through, if it fails."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the case {' - '.join(map(str, names))}")
        raise


def stalled(measure: Callable[[], int], pause: float = 0.2) -> int:
    """Return what `measure` gives once it has not grown for `pause` seconds."""
    before = -1
    while (found := measure()) != before:
        before = found
        time.sleep(pause)
    return found


# The gateway


def _config(sections: dict[str, Any], state_dir: Path) -> GatewayConfig:
    # On a busy machine the event loop is late, and would shed requests.
    server = {"port": 0, "max_event_loop_lag": None, **sections.get("server", {})}
    defaults: dict[str, Any] = {"state_dir": state_dir, "log": {"access": False}}
    return GatewayConfig.model_validate(defaults | sections | {"server": server})


class RunningGateway:
    """A gateway in a thread, on a free port."""

    def __init__(
        self,
        sections: dict[str, Any] | GatewayConfig,
        state_dir: Path,
        clocks: Clocks = SYSTEM_CLOCKS,
        read: Callable[[], GatewayConfig] | None = None,
    ) -> None:
        self.config = sections if isinstance(sections, GatewayConfig) else _config(sections, state_dir)
        # The tests' process also serves upstreams, so the gateway would not accept its requests as local.
        self.server = GatewayServer(self.config, read=read, locality=LoopbackRule(), clocks=clocks)
        # uvicorn knows whole seconds only; a test need not wait for the rest of one.
        self.server.config.timeout_graceful_shutdown = self.config.server.drain_timeout  # type: ignore[assignment]
        self._thread = threading.Thread(target=self.server.run, name="gateway")
        self._thread.start()
        is_serving = self.server.is_serving
        eventually(lambda: is_serving.is_set() or not self._thread.is_alive(), "the gateway starts", START_PATIENCE)
        assert is_serving.is_set(), "the gateway did not start"
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def live(self) -> Any:
        """The objects of the running gateway, which has recorded whatever it has sent before."""
        self._end_turn()
        gateway = self.server._app.state.gateway
        upstreams = {name: service.upstream for name, service in gateway.upstream_clients.items()}
        return SimpleNamespace(
            recorder=gateway.recorder, upstreams=upstreams, clients=gateway.clients, limiter=gateway.limiter
        )

    def _end_turn(self) -> None:
        """Wait until the present turn of the event loop has ended: requests are recorded in the one that responds."""
        if threading.current_thread() is not self._thread:
            has_ended = threading.Event()
            with suppress(RuntimeError):  # the event loop is closed
                self.server._loop.call_soon_threadsafe(has_ended.set)
                has_ended.wait(PATIENCE)

    def stop(self) -> None:
        """Stop the gateway and wait for its thread."""
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the gateway did not stop"


@contextmanager
def running_gateway(
    sections: dict[str, Any], state_dir: Path, clocks: Clocks = SYSTEM_CLOCKS
) -> Iterator[RunningGateway]:
    """Run a gateway within this block."""
    gateway = RunningGateway(sections, state_dir, clocks)
    try:
        yield gateway
    finally:
        gateway.stop()


def in_front_of(*urls: str, **upstream: Any) -> dict[str, Any]:
    """Return sections that forward all of /api, prefix included, to one upstream `up` with these targets."""
    return {
        "upstreams": {"up": {"targets": [{"url": url} for url in urls], **upstream}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
    }


# Plain HTTP


@dataclass
class Answer:
    """A complete response from urllib."""

    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        """Parse the body."""
        return json.loads(self.body)


def ask(url: str, *, method: str = "GET", headers: dict[str, str] | None = None, body: bytes | None = None) -> Answer:
    """Send one request on a new connection; an error status is not an exception."""
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return Answer(response.status, response.headers, response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


# Raw sockets


@dataclass
class RawRequest:
    """A request as it arrived at an upstream, byte for byte; `body` is without chunked framing."""

    head: bytes
    body: bytes = b""
    is_complete: bool = False

    @property
    def line(self) -> bytes:
        """The request line."""
        return self.head.split(b"\r\n", 1)[0]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Names as they came, and values."""
        lines = self.head.rstrip(b"\r\n").split(b"\r\n")[1:]
        return [(name, value.strip()) for name, _, value in (line.partition(b":") for line in lines)]

    def all(self, name: str) -> list[bytes]:
        """Every value of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower().encode()]


class Wire:
    """One connection with a buffer, to read heads and bodies and to send bytes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.settimeout(PATIENCE)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self.sock.sendall(data)

    def unread_by_peer(self) -> int:
        """Return the bytes that a peer on this machine has not read; 0 if that is unknown.

        Raises OSError if the connection has ended.
        """
        table = Path("/proc/net/tcp")
        if not table.exists():
            return 0
        ours, theirs = self.sock.getsockname()[1], self.sock.getpeername()[1]
        # A search in bytes: the table has a line for each connection of the machine, and they may be many thousand.
        peer = re.search(rb":%04X [0-9A-F]+:%04X [0-9A-F]+ [0-9A-F]+:([0-9A-F]+)" % (theirs, ours), table.read_bytes())
        return 0 if peer is None else int(peer[1], 16)

    def fill(self, most: int = 65_536) -> bool:
        """Read more into the buffer; False at the end of the connection."""
        try:
            data = self.sock.recv(most)
        except (ConnectionResetError, BrokenPipeError):
            return False
        self.buffer += data
        return bool(data)

    def read_until(self, mark: bytes) -> bytes | None:
        """Return everything up to and including `mark`, or None if the connection ends before."""
        while mark not in self.buffer:
            if not self.fill():
                return None
        found, _, self.buffer = self.buffer.partition(mark)
        return found + mark

    def read_exactly(self, size: int) -> bytes:
        """Return `size` bytes, or fewer if the connection ends before."""
        pieces: list[bytes] = []  # joined at the end: a large body arrives in thousands
        while len(self.buffer) < size:
            pieces.append(self.buffer)
            size -= len(self.buffer)
            self.buffer = b""
            if not self.fill(1_048_576):
                break
        pieces.append(self.buffer[:size])
        self.buffer = self.buffer[size:]
        return b"".join(pieces)

    def read_body(self, headers: list[tuple[bytes, bytes]]) -> tuple[bytes, bool]:
        """Return the body that these header fields frame, and whether it is complete."""
        values = {name.lower(): value for name, value in headers}
        if b"chunked" in values.get(b"transfer-encoding", b"").lower():
            return self._read_chunks()
        if b"content-length" in values:
            size = int(values[b"content-length"])
            body = self.read_exactly(size)
            return body, len(body) == size
        return b"", True

    def _read_chunks(self) -> tuple[bytes, bool]:
        body = b""
        while True:
            line = self.read_until(b"\r\n")
            if line is None:
                return body, False
            size = int(line.split(b";")[0], 16)
            if size == 0:
                self.trailers = []
                while (line := self.read_until(b"\r\n")) not in (None, b"\r\n"):
                    self.trailers.append(line.strip())
                return body, line is not None
            piece = self.read_exactly(size)
            body += piece
            if len(piece) < size or self.read_exactly(2) != b"\r\n":
                return body, False

    def is_closed(self, within: float = PATIENCE) -> bool:
        """Return whether the peer closes within this time without sending anything before."""
        self.sock.settimeout(within)
        try:
            return not self.buffer and not self.fill()
        except TimeoutError:
            return False
        finally:
            self.sock.settimeout(PATIENCE)

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        """Close."""
        self.sock.close()


Behaviour = Callable[[Wire, RawRequest], bool | None]


def reply(body: bytes = b"ok", status: bytes = b"200 OK", headers: tuple[tuple[bytes, bytes], ...] = ()) -> Behaviour:
    """Return a behaviour that sends the same response to every request."""

    def behave(wire: Wire, _request: RawRequest) -> None:
        lines = b"".join(b"%b: %b\r\n" % pair for pair in headers)
        wire.send(b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, lines, len(body), body))

    return behave


@dataclass
class RawUpstream:
    """A server that calls `behave` for each request; a behaviour that returns False ends the connection.

    If `reads_body` is False, the behaviour is called when the head has arrived, and reads the body itself.
    """

    behave: Behaviour = field(default_factory=reply)
    reads_body: bool = True
    address: tuple[str, int] = ("127.0.0.1", 0)

    def __post_init__(self) -> None:
        self.requests: list[RawRequest] = []
        self.wires: list[Wire] = []
        self.listen(self.address[1])
        self.url = f"http://{self.address[0]}:{self.port}"

    def listen(self, port: int = 0) -> None:
        """Begin to listen, also after `close`."""
        self._listener = socket.create_server((self.address[0], port), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                wire = Wire(self._listener.accept()[0])
                self.wires.append(wire)
                threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        with suppress(OSError, ValueError):
            while (head := wire.read_until(b"\r\n\r\n")) is not None:
                request = RawRequest(head)
                self.requests.append(request)
                if self.reads_body:
                    request.body, request.is_complete = wire.read_body(request.headers)
                    if not request.is_complete:
                        break
                if self.behave(wire, request) is False:
                    break
        wire.close()

    def close(self) -> None:
        """Stop listening and close every connection."""
        with suppress(OSError):  # wakes the accepting thread, which `close` alone does not
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for wire in self.wires:
            wire.close()


@dataclass
class RawAnswer:
    """A response as it arrived at the client; `is_complete`: the whole announced body has arrived."""

    head: bytes
    body: bytes
    is_complete: bool

    @property
    def status(self) -> int:
        """The status code."""
        return int(self.head.split(b" ", 2)[1])

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Names as they came, and values."""
        return RawRequest(self.head).headers

    def all(self, name: str) -> list[bytes]:
        """Every value of a header."""
        return RawRequest(self.head).all(name)


def reason(answer: RawAnswer) -> tuple[int, str]:
    """Return status and reason of a response that the gateway generated, which has come whole."""
    assert answer.is_complete
    assert answer.all("content-type") == [b"application/problem+json"]
    return answer.status, json.loads(answer.body)["reason"]


class RawClient(Wire):
    """A client that sends bytes and reads responses."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        super().__init__(socket.create_connection((host, port), timeout=PATIENCE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(
        self, method: str = "GET", target: str = "/api/x", headers: tuple[str, ...] = (), body: bytes = b""
    ) -> None:
        """Send a request whose header fields are exactly Host and `headers`."""
        lines = "".join(f"{line}\r\n" for line in ("Host: gateway.test", *headers))
        self.send(f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body)

    def answer(self, method: str = "GET") -> RawAnswer:
        """Read one final response; without a length, to the end of the connection."""
        while True:
            head = self.read_until(b"\r\n\r\n")
            assert head is not None, f"the connection ended before the head of a response; got {self.buffer!r}"
            found = RawAnswer(head, b"", is_complete=True)
            if found.status >= 200:
                break
        if method == "HEAD" or found.status in (204, 304):
            return found
        if not found.all("content-length") and not found.all("transfer-encoding"):
            while self.fill():
                pass
            found.body, self.buffer = self.buffer, b""
        else:
            found.body, found.is_complete = self.read_body(found.headers)
        return found

    def get(self, target: str = "/api/x", headers: tuple[str, ...] = ()) -> RawAnswer:
        """Send a GET and read its response."""
        self.request("GET", target, headers)
        return self.answer()


@cache
def refusing_url() -> str:
    """Return the URL of a port on which nobody listens. It is bound, so that no other test's server gets it."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    atexit.register(holder.close)
    return f"http://127.0.0.1:{holder.getsockname()[1]}"


_BLOCK = 100  # ports


def free_port() -> int:
    """Return a port on which nothing listens, and which nobody else gets until a server of this test opens it."""
    for port in _own_ports():
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the ports of a test process are endless")


@cache
def _own_ports() -> Iterator[int]:
    """Return the ports of this process: a block whose first port it holds.

    They are below those that systems choose for a socket without a port of its own (32768 and higher on Linux).
    """
    blocks = list(range(10_000, 16_000, _BLOCK))
    random.Random().shuffle(blocks)
    for first in blocks:
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", first))
        except OSError:
            holder.close()
            continue
        atexit.register(holder.close)
        return itertools.cycle(range(first + 1, first + _BLOCK))
    raise AssertionError("there is no block of free ports")


def attributes_of(thing: object) -> dict[str, Any]:
    """Return a copy of the attributes of an object of ours, nested ones too. A compiled class has no `__dict__`."""
    kinds = types.GetSetDescriptorType, types.MemberDescriptorType
    names = {name for one in type(thing).__mro__ for name, value in vars(one).items() if isinstance(value, kinds)}
    names.update(getattr(thing, "__dict__", ()))
    return {name: _copied(getattr(thing, name)) for name in names if name[:2] != "__" and hasattr(thing, name)}


def _copied(value: object) -> object:
    is_ours = type(value).__module__.startswith("api_gateway.") and not isinstance(value, Enum)
    return attributes_of(value) if is_ours else copy.deepcopy(value)
