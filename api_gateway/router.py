"""Routes and forwarding: match a request to its route, try the upstream, stream both ways, settle the try.

The only loop is the retry, and it ends with the answer's first byte. Which target, whether the breaker admits and
what a result means to it is decided in `balancer` and `circuit_breaker`; how bytes travel, in the transport.
"""

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext

import httpx

from api_gateway.answer import Answer, Incoming
from api_gateway.balancer import Lease, Target
from api_gateway.circuit_breaker import Transition
from api_gateway.errors import (
    BadRequest,
    ClientDisconnected,
    GatewayError,
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
    trailers_to_pass,
)
from api_gateway.link import LINK, Link
from api_gateway.models import Clock, Exchange, HeaderList, Outcome
from api_gateway.outgoing import NO_BODY, NoBody, Outgoing
from api_gateway.overload import ONE_BAND, Bands
from api_gateway.request import (
    BODILESS,
    LEFT,
    SENT_BODY,
    DisconnectWatch,
    Receive,
    RequestBody,
    Scope,
    Send,
    UpstreamRequest,
    body_too_large,
    spelt_target,
)
from api_gateway.routes import PROXIED_METHODS, Route, RouteTable, refuse_method, upstream_target
from api_gateway.service import Service
from api_gateway.transport import UpstreamTransport
from api_gateway.tunnel import Tunnel

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
SWITCHING_PROTOCOLS = 101
_CLASSES = tuple(f"{number}xx" for number in range(6))
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
        bands: Bands = ONE_BAND,
    ) -> None:
        """`protected` request headers cannot be named away by `Connection`; `omit` answer headers are left out.

        `on_cost` hears of an answer that tells its cost, before its head is sent. `bands` say who is shed first.
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
        self.bands = bands

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
        target = upstream_target(route, spelt_target(scope) if link is None else link.target)
        request = UpstreamRequest(scope, link, target, is_trusted, self.protected)
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
        request = UpstreamRequest(scope, link, upstream_target(route, link.target), is_trusted, self.protected)
        if answer is None:
            request.body = self._body(exchange, request, receive)
        else:
            answer.hooks = request
            request.body = NO_BODY if request.framing is None else SENT_BODY
        return self._try_targets(exchange, service, request, send, lease, answer)

    async def _guard(
        self, exchange: Exchange, service: Service, request: UpstreamRequest, receive: Receive, send: Send
    ) -> None:
        """Bound the whole exchange in time, and watch for the client's leaving where the server does not tell."""
        with nullcontext() if request.link is not None else DisconnectWatch(receive, request.body):
            try:
                async with asyncio.timeout(service.total_timeout):
                    await self._try_targets(exchange, service, request, send)
            except TimeoutError as error:
                raise UpstreamTimeout(f"No complete answer within {service.total_timeout} s.") from error

    def _body(self, exchange: Exchange, request: UpstreamRequest, receive: Receive) -> RequestBody | NoBody:
        if request.framing is None:
            return NO_BODY
        if request.framing == b"length" and int(request.fields[b"content-length"][0]) > self.max_body_bytes:
            raise body_too_large(self.max_body_bytes)
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
        request: UpstreamRequest,
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
        """Return the next target's lease; raises what the try before `failed` with if there is none.

        Another try asks as the lowest band: nothing is tried twice while anybody is shed.
        """
        band = 0 if tried or exchange.client is None else self.bands.of(exchange.client.quota.name)
        try:
            return service.upstream.checkout(self._clock(), exchange.client_key, tried, band=band)
        except Unavailable as error:
            raise failed or error from None

    async def _try(
        self,
        exchange: Exchange,
        service: Service,
        lease: Lease,
        request: UpstreamRequest,
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
            failure = self._failure(lease, error)
            if lease.upstream.limit is not None and isinstance(failure, UpstreamTimeout) and not failure.is_retry_safe:
                now = self._clock()
                lease.upstream.limit.observe(now - (exchange.sent_at or now), now)  # it takes at least as long
            raise failure from error
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
        seconds = now - exchange.sent_at
        self._observe_try(lease.upstream.name, _CLASSES[status // 100], seconds, now)
        if status >= 500:  # noqa: PLR2004 - the class of server errors
            self.settle(lease, Outcome.FAILURE, now, f"status {status}")
            return
        if lease.upstream.limit is not None:  # an error's latency tells nothing: it may come at once
            lease.upstream.limit.observe(seconds, now)
        if status >= 400:  # noqa: PLR2004 - the class of client errors
            self.settle(lease, Outcome.IGNORED, now)

    def on_broken_body(self, lease: Lease, error: Exception) -> GatewayError:
        """Settle a try whose answer broke off, and return what it failed with in our words."""
        failure = _translate(error, lease.upstream.name)
        failure.__cause__ = error
        self.settle(lease, Outcome.FAILURE, self._clock(), f"{failure.reason} within the body")
        return failure

    async def _relay(
        self, exchange: Exchange, lease: Lease, request: UpstreamRequest, response: httpx.Response, send: Send
    ) -> None:
        """Send the answer on, piece by piece; its end settles the try as a success, its breaking off as a failure."""
        exchange.status, exchange.source = response.status_code, "upstream"
        headers, fields, stream = _parts(response)
        omit = self._omit_with_length if response.status_code in request.lengthless else self._omit
        may_have_trailers = b"transfer-encoding" in fields and response.status_code not in BODILESS
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
        self, exchange: Exchange, service: Service, lease: Lease, request: UpstreamRequest, response: httpx.Response
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


def _may_retry(
    exchange: Exchange, service: Service, lease: Lease, request: UpstreamRequest, error: UpstreamFailed
) -> bool:
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
