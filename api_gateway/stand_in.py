"""Acts on a route's fallback: waits for the tries on its upstream, and answers in its place where those fail."""

from collections.abc import Awaitable, Callable, Mapping

from api_gateway.errors import GatewayError, Unavailable, UpstreamFailed
from api_gateway.failures import note_failure
from api_gateway.fallback import Fallback, add_failure, stands_in
from api_gateway.headers import FALLBACK
from api_gateway.models import Exchange
from api_gateway.request import Receive, Send, UpstreamRequest
from api_gateway.retry import is_repeatable
from api_gateway.service import Service

Ask = Callable[[Exchange, Service, UpstreamRequest, Receive, Send], Awaitable[None]]


class StandIn:
    """Answers for upstreams that cannot."""

    def __init__(
        self, services: Mapping[str, Service], ask: Ask, on_fallback: Callable[[Exchange, GatewayError], None]
    ) -> None:
        """`ask` tries an upstream; `on_fallback` hears of a fallback that takes over after an error."""
        self._services = services
        self._ask = ask
        self._on_fallback = on_fallback

    async def answer(
        self,
        exchange: Exchange,
        fallback: Fallback,
        request: UpstreamRequest,
        receive: Receive,
        send: Send,
        tries: Awaitable[None],
    ) -> None:
        """Have the fallback answer where the tries have come to nothing, nothing has been sent, and it may."""
        try:
            await tries
        except (Unavailable, UpstreamFailed) as error:
            if exchange.status or not stands_in(
                fallback,
                error,
                is_repeatable=is_repeatable(exchange.method, request.fields),
                is_kept=request.body.is_kept,
            ):
                raise
            note_failure(exchange, error)
            exchange.fallback = fallback.name
            self._on_fallback(exchange, error)
            exchange.has_reached |= not error.is_retry_safe
            exchange.answer_headers.append((FALLBACK, fallback.name.encode()))
            if fallback.upstream is None:
                await self._statically(exchange, fallback, send)
            else:
                await self._from_another(exchange, fallback.upstream, error, request, receive, send)

    async def _statically(self, exchange: Exchange, fallback: Fallback, send: Send) -> None:
        exchange.status, exchange.bytes_out = fallback.status, len(fallback.body)
        headers = [*fallback.fields(), *exchange.answer_headers]
        await send({"type": "http.response.start", "status": fallback.status, "headers": headers})
        await send({"type": "http.response.body", "body": fallback.body, "more_body": False})

    async def _from_another(
        self,
        exchange: Exchange,
        upstream: str,
        first: GatewayError,
        request: UpstreamRequest,
        receive: Receive,
        send: Send,
    ) -> None:
        """Have another upstream answer; if that fails too before it has begun, it was the `first` failure."""
        failed, exchange.upstream = exchange.upstream, upstream
        service = self._services[upstream]
        service.retry_budget.deposit()
        try:
            await self._ask(exchange, service, request, receive, send)
        except (Unavailable, UpstreamFailed) as error:
            if exchange.status:
                raise
            exchange.upstream, exchange.fallback = failed, None
            exchange.has_reached |= not error.is_retry_safe
            exchange.answer_headers = [pair for pair in exchange.answer_headers if pair[0] != FALLBACK]
            add_failure(first, error)
            raise first from error
