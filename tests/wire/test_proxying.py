"""What passes through the gateway, byte for byte, with a raw client on one side and a raw upstream on the other."""

import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from tests.cases import each
from tests.kit import (
    PATIENCE,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    refusing_url,
    reply,
    running_gateway,
)

StartGateway = Callable[..., RunningGateway]
StartUpstream = Callable[..., RawUpstream]
MAX_BODY = 64 * 1024
VIA = re.compile(rb"1\.1 api-gateway-[0-9a-f]{12}")
NEVER_OPENS = {"failure_threshold": 100_000, "minimum_calls": 100_000}


def to(*urls: str, **options: Any) -> dict[str, Any]:
    """An upstream that is tried once and whose breaker never opens."""
    options.setdefault("timeouts", {"connect": 1, "response": 0.4, "idle": 0.4})
    return {
        "targets": [{"url": url} for url in urls],
        "circuit_breaker": NEVER_OPENS,
        "retry": {"attempts": 1},
        **options,
    }


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, RawUpstream]]:
    """The upstream of most tests, and those that routes are told apart by; these answer with their name."""
    names = ("users", "fallback", "host", "readers", "writers", "one", "two")
    found = {"up": RawUpstream(), **{name: RawUpstream(reply(name.encode())) for name in names}}
    yield found
    for server in found.values():
        server.close()


@pytest.fixture(scope="module")
def sections(servers: dict[str, RawUpstream]) -> dict[str, Any]:
    upstreams = {name: to(server.url) for name, server in servers.items() if name not in ("one", "two")}
    upstreams["several"] = to(servers["one"].url, servers["two"].url, balance="round_robin")
    upstreams["refused"] = to(refusing_url())
    routes: list[dict[str, Any]] = [
        {"name": "all", "path": "/api", "upstream": "up"},
        {"name": "users", "path": "/api/users", "upstream": "users"},
        {"name": "host", "path": "/api/users", "upstream": "host", "host": "Tenant.test"},
        {"name": "deep", "path": "/api/users/deep", "upstream": "fallback"},
        {"name": "read", "path": "/api/split", "upstream": "readers", "methods": ["GET", "HEAD"]},
        {"name": "write", "path": "/api/split", "upstream": "writers", "methods": ["post"]},
        {"name": "stripped", "path": "/api/stripped", "upstream": "up", "strip_prefix": "/api/stripped"},
        {"name": "several", "path": "/api/several", "upstream": "several"},
        {"name": "refused", "path": "/api/refused", "upstream": "refused"},
    ]
    return {
        "upstreams": upstreams,
        "routes": routes,
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
        "server": {"max_body_bytes": MAX_BODY},
    }


@pytest.fixture(scope="module")
def trusting(sections: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway that takes this machine for a proxy of its own."""
    trusted = sections | {"server": {"trusted_proxies": ["127.0.0.1/32"]}}
    with running_gateway(trusted, tmp_path_factory.mktemp("trusting")) as gateway:
        yield gateway


@pytest.fixture
def up(servers: dict[str, RawUpstream]) -> RawUpstream:
    """The shared upstream as if it were new."""
    server = servers["up"]
    server.behave, server.reads_body = reply(), True
    server.requests.clear()
    return server


def ask(client: RawClient, method: str, target: str = "/api/x", *headers: str, body: bytes = b"") -> RawAnswer:
    client.request(method, target, headers, body)
    return client.answer(method)


def problem_of(answer: RawAnswer) -> Any:
    assert answer.all("content-type") == [b"application/problem+json"]
    return json.loads(answer.body)


def raw(answer: bytes, *, closes: bool = False) -> Callable[[Wire, RawRequest], bool | None]:
    def behave(wire: Wire, _request: RawRequest) -> bool | None:
        wire.send(answer)
        return False if closes else None

    return behave


# The request


@pytest.mark.parametrize(
    "target", ["/api/a%2Fb/../c//d?x=1&x=%zz", "/api/%c3%a9;v=1?a=b?c", "/api?q", "/api/", "/api"]
)
def test_path_and_query_arrive_as_they_were_sent(client: RawClient, up: RawUpstream, target: str) -> None:
    assert ask(client, "GET", target).status == 200
    assert up.requests[0].line == f"GET {target} HTTP/1.1".encode()


def test_a_target_in_absolute_form_arrives_in_origin_form(client: RawClient, up: RawUpstream) -> None:
    assert ask(client, "GET", "http://gateway.test/api/x?y").status == 200
    assert up.requests[0].line == b"GET /api/x?y HTTP/1.1"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "GET", "PROPFIND"])
def test_any_method_passes_with_its_body(client: RawClient, up: RawUpstream, method: str) -> None:
    body = bytes(range(256))
    assert ask(client, method, "/api/x", "Content-Length: 256", body=body).status == 200
    assert up.requests[0].line == f"{method} /api/x HTTP/1.1".encode()
    assert up.requests[0].body == body
    assert up.requests[0].all("content-length") == [b"256"]


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "GET"])
def test_no_body_is_made_up(client: RawClient, up: RawUpstream, method: str) -> None:
    assert ask(client, method).status == 200
    assert up.requests[0].all("content-length") == []
    assert up.requests[0].all("transfer-encoding") == []


def test_an_empty_body_stays_announced(client: RawClient, up: RawUpstream) -> None:
    assert ask(client, "POST", "/api/x", "Content-Length: 0").status == 200
    assert up.requests[0].all("content-length") == [b"0"]


def test_a_chunked_body_arrives_chunked(client: RawClient, up: RawUpstream) -> None:
    body = b"3\r\nabc\r\nA;ext=1\r\n0123456789\r\n0\r\n\r\n"
    assert ask(client, "POST", "/api/x", "Transfer-Encoding: chunked", body=body).status == 200
    assert up.requests[0].body == b"abc0123456789"
    assert up.requests[0].all("transfer-encoding") == [b"chunked"]
    assert up.requests[0].all("content-length") == []


@pytest.mark.parametrize("trailer", ["X-Late: 1", "X-Client-ID: other", "Host: elsewhere", "Authorization: Bearer x"])
def test_a_trailer_does_not_become_a_header(client: RawClient, up: RawUpstream, trailer: str) -> None:
    """It comes after everything was decided on the headers (RFC 9110 section 6.5.1)."""
    body = b"2\r\nok\r\n0\r\n%b\r\n\r\n" % trailer.encode()
    answer = ask(client, "POST", "/api/x", "Transfer-Encoding: chunked", "X-Client-ID: acme", body=body)
    assert answer.status == 200
    assert up.requests[0].body == b"ok"
    name, value = trailer.split(": ")
    assert value.encode() not in up.requests[0].all(name)


def test_the_upstream_decides_whether_a_body_is_asked_for(client: RawClient, up: RawUpstream) -> None:
    """What `Expect: 100-continue` is for: nobody in between knows whether the body is welcome."""
    up.reads_body = False

    def asks(wire: Wire, request: RawRequest) -> None:
        assert request.all("expect") == [b"100-continue"]
        assert wire.buffer == b""
        wire.send(b"HTTP/1.1 100 Go On\r\n\r\n")
        request.body = wire.read_exactly(2)
        reply()(wire, request)

    up.behave = asks
    try:
        client.request("POST", "/api/x", ("Content-Length: 2", "Expect: 100-continue"))
        assert client.read_until(b"\r\n") == b"HTTP/1.1 100 Go On\r\n"
        assert client.read_until(b"\r\n\r\n") is not None
        client.send(b"ok")
        assert client.answer().status == 200
        assert up.requests[0].body == b"ok"
    finally:
        up.reads_body = True


def test_a_refusal_of_the_upstream_comes_instead_of_being_asked(client: RawClient, up: RawUpstream) -> None:
    """And since nobody knows whether the body still comes, the connection ends."""
    up.reads_body, up.behave = False, reply(b"no", b"413 Too Much")
    try:
        client.request("POST", "/api/x", ("Content-Length: 20", "Expect: 100-continue"))
        assert client.read_until(b"\r\n") == b"HTTP/1.1 413 Too Much\r\n"
        rest = client.read_until(b"\r\n\r\nno")
        assert rest is not None
        assert b"connection: close" in rest
        assert client.is_closed()
    finally:
        up.reads_body = True


def test_a_client_that_does_not_wait_to_be_asked_is_heard(client: RawClient, up: RawUpstream) -> None:
    client.request("POST", "/api/x", ("Content-Length: 2", "Expect: 100-continue"), b"ok")
    assert client.answer().status == 200
    assert up.requests[0].body == b"ok"


def test_the_upstream_is_named_as_host_and_the_original_is_kept(client: RawClient, up: RawUpstream) -> None:
    ask(client, "GET")
    assert up.requests[0].all("host") == [up.url.removeprefix("http://").encode()]
    assert up.requests[0].all("x-forwarded-host") == [b"gateway.test"]


def test_headers_for_one_hop_stay_on_it(client: RawClient, up: RawUpstream) -> None:
    """Also those that only `Connection` declares to be such (RFC 9110 section 7.6.1)."""
    hop = {
        "Connection": "X-Hop, keep-alive,x-other-hop",
        "Keep-Alive": "timeout=5",
        "Proxy-Authorization": "Basic x",
        "Proxy-Connection": "keep-alive",
        "TE": "trailers",
        "Trailer": "X-T",
        "Upgrade": "h2c",
        "X-Hop": "1",
        "X-Other-Hop": "2",
    }
    ask(client, "GET", "/api/x", *(f"{name}: {value}" for name, value in hop.items()), "X-Kept: 3")
    assert up.requests[0].all("x-kept") == [b"3"]
    assert {name: up.requests[0].all(name) for name in hop} == {name: [] for name in hop}


def test_connection_cannot_take_away_what_others_rely_on(client: RawClient, up: RawUpstream) -> None:
    names = "X-Client-ID, Host, Content-Length, X-Forwarded-For, Via, X-Request-ID"
    ask(client, "POST", "/api/x", f"Connection: {names}", "X-Client-ID: acme", "Content-Length: 2", body=b"ok")
    request = up.requests[0]
    assert request.body == b"ok"
    assert request.all("x-client-id") == [b"acme"]
    assert [len(request.all(name)) for name in names.split(", ")] == [1] * 6


def test_forwarding_fields_of_an_untrusted_peer_are_replaced(client: RawClient, up: RawUpstream) -> None:
    forged = {
        "X-Forwarded-For": "198.51.100.7",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "evil.test",
        "X-Forwarded-Port": "1",
        "X-Real-IP": "198.51.100.7",
        "Forwarded": "for=198.51.100.7",
        "X_Forwarded_For": "198.51.100.7",
        "X_Client_ID": "other",
    }
    ask(client, "GET", "/api/x", *(f"{name}: {value}" for name, value in forged.items()))
    assert {name: up.requests[0].all(name) for name in forged} == {
        "X-Forwarded-For": [b"127.0.0.1"],
        "X-Forwarded-Proto": [b"http"],
        "X-Forwarded-Host": [b"gateway.test"],
        "X-Forwarded-Port": [],
        "X-Real-IP": [],
        "Forwarded": [],
        "X_Forwarded_For": [],
        "X_Client_ID": [],
    }


@pytest.mark.parametrize("more", [(), ("X-Padded:  1",)], ids=["plain head", "general parser"])
def test_a_name_like_that_of_a_field_that_is_not_forwarded_is_dropped(
    client: RawClient, up: RawUpstream, more: tuple[str, ...]
) -> None:
    """CGI takes `Transfer_Encoding` for the real field, and a lenient server may take `TransferEncoding` for it."""
    names = ["Transfer_Encoding", "Content_Length", "Keep_Alive", "Proxy_Authorization", "X_Request_ID"]
    names += ["TransferEncoding", "Transfer.Encoding", "Content.Length"]
    lines = [f"{name}: chunked" for name in names]
    ask(client, "POST", "/api/x", *lines, *more, "Content-Length: 2", body=b"ok")
    request = up.requests[0]
    assert request.body == b"ok"
    assert {name: request.all(name) for name in names} == {name: [] for name in names}
    assert request.all("content-length") == [b"2"]


def test_forwarding_fields_of_a_trusted_proxy_are_extended(trusting: RunningGateway, up: RawUpstream) -> None:
    told = {
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "shop.test",
        "X-Forwarded-Port": "8443",
        "X-Real-IP": "198.51.100.7",
        "Forwarded": "for=198.51.100.7",
    }
    with RawClient(trusting.port) as client:
        hops = ("X-Forwarded-For: 198.51.100.7", "X-Forwarded-For: 203.0.113.9")
        ask(client, "GET", "/api/x", *hops, *(f"{name}: {value}" for name, value in told.items()))
    assert up.requests[0].all("x-forwarded-for") == [b"198.51.100.7, 203.0.113.9, 127.0.0.1"]
    assert {name: up.requests[0].all(name) for name in told} == {
        name: [value.encode()] for name, value in told.items()
    }


def test_without_forwarding_fields_of_a_trusted_proxy_the_gateway_sets_them(
    trusting: RunningGateway, up: RawUpstream
) -> None:
    with RawClient(trusting.port) as client:
        ask(client, "GET")
    assert up.requests[0].all("x-forwarded-for") == [b"127.0.0.1"]
    assert up.requests[0].all("x-forwarded-proto") == [b"http"]
    assert up.requests[0].all("x-forwarded-host") == [b"gateway.test"]


def test_via_names_the_gateway_on_both_paths(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(headers=((b"Via", b"1.1 inner"),))
    answer = ask(client, "GET", "/api/x", "Via: 1.0 outer")
    own = VIA.fullmatch(up.requests[0].all("via")[1])
    assert own is not None
    assert up.requests[0].all("via") == [b"1.0 outer", own[0]]
    assert answer.all("via") == [b"1.1 inner", own[0]]


def test_a_request_id_is_taken_over(client: RawClient, up: RawUpstream) -> None:
    answer = ask(client, "GET", "/api/x", "X-Request-ID: abc-123")
    assert up.requests[0].all("x-request-id") == answer.all("x-request-id") == [b"abc-123"]


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("X-Request-ID: ",),
        ("X-Request-ID: two words",),
        (f"X-Request-ID: {'x' * 129}",),
        ("X-Request-ID: caf\xe9",),
        ("X-Request-ID: a", "X-Request-ID: b"),
    ],
)
def test_a_request_id_is_made_where_none_is_usable(
    client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    answer = ask(client, "GET", "/api/x", *headers)
    (made,) = up.requests[0].all("x-request-id")
    assert len(made) == 32
    assert answer.all("x-request-id") == [made]


def test_made_request_ids_differ(client: RawClient, up: RawUpstream) -> None:
    ids = {ask(client, "GET").all("x-request-id")[0] for _ in range(5)}
    assert len(ids) == 5


def test_header_values_arrive_as_they_were_sent(client: RawClient, up: RawUpstream) -> None:
    """Empty, beyond ASCII, repeated, and in order."""
    ask(client, "GET", "/api/x", "X-Empty:", "X-Bytes: caf\xe9 \xff", "X-Two: 1", "X-Two: 2", "Accept-Encoding: gzip")
    request = up.requests[0]
    assert request.all("x-empty") == [b""]
    assert request.all("x-bytes") == [b"caf\xe9 \xff"]
    assert request.all("x-two") == [b"1", b"2"]
    assert request.all("accept-encoding") == [b"gzip"]


def test_an_upgrade_that_is_not_supported_is_served_as_plain_http(client: RawClient, up: RawUpstream) -> None:
    assert ask(client, "GET", "/api/x", "Connection: Upgrade", "Upgrade: h2c").status == 200
    assert up.requests[0].all("upgrade") == up.requests[0].all("connection") == []


# The response


def test_the_response_reaches_the_client(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(b"no", b"418 I'm a teapot", ((b"X-Empty", b""), (b"X-Bytes", b"\xff"), (b"ETag", b'"1"')))
    answer = ask(client, "GET")
    assert (answer.status, answer.body) == (418, b"no")
    assert (answer.all("x-empty"), answer.all("x-bytes"), answer.all("etag")) == ([b""], [b"\xff"], [b'"1"'])
    assert answer.all("content-length") == [b"2"]


def test_cookies_are_kept_apart(client: RawClient, up: RawUpstream) -> None:
    """`Set-Cookie` is the one header whose lines cannot be joined (RFC 9110 section 5.3)."""
    up.behave = reply(
        headers=((b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2; Expires=Wed, 21 Oct 2026 07:28:00 GMT"))
    )
    assert ask(client, "GET").all("set-cookie") == [b"a=1", b"b=2; Expires=Wed, 21 Oct 2026 07:28:00 GMT"]


def test_headers_of_the_response_for_one_hop_stay_on_it(client: RawClient, up: RawUpstream) -> None:
    hop = ((b"Connection", b"X-Hop, close"), (b"Keep-Alive", b"timeout=1"), (b"Proxy-Authenticate", b"Basic"))
    up.behave = reply(headers=(*hop, (b"X-Hop", b"1"), (b"X-Kept", b"2")))
    answer = ask(client, "GET")
    assert answer.all("x-kept") == [b"2"]
    assert [answer.all(name) for name in ("connection", "keep-alive", "proxy-authenticate", "x-hop")] == [[]] * 4
    assert ask(client, "GET").status == 200


def test_rate_limit_fields_of_the_upstream_are_replaced(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(headers=((b"X-RateLimit-Limit", b"7"), (b"x-ratelimit-remaining", b"7")))
    answer = ask(client, "GET")
    assert answer.all("x-ratelimit-limit") == [b"100000"]
    assert len(answer.all("x-ratelimit-remaining")) == 1


def test_a_compressed_body_stays_compressed(client: RawClient, up: RawUpstream) -> None:
    body = gzip.compress(b"hello " * 100)
    up.behave = reply(body, headers=((b"Content-Encoding", b"gzip"),))
    answer = ask(client, "GET")
    assert answer.body == body
    assert answer.all("content-encoding") == [b"gzip"]
    assert answer.all("content-length") == [b"%d" % len(body)]


def test_a_chunked_response_arrives_whole(client: RawClient, up: RawUpstream) -> None:
    up.behave = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\nT: t\r\n\r\n")
    answer = ask(client, "GET")
    assert (answer.body, answer.is_complete) == (b"abcde", True)


def test_a_chunked_response_of_http_1_0_arrives_whole_and_ends_its_connection(
    client: RawClient, up: RawUpstream
) -> None:
    """HTTP/1.0 does not define the coding, so what follows on that connection is not trusted."""
    head = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n"
    for framing, connections in (
        (b"Content-Length: 2\r\n\r\nok", 0),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 2),
    ):
        up.behave = raw(head + framing)
        answer = ask(client, "GET")
        before = len(up.wires)
        for _ in range(2):
            answer = ask(client, "GET")
            assert (answer.body, answer.is_complete) == (b"ok", True)
        assert len(up.wires) == before + connections


def test_a_response_that_ends_with_its_connection_arrives_whole(client: RawClient, up: RawUpstream) -> None:
    """The client is told the end by the framing, and its own connection stays."""
    up.behave = raw(b"HTTP/1.0 200 OK\r\n\r\nall of it", closes=True)
    answer = ask(client, "GET")
    assert (answer.body, answer.is_complete) == (b"all of it", True)
    assert not client.is_closed(within=0.05)


def test_the_response_to_head_keeps_its_content_length(client: RawClient, up: RawUpstream) -> None:
    up.behave = raw(b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nETag: x\r\n\r\n")
    answer = ask(client, "HEAD")
    assert (answer.status, answer.all("content-length"), answer.all("etag")) == (200, [b"12345"], [b"x"])
    assert ask(client, "HEAD").status == 200


@pytest.mark.parametrize("head", [b"204 No Content\r\n", b"304 Not Modified\r\nContent-Length: 9\r\nETag: x\r\n"])
def test_a_response_without_a_body_leaves_the_connection_usable(
    client: RawClient, up: RawUpstream, head: bytes
) -> None:
    up.behave = raw(b"HTTP/1.1 " + head + b"\r\n")
    for _ in range(2):
        answer = ask(client, "GET")
        assert answer.status == int(head[:3])
        assert answer.all("transfer-encoding") == []
    up.behave = reply()
    assert ask(client, "GET").body == b"ok"


def test_interim_responses_are_passed_on(client: RawClient, up: RawUpstream) -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 5\r\nConnection: %b\r\n\r\n"
    up.behave = raw(hint % b"x" + hint % b"close" + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    client.request()
    for _ in range(2):
        head = client.read_until(b"\r\n\r\n") or b""
        assert VIA.sub(b"*", head) == b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nvia: *\r\n\r\n"
    assert client.answer().body == b"ok"


def test_a_client_of_http_1_0_gets_no_interim_responses(client: RawClient, up: RawUpstream) -> None:
    """It does not know them (RFC 9110 section 15.2)."""
    up.behave = raw(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    client.send(b"GET /api/x HTTP/1.0\r\nHost: gateway.test\r\n\r\n")
    assert client.read_until(b"\r\n") == b"HTTP/1.1 200 OK\r\n"


# Routes


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/api/users", b"users"),
        ("/api/users/", b"users"),
        ("/api/users/7", b"users"),
        ("/api/users?x", b"users"),
        ("/api/usersx", b"ok"),
        ("/api/user", b"ok"),
        ("/api/users/deep/er", b"fallback"),
        ("/api/users/deeper", b"users"),
        ("/api/x/../users/7", b"users"),
        ("/api//users", b"users"),
        ("/api/%75sers", b"users"),
    ],
)
def test_the_longest_prefix_of_whole_segments_is_the_route(
    client: RawClient, up: RawUpstream, target: str, body: bytes
) -> None:
    assert ask(client, "GET", target).body == body


@pytest.mark.parametrize(
    ("host", "body"),
    [("tenant.test", b"host"), ("TENANT.test:8000", b"host"), ("tenant.test.evil", b"users"), ("other", b"users")],
)
def test_a_route_for_a_host_comes_before_one_for_any(client: RawClient, host: str, body: bytes) -> None:
    client.send(f"GET /api/users/7 HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert client.answer().body == body


@pytest.mark.parametrize(("method", "body"), [("GET", b"readers"), ("HEAD", b""), ("POST", b"writers")])
def test_routes_share_a_path_by_method(client: RawClient, method: str, body: bytes) -> None:
    answer = ask(client, method, "/api/split/x")
    assert (answer.status, answer.body) == (200, body)


def test_a_method_no_route_takes_is_refused_with_those_taken(client: RawClient) -> None:
    answer = ask(client, "DELETE", "/api/split/x")
    assert answer.status == 405
    assert answer.all("allow") == [b"GET, HEAD, POST"]
    assert problem_of(answer)["reason"] == "method_not_allowed"


def test_trace_is_not_forwarded(client: RawClient, up: RawUpstream) -> None:
    """It would echo credentials. The response says what may be asked (RFC 9110 section 15.5.6)."""
    answer = ask(client, "TRACE")
    assert answer.status == 405
    assert problem_of(answer)["reason"] == "method_not_allowed"
    assert answer.all("allow")
    assert b"TRACE" not in answer.all("allow")[0]
    assert up.requests == []


def test_a_path_without_a_route_is_not_found(gateway: StartGateway, servers: dict[str, RawUpstream]) -> None:
    routes = [{"name": "users", "path": "/api/users", "upstream": "up"}]
    started = gateway({"upstreams": {"up": to(servers["users"].url)}, "routes": routes})
    with RawClient(started.port) as client:
        answer = ask(client, "GET", "/api/usersx")
    assert answer.status == 404
    assert problem_of(answer)["reason"] == "no_route"


@pytest.mark.parametrize(
    ("target", "arrives"),
    [("/api/stripped/a%2F?q", "/a%2F?q"), ("/api/stripped", "/"), ("/api/stripped?q", "/?q"), ("/api/stripped/", "/")],
)
def test_a_prefix_is_taken_off(client: RawClient, up: RawUpstream, target: str, arrives: str) -> None:
    assert ask(client, "GET", target).status == 200
    assert up.requests[0].line == f"GET {arrives} HTTP/1.1".encode()


def test_a_prefix_spelt_so_that_it_cannot_be_taken_off_is_refused(client: RawClient, up: RawUpstream) -> None:
    answer = ask(client, "GET", "/api/%73tripped/x")
    assert (answer.status, problem_of(answer)["reason"]) == (400, "bad_request")
    assert up.requests == []


def test_targets_take_turns(client: RawClient) -> None:
    answers = [ask(client, "GET", "/api/several").body for _ in range(6)]
    assert sorted(answers[:2]) == [b"one", b"two"]
    assert answers == answers[:2] * 3


# Failures of the upstream


def assert_problem(answer: RawAnswer, status: int, reason: str, up: RawUpstream | None = None) -> None:
    """The response explains itself, and names no address inside."""
    problem = problem_of(answer)
    assert (answer.status, problem["status"], problem["reason"]) == (status, status, reason)
    assert problem["request_id"].encode() == answer.all("x-request-id")[0]
    assert b"127.0.0.1" not in answer.body
    assert up is None or str(up.port).encode() not in answer.body


def test_an_upstream_that_refuses_is_a_connect_error(client: RawClient) -> None:
    assert_problem(ask(client, "GET", "/api/refused"), 502, "upstream_connect_error")
    assert ask(client, "GET", "/api/users").status == 200


def test_an_upstream_that_is_silent_is_a_timeout(client: RawClient, up: RawUpstream) -> None:
    up.behave = lambda wire, _request: not wire.is_closed()
    assert_problem(ask(client, "GET"), 504, "upstream_timeout", up)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: %b" % (b"x" * 70_000),
    ],
)
def test_an_upstream_that_does_not_speak_http_is_a_protocol_error(
    client: RawClient, up: RawUpstream, answer: bytes
) -> None:
    up.behave = raw(answer)
    assert_problem(ask(client, "GET"), 502, "upstream_protocol_error", up)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_an_upstream_that_disconnects_before_its_head_is_a_reset(
    client: RawClient, up: RawUpstream, answer: bytes
) -> None:
    up.behave = raw(answer, closes=True)
    assert_problem(ask(client, "GET"), 502, "upstream_reset", up)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ],
)
@pytest.mark.parametrize("closes", [True, False])
def test_a_response_that_breaks_off_never_looks_complete(
    client: RawClient, up: RawUpstream, answer: bytes, *, closes: bool
) -> None:
    """Broken or silent in the middle of its body: what came is passed on, and the client's connection closed."""
    up.behave = raw(answer, closes=closes)
    client.request()
    got = client.answer()
    assert (got.status, got.body, got.is_complete) == (200, b"half", False)
    assert client.is_closed()


@pytest.mark.parametrize("closes", [True, False])
def test_a_response_that_breaks_off_is_reset_where_its_end_is_that_of_the_connection(
    client: RawClient, up: RawUpstream, *, closes: bool
) -> None:
    passed = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool | None:
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        passed.wait(PATIENCE)
        return False if closes else None

    up.behave = behave
    client.send(b"GET /api/x HTTP/1.0\r\nHost: gateway.test\r\n\r\n")
    assert client.read_until(b"half") is not None
    passed.set()
    with pytest.raises(ConnectionResetError):
        list(iter(partial(client.sock.recv, 65_536), b""))


def test_a_response_to_http_1_0_that_a_malformed_request_cuts_does_not_appear_complete(
    client: RawClient, up: RawUpstream
) -> None:
    """`keep-alive` lets the gateway read what follows the request, although it serves one request only."""

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        wire.read_until(b"\r\n")  # until the gateway closes

    up.behave = behave
    client.send(b"GET /api/x HTTP/1.0\r\nHost: gateway.test\r\nConnection: keep-alive\r\n\r\n")
    assert client.read_until(b"half") is not None
    client.send(b"garbage\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        list(iter(partial(client.sock.recv, 65_536), b""))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nzz",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nX-Not-Plain:\r\nContent-Length: 3\r\n\r\nhalf",
    ],
)
def test_a_response_that_is_wrong_before_anything_was_passed_on_is_a_protocol_error(
    client: RawClient, up: RawUpstream, answer: bytes
) -> None:
    """Also where it is longer than it announced: what was announced must not pass for all of it."""
    up.behave = raw(answer, closes=False)
    assert_problem(ask(client, "GET"), 502, "upstream_protocol_error", up)


def test_a_response_that_turns_out_too_long_never_looks_complete(client: RawClient, up: RawUpstream) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhalf")
        time.sleep(0.1)
        wire.send(b"more")

    up.behave = behave
    client.request()
    got = client.answer()
    assert (got.status, got.body, got.is_complete) == (200, b"half", False)
    assert client.is_closed()


# Requests that servers could disagree about

HOST = b"Host: gateway.test\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@each(
    "request_bytes",
    [
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Content-Length: 2, 3\r\n\r\nabc",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Content-Length: +2\r\n\r\nok",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Content-Length: 0x2\r\n\r\nok",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Content-Length : 2\r\n\r\nok",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.1\r\n" + HOST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
        b"POST /api/bad HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n0\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\n" + HOST + b"X: folded\r\n line\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\n X: first\r\n" + HOST + b"\r\n",
        b"GET /api/bad HTTP/1.1\r\n" + HOST + b"X: a\rY: b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\n" + HOST + b"X: a\nY: b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\n" + HOST + b"X: a\x00b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\nHost: gateway.test\n\n",
        b"GET /api/bad HTTP/1.1\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
        b"GET /api/bad HTTP/1.1\r\n" + HOST + b"host: other\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a/b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: user@a\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a:b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a, b\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a%zz\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a%2\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: a:65536\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: [1:2]\r\n\r\n",
        b"GET /api/bad HTTP/1.1\r\nHost: [::1\r\n\r\n",
        b"GET http://a%zz/api/bad HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /api/\xff HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /api/bad HTTP/1.1 \r\n" + HOST + b"\r\n",
        b"CONNECT gateway.test:80 HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /api/bad RTSP/1.0\r\n" + HOST + b"\r\n",
        b"\r\nDESCRIBE /api/bad RTSP/1.0\r\n" + HOST + b"\r\n",
        b"POST /api/%b RTSP/1.0\r\n" % (b"a" * 9_000) + HOST + b"Content-Length: 0\r\n\r\n",
    ],
)
def test_an_ambiguous_request_is_refused_and_never_forwarded(
    running: RunningGateway, up: RawUpstream, request_bytes: bytes
) -> None:
    up.requests.clear()
    with RawClient(running.port) as client, RawClient(running.port) as later:
        client.send(request_bytes)
        answer = client.answer()
        assert (answer.status, problem_of(answer)["reason"]) == (400, "bad_request")
        assert client.is_closed()
        assert ask(later, "GET", "/api/good").status == 200
    assert [request.line for request in up.requests] == [b"GET /api/good HTTP/1.1"]


@each(
    "body",
    [
        b"zz\r\nok\r\n0\r\n\r\n",
        b"0x2\r\nok\r\n0\r\n\r\n",
        b"-2\r\nok\r\n0\r\n\r\n",
        b"2 \r\nok\r\n0\r\n\r\n",
        b"2\nok\n0\n\n",
        b"3\r\nokkk\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\nok",
        b"8000000000000000\r\nok",
        b"2\r\nok\r\n0ffffffffffffffff;a=b\r\n",
    ],
)
@each("pause", [0.0, 0.05])
def test_a_body_with_bad_chunks_never_arrives_whole(
    running: RunningGateway, up: RawUpstream, body: bytes, pause: float
) -> None:
    """The head may be on its way when the body turns out to be bad; the upstream then sees the request broken off."""
    up.requests.clear()
    with RawClient(running.port) as client, RawClient(running.port) as later:
        client.send(b"POST /api/bad HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n")
        time.sleep(pause)
        client.send(body)
        answer = client.answer()
        assert (answer.status, problem_of(answer)["reason"]) == (400, "bad_request")
        assert client.is_closed()
        assert ask(later, "GET", "/api/good").status == 200
    assert [request.line for request in up.requests if request.is_complete] == [b"GET /api/good HTTP/1.1"]


def test_http_1_0_may_leave_out_the_host(client: RawClient, up: RawUpstream) -> None:
    client.send(b"GET /api/x HTTP/1.0\r\n\r\n")
    assert client.answer().status == 200
    assert client.is_closed()
    (via,) = up.requests[0].all("via")
    assert via.startswith(b"1.0 api-gateway-")


def test_a_client_of_http_1_0_gets_no_chunks(client: RawClient, up: RawUpstream) -> None:
    """It does not know them (RFC 9112 section 6.1)."""
    up.behave = raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    client.send(b"GET /api/x HTTP/1.0\r\nHost: gateway.test\r\n\r\n")
    answer = client.answer()
    assert answer.all("transfer-encoding") == []
    assert answer.body == b"ok"


# Bodies that are too large


def test_a_body_of_the_largest_size_passes(client: RawClient, up: RawUpstream) -> None:
    headers = f"Content-Length: {MAX_BODY}"
    assert ask(client, "POST", "/api/x", headers, body=bytes(MAX_BODY)).status == 200
    assert len(up.requests[0].body) == MAX_BODY


def test_a_body_announced_as_too_large_is_refused_before_it_comes(client: RawClient, up: RawUpstream) -> None:
    answer = ask(client, "POST", "/api/x", f"Content-Length: {MAX_BODY + 1}")
    assert (answer.status, problem_of(answer)["reason"]) == (413, "body_too_large")
    assert client.is_closed()
    assert up.requests == []


def test_a_chunked_body_that_grows_too_large_is_refused(client: RawClient, up: RawUpstream) -> None:
    """The upstream never sees it whole."""
    client.request("POST", "/api/x", ("Transfer-Encoding: chunked",), b"8000\r\n" + bytes(0x8000) + b"\r\n")
    client.send(b"8001\r\n" + bytes(0x8001) + b"\r\n0\r\n\r\n")
    answer = client.answer()
    assert (answer.status, problem_of(answer)["reason"]) == (413, "body_too_large")
    assert client.is_closed()
    assert not any(request.is_complete for request in up.requests)


@pytest.mark.parametrize("first", [b"", b"2\r\nok\r\n"])
def test_a_chunk_that_is_announced_as_too_large_is_refused_before_it_comes(
    client: RawClient, up: RawUpstream, first: bytes
) -> None:
    client.request("POST", "/api/x", ("Transfer-Encoding: chunked",))
    client.send(first + b"%x\r\n" % (MAX_BODY + 1))
    answer = client.answer()
    assert (answer.status, problem_of(answer)["reason"]) == (413, "body_too_large")
    assert client.is_closed()
    assert not any(request.is_complete for request in up.requests)


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", f"Content-Length: {64 * MAX_BODY}"])
def test_a_client_that_sends_on_still_gets_the_refusal(client: RawClient, up: RawUpstream, framing: str) -> None:
    """A connection closed with bytes unread is reset, and a reset takes the response away from the client."""
    client.request("POST", "/api/x", (framing,))
    piece = b"10000\r\n" + bytes(0x10000) + b"\r\n" if "chunked" in framing else bytes(0x10000)
    with suppress(OSError):
        for _ in range(32):
            client.send(piece)
    assert client.answer().status == 413
