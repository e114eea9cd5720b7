"""The fast path: plain requests are admitted, forwarded and relayed in callbacks of the event loop.

Most requests wait for nothing but the upstream's response. They need no ASGI scope, no coroutine and no task. A
request whose head is not plain is left to the general parser and the ASGI path, which uses the same `Admission`. If an
admitted request needs the ASGI path (a response that is not plain, a broken connection, no idle connection, a
deadline, a retry), that path continues its exchange.

The module is long because it is one state machine: a plain request, from its bytes to the end of its response.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

from api_gateway.errors import ClientDisconnected, GatewayError, Unavailable
from api_gateway.http1.asgi import FIELDS, ASGIApp, Receive, Scope, Send
from api_gateway.http1.fast_parser import pairs_of, parse_request_head
from api_gateway.http1.headers import fields_of, forwardable_interim, http_date
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.http1.serializer import render_response_head
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.middleware import ExchangeMiddleware, is_proxied
from api_gateway.models import NANOSECONDS, Clock, Exchange, HeaderList, Outcome
from api_gateway.proxy.admission import Admission, RequestPlan, Wait
from api_gateway.proxy.attribution import ClientProgress, outcome_of_abort
from api_gateway.proxy.client_disconnect import CLIENT_LEFT
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.header_facts import MAX_REMEMBERED_BYTES, HeaderReader, RewrittenHeaders
from api_gateway.proxy.problem_response import problem_message
from api_gateway.proxy.url_rewriting import Authorities
from api_gateway.router import Router
from api_gateway.transport.response import NO_LISTENER, NoListener, UpstreamResponse
from api_gateway.upstreams.upstream import Attempt

_HAS_KEY = re.compile(rb"\r\n(?i:idempotency-key): ")  # makes any request repeatable, see `retry.is_repeatable`
_MIN_RETRIED_STATUS = 429  # the lowest status that a retry policy can name
_MAX_JOINED = 65_536  # bytes of a body that are copied to write them together with the head


class HeaderLimits(Protocol):
    """Limits of a request head."""

    @property
    def header_bytes(self) -> int:
        """Maximum size of the head in bytes, line breaks included."""
        ...

    @property
    def header_lines(self) -> int:
        """Maximum number of header lines."""
        ...


class Downstream(Protocol):
    """A downstream connection as the fast path uses it."""

    transport: asyncio.Transport
    client: tuple[str, int] | None
    scheme: str
    limits: HeaderLimits
    is_write_paused: bool
    last_headers: RewrittenHeaders | None  # of the previous plain request

    def begin_exchange(self, exchange: "FastExchange") -> None:
        """Hold further input until the exchange ends, and report events of the connection to it."""
        ...

    def end_exchange(self, *, keep_alive: bool) -> None:
        """Process the next request after a complete response, or close the connection."""
        ...

    def write_response(self, response: bytes, *, keep_alive: bool) -> None:
        """Send a complete response to a request for which `begin_exchange` was not called."""
        ...

    def run_asgi(
        self, app: ASGIApp, method: str, target: bytes, headers: HeaderList, body: bytes, *, keep_alive: bool
    ) -> None:
        """Serve the request by `app` on the ASGI path, whether or not `begin_exchange` was called for it."""
        ...


class FastPath:
    """Admits plain requests; see the module. Has no state but configuration."""

    def __init__(
        self,
        *,
        record: ExchangeMiddleware,
        admission: Admission,
        headers: HeaderReader,
        router: Router,
        clock: Clock,
        clock_ns: Callable[[], int],
    ) -> None:
        """Use the objects of the ASGI path. `clock` (seconds) and `clock_ns` read the same monotonic clock."""
        self.record = record
        self.admission = admission
        self.router = router
        self.clock = clock
        self.clock_ns = clock_ns
        self.limit_headers = RateLimitHeaders()
        self.via = headers.via.field("1.1")
        self.via_line = b"\r\n%b: %b\r\n" % self.via
        self._headers = headers

    def __repr__(self) -> str:
        return f"<FastPath [{self._headers!r}]>"

    def try_handle(self, client: Downstream, received: bytes) -> bool:  # noqa: C901 - each branch is one reason
        """Start or refuse the received request and return True, or change nothing and return False.

        `received` is everything that one read returned: one complete request, or False is returned.
        """
        parts = parse_request_head(received)
        if parts is None:
            return False
        method, raw_path, query, lines, body = parts
        headers = client.last_headers
        if headers is None or headers.received != lines or headers.facts.owner is not self._headers:
            headers = self._read(client, lines)
        if headers is None or len(body) != headers.facts.length:
            return False
        if len(received) - len(body) > client.limits.header_bytes:
            return False
        path = raw_path.decode("ascii")
        if "%" in path:
            path = unquote(path)
        if not is_proxied(path):
            return False
        target = raw_path + query if query else raw_path
        plan = self.admission.plan(headers.facts, method, path, target, self.clock_ns())
        self.record.begin(plan.exchange)
        try:
            result = self.admission.decide(plan)
        except Exception as error:  # noqa: BLE001 - a defect, which must not end the connection without a response
            result = self.record.internal_error(plan.exchange, error)
        if isinstance(result, Wait):
            FastExchange(self, client, headers, plan).wait(result, body)
            return True
        if result is None:
            result = FastExchange(self, client, headers, plan).forward(body)
        if result is not None:
            self._refuse(client, plan, result)
        return True

    def _read(self, client: Downstream, lines: bytes) -> RewrittenHeaders | None:
        """Return the meaning of header lines, which the connection keeps for its next request; None if not plain."""
        peer = client.client[0] if client.client else "unknown"
        headers = self._headers.read_lines(peer, client.scheme, lines, client.limits.header_lines)
        client.last_headers = headers if len(lines) <= MAX_REMEMBERED_BYTES else None
        return headers

    def _refuse(self, client: Downstream, plan: RequestPlan, error: GatewayError) -> None:
        """Refuse a request for which `begin_exchange` was not called."""
        exchange = plan.exchange
        response, keep_alive = self.refusal(exchange, error, keep_alive=plan.facts.keep_alive)
        client.write_response(response, keep_alive=keep_alive)
        self.record.end(exchange, self.clock())

    def refusal(self, exchange: Exchange, error: GatewayError, *, keep_alive: bool) -> tuple[bytes, bool]:
        """Record the failure; return the problem details as a response, and whether to keep the connection."""
        self.record.note_failure(exchange, error)
        exchange.status = error.status
        decision, closes = exchange.decision, "connection" in error.headers
        lines = (
            b"x-request-id: ",
            exchange.id.encode(),
            b"\r\n" if decision is None else b"\r\n" + self.limit_headers.lines(decision),
            b"date: ",
            http_date(int(time.time())),
            b"\r\n" if keep_alive or closes else b"\r\nconnection: close\r\n",
        )
        head, body = problem_message(error, instance=exchange.path, request_id=exchange.id, lines=b"".join(lines))
        exchange.bytes_out = len(body)
        return head if exchange.method == "HEAD" else head + body, keep_alive and not closes

    def response_headers(self, exchange: Exchange) -> HeaderList:
        """Return the header fields of every response: request id and, if there is a decision, the limits."""
        own = [(b"x-request-id", exchange.id.encode())]
        decision = exchange.decision
        return own if decision is None else own + self.limit_headers.headers(decision)


class FastExchange(UpstreamResponse):
    """One request on the fast path, and the response to it.

    States: waiting (`wait`, no attempt), sent (`forward`, an attempt and a connection), responding
    (`exchange.status` is set), ended. In each state but the last, the exchange may fall back: the ASGI path continues
    it, and this object then only receives the response.
    """

    has_fallen_back: bool  # the ASGI path has taken over, or the exchange was aborted
    is_relayed = True  # until it falls back
    attempt: Attempt | None  # set by `forward`
    kept: bytes | None = None  # the body, set when it is sent if a retry may send it again

    def __init__(self, fast_path: FastPath, client: Downstream, headers: RewrittenHeaders, plan: RequestPlan) -> None:
        self.connection = self.error = self.attempt = None
        self.exchange = exchange = plan.exchange
        self.is_to_head = exchange.method == "HEAD"
        self.listener = NO_LISTENER
        self.pieces = []
        self.has_fallen_back = False
        self.plan = plan
        self._fast_path = fast_path
        self._client = client
        self._headers = headers
        self.keep_alive = headers.facts.keep_alive

    def __repr__(self) -> str:
        if self.has_fallen_back:
            state = "fallen back or aborted"
        else:
            state = "responding" if self.exchange.status else "waiting" if self.connection is None else "sent"
        return f"<FastExchange {self.exchange.method} {self.exchange.path} [{state}]>"

    @property
    def is_head_sent(self) -> bool:
        """True once the head of the response has been sent, and with it the `Connection` field."""
        return self.exchange.status != 0

    # Towards the upstream

    def wait(self, question: Wait, body: bytes) -> None:
        """Ask a question of admission, and continue when the reply arrives."""
        self._client.begin_exchange(self)
        question.ask(partial(self._on_reply, question, body))

    def _on_reply(self, question: Wait, body: bytes, reply: Any) -> None:
        if self.has_fallen_back:  # aborted: the client has disconnected meanwhile
            return
        fast_path = self._fast_path
        try:
            result = fast_path.admission.resume(self.plan, question, reply, fast_path.clock_ns())
        except Exception as error:  # noqa: BLE001 - as in `FastPath.try_handle`
            result = fast_path.record.internal_error(self.exchange, error)
        if isinstance(result, Wait):
            result.ask(partial(self._on_reply, result, body))
            return
        if result is None:
            result = self.forward(body)
        if result is not None:
            self._refuse(result)

    def _refuse(self, error: GatewayError) -> None:
        fast_path, exchange = self._fast_path, self.exchange
        response, keep_alive = fast_path.refusal(exchange, error, keep_alive=self.keep_alive)
        self._client.transport.write(response)
        self._client.end_exchange(keep_alive=keep_alive)
        fast_path.record.end(exchange, fast_path.clock())

    def forward(self, body: bytes) -> Unavailable | None:
        """Send an admitted request on an idle connection; fall back if that is not possible.

        Returns the error with which the upstream refuses it.
        """
        plan = self.plan
        route, router = plan.route, self._fast_path.router
        assert route is not None  # noqa: S101 - the request is admitted
        upstream_client = router.upstream_clients[route.upstream]
        upstream = upstream_client.upstream
        if (
            plan.deadline is not None
            or not upstream_client.supports_fast_path
            or (route.fallback is not None and upstream.limit is not None)
            or not upstream.accepts_all()
        ):
            self._fall_back(body, is_sent=False)
            return None
        exchange, now = self.exchange, plan.now_ns / NANOSECONDS
        exchange.upstream = route.upstream
        upstream_client.retries.budget.deposit(exchange.started)
        is_safe = exchange.method in IDEMPOTENT or _HAS_KEY.search(self._headers.received) is not None
        try:
            self.attempt = attempt = upstream.acquire(
                now, exchange.client_key, priority=plan.priority, is_safe=is_safe, principal=plan.principal
            )
        except Unavailable as error:
            return error.with_traceback(None)
        # The ASGI path settles a probe before the end of a long response.
        is_probe = attempt.target_ticket is not None and attempt.target_ticket.is_probe
        connection = None if is_probe else upstream_client.idle_connection(attempt.target, plan.principal)
        if connection is None:  # the ASGI path opens or awaits one
            self._fall_back(body, is_sent=False)
            return None
        host = upstream_client.hosts[attempt.target] or upstream_client.host_of(
            attempt.target, self._headers.facts.host_field
        )
        if route.url_rewriter is not None:
            host += route.url_rewriter.request_line
        exchange.target, exchange.sent_at, exchange.bytes_in = attempt.target.url, now, len(body)
        self.connection, self.timeouts = connection, upstream_client.limits
        if body and len(body) <= upstream_client.retries.policy.max_body_bytes:
            self.kept = body
        self._client.begin_exchange(self)
        connection.start(
            self,
            b"%b %b HTTP/1.1\r\nhost: %b%bx-request-id: %b\r\n\r\n%b"
            % (exchange.method.encode(), plan.target, host, self._headers.sent, exchange.id.encode(), body),
        )
        return None

    # From the upstream

    def on_complex_head(self) -> None:
        """Fall back for a response whose head is not plain."""
        if not self.has_fallen_back:
            self.listener = _Interim(self._client, self._fast_path.via)
            self._fall_back(b"", is_sent=True)

    def on_progress(self) -> None:
        """Forward what has arrived of the response."""
        if self.has_fallen_back or self.error is not None:
            self._on_error()
            return
        client, exchange = self._client, self.exchange
        if self.status >= _MIN_RETRIED_STATUS and not exchange.status and self._is_retried_status():
            self._fall_back(b"", is_sent=True)
            return
        now = self._fast_path.clock()
        piece = self.take()
        exchange.bytes_out += len(piece)
        if exchange.status:
            client.transport.write(piece)
        elif len(piece) > _MAX_JOINED:
            client.transport.writelines((self._head(now), piece))
        else:
            client.transport.write(self._head(now) + piece)
        connection = self.connection
        if connection is None:
            self._end(now, Outcome.SUCCESS, keep_alive=self.keep_alive)
        elif client.is_write_paused:
            connection.pause_reading()
            connection.timer.clear()
        else:
            connection.resume_reading()  # a large read pauses it
            connection.set_timer("idle")

    def _is_retried_status(self) -> bool:
        """Tell whether the retry policy names the status, so that the ASGI path must decide on a retry."""
        route = self.plan.route
        assert route is not None  # noqa: S101 - the request is admitted
        return self.status in self._fast_path.router.upstream_clients[route.upstream].retried_statuses

    def _head(self, now: float) -> bytes:
        """Return the head of the response to the client, and record status, outcome and cost."""
        fast_path, exchange = self._fast_path, self.exchange
        exchange.status, exchange.source, exchange.attempts = self.status, "upstream", 1
        assert self.attempt is not None and exchange.decision is not None  # noqa: S101, PT018 - set before sending
        fast_path.router.outcomes.on_head(exchange, self.attempt, self.status, now)
        if self.cost is not None:
            fast_path.router.on_cost(exchange, (self.cost,))
        route, passed = self.plan.route, self.passed
        if route is not None and route.url_rewriter is not None:
            upstream_client = fast_path.router.upstream_clients[route.upstream]
            authorities = Authorities.of(upstream_client, self.attempt.target, self._headers.facts.host_field)
            passed = route.url_rewriter.rewrite_lines(passed, authorities)
        headers = fast_path.limit_headers.lines(exchange.decision)
        date = b"" if self.has_date else b"date: %b\r\n" % http_date(int(time.time()))
        close = b"" if self.keep_alive else b"connection: close\r\n"
        return b"%b%bx-request-id: %b\r\n%b%b%b\r\n" % (
            passed,
            fast_path.via_line,
            exchange.id.encode(),
            headers,
            date,
            close,
        )

    def _on_error(self) -> None:
        """Fall back; or close the connection if the response has begun, so that the client detects the error."""
        if self.has_fallen_back:
            super().on_progress()
        elif self.exchange.status and self.error is not None:
            assert self.attempt is not None  # noqa: S101 - set before sending
            client = ClientProgress(waited=self.reader_waited)
            failure = self._fast_path.router.outcomes.on_broken_body(self.exchange, self.attempt, self.error, client)
            note_failure(self.exchange, failure)
            self._end(self._fast_path.clock(), Outcome.IGNORED, keep_alive=False)  # the attempt is settled already
        else:
            self._fall_back(b"", is_sent=True)

    # From the client

    def on_writable(self) -> None:
        """Read from the upstream again: the client has read enough."""
        if self.connection is not None:
            self.connection.resume_reading()
            self.connection.set_timer("idle" if self.exchange.status else "read")

    def on_client_disconnected(self) -> None:
        """Abort the exchange: its client has disconnected."""
        note_failure(self.exchange, ClientDisconnected(CLIENT_LEFT))
        self._abort()

    def on_forced_close(self) -> None:
        """Abort the exchange: the drain timeout has passed."""
        self._fast_path.record.note_cut_off(self.exchange)
        self._abort()

    def _abort(self) -> None:
        """Close the upstream connection and end the exchange."""
        self.has_fallen_back = True
        self.exchange.attempts = 1
        self.close()
        outcome = outcome_of_abort(has_head=self.exchange.head_at is not None)
        self._end(self._fast_path.clock(), outcome, keep_alive=False)

    # The end

    def _end(self, now: float, outcome: Outcome, *, keep_alive: bool) -> None:
        if self.attempt is not None:
            if self.attempt.slow is not None:  # a slow call may open the breaker
                self._fast_path.router.outcomes.settle(self.attempt, outcome, now)
            self.attempt.release(now, outcome)
        self._client.end_exchange(keep_alive=keep_alive)
        self._fast_path.record.end(self.exchange, now)

    def _fall_back(self, body: bytes, *, is_sent: bool) -> None:
        """Continue on the ASGI path, with a request that is already sent or one whose `body` is still to be sent."""
        self.has_fallen_back, self.is_relayed = True, False
        exchange = self.exchange
        exchange.response_headers = self._fast_path.response_headers(exchange)
        app = partial(self._serve, self if is_sent else None)
        self._client.run_asgi(
            app,
            exchange.method,
            self.plan.raw_target,
            pairs_of(self._headers.received),
            body,
            keep_alive=self.keep_alive,
        )

    def _serve(self, response: UpstreamResponse | None, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Continue the exchange; this is the ASGI application given to `run_asgi`."""
        scope[FIELDS] = fields_of(scope["headers"])
        router = self._fast_path.router
        go_on = (
            partial(router.forward, self.plan)
            if self.attempt is None
            else partial(router.continue_exchange, self.plan, self.attempt, response, kept=self.kept)
        )
        return self._fast_path.record.conclude(self.exchange, go_on, scope, receive, send)


class _Interim(NoListener):
    """Forwards interim responses until the ASGI path has set its own listener."""

    def __init__(self, client: Downstream, via: tuple[bytes, bytes]) -> None:
        self._client = client
        self._via = via

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ResponseListener`."""
        self._client.transport.write(render_response_head(status, reason, forwardable_interim(headers, self._via)))
