"""Paths to claims within a token, and what the values at their ends mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_MAX_LISTED = 256  # elements of a claim that is a list
_MISSING = object()
Value = TypeVar("Value", str, int, bool, str | int | bool)


@dataclass(frozen=True, slots=True)
class ClaimPath:
    """The path of a claim: the names of members, outermost first; `text` is how it was written.

    `realm_access.roles` names the member `roles` of the claim `realm_access`. A JSON pointer (RFC 6901), which begins
    with a slash, can name any member: `/https:~1~1example.com~1tier`. A path with `://` is the name of one claim.
    """

    text: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "ClaimPath":
        """Return the path that `text` describes."""
        if text.startswith("/"):
            return cls(text, tuple(part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/")))
        return cls(text, (text,) if "://" in text else tuple(text.split(".")))

    def __str__(self) -> str:
        return self.text

    def value(self, claims: Mapping[str, Any]) -> Any:
        """Return the value at the end of the path, None if there is none."""
        found: Any = claims
        for name in self.names:
            found = found.get(name, _MISSING) if isinstance(found, dict) else _MISSING
            if found is _MISSING:
                return None
        return found

    def text_value(self, claims: Mapping[str, Any]) -> str | None:
        """Return the value if it is text or an integer, as text; None otherwise."""
        found = self.value(claims)
        if isinstance(found, str):
            return _text(found)
        return str(found) if isinstance(found, int) and not isinstance(found, bool) else None

    def values(self, claims: Mapping[str, Any]) -> tuple[str | int | bool, ...]:
        """Return the elements of a claim that is a list, or its only value."""
        found = self.value(claims)
        if isinstance(found, list):
            return tuple([_text(one) for one in found[:_MAX_LISTED] if isinstance(one, str | int | bool)])
        return (_text(found),) if isinstance(found, str | int | bool) else ()


def _text(value: Value) -> Value:
    """Return a claim's value; in text, lone surrogates (RFC 8259 section 8.2), which no file can have, are escaped."""
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="backslashreplace").decode()
    return value


def scopes_of(claims: Mapping[str, Any], paths: Sequence[ClaimPath]) -> frozenset[str]:
    """Return the scopes of a token: text with spaces between them (RFC 6749 section 3.3), or a list."""
    found: set[str] = set()
    for path in paths:
        for value in path.values(claims):
            if isinstance(value, str):
                found.update(value.split())
    return frozenset(found)
