"""Routes and forwarding: match a request to its route, try the upstream, stream both ways, settle the try.

The only loop is the retry, and it ends with the answer's first byte. Which target, whether the breaker admits and
what a result means to it is decided in `balancer` and `circuit_breaker`; how bytes travel, in the transport.
"""

import asyncio
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import httpx

from api_gateway.balancer import Lease, RetryBudget, Target, Upstream
from api_gateway.circuit_breaker import Transition
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
from api_gateway.headers import for_client, for_upstream, has_body, values
from api_gateway.models import Clock, Exchange, HeaderList, Outcome

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
PROXIED_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
REFUSED_METHODS = frozenset({"TRACE", "CONNECT"})  # RFC 9110 section 9.3.8: TRACE would echo credentials
_BODILESS = frozenset({204, 304})
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
    """What matching requests cost in tokens instead of the route's own cost; None matches any."""

    methods: frozenset[str] | None
    path: str | None
    cost: float

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

    def cost_of(self, method: str, path: str) -> float:
        """Return what a request costs, in tokens."""
        return next((rule.cost for rule in self.costs if rule.matches(method, path)), self.cost)


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

    def match(self, host: str, method: str, path: str) -> Route:
        """Return the route; raises NoRoute, or MethodNotAllowed naming what is allowed."""
        segments = path.split("/", self._depth + 1)
        allowed: set[str] = set()
        for length in range(min(len(segments), self._depth + 1), 0, -1):
            for route in self._routes.get("/".join(segments[:length]), ()):
                if route.host is not None and route.host != host:
                    continue
                if route.methods is None or method in route.methods:
                    return route
                allowed |= route.methods
            if allowed:
                names = ", ".join(sorted(allowed))
                raise MethodNotAllowed(f"{path} takes {names}, not {method}.", headers={"allow": names})
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
        self.urls = {target: httpx.URL(target.url) for target in upstream.targets}
        self.limits = {
            "connect": timeouts.connect,
            "pool": timeouts.connect,
            "read": timeouts.response,
            "write": timeouts.idle,
            "idle": timeouts.idle,
        }

    def __repr__(self) -> str:
        return f"<Service {self.upstream!r}>"


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


class _EmptyBody(httpx.AsyncByteStream):
    is_started = False
    is_finished = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""  # pragma: no cover - makes this an iterator


_EMPTY_BODY = _EmptyBody()


class DisconnectWatch:
    """Ends the current task once the client has left, but only looks after `PATIENCE`: most answers are faster.

    Used as `async with`. What the task was doing is cancelled, and leaves the block as ClientDisconnected.
    """

    def __init__(self, receive: Receive, body: RequestBody | _EmptyBody) -> None:
        self._receive = receive
        self._body = body
        self._has_left = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        """Start the clock."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs is in a task
        self._task = task
        self._timer = loop.call_later(PATIENCE, self._start, loop)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop looking; turn our own cancellation into ClientDisconnected."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._has_left:
            if kind is asyncio.CancelledError and self._task.uncancel() == 0:
                raise ClientDisconnected("The client left before its answer was complete.") from error
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
    ) -> None:
        """`protected` request headers cannot be named away by `Connection`; `omit` answer headers are left out."""
        self.routes = routes
        self.services = dict(services)
        self._clock = clock
        self._max_body_bytes = max_body_bytes
        self._protected = protected
        self._omit = omit
        self._observe_try = observe_try
        self._on_transition = on_transition

    async def forward(
        self,
        exchange: Exchange,
        route: Route,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        is_trusted: bool,
    ) -> None:
        """Send the request to the route's upstream and its answer to the client. Raises GatewayError."""
        if exchange.method in REFUSED_METHODS:
            raise MethodNotAllowed(f"{exchange.method} is not proxied.", headers={"allow": PROXIED_METHODS})
        service = self.services[route.upstream]
        exchange.upstream = route.upstream
        body = self._body(exchange, scope["headers"], receive)
        request = _Request(scope, body, _target(route, scope), is_trusted=is_trusted)
        service.retry_budget.deposit()
        async with DisconnectWatch(receive, body):
            try:
                async with asyncio.timeout(service.total_timeout):
                    await self._try_targets(exchange, service, request, send)
            except TimeoutError as error:
                raise UpstreamTimeout(f"No complete answer within {service.total_timeout} s.") from error

    def _body(self, exchange: Exchange, headers: HeaderList, receive: Receive) -> RequestBody | _EmptyBody:
        if not has_body(headers):
            return _EMPTY_BODY
        length = values(headers, b"content-length")
        if length and int(length[0]) > self._max_body_bytes:
            raise _body_too_large(self._max_body_bytes)
        return RequestBody(receive, self._max_body_bytes, exchange)

    async def _try_targets(self, exchange: Exchange, service: Service, request: "_Request", send: Send) -> None:
        """Try one target, and another while that is safe, worth it and nothing has been answered yet."""
        tried: list[Target] = []
        failed: UpstreamFailed | None = None
        key = exchange.client.key.encode() if exchange.client else b""
        while True:
            try:
                lease = service.upstream.checkout(self._clock(), key, tried)
            except Unavailable as error:
                raise failed or error from None
            tried.append(lease.target)
            exchange.attempts += 1
            try:
                await self._try(exchange, service, lease, request, send)
            except UpstreamFailed as error:
                if not _may_retry(exchange, service, lease, request, error):
                    raise
                failed = error
            else:
                return
            finally:
                lease.release(self._clock())

    async def _try(self, exchange: Exchange, service: Service, lease: Lease, request: "_Request", send: Send) -> None:
        exchange.target = lease.target.url
        response = await self._open(exchange, service, lease, request)
        settle_probe = None
        if lease.ticket.is_probe:  # a long stream must not keep the breaker from closing
            loop = asyncio.get_running_loop()
            settle_probe = loop.call_later(PROBE_SETTLES_AFTER, self._settle, lease, Outcome.SUCCESS)
        try:
            await self._relay(exchange, lease, response, send)
        finally:
            if settle_probe is not None:
                settle_probe.cancel()
            await response.stream.aclose()  # type: ignore[union-attr]  # an async transport's stream is an async one

    async def _open(self, exchange: Exchange, service: Service, lease: Lease, request: "_Request") -> httpx.Response:
        """Send the request and return the answer's head; settles the try if it failed."""
        sent_at = exchange.sent_at = self._clock()
        try:
            response = await service.transport.handle_async_request(
                request.render(exchange, service, lease.target, self._protected)
            )
        except httpx.TransportError as error:
            failure = _translate(error, service.upstream.name)
            self._observe_try(service.upstream.name, failure.reason, None, self._clock())
            if isinstance(failure, UpstreamFailed):
                self._settle(lease, Outcome.FAILURE, failure.reason)
            raise failure from error
        now = exchange.head_at = self._clock()
        self._observe_try(service.upstream.name, f"{response.status_code // 100}xx", now - sent_at, now)
        if response.status_code >= 500:  # noqa: PLR2004 - the class of server errors
            self._settle(lease, Outcome.FAILURE, f"status {response.status_code}")
        elif response.status_code >= 400:  # noqa: PLR2004 - the class of client errors
            self._settle(lease, Outcome.IGNORED)
        return response

    async def _relay(self, exchange: Exchange, lease: Lease, response: httpx.Response, send: Send) -> None:
        """Send the answer on, piece by piece; its end settles the try as a success, its breaking off as a failure."""
        omit = self._omit
        if response.status_code in _BODILESS:  # uvicorn would wait for the bytes that this header announces
            omit |= {b"content-length"}
        exchange.status = response.status_code
        exchange.source = "upstream"
        headers = for_client(response.headers.raw, exchange.answer_headers, omit)
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        try:
            async for piece in response.stream:  # type: ignore[union-attr]  # an async transport's stream is an async one
                exchange.bytes_out += len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.TransportError as error:
            failure = _translate(error, lease.upstream.name)
            self._settle(lease, Outcome.FAILURE, f"{failure.reason} within the body")
            raise failure from error
        self._settle(lease, Outcome.SUCCESS)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _settle(self, lease: Lease, outcome: Outcome, detail: str = "") -> None:
        transition = lease.settle(outcome, self._clock(), detail)
        if transition is not None:
            self._on_transition(lease.upstream.name, transition)


@dataclass(slots=True)
class _Request:
    """What is sent upstream, the same for every try but for the target."""

    scope: Scope
    body: RequestBody | _EmptyBody
    target: bytes
    _: KW_ONLY
    is_trusted: bool

    def render(
        self, exchange: Exchange, service: Service, target: Target, protected: frozenset[bytes]
    ) -> httpx.Request:
        """Return the request for one target."""
        url = service.urls[target]
        headers = for_upstream(
            self.scope["headers"],
            host=url.netloc,
            peer=self.scope["client"][0] if self.scope.get("client") else "unknown",
            scheme=self.scope["scheme"],
            request_id=exchange.id.encode(),
            version=self.scope["http_version"],
            is_trusted=self.is_trusted,
            protected=protected,
        )
        extensions = {"target": self.target, "timeout": dict(service.limits)}
        return httpx.Request(exchange.method, url, headers=headers, stream=self.body, extensions=extensions)


def _target(route: Route, scope: Scope) -> bytes:
    """Return the request target for the upstream: path and query byte for byte, less the route's prefix."""
    path: bytes = scope["raw_path"]
    prefix = route.strip_prefix.encode()
    if prefix:
        if path != prefix and not path.startswith(prefix + b"/"):
            raise BadRequest(f"The path is spelt so that its prefix {route.strip_prefix} cannot be taken off.")
        path = path[len(prefix) :] or b"/"
    query: bytes = scope["query_string"]
    return path + b"?" + query if query else path


def _may_retry(exchange: Exchange, service: Service, lease: Lease, request: _Request, error: UpstreamFailed) -> bool:
    """Tell whether another try is allowed; takes it off the budget if so."""
    if exchange.status or exchange.attempts >= service.attempts or lease.ticket.is_probe or request.body.is_started:
        return False
    if not error.is_retry_safe and exchange.method not in IDEMPOTENT:
        return False
    return service.retry_budget.withdraw()


def _translate(error: httpx.TransportError, upstream: str) -> GatewayError:
    """Put one of httpx's failures in our words."""
    if isinstance(error, httpx.LocalProtocolError):
        return BadRequest(f"The request cannot be sent on: {error}.")
    kind, words = next((ours, words) for theirs, ours, words in _TRANSLATION if isinstance(error, theirs))
    retry_after = 1.0 if kind is Overloaded else None
    return kind(f"Upstream '{upstream}': {words}.", retry_after=retry_after, extra={"upstream": upstream})


def _body_too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})
