"""The differences between the settings of a running gateway and those of a configuration, setting by setting."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from api_gateway.reload.changes import NEEDS_RESTART
from api_gateway.reload.outcome import ChangedSetting
from api_gateway.reporting.reload_schema import SettingInForce

_INDEX = re.compile(r"\[(\d+)\]")
_KEY = re.compile(r"(.+\[\d+\])\.(name|url)")


class Difference(NamedTuple):
    """Settings that differ, the names of those that a reload does not apply, and secrets, which are not compared."""

    changes: list[ChangedSetting]
    needs_restart: list[str]
    secrets: list[str]


def difference(running: Iterable[Mapping[str, Any]], read: Iterable[SettingInForce]) -> Difference:
    """Compare the settings of `GET /configuration` with those of a configuration, entries of lists by their names."""
    old = _by_name(list(running))
    new = _by_name([one.model_dump(mode="json") for one in read])
    found = Difference([], [], [])
    for name in dict.fromkeys((*old, *new)):
        was, will = old.get(name, {}), new.get(name, {})
        if was.get("secret") and will.get("secret"):
            if not (was.get("default") and will.get("default")):
                found.secrets.append(name)
        elif _shown(was) != _shown(will) and not _is_own_default(name, was, will):
            is_secret = bool(was.get("secret") or will.get("secret"))
            found.changes.append(ChangedSetting(name, was.get("value"), will.get("value"), is_secret))
            if name in NEEDS_RESTART:
                found.needs_restart.append(name)
    return found


def _shown(setting: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the compared value. An absent setting and an empty section count as no value."""
    value = setting.get("value")
    return (None if value in ([], {}) else value), bool(setting.get("secret"))


def _is_own_default(name: str, was: Mapping[str, Any], will: Mapping[str, Any]) -> bool:
    """Return whether it is the default of `state_dir`, which depends on the environment of a process."""
    return name == "state_dir" and was.get("origin") is None and will.get("origin") is None


def _by_name(settings: list[Mapping[str, Any]] | list[dict[str, Any]]) -> dict[str, Mapping[str, Any]]:
    labels: dict[str, str] = {}
    for one in settings:
        found = _KEY.fullmatch(one["setting"])
        if found is not None and (found[2] == "name" or found[1] not in labels):
            labels[found[1]] = str(one["value"])
    return {_named(one["setting"], labels): one for one in settings}


def _named(setting: str, labels: Mapping[str, str]) -> str:
    """Return the path of a setting with names instead of indexes."""
    text, end = "", 0
    for index in _INDEX.finditer(setting):
        label = labels.get(setting[: index.end()])
        text += setting[end : index.start()] + (index[0] if label is None else _part(label))
        end = index.end()
    return text + setting[end:]


def _part(label: str) -> str:
    return f".{label}" if label.replace("_", "").isalnum() else f"[{label}]"
