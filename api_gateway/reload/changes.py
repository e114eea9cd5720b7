"""Differences between two configurations, and the settings that only a restart can change."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, SecretStr

from api_gateway.config import GatewayConfig
from api_gateway.reload.outcome import ChangedSetting

# Settings of what a process opens once, at its start: sockets, the embedded store, the connections to a store.
NEEDS_RESTART = (
    "server.host",
    "server.port",
    "server.workers",
    "server.socket_mode",
    "server.worker_timeout",
    "server.tls.redirect_from",
    "server.tls.redirect_port",
    "server.tls.acme_challenges",
    "admin.listen",
    "admin.socket_mode",
    "state_dir",
    "store.url",
    "store.decision_timeout",
    "store.timeout",
    "store.prefix",
    "store.clients",
    "store.max_cached_clients",
    "usage.enabled",
    "usage.retention_days",
    "usage.max_unregistered_clients",
)
_KEYS = ("name", "url")  # that identify the items of a list
_HIDDEN = "(secret)"
_ABSENT = object()


def changes_between(old: GatewayConfig, new: GatewayConfig) -> list[ChangedSetting]:
    """Return the settings that differ, in the order of the sections."""
    return list(_compare("", old, new))


def keep_restart_settings(running: GatewayConfig, read: GatewayConfig) -> tuple[GatewayConfig, list[str]]:
    """Return `read` with the settings of NEEDS_RESTART as in `running`, and the names of those that differ."""
    differing = []
    for path in NEEDS_RESTART:
        was = _value(running, path)
        if _value(read, path) == was:
            continue
        differing.append(path)
        read = _with_value(read, path.split("."), was)
    return read, differing


def _value(config: GatewayConfig, path: str) -> Any:
    """Return the value of a setting, None if its section is None."""
    found: Any = config
    for name in path.split("."):
        found = None if found is None else getattr(found, name)
    return found


def _with_value(section: Any, path: Sequence[str], value: Any) -> Any:
    """Return a section with another value of a setting; unchanged if the setting is in one that is None."""
    name, *rest = path
    if rest:
        inner = getattr(section, name)
        if inner is None:
            return section
        value = _with_value(inner, rest, value)
    return section.model_copy(update={name: value})


def _compare(path: str, old: Any, new: Any) -> Iterator[ChangedSetting]:
    if old is new or old == new:
        return
    if type(old) is type(new) and isinstance(old, BaseModel):
        for name in type(old).model_fields:
            yield from _compare(_join(path, name), getattr(old, name), getattr(new, name))
        return
    before, after = _items(old), _items(new)
    if before is not None and after is not None:
        for name in dict.fromkeys((*before, *after)):
            yield from _compare(_join(path, name), before.get(name, _ABSENT), after.get(name, _ABSENT))
        if list(before.values()) == list(after.values()):
            return
        if before.keys() == after.keys() and list(before) != list(after):
            yield ChangedSetting(path, list(before), list(after))
        return
    is_secret = isinstance(old, SecretStr) or isinstance(new, SecretStr)
    yield ChangedSetting(path, None if is_secret else _shown(old), None if is_secret else _shown(new), is_secret)


def _items(value: Any) -> Mapping[str, Any] | None:
    """Return the items of a mapping by key, or of a list of named sections by name; None for other values."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, list) or not all(isinstance(item, BaseModel) for item in value):
        return None
    for key in _KEYS:
        names = [getattr(item, key, None) for item in value]
        if None not in names and len(set(names)) == len(names):
            return dict(zip(map(str, names), value, strict=True))
    return None


def _join(path: str, name: str) -> str:
    if not path:
        return name
    return f"{path}.{name}" if name.replace("_", "").isalnum() else f"{path}[{name}]"


def _shown(value: Any) -> Any:
    """Return a value in JSON's types, without secrets; of a section only what differs from its defaults."""
    if value is _ABSENT or value is None:
        return None
    if isinstance(value, BaseModel):
        return {
            name: _shown(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if getattr(value, name) != field.get_default(call_default_factory=True)
        }
    if isinstance(value, Mapping):
        return {str(name): _shown(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(inner) for inner in value]
    if isinstance(value, SecretStr):
        return _HIDDEN
    return value if isinstance(value, bool | int | float | str) else str(value)
