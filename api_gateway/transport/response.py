"""The response of an upstream while it arrives."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

import httpx

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.http1.chunked import ChunkedBody
from api_gateway.http1.fast_parser import pairs_of, reason_phrase
from api_gateway.http1.headers import Fields, fields_of
from api_gateway.models import HeaderList
from api_gateway.transport.abilities import CallAbilities

SWITCHING = 101

TimeoutExtension = Mapping[str, float | None]


class ResponseListener(Protocol):
    """Callbacks and options of one request.

    `expects_continue`: the request has `Expect: 100-continue`, so its body may wait for an interim response.
    `upgrade`: the request asks for a switch of protocols, so a 101 is expected.
    """

    expects_continue: bool
    upgrade: bool

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Process an interim response other than 101."""
        ...

    def continue_body(self) -> None:
        """Go on providing the request body after the response, which was complete before the body."""
        ...

    def discard_body(self) -> None:
        """Undo `continue_body`: the rest of the request body is not sent."""
        ...

    def on_writable(self) -> None:
        """Go on providing the request body: the upstream reads on."""
        ...


class NoListener:
    """A `ResponseListener` that ignores interim responses and has no part in a body's rest."""

    expects_continue = False
    upgrade = False

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ResponseListener`."""

    def continue_body(self) -> None:
        """See `ResponseListener`."""

    def discard_body(self) -> None:
        """See `ResponseListener`."""

    def on_writable(self) -> None:
        """See `ResponseListener`."""


NO_LISTENER = NoListener()
NO_LIMITS: TimeoutExtension = {}


class ResponseSource(Protocol):
    """The connection of a response, as the response uses it."""

    loop: asyncio.AbstractEventLoop
    timer: DeadlineTimer

    @property
    def abilities(self) -> CallAbilities:
        """The abilities of this kind of connection."""
        ...

    def set_timer(self, name: str) -> None:
        """Start a timeout by name: `read` for the head, `idle` between body pieces."""
        ...

    def pause_reading(self) -> None:
        """Stop reading from the upstream."""
        ...

    def resume_reading(self) -> None:
        """Read from the upstream again."""
        ...

    def detach_transport(self) -> asyncio.Transport:
        """Give up the transport after a 101, with reading paused; the caller owns it."""
        ...

    def move_to_tunnels(self) -> None:
        """Count this connection as a tunnel instead of a pooled connection. Raises ShareExceeded."""
        ...

    def abandon(self, response: "UpstreamResponse") -> None:
        """Discard the response and close the connection, unless the response is complete."""
        ...

    def pass_on(self, response: "UpstreamResponse", successor: "UpstreamResponse") -> None:
        """Receive what follows of `response` into `successor`."""
        ...


class UpstreamResponse:
    """The response to one request while it arrives.

    States: awaited, head received (`is_head_complete`), then complete (`is_complete`) or failed (`error`); it may also
    fail before the head. In the last two states nothing more arrives, but buffered pieces can still be read.
    """

    # Slots: what each request sets or reads. The rest has defaults on the class, which cost nothing until they differ.
    # Of those there are 30 at most in an exchange, because instances do not share more keys in CPython 3.11.
    __slots__ = (
        "__dict__",
        "buffered",
        "chunks",
        "connection",
        "cost",
        "error",
        "is_complete",
        "is_head_complete",
        "is_to_head",
        "listener",
        "pieces",
        "status",
        "timeouts",
    )
    version = "1.1"  # of HTTP, in which the response was received
    head = b""  # a plain head as received; empty if the parser has parsed it
    passed = b""  # status line and forwarded lines of a plain head
    has_date = False  # only for a plain head
    trailers: HeaderList = []  # noqa: RUF012 - replaced, never modified
    leftover = b""  # bytes received after a 101
    is_until_close = False  # delimited by the end of the connection
    is_counted = False  # delimited by Content-Length, and parsed by httptools
    keeps_alive = False
    is_relayed = False  # pieces are written to the client at once instead of being buffered
    reader_waited = 0.0  # seconds for which reading from the upstream was paused for a slow reader
    _waiter: "asyncio.Future[None] | None" = None
    _reason: bytes | None = (
        None  # these three are of a head that the parser has parsed, or computed when they are read
    )
    _headers: HeaderList | None = None
    _fields: Fields | None = None

    def __init__(
        self, connection: ResponseSource | None, method: str, timeouts: TimeoutExtension, listener: ResponseListener
    ) -> None:
        """A subclass that does not call this sets the same attributes."""
        self.connection: ResponseSource | None = connection
        self.is_to_head = method == "HEAD"
        self.timeouts = timeouts
        self.listener = listener
        self.pieces: list[bytes] = []
        self.status = self.buffered = 0  # `buffered`: bytes in `pieces`
        self.is_head_complete = self.is_complete = False
        self.error: Exception | None = None
        self.chunks: ChunkedBody | None = None  # of a body whose pieces are plain chunks with their framing
        self.cost: bytes | None = None  # the value of X-Gateway-Cost in a plain head

    @classmethod
    def continuing(cls, other: "UpstreamResponse", listener: ResponseListener) -> "UpstreamResponse":
        """Return a response that has all of another one and receives what follows; the other receives nothing more."""
        response = cls(other.connection, "HEAD" if other.is_to_head else "GET", other.timeouts, listener)
        response.take_over(other)
        return response

    def take_over(self, other: "UpstreamResponse") -> None:
        """Take all that another response has, and receive what follows; the other receives nothing more."""
        assert other.chunks is None  # noqa: S101 - the pieces of such a response cannot be taken apart
        self.pieces, self.buffered = other.pieces, sum(map(len, other.pieces))
        self.status, self.version, self.head, self.passed = other.status, other.version, other.head, other.passed
        self.has_date, self.cost, self.trailers = other.has_date, other.cost, other.trailers
        self.is_head_complete, self.is_complete = other.is_head_complete, other.is_complete
        self.is_until_close, self.is_counted = other.is_until_close, other.is_counted
        self.keeps_alive, self.reader_waited = other.keeps_alive, other.reader_waited
        self.error, other.error = other.error, None
        self._reason, self._headers, self._fields = other._reason, other._headers, other._fields  # noqa: SLF001 - of the same class
        self.connection, other.connection = other.connection, None
        if self.connection is not None:
            self.connection.pass_on(other, self)

    def forget(self) -> None:
        """Return to the state of a response of which nothing has arrived, and which belongs to no connection."""
        self.status, self.version, self.head, self.passed = 0, "1.1", b"", b""
        self.has_date, self.cost, self.trailers, self.leftover = False, None, [], b""
        self.is_head_complete = self.is_complete = self.is_until_close = self.is_counted = False
        self.chunks, self.keeps_alive, self.buffered, self.reader_waited = None, False, 0, 0.0
        self.connection = self.error = self._reason = self._headers = self._fields = None
        self.pieces = []
        self.listener = NO_LISTENER

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else self.error or "arriving"
        return f"<{type(self).__name__} {self.status or 'awaited'} [{state}]>"

    @property
    def reason(self) -> bytes:
        """The reason phrase."""
        return reason_phrase(self.head) if self._reason is None else self._reason

    @property
    def headers(self) -> HeaderList:
        """The header fields as received, without white space around values."""
        if self._headers is None:
            self._headers = pairs_of(self.head)
        return self._headers

    @property
    def fields(self) -> Fields:
        """The header fields by name."""
        if self._fields is None:
            self._fields = fields_of(self.headers)
        return self._fields

    def set_head(self, status: int, reason: bytes, headers: HeaderList, fields: Fields) -> None:
        """Set a head that the parser has parsed, and mark it as received."""
        self.status, self._reason, self._headers, self._fields = status, reason, headers, fields
        self.is_head_complete = True

    def takes_chunks(self, status: int) -> bool:  # noqa: ARG002 - for subclasses
        """Return whether the pieces of a response with plain chunks may include their framing. Here, never."""
        return False

    def on_complex_head(self) -> None:
        """Prepare for a head that is not plain; called before the parser parses it. Does nothing here."""

    def on_complex_chunk(self) -> None:
        """Prepare for pieces without their framing, after `chunks` were not plain. Does nothing here."""

    def on_progress(self) -> None:
        """Wake the reader after the state of the response has changed."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait_head(self) -> None:
        """Wait until the head is received. Raises the error of a response that has failed by then."""
        while self.error is None and not self.is_head_complete:
            self._waiter = self._open_connection().loop.create_future()
            await self._waiter
        error = self.error
        if error is not None:
            self.error = httpx.ReadError(str(error))  # a raised error refers to frames that refer to this: a cycle
            raise error

    def append(self, piece: bytes) -> None:
        """Buffer one body piece, without waking the reader."""
        self.pieces.append(piece)
        self.buffered += len(piece)

    def fail(self, error: Exception) -> None:
        """Fail the response, unless it has ended; the reader raises `error` after the buffered pieces."""
        if not self.is_complete and self.error is None:
            self.error = error
            self.on_progress()

    def take(self) -> bytes:
        """Remove and return the buffered part of the body."""
        pieces = self.pieces
        self.buffered = 0
        if len(pieces) == 1:
            return pieces.pop()
        self.pieces = []
        return b"".join(pieces)

    def _open_connection(self) -> ResponseSource:
        if self.connection is None:
            raise httpx.ReadError("closed before the response was complete")
        return self.connection

    def move_to_tunnels(self) -> None:
        """Count the connection as a tunnel, because the response has no defined end. Raises ShareExceeded."""
        if self.connection is not None:
            self.connection.move_to_tunnels()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """Return the transport after a 101, with the bytes already received. Raises ReadError."""
        if self.connection is None or self.status != SWITCHING:
            raise httpx.ReadError("closed before the protocol was switched")
        return self.connection.detach_transport(), self.leftover

    def close(self) -> None:
        """Discard the response, and close its connection if it is incomplete. Idempotent."""
        if self.connection is not None:
            self.connection.abandon(self)
