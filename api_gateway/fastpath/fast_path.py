"""The fast path: plain requests are decided, forwarded and answered in callbacks of the event loop.

Most requests wait for nothing but the upstream's response. The fast path uses the same objects as `middleware` and
`router`, and so makes the same decisions, but without an ASGI scope, a coroutine or a task. It refuses only requests
that are rate-limited or for which there is no capacity. A request that is not plain, or would be refused for another
reason, is left to the ASGI path before any state has changed. If a request needs the ASGI path later (a response that
is not plain, a broken connection, no idle connection, a retry), the ASGI path continues its exchange.

The module is long because it is one state machine: a plain request, from its bytes to the end of its response.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache, partial
from typing import Protocol
from urllib.parse import unquote

from api_gateway.errors import ClientDisconnected, GatewayError, Unavailable
from api_gateway.fastpath.header_cache import HeaderProfile, RewrittenHeaders
from api_gateway.http1.asgi import FIELDS, ASGIApp, Receive, Scope, Send
from api_gateway.http1.fast_parser import InspectedHeaders, framing_of, pairs_of, parse_request_head, remove_lines
from api_gateway.http1.headers import (
    VIA_NAME,
    Fields,
    ambiguity,
    fields_of,
    forwardable_interim,
    host_name,
    http_date,
    inspected_headers,
    rewrite_request,
    stripped_headers,
)
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.http1.serializer import render_response_head
from api_gateway.limits.refusal import refusal
from api_gateway.middleware import ExchangeMiddleware, IdentityMiddleware, RateLimitMiddleware, is_proxied
from api_gateway.models import NANOSECONDS, Clock, Decision, Exchange, HeaderList, Outcome
from api_gateway.proxy.client_disconnect import CLIENT_LEFT
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.faults import ClientProgress
from api_gateway.proxy.problem_response import problem_response
from api_gateway.proxy.request_id import given_request_id, new_request_id
from api_gateway.proxy.route_table import Route, upstream_target
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.fair_shares import holder_of
from api_gateway.router import Router
from api_gateway.transport.response import NO_LISTENER, NoListener, UpstreamResponse
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

_VIA = b"\r\nvia: 1.1 %b\r\n" % VIA_NAME
MAX_INSPECTED = 32  # inspected header fields of a request; one with more takes the ASGI path
MAX_PROFILED_BYTES = 4_096  # size of the largest header section that is cached
MAX_PROFILES = 1_024  # entries of each profile cache
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
    """Decides on plain requests; see the module. Its only state are caches of header profiles."""

    def __init__(
        self,
        *,
        record: ExchangeMiddleware,
        identify: IdentityMiddleware,
        limit: RateLimitMiddleware,
        router: Router,
        lag: EventLoopShedder,
        clock: Clock,
        clock_ns: Callable[[], int],
    ) -> None:
        """Use the middleware of the ASGI path. `clock` (seconds) and `clock_ns` read the same monotonic clock."""
        self.record = record
        self.limit = limit
        self.router = router
        self._event_loop_shedder = lag
        self.clock = clock
        self._identify = identify
        self._clients = identify.clients
        self._clock_ns = clock_ns
        self._inspected = InspectedHeaders(inspected_headers(router.protected))
        self._profiles = lru_cache(maxsize=MAX_PROFILES)(self._profile_by_client)
        self._anonymous_profiles = lru_cache(maxsize=MAX_PROFILES)(self._build_profile)
        # False if the client id is in a header field that has another meaning too.
        self._has_own_id_header = identify.header not in inspected_headers(frozenset())

    def __repr__(self) -> str:
        return f"<FastPath [{self._profiles.cache_info().currsize} profiles cached]>"

    def try_handle(self, client: Downstream, received: bytes) -> bool:
        """Start or refuse the received request and return True, or change nothing and return False.

        `received` is everything that one read returned: one complete request, or False is returned.
        """
        parts = parse_request_head(received)
        if parts is None:
            return False
        method, raw_path, query, received_headers, body = parts
        headers = client.last_headers
        if headers is None or headers.received != received_headers:
            headers = self._profile(client, received_headers)
            client.last_headers = headers if len(received_headers) <= MAX_PROFILED_BYTES else None
        if headers is None or len(body) != headers.profile.length:
            return False
        if len(received) - len(body) > client.limits.header_bytes:
            return False
        return self._admit(client, headers, method, raw_path, query, body)

    def _admit(  # noqa: C901, PLR0911 - each return is one decision
        self, client: Downstream, headers: RewrittenHeaders, method: str, raw_path: bytes, query: bytes, body: bytes
    ) -> bool:
        """Start or refuse a plain request, or change nothing and return False."""
        profile = headers.profile
        path = raw_path.decode("ascii")
        if "%" in path:
            path = unquote(path)
        if not is_proxied(path):
            return False
        router = self.router
        raw_target = raw_path + query if query else raw_path
        try:
            route, cost = router.routes.find(profile.host, method, path)
            target = upstream_target(route, raw_target)
        except GatewayError:
            return False
        upstream_client = router.upstream_clients[route.upstream]
        limit = self.limit
        if profile.version != self._clients.version or profile.cost != cost:
            if profile.owner is not self:  # built before a reload, which increments the version
                return self._admit_again(client, headers, method, raw_path, query, body)
            self._refresh_charges(profile, cost)
        upstream = upstream_client.upstream
        is_plain = (
            upstream_client.supports_fast_path
            and route.timeout is None
            and (route.fallback is None or upstream.limit is None)
        )
        if profile.client is None or not is_plain or not upstream.accepts_all():
            return False
        now_ns = self._clock_ns()
        started = now_ns / NANOSECONDS
        exchange = Exchange(
            profile.request_id or new_request_id(), method, path, profile.peer, started, profile.client, route.name
        )
        exchange.cost, exchange.charges = cost, profile.charges
        lag = self._event_loop_shedder
        if lag.is_over and lag.sheds(profile.priority):
            self.record.begin(exchange)
            self._refuse(client, exchange, lag.refusal(profile.priority), keep_alive=profile.keep_alive)
            return True
        decision = limit.decide(profile.charges, now_ns)
        self.record.begin(exchange)
        if decision is None:
            FastExchange(self, client, headers, exchange, route, raw_target).await_decision(
                upstream_client, target, body, now_ns
            )
            return True
        self.note(exchange, decision)
        if not decision.allowed:
            self._refuse(client, exchange, refusal(exchange, decision), keep_alive=profile.keep_alive)
            return True
        try:
            FastExchange(self, client, headers, exchange, route, raw_target).send_upstream(
                upstream_client, target, body, exchange.started
            )
        except Unavailable as error:
            self._refuse(client, exchange, error, keep_alive=profile.keep_alive)
        return True

    def _admit_again(
        self, client: Downstream, old: RewrittenHeaders, method: str, raw_path: bytes, query: bytes, body: bytes
    ) -> bool:
        """Build a new profile for header lines that were cached under an earlier configuration, then admit."""
        headers = self._profile(client, old.received)
        client.last_headers = headers if len(old.received) <= MAX_PROFILED_BYTES else None
        if headers is None or len(body) != headers.profile.length:
            return False
        return self._admit(client, headers, method, raw_path, query, body)

    def _refuse(self, client: Downstream, exchange: Exchange, error: GatewayError, *, keep_alive: bool) -> None:
        """Refuse a request for which `begin_exchange` was not called."""
        client.write_response(self.refusal(exchange, error, keep_alive=keep_alive), keep_alive=keep_alive)
        self.record.end(exchange, self.clock())

    def note(self, exchange: Exchange, decision: Decision) -> None:
        """Record the decision and evaluate the candidate limits."""
        exchange.decision = decision
        if self.limit.shadow is not None:
            self.limit.shadow.observe(exchange)

    def refusal(self, exchange: Exchange, error: GatewayError, *, keep_alive: bool) -> bytes:
        """Return a complete problem-details response for `error`, and record the failure."""
        self.record.note_failure(exchange, error)
        exchange.status = error.status
        headers, body = problem_response(error, instance=exchange.path, request_id=exchange.id)
        decision = exchange.decision
        headers += response_headers(exchange, [] if decision is None else self.limit.headers(decision))
        headers.append((b"date", http_date(int(time.time()))))
        if not keep_alive:
            headers.append((b"connection", b"close"))
        exchange.bytes_out = len(body)
        return render_response_head(error.status, None, headers) + (b"" if exchange.method == "HEAD" else body)

    def _refresh_charges(self, profile: HeaderProfile, cost: float) -> None:
        """Set client, charges and priority of a profile from the registry; client None if the store must be asked."""
        profile.client = client = self._identify.client(profile.name, profile.peer)
        if client is not None:
            profile.version, profile.cost = self._clients.version, cost
            profile.charges = self.limit.charges(client, profile.peer, cost)
            profile.priority = self.router.priorities.of(client.quota.name)
            profile.principal = holder_of(client, profile.peer)
        else:
            profile.version = -1

    def _profile(self, client: Downstream, received_headers: bytes) -> RewrittenHeaders | None:
        """Return the analysed and rewritten header lines, or None if the request is not plain."""
        found = self._inspected.find(received_headers)
        if (
            found is None
            or len(found) > MAX_INSPECTED
            or received_headers.count(b"\n") - 1 > client.limits.header_lines
        ):
            return None
        peer = client.client[0] if client.client else "unknown"
        build = self._profiles if len(received_headers) <= MAX_PROFILED_BYTES else self._build_profile
        profile = build(peer, client.scheme, tuple(found))
        return (
            None
            if profile is None
            else RewrittenHeaders(
                received_headers, profile, remove_lines(received_headers, profile.dropped) + profile.added
            )
        )

    def _profile_by_client(
        self, peer: str, scheme: str, found: tuple[tuple[bytes, bytes], ...]
    ) -> HeaderProfile | None:
        """Return the profile, with the client id analysed separately from the other header fields.

        Header sets that differ only in the client id share one analysis, which an invented id does not repeat.
        """
        header = self._identify.header
        names = [pair for pair in found if pair[0].lower() == header]
        if len(names) != 1 or not self._has_own_id_header:
            return self._build_profile(peer, scheme, found)
        anonymous = self._anonymous_profiles(peer, scheme, tuple([pair for pair in found if pair is not names[0]]))
        if anonymous is None:
            return None
        try:
            return anonymous.for_client(self._identify.name(fields_of(names)))
        except GatewayError:
            return None

    def _build_profile(self, peer: str, scheme: str, found: tuple[tuple[bytes, bytes], ...]) -> HeaderProfile | None:
        fields = fields_of(found)
        framing = framing_of(fields)
        if framing is None or framing[0] > self.router.max_body_bytes or ambiguity(fields, "1.1") is not None:
            return None
        try:
            caller = self._identify.caller(peer, fields)
        except GatewayError:
            return None
        dropped = stripped_headers(self.router.protected, caller[1])
        return HeaderProfile(
            owner=self,
            framing=framing,
            host=host_name(fields),
            caller=caller,
            request_id=given_request_id(fields),
            dropped=[pair for pair in found if pair[0].lower() in dropped],
            added=self._added_lines(peer, scheme, fields, is_trusted=caller[1]),
        )

    def _added_lines(self, peer: str, scheme: str, fields: Fields, *, is_trusted: bool) -> bytes:
        """Return the header lines that are added to the request upstream, without `Host` and `X-Request-ID`."""
        pairs = rewrite_request(
            [],
            fields,
            host=b"",
            peer=peer,
            scheme=scheme,
            request_id=b"",
            version="1.1",
            is_trusted=is_trusted,
            protected=self.router.protected,
        )
        return b"".join([b"%b: %b\r\n" % pair for pair in pairs[1:-1]])


class FastExchange(UpstreamResponse):
    """One request on the fast path, and the response to it.

    States: deciding (`await_decision`, no attempt), sent (`send_upstream`, an attempt and a connection), responding
    (`exchange.status` is set), ended. In each state but the last, the exchange may fall back: the ASGI path continues
    it, and this object then only receives the response.
    """

    has_fallen_back: bool  # the ASGI path has taken over, or the exchange was aborted
    is_relayed = True  # until it falls back
    attempt: Attempt | None  # set by `send_upstream`
    kept: bytes | None = None  # the body, set by `send_upstream` if a retry may send it again

    def __init__(
        self,
        fast_path: FastPath,
        client: Downstream,
        headers: RewrittenHeaders,
        exchange: Exchange,
        route: Route,
        raw_target: bytes,
    ) -> None:
        """`raw_target` is the request target as the client sent it."""
        self.connection = self.error = self.attempt = None
        self.is_to_head = exchange.method == "HEAD"
        self.listener = NO_LISTENER
        self.pieces = []
        self.has_fallen_back = False
        self.exchange = exchange
        self._fast_path = fast_path
        self._client = client
        self._headers = headers
        self.keep_alive = headers.profile.keep_alive
        self._route = route
        self._raw_target = raw_target

    def __repr__(self) -> str:
        if self.has_fallen_back:
            state = "fallen back or aborted"
        else:
            state = "responding" if self.exchange.status else "deciding" if self.connection is None else "sent"
        return f"<FastExchange {self.exchange.method} {self.exchange.path} [{state}]>"

    @property
    def is_head_sent(self) -> bool:
        """True once the head of the response has been sent, and with it the `Connection` field."""
        return self.exchange.status != 0

    # Towards the upstream

    def await_decision(self, upstream_client: UpstreamClient, target: bytes, body: bytes, now_ns: int) -> None:
        """Ask the store for the decision, and continue when it arrives."""
        self._client.begin_exchange(self)
        limit = self._fast_path.limit
        limit.decide_async(
            self._headers.profile.charges, now_ns, partial(self._on_decision, upstream_client, target, body)
        )

    def _on_decision(self, upstream_client: UpstreamClient, target: bytes, body: bytes, decision: Decision) -> None:
        if self.has_fallen_back:  # aborted: the client has disconnected meanwhile
            return
        fast_path, exchange = self._fast_path, self.exchange
        fast_path.note(exchange, decision)
        if not decision.allowed:
            self._refuse(refusal(exchange, decision))
        elif upstream_client.upstream.accepts_all():
            try:
                self.send_upstream(upstream_client, target, body, fast_path.clock())
            except Unavailable as error:
                self._refuse(error)
        else:
            self._fall_back(body, is_sent=False)

    def _refuse(self, error: GatewayError) -> None:
        fast_path, exchange = self._fast_path, self.exchange
        self._client.transport.write(fast_path.refusal(exchange, error, keep_alive=self.keep_alive))
        self._client.end_exchange(keep_alive=self.keep_alive)
        fast_path.record.end(exchange, fast_path.clock())

    def send_upstream(self, upstream_client: UpstreamClient, target: bytes, body: bytes, now: float) -> None:
        """Send the request on an idle connection; fall back if there is none. Raises Unavailable if refused."""
        exchange, profile = self.exchange, self._headers.profile
        exchange.upstream = self._route.upstream
        upstream_client.retries.budget.deposit(exchange.started)
        checkout = upstream_client.upstream.acquire
        is_safe = exchange.method in IDEMPOTENT
        self.attempt = attempt = checkout(
            now, profile.charges[0].key, priority=profile.priority, is_safe=is_safe, principal=profile.principal
        )
        # The ASGI path settles a probe before the end of a long response.
        is_probe = attempt.target_ticket is not None and attempt.target_ticket.is_probe
        connection = None if is_probe else upstream_client.idle_connection(attempt.target, profile.principal)
        if connection is None:  # the ASGI path opens or awaits one
            self._fall_back(body, is_sent=False)
            return
        origin = upstream_client.origins[attempt.target]
        exchange.target, exchange.sent_at, exchange.bytes_in = attempt.target.url, now, len(body)
        self.connection, self.timeouts = connection, upstream_client.limits
        if body and len(body) <= upstream_client.retries.policy.max_body_bytes:
            self.kept = body
        self._client.begin_exchange(self)
        connection.start(
            self,
            b"%b %b HTTP/1.1\r\nhost: %b%bx-request-id: %b\r\n\r\n%b"
            % (exchange.method.encode(), target, origin.netloc, self._headers.sent, exchange.id.encode(), body),
        )

    # From the upstream

    def on_complex_head(self) -> None:
        """Fall back for a response whose head is not plain."""
        if not self.has_fallen_back:
            self.listener = _Interim(self._client)
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
        return self.status in self._fast_path.router.upstream_clients[self._route.upstream].retried_statuses

    def _head(self, now: float) -> bytes:
        """Return the head of the response to the client, and record status, outcome and cost."""
        fast_path, exchange = self._fast_path, self.exchange
        exchange.status, exchange.source, exchange.attempts = self.status, "upstream", 1
        assert self.attempt is not None and exchange.decision is not None  # noqa: S101, PT018 - set before sending
        fast_path.router.outcomes.on_head(exchange, self.attempt, self.status, now)
        if self.cost is not None:
            fast_path.router.on_cost(exchange, (self.cost,))
        headers = fast_path.limit.lines(exchange.decision)
        date = b"" if self.has_date else b"date: %b\r\n" % http_date(int(time.time()))
        close = b"" if self.keep_alive else b"connection: close\r\n"
        return b"%b%bx-request-id: %b\r\n%b%b%b\r\n" % (
            self.passed,
            _VIA,
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
        """Close the upstream connection and end the exchange with the outcome IGNORED."""
        self.has_fallen_back = True
        self.exchange.attempts = 1
        self.close()
        self._end(self._fast_path.clock(), Outcome.IGNORED, keep_alive=False)

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
        assert exchange.decision is not None  # noqa: S101 - set before the exchange starts or falls back
        exchange.response_headers = response_headers(exchange, self._fast_path.limit.headers(exchange.decision))
        app = partial(self._serve, self if is_sent else None)
        self._client.run_asgi(
            app, exchange.method, self._raw_target, pairs_of(self._headers.received), body, keep_alive=self.keep_alive
        )

    def _serve(self, response: UpstreamResponse | None, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Continue the exchange; this is the ASGI application given to `run_asgi`."""
        scope[FIELDS] = fields_of(scope["headers"])
        router, exchange, route = self._fast_path.router, self.exchange, self._route
        go_on = partial(
            partial(router.forward, exchange, route)
            if self.attempt is None
            else partial(router.continue_exchange, exchange, route, self.attempt, response, kept=self.kept),
            is_trusted=self._headers.profile.is_trusted,
        )
        return self._fast_path.record.conclude(self.exchange, go_on, scope, receive, send)


def response_headers(exchange: Exchange, limits: HeaderList) -> HeaderList:
    """Return the header fields of every response to a request that has a decision: request id and `limits`."""
    return [(b"x-request-id", exchange.id.encode()), *limits]


class _Interim(NoListener):
    """Forwards interim responses until the ASGI path has set its own listener."""

    def __init__(self, client: Downstream) -> None:
        self._client = client

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """See `ResponseListener`."""
        self._client.transport.write(render_response_head(status, reason, forwardable_interim(headers)))
