"""A request leaves nothing behind that only the garbage collector can free: it looks seldom, and all at once."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.kit import Behaviour, RawClient, RawUpstream, RunningGateway, eventually, in_front_of, reply

Start = Callable[[dict[str, Any]], RunningGateway]
Upstreams = Callable[..., RawUpstream]

CHUNKED = "Transfer-Encoding: chunked"


def chunked(wire: Any, _request: object) -> None:
    """Answer in a way that is not plain, so that the straight way is left."""
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


@pytest.mark.parametrize("behave", [reply(), reply(status=b"500 Broken"), chunked], ids=["plain", "500", "chunked"])
@pytest.mark.parametrize(
    ("method", "headers", "body"),
    [
        ("GET", (), b""),
        ("GET", ("Expect: nothing",), b""),
        ("POST", ("Content-Length: 4",), b"data"),
        ("POST", (CHUNKED,), b"4\r\ndata\r\n0\r\n\r\n"),
    ],
    ids=["GET", "GET out of the ordinary", "POST", "POST in chunks"],
)
def test_a_request_leaves_no_cycles(
    gateway: Start, upstream: Upstreams, behave: Behaviour, method: str, headers: tuple[str, ...], body: bytes
) -> None:
    breaker = {"failure_threshold": 1000, "minimum_calls": 1000}
    running = gateway(in_front_of(upstream(behave).url, circuit_breaker=breaker))

    def visit() -> None:
        with RawClient(running.port) as client:
            for _ in range(3):
                client.request(method, "/api/x", headers, body)
                assert client.answer(method).body == b"ok"
        eventually(lambda: not running.server.server_state.connections, "the connection is closed")

    visit()
    with uncollected() as found:
        visit()
    assert found == Counter()
