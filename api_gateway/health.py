"""Active health checks: one task a target asks its health path and judges by consecutive results.

Writes a target's health and nothing else. How a target is asked is handed in as a function.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from api_gateway.balancer import Target

Ask = Callable[[str, float], Awaitable[int]]  # (url, timeout in seconds) -> HTTP status; raises on any failure

_JITTER = 0.1  # share of the interval by which checks spread out


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """Where and how often to ask, and how many equal results in a row change the verdict; durations in seconds."""

    path: str
    interval: float = 5.0
    timeout: float = 2.0
    healthy_after: int = 2
    unhealthy_after: int = 3


class HealthJudge:
    """Turns single results into a verdict: it changes after enough contrary ones in a row."""

    def __init__(self, policy: HealthPolicy, target: Target) -> None:
        self._policy = policy
        self._target = target
        self._contrary = 0

    def __repr__(self) -> str:
        verdict = "healthy" if self._target.is_healthy else "unhealthy"
        return f"<HealthJudge [{verdict}, {self._contrary} contrary in a row]>"

    def observe(self, *, is_good: bool, finding: str) -> bool:
        """Take in one result; `finding` says it in words. Returns whether the verdict changed."""
        self._target.is_checked = True
        self._target.last_check = finding
        if is_good == self._target.is_healthy:
            self._contrary = 0
            return False
        self._contrary += 1
        needed = self._policy.healthy_after if is_good else self._policy.unhealthy_after
        if self._contrary < needed:
            return False
        self._target.is_healthy = is_good
        self._contrary = 0
        return True


async def check(judge: HealthJudge, policy: HealthPolicy, url: str, ask: Ask) -> bool:
    """Ask once and let `judge` take in the result. Returns whether the verdict changed."""
    try:
        async with asyncio.timeout(policy.timeout):
            status = await ask(url + policy.path, policy.timeout)
    except TimeoutError:
        return judge.observe(is_good=False, finding=f"no answer within {policy.timeout:g} s")
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding; cancellation is no Exception
        return judge.observe(is_good=False, finding=str(error) or type(error).__name__)
    is_good = 200 <= status < 400  # noqa: PLR2004 - the classes of success and redirection
    return judge.observe(is_good=is_good, finding=f"status {status}")


async def watch(
    targets: Sequence[Target],
    policy: HealthPolicy,
    ask: Ask,
    on_change: Callable[[Target], None],
    source: random.Random,
) -> None:
    """Check every target until cancelled, each by itself so that a slow one delays no other."""
    async with asyncio.TaskGroup() as group:
        for target in targets:
            group.create_task(_watch_one(target, policy, ask, on_change, source))


async def _watch_one(
    target: Target, policy: HealthPolicy, ask: Ask, on_change: Callable[[Target], None], source: random.Random
) -> None:
    judge = HealthJudge(policy, target)
    while True:
        if await check(judge, policy, target.url, ask):
            on_change(target)
        await asyncio.sleep(policy.interval * source.uniform(1 - _JITTER, 1 + _JITTER))
