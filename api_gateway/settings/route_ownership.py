"""Whose requests are whose: the routes of files, and the prefixes and hosts that the main file says a file owns.

No included file may take requests from another file, nor from the main one, unless the main file gives it their path
or host. The main file may take requests from any file.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import Field

from api_gateway.settings.diagnostics import Ownership, SettingsFile, path_text
from api_gateway.settings.route_rules import host_problem, path_problem
from api_gateway.settings.routes import RouteSection
from api_gateway.settings.setting_types import Section, Shorthand
from api_gateway.settings.value_checks import ValueCheck

ANY_HOST = ""
_WILDCARD = "*."
_PLACEHOLDER = "{}"


def _owned(text: str) -> str:
    host, slash, path = text.partition("/")
    problem = host_problem(host.lower()) if host else None
    problem = problem or path_problem(f"/{path}" if slash else "/")
    if problem is not None:
        raise ValueError(problem)
    return f"{host.lower()}{slash}{path}"


class IncludeSection(Section):
    """Files of teams, and the requests that belong to each of them. Written as text, it is the path alone."""

    shorthand = Shorthand(lambda text: {"path": text}, {"type": "string"}, "conf.d/*.yaml")

    path: str = Field(description="A path from the folder of this file, which may have wildcards.")
    owns: list[Annotated[str, ValueCheck(_owned)]] = Field(
        default=[],
        max_length=100,
        description="Paths such as /api/orders, hosts, or both as in a.example/api: the file's routes must be below"
        " them, and those of no other file.",
    )


class RequestSpace(NamedTuple):
    """The requests with a host and a path: `segments` of an exact path, or of a prefix with all paths below it."""

    host: str
    segments: tuple[str, ...]
    is_prefix: bool

    def __str__(self) -> str:
        return f"{self.host}/{'/'.join(self.segments)}"

    def covers(self, other: "RequestSpace") -> bool:
        """Return whether all requests of the other space are in this one."""
        size = len(self.segments)
        if self.host not in (ANY_HOST, other.host) and not _is_below(other.host, self.host):
            return False
        if not self.is_prefix and (other.is_prefix or len(other.segments) != size):
            return False
        pairs = zip(self.segments, other.segments[:size], strict=False)
        return len(other.segments) >= size and all(mine in (_PLACEHOLDER, theirs) for mine, theirs in pairs)

    def overlaps(self, other: "RequestSpace") -> bool:
        """Return whether a request may be in both."""
        if ANY_HOST not in (self.host, other.host) and not _share_names(self.host, other.host):
            return False
        shorter, longer = sorted((self, other), key=lambda one: len(one.segments))
        if len(shorter.segments) != len(longer.segments) and not shorter.is_prefix:
            return False
        pairs = zip(shorter.segments, longer.segments, strict=False)
        return all(one == another or _PLACEHOLDER in (one, another) for one, another in pairs)


def space_of_owned(text: str) -> RequestSpace:
    """Return the space of an entry of `owns`."""
    host, _, path = text.partition("/")
    return RequestSpace(host.lower(), _segments(f"/{path}"), is_prefix=True)


def space_of_route(route: RouteSection) -> RequestSpace:
    """Return the requests that a route may get, whatever else it requires of them."""
    segments = _segments(route.path)
    if route.match.path == "template":
        segments = tuple(_PLACEHOLDER if one.startswith("{") and one.endswith("}") else one for one in segments)
    return RequestSpace(route.host or ANY_HOST, segments, is_prefix=route.match.path == "prefix")


class _Owned(NamedTuple):
    """A route with its number, its file and its space."""

    number: int
    file: int
    space: RequestSpace
    route: RouteSection


def ownership_lines(routes: Sequence[RouteSection], file: SettingsFile) -> Iterator[str]:
    """Yield the errors: routes outside of what their file owns, and routes that take requests from other files."""
    ownership = file.ownership
    if ownership is None or not ownership.route_files:  # without routes, each upstream has one of its own
        return
    pairs = zip(routes, ownership.route_files, strict=True)
    found = [_Owned(index, number, space_of_route(route), route) for index, (route, number) in enumerate(pairs)]
    owns = {number: [space_of_owned(text) for text in texts] for number, texts in ownership.owns.items()}
    wrong = {one.number: message for one in found if (message := _misplaced(one, owns, ownership)) is not None}
    for index, message in wrong.items():
        yield f"{_place_of(found[index], file)}{message}"
    for one, other in _overlapping(one for one in found if one.number not in wrong):
        if _is_allowed(one, other, owns):
            continue
        inner, outer = (other, one) if one.space.covers(other.space) and other.file else (one, other)
        inner, outer = (inner, outer) if inner.file else (outer, inner)
        place = _place_of(outer, file).partition(": ")[0]
        owned = RequestSpace(inner.space.host, _beginning(inner.space), is_prefix=True)
        yield (
            f"{_place_of(inner, file)}overlaps {str(outer.space)!r} of the route {outer.route.name!r} at {place}, got"
            f" {str(inner.space)!r}; files must not take requests from each other, unless {ownership.files[0]} says"
            f" whose they are, as in include: [{{path: {ownership.files[inner.file]}, owns: [{owned}]}}]"
        )


def _place_of(one: _Owned, file: SettingsFile) -> str:
    """Return the beginning of a message about a route: that of its upstream if the route is made from it."""
    key_path = ("routes", str(one.number), "path")
    key_paths = (key_path, key_path[:-1], ("upstreams", one.route.name.lower()))
    found = (file.places.get(key_path) for key_path in key_paths)
    at = next((place for place in found if place is not None), str(file.path))
    return f"{at}: {path_text(key_path[:-1])} ({one.route.name}).path: "


def _misplaced(one: _Owned, owns: Mapping[int, Sequence[RequestSpace]], ownership: Ownership) -> str | None:
    """Return why a route of an included file may not be where it is, by what files own; None if it may."""
    if not one.file:
        return None
    own = _deepest(owns.get(one.file, ()), one.space)
    if own is None and owns.get(one.file):
        names = ", ".join(map(str, owns[one.file]))
        return f"must be below {names}, which {ownership.granted_at[one.file]} gives the file, got {str(one.space)!r}"
    for file, spaces in owns.items():
        found = _deepest(spaces, one.space) if file != one.file else None
        if found is not None and (own is None or not found.covers(own)):
            owner = ownership.files[file]
            return f"{found} belongs to {owner}, by {ownership.granted_at[file]}, got {str(one.space)!r}"
    return None


def _is_allowed(one: _Owned, other: _Owned, owns: Mapping[int, Sequence[RequestSpace]]) -> bool:
    """Return whether two routes of different files that overlap may do so."""
    if not one.file or not other.file:
        main, team = (one, other) if not one.file else (other, one)
        if main.space != team.space and team.space.covers(main.space):
            return True
        return _deepest(owns.get(team.file, ()), team.space) is not None
    for inner, outer in ((one, other), (other, one)):
        given = _deepest(owns.get(inner.file, ()), inner.space)
        if given is not None and outer.space.covers(inner.space):
            before = _deepest(owns.get(outer.file, ()), inner.space)
            if before is None or (before != given and before.covers(given)):
                return True
    return False


def _overlapping(routes: Iterable[_Owned]) -> Iterator[tuple[_Owned, _Owned]]:
    """Yield the pairs of routes of different files that overlap.

    The segments before a placeholder of one begin those of the other; so each is compared with few others.
    """
    by_beginning: dict[tuple[str, ...], list[_Owned]] = {}
    found = list(routes)
    for one in found:
        by_beginning.setdefault(_beginning(one.space), []).append(one)
    for one in found:
        beginning = _beginning(one.space)
        for size in range(len(beginning) + 1):
            for other in by_beginning.get(beginning[:size], ()):
                is_first = size < len(beginning) or other.number < one.number
                if is_first and other.file != one.file and one.space.overlaps(other.space):
                    yield other, one


def _beginning(space: RequestSpace) -> tuple[str, ...]:
    return space.segments[: space.segments.index(_PLACEHOLDER)] if _PLACEHOLDER in space.segments else space.segments


def _deepest(spaces: Iterable[RequestSpace], space: RequestSpace) -> RequestSpace | None:
    """Return the most specific one of those that cover a space; None if none does."""
    covering = [one for one in spaces if one.covers(space)]
    return max(covering, key=lambda one: (len(one.segments), len(one.host)), default=None)


def _is_below(host: str, pattern: str) -> bool:
    """Return whether all names of a host are those of a pattern with a wildcard, of which it is not the same."""
    return pattern.startswith(_WILDCARD) and host != pattern and host.endswith(pattern[1:])


def _share_names(one: str, other: str) -> bool:
    return one == other or _is_below(one, other) or _is_below(other, one)


def _segments(path: str) -> tuple[str, ...]:
    return tuple(path.strip("/").split("/")) if path.strip("/") else ()
