"""Requests whose head and body arrive in separate segments.

`python -m benchmarks.segments <port> <seconds> <clients>`. wrk sends both in one. Here each connection sends a head,
and the body at least a millisecond later, when the server has read the head; after the response it begins again.
Prints the requests, seconds and bytes read as JSON.
"""

import asyncio
import importlib
import json
import sys
import time
from typing import cast

import httptools

from benchmarks.cases import CASES, CLIENT

PAUSE = 0.001  # seconds between head and body
_OK = range(200, 300)


def head_of(port: int, path: str, size: int) -> bytes:
    """Return the head of a POST of this size."""
    lines = [f"POST /api/{path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"X-Client-ID: {CLIENT}"]
    return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode()


class Load:
    """The connections of a run, and its counts. Bodies that are due at about the same time are sent together."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head, self.body = head, body
        self.requests = self.read = 0
        self.failures: list[str] = []
        self._due: list[asyncio.WriteTransport] = []

    def __repr__(self) -> str:
        return f"<Load [{self.requests} requests, {len(self.failures)} failures]>"

    def begin(self, transport: asyncio.WriteTransport) -> None:
        """Send a head now, and its body after `PAUSE`."""
        transport.write(self.head)
        if not self._due:
            asyncio.get_running_loop().call_later(PAUSE, self._send_bodies)
        self._due.append(transport)

    def _send_bodies(self) -> None:
        due, self._due = self._due, []
        for transport in due:
            transport.write(self.body)


class Connection(asyncio.Protocol):
    """One connection, which sends the next request after each response."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.WriteTransport", transport)
        self._load.begin(self._transport)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        self._load.read += len(data)
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Count a response; called by the parser."""
        status = self._parser.get_status_code()
        if status not in _OK:
            self._load.failures.append(f"status {status}")
        self._load.requests += 1
        self._load.begin(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Record a connection that was closed before the end of the run."""
        self._load.failures.append(f"a connection was closed: {exc!r}")


async def drive(port: int, seconds: float, clients: int) -> dict[str, object]:
    """Return the counts of a run."""
    case, loop = CASES["segments"], asyncio.get_running_loop()
    load = Load(head_of(port, case.path, case.sent), b"x" * case.sent)
    began = time.monotonic()
    opened = [await loop.create_connection(lambda: Connection(load), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.sleep(seconds)
    found = {"requests": load.requests, "seconds": time.monotonic() - began, "read": load.read}
    failures = load.failures[:3]
    for transport, _ in opened:
        transport.abort()
    return {**found, "failures": failures}


def main(arguments: list[str]) -> int:
    """Run the load, with uvloop if installed."""
    port, seconds, clients = arguments
    running = drive(int(port), float(seconds), int(clients))
    try:
        found = importlib.import_module("uvloop").run(running)
    except ModuleNotFoundError:
        found = asyncio.run(running)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
