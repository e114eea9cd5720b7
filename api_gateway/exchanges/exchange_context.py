"""The context of all exchanges under one configuration."""

import time
from collections.abc import Callable

from api_gateway.errors import GatewayError
from api_gateway.http1.headers import http_date
from api_gateway.http1.serializer import COLON, status_line
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.middleware import ExchangeRecords, proxied_paths
from api_gateway.models import Clock, Exchange, HeaderList
from api_gateway.observability.tracing import Tracer
from api_gateway.proxy.admission import Admission, RequestPlan, StageResponse
from api_gateway.proxy.cors_stages import CorsPolicies
from api_gateway.proxy.extension_stages import ResponseHooks
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.mirroring import Mirrors
from api_gateway.proxy.open_exchanges import OpenExchanges
from api_gateway.proxy.problem_response import instance_of, problem_message
from api_gateway.router import Router


class ExchangeContext:
    """The objects that decide on requests and record them, and the header fields that the gateway adds.

    Configuration only.
    """

    response_hooks: ResponseHooks | None = None  # of extensions
    mirrors: Mirrors | None = None  # unless no route has a mirror

    def __init__(
        self,
        *,
        record: ExchangeRecords,
        admission: Admission,
        headers: HeaderReader,
        router: Router,
        limit_headers: RateLimitHeaders,
        clock: Clock,
        clock_ns: Callable[[], int],
        cors: CorsPolicies | None = None,
        open_exchanges: OpenExchanges | None = None,
        tracer: Tracer | None = None,
        added: HeaderList | None = None,
    ) -> None:
        """`open_exchanges` has each exchange that comes by ASGI while it is served.

        `clock` (seconds) and `clock_ns` read the same monotonic clock. `cors` None: there are no CORS policies.
        `tracer` None: tracing is off. `added` are header fields of every response.
        """
        self.record = record
        self.admission = admission
        self.headers = headers
        self.router = router
        self.is_proxied = proxied_paths(router.routes)
        self.clock = clock
        self.clock_ns = clock_ns
        self.limit_headers = limit_headers
        self.cors = cors
        self.open_exchanges = open_exchanges or OpenExchanges()
        self.tracer = tracer
        self.via_field = headers.via.field
        self.via = headers.via.field("1.1")
        self._added = added or []
        self._added_lines = b"".join([b"%b: %b\r\n" % pair for pair in self._added])
        self.via_line = b"\r\n%b: %b\r\n%b" % (*self.via, self._added_lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{self.headers!r}]>"

    def refusal(
        self, plan: RequestPlan, error: GatewayError | StageResponse, *, keep_alive: bool
    ) -> tuple[bytes, bool]:
        """Record the failure; return the problem details as a response, and whether to keep the connection."""
        exchange = plan.exchange
        if isinstance(error, StageResponse):
            return self._direct(exchange, error, keep_alive=keep_alive), keep_alive
        cors = None if self.cors is None else self.cors.of_refusal(plan)
        self.record.note_failure(exchange, error)
        exchange.status = error.status
        decision, closes = exchange.decision, "connection" in error.headers
        lines = b"%bx-request-id: %b\r\n%b%bdate: %b%b" % (
            self._added_lines,
            exchange.id.encode(),
            b"" if decision is None else self.limit_headers.lines(decision, exchange.charges),
            b"" if cors is None else cors.lines,
            http_date(int(time.time())),
            b"\r\n" if keep_alive or closes else b"\r\nconnection: close\r\n",
        )
        head, body = problem_message(
            error,
            instance=instance_of(exchange.path, plan.raw_target),
            request_id=exchange.id,
            lines=lines,
            trace=exchange.trace,
        )
        exchange.bytes_out = len(body)
        return head if exchange.method == "HEAD" else head + body, keep_alive and not closes

    def _direct(self, exchange: Exchange, response: StageResponse, *, keep_alive: bool) -> bytes:
        """Record the status; return the response."""
        exchange.status, exchange.bytes_out = response.status, len(response.body)
        lines = [status_line(response.status, None), *map(COLON, response.headers)]
        lines += map(COLON, self.response_headers(exchange))
        lines.append(b"date: " + http_date(int(time.time())))
        if not keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join([*lines, b"\r\n"])
        return head if exchange.method == "HEAD" else head + response.body

    def response_headers(self, exchange: Exchange) -> HeaderList:
        """Return the header fields of every response: request id and, if there is a decision, the limits."""
        own = [*self._added, (b"x-request-id", exchange.id.encode())]
        decision = exchange.decision
        return own if decision is None else own + self.limit_headers.headers(decision, exchange.charges)
