"""The stages of CORS, and the policies by route: see `proxy.cors`."""

from collections.abc import Collection

from api_gateway.errors import BadRequest, Forbidden, MethodNotAllowed, NoRoute
from api_gateway.models import CorsFields
from api_gateway.proxy.admission import RequestPlan, StageResponse, StageResult
from api_gateway.proxy.cors import CorsPolicy, Preflight
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.route_conditions import FieldValues
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.proxy.stages import ReadOnlyStage
from api_gateway.resilience.event_loop_limit import EventLoopShedder


class CorsPolicies:
    """The policies of a gateway: of its routes, and `default` of requests that have no route."""

    def __init__(self, routes: RouteTable, default: CorsPolicy | None) -> None:
        self.routes = routes
        self.default = default

    def __repr__(self) -> str:
        return f"<CorsPolicies [default {self.default!r}]>"

    def of_refusal(self, plan: RequestPlan) -> CorsFields | None:
        """Return the fields of a response that the gateway generates, also before the route is determined."""
        exchange, facts = plan.exchange, plan.facts
        if exchange.cors is not None or exchange.route is not None:
            return exchange.cors
        return self.at(facts.host, exchange.path, plan.raw_target, facts.selecting, facts.origin)

    def at(self, host: str, path: str, target: bytes, fields: FieldValues, origin: bytes | None) -> CorsFields | None:
        """Return the fields for a path (percent-decoded): of the route with any method that matches it, or default."""
        route = self.routes.at(host, path, target, fields)
        policy = self.default if route is None else route.cors
        return None if policy is None else policy.fields(origin)


class PreflightStage(ReadOnlyStage):
    """Responds to preflights for routes that have a policy. They have no client, and cost nothing."""

    def __init__(self, policies: CorsPolicies, *, shedder: EventLoopShedder, priority: int) -> None:
        """`priority` is that of preflights under overload."""
        self._policies = policies
        self._shedder = shedder
        self._priority = priority

    def decide(self, plan: RequestPlan) -> StageResult:
        """Respond to a preflight, or refuse it: its origin is not allowed, or the gateway is overloaded."""
        exchange, facts = plan.exchange, plan.facts
        asked, origin = facts.preflight, facts.origin
        if asked is None or origin is None or exchange.method != "OPTIONS":
            return None
        found = self._route(plan, asked)
        if found is None or found[0].cors is None:
            return None
        route, methods = found
        policy = route.cors
        assert policy is not None  # noqa: S101 - tested above
        exchange.route, exchange.cors = route.name, policy.fields(origin)
        shedder = self._shedder
        if shedder.is_over and shedder.sheds(self._priority):
            return shedder.refusal(self._priority)
        if not policy.allows(origin):
            return Forbidden(f"CORS: pages of the origin {_shown(origin)} may not use the route {route.name!r}.")
        return StageResponse(204, policy.preflight_fields(origin, asked, methods))

    def concerns(self, facts: HeaderFacts) -> bool:
        """See `Stage`."""
        return facts.preflight is not None

    def _route(self, plan: RequestPlan, asked: Preflight) -> tuple[Route, Collection[str] | None] | None:
        """Return the route of the request to come, and the methods that it allows; None if it has no route."""
        routes, facts, path = self._policies.routes, plan.facts, plan.exchange.path
        host, target, fields = facts.host, plan.raw_target, facts.selecting
        try:
            route, _ = routes.find(host, asked.method.decode("latin-1"), path, target, fields)
        except MethodNotAllowed as error:
            found = routes.at(host, path, target, fields)
            return None if found is None else (found, error.headers["allow"].split(", "))
        except (NoRoute, BadRequest):
            return None
        return route, route.methods


class CorsStage(ReadOnlyStage):
    """Determines the CORS fields of the response, by the policy of the route."""

    def decide(self, plan: RequestPlan) -> StageResult:
        """Set the fields."""
        route, facts = plan.route, plan.facts
        if facts.cors_route is not route:
            policy = None if route is None else route.cors
            facts.cors = None if policy is None else policy.fields(facts.origin)
            facts.cors_route = route
        plan.exchange.cors = facts.cors
        return None


def _shown(origin: bytes) -> str:
    """Return an origin for a message, shortened."""
    return ascii(origin[:100].decode("latin-1"))
