"""Runs the fallback of a route after the attempts on its upstream have failed."""

from collections.abc import Awaitable, Callable, Mapping

from api_gateway.errors import GatewayError, Unavailable, UpstreamFailed
from api_gateway.http1.asgi import Receive, Send
from api_gateway.http1.headers import FALLBACK
from api_gateway.models import Clock, Exchange
from api_gateway.proxy.failure_record import note_failure, note_shed
from api_gateway.proxy.fallback import Fallback, add_failure, applies
from api_gateway.proxy.upstream_request import UpstreamRequest
from api_gateway.resilience.retry import is_repeatable
from api_gateway.upstreams.upstream_client import UpstreamClient

AskUpstream = Callable[[Exchange, UpstreamClient, UpstreamRequest, Receive, Send], Awaitable[None]]


class FallbackRunner:
    """Responds for upstreams that failed. Stateless."""

    def __init__(
        self,
        upstream_clients: Mapping[str, UpstreamClient],
        ask_upstream: AskUpstream,
        on_fallback: Callable[[Exchange, GatewayError], None],
        clock: Clock,
    ) -> None:
        """`ask_upstream` makes the attempts on an upstream; `on_fallback` is called before a fallback responds."""
        self._upstream_clients = upstream_clients
        self._ask_upstream = ask_upstream
        self._on_fallback = on_fallback
        self._clock = clock

    async def respond(
        self,
        exchange: Exchange,
        fallback: Fallback,
        request: UpstreamRequest,
        receive: Receive,
        send: Send,
        attempts: Awaitable[None],
    ) -> None:
        """Await the attempts; if they fail before the response has begun, respond by the fallback if it applies."""
        try:
            await attempts
        except (Unavailable, UpstreamFailed) as error:
            if exchange.status or not self._may_respond(exchange, fallback, request, error):
                raise
            note_failure(exchange, error)
            exchange.fallback = fallback.name
            self._on_fallback(exchange, error)
            exchange.has_reached |= not error.is_retry_safe
            exchange.response_headers.append((FALLBACK, fallback.name.encode()))
            if fallback.upstream is None:
                await self._respond_static(exchange, fallback, send)
            else:
                await self._respond_from_upstream(exchange, fallback.upstream, error, request, receive, send)

    def _may_respond(
        self, exchange: Exchange, fallback: Fallback, request: UpstreamRequest, error: GatewayError
    ) -> bool:
        if (
            fallback.upstream is not None
            and request.deadline is not None
            and not request.deadline.remaining(self._clock())
        ):
            return False
        return applies(
            fallback,
            error,
            is_repeatable=is_repeatable(exchange.method, request.fields),
            is_replayable=request.body.is_replayable,
        )

    async def _respond_static(self, exchange: Exchange, fallback: Fallback, send: Send) -> None:
        exchange.status, exchange.bytes_out = fallback.status, len(fallback.body)
        headers = [*fallback.fields(exchange.cors), *exchange.response_headers]
        await send({"type": "http.response.start", "status": fallback.status, "headers": headers})
        await send({"type": "http.response.body", "body": fallback.body, "more_body": False})

    async def _respond_from_upstream(
        self,
        exchange: Exchange,
        upstream: str,
        first: GatewayError,
        request: UpstreamRequest,
        receive: Receive,
        send: Send,
    ) -> None:
        """Respond by another upstream; raise `first` if that fails too before the response has begun."""
        failed, target = exchange.upstream, exchange.target
        exchange.upstream = upstream
        upstream_client = self._upstream_clients[upstream]
        upstream_client.retries.budget.deposit(exchange.started)
        try:
            await self._ask_upstream(exchange, upstream_client, request, receive, send)
        except (Unavailable, UpstreamFailed) as error:
            if exchange.status:
                raise
            note_shed(exchange, error)
            exchange.upstream, exchange.target, exchange.fallback = failed, target, None
            exchange.has_reached |= not error.is_retry_safe
            exchange.response_headers = [pair for pair in exchange.response_headers if pair[0] != FALLBACK]
            add_failure(first, error)
            try:
                raise first from first.__cause__
            finally:
                del first  # breaks the reference cycle with this frame
