"""Concurrency limits on the wire: what counts as in flight, every way to end, and what operators see."""

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from api_gateway.config import GatewayConfig, load_config
from api_gateway.main import create_app
from api_gateway.settings.diagnostics import ConfigError
from tests.kit import (
    PATIENCE,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reason,
    refusing_url,
    reply,
)
from tests.wire.test_fast_path import ODD
from tests.wire.test_websocket import ASKING, echo, frame

TOKEN = {"Authorization": "Bearer operator"}
NEVER_OPEN = {"failure_threshold": 1_000_000, "minimum_calls": 1_000_000, "per_target": False}
LIMITS: list[dict[str, Any]] = [
    {"name": "slow", "rate": 1000, "capacity": 100_000},
    {"name": "five", "concurrent": {"FREE": 5, "PREMIUM": 7}, "tiers": ["FREE", "PREMIUM"]},
    {"name": "exports", "key": ["client", "route"], "concurrent": 2, "routes": ["exports"]},
]
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    sections = in_front_of(shared.url, retry={"attempts": 2}, circuit_breaker=NEVER_OPEN)
    target = [{"url": shared.url}]
    sections["upstreams"] |= {
        "brief": {"targets": target, "timeouts": {"total": 0.05}, "circuit_breaker": NEVER_OPEN},
        "down": {"targets": [{"url": refusing_url()}], "circuit_breaker": NEVER_OPEN},
    }
    sections["routes"] += [
        {"name": "exports", "path": "/api/exports", "upstream": "up"},
        {"name": "brief", "path": "/api/brief", "upstream": "brief"},
        {"name": "down", "path": "/api/down", "upstream": "down", "fallback": {"upstream": "up"}},
    ]
    sections["tiers"] |= {"PREMIUM": {"rate": 1000, "capacity": 100_000}, "ANY": {"rate": 1000, "capacity": 100_000}}
    return sections | {
        "limits": LIMITS,
        "admin": {"token": "operator", "local": False},
        "clients": {"rich": {"tier": "PREMIUM"}, "any": {"tier": "ANY"}},
    }


@pytest.fixture
def held(up: RawUpstream) -> Iterator[threading.Event]:
    """An upstream whose responses wait for this event."""
    release = threading.Event()
    plain = reply()

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        release.wait(30)
        return plain(wire, request)

    up.behave = behave
    yield release
    release.set()


def begin(stack: ExitStack, port: int, *headers: str, path: str = "/api/x") -> RawClient:
    client = stack.enter_context(RawClient(port))
    client.request("GET", path, headers)
    return client


def in_flight(running: RunningGateway) -> dict[str, int]:
    return dict(running.live.recorder.in_flight_by_limit)


def holding(running: RunningGateway, **counts: int) -> None:
    eventually(lambda: in_flight(running) == {"five": 0, "exports": 0} | counts, f"{counts} are in flight")


def all_returned(running: RunningGateway) -> None:
    holding(running)
    assert not running.server._app.state.gateway.slots.counters


@pytest.mark.parametrize("extra", [(), (ODD,)], ids=["fast path", "general parser"])
def test_five_at_a_time(running: RunningGateway, held: threading.Event, extra: tuple[str, ...]) -> None:
    me = ("X-Client-ID: me", *extra)
    with ExitStack() as stack:
        open_ = [begin(stack, running.port, *me) for _ in range(5)]
        holding(running, five=5)
        refused = begin(stack, running.port, *me).answer()
        assert reason(refused) == (429, "concurrency_exceeded")
        assert refused.all("retry-after") == [b"1"]
        assert refused.all("ratelimit") == [b'"five";r=0']
        assert refused.all("ratelimit-policy")[0].endswith(b', "five";q=5;qu="concurrent-requests"')
        assert json.loads(refused.body)["violated-policies"] == ["five"]
        others = [begin(stack, running.port, f"X-Client-ID: {name}", *extra) for name in ("rich",) * 7 + ("any",) * 9]
        holding(running, five=12)
        assert reason(begin(stack, running.port, "X-Client-ID: rich", *extra).answer())[0] == 429
        held.set()
        assert {one.answer().status for one in (*open_, *others)} == {200}
    all_returned(running)


def test_a_stream_and_a_websocket_count_while_they_are_open(running: RunningGateway, up: RawUpstream) -> None:
    def behave(wire: Wire, request: RawRequest) -> bool:
        if request.all("upgrade"):
            wire.send(SWITCHED)
            echo(wire)
        else:
            wire.send(EVENTS + b"9\r\ndata: x\n\n\r\n")
            while wire.fill():
                pass
        return False

    up.behave = behave
    me = "X-Client-ID: streams"
    with ExitStack() as stack:
        streams = [begin(stack, running.port, me) for _ in range(3)]
        tunnels = [begin(stack, running.port, me, *ASKING) for _ in range(2)]
        for stream in streams:
            assert (stream.read_until(b"\n\n") or b"").startswith(b"HTTP/1.1 200")
        for tunnel in tunnels:
            assert (tunnel.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 101")
            tunnel.send(frame(1, b"x", masked=True))
            assert tunnel.read_exactly(1)
        holding(running, five=5)
        assert reason(begin(stack, running.port, me).answer()) == (429, "concurrency_exceeded")
        assert reason(begin(stack, running.port, me, *ASKING).answer()) == (429, "concurrency_exceeded")
        streams[0].close()
        holding(running, five=4)
        tunnels[0].reset()
        holding(running, five=3)
    all_returned(running)


def test_retries_and_fallbacks_of_a_request_are_one(running: RunningGateway, held: threading.Event) -> None:
    with ExitStack() as stack:
        client = begin(stack, running.port, "X-Client-ID: again", path="/api/down")
        holding(running, five=1)
        held.set()
        assert client.answer().status == 200
    all_returned(running)


def test_a_refused_request_charges_nothing_and_one_without_tokens_takes_no_slot(
    running: RunningGateway, held: threading.Event
) -> None:
    me = "X-Client-ID: nothing"

    def tokens() -> dict[str, float]:
        shown = ask(f"{running.url}/clients/nothing", headers=TOKEN).json()
        return {"": shown["bucket"]["tokens"], **{one["limit"]: one["tokens"] for one in shown["limits"]}}

    with ExitStack() as stack:
        open_ = [begin(stack, running.port, me, path="/api/exports") for _ in range(2)]
        holding(running, five=2, exports=2)
        eventually(lambda: set(tokens().values()) == {100_000.0}, "what was charged is refilled")
        assert reason(begin(stack, running.port, me, path="/api/exports").answer())[0] == 429
        assert set(tokens().values()) == {100_000.0}
        assert in_flight(running) == {"five": 2, "exports": 2}
        held.set()
        assert {one.answer().status for one in open_} == {200}
    all_returned(running)


def test_operators_see_what_is_in_flight_by_name(running: RunningGateway, held: threading.Event) -> None:
    def get(path: str) -> Any:
        return ask(f"{running.url}{path}", headers=TOKEN)

    def explained() -> Any:
        body = {"path": "/api/exports", "client_id": "seen"}
        answer = ask(
            f"{running.url}/explain",
            method="POST",
            headers=TOKEN | {"Content-Type": "application/json"},
            body=json.dumps(body).encode(),
        )
        return answer.json()

    with ExitStack() as stack:
        open_ = [begin(stack, running.port, "X-Client-ID: seen", path="/api/exports") for _ in range(2)]
        holding(running, five=2, exports=2)
        assert reason(begin(stack, running.port, "X-Client-ID: seen", path="/api/exports").answer())[0] == 429
        assert get("/clients/seen").json()["concurrency"] == [
            {"limit": "five", "route": None, "in_flight": 2, "concurrent": 5, "processes": None},
            {"limit": "exports", "route": "exports", "in_flight": 2, "concurrent": 2, "processes": None},
        ]
        told = explained()
        assert [(one["policy"], one["in_flight"], one["allowed"]) for one in told["concurrency"]] == [
            ("five", 2, True),
            ("exports", 2, False),
        ]
        assert (told["result"]["decision"], told["result"]["reason"]) == ("limited", "concurrency_exceeded")
        limits = {one["name"]: one for one in get("/limits").json()["limits"]}
        assert limits["five"]["allowances"][0] == {
            **dict.fromkeys(("rate", "capacity", "quota", "period", "time_zone")),
            "tier": "FREE",
            "concurrent": 5,
        }
        exports = limits["exports"]
        assert (exports["configured_at"], exports["in_flight"], exports["buckets"]) == ("limits[2]", 2, None)
        assert exports["refusals"] >= 1
        assert "client:seen|exports" in [one["value"] for one in exports["heaviest"]]
        tiers = {one["name"]: one["limits"] for one in get("/tiers").json()["tiers"]}
        assert tiers["PREMIUM"] == ["slow", "five", "exports"]
        assert tiers["ANY"] == ["slow", "exports"]
        scraped = get("/metrics?format=prometheus").body.decode()
        assert 'gateway_concurrency_limit_requests_in_flight{limit="exports"} 2.0' in scraped
        assert 'gateway_rate_limit_refusals_total{limit="exports",tier="FREE"}' in scraped
        figures = get("/metrics").json()
        assert figures["rate_limiter"]["in_flight"] == {"five": 2, "exports": 2}
        assert figures["refusals"]["concurrency_exceeded"] >= 1
        held.set()
        assert {one.answer().status for one in open_} == {200}
    all_returned(running)
    assert explained()["result"]["decision"] == "allowed"


# Every way to end

COUNT = 1200
THREADS = 12


def misbehaving(seed: int) -> Callable[[Wire, RawRequest], bool | None]:
    """Return an upstream's behaviour that is chosen at random for each request."""
    choose, lock = random.Random(seed), threading.Lock()
    plain = reply(b"x" * 5000)

    def late(wire: Wire, request: RawRequest) -> bool | None:
        threading.Event().wait(0.1)
        return plain(wire, request)

    ways = [
        *(plain, plain, late, reply(status=b"503 Service Unavailable"), lambda wire, _: wire.reset() or False),
        *(
            lambda _wire, _request: False,
            sending(b"NONSENSE\r\n\r\n"),
            sending(EVENTS + b"9\r\ndata: x\n\n\r\n0\r\n\r\n"),
        ),
        sending(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"),
    ]
    tunnels = [
        sending(SWITCHED),
        sending(SWITCHED + frame(1, b"x")),
        lambda wire, _: wire.send(SWITCHED) or wire.fill(),
    ]

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        with lock:
            way = choose.choice(tunnels if request.all("upgrade") else ways)
        return way(wire, request) and not request.all("upgrade")

    return behave


def sending(data: bytes) -> Callable[[Wire, RawRequest], bool]:
    """Return a behaviour that sends these bytes and closes the connection."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(data)
        return False

    return behave


PATHS = ("/api/x", "/api/exports", "/api/brief", "/api/down")
CLIENTS = ("a", "b", "rich", "any")


def one_request(
    port: int,
    choose: random.Random,
    paths: Sequence[str] = PATHS,
    clients: Sequence[str] = CLIENTS,
    patience: float = PATIENCE,
) -> str:
    """Send a request and end it in one of many ways; return what came of it."""
    path = choose.choice(paths)
    headers = [f"X-Client-ID: {choose.choice(clients)}"]
    if choose.random() < 0.2:
        headers.append(ODD)
    if choose.random() < 0.15:
        headers += ASKING
    way = choose.choice(("read", "read", "read", "reset", "close", "body", "cut body", "part"))
    with RawClient(port) as client:
        client.sock.settimeout(patience)
        if way in ("body", "cut body"):
            client.request("POST", path, (*headers, "Content-Length: 40000"), b"x" * 20_000)
            if way == "cut body":
                client.reset()
                return way
            client.send(b"x" * 20_000)
        else:
            client.request("GET", path, tuple(headers))
        if way == "reset":
            threading.Event().wait(choose.random() * 0.02)
            client.reset()
        elif way == "close":
            client.sock.shutdown(1)
        elif way == "part":
            client.fill()
            client.reset()
        else:
            head = client.read_until(b"\r\n\r\n")
            return "nothing" if head is None else str(RawAnswer(head, b"", is_complete=True).status)
    return way


def test_whatever_ends_a_request_it_returns_its_slots(running: RunningGateway, up: RawUpstream) -> None:
    up.behave = misbehaving(1)
    outcomes: Counter[str] = Counter()
    most = 0

    def many(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(COUNT // THREADS):
            with suppress(OSError):
                outcomes[one_request(running.port, choose)] += 1

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, *in_flight(running).values())
        threading.Event().wait(0.005)
    for thread in threads:
        thread.join()
    assert sum(outcomes.values()) > COUNT * 0.9
    assert {"200", "429", "reset", "cut body", "502"} <= outcomes.keys(), outcomes
    assert most > 1
    all_returned(running)


@pytest.mark.parametrize("http", ["h11", "httptools", "api_gateway.server:protocol"])
def test_whatever_ends_a_request_under_another_server_it_returns_its_slots(
    sections: dict[str, Any], up: RawUpstream, tmp_path: Path, http: str
) -> None:
    up.behave = misbehaving(3)
    config = GatewayConfig.model_validate(
        sections | {"state_dir": tmp_path, "log": {"access": False}, "server": {"max_event_loop_lag": None}}
    )
    app = create_app(config, server_headers=frozenset({b"date", b"server"}))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_config=None))
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    serving.start()
    eventually(lambda: server.started or not serving.is_alive(), "uvicorn starts")
    port, outcomes = int(listener.getsockname()[1]), Counter[str]()

    def many(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(25):
            with suppress(OSError):
                outcomes[one_request(port, choose, patience=1.0)] += 1  # some servers keep a refused handshake open

    threads = [threading.Thread(target=many, args=(seed,)) for seed in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        slots = app.state.gateway.slots
        eventually(lambda: not slots.counters, "all have ended")
        assert {"200", "reset", "502"} <= outcomes.keys(), outcomes
    finally:
        server.should_exit = True
        serving.join(PATIENCE)


@pytest.mark.parametrize("extra", [(), (ODD,)], ids=["fast path", "general parser"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_defect_of_the_gateway_ends_its_exchange_alone(
    running: RunningGateway, up: RawUpstream, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...], method: str
) -> None:
    upstream = running.server._app.state.gateway.upstream_clients["up"].upstream
    all_returned(running)
    before = running.live.recorder.in_flight
    with monkeypatch.context() as patched:
        patched.setattr(upstream, "targets", [])  # it always has one, so selecting one raises
        for _ in range(6):
            with RawClient(running.port) as client:
                length = ("Content-Length: 4",) if method == "POST" else ()
                client.request(method, "/api/x", ("X-Client-ID: defect", *extra, *length), b"ab" if length else b"")
                assert reason(client.answer()) == (500, "internal_error")
                assert client.is_closed()
    all_returned(running)
    assert running.live.recorder.in_flight == before
    with RawClient(running.port) as client:
        assert client.get("/api/x", ("X-Client-ID: defect", *extra)).status == 200


# Mistakes


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"concurrent": 0}, "limits[0].concurrent: must be greater than or equal to 1, got 0"),
        ({"concurrent": "many"}, "limits[0].concurrent: must be a whole number, got 'many'"),
        ({"concurrent": {"FREE": -1}}, "limits[0].concurrent.FREE: must be greater than or equal to 1, got -1"),
        ({"concurrent": {"free": 1, "FREE": 2}}, "limits[0].concurrent: must not name a tier twice"),
        (
            {"concurrent": {"FREE": 5, "BASIC": 6}},
            "limits[0] (one).concurrent: has no number for PREMIUM, ENTERPRISE: add one, or name in tiers those",
        ),
        (
            {"concurrent": {"FREE": 5, "SILVER": 7}, "tiers": ["FREE"]},
            "limits[0] (one).concurrent.SILVER: no such tier, got 'SILVER'; the tiers are FREE, BASIC,",
        ),
        (
            {"concurrent": {"FREE": 5, "BASIC": 6}, "tiers": ["BASIC"]},
            "limits[0] (one).concurrent.FREE: the limit does not apply to this tier: add it to tiers or remove it",
        ),
        ({"rate": 1, "capacity": 1}, "limits[0]: a limit with concurrent has no rate: remove it, or write two limits"),
        ({"quota": 1, "period": "day"}, "limits[0]: a limit with concurrent has no quota: remove it"),
        ({"cost": 2}, "limits[0]: concurrent counts requests, not tokens: remove cost, got 2.0"),
        (
            {"tiers": {"FREE": {"rate": 1, "capacity": 1}}},
            "limits[0]: tiers.FREE: a limit with concurrent has no rate: remove it",
        ),
        ({"key": "claim:x"}, "limits[0] (one).key[0]: needs jwt in identity.sources, as only tokens have claims"),
        ({"name": "free"}, "limits[0] (free).name: is also the name of the tier FREE"),
        ({"routes": ["non"]}, "limits[0] (one).routes[0]: no such route, got 'non'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_mistake_has_place_value_and_remedy(limit: dict[str, Any], message: str, tmp_path: Path) -> None:
    sections = in_front_of("http://127.0.0.1:9")
    sections |= {"limits": [{"name": "one", "concurrent": 5} | limit]}
    path = tmp_path / "gateway.yaml"
    path.write_text(json.dumps(sections))
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    (problem,) = raised.value.problems
    assert message in problem
