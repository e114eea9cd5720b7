"""An upstream with what is needed to send to it: its transport, its time limits and its retries."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from api_gateway.balancer import Target, Upstream
from api_gateway.connection import Connection
from api_gateway.outgoing import Origin
from api_gateway.retry import Retries, RetryPolicy
from api_gateway.transport import UpstreamTransport


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; `total` None is no limit."""

    connect: float
    response: float
    idle: float
    total: float | None
    tunnel: float = 3600.0  # without a byte in either direction, once protocols were switched


class Service:
    """An upstream with what is needed to send to it. `retry` is one try and no other by default."""

    def __init__(
        self,
        upstream: Upstream,
        transport: httpx.AsyncBaseTransport,
        timeouts: Timeouts,
        *,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - it is frozen
        source: random.Random | None = None,
    ) -> None:
        self.upstream = upstream
        self.transport = transport
        self.total_timeout = timeouts.total
        self.retries = Retries(retry, source or random.Random())  # noqa: S311 - spreads load, guards nothing
        self.retry_budget = self.retries.budget
        self.retried_statuses = retry.statuses if retry.attempts > 1 and retry.budget > 0 else frozenset()
        self.origins = {target: Origin.of(httpx.URL(target.url)) for target in upstream.targets}
        self.speaks_pairs = isinstance(transport, UpstreamTransport)
        self.takes_passages = self.speaks_pairs and timeouts.total is None
        self._take_idle: dict[Target, Callable[[], Connection | None]] = {}
        self.tunnel_timeout = timeouts.tunnel
        self.limits = {
            "connect": timeouts.connect,
            "pool": timeouts.connect,
            "read": timeouts.response,
            "write": timeouts.idle,
            "idle": timeouts.idle,
        }

    def __repr__(self) -> str:
        return f"<Service {self.upstream!r}>"

    def idle_connection(self, target: Target) -> Connection | None:
        """Take a connection of our own transport to `target`, if one is free."""
        take = self._take_idle.get(target)
        if take is None:
            assert isinstance(self.transport, UpstreamTransport)  # noqa: S101 - no other takes passages
            take = self._take_idle[target] = self.transport.pool(self.origins[target]).take_idle
        return take()
