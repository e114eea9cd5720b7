"""The fallback of a route: for which failures it responds, what it reports, and what it costs."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import GatewayConfig
from api_gateway.errors import (
    BadRequest,
    CircuitOpen,
    ClientDisconnected,
    GatewayError,
    NoHealthyUpstream,
    Overloaded,
    StoreUnavailable,
    UpstreamConnectError,
    UpstreamConnectTimeout,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.models import Exchange, Outcome
from api_gateway.proxy.fallback import Fallback, applies
from tests.cases import each
from tests.kit import (
    FakeClocks,
    RawAnswer,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    eventually,
    refusing_url,
    reply,
    running_gateway,
)

ODD = "X-Odd:  two blanks"  # which the general parser reads
STATIC, OTHER = Fallback(status=200), Fallback("other")


# For which failures


@each(
    ("kind", "repeatable", "once"),
    [
        (NoHealthyUpstream, True, True),
        (CircuitOpen, True, True),
        (Overloaded, True, True),
        (UpstreamConnectError, True, True),
        (UpstreamConnectTimeout, True, True),
        (UpstreamReset, True, False),
        (UpstreamTimeout, True, False),
        (UpstreamProtocolError, False, False),
        (StoreUnavailable, False, False),
        (BadRequest, False, False),
        (ClientDisconnected, False, False),
    ],
)
def test_it_replaces_refusals_and_attempts_that_failed_without_effect(
    kind: type[GatewayError], *, repeatable: bool, once: bool
) -> None:
    for fallback in (STATIC, OTHER):
        assert applies(fallback, kind("no"), is_repeatable=True, is_replayable=True) is repeatable
        assert applies(fallback, kind("no"), is_repeatable=False, is_replayable=True) is once


def test_another_upstream_needs_the_body_and_a_static_response_does_not() -> None:
    error = UpstreamReset("no")
    assert applies(STATIC, error, is_repeatable=True, is_replayable=False)
    assert not applies(OTHER, error, is_repeatable=True, is_replayable=False)


# Configuration


def problems(fallback: Any) -> str:
    section = {"targets": [{"url": "http://127.0.0.1:1"}]}
    route = {"name": "r", "path": "/api", "upstream": "users", "fallback": fallback}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - pydantic's own, whose words are looked at
        GatewayConfig.model_validate({"upstreams": {"users": section, "orders": section}, "routes": [route]})
    return str(raised.value)


@each(
    ("fallback", "words"),
    [
        ({"upstream": "order"}, "routes[0] (r).fallback.upstream: no such upstream, got 'order'"),
        ({"upstream": "order"}, "orders"),
        ({"upstream": "users"}, "must be another upstream than the route's own"),
        ({}, "either a status or an upstream"),
        ({"status": 200, "upstream": "orders"}, "either a status or an upstream"),
        ({"upstream": "orders", "body": "x"}, "need a status"),
        ({"status": 204, "body": "x"}, "has no body"),
        ({"status": 101}, "greater than or equal to 200"),
        ({"status": 200, "headers": {"Content-Length": "1"}}, "is written by the gateway itself"),
        ({"status": 200, "headers": {"X-Request-Id": "1"}}, "is written by the gateway itself"),
        ({"status": 200, "headers": {"X y": "1"}}, "should match pattern"),
        ({"status": 200, "headers": {"X": "a\r\nb"}}, "should match pattern"),
        ({"upstream": "orders", "fallback": {"status": 200}}, "Extra inputs are not permitted"),
    ],
)
def test_a_mistake_is_named(fallback: dict[str, Any], words: str) -> None:
    """A fallback has none itself, so nothing goes round in circles."""
    assert words in problems(fallback)


# On the wire


@pytest.fixture(scope="module")
def spare() -> Iterator[RawUpstream]:
    server = RawUpstream(reply(b"spare", headers=((b"X-Gateway-Fallback", b"forged"), (b"X-From", b"spare"))))
    yield server
    server.close()


INSTEAD = {"status": 203, "headers": {"Content-Type": "application/json", "X-Why": "a b"}, "body": '{"ü": []}'}


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, spare: RawUpstream) -> dict[str, Any]:
    refused = refusing_url()
    calm = {"failure_threshold": 100_000, "minimum_calls": 100_000}

    def section(url: str, breaker: dict[str, Any] = calm, **options: Any) -> dict[str, Any]:
        retry = {"attempts": 2, "budget": 1, "min_retries_per_second": 1000, "backoff": {"base": 0.001}}
        timeouts = {"response": 1.0}  # far from the deadline of the timed routes
        return {"targets": [{"url": url}], "circuit_breaker": breaker, "retry": retry, "timeouts": timeouts, **options}

    upstreams = {
        "main": section(shared.url),
        "opening": section(shared.url, {"failure_threshold": 1, "recovery_timeout": 60}),
        "refused": section(refused),
        "spare": section(spare.url),
        "silent": section(shared.url, timeouts={"response": 0.3}),  # for requests that get no response at all
    }
    other = {"upstream": "spare"}
    routes = [
        ("main-static", "main", INSTEAD, None),
        ("main-other", "main", other, None),
        ("opening-other", "opening", other, None),
        ("opening-static", "opening", INSTEAD, None),
        ("refused-static", "refused", INSTEAD, None),
        ("refused-other", "refused", other, None),
        ("silent-static", "silent", INSTEAD, None),
        ("silent-other", "silent", other, None),
        ("silent-refused", "silent", {"upstream": "refused"}, None),
        ("timed-static", "main", INSTEAD, 0.2),
        ("timed-other", "main", other, 0.2),
        ("empty", "refused", {"status": 204}, None),
        ("plain", "refused", {"status": 200, "body": "sorry"}, None),
        ("none", "main", None, None),
    ]
    return {
        "upstreams": upstreams,
        "routes": [
            {"name": name, "path": f"/api/{name}", "upstream": upstream, "fallback": fallback, "timeout": timeout}
            for name, upstream, fallback, timeout in routes
        ],
        "tiers": {"FREE": {"rate": 0.001, "capacity": 100_000}},
    }


@pytest.fixture
def up(running: RunningGateway, shared: RawUpstream, spare: RawUpstream) -> RawUpstream:
    """The main upstream, with a connection to it kept so that the fast path is open."""
    shared.behave = reply(b"main")
    assert ask(f"{running.url}/api/none").status == 200
    shared.requests.clear()
    spare.requests.clear()
    return shared


@pytest.fixture
def done(running: RunningGateway) -> Iterator[list[Exchange]]:
    """Every exchange that ends."""
    app: Any = running.server._app
    record = app.fast_path.current.record
    seen: list[Exchange] = []
    eventually(lambda: running.live.recorder.in_flight == 0, "the requests of the tests before are recorded")
    before = record._observers
    record._observers = (*before, seen.append)
    yield seen
    record._observers = before


def dies(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"HTTP")
    return False


def is_silent(wire: Wire, _request: RawRequest) -> bool:
    wire.is_closed()
    return False


def garbles(wire: Wire, _request: RawRequest) -> bool:
    wire.send(b"garbage\r\n\r\n")
    return False


def get(running: RunningGateway, target: str, *headers: str, method: str = "GET", body: bytes = b"") -> RawAnswer:
    with RawClient(running.port) as client:
        client.request(method, target, (*headers, *((f"Content-Length: {len(body)}",) if body else ())), body)
        return client.answer(method)


@pytest.mark.parametrize("odd", [(), (ODD,)])
@pytest.mark.parametrize(
    ("name", "behave", "reason"),
    [
        ("main", dies, "upstream_reset"),
        ("silent", is_silent, "upstream_timeout"),
        ("refused", dies, "upstream_connect_error"),
    ],
)
@pytest.mark.parametrize("kind", ["static", "other"])
def test_it_responds_for_a_failure_and_says_so_and_the_record_keeps_the_reason(
    running: RunningGateway,
    up: RawUpstream,
    done: list[Exchange],
    name: str,
    behave: Callable[[Wire, RawRequest], bool],
    reason: str,
    kind: str,
    odd: tuple[str, ...],
) -> None:
    up.behave = behave
    route, said = f"{name}-{kind}", "static" if kind == "static" else "spare"
    answer = get(running, f"/api/{route}", *odd)
    assert answer.all("x-gateway-fallback") == [said.encode()]
    if kind == "static":
        assert (answer.status, answer.body) == (203, INSTEAD["body"].encode())  # type: ignore[attr-defined]  # a string
        assert (answer.all("content-type"), answer.all("x-why")) == ([b"application/json"], [b"a b"])
    else:
        assert (answer.status, answer.body, answer.all("x-from")) == (200, b"spare", [b"spare"])
    assert len(answer.all("x-request-id")) == len(answer.all("ratelimit")) == 1
    eventually(lambda: len(done) == 1, "it is recorded")
    record = done[0]
    assert (record.fallback, record.reason, record.route) == (said, reason, route)
    assert (record.source, record.upstream) == (("gateway", name) if kind == "static" else ("upstream", "spare"))
    assert "Upstream" in (record.detail or "")
    recorder = running.live.recorder
    assert recorder.fallbacks[route, said, reason] > 0


@pytest.mark.parametrize("kind", ["static", "other"])
def test_it_responds_where_the_breaker_rejects(running: RunningGateway, up: RawUpstream, kind: str) -> None:
    """Nothing is sent to an upstream whose breaker is open; the fallback is asked at once."""
    breaker = running.live.upstreams["opening"].breaker
    ticket = breaker.admit(time.monotonic())
    if ticket is not None:
        breaker.settle(ticket, Outcome.FAILURE, time.monotonic())
    for odd in ((), (ODD,)):
        answer = get(running, f"/api/opening-{kind}", *odd, method="POST", body=b"data")
        assert answer.status == (203 if kind == "static" else 200)
    assert up.requests == []


@pytest.mark.parametrize("kind", ["static", "other"])
def test_it_responds_where_no_target_is_healthy(running: RunningGateway, up: RawUpstream, kind: str) -> None:
    (target,) = running.live.upstreams["main"].targets
    target.is_healthy = False
    try:
        answer = get(running, f"/api/main-{kind}", method="POST", body=b"data")
    finally:
        target.is_healthy = True
    assert answer.status == (203 if kind == "static" else 200)
    assert up.requests == []


@pytest.mark.parametrize("odd", [(), (ODD,)])
@pytest.mark.parametrize("kind", ["static", "other"])
def test_a_request_that_may_have_taken_effect_gets_the_error(
    running: RunningGateway, up: RawUpstream, spare: RawUpstream, kind: str, odd: tuple[str, ...]
) -> None:
    up.behave = dies
    answer = get(running, f"/api/main-{kind}", *odd, method="POST", body=b"data")
    assert (answer.status, answer.all("x-gateway-fallback")) == (502, [])
    assert spare.requests == []


@pytest.mark.parametrize("odd", [(), (ODD,)])
@pytest.mark.parametrize("headers", [("Idempotency-Key: a",), ()])
def test_the_other_upstream_gets_the_body_too(
    running: RunningGateway, up: RawUpstream, spare: RawUpstream, headers: tuple[str, ...], odd: tuple[str, ...]
) -> None:
    """A method that is not a promise needs a key."""
    up.behave = dies
    answer = get(running, "/api/main-other", *headers, *odd, method="POST" if headers else "PUT", body=b"data")
    assert (answer.status, [request.body for request in spare.requests]) == (200, [b"data"])


@each("kind", ["static", "other"])
@each(
    "behave",
    [garbles, reply(b"no", b"500 No"), reply(b"no", b"503 No"), reply(b"no", b"404 No")],
    ids=["garbage", "500", "503", "404"],
)
def test_a_response_of_the_upstream_is_never_replaced(
    running: RunningGateway, up: RawUpstream, kind: str, behave: Any
) -> None:
    up.behave = behave
    answer = get(running, f"/api/main-{kind}")
    assert answer.status in (500, 503, 404, 502)
    assert answer.all("x-gateway-fallback") == []


def test_it_never_responds_after_the_first_byte(running: RunningGateway, up: RawUpstream) -> None:
    def breaks_off(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        return False

    up.behave = breaks_off
    for odd in ((), (ODD,)):
        answer = get(running, "/api/main-static", *odd)
        assert (answer.status, answer.body, answer.is_complete) == (200, b"half", False)


def test_a_fallback_that_fails_leaves_the_first_failure(
    running: RunningGateway, up: RawUpstream, done: list[Exchange]
) -> None:
    up.behave = is_silent
    answer = get(running, "/api/silent-refused")
    problem = json.loads(answer.body)
    assert (answer.status, problem["reason"], answer.all("x-gateway-fallback")) == (504, "upstream_timeout", [])
    assert "The fallback failed too: Upstream 'refused'" in problem["detail"]
    eventually(lambda: len(done) == 1, "it is recorded")
    assert (done[0].fallback, done[0].upstream, done[0].reason) == (None, "silent", "upstream_timeout")


def test_a_deadline_leaves_time_for_a_static_response_only(running: RunningGateway, up: RawUpstream) -> None:
    up.behave = is_silent
    assert get(running, "/api/timed-static").status == 203
    assert get(running, "/api/timed-other").status == 504


def test_a_deadline_has_passed_when_its_timer_says_so(
    sections: dict[str, Any], up: RawUpstream, tmp_path: Path
) -> None:
    """Timers of an event loop may fire before the clock has reached their time; here the clock stands still."""
    up.behave = is_silent
    with running_gateway(sections, tmp_path, FakeClocks().clocks) as running:
        assert get(running, "/api/timed-other").status == 504
        assert get(running, "/api/timed-static").status == 203


@pytest.mark.parametrize(("method", "path", "body"), [("HEAD", "plain", b""), ("GET", "empty", b"")])
def test_a_static_response_without_a_body_is_framed_as_such(
    running: RunningGateway, up: RawUpstream, method: str, path: str, body: bytes
) -> None:
    with RawClient(running.port) as client:
        for _ in range(2):  # on one connection, which is still in step
            client.request(method, f"/api/{path}")
            answer = client.answer(method)
            assert answer.status == (204 if path == "empty" else 200)
            assert answer.all("content-length") == ([] if path == "empty" else [b"5"])


def test_a_plain_body_is_text(running: RunningGateway, up: RawUpstream) -> None:
    answer = get(running, "/api/plain")
    assert (answer.body, answer.all("content-type")) == (b"sorry", [b"text/plain; charset=utf-8"])


# What it costs


def spent(running: RunningGateway, target: str, *headers: str) -> int:
    """Return the tokens that a request takes, as the response itself tells, beside what one to another route says."""
    left = int(get(running, "/api/none", "X-Client-ID: payer").all("x-ratelimit-remaining")[0])
    answer = get(running, target, "X-Client-ID: payer", *headers)
    return left - int(answer.all("x-ratelimit-remaining")[0])


@pytest.mark.parametrize("odd", [(), (ODD,)])
def test_a_static_response_costs_nothing_where_nothing_was_sent_and_all_else_is_charged(
    running: RunningGateway, up: RawUpstream, odd: tuple[str, ...]
) -> None:
    """Were it free after the upstream was reached, limits would protect an upstream no longer while it fails."""
    assert spent(running, "/api/refused-static", *odd) == 0
    assert spent(running, "/api/refused-other", *odd) == 1
    up.behave = lambda wire, request: (reply() if b"none" in request.line else dies)(wire, request)
    assert spent(running, "/api/main-static", *odd) == 1
    assert spent(running, "/api/main-other", *odd) == 1


def test_the_metrics_count_it(running: RunningGateway, up: RawUpstream) -> None:
    before = running.live.recorder.refusals["upstream_connect_error"]
    assert get(running, "/api/plain").status == 200
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_fallbacks_total{fallback="static",reason="upstream_connect_error",route="plain"}' in text
    assert running.live.recorder.refusals["upstream_connect_error"] == before
    assert ask(f"{running.url}/metrics").json()["fallbacks"]["plain"]["upstream_connect_error"] >= 1
