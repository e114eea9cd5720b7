"""One deadline covers a whole request: its sources, its value, what is forwarded, and how it counts."""

import json
import re
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.errors import BadRequest
from api_gateway.proxy.deadline import Deadline, deadline_of
from api_gateway.proxy.route_table import Route
from tests.cases import each
from tests.faulty import Fault, FaultyUpstream, Listening
from tests.kit import (
    PATIENCE,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    refusing_url,
    reply,
)
from tests.wire.test_websocket import ASKING, accepting, echo

SHORT, LONG = 0.3, 5.0
ODD = ("X-Odd:  two blanks",)  # which the general parser reads
ARRIVED = 1000.0


# Which one holds


@each(
    ("client", "route", "total", "expected"),
    [
        (None, None, None, None),
        (b"2", None, None, ("client", 2.0, True)),
        (b"0.25", None, 3.0, ("client", 0.25, True)),
        (b"3", None, 3.0, ("upstream", 3.0, True)),
        (b"4", None, 3.0, ("upstream", 3.0, True)),
        (None, None, 3.0, ("upstream", 3.0, False)),
        (None, 2.0, None, ("route", 2.0, True)),
        (None, 5.0, 3.0, ("route", 5.0, True)),
        (b"6", 5.0, 3.0, ("route", 5.0, True)),
        (b"4", 5.0, 3.0, ("client", 4.0, True)),
    ],
)
def test_the_routes_takes_the_place_of_the_upstreams_and_the_clients_counts_if_it_is_less(
    client: bytes | None, route: float | None, total: float | None, expected: tuple[str, float, bool] | None
) -> None:
    given = [] if client is None else [client]
    found = deadline_of(Route("r", "/api", "up", timeout=route), total, given, ARRIVED)
    assert (found and (found.source, found.seconds, found.is_forwarded)) == expected
    if found is not None:
        assert found.at == ARRIVED + found.seconds
        assert found.is_of_client is (found.source == "client")


@each("value", [b"", b"0", b"0.0", b"-1", b"1s", b"1,5", b".5", b"1.", b"1e3", b"inf", b"0x10", b"\xb2", b"1" * 10])
def test_a_value_that_is_no_time_is_refused_by_name(value: bytes) -> None:
    with pytest.raises(BadRequest) as raised:
        deadline_of(Route("r", "/api", "up"), None, [value], ARRIVED)
    assert "X-Request-Timeout" in raised.value.detail
    shown = repr(value.decode("latin-1")) if len(value) < 8 else "10 characters"  # it could be a credential
    assert raised.value.detail.endswith(f"got {shown}.")


def test_two_values_are_refused_even_if_they_agree() -> None:
    with pytest.raises(BadRequest, match="'1, 1'"):
        deadline_of(Route("r", "/api", "up"), None, [b"1", b"1"], ARRIVED)


@given(st.floats(0.001, 1e6), st.floats(0, 1e6))
def test_the_forwarded_timeout_is_never_more_than_what_is_left_nor_zero(seconds: float, passed: float) -> None:
    deadline = Deadline(ARRIVED + seconds, seconds, "client", "", is_forwarded=True)
    now = ARRIVED + passed
    value = deadline.header_value(now)
    assert re.fullmatch(rb"\d+\.\d{3}", value)
    assert 0 < float(value) <= max(deadline.remaining(now) + 5e-4, 0.001)


# On the wire


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    """One upstream for each kind of deadline, so that each has its own breaker."""
    refused = refusing_url()

    def section(url: str, **options: Any) -> dict[str, Any]:
        breaker = {"failure_threshold": 1000, "minimum_calls": 1000}
        retry = {"attempts": 2, "budget": 1}
        return {"targets": [{"url": url}], "retry": retry, "circuit_breaker": breaker, **options}

    upstreams = {
        "free": section(shared.url),
        "timed": section(shared.url),
        "both": section(shared.url, timeouts={"total": LONG}),
        "total": section(shared.url, timeouts={"total": SHORT}),
        "crowded": section(shared.url, pool={"max_connections": 1}),
        "refused": section(refused, retry={"attempts": 5, "budget": 1, "backoff": {"base": 10, "cap": 10}}),
    }
    timeouts = {"timed": SHORT, "both": SHORT, "crowded": SHORT}
    return {
        "upstreams": upstreams,
        "routes": [
            {"name": name, "path": f"/api/{name}", "upstream": name, "timeout": timeouts.get(name)}
            for name in upstreams
        ]
        + [{"name": "held", "path": "/api/held", "upstream": "crowded"}],  # which has no deadline
        "tiers": {"FREE": {"rate": 0.001, "capacity": 100_000}},
    }


def is_silent(wire: Wire, _request: RawRequest) -> bool:
    wire.is_closed()
    return False


def drips(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        wire.send(b"x")
        time.sleep(0.02)
    return False


def get(running: RunningGateway, target: str, *headers: str) -> tuple[RawAnswer, float]:
    began = time.monotonic()
    with RawClient(running.port) as client:
        answer = client.get(target, headers)
    return answer, time.monotonic() - began


def failures(running: RunningGateway, name: str) -> int:
    return int(running.live.upstreams[name].breaker.window_counts(time.monotonic()).failures)


@each(
    ("name", "headers", "words", "is_blamed"),
    [
        ("free", (f"X-Request-Timeout: {SHORT}",), "the client's X-Request-Timeout", False),
        ("timed", (), "the timeout of route 'timed'", True),
        ("timed", ("X-Request-Timeout: 9",), "the timeout of route 'timed'", True),
        ("both", (), "the timeout of route 'both'", True),
        ("both", ("X-Request-Timeout: 0.1",), "0.1 s, the client's X-Request-Timeout", False),
        ("total", (), "timeouts.total of upstream 'total'", True),
    ],
)
@each("odd", [(), ODD], ids=["fast path", "general parser"])
@each("behave", [is_silent, drips])
def test_it_ends_the_request_and_names_its_source_and_that_of_a_client_is_ignored_by_the_breaker(
    running: RunningGateway,
    up: RawUpstream,
    name: str,
    headers: tuple[str, ...],
    words: str,
    behave: Any,
    odd: tuple[str, ...],
    *,
    is_blamed: bool,
) -> None:
    """Before the response's head it is a 504; a response that has begun is broken off so that it shows."""
    up.behave = behave
    for _ in range(20):
        before = failures(running, name)
        answer, seconds = get(running, f"/api/{name}", *headers, *odd)
        if behave is is_silent or answer.status == 200:
            break  # else the machine was too busy for the response to begin in time
    assert seconds < SHORT + PATIENCE
    if behave is is_silent:
        problem = json.loads(answer.body)
        assert (answer.status, problem["reason"]) == (504, "upstream_timeout")
        assert words in problem["detail"]
    else:
        assert (answer.status, answer.is_complete) == (200, False)
    assert failures(running, name) == before + is_blamed
    (target,) = running.live.upstreams[name].targets
    eventually(lambda: target.in_flight == 0, "its place is free")


@pytest.mark.parametrize("odd", [(), ODD], ids=["fast path", "general parser"])
def test_the_remaining_time_is_forwarded_and_decreases_with_every_attempt(
    running: RunningGateway, up: RawUpstream, odd: tuple[str, ...]
) -> None:
    left = [reply(b"no", b"503 No", ((b"Retry-After", b"1"),)), reply()]
    up.behave = lambda wire, request: left.pop(0)(wire, request)  # noqa: PLW0108 - another one each time
    assert get(running, "/api/free", "X-Request-Timeout: 5", *odd)[0].status == 200
    first, second = (request.all("x-request-timeout") for request in up.requests)
    assert (len(first), len(second)) == (1, 1)
    assert 4.5 < float(first[0]) <= 5
    assert 3 < float(second[0]) < float(first[0]) - 0.99
    assert re.fullmatch(rb"\d\.\d{3}", first[0])


@each(
    ("target", "headers", "most"),
    [
        ("/api/timed", (), SHORT),
        ("/api/timed", ("X-Request-Timeout: 0.2",), 0.2),
        ("/api/total", ("X-Request-Timeout: 9",), SHORT),
        ("/api/total", (), None),
        ("/api/free", (), None),
        ("/api/free", ("X-Request-Timeout: 9", "Connection: X-Request-Timeout"), 9),
        ("/api/free", ("X-Request-Timeout: 9", "X-Odd:  two blanks"), 9),
        ("/api/timed", ("X-Odd:  two blanks",), SHORT),
    ],
)
def test_the_upstream_gets_it_if_the_client_or_the_route_has_one(
    running: RunningGateway, up: RawUpstream, target: str, headers: tuple[str, ...], most: float | None
) -> None:
    up.requests.clear()
    assert get(running, target, *headers)[0].status == 200
    told = up.requests[0].all("x-request-timeout")
    assert len(told) == (most is not None)
    assert most is None or most - 0.2 < float(told[0]) <= most


def remaining(running: RunningGateway) -> int:
    answer, _ = get(running, "/api/free", "X-Client-ID: counted")
    return int(answer.all("x-ratelimit-remaining")[0])


def test_a_malformed_one_is_refused_before_anything_is_charged_or_sent(
    running: RunningGateway, up: RawUpstream
) -> None:
    before = remaining(running)
    up.requests.clear()
    answer, _ = get(running, "/api/free", "X-Client-ID: counted", "X-Request-Timeout: soon")
    assert (answer.status, json.loads(answer.body)["reason"]) == (400, "bad_request")
    assert "got 'soon'" in json.loads(answer.body)["detail"]
    assert up.requests == []
    assert remaining(running) == before - 1


def test_there_is_no_retry_that_would_outlast_it(running: RunningGateway, up: RawUpstream) -> None:
    """What the upstream said is passed on instead, as soon as it has."""
    up.behave = reply(b"no", b"503 No", ((b"Retry-After", b"1"),))
    answer, seconds = get(running, "/api/free", "X-Request-Timeout: 0.9")
    assert (answer.status, answer.body, answer.all("retry-after")) == (503, b"no", [b"1"])
    assert seconds < 0.5
    assert len(up.requests) == 1


def test_it_covers_the_pause_between_attempts(running: RunningGateway, up: RawUpstream) -> None:
    """Whether the pause would outlast it or not, the response is there in time."""
    answer, seconds = get(running, "/api/refused", "X-Request-Timeout: 0.5")
    assert answer.status in (502, 504)
    assert seconds < 1.5


@pytest.mark.parametrize("odd", [(), ODD], ids=["fast path", "general parser"])
@pytest.mark.parametrize("headers", [(), ("X-Request-Timeout: 0.2",)])
def test_waiting_for_a_connection_is_covered_and_ignored_by_the_breaker_and_costs_nothing(
    running: RunningGateway, up: RawUpstream, headers: tuple[str, ...], odd: tuple[str, ...]
) -> None:
    gate = threading.Event()
    before, blamed = remaining(running), failures(running, "crowded")

    def holds(wire: Wire, request: RawRequest) -> None:
        gate.wait(PATIENCE)
        reply()(wire, request)

    up.behave = holds
    with RawClient(running.port) as holder:
        holder.request("GET", "/api/held")
        eventually(lambda: any(b"/held" in one.line for one in up.requests), "the only connection is taken")
        answer, seconds = get(running, "/api/crowded", "X-Client-ID: counted", *headers, *odd)
        gate.set()
        assert holder.answer().status == 200
    assert (answer.status, json.loads(answer.body)["reason"]) == (504, "upstream_timeout")
    assert seconds < 1
    assert failures(running, "crowded") == blamed
    up.behave = reply()
    assert remaining(running) == before - 1


@pytest.mark.parametrize("odd", [(), ODD], ids=["fast path", "general parser"])
def test_a_target_that_does_not_accept_is_detected_and_another_is_tried(
    gateway: Any, up: RawUpstream, caplog: pytest.LogCaptureFixture, odd: tuple[str, ...]
) -> None:
    """Though the route's time is shorter than the time to connect."""
    up.behave = reply(b"good")
    dead = FaultyUpstream()
    sections = in_front_of(dead.url, up.url, circuit_breaker={"failure_threshold": 2}, timeouts={"connect": 5})
    sections["routes"][0]["timeout"] = 0.8
    running = gateway(sections)
    with dead.failing(Fault("has a full backlog", listening=Listening.IS_FULL)):
        assert [get(running, "/api/x", *odd)[0].status for _ in range(6)] == [200] * 6
    assert "is ejected: 2 consecutive failures; last: upstream_timeout" in caplog.text
    dead.close()


def test_a_client_that_is_slow_with_its_body_is_ignored_by_the_breaker(
    running: RunningGateway, up: RawUpstream
) -> None:
    before = failures(running, "timed")
    with RawClient(running.port) as client:
        client.request("PUT", "/api/timed", ("Content-Length: 9",), b"half")
        assert client.answer().status == 504
    eventually(lambda: running.live.recorder.in_flight == 0, "it is over")
    assert failures(running, "timed") == before


def test_of_a_websocket_it_covers_the_handshake_only(running: RunningGateway, up: RawUpstream) -> None:
    up.behave = accepting(echo)
    with RawClient(running.port) as client:
        client.request("GET", "/api/timed", ASKING)
        head = client.read_until(b"\r\n\r\n")
        assert head is not None
        assert head.startswith(b"HTTP/1.1 101 ")
        time.sleep(SHORT + 0.2)
        client.send(b"still there")
        assert client.read_exactly(11) == b"still there"
    up.behave = is_silent
    with RawClient(running.port) as client:
        client.request("GET", "/api/timed", ASKING)
        assert client.answer().status == 504


def test_without_a_deadline_a_request_has_no_time_limit_on_both_paths(gateway: Any, up: RawUpstream) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        time.sleep(SHORT + 0.2)
        reply()(wire, _request)

    up.behave = behave
    started = gateway(in_front_of(up.url))
    for headers in ((), ("X-Odd:  two blanks",)):
        assert get(started, "/api/x", *headers)[0].status == 200


@pytest.mark.parametrize("when", ["before the head", "within the body"])
@pytest.mark.parametrize("odd", [(), ODD], ids=["fast path", "general parser"])
@pytest.mark.parametrize("path", ["static", "elsewhere"])
def test_a_fallback_replaces_a_response_that_comes_too_late(
    gateway: Any, up: RawUpstream, odd: tuple[str, ...], path: str, when: str
) -> None:
    """A static one; another upstream would have no time left. A response that has begun is broken off."""
    sections = in_front_of(up.url)
    sections["upstreams"]["other"] = {"targets": [{"url": up.url}]}
    sections["routes"] = [
        {
            "name": "static",
            "path": "/api/static",
            "upstream": "up",
            "timeout": SHORT,
            "fallback": {"status": 200, "body": "late"},
        },
        {
            "name": "else",
            "path": "/api/elsewhere",
            "upstream": "up",
            "timeout": SHORT,
            "fallback": {"upstream": "other"},
        },
    ]
    up.behave = is_silent if when == "before the head" else drips
    running = gateway(sections)
    for _ in range(20):
        answer, _ = get(running, f"/api/{path}", *odd)
        if when == "before the head" or not answer.is_complete:
            break  # else the machine was too busy for the response to begin in time
    if when == "within the body":
        assert (answer.status, answer.is_complete) == (200, False)
    elif path == "static":
        assert (answer.status, answer.body, answer.all("x-gateway-fallback")) == (200, b"late", [b"static"])
    else:
        assert (answer.status, json.loads(answer.body)["reason"]) == (504, "upstream_timeout")
    eventually(lambda: running.live.recorder.in_flight == 0, "it is over")
    assert [target.in_flight for target in running.live.upstreams["up"].targets] == [0]
