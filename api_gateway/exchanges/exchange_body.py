"""The request body of one exchange: what has arrived of it, what is kept for another attempt, and where it goes.

A client's connection gives it the pieces in the order of their arrival. Without a connection to the upstream, while
the exchange waits, connects or backs off, all pieces are kept, and reading from the client pauses at a limit. An
attempt sends the kept beginning first, then each piece as it arrives; reading then pauses while the upstream reads
more slowly than the client sends. A beginning that has been sent is kept for another attempt up to the limit of the
retry policy.

The body of the upstream's request has the same framing as the client's, by Content-Length or in chunks, but chunks
of its own: a chunk for each piece. Trailers follow the last one.

After an early response the rest is discarded, or still sent to the upstream within the limits of its connection.
"""

from typing import Protocol

from api_gateway.exchanges.client_port import Downstream
from api_gateway.exchanges.exchange_context import ExchangeContext
from api_gateway.exchanges.response_head import interim_response
from api_gateway.http1.headers import forwardable_trailers
from api_gateway.models import HeaderList
from api_gateway.proxy.attribution import ClientProgress
from api_gateway.proxy.head_editing import HeadEditor
from api_gateway.proxy.url_rewriting import UrlRewriter
from api_gateway.transport.upstream_call import UpstreamCall

_HIGH_WATER = 65_536  # bytes kept without a connection before reading pauses, unless the retry policy keeps more
_CONTINUE = 100


class BodyOwner(Protocol):
    """The exchange of a body, which decides what happens to it."""

    def on_body_piece(self, piece: bytes) -> bool:
        """Take a piece that has arrived; return True if reading from the client shall be paused."""
        ...

    def on_body_too_large(self) -> None:
        """Note that the body will be larger than its limit."""
        ...

    def on_body_end(self) -> None:
        """Note that the body is complete."""
        ...

    def on_continue(self) -> None:
        """Note that the upstream has sent 100 (Continue)."""
        ...

    def on_upload_writable(self) -> None:
        """Note that the upstream reads on."""
        ...


class ExchangeBody:
    """The body of one request: the `BodyReceiver` of the client's connection, and the `ResponseListener` of attempts.

    States: arriving (with `owner`: for the exchange; without: its response is complete), complete (`is_complete`). It
    may be combined with a connection of the upstream, and with `is_replayable`: everything that has arrived is kept.
    """

    # Initial values are class attributes, which makes it cheaper to create a body.
    is_replayable = True
    _keep = 0  # bytes that have been sent and are kept for another attempt
    _is_framed = False  # the current attempt gets it in chunks
    _waited = 0.0  # seconds, for the pieces that have arrived in this attempt
    _awaited_since: float | None = None  # loop time since which the upstream has waited for the next piece
    is_parsed = False  # the general parser reads it
    trailer_fields: HeaderList = []  # noqa: RUF012 - of a body that is parsed, and filled before its end
    # See `BodyReceiver`
    awaits_continue = False
    body_rate: float | None = None
    body_due: float | None = None
    body_credit = 0.0
    is_started = False
    is_response_complete = False
    is_body_continued = False
    # See `ResponseListener`
    expects_continue = False
    upgrade = False

    def __init__(
        self, client: Downstream, owner: BodyOwner, first: bytes, length: int | None, context: ExchangeContext
    ) -> None:
        """`first` is what has arrived with the head, `length` the bytes of the whole body, None if it is chunked."""
        self._client = client
        self._context = context
        # Defaults of these types in the class would be dropped by mypyc.
        self._connection: UpstreamCall | None = None
        self.editor: HeadEditor | UrlRewriter | None = None  # of the route, for the trailers
        self._pieces = [first] if first else []
        self.received = len(first)  # bytes
        self.length = length  # bytes; None: it is chunked
        self.limit = context.router.max_body_bytes  # maximum size in bytes; replaced by that of the route
        self.is_complete = self.received == length
        self._owner = None if self.is_complete else owner  # the exchange, while pieces of the body may be for it

    def __repr__(self) -> str:
        state = "complete" if self.is_complete else "arriving" if self._owner is not None else "discarded"
        return f"<ExchangeBody [{state}, {self.received} bytes]>"

    # Called by the exchange

    def keep(self, size: int) -> None:
        """Keep up to `size` bytes of what has been sent for another attempt."""
        self._keep = size

    @property
    def left(self) -> int | None:
        """The number of bytes that have not arrived; None if it is unknown."""
        return None if self.length is None else self.length - self.received

    @property
    def is_too_large(self) -> bool:
        """True if the body is larger than `limit`. One behind a plain head is not: the parser reads those."""
        return self.is_parsed and (self.received if self.length is None else self.length) > self.limit

    def held(self) -> list[bytes]:
        """Return a copy of the list of pieces that are kept: before the first attempt, all that have arrived."""
        return [*self._pieces]

    def exceeds(self, limit: int | None) -> bool:
        """Apply the limit of the route, None if that has none; return whether the body is larger."""
        if limit is not None:
            self.limit = limit
        return self.is_too_large

    @property
    def is_full(self) -> bool:
        """True if reading from the client shall pause."""
        if self._connection is not None:
            return self._connection.is_write_paused
        return self.received >= max(self._keep, _HIGH_WATER)

    @property
    def is_prompt(self) -> bool:
        """True if the client has sent everything and was not awaited in the current attempt."""
        return self.is_complete and not self._waited

    @property
    def progress(self) -> ClientProgress:
        """The client's part in the current attempt: whether it has sent all, and how long it was awaited."""
        since = self._awaited_since
        waited = self._waited if since is None else self._waited + self._client.loop.time() - since
        return ClientProgress(self.is_complete, since is not None, waited)

    def begin(self, connection: UpstreamCall) -> list[bytes]:
        """Return the pieces that an attempt on `connection` sends with its head; later ones are sent at once."""
        self._is_framed = self.length is None and connection.abilities.trailers
        pieces = self._chunks() if self._is_framed else self._pieces
        if self.received > self._keep:
            self._pieces, self.is_replayable = [], False
        if self._waited or self._awaited_since is not None:
            self._waited, self._awaited_since = 0.0, None
        if not self.is_complete:
            self._connection = connection
            self.expects_continue = self.awaits_continue
            self._awaited_since = self._client.loop.time()
        return pieces

    def _chunks(self) -> list[bytes]:
        """Return the kept pieces as one chunk, with the end of the body if that has arrived."""
        content = b"".join(self._pieces)
        pieces = [_chunk(content)] if content else []
        return [*pieces, self._end()] if self.is_complete else pieces

    def _end(self) -> bytes:
        """Return the end of the body: nothing, or the last chunk with the trailers that are forwarded."""
        if not self._is_framed:
            return b""
        trailers = self.trailer_fields and forwardable_trailers(
            self.trailer_fields, self._context.headers.never_trailing
        )
        if self.editor is not None:
            trailers = self.editor.request_trailers(trailers)
        return b"0\r\n%b\r\n" % b"".join([b"%b: %b\r\n" % pair for pair in trailers])

    def end_attempt(self) -> None:
        """Keep what arrives from now on for the next attempt."""
        self._connection = None

    def take(self, piece: bytes) -> None:
        """Send a piece, or keep it until there is a connection."""
        self.received += len(piece)
        connection = self._connection
        if connection is None:
            self._pieces.append(piece)
            return
        if self.received <= self._keep:
            self._pieces.append(piece)
        elif self.is_replayable:
            self._pieces, self.is_replayable = [], False
        self._end_wait()
        connection.send_piece(_chunk(piece) if self._is_framed else piece)
        if not connection.is_write_paused:
            self._awaited_since = self._client.loop.time()

    def complete(self) -> None:
        """Note that everything has arrived, and let the upstream respond."""
        self.is_complete = True
        self._end_wait()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.end_body(self._end())

    def release(self) -> None:
        """Discard the rest, because the response is complete, unless the upstream still gets it."""
        if self._owner is None:
            return
        self._owner = None
        self.is_response_complete = True
        self._pieces = []
        if not self.is_body_continued:
            self._connection = None
            if not self.is_complete:
                self._client.resume_reading()

    def _end_wait(self) -> None:
        if self._awaited_since is not None:
            self._waited += self._client.loop.time() - self._awaited_since
            self._awaited_since = None

    # Called by the client's connection: see `BodyReceiver`

    def feed(self, piece: bytes) -> bool:
        """Take a piece from the client."""
        self.awaits_continue = False
        if self._owner is not None:
            return self._owner.on_body_piece(piece)
        if self._connection is not None:
            self._connection.send_piece(_chunk(piece) if self._is_framed else piece)
        return self._connection is not None and self._connection.is_write_paused

    def announce(self, size: int) -> None:
        """Note that at least `size` more bytes follow."""
        if self._owner is not None and self.received + size > self.limit:
            self._owner.on_body_too_large()

    def end_body(self) -> None:
        """Note the end of the body."""
        if self._owner is not None:
            self._owner.on_body_end()
        else:
            self.is_body_continued = False
            self.complete()
            self._client.resume_reading()

    def disconnect(self) -> None:
        """Close the connection that still gets the rest of the body."""
        self.discard_body()

    # Called by the client's connection and by the upstream's

    def discard_body(self) -> None:
        """Stop sending the body: no more of it is parsed, or the upstream's connection is closed."""
        if self._owner is not None:
            return
        self.is_body_continued = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._client.resume_reading()

    # Called by the upstream's connection: see `ResponseListener`

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Forward an interim response."""
        if self._owner is None or self.is_started:
            return
        if status == _CONTINUE:
            self.awaits_continue = False
            self._owner.on_continue()
        self._client.transport.write(interim_response(status, reason, headers, self._context, self.editor))

    def send_continue(self) -> None:
        """Ask the client for the body, for an upstream whose interim responses are not reported."""
        self.on_interim(_CONTINUE, b"Continue", [])

    def continue_body(self) -> None:
        """Send the rest of the body after the response is complete."""
        self.is_body_continued = True

    def on_writable(self) -> None:
        """Read from the client again: the upstream reads on."""
        if self._connection is not None and not self.is_complete:
            self._awaited_since = self._client.loop.time()
        if self._owner is not None:
            self._owner.on_upload_writable()
        else:
            self._client.resume_reading()


def _chunk(piece: bytes) -> bytes:
    """Return a piece of a body as a chunk."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)
