"""The ASGI middleware in front of everything that is proxied, and the records of exchanges.

These objects have no state but configuration. The state of a request is its `Exchange`, which the data plane puts into
the scope of a request that comes by ASGI.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from api_gateway.errors import ClientDisconnected, Draining, GatewayError, InternalError, not_started
from api_gateway.http1.asgi import (
    ADMIN,
    ASGIApp,
    FastPathHandler,
    Receive,
    Scope,
    Send,
)
from api_gateway.http1.methods import PROXIED_METHODS
from api_gateway.http1.request_head import RequestHead
from api_gateway.metrics import Recorder
from api_gateway.models import Decision, Exchange, HeaderList
from api_gateway.printable_text import shown_method
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.path_table import PATH_PREFIX, is_placeholder
from api_gateway.proxy.problem_response import instance_in, send_problem
from api_gateway.proxy.route_table import Route

logger = logging.getLogger(__name__)

Observer = Callable[[Exchange], None]

API_PREFIX = "/api"
_BELOW = "/api/"
EXCHANGE = "gateway.exchange"


def is_proxied(path: str) -> bool:
    """Return whether a path belongs to the data plane: `/api` and everything below it."""
    return path[:5] == _BELOW or path == API_PREFIX


def proxied_paths(routes: Iterable[Route]) -> Callable[[str], bool]:
    """Return a function that returns whether a path belongs to the data plane.

    It has `/api`, and all paths with the first segment of a route.

    A route at `/`, or one whose first segment is a placeholder, takes all paths.
    """
    segments = {API_PREFIX[1:]}
    for route in routes:
        first = route.path.split("/")[1]
        if (not first and route.match == PATH_PREFIX) or is_placeholder(first):
            return _is_path
        segments.add(first)
    return partial(_begins_with, frozenset(segments)) if len(segments) > 1 else is_proxied


def _is_path(path: str) -> bool:
    return path.startswith("/")


def _begins_with(segments: frozenset[str], path: str) -> bool:
    return path[:1] == "/" and path[1:].partition("/")[0] in segments


class DataPlaneSplit:
    """Passes `/api`, and the other paths that routes have, to the data plane, and all others to `app`.

    The data plane does not pass through the framework's routing.
    """

    def __init__(self, app: ASGIApp, *, switch: "DataPlaneSwitch") -> None:
        self.app = app
        self._switch = switch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Dispatch one request by its path; close a WebSocket to be proxied that a server has parsed itself."""
        if ADMIN in scope or not self._switch.is_proxied(scope.get("path", "")):
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


class DataPlaneSwitch:
    """Holds the current data plane: the ASGI path (`data_plane`) and the fast path (`current`).

    Before start-up, requests get 503. Start-up sets both, and a reload replaces them; connections refer to this slot
    only.
    """

    def __init__(self) -> None:
        self.data_plane: ASGIApp = _not_started
        self.current: FastPathHandler = _Closed()
        self.is_proxied: Callable[[str], bool] = is_proxied

    def __repr__(self) -> str:
        return f"<DataPlaneSwitch [{'not started' if self.data_plane is _not_started else 'started'}]>"

    def set(
        self, data_plane: ASGIApp, fast_path: FastPathHandler, proxied: Callable[[str], bool] = is_proxied
    ) -> None:
        """Set the data plane for new requests. `proxied` returns whether a path belongs to it."""
        self.data_plane, self.current, self.is_proxied = data_plane, fast_path, proxied


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

    def below(self, _root: bytes) -> FastPathHandler:
        """Return itself."""
        return self


async def _not_started(scope: Scope, _receive: Receive, send: Send) -> None:
    await send_problem(not_started(), send, instance=instance_in(scope), request_id=None, headers=[])


class ExchangeRecords:
    """Counts exchanges in flight, notes their failures, and passes the ended ones to the observers."""

    def __init__(
        self,
        *,
        recorder: Recorder,
        observers: Sequence[Observer],
        on_failure: Callable[[Exchange, GatewayError], None] | None = None,
        on_late_decision: Callable[[Exchange, Decision], None] | None = None,
    ) -> None:
        """Set the observers.

        `on_failure` is called before an error is sent, so that a refund shows in the rate limit fields;
        `on_late_decision` with the decision on an exchange that has ended meanwhile.
        """
        self._recorder = recorder
        self._observers = tuple(observers)
        self._on_failure = on_failure
        self._on_late_decision = on_late_decision

    def begin(self, exchange: Exchange) -> Exchange:
        """Count an exchange as in flight until `end`, and return it."""
        self._recorder.in_flight += 1
        return exchange

    @staticmethod
    def internal_error(exchange: Exchange, error: Exception) -> InternalError:
        """Log an error that is a defect of the gateway, with its traceback, and return the error for the client."""
        logger.error("request %s failed", _described(exchange), exc_info=error)
        return InternalError(f"The gateway failed: {type(error).__name__}.")

    def note_late_reply(self, exchange: Exchange, reply: object) -> None:
        """Undo what a reply to a question of admission has charged for an exchange that has ended meanwhile."""
        if isinstance(reply, Decision) and self._on_late_decision is not None:
            self._on_late_decision(exchange, reply)

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
            logger.error("request %s: %s", _described(exchange), error)
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


def _described(exchange: Exchange) -> str:
    return f"{exchange.id} ({shown_method(exchange.method)} {exchange.path})"
