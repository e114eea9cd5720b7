"""The command line: argument parsing, logging to standard error, and the server that runs the gateway."""

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from api_gateway import __version__
from api_gateway.admin import Phase
from api_gateway.config import GatewayConfig, ServerSection, load_config
from api_gateway.demo import banner
from api_gateway.diagnosis import ConfigError
from api_gateway.main import STARTUP_FAILED, client_store, create_app
from api_gateway.protocol import Bounds, GatewayProtocol, bounded_protocol

_UNFINISHED = "ASGI callable returned without completing response."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway, or only check its configuration. Returns the exit code: 0, or 3 when it cannot start."""
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, _overrides(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED
    if options.check:
        print(_summary(config))
        return 0
    try:
        asyncio.run(_preflight(config))
    except OSError as error:
        print(f"state_dir: {config.state_dir}: the client store cannot be opened: {error}", file=sys.stderr)
        return STARTUP_FAILED
    _configure_logging(config.log.level)
    server = GatewayServer(config)
    server.run()
    return 0 if server.started else STARTUP_FAILED


class GatewayServer(uvicorn.Server):
    """A uvicorn server that says where it listens, tells readiness when it drains, and exits 0 after a signal."""

    def __init__(self, config: GatewayConfig) -> None:
        self._settings = config
        refused: Counter[str] = Counter()
        self._app: FastAPI = create_app(config, refused=refused)
        section = config.server
        super().__init__(
            uvicorn.Config(
                self._app,
                host=section.host,
                port=section.port,
                http=bounded_protocol(_bounds(section), refused),
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=math.ceil(section.keep_alive_timeout),
                timeout_graceful_shutdown=math.ceil(section.drain_timeout),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and tell the person at the terminal."""
        await super().startup(sockets)
        if self.started:
            _tune_garbage_collection()
            print(self._welcome(), flush=True)

    async def _wait_tasks_to_complete(self) -> None:
        """Wait until everything is answered; when the time for that is over, end what no task serves too."""
        try:
            await super()._wait_tasks_to_complete()
        except asyncio.CancelledError:
            for connection in list(self.server_state.connections):
                if isinstance(connection, GatewayProtocol):
                    connection.cut_off()
            raise

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second interrupt ends without waiting."""
        console = getattr(self._app.state, "console", None)
        if console is not None:  # the signal may come before start-up is done
            console.phase = Phase.DRAINING
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving, without raising them again at the end: a clean stop is exit code 0."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread gets any
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _welcome(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host  # noqa: S104 - compared, not bound
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
        if self._settings.is_demo:
            return banner(address)
        routes = "\n".join(f"  {route.path} -> {route.upstream}" for route in self._settings.routes)
        return f"Listening on {address}\n{routes}"


def _tune_garbage_collection() -> None:
    """Let the collector look less often, and never again at what start-up made.

    A request leaves no cycles behind, so reference counts free all of it; the default thresholds cost a fifth of its
    time for nothing. What errors leave is still collected.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _bounds(section: ServerSection) -> Bounds:
    return Bounds(
        header_bytes=section.max_header_bytes,
        header_lines=section.max_header_lines,
        header_timeout=section.header_timeout,
        keep_alive_timeout=section.keep_alive_timeout,
        idle_timeout=section.idle_timeout,
        connections_per_peer=section.max_connections_per_peer,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api-gateway",
        description="A rate-limiting API gateway. Without configuration it starts in front of demo services.",
        epilog="Every setting can also come from the environment, as in GATEWAY_SERVER__PORT=9000.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: $GATEWAY_CONFIG, or none)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument("--workers", type=int, help="worker processes (default: 1)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="(default: info)")
    parser.add_argument("--no-access-log", action="store_true", help="do not write a line for each proxied request")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line sets, nested as the configuration is."""
    server = {key: getattr(options, key) for key in ("host", "port", "workers") if getattr(options, key) is not None}
    log: dict[str, Any] = {"level": options.log_level} if options.log_level else {}
    if options.no_access_log:
        log["access"] = False
    return {key: section for key, section in (("server", server), ("log", log)) if section}


def _summary(config: GatewayConfig) -> str:
    if config.is_demo:
        return "The configuration is valid. No upstream is configured: the demo services would start."
    return (
        f"The configuration is valid: {len(config.routes)} routes, {len(config.upstreams)} upstreams,"
        f" {len(config.tiers)} tiers."
    )


async def _preflight(config: GatewayConfig) -> None:
    """Find out now, in one line, that the state cannot be opened. A store elsewhere may come later."""
    store = client_store(config)
    try:
        if not store.is_remote:
            await store.load(limit=0)
    finally:
        await store.close()


def _configure_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    # What the server says of its life is said in the welcome; its errors stay.
    logging.getLogger("uvicorn.error").setLevel("INFO" if level == "debug" else "WARNING")
    # Leaving an answer unfinished is how the gateway breaks one that the upstream broke; its own log has the reason.
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.msg != _UNFINISHED)
