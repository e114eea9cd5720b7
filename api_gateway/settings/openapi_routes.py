"""Routes from an OpenAPI 3 document: the literal beginning of each path, with the methods of its operations."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from api_gateway.printable_text import printable
from api_gateway.settings.route_rules import API, path_problem

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch")  # TRACE is never proxied
_MAX_TEXT = 80  # characters of a description


class DocumentError(Exception):
    """The document cannot be used; the message names it and the cause."""


@dataclass(slots=True)
class DescribedRoute:
    """A route: its path, the prefix to strip, its methods, and a line about each operation."""

    name: str
    path: str
    strip_prefix: str | None
    methods: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ApiDescription:
    """The content of a document: a name for the upstream, the URL of its server if there is one, and its routes."""

    name: str
    url: str | None
    routes: list[DescribedRoute]


def read_openapi(path: Path) -> ApiDescription:
    """Read an OpenAPI 3 document, in YAML or JSON. Raises DocumentError."""
    document = _parsed(path)
    version = document.get("openapi")
    if not isinstance(version, str) or not version.startswith("3."):
        raise DocumentError(f"{path}: must be an OpenAPI 3 document, with openapi: 3.x at its top")
    parts = _server_url(next(iter(_mappings(document.get("servers"))), {}))
    is_absolute = parts.scheme in ("http", "https") and bool(parts.hostname) and not set("@{") & set(parts.netloc)
    base = parts.path.rstrip("/")
    title = _mapping(document.get("info")).get("title")
    routes = list(_routes(_mapping(document.get("paths")), base))
    if not routes:
        raise DocumentError(f"{path}: has no paths with operations")
    return ApiDescription(
        _identifier(str(title or "upstream")), f"{parts.scheme}://{parts.netloc}" if is_absolute else None, routes
    )


def _server_url(server: Mapping[str, Any]) -> SplitResult:
    """Return the parts of a server's URL, with the defaults of its variables; those without one stay in braces."""
    url = server.get("url")
    text = url if isinstance(url, str) else ""
    for name, variable in _mapping(server.get("variables")).items():
        default = _mapping(variable).get("default")
        if default is not None:
            text = text.replace(f"{{{name}}}", str(default))
    try:
        return urlsplit(text)
    except ValueError:  # an invalid IPv6 address
        return urlsplit("")


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, yaml.YAMLError, RecursionError):
        raise DocumentError(f"{path}: is neither JSON nor YAML") from None
    if not isinstance(document, Mapping):
        raise DocumentError(f"{path}: must be an OpenAPI 3 document, with openapi: 3.x at its top")
    return document


def _routes(paths: Mapping[str, Any], base: str) -> Iterator[DescribedRoute]:
    """Yield a route for each literal beginning, which also has the operations below it."""
    found: dict[str, DescribedRoute] = {}
    names: set[str] = set()
    for template, item in paths.items():
        operations = {method: item[method] for method in _METHODS if method in _mapping(item)}
        if not operations or not str(template).startswith("/"):
            continue
        literal = _literal(f"{base}{template}")
        if literal not in found:
            is_below = literal == API or literal.startswith(f"{API}/")
            path = literal if is_below else f"{API}{literal}".rstrip("/")
            name = _unique(_identifier(literal.removeprefix(API)) or "all", names)
            found[literal] = DescribedRoute(name, path, None if is_below else API)
        route = found[literal]
        for method, operation in operations.items():
            if method.upper() not in route.methods:
                route.methods.append(method.upper())
            about = _mapping(operation)
            text = str(about.get("operationId") or about.get("summary") or "")
            route.operations.append(_line(f"{method.upper()} {base}{template}", text))
    yield from found.values()


def _literal(template: str) -> str:
    """Return the segments before the first one with a parameter, or that no route can have."""
    segments: list[str] = []
    for segment in template.split("/")[1:]:
        if not segment or set("{?#") & set(segment) or path_problem(f"{API}/{segment}") is not None:
            break
        segments.append(segment)
    return "/" + "/".join(segments)


def _line(operation: str, text: str) -> str:
    line = f"{operation}: {text}" if text else operation
    return printable(" ".join(line.split()))[:_MAX_TEXT]


def _identifier(text: str) -> str:
    """Return a name of letters, digits and hyphens."""
    plain = "".join(one if one.isascii() and one.isalnum() else "-" for one in text)
    return "-".join(filter(None, plain.split("-"))).lower()[:50]


def _unique(name: str, names: set[str]) -> str:
    chosen, number = name, 2
    while chosen in names:
        chosen, number = f"{name}-{number}", number + 1
    names.add(chosen)
    return chosen


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
