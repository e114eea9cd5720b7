"""Addresses on the wire, on both paths: rules for all routes and by route, and which hop decides."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.kit import Answer, RawAnswer, RawClient, RawUpstream, RunningGateway, in_front_of, running_gateway
from tests.kit import ask as ask_url
from tests.kit import reason as reason_of
from tests.wire.test_fast_path import ODD

BOTH_WAYS = pytest.mark.parametrize("odd", [(), (ODD,)], ids=["fast path", "general parser"])


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    sections = in_front_of(shared.url)
    sections["routes"] = [
        {"name": "all", "path": "/api/x", "upstream": "up"},
        {"name": "inner", "path": "/api/inner", "upstream": "up", "addresses": {"allow": ["10.0.0.0/8"]}},
        {"name": "below", "path": "/api/x/inner", "upstream": "up", "addresses": {"allow": ["10.0.0.0/8"]}},
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
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/api/x/INNER", (403, "address_denied")),
        ("/api/x/Inner/y", (403, "address_denied")),
        ("/api/x/inner//..", (403, "address_denied")),
        ("/api/x/inner%0a", (400, "bad_request")),
        ("/api/x/%49nner", (403, "address_denied")),
    ],
)
def test_no_spelling_avoids_the_rules_of_a_route(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...], target: str, expected: tuple[int, str]
) -> None:
    """Servers may ignore letter case, resolve dot segments before they merge slashes, or cut off a line break."""
    assert reason_of(ask(client, "198.51.100.7", *odd, target=target)) == expected
    assert up.requests == []
    if expected[0] == 403:
        assert ask(client, "10.1.2.3", *odd, target=target).status == 200
        assert f"GET {target} HTTP/1.1".encode() == up.requests[-1].line, "what travels stays as it is"


@BOTH_WAYS
def test_a_refusal_is_counted_by_its_reason(running: RunningGateway, client: RawClient, odd: tuple[str, ...]) -> None:
    before = running.live.recorder.refusals["address_denied"]
    assert ask(client, "192.0.2.9", *odd).status == 403
    assert running.live.recorder.refusals["address_denied"] == before + 1


# Forwarded


FORWARDING = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded"]


@pytest.mark.parametrize(
    ("section", "headers", "address", "expected"),
    [
        (
            {"read": "forwarded", "send": "forwarded"},
            ('Forwarded: for="[2001:db8:bad::1]:4711"',),
            403,
            {},
        ),
        (
            {"read": "forwarded", "send": "forwarded"},
            ('Forwarded: for="[2001:db8::1]:4711";proto=https', "X-Forwarded-For: 192.0.2.1"),
            200,
            {"forwarded": 'for="[2001:db8::1]:4711";proto=https, for=127.0.0.1;host=gateway.test;proto=http'},
        ),
        (
            {"read": "forwarded", "send": "both"},
            ("Forwarded: for=198.51.100.7;proto=https;host=shop.test",),
            200,
            {
                "x-forwarded-for": "198.51.100.7, 127.0.0.1",
                "x-forwarded-proto": "https",
                "x-forwarded-host": "shop.test",
                "forwarded": "for=198.51.100.7;proto=https;host=shop.test, for=127.0.0.1;host=gateway.test;proto=http",
            },
        ),
        (
            {"send": "forwarded"},
            ("X-Forwarded-For: 198.51.100.7", "Forwarded: for=192.0.2.1"),
            200,
            {"forwarded": "for=198.51.100.7, for=127.0.0.1;host=gateway.test;proto=http"},
        ),
        (
            {},
            ("X-Forwarded-For: 198.51.100.7",),
            200,
            {
                "x-forwarded-for": "198.51.100.7, 127.0.0.1",
                "x-forwarded-proto": "http",
                "x-forwarded-host": "gateway.test",
            },
        ),
    ],
)
def test_the_client_is_read_and_sent_on_in_the_configured_form(
    sections: dict[str, Any],
    up: RawUpstream,
    tmp_path: Path,
    section: dict[str, str],
    headers: tuple[str, ...],
    address: int,
    expected: dict[str, str],
) -> None:
    server = {"trusted_proxies": ["127.0.0.1"], "forwarded": section}
    with running_gateway(sections | {"server": server}, tmp_path) as running, RawClient(running.port) as client:
        for odd in ((), (ODD,)):
            client.request("GET", "/api/x", (*headers, *odd))
            assert client.answer().status == address
        for request in up.requests:
            found = {name: request.all(name) for name in FORWARDING}
            assert found == {name: [expected[name].encode()] if name in expected else [] for name in FORWARDING}
        assert len(up.requests) == (2 if address == 200 else 0)


def test_explain_names_the_hop_that_the_address_came_from(running: RunningGateway) -> None:
    body: dict[str, Any] = {"client_id": None, "path": "/api/x", "address": "127.0.0.1"}

    def explained(**more: str) -> Any:
        answer = post(f"{running.url}/explain", json.dumps(body | more).encode())
        assert answer.status == 200
        return answer.json()

    found = explained(forwarded="198.51.100.9, 198.51.100.7, 127.0.0.1")
    assert found["address"] == {
        "address": "198.51.100.7",
        "field": "x-forwarded-for",
        "position": 2,
        "reported_by": "127.0.0.1",
        "detail": "element 2 from the right of x-forwarded-for, by the trusted proxy 127.0.0.1",
    }
    assert found["client"]["id"] == "198.51.100.7"
    own = explained()["address"]
    assert (own["address"], own["field"], own["position"], own["reported_by"]) == ("127.0.0.1", None, None, None)
    stranger = explained(address="203.0.113.9", forwarded="198.51.100.7")["address"]
    assert stranger["address"] == "203.0.113.9"
    assert "not in server.trusted_proxies" in stranger["detail"]
    denied = explained(forwarded="192.0.2.1")
    assert (denied["result"]["status"], denied["result"]["reason"]) == (403, "address_denied")


def post(url: str, body: bytes) -> Answer:
    """Send a body of JSON."""
    return ask_url(url, method="POST", headers={"Content-Type": "application/json"}, body=body)


def test_the_page_shows_the_hop_as_explain_does(shared: RawUpstream, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "addresses.md").read_text()
    (request,) = re.findall(r"curl -d '(.*?)'", page)
    (shown,) = re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL)
    sections = in_front_of(shared.url) | {"server": {"trusted_proxies": ["10.0.0.0/8"]}}
    with running_gateway(sections, tmp_path) as running:
        assert post(f"{running.url}/explain", request.encode()).json()["address"] == json.loads(shown)
