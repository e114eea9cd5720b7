"""The verdicts of benchmarks on claims."""

from pathlib import Path

import pytest

from benchmarks.claims import Claim, interval_of_median, print_costs, ratio_verdict, verdict
from tests.cases import each

CLAIM = Claim("a key", "with", "without", 2.0)
FEW = {"with": [51.0, 101.5, 52.0], "without": [50.0, 100.0, 50.0]}


def test_a_claim_is_compared_round_by_round() -> None:
    """A slow round is slow for both."""
    found = verdict(CLAIM, FEW)
    assert found.line == "a key: +1.50 us (+1.00 to +2.00), ratio 1.040; claimed at most +2 us: met"


@each(
    ("differences", "is_met", "words"),
    [
        ([3.0], False, "NOT MET"),
        ([1.0, 1.0, 3.0], False, "NOT DECIDED, more rounds are needed"),
        ([*[1.0] * 80, *[9.0] * 20], True, "met"),
        ([*[1.0] * 51, *[9.0] * 49], False, "NOT DECIDED, more rounds are needed"),
        ([*[1.0] * 20, *[9.0] * 80], False, "NOT MET"),
    ],
)
def test_a_claim_is_met_if_the_interval_of_the_median_is_within_it(
    differences: list[float], *, is_met: bool, words: str
) -> None:
    found = verdict(CLAIM, {"with": [50 + each for each in differences], "without": [50.0] * len(differences)})
    assert found.is_met is is_met
    assert found.line.endswith(f": {words}")


def test_the_interval_of_a_median_narrows_with_the_number_of_values() -> None:
    assert interval_of_median([1.0, 2.0, 3.0]) == (1.0, 3.0), "a few values do not limit it"
    assert interval_of_median([float(number) for number in range(100)]) == (40.0, 59.0)
    assert interval_of_median([float(number) for number in range(10_000)]) == (4902.0, 5097.0)


def test_a_ratio_is_below_its_limit_or_not() -> None:
    assert ratio_verdict("p99", 3.0, 2.0, 2.0).line == "p99: ratio 1.50; claimed less than 2: met"
    assert ratio_verdict("p99", 4.0, 2.0, 2.0).line.endswith("NOT MET")


def test_a_benchmark_whose_claim_is_not_met_fails_and_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(_seconds: float, _rounds: int, _before: Path | None) -> dict[str, list[float]]:
        return FEW | {"more": [59.0, 109.0, 59.0]}

    claims = [CLAIM, Claim("another", "more", "without", 2.0), Claim("before", "with", "before", 1.0)]
    assert print_costs("benchmarks.any", "", measure, claims[:1], []) == 0
    assert not capsys.readouterr().err
    assert print_costs("benchmarks.any", "", measure, claims, []) == 1
    output, errors = capsys.readouterr()
    assert errors == "not shown to hold: another\n"
    assert output.count("claimed") == 2, "what was not measured is not compared"
