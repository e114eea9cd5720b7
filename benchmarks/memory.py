"""Resident memory of a peer: new, with a thousand idle clients, and while large bodies stream both ways."""

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable

from benchmarks.load import CLIENT, Answer, Client, Failed
from benchmarks.processes import pinned, reset_peak, resident_bytes
from benchmarks.upstream import SIZES, UPLOADED

IDLE_CLIENTS = 1000
STREAMS = 4  # each way
_PIECE = bytes(262_144)
_SETTLE = 1.0
_PATIENCE = 60.0


def measure(pid: int, port: int, *, core: int, idle_clients: int = IDLE_CLIENTS) -> dict[str, float]:
    """Return bytes: `start`, `idle` and `streaming`. The peer must have served a request before. Raises Failed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, idle_clients + 256)), hard))
    with pinned(core):
        start = resident_bytes(pid)
        idle = _with_idle_clients(pid, port, idle_clients)
        reset_peak(pid)
        _stream_both_ways(port)
        return {"start": start, "idle": idle, "streaming": resident_bytes(pid, peak=True)}


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
