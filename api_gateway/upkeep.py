"""Keeps the targets of one upstream up to date: checks their health, and follows the names they come from.

Tells the log what is new, each thing once.
"""

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import partial

from api_gateway.guarded import GuardedTransport
from api_gateway.health import Ask, HealthPolicy, HealthWatch
from api_gateway.models import Clock
from api_gateway.resolution import Answer, Name, Resolve, keep_resolving
from api_gateway.service import Service
from api_gateway.targets import Target
from api_gateway.transport import UpstreamTransport, probe

logger = logging.getLogger(__name__)


class Upkeep:
    """The checks and the names of one upstream. `policy` None means no checks; without `names` nothing is resolved."""

    def __init__(
        self,
        service: Service,
        *,
        policy: HealthPolicy | None = None,
        transport: UpstreamTransport | GuardedTransport | None = None,
        names: Sequence[Name] = (),
        interval: float = 0.0,
        resolve: Resolve,
        clock: Clock,
        source: random.Random,
    ) -> None:
        """`interval` is how often names are resolved, in seconds.

        Checks go through `transport`, where they wait for no connection that live requests hold, and which `close`
        closes; by default through the service's.
        """
        self.names = names
        self._service = service
        self._own = transport
        self._interval = interval
        self._resolve = resolve
        self._clock = clock
        self._source = source
        self._last_errors: dict[Name, str | None] = {}
        self._watch: HealthWatch | None = None
        if policy is not None:
            self._watch = HealthWatch(policy, self._asker, self._on_verdict, clock=clock, source=source)
            self._watch.follow(service.upstream.targets)

    def __repr__(self) -> str:
        return f"<Upkeep of {self._service.upstream.name!r} [{self._watch!r}, {list(self.names)!r}]>"

    async def run(self) -> None:
        """Do it until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._watch is not None:
                group.create_task(self._watch.run())
            group.create_task(
                keep_resolving(
                    self.names,
                    self._interval,
                    self._resolve,
                    self._on_answer,
                    clock=self._clock,
                    source=self._source,
                )
            )

    async def close(self) -> None:
        """Close the connections of the checks."""
        if self._own is not None:
            await self._own.aclose()

    def _asker(self, target: Target) -> Ask:
        if self._own is None:
            return partial(probe, self._service.transport, address=target.address)
        return partial(probe, self._own, address=target.address, keeps_connection=False)  # names come and go

    def _on_verdict(self, target: Target) -> None:
        """Take in that health checks have changed their mind about a target."""
        upstream = self._service.upstream
        if target.is_healthy:
            upstream.rotation.welcome(target, self._clock())
        verdict = "healthy again" if target.is_healthy else "unhealthy"
        logger.warning("upstream %s: target %s is %s: %s", upstream.name, target.url, verdict, target.checks.finding)

    def _on_answer(self, answer: Answer) -> None:
        """Send requests and checks where an answer says."""
        self._log(answer)
        self._last_errors[answer.name] = answer.name.error
        if not answer.is_change:
            self._service.sweep()
            return
        targets = [target for name in self.names for target in name.targets]
        self._service.retarget(targets, self._clock())
        if self._watch is not None:
            self._watch.follow(targets)

    def _log(self, answer: Answer) -> None:
        """Tell what is new in an answer: other addresses, another error, or that there is none any more."""
        upstream, name = self._service.upstream.name, answer.name
        known = ", ".join(name.addresses) or "the name itself"
        if name.error is not None:
            if name.error != self._last_errors.get(name):
                logger.warning(
                    "upstream %s: %s cannot be resolved, %s is kept: %s", upstream, name.host, known, name.error
                )
        elif answer.is_change:
            changes = [*(f"+{address}" for address in answer.came), *(f"-{address}" for address in answer.went)]
            logger.info("upstream %s: %s is %s (%s)", upstream, name.host, known, " ".join(changes))
        elif answer.is_recovered:
            logger.info("upstream %s: %s is resolved again: %s", upstream, name.host, known)
