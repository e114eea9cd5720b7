"""One connection to an upstream, which sends one request at a time and receives its response: the receiving half.

`fast_parser` parses plain heads, whose bodies are delimited by their length; httptools parses everything else.
`sending_connection` has the other half.

Long because the callbacks of the parser and what feeds it share the state of the connection.
"""

import asyncio
from typing import Any

import httptools
import httpx

from api_gateway.eventloop.last_reads import last_reads
from api_gateway.eventloop.receive_buffer import READ_SIZE, receive_buffer
from api_gateway.http1.chunked import ENDED, INVALID, NOT_PLAIN, ChunkedBody
from api_gateway.http1.fast_parser import parse_response_head
from api_gateway.http1.headers import BODILESS, fields_of, framing
from api_gateway.models import HeaderList
from api_gateway.transport.head_repair import CONTROL_CHARACTER, FIELD_ERRORS, plain_reason, without_control_characters
from api_gateway.transport.lifetime import ConnectionLifetime
from api_gateway.transport.pool import StaleConnection
from api_gateway.transport.response import SWITCHING, UpstreamResponse
from api_gateway.transport.response_parser import response_parser
from api_gateway.transport.sending_connection import SendingConnection

RESPONSE_HIGH_WATER = 32 * 1024  # bytes buffered for a slow client before reading from the upstream is paused
MAX_HEAD_BYTES = 64 * 1024  # of a response head together with preceding interim responses, and of trailers
_SURPLUS = "more bytes than announced"
_HEAD_OF_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"  # for a parser that begins within the body
_TOO_LONG = f"a head of more than {MAX_HEAD_BYTES} bytes"
_CONTINUE = 100
_WEBSOCKET = [b"websocket"]
_VERSIONS = frozenset({"1.0", "1.1"})
_OTHER_PROTOCOLS = (b"R", b"I")  # RTSP and ICE, which the parser takes for HTTP
_KNOWN_INTERIM = frozenset({100, 102, 103})  # the parser ignores framing fields of these statuses


class UpstreamConnection(SendingConnection):
    """One connection, one request at a time. asyncio calls it by `UpstreamProtocol`.

    States: those of `SendingConnection`. While busy, the response is awaited (`_received` is 0) or arrives: after a
    plain head as a body of known length (`_remaining`) or in plain chunks (`_chunks`), else by the parser.

    A slow client occupies at most 256 KiB. A relayed response occupies two reads of RELAY_SIZE: one of which the
    client's transport has sent a part, because it keeps the whole and reports no pause below 64 KiB, and the next one.
    Any other response occupies these 64 KiB, RESPONSE_HIGH_WATER and one read of READ_SIZE here, and the same amount
    while it is written.
    """

    __slots__ = (
        "_buffer",
        "_chunks",
        "_head_begun",
        "_headers",
        "_parser",
        "_reason",
        "_relay_buffer",
        "_unparsed",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._relay_buffer = receive_buffer(loop)
        self._buffer = self._relay_buffer[:READ_SIZE]
        self._parser: Any = None  # only while connected, because it refers to this object
        self._headers: HeaderList = []  # of the head or the trailers being parsed
        self._reason = b""
        self._head_begun = b""  # input up to now, while the head is incomplete
        self._unparsed = 0  # bytes since the last complete head or body piece, which the parser buffers
        self._chunks: ChunkedBody | None = None  # the body, after a plain head of a chunked response

    # Callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Initialise transport and parser (asyncio callback)."""
        self._transport = transport
        self._parser = response_parser(self)

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
        elif self._take_plain(response, data):
            pass
        elif data.startswith(_OTHER_PROTOCOLS):
            self._fail(response, "not HTTP: a response of another protocol")
        else:
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
            self._parser = response_parser(self)
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
            self._let_others_read(response, size)

    def _let_others_read(self, response: UpstreamResponse, size: int) -> None:
        """Read on in the next turn of the event loop: small chunks take time, and uvloop reads up to 4 MB at once."""
        is_long = size == READ_SIZE and not (response.is_counted or response.is_until_close)
        if is_long and not self._is_reading_paused and not self.is_closed:
            self._transport.pause_reading()
            self.loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if not self._is_reading_paused and not self.is_closed:
            self._transport.resume_reading()

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
        if response.is_head_complete and not response.is_complete and cause in FIELD_ERRORS:
            self._end_in_trailers(response)
            return
        repaired = None
        if not response.is_head_complete and response.error is None and cause == CONTROL_CHARACTER:
            repaired = without_control_characters(self._head_begun + data)
        if repaired is None:
            self._fail(response, f"not HTTP: {cause}")
            return
        self._parser = response_parser(self)
        self._received = max(0, self._received - len(repaired))
        self._headers, self._reason, self._head_begun = [], b"", b""
        self._parse(response, repaired)

    def _end_in_trailers(self, response: UpstreamResponse) -> None:
        """Complete a response whose body is complete and whose trailers cannot be used; close the connection."""
        self._headers = []
        response.is_complete, response.keeps_alive = True, False
        self._on_progress(response)

    def _is_too_long(self, headers: HeaderList) -> bool:
        """Return whether a complete head or trailer section is larger than MAX_HEAD_BYTES."""
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
        reason, self._reason = plain_reason(self._reason), b""
        response = self._response
        if response is None or response.is_complete or response.error is not None:
            return
        if response.is_head_complete:  # this one precedes chunks that are not plain, see `_take_chunks`
            return
        if self._is_too_long(headers):
            self._fail(response, _TOO_LONG)
            return
        status = self._parser.get_status_code()
        if self._parser.get_http_version() not in _VERSIONS:
            self._fail(response, "a version other than HTTP/1.0 and HTTP/1.1")
            return
        if not 200 <= status <= 599:  # noqa: PLR2004 - RFC 9110 section 15
            self._on_special_status(response, status, reason, headers)
            return
        fields = fields_of(headers)
        codings = fields.get(b"transfer-encoding")
        if codings is not None and (len(codings) > 1 or codings[0].lower() != b"chunked"):
            self._fail(response, "an unsupported transfer coding")  # its hop-by-hop field would not reach the client
            return
        response.set_head(status, reason, headers, fields)
        version = self._parser.get_http_version()
        # HTTP/1.0 does not define the coding: the framing counts as faulty (RFC 9112 section 6.1).
        is_framed = codings is None or version != "1.0"
        response.version, response.keeps_alive = version, is_framed and self._parser.should_keep_alive()
        if b"keep-alive" in fields:
            self._obey_keep_alive(b",".join(fields[b"keep-alive"]))
        self.timer.clear()
        if response.is_to_head:
            # The parser would wait for the body that these fields describe.
            response.is_complete = True
            self._parser = response_parser(self)
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
            fields = fields_of(headers)
            if [value.lower() for value in fields.get(b"upgrade", ())] != _WEBSOCKET:  # the only one requested
                self._fail(response, "a switch to another protocol")
                return
            response.set_head(status, reason, headers, fields)
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
                # The fields of trailers must not affect the next response.
                self._parser = response_parser(self)

    def eof_received(self) -> bool:
        """Close the connection: at once if it is idle, else by asyncio (asyncio callback)."""
        if self._response is None:
            self.close()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Complete a response that is delimited by the end of the connection; fail any other (asyncio callback)."""
        was_open = not self.is_closed
        self.is_closed = True
        self._stop_upload()
        if exc is not None and was_open and self._response is not None:
            self._receive_last()
        self.timer.stop()
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

    def _receive_last(self) -> None:
        """Process what had arrived when sending failed: an upstream may respond early, and close without reading."""
        for size in last_reads(self._transport, self._buffer):
            if self._response is None:
                break
            self.buffer_updated(size)

    def _fail(self, response: UpstreamResponse, cause: str) -> None:
        if response.is_complete and response.is_counted:
            response.is_complete, cause = False, _SURPLUS
        if response.is_complete:  # only the bytes after the response are invalid
            response.keeps_alive = False
            self._on_progress(response)
        else:
            response.fail(httpx.RemoteProtocolError(cause))
        self.close()
