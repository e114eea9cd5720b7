"""An upstream and its targets: admission, selection of a target, and recording of outcomes.

Synchronous and without a clock; independent of HTTP. `outlier_detection` determines the eligible targets and
`load_balancing` selects one of them.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from api_gateway.circuit_breaker import CircuitBreaker, Ticket
from api_gateway.errors import CircuitOpen, NoHealthyUpstream, Unavailable
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_history import Transition
from api_gateway.resilience.breaker_policy import Mode, State
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit, ConcurrencyState
from api_gateway.upstreams.load_balancing import Picker
from api_gateway.upstreams.outlier_detection import OutlierDetector, is_serving
from api_gateway.upstreams.target import Target


class SlowResponse(NamedTuple):
    """A successful response with a slow head, to be recorded in the breakers at the end of the response."""

    duration: float  # seconds
    route: str
    request_id: str


class Attempt:
    """One attempt on one target, from `Upstream.acquire` to `release`.

    States: open, settled (the outcome is recorded; later outcomes are ignored), released. `release` settles an open
    one and must be called exactly once.

    `principal` is the one to which a failure is attributed; None if no client can have caused it. `ticket` is of the
    upstream's breaker, `target_ticket` of the target's; `target_transition` is the transition of the latter that the
    last `settle` caused.
    """

    __slots__ = (
        "_is_settled",
        "_limit",
        "_slot_of",
        "_target_breaker",
        "is_probe",
        "principal",
        "slow",
        "target",
        "target_ticket",
        "target_transition",
        "ticket",
        "upstream",
    )

    target_transition: Transition | None
    principal: str | None

    def __init__(
        self,
        upstream: "Upstream",
        target: Target,
        ticket: Ticket,
        target_ticket: Ticket | None = None,
        principal: str | None = None,
    ) -> None:
        self.upstream = upstream
        self.target = target
        self.ticket = ticket
        self.target_ticket = target_ticket
        self.is_probe = ticket.is_probe or (target_ticket is not None and target_ticket.is_probe)  # of either breaker
        self.principal = principal or ""  # all unknown principals count as one
        self._slot_of = principal  # whose slot in the concurrency limit it has
        self.target_transition = None
        self._target_breaker = target.breaker  # the one that issued the ticket; the target may get another
        self.slow: SlowResponse | None = None
        self._is_settled = False
        self._limit = upstream.limit
        target.in_flight += 1

    def settle(
        self,
        outcome: Outcome,
        now: float,
        detail: str = "",
        *,
        duration: float | None = None,
        route: str = "",
        request_id: str = "",
    ) -> Transition | None:
        """Record the outcome; only the first counts. Return the transition of the upstream's breaker, or None."""
        if self._is_settled:
            self.target_transition = None
            return None
        self._is_settled = True
        if self.slow is not None and duration is None:
            duration, route, request_id = self.slow
        upstream, target = self.upstream, self.target
        if self.target_ticket is not None and target.breaker is self._target_breaker:
            self.target_transition = upstream.outliers.settle(
                upstream.targets,
                target,
                self.target_ticket,
                outcome,
                now,
                detail,
                duration=duration,
                route=route,
                request_id=request_id,
                principal=self.principal,
            )
        is_bad = outcome is Outcome.FAILURE or (duration is not None and duration >= upstream.breaker.slow_after)
        if is_bad and not upstream.counts_failures_of(target):
            outcome = Outcome.IGNORED
        return upstream.breaker.settle(
            self.ticket,
            outcome,
            now,
            detail,
            duration=duration,
            route=route,
            request_id=request_id,
            principal=self.principal,
        )

    def release(self, now: float, outcome: Outcome = Outcome.IGNORED) -> None:
        """End the attempt, and settle it if it is open, by default as IGNORED.

        Call `settle` before if the transition that the outcome may cause is needed.
        """
        if outcome is Outcome.FAILURE:
            self.settle(outcome, now)
        elif not self._is_settled:
            self._is_settled = True
            if self.target_ticket is not None and self.target.breaker is self._target_breaker:
                outliers, targets = self.upstream.outliers, self.upstream.targets
                outliers.settle(targets, self.target, self.target_ticket, outcome, now, principal=self.principal)
            self.upstream.breaker.settle(self.ticket, outcome, now, principal=self.principal)
        self.target.in_flight -= 1
        limit = self._limit
        if limit is not None:  # `release_slot`, inlined
            self._limit = None
            limit.release(self._slot_of)

    def release_slot(self) -> None:
        """Release the slot in the concurrency limit, once. Called early for tunnels, which must not occupy it."""
        limit, self._limit = self._limit, None
        if limit is not None:
            limit.release(self._slot_of)


class Upstream:
    """An upstream: its targets, outlier detection, circuit breaker, load balancing and concurrency limit."""

    __slots__ = (
        "_picker",
        "breaker",
        "limit",
        "name",
        "outliers",
        "targets",
    )

    def __init__(
        self,
        name: str,
        targets: Sequence[Target],
        breaker: CircuitBreaker,
        picker: Picker,
        *,
        outliers: OutlierDetector | None = None,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.breaker = breaker
        self.outliers = outliers or OutlierDetector()
        self._picker = picker
        self.set_targets(targets, breaker.since)

    def __repr__(self) -> str:
        healthy = sum(target.is_healthy for target in self.targets)
        return f"<Upstream {self.name!r} [{healthy} of {len(self.targets)} healthy, {self.breaker.state}]>"

    def rebalance(self, picker: Picker) -> None:
        """Set another load balancing policy."""
        self._picker = picker

    def set_targets(self, targets: Sequence[Target], now: float) -> None:
        """Set the targets. Attempts on others continue to their end."""
        self.targets = list(targets)
        self.outliers.set_targets(self.targets, now)

    @property
    def concurrency(self) -> ConcurrencyState:
        """Requests in flight, and the limit if there is one."""
        limit = self.limit
        if limit is not None:
            return ConcurrencyState(limit.limit, limit.in_flight)
        return ConcurrencyState(None, sum(target.in_flight for target in self.targets))

    def acquire(
        self,
        now: float,
        key: str,
        tried: Collection[Target] = (),
        *,
        priority: int = 0,
        is_safe: bool = True,
        principal: str | None = None,
    ) -> Attempt:
        """Return an attempt on a healthy target that is not ejected, preferably one not in `tried`.

        For `is_safe` see `CircuitBreaker.admit`. `principal` is the client or address that the attempt and its slot in
        the limit are attributed to, None if unknown. Raises NoHealthyUpstream; LoadShed if the limit has no slot for
        the priority or the principal; CircuitOpen if the breaker rejects. In this order, so that no probe is wasted.
        """
        candidates = self.targets
        if len(candidates) > 1 or not candidates[0].is_healthy:
            candidates = [target for target in candidates if target.is_healthy]
        if not candidates:
            raise self._unhealthy()
        limit = self.limit
        if limit is not None and not limit.admits(priority, principal):
            raise limit.refusal(self.name, priority, principal)
        ticket = self.breaker.admit(now, is_safe=is_safe, principal=principal)
        if ticket is None:
            raise self._refusal(now)
        offered: Sequence[Target] = candidates
        if ticket.is_probe:
            offered = candidates = self._probe_candidates(candidates, now, is_safe=is_safe, principal=principal)
        if self.outliers.abnormal:
            offered = self.outliers.eligible(candidates, tried, now, key, is_safe=is_safe, principal=principal)
        elif tried:
            offered = [target for target in candidates if target not in tried] or candidates
        target = self._picker(offered, key) if len(offered) > 1 else offered[0]
        own = target.breaker
        if limit is not None:
            limit.acquire(priority, principal)
        own_ticket = None if own is None else own.admit(now, is_safe=is_safe, principal=principal)
        return Attempt(self, target, ticket, own_ticket, principal)

    def _probe_candidates(
        self, healthy: list[Target], now: float, *, is_safe: bool, principal: str | None
    ) -> list[Target]:
        """Return the targets that may get a probe of the upstream's breaker.

        Those in service, because a target that is itself probing says nothing about the upstream. But after a failed
        probe, an ejected target whose own probe is due: while this breaker is not CLOSED, it gets no other request, so
        it could not return, and the upstream could not recover if only its last target in service is broken.
        """
        opened = self.breaker.last_opened
        if opened is not None and opened.source is State.HALF_OPEN:
            ejected = [target for target in healthy if not is_serving(target)]
            due = [one for one in ejected if self.outliers.admits(one, now, is_safe=is_safe, principal=principal)]
            if due:
                return due
        return [target for target in healthy if is_serving(target)] or healthy

    def counts_failures_of(self, target: Target) -> bool:
        """Return whether failures at `target` count for the upstream: not if it is ejected while others serve."""
        if target in self.targets and is_serving(target):
            return True
        return not any(other is not target and is_serving(other) for other in self.targets)

    def is_recovering(self, now: float) -> bool:
        """Return whether only probes are admitted, or an operator has forced the breaker open."""
        mode = self.breaker.mode_at(now)
        return mode is Mode.FORCED_OPEN or (mode is Mode.AUTO and self.breaker.state_at(now) is not State.CLOSED)

    def has_other(self, tried: Collection[Target], now: float) -> bool:
        """Return whether a target that is not in `tried` would get a request now."""
        others = [target for target in self.targets if target.is_healthy and target not in tried]
        return any(self.outliers.admits(target, now) for target in others)

    def refusal(
        self, now: float, priority: int = 0, *, principal: str | None = None, is_safe: bool = True
    ) -> Unavailable | None:
        """Return the error that `acquire` would raise now, or None; acquires nothing."""
        if not any(target.is_healthy for target in self.targets):
            return self._unhealthy()
        if self.limit is not None and self.limit.is_full_for(priority, principal):
            return self.limit.refusal(self.name, priority, principal)
        return None if self.breaker.would_admit(now, is_safe=is_safe) else self._refusal(now)

    def _unhealthy(self) -> NoHealthyUpstream:
        return NoHealthyUpstream(
            f"Upstream '{self.name}' has no healthy target: all {len(self.targets)} fail their health checks.",
            retry_after=1,
            extra={"upstream": self.name},
        )

    def _refusal(self, now: float) -> CircuitOpen:
        breaker = self.breaker
        return CircuitOpen(
            f"The circuit breaker of upstream '{self.name}' is {breaker.refusal_reason(now)}",
            retry_after=max(breaker.retry_after(now), 1.0),
            extra={"upstream": self.name, "circuit_breaker": breaker.state.value},
        )
