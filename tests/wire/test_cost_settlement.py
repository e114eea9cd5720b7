"""Costs after the decision, on both paths: reported by an upstream, or refunded because no upstream was reached."""

import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest

from api_gateway.models import Exchange
from api_gateway.proxy.cost_settlement import cost_of
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

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

ODD = "X-Odd:  two blanks"  # which the general parser reads
WAYS = {"fast path": (), "general parser": (ODD,)}
both_ways = pytest.mark.parametrize("way", WAYS)
SLOWLY = {"FREE": {"rate": 0.01, "capacity": 10}}


def costs(value: bytes, *more: bytes, body: bytes = b"ok") -> Callable[[Wire, RawRequest], bool | None]:
    return reply(body, headers=tuple((b"X-Gateway-Cost", one) for one in (value, *more)))


def warm(running: RunningGateway) -> RunningGateway:
    assert ask(f"{running.url}/api/warm", headers={"X-Client-ID": "warm"}).status == 200
    return running


def get(running: RunningGateway, way: str, client: str = "c", path: str = "/api/x") -> RawAnswer:
    with RawClient(running.port) as raw:
        return raw.get(path, (f"X-Client-ID: {client}", *WAYS[way]))


def left(running: RunningGateway, client: str = "c") -> float:
    tokens: float = ask(f"{running.url}/clients/{client}").json()["bucket"]["tokens"]
    return tokens


def finished(running: RunningGateway) -> list[Exchange]:
    """Return a list of the exchanges that are recorded from now on; what was asked before is recorded by then."""
    eventually(lambda: ask(f"{running.url}/metrics").json()["requests"]["in_flight"] == 0, "what was asked is over")
    done: list[Exchange] = []
    app: Any = running.server._app
    record = app.fast_path.current.record
    record._observers = (*record._observers, done.append)
    return done


def settled(running: RunningGateway) -> dict[str, int]:
    found: dict[str, int] = ask(f"{running.url}/metrics").json()["rate_limiter"]["settlements"]
    return found


# The cost that an upstream reports


@both_ways
@pytest.mark.parametrize(
    ("told", "remaining"), [(b"0", 10), (b"0.5", 9), (b"1", 9), (b"3", 7), (b"10", 0), (b"0004.000", 6)]
)
def test_the_cost_that_a_response_reports_is_charged(
    gateway: StartGateway, upstream: StartUpstream, fast_path_spy: list[bool], way: str, told: bytes, remaining: int
) -> None:
    """And the fields of that very response show it, before anybody can act on what they would have said."""
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    up.behave = costs(told)
    done = finished(running)
    answer = get(running, way)
    assert fast_path_spy[-1] == (way == "fast path")
    assert (answer.status, answer.body, answer.is_complete) == (200, b"ok", True)
    assert answer.all("x-gateway-cost") == []
    assert answer.all("x-ratelimit-remaining") == [b"%d" % remaining]
    assert len(answer.all("ratelimit")) == len(answer.all("ratelimit-policy")) == 1
    assert answer.all("ratelimit")[0].startswith(b'"free";r=%d;' % remaining)
    assert left(running) == pytest.approx(10 - float(told), abs=0.01)
    eventually(lambda: len(done) == 1, "it is recorded")
    assert done[0].cost == float(told)


@both_ways
def test_debt_delays_the_next_requests_and_not_the_response(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    up.behave = costs(b"14")
    answer = get(running, way)
    assert (answer.status, answer.all("x-ratelimit-remaining")) == (200, [b"0"])
    assert left(running) == pytest.approx(-4, abs=0.01)
    refused = get(running, way)
    assert refused.status == 429
    assert 495 <= int(refused.all("retry-after")[0]) <= 500  # four owed and one to spend, at 100 s each
    assert answer.all("ratelimit")[0].split(b"t=")[1:] == [b"%d" % 500]
    up.behave = costs(b"1000000000")
    assert get(running, way, "much").status == 200
    assert left(running, "much") == pytest.approx(-10, abs=0.01)  # never more than one budget


@both_ways
@pytest.mark.parametrize("answer", ["chunked", "error", "bodiless"])
def test_any_kind_of_response_can_report_its_cost(
    gateway: StartGateway, upstream: StartUpstream, way: str, answer: str
) -> None:
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    status, framing, status_line = {
        "chunked": (200, b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", b"200 OK"),
        "error": (500, b"Content-Length: 0\r\n\r\n", b"500 Oops"),
        "bodiless": (304, b"\r\n", b"304 Same"),
    }[answer]
    up.behave = lambda wire, _request: wire.send(b"HTTP/1.1 %b\r\nx-gateway-cost: 4\r\n%b" % (status_line, framing))
    got = get(running, way)
    assert (got.status, got.all("x-gateway-cost"), got.all("x-ratelimit-remaining")) == (status, [], [b"6"])


@both_ways
@pytest.mark.parametrize(
    "told", [(b"-1",), (b"x",), (b"1e3",), (b"1", b"2"), (b"1, 2",), (b"1000000001",), (b".5",), (b"nan",), (b"1.",)]
)
def test_what_cannot_be_read_is_ignored_counted_and_logged_once(
    gateway: StartGateway,
    upstream: StartUpstream,
    caplog: pytest.LogCaptureFixture,
    way: str,
    told: tuple[bytes, ...],
) -> None:
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    up.behave = costs(*told)
    with caplog.at_level(logging.WARNING):
        for remaining in (9, 8):
            answer = get(running, way)
            assert answer.all("x-gateway-cost") == []
            assert answer.all("x-ratelimit-remaining") == [b"%d" % remaining]
    assert settled(running) == {"charged": 0, "refunded": 0, "unreadable": 2}
    assert caplog.text.count("X-Gateway-Cost") == 1


def test_costs_are_reported_by_one_plain_decimal() -> None:
    assert [cost_of([text]) for text in (b"0", b"7.25", b"1000000000", b"1000000000.0")] == [0, 7.25, 1e9, 1e9]
    assert [cost_of(given) for given in ([], [b""], [b"1", b"1"], [b"+1"], [b"1000000000.1"], [b"\xb2"])] == [None] * 6


@both_ways
def test_a_client_cannot_report_a_cost(gateway: StartGateway, upstream: StartUpstream, way: str) -> None:
    """An upstream that sends back what it was sent must not charge by a client's word."""
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    with RawClient(running.port) as raw:
        answer = raw.get("/api/x", ("X-Gateway-Cost: 0", *WAYS[way]))
    assert answer.status == 200
    assert up.requests[-1].all("x-gateway-cost") == []


def test_a_handshake_can_report_its_cost(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    lines = b"Upgrade: websocket\r\nConnection: Upgrade\r\nX-Gateway-Cost: 4\r\n"
    up.behave = lambda wire, _request: wire.send(b"HTTP/1.1 101 Switching Protocols\r\n" + lines + b"\r\n")
    with RawClient(running.port) as raw:
        raw.request("GET", "/api/x", ("X-Client-ID: c", "Upgrade: websocket", "Connection: Upgrade"))
        head = (raw.read_until(b"\r\n\r\n") or b"").lower()
    assert head.startswith(b"http/1.1 101")
    assert b"x-ratelimit-remaining: 6\r\n" in head
    assert b"x-gateway-cost" not in head


@both_ways
def test_interim_responses_and_trailers_report_no_cost(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    up.behave = lambda wire, _request: wire.send(
        b"HTTP/1.1 103 Early\r\nX-Gateway-Cost: 5\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Gateway-Cost: 5\r\n\r\n"
    )
    with RawClient(running.port) as raw:
        raw.request("GET", "/api/x", ("X-Client-ID: c", "TE: trailers", "Connection: TE", *WAYS[way]))
        interim = raw.read_until(b"\r\n\r\n") or b""
        assert b"103" in interim
        assert b"cost" not in interim.lower()
        answer = raw.answer()
        assert answer.all("x-ratelimit-remaining") == [b"9"]


@both_ways
def test_the_bucket_of_the_address_is_settled_too(gateway: StartGateway, upstream: StartUpstream, way: str) -> None:
    up = upstream()
    limits = {"rate": 0.01, "capacity": 20, "exempt": []}
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY, "address_limit": limits}))
    up.behave = costs(b"5")
    for client in ("a", "b", "c"):
        assert get(running, way, client).status == 200
    up.behave = reply()
    refused = get(running, way, "d")  # 1 + 5 + 5 + 5 of 20 are spent
    assert refused.status == 200
    up.behave = costs(b"0")
    for _ in range(4):
        assert get(running, way, "e").status == 200
    explained = explain(running, "e")
    assert [round(bucket["tokens"]) for bucket in explained["buckets"]] == [10, 3]


def explain(running: RunningGateway, client: str, path: str = "/api/x") -> Any:
    body = f'{{"client_id": "{client}", "path": "{path}"}}'.encode()
    found = ask(f"{running.url}/explain", method="POST", headers={"Content-Type": "application/json"}, body=body)
    assert found.status == 200, found.body
    return found.json()


# What was charged for nothing


EVERYTHING = {"address_limit": {"rate": 0.01, "capacity": 20, "exempt": []}, "tiers": SLOWLY}


def assert_full(running: RunningGateway, client: str = "c") -> None:
    buckets = explain(running, client)["buckets"]
    assert [bucket["policy"] for bucket in buckets] == ["free", "address"]
    assert [bucket["tokens"] for bucket in buckets] == [bucket["capacity"] for bucket in buckets]


@both_ways
def test_requests_against_an_open_breaker_leave_the_buckets_full(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    up = upstream()
    breaker = {"failure_threshold": 1, "recovery_timeout": 60}
    running = gateway(in_front_of(up.url, circuit_breaker=breaker) | EVERYTHING)
    up.behave = costs(b"0", body=b"x")
    assert get(running, way, "warm").status == 200
    up.behave = reply(b"no", b"500 Oops", ((b"X-Gateway-Cost", b"0"),))
    assert get(running, way, "warm").status == 500
    done = finished(running)
    for _ in range(30):  # thrice what the bucket holds
        answer = get(running, way)
        assert (answer.status, answer.all("x-ratelimit-remaining")) == (503, [b"10"])
        assert answer.all("ratelimit") == [b'"free";r=10;t=1000']
    assert_full(running)
    eventually(lambda: len(done) == 30, "all are recorded")
    assert {(one.reason, one.cost) for one in done} == {("circuit_open", 0)}


@both_ways
def test_without_a_healthy_target_nothing_is_spent(gateway: StartGateway, upstream: StartUpstream, way: str) -> None:
    up = upstream()
    running = gateway(in_front_of(up.url) | EVERYTHING)
    running.live.upstreams["up"].targets[0].is_healthy = False
    for _ in range(15):
        answer = get(running, way)
        assert (answer.status, answer.all("x-ratelimit-remaining")) == (503, [b"10"])
    assert_full(running)


@both_ways
@pytest.mark.parametrize("body", [(), ("Content-Length: 2",)])
def test_a_connection_that_cannot_be_made_costs_nothing(
    gateway: StartGateway, way: str, body: tuple[str, ...]
) -> None:
    breaker = {"failure_threshold": 1000, "minimum_calls": 1000}
    sections = in_front_of("http://127.0.0.1:9", circuit_breaker=breaker, retry={"attempts": 3}) | EVERYTHING
    running = gateway(sections)
    for _ in range(15):
        with RawClient(running.port) as raw:
            raw.request("POST", "/api/x", ("X-Client-ID: c", *body, *WAYS[way]), b"ok" if body else b"")
            answer = raw.answer()
        assert (answer.status, answer.all("x-ratelimit-remaining")) == (502, [b"10"])
    assert_full(running)
    assert settled(running) == {"charged": 0, "refunded": 15, "unreadable": 0}


@both_ways
def test_waiting_for_a_connection_in_vain_costs_nothing(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    up = upstream()
    pool, timeouts = {"max_connections": 1}, {"connect": 0.2}
    running = warm(gateway(in_front_of(up.url, pool=pool, timeouts=timeouts) | {"tiers": SLOWLY}))
    up.behave = lambda wire, _request: wire.is_closed()
    with RawClient(running.port) as first:
        first.request("GET", "/api/x", ("X-Client-ID: first",))
        eventually(lambda: len(up.requests) == 2, "it is with the upstream")
        answer = get(running, way)
        assert (answer.status, answer.all("x-ratelimit-remaining")) == (503, [b"10"])
        assert b"overloaded" in answer.body
    assert left(running) == 10


@both_ways
def test_what_an_upstream_may_have_begun_with_is_paid_for(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """Also if a second attempt then reaches nobody."""
    up = upstream()
    running = warm(gateway(in_front_of(up.url, timeouts={"response": 0.3}) | {"tiers": SLOWLY}))
    up.behave = lambda _wire, _request: False
    with RawClient(running.port) as raw:
        raw.request("POST", "/api/x", ("X-Client-ID: c", "Content-Length: 0", *WAYS[way]))
        answer = raw.answer()
    assert (answer.status, answer.all("x-ratelimit-remaining")) == (502, [b"9"])

    def last_words(wire: Wire, _request: RawRequest) -> bool:
        up._listener.shutdown(socket.SHUT_RDWR)  # a mere `close` waits for the thread that accepts
        wire.send(b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        return False

    up.behave = last_words
    answer = get(running, way)
    assert (answer.status, answer.all("x-ratelimit-remaining")) == (502, [b"8"])
    assert b"upstream_connect_error" in answer.body
    eventually(lambda: left(running) < 8.1, "it is paid for")


@both_ways
def test_a_client_that_disconnects_has_paid(gateway: StartGateway, upstream: StartUpstream, way: str) -> None:
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"tiers": SLOWLY}))
    up.behave = lambda wire, _request: wire.is_closed()
    with RawClient(running.port) as raw:
        raw.request("GET", "/api/x", ("X-Client-ID: c", *WAYS[way]))
        eventually(lambda: len(up.requests) == 2, "it is with the upstream")
    eventually(lambda: running.live.recorder.in_flight == 0, "it is over")
    assert left(running) < 9.1


@both_ways
def test_a_refusal_of_the_limiter_gives_nothing_back(gateway: StartGateway, upstream: StartUpstream, way: str) -> None:
    running = warm(gateway(in_front_of(upstream().url) | {"tiers": SLOWLY}))
    statuses = [get(running, way).status for _ in range(15)]
    assert statuses == [200] * 10 + [429] * 5
    assert settled(running)["refunded"] == 0


# Limits beside those of the tiers

LIMITS = [
    {"name": "tokens", "rate": 0.01, "capacity": 100, "routes": ["all"]},
    {"name": "requests", "rate": 0.01, "capacity": 5, "cost": 1},
]


@both_ways
def test_each_limit_is_settled_but_one_with_a_cost_of_its_own(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """And the response shows the limit that is then the tightest."""
    up = upstream()
    running = warm(gateway(in_front_of(up.url) | {"limits": LIMITS}))
    assert get(running, way).all("ratelimit") == [b'"requests";r=4;t=400']
    up.behave = costs(b"90")
    answer = get(running, way)
    assert answer.all("ratelimit") == [b'"tokens";r=9;t=900']
    assert answer.all("ratelimit-policy") == [b'"free";q=100000;w=100, "tokens";q=100;w=10000, "requests";q=5;w=500']
    shown = ask(f"{running.url}/clients/c").json()["limits"]
    assert {one["limit"]: round(one["tokens"]) for one in shown} == {"tokens": 9, "requests": 3}
    up.behave = costs(b"0")
    assert get(running, way).all("ratelimit") == [b'"requests";r=2;t=200'], "it costs no tokens, and is a request"


def test_a_request_that_reached_no_upstream_is_refunded_by_each_limit(gateway: StartGateway) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9") | {"limits": LIMITS})
    assert get(running, "fast path").status >= 500
    shown = ask(f"{running.url}/clients/c").json()["limits"]
    assert {one["limit"]: round(one["tokens"]) for one in shown} == {"tokens": 100, "requests": 5}
