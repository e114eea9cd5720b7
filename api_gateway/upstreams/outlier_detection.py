"""Outlier detection: ejects targets of an upstream that fail live requests, and lets them return by slow start.

A target whose own breaker is OPEN is ejected: it gets no requests while another target can serve them.
Synchronous, without a clock; `now` (monotonic seconds) and the random source are passed in.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from api_gateway.circuit_breaker import CircuitBreaker, Ticket
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_history import Transition
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.upstreams.load_balancing import share_of_key
from api_gateway.upstreams.target import Target

Draw = Callable[[Target, str], float]  # a number from 0 to 1, random or derived from the key


def _ignore(_target: Target, _transition: Transition) -> None:
    pass


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """The largest share of ejected targets of an upstream, and the duration of slow start in seconds."""

    max_ejected_ratio: float = 0.5
    slow_start: float = 10.0


class OutlierDetector:
    """Selects eligible targets and updates their breakers. `abnormal` has those in another state than normal.

    States of a target, by its breaker: normal (CLOSED), ejected (OPEN), probing (HALF_OPEN), and after CLOSED again
    slow start, while `returned_at` is set. Without a breaker a target is never ejected.

    Load balancing may never select a given target, so no state depends on it: a target that awaits a probe gets the
    next request that may be one. If no such request comes, the target returns by time alone, because an ejected target
    prevents the ejection of others.
    """

    __slots__ = (
        "_draw",
        "_make_breaker",
        "_on_unprobed_return",
        "abnormal",
        "policy",
    )

    def __init__(
        self,
        policy: OutlierPolicy = OutlierPolicy(),
        *,
        draw: Draw = share_of_key,
        make_breaker: Callable[[float], CircuitBreaker] | None = None,
        on_unprobed_return: Callable[[Target, Transition], None] = _ignore,
    ) -> None:
        """`make_breaker` creates the breaker of a target; without it no target has one, and none is ejected.

        `on_unprobed_return` is called when a target returns by time alone: `settle` has no transition to return then.
        """
        self.policy = policy
        self.abnormal: set[Target] = set()
        self._draw = draw
        self._make_breaker = make_breaker
        self._on_unprobed_return = on_unprobed_return

    def change(
        self,
        policy: OutlierPolicy,
        draw: Draw,
        make_breaker: Callable[[float], CircuitBreaker] | None,
        breaker_policy: BreakerPolicy,
        targets: Iterable[Target],
        now: float,
    ) -> None:
        """Apply other settings. Breakers are kept with `breaker_policy`; without `make_breaker` they are removed."""
        self.policy, self._draw, self._make_breaker = policy, draw, make_breaker
        for target in targets:
            if make_breaker is None:
                target.breaker = None
            elif target.breaker is not None:
                target.breaker.change_policy(breaker_policy, now)

    def __repr__(self) -> str:
        return f"<OutlierDetector [{len(self.abnormal)} abnormal]>"

    def eligible(
        self,
        healthy: Sequence[Target],
        tried: Collection[Target],
        now: float,
        key: str,
        *,
        is_safe: bool = True,
        principal: str | None = None,
    ) -> Sequence[Target]:
        """Return the healthy targets that may get this request: at least one.

        Those that await a probe, unless the request is a retry; else all, preferably those not in `tried`. If all are
        ejected, ejection is ignored. For `is_safe` and `principal` see `CircuitBreaker.admit`.
        """
        self.advance(now)
        self._note_request(now, is_safe=is_safe, principal=principal)
        admitting = [
            target for target in healthy if self.admits(target, now, is_safe=is_safe, principal=principal)
        ] or healthy
        due = () if tried else [target for target in admitting if _is_ejected(target)]
        if due:
            return due
        fresh = [target for target in admitting if target not in tried] or admitting
        return [target for target in fresh if self._passes_slow_start(target, now, key)] or fresh

    def settle(
        self,
        targets: Sequence[Target],
        target: Target,
        ticket: Ticket,
        outcome: Outcome,
        now: float,
        detail: str = "",
        *,
        duration: float | None = None,
        route: str = "",
        request_id: str = "",
        principal: str | None = "",
    ) -> Transition | None:
        """Record the outcome of an attempt in the breaker of its target; see `CircuitBreaker.settle`.

        Returns the transition that it caused, or None. A bad call on a target that must not be ejected counts as
        IGNORED and in `withheld`.
        """
        breaker = target.breaker
        assert breaker is not None  # noqa: S101 - it issued the ticket
        is_slow = outcome is Outcome.SUCCESS and duration is not None and duration >= breaker.slow_after
        may_move = outcome is Outcome.FAILURE or is_slow
        if may_move and breaker.state is not State.OPEN and not self.may_eject(targets, target):
            target.withheld += 1
            outcome = Outcome.IGNORED
        elif outcome is not Outcome.IGNORED:
            target.withheld = 0
        transition = breaker.settle(
            ticket,
            outcome,
            now,
            detail,
            duration=duration,
            route=route,
            request_id=request_id,
            principal=principal,
        )
        if transition is None or target not in targets:  # a removed target has no state here
            return None
        self._note_transition(target, transition)
        return transition

    def may_eject(self, targets: Sequence[Target], target: Target) -> bool:
        """Return whether `target` may be ejected: others can serve, and the share of ejected targets permits it.

        A HALF_OPEN target counts as ejected already, so that its probe may fail.
        """
        out, serving = 1, False
        for other in targets:
            if other is target:
                continue
            if _is_ejected(other):
                out += 1
            elif other.is_healthy:
                serving = True
        return serving and out <= self._max_out(targets)

    def is_ejected(self, targets: Sequence[Target], target: Target, now: float) -> bool:
        """Return whether `target` gets no requests because of its breaker."""
        if target.breaker is None or target.breaker.state_at(now) is not State.OPEN:
            return False
        return any(other.is_healthy and self.admits(other, now) for other in targets)

    def share(self, target: Target, now: float) -> float:
        """Return the share of requests for which a target is a candidate, 0 to 1: below 1 during slow start."""
        if target.returned_at is None or now - target.returned_at >= self.policy.slow_start:
            return 1.0
        return max(0.0, now - target.returned_at) / self.policy.slow_start

    def start_slow_start(self, target: Target, now: float) -> None:
        """Begin the slow start of a target that returns to service."""
        if self.policy.slow_start > 0:
            target.returned_at = now
            self.abnormal.add(target)

    def set_targets(self, targets: Sequence[Target], now: float) -> None:
        """Set the targets: create breakers of new ones, and return those to service that exceed the ejected share."""
        self.abnormal.intersection_update(targets)
        if self._make_breaker is None or (len(targets) == 1 and targets[0].breaker is None):
            return
        for target in targets:
            if target.breaker is None:
                target.breaker = self._make_breaker(now)
        out = [target for target in targets if _is_ejected(target)]
        for target in sorted(out, key=_ejected_since)[: max(0, len(out) - self._max_out(targets))]:
            target.breaker = self._make_breaker(now)
            self.start_slow_start(target, now)

    def _max_out(self, targets: Sequence[Target]) -> int:
        """Return how many targets may be ejected at once: never all."""
        return min(int(self.policy.max_ejected_ratio * len(targets) + 1e-9), len(targets) - 1)

    def admits(self, target: Target, now: float, *, is_safe: bool = True, principal: str | None = None) -> bool:
        """Return whether the breaker of a healthy target would admit a request now."""
        breaker = target.breaker
        if target not in self.abnormal or breaker is None:
            return True
        return breaker.would_admit(now, is_safe=is_safe, principal=principal)

    def _passes_slow_start(self, target: Target, now: float, key: str) -> bool:
        share = self.share(target, now)
        return share >= 1 or self._draw(target, key) < share

    def advance(self, now: float) -> None:
        """Apply changes that depend on time alone: the return of unprobed targets, and the end of slow starts."""
        for target in list(self.abnormal):
            transition = None if target.breaker is None else target.breaker.close_if_not_probed(now)
            if transition is not None:
                self._note_transition(target, transition)
                self._on_unprobed_return(target, transition)
            if not _is_ejected(target) and self.share(target, now) >= 1:
                target.returned_at = None
                self.abnormal.discard(target)

    def _note_request(self, now: float, *, is_safe: bool, principal: str | None) -> None:
        """Inform the breakers that a request arrived which could have been a probe."""
        for target in self.abnormal:
            if target.breaker is not None:
                target.breaker.note_request(now, is_safe=is_safe, principal=principal)

    def _note_transition(self, target: Target, transition: Transition) -> None:
        self.abnormal.add(target)
        if transition.target is State.OPEN:
            target.ejections_total += transition.source is State.CLOSED
            target.returned_at = None
        elif transition.target is State.CLOSED:
            self.start_slow_start(target, transition.at)


def is_serving(target: Target) -> bool:
    """Return whether a target is healthy and neither ejected nor probing."""
    return target.is_healthy and not _is_ejected(target)


def _is_ejected(target: Target) -> bool:
    return target.breaker is not None and target.breaker.state is not State.CLOSED


def _ejected_since(target: Target) -> float:
    return 0.0 if target.breaker is None else target.breaker.since
