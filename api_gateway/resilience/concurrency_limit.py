"""How many requests may be in flight at an upstream at once: a fixed limit, or one that follows its latency.

A request is admitted, or refused at once with a time to come back at; none waits. Synchronous and without clock; the
random source is an argument.
"""

import math
import random
from dataclasses import dataclass

from api_gateway.errors import LoadShed
from api_gateway.resilience.adaptive_limit import AdaptivePolicy, GradientController
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.resilience.priorities import SINGLE_PRIORITY, PriorityClasses, retry_after


@dataclass(frozen=True, slots=True)
class ConcurrencyState:
    """What may be under way at an upstream, None if that is not limited, and what is."""

    limit: float | None = None
    in_flight: int = 0


class ConcurrencyLimit:
    """The requests that this process may have under way at one upstream.

    `bounds` are the places of each band, `shares` of the limit rounded up. Of those a holder may have as many as are
    free, see `fair_shares`. The limit is fixed, or a gradient finds it.
    """

    __slots__ = (
        "_gradient",
        "_lowest_refused",
        "_max_priorities",
        "_peak",
        "_priorities",
        "_random",
        "_slots",
        "class_limits",
        "limit",
    )

    def __init__(
        self,
        limit: float | GradientController,
        priorities: PriorityClasses = SINGLE_PRIORITY,
        *,
        source: random.Random,
    ) -> None:
        self._priorities = priorities
        self._max_priorities = len(priorities)  # that a request under way may have been given its band among
        self._gradient = limit if isinstance(limit, GradientController) else None
        self._random = source
        self._slots = FairShares(0)
        self._peak = 0
        self._lowest_refused = len(priorities)  # the lowest band that met its bound since the gradient's window began
        self._set(limit.allowed if isinstance(limit, GradientController) else limit)

    def __repr__(self) -> str:
        return f"<ConcurrencyLimit [{self.in_flight} of {self.limit:g}]>"

    @property
    def is_adaptive(self) -> bool:
        """True if it follows the upstream's latency."""
        return self._gradient is not None

    def change(self, limit: float | AdaptivePolicy, priorities: PriorityClasses, now: float) -> None:
        """Take another limit, or other terms of an adaptive one, which goes on from where it stands."""
        self._priorities = priorities
        self._max_priorities = max(self._max_priorities, len(priorities))
        self._lowest_refused = len(priorities)
        gradient = self._gradient
        if not isinstance(limit, AdaptivePolicy):
            self._gradient = None
            self._set(limit)
            return
        if gradient is None:
            self._gradient = gradient = GradientController(limit, now, self.limit)
        else:
            gradient.change_policy(limit)
        self._set(gradient.allowed)

    def _set(self, limit: float) -> None:
        self.limit = limit
        self._set_class_limits([math.ceil(limit * share) for share in self._priorities.shares])

    def _set_class_limits(self, limits: list[int]) -> None:
        """Set the places of each band; a request whose band is no more has those of the highest."""
        self.class_limits = (*limits, *limits[-1:] * (self._max_priorities - len(limits)))

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._slots.in_use

    def admits(self, priority: int, holder: str | None = None) -> bool:
        """Tell whether a request of that band may go now."""
        if not self.is_full_for(priority, holder):
            return True
        self._lowest_refused = min(self._lowest_refused, priority)
        return False

    def is_full_for(self, priority: int, holder: str | None = None) -> bool:
        """Tell whether `admits` would refuse; nothing is learnt from the question."""
        places = self._slots
        return places.held(holder) >= self.class_limits[priority] - places.in_use

    def acquire(self, priority: int, holder: str | None = None) -> None:
        """Count one more under way, which `admits` has allowed."""
        self._slots.acquire(holder)
        taken = self._slots.in_use
        if taken > self._peak:
            self._peak = taken
            if taken >= self.class_limits[priority] and priority < self._lowest_refused:
                self._lowest_refused = priority

    def release(self, holder: str | None = None) -> None:
        """Count one less."""
        self._slots.release(holder)

    def observe(self, seconds: float, now: float) -> None:
        """Learn from the time one request took to the head of its answer."""
        gradient = self._gradient
        if gradient is not None and gradient.add(seconds, now):
            priorities, lowest_refused = len(self._priorities), self._lowest_refused
            gradient.close_window(
                now, is_met=lowest_refused < priorities, is_calm=2 * self._peak <= self.class_limits[0]
            )
            self._lowest_refused, self._peak = priorities, self.in_flight
            self._set(gradient.allowed)
            if (
                gradient.is_measuring_baseline and lowest_refused < priorities - 1
            ):  # a look costs the lower bands, if they are many enough
                self._set_class_limits([*self.class_limits[: priorities - 1], math.ceil(gradient.unqueued)])

    def refusal(self, upstream: str, priority: int, holder: str | None = None) -> LoadShed:
        """Return the error that tells a request of that band that it came at a bad time."""
        bound = self.class_limits[priority]
        tier = self._priorities.name(priority)
        whose = f"requests of tier {tier} are admitted" if tier else "requests are admitted"
        share = ""
        if self.in_flight < bound:
            share = f"; {self._slots.held(holder)} of them are yours, and nobody may have more than are still free"
        return LoadShed(
            f"Upstream '{upstream}' is overloaded: of {self.limit:.4g} requests that may be under way"
            f" {self.in_flight} are, and {whose} below {bound}{share}.",
            retry_after=retry_after(self._random),
            extra={
                "upstream": upstream,
                "tier": tier,
                "concurrency_limit": round(self.limit, 1),
                "tier_concurrency_limit": bound,
                "in_flight": self.in_flight,
            },
        )
