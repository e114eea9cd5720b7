"""Active health checks: a task for each target requests its health path; consecutive results set its health.

Changes nothing but the health and the check record of targets. The function that sends a check is passed in.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from api_gateway.transport.local_resources import LocalResourcesExhausted
from api_gateway.upstreams.target import Target

logger = logging.getLogger(__name__)

SendProbe = Callable[[str, float], Awaitable[int]]  # (url, timeout in seconds) -> HTTP status; raises on any failure

_JITTER = 0.1  # share of the interval by which checks are spread


@dataclass(frozen=True, slots=True)
class HealthPolicy:
    """Path and interval of checks, and how many consecutive results change the health; durations in seconds.

    A check succeeds if its status is within one of `statuses`.
    """

    path: str
    interval: float
    timeout: float
    healthy_threshold: int
    unhealthy_threshold: int
    statuses: tuple[range, ...]


class HealthThreshold:
    """Sets the health of a target: it changes after enough consecutive contrary results.

    States: healthy, unhealthy (`Target.is_healthy`), each with the number of consecutive contrary results.
    """

    def __init__(self, policy: HealthPolicy, target: Target) -> None:
        self._policy = policy
        self._target = target
        self._contrary = 0

    def __repr__(self) -> str:
        health = "healthy" if self._target.is_healthy else "unhealthy"
        return f"<HealthThreshold [{health}, {self._contrary} contrary in a row]>"

    def observe(self, *, is_good: bool, finding: str, now: float, seconds: float | None = None) -> bool:
        """Record one result, described by `finding`, of a check of `seconds`. Return whether the health changed."""
        self._target.checks.note(now, is_good=is_good, finding=finding, seconds=seconds)
        if is_good == self._target.is_healthy:
            self._contrary = 0
            return False
        self._contrary += 1
        needed = self._policy.healthy_threshold if is_good else self._policy.unhealthy_threshold
        if self._contrary < needed:
            return False
        self._target.is_healthy = is_good
        self._contrary = 0
        return True


async def check(
    judge: HealthThreshold, policy: HealthPolicy, url: str, send_probe: SendProbe, clock: Callable[[], float]
) -> bool:
    """Check a target once and record the result in `judge`. Return whether the health changed.

    A check that fails because this process lacks a descriptor or a port is not recorded.
    """
    is_good, began = False, clock()
    try:
        async with asyncio.timeout(policy.timeout):
            status = await send_probe(url + policy.path, policy.timeout)
    except TimeoutError:
        finding = f"no response within {policy.timeout:g} s"
    except LocalResourcesExhausted as error:
        logger.debug("health check of %s not made: %s", url, error)
        return False
    except Exception as error:  # noqa: BLE001 - any error is the finding; cancellation is not an Exception
        finding = str(error) or type(error).__name__
    else:
        is_good, finding = any(status in good for good in policy.statuses), f"status {status}"
    now = clock()
    return judge.observe(is_good=is_good, finding=finding, now=now, seconds=now - began)


class HealthChecker:
    """Checks the targets of one upstream, each in its own task, so that a slow target does not delay others.

    `probe_sender` returns the function that sends a check to a target. The first check of each target is at a random
    time in the first interval, so that targets, workers and gateways that start together do not check together.
    """

    def __init__(
        self,
        policy: HealthPolicy,
        probe_sender: Callable[[Target], SendProbe],
        on_change: Callable[[Target], None],
        *,
        clock: Callable[[], float],
        source: random.Random,
    ) -> None:
        self._policy = policy
        self._probe_sender = probe_sender
        self._on_change = on_change
        self._clock = clock
        self._source = source
        self._tasks: dict[Target, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None
        self._targets: Sequence[Target] = ()

    def __repr__(self) -> str:
        return f"<HealthChecker [{len(self._tasks)} targets]>"

    async def run(self) -> None:
        """Check the targets that `follow` has set, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self.follow(self._targets)
            await _never()

    def follow(self, targets: Sequence[Target]) -> None:
        """Set the targets to check."""
        self._targets = targets
        if self._group is None:
            return
        for target in [target for target in self._tasks if target not in targets]:
            self._tasks.pop(target).cancel()
        for target in targets:
            if target not in self._tasks:
                self._tasks[target] = self._group.create_task(self._check_periodically(target))

    async def _check_periodically(self, target: Target) -> None:
        policy, source = self._policy, self._source
        judge, send_probe, url = (
            HealthThreshold(policy, target),
            self._probe_sender(target),
            target.named or target.url,
        )
        await asyncio.sleep(policy.interval * source.random())
        while True:
            if await check(judge, policy, url, send_probe, self._clock):
                self._on_change(target)
            await asyncio.sleep(policy.interval * source.uniform(1 - _JITTER, 1 + _JITTER))


async def _never() -> None:
    await asyncio.get_running_loop().create_future()
