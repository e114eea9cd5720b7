"""The client's address behind proxies: which field reports it, and in which form it is sent on.

`Forwarded` is RFC 7239; the `X-Forwarded-*` fields are the older convention, which most services read. A client can
write any of them. So only elements of trusted proxies count: they are read from the right, up to the first address
that is not a trusted proxy's. Pure functions on lists of byte pairs.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from itertools import islice, takewhile
from typing import NamedTuple

from api_gateway.http1.headers import FORWARDING, Fields, Network, is_within
from api_gateway.ip_addresses import parse_address
from api_gateway.models import HeaderList

MAX_HOPS = 64  # elements of a field that are read, from the right
X_FORWARDED_FOR = b"x-forwarded-for"
FORWARDED = b"forwarded"
_X_PROTO, _X_HOST = b"x-forwarded-proto", b"x-forwarded-host"
# A node of RFC 7239 section 6 with an address: optionally quoted, in brackets, or with a port (possibly obfuscated).
_NODE = re.compile(
    r"""(?P<quote>"?)(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[\w.~-]+)?)\]|(?P<four>[0-9.]+))(?::(?:[0-9]{1,5}|_[\w.-]+))?(?P=quote)""",
    re.ASCII,
)
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
# Values need quotes if they are not tokens, which not all proxies observe.
_VALUE = rb"(?:\"(?:[^\x00-\x08\x0a-\x1f\x7f\"\\]|\\[^\x00-\x08\x0a-\x1f\x7f])*+\"|[^\x00-\x20\x7f;,\"]*+)"
_PAIR = re.compile(rb"[ \t]*+(" + _TOKEN + rb")=(" + _VALUE + rb")[ \t]*+")
_ELEMENT = re.compile(rb"(?:[ \t;]|" + _TOKEN + rb"=" + _VALUE + rb"(?=[ \t;]|\Z))*+")
_SPECIAL = re.compile(rb'[",]')
_BACKSLASH = ord("\\")
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_IS_TOKEN = re.compile(_TOKEN)
_NAMED_NODE = re.compile(rb"unknown|_[A-Za-z0-9._-]+", re.IGNORECASE)  # that identifies no address
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=:\[\]%-]+")


class Forwarding(NamedTuple):
    """The field in which trusted proxies report clients, in lower case, and the forms that upstreams get."""

    read: bytes = X_FORWARDED_FOR
    sends_x_forwarded: bool = True
    sends_forwarded: bool = False


BY_X_FORWARDED = Forwarding()


class Hop(NamedTuple):
    """One element of a field: the node that sent a request to a proxy, with which scheme and `Host`.

    `node` is as written, without quotes, empty if the element is malformed or has none. `text` is the whole element.
    """

    node: bytes
    text: bytes
    scheme: bytes = b""
    host: bytes = b""


_MALFORMED = Hop(b"", b"")


@dataclass(frozen=True, slots=True)
class ClientAddress:
    """The client's address, and why it is that.

    `reporter` is the address of the trusted proxy that reported it, in the element number `position` from the right,
    `hop`; None and 0 if it is the peer of the connection.
    """

    address: str
    reporter: str | None = None
    position: int = 0
    hop: Hop | None = None


def client_address(
    peer: str, fields: Fields, trusted: Collection[Network], read: bytes = X_FORWARDED_FOR
) -> ClientAddress:
    """Return the client's address: `peer`, or if that is a trusted proxy, the address that trusted proxies report.

    The field `read` is read from the right up to the first hop that is not a trusted proxy, because a client can forge
    everything to the left of it. A hop without an address (`unknown` and `_hidden` of RFC 7239 section 6, an empty
    element, or any other text) ends the search at the proxy that added it.
    """
    found = ClientAddress(peer)
    if not trusted or not is_within(peer, trusted):
        return found
    for position, hop in enumerate(islice(_hops(fields, read), MAX_HOPS), 1):
        address = hop_address(hop.node)
        if address is None:
            return found
        found = ClientAddress(address, found.address, position, hop)
        if not is_within(address, trusted):
            return found
    return found


def _hops(fields: Fields, read: bytes) -> Iterator[Hop]:
    """Yield the elements of a field from the right."""
    for value in reversed(fields.get(read, ())):
        if read == FORWARDED:
            yield from map(_hop_of, _elements(value))
        else:
            yield from (Hop(hop.strip(), hop) for hop in reversed(value.split(b",")))


def _elements(value: bytes) -> Iterator[bytes]:
    """Yield the elements of a `Forwarded` field from the right.

    Quotes are matched from the right too: an open quote of a client, far left, does not hide what proxies have added.
    """
    end, is_quoted = len(value), False
    for special in reversed([match.start() for match in _SPECIAL.finditer(value)]):
        if value[special : special + 1] == b'"':
            before = special
            while before and value[before - 1] == _BACKSLASH:
                before -= 1
            if (special - before) % 2 == 0:  # else the quote is escaped
                is_quoted = not is_quoted
        elif not is_quoted:
            yield value[special + 1 : end]
            end = special
    yield value[:end]


def _hop_of(text: bytes) -> Hop:
    """Return an element of a `Forwarded` field; a malformed one, or one that repeats a parameter, has no node."""
    if _ELEMENT.fullmatch(text) is None:
        return _MALFORMED
    found: dict[bytes, bytes] = {}
    for name, value in _PAIR.findall(text):
        if name.lower() in found:
            return _MALFORMED
        found[name.lower()] = _ESCAPED.sub(rb"\1", value[1:-1]) if value.startswith(b'"') else value
    return Hop(found.get(b"for", b""), text.strip(b" \t"), found.get(b"proto", b""), found.get(b"host", b""))


@lru_cache(maxsize=4096)
def hop_address(node: bytes) -> str | None:
    """Return the address of a node, in its usual spelling, or None if it contains none.

    Quotes, brackets, port and zone are removed; a zone has a meaning on another machine only. A port may follow an
    IPv4 address, or an IPv6 address in brackets (RFC 7239 section 6). An IPv4-mapped IPv6 address becomes IPv4.
    """
    text = node.decode("latin-1")
    found = _NODE.fullmatch(text)
    address = _unquoted(text) if found is None else found["six"] or found["four"]
    try:
        ip_address(address)  # with its zone, which must be valid too
        return str(parse_address(address))
    except ValueError:
        return None


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


# What is sent on


@lru_cache(maxsize=16)
def replaced_fields(forwarding: Forwarding, is_trusted: bool) -> frozenset[bytes]:  # noqa: FBT001 - keywords are slow to cache
    """Return the names of the forwarding fields that are replaced: all of them, unless the peer is a trusted proxy."""
    if not is_trusted:
        return FORWARDING
    found = {X_FORWARDED_FOR}
    if forwarding.read == FORWARDED or forwarding.sends_forwarded:
        found.add(FORWARDED)
    if forwarding.read == FORWARDED or not forwarding.sends_x_forwarded:
        found |= {_X_PROTO, _X_HOST}
    return frozenset(found)


def forwarding_fields(
    fields: Fields,
    *,
    peer: str,
    scheme: str,
    is_trusted: bool,
    forwarding: Forwarding = BY_X_FORWARDED,
    reported: Hop | None = None,
) -> HeaderList:
    """Return the forwarding fields for the upstream. `peer` is the address of the connection.

    What a trusted proxy has reported is extended by `peer`, and converted if it is sent in another form; otherwise it
    is replaced. `reported` is the element with the client's address.
    """
    found: HeaderList = []
    if forwarding.sends_x_forwarded:
        hosts = fields.get(b"host", ())
        if is_trusted and forwarding.read == FORWARDED:
            nodes = [_x_node(hop.node) for hop in reversed(_well_formed(fields))]
            found.append((X_FORWARDED_FOR, b", ".join((*nodes, _node_of(peer)))))
            found.append((_X_PROTO, _scheme_in(reported) or scheme.encode()))
            host = _host_in(reported) or next(iter(hosts), b"")
            if host:
                found.append((_X_HOST, host))
        else:
            hops = fields.get(X_FORWARDED_FOR, ()) if is_trusted else ()
            found.append((X_FORWARDED_FOR, b", ".join((*hops, _node_of(peer)))))
            if not is_trusted or _X_PROTO not in fields:
                found.append((_X_PROTO, scheme.encode()))
            if hosts and (not is_trusted or _X_HOST not in fields):
                found.append((_X_HOST, hosts[0]))
    if forwarding.sends_forwarded:
        before = _elements_before(fields, forwarding) if is_trusted else []
        found.append((FORWARDED, b", ".join([*before, _own_element(fields, peer, scheme)])))
    return found


def _well_formed(fields: Fields) -> list[Hop]:
    """Return the elements of `Forwarded` from the right, up to the first malformed one, which a client has written."""
    return list(takewhile(lambda hop: hop.text, islice(_hops(fields, FORWARDED), MAX_HOPS)))


def _elements_before(fields: Fields, forwarding: Forwarding) -> list[bytes]:
    """Return the elements of `Forwarded` that describe the hops before this gateway, from the left."""
    if forwarding.read == FORWARDED:
        return [hop.text for hop in reversed(_well_formed(fields))]
    hops = list(islice(_hops(fields, X_FORWARDED_FOR), MAX_HOPS))
    found = [b"for=" + _quoted_node(hop.node) for hop in reversed(hops) if hop.node]
    if found:  # the first proxy has reported scheme and host
        first = Hop(b"", b"", *(fields.get(name, (b"",))[0] for name in (_X_PROTO, _X_HOST)))
        found[0] += _parameters(_host_in(first), _scheme_in(first))
    return found


def _own_element(fields: Fields, peer: str, scheme: str) -> bytes:
    host = next(iter(fields.get(b"host", ())), b"")
    return b"for=" + _quoted_node(_node_of(peer)) + _parameters(host, scheme.encode())


def _parameters(host: bytes, scheme: bytes) -> bytes:
    found = b""
    if host:
        found += b";host=" + (host if _IS_TOKEN.fullmatch(host) else b'"%b"' % host)
    return found + (b";proto=" + scheme if scheme else b"")


def _scheme_in(hop: Hop | None) -> bytes:
    """Return the scheme of an element in lower case, empty if it has none of HTTP."""
    scheme = b"" if hop is None else hop.scheme.lower()
    return scheme if scheme in (b"http", b"https") else b""


def _host_in(hop: Hop | None) -> bytes:
    """Return the host of an element, empty if it has none that is valid."""
    host = b"" if hop is None else hop.host
    return host if _HOST.fullmatch(host) else b""


@lru_cache(maxsize=4096)
def _node_of(peer: str) -> bytes:
    return peer.encode("ascii", "replace")


@lru_cache(maxsize=4096)
def _x_node(node: bytes) -> bytes:
    """Return a node as an element of `X-Forwarded-For`."""
    address = hop_address(node)
    if address is not None:
        return address.encode()
    return node if _NAMED_NODE.fullmatch(node) else b"unknown"


@lru_cache(maxsize=4096)
def _quoted_node(node: bytes) -> bytes:
    """Return a node as a value of `for` (RFC 7239 section 6); the peer on a Unix socket is `_unix`."""
    address = hop_address(node)
    if address is not None:
        return b'"[%b]"' % address.encode() if ":" in address else address.encode()
    if node == b"unix":
        return b"_unix"
    return node if _NAMED_NODE.fullmatch(node) else b"unknown"
