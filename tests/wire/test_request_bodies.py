"""Request bodies that arrive in several reads, by their length or in chunks, are forwarded alike, and bounded."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.kit import (
    PATIENCE,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reason,
    reply,
)

StartGateway = Callable[..., RunningGateway]
StartUpstream = Callable[..., RawUpstream]

ODD = "X-Odd:  two blanks"  # which the general parser reads
CHUNKED = "Transfer-Encoding: chunked"
WAYS = pytest.mark.parametrize("headers", [(), (ODD,)], ids=["fast path", "general parser"])
ALL_WAYS = pytest.mark.parametrize("headers", [(), (ODD,), (CHUNKED,)], ids=["fast path", "general parser", "chunked"])
KEPT = 50_000  # bytes that are kept for another attempt


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    return in_front_of(
        shared.url,
        timeouts={"response": 5, "idle": 5},
        circuit_breaker={"minimum_calls": 1000},
        retry={"budget": 1, "min_retries_per_second": 100, "max_body_bytes": KEPT},
    ) | {"server": {"max_body_bytes": 8_000_000}}


def body_of(size: int) -> bytes:
    """Return a body in which a lost or repeated piece shows."""
    return b"".join(b"%08d" % number for number in range(size // 8 + 1))[:size]


class Sender:
    """Sends the pieces of a body, in chunks if it has no length."""

    def __init__(self, client: RawClient, size: int, *, is_chunked: bool) -> None:
        self._client = client
        self._left = size
        self._is_chunked = is_chunked

    def __call__(self, piece: bytes, behind: bytes = b"") -> None:
        """Send a piece, and `behind` in one segment with it."""
        self._left -= len(piece)
        if self._is_chunked:
            piece = b"%x;a=b\r\n%b\r\n" % (len(piece), piece)
            if not self._left:
                piece += b"0\r\nX-Trailer: 1\r\n\r\n"
        self._client.send(piece + behind)


def begin(client: RawClient, size: int, headers: tuple[str, ...], method: str = "PUT") -> Sender:
    """Send a head; return what sends its body."""
    is_chunked = CHUNKED in headers
    client.request(method, headers=headers if is_chunked else (f"Content-Length: {size}", *headers))
    return Sender(client, size, is_chunked=is_chunked)


def has_requests(up: RawUpstream, count: int) -> bool:
    return len(up.requests) == count


def has_body(up: RawUpstream, size: int) -> bool:
    return len(up.requests[-1].body) == size


@WAYS
def test_the_request_behind_a_chunk_whose_size_begins_with_zeros_is_a_request(
    client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """Also if the content, read from an earlier position, looks like the size of another chunk."""
    content = b"abcFFFFFFF\r\nabcd"
    client.request("PUT", headers=(CHUNKED, *headers))
    client.send(
        b"%017x\r\n%b\r\n" % (len(content), content) + b"0" * 20 + b"\r\n\r\nGET /api/y HTTP/1.1\r\nHost: a\r\n\r\n"
    )
    assert [client.answer().body for _ in range(2)] == [b"ok", b"ok"]
    assert [request.body for request in up.requests] == [content, b""]


def is_calm(running: RunningGateway) -> bool:
    targets = running.live.upstreams["up"].targets
    return running.live.recorder.in_flight == 0 and all(target.in_flight == 0 for target in targets)


@ALL_WAYS
@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 5_000, 300_000])
def test_a_body_arrives_unchanged_and_the_connections_are_kept(
    client: RawClient, up: RawUpstream, fast_path_spy: list[bool], headers: tuple[str, ...], size: int, pieces: int
) -> None:
    """Head and body in separate segments; the next request comes in one segment with the end of the body."""
    body, step = body_of(size), size // pieces + 1
    for number in range(2):
        send = begin(client, size, headers)
        for start in range(0, size, step):
            eventually(partial(has_requests, up, 2 * number + 1), "the head has arrived")
            send(
                body[start : start + step],
                b"" if start + step < size else b"VERSION-CONTROL /api/y HTTP/1.1\r\nHost: a\r\n\r\n",
            )
        assert [client.answer().body for _ in range(2)] == [b"ok", b"ok"]
    assert [request.body for request in up.requests] == [body, b""] * 2
    assert len({id(wire) for wire in up.wires}) == len(up.wires)
    assert [one.line.split(b" ")[0] for one in up.requests] == [b"PUT", b"VERSION-CONTROL"] * 2
    if not headers:
        assert fast_path_spy[0], "the fast path has taken the request with an incomplete body"


@WAYS
def test_a_body_is_replayed_from_its_kept_beginning_and_continued(
    running: RunningGateway, client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """The first attempt fails within the body; the second gets the kept part, then what the client sends."""
    up.reads_body = False
    body = body_of(20_000)
    attempts: list[bytes] = []

    def behave(wire: Wire, request: RawRequest) -> bool:
        if not attempts:
            attempts.append(wire.read_exactly(8_000))
            return False
        request.body, request.is_complete = wire.read_body(request.headers)
        attempts.append(request.body)
        return reply()(wire, request) is not False

    up.behave = behave
    send = begin(client, len(body), headers)
    send(body[:8_000])
    eventually(lambda: len(up.requests) == 2, "there is another attempt")
    send(body[8_000:])
    assert client.answer().status == 200
    assert attempts == [body[:8_000], body]
    eventually(lambda: is_calm(running), "nothing is held")


@WAYS
def test_a_body_of_which_a_part_was_not_kept_is_not_replayed(
    running: RunningGateway, client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    up.reads_body = False
    body = body_of(4 * KEPT)

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.read_exactly(2 * KEPT)
        return False

    up.behave = behave
    send = begin(client, len(body), headers)
    send(body[: 2 * KEPT])
    assert reason(client.answer()) == (502, "upstream_reset")
    assert len(up.requests) == 1
    send(body[2 * KEPT :])  # which is discarded, so that the connection serves the next request
    up.reads_body, up.behave = True, reply()
    assert client.get().status == 200
    eventually(lambda: is_calm(running), "nothing is held")


@ALL_WAYS
def test_reading_pauses_while_the_upstream_connection_is_awaited(
    gateway: StartGateway, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """Until then, no more is taken from the client than the kernel and one limit hold."""
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        gate.wait(PATIENCE)
        reply()(wire, request)

    up.behave = behave
    running = gateway(in_front_of(up.url, pool={"max_connections": 1}, timeouts={"connect": PATIENCE}))
    with RawClient(running.port) as first, RawClient(running.port) as client:
        first.request()
        eventually(lambda: len(up.requests) == 1, "it occupies the only connection")
        body = body_of(4_000_000)
        send = begin(client, len(body), headers)
        sender = threading.Thread(target=send, args=(body,), daemon=True)
        sender.start()
        connections: Any = running.server.server_state.connections
        eventually(lambda: any(one.is_read_paused for one in list(connections)), "the gateway reads no more")
        gate.set()
        assert first.answer().status == 200
        assert client.answer().status == 200
        sender.join(PATIENCE)
    assert up.requests[-1].body == body


@ALL_WAYS
def test_an_early_response_leaves_both_connections_usable(
    running: RunningGateway, client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """The upstream responds to the head alone; the rest of the body still goes to it, and the next request follows."""
    up.reads_body = False
    body = body_of(100_000)

    def behave(wire: Wire, request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")
        request.body, request.is_complete = wire.read_body(request.headers)

    up.behave = behave
    wires = len(up.wires)
    for _ in range(3):
        send = begin(client, len(body), headers)
        send(body[:1_000])
        answer = client.answer()
        assert (answer.status, answer.body) == (401, b"no")
        send(body[1_000:])
        eventually(partial(has_body, up, len(body)), "the rest has arrived")
    assert [request.body for request in up.requests] == [body] * 3
    assert len(up.wires) - wires <= 1
    eventually(lambda: is_calm(running), "nothing is held")


@ALL_WAYS
def test_a_client_that_leaves_within_its_body_ends_the_attempt(
    running: RunningGateway, client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    up.reads_body = False
    gone = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.read_until(b"never sent")
        gone.set()
        return False

    up.behave = behave
    send = begin(client, 1_000, headers)
    send(b"x" * 10)
    eventually(lambda: len(up.requests) == 1, "it is with the upstream")
    client.close()
    assert gone.wait(PATIENCE), "the upstream's connection is closed"
    eventually(lambda: is_calm(running), "nothing is held")
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0


@ALL_WAYS
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_stops_sending_is_refused_or_cut_off(
    gateway: StartGateway, up: RawUpstream, headers: tuple[str, ...], *, begun: bool
) -> None:
    up.reads_body = False
    running = gateway(in_front_of(up.url) | {"server": {"idle_timeout": 0.4}})

    def behave(wire: Wire, _request: RawRequest) -> bool:
        if begun:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        wire.read_until(b"never sent")
        return False

    up.behave = behave
    with RawClient(running.port) as client:
        send = begin(client, 1_000, headers)
        send(b"x" * 10)
        if begun:
            answer = client.answer()
            assert (answer.status, answer.is_complete) == (200, False)
        else:
            answer = client.answer()
            assert (answer.status, answer.all("connection")) == (408, [b"close"])
        assert client.is_closed()
    eventually(lambda: is_calm(running), "nothing is held")


@ALL_WAYS
def test_a_refused_request_leaves_its_connection_usable(
    gateway: StartGateway, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """The body of a request over the limit is discarded."""
    sections = in_front_of(up.url) | {"tiers": {"FREE": {"rate": 0.001, "capacity": 1}}}
    running = gateway(sections)
    with RawClient(running.port) as client:
        assert client.get().status == 200
        for _ in range(2):
            send = begin(client, 1_000, headers)
            assert client.answer().status == 429
            send(b"x" * 1_000)
    assert len(up.requests) == 1
    eventually(lambda: is_calm(running), "nothing is held")


@ALL_WAYS
def test_a_fallback_gets_the_body_from_its_start(
    gateway: StartGateway, upstream: StartUpstream, asgi_forwards: list[Any], headers: tuple[str, ...]
) -> None:
    """The upstream fails within the body; the other one gets the kept part and what follows."""
    body = body_of(20_000)

    def fail(wire: Wire, _request: RawRequest) -> bool:
        wire.read_exactly(8_000)
        return False

    failing, other = upstream(fail, reads_body=False), upstream(reply(b"other"))
    sections = in_front_of(failing.url)
    sections["upstreams"]["other"] = {"targets": [{"url": other.url}]}
    sections["routes"][0]["fallback"] = {"upstream": "other"}
    running = gateway(sections)
    with RawClient(running.port) as client:
        send = begin(client, len(body), headers)
        send(body[:8_000])
        eventually(lambda: len(other.requests) == 1, "the fallback is asked")
        send(body[8_000:])
        answer = client.answer()
        assert (answer.status, answer.body) == (200, b"other")
        assert client.get("/health").status in (200, 401, 503)
    assert other.requests[0].body == body
    assert not asgi_forwards
    eventually(lambda: is_calm(running), "nothing is held")


@ALL_WAYS
def test_a_deadline_passes_within_a_body(gateway: StartGateway, up: RawUpstream, headers: tuple[str, ...]) -> None:
    """The upstream is not blamed for the client's slowness, and the connection serves the next request."""
    up.reads_body = False
    up.behave = lambda wire, _request: wire.read_until(b"never sent") is not None
    sections = in_front_of(up.url)
    sections["routes"][0]["timeout"] = 0.5
    running = gateway(sections)
    with RawClient(running.port) as client:
        send = begin(client, 1_000, headers)
        send(b"x" * 10)
        assert reason(client.answer()) == (504, "upstream_timeout")
        send(b"x" * 990)
        up.reads_body, up.behave = True, reply()
        assert client.get().status == 200
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0
    eventually(lambda: is_calm(running), "nothing is held")


@ALL_WAYS
def test_a_drain_completes_a_request_whose_body_is_arriving(
    gateway: StartGateway, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    running = gateway(in_front_of(up.url))
    with RawClient(running.port) as client:
        send = begin(client, 1_000, headers)
        send(b"x" * 10)
        eventually(lambda: len(up.requests) == 1, "it is with the upstream")
        running.server.should_exit = True
        time.sleep(0.1)
        send(b"x" * 990)
        answer = client.answer()
        assert (answer.status, answer.all("connection")) == (200, [b"close"])
        assert client.is_closed()


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@ALL_WAYS
def test_the_upstream_is_asked_for_its_continue_once(
    running: RunningGateway, client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """The expectation goes upstream while the client waits, and not with the body to another attempt."""
    up.reads_body = False
    body = body_of(5_000)

    def behave(wire: Wire, request: RawRequest) -> bool:
        if len(up.requests) == 1:
            wire.send(CONTINUE)
            wire.read_exactly(1_000)
            return False
        request.body, request.is_complete = wire.read_body(request.headers)
        return reply()(wire, request) is not False

    up.behave = behave
    send = begin(client, len(body), ("Expect: 100-continue", *headers))
    interim = client.read_until(b"\r\n\r\n")
    assert interim is not None
    assert interim.startswith(b"HTTP/1.1 100 ")
    send(body)
    assert client.answer().status == 200
    assert up.requests[1].body == body
    assert up.requests[0].all("expect") == [b"100-continue"]
    if not headers:
        assert up.requests[1].all("expect") == []
    eventually(lambda: is_calm(running), "nothing is held")


EXPECTING = b"PUT /api/x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"


@pytest.mark.parametrize("before", [b"", b"GET /api/first HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["alone", "pipelined"])
@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"3\r\ndef\r\n0\r\n\r\n"),
        (b"Transfer-Encoding: chunked\r\n\r\n6\r\n", b"abcdef\r\n0\r\n\r\n"),
        (b"Content-Length: 6\r\n\r\nabc", b"def"),
        (b"X-General:  1\r\nContent-Length: 6\r\n\r\na", b"bcdef"),
    ],
    ids=["chunk", "size of a chunk", "part", "general parser"],
)
def test_no_expectation_goes_upstream_with_a_body_that_has_begun(
    client: RawClient, up: RawUpstream, before: bytes, first: bytes, rest: bytes
) -> None:
    """The client does not wait, so an upstream that sent 100 (Continue) would delay the body for nothing."""
    client.send(before + EXPECTING + first)
    if before:
        assert client.answer().status == 200
    client.send(rest)
    assert client.answer().status == 200
    assert (up.requests[-1].body, up.requests[-1].all("expect")) == (b"abcdef", [])


@ALL_WAYS
def test_a_body_that_is_not_asked_for_costs_the_connection(
    running: RunningGateway, client: RawClient, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    """The client may send it or not, so nothing that follows can be understood."""
    up.reads_body, up.behave = False, reply(b"no", b"417 Expectation Failed")
    begin(client, 5_000, ("Expect: 100-continue", *headers))
    answer = client.answer()
    assert (answer.status, answer.all("connection")) == (417, [b"close"])
    assert client.is_closed()
    eventually(lambda: is_calm(running), "nothing is held")


def test_a_late_continue_is_passed_on(client: RawClient, up: RawUpstream) -> None:
    """The body is complete, and came in another segment than the head."""
    up.behave = lambda wire, _request: wire.send(CONTINUE + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    send = begin(client, 10, ())
    eventually(lambda: len(up.requests) == 1, "the head has arrived")
    send(b"x" * 10)
    interim = client.read_until(b"\r\n\r\n")
    assert interim is not None
    assert interim.startswith(b"HTTP/1.1 100 ")
    assert client.answer().body == b"ok"


CHUNKS = (
    (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
    (b"0\r\n\r\n", b""),
    (b"0003 \r\n", None),
    (b"1;x=y\r\na\r\n2\r\nbc\r\n000\r\nX-One: 1\r\nX-Client-ID: b\r\nx-two:2\r\n\r\n", b"abc"),
)


@pytest.mark.parametrize(("chunks", "content"), CHUNKS)
@pytest.mark.parametrize("step", [1, 5, 1_000])
def test_chunks_in_any_form_and_segments_are_read(
    client: RawClient,
    up: RawUpstream,
    asgi_forwards: list[Any],
    chunks: bytes,
    content: bytes | None,
    step: int,
) -> None:
    """What follows the body belongs to the next request, whatever its method."""
    up.behave = reply()
    client.request("LABEL", headers=(CHUNKED,))
    further = b"" if content is None else b"REPORT /api/next HTTP/1.1\r\nHost: a\r\n\r\n"
    for start in range(0, len(chunks + further), step):
        client.send((chunks + further)[start : start + step])
    if content is None:
        assert client.answer().status == 400
        return
    assert [client.answer().status for _ in range(2)] == [200, 200]
    first, second = (one for one in up.requests if one.is_complete)  # a former test's may end late
    assert first.body == content
    assert second.line == b"REPORT /api/next HTTP/1.1"
    assert not asgi_forwards


def test_white_space_behind_a_length_is_none_of_it(
    client: RawClient, up: RawUpstream, asgi_forwards: list[Any]
) -> None:
    client.request("PUT", "/api/x", ("cOnTeNt-LeNgTh:  5 ",), b"hello")
    assert client.answer().status == 200
    assert up.requests[0].body == b"hello"
    assert not asgi_forwards


@pytest.mark.parametrize("begun", [False, True])
def test_a_chunked_body_above_the_limit_is_refused_or_cut_off(
    gateway: StartGateway, up: RawUpstream, *, begun: bool
) -> None:
    up.reads_body = False
    running = gateway(in_front_of(up.url) | {"server": {"max_body_bytes": 1_000}})

    def behave(wire: Wire, _request: RawRequest) -> bool:
        if begun:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        wire.read_until(b"never sent")
        return False

    up.behave = behave
    with RawClient(running.port) as client:
        send = begin(client, 1_001, (CHUNKED,))
        send(b"x" * 1_000)
        if begun:
            assert client.read_until(b"half") is not None
        send(b"x")
        if not begun:
            answer = client.answer()
            assert (reason(answer), answer.all("connection")) == ((413, "body_too_large"), [b"close"])
        assert client.is_closed()
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0
    eventually(lambda: is_calm(running), "nothing is held")


def test_a_chunked_body_is_replayed_from_its_kept_beginning(client: RawClient, up: RawUpstream) -> None:
    up.reads_body = False
    body = body_of(20_000)

    def behave(wire: Wire, request: RawRequest) -> bool:
        if len(up.requests) == 1:
            wire.read_exactly(8_000)
            return False
        request.body, request.is_complete = wire.read_body(request.headers)
        return reply()(wire, request) is not False

    up.behave = behave
    send = begin(client, len(body), (CHUNKED,))
    send(body[:9_000])
    eventually(lambda: len(up.requests) == 2, "there is another attempt")
    send(body[9_000:])
    assert client.answer().status == 200
    assert up.requests[1].body == body
