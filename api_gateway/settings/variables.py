"""Variables in a configuration file: `${NAME}` and `${NAME:-default}` in values, and `$${` for the text `${`.

The value of a variable is text: it can be a number or a switch where the setting is one, but it adds no keys.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from api_gateway.settings.diagnostics import KeyPath

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|\$\{")
_ESCAPE = "$${"


@dataclass(frozen=True, slots=True)
class Expansion:
    """Values with variables replaced. By place: the variables of each value, and what is wrong with them."""

    values: dict[str, Any]
    variables: dict[KeyPath, str] = field(default_factory=dict)
    problems: dict[KeyPath, str] = field(default_factory=dict)


def expanded(values: Mapping[str, Any], variables: Mapping[str, str] | None) -> Expansion:
    """Return the values with variables replaced; a text with a problem stays as it is.

    None: the file may not use variables, which can be secrets of the gateway.
    """
    found = Expansion({})
    found.values.update(_expanded(dict(values), (), variables, found))
    return found


def _expanded(value: Any, place: KeyPath, variables: Mapping[str, str] | None, found: Expansion) -> Any:
    if isinstance(value, Mapping):
        return {key: _expanded(inner, (*place, str(key)), variables, found) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expanded(inner, (*place, str(index)), variables, found) for index, inner in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    problem = next(_problems(value, variables), None)
    if problem is not None:
        found.problems[place] = problem
        return value
    names = [one["name"] for one in _REFERENCE.finditer(value) if one["name"]]
    if names:
        found.variables[place] = ", ".join(f"${{{name}}}" for name in dict.fromkeys(names))
    return _REFERENCE.sub(lambda one: _text(one, variables or {}), value)


def _problems(text: str, variables: Mapping[str, str] | None) -> Iterator[str]:
    for one in _REFERENCE.finditer(text):
        name = one["name"]
        if name is None and one[0] != _ESCAPE:
            yield "has '${' without a variable; write ${NAME} or ${NAME:-default}, or $${ for the text itself"
        elif name is not None and variables is None:
            yield "an included file cannot use variables; write the value, or set it in the main file"
        elif name is not None and one["default"] is None and name not in (variables or ()):
            yield f"the variable {name} is not set; set it, or write ${{{name}:-default}}"


def _text(reference: re.Match[str], variables: Mapping[str, str]) -> str:
    """Return the value of a reference. As in a shell, the default also replaces an empty value."""
    name = reference["name"]
    if name is None:
        return "${"
    default = reference["default"]
    return variables.get(name, "") if default is None else variables.get(name) or default
