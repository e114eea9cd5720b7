"""Claims about what a feature costs, compared with the costs that one run has measured side by side."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Claim(NamedTuple):
    """What is measured as `of` costs at most `limit` microseconds more than what is measured as `against`."""

    name: str
    of: str
    against: str
    limit: float


def verdict(claim: Claim, found: Mapping[str, Sequence[float]]) -> str:
    """Return a line on a claim: the difference in each round, since rounds differ more than what is compared.

    `found` are microseconds in each round by what was measured.
    """
    of, against = found[claim.of], found[claim.against]
    differences = [one - other for one, other in zip(of, against, strict=True)]
    middle = median(differences)
    return (
        f"{claim.name}: {middle:+.1f} us ({min(differences):+.1f} to {max(differences):+.1f}), ratio"
        f" {median(of) / median(against):.3f}; claimed at most +{claim.limit:g} us:"
        f" {'met' if middle <= claim.limit else 'NOT MET'}"
    )


def ratio_verdict(name: str, of: float, against: float, limit: float) -> str:
    """Return a line on a claim that one figure is less than `limit` times another one."""
    ratio = of / against
    return f"{name}: ratio {ratio:.2f}; claimed less than {limit:g}: {'met' if ratio < limit else 'NOT MET'}"
