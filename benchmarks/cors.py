"""What CORS costs a request of a page, with a gateway that has a policy beside one that has none.

`python -m benchmarks.cors` measures the steps of a request within one process: see `benchmarks.steps`. `--processes`
runs gateways on one core; upstream (nginx) and load use the other. They run at the same time and are driven in turns,
so that ratios hold on a machine that is not idle. `--before` is a checkout of another commit, whose gateway is
measured too. Two processes of the same code differ by up to two microseconds a request.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.api_keys import LOAD_CORE, ROOT, gateway
from benchmarks.cases import CLIENT, ORIGIN, Case
from benchmarks.claims import Claim, print_costs
from benchmarks.load import alternating_costs
from benchmarks.steps import alternating_steps, head_of
from benchmarks.upstream import upstream

POLICY: dict[str, Any] = {"origins": [ORIGIN], "credentials": True}
ROUTES: dict[str, Any] = {
    "routes": [
        {"name": "all", "path": "/api", "upstream": "up"},
        {"name": "pages", "path": "/api/small/pages", "upstream": "up", "cors": POLICY},
    ]
}
_COPIES = 3  # of each gateway
PAGE, PLAIN = "with Origin", "without Origin"
OTHER = ", route without a policy"
CLAIMS = [
    *(
        Claim(f"CORS, a request {case}, in one process", f"{case}: policy", f"{case}{OTHER}: policy", 1.0)
        for case in (PAGE, PLAIN)
    ),
    *(Claim(f"CORS, a request {case}", f"{case}: policy", f"{case}: no policy", 1.0) for case in (PAGE, PLAIN)),
]


PAGE_FIELDS = {"Origin": ORIGIN}
CASES = {PAGE: Case(PAGE, "small/pages", headers=PAGE_FIELDS), PLAIN: Case(PLAIN, "small/pages")}
OTHERS = {PAGE + OTHER: Case(PAGE, "small/other", headers=PAGE_FIELDS), PLAIN + OTHER: Case(PLAIN, "small/other")}


def steps(rounds: int) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds within one process, by what was measured. Raises Failed."""
    two = {"routes": [{name: route[name] for name in route if name != "cors"} for route in ROUTES["routes"]]}
    heads = {name: [head_of(case.path, {"X-Client-ID": CLIENT, **case.headers})] for name, case in CASES.items()}
    heads |= {name: [head_of(case.path, {"X-Client-ID": CLIENT, **case.headers})] for name, case in OTHERS.items()}
    runs = [(name, case) for case in CASES for name in ("no policy", "policy")] + [("policy", case) for case in OTHERS]
    with tempfile.TemporaryDirectory() as folder:
        return alternating_steps({"no policy": two, "policy": ROUTES}, heads, runs, Path(folder), rounds, _COPIES)


def measure(seconds: float, rounds: int, before: Path | None) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds, by what was measured, in each round. Raises Failed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "origin").mkdir()
        origin = stack.enter_context(upstream(folder / "origin", LOAD_CORE))
        gateways = {
            "no policy": stack.enter_context(gateway(ROOT, folder / "without", origin, None)),
            "policy": stack.enter_context(gateway(ROOT, folder / "with", origin, None, ROUTES)),
        }
        if before is not None:
            gateways["before"] = stack.enter_context(gateway(before, folder / "before", origin, None))
        runs = [(name, case) for case in CASES for name in gateways] + [("policy", case) for case in OTHERS]
        return alternating_costs(gateways, CASES | OTHERS, runs, core=LOAD_CORE, seconds=seconds, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table and the claims."""
    return print_costs("benchmarks.cors", __doc__, measure, CLAIMS, arguments, steps=steps)


if __name__ == "__main__":
    sys.exit(main())
