"""One request and its answer on the server side: ASGI's `receive` and `send`, and the `ServerExtension` beside them.

What goes out is framed here: by the announced length, in chunks, or by the end of the connection for a client of
HTTP/1.0. Names keep their spelling; a `Date` is added where none comes (RFC 9110 section 6.6.1).
"""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from api_gateway.http1.headers import BODILESS, Fields, fields_of, http_date
from api_gateway.http1.serializer import _COLON, _status_line, refuse_hidden_lines, render_response_head
from api_gateway.models import HeaderList

REQUEST_HIGH_WATER = 65_536  # bytes of a body held for a slow reader before the client is made to wait
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class DownstreamPort(Protocol):
    """What a cycle asks of its connection."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    spelled: HeaderList
    expects_continue: bool
    is_write_paused: bool

    @property
    def worker(self) -> "asyncio.Task[None]":
        """The task that serves the connection, from its first request on."""
        ...

    def resume_reading(self) -> None:
        """Let the client go on."""
        ...

    async def wait_until_writable(self) -> None:
        """Wait for the client to read on, or to leave."""
        ...

    def on_answered(self, cycle: "RequestResponseCycle") -> None:
        """Go on to the next request, or close if there shall be none."""
        ...

    def on_body_rate(self, cycle: "RequestResponseCycle") -> None:
        """Apply the rate that this request's body must have from now on."""
        ...

    def hand_over(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the answer to a handshake and let go of the connection; see `ServerExtension.switch`."""
        ...


class RequestResponseCycle:
    """One request and its answer: ASGI's `receive` and `send`, and the `ServerExtension` beside them."""

    # What every cycle begins as stands here, and not in each of them: one is made for every request.
    upgrade = b""
    app: Any = None  # what serves it, if not the connection's application
    on_disconnect: Callable[[], object] | None = None
    on_shutdown: Callable[[], object] | None = None
    is_stopping = False
    keep_alive = True
    is_http10 = False
    is_body_complete = False
    body_rate: float | None = None  # bytes a second of the body, if not the connection's; 0 is no limit
    body_due: float | None = None  # when the next piece of the body is due, kept by the connection
    body_credit = 0.0  # until when the body is fast enough, if no more of it comes; kept by the connection
    is_disconnected = False
    is_started = False
    is_answered = False
    _buffered = 0
    _is_body_taken = False
    _waiter: "asyncio.Future[None] | None" = None
    _has_body = True
    _head = b""  # kept for the first piece of the body
    _is_chunked = False
    _left: int | None = None  # bytes of the announced length still to be sent
    _trailers_follow = False

    def __init__(self, connection: "DownstreamPort", scope: dict[str, Any], target: bytes) -> None:
        self.scope = scope
        self.target = target
        self.headers: HeaderList = connection.spelled
        self.trailers: HeaderList = []
        self.awaits_continue = self._owes_continue = connection.expects_continue
        self.connection = connection
        self._body: list[bytes] = []
        self._is_head = scope["method"] == "HEAD"

    def __repr__(self) -> str:
        state = "answered" if self.is_answered else "started" if self.is_started else "waiting"
        return f"<RequestResponseCycle {self.scope['method']} {self.target!r} [{state}]>"

    # From the connection

    def feed(self, piece: bytes) -> bool:
        """Take one piece of the body; tell whether there is enough of it for now."""
        self.awaits_continue = self._owes_continue = False  # it did not wait to be asked
        self._body.append(piece)
        self._buffered += len(piece)
        self._wake()
        return self._buffered > REQUEST_HIGH_WATER

    def end_body(self) -> None:
        """The request is complete."""
        self.is_body_complete = True
        self._wake()

    def disconnect(self) -> None:
        """The client is gone."""
        if self.is_disconnected:
            return
        self.is_disconnected = True
        self._wake()
        if self.on_disconnect is not None and not self.is_answered:
            self.on_disconnect()

    def stop(self) -> None:
        """The server stops: what has no end of its own shall end soon."""
        self.is_stopping = True
        if self.on_shutdown is not None:
            self.on_shutdown()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # ASGI

    async def receive(self) -> dict[str, Any]:
        """Return the next piece of the body, or that the client has left, or that the answer is complete."""
        if self._owes_continue and not self.is_started and not self.is_disconnected:
            self.awaits_continue = self._owes_continue = False
            self.connection.transport.write(_CONTINUE)
        while not self.is_disconnected and not self.is_answered:
            if self._body or (self.is_body_complete and not self._is_body_taken):
                body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
                self._body, self._buffered = [], 0
                self._is_body_taken = self.is_body_complete
                if not self._is_body_taken:
                    self.connection.resume_reading()
                return {"type": "http.request", "body": body, "more_body": not self._is_body_taken}
            self._waiter = self.connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        """Send a part of the answer, waiting while the client reads too slowly. Nothing is sent to who has left."""
        if self.connection.is_write_paused and not self.is_disconnected:
            await self.connection.wait_until_writable()
        if self.is_disconnected:
            return
        kind = message["type"]
        if self.is_answered or (kind == "http.response.start") is self.is_started:
            raise RuntimeError(f"{kind} is out of order")
        if kind == "http.response.body":
            self._send_body(message.get("body", b""), is_last=not message.get("more_body", False))
        elif kind == "http.response.start":
            self._start(message)
        elif kind == "http.response.trailers" and self._trailers_follow:
            self._send_trailers(message["headers"])
        else:
            raise RuntimeError(f"{kind} is not known here")

    def _start(self, message: dict[str, Any]) -> None:
        """Write the head, or keep it for the body that follows.

        Beyond ASGI a message may hold `reason`, the phrase an upstream chose; `upstream_fields`, the headers
        of an upstream by name, which `headers` were made of; and `is_body_ready`, the promise that the body's first
        piece is sent next without waiting: both then go out together.
        """
        status: int = message["status"]
        headers: HeaderList = message.get("headers", ())
        self.is_started = True
        lines = [_status_line(status, message.get("reason")), *map(_COLON, headers)]
        fields: Fields | None = message.get("upstream_fields")
        fields_given = fields is not None  # then `headers` hold no `DownstreamPort` any more
        if fields is None:
            fields = fields_of(headers)
            refuse_hidden_lines(lines)  # a parser has seen an upstream's
            if b"close" in fields.get(b"connection", [b""])[0].lower():
                self.keep_alive = False
        if b"date" not in fields:
            lines.append(b"date: " + http_date(int(time.time())))
        if self._is_head or status in BODILESS:
            self._has_body = False
        elif b"transfer-encoding" not in fields and b"content-length" in fields:
            self._left = int(fields[b"content-length"][0])
        elif self.is_http10:
            self.keep_alive = False
        else:
            self._is_chunked = True
            self._trailers_follow = message.get("trailers", False)
            lines.append(b"transfer-encoding: chunked")
        if not self.keep_alive or self.awaits_continue:  # whether the body still comes, nobody can tell
            self.keep_alive = False
            if fields_given or b"connection" not in fields:
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
        elif self._left is not None:
            self._left -= len(body)
            if self._left < 0:
                raise RuntimeError("the answer is longer than its Content-Length")
        if self._head:
            body = self._head + body
            self._head = b""
        if body:
            self.connection.transport.write(body)
        if is_last and not self._trailers_follow:
            if self._left:
                raise RuntimeError("the answer is shorter than its Content-Length")
            self._finish()

    def _send_trailers(self, trailers: HeaderList) -> None:
        lines = b"".join(b"%b: %b\r\n" % pair for pair in trailers)
        self.connection.transport.write(b"0\r\n%b\r\n" % lines)
        self._finish()

    def _finish(self) -> None:
        self.is_answered = True
        self.on_disconnect = None
        self._wake()
        self.connection.on_answered(self)

    # The link

    @property
    def task(self) -> "asyncio.Task[None]":
        """The task that serves the connection."""
        return self.connection.worker

    def defer_continue(self) -> None:
        """See `ServerExtension`; what the upstream says then goes through `inform`."""
        self._owes_continue = False

    def require_body_rate(self, rate: float) -> None:
        """See `ServerExtension`."""
        self.body_rate = rate
        if not self.is_body_complete:
            self.connection.on_body_rate(self)

    def send_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ServerExtension`. A client of HTTP/1.0 knows no interim answers."""
        self.awaits_continue = self.awaits_continue and status != HTTPStatus.CONTINUE
        if not self.is_http10 and not self.is_started and not self.is_disconnected:
            self.connection.transport.write(render_response_head(status, reason, headers))

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """See `ServerExtension`. From here on this cycle sends nothing; its end closes the connection."""
        self.is_started = self.is_answered = True
        self.keep_alive = False
        self.on_disconnect = None
        return self.connection.hand_over(render_response_head(101, reason, headers))
