"""Coverage of the gateway processes that tests start, if the coverage of the tests themselves is measured.

A process that ends by a signal or `os._exit` writes no data.
"""

import asyncio
import atexit
import sys
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
VARIABLE = "TESTS_COVERAGE_DATA"


def coverage_variables() -> dict[str, str]:
    """Return the environment for a process, with the path of the data file; empty if the test is not measured."""
    if "coverage" not in sys.modules:
        return {}
    from coverage import Coverage

    measuring = Coverage.current()
    return {VARIABLE: str(ROOT / str(measuring.get_option("run:data_file")))} if measuring else {}


def measure_into(data_file: str | None) -> None:
    """Measure this process until it exits, if there is a data file. pytest-cov combines all data at its end."""
    if not data_file:
        return
    from coverage import Coverage

    measuring = Coverage(
        data_file=data_file,
        data_suffix=True,
        branch=True,
        config_file=False,
        source_pkgs=["api_gateway"],
        messages=False,
    )
    measuring._warn_no_data = measuring._warn_unimported_source = False  # a process that imports no gateway is fine

    def save() -> None:
        measuring.stop()
        measuring.save()

    atexit.register(save)
    measuring.start()


def measure_event_loop_into(data_file: str | None) -> None:
    """Measure this process from the start of its event loop: tracing would double the time that its imports take."""
    run = asyncio.Runner.run

    @wraps(run)
    def measured(self: asyncio.Runner, *arguments: Any, **options: Any) -> Any:
        asyncio.Runner.run = run  # type: ignore[method-assign]  # the first loop is enough
        measure_into(data_file)
        return run(self, *arguments, **options)

    if data_file:
        asyncio.Runner.run = measured  # type: ignore[method-assign]
