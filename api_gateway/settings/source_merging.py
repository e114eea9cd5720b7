"""Merges the values of several sources, before they are validated."""

from collections.abc import Iterable, Mapping
from typing import Any


def merged_values(sources: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge sources recursively; later ones take precedence."""
    merged: dict[str, Any] = {}
    for values in sources:
        for name, value in values.items():
            below = merged.get(name)
            is_nested = isinstance(below, Mapping) and isinstance(value, Mapping)
            merged[name] = merged_values([below, value]) if is_nested else value  # type: ignore[list-item]  # both are mappings
    return merged


def with_upper_tiers(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a source with the names of its tiers in upper case."""
    tiers = values.get("tiers")
    if not isinstance(tiers, Mapping):
        return values
    return values | {"tiers": {str(name).upper(): terms for name, terms in tiers.items()}}


def merged_tiers(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merge tiers into the default ones; None removes one."""
    merged: dict[str, Any] = dict(defaults)
    for name, terms in given.items():
        upper = str(name).upper()
        if terms is None:
            merged.pop(upper, None)
        elif isinstance(terms, Mapping) and isinstance(merged.get(upper), Mapping):
            merged[upper] = {**merged[upper], **terms}
        else:
            merged[upper] = terms
    return merged
