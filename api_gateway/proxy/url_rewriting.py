"""Rewrites URLs in response header fields, above all where a route strips or replaces a prefix. Pure.

`Location`, `Content-Location` and `Refresh` (RFC 9110 sections 10.2.2 and 8.7; HTML standard) that name a target of
the upstream, or a path without the prefix, become paths below the prefix, so that the client stays behind the gateway.
References to other hosts, relative paths, and whatever is not a URL stay as they are. If the prefix is replaced by
another one, paths below the other one get the prefix back; all other paths stay unchanged, because no path of the
route leads to them. Without a prefix, only URLs that name a target become paths. In `Set-Cookie` (RFC 6265), if
enabled, `Path` gets the prefix, and a `Domain` that is a target's host is removed, so that the cookie belongs to the
gateway. Other domains are replaced as configured, with or without a prefix. Browsers accept a `__Host-` cookie with
`Path=/` and without `Domain` alone, so it stays as it is.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from api_gateway.models import Exchange, HeaderList
from api_gateway.proxy.edited_lines import EditedLinesCache
from api_gateway.upstreams.upstream_client import UpstreamClient

FORWARDED_PREFIX = b"x-forwarded-prefix"  # of the request to the upstream
_NAMES = (b"location", b"content-location", b"refresh")
# Scheme and authority (or the authority alone), then the path: RFC 3986 appendix B, with a host.
_ABSOLUTE = re.compile(rb"(?:(https?):)?//([^/?#\\]*)([^\\]*)", re.IGNORECASE | re.DOTALL)
# The time and its separator, which may be a blank, and the opening quote, before the URL.
_REFRESH = re.compile(rb"[ \t]*[0-9.]+(?:[ \t]*[;,]|(?=[ \t]))[ \t]*(?:url[ \t]*=[ \t]*)?([\"']?)", re.IGNORECASE)
_PORTS = {b"http": b"80", b"https": b"443"}
_ANY_DOMAIN = b"*"
_HOST_PREFIX = b"__host-"  # of the name of a cookie, in any letter case (RFC 6265bis section 4.1.3.2)


class Authorities(NamedTuple):
    """Hosts with ports by which an upstream may refer to itself.

    `internal` are of all targets and, if another one is configured, of `Host`: an upstream may name another target
    than that of the attempt. `public` is the `Host` of the client, which the upstream gets in `X-Forwarded-Host` at
    least; empty if there is none.
    """

    internal: tuple[bytes, ...]
    public: bytes = b""

    @classmethod
    def of(cls, upstream_client: UpstreamClient, client_host: bytes) -> "Authorities":
        """Return the authorities of a request to an upstream; `client_host` is the client's `Host`."""
        return cls(upstream_client.authorities, client_host)


NO_AUTHORITIES = Authorities(())


@dataclass(frozen=True, slots=True)
class UrlRewriter:
    """Rewrites the fields of responses of one route.

    `prefix` is the stripped prefix, without a slash at the end, and `root` what an application that mounts the gateway
    strips before; if both are empty, paths pass. `replacement` is what the upstream gets in place of the prefix,
    likewise; empty: nothing. `urls` and `cookies`: whether URLs, and `Path` and `Domain` of cookies, are rewritten.
    `domains` are pairs of a `Domain` of cookies in lower case without a leading dot (`*`: any other one) and its
    replacement; an empty one removes it.
    """

    prefix: bytes
    cookies: bool = False
    domains: tuple[tuple[bytes, bytes], ...] = ()
    replacement: bytes = b""
    urls: bool = True
    root: bytes = b""
    needs_authorities: bool = field(init=False, repr=False)  # always
    request_line: bytes = field(init=False, repr=False)  # that is added to the request, with a line break before it
    _whole: bytes = field(init=False, repr=False)  # `root` and `prefix`
    _lines: re.Pattern[bytes] = field(init=False, repr=False)
    _domains: dict[bytes, bytes] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole = self.root + self.prefix
        names = (*(_NAMES if self.urls else ()), *((b"set-cookie",) if self.cookies or self.domains else ()))
        # Most lines fail on their first letter, which takes a third less time than to compare whole names.
        pattern = rb"\r\n(?=[LlCcRrSs])((?i:%b)): ([^\r]*)" % b"|".join(names)
        is_told = self.urls and whole and not self.replacement
        line = b"\r\n%b: %b" % (FORWARDED_PREFIX, whole) if is_told else b""
        object.__setattr__(self, "needs_authorities", True)
        object.__setattr__(self, "request_line", line)
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_lines", re.compile(pattern))
        object.__setattr__(self, "_domains", dict(self.domains))

    def edited(self, lines: bytes, _facts: EditedLinesCache, _exchange: Exchange, _raw_target: bytes) -> bytes:
        """Return the header lines for the upstream, see `HeadEditor`."""
        return lines

    @staticmethod
    def request_trailers(trailers: HeaderList) -> HeaderList:
        """Return the trailers for the upstream, see `HeadEditor`."""
        return trailers

    @staticmethod
    def later_fields(fields: HeaderList) -> HeaderList:
        """Return the trailers, or the fields of an interim response, for the client; see `HeadEditor`."""
        return fields

    def bound(self, _exchange: Exchange, _raw_target: bytes) -> "UrlRewriter":
        """Return the editor of the response to a request, see `HeadEditor`."""
        return self

    def rewrite(self, headers: HeaderList, authorities: Authorities) -> HeaderList:
        """Return response fields with rewritten values."""
        return [(name, self._value(name.lower(), value, authorities)) for name, value in headers]

    def rewrite_lines(self, head: bytes, authorities: Authorities) -> bytes:
        """Return a plain response head with rewritten values, see `rewrite`."""
        return self._lines.sub(
            lambda line: b"\r\n%b: %b" % (line[1], self._value(line[1].lower(), line[2], authorities)), head
        )

    def _value(self, name: bytes, value: bytes, authorities: Authorities) -> bytes:
        if name in _NAMES:
            if not self.urls:
                return value
            return self._refresh(value, authorities) if name == b"refresh" else self.url(value, authorities)
        if name == b"set-cookie" and (self.cookies or self.domains):
            return self._cookie(value, authorities.internal)
        return value

    def url(self, url: bytes, authorities: Authorities) -> bytes:
        """Return a reference as the client may use it; unchanged if it does not lead past the gateway."""
        absolute = _ABSOLUTE.fullmatch(url)
        if absolute is None:
            return self._below(url) if url.startswith(b"/") else url
        scheme, host, rest = absolute.groups()
        own = authorities.internal
        if self._whole and authorities.public:
            own = (*own, authorities.public)
        if not any(_is_same(scheme, host, authority) for authority in own):
            return url
        path = rest if rest.startswith(b"/") else b"/" + rest
        if self.replacement and not _is_below(path, self.replacement):
            return url
        return self._below(path)

    def _refresh(self, value: bytes, authorities: Authorities) -> bytes:
        """Return a `Refresh` with its URL rewritten: up to the closing quote, if it begins with a quote."""
        found = _REFRESH.match(value)
        if found is None:
            return value
        given, end = value[found.end() :], b""
        if found[1]:
            given, end, text = given.partition(found[1])
            end += text
        url = given.strip(b" \t")
        new = self.url(url, authorities)
        return value if new == url else found[0] + new + end

    def _below(self, path: bytes) -> bytes:
        if self.replacement:
            if _is_below(path, self.replacement):
                path = path[len(self.replacement) :]
            else:
                return self.root + path if self.root and not _is_below(path, self.root) else path
        elif self._whole:
            if _is_below(path, self._whole):
                return path
            if self.root and self.prefix and _is_below(path, self.prefix):
                return self.root + path
        return self._whole + path if self._whole else _rooted(path)

    def _cookie(self, value: bytes, internal: tuple[bytes, ...]) -> bytes:
        first, *attributes = value.split(b";")
        if first.lstrip().lower().startswith(_HOST_PREFIX):
            return value
        kept = [first]
        for attribute in attributes:
            name, equals, given = attribute.partition(b"=")
            name, given = name.strip().lower(), given.strip()
            new: bytes | None = None
            if name == b"path" and self.cookies and given.startswith(b"/"):
                new = self._below(given).rstrip(b"/") or b"/"
            elif name == b"domain" and equals:
                new = self._domain(given.lstrip(b".").lower(), internal)
            if new is None:
                kept.append(attribute)
            elif new:
                kept.append(attribute[: attribute.index(b"=") + 1] + new)
        return b";".join(kept)

    def _domain(self, domain: bytes, internal: tuple[bytes, ...]) -> bytes | None:
        """Return the replacement of a cookie's domain: empty to remove it, None to keep it."""
        new = self._domains.get(domain)
        if new is None and self.cookies and domain in map(_host_of, internal):
            return b""
        return self._domains.get(_ANY_DOMAIN) if new is None else new


def _rooted(path: bytes) -> bytes:
    """Return a path that is no reference to a host, such as `//host`."""
    return b"/" + path.lstrip(b"/\\")


def _is_below(path: bytes, prefix: bytes) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in (b"", b"/", b"?", b"#")


def _host_of(authority: bytes) -> bytes:
    return (authority.rpartition(b":")[0] or authority).lower()


def _is_same(scheme: bytes | None, host: bytes, authority: bytes) -> bool:
    """Return whether host and port are those of the target; a default port may be missing."""
    host, authority = host.rpartition(b"@")[2].lower(), authority.lower()
    if host == authority:
        return True
    port = _PORTS.get((scheme or b"").lower())
    return port is not None and (host.removesuffix(b":" + port) == authority or host + b":" + port == authority)
