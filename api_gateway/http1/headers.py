"""Rules on header fields: which ones a proxy removes and adds. Pure functions on lists of byte pairs.

Names are compared in lower case and forwarded unchanged. Sources: RFC 9110 section 7.6, RFC 9112, RFC 7239 (the
`X-Forwarded-*` fields are the older convention, which most services read).
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network
from typing import Literal

from api_gateway.ip_addresses import parse_address
from api_gateway.models import HeaderList

LENGTH = frozenset({b"content-length"})  # forbidden in responses with a status of 1xx or 204 (RFC 9110 section 8.6)
BODILESS = frozenset({204, 304})  # statuses whose responses never have a body (RFC 9112 section 6.3)


UNIX: Literal["unix"] = "unix"  # the address of every peer on a Unix socket
Network = IPv4Network | IPv6Network | Literal["unix"]
Fields = Mapping[bytes, Sequence[bytes]]  # the values of each name (lower case), in order

# RFC 9110 section 7.6.1, with obsolete names that are still in use.
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
# Fields that are kept even if `Connection` names them, because the gateway or the framing depends on them.
PROTECTED = frozenset({b"host", b"content-length", b"expect", b"via"})
FORWARDING = frozenset(
    {
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-real-ip",
    }
)
REQUEST_TIMEOUT = b"x-request-timeout"  # seconds for a request; the remaining time is forwarded
COST = b"x-gateway-cost"  # of a response: its actual cost in tokens, from the upstream to the gateway only
FALLBACK = b"x-gateway-fallback"  # of a response: the name of the fallback that generated it
# The gateway sets these fields of a response; an upstream's are removed.
GATEWAY_HEADERS = frozenset(
    {b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset", b"x-request-id", COST, FALLBACK}
)

# `Host` is replaced by the target's. A transfer coding is forwarded: `ambiguity` ensures that it is `chunked`.
_NOT_FORWARDED = (HOP_BY_HOP - {b"transfer-encoding"}) | {
    b"host",
    b"proxy",  # CGI would pass it as HTTP_PROXY, from which many programs take the proxy of their own requests
    b"x-request-id",
    COST,
    REQUEST_TIMEOUT,
}
_LIKE_FRAMING = frozenset({b"transferencoding", b"transfer.encoding", b"contentlength", b"content.length"})
# Not allowed in trailers: framing, routing, authentication, and fields that are evaluated before the body
# (RFC 9110 section 6.5.1).
_NEVER_TRAILING = (
    HOP_BY_HOP
    | PROTECTED
    | FORWARDING
    | GATEWAY_HEADERS
    | {b"authorization", b"cache-control", b"cookie", b"expect", b"max-forwards", b"range", b"set-cookie"}
    | {b"age", b"content-encoding", b"content-range", b"content-type", b"date", b"location", b"retry-after", b"vary"}
)
_PLAIN_OPTIONS = frozenset({b"close", b"keep-alive"})  # values of `Connection` that name no header field
_AUTHORITY = re.compile(
    rb"(?:(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[(?P<six>[0-9A-Fa-f:.]+)\])(?::(?P<port>[0-9]{0,5}))?"
)
_MAX_PORT = 65_535
_MAX_DIGITS = 19  # of a Content-Length; one of 2^63 bytes or more is too large for any limit
_VISIBLE = re.compile(rb"[\x21-\x7e]{1,128}")


def fields_of(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, list[bytes]]:
    """Return the values of each name in lower case, in order and without surrounding white space."""
    found: dict[bytes, list[bytes]] = {}
    for key, value in headers:
        name = key.lower()
        if name in found:
            found[name].append(value.strip(b" \t"))
        else:
            found[name] = [value.strip(b" \t")]
    return found


def host_name(fields: Fields) -> str:
    """Return the request's host in lower case, without port and trailing dot; empty unless there is one `Host`."""
    hosts = fields.get(b"host", ())
    return _host_name(hosts[0]) if len(hosts) == 1 else ""


@lru_cache(maxsize=1024)
def _host_name(value: bytes) -> str:
    host = value.decode("latin-1").lower()
    name, colon, port = host.rpartition(":")
    return (name if colon and (not port or port.isdigit()) else host).removesuffix(".")


@lru_cache(maxsize=1024)
def is_authority(value: bytes) -> bool:
    """Return whether a value is a valid host with an optional port."""
    found = _AUTHORITY.fullmatch(value)
    if found is None or int(found["port"] or 0) > _MAX_PORT:
        return False
    try:
        return found["six"] is None or bool(IPv6Address(found["six"].decode("ascii")))
    except ValueError:
        return False


def is_visible_ascii(value: bytes) -> bool:
    """Return whether `value` is 1 to 128 visible ASCII characters."""
    return _VISIBLE.fullmatch(value) is not None


def ambiguity(fields: Fields, version: str) -> str | None:
    """Return why servers may interpret a request differently, in words, or None if it is unambiguous.

    A request has exactly one `Host` (RFC 9112 section 3.2; optional in HTTP/1.0). With another transfer coding than
    `chunked`, with a length besides, or with several lengths, servers may disagree about the end of the body (RFC 9112
    sections 6.1 and 6.3). The general parser refuses such lengths itself, other servers and middleware do not.
    """
    hosts = fields.get(b"host", ())
    if len(hosts) != 1 and (hosts or version != "1.0"):
        return f"it has {len(hosts)} Host fields"
    if hosts and not is_authority(hosts[0]):
        return "its Host is not a valid host with an optional port"
    return _framing_ambiguity(fields, version)


def _framing_ambiguity(fields: Fields, version: str) -> str | None:
    codings, has_length = fields.get(b"transfer-encoding"), b"content-length" in fields
    if codings and version == "1.0":
        return "Transfer-Encoding is not defined for HTTP/1.0"
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        return "its Transfer-Encoding is not chunked"
    if codings and has_length:
        return "it has both Content-Length and Transfer-Encoding"
    return "its Content-Length is not one number" if has_length and content_length(fields) is None else None


def content_length(fields: Fields) -> int | None:
    """Return the value of `Content-Length` in bytes, or None unless it is one number."""
    lengths = fields.get(b"content-length", ())
    if len(lengths) != 1 or len(lengths[0]) > _MAX_DIGITS or not lengths[0].isdigit():
        return None
    return int(lengths[0])


def without_expectation(headers: HeaderList) -> HeaderList:
    """Return header fields without `Expect: 100-continue`, of a client that does not wait for the response."""
    return [pair for pair in headers if pair[0].lower() != b"expect" or pair[1].lower() != b"100-continue"]


def connection_options(connection: Iterable[bytes]) -> set[bytes]:
    """Return the field names in `Connection`, in lower case, without protected ones (RFC 9110 section 7.6.1)."""
    named = (value.split(b",") for value in connection)
    return {option.strip(b" \t").lower() for options in named for option in options} - PROTECTED


def framing(fields: Fields) -> bytes | None:
    """Return b"chunked", b"length", or None for a request without a body (RFC 9112 section 6.3)."""
    if b"transfer-encoding" in fields:
        return b"chunked"
    lengths = fields.get(b"content-length")
    return b"length" if lengths and lengths[0].strip(b"0") else None


@lru_cache(maxsize=64)
def stripped_headers(protected: frozenset[bytes], replaced: frozenset[bytes]) -> frozenset[bytes]:
    """Return the names of request fields that are not forwarded; `replaced` are those that the gateway replaces.

    They include spellings with underscores of all names that are protected, replaced or not forwarded, and of those
    that determine the framing, because CGI does not distinguish the two; and what a lenient server might take for
    framing.
    """
    distinct = FORWARDING | protected | PROTECTED | _NOT_FORWARDED | HOP_BY_HOP
    aliases = {alias for name in distinct for alias in spellings(name)} - distinct
    return _NOT_FORWARDED | aliases | _LIKE_FRAMING | replaced


def inspected_headers(protected: frozenset[bytes]) -> frozenset[bytes]:
    """Return the names that the gateway reads or does not forward; other fields are forwarded unread."""
    read = {b"content-length", b"expect", b"max-forwards", b"transfer-encoding", b"via"}
    return stripped_headers(protected, FORWARDING) | protected | read


def spellings(name: bytes) -> set[bytes]:
    """Return `name` with each combination of hyphens and underscores."""
    first, *rest = name.split(b"-")
    found = {first}
    for part in rest:
        found = {known + joint + part for known in found for joint in (b"-", b"_")}
    return found


def cgi_form(name: bytes) -> bytes:
    """Return one form for all names of fields that CGI takes for one."""
    return name.lower().replace(b"_", b"-")


@lru_cache(maxsize=8)
def _not_for_clients(omit: frozenset[bytes]) -> frozenset[bytes]:
    return HOP_BY_HOP | GATEWAY_HEADERS | omit


def rewrite_response(
    headers: HeaderList, fields: Fields, own: HeaderList, omit: frozenset[bytes], via: tuple[bytes, bytes]
) -> HeaderList:
    """Return the upstream's header fields for the client, followed by the gateway's entry in `Via` and its `own`.

    `fields` are the same fields by name. `omit` names (lower case) are removed in addition to hop-by-hop fields: those
    that the downstream server adds itself.
    """
    dropped = _not_for_clients(omit)
    connection = fields.get(b"connection")
    if connection is not None and (len(connection) > 1 or connection[0].lower() not in _PLAIN_OPTIONS):
        dropped |= connection_options(connection)
    kept = [pair for pair in headers if pair[0].lower() not in dropped]
    if len(fields.get(b"date", ())) > 1:
        kept = _with_one_date(kept)
    kept.append(via)
    kept += own
    return kept


def _with_one_date(headers: HeaderList) -> HeaderList:
    """Return the fields with the first `Date` only; it is a field that the gateway itself may add."""
    kept, has_date = [], False
    for pair in headers:  # by position: in the compiled variant a pair is another object each time
        is_date = pair[0].lower() == b"date"
        if not (is_date and has_date):
            kept.append(pair)
        has_date = has_date or is_date
    return kept


def forwardable_interim(headers: HeaderList, via: tuple[bytes, bytes]) -> HeaderList:
    """Return the header fields of an interim response (1xx) that are forwarded, with the gateway's entry in `Via`."""
    return rewrite_response(headers, fields_of(headers), [], LENGTH, via)


def forwardable_trailers(trailers: HeaderList, protected: frozenset[bytes] = frozenset()) -> HeaderList:
    """Return the trailer fields that are forwarded: none for framing, routing, authentication or caching."""
    dropped = _NEVER_TRAILING | stripped_headers(protected, FORWARDING) | protected
    return [pair for pair in trailers if pair[0].lower() not in dropped]


@lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """Return an IMF-fixdate for a whole second since 1970 (RFC 9110 section 5.6.7)."""
    return formatdate(second, usegmt=True).encode()


@lru_cache(maxsize=4096)
def address_key(address: str) -> str:
    """Return the key under which an address is counted: an IPv4 address, or the /64 network of an IPv6 address.

    A /64 is the smallest network that a site gets, so one host can use all of its addresses. An IPv4-mapped IPv6
    address is converted to IPv4. A string that is not an address, such as `unix`, is returned unchanged.
    """
    try:
        parsed = parse_address(address)
    except ValueError:
        return address
    return str(IPv6Network((parsed, 64), strict=False) if isinstance(parsed, IPv6Address) else parsed)


def is_within(address: str, networks: Collection[Network]) -> bool:
    """Return whether `address` is in one of `networks`; of strings that are not addresses, only `unix` may be."""
    try:
        parsed = parse_address(address)
    except ValueError:
        return address == UNIX and UNIX in networks
    return any(parsed in network for network in networks if not isinstance(network, str))
