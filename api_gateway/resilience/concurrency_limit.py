"""The concurrency limit of an upstream, with priorities and fair shares.

Requests do not wait: each is admitted, or refused at once with a Retry-After. Synchronous and without a clock; the
random source is passed in.
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
    """The limit of requests in flight at an upstream (None: unlimited), and how many there are."""

    limit: float | None = None
    in_flight: int = 0


class ConcurrencyLimit:
    """The limit of requests in flight of this process at one upstream: fixed, or adaptive.

    `class_limits` is the limit for each priority: its share of the whole limit, rounded up. Within it a principal can
    use at most as many slots as are free, see `fair_shares`.
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
        self._max_priorities = len(
            priorities
        )  # the largest number of priorities that requests in flight may have been assigned from
        self._gradient = limit if isinstance(limit, GradientController) else None
        self._random = source
        self._slots = FairShares(0)
        self._peak = 0
        self._lowest_refused = len(
            priorities
        )  # the lowest priority that reached its limit in the current window of the gradient
        self._set(limit.allowed if isinstance(limit, GradientController) else limit)

    def __repr__(self) -> str:
        return f"<ConcurrencyLimit [{self.in_flight} of {self.limit:g}]>"

    @property
    def is_adaptive(self) -> bool:
        """True if the limit follows the upstream's latency."""
        return self._gradient is not None

    def change(self, limit: float | AdaptivePolicy, priorities: PriorityClasses, now: float) -> None:
        """Apply another limit or policy, and other priorities. An adaptive limit continues from its current value."""
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
        """Set the limit of each priority; a priority that no longer exists gets that of the highest."""
        self.class_limits = (*limits, *limits[-1:] * (self._max_priorities - len(limits)))

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return self._slots.in_use

    def admits(self, priority: int, principal: str | None = None) -> bool:
        """Return whether a request of this priority and principal is admitted now; a refusal is recorded."""
        places = self._slots
        if places.held(principal) < self.class_limits[priority] - places.in_use:  # `is_full_for`, inlined
            return True
        self._lowest_refused = min(self._lowest_refused, priority)
        return False

    def is_full_for(self, priority: int, principal: str | None = None) -> bool:
        """Return whether `admits` would refuse, without recording it."""
        places = self._slots
        return places.held(principal) >= self.class_limits[priority] - places.in_use

    def acquire(self, priority: int, principal: str | None = None) -> None:
        """Take a slot for a request that `admits` has admitted."""
        places = self._slots
        places.acquire(principal)
        taken = places.in_use
        if taken > self._peak:
            self._peak = taken
            if taken >= self.class_limits[priority] and priority < self._lowest_refused:
                self._lowest_refused = priority

    def release(self, principal: str | None = None) -> None:
        """Release a slot."""
        self._slots.release(principal)

    def observe(self, seconds: float, now: float) -> None:
        """Record the time from a request to the head of its response, for an adaptive limit."""
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
            ):  # the lower priorities bear the cost of the measurement, if they have enough requests
                self._set_class_limits([*self.class_limits[: priorities - 1], math.ceil(gradient.unqueued)])

    def refusal(self, upstream: str, priority: int, principal: str | None = None) -> LoadShed:
        """Return the error for a refused request of this priority and principal."""
        bound = self.class_limits[priority]
        tier = self._priorities.name(priority)
        whose = f"requests of tier {tier} are admitted" if tier else "requests are admitted"
        share = ""
        if self.in_flight < bound:
            held = self._slots.held(principal)
            share = f"; {held} of them are yours, and one client can use at most as many as are free"
        return LoadShed(
            f"Upstream '{upstream}' is overloaded: {self.in_flight} of at most {self.limit:.4g} requests are in"
            f" flight, and {whose} below {bound}{share}.",
            retry_after=retry_after(self._random),
            extra={
                "upstream": upstream,
                "tier": tier,
                "concurrency_limit": round(self.limit, 1),
                "tier_concurrency_limit": bound,
                "in_flight": self.in_flight,
            },
        )
