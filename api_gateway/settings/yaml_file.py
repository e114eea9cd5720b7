"""Reads configuration files in YAML, with the line of each value."""

import re
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from api_gateway.settings.diagnostics import QUOTED, ConfigError, KeyPath, SettingsFile, path_text, settings_text

_YAML_TOKEN = re.compile(
    r".|\\.|<[a-z ]+>"
)  # what YAML's messages quote that is not from the file, and single characters
_HOLDS_ITSELF = "contains itself"
_MAX_VALUES = 200_000  # of a file, with what its aliases repeat
_TOO_MANY = f"the file has more than {_MAX_VALUES:,} values; aliases of aliases multiply them"
_TEXT = "tag:yaml.org,2002:str"
_KEY_TAGS = (_TEXT, "tag:yaml.org,2002:merge")


class _TextKeys(SafeConstructor):
    """Reads every key as the text in the file, although YAML would convert some, such as numbers."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - the library's signature
        """See `SafeConstructor`."""
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag not in _KEY_TAGS:
                key.tag = _TEXT
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> SettingsFile:
    """Read a file of sections. Raises ConfigError if it cannot be read or is not a YAML mapping.

    A duplicate key is one of the file's `problems`, because YAML silently uses the second value.
    """
    lines: dict[KeyPath, int] = {}
    text = settings_text(path)
    try:
        root = _composed(text)
        faults = [
            f"{path}:{line}: {path_text(key_path)}: {fault}" for key_path, line, fault in _index_lines(root, (), lines)
        ]
        if any(fault.endswith((_HOLDS_ITSELF, _TOO_MANY)) for fault in faults):
            raise ConfigError(faults)
        values = None if root is None else _TextKeys().construct_document(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date
        raise ConfigError([f"{path}{_not_yaml(error)}"]) from None
    if values is None:
        return SettingsFile(path, {}, {})
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: must contain sections, got {type(values).__name__}"])
    places = {tuple(map(str.lower, key_path)): f"{path}:{line}" for key_path, line in lines.items()}
    return SettingsFile(path, values, places, tuple(faults))


def _composed(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, None if it is empty. Raises YAMLError, ValueError or RecursionError.

    LibYAML, where PyYAML has it, takes a tenth of the time of the parser in Python, whose messages are better.
    """
    if yaml.__with_libyaml__:
        with suppress(yaml.YAMLError, ValueError):
            return _node(text, yaml.CSafeLoader)
    return _node(text, yaml.SafeLoader)


def _node(text: str, loader: "type[yaml.CSafeLoader | yaml.SafeLoader]") -> yaml.Node | None:
    root: yaml.Node | None = yaml.compose(text, Loader=loader)
    return root


def _not_yaml(error: Exception) -> str:
    """Return line and problem without the quoted text of the file, which may be a secret."""
    cursor = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    problem = QUOTED.sub(lambda quoted: quoted[0] if _YAML_TOKEN.fullmatch(quoted[2]) else "'...'", problem)
    hint = "; indent with spaces instead of tabs" if "'\\t'" in problem else ""
    return f"{f':{cursor.line + 1}' if cursor else ''}: not YAML: {problem}{hint}"


def _index_lines(
    node: yaml.Node | None, key_path: KeyPath, lines: dict[KeyPath, int], above: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[KeyPath, int, str]]:
    """Fill `lines`; yield place, line and fault of each key or value that is valid YAML and not accepted here."""
    if any(node is outer for outer in above) and node is not None:
        yield key_path, node.start_mark.line + 1, _HOLDS_ITSELF
        return
    if len(lines) > _MAX_VALUES:
        if len(lines) == _MAX_VALUES + 1:
            lines[*key_path, ""] = 0  # said once
            yield key_path, 0 if node is None else node.start_mark.line + 1, _TOO_MANY
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*key_path, str(key.value) if isinstance(key, yaml.ScalarNode) else "?")
            line = key.start_mark.line + 1
            if inner in lines:
                yield inner, line, "given twice"
            elif key.tag not in _KEY_TAGS:
                yield inner, line, "is not text; put the key in quotes"
            lines[inner] = line
            yield from _index_lines(value, inner, lines, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = (*key_path, str(index))
            lines[inner] = value.start_mark.line + 1
            yield from _index_lines(value, inner, lines, (*above, node))
