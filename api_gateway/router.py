"""Forwards a request to its upstream: acquires a target, sends the request, retries, relays the response.

A request may be retried until the first byte of a response is sent to the client. `upstreams.upstream` and
`circuit_breaker` decide on targets, admission and outcomes; the transport sends and receives bytes.

The module is long because it is one state machine: the attempts of a request, up to the delivered response.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import httpx

from api_gateway.errors import (
    GatewayError,
    Unavailable,
    UpstreamFailed,
)
from api_gateway.http1.asgi import SERVER_EXTENSION, Receive, Scope, Send, ServerExtension
from api_gateway.http1.headers import (
    BODILESS,
    COST,
    Fields,
    forwardable_trailers,
    rewrite_response,
)
from api_gateway.http1.methods import PROXIED_METHODS
from api_gateway.http1.via import Via
from api_gateway.models import Clock, Exchange, HeaderList
from api_gateway.proxy.admission import RequestPlan
from api_gateway.proxy.attribution import ClientProgress
from api_gateway.proxy.client_disconnect import DisconnectListener, DisconnectPoller
from api_gateway.proxy.content_cost import ContentCost, ContentScan
from api_gateway.proxy.cors import complete
from api_gateway.proxy.deadline import Deadline, deadline_error
from api_gateway.proxy.fallback_runner import FallbackRunner
from api_gateway.proxy.outcome_reporter import OutcomeReporter
from api_gateway.proxy.request_body import StreamedBody, body_too_large
from api_gateway.proxy.route_table import RouteTable
from api_gateway.proxy.sse import EventStream, event_stream, is_event_stream
from api_gateway.proxy.upstream_request import UpstreamRequest
from api_gateway.proxy.websocket_tunnel import Tunnel
from api_gateway.resilience.breaker_history import Transition
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.fair_shares import holder_of
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses
from api_gateway.resilience.retry import FailedAttempt, RetryDenied, is_repeatable, retry_after_of
from api_gateway.transport.dispatch import HttpxBody, close_response, fields_in, parts_of
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.request import NO_BODY, LeanRequest, NoBody
from api_gateway.transport.response import UpstreamResponse
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

SWITCHING_PROTOCOLS = 101
PROBE_SETTLES_AFTER = 5.0  # maximum seconds after which a probe whose response still streams counts as a success


@dataclass(slots=True)
class _PendingRetry:
    """A failed attempt that is to be retried after `pause` seconds.

    `error` or `response` is its result, which is final if no retry is possible after the pause.
    """

    cause: str
    pause: float
    attempt: Attempt
    error: UpstreamFailed | None = None
    response: httpx.Response | None = None

    def failure(self) -> UpstreamFailed:
        """Return the error for raising, and drop the reference: a raised error refers to the raising frame."""
        error, self.error = self.error, None
        assert error is not None  # noqa: S101 - an attempt ends with an error or a response
        return error


def _ignore(*_: object) -> None:
    """Do nothing; the default of callbacks."""


class Router:
    """Forwards exchanges to upstreams. Contains only configuration; the state is in the arguments."""

    def __init__(
        self,
        routes: RouteTable,
        upstream_clients: Mapping[str, UpstreamClient],
        *,
        clock: Clock,
        max_body_bytes: int,
        protected: frozenset[bytes] = frozenset(),
        never_trailing: frozenset[bytes] = frozenset(),
        omit: frozenset[bytes] = frozenset(),
        via: Via | None = None,
        observe_attempt: Callable[[str, str, float | None, float], None],
        on_transition: Callable[[str, Transition], None],
        on_target_transition: Callable[[str, Target, Transition], None] = _ignore,
        on_cost: Callable[[Exchange, Sequence[bytes]], None] | None = None,
        on_content_cost: Callable[[Exchange, ContentCost, float | None, bool], None] | None = None,
        on_retry: Callable[[str, str], None] | None = None,
        on_denial: Callable[[str, str], None] | None = None,
        on_fallback: Callable[[Exchange, GatewayError], None] | None = None,
        priorities: PriorityClasses = SINGLE_PRIORITY,
        lag: EventLoopShedder | None = None,
        reporter: type[OutcomeReporter] = OutcomeReporter,
    ) -> None:
        """Set limits and callbacks.

        `protected` request fields are kept even if `Connection` names them; `never_trailing` are removed from trailers
        of requests, `omit` from responses. Names are in lower case. `via` names this gateway. `on_cost` is called with
        the values of X-Gateway-Cost before a response's head is sent, `on_content_cost` with what a response's content
        states (`ContentScan`) before its end is sent, `on_retry` with upstream and cause of each retry, `on_denial`
        with upstream and reason of each retry that was denied, `on_fallback` with the error before a fallback
        responds. `observe_attempt`, `on_transition` and `on_target_transition`: see `OutcomeReporter`; `reporter` is
        its class, another one if attempts are traced.
        """
        self.routes = routes
        self.upstream_clients = dict(upstream_clients)
        self._clock = clock
        self.max_body_bytes = max_body_bytes
        self.protected = protected
        self._never_trailing = never_trailing | protected
        self._via = via or Via()
        self._omit = omit
        self._omit_with_length = omit | {b"content-length"}
        self.outcomes = reporter(
            clock=clock,
            observe_attempt=observe_attempt,
            on_transition=on_transition,
            on_target_transition=on_target_transition,
        )
        self.on_cost = on_cost or _ignore
        self.on_content_cost = on_content_cost or _ignore
        for route in routes:
            if route.content_cost is not None:  # an exchange looks at routes of such upstreams only
                self.upstream_clients[route.upstream].is_simple = False
        self.on_retry, self.on_denial = on_retry or _ignore, on_denial or _ignore
        self.on_fallback = on_fallback or _ignore
        self._fallback_runner = FallbackRunner(self.upstream_clients, self._attempts, self.on_fallback, clock)
        self.priorities = priorities
        self._event_loop_shedder = lag or EventLoopShedder(None, source=random.Random())  # noqa: S311 - spreads load, guards nothing

    def forward(
        self,
        plan: RequestPlan,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> Awaitable[None]:
        """Forward an admitted request to its upstream, and the response to the client. Raises GatewayError."""
        exchange, route = plan.exchange, plan.route
        assert route is not None  # noqa: S101 - the request is admitted
        upstream_client = self.upstream_clients[route.upstream]
        exchange.upstream = route.upstream
        extension: ServerExtension | None = scope.get(SERVER_EXTENSION)
        request = self._request(plan, scope, extension)
        if exchange.method == "OPTIONS" and b"max-forwards" in request.fields and request.must_not_forward():
            return self._respond_to_options(exchange, send)
        if extension is not None and route.min_body_rate is not None:
            extension.require_body_rate(route.min_body_rate)
        request.body = self._body(exchange, upstream_client, request, receive)
        upstream_client.retries.budget.deposit(exchange.started)
        attempts = self._attempts(exchange, upstream_client, request, receive, send)
        if route.fallback is None:
            return attempts
        return self._fallback_runner.respond(exchange, route.fallback, request, receive, send, attempts)

    def _request(self, plan: RequestPlan, scope: Scope, extension: ServerExtension | None) -> UpstreamRequest:
        return UpstreamRequest(plan, scope, extension, self.protected, self._never_trailing, self._via)

    def _attempts(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        request: UpstreamRequest,
        receive: Receive,
        send: Send,
    ) -> Awaitable[None]:
        """Return the attempts on one upstream, limited by the deadline of the request."""
        work = partial(self._attempt_targets, exchange, upstream_client, request, send)
        if request.extension is not None and request.deadline is None:
            return work()
        deadline = request.deadline
        if deadline is not None and not deadline.remaining(self._clock()):  # passed before anything was sent
            return _raise(deadline_error(exchange, deadline))
        return self._guard(exchange, request, receive, work)

    async def _guard(
        self, exchange: Exchange, request: UpstreamRequest, receive: Receive, work: Callable[[], Awaitable[None]]
    ) -> None:
        """Apply the deadline to `work`, and detect a disconnect if the server does not report it."""
        deadline = request.deadline
        left = None if deadline is None else deadline.remaining(self._clock())
        with nullcontext() if request.extension is not None else DisconnectPoller(receive, request.body):
            try:
                async with asyncio.timeout(left) as request.timer:
                    await work()
            except TimeoutError as error:
                assert deadline is not None  # noqa: S101 - only the deadline raises TimeoutError here
                raise deadline_error(exchange, deadline) from error

    def _body(
        self, exchange: Exchange, upstream_client: UpstreamClient, request: UpstreamRequest, receive: Receive
    ) -> StreamedBody | NoBody:
        if request.framing is None:
            return NO_BODY
        if request.framing == b"length" and int(request.fields[b"content-length"][0]) > self.max_body_bytes:
            raise body_too_large(self.max_body_bytes)
        may_repeat = is_repeatable(exchange.method, request.fields)
        keep = upstream_client.retries.policy.max_body_bytes if may_repeat else 0
        return StreamedBody(receive, self.max_body_bytes, exchange, keep)

    async def _respond_to_options(self, exchange: Exchange, send: Send) -> None:
        """Respond to OPTIONS with `Max-Forwards: 0` as the final recipient (RFC 9110 section 7.6.2)."""
        exchange.status = 204
        headers = [(b"allow", PROXIED_METHODS.encode()), *exchange.response_headers]
        if exchange.cors is not None:
            headers += exchange.cors.pairs
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _attempt_targets(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        request: UpstreamRequest,
        send: Send,
    ) -> None:
        """Make an attempt, and retries as long as `_retry_delay` allows them.

        Raises ClientDisconnected if the client disconnects: the gateway's own server then cancels this task.
        """
        tried: list[Target] = []
        watch: AbstractContextManager[None] = (
            nullcontext() if request.extension is None else DisconnectListener(request.extension)
        )
        with watch:
            attempt = self._acquire(exchange, upstream_client, request)
            again = await self._attempt(exchange, upstream_client, attempt, request, send, tried)
            try:
                while again is not None:
                    again = await self._attempt_again(exchange, upstream_client, again, request, send, tried)
            finally:
                again = None  # breaks the reference cycle of its error and this frame

    def _acquire(self, exchange: Exchange, upstream_client: UpstreamClient, request: UpstreamRequest) -> Attempt:
        """Acquire a target for the first attempt. Raises Unavailable."""
        return upstream_client.upstream.acquire(
            self._clock(),
            _key(exchange, upstream_client, request),
            priority=0 if exchange.client is None else self.priorities.of(exchange.client.quota.name),
            is_safe=is_repeatable(exchange.method, request.fields),
            principal=holder_of(exchange.client, exchange.peer),
        )

    async def _attempt_again(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        again: _PendingRetry,
        request: UpstreamRequest,
        send: Send,
        tried: list[Target],
    ) -> _PendingRetry | None:
        """Retry after the pause; if no target is available by then, the result of the last attempt is final."""
        attempt = None
        try:
            await asyncio.sleep(again.pause)
            attempt = self._next_attempt(exchange, upstream_client, request, tried)
            if attempt is None:
                self.on_denial(upstream_client.upstream.name, RetryDenied.UNAVAILABLE)
                if again.response is None:
                    raise again.failure()
                await self._relay(exchange, again.attempt, request, again.response, send)
                return None
        finally:
            if again.response is not None and attempt is None:
                await close_response(again.response)
        exchange.retried += (again.cause,)
        self.on_retry(upstream_client.upstream.name, again.cause)
        return await self._attempt(exchange, upstream_client, attempt, request, send, tried, given_up=again.response)

    def _next_attempt(
        self, exchange: Exchange, upstream_client: UpstreamClient, request: UpstreamRequest, tried: Sequence[Target]
    ) -> Attempt | None:
        """Acquire a target for a retry, see `next_attempt`."""
        return self.next_attempt(
            upstream_client,
            _key(exchange, upstream_client, request),
            tried,
            is_safe=is_repeatable(exchange.method, request.fields),
            principal=holder_of(exchange.client, exchange.peer),
        )

    def next_attempt(
        self,
        upstream_client: UpstreamClient,
        key: str,
        tried: Sequence[Target],
        *,
        is_safe: bool,
        principal: str | None,
    ) -> Attempt | None:
        """Acquire a target for a retry; None if there is none, or while the upstream recovers: no retry is a probe.

        A retry has the lowest priority, so that it is shed before any first attempt. For the arguments see
        `Upstream.acquire`.
        """
        if self.is_recovering(upstream_client):
            return None
        try:
            return upstream_client.upstream.acquire(
                self._clock(), key, tried, priority=0, is_safe=is_safe, principal=principal
            )
        except Unavailable:
            return None

    def is_recovering(self, upstream_client: UpstreamClient) -> bool:
        """Tell whether the event loop is overloaded or the upstream's breaker recovers, so that retries are denied."""
        return self._event_loop_shedder.is_over or upstream_client.upstream.is_recovering(self._clock())

    async def _attempt(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        request: UpstreamRequest,
        send: Send,
        tried: list[Target],
        given_up: httpx.Response | None = None,
    ) -> _PendingRetry | None:
        """Send the request to one target and relay the response, or return a retry if the attempt failed.

        `given_up` is the response of the previous attempt, which is closed unread. Raises GatewayError if the attempt
        failed and is not retried.
        """
        tried.append(attempt.target)
        exchange.attempts += 1
        exchange.head_at = None
        try:
            if given_up is not None:
                await close_response(given_up)
            try:
                response = await self._send(exchange, upstream_client, attempt, request)
            except UpstreamFailed as error:
                delay = self._retry_delay(
                    exchange, upstream_client, attempt, request, tried, is_sent=not error.is_retry_safe
                )
                if delay is None:
                    raise
                exchange.has_reached |= not error.is_retry_safe
                return _PendingRetry(error.reason.value, delay, attempt, error=error)
            if response.status_code in upstream_client.retried_statuses:
                delay = self._retry_delay(
                    exchange, upstream_client, attempt, request, tried, is_sent=True, response=response
                )
                if delay is not None:
                    exchange.has_reached = True
                    return _PendingRetry(str(response.status_code), delay, attempt, response=response)
            await self._deliver(exchange, upstream_client, attempt, request, response, send)
            return None
        finally:
            self.outcomes.release(exchange, attempt)

    def _retry_delay(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        request: UpstreamRequest,
        tried: Sequence[Target],
        *,
        is_sent: bool,
        response: httpx.Response | None = None,
    ) -> float | None:
        """Return the seconds before a retry, which is withdrawn from the budget, or None if it is denied.

        After a `response`, the request's body must have been read completely: while its rest is still sent to the
        first target, a retry could lose it.
        """
        return self.retry_delay(
            upstream_client,
            attempt,
            tried,
            is_sent=is_sent,
            is_repeatable=is_repeatable(exchange.method, request.fields),
            is_replayable=request.body.is_replayable and (response is None or request.body.is_finished),
            retry_after=None if response is None else retry_after_of(fields_in(response)),
            deadline=request.deadline,
        )

    def retry_delay(
        self,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        tried: Sequence[Target],
        *,
        is_sent: bool,
        is_repeatable: bool,
        is_replayable: bool,
        retry_after: float | None,
        deadline: Deadline | None,
    ) -> float | None:
        """Return the seconds before a retry, which is withdrawn from the budget, or None if it is denied.

        `tried` are the targets of the attempts, this one included; for the other arguments see `FailedAttempt`.
        """
        now = self._clock()
        failed = FailedAttempt(
            attempts=len(tried),
            is_sent=is_sent,
            is_repeatable=is_repeatable,
            is_replayable=is_replayable,
            is_recovering=attempt.ticket.is_probe or self.is_recovering(upstream_client),
            is_elsewhere=attempt.upstream.has_other(tried, now),
            retry_after=retry_after,
            left=None if deadline is None else deadline.remaining(now),
        )
        decision = upstream_client.retries.decide(failed, now)
        if isinstance(decision, RetryDenied):
            self.on_denial(attempt.upstream.name, decision)
            return None
        return decision

    async def _send(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        request: UpstreamRequest,
    ) -> httpx.Response:
        """Send the request to one target and return the response with its head; settle the attempt if that fails."""
        now = self._clock()
        if exchange.trace is not None:
            upstream = attempt.upstream
            exchange.trace.begin_attempt(
                upstream.name, attempt.target.url, request.target, upstream.breaker.state, now
            )
        outgoing = request.render(exchange, upstream_client, attempt.target, now)
        exchange.target, exchange.sent_at = attempt.target.url, now
        try:
            response = await upstream_client.transport.handle_async_request(outgoing)
        except httpx.TransportError as error:
            raise self._failure(exchange, attempt, request, outgoing, error) from error
        except asyncio.CancelledError:
            if _note_progress(exchange, outgoing, is_sent=True) and request.is_overdue:
                self._settle_overdue(exchange, attempt, request, _note_client_progress(exchange, request))
            raise
        self.outcomes.on_head(
            exchange, attempt, response.status_code, self._clock(), _note_client_progress(exchange, request)
        )
        return response

    def _failure(
        self,
        exchange: Exchange,
        attempt: Attempt,
        request: UpstreamRequest,
        outgoing: httpx.Request,
        error: httpx.TransportError,
    ) -> GatewayError:
        """Settle an attempt without a response; return its error.

        This is a function of its own so that no variable of the raising frame refers to the error, which refers to
        the frame: only the garbage collector would free that cycle.
        """
        failure = self.outcomes.on_failure(exchange, attempt, error, _note_client_progress(exchange, request))
        _note_progress(exchange, outgoing, is_sent=not failure.is_retry_safe)
        return failure

    def _settle_overdue(
        self,
        exchange: Exchange,
        attempt: Attempt,
        request: UpstreamRequest,
        client: ClientProgress,
    ) -> None:
        """Settle an attempt that the deadline has ended; time spent waiting for the client is not the upstream's."""
        assert request.deadline is not None  # noqa: S101 - it has just passed
        assert exchange.sent_at is not None  # noqa: S101 - the request has been sent
        spent = self._clock() - exchange.sent_at - (client.waited - request.waited_before_head)
        self.outcomes.on_overdue(exchange, attempt, request.deadline, spent, client)

    async def _deliver(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        request: UpstreamRequest,
        response: httpx.Response,
        send: Send,
    ) -> None:
        """Relay a response or run a tunnel, then close the response."""
        settle_probe = None
        if attempt.is_probe:  # a long response must not prevent the breaker from closing
            settle_probe = self.settle_probe_soon(attempt, asyncio.get_running_loop())
        try:
            if response.status_code == SWITCHING_PROTOCOLS:
                await self._tunnel(exchange, upstream_client, attempt, request, response)
            else:
                await self._relay(exchange, attempt, request, response, send)
        finally:
            if settle_probe is not None:
                settle_probe.cancel()
            await close_response(response)

    def settle_probe_soon(self, attempt: Attempt, loop: asyncio.AbstractEventLoop) -> asyncio.TimerHandle:
        """Schedule the outcome of a probe whose response has begun; not settled in time, it would count as lost."""
        seconds = min(PROBE_SETTLES_AFTER, attempt.upstream.breaker.policy.recovery_timeout / 2)
        return loop.call_later(seconds, self.outcomes.settle_success, attempt)

    async def _relay(
        self, exchange: Exchange, attempt: Attempt, request: UpstreamRequest, response: httpx.Response, send: Send
    ) -> None:
        """Forward the response piece by piece; its end settles the attempt as a success, an error as a failure."""
        headers, fields, stream = parts_of(response)
        if is_event_stream(fields):
            self._begin_stream(exchange, attempt, stream)
        exchange.status, exchange.source = response.status_code, "upstream"
        omit = self._omit_with_length if response.status_code in request.lengthless else self._omit
        may_have_trailers = b"transfer-encoding" in fields and response.status_code not in BODILESS
        passes_trailers = may_have_trailers and b"te" in request.fields and request.accepts_trailers
        await send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "reason": response.extensions.get("reason_phrase"),
                "headers": self._for_client(exchange, request, headers, fields, omit, stream.version),
                "trailers": passes_trailers,
                "upstream_fields": fields if isinstance(stream, UpstreamResponse) else None,
                "is_body_ready": stream.is_ready,
            }
        )
        events = event_stream(request.extension, fields, stream)
        if request.content_cost is None or COST in fields:
            await self._relay_body(exchange, attempt, request, stream, send, events, None)
        else:
            scan = request.content_cost.scan(fields, partial(self.on_content_cost, exchange))
            try:
                await self._relay_body(exchange, attempt, request, stream, send, events, scan)
            finally:
                scan.end(is_complete=False)
        if passes_trailers:
            passed = forwardable_trailers(stream.trailers, self.protected)
            await send({"type": "http.response.trailers", "headers": passed, "more_trailers": False})

    async def _relay_body(
        self,
        exchange: Exchange,
        attempt: Attempt,
        request: UpstreamRequest,
        stream: UpstreamResponse | HttpxBody,
        send: Send,
        events: EventStream | None,
        scan: ContentScan | None,
    ) -> None:
        """Forward the body piece by piece. `scan` ends before the last piece, so that the next request is later."""
        more = True
        while more:
            try:
                piece, more = await stream.read()
            except httpx.TransportError as error:
                client = _client_progress(request.body, stream.reader_waited)
                raise self.outcomes.on_broken_body(exchange, attempt, error, client) from error
            except asyncio.CancelledError:
                if request.is_overdue:
                    client = _client_progress(request.body, stream.reader_waited)
                    self._settle_overdue(exchange, attempt, request, client)
                raise
            if scan is not None:
                scan.feed(piece)
                if not more:
                    scan.end(is_complete=events is None or not events.is_ending)
            if events is not None and events.on_piece(piece):
                more = False
            exchange.bytes_out += len(piece)
            if not more:
                self.outcomes.settle_success(attempt)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    def _for_client(
        self,
        exchange: Exchange,
        request: UpstreamRequest,
        headers: HeaderList,
        fields: Fields,
        omit: frozenset[bytes],
        version: str,
    ) -> HeaderList:
        """Settle the cost that the response reports, and return its header fields for the client.

        `version` is the version of HTTP in which the response was received.
        """
        if request.url_rewriter is not None:
            headers = request.url_rewriter.rewrite(headers, request.authorities)
        if COST in fields:
            self.on_cost(exchange, fields[COST])
        own = exchange.response_headers
        if exchange.cors is not None:
            headers, added = complete(exchange.cors, headers)
            own = own + added
        return rewrite_response(headers, fields, own, omit, self._via.field(version))

    def _begin_stream(self, exchange: Exchange, attempt: Attempt, stream: UpstreamResponse | HttpxBody) -> None:
        """Settle an attempt with a tunnel or an event stream, because its end shows nothing about the upstream.

        Count its connection apart from those of requests. Raises Overloaded if the holder's share is used up.
        """
        self.outcomes.settle_success(attempt)
        if isinstance(stream, UpstreamResponse):
            try:
                stream.move_to_tunnels()
            except httpx.PoolTimeout as error:
                exchange.has_reached = True  # the charge is kept, because the upstream has served the request
                raise translate(error, attempt.upstream.name) from error
            attempt.release_slot()

    async def _tunnel(
        self,
        exchange: Exchange,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        request: UpstreamRequest,
        response: httpx.Response,
    ) -> None:
        """Send the 101 to the client and run the tunnel to its end."""
        extension = request.extension
        assert extension is not None  # noqa: S101 - an upgrade is requested only if there is an extension
        self._begin_stream(exchange, attempt, response.extensions["switched"])
        exchange.status, exchange.source = SWITCHING_PROTOCOLS, "upstream"
        if request.timer is not None:  # the deadline applies to the handshake only
            request.timer.reschedule(None)
        headers, fields, _ = parts_of(response)
        headers = self._for_client(exchange, request, headers, fields, self._omit, "1.1")
        headers += [(b"connection", b"Upgrade"), (b"upgrade", extension.upgrade)]
        try:
            upstream, from_upstream = response.extensions["switched"].detach()
        except httpx.TransportError as error:
            raise translate(error, attempt.upstream.name) from error
        client, from_client = extension.switch_protocols(response.extensions["reason_phrase"], headers)
        tunnel = Tunnel(asyncio.get_running_loop(), client, upstream, upstream_client.tunnel_timeout)
        extension.on_shutdown = tunnel.request_close
        if extension.is_stopping:
            tunnel.request_close()
        try:
            await tunnel.run(from_client, from_upstream)
        finally:
            exchange.bytes_in, exchange.bytes_out = tunnel.bytes_in, tunnel.bytes_out


def _key(exchange: Exchange, upstream_client: UpstreamClient, request: UpstreamRequest) -> str:
    """Return the key for load balancing."""
    if upstream_client.hash_header is None:
        return exchange.client_key
    return upstream_client.hash_key(request.fields, exchange)


async def _raise(error: GatewayError) -> None:
    raise error


def _client_progress(body: StreamedBody | NoBody, reader_waited: float) -> ClientProgress:
    """Return the client's part in the end of an attempt."""
    return ClientProgress(body.is_finished, body.is_awaited, body.waited + reader_waited)


def _note_client_progress(exchange: Exchange, request: UpstreamRequest) -> ClientProgress:
    """Return the client's part before the head; move `sent_at` by the time for which the client was awaited."""
    share = _client_progress(request.body, 0.0)
    request.waited_before_head = share.waited
    if share.waited and exchange.sent_at is not None:
        exchange.sent_at += share.waited
    return share


def _note_progress(exchange: Exchange, outgoing: httpx.Request, *, is_sent: bool) -> bool:
    """Record how far an attempt without a response got; return whether a part of the request was sent.

    `is_sent` is the assumption for transports that do not report it.
    """
    if isinstance(outgoing, LeanRequest):
        is_sent = outgoing.is_sent
        exchange.has_begun |= is_sent or outgoing.has_begun
    else:
        exchange.has_begun = True
    exchange.has_reached |= is_sent
    return is_sent
