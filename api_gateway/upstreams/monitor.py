"""Monitors the targets of one upstream: checks their health, and resolves their names. Logs each change once."""

import asyncio
import logging
import random
from collections.abc import Sequence
from functools import partial

from api_gateway.models import Clock
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.probe import probe
from api_gateway.transport.shielded import ShieldedTransport
from api_gateway.upstreams.dns import HostName, Resolution, Resolve, resolve_periodically
from api_gateway.upstreams.health_checks import HealthChecker, HealthPolicy, SendProbe
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream_client import UpstreamClient

logger = logging.getLogger(__name__)


class UpstreamMonitor:
    """Health checks and resolution of one upstream. `policy` None: no checks; without `names`, no resolution.

    States: not started (`change` takes effect at the start), running (within `run`).
    """

    def __init__(
        self,
        upstream_client: UpstreamClient,
        *,
        policy: HealthPolicy | None = None,
        transport: UpstreamTransport | ShieldedTransport | None = None,
        names: Sequence[HostName] = (),
        interval: float = 0.0,
        resolve: Resolve,
        clock: Clock,
        source: random.Random,
    ) -> None:
        """`interval` is the time between resolutions in seconds.

        Checks use `transport`, in which they do not wait for connections of live requests, and which `close` closes;
        by default the transport of the upstream.
        """
        self.names = names
        self.policy = policy
        self._upstream_client = upstream_client
        self._own_transport = transport
        self._interval = interval
        self._group: asyncio.TaskGroup | None = None
        self._checks_task: asyncio.Task[None] | None = None
        self._resolution_task: asyncio.Task[None] | None = None
        self._resolve = resolve
        self._clock = clock
        self._source = source
        self._last_errors: dict[HostName, str | None] = {}
        self._checker: HealthChecker | None = None
        self._set_checker(policy)

    def __repr__(self) -> str:
        return (
            f"<UpstreamMonitor of {self._upstream_client.upstream.name!r} [{self._checker!r}, {list(self.names)!r}]>"
        )

    async def run(self) -> None:
        """Run the checks and the resolution until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._start_checks()
            self._start_resolution()
            await _never()

    def _start_checks(self) -> None:
        """Start the health checks, replacing the previous ones."""
        if self._checks_task is not None:
            self._checks_task.cancel()
        if self._group is not None and self._checker is not None:
            self._checks_task = self._group.create_task(self._checker.run())

    def _start_resolution(self) -> None:
        """Start the resolution of names, replacing the previous one."""
        if self._resolution_task is not None:
            self._resolution_task.cancel()
        if self._group is not None and not all(name.is_address for name in self.names):
            resolving = resolve_periodically(
                self.names, self._interval, self._resolve, self._on_resolution, clock=self._clock, source=self._source
            )
            self._resolution_task = self._group.create_task(resolving)

    def change(
        self,
        upstream_client: UpstreamClient,
        policy: HealthPolicy | None,
        transport: UpstreamTransport | ShieldedTransport | None,
        names: Sequence[HostName],
        interval: float,
    ) -> None:
        """Apply other settings to the current targets of the upstream.

        Unchanged checks continue with their results; without checks every target is healthy.
        """
        is_resolved_alike = (interval, list(names)) == (self._interval, list(self.names))
        is_watched_alike = policy == self.policy and transport is self._own_transport
        self._upstream_client, self.names, self._interval, self._own_transport = (
            upstream_client,
            names,
            interval,
            transport,
        )
        if is_watched_alike:
            self._follow()
        else:
            self._set_checker(policy)
            self._start_checks()
        if not is_resolved_alike:
            self._start_resolution()

    def _set_checker(self, policy: HealthPolicy | None) -> None:
        self.policy = policy
        targets = self._upstream_client.upstream.targets
        if policy is None:
            self._checker = None
            for target in targets:
                target.forget_checks()
            return
        self._checker = HealthChecker(
            policy, self._send_probe, self._on_health_change, clock=self._clock, source=self._source
        )
        self._checker.follow(targets)

    def _follow(self) -> None:
        if self._checker is not None:
            self._checker.follow(self._upstream_client.upstream.targets)

    async def close(self) -> None:
        """Close the transport of the checks, if they have their own."""
        if self._own_transport is not None:
            await self._own_transport.aclose()

    @property
    def transport(self) -> UpstreamTransport | ShieldedTransport | None:
        """The transport of the checks, None if they use the upstream's."""
        return self._own_transport

    def _send_probe(self, target: Target) -> SendProbe:
        return partial(self._probe, target)

    async def _probe(self, target: Target, url: str, seconds: float) -> int:
        """Send one check, with the `Host` that requests have at present; a client's is unknown here."""
        host = self._upstream_client.host_of(target, b"")
        is_own = self._own_transport is not None
        return await probe(
            self._own_transport or self._upstream_client.transport,
            url,
            seconds,
            address=target.address,
            host=host,
            keeps_connection=not is_own,  # addresses change
        )

    def _on_health_change(self, target: Target) -> None:
        """Log that the health of a target has changed; begin its slow start if it is healthy."""
        upstream = self._upstream_client.upstream
        if target.is_healthy:
            upstream.outliers.start_slow_start(target, self._clock())
        health = "healthy again" if target.is_healthy else "unhealthy"
        logger.warning("upstream %s: target %s is %s: %s", upstream.name, target.url, health, target.checks.finding)

    def _on_resolution(self, resolution: Resolution) -> None:
        """Apply the result of a look-up to the upstream and its checks."""
        self._log(resolution)
        self._last_errors[resolution.name] = resolution.name.error
        if not resolution.is_change:
            self._upstream_client.sweep()
            return
        targets = [target for name in self.names for target in name.targets]
        self._upstream_client.set_targets(targets, self._clock())
        if self._checker is not None:
            self._checker.follow(targets)

    def _log(self, resolution: Resolution) -> None:
        """Log what is new: other addresses, another error, or the end of an error."""
        upstream, name = self._upstream_client.upstream.name, resolution.name
        known = ", ".join(name.addresses) or "the name itself"
        if name.error is not None:
            if name.error != self._last_errors.get(name):
                logger.warning(
                    "upstream %s: %s cannot be resolved, keeping %s: %s", upstream, name.host, known, name.error
                )
        elif resolution.is_change:
            changes = [
                *(f"+{address}" for address in resolution.added),
                *(f"-{address}" for address in resolution.removed),
            ]
            logger.info("upstream %s: %s is %s (%s)", upstream, name.host, known, " ".join(changes))
        elif resolution.is_recovered:
            logger.info("upstream %s: %s is resolved again: %s", upstream, name.host, known)


async def _never() -> None:
    await asyncio.get_running_loop().create_future()
