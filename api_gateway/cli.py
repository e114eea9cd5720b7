"""The command line: argument parsing, `--check`, and the choice between one process and several."""

import argparse
import asyncio
import logging
import os
import platform
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from api_gateway._version import __version__
from api_gateway.assembly.identity import claim_notice
from api_gateway.assembly.stores import client_store, state_folder
from api_gateway.config import ENV_PREFIX, GatewayConfig, Loaded
from api_gateway.errors import STARTUP_FAILED, StartupError
from api_gateway.process.config_watch import ConfigSource
from api_gateway.process.key_commands import run_keys
from api_gateway.process.message_log import configure_logging
from api_gateway.process.server import GatewayServer
from api_gateway.process.start_check import file_errors, startup_errors, startup_warnings
from api_gateway.process.supervisor import Supervisor
from api_gateway.replay.command import run_replay
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import Finding, access_warnings, find_warnings
from api_gateway.system.build import variant
from api_gateway.system.held_signals import block_signals
from api_gateway.system.output import redirected
from api_gateway.system.service_manager import ServiceManager
from api_gateway.system.state_folder import former_state

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway, only check its configuration, or run the command `keys` or `replay`.

    Return the exit code; see `errors`: 3 if the gateway cannot start.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["keys"]:
        return run_keys(given[1:])
    if given[:1] == ["replay"]:
        return run_replay(given[1:])
    if threading.current_thread() is threading.main_thread():
        block_signals()
    with redirected():
        return _run(_parsed(given))


def _run(options: argparse.Namespace) -> int:
    source = ConfigSource(options.config, _overrides(options))
    try:
        loaded = source.load()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED
    if options.check:
        return _check(loaded)
    config = loaded.config
    if _report(loaded, file_errors(config)):
        return STARTUP_FAILED
    configure_logging(config.log)
    hint = former_state(config.state_dir, os.environ)
    if hint is not None:
        logger.warning(hint)
    for finding in access_warnings(config):
        logger.warning("%s", finding)
    try:
        with state_folder(config):  # held while any worker may use it
            asyncio.run(_preflight(config))
            return _serve(config, source, is_watched=options.watch)
    except StartupError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED


def _check(loaded: Loaded) -> int:
    """Print the sources, obstacles and warnings of a start; return the exit code."""
    config = loaded.config
    is_failed = _report(loaded, startup_errors(config))
    _report(loaded, [*find_warnings(config), *startup_warnings(config)], "warning: ")
    print(f"Read: {', '.join(loaded.sources.names) or 'nothing, all settings have their defaults'}.", file=sys.stderr)
    notice = claim_notice(config)
    if notice is not None:
        print(f"{notice}.", file=sys.stderr)
    print(f"State is kept in {config.state_dir}.", file=sys.stderr)
    if is_failed:
        return STARTUP_FAILED
    print(_summary(config))
    return 0


def _report(loaded: Loaded, findings: Iterable[Finding], kind: str = "") -> bool:
    """Print a line for each finding; return whether there is any."""
    lines = [f"{kind}{loaded.sources.origin(finding.path)}{finding}" for finding in findings]
    for line in lines:
        print(line, file=sys.stderr)
    return bool(lines)


def _serve(config: GatewayConfig, source: ConfigSource, *, is_watched: bool) -> int:
    """Serve in this process, or supervise several workers. Raises StartupError."""
    manager = ServiceManager.of(os.environ)
    if config.server.workers > 1:
        return asyncio.run(Supervisor(config, source, is_watched=is_watched, manager=manager).run())
    server = GatewayServer(config, read=source, is_watched=is_watched, manager=manager)
    server.run()
    return server.exit_code if server.started else STARTUP_FAILED


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. The message about an unknown option does not show its value, which may be a secret."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if options.command not in (None, "version"):
        unknown.append(options.command)
    if unknown:
        names = [one.partition("=")[0] for one in unknown if one.startswith("-")]
        parser.error(
            f"unknown: {', '.join(names) or 'positional arguments'}; use the file for other settings, or variables"
            f" such as {ENV_PREFIX}STORE__URL"
        )
    if options.command == "version":
        print(_version())
        parser.exit()
    return options


def _version() -> str:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"api-gateway {__version__} ({variant()}, {python})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api-gateway",
        description="A rate-limiting API gateway. Without configuration it starts with demo services as upstreams.",
        epilog="Every setting can also be set by an environment variable, such as GATEWAY_SERVER__PORT=9000.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        metavar="version | keys | replay",
        help="print the version and the variant; manage API keys; or try limits on an access log; see --help of each",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file (default: $GATEWAY_CONFIG, or none)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument("--workers", type=int, help="worker processes (default: 1)")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="(default: info)")
    parser.add_argument("--no-access-log", action="store_true", help="do not write a line for each proxied request")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--watch", action="store_true", help="reload the configuration when one of its files changes")
    parser.add_argument("--version", action="version", version=_version())
    return parser


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the command line, nested like the configuration."""
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
    """Check that a local client store can be opened, for a one-line message. A remote store may be available later.

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
