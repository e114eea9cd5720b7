"""The command `api-gateway config`: shows the configuration, compares two, and checks one. Secrets are not shown."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from api_gateway.admin.settings_view import settings_of
from api_gateway.config import GatewayConfig, load_config
from api_gateway.errors import STARTUP_FAILED
from api_gateway.printable_text import table
from api_gateway.process.config_watch import ConfigSource
from api_gateway.process.operator_client import client_of, run_action, show
from api_gateway.process.running_settings import difference
from api_gateway.process.serve_command import run_gateway
from api_gateway.process.start_options import overrides_of
from api_gateway.reload.changes import changes_between, keep_restart_settings
from api_gateway.reload.outcome import ChangedSetting
from api_gateway.settings.diagnostics import ConfigError

HIDDEN = "(secret)"
_WIDEST = 400  # characters of a value or place


def run_config_action(options: argparse.Namespace) -> int:
    """Run the chosen command; return the exit code."""
    try:
        return _ACTIONS[options.command](options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return STARTUP_FAILED


def _show(options: argparse.Namespace) -> int:
    config = ConfigSource(options.config, overrides_of(options)).load().config
    settings = [one for one in settings_of(config, with_defaults=True) if options.all or one.origin is not None]
    if options.json:
        print(json.dumps([one.model_dump(mode="json") for one in settings], indent=2))
        return 0
    rows = [(one.setting, HIDDEN if one.secret else _text(one.value), one.origin or "default") for one in settings]
    for line in table(("SETTING", "VALUE", "ORIGIN"), rows, _WIDEST):
        show(line)
    if not options.all:
        print("All other settings have their defaults; --all shows them too.", file=sys.stderr)
    return 0


def _check(options: argparse.Namespace) -> int:
    return run_gateway(argparse.Namespace(**vars(options), check=True, watch=False))


def _diff(options: argparse.Namespace) -> int:
    files: list[str] = options.files
    if options.url is None:
        if len(files) != 2:  # noqa: PLR2004 - a difference is between two
            options.parser.error("give two files, or --url and at most one file")
        old, new = map(load_config, files)
        _print_changes(_changes(old, new), keep_restart_settings(old, new)[1], is_json=options.json)
        return 0
    if len(files) > 1:
        options.parser.error("with --url, give at most one file")
    options.config = files[0] if files else options.config

    def compare() -> None:
        new = load_config(options.config)
        running = client_of(options).get("/configuration", defaults="true")["settings"]
        found = difference(running, settings_of(new, with_defaults=True))
        _print_changes(found.changes, found.needs_restart, is_json=options.json)
        if found.secrets and not options.json:
            print(f"Not compared, as they are secret: {', '.join(found.secrets)}.", file=sys.stderr)

    return run_action(compare)


def _changes(old: GatewayConfig, new: GatewayConfig) -> list[ChangedSetting]:
    """Return the settings that differ.

    A default state folder is left out, because it depends on the name of the file.
    """
    is_given = any(("state_dir",) in config.origins for config in (old, new))
    return [one for one in changes_between(old, new) if is_given or one.setting != "state_dir"]


def _print_changes(changes: Sequence[ChangedSetting], needs_restart: Iterable[str], *, is_json: bool) -> None:
    named = {one.setting for one in changes}
    restart = [name for name in needs_restart if name in named]
    if is_json:
        rows = [{**one._asdict(), "needs_restart": one.setting in restart} for one in changes]
        print(json.dumps({"changes": [_public(row) for row in rows], "needs_restart": restart}, indent=2, default=str))
        return
    for one in changes:
        values = f"{HIDDEN} -> {HIDDEN}" if one.is_secret else f"{_text(one.old)} -> {_text(one.new)}"
        show(f"{one.setting}: {values}; {'needs a restart' if one.setting in restart else 'applied by a reload'}")
    if not changes:
        show("No setting differs.")
        return
    applied = len(changes) - len(restart)
    rest = f" Needing a restart: {', '.join(restart)}." if restart else ""
    show(f"Settings that differ: {len(changes)}. Applied by a reload: {applied}.{rest}")


def _public(row: dict[str, Any]) -> dict[str, Any]:
    return {"secret" if name == "is_secret" else name: value for name, value in row.items()}


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {"show": _show, "check": _check, "diff": _diff}
