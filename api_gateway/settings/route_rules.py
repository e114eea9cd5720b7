"""Detects routes, hosts and cost rules that can never match a request, and suggests what to write instead.

The path of a request is compared percent-decoded, in the form of `matching_path`, by whole segments; its host is
compared in lower case, without port and trailing dot.
"""

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address
from urllib.parse import unquote

from api_gateway.http1.request_paths import is_below, matching_path
from api_gateway.settings.routes import CostSection, RouteSection

API = "/api"

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
    if not is_below(instead, API):
        return f"{problem}, which leaves {instead!r}, and it must be {API} or begin with {API}/"
    return f"{problem}: write {instead!r}"


def _flaw(path: str) -> tuple[str, str | None] | None:
    """Return why no request can have this path, and a shorter path to write instead, which may be wrong too."""
    segments = path.split("/")
    odd = next((number for number, one in enumerate(segments) if _is_odd(one)), None)
    if odd is not None:
        what = "a '*'" if "*" in segments[odd] else "a placeholder or pattern"
        reason = f"{what} is compared literally and matches nothing; a path also matches all paths below it"
        return reason, "/".join(segments[:odd]) or "/"
    if _ESCAPE.search(path):
        return "never matches, as paths are compared decoded", unquote(path)
    if any(not character.isprintable() for character in path) or path != path.strip():
        return "never matches, as it begins or ends with a space, or contains control characters", None
    if ";" in path or _TRAILING_DOT.search(path):
        return "never matches, as parameters and trailing dots of segments are removed first", matching_path(path)
    if matching_path(path) != path:
        return "never matches, as dot segments and repeated slashes are resolved first", matching_path(path)
    return None


def _is_odd(segment: str) -> bool:
    return "*" in segment or bool(_PLACEHOLDER.search(segment) or _PATTERN.search(segment))


def host_problem(host: str) -> str | None:
    """Return why no request can have this host (in lower case), and what to write; None if requests can have it."""
    name = re.sub(r"^[a-z][a-z0-9+.-]*://", "", host).partition("/")[0].rpartition("@")[2]
    bare = re.sub(r":\d*$", "", name) if name.startswith("[") or name.count(":") == 1 else name
    faults = {
        "leave host out, or write null, to match every host": host in ("", "*"),
        "patterns are not supported: name one host for each route, or leave host out to match every host": (
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
    before: dict[tuple[str | None, str], list[int]] = {}
    for index, route in enumerate(routes):
        for other in before.setdefault((route.host, route.path), []):
            first = routes[other]
            shared = [one for one in route.methods or ["any"] if first.methods is None or one in first.methods]
            if shared:
                methods = ", ".join(shared)
                message = f"route {first.name!r} has this host, path and method, got {route.path!r} ({methods})"
                yield index, other, message
                break
        before[(route.host, route.path)].append(index)


def unused_cost_rules(costs: Sequence[CostSection]) -> Iterator[tuple[int, int]]:
    """Yield the index of each rule that is never applied, and of the earlier rule that matches all its requests."""
    for number, rule in enumerate(costs):
        for other, earlier in enumerate(costs[:number]):
            takes_methods = earlier.methods is None or set(rule.methods or ["any"]) <= set(earlier.methods)
            if takes_methods and (earlier.path is None or is_below(rule.path or "/", earlier.path)):
                yield number, other
                break
