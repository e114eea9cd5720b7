"""The stages of admission, each of which decides one thing. `assembly.data_plane` puts them in order.

The last one, which charges the rate limits, is in `limit_stage`.
"""

from collections.abc import Callable, Mapping
from functools import partial

from api_gateway.clients.registry import ClientRegistry
from api_gateway.errors import (
    BadRequest,
    ClientIdInvalid,
    CredentialsRequired,
    GatewayError,
    LengthRequired,
    LoopDetected,
    MethodNotAllowed,
    StoreUnavailable,
)
from api_gateway.http1.headers import address_key
from api_gateway.http1.methods import KNOWN_METHODS, PROXIED_METHODS, REFUSED_METHODS
from api_gateway.models import Client
from api_gateway.proxy.admission import RequestPlan, StageResponse, StageResult, Wait
from api_gateway.proxy.deadline import deadline_of
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.identity_sources import HEADER_AND_ADDRESS, IdentitySources
from api_gateway.proxy.route_table import Route, RouteTable, upstream_target
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.fair_shares import principal_of
from api_gateway.resilience.priorities import PriorityClasses

_RETRY_AFTER = 1.0  # seconds
LIKELY_SHED_SHARE = 0.5  # share of requests shed at random from which the predicted outcome is a refusal


class ReadOnlyStage:
    """A decision without side effects: `inspect` calls `decide`."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        raise NotImplementedError

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        return self.decide(plan)

    def concerns(self, _facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return True


class AmbiguityStage(ReadOnlyStage):
    """Refuses requests by their header fields: ambiguous ones, loops, and those that need a length."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Refuse an ambiguous request, and have its connection closed; refuse a loop; require a length."""
        cause = plan.facts.ambiguity
        if cause is None:
            return None
        if plan.facts.is_loop:
            return LoopDetected(f"The request is in a loop: {cause}.")
        if plan.facts.is_length_required:
            return LengthRequired(cause, headers={"connection": "close"})
        return BadRequest(f"The request is ambiguous: {cause}.", headers={"connection": "close"})

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return facts.ambiguity is not None


class IdentityStage(ReadOnlyStage):
    """Determines the client of a request without a valid credential: that with the given id, or else the address.

    An id that anyone can send does not identify a client that is verified only.
    """

    def __init__(
        self,
        *,
        clients: ClientRegistry,
        priorities: PriorityClasses,
        sources: IdentitySources = HEADER_AND_ADDRESS,
        is_enforced: bool = True,
        on_bare: Callable[[Client], None] | None = None,
        on_observed: Callable[[RequestPlan, GatewayError], None] | None = None,
    ) -> None:
        """`on_bare` is called for each request that claims the id of a client with keys without one of them.

        Unless `is_enforced`, requests without a necessary credential are admitted, and `on_observed` is called with
        the error that would have refused them.
        """
        self._clients = clients
        self._priorities = priorities
        self._sources = sources
        self._is_enforced = is_enforced
        self.on_bare, self.on_observed = on_bare, on_observed
        self._silent = self  # the same without callbacks; not a copy, which a compiled class does not support
        if on_bare is not None or on_observed is not None:
            self._silent = IdentityStage(
                clients=clients, priorities=priorities, sources=sources, is_enforced=is_enforced
            )

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`; nothing is counted. A refused credential has left its request to the client's address."""
        return self._silent.decide(plan) if plan.exchange.client is None else None

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`. `CredentialStage` determines the client of a request with a credential, or refuses it."""
        return facts.claim is None or not self._is_enforced

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set client, priority and principal; the store is asked for a client that is not in memory."""
        facts = plan.facts
        if facts.version != self._clients.version:
            if plan.exchange.credential is not None:  # `CredentialStage` has determined the client
                return None
            name = facts.name if self._sources.accepts_header else None
            if facts.name_error is not None and self._sources.accepts_header:
                return ClientIdInvalid(facts.name_error)
            client = self._find(name, facts.client_address)
            if client is None:
                return Wait.on(partial(self._clients.look_up, name or ""), self._resume)
            if facts.claim is not None or self._is_bare(client) or not (name or self._sources.accepts_address):
                return self._resume(plan, client)  # decided anew for each request
            facts.client, facts.cost = client, -1.0
            facts.principal = principal_of(client, facts.client_address)
            facts.priority = self._priorities.of(client.quota.name)
            facts.version = self._clients.version
        plan.exchange.client = facts.client
        plan.principal, plan.priority = facts.principal, facts.priority
        return None

    def _find(self, name: str | None, address: str) -> Client | None:
        return self._clients.by_address(address_key(address)) if name is None else self._clients.try_get(name)

    @staticmethod
    def _is_bare(client: Client) -> bool:
        """Return whether the id of a client should have been proved."""
        return (client.is_verified_only or client.has_keys) and client.source != "address"

    def _resume(self, plan: RequestPlan, client: Client) -> StageResult:
        error: GatewayError | None = None
        if client.source == "address":
            if not self._sources.accepts_address:
                error = CredentialsRequired("The request has no credential that identifies a client.")
        elif self._is_bare(client):
            error = self._unproved(client)
        if error is not None:
            if self._is_enforced:
                plan.exchange.client = self._clients.by_address(address_key(plan.facts.client_address))
                return error
            if self.on_observed is not None:
                self.on_observed(plan, error)
        plan.exchange.client = client
        plan.principal = principal_of(client, plan.facts.client_address)
        plan.priority = self._priorities.of(client.quota.name)
        return None

    def _unproved(self, client: Client) -> GatewayError | None:
        """Return why a bare id is refused, None if it is admitted."""
        if self._clients.is_doubtful(client.id):
            return StoreUnavailable(
                f"Whether the client id '{client.id}' needs a credential is not known: the store is unavailable.",
                retry_after=_RETRY_AFTER,
            )
        if self.on_bare is not None:
            self.on_bare(client)
        if client.is_verified_only:
            return CredentialsRequired(f"The client id '{client.id}' needs a credential that proves it.")
        return None


class RouteStage(ReadOnlyStage):
    """Determines route, cost and the target for the upstream."""

    def __init__(self, routes: RouteTable) -> None:
        self._routes = routes

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set the route and what depends on it; refuse a request that has none, or whose method it does not allow."""
        exchange = plan.exchange
        try:
            if exchange.method in KNOWN_METHODS:
                route, exchange.cost = self._routes.find(
                    plan.facts.host, exchange.method, exchange.path, plan.raw_target, plan.facts.selecting
                )
            else:
                route, exchange.cost = self._find_for_unknown_method(plan)
            plan.route, exchange.route = route, route.name
            plan.target = upstream_target(route, plan.raw_target) if route.strip_prefix else plan.raw_target
        except GatewayError as error:
            return error.with_traceback(None)
        return None

    def _find_for_unknown_method(self, plan: RequestPlan) -> tuple[Route, float]:
        """Return the route and the cost: at least that of the method in upper case, as which some frameworks read it.

        Raises GatewayError; MethodNotAllowed for a method that is not forwarded, in any letter case.
        """
        host, exchange, fields = plan.facts.host, plan.exchange, plan.facts.selecting
        upper = exchange.method.upper()
        if upper in REFUSED_METHODS:
            raise MethodNotAllowed(
                f"The method {exchange.method} is not forwarded.", headers={"allow": PROXIED_METHODS}
            )
        route, cost = self._routes.find(host, exchange.method, exchange.path, plan.raw_target, fields)
        if upper != exchange.method:
            cost = max(cost, self._routes.find(host, upper, exchange.path, plan.raw_target, fields)[1])
        return route, cost


class DeadlineStage(ReadOnlyStage):
    """Determines the deadline of a request."""

    def __init__(self, totals: Mapping[str, float | None], *, have_routes_timeouts: bool = True) -> None:
        """`totals` are the timeouts of whole exchanges by upstream, in seconds."""
        self._totals = dict(totals)
        self._has_timeouts = have_routes_timeouts or any(total is not None for total in totals.values())

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set the deadline; refuse an invalid timeout of the client."""
        route = plan.route
        if route is None:  # inspected after a refusal
            return None
        total = self._totals.get(route.upstream)
        if total is None and route.timeout is None and not plan.facts.timeout:
            return None
        try:
            plan.deadline = deadline_of(route, total, plan.facts.timeout, plan.exchange.started)
        except BadRequest as error:
            return error.with_traceback(None)
        return None

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return self._has_timeouts or bool(facts.timeout)


class LoadSheddingStage:
    """Refuses a share of the requests while the event loop is overloaded, lowest priority first."""

    def __init__(self, shedder: EventLoopShedder) -> None:
        self._shedder = shedder

    def decide(self, plan: RequestPlan) -> StageResult:
        """Decide at random."""
        shedder = self._shedder
        return shedder.refusal(plan.priority) if shedder.is_over and shedder.sheds(plan.priority) else None

    def inspect(self, plan: RequestPlan) -> StageResult:
        """Predict the likelier outcome."""
        share = self._shedder.share(plan.priority)
        return self._shedder.refusal(plan.priority) if share >= LIKELY_SHED_SHARE else None

    def concerns(self, _facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return True


class DecisionNumberStage(ReadOnlyStage):
    """Numbers the decision that follows, for the access log."""

    def __init__(self, next_number: Callable[[], int]) -> None:
        self._next_number = next_number

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set the number of the decision."""
        plan.exchange.number = self._next_number()
        return None

    def inspect(self, _plan: RequestPlan) -> StageResult:
        """See `Stage`; nothing is numbered."""
        return None


class FinalRecipientStage(ReadOnlyStage):
    """Responds to OPTIONS with `Max-Forwards: 0` in place of the upstream (RFC 9110 section 7.6.2)."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Respond, or go on."""
        if not plan.facts.is_final_recipient:
            return None
        cors = plan.exchange.cors
        return StageResponse(204, [(b"allow", PROXIED_METHODS.encode()), *([] if cors is None else cors.pairs)])

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return facts.is_final_recipient
