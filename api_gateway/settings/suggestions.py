"""Suggestions in messages: what was probably meant by an unknown name."""

import difflib
from collections.abc import Collection, Mapping

HINT = "; did you mean "
_SIMILAR, _MISSPELT = 0.5, 0.8  # likenesses of two names


def nearest(word: str, known: Collection[str]) -> str:
    """Return a suggestion if one of `known` is similar to `word`, else ""."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=_SIMILAR)
    return f"{HINT}{close[0]!r}?" if close else ""


def nearest_at_top(key: str, sections: Mapping[str, Collection[str]]) -> str:
    """Return a suggestion for an unknown key at the top level: a similar section, or a section that has the key."""
    homes = [f"'{name}.{key}'" for name, keys in sections.items() if key in keys]
    if not homes or difflib.get_close_matches(key, sections, n=1, cutoff=_MISSPELT):
        return nearest(key, sections)
    return f"{HINT}{' or '.join(homes)}?"
