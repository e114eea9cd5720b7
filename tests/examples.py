"""How many generated examples a test has, where that is not the number of its profile."""

from hypothesis import settings

_WHOLE = 100  # examples of a test with the profile "whole"; see `conftest`


def examples(count: int) -> int:
    """Return `count`, or the share of it that the profile has of the examples of "whole"."""
    return max(1, count * settings().max_examples // _WHOLE)
