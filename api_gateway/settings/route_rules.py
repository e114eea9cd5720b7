"""Detects routes, hosts and cost rules that can never match a request, and suggests what to write instead.

The path of a request is compared percent-decoded, in the form of `matching_path`, by whole segments; its host is
compared in lower case, without port and trailing dot.
"""

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address
from urllib.parse import unquote

from api_gateway.http1.methods import with_head
from api_gateway.http1.request_paths import is_below, matching_path
from api_gateway.settings.routes import CostSection, RouteSection

API = "/api"
# The first segments of the paths of operator endpoints and pages.
OPERATOR_SEGMENTS = frozenset(
    {"", "audit", "circuit-breakers", "clients", "configuration", "dashboard", "docs", "explain", "health", "healthz"}
    | {"history", "limits", "metrics", "openapi.json", "readyz", "reload", "tiers", "usage"}
)

_NAMED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]{0,31})\}")  # a placeholder of a template
_PLACEHOLDER = re.compile(r"[{}<>]|^:")
_PATTERN = re.compile(r"[\[\]\\^$|]|\(\?")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_TRAILING_DOT = re.compile(r"(?<![/.])[. ]+(?:/|$)|/\.{3,}(?:/|$)")
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_LONGEST_HOST = 253


def path_problem(path: str) -> str | None:
    """Return why no request can have this path, and what to write instead; None if requests can have it."""
    found = _flaw(path)
    if found is None:
        return None
    problem, instead = found
    while instead is not None and (again := _flaw(instead)) is not None:  # each is shorter than the previous one
        instead = again[1]
    if instead is None:
        return problem
    if operator_path(instead) is not None:
        return f"{problem}, which leaves {instead!r}, where operator endpoints are"
    return f"{problem}: write {instead!r}"


def template_problem(path: str) -> str | None:
    """Return why a path is not a template that requests can match, and what to write; None if it is one."""
    segments = path.split("/")
    names = [found[1] for segment in segments if (found := _NAMED.fullmatch(segment))]
    literal = "/".join("x" if _NAMED.fullmatch(segment) else segment for segment in segments)
    if re.search(r"[{}]", literal):
        return "has a placeholder that is not a whole segment, as in /users/{id}, or whose name is not an identifier"
    if not names:
        return "has no placeholder such as {id}, so match.path must be exact or prefix"
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        return f"has the placeholder {{{repeated}}} twice: each needs a name of its own"
    return path_problem(literal)


def operator_path(path: str) -> str | None:
    """Return the path of operator endpoints that a route with this path could hide; None if there is none."""
    first = path.split("/")[1]
    if _NAMED.fullmatch(first) or not first:
        return "/health"
    return f"/{first}" if first in OPERATOR_SEGMENTS else None


def _flaw(path: str) -> tuple[str, str | None] | None:
    """Return why no request can have this path, and a shorter path to write instead, which may be wrong too."""
    segments = path.split("/")
    odd = next((number for number, one in enumerate(segments) if _is_odd(one)), None)
    if odd is not None:
        what = "a '*'" if "*" in segments[odd] else "a placeholder or pattern"
        reason = f"{what} is compared literally and matches nothing; a path also matches all paths below it"
        return reason, "/".join(segments[:odd]) or "/"
    if _ESCAPE.search(path):
        return "never matches: paths are compared decoded", unquote(path)
    if any(not character.isprintable() for character in path) or path != path.strip():
        return "never matches: it begins or ends with a space, or contains a control character", None
    if ";" in path or _TRAILING_DOT.search(path):
        return "never matches: parameters and trailing dots of segments are removed first", matching_path(path)
    if matching_path(path) != path:
        return "never matches: dot segments and repeated slashes are resolved first", matching_path(path)
    return None


def _is_odd(segment: str) -> bool:
    return "*" in segment or bool(_PLACEHOLDER.search(segment) or _PATTERN.search(segment))


def host_problem(host: str) -> str | None:
    """Return why no request can have this host (in lower case), and what to write; None if requests can have it.

    It may begin with `*.`, for all names below the rest.
    """
    if host.startswith("*.") and len(host) > len("*."):
        host = host[2:]
    name = re.sub(r"^[a-z][a-z0-9+.-]*://", "", host).partition("/")[0].rpartition("@")[2]
    bare = re.sub(r":\d*$", "", name) if name.startswith("[") or name.count(":") == 1 else name
    faults = {
        "leave host out, or write null, to match every host": host in ("", "*"),
        "only *. at the beginning is a pattern, as in *.example.com; leave host out to match every host": (
            re.search(r"[*\\^$|(){}]", host)
        ),
        f"must be a host alone, without scheme and path: write {bare!r}": name != host,
        f"ports are ignored when hosts are compared: write {bare!r}": bare != host,
        f"an IPv6 address needs brackets: write '[{host}]'": _is_ipv6(host),
        f"requests contain the ASCII form of such a host{_ascii_form(host)}": not host.isascii(),
        "must be a host name such as 'api.example.com', or an address": not _is_host(host),
    }
    return next((problem for problem, is_so in faults.items() if is_so), None)


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        return _is_ipv6(host[1:-1])
    return len(host) <= _LONGEST_HOST and _HOST.fullmatch(host) is not None


def _is_ipv6(text: str) -> bool:
    try:
        return bool(IPv6Address(text))
    except ValueError:
        return False


def _ascii_form(host: str) -> str:
    try:
        return f": write {host.encode('idna').decode()!r}"
    except UnicodeError:
        return ""


def never_reached(routes: Sequence[RouteSection]) -> Iterator[tuple[int, int, str]]:
    """Yield each route with the host, path and a method of an earlier one: its index, the other's, and a message."""
    before: dict[tuple[object, ...], list[int]] = {}
    for index, route in enumerate(routes):
        match = route.match
        is_prefix, shape = match.path == "prefix", _NAMED.sub("{}", route.path)
        fields = {name.lower(): str(one) for name, one in match.headers.items()}
        parameters = {name: str(one) for name, one in match.query.items()}
        conditions = (*sorted(fields.items()), "?", *sorted(parameters.items()))
        key = route.host, is_prefix, shape, conditions
        for other in before.setdefault(key, []):
            first = routes[other]
            shared = [one for one in route.methods or ["any"] if first.methods is None or one in first.methods]
            if shared:
                methods = ", ".join(shared)
                same = "host, path, method and conditions" if fields or parameters else "host, path and method"
                message = f"route {first.name!r} has this {same}, got {route.path!r} ({methods})"
                yield index, other, message
                break
        before[key].append(index)


def unused_cost_rules(costs: Sequence[CostSection]) -> Iterator[tuple[int, int]]:
    """Yield the index of each rule that is never applied, and of the earlier rule that matches all its requests."""
    for number, rule in enumerate(costs):
        for other, earlier in enumerate(costs[:number]):
            methods = with_head(earlier.methods)
            takes_methods = methods is None or set(rule.methods or ["any"]) <= methods
            if takes_methods and (earlier.path is None or is_below(rule.path or "/", earlier.path)):
                yield number, other
                break
