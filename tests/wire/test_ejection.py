"""Outlier detection on the wire and in the operator's view: ejection of a target, and its return."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import (
    FakeClocks,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    refusing_url,
    reply,
)

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

BREAKER = {"jitter": 0, "failure_threshold": 2, "minimum_calls": 1000, "recovery_timeout": 60}


def sections(*urls: str, **options: Any) -> dict[str, Any]:
    return in_front_of(*urls, **{"circuit_breaker": BREAKER, "slow_start": 0, **options})


def statuses(running: RunningGateway, count: int) -> list[int]:
    with RawClient(running.port) as client:
        return [client.get().status for _ in range(count)]


def view(running: RunningGateway, url: str) -> Any:
    """Return what /health shows of a target."""
    targets = ask(f"{running.url}/health").json()["upstreams"]["up"]["targets"]
    return next(target for target in targets if target["url"] == url)


def breaks_off(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP")
    return False


def stays_silent(_wire: Wire, _request: RawRequest) -> bool:
    time.sleep(0.4)
    return False


@pytest.mark.parametrize(
    ("behave", "cause"),
    [
        (reply(b"no", b"503 Unavailable"), "status 503"),
        (breaks_off, "upstream_reset"),
        (stays_silent, "upstream_timeout"),
        (None, "upstream_connect_error"),
    ],
    ids=["status", "reset", "timeout", "connect error"],
)
def test_what_fails_is_ejected_and_the_view_says_why(
    gateway: StartGateway,
    upstream: StartUpstream,
    behave: Any,
    cause: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = upstream(reply(b"good"))
    bad = refusing_url() if behave is None else upstream(behave).url
    running = gateway(sections(good.url, bad, timeouts={"response": 0.2, "connect": 1}))
    statuses(running, 4)
    assert statuses(running, 6) == [200] * 6
    found = view(running, bad)
    passive = found["passive"]
    assert (found["healthy"], found["active"]) == (None, None)
    assert (passive["circuit_breaker"], passive["ejected"], passive["ejections_total"]) == ("OPEN", True, 1)
    assert passive["last_opened"]["detail"] == f"2 consecutive failures; last: {cause}"
    assert 50 < passive["next_probe_in_seconds"] <= 60
    assert passive["not_ejected_detail"] is None
    assert view(running, good.url)["passive"]["circuit_breaker"] == "CLOSED"
    assert ask(f"{running.url}/health").json()["status"] == "warn"
    shown = ask(f"{running.url}/circuit-breakers").json()
    assert shown["circuit_breakers"]["up"]["state"] == "CLOSED"
    assert shown["targets"]["up"][bad]["passive"]["ejected"]
    (move,) = ask(f"{running.url}/circuit-breakers/up/history").json()["history"]
    assert (move["to"], move["target_url"], move["detail"]) == ("OPEN", bad, passive["last_opened"]["detail"])
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert f'gateway_upstream_ejected{{target="{bad}",upstream="up"}} 1.0' in text
    assert f'gateway_upstream_ejections_total{{target="{bad}",upstream="up"}} 1.0' in text
    assert f'gateway_upstream_ejected{{target="{good.url}",upstream="up"}} 0.0' in text
    assert f"target {bad} is ejected: 2 consecutive failures; last: {cause}" in caplog.text


def test_the_last_in_rotation_stays_and_the_view_says_so(gateway: StartGateway, upstream: StartUpstream) -> None:
    """When all fail, it is the upstream's own breaker that opens."""
    first, last = upstream(reply(b"no", b"500 Oops")), upstream(reply(b"good"))
    running = gateway(sections(first.url, last.url, circuit_breaker={**BREAKER, "max_ejected_ratio": 1.0}))
    assert statuses(running, 4).count(200) == 2
    last.behave = reply(b"no", b"500 Oops")
    assert statuses(running, 3) == [500, 500, 503]
    assert view(running, first.url)["passive"]["ejected"]
    passive = view(running, last.url)["passive"]
    assert (passive["circuit_breaker"], passive["ejected"]) == ("CLOSED", False)
    assert passive["not_ejected_detail"].startswith("Its last consecutive failures (2) did not count towards ejection")


@pytest.mark.parametrize("options", [{"circuit_breaker": {**BREAKER, "per_target": False}}, {}])
def test_one_target_or_none_with_a_breaker_goes_by_the_upstreams(
    gateway: StartGateway, upstream: StartUpstream, options: dict[str, Any]
) -> None:
    bad = upstream(reply(b"no", b"500 Oops"))
    urls = [bad.url, upstream().url] if options else [bad.url]
    running = gateway(sections(*urls, **options))
    assert statuses(running, 6).count(500) == (3 if options else 2)
    assert view(running, bad.url)["passive"] is None
    assert "gateway_upstream_ejected{" not in ask(f"{running.url}/metrics?format=prometheus").body.decode()


def test_a_client_sees_nothing_of_a_target_that_went_away(
    gateway: Callable[..., RunningGateway], upstream: StartUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor of the requests that try whether it is back."""
    caplog.set_level(logging.INFO)
    clock = FakeClocks()
    good, bad = upstream(reply(b"good")), upstream(reply(b"back"))
    running = gateway(
        sections(good.url, bad.url, circuit_breaker={**BREAKER, "recovery_timeout": 10, "max_recovery_timeout": 10}),
        clock.clocks,
    )
    bad.behave = breaks_off
    assert statuses(running, 8) == [200] * 8
    for _ in range(3):
        clock.advance(11)
        assert statuses(running, 4) == [200] * 4
    assert view(running, bad.url)["passive"]["ejections_total"] == 1
    bad.behave = reply(b"back")
    clock.advance(11)
    assert statuses(running, 8) == [200] * 8
    assert view(running, bad.url)["passive"]["circuit_breaker"] == "CLOSED"
    assert f"target {bad.url} returns: 1 probes succeeded" in caplog.text


@pytest.mark.parametrize("noticed_by", ["request", "view"])
def test_a_target_that_no_request_has_probed_returns_by_time_and_that_is_logged_too(
    gateway: Callable[..., RunningGateway],
    upstream: StartUpstream,
    caplog: pytest.LogCaptureFixture,
    noticed_by: str,
) -> None:
    caplog.set_level(logging.INFO)
    clock = FakeClocks()
    good, bad = upstream(reply(b"good")), upstream(breaks_off)
    running = gateway(
        sections(good.url, bad.url, circuit_breaker={**BREAKER, "recovery_timeout": 10, "max_recovery_timeout": 10}),
        clock.clocks,
    )
    assert statuses(running, 8) == [200] * 8
    clock.advance(10 + 15)
    bad.behave = reply(b"back")
    if noticed_by == "request":
        assert statuses(running, 1) == [200]
    assert view(running, bad.url)["passive"]["circuit_breaker"] == "CLOSED"
    assert f"target {bad.url} returns: no probe for 15 s" in caplog.text


def test_health_checks_and_live_requests_are_shown_side_by_side(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    def behave(wire: Wire, request: RawRequest) -> bool | None:
        status = b"429 Busy" if request.line.startswith(b"GET /up ") else b"500 Oops"
        return reply(b"x", status)(wire, request)

    bad = upstream(behave)
    check = {"path": "/up", "interval": 0.02, "statuses": [204, "400-499"]}
    running = gateway(sections(upstream(reply(b"", b"204 None")).url, bad.url, health_check=check))
    statuses(running, 4)
    eventually(lambda: (view(running, bad.url)["active"] or {"consecutive": 0})["consecutive"] > 2, "it is checked")
    found = view(running, bad.url)
    assert found["healthy"] is True
    assert (found["active"]["passed"], found["active"]["result"]) == (True, "status 429")
    assert (found["active"]["last_error"], found["active"]["last_error_at"]) == (None, None)
    assert found["passive"]["ejected"]


def test_a_target_that_is_well_again_starts_slowly(gateway: StartGateway, upstream: StartUpstream) -> None:
    is_sick = True

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        is_check = request.line.startswith(b"GET /health ")
        return reply(b"sick", b"500 Sick" if is_check and is_sick else b"200 OK")(wire, request)

    sick, well = upstream(behave), upstream(reply(b"well"))
    check = {"interval": 0.02, "healthy_threshold": 1, "unhealthy_threshold": 1}
    running = gateway(sections(sick.url, well.url, health_check=check, slow_start=3600))
    eventually(lambda: view(running, sick.url)["healthy"] is False, "it is noticed")
    is_sick = False
    eventually(lambda: view(running, sick.url)["healthy"], "it is well again")
    assert view(running, sick.url)["slow_start_ratio"] < 0.1
    assert view(running, well.url)["slow_start_ratio"] == 1
    with RawClient(running.port) as client:
        assert [client.get().body for _ in range(20)].count(b"well") >= 18
    running.live.upstreams["up"].targets[0].returned_at -= 3600
    with RawClient(running.port) as client:
        assert [client.get().body for _ in range(20)].count(b"well") == 10


def test_the_response_time_of_each_target_is_that_of_its_own_responses(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    def behave(wire: Wire, request: RawRequest) -> bool | None:
        time.sleep(0.2)
        return reply(b"late")(wire, request)

    late, quick = upstream(behave), upstream(reply(b"quick"))
    running = gateway(sections(late.url, quick.url))
    assert view(running, late.url)["response_seconds"] is None
    statuses(running, 8)
    assert view(running, late.url)["response_seconds"] > 0.19
    assert 0 < view(running, quick.url)["response_seconds"] < view(running, late.url)["response_seconds"]
