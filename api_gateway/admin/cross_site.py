"""Detection of requests that a page of another site makes through the operator's browser (CSRF). Pure decisions.

Browsers state the origin of a request in `Origin` and, all of them since 2023, in `Sec-Fetch-Site` (W3C Fetch
Metadata); a page can neither set nor remove these fields. A client that is not a browser sends neither.
"""

from collections.abc import Sequence

from api_gateway.errors import InvalidValue
from api_gateway.http1.headers import Fields, framing

_OWN_SITES = frozenset({b"same-origin", b"none"})
_DEFAULT_PORTS = {b"http": b":80", b"https": b":443"}
_JSON = b"application/json"


def is_foreign(fields: Fields) -> bool:
    """Return whether a page of another origin made the request. Another port and `Origin: null` are other origins."""
    sites = fields.get(b"sec-fetch-site", ())
    if any(site.lower() not in _OWN_SITES for site in sites):
        return True
    origins = fields.get(b"origin", ())
    return any(not _is_own(origin, fields.get(b"host", ())) for origin in origins)


def is_navigation(method: str, fields: Fields) -> bool:
    """Return whether the browser opens the response as a top-level page, as when a link is followed."""
    return (
        method in ("GET", "HEAD")
        and fields.get(b"sec-fetch-mode") == [b"navigate"]
        and fields.get(b"sec-fetch-dest") == [b"document"]
    )


def is_forged(method: str, fields: Fields, *, holds_data: bool) -> bool:
    """Return whether a request may be forged, because a page of another origin made it.

    A link from another site to a page without data (`holds_data` false) is permitted.
    """
    return is_foreign(fields) and (holds_data or not is_navigation(method, fields))


def check_content_type(method: str, fields: Fields) -> None:
    """Raise InvalidValue unless `Content-Type` is JSON, which a form of another site cannot send.

    A request without a body may omit `Content-Type`, but may not have another one, as an empty form would.
    """
    if method in ("GET", "HEAD", "OPTIONS"):
        return
    types = fields.get(b"content-type", ())
    if not types and framing(fields) is None:
        return
    if len(types) == 1 and types[0].partition(b";")[0].rstrip(b" \t").lower() == _JSON:
        return
    given = " and ".join(f"'{value[:60].decode('latin-1')!s}'" for value in types) or "none"
    raise InvalidValue(f"Send the header 'Content-Type: application/json'; this request has {ascii(given)[1:-1]}.")


def _is_own(origin: bytes, hosts: Sequence[bytes]) -> bool:
    """Return whether `origin` equals `Host`. The scheme is ignored: a proxy before the gateway may terminate TLS."""
    scheme, separator, authority = origin.lower().partition(b"://")
    if len(hosts) != 1 or not separator or scheme not in _DEFAULT_PORTS:
        return False
    port = _DEFAULT_PORTS[scheme]
    return authority.removesuffix(port) == hosts[0].lower().removesuffix(port)
