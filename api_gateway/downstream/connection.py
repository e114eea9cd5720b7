"""The server side of HTTP/1.1: uvicorn's httptools protocol with a request cycle of our own.

What is different from uvicorn's, and why (`request_cycle` has the rest):

- One task serves a connection, request after request; uvicorn starts one for each request.
- Heads are bounded in size, in number of lines and in time, bodies in the time they may stall, and connections in
  number for each address. Refusals are problem details, and reach the client even while it is still sending.
- What a proxy needs and ASGI has no word for is offered in the scope, as `http1.asgi.Link`.
- Trailers never become headers, and nothing behind a refused request is served.

Long because it is one state machine: all states of a connection share its buffer, timer and order of requests.
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
from api_gateway.http1.serializer import render_response_head
from api_gateway.models import HeaderList
from api_gateway.resilience.fair_shares import MAX_CONNECTIONS, FairShares

logger = logging.getLogger(__name__)

MAX_PIPELINED = 16  # requests of one connection that may wait for the answers before them
HEAD_PIECE, BODY_PIECE = 8_192, 65_536  # bytes parsed at once: a bound on the requests one read can hold
MAX_DISCARDED = 1_048_576  # bytes of a body read for nothing, to keep a connection whose answer came early
MAX_LINGERED = 8_388_608  # bytes a refused client may go on sending, so that it reads why instead of a reset
LINGER_TIMEOUT = 2.0  # seconds it may do so
MAX_SURPLUS = 64  # connections beyond the limits that are kept until they have been refused with a response
SURPLUS_TIMEOUT = 2.0  # seconds such a connection has for its first head
PROBES = (b"/healthz", b"/readyz")  # served on such a connection too
WEBSOCKET = b"websocket"
_MAPPED = "::ffff:"  # begins an IPv4 address mapped into IPv6
_ABSOLUTE_FORM = re.compile(rb"[^:/?]+://[^/?@]*([/?].*)?", re.DOTALL)
_VERSION = {"version": "3.0", "spec_version": "2.4"}
_EXTENSIONS: dict[str, Any] = {"http.response.trailers": {}}


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a client may ask of a connection: bytes, lines and seconds. `connections_per_peer` 0 is no limit.

    `body_rate` is the bytes a second that a body must have while it is awaited, 0 for none, `body_grace` the seconds
    it may be behind at its start.
    """

    header_bytes: int = 65_536
    header_lines: int = 200
    header_timeout: float = 10.0
    keep_alive_timeout: float = 75.0
    idle_timeout: float = 60.0
    drain_linger: float = 2.0
    connections_per_peer: int = 0
    body_rate: float = 240.0
    body_grace: float = 10.0


def _nobody(_address: str) -> None:
    """Count no connection against anybody."""


class DownstreamConnection(HttpToolsProtocol):
    """One connection of a client. `limits` and what the connections share are set by `limited_protocol`."""

    limits: ConnectionLimits = ConnectionLimits()  # of the class: those of new connections, which keep them
    peers: ClassVar[Counter[str]] = Counter()
    refused: ClassVar[Counter[str]] = Counter()
    shares: ClassVar[FairShares] = FairShares(MAX_CONNECTIONS)
    surplus: ClassVar[FairShares] = FairShares(MAX_SURPLUS)
    share_holder: ClassVar[Callable[[str], str | None]] = staticmethod(_nobody)

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Start of a connection: its first head is awaited from now on."""
        self.transport = transport
        self.limits = type(self).limits
        self.connections.add(self)
        self.client = _peer(transport)
        self.scheme = "https" if is_ssl(transport) else "http"
        self.spelled: HeaderList = []
        self.expects_continue = False
        self.is_write_paused = False
        self._peer = self.client[0] if self.client and self.client is not UNIX_PEER else ""
        self.peers[self._peer] += 1
        self._surplus = self._take_place()
        self._reading: RequestResponseCycle | None = None  # the request whose body is not complete
        self._serving: RequestResponseCycle | None = None  # the request whose answer is due, or was the last one sent
        self._waiting: deque[RequestResponseCycle] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._rest: asyncio.Future[None] | None = None  # what the worker waits for when there is nothing to serve
        self._writable: asyncio.Future[None] | None = None
        self._unparsed = 0  # bytes since the last complete head or piece of body: what only the parser holds
        self._discarded = 0
        self._held = bytearray()  # what came behind a handshake or too many requests, until those are answered
        self._releasing: asyncio.Handle | None = None  # of what is held, once it is due
        self._is_holding = self._is_handed_over = False
        self._piece = 0  # bytes that are being parsed
        self._has_begun = False  # a head has begun and is not complete
        self._is_timed = True  # the alarm runs for this head; the first one's since the connection was made
        self._is_over = self._is_ending = self._is_read_paused = False
        self._is_last = False  # what is held back is the last that will be served
        self._is_draining = False  # the server stops: no connection goes on behind an answer
        self._unsent = 0  # bytes the client had not acknowledged at the last check
        self._alarm = DeadlineTimer(self.loop, self._on_alarm)
        self._alarm.set(SURPLUS_TIMEOUT if self._surplus else self.limits.header_timeout)
        self._body_bytes = 0  # received of bodies since the time for them was last set
        self._paused_at = 0.0  # when reading was last paused
        self.last_headers: Any = None  # the lane's memory of the last request here
        self._fast_path: FastPathProvider | None = getattr(self.app, "fast_path", None)
        self._fast_exchange: InFlight | None = None  # the request that has taken the lane
        self._is_at_rest = self._fast_path is not None and not self._surplus  # nothing has begun: the lane is open

    def _take_place(self) -> str:
        """Take a place among the connections; return why there is none for this one, or nothing if there is.

        A connection without a place is kept until it has been refused with a response; beyond MAX_SURPLUS of those, of
        which each address has its share too, connections are closed at once.
        """
        limit, holder = self.limits.connections_per_peer, type(self).share_holder(self._peer)
        self._holder, self._place = holder, self.shares
        why = ""
        if self._peer and 0 < limit < self.peers[self._peer]:
            why = f"Your address has more than {limit} connections."
        elif not self.shares.admits(holder):
            why = f"The gateway has no connection for you: {self.shares.refusal(holder, 'connections')}."
            self.shares.refused += 1
        if why:
            self._place = self.surplus
            if not self.surplus.admits(holder):
                self._holder = None  # it is gone before it could hold anything
                self.transport.abort()
        self._place.acquire(self._holder)
        return why

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """End of the connection."""
        self.connections.discard(self)
        self._place.release(self._holder)
        self.peers[self._peer] -= 1
        if not self.peers[self._peer]:
            del self.peers[self._peer]
        self._is_over = True
        self._is_at_rest = False
        self._alarm.stop()
        exchange, self._fast_exchange = self._fast_exchange, None
        self.resume_writing()
        self._drop_waiting()
        self._wake_worker()
        if self._serving is not None:
            self._serving.disconnect()
        self.parser = None  # type: ignore[assignment]  # as uvicorn does: it refers to us
        if exchange is not None:
            exchange.on_client_left()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's never says to go on
        """Tell whether to go on: a client that said it would send no more may still be reading (RFC 9112, 9.6)."""
        last = self._waiting[-1] if self._waiting else self._serving
        if self._held and not (last is not None and last.upgrade):  # it is served, and may say `Connection: close`
            self._is_last = True
            return True
        if self._fast_exchange is not None:
            return not self._fast_exchange.keep_alive
        return (
            last is not None
            and not last.is_answered
            and last.is_body_complete
            and not last.keep_alive
            and not self._is_ending
        )

    def shutdown(self) -> None:
        """End the connection at the server's wish, without losing a request that is on its way here.

        An answer whose head is still to be sent says `Connection: close`. A connection between two requests stays for
        `drain_linger` seconds, so that a client that is just sending gets its answer, and that answer says it then.
        """
        if self._is_draining:
            return
        self._is_draining = True
        if self._serving is not None:
            self._serving.stop()
        if self._is_handed_over:
            return
        self._announce_close()

    def _announce_close(self) -> None:
        """Have the last answer that is due say that the connection ends, unless its head has been sent already."""
        last = self._waiting[-1] if self._waiting else self._serving
        if self._held:  # the last of these will be it, once they are parsed
            return
        if self._fast_exchange is not None:
            self._fast_exchange.keep_alive = self._fast_exchange.keep_alive and self._fast_exchange.is_head_sent
        elif last is not None and not last.is_answered:
            last.keep_alive = last.keep_alive and last.is_started
        elif not self._is_ending:
            self._drain_idle()

    def _drain_idle(self) -> None:
        """Wait a moment for one more request, which goes the ordinary way."""
        self._is_at_rest = False
        if not (self._has_begun or self._unparsed or self._reading is not None):
            self._is_timed = False  # a head that begins by then has its own time
            self._alarm.set(self.limits.drain_linger)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the bounds, unless it is a request that can take the lane."""
        if self._is_at_rest:
            if self._fast_path.current.try_handle(self, data):  # type: ignore[union-attr]  # without a lane it is never at rest
                return
            self._is_at_rest = False
        if self._is_ending:
            self._discarded += len(data)
            if self._discarded > MAX_LINGERED:
                self.transport.abort()
            return
        if self._is_holding:
            self._buffer(data)
        else:
            self._parse(data)
            if self._is_draining:
                self._announce_close()

    def _buffer(self, data: bytes | memoryview) -> None:
        """Keep what may not be parsed yet."""
        self._is_holding = True
        self._held += data
        if len(self._held) > REQUEST_HIGH_WATER:
            self.pause_reading()

    def _parse(self, data: bytes) -> None:
        """Parse piece by piece, as long as there are not too many requests waiting."""
        view = memoryview(data)
        while view and not self._is_ending:
            if self._is_holding or len(self._waiting) > MAX_PIPELINED:
                if not self._is_holding:
                    self.pause_reading()
                self._buffer(view)
                return
            view = view[self._feed(view[: HEAD_PIECE if self._reading is None else BODY_PIECE]) :]
        if self._is_ending:
            return
        if self._reading is not None:
            self._await_body(self._reading)
        if self._unparsed or self._has_begun:
            self._await_rest()

    def _feed(self, piece: memoryview) -> int:
        """Parse one piece; return how many bytes of it were consumed.

        That is none only if the connection is ending, or holds what comes: so whoever parses piece by piece gets to an
        end, whatever the callbacks do.
        """
        size = self._piece = len(piece)
        self._unparsed += size
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            size = upgrade.args[0]
            self._on_upgrade()
            if size == 0 and not self._is_holding:
                self._close()
        except httptools.HttpParserError as error:
            self._on_error(error)
        return size

    def _replay_soon(self) -> None:
        """Parse what is held back, once the callbacks that run now are done."""
        if self._releasing is None:
            self._releasing = self.loop.call_soon(self._replay_buffered)

    def _replay_buffered(self) -> None:
        """Parse what was held back."""
        self._releasing = None
        data, self._held = bytes(self._held), bytearray()
        self._is_holding = False
        if not self._is_over:
            self._parse(data)
            if self._is_draining:
                self._announce_close()
            self.resume_reading()

    def _on_error(self, error: httptools.HttpParserError) -> None:
        """Refuse what is not HTTP; a defect of our own shows itself here too, and is not the client's."""
        if self._is_ending:
            return
        cause = error.__context__
        if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, httptools.HttpParserError):
            logger.error("a request could not be read", exc_info=cause)
            self.refuse(InternalError("The gateway failed to read the request."))
        else:
            self.refuse(BadRequest(f"The request is not well-formed HTTP/1.1: {str(cause or error).rstrip('.')}."))

    def _await_rest(self) -> None:
        """Bound what has begun and is not complete, in size and in time."""
        if self._unparsed > self.limits.header_bytes:
            self._refuse_size()
        elif self._has_begun and not self._is_timed:
            self._is_timed = True
            self._alarm.set(self.limits.header_timeout)

    def on_message_begin(self) -> None:
        """A request starts."""
        self.url = b""
        self.spelled = []
        self.expects_continue = False
        self._has_begun = True

    def on_url(self, url: bytes) -> None:
        """Take the request target, or a part of it."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header, or one trailer."""
        if self._has_begun:
            self.spelled.append((name, value.rstrip(b" \t")))
            if len(name) == 6 and name.lower() == b"expect":  # noqa: PLR2004 - no other name need be looked at
                self.expects_continue = value.lower() == b"100-continue"
        else:
            self._on_trailer(name, value.rstrip(b" \t"))

    def _on_trailer(self, name: bytes, value: bytes) -> None:
        if self._reading is not None:
            trailers = self._reading.trailers
            trailers.append((name, value))
            if len(trailers) > self.limits.header_lines or _size(trailers) > self.limits.header_bytes:
                self._refuse_size()

    def on_headers_complete(self) -> None:
        """The head is there: serve the request, or let it wait for its turn."""
        size, self._unparsed = self._unparsed, 0
        self._has_begun = self._is_timed = False
        if self._is_ending:  # what was sent behind a refused request is not a request
            return
        limits = self.limits
        if self.parser.should_upgrade() and not self._is_handshake():
            return  # the parser stops here; `_on_upgrade` has it parsed again as what it is
        if len(self.spelled) > limits.header_lines:
            self.refuse(HeadersTooLarge(f"The request has more than {limits.header_lines} header lines."))
            return
        if size + self._piece > limits.header_bytes and len(self.url) + _size(self.spelled) > limits.header_bytes:
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
        self._reading = cycle
        self._body_bytes = 0
        self._enqueue(cycle)

    def _enqueue(self, cycle: RequestResponseCycle) -> None:
        """Have the worker serve a request, as soon as it has served those before."""
        self._waiting.append(cycle)
        if self._worker is None or self._worker.done():
            self._worker = self.loop.create_task(self._work())
            self.tasks.add(self._worker)
            self._worker.add_done_callback(self.tasks.discard)
        elif self._rest is not None:
            self._wake_worker()

    def _parsed_cycle(self) -> RequestResponseCycle:
        """Return the request whose head has just come; raises ValueError if its target is none."""
        parser = self.parser
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
        target = self.url
        if b"#" in target:
            raise ValueError("it holds a fragment")
        if not target.startswith(b"/"):
            target = self._origin_form(target)
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
        """What the scopes of all requests of this connection have in common."""
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
        """Return a request; its headers are those spelled last."""
        raw_path, _, query = target.partition(b"?")
        path = raw_path.decode("ascii")
        headers = [(name.lower(), value) for name, value in self.spelled]
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

    def _origin_form(self, target: bytes) -> bytes:
        """Return path and query of an absolute-form target, whose authority wins over Host (RFC 9112, 3.2.2)."""
        if target == b"*":
            return target
        spelt = _ABSOLUTE_FORM.fullmatch(target)
        if spelt is None:
            raise ValueError("it is neither a path nor an absolute URL without a user")
        url = httptools.parse_url(target)
        if not url.host:
            raise ValueError("it names no host")
        host = b"[%b]" % url.host if b":" in url.host else url.host
        authority = host if url.port is None else b"%b:%d" % (host, url.port)
        self.spelled[:] = [(name, authority if name.lower() == b"host" else value) for name, value in self.spelled]
        rest = spelt[1] or b""
        return rest if rest.startswith(b"/") else b"/" + rest

    def on_body(self, body: bytes) -> None:
        """Take one piece of body; none belongs to a request that was refused."""
        self._unparsed = 0
        cycle = self._reading
        if cycle is None or self._is_ending:
            return
        self._body_bytes += len(body)
        if not cycle.is_answered:
            if cycle.feed(body):
                self.pause_reading()
            return
        self._discarded += len(body)
        if self._discarded > MAX_DISCARDED:
            self._linger()

    def on_message_complete(self) -> None:
        """End of a request; the next head may follow at once."""
        self._unparsed = 0
        cycle, self._reading = self._reading, None
        if cycle is None or self._is_ending:
            return
        cycle.end_body()
        if cycle.is_answered:
            self._become_idle()
        else:
            self._alarm.set(self._current_timeout())

    def _is_handshake(self) -> bool:
        """Tell whether the head that has just come asks for a WebSocket (RFC 6455 section 4.1)."""
        fields = fields_of(self.spelled)
        return (
            self.parser.get_method() == b"GET"
            and self.parser.get_http_version() == "1.1"
            and [value.lower() for value in fields.get(b"upgrade", ())] == [WEBSOCKET]
            and framing(fields) is None
        )

    def _on_upgrade(self) -> None:
        """Hold what comes behind a handshake until that is answered. Any other upgrade is none to us.

        The parser stops at the head of every request that asks for an upgrade, and takes its body for the other
        protocol. So a request whose wish we do not know is parsed again without it.
        """
        if self._is_ending:
            return
        last = self._waiting[-1] if self._waiting else self._serving
        if last is not None and last.upgrade and not last.is_answered and self._reading is None:
            self._is_holding = True
            return
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [b"%b: %b" % pair for pair in self.spelled if pair[0].lower() != b"upgrade"]
        head = b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"\r\n"])
        self._renew_parser()
        if method == b"CONNECT":
            self.refuse(BadRequest("CONNECT is not served here."))
            return
        self._unparsed += len(head)
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self.refuse(BadRequest("The request asks for an upgrade that is not understood."))
        except httptools.HttpParserError as error:
            self._on_error(error)

    def _renew_parser(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def pause_reading(self) -> None:
        """Make the client wait."""
        if not self._is_read_paused and not self.transport.is_closing():
            self._is_read_paused = True
            self._paused_at = self.loop.time()
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Let the client go on, once what it has sent already is on its way."""
        if self._is_holding or self.transport.is_closing():
            return
        if self._is_read_paused:
            self._is_read_paused = False
            self._excuse_pause()
            self.transport.resume_reading()

    # The lane, as `fast_path.Downstream` has it

    def begin_exchange(self, exchange: InFlight) -> None:
        """Hold back what else comes until the passage is over, and tell it of what happens here meanwhile."""
        self._fast_exchange = exchange
        self._is_at_rest = self._is_timed = False
        self._is_holding = True
        self._alarm.clear()

    def end_exchange(self, *, keep_alive: bool) -> None:
        """Go on behind a complete answer, or end the connection."""
        self._fast_exchange = None
        self.server_state.total_requests += 1
        if self._is_over:
            return
        if not keep_alive:
            self._close()
        elif self._held:
            self._replay_soon()
            self._alarm.set(self._current_timeout())
        else:
            self._is_holding = False
            self._become_idle()

    def write_response(self, answer: bytes, *, keep_alive: bool) -> None:
        """Send a whole answer to a request that has not embarked."""
        self.transport.write(answer)
        self.server_state.total_requests += 1
        self._is_timed = False
        if keep_alive:
            self._become_idle()
        else:
            self._close()

    @property
    def is_busy(self) -> bool:
        """True while a request is served here, a tunnel is open, or the client has not read its answer."""
        return self._fast_exchange is not None or self._is_working or self.transport.get_write_buffer_size() > 0

    @property
    def _is_working(self) -> bool:
        return self._worker is not None and self._rest is None and not self._worker.done()

    def cut_off(self) -> None:
        """End what no task serves, with the connection: the time to drain is over. Tasks the server cancels."""
        if self._is_working:
            return
        self.transport.abort()
        exchange, self._fast_exchange = self._fast_exchange, None
        if exchange is not None:
            exchange.on_forced_close()

    def run_asgi(
        self, app: Any, method: str, target: bytes, headers: HeaderList, body: bytes, *, keep_alive: bool
    ) -> None:
        """Have `app` serve the request, whether it has embarked or not."""
        self._fast_exchange = None
        self._is_at_rest = self._is_timed = False
        self.spelled = headers
        self.expects_continue = False
        cycle = self._cycle(method, target, "1.1")
        cycle.app = app
        cycle.keep_alive = keep_alive
        if body:
            cycle.feed(body)
        cycle.end_body()
        self._enqueue(cycle)
        self._alarm.set(self._current_timeout())
        if self._held:
            self._replay_soon()
        else:
            self._is_holding = False

    def _become_idle(self) -> None:
        """Wait for the next request, if nothing of it has come yet."""
        self._alarm.set(self._current_timeout())
        if self._is_holding or self._waiting or self._has_begun or self._unparsed or self._reading is not None:
            return
        if self._is_last:
            self._close()
        elif self._is_draining:
            self._drain_idle()
        else:
            self._is_at_rest = self._fast_path is not None and not self.is_write_paused

    # Serving

    async def _work(self) -> None:
        """Serve the requests of this connection, one after the other, until it is over."""
        app: Any = self.app
        while self._waiting or not self._is_over:
            if not self._waiting:
                self._rest = self.loop.create_future()
                await self._rest
                self._rest = None
                continue
            cycle = self._serving = self._waiting.popleft()
            if self._is_draining:
                cycle.stop()
            try:
                await (cycle.app or app)(cycle.scope, cycle.receive, cycle.send)
            except Exception:
                logger.exception("the application failed")
            except BaseException:  # cancelled by the server: its time to drain was over
                self.transport.abort()
                raise
            finally:
                del cycle.scope[SERVER_EXTENSION]  # they refer to each other, and would wait for the garbage collector
                cycle.on_shutdown = None  # as do what it calls and this
                cycle.app = None  # as it does where it goes on with what began on the straight way
            if not cycle.is_answered and not cycle.is_disconnected:
                self._on_unfinished(cycle)
        self._serving = self._reading = None  # they refer to us

    def _on_unfinished(self, cycle: RequestResponseCycle) -> None:
        """Break off what the application has not finished, so that it cannot pass for complete."""
        if not cycle.is_started:
            self._send_error(InternalError("The gateway failed to answer."))
        elif cycle.is_http10:  # only a reset tells that it was not the end
            self.transport.abort()
        else:
            self._close()

    @property
    def worker(self) -> "asyncio.Task[None]":
        """The task that serves this connection, from its first request on."""
        assert self._worker is not None  # noqa: S101 - see above
        return self._worker

    def _wake_worker(self) -> None:
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)

    def on_answered(self, cycle: RequestResponseCycle) -> None:
        """Go on to the next request, or close if there shall be none."""
        self.server_state.total_requests += 1
        if not cycle.keep_alive:
            self._drop_waiting()
            if cycle.is_body_complete:
                self._close()
            else:
                self._linger()
            return
        if cycle.upgrade:  # it was refused, and so an ordinary request
            self._renew_parser()
        if self._is_holding and (cycle.upgrade or len(self._waiting) < MAX_PIPELINED // 2):
            if not any(waiting.upgrade for waiting in self._waiting):
                self._replay_soon()
        elif self._is_read_paused:
            self.resume_reading()
        self._discarded = 0
        self._become_idle()

    def hand_over(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the answer to a handshake and let go of the connection; see `ServerExtension.switch`."""
        self._alarm.stop()
        self._is_ending = self._is_handed_over = True
        self._is_holding = False
        self.transport.write(head)
        self.resume_reading()
        return self.transport, bytes(self._held)

    def pause_writing(self) -> None:
        """Asked by the event loop: the client reads more slowly than we send."""
        self.is_write_paused = True
        self._writable = self.loop.create_future()
        if not self._is_ending:
            self._alarm.set(self.limits.idle_timeout)

    def resume_writing(self) -> None:
        """Asked by the event loop: the client has caught up."""
        self.is_write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
            if not self._is_ending:
                self._alarm.set(self._current_timeout())
        self._writable = None
        if self._fast_exchange is not None:
            self._fast_exchange.on_writable()

    async def wait_until_writable(self) -> None:
        """Wait for the client to read on, or to leave."""
        while self._writable is not None:
            await asyncio.wait({self._writable})  # a future that is awaited itself is cancelled with its task, for all

    # Time, refusals, the end

    def _current_timeout(self) -> float | None:
        """Return the seconds that what is awaited now may take."""
        if self._reading is not None or self.is_write_paused:
            return self.limits.idle_timeout
        if (
            self._fast_exchange is not None
            or self._waiting
            or (self._serving is not None and not self._serving.is_answered)
        ):
            return None  # the upstream's time, which others keep
        return self.limits.header_timeout if self._is_timed else self.limits.keep_alive_timeout

    def _await_body(self, reading: RequestResponseCycle) -> None:
        """Give the client its time for the rest of a body.

        Each piece is worth as long as it takes at the least rate. The next is due before that is used up, and within
        `idle_timeout` at most; nor does more than that add up, so that what was sent fast excuses no slow rest.
        """
        limits = self.limits
        received, self._body_bytes = self._body_bytes, 0
        rate = limits.body_rate if reading.body_rate is None else reading.body_rate
        if not rate or reading.awaits_continue:  # the client has not been asked for its body yet
            reading.body_due = None
            self._alarm.set(limits.idle_timeout)
            return
        now = self.loop.time()
        credit = now + limits.body_grace if reading.body_due is None else reading.body_credit
        most = max(limits.idle_timeout, limits.body_grace)
        reading.body_credit = credit = min(credit + received / rate, now + most)
        reading.body_due = due = min(credit, now + limits.idle_timeout)
        self._alarm.set(due - now)

    def _excuse_pause(self) -> None:
        """Put off what is due of a body by as long as we have not read."""
        reading = self._reading
        if reading is not None and reading.body_due is not None:
            now = self.loop.time()
            pause = now - self._paused_at
            reading.body_credit += pause
            reading.body_due += pause
            self._alarm.set(reading.body_due - now)

    def on_body_rate(self, cycle: RequestResponseCycle) -> None:
        """Apply the rate that this request's body must have from now on."""
        if cycle is self._reading and not self._is_ending:
            cycle.body_due = None
            self._await_body(cycle)

    def _on_alarm(self) -> None:
        """Act on what has not come: the rest of a head or of a body, the next request, or the client's reading on."""
        if self._is_ending or self.is_write_paused or self.transport.is_closing():
            self._check_reader()
        elif self._serving is not None and not self._serving.is_answered:
            self._check_sender(self._serving)
        elif self._has_begun or self._unparsed:
            self.refuse(RequestTimeout(f"The request's head did not arrive within {self.limits.header_timeout:g} s."))
        else:
            self._close()

    def _check_reader(self) -> None:
        """Give a client that reads slowly more time, and one that does not read, or has read it all, none."""
        unsent = unacknowledged(self.transport)
        if unsent == self._unsent or not self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        self._unsent = unsent
        self._alarm.set(self.limits.idle_timeout)

    def _check_sender(self, serving: RequestResponseCycle) -> None:
        if self._reading is not serving:  # it is complete, and a head behind it may take as long as its answer
            self._alarm.set(self.limits.header_timeout)
        elif self._is_read_paused or serving.awaits_continue:  # it is not the client that is waited for
            self._alarm.set(self.limits.idle_timeout)
        elif serving.body_due is not None and serving.body_due > self.loop.time():  # it was put off meanwhile
            self._alarm.set(serving.body_due - self.loop.time())
        elif serving.is_started:
            self.transport.abort()
        elif serving.body_due is None or serving.body_due < serving.body_credit:
            self.refuse(RequestTimeout(f"Nothing of the body came for {self.limits.idle_timeout:g} s."))
        else:
            rate = self.limits.body_rate if serving.body_rate is None else serving.body_rate
            self.refuse(RequestTimeout(f"The body came more slowly than {rate:g} bytes a second."))

    def _refuse_size(self) -> None:
        self.refuse(HeadersTooLarge(f"The request's head is larger than {self.limits.header_bytes} bytes."))

    def refuse(self, error: GatewayError) -> None:
        """Answer by ourselves, without the application, and end the connection.

        Where a word of ours would get into, or pass for, an answer that is due, it ends without one.
        """
        if self._is_ending:
            return
        if self.transport.is_closing():  # nobody reads a refusal, and nothing more is parsed
            self._close()
            return
        due = self._serving
        if due is None or due.is_answered:
            due = self._waiting[0] if self._waiting else None
        self.refused[error.reason] += 1
        if due is not None and (due is not self._reading or due.is_started):
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
        """Send no more but go on reading for a moment: closing now would reset what the client has yet to read."""
        self._is_ending = True
        self._discarded = 0
        self._drop_waiting()
        if not self.transport.can_write_eof():
            self._close()
            return
        self.transport.write_eof()
        self._is_holding = False
        self.resume_reading()
        self._alarm.set(LINGER_TIMEOUT)

    def _close(self) -> None:
        """Close once everything is sent, which may not take for ever."""
        self._is_ending = True
        self._is_at_rest = False
        self._drop_waiting()
        self.transport.close()
        self._alarm.set(self.limits.idle_timeout)

    def _drop_waiting(self) -> None:
        """Serve nothing more; what has begun on the lane is left to the worker, who finds that the client is gone."""
        if self._waiting:
            for cycle in self._waiting:
                cycle.disconnect()
            self._waiting = deque(cycle for cycle in self._waiting if cycle.app is not None)


def _peer(transport: asyncio.Transport) -> tuple[str, int] | None:
    """Return the client's address, UNIX_PEER for one on a Unix socket; None if the connection is over already."""
    if transport.get_extra_info("socket").family == socket.AF_UNIX:
        return UNIX_PEER
    return _plain(get_remote_addr(transport))


def _plain(end: tuple[str, Any] | None) -> tuple[str, Any] | None:
    """Return an address; that of IPv4 instead of one that a socket for both kinds maps into IPv6."""
    return (end[0].removeprefix(_MAPPED), end[1]) if end is not None else None


def _size(headers: HeaderList) -> int:
    """Return the bytes these headers take up on the wire."""
    return sum(len(name) + len(value) + 4 for name, value in headers)


def limited_protocol(
    limits: ConnectionLimits,
    refused: Counter[str],
    shares: FairShares | None = None,
    share_holder: Callable[[str], str | None] = _nobody,
) -> type[DownstreamConnection]:
    """Return the protocol class for one server, for uvicorn's `Config(http=...)`; it counts its refusals.

    `shares` are of the connections, `share_holder` says whose share one from an address takes.
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
