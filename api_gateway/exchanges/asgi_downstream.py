"""The port `Downstream` on ASGI: for other servers, for middleware, and for requests that the fast path does not take.

The exchange writes heads of HTTP/1.1 and bodies without framing, which become messages. Only the task that called the
application sends them; a child of it receives the request body, and has ended when the application returns. On the
gateway's own server, the `ServerExtension` adds what ASGI lacks: interim responses, trailers, upgrades.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from api_gateway.errors import GatewayError, InternalError, ResponseIncomplete
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.exchanges.exchange_life import ExchangeLife
from api_gateway.http1.asgi import (
    CERTIFICATE,
    FIELDS,
    SERVER_EXTENSION,
    BodyReceiver,
    DownstreamAbilities,
    InFlight,
    Message,
    Receive,
    Scope,
    Send,
    ServerExtension,
)
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import BODILESS, Fields, content_length, framing, without_expectation
from api_gateway.http1.plain_types import plain_bytes
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import ClientCertificate, Exchange, HeaderList
from api_gateway.proxy.exchange import DONE
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.header_facts import RewrittenHeaders

DISCONNECT_CHECK_DELAY = 0.05  # seconds before `receive` is called behind the body, and between its calls
_HIGH_WATER = 65_536  # bytes of a response that wait to be sent before reading from the upstream pauses
_MIN_FINAL_STATUS = 200
_HEAD_END = b"\r\n\r\n"
_START, _BODY, _TRAILERS = "http.response.start", "http.response.body", "http.response.trailers"


class AsgiDownstream:
    """One request and its response by ASGI's `receive` and `send`; see `Downstream`.

    States: serving, ended (`_is_ended`: the exchange has ended, and the messages that wait are still sent). Either may
    be combined with an incomplete request body (`_body`), whose reception may be paused (`_is_paused`).
    """

    limits: Any = None  # the server has applied its own
    last_headers: RewrittenHeaders | None = None

    def __init__(self, scope: Scope, receive: Receive, send: Send, omit: frozenset[bytes]) -> None:
        """`omit` are the response fields that another server than the gateway's own adds itself, in lower case."""
        self.loop = asyncio.get_running_loop()
        self.client: tuple[str, int] | None = scope.get("client")
        self.scheme: str = scope["scheme"]
        self.certificate: ClientCertificate | None = scope.get(CERTIFICATE)
        self.is_write_paused = False
        self._extension: ServerExtension | None = scope.get(SERVER_EXTENSION)
        has_extension = self._extension is not None
        self.abilities = DownstreamAbilities(framing=False, upgrade=has_extension)
        self._omit = frozenset[bytes]() if has_extension else omit
        self._receive = receive
        self._send = send
        self._exchange: ExchangeLife | None = None
        self._messages: deque[Message] = deque()
        self._waiting = 0  # bytes in `_messages`
        self._waiter: asyncio.Future[None] | None = None  # awaited while there is no message
        self._body: BodyReceiver | None = None
        self._left: int | None = 0  # bytes of the request body still to come; None if it is chunked
        self._receiver: asyncio.Task[None] | None = None
        self._check: asyncio.TimerHandle | None = None  # after which `receive` is called for a disconnect
        self._resumed: asyncio.Future[None] | None = None  # awaited while reception is paused
        self._is_paused = self._is_started = self._is_ended = self._is_switched = self._has_trailers = False
        self._is_lost = False  # nothing more can be sent
        self._is_cut = False  # the response has begun, and is not continued

    def __repr__(self) -> str:
        return f"<AsgiDownstream [{'ended' if self._is_ended else 'serving'}, {self._waiting} bytes to send]>"

    @property
    def transport(self) -> Any:
        """The object that the exchange writes to: this one, of which it uses `write` and `writelines`."""
        return self

    def head_of(self, scope: Scope, target: bytes) -> RequestHead:
        """Return the head of the request in a scope that is complete.

        Header fields are those that the client sent, in its spelling, unless a middleware has replaced them.
        """
        fields: Fields = scope[FIELDS]
        extension, kind = self._extension, framing(fields)
        headers: HeaderList = scope["headers"]
        if extension is not None and headers == [(name.lower(), value) for name, value in extension.headers]:
            headers = extension.headers
        is_expected = b"expect" in fields and fields[b"expect"][0].lower() == b"100-continue"
        # Another server sends 100 (Continue) itself; on the own one, a part of the body may have come meanwhile.
        if is_expected and (extension is None or not extension.awaits_continue):
            headers, is_expected = without_expectation(headers), False
        self._left = _length(fields, kind)
        head = RequestHead(scope["method"], target, headers, scope["http_version"], self._left, keep_alive=True)
        if extension is not None:
            head.expects_continue = is_expected
            if is_expected:
                extension.defer_continue()
            if kind is None:
                head.upgrade = extension.upgrade
        return head

    async def run(self) -> None:
        """Send the messages of the exchange, which has begun, until it has ended.

        Raises ResponseIncomplete if the response was cut.
        """
        extension = self._extension
        if not self._is_ended:
            if self._body is not None:
                self._begin_to_receive()
            elif extension is None:
                self._check = self.loop.call_later(DISCONNECT_CHECK_DELAY, self._begin_to_receive)
            if extension is not None:
                self._attach(extension)
        try:
            await self._send_all()
            if self._receiver is not None and self._body is not None and self._body.is_body_continued:
                await asyncio.wait({self._receiver})
        except BaseException as error:
            if self._is_ended or not self._fail(error):
                raise
        finally:
            await self._end(extension)
        if self._is_cut and not self._is_lost:
            await self._cut(extension)

    async def _cut(self, extension: ServerExtension | None) -> None:
        """Have the server close the connection without the end of the response.

        A middleware such as Starlette's `BaseHTTPMiddleware` would complete the response if this returned or raised an
        error alone, so it gets a message that ASGI does not define, which it refuses, as servers do.
        """
        if extension is not None:
            extension.is_cut = True
        with suppress(Exception):
            await self._send({"type": "http.response.cut"})
        raise ResponseIncomplete("the rest of the response is missing")

    def _attach(self, extension: ServerExtension) -> None:
        """Have the server report to the exchange."""
        extension.on_disconnect, extension.on_shutdown = self._on_disconnected, self._on_shutdown
        if extension.is_disconnected:
            self._on_disconnected()

    async def _send_all(self) -> None:
        while self._messages or not self._is_ended:
            if not self._messages:
                self._waiter = self.loop.create_future()
                await self._waiter
                continue
            message = self._messages.popleft()
            await self._send(message)
            self._waiting -= len(message.get("body", b""))
            if self.is_write_paused and self._waiting <= _HIGH_WATER:
                self.is_write_paused = False
                if self._exchange is not None and not self._is_ended:
                    self._exchange.on_writable()

    def _fail(self, error: BaseException) -> bool:
        """End the exchange, because its response cannot be sent; return False if the server must get the error."""
        exchange = self._exchange
        assert exchange is not None  # noqa: S101 - a response without an exchange has ended
        self._is_lost = True
        if isinstance(error, OSError):  # as the specification of ASGI demands once the client has disconnected
            exchange.on_client_disconnected()
        elif isinstance(error, Exception):
            exchange.on_defect(error)
        else:  # cancelled
            exchange.on_forced_close()
            return False
        return True

    async def _end(self, extension: ServerExtension | None) -> None:
        """Await the task that receives, and release what forms reference cycles."""
        if extension is not None:
            extension.on_disconnect = extension.on_shutdown = None
        if self._check is not None:
            self._check.cancel()
        if self._receiver is not None:
            await cancel_and_wait(self._receiver)
        if self._body is not None:
            self._body.disconnect()
        self._exchange = self._body = self._receiver = self._check = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # From the server

    def _begin_to_receive(self) -> None:
        self._receiver = self.loop.create_task(self._receive_all())

    async def _receive_all(self) -> None:
        """Receive the request body; then, if the server does not report a disconnect otherwise, wait for that."""
        try:
            if self._body is not None and not await self._receive_body(self._body):
                return
            if self._extension is None:
                await self._await_disconnect()
        except Exception as error:  # noqa: BLE001 - of a middleware, whose response it is to have a defect
            if self._exchange is not None and not self._is_ended:
                self._exchange.on_defect(error)

    async def _receive_body(self, body: BodyReceiver) -> bool:
        """Receive the request body; return False if it remains incomplete."""
        more = True
        while more:
            while self._is_paused:
                self._resumed = self.loop.create_future()
                await self._resumed
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._on_disconnected()
                return False
            piece, more = plain_bytes(message.get("body") or b""), bool(message.get("more_body"))
            if not self._is_of_length(piece, more=more):
                if self._exchange is not None and not self._is_ended:
                    self._exchange.on_refused(InternalError("The request body has another length than announced."))
                return False
            if piece and body.feed(piece):
                self.pause_reading()
        body.end_body()
        return True

    def _is_of_length(self, piece: bytes, *, more: bool) -> bool:
        """Count a piece; return False if the body cannot have the announced length: middleware has changed it."""
        if self._left is None:
            return True
        self._left -= len(piece)
        return self._left >= 0 if more else self._left == 0

    async def _await_disconnect(self) -> None:
        if self._body is not None:
            await asyncio.sleep(DISCONNECT_CHECK_DELAY)
        while (await self._receive())["type"] != "http.disconnect":  # noqa: ASYNC110 - ASGI has no event to wait for
            await asyncio.sleep(DISCONNECT_CHECK_DELAY)  # a server or middleware may return `http.request` repeatedly
        self._on_disconnected()

    def _on_disconnected(self) -> None:
        self._is_lost = True
        if self._exchange is not None and not self._is_ended:
            self._exchange.on_client_disconnected()

    def _on_shutdown(self) -> None:
        if self._exchange is not None and not self._is_ended:
            self._exchange.on_drain()

    # From the watch on credentials: see `OpenExchange`

    @property
    def exchange(self) -> Exchange | None:
        """The record of the exchange; None before it has begun and after its end."""
        return None if self._exchange is None or self._is_ended else self._exchange.exchange

    def end(self, error: GatewayError) -> None:
        """End a stream or tunnel with an error: on the gateway's own server by its connection, else incomplete."""
        exchange, extension = self._exchange, self._extension
        if exchange is None or self._is_ended:
            return
        if extension is None:
            exchange.on_refused(error)
        else:
            note_failure(exchange.exchange, error)
            extension.connection.transport.abort()

    # From the exchange: see `Downstream`

    def begin_exchange(self, exchange: InFlight) -> None:
        """Report events of the server to the exchange."""
        assert isinstance(exchange, ExchangeLife)  # noqa: S101 - the only ones
        self._exchange = exchange

    def end_exchange(self, *, keep_alive: bool) -> None:  # noqa: ARG002 - the head of the response has said so
        """Complete the response, unless the exchange was aborted; the server then detects that it is incomplete."""
        exchange, extension = self._exchange, self._extension
        self._is_ended = True
        if exchange is not None and exchange.phase == DONE and not self._is_switched:
            if extension is not None and self._body is not None and self._body.is_body_continued:
                extension.continue_body()
            self._complete(exchange)
        elif exchange is not None:
            self._is_cut = self._is_started and not self._is_switched
        self._wake()

    def _complete(self, exchange: ExchangeLife | None) -> None:
        """Mark the last message as the last one, or append that."""
        last = self._messages[-1] if self._messages else None
        if last is not None and last["type"] == _BODY:
            last["more_body"] = False
        else:
            if last is not None:
                last["is_body_ready"] = True
            self._messages.append({"type": _BODY, "body": b"", "more_body": False})
        if exchange is not None and self._has_trailers:
            trailers = exchange.trailers_for_client()
            self._messages.append({"type": _TRAILERS, "headers": trailers, "more_trailers": False})

    @property
    def is_draining(self) -> bool:
        """True once the gateway's own server has begun to stop."""
        return self._extension is not None and self._extension.is_stopping

    def receive_body(self, body: BodyReceiver, left: int) -> None:  # noqa: ARG002 - the server frames the body
        """Pass the request body to `body`."""
        self._body = body
        if self._extension is not None and body.body_rate is not None:
            self._extension.require_body_rate(body.body_rate)

    def pause_reading(self) -> None:
        """Receive no further piece of the request body."""
        self._is_paused = True

    def resume_reading(self) -> None:
        """Receive pieces again, or let the server discard the rest of a body that is not continued."""
        self._is_paused = False
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
        body = self._body
        if self._is_ended and self._extension is not None and body is not None and not body.is_body_continued:
            self._extension.discard_body()

    def write_response(self, response: bytes, *, keep_alive: bool, is_last: bool) -> None:  # noqa: ARG002 - as above
        """Send a complete response."""
        self.write(response)
        self._is_ended = True
        self._complete(None)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        """Send a head, a part of the body, or both."""
        self.write(b"".join(pieces))

    def write(self, data: bytes) -> None:
        """Send heads of interim responses, a head, a part of the body, or the last two."""
        while data and not self._is_started:
            head, _, data = data.partition(_HEAD_END)
            status, reason = int(head[9:12]), head.partition(b"\r\n")[0][13:]
            if status >= _MIN_FINAL_STATUS:
                self._start(status, reason, pairs_of(head), is_body_ready=bool(data))
            elif self._extension is not None:
                self._extension.send_interim(status, reason, pairs_of(head))
        if data:
            self._messages.append({"type": _BODY, "body": data, "more_body": True})
            self._waiting += len(data)
            self.is_write_paused = self._waiting > _HIGH_WATER
        self._wake()

    def _start(self, status: int, reason: bytes, headers: HeaderList, *, is_body_ready: bool) -> None:
        """Append the head; `is_body_ready`: the first part of the body follows at once."""
        self._is_started = True
        omit = self._omit
        if self._extension is None and status in BODILESS:
            omit |= {b"content-length"}
        self._has_trailers = self._may_have_trailers(status)
        self._messages.append(
            {
                "type": _START,
                "status": status,
                "reason": reason,
                "headers": [pair for pair in headers if pair[0].lower() not in omit] if omit else headers,
                "trailers": self._has_trailers,
                "is_body_ready": is_body_ready,
            }
        )

    def _may_have_trailers(self, status: int) -> bool:
        """Return whether the response of the upstream may have trailers, and the client accepts them."""
        exchange = self._exchange
        return (
            self._extension is not None
            and exchange is not None
            and exchange.plan.facts.accepts_trailers
            and exchange.exchange.source == "upstream"
            and status not in BODILESS
            and b"transfer-encoding" in exchange.fields
        )

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """Send 101 and return the transport, with the bytes that the client has already sent in the new protocol."""
        assert self._extension is not None  # noqa: S101 - see `abilities`
        self._is_switched = self._is_started = True
        return self._extension.switch_protocols(reason, headers)


def _length(fields: Fields, kind: bytes | None) -> int | None:
    """Return the length of a request body in bytes, None if it is chunked; `ambiguity` refuses what is no number."""
    return None if kind == b"chunked" else content_length(fields) or 0
