"""The list of mutations does not become outdated; `python -m tests.mutations` runs it."""

import re
from collections import Counter
from pathlib import Path

from tests.cases import each
from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
LEAST = 30


@each("mutant", MUTANTS, ids=[f"{one.file}-{index}" for index, one in enumerate(MUTANTS)])
def test_each_mutation_changes_one_place_and_names_tests_that_exist(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text()
        assert not name or re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), test


def test_the_list_covers_the_code_that_limits() -> None:
    files = Counter(one.file for one in MUTANTS)
    assert len(MUTANTS) == len(set(MUTANTS)) >= LEAST
    assert files["api_gateway/rate_limiter.py"] >= 10
    assert files["api_gateway/limits/token_bucket.lua"] >= 10
    assert {"api_gateway/proxy/limit_stage.py", "api_gateway/proxy/cost_settlement.py"} <= files.keys()
    accounted = ("replay/simulation.py", "usage/counts.py", "limits/periods.py", "proxy/content_cost.py")
    assert {f"api_gateway/{file}" for file in accounted} <= files.keys()
