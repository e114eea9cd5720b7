"""Rules on what a route matches: paths, hosts, methods and conditions that no request has, or that hide others."""

from collections.abc import Iterator
from typing import Protocol

from api_gateway.http1.methods import REFUSED_METHODS
from api_gateway.settings.admin import AdminSection
from api_gateway.settings.diagnostics import KeyPath
from api_gateway.settings.identity import IdentitySection
from api_gateway.settings.route_rules import API, host_problem, operator_path, path_problem, template_problem
from api_gateway.settings.routes import RouteSection

WrongSetting = tuple[KeyPath, str, tuple[KeyPath, ...]]


class MatchedSections(Protocol):
    """The sections that decide which routes are possible."""

    @property
    def admin(self) -> AdminSection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def identity(self) -> IdentitySection: ...  # noqa: D102


def match_findings(config: MatchedSections, route: RouteSection) -> Iterator[WrongSetting]:
    """Yield the errors in the match of a route: where, the message, and what else must be right for it."""
    is_template = route.match.path == "template"
    problem = template_problem(route.path) if is_template else path_problem(route.path)
    if problem is not None:
        yield ("path",), f"{problem}, got {route.path!r}", ()
    elif config.admin.listen is None and (hidden := operator_path(route.path)) is not None:
        message = (
            f"overlaps the operator endpoint {hidden}: set admin.listen, which gives operator endpoints a listener of"
            f" their own, or choose another path, as below {API}"
        )
        yield ("path",), f"{message}, got {route.path!r}", (("admin", "listen"),)
    own = {config.identity.header.lower(), config.identity.api_key.header.lower()}
    for name in route.match.headers:
        if name.lower() in own:
            message = "identifies clients, so no route can depend on it: use tiers, or limits by client"
            yield ("match", "headers", name), message, (("identity",),)
    if route.host is not None and (problem := host_problem(route.host)) is not None:
        yield ("host",), f"{problem}, got {route.host!r}", ()
    if route.strip_prefix and "{" in route.strip_prefix:
        yield ("strip_prefix",), f"must end before the first placeholder, got {route.strip_prefix!r}", ()
    elif route.strip_prefix and not f"{route.path}/".startswith(f"{route.strip_prefix.rstrip('/')}/"):
        message = f"must be a prefix of the path {route.path!r}, got {route.strip_prefix!r}"
        yield ("strip_prefix",), message, ()
    for number, method in enumerate(route.methods or ()):
        if method in REFUSED_METHODS:
            yield ("methods", str(number)), f"is never proxied, so it never matches, got {method!r}", ()
