"""An upstream and its targets: choose one that is healthy, ask the breaker, and take the result back.

Synchronous and without clock; the random source is handed in. Nothing here knows HTTP.
"""

import hashlib
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from api_gateway.circuit_breaker import CircuitBreaker, State, Ticket, Transition
from api_gateway.errors import CircuitOpen, NoHealthyUpstream, Unavailable
from api_gateway.models import Outcome
from api_gateway.overload import Concurrency, ConcurrencyLimit


@dataclass(eq=False, slots=True)
class Target:
    """One address of an upstream. `in_flight` counts requests sent and not yet answered to the end."""

    url: str
    weight: int = 1
    is_healthy: bool = True
    is_checked: bool = False
    last_check: str | None = None
    in_flight: int = 0
    credit: int = field(default=0, repr=False)  # of the smooth weighted round robin


Pick = Callable[[Sequence[Target], str], Target]


def round_robin(targets: Sequence[Target], _key: str) -> Target:
    """Take turns by weight, interleaved (nginx's smooth weighted round robin): 2:1 gives a b a, never a a b."""
    if len(targets) == 1:
        return targets[0]
    for target in targets:
        target.credit += target.weight
    chosen = max(targets, key=lambda target: target.credit)
    chosen.credit -= sum(target.weight for target in targets)
    return chosen


def least_requests(source: random.Random) -> Pick:
    """Return a pick of the less loaded of two random targets, by requests in flight per weight.

    Two choices get within a constant of the best (Mitzenmacher 2001) and, unlike the exact minimum, do not send every
    gateway to the same target at once.
    """

    def pick(targets: Sequence[Target], _key: str) -> Target:
        if len(targets) == 1:
            return targets[0]
        one, other = source.sample(targets, 2)
        return one if one.in_flight * other.weight <= other.in_flight * one.weight else other

    return pick


def rendezvous_hash(targets: Sequence[Target], key: str) -> Target:
    """Send one key to one target for as long as it is healthy (highest random weight, Thaler and Ravishankar 1998).

    Weights count as that many virtual targets. Losing a target moves only the keys it had.
    """

    def score(target: Target) -> bytes:
        name = target.url.encode()
        return max(
            hashlib.blake2b(b"%d|%b|%b" % (copy, name, key.encode()), digest_size=8).digest()
            for copy in range(target.weight)
        )

    return max(targets, key=score)


class Lease:
    """One try on one target. Settling it gives back the target and tells the breaker; only the first time counts."""

    __slots__ = ("_is_settled", "target", "ticket", "upstream")

    def __init__(self, upstream: "Upstream", target: Target, ticket: Ticket) -> None:
        self.upstream = upstream
        self.target = target
        self.ticket = ticket
        self._is_settled = False
        target.in_flight += 1

    def settle(self, outcome: Outcome, now: float, detail: str = "") -> Transition | None:
        """Tell how the try ended. Returns the breaker's move, if it caused one."""
        if self._is_settled:
            return None
        self._is_settled = True
        return self.upstream.breaker.settle(self.ticket, outcome, now, detail)

    def release(self, now: float, outcome: Outcome = Outcome.IGNORED) -> None:
        """Give the target back, and settle the try unless it is: by default it blames nobody.

        For outcomes that move the breaker, `settle` before.
        """
        if not self._is_settled:
            self._is_settled = True
            self.upstream.breaker.settle(self.ticket, outcome, now)
        self.target.in_flight -= 1
        limit = self.upstream.limit
        if limit is not None:
            limit.give_back()


class Upstream:
    """A named service: its targets, its breaker, its way to choose and what may be under way there at once."""

    def __init__(
        self,
        name: str,
        targets: Sequence[Target],
        breaker: CircuitBreaker,
        pick: Pick,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.targets = list(targets)
        self.breaker = breaker
        self._pick = pick

    def __repr__(self) -> str:
        healthy = sum(target.is_healthy for target in self.targets)
        return f"<Upstream {self.name!r} [{healthy} of {len(self.targets)} healthy, {self.breaker.state}]>"

    @property
    def concurrency(self) -> Concurrency:
        """What is under way, and what may be."""
        limit = self.limit
        if limit is not None:
            return Concurrency(limit.limit, limit.in_flight)
        return Concurrency(None, sum(target.in_flight for target in self.targets))

    def is_untroubled(self) -> bool:
        """Tell whether `checkout` would give a lease that is no probe."""
        if self.breaker.state is not State.CLOSED:
            return False
        for target in self.targets:  # noqa: SIM110 - any() takes five times as long, on every request
            if target.is_healthy:
                return True
        return False

    def checkout(self, now: float, key: str, tried: Collection[Target] = (), *, band: int = 0) -> Lease:
        """Return a lease on a healthy target, preferring those not in `tried`.

        Raises NoHealthyUpstream when there is none, Shed when there is no place for the band, CircuitOpen when the
        breaker does not admit; in this order, so that no probe is spent on what does not go.
        """
        candidates = self.targets
        if len(candidates) > 1 or not candidates[0].is_healthy:
            candidates = [target for target in candidates if target.is_healthy]
        if not candidates:
            raise self._unhealthy()
        limit = self.limit
        if limit is not None and not limit.admits(band):
            raise limit.refusal(self.name, band)
        ticket = self.breaker.admit(now)
        if ticket is None:
            raise self._refusal(now)
        untried = [target for target in candidates if target not in tried] if tried else candidates
        candidates = untried or candidates
        if limit is not None:
            limit.take(band)
        return Lease(self, self._pick(candidates, key) if len(candidates) > 1 else candidates[0], ticket)

    def refusal(self, now: float, band: int = 0) -> Unavailable | None:
        """Return what `checkout` would raise now, or None; nothing is taken by that."""
        if not any(target.is_healthy for target in self.targets):
            return self._unhealthy()
        if self.limit is not None and self.limit.is_full_for(band):
            return self.limit.refusal(self.name, band)
        return None if self.breaker.would_admit(now) else self._refusal(now)

    def _unhealthy(self) -> NoHealthyUpstream:
        return NoHealthyUpstream(
            f"Upstream '{self.name}' has no healthy target: all {len(self.targets)} fail their health checks.",
            retry_after=1,
            extra={"upstream": self.name},
        )

    def _refusal(self, now: float) -> CircuitOpen:
        wait = self.breaker.retry_after(now)
        if self.breaker.state is State.OPEN:
            opened = self.breaker.last_opened
            cause = f" after {opened.cause}" if opened else ""
            detail = f"The circuit breaker of upstream '{self.name}' is OPEN{cause}. Next probe in {wait:.1f} s."
        else:
            detail = f"The circuit breaker of upstream '{self.name}' is HALF_OPEN and its probes are under way."
        return CircuitOpen(
            detail,
            retry_after=max(wait, 1.0),
            extra={"upstream": self.name, "circuit_breaker": self.breaker.state.value},
        )


class RetryBudget:
    """Retries as a share of live requests, so that retrying cannot multiply an outage.

    Every request adds `share` to the reserve and every retry takes 1, up to `RESERVE` kept for quiet times
    (the floor). After Finagle's RetryBudget.
    """

    RESERVE = 10.0

    def __init__(self, share: float) -> None:
        self._share = share
        self._balance = self.RESERVE if share > 0 else 0.0

    def __repr__(self) -> str:
        return f"<RetryBudget [{self._balance:.1f} retries left]>"

    def deposit(self) -> None:
        """Count one live request."""
        if self._balance < self.RESERVE:
            self._balance = min(self.RESERVE, self._balance + self._share)

    def withdraw(self) -> bool:
        """Take one retry if there is one."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
