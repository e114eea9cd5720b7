"""A WebSocket handshake and the tunnel that follows it, as an exchange: the phase `tunnelling`."""

from typing import Final

import httpx

from api_gateway.exchanges.http_exchange import HttpExchange
from api_gateway.exchanges.relaying_exchange import InterimListener
from api_gateway.http1.headers import COST, LENGTH, rewrite_response
from api_gateway.models import HeaderList, Outcome
from api_gateway.proxy.attribution import NO_PROGRESS
from api_gateway.proxy.cors import complete
from api_gateway.proxy.exchange import NONE, SWITCH, TUNNEL_END, TUNNELLING
from api_gateway.proxy.url_rewriting import Authorities
from api_gateway.proxy.websocket_tunnel import Tunnel
from api_gateway.transport.response import SWITCHING
from api_gateway.transport.upstream_call import UpstreamCall
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

_LINES: Final = b"connection: Upgrade\r\nupgrade: websocket\r\n"
_FIELDS: Final[HeaderList] = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]


class TunnellingExchange(HttpExchange):
    """A handshake. If the upstream accepts it, bytes pass in both directions until the tunnel ends.

    An upstream with another transport gets the request without the handshake.
    """

    is_handshake = True
    tunnel: Tunnel | None = None
    _is_asked = False  # the current attempt asks for the switch of protocols

    def _start(self, upstream_client: UpstreamClient, attempt: Attempt, now: float) -> None:
        """Begin an attempt. The place of the tunnel is asked for before, see `_acquire`."""
        if self._is_asked != upstream_client.is_native:
            self._is_asked = upstream_client.is_native
            before = self.plan.headers
            sent = before[2] + _LINES if self._is_asked else before[2].removesuffix(_LINES)
            self.plan.headers = before._replace(sent=sent)
        if not self._is_asked:
            super()._start(upstream_client, attempt, now)
            return
        self._note_attempt(attempt, now)
        self._begin_to_connect(upstream_client, attempt, now)

    async def _acquire(self, upstream_client: UpstreamClient, attempt: Attempt, seconds: float) -> UpstreamCall:
        """Open or await a connection. Raises ShareExceeded if there is no place for the tunnel."""
        if self._is_asked:
            upstream_client.admit_tunnel(attempt.target, self.plan.principal)
        return await super()._acquire(upstream_client, attempt, seconds)

    def on_complex_head(self) -> None:
        """Accept a switch of protocols."""
        super().on_complex_head()
        self.listener = InterimListener(self._client, self._context, self._editor(), upgrade=self._is_asked)

    def on_progress(self) -> None:
        """Begin the tunnel after a 101; forward any other response."""
        if self.status == SWITCHING and self.response == NONE and self.error is None and self.attempt is not None:
            self._switch(self.attempt)
        else:
            super().on_progress()

    def _switch(self, attempt: Attempt) -> None:
        """Send the 101 to the client and begin the tunnel."""
        context, exchange, client = self._context, self.exchange, self._client
        context.router.outcomes.on_head(exchange, attempt, SWITCHING, context.clock(), NO_PROGRESS)
        if not self._leave_pool(attempt):
            return
        try:
            upstream, from_upstream = self.detach()
        except httpx.TransportError as error:
            self._refuse_stream(attempt, error)
            return
        exchange.status, exchange.source = SWITCHING, "upstream"
        if self.timer is not None:  # the deadline applies to the handshake only
            self.timer.cancel()
            self.timer = None
        self.move(SWITCH)
        upstream_client = context.router.upstream_clients[attempt.upstream.name]
        transport, from_client = client.switch_protocols(self.reason, self._fields_for_client(upstream_client))
        self.tunnel = tunnel = Tunnel(client.loop, transport, upstream, upstream_client.tunnel_timeout)
        if client.is_draining:
            tunnel.request_close()
        self.is_pending = True
        self.task = client.loop.create_task(self._run(tunnel, from_client, from_upstream))

    def _fields_for_client(self, upstream_client: UpstreamClient) -> HeaderList:
        """Return the header fields of the 101; settle the cost that it reports."""
        context, exchange, headers, route = self._context, self.exchange, self.headers, self.plan.route
        if route is not None and route.url_rewriter is not None:
            host = self.plan.facts.host_field
            authorities = Authorities.of(upstream_client, host)
            rewriter = route.url_rewriter.bound(exchange, self.plan.raw_target)
            headers = headers if rewriter is None else rewriter.rewrite(headers, authorities)
        if COST in self.fields:
            context.router.on_cost(exchange, self.fields[COST])
        own = context.response_headers(exchange)
        if exchange.cors is not None:
            headers, added = complete(exchange.cors, headers)
            own = own + added
        return [*rewrite_response(headers, self.fields, own, LENGTH, context.via), *_FIELDS]

    async def _run(self, tunnel: Tunnel, from_client: bytes, from_upstream: bytes) -> None:
        """Forward bytes until the tunnel ends."""
        await tunnel.run(from_client, from_upstream)
        self.task = None
        if self.phase == TUNNELLING:
            self._note_bytes(tunnel)
            self.move(TUNNEL_END)
            self._end(self._context.clock(), Outcome.SUCCESS, keep_alive=False)

    def _note_bytes(self, tunnel: Tunnel) -> None:
        self.exchange.bytes_in, self.exchange.bytes_out = tunnel.bytes_in, tunnel.bytes_out

    def on_drain(self) -> None:
        """Ask the client to close the tunnel, or end an event stream."""
        if self.tunnel is not None:
            self.tunnel.request_close()
        else:
            super().on_drain()

    def _abort(self) -> None:
        """Abort the tunnel too."""
        if self.tunnel is not None:
            self.tunnel.abort()
            self._note_bytes(self.tunnel)
        super()._abort()
