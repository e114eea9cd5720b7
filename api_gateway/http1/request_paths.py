"""The path of a request by its segments, so that an encoded slash stays part of its segment. Pure functions.

A framework matches the decoded path, in which `/clients/team%2Fgrants` (the client `team/grants`) and
`/clients/team/grants` (a resource of the client `team`) are the same.
"""

import posixpath
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote


class RequestTarget(NamedTuple):
    """A path below the application's root: its segments, decoded one by one."""

    root: str
    segments: tuple[str, ...]

    @property
    def path(self) -> str:
        """The path as a framework shall match it: a slash within a segment is encoded."""
        return self.root + "/" + "/".join(map(escaped, self.segments))


def target_of(scope: Mapping[str, Any]) -> RequestTarget:
    """Return the path of an ASGI scope below the application's root."""
    root = scope.get("root_path", "")
    return RequestTarget(root, tuple(map(unquote, _below(root, path_as_sent(scope)).split("/"))))


def below_root(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a scope whose path begins below the application's root; the same one if its path does already."""
    root, path = scope.get("root_path", ""), scope.get("path", "")
    if not root or not path.startswith(f"{root}/"):
        return scope
    raw = path_as_sent(scope)
    raw = raw[len(root) :] if raw.startswith(f"{root}/") else quote(path[len(root) :])
    return {**scope, "path": path[len(root) :], "raw_path": raw.encode("latin-1")}


def first_segment(scope: Mapping[str, Any]) -> str:
    """Return the first segment of the decoded path, in which an encoded slash ends a segment."""
    return _below(scope.get("root_path", ""), scope["path"]).partition("/")[0]


def path_as_sent(scope: Mapping[str, Any]) -> str:
    """Return the path as spelt on the wire, unless the server does not state that, or something changed the path."""
    raw = (scope.get("raw_path") or b"").decode("latin-1")
    return raw if unquote(raw) == scope["path"] else quote(scope["path"])


def escaped(segment: str) -> str:
    """Return a segment with only those characters encoded that would be taken for structure; see `unescaped`."""
    return segment.replace("%", "%25").replace("/", "%2F")


def unescaped(segment: str) -> str:
    """Return the segment that was `escaped`."""
    return segment.replace("%2F", "/").replace("%25", "%")


def _below(root: str, path: str) -> str:
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return path.removeprefix("/")


def is_below(path: str, prefix: str) -> bool:
    """Tell whether `path` is `prefix` or lies below it, by whole segments."""
    return prefix in (path, "/") or path.startswith(f"{prefix}/")


def matching_path(path: str) -> str:
    """Return the decoded `path` with dot segments and repeated slashes resolved (RFC 3986 section 5.2.4)."""
    if "//" in path or "/." in path:
        return "/" + posixpath.normpath(path).lstrip("/")
    return path
