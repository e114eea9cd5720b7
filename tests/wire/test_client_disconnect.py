"""A client that disconnects: the upstream connection is closed at once, no failure is counted, nothing is leaked."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.kit import (
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reply,
)

SOON = 1.0
POOL = 2
Leave = Callable[[RawClient], None]
LEAVING: tuple[Leave, ...] = (RawClient.close, RawClient.reset)


class Watching:
    """A behaviour that starts a response, or none, and notes when the gateway closes the connection."""

    def __init__(self, beginning: bytes = b"") -> None:
        self.beginning = beginning
        self.reached = threading.Event()
        self.left = threading.Event()

    def __call__(self, wire: Wire, _request: RawRequest) -> bool:
        if self.beginning:
            wire.send(self.beginning)
        self.reached.set()
        while wire.fill():
            pass
        self.left.set()
        return False


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    """A breaker that opens at the first failure, and a pool that two leaked slots would exhaust."""
    return in_front_of(
        shared.url,
        circuit_breaker={"failure_threshold": 1},
        pool={"max_connections": 2 * POOL - 1},
        timeouts={"connect": 0.5, "response": 30, "idle": 30},
    )


class Ledger:
    """What the recorder counts as left by its client, since the beginning of the test."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        self._before = self._count()

    def _count(self) -> tuple[int, int]:
        recorder = self._gateway.live.recorder
        by_status = sum(count for key, count in recorder.requests.items() if key[2] == 499)
        return by_status, recorder.refusals["client_disconnected"]

    def shows(self, count: int) -> bool:
        """Return whether so many are recorded, by status and by reason."""
        return self._count() == (self._before[0] + count, self._before[1] + count)

    def comes_to_show(self, count: int) -> None:
        eventually(lambda: self.shows(count), f"{count} recorded as left by their client", within=SOON)


def assert_blameless(gateway: RunningGateway) -> None:
    """The breaker has counted nothing, no target is held, no exchange goes on."""
    upstream = gateway.live.upstreams["up"]
    assert upstream.breaker.state == "CLOSED"
    assert upstream.breaker.consecutive_failures == 0
    eventually(lambda: upstream.targets[0].in_flight == 0, "the target is given back", within=SOON)
    eventually(lambda: gateway.live.recorder.in_flight == 0, "the exchange ends", within=SOON)


def assert_no_slot_is_leaked(gateway: RunningGateway, up: RawUpstream) -> None:
    """As many requests as are one address's share of the pool are with the upstream at the same time."""
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        gate.wait(SOON)
        reply()(wire, request)

    up.behave, up.reads_body = behave, True
    up.requests.clear()
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(gateway.port)) for _ in range(POOL)]
        for client in clients:
            client.request()
        eventually(lambda: len(up.requests) == POOL, "all requests are with the upstream", within=SOON)
        gate.set()
        assert [client.answer().status for client in clients] == [200] * POOL


@pytest.mark.parametrize("leave", LEAVING)
def test_disconnecting_while_the_upstream_is_slow_closes_its_connection(
    running: RunningGateway, up: RawUpstream, leave: Leave
) -> None:
    ledger = Ledger(running)
    for count in range(1, POOL + 2):
        up.behave = slow = Watching()
        with RawClient(running.port) as client:
            client.request()
            assert slow.reached.wait(SOON)
            leave(client)
        assert slow.left.wait(SOON)
        ledger.comes_to_show(count)
    assert_blameless(running)
    assert_no_slot_is_leaked(running, up)


def test_disconnecting_after_a_while_closes_the_upstream_connection(running: RunningGateway, up: RawUpstream) -> None:
    """Also once the gateway watches for it, which it does not do for the first few hundredths of a second."""
    up.behave = slow = Watching()
    with RawClient(running.port) as client:
        client.request()
        assert slow.reached.wait(SOON)
        time.sleep(0.2)
        assert not slow.left.is_set()
    assert slow.left.wait(SOON)
    assert_blameless(running)


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize(
    "beginning", [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"HTTP/1.1 200 OK\r\n\r\nhalf"]
)
def test_disconnecting_within_the_response_closes_the_upstream_connection(
    running: RunningGateway, up: RawUpstream, leave: Leave, beginning: bytes
) -> None:
    ledger = Ledger(running)
    for count in range(1, POOL + 2):
        up.behave = stream = Watching(beginning)
        with RawClient(running.port) as client:
            client.request()
            assert client.read_until(b"half") is not None
            leave(client)
        assert stream.left.wait(SOON)
        ledger.comes_to_show(count)
    assert_blameless(running)
    assert_no_slot_is_leaked(running, up)


def test_disconnecting_a_stream_that_keeps_flowing_closes_the_upstream_connection(
    running: RunningGateway, up: RawUpstream
) -> None:
    """The gateway does not go on reading for nobody."""
    left = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                wire.send(bytes(65_536))
        except OSError:
            left.set()
        return False

    up.behave = behave
    ledger = Ledger(running)
    with RawClient(running.port) as client:
        client.request()
        client.read_exactly(1_000_000)
    assert left.wait(SOON)
    ledger.comes_to_show(1)
    assert_blameless(running)


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_disconnecting_within_an_upload_closes_the_upstream_connection(
    running: RunningGateway, up: RawUpstream, leave: Leave, framing: str
) -> None:
    """The upstream sees the request broken off, never a shorter one."""
    up.reads_body = False
    ledger = Ledger(running)
    for count in range(1, POOL + 2):
        up.behave = reading = Watching()
        with RawClient(running.port) as client:
            client.request("POST", "/api/x", (framing,), b"4\r\nhalf\r\n")
            assert reading.reached.wait(SOON)
            leave(client)
        assert reading.left.wait(SOON)
        ledger.comes_to_show(count)
    assert not any(b"0\r\n\r\n" in wire.buffer for wire in up.wires)
    assert_blameless(running)
    assert_no_slot_is_leaked(running, up)


def test_disconnecting_while_waiting_for_a_connection_leaves_the_queue(
    running: RunningGateway, up: RawUpstream
) -> None:
    """What nobody waits for is not sent."""
    up.behave = slow = Watching()
    ledger = Ledger(running)
    with ExitStack() as stack:
        holders = [stack.enter_context(RawClient(running.port)) for _ in range(POOL)]
        for holder in holders:
            holder.request()
        eventually(lambda: len(up.requests) == POOL, "the pool is full", within=SOON)
        with RawClient(running.port) as waiting:
            waiting.request("GET", "/api/never")
            eventually(lambda: running.live.recorder.in_flight == POOL + 1, "the last one waits")
        ledger.comes_to_show(1)
    assert slow.left.wait(SOON)
    ledger.comes_to_show(1 + POOL)
    assert not any(b"never" in request.line for request in up.requests)
    assert_blameless(running)
    assert_no_slot_is_leaked(running, up)


def test_a_response_that_took_long_is_not_mistaken_for_a_client_that_left(
    running: RunningGateway, up: RawUpstream
) -> None:
    """The end of an exchange looks like a disconnect to whoever waits for one."""

    def behave(wire: Wire, request: RawRequest) -> None:
        time.sleep(0.15)
        reply()(wire, request)

    up.behave = behave
    ledger = Ledger(running)
    with RawClient(running.port) as client:
        assert [client.get().status for _ in range(3)] == [200] * 3
    assert_blameless(running)
    assert ledger.shows(0)
