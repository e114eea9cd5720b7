"""The stage of admission that charges a request to all its limits, or to none.

Which limits apply, and the buckets that they charge, is computed once for each header set, route, method and cost.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any

from api_gateway.http1.headers import address_key, is_within
from api_gateway.limits.limit import Limit
from api_gateway.limits.refusal import refusal
from api_gateway.models import Charge, Client, Decision, Quota
from api_gateway.proxy.admission import OnReply, RequestPlan, StageResult, Wait
from api_gateway.proxy.candidate_limits import CandidateLimits
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.jwt_source import JwtProof
from api_gateway.proxy.route_table import RouteTable
from api_gateway.rate_limiter import NEVER_NS, RateLimiter

# Of described requests without a credential, in `HeaderFacts.keyed`; no header field has such a name.
DESCRIBED_ORGANISATION, DESCRIBED_CLAIM = b":organisation", b":claim:"
MOST_REMEMBERED = 8  # combinations of route, method and cost of one header set, about 150 bytes for each limit

_BY_LIMITS = -2.0  # instead of `HeaderFacts.cost`, if `HeaderFacts.charged` has the charges

ValueOf = Callable[[RequestPlan], str | None]


class RateLimitStage:
    """Charges the client's bucket, and the address's bucket if the client is not registered: both or neither."""

    def __init__(
        self,
        *,
        limiter: RateLimiter,
        address_quota: Quota | None,
        exempt: Collection[Any],
        candidate_limits: CandidateLimits | None = None,
    ) -> None:
        """`address_quota` None disables the address limit; addresses in `exempt` networks have none.

        `candidate_limits` evaluates candidate limits.
        """
        self._limiter = limiter
        self._decide_at_once = limiter.decide
        self.address_quota = address_quota
        self._is_exempt = lru_cache(maxsize=4096)(lambda address: is_within(address, exempt))
        self.candidate_limits = candidate_limits

    @property
    def limits(self) -> Sequence[Limit]:
        """The further limits: other than those of tiers and addresses."""
        return ()

    @property
    def concurrency(self) -> Sequence[Limit]:
        """The limits of requests in flight."""
        return ()

    def lacking(self, plan: RequestPlan) -> list[tuple[Limit, str]]:  # noqa: ARG002 - there are none
        """Return the limits that do not apply to a request, each with the reason in words."""
        return []

    def decide(self, plan: RequestPlan) -> StageResult:
        """Charge the request; the store is asked if this process cannot decide."""
        exchange, facts = plan.exchange, plan.facts
        if facts.client is exchange.client and facts.cost == exchange.cost:
            charges = exchange.charges = facts.charges
        else:
            charges = self._set_charges(plan)
        decision = self._decide_at_once(charges, plan.now_ns)
        if decision is None:
            return Wait(partial(self._ask, charges, plan.now_ns), self._on_decision)
        if decision.allowed and self.candidate_limits is None:
            exchange.decision = decision
            return None
        return self._on_decision(plan, decision)

    def inspect(self, plan: RequestPlan) -> StageResult:
        """Ask for the decision of each bucket alone."""
        if plan.exchange.client is None:  # inspected after a refusal
            return None
        return Wait.on(partial(self._limiter.inspect, self._set_charges(plan), plan.now_ns), self._on_inspected)

    def concerns(self, _facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return True

    def charges(self, client: Client, peer: str, cost: float) -> list[Charge]:
        """Return the charges of a request of `client` from the address `peer`; all or none must be charged."""
        charges = [Charge(client.key, client.quota, client.quota.cost_ns(cost))]
        quota = self.address_quota
        if quota is not None and self.limits_address_of(client, peer):
            charges.append(Charge(f"peer:{address_key(peer)}", quota, quota.cost_ns(cost)))
        return charges

    def charges_of_address(self, peer: str) -> list[Charge]:
        """Return the charge of a failed attempt to prove an id; empty if the address has no limit."""
        quota = self.address_quota
        if quota is None or self._is_exempt(peer):
            return []
        return [Charge(f"peer:{address_key(peer)}", quota, quota.cost_ns(1))]

    def limits_address_of(self, client: Client, peer: str) -> bool:
        """Return whether a request of `client` from the address `peer` is also charged to that address."""
        return self.address_quota is not None and not client.is_registered and not self._is_exempt(peer)

    def _set_charges(self, plan: RequestPlan) -> list[Charge]:
        exchange, facts = plan.exchange, plan.facts
        client = exchange.client
        assert client is not None  # noqa: S101 - `IdentityStage` comes first
        charges = exchange.charges = self.charges(client, exchange.client_address, exchange.cost)
        if facts.client is client:
            facts.charges, facts.cost = charges, exchange.cost
        return charges

    def _ask(self, charges: list[Charge], now_ns: int, on_reply: OnReply) -> None:
        self._limiter.decide_async(charges, now_ns, on_reply)

    def _on_decision(self, plan: RequestPlan, decision: Decision) -> StageResult:
        exchange = plan.exchange
        exchange.decision = decision
        if self.candidate_limits is not None:
            self.candidate_limits.observe(exchange)
        return None if decision.allowed else refusal(exchange, decision)

    def _on_inspected(self, plan: RequestPlan, decisions: list[Decision]) -> StageResult:
        plan.inspected = decisions
        refused = [decision for decision in decisions if not decision.allowed]
        return refusal(plan.exchange, max(refused, key=_wait_ns)) if refused else None


class LimitListStage(RateLimitStage):
    """Charges the further limits of a request, too: with the client's bucket and that of the address, all or none."""

    def __init__(
        self,
        *,
        limiter: RateLimiter,
        address_quota: Quota | None,
        exempt: Collection[Any],
        limits: Sequence[Limit],
        routes: RouteTable,
        candidate_limits: CandidateLimits | None = None,
    ) -> None:
        """See `RateLimitStage`. `routes` finds out which routes a path with several readings may belong to."""
        super().__init__(
            limiter=limiter, address_quota=address_quota, exempt=exempt, candidate_limits=candidate_limits
        )
        self._limits = tuple([(limit, tuple([part_reader(part) for part in limit.key])) for limit in limits])
        self._routes = routes
        self._is_by_route = any(limit.routes is not None for limit in limits)

    @property
    def limits(self) -> Sequence[Limit]:
        """See `RateLimitStage`."""
        return [limit for limit, _ in self._limits]

    def lacking(self, plan: RequestPlan) -> list[tuple[Limit, str]]:
        """See `RateLimitStage`."""
        return self._lacking(plan, self._limits)

    def _lacking(
        self, plan: RequestPlan, limits: Sequence[tuple[Limit, tuple[ValueOf, ...]]]
    ) -> list[tuple[Limit, str]]:
        client, found = plan.exchange.client, []
        assert client is not None  # noqa: S101 - `IdentityStage` comes first
        names, method, tier = self._route_names(plan), plan.exchange.method.upper(), client.quota.name
        for limit, values in limits:
            missing = [part for part, value in zip(limit.key, values, strict=True) if value(plan) is None]
            if limit.quota_of(tier) is None:
                found.append((limit, f"not for the tier {tier}"))
            elif limit.methods is not None and method not in limit.methods:
                found.append((limit, f"not for the method {method}"))
            elif not any(limit.concerns(name, method) for name in names):
                found.append((limit, "not for the route"))
            elif missing:
                found.append((limit, f"the request has no {missing[0]}"))
        return found

    def _set_charges(self, plan: RequestPlan) -> list[Charge]:
        """Set and return the charges of a request, which are remembered with its header set.

        `decide` always comes here: the charges do not depend on the cost alone, so `facts.cost` is never that of a
        request.
        """
        exchange, facts = plan.exchange, plan.facts
        names = self._route_names(plan)
        if facts.client is not exchange.client or len(names) > 1:
            charges = exchange.charges = self._compute(plan, names)
            return charges
        if facts.cost != _BY_LIMITS:  # the client was determined anew
            facts.charged, facts.cost = {}, _BY_LIMITS
        key = exchange.route, exchange.method, exchange.cost
        known = facts.charged.get(key)
        if known is None:
            if len(facts.charged) >= MOST_REMEMBERED:
                facts.charged.clear()
            known = facts.charged[key] = self._compute(plan, names)
        exchange.charges = known
        return known

    def _compute(self, plan: RequestPlan, names: Sequence[str | None]) -> list[Charge]:
        exchange = plan.exchange
        client, cost, method = exchange.client, exchange.cost, exchange.method.upper()
        assert client is not None  # noqa: S101 - `IdentityStage` comes first
        charges = self.charges(client, exchange.client_address, cost)
        for limit, parts in self._limits:
            quota = limit.quota_of(client.quota.name)
            if quota is None or not any(limit.concerns(name, method) for name in names):
                continue
            values = values_of(parts, plan)
            if values is not None:
                key = limit.bucket_key(values, client.quota.name)
                increment_ns = quota.cost_ns(cost if limit.cost is None else limit.cost)
                charges.append(Charge(key, quota, increment_ns, limit.cost, limit.is_unverified(client)))
        return charges

    def _route_names(self, plan: RequestPlan) -> Sequence[str | None]:
        """Return the names of the routes that a request may be one of: of its route, and of other readings."""
        exchange = plan.exchange
        if self._is_by_route:
            others = self._routes.read_as(
                plan.facts.host, exchange.method, exchange.path, plan.raw_target, plan.facts.selecting
            )
            if others:
                return [exchange.route, *(others - {exchange.route})]
        return (exchange.route,)


def values_of(parts: Sequence[ValueOf], plan: RequestPlan) -> list[str] | None:
    """Return the values of the parts of a limit's key; None if the request lacks one."""
    values = [value for part in parts if (value := part(plan)) is not None]
    return values if len(values) == len(parts) else None


def part_reader(part: str) -> ValueOf:
    """Return the function for the value of a part of a limit's key; its result is None if a request has none."""
    kind, _, name = part.partition(":")
    if kind == "header":
        return partial(_header, name.lower().encode())
    if kind == "claim":
        return partial(_claim, name)
    return {"client": _client, "address": _address, "organisation": _organisation, "route": _route}[kind]


def _client(plan: RequestPlan) -> str | None:
    client = plan.exchange.client
    return None if client is None else client.key


def _address(plan: RequestPlan) -> str | None:
    return address_key(plan.exchange.client_address)


def _route(plan: RequestPlan) -> str | None:
    return plan.exchange.route


def _organisation(plan: RequestPlan) -> str | None:
    credential = plan.exchange.credential
    return plan.facts.keyed.get(DESCRIBED_ORGANISATION) if credential is None else credential.organisation


def _header(name: bytes, plan: RequestPlan) -> str | None:
    return plan.facts.keyed.get(name)


def _claim(path: str, plan: RequestPlan) -> str | None:
    """Return a claim as text; the elements of a list with commas between them."""
    credential = plan.exchange.credential
    if not isinstance(credential, JwtProof):
        return plan.facts.keyed.get(DESCRIBED_CLAIM + path.encode())
    values = credential.token.claims.get(path, ())
    return ",".join([str(value).lower() if isinstance(value, bool) else str(value) for value in values]) or None


def _wait_ns(decision: Decision) -> float:
    return math.inf if decision.wait_ns == NEVER_NS else decision.wait_ns
