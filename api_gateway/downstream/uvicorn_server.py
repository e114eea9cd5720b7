"""The facts about a uvicorn server that runs the gateway, and the gateway's protocol for that server.

uvicorn has several implementations of HTTP. The one on httptools appends trailers to the header fields of a request,
before or after the application sees them, so trailers cannot be told apart there. The one on h11 discards them.
"""

import asyncio
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import uvicorn
from uvicorn.lifespan.on import LifespanOn
from uvicorn.middleware.message_logger import MessageLoggerMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http import httptools_impl
from uvicorn.server import ServerState

from api_gateway.downstream.connection_factory import FirstProtocol
from api_gateway.downstream.listener import change_protocol, protocol_of
from api_gateway.downstream.proxy_headers import RecordedProxyHeaders
from api_gateway.downstream.rooted_app import RootedApp
from api_gateway.http1.asgi import Receive
from api_gateway.http1.headers import Fields
from api_gateway.resilience.fair_shares import FairShares, default_connections
from api_gateway.settings.server import ServerSection
from api_gateway.system.descriptor_limit import raise_descriptor_limit

COMMAND = "uvicorn api_gateway.main:app --http api_gateway.server:protocol"
TRAILERS_MIXED = (
    "Send Content-Length: under uvicorn's protocol for httptools, the trailers of a chunked request become header"
    f" fields. The operator can permit chunked requests with the gateway's own protocol: {COMMAND}"
)
_STOCK_MODULES = "uvicorn.protocols.http."


class Listener:
    """The gateway's protocol under a server of others: what creates its connections, and their shares."""

    def __init__(self, section: ServerSection, refused: Counter[str]) -> None:
        """`refused` counts the requests that the protocol refuses, by reason."""
        self.shares = FairShares(_max_connections(section))
        self.connections: set[Any] = set()  # replaced by the server's own set when the first one arrives
        self.protocol = protocol_of(section, refused, self.shares)

    def __repr__(self) -> str:
        return f"<Listener [{self.shares!r}]>"

    def change(self, section: ServerSection) -> None:
        """Apply other settings. Open connections keep their limits."""
        self.shares.total = _max_connections(section)
        change_protocol(self.protocol, section)


def _max_connections(section: ServerSection) -> int:
    return section.max_connections or default_connections(raise_descriptor_limit())


def protocol(
    config: uvicorn.Config,
    server_state: ServerState,
    app_state: dict[str, Any],
    _loop: asyncio.AbstractEventLoop | None = None,
) -> FirstProtocol:
    """Return a connection with the gateway's own protocol: for uvicorn's `Config(http=...)` and `--http`.

    The gateway gets its connections without uvicorn's middleware for proxies, because `server.trusted_proxies` decides
    about those. Another application, which may mount the gateway, is served with the default limits.
    """
    app = _gateway_behind(config.loaded_app)
    if app is None:
        return _default_listener(config).protocol(config, server_state, app_state, _loop)
    listener: Listener = app.listener
    listener.connections = server_state.connections
    connection = listener.protocol.connection(config, server_state, app_state, _loop)
    connection.app = RootedApp(app, config.root_path) if config.root_path else app
    return listener.protocol.begin(connection, server_state)


def _gateway_behind(app: Any) -> Any:
    """Return the application that has a listener, behind the middleware that uvicorn adds; None if there is none."""
    while isinstance(app, ProxyHeadersMiddleware | RecordedProxyHeaders | MessageLoggerMiddleware):
        app = app.app
    return app if isinstance(getattr(app, "listener", None), Listener) else None


@lru_cache(maxsize=8)
def _default_listener(_config: uvicorn.Config) -> Listener:
    """Return the listener of a server whose application has none."""
    return Listener(ServerSection(), Counter())


@dataclass(frozen=True, slots=True)
class UvicornServer:
    """The uvicorn server that runs the application."""

    config: uvicorn.Config

    @classmethod
    def behind(cls, receive: Receive) -> "UvicornServer | None":
        """Return the server that calls the application with this `receive` of the lifespan; None if it is another."""
        owner = getattr(receive, "__self__", None)
        return cls(owner.config) if isinstance(owner, LifespanOn) else None

    @property
    def has_own_protocol(self) -> bool:
        """True if its connections have the gateway's own protocol."""
        return getattr(self.config, "http_protocol_class", None) is protocol

    @property
    def mixes_trailers(self) -> bool:
        """True if its protocol appends trailers to the header fields."""
        found = getattr(self.config, "http_protocol_class", None)
        return isinstance(found, type) and issubclass(found, httptools_impl.HttpToolsProtocol)

    @property
    def has_several_workers(self) -> bool:
        """True if the server keeps several workers at the same time."""
        return self.config.workers > 1 and not self.config.should_reload

    def limit_drain(self, section: ServerSection) -> None:
        """Apply `drain_timeout`, unless the command line sets a time."""
        if self.config.timeout_graceful_shutdown is None:
            self.config.timeout_graceful_shutdown = math.ceil(section.drain_timeout)


def may_hold_trailers(fields: Fields, receive: Receive) -> bool:
    """Return whether the header fields of a request may contain its trailers.

    `receive` is the request's, of a server that is not the gateway's own. If middleware has replaced it, the tasks of
    the event loop show whether uvicorn serves by httptools.
    """
    if b"transfer-encoding" not in fields:
        return False
    owner = getattr(receive, "__self__", None)
    if type(owner).__module__.startswith(_STOCK_MODULES):
        return isinstance(owner, httptools_impl.RequestResponseCycle)
    serving = httptools_impl.RequestResponseCycle.run_asgi.__code__
    return any(getattr(task.get_coro(), "cr_code", None) is serving for task in asyncio.all_tasks())
