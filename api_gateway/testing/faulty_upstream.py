"""An upstream that responds by a script: with statuses, delays, slow bodies and disconnects."""

import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import responses
from typing import BinaryIO, Literal

_LONGEST_IDLE = 60.0  # seconds for which a connection may be idle
_MAX_HEAD = 65_536


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of a script. Times are in seconds.

    `delay` is before the head. `pieces` divides the body into as many pieces, each after `piece_delay`. `disconnect`
    closes the connection instead: before the response, or within the body, of which the first half is sent.
    """

    status: int = 200
    body: bytes = b"ok"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    pieces: int = 1
    piece_delay: float = 0.0
    disconnect: Literal["before", "within"] | None = None

    def __post_init__(self) -> None:
        if self.disconnect not in (None, "before", "within"):
            raise ValueError(f"disconnect must be 'before', 'within' or None, got {self.disconnect!r}")
        if self.pieces < 1 or min(self.delay, self.piece_delay) < 0:
            raise ValueError(f"pieces must be at least 1, and times at least 0, got {self}")


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as the upstream has received it; names of header fields are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class FaultyUpstream:
    """A server on a free port of 127.0.0.1, with a thread for each connection.

    `requests` are those received so far. `script` may be called again at any time.
    """

    def __init__(self, *script: Reply) -> None:
        self.requests: list[ReceivedRequest] = []
        self._lock = threading.Lock()
        self._script: list[Reply] = []
        self.script(*script)
        self._is_stopped = threading.Event()
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name=f"upstream {self.url}", daemon=True).start()

    def __repr__(self) -> str:
        return f"<FaultyUpstream {self.url} [{len(self.requests)} requests]>"

    def script(self, *replies: Reply) -> None:
        """Respond with these from now on, one for each request; the last one is repeated."""
        with self._lock:
            self._script = list(replies) or [Reply()]

    def stop(self) -> None:
        """Stop listening, and close all connections."""
        self._is_stopped.set()
        with suppress(OSError):  # wakes the accepting thread, which `close` alone does not
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            connection.settimeout(_LONGEST_IDLE)
            with connection, connection.makefile("rb") as received, suppress(OSError, ValueError):
                while (request := _read_request(received)) is not None and self._respond(connection, request):
                    pass
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _respond(self, connection: socket.socket, request: ReceivedRequest) -> bool:
        """Send the next reply; return False if the connection ends."""
        with self._lock:
            self.requests.append(request)
            reply = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if self._is_stopped.wait(reply.delay) or reply.disconnect == "before":
            return False
        connection.sendall(_head_of(reply))
        if request.method == "HEAD":
            return True
        if reply.disconnect == "within":
            connection.sendall(reply.body[: len(reply.body) // 2])
            return False
        for piece in _pieces(reply.body, reply.pieces):
            time.sleep(reply.piece_delay)
            connection.sendall(piece)
        return True


def _read_request(received: BinaryIO) -> ReceivedRequest | None:
    line = received.readline(_MAX_HEAD)
    if not line.strip():
        return None
    method, target, _ = line.decode("latin-1").split(" ", 2)
    headers: dict[str, str] = {}
    while (line := received.readline(_MAX_HEAD)) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while size := int(received.readline(_MAX_HEAD).split(b";")[0], 16):
            body += received.read(size)
            received.readline(_MAX_HEAD)
        while received.readline(_MAX_HEAD).strip():
            pass  # a trailer
    else:
        body = received.read(int(headers.get("content-length", "0")))
    return ReceivedRequest(method, target, headers, body)


def _head_of(reply: Reply) -> bytes:
    lines = [f"HTTP/1.1 {reply.status} {responses.get(reply.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    if reply.status not in (204, 304):
        lines.append(f"Content-Length: {len(reply.body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _pieces(body: bytes, count: int) -> Sequence[bytes]:
    size = max(1, -(-len(body) // max(1, count)))
    return [body[start : start + size] for start in range(0, len(body), size)]
