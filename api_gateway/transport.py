"""HTTP/1.1 to the upstreams: an `httpx.AsyncBaseTransport` on asyncio and httptools, with a pool of its own.

Why not httpx's: its pool loses a slot when a request is cancelled inside it (encode/httpcore#1093), and a gateway's
requests are cancelled whenever a client hangs up. Here a request that is cancelled closes its connection, at once and
without awaiting. Bytes travel as they are: no header is added, no body decoded, nothing held whole.

Failures are httpx's own: ConnectError and ConnectTimeout (nothing was sent), PoolTimeout (no connection came free),
ReadError (the connection broke), ReadTimeout (silence), RemoteProtocolError (what came was not HTTP).

`request.extensions` may hold `target` (the raw request target, bytes) and `timeout`, a dict of seconds: `connect`,
`pool`, `read` (for the answer's head), `idle` (between pieces of a body; `read` if absent).
"""

import asyncio
import ssl
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import httptools
import httpx

HIGH_WATER = 256 * 1024  # bytes of an answer held for a slow client before the upstream is made to wait
LOW_WATER = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_BODILESS = frozenset({204, 304})

Origin = tuple[str, str, int]


class _Stale(httpx.ReadError):
    """A reused connection died before any byte of an answer: the race every keep-alive client can lose."""

    def __init__(self) -> None:
        super().__init__("closed before any answer, on a connection kept alive")


class _Answer(httpx.AsyncByteStream):
    """The answer to one request while it arrives: head, then pieces of body, then its end or its failure."""

    def __init__(self, connection: "_Connection", method: str, timeouts: dict[str, float | None]) -> None:
        self.connection: _Connection | None = connection
        self.method = method
        self.timeouts = timeouts
        self.status = 0
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_bytes = 0
        self.is_head_complete = False
        self.is_complete = False
        self.is_until_close = False
        self.keeps_alive = False
        self.error: Exception | None = None
        self.buffered = 0
        self.timer: asyncio.TimerHandle | None = None
        self._pieces: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let whoever waits for this answer look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until something has changed."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def feed(self, piece: bytes) -> None:
        """Hold one piece of body for the reader."""
        self._pieces.append(piece)
        self.buffered += len(piece)
        self.wake()

    def fail(self, error: Exception) -> None:
        """End the answer with `error`, which the reader gets after what has arrived."""
        if not self.is_complete and self.error is None:
            self.error = error
            self.wake()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; what arrived together is yielded together."""
        while True:
            if self._pieces:
                body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
                self._pieces.clear()
                self.buffered = 0
                if self.connection is not None:
                    self.connection.resume()
                yield body
            elif self.is_complete:
                return
            elif self.error is not None:
                raise self.error
            else:
                await self._wait_for_piece()

    async def _wait_for_piece(self) -> None:
        if self.connection is not None:
            self.connection.start_timer(self, "idle")
        try:
            await self.wait()
        finally:
            self.stop_timer()

    def stop_timer(self) -> None:
        """Stop the clock that runs against the upstream."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    async def aclose(self) -> None:
        """Let go of the answer. If it has not fully arrived, its connection is closed."""
        if self.connection is not None:
            self.connection.abandon(self)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pool: "_Pool", loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.idle_since = 0.0
        self.is_closed = False
        self.is_reused = False
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: Any = None  # an asyncio.Transport, from connection_made on
        self._answer: _Answer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._is_reading_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._received = 0

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "idle" if self._answer is None else "busy"
        return f"<_Connection [{state}]>"

    # Sending

    async def request(self, request: httpx.Request) -> _Answer:
        """Send the request and return its answer once the head is there."""
        timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        answer = _Answer(self, request.method, timeouts)
        self._answer = answer
        self._received = 0
        framing = _framing(request.headers.raw)
        try:
            self._transport.write(_render_head(request))
            if framing is not None:
                self._upload = self.loop.create_task(self._send_body(answer, request.stream, framing))
            else:
                self.start_timer(answer, "read")
            while not answer.is_head_complete and answer.error is None:
                await answer.wait()
        except BaseException:
            self.abandon(answer)
            raise
        if answer.error is not None and not answer.is_head_complete:
            self.abandon(answer)
            raise answer.error
        return answer

    async def _send_body(self, answer: _Answer, stream: Any, framing: bytes) -> None:
        is_chunked = framing == b"chunked"
        try:
            async for piece in stream:
                if not piece:
                    continue
                if self.is_closed:
                    return
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                if self._writable is not None:
                    await self._wait_until_writable(answer)
            if is_chunked and not self.is_closed:
                self._transport.write(b"0\r\n\r\n")
        except Exception as error:  # noqa: BLE001 - whatever ends the body ends the answer, and its reader gets it
            answer.fail(error)
            self.close()
            return
        self._upload = None
        if not answer.is_head_complete:
            self.start_timer(answer, "read")

    async def _wait_until_writable(self, answer: _Answer) -> None:
        """Wait for the upstream to read on, no longer than it may be idle; the answer's own clock runs apart."""
        seconds = answer.timeouts.get("idle", answer.timeouts.get("read"))
        timer = None if seconds is None else self.loop.call_later(seconds, self.time_out, answer, seconds)
        try:
            while self._writable is not None:
                await self._writable
        finally:
            if timer is not None:
                timer.cancel()

    def start_timer(self, answer: _Answer, name: str) -> None:
        """Give the upstream its time to answer: `read` for the head, `idle` between pieces of the body."""
        seconds = answer.timeouts.get(name, answer.timeouts.get("read"))
        answer.stop_timer()
        if seconds is not None:
            answer.timer = self.loop.call_later(seconds, self.time_out, answer, seconds)

    def pause_writing(self) -> None:
        """Asked by the event loop: the upstream reads more slowly than the client sends."""
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        """Asked by the event loop: the upstream has caught up."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # Receiving: callbacks of the event loop, then of the parser

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start of the connection."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse what came. Bytes that belong to no request mean the connection cannot be trusted any more."""
        answer = self._answer
        if answer is None:
            self.close()
            return
        self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            answer.fail(httpx.RemoteProtocolError(f"not HTTP: {error}"))
            self.close()
            return
        except httptools.HttpParserUpgrade:
            answer.fail(httpx.RemoteProtocolError("switched protocols without being asked"))
            self.close()
            return
        if not answer.is_head_complete and self._received > MAX_HEAD_BYTES:
            answer.fail(httpx.RemoteProtocolError(f"head of more than {MAX_HEAD_BYTES} bytes"))
            self.close()
        elif answer.is_complete:
            self._finish(answer)
        elif answer.buffered > HIGH_WATER and not self._is_reading_paused:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def on_message_begin(self) -> None:
        """A message starts; if the answer is already complete, it is one nobody asked for."""
        if self._answer is None or self._answer.is_complete:
            self.close()

    def on_status(self, phrase: bytes) -> None:
        """Reason phrase."""
        if self._answer is not None and not self._answer.is_head_complete:
            self._answer.reason += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those after the head are trailers, which an ASGI server cannot pass on."""
        if self._answer is not None and not self._answer.is_head_complete:
            self._answer.headers.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """The head is there, unless it is that of an interim answer (1xx)."""
        answer = self._answer
        if answer is None or answer.is_complete:
            return
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:  # noqa: PLR2004 - RFC 9110 section 15
            answer.fail(httpx.RemoteProtocolError(f"status {status}"))
            self.close()
            return
        if 100 <= status < 200:  # noqa: PLR2004 - the class of interim answers
            answer.headers, answer.reason, self._received = [], b"", 0
            return
        names = {name.lower(): value.lower() for name, value in answer.headers}
        if names.get(b"transfer-encoding", b"chunked") != b"chunked":
            # The client could not read it: the header that names the coding ends here.
            answer.fail(httpx.RemoteProtocolError("a transfer coding nobody asked for"))
            self.close()
            return
        answer.status = status
        answer.is_head_complete = True
        answer.keeps_alive = self._parser.should_keep_alive()
        answer.stop_timer()
        if answer.method == "HEAD":
            # The parser would wait for the body that these headers describe.
            answer.is_complete = True
            self._parser = httptools.HttpResponseParser(self)
        elif status not in _BODILESS:
            answer.is_until_close = b"transfer-encoding" not in names and b"content-length" not in names
        answer.wake()

    def on_body(self, piece: bytes) -> None:
        """One piece of body; one that comes after the end belongs to nobody."""
        answer = self._answer
        if answer is None or answer.is_complete:
            self.close()
        else:
            answer.feed(piece)

    def on_message_complete(self) -> None:
        """The end of the answer, unless it was an interim one."""
        answer = self._answer
        if answer is not None and answer.is_head_complete:
            answer.is_complete = True
            answer.wake()

    def eof_received(self) -> bool:
        """The upstream will send no more: it is closed from this side too."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; an answer delimited by it is complete now, any other is broken."""
        was_open = not self.is_closed
        self.is_closed = True
        self.resume_writing()
        answer = self._answer
        if answer is not None:
            if exc is None and was_open and answer.is_head_complete and answer.is_until_close:
                answer.is_complete = True
                answer.wake()
            elif self.is_reused and self._received == 0 and not answer.is_head_complete:
                answer.fail(_Stale())
            else:
                answer.fail(httpx.ReadError("closed before the answer was complete"))
            self._detach(answer)
        if was_open:
            self._pool.discard(self)

    # Ending

    def resume(self) -> None:
        """Read on after the reader has caught up."""
        if self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = False
            self._transport.resume_reading()

    def time_out(self, answer: _Answer, seconds: float) -> None:
        """Give up on an upstream that was silent for too long."""
        answer.fail(httpx.ReadTimeout(f"silent for {seconds:g} s"))
        if self._answer is answer:
            self.close()

    def abandon(self, answer: _Answer) -> None:
        """Drop the answer; unless it has fully arrived, the connection goes with it."""
        if self._answer is answer:
            self._detach(answer)
            self.close()

    def close(self) -> None:
        """Close now."""
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None
        if not self.is_closed:
            self.is_closed = True
            if self._answer is not None:
                self._answer.fail(httpx.ReadError("connection closed"))
            if self._transport is not None:
                self._transport.abort()
            self._pool.discard(self)

    def _finish(self, answer: _Answer) -> None:
        """Give the connection back, or close it if it cannot serve again.

        It cannot if the upstream said so, or answered without waiting for the whole body: what is left has no reader.
        """
        self._detach(answer)
        if self.is_closed or self._upload is not None or not answer.keeps_alive:
            self.close()
        else:
            self.resume()
            self._pool.give(self)

    def _detach(self, answer: _Answer) -> None:
        self._answer = None
        answer.connection = None
        answer.stop_timer()


class _Pool:
    """The connections to one origin: at most `limit`, the idle ones taken last in first out.

    Last in first out lets the surplus of a quiet hour expire. Whoever finds none free waits in a first in first out
    queue, and is handed either a connection or the right to open one (None).
    """

    def __init__(self, origin: Origin, limit: int, idle_timeout: float, tls: ssl.SSLContext | None) -> None:
        self._origin = origin
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._tls = tls
        self._slots = 0  # connections open, being opened, or promised to a waiter
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._waiters: deque[asyncio.Future[_Connection | None]] = deque()
        self._sweep_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        busy = self._slots - len(self._idle)
        return f"<_Pool [{busy} busy, {len(self._idle)} idle, {len(self._waiters)} waiting]>"

    async def take(self, connect: float | None, wait: float | None, *, is_fresh: bool = False) -> _Connection:
        """Return a connection for one request; an unused one if `is_fresh`. Times in seconds, None for no limit."""
        while True:
            if self._idle and not is_fresh:
                connection = self._idle.pop()
                connection.is_reused = True
                return connection
            if self._slots < self._limit:
                self._slots += 1
                return await self._connect(connect)
            if self._idle:
                self._idle[0].close()
                continue
            handed = await self._queue(wait)
            if handed is None:
                return await self._connect(connect)
            if not handed.is_closed:
                handed.is_reused = True
                return handed

    def give(self, connection: _Connection) -> None:
        """Take back a connection that can serve again."""
        waiter = self._next_waiter()
        if waiter is not None:
            waiter.set_result(connection)
            return
        connection.idle_since = connection.loop.time()
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._sweep_timer = connection.loop.call_later(self._idle_timeout, self._sweep, connection.loop)

    def discard(self, connection: _Connection) -> None:
        """Forget a closed connection, and let the next in the queue open one in its place."""
        if connection not in self._open:  # it failed while it was made: its slot is still its maker's
            return
        self._open.remove(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._free_slot()

    def close(self) -> None:
        """Close every connection."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for connection in list(self._open):
            connection.close()

    async def _connect(self, seconds: float | None) -> _Connection:
        """Open a connection in a slot that is already ours."""
        loop = asyncio.get_running_loop()
        scheme, host, port = self._origin
        connection = _Connection(self, loop)
        tls = self._tls if scheme == "https" else None
        try:
            async with asyncio.timeout(seconds):
                await loop.create_connection(lambda: connection, host, port, ssl=tls)
        except BaseException as error:
            connection.close()
            self._free_slot()
            if isinstance(error, TimeoutError):
                raise httpx.ConnectTimeout(f"no connection to {host}:{port} within {seconds} s") from error
            if isinstance(error, OSError):
                raise httpx.ConnectError(f"no connection to {host}:{port}: {error.strerror or error}") from error
            raise
        if connection.is_closed:
            self._free_slot()
            raise httpx.ConnectError(f"{host}:{port} closed the connection at once")
        self._open.add(connection)
        return connection

    async def _queue(self, seconds: float | None) -> _Connection | None:
        """Wait for a connection or for a slot (None)."""
        waiter: asyncio.Future[_Connection | None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self._hand_on(waiter.result())
            if isinstance(error, TimeoutError):
                raise httpx.PoolTimeout(f"no connection came free within {seconds} s") from error
            raise

    def _next_waiter(self) -> asyncio.Future[_Connection | None] | None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                return waiter
        return None

    def _hand_on(self, handed: _Connection | None) -> None:
        """Pass on what a waiter was handed but can no longer use."""
        if handed is None:
            self._free_slot()
        elif not handed.is_closed:
            self.give(handed)

    def _free_slot(self) -> None:
        waiter = self._next_waiter()
        if waiter is None:
            self._slots -= 1
        else:
            waiter.set_result(None)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long; the longest idle is at the front."""
        self._sweep_timer = None
        while self._idle and self._idle[0].idle_since + self._idle_timeout <= loop.time():
            self._idle[0].close()
        if self._idle:
            due = self._idle[0].idle_since + self._idle_timeout
            self._sweep_timer = loop.call_at(due, self._sweep, loop)


class UpstreamTransport(httpx.AsyncBaseTransport):
    """The transport of one upstream, with a pool for each of its targets.

    `max_connections` bounds each pool, `idle_timeout` (seconds) is how long an unused connection is kept. `tls` is
    used for https targets.
    """

    def __init__(
        self, *, max_connections: int = 512, idle_timeout: float = 60.0, tls: ssl.SSLContext | None = None
    ) -> None:
        self._max_connections = max_connections
        self._idle_timeout = idle_timeout
        self._tls = tls
        self._pools: dict[Origin, _Pool] = {}

    def __repr__(self) -> str:
        return f"<UpstreamTransport {self._pools!r}>"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return its response with the body still to come; close it to let go.

        If a reused connection dies before any byte of the answer, the request goes out once more on a new one,
        provided that its method is idempotent and it has no body (RFC 9110 section 9.2.2).
        """
        pool = self._pool(request.url)
        timeouts = request.extensions.get("timeout", {})
        connection = await pool.take(timeouts.get("connect"), timeouts.get("pool"))
        try:
            answer = await connection.request(request)
        except _Stale:
            if request.method not in _IDEMPOTENT or _framing(request.headers.raw) is not None:
                raise
            connection = await pool.take(timeouts.get("connect"), timeouts.get("pool"), is_fresh=True)
            answer = await connection.request(request)
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=answer,
            extensions={"reason_phrase": answer.reason, "http_version": b"HTTP/1.1"},
        )

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            pool.close()

    def _pool(self, url: httpx.URL) -> _Pool:
        origin = (url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = _Pool(origin, self._max_connections, self._idle_timeout, self._tls)
        return pool


def tls_context() -> ssl.SSLContext:
    """Return a context that verifies upstreams against the system's certificate store."""
    return ssl.create_default_context()


async def probe(transport: httpx.AsyncBaseTransport, url: str, seconds: float) -> int:
    """GET `url` for a health check and return the status; raises httpx.TransportError, also after `seconds`."""
    limits = {"connect": seconds, "pool": seconds, "read": seconds}
    target = httpx.URL(url)
    headers = [(b"host", target.netloc), (b"user-agent", b"api-gateway-health")]
    request = httpx.Request("GET", target, headers=headers, stream=_NO_BODY, extensions={"timeout": limits})
    response = await transport.handle_async_request(request)
    await response.aclose()
    return response.status_code


class _NoBody(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""  # pragma: no cover - makes this an iterator


_NO_BODY = _NoBody()


def _framing(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Return b"chunked", b"length", or None for a request without a body."""
    framing = None
    for name, value in headers:
        lower = name.lower()
        if lower == b"transfer-encoding":
            return b"chunked"
        if lower == b"content-length" and value.strip(b"0"):
            framing = b"length"
    return framing


def _render_head(request: httpx.Request) -> bytes:
    """Return request line and headers as they go out; raises LocalProtocolError if they hide a line of their own."""
    target = request.extensions.get("target") or request.url.raw_path
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += [b"%b: %b" % pair for pair in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header holds a line break")
    return head + b"\r\n\r\n"
