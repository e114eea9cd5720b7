"""The server of one process: uvicorn's, with the gateway's own protocol, and logging to standard error."""

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from api_gateway.admin.admin_listener import AdminListener
from api_gateway.admin.context import Lifecycle
from api_gateway.admin.locality import Locality
from api_gateway.assembly.access import operator_access
from api_gateway.assembly.data_plane import hsts_fields
from api_gateway.assembly.gateway import Assembly
from api_gateway.assembly.installation import Installation
from api_gateway.assembly.serving import serving
from api_gateway.config import GatewayConfig
from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.https_redirect import HttpsRedirect
from api_gateway.downstream.listener import change_protocol, protocol_of
from api_gateway.errors import DRAIN_INCOMPLETE, StartupError
from api_gateway.middleware import DataPlaneSwitch
from api_gateway.observability.label_counter import LabelCounter
from api_gateway.printable_text import counted
from api_gateway.process.config_watch import ConfigSource, ConfigWatch
from api_gateway.process.listeners import Listeners, WorkerSockets, watched
from api_gateway.process.message_log import change_logging
from api_gateway.process.server_app import ServerApp
from api_gateway.process.server_certificates import ServerCertificates
from api_gateway.process.startup_message import announce_start
from api_gateway.process.stop_times import stop_within, watchdog_of
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reporting.worker_channel import Aggregator, SingleProcess
from api_gateway.resilience.fair_shares import FairShares, default_connections
from api_gateway.settings.server import ServerSection
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks
from api_gateway.system.collection import settle_objects
from api_gateway.system.descriptor_limit import raise_descriptor_limit
from api_gateway.system.held_signals import unblocked_signals
from api_gateway.system.service_manager import ServiceManager
from api_gateway.upstreams.dns import resolve_host

logger = logging.getLogger(__name__)

ADMIN_CONNECTIONS = 256  # to the operator listener
_STEP = 0.1  # seconds between checks of `force_exit`


class GatewayServer(uvicorn.Server):
    """A uvicorn server that announces its address, reloads on SIGHUP, and stops without losing a request.

    After a stop signal it reports not ready and keeps serving for `drain_delay` seconds, so that load balancers can
    react. Then it accepts no more connections, and requests in progress have `drain_timeout` seconds to end.
    """

    def __init__(
        self,
        config: GatewayConfig,
        aggregator: Aggregator | None = None,
        read: Callable[[], GatewayConfig] | None = None,
        *,
        locality: Locality | None = None,
        clocks: Clocks = SYSTEM_CLOCKS,
        is_watched: bool = False,
        manager: ServiceManager | None = None,
    ) -> None:
        """`is_watched`: a change of the files of `read` triggers a reload. The others are as in `create_app`.

        `manager` is notified of the state of the process, and may provide the sockets to listen on.
        """
        self._stop_requested = asyncio.Event()
        self.is_serving = threading.Event()  # set once every listener accepts connections
        self._settings = config
        self._manager = manager or ServiceManager()
        self._delay = config.server.drain_delay
        self.cut_off = 0  # requests and tunnels still in progress at the end of the drain time
        self._sockets = WorkerSockets([])
        refused: Counter[str] = LabelCounter()
        section = config.server
        self.connections = FairShares(section.max_connections or default_connections(raise_descriptor_limit()))
        self._aggregator = aggregator or SingleProcess()
        self._reloads: set[asyncio.Task[ReloadOutcome]] = set()
        self._watch: ConfigWatch | None = None
        if is_watched and isinstance(read, ConfigSource):
            self._watch = ConfigWatch(read, partial(self._aggregator.reload, "--watch"))
        self._watching: asyncio.Task[None] | None = None
        self._is_reload_due = False  # requested before the start was complete
        self._certificates = ServerCertificates(config)
        self._following: asyncio.Task[None] | None = None
        self._assembly = Assembly(refused, {}, resolve_host, clocks)
        self._switch = DataPlaneSwitch()
        self._app = ServerApp(
            self._switch,
            refused,
            partial(self._serving, read=read, locality=locality),
            clocks=clocks,
            has_admin_listener=config.admin.listen is not None,
        )
        self._watchdog = watchdog_of(section)
        super().__init__(_uvicorn_config(self._app, section, refused, self.connections))
        admin = AdminListener(self._app)
        self._admin_config = _uvicorn_config(
            admin, section, refused, FairShares(ADMIN_CONNECTIONS), knows_proxy_protocol=False
        )
        self._redirect_config = self._redirection(config, refused)
        self._apply_tls(config)

    @asynccontextmanager
    async def _serving(
        self, app: ServerApp, *, read: Callable[[], GatewayConfig] | None, locality: Locality | None
    ) -> AsyncIterator[None]:
        """Serve within this block, which is the lifespan of the application."""
        async with self._assembly.live(self._settings):
            installation = Installation(
                app,
                self._assembly,
                self._switch,
                server_headers=frozenset(),
                access=partial(operator_access, locality=locality),
                connections=self.connections,
                read=read,
                on_change=self._apply_configuration,
                tls=self._certificates,
            )
            async with serving(
                app,
                self._assembly,
                installation,
                self._settings,
                self._aggregator,
                lambda: self.server_state.connections,
            ):
                yield

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on these sockets, by default on those of the configuration. Raises StartupError."""
        if sockets is not None:
            self.run_on(WorkerSockets(sockets))
            return
        listeners = Listeners.of(self._settings, 1, self._manager.passed)
        try:
            self.run_on(listeners.sets[0])
        finally:
            listeners.close()

    def run_on(self, sockets: WorkerSockets) -> None:
        """Serve on bound sockets."""
        self._sockets = sockets
        with watched(sockets.public) as public:
            super().run(public)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving, the watchdog and the watch of files, and announce it. Raises StartupError."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().startup(sockets)
            if self.started:
                await self._open_listener(self._sockets.admin, self._admin_config)
                if self._redirect_config is not None:
                    await self._open_listener(self._sockets.redirect, self._redirect_config)
                _check_listening(self._sockets)
        except OSError as error:  # another program has begun to listen since the sockets were bound
            await self._close(sockets)
            raise StartupError(f"cannot listen: {(error.strerror or str(error)).lower()}") from error
        if self.started:
            self._watchdog.watch()
            settle_objects()
            self.announce()
            self.is_serving.set()
            if self._is_reload_due:
                self.begin_reload("SIGHUP")
            self._following = self._loop.create_task(self._certificates.follow_files(), name="certificates")
            if self._watch is not None:
                self._watching = self._loop.create_task(self._watch.run(), name="watch")

    @property
    def should_exit(self) -> bool:
        """Whether the server is to stop. May be set in any thread, and by a signal handler."""
        return self._should_exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        self._should_exit = value
        if value and self.started:  # else it is checked after the start
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(self._stop_requested.set)

    async def main_loop(self) -> None:
        """Serve until `should_exit` is set, which uvicorn's version checks ten times a second."""
        if not await self.on_tick(0):
            await self._stop_requested.wait()

    def begin_reload(self, origin: str) -> None:
        """Start a reload in a task; its outcome is logged. `origin` names who requested it."""
        task = asyncio.get_running_loop().create_task(self._reload(origin), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self, origin: str) -> ReloadOutcome:
        with self._manager.reloading():
            return await self._aggregator.reload(origin)

    def _apply_configuration(self, config: GatewayConfig) -> None:
        """Apply the server's settings of a reloaded configuration. Open connections keep their limits."""
        section = config.server
        self._settings, self._delay = config, section.drain_delay
        self.connections.total = section.max_connections or default_connections(raise_descriptor_limit())
        for listener in (self.config, self._admin_config, self._redirect_config):
            if listener is None:
                continue
            factory: Any = listener.http
            change_protocol(factory, section)
            listener.timeout_graceful_shutdown = math.ceil(section.drain_timeout)
        self._certificates.commit()
        self._apply_tls(config)
        self._watchdog.set_stop_timeout(stop_within(section))
        change_logging(config.log)

    def _apply_tls(self, config: GatewayConfig) -> None:
        """Have new connections begin with TLS, or without."""
        public: Any = self.config.http
        admin: Any = self._admin_config.http
        public.tls = self._certificates.terminator
        public.secure_fields = hsts_fields(config)  # not for operators: a browser would apply it to all of localhost
        admin.tls = self._certificates.terminator if config.admin.tls else None

    def _redirection(self, config: GatewayConfig, refused: Counter[str]) -> uvicorn.Config | None:
        """Return the configuration of the listener for plain HTTP, None if there is none."""
        section = config.server.tls
        if section is None or section.redirect_from is None:
            return None
        port = section.redirect_port or config.server.port
        app = HttpsRedirect(
            port, section.acme_challenges, self._certificates.has_certificate_for, self._app.cors_fields
        )
        return _uvicorn_config(app, config.server, refused, self.connections)

    async def _open_listener(self, sockets: list[socket.socket], config: uvicorn.Config) -> None:
        """Serve on the sockets of another listener than that for clients; uvicorn closes those with the others."""
        if not sockets:
            return
        config.load()
        protocol: Callable[..., asyncio.Protocol] = config.http_protocol_class
        connect = partial(protocol, config, self.server_state, self.lifespan.state)
        for sock in sockets:
            server = await asyncio.get_running_loop().create_server(connect, sock=sock, backlog=config.backlog)
            self.servers.append(server)

    def announce(self) -> None:
        """Print or log the startup message."""
        announce_start(self._settings, self._sockets)
        self._manager.ready()

    @property
    def exit_code(self) -> int:
        """The exit code of the process after it has served."""
        return DRAIN_INCOMPLETE if self.cut_off else 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: keep serving for `drain_delay` seconds, then drain."""
        for task in (self._watching, self._following):
            if task is not None:
                task.cancel()
        self._manager.stopping(stop_within(self._settings.server))
        connections = counted(len(self.server_state.connections), "connection")
        logger.info("draining: %s, new requests for %g s", connections, self._delay)
        until = time.monotonic() + self._delay
        while not self.force_exit and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110 - set by a signal
            await asyncio.sleep(min(left, _STEP))
        await self._close(sockets)
        logger.info("stopped")

    async def _close(self, sockets: list[socket.socket] | None) -> None:
        """Accept no more connections, and end the open ones; without any, this takes no time."""
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for _ in range(2):  # a connection that has just been accepted is set up
            await asyncio.sleep(0)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)
        elif not self.force_exit:
            await self.lifespan.shutdown()

    async def _wait_tasks_to_complete(self) -> None:
        """Wait until all requests have ended; when the drain time is over, abort the rest.

        uvicorn's own version cannot be used: it also waits for the listening sockets, even after a second interrupt,
        and since Python 3.12 these wait for every connection.
        """
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()  # it may have been set up after uvicorn shut the others down
        try:
            while (state.connections or state.tasks) and not self.force_exit:  # noqa: ASYNC110 - as above
                await asyncio.sleep(_STEP)
        finally:
            self._abort_connections()

    def _abort_connections(self) -> None:
        """Abort the requests and tunnels in progress, and count them."""
        connections: set[Any] = self.server_state.connections  # uvicorn names its own protocols as members
        running = [one for one in connections if isinstance(one, DownstreamConnection) and one.is_busy]
        if running:
            self.cut_off = len(running)
            logger.error("cut off at the end of the drain timeout: %s", counted(self.cut_off, "request"))
        for connection in running:
            connection.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second SIGINT ends without waiting."""
        context = getattr(self._app.state, "admin_context", None)
        if context is not None:  # the signal may arrive before the start is complete
            context.lifecycle = Lifecycle.DRAINING
        self._watchdog.expect_end()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving, without raising them again as uvicorn does: a clean stop has exit code 0."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
            yield
            return
        before = {number: signal.signal(number, handler) for number, handler in self._handlers().items()}
        try:
            with unblocked_signals(), self._watchdog.active():
                yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)

    def _handlers(self) -> dict[signal.Signals, Callable[[int, FrameType | None], None]]:
        """Return the signal handlers."""
        return {
            signal.SIGINT: self.handle_exit,
            signal.SIGTERM: self.handle_exit,
            signal.SIGHUP: self._on_hangup,
            signal.SIGUSR1: _on_unused,
            signal.SIGUSR2: _on_unused,
        }

    def _on_hangup(self, _number: int, _frame: FrameType | None) -> None:
        """Reload the configuration, now or when the start is complete."""
        if self.started:
            self._loop.call_soon_threadsafe(self.begin_reload, "SIGHUP")
        else:
            self._is_reload_due = True


def _check_listening(sockets: WorkerSockets) -> None:
    """Raise OSError for the first socket on which uvloop could not listen: it closes those, and reports nothing."""
    for setting, found in sockets.by_setting:
        if any(sock.fileno() < 0 for sock in found):
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)} ({setting})")


def _on_unused(number: int, _frame: FrameType | None) -> None:
    logger.warning("%s is ignored: there is a single process and no worker to restart", signal.Signals(number).name)


def _uvicorn_config(
    app: Any,
    section: ServerSection,
    refused: Counter[str],
    shares: FairShares,
    *,
    knows_proxy_protocol: bool = True,
) -> uvicorn.Config:
    """Return the uvicorn configuration of one listener, whose connections are limited by `shares`."""
    factory: Any = protocol_of(
        section, refused, shares, knows_proxy_protocol=knows_proxy_protocol
    )  # called as uvicorn calls a class
    return uvicorn.Config(
        app,
        http=factory,
        ws="none",  # the protocol serves WebSockets itself
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=math.ceil(section.keep_alive_timeout),
        timeout_graceful_shutdown=math.ceil(section.drain_timeout),
    )
