"""A request leaves no reference cycles, which only the garbage collector could free."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.kit import (
    Behaviour,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reply,
)
from tests.wire.test_websocket import ASKING, BINARY, SWITCHED, frame

Start = Callable[[dict[str, Any]], RunningGateway]
Upstreams = Callable[..., RawUpstream]

CHUNKED = "Transfer-Encoding: chunked"
LASTING = {"failure_threshold": 1000, "minimum_calls": 1000}


def chunked(wire: Any, _request: object) -> None:
    """Answer in a way that is not plain, so that the fast path is left."""
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")


@contextmanager
def uncollected() -> Iterator[Counter[str]]:
    """Yield what will be the kinds of our own objects that became garbage within the block."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.update(type(one).__qualname__ for one in gc.garbage if type(one).__module__.startswith("api_gateway."))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def left_by(running: RunningGateway, visit: Callable[[RawClient], None]) -> Counter[str]:
    """Return what a client's second visit leaves behind."""

    def come_and_go() -> None:
        with RawClient(running.port) as client:
            visit(client)
        eventually(lambda: not running.server.server_state.connections, "the connection is closed")
        eventually(lambda: not running.server.server_state.tasks, "nobody serves it any more")

    come_and_go()
    with uncollected() as found:
        come_and_go()
    return found


@pytest.mark.parametrize("behave", [reply(), reply(status=b"500 Broken"), chunked], ids=["plain", "500", "chunked"])
@pytest.mark.parametrize(
    ("method", "headers", "body"),
    [
        ("GET", (), b""),
        ("GET", ("Expect: nothing",), b""),
        ("POST", ("Content-Length: 4",), b"data"),
        ("POST", (CHUNKED,), b"4\r\ndata\r\n0\r\n\r\n"),
    ],
    ids=["GET", "GET on the ASGI path", "POST", "POST in chunks"],
)
def test_a_request_leaves_no_cycles(
    gateway: Start, upstream: Upstreams, behave: Behaviour, method: str, headers: tuple[str, ...], body: bytes
) -> None:
    running = gateway(in_front_of(upstream(behave).url, circuit_breaker=LASTING))

    def visit(client: RawClient) -> None:
        for _ in range(3):
            client.request(method, "/api/x", headers, body)
            assert client.answer(method).body == b"ok"

    assert left_by(running, visit) == Counter()


def is_reset(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP")
    wire.reset()
    return False


def breaks_off(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
    return False


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("behave", [is_reset, breaks_off, None], ids=["reset", "broken off", "refused"])
def test_a_failed_attempt_leaves_no_cycles(
    gateway: Start, upstream: Upstreams, behave: Behaviour | None, attempts: int
) -> None:
    up = upstream(behave)
    if behave is None:
        up.close()
    options = {"circuit_breaker": LASTING, "retry": {"attempts": attempts, "budget": 1, "backoff": {"base": 0}}}
    running = gateway(in_front_of(up.url, **options))

    def visit(client: RawClient) -> None:
        if behave is breaks_off:
            client.request()
            assert not client.answer().is_complete
        else:
            assert client.get().status == 502

    assert left_by(running, visit) == Counter()


def test_an_event_stream_leaves_no_cycles(gateway: Start, upstream: Upstreams) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        wire.send(head + b"9\r\ndata: 1\n\n\r\n0\r\n\r\n")

    running = gateway(in_front_of(upstream(behave).url))

    def visit(client: RawClient) -> None:
        assert client.get().body == b"data: 1\n\n"

    assert left_by(running, visit) == Counter()


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_a_websocket_leaves_no_cycles(gateway: Start, upstream: Upstreams, who: str) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(SWITCHED + frame(BINARY, b"hello"))
        if who == "client":
            wire.is_closed()
        return False

    running = gateway(in_front_of(upstream(behave).url))

    def visit(client: RawClient) -> None:
        client.request("GET", "/api/x", ASKING)
        assert client.read_until(b"hello") is not None
        if who == "upstream":
            assert client.is_closed()

    assert left_by(running, visit) == Counter()
