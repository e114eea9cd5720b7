"""The answer of an upstream while it arrives: head, pieces of body, its end or its failure; and as httpx has it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import cached_property
from typing import Protocol

import httpx

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.http1.fast_parser import pairs_of, reason_phrase
from api_gateway.http1.headers import Fields, fields_of
from api_gateway.models import HeaderList

SWITCHING = 101

TimeoutExtension = Mapping[str, float | None]


class ResponseListener(Protocol):
    """What a proxy wants to hear of, or to say, in the course of one request.

    `expects_continue`: the request says so, and its body may wait for an interim answer. `upgrade`: a 101 is welcome.
    """

    expects_continue: bool
    upgrade: bool

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Hear of every 1xx answer but 101."""
        ...

    def trailers(self) -> HeaderList:
        """Return what shall come behind a chunked body, once that has been sent."""
        ...


class NoListener:
    """The hooks of who wants to hear and say nothing."""

    expects_continue = upgrade = False

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ResponseListener`."""

    def trailers(self) -> HeaderList:
        """See `ResponseListener`."""
        return []


NO_LISTENER = NoListener()
NO_LIMITS: TimeoutExtension = {}


class ResponseSource(Protocol):
    """What an answer asks of the connection it comes from."""

    loop: asyncio.AbstractEventLoop
    alarm: DeadlineTimer

    def set_alarm(self, name: str) -> None:
        """Give the upstream its time: `read` for the head, `idle` between pieces of the body."""
        ...

    def pause_reading(self) -> None:
        """Make the upstream wait for the reader."""
        ...

    def resume_reading(self) -> None:
        """Read on after the reader has caught up."""
        ...

    def hand_over(self) -> asyncio.Transport:
        """Give the transport away after a 101."""
        ...

    def set_apart(self) -> None:
        """Stop counting among the pool's connections. Raises OverShare."""
        ...

    def abandon(self, answer: "UpstreamResponse") -> None:
        """Drop the answer; unless it has fully arrived, the connection goes with it."""
        ...


class UpstreamResponse(httpx.AsyncByteStream):
    """The answer to one request while it arrives: head, then pieces of body, then its end or its failure."""

    # What every answer begins as stands here, and not in each of them: one is made for every request.
    status = 0
    head = b""  # as it came, if it was a plain one; what the parser took apart has none
    passed = b""  # the lines of a plain head that go further, the status line before them
    has_date = False  # of a plain head
    cost: bytes | None = None  # that a plain head tells of
    trailers: HeaderList = []  # noqa: RUF012 - replaced by those that come, never changed
    leftover = b""  # what came behind a 101
    is_head_complete = False
    is_complete = False
    is_until_close = False
    is_counted = False  # by its Content-Length, as far as the parser has it
    keeps_alive = False
    error: Exception | None = None
    buffered = 0
    is_relayed = False  # what arrives is written to the client at once, and not held here
    reader_waited = 0.0  # seconds for which the upstream was made to wait for the reader
    _waiter: "asyncio.Future[None] | None" = None

    def __init__(
        self, connection: ResponseSource | None, method: str, timeouts: TimeoutExtension, listener: ResponseListener
    ) -> None:
        self.connection = connection
        self.is_to_head = method == "HEAD"
        self.timeouts = timeouts
        self.listener = listener
        self.pieces: list[bytes] = []

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else self.error or "arriving"
        return f"<UpstreamResponse {self.status or 'awaited'} [{state}]>"

    @cached_property
    def reason(self) -> bytes:
        """The phrase behind the status."""
        return reason_phrase(self.head)

    @cached_property
    def headers(self) -> HeaderList:
        """The headers as they came; white space around values taken off."""
        return pairs_of(self.head)

    @cached_property
    def fields(self) -> Fields:
        """The same by name."""
        return fields_of(self.headers)

    def on_complex_head(self) -> None:
        """Hear that the head is not a plain one, before the parser takes it apart."""

    def on_progress(self) -> None:
        """Let whoever waits for this answer look again."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait_head(self) -> None:
        """Wait until the head is there; raises what the answer has failed with by then, be it behind the head."""
        while self.error is None and not self.is_head_complete:
            self._waiter = self._open_connection().loop.create_future()
            await self._waiter
        if self.error is not None:
            raise self._consume_error(self.error)

    def append(self, piece: bytes) -> None:
        """Hold one piece of body for the reader, who is not woken yet."""
        self.pieces.append(piece)
        self.buffered += len(piece)

    def fail(self, error: Exception) -> None:
        """End the answer with `error`, which the reader gets after what has arrived."""
        if not self.is_complete and self.error is None:
            self.error = error
            self.on_progress()

    def _consume_error(self, error: Exception) -> Exception:
        """Return what the answer has failed with, to be raised. Another takes its place here.

        Once raised, it refers to frames that refer to this answer: only the garbage collector could free them.
        """
        self.error = httpx.ReadError(str(error))
        return error

    def end_early(self) -> None:
        """Take what has come for all there is. What may still come is let go, with its connection."""
        self.close()
        self.is_complete = True
        self.on_progress()

    @property
    def is_ready(self) -> bool:
        """True if `read` would not wait."""
        return self.is_complete or bool(self.pieces)

    def take(self) -> bytes:
        """Return what has arrived of the body since the last time."""
        pieces = self.pieces
        self.buffered = 0
        if len(pieces) == 1:
            return pieces.pop()
        self.pieces = []
        return b"".join(pieces)

    async def read(self) -> tuple[bytes, bool]:
        """Return what has arrived of the body and whether more may follow; raises what the answer failed with."""
        while not self.pieces and not self.is_complete:
            if self.error is not None:
                raise self._consume_error(self.error)
            await self._wait_for_piece()
        body = self.take()
        if self.connection is not None:
            self.connection.resume_reading()
        return body, not self.is_complete

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; what arrived together is yielded together."""
        more = True
        while more:
            body, more = await self.read()
            if body:
                yield body

    def _open_connection(self) -> ResponseSource:
        if self.connection is None:  # it is gone, and with it all that could still come
            raise httpx.ReadError("closed before the answer was complete")
        return self.connection

    async def _wait_for_piece(self) -> None:
        connection = self._open_connection()
        connection.set_alarm("idle")
        self._waiter = connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            connection.alarm.clear()

    def set_apart(self) -> None:
        """Have the connection not counted among the pool's: the answer has no end of its own. Raises OverShare."""
        if self.connection is not None:
            self.connection.set_apart()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """Return the connection after a 101, with what has already come in the new protocol."""
        if self.connection is None or self.status != SWITCHING:
            raise httpx.ReadError("closed before the protocol was switched")
        return self.connection.hand_over(), self.leftover

    async def aclose(self) -> None:
        """Let go of the answer; see `close`."""
        self.close()

    def close(self) -> None:
        """Let go of the answer. If it has not fully arrived, its connection is closed."""
        if self.connection is not None:
            self.connection.abandon(self)


class LeanResponse(httpx.Response):
    """A response whose headers stay byte pairs until somebody asks for the mapping that httpx makes of them."""

    is_closed = False
    is_stream_consumed = False
    next_request = None
    default_encoding = "utf-8"
    _request = None
    _num_bytes_downloaded = 0

    stream: UpstreamResponse

    def __init__(self, answer: UpstreamResponse) -> None:  # see `LeanRequest`
        self.status_code = answer.status
        self.pairs = answer.headers
        self.stream = answer
        self.extensions = {"reason_phrase": answer.reason, "http_version": b"HTTP/1.1"}
        if answer.status == SWITCHING:
            self.extensions["switched"] = answer
        self.history: list[httpx.Response] = []

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # httpx has an attribute here
        """The headers as httpx has them."""
        return httpx.Headers(self.pairs)
