"""What a connection may ask for: lines, time, company. And what travels beside head and body: trailers, dates."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.kit import (
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reply,
    running_gateway,
)

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def up() -> Iterator[RawUpstream]:
    """Run an upstream that answers everything."""
    upstream = RawUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def running(up: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway with narrow bounds."""
    server = {"max_header_lines": 20, "max_connections_per_peer": 4, "idle_timeout": 0.5, "max_body_bytes": 4 * MIB}
    sections = in_front_of(up.url, timeouts={"response": 1}) | {"server": server}
    with running_gateway(sections, tmp_path_factory.mktemp("state")) as gateway:
        yield gateway


@pytest.fixture
def client(running: RunningGateway, up: RawUpstream) -> Iterator[RawClient]:
    """Connect to it, once nobody else is connected."""
    eventually(lambda: not running.server.server_state.connections, "the connections before are gone")
    up.behave, up.reads_body = reply(), True
    up.requests.clear()
    with RawClient(running.port) as client:
        yield client


def rejections(running: RunningGateway, reason: str) -> int:
    """Return how often the gateway has refused for this reason, as the metrics tell it."""
    count: int = json.loads(ask(f"{running.url}/metrics").body)["rejections"].get(reason, 0)
    return count


# Bounds


def test_too_many_header_lines_are_refused_and_counted(running: RunningGateway, client: RawClient) -> None:
    before = rejections(running, "headers_too_large")
    answer = client.get(headers=tuple(f"X-{number}: 1" for number in range(20)))
    assert (answer.status, json.loads(answer.body)["reason"]) == (431, "headers_too_large")
    assert rejections(running, "headers_too_large") == before + 1


def test_as_many_header_lines_as_are_allowed_pass(client: RawClient) -> None:
    assert client.get(headers=tuple(f"X-{number}: 1" for number in range(19))).status == 200


def test_an_address_has_so_many_connections_and_gets_them_back(running: RunningGateway, client: RawClient) -> None:
    with ExitStack() as stack:
        others = [stack.enter_context(RawClient(running.port)) for _ in range(3)]
        assert [other.get().status for other in (client, *others)] == [200] * 4
        surplus = stack.enter_context(RawClient(running.port))
        answer = surplus.get()
        assert (answer.status, json.loads(answer.body)["reason"]) == (503, "overloaded")
        assert answer.all("retry-after") == [b"1"]
    eventually(lambda: len(running.server.server_state.connections) <= 1, "they are gone")
    with RawClient(running.port) as later:
        assert later.get().status == 200


def test_a_body_that_stalls_is_answered_408(client: RawClient) -> None:
    client.request("POST", "/api/x", ("Content-Length: 4",), b"ab")
    answer = client.answer()
    assert (answer.status, json.loads(answer.body)["reason"]) == (408, "request_timeout")


def test_a_client_that_stops_reading_is_cut(running: RunningGateway, client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(bytes(64 * MIB))
    client.request()
    eventually(lambda: running.console.recorder.in_flight == 0, "the exchange ends", within=5)


def test_a_slow_but_steady_reader_is_not_cut(client: RawClient, up: RawUpstream) -> None:
    size = 12 * MIB
    up.behave = reply(bytes(size))
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    client.request()
    got, end = 0, time.monotonic() + 20
    while got < size and time.monotonic() < end:
        piece = client.sock.recv(MIB)
        if not piece:
            break
        got += len(piece)
        time.sleep(0.01)
    assert got >= size


@pytest.mark.parametrize("framing", ["Content-Length: 33554432", "Transfer-Encoding: chunked"])
def test_a_client_that_is_still_sending_reads_why_it_is_refused(client: RawClient, framing: str) -> None:
    chunk = b"%x\r\n%b\r\n" % (MIB, bytes(MIB)) if "chunked" in framing else bytes(MIB)
    client.request("POST", "/api/x", (framing,))
    for _ in range(5):
        client.send(chunk)
    answer = client.answer()
    assert answer.is_complete
    assert (answer.status, json.loads(answer.body)["reason"]) == (413, "body_too_large")


def test_an_upload_that_was_asked_for_may_take_longer_than_an_answer(client: RawClient, up: RawUpstream) -> None:
    up.reads_body = False

    def asks(wire: Wire, request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.body = wire.read_exactly(8)
        reply()(wire, request)

    up.behave = asks
    client.request("POST", "/api/x", ("Content-Length: 8", "Expect: 100-continue"))
    assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\nvia: 1.1 api-gateway\r\n\r\n"
    for _ in range(8):
        client.send(b"x")
        time.sleep(0.2)
    assert client.answer().status == 200


# Beside head and body


def test_trailers_reach_the_upstream_as_trailers_but_for_those_that_must_not(
    client: RawClient, up: RawUpstream
) -> None:
    up.reads_body, seen = False, []

    def behave(wire: Wire, request: RawRequest) -> None:
        assert wire.read_until(b"0\r\n") is not None
        seen.append(wire.read_until(b"\r\n\r\n"))
        reply()(wire, request)

    up.behave = behave
    forged = b"".join(
        b"%b: forged\r\n" % name
        for name in (b"X-Forwarded-For", b"X-Client-ID", b"x_client_id", b"Host", b"Authorization", b"Via", b"TE")
    )
    client.request("POST", "/api/x", ("Transfer-Encoding: chunked", "X-Client-ID: acme"))
    client.send(b"2\r\nok\r\n0\r\nX-CheckSum: 7\r\n" + forged + b"\r\n")
    assert client.answer().status == 200
    assert seen == [b"X-CheckSum: 7\r\n\r\n"]
    assert up.requests[0].all("x-checksum") == []
    assert up.requests[0].all("x-client-id") == [b"acme"]


@pytest.mark.parametrize(("headers", "passed"), [(("TE: trailers",), b"X-Sum: 7\r\n"), ((), b"")])
def test_trailers_of_an_answer_reach_who_asked_for_them(
    client: RawClient, up: RawUpstream, headers: tuple[str, ...], passed: bytes
) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
        wire.send(b"0\r\nX-Sum: 7\r\nSet-Cookie: a=1\r\n\r\n")

    up.behave = behave
    client.request("GET", "/api/x", headers)
    assert client.read_until(b"\r\n\r\n") is not None
    assert client.read_until(b"0\r\n") is not None
    rest = passed + b"\r\n"
    assert client.read_exactly(len(rest)) == rest


def test_names_keep_their_spelling_and_phrases_their_words(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(status=b"207 So And So", headers=((b"X-mIxEd", b"1"), (b"DATE", b"d"), (b"sErVeR", b"s")))
    answer = client.get(headers=("x-RAW-Name: 1",))
    assert b"\r\nx-RAW-Name: 1\r\n" in up.requests[0].head
    assert answer.head.startswith(b"HTTP/1.1 207 So And So\r\n")
    assert [name for name, _ in answer.headers][:3] == [b"X-mIxEd", b"DATE", b"sErVeR"]
    assert (len(answer.all("date")), len(answer.all("server"))) == (1, 1)


def test_a_date_is_added_where_none_comes(client: RawClient) -> None:
    assert [value[-3:] for value in client.get().all("date")] == [b"GMT"]


@pytest.mark.parametrize(
    ("target", "arrives"), [("/api/x?", b"/api/x?"), ("/api?", b"/api?"), ("/api/?a??b", b"/api/?a??b")]
)
def test_question_marks_stay(client: RawClient, up: RawUpstream, target: str, arrives: bytes) -> None:
    client.get(target)
    assert up.requests[0].line == b"GET %b HTTP/1.1" % arrives


def test_max_forwards_is_counted_down_and_ends_here(client: RawClient, up: RawUpstream) -> None:
    """RFC 9110 section 7.6.2; for OPTIONS alone."""
    client.request("OPTIONS", "/api/x", ("Max-Forwards: 0",))
    answer = client.answer()
    assert (answer.status, len(answer.all("allow"))) == (204, 1)
    assert up.requests == []
    client.request("OPTIONS", "/api/x", ("Max-Forwards: 5",))
    assert client.answer().status == 200
    client.request("GET", "/api/x", ("Max-Forwards: 0",))
    assert client.answer().status == 200
    assert [request.all("max-forwards") for request in up.requests] == [[b"4"], [b"0"]]


@pytest.mark.parametrize(("status", "lengths"), [(b"304 Not Modified", [b"5"]), (b"204 No Content", [])])
def test_an_answer_without_a_body_keeps_the_length_it_may_tell(
    client: RawClient, up: RawUpstream, status: bytes, lengths: list[bytes]
) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 %b\r\nContent-Length: 5\r\n\r\n" % status)

    up.behave = behave
    for _ in range(2):
        assert client.get().all("content-length") == lengths
