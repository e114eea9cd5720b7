"""What all exchanges of the fast path have in common under one configuration."""

import time
from collections.abc import Callable

from api_gateway.errors import GatewayError
from api_gateway.http1.headers import http_date
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.middleware import ExchangeMiddleware
from api_gateway.models import Clock, Exchange, HeaderList
from api_gateway.proxy.admission import Admission
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.problem_response import problem_message
from api_gateway.router import Router


class ExchangeContext:
    """The objects of the ASGI path, and the header fields that the gateway adds. Has no state but configuration."""

    def __init__(
        self,
        *,
        record: ExchangeMiddleware,
        admission: Admission,
        headers: HeaderReader,
        router: Router,
        limit_headers: RateLimitHeaders,
        clock: Clock,
        clock_ns: Callable[[], int],
    ) -> None:
        """`clock` (seconds) and `clock_ns` read the same monotonic clock."""
        self.record = record
        self.admission = admission
        self.headers = headers
        self.router = router
        self.clock = clock
        self.clock_ns = clock_ns
        self.limit_headers = limit_headers
        self.via_field = headers.via.field
        self.via = headers.via.field("1.1")
        self.via_line = b"\r\n%b: %b\r\n" % self.via

    def __repr__(self) -> str:
        return f"<{type(self).__name__} [{self.headers!r}]>"

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
