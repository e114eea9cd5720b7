"""Clients of all kinds, each with its rate, and their upstreams: one available, one intermittent."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

AWAY, PERIOD = 5.0, 20.0  # seconds that the intermittent upstream is unavailable in each period
LIMIT = 2**20  # bytes of a body that are buffered
_PATIENCE = 20.0
_SMALL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


# The upstream


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve requests: a stream, a WebSocket with echo, or a body of two bytes."""
    with suppress(OSError, EOFError, asyncio.LimitOverrunError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"\r\ntransfer-encoding: chunked" in head:
                await reader.readuntil(b"0\r\n\r\n")
            elif b"\r\ncontent-length: " in head:
                await reader.readexactly(int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))
            if b"\r\nupgrade: websocket" in head:
                writer.write(_SWITCH)
                while piece := await reader.read(LIMIT):
                    writer.write(piece)
                break
            if head.startswith(b"get /api/stream"):
                writer.write(_CHUNKED)
                for _ in range(20):
                    writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.02)
                writer.write(b"0\r\n\r\n")
            else:
                writer.write(_SMALL)
    writer.transport.abort()


async def come_and_go(port: int) -> None:
    """Serve on a port, except for AWAY seconds of every PERIOD."""
    while True:
        connected: set[asyncio.StreamWriter] = set()

        async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connected.add(writer)  # noqa: B023 - the server ends before the next round
            await serve(reader, writer)
            connected.discard(writer)  # noqa: B023 - as above

        server = await asyncio.start_server(note, "127.0.0.1", port, limit=LIMIT)
        await asyncio.sleep(PERIOD - AWAY)
        server.close()
        for writer in list(connected):
            writer.transport.abort()
        await asyncio.sleep(AWAY)


# The clients


class Unexpected(Exception):
    """An unexpected response."""


@dataclass
class Clients:
    """All kinds of clients; each method is one visit. `seen` counts responses by kind and status."""

    port: int
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    _idle: list[Streams] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)

    async def _connect(self) -> Streams:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=LIMIT)

    async def _ask(self, streams: Streams, line: str, headers: str = "", body: bytes = b"") -> tuple[int, bytes]:
        """Send a request; return status and body of its response."""
        reader, writer = streams
        writer.write(f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"\r\ntransfer-encoding: chunked" in head:
            answer = await reader.readuntil(b"0\r\n\r\n")
        else:
            answer = await reader.readexactly(int(head.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))
        return int(head.split(b" ", 2)[1]), answer

    async def _visit(
        self, kind: str, expected: Sequence[int], line: str, headers: str = "", body: bytes = b""
    ) -> None:
        """Send one request on a new connection."""
        streams = await self._connect()
        try:
            status, _ = await self._ask(streams, line, headers, body)
        finally:
            streams[1].transport.abort()
        self._note(kind, status, expected)

    def _note(self, kind: str, status: int, expected: Sequence[int]) -> None:
        self.seen[kind, status] += 1
        if status not in expected:
            raise Unexpected(f"{kind}: status {status}")

    async def plain(self) -> None:
        """A GET on a persistent connection."""
        while self._idle and self._idle[-1][0].at_eof():  # the gateway closes idle connections
            self._idle.pop()[1].transport.abort()
        streams = self._idle.pop() if self._idle else await self._connect()
        status, _ = await self._ask(streams, "GET /api/x")
        self._idle.append(streams)
        self._note("plain", status, [200])

    async def stranger(self) -> None:
        """A client with a new trace id and one of a thousand client ids."""
        number = next(self._numbers)
        headers = f"X-Client-ID: client-{number % 1000}\r\ntraceparent: 00-{number:032x}-{number:016x}-01\r\n"
        await self._visit("stranger", [200], "GET /api/x", headers)

    async def upload(self) -> None:
        """A body with Content-Length."""
        await self._visit("upload", [200], "POST /api/x", "Content-Length: 20000\r\n", bytes(20_000))

    async def chunks(self) -> None:
        """A chunked body."""
        body = (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 8 + b"0\r\n\r\n"
        await self._visit("chunks", [200], "POST /api/x", "Transfer-Encoding: chunked\r\n", body)

    async def stream(self) -> None:
        """A slow, streamed response."""
        await self._visit("stream", [200], "GET /api/stream")

    async def limited(self) -> None:
        """A client that sends ten times its rate."""
        await self._visit("limited", [200, 429], "GET /api/x", "X-Client-ID: limited\r\n")

    async def failing(self) -> None:
        """A request for the intermittent upstream."""
        await self._visit("failing", [200, 502, 503], "GET /api/away")

    async def talker(self) -> None:
        """A WebSocket: the handshake, and some bytes in both directions."""
        reader, writer = await self._connect()
        try:
            writer.write(
                b"GET /api/x HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            head = await reader.readuntil(b"\r\n\r\n")
            self._note("talker", int(head.split(b" ", 2)[1]), [101])
            for _ in range(10):
                writer.write(bytes(1000))
                await reader.readexactly(1000)
        finally:
            writer.transport.abort()

    async def leaver(self) -> None:
        """A client that disconnects before the response, within it, or within its own body."""
        reader, writer = await self._connect()
        number = next(self._numbers) % 3
        if number == 2:  # noqa: PLR2004 - the third of three cases
            writer.write(b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf")
            await asyncio.sleep(0.02)
        else:
            writer.write(b"GET /api/stream HTTP/1.1\r\nHost: a\r\n\r\n")
            if number:
                await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()
        self.seen["leaver", 0] += 1

    def rates(self) -> dict[Callable[[], Awaitable[None]], float]:
        """Return each kind with its visits per second."""
        return {
            self.plain: 60,
            self.stranger: 30,
            self.upload: 10,
            self.chunks: 5,
            self.stream: 5,
            self.limited: 10,
            self.failing: 10,
            self.talker: 5,
            self.leaver: 10,
        }

    async def come(self, visit: Callable[[], Awaitable[None]], rate: float, until: float) -> None:
        """Run the visits of one kind at its rate; return when the last one has ended."""
        began, number = time.monotonic(), 0
        under_way: set[asyncio.Task[None]] = set()
        while time.monotonic() < until:
            number += 1
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            task = asyncio.ensure_future(self._guard(visit))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def _guard(self, visit: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await visit()
        except (Unexpected, OSError, EOFError, IndexError, ValueError) as problem:
            self.unexpected[f"{getattr(visit, '__name__', visit)}: {problem!r}"] += 1

    def go(self) -> None:
        """Close the persistent connections."""
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()
