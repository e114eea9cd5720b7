"""Candidate limits: evaluated on the same requests as the limits in force; their decisions are only counted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, Decision, Exchange, Quota
from api_gateway.proxy.route_table import Route
from api_gateway.rate_limiter import RateLimiter


class ShadowLimits:
    """Charges candidate quotas and costs to separate buckets, whose keys have the prefix `candidate:`.

    If only tiers have candidates, only requests of those tiers are evaluated. If a cost has a candidate, all requests
    are evaluated, because the cost of one request affects the client's later ones. Address limits are not evaluated.
    """

    def __init__(
        self,
        *,
        limiter: RateLimiter,
        clock_ns: Callable[[], int],
        recorder: Recorder,
        candidates: Mapping[str, Quota],
        routes: Iterable[Route],
    ) -> None:
        """`candidates` are the candidate quotas by name of the tier."""
        self._limiter = limiter
        self._clock_ns = clock_ns
        self._recorder = recorder
        self._candidates = dict(candidates)
        self._routes = {route.name: route for route in routes if route.has_candidate}

    def __repr__(self) -> str:
        return f"<ShadowLimits of tiers {sorted(self._candidates)} and routes {sorted(self._routes)}>"

    @property
    def is_empty(self) -> bool:
        """True if there are no candidates."""
        return not self._candidates and not self._routes

    def observe(self, exchange: Exchange) -> None:
        """Evaluate the candidates for an exchange that has a decision."""
        client = exchange.client
        assert client is not None  # noqa: S101 - a decision implies a client
        charges = self.charges(client, exchange.route, exchange.method, exchange.path, exchange.cost)
        if not charges:
            return
        now_ns = self._clock_ns()
        trial = self._limiter.decide(charges, now_ns)
        if trial is None:
            self._limiter.decide_async(charges, now_ns, partial(self._count, exchange, charges))
        else:
            self._count(exchange, charges, trial)

    def charges(self, client: Client, route: str | None, method: str, path: str, cost: float) -> list[Charge]:
        """Return the candidate charges of a request whose cost in force is `cost`; empty without a candidate."""
        quota = self._candidates.get(client.quota.name)
        if quota is None and not self._routes:
            return []
        quota = quota or client.quota
        tried = self._routes.get(route) if route is not None else None
        if tried is not None:
            candidate = tried.candidate_cost_of(method.upper(), path)
            cost = cost if candidate is None else candidate
        return [Charge(f"candidate:{client.key}", quota, quota.cost_ns(cost))]

    def _count(self, exchange: Exchange, charges: Sequence[Charge], trial: Decision) -> None:
        exchange.trial = charges, trial
        client, decision = exchange.client, exchange.decision
        assert client is not None  # noqa: S101 - as in `observe`
        assert decision is not None  # noqa: S101 - as in `observe`
        if decision.allowed and not trial.allowed:
            self._recorder.would_limit[client.quota.name] += 1
        elif trial.allowed and not decision.allowed:
            self._recorder.would_allow[client.quota.name] += 1
