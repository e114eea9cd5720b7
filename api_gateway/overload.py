"""How much may be under way at once, and who is refused first when it is too much.

Nobody waits here: a request is admitted, or refused at once with a time to come back at. Synchronous and without
clock; the random source is handed in.
"""

import math
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from api_gateway.errors import LoadShed
from api_gateway.gradient import AdaptivePolicy, GradientController
from api_gateway.shares import Shares

LOWEST_SHARE = 0.5  # of a limit that the lowest band may fill
LONGEST_RETRY_AFTER = 3  # seconds; the shortest is 1
LAGS = 5  # samples of the event loop's lag whose median counts: one stall, or two, shed nobody
PRIORITY_WIDTH = 0.5  # of the greatest lag that may be: what takes a band from the first refused to the last
HIGHEST_SHED = 0.9  # of the highest band's requests: some always pass

_GATEWAY = "The gateway itself is overloaded: its event loop runs {lag:.2f} s late, and {most:g} s is the most it may."


class PriorityClasses:
    """The tiers in the order in which they are shed, lowest first. Tiers of one rank share a band.

    A band is admitted while less than its share of the limit is under way, whoever holds it. The shares rise evenly
    from one half to the whole, so that each band finds places which those below it cannot take; and the lowest
    alone can still fill half the limit, which keeps an upstream busy whose limit is twice what it works on at once.
    """

    def __init__(self, ranks: Mapping[str, float]) -> None:
        """`ranks` are by tier; the highest is shed last."""
        order = sorted(set(ranks.values()))
        self._bands = {tier: bisect_left(order, rank) for tier, rank in ranks.items()}
        count = max(1, len(order))
        rise = (1 - LOWEST_SHARE) / (count - 1) if count > 1 else 0.0
        self.shares = tuple(1 - rise * (count - 1 - priority) for priority in range(count))

    def __repr__(self) -> str:
        return f"<PriorityClasses {[self.name(priority) for priority in range(len(self.shares))]}>"

    def __len__(self) -> int:
        return len(self.shares)

    def of(self, tier: str) -> int:
        """Return the band of a tier; of one that is not known, the lowest."""
        return self._bands.get(tier, 0)

    def name(self, priority: int) -> str:
        """Return the tiers of a band."""
        return " or ".join(tier for tier, its in self._bands.items() if its == priority)


SINGLE_PRIORITY = PriorityClasses({})


@dataclass(frozen=True, slots=True)
class ConcurrencyState:
    """What may be under way at an upstream, None if that is not limited, and what is."""

    limit: float | None = None
    in_flight: int = 0


class ConcurrencyLimit:
    """The requests that this process may have under way at one upstream.

    `bounds` are the places of each band, `shares` of the limit rounded up. Of those a holder may have as many as are
    free, see `shares`. The limit is fixed, or a gradient finds it.
    """

    __slots__ = ("_bands", "_gradient", "_met", "_most_bands", "_peak", "_places", "_source", "bounds", "limit")

    def __init__(
        self,
        limit: float | GradientController,
        priorities: PriorityClasses = SINGLE_PRIORITY,
        *,
        source: random.Random,
    ) -> None:
        self._bands = priorities
        self._most_bands = len(priorities)  # that a request under way may have been given its band among
        self._gradient = limit if isinstance(limit, GradientController) else None
        self._source = source
        self._places = Shares(0)
        self._peak = 0
        self._met = len(priorities)  # the lowest band that met its bound since the gradient's window began
        self._set(limit.allowed if isinstance(limit, GradientController) else limit)

    def __repr__(self) -> str:
        return f"<ConcurrencyLimit [{self.in_flight} of {self.limit:g}]>"

    @property
    def is_adaptive(self) -> bool:
        """True if it follows the upstream's latency."""
        return self._gradient is not None

    def change(self, limit: float | AdaptivePolicy, priorities: PriorityClasses, now: float) -> None:
        """Take another limit, or other terms of an adaptive one, which goes on from where it stands."""
        self._bands = priorities
        self._most_bands = max(self._most_bands, len(priorities))
        self._met = len(priorities)
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
        self._bound([math.ceil(limit * share) for share in self._bands.shares])

    def _bound(self, bounds: list[int]) -> None:
        """Set the places of each band; a request whose band is no more has those of the highest."""
        self.bounds = (*bounds, *bounds[-1:] * (self._most_bands - len(bounds)))

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._places.in_use

    def admits(self, priority: int, holder: str | None = None) -> bool:
        """Tell whether a request of that band may go now."""
        if not self.is_full_for(priority, holder):
            return True
        self._met = min(self._met, priority)
        return False

    def is_full_for(self, priority: int, holder: str | None = None) -> bool:
        """Tell whether `admits` would refuse; nothing is learnt from the question."""
        places = self._places
        return places.held(holder) >= self.bounds[priority] - places.in_use

    def take(self, priority: int, holder: str | None = None) -> None:
        """Count one more under way, which `admits` has allowed."""
        self._places.take(holder)
        taken = self._places.in_use
        if taken > self._peak:
            self._peak = taken
            if taken >= self.bounds[priority] and priority < self._met:
                self._met = priority

    def give_back(self, holder: str | None = None) -> None:
        """Count one less."""
        self._places.give_back(holder)

    def observe(self, seconds: float, now: float) -> None:
        """Learn from the time one request took to the head of its answer."""
        gradient = self._gradient
        if gradient is not None and gradient.add(seconds, now):
            priorities, met = len(self._bands), self._met
            gradient.close_window(now, is_met=met < priorities, is_calm=2 * self._peak <= self.bounds[0])
            self._met, self._peak = priorities, self.in_flight
            self._set(gradient.allowed)
            if gradient.is_looking and met < priorities - 1:  # a look costs the lower bands, if they are many enough
                self._bound([*self.bounds[: priorities - 1], math.ceil(gradient.unqueued)])

    def refusal(self, upstream: str, priority: int, holder: str | None = None) -> LoadShed:
        """Return the error that tells a request of that band that it came at a bad time."""
        bound = self.bounds[priority]
        tier = self._bands.name(priority)
        whose = f"requests of tier {tier} are admitted" if tier else "requests are admitted"
        share = ""
        if self.in_flight < bound:
            share = f"; {self._places.held(holder)} of them are yours, and nobody may have more than are still free"
        return LoadShed(
            f"Upstream '{upstream}' is overloaded: of {self.limit:.4g} requests that may be under way"
            f" {self.in_flight} are, and {whose} below {bound}{share}.",
            retry_after=_retry_after(self._source),
            extra={
                "upstream": upstream,
                "tier": tier,
                "concurrency_limit": round(self.limit, 1),
                "tier_concurrency_limit": bound,
                "in_flight": self.in_flight,
            },
        )


class EventLoopShedder:
    """How late the event loop may run, beyond which requests are refused before anything is done for them.

    What counts is the median of the last few samples, so that a pause of the garbage collector or one stall sheds
    nobody. From `most` seconds on the lowest band is shed, a share that rises to all of it at one and a half times
    that; then the next. Of the highest, one in ten always passes.
    """

    def __init__(
        self, most: float | None, priorities: PriorityClasses = SINGLE_PRIORITY, *, source: random.Random
    ) -> None:
        """`most` is seconds; None sheds nobody."""
        self.most = math.inf if most is None else most
        self.lag = 0.0
        self.is_over = False
        self._bands = priorities
        self._source = source
        self._lags: deque[float] = deque(maxlen=LAGS)

    def __repr__(self) -> str:
        return f"<EventLoopShedder [{self.lag:.3f} of {self.most:g} s]>"

    def change(self, most: float | None, priorities: PriorityClasses) -> None:
        """Take another limit or other bands; the samples stay."""
        self.most = math.inf if most is None else most
        self._bands = priorities
        self.is_over = self.lag > self.most

    def observe(self, seconds: float) -> None:
        """Take in a sample: the worse of a timer's delay and a turn of the event loop."""
        self._lags.append(seconds)
        self.lag = median(self._lags) if len(self._lags) == LAGS else 0.0
        self.is_over = self.lag > self.most

    def share(self, priority: int) -> float:
        """Return which share of a band's requests is refused now, 0 to 1."""
        if not self.is_over:
            return 0.0
        share = (self.lag / self.most - 1) / PRIORITY_WIDTH - priority
        return max(0.0, min(HIGHEST_SHED if priority == len(self._bands) - 1 else 1.0, share))

    def sheds(self, priority: int) -> bool:
        """Decide on one request."""
        return self._source.random() < self.share(priority)

    def refusal(self, priority: int) -> LoadShed:
        """Return the error that tells a request of that band that it came at a bad time."""
        tier, share = self._bands.name(priority), self.share(priority)
        whose = f" of tier {tier}" if tier else ""
        return LoadShed(
            f"{_GATEWAY.format(lag=self.lag, most=self.most)} {share:.0%} of the requests{whose} are refused now.",
            retry_after=_retry_after(self._source),
            extra={
                "tier": tier,
                "event_loop_lag_seconds": round(self.lag, 3),
                "max_event_loop_lag_seconds": self.most,
            },
        )


def _retry_after(source: random.Random) -> float:
    """Return whole seconds, differing, so that those refused together do not come back together."""
    return float(source.randint(1, LONGEST_RETRY_AFTER))
