"""Builds routes from their sections: costs, timeouts and fallbacks."""

from dataclasses import replace

from api_gateway.assembly.route_actions import compression_of, editor_of, mirroring_of, response_of, rewriting_of
from api_gateway.http1.methods import with_head
from api_gateway.proxy.address_rules import AddressRules
from api_gateway.proxy.content_cost import ContentCost
from api_gateway.proxy.cors import CorsPolicy
from api_gateway.proxy.fallback import Fallback
from api_gateway.proxy.requirements import Requirement
from api_gateway.proxy.route_conditions import FieldCondition, QueryCondition, RouteCondition, ValueTest
from api_gateway.proxy.route_table import CostRule, Route
from api_gateway.proxy.upstream_split import UpstreamSplit
from api_gateway.proxy.url_rewriting import UrlRewriter
from api_gateway.settings.addresses import AddressesSection
from api_gateway.settings.cors import CorsSection
from api_gateway.settings.json_pointer import parse_pointer
from api_gateway.settings.jwt import RequireSection
from api_gateway.settings.route_match import MatchSection, ValueSection
from api_gateway.settings.routes import CostFromSection, FallbackSection, RouteSection


def cors_of(section: CorsSection | None) -> CorsPolicy | None:
    """Return the CORS policy that a section describes; None if the gateway leaves CORS to the upstream."""
    if section is None or not section.enabled:
        return None
    return CorsPolicy(
        origins=section.origins,
        methods=section.methods,
        headers=section.headers,
        exposed=section.exposed_headers,
        credentials=section.credentials,
        max_age=section.max_age,
    )


def address_rules(section: AddressesSection) -> AddressRules | None:
    """Return the rules that a section describes, None if there are none."""
    return AddressRules(section.allow, section.deny) if section.allow or section.deny else None


def route_of(section: RouteSection, cors: CorsPolicy | None = None) -> Route:
    """Return the route that a section describes; `cors` is its policy unless it has one of its own."""
    prefix = (section.strip_prefix or "").rstrip("/")
    names = section.upstream_names
    route = Route(
        name=section.name,
        path=section.path,
        upstream=names[0] if names else "",
        strip_prefix=prefix,
        methods=frozenset(section.methods) if section.methods else None,  # `RouteTable` adds HEAD
        host=section.host,
        match=section.match.path,
        conditions=conditions_of(section.match),
        cost=section.cost,
        costs=tuple(
            CostRule(with_head(rule.methods), rule.path, rule.cost, rule.candidate_cost) for rule in section.costs
        ),
        candidate_cost=section.candidate_cost,
        content_cost=None if section.cost_from is None else _content_cost(section.cost_from),
        timeout=section.timeout,
        min_body_rate=section.min_body_rate,
        fallback=None if section.fallback is None else _fallback(section.fallback),
        url_rewriter=editor_of(section, _url_rewriter(section, prefix)),
        addresses=address_rules(section.addresses),
        forward_credentials=section.forward_credentials,
        requirement=None if section.require is None else _requirement(section.require),
        requires_certificate=section.require_certificate,
        cors=cors if section.cors is None else cors_of(section.cors),
        rewriting=rewriting_of(section),
        max_body_bytes=section.max_body_bytes,
        max_header_bytes=section.max_header_bytes,
        max_header_lines=section.max_header_lines,
        response_timeout=section.response_timeout,
        response=response_of(section),
        mirroring=mirroring_of(section.mirror),
        rewrites_urls=section.rewrite_urls is not False,
        compression=None if section.compression is None else compression_of(section.name, section.compression),
    )
    if not section.upstreams:
        return route
    split = UpstreamSplit(tuple((one.name, one.weight) for one in section.upstreams))
    return replace(route, split=split, variants={name: replace(route, upstream=name) for name in names})


def conditions_of(section: MatchSection) -> tuple[RouteCondition, ...]:
    """Return the conditions of a route on header fields and the query."""
    fields = [FieldCondition(name.lower().encode(), _test(one)) for name, one in section.headers.items()]
    return (*fields, *(QueryCondition(name.encode(), _test(one)) for name, one in section.query.items()))


def _test(section: ValueSection) -> ValueTest:
    return ValueTest(
        None if section.exact is None else section.exact.encode(),
        None if section.prefix is None else section.prefix.encode(),
    )


def _url_rewriter(section: RouteSection, prefix: str) -> UrlRewriter | None:
    replacement = ""
    if section.rewrite is not None and section.rewrite.prefix is not None:
        prefix, replacement = section.path.rstrip("/"), section.rewrite.prefix.rstrip("/")
    urls = bool(prefix) if section.rewrite_urls is None else section.rewrite_urls
    if not (urls or section.rewrite_cookies or section.cookie_domains):
        return None
    domains = tuple(
        (domain.lstrip(".").lower().encode(), new.encode()) for domain, new in section.cookie_domains.items()
    )
    return UrlRewriter(prefix.encode(), section.rewrite_cookies, domains, replacement.encode(), urls)


def _content_cost(section: CostFromSection) -> ContentCost:
    return ContentCost(parse_pointer(section.pointer), section.per, section.otherwise)


def _requirement(section: RequireSection) -> Requirement:
    return Requirement(tuple(section.scopes), tuple((path, tuple(values)) for path, values in section.claims.items()))


def _fallback(section: FallbackSection) -> Fallback:
    if section.upstream is not None:
        return Fallback(section.upstream)
    return Fallback(
        None,
        section.status or 200,
        tuple((name.encode(), value.encode()) for name, value in section.headers.items()),
        section.body.encode(),
    )
