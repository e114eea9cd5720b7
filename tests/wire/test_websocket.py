"""WebSockets through the gateway: the handshake as HTTP, then a tunnel byte for byte, and nothing left at the end."""

import asyncio
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from api_gateway.proxy.websocket_tunnel import Tunnel
from tests.kit import (
    PATIENCE,
    Behaviour,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reason,
    refusing_url,
    reply,
    stalled,
    turns,
)

SOON = 2.0
MIB = 1024 * 1024
PIECE = bytes(range(256)) * 256
SIZE = 64 * MIB
# What the kernel's buffers and the gateway may hold of what nobody reads; Linux lets a receive buffer grow to 32 MiB.
UNDER_WAY = 40 * MIB
SILENCE = 0.4
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ASKING = ("Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13")
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
SWITCHED = SWITCH + b"Sec-WebSocket-Accept: " + ACCEPT + b"\r\n\r\n"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = False) -> bytes:
    """Return one frame of RFC 6455 section 5.2."""
    size = len(payload)
    mark = 128 * masked
    if size < 126:
        head = struct.pack("!BB", opcode + 128 * final, mark + size)
    elif size < 65_536:
        head = struct.pack("!BBH", opcode + 128 * final, mark + 126, size)
    else:
        head = struct.pack("!BBQ", opcode + 128 * final, mark + 127, size)
    if not masked:
        return head + payload
    key = b"\x01\x02\x03\x04"
    covered = int.from_bytes(payload, "big") ^ int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return head + key + covered.to_bytes(size, "big")


def accepting(then: Callable[[Wire], object], behind: bytes = b"") -> Behaviour:
    """Return a behaviour that accepts any handshake, with `behind` in the same segment, and ends after `then`."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(SWITCHED + behind)
        then(wire)
        return False

    return behave


def echo(wire: Wire) -> None:
    """Send back whatever comes."""
    while wire.buffer or wire.fill():
        data, wire.buffer = wire.buffer, b""
        wire.send(data)


def until_it_ends(wire: Wire) -> None:
    """Read to the end of the connection."""
    while wire.fill():
        pass


class Ending:
    """Something to do in a tunnel that tells when the gateway has closed it."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def __call__(self, wire: Wire) -> None:
        until_it_ends(wire)
        self.ended.set()


def small_buffers(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)


def flood(wire: Wire, sent: list[int]) -> None:
    """Send `SIZE` bytes and count them."""
    while sent[0] < SIZE:
        wire.send(PIECE)
        sent[0] += len(PIECE)


def is_flood(wire: Wire) -> bool:
    """Read `SIZE` bytes and tell whether they are those that were sent."""
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
    return all(wire.read_exactly(len(PIECE)) == PIECE for _ in range(SIZE // len(PIECE)))


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    """A gateway with further upstreams for what tunnels may not exceed: time, connections, tokens, failures."""
    sections = in_front_of(shared.url, retry={"attempts": 1}, circuit_breaker={"failure_threshold": 1000})
    target = [{"url": shared.url}]
    sections["upstreams"] |= {
        "brief": {"targets": target, "timeouts": {"tunnel": SILENCE}},
        "narrow": {"targets": target, "pool": {"max_connections": 1, "max_tunnels": 1}, "timeouts": {"connect": 0.2}},
        "fragile": {"targets": target, "circuit_breaker": {"failure_threshold": 1}},
        "down": {"targets": [{"url": refusing_url()}]},
    }
    sections["routes"] += [
        {"name": name, "path": f"/api/{name}", "upstream": name} for name in ("brief", "narrow", "fragile", "down")
    ]
    sections["tiers"]["ONCE"] = {"rate": 0.001, "capacity": 1}
    sections["clients"] = {"poor": {"tier": "ONCE"}}
    sections["server"] = {"drain_timeout": 1}
    return sections


@pytest.fixture
def up(shared: RawUpstream) -> RawUpstream:
    shared.behave = accepting(echo)
    shared.requests.clear()
    return shared


def ask(client: RawClient, target: str = "/api/x", *headers: str, behind: bytes = b"") -> None:
    """Send a handshake."""
    client.request("GET", target, (*ASKING, *headers), behind)


def opened(client: RawClient, target: str = "/api/x", *headers: str, behind: bytes = b"") -> RawAnswer:
    """Open a tunnel and return the head of the response; all that follows is in the new protocol."""
    ask(client, target, *headers, behind=behind)
    head = client.read_until(b"\r\n\r\n")
    assert head is not None
    answer = RawAnswer(head, b"", is_complete=True)
    assert answer.status == 101
    return answer


# The handshake


def test_the_handshake_reaches_the_upstream(client: RawClient, up: RawUpstream) -> None:
    """As it was spelt, with what the gateway adds to every request, and asking for the same switch."""
    opened(client, "/api/chat?room=1", "Sec-WebSocket-Protocol: chat, v2", "X-MiXed: 1", "Origin: http://a.test")
    request = up.requests[0]
    assert request.line == b"GET /api/chat?room=1 HTTP/1.1"
    for pair in [
        (b"Sec-WebSocket-Key", KEY.encode()),
        (b"Sec-WebSocket-Version", b"13"),
        (b"Sec-WebSocket-Protocol", b"chat, v2"),
        (b"X-MiXed", b"1"),
        (b"Origin", b"http://a.test"),
    ]:
        assert request.headers.count(pair) == 1
    assert [value.lower() for value in request.all("connection")] == [b"upgrade"]
    assert request.all("upgrade") == [b"websocket"]
    assert request.all("x-forwarded-for") == [b"127.0.0.1"]
    assert request.all("x-forwarded-proto") == [b"http"]
    assert request.all("x-forwarded-host") == [b"gateway.test"]
    assert len(request.all("x-request-id")) == 1


def test_the_response_to_the_handshake_reaches_the_client(client: RawClient, up: RawUpstream) -> None:
    head = SWITCH.replace(b"Switching Protocols", b"Off We Go")
    more = b"SEC-WebSocket-accept: " + ACCEPT + b"\r\nSec-WebSocket-Protocol: v2\r\nX-MiXed: 2\r\n"
    more += b"Content-Length: 5\r\n\r\n"  # a mistake of the upstream, see RFC 9110 section 8.6

    def switches(wire: Wire, _request: RawRequest) -> None:
        wire.send(head + more)
        until_it_ends(wire)

    up.behave = switches
    answer = opened(client)
    assert answer.head.startswith(b"HTTP/1.1 101 Off We Go\r\n")
    assert (b"SEC-WebSocket-accept", ACCEPT) in answer.headers
    assert answer.all("sec-websocket-protocol") == [b"v2"]
    assert (b"X-MiXed", b"2") in answer.headers
    assert [value.lower() for value in answer.all("connection")] == [b"upgrade"]
    assert answer.all("upgrade") == [b"websocket"]
    assert answer.all("x-request-id") == up.requests[0].all("x-request-id")
    assert answer.all("content-length") == answer.all("transfer-encoding") == []


@pytest.mark.parametrize("headers", [("upgrade: WebSocket", "connection: keep-alive, upgrade"), ASKING[:2]])
def test_the_upgrade_field_is_case_insensitive(client: RawClient, up: RawUpstream, headers: tuple[str, ...]) -> None:
    client.request("GET", "/api/x", headers)
    head = client.read_until(b"\r\n\r\n")
    assert head is not None
    assert head.startswith(b"HTTP/1.1 101 ")


# What flows

FRAMES = {
    "text": frame(TEXT, "grüße".encode(), masked=True),
    "binary": frame(BINARY, bytes(range(256)), masked=True),
    "empty": frame(TEXT, masked=True),
    "fragments": frame(TEXT, b"one ", final=False, masked=True) + frame(0, b"two", masked=True),
    "ping": frame(PING, b"p", masked=True),
    "pong": frame(PONG, masked=True),
    "close": frame(CLOSE, struct.pack("!H", 4321) + b"because", masked=True),
    "1 MiB": frame(BINARY, bytes(MIB), masked=True),
    "not a frame": b"\xff\r\n\r\nGET / HTTP/1.1\r\n\r\n\0",
}


@pytest.mark.parametrize("data", FRAMES.values(), ids=FRAMES)
def test_frames_pass_byte_for_byte_in_both_directions(client: RawClient, data: bytes) -> None:
    opened(client)
    sending = threading.Thread(target=client.send, args=(data,))
    sending.start()
    assert client.read_exactly(len(data)) == data
    sending.join(PATIENCE)


def test_what_the_upstream_sends_with_its_101_is_not_lost(client: RawClient, up: RawUpstream) -> None:
    up.behave = accepting(echo, behind=frame(TEXT, b"welcome"))
    opened(client)
    assert client.read_exactly(9) == frame(TEXT, b"welcome")
    client.send(b"more")
    assert client.read_exactly(4) == b"more"


def test_what_the_upstream_sends_with_its_101_comes_though_it_leaves(client: RawClient, up: RawUpstream) -> None:
    up.behave = accepting(lambda _wire: None, behind=PIECE)
    opened(client)
    assert client.read_exactly(len(PIECE)) == PIECE
    assert client.is_closed(within=SOON)


@pytest.mark.parametrize("data", [b"eager", PIECE * 4], ids=["little", "much"])
def test_what_the_client_sends_behind_its_handshake_is_not_lost(
    client: RawClient, up: RawUpstream, data: bytes
) -> None:
    """Also while the upstream has yet to decide."""

    def slowly(wire: Wire, request: RawRequest) -> None:
        time.sleep(0.1)
        accepting(echo)(wire, request)

    up.behave = slowly
    sending = threading.Thread(target=ask, args=(client,), kwargs={"behind": data})
    sending.start()
    assert (client.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 101 ")
    assert client.read_exactly(len(data)) == data
    sending.join(PATIENCE)


def test_a_client_that_does_not_read_makes_the_upstream_wait(client: RawClient, up: RawUpstream) -> None:
    sent = [0]

    def send(wire: Wire) -> None:
        small_buffers(wire.sock)
        flood(wire, sent)

    up.behave = accepting(send)
    small_buffers(client.sock)
    opened(client)
    assert stalled(lambda: sent[0]) < UNDER_WAY
    assert is_flood(client)


def test_an_upstream_that_does_not_read_makes_the_client_wait(client: RawClient, up: RawUpstream) -> None:
    gate, whole = threading.Event(), threading.Event()

    def receive(wire: Wire) -> None:
        small_buffers(wire.sock)
        gate.wait(PATIENCE)
        if is_flood(wire):
            whole.set()

    up.behave = accepting(receive)
    small_buffers(client.sock)
    opened(client)
    sent = [0]
    sending = threading.Thread(target=flood, args=(client, sent))
    sending.start()
    assert stalled(lambda: sent[0]) < UNDER_WAY
    gate.set()
    assert whole.wait(PATIENCE)
    sending.join(PATIENCE)


# The end


@pytest.mark.parametrize("leave", [RawClient.close, RawClient.reset])
def test_a_client_that_disconnects_closes_the_upstream_connection(
    running: RunningGateway, client: RawClient, up: RawUpstream, leave: Callable[[RawClient], None]
) -> None:
    tunnel = Ending()
    up.behave = accepting(tunnel)
    opened(client)
    leave(client)
    assert tunnel.ended.wait(SOON)
    eventually(lambda: running.live.recorder.in_flight == 0, "the exchange ends", within=SOON)


@pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
def test_an_upstream_that_disconnects_closes_the_client_connection(
    running: RunningGateway, client: RawClient, up: RawUpstream, leave: Callable[[Wire], None]
) -> None:
    up.behave = accepting(leave)
    opened(client)
    assert client.is_closed(within=SOON)
    eventually(lambda: running.live.recorder.in_flight == 0, "the exchange ends", within=SOON)


async def test_a_close_frame_that_came_before_a_reset_is_forwarded_although_sending_fails_first() -> None:
    """A server that refuses a message sends a close frame, and closes without reading the rest of the message."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = [socket.create_connection(listener.getsockname()) for _ in range(2)]
        client, upstream = (Wire(listener.accept()[0]) for _ in range(2))
    transports = [(await loop.create_connection(asyncio.Protocol, sock=sock))[0] for sock in ours]
    tunnel = Tunnel(loop, transports[0], transports[1], PATIENCE)
    running = asyncio.create_task(tunnel.run(b"", b""))
    await turns()
    upstream.send(frame(CLOSE, b"\x03\xf1too long"))
    upstream.reset()
    transports[0].get_protocol().data_received(b"more")  # type: ignore[attr-defined]  # one side of the tunnel
    assert await loop.run_in_executor(None, client.read_exactly, 12) == frame(CLOSE, b"\x03\xf1too long")
    assert await loop.run_in_executor(None, client.is_closed)
    client.close()
    await running
    assert (tunnel.bytes_in, tunnel.bytes_out) == (4, 12)


def test_a_client_that_disconnects_before_the_response_closes_the_upstream_connection(
    client: RawClient, up: RawUpstream
) -> None:
    waiting = Ending()

    def never_answers(wire: Wire, _request: RawRequest) -> bool:
        waiting(wire)
        return False

    up.behave = never_answers
    ask(client, behind=b"eager")
    eventually(lambda: len(up.requests) == 1, "the handshake is with the upstream")
    client.close()
    assert waiting.ended.wait(SOON)


def test_the_end_of_one_direction_is_passed_on_and_the_other_flows_on(client: RawClient, up: RawUpstream) -> None:
    def last_words(wire: Wire) -> None:
        until_it_ends(wire)
        wire.send(b"got " + wire.buffer)

    up.behave = accepting(last_words)
    opened(client)
    client.send(b"bye")
    client.sock.shutdown(socket.SHUT_WR)
    assert client.read_exactly(7) == b"got bye"
    assert client.is_closed(within=SOON)


def test_a_silent_tunnel_is_ended(client: RawClient, up: RawUpstream) -> None:
    tunnel = Ending()
    up.behave = accepting(tunnel)
    opened(client, "/api/brief")
    begun = time.monotonic()
    assert client.is_closed(within=SOON)
    assert time.monotonic() - begun > SILENCE / 2
    assert tunnel.ended.wait(SOON)


def test_a_byte_in_either_direction_keeps_a_tunnel_open(client: RawClient, up: RawUpstream) -> None:
    """Here from the client for a while, then from the upstream."""

    def talk(wire: Wire) -> None:
        assert wire.read_exactly(4) == b"...."
        for _ in range(4):
            time.sleep(SILENCE / 2)
            wire.send(b".")

    up.behave = accepting(talk)
    opened(client, "/api/brief")
    for _ in range(4):
        time.sleep(SILENCE / 2)
        client.send(b".")
    assert client.read_exactly(4) == b"...."


def test_a_tunnel_is_counted_as_a_request_once_it_has_ended(running: RunningGateway, client: RawClient) -> None:
    recorder, target = running.live.recorder, running.live.upstreams["up"].targets[0]

    def count() -> int:
        return sum(count for key, count in recorder.requests.items() if key[1:4] == ("GET", 101, "upstream"))

    eventually(lambda: recorder.in_flight == 0, "earlier tunnels have ended")
    before = count()
    opened(client)
    assert (recorder.in_flight, target.in_flight, count()) == (1, 1, before)
    client.close()
    eventually(lambda: recorder.in_flight == 0, "the exchange ends", within=SOON)
    assert (target.in_flight, count()) == (0, before + 1)


def test_a_tunnel_holds_no_connection_of_the_pool_but_one_of_its_own(running: RunningGateway, up: RawUpstream) -> None:
    """The pool has one connection, and there may be one tunnel beside it."""
    for _ in range(3):
        with RawClient(running.port) as client, RawClient(running.port) as other:
            up.behave = accepting(echo)
            opened(client, "/api/narrow")
            other.request("GET", "/api/narrow", ASKING)
            assert reason(other.answer()) == (503, "overloaded")
            up.behave = reply()
            assert other.get("/api/narrow").status == 200
            client.close()
            up.behave = accepting(echo)

            def is_opened() -> bool:
                with RawClient(running.port) as third:
                    third.request("GET", "/api/narrow", ASKING)
                    return bool((third.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 101"))

            eventually(is_opened, "the place is free", within=SOON)
        eventually(lambda: tunnels(running) == 0, "every place is given back", within=SOON)


def tunnels(running: RunningGateway) -> int:
    """Return how many there are."""
    services = running.server._app.state.gateway.upstream_clients.values()
    resources = [resource for service in services for resource in service.resources()]
    return sum(resource.in_use for resource in resources if resource.resource == "tunnels")


# No tunnel


@pytest.mark.parametrize("status", [b"403 Forbidden", b"426 Upgrade Required", b"200 OK"])
def test_a_refused_handshake_gets_a_normal_response(client: RawClient, up: RawUpstream, status: bytes) -> None:
    """And what was sent behind the handshake is the next request."""
    up.behave = reply(b"no", status, ((b"Sec-WebSocket-Version", b"13"),))
    ask(client, behind=b"GET /api/next HTTP/1.1\r\nHost: a\r\n\r\nGET /api/half")
    answers = [client.answer(), client.answer()]
    assert [(answer.status, answer.body) for answer in answers] == [(int(status[:3]), b"no")] * 2
    assert answers[0].all("sec-websocket-version") == [b"13"]
    assert answers[0].all("connection") == []
    client.send(b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert client.answer().body == b"no"
    assert [request.line.split()[1] for request in up.requests] == [b"/api/x", b"/api/next", b"/api/half"]
    up.behave = accepting(echo)
    opened(client)
    client.send(b"now")
    assert client.read_exactly(3) == b"now"


def test_the_rate_limit_holds_for_the_handshake(running: RunningGateway, client: RawClient, up: RawUpstream) -> None:
    with RawClient(running.port) as first:
        assert opened(first, "/api/x", "X-Client-ID: poor").all("x-ratelimit-remaining") == [b"0"]
    ask(client, "/api/x", "X-Client-ID: poor")
    assert reason(client.answer()) == (429, "rate_limited")
    assert len(up.requests) == 1
    opened(client)


def test_an_open_breaker_holds_for_the_handshake(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(status=b"500 Oh")
    assert client.get("/api/fragile").status == 500
    ask(client, "/api/fragile")
    assert reason(client.answer()) == (503, "circuit_open")
    assert len(up.requests) == 1


def test_an_upstream_that_is_down_is_a_502(client: RawClient) -> None:
    ask(client, "/api/down")
    assert reason(client.answer()) == (502, "upstream_connect_error")


@pytest.mark.parametrize("headers", [(), ("Upgrade: websocket",), ("Connection: Upgrade", "Upgrade: h2c")])
def test_an_upgrade_that_was_not_requested_is_a_502(client: RawClient, headers: tuple[str, ...]) -> None:
    client.request("GET", "/api/x", headers)
    assert reason(client.answer()) == (502, "upstream_protocol_error")


@pytest.mark.parametrize(
    "request_",
    [
        b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        b"PUT /api/x HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nhi",
        b"POST /api/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"GET /api/x HTTP/1.1\r\nHost:  a\r\nUpgrade: websocket\r\n\r\n",
        b"GET /api/x HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
    ids=["content", "content and upgrade", "chunks", "general parser", "plain"],
)
def test_what_follows_a_101_that_was_not_requested_is_no_event_of_the_exchange(
    client: RawClient, up: RawUpstream, caplog: pytest.LogCaptureFixture, request_: bytes
) -> None:
    up.behave = accepting(until_it_ends, behind=b"early")
    client.send(request_)
    assert reason(client.answer()) == (502, "upstream_protocol_error")
    up.behave = reply()
    assert client.get().status == 200
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("fields", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"], ids=["none", "another"])
def test_a_101_to_no_protocol_or_another_is_a_502(client: RawClient, up: RawUpstream, fields: bytes) -> None:
    up.behave = lambda wire, _request: wire.send(b"HTTP/1.1 101 Switching Protocols\r\n" + fields + b"\r\n")
    ask(client)
    assert reason(client.answer()) == (502, "upstream_protocol_error")


PLAIN: dict[str, tuple[bytes, bytes]] = {
    "h2c": (b"GET /api/x HTTP/1.1", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n"),
    "another": (b"GET /api/x HTTP/1.1", b"Upgrade: IRC/6.9\r\nConnection: upgrade\r\n"),
    "POST": (b"POST /api/x HTTP/1.1", b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n"),
    "POST without a body": (b"POST /api/x HTTP/1.1", b"Upgrade: websocket\r\nConnection: Upgrade\r\n"),
    "with a body": (b"GET /api/x HTTP/1.1", b"Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n"),
    "HTTP/1.0": (b"GET /api/x HTTP/1.0", b"Upgrade: websocket\r\nConnection: Upgrade\r\n"),
}


@pytest.mark.parametrize(("line", "headers"), PLAIN.values(), ids=PLAIN)
def test_any_other_upgrade_is_served_as_plain_http(
    client: RawClient, up: RawUpstream, line: bytes, headers: bytes
) -> None:
    up.behave = reply()
    body = b"ok" if b"Content-Length" in headers else b""
    client.send(line + b"\r\nHost: gateway.test\r\n" + headers + b"\r\n" + body)
    assert client.answer().status == 200
    request = up.requests[0]
    assert request.body == body
    assert [request.all(name) for name in ("upgrade", "connection", "http2-settings")] == [[]] * 3
    if line.endswith(b"1.1"):
        assert client.get("/api/next").status == 200


# With other people's code


@pytest.mark.parametrize("compression", ["deflate", None])
def test_a_client_and_a_server_of_the_library_talk(
    gateway: Callable[[dict[str, Any]], RunningGateway], compression: str | None
) -> None:
    def answer(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(answer, "127.0.0.1", 0, subprotocols=["chat"]) as server:  # type: ignore[list-item]  # a NewType of str
        threading.Thread(target=server.serve_forever).start()
        port = server.socket.getsockname()[1]
        running = gateway(in_front_of(f"http://127.0.0.1:{port}") | {"server": {"drain_timeout": 1}})
        url = f"ws://127.0.0.1:{running.port}/api/chat"
        with connect(url, compression=compression, subprotocols=["chat"], proxy=None) as client:  # type: ignore[list-item]  # as above
            assert client.subprotocol == "chat"
            assert len(client.protocol.extensions) == (compression is not None)
            for message in ("grüße" * 1000, b"\0" * 1000, "", "x" * (MIB // 2)):
                client.send(message)
                assert client.recv(timeout=PATIENCE) == message
            client.send(["in ", "pieces"])
            assert client.recv(timeout=PATIENCE) == "in pieces"
            assert client.ping().wait(PATIENCE)
            client.close(4321, "enough")
            assert client.close_code == 4321
        eventually(lambda: running.live.recorder.in_flight == 0, "the exchange ends", within=SOON)
