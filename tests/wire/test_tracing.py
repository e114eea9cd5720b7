"""Traces as a collector gets them, and trace context as upstreams get it; on the fast path and on the others."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_gateway.clients.api_keys import new_key
from api_gateway.config import GatewayConfig
from api_gateway.main import create_app
from api_gateway.observability import trace_exporter
from tests.kit import (
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
    running_gateway,
)
from tests.trace_kit import CLIENT, ERROR, SERVER, UNSET, Collector, ReceivedSpan, collector

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"traceparent: 00-{TRACE}-{SPAN}-01"
ODD = "X-Odd:  two blanks"  # which the general parser reads
TOKEN = "t" * 40
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
HANDSHAKE = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"9\r\ndata: 1\n\n\r\n0\r\n\r\n"
)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Collector]:
    """A collector; gateways export soon, so that tests need not wait for a second."""
    with collector() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_exporter, "EXPORT_INTERVAL", 0.02)
        yield found


@pytest.fixture
def received(receiver: Collector) -> Collector:
    """The collector as if it were new."""
    receiver.clear()
    return receiver


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, receiver: Collector) -> dict[str, Any]:
    """Routes to upstreams with one target, with two of which one refuses, with retries, and with fallbacks."""
    one, refused = {"url": shared.url}, {"url": refusing_url()}
    never = {"circuit_breaker": {"failure_threshold": 1000, "minimum_calls": 1000}}
    upstreams = {
        "up": {"targets": [one], **never},
        "pair": {"targets": [refused, one], "balance": "round_robin", "retry": {"attempts": 2}, **never},
        "again": {"targets": [one], "retry": {"attempts": 3, "statuses": [503], "budget": 1}, **never},
        "down": {"targets": [refused], "retry": {"attempts": 1}, **never},
        "fragile": {"targets": [refused], "circuit_breaker": {"failure_threshold": 1}, "retry": {"attempts": 1}},
        "slow": {"targets": [one], "timeouts": {"connect": 5, "response": 0.2, "idle": 5}, "retry": {"attempts": 1}},
    }
    routes: list[dict[str, Any]] = [{"name": name, "path": f"/api/{name}", "upstream": name} for name in upstreams]
    routes += [
        {"name": "elsewhere", "path": "/api/elsewhere", "upstream": "down", "fallback": {"upstream": "up"}},
        {"name": "static", "path": "/api/static", "upstream": "down", "fallback": {"status": 200, "body": "later"}},
        {"name": "short", "path": "/api/short", "upstream": "up", "timeout": 0.2},
        {"name": "dear", "path": "/api/dear", "upstream": "up", "cost": 3},
    ]
    return {
        "admin": {"token": TOKEN},
        "upstreams": upstreams,
        "routes": routes,
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}, "BASIC": {"rate": 0.001, "capacity": 1}},
        "clients": {"poor": {"tier": "BASIC"}},
        "address_limit": {"rate": 0},
        "tracing": {"enabled": True, "endpoint": receiver.url, "resource": {"team": "edge"}},
    }


def get(client: RawClient, path: str, *headers: str) -> int:
    return client.get(f"/api/{path}", headers).status


def sent_on(up: RawUpstream) -> list[tuple[bytes, list[bytes]]]:
    """Return `traceparent` and `tracestate` as the upstream got them, with each request."""
    found = []
    for request in up.requests:
        (parent,) = request.all("traceparent")
        found.append((parent, request.all("tracestate")))
    return found


def context(span: ReceivedSpan, flags: str = "01") -> bytes:
    return f"00-{span.trace_id}-{span.span_id}-{flags}".encode()


# One request


@pytest.mark.parametrize("odd", [(), (ODD,)], ids=["plain", "general parser"])
def test_a_request_and_its_attempt_are_spans_in_the_clients_trace(
    client: RawClient, up: RawUpstream, received: Collector, odd: tuple[str, ...]
) -> None:
    assert get(client, "dear/1?token=hidden", PARENT, "TraceState: a=1", "tracestate: b=2", *odd) == 200
    ((own, attempt),) = received.exchanges(1)
    assert (own.trace_id, own.parent_id, own.state) == (TRACE, SPAN, "a=1,b=2")
    assert (own.kind, attempt.kind, own.name, attempt.name) == (SERVER, CLIENT, "GET /api/dear", "GET")
    assert (own.status, attempt.status, own.flags, attempt.flags) == (UNSET, UNSET, 0x301, 0x101)
    assert sent_on(up) == [(context(attempt), [b"a=1,b=2"])]
    assert own.start <= attempt.start <= attempt.end <= own.end
    assert abs(own.end / 1e9 - time.time()) < 60
    attributes = dict(own.attributes)
    assert attributes.pop("gateway.tokens.remaining") > 0
    assert attributes.pop("gateway.request.id")
    assert attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "http.route": "/api/dear",
        "url.path": "/api/dear/1",
        "url.scheme": "http",
        "server.address": "gateway.test",
        "network.protocol.version": "1.1",
        "gateway.route": "dear",
        "gateway.upstream": "up",
        "gateway.response.source": "upstream",
        "gateway.attempts": 1,
        "gateway.cost": 3.0,
        "gateway.client.tier": "FREE",
        "gateway.limit": "free",
        "gateway.limit.allowed": True,
        "gateway.limit.decision_source": "memory",
    }
    assert attempt.attributes == {
        "http.request.method": "GET",
        "http.response.status_code": 200,
        "url.full": f"{up.url}/api/dear/1",
        "server.address": "127.0.0.1",
        "server.port": up.port,
        "network.protocol.version": "1.1",
        "gateway.upstream": "up",
        "gateway.circuit_breaker.state": "closed",
    }
    assert (own.resource["service.name"], own.resource["team"]) == ("api-gateway", "edge")
    assert b"hidden" not in b"".join(received.bodies)


def test_a_request_without_context_begins_a_trace(client: RawClient, up: RawUpstream, received: Collector) -> None:
    assert get(client, "up/1") == get(client, "up/2", "tracestate: a=1") == 200
    (first, second) = received.exchanges(2)
    assert first[0].trace_id != second[0].trace_id
    assert [span.parent_id for span in (first[0], second[0])] == ["", ""]
    assert sent_on(up) == [(context(first[1], "03"), []), (context(second[1], "03"), [])], "no state without a parent"


@pytest.mark.parametrize("odd", [(), (ODD,)], ids=["plain", "general parser"])
@pytest.mark.parametrize(
    "fields",
    [
        ("traceparent: garbage", "tracestate: a=1"),
        (f"traceparent: ff-{TRACE}-{SPAN}-01",),
        (f"traceparent: 00-{'0' * 32}-{SPAN}-01",),
        (PARENT, PARENT),
        (PARENT.upper(),),
    ],
)
def test_an_invalid_context_is_replaced(
    client: RawClient, up: RawUpstream, received: Collector, fields: tuple[str, ...], odd: tuple[str, ...]
) -> None:
    assert get(client, "up/1", *fields, *odd) == 200
    ((own, attempt),) = received.exchanges(1)
    assert (own.parent_id, own.trace_id == TRACE) == ("", False)
    assert sent_on(up) == [(context(attempt, "03"), [])]


def test_each_request_of_a_connection_has_a_context_of_its_own(
    client: RawClient, up: RawUpstream, received: Collector
) -> None:
    other = f"traceparent: 00-{'c' * 32}-{SPAN}-00"
    for fields in ((PARENT,), (), (other,), (), (PARENT,), (PARENT,)):
        assert get(client, "up/1", *fields) == 200
    parents = [parent.decode().split("-") for parent, _ in sent_on(up)]
    ids, spans, flags = zip(*[parent[1:] for parent in parents], strict=True)
    assert (ids[0], ids[2], ids[4], ids[5]) == (TRACE, "c" * 32, TRACE, TRACE)
    assert len({*ids}) == 4, "traces that begin here differ"
    assert len({SPAN, *spans}) == 7
    assert flags == ("01", "03", "00", "03", "01", "01")
    exported = [
        context(attempt, flag) for (_, attempt), flag in zip(received.exchanges(5), flags[:2] + flags[3:], strict=True)
    ]
    assert exported == [parent for parent, _ in sent_on(up) if not parent.endswith(b"00")]


def test_a_request_of_http_1_0_is_traced(client: RawClient, up: RawUpstream, received: Collector) -> None:
    client.send(f"GET /api/up/1 HTTP/1.0\r\nHost: gateway.test\r\n{PARENT}\r\ntracestate: a=1\r\n\r\n".encode())
    assert client.answer().status == 200
    ((own, attempt),) = received.exchanges(1)
    assert (own.trace_id, own.attributes["network.protocol.version"]) == (TRACE, "1.0")
    assert sent_on(up) == [(context(attempt), [b"a=1"])]


async def test_a_request_by_another_server_is_traced(tmp_path: Path, up: RawUpstream, received: Collector) -> None:
    settings = {"tracing": {"enabled": True, "endpoint": received.url}, "state_dir": tmp_path}
    app = create_app(GatewayConfig.model_validate(in_front_of(up.url) | settings))
    transport = httpx.ASGITransport(app)
    headers = [("traceparent", PARENT[13:]), ("tracestate", "a=1"), ("x-client-id", "someone")]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway.test", headers=headers) as client,
    ):
        assert (await client.get("/api/x?token=hidden")).status_code == 200
        assert (await client.get("/api/x", headers={"x-client-id": "not valid"})).json()["trace_id"] == TRACE
    (own, attempt), (refused,) = received.exchanges(2)
    assert (own.trace_id, own.parent_id, own.attributes["url.scheme"]) == (TRACE, SPAN, "http")
    assert (refused.reason, refused.trace_id) == ("client_id_invalid", TRACE)
    assert sent_on(up) == [(context(attempt), [b"a=1"])]
    assert b"hidden" not in b"".join(received.bodies)


def test_bodies_do_not_matter(client: RawClient, up: RawUpstream, received: Collector) -> None:
    client.request("POST", "/api/up", ("Content-Length: 3", PARENT), b"abc")
    assert client.answer().status == 200
    client.request("POST", "/api/up", ("Transfer-Encoding: chunked", PARENT), b"3\r\nabc\r\n0\r\n\r\n")
    assert client.answer().status == 200
    groups = received.exchanges(2)
    assert [request.body for request in up.requests] == [b"abc", b"abc"]
    assert [parent for parent, _ in sent_on(up)] == [context(group[1]) for group in groups]


def test_the_connection_keeps_what_it_knows_of_the_other_header_fields(
    client: RawClient, up: RawUpstream, received: Collector
) -> None:
    """Requests that differ in their trace alone go the same way as the first one."""
    for number in range(1, 6):
        assert get(client, "up", f"traceparent: 00-{number:032x}-{number:016x}-01", "X-Same: y") == 200
    groups = received.exchanges(5)
    assert [group[0].trace_id for group in groups] == [f"{number:032x}" for number in range(1, 6)]
    assert [parent for parent, _ in sent_on(up)] == [context(group[1]) for group in groups]
    assert [request.all("x-same") for request in up.requests] == [[b"y"]] * 5


# Attempts


def test_a_retry_is_an_attempt_of_its_own(client: RawClient, up: RawUpstream, received: Collector) -> None:
    for _ in range(2):  # whichever target is the first
        assert get(client, "pair/1", PARENT) == 200
    groups = received.exchanges(2)
    (tried,) = [group for group in groups if len(group) == 3]
    own, failed, served = tried
    assert own.attributes["gateway.attempts"] == 2
    assert (failed.status, failed.attributes["error.type"]) == (ERROR, "upstream_connect_error")
    assert "http.response.status_code" not in failed.attributes
    assert "http.request.resend_count" not in failed.attributes
    assert (served.status, served.attributes["http.request.resend_count"]) == (UNSET, 1)
    assert failed.end <= served.start
    assert context(served) in [parent for parent, _ in sent_on(up)]
    assert own.status == UNSET


def test_a_retried_status_is_an_error_of_its_attempt(client: RawClient, up: RawUpstream, received: Collector) -> None:
    answers = [reply(), reply(status=b"503 Busy"), reply(status=b"503 Busy")]

    def behave(wire: Wire, request: RawRequest) -> None:
        answers.pop()(wire, request)

    up.behave = behave
    assert get(client, "again") == 200
    ((own, *attempts),) = received.exchanges(1)
    assert [span.attributes.get("error.type") for span in attempts] == ["503", "503", None]
    assert [span.attributes["http.response.status_code"] for span in attempts] == [503, 503, 200]
    assert [span.attributes.get("http.request.resend_count") for span in attempts] == [None, 1, 2]
    assert [parent for parent, _ in sent_on(up)] == [context(span, "03") for span in attempts]
    assert own.status == UNSET


@pytest.mark.parametrize(("route", "attempts"), [("elsewhere", ["down", "up"]), ("static", ["down"])])
def test_a_fallback_is_named(
    client: RawClient, received: Collector, up: RawUpstream, route: str, attempts: list[str]
) -> None:
    assert get(client, route) == 200
    ((own, *found),) = received.exchanges(1)
    assert own.attributes["gateway.fallback"] == ("static" if route == "static" else "up")
    assert (own.reason, own.status) == ("upstream_connect_error", UNSET)
    assert [span.attributes["gateway.upstream"] for span in found] == attempts


def test_a_failure_is_an_error_of_both_spans(client: RawClient, received: Collector) -> None:
    answer = client.get("/api/down")
    assert answer.status == 502
    ((own, attempt),) = received.exchanges(1)
    assert (own.status, own.attributes["error.type"], own.reason) == (ERROR, *["upstream_connect_error"] * 2)
    assert (attempt.status, attempt.attributes["error.type"]) == (ERROR, "upstream_connect_error")
    assert json.loads(answer.body)["trace_id"] == own.trace_id


@pytest.mark.parametrize("path", ["slow", "short"])
def test_a_timeout_is_an_error_of_its_attempt(
    client: RawClient, up: RawUpstream, received: Collector, path: str
) -> None:
    up.behave = lambda wire, _request: wire.is_closed() and None
    assert get(client, path) == 504
    ((own, attempt),) = received.exchanges(1)
    assert own.reason == own.attributes["error.type"] == attempt.attributes["error.type"]
    assert own.reason in ("upstream_timeout", "deadline_exceeded")
    assert attempt.end - attempt.start > 0.1e9


def test_a_broken_response_is_an_error(client: RawClient, up: RawUpstream, received: Collector) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        return False

    up.behave = behave
    assert not client.get("/api/up").is_complete
    ((own, attempt),) = received.exchanges(1)
    assert own.attributes["http.response.status_code"] == attempt.attributes["http.response.status_code"] == 200
    assert (own.status, attempt.status, attempt.attributes["error.type"]) == (ERROR, ERROR, "upstream_reset")


def test_a_client_that_leaves_is_no_error_of_the_gateway(
    running: RunningGateway, up: RawUpstream, received: Collector
) -> None:
    up.behave = lambda wire, _request: wire.is_closed() and None
    with RawClient(running.port) as client:
        client.request("GET", "/api/up")
        eventually(lambda: bool(up.requests), "the upstream gets the request")
    ((own, attempt),) = received.exchanges(1)
    assert own.reason == own.attributes["error.type"] == attempt.attributes["error.type"] == "client_disconnected"
    assert "http.response.status_code" not in own.attributes
    assert (own.status, attempt.status) == (UNSET, ERROR)


# Refusals


def test_refusals_have_no_attempt(client: RawClient, received: Collector) -> None:
    assert get(client, "up", "X-Client-ID: poor") == 200
    refused = client.get("/api/up", ("X-Client-ID: poor", PARENT))
    unknown = client.get("/api/nothing")
    assert (refused.status, unknown.status) == (429, 404)
    _, (limited,), (lost,) = received.exchanges(3)
    assert (limited.reason, limited.status, limited.attributes["http.response.status_code"]) == (
        "rate_limited",
        UNSET,
        429,
    )
    assert (limited.attributes["gateway.limit"], limited.attributes["gateway.limit.allowed"]) == ("basic", False)
    assert (limited.attributes["gateway.tokens.remaining"], limited.attributes["gateway.attempts"]) == (0, 0)
    assert limited.attributes["gateway.response.source"] == "gateway"
    assert "error.type" not in limited.attributes
    assert (lost.reason, lost.name, "http.route" in lost.attributes) == ("no_route", "GET", False)
    assert [json.loads(one.body)["trace_id"] for one in (refused, unknown)] == [TRACE, lost.trace_id]
    assert json.loads(refused.body)["reason"] == "rate_limited"


def test_an_open_breaker_is_the_reason(client: RawClient, received: Collector) -> None:
    assert get(client, "fragile") == 502
    assert get(client, "fragile") == 503
    (own, _), (rejected,) = received.exchanges(2)
    assert own.reason == "upstream_connect_error"
    assert (rejected.reason, rejected.status, rejected.attributes["gateway.upstream"]) == (
        "circuit_open",
        ERROR,
        "fragile",
    )


# Streams and tunnels


def test_a_stream_ends_its_span_at_its_end(client: RawClient, up: RawUpstream, received: Collector) -> None:
    up.behave = lambda wire, _request: wire.send(STREAM)
    assert client.get("/api/up").body == b"data: 1\n\n"
    ((own, attempt),) = received.exchanges(1)
    assert (own.status, attempt.attributes["http.response.status_code"]) == (UNSET, 200)


def test_a_websocket_is_traced_from_its_handshake_to_its_end(
    running: RunningGateway, up: RawUpstream, received: Collector
) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(SWITCH)
        wire.read_exactly(2)
        return False

    up.behave = behave
    with RawClient(running.port) as client:
        client.request("GET", "/api/up", (*HANDSHAKE, PARENT))
        assert client.read_until(b"\r\n\r\n")
        assert not received.spans
        client.send(b"\x88\x00")
    ((own, attempt),) = received.exchanges(1)
    assert [span.attributes["http.response.status_code"] for span in (own, attempt)] == [101, 101]
    assert sent_on(up) == [(context(attempt), [])]


# Sampling


def test_the_clients_decision_is_sent_on_and_errors_are_kept(
    client: RawClient, up: RawUpstream, received: Collector
) -> None:
    unsampled = PARENT.replace("-01", "-00")
    assert get(client, "up", unsampled) == 200
    assert get(client, "up", PARENT) == 200
    assert get(client, "down", unsampled) == 502
    first, second = received.exchanges(2)
    assert (first[0].flags, second[0].flags, second[0].status) == (0x301, 0x300, ERROR)
    assert [parent[-3:] for parent, _ in sent_on(up)] == [b"-00", b"-01"]


@contextmanager
def tracing(folder: Path, up: RawUpstream, received: Collector, **settings: Any) -> Iterator[RunningGateway]:
    """Run a gateway with these settings of tracing."""
    own = {"tracing": {"enabled": True, "endpoint": received.url, **settings}, "address_limit": {"rate": 0}}
    with running_gateway(in_front_of(up.url) | own, folder) as running:
        yield running


def test_what_is_slow_is_kept_and_the_rest_is_sampled_by_ratio(
    tmp_path: Path, up: RawUpstream, received: Collector
) -> None:
    def behave(wire: Wire, request: RawRequest) -> None:
        if b"slow" in request.line:
            time.sleep(0.3)
        reply()(wire, request)

    up.behave = behave
    with tracing(tmp_path, up, received, ratio=0, keep_slower_than=0.3) as running, RawClient(running.port) as client:
        for path in ("/api/a", "/api/slow", "/api/b"):
            assert client.get(path).status == 200
    ((own, _),) = received.exchanges(1)
    assert own.attributes["url.path"] == "/api/slow"
    assert {parent[-3:] for parent, _ in sent_on(up)} == {b"-02"}


def test_a_new_trace_is_linked_to_the_clients(tmp_path: Path, up: RawUpstream, received: Collector) -> None:
    with tracing(tmp_path, up, received, parent="restart", client_attributes=True) as running:
        ask(f"{running.url}/api/x", headers={"traceparent": PARENT[13:], "X-Client-ID": "someone"})
    ((own, attempt),) = received.exchanges(1)
    assert (own.links, own.parent_id, own.trace_id == TRACE) == ([(TRACE, SPAN)], "", False)
    assert sent_on(up) == [(context(attempt, "03"), [])]
    assert (own.attributes["gateway.client.id"], own.attributes["client.address"]) == ("someone", "127.0.0.1")


def test_secrets_of_clients_are_not_exported(client: RawClient, received: Collector) -> None:
    key = new_key(b"k" * 32)
    client.get(f"/api/up/{key}", (f"X-Request-ID: {key}",))
    received.exchanges(1)
    assert key.encode() not in b"".join(received.bodies)


# Off, and the rest of the gateway


def test_without_tracing_the_fields_pass_untouched(tmp_path: Path, up: RawUpstream) -> None:
    with running_gateway(in_front_of(up.url), tmp_path) as running, RawClient(running.port) as client:
        client.get("/api/x", ("TraceParent: garbage", "tracestate: A"))
        refused = client.get("/nothing")
        assert running.live.recorder.trace_spans.total() == 0
    assert up.requests[0].all("traceparent") == [b"garbage"]
    assert up.requests[0].all("tracestate") == [b"A"]
    assert b"trace_id" not in refused.body


def test_the_collector_may_be_down(tmp_path: Path, up: RawUpstream) -> None:
    settings = {"enabled": True, "endpoint": refusing_url()}
    with (
        running_gateway(in_front_of(up.url) | {"tracing": settings}, tmp_path) as running,
        RawClient(running.port) as client,
    ):
        for _ in range(20):
            assert client.get("/api/x").status == 200
        spans = running.live.recorder.trace_spans
    assert (spans["exported"], spans["failed"]) == (0, 40), "given up at the end, within seconds"


def test_metrics_have_the_spans_and_exemplars(client: RawClient, running: RunningGateway, received: Collector) -> None:
    assert get(client, "up", PARENT) == 200
    received.exchanges(1)
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept": "application/openmetrics-text"}
    eventually(lambda: running.live.recorder.trace_spans["exported"] > 1, "they are counted")
    answer = ask(f"{running.url}/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    text = answer.body.decode()
    for result in ("exported", "queue_full", "failed", "rejected"):
        assert f'gateway_tracing_spans_total{{result="{result}"}}' in text
    assert "gateway_tracing_queue_exchanges 0" in text
    line, *_ = [line for line in text.splitlines() if TRACE in line and 'route="up"' in line]  # one of each bucket
    assert line.startswith('gateway_http_request_duration_seconds_bucket{le="')
    plain = ask(f"{running.url}/metrics?format=prometheus", headers={"Authorization": f"Bearer {TOKEN}"})
    assert TRACE.encode() not in plain.body, "the older format has no exemplars"
