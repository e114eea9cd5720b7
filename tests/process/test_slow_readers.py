"""What a client that does not read its response costs: at most 256 KiB of memory, which is returned afterwards."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from api_gateway.system import heap
from tests.kit import RawRequest, RawUpstream, Wire, eventually
from tests.processes import WAYS, Running, config_file, hooked, process

KIB = 1024
CLIENTS = 80
HELD = 256 * KIB  # what the gateway keeps of a response for a client that does not read
OBJECTS = 64 * KIB  # for two connections, a request and its response beside that
BODY = 24 * 1024 * KIB  # more than the kernel's buffers of two connections take
PIECE = b"\x82\x7f%b%b" % ((64 * KIB - 10).to_bytes(8, "big"), bytes(64 * KIB - 10))  # one WebSocket frame
TRIMMED_OFTEN = """
from api_gateway.system import heap

heap.keep_trimmed.__defaults__ = (0.3, heap.MIN_FREE_BYTES)  # seconds between checks
"""
SETTLED = 0.5  # seconds in which nothing more is sent when all that can be filled is

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


class EndlessUpstream:
    """Answers with a large body, chunked or not as the path says, and counts what it could send."""

    def __init__(self) -> None:
        self.sent = 0
        self._lock = threading.Lock()
        self.raw = RawUpstream(self._behave)

    def _behave(self, wire: Wire, request: RawRequest) -> bool:
        is_chunked = b"/chunked" in request.line
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)  # else the kernel takes megabytes
        if b"/tunnel" in request.line:
            status, framing = b"101 Switching Protocols", b"Connection: Upgrade\r\nUpgrade: websocket"
        else:
            status = b"200 OK"
            framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % BODY
        wire.send(b"HTTP/1.1 %b\r\n%b\r\n\r\n" % (status, framing))
        for _ in range(BODY // len(PIECE)):
            wire.send(b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if is_chunked else PIECE)
            with self._lock:
                self.sent += 1
        return False


@pytest.fixture
def endless() -> Iterator[EndlessUpstream]:
    upstream = EndlessUpstream()
    yield upstream
    upstream.raw.close()


@pytest.fixture
def gateway(endless: EndlessUpstream, tmp_path: Path) -> Iterator[Running]:
    settings = "log: {access: false}\nserver: {max_event_loop_lag: null}"
    config = config_file(tmp_path, endless.raw.url, settings)
    hook = hooked(tmp_path, TRIMMED_OFTEN)
    with process(*WAYS["python -m"], "--config", config, cwd=tmp_path, **hook) as running:
        yield running


def resident(running: Running) -> int:
    """Return the bytes of memory the process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{running.popen.pid}/status").read_text())
    assert found
    return int(found[1]) * KIB


def peak(running: Running, endless: EndlessUpstream, enough: int = 0) -> int:
    """Return the most bytes of memory the process holds until more than `enough` was sent and no more is taken."""
    most, sent, since, end = 0, endless.sent, time.monotonic(), time.monotonic() + 120
    while endless.sent <= enough or time.monotonic() - since < SETTLED:
        assert time.monotonic() < end, (
            f"{endless.sent} pieces were sent, {enough} are too few: {running.errors[-1000:]}"
        )
        if endless.sent != sent:
            sent, since = endless.sent, time.monotonic()
        most = max(most, resident(running))
        time.sleep(0.02)
    return most


def unread_request(stack: ExitStack, port: int, path: str, client: int) -> None:
    """Send a request and read nothing, with as little buffered by the kernel as it allows."""
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
    sock.connect(("127.0.0.1", port))
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" if path == "tunnel" else b""
    head = b"GET /api/up/%b HTTP/1.1\r\nHost: x\r\nX-Client-ID: c%d\r\n%b\r\n" % (path.encode(), client, upgrade)
    sock.sendall(head)


@pytest.mark.no_cover  # the upstream, whose threads send much, is in this process
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", ["plain", "chunked", "tunnel"])
def test_a_client_that_does_not_read_costs_256_kib_at_most_and_they_are_returned(
    gateway: Running, endless: EndlessUpstream, path: str
) -> None:
    port = gateway.port
    with ExitStack() as stack:  # what the first requests allocate once is not theirs
        for client in range(4):
            unread_request(stack, port, path, client)
        peak(gateway, endless)
    before, sent = resident(gateway), endless.sent
    with ExitStack() as stack:
        for client in range(CLIENTS):
            unread_request(stack, port, path, client)
        most = peak(gateway, endless, enough=sent + CLIENTS * 2 * HELD // len(PIECE))
        assert (most - before) / CLIENTS < HELD + OBJECTS
    allowed = (
        before + heap.MIN_FREE_BYTES + CLIENTS * 20 * KIB
    )  # what is not worth trimming, and their buckets and counters
    eventually(lambda: resident(gateway) < allowed, "the memory is returned", within=40)


def test_the_heap_is_trimmed_when_much_has_been_free_at_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([10, 100, 5, 100, 100, 100, 5])
    stopped = threading.Event()
    trimmed = []

    class Counted:
        def free(self) -> int:
            self.seen = next(looks, None)
            if self.seen is None:
                stopped.set()
            return self.seen or 0

        def trim(self) -> None:
            trimmed.append(self.seen)

    monkeypatch.setattr(heap, "Heap", Counted)
    heap.keep_trimmed(stopped, every=0, worth=50)
    assert trimmed == [100]  # once behind two looks, and then only after two more


def test_a_c_library_that_cannot_be_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("the C library cannot trim its heap")

    monkeypatch.setattr(heap, "Heap", refuse)
    heap.keep_trimmed(threading.Event(), every=3600)  # returns at once


def test_the_thread_ends_with_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    with heap.trimmed():
        (thread,) = set(threading.enumerate()) - before
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_heap_knows_what_is_free() -> None:
    try:
        own = heap.Heap()
    except OSError:
        pytest.skip("not glibc 2.33 or newer")
    kept = [bytes(100 * KIB) for _ in range(300)]
    del kept[::2]
    assert own.free() > 0
    own.trim()
