"""CORS (Fetch standard, section 3.3): which responses pages of other origins may read, and responses to preflights.

A policy belongs to a route, or to all routes. Its fields for an origin are rendered once. An upstream that decides
itself, by `Access-Control-Allow-Origin`, is not overruled; lists of fields that it exposes are extended. Pure.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.headers import Fields
from api_gateway.http1.methods import PROXIED_METHODS
from api_gateway.models import CorsFields, HeaderList

ORIGIN = b"origin"
REQUESTED_METHOD = b"access-control-request-method"
REQUESTED_HEADERS = b"access-control-request-headers"
INSPECTED = frozenset({ORIGIN, REQUESTED_METHOD, REQUESTED_HEADERS})  # fields of requests that CORS depends on

ALLOW_ORIGIN = b"access-control-allow-origin"
ALLOW_CREDENTIALS = b"access-control-allow-credentials"
EXPOSE_HEADERS = b"access-control-expose-headers"
VARY = b"vary"
# The fields that pages need to respect their limits and to report an error.
EXPOSED = (
    *("Retry-After", "RateLimit", "RateLimit-Policy", "WWW-Authenticate"),
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-Request-ID"),
)
ANY_ORIGIN = "*"
_ANY_PORT = "*"
MAX_REMEMBERED_ORIGINS = 1_024  # origins of each policy whose fields are remembered

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LABELS = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*"  # of a subdomain
# A line of a plain head. First letters are listed apart, because most lines fail on those; so it takes a quarter less.
_OWN_LINE = re.compile(rb"\r\n[vVaA](?i:ary|ccess-control-[a-z-]++): [^\r]*+")


class Preflight(NamedTuple):
    """A preflight: the method, and the names of header fields, if any, of the request to come."""

    method: bytes
    headers: bytes | None


def origin_of(fields: Fields) -> bytes | None:
    """Return the origin of a request; None without exactly one `Origin`."""
    values = fields.get(ORIGIN, ())
    return values[0] if len(values) == 1 else None


def preflight_of(fields: Fields) -> Preflight | None:
    """Return the preflight of a request that has the fields of one, whatever its method; else None."""
    methods = fields.get(REQUESTED_METHOD, ())
    if len(methods) != 1 or origin_of(fields) is None:
        return None
    names = fields.get(REQUESTED_HEADERS)
    return Preflight(methods[0], None if names is None else b",".join(names))


class CorsPolicy:
    """Which origins may read responses, and which requests they may send."""

    def __init__(
        self,
        *,
        origins: Sequence[str],
        methods: Sequence[str] | None = None,
        headers: Sequence[str] | None = None,
        exposed: Sequence[str] = (),
        credentials: bool = False,
        max_age: int = 600,
    ) -> None:
        """`origins` are in lower case; `*` is every origin, `https://*.example.com` all subdomains, port `*` any port.

        `methods` None allows those of the route, `headers` None those that a preflight asks for. `exposed` are added
        to `EXPOSED`. `max_age` is in seconds.
        """
        self.origins = tuple(origins)
        self._allows_all = ANY_ORIGIN in origins
        self._pattern = re.compile("|".join(_pattern_of(origin) for origin in origins).encode())
        self._methods = None if methods is None else tuple(methods)
        self._headers = None if headers is None else ", ".join(headers).encode()
        self._credentials = credentials
        self._max_age = b"%d" % max_age
        names = {name.lower(): name for name in (*EXPOSED, *exposed)}
        self._exposed = ", ".join(names.values()).encode()
        self._others = _rendered([], None, varies=not self._allows_all)
        self._of_all = _rendered([(ALLOW_ORIGIN, b"*")], self._exposed, varies=False)
        self.fields = lru_cache(maxsize=MAX_REMEMBERED_ORIGINS)(self._fields)

    def __repr__(self) -> str:
        return f"<CorsPolicy of {', '.join(self.origins)}>"

    def allows(self, origin: bytes) -> bool:
        """Return whether pages of an origin may read responses."""
        return self._allows_all or self._pattern.fullmatch(origin) is not None

    def _fields(self, origin: bytes | None) -> CorsFields:
        """Return the fields of a response to a request of this origin, None for a request without one.

        Responses that depend on the origin say so also to requests without one, for the sake of caches. If they do
        not depend on it, all of them have the same fields (Fetch standard, "CORS protocol and HTTP caches").
        """
        if self._allows_all:
            return self._of_all
        if origin is None or not self.allows(origin):
            return self._others
        allowed = [(ALLOW_ORIGIN, origin)]
        if self._credentials:
            allowed.append((ALLOW_CREDENTIALS, b"true"))
        return _rendered(allowed, self._exposed, varies=True)

    def preflight_fields(self, origin: bytes, asked: Preflight, of_route: Iterable[str] | None) -> HeaderList:
        """Return the fields of the response to a preflight of an allowed origin.

        `of_route` are the methods of the route, None for any.
        """
        methods = PROXIED_METHODS.split(", ") if of_route is None else sorted(of_route)
        if self._methods is not None:
            methods = list(self._methods)
        elif of_route is None and _TOKEN.fullmatch(asked.method) and asked.method.decode() not in methods:
            methods.append(asked.method.decode())
        found = [*self.fields(origin).allowed, (b"access-control-allow-methods", ", ".join(methods).encode())]
        headers = self._headers
        if headers is None and asked.headers is not None:
            names = (name.strip(b" \t") for name in asked.headers.split(b","))
            headers = b", ".join([name for name in names if _TOKEN.fullmatch(name)])
        if headers:
            found.append((b"access-control-allow-headers", headers))
        found.append((b"access-control-max-age", self._max_age))
        if self.fields(origin).varies:
            found.append((VARY, b"Origin"))
        return found


def _pattern_of(origin: str) -> str:
    """Return a regular expression for an origin with wildcards."""
    scheme, separator, authority = origin.partition("://")
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        host, colon, port = authority, "", ""
    is_parent = host.startswith("*.")
    found = re.escape(scheme + separator) + (_LABELS + re.escape(host[1:]) if is_parent else re.escape(host))
    return found + (f"(?:{colon}[0-9]+)?" if port == _ANY_PORT else re.escape(colon + port))


def _rendered(allowed: HeaderList, exposed: bytes | None, *, varies: bool) -> CorsFields:
    pairs = list(allowed)
    if exposed is not None:
        pairs.append((EXPOSE_HEADERS, exposed))
    if varies:
        pairs.append((VARY, b"Origin"))
    lines = b"".join([b"%b: %b\r\n" % pair for pair in pairs])
    return CorsFields(lines, tuple(pairs), tuple(allowed), exposed, varies)


def complete_lines(cors: CorsFields, head: bytes) -> tuple[bytes, bytes]:
    """Return the plain head of an upstream's response, and the lines to append, so that no field is doubled.

    The head has no line break at its end. See `complete`.
    """
    own = _OWN_LINE.findall(head)
    if not own:
        return head, cors.lines
    changed, lines = _completion(cors, tuple(own))
    for before, after in changed:
        head = head.replace(before, after, 1)
    return head, lines


@lru_cache(maxsize=1024)
def _completion(cors: CorsFields, own: tuple[bytes, ...]) -> tuple[tuple[tuple[bytes, bytes], ...], bytes]:
    """Return which lines of a head change, each before and after, and the lines to append.

    `own` are the lines of the head that CORS depends on, each with the line break before it; most heads repeat them.
    """
    headers, added = complete(cors, pairs_of(b"".join(own)))
    now = [b"\r\n%b: %b" % pair for pair in headers]
    changed = tuple([pair for pair in zip(own, now, strict=True) if pair[0] != pair[1]])
    return changed, b"".join([b"%b: %b\r\n" % pair for pair in added])


def complete(cors: CorsFields, headers: HeaderList) -> tuple[HeaderList, HeaderList]:
    """Return the fields of an upstream's response, and those to append, so that no field is doubled.

    An upstream that names an origin decides alone about origins and credentials. Names that it exposes, and fields
    from which it says that the response varies, are kept; the gateway's are added to the same field.
    """
    names = {name.lower() for name, _ in headers}
    added: HeaderList = []
    if ALLOW_ORIGIN not in names:
        added += [pair for pair in cors.allowed if pair[0] not in names]
    if cors.exposed is not None:
        if EXPOSE_HEADERS in names:
            headers = _changed(headers, EXPOSE_HEADERS, lambda value: joined_names(value, cors.exposed or b""))
        else:
            added.append((EXPOSE_HEADERS, cors.exposed))
    if cors.varies and not _is_varied([value.lower() for name, value in headers if name.lower() == VARY]):
        if VARY in names:
            headers = _changed(headers, VARY, lambda value: joined_names(value, b"Origin"))
        else:
            added.append((VARY, b"Origin"))
    return headers, added


def with_cors_fields(cors: CorsFields | None, headers: HeaderList) -> HeaderList:
    """Return the fields of a response of the gateway itself with those of CORS, if any; see `complete`."""
    if cors is None:
        return headers
    changed, added = complete(cors, headers)
    return changed + added


def _is_varied(values: Iterable[bytes]) -> bool:
    """Return whether the values of `Vary`, in lower case, include the origin."""
    return any(item.strip(b" \t") in (b"origin", b"*") for value in values for item in value.split(b","))


def _changed(headers: HeaderList, name: bytes, change: Callable[[bytes], bytes]) -> HeaderList:
    """Return the fields with the first one of this name changed."""
    found = list(headers)
    number = next(number for number, pair in enumerate(found) if pair[0].lower() == name)
    found[number] = (found[number][0], change(found[number][1]))
    return found


def joined_names(value: bytes, more: bytes) -> bytes:
    """Return a list of field names, with those of another list that it lacks."""
    given = {name.strip(b" \t").lower() for name in value.split(b",")}
    missing = [name for name in more.split(b", ") if name.lower() not in given]
    return b", ".join([value, *missing]) if value else b", ".join(missing)
