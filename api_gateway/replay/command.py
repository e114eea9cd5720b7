"""The command `api-gateway replay`: which requests of an access log other limits would refuse."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from api_gateway.config import CONFIG_VARIABLE, GatewayConfig, load_config
from api_gateway.errors import STARTUP_FAILED
from api_gateway.replay.condition import CONDITION_FIELDS, ClientCondition
from api_gateway.replay.errors import ReplayError
from api_gateway.replay.page import page_of
from api_gateway.replay.pipeline import Replayed, replay_logs
from api_gateway.replay.report import document_of, text_of
from api_gateway.replay.snapshot import read_snapshot
from api_gateway.settings.diagnostics import ConfigError

MATCHED = 1  # exit code: the condition of --fail-if is true of a client
SHOWN_CLIENTS = 20  # clients
MAX_DIGITS = 9  # of a number of clients or processes


def run_replay(arguments: Sequence[str]) -> int:
    """Run `api-gateway replay` with these arguments; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ReplayError, ConfigError) as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # of standard output; what it holds must not be written again at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"{error.filename or 'output'}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    except BrokenProcessPool:
        print("a process of the replay has ended; with fewer (--jobs) it needs less memory", file=sys.stderr)
    return STARTUP_FAILED


def _run(options: argparse.Namespace) -> int:
    condition = None if options.fail_if is None else ClientCondition(options.fail_if)
    candidate = options.config, load_config(options.config)
    name = options.current or os.environ.get(CONFIG_VARIABLE)
    current: tuple[str, GatewayConfig] | None = (name, load_config(name)) if name else None
    replayed = replay_logs(
        options.logs,
        candidate[1],
        None if current is None else current[1],
        jobs=options.jobs,
        folder=options.temporary,
        snapshot=None if options.begin is None else read_snapshot(options.begin),
    )
    document = document_of(replayed, candidate, current)
    matched = [] if condition is None else clients_that_match(condition, replayed)
    document["fail_if"] = (
        None if condition is None else {"condition": condition.text, "clients": matched[:SHOWN_CLIENTS]}
    )
    if options.save is not None:
        replayed.state.write(options.save)
    if options.html is not None:
        _write(options.html, page_of(document))
    print(json.dumps(document, indent=2) if options.json else text_of(document, options.clients), end="", flush=True)
    if not matched:
        return 0
    shown = ", ".join(map(repr, matched[:SHOWN_CLIENTS])) + (", ..." if len(matched) > SHOWN_CLIENTS else "")
    print(f"--fail-if: {options.fail_if} is true of {len(matched)} clients: {shown}", file=sys.stderr)
    return MATCHED


def clients_that_match(condition: ClientCondition, replayed: Replayed) -> list[str]:
    """Return the ids of the clients of which the condition is true. Raises ReplayError."""
    found = [
        client_id
        for (client_id, tier, _), client in replayed.tally.clients.items()
        if condition.holds(client.figures(client_id, tier))
    ]
    return sorted(set(found))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ReplayError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= MAX_DIGITS or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="api-gateway replay",
        description="Which requests of an access log a configuration would refuse by its rate limits.",
        epilog=f"A condition compares {', '.join(CONDITION_FIELDS)} of each client. Exit codes: 0; 1 if the condition"
        f" is true of a client; {STARTUP_FAILED} if a configuration, log or condition cannot be used.",
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="access log, plain or gzip'd, in any order")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of the candidate configuration")
    parser.add_argument(
        "--current",
        metavar="FILE",
        help=f"YAML file of the current configuration (default: ${CONFIG_VARIABLE}; without, the log is compared)",
    )
    parser.add_argument(
        "--from",
        dest="begin",
        type=Path,
        metavar="SNAPSHOT",
        help="what GET /limits/snapshot or --save has written: begin with this state, not with full buckets",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="write the state at the end, under the current configuration if given",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    parser.add_argument("--fail-if", metavar="CONDITION", help="such as 'tier == \"PREMIUM\" and newly_limited > 0'")
    parser.add_argument(
        "--clients", type=_count, default=SHOWN_CLIENTS, help=f"clients in the text (default: {SHOWN_CLIENTS})"
    )
    parser.add_argument("--jobs", type=_count, help="processes (default: one for each processor, for large logs)")
    parser.add_argument("--temporary", type=Path, metavar="FOLDER", help="for sorting; about a quarter of the logs")
    return parser
