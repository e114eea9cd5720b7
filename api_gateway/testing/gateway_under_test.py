"""A gateway in a thread of a test's process, on a free port of 127.0.0.1."""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from api_gateway.admin.locality import LoopbackRule
from api_gateway.config import from_values
from api_gateway.process.server import GatewayServer
from api_gateway.system.clocks import SYSTEM_CLOCKS, Clocks

_PATIENCE = 60.0  # seconds for the start, and for the end
_WALL_TIME = 1_800_000_000.0  # at which a virtual clock begins


class GatewayUnderTest:
    """A running gateway. States: running, stopped; `stop` leads to the latter.

    Its endpoints of operators accept all requests from this machine without a token. It sheds no load when the event
    loop is late, and writes no access log, unless the configuration says so.
    """

    def __init__(self, sections: Mapping[str, Any], folder: Path, *, is_virtual: bool = False) -> None:
        """Start a gateway with these sections of the configuration, which keeps its state in `folder`."""
        server = {"host": "127.0.0.1", "port": 0, "max_event_loop_lag": None, **sections.get("server", {})}
        if server.get("workers", 1) != 1:
            raise ValueError(
                f"server.workers: a gateway in a test is one process, so leave it out, got {server['workers']}"
            )
        defaults: dict[str, Any] = {"state_dir": folder, "log": {"access": False}}
        self._passed_ns: int | None = 0 if is_virtual else None
        clocks = self._virtual_clocks() if is_virtual else SYSTEM_CLOCKS
        config = from_values({**defaults, **sections, "server": server})
        self._server = GatewayServer(config, read=None, locality=LoopbackRule(), clocks=clocks)
        self._thread = threading.Thread(target=self._server.run, name="gateway", daemon=True)
        self._thread.start()
        end = time.monotonic() + _PATIENCE
        while not self._server.is_serving.wait(0.1):
            if not self._thread.is_alive() or time.monotonic() > end:
                raise RuntimeError("the gateway did not start; its messages say why")
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http{'' if config.server.tls is None else 's'}://127.0.0.1:{self.port}"

    def __repr__(self) -> str:
        return f"<GatewayUnderTest {self.url} [{'running' if self._thread.is_alive() else 'stopped'}]>"

    def advance(self, seconds: float) -> None:
        """Let time pass for limits, breakers and metrics. Raises RuntimeError unless the clock is virtual."""
        if self._passed_ns is None:
            raise RuntimeError("advance needs start_gateway(virtual_clock=True)")
        self._passed_ns += round(seconds * 1e9)

    def stop(self) -> None:
        """Stop the gateway. Idempotent."""
        self._server.should_exit = True
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            raise RuntimeError("the gateway did not stop")

    def _virtual_clocks(self) -> Clocks:
        return Clocks(
            monotonic=lambda: 1000.0 + (self._passed_ns or 0) / 1e9,
            monotonic_ns=lambda: 1_000_000_000_000 + (self._passed_ns or 0),
            wall=lambda: _WALL_TIME + (self._passed_ns or 0) / 1e9,
        )
