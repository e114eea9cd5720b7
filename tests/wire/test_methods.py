"""Any token is a method; those that the gateway does not know are forwarded as unsafe and never repeated."""

from typing import Any

import pytest

from api_gateway.http1.headers import fields_of
from api_gateway.models import Exchange
from api_gateway.resilience.retry import is_repeatable
from tests.cases import each
from tests.kit import RawClient, RawRequest, RawUpstream, RunningGateway, Wire, eventually, in_front_of, reason, reply

UNKNOWN = [
    "VERSION-CONTROL",
    "PROPFIND",
    "M-SEARCH",
    "BREW",
    "get",
    "P",
    "POSTER",
    "QUERY",
    "!#$%&'*+.^_`|~0",
    "X" * 64,
]
HOST = b"Host: gateway.test\r\n"


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    found = in_front_of(
        shared.url,
        retry={"attempts": 3, "budget": 1, "min_retries_per_second": 100},
        circuit_breaker={"failure_threshold": 100_000, "minimum_calls": 100_000},
    )
    found["routes"] += [
        {"name": "read", "path": "/api/read", "upstream": "up", "methods": ["GET"]},
        {"name": "priced", "path": "/api/priced", "upstream": "up", "costs": [{"methods": ["POST"], "cost": 50}]},
        {
            "name": "free",
            "path": "/api/free",
            "upstream": "up",
            "cost": 7,
            "costs": [{"methods": ["POST"], "cost": 0}],
        },
    ]
    return found


@pytest.mark.parametrize("method", UNKNOWN)
def test_an_unknown_method_passes_with_and_without_a_body(client: RawClient, up: RawUpstream, method: str) -> None:
    client.request(method)
    assert client.answer().body == b"ok"
    client.request(method, "/api/x?y", ("Content-Length: 4",), b"body")
    assert client.answer().body == b"ok"
    client.request(method, "http://shop.test/api/z", ("Transfer-Encoding: chunked",), b"3\r\nabc\r\n0\r\n\r\n")
    assert client.answer().body == b"ok"
    client.request("GET")
    assert client.answer().body == b"ok"
    assert [(one.line, one.body) for one in up.requests] == [
        (f"{method} /api/x HTTP/1.1".encode(), b""),
        (f"{method} /api/x?y HTTP/1.1".encode(), b"body"),
        (f"{method} /api/z HTTP/1.1".encode(), b"abc"),
        (b"GET /api/x HTTP/1.1", b""),
    ]


@pytest.mark.parametrize("cut", range(1, 40))
def test_it_may_arrive_in_two_pieces(client: RawClient, up: RawUpstream, cut: int) -> None:
    request = b"\r\nVERSION-CONTROL /api/x HTTP/1.1\r\n" + HOST + b"\r\n"
    client.send(request[:cut])
    client.unread_by_peer()
    client.send(request[cut:])
    assert client.answer().status == 200
    assert up.requests[0].line == b"VERSION-CONTROL /api/x HTTP/1.1"


@pytest.mark.parametrize("method", ["VERSION-CONTROL", "GET"])
def test_a_method_may_arrive_byte_by_byte(client: RawClient, up: RawUpstream, method: str) -> None:
    for byte in f"{method} /api/x HTTP/1.1\r\nHost: a\r\n\r\n".encode():
        client.send(bytes([byte]))
    assert client.answer().status == 200
    assert up.requests[0].line == f"{method} /api/x HTTP/1.1".encode()


def test_pipelined_requests_with_unknown_methods_are_served_in_order(client: RawClient, up: RawUpstream) -> None:
    client.send(
        b"GET /api/1 HTTP/1.1\r\n" + HOST + b"\r\n"
        b"LABEL /api/2 HTTP/1.1\r\n" + HOST + b"Content-Length: 18\r\n\r\nGET /api/no HTTP/1"
        b"BREW /api/3 HTTP/1.1\r\n" + HOST + b"Upgrade: h2c\r\nConnection: upgrade\r\n\r\n"
        b"POST /api/4 HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n"
        b"MERGE /api/5 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    )
    assert [client.answer().status for _ in range(5)] == [200] * 5
    assert [one.line.split(b" ")[0] for one in up.requests] == [b"GET", b"LABEL", b"BREW", b"POST", b"MERGE"]
    assert up.requests[1].body == b"GET /api/no HTTP/1"


def test_an_unknown_method_is_never_repeated(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(status=b"503 Later")
    for headers in ((), ("Idempotency-Key: 1",)):
        client.request("LABEL", "/api/x", headers)
        assert client.answer().status == 503
    assert len(up.requests) == 2
    client.request("GET")
    assert client.answer().status == 503
    assert len(up.requests) > 3, "the upstream's GET is repeated"


def test_nor_on_a_connection_that_turns_out_to_be_closed(client: RawClient, up: RawUpstream) -> None:
    def close_after_one(wire: Wire, request: RawRequest) -> bool:
        reply()(wire, request)
        return len(up.requests) < 2 and request.line.startswith(b"GET")

    up.behave = close_after_one
    assert client.get().status == 200
    before = len(up.requests)
    up.behave = lambda _wire, _request: False  # closed without a response
    client.request("LABEL")
    assert client.answer().status == 502
    assert len(up.requests) == before + 1


@each("method", ["GET", "HEAD", "PUT", "POST"])
def test_a_known_method_is_repeated_as_before(method: str) -> None:
    fields = fields_of([(b"Idempotency-Key", b"1")])
    assert is_repeatable(method, fields)
    assert is_repeatable(method, {}) is (method != "POST")


@pytest.mark.parametrize("method", ["TRACE", "trace", "Connect", "pri"])
def test_methods_that_are_not_forwarded_are_refused_in_any_letter_case(
    client: RawClient, up: RawUpstream, method: str
) -> None:
    client.request(method)
    assert reason(client.answer()) == (405, "method_not_allowed")
    assert up.requests == []


@pytest.mark.parametrize(
    ("method", "path", "cost"),
    [
        *(("POST", "/api/priced", 50), ("post", "/api/priced", 50), ("Post", "/api/priced", 50)),
        *(("LABEL", "/api/priced", 1), ("post", "/api/free", 7), ("POST", "/api/free", 0)),
    ],
)
def test_no_letter_case_evades_the_cost_of_a_method(
    running: RunningGateway, client: RawClient, method: str, path: str, cost: int
) -> None:
    done: list[Exchange] = []
    app: Any = running.server._app
    record = app.fast_path.current.record
    record._observers, observers = (*record._observers, done.append), record._observers
    client.request(method, path)
    assert client.answer().status == 200
    eventually(lambda: bool(done), "the exchange ends")
    record._observers = observers
    assert (done[0].method, done[0].cost) == (method, cost)


@pytest.mark.parametrize("method", ["post", "LABEL", "get"])
def test_a_route_for_some_methods_takes_no_other_spelling(client: RawClient, method: str) -> None:
    client.request(method, "/api/read")
    assert reason(client.answer()) == (405, "method_not_allowed")


@pytest.mark.parametrize("target", ["*", "http://gateway.test", "HTTPS://gateway.test:8000"])
def test_options_of_the_server_are_answered_by_the_gateway(client: RawClient, up: RawUpstream, target: str) -> None:
    """RFC 9110 section 9.3.7."""
    for _ in range(2):
        client.request("OPTIONS", target)
        answer = client.answer()
        assert (answer.status, answer.all("content-length"), answer.body) == (204, [], b"")
        assert answer.all("allow") == [b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"]
    assert up.requests == []
    assert client.get().status == 200


@pytest.mark.parametrize("unusual", [(), ("X-Odd:  two blanks",)])
def test_the_field_proxy_does_not_reach_the_upstream(
    client: RawClient, up: RawUpstream, unusual: tuple[str, ...]
) -> None:
    assert client.get(headers=("Proxy: http://evil.test", "PROXY: x", "X-Proxy: kept", *unusual)).status == 200
    assert (up.requests[0].all("proxy"), up.requests[0].all("x-proxy")) == ([], [b"kept"])
