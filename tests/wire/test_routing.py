"""Routes by host, path, header field and query, on real connections, read by either parser."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit import RawClient, RawUpstream, RunningGateway, ask, free_port, reason, reply, running_gateway

TOKEN = "Bearer routing-token"
WAYS = {"fast path": (), "general parser": ("X-Odd:  two blanks",)}
both_ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def ups() -> Iterator[dict[str, RawUpstream]]:
    found = {name: RawUpstream(reply(name.encode())) for name in ("plain", "beta", "host", "root")}
    yield found
    for up in found.values():
        up.close()


@pytest.fixture(scope="module")
def sections(ups: dict[str, RawUpstream]) -> dict[str, Any]:
    return {
        "upstreams": {name: {"targets": [{"url": up.url}]} for name, up in ups.items()},
        "routes": [
            {"name": "plain", "path": "/api", "upstream": "plain"},
            {"name": "beta", "path": "/api", "upstream": "beta", "match": {"headers": {"X-Beta": "1"}}},
            {"name": "host", "path": "/api", "upstream": "host", "host": "*.shop.test"},
            {"name": "root", "path": "/", "upstream": "root"},
            {"name": "health", "path": "/health", "upstream": "plain", "methods": ["PUT"]},
            {"name": "stat", "path": "/api/stat", "respond": {"status": 203}},
            {"name": "moved", "path": "/api/moved/{id}", "match": {"path": "template"}, "redirect": {"to": "/x/{id}"}},
            {"name": "pages", "path": "/api/pages", "upstream": "plain", "cors": {"origins": ["https://a.test"]}},
        ],
        "admin": {"listen": f"127.0.0.1:{free_port()}", "token": "routing-token"},
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
    }


@both_ways
def test_requests_of_one_connection_that_differ_in_what_decides_alone_are_not_mixed_up(
    running: RunningGateway, fast_path_spy: list[bool], way: str
) -> None:
    """Host, query and fields change from request to request; everything else is remembered from the one before."""
    with RawClient(running.port) as client:
        for _ in range(3):
            for host, field, expected in (
                ("gateway.test", "X-Client-ID: a", b"plain"),
                ("gateway.test", "X-Beta: 1", b"beta"),
                ("gateway.test", "X-Beta: 2", b"plain"),
                ("a.shop.test", "X-Beta: 1", b"host"),
                ("A.Shop.Test:80", "X-Beta: 2", b"host"),
                ("gateway.test", "X-Beta: 1", b"beta"),
            ):
                lines = "\r\n".join((f"Host: {host}", field, *WAYS[way], "\r\n"))
                client.send(f"GET /api/x HTTP/1.1\r\n{lines}".encode())
                assert client.answer().body == expected
    assert all(fast_path_spy) == (way == "fast path")


@both_ways
def test_an_upstream_gets_a_field_as_its_route_was_chosen_by(
    running: RunningGateway, ups: dict[str, RawUpstream], way: str
) -> None:
    """`Connection` cannot remove it, and a spelling with an underscore cannot take its place."""
    with RawClient(running.port) as client:
        assert client.get("/api/x", ("X-Beta: 1", "Connection: X-Beta", *WAYS[way])).body == b"beta"
        assert ups["beta"].requests[-1].all("x-beta") == [b"1"]
        assert client.get("/api/x", ("X_Beta: 1", *WAYS[way])).body == b"plain"
        assert not ups["plain"].requests[-1].all("x_beta")
        assert reason(client.get("/api/x", ("X-Beta: 1", "X-Beta: 2", *WAYS[way]))) == (400, "bad_request")


def test_a_route_at_the_root_takes_all_paths_if_operator_endpoints_have_a_listener_of_their_own(
    running: RunningGateway, sections: dict[str, Any]
) -> None:
    with RawClient(running.port) as client:
        assert client.get("/").body == b"root"
        assert client.get("/metrics").body == b"root"
        assert client.get("/clients/x/../y").body == b"root"
        refused = client.get("/health")
        assert (reason(refused), refused.all("allow")) == ((405, "method_not_allowed"), [b"PUT"])
    assert ask(f"http://{sections['admin']['listen']}/health").json()["status"] == "pass"


Explained = Callable[..., Any]


@pytest.fixture
def explained(running: RunningGateway, sections: dict[str, Any]) -> Explained:
    def explain(**request: Any) -> Any:
        body = {"client_id": None, "path": "/api/x", **request}
        with RawClient(int(sections["admin"]["listen"].rpartition(":")[2])) as client:
            text = json.dumps(body).encode()
            lines = ("Content-Type: application/json", f"Content-Length: {len(text)}", f"Authorization: {TOKEN}")
            client.request("POST", "/explain", lines, text)
            return json.loads(client.answer().body)

    return explain


@pytest.mark.parametrize(
    ("path", "status", "destination"),
    [
        ("/api/stat/x", 203, "status 203"),
        ("/api/moved/7", 308, "status 308, to /x/7"),
        ("/api/x", None, "upstream plain"),
    ],
)
def test_explain_names_what_responds_in_place_of_an_upstream(
    running: RunningGateway, explained: Explained, path: str, status: int | None, destination: str
) -> None:
    found = explained(path=path)
    assert (found["result"]["decision"], found["result"]["status"]) == ("allowed", status)
    assert ("upstream accepts" in found["result"]["detail"]) is (status is None)
    assert found["route"]["destination"] == destination
    assert (found["route"]["upstream"] is None) is (found["upstream"] is None) is (status is not None)
    with RawClient(running.port) as client:
        assert client.get(path).status == (status or 200)


def test_explain_says_how_a_preflight_ends(running: RunningGateway, explained: Explained) -> None:
    fields = {"Origin": "https://a.test", "Access-Control-Request-Method": "PUT"}
    found = explained(path="/api/pages", method="OPTIONS", headers=fields)
    assert (found["result"]["decision"], found["result"]["status"]) == ("allowed", 204)
    with RawClient(running.port) as client:
        client.request("OPTIONS", "/api/pages", tuple(f"{name}: {value}" for name, value in fields.items()))
        assert client.answer().status == 204


def test_explain_refuses_an_ambiguous_path_of_a_redirect_as_the_gateway_does(
    running: RunningGateway, explained: Explained
) -> None:
    path = "/api/moved/a%252fb"
    found = explained(path=path)
    assert (found["result"]["status"], found["route"]["destination"]) == (400, "status 308")
    with RawClient(running.port) as client:
        assert client.get(path).status == 400


def test_explain_names_the_route_and_what_those_before_it_lack(explained: Explained) -> None:
    found = explained(headers={"X-Beta": "2"})
    assert found["route"]["name"] == "plain"
    assert found["routes_passed_over"] == [{"name": "beta", "detail": "does not hold: header x-beta = '1'"}]
    found = explained(headers={"X-Beta": "1"})
    assert (found["route"]["name"], found["route"]["conditions"]) == ("beta", ["header x-beta = '1'"])
    assert found["routes_passed_over"] == []
    assert explained(host="a.shop.test")["route"]["host"] == "*.shop.test"
    assert explained(path="/elsewhere")["route"]["name"] == "root"


def test_paths_outside_api_are_proxied_beside_the_operator_endpoints(
    ups: dict[str, RawUpstream], tmp_path: Path
) -> None:

    config: dict[str, Any] = {
        "upstreams": {"plain": {"targets": [{"url": ups["plain"].url}]}},
        "routes": [{"name": "v1", "path": "/v1", "upstream": "plain"}],
    }
    with running_gateway(config, tmp_path) as running, RawClient(running.port) as client:
        assert client.get("/v1/x").body == b"plain"
        assert client.get("/health").status == 200
        assert reason(client.get("/v2/x")) == (404, "no_route")
        assert reason(client.get("/api/x")) == (404, "no_route")
