"""Explanation of what the gateway would do with a request: nothing is charged, sent or changed.

The explainer queries the objects that decide on real requests, in the same order, through the same pure functions.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from api_gateway.admin.explain_schema import (
    BucketExplained,
    ClientExplained,
    ConcurrencyExplained,
    ExplainRequest,
    Explanation,
    FallbackExplained,
    LagExplained,
    RouteExplained,
    UpstreamExplained,
    Verdict,
)
from api_gateway.errors import GatewayError, InvalidValue, Reason
from api_gateway.http1.headers import fields_of, host_name
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.limits.refusal import refusal
from api_gateway.middleware import IdentityMiddleware, RateLimitMiddleware, is_proxied
from api_gateway.models import NANOSECONDS, Charge, Client, Clock, Decision, Exchange, TierView
from api_gateway.proxy.fallback import Fallback, add_failure, applies
from api_gateway.proxy.route_table import Route, refuse_method, upstream_target
from api_gateway.rate_limiter import NEVER_NS, RateLimiter
from api_gateway.resilience.breaker_policy import State
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.fair_shares import holder_of
from api_gateway.router import Router

LIKELY_SHED_SHARE = 0.5  # share of requests shed at random from which the predicted outcome is a refusal

_IDENTIFICATION = {
    "granted": "identified by {header}; its tier is a grant, by POST /clients/{{id}}/grants",
    "registered": "identified by {header}; its tier was set by POST /clients/{{id}}/tier",
    "configured": "identified by {header}; its tier is set in the configuration",
    "default": "identified by {header}; not registered, so it has the default tier, {address}",
    "address": "no {header}, so it is identified by its address and has the default tier",
}


@dataclass(slots=True)
class _Bucket:
    """A hypothetical charge, and the decision of its bucket."""

    charge: Charge
    decision: Decision

    @property
    def debt_ns(self) -> int:
        """Nanoseconds until the bucket is full, without the charge, which is not made."""
        return self.decision.reset_ns - (self.charge.increment_ns if self.decision.allowed else 0)

    @property
    def wait_ns(self) -> float:
        """Nanoseconds until the bucket allows the charge; infinity if it never does."""
        return float("inf") if self.decision.wait_ns == NEVER_NS else self.decision.wait_ns

    @property
    def more(self) -> float:
        """How many such charges the bucket allows after this one."""
        left_ns = self.charge.quota.burst_ns - self.decision.reset_ns
        return left_ns / self.charge.increment_ns if self.charge.increment_ns else float("inf")


class Explainer:
    """Explains described requests. Holds no state of its own."""

    def __init__(
        self,
        *,
        identify: IdentityMiddleware,
        router: Router,
        limit: RateLimitMiddleware,
        limiter: RateLimiter,
        lag: EventLoopShedder | None = None,
        header: str,
        clock: Clock,
        clock_ns: Callable[[], int],
    ) -> None:
        """`header` is the name of the header that identifies clients. Both clocks must read the same time."""
        self._identify = identify
        self._router = router
        self._limit = limit
        self._limiter = limiter
        self._event_loop_shedder = lag or EventLoopShedder(None, router.priorities, source=random.Random())  # noqa: S311 - not used for security
        self._header = header
        self._clock = clock
        self._clock_ns = clock_ns

    def __repr__(self) -> str:
        return f"<Explainer of {self._router.routes!r}>"

    async def explain(self, request: ExplainRequest) -> Explanation:
        """Return the predicted outcome with all figures behind it. Raises ClientIdInvalid and InvalidValue."""
        target = request.path.encode("ascii")
        path = unquote(request.path.partition("?")[0])
        if not is_proxied(path):
            raise InvalidValue(f"path: must be /api or begin with /api/, got {path!r}.")
        exchange = Exchange("explain", request.method, path, request.address, self._clock())
        exchange.client = client = await self._client(exchange, request)
        priority = self._router.priorities.of(client.quota.name)
        holder = holder_of(client, exchange.peer)
        route, error = self._route(exchange, request)
        if error is None and self._event_loop_shedder.share(priority) >= LIKELY_SHED_SHARE:
            error = self._event_loop_shedder.refusal(priority)
        buckets = await self._inspect(self._limit.charges(client, exchange.peer, exchange.cost))
        binding = max(buckets, key=lambda bucket: (bucket.wait_ns, -bucket.more if bucket.decision.allowed else 0))
        if error is None and not binding.decision.allowed:
            error = refusal(exchange, binding.decision)
        if error is None and route is not None:
            error = self._refused(route, request.method, target, priority, holder)
        fallback = self._fallback(route, error)
        return Explanation(
            result=_verdict(error, fallback),
            client=self._client_view(client, exchange.peer),
            route=None if route is None else self._route_view(route, exchange),
            buckets=[_bucket_view(bucket) for bucket in buckets],
            limiting_bucket=binding.charge.key,
            candidate=await self._candidate(client, exchange),
            upstream=None if route is None else self._upstream_view(route, priority, holder),
            fallback=fallback,
            event_loop=LagExplained(
                lag_seconds=round(self._event_loop_shedder.lag, 6),
                shed_ratio=round(self._event_loop_shedder.share(priority), 3),
            ),
            decision_source=binding.decision.source,
        )

    async def _client(self, exchange: Exchange, request: ExplainRequest) -> Client:
        headers = []
        if request.client_id is not None:
            headers.append((self._header.encode(), request.client_id.encode()))
        exchange.peer, _, name = self._identify.caller(exchange.peer, fields_of(headers))
        return await self._identify.resolve_client(name, exchange.peer)

    def _route(self, exchange: Exchange, request: ExplainRequest) -> tuple[Route | None, GatewayError | None]:
        host = host_name({b"host": [request.host.encode()]})
        try:
            route, exchange.cost = self._router.routes.find(host, exchange.method, exchange.path)
        except GatewayError as error:
            return None, error
        exchange.route = route.name
        return route, None

    async def _inspect(self, charges: Sequence[Charge]) -> list[_Bucket]:
        decisions = await self._limiter.inspect(charges, self._clock_ns())
        return [_Bucket(charge, decision) for charge, decision in zip(charges, decisions, strict=True)]

    def _refused(
        self, route: Route, method: str, target: bytes, priority: int, holder: str | None
    ) -> GatewayError | None:
        """Return the error that would end a request that the limiter allows; None if there is none."""
        try:
            refuse_method(method)
            upstream_target(route, target)
        except GatewayError as error:
            return error
        upstream = self._router.upstream_clients[route.upstream].upstream
        return upstream.refusal(self._clock(), priority, holder=holder, is_safe=method in IDEMPOTENT)

    def _fallback(self, route: Route | None, error: GatewayError | None) -> FallbackExplained | None:
        """Return the route's fallback, and whether `error` would make the gateway use it."""
        fallback = None if route is None else route.fallback
        if fallback is None:
            return None
        is_used = error is not None and applies(fallback, error, is_repeatable=True, is_replayable=True)
        if is_used and error is not None and fallback.upstream is not None:
            other = self._router.upstream_clients[fallback.upstream].upstream.refusal(self._clock())
            if other is not None:
                add_failure(error, other)
            is_used = other is None
        return _fallback_view(fallback, is_used=is_used)

    async def _candidate(self, client: Client, exchange: Exchange) -> BucketExplained | None:
        shadow = self._limit.shadow
        if shadow is None:
            return None
        charges = shadow.charges(client, exchange.route, exchange.method, exchange.path, exchange.cost)
        found = await self._inspect(charges) if charges else []
        return _bucket_view(found[0]) if found else None

    def _client_view(self, client: Client, address: str) -> ClientExplained:
        quota = client.quota
        is_limited = self._limit.limits_address_of(client, address)
        words = (
            "and the address limit applies too" if is_limited else "and its address is exempt from the address limit"
        )
        return ClientExplained(
            id=client.id,
            tier_source=client.source,
            detail=_IDENTIFICATION[client.source].format(header=self._header, address=words),
            registered=client.is_registered,
            address_limited=is_limited,
            tier=TierView(name=quota.name, rate=quota.rate, capacity=quota.capacity),
        )

    def _route_view(self, route: Route, exchange: Exchange) -> RouteExplained:
        rule = route.rule_for(exchange.method, exchange.path)
        return RouteExplained(
            name=route.name,
            path=route.path,
            upstream=route.upstream,
            cost=exchange.cost,
            cost_source="route" if rule is None else f"rule: {rule}",
        )

    def _upstream_view(self, route: Route, priority: int, holder: str | None) -> UpstreamExplained:
        upstream, now = self._router.upstream_clients[route.upstream].upstream, self._clock()
        state, due = upstream.breaker.state_at(now), upstream.breaker.next_probe_at()
        return UpstreamExplained(
            name=upstream.name,
            circuit_breaker=state.value,
            next_probe_in_seconds=round(due - now, 3) if state is State.OPEN and due is not None else None,
            targets=len(upstream.targets),
            healthy_targets=sum(target.is_healthy and target.checks.at is not None for target in upstream.targets),
            unchecked_targets=sum(target.checks.at is None for target in upstream.targets),
            concurrency=None if upstream.limit is None else _concurrency_view(upstream.limit, priority, holder),
        )


_OUTCOMES: Mapping[Reason, Literal["limited", "exceeds_capacity"]] = {
    Reason.RATE_LIMITED: "limited",
    Reason.COST_EXCEEDS_CAPACITY: "exceeds_capacity",
}


def _verdict(error: GatewayError | None, fallback: FallbackExplained | None) -> Verdict:
    if error is None:
        detail = "Every bucket has enough tokens, and the upstream accepts requests."
        return Verdict(outcome="allowed", status=None, reason=None, retry_after_seconds=None, detail=detail)
    if fallback is not None and fallback.used:
        detail = f"{error.detail} The fallback '{fallback.name}' responds."
        reason = error.reason.value
        return Verdict(
            outcome="fallback", status=fallback.status, reason=reason, retry_after_seconds=None, detail=detail
        )
    return Verdict(
        outcome=_OUTCOMES.get(error.reason, "refused"),
        status=error.status,
        reason=error.reason.value,
        retry_after_seconds=error.retry_after,
        detail=error.detail,
    )


def _fallback_view(fallback: Fallback, *, is_used: bool) -> FallbackExplained:
    status = fallback.status if fallback.upstream is None else None
    return FallbackExplained(name=fallback.name, status=status, used=is_used)


def _concurrency_view(limit: ConcurrencyLimit, priority: int, holder: str | None) -> ConcurrencyExplained:
    return ConcurrencyExplained(
        limit=round(limit.limit, 1),
        tier_limit=limit.class_limits[priority],
        in_flight=limit.in_flight,
        allowed=not limit.is_full_for(priority, holder),
    )


def _bucket_view(bucket: _Bucket) -> BucketExplained:
    charge, decision = bucket.charge, bucket.decision
    quota = charge.quota
    return BucketExplained(
        key=charge.key,
        policy=quota.name.lower(),
        tokens=round((quota.burst_ns - bucket.debt_ns) / quota.emission_ns, 3),
        capacity=quota.capacity,
        cost=round(charge.increment_ns / quota.emission_ns, 6),
        allowed=decision.allowed,
        retry_after_seconds=None if decision.wait_ns == NEVER_NS else decision.wait_ns / NANOSECONDS,
        reset_after_seconds=round(bucket.debt_ns / NANOSECONDS, 3),
    )
