"""The verdicts of benchmarks on claims."""

from benchmarks.claims import Claim, ratio_verdict, verdict

CLAIM = Claim("a key", "with", "without", 2.0)


def test_a_claim_is_compared_round_by_round() -> None:
    """A slow round is slow for both."""
    told = verdict(CLAIM, {"with": [51.0, 101.5, 52.0], "without": [50.0, 100.0, 50.0]})
    assert told == "a key: +1.5 us (+1.0 to +2.0), ratio 1.040; claimed at most +2 us: met"
    assert verdict(CLAIM, {"with": [53.0], "without": [50.0]}).endswith("NOT MET")


def test_a_ratio_is_below_its_limit_or_not() -> None:
    assert ratio_verdict("p99", 3.0, 2.0, 2.0) == "p99: ratio 1.50; claimed less than 2: met"
    assert ratio_verdict("p99", 4.0, 2.0, 2.0).endswith("NOT MET")
