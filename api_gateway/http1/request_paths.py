"""The path of a request by segments, so that an encoded slash remains part of its segment. Pure functions.

A framework matches the decoded path, in which `/clients/team%2Fgrants` (the client `team/grants`) and
`/clients/team/grants` (a resource of the client `team`) are equal.
"""

import posixpath
from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote


class RequestTarget(NamedTuple):
    """A path below the application's root, as segments decoded one by one."""

    root: str
    segments: tuple[str, ...]

    @property
    def path(self) -> str:
        """The path for matching by a framework; slashes within segments are encoded."""
        return self.root + "/" + "/".join(map(escaped, self.segments))


def target_of(scope: Mapping[str, Any]) -> RequestTarget:
    """Return the path of an ASGI scope below the application's root."""
    root = scope.get("root_path", "")
    return RequestTarget(root, tuple(map(unquote, _below(root, path_as_sent(scope)).split("/"))))


def below_root(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Return a scope whose path is relative to the application's root; `scope` itself if it already is."""
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
    """Return the path as sent, or the re-encoded path if the server gives no `raw_path` that corresponds to it."""
    raw = (scope.get("raw_path") or b"").decode("latin-1")
    return raw if unquote(raw) == scope["path"] else quote(scope["path"])


def escaped(segment: str) -> str:
    """Return a segment with `%` and `/` percent-encoded; the inverse of `unescaped`."""
    return segment.replace("%", "%25").replace("/", "%2F")


def unescaped(segment: str) -> str:
    """Return a segment with `%2F` and `%25` decoded; the inverse of `escaped`."""
    return segment.replace("%2F", "/").replace("%25", "%")


def _below(root: str, path: str) -> str:
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return path.removeprefix("/")


def is_below(path: str, prefix: str) -> bool:
    """Tell whether `path` equals `prefix` or is below it, by whole segments."""
    return prefix in (path, "/") or path.startswith(f"{prefix}/")


def matching_path(path: str) -> str:
    """Return the decoded `path` with dot segments and repeated slashes resolved (RFC 3986 section 5.2.4)."""
    if "//" in path or "/." in path:
        return "/" + posixpath.normpath(path).lstrip("/")
    return path
