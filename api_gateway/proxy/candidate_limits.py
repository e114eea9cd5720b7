"""Candidate limits: evaluated on the same requests as the limits in force; their decisions are only counted."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from api_gateway.http1.request_paths import is_unusual, matching_path, readings
from api_gateway.limits.concurrency import LocalSlots, SlottedCharges, SlotUse
from api_gateway.limits.limit import LIMIT_PREFIX
from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, ConcurrencySlot, Decision, Exchange, Quota
from api_gateway.proxy.route_table import Route, without_case
from api_gateway.rate_limiter import RateLimiter

_MOST_REMEMBERED = 4096  # charges in force, of some hundred bytes each


class CandidateLimits:
    """Charges candidate quotas and costs to separate buckets, whose keys have the prefix `candidate:`.

    All limits of a request are evaluated together, each with its candidate if it has one. Without a candidate among
    them, the request is not evaluated. If a cost has a candidate, all requests are evaluated, because the cost of one
    request affects the client's later ones. Address limits are not evaluated.

    Concurrency limits have slots of their own, with the same prefix. An evaluated request takes all of these slots and
    the tokens, or nothing. It returns the slots when its exchange ends, even if the limits in force have refused it.
    """

    def __init__(
        self,
        *,
        limiter: RateLimiter,
        clock_ns: Callable[[], int],
        recorder: Recorder,
        candidates: Mapping[str, Quota],
        routes: Iterable[Route],
        slots: LocalSlots,
    ) -> None:
        """`candidates` are the candidate quotas by name of the quota in force: of a tier, or of a limit."""
        self._limiter = limiter
        self._clock_ns = clock_ns
        self._recorder = recorder
        self._candidates = dict(candidates)
        self._routes = {route.name: CandidateCost(route) for route in routes if route.has_candidate}
        self._slots = slots
        self._quota_of_slots = lru_cache(maxsize=1024)(self._candidate_quota)
        # By the identity of the charges in force, which are kept beside the candidate's.
        self._remembered: dict[int, tuple[Sequence[Charge], Sequence[Charge]]] = {}

    def __repr__(self) -> str:
        return f"<CandidateLimits of {sorted(self._candidates)} and routes {sorted(self._routes)}>"

    @property
    def is_empty(self) -> bool:
        """True if there are no candidates."""
        return not self._candidates and not self._routes

    def observe(self, exchange: Exchange) -> None:
        """Evaluate the candidates for an exchange that has a decision."""
        client = exchange.client
        assert client is not None  # noqa: S101 - a decision implies a client
        charges = self._remembered_charges(exchange, client)
        if not charges:
            return
        now_ns = self._clock_ns()
        count = partial(self._count, exchange, charges)
        if isinstance(charges, SlottedCharges):
            self._observe_slots(exchange, charges, now_ns, count)
            return
        result = self._limiter.decide(charges, now_ns)
        if result is None:
            self._limiter.decide_async(charges, now_ns, count)
        else:
            count(result)

    def _observe_slots(
        self, exchange: Exchange, charges: SlottedCharges, now_ns: int, count: Callable[[Decision], None]
    ) -> None:
        result = self._slots.refusal_by_all(charges, self._limiter, now_ns) or self._limiter.decide(charges, now_ns)
        if result is None:
            self._slots.ask(exchange, self._limiter, charges, now_ns, count, is_candidate=True)
            return
        if result.allowed:
            self._slots.take(exchange, charges.slots)
            if exchange.finished:  # while the store was asked about the limits in force
                self._slots.release(exchange)
        count(result)

    async def look(self, charges: Sequence[Charge]) -> list[SlotUse]:
        """Return the candidate slots of such charges as they are now."""
        return await self._slots.look(charges.slots) if isinstance(charges, SlottedCharges) else []

    def _remembered_charges(self, exchange: Exchange, client: Client) -> Sequence[Charge]:
        """Return `charges`, computed once for charges in force that are remembered with a header set.

        A candidate cost depends on the path as well, so nothing is remembered then.
        """
        in_force = exchange.charges
        known = self._remembered.get(id(in_force))
        if known is not None and known[0] is in_force:
            return known[1]
        charges = self.charges(exchange, client)
        if in_force and not self._routes:
            if len(self._remembered) >= _MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[id(in_force)] = in_force, charges
        return charges

    def charges(self, exchange: Exchange, client: Client) -> list[Charge]:
        """Return the candidate charges of an exchange with charges in force; empty without a candidate."""
        further = [charge for charge in exchange.charges if charge.key.startswith(LIMIT_PREFIX)]
        held = exchange.charges.slots if isinstance(exchange.charges, SlottedCharges) else ()
        quotas = [client.quota, *(charge.quota for charge in further), *(slot.quota for slot in held)]
        if not self._routes and all(quota.name not in self._candidates for quota in quotas):
            return []
        cost, found = exchange.cost, self._routes.get(exchange.route or "")
        if found is not None:
            candidate = found.of(exchange.method.upper(), exchange.path)
            cost = cost if candidate is None else candidate
        own = Charge(client.key, client.quota, 0)
        charges = [self._candidate_charge(charge, cost) for charge in (own, *further)]
        if not held:
            return charges
        slots = [ConcurrencySlot(f"candidate:{one.key}", self._quota_of_slots(one.quota)) for one in held]
        return SlottedCharges(charges, tuple(slots))

    def _candidate_quota(self, quota: Quota) -> Quota:
        """Return the quota of the candidate's slots, which are counted apart from those in force."""
        candidate = self._candidates.get(quota.name) or quota
        return replace(candidate, policy=f"{quota.policy} candidate")

    def _candidate_charge(self, charge: Charge, cost: float) -> Charge:
        quota = self._candidates.get(charge.quota.name) or charge.quota
        increment_ns = quota.cost_ns(cost if charge.own_cost is None else charge.own_cost)
        return Charge(f"candidate:{charge.key}", quota, increment_ns, charge.own_cost, charge.is_unverified)

    def _count(self, exchange: Exchange, charges: Sequence[Charge], result: Decision) -> None:
        exchange.candidate = charges, result
        client, decision = exchange.client, exchange.decision
        assert client is not None  # noqa: S101 - as in `observe`
        assert decision is not None  # noqa: S101 - as in `observe`
        if decision.allowed and not result.allowed:
            self._recorder.would_refuse[client.quota.name] += 1
            for quota in result.violated or (result.quota,):
                self._recorder.candidate_refusals[quota.policy.removesuffix(" candidate"), client.quota.name] += 1
        elif result.allowed and not decision.allowed:
            self._recorder.would_allow[client.quota.name] += 1


class CandidateCost:
    """The candidate cost of requests of one route."""

    __slots__ = ("_folded", "_route")

    def __init__(self, route: Route) -> None:
        self._route = route
        self._folded = without_case(route)

    def __repr__(self) -> str:
        return f"<CandidateCost of {self._route.name}>"

    def of(self, method: str, path: str) -> float | None:
        """Return the cost of a request's most expensive reading, in tokens; None if no reading has a candidate."""
        found = [matching_path(path), *readings(path, is_decoded=True)] if is_unusual(path) else [path]
        costs = [self._route.both_costs(method, one) for one in found]
        costs += [self._folded.both_costs(method, one.casefold()) for one in found]
        if all(candidate is None for _, candidate in costs):
            return None
        return max(cost if candidate is None else candidate for cost, candidate in costs)
