"""Downstream connections on a transport and an event loop that do nothing by themselves, with a clock that is set."""

import asyncio
import re
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Self, cast

import uvicorn
from uvicorn.server import ServerState

from api_gateway.downstream.closing import last_response
from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.connection_factory import ConnectionFactory
from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.errors import GatewayError
from api_gateway.http1.asgi import SERVER_EXTENSION, FastPathHandler, InFlight
from api_gateway.http1.fast_parser import lines_of, parse_request_head
from api_gateway.http1.request_head import RequestHead
from tests.kit import LIMITS

PEER, OWN = "192.0.2.1", ("192.0.2.2", 80)
STALLED_AT = 100  # bytes that a client which does not read leaves in the transport before writing is paused


class StillLoop(asyncio.SelectorEventLoop):
    """An event loop whose time only passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__()

    def time(self) -> float:
        return self.now

    def turn(self, count: int = 1) -> None:
        """Run what is ready, and what that makes ready, that many times."""
        for _ in range(count):
            self.call_soon(self.stop)
            self.run_forever()

    def live_timers(self) -> list[Any]:
        """Return the timers that would still fire."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]  # no public view
        return [timer for timer in scheduled if not timer.cancelled()]


class FakeTransport(asyncio.Transport):
    """The client's end: collects what is sent; stops to read while `is_stalled`."""

    def __init__(self, loop: StillLoop, peer: str = PEER) -> None:
        sock = SimpleNamespace(family=socket.AF_INET, getpeername=lambda: (peer, 4711), getsockname=lambda: OWN)
        super().__init__({"socket": sock})
        self.loop = loop
        self.protocol: Any = None
        self.sent = bytearray()  # what the client has read
        self.pending = bytearray()  # what it has not read
        self.is_stalled = self.has_eof = self.is_lost = False
        self._is_reading = True
        self._is_closing = self._is_paused = False

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_protocol(self) -> Any:
        return self.protocol

    def is_reading(self) -> bool:
        return self._is_reading and not self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        assert not self._is_closing, "a closed transport does not read"
        self._is_reading = True

    def is_closing(self) -> bool:
        return self._is_closing

    def write(self, data: Any) -> None:
        assert not self.has_eof, "nothing may be written behind the end"
        if self._is_closing and not self.pending:
            return
        self.pending += data
        if not self.is_stalled:
            self.flush()
        elif len(self.pending) > STALLED_AT and not self._is_paused:
            self._is_paused = True
            self.protocol.pause_writing()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def flush(self) -> None:
        """Let the client read everything."""
        self.sent += self.pending
        self.pending.clear()
        if self._is_paused:
            self._is_paused = False
            self.protocol.resume_writing()
        if self._is_closing:
            self.loop.call_soon(self.lose, None)

    def get_write_buffer_size(self) -> int:
        return len(self.pending)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._is_closing:
            self.has_eof = True

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            if not self.pending:
                self.loop.call_soon(self.lose, None)

    def abort(self) -> None:
        self._is_closing = True
        self.pending.clear()
        self.loop.call_soon(self.lose, None)

    def lose(self, error: Exception | None) -> None:
        """End the connection, once."""
        self._is_closing = True
        if not self.is_lost:
            self.is_lost = True
            self.protocol.connection_lost(error)


class Client:
    """A connected client and the gateway's connection with it."""

    def __init__(self, connection: DownstreamConnection, transport: FakeTransport) -> None:
        self.connection = connection
        self.transport = transport

    @property
    def sent(self) -> bytes:
        """What the client has received."""
        return bytes(self.transport.sent)

    def receive(self, data: bytes) -> None:
        """Let the connection receive bytes of the client."""
        assert self.transport.is_reading()
        self.transport.protocol.data_received(data)

    def end(self) -> None:
        """Let the client end its side."""
        if not self.transport.protocol.eof_received():
            self.transport.close()

    def lose(self, error: Exception | None) -> None:
        """Let the connection be lost."""
        self.transport.lose(error)


def response(number: int, *, size: int = 8) -> tuple[bytes, bytes]:
    """Return head and body of the response to a numbered request."""
    return (
        b"HTTP/1.1 200 OK\r\nx-number: %d\r\ncontent-length: %d\r\n\r\n" % (number, size),
        b"x" * size,
    )


class FakeExchange:
    """A request in flight on the fast path, which ends when it is told to."""

    is_handshake = False

    def __init__(
        self, fast_path: "FakeFastPath", client: DownstreamConnection, parts: Any, number: int, *, is_parsed: bool
    ) -> None:
        self._fast_path = fast_path
        self._client = client
        self._parts = parts
        self.number = number
        self.keep_alive = b"close" not in parts[3]
        self.is_last = not self.keep_alive
        self.is_head_sent = False
        length = re.search(rb"(?i)content-length: (\d+)", parts[3])
        self.left = (int(length[1]) if length else 0) - len(parts[4])
        is_chunked = b"transfer-encoding" in parts[3].lower()
        self.body: FakeBody | None = FakeBody(client) if self.left or is_chunked else None
        self._is_parsed = is_parsed

    def begin(self) -> None:
        self._fast_path.exchanges.append(self)
        self.again()

    def again(self) -> None:
        """Begin to forward, after a question of admission."""
        self._client.begin_exchange(cast("InFlight", self))
        if self.body is not None and not self.body.is_complete:
            self._client.receive_body(self.body, 0 if self._is_parsed else self.left)

    def finish(self) -> None:
        """Respond."""
        self._fast_path.exchanges.remove(self)
        if self.body is not None:
            self.body.is_response_complete = True
        self._client.transport.write(b"".join(response(self.number)))
        self._client.end_exchange(keep_alive=self.keep_alive)

    def on_writable(self) -> None:
        assert self in self._fast_path.exchanges

    def on_client_disconnected(self) -> None:
        self._fast_path.exchanges.remove(self)
        if self.body is not None:
            self.body.is_response_complete = True
        self._client.end_exchange(keep_alive=False)

    on_forced_close = on_client_disconnected

    def on_drain(self) -> None:
        assert self in self._fast_path.exchanges

    def on_refused(self, error: GatewayError) -> None:
        """Respond with an error, in a form that the walk knows."""
        self._client.transport.write(last_response(error, []))
        self.on_client_disconnected()


class FakeBody:
    """The body of a request on the fast path, which is dropped. Each piece pauses reading for a while."""

    awaits_continue = False
    body_rate: float | None = None
    body_due: float | None = None
    body_credit = 0.0
    is_started = False
    is_response_complete = False
    is_body_continued = False
    is_complete = False

    def __init__(self, client: DownstreamConnection) -> None:
        self._client = client

    def feed(self, _piece: bytes) -> bool:
        assert not self.is_response_complete
        self._client.loop.call_soon(self._client.resume_reading)
        return True

    def announce(self, size: int) -> None:
        """Do nothing."""

    def end_body(self) -> None:
        self.is_complete = True

    def discard_body(self) -> None:
        """Do nothing."""

    def disconnect(self) -> None:
        """Do nothing."""


class FakeFastPath:
    """Serves plain requests by the first letter of their path: see `try_handle`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.exchanges: list[FakeExchange] = []

    def refusal_fields(self, _headers: Any, _target: bytes) -> list[tuple[bytes, bytes]]:
        return []

    def try_handle(self, client: Any, received: bytes) -> bool:
        """Respond at once (/w), begin an exchange (/e), or leave the request to the ASGI path or the parser."""
        parts = parse_request_head(received)
        if parts is None or b": " not in parts[3] or b"transfer-encoding" in parts[3].lower():
            return False
        return self._try(client, parts, is_parsed=False)

    def try_head(self, client: Any, head: RequestHead, _trailers: Any) -> bool:
        """Do the same for a request whose head the general parser has read."""
        path, mark, query = head.target.partition(b"?")
        return self._try(client, (head.method, path, mark + query, lines_of(head.headers), b""), is_parsed=True)

    def _try(self, client: Any, parts: tuple[str, bytes, bytes, bytes, bytes], *, is_parsed: bool) -> bool:
        if parts[1][1:2] not in (b"w", b"e") or b"expect" in parts[3].lower():
            return False
        exchange = FakeExchange(self, client, parts, int(parts[1][2:]), is_parsed=is_parsed)
        if exchange.left < 0 or (exchange.body is not None and parts[1][1:2] != b"e"):
            return False
        if parts[1][1:2] == b"w":
            whole = b"".join(response(exchange.number))
            client.write_response(whole, keep_alive=exchange.keep_alive, is_last=exchange.is_last)
        else:
            exchange.begin()
        return True


class FakeApp:
    """An application that serves numbered requests by the first letter of their path, such as /g7.

    /g waits for `gates` before it responds, /p in the middle of its body; /b reads the body first, /i does not; /x
    fails; /t sends much; /h accepts a handshake. Others respond at once.
    """

    def __init__(self) -> None:
        self.gates: list[asyncio.Future[None]] = []
        self.fast_path: Any = SimpleNamespace(current=cast("FastPathHandler", FakeFastPath(self)))
        self.tunnels = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind, number = scope["path"][1:2], int(scope["path"][2:])
        if kind == "x":
            raise RuntimeError("as asked for")
        if kind == "h" and scope[SERVER_EXTENSION].upgrade:
            await self._tunnel(scope[SERVER_EXTENSION], number)
            return
        if kind == "b":
            message = {"more_body": True}
            while message.get("more_body"):
                message = await receive()
        if kind == "g":
            await self._gate()
        head, body = response(number, size=1000 if kind == "t" else 8)
        headers = [tuple(line.split(b": ")) for line in head.split(b"\r\n")[1:-2]]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if kind == "p":
            await send({"type": "http.response.body", "body": body[:3], "more_body": True})
            await self._gate()
            body = body[3:]
        await send({"type": "http.response.body", "body": body})

    async def _gate(self) -> None:
        gate = asyncio.get_running_loop().create_future()
        self.gates.append(gate)
        await gate

    async def _tunnel(self, extension: Any, number: int) -> None:
        transport, _ = extension.switch_protocols(b"Switching Protocols", [(b"x-number", b"%d" % number)])
        tunnel = FakeTunnel(transport)
        self.tunnels += 1
        await tunnel.lost


class FakeTunnel(asyncio.Protocol):
    """What takes the transport over; tells the connection of its loss."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._before: Any = transport.get_protocol()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transport.set_protocol(self)
        if transport.is_closing():
            self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._before.connection_lost(exc)
        if not self.lost.done():
            self.lost.set_result(None)


class Harness:
    """A listener with one connected client. On exit, everything ends."""

    def __init__(self, limits: ConnectionLimits = LIMITS, app: Callable[[], Any] = FakeApp) -> None:
        self.loop = StillLoop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.app = app()
        self._config = uvicorn.Config(self.app, log_config=None, access_log=False, proxy_headers=False)
        self._config.load()
        self.state = ServerState()
        self.refused: Counter[str] = Counter()
        self.factory = ConnectionFactory(replace(limits, connections_per_peer=2), self.refused)
        self.client = self.connect()
        self.connection = self.client.connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        connections: list[Any] = list(self.state.connections)
        for connection in connections:
            connection.transport.lose(None)
        self.open_gates()
        self.turn(5)
        for task in list(self.state.tasks):
            task.cancel()
        self.turn(5)
        self.loop.close()

    def connect(self) -> Client:
        """Connect one more client from the same address."""
        connection = self.factory.connection(self._config, self.state, {}, self.loop)
        transport = FakeTransport(self.loop)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        return Client(connection, transport)

    def turn(self, count: int = 3) -> None:
        """Let the loop run for some turns."""
        self.loop.turn(count)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.loop.now += seconds
        self.turn()

    def open_gates(self) -> None:
        """Let all applications respond."""
        for gate in self.app.gates:
            if not gate.done():
                gate.set_result(None)
        self.app.gates.clear()
