"""The beginning of a connection on a listener that knows the PROXY protocol, until its header has been read."""

import asyncio

from uvicorn.server import ServerState

from api_gateway.downstream.asgi_scope import peer_of
from api_gateway.downstream.closing import last_response
from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.listener_state import ListenerState
from api_gateway.downstream.proxy_protocol import ProxyHeaderError, parse_proxy_header
from api_gateway.downstream.slots import SURPLUS_TIMEOUT, Slot
from api_gateway.downstream.tls_connection import TlsConnection
from api_gateway.errors import BadRequest, GatewayError, RequestTimeout
from api_gateway.http1.asgi import RELAYED
from api_gateway.http1.network_set import NetworkSet


class ProxiedConnection:
    """Reads the header of a connection from a trusted peer, and then becomes the connection of the client it names.

    A connection of any other peer has no header: it begins at once. States: waiting for the header (in the server's
    set of connections), handed over, or closed (no longer in that set). While it waits, it has a slot: it counts in
    the total number of connections, but for no address, because its client is unknown. asyncio requires no base class
    of a protocol.
    """

    def __init__(
        self,
        connection: DownstreamConnection,
        first: DownstreamConnection | TlsConnection,
        listener: ListenerState,
        server_state: ServerState,
        senders: NetworkSet,
    ) -> None:
        """`senders` are the addresses whose connections begin with a header; `first` reads what follows it."""
        self._connection = connection
        self._first = first
        self._listener = listener
        self._server_state = server_state
        self._senders = senders
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._slot: Slot | None = None

    def __repr__(self) -> str:
        return f"<ProxiedConnection [{len(self._received)} bytes of a header]>"

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Wait for the header of a trusted peer (asyncio callback)."""
        self._transport = transport
        peer = peer_of(transport)
        if peer is None or peer[0] not in self._senders:
            self._hand_over(transport)
            return
        connections: set[object] = self._server_state.connections  # type: ignore[assignment]  # uvicorn names its own protocols
        connections.add(self)
        self._slot = self._listener.slots.acquire("", 0)
        if self._slot.is_excess:
            transport.abort()
            return
        limit = SURPLUS_TIMEOUT if self._slot.surplus else self._listener.limits.header_timeout
        self._timer = self._connection.loop.call_later(limit, self._on_timeout, limit)

    def data_received(self, data: bytes) -> None:
        """Read the header, and hand the rest over (asyncio callback)."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._received += data
        try:
            header = parse_proxy_header(self._received)
        except ProxyHeaderError as error:
            self._refuse(BadRequest(f"The connection must begin with a PROXY protocol header: {error}."))
            return
        if header is None:
            return
        self._stop()
        self._release()
        connection = self._connection
        connection.client = header.source or peer_of(transport)
        connection.scopes.marks[RELAYED] = True
        self._hand_over(transport)
        rest = bytes(self._received[header.size :])
        if rest and not transport.is_closing():
            self._first.data_received(rest)

    def eof_received(self) -> None:
        """Let the transport be closed: no request has arrived (asyncio callback)."""

    def pause_writing(self) -> None:
        """Do nothing: at most one short response is written (asyncio callback)."""

    def resume_writing(self) -> None:
        """Do nothing (asyncio callback)."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Forget the connection (asyncio callback)."""
        self._stop()
        self._release()

    def shutdown(self) -> None:
        """Close the connection: nothing has been served on it."""
        if self._transport is not None:
            self._transport.close()

    def _hand_over(self, transport: asyncio.Transport) -> None:
        transport.set_protocol(self._first)  # type: ignore[arg-type]  # a protocol without a base class
        self._first.connection_made(transport)

    def _on_timeout(self, limit: float) -> None:
        self._refuse(RequestTimeout(f"The PROXY protocol header did not arrive within {limit:g} s."))

    def _refuse(self, error: GatewayError) -> None:
        """Respond with problem details for the operator of the peer, and close."""
        self._stop()
        self._listener.refused[error.reason] += 1
        if self._transport is not None:
            self._transport.write(last_response(error, []))
            self._transport.close()

    def _release(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()

    def _stop(self) -> None:
        connections: set[object] = self._server_state.connections  # type: ignore[assignment]  # as above
        connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
