"""The routes of one host by path: exact paths, templates such as `/users/{id}/orders`, and prefixes. Pure.

A path is looked up in `plain` first, by its longest prefix there. An entry has the routes for it if they depend on the
method alone. It is empty if another route may come before those: one with conditions, an exact path or a template;
then `groups` has all routes in their order. So only paths near such routes take longer.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

PATH_PREFIX, EXACT_PATH, PATH_TEMPLATE = "prefix", "exact", "template"  # how the path of a route is compared

Pattern = tuple[str, str]  # how the path of a route is compared, and the path; placeholders have no names


class RoutePattern(Protocol):
    """The attributes of a route that a table needs."""

    @property
    def path(self) -> str: ...  # noqa: D102 - see `Route`
    @property
    def match(self) -> str: ...  # noqa: D102
    @property
    def conditions(self) -> Sequence[object]: ...  # noqa: D102


R = TypeVar("R", bound=RoutePattern)


class _Node(Generic[R]):
    """A segment of exact paths and templates, and what may follow it."""

    __slots__ = ("any", "group", "literals")

    def __init__(self) -> None:
        self.literals: dict[str, _Node[R]] = {}
        self.any: _Node[R] | None = None
        self.group: tuple[Pattern, tuple[R, ...]] | None = None


class PathTable(Generic[R]):
    """The routes of one host. Paths are percent-decoded."""

    def __init__(self, routes: Iterable[R]) -> None:
        by_pattern: dict[Pattern, list[R]] = {}
        for route in routes:
            shape, is_template = route.path, route.match == PATH_TEMPLATE and "{" in route.path
            if is_template:
                shape = "/".join(["{}" if is_placeholder(one) else one for one in route.path.split("/")])
            match = PATH_TEMPLATE if is_template else PATH_PREFIX if route.match == PATH_PREFIX else EXACT_PATH
            key = match, shape
            by_pattern.setdefault(key, []).append(route)
        groups = [
            (key, tuple(sorted(found, key=lambda route: -len(route.conditions)))) for key, found in by_pattern.items()
        ]
        self.depth = 0  # the segments of the longest entry of `plain`; longer paths are cut
        self._prefixes = {_key(pattern[1]): (pattern, found) for pattern, found in groups if pattern[0] == PATH_PREFIX}
        self._tree: _Node[R] = _Node()
        self._tree_depth = -1  # the segments of the longest exact path or template
        for pattern, found in groups:
            if pattern[0] != PATH_PREFIX:
                self._plant(pattern, found)
        self.plain = self._plain([pattern for pattern, _ in groups])
        self.depth = max((path.count("/") for path in self.plain), default=0)

    def __repr__(self) -> str:
        return f"<PathTable {sorted(self.plain)}>"

    @property
    def has_segments(self) -> bool:
        """True if some route is matched segment by segment, for which an encoded slash makes a difference."""
        return self._tree_depth >= 0

    def groups(self, path: str) -> list[tuple[Pattern, tuple[R, ...]]]:
        """Return the routes that match a path, by precedence: exact path, templates, then prefixes, longest first.

        Of two templates, the one with a literal segment first, from the left, comes first. A slash at the end of the
        path is ignored, as many servers do.
        """
        found: list[tuple[Pattern, tuple[R, ...]]] = []
        bare = path.rstrip("/")
        if bare.count("/") <= self._tree_depth:
            _collect(self._tree, bare.split("/"), 1, found)
        prefix = "/".join(path.split("/", self.depth + 1)[: self.depth + 1])
        while True:
            group = self._prefixes.get(prefix)
            if group is not None:
                found.append(group)
            if not prefix:
                return found
            prefix = prefix.rpartition("/")[0]

    def _plant(self, pattern: Pattern, routes: tuple[R, ...]) -> None:
        node = self._tree
        segments = _key(pattern[1]).split("/")[1:]
        for segment in segments:
            if pattern[0] == PATH_TEMPLATE and segment == "{}":
                if node.any is None:
                    node.any = _Node()
                node = node.any
            else:
                node = node.literals.setdefault(segment, _Node())
        node.group = pattern, routes
        self._tree_depth = max(self._tree_depth, len(segments))

    def _plain(self, patterns: Sequence[Pattern]) -> Mapping[str, tuple[R, ...]]:
        """Return the routes of paths that have prefixes only, and an empty entry wherever that is not so."""
        anchors = {_anchor(pattern) for pattern in patterns if pattern[0] != PATH_PREFIX}
        below = {_anchor(pattern) for pattern in patterns if pattern[0] == PATH_TEMPLATE}
        plain: dict[str, tuple[R, ...]] = dict.fromkeys(anchors, ())
        for path, (_, routes) in self._prefixes.items():
            is_special = path in anchors or any(route.conditions for route in routes)
            plain[path] = () if is_special or _has_above(path, below) else routes
        plain.pop("", None)  # what no longer prefix matches is looked up in `groups`
        return plain


def is_placeholder(segment: str) -> bool:
    """Return whether a segment of a template stands for any segment."""
    return segment.startswith("{") and segment.endswith("}")


def _key(path: str) -> str:
    return "" if path == "/" else path


def _anchor(pattern: Pattern) -> str:
    """Return the beginning of a path, in whole segments, that has no placeholder."""
    segments = _key(pattern[1]).split("/")
    if pattern[0] == PATH_TEMPLATE and "{}" in segments:
        segments = segments[: segments.index("{}")]
    return "/".join(segments)


def _has_above(path: str, paths: set[str]) -> bool:
    """Return whether one of `paths` is `path` or above it."""
    while path not in paths:
        if not path:
            return False
        path = path.rpartition("/")[0]
    return True


def _collect(node: _Node[R], segments: Sequence[str], at: int, found: list[tuple[Pattern, tuple[R, ...]]]) -> None:
    """Append the groups below a node that match the segments from `at` on; each node is visited once at most."""
    if at == len(segments):
        if node.group is not None:
            found.append(node.group)
        return
    segment = segments[at]
    literal = node.literals.get(segment)
    if literal is not None:
        _collect(literal, segments, at + 1, found)
    if node.any is not None and segment:
        _collect(node.any, segments, at + 1, found)
