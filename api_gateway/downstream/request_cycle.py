"""One request and its response on a downstream connection: ASGI's `receive` and `send`, and the `ServerExtension`.

Responses are framed here: by `Content-Length`, in chunks, or by the end of the connection for HTTP/1.0. Field names
keep their case; a `Date` is added where it is absent (RFC 9110 section 6.6.1).
"""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from api_gateway.http1.headers import BODILESS, fields_of, http_date
from api_gateway.http1.plain_types import plain_bytes, plain_pairs
from api_gateway.http1.serializer import COLON, refuse_hidden_lines, render_response_head, status_line
from api_gateway.models import HeaderList

REQUEST_HIGH_WATER = 65_536  # bytes of a body buffered for a slow reader before reading from the client is paused
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class DownstreamPort(Protocol):
    """The connection as a cycle uses it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    raw_headers: HeaderList
    secure_fields: HeaderList
    expects_continue: bool
    is_write_paused: bool

    def resume_reading(self) -> None:
        """Read from the client again after a pause."""
        ...

    async def wait_until_writable(self) -> None:
        """Wait until the client reads on or disconnects."""
        ...

    def on_cycle_complete(self, cycle: "RequestResponseCycle") -> None:
        """Process the next request after a complete response, or close the connection."""
        ...

    def on_body_rate(self, cycle: "RequestResponseCycle") -> None:
        """Apply a changed minimum rate to the body of this request."""
        ...

    def detach_transport(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the 101 response and give up the connection; see `ServerExtension.switch_protocols`."""
        ...


class RequestResponseCycle:
    """One request and its response: ASGI's `receive` and `send`, and the `ServerExtension`.

    States of the response: waiting, started (`is_started`), complete (`is_started` and `is_response_complete`). States
    of the request: receiving, complete (`is_body_complete`). `is_disconnected` may be combined with any state; nothing
    is sent from then on.
    """

    # Initial values are class attributes, which makes it cheaper to create a cycle for each request.
    upgrade = b""
    on_disconnect: Callable[[], object] | None = None
    on_shutdown: Callable[[], object] | None = None
    is_stopping = False
    is_cut = False
    keep_alive = True
    is_last = False  # the client has announced that it sends no further request
    is_http10 = False
    is_body_complete = False
    body_rate: float | None = None  # minimum bytes per second, if not the connection's limit; 0 for none
    body_due: float | None = None  # loop time at which the next body piece is due; set by the connection
    body_credit = 0.0  # loop time until which the minimum rate is met without more input; set by the connection
    is_disconnected = False
    is_started = False
    is_response_complete = False
    _buffered = 0
    _is_body_taken = False
    is_body_continued = False  # the body is passed on to its end, also after the response is complete
    _waiter: "asyncio.Future[None] | None" = None
    _has_body = True
    _head = b""  # to be sent together with the first body piece
    _is_chunked = False
    _remaining: int | None = None  # bytes of the announced length still to be sent
    _trailers_follow = False
    _is_body_sent = False  # trailers are still to be sent

    def __init__(self, connection: "DownstreamPort", scope: dict[str, Any], target: bytes) -> None:
        self.scope = scope
        self.target = target
        self.headers: HeaderList = connection.raw_headers
        self.trailers: HeaderList = []
        self.awaits_continue = self._owes_continue = connection.expects_continue
        self.connection = connection
        self._body: list[bytes] = []
        self._is_head = scope["method"] == "HEAD"

    def __repr__(self) -> str:
        state = "complete" if self.is_response_complete else "started" if self.is_started else "waiting"
        return f"<RequestResponseCycle {self.scope['method']} {self.target!r} [{state}]>"

    # Called by the connection

    def feed(self, piece: bytes) -> bool:
        """Buffer one body piece; return True above REQUEST_HIGH_WATER, when reading shall be paused."""
        self.awaits_continue = self._owes_continue = False  # the client sends without waiting for 100 (Continue)
        self._body.append(piece)
        self._buffered += len(piece)
        self._wake()
        return self._buffered > REQUEST_HIGH_WATER

    def announce(self, size: int) -> None:
        """Do nothing: the application has no limit that it could state before it reads."""

    def end_body(self) -> None:
        """Mark the request as complete."""
        self.is_body_complete = True
        self._wake()

    def disconnect(self) -> None:
        """Mark the client as disconnected; call `on_disconnect` unless the response is complete. Idempotent."""
        if self.is_disconnected:
            return
        self.is_disconnected = True
        self._wake()
        if self.on_disconnect is not None and not self.is_response_complete:
            self.on_disconnect()

    def stop(self) -> None:
        """Mark the server as stopping and call `on_shutdown`, which ends streams and tunnels."""
        self.is_stopping = True
        if self.on_shutdown is not None:
            self.on_shutdown()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # ASGI

    async def receive(self) -> dict[str, Any]:
        """Return the next body piece, or `http.disconnect` once the client is gone or the response is complete.

        After `continue_body`, body pieces are returned after the response too.
        """
        if self._owes_continue and not self.is_started and not self.is_disconnected:
            self.awaits_continue = self._owes_continue = False
            self.connection.transport.write(_CONTINUE)
        while not self.is_disconnected and (not self.is_response_complete or self.is_body_continued):
            if self._body or (self.is_body_complete and not self._is_body_taken):
                body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
                self._body, self._buffered = [], 0
                self._is_body_taken = self.is_body_complete
                if self.is_response_complete or not self._is_body_taken:
                    self.connection.resume_reading()
                if self._is_body_taken:
                    self.is_body_continued = False
                return {"type": "http.request", "body": body, "more_body": not self._is_body_taken}
            self._waiter = self.connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        """Send a part of the response after waiting for the client to read; no effect once it has disconnected.

        Raises RuntimeError for a message that is out of order, or a body that does not match its Content-Length.
        """
        if self.connection.is_write_paused and not self.is_disconnected:
            await self.connection.wait_until_writable()
        if self.is_disconnected:
            return
        kind = message["type"]
        if self.is_response_complete or (kind == "http.response.start") is self.is_started:
            raise RuntimeError(f"{kind} is out of order")
        if kind == "http.response.body":
            self._send_body(plain_bytes(message.get("body") or b""), is_last=not message.get("more_body", False))
        elif kind == "http.response.start":
            self._start(message)
        elif kind == "http.response.trailers" and self._trailers_follow:
            self._send_trailers(plain_pairs(message["headers"]))
        else:
            raise RuntimeError(f"{kind} is not supported")

    def _start(self, message: dict[str, Any]) -> None:
        """Write the head, or keep it for the first body piece.

        A message may contain extensions of ASGI: `reason`, the reason phrase of the upstream; and `is_body_ready`,
        which guarantees that the first body piece follows at once, so that both are written together.
        """
        status: int = message["status"]
        headers = plain_pairs(message.get("headers", ()))
        self.is_started = True
        lines = [status_line(status, message.get("reason")), *map(COLON, headers)]
        fields = fields_of(headers)
        refuse_hidden_lines(lines)
        if b"close" in fields.get(b"connection", [b""])[0].lower():
            self.keep_alive = False
        lines += [COLON(pair) for pair in self.connection.secure_fields if pair[0] not in fields]
        if b"date" not in fields:
            lines.append(b"date: " + http_date(int(time.time())))
        if self._is_head or status in BODILESS:
            self._has_body = False
        elif b"transfer-encoding" not in fields and b"content-length" in fields:
            self._remaining = int(fields[b"content-length"][0])
        elif self.is_http10:
            self.keep_alive = False
        else:
            self._is_chunked = True
            self._trailers_follow = message.get("trailers", False)
            lines.append(b"transfer-encoding: chunked")
        if not self.keep_alive or self.awaits_continue:  # after a final response the body may be sent or not
            self.keep_alive = False
            if b"connection" not in fields:
                lines.append(b"connection: close")
        lines.append(b"\r\n")
        head = b"\r\n".join(lines)
        if message.get("is_body_ready"):
            self._head = head
        else:
            self.connection.transport.write(head)

    def _send_body(self, body: bytes, *, is_last: bool) -> None:
        if not self._has_body:
            body = b""
        elif self._is_chunked:
            end = b"0\r\n\r\n" if is_last and not self._trailers_follow else b""
            body = b"%x\r\n%b\r\n%b" % (len(body), body, end) if body else end
        elif self._remaining is not None:
            self._remaining -= len(body)
            if self._remaining < 0:
                raise RuntimeError("the response is longer than its Content-Length")
        if self._head:
            body = self._head + body
            self._head = b""
        if body:
            self.connection.transport.write(body)
        if is_last and not self._trailers_follow:
            if self._remaining:
                raise RuntimeError("the response is shorter than its Content-Length")
            self._finish()
        self._is_body_sent = is_last

    def _send_trailers(self, trailers: HeaderList) -> None:
        lines = b"".join(b"%b: %b\r\n" % pair for pair in trailers)
        self.connection.transport.write(b"0\r\n%b\r\n" % lines)
        self._finish()

    def end_without_trailers(self) -> bool:
        """End a response whose trailers a middleware has dropped; return False if its body is incomplete."""
        if self._is_body_sent and not self.is_response_complete:
            self._send_trailers([])
        return self.is_response_complete

    def _finish(self) -> None:
        self.is_response_complete = True
        self.on_disconnect = None
        self._wake()
        self.connection.on_cycle_complete(self)

    # ServerExtension

    def defer_continue(self) -> None:
        """See `ServerExtension`; the upstream's 100 (Continue) is sent by `send_interim`."""
        self._owes_continue = False

    def require_body_rate(self, rate: float) -> None:
        """See `ServerExtension`."""
        self.body_rate = rate
        if not self.is_body_complete:
            self.connection.on_body_rate(self)

    def continue_body(self) -> None:
        """See `ServerExtension`."""
        self.is_body_continued = not self._is_body_taken

    def discard_body(self) -> None:
        """See `ServerExtension`."""
        if self.is_body_continued:
            self.is_body_continued = False
            self._body, self._buffered = [], 0
            if self.is_response_complete and not self.is_body_complete:
                self.connection.resume_reading()
            self._wake()

    def send_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ServerExtension`. HTTP/1.0 has no interim responses (RFC 9110 section 15.2)."""
        self.awaits_continue = self.awaits_continue and status != HTTPStatus.CONTINUE
        if not self.is_http10 and not self.is_started and not self.is_disconnected:
            self.connection.transport.write(render_response_head(status, reason, headers))

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """See `ServerExtension`. The cycle sends nothing more; the connection is closed when the tunnel ends."""
        self.is_started = self.is_response_complete = True
        self.keep_alive = False
        self.on_disconnect = None
        return self.connection.detach_transport(render_response_head(101, reason, headers))
