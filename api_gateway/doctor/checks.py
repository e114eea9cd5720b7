"""The results of checks, and their execution: concurrently, each with a timeout."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from api_gateway.doctor.options import CHECK_TIMEOUT
from api_gateway.printable_text import printable


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"  # works now, and may not later
    FAILED = "failed"  # a start or a request fails


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of a check about one thing, and its remedy in one sentence."""

    about: str
    level: Level
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        end = f". {self.remedy}" if self.remedy else ""
        return printable(f"{self.level:<8} {self.about}: {self.detail}{end}")


def good(about: str, detail: str) -> CheckResult:
    """Return the result of a check without a fault."""
    return CheckResult(about, Level.OK, detail)


def doubtful(about: str, detail: str, remedy: str) -> CheckResult:
    """Return the result for what works now and may fail later, with its remedy."""
    return CheckResult(about, Level.WARNING, detail, remedy)


def broken(about: str, detail: str, remedy: str) -> CheckResult:
    """Return the result for what makes a start or a request fail, with its remedy."""
    return CheckResult(about, Level.FAILED, detail, remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """A check of `about`; `run` may wait. One that blocks is made by `blocking`."""

    about: str
    run: Callable[[], Awaitable[Iterable[CheckResult]]]


def blocking(about: str, run: Callable[[], Iterable[CheckResult]]) -> Check:
    """Return a check whose function blocks; it runs in a thread."""
    return Check(about, lambda: asyncio.to_thread(lambda: list(run())))


async def run_checks(checks: Sequence[Check], seconds: float = CHECK_TIMEOUT) -> list[CheckResult]:
    """Run all checks side by side; return their results in the order of the checks."""
    found = await asyncio.gather(*(_run(check, seconds) for check in checks))
    return [result for results in found for result in results]


async def _run(check: Check, seconds: float) -> list[CheckResult]:
    try:
        async with asyncio.timeout(seconds):
            return list(await check.run())
    except TimeoutError:
        remedy = "Find out what does not respond, and run this again."
        return [broken(check.about, f"not done within {seconds:g} s", remedy)]
    except Exception as error:  # noqa: BLE001 - the outermost step of a check: a fault of one must not hide the others
        remedy = "Report it with the output of api-gateway config show."
        return [broken(check.about, f"the check itself failed: {type(error).__name__}", remedy)]
