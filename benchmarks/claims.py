"""Claims about what a feature costs, compared with the costs that one run has measured side by side."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.load import Failed

STEP_ROUNDS = 1500  # of a measurement within one process
_HALF_WIDTH = 1.96 / 2  # of a 95 % interval of a median in ranks, times the root of the number of values


class Claim(NamedTuple):
    """What is measured as `of` costs at most `limit` microseconds more than what is measured as `against`."""

    name: str
    of: str
    against: str
    limit: float


class Verdict(NamedTuple):
    """Whether a claim is met, and the line that says so."""

    claim: str
    is_met: bool
    line: str


def verdict(claim: Claim, found: Mapping[str, Sequence[float]]) -> Verdict:
    """Compare round by round, since rounds differ more than what is compared. `found` are microseconds by name.

    The claim is met if its limit is not below the 95 % confidence interval of the median of the differences, which is
    from the least to the largest of a few.
    """
    of, against = found[claim.of], found[claim.against]
    differences = sorted(one - other for one, other in zip(of, against, strict=True))
    low, high = interval_of_median(differences)
    is_met = high <= claim.limit
    word = "met" if is_met else "NOT MET" if low > claim.limit else "NOT DECIDED, more rounds are needed"
    line = (
        f"{claim.name}: {median(differences):+.2f} us ({low:+.2f} to {high:+.2f}), ratio"
        f" {median(of) / median(against):.3f}; claimed at most +{claim.limit:g} us: {word}"
    )
    return Verdict(claim.name, is_met, line)


def interval_of_median(ordered: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median of sorted values, by the ranks of the sign test."""
    count = len(ordered)
    rank = max(math.floor(count / 2 - _HALF_WIDTH * math.sqrt(count)), 0)
    return ordered[rank], ordered[count - 1 - rank]


def ratio_verdict(name: str, of: float, against: float, limit: float) -> Verdict:
    """Return whether one figure is less than `limit` times another one."""
    ratio = of / against
    is_met = ratio < limit
    line = f"{name}: ratio {ratio:.2f}; claimed less than {limit:g}: {'met' if is_met else 'NOT MET'}"
    return Verdict(name, is_met, line)


def print_verdicts(verdicts: Iterable[Verdict]) -> int:
    """Print a line on each claim; return the exit code: 1 if any is not shown to hold, which a message names."""
    failed = []
    for one in verdicts:
        print(one.line)  # noqa: T201 - a program
        if not one.is_met:
            failed.append(one.claim)
    if failed:
        print(f"not shown to hold: {'; '.join(failed)}", file=sys.stderr)  # noqa: T201
    return int(bool(failed))


Found = Mapping[str, Sequence[float]]
Measure = Callable[[float, int, Path | None], Found]


def print_costs(
    module: str,
    description: str,
    measure: Measure,
    claims: Sequence[Claim],
    arguments: Sequence[str] | None,
    *,
    seconds: float = 3.0,
    rounds: int = 5,
    steps: Callable[[int], Found] | None = None,
) -> int:
    """Run a benchmark of costs as a program: print what it measured and a line on each claim; return the exit code.

    `measure` gets the seconds of a run, the number of rounds and another checkout. It returns microseconds in each
    round by what was measured, and raises Failed. A claim against what was not measured is left out. `seconds` and
    `rounds` are the defaults. `steps` measures the same within one process, in a number of rounds; it is preferred.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--seconds", type=float, default=seconds, help="of each run of a process")
    parser.add_argument("--rounds", type=int, help=f"{rounds} of processes, {STEP_ROUNDS} within one process")
    parser.add_argument("--before", type=Path, help="a checkout of another commit; processes are measured")
    parser.add_argument("--processes", action="store_true", help="measure whole processes")
    chosen = parser.parse_args(arguments)
    try:
        if steps is None or chosen.processes or chosen.before is not None:
            found = measure(chosen.seconds, chosen.rounds or rounds, chosen.before)
        else:
            found = steps(chosen.rounds or STEP_ROUNDS)
    except Failed as error:
        print(error, file=sys.stderr)  # noqa: T201 - a program
        return 1
    print_table(found)
    return print_verdicts(verdict(claim, found) for claim in claims if claim.against in found)


def print_table(found: Found) -> None:
    """Print what was measured."""
    rounds = max(len(values) for values in found.values())
    print(f"CPU time of a request in us, median and range of {rounds} rounds; load {os.getloadavg()[0]:.1f}")  # noqa: T201
    for name, values in found.items():
        print(f"{name:45} {median(values):7.1f}  {min(values):7.1f} to {max(values):.1f}")  # noqa: T201
