"""What an application does while it serves, whether or not it is one of the framework."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from api_gateway._version import __version__
from api_gateway.admin.audit_log import AuditFile, AuditLog
from api_gateway.admin.context import AdminContext, Lifecycle
from api_gateway.admin.gate import OperatorGate
from api_gateway.admin.health_cache import HealthCache
from api_gateway.admin.operator_limits import OperatorLimits
from api_gateway.admin.routers import FIRST_SEGMENTS
from api_gateway.assembly.access import NO_ACCESS
from api_gateway.assembly.credential_watch import CredentialWatch
from api_gateway.assembly.gateway import Assembly, Gateway
from api_gateway.assembly.identity import adopted_claim
from api_gateway.assembly.installation import Application, Installation
from api_gateway.config import GatewayConfig
from api_gateway.http1.asgi import ASGIApp
from api_gateway.reporting.worker_channel import Aggregator, SupervisorChannel
from api_gateway.system.clocks import Clocks
from api_gateway.system.state_folder import own_folder

if TYPE_CHECKING:
    from api_gateway.admin.explainer import Explainer


def operator_gate(
    framework: ASGIApp, state: Any, *, has_admin_listener: bool, refused: Counter[str], clocks: Clocks
) -> OperatorGate:
    """Return the gate in front of the operator endpoints, and add it to their state."""
    gate = state.gate = OperatorGate(
        framework,
        access=NO_ACCESS,
        endpoints=FIRST_SEGMENTS,
        has_admin_listener=has_admin_listener,
        readiness=partial(_readiness, state),
        health=partial(_health, state),
        limits=OperatorLimits(clocks.monotonic_ns),
        refused=refused,
    )
    return gate


def _readiness(state: Any) -> tuple[bool, str]:
    context: AdminContext | None = getattr(state, "admin_context", None)
    phase = Lifecycle.STARTING if context is None else context.lifecycle
    return phase is Lifecycle.SERVING, phase.value


def _health(state: Any) -> HealthCache | None:
    context: AdminContext | None = getattr(state, "admin_context", None)
    return None if context is None else context.health


@asynccontextmanager
async def serving(
    app: Application,
    assembly: Assembly,
    installation: Installation,
    settings: GatewayConfig,
    aggregator: Aggregator,
    open_connections: Callable[[], Iterable[Any]],
) -> AsyncIterator[None]:
    """Serve by the live parts of `assembly` within this block. `open_connections` are those of the server."""
    assembly.gateway.recorder.operator_refusals = app.gate.refusals
    await installation.start(settings, _admin_context, aggregator)
    app.state.admin_context.lifecycle = Lifecycle.SERVING
    watch = _credential_watch(assembly, open_connections)
    async with watch.running(), installation.sampling(is_alone=not isinstance(aggregator, SupervisorChannel)):
        yield
    app.state.admin_context.lifecycle = Lifecycle.DRAINING


def _credential_watch(assembly: Assembly, open_connections: Callable[[], Iterable[Any]]) -> CredentialWatch:
    gateway = assembly.gateway
    return CredentialWatch(
        gateway.clients,
        connections=open_connections,
        open_exchanges=gateway.open_exchanges,
        has_credentials=lambda: assembly.has_credentials,
        adopted=lambda claim: adopted_claim(claim, assembly.gateway.config, assembly.gateway.tokens),
        clock_ns=gateway.clocks.monotonic_ns,
    )


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
