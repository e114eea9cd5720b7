"""The beginning and the end of an exchange, its request body, and the events of its client."""

import asyncio
import re
from typing import NamedTuple

from api_gateway.errors import BodyTooLarge, ClientDisconnected, GatewayError, InternalError
from api_gateway.exchanges.client_port import Downstream
from api_gateway.exchanges.exchange_body import ExchangeBody
from api_gateway.exchanges.exchange_context import ExchangeContext
from api_gateway.http1.headers import forwardable_trailers
from api_gateway.http1.methods import IDEMPOTENT, KNOWN_METHODS
from api_gateway.models import HeaderList, Outcome
from api_gateway.proxy.admission import RequestPlan, StageResponse
from api_gateway.proxy.attribution import NO_PROGRESS, ClientProgress, outcome_of_abort
from api_gateway.proxy.compression import Coding, Compression, ContentEncoder
from api_gateway.proxy.content_cost import ContentScan
from api_gateway.proxy.exchange import (
    ADMITTING,
    BODY,
    BODY_END,
    BODY_PAUSE,
    BODY_RESUME,
    BREAK,
    CLIENT_GONE,
    COMPLETE,
    CONTINUE,
    DEFECT,
    DRAIN,
    END,
    EXCHANGING,
    FLOWING,
    NONE,
    PAUSED,
    PHASES,
    REFUSE,
    WITHHELD,
    WRITABLE,
    ExchangeEvent,
    IllegalEvent,
    ProxyExchange,
)
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.head_editing import HeadEditor
from api_gateway.proxy.sse import EventBoundaries
from api_gateway.proxy.url_rewriting import UrlRewriter
from api_gateway.transport.response import NO_LIMITS, NO_LISTENER, UpstreamResponse
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt

CLIENT_LEFT = "The client disconnected before the response was complete."
_HAS_KEY = re.compile(rb"\r\n(?i:idempotency-key): [^\r]")  # makes a request repeatable, see `retry.is_repeatable`


class FirstFailure(NamedTuple):
    """The error of the first upstream of a request, before its fallback."""

    error: GatewayError
    upstream: str | None
    target: str | None


class ExchangeLife(ProxyExchange):
    """The life of an exchange: the resources that it holds, its beginning and end, and its request body.

    The exchange holds an attempt and a connection from `send` on. It releases all that it holds when it leaves the
    phase `exchanging`.
    """

    # See `UpstreamResponse` on slots and defaults.
    __slots__ = (
        "_client",
        "_context",
        "attempt",
        "compression",
        "encoder",
        "events",
        "exchange",
        "is_framed",
        "is_pending",
        "is_watched",
        "keep_alive",
        "plan",
        "timer",
        "upload",
    )
    is_handshake = False
    is_relayed = True
    delay: asyncio.TimerHandle | None = None  # before a retry
    probe: asyncio.TimerHandle | None = None  # after which a probe counts as a success while its response streams
    is_sent = True  # a part of the request was written to a connection
    is_repeated = False  # the request is sent once more, because its connection was closed while idle
    cause = ""  # of the retry: a reason or a status
    failure: GatewayError | None = None  # of the last attempt, which is final if no retry is possible after the delay
    last: UpstreamResponse | None = None  # the response of the last attempt, likewise
    tried: tuple[Target, ...] = ()  # the targets of the attempts that have failed
    _last_attempt: Attempt | None = None  # ended, but its result may be final
    first_failure: FirstFailure | None = None  # for which another upstream is asked, as the fallback
    waited_before_head = 0.0  # seconds for which the attempt had waited for the client when the head arrived
    coding: Coding | None = None  # by which a response that the compression concerns is compressed; None: as it is
    scan: ContentScan | None = None  # of the content, from the head on
    task: "asyncio.Task[None] | None" = None  # that opens or awaits a connection

    def __init__(
        self,
        context: ExchangeContext,
        client: Downstream,
        plan: RequestPlan,
        body: bytes,
        trailers: HeaderList | None = None,
    ) -> None:
        """`body` is what has arrived of it. `trailers` is filled before its end, None behind a plain head."""
        self.connection = self.error = self.chunks = self.cost = None
        self.status = self.buffered = self.generation = 0
        self.phase, self.request_body, self.response = ADMITTING, NONE, NONE
        self.is_head_complete = self.is_complete = False
        self.is_framed = False  # the pieces are sent to the client as chunks
        self.is_watched = False  # the content of the response states its cost, or is compressed
        self.is_pending = False  # a question, timer, task or last response may have to be dropped
        self.timeouts = NO_LIMITS
        self.upload: ExchangeBody | None = None  # the request body
        self.timer: asyncio.TimerHandle | None = None  # of the deadline
        self.encoder: ContentEncoder | None = None  # that compresses the content
        self.events: EventBoundaries | None = None  # of an event stream
        self.compression: Compression | None = None  # of the route
        self.exchange = exchange = plan.exchange
        self.is_to_head = exchange.method == "HEAD"
        self.listener = NO_LISTENER
        self.pieces = []
        self.plan = plan
        self.attempt: Attempt | None = None
        self._context = context
        self._client = client
        facts = plan.facts
        self.keep_alive = facts.keep_alive
        if facts.length != 0:
            self.upload = upload = ExchangeBody(client, self, body, facts.length, context)
            if trailers is not None:
                upload.is_parsed, upload.trailer_fields = True, trailers
            self.request_body = COMPLETE if upload.is_complete else FLOWING
            if facts.expectation and not body:
                upload.awaits_continue = True
                self.request_body = WITHHELD

    def __repr__(self) -> str:
        return f"<HttpExchange {self.exchange.method} {self.exchange.path} [{self.states}]>"

    @property
    def is_last(self) -> bool:
        """True if the client has announced that it sends no further request."""
        return not self.plan.facts.keep_alive

    @property
    def is_head_sent(self) -> bool:
        """True once the head of the response has been sent, and with it the `Connection` field."""
        return self.response != NONE

    @property
    def _is_repeatable(self) -> bool:
        """True if the method or an idempotency key makes the request repeatable, see `retry.is_repeatable`."""
        method = self.exchange.method
        return method in IDEMPOTENT or (
            method in KNOWN_METHODS and _HAS_KEY.search(self.plan.headers.received) is not None
        )

    def trailers_for_client(self) -> HeaderList:
        """Return the trailers that are forwarded."""
        trailers = forwardable_trailers(self.trailers, self._context.headers.protected)
        editor = self._editor()
        return trailers if editor is None else editor.later_fields(trailers)

    def _editor(self) -> HeadEditor | UrlRewriter | None:
        """Return the editor of header fields on the route of the request."""
        return None if self.plan.route is None else self.plan.route.url_rewriter

    def _may(self, event: ExchangeEvent) -> bool:
        """Apply an event of a port, and return True; if the states do not allow it, abort, and return False."""
        try:
            self.move(event)
        except IllegalEvent as error:
            if self.is_strict:
                raise
            self._context.record.note_illegal_event(self.exchange, self.phase, event, error)
            if DEFECT in PHASES[self.phase]:
                self.move(DEFECT)
                note_failure(self.exchange, InternalError("The gateway failed: an event is not allowed."))
                self._abort()
            return False
        return True

    def _begin(self) -> None:
        """Take the connection of the client, and receive the rest of the body. Idempotent."""
        self._client.begin_exchange(self)
        if self.upload is not None and not self.upload.is_complete:
            self._client.receive_body(self.upload, 0 if self.upload.is_parsed else self.upload.left or 0)

    def _refuse(self, error: GatewayError | StageResponse) -> None:
        """Respond with problem details."""
        self.move(REFUSE)
        context = self._context
        self._end_persistence_if_withheld()
        response, keep_alive = context.refusal(self.plan, error, keep_alive=self.keep_alive)
        self._client.transport.write(response)
        self._end(context.clock(), Outcome.IGNORED, keep_alive=keep_alive)

    def _end_persistence_if_withheld(self) -> None:
        """Do not reuse a connection whose client waits for 100 (Continue): it may send the body or not."""
        if self.upload is not None and self.upload.awaits_continue:
            self.keep_alive = False

    def _forget(self) -> None:
        """Return to the state of a response of which nothing has arrived."""
        self.forget()
        self.is_relayed, self.is_framed, self.encoder = True, False, None
        self.is_sent, self.is_repeated = True, False
        self.waited_before_head = 0.0

    # The request body

    def _pace_body(self, upload: ExchangeBody) -> None:
        """Read the body from the client as the upstream takes it."""
        if upload.is_full:
            if self.request_body == FLOWING:
                self.move(BODY_PAUSE)
                self._client.pause_reading()
        elif self.request_body == PAUSED:
            self.move(BODY_RESUME)
            self._client.resume_reading()

    def on_body_piece(self, piece: bytes) -> bool:
        """Send a piece of the body, or keep it until there is a connection; return True to pause reading."""
        upload = self.upload
        if upload is None or not self._may(BODY):
            return False
        upload.take(piece)
        if upload.is_too_large:
            self.on_refused(body_too_large(upload.limit))
            return False
        if self.phase == EXCHANGING:
            self.exchange.bytes_in = upload.received
        self._pace_body(upload)
        return False

    def on_body_too_large(self) -> None:
        """Refuse a body that will be larger than the limit."""
        upload = self.upload
        if upload is not None and self._may(BODY):
            self.on_refused(body_too_large(upload.limit))

    def on_body_end(self) -> None:
        """Let the upstream respond: the body is complete."""
        if self.upload is not None and self._may(BODY_END):
            self.upload.complete()

    def on_continue(self) -> None:
        """Await the body: the upstream has asked for it by 100 (Continue)."""
        self._may(CONTINUE)

    def on_upload_writable(self) -> None:
        """Read the body again: the upstream has read enough of it."""
        if self.upload is not None:
            self._pace_body(self.upload)

    def _client_progress(self) -> ClientProgress:
        """Return the client's part in the attempt so far."""
        progress = NO_PROGRESS if self.upload is None else self.upload.progress
        return progress._replace(waited=progress.waited + self.reader_waited)

    def _note_progress(self, upload: ExchangeBody) -> ClientProgress:
        """Return the client's part before the head; move `sent_at` by the time for which the client was awaited."""
        progress, exchange = upload.progress, self.exchange
        self.waited_before_head = progress.waited
        if progress.waited and exchange.sent_at is not None:
            exchange.sent_at += progress.waited
        return progress

    # From the client

    def on_writable(self) -> None:
        """Read from the upstream again: the client has read enough."""
        if self._may(WRITABLE) and self.connection is not None:
            self.connection.resume_reading()
            self.connection.set_timer("read" if self.response == NONE else "idle")

    def on_drain(self) -> None:
        """End an event stream between two events: the server stops, and the client connects again by itself."""
        if self.events is None or not self.events.is_between or self.phase != EXCHANGING or self.response == NONE:
            return
        self.close()
        rest = b"" if self.encoder is None else self.encoder.end()
        if self.is_framed:
            self._client.transport.write((b"%x\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n")
        elif rest:
            self._client.transport.write(rest)
        self.move(END)
        self._end(self._context.clock(), Outcome.SUCCESS, keep_alive=self.keep_alive)

    def on_client_disconnected(self) -> None:
        """Abort the exchange: its client has disconnected."""
        if self._may(CLIENT_GONE):
            note_failure(self.exchange, ClientDisconnected(CLIENT_LEFT))
            self._abort()

    def on_refused(self, error: GatewayError) -> None:
        """Respond with an error of the client's connection, or abort the exchange if the response has begun."""
        self.keep_alive = False
        if self.response != NONE:
            self.move(BREAK)
            note_failure(self.exchange, error)
            self._abort()
            return
        if self.phase == EXCHANGING:
            self.exchange.has_begun = self.exchange.has_reached = True
        self.close()
        self._refuse(error)

    def on_defect(self, error: Exception) -> None:
        """Log a failure of what serves the exchange, and respond with 500, or abort a response that has begun."""
        self.on_refused(self._context.record.internal_error(self.exchange, error))

    def on_forced_close(self) -> None:
        """Abort the exchange: the drain timeout has passed."""
        if self._may(DRAIN):
            self._context.record.note_cut_off(self.exchange)
            self._abort()

    # The end

    def _abort(self) -> None:
        """Close the upstream connection and end the exchange."""
        self.close()
        outcome = outcome_of_abort(has_head=self.exchange.head_at is not None)
        self._end(self._context.clock(), outcome, keep_alive=False)

    def _end(self, now: float, outcome: Outcome, *, keep_alive: bool) -> None:
        """Release the resources of the exchange, and record it.

        Its upstream connection is already returned or closed.
        """
        if self.is_pending:
            self._invalidate()
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            if attempt.slow is not None or attempt.is_probe:  # which may open or close a breaker
                self._context.router.outcomes.settle(attempt, outcome, now)
            attempt.release(now, outcome)
        if self.upload is not None:
            self.upload.release()
        self._client.end_exchange(keep_alive=keep_alive)
        self._context.record.end(self.exchange, now)

    def _invalidate(self) -> None:
        """Cancel timers and task, discard the last response, and have replies that are still to come dropped."""
        self.generation += 1
        self.first_failure = None
        for timer in (self.delay, self.probe, self.timer):
            if timer is not None:
                timer.cancel()
        self.delay = self.probe = self.timer = None
        self.failure = None
        if self.scan is not None:
            self.scan.end(is_complete=False)
        if self.last is not None:
            self.last.close()
            self.last = None
        if self.task is not None:
            self.task.cancel()
            self.task = None


def body_too_large(limit: int) -> BodyTooLarge:
    """Return the error for a body above `limit` bytes; it closes the connection, because the rest is not read."""
    return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})
