"""A gateway that stops loses no request that is on its way, and tells clients to come back on another connection."""

import threading
import time
from collections.abc import Callable
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
    reply,
)

Start = Callable[[dict[str, Any]], RunningGateway]
Upstreams = Callable[..., RawUpstream]

DRAIN = {"server": {"drain_timeout": 2}}  # so a connection between two requests stays for one second


def stop(running: RunningGateway) -> None:
    """Begin to stop, and return when the connections have been told."""
    running.server.should_exit = True
    connections: Any = running.server.server_state.connections
    eventually(lambda: all(one._is_draining for one in list(connections)), "it drains")


@pytest.mark.parametrize("before", [0, 1, 3], ids=["first", "second", "after some"])
@pytest.mark.parametrize("target", ["/api/x", "/healthz"])
def test_a_client_that_is_just_sending_is_answered_and_told_to_go(
    gateway: Start, upstream: Upstreams, before: int, target: str
) -> None:
    running = gateway(in_front_of(upstream().url) | DRAIN)
    with RawClient(running.port) as client:
        for _ in range(before):
            assert client.get(target).all("connection") == []
        client.request("GET", "/healthz")  # so that the server knows of the connection for sure
        assert client.answer().status == 200
        stop(running)
        answer = client.get(target)
        assert (answer.status, answer.is_complete, answer.all("connection")) == (200, True, [b"close"])
        assert client.is_closed()


def test_a_connection_that_nobody_uses_is_closed_after_a_moment(gateway: Start, upstream: Upstreams) -> None:
    running = gateway(in_front_of(upstream().url) | DRAIN)
    with RawClient(running.port) as client:
        assert client.get().status == 200
        started = time.monotonic()
        stop(running)
        assert not client.is_closed(0.5)
        assert client.is_closed()
        assert time.monotonic() - started < 2


def test_without_connections_a_stop_takes_no_moment(gateway: Start, upstream: Upstreams) -> None:
    running = gateway(in_front_of(upstream().url))
    with RawClient(running.port) as client:
        assert client.get().status == 200
    eventually(lambda: not running.server.server_state.connections, "the connection is closed")
    started = time.monotonic()
    running.stop()
    assert time.monotonic() - started < 1


def test_a_head_that_is_half_there_may_be_completed(gateway: Start, upstream: Upstreams) -> None:
    running = gateway(in_front_of(upstream().url) | DRAIN)
    with RawClient(running.port) as client:
        assert client.get().status == 200
        client.send(b"GET /api/x HTTP/1.1\r\nHost: gat")
        time.sleep(0.05)
        stop(running)
        client.send(b"eway\r\n\r\n")
        answer = client.answer()
        assert (answer.status, answer.all("connection")) == (200, [b"close"])


@pytest.mark.parametrize("is_plain", [True, False], ids=["straight way", "ordinary way"])
@pytest.mark.parametrize("has_begun", [False, True], ids=["before the head", "behind the head"])
def test_an_answer_that_is_due_says_that_it_is_the_last_if_it_still_can(
    gateway: Start, upstream: Upstreams, *, is_plain: bool, has_begun: bool
) -> None:
    may_go_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        if request.line.split()[1] != b"/api/slow":
            reply(b"fine")(wire, request)
            return
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
        if has_begun:
            wire.send(head + b"sl")
        may_go_on.wait(PATIENCE)
        wire.send(b"ow" if has_begun else head + b"slow")

    running = gateway(in_front_of(upstream(behave).url) | DRAIN)
    with RawClient(running.port) as client:
        assert client.get().status == 200
        client.request("GET", "/api/slow", () if is_plain else ("Expect: nothing",))
        head = client.read_until(b"\r\n\r\n") if has_begun else b""
        time.sleep(0.05)
        stop(running)
        may_go_on.set()
        if not has_begun:
            answer = client.answer()
            assert (answer.body, answer.all("connection")) == (b"slow", [b"close"])
        else:
            assert head is not None
            assert b"connection: close" not in head.lower()
            assert client.read_exactly(4) == b"slow"
            answer = client.get()  # it could not know
            assert (answer.status, answer.body, answer.all("connection")) == (200, b"fine", [b"close"])
        assert client.is_closed()


def test_what_waits_behind_an_answer_is_answered_too(gateway: Start, upstream: Upstreams) -> None:
    may_go_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        may_go_on.wait(PATIENCE)
        reply(request.line)(wire, request)

    running = gateway(in_front_of(upstream(behave).url) | DRAIN)
    with RawClient(running.port) as client:
        client.request("GET", "/api/1")
        time.sleep(0.05)
        client.request("GET", "/api/2")
        client.request("GET", "/api/3")
        time.sleep(0.05)
        stop(running)
        may_go_on.set()
        answers = [client.answer() for _ in range(3)]
        assert [answer.body.split()[1] for answer in answers] == [b"/api/1", b"/api/2", b"/api/3"]
        assert [answer.all("connection") for answer in answers] == [[], [], [b"close"]]
        assert client.is_closed()
