"""What routes do besides forwarding, on real connections: compression while it streams, and limits of bodies."""

import threading
import time
import zlib
from typing import Any

import pytest

from tests.kit import RawAnswer, RawClient, RawRequest, RawUpstream, RunningGateway, Wire, in_front_of, reason, reply

WAYS = {"fast path": (), "general parser": ("X-Odd:  two blanks",)}
both_ways = pytest.mark.parametrize("way", WAYS)
TEXT = b"a text that is repeated. " * 400
JSON = (b"Content-Type", b"application/json")


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    config = in_front_of(shared.url)
    config["routes"] = [
        {"name": "all", "path": "/api", "upstream": "up", "compression": {"types": ["application/json", "text/*"]}},
        {"name": "small", "path": "/api/small", "upstream": "up", "max_body_bytes": 10},
        {"name": "head", "path": "/api/head", "upstream": "up", "max_header_bytes": 150, "max_header_lines": 5},
        {"name": "quick", "path": "/api/quick", "upstream": "up", "response_timeout": 0.2},
        {
            "name": "edited",
            "path": "/api/edited",
            "upstream": "up",
            "request_headers": {"set": {"X-Caller": "{client}"}},
            "response_headers": {"remove": ["X-Inner"]},
        },
        {"name": "direct", "path": "/api/direct", "respond": {"status": 200, "body": "ready"}},
    ]
    return config


def got(client: RawClient, *fields: str, method: str = "GET") -> tuple[RawAnswer, bytes]:
    """Return the response to a client that accepts gzip, and its content."""
    client.request(method, "/api/x", ("Accept-Encoding: gzip", *fields))
    answer = client.answer(method)
    is_encoded = answer.all("content-encoding") == [b"gzip"] and method != "HEAD"
    return answer, zlib.decompress(answer.body, 31) if is_encoded else answer.body


def in_chunks(*pieces: bytes, fields: bytes = b"Content-Type: application/json\r\n") -> Any:
    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % fields)
        for piece in pieces:
            wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        wire.send(b"0\r\n\r\n")

    return behave


@both_ways
def test_a_response_is_compressed_whatever_its_framing(client: RawClient, up: RawUpstream, way: str) -> None:
    for behave in (
        reply(TEXT, headers=(JSON, (b"ETag", b'"x"'))),
        reply(TEXT, headers=(JSON, (b"X-Odd", b" two blanks"))),
        in_chunks(TEXT[:1_000], TEXT[1_000:]),
        in_chunks(TEXT, fields=b"Content-Type:  application/json\r\n"),
        reply(TEXT * 100, headers=(JSON,)),
    ):
        up.behave = behave
        answer, content = got(client, *WAYS[way])
        assert (answer.status, answer.is_complete) == (200, True)
        assert answer.all("content-encoding") == [b"gzip"]
        assert answer.all("vary") == [b"Accept-Encoding"]
        assert not answer.all("content-length")
        assert content in (TEXT, TEXT * 100)
        assert len(answer.body) < len(content) / 10
    assert client.get("/api/x").status == 200, "the connection is kept"


@both_ways
def test_what_may_not_be_compressed_passes_as_it_is(client: RawClient, up: RawUpstream, way: str) -> None:
    for fields in (
        (JSON, (b"Content-Encoding", b"br")),
        (JSON, (b"Cache-Control", b"no-transform")),
        ((b"Content-Type", b"image/png"),),
    ):
        up.behave = reply(TEXT, headers=fields)
        answer, content = got(client, *WAYS[way])
        assert (content, answer.all("content-length")) == (TEXT, [b"%d" % len(TEXT)])
    for behave, varies in (
        (reply(TEXT, headers=(JSON,)), [b"Accept-Encoding"]),
        (reply(TEXT, headers=(JSON, (b"Vary", b"Origin"))), [b"Origin", b"Accept-Encoding"]),
        (in_chunks(TEXT[:100], TEXT[100:]), [b"Accept-Encoding"]),
        (in_chunks(TEXT, fields=b"Content-Type: text/css\r\nVary: accept-encoding\r\n"), [b"accept-encoding"]),
        (reply(TEXT, headers=((b"Content-Type", b"image/png"),)), []),
        (reply(b"short", headers=(JSON,)), []),
    ):
        up.behave = behave
        client.request("GET", "/api/x", WAYS[way])
        answer = client.answer()
        assert answer.body in (TEXT, b"short")
        assert (answer.is_complete, answer.all("vary"), answer.all("content-encoding")) == (True, varies, [])
        is_counted = answer.all("content-length") == [b"%d" % len(answer.body)]
        assert is_counted or answer.all("transfer-encoding") == [b"chunked"]


def test_a_304_confirms_the_response_that_was_compressed(client: RawClient, up: RawUpstream) -> None:
    for tag, confirmed in ((b'"x"', b'W/"x"'), (b'W/"x"', b'W/"x"')):
        up.behave = reply(b"", status=b"304 Not Modified", headers=((b"ETag", tag),))
        answer, _ = got(client, 'If-None-Match: W/"x"')
        assert (answer.status, answer.all("etag"), answer.all("vary")) == (304, [confirmed], [b"Accept-Encoding"])
        client.request("GET", "/api/x")  # accepts no coding
        assert client.answer().all("etag") == [tag]
    up.behave = reply(TEXT, headers=(JSON,))
    assert got(client)[1] == TEXT, "the connection is kept"


def test_a_head_request_gets_the_same_fields_and_no_body(client: RawClient, up: RawUpstream) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(TEXT))

    up.behave = behave
    answer, _ = got(client, method="HEAD")
    assert (answer.all("content-encoding"), answer.all("content-length")) == ([b"gzip"], [])
    up.behave = reply(TEXT, headers=(JSON,))
    assert got(client)[1] == TEXT


def test_an_event_reaches_the_client_before_the_stream_goes_on(client: RawClient, up: RawUpstream) -> None:
    wires: list[Wire] = []

    def behave(wire: Wire, _request: RawRequest) -> None:
        wires.append(wire)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        wire.send(b"9\r\ndata: 1\n\n\r\n")

    up.behave = behave
    client.request("GET", "/api/x", ("Accept-Encoding: gzip",))
    head = client.read_until(b"\r\n\r\n")
    assert head is not None
    assert b"content-encoding: gzip" in head
    reader, seen = zlib.decompressobj(31), b""
    while not seen:
        size = client.read_until(b"\r\n")
        assert size is not None
        seen += reader.decompress(client.read_exactly(int(size, 16)))
        client.read_exactly(2)
    assert seen == b"data: 1\n\n"
    wires[0].send(b"0\r\n\r\n")
    size = client.read_until(b"\r\n")
    assert size is not None
    reader.decompress(client.read_exactly(int(size, 16)))
    assert reader.eof
    assert client.read_until(b"0\r\n\r\n") is not None


def test_an_old_client_gets_the_compressed_content_until_the_end_of_the_connection(
    running: RunningGateway, up: RawUpstream, asgi_forwards: list[Any]
) -> None:
    up.behave = reply(TEXT, headers=(JSON,))
    with RawClient(running.port) as client:
        client.send(b"GET /api/x HTTP/1.0\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n")
        answer = client.answer()
    assert asgi_forwards
    assert zlib.decompress(answer.body, 31) == TEXT


def test_a_response_that_breaks_off_is_not_ended_as_if_it_were_complete(client: RawClient, up: RawUpstream) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100000\r\n\r\n" + TEXT)
        return False

    up.behave = behave
    client.request("GET", "/api/x", ("Accept-Encoding: gzip",))
    assert not client.answer().is_complete


@both_ways
def test_a_body_above_the_limit_of_its_route_is_refused(client: RawClient, up: RawUpstream, way: str) -> None:
    client.request("POST", "/api/small", ("Content-Length: 10", *WAYS[way]), b"0123456789")
    assert client.answer().status == 200
    client.request("POST", "/api/small", ("Transfer-Encoding: chunked", *WAYS[way]), b"a\r\n0123456789\r\n0\r\n\r\n")
    assert client.answer().status == 200
    client.request("POST", "/api/big", ("Content-Length: 11", *WAYS[way]), b"0123456789a")
    assert client.answer().status == 200
    seen = len(up.requests)
    client.request("POST", "/api/small", ("Content-Length: 11", *WAYS[way]), b"0123456789a")
    assert reason(client.answer()) == (413, "body_too_large")
    assert len(up.requests) == seen


def test_a_chunked_body_above_the_limit_of_its_route_is_refused(client: RawClient, up: RawUpstream) -> None:
    client.request("POST", "/api/small", ("Transfer-Encoding: chunked",), b"a\r\n0123456789\r\n1\r\na\r\n0\r\n\r\n")
    assert reason(client.answer()) == (413, "body_too_large")
    assert not any(request.is_complete for request in up.requests)


@both_ways
def test_a_static_response_has_a_body_except_to_head(client: RawClient, up: RawUpstream, way: str) -> None:
    for method, body in (("GET", b"ready"), ("HEAD", b""), ("GET", b"ready")):
        client.request(method, "/api/direct", WAYS[way])
        answer = client.answer(method)
        assert (answer.status, answer.body, answer.all("content-length")) == (200, body, [b"5"])
        assert answer.all("x-ratelimit-remaining")
    client.request("POST", "/api/direct", ("Transfer-Encoding: chunked", *WAYS[way]), b"3\r\nabc\r\n0\r\n\r\n")
    assert client.answer().body == b"ready"
    assert not up.requests


@both_ways
def test_fields_that_are_set_or_removed_come_by_no_other_way(client: RawClient, up: RawUpstream, way: str) -> None:
    """Neither as trailers, in either direction, nor in an interim response."""
    sent = []

    def behave(wire: Wire, _request: RawRequest) -> None:
        sent.append(wire.trailers)
        wire.send(b"HTTP/1.1 103 Early Hints\r\nX-Inner: 1\r\nLink: a\r\n\r\n")
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Inner: 2\r\nX-T: b\r\n\r\n")

    up.behave = behave
    fields = ("X-Client-ID: acme", "Transfer-Encoding: chunked", "TE: trailers", "Connection: TE", *WAYS[way])
    body = b"1\r\na\r\n0\r\nX-Caller: admin\r\nX_Caller: admin\r\nX-Sum: 5\r\n\r\n"
    for method, content in (("POST", body), ("GET", b"")):
        client.request(method, "/api/edited", fields if content else (*fields[:1], *fields[2:]), content)
        early = client.read_until(b"\r\n\r\n")
        assert early is not None
        assert b"Link: a" in early
        assert b"X-Inner" not in early
        assert client.answer(method).body == b"ok"
        assert client.trailers == [b"X-T: b"]
    assert sent[0] == [b"X-Sum: 5"]


@both_ways
def test_a_head_beyond_the_limits_of_its_route_is_refused_with_431(
    client: RawClient, up: RawUpstream, way: str
) -> None:
    up.behave = reply()
    own = 1 + len(WAYS[way])  # header lines besides those that follow
    few, many = [f"A{number}: 1" for number in range(5 - own)], [f"A{number}: 1" for number in range(6 - own)]
    for method, target, fields, status in (
        ("GET", "/api/head", few, 200),
        ("GET", "/api/head", many, 431),
        ("POST", "/api/head", [*many, "Content-Length: 0"], 431),
        ("GET", "/api/x", many, 200),
        ("GET", "/api/head?" + "q" * 150, [], 431),
        ("GET", "/api/x?" + "q" * 150, [], 200),
    ):
        client.request(method, target, (*WAYS[way], *fields))
        answer = client.answer(method)
        assert answer.status == status
        assert status == 200 or reason(answer) == (431, "headers_too_large")
    assert len(up.requests) == 3, "a refused request reaches no upstream, and the connection is kept"


def test_a_head_of_exactly_the_limit_passes(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply()
    plain = b"GET /api/head HTTP/1.1\r\nHost: gateway.test\r\nX-Fill: %b\r\n\r\n"
    fill = 150 - len(plain % b"")
    for more, status in ((0, 200), (1, 431)):
        client.send(plain % (b"x" * (fill + more)))
        assert client.answer().status == status


def test_a_response_later_than_its_route_permits_gets_504_and_others_may_take_longer(
    client: RawClient, up: RawUpstream
) -> None:
    refused = threading.Event()

    def late(wire: Wire, request: RawRequest) -> None:
        refused.wait(30)
        time.sleep(0.3)  # longer than the other route permits
        reply()(wire, request)

    up.behave = late
    assert reason(client.get("/api/quick")) == (504, "upstream_timeout")
    refused.set()
    assert client.get("/api/x").status == 200
