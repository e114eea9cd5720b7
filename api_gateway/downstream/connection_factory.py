"""Creates the connections of one listener, for uvicorn's `Config(http=...)`."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.listener_state import ListenerState
from api_gateway.downstream.proxied_connection import ProxiedConnection
from api_gateway.downstream.server_context import ServerContext
from api_gateway.downstream.slots import ConnectionSlots, no_principal
from api_gateway.downstream.tls_connection import TlsConnection
from api_gateway.downstream.tls_terminator import TlsTerminator
from api_gateway.http1.network_set import NetworkSet
from api_gateway.resilience.fair_shares import FairShares

FirstProtocol = DownstreamConnection | ProxiedConnection | TlsConnection


class ConnectionFactory(ListenerState):
    """Returns a new connection for each call, as a protocol class of uvicorn does."""

    def __init__(
        self,
        limits: ConnectionLimits,
        refused: Counter[str],
        shares: FairShares | None = None,
        share_principal: Callable[[str], str | None] = no_principal,
    ) -> None:
        """`refused` counts refusals by reason. `shares` limits the connections, divided by `share_principal`."""
        super().__init__(limits, refused, ConnectionSlots(shares, share_principal))
        self.knows_proxy_protocol = True  # False on listeners that clients use directly
        # The addresses whose connections begin with a PROXY protocol header; None if there are none.
        self.header_senders: NetworkSet | None = None
        self.tls: TlsTerminator | None = None  # of new connections; None: they are plain
        self._server: ServerContext | None = None  # the server that created the last connection

    def __call__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> FirstProtocol:
        """Return a connection; the arguments are those of uvicorn's protocols."""
        return self.begin(self.connection(config, server_state, app_state, _loop), server_state)

    def begin(self, connection: DownstreamConnection, server_state: ServerState) -> FirstProtocol:
        """Return the protocol that reads the first bytes of a connection: a PROXY protocol header, TLS, or HTTP."""
        tls, senders = self.tls, self.header_senders
        first = connection if tls is None else TlsConnection(connection, self, tls, server_state)
        if senders is None:
            return first
        return ProxiedConnection(connection, first, self, server_state, senders)

    def connection(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> DownstreamConnection:
        """Return the connection of a client; the arguments are those of uvicorn's protocols."""
        server = self._server
        if server is None or server.app_state is not app_state:  # the state of a lifespan belongs to one server
            if not config.loaded:
                config.load()
            loop = _loop or asyncio.get_event_loop()  # which makes a system call
            server = ServerContext(config.loaded_app, config.root_path, server_state, app_state, loop)
            self._server = server
        return DownstreamConnection(self, server)
