"""One request on any httpx transport, in a task: the `UpstreamCall` of upstreams with another transport.

The transport gets the request body through a queue of at most QUEUE_HIGH_WATER bytes and one piece. Aborting cancels
the task and returns at once. A transport may take its time to end a call that was cancelled; `HttpxCalls` counts these
calls, and begins no call while their number is at the limit.
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import ClassVar, Final

import httpx

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import BODILESS, Fields, fields_of, framing
from api_gateway.http1.plain_types import plain_bytes
from api_gateway.models import HeaderList
from api_gateway.transport.abilities import CallAbilities
from api_gateway.transport.head_repair import repaired_value
from api_gateway.transport.request import NO_BODY, Origin
from api_gateway.transport.response import UpstreamResponse
from api_gateway.transport.shielded import ShieldedTransport

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CANCELLED = "the transport was cancelled"
QUEUE_HIGH_WATER = 65_536  # bytes of a request body that are queued before reading from the client pauses
RUNNING: Final[set["asyncio.Task[None]"]] = set()  # of all calls; the event loop holds tasks by weak references only


class QueuedBody(httpx.AsyncByteStream):
    """A request body that is put in piece by piece, and read by a transport."""

    def __init__(self, call: "HttpxCall") -> None:
        self._call = call
        self._pieces: deque[bytes] = deque()
        self.size = 0  # bytes in the queue
        self._is_complete = False
        self._waiter: asyncio.Future[None] | None = None  # awaited by the reader

    def __repr__(self) -> str:
        return f"<QueuedBody [{'complete' if self._is_complete else 'arriving'}, {self.size} bytes]>"

    def put(self, piece: bytes) -> None:
        """Append a piece."""
        self._pieces.append(piece)
        self.size += len(piece)
        self._wake()

    def end(self) -> None:
        """Note that nothing follows."""
        self._is_complete = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the pieces as they arrive."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self.size -= len(piece)
                yield piece
                self._call.on_piece_taken()
            if self._is_complete:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class AbortedCallsExceeded(httpx.PoolTimeout):
    """As many calls of an upstream as may be were aborted and have not ended."""


class HttpxCalls:
    """The calls of one upstream on an httpx transport; none if the upstream has the gateway's own (`transport` None).

    `limit` is the maximum number of calls that were aborted and have not ended, `refused` the number of calls that
    were not begun for that reason.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None, limit: int) -> None:
        self.limit = limit
        self.refused = 0
        self._transport = transport
        self._aborted: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<HttpxCalls [{self.aborted} of {self.limit} aborted and not ended]>"

    @property
    def aborted(self) -> int:
        """The number of calls that were aborted and have not ended."""
        transport = self._transport
        return len(self._aborted) + (transport.abandoned if isinstance(transport, ShieldedTransport) else 0)

    def begin(self, origin: Origin, principal: str | None) -> "HttpxCall | None":
        """Begin a call; return None, upon which `refusal` says why, while too many have not ended."""
        assert self._transport is not None  # noqa: S101 - only called for a transport of httpx
        if self.aborted >= self.limit:
            return None
        return HttpxCall(self._transport, origin, self, principal)

    def refusal(self) -> AbortedCallsExceeded:
        """Count a call that was not begun, and return the error."""
        self.refused += 1
        return AbortedCallsExceeded(f"{self.aborted} aborted requests to it have not ended")

    def on_aborted(self, task: "asyncio.Task[None]") -> None:
        """Count a task until its end."""
        self._aborted.add(task)
        task.add_done_callback(self._aborted.discard)


class HttpxCall:
    """One request and its response on an httpx transport.

    States: new, running (`_task`), ended (`_response` is None: complete, failed or abandoned). Reading may be paused
    while it runs, and the request body may be incomplete. The timeouts are the transport's own.
    """

    abilities: ClassVar[CallAbilities] = CallAbilities(interim=False, trailers=False, upgrade=False)

    def __init__(
        self, transport: httpx.AsyncBaseTransport, origin: Origin, calls: HttpxCalls, principal: str | None
    ) -> None:
        """`principal` has a share of the transport's connections, if it knows shares."""
        self.loop = asyncio.get_running_loop()
        self.timer = DeadlineTimer(self.loop, self.close)  # never set
        self.is_write_paused = False
        self._transport = transport
        self._origin = origin
        self._calls = calls
        self._principal = principal
        self._response: UpstreamResponse | None = None
        self._body = QueuedBody(self)
        self._task: asyncio.Task[None] | None = None
        self._paused_at: float | None = None  # loop time since which reading is paused
        self._resumed: asyncio.Future[None] | None = None  # awaited by the task while reading is paused

    def __repr__(self) -> str:
        state = "new" if self._task is None else "ended" if self._response is None else "running"
        return f"<HttpxCall {self._origin.url} [{state}]>"

    # Sending: see `UpstreamCall`

    def start(self, response: UpstreamResponse, request: bytes, *further: bytes) -> None:
        """Send a complete request."""
        self._begin(response, [request, *further])
        self._body.end()

    def begin(
        self,
        response: UpstreamResponse,
        request: Sequence[bytes],
        left: int | None,  # noqa: ARG002 - of the port
        *,
        gathers: bool = False,  # noqa: ARG002 - as above
    ) -> None:
        """Send the beginning of a request."""
        self._begin(response, request)

    def _begin(self, response: UpstreamResponse, request: Sequence[bytes]) -> None:
        self._response = response
        head, _, first = request[0].partition(b"\r\n\r\n")
        line, _, _ = head.partition(b"\r\n")
        method, target, _ = line.split(b" ", 2)
        headers = pairs_of(head)
        for piece in (first, *request[1:]):
            if piece:
                self._body.put(piece)
        outgoing = self._origin.plain_request(
            method.decode("ascii"),
            headers,
            target,
            stream=NO_BODY if framing(fields_of(headers)) is None else self._body,
            extensions={"target": target, "timeout": response.timeouts, "principal": self._principal},
        )
        self._task = task = self.loop.create_task(self._run(outgoing))
        RUNNING.add(task)
        task.add_done_callback(RUNNING.discard)

    def send_piece(self, piece: bytes) -> None:
        """Queue a piece of the request body."""
        if self._response is not None:
            self._body.put(piece)
            self.is_write_paused = self._body.size > QUEUE_HIGH_WATER

    def end_body(self, end: bytes) -> None:  # noqa: ARG002 - there is no framing
        """Note the end of the request body."""
        self._body.end()

    def on_piece_taken(self) -> None:
        """Continue after a pause: the transport has taken a piece of the request body."""
        if self.is_write_paused and self._body.size <= QUEUE_HIGH_WATER:
            self.is_write_paused = False
            if self._response is not None:
                self._response.listener.on_writable()

    # Receiving

    async def _run(self, request: httpx.Request) -> None:
        """Send the request, and report its response or its failure."""
        try:
            received = await self._transport.handle_async_request(request)
        except asyncio.CancelledError:
            self._fail(httpx.ReadError(_CANCELLED))  # unless it was closed, which is what cancels it otherwise
            raise
        except Exception as error:  # noqa: BLE001 - any failure of a transport fails the response
            self._fail(error)
            return
        try:
            await self._relay(received)
        except asyncio.CancelledError:
            self._fail(httpx.ReadError(_CANCELLED))
            raise
        except httpx.TransportError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(httpx.ReadError(f"{type(error).__name__}: {error}"))
        finally:
            await received.stream.aclose()  # type: ignore[union-attr]  # an async transport's stream is an async one

    async def _relay(self, received: httpx.Response) -> None:
        """Report the head, then each piece of the body. Raises httpx.TransportError."""
        response = self._response
        if response is None:
            return
        status, headers = received.status_code, _checked_fields(received.headers.raw)
        if not 200 <= status <= 599:  # noqa: PLR2004 - RFC 9110 section 15
            raise httpx.RemoteProtocolError(f"status {status}")
        fields = fields_of(headers)
        reason = received.extensions.get("reason_phrase") or httpx.codes.get_reason_phrase(status).encode()
        length = _checked_length(fields)
        reason = _repaired(b"", reason, "reason phrase")
        response.set_head(status, reason, headers, fields)
        response.version, response.keeps_alive = received.http_version.removeprefix("HTTP/"), True
        if not response.is_to_head and status not in BODILESS:
            response.is_counted = length is not None
            response.on_progress()
            async for piece in _counted(received, length):
                if self._response is None:
                    return
                self._response.append(piece)
                self._response.on_progress()
                while self._paused_at is not None:
                    self._resumed = self.loop.create_future()
                    await self._resumed
        self._complete()

    def _complete(self) -> None:
        """Complete the response."""
        response, self._response = self._response, None
        if response is not None:
            response.connection, response.is_complete = None, True
            response.on_progress()

    def _fail(self, error: Exception) -> None:
        """Fail the response."""
        response, self._response = self._response, None
        if response is not None:
            response.connection = None
            response.fail(error)

    # As `ResponseSource`

    def set_timer(self, name: str) -> None:
        """Do nothing: the transport has the timeouts of the request."""

    def pause_reading(self) -> None:
        """Take no further piece of the body from the transport."""
        if self._paused_at is None:
            self._paused_at = self.loop.time()

    def resume_reading(self) -> None:
        """Take pieces again, and add the pause to `reader_waited`."""
        if self._paused_at is not None:
            if self._response is not None:
                self._response.reader_waited += self.loop.time() - self._paused_at
            self._paused_at = None
            if self._resumed is not None and not self._resumed.done():
                self._resumed.set_result(None)

    def detach_transport(self) -> asyncio.Transport:
        """Raise ReadError: these transports do not switch protocols."""
        raise httpx.ReadError("the protocol was not switched")

    def move_to_tunnels(self) -> None:
        """Do nothing: the transport has a pool of its own."""

    def abandon(self, response: UpstreamResponse) -> None:
        """Discard the response, and end the call."""
        if self._response is response:
            response.connection = None
            self.close()

    def pass_on(self, response: UpstreamResponse, successor: UpstreamResponse) -> None:
        """Receive what follows of `response` into `successor`."""
        if self._response is response:
            self._response = successor

    def close(self) -> None:
        """Cancel the task, whose end is not awaited."""
        self._response = None
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._calls.on_aborted(self._task)


def _checked_fields(headers: HeaderList) -> HeaderList:
    """Return the fields of a head, with spaces for control characters as the gateway's own transport has them.

    Raises RemoteProtocolError for a field that a client would read differently. Not every transport checks it: HTTP/2
    permits what would be the end of a line or of the head in HTTP/1.1.
    """
    for name, _ in headers:
        if _NAME.fullmatch(name) is None:
            raise httpx.RemoteProtocolError(f"an invalid header field {name[:50]!r}")
    return [(name, _repaired(name, value, f"header field {name[:50]!r}")) for name, value in headers]


def _repaired(name: bytes, value: bytes, place: str) -> bytes:
    repaired = repaired_value(name, value)
    if repaired is None:
        raise httpx.RemoteProtocolError(f"an invalid {place}")
    return repaired


def _checked_length(fields: Fields) -> int | None:
    """Return the length of the body, None if the head states none.

    Raises RemoteProtocolError if it is invalid or not the only framing (RFC 9112 section 6.3), as the own transport
    does.
    """
    lengths = set(fields.get(b"content-length", ()))
    if len(lengths) > 1 or any(_LENGTH.fullmatch(length) is None for length in lengths):
        raise httpx.RemoteProtocolError("an invalid Content-Length")
    if lengths and b"transfer-encoding" in fields:
        raise httpx.RemoteProtocolError("an invalid framing: Content-Length and Transfer-Encoding")
    return int(lengths.pop()) if lengths else None


async def _counted(received: httpx.Response, length: int | None) -> AsyncIterator[bytes]:
    """Yield the body of a response. Raises RemoteProtocolError if it does not have `length` bytes."""
    left = length or 0
    async for piece in received.stream:  # type: ignore[union-attr]  # as above
        octets = plain_bytes(piece)
        left -= len(octets)
        if length is not None and left < 0:
            raise httpx.RemoteProtocolError("more bytes than announced")
        if octets:
            yield octets
    if length is not None and left:
        raise httpx.RemoteProtocolError("closed before the response was complete")
