"""Header fields that a proxy removes and adds, and the address that a request comes from."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.http1.fast_parser import pairs_of
from api_gateway.http1.forwarded import (
    client_address,
    hop_address,
)
from api_gateway.http1.headers import (
    FORWARDING,
    GATEWAY_HEADERS,
    HOP_BY_HOP,
    PROTECTED,
    address_key,
    ambiguity,
    connection_options,
    fields_of,
    framing,
    host_name,
    http_date,
    is_visible_ascii,
    is_within,
    rewrite_response,
)
from api_gateway.http1.request_head import RequestHead
from api_gateway.http1.via import Via
from api_gateway.models import HeaderList
from api_gateway.proxy.header_facts import HeaderReader
from tests.cases import each

TOUCHED = HOP_BY_HOP | FORWARDING | GATEWAY_HEADERS | PROTECTED | {b"expect", b"x-request-id", b"date", b"server"}
TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.!#$&'*+^`|~", min_size=1, max_size=12)
VALUES = st.binary(max_size=20).map(lambda value: value.replace(b"\r", b""))
UNTOUCHED = st.lists(
    st.tuples(TOKEN.map(str.encode).filter(lambda name: name.lower() not in TOUCHED), VALUES),
    max_size=8,
)


def values(headers: HeaderList, name: bytes) -> list[bytes]:
    return fields_of(headers).get(name, [])


def upstreams_view(
    headers: HeaderList, *, is_trusted: bool = False, protected: frozenset[bytes] = frozenset(), version: str = "1.1"
) -> HeaderList:
    """Return what an upstream gets of these headers, sent by 192.0.2.7 over http."""
    (id_header,) = protected or (b"x-client-id",)
    trusted = (ip_network("192.0.2.7"),) if is_trusted else ()
    reader = HeaderReader(id_header=id_header.decode(), trusted_proxies=trusted, max_body_bytes=100)
    sent = reader.read_head("192.0.2.7", "http", RequestHead("GET", b"/", headers, version, 0, keep_alive=True)).sent
    return [(b"host", b"target:9001"), *pairs_of(sent), (b"x-request-id", b"id-1")]


def clients_view(headers: HeaderList, own: HeaderList, omit: frozenset[bytes]) -> HeaderList:
    """Return `rewrite_response` of these headers."""
    return rewrite_response(headers, fields_of(headers), own, omit, Via().field("1.1"))


# Towards the upstream


def test_an_upstream_sees_its_own_host_and_what_the_gateway_says_of_the_client() -> None:
    assert upstreams_view([(b"Host", b"shop.example"), (b"Accept", b"*/*")]) == [
        (b"host", b"target:9001"),
        (b"Accept", b"*/*"),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-forwarded-proto", b"http"),
        (b"x-forwarded-host", b"shop.example"),
        (b"via", b"1.1 api-gateway"),
        (b"x-request-id", b"id-1"),
    ]


@given(UNTOUCHED)
@example([(b"A", b"\xff"), (b"a", b""), (b"A", b" 1 ")])
def test_untouched_request_headers_keep_their_order_and_bytes(headers: HeaderList) -> None:
    assert upstreams_view([(b"host", b"h"), *headers])[1 : 1 + len(headers)] == headers


@given(UNTOUCHED)
@example([(b"Set-Cookie", b"a=1"), (b"set-cookie", b"b=2")])
def test_untouched_response_headers_keep_their_order_and_bytes(headers: HeaderList) -> None:
    assert clients_view(headers, [], frozenset()) == [*headers, (b"via", b"1.1 api-gateway")]


@each("name", sorted((HOP_BY_HOP - {b"transfer-encoding"}) | {b"x-request-id"}))
def test_what_concerns_this_hop_only_stays_here(name: bytes) -> None:
    seen = upstreams_view([(b"host", b"h"), (name.title(), b"theirs")])
    assert (name.title(), b"theirs") not in seen
    assert b"theirs" not in values(seen, name)


def test_a_transfer_encoding_is_kept_for_the_transport_to_frame_the_body() -> None:
    assert (b"Transfer-Encoding", b"chunked") in upstreams_view([(b"Transfer-Encoding", b"chunked")])


def test_what_connection_names_is_dropped() -> None:
    headers = [(b"Connection", b"close, X-Secret"), (b"x-secret", b"1"), (b"X-Other", b"2")]
    seen = upstreams_view(headers)
    assert values(seen, b"x-secret") == []
    assert values(seen, b"x-other") == [b"2"]


@each("name", [b"Host", b"Content-Length", b"Via", b"X-Client-ID"])
def test_connection_cannot_name_away_what_the_gateway_depends_on(name: bytes) -> None:
    headers = [(b"Connection", name), (b"host", b"h"), (b"via", b"1.0 x"), (b"content-length", b"3")]
    seen = upstreams_view([*headers, (b"x-client-id", b"acme")], protected=frozenset({b"x-client-id"}))
    assert [values(seen, key) for key in (b"host", b"content-length", b"x-client-id")] == [
        [b"target:9001"],
        [b"3"],
        [b"acme"],
    ]
    assert values(seen, b"via") == [b"1.0 x", b"1.1 api-gateway"]


@each("name", sorted(FORWARDING))
def test_forwarding_fields_of_an_untrusted_peer_are_replaced(name: bytes) -> None:
    seen = upstreams_view([(b"host", b"h"), (name.upper(), b"forged")])
    assert b"forged" not in [value for _, value in seen]
    assert values(seen, b"x-forwarded-for") == [b"192.0.2.7"]


def test_forwarding_fields_of_a_trusted_proxy_are_extended() -> None:
    headers = [
        (b"Host", b"inner"),
        (b"X-Forwarded-For", b"203.0.113.9"),
        (b"x-forwarded-for", b"198.51.100.1"),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", b"shop.example"),
        (b"Forwarded", b"for=203.0.113.9"),
    ]
    seen = upstreams_view(headers, is_trusted=True)
    assert values(seen, b"x-forwarded-for") == [b"203.0.113.9, 198.51.100.1, 192.0.2.7"]
    assert values(seen, b"x-forwarded-proto") == [b"https"]
    assert values(seen, b"x-forwarded-host") == [b"shop.example"]
    assert values(seen, b"forwarded") == [b"for=203.0.113.9"]


def test_without_forwarding_fields_of_a_trusted_proxy_the_gateway_sets_them() -> None:
    seen = upstreams_view([(b"host", b"shop.example")], is_trusted=True)
    assert values(seen, b"x-forwarded-for") == [b"192.0.2.7"]
    assert values(seen, b"x-forwarded-proto") == [b"http"]
    assert values(seen, b"x-forwarded-host") == [b"shop.example"]


def test_a_request_without_host_gets_no_forwarded_host() -> None:
    seen = upstreams_view([], version="1.0")
    assert values(seen, b"x-forwarded-host") == []
    assert values(seen, b"via") == [b"1.0 api-gateway"]


@each("name", [b"X_Forwarded_For", b"x-forwarded_proto", b"X_Client_ID"])
@each("is_trusted", [False, True])
def test_a_name_cannot_be_forged_with_underscores(name: bytes, is_trusted: bool) -> None:  # noqa: FBT001 - parametrised
    """CGI and WSGI give `X_Forwarded_For` and `X-Forwarded-For` to the application as one variable."""
    seen = upstreams_view([(name, b"forged")], is_trusted=is_trusted, protected=frozenset({b"x-client-id"}))
    assert b"forged" not in b" ".join(value for _, value in seen)


def test_other_names_may_hold_underscores() -> None:
    assert (b"x_trace", b"1") in upstreams_view([(b"x_trace", b"1")])


# Towards the client


@each("name", sorted(HOP_BY_HOP | GATEWAY_HEADERS | {b"date"}))
def test_fields_that_are_not_for_the_client_are_removed_from_the_response(name: bytes) -> None:
    assert clients_view([(name.title(), b"1"), (b"X", b"2")], [], frozenset({b"date"})) == [
        (b"X", b"2"),
        (b"via", b"1.1 api-gateway"),
    ]


def test_fields_that_the_responses_connection_names_are_removed_except_framing() -> None:
    answer = [(b"Connection", b"x-hop, content-length"), (b"X-Hop", b"1"), (b"Content-Length", b"2")]
    assert clients_view(answer, [], frozenset())[:-1] == [(b"Content-Length", b"2")]


def test_the_gateways_own_headers_stand_behind_the_upstreams() -> None:
    own = [(b"x-request-id", b"id-1"), (b"ratelimit", b"r")]
    assert clients_view([(b"A", b"1")], own, frozenset())[-2:] == own


def test_an_upstream_that_echoes_the_request_id_does_not_double_it() -> None:
    seen = clients_view([(b"X-Request-ID", b"theirs")], [(b"x-request-id", b"id-1")], frozenset())
    assert values(seen, b"x-request-id") == [b"id-1"]


def test_nothing_of_what_is_passed_in_is_changed() -> None:
    headers, own = [(b"te", b"1"), (b"a", b"2")], [(b"b", b"3")]
    clients_view(headers, own, frozenset())
    upstreams_view(headers)
    assert (headers, own) == ([(b"te", b"1"), (b"a", b"2")], [(b"b", b"3")])


# Reading


def test_values_come_in_order_whatever_the_case_of_the_name_and_without_white_space() -> None:
    headers = [(b"X-A", b" 1\t"), (b"b", b"2"), (b"x-a", b""), (b"X-a", b"a b")]
    assert values(headers, b"x-a") == [b"1", b"", b"a b"]


@each(
    ("given_values", "options"),
    [
        ([], set()),
        ([b"close"], {b"close"}),
        ([b"Keep-Alive , X-One", b"x-two"], {b"keep-alive", b"x-one", b"x-two"}),
        ([b"HOST, content-length,Via,x"], {b"x"}),
    ],
)
def test_connection_options(given_values: list[bytes], options: set[bytes]) -> None:
    assert connection_options(given_values) == options


@each(
    ("headers", "expected"),
    [
        ([], False),
        ([(b"Content-Length", b"0")], False),
        ([(b"content-length", b" 000 ")], False),
        ([(b"Content-Length", b"10")], True),
        ([(b"Transfer-Encoding", b"chunked")], True),
        ([(b"Content-Type", b"text/plain")], False),
    ],
)
def test_has_body(headers: HeaderList, expected: bool) -> None:  # noqa: FBT001 - parametrised
    assert (framing(fields_of(headers)) is not None) is expected


@each(
    ("hosts", "name"),
    [
        ([b"Example.ORG"], "example.org"),
        ([b" example.org:8000 "], "example.org"),
        ([b"example.org:"], "example.org"),
        ([b"[::1]:8000"], "[::1]"),
        ([b"[::1]"], "[::1]"),
        ([b"127.0.0.1"], "127.0.0.1"),
        ([b"example.org:http"], "example.org:http"),
        ([], ""),
        ([b""], ""),
        ([b"one", b"two"], ""),
    ],
)
def test_host_name(hosts: list[bytes], name: str) -> None:
    assert host_name(fields_of([(b"Host", host) for host in hosts])) == name


@each(
    ("value", "expected"),
    [
        (b"a", True),
        (b"!~", True),
        (b"x" * 128, True),
        (b"", False),
        (b"x" * 129, False),
        (b"a b", False),
        (b"a\n", False),
        (b"\x7f", False),
        (b"\xc3\xa9", False),
    ],
)
def test_is_visible_ascii(value: bytes, expected: bool) -> None:  # noqa: FBT001 - parametrised
    assert is_visible_ascii(value) is expected


@each(
    "headers",
    [
        [(b"Host", b"example.org")],
        [(b"host", b"example.org:8000")],
        [(b"host", b"[2001:db8::1]:8000")],
        [(b"host", b"")],
        [(b"host", b"h"), (b"Transfer-Encoding", b" Chunked ")],
        [(b"host", b"h"), (b"content-length", b"3")],
    ],
)
def test_a_plain_request_has_no_flaw(headers: HeaderList) -> None:
    assert ambiguity(fields_of(headers), "1.1") is None


@each(
    ("headers", "telling"),
    [
        ([], "0 Host fields"),
        ([(b"host", b"a"), (b"Host", b"a")], "2 Host fields"),
        ([(b"host", b"a/b")], "Host"),
        ([(b"host", b"user@a")], "Host"),
        ([(b"host", b"a b")], "Host"),
        ([(b"host", b"a:http")], "Host"),
        ([(b"host", b"[::1")], "Host"),
        ([(b"host", b"a"), (b"transfer-encoding", b"gzip, chunked")], "Transfer-Encoding"),
        ([(b"host", b"a"), (b"transfer-encoding", b"identity")], "Transfer-Encoding"),
        ([(b"host", b"a"), (b"transfer-encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")], "Transfer"),
        ([(b"host", b"a"), (b"transfer-encoding", b"")], "Transfer-Encoding"),
        ([(b"host", b"a"), (b"transfer-encoding", b"chunked"), (b"Content-Length", b"4")], "both Content-Length and"),
        ([(b"host", b"a"), (b"content-length", b"4"), (b"Content-Length", b"5")], "Content-Length"),
        ([(b"host", b"a"), (b"content-length", b"4"), (b"content-length", b"4")], "Content-Length"),
        *[
            ([(b"host", b"a"), (b"content-length", value)], "Content-Length")
            for value in (b"", b"+4", b"4_0", b"-1", b"4, 4", b"0x4", b"9" * 5_000)
        ],
    ],
)
def test_what_servers_read_in_different_ways_is_a_flaw(headers: HeaderList, telling: str) -> None:
    found = ambiguity(fields_of(headers), "1.1")
    assert found is not None
    assert telling in found


def test_only_http_1_0_may_name_no_host() -> None:
    assert ambiguity({}, "1.0") is None
    assert ambiguity({b"host": [b"a", b"b"]}, "1.0") is not None


@pytest.mark.parametrize(
    ("second", "date"), [(0, b"Thu, 01 Jan 1970 00:00:00 GMT"), (784_111_777, b"Sun, 06 Nov 1994 08:49:37 GMT")]
)
def test_http_date_is_the_one_of_rfc_9110(second: int, date: bytes) -> None:
    assert http_date(second) == date


# Addresses

TRUSTED = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]


@each(
    ("address", "key"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("/run/gateway.sock", "/run/gateway.sock"),
        ("unknown", "unknown"),
        ("", ""),
    ],
)
def test_a_peer_is_counted_as_what_one_host_can_command(address: str, key: str) -> None:
    assert address_key(address) == key


@given(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_two_ipv6_addresses_share_a_key_exactly_if_they_share_a_64(site: int, one: int, other: int) -> None:
    def spell(network: int, host: int) -> str:
        digits = f"{network << 64 | host:032x}"
        return ":".join(digits[start : start + 4] for start in range(0, 32, 4))

    assert address_key(spell(site, one)) == address_key(spell(site, other))
    assert address_key(spell(site, one)) != address_key(spell(site + 1 & 2**64 - 1 or 1, one))


@each(
    ("address", "expected"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::1", True),
        ("2001:db8::1%eth0", True),
        ("11.0.0.1", False),
        ("2001:db9::1", False),
        ("unknown", False),
        ("", False),
    ],
)
def test_is_within(address: str, expected: bool) -> None:  # noqa: FBT001 - parametrised
    assert is_within(address, TRUSTED) is expected


def test_nothing_is_within_no_network() -> None:
    assert not is_within("10.1.2.3", [])


@each(
    ("peer", "hops", "address"),
    [
        ("192.0.2.7", [b"203.0.113.9"], "192.0.2.7"),  # a stranger's word
        ("unknown", [b"203.0.113.9"], "unknown"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
        ("::ffff:10.0.0.1", [b"203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2", b"2001:db8::1"], "203.0.113.9"),  # through three proxies
        ("10.0.0.1", [b"198.51.100.1, 203.0.113.9 , 10.0.0.2"], "203.0.113.9"),  # what stands left may be forged
        ("10.0.0.1", [b"10.0.0.3,10.0.0.2"], "10.0.0.3"),  # a trusted machine is the client itself
        ("10.0.0.1", [b"203.0.113.9, garbage"], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9, garbage, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [b""], "10.0.0.1"),
        ("10.0.0.1", [b"203.0.113.9:443"], "203.0.113.9"),
        ("10.0.0.1", [b"203.0.113.9, 10.0.0.2:9"], "203.0.113.9"),  # a proxy that writes its port, too
        ("10.0.0.1", [b"198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"198.51.100.1, _hidden, 10.0.0.2:9"], "10.0.0.2"),
        ("10.0.0.1", [b"10.0.0.3, 203.0.113.9:99999999"], "10.0.0.1"),  # a trusted address may be forged, too
        ("10.0.0.1", [b"198.51.100.1, "], "10.0.0.1"),
        ("10.0.0.1", [b"\xff"], "10.0.0.1"),
    ],
)
def test_the_client_is_the_last_hop_that_is_no_trusted_proxy(peer: str, hops: list[bytes], address: str) -> None:
    headers = [(b"X-Forwarded-For", hop) for hop in hops]
    assert client_address(peer, fields_of(headers), TRUSTED).address == address


@each(
    ("hop", "address"),
    [
        (b"203.0.113.9", "203.0.113.9"),
        (b"203.0.113.9:443", "203.0.113.9"),
        (b"203.0.113.9:_hidden", "203.0.113.9"),
        (b'"203.0.113.9:443"', "203.0.113.9"),
        (b"::1", "::1"),
        (b"[::1]", "::1"),
        (b"[::1]:99", "::1"),
        (b'"[2001:db8::1]:99"', "2001:db8::1"),
        (b"::ffff:203.0.113.9", "203.0.113.9"),
        (b"[::ffff:203.0.113.9]:1", "203.0.113.9"),
        (b"2001:DB8:0::1", "2001:db8::1"),
        (b"fe80::1%eth0", "fe80::1"),
        (b"[fe80::1%eth0]:80", "fe80::1"),
        *((hop, None) for hop in (b"", b"unknown", b"_hidden", b"unix:", b"example.com", b"203.0.113.9:", b"[::1")),
        *(
            (hop, None)
            for hop in (b"203.0.113.9:1:1", b"[::1]x", b'"203.0.113.9', b"203.0.113.9%1", b"0x7f.1", b"\xff")
        ),
    ],
)
def test_a_hop_names_an_address_with_or_without_a_port(hop: bytes, address: str | None) -> None:
    assert hop_address(hop) == address


@given(st.binary(max_size=30))
def test_what_a_hop_names_is_an_address_whatever_it_says(hop: bytes) -> None:
    address = hop_address(hop)
    assert address is None or ip_address(address)


def test_no_peer_is_trusted_unless_configured() -> None:
    assert client_address("10.0.0.1", {b"x-forwarded-for": [b"203.0.113.9"]}, []).address == "10.0.0.1"
