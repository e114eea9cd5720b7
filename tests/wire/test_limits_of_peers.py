"""What a client may ask of a connection, and how it is refused beyond: lines, connections, stalls, and sending on.

The bounds on a head's size and time are in `test_downstream_connection`.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tests.kit import (
    PATIENCE,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reason,
    reply,
)

LINES = 12
IDLE = 0.4
STALL = 1.0  # seconds; for tests that must not take a busy machine's pause for a stall
RESPONSE = 1.0  # seconds the upstream may take
MAX_BODY = 64 * 1024
PEERS = 3
MIB = 1024 * 1024
PIECE = bytes(64 * 1024)
CHUNKED = "Transfer-Encoding: chunked"
StartGateway = Callable[[dict[str, Any]], RunningGateway]


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    server = {"max_header_lines": LINES, "idle_timeout": IDLE, "max_body_bytes": MAX_BODY, "drain_timeout": 1}
    return in_front_of(shared.url, timeouts={"response": RESPONSE}) | {"server": server}


def refusals(gateway: RunningGateway, name: str) -> int:
    """Return what the operator is shown."""
    found: int = ask(f"{gateway.url}/metrics", headers={"Accept": "application/json"}).json()["refusals"].get(name, 0)
    return found


def says(answer: bytes) -> Callable[[Wire, RawRequest], None]:
    """Return a behaviour that sends exactly this."""
    return lambda wire, _request: wire.send(answer)


# Lines and connections


def test_a_head_of_as_many_lines_as_allowed_is_served(client: RawClient, up: RawUpstream) -> None:
    assert client.get(headers=("X-Many: 1",) * (LINES - 1)).status == 200
    assert len(up.requests[0].all("x-many")) == LINES - 1


def test_a_head_of_more_lines_is_refused(running: RunningGateway, client: RawClient, up: RawUpstream) -> None:
    """However short they are; what follows is not served."""
    before = refusals(running, "headers_too_large")
    client.request(headers=("X-Many: 1",) * LINES, body=b"GET /api/hidden HTTP/1.1\r\nHost: a\r\n\r\n")
    assert reason(client.answer()) == (431, "headers_too_large")
    assert client.is_closed()
    assert up.requests == []
    assert refusals(running, "headers_too_large") == before + 1


def test_trailers_are_as_bounded_as_a_head(client: RawClient, up: RawUpstream) -> None:
    client.request("POST", "/api/x", (CHUNKED,), b"2\r\nok\r\n0\r\n" + b"X: 1\r\n" * (LINES + 1) + b"\r\n")
    assert reason(client.answer()) == (431, "headers_too_large")
    assert not any(request.is_complete for request in up.requests)


def test_an_address_may_have_so_many_connections(gateway: StartGateway, up: RawUpstream) -> None:
    """One more is told so at its first request, and a connection that ends makes room, also one that was a tunnel."""
    running = gateway(in_front_of(up.url) | {"server": {"max_connections_per_peer": PEERS, "drain_timeout": 1}})
    ours = next(iter(running.server.servers[0].sockets)).getsockname()[1]
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(ours)) for _ in range(PEERS)]
        assert [client.get().status for client in clients] == [200] * PEERS
        for _ in range(2):
            with RawClient(ours) as surplus:
                answer = surplus.get()
                assert reason(answer) == (503, "overloaded")
                assert answer.all("retry-after") == [b"1"]
                assert answer.all("connection") == [b"close"]
                assert surplus.is_closed()
        assert len(up.requests) == PEERS
        assert [client.get().status for client in clients] == [200] * PEERS
        up.behave = says(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        clients[0].request(headers=("Connection: Upgrade", "Upgrade: websocket"))
        assert clients[0].read_until(b"\r\n\r\n") is not None
        with RawClient(ours) as surplus:
            assert surplus.get().status == 503
        clients[0].reset()
        clients[1].close()
        up.behave = reply()
        eventually(lambda: len(running.server.server_state.connections) == PEERS - 2, "they are gone")
        fresh = [stack.enter_context(RawClient(ours)) for _ in range(2)]
        assert [client.get().status for client in fresh] == [200] * 2
        assert refusals_of(running, "overloaded") == 3


def refusals_of(gateway: RunningGateway, name: str) -> int:
    """Return what is counted, without a connection of our own."""
    found: int = gateway.live.recorder.refusals[name]
    return found


# Clients that stall


@pytest.mark.parametrize(
    ("framing", "beginning"),
    [("Content-Length: 9", b""), ("Content-Length: 9", b"half"), (CHUNKED, b""), (CHUNKED, b"4\r\nhalf\r\n")],
)
def test_a_body_that_stalls_is_a_408(
    running: RunningGateway, client: RawClient, framing: str, beginning: bytes
) -> None:
    before = refusals(running, "request_timeout")
    begun = time.monotonic()
    client.request("POST", "/api/x", (framing,), beginning)
    assert reason(client.answer()) == (408, "request_timeout")
    assert IDLE / 2 < time.monotonic() - begun < PATIENCE
    assert client.is_closed()
    assert refusals(running, "request_timeout") == before + 1
    eventually(lambda: running.live.recorder.in_flight == 0, "the exchange ends")


def test_a_response_to_http_1_0_that_an_overdue_body_cuts_does_not_appear_complete(
    gateway: StartGateway, up: RawUpstream
) -> None:
    """Its end would be that of the connection, so the connection is reset."""
    up.behave, up.reads_body = says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"), False
    server = {"min_body_rate": MIB, "min_body_rate_grace": 0.3, "drain_timeout": 1}
    with RawClient(gateway(in_front_of(up.url) | {"server": server}).port) as client:
        client.send(b"POST /api/x HTTP/1.0\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        assert client.read_until(b"half") is not None
        with pytest.raises(ConnectionResetError):
            client.sock.recv(1)


def test_a_body_that_keeps_coming_may_take_its_time(running: RunningGateway, up: RawUpstream) -> None:
    longest, status = IDLE, 0
    while longest >= IDLE:  # a busy machine may stop this thread for longer, which says nothing
        with RawClient(running.port) as client, suppress(OSError):
            client.request("POST", "/api/x", ("Content-Length: 6",))
            sent, longest = time.monotonic(), 0.0
            for _ in range(6):
                time.sleep(IDLE / 3)
                longest, sent = max(longest, time.monotonic() - sent), time.monotonic()
                client.send(b".")
            status = client.answer().status
    assert status == 200
    assert up.requests[-1].body == b"......"


def test_an_upload_that_was_asked_for_may_take_longer_than_a_response(client: RawClient, up: RawUpstream) -> None:
    up.reads_body = False

    def asks(wire: Wire, request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = wire.read_exactly(8)
        reply()(wire, request)

    up.behave = asks
    client.request("POST", "/api/x", ("Content-Length: 8", "Expect: 100-continue"))
    assert (client.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 100 Continue\r\n")
    for _ in range(8):
        client.send(b"x")
        time.sleep(RESPONSE / 5)
    assert client.answer().status == 200
    assert up.requests[0].body == b"x" * 8


def test_an_upstream_may_take_longer_than_a_client_may_stall(client: RawClient, up: RawUpstream) -> None:
    def late(wire: Wire, request: RawRequest) -> None:
        time.sleep(IDLE * 2)
        reply()(wire, request)

    up.behave = late
    client.request("POST", "/api/x", ("Content-Length: 2",), b"ok")
    assert client.answer().status == 200


def downloads(up: RawUpstream, size: int) -> list[bool]:
    """Let the upstream send so much; the list tells whether it got rid of all of it, once it is done."""
    done: list[bool] = []

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        try:
            for _ in range(size // len(PIECE)):
                wire.send(PIECE)
        except OSError:
            done.append(False)
        else:
            done.append(True)
        return False

    up.behave = behave
    return done


def test_a_client_that_stops_reading_its_response_is_disconnected(
    running: RunningGateway, client: RawClient, up: RawUpstream
) -> None:
    done = downloads(up, 64 * MIB)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    client.request()
    eventually(lambda: done == [False], "the upstream is let go")
    eventually(lambda: running.live.recorder.in_flight == 0, "the exchange ends")
    while client.fill():
        client.buffer = b""


def steadily(read: Callable[[int], int], size: int, idle: float) -> None:
    """Read `size` bytes: for several times `idle` a little in each tenth of it, then the rest.

    What is read in one `idle` is less than a third of the largest send buffer, so that the kernel reports no progress.
    """
    begun, left = time.monotonic(), size
    while left:
        is_slow = time.monotonic() - begun < idle * 4
        count = read(min(left, 16 * 1024 if is_slow else MIB))
        assert count, f"cut with {left} bytes to come"
        left -= count
        if is_slow:
            time.sleep(idle / 10)


def test_what_is_read_slowly_and_steadily_arrives_whole(
    gateway: Callable[..., RunningGateway], up: RawUpstream
) -> None:
    """A response and a request body at once, for several times as long as their readers might have stalled."""
    size = 16 * MIB
    done: list[bool] = []
    up.reads_body = False

    def behave(wire: Wire, request: RawRequest) -> None:
        if request.line.startswith(b"POST"):
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
            steadily(lambda most: len(wire.sock.recv(most)), size - len(wire.buffer), STALL)
            reply()(wire, request)
        else:
            reply(bytes(24 * MIB))(wire, request)
            done.append(True)

    up.behave = behave
    running = gateway(
        in_front_of(up.url, timeouts={"response": STALL, "idle": STALL})
        | {"server": {"idle_timeout": STALL, "max_body_bytes": 2 * size, "drain_timeout": 1}}
    )
    with RawClient(running.port) as reader, RawClient(running.port) as sender:
        sending = threading.Thread(
            target=sender.request, args=("POST", "/api/x", (f"Content-Length: {size}",), bytes(size))
        )
        sending.start()
        reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        reader.request()
        assert reader.read_until(b"\r\n\r\n") is not None
        steadily(lambda most: len(reader.sock.recv(most)), 24 * MIB - len(reader.buffer), STALL)
        assert sender.answer().status == 200
        sending.join()
    eventually(lambda: done == [True], "the upstream has sent all")


def test_a_client_that_has_its_early_response_cannot_keep_the_connection(
    gateway: Callable[..., RunningGateway], up: RawUpstream
) -> None:
    """Though it read the end of that response late: the time to send the rest of its body runs from the response."""
    size = 16 * MIB
    up.reads_body = False
    downloads(up, size)
    answers = up.behave

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        assert wire.read_exactly(4) == b"half"  # what is left unread would turn the end into a reset
        return answers(wire, request)

    up.behave = behave
    server = {"idle_timeout": 2, "max_body_bytes": MAX_BODY, "drain_timeout": 1}  # more than a busy machine may pause
    running = gateway(in_front_of(up.url, timeouts={"response": RESPONSE}) | {"server": server})
    with RawClient(running.port) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        client.request("POST", "/api/x", ("Content-Length: 9", "Connection: close"), b"half")
        assert client.read_until(b"\r\n\r\n") is not None
        left = size - len(client.buffer)
        while left:
            piece = client.sock.recv(min(left, 16 * 1024))
            assert piece, "the answer is whole"
            left -= len(piece)
        eventually(lambda: not running.server.server_state.connections, "the gateway closes it")


# Refusals reach who is still sending


def test_a_client_refused_while_sending_can_read_the_response(running: RunningGateway, up: RawUpstream) -> None:
    """Each of these sends on for a while, and reads only then."""
    heads = {
        431: b"GET /api/x HTTP/1.1\r\nHost: a\r\n" + b"X-Many: 1\r\n" * LINES + b"\r\n",
        400: b"garbage\r\n\r\n",
        413: b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n",
    }
    for status, head in heads.items():
        with RawClient(running.port) as client:
            client.send(head)
            for _ in range(32):
                client.send(PIECE)
                time.sleep(0.002)
            assert reason(client.answer())[0] == status
    assert up.requests == []


@pytest.mark.parametrize("framing", [f"Content-Length: {32 * MIB}", CHUNKED])
def test_a_client_that_sends_a_too_large_body_can_read_the_response(
    client: RawClient, up: RawUpstream, framing: str
) -> None:
    """Also of one whose size shows only as it comes."""
    piece = b"%x\r\n%b\r\n" % (MIB, bytes(MIB)) if framing == CHUNKED else bytes(MIB)
    client.request("POST", "/api/x", (framing,))
    for _ in range(5):
        client.send(piece)
    assert reason(client.answer()) == (413, "body_too_large")
    assert not any(request.is_complete for request in up.requests)


def test_a_client_whose_pipeline_has_a_too_large_body_can_read_all_responses(
    client: RawClient, up: RawUpstream
) -> None:
    """That body has arrived as a whole, and further requests behind it are not read."""
    post = b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1) + bytes(MAX_BODY + 1)
    client.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" + b"GET /api/x HTTP/1.1\r\nHost: a\r\n\r\n" + 8 * post)
    assert [client.answer().status for _ in range(3)] == [200, 200, 413]
    for _ in range(4):
        client.send(PIECE)
    assert client.sock.recv(1) == b"", "a regular end, no reset"
    assert len(up.requests) == 1


def test_a_client_that_never_stops_sending_is_disconnected(client: RawClient) -> None:
    client.send(b"garbage\r\n\r\n")
    sent = 0
    with suppress(ConnectionError):
        while sent < 64 * MIB:
            client.send(PIECE)
            sent += len(PIECE)
    assert sent < 32 * MIB
