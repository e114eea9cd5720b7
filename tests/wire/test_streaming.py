"""Bodies are streamed piece by piece in both directions, and the gateway buffers little of them."""

import socket
import threading

import pytest

from tests.kit import PATIENCE, RawClient, RawRequest, RawUpstream, Wire, stalled

MIB = 1024 * 1024
SIZE = 64 * MIB
PIECE = bytes(64 * 1024)
# What may be under way while nobody reads: the kernel's buffers of two loopback connections, made small below where
# a test owns the socket (Linux lets others grow to 32 MiB), and less than 1 MiB in the gateway.
UNDER_WAY = 40 * MIB


@pytest.fixture
def up(up: RawUpstream) -> RawUpstream:
    """An upstream that reads no body by itself."""
    up.reads_body = False
    return up


def small_buffers(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)


def swallow(wire: Wire, size: int) -> int:
    """Read and forget; return how much came, `size` at most."""
    left = size - len(wire.buffer)
    wire.buffer = b""
    while left > 0 and (piece := wire.sock.recv(min(left, MIB))):
        left -= len(piece)
    return size - left


def test_an_event_reaches_the_client_before_the_next_is_sent(client: RawClient, up: RawUpstream) -> None:
    """Server-sent events, each sent only after the client has seen the one before."""
    seen = threading.Semaphore(0)

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(5):
            wire.send(b"data: %d\n\n" % number)
            if not seen.acquire(timeout=PATIENCE):
                break
        return False

    up.behave = behave
    client.request()
    head = client.read_until(b"\r\n\r\n")
    assert head is not None
    assert b"text/event-stream" in head
    for number in range(5):
        assert client.read_until(b"data: %d\n\n" % number) is not None
        seen.release()
    assert client.read_until(b"0\r\n\r\n") is not None


def test_the_head_reaches_the_client_before_the_body_exists(client: RawClient, up: RawUpstream) -> None:
    gate = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        gate.wait(PATIENCE)
        wire.send(b"ok")

    up.behave = behave
    client.request()
    head = client.read_until(b"\r\n\r\n")
    assert head is not None
    assert head.startswith(b"HTTP/1.1 200 ")
    gate.set()
    assert client.read_exactly(2) == b"ok"


@pytest.mark.parametrize("framing", ["Content-Length: 10", "Transfer-Encoding: chunked"])
def test_a_piece_of_an_upload_reaches_the_upstream_before_the_next_is_sent(
    client: RawClient, up: RawUpstream, framing: str
) -> None:
    seen = threading.Semaphore(0)

    def behave(wire: Wire, _request: RawRequest) -> None:
        for number in range(5):
            assert wire.read_until(b"%d;" % number) is not None
            seen.release()
        if "chunked" in framing:
            wire.read_until(b"0\r\n\r\n")
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    up.behave = behave
    client.request("POST", "/api/x", (framing,))
    for number in range(5):
        piece = b"%d;" % number
        client.send(b"2\r\n%b\r\n" % piece if "chunked" in framing else piece)
        assert seen.acquire(timeout=PATIENCE), f"piece {number} did not arrive"
    if "chunked" in framing:
        client.send(b"0\r\n\r\n")
    assert client.answer().body == b"ok"


def test_both_directions_flow_at_once(client: RawClient, up: RawUpstream) -> None:
    """An upstream may answer while it is still being sent to."""

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        for _ in range(5):
            wire.send(wire.read_exactly(2))

    up.behave = behave
    client.request("POST", "/api/x", ("Content-Length: 10",))
    for number in range(5):
        piece = b"%d;" % number
        client.send(piece)
        if number == 0:
            assert client.read_until(b"\r\n\r\n") is not None
        assert client.read_exactly(2) == piece


def test_a_download_is_held_back_for_a_slow_reader(client: RawClient, up: RawUpstream) -> None:
    """The upstream can send little more than the client has read; all of it arrives in the end."""
    sent = [0]

    def behave(wire: Wire, _request: RawRequest) -> None:
        small_buffers(wire.sock)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        while sent[0] < SIZE:
            wire.send(PIECE)
            sent[0] += len(PIECE)

    up.behave = behave
    small_buffers(client.sock)
    client.request()
    assert stalled(lambda: sent[0]) < UNDER_WAY
    assert client.read_until(b"\r\n\r\n") is not None
    read = len(client.buffer) + swallow(client, 16 * MIB)
    assert stalled(lambda: sent[0]) < read + UNDER_WAY
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
    assert swallow(client, SIZE - 16 * MIB) == SIZE - 16 * MIB


def test_an_upload_is_held_back_for_a_slow_upstream(client: RawClient, up: RawUpstream) -> None:
    """The client can send little more than the upstream has read; all of it arrives in the end."""
    gate = threading.Event()
    arrived: list[int] = []

    def behave(wire: Wire, _request: RawRequest) -> None:
        small_buffers(wire.sock)
        gate.wait(PATIENCE)
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
        arrived.append(swallow(wire, SIZE))
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    up.behave = behave
    small_buffers(client.sock)
    sent = [0]

    def upload() -> None:
        client.request("PUT", "/api/x", (f"Content-Length: {SIZE}",))
        while sent[0] < SIZE:
            client.send(PIECE)
            sent[0] += len(PIECE)

    uploading = threading.Thread(target=upload)
    uploading.start()
    assert stalled(lambda: sent[0]) < UNDER_WAY
    gate.set()
    uploading.join(PATIENCE)
    assert client.answer().body == b"ok"
    assert arrived == [SIZE]


def test_a_response_before_the_end_of_an_upload_ends_the_exchange(client: RawClient, up: RawUpstream) -> None:
    """The client reads the refusal although it is still sending, and the upstream's connection is not used again."""
    left = threading.Event()

    def refuse(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno")
        while wire.fill():
            pass
        left.set()
        return False

    up.behave = refuse
    client.request("POST", "/api/x", (f"Content-Length: {SIZE}",), PIECE)
    answer = client.answer()
    assert (answer.status, answer.body) == (401, b"no")
    assert left.wait(PATIENCE)
