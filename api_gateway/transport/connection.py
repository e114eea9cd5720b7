"""One connection to an upstream: an asyncio protocol that sends a request and takes its answer, one at a time.

A plain head is taken apart by `fast_parser`, a body whose length it told is counted; everything else is for httptools.

Long because it is one state machine: request and response share the connection's buffer, parser and timer.
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

RESPONSE_HIGH_WATER = (
    32 * 1024
)  # bytes of a response held for a slow client before reading from the upstream is paused
MAX_HEAD_BYTES = 64 * 1024  # of an answer's head with the interim ones before it, and of its trailers
_SURPLUS = "more came than was announced"
_TOO_LONG = f"a head of more than {MAX_HEAD_BYTES} bytes"
_CONTINUE = 100
_KNOWN_INTERIM = frozenset({100, 102, 103})  # the parser knows that these have no content, whatever they announce


class StaleConnection(httpx.ReadError):
    """A reused connection died before any byte of an answer: the race every keep-alive client can lose."""

    def __init__(self) -> None:
        super().__init__("closed before any answer, on a connection kept alive")


class UpstreamConnection(asyncio.BufferedProtocol):
    """One connection, one request at a time.

    A slow client costs at most 256 KiB: its transport keeps 64 KiB. To that comes one read of RELAY_SIZE where it is
    relayed; else HIGH_WATER and one read of READ_SIZE are held here, and as much is being written.
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
        self._patience = 0.0  # what the alarm was set to
        self._transport: Any = None  # an asyncio.Transport, from connection_made on
        self._parser: Any = None  # while there is a connection: it refers to us
        self._answer: UpstreamResponse | None = None
        self._upload: asyncio.Task[None] | None = None
        self._is_reading_paused = False
        self._paused_at = self._resumed_at = 0.0
        self._stall: asyncio.TimerHandle | None = None  # how long the upstream may take to read on
        self._writable: asyncio.Future[None] | None = None
        self._headers: HeaderList = []  # of the head or the trailers that are being read
        self._reason = b""
        self._received = 0  # bytes of this answer so far
        self._unparsed = 0  # bytes since the last complete head or piece of body: what only the parser holds
        self._left = 0  # bytes still to come of a body whose length a plain head told

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "idle" if self._answer is None else "busy"
        return f"<UpstreamConnection [{state}]>"

    # Sending

    def send(self, request: LeanRequest) -> UpstreamResponse:
        """Send the request; its answer is still to come. Raises LocalProtocolError if it cannot be sent."""
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
        """Send a whole request, rendered, whose answer is made already."""
        self._answer = answer
        self._received = self._left = 0
        self._transport.write(request)
        seconds = answer.timeouts.get("read")
        self._patience = seconds or 0.0
        self.alarm.set(seconds)

    async def _send_body(self, answer: UpstreamResponse, stream: Any, framing: bytes, length: int) -> None:  # noqa: C901 - one loop, many ends
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
                    raise httpx.LocalProtocolError("the body is longer than its Content-Length")  # noqa: TRY301 - as any other way a body fails
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
                if self._writable is not None:
                    await self._wait_until_writable(answer)
            if left:
                raise httpx.LocalProtocolError("the body is shorter than its Content-Length")  # noqa: TRY301 - as above
            if is_chunked and not self.is_closed:
                self._transport.write(b"0\r\n%b\r\n" % _render_trailers(answer.listener))
        except Exception as error:  # noqa: BLE001 - whatever ends the body ends the answer, and its reader gets it
            answer.fail(error)
            self.close()
            return
        self._upload = None
        if not answer.is_head_complete:
            self.set_alarm("read")

    async def _wait_until_writable(self, answer: UpstreamResponse) -> None:
        """Wait for the upstream to read on, no longer than it may be idle; the answer's own clock runs apart."""
        seconds = answer.timeouts.get("idle", answer.timeouts.get("read"))
        if seconds is not None:
            self._stall = self.loop.call_later(seconds, self._check_stall, seconds, unacknowledged(self._transport))
        try:
            while self._writable is not None:
                await asyncio.wait({self._writable})  # see `protocol.DownstreamConnection.wait_until_writable`
        finally:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

    def _check_stall(self, seconds: float, before: int) -> None:
        """Give up on an upstream that has read nothing, unless its answer has not been read either in that time.

        `before` are the bytes that were unacknowledged at the last check.
        """
        unsent = unacknowledged(self._transport)
        since = self.loop.time() if self._is_reading_paused or unsent < before else self._resumed_at
        left = since + seconds - self.loop.time()
        if left > 0:
            self._stall = self.loop.call_later(left, self._check_stall, seconds, unsent)
        else:
            self._time_out(seconds)

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
        self._parser = httptools.HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Return where the event loop writes what it reads."""
        answer = self._answer
        return self._relay_buffer if answer is not None and answer.is_relayed else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Parse what came. Bytes that belong to no request mean the connection cannot be trusted any more."""
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
        """Take the beginning of an answer if its head is a plain one; otherwise it is the parser's."""
        parts = parse_response_head(data, is_to_head=answer.is_to_head)
        if parts is None:
            return False
        status, passed, size, length, keeps_alive, has_date, cost = parts
        came = len(data) - size
        if came > length or size > MAX_HEAD_BYTES:  # what is wrong with it is for the parser to find
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
        """Take more of a body whose length is known."""
        if len(data) > self._left:
            self._fail(answer, _SURPLUS)
            return
        self._left -= len(data)
        answer.is_complete = not self._left
        answer.append(data)
        self._on_progress(answer)

    def _on_progress(self, answer: UpstreamResponse) -> None:
        """Act on how far the answer has come, and let its reader know."""
        if answer.is_complete:
            self._finish(answer)
            answer.on_progress()
            return
        answer.on_progress()
        if answer.buffered > RESPONSE_HIGH_WATER:  # nothing is held of a response that is relayed
            self.pause_reading()

    def _parse(self, answer: UpstreamResponse, data: bytes) -> None:
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
            answer.on_progress()
            return
        if answer.is_complete:
            self._on_progress(answer)
        elif self._unparsed > MAX_HEAD_BYTES or (not answer.is_head_complete and self._received > MAX_HEAD_BYTES):
            self._fail(answer, _TOO_LONG)
        else:
            self._on_progress(answer)

    def _is_too_long(self, headers: HeaderList) -> bool:
        """Tell whether a head, or trailers, should have been refused had they not come in one piece."""
        if self._received <= MAX_HEAD_BYTES:
            return False
        return sum(len(name) + len(value) for name, value in headers) > MAX_HEAD_BYTES

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
            self._fail(answer, "switched protocols without being asked")
        elif 100 <= status < 200:  # noqa: PLR2004 - the class of interim answers
            if status not in _KNOWN_INTERIM and framing(fields_of(headers)) is not None:
                self._fail(answer, "an interim response with content")  # it would be taken for the final response's
                return
            if status == _CONTINUE and answer.listener.expects_continue and self._upload is not None:
                self.alarm.clear()  # now it is the client who is waited for
            answer.listener.on_interim(status, reason, headers)
        else:
            self._fail(answer, f"status {status}")

    def on_body(self, piece: bytes) -> None:
        """One piece of body; one that comes after the end belongs to nobody."""
        self._unparsed = 0
        answer = self._answer
        if answer is None or answer.is_complete:
            self.close()
        elif answer.error is None:
            answer.append(piece)

    def on_message_complete(self) -> None:
        """The end of the answer, unless it was an interim one."""
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
        """The upstream will send no more: it is closed from this side too, and at once if nobody uses it."""
        if self._answer is None:
            self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; an answer delimited by it is complete now, any other is broken."""
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
                answer.fail(httpx.ReadError("closed before the answer was complete"))
            self._detach(answer)
        if was_open and self.pool is not None:
            self.pool.discard(self)

    # Ending

    def pause_reading(self) -> None:
        """Make the upstream wait for the reader."""
        if not self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = True
            self._paused_at = self.loop.time()
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on after the reader has caught up."""
        if self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = False
            self._resumed_at = self.loop.time()
            if self._answer is not None:
                self._answer.reader_waited += self._resumed_at - self._paused_at
            self._transport.resume_reading()

    def set_apart(self) -> None:
        """Stop counting among the pool's connections: what it carries has no end of its own. Raises OverShare."""
        if self.pool is not None:
            self.pool.set_apart(self)

    def hand_over(self) -> asyncio.Transport:
        """Give the transport away after a 101, with reading paused; the owner then reports its loss to us."""
        transport: asyncio.Transport = self._transport
        self.alarm.stop()
        return transport

    def _fail(self, answer: UpstreamResponse, cause: str) -> None:
        if answer.is_complete and answer.is_counted:
            answer.is_complete, cause = False, _SURPLUS
        if answer.is_complete:  # by itself; only what came behind is wrong
            answer.on_progress()
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

    def abandon(self, answer: UpstreamResponse) -> None:
        """Drop the answer; unless it has fully arrived, the connection goes with it."""
        if self._answer is answer:
            self._detach(answer)
            self.close()

    def close(self) -> None:
        """Close now."""
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
        """Read no more of the request's body: another try may need what is left of it."""
        if self._upload is not None:
            self._upload.cancel()
            self._upload = None

    def _finish(self, answer: UpstreamResponse) -> None:
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

    def _detach(self, answer: UpstreamResponse) -> None:
        self._answer = None
        answer.connection = None
        self.alarm.clear()


def _render_trailers(listener: ResponseListener) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in listener.trailers()])
