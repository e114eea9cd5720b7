"""The path of a request: by segments, for matching, and as different servers read it. Pure functions.

By segments, an encoded slash remains part of its segment: a framework matches the decoded path, in which
`/clients/team%2Fgrants` (the client `team/grants`) and `/clients/team/grants` (a resource of the client `team`) are
equal.

Servers differ in what they do with unusual paths, and in which order: they remove the parameters of a segment (Tomcat,
Jetty), take a backslash for a slash and remove trailing dots and blanks of a segment (IIS), merge slashes before they
resolve dot segments (nginx, Go), afterwards or not at all, and decode once or twice. `readings` returns the results of
all such steps in any order. A path with control characters is ambiguous: some servers cut it there or remove them, and
`$` in a regular expression, with which frameworks compare paths, also matches before a line break at the end.
"""

import posixpath
import re
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

MAX_READINGS = 32  # of one path; a path with more is refused
_MOST_BYTES_OF_CHARACTER = len("%F0%9F%98%80")  # percent-encoded
MAX_READ_BYTES = 8_192  # total length of the readings of one path, because each costs time

# What servers may treat differently in a decoded path; `./` and a final `.` cover dot segments and trailing dots.
_UNUSUAL = re.compile(r"%|;|\\|[\x00-\x20\x7f\x85\u2028\u2029]|\?|#|//|\./|\.\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")  # with what Java takes for the end of a line
_ENCODED_DOT = re.compile("%2[eE]")
_PARAMETERS = re.compile(r";[^/]*")
_TRAILING = re.compile(r"(?:(?<=[^/. ])|(?<=/)(?!\.{1,2}(?:/|\Z)))[. ]++(?=/|\Z)")
_SLASHES = re.compile(r"//+")
_QUERY = re.compile(r"[?#].*", re.DOTALL)
_DOT_SEGMENT = re.compile(r"/\.{1,2}(?:/|\Z)")
# A dot segment with parameters, next to a backslash, or followed by blanks.
_DISPUTED_DOTS = re.compile(r"[/\\]\.{1,2}(?:[;\\]| +(?:[/\\;]|\Z))|\\\.{1,2}(?:/|\Z)")


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
    if raw.startswith(f"{root}/"):
        raw = raw[len(root) :]
    else:  # the root is spelt in another way
        ends = (one.start() for one in re.finditer("/", raw[: _MOST_BYTES_OF_CHARACTER * len(root) + 1]))
        end = next((one for one in ends if unquote(raw[:one]) == root), None)
        raw = quote(path[len(root) :]) if end is None else raw[end:]
    return {**scope, "path": path[len(root) :], "raw_path": raw.encode("latin-1")}


def raw_root(root: str) -> bytes:
    """Return a root path as the beginning of URLs: it cannot begin a host."""
    return quote("/" + root.strip("/\\"), safe="/").encode() if root.strip("/\\") else b""


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
    """Return whether `path` equals `prefix` or is below it, by whole segments."""
    return prefix in (path, "/") or path.startswith(f"{prefix}/")


def is_unusual(path: str) -> bool:
    """Return whether a decoded path has a part that servers may treat differently: it may have several readings."""
    return _UNUSUAL.search(path) is not None


def has_dot_segment(path: str) -> bool:
    """Return whether a segment of `path` is `.` or `..`."""
    return _DOT_SEGMENT.search(path) is not None


def matching_path(path: str) -> str:
    """Return the form of a decoded path by which its route is selected. Idempotent.

    Backslashes become slashes; parameters, and dots and blanks at the end of a segment, are removed; dot segments and
    repeated slashes are resolved (RFC 3986 section 5.2.4).
    """
    if not is_unusual(path):
        return path
    path = _without_trailing(_without_parameters(_with_slashes(path)))
    return "/" + posixpath.normpath(path).lstrip("/") if "//" in path or "/." in path else path


def readings(path: str, *, is_decoded: bool = False) -> list[str]:
    """Return all paths as which servers may read a path: as it is and by any sequence of `_STEPS`.

    If `path` contains escapes, each reading is decoded at least once, unless it `is_decoded` already. Raises
    ValueError, with the cause in words, if the path is ambiguous: it contains a control character or a disputed dot
    segment, or has too many readings.
    """
    first = path, is_decoded or "%" not in path
    found, pending, size = {first}, [first], len(path)
    if size > MAX_READ_BYTES:
        raise ValueError("it is too long to consider how servers may read it")
    while pending:
        path, is_decoded = pending.pop()
        if _CONTROL.search(path) is not None:
            raise ValueError("it contains a control character")
        if _DISPUTED_DOTS.search(path) is not None:
            raise ValueError("a dot segment is next to parameters, a backslash or a space")
        for step in _STEPS:
            other = step(path)
            reading = other, is_decoded or step is unquote or "%" not in other
            if other == path or reading in found:
                continue
            found.add(reading)
            pending.append(reading)
            size += len(other)
            if len(found) > MAX_READINGS or size > MAX_READ_BYTES:
                raise ValueError("servers may read it in too many ways")
    return list({path for path, is_decoded in found if is_decoded})


def _with_plain_dots(path: str) -> str:
    """Decode dots only, as the URL parsers of browsers and Node do before they resolve dot segments."""
    return _ENCODED_DOT.sub(".", path) if "%2" in path else path


def _with_slashes(path: str) -> str:
    return path.replace("\\", "/")


def _without_parameters(path: str) -> str:
    return _PARAMETERS.sub("", path) if ";" in path else path


def _without_trailing(path: str) -> str:
    return _TRAILING.sub("", path)


def _without_query(path: str) -> str:
    """Cut the path at an encoded question mark or number sign, which a server that decodes twice takes for its end."""
    return _QUERY.sub("", path) if "?" in path or "#" in path else path


def _merged(path: str) -> str:
    return _SLASHES.sub("/", path) if "//" in path else path


def _resolved(path: str) -> str:
    """Resolve dot segments as RFC 3986 section 5.2.4 does: an empty segment is a segment, which `..` removes."""
    if not has_dot_segment(path):
        return path
    kept: list[str] = []
    for segment in path.split("/")[1:]:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept)


_STEPS: tuple[Callable[[str], str], ...] = (
    unquote,
    _with_plain_dots,
    _with_slashes,
    _without_parameters,
    _without_trailing,
    _without_query,
    _merged,
    _resolved,
)
