"""CORS on the wire, on both paths: preflights, responses of upstreams, and all responses of the gateway itself."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from api_gateway.proxy.cors import EXPOSED
from tests.kit import (
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reply,
    running_gateway,
)
from tests.kit import reason as reason_of
from tests.wire.test_fast_path import ODD

APP, EVIL = "https://app.example", "https://evil.example"
BOTH_WAYS = pytest.mark.parametrize("odd", [(), (ODD,)], ids=["fast path", "general parser"])


def closed_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    sections = in_front_of(shared.url, timeouts={"response": 0.3}, retry={"budget": 0, "min_retries_per_second": 0})
    sections["upstreams"]["down"] = {"targets": [{"url": f"http://127.0.0.1:{closed_port()}"}]}
    open_to_all = {"origins": ["*"]}
    sections["routes"] = [
        {"name": "all", "path": "/api/x", "upstream": "up"},
        {"name": "read", "path": "/api/read", "upstream": "up", "methods": ["GET"]},
        {"name": "dear", "path": "/api/dear", "upstream": "up", "cost": 5},
        {"name": "down", "path": "/api/down", "upstream": "down"},
        {"name": "open", "path": "/api/open", "upstream": "up", "cors": open_to_all},
        {"name": "open reads", "path": "/api/part", "upstream": "up", "methods": ["GET"], "cors": open_to_all},
        {"name": "own", "path": "/api/own", "upstream": "up", "cors": {"enabled": False}},
        {
            "name": "static",
            "path": "/api/static",
            "upstream": "down",
            "fallback": {"status": 200, "body": "instead", "headers": {"Vary": "Accept"}},
        },
        {"name": "narrow", "path": "/api/narrow", "upstream": "up", "max_body_bytes": 10, "max_header_lines": 8},
        {
            "name": "said",
            "path": "/api/said",
            "respond": {"status": 200, "body": "said", "headers": {"Vary": "Accept"}},
        },
        {"name": "moved", "path": "/api/moved", "redirect": {"to": "https://www.example{path}", "status": 307}},
    ]
    for route in sections["routes"]:
        route["name"] = route["name"].replace(" ", "-")
    sections["cors"] = {
        "origins": [APP, "https://*.apps.example"],
        "credentials": True,
        "exposed_headers": ["X-Total"],
        "max_age": 60,
    }
    sections["tiers"]["TINY"] = {"rate": 0.001, "capacity": 1}
    sections["tiers"]["LARGE"] = {"rate": 1000, "capacity": 1000}
    sections["clients"] = {"tiny": {"tier": "TINY"}, "large": {"tier": "LARGE"}}
    sections["usage"] = {"enabled": True}
    return sections | {"server": {"via": "edge-1", "max_body_bytes": 100}}


def names(answer: RawAnswer, field: str) -> list[str]:
    """Return the items of a list field, which is there once."""
    (value,) = answer.all(field)
    return value.decode().split(", ")


def assert_readable(answer: RawAnswer, origin: str = APP, *, is_open: bool = False) -> None:
    """Check that pages of the origin may read the response, and what they need to know."""
    assert answer.all("access-control-allow-origin") == [b"*" if is_open else origin.encode()]
    assert answer.all("access-control-allow-credentials") == ([] if is_open else [b"true"])
    assert set(EXPOSED) <= set(names(answer, "access-control-expose-headers"))
    assert answer.all("vary") == ([] if is_open else [b"Origin"])
    assert len(answer.all("x-request-id")) == 1


def ask(client: RawClient, *headers: str, method: str = "GET", target: str = "/api/x", body: bytes = b"") -> RawAnswer:
    """Send a request and return the response."""
    client.request(method, target, headers, body)
    return client.answer(method)


@BOTH_WAYS
def test_a_response_of_the_upstream_is_readable(client: RawClient, up: RawUpstream, odd: tuple[str, ...]) -> None:
    answer = ask(client, f"Origin: {APP}", *odd)
    assert_readable(answer)
    assert "X-Total" in names(answer, "access-control-expose-headers")
    assert up.requests[-1].all("origin") == [APP.encode()]
    assert_readable(ask(client, "Origin: https://a.apps.example", *odd), "https://a.apps.example")


@BOTH_WAYS
@pytest.mark.parametrize("origin", [(), (f"Origin: {EVIL}",), (f"Origin: {APP}", f"Origin: {APP}")])
def test_other_origins_learn_only_that_the_response_varies(
    client: RawClient, odd: tuple[str, ...], origin: tuple[str, ...]
) -> None:
    answer = ask(client, *origin, *odd)
    assert answer.status == 200
    assert not [name for name, _ in answer.headers if name.lower().startswith(b"access-control-")]
    assert answer.all("vary") == [b"Origin"]


@BOTH_WAYS
def test_a_route_has_a_policy_of_its_own(client: RawClient, odd: tuple[str, ...]) -> None:
    assert_readable(ask(client, f"Origin: {EVIL}", *odd, target="/api/open"), is_open=True)
    assert_readable(ask(client, *odd, target="/api/open"), is_open=True)
    own = ask(client, f"Origin: {APP}", *odd, target="/api/own")
    assert not [name for name, _ in own.headers if name.lower().startswith((b"access-control-", b"vary"))]


@BOTH_WAYS
@pytest.mark.parametrize("framing", [(), ((b"X-Folded", b"a "),)], ids=["plain head", "other head"])
def test_fields_of_the_upstream_are_not_doubled(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...], framing: tuple[tuple[bytes, bytes], ...]
) -> None:
    up.behave = reply(
        headers=(
            (b"Access-Control-Allow-Origin", b"https://theirs.example"),
            (b"Access-Control-Expose-Headers", b"X-Own, retry-after"),
            (b"Vary", b"Accept-Encoding"),
            *framing,
        )
    )
    answer = ask(client, f"Origin: {APP}", *odd)
    assert answer.all("access-control-allow-origin") == [b"https://theirs.example"]
    assert answer.all("access-control-allow-credentials") == []
    exposed = names(answer, "access-control-expose-headers")
    assert exposed[:2] == ["X-Own", "retry-after"]
    assert sorted(name.lower() for name in exposed) == sorted({name.lower() for name in (*exposed, *EXPOSED)})
    assert names(answer, "vary") == ["Accept-Encoding", "Origin"]


@BOTH_WAYS
def test_event_streams_and_chunks_are_readable(client: RawClient, up: RawUpstream, odd: tuple[str, ...]) -> None:
    def behave(wire: Wire, request: RawRequest) -> None:
        kind = b"text/event-stream" if b"events" in request.line else b"text/plain"
        wire.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" % kind
        )

    up.behave = behave
    assert_readable(ask(client, f"Origin: {APP}", *odd, target="/api/x/chunks"))
    assert_readable(ask(client, f"Origin: {APP}", *odd, target="/api/x/events"))


# Responses that the gateway generates


def slow(wire: Wire, _request: RawRequest) -> None:
    """Respond too late."""
    time.sleep(0.6)
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@BOTH_WAYS
@pytest.mark.parametrize(
    ("method", "target", "headers", "expected"),
    [
        ("GET", "/api/x", ("X-Client-ID: tiny",), (429, "rate_limited")),
        ("GET", "/api/dear", ("X-Client-ID: tiny",), (403, "cost_exceeds_capacity")),
        ("GET", "/api/x", ("X-Client-ID: a", "X-Client-ID: b"), (400, "client_id_invalid")),
        ("GET", "/api/x", ("X-Request-Timeout: soon",), (400, "bad_request")),
        ("GET", "/api/x/../none", (), (404, "no_route")),
        ("GET", "/api/x/a%00b", (), (400, "bad_request")),
        ("GET", "/api/none", (), (404, "no_route")),
        ("POST", "/api/read", (), (405, "method_not_allowed")),
        ("GET", "/api/down", (), (502, "upstream_connect_error")),
        ("GET", "/api/x/slow", (), (504, "upstream_timeout")),
        ("GET", "/api/x", ("Via: 1.1 edge-1",), (508, "loop_detected")),
        ("POST", "/api/x", ("Content-Length: 101",), (413, "body_too_large")),
        ("POST", "/api/narrow", ("Content-Length: 11",), (413, "body_too_large")),
        ("GET", "/api/narrow", ("A: 1",) * 9, (431, "headers_too_large")),
    ],
)
def test_every_refusal_is_readable(
    client: RawClient,
    up: RawUpstream,
    odd: tuple[str, ...],
    method: str,
    target: str,
    headers: tuple[str, ...],
    expected: tuple[int, str],
) -> None:
    """Also those that come before the route is determined: the policy is that of the path."""
    up.behave = slow if target.endswith("slow") else reply()
    answer = ask(client, f"Origin: {APP}", *headers, *odd, method=method, target=target)
    if answer.status == 200:  # the last token
        answer = ask(client, f"Origin: {APP}", *headers, *odd, method=method, target=target)
    assert reason_of(answer) == expected
    assert_readable(answer)
    if expected[0] == 429:
        assert answer.all("retry-after")
        assert answer.all("ratelimit")


@BOTH_WAYS
def test_a_refusal_before_the_route_has_the_policy_of_its_path(client: RawClient, odd: tuple[str, ...]) -> None:
    """A method that the route does not allow, and a client id that is not valid, at a path with its own policy."""
    assert_readable(ask(client, f"Origin: {EVIL}", *odd, method="POST", target="/api/part"), is_open=True)
    two = ("X-Client-ID: a", "X-Client-ID: b")
    assert_readable(ask(client, f"Origin: {EVIL}", *two, *odd, target="/api/open"), is_open=True)
    own = ask(client, f"Origin: {APP}", *two, *odd, target="/api/own")
    assert own.status == 400
    assert own.all("access-control-allow-origin") == []


@BOTH_WAYS
@pytest.mark.parametrize(("path", "body"), [("/api/static", b"instead"), ("/api/said", b"said")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_static_response_is_readable(
    client: RawClient, odd: tuple[str, ...], method: str, path: str, body: bytes
) -> None:
    answer = ask(client, f"Origin: {APP}", *odd, method=method, target=path)
    assert (answer.status, answer.body) == (200, b"" if method == "HEAD" else body)
    assert answer.all("access-control-allow-origin") == [APP.encode()]
    assert names(answer, "vary") == ["Accept", "Origin"]


@BOTH_WAYS
def test_a_redirect_is_readable(client: RawClient, odd: tuple[str, ...]) -> None:
    """A browser follows one for a page of another origin only if the page may read it."""
    answer = ask(client, f"Origin: {APP}", *odd, target="/api/moved")
    assert (answer.status, answer.all("location")) == (307, [b"https://www.example/api/moved"])
    assert_readable(answer)


@pytest.mark.parametrize(
    ("method", "target", "headers", "status"),
    [
        ("GET", "/usage/me", (), 200),
        ("HEAD", "/usage/me", ("Sec-Fetch-Site: cross-site",), 200),
        ("GET", "/usage/me?by=color", (), 422),
        ("GET", "/usage/me", ("X-API-Key: agw_wrong",), 401),
        ("POST", "/usage/me", ("Content-Type: application/json",), 405),
        ("GET", "/usage/me", ("X-Client-ID: a", "X-Client-ID: b"), 400),
        ("GET", "/nothing", (), 404),
        ("GET", "/nothing", ("Host: a", "Host: b"), 400),
    ],
)
def test_what_clients_ask_beside_the_routes_is_readable(
    running: RunningGateway, client: RawClient, method: str, target: str, headers: tuple[str, ...], status: int
) -> None:
    """The policy is that for all routes."""
    answer = ask(client, f"Origin: {APP}", *headers, method=method, target=target)
    assert answer.status == status
    assert answer.all("access-control-allow-origin") == [APP.encode()]
    assert set(EXPOSED) <= set(names(answer, "access-control-expose-headers"))
    assert answer.all("vary") == [b"Origin"]
    with RawClient(running.port) as page:
        other = ask(page, f"Origin: {EVIL}", *headers, method=method, target=target)
    assert other.status == (403 if target.startswith("/usage") else status)
    assert other.all("access-control-allow-origin") == []
    assert other.all("vary") == [b"Origin"]


def test_a_page_sends_its_key_to_ask_for_its_usage(client: RawClient) -> None:
    answer = preflight(client, "/usage/me", "Access-Control-Request-Headers: x-api-key", method="GET")
    assert answer.status == 204
    assert answer.all("access-control-allow-origin") == [APP.encode()]
    assert answer.all("access-control-allow-headers") == [b"x-api-key"]
    assert names(answer, "access-control-allow-methods") == ["GET", "HEAD"]
    assert answer.all("vary") == [b"Origin"]
    refused = preflight(client, "/usage/me", origin=EVIL, method="GET")
    assert reason_of(refused) == (403, "forbidden")
    assert refused.all("access-control-allow-origin") == []


@pytest.mark.parametrize("target", ["/api/x", "/usage/me"])
def test_a_refusal_by_the_connection_itself_is_readable(client: RawClient, target: str) -> None:
    """The head was read; the chunks of the body are malformed."""
    chunked = "Transfer-Encoding: chunked"
    answer = ask(client, f"Origin: {APP}", chunked, method="POST", target=target, body=b"no size\r\n")
    assert answer.status == 400
    assert answer.all("access-control-allow-origin") == [APP.encode()]


def test_a_connection_beyond_the_limit_gets_a_readable_503(sections: dict[str, Any], tmp_path: Path) -> None:
    narrow = sections | {"server": {"max_connections": 2}}
    with running_gateway(narrow, tmp_path) as running:
        clients = [RawClient(running.port) for _ in range(3)]
        answers = [ask(one, f"Origin: {APP}") for one in clients]
        for one in clients:
            one.close()
    refused = [answer for answer in answers if answer.status == 503]
    assert refused
    for answer in refused:
        assert reason_of(answer) == (503, "overloaded")
        assert answer.all("access-control-allow-origin") == [APP.encode()]
        assert "Retry-After" in names(answer, "access-control-expose-headers")


# Preflights


def preflight(client: RawClient, target: str, *headers: str, origin: str = APP, method: str = "PUT") -> RawAnswer:
    """Send a preflight and return the response."""
    asked = (f"Origin: {origin}", f"Access-Control-Request-Method: {method}")
    return ask(client, *asked, *headers, method="OPTIONS", target=target)


@BOTH_WAYS
def test_a_preflight_is_answered_and_costs_nothing(
    running: RunningGateway, client: RawClient, up: RawUpstream, odd: tuple[str, ...]
) -> None:
    """It has no client, so the bucket of its address is not charged either."""
    for _ in range(3):
        answer = preflight(client, "/api/dear", "Access-Control-Request-Headers: x-client-id", *odd)
        assert answer.status == 204
        assert answer.all("access-control-allow-origin") == [APP.encode()]
        assert answer.all("access-control-allow-credentials") == [b"true"]
        assert "PUT" in names(answer, "access-control-allow-methods")
        assert answer.all("access-control-allow-headers") == [b"x-client-id"]
        assert answer.all("access-control-max-age") == [b"60"]
        assert answer.all("vary") == [b"Origin"]
        assert answer.all("ratelimit") == answer.all("content-length") == []
        assert len(answer.all("x-request-id")) == len(answer.all("date")) == 1
    assert up.requests == []
    eventually(lambda: running.live.recorder.in_flight == 0, "none is counted as in flight")
    (count,) = {
        count
        for (route, method, status, source, _), count in running.live.recorder.requests.items()
        if (route, method, status, source) == ("dear", "OPTIONS", 204, "gateway")
    }
    assert count >= 3


@BOTH_WAYS
def test_a_preflight_needs_no_client(client: RawClient, odd: tuple[str, ...]) -> None:
    assert preflight(client, "/api/x", "X-Client-ID: a", "X-Client-ID: b", *odd).status == 204
    for _ in range(3):
        assert preflight(client, "/api/x", "X-Client-ID: tiny", *odd).status == 204


@BOTH_WAYS
def test_a_preflight_of_another_origin_is_refused_with_a_reason(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...]
) -> None:
    answer = preflight(client, "/api/x", *odd, origin=EVIL)
    assert reason_of(answer) == (403, "forbidden")
    assert b"https://evil.example" in answer.body
    assert answer.all("access-control-allow-origin") == []
    assert answer.all("vary") == [b"Origin"]
    assert preflight(client, "/api/open", *odd, origin=EVIL).all("access-control-allow-origin") == [b"*"]
    assert up.requests == []


@BOTH_WAYS
def test_a_preflight_for_a_method_that_the_route_lacks_names_the_others(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...]
) -> None:
    answer = preflight(client, "/api/read", *odd)
    assert (answer.status, names(answer, "access-control-allow-methods")) == (204, ["GET", "HEAD"])
    assert up.requests == []


@BOTH_WAYS
def test_what_is_no_preflight_for_the_gateway_reaches_the_upstream(
    client: RawClient, up: RawUpstream, odd: tuple[str, ...]
) -> None:
    """A route whose CORS is the upstream's; an OPTIONS request of another kind; another method with these fields."""
    assert preflight(client, "/api/own", *odd).status == 200
    assert ask(client, f"Origin: {APP}", *odd, method="OPTIONS").status == 200
    assert ask(client, "Access-Control-Request-Method: PUT", *odd, method="OPTIONS").status == 200
    assert ask(client, f"Origin: {APP}", "Access-Control-Request-Method: PUT", *odd).status == 200
    assert [request.line.split()[0] for request in up.requests] == [b"OPTIONS", b"OPTIONS", b"OPTIONS", b"GET"]
    assert preflight(client, "/api/none", *odd).status == 404


@BOTH_WAYS
def test_a_connection_continues_after_a_preflight_or_ends_as_asked(client: RawClient, odd: tuple[str, ...]) -> None:
    assert preflight(client, "/api/x", *odd).status == 204
    assert ask(client, f"Origin: {APP}", *odd).status == 200
    answer = preflight(client, "/api/x", "Connection: close", *odd)
    assert (answer.status, answer.all("connection")) == (204, [b"close"])
    assert client.is_closed()


def test_operator_endpoints_refuse_pages_of_other_origins(client: RawClient) -> None:
    answer = ask(client, f"Origin: {APP}", target="/clients")
    assert reason_of(answer) == (403, "forbidden")
    assert answer.all("access-control-allow-origin") == []
    assert preflight(client, "/clients").all("access-control-allow-origin") == []


@BOTH_WAYS
def test_a_gateway_without_cors_adds_nothing(
    shared: RawUpstream, tmp_path: Path, odd: tuple[str, ...], up: RawUpstream
) -> None:
    with running_gateway(in_front_of(shared.url), tmp_path) as running, RawClient(running.port) as client:
        answer = ask(client, f"Origin: {APP}", *odd)
        assert not [name for name, _ in answer.headers if name.lower().startswith((b"access-control-", b"vary"))]
        assert preflight(client, "/api/x", *odd).status == 200
        assert len(up.requests) == 2


@BOTH_WAYS
def test_a_missing_credential_is_readable_and_preflights_need_none(
    shared: RawUpstream, tmp_path: Path, odd: tuple[str, ...]
) -> None:
    """A browser sends preflights without credentials, whatever the request to come will have."""
    sections = in_front_of(shared.url) | {"cors": {"origins": [APP]}, "identity": {"sources": ["api_key"]}}
    with running_gateway(sections, tmp_path) as running, RawClient(running.port) as client:
        for headers in ((), ("X-API-Key: wrong",), ("Authorization: Bearer wrong",)):
            answer = ask(client, f"Origin: {APP}", *headers, *odd)
            assert answer.status == 401
            assert answer.all("access-control-allow-origin") == [APP.encode()]
            assert "WWW-Authenticate" in names(answer, "access-control-expose-headers")
        asked = preflight(client, "/api/x", "Access-Control-Request-Headers: authorization", *odd, method="GET")
        assert (asked.status, asked.all("access-control-allow-headers")) == (204, [b"authorization"])


def test_requests_of_pages_stay_on_the_fast_path(client: RawClient, fast_path_spy: list[bool]) -> None:
    assert ask(client, f"Origin: {APP}").status == 200  # opens the connection to the upstream
    assert preflight(client, "/api/x").status == 204
    assert ask(client, f"Origin: {APP}").status == 200
    assert ask(client, f"Origin: {EVIL}").status == 200
    assert ask(client, f"Origin: {APP}", target="/api/none").status == 404
    assert fast_path_spy == [True] * 5
