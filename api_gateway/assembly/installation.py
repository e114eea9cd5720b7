"""Applies configurations to one application: the first at its start, others by reloads."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

from api_gateway.admin.context import AdminContext, Lifecycle
from api_gateway.admin.gate import Access, OperatorGate
from api_gateway.admin.history_queries import HistoryQueries
from api_gateway.assembly.data_plane import data_plane_of
from api_gateway.assembly.gateway import Assembly, Gateway, Plan
from api_gateway.config import GatewayConfig
from api_gateway.eventloop.steps import Steps, each, run_in_steps
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.middleware import DataPlaneSwitch
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reload.reloader import Reloader, refused_reload
from api_gateway.reload.serialization import deserialized
from api_gateway.reporting.issuer_snapshot import IssuerSnapshot
from api_gateway.reporting.process_figures import figures_of_this_process
from api_gateway.reporting.snapshot import UpstreamSnapshot, WorkerSnapshot
from api_gateway.reporting.tls_snapshot import TlsSnapshot
from api_gateway.reporting.traffic_history import TrafficHistory, seconds_to_next
from api_gateway.reporting.transitions import transitions_of
from api_gateway.reporting.worker_channel import Aggregator
from api_gateway.resilience.fair_shares import FairShares, ResourceState


class Application(Protocol):
    """The application that configurations are applied to: its operator gate, and the state of its endpoints."""

    gate: OperatorGate
    state: Any  # has the attributes that are set below, and those that the endpoints add


class ServerTls(Protocol):
    """The certificates of the server. `prepare` loads them; `on_change` of the installation puts them into force."""

    def prepare(self, config: GatewayConfig) -> None:
        """Load what a configuration needs, and change nothing. Blocks. Raises StartupError."""
        ...

    def snapshot(self) -> TlsSnapshot:
        """Return the certificates in force, and what is wrong with them."""
        ...


class Installation:
    """Applies configurations to an application in two phases: `prepare` may fail, `commit` takes effect at once.

    States: none, prepared. `prepare` leads to prepared and `commit` back to none; `commit` in none is a defect.
    """

    def __init__(
        self,
        app: Application,
        assembly: Assembly,
        switch: DataPlaneSwitch,
        *,
        server_headers: frozenset[bytes],
        access: Callable[[GatewayConfig], Access],
        connections: FairShares | None,
        read: Callable[[], GatewayConfig] | None,
        on_change: Callable[[GatewayConfig], None] | None,
        tls: ServerTls | None = None,
    ) -> None:
        """`access` returns the access rules of the operator endpoints, and may block.

        `read` reads the configuration again; `on_change` is called with each configuration that a reload has applied.
        `tls` are the certificates of the server.
        """
        self._app = app
        self._assembly = assembly
        self._switch = switch
        self._server_headers = server_headers
        self._access_of = access
        self._read = read
        self._connections = connections
        self._on_change = on_change
        self._tls = tls
        self._plan: Plan | None = None
        self._access: Access | None = None
        self._settings: GatewayConfig | None = None  # as read, without the demo services
        self._reloader: Reloader | None = None
        self._history = TrafficHistory()  # stays empty in one of several workers

    def __repr__(self) -> str:
        return f"<Installation of {self._assembly!r} [{'none' if self._plan is None else 'prepared'}]>"

    async def start(
        self, settings: GatewayConfig, context: Callable[..., AdminContext], aggregator: Aggregator
    ) -> None:
        """Apply the first configuration; `context` creates the context of the operator endpoints."""
        gateway = self._assembly.gateway
        self._reloader = Reloader(settings, self._read, self._apply, wall_clock=gateway.clocks.wall)
        data_plane, fast_path, make_explainer = data_plane_of(
            gateway, self._server_headers, has_own_tls=self._tls is not None
        )
        self._switch.set(data_plane, fast_path, fast_path.is_proxied)
        self._app.gate.access = await asyncio.to_thread(self._access_of, settings)
        self._app.state.gateway = gateway
        self._app.state.traffic_history = self._history
        self._app.state.admin_context = context(gateway, make_explainer, aggregator)
        aggregator.register(self.snapshot, self)
        aggregator.respond_by(HistoryQueries(gateway.history, gateway.clocks.wall).run)

    async def prepare(self, values: dict[str, Any]) -> None:
        """See `worker_channel.Configured`."""
        await self._prepare(await asyncio.to_thread(deserialized, values))

    async def _prepare(self, config: GatewayConfig) -> None:
        self._plan = None
        self._settings = config
        self._access = await asyncio.to_thread(self._access_of, config)
        if self._tls is not None:
            await asyncio.to_thread(self._tls.prepare, config)
        self._plan = await self._assembly.plan(config)

    def commit(self) -> None:
        """Put the prepared configuration into force. Requests in progress end under the one that they began with."""
        plan, access, settings = self._plan, self._access, self._settings
        self._plan = None
        assert plan is not None and access is not None and settings is not None  # noqa: S101, PT018 - see the class
        gateway = self._assembly.commit(plan)
        data_plane, fast_path, make_explainer = data_plane_of(
            gateway, self._server_headers, has_own_tls=self._tls is not None
        )
        self._switch.set(data_plane, fast_path, fast_path.is_proxied)
        self._app.state.gateway = gateway
        context: AdminContext = self._app.state.admin_context
        context.make_explainer, context.route_names = make_explainer, gateway.route_names
        context.accepts_keys, context.configuration = gateway.accepts_keys, gateway.config
        self._app.gate.access = access
        if self._on_change is not None:
            self._on_change(settings)

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration of a single process; UNAVAILABLE while it starts or drains."""
        assert self._reloader is not None  # noqa: S101 - nothing serves before the start
        phase = self._app.state.admin_context.lifecycle
        if phase is not Lifecycle.SERVING:
            return self._reloader.record(refused_reload(f"the gateway is {phase}"), origin)
        return await self._reloader.reload(origin)

    async def _apply(self, config: GatewayConfig) -> None:
        await self._prepare(config)
        self.commit()

    def snapshot(self) -> Steps[WorkerSnapshot]:
        """Return the snapshot of this process."""
        snapshot = yield from snapshot_of(self._assembly.gateway)
        if self._connections is not None:
            snapshot.resources.insert(0, ResourceState.of("connections", [self._connections]))
        if self._reloader is not None:
            snapshot.configuration = self._reloader.state
        if self._tls is not None:
            snapshot.tls = self._tls.snapshot()
        snapshot.points = self._history.points
        return snapshot

    @asynccontextmanager
    async def sampling(self, *, is_alone: bool) -> AsyncIterator[None]:
        """Sample the traffic within this block, if this process is alone; of several the supervisor does."""
        if not is_alone:
            yield
            return
        task = asyncio.create_task(self._sample_traffic(), name="history of traffic")
        try:
            yield
        finally:
            await cancel_and_wait(task)

    async def _sample_traffic(self) -> None:
        """Add a point to the history of traffic every `POINT_SECONDS`, until cancelled."""
        clocks = self._assembly.gateway.clocks
        while True:
            await asyncio.sleep(seconds_to_next(time.monotonic()))
            now = clocks.now()
            await run_in_steps(
                self._history.sample_in_steps([self._assembly.gateway.recorder], now.monotonic, now.wall)
            )


def snapshot_of(gateway: Gateway) -> Steps[WorkerSnapshot]:
    """Return the snapshot of a gateway, in steps, so that it does not block the event loop for long."""
    now = gateway.clocks.monotonic()
    upstreams = yield from each(
        gateway.upstreams.items(),
        lambda _, live: UpstreamSnapshot.of(live.upstream_client.upstream, now, live.monitor.names),
    )
    histories = yield from each(
        gateway.upstreams.items(), lambda _, live: transitions_of(live.upstream_client.upstream)
    )
    resources = yield from each(gateway.upstreams.items(), lambda _, live: live.upstream_client.resources())
    yield  # as many files as are open are counted in a step of their own
    process = figures_of_this_process()
    gateway.recorder.waiting_traces = gateway.tracing.waiting
    issuers = {} if gateway.tokens is None else gateway.tokens.keys
    yield
    return WorkerSnapshot(
        worker="",
        recorder=gateway.recorder,
        upstreams=upstreams,
        buckets=len(gateway.limiter),
        bucket_limit=gateway.limiter.bucket_limit,
        overflowed=gateway.limiter.overflowed,
        limiter=gateway.limiter.state(),
        client_store_error=gateway.clients.store_error,
        unwritten=_unwritten(gateway),
        histories=histories,
        lag=gateway.event_loop_shedder.lag,
        tasks=len(asyncio.all_tasks()),
        resources=[one for found in resources.values() for one in found],
        process=process,
        issuers={name: IssuerSnapshot(one.count, one.fetched_at, one.error) for name, one in issuers.items()},
        history=_history_figures(gateway),
    )


def _unwritten(gateway: Gateway) -> dict[str, str | None]:
    """Return why the last write of each kind of state failed; the kinds are those of `unwritten_state`."""
    return {
        "quotas": gateway.keeping.error,
        "usage": None if gateway.usage is None else gateway.usage.error,
        "webhook_events": gateway.keeping.events_error,
        "required_proofs": gateway.clients.proofs_error,
        "key_uses": gateway.clients.keys.uses_error,
    }


def _history_figures(gateway: Gateway) -> dict[str, int]:
    sizes = gateway.history.sizes()
    counts: dict[str, int] = {result: count for result, (count, _) in sizes.items()}
    return counts | {"bytes": sum(size for _, size in sizes.values())}
