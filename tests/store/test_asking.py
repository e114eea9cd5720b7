"""Requests on the fast path that wait for the store: completed, cancelled, pipelined, drained, refused."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.kit import RawClient, RawUpstream, RunningGateway, ask, eventually, in_front_of
from tests.store_kit import StoreServer

GatewayStarter = Callable[[dict[str, Any]], RunningGateway]
WAIT = 0.4  # seconds: the deadline here, so that there is time to do something while a request waits
HOT = ("X-Client-ID: hot",)


def started(
    gateway: GatewayStarter,
    up: RawUpstream,
    store: StoreServer,
    *,
    on_failure: str = "allow",
    wait: float = WAIT,
    **sections: Any,
) -> RunningGateway:
    options = {"url": store.url, "decision_timeout": wait, "on_failure": on_failure}
    running = gateway(in_front_of(up.url) | {"store": options} | sections)
    with RawClient(running.port) as client:  # a connection to the upstream, and a decision of the store
        eventually(lambda: b"200" in client.get("/api/x", HOT).head, "the store decides")
    up.requests.clear()
    return running


@contextmanager
def paused(store: StoreServer) -> Iterator[None]:
    store.pause()
    try:
        yield
    finally:
        store.resume()


def waits(running: RunningGateway) -> None:
    """Return once the gateway has a request, which waits for the store."""
    eventually(lambda: running.live.recorder.in_flight == 1, "it waits for the store")


def sources(running: RunningGateway) -> dict[str, int]:
    found: dict[str, int] = ask(f"{running.url}/metrics").json()["rate_limiter"]["decisions_by_source"]
    return found


def test_the_store_decides_and_the_response_is_that_of_a_bucket(
    gateway: GatewayStarter, up: RawUpstream, store: StoreServer
) -> None:
    running = started(gateway, up, store, wait=10, tiers={"FREE": {"rate": 0.01, "capacity": 10}})
    with RawClient(running.port) as client:
        answers = [client.get("/api/x", ("X-Client-ID: other",)) for _ in range(12)]
    assert [answer.status for answer in answers] == [200] * 10 + [429] * 2
    assert [answer.all("x-ratelimit-remaining") for answer in answers[:10]] == [[b"%d" % n] for n in range(9, -1, -1)]
    assert 98 <= int(answers[-1].all("retry-after")[0]) <= 100
    found = sources(running)
    assert found["store"] == 11
    assert found["deny_cache"] == 2, "what must still be empty is refused without asking"


def test_a_request_without_a_decision_gets_its_response_at_the_deadline(
    gateway: GatewayStarter, up: RawUpstream, store: StoreServer
) -> None:
    running = started(gateway, up, store)
    before = sources(running).get("allow", 0)
    with paused(store), RawClient(running.port) as client:
        began = time.monotonic()
        assert client.get("/api/x", HOT).status == 200
        assert WAIT * 0.5 < time.monotonic() - began < WAIT + 10
    assert sources(running)["allow"] == before + 1


def test_an_unavailable_store_that_is_needed_is_reported(
    gateway: GatewayStarter, up: RawUpstream, store: StoreServer
) -> None:
    running = started(gateway, up, store, on_failure="deny")
    with paused(store), RawClient(running.port) as client:
        answer = client.get("/api/x", HOT)
    assert answer.status == 503
    assert b'"reason": "store_unavailable"' in answer.body
    assert answer.all("retry-after") == [b"1"]
    assert up.requests == []


def test_a_client_that_disconnects_while_it_waits_is_recorded_and_goes_no_further(
    gateway: GatewayStarter, up: RawUpstream, store: StoreServer
) -> None:
    running = started(gateway, up, store)
    before = running.live.recorder.requests.total()
    with paused(store):
        with RawClient(running.port) as client:
            client.request(headers=HOT)
            waits(running)
        eventually(lambda: running.live.recorder.requests.total() == before + 1, "it is recorded")
    time.sleep(WAIT)
    assert up.requests == []
    assert running.live.recorder.refusals["client_disconnected"] == 1
    assert running.live.recorder.in_flight == 0


def test_a_request_whose_client_leaves_before_the_decision_costs_nothing(
    gateway: GatewayStarter, up: RawUpstream, store: StoreServer
) -> None:
    """The store executes the charge when it goes on, and gets the refund then."""
    running = started(gateway, up, store, wait=20, tiers={"FREE": {"rate": 0.01, "capacity": 10}})
    with paused(store):
        with RawClient(running.port) as client:
            client.request(headers=("X-Client-ID: hasty",))
            waits(running)
        eventually(lambda: running.live.recorder.in_flight == 0, "it has ended")
    eventually(lambda: running.live.recorder.settlements["refunded"] == 1, "the reply has arrived")
    assert up.requests == []
    with RawClient(running.port) as client:
        left = [int(client.get("/api/x", ("X-Client-ID: hasty",)).all("x-ratelimit-remaining")[0]) for _ in range(3)]
    assert left[-1] == 7, "the refund is sent without waiting for it"


def test_what_comes_behind_it_is_served_after_it(gateway: GatewayStarter, up: RawUpstream, store: StoreServer) -> None:
    running = started(gateway, up, store)
    with paused(store), RawClient(running.port) as client:
        client.request(target="/api/first", headers=HOT)
        waits(running)
        client.request(target="/api/second", headers=HOT)
        assert [client.answer().status for _ in range(2)] == [200, 200]
    assert [request.line.split()[1] for request in up.requests] == [b"/api/first", b"/api/second"]


def test_a_gateway_that_stops_responds_to_it_first(
    gateway: GatewayStarter, up: RawUpstream, store: StoreServer
) -> None:
    running = started(gateway, up, store)
    with paused(store), RawClient(running.port) as client:
        client.request(headers=HOT)
        waits(running)
        running.stop()
        answer = client.answer()
    assert answer.status == 200
    assert answer.all("connection") == [b"close"]


def test_an_upstream_whose_breaker_opens_meanwhile_gets_nothing(
    gateway: GatewayStarter, upstream: Callable[..., RawUpstream], store: StoreServer
) -> None:
    origin = upstream()
    running = started(gateway, origin, store, wait=10)
    forced = {"mode": "forced_open", "duration_seconds": 60}
    with paused(store), RawClient(running.port) as client:
        client.request(headers=HOT)
        waits(running)
        changed = ask(
            f"{running.url}/circuit-breakers/up",
            method="POST",
            headers={"Content-Type": "application/json"},
            body=json.dumps(forced).encode(),
        )
        assert changed.status == 200
        store.resume()
        found = client.answer()
    assert (found.status, json.loads(found.body)["reason"]) == (503, "circuit_open")
    assert not origin.requests
