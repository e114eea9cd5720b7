"""Overload as clients see it: lower tiers are refused first, without cost to them, on both paths."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from api_gateway.eventloop.lag_sampler import LagSampler
from api_gateway.resilience.event_loop_limit import LAG_SAMPLES
from tests.kit import (
    RawAnswer,
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
from tests.store_kit import StoreServer
from tests.wire.test_websocket import ASKING, SWITCHED, until_it_ends

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

TIERS = ("FREE", "BASIC", "PREMIUM", "ENTERPRISE")
PLACES = 6  # of which the tiers fill 3, 4, 5 and 6
WAYS = {"fast path": (), "general parser": ("X-Odd:  two blanks",)}  # which the general parser reads


class Stage(RawUpstream):
    """An upstream that answers `ok`, but lets requests to /api/held wait until it may go on."""

    def __init__(self) -> None:
        super().__init__(self._act)
        self.go_on = threading.Event()

    def _act(self, wire: Wire, request: RawRequest) -> bool:
        if b"/held" in request.line:
            self.go_on.wait(30)
        elif b"/stream" in request.line:
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
            self.go_on.wait(30)
            wire.send(b"cd")
            return True
        elif b"/events" in request.line:
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            self.go_on.wait(30)
            return False
        elif b"/tunnel" in request.line:
            wire.send(SWITCHED)
            until_it_ends(wire)
            return False
        elif b"/broken" in request.line:
            return False
        reply()(wire, request)
        return True


@pytest.fixture
def stage() -> Iterator[Stage]:
    server = Stage()
    yield server
    server.go_on.set()
    server.close()


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Header lines that make requests take one of the two ways."""
    return WAYS[request.param]


def sections_for(stage: Stage, *, places: int | None = PLACES, **upstream: Any) -> dict[str, Any]:
    concurrency = None if places is None else {"limit": places}
    return in_front_of(stage.url, concurrency=concurrency, **upstream) | {
        "tiers": {tier: {"rate": 0.001 * (rank + 1), "capacity": 1000} for rank, tier in enumerate(TIERS)},
        "clients": {tier.lower(): {"tier": tier} for tier in TIERS}
        | {f"holder-{number}": {"tier": "ENTERPRISE"} for number in range(PLACES)},
    }


@pytest.fixture
def running(stage: Stage, gateway: StartGateway) -> RunningGateway:
    return warm(gateway(sections_for(stage)), stage)


def warm(running: RunningGateway, stage: Stage) -> RunningGateway:
    assert ask(f"{running.url}/api/warm").status == 200
    stage.requests.clear()
    return running


def get(running: RunningGateway, tier: str, way: tuple[str, ...] = (), path: str = "/api/x") -> RawAnswer:
    with RawClient(running.port) as client:
        return client.get(path, (f"X-Client-ID: {tier.lower()}", *way))


def hold(
    stack: ExitStack, running: RunningGateway, count: int, way: tuple[str, ...] = (), path: str = "/api/held"
) -> list[RawClient]:
    """Have requests of the highest tier under way, each of another client: one alone gets half of the places."""
    eventually(lambda: in_flight(running) == 0, "those before have ended")  # counted for a moment after the response
    clients = [stack.enter_context(RawClient(running.port)) for _ in range(count)]
    for number, client in enumerate(clients):
        client.request("GET", path, (f"X-Client-ID: holder-{number}", *way))
    eventually(lambda: in_flight(running) == count, "they are under way")
    return clients


def in_flight(running: RunningGateway) -> int:
    return int(running.live.upstreams["up"].concurrency.in_flight)


# Who is refused


@pytest.mark.parametrize(("held", "refused"), [(0, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4)], ids=str)
def test_the_more_requests_are_in_flight_the_more_tiers_are_refused_the_lowest_first(
    running: RunningGateway, stage: Stage, way: tuple[str, ...], held: int, refused: int
) -> None:
    with ExitStack() as stack:
        hold(stack, running, held, way)
        told = [get(running, tier, way).status for tier in TIERS]
        assert told == [503] * refused + [200] * (4 - refused)
        stage.go_on.set()
    eventually(lambda: in_flight(running) == 0, "every place is given back")
    assert [get(running, tier, way).status for tier in TIERS] == [200] * 4


def test_a_priority_decides_over_the_rate(stage: Stage, gateway: StartGateway, way: tuple[str, ...]) -> None:
    sections = sections_for(stage)
    for rank, tier in enumerate(reversed(TIERS)):
        sections["tiers"][tier]["priority"] = rank
    running = warm(gateway(sections), stage)
    with ExitStack() as stack:
        hold(stack, running, 2, way)
        free = stack.enter_context(RawClient(running.port))
        free.request("GET", "/api/held", ("X-Client-ID: free",))
        eventually(lambda: in_flight(running) == 3, "it is under way")
        assert [get(running, tier, way).status for tier in TIERS] == [200, 200, 200, 503]
        stage.go_on.set()


def test_one_client_alone_gets_half_of_the_permits(
    running: RunningGateway, stage: Stage, way: tuple[str, ...]
) -> None:
    """And of those that its tier may take; another client of the same tier still finds one."""
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(3)]
        for client in clients:
            client.request("GET", "/api/held", ("X-Client-ID: enterprise", *way))
        eventually(lambda: in_flight(running) == 3, "they are under way")
        answer = get(running, "ENTERPRISE", way)
        assert answer.status == 503
        assert json.loads(answer.body)["detail"] == (
            "Upstream 'up' is overloaded: 3 of at most 6 requests are in flight, and requests of tier ENTERPRISE"
            " are admitted below 6; 3 of them are yours, and one client can use at most as many as are free."
        )
        told = explained(running, "enterprise")
        assert (told["result"]["decision"], told["upstream"]["concurrency"]["allowed"]) == ("refused", False)
        with RawClient(running.port) as other:
            assert other.get("/api/x", ("X-Client-ID: holder-0", *way)).status == 200
        assert get(running, "PREMIUM", way).status == 200
        stage.go_on.set()
    eventually(lambda: in_flight(running) == 0, "every place is given back")
    assert get(running, "ENTERPRISE", way).status == 200


@pytest.mark.parametrize("path", ["/api/tunnel", "/api/events"])
def test_tunnels_and_event_streams_hold_no_permit(running: RunningGateway, stage: Stage, path: str) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(RawClient(running.port))
            client.request("GET", path, ("X-Client-ID: enterprise", *(ASKING if "tunnel" in path else ())))
            assert client.read_until(b"\r\n\r\n") is not None
        assert in_flight(running) == 0
        assert get(running, "FREE").status == 200
        stage.go_on.set()
    eventually(lambda: in_flight(running) == 0, "nothing is given back twice")
    assert get(running, "FREE").status == 200


def test_streams_hold_their_permits_to_their_end(running: RunningGateway, stage: Stage) -> None:
    with ExitStack() as stack:
        for client in hold(stack, running, 3, path="/api/stream"):
            assert client.read_until(b"\r\n\r\n") is not None
        assert get(running, "FREE").status == 503
        assert get(running, "BASIC").status == 200
        stage.go_on.set()
    eventually(lambda: in_flight(running) == 0, "they are over")
    assert get(running, "FREE").status == 200


def test_a_client_that_disconnects_releases_its_permit(running: RunningGateway, way: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        hold(stack, running, 3, way)
        assert get(running, "FREE", way).status == 503
    eventually(lambda: in_flight(running) == 0, "nobody waits any more")
    assert get(running, "FREE", way).status == 200


# What refused clients get


def test_both_paths_refuse_with_the_same_detail(running: RunningGateway, stage: Stage) -> None:
    with ExitStack() as stack:
        hold(stack, running, 3)
        answers = [get(running, "FREE", way) for way in WAYS.values()]
        stage.go_on.set()
    varying = {b"x-request-id", b"retry-after", b"content-length", b"date", b"x-ratelimit-reset"}
    seen = [{name: b"" if name in varying else value for name, value in answer.headers} for answer in answers]
    assert seen[0] == seen[1]
    for answer in answers:
        assert answer.status == 503
        assert answer.all("retry-after")[0] in (b"1", b"2", b"3")
        assert answer.all("cache-control") == [b"no-store"]
        body = json.loads(answer.body)
        assert body["reason"] == "overloaded"
        assert body["detail"] == (
            "Upstream 'up' is overloaded: 3 of at most 6 requests are in flight, and requests of tier FREE are"
            " admitted below 3."
        )
        told = ("upstream", "tier", "concurrency_limit", "tier_concurrency_limit", "in_flight")
        assert [body[key] for key in told] == ["up", "FREE", 6, 3, 3]


def test_a_refusal_costs_nothing(running: RunningGateway, stage: Stage, way: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        hold(stack, running, 3)
        for _ in range(5):
            answer = get(running, "FREE", way)
            assert answer.status == 503
            assert answer.all("x-ratelimit-remaining") == [b"1000"]
        stage.go_on.set()
    assert ask(f"{running.url}/clients/free").json()["bucket"]["tokens"] == 1000
    assert running.live.recorder.settlements["refunded"] == 5


def test_a_refused_request_cannot_exceed_the_rate_limit(
    stage: Stage, gateway: StartGateway, way: tuple[str, ...]
) -> None:
    """A rate-limited client gets 429, whatever is under way."""
    sections = sections_for(stage)
    sections["tiers"]["FREE"] = {"rate": 0.001, "capacity": 1}
    running = warm(gateway(sections), stage)
    assert get(running, "FREE", way).status == 200
    with ExitStack() as stack:
        hold(stack, running, 3)
        assert get(running, "FREE", way).status == 429
        stage.go_on.set()


def test_what_a_shared_store_has_decided_is_given_back_too(
    stage: Stage, gateway: StartGateway, store: StoreServer, way: tuple[str, ...]
) -> None:
    running = warm(gateway(sections_for(stage) | {"store": {"url": store.url, "decision_timeout": 1}}), stage)
    with ExitStack() as stack:
        hold(stack, running, 3, way)
        assert get(running, "FREE", way).status == 503
        assert get(running, "BASIC", way).status == 200
        stage.go_on.set()
    eventually(
        lambda: ask(f"{running.url}/clients/free").json()["bucket"]["tokens"] == 1000, "the token is given back"
    )


def test_a_refused_connection_goes_on(running: RunningGateway, stage: Stage, way: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        held = hold(stack, running, 3)
        client = stack.enter_context(RawClient(running.port))
        assert client.get("/api/x", ("X-Client-ID: free", *way)).status == 503
        stage.go_on.set()
        for one in held:
            assert one.answer().status == 200
        eventually(lambda: in_flight(running) == 0, "every place is given back")
        assert client.get("/api/x", ("X-Client-ID: free", *way)).status == 200


def test_refusals_stay_on_the_fast_path(running: RunningGateway, stage: Stage, fast_path_spy: list[bool]) -> None:
    """They would cost more than serving otherwise, just when there is too much to do."""
    with ExitStack() as stack:
        hold(stack, running, 3)
        fast_path_spy.clear()
        assert get(running, "FREE").status == 503
        assert get(running, "FREE", WAYS["general parser"]).status == 503
        assert fast_path_spy == [True, False]
        stage.go_on.set()


# Retries


@pytest.mark.parametrize(("held", "tries"), [(0, 2), (3, 1)])
def test_nothing_is_retried_while_requests_are_shed(
    running: RunningGateway, stage: Stage, way: tuple[str, ...], held: int, tries: int
) -> None:
    with ExitStack() as stack:
        hold(stack, running, held)
        assert get(running, "ENTERPRISE", way, "/api/broken").status == 502
        assert running.live.recorder.attempt_results["up"]["upstream_reset"] == tries
        stage.go_on.set()


# Adaptive


def test_an_adaptive_limit_measures_responses_on_both_paths_and_no_errors(
    stage: Stage, gateway: StartGateway, way: tuple[str, ...]
) -> None:
    sections = sections_for(stage, circuit_breaker={"failure_threshold": 1000, "failure_rate": 1})
    sections["upstreams"]["up"]["concurrency"] = {"adaptive": {"min_limit": 5, "max_limit": 60}}
    running = warm(gateway(sections), stage)
    limit = running.live.upstreams["up"].limit
    assert limit.is_adaptive
    samples = limit._gradient._samples
    before = len(samples)
    assert get(running, "FREE", way).status == 200
    (seconds,) = samples[before:]
    assert 0 < seconds < 5
    stage.behave = reply(b"no", b"503 Service Unavailable")
    assert get(running, "FREE", way).status == 503
    assert len(samples) == before + 1


def test_a_timeout_counts_as_long_as_it_took(stage: Stage, gateway: StartGateway, way: tuple[str, ...]) -> None:
    sections = sections_for(stage, timeouts={"response": 0.3}, retry={"attempts": 1})
    sections["upstreams"]["up"]["concurrency"] = {"adaptive": {}}
    running = warm(gateway(sections), stage)
    samples = running.live.upstreams["up"].limit._gradient._samples
    before = len(samples)
    assert get(running, "FREE", way, "/api/held").status == 504
    stage.go_on.set()
    assert [seconds > 0.29 for seconds in samples[before:]] == [True]


# The gateway itself


@pytest.fixture
def late(stage: Stage, gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], RunningGateway]:
    """A gateway whose loop runs as late as the test says."""
    monkeypatch.setattr(LagSampler, "start", lambda _sampler: None)
    running = warm(gateway(sections_for(stage, places=None) | {"server": {"max_event_loop_lag": 0.25}}), stage)

    def by(seconds: float) -> RunningGateway:
        lag = running.server._app.state.gateway.event_loop_shedder
        for _ in range(LAG_SAMPLES):
            lag.observe(seconds)
        return running

    return by


def test_a_late_loop_sheds_by_tier_before_any_other_step(
    late: Callable[[float], RunningGateway], stage: Stage, way: tuple[str, ...]
) -> None:
    running = late(0.25 * 2.5)
    assert [get(running, tier, way).status for tier in TIERS] == [503, 503, 503, 200]
    answer = get(running, "FREE", way)
    body = json.loads(answer.body)
    assert body["reason"] == "overloaded"
    assert body["detail"].startswith("The gateway itself is overloaded: its event loop runs 0.6")
    assert answer.all("retry-after")[0] in (b"1", b"2", b"3")
    assert answer.all("x-ratelimit-remaining") == []
    assert ask(f"{running.url}/clients/free").json()["bucket"]["tokens"] == 1000
    assert len(stage.requests) == 1
    running = late(0.0)
    assert [get(running, tier, way).status for tier in TIERS] == [200] * 4


def test_health_and_metrics_show_the_lag(late: Callable[[float], RunningGateway]) -> None:
    running = late(0.5)
    assert get(running, "FREE").status == 503
    assert ask(f"{running.url}/health").json()["event_loop"] == {"lag_seconds": 0.5, "shed": 1}
    overload = ask(f"{running.url}/metrics").json()["overload"]
    assert overload["event_loop_lag_seconds"] == 0.5
    assert overload["shed"]["_gateway"] == {"FREE": 1, "BASIC": 0, "PREMIUM": 0, "ENTERPRISE": 0}
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert "gateway_event_loop_lag_seconds 0.5\n" in text
    assert 'gateway_shed_requests_total{tier="FREE",upstream="_gateway"} 1.0\n' in text
    told = explained(running, "free")
    assert (told["result"]["decision"], told["result"]["reason"]) == ("refused", "overloaded")
    assert told["event_loop"] == {"lag_seconds": 0.5, "shed_ratio": 1}
    assert explained(running, "enterprise")["result"]["decision"] == "allowed"


def test_a_real_lag_is_detected(stage: Stage, gateway: StartGateway) -> None:
    running = warm(gateway(sections_for(stage) | {"server": {"max_event_loop_lag": 0.08}}), stage)
    is_calm = threading.Event()
    lag = running.server._app.state.gateway.event_loop_shedder

    def stall() -> None:
        if not is_calm.is_set():
            time.sleep(0.3)
            server_loop.call_later(0.001, stall)

    server_loop = running.server.servers[0].get_loop()
    server_loop.call_soon_threadsafe(stall)
    eventually(lambda: lag.is_over, "it is noticed")
    eventually(lambda: get(running, "FREE").status == 503, "the lowest tier is shed")
    is_calm.set()
    eventually(lambda: get(running, "FREE").status == 200, "it is over")


# What operators see


def explained(running: RunningGateway, client: str) -> Any:
    body = f'{{"client_id": "{client}", "path": "/api/x"}}'.encode()
    return ask(f"{running.url}/explain", method="POST", headers={"content-type": "application/json"}, body=body).json()


def test_health_metrics_and_explanation_show_requests_in_flight_and_shed(
    running: RunningGateway, stage: Stage, way: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        hold(stack, running, 4)
        assert [get(running, tier, way).status for tier in TIERS] == [503, 503, 200, 200]
        eventually(lambda: in_flight(running) == 4, "those are over")
        view = {"limit": 6, "in_flight": 4, "shed": 2}
        assert ask(f"{running.url}/health").json()["upstreams"]["up"]["concurrency"] == view
        overload = ask(f"{running.url}/metrics").json()["overload"]
        assert overload["upstreams"] == {"up": view}
        assert overload["shed"]["up"] == {"FREE": 1, "BASIC": 1, "PREMIUM": 0, "ENTERPRISE": 0}
        text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
        for line in (
            'gateway_upstream_concurrency_limit{upstream="up"} 6.0',
            'gateway_upstream_requests_in_flight{upstream="up"} 4.0',
            'gateway_shed_requests_total{tier="BASIC",upstream="up"} 1.0',
        ):
            assert f"{line}\n" in text
        told = explained(running, "basic")
        assert (told["result"]["decision"], told["result"]["reason"]) == ("refused", "overloaded")
        assert told["upstream"]["concurrency"] == {"limit": 6, "tier_limit": 4, "in_flight": 4, "allowed": False}
        told = explained(running, "premium")
        assert told["result"]["decision"] == "allowed"
        assert told["upstream"]["concurrency"] == {"limit": 6, "tier_limit": 5, "in_flight": 4, "allowed": True}
        stage.go_on.set()


def test_without_a_limit_requests_in_flight_are_still_shown(stage: Stage, gateway: StartGateway) -> None:
    running = warm(gateway(sections_for(stage, places=None)), stage)
    with ExitStack() as stack:
        hold(stack, running, 3)
        view = {"limit": None, "in_flight": 3, "shed": 0}
        assert ask(f"{running.url}/health").json()["upstreams"]["up"]["concurrency"] == view
        assert (
            "gateway_upstream_concurrency_limit{" not in ask(f"{running.url}/metrics?format=prometheus").body.decode()
        )
        stage.go_on.set()
