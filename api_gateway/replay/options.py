"""The options of the command `api-gateway replay`. What it needs is imported when it runs: `--help` is fast."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from api_gateway.errors import STARTUP_FAILED
from api_gateway.replay.condition import CONDITION_FIELDS
from api_gateway.system.command_line import CommandParser

SHOWN_CLIENTS = 20  # clients
MAX_DIGITS = 9  # of a number of clients or processes


def run_replay(arguments: Sequence[str]) -> int:
    """Run `api-gateway replay` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    exit_code: int = import_module("api_gateway.replay.command").replay_with(options)
    return exit_code


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= MAX_DIGITS or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="api-gateway replay",
        description="Show which requests of an access log a configuration would refuse by its rate limits.",
        epilog=f"A condition compares {', '.join(CONDITION_FIELDS)} of each client, such as"
        f" 'tier == \"PREMIUM\" and newly_limited > 0'. Exit codes: 0; 1 if the condition"
        f" is true of a client; {STARTUP_FAILED} if a configuration, log or condition cannot be used.",
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="access log, plain or gzip'd, in any order")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML or TOML file of the candidate configuration"
    )
    parser.add_argument(
        "--current",
        metavar="FILE",
        help="YAML or TOML file of the current configuration (default: $GATEWAY_CONFIG; without one, the decisions in"
        " the log are compared)",
    )
    parser.add_argument(
        "--from",
        dest="begin",
        type=Path,
        metavar="SNAPSHOT",
        help="begin with this state instead of full buckets: a file that --save has written, or a response of GET"
        " /limits/snapshot",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the state at the end, under the current configuration if given",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    parser.add_argument("--fail-if", metavar="CONDITION", help="end with exit code 1 if this is true of a client")
    parser.add_argument(
        "--clients",
        type=_count,
        default=SHOWN_CLIENTS,
        help=f"maximum number of clients in the text (default: {SHOWN_CLIENTS})",
    )
    parser.add_argument(
        "--jobs",
        type=_count,
        help="number of processes (default: one for each processor if the logs are large, else one)",
    )
    parser.add_argument(
        "--temporary",
        type=Path,
        metavar="FOLDER",
        help="folder for temporary files, which need a quarter of the size of the uncompressed logs",
    )
    return parser
