"""Claims about what a feature costs, compared with the costs that one run has measured side by side."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.load import Failed


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


Measure = Callable[[float, int, Path | None], Mapping[str, Sequence[float]]]


def print_costs(
    module: str,
    description: str,
    measure: Measure,
    claims: Sequence[Claim],
    arguments: Sequence[str] | None,
    *,
    seconds: float = 3.0,
    rounds: int = 5,
) -> int:
    """Run a benchmark of costs as a program: print what it measured and a line on each claim; return the exit code.

    `measure` gets the seconds of a run, the number of rounds and another checkout. It returns microseconds in each
    round by what was measured, and raises Failed. A claim against what was not measured is left out. `seconds` and
    `rounds` are the defaults.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="of each run")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    chosen = parser.parse_args(arguments)
    try:
        found = measure(chosen.seconds, chosen.rounds, chosen.before)
    except Failed as error:
        print(error, file=sys.stderr)  # noqa: T201 - a program
        return 1
    print(f"CPU time of a request in us, median and range of {chosen.rounds} rounds; load {os.getloadavg()[0]:.1f}")  # noqa: T201
    for name, values in found.items():
        print(f"{name:45} {median(values):7.1f}  {min(values):7.1f} to {max(values):.1f}")  # noqa: T201
    for claim in claims:
        if claim.against in found:
            print(verdict(claim, found))  # noqa: T201
    return 0
