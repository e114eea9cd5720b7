"""Rewrites URLs in response header fields, where a route strips a prefix that the upstream does not know. Pure.

`Location`, `Content-Location` and `Refresh` (RFC 9110 sections 10.2.2 and 8.7; HTML standard) that name the target, or
a path without the prefix, become paths below the prefix, so that the client stays behind the gateway. References to
other hosts, relative paths, and whatever is not a URL stay as they are. In `Set-Cookie` (RFC 6265), if enabled, `Path`
gets the prefix, and a `Domain` that is the target's host is removed, so that the cookie belongs to the gateway.
"""

import re
from dataclasses import dataclass, field

from api_gateway.models import HeaderList

FORWARDED_PREFIX = b"x-forwarded-prefix"  # of the request to the upstream
_NAMES = (b"location", b"content-location", b"refresh")
# Scheme and authority (or the authority alone), then the path: RFC 3986 appendix B, with a host.
_ABSOLUTE = re.compile(rb"(?:(https?):)?//([^/?#\\]*)([^\\]*)", re.IGNORECASE | re.DOTALL)
_REFRESH = re.compile(rb"([ \t]*[0-9.]+[ \t]*[;,][ \t]*(?:url[ \t]*=[ \t]*)?)([\"']?)(.*?)(\2[ \t]*)", re.IGNORECASE)
_PORTS = {b"http": b"80", b"https": b"443"}


@dataclass(frozen=True, slots=True)
class UrlRewriter:
    """Rewrites the fields of responses of one route. `prefix` is the stripped prefix, without a slash at the end."""

    prefix: bytes
    cookies: bool = False
    request_line: bytes = field(init=False, repr=False)  # that is added to the request, with a line break before it
    _lines: re.Pattern[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = (*_NAMES, b"set-cookie") if self.cookies else _NAMES
        # Most lines fail on their first letter, which takes a third less time than to compare whole names.
        pattern = rb"\r\n(?=[LlCcRrSs])((?i:%b)): ([^\r]*)" % b"|".join(names)
        object.__setattr__(self, "request_line", b"\r\n%b: %b" % (FORWARDED_PREFIX, self.prefix))
        object.__setattr__(self, "_lines", re.compile(pattern))

    def rewrite(self, headers: HeaderList, authority: bytes) -> HeaderList:
        """Return response fields with rewritten values. `authority` is host and port of the target's URL."""
        return [(name, self._value(name.lower(), value, authority)) for name, value in headers]

    def rewrite_lines(self, head: bytes, authority: bytes) -> bytes:
        """Return a plain response head with rewritten values, see `rewrite`."""
        return self._lines.sub(
            lambda line: b"\r\n%b: %b" % (line[1], self._value(line[1].lower(), line[2], authority)), head
        )

    def _value(self, name: bytes, value: bytes, authority: bytes) -> bytes:
        if name in (b"location", b"content-location"):
            return self.url(value, authority)
        if name == b"refresh":
            found = _REFRESH.fullmatch(value)
            return value if found is None else found[1] + found[2] + self.url(found[3], authority) + found[4]
        if name == b"set-cookie" and self.cookies:
            return self._cookie(value, authority)
        return value

    def url(self, url: bytes, authority: bytes) -> bytes:
        """Return a reference as the client may use it; unchanged if it does not lead past the gateway."""
        absolute = _ABSOLUTE.fullmatch(url)
        if absolute is None:
            return self._below(url) if url.startswith(b"/") else url
        scheme, host, rest = absolute.groups()
        if not _is_same(scheme, host, authority):
            return url
        return self._below(rest if rest.startswith(b"/") else b"/" + rest)

    def _below(self, path: bytes) -> bytes:
        prefix = self.prefix
        if path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in (b"", b"/", b"?", b"#"):
            return path
        return prefix + path

    def _cookie(self, value: bytes, authority: bytes) -> bytes:
        first, *attributes = value.split(b";")
        host = authority.rpartition(b":")[0] or authority
        kept = [first]
        for attribute in attributes:
            name, equals, given = attribute.partition(b"=")
            name, given = name.strip().lower(), given.strip()
            if name == b"path" and given.startswith(b"/"):
                kept.append(attribute[: attribute.index(b"=") + 1] + (self._below(given).rstrip(b"/") or b"/"))
            elif not (name == b"domain" and equals and given.lstrip(b".").lower() == host.lower()):
                kept.append(attribute)
        return b";".join(kept)


def _is_same(scheme: bytes | None, host: bytes, authority: bytes) -> bool:
    """Return whether host and port are those of the target; a default port may be missing."""
    host, authority = host.rpartition(b"@")[2].lower(), authority.lower()
    if host == authority:
        return True
    port = _PORTS.get((scheme or b"").lower())
    return port is not None and (host.removesuffix(b":" + port) == authority or host + b":" + port == authority)
