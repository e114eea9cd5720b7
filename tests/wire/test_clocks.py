"""The clocks of a gateway reach every decision that depends on time: no test here waits."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from tests.kit import FakeClocks, RawUpstream, RunningGateway, ask, in_front_of, reply, running_gateway

HOUR = 3600.0


@pytest.fixture(scope="module")
def time() -> FakeClocks:
    return FakeClocks()


@pytest.fixture(scope="module")
def gateway(
    time: FakeClocks, shared: RawUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    breaker = {"failure_threshold": 2, "recovery_timeout": HOUR}
    sections = in_front_of(shared.url, circuit_breaker=breaker, retry={"attempts": 1})
    sections["tiers"] = {"FREE": {"rate": 1, "capacity": 10}, "BASIC": {"rate": 5, "capacity": 50}}
    with running_gateway(sections, tmp_path_factory.mktemp("state"), time.clocks) as running:
        yield running


def statuses(gateway: RunningGateway, client: str, count: int) -> list[int]:
    return [ask(f"{gateway.url}/api/x", headers={"X-Client-ID": client}).status for _ in range(count)]


def breaker(gateway: RunningGateway) -> dict[str, object]:
    found: dict[str, object] = ask(f"{gateway.url}/circuit-breakers").json()["circuit_breakers"]["up"]
    return found


def test_a_bucket_refills_by_the_monotonic_clock(gateway: RunningGateway, time: FakeClocks) -> None:
    assert statuses(gateway, "eager", 12) == [200] * 10 + [429] * 2
    refused = ask(f"{gateway.url}/api/x", headers={"X-Client-ID": "eager"})
    assert refused.headers["Retry-After"] == "1"
    time.advance(3)
    assert statuses(gateway, "eager", 4) == [200] * 3 + [429]


def test_a_breaker_recovers_by_the_monotonic_clock(gateway: RunningGateway, up: RawUpstream, time: FakeClocks) -> None:
    time.advance(HOUR)
    up.behave = reply(status=b"500 Internal Server Error")
    assert statuses(gateway, "curious", 3) == [500, 500, 503]
    assert breaker(gateway)["state"] == "OPEN"
    up.behave = reply()
    time.advance(HOUR - 1)
    assert statuses(gateway, "curious", 1) == [503]
    time.advance(HOUR)  # the time it stays open has jitter
    assert statuses(gateway, "curious", 1) == [200]
    assert breaker(gateway)["state"] == "CLOSED"


def test_a_grant_ends_by_the_time_of_day(gateway: RunningGateway, time: FakeClocks) -> None:
    body = json.dumps({"tier": "BASIC", "duration_seconds": HOUR}).encode()
    headers = {"Content-Type": "application/json"}
    granted = ask(f"{gateway.url}/clients/guest/grants", method="POST", headers=headers, body=body).json()
    assert datetime.fromisoformat(granted["until"]) == datetime.fromtimestamp(time.clocks.wall() + HOUR, UTC)
    time.advance(HOUR - 1)
    assert ask(f"{gateway.url}/clients/guest").json()["tier"]["name"] == "BASIC"
    time.advance(2)
    assert ask(f"{gateway.url}/clients/guest").json()["tier"]["name"] == "FREE"


def last_minute(gateway: RunningGateway) -> int:
    found: int = ask(f"{gateway.url}/metrics/latency").json()["overall"]["last_60s"]["count"]
    return found


def test_windows_of_the_metrics_slide_by_the_monotonic_clock(gateway: RunningGateway, time: FakeClocks) -> None:
    time.advance(HOUR)
    assert statuses(gateway, "counted", 3) == [200] * 3
    assert last_minute(gateway) == 3
    time.advance(HOUR)
    assert last_minute(gateway) == 0
