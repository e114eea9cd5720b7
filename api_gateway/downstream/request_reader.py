"""The general parser of requests: llhttp, fed piece by piece, with limits on sizes and with methods of any name.

llhttp knows only some methods. It gets POST in place of others, so that their bodies are framed alike.

Long because the callbacks of llhttp and what feeds it share its state.
"""

import logging
import re
from enum import IntEnum, auto
from typing import Any, Final, Protocol

import httptools

from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.request_target import origin_form
from api_gateway.downstream.states import IllegalConnectionEvent
from api_gateway.errors import BadRequest, GatewayError, HeadersTooLarge, InternalError
from api_gateway.http1.chunked import MAX_CHUNK_BYTES, ChunkedEnd
from api_gateway.http1.headers import fields_of, framing, is_authority
from api_gateway.http1.methods import KNOWN_METHODS, REFUSED_METHODS
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import HeaderList

logger = logging.getLogger(__name__)

HEAD_PIECE, BODY_PIECE = 8_192, 65_536  # bytes parsed at once; limits the number of requests parsed from one read
CHUNK_OVERHEAD = 16  # bytes of chunk framing that are permitted for each byte of content
WEBSOCKET = b"websocket"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_LONGEST_METHOD = 64  # characters; the parser refuses a longer one
_METHOD = re.compile(rb"[\r\n]*+(" + _TOKEN + rb"{1,%d}+)(?= )" % _LONGEST_METHOD)
_METHOD_BEGUN = re.compile(rb"[\r\n]*+" + _TOKEN + rb"{1,%d}+" % _LONGEST_METHOD)
_HEAD_END = b"\r\n\r\n"
_VERSIONS = frozenset({"1.0", "1.1"})  # llhttp also takes 2.0, and 0.9 for a request line without a version
_LINE_WITHOUT_VERSION = re.compile(rb"[\r\n]*+[^ \r\n]++ [^ \r\n]++\r?\n")
_OTHER_VERSION = "The version of the request is not HTTP/1.0 or HTTP/1.1."
_OTHER_PROTOCOL = re.compile(rb" (?:RTSP|ICE)/[0-9.]+\r?")  # llhttp takes these for HTTP, with the same versions
_LONGEST_PROTOCOL = 16  # bytes at the end of a request line that matter
# Methods that the parser gets as they are: those forwarded, and those refused by their name.
_PARSED_METHODS = frozenset(name.encode() for name in KNOWN_METHODS | REFUSED_METHODS)


class RequestSink(Protocol):
    """Receives what a `RequestReader` reads."""

    def on_head_begun(self) -> None:
        """Note that a head has begun."""
        ...

    def on_request(self, head: RequestHead, trailers: HeaderList) -> None:
        """Take a request, whose body follows; `trailers` is filled before the end of the body."""
        ...

    def on_body_piece(self, piece: bytes) -> None:
        """Take a part of the body."""
        ...

    def on_body_announced(self, size: int) -> None:
        """Note that at least `size` more bytes of the body follow."""
        ...

    def on_body_complete(self) -> None:
        """Note the end of the body; also for a request without one."""
        ...

    def on_handshake(self) -> None:
        """Hold the input behind the WebSocket handshake that was the last request."""
        ...

    def refuse(self, error: GatewayError) -> None:
        """Refuse the request that is being read, and stop the reader."""
        ...


class _NoSink:
    """The sink of a closed reader, which reports nothing."""

    def on_head_begun(self) -> None:
        """Do nothing."""

    def on_request(self, head: RequestHead, trailers: HeaderList) -> None:
        """Do nothing."""

    def on_body_piece(self, piece: bytes) -> None:
        """Do nothing."""

    def on_body_announced(self, size: int) -> None:
        """Do nothing."""

    def on_body_complete(self) -> None:
        """Do nothing."""

    def on_handshake(self) -> None:
        """Do nothing."""

    def refuse(self, error: GatewayError) -> None:
        """Do nothing."""


_NO_SINK: Final = _NoSink()


class ExpectedPart(IntEnum):
    """The part of a request that the parser expects."""

    START = auto()  # the request line
    HEAD = auto()
    BODY = auto()


class RequestReader:
    """Reads requests and reports them to its `sink`. `stop` makes it ignore what it is still fed."""

    __slots__ = (
        "_body_left",
        "_chunks",
        "_content",
        "_expects_continue",
        "_has_more",
        "_head_end",
        "_headers",
        "_is_chunked",
        "_is_stopped",
        "_limits",
        "_line_begun",
        "_method_begun",
        "_overhead",
        "_parser",
        "_part",
        "_piece",
        "_trailers",
        "_unknown_method",
        "_unparsed",
        "_url",
        "sink",
    )

    def __init__(self, limits: ConnectionLimits, sink: RequestSink) -> None:
        self._limits = limits
        self.sink: RequestSink = sink
        self._parser: Any = None  # created for the first piece: plain requests do not need it
        self._part = ExpectedPart.START
        self._is_stopped = False
        self._url = b""
        self._headers: HeaderList = []
        self._trailers: HeaderList = []
        self._expects_continue = self._is_chunked = False
        self._method_begun = b""  # the beginning of a request line whose method is not complete
        self._unknown_method = b""  # of the head that is being received, if the parser gets POST in its place
        self._line_begun: bytes | None = b""  # the last bytes of an incomplete request line; None behind it
        self._body_left: int | None = None  # bytes of the body still to come; None if its length is unknown
        self._chunks: ChunkedEnd | None = None  # of the body, if it is chunked
        self._has_more = False  # bytes follow the piece that is being parsed
        self._head_end = b""  # the last bytes of a head whose end has not arrived
        self._overhead = 0  # bytes of a chunked body's framing, above CHUNK_OVERHEAD for each byte of content
        self._unparsed = 0  # bytes since the last complete head or body piece, which the parser buffers
        self._piece = 0  # size of the piece that is being parsed
        self._content: list[bytes] = []  # of the body in that piece, which may be many small chunks

    def __repr__(self) -> str:
        return f"<RequestReader [{'stopped' if self._is_stopped else self._part.name.lower()}]>"

    # Feeding

    def begin(self, data: bytes) -> memoryview:
        """Return received data as it is to be fed: behind the beginning of a method that was incomplete before."""
        if self._method_begun:
            data, self._method_begun = self._method_begun + data, b""
        return memoryview(data)

    def feed(self, view: memoryview) -> int:
        """Parse one piece from the beginning of `view`; return the number of bytes consumed.

        It is 0 only if the reader has been stopped or reports a handshake.
        """
        taken = 0
        if self._part is ExpectedPart.START:
            taken = self._take_method(view)
            view = view[taken:]
            if not view or self._is_stopped:
                return taken
        piece = self._next_piece(view)
        self._has_more = len(view) > len(piece)
        taken += self._feed(piece)
        if self._chunks is not None and self._part is ExpectedPart.BODY and not self._is_stopped:
            self._check_chunk(self._chunks)
        return taken

    def _check_chunk(self, chunks: ChunkedEnd) -> None:
        """Report the rest of the current chunk, so that a body above a limit is refused before it arrives."""
        if chunks.is_too_large:
            self._refuse(BadRequest(f"A chunk of the body is larger than {MAX_CHUNK_BYTES} bytes."))
        elif chunks.announced:
            self.sink.on_body_announced(chunks.announced)

    def check_sizes(self) -> None:
        """Refuse a head, trailers or chunk framing above the limit; to be called after the last piece of a read."""
        limit = self._limits.header_bytes
        if self._part is ExpectedPart.BODY and self._overhead > limit:
            self._refuse(BadRequest(f"The body has more than {limit} bytes of chunk extensions."))
        elif self._unparsed > limit:
            self._refuse_size()

    def forget_line_breaks(self) -> None:
        """Count line breaks before a request line anew."""
        if self._part is ExpectedPart.START:
            self._unparsed = 0

    def stop(self) -> None:
        """Ignore all further input."""
        self._is_stopped = True

    def close(self) -> None:
        """Release the parser and the sink, which breaks the reference cycles with them."""
        self._is_stopped = True
        self._parser = None
        self.sink = _NO_SINK

    def renew(self) -> None:
        """Continue to read requests after a handshake that was refused."""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _take_method(self, view: memoryview) -> int:
        """Give the parser POST in place of a method that it does not know; return the number of bytes consumed.

        A method that is not complete is held until more of it arrives.
        """
        start = bytes(view[: _LONGEST_METHOD * 2])
        found = _METHOD.match(start)
        if found is None:
            if len(start) == len(view) and _METHOD_BEGUN.fullmatch(start):
                self._method_begun = start
                self.sink.on_head_begun()
                return len(start)
        elif found[1] not in _PARSED_METHODS:
            self._unknown_method = found[1]
            self._feed(memoryview(b"POST"))
            return found.end()
        return 0

    def _next_piece(self, view: memoryview) -> memoryview:
        """Return the piece to parse next: up to the end of a head, or of a body.

        So each request begins at the beginning of a piece.
        """
        if self._part is ExpectedPart.BODY:
            piece = view[: min(BODY_PIECE, self._body_left or BODY_PIECE)]
            if self._chunks is not None:
                piece = piece[: self._chunks.find(bytes(piece))]
                self._overhead += len(piece)
            return piece
        before = self._head_end
        found = before + bytes(view[:HEAD_PIECE])
        end = found.find(_HEAD_END)
        if end < 0:
            self._head_end = found[-3:]
            return view[:HEAD_PIECE]
        self._head_end = b""
        return view[: end + 4 - len(before)]

    def _feed(self, piece: memoryview) -> int:
        size = self._piece = len(piece)
        self._unparsed += size
        if self._line_begun is not None and self._is_of_other_protocol(self._line_begun + bytes(piece)):
            self._refuse(BadRequest(_OTHER_VERSION))
            return size
        begins = self._part is ExpectedPart.START
        if self._parser is None:
            self.renew()
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            size = upgrade.args[0]
            self._on_upgrade()
        except httptools.HttpParserError as error:
            self._deliver()
            self._on_error(error)
        else:
            self._deliver()
            if (
                begins
                and self._part is ExpectedPart.HEAD
                and not self._is_stopped
                and _LINE_WITHOUT_VERSION.match(piece)
            ):
                self._refuse(BadRequest(_OTHER_VERSION))  # a client of HTTP/0.9 would send no more
        return size

    def _is_of_other_protocol(self, received: bytes) -> bool:
        """Return whether the request line, of which `received` is the beginning or the end, is not one of HTTP."""
        line, is_complete, _ = received.lstrip(b"\r\n").partition(b"\n")
        self._line_begun = None if is_complete else line[-_LONGEST_PROTOCOL:]
        return bool(is_complete) and _OTHER_PROTOCOL.fullmatch(line[line.rfind(b" ") :]) is not None

    def _deliver(self) -> None:
        """Report the content of the piece at once: thousands of chunks cost the loop as much as one."""
        content = self._content
        if content and not self._is_stopped:
            body = content[0] if len(content) == 1 else b"".join(content)
            content.clear()
            self.sink.on_body_piece(body)

    def _on_error(self, error: httptools.HttpParserError) -> None:
        """Refuse malformed HTTP with 400; an exception in a parser callback is the gateway's fault: 500."""
        if self._is_stopped:
            return
        cause = error.__context__
        if isinstance(cause, IllegalConnectionEvent):
            raise cause
        if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, httptools.HttpParserError):
            logger.error("failed to parse a request", exc_info=cause)
            self._refuse(InternalError("The gateway failed to parse the request."))
        else:
            fault = str(cause or error).rstrip(".")
            if isinstance(cause or error, httptools.HttpParserInvalidURLError):
                fault = "its target is not a valid URL"  # the parser quotes it, and it may contain a password
            self._refuse(BadRequest(f"The request is not well-formed HTTP/1.1: {fault}."))

    def _on_upgrade(self) -> None:
        """Report a WebSocket handshake; ignore other upgrades.

        The parser stops after the head of every upgrade request and treats the body as data of the other protocol. So
        a request for any other upgrade is parsed again without its `Upgrade` field (RFC 9110 section 7.8).
        """
        if self._is_stopped:
            return
        if self._part is ExpectedPart.START:
            self.sink.on_handshake()
            return
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        lines = [b"%b: %b" % pair for pair in self._headers if pair[0].lower() != b"upgrade"]
        head = b"\r\n".join([b"%b %b HTTP/%b" % (method, self._url, version), *lines, b"\r\n"])
        self.renew()
        if method == b"CONNECT":
            self._refuse(BadRequest("The method CONNECT is not supported."))
            return
        self._unparsed += len(head)
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._refuse(BadRequest("The requested protocol upgrade is not supported."))
        except httptools.HttpParserError as error:
            self._on_error(error)

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """Start a request (parser callback)."""
        self._url = b""
        self._headers = []
        self._expects_continue = self._is_chunked = False
        self._body_left = None
        if self._part is ExpectedPart.START and not self._is_stopped:
            self.sink.on_head_begun()
        self._part = ExpectedPart.HEAD

    def on_url(self, url: bytes) -> None:
        """Append a part of the request target (parser callback)."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store one header field or trailer field (parser callback)."""
        if self._part is ExpectedPart.HEAD:
            value = value.rstrip(b" \t")
            self._headers.append((name, value))
            if len(name) == 6 and name.lower() == b"expect":  # noqa: PLR2004 - the length test saves calls of `lower`
                self._expects_continue = value.lower() == b"100-continue"
            elif len(name) == 14 and value.isdigit() and name.lower() == b"content-length":  # noqa: PLR2004 - as above
                self._body_left = int(value)
            elif len(name) == 17 and name.lower() == b"transfer-encoding":  # noqa: PLR2004 - as above
                self._is_chunked = True
        elif not self._is_stopped:
            trailers = self._trailers
            trailers.append((name, value.rstrip(b" \t")))
            if len(trailers) > self._limits.header_lines or _size(trailers) > self._limits.header_bytes:
                self._refuse_size()

    def on_headers_complete(self) -> None:
        """Check the head against the limits and report the request (parser callback)."""
        size, self._unparsed = self._unparsed, 0
        if self._is_stopped:  # input after a refused request is discarded
            return
        limits = self._limits
        if self._parser.should_upgrade() and not self._is_handshake():
            return  # the parser stops here; `_on_upgrade` parses the request again without the upgrade
        if len(self._headers) > limits.header_lines:
            self._refuse(HeadersTooLarge(f"The request has more than {limits.header_lines} header lines."))
            return
        if size + self._piece > limits.header_bytes and len(self._url) + _size(self._headers) > limits.header_bytes:
            self._refuse_size()
            return
        try:
            head = self._head()
        except BadRequest as error:
            self._refuse(error)
            return
        except ValueError as error:
            self._refuse(BadRequest(f"The request target is not valid: {error}."))
            return
        self._part = ExpectedPart.BODY
        self._chunks = ChunkedEnd() if head.length is None else None
        self._overhead = 0
        self._trailers = []
        self.sink.on_request(head, self._trailers)

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body, which `_deliver` reports (parser callback)."""
        self._unparsed = 0
        if self._is_stopped or self._part is not ExpectedPart.BODY:
            return
        if self._body_left is None:
            self._overhead = max(0, self._overhead - CHUNK_OVERHEAD * len(body))
        else:
            self._body_left -= len(body)
        self._content.append(body)

    def on_message_complete(self) -> None:
        """End the request; the next head may follow in the same piece (parser callback)."""
        self._unparsed = 0
        self._deliver()  # may stop the reader
        if self._is_stopped or self._part is not ExpectedPart.BODY:
            return
        self._part, self._line_begun = ExpectedPart.START, b""
        self.sink.on_body_complete()

    def _head(self) -> RequestHead:
        """Return the complete head; raises ValueError for an invalid target, BadRequest for another version."""
        parser, headers = self._parser, self._headers
        method, version = (self._unknown_method or parser.get_method()).decode("ascii"), parser.get_http_version()
        self._unknown_method = b""
        if version not in _VERSIONS:
            raise BadRequest(_OTHER_VERSION)
        target, authority = origin_form(method, self._url)
        if authority is not None:
            if not all(is_authority(value) for name, value in headers if name.lower() == b"host"):
                raise BadRequest("The request is ambiguous: its Host is not a valid host with an optional port.")
            headers = [(name, authority if name.lower() == b"host" else value) for name, value in headers]
        keep_alive = version != "1.0" and parser.should_keep_alive()
        length = None if self._is_chunked else self._body_left or 0
        head = RequestHead(method, target, headers, version, length, keep_alive=keep_alive)
        head.expects_continue = self._expects_continue
        head.has_body_begun = self._has_more and length != 0
        if parser.should_upgrade():
            head.upgrade = WEBSOCKET
        return head

    def _is_handshake(self) -> bool:
        """Return whether the head is a WebSocket handshake (RFC 6455 section 4.1)."""
        fields = fields_of(self._headers)
        return (
            self._parser.get_method() == b"GET"
            and self._parser.get_http_version() == "1.1"
            and [value.lower() for value in fields.get(b"upgrade", ())] == [WEBSOCKET]
            and framing(fields) is None
        )

    def _refuse_size(self) -> None:
        self._refuse(HeadersTooLarge(f"The request's head is larger than {self._limits.header_bytes} bytes."))

    def _refuse(self, error: GatewayError) -> None:
        self.sink.refuse(error)


def _size(headers: HeaderList) -> int:
    """Return the size of header fields on the wire, in bytes."""
    return sum(len(name) + len(value) + 4 for name, value in headers)
