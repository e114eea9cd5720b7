"""The command line: its options, and which command runs.

Commands are imported when they run: importing the gateway takes half a second, and `--help` needs none of it.
"""

import argparse
import difflib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

from api_gateway.process.start_options import add_start_options
from api_gateway.system.build import version_line
from api_gateway.system.collection import collection_paused
from api_gateway.system.held_signals import block_signals


class Command(NamedTuple):
    """A command: the module and function that run it, and a line about it."""

    module: str
    function: str
    summary: str
    gets_name: bool = False  # whether the function gets the name of the command, too


def _view(summary: str) -> Command:
    return Command("api_gateway.process.view_commands", "run_view", summary, gets_name=True)


COMMANDS = {
    "init": Command("api_gateway.process.init_command", "run_init", "write a first configuration file"),
    "config": Command("api_gateway.process.config_command", "run_config", "show, compare and check the configuration"),
    "schema": Command(
        "api_gateway.process.schema_command", "run_schema", "print the JSON Schema of configuration files"
    ),
    "doctor": Command("api_gateway.doctor.options", "run_doctor", "try everything that a start and a request need"),
    "version": Command("api_gateway.process.version_command", "run_version", "print what is installed"),
    "replay": Command(
        "api_gateway.replay.options", "run_replay", "show what other limits would refuse, by an access log"
    ),
    "keys": Command("api_gateway.process.key_commands", "run_keys", "manage the API keys of clients"),
    "top": Command("api_gateway.process.top_command", "run_top", "show a live screen of the running gateway"),
    "tail": _view("follow the requests of the running gateway as they end"),
    "explain": _view("show what was decided about a request, or would be"),
    "clients": _view("show the most limited clients, or one client"),
    "breakers": _view("show the circuit breakers and targets of the upstreams"),
    "limits": _view("show all limits, or what one key of a limit has left"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gateway, only check its configuration, or run one of `COMMANDS`.

    Return the exit code; see `errors`: 3 if the gateway cannot start.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        command = COMMANDS[given[0]]
        run = getattr(import_module(command.module), command.function)
        code: int = run(given if command.gets_name else given[1:])
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


def _epilog() -> Iterator[str]:
    yield "commands:"
    yield from (f"  {name:<{max(map(len, COMMANDS))}}  {command.summary}" for name, command in COMMANDS.items())
    yield "\nEach command has its own --help."
    yield "Every setting can also be set by an environment variable, such as GATEWAY_SERVER__PORT=9000."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api-gateway",
        description="A rate-limiting API gateway. Without configuration it starts with demo services as upstreams.",
        epilog="\n".join(_epilog()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", nargs="?", metavar="COMMAND", help="one of the commands below (default: start the gateway)"
    )
    add_start_options(parser)
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--watch", action="store_true", help="reload the configuration when one of its files changes")
    parser.add_argument("--version", action="version", version=version_line())
    return parser
