"""The relaying half of an exchange: the response, from its head to its end."""

from functools import partial

import httpx

from api_gateway.errors import GatewayError
from api_gateway.exchanges.client_port import Downstream
from api_gateway.exchanges.exchange_context import ExchangeContext
from api_gateway.exchanges.exchange_life import ExchangeLife
from api_gateway.exchanges.response_head import interim_response, parsed_head, plain_head
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import (
    BODILESS,
    COST,
    FALLBACK,
    fields_of,
)
from api_gateway.models import HeaderList, Outcome
from api_gateway.proxy.attribution import NO_PROGRESS
from api_gateway.proxy.compression import NOT_MODIFIED, VARIES, Coding, Compression
from api_gateway.proxy.exchange import (
    BREAK,
    COMPLETE,
    DATA,
    DONE,
    END,
    EXCHANGING,
    FLOWING,
    NONE,
    PAUSED,
)
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.head_editing import HeadEditor, ResponseEditor
from api_gateway.proxy.sse import EventBoundaries, is_event_stream
from api_gateway.proxy.url_rewriting import NO_AUTHORITIES, Authorities, UrlRewriter
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.response import NoListener, ResponseSource
from api_gateway.upstreams.upstream import Attempt

_MIN_RETRIED_STATUS = 429  # the lowest status that a retry policy can name
_MAX_JOINED = 65_536  # bytes of a body that are copied to write them together with the head


class RelayingExchange(ExchangeLife):
    """Forwards the response of an attempt. Subclasses decide what follows a failure."""

    def _retries(self, attempt: Attempt, now: float) -> bool:
        """Prepare a retry after a response with a status that is retried; return False if it is denied."""
        raise NotImplementedError

    def _fail(self, error: Exception) -> None:
        """End an attempt without a response; retry, fall back, or respond with its error."""
        raise NotImplementedError

    def _after(self, error: GatewayError) -> GatewayError | None:
        """Respond by the fallback of the route; return the error to respond with if there is none that applies."""
        raise NotImplementedError

    def takes_chunks(self, status: int) -> bool:
        """Take plain chunks with their framing, except of a response that may be followed by another attempt."""
        if self.is_watched or not self._client.abilities.framing:
            return False
        return status < _MIN_RETRIED_STATUS or not self._is_retried(status)

    def on_complex_head(self) -> None:
        """Forward interim responses, and take no more than READ_SIZE at once: the parser's callbacks take time."""
        if self.upload is None or self.upload.is_complete:
            self.listener = InterimListener(self._client, self._context, self._editor())
        self.is_relayed = False

    def on_complex_chunk(self) -> None:
        """Send the further pieces in chunks of their own, see `on_complex_head`."""
        self.chunks, self.is_framed, self.is_relayed = None, True, False

    def on_progress(self) -> None:  # noqa: C901, PLR0912 - a call less for each response
        """Forward what has arrived of the response."""
        if self.phase != EXCHANGING:
            self._may(DATA)
            return
        is_first = self.response == NONE
        if self.error is not None:
            if self.pieces and not is_first:
                self._client.transport.write(self._take_piece())
            self._on_error(self.error)
            return
        now = self._context.clock()
        if not is_first:
            self._client.transport.write(self._take_piece())
        elif not self.is_head_complete:
            return
        else:
            attempt = self.attempt
            assert attempt is not None  # noqa: S101 - set before sending
            upload = self.upload
            client = NO_PROGRESS if upload is None or upload.is_prompt else self._note_progress(upload)
            self._context.router.outcomes.on_head(self.exchange, attempt, self.status, now, client)
            if self.status >= _MIN_RETRIED_STATUS and self._is_retried(self.status) and self._retries(attempt, now):
                return
            if not self.head and is_event_stream(self.fields) and not self._begin_stream(attempt):
                return
            if not self._write_head(attempt):
                return
            if not self.is_complete and attempt.is_probe:
                self.is_pending = True
                self.probe = self._context.router.settle_probe_soon(attempt, self._client.loop)
        if self.is_complete:
            if self.upload is None or self.upload.is_complete:
                self.phase, self.response = DONE, COMPLETE
            else:
                self.response = FLOWING
                self.move(END)
            self._end(now, Outcome.SUCCESS, keep_alive=self.keep_alive)
        else:
            self._receive_more()
            if self.events is not None and self._client.is_draining:
                self.on_drain()

    def _begin_stream(self, attempt: Attempt) -> bool:
        """Settle an attempt with an event stream; return False if there is no place for it."""
        if not self._leave_pool(attempt):
            return False
        if b"content-encoding" not in self.fields:  # a coding hides the boundaries of events
            self.events = EventBoundaries()
        return True

    def _leave_pool(self, attempt: Attempt) -> bool:
        """Settle an attempt with a tunnel or an event stream, because its end shows nothing about the upstream.

        Its connection is counted apart from those of requests. Return False if the principal's share is used up.
        """
        self._context.router.outcomes.settle_success(attempt)
        try:
            self.move_to_tunnels()
        except httpx.PoolTimeout as error:
            self._refuse_stream(attempt, error)
            return False
        if self.connection is None or self.connection.abilities.upgrade:
            attempt.release_slot()
        return True

    def _refuse_stream(self, attempt: Attempt, error: httpx.TransportError) -> None:
        """Respond with an error; the charge is kept, because the upstream has served the request."""
        self.exchange.has_reached = True
        failure = translate(error, attempt.upstream.name)
        failure.__cause__ = error.with_traceback(None)
        self.close()
        final = self._after(failure)
        if final is not None:
            self._refuse(final)

    def _receive_more(self) -> None:
        """Receive more of the response as soon as the client reads."""
        connection = self.connection
        assert connection is not None  # noqa: S101 - an incomplete response without a connection has failed
        if self._client.is_write_paused:
            self.response = PAUSED
            connection.pause_reading()
            connection.timer.clear()
        elif self.is_watched:  # reading or compressing the content takes time: others are served before the next piece
            self.response = FLOWING
            connection.pause_reading()
            self._client.loop.call_soon(self._read_on, connection)
            connection.set_timer("idle")
        else:
            self.response = FLOWING
            connection.resume_reading()  # a large read pauses it
            connection.set_timer("idle")

    def _read_on(self, connection: ResponseSource) -> None:
        if self.connection is connection and self.response == FLOWING:
            connection.resume_reading()

    def _go_on(self, now: float) -> None:
        """Forward the rest of a response whose head was sent later than it arrived.

        It was delayed by a hook, or by a retry that turned out to be impossible.
        """
        attempt = self.attempt
        self.response = FLOWING
        if self.error is not None:
            self._on_error(self.error)
        elif self.is_complete:
            self.move(END)
            self._end(now, Outcome.SUCCESS, keep_alive=self.keep_alive)
        else:
            if attempt is not None and attempt.is_probe:
                self.is_pending = True
                self.probe = self._context.router.settle_probe_soon(attempt, self._client.loop)
            self._receive_more()
            if self.events is not None and self._client.is_draining:
                self.on_drain()

    def _write_head(self, attempt: Attempt) -> bool:  # noqa: C901, PLR0912 - a call less for each response
        """Send the head and what has arrived of the body, and return True; False if that happens later, or never."""
        context, exchange, route = self._context, self.exchange, self.plan.route
        exchange.status, exchange.source = self.status, "upstream"
        if self.upload is not None:
            self.upload.is_started = True
            self._end_persistence_if_withheld()
        rewriter: ResponseEditor | None = None
        authorities = NO_AUTHORITIES
        if route is not None and route.url_rewriter is not None:
            rewriter = route.url_rewriter.bound(exchange, self.plan.raw_target)
            if route.url_rewriter.needs_authorities:
                upstream_client = context.router.upstream_clients[attempt.upstream.name]
                authorities = Authorities.of(upstream_client, self.plan.facts.host_field)
        if self.compression is not None:
            self._begin_compression(self.compression)
        if self.head:
            if self.cost is not None:
                context.router.on_cost(exchange, (self.cost,))
            is_chunked = self.chunks is not None or self.is_framed
            head = plain_head(
                self, exchange, context, rewriter, authorities, is_chunked=is_chunked, keep_alive=self.keep_alive
            )
        else:
            if COST in self.fields:
                context.router.on_cost(exchange, self.fields[COST])
            is_counted = self.is_counted
            if self.compression is not None:  # the head may be another one than the parser has parsed
                is_counted = b"content-length" in self.fields and b"transfer-encoding" not in self.fields
            self.is_framed = self._client.abilities.framing and not (
                self.is_to_head or self.status in BODILESS or is_counted
            )
            head = parsed_head(
                self, exchange, context, rewriter, authorities, is_chunked=self.is_framed, keep_alive=self.keep_alive
            )
        if self.is_watched and COST not in self.fields:
            self._begin_scan()
        if exchange.fallback is not None:
            head = b"%b%b: %b\r\n\r\n" % (head[:-2], FALLBACK, exchange.fallback.encode())
        if self.is_framed or self.chunks is not None or self.is_watched:
            piece = self._take_piece()
        else:
            piece = self.take()
            exchange.bytes_out += len(piece)
        if len(piece) > _MAX_JOINED:
            self._client.transport.writelines((head, piece))
        else:
            self._client.transport.write(head + piece)
        return True

    def _begin_compression(self, compression: Compression) -> None:
        """Compress the content of the response if client and response permit it, and change its head."""
        coding = self.coding
        is_concerned = compression.concerns_plain(self.status, self.passed) if self.head else None
        if is_concerned is None:
            self._begin_compression_by_fields(compression)
        elif is_concerned and coding is None:
            self.passed += VARIES
        elif is_concerned and coding is not None:
            self.passed = compression.plain_head(self.passed, coding[0])
            self._encode(coding, flushes=False)  # its length is known, or the parser would have parsed it
            self.is_framed = self._client.abilities.framing and not self.is_to_head

    def _begin_compression_by_fields(self, compression: Compression) -> None:
        headers, coding = self.headers, self.coding
        if self.head:  # extensions change the lines that pass
            headers = pairs_of(self.passed) if self.cost is None else [*pairs_of(self.passed), (COST, self.cost)]
        fields = fields_of(headers)
        if self.status == NOT_MODIFIED:
            self._replace_headers(compression.revalidated(headers, is_accepted=coding is not None))
        elif compression.concerns(self.status, fields):
            self._replace_headers(compression.headers(headers, None if coding is None else coding[0]))
            if coding is not None:
                self._encode(coding, flushes=b"content-length" not in fields)

    def _encode(self, coding: Coding, *, flushes: bool) -> None:
        """Compress what follows of the response, unless it is one without a body."""
        if not self.is_to_head:
            self.encoder = coding[1](flushes)
            self.is_relayed = False  # so that no more is compressed at once than READ_SIZE

    def _replace_headers(self, headers: HeaderList) -> None:
        """Set the header fields, in place of those that the head has."""
        reason = self.reason
        self._headers = headers
        self._fields, self._reason, self.head = None, reason, b""

    def _begin_scan(self) -> None:
        """Read the cost in the content of the response."""
        route = self.plan.route
        if route is not None and route.content_cost is not None:
            on_cost = partial(self._context.router.on_content_cost, self.exchange)
            self.scan = route.content_cost.scan(self.fields, on_cost)
            self.is_relayed = False  # so that no more is scanned at once than READ_SIZE
            self.is_pending = True

    def _take_piece(self) -> bytes:
        """Remove and return what has arrived of the body, framed for the client."""
        piece, exchange = self.take(), self.exchange
        if self.events is not None:
            self.events.follow(piece)
        if self.scan is not None:  # ends before the last piece is sent, so that the next request is later
            self.scan.feed(piece)
            if self.is_complete:
                self.scan.end(is_complete=True)
        if self.encoder is not None:
            piece = self.encoder.encode(piece)
            if self.is_complete:
                piece += self.encoder.end()
        if self.chunks is not None:
            exchange.bytes_out = self.chunks.content
            return piece
        exchange.bytes_out += len(piece)
        if not self.is_framed:
            return piece
        if piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        return piece + self._last_chunk() if self.is_complete else piece

    def _last_chunk(self) -> bytes:
        """Return the last chunk, with the trailers that are forwarded if the client accepts some."""
        if not self.trailers or not self.plan.facts.accepts_trailers:
            return b"0\r\n\r\n"
        return b"0\r\n%b\r\n" % b"".join([b"%b: %b\r\n" % pair for pair in self.trailers_for_client()])

    def _is_retried(self, status: int) -> bool:
        """Return whether the retry policy names the status."""
        upstream = self.exchange.upstream
        assert upstream is not None  # noqa: S101 - the request was sent
        return status in self._context.router.upstream_clients[upstream].retried_statuses

    def _on_error(self, error: Exception) -> None:
        """Retry or respond; if the response has begun, close the connection, so that the client detects the error."""
        if self.response == NONE:
            self._fail(error)
            return
        self.move(BREAK)
        attempt = self.attempt or self._last_attempt
        assert attempt is not None  # noqa: S101 - set before sending
        failure = self._context.router.outcomes.on_broken_body(self.exchange, attempt, error, self._client_progress())
        note_failure(self.exchange, failure)
        self._end(self._context.clock(), Outcome.IGNORED, keep_alive=False)  # the attempt is settled already


class InterimListener(NoListener):
    """Forwards interim responses. `upgrade`: the request asks for a switch of protocols."""

    def __init__(
        self,
        client: Downstream,
        context: ExchangeContext,
        editor: HeadEditor | UrlRewriter | None,
        *,
        upgrade: bool = False,
    ) -> None:
        self.upgrade = upgrade
        self._client = client
        self._context = context
        self._editor = editor

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ResponseListener`."""
        self._client.transport.write(interim_response(status, reason, headers, self._context, self._editor))
