"""The requirements of a route for tokens: scopes, and claims with certain values. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

ClaimValue = str | int | bool


@dataclass(frozen=True, slots=True)
class Requirement:
    """Every one of `scopes`, and for each claim (by its path) one of the values."""

    scopes: tuple[str, ...] = ()
    claims: tuple[tuple[str, tuple[ClaimValue, ...]], ...] = ()

    def lacking(self, scopes: Collection[str], claims: Mapping[str, Collection[ClaimValue]]) -> str | None:
        """Return the first thing that a token lacks, in words; None if it has all. `claims` are values by path."""
        for scope in self.scopes:
            if scope not in scopes:
                return f"the scope '{scope}'"
        for path, values in self.claims:
            if not any(_is_same(one, value) for one in claims.get(path, ()) for value in values):
                return f"another value of the claim '{path}'"
        return None


def _is_same(one: ClaimValue, other: ClaimValue) -> bool:
    return isinstance(one, bool) is isinstance(other, bool) and one == other  # in Python, True equals 1
