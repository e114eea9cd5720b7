"""The server protocol for HTTP/1.1: uvicorn's httptools protocol with the gateway's own request cycle.

Differences from uvicorn's protocol (see also `request_cycle`):

- One task serves all requests of a connection in order; uvicorn starts one task for each request.
- Heads are limited in size, number of lines and time, bodies in their minimum rate, and connections in number for each
  address. Refusals are problem details, which reach the client even while it is still sending.
- The scope contains an `http1.asgi.ServerExtension` with the features that a proxy needs and ASGI does not define.
- Trailers are kept apart from header fields, and requests that follow a refused request are discarded.
- Any token is a method. The parser knows only some; it gets POST in place of others, so their bodies are framed alike.

The module is long because it is one state machine: all states of a connection share its buffer, timer and request
order.
"""

import asyncio
import json
import logging
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl

from api_gateway.downstream.request_cycle import REQUEST_HIGH_WATER, RequestResponseCycle
from api_gateway.errors import (
    BadRequest,
    GatewayError,
    HeadersTooLarge,
    InternalError,
    Overloaded,
    RequestTimeout,
    problem,
)
from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.eventloop.send_queue import unacknowledged
from api_gateway.http1.asgi import SERVER_EXTENSION, UNIX_PEER, FastPathProvider, InFlight
from api_gateway.http1.headers import fields_of, framing, http_date
from api_gateway.http1.methods import KNOWN_METHODS, REFUSED_METHODS
from api_gateway.http1.serializer import render_response_head
from api_gateway.models import HeaderList
from api_gateway.resilience.fair_shares import MAX_CONNECTIONS, FairShares

logger = logging.getLogger(__name__)

MAX_PIPELINED = 16  # pipelined requests that may be queued on one connection
HEAD_PIECE, BODY_PIECE = 8_192, 65_536  # bytes parsed at once; limits the number of requests parsed from one read
CHUNK_OVERHEAD = 16  # bytes of chunk framing that are permitted for each byte of content
MAX_DISCARDED = 1_048_576  # bytes of a body discarded after an early response before the connection is closed
MAX_LINGERED = 8_388_608  # bytes discarded after a refusal: closing at once would reset it before the client reads it
LINGER_TIMEOUT = 2.0  # seconds for which input is discarded after a refusal
MAX_SURPLUS = 64  # connections beyond the limits that are kept open until they have been refused with a response
SURPLUS_TIMEOUT = 2.0  # seconds within which the first head on a surplus connection must arrive
PROBES = (b"/healthz", b"/readyz")  # request targets that are served on surplus connections too
WEBSOCKET = b"websocket"
_MAPPED = "::ffff:"  # prefix of an IPv4-mapped IPv6 address
_ABSOLUTE_FORM = re.compile(rb"[hH][tT][tT][pP][sS]?://[^/?@]*([/?].*)?", re.DOTALL)
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
_LONGEST_METHOD = 64  # characters; the parser refuses a longer one
_METHOD = re.compile(rb"[\r\n]*+(" + _TOKEN + rb"{1,%d}+)(?= )" % _LONGEST_METHOD)
_METHOD_BEGUN = re.compile(rb"[\r\n]*+" + _TOKEN + rb"{1,%d}+" % _LONGEST_METHOD)
# Methods that the parser gets as they are: those forwarded, and those refused by their name.
_PARSED_METHODS = frozenset(name.encode() for name in KNOWN_METHODS | REFUSED_METHODS)
_VERSION = {"version": "3.0", "spec_version": "2.4"}
_EXTENSIONS: dict[str, Any] = {"http.response.trailers": {}}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of one downstream connection, in bytes, lines and seconds.

    `connections_per_peer` 0 means unlimited. `body_rate` is the minimum rate of a request body in bytes per second, 0
    for none; `body_grace` is the time in seconds by which a body may be behind that rate. `drain_linger` is the time
    for which an idle connection accepts one more request during a drain.
    """

    header_bytes: int
    header_lines: int
    header_timeout: float
    keep_alive_timeout: float
    idle_timeout: float
    drain_linger: float
    connections_per_peer: int
    body_rate: float
    body_grace: float


def _no_holder(_address: str) -> None:
    """Return no holder, so that only the total number of connections is limited."""


class DownstreamConnection(HttpToolsProtocol):
    """One downstream connection. `limited_protocol` sets `limits` and the counters that all connections share.

    States, in the order in which they are tested:

    - ending (`_is_ending`): nothing more is served; input is discarded. A tunnel (`_is_detached`) is ending too.
    - fast exchange (`_fast_exchange`): a request is on the fast path; further input is held (`_is_buffering`).
    - serving (`_current_cycle` without a complete response, or `_waiting`): the worker task runs the application.
    - receiving (`_has_begun`, `_unparsed` or `_receiving_cycle`): a head or a body is incomplete; may overlap with
      serving.
    - idle: no request is in progress. The fast path may take the next one if `_is_idle`, which a drain, a paused
      write and a surplus connection exclude.

    `_is_draining` is combined with any state: the next response closes the connection.
    """

    limits: ConnectionLimits  # of the class: the limits of new connections, which keep them
    peers: ClassVar[Counter[str]] = Counter()
    refused: ClassVar[Counter[str]] = Counter()
    shares: ClassVar[FairShares] = FairShares(MAX_CONNECTIONS)
    surplus: ClassVar[FairShares] = FairShares(MAX_SURPLUS)
    share_holder: ClassVar[Callable[[str], str | None]] = staticmethod(_no_holder)

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Initialise the connection and start the timeout of its first head."""
        self.transport = transport
        self.limits = type(self).limits
        self.connections.add(self)
        self.client = _peer(transport)
        self.scheme = "https" if is_ssl(transport) else "http"
        self.raw_headers: HeaderList = []
        self.expects_continue = False
        self.is_write_paused = False
        self._peer = self.client[0] if self.client and self.client is not UNIX_PEER else ""
        self.peers[self._peer] += 1
        self._surplus = self._acquire_slot()
        self._receiving_cycle: RequestResponseCycle | None = None  # the request whose body is not complete
        self._current_cycle: RequestResponseCycle | None = None  # the request being served, or the last one that was
        self._waiting: deque[RequestResponseCycle] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._idle_waiter: asyncio.Future[None] | None = None  # awaited by the worker while no request is queued
        self._writable: asyncio.Future[None] | None = None
        self._method_begun = b""  # the beginning of a request line whose method is not complete
        self._unknown_method = b""  # of the head that is being received, if the parser gets POST in its place
        self._body_left: int | None = None  # bytes of the body still to come; None if its length is unknown
        self._overhead = 0  # bytes of a chunked body's framing, above CHUNK_OVERHEAD for each byte of content
        self._unparsed = 0  # bytes since the last complete head or body piece, which the parser buffers
        self._discarded = 0
        self._buffered = bytearray()  # input that may not be parsed before a preceding request has its response
        self._replay_handle: asyncio.Handle | None = None  # the scheduled parsing of the held input
        self._is_buffering = self._is_detached = False
        self._piece = 0  # bytes that are being parsed
        self._has_begun = False  # a head has begun and is not complete
        self._is_timed = True  # the timeout of this head runs; for the first head, since the connection was made
        self._is_closed = self._is_ending = self._is_read_paused = False
        self._is_last = False  # the client has sent EOF: the held input is served, then the connection is closed
        self._is_draining = False  # the server stops: the connection is closed after the next response
        self._unsent = 0  # bytes that the client had not acknowledged at the last check
        self._timer = DeadlineTimer(self.loop, self._on_timeout)
        self._timer.set(SURPLUS_TIMEOUT if self._surplus else self.limits.header_timeout)
        self._body_bytes = 0  # body bytes received since the deadline of the body was last set
        self._paused_at = 0.0  # when reading was last paused
        self.last_headers: Any = None  # the header set of the previous request, cached by the fast path
        self._fast_path: FastPathProvider | None = getattr(self.app, "fast_path", None)
        self._fast_exchange: InFlight | None = None  # the request in flight on the fast path
        self._is_idle = self._fast_path is not None and not self._surplus  # the fast path may take the next read

    def __repr__(self) -> str:
        if self.client is None:
            return "<DownstreamConnection [not connected]>"
        if self._is_ending or self._is_closed:
            state = "ending"
        elif self._fast_exchange is not None:
            state = "fast exchange"
        elif self._waiting or (self._current_cycle is not None and not self._current_cycle.is_response_complete):
            state = f"serving, {len(self._waiting)} queued"
        else:
            state = "receiving" if self._has_begun or self._unparsed or self._receiving_cycle is not None else "idle"
        return f"<DownstreamConnection {self.client[0]} [{state}{', draining' if self._is_draining else ''}]>"

    def _acquire_slot(self) -> str:
        """Count this connection against the limits; return the reason for its refusal, empty if it is admitted.

        A refused connection is kept until it has received a response. At most MAX_SURPLUS such connections are kept,
        divided into fair shares; further ones are aborted at once.
        """
        limit, holder = self.limits.connections_per_peer, type(self).share_holder(self._peer)
        self._holder, self._slots = holder, self.shares
        reason = ""
        if self._peer and 0 < limit < self.peers[self._peer]:
            reason = f"Your address has more than {limit} connections."
        elif not self.shares.admits(holder):
            reason = f"The gateway accepts no more connections: {self.shares.refusal(holder, 'connections')}."
            self.shares.refused += 1
        if reason:
            self._slots = self.surplus
            if not self.surplus.admits(holder):
                self._holder = None  # an aborted connection counts against the total only
                self.transport.abort()
        self._slots.acquire(self._holder)
        return reason

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Release the connection's resources and abort its exchanges."""
        self.connections.discard(self)
        self._slots.release(self._holder)
        self.peers[self._peer] -= 1
        if not self.peers[self._peer]:
            del self.peers[self._peer]
        self._is_closed = True
        self._is_idle = False
        self._timer.stop()
        exchange, self._fast_exchange = self._fast_exchange, None
        self.resume_writing()
        self._drop_waiting()
        self._wake_worker()
        if self._current_cycle is not None:
            self._current_cycle.disconnect()
        self.parser = None  # type: ignore[assignment]  # as in uvicorn: breaks the reference cycle
        if exchange is not None:
            exchange.on_client_disconnected()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's returns None
        """Return whether to keep the connection: a half-closed client may still read (RFC 9112 section 9.6)."""
        last = self._waiting[-1] if self._waiting else self._current_cycle
        if self._buffered and not (
            last is not None and last.upgrade
        ):  # it may contain a request with `Connection: close`
            self._is_last = True
            return True
        if self._fast_exchange is not None:
            return not self._fast_exchange.keep_alive
        return (
            last is not None
            and not last.is_response_complete
            and last.is_body_complete
            and not last.keep_alive
            and not self._is_ending
        )

    def shutdown(self) -> None:
        """Close the connection gracefully, without losing a request that the client is sending.

        A response whose head has not been sent gets `Connection: close`. An idle connection stays open for
        `drain_linger` seconds, so that a request that was already sent gets a response with `Connection: close`.
        """
        if self._is_draining:
            return
        self._is_draining = True
        if self._current_cycle is not None:
            self._current_cycle.stop()
        if self._is_detached:
            return
        self._announce_close()

    def _announce_close(self) -> None:
        """Add `Connection: close` to the last pending response, unless its head has been sent."""
        last = self._waiting[-1] if self._waiting else self._current_cycle
        if self._buffered:  # repeated once the held requests have been parsed
            return
        if self._fast_exchange is not None:
            self._fast_exchange.keep_alive = self._fast_exchange.keep_alive and self._fast_exchange.is_head_sent
        elif last is not None and not last.is_response_complete:
            last.keep_alive = last.keep_alive and last.is_started
        elif not self._is_ending:
            self._drain_idle()

    def _drain_idle(self) -> None:
        """Wait `drain_linger` seconds for one more request, which is served on the ASGI path."""
        self._is_idle = False
        if not (self._has_begun or self._unparsed or self._receiving_cycle is not None):
            self._is_timed = False  # a head that begins meanwhile starts its own timeout
            self._timer.set(self.limits.drain_linger)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Process input: on the fast path if it is a plain request, else by the parser within the limits."""
        if self._is_idle:
            if self._fast_path.current.try_handle(self, data):  # type: ignore[union-attr]  # implied by `_is_idle`
                return
            self._is_idle = False
        if self._is_ending:
            self._discarded += len(data)
            if self._discarded > MAX_LINGERED:
                self.transport.abort()
            return
        if self._is_buffering:
            self._buffer(data)
        else:
            self._parse(data)
            if self._is_draining:
                self._announce_close()

    def _buffer(self, data: bytes | memoryview) -> None:
        """Hold input that may not be parsed yet; pause reading above REQUEST_HIGH_WATER."""
        self._is_buffering = True
        self._buffered += data
        if len(self._buffered) > REQUEST_HIGH_WATER:
            self.pause_reading()

    def _parse(self, data: bytes) -> None:
        """Parse `data` piece by piece; hold the rest once MAX_PIPELINED requests are queued."""
        if self._method_begun:
            data, self._method_begun = self._method_begun + data, b""
            self._has_begun = False
        view = memoryview(data)
        while view and not self._is_ending:
            if self._is_buffering or len(self._waiting) > MAX_PIPELINED:
                if not self._is_buffering:
                    self.pause_reading()
                self._buffer(view)
                return
            if self._receiving_cycle is None:
                view = self._take_method(view)
                if not view:
                    break
            view = view[self._feed(self._next_piece(view)) :]
        if self._is_ending:
            return
        if self._receiving_cycle is not None:
            self._check_body(self._receiving_cycle)
        if (self._unparsed or self._has_begun) and not self._is_ending:
            self._await_complete_head()

    def _take_method(self, view: memoryview) -> memoryview:
        """Give the parser POST in place of a method that it does not know; return what is left to parse.

        A method that is not complete is held until more of it arrives.
        """
        if self._has_begun:
            return view
        start = bytes(view[: _LONGEST_METHOD * 2])
        found = _METHOD.match(start)
        if found is None:
            if len(start) == len(view) and _METHOD_BEGUN.fullmatch(start):
                self._method_begun, self._has_begun = start, True
                return view[len(view) :]
        elif found[1] not in _PARSED_METHODS:
            self._unknown_method = found[1]
            self._feed(memoryview(b"POST"))
            return view[found.end() :]
        return view

    def _next_piece(self, view: memoryview) -> memoryview:
        """Return the piece to parse next: up to the end of a head, or of a body whose length is known.

        So the method of the next request is at the beginning of a piece, except behind a chunked body.
        """
        if self._receiving_cycle is not None:
            piece = view[: min(BODY_PIECE, self._body_left or BODY_PIECE)]
            if self._body_left is None:
                self._overhead += len(piece)
            return piece
        end = bytes(view[:HEAD_PIECE]).find(b"\r\n\r\n")
        return view[: HEAD_PIECE if end < 0 else end + 4]

    def _feed(self, piece: memoryview) -> int:
        """Parse one piece; return the number of bytes consumed.

        It is 0 only if the connection is ending or holds its input, so the loop in `_parse` always terminates.
        """
        size = self._piece = len(piece)
        self._unparsed += size
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            size = upgrade.args[0]
            self._on_upgrade()
            if size == 0 and not self._is_buffering:
                self._close()
        except httptools.HttpParserError as error:
            self._on_error(error)
        return size

    def _replay_soon(self) -> None:
        """Schedule parsing of the held input after the current callback."""
        if self._replay_handle is None:
            self._replay_handle = self.loop.call_soon(self._replay_buffered)

    def _replay_buffered(self) -> None:
        """Parse the held input and resume reading."""
        self._replay_handle = None
        data, self._buffered = bytes(self._buffered), bytearray()
        self._is_buffering = False
        if not self._is_closed:
            self._parse(data)
            if self._is_draining:
                self._announce_close()
            self.resume_reading()

    def _on_error(self, error: httptools.HttpParserError) -> None:
        """Refuse malformed HTTP with 400; an exception in a parser callback is the gateway's fault: 500."""
        if self._is_ending:
            return
        cause = error.__context__
        if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, httptools.HttpParserError):
            logger.error("failed to parse a request", exc_info=cause)
            self.refuse(InternalError("The gateway failed to parse the request."))
        else:
            self.refuse(BadRequest(f"The request is not well-formed HTTP/1.1: {str(cause or error).rstrip('.')}."))

    def _await_complete_head(self) -> None:
        """Apply the limits of size and time to an incomplete head."""
        if self._unparsed > self.limits.header_bytes:
            self._refuse_size()
        elif self._has_begun and not self._is_timed:
            self._is_timed = True
            self._timer.set(self.limits.header_timeout)

    def on_message_begin(self) -> None:
        """Start a request (parser callback)."""
        self.url = b""
        self.raw_headers = []
        self.expects_continue = False
        self._body_left = None
        self._has_begun = True

    def on_url(self, url: bytes) -> None:
        """Append a part of the request target (parser callback)."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store one header field or trailer field (parser callback)."""
        if self._has_begun:
            self.raw_headers.append((name, value.rstrip(b" \t")))
            if len(name) == 6 and name.lower() == b"expect":  # noqa: PLR2004 - the length test saves calls of `lower`
                self.expects_continue = value.lower() == b"100-continue"
            elif len(name) == 14 and value.isdigit() and name.lower() == b"content-length":  # noqa: PLR2004 - as above
                self._body_left = int(value)
        else:
            self._on_trailer(name, value.rstrip(b" \t"))

    def _on_trailer(self, name: bytes, value: bytes) -> None:
        if self._receiving_cycle is not None:
            trailers = self._receiving_cycle.trailers
            trailers.append((name, value))
            if len(trailers) > self.limits.header_lines or _size(trailers) > self.limits.header_bytes:
                self._refuse_size()

    def on_headers_complete(self) -> None:
        """Check the head against the limits and enqueue the request (parser callback)."""
        size, self._unparsed = self._unparsed, 0
        self._has_begun = self._is_timed = False
        if self._is_ending:  # input after a refused request is discarded
            return
        limits = self.limits
        if self.parser.should_upgrade() and not self._is_handshake():
            return  # the parser stops here; `_on_upgrade` parses the request again without the upgrade
        if len(self.raw_headers) > limits.header_lines:
            self.refuse(HeadersTooLarge(f"The request has more than {limits.header_lines} header lines."))
            return
        if size + self._piece > limits.header_bytes and len(self.url) + _size(self.raw_headers) > limits.header_bytes:
            self._refuse_size()
            return
        if self._surplus and self.url not in PROBES:
            self.refuse(Overloaded(self._surplus, retry_after=1))
            return
        try:
            cycle = self._parsed_cycle()
        except ValueError as error:
            self.refuse(BadRequest(f"The request target is not valid: {error}."))
            return
        self._receiving_cycle = cycle
        self._body_bytes = self._overhead = 0
        self._enqueue(cycle)

    def _enqueue(self, cycle: RequestResponseCycle) -> None:
        """Queue a request for the worker task, which is started if necessary."""
        self._waiting.append(cycle)
        if self._worker is None or self._worker.done():
            self._worker = self.loop.create_task(self._serve_requests())
            self.tasks.add(self._worker)
            self._worker.add_done_callback(self.tasks.discard)
        elif self._idle_waiter is not None:
            self._wake_worker()

    def _parsed_cycle(self) -> RequestResponseCycle:
        """Return the cycle of the request whose head is complete; raises ValueError for an invalid target."""
        parser = self.parser
        method, version = (self._unknown_method or parser.get_method()).decode("ascii"), parser.get_http_version()
        self._unknown_method = b""
        target = self.url
        if b"#" in target:
            raise ValueError("it contains a fragment")
        if not target.startswith(b"/"):
            target = self._origin_form(method, target)
        cycle = self._cycle(method, target, version)
        if version == "1.0":
            cycle.is_http10, cycle.keep_alive = True, False
        elif not parser.should_keep_alive() or self._surplus:
            cycle.keep_alive = False
        if parser.should_upgrade():
            cycle.upgrade = WEBSOCKET
        return cycle

    @cached_property
    def _template(self) -> dict[str, Any]:
        """The part of the ASGI scope that all requests of this connection have in common."""
        return {
            "type": "http",
            "asgi": _VERSION,
            "server": _plain(get_local_addr(self.transport)),
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "extensions": _EXTENSIONS,
        }

    def _cycle(self, method: str, target: bytes, version: str) -> RequestResponseCycle:
        """Return a new request cycle with the header fields in `raw_headers`."""
        raw_path, _, query = target.partition(b"?")
        path = raw_path.decode("ascii")
        headers = [(name.lower(), value) for name, value in self.raw_headers]
        scope: dict[str, Any] = {
            **self._template,
            "http_version": version,
            "method": method,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": headers,
            "state": self.app_state.copy(),
        }
        scope[SERVER_EXTENSION] = cycle = RequestResponseCycle(self, scope, target)
        return cycle

    def _origin_form(self, method: str, target: bytes) -> bytes:
        """Return path and query of an absolute-form target; its authority replaces Host (RFC 9112 section 3.2.2).

        The absolute form of `*` has neither path nor query. Raises ValueError if the target is neither in absolute
        form nor, for OPTIONS, `*` (section 3.2.4).
        """
        if target == b"*" and method == "OPTIONS":
            return target
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        if absolute is None:
            raise ValueError("it is neither a path nor an http or https URL without user information")
        url = httptools.parse_url(target)
        if not url.host:
            raise ValueError("it contains no host")
        host = b"[%b]" % url.host if b":" in url.host else url.host
        authority = host if url.port is None else b"%b:%d" % (host, url.port)
        self.raw_headers[:] = [
            (name, authority if name.lower() == b"host" else value) for name, value in self.raw_headers
        ]
        rest = absolute[1] or b""
        if method == "OPTIONS" and not rest:
            return b"*"
        return rest if rest.startswith(b"/") else b"/" + rest

    def on_body(self, body: bytes) -> None:
        """Pass a body piece to the request; discard it if the response is complete (parser callback).

        After the response, pieces of a body that is continued count as discarded ones do.
        """
        self._unparsed = 0
        cycle = self._receiving_cycle
        if cycle is None or self._is_ending:
            return
        self._body_bytes += len(body)
        if self._body_left is None:
            self._overhead = max(0, self._overhead - CHUNK_OVERHEAD * len(body))
        else:
            self._body_left -= len(body)
        if not cycle.is_response_complete or cycle.is_body_continued:
            if cycle.feed(body):
                self.pause_reading()
            if not cycle.is_response_complete:
                return
        self._discarded += len(body)
        if self._discarded > MAX_DISCARDED:
            self._linger()

    def on_message_complete(self) -> None:
        """End the request; the next head may follow in the same piece (parser callback)."""
        self._unparsed = 0
        cycle, self._receiving_cycle = self._receiving_cycle, None
        if cycle is None or self._is_ending:
            return
        cycle.end_body()
        if cycle.is_response_complete:
            self._become_idle()
        else:
            self._timer.set(self._current_timeout())

    def _is_handshake(self) -> bool:
        """Tell whether the head is a WebSocket handshake (RFC 6455 section 4.1)."""
        fields = fields_of(self.raw_headers)
        return (
            self.parser.get_method() == b"GET"
            and self.parser.get_http_version() == "1.1"
            and [value.lower() for value in fields.get(b"upgrade", ())] == [WEBSOCKET]
            and framing(fields) is None
        )

    def _on_upgrade(self) -> None:
        """Hold the input after a WebSocket handshake until its response; ignore other upgrades.

        The parser stops after the head of every upgrade request and treats the body as data of the other protocol. So
        a request for any other upgrade is parsed again without its `Upgrade` field (RFC 9110 section 7.8).
        """
        if self._is_ending:
            return
        last = self._waiting[-1] if self._waiting else self._current_cycle
        if last is not None and last.upgrade and not last.is_response_complete and self._receiving_cycle is None:
            self._is_buffering = True
            return
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [b"%b: %b" % pair for pair in self.raw_headers if pair[0].lower() != b"upgrade"]
        head = b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"\r\n"])
        self._renew_parser()
        if method == b"CONNECT":
            self.refuse(BadRequest("The method CONNECT is not supported."))
            return
        self._unparsed += len(head)
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self.refuse(BadRequest("The requested protocol upgrade is not supported."))
        except httptools.HttpParserError as error:
            self._on_error(error)

    def _renew_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def pause_reading(self) -> None:
        """Stop reading from the client, so that TCP applies back-pressure."""
        if not self._is_read_paused and not self.transport.is_closing():
            self._is_read_paused = True
            self._paused_at = self.loop.time()
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the client again, unless input is held."""
        if self._is_buffering or self.transport.is_closing():
            return
        if self._is_read_paused:
            self._is_read_paused = False
            self._extend_body_due()
            self.transport.resume_reading()

    # The fast path: implements `fast_path.Downstream`

    def begin_exchange(self, exchange: InFlight) -> None:
        """Hold further input until the exchange ends, and report events of the connection to it."""
        self._fast_exchange = exchange
        self._is_idle = self._is_timed = False
        self._is_buffering = True
        self._timer.clear()

    def end_exchange(self, *, keep_alive: bool) -> None:
        """Process the next request after a complete response, or close the connection."""
        self._fast_exchange = None
        self.server_state.total_requests += 1
        if self._is_closed:
            return
        if not keep_alive:
            self._close()
        elif self._buffered:
            self._replay_soon()
            self._timer.set(self._current_timeout())
        else:
            self._is_buffering = False
            self._become_idle()

    def write_response(self, response: bytes, *, keep_alive: bool) -> None:
        """Send a complete response to a request for which `begin_exchange` was not called."""
        self.transport.write(response)
        self.server_state.total_requests += 1
        self._is_timed = False
        if keep_alive:
            self._become_idle()
        else:
            self._close()

    @property
    def is_busy(self) -> bool:
        """True while a request is served, a tunnel is open, or a response is not completely written."""
        return self._fast_exchange is not None or self._is_working or self.transport.get_write_buffer_size() > 0

    @property
    def _is_working(self) -> bool:
        return self._worker is not None and self._idle_waiter is None and not self._worker.done()

    def abort(self) -> None:
        """Abort the connection at the end of the drain, unless a task serves it: the server cancels tasks itself."""
        if self._is_working:
            return
        self.transport.abort()
        exchange, self._fast_exchange = self._fast_exchange, None
        if exchange is not None:
            exchange.on_forced_close()

    def run_asgi(
        self, app: Any, method: str, target: bytes, headers: HeaderList, body: bytes, *, keep_alive: bool
    ) -> None:
        """Serve the request by `app` on the ASGI path, whether or not `begin_exchange` was called for it."""
        self._fast_exchange = None
        self._is_idle = self._is_timed = False
        self.raw_headers = headers
        self.expects_continue = False
        cycle = self._cycle(method, target, "1.1")
        cycle.app = app
        cycle.keep_alive = keep_alive
        if body:
            cycle.feed(body)
        cycle.end_body()
        self._enqueue(cycle)
        self._timer.set(self._current_timeout())
        if self._buffered:
            self._replay_soon()
        else:
            self._is_buffering = False

    def _become_idle(self) -> None:
        """Set the timeout for the next request; open the fast path if nothing of it has arrived."""
        self._timer.set(self._current_timeout())
        if (
            self._is_buffering
            or self._waiting
            or self._has_begun
            or self._unparsed
            or self._receiving_cycle is not None
        ):
            return
        if self._is_last:
            self._close()
        elif self._is_draining:
            self._drain_idle()
        else:
            self._is_idle = self._fast_path is not None and not self.is_write_paused

    # Serving

    async def _serve_requests(self) -> None:
        """Serve the queued requests in order until the connection is lost."""
        app: Any = self.app
        while self._waiting or not self._is_closed:
            if not self._waiting:
                self._idle_waiter = self.loop.create_future()
                await self._idle_waiter
                self._idle_waiter = None
                continue
            cycle = self._current_cycle = self._waiting.popleft()
            if self._is_draining:
                cycle.stop()
            try:
                await (cycle.app or app)(cycle.scope, cycle.receive, cycle.send)
            except Exception:
                logger.exception("the application failed")
            except BaseException:  # cancelled by the server at the end of the drain
                self.transport.abort()
                raise
            finally:
                # These references form cycles, which only the garbage collector would free.
                del cycle.scope[SERVER_EXTENSION]
                cycle.on_shutdown = cycle.app = None
            if not cycle.is_response_complete and not cycle.is_disconnected:
                self._on_unfinished(cycle)
        self._current_cycle = self._receiving_cycle = None  # breaks reference cycles

    def _on_unfinished(self, cycle: RequestResponseCycle) -> None:
        """Terminate an incomplete response so that the client detects that it is incomplete."""
        if not cycle.is_started:
            self._send_error(InternalError("The gateway failed to generate a response."))
        elif cycle.is_http10:  # a regular close would be the end of the body, so the connection is reset
            self.transport.abort()
        else:
            self._close()

    @property
    def worker(self) -> "asyncio.Task[None]":
        """The task that serves this connection; it exists from the first request on."""
        assert self._worker is not None  # noqa: S101 - started by `_enqueue`
        return self._worker

    def _wake_worker(self) -> None:
        if self._idle_waiter is not None and not self._idle_waiter.done():
            self._idle_waiter.set_result(None)

    def on_cycle_complete(self, cycle: RequestResponseCycle) -> None:
        """Process the next request after a complete response, or close the connection."""
        self.server_state.total_requests += 1
        if not cycle.keep_alive:
            self._drop_waiting()
            if cycle.is_body_complete:
                self._close()
            else:
                self._linger()
            return
        if cycle.upgrade:  # the handshake was refused, and the connection remains HTTP
            self._renew_parser()
        if self._is_buffering and (cycle.upgrade or len(self._waiting) < MAX_PIPELINED // 2):
            if not any(waiting.upgrade for waiting in self._waiting):
                self._replay_soon()
        elif self._is_read_paused:
            self.resume_reading()
        self._discarded = 0
        self._become_idle()

    def detach_transport(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the 101 response and give up the connection; see `ServerExtension.switch_protocols`."""
        self._timer.stop()
        self._is_ending = self._is_detached = True
        self._is_buffering = False
        self.transport.write(head)
        self.resume_reading()
        return self.transport, bytes(self._buffered)

    def pause_writing(self) -> None:
        """Start the idle timeout: the client reads more slowly than the gateway writes (asyncio callback)."""
        self.is_write_paused = True
        self._writable = self.loop.create_future()
        if not self._is_ending:
            self._timer.set(self.limits.idle_timeout)

    def resume_writing(self) -> None:
        """Resume sending: the write buffer is below its low-water mark (asyncio callback)."""
        self.is_write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
            if not self._is_ending:
                self._timer.set(self._current_timeout())
        self._writable = None
        if self._fast_exchange is not None:
            self._fast_exchange.on_writable()

    async def wait_until_writable(self) -> None:
        """Wait until the client reads on or disconnects."""
        while self._writable is not None:
            await asyncio.wait({self._writable})  # awaiting the shared future itself would cancel it with this task

    # Timeouts, refusals, closing

    def _current_timeout(self) -> float | None:
        """Return the timeout of the current state in seconds; None while an upstream's timeouts apply."""
        if self._receiving_cycle is not None or self.is_write_paused:
            return self.limits.idle_timeout
        if (
            self._fast_exchange is not None
            or self._waiting
            or (self._current_cycle is not None and not self._current_cycle.is_response_complete)
        ):
            return None
        return self.limits.header_timeout if self._is_timed else self.limits.keep_alive_timeout

    def _check_body(self, cycle: RequestResponseCycle) -> None:
        """Refuse a body with too much chunk framing; set the deadline of the next piece of another."""
        if self._overhead > self.limits.header_bytes:
            self.refuse(BadRequest(f"The body has more than {self.limits.header_bytes} bytes of chunk extensions."))
        else:
            self._await_body(cycle)

    def _await_body(self, cycle: RequestResponseCycle) -> None:
        """Set the deadline of the next body piece.

        Each received byte adds 1/rate seconds of credit. The next piece is due before the credit is used up, and
        within `idle_timeout` at most. Credit is limited to the greater of `idle_timeout` and `body_grace`, so that a
        fast beginning does not excuse a slow rest.
        """
        limits = self.limits
        received, self._body_bytes = self._body_bytes, 0
        rate = limits.body_rate if cycle.body_rate is None else cycle.body_rate
        if not rate or cycle.awaits_continue:  # no minimum rate, or the client still awaits 100 (Continue)
            cycle.body_due = None
            self._timer.set(limits.idle_timeout)
            return
        now = self.loop.time()
        credit = now + limits.body_grace if cycle.body_due is None else cycle.body_credit
        most = max(limits.idle_timeout, limits.body_grace)
        cycle.body_credit = credit = min(credit + received / rate, now + most)
        cycle.body_due = due = min(credit, now + limits.idle_timeout)
        self._timer.set(due - now)

    def _extend_body_due(self) -> None:
        """Extend the deadline of the body by the time for which reading was paused."""
        cycle = self._receiving_cycle
        if cycle is not None and cycle.body_due is not None:
            now = self.loop.time()
            pause = now - self._paused_at
            cycle.body_credit += pause
            cycle.body_due += pause
            self._timer.set(cycle.body_due - now)

    def on_body_rate(self, cycle: RequestResponseCycle) -> None:
        """Apply a changed minimum rate to the body of this request."""
        if cycle is self._receiving_cycle and not self._is_ending:
            cycle.body_due = None
            self._await_body(cycle)

    def _on_timeout(self) -> None:
        """Handle an expired timeout: of a head, a body, the next request, or a client that does not read."""
        if self._is_ending or self.is_write_paused or self.transport.is_closing():
            self._check_reader()
        elif self._current_cycle is not None and not self._current_cycle.is_response_complete:
            self._check_sender(self._current_cycle)
        elif self._has_begun or self._unparsed:
            self.refuse(RequestTimeout(f"The request's head did not arrive within {self.limits.header_timeout:g} s."))
        else:
            self._close()

    def _check_reader(self) -> None:
        """Extend the timeout if the client has acknowledged bytes since the last check; abort otherwise.

        A connection without unwritten bytes is aborted too: it is only waiting to be closed.
        """
        unsent = unacknowledged(self.transport)
        if unsent == self._unsent or not self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        self._unsent = unsent
        self._timer.set(self.limits.idle_timeout)

    def _check_sender(self, cycle: RequestResponseCycle) -> None:
        if self._receiving_cycle is not cycle:  # the body is complete; a pipelined head may wait for the response
            self._timer.set(self.limits.header_timeout)
        elif self._is_read_paused or cycle.awaits_continue:  # the client does not cause the delay
            self._timer.set(self.limits.idle_timeout)
        elif cycle.body_due is not None and cycle.body_due > self.loop.time():  # the deadline was extended
            self._timer.set(cycle.body_due - self.loop.time())
        elif cycle.is_started:
            self.transport.abort()
        elif cycle.body_due is None or cycle.body_due < cycle.body_credit:
            self.refuse(RequestTimeout(f"No part of the body arrived within {self.limits.idle_timeout:g} s."))
        else:
            rate = self.limits.body_rate if cycle.body_rate is None else cycle.body_rate
            self.refuse(RequestTimeout(f"The body arrived more slowly than {rate:g} bytes per second."))

    def _refuse_size(self) -> None:
        self.refuse(HeadersTooLarge(f"The request's head is larger than {self.limits.header_bytes} bytes."))

    def refuse(self, error: GatewayError) -> None:
        """Send problem details without the application and end the connection.

        Nothing is sent if it could be taken for a part of, or the whole of, the response to an earlier request.
        """
        if self._is_ending:
            return
        if self.transport.is_closing():  # the client cannot receive a refusal
            self._close()
            return
        due = self._current_cycle
        if due is None or due.is_response_complete:
            due = self._waiting[0] if self._waiting else None
        self.refused[error.reason] += 1
        if due is not None and (due is not self._receiving_cycle or due.is_started):
            self._close()
        else:
            self._send_error(error)
        if due is not None:
            due.disconnect()

    def _send_error(self, error: GatewayError) -> None:
        body = json.dumps(problem(error, instance="")).encode()
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            *((name.encode(), value.encode()) for name, value in error.headers.items()),
            (b"date", http_date(int(time.time()))),
            (b"connection", b"close"),
        ]
        self.transport.write(render_response_head(error.status, None, headers) + body)
        self._linger()

    def _linger(self) -> None:
        """Half-close and discard input for LINGER_TIMEOUT, so that no reset destroys the response (RFC 9112 9.6)."""
        self._is_ending = True
        self._discarded = 0
        self._drop_waiting()
        if self._receiving_cycle is not None:
            self._receiving_cycle.discard_body()  # no more of it is parsed
        if not self.transport.can_write_eof():
            self._close()
            return
        self.transport.write_eof()
        self._is_buffering = False
        self.resume_reading()
        self._timer.set(LINGER_TIMEOUT)

    def _close(self) -> None:
        """Close after the write buffer is flushed; abort if the client makes no progress within `idle_timeout`."""
        self._is_ending = True
        self._is_idle = False
        self._drop_waiting()
        self.transport.close()
        self._timer.set(self.limits.idle_timeout)

    def _drop_waiting(self) -> None:
        """Drop the queued requests, except those from the fast path: the worker must end their exchanges."""
        if self._waiting:
            for cycle in self._waiting:
                cycle.disconnect()
            self._waiting = deque(cycle for cycle in self._waiting if cycle.app is not None)


def _peer(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Return address and port of the client, UNIX_PEER on a Unix socket, or None if the connection is already lost."""
    if transport.get_extra_info("socket").family == socket.AF_UNIX:
        return UNIX_PEER
    return _plain(get_remote_addr(transport))


def _plain(end: tuple[str, Any] | None) -> tuple[str, Any] | None:
    """Return the address with an IPv4-mapped IPv6 address, as from a dual-stack socket, converted to IPv4."""
    return (end[0].removeprefix(_MAPPED), end[1]) if end is not None else None


def _size(headers: HeaderList) -> int:
    """Return the size of header fields on the wire, in bytes."""
    return sum(len(name) + len(value) + 4 for name, value in headers)


def limited_protocol(
    limits: ConnectionLimits,
    refused: Counter[str],
    shares: FairShares | None = None,
    share_holder: Callable[[str], str | None] = _no_holder,
) -> type[DownstreamConnection]:
    """Return the protocol class of one server, for uvicorn's `Config(http=...)`.

    `refused` counts refusals by reason. `shares` limits the connections; `share_holder` maps a client address to the
    holder whose share a connection uses, or None.
    """
    shared: dict[str, Any] = {
        "limits": limits,
        "peers": Counter(),
        "refused": refused,
        "shares": shares or FairShares(MAX_CONNECTIONS),
        "surplus": FairShares(MAX_SURPLUS),
        "share_holder": staticmethod(share_holder),
    }
    return type("LimitedDownstreamConnection", (DownstreamConnection,), shared)
