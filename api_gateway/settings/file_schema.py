"""The JSON Schema (draft 2020-12) of configuration files, for editors and other programs.

It is derived from the sections: whatever the loader accepts in a file is valid, including shorthands, numbers in
quotes and `${VARIABLE}`. Rules between settings are the loader's alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from api_gateway.settings.deprecations import ANY_PART, DEPRECATED, Deprecation
from api_gateway.settings.quantities import NUMBER_TEXT

DIALECT = "https://json-schema.org/draft/2020-12/schema"
JsonSchema = dict[str, Any]

_VARIABLE = r"\$\{"  # within a text
_TEXTS = {
    "integer": NUMBER_TEXT,
    "number": NUMBER_TEXT,
    "boolean": "^([Tt]rue|TRUE|[Ff]alse|FALSE|[Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF|[01]|[tfyn])$",
}
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_LISTS, _TABLES = ("anyOf", "oneOf", "allOf"), ("properties", "patternProperties", "$defs")


def file_schema(model: type[BaseModel], title: str, deprecations: Sequence[Deprecation] = DEPRECATED) -> JsonSchema:
    """Return the schema of a file with the settings of `model`, and with deprecated keys, which are marked."""
    whole = model.model_json_schema()
    for one in deprecations:
        if one.new is not None:
            _add_deprecated(whole, one, one.new)
    for node in list(_nodes(whole)):
        _complete(node)
    return {"$schema": DIALECT, **whole, "title": title}


def _add_deprecated(whole: JsonSchema, one: Deprecation, new: str) -> None:
    """Add a deprecated key beside the new one, in the section that it is in."""
    section = whole
    for part in one.old[:-1]:
        inner = section["properties"].get(part) if part != ANY_PART else _entries(section)
        section = _section(whole, inner)
    old = dict(section["properties"][new], deprecated=True)
    section["properties"][one.old[-1]] = old | {"description": f"Deprecated since {one.since}: write {new}."}
    if new in section.get("required", ()):
        section["required"] = [name for name in section["required"] if name != new]


def _entries(section: JsonSchema) -> JsonSchema:
    """Return the schema of the entries of a list or mapping."""
    patterns = list(section.get("patternProperties", {}).values())
    found: JsonSchema = section["items"] if "items" in section else [*patterns, section.get("additionalProperties")][0]
    return found


def _section(whole: JsonSchema, node: JsonSchema) -> JsonSchema:
    """Return the section or collection that a schema is, or refers to."""
    if "$ref" in node:
        return _section(whole, whole["$defs"][node["$ref"].rpartition("/")[2]])
    options = [one for one in node.get("anyOf", ()) if one.get("type") != "null"]
    return _section(whole, options[0]) if options else node


def _nodes(node: JsonSchema) -> Iterator[JsonSchema]:
    """Yield a schema and all schemas within it."""
    yield node
    inner = [one for name in _LISTS for one in node.get(name, ())]
    inner += [one for name in _TABLES for one in node.get(name, {}).values()]
    inner += [node[name] for name in ("items", "additionalProperties") if isinstance(node.get(name), dict)]
    for one in inner:
        yield from _nodes(one)


def _complete(node: JsonSchema) -> None:
    """Change one schema in place from what a section holds to what a file may contain."""
    for name, standard in _BOUNDS.items():
        if name in node:
            node[standard] = node.pop(name)
    if "patternProperties" in node:
        node.setdefault("additionalProperties", False)
    if isinstance(node.get("default"), Mapping) or node.get("writeOnly"):
        node.pop("default", None)
    if "title" in node:
        node["title"] = node["title"].removesuffix("Section")
    if "description" in node:
        node["description"] = _plain(node["description"])
    _accept_texts(node)


def _accept_texts(node: JsonSchema) -> None:
    """Accept numbers and switches in quotes, and variables in every text."""
    if "enum" in node or "const" in node:
        given = node.pop("enum", None) or [node.pop("const")]
        node.pop("type", None)
        node["anyOf"] = [{"enum": given}, {"type": "string", "pattern": _VARIABLE}]
        return
    kinds = [node["type"]] if isinstance(node.get("type"), str) else node.get("type", [])
    quoted = [_TEXTS[kind] for kind in kinds if kind in _TEXTS]
    if quoted and "string" not in kinds:
        node["type"] = [*kinds, "string"]
    patterns = [*([node["pattern"]] if "pattern" in node else []), *quoted]
    if patterns:
        node["pattern"] = "|".join([*patterns, _VARIABLE])
    if "minimum" in node or "maximum" in node or "string" not in kinds:
        return
    if patterns or node.get("minLength") or node.get("maxLength"):  # a length is that of the value of a variable
        limits = {name: node.pop(name) for name in ("minLength", "maxLength", "pattern") if name in node}
        pattern = {"pattern": limits["pattern"]} if "pattern" in limits else {}
        lengths = {name: limit for name, limit in limits.items() if name != "pattern"}
        node.update(pattern)
        if lengths:
            node["anyOf"] = [lengths, {"pattern": _VARIABLE}]


def _plain(text: str) -> str:
    """Return a description as one paragraph a blank line apart, in the words of a file."""
    paragraphs = (" ".join(one.split()) for one in text.split("\n\n"))
    return re.sub(r"\bNone\b", "null", "\n\n".join(paragraphs))
