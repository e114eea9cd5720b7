"""Rules on what a route does: placeholders that nothing fills, contradictions, and upstreams that do not exist."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from api_gateway.settings.identity import IdentitySection
from api_gateway.settings.route_actions import named_in
from api_gateway.settings.route_match_rules import WrongSetting
from api_gateway.settings.routes import RouteSection
from api_gateway.settings.server import ServerSection
from api_gateway.settings.suggestions import nearest

_OF_ANY_REQUEST = frozenset({"client", "request_id"})
_OF_TARGETS = frozenset({"path", "query"})
_OF_FORWARDING = (  # settings that apply to what an upstream gets or sends
    *("rewrite", "strip_prefix", "rewrite_urls", "rewrite_cookies", "cookie_domains", "request_headers"),
    *("response_headers", "compression", "cost_from", "timeout", "response_timeout", "fallback", "mirror"),
    "forward_credentials",
)


class ActingSections(Protocol):
    """The sections that decide what routes can do."""

    @property
    def server(self) -> ServerSection: ...  # noqa: D102 - see `GatewayConfig`
    @property
    def routes(self) -> Sequence[RouteSection]: ...  # noqa: D102
    @property
    def identity(self) -> IdentitySection: ...  # noqa: D102


def action_findings(config: ActingSections, route: RouteSection, upstreams: Collection[str]) -> Iterator[WrongSetting]:
    """Yield the errors in the actions of a route: where, the message, and what else must be right for it."""
    yield from _destination_findings(route, upstreams)
    yield from _forwarding_findings(route)
    yield from _mirror_findings(config, route, upstreams)
    yield from _placeholder_findings(route)
    if route.rewrite is not None and route.strip_prefix is not None:
        yield ("rewrite",), "replaces the path, so strip_prefix must be left out: write prefix: / to remove it", ()
    if route.rewrite is not None and route.rewrite.prefix is not None and route.match.path != "prefix":
        message = f"needs match.path: prefix; write path instead of prefix, got {route.match.path!r}"
        yield ("rewrite", "prefix"), message, (("match",),)
    yield from _limit_findings(config.server, route)
    own = config.identity.header.lower()
    for name in (*route.request_headers.set, *route.request_headers.add, *route.request_headers.remove):
        if name.lower() == own:
            yield ("request_headers",), f"cannot change {name}, which names the client", (("identity", "header"),)


def _limit_findings(server: ServerSection, route: RouteSection) -> Iterator[WrongSetting]:
    """Yield which limits of the route have no effect."""
    for name in ("max_body_bytes", "max_header_bytes", "max_header_lines"):
        own, most = getattr(route, name), getattr(server, name)
        if own is not None and own > most:
            yield (name,), f"must be at most server.{name}, {most}, got {own}", (("server", name),)
    if route.response_timeout is not None and route.timeout is not None and route.response_timeout > route.timeout:
        message = f"must be at most the route's timeout, {route.timeout:g}, got {route.response_timeout:g}"
        yield ("response_timeout",), message, (("timeout",),)


def _forwarding_findings(route: RouteSection) -> Iterator[WrongSetting]:
    """Yield the settings of a route without an upstream that need one."""
    if route.respond is None and route.redirect is None:
        return
    for name in _OF_FORWARDING:
        if getattr(route, name) != RouteSection.model_fields[name].default:
            hint = "; set respond.headers" if name == "response_headers" and route.respond is not None else ""
            yield (name,), f"needs a route with an upstream, as the gateway itself responds{hint}", ()


def _destination_findings(route: RouteSection, upstreams: Collection[str]) -> Iterator[WrongSetting]:
    names = [one.name for one in route.upstreams]
    for number, name in enumerate(names):
        if name not in upstreams:
            hint = nearest(name, upstreams)
            yield ("upstreams", str(number), "name"), f"no such upstream, got {name!r}{hint}", (("upstreams",),)
        if name in names[:number]:
            yield ("upstreams", str(number), "name"), f"is named before, got {name!r}", ()
    if names and not any(one.weight for one in route.upstreams):
        yield ("upstreams",), "needs a weight above 0", ()


def _mirror_findings(
    config: ActingSections, route: RouteSection, upstreams: Collection[str]
) -> Iterator[WrongSetting]:
    """Yield why copies would reach no upstream, or one whose other requests they would disturb."""
    if route.mirror is None:
        return
    name, where = route.mirror.upstream, ("mirror", "upstream")
    if name not in upstreams:
        yield where, f"no such upstream, got {name!r}{nearest(name, upstreams)}", (("upstreams",),)
    for other in config.routes:
        if name in other.upstream_names or (other.fallback is not None and name == other.fallback.upstream):
            message = f"must be an upstream for copies alone, but route {other.name!r} sends requests to {name!r}"
            yield where, f"{message}: add an upstream with the same targets under another name", (("routes",),)
            return


def _placeholder_findings(route: RouteSection) -> Iterator[WrongSetting]:
    of_path = named_in(route.path) if route.match.path == "template" else set()
    texts: list[tuple[tuple[str, ...], str, frozenset[str]]] = []
    for section, edits in (("request_headers", route.request_headers), ("response_headers", route.response_headers)):
        for key, values in (("set", edits.set), ("add", edits.add)):
            texts += [((section, key, name), text, _OF_ANY_REQUEST) for name, text in values.items()]
    if route.rewrite is not None and route.rewrite.path is not None:
        texts.append((("rewrite", "path"), route.rewrite.path, frozenset()))
    if route.redirect is not None:
        texts.append((("redirect", "to"), route.redirect.to, _OF_TARGETS))
    for key_path, text, names in texts:
        known = names | of_path
        for name in sorted(named_in(text) - known):
            shown = ", ".join(f"{{{one}}}" for one in sorted(known)) or "none, as match.path is not template"
            yield key_path, f"has no value for {{{name}}}; the placeholders are {shown}, got {text!r}", (("path",),)
