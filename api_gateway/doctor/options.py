"""The options of the command `api-gateway doctor`. What it needs is imported when it runs: `--help` is fast."""

from collections.abc import Sequence
from importlib import import_module

from api_gateway.process.start_options import add_start_options
from api_gateway.system.command_line import CommandParser

CHECK_TIMEOUT = 10.0  # seconds for each check


def run_doctor(arguments: Sequence[str]) -> int:
    """Run `api-gateway doctor` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    code: int = import_module("api_gateway.doctor.command").diagnose(options)
    return code


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="api-gateway doctor",
        description="Try everything that a start of the gateway and a request need. Nothing is changed.",
        epilog="Exit codes: 0 all checks are ok, 1 there are warnings, 2 a check has failed.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--timeout", type=float, default=CHECK_TIMEOUT, metavar="SECONDS", help="seconds for each check (default: 10)"
    )
    add_start_options(parser)
    return parser
