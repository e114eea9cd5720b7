"""Rules between settings: unknown references, contradictions, and settings that can have no effect."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import SecretStr

from api_gateway.http1.methods import with_head
from api_gateway.http1.request_paths import is_below
from api_gateway.settings.admin import AdminSection
from api_gateway.settings.clients import AddressLimitSection, CandidateSection, ClientSection, TierSection
from api_gateway.settings.cors import CorsSection, cors_findings, cors_warnings
from api_gateway.settings.credential_rules import key_findings, unused_credentials
from api_gateway.settings.diagnostics import KeyPath, path_text
from api_gateway.settings.extensions import ExtensionSection
from api_gateway.settings.identity import IdentitySection
from api_gateway.settings.limit_rules import allowances, limit_findings, unpaid_by_tier
from api_gateway.settings.limits import AllowanceSection, LimitCandidateSection, LimitSection
from api_gateway.settings.listener_rules import listener_findings
from api_gateway.settings.route_action_rules import action_findings
from api_gateway.settings.route_match_rules import match_findings
from api_gateway.settings.route_rules import never_reached, path_problem, unused_cost_rules
from api_gateway.settings.routes import RouteSection
from api_gateway.settings.server import ServerSection
from api_gateway.settings.store import StoreSection
from api_gateway.settings.suggestions import nearest
from api_gateway.settings.upstreams import UpstreamSection

MAX_BUDGET = 2_000_000  # seconds; twice as many nanoseconds are exact in the store's arithmetic
MAX_FILL = 10 * 365.25 * 86_400  # seconds for a bucket to fill: its times then fit into 15 digits, and into 63 bits


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake at a place, or a reason for a warning; valid only if the settings at `depends_on` are valid."""

    path: KeyPath
    message: str
    shown_value: str = ""
    depends_on: tuple[KeyPath, ...] = ()

    def __str__(self) -> str:
        return f"{self.shown_value or path_text(self.path)}: {self.message}"

    def concerns(self, wrong: KeyPath) -> bool:
        """Return whether the finding may be only a consequence of a mistake at `wrong`."""
        if self.path[: len(wrong)] == wrong or wrong[: len(self.path)] == self.path:
            return True
        return any(other[: len(wrong)] == wrong for other in self.depends_on)


class ConfigSections(Protocol):
    """The sections that the rules read."""

    @property
    def admin(self) -> AdminSection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def server(self) -> ServerSection: ...  # noqa: D102
    @property
    def store(self) -> StoreSection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def address_limit(self) -> AddressLimitSection: ...  # noqa: D102
    @property
    def identity(self) -> IdentitySection: ...  # noqa: D102
    @property
    def tiers(self) -> Mapping[str, TierSection]: ...  # noqa: D102
    @property
    def default_tier(self) -> str: ...  # noqa: D102
    @property
    def clients(self) -> Mapping[str, ClientSection]: ...  # noqa: D102
    @property
    def limits(self) -> Sequence[LimitSection]: ...  # noqa: D102
    @property
    def upstreams(self) -> Mapping[str, UpstreamSection]: ...  # noqa: D102
    @property
    def routes(self) -> Sequence[RouteSection]: ...  # noqa: D102
    @property
    def cors(self) -> CorsSection | None: ...  # noqa: D102
    @property
    def extensions(self) -> Sequence[ExtensionSection]: ...  # noqa: D102


def find_errors(config: ConfigSections) -> Iterator[Finding]:
    """Yield every mistake that cannot be found in one setting alone."""
    yield from _store_findings(config)
    yield from _token_findings(config)
    yield from _tier_findings(config)
    for key_path, message, depends_on in (*listener_findings(config), *key_findings(config)):
        yield Finding(key_path, message, depends_on=depends_on)
    for key_path, message, depends_on in limit_findings(config):
        yield _of_limit(config, key_path, message, depends_on)
    yield from _jwt_findings(config)
    if config.admin.tls and (config.server.tls is None or config.admin.listen is None):
        message = "needs admin.listen and the certificates of server.tls, got True"
        yield Finding(("admin", "tls"), message, depends_on=(("admin", "listen"), ("server", "tls")))
    if config.cors is not None:
        for key, message in cors_findings(config.cors):
            yield Finding(("cors", *key), message)
    for name, upstream in config.upstreams.items():
        key_path = ("upstreams", name)
        yield from _concurrency_findings(key_path, upstream)
        yield from _breaker_findings(key_path, upstream)
        if upstream.hash_on != "client" and upstream.balance != "hash":
            message = f"needs balance: hash, got {upstream.hash_on!r} with {upstream.balance!r}"
            yield Finding((*key_path, "hash_on"), message, depends_on=((*key_path, "balance"),))
    yield from _extension_findings(config)
    yield from _route_findings(config)


def _extension_findings(config: ConfigSections) -> Iterator[Finding]:
    names: dict[str, int] = {}
    for index, extension in enumerate(config.extensions):
        first = names.setdefault(extension.name, index)
        if first != index:
            place = ("extensions", str(first), "name")
            message = (
                f"already the name of extensions[{first}] ({config.extensions[first].use}), got {extension.name!r}"
            )
            yield Finding(("extensions", str(index), "name"), message, depends_on=(place,))


def access_warnings(config: ConfigSections) -> Iterator[Finding]:
    """Yield settings by which strangers may get more access than intended, or clients cannot be told apart."""
    if config.cors is not None:
        for key, message in cors_warnings(config.cors):
            yield Finding(("cors", *key), message)
    for index, route in enumerate(config.routes):
        for key, message in () if route.cors is None else cors_warnings(route.cors):
            yield _of_route(route, ("routes", str(index), "cors", *key), message)
    server = config.server
    if server.forwarded.read == "forwarded" and not server.trusted_proxies:
        message = f"has no effect without server.trusted_proxies, got {server.forwarded.read!r}"
        yield Finding(("server", "forwarded", "read"), message)
    for key_path, message in unused_credentials(config):
        yield Finding(key_path, message)


def find_warnings(config: ConfigSections) -> Iterator[Finding]:
    """Yield settings that are valid and probably not intended."""
    yield from access_warnings(config)
    used = {name for route in config.routes for name in route.upstream_names}
    used |= {route.fallback.upstream or "" for route in config.routes if route.fallback}
    used |= {route.mirror.upstream for route in config.routes if route.mirror}
    for name, upstream in config.upstreams.items():
        key_path = ("upstreams", name)
        is_tls = any(target.url.startswith("https:") for target in upstream.targets)
        if upstream.http2 and not upstream.uses_http2:
            yield Finding((*key_path, "http2"), "has no effect, as not all targets are https")
        if not is_tls and any((upstream.tls.ca_file, upstream.tls.cert_file, upstream.tls.key_file)):
            yield Finding((*key_path, "tls"), "has no effect without an https target")
        if name not in used:
            yield Finding(key_path, "no route uses this upstream")
    yield from _certificate_warnings(config)
    if config.identity.jwt.issuers and "jwt" not in config.identity.sources:
        yield Finding(("identity", "jwt", "issuers"), "has no effect, as identity.sources does not name jwt")
    for index, route in enumerate(config.routes):
        for number, other in unused_cost_rules(route.costs):
            rule: KeyPath = ("routes", str(index), "costs", str(number))
            message = f"is never applied: costs[{other}] before it matches all of its requests"
            yield _of_route(route, rule, message)
    yield from (Finding(place, message) for place, message in unpaid_by_tier(config))


def _certificate_warnings(config: ConfigSections) -> Iterator[Finding]:
    """Yield settings that need certificates of clients if there can be none, at least on the gateway's own server."""
    tls = config.server.tls
    if tls is not None and tls.client_certificates is not None:
        return
    missing = "server.tls.client_certificates names no authority of clients"
    if "certificate" in config.identity.sources:
        yield Finding(("identity", "sources"), f"certificate has no effect: {missing}")
    for index, route in enumerate(config.routes):
        if route.require_certificate:
            message = f"refuses all requests: {missing}"
            yield _of_route(route, ("routes", str(index), "require_certificate"), message)


def _store_findings(config: ConfigSections) -> Iterator[Finding]:
    if config.store.clients == "store" and not config.store.is_shared:
        message = "memory:// does not survive a restart; keep clients in a file with sqlite or auto, got 'store'"
        yield Finding(("store", "clients"), message, depends_on=(("store", "url"), ("store", "url_file")))
    if not config.store.is_shared:
        return
    for key_path, term in _all_terms(config):
        seconds = _fill_time(term)
        if "candidate" not in key_path and seconds > MAX_BUDGET:
            yield Finding(
                key_path, f"takes {seconds:g} s to fill; in a shared store a bucket may take at most {MAX_BUDGET} s"
            )


def _token_findings(config: ConfigSections) -> Iterator[Finding]:
    tokens: list[tuple[KeyPath, SecretStr | None]] = [(("admin", "token"), config.admin.token)]
    tokens += [(("admin", "tokens", name, "token"), section.token) for name, section in config.admin.tokens.items()]
    key_paths: dict[str, KeyPath] = {}
    for key_path, token in tokens:
        if token is not None:
            first = key_paths.setdefault(token.get_secret_value(), key_path)
            if first != key_path:
                yield Finding(key_path, f"is the same token as {path_text(first)}", depends_on=(first,))


def _tier_findings(config: ConfigSections) -> Iterator[Finding]:
    known = ", ".join(config.tiers)
    if config.default_tier not in config.tiers:
        message = f"no such tier, got {config.default_tier!r}; the tiers are {known}"
        yield Finding(("default_tier",), message, depends_on=(("tiers",), ("tiers", config.default_tier)))
    for key_path, terms in _all_terms(config):
        seconds = _fill_time(terms)
        if seconds > MAX_FILL:
            yield Finding(key_path, f"the bucket must fill within {MAX_FILL:g} s (ten years), got {seconds:g}")
    for client_id, client in config.clients.items():
        if client.tier is not None and client.tier not in config.tiers:
            message = f"no such tier, got {client.tier!r}; the tiers are {known}"
            depends_on: tuple[KeyPath, ...] = (("tiers",), ("tiers", client.tier))
            yield Finding(("clients", client_id, "tier"), message, depends_on=depends_on)
    unranked = [name for name, tier in config.tiers.items() if tier.priority is None]
    if unranked and len(unranked) < len(config.tiers):
        message = "every tier needs a priority if one tier has one, got None"
        yield Finding(("tiers", unranked[0], "priority"), message, depends_on=(("tiers",),))


def _jwt_findings(config: ConfigSections) -> Iterator[Finding]:
    identity, key_path = config.identity, ("identity", "jwt", "issuers")
    is_used = "jwt" in identity.sources
    if is_used and not identity.jwt.issuers:
        yield Finding(
            key_path, "needs an issuer, as identity.sources names jwt", depends_on=(("identity", "sources"),)
        )
    first: dict[str, str] = {}
    for name, issuer in identity.jwt.issuers.items():
        other = first.setdefault(issuer.issuer, name)
        if other != name:
            yield Finding((*key_path, name, "issuer"), f"is also that of {other!r}, got {issuer.issuer!r}")
        for header in issuer.headers:
            if header.lower() in (identity.header.lower(), identity.api_key.header.lower()):
                message = "clients send it, so it cannot have a claim"
                yield Finding((*key_path, name, "headers", header), message, depends_on=(("identity", "header"),))
        for value, tier in issuer.tiers.items():
            if tier not in config.tiers:
                message = f"no such tier, got {tier!r}; the tiers are {', '.join(config.tiers)}"
                yield Finding((*key_path, name, "tiers", value), message, depends_on=(("tiers",),))
    for index, route in enumerate(config.routes):
        if route.require is not None and not is_used:
            message = "needs jwt in identity.sources, or no request is admitted"
            place: KeyPath = ("routes", str(index), "require")
            yield _of_route(route, place, message, (("identity", "sources"),))


_Terms = TierSection | CandidateSection | AddressLimitSection | AllowanceSection | LimitCandidateSection


def _fill_time(terms: _Terms) -> float:
    """Return the seconds in which a bucket fills; 0 without a rate."""
    return (terms.capacity or 0) / terms.rate if terms.rate else 0.0


def _all_terms(config: ConfigSections) -> Iterator[tuple[KeyPath, _Terms]]:
    yield ("address_limit",), config.address_limit
    for name, tier in config.tiers.items():
        yield ("tiers", name), tier
        if tier.candidate is not None:
            yield ("tiers", name, "candidate"), tier.candidate
    for index, limit in enumerate(config.limits):
        for key_path, section in allowances(limit):
            yield ("limits", str(index), *key_path), section
            if section.candidate is not None:
                yield ("limits", str(index), *key_path, "candidate"), section.candidate


def _concurrency_findings(upstream_path: KeyPath, upstream: UpstreamSection) -> Iterator[Finding]:
    section, key_path = upstream.concurrency, (*upstream_path, "concurrency")
    if section is None:
        return
    if (section.limit is None) == (section.adaptive is None):
        got = "both" if section.limit is not None else "neither"
        yield Finding(key_path, f"needs either limit or adaptive, got {got}")
    adaptive = section.adaptive
    if adaptive is not None and adaptive.min_limit > adaptive.max_limit:
        message = f"must be at most max_limit, {adaptive.max_limit}, got {adaptive.min_limit}"
        yield Finding(
            (*key_path, "adaptive", "min_limit"), message, depends_on=((*key_path, "adaptive", "max_limit"),)
        )


def _breaker_findings(upstream_path: KeyPath, upstream: UpstreamSection) -> Iterator[Finding]:
    breaker, key_path = upstream.circuit_breaker, (*upstream_path, "circuit_breaker")

    def finding(key: str, message: str, *other: str) -> Finding:
        return Finding((*key_path, key), message, depends_on=tuple((*key_path, one) for one in other))

    longest = breaker.max_recovery_timeout
    if longest is not None and longest < breaker.recovery_timeout:
        yield finding(
            "max_recovery_timeout",
            f"must be at least recovery_timeout ({breaker.recovery_timeout:g}), got {longest:g}",
            "recovery_timeout",
        )
    if breaker.slow_call_rate is not None and breaker.slow_call_duration is None:
        message = f"needs slow_call_duration, got {breaker.slow_call_rate:g} alone"
        yield finding("slow_call_rate", message, "slow_call_duration")
    if breaker.slow_call_duration is not None and breaker.slow_call_rate is None:
        message = f"needs slow_call_rate, got {breaker.slow_call_duration:g} alone"
        yield finding("slow_call_duration", message, "slow_call_rate")
    if breaker.window_calls is not None and breaker.window_calls < breaker.minimum_calls:
        yield finding(
            "window_calls",
            f"must be at least minimum_calls ({breaker.minimum_calls}), or no rate is ever computed, got"
            f" {breaker.window_calls}",
            "minimum_calls",
        )


def _of_limit(config: ConfigSections, key_path: KeyPath, message: str, depends_on: tuple[KeyPath, ...]) -> Finding:
    """Return a finding whose place, given within `limits`, shows the name of the limit after its index."""
    number, *rest = key_path
    below = path_text(("", *rest)) if rest else ""
    shown = f"limits[{number}] ({config.limits[int(number)].name}){below}"
    return Finding(("limits", *key_path), message, shown, depends_on)


def _of_route(route: RouteSection, key_path: KeyPath, message: str, depends_on: tuple[KeyPath, ...] = ()) -> Finding:
    """Return a finding whose place shows the name of the route after its index."""
    _, number, *rest = key_path
    return Finding(key_path, message, f"routes[{number}] ({route.name}).{path_text(tuple(rest))}", depends_on)


def _route_findings(config: ConfigSections) -> Iterator[Finding]:
    names: dict[str, int] = {}
    for index, route in enumerate(config.routes):
        key_path = ("routes", str(index))
        for key, message, depends_on in (
            *_reference_findings(config, route),
            *match_findings(config, route),
            *action_findings(config, route, config.upstreams),
            *_cost_findings(config, route),
            *_route_cors_findings(route),
        ):
            yield _of_route(route, (*key_path, *key), message, depends_on)
        if route.name in names:
            message = f"already the name of routes[{names[route.name]}]"
            yield _of_route(route, (*key_path, "name"), message, (("routes", str(names[route.name]), "name"),))
        names.setdefault(route.name, index)
    for index, other, message in never_reached(config.routes):
        keys = ("path", "host", "methods", "match")
        matched = tuple(("routes", str(number), key) for number in (index, other) for key in keys)
        yield _of_route(config.routes[index], ("routes", str(index), "path"), message, matched)


_Wrong = tuple[KeyPath, str, tuple[KeyPath, ...]]


def _reference_findings(config: ConfigSections, route: RouteSection) -> Iterator[_Wrong]:
    if route.upstream is not None and route.upstream not in config.upstreams:
        hint = nearest(route.upstream, config.upstreams)
        yield ("upstream",), f"no such upstream, got {route.upstream!r}{hint}", (("upstreams",),)
    other = None if route.fallback is None else route.fallback.upstream
    if other is not None and other not in config.upstreams:
        hint = nearest(other, config.upstreams)
        yield ("fallback", "upstream"), f"no such upstream, got {other!r}{hint}", (("upstreams",),)
    elif other is not None and other in route.upstream_names:
        message = f"must be another upstream than the route's own, got {other!r}"
        yield ("fallback", "upstream"), message, ()


def _route_cors_findings(route: RouteSection) -> Iterator[_Wrong]:
    if route.cors is not None:
        for key, message in cors_findings(route.cors):
            yield ("cors", *key), message, ()


def _cost_findings(config: ConfigSections, route: RouteSection) -> Iterator[_Wrong]:
    largest = max((terms.capacity or 0 for key_path, terms in _all_terms(config) if key_path[0] == "tiers"), default=0)
    capacities = tuple(("tiers", name, "capacity") for name in config.tiers)
    costs: list[tuple[KeyPath, float | None]] = [(("cost",), route.cost), (("candidate_cost",), route.candidate_cost)]
    for number, rule in enumerate(route.costs):
        key_path: KeyPath = ("costs", str(number))
        costs += [((*key_path, "cost"), rule.cost), ((*key_path, "candidate_cost"), rule.candidate_cost)]
        if rule.path is not None:
            problem = path_problem(rule.path)
            own = route.path.partition("/{")[0] or "/" if route.match.path == "template" else route.path
            if problem is None and not is_below(rule.path, own) and not is_below(own, rule.path):
                problem = f"never matches: it must be below the route's path {own!r}"
            if problem is not None:
                yield (*key_path, "path"), f"{problem}, got {rule.path!r}", ()
        methods = with_head(route.methods)
        if methods and rule.methods and methods.isdisjoint(rule.methods):
            message = f"never match: the route takes {', '.join(sorted(methods))} only, got {', '.join(rule.methods)}"
            yield (*key_path, "methods"), message, ()
    if route.cost_from is not None:
        costs.append((("cost_from", "otherwise"), route.cost_from.otherwise))
    for setting, cost in costs:
        if cost is not None and cost > largest:
            message = f"above the capacity of every tier (at most {largest}), got {cost:g}"
            yield setting, message, (("tiers",), *capacities)
