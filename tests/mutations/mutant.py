"""One mutation of the kept list."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change of one file: `old`, which it has exactly once, becomes `new`; then one of `tests` must fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def of(file: str, *mutants: tuple[str, str, str]) -> tuple[Mutant, ...]:
    """Return the mutants of a file, each given as old text, new text, and tests separated by spaces."""
    return tuple(Mutant(f"api_gateway/{file}", old, new, tuple(tests.split())) for old, new, tests in mutants)
