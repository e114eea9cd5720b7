"""A gateway that stops loses no request in progress, and makes clients use another connection."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.listener import DRAIN_LINGER
from tests.kit import (
    PATIENCE,
    Behaviour,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    case,
    eventually,
    in_front_of,
    reply,
)
from tests.processes import WAYS, config_file, process
from tests.wire.test_websocket import ASKING, BINARY, CLOSE, SWITCHED, TEXT, frame

Start = Callable[[dict[str, Any]], RunningGateway]
Upstreams = Callable[..., RawUpstream]

GOING = b"\x03\xe9"  # 1001, going away
DRAIN = {"server": {"drain_timeout": 2}}  # so a connection between two requests stays for one second


def stop(running: RunningGateway) -> None:
    """Begin to stop, and return when the connections have been told."""
    running.server.should_exit = True
    connections: Any = running.server.server_state.connections
    eventually(lambda: all(one.state.is_draining for one in list(connections)), "it drains")


@pytest.mark.parametrize("before", [0, 1, 3], ids=["first", "second", "after some"])
@pytest.mark.parametrize("target", ["/api/x", "/healthz"])
def test_a_client_that_is_sending_gets_its_response_with_connection_close(
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


def test_an_unused_connection_is_closed_after_a_moment(gateway: Start, upstream: Upstreams) -> None:
    running = gateway(in_front_of(upstream().url) | {"server": {"drain_timeout": 60}})
    with RawClient(running.port) as client:
        assert client.get().status == 200
        started = time.monotonic()
        stop(running)
        assert not client.is_closed(0.5) or time.monotonic() - started >= DRAIN_LINGER, "a busy machine takes longer"
        assert client.is_closed()
        assert time.monotonic() - started < PATIENCE, "it was closed before the drain timeout"


def test_without_connections_a_stop_takes_no_moment(
    gateway: Start, upstream: Upstreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_gateway.downstream.listener.DRAIN_LINGER", PATIENCE)
    running = gateway(in_front_of(upstream().url) | {"server": {"drain_timeout": 3 * PATIENCE}})
    with RawClient(running.port) as client:
        assert client.get().status == 200
    eventually(lambda: not running.server.server_state.connections, "the connection is closed")
    started = time.monotonic()
    running.stop()
    assert time.monotonic() - started < PATIENCE / 2


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


@pytest.mark.parametrize("is_plain", [True, False], ids=["fast path", "ASGI path"])
@pytest.mark.parametrize("has_begun", [False, True], ids=["before the head", "behind the head"])
def test_a_response_due_during_a_drain_has_connection_close_if_its_head_is_not_sent(
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

    up = upstream(behave)
    running = gateway(in_front_of(up.url) | DRAIN)
    with RawClient(running.port) as client:
        assert client.get().status == 200
        client.request("GET", "/api/slow", () if is_plain else ("Expect: nothing",))
        head = client.read_until(b"\r\n\r\n") if has_begun else b""
        eventually(lambda: len(up.requests) == 2, "it is with the upstream")
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


def test_requests_that_wait_behind_a_response_get_theirs_too(gateway: Start, upstream: Upstreams) -> None:
    may_go_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        may_go_on.wait(PATIENCE)
        reply(request.line)(wire, request)

    up = upstream(behave)
    running = gateway(in_front_of(up.url) | DRAIN)
    with RawClient(running.port) as client:
        client.request("GET", "/api/1")
        eventually(lambda: len(up.requests) == 1, "the first is with the upstream")
        client.request("GET", "/api/2")
        client.request("GET", "/api/3")
        time.sleep(0.05)
        stop(running)
        may_go_on.set()
        answers = [client.answer() for _ in range(3)]
        assert [answer.body.split()[1] for answer in answers] == [b"/api/1", b"/api/2", b"/api/3"]
        assert [answer.all("connection") for answer in answers] == [[], [], [b"close"]]
        assert client.is_closed()


def test_what_a_slow_reader_has_not_been_sent_counts_as_cut_off(gateway: Start, upstream: Upstreams) -> None:
    """The request is answered, as far as its task knows; the client has not got it all."""
    up = upstream(reply(bytes(50_000)))  # so little that the connection is not told to pause
    running = gateway(in_front_of(up.url) | {"server": {"drain_timeout": 1}})

    def has_answered(count: int) -> bool:
        return running.server.server_state.total_requests == count

    sent = 1
    with RawClient(running.port) as client:
        assert client.get("/healthz").status == 200
        (connection,) = running.server.server_state.connections
        assert isinstance(connection, DownstreamConnection)
        while not connection.transport.get_write_buffer_size():
            client.request()
            sent += 1
            eventually(partial(has_answered, sent), "it is answered")
            time.sleep(0.01)  # what the kernel takes is gone by then
        assert not connection.is_write_paused
        running.stop()
    assert running.server.cut_off == 1


class Patient:
    """A listening server as Python has it since 3.12: closed only once all of its connections are."""

    def __init__(self, server: Any, connections: set[Any]) -> None:
        self.sockets, self.close = server.sockets, server.close
        self._connections = connections

    async def wait_closed(self) -> None:
        while self._connections:  # noqa: ASYNC110 - nothing tells of it here
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_plain", [True, False], ids=["fast path", "ASGI path"])
def test_a_second_interrupt_waits_for_no_connection(gateway: Start, upstream: Upstreams, *, is_plain: bool) -> None:
    over = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        if b"/slow" in request.line:
            over.wait(PATIENCE)
        reply()(wire, request)

    up = upstream(behave)
    running = gateway(in_front_of(up.url) | {"server": {"drain_timeout": 3 * PATIENCE}})
    server: Any = running.server
    server.servers = [Patient(one, server.server_state.connections) for one in server.servers]
    with RawClient(running.port) as client:
        assert client.get().status == 200
        client.request("GET", "/api/slow", () if is_plain else ("Expect: nothing",))
        eventually(lambda: len(up.requests) == 2, "the request is under way")
        server.handle_exit(signal.SIGINT, None)
        eventually(lambda: all(one.state.is_draining for one in list(server.server_state.connections)), "it drains")
        server.handle_exit(signal.SIGINT, None)
        running._thread.join(PATIENCE)
        assert not running._thread.is_alive()
        assert client.is_closed()
    over.set()
    assert server.cut_off == 1


# What has no end of its own


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("is_early", [True, False], ids=["asked for before", "asked for meanwhile"])
def test_a_websocket_that_begins_during_the_drain_gets_a_close_frame(
    gateway: Start, upstream: Upstreams, *, is_early: bool
) -> None:
    going_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/socket" not in request.line:
            reply()(wire, request)
            return None
        assert going_on.wait(PATIENCE)
        wire.send(SWITCHED + frame(TEXT, b"hello"))
        wire.is_closed()
        return False

    up = upstream(behave)
    running = gateway(in_front_of(up.url) | {"server": {"drain_timeout": 10}})
    with RawClient(running.port) as client:
        assert client.get().status == 200
        if is_early:
            client.request("GET", "/api/socket", ASKING)
            eventually(lambda: len(up.requests) == 2, "the request is under way")
            stop(running)
        else:
            stop(running)
            client.request("GET", "/api/socket", ASKING)
        going_on.set()
        assert client.read_until(b"\r\n\r\n") is not None
        assert client.read_exactly(4) == frame(CLOSE, GOING)


@pytest.mark.parametrize("is_early", [True, False], ids=["asked for before", "asked for meanwhile"])
def test_an_event_stream_that_begins_during_the_drain_ends_between_two_events(
    gateway: Start, upstream: Upstreams, *, is_early: bool
) -> None:
    going_on = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/events" not in request.line:
            reply()(wire, request)
            return None
        assert going_on.wait(PATIENCE)
        wire.send(EVENTS + b"\r\n" + chunk(b"data: 1\n\n"))
        wire.is_closed()
        return False

    up = upstream(behave)
    running = gateway(in_front_of(up.url) | {"server": {"drain_timeout": 10}})
    with RawClient(running.port) as client:
        assert client.get().status == 200
        if is_early:
            client.request("GET", "/api/events")
            eventually(lambda: len(up.requests) == 2, "the request is under way")
            stop(running)
        else:
            stop(running)
            client.request("GET", "/api/events")
        going_on.set()
        answer = client.answer()
        assert (answer.status, answer.is_complete) == (200, True)
        assert answer.body in (b"", b"data: 1\n\n")


def test_an_event_stream_with_a_coding_is_not_ended_where_its_bytes_look_like_an_edge(
    gateway: Start, upstream: Upstreams
) -> None:
    going_on = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(EVENTS + b"Content-Encoding: zstd\r\n\r\n" + chunk(b"half a frame\n\n"))
        assert going_on.wait(PATIENCE)
        wire.send(chunk(b"\n\nand the rest") + b"0\r\n\r\n")

    running = gateway(in_front_of(upstream(behave).url) | {"server": {"drain_timeout": 10}})
    with RawClient(running.port) as client:
        client.request("GET", "/api/events")
        head = client.read_until(b"\r\n\r\n")
        assert head is not None
        assert client.read_until(b"frame") is not None
        stop(running)
        time.sleep(0.05)
        going_on.set()
        assert client.read_until(b"0\r\n\r\n") == b"\n\n\r\n" + chunk(b"\n\nand the rest") + b"0\r\n\r\n"


def test_a_close_frame_that_is_half_sent_is_the_last(gateway: Start, upstream: Upstreams) -> None:
    halfway = threading.Event()
    goodbye = frame(CLOSE, b"\x03\xe8and thanks")

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(SWITCHED + goodbye[:1])
        assert halfway.wait(PATIENCE)
        wire.send(goodbye[1:])
        return False

    running = gateway(in_front_of(upstream(behave).url) | {"server": {"drain_timeout": 10}})
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", ASKING)
        assert client.read_until(b"\r\n\r\n") is not None
        assert client.read_exactly(1) == goodbye[:1]
        stop(running)
        halfway.set()
        assert client.read_exactly(len(goodbye) + 1) == goodbye[1:]


def test_a_websocket_gets_a_close_frame_between_two_frames(gateway: Start, upstream: Upstreams) -> None:
    halfway = threading.Event()
    heard: list[bytes] = []

    def behave(wire: Wire, _request: RawRequest) -> bool:
        whole = frame(BINARY, bytes(300))
        wire.send(SWITCHED + frame(TEXT, b"hello") + whole[:100])
        assert halfway.wait(PATIENCE)
        wire.send(whole[100:] + frame(TEXT, b"too late"))
        heard.append(wire.read_exactly(8))
        wire.send(frame(CLOSE, GOING[:2]))
        return False

    running = gateway(in_front_of(upstream(behave).url) | {"server": {"drain_timeout": 10}})
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", ASKING)
        assert client.read_until(b"\r\n\r\n") is not None
        assert client.read_exactly(7 + 100) == frame(TEXT, b"hello") + frame(BINARY, bytes(300))[:100]
        stop(running)
        halfway.set()
        rest = frame(BINARY, bytes(300))[100:] + frame(CLOSE, GOING)
        assert client.read_exactly(len(rest)) == rest
        goodbye = frame(CLOSE, GOING, masked=True)
        client.send(goodbye)
        assert client.read_exactly(1) == b"", "nothing follows a close frame"
    eventually(lambda: heard == [goodbye], "the upstream hears the client's goodbye")


def test_a_websocket_that_is_closing_already_gets_no_close_frame(gateway: Start, upstream: Upstreams) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(SWITCHED + frame(CLOSE, b"\x03\xe8"))
        wire.read_exactly(8)
        return False

    running = gateway(in_front_of(upstream(behave).url) | {"server": {"drain_timeout": 10}})
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", ASKING)
        assert client.read_until(b"\r\n\r\n") is not None
        assert client.read_exactly(4) == frame(CLOSE, b"\x03\xe8")
        stop(running)
        client.send(frame(CLOSE, b"\x03\xe8", masked=True))
        assert client.read_exactly(1) == b""


def test_an_event_stream_ends_between_two_events_and_whole(gateway: Start, upstream: Upstreams) -> None:
    """Whatever ends its lines, and whether the drain begins between two events or within one."""
    edges = (b"\n\n", b"\r\n\r\n", b"\r\r")
    streams = {f"/api/{n}".encode(): one for n, one in enumerate(product(edges, (False, True)))}
    going_on, left = threading.Event(), []

    def behave(wire: Wire, request: RawRequest) -> bool:
        path = request.line.split()[1]
        edge, is_halfway = streams[path]
        wire.send(EVENTS + b"\r\n" + chunk(b"data: 1" + edge + (b"data: " if is_halfway else b"")))
        if is_halfway:
            assert going_on.wait(PATIENCE)
            wire.send(chunk(b"2" + edge))
        while wire.fill():
            pass
        left.append(path)
        return False

    running = gateway(in_front_of(upstream(behave).url) | {"server": {"drain_timeout": 10}})
    with ExitStack() as stack:
        clients = {path: stack.enter_context(RawClient(running.port)) for path in streams}
        for path, client in clients.items():
            client.request("GET", path.decode())
            assert client.read_until(b"data: 1") is not None
        time.sleep(0.05)
        stop(running)
        going_on.set()
        for path, (edge, is_halfway) in streams.items():
            with case(edge, is_halfway):
                rest = clients[path].read_until(b"0\r\n\r\n")
                assert rest is not None, "the stream ends like a complete response"
                assert (b"2" + edge in rest) == is_halfway
        for path, client in clients.items():
            with case(path):
                assert client.is_closed()
    eventually(lambda: sorted(left) == sorted(streams), "the upstream is let go")


def _nothing(wire: Wire, _request: RawRequest) -> None:
    wire.read_exactly(1)


def _half(wire: Wire, _request: RawRequest) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    wire.read_exactly(1)


def _half_in_chunks(wire: Wire, _request: RawRequest) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
    wire.read_exactly(1)


def _switched(wire: Wire, _request: RawRequest) -> None:
    wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    wire.read_until(b"never")


CUT_OFF: tuple[tuple[str, Behaviour, tuple[str, ...], bytes, int], ...] = (
    ("before-the-head", _nothing, (), b"", 499),
    ("counted", _half, (), b"half", 200),
    ("chunked", _half_in_chunks, (), b"half", 200),
    ("tunnel", _switched, ("Connection: Upgrade", "Upgrade: websocket"), b"101", 101),
)


@pytest.mark.parametrize("is_first", [True, False], ids=["new connection", "kept connection"])
def test_what_the_drain_cuts_off_is_logged_as_such(tmp_path: Path, upstream: Upstreams, *, is_first: bool) -> None:
    behaviours = {f"/up/{name}".encode(): behave for name, behave, *_ in CUT_OFF}

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        return behaviours.get(request.line.split()[1], reply())(wire, request)

    up = upstream(behave)
    config = config_file(tmp_path, up.url, "server: {drain_timeout: 1}\n")
    with process(*WAYS["python -m"], "--config", config, cwd=tmp_path) as running, ExitStack() as stack:
        for name, _, headers, first, _ in CUT_OFF:
            path = f"/up/{name}".encode()
            client = stack.enter_context(RawClient(running.port))
            if not is_first:  # then the next request finds a connection to the upstream and takes the fast path
                assert client.get("/api/up/before").status == 200
            client.request("GET", f"/api/up/{name}", headers)
            if first:
                assert client.read_until(first)
            else:
                eventually(lambda: any(one.line.split()[1:2] == [path] for one in up.requests), "it has arrived")  # noqa: B023
        assert running.terminate() == 4
        lines = {line["path"]: line for line in running.logged if "path" in line}
    for name, _, _, _, status in CUT_OFF:
        with case(name):
            line = lines[f"/api/up/{name}"]
            assert (line["status"], line["reason"]) == (status, "draining")
            assert line["detail"] == "The gateway stopped before the response was complete."
