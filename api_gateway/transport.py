"""HTTP/1.1 to the upstreams: an `httpx.AsyncBaseTransport` on asyncio and httptools, with a pool of its own.

Why not httpx's: its pool loses a slot when a request is cancelled inside it (encode/httpcore#1093), and a gateway's
requests are cancelled whenever a client hangs up. Here a request that is cancelled closes its connection, at once and
without awaiting. Bytes travel as they are: no header is added, no body decoded, nothing held whole.

Failures are httpx's own: ConnectError and ConnectTimeout (nothing was sent), PoolTimeout (no connection came free),
ReadError (the connection broke), ReadTimeout (silence), RemoteProtocolError (what came was not HTTP).

`request.extensions` may hold `target` (the raw request target, bytes), `timeout`, a dict of seconds: `connect`,
`pool`, `read` (for the answer's head), `idle` (between pieces of a body; `read` if absent), and `hooks`. A response's
`extensions` hold `reason_phrase`, and `switched` after a 101: the answer, whose connection can be taken over.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import httptools
import httpx

from api_gateway.alarm import Alarm
from api_gateway.headers import Fields, fields_of
from api_gateway.heads import pairs_of, phrase_of, split_answer
from api_gateway.models import HeaderList
from api_gateway.pool import Pool

HIGH_WATER = 256 * 1024  # bytes of an answer held for a slow client before the upstream is made to wait
MAX_HEAD_BYTES = 64 * 1024  # of an answer's head with the interim ones before it, and of its trailers
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_BODILESS = frozenset({204, 304})
_SURPLUS = "more came than was announced"
_CONTINUE = 100
_SWITCHING = 101

Timeouts = Mapping[str, float | None]


class Hooks(Protocol):
    """What a proxy wants to hear of, or to say, in the course of one request.

    `expects_continue`: the request says so, and its body may wait for an interim answer. `upgrade`: a 101 is welcome.
    """

    expects_continue: bool
    upgrade: bool

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Hear of every 1xx answer but 101."""
        ...

    def trailers(self) -> HeaderList:
        """Return what shall come behind a chunked body, once that has been sent."""
        ...


class NoHooks:
    """The hooks of who wants to hear and say nothing."""

    expects_continue = upgrade = False

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `Hooks`."""

    def trailers(self) -> HeaderList:
        """See `Hooks`."""
        return []


NO_HOOKS = NoHooks()
NO_LIMITS: Timeouts = {}


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a target, worked out once. `netloc` is what belongs into `Host`."""

    url: httpx.URL
    scheme: str
    host: str
    port: int
    netloc: bytes
    key: tuple[str, str, int] = field(compare=False)

    @classmethod
    def of(cls, url: httpx.URL) -> "Origin":
        """Take `url` apart."""
        port = url.port or (443 if url.scheme == "https" else 80)
        return cls(url, url.scheme, url.host, port, url.netloc, (url.scheme, url.host, port))


class Outgoing(httpx.Request):
    """A request whose headers stay byte pairs until somebody asks for the mapping that httpx makes of them.

    `framing` is b"chunked", b"length", or None for a request without a body.
    """

    def __init__(  # it sets all that a request has, and leaves out what httpx would work out for people
        self,
        method: str,
        origin: Origin,
        pairs: HeaderList,
        stream: httpx.AsyncByteStream,
        framing: bytes | None,
        extensions: dict[str, Any],
    ) -> None:
        self.method = method
        self.url = origin.url
        self.origin = origin
        self.pairs = pairs
        self.stream = stream
        self.framing = framing
        self.extensions = extensions

    @classmethod
    def of(cls, request: httpx.Request) -> "Outgoing":
        """Return any request of httpx as one of these."""
        pairs = request.headers.raw
        stream: Any = request.stream
        extensions = dict(request.extensions)
        return cls(request.method, Origin.of(request.url), pairs, stream, _framing(pairs), extensions)

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # httpx has an attribute here
        """The headers as httpx has them."""
        return httpx.Headers(self.pairs)


class Incoming(httpx.Response):
    """A response whose headers stay byte pairs until somebody asks for the mapping that httpx makes of them."""

    is_closed = False
    is_stream_consumed = False
    next_request = None
    default_encoding = "utf-8"
    _request = None
    _num_bytes_downloaded = 0

    stream: "Answer"

    def __init__(self, answer: "Answer") -> None:  # see `Outgoing`
        self.status_code = answer.status
        self.pairs = answer.headers
        self.stream = answer
        self.extensions = {"reason_phrase": answer.reason, "http_version": b"HTTP/1.1"}
        if answer.status == _SWITCHING:
            self.extensions["switched"] = answer
        self.history: list[httpx.Response] = []

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # httpx has an attribute here
        """The headers as httpx has them."""
        return httpx.Headers(self.pairs)


class Stale(httpx.ReadError):
    """A reused connection died before any byte of an answer: the race every keep-alive client can lose."""

    def __init__(self) -> None:
        super().__init__("closed before any answer, on a connection kept alive")


class Answer(httpx.AsyncByteStream):
    """The answer to one request while it arrives: head, then pieces of body, then its end or its failure."""

    # What every answer begins as stands here, and not in each of them: one is made for every request.
    status = 0
    head = b""  # as it came, if it was a plain one; what the parser took apart has none
    passed = b""  # the lines of a plain head that go further, the status line before them
    has_date = False  # of a plain head
    trailers: HeaderList = []  # noqa: RUF012 - replaced by those that come, never changed
    leftover = b""  # what came behind a 101
    is_head_complete = False
    is_complete = False
    is_until_close = False
    is_counted = False  # by its Content-Length, as far as the parser has it
    keeps_alive = False
    error: Exception | None = None
    buffered = 0
    _waiter: "asyncio.Future[None] | None" = None

    def __init__(self, connection: "Connection | None", method: str, timeouts: Timeouts, hooks: Hooks) -> None:
        self.connection = connection
        self.is_to_head = method == "HEAD"
        self.timeouts = timeouts
        self.hooks = hooks
        self._pieces: list[bytes] = []

    def __repr__(self) -> str:
        return f"<Answer {self.status or 'awaited'} [{'complete' if self.is_complete else self.error or 'arriving'}]>"

    @cached_property
    def reason(self) -> bytes:
        """The phrase behind the status."""
        return phrase_of(self.head)

    @cached_property
    def headers(self) -> HeaderList:
        """The headers as they came; white space around values taken off."""
        return pairs_of(self.head)

    @cached_property
    def fields(self) -> Fields:
        """The same by name."""
        return fields_of(self.headers)

    def on_unusual(self) -> None:
        """Hear that the head is not a plain one, before the parser takes it apart."""

    def wake(self) -> None:
        """Let whoever waits for this answer look again."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def until_head(self) -> None:
        """Wait until the head is there; raises what the answer has failed with by then, be it behind the head."""
        while self.error is None and not self.is_head_complete:
            self._waiter = self._open_connection().loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self.error

    def feed(self, piece: bytes) -> None:
        """Hold one piece of body for the reader, who is not woken yet."""
        self._pieces.append(piece)
        self.buffered += len(piece)

    def fail(self, error: Exception) -> None:
        """End the answer with `error`, which the reader gets after what has arrived."""
        if not self.is_complete and self.error is None:
            self.error = error
            self.wake()

    @property
    def is_ready(self) -> bool:
        """True if `read` would not wait."""
        return self.is_complete or bool(self._pieces)

    def take(self) -> bytes:
        """Return what has arrived of the body since the last time."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces, self.buffered = [], 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read(self) -> tuple[bytes, bool]:
        """Return what has arrived of the body and whether more may follow; raises what the answer failed with."""
        while not self._pieces and not self.is_complete:
            if self.error is not None:
                raise self.error
            await self._wait_for_piece()
        body = self.take()
        if self.connection is not None:
            self.connection.resume_reading()
        return body, not self.is_complete

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; what arrived together is yielded together."""
        more = True
        while more:
            body, more = await self.read()
            if body:
                yield body

    def _open_connection(self) -> "Connection":
        if self.connection is None:  # it is gone, and with it all that could still come
            raise httpx.ReadError("closed before the answer was complete")
        return self.connection

    async def _wait_for_piece(self) -> None:
        connection = self._open_connection()
        connection.set_alarm("idle")
        self._waiter = connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            connection.alarm.clear()

    def take_over(self) -> tuple[asyncio.Transport, bytes]:
        """Return the connection after a 101, with what has already come in the new protocol."""
        if self.connection is None or self.status != _SWITCHING:
            raise httpx.ReadError("closed before the protocol was switched")
        return self.connection.hand_over(), self.leftover

    async def aclose(self) -> None:
        """Let go of the answer; see `close`."""
        self.close()

    def close(self) -> None:
        """Let go of the answer. If it has not fully arrived, its connection is closed."""
        if self.connection is not None:
            self.connection.abandon(self)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pool: Pool[Connection] | None = None
        self.idle_since = 0.0
        self.is_closed = False
        self.is_reused = False
        self.alarm = Alarm(loop, self._on_alarm)
        self._patience = 0.0  # what the alarm was set to
        self._parser = httptools.HttpResponseParser(self)
        self._transport: Any = None  # an asyncio.Transport, from connection_made on
        self._answer: Answer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._is_reading_paused = False
        self._writable: asyncio.Future[None] | None = None
        self._headers: HeaderList = []  # of the head or the trailers that are being read
        self._reason = b""
        self._received = 0  # bytes of this answer so far
        self._unparsed = 0  # bytes since the last complete head or piece of body: what only the parser holds
        self._left = 0  # bytes still to come of a body whose length a plain head told

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "idle" if self._answer is None else "busy"
        return f"<Connection [{state}]>"

    # Sending

    def send(self, request: Outgoing) -> Answer:
        """Send the request; its answer is still to come. Raises LocalProtocolError if it cannot be sent."""
        extensions = request.extensions
        answer = Answer(self, request.method, extensions.get("timeout", NO_LIMITS), extensions.get("hooks", NO_HOOKS))
        try:
            head = _render_head(request)
        except BaseException:
            self.close()
            raise
        if request.framing is None:
            self.start(answer, head)
        else:
            self._answer = answer
            self._received = self._left = 0
            self._transport.write(head)
            if answer.hooks.expects_continue:
                self.set_alarm("read")
            body = self._send_body(answer, request.stream, request.framing, _length(request.pairs))
            self._upload = self.loop.create_task(body)
        return answer

    def start(self, answer: Answer, request: bytes) -> None:
        """Send a whole request, rendered, whose answer is made already."""
        self._answer = answer
        self._received = self._left = 0
        self._transport.write(request)
        seconds = answer.timeouts.get("read")
        self._patience = seconds or 0.0
        self.alarm.set(seconds)

    async def _send_body(self, answer: Answer, stream: Any, framing: bytes, length: int) -> None:  # noqa: C901 - one loop, many ends
        is_chunked = framing == b"chunked"
        left = 0 if is_chunked else length
        try:
            async for piece in stream:
                if not piece:
                    continue
                if self.is_closed:
                    return
                if answer.hooks.expects_continue:
                    self.alarm.clear()
                left -= 0 if is_chunked else len(piece)
                if left < 0:
                    raise httpx.LocalProtocolError("the body is longer than its Content-Length")  # noqa: TRY301 - as any other way a body fails
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                if self._writable is not None:
                    await self._wait_until_writable(answer)
            if left:
                raise httpx.LocalProtocolError("the body is shorter than its Content-Length")  # noqa: TRY301 - as above
            if is_chunked and not self.is_closed:
                self._transport.write(b"0\r\n%b\r\n" % _render_trailers(answer.hooks))
        except Exception as error:  # noqa: BLE001 - whatever ends the body ends the answer, and its reader gets it
            answer.fail(error)
            self.close()
            return
        self._upload = None
        if not answer.is_head_complete:
            self.set_alarm("read")

    async def _wait_until_writable(self, answer: Answer) -> None:
        """Wait for the upstream to read on, no longer than it may be idle; the answer's own clock runs apart."""
        seconds = answer.timeouts.get("idle", answer.timeouts.get("read"))
        timer = None if seconds is None else self.loop.call_later(seconds, self._time_out, seconds)
        try:
            while self._writable is not None:
                await self._writable
        finally:
            if timer is not None:
                timer.cancel()

    def set_alarm(self, name: str) -> None:
        """Give the upstream its time to answer: `read` for the head, `idle` between pieces of the body."""
        if self._answer is not None:
            timeouts = self._answer.timeouts
            seconds = timeouts.get(name, timeouts.get("read"))
            self._patience = seconds or 0.0
            self.alarm.set(seconds)

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
        if self._left:
            self._take_counted(answer, data)
        elif self._received:
            self._parse(answer, data)
        elif not self._take_plain(answer, data):
            answer.on_unusual()
            self._parse(answer, data)

    def _take_plain(self, answer: Answer, data: bytes) -> bool:
        """Take the beginning of an answer if its head is a plain one; otherwise it is the parser's."""
        parts = split_answer(data, is_to_head=answer.is_to_head)
        if parts is None:
            return False
        status, passed, size, length, keeps_alive, has_date = parts
        came = len(data) - size
        if came > length or size > MAX_HEAD_BYTES:  # what is wrong with it is for the parser to find
            return False
        self._received = size + came
        answer.status, answer.passed, answer.has_date, answer.keeps_alive = status, passed, has_date, keeps_alive
        answer.head = data[:size]
        answer.is_head_complete = True
        if came:
            answer.feed(data[size:])
        if came == length:
            answer.is_complete = True
            self._finish(answer)
            answer.wake()
        else:
            self._left = length - came
            self.alarm.clear()
            self._on_progress(answer)
        return True

    def _take_counted(self, answer: Answer, data: bytes) -> None:
        """Take more of a body whose length is known."""
        if len(data) > self._left:
            self._fail(answer, _SURPLUS)
            return
        self._left -= len(data)
        answer.is_complete = not self._left
        answer.feed(data)
        self._on_progress(answer)

    def _on_progress(self, answer: Answer) -> None:
        """Act on how far the answer has come, and let its reader know."""
        if answer.is_complete:
            self._finish(answer)
        elif answer.buffered > HIGH_WATER:
            self.pause_reading()
        answer.wake()

    def _parse(self, answer: Answer, data: bytes) -> None:
        """Have the parser take what came."""
        size = len(data)
        if not self._received:
            self._unparsed = 0
            self._headers, self._reason = [], b""
        self._received += size
        self._unparsed += size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(answer, f"not HTTP: {error}")
            return
        except httptools.HttpParserUpgrade as upgrade:
            answer.leftover = data[upgrade.args[0] :]
            self.pause_reading()
            answer.wake()
            return
        if answer.is_complete:
            self._on_progress(answer)
        elif self._unparsed > MAX_HEAD_BYTES or (not answer.is_head_complete and self._received > MAX_HEAD_BYTES):
            self._fail(answer, f"a head of more than {MAX_HEAD_BYTES} bytes")
        else:
            self._on_progress(answer)

    def on_message_begin(self) -> None:
        """A message starts; if the answer is already complete, it is one nobody asked for."""
        answer = self._answer
        if answer is None:
            self.close()
        elif answer.is_complete:
            self._fail(answer, _SURPLUS)

    def on_status(self, phrase: bytes) -> None:
        """Reason phrase, or a part of it."""
        self._reason += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one trailer."""
        self._headers.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """The head is there, unless it is that of an interim answer (1xx)."""
        self._unparsed = 0
        headers, self._headers = self._headers, []
        reason, self._reason = self._reason, b""
        answer = self._answer
        if answer is None or answer.is_complete or answer.error is not None:
            return
        status = self._parser.get_status_code()
        if not 200 <= status <= 599:  # noqa: PLR2004 - RFC 9110 section 15
            self._on_unusual_status(answer, status, reason, headers)
            return
        fields = fields_of(headers)
        codings = fields.get(b"transfer-encoding")
        if codings is not None and (len(codings) > 1 or codings[0].lower() != b"chunked"):
            self._fail(answer, "a transfer coding nobody asked for")  # the header that names it would end here
            return
        answer.status, answer.reason = status, reason
        answer.headers, answer.fields = headers, fields
        answer.is_head_complete = True
        answer.keeps_alive = self._parser.should_keep_alive()
        self.alarm.clear()
        if answer.is_to_head:
            # The parser would wait for the body that these headers describe.
            answer.is_complete = True
            self._parser = httptools.HttpResponseParser(self)
        elif status not in _BODILESS:
            answer.is_counted = codings is None and b"content-length" in fields
            answer.is_until_close = codings is None and not answer.is_counted

    def _on_unusual_status(self, answer: Answer, status: int, reason: bytes, headers: HeaderList) -> None:
        if status == _SWITCHING and answer.hooks.upgrade and self._parser.should_upgrade():
            answer.status, answer.reason = status, reason
            answer.headers, answer.fields = headers, fields_of(headers)
            answer.is_head_complete = True
            self.alarm.clear()
        elif status == _SWITCHING:
            self._fail(answer, "switched protocols without being asked")
        elif 100 <= status < 200:  # noqa: PLR2004 - the class of interim answers
            if status == _CONTINUE and answer.hooks.expects_continue and self._upload is not None:
                self.alarm.clear()  # now it is the client who is waited for
            answer.hooks.on_interim(status, reason, headers)
        else:
            self._fail(answer, f"status {status}")

    def on_body(self, piece: bytes) -> None:
        """One piece of body; one that comes after the end belongs to nobody."""
        self._unparsed = 0
        answer = self._answer
        if answer is None or answer.is_complete:
            self.close()
        elif answer.error is None:
            answer.feed(piece)

    def on_message_complete(self) -> None:
        """The end of the answer, unless it was an interim one."""
        answer = self._answer
        if answer is None or answer.error is not None:
            return
        if answer.is_head_complete and answer.status != _SWITCHING:
            answer.is_complete = True
            if self._headers:
                answer.trailers, self._headers = self._headers, []

    def eof_received(self) -> bool:
        """The upstream will send no more: it is closed from this side too, and at once if nobody uses it."""
        if self._answer is None:
            self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; an answer delimited by it is complete now, any other is broken."""
        was_open = not self.is_closed
        self.is_closed = True
        self.alarm.stop()
        self.resume_writing()
        answer = self._answer
        if answer is not None:
            if exc is None and was_open and answer.is_head_complete and answer.is_until_close:
                answer.is_complete = True
                answer.wake()
            elif self.is_reused and self._received == 0:
                answer.fail(Stale())
            else:
                answer.fail(httpx.ReadError("closed before the answer was complete"))
            self._detach(answer)
        if was_open and self.pool is not None:
            self.pool.discard(self)

    # Ending

    def pause_reading(self) -> None:
        """Make the upstream wait for the reader."""
        if not self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on after the reader has caught up."""
        if self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = False
            self._transport.resume_reading()

    def hand_over(self) -> asyncio.Transport:
        """Give the transport away after a 101; whoever has it tells us of its loss by `connection_lost`."""
        transport: asyncio.Transport = self._transport
        self.alarm.stop()
        self.resume_reading()
        return transport

    def _fail(self, answer: Answer, cause: str) -> None:
        if answer.is_complete and answer.is_counted:
            answer.is_complete, cause = False, _SURPLUS
        if answer.is_complete:  # by itself; only what came behind is wrong
            answer.wake()
        else:
            answer.fail(httpx.RemoteProtocolError(cause))
        self.close()

    def _on_alarm(self) -> None:
        self._time_out(self._patience)

    def _time_out(self, seconds: float) -> None:
        """Give up on an upstream that was silent for too long."""
        if self._answer is not None:
            self._answer.fail(httpx.ReadTimeout(f"silent for {seconds:g} s"))
            self.close()

    def abandon(self, answer: Answer) -> None:
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
            self.alarm.stop()
            if self._answer is not None:
                self._answer.fail(httpx.ReadError("connection closed"))
            if self._transport is not None:
                self._transport.abort()
            if self.pool is not None:
                self.pool.discard(self)

    def _finish(self, answer: Answer) -> None:
        """Give the connection back, or close it if it cannot serve again.

        It cannot if the upstream said so, or answered without waiting for the whole body: what is left has no reader.
        """
        self._answer = answer.connection = None
        self.alarm.clear()
        if self.is_closed or not answer.keeps_alive or self._upload is not None or self._writable is not None:
            self.close()
            return
        if self._is_reading_paused:
            self.resume_reading()
        if self.pool is not None:
            self.pool.give(self)

    def _detach(self, answer: Answer) -> None:
        self._answer = None
        answer.connection = None
        self.alarm.clear()


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
        self._pools: dict[tuple[str, str, int], Pool[Connection]] = {}

    def __repr__(self) -> str:
        return f"<UpstreamTransport {self._pools!r}>"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return its response with the body still to come; close it to let go.

        If a reused connection dies before any byte of the answer, the request goes out once more on a new one,
        provided that its method is idempotent and it has no body (RFC 9110 section 9.2.2).
        """
        outgoing = request if isinstance(request, Outgoing) else Outgoing.of(request)
        pool = self.pool(outgoing.origin)
        connection = pool.take_idle() or await self._wait(pool, outgoing)
        return await self.response_to(outgoing, connection.send(outgoing))

    async def response_to(self, request: Outgoing, answer: Answer) -> httpx.Response:
        """Wait for the head of an answer whose request is on its way; see `handle_async_request`."""
        while True:
            try:
                await answer.until_head()
            except Stale:
                if request.method not in _IDEMPOTENT or request.framing is not None:
                    raise
                connection = await self._wait(self.pool(request.origin), request, is_fresh=True)
                answer = connection.send(request)
            except BaseException:
                answer.close()
                raise
            else:
                return Incoming(answer)

    def pool(self, origin: Origin) -> Pool[Connection]:
        """Return the connections to `origin`."""
        return self._pools.get(origin.key) or self._make_pool(origin)

    async def _wait(self, pool: Pool[Connection], request: Outgoing, *, is_fresh: bool = False) -> Connection:
        timeouts = request.extensions.get("timeout", NO_LIMITS)
        return await pool.take(timeouts.get("connect"), timeouts.get("pool"), is_fresh=is_fresh)

    async def aclose(self) -> None:
        """Close every connection."""
        for pool in self._pools.values():
            pool.close()

    def _make_pool(self, origin: Origin) -> Pool[Connection]:
        tls = self._tls if origin.scheme == "https" else None

        async def connect(seconds: float | None) -> Connection:
            connection = await _connect(origin, tls, seconds)
            connection.pool = pool
            return connection

        pool: Pool[Connection] = Pool(connect, limit=self._max_connections, idle_timeout=self._idle_timeout)
        self._pools[origin.key] = pool
        return pool


async def _connect(origin: Origin, tls: ssl.SSLContext | None, seconds: float | None) -> Connection:
    """Open a connection within that time."""
    loop = asyncio.get_running_loop()
    connection = Connection(loop)
    place = f"{origin.host}:{origin.port}"
    try:
        async with asyncio.timeout(seconds):
            await loop.create_connection(lambda: connection, origin.host, origin.port, ssl=tls)
    except BaseException as error:
        connection.close()
        if isinstance(error, TimeoutError):
            raise httpx.ConnectTimeout(f"no connection to {place} within {seconds} s") from error
        if isinstance(error, OSError):
            raise httpx.ConnectError(f"no connection to {place}: {error.strerror or error}") from error
        raise
    if connection.is_closed:
        raise httpx.ConnectError(f"{place} closed the connection at once")
    return connection


def tls_context(
    ca_file: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """Return a context that verifies upstreams against the system's certificate store, or `ca_file` instead.

    `certificate` (with its `key`, if that is another file) is shown to upstreams that ask for one. Files are PEM;
    raises OSError (also ssl.SSLError) if they cannot be used.
    """
    context = ssl.create_default_context(cafile=ca_file)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


async def probe(transport: httpx.AsyncBaseTransport, url: str, seconds: float) -> int:
    """GET `url` for a health check and return the status; raises httpx.TransportError, also after `seconds`."""
    limits = {"connect": seconds, "pool": seconds, "read": seconds}
    target = httpx.URL(url)
    headers = [(b"host", target.netloc), (b"user-agent", b"api-gateway-health")]
    request = httpx.Request("GET", target, headers=headers, stream=NO_BODY, extensions={"timeout": limits})
    response = await transport.handle_async_request(request)
    await response.aclose()
    return response.status_code


class NoBody(httpx.AsyncByteStream):
    """The body of a request that has none."""

    is_started = False
    is_finished = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield nothing."""
        return
        yield b""  # pragma: no cover - makes this an iterator


NO_BODY = NoBody()


def _framing(headers: HeaderList) -> bytes | None:
    framing = None
    for name, value in headers:
        lower = name.lower()
        if lower == b"transfer-encoding":
            return b"chunked"
        if lower == b"content-length" and value.strip(b"0"):
            framing = b"length"
    return framing


def _length(headers: HeaderList) -> int:
    return next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)


def _render_head(request: Outgoing) -> bytes:
    """Return request line and headers as they go out; raises LocalProtocolError if they hide a line of their own."""
    target = request.extensions.get("target") or request.url.raw_path
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += map(b": ".join, request.pairs)
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx.LocalProtocolError("a header holds a line break")
    return head + b"\r\n\r\n"


def _render_trailers(hooks: Hooks) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in hooks.trailers()])
