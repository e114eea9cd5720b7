"""Starting the gateway from the command line: `--check`, and the choice between one process and several."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Iterable
from importlib import import_module

from api_gateway.assembly.identity import claim_notice
from api_gateway.assembly.stores import client_store, state_folder
from api_gateway.config import GatewayConfig, LoadedConfig
from api_gateway.errors import STARTUP_FAILED, StartupError
from api_gateway.printable_text import counted
from api_gateway.process.config_watch import ConfigSource
from api_gateway.process.message_log import configure_logging
from api_gateway.process.start_check import file_errors, key_warnings, startup_errors, startup_warnings
from api_gateway.process.start_options import overrides_of
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import Finding, access_warnings, find_warnings
from api_gateway.system.output import redirected
from api_gateway.system.service_manager import ServiceManager
from api_gateway.system.state_folder import former_state

logger = logging.getLogger(__name__)


def run_gateway(options: argparse.Namespace) -> int:
    """Run the gateway, or only check its configuration; return the exit code, see `errors`."""
    with redirected():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    source = ConfigSource(options.config, overrides_of(options))
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
    for finding in (*access_warnings(config), *key_warnings(config)):
        logger.warning("%s", finding)
    try:
        with state_folder(config):  # held while any worker may use it
            asyncio.run(_preflight(config))
            return _serve(config, source, is_watched=options.watch)
    except StartupError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED


def _check(loaded: LoadedConfig) -> int:
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


def _report(loaded: LoadedConfig, findings: Iterable[Finding], kind: str = "") -> bool:
    """Print a line for each finding; return whether there is any."""
    sources = loaded.sources
    lines = [
        sources.without_values(finding.path, f"{kind}{sources.origin(finding.path)}{finding}") for finding in findings
    ]
    for line in lines:
        print(line, file=sys.stderr)
    return bool(lines)


def _serve(config: GatewayConfig, source: ConfigSource, *, is_watched: bool) -> int:
    """Serve in this process, or supervise several workers. Raises StartupError."""
    manager = ServiceManager.of(os.environ)
    # Neither is imported for the other: a supervisor does not have the framework, most of a process's memory.
    if config.server.workers > 1:
        supervisor = import_module("api_gateway.process.supervisor").Supervisor(
            config, source, is_watched=is_watched, manager=manager
        )
        code: int = asyncio.run(supervisor.run())
        return code
    server = import_module("api_gateway.process.server").GatewayServer(
        config, read=source, is_watched=is_watched, manager=manager
    )
    server.run()
    exit_code: int = server.exit_code
    return exit_code if server.started else STARTUP_FAILED


def _summary(config: GatewayConfig) -> str:
    if config.is_demo:
        return "The configuration is valid. No upstream is configured: the demo services would start."
    return (
        f"The configuration is valid: {counted(len(config.routes), 'route')},"
        f" {counted(len(config.upstreams), 'upstream')}, {counted(len(config.tiers), 'tier')}."
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
