"""The limits of a request's head, in time and in size, with a raw client."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from api_gateway.downstream import closing
from api_gateway.downstream.closing import MAX_LINGERED
from api_gateway.downstream.connection_factory import ConnectionFactory
from tests.kit import (
    LIMITS,
    PATIENCE,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reply,
)

LIMIT = 2048
HEADER_TIMEOUT = 0.4
HOST = b"Host: gateway.test\r\n"
GET = b"GET /api/%b HTTP/1.1\r\n" + HOST + b"\r\n"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def aside() -> Iterator[RawUpstream]:
    """Run one for uploads that are broken off: the beginning of such a one may arrive as late as in the next test."""
    upstream = RawUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, aside: RawUpstream) -> dict[str, Any]:
    """Run a gateway with low limits."""
    server = {"header_timeout": HEADER_TIMEOUT, "max_header_bytes": LIMIT}
    sections = in_front_of(shared.url) | {"server": server}
    sections["upstreams"]["aside"] = {"targets": [{"url": aside.url}]}
    sections["routes"].append({"name": "aside", "path": "/api/aside", "upstream": "aside"})
    return sections


def is_problem(answer: RawAnswer, status: int, reason: bytes) -> bool:
    """Return whether it is that refusal, and closes the connection."""
    return (
        answer.status == status
        and answer.all("content-type") == [b"application/problem+json"]
        and b'"reason": "%b"' % reason in answer.body
        and answer.all("connection") == [b"close"]
    )


def paths(up: RawUpstream) -> list[bytes]:
    """Return the targets of what has reached the upstream, in order."""
    return [request.line.split(b" ")[1] for request in up.requests]


def test_a_head_that_does_not_end_in_time_is_answered_408(client: RawClient, up: RawUpstream) -> None:
    client.send(b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\n")
    begun = time.monotonic()
    assert is_problem(client.answer(), 408, b"request_timeout")
    assert 0.2 < time.monotonic() - begun < 3
    assert client.is_closed()
    assert up.requests == []


def test_a_trickle_does_not_extend_the_time(client: RawClient) -> None:
    client.send(b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\n")
    begun = time.monotonic()
    for _ in range(20):
        client.send(b"X-Slow: 1\r\n")
        if client.is_closed(within=0.05) or client.buffer:
            break
    assert is_problem(client.answer(), 408, b"request_timeout")
    assert time.monotonic() - begun < 3


def test_a_connection_that_says_nothing_is_closed_without_a_word(client: RawClient) -> None:
    assert client.is_closed(within=3)


def test_a_slow_head_within_the_time_is_served(client: RawClient) -> None:
    for byte in b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\n\r\n":
        client.send(bytes([byte]))
    assert client.answer().status == 200


def test_the_second_head_of_a_connection_is_bounded_too(client: RawClient) -> None:
    assert client.get().status == 200
    client.send(b"GET /api/x HTTP/1.1\r\n")
    assert is_problem(client.answer(), 408, b"request_timeout")


def test_an_upload_may_take_longer_than_a_head(client: RawClient) -> None:
    client.request("POST", "/api/x", ("Content-Length: 4",), b"ab")
    time.sleep(0.6)  # more than header_timeout
    client.send(b"cd")
    assert client.answer().status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\nX-Big: " + b"x" * LIMIT + b"\r\n\r\n",
        b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\nX-Endless: " + b"x" * 2 * LIMIT,
        b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\n" + b"X-Many: 1\r\n" * 400 + b"\r\n",
        b"GET /api/" + b"x" * LIMIT + b" HTTP/1.1\r\nHost: gateway.test\r\n\r\n",
    ],
    ids=["one big header", "one without end", "many headers", "a long path"],
)
def test_a_head_that_is_too_large_is_answered_431(client: RawClient, up: RawUpstream, head: bytes) -> None:
    client.send(head)
    assert is_problem(client.answer(), 431, b"headers_too_large")
    assert client.is_closed()
    assert up.requests == []


def test_a_large_head_within_the_limit_is_served(client: RawClient, up: RawUpstream) -> None:
    assert client.get(headers=("X-Big: " + "x" * (LIMIT - 200),)).status == 200
    assert len(up.requests[0].all("x-big")[0]) == LIMIT - 200


def test_what_follows_a_refused_request_is_not_served(
    running: RunningGateway, client: RawClient, up: RawUpstream
) -> None:
    big = b"GET /api/x HTTP/1.1\r\nHost: gateway.test\r\nX-Big: " + b"x" * LIMIT + b"\r\n\r\n"
    client.send(big + b"GET /api/hidden HTTP/1.1\r\nHost: gateway.test\r\n\r\n")
    assert is_problem(client.answer(), 431, b"headers_too_large")
    assert client.is_closed()
    with RawClient(running.port) as later:  # served after anything the refused connection could have started
        assert later.get("/api/later").status == 200
    assert [request.line for request in up.requests] == [b"GET /api/later HTTP/1.1"]


@pytest.mark.parametrize(
    "garbage", [b"garbage\r\n\r\n", b"GET /api/x HTTP/1.1\r\nHost : a\r\n\r\n", b"\x16\x03\x01\x02"]
)
def test_what_is_not_http_is_answered_400(client: RawClient, up: RawUpstream, garbage: bytes) -> None:
    client.send(garbage)
    assert is_problem(client.answer(), 400, b"bad_request")
    assert client.is_closed()
    assert up.requests == []


def test_pipelined_requests_are_answered_in_order(client: RawClient, up: RawUpstream) -> None:
    requests = b"".join(b"GET /api/%d HTTP/1.1\r\nHost: gateway.test\r\n\r\n" % number for number in range(5))
    client.send(requests)
    assert [client.answer().status for _ in range(5)] == [200] * 5
    assert [request.line.split()[1] for request in up.requests] == [b"/api/%d" % number for number in range(5)]


HALVES = {
    "counted": (b"Content-Length: 8\r\n\r\nhalf", b"half"),
    "chunked": (b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"4\r\nhalf\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("framing", HALVES)
def test_a_refusal_never_gets_into_a_response_in_progress(client: RawClient, up: RawUpstream, framing: str) -> None:
    """A malformed request behind one whose response is coming is refused behind that, or ends it without a word."""
    plain, arrived = up.behave, threading.Event()

    def half(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\n" + HALVES[framing][0])
        arrived.wait(PATIENCE)
        wire.send(HALVES[framing][1])

    up.behave = half
    try:
        client.request()
        assert client.read_until(b"half") is not None
        client.send(b"garbage\r\n\r\n")
        if framing == "chunked":
            assert client.is_closed() or client.buffer == b"\r\n"
        else:
            arrived.set()
            assert client.read_exactly(4) == b"half"
            assert client.answer().status == 400
            assert client.is_closed()
    finally:
        arrived.set()
        up.behave = plain


def test_a_connection_may_be_idle_between_requests(client: RawClient) -> None:
    """A head's time runs from its first byte."""
    for _ in range(2):
        assert client.get().status == 200
        time.sleep(HEADER_TIMEOUT * 1.3)
    client.send(b"GET /api/x HTTP/1.1\r\n")
    time.sleep(HEADER_TIMEOUT * 0.3)
    client.send(HOST + b"\r\n")
    assert client.answer().status == 200


def test_a_response_may_take_longer_than_a_head(client: RawClient, up: RawUpstream) -> None:
    def slowly(wire: Wire, request: RawRequest) -> None:
        time.sleep(HEADER_TIMEOUT * 1.3)
        reply()(wire, request)

    up.behave = slowly
    assert client.get().status == 200


def test_a_head_begun_in_one_segment_with_the_request_before_is_bounded_too(client: RawClient) -> None:
    client.send(GET % b"whole" + b"GET /api/begun HTTP/1.1\r\n")
    assert client.answer().status == 200
    client.sock.settimeout(HEADER_TIMEOUT + 1)
    assert is_problem(client.answer(), 408, b"request_timeout")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /api/x HTTP/1.1\r\n" + HOST + b"X-Big: " + b"x" * 4 * LIMIT + b"\r\n\r\n",
        b"GET /api/x HTTP/1.1\r\n" + HOST + b"x" * 4 * LIMIT + b": name\r\n\r\n",
        b"GET /api/x HTTP/1.1\r\n" + HOST + b"X-Many: 1\r\n" * LIMIT,
        b"GET /api/" + b"x" * 4 * LIMIT,
        b"POST /api/x HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nX: " + b"x" * LIMIT + b"\r\n\r\nok",
    ],
    ids=["one big header", "one big name", "headers without end", "a path without end", "one with a body"],
)
def test_a_head_is_bounded_in_however_many_pieces_it_comes(client: RawClient, up: RawUpstream, head: bytes) -> None:
    with suppress(ConnectionError):  # once refused, nothing more is read
        for start in range(0, len(head), 100):
            client.send(head[start : start + 100])
    assert is_problem(client.answer(), 431, b"headers_too_large")
    assert client.is_closed()
    assert up.requests == []


def test_every_head_of_a_connection_has_the_whole_limit(client: RawClient, up: RawUpstream) -> None:
    for _ in range(3):
        assert client.get(headers=("X-Big: " + "x" * (LIMIT - 200),)).status == 200
    assert len(up.requests) == 3


def test_a_body_does_not_count_as_head(client: RawClient, up: RawUpstream) -> None:
    body = bytes(8 * LIMIT)
    for _ in range(2):
        client.request("POST", "/api/x", (f"Content-Length: {len(body)}",), body)
        assert client.answer().status == 200
    assert [len(request.body) for request in up.requests] == [len(body)] * 2


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"0\r\nX: ", b"x" * 65_536),
        (b"0\r\n", b"X: y\r\n" * 10_000),
        (b"2;", b"x" * 65_536),
        (b"2\r\nok\r\n0;", b"x" * 65_536),
    ],
    ids=["a trailer", "trailers", "an extension", "an extension of the last chunk"],
)
def test_what_is_neither_head_nor_body_is_bounded_too(
    client: RawClient, monkeypatch: pytest.MonkeyPatch, beginning: bytes, more: bytes
) -> None:
    """Trailers and chunk extensions are thrown away, yet may not come without end: a parser holds what it reads.

    A piece follows when the gateway has read the one before, so that what is in the kernel's buffers does not count.
    """
    monkeypatch.setattr(closing, "LINGER_TIMEOUT", 0.5)  # after which the connection is closed
    client.request("POST", "/api/aside", ("Transfer-Encoding: chunked",), beginning)
    sent = 0
    with suppress(OSError):  # it is over
        while sent < 16 * MIB:
            client.send(more)
            sent += len(more)
            eventually(lambda: client.unread_by_peer() == 0, "what was sent is read")
    assert sent <= MAX_LINGERED + MIB


@pytest.mark.parametrize(
    "malformed",
    [
        b"garbage\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /api/x HTTP/9.9\r\n" + HOST + b"\r\n",
        b"GET /api/x HTTP/2.0\r\n" + HOST + b"\r\n",
        b"GET /api/x HTTP/0.9\r\n" + HOST + b"\r\n",
        b"GET /api/x\r\n",
        b"GET /api/x\r\n" + HOST + b"\r\n",
        b"VERSION-CONTROL /api/x\r\n" + HOST + b"\r\n",
        b"G@T /api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"M" * 65 + b" /api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"PRI /api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET * HTTP/1.1\r\n" + HOST + b"\r\n",
        b"VERSION-CONTROL * HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET ftp://h/api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET httpx://h/api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET file:///api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET api/x HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /api/x HTTP/1.1\r\n" + HOST + b"no colon\r\n\r\n",
        b"GET /api/x HTTP/1.1\r\n" + HOST + b": no name\r\n\r\n",
    ],
)
def test_what_follows_a_malformed_request_is_not_served(
    running: RunningGateway, client: RawClient, up: RawUpstream, malformed: bytes
) -> None:
    client.send(malformed + GET % b"hidden")
    assert is_problem(client.answer(), 400, b"bad_request")
    assert client.is_closed()
    with RawClient(running.port) as later:
        assert later.get("/api/later").status == 200
    assert paths(up) == [b"/api/later"]


def test_a_request_line_without_a_version_is_refused_at_once(client: RawClient) -> None:
    """A client of HTTP/0.9 sends nothing behind it, and would wait until the timeout of a head."""
    client.send(b"GET /api/x\r\n")
    assert is_problem(client.answer(), 400, b"bad_request")
    assert client.is_closed()


def test_a_refusal_is_whole(client: RawClient) -> None:
    client.send(b"garbage\r\n\r\n")
    answer = client.answer()
    assert answer.is_complete
    assert {"status": 400, "reason": "bad_request"}.items() <= json.loads(answer.body).items()


def test_empty_lines_before_a_request_are_skipped(client: RawClient) -> None:
    """RFC 9112 section 2.2."""
    client.send(b"\r\n\r\n" + GET % b"x")
    assert client.answer().status == 200


def test_a_pipelined_request_waits_for_the_response_before(client: RawClient, up: RawUpstream) -> None:
    """However long that takes, and whatever bodies stand between them."""

    def echo(wire: Wire, request: RawRequest) -> None:
        if b"/0" in request.line:
            time.sleep(0.1)
        reply(request.line.split(b" ")[1] + request.body)(wire, request)

    up.behave = echo
    post = b"POST /api/%d HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\nbody"
    client.send(post % 0 + GET % b"1" + post % 2 + GET % b"3")
    assert [client.answer().body for _ in range(4)] == [b"/api/0body", b"/api/1", b"/api/2body", b"/api/3"]
    assert paths(up) == [b"/api/%d" % number for number in range(4)]


def test_what_follows_connection_close_is_not_served(
    running: RunningGateway, client: RawClient, up: RawUpstream
) -> None:
    client.send(GET[:-2] % b"last" + b"Connection: close\r\n\r\n" + GET % b"hidden")
    assert client.answer().status == 200
    assert client.is_closed()
    with RawClient(running.port) as later:
        assert later.get("/api/later").status == 200
    assert paths(up) == [b"/api/last", b"/api/later"]


FOLLOWING = {
    "malformed": b"garbage\r\n\r\n",
    "too large": GET[:-2] % b"large" + b"X: " + b"x" * 2 * LIMIT + b"\r\n\r\n",
    "unfinished": b"GET /api/begun HTTP/1.1\r\n",
}


@pytest.mark.parametrize("following", FOLLOWING.values(), ids=FOLLOWING)
def test_what_is_read_as_a_body_is_what_the_upstream_sent(
    client: RawClient, up: RawUpstream, following: bytes
) -> None:
    """Whatever the client sends behind its request while the response is under way."""
    gate = threading.Event()
    half = b"x" * 100

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + half)
        gate.wait(PATIENCE)
        wire.send(half)

    up.behave = behave
    client.request()
    assert client.read_until(b"\r\n\r\n") is not None
    assert client.read_exactly(100) == half
    client.send(following)
    time.sleep(HEADER_TIMEOUT * 1.3)
    gate.set()
    assert half.startswith(client.read_exactly(100))


@pytest.mark.parametrize("following", FOLLOWING.values(), ids=FOLLOWING)
def test_a_refusal_is_never_mistaken_for_the_response_before(
    client: RawClient, up: RawUpstream, following: bytes
) -> None:
    """The first response a client reads is the one to its first request, or there is none."""

    def slowly(wire: Wire, request: RawRequest) -> None:
        time.sleep(HEADER_TIMEOUT * 1.3)
        reply()(wire, request)

    up.behave = slowly
    client.send(GET % b"slow" + following)
    assert client.read_until(b"\r\n") in (None, b"HTTP/1.1 200 OK\r\n")


def test_disconnecting_with_requests_in_the_pipeline_closes_the_upstream_connection(
    running: RunningGateway, up: RawUpstream
) -> None:
    """The client leaves the request that is being served as well as those that wait, and these are never sent."""
    left = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool:
        if wire.is_closed(within=2):
            left.set()
        return False

    up.behave = behave
    up.requests.clear()
    with RawClient(running.port) as client:
        client.send(GET % b"first" + GET % b"second")
        eventually(lambda: len(up.requests) == 1, "the first request is with the upstream")
    assert left.wait(1)
    assert paths(up) == [b"/api/first"]


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "x"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_under_an_upgrade_stays_a_body(
    running: RunningGateway, client: RawClient, up: RawUpstream, method: str, upgrade: str, framing: str
) -> None:
    """The parser takes it for the other protocol; read as requests, it would smuggle them (CWE-444)."""
    body = b"GET /api/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
    framed = body if framing == "length" else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    header = f"Content-Length: {len(body)}" if framing == "length" else "Transfer-Encoding: chunked"
    client.request(method, "/api/first", ("Connection: Upgrade", f"Upgrade: {upgrade}", header), framed)
    assert client.answer().status == 200
    assert client.get("/api/second").status == 200
    with RawClient(running.port) as other:
        assert other.get("/api/third").status == 200
    assert paths(up) == [b"/api/first", b"/api/second", b"/api/third"]
    assert up.requests[0].body == body
    assert up.requests[0].all("upgrade") == []


def test_many_requests_that_ask_for_an_upgrade_are_served_one_after_the_other(client: RawClient) -> None:
    request = b"GET /api/x HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n"
    sender = threading.Thread(target=client.send, args=(request * 1000,))
    sender.start()
    assert [client.answer().status for _ in range(1000)] == [200] * 1000
    sender.join()


def test_what_follows_a_refused_handshake_keeps_its_order(client: RawClient, up: RawUpstream) -> None:
    """However it is cut, and whatever comes while the refusal is on its way."""
    up.behave = lambda wire, request: reply(request.line.split(b" ")[1])(wire, request)
    handshake = b"GET /api/ws HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    later = b"".join(GET % b"%d" % number for number in range(40))
    client.send(handshake + later[:500])
    assert client.answer().body == b"/api/ws"
    for start in range(500, len(later), 333):
        client.send(later[start : start + 333])
    assert [client.answer().body for _ in range(40)] == [b"/api/%d" % number for number in range(40)]


def test_a_handshake_waits_for_the_responses_before_it(client: RawClient, up: RawUpstream) -> None:
    def behave(wire: Wire, request: RawRequest) -> None:
        time.sleep(0.1)
        if b"/ws" in request.line:
            wire.send(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            wire.send(wire.read_exactly(5))
        else:
            reply()(wire, request)

    up.behave = behave
    handshake = b"GET /api/ws HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    client.send(GET % b"first" + handshake + b"early")
    assert client.answer().status == 200
    assert client.read_until(b"\r\n") == b"HTTP/1.1 101 Go\r\n"
    assert client.read_until(b"early") is not None


def test_a_long_pipeline_makes_its_client_wait(client: RawClient, aside: RawUpstream) -> None:
    """What was sent ahead is not held here: the client's own buffers fill up."""
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        gate.wait(PATIENCE)
        reply()(wire, request)

    aside.behave = behave
    client.sock.settimeout(1)
    sent = 0
    try:
        with suppress(TimeoutError):
            while sent < 64 * MIB:
                sent += client.sock.send(GET % b"aside" * 1000)
    finally:
        gate.set()
    assert sent < 32 * MIB


@pytest.mark.parametrize("target", ["/api/x#fragment", "gateway.test/api/x", "http:///api/x"])
def test_a_target_that_is_none_is_refused(client: RawClient, up: RawUpstream, target: str) -> None:
    client.request("GET", target)
    assert is_problem(client.answer(), 400, b"bad_request")
    assert up.requests == []


@pytest.mark.parametrize(
    ("target", "arrives", "host"),
    [("http://a?api", b"/?api", b"a"), ("http://[::1]:8000/api/x", b"/api/x", b"[::1]:8000")],
)
def test_an_absolute_target_is_taken_apart(
    client: RawClient, up: RawUpstream, target: str, arrives: bytes, host: bytes
) -> None:
    client.request("GET", target)
    answer = client.answer()
    if arrives.startswith(b"/api"):
        assert up.requests[0].line.split(b" ")[1] == arrives
        assert up.requests[0].all("x-forwarded-host") == [host]
    else:
        assert up.requests == []
        assert b"<title>" in answer.body, "it is the page at /"


def test_the_limits_are_those_given() -> None:
    bounds = replace(LIMITS, header_bytes=10, header_timeout=0.5)
    assert ConnectionFactory(bounds, Counter()).limits is bounds


def test_chunk_extensions_are_bounded(client: RawClient, up: RawUpstream) -> None:
    """Each is short, but there is no end of them; the framing of small chunks without extensions is no excess."""
    chunked = ("Transfer-Encoding: chunked",)
    client.request("POST", "/api/small", chunked, b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
    assert client.answer().status == 200
    client.request("POST", "/api/large", chunked, b"1000;a=b\r\n" + b"x" * 4096 + b"\r\n0\r\n\r\n")
    assert client.answer().status == 200
    client.request("POST", "/api/long", chunked)
    with suppress(OSError):  # refused meanwhile
        for _ in range(3 * LIMIT // 500):
            client.send(b"1;" + b"a" * 500 + b"\r\nx\r\n")
    assert is_problem(client.answer(), 400, b"bad_request")
    assert client.is_closed()


def parsed_heads(running: RunningGateway) -> float:
    """Return how many heads the general parser has read."""
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    found = re.search(r'^gateway_http_parsed_heads_total{parser="general"} ([0-9.]+)$', text, re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def test_which_parser_read_a_head_is_a_metric(running: RunningGateway) -> None:
    """It is all that differs: the response is the same."""
    before = parsed_heads(running)  # the first scrape may take longer than a client has for its head
    with RawClient(running.port) as client:
        plain, unusual = client.get(headers=("X: 1",)), client.get(headers=("X:1",))
    assert (plain.status, plain.body) == (unusual.status, unusual.body)
    assert parsed_heads(running) - before == 2  # the unusual one, and that for the metrics
