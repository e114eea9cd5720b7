"""One connection to an upstream: an asyncio protocol that sends one request at a time and receives its response.

`fast_parser` parses plain heads, whose bodies are delimited by their length; httptools parses everything else.

The module is long because it is one state machine: request and response share the connection's buffer, parser and
timer.
"""

import asyncio
from typing import Any

import httptools
import httpx

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.eventloop.receive_buffer import READ_SIZE, receive_buffer
from api_gateway.eventloop.send_queue import unacknowledged
from api_gateway.http1.fast_parser import parse_response_head
from api_gateway.http1.headers import BODILESS, fields_of, framing
from api_gateway.models import HeaderList
from api_gateway.transport.pool import Pool
from api_gateway.transport.request import LeanRequest, length_of, render_request_head
from api_gateway.transport.response import NO_LIMITS, NO_LISTENER, SWITCHING, ResponseListener, UpstreamResponse

RESPONSE_HIGH_WATER = 32 * 1024  # bytes buffered for a slow client before reading from the upstream is paused
MAX_HEAD_BYTES = 64 * 1024  # of a response head together with preceding interim responses, and of trailers
_SURPLUS = "more bytes than announced"
_TOO_LONG = f"a head of more than {MAX_HEAD_BYTES} bytes"
_CONTINUE = 100
_KNOWN_INTERIM = frozenset({100, 102, 103})  # the parser ignores framing fields of these statuses


class StaleConnection(httpx.ReadError):
    """A reused connection was closed before any byte of the response: the usual keep-alive race."""

    def __init__(self) -> None:
        super().__init__("a reused connection was closed before the response")


class UpstreamConnection(asyncio.BufferedProtocol):
    """One connection, one request at a time.

    States: connecting (no transport), idle (`_answer` is None), busy (`_answer` is set), closed (`is_closed`). While
    busy, the request body may still be sent (`_upload`) and reading may be paused.

    A slow client occupies at most 256 KiB: its transport buffers 64 KiB. In addition, a relayed response occupies one
    read of RELAY_SIZE; any other response RESPONSE_HIGH_WATER and one read of READ_SIZE here, and the same amount
    while it is written.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._relay_buffer = receive_buffer(loop)
        self._buffer = self._relay_buffer[:READ_SIZE]
        self.pool: Pool[UpstreamConnection] | None = None
        self.idle_since = 0.0
        self.is_closed = False
        self.is_reused = False
        self.holder: str | None = None
        self.alarm = DeadlineTimer(loop, self._on_alarm)
        self._patience = 0.0  # seconds to which the alarm was last set
        self._transport: Any = None  # an asyncio.Transport, from connection_made on
        self._parser: Any = None  # only while connected, because it refers to this object
        self._answer: UpstreamResponse | None = None
        self._upload: asyncio.Task[None] | None = None
        self._is_reading_paused = False
        self._paused_at = self._resumed_at = 0.0
        self._stall: asyncio.TimerHandle | None = None  # limits how long the upstream may stop reading
        self._writable: asyncio.Future[None] | None = None
        self._headers: HeaderList = []  # of the head or the trailers being parsed
        self._reason = b""
        self._received = 0  # bytes of this response so far
        self._unparsed = 0  # bytes since the last complete head or body piece, which the parser buffers
        self._left = 0  # bytes of the body that have not arrived, after a plain head

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "idle" if self._answer is None else "busy"
        return f"<UpstreamConnection [{state}]>"

    # Sending

    def send(self, request: LeanRequest) -> UpstreamResponse:
        """Send the request; return its response, which is still empty. Raises LocalProtocolError."""
        extensions = request.extensions
        answer = UpstreamResponse(
            self, request.method, extensions.get("timeout", NO_LIMITS), extensions.get("hooks", NO_LISTENER)
        )
        try:
            head = render_request_head(request)
        except BaseException:
            self.close()
            raise
        request.is_sent = True
        if request.framing is None:
            self.start(answer, head)
        else:
            self._answer = answer
            self._received = self._left = 0
            self._transport.write(head)
            if answer.listener.expects_continue:
                self.set_alarm("read")
            body = self._send_body(answer, request.stream, request.framing, length_of(request.pairs))
            self._upload = self.loop.create_task(body)
        return answer

    def start(self, answer: UpstreamResponse, request: bytes) -> None:
        """Send a complete request as bytes, and receive into `answer`."""
        self._answer = answer
        self._received = self._left = 0
        self._transport.write(request)
        seconds = answer.timeouts.get("read")
        self._patience = seconds or 0.0
        self.alarm.set(seconds)

    async def _send_body(self, answer: UpstreamResponse, stream: Any, framing: bytes, length: int) -> None:  # noqa: C901 - one loop, many exits
        is_chunked = framing == b"chunked"
        left = 0 if is_chunked else length
        try:
            async for piece in stream:
                if not piece:
                    continue
                if self.is_closed:
                    return
                if answer.listener.expects_continue:
                    self.alarm.clear()
                left -= 0 if is_chunked else len(piece)
                if left < 0:
                    raise httpx.LocalProtocolError("the body is longer than its Content-Length")  # noqa: TRY301 - handled like any failure of a body
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                if self._writable is not None:
                    await self._wait_until_writable(answer)
            if left:
                raise httpx.LocalProtocolError("the body is shorter than its Content-Length")  # noqa: TRY301 - as above
            if is_chunked and not self.is_closed:
                self._transport.write(b"0\r\n%b\r\n" % _render_trailers(answer.listener))
        except Exception as error:  # noqa: BLE001 - any failure of the body fails the response
            answer.fail(error)
            self.close()
            return
        self._upload = None
        if not answer.is_head_complete:
            self.set_alarm("read")

    async def _wait_until_writable(self, answer: UpstreamResponse) -> None:
        """Wait until the upstream reads on, at most for its idle timeout; the timeout of the response is separate."""
        seconds = answer.timeouts.get("idle", answer.timeouts.get("read"))
        if seconds is not None:
            self._stall = self.loop.call_later(seconds, self._check_stall, seconds, unacknowledged(self._transport))
        try:
            while self._writable is not None:
                await asyncio.wait({self._writable})  # see `DownstreamConnection.wait_until_writable`
        finally:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

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

    def set_alarm(self, name: str) -> None:
        """Start a timeout of the response by name: `read` for the head, `idle` between body pieces."""
        if self._answer is not None:
            timeouts = self._answer.timeouts
            seconds = timeouts.get(name, timeouts.get("read"))
            self._patience = seconds or 0.0
            self.alarm.set(seconds)

    def pause_writing(self) -> None:
        """Pause sending: the upstream reads more slowly than the client sends (asyncio callback)."""
        self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        """Resume sending: the write buffer is below its low-water mark (asyncio callback)."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # Receiving: callbacks of the event loop, then of the parser

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Initialise transport and parser (asyncio callback)."""
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Return the buffer for the next read: RELAY_SIZE bytes for a relayed response, else READ_SIZE."""
        answer = self._answer
        return self._relay_buffer if answer is not None and answer.is_relayed else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process input; close the connection if there is no request to which it can belong."""
        data = bytes(self._relay_buffer[:nbytes])
        answer = self._answer
        if answer is None:
            self.close()
            return
        if self._left:
            self._take_counted(answer, data)
        elif self._received:
            self._parse(answer, data)
        elif not self._take_plain(answer, data):
            answer.on_complex_head()
            self._parse(answer, data)

    def _take_plain(self, answer: UpstreamResponse, data: bytes) -> bool:
        """Process the beginning of a response with a plain head; return False to leave it to the parser."""
        parts = parse_response_head(data, is_to_head=answer.is_to_head)
        if parts is None:
            return False
        status, passed, size, length, keeps_alive, has_date, cost = parts
        came = len(data) - size
        if came > length or size > MAX_HEAD_BYTES:  # the parser raises the error
            return False
        self._received = size + came
        answer.status, answer.passed, answer.has_date, answer.keeps_alive = status, passed, has_date, keeps_alive
        answer.head = data[:size]
        if cost is not None:
            answer.cost = cost
        answer.is_head_complete = True
        if came:
            answer.pieces.append(data[size:])
        if came == length:
            answer.is_complete = True
        else:
            answer.buffered = came
            self._left = length - came
            self.alarm.clear()
        self._on_progress(answer)
        return True

    def _take_counted(self, answer: UpstreamResponse, data: bytes) -> None:
        """Process more of a body whose length a plain head has announced."""
        if len(data) > self._left:
            self._fail(answer, _SURPLUS)
            return
        self._left -= len(data)
        answer.is_complete = not self._left
        answer.append(data)
        self._on_progress(answer)

    def _on_progress(self, answer: UpstreamResponse) -> None:
        """Notify the reader, and release or pause the connection according to the state of the response."""
        if answer.is_complete:
            self._finish(answer)
            answer.on_progress()
            return
        answer.on_progress()
        if answer.buffered > RESPONSE_HIGH_WATER:  # never for a relayed response, which is not buffered
            self.pause_reading()

    def _parse(self, answer: UpstreamResponse, data: bytes) -> None:
        """Process input by the parser."""
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
            answer.on_progress()
            return
        if answer.is_complete:
            self._on_progress(answer)
        elif self._unparsed > MAX_HEAD_BYTES or (not answer.is_head_complete and self._received > MAX_HEAD_BYTES):
            self._fail(answer, _TOO_LONG)
        else:
            self._on_progress(answer)

    def _is_too_long(self, headers: HeaderList) -> bool:
        """Tell whether a complete head or trailer section is larger than MAX_HEAD_BYTES."""
        if self._received <= MAX_HEAD_BYTES:
            return False
        return sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES

    def on_message_begin(self) -> None:
        """Start a message; it is unexpected if the response is already complete (parser callback)."""
        answer = self._answer
        if answer is None:
            self.close()
        elif answer.is_complete:
            self._fail(answer, _SURPLUS)

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
        answer = self._answer
        if answer is None or answer.is_complete or answer.error is not None:
            return
        if self._is_too_long(headers):
            self._fail(answer, _TOO_LONG)
            return
        status = self._parser.get_status_code()
        if not 200 <= status <= 599:  # noqa: PLR2004 - RFC 9110 section 15
            self._on_unusual_status(answer, status, reason, headers)
            return
        fields = fields_of(headers)
        codings = fields.get(b"transfer-encoding")
        if codings is not None and (len(codings) > 1 or codings[0].lower() != b"chunked"):
            self._fail(answer, "an unsupported transfer coding")  # its hop-by-hop field would not reach the client
            return
        answer.status, answer.reason = status, reason
        answer.headers, answer.fields = headers, fields
        answer.is_head_complete = True
        answer.keeps_alive = self._parser.should_keep_alive()
        self.alarm.clear()
        if answer.is_to_head:
            # The parser would wait for the body that these fields describe.
            answer.is_complete = True
            self._parser = httptools.HttpResponseParser(self)
        elif status not in BODILESS:
            answer.is_counted = codings is None and b"content-length" in fields
            answer.is_until_close = codings is None and not answer.is_counted

    def _on_unusual_status(self, answer: UpstreamResponse, status: int, reason: bytes, headers: HeaderList) -> None:
        if status == SWITCHING and answer.listener.upgrade and self._parser.should_upgrade():
            answer.status, answer.reason = status, reason
            answer.headers, answer.fields = headers, fields_of(headers)
            answer.is_head_complete = True
            self.alarm.clear()
        elif status == SWITCHING:
            self._fail(answer, "an unexpected switch of protocols")
        elif 100 <= status < 200:  # noqa: PLR2004 - the class of interim responses
            if status not in _KNOWN_INTERIM and framing(fields_of(headers)) is not None:
                self._fail(answer, "an interim response with content")  # the parser would treat it as the final one
                return
            if status == _CONTINUE and answer.listener.expects_continue and self._upload is not None:
                self.alarm.clear()  # the client sends its body now, so the upstream has no timeout
            answer.listener.on_interim(status, reason, headers)
        else:
            self._fail(answer, f"status {status}")

    def on_body(self, piece: bytes) -> None:
        """Append a body piece; close the connection if no response expects it (parser callback)."""
        self._unparsed = 0
        answer = self._answer
        if answer is None or answer.is_complete:
            self.close()
        elif answer.error is None:
            answer.append(piece)

    def on_message_complete(self) -> None:
        """Complete the response, unless the message is an interim response (parser callback)."""
        answer = self._answer
        if answer is None or answer.error is not None:
            return
        if self._is_too_long(self._headers):
            self._fail(answer, _TOO_LONG)
        elif answer.is_head_complete and answer.status != SWITCHING:
            answer.is_complete = True
            if self._headers:
                answer.trailers, self._headers = self._headers, []

    def eof_received(self) -> bool:
        """Close the connection: at once if it is idle, else by asyncio (asyncio callback)."""
        if self._answer is None:
            self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Complete a response that is delimited by the end of the connection; fail any other (asyncio callback)."""
        was_open = not self.is_closed
        self.is_closed = True
        self.alarm.stop()
        self._stop_upload()
        self.resume_writing()
        self._parser = None
        answer = self._answer
        if answer is not None:
            if exc is None and was_open and answer.is_head_complete and answer.is_until_close:
                answer.is_complete = True
                answer.on_progress()
            elif self.is_reused and self._received == 0:
                answer.fail(StaleConnection())
            else:
                answer.fail(httpx.ReadError("closed before the response was complete"))
            self._detach(answer)
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
            if self._answer is not None:
                self._answer.reader_waited += self._resumed_at - self._paused_at
            self._transport.resume_reading()

    def set_apart(self) -> None:
        """Count this connection as a tunnel instead of a pooled connection. Raises OverShare."""
        if self.pool is not None:
            self.pool.set_apart(self)

    def hand_over(self) -> asyncio.Transport:
        """Return the transport after a 101, with reading paused; the new owner must call `connection_lost`."""
        transport: asyncio.Transport = self._transport
        self.alarm.stop()
        return transport

    def _fail(self, answer: UpstreamResponse, cause: str) -> None:
        if answer.is_complete and answer.is_counted:
            answer.is_complete, cause = False, _SURPLUS
        if answer.is_complete:  # only the bytes after the response are invalid
            answer.on_progress()
        else:
            answer.fail(httpx.RemoteProtocolError(cause))
        self.close()

    def _on_alarm(self) -> None:
        self._time_out(self._patience)

    def _time_out(self, seconds: float) -> None:
        """Fail the response with ReadTimeout and close the connection."""
        if self._answer is not None:
            self._answer.fail(httpx.ReadTimeout(f"no data for {seconds:g} s"))
            self.close()

    def abandon(self, answer: UpstreamResponse) -> None:
        """Discard the response and close the connection, unless the response is complete."""
        if self._answer is answer:
            self._detach(answer)
            self.close()

    def close(self) -> None:
        """Abort the connection, fail its response, and remove it from the pool. Idempotent."""
        self._stop_upload()
        if not self.is_closed:
            self.is_closed = True
            self.alarm.stop()
            if self._answer is not None:
                self._answer.fail(httpx.ReadError("connection closed"))
            if self._transport is not None:
                self._transport.abort()
            if self.pool is not None:
                self.pool.discard(self)

    def _stop_upload(self) -> None:
        """Stop reading the request's body: another attempt may need the rest of it."""
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None

    def _finish(self, answer: UpstreamResponse) -> None:
        """Return the connection to the pool, or close it if it cannot be reused.

        It cannot if the upstream does not keep it alive, or has responded before it received the complete request.
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

    def _detach(self, answer: UpstreamResponse) -> None:
        self._answer = None
        answer.connection = None
        self.alarm.clear()


def _render_trailers(listener: ResponseListener) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in listener.trailers()])
