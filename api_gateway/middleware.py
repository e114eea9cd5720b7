"""The ASGI middleware of a proxied request, outermost first.

Order: data plane split, exchange, identity, routing, load shedding, rate limit, proxy. The object of
a step has no state but configuration. The state of a request is its `Exchange`: `ExchangeMiddleware` puts it into the
scope, and each later step sets its own fields. A step that does not wait is a plain function that returns the next
step's awaitable, because a coroutine costs more than the step itself.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any

from api_gateway.clients.identity import client_id
from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import (
    BadRequest,
    ClientDisconnected,
    Draining,
    GatewayError,
    InternalError,
    not_started,
)
from api_gateway.http1.asgi import DEADLINE, FIELDS, ASGIApp, FastPathHandler, Receive, Scope, Send
from api_gateway.http1.headers import (
    Fields,
    address_key,
    ambiguity,
    client_address,
    fields_of,
    host_name,
    is_within,
)
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.limits.refusal import refusal
from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, Clock, Decision, Exchange, Quota
from api_gateway.proxy.deadline import deadline_of
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.problem_response import send_problem
from api_gateway.proxy.request_id import given_request_id, new_request_id
from api_gateway.proxy.shadow_limits import ShadowLimits
from api_gateway.rate_limiter import RateLimiter
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.priorities import PriorityClasses
from api_gateway.router import Router

logger = logging.getLogger(__name__)

Observer = Callable[[Exchange], None]

API_PREFIX = "/api"
EXCHANGE = "gateway.exchange"
ROUTE = "gateway.route"
IS_TRUSTED = "gateway.is_trusted"


def is_proxied(path: str) -> bool:
    """Tell whether a path belongs to the data plane: `/api` and everything below it."""
    return path.startswith(API_PREFIX) and path[4:5] in ("", "/")


class DataPlaneSplit:
    """Passes `/api` and everything below it to the data plane, and all other paths to `app`.

    The data plane does not pass through the framework's routing.
    """

    def __init__(self, app: ASGIApp, *, switch: "DataPlaneSlot") -> None:
        self.app = app
        self._switch = switch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Dispatch one request by its path; close a WebSocket below `/api` that a server has parsed itself."""
        if not is_proxied(scope.get("path", "")):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._switch.data_plane(scope, receive, send)
        else:  # an ASGI WebSocket, of a server without `ServerExtension`
            await send({"type": "websocket.close", "code": 1013, "reason": "WebSockets are not proxied."})


class DataPlaneSlot:
    """Holds the current data plane: the ASGI path (`data_plane`) and the fast path (`current`).

    Before start-up, requests get 503. Start-up sets both, and a reload replaces them; connections refer to this slot
    only.
    """

    def __init__(self) -> None:
        self.data_plane: ASGIApp = _not_started
        self.current: FastPathHandler = _Closed()

    def __repr__(self) -> str:
        return f"<DataPlaneSlot [{'not started' if self.data_plane is _not_started else 'started'}]>"

    def set(self, data_plane: ASGIApp, fast_path: FastPathHandler) -> None:
        """Set the paths for new requests."""
        self.data_plane, self.current = data_plane, fast_path


class _Closed:
    """The fast path before start-up: it takes no requests."""

    def try_handle(self, _client: Any, _received: bytes) -> bool:
        """Return False."""
        return False


async def _not_started(scope: Scope, _receive: Receive, send: Send) -> None:
    await send_problem(not_started(), send, instance=scope["path"], request_id=None, headers=[])


class ExchangeMiddleware:
    """Creates the exchange, converts errors to problem details, and passes the ended exchange to the observers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        clock: Clock,
        recorder: Recorder,
        observers: Sequence[Observer],
        on_failure: Callable[[Exchange, GatewayError], None] | None = None,
    ) -> None:
        """`on_failure` is called before an error is sent, so that a refund shows in the rate limit fields."""
        self.app = app
        self._clock = clock
        self._recorder = recorder
        self._observers = tuple(observers)
        self._on_failure = on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        fields = scope[FIELDS] = fields_of(scope["headers"])
        peer = scope["client"][0] if scope.get("client") else "unknown"
        identity = given_request_id(fields) or new_request_id()
        exchange = self.begin(Exchange(identity, scope["method"], scope["path"], peer, self._clock()))
        exchange.response_headers.append((b"x-request-id", exchange.id.encode()))
        scope[EXCHANGE] = exchange
        await self.conclude(exchange, self._validated, scope, receive, send)

    def _validated(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        _refuse_ambiguity(scope)
        return self.app(scope, receive, send)

    def begin(self, exchange: Exchange) -> Exchange:
        """Count an exchange as in flight until `end`, and return it."""
        self._recorder.in_flight += 1
        return exchange

    async def conclude(self, exchange: Exchange, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an exchange by `app`, respond with problem details if that fails, and end the exchange."""
        try:
            await app(scope, receive, send)
        except GatewayError as error:
            await self._refuse(exchange, error, send)
        except asyncio.CancelledError:
            self.note_cut_off(exchange)
            raise
        except Exception as error:
            logger.exception("request %s (%s %s) failed", exchange.id, exchange.method, exchange.path)
            await self._refuse(exchange, InternalError(f"The gateway failed: {type(error).__name__}."), send)
        finally:
            self.end(exchange, self._clock())

    async def _refuse(self, exchange: Exchange, error: GatewayError, send: Send) -> None:
        has_begun = exchange.status != 0  # the server closes the connection after an incomplete response
        self.note_failure(exchange, error)
        if has_begun or isinstance(error, ClientDisconnected):
            return
        exchange.status, exchange.source = error.status, "gateway"
        exchange.bytes_out = await send_problem(
            error, send, instance=exchange.path, request_id=exchange.id, headers=exchange.response_headers
        )

    def note_failure(self, exchange: Exchange, error: GatewayError) -> None:
        """Settle the charge of a failed exchange, and record why it failed."""
        if self._on_failure is not None:
            self._on_failure(exchange, error)
        note_failure(exchange, error)

    @staticmethod
    def note_cut_off(exchange: Exchange) -> None:
        """Record that the exchange was aborted at the end of the drain. The charge is not refunded."""
        note_failure(exchange, Draining("The gateway stopped before the response was complete."))
        exchange.status = exchange.status or ClientDisconnected.status

    def end(self, exchange: Exchange, now: float) -> None:
        """Pass the ended exchange to the observers. `now` is monotonic seconds."""
        self._recorder.in_flight -= 1
        exchange.finished = now
        for observe in self._observers:
            try:
                observe(exchange)
            except Exception:
                logger.exception("request %s could not be recorded", exchange.id)


def _refuse_ambiguity(scope: Scope) -> None:
    cause = ambiguity(scope[FIELDS], scope["http_version"])
    if cause is not None:
        raise BadRequest(f"The request is ambiguous: {cause}.", headers={"connection": "close"})


class IdentityMiddleware:
    """Determines the client of a request: the registered client with the given id, or else the address."""

    def __init__(
        self, app: ASGIApp, *, clients: ClientRegistry, header: str, trusted_proxies: Collection[Any]
    ) -> None:
        self.app = app
        self.clients = clients
        self.header = header.lower().encode()
        self._trusted = tuple(trusted_proxies)
        self._is_trusted = lru_cache(maxsize=4096)(lambda address: is_within(address, self._trusted))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Set the exchange's `client` and, behind a trusted proxy, its `peer`. Raises ClientIdInvalid."""
        exchange: Exchange = scope[EXCHANGE]
        exchange.peer, scope[IS_TRUSTED], name = self.caller(exchange.peer, scope[FIELDS])
        exchange.client = self.client(name, exchange.peer)
        if exchange.client is None:
            return self._look_up(name, exchange, scope, receive, send)
        return self.app(scope, receive, send)

    async def _look_up(self, name: str | None, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        exchange.client = await self.resolve_client(name, exchange.peer)
        await self.app(scope, receive, send)

    def caller(self, peer: str, fields: Fields) -> tuple[str, bool, str | None]:
        """Return the client's address, whether `peer` is a trusted proxy, and the client id in the request or None.

        Raises ClientIdInvalid.
        """
        is_trusted = bool(self._trusted) and self._is_trusted(peer)
        if is_trusted:
            peer = client_address(peer, fields, self._trusted)
        return peer, is_trusted, self.name(fields)

    def name(self, fields: Fields) -> str | None:
        """Return the client id in the request, or None. Raises ClientIdInvalid."""
        return client_id(fields, self.header)

    def client(self, name: str | None, address: str) -> Client | None:
        """Return the client with an id, or of an address if `name` is None; None if the store must be asked."""
        return self.clients.by_address(address_key(address)) if name is None else self.clients.try_get(name)

    async def resolve_client(self, name: str | None, address: str) -> Client:
        """Return the client as `client` does, and ask the store if necessary."""
        known = self.client(name, address)
        return await self.clients.look_up(name or "") if known is None else known


class RoutingMiddleware:
    """Determines route, cost and deadline of a request."""

    def __init__(self, app: ASGIApp, *, router: Router) -> None:
        self.app = app
        self._routes = router.routes
        self._totals = {
            name: upstream_client.total_timeout for name, upstream_client in router.upstream_clients.items()
        }

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Set route, cost and deadline. Raises NoRoute, MethodNotAllowed, and BadRequest for an invalid timeout."""
        exchange: Exchange = scope[EXCHANGE]
        route, exchange.cost = self._routes.find(host_name(scope[FIELDS]), exchange.method, exchange.path)
        exchange.route = route.name
        scope[ROUTE] = route
        scope[DEADLINE] = deadline_of(route, self._totals.get(route.upstream), scope[FIELDS], exchange.started)
        return self.app(scope, receive, send)


class LoadSheddingMiddleware:
    """Refuses a share of the requests while the event loop is overloaded, lowest priority first."""

    def __init__(self, app: ASGIApp, *, lag: EventLoopShedder, priorities: PriorityClasses) -> None:
        self.app = app
        self._lag = lag
        self._bands = priorities

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Call the next step, or raise LoadShed."""
        if self._lag.is_over:
            priority = self._bands.of(scope[EXCHANGE].client.quota.name)
            if self._lag.sheds(priority):
                raise self._lag.refusal(priority)
        return self.app(scope, receive, send)


class RateLimitMiddleware:
    """Charges the client's bucket, and the address's bucket if the client is not registered: both or neither."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limiter: RateLimiter,
        clock_ns: Callable[[], int],
        address_quota: Quota | None,
        exempt: Collection[Any],
        shadow: ShadowLimits | None = None,
    ) -> None:
        """`address_quota` None disables the address limit; addresses in `exempt` networks have none.

        `shadow` evaluates candidate limits.
        """
        self.app = app
        self.decide = limiter.decide
        self.decide_async = limiter.decide_async
        self._clock_ns = clock_ns
        self._address_quota = address_quota
        self._is_exempt = lru_cache(maxsize=4096)(lambda address: is_within(address, exempt))
        self.shadow = shadow
        self.fields = RateLimitHeaders()
        self.lines, self.headers = self.fields.lines, self.fields.headers

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Set the decision and its response fields. Raises RateLimited and CostExceedsCapacity."""
        exchange: Exchange = scope[EXCHANGE]
        assert exchange.client is not None  # noqa: S101 - set by IdentityMiddleware
        charges = exchange.charges = self.charges(exchange.client, exchange.peer, exchange.cost)
        now_ns = self._clock_ns()
        decision = self.decide(charges, now_ns)
        if decision is None:
            return self._wait(charges, now_ns, scope, receive, send)
        self._apply(exchange, decision)
        return self.app(scope, receive, send)

    async def _wait(self, charges: list[Charge], now_ns: int, scope: Scope, receive: Receive, send: Send) -> None:
        """Await the store's decision; cancelling this does not cancel the command on the shared connection."""
        decision: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.decide_async(charges, now_ns, partial(_resolve, decision))
        self._apply(scope[EXCHANGE], await decision)
        await self.app(scope, receive, send)

    def _apply(self, exchange: Exchange, decision: Decision) -> None:
        exchange.decision = decision
        exchange.response_headers += self.headers(decision)
        if self.shadow is not None:
            self.shadow.observe(exchange)
        if not decision.allowed:
            raise refusal(exchange, decision)

    def limits_address_of(self, client: Client, peer: str) -> bool:
        """Tell whether a request of `client` from the address `peer` is also charged to that address."""
        return self._address_quota is not None and not client.is_registered and not self._is_exempt(peer)

    def charges(self, client: Client, peer: str, cost: float) -> list[Charge]:
        """Return the charges of a request of `client` from the address `peer`; all or none must be charged."""
        charges = [Charge(client.key, client.quota, client.quota.cost_ns(cost))]
        quota = self._address_quota
        if quota is not None and self.limits_address_of(client, peer):
            charges.append(Charge(f"peer:{address_key(peer)}", quota, quota.cost_ns(cost)))
        return charges


def _resolve(future: asyncio.Future[Decision], decision: Decision) -> None:
    if not future.done():  # done if the request was cancelled meanwhile
        future.set_result(decision)


class ProxyApp:
    """The innermost step: passes the exchange to the router."""

    def __init__(self, *, router: Router) -> None:
        self._router = router

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Forward one request."""
        return self._router.forward(scope[EXCHANGE], scope[ROUTE], scope, receive, send, is_trusted=scope[IS_TRUSTED])
