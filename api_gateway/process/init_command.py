"""The command `api-gateway init`. What it needs is imported when it runs: `--help` is fast."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from api_gateway.process.operator_client import run_action
from api_gateway.system.command_line import CommandParser


def run_init(arguments: Sequence[str]) -> int:
    """Run `api-gateway init` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_action(lambda: import_module("api_gateway.process.init_command_file").write_first_file(options))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="api-gateway init",
        description="Write a first configuration file with comments. It asks nothing and overwrites nothing.",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, default=Path("gateway.yaml"), help="file to write (default: gateway.yaml)"
    )
    parser.add_argument(
        "--upstream",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a service behind the gateway, such as users=http://127.0.0.1:9001; may be repeated",
    )
    parser.add_argument(
        "--from-openapi",
        type=Path,
        metavar="FILE",
        help="make the routes from an OpenAPI 3 document; they lead to the first --upstream, or to its first server",
    )
    return parser
