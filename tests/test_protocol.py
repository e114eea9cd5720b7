"""The bounds on a request's head, in time and in size, with a raw client."""

import threading
import time
from collections.abc import Iterator

import pytest

from api_gateway.protocol import bounded_protocol
from tests.kit import (
    PATIENCE,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    in_front_of,
    running_gateway,
)

LIMIT = 2048


@pytest.fixture(scope="module")
def up() -> Iterator[RawUpstream]:
    """Run an upstream that answers everything."""
    upstream = RawUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def running(up: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway with narrow bounds."""
    server = {"header_timeout": 0.4, "max_header_bytes": LIMIT}
    sections = in_front_of(up.url) | {"server": server}
    with running_gateway(sections, tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


@pytest.fixture
def client(running: RunningGateway, up: RawUpstream) -> Iterator[RawClient]:
    """Connect to it."""
    up.requests.clear()
    with RawClient(running.port) as client:
        yield client


def is_problem(answer: RawAnswer, status: int, reason: bytes) -> bool:
    """Tell whether it is that refusal, and closes the connection."""
    return (
        answer.status == status
        and answer.all("content-type") == [b"application/problem+json"]
        and b'"reason": "%b"' % reason in answer.body
        and answer.all("connection") == [b"close"]
    )


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


def test_a_large_head_within_the_bound_is_served(client: RawClient, up: RawUpstream) -> None:
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


def test_a_refusal_never_gets_into_an_answer_under_way(client: RawClient, up: RawUpstream) -> None:
    """A malformed request behind one whose answer is still coming ends the connection without a word."""
    plain, arrived = up.behave, threading.Event()

    def half(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        arrived.wait(PATIENCE)
        wire.send(b"half")

    up.behave = half
    try:
        client.request()
        assert client.read_until(b"half") is not None
        client.send(b"garbage\r\n\r\n")
        assert client.is_closed()
    finally:
        arrived.set()
        up.behave = plain


def test_the_bounds_are_those_asked_for() -> None:
    protocol = bounded_protocol(10, 0.5)
    assert (protocol.max_header_bytes, protocol.header_timeout) == (10, 0.5)
