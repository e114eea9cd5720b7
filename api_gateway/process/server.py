"""The server that runs the gateway in one process: uvicorn's, with our protocol, and logging to standard error."""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache, partial
from types import FrameType
from typing import Any

import uvicorn

from api_gateway.admin.context import Lifecycle
from api_gateway.admin.listener import AdminListener
from api_gateway.admin.locality import Locality
from api_gateway.config import GatewayConfig
from api_gateway.downstream.connection import ConnectionLimits, DownstreamConnection, limited_protocol
from api_gateway.errors import BLOCKED, DRAIN_INCOMPLETE
from api_gateway.http1.headers import Network, address_key, is_within
from api_gateway.main import create_app
from api_gateway.process.config_watch import ConfigSource, ConfigWatch
from api_gateway.process.listeners import Listeners, Sockets
from api_gateway.process.startup_message import startup_banner
from api_gateway.process.watchdog import Watchdog
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reporting.worker_channel import Aggregator, SingleProcess
from api_gateway.resilience.fair_shares import FairShares, default_connections
from api_gateway.settings.server import ServerSection
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks
from api_gateway.system.descriptor_limit import raise_descriptor_limit
from api_gateway.system.held_signals import unblocked_signals
from api_gateway.system.output import LineHandler, process_output

logger = logging.getLogger(__name__)

# What the server says of its own that is said here, or in the access log, in better words.
_SILENCED = (
    "ASGI callable returned without completing response.",
    "Cancel %s running task(s)",
    "Application startup failed. Exiting.",
)
ADMIN_CONNECTIONS = 256  # to the listener for operators
_STEP = 0.1  # seconds between two looks at whether it shall end at once
PROCESS_STOP_MARGIN = 3.0  # seconds the process may take beyond its time to drain
DRAIN_LINGER = 2.0  # seconds; see `protocol.DownstreamConnection.shutdown`


class GatewayServer(uvicorn.Server):
    """A uvicorn server that says where it listens, and stops without losing a request.

    After a signal it is not ready any more but goes on serving for `drain_delay` seconds, so that whoever spreads
    requests over gateways can take notice. Then it accepts no more, and what runs has `drain_timeout` seconds to end.
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
    ) -> None:
        """`is_watched`: a change of the files of `read` is a reload. The others are as in `create_app`."""
        self._settings = config
        self._delay = config.server.drain_delay
        self.cut_off = 0  # requests and tunnels that were still running when the time to drain was over
        self._sockets = Sockets([])
        refused: Counter[str] = Counter()
        section = config.server
        self.connections = FairShares(section.max_connections or default_connections(raise_descriptor_limit()))
        self._aggregator = aggregator or SingleProcess()
        self._reloads: set[asyncio.Task[ReloadOutcome]] = set()
        self._watch: ConfigWatch | None = None
        if is_watched and isinstance(read, ConfigSource):
            self._watch = ConfigWatch(read, partial(self._aggregator.reload, "--watch"))
        self._watching: asyncio.Task[None] | None = None
        self._is_reload_due = False  # it was asked for before the start was done
        self._app = create_app(
            config,
            refused=refused,
            aggregator=self._aggregator,
            connections=self.connections,
            read=read,
            on_change=self._apply_configuration,
            locality=locality,
            clocks=clocks,
        )
        self._watchdog = watchdog_of(section)
        super().__init__(_uvicorn_config(self._app, section, refused, self.connections))
        admin = AdminListener(self._app)
        self._admin_config = _uvicorn_config(admin, section, refused, FairShares(ADMIN_CONNECTIONS))

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on these sockets, or else on what the configuration says. Raises StartupError."""
        if sockets is not None:
            self.run_on(Sockets(sockets))
            return
        listeners = Listeners.of(self._settings, 1)
        try:
            self.run_on(listeners.sets[0])
        finally:
            listeners.close()

    def run_on(self, sockets: Sockets) -> None:
        """Serve on sockets that are bound."""
        self._sockets = sockets
        super().run(sockets.public)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell."""
        await super().startup(sockets)
        if self.started:
            self._loop = asyncio.get_running_loop()
            await self._open_admin_listener()
            self._watchdog.watch()
            _tune_garbage_collection()
            self.announce()
            if self._is_reload_due:
                self.begin_reload("SIGHUP")
            if self._watch is not None:
                self._watching = self._loop.create_task(self._watch.run(), name="watch")

    def begin_reload(self, origin: str) -> None:
        """Have the configuration reloaded. What becomes of it is in the log."""
        task = asyncio.get_running_loop().create_task(self._aggregator.reload(origin), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    def _apply_configuration(self, config: GatewayConfig) -> None:
        """Take what a reload has put into force, as far as it is the server's. Connections keep their limits."""
        section = config.server
        self._settings, self._delay = config, section.drain_delay
        self.connections.total = section.max_connections or default_connections(raise_descriptor_limit())
        for listener in (self.config, self._admin_config):
            protocol: Any = listener.http
            protocol.limits = _connection_limits(section)
            protocol.share_holder = staticmethod(_holder_of_connection(section.trusted_proxies))
            listener.timeout_graceful_shutdown = math.ceil(section.drain_timeout)
        self._watchdog.set_stop_timeout(stop_within(section))
        set_log_level(config.log.level)

    async def _open_admin_listener(self) -> None:
        """Serve the operator endpoints on sockets of their own, if there are any; they are closed with the others."""
        if not self._sockets.admin:
            return
        config = self._admin_config
        config.load()
        protocol: Callable[..., asyncio.Protocol] = config.http_protocol_class
        connect = partial(protocol, config, self.server_state, self.lifespan.state)
        for sock in self._sockets.admin:
            server = await asyncio.get_running_loop().create_server(connect, sock=sock, backlog=config.backlog)
            self.servers.append(server)

    def announce(self) -> None:
        """Tell the person at the terminal that the gateway serves."""
        print(startup_banner(self._settings, self._sockets), flush=True)

    @property
    def exit_code(self) -> int:
        """What the process shall end with, once it has served."""
        return DRAIN_INCOMPLETE if self.cut_off else 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop: go on for a while as if nothing was, then drain."""
        if self._watching is not None:
            self._watching.cancel()
        until = time.monotonic() + self._delay
        while not self.force_exit and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110 - set by a signal
            await asyncio.sleep(min(left, _STEP))
        await super().shutdown(sockets)

    async def _wait_tasks_to_complete(self) -> None:
        """Wait until everything is answered; when the time for that is over, end what no task serves too.

        uvicorn's own waits for the listening sockets too, also after a second interrupt, and they since Python 3.12
        for every connection.
        """
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()  # it may have been accepted and not yet made when the others heard of it
        try:
            while (state.connections or state.tasks) and not self.force_exit:  # noqa: ASYNC110 - as above
                await asyncio.sleep(_STEP)
        finally:
            self._abort_connections()

    def _abort_connections(self) -> None:
        """End what is still running, and count it."""
        running = [
            one for one in self.server_state.connections if isinstance(one, DownstreamConnection) and one.is_busy
        ]
        if running:
            self.cut_off = len(running)
            logger.error("%d requests were cut off: the time to drain was over", self.cut_off)
        for connection in running:
            connection.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second interrupt ends without waiting."""
        context = getattr(self._app.state, "console", None)
        if context is not None:  # the signal may come before start-up is done
            context.lifecycle = Lifecycle.DRAINING
        self._watchdog.expect_end()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving, without raising them again at the end: a clean stop is exit code 0."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread gets any
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
        """Return what to do at which signal."""
        return {
            signal.SIGINT: self.handle_exit,
            signal.SIGTERM: self.handle_exit,
            signal.SIGHUP: self._on_hangup,
            signal.SIGUSR1: _on_unused,
            signal.SIGUSR2: _on_unused,
        }

    def _on_hangup(self, _number: int, _frame: FrameType | None) -> None:
        """Reload the configuration, now or as soon as the start is done."""
        if self.started:
            self._loop.call_soon_threadsafe(self.begin_reload, "SIGHUP")
        else:
            self._is_reload_due = True


def _on_unused(number: int, _frame: FrameType | None) -> None:
    logger.warning("%s is ignored: there is one process, and no workers to restart", signal.Signals(number).name)


def stop_within(section: ServerSection, margin: float = PROCESS_STOP_MARGIN) -> float:
    """Return the seconds within which a process must have ended after a stop signal."""
    return section.drain_delay + section.drain_timeout + margin


def watchdog_of(section: ServerSection, margin: float = PROCESS_STOP_MARGIN) -> Watchdog:
    """Return what ends a process of the gateway that hangs."""
    return Watchdog(section.worker_timeout, stop_within(section, margin), blocked=BLOCKED, overdue=DRAIN_INCOMPLETE)


def _uvicorn_config(app: Any, section: ServerSection, refused: Counter[str], shares: FairShares) -> uvicorn.Config:
    """Return the settings of one listener, whose connections are shared by themselves."""
    return uvicorn.Config(
        app,
        http=limited_protocol(
            _connection_limits(section), refused, shares, _holder_of_connection(section.trusted_proxies)
        ),
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=math.ceil(section.keep_alive_timeout),
        timeout_graceful_shutdown=math.ceil(section.drain_timeout),
    )


def _tune_garbage_collection() -> None:
    """Let the collector look less often, and never again at what start-up made.

    A request leaves no cycles behind, so reference counts free all of it; the default thresholds cost a fifth of its
    time for nothing. What errors leave is still collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _connection_limits(section: ServerSection) -> ConnectionLimits:
    return ConnectionLimits(
        header_bytes=section.max_header_bytes,
        header_lines=section.max_header_lines,
        header_timeout=section.header_timeout,
        keep_alive_timeout=section.keep_alive_timeout,
        idle_timeout=section.idle_timeout,
        drain_linger=min(DRAIN_LINGER, section.drain_timeout / 2),
        connections_per_peer=section.max_connections_per_peer,
        body_rate=section.min_body_rate,
        body_grace=section.min_body_rate_grace,
    )


def _holder_of_connection(trusted: Collection[Network]) -> Callable[[str], str | None]:
    """Return what says whose share of the connections one from an address takes.

    Whom a trusted proxy forwards is not known before a head has come, so its connections are nobody's; so are those
    from a Unix socket.
    """

    @lru_cache(maxsize=4096)
    def holder(address: str) -> str | None:
        return None if not address or is_within(address, trusted) else address_key(address)

    return holder


def configure_logging(level: str, who: str = "") -> None:
    """Log to standard error; `who` tells one process of several from the others."""
    logging.basicConfig(
        level=level.upper(),
        handlers=[LineHandler(process_output().err)],
        format=f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s",
        force=True,
    )
    # What the server says of its life is said in the welcome; its errors stay.
    logging.getLogger("uvicorn.error").setLevel("INFO" if level == "debug" else "WARNING")
    # Leaving an answer unfinished is how the gateway breaks one that the upstream broke; its own log has the reason.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not str(record.msg).startswith(_SILENCED))


def set_log_level(level: str) -> None:
    """Log from this level on."""
    logging.getLogger().setLevel(level.upper())
    logging.getLogger("uvicorn.error").setLevel("INFO" if level == "debug" else "WARNING")
