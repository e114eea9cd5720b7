"""Addresses on the wire, on both paths: rules for all routes and by route, and which hop decides."""

import json
from typing import Any

import pytest

from tests.kit import RawAnswer, RawClient, RawUpstream, RunningGateway, in_front_of
from tests.kit import reason as reason_of
from tests.wire.test_fast_path import ODD

BOTH_WAYS = pytest.mark.parametrize("odd", [(), (ODD,)], ids=["fast path", "ASGI path"])


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    sections = in_front_of(shared.url)
    sections["routes"] = [
        {"name": "all", "path": "/api/x", "upstream": "up"},
        {"name": "inner", "path": "/api/inner", "upstream": "up", "addresses": {"allow": ["10.0.0.0/8"]}},
        {"name": "none", "path": "/api/some", "upstream": "up", "addresses": {"deny": ["198.51.100.7"]}},
    ]
    sections["addresses"] = {"deny": ["192.0.2.0/24", "2001:db8:bad::/48"]}
    sections["cors"] = {"origins": ["https://app.example"]}
    return sections | {"server": {"trusted_proxies": ["127.0.0.1"]}}


def ask(client: RawClient, address: str, *headers: str, target: str = "/api/x") -> RawAnswer:
    """Send a request of the client with this address, through a trusted proxy."""
    client.request("GET", target, (f"X-Forwarded-For: {address}", *headers))
    return client.answer()


@BOTH_WAYS
@pytest.mark.parametrize(
    "address", ["192.0.2.7", "::ffff:192.0.2.7", "[2001:db8:bad::1]:443", "198.51.100.1, 192.0.2.7"]
)
def test_a_denied_address_is_refused_on_all_routes(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...], address: str
) -> None:
    """Also a path without a route: who is denied learns no routes. The page of an allowed origin can read it."""
    for target in ("/api/x", "/api/inner", "/api/nowhere"):
        answer = ask(client, address, *odd, "Origin: https://app.example", target=target)
        assert reason_of(answer) == (403, "address_denied")
        assert answer.all("access-control-allow-origin") == [b"https://app.example"]
        assert answer.all("ratelimit") == []
        assert json.loads(answer.body)["detail"].endswith(" is denied.")
    assert up.requests == []


@BOTH_WAYS
def test_other_addresses_are_served(client: RawClient, odd: tuple[str, ...]) -> None:
    for address in ("198.51.100.7", "2001:db8:900d::1", "127.0.0.1", "10.1.2.3"):
        for _ in range(3):
            assert ask(client, address, *odd).status == 200


@BOTH_WAYS
def test_a_route_has_rules_besides_those_for_all(client: RawClient, odd: tuple[str, ...]) -> None:
    assert ask(client, "10.1.2.3", *odd, target="/api/inner").status == 200
    assert ask(client, "198.51.100.8", *odd, target="/api/some").status == 200
    answer = ask(client, "198.51.100.7", *odd, target="/api/inner")
    assert reason_of(answer) == (403, "address_denied")
    assert "not allowed on the route 'inner'" in json.loads(answer.body)["detail"]
    assert reason_of(ask(client, "198.51.100.7", *odd, target="/api/some")) == (403, "address_denied")


@BOTH_WAYS
def test_a_refusal_is_counted_by_its_reason(running: RunningGateway, client: RawClient, odd: tuple[str, ...]) -> None:
    before = running.live.recorder.rejections["address_denied"]
    assert ask(client, "192.0.2.9", *odd).status == 403
    assert running.live.recorder.rejections["address_denied"] == before + 1
