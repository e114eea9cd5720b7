"""Address rules: which addresses networks contain, and which requests the rules refuse, before anything is charged."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.config import load_config
from api_gateway.errors import AddressDenied
from api_gateway.http1.headers import Network, is_within
from api_gateway.http1.network_set import NetworkSet
from api_gateway.proxy.address_rules import AddressRules
from api_gateway.settings.diagnostics import ConfigError
from tests.cases import each


def networks(*names: str) -> list[Network]:
    return ["unix" if name == "unix" else ip_network(name) for name in names]


@each(
    ("allow", "deny", "refused", "accepted"),
    [
        ([], [], [], ["192.0.2.7", "2001:db8::1", "unix", "unknown"]),
        ([], ["192.0.2.0/24"], ["192.0.2.7", "::ffff:192.0.2.7"], ["192.0.3.7", "2001:db8::1", "unix", "unknown"]),
        (
            ["10.0.0.0/8", "2001:db8::/32"],
            [],
            ["192.0.2.7", "2001:db9::1", "unix", "unknown", ""],
            ["10.1.2.3", "2001:db8::1", "2001:db8::1%eth0", "::ffff:10.1.2.3"],
        ),
        (["10.0.0.0/8"], ["10.0.0.66"], ["10.0.0.66", "11.0.0.1"], ["10.0.0.67"]),
        (["10.0.0.66"], ["10.0.0.0/8"], ["10.0.0.66", "11.0.0.1"], []),
        (["unix"], [], ["192.0.2.7"], ["unix"]),
        ([], ["unix", "::/0"], ["unix", "2001:db8::1"], ["192.0.2.7"]),
        (["0.0.0.0/0"], [], ["2001:db8::1", "unix"], ["192.0.2.7"]),
    ],
)
def test_an_address_is_refused_if_it_is_denied_or_others_are_allowed(
    allow: list[str], deny: list[str], refused: list[str], accepted: list[str]
) -> None:
    rules = AddressRules(networks(*allow), networks(*deny))
    assert [address for address in refused if rules.cause(address) is None] == []
    assert [address for address in accepted if rules.cause(address) is not None] == []


def test_the_reason_is_address_denied() -> None:
    assert (AddressDenied.status, AddressDenied.reason) == (403, "address_denied")


NUMBERS = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda pair: (IPv4Address(pair[0]), pair[1])),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(lambda pair: (IPv6Address(pair[0]), pair[1])),
)


@given(st.lists(NUMBERS, max_size=8), st.sampled_from([0, 1, 255, 2**16, 2**31, 2**64]))
def test_a_set_contains_what_its_networks_contain(found: Sequence[tuple[Any, int]], offset: int) -> None:
    many: list[Network] = [ip_network(f"{address}/{length}", strict=False) for address, length in found]
    known = NetworkSet(many)
    for network in many:
        assert not isinstance(network, str)
        for number in (int(network[0]), int(network[-1]), int(network[-1]) + offset, int(network[0]) - offset):
            if 0 <= number < 2**network.max_prefixlen:
                address = str(IPv4Address(number) if network.version == 4 else IPv6Address(number))
                assert (address in known) is is_within(address, many)


@given(st.text(max_size=30))
def test_any_text_is_in_a_set_or_not(text: str) -> None:
    assert text not in NetworkSet(networks("10.0.0.0/8")) or is_within(text, networks("10.0.0.0/8"))


@pytest.mark.parametrize(
    ("section", "place", "value"),
    [
        ({"deny": ["10.0.0.0/33"]}, "deny[0]", "'10.0.0.0/33'"),
        ({"allow": ["10.0.0.1/8"]}, "allow[0]", "10.0.0.0/8"),
        ({"allow": [10]}, "allow[0]", "10"),
        ({"denied": []}, "denied", "did you mean 'deny'"),
    ],
)
def test_a_mistake_is_named_with_place_and_value(
    tmp_path: Path, section: dict[str, Any], place: str, value: str
) -> None:
    sections: dict[str, Any] = {
        "upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:9001"}]}},
        "routes": [{"name": "r", "path": "/api", "upstream": "up", "addresses": section}],
        "addresses": section,
    }
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(sections))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = caught.value.problems
    assert [f"addresses.{place}: " in line and value in line for line in lines] == [True, True]
    assert sum(f"routes[0].addresses.{place}: " in line for line in lines) == 1
