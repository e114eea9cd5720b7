"""Settings in environment variables: `GATEWAY_SERVER__PORT`, where `__` separates levels, and JSON for whole sections.

Messages name the variable and never quote its value, which may be a secret.
"""

import io
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_origin

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import BaseModel

from api_gateway.settings.diagnostics import (
    DELIMITER,
    KeyPath,
    is_section,
    path_of_variable,
    path_text,
    type_at,
    unwrapped,
)
from api_gateway.settings.suggestions import nearest


def read_env_file(path: str) -> dict[str, str | None]:
    """Return the variables in a file of NAME=value lines; none if the file does not exist.

    Invalid lines are skipped, see `broken_lines`. The library's warnings are disabled: they do not name the file.
    """
    library = logging.getLogger("dotenv.main")
    before, library.disabled = library.disabled, True
    try:
        return dotenv_values(path)
    finally:
        library.disabled = before


def broken_lines(path: str, prefix: str) -> list[str]:
    """Return a message for each line of the file that contains `prefix` and cannot be parsed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    broken = [binding.original for binding in parse_stream(io.StringIO(text)) if binding.error]
    lines = [one.line + one.string.count("\n", 0, one.string.find(prefix)) for one in broken if prefix in one.string]
    return [f"{path}:{line}: cannot be read; write NAME=value, with both quotes or none" for line in lines]


def read_environment(
    variables: Mapping[str, str | None], prefix: str, model: type[BaseModel]
) -> tuple[dict[str, Any], list[str]]:
    """Return the nested settings of `model` from variables (by upper-case name), and a line for each mistake."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name in sorted(variables):  # so a whole section comes before its settings
        text = variables[name]
        if text is None or not is_setting(name, prefix, model):
            continue
        place = path_of_variable(name, prefix)
        problem = _set(values, place, text, model)
        if problem:
            problems.append(f"environment {name}: {path_text(place)}: {problem}")
    return values, problems


def is_setting(name: str, prefix: str, model: type[BaseModel]) -> bool:
    """Return whether a variable, by its upper-case name, is for a field of `model`; deeper levels are not checked."""
    return name.startswith(prefix) and path_of_variable(name, prefix)[0] in model.model_fields


def ignored_variables(
    names: Collection[str], prefix: str, model: type[BaseModel], besides: Collection[str]
) -> list[str]:
    """Return a message for each variable with `prefix` that is not a setting, with the most similar setting.

    `besides` names the gateway's variables that are not settings.
    """
    sections = {f"{prefix}{name}".upper(): unwrapped(type_at(model, (name,))) for name in model.model_fields}
    inner = [
        f"{name}{DELIMITER}{key}".upper()
        for name, section in sections.items()
        if is_section(section)
        for key in section.model_fields
    ]
    return [
        f"{name} is not a setting and is ignored{_nearest(name, prefix, [*sections, *inner, *besides])}"
        for name in sorted(names)
        if name.startswith(prefix) and name not in besides and not is_setting(name, prefix, model)
    ]


def _nearest(name: str, prefix: str, known: Collection[str]) -> str:
    """Return a suggestion; settings with the same words, or with the same last level, take precedence."""
    plain = name.replace(DELIMITER, "_")
    same = [one for one in known if one.replace(DELIMITER, "_") == plain]
    at_end = [one for one in known if one.endswith(f"{DELIMITER}{name.removeprefix(prefix)}")]
    return nearest(name, same or at_end or known)


def _set(values: dict[str, Any], place: KeyPath, text: str, model: type[BaseModel]) -> str | None:
    """Set a value at its place; return what is wrong with it, or None."""
    value: Any = text
    kind = unwrapped(type_at(model, place))
    if _is_nested(kind) and not (_has_shorthand(kind) and not text.lstrip().startswith("{")):
        try:
            value = json.loads(text, object_pairs_hook=_unique)
        except ValueError as error:
            example = "[...]" if get_origin(kind) is list else '{"key": ...}'
            return f"must be JSON, such as {example}: {_reason(error)}"
    parent = values
    for length, part in enumerate(place[:-1], 1):
        if get_origin(unwrapped(type_at(model, place[:length]))) is list:
            whole = path_text(place[:length])
            return f"{whole} is a list, which one variable sets as a whole, as JSON"
        inner = parent.setdefault(part, {})
        if not isinstance(inner, dict):
            return f"another variable sets {path_text(place[:length])} to a value that is not a section"
        parent = inner
    if isinstance(value, dict) and isinstance(parent.get(place[-1]), dict):
        value = {**parent[place[-1]], **value}
    parent[place[-1]] = value
    return None


def _is_nested(kind: Any) -> bool:
    return get_origin(kind) in (list, dict) or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _has_shorthand(kind: Any) -> bool:
    return getattr(kind, "shorthand", None) is not None


class _GivenTwice(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a duplicate key: the second value would silently be used."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _GivenTwice
    return found


def _reason(error: ValueError) -> str:
    """Return the parser's reason without the text that some of its messages quote."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.partition(':')[0].lower()} at character {error.pos + 1}"
    return "a key is given twice" if isinstance(error, _GivenTwice) else "it cannot be read"
