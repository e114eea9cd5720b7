"""Resident memory of a peer: new, with idle and with active clients, and while large bodies stream both ways."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

from benchmarks.cases import CLIENT
from benchmarks.load import Answer, Client, Failed
from benchmarks.processes import pinned, raise_file_limit, reset_peak, resident_bytes
from benchmarks.upstream import HOLD, SIZES, UPLOADED

IDLE_CLIENTS = 1000
MANY_IDLE, MANY_ACTIVE = 10_000, 1_000  # connections of `measure_idle` and `measure_active`
STREAMS = 4  # each way
_PIECE = bytes(262_144)
_SETTLE = 1.0
_PATIENCE = 60.0


def measure(pid: int, port: int, *, core: int, idle_clients: int = IDLE_CLIENTS) -> dict[str, float]:
    """Return bytes: `start`, `idle` and `streaming`. The peer must have served a request before. Raises Failed."""
    raise_file_limit()
    with pinned(core):
        start = resident_bytes(pid)
        idle = _with_idle_clients(pid, port, idle_clients)
        reset_peak(pid)
        _stream_both_ways(port)
        return {"start": start, "idle": idle, "streaming": resident_bytes(pid, peak=True)}


def measure_idle(pid: int, port: int, *, core: int, count: int = MANY_IDLE) -> dict[str, float]:
    """Return bytes: resident with clients that have had one response each, and how many each of them needs.

    The peer must be a new process that has served a request. Raises Failed.
    """
    return _measure_clients(pid, port, core, count, _with_idle_clients)


def measure_active(pid: int, port: int, *, core: int, count: int = MANY_ACTIVE) -> dict[str, float]:
    """Do as `measure_idle` with clients whose requests the upstream holds, so that each has a connection there too."""
    return _measure_clients(pid, port, core, count, _with_active_clients)


def _measure_clients(
    pid: int, port: int, core: int, count: int, connect: Callable[[int, int, int], int]
) -> dict[str, float]:
    raise_file_limit()
    with pinned(core):
        start = resident_bytes(pid)
        used = connect(pid, port, count)
    return {"used": used, "each": (used - start) / count}


class _HeldClient(Client):
    """A client whose request the upstream holds."""

    request = f"GET /api/hold HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: {CLIENT}\r\n\r\n".encode()

    def check(self, answer: Answer) -> None:
        """See `Client`."""
        answer.check(len(UPLOADED))


def _with_active_clients(pid: int, port: int, count: int) -> int:
    """Send one request on each of some connections; measure before the first response, and read all responses."""
    with contextlib.ExitStack() as stack:
        clients = []
        began = time.monotonic()
        for _ in range(count):
            clients.append(_HeldClient(port))
            stack.callback(clients[-1].close)
            clients[-1].send(0.0)
        time.sleep(max(0.0, began + HOLD - _SETTLE - time.monotonic()))
        used = resident_bytes(pid)
        if _has_response(clients):
            raise Failed(f"not all {count} requests were in flight at once")
        for client in clients:
            while not client.receive():
                pass
        return used


def _has_response(clients: "list[_HeldClient]") -> bool:
    poll = select.poll()
    for client in clients:
        poll.register(client, select.POLLIN)
    return bool(poll.poll(0))


def _with_idle_clients(pid: int, port: int, count: int) -> int:
    """Open connections, send one request on each, and keep them open."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            client = Client(port)
            stack.callback(client.close)
            client.ask()
        time.sleep(_SETTLE)
        return resident_bytes(pid)


def _stream_both_ways(port: int) -> None:
    """Download and upload 100 MB on STREAMS connections each, concurrently."""
    problems: list[str] = []

    def run(stream: Callable[[socket.socket], None]) -> None:
        try:
            with socket.create_connection(("127.0.0.1", port), _PATIENCE) as sock:
                stream(sock)
        except (OSError, Failed) as problem:
            problems.append(f"{stream.__name__}: {problem}")

    threads = [threading.Thread(target=run, args=(stream,)) for stream in (download, upload) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise Failed("; ".join(sorted(set(problems))))


def download(sock: socket.socket) -> None:
    """Read 100 MB. Raises Failed."""
    sock.sendall(f"GET /api/100m HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: {CLIENT}\r\n\r\n".encode())
    _read_answer(sock, SIZES["100m"])


def upload(sock: socket.socket) -> None:
    """Send 100 MB. Raises Failed."""
    size = SIZES["100m"]
    head = f"POST /api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: {CLIENT}\r\nContent-Length: {size}\r\n\r\n"
    sock.sendall(head.encode())
    for _ in range(size // len(_PIECE)):
        sock.sendall(_PIECE)
    _read_answer(sock, len(UPLOADED))


def _read_answer(sock: socket.socket, size: int) -> None:
    answer = Answer()
    while not answer.done:
        received = sock.recv(262_144)
        if not received:
            raise Failed(f"the connection was closed after {answer.length} bytes of the body")
        answer.append(received)
    answer.check(size)
