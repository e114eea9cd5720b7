"""The routes of logged requests, of which host, header fields and query are not known.

A line names the route that its request had. So that route's host and conditions are taken to be met. For other routes
this is unknown, unless the configuration that wrote the log decides it. Where it makes a difference, the request is
counted as not evaluable, by route, and decided as if the conditions were not met.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from api_gateway.http1.methods import with_head
from api_gateway.limits.limit import Limit
from api_gateway.proxy.admission import RequestPlan, StageResult
from api_gateway.proxy.header_facts import HeaderFacts
from api_gateway.proxy.route_conditions import FieldValues
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.proxy.stages import RouteStage

MAX_PATHS = 50_000  # whose routes are remembered
_LOGGED_ROUTE = b"route"  # in place of a header field: the route of the line


@dataclass(frozen=True, slots=True)
class _HadRoute:
    """In place of a condition of a route: the log says that the request had the route. See `RouteCondition`."""

    name: bytes

    def holds(self, _query: bytes, fields: FieldValues) -> bool:
        """See `RouteCondition`."""
        return self.name in fields.get(_LOGGED_ROUTE, ())


class LoggedRoutes:
    """Finds the routes of logged requests under one configuration.

    `doubtful` are routes that the last request may have had instead; `doubts` counts requests by such routes.
    """

    def __init__(self, routes: Sequence[Route], limits: Sequence[Limit], writer: Sequence[Route] | None) -> None:
        """`writer` are the routes of the configuration that wrote the log, None if it is not known."""
        self.doubts: Counter[str] = Counter()
        self.doubtful: tuple[str, ...] = ()
        self._routes = {route.name: route for route in routes}
        self._limits = tuple(limits)
        self._is_conditional = any(map(_is_conditional, routes))
        self._writer = None if writer is None else {route.name: route for route in writer}
        self._writers_table = RouteTable(writer or ())
        self.table = RouteTable(
            [
                replace(route, conditions=tuple(_HadRoute(route.name.encode()) for _ in route.conditions))
                for route in routes
            ]
        )
        self._stage = RouteStage(self.table)
        self._found: dict[tuple[str | None, str, str], tuple[Route, float, tuple[str, ...]]] = {}

    def __repr__(self) -> str:
        return f"<LoggedRoutes {list(self._routes)}>"

    @property
    def is_conditional(self) -> bool:
        """True if a route depends on what is not logged."""
        return self._is_conditional

    def decide(self, plan: RequestPlan, logged: str | None) -> StageResult:
        """Set route and cost of a request for which the log has a route, None if it has none. See `RouteStage`."""
        exchange = plan.exchange
        key = logged if self._is_conditional else None, exchange.method, exchange.path
        found = self._found.get(key)
        if found is None:
            if self._is_conditional:
                self._describe(plan.facts, logged)
            outcome = self._stage.decide(plan)
            chosen = plan.route if outcome is None else None
            doubtful = self._doubtful(chosen, logged, exchange.method, exchange.path)
            if chosen is None:
                self._note(doubtful)
                return outcome
            if len(self._found) >= MAX_PATHS:
                self._found.clear()
            found = self._found[key] = chosen, exchange.cost, doubtful
        plan.route, exchange.cost, doubtful = found
        exchange.route = found[0].name
        self._note(doubtful)
        return None

    def _note(self, doubtful: tuple[str, ...]) -> None:
        self.doubtful = doubtful
        if doubtful:
            self.doubts.update(doubtful)

    def _describe(self, facts: HeaderFacts, logged: str | None) -> None:
        """Have the request meet host and conditions of the route that it had."""
        host = None if logged is None or logged not in self._routes else self._routes[logged].host
        facts.host = "" if host is None else host.replace("*", "any")
        facts.selecting = {} if logged is None else {_LOGGED_ROUTE: [logged.encode()]}

    def _doubtful(self, chosen: Route | None, logged: str | None, method: str, path: str) -> tuple[str, ...]:
        """Return the names of the routes that the request may have had, and that charge it differently."""
        return tuple(self._doubts_of(chosen, logged, method, path)) if self._is_conditional else ()

    def _doubts_of(self, chosen: Route | None, logged: str | None, method: str, path: str) -> Iterator[str]:
        for candidate in self.table.at_any_host(path):
            route = self._routes[candidate.name]
            if chosen is not None and route.name == chosen.name:
                if self._is_changed(route):
                    yield route.name
                return
            if not _is_conditional(route) or (chosen is not None and self._is_alike(route, chosen, method, path)):
                continue
            is_elsewhere = chosen is not None and chosen.name == logged and not _may_share_host(route, chosen)
            if not is_elsewhere and not self._was_passed_over(route, logged, path):
                yield route.name

    def _is_changed(self, route: Route) -> bool:
        """Return whether a route that the request had depends on something else now."""
        before = None if self._writer is None else self._writer.get(route.name)
        return before is not None and _is_conditional(route) and _place(before) != _place(route)

    def _was_passed_over(self, route: Route, logged: str | None, path: str) -> bool:
        """Return whether the request would have had this route in the log, had its host and conditions been met."""
        before = None if self._writer is None else self._writer.get(route.name)
        if before is None or _place(before) != _place(route):
            return False
        order = [one.name for one in self._writers_table.at_any_host(path)]
        return logged in order and route.name in order and order.index(route.name) < order.index(logged)

    def _is_alike(self, one: Route, other: Route, method: str, path: str) -> bool:
        """Return whether a request is charged in the same way with either route."""
        return (
            method in (with_head(one.methods) or {method})
            and one.addresses == other.addresses
            and one.cost_of(method, path) == other.cost_of(method, path)
            and all(_of_route(limit, one, method) == _of_route(limit, other, method) for limit in self._limits)
        )


class LoggedRouteStage:
    """The stage of a replay that determines route and cost. `logged` is the route of the line that is decided."""

    def __init__(self, routes: LoggedRoutes) -> None:
        self.logged: str | None = None
        self._routes = routes

    def decide(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        return self._routes.decide(plan, self.logged)

    def inspect(self, plan: RequestPlan) -> StageResult:
        """See `Stage`."""
        return self.decide(plan)

    def concerns(self, facts: HeaderFacts) -> bool:  # noqa: ARG002 - of every stage
        """See `Stage`."""
        return True


def route_notes(routes: Iterable[Route], doubts: Counter[str], *, has_writer: bool) -> Iterator[str]:
    """Yield a sentence for each route that requests may have had; `has_writer`: --current was given."""
    remedy = (
        "; with --current, the configuration that wrote the log, the replay decides this for the routes that it has"
    )
    remedy = "" if has_writer else remedy
    for route in routes:
        if doubts[route.name]:
            parts = [*([] if route.host is None else [f"host {route.host}"]), *map(str, route.conditions)]
            yield (
                f"route {route.name}: {', '.join(parts)}, which is not logged; {doubts[route.name]} requests that may"
                f" have had this route are decided by the route of the log, or as if they had not{remedy}"
            )


def _is_conditional(route: Route) -> bool:
    return route.host is not None or bool(route.conditions)


def _place(route: Route) -> tuple[object, ...]:
    """Return the terms that decide, together with other routes, which requests have a route."""
    return route.host, route.path, route.match, route.methods, route.conditions


def _of_route(limit: Limit, route: Route, method: str) -> tuple[bool, str | None]:
    return limit.concerns(route.name, method), route.name if "route" in limit.key else None


def _may_share_host(one: Route, other: Route) -> bool:
    """Return whether a request may be for the hosts of both routes."""
    if one.host is None or other.host is None:
        return True
    ends = [host.removeprefix("*") for host in (one.host, other.host)]
    if not one.host.startswith("*") and not other.host.startswith("*"):
        return ends[0] == ends[1]
    return ends[0].endswith(ends[1]) or ends[1].endswith(ends[0])
