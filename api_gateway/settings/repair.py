"""Replaces wrong values of a configuration, so that the rules between settings can be applied to the rest.

A wrong value is replaced by the default of its setting, or by a placeholder if there is no default. Findings of the
rules about a replaced setting are meaningless; the caller must discard them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from api_gateway.settings.diagnostics import KeyPath, is_section, path_of_error, type_at, unwrapped

_ROUNDS = 12  # an invented section causes further errors, one level at a time
_PLACEHOLDERS = (1, "placeholder", "/api/placeholder-{}", "http://placeholder.invalid")


def errors_of_repaired(
    values: Mapping[str, Any], model: type[BaseModel], errors: Sequence[ErrorDetails], check: Callable[[Any], Any]
) -> tuple[list[ErrorDetails], list[KeyPath]]:
    """Return the errors about the whole that `check` raises once wrong parts are replaced, and the places of those."""
    values = _copied(values)
    wrong: list[KeyPath] = []
    for _ in range(_ROUNDS):
        key_paths = [(path_of_error(detail), detail) for detail in errors]
        of_parts = [(key_path, detail) for key_path, detail in key_paths if key_path]
        if not of_parts:
            return [detail for key_path, detail in key_paths if not key_path], wrong
        for key_path, detail in reversed(of_parts):
            is_unwanted = detail["loc"][-1] == "[key]" or detail["type"] == "extra_forbidden"
            _repair(values, model, key_path, wrong, is_unwanted=is_unwanted)
        try:
            check(values)
        except ValidationError as error:
            errors = error.errors()
        else:
            return [], wrong
    return [], wrong


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _parent(values: Any, key_path: KeyPath) -> Any:
    for part in key_path[:-1]:
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
        elif isinstance(values, dict):
            values = values.get(part)
        else:
            return None
    return values


def _repair(
    values: Any, model: type[BaseModel], key_path: KeyPath, wrong: list[KeyPath], *, is_unwanted: bool
) -> None:
    """Replace a wrong part; remove it if it is not permitted or is wrong again; then replace what encloses it."""
    times = wrong.count(key_path)
    wrong.append(key_path)
    if times == 0 and not is_unwanted:
        _replace(values, model, key_path, len(wrong))
    elif times <= 1 and isinstance(_parent(values, key_path), dict):
        _remove(values, key_path)
    elif len(key_path) > 1:
        _repair(values, model, key_path[:-1], wrong, is_unwanted=False)


def _remove(values: Any, key_path: KeyPath) -> None:
    parent = _parent(values, key_path)
    if isinstance(parent, dict):
        parent.pop(key_path[-1], None)
        parent.pop(f"{key_path[-1]}_file", None)  # the secret may have been read from that file


def _replace(values: Any, model: type[BaseModel], key_path: KeyPath, number: int) -> None:
    """Replace a wrong value by its default or a placeholder."""
    annotation, parent = type_at(model, key_path), _parent(values, key_path)
    section = unwrapped(type_at(model, key_path[:-1]))
    if is_section(section):
        field = section.model_fields.get(key_path[-1])
        if field is None or not field.is_required():
            _remove(values, key_path)
        elif isinstance(parent, dict):
            parent[key_path[-1]] = _placeholder(annotation, number)
    elif not is_section(unwrapped(annotation)):  # an entry of a list of values: the list as a whole
        _replace(values, model, key_path[:-1], number)
    elif isinstance(parent, dict):
        parent[key_path[-1]] = {}
    elif isinstance(parent, list) and int(key_path[-1]) < len(parent):
        parent[int(key_path[-1])] = {}


def _placeholder(annotation: Any, number: int) -> Any:
    """Return a valid value of this type, or None if no placeholder fits."""
    kind = unwrapped(annotation)
    if get_origin(kind) is list:
        return [_placeholder(get_args(kind)[0], number)]
    if is_section(kind) or get_origin(kind) is dict:
        return {}
    for one in _PLACEHOLDERS:
        value = one.format(number) if isinstance(one, str) else one
        try:
            TypeAdapter(annotation).validate_python(value)
        except ValidationError:
            continue
        return value
    return None
