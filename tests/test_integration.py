"""The whole gateway on real sockets, as users see it: the demo, limits, tiers, breaker, health, metrics."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.kit import (
    PATIENCE,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    in_front_of,
    reply,
    running_gateway,
)

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway that nothing was configured for."""
    with running_gateway({}, tmp_path_factory.mktemp("demo")) as gateway:
        yield gateway


def get(gateway: RunningGateway, path: str, client: str | None = None) -> Any:
    return ask(gateway.url + path, headers={"X-Client-ID": client} if client else {})


def set_tier(gateway: RunningGateway, client: str, tier: str) -> Any:
    return ask(
        f"{gateway.url}/clients/{client}/tier", method="POST", headers=JSON, body=b'{"tier": "%s"}' % tier.encode()
    )


# The demo


@pytest.mark.parametrize("path", ["/api/users", "/api/users/2", "/api/orders", "/api/slow?seconds=0", "/api/flaky"])
def test_without_configuration_demo_services_respond(demo: RunningGateway, path: str) -> None:
    answer = get(demo, path, f"demo-{path}")
    assert answer.status == 200
    assert answer.json()


def test_the_demo_has_a_service_that_takes_its_time(demo: RunningGateway) -> None:
    assert get(demo, "/api/slow?seconds=0.2", "slow").json() == {"waited_seconds": 0.2}


def test_the_demo_has_an_endpoint_that_costs_more(demo: RunningGateway) -> None:
    answer = ask(f"{demo.url}/api/orders/export", method="POST", headers={"X-Client-ID": "exporter"}, body=b"{}")
    assert answer.headers["x-ratelimit-remaining"] == "5"


# Limits and tiers


def refused_after_all_tokens(demo: RunningGateway, name: str | None = None) -> Any:
    """Send requests until one is refused; check that a FREE client had its ten tokens and those of the meantime."""
    began, admitted = time.monotonic(), 0
    while (found := get(demo, "/api/users", name)).status == 200:
        admitted += 1
        assert admitted <= 10 + (time.monotonic() - began) + 1
    assert admitted >= 10
    return found


def test_a_free_client_has_ten_tokens_and_then_waits(demo: RunningGateway) -> None:
    refused = refused_after_all_tokens(demo, "ten")
    assert refused.status == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["reason"] == "rate_limited"


def test_clients_do_not_share_a_bucket(demo: RunningGateway) -> None:
    assert refused_after_all_tokens(demo, "greedy").status == 429
    assert get(demo, "/api/users", "modest").status == 200


def test_limits_hold_under_concurrency(gateway: StartGateway, upstream: StartUpstream) -> None:
    """Of 60 requests at once by one client with 10 tokens that hardly refill, exactly 10 pass."""
    sections = in_front_of(upstream().url) | {"tiers": {"FREE": {"rate": 0.001, "capacity": 10}}}
    running = gateway(sections)
    with ThreadPoolExecutor(20) as threads:
        statuses = list(threads.map(lambda _: get(running, "/api/x", "many").status, range(60)))
    assert sorted(statuses) == [200] * 10 + [429] * 50


def test_without_a_name_the_address_is_the_client(demo: RunningGateway) -> None:
    refused = refused_after_all_tokens(demo)
    assert (refused.status, refused.json()["client_id"]) == (429, "127.0.0.1")


@pytest.mark.parametrize("name", ["has space", "x" * 129, "caf\u00e9"])
def test_a_malformed_name_is_refused(demo: RunningGateway, name: str) -> None:
    answer = get(demo, "/api/users", name)
    assert (answer.status, answer.json()["reason"]) == (400, "client_id_invalid")


def test_a_new_tier_holds_for_the_next_request_and_keeps_the_share(demo: RunningGateway) -> None:
    for _ in range(5):
        get(demo, "/api/users", "riser")
    began = time.monotonic()
    changed = set_tier(demo, "riser", "premium")
    refilled = 20 * (time.monotonic() - began)
    assert changed.status == 200
    body = changed.json()
    assert (body["previous"]["name"], body["current"]["name"], body["persisted"]) == ("FREE", "PREMIUM", True)
    share = body["tokens_before"] * 20
    assert share - 0.1 <= body["tokens_after"] <= share + refilled + 0.1
    answer = get(demo, "/api/users", "riser")
    assert answer.headers["x-ratelimit-limit"] == "200"


def test_a_tier_survives_a_restart(upstream: StartUpstream, tmp_path: Path) -> None:
    sections = in_front_of(upstream().url)
    with running_gateway(sections, tmp_path / "state") as first:
        set_tier(first, "stayer", "ENTERPRISE")
    with running_gateway(sections, tmp_path / "state") as second:
        assert get(second, "/clients/stayer").json()["tier"]["name"] == "ENTERPRISE"


def test_a_client_can_be_looked_at_and_returned_to_the_default(demo: RunningGateway) -> None:
    set_tier(demo, "visitor", "BASIC")
    get(demo, "/api/users", "visitor")
    view = get(demo, "/clients/visitor").json()
    assert (view["tier"]["name"], view["tier_source"], view["bucket"]["capacity"]) == ("BASIC", "registered", 50)
    assert 49 <= view["bucket"]["tokens"] <= 50
    assert ask(f"{demo.url}/clients/visitor", method="DELETE").json()["current"]["name"] == "FREE"
    assert get(demo, "/clients/visitor").json()["tier_source"] == "default"


def test_an_unknown_tier_is_refused_with_the_list_of_tiers(demo: RunningGateway) -> None:
    answer = set_tier(demo, "anyone", "GOLD")
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
    assert answer.json()["tiers"] == ["FREE", "BASIC", "PREMIUM", "ENTERPRISE"]


def test_a_client_id_may_hold_slashes(demo: RunningGateway) -> None:
    set_tier(demo, "team%2Fapp", "BASIC")
    assert get(demo, "/clients/team%2Fapp").json()["client_id"] == "team/app"


# Breaker


def test_a_breaker_opens_refuses_without_touching_the_upstream_and_recovers(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    is_failing = True

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        return reply(status=b"500 Oops" if is_failing else b"200 OK")(wire, request)

    up = upstream(behave)
    breaker = {"failure_threshold": 3, "recovery_timeout": 0.5, "jitter": 0}
    running = gateway(in_front_of(up.url, circuit_breaker=breaker))
    assert [get(running, "/api/x", "c").status for _ in range(3)] == [500] * 3
    refused = get(running, "/api/x", "c")
    assert (refused.status, refused.json()["reason"], refused.headers["retry-after"]) == (503, "circuit_open", "1")
    assert len(up.requests) == 3
    view = get(running, "/circuit-breakers").json()["circuit_breakers"]["up"]
    assert (view["state"], view["opened_total"], view["rejected_total"]) == ("OPEN", 1, 1)
    assert "3 consecutive failures" in view["last_opened"]["detail"]
    assert 0 < view["next_probe_in_seconds"] <= 0.5
    is_failing = False
    eventually(lambda: get(running, "/api/x", "c").status == 200, "the breaker lets a probe through")
    assert get(running, "/circuit-breakers").json()["circuit_breakers"]["up"]["state"] == "CLOSED"


def test_a_request_that_may_not_be_repeated_is_no_probe_while_others_come(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    is_failing = True

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        return reply(status=b"500 Oops" if is_failing else b"200 OK")(wire, request)

    up = upstream(behave)
    running = gateway(in_front_of(up.url, circuit_breaker={"failure_threshold": 1}))
    assert get(running, "/api/x", "c").status == 500
    is_failing = False
    breaker = running.live.upstreams["up"].breaker
    breaker._due, breaker._last_idempotent_at = time.monotonic(), float("inf")  # due, and a safe request a moment ago
    posted = ask(f"{running.url}/api/x", method="POST", body=b"order")
    assert (posted.status, len(up.requests)) == (503, 1)
    assert "requests that may be repeated, and those of other clients, have precedence" in posted.json()["detail"]
    assert get(running, "/api/x", "c").status == 200
    assert ask(f"{running.url}/api/x", method="POST", body=b"order").status == 200


def test_client_errors_never_open_a_breaker(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream(reply(status=b"404 Not Found"))
    running = gateway(in_front_of(up.url, circuit_breaker={"failure_threshold": 2}))
    assert [get(running, "/api/x", "c").status for _ in range(5)] == [404] * 5


# Health


def test_an_unhealthy_target_gets_no_traffic_until_it_is_well(gateway: StartGateway, upstream: StartUpstream) -> None:
    is_sick = False

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        is_check = request.line.startswith(b"GET /health ")
        return reply(b"sick one", status=b"500 Sick" if is_check and is_sick else b"200 OK")(wire, request)

    one, other = upstream(behave), upstream(reply(b"well one"))
    check = {"path": "/health", "interval": 0.05, "timeout": 1, "healthy_threshold": 2, "unhealthy_threshold": 2}
    running = gateway(in_front_of(one.url, other.url, health_check=check, slow_start=0))
    is_sick = True
    eventually(lambda: get(running, "/health").json()["status"] == "warn", "the sick target is noticed")
    assert {get(running, "/api/x", "c").body for _ in range(6)} == {b"well one"}
    target = get(running, "/health").json()["upstreams"]["up"]["targets"][0]
    assert (target["healthy"], target["active"]["result"]) == (False, "status 500")
    is_sick = False
    eventually(lambda: get(running, "/health").json()["status"] == "pass", "the target is well again")
    assert {get(running, "/api/x", "c").body for _ in range(6)} == {b"sick one", b"well one"}


def test_a_pool_exhausted_by_slow_responses_makes_no_target_unhealthy(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    over = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        if b"/slow" in request.line:
            over.wait(PATIENCE)
        return reply()(wire, request)

    up = upstream(behave)
    check = {"path": "/health", "interval": 0.05, "timeout": 20, "unhealthy_threshold": 1}
    sections = in_front_of(up.url, health_check=check, pool={"max_connections": 2})
    running = gateway(sections | {"clients": {"one": {"tier": "FREE"}, "other": {"tier": "FREE"}}})

    def checks() -> int:
        return sum(request.line.startswith(b"GET /health ") for request in up.requests)

    with RawClient(running.port) as one, RawClient(running.port) as other:
        for client, name in ((one, "one"), (other, "other")):
            client.request("GET", "/api/slow", (f"X-Client-ID: {name}",))
        eventually(lambda: len(up.requests) - checks() == 2, "both connections are taken")
        before = checks()
        eventually(lambda: checks() > before + 3, "it is checked")
        (target,) = get(running, "/health").json()["upstreams"]["up"]["targets"]
        assert (target["healthy"], target["active"]["result"]) == (True, "status 200")
        over.set()
        assert [client.answer().status for client in (one, other)] == [200, 200]


def test_without_a_healthy_target_the_response_is_503(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream(reply(status=b"500 Sick"))
    check = {"interval": 0.05, "unhealthy_threshold": 1}
    running = gateway(in_front_of(up.url, health_check=check))
    eventually(lambda: get(running, "/health").json()["status"] == "fail", "the only target is noticed")
    answer = get(running, "/api/x", "c")
    assert (answer.status, answer.json()["reason"]) == (503, "no_healthy_upstream")
    assert answer.headers["retry-after"] == "1"
    assert get(running, "/healthz").status == 200
    assert get(running, "/readyz").status == 200


# Metrics


def test_metrics_count_what_happened(gateway: StartGateway, upstream: StartUpstream) -> None:
    sections = in_front_of(upstream().url) | {"tiers": {"FREE": {"rate": 0.001, "capacity": 2}}}
    running = gateway(sections)
    for _ in range(3):
        get(running, "/api/x", "counted")
    view = get(running, "/metrics").json()
    assert view["requests"]["by_status"] == {"200": 2, "429": 1}
    assert view["requests"]["by_route"] == {"all": 3}
    assert view["requests"]["by_tier"] == {"FREE": 3}
    assert view["rates"]["since_start"]["limited"] == 1
    assert view["rate_limiter"]["allowed"]["FREE"] == 2
    assert view["latency"]["overall"]["last_60s"]["count"] == 2
    percentiles = get(running, "/metrics/latency").json()["routes"]["all"]["since_start"]["percentiles_ms"]
    assert set(percentiles) == {"p50", "p90", "p95", "p99"}
    assert 0 < percentiles["p50"] <= percentiles["p99"]


@pytest.mark.parametrize(
    ("query", "accept", "content_type"),
    [
        ("", "*/*", "application/json"),
        ("", "application/json", "application/json"),
        ("?format=prometheus", "*/*", "text/plain"),
        ("", "text/plain;version=0.0.4", "text/plain"),
        ("", "application/openmetrics-text;version=1.0.0,*/*;q=0.1", "application/openmetrics-text"),
        ("?format=json", "text/plain", "application/json"),
    ],
)
def test_metrics_speak_json_to_people_and_text_to_prometheus(
    demo: RunningGateway, query: str, accept: str, content_type: str
) -> None:
    answer = ask(f"{demo.url}/metrics{query}", headers={"Accept": accept})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith(content_type)


def test_prometheus_can_parse_the_metrics(demo: RunningGateway) -> None:
    get(demo, "/api/users", "parsed")
    text = ask(f"{demo.url}/metrics?format=prometheus").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = {"gateway_http_requests", "gateway_circuit_breaker_state", "gateway_rate_limit_decisions"}
    assert names <= set(families)
    assert not any("parsed" in str(sample.labels) for family in families.values() for sample in family.samples)


def test_percentiles_are_configurable(gateway: StartGateway, upstream: StartUpstream) -> None:
    running = gateway(in_front_of(upstream().url) | {"metrics": {"percentiles": [50, 99.9]}})
    percentiles = get(running, "/metrics/latency").json()["overall"]["last_60s"]["percentiles_ms"]
    assert percentiles == {"p50": None, "p99.9": None}
