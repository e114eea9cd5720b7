"""The client's address behind proxies, in every spelling: never an error, never one that an untrusted peer chose."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.config import load_config
from api_gateway.http1.forwarded import (
    BY_X_FORWARDED,
    FORWARDED,
    MAX_HOPS,
    X_FORWARDED_FOR,
    Forwarding,
    client_address,
    forwarding_fields,
    hop_address,
    replaced_fields,
)
from api_gateway.http1.headers import FORWARDING, Network, fields_of
from api_gateway.models import HeaderList
from api_gateway.settings.rules import access_warnings
from tests.cases import each

TRUSTED: list[Network] = [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]
BY_FORWARDED = Forwarding(FORWARDED, sends_x_forwarded=False, sends_forwarded=True)


def decided(*values: bytes, read: bytes = FORWARDED, peer: str = "10.0.0.1") -> tuple[str, str | None, int]:
    """Return address, reporter and position for a request with these values of the field that is read."""
    found = client_address(peer, fields_of([(read, value) for value in values]), TRUSTED, read)
    return found.address, found.reporter, found.position


@each(
    ("values", "expected"),
    [
        ((b"for=203.0.113.9",), ("203.0.113.9", "10.0.0.1", 1)),
        ((b"For=203.0.113.9; Proto=HTTPS ;by=10.0.0.1",), ("203.0.113.9", "10.0.0.1", 1)),
        ((b'for="203.0.113.9:4711"',), ("203.0.113.9", "10.0.0.1", 1)),
        ((b'for="[2001:DB8::1]:4711";host="a, b"',), ("2001:db8::1", "10.0.0.1", 1)),
        ((b"for=[2001:db8::1]",), ("2001:db8::1", "10.0.0.1", 1)),  # quotes are missing
        ((b"for=203.0.113.9:80",), ("203.0.113.9", "10.0.0.1", 1)),  # likewise
        ((b'for="[::ffff:203.0.113.9]"',), ("203.0.113.9", "10.0.0.1", 1)),
        ((b'for="203.0.113\\.9"',), ("203.0.113.9", "10.0.0.1", 1)),
        ((b"for=198.51.100.1, for=203.0.113.9",), ("203.0.113.9", "10.0.0.1", 1)),
        ((b"for=198.51.100.1, for=203.0.113.9, for=10.0.0.2",), ("203.0.113.9", "10.0.0.2", 2)),
        ((b"for=198.51.100.1", b"for=203.0.113.9", b'for="[fd00::2]"'), ("203.0.113.9", "fd00::2", 2)),
        ((b"for=10.0.0.3, for=10.0.0.2",), ("10.0.0.3", "10.0.0.2", 2)),  # a trusted machine is the client itself
        ((b"for=unknown",), ("10.0.0.1", None, 0)),
        ((b"for=198.51.100.1, for=_hidden, for=10.0.0.2",), ("10.0.0.2", "10.0.0.1", 1)),
        ((b"proto=https",), ("10.0.0.1", None, 0)),
        ((b"",), ("10.0.0.1", None, 0)),
        ((b"for=198.51.100.1, ",), ("10.0.0.1", None, 0)),
        ((b"for=198.51.100.1;for=203.0.113.9",), ("10.0.0.1", None, 0)),  # twice
        ((b"for=203.0.113.9;proto",), ("10.0.0.1", None, 0)),
        ((b"203.0.113.9",), ("10.0.0.1", None, 0)),
        ((b"for=203.0.113.9 proto=http",), ("203.0.113.9", "10.0.0.1", 1)),
        ((b'for="203.0.113.9',), ("10.0.0.1", None, 0)),
        # What a client writes far left hides nothing:
        ((b'for=", for=203.0.113.9',), ("203.0.113.9", "10.0.0.1", 1)),
        ((b'for="x, for="[2001:db8::1]:1";proto=http',), ("2001:db8::1", "10.0.0.1", 1)),
        ((b'for="\\, for=203.0.113.9, for="[fd00::2]"',), ("203.0.113.9", "fd00::2", 2)),
        ((b'for="', b"for=203.0.113.9"), ("203.0.113.9", "10.0.0.1", 1)),
    ],
)
def test_forwarded_is_read_from_the_right(values: tuple[bytes, ...], expected: tuple[str, str | None, int]) -> None:
    assert decided(*values) == expected


@pytest.mark.parametrize("read", [FORWARDED, X_FORWARDED_FOR])
def test_only_the_field_that_trusted_proxies_write_is_read(read: bytes) -> None:
    """The other one is the client's: proxies pass it on."""
    fields = fields_of([(b"Forwarded", b"for=203.0.113.9"), (b"X-Forwarded-For", b"198.51.100.1")])
    expected = "203.0.113.9" if read == FORWARDED else "198.51.100.1"
    assert client_address("10.0.0.1", fields, TRUSTED, read).address == expected
    del fields[read]
    assert client_address("10.0.0.1", fields, TRUSTED, read).address == "10.0.0.1"


def test_no_more_than_a_limited_number_of_elements_is_read() -> None:
    value = b", ".join([b"for=203.0.113.9", *[b"for=10.0.0.2"] * MAX_HOPS])
    assert decided(value) == ("10.0.0.2", "10.0.0.2", MAX_HOPS)
    assert decided(b"for=198.51.100.1" + b"," * 60_000) == ("10.0.0.1", None, 0)
    assert decided(b'"' * 60_000) == ("10.0.0.1", None, 0)
    assert decided(b"\\" * 30_000 + b'"' * 30_000) == ("10.0.0.1", None, 0)
    assert decided(b"for=" + b"a" * 60_000 + b"\x00") == ("10.0.0.1", None, 0)


# Generated spellings

ADDRESSES = st.one_of(
    st.ip_addresses(v=4, network="203.0.113.0/24"),
    st.ip_addresses(v=6, network="2001:db8::/32"),
)
PROXIES = st.one_of(st.ip_addresses(v=4, network="10.0.0.0/8"), st.ip_addresses(v=6, network="fd00::/8"))
PORTS = st.one_of(st.just(""), st.integers(0, 65_535).map(":{}".format), st.just(":_port"))


@st.composite
def x_spelt(draw: st.DrawFn, addresses: st.SearchStrategy[object]) -> tuple[str, bytes]:
    """Return an address, and an element of X-Forwarded-For for it."""
    address = ip_address(str(draw(addresses)))
    port = draw(PORTS)
    if address.version == 4:
        text = draw(
            st.sampled_from(
                [
                    f"{address}",
                    f'"{address}{port}"',
                    f"::ffff:{address}",
                    f"[::ffff:{address}]{port}",
                    f"{address}{port}",
                ]
            )
        )
    else:
        spelling = draw(st.sampled_from([str(address), address.exploded, address.compressed.upper()]))
        text = draw(
            st.sampled_from(
                [spelling, f"[{spelling}]", f"[{spelling}]{port}", f'"[{spelling}]{port}"', f'"{spelling}"']
            )
        )
    blank = draw(st.sampled_from(["", " ", "\t", "  "]))
    return str(address), f"{blank}{text}{draw(st.sampled_from(['', ' ']))}".encode()


@st.composite
def spelt(draw: st.DrawFn, addresses: st.SearchStrategy[object]) -> tuple[str, bytes]:
    """Return an address, and an element of Forwarded for it."""
    address = ip_address(str(draw(addresses)))
    port = draw(PORTS)
    node = f"{address}{port}" if address.version == 4 else f"[{address}]{port}"
    pairs = [draw(st.sampled_from(["for", "For", "FOR"])) + f'="{node}"']
    pairs += draw(
        st.lists(st.sampled_from(['host="a,b;c\\"d"', "proto=https", "by=_me", 'x=""']), max_size=3, unique=True)
    )
    text = draw(st.sampled_from([";", "; "])).join(draw(st.permutations(pairs)))
    return str(address), f"{draw(st.sampled_from(['', ' ']))}{text}".encode()


GARBAGE = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b'for="', b"for=10.0.0.9", b"10.0.0.9", b"10.0.0.9, ", b'"', b"\\", b'for=10.0.0.9;x="\\', b",,,"]
    ),
    st.lists(st.sampled_from([b'"', b"\\", b",", b";", b"=", b"for", b"10.0.0.9", b" "]), max_size=12).map(b"".join),
)


@pytest.mark.parametrize("read", [FORWARDED, X_FORWARDED_FOR])
@given(data=st.data())
def test_whatever_a_client_writes_its_address_is_that_which_trusted_proxies_saw(
    read: bytes, data: st.DataObject
) -> None:
    """A client writes anything; proxies append what they saw, to the same field or as another one."""
    element = spelt if read == FORWARDED else x_spelt
    values: list[bytes] = data.draw(st.lists(GARBAGE, max_size=3))
    address, text = data.draw(element(ADDRESSES))
    elements = [text, *(data.draw(element(PROXIES))[1] for _ in range(data.draw(st.integers(0, 3))))]
    for one in elements:
        is_appended: bool = data.draw(st.booleans())
        if values and is_appended:
            values[-1] = values[-1] + b"," + one
        else:
            values.append(one)
    found = client_address("10.0.0.1", fields_of([(read, value) for value in values]), TRUSTED, read)
    assert found.address == address
    assert found.position == len(elements)


@given(
    st.lists(GARBAGE, max_size=4),
    st.sampled_from([FORWARDED, X_FORWARDED_FOR]),
    st.sampled_from(["192.0.2.7", "unix", ""]),
)
def test_a_stranger_is_its_own_peer_whatever_it_writes(values: list[bytes], read: bytes, peer: str) -> None:
    assert client_address(peer, fields_of([(read, value) for value in values]), TRUSTED, read).address == peer


@given(st.lists(GARBAGE, max_size=4), st.sampled_from([FORWARDED, X_FORWARDED_FOR]))
@example([b"for=\xb2", b"\xb2.1.1.1"], FORWARDED)
def test_garbage_of_a_trusted_proxy_is_an_address_or_the_proxy(values: list[bytes], read: bytes) -> None:
    found = client_address("10.0.0.1", fields_of([(read, value) for value in values]), TRUSTED, read)
    assert ip_address(found.address)
    assert hop_address(found.address.encode()) == found.address


# What upstreams get


def sent(
    headers: HeaderList, forwarding: Forwarding, *, peer: str = "10.0.0.1", is_trusted: bool = True
) -> dict[str, str]:
    """Return the forwarding fields of a request for the upstream: those that pass, and those that are added."""
    fields = fields_of(headers)
    found = client_address(peer, fields, TRUSTED if is_trusted else [], forwarding.read)
    replaced = replaced_fields(forwarding, is_trusted)
    passed = [(name.lower(), value) for name, value in headers if name.lower() in FORWARDING - replaced]
    added = forwarding_fields(
        fields, peer=peer, scheme="http", is_trusted=is_trusted, forwarding=forwarding, reported=found.hop
    )
    names = [name for name, _ in (*passed, *added)]
    assert len(names) == len(set(names)), "no field comes twice"
    return {name.decode(): value.decode() for name, value in (*passed, *added)}


BOTH = Forwarding(X_FORWARDED_FOR, sends_x_forwarded=True, sends_forwarded=True)
CONVERTED = Forwarding(FORWARDED, sends_x_forwarded=True, sends_forwarded=False)
HOST = (b"Host", b"shop.example:8080")


@each(
    ("headers", "forwarding", "expected"),
    [
        ([HOST], BY_FORWARDED, {"forwarded": 'for=192.0.2.7;host="shop.example:8080";proto=http'}),
        ([HOST], BOTH, {
            "x-forwarded-for": "192.0.2.7", "x-forwarded-proto": "http", "x-forwarded-host": "shop.example:8080",
            "forwarded": 'for=192.0.2.7;host="shop.example:8080";proto=http'}),
        ([(b"Forwarded", b"for=1.1.1.1"), (b"X-Forwarded-For", b"2.2.2.2"), (b"X-Forwarded-Proto", b"https")],
         BY_FORWARDED, {"forwarded": "for=192.0.2.7;proto=http"}),
    ],
)  # fmt: skip
def test_what_a_stranger_writes_is_replaced(
    headers: HeaderList, forwarding: Forwarding, expected: dict[str, str]
) -> None:
    assert sent(headers, forwarding, peer="192.0.2.7", is_trusted=False) == expected


@each(
    ("headers", "forwarding", "expected"),
    [
        ([HOST, (b"Forwarded", b'for="[2001:db8::1]:1";proto=https;host=a.example')], BY_FORWARDED, {
            "forwarded": 'for="[2001:db8::1]:1";proto=https;host=a.example,'
                         ' for=10.0.0.1;host="shop.example:8080";proto=http'}),
        ([(b"Forwarded", b"for=203.0.113.9"), (b"Forwarded", b"for=_a, for=10.0.0.2"), (b"X-Forwarded-Proto", b"wss")],
         BY_FORWARDED, {"forwarded": "for=203.0.113.9, for=_a, for=10.0.0.2, for=10.0.0.1;proto=http"}),
        # What a client has broken does not reach the upstream, which might read it from the left:
        ([(b"Forwarded", b'for=1.1.1.1, for="x, for=203.0.113.9')], BY_FORWARDED,
         {"forwarded": "for=203.0.113.9, for=10.0.0.1;proto=http"}),
        ([HOST, (b"Forwarded", b'for=198.51.100.1;proto=ftp, for="[2001:db8::1]:1";proto=HTTPS;host=a, for=_b')],
         CONVERTED, {"x-forwarded-for": "198.51.100.1, 2001:db8::1, _b, 10.0.0.1", "x-forwarded-proto": "http",
                     "x-forwarded-host": "shop.example:8080"}),
        ([HOST, (b"Forwarded", b'for="[2001:db8::1]:1";proto=HTTPS;host=a.example'), (b"X-Forwarded-Host", b"evil")],
         CONVERTED, {"x-forwarded-for": "2001:db8::1, 10.0.0.1", "x-forwarded-proto": "https",
                     "x-forwarded-host": "a.example"}),
        ([(b"Forwarded", b'for=a b, for="x\x01y", for=203.0.113.9;host="a b"')], CONVERTED,
         {"x-forwarded-for": "203.0.113.9, 10.0.0.1", "x-forwarded-proto": "http"}),
        ([HOST, (b"X-Forwarded-For", b"203.0.113.9, 2001:db8::1, _x, ?"), (b"X-Forwarded-Proto", b"https"),
          (b"X-Forwarded-Host", b"a.example")], BOTH, {
            "x-forwarded-for": "203.0.113.9, 2001:db8::1, _x, ?, 10.0.0.1", "x-forwarded-proto": "https",
            "x-forwarded-host": "a.example",
            "forwarded": 'for=203.0.113.9;host=a.example;proto=https, for="[2001:db8::1]", for=_x, for=unknown,'
                         ' for=10.0.0.1;host="shop.example:8080";proto=http'}),
        ([(b"X-Forwarded-For", b"203.0.113.9"), (b"X-Forwarded-Host", b'a"b'), (b"X-Forwarded-Port", b"8"),
          (b"Forwarded", b"for=1.1.1.1")], Forwarding(X_FORWARDED_FOR, False, True), {
            "x-forwarded-port": "8", "forwarded": "for=203.0.113.9, for=10.0.0.1;proto=http"}),
        ([(b"X-Forwarded-For", b"203.0.113.9"), (b"Forwarded", b"for=1.1.1.1")], BY_X_FORWARDED, {
            "x-forwarded-for": "203.0.113.9, 10.0.0.1", "x-forwarded-proto": "http", "forwarded": "for=1.1.1.1"}),
    ],
)  # fmt: skip
def test_what_a_trusted_proxy_reports_is_extended_or_converted(
    headers: HeaderList, forwarding: Forwarding, expected: dict[str, str]
) -> None:
    assert sent(headers, forwarding) == expected


def test_a_peer_without_an_address_has_a_name() -> None:
    assert sent([], BY_FORWARDED, peer="unix", is_trusted=False)["forwarded"] == "for=_unix;proto=http"
    assert sent([], BY_FORWARDED, peer="unknown", is_trusted=False)["forwarded"] == "for=unknown;proto=http"
    assert (
        sent([], BY_FORWARDED, peer="2001:db8::1", is_trusted=False)["forwarded"] == 'for="[2001:db8::1]";proto=http'
    )


SENT = ((True, False), (False, True), (True, True))
FORMS = [Forwarding(read, *sends) for read in (X_FORWARDED_FOR, FORWARDED) for sends in SENT]


@given(st.lists(st.tuples(st.sampled_from([FORWARDED, X_FORWARDED_FOR, b"x-forwarded-host"]), GARBAGE), max_size=4),
       ADDRESSES, st.sampled_from(FORMS))  # fmt: skip
def test_the_next_gateway_finds_the_same_client(headers: HeaderList, client: object, forwarding: Forwarding) -> None:
    """Whatever a client writes: a second gateway behind this one, which trusts it, decides likewise."""
    fields = fields_of(headers)
    passed = [pair for pair in headers if pair[0] not in replaced_fields(forwarding, False)]
    first = passed + forwarding_fields(
        fields, peer=str(client), scheme="http", is_trusted=False, forwarding=forwarding
    )
    for form, is_sent in ((X_FORWARDED_FOR, forwarding.sends_x_forwarded), (FORWARDED, forwarding.sends_forwarded)):
        if is_sent:
            assert client_address("10.0.0.1", fields_of(first), TRUSTED, form).address == str(client)
            assert all(32 <= byte < 127 for _, value in first for byte in value)


@each(
    ("server", "told"),
    [
        ({"forwarded": {"read": "forwarded"}}, True),
        ({"forwarded": {"read": "forwarded"}, "trusted_proxies": ["10.0.0.0/8"]}, False),
        ({"forwarded": {"send": "both"}}, False),
        ({}, False),
    ],
)
def test_a_field_that_nobody_is_trusted_to_write_is_a_warning(server: dict[str, Any], *, told: bool) -> None:
    found = [str(one) for one in access_warnings(load_config(None, {"server": server}))]
    message = "server.forwarded.read: has no effect without server.trusted_proxies, got 'forwarded'"
    assert found == ([message] if told else [])
