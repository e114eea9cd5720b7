"""Who is at fault for a failed attempt: what a client or this process brings about counts against no upstream.

The circuit breaker of every scene opens at the first failure that counts. What a plain GET shows on the fast path, a
GET with an odd header or a request with a body shows on the general one.
"""

import asyncio
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from api_gateway.errors import (
    BadRequest,
    Fault,
    GatewayError,
    Overloaded,
    UpstreamConnectError,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.proxy.deadline import Deadline
from api_gateway.proxy.faults import MAX_CLIENT_PAUSE, ClientProgress, fault_of, fault_of_deadline, fault_of_status
from tests.kit import (
    PATIENCE,
    Behaviour,
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
from tests.processes import process

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

WAYS = {"fast path": (), "general path": ("X-Odd:  two blanks",)}
both_ways = pytest.mark.parametrize("way", WAYS)
PAUSE = MAX_CLIENT_PAUSE + 0.3
CHUNKED = ("Transfer-Encoding: chunked",)
LARGE = 16 * 1024 * 1024  # more than both ends of a connection on loopback hold


def sections(url: str, **options: Any) -> dict[str, Any]:
    return in_front_of(url, **{"circuit_breaker": {"failure_threshold": 1, "jitter": 0}, **options})


def counted(running: RunningGateway) -> int:
    """Return the failures that the breaker has counted, in its window or before it opened."""
    breaker = running.live.upstreams["up"].breaker
    return int(breaker.window_counts(time.monotonic()).failures) + int(breaker.opened_total)


def warm(running: RunningGateway) -> None:
    """Have the gateway keep a connection, which the fast path needs."""
    with RawClient(running.port) as client:
        assert client.get("/api/warm").status == 200


def reason(body: bytes) -> str:
    found: str = json.loads(body)["reason"]
    return found


# The table

WHOLE, HALF = ClientProgress(), ClientProgress(has_sent_all=False, is_awaited=True, waited=0.1)
BLOCKED = ClientProgress(has_sent_all=False)  # the upstream does not read on
SLOW = ClientProgress(waited=MAX_CLIENT_PAUSE)


@pytest.mark.parametrize(
    ("error", "client", "fault"),
    [
        (UpstreamReset("x"), WHOLE, Fault.UPSTREAM),
        (UpstreamReset("x"), HALF, Fault.NOBODY),
        (UpstreamReset("x"), BLOCKED, Fault.NOBODY),
        (UpstreamReset("x"), SLOW, Fault.NOBODY),
        (UpstreamProtocolError("x"), WHOLE, Fault.UPSTREAM),
        (UpstreamTimeout("x"), WHOLE, Fault.UPSTREAM),
        (UpstreamTimeout("x"), HALF, Fault.NOBODY),
        (UpstreamTimeout("x"), BLOCKED, Fault.UPSTREAM),
        (UpstreamTimeout("x"), SLOW, Fault.UPSTREAM),
        (UpstreamConnectError("x"), WHOLE, Fault.TARGET),
        (UpstreamConnectError("x"), HALF, Fault.TARGET),
        (Overloaded("x"), WHOLE, Fault.GATEWAY),
        (BadRequest("x"), HALF, Fault.CLIENT),
    ],
)
def test_the_fault_of_an_error(error: GatewayError, client: ClientProgress, fault: Fault) -> None:
    assert fault_of(error, client) is fault


@pytest.mark.parametrize(
    ("status", "client", "fault"),
    [(500, WHOLE, Fault.UPSTREAM), (500, SLOW, Fault.UPSTREAM), (500, HALF, Fault.NOBODY), (404, WHOLE, Fault.CLIENT)],
)
def test_the_fault_of_a_status(status: int, client: ClientProgress, fault: Fault) -> None:
    assert fault_of_status(status, client) is fault


@pytest.mark.parametrize(
    ("source", "spent", "client", "fault"),
    [
        ("client", 10, WHOLE, Fault.CLIENT),
        ("route", 5, WHOLE, Fault.UPSTREAM),
        ("route", 4.9, WHOLE, Fault.NOBODY),
        ("upstream", 10, HALF, Fault.NOBODY),
    ],
)
def test_the_fault_of_a_deadline(source: Any, spent: float, client: ClientProgress, fault: Fault) -> None:
    assert fault_of_deadline(Deadline(100, 10, source, "x", is_forwarded=True), spent, client) is fault


# Uploads


def waits_then(end: Callable[[Wire], None]) -> Behaviour:
    """Read what comes for a while, as a server with a limit on the time of a body does, and end it."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.sock.settimeout(0.2)
        with suppress(TimeoutError):
            while wire.fill():
                pass
        end(wire)
        return False

    return behave


def says(answer: bytes) -> Callable[[Wire], None]:
    return lambda wire: wire.send(b"HTTP/1.1 %b\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno" % answer)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (Wire.close, 502),
        (Wire.reset, 502),
        (says(b"408 Slow"), 408),
        (says(b"500 Oops"), 500),
        (says(b"503 Later"), 503),
    ],
    ids=["closes", "resets", "408", "500", "503"],
)
@pytest.mark.parametrize(
    ("framing", "part"), [(CHUNKED, b"4\r\nhalf\r\n"), (("Content-Length: 100",), b"half")], ids=["chunks", "length"]
)
def test_an_upstream_that_gives_up_on_a_client_that_stops_sending_is_not_at_fault(
    gateway: StartGateway, upstream: StartUpstream, end: Any, status: int, framing: tuple[str, ...], part: bytes
) -> None:
    up = upstream(waits_then(end), reads_body=False)
    running = gateway(sections(up.url))
    for _ in range(2):
        with RawClient(running.port) as client:
            client.request("POST", "/api/x", framing, part)
            assert client.answer().status == status
    assert counted(running) == 0


def test_the_time_a_client_takes_to_send_is_not_the_upstreams(gateway: StartGateway, upstream: StartUpstream) -> None:
    """Neither for the response timeout, nor for slow calls, nor for what is told of the upstream's latency."""
    breaker = {"failure_threshold": 1, "slow_call_duration": 0.3, "slow_call_rate": 0.01, "minimum_calls": 1}
    up = upstream()
    running = gateway(sections(up.url, circuit_breaker=breaker, timeouts={"response": 0.3}))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", CHUNKED, b"4\r\nhalf\r\n")
        time.sleep(0.7)
        client.send(b"4\r\nrest\r\n0\r\n\r\n")
        assert client.answer().status == 200
    assert counted(running) == 0
    assert running.live.upstreams["up"].breaker.slow_total == 0
    latency = ask(f"{running.url}/metrics/latency").json()["upstreams"]["up"]["since_start"]
    assert latency["percentiles_ms"]["p99"] < 300, latency


def test_the_response_timeout_begins_once_all_is_sent(gateway: StartGateway, upstream: StartUpstream) -> None:
    """And then it counts, however slow the client was."""
    up = upstream(lambda wire, _: wire.is_closed() and False)
    running = gateway(sections(up.url, timeouts={"response": 0.3}))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", CHUNKED, b"4\r\nhalf\r\n")
        time.sleep(0.7)
        client.send(b"4\r\nrest\r\n0\r\n\r\n")
        began = time.monotonic()
        answer = client.answer()
    assert (answer.status, reason(answer.body)) == (504, "upstream_timeout")
    assert time.monotonic() - began >= 0.25
    assert counted(running) == 1


@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["no 100", "100"])
def test_a_client_that_expects_100_continue_and_never_sends_its_body_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream, interim: bytes
) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(interim)
        wire.sock.settimeout(0.8)
        with suppress(TimeoutError):
            while wire.fill():
                pass
        return False

    up = upstream(behave, reads_body=False)
    running = gateway(sections(up.url, timeouts={"response": 0.3}))
    for _ in range(2):
        with RawClient(running.port) as client:
            client.request("POST", "/api/x", ("Content-Length: 4", "Expect: 100-continue"))
            assert client.answer().status in (502, 504)
    assert counted(running) == 0


def test_a_response_that_waits_for_the_rest_of_an_upload_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    """The upstream has nothing to send before the client does."""

    def echoes(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        return wire.is_closed() and False

    up = upstream(echoes, reads_body=False)
    running = gateway(sections(up.url, timeouts={"idle": 0.3}))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", CHUNKED, b"4\r\nhalf\r\n")
        answer = client.answer()
    assert (answer.status, answer.is_complete) == (200, False)
    assert counted(running) == 0


def test_an_upstream_that_stops_reading_is_at_fault(gateway: StartGateway, upstream: StartUpstream) -> None:
    def stalls(_wire: Wire, _request: RawRequest) -> bool:
        time.sleep(2)
        return False

    up = upstream(stalls, reads_body=False)
    running = gateway(sections(up.url, timeouts={"idle": 0.3, "response": 9}))
    with RawClient(running.port) as client:
        sender = threading.Thread(target=send_all, args=(client, LARGE))
        sender.start()
        answer = client.answer()
        client.sock.shutdown(socket.SHUT_RDWR)
        sender.join()
    assert (answer.status, reason(answer.body)) == (504, "upstream_timeout")
    assert counted(running) == 1


def send_all(client: RawClient, size: int) -> None:
    with suppress(OSError):
        client.request("POST", "/api/x", (f"Content-Length: {size}",))
        for _ in range(size // 65_536):
            client.send(bytes(65_536))


def test_an_upstream_that_stops_reading_because_the_client_does_not_read_is_not_at_fault(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    """An echo can read no more than it can send."""

    def echoes(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE)
        left = LARGE
        while left and (wire.buffer or wire.fill()):
            data, wire.buffer = wire.buffer, b""
            wire.send(data)
            left -= len(data)
        return False

    up = upstream(echoes, reads_body=False)
    running = gateway(sections(up.url, timeouts={"idle": 0.3, "response": 9}))
    with RawClient(running.port) as client:
        sender = threading.Thread(target=send_all, args=(client, LARGE))
        sender.start()
        time.sleep(1.0)  # thrice the idle timeout
        answer = client.answer()
        sender.join()
    assert (answer.status, answer.is_complete, len(answer.body)) == (200, True, LARGE)
    assert counted(running) == 0


@pytest.mark.parametrize(("pause", "count"), [(0.6, 0), (0.1, 1)], ids=["slow client", "slow upstream"])
def test_a_deadline_that_the_client_has_used_up_by_its_upload_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream, pause: float, count: int
) -> None:
    up = upstream(lambda wire, _: wire.is_closed() and False)
    running = gateway(sections(up.url, timeouts={"total": 0.9}))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", CHUNKED, b"4\r\nhalf\r\n")
        time.sleep(pause)
        client.send(b"0\r\n\r\n")
        assert client.answer().status == 504
    eventually(lambda: counted(running) >= count, "it is settled")
    assert counted(running) == count


# Downloads


def sends_much(end: Callable[[Wire], None] | None, *, first: int = LARGE) -> Behaviour:
    """Send most of a response; end it when it has not been read for a while, as a server with a send timeout does."""

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/warm" in request.line:
            reply()(wire, request)
            return None
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE)
        wire.sock.settimeout(PAUSE + 0.2 if end is not None else PATIENCE)
        try:
            wire.send(bytes(first))
        except TimeoutError:
            assert end is not None
            end(wire)
            return False
        return None if first == LARGE else bool(wire.is_closed() and False)

    return behave


@both_ways
def test_a_client_that_pauses_for_longer_than_the_upstream_may_be_idle_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    up = upstream(sends_much(None))
    running = gateway(sections(up.url, timeouts={"idle": 0.3, "response": 0.3}))
    warm(running)
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", WAYS[way])
        time.sleep(1.0)
        answer = client.answer()
    assert (answer.status, answer.is_complete) == (200, True)
    assert counted(running) == 0


@both_ways
@pytest.mark.parametrize("end", [Wire.close, Wire.reset])
def test_an_upstream_that_gives_up_on_a_client_that_does_not_read_is_not_at_fault(
    gateway: StartGateway, upstream: StartUpstream, end: Any, way: str
) -> None:
    up = upstream(sends_much(end))
    running = gateway(sections(up.url))
    warm(running)
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", WAYS[way])
        time.sleep(PAUSE + 1.0)
        answer = client.answer()
    assert (answer.status, answer.is_complete) == (200, False)
    assert counted(running) == 0


@both_ways
def test_a_response_that_breaks_off_while_it_is_read_is_the_upstreams_fault(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/warm" in request.line:
            return reply()(wire, request)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        return False

    running = gateway(sections(upstream(behave).url))
    warm(running)
    with RawClient(running.port) as client:
        assert not client.get("/api/x", WAYS[way]).is_complete
    eventually(lambda: counted(running) == 1, "it is counted")


def test_a_deadline_that_the_client_has_used_up_by_not_reading_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    """It passes while the upstream is waited for, for the last piece."""
    up = upstream(sends_much(None, first=LARGE - 1))
    running = gateway(sections(up.url, timeouts={"total": 5}))
    with RawClient(running.port) as client:
        client.request("GET", "/api/x")
        time.sleep(3)
        answer = client.answer()
    assert (answer.status, answer.is_complete) == (200, False)
    assert counted(running) == 0


# A lack of the gateway's own

LACKS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS)


def lacking(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have no connection be opened by any event loop for the length of a test."""

    async def create_connection(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    for loop in (asyncio.BaseEventLoop, uvloop.Loop):
        monkeypatch.setattr(loop, "create_connection", create_connection)


@pytest.mark.parametrize("number", LACKS, ids=errno.errorcode.get)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_lack_of_local_resources_is_503_overloaded_costs_nothing_and_is_ignored_by_the_breaker(
    gateway: StartGateway,
    upstream: StartUpstream,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    method: str,
) -> None:
    up = upstream()
    check = {"path": "/health", "interval": 0.05, "timeout": 30, "unhealthy_threshold": 1}
    slowly = {"tiers": {"FREE": {"rate": 0.001, "capacity": 10}}}
    running = gateway(sections(up.url, health_check=check) | slowly)
    target = running.live.upstreams["up"].targets[0]
    eventually(lambda: target.checks.at is not None, "it is checked")
    before = len(up.requests)
    lacking(monkeypatch, number)
    body, framing = (b"ok", ("Content-Length: 2",)) if method == "POST" else (b"", ())
    for _ in range(3):
        with RawClient(running.port) as client:
            client.request(method, "/api/x", framing, body)
            answer = client.answer()
        assert (answer.status, reason(answer.body)) == (503, "overloaded")
        assert answer.all("retry-after") == [b"1"]
        assert answer.all("x-ratelimit-remaining") == [b"10"]
    time.sleep(0.3)  # six health checks
    assert target.is_healthy
    assert counted(running) == 0
    assert before <= len(up.requests)
    lines = [one.message for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(lines) == 1, lines
    assert os.strerror(number) in lines[0]


def test_a_second_attempt_without_a_descriptor_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept connection was closed by the upstream meanwhile: the request goes out once more, on a new one."""
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/warm" in request.line:
            return reply()(wire, request)
        gate.wait(PATIENCE)
        return False

    running = gateway(sections(upstream(behave).url))
    warm(running)
    with RawClient(running.port) as client:
        client.request()
        eventually(lambda: running.live.upstreams["up"].targets[0].in_flight == 1, "it is sent")
        lacking(monkeypatch, errno.EMFILE)
        gate.set()
        answer = client.answer()
    assert (answer.status, reason(answer.body)) == (503, "overloaded")
    assert counted(running) == 0


def test_an_unreachable_address_is_not_mistaken_for_a_lack_of_ports(
    gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connecting to ::1 fails with EADDRNOTAVAIL too where there is no IPv6. This one lacks its zone."""
    running = gateway(sections("http://[fe80::1]:9"))
    lacking(monkeypatch, errno.EADDRNOTAVAIL)
    with RawClient(running.port) as client:
        assert client.get().status == 502
    assert counted(running) == 1


def serves(url: str) -> bool:
    with suppress(OSError):  # a connection that was accepted while no descriptor was free is reset
        return ask(url).status == 200
    return False


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="limits are read in /proc")
def test_the_limit_of_open_files_is_raised_and_its_end_is_503(upstream: StartUpstream, tmp_path: Path) -> None:
    """With a hard limit of 200: what is held open by clients leaves nothing for the upstream."""
    up = upstream()
    check = {"path": "/health", "interval": 0.1, "timeout": 1, "unhealthy_threshold": 1}
    config = sections(up.url, health_check=check) | {
        "state_dir": str(tmp_path / "state"),
        "server": {"max_connections": 1000},  # more than there are descriptors for
    }
    (tmp_path / "gateway.yaml").write_text(json.dumps(config))
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200));"
        "sys.argv[1:] = ['--port', '0', '--config', 'gateway.yaml'];"
        "runpy.run_module('api_gateway', run_name='__main__')"
    )
    with process("-c", script, cwd=tmp_path) as running, ExitStack() as stack:
        port = running.port
        limits = Path(f"/proc/{running.popen.pid}/limits").read_text()
        assert next(line.split()[3:5] for line in limits.splitlines() if "open files" in line) == ["200", "200"]
        first = stack.enter_context(RawClient(port))
        assert first.get("/healthz").status == 200
        for _ in range(200):
            stack.enter_context(RawClient(port))
        folder = Path(f"/proc/{running.popen.pid}/fd")
        eventually(lambda: sum(1 for _ in folder.iterdir()) >= 199, "all descriptors are taken")
        time.sleep(0.5)  # some health checks
        answer = first.get()
        assert (answer.status, reason(answer.body)) == (503, "overloaded")
        stack.close()
        eventually(lambda: serves(f"{running.url}/api/x"), "it serves again")
        shown = running.ask("/health").json()["upstreams"]["up"]
        assert (shown["status"], shown["targets"][0]["healthy"]) == ("pass", True)
        assert running.ask("/circuit-breakers").json()["circuit_breakers"]["up"]["opened_total"] == 0
        eventually(lambda: "refused for this" in running.errors, "it is logged")
        assert running.errors.count("refused for this") == 1


# What a client's own deadline ends


@pytest.mark.parametrize("stage", ["connecting", "TLS"])
def test_a_clients_own_deadline_gives_nothing_back_once_a_connection_has_begun(
    gateway: StartGateway, upstream: StartUpstream, stage: str
) -> None:
    slowly = {"tiers": {"FREE": {"rate": 0.001, "capacity": 10}}}
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        if stage == "connecting":
            for _ in range(2):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
        scheme = "https" if stage == "TLS" else "http"
        running = gateway(sections(f"{scheme}://127.0.0.1:{port}", timeouts={"connect": 5}) | slowly)
        for left in (9, 8, 7):
            with RawClient(running.port) as client:
                answer = client.get(headers=("X-Request-Timeout: 0.05",))
            assert (answer.status, reason(answer.body)) == (504, "upstream_timeout")
            assert answer.all("x-ratelimit-remaining") == [b"%d" % left]
        assert counted(running) == 0
