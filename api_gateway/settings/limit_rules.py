"""Rules on the section `limits`: names that collide, references, keys without a source, and costs never allowed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from api_gateway.http1.methods import REFUSED_METHODS, with_head
from api_gateway.settings.clients import TierSection
from api_gateway.settings.diagnostics import KeyPath
from api_gateway.settings.identity import IdentitySection
from api_gateway.settings.limits import AllowanceSection, LimitSection
from api_gateway.settings.routes import RouteSection
from api_gateway.settings.suggestions import nearest

ADDRESS_POLICY = "address"  # the name of the address limit
_CREDENTIALS = ("authorization", "proxy-authorization", "cookie")

Found = tuple[KeyPath, str, tuple[KeyPath, ...]]  # place within `limits`, message, and what it depends on


class LimitedSections(Protocol):
    """The sections that the rules read."""

    @property
    def identity(self) -> IdentitySection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def tiers(self) -> Mapping[str, TierSection]: ...  # noqa: D102
    @property
    def routes(self) -> Sequence[RouteSection]: ...  # noqa: D102
    @property
    def limits(self) -> Sequence[LimitSection]: ...  # noqa: D102


def limit_findings(config: LimitedSections) -> Iterator[Found]:
    """Yield each mistake of a limit that cannot be found in one setting alone."""
    taken = {name.lower(): f"the tier {name}" for name in config.tiers} | {ADDRESS_POLICY: "the address limit"}
    for index, limit in enumerate(config.limits):
        place: KeyPath = (str(index),)
        other = taken.setdefault(limit.name.lower(), f"limits[{index}]")
        if other != f"limits[{index}]":
            message = f"is also the name of {other}, and responses name limits"
            message += f"; choose one that differs in more than letter case, got {limit.name!r}"
            yield (*place, "name"), message, (("tiers",),)
        for number, part in enumerate(limit.key):
            problem = _key_problem(config.identity, part)
            if problem is not None:
                yield (*place, "key", str(number)), f"{problem}, got {part!r}", (("identity",),)
        yield from _tier_findings(config, limit, place)
        yield from _reference_findings(config, limit, place)
        yield from _cost_findings(config, limit, place)


def allowances(limit: LimitSection) -> Iterator[tuple[KeyPath, AllowanceSection]]:
    """Yield the allowances of a limit with their places within it; that of the limit only if a request may have it.

    A concurrency limit has none.
    """
    own = dict(limit.tiers or {})
    if limit.is_given:
        yield (), limit
    for tier, section in own.items():
        if section is not None and section.is_given:
            yield ("tiers", tier), section


def _key_problem(identity: IdentitySection, part: str) -> str | None:
    kind, _, name = part.partition(":")
    if kind == "header":
        return _header_problem(identity, name.lower())
    if kind in ("claim", "organisation") and "jwt" not in identity.sources:
        return "needs jwt in identity.sources, as only tokens have claims"
    if kind == "organisation" and all(one.organisation_claim is None for one in identity.jwt.issuers.values()):
        return "needs organisation_claim of an issuer in identity.jwt.issuers"
    return None


def _header_problem(identity: IdentitySection, name: str) -> str | None:
    if name in (*_CREDENTIALS, identity.api_key.header.lower()):
        return "may have a credential; use client"
    if name == identity.header.lower():
        return "names the client; use client"
    if any(name == header.lower() for issuer in identity.jwt.issuers.values() for header in issuer.headers):
        return "is removed from requests, as the gateway sets it; use claim: with the path of its claim"
    return None


def _tier_findings(config: LimitedSections, limit: LimitSection, place: KeyPath) -> Iterator[Found]:
    known, lacking = ", ".join(config.tiers), []
    for tier, section in (limit.tiers or {}).items():
        if tier not in config.tiers:
            message = f"no such tier, got {tier!r}; the tiers are {known}"
            yield (*place, "tiers", tier), message, (("tiers",), ("tiers", tier))
        if section is None or not section.is_given:
            lacking.append(tier)
    if limit.concurrent is not None:
        yield from _concurrency_findings(config, limit, place)
    elif not limit.is_given and (limit.tiers is None or lacking):
        whom = f" for the tiers {', '.join(lacking)}, or each of these its own" if lacking else ""
        what = "rate and capacity, a quota, or concurrent" if limit.period is None else "a quota"
        yield place, f"needs {what}{whom}", ()


def _concurrency_findings(config: LimitedSections, limit: LimitSection, place: KeyPath) -> Iterator[Found]:
    """Yield each tier that has a number and no such limit, or the limit and no number."""
    given = limit.concurrent_by_tier
    yield from _number_findings(config, limit, place, given)
    tried = None if limit.candidate is None else limit.candidate.concurrent
    if isinstance(tried, dict):
        yield from _number_findings(config, limit, (*place, "candidate"), tried)
    if not given:
        return
    lacking = [tier for tier in limit.tiers or config.tiers if tier not in given and tier in config.tiers]
    if lacking:
        shown = ", ".join(f"{tier}: {number}" for tier, number in given.items())
        message = (
            f"has no number for {', '.join(lacking)}: add one, or name in tiers those that the limit applies to,"
            f" got {{{shown}}}"
        )
        yield (*place, "concurrent"), message, (("tiers",), (*place, "tiers"))


def _number_findings(
    config: LimitedSections, limit: LimitSection, place: KeyPath, given: Mapping[str, int]
) -> Iterator[Found]:
    """Yield each tier that has a number below `place`, and to which the limit cannot apply."""
    for tier, number in given.items():
        key_path: KeyPath = (*place, "concurrent", tier)
        if tier not in config.tiers:
            yield key_path, f"no such tier, got {tier!r}; the tiers are {', '.join(config.tiers)}", (("tiers",),)
        elif limit.tiers is not None and tier not in limit.tiers:
            message = f"the limit does not apply to this tier: add it to tiers or remove it, got {number}"
            yield key_path, message, ((*place[:2], "tiers"),)


def _reference_findings(config: LimitedSections, limit: LimitSection, place: KeyPath) -> Iterator[Found]:
    routes = {route.name: route for route in config.routes}
    for number, name in enumerate(limit.routes or ()):
        if name not in routes:
            hint = nearest(name, routes) or f"; the routes are {', '.join(routes)}"
            message = f"no such route, got {name!r}{hint}"
            yield (*place, "routes", str(number)), message, (("routes",),)
    chosen = [routes[name] for name in limit.routes if name in routes] if limit.routes else list(routes.values())
    for number, method in enumerate(limit.methods or ()):
        if method in REFUSED_METHODS:
            message = f"is never proxied, so it is never limited, got {method!r}"
            yield (*place, "methods", str(number)), message, ()
        elif chosen and all(method not in (with_head(route.methods) or {method}) for route in chosen):
            names = ", ".join(route.name for route in chosen)
            message = f"none of the routes ({names}) takes this method, got {method!r}"
            yield (*place, "methods", str(number)), message, (("routes",), (*place, "routes"))


def _cost_findings(config: LimitedSections, limit: LimitSection, place: KeyPath) -> Iterator[Found]:
    found, name = list(allowances(limit)), "capacity" if limit.period is None else "quota"
    if not found:
        return
    below = [(key_path, section) for key_path, section in found if section.most < (limit.cost or 0)]
    for key_path, section in below:
        message = f"must be at least the limit's cost, {limit.cost:g}, or no request is allowed, got {section.most}"
        yield (*place, *key_path, name), message, ((*place, "cost"),)
    if limit.cost is not None:
        return
    key_path, section = max(found, key=lambda one: one[1].most)
    for route in config.routes:
        is_chosen = limit.routes is None or route.name in limit.routes
        if is_chosen and route.cost > section.most:
            message = (
                f"must be at least {route.cost:g}, the cost of route {route.name!r}, or none of its requests is"
                f" allowed; or set a cost of the limit, got {section.most}"
            )
            yield (*place, *key_path, name), message, (("routes",),)


def unpaid_by_tier(config: LimitedSections) -> Iterator[tuple[KeyPath, str]]:
    """Yield each capacity below the cost of a route that other tiers can pay: the tier cannot use the route."""
    for tier, terms in config.tiers.items():
        others = max(other.capacity for other in config.tiers.values())
        yield from _unpaid(config.routes, tier, (("tiers", tier, "capacity"), terms.capacity), others)
    for index, limit in enumerate(config.limits):
        found = dict(allowances(limit))
        if limit.cost is not None or not found:
            continue
        routes = [route for route in config.routes if limit.routes is None or route.name in limit.routes]
        others, name = max(section.most for section in found.values()), "quota" if limit.period else "capacity"
        for tier in limit.tiers or config.tiers:
            key_path: KeyPath = ("tiers", tier) if ("tiers", tier) in found else ()
            if key_path in found:
                place: KeyPath = ("limits", str(index), *key_path, name)
                yield from _unpaid(routes, tier, (place, found[key_path].most), others)


def _unpaid(
    routes: Sequence[RouteSection], tier: str, most: tuple[KeyPath, int], others: int
) -> Iterator[tuple[KeyPath, str]]:
    """Yield a warning for each route with a cost above `most` (place and number), but not above `others`."""
    place, own = most
    for route in routes:
        costs = [route.cost, *(rule.cost for rule in route.costs)]
        unpaid = [cost for cost in costs if own < cost <= others]
        if unpaid:
            yield (
                place,
                (
                    f"is below {min(unpaid):g}, a cost of route {route.name!r}: the tier {tier} gets 403 for such"
                    f" requests; raise it or lower the cost, unless this is intended, got {own}"
                ),
            )
