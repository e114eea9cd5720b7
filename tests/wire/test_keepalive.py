"""Persistent connections on both sides: kept, closed, and reused only if that is safe."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.kit import (
    PATIENCE,
    Behaviour,
    RawAnswer,
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

KEPT = 0.8  # seconds a client's connection may rest
StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def pool(gateway: RunningGateway) -> str:
    """Return what the pool of the upstream `up` says of itself."""
    return repr(gateway.server._app.state.gateway.upstream_clients["up"].transport)


def post(client: RawClient, body: bytes = b"body", *headers: str) -> RawAnswer:
    client.request("POST", "/api/x", (f"Content-Length: {len(body)}", *headers), body)
    return client.answer()


def slowly_at_first(up: RawUpstream) -> Behaviour:
    """Answer the first request late enough that all that follows it at once has been read meanwhile."""

    def behave(wire: Wire, _request: RawRequest) -> None:
        time.sleep(0.05 if len(up.requests) == 1 else 0)
        wire.send(OK)

    return behave


class Gates:
    """A behaviour that answers each request, with its path, once its gate is opened; it notes the wire of each."""

    def __init__(self) -> None:
        self.order: list[bytes] = []
        self.wires: dict[bytes, Wire] = {}
        self._gates: dict[bytes, threading.Event] = {}

    def __call__(self, wire: Wire, request: RawRequest) -> None:
        path = request.line.split()[1]
        self.wires[path] = wire
        self.order.append(path)
        assert self._gate(path).wait(PATIENCE)
        reply(path)(wire, request)

    def open(self, *paths: bytes) -> None:
        for path in paths:
            self._gate(path).set()

    def _gate(self, path: bytes) -> threading.Event:
        return self._gates.setdefault(path, threading.Event())


# The client's side


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    return in_front_of(shared.url) | {"server": {"keep_alive_timeout": KEPT, "drain_timeout": 1}}


def test_many_requests_are_served_on_one_connection(client: RawClient, up: RawUpstream) -> None:
    for number in range(100):
        answer = post(client) if number % 3 else client.get()
        assert (answer.status, answer.all("connection")) == (200, [])
    assert len(up.requests) == 100


@pytest.mark.parametrize("value", ["close", "Close", "keep-alive, close"])
def test_a_client_that_asks_for_it_has_its_connection_closed(client: RawClient, up: RawUpstream, value: str) -> None:
    """And what it asks is nothing the upstream hears of."""
    answer = client.get(headers=(f"Connection: {value}",))
    assert (answer.status, answer.all("connection")) == (200, [b"close"])
    assert client.is_closed()
    assert up.requests[0].all("connection") == []


@pytest.mark.parametrize("headers", [b"", b"Connection: keep-alive\r\n"])
def test_a_connection_of_http_1_0_serves_one_request(client: RawClient, headers: bytes) -> None:
    client.send(b"GET /api/x HTTP/1.0\r\nHost: a\r\n" + headers + b"\r\n")
    answer = client.answer()
    assert (answer.body, answer.all("connection")) == (b"ok", [b"close"])
    assert client.is_closed()


def test_a_connection_that_is_idle_too_long_is_closed(client: RawClient) -> None:
    """The time runs from the last response, and without a word of refusal."""
    for pause in (KEPT / 2, KEPT / 2, KEPT / 2, 0):
        assert client.get().status == 200
        responded = time.monotonic()
        time.sleep(pause)
    assert client.is_closed()
    assert time.monotonic() - responded >= KEPT * 0.9


def test_the_keep_alive_timeout_does_not_run_while_a_response_is_due(client: RawClient, up: RawUpstream) -> None:
    def late(wire: Wire, _request: RawRequest) -> None:
        time.sleep(KEPT * 1.3)
        wire.send(OK)

    assert client.get().status == 200
    up.behave = late
    assert client.get().status == 200


def send_and_end(client: RawClient, *requests: bytes) -> None:
    """Send and say that no more will come."""
    client.send(b"".join(requests))
    client.sock.shutdown(socket.SHUT_WR)


LAST = {
    "GET": b"GET /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "another spelling": b"GET /api/x HTTP/1.1\r\nHost: a\r\nConnection: Keep-Alive, CLOSE\r\n\r\n",
    "POST": b"POST /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.0": b"GET /api/x HTTP/1.0\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", LAST.values(), ids=LAST)
def test_a_half_closed_client_with_connection_close_still_gets_its_response(
    client: RawClient, up: RawUpstream, request_bytes: bytes
) -> None:
    """RFC 9112 section 9.6."""
    up.behave = slowly_at_first(up)
    send_and_end(client, request_bytes)
    answer = client.answer()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"ok", True)
    assert client.is_closed()


def test_a_half_closed_pipeline_with_connection_close_gets_all_responses(client: RawClient, up: RawUpstream) -> None:
    up.behave = slowly_at_first(up)
    send_and_end(client, b"GET /api/x HTTP/1.1\r\nHost: a\r\n\r\n", LAST["GET"])
    assert [client.answer().status, client.answer().status] == [200, 200]


GET = b"GET /api/x HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize("before", [b"", b"GET /api/x HTTP/1.1\r\nHost:  a\r\n\r\n"], ids=["plain", "general"])
def test_what_is_held_behind_a_response_counts_as_the_last_request(
    client: RawClient, up: RawUpstream, kind: str, before: bytes
) -> None:
    """Whatever reads and serves the requests before it, and however many follow at once."""
    up.behave = slowly_at_first(up)
    requests = [before or GET, *[GET] * 20, LAST[kind]]
    send_and_end(client, *requests)
    for _ in requests:
        answer = client.answer()
        assert (answer.status, answer.is_complete) == (200, True)
    assert client.is_closed()


@pytest.mark.parametrize(
    "last",
    [
        b"GET /api/x HTTP/1.1\r\nHost: a\r\nX-Note: close HTTP/1.0\r\n\r\n",
        b"GET /api/close HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9\r\n\r\nhalf",
        b"GET /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n",
    ],
    ids=["another field", "the path", "within its body", "within its head"],
)
def test_what_only_looks_like_an_announced_end_is_a_disconnect(
    running: RunningGateway, client: RawClient, up: RawUpstream, last: bytes
) -> None:
    """Also of the request before it, which is aborted."""
    left = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool:
        if wire.is_closed():
            left.set()
        return False

    up.behave = behave
    client.send(GET + last)
    eventually(lambda: len(up.requests) == 1, "the first request is with the upstream")
    client.sock.shutdown(socket.SHUT_WR)
    assert left.wait(PATIENCE)
    assert client.is_closed()
    assert len(up.requests) == 1
    eventually(lambda: running.live.recorder.in_flight == 0, "nothing is held")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /api/x HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9\r\n\r\nhalf",
    ],
    ids=["without having said so", "within its body"],
)
def test_any_other_half_closed_client_has_disconnected(
    running: RunningGateway, client: RawClient, up: RawUpstream, request_bytes: bytes
) -> None:
    left = threading.Event()

    def watch(wire: Wire, _request: RawRequest) -> bool:
        while wire.fill():
            pass
        left.set()
        return False

    up.behave, up.reads_body = watch, False
    counted = running.live.recorder.refusals["client_disconnected"]
    client.send(request_bytes)
    eventually(lambda: len(up.requests) == 1, "the request is with the upstream")
    client.sock.shutdown(socket.SHUT_WR)
    assert left.wait(PATIENCE)
    assert client.is_closed()
    eventually(
        lambda: running.live.recorder.refusals["client_disconnected"] == counted + 1,
        "it is counted",
    )


# The upstream's side


def once(up: RawUpstream, **options: Any) -> dict[str, Any]:
    """Sections for an upstream that the router tries once: what is tried again is the transport's doing."""
    return in_front_of(
        up.url,
        **{"retry": {"attempts": 1}, "circuit_breaker": {"failure_threshold": 1000}, **options},
    ) | {"server": {"drain_timeout": 1}}


def test_the_connection_given_back_last_is_used_first(gateway: StartGateway, upstream: StartUpstream) -> None:
    gates = Gates()
    running = gateway(once(upstream(gates)))
    with RawClient(running.port) as one, RawClient(running.port) as other:
        one.request("GET", "/api/1")
        eventually(lambda: gates.order == [b"/api/1"], "the first is with the upstream")
        other.request("GET", "/api/2")
        eventually(lambda: len(gates.order) == 2, "the second too")
        for client, path in ((one, b"/api/1"), (other, b"/api/2")):
            gates.open(path)
            assert client.answer().body == path
        gates.open(b"/api/3", b"/api/4")
        assert one.get("/api/3").body == b"/api/3"
        assert other.get("/api/4").body == b"/api/4"
    assert gates.wires[b"/api/3"] is gates.wires[b"/api/4"] is gates.wires[b"/api/2"] is not gates.wires[b"/api/1"]


def dies(ending: Callable[[Wire], object], beginning: bytes = b"", times: int = 1) -> Behaviour:
    """Return a behaviour that answers the first request and ends the connections of the next `times`."""
    count = 0

    def behave(wire: Wire, _request: RawRequest) -> bool | None:
        nonlocal count
        count += 1
        if 1 < count <= 1 + times:
            if beginning:
                wire.send(beginning)
                time.sleep(0.05)  # else a reset would take it away
            ending(wire)
            return False
        wire.send(OK)
        return None

    return behave


@pytest.mark.parametrize("ending", [Wire.close, Wire.reset])
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_a_request_on_a_connection_that_has_died_goes_out_once_more(
    gateway: StartGateway, upstream: StartUpstream, method: str, ending: Callable[[Wire], None]
) -> None:
    """The race every keep-alive client can lose (RFC 9112 section 9.3.1)."""
    up = upstream(dies(ending))
    with RawClient(gateway(once(up)).port) as client:
        assert client.get().status == 200
        client.request(method, "/api/again")
        assert client.answer(method).status == 200
    assert [request.line.split()[1] for request in up.requests] == [b"/api/x", b"/api/again", b"/api/again"]
    assert len(up.wires) == 2


@pytest.mark.parametrize(
    ("method", "headers", "beginning"),
    [
        ("POST", ("Content-Length: 4",), b""),
        ("POST", (), b""),
        ("PUT", ("Content-Length: 4",), b""),
        ("PUT", ("Transfer-Encoding: chunked",), b""),
        ("GET", (), b"H"),
        ("GET", (), b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"),
    ],
    ids=["POST", "POST without a body", "PUT", "chunks", "after a byte", "after an interim answer"],
)
def test_a_request_that_may_have_taken_effect_is_not_repeated(
    gateway: StartGateway, upstream: StartUpstream, method: str, headers: tuple[str, ...], beginning: bytes
) -> None:
    up = upstream(dies(Wire.close, beginning))
    body = {"Content-Length: 4": b"body", "Transfer-Encoding: chunked": b"4\r\nbody\r\n0\r\n\r\n"}
    with RawClient(gateway(once(up)).port) as client:
        assert client.get().status == 200
        client.request(method, "/api/again", headers, body[headers[0]] if headers else b"")
        assert reason(client.answer()) == (502, "upstream_reset")
    assert [request.line.split()[1] for request in up.requests] == [b"/api/x", b"/api/again"]


def test_the_second_attempt_is_the_last(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream(dies(Wire.close, times=9))
    with RawClient(gateway(once(up)).port) as client:
        assert client.get().status == 200
        assert reason(client.get()) == (502, "upstream_reset")
    assert len(up.requests) == 3


def test_a_connection_the_upstream_closed_is_not_used(gateway: StartGateway, upstream: StartUpstream) -> None:
    """So that even what may not be repeated is served."""
    up = upstream(lambda wire, _request: wire.send(OK) or False)
    running = gateway(once(up))
    with RawClient(running.port) as client:
        for _ in range(3):
            assert post(client).status == 200
            eventually(lambda: "0 busy, 0 idle" in pool(running), "it is forgotten")
    assert len(up.wires) == 3


SURPLUS = {
    "at once": (OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison", b""),
    "later": (OK, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"),
    "behind chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\npoison", b""),
    "behind 304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\npoison", b""),
    "behind 204": (b"HTTP/1.1 204 No Content\r\n\r\npoison", b""),
}


@pytest.mark.parametrize(("answer", "later"), SURPLUS.values(), ids=SURPLUS)
def test_a_connection_with_surplus_bytes_is_not_reused(
    gateway: StartGateway, upstream: StartUpstream, answer: bytes, later: bytes
) -> None:
    poisoned = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        if poisoned.is_set():
            wire.send(OK)
            return
        poisoned.set()
        wire.send(answer)
        time.sleep(0.1 if later else 0)
        wire.send(later)

    up = upstream(behave)
    running = gateway(once(up))
    with RawClient(running.port) as client, RawClient(running.port) as other:
        too_long = answer.startswith(OK) and answer != OK  # what was announced may not pass for all of it
        assert client.get().status == (502 if too_long else int(answer.split()[1]))
        eventually(lambda: "0 busy, 0 idle" in pool(running), "it is closed")
        assert [one.get().body for one in (client, other)] == [b"ok", b"ok"]
    assert len(up.wires) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
def test_an_upstream_that_says_it_will_close_is_believed(
    gateway: StartGateway, upstream: StartUpstream, answer: bytes
) -> None:
    """Although it does not close by itself; the client's connection stays."""
    up = upstream(lambda wire, _request: wire.send(answer))
    with RawClient(gateway(once(up)).port) as client:
        for _ in range(3):
            got = client.get()
            assert (got.body, got.all("connection")) == (b"ok", [])
    assert len(up.wires) == 3


def test_an_idle_connection_expires(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream()
    running = gateway(once(up, pool={"idle_timeout": 0.3}))
    with RawClient(running.port) as client:
        for _ in range(3):
            assert client.get().status == 200
            time.sleep(0.15)
        assert len(up.wires) == 1
        eventually(lambda: "0 busy, 0 idle" in pool(running), "it expires")
        assert client.get().status == 200
    assert len(up.wires) == 2


def test_requests_wait_for_a_connection_in_order(gateway: StartGateway, upstream: StartUpstream) -> None:
    gates = Gates()
    up = upstream(gates)
    running = gateway(once(up, pool={"max_connections": 3}, timeouts={"connect": 5}))  # of which one address has two
    paths = [b"/api/%d" % number for number in range(6)]
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in paths]
        for number, (client, path) in enumerate(zip(clients, paths, strict=True)):
            client.request("GET", path.decode())
            state = f"[{min(number + 1, 2)} busy, 0 idle, {max(number - 1, 0)} waiting]"
            eventually(lambda state=state: state in pool(running), state)  # type: ignore[misc]  # bound now
        for number, (client, path) in enumerate(zip(clients, paths, strict=True)):
            arrived = min(number + 2, len(paths))
            eventually(lambda arrived=arrived: len(gates.order) == arrived, "the next arrives")  # type: ignore[misc]  # bound now
            gates.open(path)
            assert client.answer().body == path
    assert sorted(gates.order[:2]) == paths[:2], "on two connections at once"
    assert gates.order[2:] == paths[2:]
    assert len(up.wires) == 2


def test_waiting_too_long_for_a_connection_is_503_overloaded(gateway: StartGateway, upstream: StartUpstream) -> None:
    """It has not reached the upstream, and is not reported to the breaker."""
    gates = Gates()
    up = upstream(gates)
    running = gateway(once(up, pool={"max_connections": 1}, timeouts={"connect": 0.2}))
    with RawClient(running.port) as client, RawClient(running.port) as other:
        client.request("GET", "/api/1")
        eventually(lambda: gates.order == [b"/api/1"], "the first is with the upstream")
        refusal = other.get("/api/2")
        assert reason(refusal) == (503, "overloaded")
        assert refusal.all("retry-after") == [b"1"]
        assert running.live.upstreams["up"].breaker.consecutive_failures == 0
        gates.open(b"/api/1", b"/api/3")
        assert client.answer().status == 200
        assert other.get("/api/3").status == 200
    assert gates.order == [b"/api/1", b"/api/3"]


def test_a_response_before_the_end_of_an_upload_costs_no_connection(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    """The client sends the rest and goes on, and so does the gateway on its connection to the upstream."""
    came: list[bytes] = []

    def behave(wire: Wire, request: RawRequest) -> None:
        if request.line.startswith(b"POST"):
            assert wire.read_exactly(4) == b"half"
            wire.send(OK)
            came.append(wire.read_exactly(4))
        else:
            wire.send(OK)

    up = upstream(behave, reads_body=False)
    running = gateway(once(up))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", ("Content-Length: 8",), b"half")
        answer = client.answer()
        assert (answer.status, answer.all("connection")) == (200, [])
        assert "1 busy, 0 idle" in pool(running)
        client.send(b"rest")
        eventually(lambda: "0 busy, 1 idle" in pool(running), "the rest is sent")
        assert client.get("/api/next").body == b"ok"
    assert came == [b"rest"]
    assert [request.line.split()[1] for request in up.requests] == [b"/api/x", b"/api/next"]
    assert len(up.wires) == 1


def test_a_client_that_leaves_after_an_early_response_costs_the_connection(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    """Of its body nothing more will come."""
    up = upstream(says_at_once, reads_body=False)
    running = gateway(once(up))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", ("Content-Length: 8",), b"half")
        assert client.answer().status == 200
        assert "1 busy, 0 idle" in pool(running)
    eventually(lambda: "0 busy, 0 idle" in pool(running), "the upstream's is closed")


def says_at_once(wire: Wire, request: RawRequest) -> None:
    """Answer to the head alone; then read the body and forget it."""
    wire.send(OK)
    wire.read_body(request.headers)


KIB = 1024
BODY = bytes(range(256)) * 4
LARGE = BODY * 128


def in_chunks(body: bytes) -> bytes:
    """Return the body in chunks of 1 KiB."""
    pieces = [body[at : at + KIB] for at in range(0, len(body), KIB)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("header", "body", "head_alone"),
    [
        (f"Content-Length: {len(BODY)}", BODY, False),
        (f"Content-Length: {len(BODY)}", BODY, True),
        (f"Content-Length: {len(LARGE)}", LARGE, False),
        (f"Content-Length: {len(LARGE)}", LARGE, True),
        ("Transfer-Encoding: chunked", in_chunks(BODY), False),
        ("Transfer-Encoding: chunked", in_chunks(BODY), True),
        ("Transfer-Encoding: chunked", in_chunks(LARGE), True),
    ],
    ids=["small", "small, later", "large", "large, later", "chunked", "chunked, later", "large, chunked, later"],
)
def test_early_responses_do_not_empty_the_pool(
    gateway: StartGateway, upstream: StartUpstream, header: str, body: bytes, *, head_alone: bool
) -> None:
    """64 clients post at once, several times each, to an upstream that responds to the head alone.

    As many connections suffice as there are requests at once. If `head_alone`, the client sends the body only when it
    has the response.
    """
    clients, rounds = 64, 4
    up = upstream(says_at_once, reads_body=False)
    running = gateway(once(up, timeouts={"connect": PATIENCE}))  # a busy machine takes seconds for so many
    failures: list[object] = []

    def run() -> None:
        with RawClient(running.port) as client:
            for _ in range(rounds):
                client.request("POST", "/api/x", (header,), b"" if head_alone else body)
                status = client.answer().status
                if head_alone:
                    client.send(body)
                if status != 200:
                    failures.append(status)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 6)
    assert failures == []
    assert len(up.requests) == clients * rounds
    assert len(up.wires) <= clients * 1.25
