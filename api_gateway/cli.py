"""The command line: its options, and which command runs.

Commands are imported when they run: importing the gateway takes half a second, and `--help` needs none of it.
"""

import argparse
import difflib
import sys
import threading
from collections.abc import Sequence
from importlib import import_module

from api_gateway.process.start_options import add_start_options
from api_gateway.system.build import version_line
from api_gateway.system.collection import collection_paused
from api_gateway.system.held_signals import block_signals

_VIEWS = "api_gateway.process.view_commands", "run_view"
# Module and function of each command, and whether the function gets the command's name, too.
COMMANDS = {
    "config": ("api_gateway.process.config_command", "run_config", False),
    "doctor": ("api_gateway.doctor.options", "run_doctor", False),
    "init": ("api_gateway.process.init_command", "run_init", False),
    "keys": ("api_gateway.process.key_commands", "run_keys", False),
    "replay": ("api_gateway.replay.options", "run_replay", False),
    "schema": ("api_gateway.process.schema_command", "run_schema", False),
    "top": ("api_gateway.process.top_command", "run_top", False),
    "version": ("api_gateway.process.version_command", "run_version", False),
    **dict.fromkeys(("tail", "explain", "clients", "breakers", "limits"), (*_VIEWS, True)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway, only check its configuration, or run one of `COMMANDS`.

    Return the exit code; see `errors`: 3 if the gateway cannot start.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        module, name, gets_command = COMMANDS[given[0]]
        code: int = getattr(import_module(module), name)(given if gets_command else given[1:])
        return code
    options = _parsed(given)
    if threading.current_thread() is threading.main_thread():
        block_signals()
    with collection_paused():
        exit_code: int = import_module("api_gateway.process.serve_command").run_gateway(options)
    return exit_code


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. A message about what is unknown does not show values, which may be secrets."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    names = [one.partition("=")[0] for one in unknown if one.startswith("-")]
    if names:
        parser.error(
            f"unknown: {', '.join(names)}; use the file for other settings, or variables such as GATEWAY_STORE__URL"
        )
    if options.command in COMMANDS:
        parser.error(f"the command {options.command} must be the first argument")
    if options.command is not None:
        near = difflib.get_close_matches(options.command, COMMANDS, n=1)
        advice = f" did you mean {near[0]}?" if near else ""
        parser.error(f"unknown command;{advice} the commands are {', '.join(sorted(COMMANDS))}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api-gateway",
        description="A rate-limiting API gateway. Without configuration it starts with demo services as upstreams.",
        epilog="Every setting can also be set by an environment variable, such as GATEWAY_SERVER__PORT=9000.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        metavar="COMMAND",
        help="version: what is installed; init: write a first configuration file; config: show, compare and check the"
        " configuration; doctor: try what a start needs; schema: the JSON Schema of configuration files; keys: manage"
        " API keys; replay: try limits on an access log; of a running gateway: top, a live screen; tail, its requests;"
        " explain, a request; clients, breakers, limits. See --help of each",
    )
    add_start_options(parser)
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--watch", action="store_true", help="reload the configuration when one of its files changes")
    parser.add_argument("--version", action="version", version=version_line())
    return parser
