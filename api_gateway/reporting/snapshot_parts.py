"""The state of a snapshot in parts, each of which is parsed quickly."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

_LARGE = (("upstreams",), ("histories",), ("recorder", "routes"), ("recorder", "upstreams"))  # grow with configuration
_PART = 50  # rows of such a table in one part


def split(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a report's state in parts that are each parsed quickly: what is kept by route and upstream in pieces."""
    tables = [(path, _table(state, path)) for path in _LARGE]
    first = {**state, "recorder": {**state["recorder"]}}
    for path, _ in tables:
        _table(first, path[:-1])[path[-1]] = {}
    yield first
    for path, table in tables:
        rows = iter(table.items())
        while piece := dict(islice(rows, _PART)):
            yield {"path": path, "rows": piece}


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the state whose parts these are."""
    state, *pieces = parts
    for piece in pieces:
        _table(state, piece["path"]).update(piece["rows"])
    return state


def _table(state: Mapping[str, Any], path: Iterable[str]) -> Any:
    for key in path:
        state = state[key]
    return state
