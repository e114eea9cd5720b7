"""Puts configuration mistakes in words: where the value was set, its place, what is wrong with it, the value.

Knows YAML files, the environment and pydantic's errors, but no section of the configuration in particular.
"""

import difflib
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

Place = tuple[str, ...]


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds one line for each mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class YamlFile:
    """A parsed file: its values, and the line of each by its place in lower case."""

    path: Path | None
    values: dict[str, Any]
    lines: Mapping[Place, int]


NO_FILE = YamlFile(None, {}, {})


def read_yaml(path: Path) -> YamlFile:
    """Read a file of sections. Raises ConfigError, also for a key given twice: the second would silently win."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from error
    if values is None:
        return YamlFile(path, {}, {})
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: must hold sections, got {type(values).__name__}"])
    lines: dict[Place, int] = {}
    repeated = list(_index_lines(root, (), lines))
    if repeated:
        raise ConfigError([f"{path}:{line}: {_spelt(place)}: given twice" for place, line in repeated])
    return YamlFile(path, values, {tuple(map(str.lower, place)): line for place, line in lines.items()})


def _index_lines(node: yaml.Node | None, place: Place, lines: dict[Place, int]) -> Iterator[tuple[Place, int]]:
    """Fill `lines` and yield every key that its mapping holds twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                yield inner, line
            lines[inner] = line
            yield from _index_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*place, str(index))
            lines[inner] = value.start_mark.line + 1
            yield from _index_lines(value, inner, lines)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where values came from: `overrides` of the command line, `variables` (names, upper case), and the file."""

    overrides: Mapping[str, Any]
    prefix: str
    variables: Collection[str]
    file: YamlFile

    def origin(self, place: Place) -> str:
        """Return where the value at `place` was set, with a colon behind, or nothing when it cannot be told."""
        found: Any = self.overrides
        for part in place:
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return "command line: "
        prefixes = [place[:length] for length in range(len(place), 0, -1)]
        for some in prefixes:
            name = self.prefix + "__".join(some).upper()
            if name in self.variables:
                return f"environment {name}: "
        for some in prefixes:
            line = self.file.lines.get(tuple(map(str.lower, some)))
            if line is not None:
                return f"{self.file.path}:{line}: "
        return ""


def explain(detail: ErrorDetails, model: type[BaseModel], sources: Sources, secret: Collection[Place]) -> list[str]:
    """Return a line for each mistake in one of pydantic's errors about `model`. Values at `secret` are not shown."""
    place = tuple(str(part) for part in detail["loc"] if part != "[key]")
    message = detail["msg"].removeprefix("Value error, ")
    if not place:  # a rule between sections, which names its places itself
        return message.split("\n")
    is_secret = any(hidden[: len(place)] == place for hidden in secret)
    shown = "" if is_secret else f", got {detail['input']!r}"
    if detail["type"] == "extra_forbidden":
        known = _keys_at(model, place[:-1])
        message = "unknown key" + (nearest(place[-1], known) or "; known are " + ", ".join(known))
        shown = ""
    elif detail["type"] == "missing":
        message, shown = "is missing", ""
    return [f"{sources.origin(place)}{_spelt(place)}: {message[0].lower()}{message[1:]}{shown}"]


def nearest(word: str, known: Collection[str]) -> str:
    """Return a suggestion when one of `known` is close to `word`, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _spelt(place: Place) -> str:
    return "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place).removeprefix(".")


def _keys_at(model: Any, place: Place) -> list[str]:
    """Return the keys known to the section at `place` below `model`."""
    for part in place:
        model = _unwrapped(model.model_fields[part].annotation if _is_section(model) else get_args(model)[-1])
    return list(model.model_fields) if _is_section(model) else []


def _unwrapped(annotation: Any) -> Any:
    """Take off Annotated and Optional."""
    if get_origin(annotation) is Annotated:
        return _unwrapped(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _unwrapped(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)
