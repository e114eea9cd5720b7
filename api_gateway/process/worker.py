"""One of several worker processes: the gateway on inherited sockets, connected to its supervisor."""

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from api_gateway._version import __version__
from api_gateway.config import GatewayConfig
from api_gateway.errors import STARTUP_FAILED, StartupError
from api_gateway.process.listeners import WorkerSockets
from api_gateway.process.message_log import configure_logging
from api_gateway.process.server import GatewayServer
from api_gateway.reload.serialization import deserialized
from api_gateway.reporting.worker_channel import REPLACED_SIGNAL, SupervisorChannel
from api_gateway.system.output import redirected

logger = logging.getLogger(__name__)


def main(worker_config: dict[str, Any]) -> int:
    """Serve until a stop signal or the end of the supervisor; return the exit code. See `WorkerConfig`."""
    with redirected():
        return _serve(worker_config)


def _serve(worker_config: dict[str, Any]) -> int:
    version = worker_config.get("version")  # missing if the supervisor is older than the check
    if version != __version__:
        logger.error("%s is installed, and the supervisor runs %s: restart the gateway", __version__, version)
        return STARTUP_FAILED
    for number in (signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # only the supervisor handles them
    config = deserialized(worker_config["config"])
    configure_logging(config.log, f"worker {worker_config['number']}: ")
    try:
        server = WorkerServer(config, socket.socket(fileno=worker_config["channel"]), str(worker_config["number"]))
    except StartupError as error:  # the supervisor has checked the same before, so a file has changed since
        logger.error("%s", error)  # noqa: TRY400 - a mistake of files
        return STARTUP_FAILED
    public, admin, redirect = (
        [socket.socket(fileno=one) for one in worker_config[key]]
        for key in ("listeners", "admin_listeners", "redirect_listeners")
    )
    try:
        server.run_on(WorkerSockets(public, admin, redirect))
    except StartupError as error:
        logger.error("%s", error)  # noqa: TRY400 - another program listens on its address
        return STARTUP_FAILED
    return server.exit_code if server.started else STARTUP_FAILED


class WorkerServer(GatewayServer):
    """A server that reports to its supervisor: that it is ready, snapshots, and the last snapshot when it stops."""

    def __init__(self, config: GatewayConfig, channel: socket.socket, worker: str) -> None:
        self._supervisor = SupervisorChannel(channel, self._on_orphaned, worker)
        super().__init__(config, self._supervisor)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Connect to the supervisor, then start."""
        await self._supervisor.connect()
        await super().startup(sockets)

    def announce(self) -> None:
        """Report to the supervisor that the worker is ready; the supervisor prints the startup message."""
        self._supervisor.announce_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then send the last snapshot and the number of requests that were cut off."""
        await super().shutdown(sockets)
        await self._supervisor.close(self.cut_off)

    def _handlers(self) -> dict[signal.Signals, Callable[[int, FrameType | None], None]]:
        for_the_supervisor = {signal.SIGHUP, signal.SIGUSR2}
        own = {number: do for number, do in super()._handlers().items() if number not in for_the_supervisor}
        return {**own, REPLACED_SIGNAL: self._on_replaced}

    def _on_replaced(self, _number: int, _frame: FrameType | None) -> None:
        """Drain at once, without `drain_delay`: another worker serves on these sockets already."""
        self._delay = 0
        self._watchdog.expect_end()
        self.should_exit = True

    def _on_orphaned(self) -> None:
        self.handle_exit(signal.SIGTERM, None)
