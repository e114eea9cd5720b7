"""Candidates of concurrency limits: slots of their own, which never refuse and are returned with the request."""

import json
from pathlib import Path
from typing import Any

import pytest

from api_gateway.assembly.stores import Quotas
from api_gateway.config import GatewayConfig, load_config
from api_gateway.metrics import Recorder
from api_gateway.proxy.candidate_limits import CandidateLimits
from api_gateway.settings.diagnostics import ConfigError
from tests.kit import in_front_of
from tests.unit.test_concurrency import RICH, Slotted

LIMIT = {"name": "five", "concurrent": {"FREE": 5}, "tiers": ["FREE"], "candidate": {"concurrent": {"FREE": 2}}}


def trying(limit: dict[str, Any]) -> tuple[Slotted, Recorder]:
    """Return a stage with this limit and its candidate, and what counts the candidate's decisions."""
    quotas = Quotas.of(GatewayConfig.model_validate({"limits": [limit]}))
    slotted, recorder = Slotted(*quotas.concurrency), Recorder(["r"], ["up"], ["FREE", "PREMIUM"], [50], 0.0)
    slotted.stage.candidate_limits = CandidateLimits(
        limiter=slotted.limiter,
        clock_ns=lambda: slotted.now_ns,
        recorder=recorder,
        candidates=quotas.all_candidates,
        routes=(),
        slots=slotted.slots,
    )
    return slotted, recorder


def test_a_candidate_counts_what_it_would_refuse_and_returns_to_zero() -> None:
    slotted, recorder = trying(LIMIT)
    begun = [slotted.begin() for _ in range(6)]
    assert [error is None for _, error in begun] == [True] * 5 + [False], "the candidate refuses nothing"
    assert slotted.in_flight == {"five": 5, "five candidate": 2}
    assert recorder.candidate_refusals == {("five", "FREE"): 3}
    assert slotted.begin(client=RICH)[0].candidate is None, "its tier has neither"
    slotted.end(begun[0][0])
    begun.append(slotted.begin())
    assert recorder.candidate_refusals == {("five", "FREE"): 3}, "one of its slots was free again"
    for exchange, _ in begun:
        slotted.end(exchange)
    assert slotted.in_flight == {"five": 0, "five candidate": 0}
    assert not slotted.slots.counters


def test_a_higher_candidate_counts_what_it_would_admit() -> None:
    slotted, recorder = trying({"name": "two", "concurrent": 2, "candidate": {"concurrent": 3}})
    begun = [slotted.begin() for _ in range(3)]
    assert [error is None for _, error in begun] == [True, True, False]
    assert (recorder.would_allow["FREE"], recorder.would_refuse["FREE"]) == (1, 0)
    assert slotted.in_flight == {"two": 2, "two candidate": 3}
    for exchange, _ in begun:
        slotted.end(exchange)
    assert slotted.in_flight == {"two": 0, "two candidate": 0}


def test_a_candidate_without_tokens_takes_no_slot() -> None:
    slotted, recorder = trying({"name": "many", "concurrent": 50, "candidate": {"concurrent": 40}})
    for _ in range(12):  # the bucket of the tier has ten tokens
        slotted.begin()
    assert slotted.in_flight == {"many": 10, "many candidate": 10}
    assert recorder.would_refuse["FREE"] == recorder.would_allow["FREE"] == 0


def test_names_of_candidates_have_figures_from_the_start() -> None:
    quotas = Quotas.of(GatewayConfig.model_validate({"limits": [LIMIT, {"name": "one", "concurrent": 1}]}))
    assert quotas.slot_names == ["five", "one", "five candidate"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            {"candidate": {"rate": 1, "capacity": 2}},
            (
                "limits[0]: a candidate with rate and capacity needs both beside it; of a quota, it has quota, and of"
                " a concurrency limit, concurrent"
            ),
        ),
        (
            {"concurrent": None, "rate": 1, "capacity": 2, "candidate": {"concurrent": 3}},
            "limits[0]: a candidate with concurrent needs concurrent beside it, got 3",
        ),
        (
            {"candidate": {"concurrent": {"FREE": 3}}},
            (
                "limits[0]: a candidate has numbers by tier if concurrent has: write one number, or both by tier,"
                " got 5 and {'FREE': 3}"
            ),
        ),
        (
            {"tiers": {"FREE": {"candidate": {"concurrent": 3}}}},
            "limits[0]: a candidate with concurrent belongs to the limit: move it out of tiers",
        ),
        (
            {"candidate": {"concurrent": 0}},
            "limits[0].candidate.concurrent: must be greater than or equal to 1, got 0",
        ),
        (
            {"candidate": {"concurrent": 3, "rate": 1}},
            "limits[0].candidate: needs capacity too",
        ),
        (
            {"candidate": {}},
            "limits[0].candidate: must have either rate and capacity, or quota, or concurrent, got nothing",
        ),
        ({"candidate": {"concurent": 3}}, "limits[0].candidate.concurent: unknown key; did you mean 'concurrent'?"),
        (
            {"concurrent": {"FREE": 5}, "tiers": ["FREE"], "candidate": {"concurrent": {"BASIC": 3}}},
            (
                "limits[0] (one).candidate.concurrent.BASIC: the limit does not apply to this tier: add it to tiers or"
                " remove it, got 3"
            ),
        ),
        (
            {"concurrent": {"FREE": 5}, "tiers": ["FREE"], "candidate": {"concurrent": {"SILVER": 3}}},
            (
                "limits[0] (one).candidate.concurrent.SILVER: no such tier, got 'SILVER'; the tiers are FREE, BASIC,"
                " PREMIUM, ENTERPRISE"
            ),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_candidate_has_place_value_and_remedy(
    limit: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "gateway.yaml"
    sections = in_front_of("http://127.0.0.1:9") | {"limits": [{"name": "one", "concurrent": 5} | limit]}
    path.write_text(json.dumps(sections))
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    (problem,) = raised.value.problems
    assert message in problem
