"""Routes: the upstream, cost and upstream path of a request.

Pure. Paths are compared percent-decoded and by whole segments, and forwarded as they were sent. A path that servers
may read differently (see `http1.request_paths`), or whose letter case some servers ignore, costs as much as its most
expensive reading.

The module is long because a route's rules of costs and the table read paths in the same ways.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from api_gateway.clients.api_keys import quoted_path
from api_gateway.errors import BadRequest, MethodNotAllowed, NoRoute
from api_gateway.http1.methods import with_head
from api_gateway.http1.request_paths import has_dot_segment, is_below, is_unusual, matching_path, readings
from api_gateway.printable_text import shown_method
from api_gateway.proxy.address_rules import AddressRules
from api_gateway.proxy.compression import Compression
from api_gateway.proxy.content_cost import ContentCost
from api_gateway.proxy.cors import CorsPolicy
from api_gateway.proxy.direct_responses import DirectResponse
from api_gateway.proxy.fallback import Fallback
from api_gateway.proxy.head_editing import HeadEditor
from api_gateway.proxy.mirroring import Mirroring
from api_gateway.proxy.path_rewriting import PathRewriting
from api_gateway.proxy.path_table import PATH_PREFIX, PATH_TEMPLATE, PathTable, Pattern, is_placeholder
from api_gateway.proxy.requirements import Requirement
from api_gateway.proxy.route_conditions import NO_FIELDS, FieldValues, RouteCondition, meets
from api_gateway.proxy.upstream_split import UpstreamSplit
from api_gateway.proxy.url_rewriting import UrlRewriter

UNKNOWN_TARGET = b"%unknown"  # in place of a request target, by identity: only the decoded path is known
MAX_KNOWN_HOSTS = 4_096  # whose tables are remembered
MAX_COMBINED = 1_024  # routes with the rules of others that are remembered
MAX_SHOWN = 100  # characters of a host in a message

_PERCENT = ord("%")  # `in` finds an integer in bytes at once; for bytes it raises and drops an error first
_ENCODED_SLASH = re.compile(rb"%(?:2[fF]|5[cC])")
_NO_METHODS: frozenset[str] = frozenset()
_FEW_SEGMENTS = 8  # segments that are cut off from the end; more are cut off by splitting the beginning


@dataclass(frozen=True, slots=True)
class CostRule:
    """The cost in tokens of matching requests, instead of the route's cost; None matches any.

    `candidate_cost` is a cost that is evaluated but not charged, see `CandidateLimits`.
    """

    methods: frozenset[str] | None
    path: str | None
    cost: float
    candidate_cost: float | None = None

    def __str__(self) -> str:
        methods = "any method" if self.methods is None else " ".join(sorted(self.methods))
        return f"{methods} {'anywhere' if self.path is None else self.path}"

    def matches(self, method: str, path: str) -> bool:
        """Return whether the rule applies to a request; `path` is decoded and normalised."""
        return (self.methods is None or method in self.methods) and (self.path is None or is_below(path, self.path))


@dataclass(frozen=True, slots=True)
class Route:
    """A route. `host` and `methods` None match any; the first matching rule of `costs` replaces `cost` (tokens).

    `host` may begin with `*.` for all names below the rest. `match` is how `path` is compared, see `PathTable`;
    `conditions` are those on header fields and query parameters. `content_cost` is where responses state their actual
    cost, None if their content is not read. `timeout` is the timeout of the whole exchange in seconds, None for the
    upstream's. `min_body_rate` is the minimum rate of a request body in bytes per second, None for the server's.
    `url_rewriter` rewrites URLs in responses, None if they pass unread. `forward_credentials`: credentials of the
    gateway are forwarded. `requirement` is what the token of a request must have, None if it needs none. `cors` is the
    CORS policy, None if the gateway has none for the route. `addresses` are rules in addition to those for all routes.
    `split` chooses one of `variants`, which are the route with each of its upstreams. `rewriting` replaces the path
    for the upstream. `max_body_bytes`, `max_header_bytes` and `max_header_lines` None: the server's.
    `response_timeout` is the time in seconds until the head of the response to an attempt, None for the upstream's.
    `response` is that in place of an upstream. `compression` None: responses pass as they are. `mirroring` None:
    requests are not copied. `rewrites_urls`: URLs in responses get what is stripped from paths. `others` are the
    routes of other readings of the path of a request, whose rules of access apply to it too.
    """

    name: str
    path: str
    upstream: str
    strip_prefix: str = ""
    methods: frozenset[str] | None = None
    host: str | None = None
    match: str = PATH_PREFIX
    conditions: tuple[RouteCondition, ...] = ()
    cost: float = 1.0
    costs: tuple[CostRule, ...] = ()
    candidate_cost: float | None = None
    content_cost: ContentCost | None = None
    timeout: float | None = None
    min_body_rate: float | None = None
    fallback: Fallback | None = None
    url_rewriter: UrlRewriter | HeadEditor | None = None
    forward_credentials: bool = False
    requirement: Requirement | None = None
    requires_certificate: bool = False  # of the connection of a request
    cors: CorsPolicy | None = None
    addresses: AddressRules | None = None
    split: UpstreamSplit | None = None
    variants: Mapping[str, "Route"] = field(default_factory=dict, repr=False, compare=False)
    rewriting: PathRewriting | None = None
    max_body_bytes: int | None = None
    max_header_bytes: int | None = None
    max_header_lines: int | None = None
    response_timeout: float | None = None
    response: DirectResponse | None = None
    compression: Compression | None = None
    mirroring: Mirroring | None = None
    rewrites_urls: bool = True
    others: tuple["Route", ...] = field(default=(), repr=False, compare=False)

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

    def both_costs(self, method: str, path: str) -> tuple[float, float | None]:
        """Return cost and candidate cost of one reading of a path."""
        rule = self._rule_of(method, path)
        return (self.cost, self.candidate_cost) if rule is None else (rule.cost, rule.candidate_cost)

    @property
    def upstreams(self) -> tuple[str, ...]:
        """The names of all upstreams that requests may be sent to; none if the gateway responds itself."""
        return tuple(self.variants) or ((self.upstream,) if self.upstream else ())

    @property
    def uses_path(self) -> bool:
        """True if the path for the upstream is another one, or parts of it are values of header fields."""
        return self.rewriting is not None or (
            isinstance(self.url_rewriter, HeadEditor) and bool(self.url_rewriter.path)
        )

    @property
    def limits_head(self) -> bool:
        """True if the route limits the head of a request more than the server does."""
        return self.max_header_bytes is not None or self.max_header_lines is not None

    @property
    def is_simple(self) -> bool:
        """True if the route has none of the features that an exchange checks only for some upstreams."""
        return not self.watches_content and self.response_timeout is None

    @property
    def watches_content(self) -> bool:
        """True if the content of responses is read or changed."""
        return self.content_cost is not None or self.compression is not None

    @property
    def has_candidate(self) -> bool:
        """True if the route or one of its rules has a candidate cost."""
        return self.candidate_cost is not None or any(rule.candidate_cost is not None for rule in self.costs)


def without_case(route: Route) -> Route:
    """Return a route as a server has it that ignores letter case: with paths in lower case."""
    is_template = route.match == PATH_TEMPLATE
    segments = [one if is_template and is_placeholder(one) else one.casefold() for one in route.path.split("/")]
    path, costs = "/".join(segments), tuple([_rule_without_case(rule) for rule in route.costs])
    return route if path == route.path and costs == route.costs else replace(route, path=path, costs=costs)


def _rule_without_case(rule: CostRule) -> CostRule:
    return rule if rule.path is None else replace(rule, path=rule.path.casefold())


class RouteTable:
    """Finds the route of a request by precedence.

    1. The host: a name, then `*.` with the longest rest, then any host.
    2. The path: an exact one, then a template, then the longest prefix.
    3. The number of conditions on header fields and query parameters.
    4. The order in the configuration.

    The first path with a route whose conditions hold decides which methods are allowed: routes of the same path for
    other hosts may add some, other paths do not. HEAD has the route of GET where no route of the path takes HEAD. The
    route is selected by `matching_path`. No spelling of a path selects a cheaper cost rule, or avoids the rules of
    access of a route or its methods. The path is forwarded as it was sent.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = tuple(routes)
        by_host: dict[str | None, list[Route]] = {None: []}
        for route in routes:
            by_host.setdefault(route.host, []).append(route)
        tables = {host: PathTable(found) for host, found in by_host.items()}
        self._any: PathTable[Route] = tables.pop(None)
        self._hosts = {host: table for host, table in tables.items() if host is not None and not host.startswith("*")}
        self._suffixes = {host[1:]: table for host, table in tables.items() if host is not None and host[0] == "*"}
        self._has_hosts = bool(tables)
        folded = [without_case(route) for route in routes]
        self._has_case = any(one is not route for one, route in zip(folded, routes, strict=True))
        self._folded: RouteTable = RouteTable(folded) if self._has_case else self  # without letter case
        self._combined: dict[tuple[str, ...], Route] = {}
        self._known: dict[str, tuple[PathTable[Route], ...]] = {}  # the tables for hosts that were asked for

    def __repr__(self) -> str:
        return f"<RouteTable {sorted(route.path for route in self._routes)}>"

    def __iter__(self) -> Iterator[Route]:
        """Return all routes."""
        return iter(self._routes)

    def find(  # noqa: C901 - a call for each part would cost every request
        self,
        host: str,
        method: str,
        path: str,
        raw_target: bytes = UNKNOWN_TARGET,
        fields: FieldValues = NO_FIELDS,
    ) -> tuple[Route, float]:
        """Return the route of a request and its cost in tokens.

        `path` is percent-decoded; `raw_target` is the request target with the same path as sent, from which the
        readings are derived. `fields` are those that conditions read. Raises BadRequest for an ambiguous request,
        NoRoute, or MethodNotAllowed with the allowed methods.
        """
        # The cheap tests come first; what else is unusual can only be there if it was percent-encoded.
        if ("//" in path or "." in path or ";" in path or "\\" in path or _PERCENT in raw_target) and is_unusual(path):
            return self._find_dearest(host, method, path, raw_target, fields)
        table = self._tables(host)[0] if self._has_hosts else self._any
        plain, depth = table.plain, table.depth
        prefix, surplus = path, path.count("/") - depth
        if surplus > _FEW_SEGMENTS:
            prefix = "/".join(path.split("/", depth + 1)[: depth + 1])
        elif surplus > 0:  # the usual case, in one call
            prefix = path.rsplit("/", surplus)[0]
        longest = prefix
        while prefix:
            found = plain.get(prefix)
            if found is not None:
                for route in found:
                    if route.methods is None or method in route.methods:
                        # Without rules and without longer prefixes, nothing depends on the letter case of the rest.
                        if (route.costs or prefix is not longest or self._has_case) and self._has_other_case(path):
                            break
                        return route, route.cost_of(method, path) if route.costs else route.cost
                break
            prefix = prefix.rpartition("/")[0]
        if _PERCENT in raw_target and self._is_by_segments(host, raw_target):
            return self._find_dearest(host, method, path, raw_target, fields)
        query = raw_target.partition(b"?")[2]
        if self._has_other_case(path):
            return self._dearest_of(host, method, path, [path], query, fields)
        return self.route_of_reading(host, method, path, query, fields)

    def read_as(
        self, host: str, method: str, path: str, raw_target: bytes, fields: FieldValues = NO_FIELDS
    ) -> frozenset[str]:
        """Return the names of the routes of all readings of a path; empty if it has only one reading."""
        is_plain = not ("//" in path or "." in path or ";" in path or "\\" in path or _PERCENT in raw_target)
        found, names, query = [path], set(), raw_target.partition(b"?")[2]
        if not is_plain and (is_unusual(path) or self._is_by_segments(host, raw_target)):
            try:
                found = self._readings(host, path, raw_target)
            except ValueError:
                return frozenset()
        elif not self._has_other_case(path):
            return frozenset()
        for table, reading in self._with_other_case(found):
            with suppress(NoRoute, MethodNotAllowed, BadRequest):
                names.add(table.route_of_reading(host, method, reading, query, fields)[0].name)
        return frozenset(names)

    def at(
        self, host: str, path: str, raw_target: bytes = UNKNOWN_TARGET, fields: FieldValues = NO_FIELDS
    ) -> Route | None:
        """Return the first route for a path (percent-decoded), whichever its methods."""
        query = raw_target.partition(b"?")[2]
        with suppress(BadRequest):
            for _, routes in self._groups(host, matching_path(path)):
                for route in routes:
                    if meets(route.conditions, query, fields):
                        return route
        return None

    def at_any_host(self, path: str) -> list[Route]:
        """Return the routes for a path (percent-decoded) by precedence, whichever their hosts, conditions, methods."""
        suffixes = sorted(self._suffixes, key=len, reverse=True)
        tables = [*self._hosts.values(), *(self._suffixes[suffix] for suffix in suffixes), self._any]
        path = matching_path(path)
        return [route for table in tables for _, routes in table.groups(path) for route in routes]

    def passed_over(
        self, host: str, method: str, path: str, raw_target: bytes, fields: FieldValues
    ) -> list[tuple[Route, str]]:
        """Return the routes for host and path that precede the matched route, and why each does not match."""
        query, found = raw_target.partition(b"?")[2], []
        with suppress(BadRequest):
            for _, routes in self._groups(host, matching_path(path)):
                for route in routes:
                    failed = [str(one) for one in route.conditions if not one.holds(query, fields)]
                    if failed:
                        found.append((route, f"does not hold: {', '.join(failed)}"))
                    elif route.methods is None or method in route.methods:
                        return found
                    else:
                        found.append((route, f"takes {', '.join(sorted(route.methods))}, not {method}"))
        return self.passed_over(host, "GET", path, raw_target, fields) if method == "HEAD" else found

    def _tables(self, host: str) -> tuple[PathTable[Route], ...]:
        """Return the tables for a host, the most specific one first. Raises BadRequest for an ambiguous host."""
        known = self._known.get(host)
        if known is None:
            if "%" in host or ".." in host or host.endswith("."):
                raise BadRequest(f"The host is ambiguous: servers may read {host[:MAX_SHOWN]!a} differently.")
            found = [self._hosts[host]] if host in self._hosts else []
            labels = host.split(".")
            suffixes = ("." + ".".join(labels[cut:]) for cut in range(1, len(labels)))
            found += [self._suffixes[suffix] for suffix in suffixes if suffix in self._suffixes]
            if len(self._known) >= MAX_KNOWN_HOSTS:
                self._known.clear()
            known = self._known[host] = (*found, self._any)
        return known

    def _groups(self, host: str, path: str) -> list[tuple[Pattern, tuple[Route, ...]]]:
        """Return the routes for a host and a path by precedence, those of one path together."""
        if not self._has_hosts:
            return self._any.groups(path)
        return [group for table in self._tables(host) for group in table.groups(path)]

    def _is_by_segments(self, host: str, raw_target: bytes) -> bool:
        """Return whether it matters that servers may take an encoded slash in the path for a part of a segment."""
        if _ENCODED_SLASH.search(raw_target.partition(b"?")[0]) is None:
            return False
        tables = self._tables(host) if self._has_hosts else (self._any,)
        return any(table.has_segments for table in tables)

    def _readings(self, host: str, path: str, raw_target: bytes) -> list[str]:
        """Return all paths as which servers may read a path. Raises ValueError if there are too many."""
        if raw_target is UNKNOWN_TARGET:
            return readings(path, is_decoded=True)
        raw = raw_target.partition(b"?")[0]
        found = readings(raw.decode("latin-1"))
        if self._is_by_segments(host, raw):
            found += readings(_segment_wise(raw))
        return found

    def _has_other_case(self, path: str) -> bool:
        """Return whether a path, or that of a route, has upper-case letters, which some servers ignore."""
        return self._has_case or path.casefold() != path

    def _with_other_case(self, found: Sequence[str]) -> list[tuple["RouteTable", str]]:
        """Return readings of a path, each as it is and without letter case, with the table that has its route."""
        folded = dict.fromkeys(one.casefold() for one in found)
        known = () if self._has_case else found
        return [*((self, one) for one in found), *((self._folded, one) for one in folded if one not in known)]

    def _combined_with(self, route: Route, others: dict[str, Route]) -> Route:
        """Return a route with others whose rules of access apply, too."""
        key = (route.name, *others)
        known = self._combined.get(key)
        if known is None:
            if len(self._combined) >= MAX_COMBINED:
                self._combined.clear()
            further = tuple(others.values())
            variants = {name: replace(one, others=further) for name, one in route.variants.items()}
            known = self._combined[key] = replace(route, others=further, variants=variants)
        return known

    def route_of_reading(
        self, host: str, method: str, path: str, query: bytes, fields: FieldValues
    ) -> tuple[Route, float]:
        """Return the route and the cost of one reading, see `find`."""
        allowed, first = _NO_METHODS, None
        for pattern, routes in self._groups(host, path):
            if first is not None and pattern != first:
                continue
            for route in routes:
                if route.conditions and not meets(route.conditions, query, fields):
                    continue
                if route.methods is None or method in route.methods:
                    return route, route.cost_of(method, path) if route.costs else route.cost
                allowed, first = allowed | route.methods, pattern
        if method == "HEAD" and "GET" in allowed:
            route = self.route_of_reading(host, "GET", path, query, fields)[0]
            return route, route.cost_of(method, path)
        if allowed:
            names = ", ".join(sorted(with_head(allowed) or ()))
            detail = f"{quoted_path(path)} allows {names}, not {shown_method(method)}."
            raise MethodNotAllowed(detail, headers={"allow": names})
        raise NoRoute(f"No route matches {quoted_path(path)}.")

    def _find_dearest(
        self, host: str, method: str, path: str, raw_target: bytes, fields: FieldValues
    ) -> tuple[Route, float]:
        """Return the route of a path with several readings, and the cost of the most expensive one.

        Whether an encoded slash ends a segment must not decide about the route, which decides about more than the
        cost.
        """
        try:
            found = self._readings(host, path, raw_target)
        except ValueError as error:
            raise BadRequest(f"The path is ambiguous: {error}.") from None
        query, path = raw_target.partition(b"?")[2], matching_path(path)
        if self._is_by_segments(host, raw_target):
            whole = matching_path(unquote(_segment_wise(raw_target.partition(b"?")[0])))
            route = self.route_of_reading(host, method, path, query, fields)[0]
            if self.route_of_reading(host, method, whole, query, fields)[0] is not route:
                raise BadRequest("The path is ambiguous: whether an encoded slash ends a segment decides its route.")
        return self._dearest_of(host, method, path, found, query, fields)

    def _dearest_of(
        self, host: str, method: str, path: str, found: Sequence[str], query: bytes, fields: FieldValues
    ) -> tuple[Route, float]:
        """Return the route of a path in the form for matching, with those of its other readings, and the highest cost.

        Each reading must be allowed. A reading without a route is refused, unless it is one of a server that does not
        resolve dot segments. Readings with repeated slashes cost no more than those without.
        """
        route, cost = self.route_of_reading(host, method, path, query, fields)
        others: dict[str, Route] = {}
        for table, reading in self._with_other_case([one for one in found if "//" not in one]):
            try:
                other, price = table.route_of_reading(host, method, reading, query, fields)
            except NoRoute:
                if not has_dot_segment(reading):
                    raise
                continue
            cost = max(cost, price)
            if other.name != route.name:
                others[other.name] = other
        return (self._combined_with(route, others) if others else route), cost


def _segment_wise(raw_path: bytes) -> str:
    """Return a path as sent, with encoded slashes as characters that are a part of their segment."""
    return _ENCODED_SLASH.sub(b"%EF%BF%BF", raw_path).decode("latin-1")


def upstream_target(route: Route, target: bytes) -> bytes:
    """Return the request target for the upstream: path and query unchanged, without the route's prefix.

    Slashes after the prefix become one: servers may read what follows two at the beginning as a host. Raises
    BadRequest if the target does not begin with exactly the bytes of the prefix.
    """
    prefix = route.strip_prefix.encode()
    if not prefix:
        return target
    if not target.startswith(prefix) or target[len(prefix) : len(prefix) + 1] not in (b"", b"/", b"?"):
        raise BadRequest(f"The prefix {route.strip_prefix} cannot be removed: the path spells it differently.")
    return b"/" + target[len(prefix) :].lstrip(b"/")
