"""Splitting of a snapshot's state into parts, so that parsing one does not block the event loop."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

_LARGE = (("upstreams",), ("histories",), ("recorder", "routes"), ("recorder", "upstreams"))  # grow with configuration
_PART = 50  # rows of such a table in one part


def split(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the state in parts: first all but the large tables, then each table in pieces of `_PART` rows."""
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
    """Return the state from its parts, in their order."""
    state, *pieces = parts
    for piece in pieces:
        _table(state, piece["path"]).update(piece["rows"])
    return state


def _table(state: Mapping[str, Any], path: Iterable[str]) -> Any:
    for key in path:
        state = state[key]
    return state
