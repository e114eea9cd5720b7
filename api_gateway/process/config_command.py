"""The command `api-gateway config`. What it needs is imported when it runs: `--help` is fast."""

from collections.abc import Sequence
from importlib import import_module

from api_gateway.process.operator_client import add_access_options
from api_gateway.process.start_options import add_start_options
from api_gateway.system.command_line import CommandParser


def run_config(arguments: Sequence[str]) -> int:
    """Run `api-gateway config` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    code: int = import_module("api_gateway.process.config_command_actions").run_config_action(options)
    return code


def _parser() -> CommandParser:
    parser = CommandParser(prog="api-gateway config", description="Show, check and compare configurations.")
    showing = parser.add_command("show", "print the settings, each with the place where it was set")
    showing.add_argument("--all", action="store_true", help="print also settings that have their defaults")
    showing.add_argument("--json", action="store_true", help="print JSON")
    showing.set_defaults(command="show")
    checking = parser.add_command("check", "check the configuration and exit, as api-gateway --check does")
    checking.set_defaults(command="check")
    for command in (showing, checking):
        add_start_options(command)
    comparing = parser.add_command(
        "diff",
        "print what differs between two files, or between a running gateway and a file",
        description="Print the settings that differ between two files or, with --url, between a running gateway and a"
        " file (default: the one that --config names), and whether a reload applies each.",
    )
    comparing.add_argument("files", nargs="*", metavar="FILE", help="two files or, with --url, at most one")
    comparing.add_argument("--json", action="store_true", help="print JSON")
    add_access_options(comparing)
    comparing.set_defaults(command="diff", parser=comparing)
    return parser
