"""Deprecated settings: what stands in their place, since which version, and which version removes them.

A deprecated key is read as the new one, and a deprecated value is accepted; both cause a warning with the place where
they were set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from api_gateway.settings.diagnostics import KeyPath, SettingsFile, path_text

ANY_PART = "*"  # any name, or any index, in a path


@dataclass(frozen=True, slots=True)
class Deprecation:
    """A key that has another name, `new`, in the same section; or without `new`, one `value` of a key.

    `since` and `removed_in` are versions. `instead` says what to write instead of a value.
    """

    old: KeyPath
    since: str
    removed_in: str
    new: str | None = None
    value: Any = None
    instead: str = ""


DEPRECATED: tuple[Deprecation, ...] = (
    Deprecation(("identity", "mode"), "0.1.0", "1.0.0", value="header", instead="leave it out"),
)


@dataclass(frozen=True, slots=True)
class RenamedSettings:
    """Values with the new keys, and the place and message of each deprecated one.

    `errors` are places where both keys are set, and `moved` the places before and after.
    """

    values: dict[str, Any]
    warnings: list[tuple[KeyPath, str]] = field(default_factory=list)
    errors: list[tuple[KeyPath, str]] = field(default_factory=list)
    moved: list[tuple[KeyPath, KeyPath]] = field(default_factory=list)


def renamed(values: Mapping[str, Any], deprecations: Sequence[Deprecation] = DEPRECATED) -> RenamedSettings:
    """Replace deprecated keys of one source."""
    found = RenamedSettings(dict(values))
    for one in deprecations:
        for place in list(_places(found.values, one.old)):
            _replace(found, place, one)
    return found


def renamed_file(file: SettingsFile, deprecations: Sequence[Deprecation]) -> tuple[SettingsFile, list[str], list[str]]:
    """Return a file with the new keys, and lines of warnings and errors."""
    found = renamed(file.values, deprecations)
    places = dict(file.places)
    for old, new in found.moved:
        lower = tuple(map(str.lower, old))
        moved = {place: text for place, text in places.items() if place[: len(lower)] == lower}
        places |= {(*map(str.lower, new), *place[len(lower) :]): text for place, text in moved.items()}
    warnings, errors = (
        [f"{file.place(place)}{path_text(place)}: {message}" for place, message in some]
        for some in (found.warnings, found.errors)
    )
    return replace(file, values=found.values, places=places), warnings, errors


def _places(values: Any, path: KeyPath, above: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the places in the values that a path with `ANY_PART` stands for."""
    if not path:
        yield above
        return
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, inner in items:
        if path[0] in (ANY_PART, str(key)):
            yield from _places(inner, path[1:], (*above, str(key)))


def _replace(found: RenamedSettings, place: KeyPath, one: Deprecation) -> None:
    value = _at(found.values, place)
    until = f"deprecated since {one.since} and removed in {one.removed_in}"
    if one.new is None:
        if value == one.value:
            found.warnings.append((place, f"the value {value!r} is {until}; {one.instead}"))
        return
    new = (*place[:-1], one.new)
    if _at(found.values, new) is not None:
        found.errors.append((place, f"is {until}, and {path_text(new)} is set too; keep {one.new} only"))
        found.values.update(_moved(found.values, place, None))
        return
    found.values.update(_moved(found.values, place, one.new))
    found.moved.append((place, new))
    found.warnings.append((place, f"is {until}; write {path_text(new)}"))


def _at(values: Any, place: KeyPath) -> Any:
    for part in place:
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and int(part) < len(values):
            values = values[int(part)]
    return values


def _moved(values: Any, place: KeyPath, new: str | None) -> Any:
    """Return a copy with the last key of the place renamed, or removed; the other values are the same objects."""
    first, rest = place[0], place[1:]
    if not rest:
        keys = {key: new if str(key) == first else key for key in values}
        return {keys[key]: inner for key, inner in values.items() if keys[key] is not None}
    if isinstance(values, list):
        return [_moved(one, rest, new) if str(index) == first else one for index, one in enumerate(values)]
    return {key: _moved(inner, rest, new) if str(key) == first else inner for key, inner in values.items()}
