"""An upstream and its targets: choose one that is offered, ask the breakers, and take the result back.

Synchronous and without clock. Nothing here knows HTTP. Who is offered is for `outlier_detection` to say, which of
them for `load_balancing`.
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
    """A good answer whose head was long in coming, for the breaker to hear of at the answer's end."""

    duration: float  # seconds
    route: str
    request_id: str


class Attempt:
    """One try on one target. Settling it gives back the target and tells the breakers; only the first time counts.

    `principal` is on whose behalf it was made; None once it has failed in a way that no client can have caused.

    `ticket` is of the upstream's breaker, `target_ticket` of the target's own; `target_transition` is the move of the
    latter that the last settling caused.
    """

    __slots__ = (
        "_holder",
        "_is_settled",
        "_limit",
        "_target_breaker",
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
        self.principal = principal or ""  # whoever is not known counts as one
        self._holder = principal
        self.target_transition = None
        self._target_breaker = target.breaker  # the one that gave the ticket: the target may get another
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
        """Tell how the try ended. Returns the move of the upstream's breaker, if it caused one."""
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
        """Give the target back, and settle the try unless it is: by default it blames nobody.

        For outcomes that move the breaker, `settle` before.
        """
        if outcome is Outcome.FAILURE:
            self.settle(outcome, now)
        elif not self._is_settled:
            self._is_settled = True
            if self.target_ticket is not None and self.target.breaker is self._target_breaker:
                rotation, targets = self.upstream.outliers, self.upstream.targets
                rotation.settle(targets, self.target, self.target_ticket, outcome, now, principal=self.principal)
            self.upstream.breaker.settle(self.ticket, outcome, now, principal=self.principal)
        self.target.in_flight -= 1
        if self._limit is not None:
            self.release_slot()

    def release_slot(self) -> None:
        """Give back the place below the upstream's limit, once: what has no end of its own does not keep it."""
        limit, self._limit = self._limit, None
        if limit is not None:
            limit.release(self._holder)

    @property
    def is_probe(self) -> bool:
        """Tell whether either breaker waits for the result to know if it may close."""
        return self.ticket.is_probe or (self.target_ticket is not None and self.target_ticket.is_probe)


class Upstream:
    """A named service: its targets and who of them is offered, its breaker, its way to choose, and its limit."""

    def __init__(
        self,
        name: str,
        targets: Sequence[Target],
        breaker: CircuitBreaker,
        picker: Picker,
        *,
        rotation: OutlierDetector | None = None,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.breaker = breaker
        self.outliers = rotation or OutlierDetector()
        self._picker = picker
        self.set_targets(targets, breaker.since)

    def __repr__(self) -> str:
        healthy = sum(target.is_healthy for target in self.targets)
        return f"<Upstream {self.name!r} [{healthy} of {len(self.targets)} healthy, {self.breaker.state}]>"

    def rebalance(self, picker: Picker) -> None:
        """Choose among targets in another way."""
        self._picker = picker

    def set_targets(self, targets: Sequence[Target], now: float) -> None:
        """Offer `targets` from now on. Leases on others run on to their end."""
        self.targets = list(targets)
        self.outliers.set_targets(self.targets, now)

    @property
    def concurrency(self) -> ConcurrencyState:
        """What is under way, and what may be."""
        limit = self.limit
        if limit is not None:
            return ConcurrencyState(limit.limit, limit.in_flight)
        return ConcurrencyState(None, sum(target.in_flight for target in self.targets))

    def accepts_all(self) -> bool:
        """Tell whether `checkout` would give a lease that is no probe of the upstream's breaker."""
        if not self.breaker.is_transparent:
            return False
        for target in self.targets:  # noqa: SIM110 - any() takes five times as long, on every request
            if target.is_healthy:
                return True
        return False

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
        """Return a lease on a healthy target that is not ejected, preferring those not in `tried`.

        `is_safe` is for `admit`, `principal` is on whose behalf the attempt is made and whose share of the limit it
        takes, None if that is not known. Raises NoHealthyUpstream when there is none, Shed when there is no place for
        the band or the principal, CircuitOpen when the breaker does not admit; in this order, so that no probe is
        spent on what does not go.
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
        if ticket.is_probe:  # one at a time: what is on probation itself tells nothing of the upstream
            offered = candidates = [target for target in candidates if is_serving(target)] or candidates
        if self.outliers.abnormal:
            offered = self.outliers.eligible(candidates, tried, now, key, is_safe=is_safe)
        elif tried:
            offered = [target for target in candidates if target not in tried] or candidates
        target = self._picker(offered, key) if len(offered) > 1 else offered[0]
        own = target.breaker
        if limit is not None:
            limit.acquire(priority, principal)
        own_ticket = None if own is None else own.admit(now, is_safe=is_safe)
        return Attempt(self, target, ticket, own_ticket, principal)

    def counts_failures_of(self, target: Target) -> bool:
        """Tell whether what fails at `target` says something of the upstream: not if it is out while others serve."""
        if target in self.targets and is_serving(target):
            return True
        return not any(other is not target and is_serving(other) for other in self.targets)

    def is_recovering(self, now: float) -> bool:
        """Tell whether it is too early for anything but probes, or an operator keeps requests off."""
        mode = self.breaker.mode_at(now)
        return mode is Mode.FORCED_OPEN or (mode is Mode.AUTO and self.breaker.state_at(now) is not State.CLOSED)

    def has_other(self, tried: Collection[Target], now: float) -> bool:
        """Tell whether there is a target that is not in `tried` and would get a request now."""
        others = [target for target in self.targets if target.is_healthy and target not in tried]
        return any(self.outliers.admits(target, now) for target in others)

    def refusal(
        self, now: float, priority: int = 0, *, holder: str | None = None, is_safe: bool = True
    ) -> Unavailable | None:
        """Return what `checkout` would raise now, or None; nothing is taken by that."""
        if not any(target.is_healthy for target in self.targets):
            return self._unhealthy()
        if self.limit is not None and self.limit.is_full_for(priority, holder):
            return self.limit.refusal(self.name, priority, holder)
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
