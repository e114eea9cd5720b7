"""Routes and forwarding: match a request to its route, try the upstream, stream both ways, settle the try.

The only loop is the retry, and it ends with the answer's first byte. Which target, whether the breaker admits and
what a result means to it is decided in `balancer` and `circuit_breaker`; how bytes travel, in the transport.
"""

import asyncio
import posixpath
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import httpx

from api_gateway.answer import Answer, Incoming
from api_gateway.balancer import Lease, RetryBudget, Target, Upstream
from api_gateway.circuit_breaker import Transition
from api_gateway.connection import Connection
from api_gateway.errors import (
    BadRequest,
    BodyTooLarge,
    ClientDisconnected,
    GatewayError,
    MethodNotAllowed,
    NoRoute,
    Overloaded,
    Unavailable,
    UpstreamConnectError,
    UpstreamConnectTimeout,
    UpstreamFailed,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.headers import (
    COST,
    Fields,
    fields_of,
    for_client,
    for_upstream,
    framing,
    interim_to_pass,
    trailers_to_pass,
)
from api_gateway.link import LINK, Link
from api_gateway.models import Clock, Exchange, HeaderList, Outcome
from api_gateway.outgoing import NO_BODY, NoBody, Origin, Outgoing
from api_gateway.transport import UpstreamTransport
from api_gateway.tunnel import Tunnel

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
PROXIED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
REFUSED_METHODS = frozenset({"TRACE", "CONNECT"})  # RFC 9110 section 9.3.8: TRACE would echo credentials
SWITCHING_PROTOCOLS = 101
FIELDS = "gateway.fields"  # the key of the scope under which the request's headers lie by name
_BODILESS = frozenset({204, 304})
_MAX_HOP_DIGITS = 9  # of Max-Forwards; one that says more says nothing
_NO_LENGTH = frozenset({204})
_CLASSES = tuple(f"{number}xx" for number in range(6))
LEFT = "The client left before its answer was complete."
PATIENCE = 0.05  # seconds an upstream may take before we also watch for the client's leaving
PROBE_SETTLES_AFTER = 5.0  # seconds after which a probe whose answer still streams counts as a success

# httpx's failures in our words, most specific first. What the client is told names no address.
_TRANSLATION: tuple[tuple[type[Exception], type[GatewayError], str], ...] = (
    (httpx.PoolTimeout, Overloaded, "no connection to it came free in time"),
    (httpx.ConnectTimeout, UpstreamConnectTimeout, "it did not accept a connection in time"),
    (httpx.TimeoutException, UpstreamTimeout, "it was silent for too long"),
    (httpx.ConnectError, UpstreamConnectError, "no connection to it could be made"),
    (httpx.UnsupportedProtocol, UpstreamConnectError, "no connection to it could be made"),
    (httpx.ProtocolError, UpstreamProtocolError, "its answer was not valid HTTP"),
    (httpx.TransportError, UpstreamReset, "its connection broke before the answer was complete"),
)


@dataclass(frozen=True, slots=True)
class CostRule:
    """What matching requests cost in tokens instead of the route's own cost; None matches any.

    `candidate_cost` is a cost that is tried beside it, see `Shadow`.
    """

    methods: frozenset[str] | None
    path: str | None
    cost: float
    candidate_cost: float | None = None

    def __str__(self) -> str:
        methods = "any method" if self.methods is None else " ".join(sorted(self.methods))
        return f"{methods} {'anywhere' if self.path is None else self.path}"

    def matches(self, method: str, path: str) -> bool:
        """Tell whether the rule speaks of this request."""
        return (self.methods is None or method in self.methods) and (self.path is None or is_below(path, self.path))


@dataclass(frozen=True, slots=True)
class Route:
    """One way through the gateway. `host`, `methods` None match any; the first rule of `costs` that matches counts."""

    name: str
    path: str
    upstream: str
    strip_prefix: str = ""
    methods: frozenset[str] | None = None
    host: str | None = None
    cost: float = 1.0
    costs: tuple[CostRule, ...] = ()
    candidate_cost: float | None = None

    def cost_of(self, method: str, path: str) -> float:
        """Return what a request costs, in tokens."""
        rule = self._rule_of(method, path)
        return self.cost if rule is None else rule.cost

    def rule_for(self, method: str, path: str) -> CostRule | None:
        """Return the rule that says what a request costs, or None if that is the route itself."""
        return self._rule_of(method, matching_path(path))

    def _rule_of(self, method: str, path: str) -> CostRule | None:
        return next((rule for rule in self.costs if rule.matches(method, path)), None)

    def candidate_cost_of(self, method: str, path: str) -> float | None:
        """Return the cost that is tried beside the one a request has, or None if there is none."""
        rule = self.rule_for(method, path)
        return self.candidate_cost if rule is None else rule.candidate_cost

    @property
    def has_candidate(self) -> bool:
        """True if some of its requests have a cost that is tried."""
        return self.candidate_cost is not None or any(rule.candidate_cost is not None for rule in self.costs)


def is_below(path: str, prefix: str) -> bool:
    """Tell whether `path` is `prefix` or lies below it, by whole segments."""
    return prefix in (path, "/") or path.startswith(f"{prefix}/")


class RouteTable:
    """Finds the route of a request: the longest prefix, and among equals the one for the host before one for any.

    `path` is percent-decoded. Dot segments and repeated slashes are resolved for matching only, so that a spelling
    cannot reach a cheaper cost rule; what travels is the path as it was sent.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes: dict[str, list[Route]] = {}
        for route in sorted(routes, key=lambda route: route.host is None):
            self._routes.setdefault(route.path, []).append(route)
        # No more segments than the deepest route has are ever looked at, however many a path holds.
        self._depth = max((path.count("/") for path in self._routes), default=0)

    def __repr__(self) -> str:
        return f"<RouteTable {sorted(self._routes)}>"

    def find(self, host: str, method: str, path: str) -> tuple[Route, float]:
        """Return the route of a request and what it costs, in tokens.

        Raises NoRoute, or MethodNotAllowed naming what is allowed.
        """
        if "//" in path or "/." in path:
            path = matching_path(path)
        prefix = path
        if path.count("/") > self._depth:
            prefix = "/".join(path.split("/", self._depth + 1)[: self._depth + 1])
        while prefix:
            allowed: set[str] = set()
            for route in self._routes.get(prefix, ()):
                if route.host is None or route.host == host:
                    if route.methods is None or method in route.methods:
                        return route, route.cost_of(method, path) if route.costs else route.cost
                    allowed |= route.methods
            if allowed:
                names = ", ".join(sorted(allowed))
                raise MethodNotAllowed(f"{path} takes {names}, not {method}.", headers={"allow": names})
            prefix = prefix.rpartition("/")[0]
        raise NoRoute(f"No route matches {path}.")


def matching_path(path: str) -> str:
    """Return the decoded `path` with dot segments and repeated slashes resolved (RFC 3986 section 5.2.4)."""
    if "//" in path or "/." in path:
        return "/" + posixpath.normpath(path).lstrip("/")
    return path


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; `total` None is no limit."""

    connect: float
    response: float
    idle: float
    total: float | None
    tunnel: float = 3600.0  # without a byte in either direction, once protocols were switched


class Service:
    """An upstream with what is needed to send to it. `attempts` counts the first try too."""

    def __init__(
        self,
        upstream: Upstream,
        transport: httpx.AsyncBaseTransport,
        timeouts: Timeouts,
        *,
        attempts: int = 1,
        retry_budget: float = 0.0,
    ) -> None:
        self.upstream = upstream
        self.transport = transport
        self.total_timeout = timeouts.total
        self.attempts = attempts
        self.retry_budget = RetryBudget(retry_budget)
        self.origins = {target: Origin.of(httpx.URL(target.url)) for target in upstream.targets}
        self.speaks_pairs = isinstance(transport, UpstreamTransport)
        self.takes_passages = self.speaks_pairs and timeouts.total is None
        self._take_idle: dict[Target, Callable[[], Connection | None]] = {}
        self.tunnel_timeout = timeouts.tunnel
        self.limits = {
            "connect": timeouts.connect,
            "pool": timeouts.connect,
            "read": timeouts.response,
            "write": timeouts.idle,
            "idle": timeouts.idle,
        }

    def __repr__(self) -> str:
        return f"<Service {self.upstream!r}>"

    def idle_connection(self, target: Target) -> Connection | None:
        """Take a connection of our own transport to `target`, if one is free."""
        take = self._take_idle.get(target)
        if take is None:
            assert isinstance(self.transport, UpstreamTransport)  # noqa: S101 - no other takes passages
            take = self._take_idle[target] = self.transport.pool(self.origins[target]).take_idle
        return take()


class RequestBody(httpx.AsyncByteStream):
    """The client's body, piece by piece as it arrives; raises BodyTooLarge and ClientDisconnected."""

    def __init__(self, receive: Receive, limit: int, exchange: Exchange) -> None:
        self._receive = receive
        self._limit = limit
        self._exchange = exchange
        self.is_started = False
        self.is_finished = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what the client sends."""
        self.is_started = True
        while not self.is_finished:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected("The client left while sending.")
            piece = message.get("body", b"")
            self._exchange.bytes_in += len(piece)
            if self._exchange.bytes_in > self._limit:
                raise _body_too_large(self._limit)
            self.is_finished = not message.get("more_body", False)
            if piece:
                yield piece


class SentBody(NoBody):
    """The body of a request that has been sent already, and cannot be once more."""

    is_started = True


SENT_BODY = SentBody()


class DisconnectWatch:
    """Ends the current task once the client has left, before a server that does not tell so by itself.

    It asks after `PATIENCE` only: most answers are faster. Used as `with`; what the task was doing is cancelled, and
    leaves the block as ClientDisconnected.
    """

    def __init__(self, receive: Receive, body: RequestBody | NoBody) -> None:
        self._receive = receive
        self._body = body
        self._has_left = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        """Start the clock."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs is in a task
        self._task = task
        self._timer = loop.call_later(PATIENCE, self._start, loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop looking; turn our own cancellation into ClientDisconnected."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._has_left:
            if kind is asyncio.CancelledError and self._task.uncancel() == 0:
                raise ClientDisconnected(LEFT) from error
            self._task.uncancel()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._body.is_finished:
            self._watcher = loop.create_task(self._watch())
        else:  # the body's own reading notices a client that leaves
            self._timer = loop.call_later(PATIENCE, self._start, loop)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()


class Router:
    """Forwards exchanges to upstreams."""

    def __init__(
        self,
        routes: RouteTable,
        services: Mapping[str, Service],
        *,
        clock: Clock,
        max_body_bytes: int,
        protected: frozenset[bytes] = frozenset(),
        omit: frozenset[bytes] = frozenset(),
        observe_try: Callable[[str, str, float | None, float], None],
        on_transition: Callable[[str, Transition], None],
        on_cost: Callable[[Exchange, Sequence[bytes]], None] | None = None,
    ) -> None:
        """`protected` request headers cannot be named away by `Connection`; `omit` answer headers are left out.

        `on_cost` hears of an answer that tells its cost, before its head is sent.
        """
        self.routes = routes
        self.services = dict(services)
        self._clock = clock
        self.max_body_bytes = max_body_bytes
        self.protected = protected
        self._omit = omit
        self._omit_with_length = omit | {b"content-length"}
        self._observe_try = observe_try
        self._on_transition = on_transition
        self.on_cost = on_cost or _ignore_cost

    def forward(
        self,
        exchange: Exchange,
        route: Route,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        is_trusted: bool,
    ) -> Awaitable[None]:
        """Send the request to the route's upstream and its answer to the client. Raises GatewayError."""
        refuse_method(exchange.method)
        service = self.services[route.upstream]
        exchange.upstream = route.upstream
        link: Link | None = scope.get(LINK)
        target = upstream_target(route, _spelt_target(scope) if link is None else link.target)
        request = _Request(scope, link, target, is_trusted, self.protected)
        if exchange.method == "OPTIONS" and b"max-forwards" in request.fields and request.ends_here():
            return self._answer_options(exchange, send)
        request.body = self._body(exchange, request, receive)
        service.retry_budget.deposit()
        if link is not None and service.total_timeout is None:
            return self._try_targets(exchange, service, request, send)
        return self._guard(exchange, service, request, receive, send)

    def resume(
        self,
        exchange: Exchange,
        route: Route,
        lease: Lease,
        answer: Answer | None,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        is_trusted: bool,
    ) -> Awaitable[None]:
        """Go on with an exchange whose first try has begun, as `forward` does.

        `answer` is None if the request has not been sent yet.
        """
        service = self.services[route.upstream]
        link: Link = scope[LINK]
        if link.is_disconnected:
            if answer is not None:
                answer.close()
            lease.release(self._clock())
            raise ClientDisconnected(LEFT)
        request = _Request(scope, link, upstream_target(route, link.target), is_trusted, self.protected)
        if answer is None:
            request.body = self._body(exchange, request, receive)
        else:
            answer.hooks = request
            request.body = NO_BODY if request.framing is None else SENT_BODY
        return self._try_targets(exchange, service, request, send, lease, answer)

    async def _guard(
        self, exchange: Exchange, service: Service, request: "_Request", receive: Receive, send: Send
    ) -> None:
        """Bound the whole exchange in time, and watch for the client's leaving where the server does not tell."""
        with nullcontext() if request.link is not None else DisconnectWatch(receive, request.body):
            try:
                async with asyncio.timeout(service.total_timeout):
                    await self._try_targets(exchange, service, request, send)
            except TimeoutError as error:
                raise UpstreamTimeout(f"No complete answer within {service.total_timeout} s.") from error

    def _body(self, exchange: Exchange, request: "_Request", receive: Receive) -> RequestBody | NoBody:
        if request.framing is None:
            return NO_BODY
        if request.framing == b"length" and int(request.fields[b"content-length"][0]) > self.max_body_bytes:
            raise _body_too_large(self.max_body_bytes)
        return RequestBody(receive, self.max_body_bytes, exchange)

    async def _answer_options(self, exchange: Exchange, send: Send) -> None:
        """Answer for the upstream, as a request that may go no further asks (RFC 9110 section 7.6.2)."""
        exchange.status = 204
        headers = [(b"allow", PROXIED_METHODS.encode()), *exchange.answer_headers]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _try_targets(  # noqa: C901 - one loop, with all its ways out
        self,
        exchange: Exchange,
        service: Service,
        request: "_Request",
        send: Send,
        lease: Lease | None = None,
        answer: Answer | None = None,
    ) -> None:
        """Try one target, and another while that is safe, worth it and nothing has been answered yet.

        `lease` and `answer` are those of a first try that has begun. A client that leaves meanwhile ends it: our own
        server then cancels this task.
        """
        link = request.link
        if link is not None:
            if link.is_disconnected:
                raise ClientDisconnected(LEFT)
            link.on_leaving = link.task.cancel
        tried: list[Target] = []
        failed: UpstreamFailed | None = None
        try:
            while True:
                if lease is None:
                    lease = self._next_lease(exchange, service, tried, failed)
                tried.append(lease.target)
                exchange.attempts += 1
                try:
                    await self._try(exchange, service, lease, request, send, answer)
                except UpstreamFailed as error:
                    if not _may_retry(exchange, service, lease, request, error):
                        raise
                    failed = error
                    exchange.has_reached |= not error.is_retry_safe
                else:
                    return
                finally:
                    lease.release(self._clock())
                    lease = answer = None
        except asyncio.CancelledError as error:
            if link is not None and link.is_disconnected and link.task.uncancel() == 0:
                raise ClientDisconnected(LEFT) from error
            raise
        finally:
            if link is not None:
                link.on_leaving = None

    def _next_lease(
        self, exchange: Exchange, service: Service, tried: list[Target], failed: UpstreamFailed | None
    ) -> Lease:
        """Return the next target's lease; raises what the try before `failed` with if there is none."""
        try:
            return service.upstream.checkout(self._clock(), exchange.client_key, tried)
        except Unavailable as error:
            raise failed or error from None

    async def _try(
        self,
        exchange: Exchange,
        service: Service,
        lease: Lease,
        request: "_Request",
        send: Send,
        answer: Answer | None,
    ) -> None:
        """Send the request to one target and its answer on; settles the try if it failed before or within."""
        outgoing = request.render(exchange, service, lease.target)
        if answer is None:
            exchange.target = lease.target.url
            exchange.sent_at = self._clock()
        try:
            response = await _response(service.transport, outgoing, answer)
        except httpx.TransportError as error:
            raise self._failure(lease, error) from error
        self.on_head(exchange, lease, response.status_code, self._clock())
        settle_probe = None
        if lease.ticket.is_probe:  # a long stream must not keep the breaker from closing
            loop = asyncio.get_running_loop()
            settle_probe = loop.call_later(PROBE_SETTLES_AFTER, self._settle_success, lease)
        try:
            if response.status_code == SWITCHING_PROTOCOLS:
                await self._tunnel(exchange, service, lease, request, response)
            else:
                await self._relay(exchange, lease, request, response, send)
        finally:
            if settle_probe is not None:
                settle_probe.cancel()
            if isinstance(response, Incoming):
                response.stream.close()
            else:
                await response.stream.aclose()  # type: ignore[union-attr]  # an async transport's stream is an async one

    def _failure(self, lease: Lease, error: httpx.TransportError) -> GatewayError:
        """Settle a try that got no answer, and return what it failed with in our words."""
        upstream = lease.upstream.name
        failure = _translate(error, upstream)
        self._observe_try(upstream, failure.reason, None, self._clock())
        if isinstance(failure, UpstreamFailed):
            self.settle(lease, Outcome.FAILURE, self._clock(), failure.reason)
        return failure

    def on_head(self, exchange: Exchange, lease: Lease, status: int, now: float) -> None:
        """Count the answer's head; a status that is an error settles the try already."""
        assert exchange.sent_at is not None  # noqa: S101 - what has been answered has been sent
        exchange.head_at = now
        self._observe_try(lease.upstream.name, _CLASSES[status // 100], now - exchange.sent_at, now)
        if status >= 500:  # noqa: PLR2004 - the class of server errors
            self.settle(lease, Outcome.FAILURE, now, f"status {status}")
        elif status >= 400:  # noqa: PLR2004 - the class of client errors
            self.settle(lease, Outcome.IGNORED, now)

    def on_broken_body(self, lease: Lease, error: Exception) -> GatewayError:
        """Settle a try whose answer broke off, and return what it failed with in our words."""
        failure = _translate(error, lease.upstream.name)
        failure.__cause__ = error
        self.settle(lease, Outcome.FAILURE, self._clock(), f"{failure.reason} within the body")
        return failure

    async def _relay(
        self, exchange: Exchange, lease: Lease, request: "_Request", response: httpx.Response, send: Send
    ) -> None:
        """Send the answer on, piece by piece; its end settles the try as a success, its breaking off as a failure."""
        exchange.status, exchange.source = response.status_code, "upstream"
        headers, fields, stream = _parts(response)
        omit = self._omit_with_length if response.status_code in request.lengthless else self._omit
        may_have_trailers = b"transfer-encoding" in fields and response.status_code not in _BODILESS
        passes_trailers = may_have_trailers and b"te" in request.fields and request.takes_trailers
        await send(
            {
                "type": "http.response.start",
                "status": response.status_code,
                "reason": response.extensions.get("reason_phrase"),
                "headers": self._for_client(exchange, headers, fields, omit),
                "trailers": passes_trailers,
                "upstream_fields": fields if isinstance(stream, Answer) else None,
                "is_body_ready": stream.is_ready,
            }
        )
        more = True
        while more:
            try:
                piece, more = await stream.read()
            except httpx.TransportError as error:
                raise self.on_broken_body(lease, error) from error
            exchange.bytes_out += len(piece)
            if not more:
                self.settle(lease, Outcome.SUCCESS, self._clock())
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        if passes_trailers:
            passed = trailers_to_pass(stream.trailers, self.protected)
            await send({"type": "http.response.trailers", "headers": passed, "more_trailers": False})

    def _for_client(
        self, exchange: Exchange, headers: HeaderList, fields: Fields, omit: frozenset[bytes]
    ) -> HeaderList:
        """Return the headers of an answer as the client shall see them, its cost settled."""
        if COST in fields:
            self.on_cost(exchange, fields[COST])
        return for_client(headers, fields, exchange.answer_headers, omit)

    async def _tunnel(
        self, exchange: Exchange, service: Service, lease: Lease, request: "_Request", response: httpx.Response
    ) -> None:
        """Join client and upstream after a 101, until one of them ends it or neither says a word for too long."""
        link = request.link
        assert link is not None  # noqa: S101 - nobody else asks for an upgrade
        exchange.status, exchange.source = SWITCHING_PROTOCOLS, "upstream"
        self._settle_success(lease)
        headers, fields, _ = _parts(response)
        headers = self._for_client(exchange, headers, fields, self._omit)
        headers += [(b"connection", b"Upgrade"), (b"upgrade", link.upgrade)]
        try:
            upstream, from_upstream = response.extensions["switched"].take_over()
        except httpx.TransportError as error:
            raise _translate(error, lease.upstream.name) from error
        client, from_client = link.switch(response.extensions["reason_phrase"], headers)
        tunnel = Tunnel(asyncio.get_running_loop(), client, upstream, service.tunnel_timeout)
        try:
            await tunnel.run(from_client, from_upstream)
        finally:
            exchange.bytes_in, exchange.bytes_out = tunnel.bytes_in, tunnel.bytes_out

    def _settle_success(self, lease: Lease) -> None:
        self.settle(lease, Outcome.SUCCESS, self._clock())

    def settle(self, lease: Lease, outcome: Outcome, now: float, detail: str = "") -> None:
        """Tell the breaker how a try ended, and the log if that moved it."""
        transition = lease.settle(outcome, now, detail)
        if transition is not None:
            self._on_transition(lease.upstream.name, transition)


class _Request:
    """What is sent upstream, the same for every try but for the target; also the hooks of the transport."""

    __slots__ = (
        "_is_trusted",
        "_protected",
        "_scope",
        "body",
        "expects_continue",
        "fields",
        "framing",
        "headers",
        "link",
        "target",
        "upgrade",
    )

    def __init__(
        self,
        scope: Scope,
        link: Link | None,
        target: bytes,
        is_trusted: bool,  # noqa: FBT001 - one of these is made for every request
        protected: frozenset[bytes],
    ) -> None:
        self._scope = scope
        self._is_trusted = is_trusted
        self._protected = protected
        self.link = link
        self.target = target
        self.fields: Fields = scope[FIELDS]
        self.framing = framing(self.fields)
        self.body: RequestBody | NoBody = NO_BODY
        self.headers: HeaderList = scope["headers"] if link is None else link.headers
        self.expects_continue = b"expect" in self.fields and self.fields[b"expect"][0].lower() == b"100-continue"
        self.upgrade = link is not None and link.upgrade == b"websocket" and self.framing is None

    def ends_here(self) -> bool:
        """Tell whether `Max-Forwards` forbids another hop; take one off otherwise."""
        hops = self.fields[b"max-forwards"][0]
        if not hops.isdigit() or len(hops) > _MAX_HOP_DIGITS:
            return False
        left = b"%d" % (int(hops) - 1)
        self.headers = [(name, left if name.lower() == b"max-forwards" else value) for name, value in self.headers]
        return int(hops) == 0

    @property
    def takes_trailers(self) -> bool:
        """True if the client said that it reads trailers (RFC 9110 section 6.5.1), and gets an answer with chunks."""
        return (
            self.link is not None
            and self._scope["method"] != "HEAD"
            and self._scope["http_version"] != "1.0"
            and any(b"trailers" in value.lower() for value in self.fields.get(b"te", ()))
        )

    @property
    def lengthless(self) -> frozenset[int]:
        """The statuses whose answers may announce no length: 204, and before another server than ours 304 too."""
        return _NO_LENGTH if self.link is not None else _BODILESS

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Pass on an interim answer (RFC 9110 section 15.2)."""
        if self.link is not None:
            self.link.inform(status, reason, interim_to_pass(headers))

    def trailers(self) -> HeaderList:
        """Return the trailers that came behind the body."""
        return [] if self.link is None else trailers_to_pass(self.link.trailers, self._protected)

    def render(self, exchange: Exchange, service: Service, target: Target) -> httpx.Request:
        """Return the request for one target."""
        origin = service.origins[target]
        scope = self._scope
        headers = for_upstream(
            self.headers,
            self.fields,
            host=origin.netloc,
            peer=scope["client"][0] if scope.get("client") else "unknown",
            scheme=scope["scheme"],
            request_id=exchange.id.encode(),
            version=scope["http_version"],
            is_trusted=self._is_trusted,
            protected=self._protected,
        )
        if b"expect" in self.fields:
            if self.link is None:  # its server asks for the body by itself
                headers = [pair for pair in headers if pair[0].lower() != b"expect"]
            elif self.expects_continue:
                self.link.defer_continue()
        extensions: dict[str, Any] = {"target": self.target, "timeout": service.limits, "hooks": self}
        if not service.speaks_pairs:
            url = origin.url.copy_with(raw_path=self.target)
            return httpx.Request(exchange.method, url, headers=headers, stream=self.body, extensions=extensions)
        if self.upgrade and self.link is not None:
            headers += [(b"connection", b"Upgrade"), (b"upgrade", self.link.upgrade)]
        return Outgoing(exchange.method, origin, headers, self.body, self.framing, extensions)


class _Foreign:
    """The body of an answer that another transport gave, read as our own are."""

    is_ready = False
    trailers: HeaderList = []  # noqa: RUF012 - there are none

    def __init__(self, stream: AsyncIterable[bytes]) -> None:
        self._pieces = aiter(stream)

    async def read(self) -> tuple[bytes, bool]:
        """Return the next piece and whether more may follow."""
        try:
            return await anext(self._pieces), True
        except StopAsyncIteration:
            return b"", False


def _parts(response: httpx.Response) -> tuple[HeaderList, Fields, Answer | _Foreign]:
    """Return the headers of an answer, the same by name, and its body."""
    if isinstance(response, Incoming):
        answer = response.stream
        return answer.headers, answer.fields, answer
    headers = response.headers.raw
    return headers, fields_of(headers), _Foreign(response.stream)  # type: ignore[arg-type]  # an async one


async def _response(
    transport: httpx.AsyncBaseTransport, request: httpx.Request, answer: Answer | None
) -> httpx.Response:
    """Send the request, unless it has an answer under way already, and return the response."""
    if answer is not None and isinstance(transport, UpstreamTransport) and isinstance(request, Outgoing):
        return await transport.response_to(request, answer)
    return await transport.handle_async_request(request)


def _ignore_cost(_exchange: Exchange, _given: Sequence[bytes]) -> None:
    """Leave it at what was charged."""


def _spelt_target(scope: Scope) -> bytes:
    """Return path and query as another server than ours tells them."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path


def refuse_method(method: str) -> None:
    """Raise MethodNotAllowed if no upstream is ever asked with this method."""
    if method in REFUSED_METHODS:
        raise MethodNotAllowed(f"{method} is not proxied.", headers={"allow": PROXIED_METHODS})


def upstream_target(route: Route, target: bytes) -> bytes:
    """Return the request target for the upstream: path and query byte for byte, less the route's prefix.

    Raises BadRequest.
    """
    prefix = route.strip_prefix.encode()
    if not prefix:
        return target
    if not target.startswith(prefix) or target[len(prefix) : len(prefix) + 1] not in (b"", b"/", b"?"):
        raise BadRequest(f"The path is spelt so that its prefix {route.strip_prefix} cannot be taken off.")
    rest = target[len(prefix) :]
    return rest if rest.startswith(b"/") else b"/" + rest


def _may_retry(exchange: Exchange, service: Service, lease: Lease, request: _Request, error: UpstreamFailed) -> bool:
    """Tell whether another try is allowed; takes it off the budget if so."""
    if exchange.status or exchange.attempts >= service.attempts or lease.ticket.is_probe or request.body.is_started:
        return False
    if not error.is_retry_safe and exchange.method not in IDEMPOTENT:
        return False
    return service.retry_budget.withdraw()


def _translate(error: Exception, upstream: str) -> GatewayError:
    """Put one of httpx's failures in our words."""
    if isinstance(error, httpx.LocalProtocolError):
        return BadRequest(f"The request cannot be sent on: {error}.")
    kind, words = next((ours, words) for theirs, ours, words in _TRANSLATION if isinstance(error, theirs))
    retry_after = 1.0 if kind is Overloaded else None
    return kind(f"Upstream '{upstream}': {words}.", retry_after=retry_after, extra={"upstream": upstream})


def _body_too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})
