"""One connection to an upstream, which sends one request at a time and receives its response.

`fast_parser` parses plain heads, whose bodies are delimited by their length; httptools parses everything else.

The module is long because it is one state machine: request and response share the connection's buffer, parser and
timer.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import httptools
import httpx

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.eventloop.receive_buffer import READ_SIZE, receive_buffer
from api_gateway.eventloop.send_queue import unacknowledged
from api_gateway.http1.chunked import ENDED, INVALID, NOT_PLAIN, ChunkedBody
from api_gateway.http1.fast_parser import parse_response_head
from api_gateway.http1.headers import BODILESS, fields_of, framing
from api_gateway.models import HeaderList
from api_gateway.transport.abilities import CallAbilities
from api_gateway.transport.lifetime import ConnectionLifetime
from api_gateway.transport.pool import Pool
from api_gateway.transport.request import LeanRequest, length_of, render_request_head
from api_gateway.transport.response import NO_LIMITS, NO_LISTENER, SWITCHING, ResponseListener, UpstreamResponse

RESPONSE_HIGH_WATER = 32 * 1024  # bytes buffered for a slow client before reading from the upstream is paused
MAX_HEAD_BYTES = 64 * 1024  # of a response head together with preceding interim responses, and of trailers
MAX_GATHERED = 64 * 1024  # bytes of head and body that are gathered for one write
# The rest of a request body is still sent after an early response, because closing the connection costs the next
# request a new one: two to four round trips, in which a path of 100 Mbit/s and 10 ms carries about MAX_REST. A client
# that takes longer than REST_TIMEOUT would occupy a place in the pool for longer than a new connection is worth.
MAX_REST = 256 * 1024  # bytes of the body that are sent after the response is complete
REST_TIMEOUT = 2.0  # seconds within which they must be sent
STALL_BASELINE = 0.05  # seconds of a pause after which the unacknowledged bytes are counted: most pauses are shorter
_SURPLUS = "more bytes than announced"
_CONTROL_CHARACTER = "Invalid header value char"  # the parser's words, as all in the next line
_FIELD_ERRORS = frozenset(
    {
        _CONTROL_CHARACTER,
        "Invalid header token",
        "Unexpected whitespace after header value",
        "Content-Length can't be present with Transfer-Encoding",
        "Missing expected LF after header value",
        "Missing expected CR after header value",
    }
)
_CONTROL = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")  # not NUL, which is dangerous (RFC 9110 section 5.5)
_CONTROL_IN_FRAMING = re.compile(
    rb"\r\n(?i:content-length|transfer-encoding|connection)[^\r\n]*[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
_INTERIM_LINE = re.compile(rb"HTTP/1\.[01] 1[0-9][0-9]")
_HEAD_OF_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"  # for a parser that begins within the body
_TOO_LONG = f"a head of more than {MAX_HEAD_BYTES} bytes"
_CONTINUE = 100
_KNOWN_INTERIM = frozenset({100, 102, 103})  # the parser ignores framing fields of these statuses


class StaleConnection(httpx.ReadError):
    """A reused connection was closed before any byte of the response: the usual keep-alive race."""

    def __init__(self) -> None:
        super().__init__("a reused connection was closed before the response")


class UpstreamConnection:
    """One connection, one request at a time. asyncio calls it by `UpstreamProtocol`.

    States: connecting (no transport), idle, busy (`_response` is set), finishing (`_finishing` is set: the response is
    complete, and the rest of the request body is being sent), closed (`is_closed`). While busy, the request body may
    still be incomplete (`_is_uploading`) and reading may be paused. The body comes piece by piece (`begin`,
    `send_piece`, `end_body`), or from a stream that a task reads (`send`). In the latter case head and body are
    gathered (`_gathered`) until the body has to wait for the client, so that a body at hand leaves with its head in
    one write.

    A slow client occupies at most 256 KiB. A relayed response occupies two reads of RELAY_SIZE: one of which the
    client's transport has sent a part, because it keeps the whole and reports no pause below 64 KiB, and the next one.
    Any other response occupies these 64 KiB, RESPONSE_HIGH_WATER and one read of READ_SIZE here, and the same amount
    while it is written.
    """

    abilities: ClassVar[CallAbilities] = CallAbilities(interim=True, trailers=True, upgrade=True)

    # Slots: the interpreter does not share the keys of more than 30 attributes, which makes each access slower.
    __slots__ = (
        "_body_left",
        "_buffer",
        "_chunks",
        "_finishing",
        "_gathered",
        "_gathered_size",
        "_head_begun",
        "_headers",
        "_is_reading_paused",
        "_is_uploading",
        "_parser",
        "_paused_at",
        "_reason",
        "_received",
        "_relay_buffer",
        "_remaining",
        "_response",
        "_rest",
        "_resumed_at",
        "_stall",
        "_timeout",
        "_transport",
        "_unparsed",
        "_upload",
        "_writable",
        "holder",
        "idle_since",
        "is_closed",
        "is_reused",
        "lifetime",
        "loop",
        "pool",
        "timer",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._relay_buffer = receive_buffer(loop)
        self._buffer = self._relay_buffer[:READ_SIZE]
        self.pool: Pool[UpstreamConnection] | None = None
        self.idle_since = 0.0
        self.lifetime: ConnectionLifetime | None = None  # None: no limits but those of the pool
        self.is_closed = False
        self.is_reused = False
        self.holder: str | None = None
        self.timer = DeadlineTimer(loop, self._on_timeout)
        self._timeout = 0.0  # seconds to which the alarm was last set
        self._transport: Any = None  # an asyncio.Transport, from connection_made on
        self._parser: Any = None  # only while connected, because it refers to this object
        self._response: UpstreamResponse | None = None
        self._is_uploading = False  # the request body is incomplete
        self._upload: asyncio.Task[None] | None = None  # that reads it from a stream
        self._gathered: list[bytes] | None = None  # the beginning of a request with a body, before its first write
        self._gathered_size = 0  # bytes
        self._finishing: ResponseListener | None = None  # of the complete response
        self._body_left: int | None = None  # bytes of the body to be sent; None if their number is unknown
        self._rest = 0  # bytes that may still be sent while finishing
        self._is_reading_paused = False
        self._paused_at = self._resumed_at = 0.0
        self._stall: asyncio.TimerHandle | None = None  # limits how long the upstream may stop reading
        self._writable: asyncio.Future[None] | None = None
        self._headers: HeaderList = []  # of the head or the trailers being parsed
        self._reason = b""
        self._head_begun = b""  # input up to now, while the head is incomplete
        self._received = 0  # bytes of this response so far
        self._unparsed = 0  # bytes since the last complete head or body piece, which the parser buffers
        self._remaining = 0  # bytes of the body that have not arrived, after a plain head
        self._chunks: ChunkedBody | None = None  # the body, after a plain head of a chunked response

    def __repr__(self) -> str:
        if self.is_closed:
            state = "closed"
        elif self._finishing is not None:
            state = "finishing"
        else:
            state = "idle" if self._response is None else "busy"
        return f"<UpstreamConnection [{state}]>"

    # Sending

    def send(self, request: LeanRequest) -> UpstreamResponse:
        """Send the request; return its response, which is still empty. Raises LocalProtocolError."""
        extensions = request.extensions
        response = UpstreamResponse(
            self, request.method, extensions.get("timeout", NO_LIMITS), extensions.get("hooks", NO_LISTENER)
        )
        try:
            head = render_request_head(request)
        except BaseException:
            self.close()
            raise
        request.is_sent = True
        if request.framing is None:
            self.start(response, head)
        else:
            self._response = response
            self._received = self._remaining = 0
            self._gathered, self._gathered_size = [head], len(head)
            if response.listener.expects_continue:
                self.set_timer("read")
            self._is_uploading = True
            self._body_left = None if request.framing == b"chunked" else length_of(request.pairs)
            self._upload = self.loop.create_task(self._send_stream(response, request.stream))
            self.loop.call_soon(self._flush)  # runs right after the first step of the task
        return response

    def _flush(self) -> None:
        """Write what was gathered, and gather no more."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None and not self.is_closed:
            self._transport.writelines(gathered)

    def _write(self, piece: bytes) -> None:
        """Write a part of the request body, or gather it with the head."""
        if self._gathered is None:
            self._transport.write(piece)
            return
        self._gathered.append(piece)
        self._gathered_size += len(piece)
        if self._gathered_size > MAX_GATHERED:
            self._flush()

    def start(self, response: UpstreamResponse, request: bytes, *further: bytes) -> None:
        """Send a complete request as bytes, and receive into `response`."""
        self._response = response
        self._received = self._remaining = 0
        if further:
            self._transport.writelines([request, *further])
        else:
            self._transport.write(request)
        seconds = response.timeouts.get("read")
        self._timeout = seconds or 0.0
        self.timer.set(seconds)

    def begin(
        self, response: UpstreamResponse, request: Sequence[bytes], left: int | None, *, gathers: bool = False
    ) -> None:
        """Send the beginning of a request, of whose body `left` bytes follow, None if their number is unknown.

        `send_piece` and `end_body` send the rest. `on_writable` of the listener is called when the upstream reads on.
        `gathers`: more of the body may follow in the same callback of the event loop, and leaves in the same write.
        """
        self._response = response
        self._received = self._remaining = 0
        self._is_uploading = True
        self._body_left = left
        if response.listener.expects_continue:
            self.set_timer("read")
        if gathers:
            self._gathered, self._gathered_size = [*request], sum(map(len, request))
            self.loop.call_soon(self._flush)
        else:
            self._transport.writelines(request)

    def send_piece(self, piece: bytes) -> None:
        """Send a piece of the request body, framed if it is chunked; drop it if no more of the body is wanted."""
        if not self._is_uploading:
            return
        if self._finishing is not None:
            self._rest -= len(piece)
            if self._rest < 0:
                self.close()
                return
        elif self._response is not None and self._response.listener.expects_continue:
            self.timer.clear()
        if self._body_left is not None:
            self._body_left -= len(piece)
        self._write(piece)

    def end_body(self, end: bytes) -> None:
        """Send the end of the framing of the request body, which is complete then."""
        if not self._is_uploading:
            return
        if end:
            self._write(end)
        self._is_uploading = False
        self._upload = None
        self._end_stall()
        self._flush()
        if self._finishing is not None:
            self._on_body_sent()
        elif self._response is not None and not self._response.is_head_complete:
            self.set_timer("read")

    @property
    def is_write_paused(self) -> bool:
        """True while the upstream reads more slowly than the client sends."""
        return self._writable is not None

    async def _send_stream(self, response: UpstreamResponse, stream: Any) -> None:
        is_chunked, left = self._body_left is None, self._body_left or 0
        try:
            async for piece in stream:
                if not piece:
                    continue
                left -= 0 if is_chunked else len(piece)
                if left < 0:
                    raise httpx.LocalProtocolError("the body is longer than its Content-Length")  # noqa: TRY301 - handled like any failure of a body
                self.send_piece(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                if self.is_closed:
                    return
                while self._writable is not None:
                    await asyncio.wait({self._writable})  # see `DownstreamConnection.wait_until_writable`
            if left:
                raise httpx.LocalProtocolError("the body is shorter than its Content-Length")  # noqa: TRY301 - as above
        except Exception as error:  # noqa: BLE001 - any failure of the body fails the response
            response.fail(error)
            self.close()
            return
        self.end_body(b"0\r\n%b\r\n" % _render_trailers(response.listener) if is_chunked else b"")

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _begin_stall(self, seconds: float) -> None:
        """Count the unacknowledged bytes, a system call, and check after `seconds` whether there are fewer."""
        self._stall = self.loop.call_later(seconds, self._check_stall, seconds, unacknowledged(self._transport))

    def _check_stall(self, seconds: float, before: int) -> None:
        """Fail the response if the upstream has read nothing for `seconds`, unless reading from it was paused.

        `before` is the number of unacknowledged bytes at the last check.
        """
        unsent = unacknowledged(self._transport)
        since = self.loop.time() if self._is_reading_paused or unsent < before else self._resumed_at
        left = since + seconds - self.loop.time()
        if left > 0:
            self._stall = self.loop.call_later(left, self._check_stall, seconds, unsent)
        else:
            self._time_out(seconds)

    def set_timer(self, name: str) -> None:
        """Start a timeout of the response by name: `read` for the head, `idle` between body pieces."""
        if self._response is not None:
            timeouts = self._response.timeouts
            seconds = timeouts.get(name, timeouts.get("read"))
            self._timeout = seconds or 0.0
            self.timer.set(seconds)

    def pause_writing(self) -> None:
        """Pause sending: the upstream reads more slowly than the client sends (asyncio callback).

        While the request body is sent, the upstream has its idle timeout to read on; that of the response is separate.
        """
        self._writable = self.loop.create_future()
        if self._is_uploading and self._response is not None:
            timeouts = self._response.timeouts
            seconds = timeouts.get("idle", timeouts.get("read"))
            if seconds is not None:
                self._stall = self.loop.call_later(STALL_BASELINE, self._begin_stall, seconds)

    def resume_writing(self) -> None:
        """Resume sending: the write buffer is below its low-water mark (asyncio callback)."""
        self._end_stall()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None
        if self._finishing is not None and not self._is_uploading:
            self._on_body_sent()
        elif self._finishing is not None:
            self._finishing.on_writable()
        elif self._is_uploading and self._response is not None:
            self._response.listener.on_writable()

    # Receiving: callbacks of the event loop, then of the parser

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Initialise transport and parser (asyncio callback)."""
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Return the buffer for the next read: RELAY_SIZE bytes for a relayed response, else READ_SIZE."""
        response = self._response
        return self._relay_buffer if response is not None and response.is_relayed else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process input; close the connection if there is no request to which it can belong."""
        data = bytes(self._relay_buffer[:nbytes])
        response = self._response
        if response is None:
            self.close()
            return
        if self._remaining:
            self._take_counted(response, data)
        elif self._chunks is not None:
            self._take_chunks(response, self._chunks, data)
        elif self._received:
            self._parse(response, data)
        elif not self._take_plain(response, data):
            response.on_complex_head()
            self._parse(response, data)

    def _take_plain(self, response: UpstreamResponse, data: bytes) -> bool:  # noqa: C901, PLR0912 - as in the parser of the head
        """Process the beginning of a response with a plain head; return False to leave it to the parser."""
        parts = parse_response_head(data, is_to_head=response.is_to_head)
        if parts is None:
            return False
        status, passed, size, length, keeps_alive, has_date, cost, keep_alive = parts
        received = len(data) - size
        chunks, checked = None, b""
        if length is None:
            if not response.takes_chunks(status):
                return False
            chunks = ChunkedBody()
            checked = chunks.feed(data[size:])
            if chunks.is_left_to_parser:
                return False
        elif received > length:  # the parser raises the error
            return False
        if size > MAX_HEAD_BYTES:
            return False
        self._received = size + received
        response.status, response.passed, response.has_date, response.keeps_alive = (
            status,
            passed,
            has_date,
            keeps_alive,
        )
        response.head = data[:size]
        if cost is not None:
            response.cost = cost
        if keep_alive is not None:
            self._obey_keep_alive(keep_alive)
        response.is_head_complete = True
        if chunks is not None:
            response.chunks = chunks
            self._append_chunks(response, chunks, checked)
        elif received == length:
            if received:
                response.pieces.append(data[size:])
            response.is_complete = True
        else:
            if received:
                response.append(data[size:])
            self._remaining = length - received  # type: ignore[operator]  # a body without a length is chunked
            self.timer.clear()
        self._on_progress(response)
        return True

    def _append_chunks(self, response: UpstreamResponse, chunks: ChunkedBody, checked: bytes) -> None:
        """Append checked chunks to the response, which is complete if they are."""
        if checked:
            response.append(checked)
        if chunks.state is ENDED:
            self._chunks = None
            response.is_complete = True
        else:
            self._chunks = chunks
            self.timer.clear()

    def _take_chunks(self, response: UpstreamResponse, chunks: ChunkedBody, data: bytes) -> None:
        """Process more of a chunked body; the parser processes it from the first chunk on that is not plain."""
        self._append_chunks(response, chunks, chunks.feed(data))
        if chunks.state is NOT_PLAIN:
            response.on_progress()
            response.on_complex_chunk()
            self._chunks = None
            self._parser = httptools.HttpResponseParser(self)
            self._parser.feed_data(_HEAD_OF_CHUNKS)
            self._headers, self._reason, self._unparsed = [], b"", 0
            self._parse(response, chunks.rest)
        elif chunks.state is INVALID:
            response.on_progress()
            self._fail(response, "not HTTP: a chunk does not end with a line break")
        else:
            self._on_progress(response)

    def _take_counted(self, response: UpstreamResponse, data: bytes) -> None:
        """Process more of a body whose length a plain head has announced."""
        if len(data) > self._remaining:
            self._fail(response, _SURPLUS)
            return
        self._remaining -= len(data)
        response.is_complete = not self._remaining
        response.append(data)
        self._on_progress(response)

    def _on_progress(self, response: UpstreamResponse) -> None:
        """Notify the reader, and release or pause the connection according to the state of the response."""
        if response.is_complete:
            self._finish(response)
            response.on_progress()
            return
        response.on_progress()
        current = self._response  # may be another one now
        if current is not None and current.buffered > RESPONSE_HIGH_WATER:  # a relayed response is not buffered
            self.pause_reading()

    def _parse(self, response: UpstreamResponse, data: bytes) -> None:
        """Process input by the parser."""
        size = len(data)
        if not self._received:
            self._unparsed = 0
            self._headers, self._reason, self._head_begun = [], b"", b""
        self._received += size
        self._unparsed += size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._response is response:  # otherwise it has failed within the call, and was passed on
                self._on_malformed(response, data, str(error))
            return
        except httptools.HttpParserUpgrade as upgrade:
            self._on_upgrade(response, data[upgrade.args[0] :])
            return
        if self._response is not response or response.error is not None:  # it has failed within the call
            return
        if not response.is_head_complete:
            self._head_begun += data
        if response.is_complete:
            self._on_progress(response)
        elif self._unparsed > MAX_HEAD_BYTES and response.is_head_complete and self._headers:
            self._end_in_trailers(response)
        elif self._unparsed > MAX_HEAD_BYTES or (not response.is_head_complete and self._received > MAX_HEAD_BYTES):
            self._fail(response, _TOO_LONG)
        else:
            self._on_progress(response)

    def _on_upgrade(self, response: UpstreamResponse, leftover: bytes) -> None:
        """Begin a switch of protocols, unless it was not asked for: then the response has failed within the parser."""
        if self._response is response and response.error is None:
            response.leftover = leftover
            self.pause_reading()
            response.on_progress()

    def _on_malformed(self, response: UpstreamResponse, data: bytes, cause: str) -> None:
        """Fail the response, unless only its trailers are malformed or its head can be repaired.

        After the head, an error in a field means that the body is complete: the trailers are dropped.
        """
        if response.is_head_complete and not response.is_complete and cause in _FIELD_ERRORS:
            self._end_in_trailers(response)
            return
        repaired = None
        if not response.is_head_complete and response.error is None and cause == _CONTROL_CHARACTER:
            repaired = _without_control_characters(self._head_begun + data)
        if repaired is None:
            self._fail(response, f"not HTTP: {cause}")
            return
        self._parser = httptools.HttpResponseParser(self)
        self._received = max(0, self._received - len(repaired))
        self._headers, self._reason, self._head_begun = [], b"", b""
        self._parse(response, repaired)

    def _end_in_trailers(self, response: UpstreamResponse) -> None:
        """Complete a response whose body is complete and whose trailers cannot be used; close the connection."""
        self._headers = []
        response.is_complete, response.keeps_alive = True, False
        self._on_progress(response)

    def _is_too_long(self, headers: HeaderList) -> bool:
        """Tell whether a complete head or trailer section is larger than MAX_HEAD_BYTES."""
        if self._received <= MAX_HEAD_BYTES:
            return False
        return sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES

    def on_message_begin(self) -> None:
        """Start a message; it is unexpected if the response is already complete (parser callback)."""
        response = self._response
        if response is None:
            self.close()
        elif response.is_complete:
            self._fail(response, _SURPLUS)

    def on_status(self, phrase: bytes) -> None:
        """Append a part of the reason phrase (parser callback)."""
        self._reason += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store one header field or trailer field (parser callback)."""
        self._headers.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        """Process the head of a final or interim response (parser callback)."""
        self._unparsed = 0
        headers, self._headers = self._headers, []
        reason, self._reason = self._reason, b""
        response = self._response
        if response is None or response.is_complete or response.error is not None:
            return
        if response.is_head_complete:  # this one precedes chunks that are not plain, see `_take_chunks`
            return
        if self._is_too_long(headers):
            self._fail(response, _TOO_LONG)
            return
        status = self._parser.get_status_code()
        if not 200 <= status <= 599:  # noqa: PLR2004 - RFC 9110 section 15
            self._on_special_status(response, status, reason, headers)
            return
        fields = fields_of(headers)
        codings = fields.get(b"transfer-encoding")
        if codings is not None and (len(codings) > 1 or codings[0].lower() != b"chunked"):
            self._fail(response, "an unsupported transfer coding")  # its hop-by-hop field would not reach the client
            return
        response.set_head(status, reason, headers, fields)
        response.version, response.keeps_alive = self._parser.get_http_version(), self._parser.should_keep_alive()
        if b"keep-alive" in fields:
            self._obey_keep_alive(fields[b"keep-alive"][0])
        self.timer.clear()
        if response.is_to_head:
            # The parser would wait for the body that these fields describe.
            response.is_complete = True
            self._parser = httptools.HttpResponseParser(self)
        elif status not in BODILESS:
            response.is_counted = codings is None and b"content-length" in fields
            response.is_until_close = codings is None and not response.is_counted

    def _obey_keep_alive(self, value: bytes) -> None:
        """Apply what the upstream announces by `Keep-Alive`."""
        if self.lifetime is None:
            self.lifetime = ConnectionLifetime()
        self.lifetime.announce(value)

    def _on_special_status(self, response: UpstreamResponse, status: int, reason: bytes, headers: HeaderList) -> None:
        if status == SWITCHING and response.listener.upgrade and self._parser.should_upgrade():
            response.set_head(status, reason, headers, fields_of(headers))
            self.timer.clear()
        elif status == SWITCHING:
            self._fail(response, "an unexpected switch of protocols")
        elif 100 <= status < 200:  # noqa: PLR2004 - the class of interim responses
            if status not in _KNOWN_INTERIM and framing(fields_of(headers)) is not None:
                self._fail(response, "an interim response with content")  # the parser would treat it as the final one
                return
            if status == _CONTINUE and response.listener.expects_continue and self._is_uploading:
                self.timer.clear()  # the client sends its body now, so the upstream has no timeout
            response.listener.on_interim(status, reason, headers)
        else:
            self._fail(response, f"status {status}")

    def on_body(self, piece: bytes) -> None:
        """Append a body piece; close the connection if no response expects it (parser callback)."""
        self._unparsed = 0
        response = self._response
        if response is None or response.is_complete:
            self.close()
        elif response.error is None:
            response.append(piece)

    def on_message_complete(self) -> None:
        """Complete the response, unless the message is an interim response (parser callback)."""
        response = self._response
        if response is None or response.error is not None:
            return
        if self._is_too_long(self._headers):
            self._headers, response.keeps_alive = [], False  # the trailers are dropped
        if response.is_head_complete and response.status != SWITCHING:
            response.is_complete = True
            if self._headers:
                response.trailers, self._headers = self._headers, []
                # A trailer `Connection: close` would have this parser refuse the next response.
                self._parser = httptools.HttpResponseParser(self)

    def eof_received(self) -> bool:
        """Close the connection: at once if it is idle, else by asyncio (asyncio callback)."""
        if self._response is None:
            self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Complete a response that is delimited by the end of the connection; fail any other (asyncio callback)."""
        was_open = not self.is_closed
        self.is_closed = True
        self.timer.stop()
        self._stop_upload()
        self._discard_rest()
        self.resume_writing()
        self._parser = None
        response = self._response
        if response is not None:
            if exc is None and was_open and response.is_head_complete and response.is_until_close:
                response.is_complete = True
                response.on_progress()
            elif self.is_reused and self._received == 0:
                response.fail(StaleConnection())
            else:
                response.fail(httpx.ReadError("closed before the response was complete"))
            self._detach()
        if was_open and self.pool is not None:
            self.pool.discard(self)

    # Ending

    def pause_reading(self) -> None:
        """Stop reading from the upstream, so that TCP applies back-pressure."""
        if not self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = True
            self._paused_at = self.loop.time()
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the upstream again, and add the pause to `reader_waited`."""
        if self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = False
            self._resumed_at = self.loop.time()
            if self._response is not None:
                self._response.reader_waited += self._resumed_at - self._paused_at
            self._transport.resume_reading()

    def move_to_tunnels(self) -> None:
        """Count this connection as a tunnel instead of a pooled connection. Raises ShareExceeded."""
        if self.pool is not None:
            self.pool.move_to_tunnels(self)

    def detach_transport(self) -> asyncio.Transport:
        """Return the transport after a 101, with reading paused; the new owner must call `connection_lost`."""
        transport: asyncio.Transport = self._transport
        self._detach()
        self.timer.stop()
        return transport

    def _fail(self, response: UpstreamResponse, cause: str) -> None:
        if response.is_complete and response.is_counted:
            response.is_complete, cause = False, _SURPLUS
        if response.is_complete:  # only the bytes after the response are invalid
            response.keeps_alive = False
            self._on_progress(response)
        else:
            response.fail(httpx.RemoteProtocolError(cause))
        self.close()

    def _on_timeout(self) -> None:
        if self._finishing is not None:
            self.close()
        else:
            self._time_out(self._timeout)

    def _time_out(self, seconds: float) -> None:
        """Fail the response with ReadTimeout and close the connection."""
        if self._response is not None:
            self._response.fail(httpx.ReadTimeout(f"no data for {seconds:g} s"))
            self.close()

    def abandon(self, response: UpstreamResponse) -> None:
        """Discard the response and close the connection, unless the response is complete."""
        if self._response is response:
            self._detach()
            self.close()

    def pass_on(self, response: UpstreamResponse, successor: UpstreamResponse) -> None:
        """Receive what follows of `response` into `successor`."""
        if self._response is response:
            self._response = successor

    def close(self) -> None:
        """Abort the connection, fail its response, and remove it from the pool. Idempotent."""
        self._stop_upload()
        self._discard_rest()
        if not self.is_closed:
            self.is_closed = True
            self.timer.stop()
            if self._response is not None:
                self._response.fail(httpx.ReadError("connection closed"))
            if self._transport is not None:
                self._transport.abort()
            if self.pool is not None:
                self.pool.discard(self)

    def _stop_upload(self) -> None:
        """Stop sending the request's body: another attempt may need the rest of it."""
        self._is_uploading = False
        self._end_stall()
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None

    def _finish(self, response: UpstreamResponse) -> None:
        """Return the connection to the pool, send the rest of the request's body before, or close the connection.

        It is closed if the upstream does not keep it alive, or has responded before the request was begun.
        """
        self._response = response.connection = None
        self.timer.clear()
        if self.is_closed or not response.keeps_alive or self._gathered is not None:
            self.close()
            return
        if self._is_reading_paused:
            self.resume_reading()
        if self._is_uploading or self._writable is not None:
            self._send_rest(response.listener)
        elif self.pool is not None:
            self.pool.release(self)

    def _send_rest(self, listener: ResponseListener) -> None:
        """Send the rest of the body within MAX_REST and REST_TIMEOUT; close the connection if that is not possible.

        A client that has not sent its body for lack of a 100 (Continue) may never send it.
        """
        if self._is_uploading and (listener.expects_continue or (self._body_left or 0) > MAX_REST):
            self.close()
            return
        self._finishing, self._rest = listener, MAX_REST
        self.timer.set(REST_TIMEOUT)
        if self._is_uploading:
            listener.continue_body()

    def _on_body_sent(self) -> None:
        """Return the connection to the pool if the rest of the body has been written and little of it is buffered."""
        if not self._is_uploading and self._writable is None:
            self._finishing = None
            self.timer.clear()
            if self.pool is not None:
                self.pool.release(self)

    def _discard_rest(self) -> None:
        """Give up the rest of the body, if it is being sent."""
        listener, self._finishing = self._finishing, None
        if listener is not None:
            listener.discard_body()

    def _detach(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.connection = None
        self.timer.clear()


def _without_control_characters(received: bytes) -> bytes | None:
    """Return the input from an unfinished final head on, with spaces for control characters in its field values.

    RFC 9110 section 5.5 permits the spaces. Preceding interim responses, which have been processed, are left out. None
    if there are no such characters, or if one is in a field that determines the framing.
    """
    start, end = 0, received.find(b"\r\n\r\n")
    while end >= 0 and _INTERIM_LINE.match(received, start):
        start, end = end + 4, received.find(b"\r\n\r\n", end + 4)
    end = len(received) if end < 0 else end
    head = received[start:end]
    if _CONTROL.search(head) is None or _CONTROL_IN_FRAMING.search(head) is not None:
        return None
    return _CONTROL.sub(b" ", head) + received[end:]


def _render_trailers(listener: ResponseListener) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in listener.trailers()])
