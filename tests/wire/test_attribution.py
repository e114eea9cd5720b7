"""To whom each end of an attempt is attributed: what a client or this process brings about counts against no upstream.

Each row of the attribution table has a scene, on the fast path and on the general one where both can see it: a GET
with an odd header uses the general one. In the scenes after the table the breaker opens at the first failure that
counts.
"""

import asyncio
import errno
import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from api_gateway.models import Outcome
from api_gateway.proxy.attribution import (
    ANY,
    ATTRIBUTIONS,
    AWAITED,
    MAX_CLIENT_PAUSE,
    NOT_AWAITED,
    NOT_PUNCTUAL,
    NOT_SENT,
    PUNCTUAL,
    SENT,
    Attribution,
    Cause,
    ClientStates,
    DetectedAt,
    ResponsibleParty,
)
from tests.kit import (
    PATIENCE,
    Behaviour,
    FakeClocks,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    case,
    eventually,
    in_front_of,
    refusing_url,
    reply,
    running_gateway,
)
from tests.processes import process

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

WAYS = {"fast path": (), "general parser": ("X-Odd:  two blanks",)}
both_ways = pytest.mark.parametrize("way", WAYS)
PAUSE = MAX_CLIENT_PAUSE + 0.3
CHUNKED = ("Transfer-Encoding: chunked",)
LARGE = 48 * 1024 * 1024  # more than both ends of a connection on loopback hold: Linux lets buffers grow to 32 MiB


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


# The table, row by row

# All scenes of a way are played at once, so these times leave each of them room on a busy machine.
LIMIT = 3.0  # seconds: all timeouts of the upstreams
DEADLINE = 3.0  # seconds: the timeout of the routes to `timed`
LITTLE_TIME = 1.5  # seconds: what a client grants
DRIPS = 60  # pieces, one each 0.1 s: they outlast the deadline
NEVER: dict[str, Any] = {"failure_threshold": 10_000, "minimum_calls": 10_000, "window": 3600}
HALF_BODY, REST = b"4\r\nhalf\r\n", b"4\r\nrest\r\n0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"
COUNTED = OK + b"Content-Length: 9\r\n\r\nhalf"
IN_CHUNKS = OK + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
EVENTS = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n8\r\ndata: 1\n\r\n"
SWITCHED = b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
UPGRADE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: a", "Sec-WebSocket-Version: 13")
Act = Callable[[RawClient, RawUpstream, str, tuple[str, ...]], object]


def sends(*pieces: bytes, then: str = "waits", pause: float = 0.0) -> Behaviour:
    """Send pieces, then wait until the gateway closes the connection, close it, or reset it."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        for piece in pieces:
            wire.send(piece)
            time.sleep(pause)
        if then == "waits":
            wire.sock.settimeout(PATIENCE)
            with suppress(OSError):
                while wire.fill():
                    pass
        elif then == "resets":
            wire.reset()
        return then == "goes on"

    return behave


def waits_before(behave: Behaviour) -> Behaviour:
    """Respond later than a slow call."""

    def after_a_while(wire: Wire, request: RawRequest) -> bool | None:
        time.sleep(0.15)
        return behave(wire, request)

    return after_a_while


def asks(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("GET", target, headers)
    client.answer()


def sends_half(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("POST", target, (*headers, *CHUNKED), HALF_BODY)
    client.answer()


def sends_the_rest_late(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    """Use up more than half of the time."""
    client.request("POST", target, (*headers, *CHUNKED), HALF_BODY)
    time.sleep(DEADLINE * 0.6)
    client.send(REST)
    client.answer()


def expects_100(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("POST", target, (*headers, "Content-Length: 4", "Expect: 100-continue"))
    client.answer()


def sends_too_much(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("POST", target, (*headers, *CHUNKED), b"2000\r\n%b\r\n" % bytes(0x2000))
    assert client.answer().status == 413


def has_little_time(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("GET", target, (*headers, f"X-Request-Timeout: {LITTLE_TIME}"))
    client.answer()


def leaves(client: RawClient, up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    """Disconnect once the request has reached the upstream."""
    count = len(up.requests)
    client.request("GET", target, headers)
    eventually(lambda: len(up.requests) > count, "the request is with the upstream")
    client.close()


def leaves_after_a_head(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("GET", target, headers)
    assert client.read_until(b"\r\n\r\n") is not None
    client.close()


def stays_to_the_end(client: RawClient, _up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    client.request("GET", target, headers)
    while client.fill():
        pass


def follows_another(client: RawClient, up: RawUpstream, target: str, headers: tuple[str, ...]) -> None:
    """Ask while another client has the only connection."""
    with RawClient(client.sock.getpeername()[1]) as other:
        count = len(up.requests)
        other.request("GET", target, headers)
        eventually(lambda: len(up.requests) > count, "the other request is with the upstream")
        client.request("GET", target, headers)
        answer = client.answer()
        assert (answer.status, reason(answer.body)) == (503, "overloaded")


@dataclass(frozen=True)
class Scene:
    """How one row of the table comes about. `more` is the outcome of what has counted before the cause."""

    name: str
    cause: Cause
    phase: DetectedAt
    behave: Behaviour = field(default_factory=reply)
    act: Act = asks
    client: ClientStates = ANY
    upstream: str = "up"
    headers: tuple[str, ...] = ()
    ways: tuple[str, ...] = tuple(WAYS)
    more: Outcome | None = None

    @property
    def row(self) -> Attribution:
        """The row of the table."""
        (found,) = (
            row for row in ATTRIBUTIONS if (row.cause, row.phase, row.client) == (self.cause, self.phase, self.client)
        )
        return found


GENERAL = ("general parser",)  # the fast path has no part in it
BEFORE, AT, WITHIN = DetectedAt.AWAITING_HEAD, DetectedAt.HEAD, DetectedAt.BODY
SUCCESS = Outcome.SUCCESS
SCENES = (
    Scene("no such id", Cause.NOT_ATTEMPTED, DetectedAt.ADMISSION, headers=("X-Client-ID: \xff",)),
    Scene("pool in use", Cause.NO_CONNECTION, DetectedAt.CONNECTING, sends(), follows_another, upstream="narrow"),
    Scene("refuses", Cause.CONNECT_ERROR, DetectedAt.CONNECTING, upstream="absent"),
    Scene("no TLS", Cause.CONNECT_ERROR, DetectedAt.CONNECTING, upstream="plain"),
    Scene("TLS hangs", Cause.CONNECT_TIMEOUT, DetectedAt.CONNECTING, upstream="mute"),
    # Before the head
    Scene("closes", Cause.LOST, BEFORE, sends(b"HTTP", then="closes"), client=PUNCTUAL),
    Scene("resets", Cause.LOST, BEFORE, sends(b"HTTP", then="resets"), client=PUNCTUAL),
    Scene("closes early", Cause.LOST, BEFORE, sends(then="closes"), sends_half, NOT_PUNCTUAL, ways=GENERAL),
    Scene("no HTTP", Cause.INVALID, BEFORE, sends(b"SSH-2.0\r\n\r\n"), client=PUNCTUAL),
    Scene("switches unasked", Cause.INVALID, BEFORE, sends(SWITCHED), client=PUNCTUAL),
    Scene("no HTTP early", Cause.INVALID, BEFORE, sends(b"SSH-2.0\r\n\r\n"), sends_half, NOT_PUNCTUAL, ways=GENERAL),
    Scene("never answers", Cause.TIMEOUT, BEFORE, sends(), client=NOT_AWAITED),
    Scene("client never sends", Cause.TIMEOUT, BEFORE, sends(), expects_100, AWAITED, ways=GENERAL),
    Scene("own deadline", Cause.CLIENT_DEADLINE, BEFORE, sends(), has_little_time, ways=GENERAL),
    Scene("deadline", Cause.UPSTREAM_DEADLINE, BEFORE, sends(), upstream="timed", ways=GENERAL),
    Scene("late upload", Cause.SHARED_DEADLINE, BEFORE, sends(), sends_the_rest_late, upstream="timed", ways=GENERAL),
    Scene("client leaves", Cause.ABORTED_BY_CLIENT, BEFORE, sends(), leaves, upstream="timed"),
    Scene("body too large", Cause.ABORTED_BY_CLIENT, BEFORE, sends(), sends_too_much, ways=GENERAL),
    Scene(
        "no time to connect", Cause.ABORTED_BY_GATEWAY, BEFORE, sends(), has_little_time, upstream="mute", ways=GENERAL
    ),
    Scene("hints only", Cause.INTERIM, BEFORE, sends(HINTS), leaves_after_a_head),
    # The head
    *(
        Scene(f"{status}", Cause.SERVER_ERROR, AT, reply(b"no", b"%d No" % status, headers), client=SENT)
        for status, headers in ((500, ()), (501, ()), (503, ((b"Retry-After", b"1"),)), (504, ()))
    ),
    Scene("500 early", Cause.SERVER_ERROR, AT, reply(b"no", b"500 No"), sends_half, NOT_SENT, ways=GENERAL),
    *(
        Scene(f"slow {status.decode()}", Cause.SLOW, AT, waits_before(reply(b"ok", status)), upstream="slow")
        for status in (b"200 OK", b"404 No")
    ),
    Scene("event stream", Cause.STREAM_BEGUN, AT, sends(EVENTS), leaves_after_a_head),
    Scene("tunnel", Cause.STREAM_BEGUN, AT, sends(SWITCHED), leaves_after_a_head, headers=UPGRADE, ways=GENERAL),
    *(
        Scene(
            name, Cause.STREAM_ENDED, DetectedAt.STREAM, behave, act, upstream=upstream, headers=headers, more=SUCCESS
        )
        for name, behave, act, upstream, headers in (
            ("quiet stream", sends(EVENTS), stays_to_the_end, "up", ()),
            ("reset stream", sends(EVENTS, then="resets"), stays_to_the_end, "up", ()),
            ("closed stream", sends(EVENTS, then="closes"), stays_to_the_end, "up", ()),
            ("garbled stream", sends(EVENTS, b"oops\r\n", pause=1.0), stays_to_the_end, "up", ()),
            ("overdue stream", sends(*[EVENTS, *[b"1\r\n\n\r\n"] * DRIPS], pause=0.1), stays_to_the_end, "timed", ()),
            ("quiet tunnel", sends(SWITCHED), stays_to_the_end, "up", UPGRADE),
            ("reset tunnel", sends(SWITCHED, then="resets"), stays_to_the_end, "up", UPGRADE),
        )
    ),
    # Within the body
    *(
        Scene(f"{status.decode()}", Cause.COMPLETE, WITHIN, reply(b"", status))
        for status in (b"200 OK", b"302 Go", b"401 Who", b"403 No", b"404 No", b"429 Later")
    ),
    Scene("ends early", Cause.LOST, WITHIN, sends(COUNTED, then="closes"), client=PUNCTUAL),
    Scene("resets within", Cause.LOST, WITHIN, sends(COUNTED, then="resets"), client=PUNCTUAL),
    Scene("ends chunks early", Cause.LOST, WITHIN, sends(IN_CHUNKS, then="closes"), client=PUNCTUAL),
    Scene(
        "gives up on an upload",
        Cause.LOST,
        WITHIN,
        sends(IN_CHUNKS, then="closes"),
        sends_half,
        NOT_PUNCTUAL,
        ways=GENERAL,
    ),
    Scene("sends too much", Cause.INVALID, WITHIN, sends(COUNTED, b"-done and more", pause=0.1), client=PUNCTUAL),
    Scene("garbles chunks", Cause.INVALID, WITHIN, sends(IN_CHUNKS, b"oops\r\n", pause=0.1), client=PUNCTUAL),
    Scene(
        "garbles early",
        Cause.INVALID,
        WITHIN,
        sends(IN_CHUNKS, b"oops\r\n", pause=1.0),
        sends_half,
        NOT_PUNCTUAL,
        ways=GENERAL,
    ),
    Scene("stalls within", Cause.TIMEOUT, WITHIN, sends(COUNTED), client=NOT_AWAITED),
    Scene("stalls within chunks", Cause.TIMEOUT, WITHIN, sends(IN_CHUNKS), client=NOT_AWAITED),
    Scene("awaits the upload", Cause.TIMEOUT, WITHIN, sends(IN_CHUNKS), sends_half, AWAITED, ways=GENERAL),
    Scene("own deadline within", Cause.CLIENT_DEADLINE, WITHIN, sends(COUNTED), has_little_time, ways=GENERAL),
    Scene(
        "deadline within",
        Cause.UPSTREAM_DEADLINE,
        WITHIN,
        sends(OK, b"Content-Length: 99\r\n\r\n", *[b"x"] * DRIPS, pause=0.1),
        upstream="timed",
        ways=GENERAL,
    ),
    Scene(
        "late upload, head",
        Cause.SHARED_DEADLINE,
        WITHIN,
        sends(COUNTED),
        sends_the_rest_late,
        upstream="timed",
        ways=GENERAL,
    ),
    Scene("client leaves within", Cause.ABORTED_BY_CLIENT, WITHIN, sends(COUNTED), leaves_after_a_head),
    Scene("client leaves chunks", Cause.ABORTED_BY_CLIENT, WITHIN, sends(IN_CHUNKS), leaves_after_a_head),
)
ELSEWHERE = {  # no request with such a body passes the server, see tests/unit/test_attribution.py; and the drain
    *(row for row in ATTRIBUTIONS if row.cause is Cause.UNSENDABLE),
    *(row for row in ATTRIBUTIONS if row.cause is Cause.ABORTED_BY_GATEWAY and row.phase is WITHIN),
}


class Greeter(RawUpstream):
    """A server that sends bytes of another protocol at once, and closes."""

    def _serve(self, wire: Wire) -> None:
        with suppress(OSError):
            wire.send(b"SSH-2.0\r\n")
            wire.fill()
        wire.close()


@dataclass
class Stage:
    """A scene with an upstream of its own, its server, and the client who acts."""

    scene: Scene
    name: str
    running: RunningGateway
    up: RawUpstream
    client: RawClient
    before: tuple[int, ...] = ()

    @property
    def target(self) -> str:
        return f"/api/{self.name}/x"

    @property
    def upstream(self) -> Any:
        return self.running.live.upstreams[self.name]

    def counts(self) -> tuple[int, ...]:
        """Return calls and failures in the window of the upstream's breaker, and all slow calls."""
        breaker = self.upstream.breaker
        return (*breaker.window_counts(time.monotonic())[:2], breaker.slow_total)

    def prepare(self) -> None:
        """Have the gateway keep a connection, if there can be one; what follows is the scene's."""
        self.up.behave, self.up.reads_body = reply(), False
        if self.scene.upstream not in NOT_OF_THE_SCENE:
            with RawClient(self.running.port) as client:
                assert client.get(self.target).status == 200

    def play(self, way: str) -> None:
        """Have the client act."""
        with suppress(OSError), case(self.scene.name):
            self.scene.act(self.client, self.up, self.target, (*WAYS[way], *self.scene.headers))

    def check(self) -> None:
        """Compare what has been counted with the row of the table."""
        row = self.scene.row
        calls, failures = EXPECTED[self.scene.more or row.outcome]
        expected = (self.before[0] + calls, self.before[1] + failures, self.before[2] + (row.cause is Cause.SLOW))
        assert self.counts() == expected
        if row.outcome is Outcome.FAILURE:
            assert (self.upstream.breaker._failing_principals.last is None) == (row.party is ResponsibleParty.TARGET)
        assert self.upstream.targets[0].in_flight == 0


NOT_OF_THE_SCENE = ("absent", "plain", "mute")  # the upstreams whose server is not that of the scene


@contextmanager
def stages(way: str, state_dir: Path) -> Iterator[list[Stage]]:
    """Yield the scenes of a way, each with an upstream of its own in one gateway."""
    scenes = {f"{number}-{scene.upstream}": scene for number, scene in enumerate(SCENES) if way in scene.ways}
    with ExitStack() as stack:
        plain = Greeter()
        stack.callback(plain.close)
        mute = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        others = {
            "absent": refusing_url(),
            "plain": plain.url.replace("http", "https"),
            "mute": f"https://127.0.0.1:{mute.getsockname()[1]}",
        }
        servers = {name: RawUpstream() for name in scenes}
        for server in servers.values():
            stack.callback(server.close)
        kinds: dict[str, dict[str, Any]] = {
            "narrow": {
                "pool": {"max_connections": 1},
                "timeouts": {"connect": 2 * LIMIT, "response": PATIENCE, "idle": PATIENCE},
            },
            "slow": {"circuit_breaker": {**NEVER, "slow_call_duration": 0.1, "slow_call_rate": 1}},
            "timed": {"timeouts": {"connect": PATIENCE, "response": PATIENCE, "idle": PATIENCE}},
        }
        usual = {
            "timeouts": {"connect": LIMIT, "response": LIMIT, "idle": LIMIT, "tunnel": LIMIT},
            "circuit_breaker": NEVER,
            "retry": {"attempts": 1},
        }
        configuration = {
            "upstreams": {
                name: {"targets": [{"url": others.get(scene.upstream, servers[name].url)}], **usual}
                | kinds.get(scene.upstream, {})
                for name, scene in scenes.items()
            },
            "routes": [
                {"name": name, "path": f"/api/{name}", "upstream": name}
                | ({"timeout": DEADLINE} if scene.upstream == "timed" else {})
                for name, scene in scenes.items()
            ],
            "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
            "server": {"max_body_bytes": 4096},
        }
        running = stack.enter_context(running_gateway(configuration, state_dir))
        yield [
            Stage(scene, name, running, servers[name], stack.enter_context(RawClient(running.port)))
            for name, scene in scenes.items()
        ]


EXPECTED = {Outcome.SUCCESS: (1, 0), Outcome.FAILURE: (1, 1), Outcome.IGNORED: (0, 0)}


@both_ways
def test_the_rows_of_the_table(tmp_path: Path, fast_path_spy: list[bool], way: str) -> None:
    """All scenes at once, as most of them wait for a time-out."""
    with stages(way, tmp_path) as played, ThreadPoolExecutor(len(played)) as actors:
        recorder = played[0].running.live.recorder
        for stage in played:
            stage.prepare()
        eventually(lambda: bool(recorder.in_flight == 0), "what prepares the scenes is over")
        fast_path_spy.clear()
        for stage in played:
            stage.before, stage.up.behave = stage.counts(), stage.scene.behave
        acts = [actors.submit(stage.play, way) for stage in played]
        failures = [failure for act in acts if (failure := act.exception(2 * PATIENCE)) is not None]
        if failures:
            raise BaseExceptionGroup("what the clients did", failures)
        eventually(lambda: bool(recorder.in_flight == 0), "the exchanges are over")
        for stage in played:
            try:
                stage.check()
            except AssertionError as failure:
                failure.add_note(f"in the scene {stage.scene.name}")
                failures.append(failure)
    if failures:
        raise BaseExceptionGroup("what has been counted", failures)
    if way == "general parser":
        assert not any(fast_path_spy)


def test_every_row_of_the_table_has_a_test() -> None:
    assert {scene.row for scene in SCENES} == set(ATTRIBUTIONS) - ELSEWHERE


@pytest.mark.parametrize(
    "error",
    [socket.gaierror(socket.EAI_NONAME, "unknown"), ConnectionRefusedError(errno.ECONNREFUSED, "refused")]
    + [OSError(number, os.strerror(number)) for number in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)]
    + [ssl.SSLCertVerificationError("certificate verify failed")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_name_the_network_or_tls_counts_against_the_target(
    gateway: StartGateway, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    running = gateway(sections(upstream().url))
    breaker = running.live.upstreams["up"].breaker

    async def create_connection(*_: Any, **__: Any) -> Any:
        raise error

    for loop in (asyncio.BaseEventLoop, uvloop.Loop):
        monkeypatch.setattr(loop, "create_connection", create_connection)
    with RawClient(running.port) as client:
        assert client.get().status in (502, 504)
    assert counted(running) == 1
    assert breaker.state == "OPEN", "no client can have caused it"


@both_ways
@pytest.mark.parametrize("is_begun", [False, True], ids=["before the head", "within the body"])
def test_what_is_cut_off_at_the_end_of_the_drain_is_no_failure(
    gateway: StartGateway, upstream: StartUpstream, way: str, *, is_begun: bool
) -> None:
    up = upstream()
    running = gateway(sections(up.url, circuit_breaker=NEVER) | {"server": {"drain_timeout": 0.1}})
    warm(running)
    up.behave = sends(COUNTED) if is_begun else sends()
    breaker = running.live.upstreams["up"].breaker
    eventually(lambda: breaker.window_counts(time.monotonic()).calls == 1, "the first call is counted")
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", WAYS[way])
        eventually(lambda: len(up.requests) == 2, "it is with the upstream")
        if is_begun:
            assert client.read_until(b"\r\n\r\n") is not None
        running.stop()
    assert breaker.window_counts(time.monotonic())[:2] == (1 + is_begun, 0)


@both_ways
def test_a_client_that_is_too_slow_to_read_is_no_failure(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """The gateway ends the exchange, as a write to the client makes no progress."""
    up = upstream(sends_much(None))
    running = gateway(sections(up.url, circuit_breaker=NEVER) | {"server": {"idle_timeout": 0.5, "drain_timeout": 1}})
    warm(running)
    breaker = running.live.upstreams["up"].breaker
    with RawClient(running.port) as client:
        client.request("GET", "/api/x", WAYS[way])
        eventually(lambda: running.live.recorder.in_flight == 1, "it is under way")
        eventually(lambda: running.live.recorder.in_flight == 0, "the gateway gives up on the client")
    assert breaker.window_counts(time.monotonic())[:2] == (2, 0)


def test_a_client_that_is_too_slow_to_send_is_no_failure(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream(sends(), reads_body=False)
    running = gateway(sections(up.url, circuit_breaker=NEVER) | {"server": {"idle_timeout": 0.5, "drain_timeout": 1}})
    breaker = running.live.upstreams["up"].breaker
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", CHUNKED, HALF_BODY)
        eventually(lambda: running.live.recorder.in_flight == 1, "it is under way")
        eventually(lambda: running.live.recorder.in_flight == 0, "the gateway gives up on the client")
    assert breaker.window_counts(time.monotonic())[:2] == (0, 0)


# Recovery


RECOVERING = {"failure_threshold": 1, "jitter": 0, "recovery_timeout": 30, "ramp": 0}


def recovering(gateway: Callable[..., RunningGateway], up: RawUpstream, way: str) -> RunningGateway:
    """Return a gateway whose breaker is HALF_OPEN with the next request."""
    clocks = FakeClocks()
    running = gateway(sections(up.url, circuit_breaker=RECOVERING), clocks.clocks)
    warm(running)
    up.behave = reply(b"no", b"500 No")
    with RawClient(running.port) as client:
        assert client.get(headers=WAYS[way]).status == 500
        assert client.get(headers=WAYS[way]).status == 503
    clocks.advance(31)
    return running


@both_ways
@pytest.mark.parametrize("status", [b"200 OK", b"304 Same", b"401 Who", b"403 No", b"404 No", b"429 Later"])
def test_a_probe_with_a_status_below_500_closes_the_breaker(
    gateway: Callable[..., RunningGateway], upstream: StartUpstream, status: bytes, way: str
) -> None:
    up = upstream()
    running = recovering(gateway, up, way)
    up.behave = reply(b"", status)
    with RawClient(running.port) as client:
        assert client.get(headers=WAYS[way]).status == int(status[:3])
    eventually(lambda: running.live.upstreams["up"].breaker.state == "CLOSED", "the probe is settled")


@both_ways
@pytest.mark.parametrize("status", [b"500 No", b"503 Later"])
def test_a_probe_with_a_server_error_opens_it_again(
    gateway: Callable[..., RunningGateway], upstream: StartUpstream, status: bytes, way: str
) -> None:
    up = upstream()
    running = recovering(gateway, up, way)
    up.behave = reply(b"", status, ((b"Retry-After", b"7"),))
    with RawClient(running.port) as client:
        assert client.get(headers=WAYS[way]).all("retry-after") == [b"7"]
        assert client.get(headers=WAYS[way]).status == 503
    breaker = running.live.upstreams["up"].breaker
    assert (breaker.state, breaker.opened_total) == ("OPEN", 2)


@both_ways
@pytest.mark.parametrize("head", [COUNTED, IN_CHUNKS, EVENTS], ids=["counted", "chunks", "events"])
def test_a_probe_whose_client_leaves_after_the_head_closes_the_breaker(
    gateway: Callable[..., RunningGateway], upstream: StartUpstream, head: bytes, way: str
) -> None:
    """Else an upstream whose clients all leave within the body, such as players of videos, would never recover."""
    up = upstream()
    running = recovering(gateway, up, way)
    up.behave = sends(head)
    with RawClient(running.port) as client:
        leaves_after_a_head(client, up, "/api/x", WAYS[way])
    eventually(lambda: running.live.upstreams["up"].breaker.state == "CLOSED", "it closes")


@both_ways
def test_a_probe_whose_client_leaves_before_the_head_leaves_its_place_to_the_next(
    gateway: Callable[..., RunningGateway], upstream: StartUpstream, way: str
) -> None:
    up = upstream()
    running = recovering(gateway, up, way)
    breaker = running.live.upstreams["up"].breaker
    up.behave = sends()
    with RawClient(running.port) as client:
        leaves(client, up, "/api/x", WAYS[way])
    eventually(lambda: breaker.probes_in_flight == 0, "the permit is given back")
    assert breaker.state == "HALF_OPEN"
    up.behave = reply()
    with RawClient(running.port) as client:
        assert client.get(headers=WAYS[way]).status == 200
    assert breaker.state == "CLOSED"


# Event streams


@pytest.mark.parametrize("count", [5, 50])
def test_event_streams_that_fall_silent_open_no_breaker_and_an_upstream_without_heads_does(
    gateway: StartGateway, upstream: StartUpstream, count: int
) -> None:
    up = upstream(sends(EVENTS))
    timeouts = {"response": 1.0, "idle": 0.3}
    running = gateway(sections(up.url, circuit_breaker={"jitter": 0}, timeouts=timeouts, retry={"attempts": 1}))
    breaker = running.live.upstreams["up"].breaker
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(count)]
        for client in clients:
            client.request()
        for client in clients:
            answer = client.answer()
            assert (answer.status, answer.is_complete) == (200, False)
    eventually(lambda: running.live.recorder.in_flight == 0, "all are over")
    assert (breaker.state, breaker.window_counts(time.monotonic())[:2]) == ("CLOSED", (count, 0))
    up.behave = sends()
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(count)]
        for client in clients:
            client.request()
        assert {client.answer().status for client in clients} <= {503, 504}
    assert breaker.state == "OPEN"


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
    breaker = {"failure_threshold": 1, "slow_call_duration": 1.0, "slow_call_rate": 0.01, "minimum_calls": 1}
    up = upstream()
    running = gateway(sections(up.url, circuit_breaker=breaker, timeouts={"response": 1.0}))
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", CHUNKED, b"4\r\nhalf\r\n")
        time.sleep(1.3)
        client.send(b"4\r\nrest\r\n0\r\n\r\n")
        assert client.answer().status == 200
    assert counted(running) == 0
    assert running.live.upstreams["up"].breaker.slow_total == 0
    latency = ask(f"{running.url}/metrics/latency").json()["upstreams"]["up"]["since_start"]
    assert latency["percentiles_ms"]["p99"] < 1000, latency


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
        wire.sock.settimeout(0.5)
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
    is_over = threading.Event()

    def stalls(_wire: Wire, _request: RawRequest) -> bool:
        is_over.wait(PATIENCE)
        return False

    up = upstream(stalls, reads_body=False)
    running = gateway(sections(up.url, timeouts={"idle": 0.3, "response": 9}))
    with RawClient(running.port) as client:
        sender = threading.Thread(target=send_all, args=(client, LARGE))
        sender.start()
        answer = client.answer()
        client.sock.shutdown(socket.SHUT_RDWR)
        sender.join()
        is_over.set()
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
    running = gateway(sections(up.url, timeouts={"idle": 1.5, "response": 30}))
    with RawClient(running.port) as client:
        sender = threading.Thread(target=send_all, args=(client, LARGE))
        sender.start()
        time.sleep(3.2)  # more than twice the idle timeout, which a busy machine does not exceed otherwise
        answer = client.answer()
        sender.join()
    assert (answer.status, answer.is_complete, len(answer.body)) == (200, True, LARGE)
    assert counted(running) == 0


@pytest.mark.parametrize(("pause", "count"), [(1.6, 0), (0.1, 1)], ids=["slow client", "slow upstream"])
def test_a_deadline_that_the_client_has_used_up_by_its_upload_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream, pause: float, count: int
) -> None:
    up = upstream(lambda wire, _: wire.is_closed() and False)
    running = gateway(sections(up.url, timeouts={"total": 2.0}))
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


def asking_both_ways(running: RunningGateway, stack: ExitStack) -> list[RawClient]:
    """Have clients ask on both paths, which then wait for the same thing."""
    clients = []
    for headers in WAYS.values():
        warm(running)
        clients.append(stack.enter_context(RawClient(running.port)))
        clients[-1].request("GET", "/api/x", headers)
    return clients


def test_a_client_that_pauses_for_longer_than_the_upstream_may_be_idle_is_ignored_by_the_breaker(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    running = gateway(sections(upstream(sends_much(None)).url, timeouts={"idle": 1.0, "response": 1.0}))
    with ExitStack() as stack:
        clients = asking_both_ways(running, stack)
        time.sleep(2.2)
        for client in clients:
            answer = client.answer()
            assert (answer.status, answer.is_complete) == (200, True)
    assert counted(running) == 0


@pytest.mark.parametrize("end", [Wire.close, Wire.reset])
def test_an_upstream_that_gives_up_on_a_client_that_does_not_read_is_not_at_fault(
    gateway: StartGateway, upstream: StartUpstream, end: Any
) -> None:
    given_up: list[Wire] = []

    def give_up(wire: Wire) -> None:
        end(wire)
        given_up.append(wire)

    running = gateway(sections(upstream(sends_much(give_up)).url))
    with ExitStack() as stack:
        clients = asking_both_ways(running, stack)
        eventually(lambda: len(given_up) == len(clients), "the upstream has given up")
        time.sleep(0.5)  # the gateway may notice it
        for client in clients:
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
        time.sleep(4)  # more than half of the time, also if the first piece takes a second
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
    # No descriptor of the gateway is a kept connection to the upstream.
    up = upstream(sends(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", then="closes"))
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

        def refuses() -> bool:
            stack.enter_context(RawClient(port))  # takes a descriptor that a health check has returned
            found = first.get()
            return found.status == 503 and reason(found.body) == "overloaded"

        eventually(refuses, "it refuses")
        time.sleep(0.5)  # some health checks
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
