"""Routes, upstreams and retries: what an exchange needs to know to be forwarded, under one configuration.

`upstreams.upstream` and `circuit_breaker` decide on targets, admission and outcomes; `exchanges` forwards.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

from api_gateway.errors import GatewayError, Unavailable
from api_gateway.models import Clock, Exchange
from api_gateway.proxy.content_cost import ContentCost
from api_gateway.proxy.deadline import Deadline
from api_gateway.proxy.outcome_reporter import OutcomeReporter
from api_gateway.proxy.route_table import RouteTable
from api_gateway.resilience.breaker_history import Transition
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses
from api_gateway.resilience.retry import FailedAttempt, RetryDenied
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Attempt
from api_gateway.upstreams.upstream_client import UpstreamClient

PROBE_SETTLES_AFTER = 5.0  # maximum seconds after which a probe whose response still streams counts as a success


def _ignore(*_: object) -> None:
    """Do nothing; the default of callbacks."""


class Router:
    """The routes and upstreams. Contains only configuration; the state is in the arguments."""

    def __init__(
        self,
        routes: RouteTable,
        upstream_clients: Mapping[str, UpstreamClient],
        *,
        clock: Clock,
        max_body_bytes: int,
        omit: frozenset[bytes] = frozenset(),
        observe_attempt: Callable[[str, str, float | None, float], None],
        on_transition: Callable[[str, Transition], None],
        on_target_transition: Callable[[str, Target, Transition], None] = _ignore,
        on_cost: Callable[[Exchange, Sequence[bytes]], None] | None = None,
        on_content_cost: Callable[[Exchange, ContentCost, float | None, bool], None] | None = None,
        on_retry: Callable[[str, str], None] | None = None,
        on_denial: Callable[[str, str], None] | None = None,
        on_fallback: Callable[[Exchange, GatewayError], None] | None = None,
        priorities: PriorityClasses = SINGLE_PRIORITY,
        lag: EventLoopShedder | None = None,
    ) -> None:
        """Set limits and callbacks.

        `omit` are the response fields, in lower case, that another server adds itself. `on_cost` is called with the
        values of X-Gateway-Cost before a response's head is sent, `on_content_cost` with what a response's content
        states (`ContentScan`) before its end is sent, `on_retry` with upstream and cause of each retry, `on_denial`
        with upstream and reason of each retry that was denied, `on_fallback` with the error before a fallback
        responds. `observe_attempt`, `on_transition` and `on_target_transition`: see `OutcomeReporter`.
        """
        self.routes = routes
        self.upstream_clients = dict(upstream_clients)
        self._clock = clock
        self.max_body_bytes = max_body_bytes
        self.omit = omit
        self.outcomes = OutcomeReporter(
            clock=clock,
            observe_attempt=observe_attempt,
            on_transition=on_transition,
            on_target_transition=on_target_transition,
        )
        self.on_cost = on_cost or _ignore
        self.on_content_cost = on_content_cost or _ignore
        for route in routes:
            if not route.is_simple:  # an exchange looks at routes of such upstreams only
                for name in route.upstreams:
                    self.upstream_clients[name].is_simple = False
        self.on_retry, self.on_denial = on_retry or _ignore, on_denial or _ignore
        self.on_fallback = on_fallback or _ignore
        self.priorities = priorities
        self._event_loop_shedder = lag or EventLoopShedder(None, source=random.Random())  # noqa: S311 - spreads load, guards nothing

    def next_attempt(
        self,
        upstream_client: UpstreamClient,
        key: str,
        tried: Sequence[Target],
        *,
        is_safe: bool,
        principal: str | None,
    ) -> Attempt | None:
        """Acquire a target for a retry; None if there is none, or while the upstream recovers: no retry is a probe.

        A retry has the lowest priority, so that it is shed before any first attempt. For the arguments see
        `Upstream.acquire`.
        """
        if self.is_recovering(upstream_client):
            return None
        try:
            return upstream_client.upstream.acquire(
                self._clock(), key, tried, priority=0, is_safe=is_safe, principal=principal
            )
        except Unavailable:
            return None

    def is_recovering(self, upstream_client: UpstreamClient) -> bool:
        """Return whether retries are denied: the event loop is overloaded, or the upstream's breaker recovers."""
        return self._event_loop_shedder.is_over or upstream_client.upstream.is_recovering(self._clock())

    def retry_delay(
        self,
        upstream_client: UpstreamClient,
        attempt: Attempt,
        tried: Sequence[Target],
        *,
        is_sent: bool,
        is_repeatable: bool,
        is_replayable: bool,
        retry_after: float | None,
        deadline: Deadline | None,
    ) -> float | None:
        """Return the seconds before a retry, which is withdrawn from the budget, or None if it is denied.

        `tried` are the targets of the attempts, this one included; for the other arguments see `FailedAttempt`.
        """
        now = self._clock()
        failed = FailedAttempt(
            attempts=len(tried),
            is_sent=is_sent,
            is_repeatable=is_repeatable,
            is_replayable=is_replayable,
            is_recovering=attempt.ticket.is_probe or self.is_recovering(upstream_client),
            is_elsewhere=attempt.upstream.has_other(tried, now),
            retry_after=retry_after,
            left=None if deadline is None else deadline.remaining(now),
        )
        decision = upstream_client.retries.decide(failed, now)
        if isinstance(decision, RetryDenied):
            self.on_denial(attempt.upstream.name, decision)
            return None
        return decision

    def settle_probe_soon(self, attempt: Attempt, loop: asyncio.AbstractEventLoop) -> asyncio.TimerHandle:
        """Schedule a success for a probe whose response has begun: one not settled in time loses its permit."""
        seconds = min(PROBE_SETTLES_AFTER, attempt.upstream.breaker.policy.recovery_timeout / 2)
        return loop.call_later(seconds, self.outcomes.settle_success, attempt)
