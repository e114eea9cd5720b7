"""The composition root: builds the gateway as an ASGI application from its configuration.

`api_gateway.main:app` is the application for `uvicorn`. It is built at the first access, so importing does nothing.
"""

import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
from fastapi import FastAPI

from api_gateway.admin.endpoints import APPLICATION, Endpoints
from api_gateway.assembly.access import operator_access
from api_gateway.assembly.gateway import Assembly
from api_gateway.assembly.installation import Installation
from api_gateway.assembly.serving import operator_gate, serving
from api_gateway.assembly.stores import REPLACED_WITHIN
from api_gateway.config import GatewayConfig, load_config
from api_gateway.downstream.proxy_headers import record_proxy_headers, with_own_peer
from api_gateway.downstream.uvicorn_server import COMMAND, Listener, UvicornServer
from api_gateway.errors import STARTUP_FAILED, StartupError
from api_gateway.http1.asgi import ADMIN, FastPathProvider, Message, Receive, Scope, Send
from api_gateway.http1.request_paths import below_root
from api_gateway.middleware import DataPlaneSplit, DataPlaneSwitch
from api_gateway.models import HeaderList
from api_gateway.observability.label_counter import LabelCounter
from api_gateway.reporting.worker_channel import SingleProcess
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import access_warnings
from api_gateway.settings.server import ServerSection
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks
from api_gateway.upstreams.dns import Resolve, resolve_host

logger = logging.getLogger(__name__)

STOCK_SERVER_HEADERS = frozenset({b"date", b"server"})


class GatewayApp(FastAPI):
    """The operator endpoints behind the operator gate, and the data plane before both.

    Requests below `/api` bypass the framework unless the embedding program has added middleware, which then handles
    those requests too.
    """

    def __init__(
        self,
        switch: DataPlaneSwitch,
        refused: Counter[str],
        *,
        clocks: Clocks,
        has_admin_listener: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._endpoints = Endpoints(self, refused)
        self.add_middleware(DataPlaneSplit, switch=switch)
        self._own_middleware = len(self.user_middleware)
        self._switch = switch
        self.startup_error: StartupError | None = None
        self.server: UvicornServer | None = None  # that runs the application, once it has begun the lifespan
        self.listener: Listener | None = None  # set if that server uses the gateway's own protocol
        self.has_admin_listener = has_admin_listener
        self.gate = operator_gate(
            super().__call__, self.state, has_admin_listener=has_admin_listener, refused=refused, clocks=clocks
        )

    @property
    def routes(self) -> list[Any]:
        """All routes, the gateway's own first. The first access imports the modules of those not requested yet."""
        self._endpoints.complete()
        return super().routes

    @property
    def fast_path(self) -> FastPathProvider | None:
        """The fast path for plain requests; None if middleware was added, which must see all requests."""
        return self._switch if self._has_no_other_middleware else None

    def cors_fields(self, headers: HeaderList, target: bytes) -> HeaderList:
        """Return the CORS fields of a response that is given before the application sees the request."""
        return self._switch.current.refusal_fields(headers, target)

    @property
    def _has_no_other_middleware(self) -> bool:
        return len(self.user_middleware) == self._own_middleware

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or lifespan (ASGI)."""
        scope = with_own_peer(scope)
        if scope.get("root_path"):
            scope = below_root(scope)
        is_proxied = scope["type"] == "http" and ADMIN not in scope and self._switch.is_proxied(scope["path"])
        if is_proxied and self._has_no_other_middleware:
            await self._switch.data_plane(scope, receive, send)
        elif scope["type"] == "http" and (_asks_server(scope) or self.gate.guards(scope) or not self._is_extended):
            await self.gate(scope, receive, send)
        elif scope["type"] == "lifespan":
            self.server = UvicornServer.behind(receive)
            await super().__call__(scope, receive, partial(self._send_lifespan, send))
        else:
            await super().__call__(scope, receive, send)

    @asynccontextmanager
    async def noting_startup_error(self) -> AsyncIterator[None]:
        """Store a StartupError of this block for the message to the server."""
        try:
            yield
        except StartupError as error:
            self.startup_error = error
            raise

    async def _send_lifespan(self, send: Send, message: Message) -> None:
        """Replace the framework's traceback by one line with the reason why the gateway cannot start."""
        if message["type"] == "lifespan.startup.failed" and self.startup_error is not None:
            message = {**message, "message": str(self.startup_error)}
        await send(message)

    @property
    def _is_extended(self) -> bool:
        """True if the embedding program has added routes or middleware, so that any path may be its own."""
        return len(self.router.routes) != self._endpoints.present_routes or not self._has_no_other_middleware


def create_app(
    config: GatewayConfig | None = None,
    *,
    server_headers: frozenset[bytes] = frozenset(),
    transports: Mapping[str, httpx.AsyncBaseTransport] | None = None,
    resolve: Resolve = resolve_host,
    read: Callable[[], GatewayConfig] | None = None,
    on_change: Callable[[GatewayConfig], None] | None = None,
    clocks: Clocks = SYSTEM_CLOCKS,
) -> GatewayApp:
    """Build the gateway as an ASGI application; connections and tasks are created by its lifespan.

    - `config`: by default read from all sources, as by `load_config`.
    - `server_headers` (lower case): header fields that the ASGI server adds to every response; those of upstreams are
      removed, so that none appears twice.
    - `transports`: by upstream, instead of the gateway's own, such as `httpx.ASGITransport` in a test.
    - `resolve`: resolves names of upstreams; by default with the event loop's resolver.
    - `read`: reads the configuration for a reload; by default from all sources if `config` is None, else a reload
      fails.
    - `on_change`: called with each configuration that a reload has applied.
    - `clocks`: read by the limiter, breakers, health checks, metrics and operator endpoints.

    Raises ConfigError if `config` is None and the sources have mistakes.
    """
    settings = config or load_config()
    read = read or (load_config if config is None else None)
    refusals: Counter[str] = LabelCounter()
    switch = DataPlaneSwitch()

    @asynccontextmanager
    async def lifespan(app: GatewayApp) -> AsyncIterator[None]:
        _log_what_has_no_effect(app.server, settings.server)
        listener = app.listener = _listener_of(app.server, settings, refusals)
        changed = on_change if listener is None else partial(_apply_to_listener, listener, on_change)
        assembly = Assembly(refusals, transports or {}, resolve, clocks)
        replaced_within = 0.0 if app.server is not None and app.server.has_several_workers else REPLACED_WITHIN
        async with app.noting_startup_error(), assembly.live(settings, replaced_within):
            installation = Installation(
                app,
                assembly,
                switch,
                server_headers=server_headers if listener is None else frozenset(),
                access=operator_access,
                connections=None if listener is None else listener.shares,
                read=read,
                on_change=changed,
            )

            def open_connections() -> Iterable[Any]:
                return () if listener is None else listener.connections

            async with serving(app, assembly, installation, settings, SingleProcess(), open_connections):
                yield

    return GatewayApp(
        switch,
        refusals,
        clocks=clocks,
        has_admin_listener=settings.admin.listen is not None,
        lifespan=lifespan,
        **APPLICATION,
    )


def __getattr__(name: str) -> Any:
    """Build `app` at the first access. An invalid configuration ends the process with a line for each mistake."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        settings = load_config()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(STARTUP_FAILED) from None
    for finding in access_warnings(settings):
        logger.warning("%s", finding)
    app = create_app(settings, server_headers=STOCK_SERVER_HEADERS, read=load_config)
    if app.has_admin_listener:
        logger.warning(
            "admin.listen: only the gateway's own server opens it; the operator endpoints are not served here"
        )
    globals()["app"] = app
    return app


def _log_what_has_no_effect(server: UvicornServer | None, section: ServerSection) -> None:
    """Log what an operator has set about proxies in front of the gateway, and this server does not apply."""
    told = record_proxy_headers()
    if told and not section.trusted_proxies:
        logger.warning(
            "uvicorn's --forwarded-allow-ips (FORWARDED_ALLOW_IPS) has no effect on the gateway, got %s: set"
            " server.trusted_proxies to the proxies whose X-Forwarded-For it shall use",
            ", ".join(sorted(told)),
        )
    if section.proxy_protocol and not (server is not None and server.has_own_protocol):
        logger.warning(
            "server.proxy_protocol: has no effect under this server, got %s; connections that begin with a PROXY"
            " protocol header fail. Start the gateway with api-gateway, or with: %s",
            ", ".join(map(str, section.proxy_protocol)),
            COMMAND,
        )


def _listener_of(server: UvicornServer | None, settings: GatewayConfig, refused: Counter[str]) -> Listener | None:
    """Return the listener of a uvicorn server with the gateway's own protocol; log what is missing with another."""
    if server is None:
        return None
    if settings.server.tls is not None:
        logger.warning(
            "server.tls: only the gateway's own server applies it; start it with api-gateway, or set uvicorn's own"
            " --ssl-certfile and --ssl-keyfile"
        )
    if server.has_own_protocol:
        server.limit_drain(settings.server)
        return Listener(settings.server, refused)
    logger.warning(
        "uvicorn's own protocol serves: %sWebSockets are refused, trailers and interim responses are not"
        " forwarded, and the limits of connections, request heads and the rate of bodies do not apply."
        " All of this works with: %s",
        "chunked requests get 411, " if server.mixes_trailers else "",
        COMMAND,
    )
    return None


def _apply_to_listener(
    listener: Listener, on_change: Callable[[GatewayConfig], None] | None, config: GatewayConfig
) -> None:
    listener.change(config.server)
    if on_change is not None:
        on_change(config)


def _asks_server(scope: Scope) -> bool:
    """Return whether a request is `OPTIONS *`, which the gate responds to."""
    return bool(scope["path"] == "*" and scope["method"] == "OPTIONS")
