"""The rotation of an upstream: which of its targets are offered, by what live requests have shown of each.

A target whose own breaker is OPEN is ejected: it is not offered while another is. One that returns starts slowly.
Synchronous and without clock; what is left to chance is handed in.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from api_gateway.circuit_breaker import CircuitBreaker, Ticket
from api_gateway.models import Outcome
from api_gateway.resilience.breaker_history import Transition
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.upstreams.load_balancing import share_of_key
from api_gateway.upstreams.target import Target

Draw = Callable[[Target, str], float]  # a number from 0 to 1, by chance or by key


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """How much of an upstream may be ejected, as a share of its targets, and how long a return takes in seconds."""

    max_ejected_ratio: float = 0.5
    slow_start: float = 10.0


class OutlierDetector:
    """Offers targets and judges them by what came of it. `abnormal` are those that are not simply offered."""

    def __init__(
        self,
        policy: OutlierPolicy = OutlierPolicy(),
        *,
        draw: Draw = share_of_key,
        make_breaker: Callable[[float], CircuitBreaker] | None = None,
    ) -> None:
        """`make_breaker` makes the breaker of a target; without it targets have none and none is ejected."""
        self.policy = policy
        self.abnormal: set[Target] = set()
        self._draw = draw
        self._make_breaker = make_breaker

    def change(
        self,
        policy: OutlierPolicy,
        draw: Draw,
        make_breaker: Callable[[float], CircuitBreaker] | None,
        breaker_policy: BreakerPolicy,
        targets: Iterable[Target],
        now: float,
    ) -> None:
        """Go by other terms. Breakers of targets stay, and go by `breaker_policy`; without `make_breaker` they end."""
        self.policy, self._draw, self._make_breaker = policy, draw, make_breaker
        for target in targets:
            if make_breaker is None:
                target.breaker = None
            elif target.breaker is not None:
                target.breaker.change_policy(breaker_policy, now)

    def __repr__(self) -> str:
        return f"<OutlierDetector [{len(self.abnormal)} abnormal]>"

    def eligible(
        self, healthy: Sequence[Target], tried: Collection[Target], now: float, key: str, *, is_safe: bool = True
    ) -> Sequence[Target]:
        """Return those of the healthy targets that may have this request: at least one.

        Those not yet `tried` go first. If every one is ejected, none is. `is_safe` is for the breakers' `admit`.
        """
        self._prune(now)
        if is_safe:
            self._note_idempotent(now)
        admitting = [target for target in healthy if self.admits(target, now, is_safe=is_safe)] or healthy
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
        """Tell the breaker of a target how a try on it ended; see its `settle`. Returns the move that caused.

        A failure that might eject a target which may not be is counted as `withheld` instead.
        """
        breaker = target.breaker
        assert breaker is not None  # noqa: S101 - it gave the ticket
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
        if transition is None or target not in targets:  # one that is gone rotates no more
            return None
        self._note_transition(target, transition)
        return transition

    def may_eject(self, targets: Sequence[Target], target: Target) -> bool:
        """Tell whether `target` may leave: others are left to serve, and not too many are out already.

        One that is HALF_OPEN counts as out, so that its probe may fail.
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
        """Tell whether `target` gets no request for what its breaker says."""
        if target.breaker is None or target.breaker.state_at(now) is not State.OPEN:
            return False
        return any(other.is_healthy and self.admits(other, now) for other in targets)

    def share(self, target: Target, now: float) -> float:
        """Return how often a target is a candidate, from 0 to 1: less than always while it starts slowly."""
        if target.returned_at is None or now - target.returned_at >= self.policy.slow_start:
            return 1.0
        return max(0.0, now - target.returned_at) / self.policy.slow_start

    def start_slow_start(self, target: Target, now: float) -> None:
        """Begin the slow start of a target that was away and has returned."""
        if self.policy.slow_start > 0:
            target.returned_at = now
            self.abnormal.add(target)

    def set_targets(self, targets: Sequence[Target], now: float) -> None:
        """Rotate among `targets` from now on: give new ones their breakers, and take back whom fewer may not spare."""
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
        """Return how many of them may be out at once: never all."""
        return min(int(self.policy.max_ejected_ratio * len(targets) + 1e-9), len(targets) - 1)

    def admits(self, target: Target, now: float, *, is_safe: bool = True) -> bool:
        """Tell whether a healthy target may have a request now, as far as its own breaker goes."""
        breaker = target.breaker
        return target not in self.abnormal or breaker is None or breaker.would_admit(now, is_safe=is_safe)

    def _passes_slow_start(self, target: Target, now: float, key: str) -> bool:
        share = self.share(target, now)
        return share >= 1 or self._draw(target, key) < share

    def _prune(self, now: float) -> None:
        """Forget what is over: a target that has its full share and is not out is like any other."""
        for target in list(self.abnormal):
            if not _is_ejected(target) and self.share(target, now) >= 1:
                target.returned_at = None
                self.abnormal.discard(target)

    def _note_idempotent(self, now: float) -> None:
        """Let breakers that wait for probes know that requests come which may be repeated."""
        for target in self.abnormal:
            if target.breaker is not None:
                target.breaker.note_idempotent(now)

    def _note_transition(self, target: Target, transition: Transition) -> None:
        self.abnormal.add(target)
        if transition.target is State.OPEN:
            target.ejections_total += transition.source is State.CLOSED
            target.returned_at = None
        elif transition.target is State.CLOSED:
            self.start_slow_start(target, transition.at)


def is_serving(target: Target) -> bool:
    """Tell whether a target is in rotation without reserve: healthy, neither ejected nor on probation."""
    return target.is_healthy and not _is_ejected(target)


def _is_ejected(target: Target) -> bool:
    return target.breaker is not None and target.breaker.state is not State.CLOSED


def _ejected_since(target: Target) -> float:
    return 0.0 if target.breaker is None else target.breaker.since
