"""The ASGI middleware in front of everything below `/api`, outermost first.

Order: data plane split, exchange, admission; then the router forwards the request. These objects have no state but
configuration. The state of a request is its `Exchange`, which `ExchangeMiddleware` puts into the scope.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from api_gateway.downstream.uvicorn_server import TRAILERS_MIXED, may_hold_trailers
from api_gateway.errors import ClientDisconnected, Draining, GatewayError, InternalError, not_started
from api_gateway.http1.asgi import (
    FIELDS,
    SERVER_EXTENSION,
    ASGIApp,
    FastPathHandler,
    Receive,
    Scope,
    Send,
    ServerExtension,
)
from api_gateway.http1.headers import fields_of, host_name
from api_gateway.http1.methods import PROXIED_METHODS
from api_gateway.http1.request_head import RequestHead
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.metrics import Recorder
from api_gateway.models import Clock, Exchange, HeaderList
from api_gateway.observability.tracing import Tracer
from api_gateway.proxy.admission import Admission, DirectResponse, RequestPlan, Wait
from api_gateway.proxy.cors import origin_of
from api_gateway.proxy.cors_stages import CorsPolicies
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.open_exchanges import OpenExchanges
from api_gateway.proxy.problem_response import send_problem
from api_gateway.proxy.request_id import given_request_id, new_request_id
from api_gateway.proxy.upstream_request import raw_target
from api_gateway.router import Router

logger = logging.getLogger(__name__)

Observer = Callable[[Exchange], None]

API_PREFIX = "/api"
_BELOW = "/api/"
EXCHANGE = "gateway.exchange"


def is_proxied(path: str) -> bool:
    """Tell whether a path belongs to the data plane: `/api` and everything below it."""
    return path[:5] == _BELOW or path == API_PREFIX


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


async def respond_to_server_options(send: Send) -> None:
    """Respond to `OPTIONS *`, which asks for the abilities of the server as a whole (RFC 9110 section 9.3.7)."""
    headers = [(b"allow", PROXIED_METHODS.encode())]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


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

    def try_head(self, _client: Any, _head: RequestHead, _trailers: HeaderList) -> bool:
        """Return False."""
        return False

    def refusal_fields(self, _headers: HeaderList, _target: bytes) -> HeaderList:
        """Return no fields."""
        return []


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
        cors: CorsPolicies | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`on_failure` is called before an error is sent, so that a refund shows in the rate limit fields.

        `cors` are the CORS policies, None if there are none. `tracer` None: tracing is off.
        """
        self.app = app
        self._clock = clock
        self._recorder = recorder
        self._observers = tuple(observers)
        self._on_failure = on_failure
        self._cors = cors
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        fields = scope[FIELDS] = fields_of(scope["headers"])
        peer = scope["client"][0] if scope.get("client") else "unknown"
        identity = given_request_id(fields) or new_request_id()
        exchange = self.begin(Exchange(identity, scope["method"], scope["path"], peer, self._clock()))
        exchange.response_headers.append((b"x-request-id", exchange.id.encode()))
        if self._tracer is not None:
            scope["headers"], exchange.trace = trace = self._tracer.begin_parsed(scope["headers"])
            trace[1].host, trace[1].scheme, trace[1].version = (
                host_name(fields),
                scope["scheme"],
                scope["http_version"],
            )
        scope[EXCHANGE] = exchange
        await self.conclude(exchange, self.app, scope, receive, send)

    def begin(self, exchange: Exchange) -> Exchange:
        """Count an exchange as in flight until `end`, and return it."""
        self._recorder.in_flight += 1
        return exchange

    async def conclude(self, exchange: Exchange, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve an exchange by `app`, respond with problem details if that fails, and end the exchange."""
        try:
            await app(scope, receive, send)
        except GatewayError as error:
            await self._refuse(exchange, error, scope, send)
        except asyncio.CancelledError:
            self.note_cut_off(exchange)
            raise
        except Exception as error:  # noqa: BLE001 - a defect, which is logged
            await self._refuse(exchange, self.internal_error(exchange, error), scope, send)
        finally:
            self.end(exchange, self._clock())

    async def _refuse(self, exchange: Exchange, error: GatewayError, scope: Scope, send: Send) -> None:
        has_begun = exchange.status != 0  # the server closes the connection after an incomplete response
        self.note_failure(exchange, error)
        if has_begun or isinstance(error, ClientDisconnected):
            return
        exchange.status, exchange.source = error.status, "gateway"
        headers = exchange.response_headers
        if self._cors is not None:
            fields = scope[FIELDS]
            cors = self._cors.of_refusal(exchange, host_name(fields), origin_of(fields))
            if cors is not None:
                headers = [*headers, *cors.pairs]
        exchange.bytes_out = await send_problem(
            error, send, instance=exchange.path, request_id=exchange.id, headers=headers, trace=exchange.trace
        )

    @staticmethod
    def internal_error(exchange: Exchange, error: Exception) -> InternalError:
        """Log an error that is a defect of the gateway, with its traceback, and return the error for the client."""
        logger.error("request %s (%s %s) failed", exchange.id, exchange.method, exchange.path, exc_info=error)
        return InternalError(f"The gateway failed: {type(error).__name__}.")

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

    def note_illegal_event(self, exchange: Exchange, phase: str, event: str, error: Exception) -> None:
        """Count an event that the state of the exchange does not allow; log the first of each phase and event."""
        counts = self._recorder.illegal_exchange_events
        if not counts[phase, event]:
            logger.error("request %s (%s %s): %s", exchange.id, exchange.method, exchange.path, error)
        counts[phase, event] += 1

    def end(self, exchange: Exchange, now: float) -> None:
        """Pass the ended exchange to the observers. `now` is monotonic seconds."""
        self._recorder.in_flight -= 1
        exchange.finished = now
        for observe in self._observers:
            try:
                observe(exchange)
            except Exception:
                logger.exception("request %s could not be recorded", exchange.id)


class AdmissionMiddleware:
    """Admits the request of an exchange, and passes it to the router: the ASGI side of `proxy.admission`."""

    def __init__(
        self,
        *,
        admission: Admission,
        headers: HeaderReader,
        router: Router,
        limit_headers: RateLimitHeaders,
        clock_ns: Callable[[], int],
        open_exchanges: OpenExchanges | None = None,
    ) -> None:
        """`open_exchanges` has each exchange with a credential while it is forwarded."""
        self._open_exchanges = open_exchanges or OpenExchanges()
        self._admission = admission
        self._headers = headers
        self._router = router
        self._clock_ns = clock_ns
        self._limit_headers = limit_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises the GatewayError with which admission refuses it."""
        exchange: Exchange = scope[EXCHANGE]
        facts = self._headers.read(exchange.peer, scope[FIELDS], scope["http_version"])
        exchange.peer = facts.peer
        extension: ServerExtension | None = scope.get(SERVER_EXTENSION)
        if extension is None and facts.ambiguity is None and may_hold_trailers(scope[FIELDS], receive):
            facts.require_length(TRAILERS_MIXED)
        target = raw_target(scope) if extension is None else extension.target
        plan = RequestPlan(exchange, facts, target, self._clock_ns())
        result = self._admission.decide(plan)
        while isinstance(result, Wait):
            reply = await result.reply()
            result = self._admission.resume(plan, result, reply, self._clock_ns())
        if exchange.decision is not None:
            exchange.response_headers += self._limit_headers.headers(exchange.decision, exchange.charges)
        if isinstance(result, DirectResponse):
            exchange.status = result.status
            headers = [*result.headers, *exchange.response_headers]
            await send({"type": "http.response.start", "status": result.status, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if result is not None:
            raise result
        if exchange.credential is None:
            await self._router.forward(plan, scope, receive, send)
            return
        with self._open_exchanges.holding(exchange, extension):
            await self._router.forward(plan, scope, receive, send)
