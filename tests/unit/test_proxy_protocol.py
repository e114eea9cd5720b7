"""The PROXY protocol: each header has one meaning, in whatever pieces it arrives, and garbage is refused."""

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.downstream.proxy_protocol import (
    MAX_HEADER,
    MAX_LINE,
    SIGNATURE,
    ProxyHeaderError,
    parse_proxy_header,
)
from tests.cases import each

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
FOUR = IPv4Address("203.0.113.9").packed + IPv4Address("192.0.2.1").packed + struct.pack("!HH", 4711, 443)
SIX = IPv6Address("2001:db8::9").packed + IPv6Address("2001:db8::1").packed + struct.pack("!HH", 4711, 443)
MAPPED = IPv6Address("::ffff:203.0.113.9").packed + IPv6Address("::1").packed + struct.pack("!HH", 1, 2)


def second(command: int, family: int, body: bytes, length: int | None = None) -> bytes:
    """Return a header of version 2."""
    return SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


LINES = [
    (b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 443", ("203.0.113.9", 4711)),
    (b"PROXY TCP6 2001:DB8::9 2001:db8::1 4711 443", ("2001:db8::9", 4711)),
    (b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ::1 65535 65535", (f"{'ffff:' * 7}ffff", 65_535)),
    (b"PROXY TCP6 ::ffff:203.0.113.9 ::1 0 1", ("203.0.113.9", 0)),
    (b"PROXY UNKNOWN", None),
    (b"PROXY UNKNOWN ffff::1 ::1 1 2", None),
    (b"PROXY UNKNOWN whatever this is", None),
]
BINARIES = [
    (second(0x21, 0x11, FOUR), ("203.0.113.9", 4711)),
    (second(0x21, 0x21, SIX), ("2001:db8::9", 4711)),
    (second(0x21, 0x21, MAPPED), ("203.0.113.9", 1)),
    (second(0x21, 0x11, FOUR + b"\x03\x00\x04abcd\x20\x00\x01x"), ("203.0.113.9", 4711)),  # with TLVs
    (second(0x21, 0x11, FOUR + b"\x04" * (MAX_HEADER - 16 - 12)), ("203.0.113.9", 4711)),
    (second(0x20, 0x00, b""), None),  # LOCAL
    (second(0x20, 0x11, FOUR), None),
    (second(0x20, 0x11, b"short"), None),
    (second(0x21, 0x00, b"anything"), None),  # PROXY of an unspecified family
    (second(0x21, 0x12, FOUR), None),  # UDP
    (second(0x21, 0x31, b"/path".ljust(216, b"\x00")), None),  # a Unix socket
]
HEADERS = [(line + b"\r\n", source) for line, source in LINES] + BINARIES


@each(("header", "source"), HEADERS)
def test_a_header_names_the_client_in_whatever_pieces_it_comes(header: bytes, source: tuple[str, int] | None) -> None:
    """What follows it is not read; nothing is concluded before it is complete."""
    assert parse_proxy_header(header + REQUEST) == (source, len(header))
    for size in [*range(min(len(header), 300)), len(header) - 1]:
        assert parse_proxy_header(bytearray(header[:size])) is None


@each(
    ("received", "cause"),
    [
        (REQUEST, "does not begin with"),
        (b"\r\n\r\nGET", "does not begin with"),
        (b"PROXYTCP4", "does not begin with"),
        (b"proxy TCP4", "does not begin with"),
        (b"\x16\x03\x01", "does not begin with"),
        (b"PROXY TCP5 1.2.3.4 1.2.3.4 1 2\r\n", "malformed"),
        (b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n", "malformed"),
        (b"PROXY TCP6 fe80::1 fe80::2%1 1 2\r\n", "malformed"),
        (b"PROXY TCP6 [::1] ::1 1 2\r\n", "malformed"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", "malformed"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2 3\r\n", "malformed"),
        (b"PROXY TCP4  1.2.3.4 1.2.3.4 1 2\r\n", "malformed"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n\r\n", "malformed"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 2\r\n", "malformed"),
        (b"PROXY UNKNOWNX\r\n", "malformed"),
        (b"PROXY \r\n", "malformed"),
        (b"PROXY TCP4 1.2.3.400 1.2.3.4 1 2\r\n", "invalid TCP4 address"),
        (b"PROXY TCP4 ::1 ::1 1 2\r\n", "invalid TCP4 address"),
        (b"PROXY TCP6 1.2.3.4 1.2.3.4 1 2\r\n", "invalid TCP6 address"),
        (b"PROXY TCP6 ::1 localhost 1 2\r\n", "malformed"),
        (b"PROXY TCP6 ::1 :::1 1 2\r\n", "invalid TCP6 address"),
        (b"PROXY TCP4 01.2.3.4 1.2.3.4 1 2\r\n", "invalid TCP4 address"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 2\r\n", "port above 65535"),
        (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 99999\r\n", "port above 65535"),
        (b"PROXY UNKNOWN " + b"x" * MAX_LINE, "longer than 107 bytes"),
        (second(0x11, 0x11, FOUR), "unknown version and command 0x11"),
        (second(0x22, 0x11, FOUR), "unknown version and command 0x22"),
        (second(0x21, 0x41, FOUR), "unknown address family 0x41"),
        (second(0x21, 0x13, FOUR), "unknown address family 0x13"),
        (second(0x21, 0x11, FOUR[:-1]), "11 bytes of addresses"),
        (second(0x21, 0x21, SIX[:-1]), "35 bytes of addresses"),
        (second(0x21, 0x11, b"", length=MAX_HEADER - 15), "longer than 16384 bytes"),
    ],
)
def test_anything_else_is_refused_with_its_cause(received: bytes, cause: str) -> None:
    with pytest.raises(ProxyHeaderError, match=cause):
        parse_proxy_header(received)


LETTERS = st.text("PROXY TCP46:.\r\n0123456789abcdef", max_size=120)
MUTATED = st.tuples(st.sampled_from(HEADERS), st.integers(0, 60), st.binary(max_size=4)).map(
    lambda drawn: drawn[0][0][: drawn[1]] + drawn[2] + drawn[0][0][drawn[1] + len(drawn[2]) :]
)
GARBAGE = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(SIGNATURE.__add__),
    LETTERS.map(lambda text: b"PROXY " + text.encode()),
    MUTATED,
)


@given(GARBAGE)
def test_whatever_arrives_names_an_address_or_is_refused_or_waits_within_bounds(received: bytes) -> None:
    try:
        found = parse_proxy_header(received)
    except ProxyHeaderError:
        return
    if found is None:
        assert len(received) < MAX_HEADER
        return
    assert 0 < found.size <= len(received)
    assert found.source is None or (ip_address(found.source[0]) and 0 <= found.source[1] <= 65_535)


@given(st.ip_addresses(), st.integers(0, 65_535))
def test_both_versions_name_the_same_client(address: IPv4Address | IPv6Address, port: int) -> None:
    family, name = (0x11, "TCP4") if address.version == 4 else (0x21, "TCP6")
    one = parse_proxy_header(f"PROXY {name} {address} {address} {port} 80\r\n".encode())
    two = parse_proxy_header(second(0x21, family, address.packed * 2 + struct.pack("!HH", port, 80)))
    assert one is not None
    assert two is not None
    assert one.source == two.source
