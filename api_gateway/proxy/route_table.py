"""Routes: the upstream, cost and upstream path of a request.

Pure. Paths are compared percent-decoded and by whole segments, and forwarded as they were sent. A path that servers
may read differently (see `http1.request_paths`) costs as much as its dearest reading.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from api_gateway.errors import BadRequest, MethodNotAllowed, NoRoute
from api_gateway.http1.request_paths import has_dot_segment, is_below, is_unusual, matching_path, readings
from api_gateway.proxy.address_rules import AddressRules
from api_gateway.proxy.content_cost import ContentCost
from api_gateway.proxy.cors import CorsPolicy
from api_gateway.proxy.fallback import Fallback
from api_gateway.proxy.requirements import Requirement
from api_gateway.proxy.url_rewriting import UrlRewriter

# In place of a request target, compared by identity:
UNKNOWN_TARGET = b"%unknown"  # only the decoded path is known
_READING = b"*reading"  # the path is one of the readings

_PERCENT = ord("%")  # `in` finds an integer in bytes at once; for bytes it raises and drops an error first
_NO_METHODS: frozenset[str] = frozenset()
_FEW_SEGMENTS = 8  # segments that are cut off from the end; more are cut off by splitting the beginning


@dataclass(frozen=True, slots=True)
class CostRule:
    """The cost in tokens of matching requests, instead of the route's cost; None matches any.

    `candidate_cost` is a cost that is evaluated but not charged, see `ShadowLimits`.
    """

    methods: frozenset[str] | None
    path: str | None
    cost: float
    candidate_cost: float | None = None

    def __str__(self) -> str:
        methods = "any method" if self.methods is None else " ".join(sorted(self.methods))
        return f"{methods} {'anywhere' if self.path is None else self.path}"

    def matches(self, method: str, path: str) -> bool:
        """Tell whether the rule applies to a request; `path` is decoded and normalised."""
        return (self.methods is None or method in self.methods) and (self.path is None or is_below(path, self.path))


@dataclass(frozen=True, slots=True)
class Route:
    """A route. `host` and `methods` None match any; the first matching rule of `costs` replaces `cost` (tokens).

    `content_cost` is where responses state their actual cost, None if their content is not read.
    `timeout` is the timeout of the whole exchange in seconds, None for the upstream's. `min_body_rate` is the minimum
    rate of a request body in bytes per second, None for the server's. `url_rewriter` rewrites URLs in responses, None
    if they pass unread. `forward_credentials`: credentials of the gateway are forwarded. `requirement` is what the
    token of a request must have, None if it needs none. `cors` is the CORS policy, None if the gateway has none for
    the route. `addresses` are rules besides those for all routes.
    """

    name: str
    path: str
    upstream: str
    strip_prefix: str = ""
    methods: frozenset[str] | None = None
    host: str | None = None
    cost: float = 1.0
    costs: tuple[CostRule, ...] = ()
    candidate_cost: float | None = None
    content_cost: ContentCost | None = None
    timeout: float | None = None
    min_body_rate: float | None = None
    fallback: Fallback | None = None
    url_rewriter: UrlRewriter | None = None
    forward_credentials: bool = False
    requirement: Requirement | None = None
    cors: CorsPolicy | None = None
    addresses: AddressRules | None = None

    def cost_of(self, method: str, path: str) -> float:
        """Return the cost of a request in tokens; `path` is decoded and normalised."""
        rule = self._rule_of(method, path)
        return self.cost if rule is None else rule.cost

    def rule_for(self, method: str, path: str) -> CostRule | None:
        """Return the rule that sets the cost of a request, or None if the route's cost applies."""
        return self._rule_of(method, matching_path(path))

    def _rule_of(self, method: str, path: str) -> CostRule | None:
        for rule in self.costs:
            if rule.matches(method, path):
                return rule
        return None

    def candidate_cost_of(self, method: str, path: str) -> float | None:
        """Return the candidate cost of a request in tokens, of its dearest reading; None if no reading has one."""
        if not is_unusual(path):
            return self._costs_of(method, path)[1]
        costs = [self._costs_of(method, one) for one in (matching_path(path), *readings(path, is_decoded=True))]
        if all(candidate is None for _, candidate in costs):
            return None
        return max(cost if candidate is None else candidate for cost, candidate in costs)

    def _costs_of(self, method: str, path: str) -> tuple[float, float | None]:
        rule = self._rule_of(method, path)
        return (self.cost, self.candidate_cost) if rule is None else (rule.cost, rule.candidate_cost)

    @property
    def has_candidate(self) -> bool:
        """True if the route or one of its rules has a candidate cost."""
        return self.candidate_cost is not None or any(rule.candidate_cost is not None for rule in self.costs)


class RouteTable:
    """Finds the route of a request: the longest path prefix; for equal prefixes, a route with a host first.

    The route is selected by `matching_path`. No spelling of a path selects a cheaper cost rule or avoids a route that
    is restricted to some methods. The path is forwarded as it was sent.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes: dict[str, list[Route]] = {}
        for route in sorted(routes, key=lambda route: route.host is None):
            self._routes.setdefault(route.path, []).append(route)
        # Longer paths are cut to the depth of the deepest route, so the time of a lookup is limited.
        self._depth = max((path.count("/") for path in self._routes), default=0)

    def __repr__(self) -> str:
        return f"<RouteTable {sorted(self._routes)}>"

    def __iter__(self) -> Iterator[Route]:
        """Return all routes."""
        return (route for routes in self._routes.values() for route in routes)

    def find(self, host: str, method: str, path: str, raw_target: bytes = UNKNOWN_TARGET) -> tuple[Route, float]:
        """Return the route of a request and its cost in tokens.

        `path` is percent-decoded; `raw_target` is the request target with the same path as sent, from which the
        readings are derived. Raises BadRequest for an ambiguous path, NoRoute, or MethodNotAllowed with the allowed
        methods.
        """
        # The cheap tests come first; what else is unusual can only be there if it was percent-encoded.
        if (
            raw_target is not _READING
            and ("//" in path or "." in path or ";" in path or "\\" in path or _PERCENT in raw_target)
            and is_unusual(path)
        ):
            return self._find_dearest(host, method, path, raw_target)
        prefix, surplus = path, path.count("/") - self._depth
        if surplus > _FEW_SEGMENTS:
            prefix = "/".join(path.split("/", self._depth + 1)[: self._depth + 1])
        elif surplus > 0:  # the usual case, in one call
            prefix = path.rsplit("/", surplus)[0]
        while prefix:
            found = self._routes.get(prefix)
            if found is not None:
                allowed = _NO_METHODS
                for route in found:
                    if route.host is None or route.host == host:
                        if route.methods is None or method in route.methods:
                            return route, route.cost_of(method, path) if route.costs else route.cost
                        allowed = allowed | route.methods
                if allowed:
                    names = ", ".join(sorted(allowed))
                    raise MethodNotAllowed(f"{path} allows {names}, not {method}.", headers={"allow": names})
            prefix = prefix.rpartition("/")[0]
        raise NoRoute(f"No route matches {path}.")

    def read_as(self, host: str, method: str, path: str, raw_target: bytes) -> frozenset[str]:
        """Return the names of the routes of all readings of a path; empty if it has only one reading."""
        is_plain = not ("//" in path or "." in path or ";" in path or "\\" in path or _PERCENT in raw_target)
        if is_plain or not is_unusual(path):
            return frozenset()
        names = set()
        with suppress(ValueError):
            for reading in readings(raw_target.partition(b"?")[0].decode("latin-1")):
                with suppress(NoRoute, MethodNotAllowed):
                    names.add(self.find(host, method, reading, _READING)[0].name)
        return frozenset(names)

    def at(self, host: str, path: str) -> Route | None:
        """Return the first route of the longest prefix of a path (percent-decoded), whichever its methods."""
        prefix = "/".join(matching_path(path).split("/", self._depth + 1)[: self._depth + 1])
        while prefix:
            for route in self._routes.get(prefix, ()):
                if route.host is None or route.host == host:
                    return route
            prefix = prefix.rpartition("/")[0]
        return None

    def _find_dearest(self, host: str, method: str, path: str, raw_target: bytes) -> tuple[Route, float]:
        """Return the route of a path with several readings, and the cost of the dearest one.

        Each reading must be allowed. A reading without a route is refused, unless it is one of a server that does not
        resolve dot segments. Readings with repeated slashes cost no more than those without.
        """
        try:
            if raw_target is UNKNOWN_TARGET:
                found = readings(path, is_decoded=True)
            else:
                found = readings(raw_target.partition(b"?")[0].decode("latin-1"))
        except ValueError as error:
            raise BadRequest(f"The path is ambiguous: {error}.") from None
        route, cost = self.find(host, method, matching_path(path), _READING)
        for reading in found:
            if "//" in reading:
                continue
            try:
                cost = max(cost, self.find(host, method, reading, _READING)[1])
            except NoRoute:
                if not has_dot_segment(reading):
                    raise
        return route, cost


def upstream_target(route: Route, target: bytes) -> bytes:
    """Return the request target for the upstream: path and query unchanged, without the route's prefix.

    Raises BadRequest if the target does not begin with exactly the bytes of the prefix.
    """
    prefix = route.strip_prefix.encode()
    if not prefix:
        return target
    if not target.startswith(prefix) or target[len(prefix) : len(prefix) + 1] not in (b"", b"/", b"?"):
        raise BadRequest(f"The prefix {route.strip_prefix} cannot be removed: the path spells it differently.")
    rest = target[len(prefix) :]
    return rest if rest.startswith(b"/") else b"/" + rest
