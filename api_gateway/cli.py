"""The command line: argument parsing, and the choice between one process and several."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from api_gateway import __version__
from api_gateway.assembly_stores import client_store, state_folder
from api_gateway.config import GatewayConfig
from api_gateway.config_watch import ConfigSource
from api_gateway.diagnosis import ConfigError
from api_gateway.errors import STARTUP_FAILED, StartupError
from api_gateway.output import redirected
from api_gateway.server import GatewayServer, configure_logging
from api_gateway.state_folder import former_state
from api_gateway.supervisor import Supervisor

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway, or only check its configuration. Returns the exit code: 0, or 3 when it cannot start."""
    with redirected():
        return _run(_parser().parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    read = ConfigSource(options.config, _overrides(options))
    try:
        config = read()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED
    if options.check:
        print(_summary(config))
        return 0
    configure_logging(config.log.level)
    hint = former_state(config.state_dir, os.environ)
    if hint is not None:
        logger.warning(hint)
    try:
        with state_folder(config):  # for as long as any worker may use it
            asyncio.run(_preflight(config))
            return _serve(config, read, is_watched=options.watch)
    except StartupError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED


def _serve(config: GatewayConfig, source: ConfigSource, *, is_watched: bool) -> int:
    """Serve in this process, or supervise several that do. Raises StartupError."""
    if config.server.workers > 1:
        return asyncio.run(Supervisor(config, source, is_watched=is_watched).run())
    server = GatewayServer(config, read=source, is_watched=is_watched)
    server.run()
    return server.exit_code if server.started else STARTUP_FAILED


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
    parser.add_argument("--watch", action="store_true", help="reload the configuration when one of its files changes")
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
    """Find out now, in one line, that the state cannot be opened. A store elsewhere may come later.

    Raises StartupError.
    """
    store = client_store(config)
    try:
        if not store.is_remote:
            await store.load(limit=0)
    except OSError as error:
        raise StartupError(f"state_dir: {config.state_dir}: the client store cannot be opened: {error}") from error
    finally:
        await store.close()
