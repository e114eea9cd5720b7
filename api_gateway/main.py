"""The composition root: builds the gateway as an ASGI application from its configuration.

`api_gateway.main:app` is the application for `uvicorn`. It is built at the first access, so importing does nothing.
"""

import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import FastAPI

from api_gateway._version import __version__
from api_gateway.admin.audit_log import AuditFile, AuditLog
from api_gateway.admin.context import AdminContext, Lifecycle
from api_gateway.admin.endpoints import Endpoints
from api_gateway.admin.gate import OperatorGate
from api_gateway.admin.health_cache import HealthCache
from api_gateway.admin.locality import Locality
from api_gateway.admin.operator_limits import OperatorLimits
from api_gateway.assembly.access import NO_ACCESS, operator_access
from api_gateway.assembly.credential_watch import CredentialWatch
from api_gateway.assembly.gateway import Assembly, Gateway
from api_gateway.assembly.identity import adopted_claim
from api_gateway.assembly.installation import Installation, ServerTls
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
from api_gateway.reporting.worker_channel import Aggregator, SingleProcess, SupervisorChannel
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import access_warnings
from api_gateway.settings.server import ServerSection
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks
from api_gateway.system.state_folder import own_folder
from api_gateway.upstreams.dns import Resolve, resolve_host

if TYPE_CHECKING:
    from api_gateway.admin.explainer import Explainer

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
        super().__init__(**options, docs_url=None, redoc_url=None)  # the gateway has a page of its own at /docs
        self._endpoints = Endpoints(self, refused)
        self.add_middleware(DataPlaneSplit, switch=switch)
        self._own_middleware = len(self.user_middleware)
        self._switch = switch
        self.startup_error: StartupError | None = None
        self.server: UvicornServer | None = None  # that runs the application, once it has begun the lifespan
        self.listener: Listener | None = None  # set if that server uses the gateway's own protocol
        self.has_admin_listener = has_admin_listener
        self.gate = OperatorGate(
            super().__call__,
            access=NO_ACCESS,
            endpoints=self._endpoints.first_segments,
            has_admin_listener=has_admin_listener,
            readiness=self._readiness,
            health=self._health,
            limits=OperatorLimits(clocks.monotonic_ns),
            refused=refused,
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

    def _readiness(self) -> tuple[bool, str]:
        context: AdminContext | None = getattr(self.state, "admin_context", None)
        phase = Lifecycle.STARTING if context is None else context.lifecycle
        return phase is Lifecycle.SERVING, phase.value

    def _health(self) -> HealthCache | None:
        context: AdminContext | None = getattr(self.state, "admin_context", None)
        return None if context is None else context.health


def create_app(
    config: GatewayConfig | None = None,
    *,
    server_headers: frozenset[bytes] = frozenset(),
    refused: Counter[str] | None = None,
    transports: Mapping[str, httpx.AsyncBaseTransport] | None = None,
    aggregator: Aggregator | None = None,
    resolve: Resolve = resolve_host,
    read: Callable[[], GatewayConfig] | None = None,
    on_change: Callable[[GatewayConfig], None] | None = None,
    tls: ServerTls | None = None,
    connections: FairShares | None = None,
    open_connections: Callable[[], Iterable[Any]] | None = None,
    locality: Locality | None = None,
    clocks: Clocks = SYSTEM_CLOCKS,
) -> GatewayApp:
    """Build the gateway as an ASGI application; connections and tasks are created by its lifespan.

    - `config`: by default read from all sources, as by `load_config`.
    - `server_headers` (lower case): header fields that the ASGI server adds to every response; those of upstreams are
      removed, so that none appears twice.
    - `refused`: the counter of requests that the server itself refuses, by reason.
    - `transports`: by upstream, instead of the gateway's own, such as `httpx.ASGITransport` in a test.
    - `aggregator`: merges snapshots of several workers; by default there is one process.
    - `resolve`: resolves names of upstreams; by default with the event loop's resolver.
    - `read`: reads the configuration for a reload; by default from all sources if `config` is None, else a reload
      fails.
    - `on_change`: called with each configuration that a reload has applied.
    - `tls`, `connections`: the certificates of the server, and the shares of its connections, for views.
    - `open_connections`: returns the server's connections, so that streams end with their credential.
    - `locality`: decides which requests are local and need no token; by default those of the operator's programs.
    - `clocks`: read by the limiter, breakers, health checks, metrics and operator endpoints.

    Raises ConfigError if `config` is None and the sources have mistakes.
    """
    settings = config or load_config()
    read = read or (load_config if config is None else None)
    refusals: Counter[str] = LabelCounter() if refused is None else refused
    switch = DataPlaneSwitch()

    @asynccontextmanager
    async def lifespan(app: GatewayApp) -> AsyncIterator[None]:
        _log_what_has_no_effect(app.server, settings.server)
        listener = app.listener = _listener_of(app.server, settings, refusals)
        changed = on_change if listener is None else partial(_apply_to_listener, listener, on_change)
        assembly = Assembly(refusals, transports or {}, resolve, clocks)
        replaced_within = 0.0 if app.server is not None and app.server.has_several_workers else REPLACED_WITHIN
        async with app.noting_startup_error(), assembly.live(settings, replaced_within) as gateway:
            gateway.recorder.operator_refusals = app.gate.refusals
            installation = Installation(
                app,
                assembly,
                switch,
                server_headers=server_headers if listener is None else frozenset(),
                access=partial(operator_access, locality=locality),
                connections=connections if listener is None else listener.shares,
                read=read,
                on_change=changed,
                tls=tls,
            )
            await installation.start(settings, _admin_context, aggregator or SingleProcess())
            app.state.admin_context.lifecycle = Lifecycle.SERVING
            watch = _credential_watch(assembly, listener, open_connections)
            async with watch.running(), installation.sampling(is_alone=not isinstance(aggregator, SupervisorChannel)):
                yield
            app.state.admin_context.lifecycle = Lifecycle.DRAINING

    return GatewayApp(
        switch,
        refusals,
        clocks=clocks,
        has_admin_listener=settings.admin.listen is not None,
        title="API Gateway",
        version=__version__,
        description="The operator endpoints. Requests below `/api/` are proxied and not described here.",
        lifespan=lifespan,
        redirect_slashes=False,
        license_info={"name": "MIT", "identifier": "MIT"},
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
    if section.proxy_protocol and not (server is not None and (server.has_own_protocol or server.is_gateways)):
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
    if settings.server.tls is not None and not server.is_gateways:
        logger.warning(
            "server.tls: only the gateway's own server applies it; start it with api-gateway, or set uvicorn's own"
            " --ssl-certfile and --ssl-keyfile"
        )
    if server.has_own_protocol:
        server.limit_drain(settings.server)
        return Listener(settings.server, refused)
    if not server.is_gateways:
        logger.warning(
            "uvicorn's own protocol serves: %sWebSockets are refused, trailers and interim responses are not"
            " forwarded, and the limits of connections, request heads and the rate of bodies do not apply."
            " All of this works with: %s",
            "chunked requests get 411, " if server.mixes_trailers else "",
            COMMAND,
        )
    return None


def _credential_watch(
    assembly: Assembly, listener: Listener | None, open_connections: Callable[[], Iterable[Any]] | None
) -> CredentialWatch:
    gateway = assembly.gateway
    return CredentialWatch(
        gateway.clients,
        connections=open_connections or (lambda: () if listener is None else listener.connections),
        open_exchanges=gateway.open_exchanges,
        has_credentials=lambda: assembly.has_credentials,
        adopted=lambda claim: adopted_claim(claim, assembly.gateway.config, assembly.gateway.tokens),
        clock_ns=gateway.clocks.monotonic_ns,
    )


def _apply_to_listener(
    listener: Listener, on_change: Callable[[GatewayConfig], None] | None, config: GatewayConfig
) -> None:
    listener.change(config.server)
    if on_change is not None:
        on_change(config)


def _audit_log(gateway: Gateway) -> AuditLog:
    recorder = gateway.recorder
    return AuditLog(AuditFile(own_folder(gateway.config.state_dir)), recorder.operator_changes, recorder.dropped_lines)


def _admin_context(
    gateway: Gateway, make_explainer: Callable[[], "Explainer"], aggregator: Aggregator
) -> AdminContext:
    return AdminContext(
        version=__version__,
        limiter=gateway.limiter,
        clients=gateway.clients,
        aggregator=aggregator,
        clocks=gateway.clocks,
        make_explainer=make_explainer,
        overrides=gateway.overrides,
        quotas=gateway.keeping.book,
        numbers=gateway.numbers,
        history=gateway.history,
        slots=gateway.slots,
        audit=_audit_log(gateway),
        route_names=gateway.route_names,
        accepts_keys=gateway.accepts_keys,
        usage=gateway.usage,
        configuration=gateway.config,
    )


def _asks_server(scope: Scope) -> bool:
    """Return whether a request is `OPTIONS *`, which the gate responds to."""
    return bool(scope["path"] == "*" and scope["method"] == "OPTIONS")
