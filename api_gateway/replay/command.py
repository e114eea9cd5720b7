"""Runs the command `api-gateway replay`: which requests of an access log other limits would refuse."""

import argparse
import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from api_gateway.config import CONFIG_VARIABLE, GatewayConfig, load_config
from api_gateway.demo import DEMO_NAMES, demo_sections
from api_gateway.errors import STARTUP_FAILED
from api_gateway.printable_text import counted
from api_gateway.replay.condition import ClientCondition
from api_gateway.replay.errors import ReplayError
from api_gateway.replay.log_replay import ReplayResult, replay_logs
from api_gateway.replay.options import SHOWN_CLIENTS
from api_gateway.replay.page import page_of
from api_gateway.replay.report import Document, document_of, text_of
from api_gateway.replay.saved_state import read_snapshot
from api_gateway.settings.diagnostics import ConfigError

MATCHED = 1  # exit code: the condition of --fail-if is true of a client


def replay_with(options: argparse.Namespace) -> int:
    """Run `api-gateway replay` with these options; return the exit code."""
    try:
        return _run(options)
    except (ReplayError, ConfigError) as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # of standard output; what it holds must not be written again at the end of the process
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"{error.filename or 'output'}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    except BrokenProcessPool:
        words = "a process of the replay was ended, perhaps for lack of memory; use fewer processes (--jobs)"
        print(words, file=sys.stderr)
    return STARTUP_FAILED


def _run(options: argparse.Namespace) -> int:
    condition = None if options.fail_if is None else ClientCondition(options.fail_if)
    candidate = options.config, _read(options.config)
    name = options.current or os.environ.get(CONFIG_VARIABLE)
    current: tuple[str, GatewayConfig] | None = (name, _read(name)) if name else None
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
    if condition is not None:
        _check_basis(document)
    if not matched:
        return 0
    shown = ", ".join(map(repr, matched[:SHOWN_CLIENTS])) + (", ..." if len(matched) > SHOWN_CLIENTS else "")
    print(f"--fail-if: {options.fail_if} is true of {counted(len(matched), 'client')}: {shown}", file=sys.stderr)
    return MATCHED


def _read(path: str) -> GatewayConfig:
    """Return a configuration, with the routes of the demo if a gateway would start that. Raises ConfigError."""
    config = load_config(path)
    if not config.is_demo:
        return config
    return config.model_validate({**config.model_dump(), **demo_sections(dict.fromkeys(DEMO_NAMES, "http://demo"))})


def clients_that_match(condition: ClientCondition, replayed: ReplayResult) -> list[str]:
    """Return the ids of the clients of which the condition is true. Raises ReplayError."""
    found = [
        client_id
        for (client_id, tier, _), client in replayed.tally.clients.items()
        if condition.holds(client.figures(client_id, tier))
    ]
    return sorted(set(found))


def _check_basis(document: Document) -> None:
    """Raise ReplayError if the logs cannot support a condition: they are incomplete, or have no decisions."""
    log = document["log"]
    if log["unread_files"]:
        raise ReplayError(
            f"--fail-if: {', '.join(log['unread_files'])} cannot be read to its end; see the messages above"
        )
    if not document["totals"]["decisions"]:
        raise ReplayError(
            f"--fail-if: no decision in {counted(log['lines'], 'line')}, so the condition cannot be evaluated. The log"
            " must be JSON (log.format: json), have the field decision (log.fields), and continue after the snapshot"
            " of --from"
        )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ReplayError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None
