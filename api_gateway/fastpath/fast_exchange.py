"""One request on the fast path, from its admission to the end of its response.

The module is long because it has the actions of one state machine, whose tables are in `proxy.exchange`.
"""

import asyncio
import re
from collections.abc import Awaitable
from functools import partial
from typing import Any

import httpx

from api_gateway.errors import ClientDisconnected, GatewayError, InternalError, Unavailable, UpstreamFailed
from api_gateway.fastpath.client_port import Downstream
from api_gateway.fastpath.context import ExchangeContext
from api_gateway.fastpath.exchange_body import ExchangeBody
from api_gateway.fastpath.response_head import parsed_head, plain_head, static_response
from api_gateway.http1.asgi import FIELDS, ASGIApp, Receive, Scope, Send
from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import (
    BODILESS,
    COST,
    FALLBACK,
    REQUEST_TIMEOUT,
    fields_of,
    forwardable_interim,
)
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.http1.serializer import render_response_head
from api_gateway.middleware import EXCHANGE, ExchangeMiddleware
from api_gateway.models import NANOSECONDS, Exchange, HeaderList, Outcome
from api_gateway.proxy.admission import DirectResponse, RequestPlan, Wait
from api_gateway.proxy.attribution import NO_PROGRESS, ClientProgress, outcome_of_abort
from api_gateway.proxy.client_disconnect import CLIENT_LEFT
from api_gateway.proxy.deadline import Deadline, deadline_error
from api_gateway.proxy.exchange import (
    ASK,
    BODY,
    BODY_END,
    BODY_PAUSE,
    BODY_RESUME,
    BREAK,
    CLIENT_GONE,
    COMPLETE,
    CONNECT,
    CONTINUE,
    DATA,
    DEFECT,
    DONE,
    DRAIN,
    END,
    EXCHANGING,
    FALL_BACK,
    FINAL,
    FLOWING,
    HAND_OVER,
    NONE,
    PAUSED,
    PHASES,
    REFUSE,
    REPLY,
    RESUME,
    RETRY,
    SELECT,
    SELECTING,
    WRITABLE,
    ExchangeEvent,
    IllegalEvent,
    ProxyExchange,
)
from api_gateway.proxy.failure_record import note_failure, note_shed
from api_gateway.proxy.fallback import Fallback, add_failure, applies
from api_gateway.proxy.header_facts import RewrittenHeaders
from api_gateway.proxy.route_table import Route
from api_gateway.proxy.sse import EventBoundaries, is_event_stream
from api_gateway.proxy.url_rewriting import NO_AUTHORITIES, Authorities
from api_gateway.resilience.retry import RetryDenied, retry_after_of
from api_gateway.transport.connection import StaleConnection, UpstreamConnection
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.response import NO_LISTENER, NoListener, UpstreamResponse
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

_HAS_KEY = re.compile(rb"\r\n(?i:idempotency-key): ")  # makes any request repeatable, see `retry.is_repeatable`
_MIN_RETRIED_STATUS = 429  # the lowest status that a retry policy can name
_MAX_JOINED = 65_536  # bytes of a body that are copied to write them together with the head
_MAX_COPIED = 16_384  # bytes of a request body for which copying is cheaper than a write of several pieces


class FastExchange(ProxyExchange):
    """One request on the fast path, and the response to it: the actions that belong to the tables of `proxy.exchange`.

    The exchange holds an attempt and a connection from `send` on. It gives all that it holds to the ASGI path, or
    returns it, when it leaves the phase `exchanging`.
    """

    is_relayed = True
    is_framed = False  # the pieces are sent to the client as chunks
    timer: asyncio.TimerHandle | None = None  # of the deadline
    delay: asyncio.TimerHandle | None = None  # before a retry
    probe: asyncio.TimerHandle | None = None  # after which a probe counts as a success while its response streams
    is_sent = True  # a part of the request was written to a connection
    is_repeated = False  # the request is sent once more, as its connection was closed while idle
    is_pending = False  # a question, timer, task or last response may have to be dropped
    cause = ""  # of the retry: a reason or a status
    failure: GatewayError | None = None  # of the last attempt, which is final if no retry is possible after the delay
    last: UpstreamResponse | None = None  # the response of the last attempt, likewise
    tried: tuple[Target, ...] = ()  # the targets of the attempts that have failed
    upload: ExchangeBody | None = None  # the request body
    first_failure: GatewayError | None = None  # the error for which another upstream is asked, as the fallback
    failed_upstream: str | None = None  # the upstream that has failed with it
    failed_target: str | None = None
    waited_before_head = 0.0  # seconds for which the attempt had waited for the client when the head arrived
    events: EventBoundaries | None = None  # of an event stream
    task: "asyncio.Task[None] | None" = None  # that opens or awaits a connection

    def __init__(
        self, context: ExchangeContext, client: Downstream, headers: RewrittenHeaders, plan: RequestPlan, body: bytes
    ) -> None:
        self.connection = self.error = None
        self.exchange = exchange = plan.exchange
        self.is_to_head = exchange.method == "HEAD"
        self.listener = NO_LISTENER
        self.pieces = []
        self.plan = plan
        self.attempt: Attempt | None = None
        self._last_attempt: Attempt | None = None  # ended, but its result may be final
        self._context = context
        self._client = client
        self._request_headers = headers
        self.keep_alive = headers.facts.keep_alive
        if headers.facts.length:
            self.upload = upload = ExchangeBody(client, self, body, headers.facts.length, context.via)
            self.request_body = COMPLETE if upload.is_complete else FLOWING

    def __repr__(self) -> str:
        return f"<FastExchange {self.exchange.method} {self.exchange.path} [{self.states}]>"

    @property
    def is_head_sent(self) -> bool:
        """True once the head of the response has been sent, and with it the `Connection` field."""
        return self.response != NONE

    def _may(self, event: ExchangeEvent) -> bool:
        """Change the states by an event of a port, and return True; abort the exchange if they do not allow it."""
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

    # Towards the upstream

    def wait(self, question: Wait) -> None:
        """Ask a question of admission, and continue when the reply arrives."""
        self._begin()
        self._ask(question)

    def refuse(self, error: GatewayError | DirectResponse) -> None:
        """Refuse the request, whose body is incomplete."""
        self._begin()
        self._refuse(error)

    def _begin(self) -> None:
        """Take the connection of the client, and receive the rest of the body. Idempotent."""
        self._client.begin_exchange(self)
        if self.upload is not None and not self.upload.is_complete:
            self._client.receive_body(self.upload, self.upload.length - self.upload.received)

    def _ask(self, question: Wait) -> None:
        self.move(ASK)
        self.is_pending = True
        question.ask(partial(self._on_reply, question, self.generation))

    def _on_reply(self, question: Wait, generation: int, reply: Any) -> None:
        if generation != self.generation:  # the exchange has ended meanwhile, or the question has a reply
            return
        self.generation += 1
        if not self._may(REPLY):
            return
        context = self._context
        try:
            result = context.admission.resume(self.plan, question, reply, context.clock_ns())
        except Exception as error:  # noqa: BLE001 - as in `FastPath.try_handle`
            result = context.record.internal_error(self.exchange, error)
        if isinstance(result, Wait):
            self._ask(result)
            return
        if result is None:
            result = self.forward()
        if result is not None:
            self._refuse(result)

    def _refuse(self, error: GatewayError | DirectResponse) -> None:
        """Respond with problem details."""
        self.move(REFUSE)
        context = self._context
        if self.upload is not None and self.upload.awaits_continue:
            self.keep_alive = False  # the client may send the body or not
        response, keep_alive = context.refusal(self.plan, error, keep_alive=self.keep_alive)
        self._client.transport.write(response)
        self._end(context.clock(), Outcome.IGNORED, keep_alive=keep_alive)

    def forward(self) -> GatewayError | None:
        """Send an admitted request, on an idle connection if there is one; hand over what the fast path cannot do.

        Returns the error with which the gateway responds: the upstream refuses the request, or its deadline is over.
        """
        self.phase = SELECTING
        plan = self.plan
        route, router = plan.route, self._context.router
        assert route is not None  # noqa: S101 - the request is admitted
        upstream_client = router.upstream_clients[route.upstream]
        exchange, now, deadline = self.exchange, plan.now_ns / NANOSECONDS, plan.deadline
        key = exchange.client_key
        if not upstream_client.is_simple:
            if not upstream_client.is_native:
                self._hand_over()
                return None
            key = self._key(upstream_client)
        exchange.upstream = route.upstream
        upstream_client.retries.budget.deposit(exchange.started)
        if deadline is not None and deadline.at <= now:
            return self._after(deadline_error(exchange, deadline))
        is_safe = self._is_repeatable
        try:
            self.attempt = attempt = upstream_client.upstream.acquire(
                now, key, priority=plan.priority, is_safe=is_safe, principal=plan.principal
            )
        except Unavailable as error:
            return self._after(error.with_traceback(None))
        self.timeouts = upstream_client.limits
        upload = self.upload
        if upload is None:
            self._client.begin_exchange(self)
        else:
            if is_safe:
                upload.keep(upstream_client.retries.policy.max_body_bytes)
            if upload.is_complete:
                self._client.begin_exchange(self)
            else:
                self._expect_body(upload, route)
        if deadline is not None:
            self._limit_time(deadline, now)
        self._start(upstream_client, attempt, now)
        return None

    def _key(self, upstream_client: UpstreamClient) -> str:
        """Return the key for load balancing."""
        if upstream_client.hash_header is None:
            return self.exchange.client_key
        return upstream_client.hash_key(fields_of(pairs_of(self._request_headers.received)), self.exchange)

    def _limit_time(self, deadline: Deadline, now: float) -> None:
        """Start the timer of the deadline."""
        self.timer = self._client.loop.call_later(deadline.at - now, self._on_deadline, self.generation)
        self.is_pending = True

    def _start(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        """Begin an attempt: send the request on an idle connection, or open one."""
        exchange = self.exchange
        exchange.target, exchange.sent_at = attempt.target.url, now
        exchange.attempts += 1
        connection = upstream_client.idle_connection(attempt.target, self.plan.principal)
        if connection is None:
            self._begin_to_connect(upstream_client, attempt, now)
        else:
            self._send(connection, upstream_client, attempt, now)

    def _expect_body(self, upload: ExchangeBody, route: Route) -> None:
        """Receive the rest of the body of an admitted request by the settings of its route."""
        if route.min_body_rate is not None:
            upload.body_rate = route.min_body_rate
        self._begin()
        self._pace_body(upload)

    def _begin_to_connect(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        self.move(CONNECT)
        self.is_pending = True
        self.task = self._client.loop.create_task(self._connect(upstream_client, attempt, now))

    @property
    def _is_repeatable(self) -> bool:
        """True if the method or an idempotency key makes the request repeatable, see `retry.is_repeatable`."""
        return self.exchange.method in IDEMPOTENT or _HAS_KEY.search(self._request_headers.received) is not None

    # Fallbacks

    def _after(self, error: GatewayError) -> GatewayError | None:
        """Respond by the fallback of the route; return the error to respond with if there is none that applies."""
        route = self.plan.route
        if route is None or route.fallback is None or not isinstance(error, Unavailable | UpstreamFailed):
            return error
        if self.first_failure is not None:
            return self._after_both(self.first_failure, error)
        fallback, router = route.fallback, self._context.router
        if not self._applies(fallback, error):
            return error
        if fallback.upstream is not None and not router.upstream_clients[fallback.upstream].is_native:
            self._hand_over(error)
            return None
        self.move(FALL_BACK)
        exchange = self.exchange
        note_failure(exchange, error)
        exchange.fallback = fallback.name
        router.on_fallback(exchange, error)
        exchange.has_reached |= not error.is_retry_safe
        if fallback.upstream is None:
            self._respond_static(fallback)
            return None
        return self._ask_fallback(router.upstream_clients[fallback.upstream], error)

    def _applies(self, fallback: Fallback, error: GatewayError) -> bool:
        """Tell whether the fallback responds after an error."""
        deadline, upload = self.plan.deadline, self.upload
        if fallback.upstream is not None and deadline is not None and deadline.at <= self._context.clock():
            return False
        is_replayable = upload is None or upload.is_replayable
        return applies(fallback, error, is_repeatable=self._is_repeatable, is_replayable=is_replayable)

    def _respond_static(self, fallback: Fallback) -> None:
        """Respond with the static response of the route."""
        self.move(REFUSE)
        context, exchange = self._context, self.exchange
        if self.upload is not None and self.upload.awaits_continue:
            self.keep_alive = False  # the client may send the body or not
        self._begin()
        self._client.transport.write(static_response(fallback, exchange, context, keep_alive=self.keep_alive))
        self._end(context.clock(), Outcome.IGNORED, keep_alive=self.keep_alive)

    def _ask_fallback(self, upstream_client: UpstreamClient, error: GatewayError) -> GatewayError | None:
        """Begin the attempts on another upstream; return the error to respond with if none can be begun."""
        exchange, attempt, now = self.exchange, self.attempt, self._context.clock()
        self.first_failure, self.failed_upstream, self.failed_target = error, exchange.upstream, exchange.target
        self.attempt = self._last_attempt = None
        if attempt is not None:
            attempt.release(now)
        if self.upload is not None:
            self.upload.end_attempt()
        self._forget()
        self.tried, exchange.head_at = (), None
        self.move(SELECT)
        exchange.upstream = upstream_client.upstream.name
        upstream_client.retries.budget.deposit(exchange.started)
        plan, is_safe = self.plan, self._is_repeatable
        try:
            self.attempt = attempt = upstream_client.upstream.acquire(
                now,
                self._key(upstream_client),
                priority=plan.priority,
                is_safe=is_safe,
                principal=plan.principal,
            )
        except Unavailable as refusal:
            return self._after(refusal.with_traceback(None))
        self.timeouts = upstream_client.limits
        self._begin()
        if self.timer is None and plan.deadline is not None:
            self._limit_time(plan.deadline, now)
        self._start(upstream_client, attempt, now)
        return None

    def _after_both(self, first: GatewayError, second: GatewayError) -> GatewayError:
        """Return the error of the first upstream, after the fallback has failed too."""
        exchange = self.exchange
        note_shed(exchange, second)
        exchange.upstream, exchange.target, exchange.fallback = self.failed_upstream, self.failed_target, None
        exchange.has_reached |= not second.is_retry_safe
        add_failure(first, second)
        return first

    # Attempts

    async def _connect(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        """Open or await a connection, and send the request.

        Connecting may take half of the time that a deadline leaves, which allows a retry; a client's own deadline does
        not shorten it, as it would make each target appear unreachable.
        """
        deadline, seconds, generation = self.plan.deadline, upstream_client.limits["connect"], self.generation
        if deadline is not None and not deadline.is_of_client:
            seconds = min(seconds, deadline.remaining(now) / 2)
        try:
            connection = await upstream_client.connection(
                attempt.target, self.plan.principal, seconds, self._on_connect, is_fresh=self.is_repeated
            )
        except Exception as error:  # noqa: BLE001 - any other than these is a defect, which is recorded
            if generation != self.generation:
                return
            self.task = None
            if isinstance(error, httpx.TransportError):
                self.is_sent = self.is_repeated
                self._fail(_second_failure(error) if self.is_repeated else error.with_traceback(None))
            else:
                self._refuse(self._context.record.internal_error(self.exchange, error))
            return
        if generation != self.generation:  # the exchange has ended, and the cancellation came too late
            connection.close()
            return
        self.task = None
        self._send(connection, upstream_client, attempt, self._context.clock())

    def _on_connect(self) -> None:
        """Note that a connection is being opened, which matters for the refund."""
        self.exchange.has_begun = True

    def _send(
        self, connection: UpstreamConnection, upstream_client: UpstreamClient, attempt: Attempt, now: float
    ) -> None:
        """Send the request on a connection."""
        plan, exchange, upload = self.plan, self.exchange, self.upload
        route, deadline = plan.route, plan.deadline
        host, identity = upstream_client.hosts[attempt.target], exchange.id.encode()
        if not host:
            host = upstream_client.host_of(attempt.target, self._request_headers.facts.host_field)
        if route is not None and route.url_rewriter is not None:
            host += route.url_rewriter.request_line
        if plan.facts.credentials and route is not None and route.forward_credentials:
            host += b"\r\n%b" % plan.facts.credential_lines
        if deadline is not None and deadline.is_forwarded:
            identity += b"\r\n%b: %b" % (REQUEST_TIMEOUT, deadline.header_value(now))
        self.connection = connection
        self.phase = EXCHANGING
        head = b"%b %b HTTP/1.1\r\nhost: %b%bx-request-id: %b\r\n\r\n" % (
            exchange.method.encode(),
            plan.target,
            host,
            self._request_headers.sent,
            identity,
        )
        if upload is None:
            connection.start(self, head)
        else:
            self._send_with_body(connection, upload, head)

    def _send_with_body(self, connection: UpstreamConnection, upload: ExchangeBody, head: bytes) -> None:
        """Send a head and what has arrived of the body."""
        self.exchange.bytes_in = size = upload.received
        pieces = upload.begin(connection)
        request = [head, *pieces] if size > _MAX_COPIED else [head + b"".join(pieces)]
        if upload.is_complete:
            connection.start(self, *request)
        else:
            self.listener = upload
            connection.begin(self, request, upload.length - size)
            self._pace_body(upload)

    # From the upstream

    def takes_chunks(self, status: int) -> bool:
        """Take plain chunks with their framing, except of a response that may be followed by another attempt."""
        return status < _MIN_RETRIED_STATUS or not self._is_retried(status)

    def on_complex_head(self) -> None:
        """Forward interim responses, and take no more than READ_SIZE at once: the parser's callbacks take time."""
        if self.upload is None or self.upload.is_complete:
            self.listener = _Interim(self._client, self._context.via)
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
            self._write_head(attempt)
            if attempt.is_probe and not self.is_complete:
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
        """Settle an attempt with an event stream, because its end shows nothing about the upstream.

        Its connection is counted apart from those of requests. Return False if the holder's share of those is used up.
        """
        self._context.router.outcomes.settle_success(attempt)
        try:
            self.move_to_tunnels()
        except httpx.PoolTimeout as error:
            self.exchange.has_reached = True  # the charge is kept, because the upstream has served the request
            failure = translate(error, attempt.upstream.name)
            failure.__cause__ = error.with_traceback(None)
            self.close()
            final = self._after(failure)
            if final is not None:
                self._refuse(final)
            return False
        attempt.release_slot()
        if b"content-encoding" not in self.fields:  # a coding hides the boundaries of events
            self.events = EventBoundaries()
        return True

    def on_drain(self) -> None:
        """End an event stream between two events: the server stops, and the client connects again by itself."""
        if self.events is None or not self.events.is_between or self.phase != EXCHANGING or self.response == NONE:
            return
        self.close()
        if self.is_framed:
            self._client.transport.write(b"0\r\n\r\n")
        self.move(END)
        self._end(self._context.clock(), Outcome.SUCCESS, keep_alive=self.keep_alive)

    def _receive_more(self) -> None:
        """Receive more of the response as soon as the client reads."""
        connection = self.connection
        assert connection is not None  # noqa: S101 - an incomplete response without a connection has failed
        if self._client.is_write_paused:
            self.response = PAUSED
            connection.pause_reading()
            connection.timer.clear()
        else:
            self.response = FLOWING
            connection.resume_reading()  # a large read pauses it
            connection.set_timer("idle")

    def _write_head(self, attempt: Attempt) -> None:
        """Send the head and what has arrived of the body."""
        context, exchange, route = self._context, self.exchange, self.plan.route
        exchange.status, exchange.source = self.status, "upstream"
        if self.upload is not None:
            self.upload.is_started = True
            if self.upload.awaits_continue:
                self.keep_alive = False  # the client may send the body or not
        rewriter, authorities = None if route is None else route.url_rewriter, NO_AUTHORITIES
        if rewriter is not None:
            upstream_client = context.router.upstream_clients[attempt.upstream.name]
            authorities = Authorities.of(upstream_client, attempt.target, self._request_headers.facts.host_field)
        if self.head:
            if self.cost is not None:
                context.router.on_cost(exchange, (self.cost,))
            head = plain_head(self, exchange, context, rewriter, authorities, keep_alive=self.keep_alive)
        else:
            if COST in self.fields:
                context.router.on_cost(exchange, self.fields[COST])
            self.is_framed = not (self.is_to_head or self.status in BODILESS or self.is_counted)
            head = parsed_head(
                self, exchange, context, rewriter, authorities, is_chunked=self.is_framed, keep_alive=self.keep_alive
            )
        if exchange.fallback is not None:
            head = b"%b%b: %b\r\n\r\n" % (head[:-2], FALLBACK, exchange.fallback.encode())
        if self.is_framed or self.chunks is not None:
            piece = self._take_piece()
        else:
            piece = self.take()
            exchange.bytes_out += len(piece)
        if len(piece) > _MAX_JOINED:
            self._client.transport.writelines((head, piece))
        else:
            self._client.transport.write(head + piece)

    def _take_piece(self) -> bytes:
        """Remove and return what has arrived of the body, framed for the client."""
        piece, exchange = self.take(), self.exchange
        if self.events is not None:
            self.events.follow(piece)
        if self.chunks is not None:
            exchange.bytes_out = self.chunks.content
            return piece
        exchange.bytes_out += len(piece)
        if not self.is_framed:
            return piece
        if piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        return piece + b"0\r\n\r\n" if self.is_complete else piece

    def _is_retried(self, status: int) -> bool:
        """Tell whether the retry policy names the status."""
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

    # Retries

    def _fail(self, error: Exception) -> None:
        """End an attempt without a response; retry, fall back, or respond with its error."""
        exchange, attempt, router = self.exchange, self.attempt, self._context.router
        assert attempt is not None and isinstance(error, httpx.TransportError)  # noqa: S101, PT018 - the only errors of transports
        self.close()
        client_progress = NO_PROGRESS
        if self.upload is not None:
            client_progress = self._note_progress(self.upload)
            self.upload.end_attempt()
        elif isinstance(error, StaleConnection) and exchange.method in IDEMPOTENT and not self.is_repeated:
            self._forget()
            self.is_repeated = True
            client = router.upstream_clients[attempt.upstream.name]
            self._begin_to_connect(client, attempt, self._context.clock())
            return
        self.error = None
        failure = router.outcomes.on_failure(exchange, attempt, error, client_progress)
        failure.__cause__ = error
        exchange.has_begun |= self.is_sent
        exchange.has_reached |= self.is_sent
        if isinstance(failure, UpstreamFailed):
            delay = self._retry_delay(attempt, is_sent=not failure.is_retry_safe)
            if delay is not None:
                exchange.has_reached |= not failure.is_retry_safe
                self._back_off(attempt, delay, failure.reason.value, failure)
                return
        final = self._after(failure)
        if final is not None:
            self._refuse(final)

    def _retries(self, attempt: Attempt, now: float) -> bool:
        """Prepare a retry after a response with a status that is retried; return False if it is denied."""
        delay = self._retry_delay(attempt, is_sent=True, retry_after=retry_after_of(self.fields))
        if delay is None:
            return False
        self.exchange.has_reached = True
        self._context.router.outcomes.settle(attempt, outcome_of_abort(has_head=True), now)
        self._back_off(attempt, delay, str(self.status), None)
        return True

    def _retry_delay(self, attempt: Attempt, *, is_sent: bool, retry_after: float | None = None) -> float | None:
        router = self._context.router
        upstream_client, upload = router.upstream_clients[attempt.upstream.name], self.upload
        self.tried += (attempt.target,)
        # While the rest of a body is still sent to the first target, a retry after a response could lose it.
        return router.retry_delay(
            upstream_client,
            attempt,
            self.tried,
            is_sent=is_sent,
            is_repeatable=self._is_repeatable,
            is_replayable=upload is None
            or (upload.is_replayable and (upload.is_complete or not self.is_head_complete)),
            retry_after=retry_after,
            deadline=self.plan.deadline,
        )

    def _back_off(self, attempt: Attempt, delay: float, cause: str, failure: GatewayError | None) -> None:
        """Wait before a retry. What the last attempt came to is kept: it may be final."""
        self.move(RETRY)
        self.is_pending = True
        self.attempt, self._last_attempt = None, attempt
        attempt.release(self._context.clock())
        self.cause, self.failure = cause, failure
        if failure is None:
            self.last = UpstreamResponse.continuing(self, NO_LISTENER)
        self.delay = self._client.loop.call_later(delay, self._on_delay, self.generation)

    def _on_delay(self, generation: int) -> None:
        """Begin the retry; if no target is available for it, the result of the last attempt is final."""
        if generation != self.generation or self._last_attempt is None:
            return
        self.delay = None
        self.move(RESUME)
        plan, exchange, router = self.plan, self.exchange, self._context.router
        upstream_client = router.upstream_clients[self._last_attempt.upstream.name]
        now = self._context.clock()
        last, failure, name = self.last, self.failure, upstream_client.upstream.name
        self.last = self.failure = None
        is_safe = self._is_repeatable
        attempt = router.next_attempt(
            upstream_client, self._key(upstream_client), self.tried, is_safe=is_safe, principal=plan.principal
        )
        if attempt is None:
            router.on_denial(name, RetryDenied.UNAVAILABLE)
            self._settle_for(last, failure, now)
            return
        exchange.retried += (self.cause,)
        router.on_retry(name, self.cause)
        if last is not None:
            last.close()
        self._forget()
        exchange.head_at = None
        self.attempt = attempt
        self._start(upstream_client, attempt, now)

    def _settle_for(self, last: UpstreamResponse | None, failure: GatewayError | None, now: float) -> None:
        """Respond with the result of the last attempt."""
        if failure is not None:
            final = self._after(failure)
            if final is not None:
                self._refuse(final)
        elif last is not None and self._last_attempt is not None:
            self.move(FINAL)
            self._forget()
            self.take_over(last)
            self._write_head(self._last_attempt)
            self.response = FLOWING
            if self.error is not None:
                self._on_error(self.error)
            elif self.is_complete:
                self.move(END)
                self._end(now, Outcome.SUCCESS, keep_alive=self.keep_alive)
            else:
                self._receive_more()

    def _forget(self) -> None:
        """Return to the state of a response of which nothing has arrived."""
        self.forget()
        self.is_relayed, self.is_framed = True, False
        self.is_sent, self.is_repeated = True, False
        self.waited_before_head = 0.0

    def _on_deadline(self, generation: int) -> None:
        """Respond with the error of the deadline, or by the fallback; once the response has begun, close instead."""
        deadline, attempt = self.plan.deadline, self.attempt
        if generation != self.generation or deadline is None:
            return
        exchange, context = self.exchange, self._context
        is_sent = self.phase == EXCHANGING
        if (
            is_sent and attempt is not None and self.response != PAUSED
        ):  # else the client is awaited, and the upstream has responded
            assert exchange.sent_at is not None  # noqa: S101 - set before sending
            client = self._client_progress()
            spent = context.clock() - exchange.sent_at - (client.waited - self.waited_before_head)
            context.router.outcomes.on_overdue(exchange, attempt, deadline, spent, client)
        if self.response != NONE:
            self.move(BREAK)
            context.record.note_failure(exchange, deadline_error(exchange, deadline))
            self._abort()
            return
        self.close()
        if is_sent:
            exchange.has_begun = exchange.has_reached = True
        error = self._after(deadline_error(exchange, deadline))
        if error is not None:
            self._refuse(error)

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
        if self.phase == EXCHANGING:
            self.exchange.bytes_in = upload.received
        self._pace_body(upload)
        return False

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
        """Return what the exchange holds, and record it. The upstream connection is returned or closed already."""
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
        if self.last is not None:
            self.last.close()
            self.last = None
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def _hand_over(self, error: GatewayError | None = None) -> None:
        """Let the ASGI path continue: from the start if no attempt was made, with the fallback after an `error`.

        The error has settled the attempt. What has arrived of the body has been kept.
        """
        if self.upload is not None and not self.upload.is_complete:
            self._begin()
        self.move(HAND_OVER)
        self._invalidate()
        attempt, self.attempt = self.attempt, None
        exchange, context = self.exchange, self._context
        exchange.response_headers = context.response_headers(exchange)
        router = context.router
        kept = b"" if self.upload is None else self.upload.kept()
        if error is not None:
            if attempt is not None:
                attempt.release(context.clock())
            go_on = partial(router.fall_back, self.plan, error)
        else:
            go_on = partial(router.forward, self.plan)
        exchange.bytes_in = 0  # the ASGI path counts anew
        self._client.run_asgi(
            partial(_serve, context.record, exchange, go_on),
            exchange.method,
            self.plan.raw_target,
            pairs_of(self._request_headers.received),
            kept,
            keep_alive=self.keep_alive,
        )


def _second_failure(error: httpx.TransportError) -> httpx.ReadError:
    """Return the error of a request that could not be sent once more; it is no ConnectError, as it was sent before."""
    failure = httpx.ReadError(f"{StaleConnection()}; second attempt: {error}")
    failure.__cause__ = error.with_traceback(None)
    return failure


def _serve(
    record: ExchangeMiddleware, exchange: Exchange, go_on: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> Awaitable[None]:
    """Continue an exchange on the ASGI path; this is the application given to `run_asgi`."""
    scope[FIELDS], scope[EXCHANGE] = fields_of(scope["headers"]), exchange
    return record.conclude(exchange, go_on, scope, receive, send)


class _Interim(NoListener):
    """Forwards interim responses."""

    def __init__(self, client: Downstream, via: tuple[bytes, bytes]) -> None:
        self._client = client
        self._via = via

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ResponseListener`."""
        self._client.transport.write(render_response_head(status, reason, forwardable_interim(headers, self._via)))
