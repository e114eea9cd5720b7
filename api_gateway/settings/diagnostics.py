"""Messages about configuration mistakes: where the value was set, its place, what is wrong with it, and the value.

Handles places in files, environment variables and pydantic's errors; depends on no particular section.
"""

import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from api_gateway.printable_text import printable
from api_gateway.settings.error_words import error_words
from api_gateway.settings.secret import (
    PEM_BEGINNING,
    SUFFIX,
    Unusable,
    holds_secret,
    may_hold_password,
    shown_path,
    without_pem,
)
from api_gateway.settings.suggestions import HINT, nearest, nearest_at_top

KeyPath = tuple[str, ...]

DELIMITER = "__"  # between the levels of a setting, in the name of a variable

# The URL of a target, valid or not, in which no part can be a password.
_PLAIN_URL = re.compile(r"\W?([A-Za-z+]+:)?/{0,2}([\w.-]*|\[[\dA-Fa-f:.]*\])(:\d{0,5})?(/[^@:%]*)?\W?")
_LONGEST_SHOWN = 200
_LIKE_CREDENTIAL = re.compile(  # an API key, a JSON Web Token, a private key: see `clients.api_keys`
    rf"agw_[0-9A-Za-z]{{20}}|eyJ[0-9A-Za-z_-]{{8,}}\.[0-9A-Za-z_-]{{8}}|{PEM_BEGINNING}"
)
QUOTED = re.compile(r"""(['"])((?:\\.|(?!\1).)*)\1""")
NO_PATTERNS: Mapping[str, str] = {}


class ConfigError(Exception):
    """The configuration is invalid. `problems` holds one line for each mistake, as a terminal may show it.

    Names of keys and files may come from a team, so escape sequences in them are made harmless.
    """

    def __init__(self, problems: list[str]) -> None:
        problems = [printable(without_pem(problem)) for problem in problems]
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Ownership:
    """The file that each route is from, and what files own; the main file has the number 0, included ones follow.

    `files` are the names of the files, and `granted_at` is where the main file says what a file owns.
    """

    files: Sequence[str]
    route_files: Sequence[int]
    owns: Mapping[int, Sequence[str]]
    granted_at: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """Parsed files: the values, and by place in lower case where each was set, such as `gateway.yaml:3`.

    `variables` has the variables of a value by its place, and `unset` the places whose variables cannot be used; both
    are known when variables have been replaced. `included` are the files other than `path`.
    """

    path: Path | None
    values: dict[str, Any]
    places: Mapping[KeyPath, str]
    problems: tuple[str, ...] = ()  # what is valid in its format and the gateway does not accept
    variables: Mapping[KeyPath, str] = field(default_factory=dict)
    unset: frozenset[KeyPath] = frozenset()
    included: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()
    ownership: Ownership | None = None  # None without included files

    def place(self, key_path: KeyPath) -> str:
        """Return where the value, or what encloses it, was set, followed by a colon; or "" if that is unknown."""
        for length in range(len(key_path), 0, -1):
            found = self.places.get(tuple(map(str.lower, key_path[:length])))
            if found is not None:
                return f"{found}: "
        return ""

    def concerns_unset(self, key_path: KeyPath) -> bool:
        """Return whether a value there, or within or around it, has a variable that cannot be used."""
        lower = tuple(map(str.lower, key_path))
        ends = (lower, (*lower[:-1], f"{lower[-1]}{SUFFIX}")) if lower else ()
        places = [tuple(map(str.lower, place)) for place in self.unset]
        return any(one[: len(place)] == place or place[: len(one)] == one for one in ends for place in places)


def settings_text(path: Path) -> str:
    """Return the content of a configuration file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:  # the exception holds the whole file, and its message a byte of it
        raise ConfigError([f"{path}: cannot be read: not utf-8 at byte {error.start}"]) from None


NO_FILE = SettingsFile(None, {}, {})


@dataclass(frozen=True, slots=True)
class Sources:
    """Sources of a configuration: `overrides` of the command line, `variables` (by upper-case name), and the file.

    `variables` holds only those that are settings.
    """

    overrides: Mapping[str, Any]
    prefix: str
    variables: Mapping[str, str]
    file: SettingsFile

    @property
    def names(self) -> list[str]:
        """The names of the sources whose values are in effect: the command line, variables, the files."""
        variables = sorted(name for name in self.variables if not self._is_overridden(name))
        return [
            *(["command line"] if self.overrides else []),
            *(f"environment {name}" for name in variables),
            *([str(self.file.path)] if self.file.path is not None else []),
            *map(str, self.file.included),
        ]

    def _is_overridden(self, variable: str) -> bool:
        """Return whether the command line sets the same setting."""
        value = _value_at(self.overrides, path_of_variable(variable, self.prefix))
        return value is not None and not isinstance(value, Mapping)

    def value_at(self, key_path: KeyPath) -> Any:
        """Return the value of the source with the highest precedence that sets exactly this place, or None."""
        found = [_value_at(self.overrides, key_path)]
        for length in range(len(key_path), 0, -1):
            text = self.variables.get(self.prefix + DELIMITER.join(key_path[:length]).upper())
            found.append(text if length == len(key_path) else _value_at(_parsed(text), key_path[length:]))
        found.append(_value_at(self.file.values, key_path))
        return next((value for value in found if value is not None), None)

    @property
    def origins(self) -> dict[KeyPath, str]:
        """Where each value was set, by its place in lower case; a section has the place where it begins.

        A place that is not in it has the origin of the nearest section around it that a variable or option sets.
        """
        found = {key_path: self._place(key_path, place) for key_path, place in self.file.places.items()}
        for name in self.variables:
            found[path_of_variable(name, self.prefix)] = f"environment {name}"
        found.update((tuple(map(str.lower, key_path)), "command line") for key_path in _leaves(self.overrides))
        for key_path, origin in list(found.items()):
            if key_path[-1].endswith(SUFFIX):  # where a secret that is read from a file was set
                found.setdefault((*key_path[:-1], key_path[-1].removesuffix(SUFFIX)), origin)
        return found

    def _place(self, key_path: KeyPath, place: str) -> str:
        """Return where a value of the file was set, with the variables in it."""
        variables = self.file.variables.get(key_path)
        return place if variables is None else f"{place} ({variables})"

    def origin(self, key_path: KeyPath) -> str:
        """Return where the value at `place` was set, followed by a colon, or "" if that is unknown."""
        if _value_at(self.overrides, key_path) is not None:
            return "command line: "
        prefixes = [key_path[:length] for length in range(len(key_path), 0, -1)]
        for some in prefixes:
            name = self.prefix + DELIMITER.join(some).upper()
            if name in self.variables and _may_contain(self.variables[name], key_path[len(some) :]):
                return f"environment {name}: "
        return self.file.place(key_path)

    def variables_of(self, key_path: KeyPath) -> str | None:
        """Return the variables in the value of the file that is in effect at `place`, or None."""
        return self.file.variables.get(tuple(map(str.lower, key_path)))

    def variables_below(self, key_path: KeyPath) -> Iterator[KeyPath]:
        """Yield the places, in lower case, of values with variables that are at `key_path` or below it."""
        lower = tuple(map(str.lower, key_path))
        return (place for place in self.file.variables if place[: len(lower)] == lower)

    def without_values(self, key_path: KeyPath, message: str) -> str:
        """Return a message about a place with the names of variables for the quoted texts that come from them."""
        for place in self.variables_below(key_path):
            value = str(_value_at(_lowered(self.file.values), place) or "").casefold()
            if value:
                message = QUOTED.sub(partial(_named, value, f"a value from {self.file.variables[place]}"), message)
        return message


def _lowered(value: Any) -> Any:
    """Return values with keys in lower case."""
    if isinstance(value, Mapping):
        return {str(name).lower(): _lowered(inner) for name, inner in value.items()}
    return [_lowered(inner) for inner in value] if isinstance(value, list) else value


def _named(value: str, name: str, quoted: re.Match[str]) -> str:
    """Return a name in place of a quoted text that is a value, a part of it, or made from it."""
    text = quoted[2].casefold()
    return name if text and (text in value or value in text) else quoted[0]


def _leaves(values: Mapping[str, Any], above: KeyPath = ()) -> Iterator[KeyPath]:
    """Yield the places of the values that are not sections."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, str(name)))
        elif value is not None:
            yield (*above, str(name))


def path_of_variable(name: str, prefix: str) -> KeyPath:
    """Return the place of the setting that the variable with this upper-case name sets."""
    return tuple(name.removeprefix(prefix).lower().split(DELIMITER))


def _may_contain(text: str | None, key_path: KeyPath) -> bool:
    try:
        return not key_path or _value_at(json.loads(text or ""), key_path) is not None
    except ValueError:
        return True


def _parsed(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except ValueError:
        return None


def _value_at(value: Any, key_path: KeyPath) -> Any:
    """Return the value at `place` inside `value`, or None."""
    for part in key_path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def path_of_error(detail: ErrorDetails) -> KeyPath:
    """Return the place of one of pydantic's errors; a wrong key is located by itself, a variant by its setting."""
    return tuple(str(part) for part in detail["loc"] if not str(part).startswith("["))


def describe_errors(
    detail: ErrorDetails, model: type[BaseModel], sources: Sources, patterns: Mapping[str, str] = NO_PATTERNS
) -> str:
    """Return a line for one of pydantic's errors about `model`. Secrets are not shown.

    `patterns` maps regular expressions to descriptions of the texts that match them.
    """
    key_path, kind = path_of_error(detail), detail["type"]
    shown = "" if isinstance(detail["input"], Unusable) else shown_value(detail["input"], type_at(model, key_path))
    variables = sources.variables_of(key_path)
    if shown and variables is not None:
        shown = f", got a value from {variables}"
    elif shown and any(True for _ in sources.variables_below(key_path)):
        shown = ""  # a section with a value from a variable
    message = _message(detail, patterns) + (_example(type_at(model, key_path)) if kind == "model_type" else "")
    if kind == "extra_forbidden":
        known = _keys_at(model, key_path[:-1])
        hint, shown = nearest(key_path[-1], known), ""
        if len(key_path) == 1:
            hint = nearest_at_top(key_path[0], {name: _keys_at(model, (name,)) for name in known})
        message = "unknown key" + (hint or "; known are " + ", ".join(known))
        section = type_at(model, key_path[:-1])
        is_below_root = len(key_path) > 1
        if "@" in key_path[-1] or (not hint and is_below_root and holds_secret(section)):  # as in store: {redis://...}
            key_path, message = key_path[:-1], f"has an {message}"
    elif kind == "model_type" and _is_named_secret(model, key_path):
        key_path, shown, message = key_path[:-1], "", f"under each name, {message}"  # the key may be the secret
    elif kind == "missing":
        message, shown = "is missing", ""
    elif detail["input"] is None:
        message, shown = f"has no value; {message}, or leave it out", ""
    other_form = (*key_path[:-1], "".join(key_path[-1:]) + SUFFIX)
    path = sources.value_at(other_form)
    if path is not None:  # the secret was read from a file
        names_file = ", got " in message or (isinstance(detail["input"], Unusable) and detail["input"].names_file)
        key_path, shown = other_form, "" if names_file else f", read from {shown_path(path)}"
    message, mark, hint = message.partition(HINT)
    return f"{sources.origin(key_path)}{path_text(key_path) or 'the configuration'}: {message}{shown}{mark}{hint}"


def _example(annotation: Any) -> str:
    """Return an example of a section: its required settings, or else its first optional one."""
    fields = unwrapped(annotation).model_fields
    keys = [name for name, field in fields.items() if field.is_required()] or list(fields)[:1]
    shorthand = getattr(unwrapped(annotation), "shorthand", None)
    alone = "" if shorthand is None else f" or {shorthand.example}"
    return f", such as {{{', '.join(f'{key}: ...' for key in keys)}}}{alone}"


_MESSAGES = {
    "model_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "list_type": "must be a list",
    "string_type": "must be text; put it in quotes",
    "path_type": "must be a path",
}


def _message(detail: ErrorDetails, patterns: Mapping[str, str]) -> str:
    """Return a message for an error, in the gateway's terms and without names of classes."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "string_type" and isinstance(detail["input"], bool):
        return "must be text; put it in quotes, as YAML reads on, off, yes and no as true and false"
    if kind == "string_pattern_mismatch" and context.get("pattern") in patterns:
        return patterns[context["pattern"]]
    return error_words(kind, detail["msg"], context, _MESSAGES)


def _is_named_secret(model: type[BaseModel], key_path: KeyPath) -> bool:
    """Return whether the place is an entry of a mapping from names to sections that contain a secret."""
    names = type_at(model, key_path[:-1])
    return get_origin(unwrapped(names)) is dict and holds_secret(names)


def shown_value(value: Any, annotation: Any) -> str:
    """Return the part of a message that shows a wrong value of this type, unless the value may contain a secret."""
    if holds_secret(annotation):
        return ""
    text = repr(value)
    if _LIKE_CREDENTIAL.search(text):
        return ", got a value that is not shown because it contains a key or token"
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}..."
    if "@" in text or (may_hold_password(annotation) and not _PLAIN_URL.fullmatch(text)):
        return ", got a value that is not shown because it may contain a password"
    return f", got {text}"


def path_text(key_path: KeyPath) -> str:
    """Return a place in the usual notation, such as `routes[0].path`."""
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in key_path).removeprefix(".")


def type_at(model: Any, key_path: KeyPath) -> Any:
    """Return the type, with its metadata, of the setting at `place` in `model`, or None if there is none."""
    for part in key_path:
        annotation = unwrapped(model)
        if is_section(annotation):
            field = annotation.model_fields.get(part)
            model = None if field is None else Annotated[(field.annotation, *field.metadata, None)]
        else:
            arguments = get_args(annotation)
            model = arguments[-1] if get_origin(annotation) in (dict, list) else None
    return model


def _keys_at(model: Any, key_path: KeyPath) -> list[str]:
    """Return the keys of the section at `place` in `model`."""
    section = unwrapped(type_at(model, key_path))
    return list(section.model_fields) if is_section(section) else []


def unwrapped(annotation: Any) -> Any:
    """Return a type without Annotated and Optional."""
    if get_origin(annotation) is Annotated:
        return unwrapped(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return unwrapped(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation


def is_section(model: Any) -> bool:
    """Return whether a type is a section, that is a pydantic model."""
    return isinstance(model, type) and issubclass(model, BaseModel)
