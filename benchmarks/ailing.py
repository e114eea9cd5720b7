"""A target that fails on command, and records every request: `python -m benchmarks.ailing <port> <file>`.

It responds to `GET /api/<number>`, and to health checks on any other path. Its standard input sets the mode, one word
per line: `up`, `errors` (half of the responses are 503), `slow` (two seconds late), `down` (it closes its port and its
connections). For each request it appends the number and the monotonic time to the file, which survives its end.
"""

import asyncio
import os
import random
import struct
import sys
import time

SLOW = 2.0  # seconds
ERRORS = 0.5  # share of responses
NOTE = struct.Struct("<Id")
_GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_BAD = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno"


class Service:
    """State shared by the connections of a target: the mode, and the file of requests."""

    def __init__(self, port: int, notes: int) -> None:
        self.mode = "up"
        self.connections: set[Connection] = set()
        self.chance = random.Random(port)  # noqa: S311 - selects the responses that are errors
        self._port = port
        self._notes = notes
        self._server: asyncio.Server | None = None

    async def serve(self) -> None:
        """Serve in the mode that standard input sets, until its end."""
        await self._listen()
        loop = asyncio.get_running_loop()
        words = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(words), sys.stdin)
        while word := (await words.readline()).decode().strip():
            self.mode = word
            if word == "down":
                self._hang_up()
            elif self._server is None:
                await self._listen()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", self._port, backlog=4096)

    def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self.connections):
            connection.transport.abort()

    def note(self, number: int) -> None:
        """Record a request."""
        os.write(self._notes, NOTE.pack(number, time.monotonic()))


class Connection(asyncio.Protocol):
    """One connection of a proxy, for sequential requests without bodies."""

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self._upstream_client = service
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self.transport = transport
        self._upstream_client.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Remove the connection."""
        self._upstream_client.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Respond to each complete request."""
        *heads, self._buffer = (self._buffer + data).split(b"\r\n\r\n")
        service = self._upstream_client
        for head in heads:
            path = head.split(b" ", 2)[1]
            is_counted = path.startswith(b"/api/")
            if is_counted:
                service.note(int(path[5:]))
            fails = is_counted and service.mode == "errors" and service.chance.random() < ERRORS
            answer = _BAD if fails else _GOOD
            if service.mode == "slow":
                asyncio.get_running_loop().call_later(SLOW, self.transport.write, answer)
            else:
                self.transport.write(answer)


if __name__ == "__main__":
    asyncio.run(Service(int(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)).serve())
