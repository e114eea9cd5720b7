"""Explanation of what the gateway would do with a request: nothing is charged, sent or changed.

`Admission.inspect` decides as it does for real requests; this module adds the figures.
"""

from collections.abc import Callable, Sequence
from urllib.parse import unquote

from api_gateway.admin.client_schema import TierView
from api_gateway.admin.explain_schema import (
    AddressExplained,
    BucketExplained,
    ClientExplained,
    DescribedCertificate,
    ExplainRequest,
    Explanation,
    ExtensionExplained,
    FallbackExplained,
    LagExplained,
    LimitExplained,
    PassedOver,
    RouteExplained,
    UpstreamExplained,
)
from api_gateway.admin.explained_parts import (
    ChargeOutlook,
    explained_bucket,
    explained_concurrency,
    explained_destination,
    explained_fallback,
    explained_result,
    explained_slots,
)
from api_gateway.clients.api_keys import shown_id
from api_gateway.downstream.client_certificate import as_client_id
from api_gateway.errors import CredentialsRequired, GatewayError, InvalidValue, StoreUnavailable
from api_gateway.http1.fast_parser import lines_of
from api_gateway.http1.headers import Fields
from api_gateway.http1.methods import IDEMPOTENT
from api_gateway.http1.request_head import RequestHead
from api_gateway.limits.concurrency import SlotUse
from api_gateway.limits.limit import Limit
from api_gateway.middleware import API_PREFIX, proxied_paths
from api_gateway.models import Client, ClientCertificate, Clock, Exchange, HeaderList, Quota
from api_gateway.proxy.admission import Admission, ExtensionCall, RequestPlan, Wait
from api_gateway.proxy.credential_stages import CredentialStage
from api_gateway.proxy.extension_stages import NO_RESULT, ExtensionIdentityStage
from api_gateway.proxy.fallback import add_failure, applies
from api_gateway.proxy.header_facts import HeaderReader, RewrittenHeaders
from api_gateway.proxy.identity_sources import Claim, Proof
from api_gateway.proxy.limit_stage import DESCRIBED_CLAIM, DESCRIBED_ORGANISATION, RateLimitStage
from api_gateway.proxy.route_table import Route
from api_gateway.proxy.stages import IdentityStage
from api_gateway.rate_limiter import RateLimiter
from api_gateway.resilience.breaker_policy import State
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.router import Router

_IDENTIFICATION = {
    "granted": "identified by {header}; its tier is a grant, by POST /clients/{{id}}/grants",
    "registered": "identified by {header}; its tier was set by POST /clients/{{id}}/tier",
    "configured": "identified by {header}; its tier is set in the configuration",
    "credential": "identified by {header}; a credential may state the tier, which is otherwise the default",
    "default": "identified by {header}; not registered, so it has the default tier, {address}",
    "address": "no {header}, so it is identified by its address and has the default tier",
    "unproved": "a credential must prove the client that {header} names, so the request is refused, and charged to its"
    " address",
    "doubtful": "{header} names a client; the store, which knows whether a credential must prove it, has been"
    " unavailable since the start, so the request is refused, and charged to its address",
}

_RECORD_UNKNOWN = "; the client store is unavailable, so it is unknown whether it has a record of this client"

_WITHOUT_END = 253_402_300_799.0  # the end of a certificate that has none, the year 9999 (RFC 5280 section 4.1.2.5)


class Explainer:
    """Explains described requests. Holds no state of its own."""

    def __init__(
        self,
        *,
        admission: Admission,
        headers: HeaderReader,
        router: Router,
        limits: RateLimitStage,
        limiter: RateLimiter,
        shedder: EventLoopShedder,
        header: str,
        is_known: Callable[[str], bool] = lambda _: True,
        claim_of_key: Callable[[str], Claim | None] = lambda _: None,
        response_calls: Sequence[ExtensionCall] = (),
        clock: Clock,
        clock_ns: Callable[[], int],
    ) -> None:
        """`header` is the name of the header that identifies clients. Both clocks must read the same time.

        `is_known` returns whether the record of an id in the client store is known, or known to be absent.
        `claim_of_key` returns the claim of the API key with an id, None if there is none. `response_calls` is what is
        shown for the hooks of responses.
        """
        self._is_known = is_known
        self._claim_of_key = claim_of_key
        self._response_calls = tuple(response_calls)
        self._admission = admission
        identity = (CredentialStage, IdentityStage, ExtensionIdentityStage)
        self._identification = Admission([stage for stage in admission.stages if isinstance(stage, identity)])
        self._headers = headers
        self._router = router
        self._is_proxied = proxied_paths(router.routes)
        self._limits = limits
        self._limiter = limiter
        self._shedder = shedder
        self._header = header
        self._clock = clock
        self._clock_ns = clock_ns

    async def client_of(self, peer: str, fields: Fields, version: str) -> Client:
        """Identify the client of a real request as admission does, which charges wrong credentials to the address.

        `peer` is the address of the connection. Raises GatewayError.
        """
        facts = self._headers.read(peer, fields, version)
        exchange = Exchange("", "GET", "", facts.client_address, self._clock())
        plan = RequestPlan(exchange, facts, b"", self._clock_ns())
        plan.headers = RewrittenHeaders(lines_of(_pairs(fields)), facts, b"")
        result = self._identification.decide(plan)
        while isinstance(result, Wait):
            result = Admission.resume(plan, result, await result.reply(), self._clock_ns())
        if isinstance(result, GatewayError):
            raise result
        assert exchange.client is not None  # noqa: S101 - `IdentityStage` is one of the stages
        return exchange.client

    def __repr__(self) -> str:
        return f"<Explainer of {self._router.routes!r}>"

    @property
    def limits(self) -> Sequence[Limit]:
        """The further limits: other than those of tiers and addresses."""
        return self._limits.limits

    @property
    def concurrency(self) -> Sequence[Limit]:
        """The limits of requests in flight."""
        return self._limits.concurrency

    @property
    def address_quota(self) -> Quota | None:
        """The quota of the address limit, None if it is disabled."""
        return self._limits.address_quota

    async def explain(self, request: ExplainRequest) -> Explanation:
        """Return the predicted decision with all figures behind it. Raises ClientIdInvalid and InvalidValue."""
        path = unquote(request.path.partition("?")[0])
        if not self._is_proxied(path):
            raise InvalidValue(f"path: must be below {API_PREFIX} or the path of a route, got {path!r}.")
        target = request.path.encode("ascii")
        head = RequestHead(request.method, target, _pairs(self._fields(request)), "1.1", 0, keep_alive=True)
        headers = self._headers.read_head(request.address, "http", head)
        facts = headers.facts
        if request.key_id is not None:
            facts.claim = self._claim_of_key(request.key_id)
            if facts.claim is None:
                raise InvalidValue(
                    f"key_id: there is no API key {shown_id(request.key_id)}, or api_key is not a source."
                )
        if request.certificate is not None:
            self._headers.certify(facts, _certificate(request.certificate))
        facts.keyed = {**facts.keyed, **_described(request)}
        plan = Admission.plan(facts, request.method, path, target, self._clock_ns())
        plan.headers = headers
        error = await self._admission.inspect(plan)
        exchange, route, client = plan.exchange, plan.route, plan.exchange.client
        if client is None:
            assert error is not None  # noqa: S101 - the client id is invalid
            raise error
        buckets = [ChargeOutlook(*pair) for pair in zip(exchange.charges, plan.inspected, strict=True)]
        binding = max(
            buckets, key=lambda bucket: (bucket.wait_ns, -bucket.charges_left if bucket.decision.allowed else 0)
        )
        if plan.direct is not None:
            error = None
        elif error is None and route is not None:
            error = self._refused(route, plan)
        fallback = self._fallback(route, error)
        candidate, candidate_uses = await self._candidate(client, exchange)
        return Explanation(
            result=explained_result(error, fallback, plan.direct),
            address=self._address_view(request),
            client=self._client_view(client, plan, error),
            route=None if route is None else self._route_view(route, plan),
            routes_passed_over=self._passed_over(plan),
            buckets=[explained_bucket(bucket) for bucket in buckets],
            limiting_bucket=binding.charge.key,
            concurrency=explained_slots(plan.slot_uses),
            limits_not_applied=[
                LimitExplained(name=limit.name, detail=why) for limit, why in self._limits.lacking(plan)
            ],
            candidate=candidate,
            candidate_concurrency=explained_slots(candidate_uses),
            upstream=None if route is None or route.response is not None else self._upstream_view(route, plan),
            fallback=fallback,
            event_loop=LagExplained(
                lag_seconds=round(self._shedder.lag, 6),
                shed_ratio=round(self._shedder.share(plan.priority), 3),
            ),
            decision_source=binding.decision.source,
            extensions=[
                ExtensionExplained.model_validate(call._asdict())
                for call in (*plan.extension_calls, *self._response_calls)
            ],
        )

    def _fields(self, request: ExplainRequest) -> Fields:
        fields = {b"host": [request.host.encode()]}
        fields |= {name.lower().encode(): [value.encode()] for name, value in request.headers.items()}
        if request.client_id is not None:
            fields[self._headers.id_header] = [request.client_id.encode()]
        if request.forwarded is not None:
            fields[self._headers.forwarding.read] = [request.forwarded.encode()]
        return fields

    def _address_view(self, request: ExplainRequest) -> AddressExplained:
        """Return the client's address as `HeaderReader` decides it, and the hop that it came from."""
        found = self._headers.address_of(request.address, self._fields(request))
        field = self._headers.forwarding.read.decode()
        if found.reporter is None:
            is_trusted = self._headers.is_trusted(request.address)
            detail = "the peer of the connection"
            if is_trusted:
                detail += f", a trusted proxy, whose {field} has no usable address"
            elif request.forwarded is not None:
                detail += f", which is not in server.trusted_proxies, so its {field} is not read"
            return AddressExplained(address=found.address, field=None, position=None, reported_by=None, detail=detail)
        return AddressExplained(
            address=found.address,
            field="forwarded" if field == "forwarded" else "x-forwarded-for",
            position=found.position,
            reported_by=found.reporter,
            detail=f"element {found.position} from the right of {field}, by the trusted proxy {found.reporter}",
        )

    def _refused(self, route: Route, plan: RequestPlan) -> GatewayError | None:
        """Return the error with which the upstream would refuse an admitted request; None if it accepts it."""
        upstream = self._router.upstream_clients[route.upstream].upstream
        is_safe = plan.exchange.method in IDEMPOTENT
        return upstream.refusal(self._clock(), plan.priority, principal=plan.principal, is_safe=is_safe)

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
        return explained_fallback(fallback, is_used=is_used)

    async def _candidate(self, client: Client, exchange: Exchange) -> tuple[BucketExplained | None, list[SlotUse]]:
        """Return the bucket and the slots of the candidates; neither if none concerns the request."""
        candidate_limits = self._limits.candidate_limits
        charges = [] if candidate_limits is None else candidate_limits.charges(exchange, client)
        if candidate_limits is None or not charges:
            return None, []
        decisions = await self._limiter.inspect(charges, self._clock_ns())
        return explained_bucket(ChargeOutlook(charges[0], decisions[0])), await candidate_limits.look(charges)

    def _client_view(self, client: Client, plan: RequestPlan, error: GatewayError | None) -> ClientExplained:
        exchange = plan.exchange
        quota, proof = client.quota, exchange.credential
        is_limited = self._limits.limits_address_of(client, exchange.client_address)
        source = proof.claim.source.name if isinstance(proof, Proof) else None
        words = (
            "and the address limit applies too" if is_limited else "and its address is exempt from the address limit"
        )
        basis: str = client.source
        if basis == "address" and plan.facts.name is not None:
            basis = "unproved" if isinstance(error, CredentialsRequired) else basis
            basis = "doubtful" if isinstance(error, StoreUnavailable) else basis
        is_known = client.source == "address" or self._is_known(client.id)
        return ClientExplained(
            id=client.id,
            tier_source=client.source,
            detail=_IDENTIFICATION[basis].format(header=source or self._header, address=words)
            + ("" if is_known else _RECORD_UNKNOWN),
            registered=client.is_registered,
            proved_by=source,
            verified_only=client.is_verified_only,
            address_limited=is_limited,
            tier=TierView(name=quota.name, rate=quota.rate, capacity=quota.capacity),
        )

    def _passed_over(self, plan: RequestPlan) -> list[PassedOver]:
        """Return the routes that precede the matched route, and why each does not match."""
        facts, exchange = plan.facts, plan.exchange
        found = self._router.routes.passed_over(
            facts.host, exchange.method, exchange.path, plan.raw_target, facts.selecting
        )
        return [PassedOver(name=route.name, detail=why) for route, why in found]

    def _route_view(self, route: Route, plan: RequestPlan) -> RouteExplained:
        exchange = plan.exchange
        rule = route.rule_for(exchange.method.upper(), exchange.path)
        source = "route" if rule is None else f"rule: {rule}"
        if exchange.cost != (route.cost if rule is None else rule.cost):
            source = "another reading of the path"
        if any(call.hook == "cost" and call.result != NO_RESULT for call in plan.extension_calls):
            source = "extension"
        return RouteExplained(
            name=route.name,
            path=route.path,
            match=route.match,
            host=route.host,
            conditions=[str(one) for one in route.conditions],
            upstream=route.upstream or None,
            destination=explained_destination(route, plan.raw_target),
            cost=exchange.cost,
            cost_source=source,
        )

    def _upstream_view(self, route: Route, plan: RequestPlan) -> UpstreamExplained:
        upstream, now = self._router.upstream_clients[route.upstream].upstream, self._clock()
        state, due = upstream.breaker.state_at(now), upstream.breaker.next_probe_at()
        return UpstreamExplained(
            name=upstream.name,
            circuit_breaker=state.value,
            next_probe_in_seconds=round(due - now, 3) if state is State.OPEN and due is not None else None,
            targets=len(upstream.targets),
            healthy_targets=sum(target.is_healthy and target.checks.at is not None for target in upstream.targets),
            unchecked_targets=sum(target.checks.at is None for target in upstream.targets),
            concurrency=None
            if upstream.limit is None
            else explained_concurrency(upstream.limit, plan.priority, plan.principal),
        )


def _pairs(fields: Fields) -> HeaderList:
    return [(name, value) for name, values in fields.items() for value in values]


def _described(request: ExplainRequest) -> dict[bytes, str]:
    """Return the claims of the described token by which limits count."""
    found = {DESCRIBED_CLAIM + path.encode(): value for path, value in request.claims.items()}
    return found if request.organisation is None else {**found, DESCRIBED_ORGANISATION: request.organisation}


def _certificate(described: DescribedCertificate) -> ClientCertificate:
    """Return the described certificate, with names as `client_certificate.certificate_of` has them."""
    names = described.model_dump(exclude={"not_after"}, exclude_none=True)
    for kind in ("common_name", "subject"):
        if kind in names:
            names[kind] = as_client_id(names[kind])
    end = _WITHOUT_END if described.not_after is None else described.not_after.timestamp()
    return ClientCertificate(tuple(names.items()), end)
