"""Pure functions on header byte pairs: what a proxy must take out, and what it must put in. Never a dict.

Names are compared in lower case and kept as they came. Sources: RFC 9110 section 7.6, RFC 9112, RFC 7239 (the
`X-Forwarded-*` names are the older convention that services actually read).
"""

import re
from collections.abc import Collection, Iterable
from email.utils import formatdate
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

from api_gateway.models import HeaderList

Network = IPv4Network | IPv6Network

VIA_NAME = b"api-gateway"

# RFC 9110 section 7.6.1, with the names it retired but that still travel.
HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# A client may not have these removed by naming them in `Connection`: the gateway or the framing depends on them.
PROTECTED = frozenset({b"host", b"content-length", b"via"})
FORWARDING = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-real-ip",
    }
)
# The gateway's word on these is the one that counts, so an upstream's is left out and not merged.
OURS = frozenset({b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset", b"x-request-id"})

# `Expect` was answered when the body was asked for; `Host` becomes the target's.
_NOT_FORWARDED = HOP_BY_HOP | {b"host", b"expect", b"x-request-id"}
_AUTHORITY = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_VISIBLE = re.compile(rb"[\x21-\x7e]{1,128}")


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """Return every value of `name` (lower case), white space around it taken off."""
    return [value.strip(b" \t") for key, value in headers if key.lower() == name]


def host_name(headers: HeaderList) -> str:
    """Return the host a request names, in lower case and without its port; empty unless it names one."""
    hosts = values(headers, b"host")
    if len(hosts) != 1:
        return ""
    host = hosts[0].decode("latin-1").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and (not port or port.isdigit()) else host


def is_visible_ascii(value: bytes) -> bool:
    """Tell whether `value` is 1 to 128 visible ASCII characters."""
    return _VISIBLE.fullmatch(value) is not None


def flaw(headers: HeaderList, version: str) -> str | None:
    """Return what makes a request ambiguous to some server, in words, or None. Such a request is not forwarded.

    A request names exactly one host (RFC 9112 section 3.2; HTTP/1.0 may name none). Its only transfer coding is
    `chunked`: any other makes its end a matter of opinion (RFC 9112 section 6.1).
    """
    hosts = values(headers, b"host")
    if len(hosts) != 1 and (hosts or version != "1.0"):
        return f"it names {len(hosts)} hosts"
    if hosts and _AUTHORITY.fullmatch(hosts[0]) is None:
        return "its Host is not a host and a port"
    codings = values(headers, b"transfer-encoding")
    if codings and version == "1.0":
        return "HTTP/1.0 has no Transfer-Encoding"
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        return "its Transfer-Encoding is not chunked"
    return None


def connection_options(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """Return the names that `Connection` declares to be for this hop only (RFC 9110 section 7.6.1)."""
    named = (value.split(b",") for value in values(headers, b"connection"))
    return {option.strip(b" \t").lower() for options in named for option in options} - PROTECTED


def has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Tell whether a request with these headers carries a body (RFC 9112 section 6.3)."""
    return any(
        name.lower() == b"transfer-encoding" or (name.lower() == b"content-length" and value.strip(b" \t0"))
        for name, value in headers
    )


def for_upstream(
    headers: HeaderList,
    *,
    host: bytes,
    peer: str,
    scheme: str,
    request_id: bytes,
    version: str,
    is_trusted: bool,
    protected: Collection[bytes] = (),
) -> HeaderList:
    """Return the request's headers as the upstream shall see them.

    `peer` is the address that connected to us. If `is_trusted`, what it says in `X-Forwarded-*` is extended,
    otherwise replaced. `protected` names (lower case) survive being named by `Connection`. A spelling of a protected
    or forwarding name with underscores is left out: servers that read headers as CGI variables take it for the name.
    """
    dropped = _NOT_FORWARDED | (connection_options(headers) - set(protected))
    if not is_trusted:
        dropped |= FORWARDING
    forgeable = FORWARDING.union(protected)
    kept: HeaderList = [(b"host", host)]
    hops: list[bytes] = []
    seen: set[bytes] = set()
    original_host = b""
    for name, value in headers:
        lower = name.lower()
        if lower == b"host":
            original_host = value
        elif lower == b"x-forwarded-for" and is_trusted:
            hops.append(value)
        elif lower == b"transfer-encoding":
            kept.append((name, value))
        elif lower not in dropped and not (b"_" in lower and lower.replace(b"_", b"-") in forgeable):
            seen.add(lower)
            kept.append((name, value))
    hops.append(peer.encode("ascii", "replace"))
    kept.append((b"x-forwarded-for", b", ".join(hops)))
    if b"x-forwarded-proto" not in seen:
        kept.append((b"x-forwarded-proto", scheme.encode()))
    if b"x-forwarded-host" not in seen and original_host:
        kept.append((b"x-forwarded-host", original_host))
    kept.append((b"via", b"%s %s" % (version.encode(), VIA_NAME)))
    kept.append((b"x-request-id", request_id))
    return kept


def for_client(headers: HeaderList, own: HeaderList, omit: frozenset[bytes]) -> HeaderList:
    """Return the upstream's headers as the client shall see them, followed by the gateway's `own`.

    `omit` names (lower case) are left out beside the hop-by-hop ones: what the server in front writes by itself.
    """
    dropped = HOP_BY_HOP | OURS | omit
    options = connection_options(headers)
    if options:
        dropped |= options
    kept = [pair for pair in headers if pair[0].lower() not in dropped]
    kept.append((b"via", b"1.1 " + VIA_NAME))
    kept += own
    return kept


@lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """Return an IMF-fixdate for a whole second since 1970 (RFC 9110 section 5.6.7)."""
    return formatdate(second, usegmt=True).encode()


@lru_cache(maxsize=4096)
def address_key(address: str) -> str:
    """Return what one peer is counted as: an IPv4 address, or the /64 of an IPv6 one.

    A /64 is the smallest block a site is given, so one host commands all of it. An IPv4 address mapped into IPv6 is
    that IPv4 address. What is no address (a unix socket's peer) is returned as it is.
    """
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(IPv6Network((parsed, 64), strict=False))
    return str(parsed)


def is_within(address: str, networks: Collection[Network]) -> bool:
    """Tell whether `address` lies in one of `networks`; what is no address lies in none."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return any(parsed in network for network in networks)


def client_address(peer: str, headers: HeaderList, trusted: Collection[Network]) -> str:
    """Return the address of the client itself.

    That is `peer`, unless `peer` is a trusted proxy: then the last hop of `X-Forwarded-For` that is not a trusted
    proxy. Reading from the right is what makes it unforgeable: everything left of that hop is the client's own text.
    """
    if not trusted or not is_within(peer, trusted):
        return peer
    hops = [hop.strip() for value in values(headers, b"x-forwarded-for") for hop in value.split(b",")]
    for hop in reversed(hops):
        address = hop.decode("latin-1")
        try:
            ip_address(address)
        except ValueError:
            return peer
        if not is_within(address, trusted):
            return address
        peer = address
    return peer
