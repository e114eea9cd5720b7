"""`/explain`: its result is what the request then gets, in any state, and asking changes nothing."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from api_gateway.admin.explain_schema import ExplainRequest, Explanation
from api_gateway.admin.explainer import Explainer
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.exchanges.fast_path import FastPath
from api_gateway.http1.asgi import Message
from api_gateway.limits.concurrency import LocalSlots
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.metrics import Recorder
from api_gateway.middleware import ExchangeRecords
from api_gateway.models import NANOSECONDS, Exchange, Quota
from api_gateway.proxy.admission import Admission
from api_gateway.proxy.candidate_limits import CandidateLimits
from api_gateway.proxy.cost_settlement import CostSettlement
from api_gateway.proxy.fallback import Fallback
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.limit_stage import RateLimitStage
from api_gateway.proxy.route_table import CostRule, Route, RouteTable
from api_gateway.proxy.stages import (
    AmbiguityStage,
    IdentityStage,
    LoadSheddingStage,
    RouteStage,
)
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.resilience.breaker_policy import BreakerPolicy, State
from api_gateway.resilience.event_loop_limit import EventLoopShedder
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from api_gateway.router import Router
from api_gateway.upstreams.load_balancing import least_requests, round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient
from tests.kit import RawUpstream, RunningGateway, ask, attributes_of, in_front_of

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

FREE = Quota.per_second("FREE", 1, 5)
PAID = Quota.per_second("PAID", 10, 20)
ADDRESS = Quota.per_second("address", 2, 6)
CANDIDATE = Quota.per_second("FREE candidate", 1, 3)


class Moody(httpx.AsyncBaseTransport):
    """An upstream with configurable responses."""

    status = 200

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self.status:
            raise httpx.ConnectError("refused")
        return httpx.Response(self.status, stream=Nothing())


class Nothing(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        return
        yield b""


class Stage:
    """The whole request path in memory, on a clock that is moved by hand."""

    def __init__(self, tmp_path: Path) -> None:
        self.now_ns = 1_000 * NANOSECONDS
        self.limiter = MemoryLimiter([FREE, PAID, ADDRESS])
        self.recorder = Recorder(["plain", "two", "static", "other"], ["one", "pair"], ["FREE", "PAID"], [50], 0.0)
        self.transport = Moody()
        policy = BreakerPolicy(failure_threshold=2, recovery_timeout=4)
        self.upstreams = [
            Upstream("one", [Target("http://127.0.0.1:1")], CircuitBreaker(policy, self.now), round_robin),
            Upstream(
                "pair",
                [Target("http://127.0.0.1:1"), Target("http://127.0.0.1:2", weight=2)],
                CircuitBreaker(policy, self.now),
                least_requests(random.Random(1)),
            ),
        ]
        timeouts = Timeouts(1, 1, 1, None)
        routes = [
            Route("plain", "/api/one", "one", methods=frozenset({"GET", "POST", "TRACE"}), costs=COSTS),
            Route("two", "/api/pair", "pair", host="pair.test", cost=2, strip_prefix="/api"),
            Route("static", "/api/static", "one", fallback=Fallback(status=203, body=b"instead")),
            Route("other", "/api/instead", "one", fallback=Fallback("pair")),
        ]
        limit_headers = RateLimitHeaders()
        settlement = CostSettlement(
            limiter=self.limiter,
            clock_ns=lambda: self.now_ns,
            recorder=self.recorder,
        )
        router = Router(
            RouteTable(routes),
            {one.name: UpstreamClient(one, self.transport, timeouts) for one in self.upstreams},
            clock=lambda: self.now,
            max_body_bytes=1000,
            observe_attempt=self.recorder.observe_attempt,
            on_transition=lambda *_: None,
            on_cost=settlement.on_cost,
            on_fallback=settlement.on_fallback,
        )
        candidate_limits = CandidateLimits(
            limiter=self.limiter,
            clock_ns=lambda: self.now_ns,
            recorder=self.recorder,
            candidates={"FREE": CANDIDATE},
            routes=routes,
            slots=LocalSlots(Counter()),
        )
        limits = RateLimitStage(
            limiter=self.limiter, address_quota=ADDRESS, exempt=(), candidate_limits=candidate_limits
        )
        tiers = {"FREE": FREE, "PAID": PAID}
        registry = ClientRegistry(tiers, "FREE", {"paid": "PAID"}, SqliteClientStore(tmp_path / "unused"))
        shedder = EventLoopShedder(None, source=random.Random(1))
        admission = Admission(
            [
                AmbiguityStage(),
                IdentityStage(clients=registry, priorities=SINGLE_PRIORITY),
                RouteStage(router.routes),
                LoadSheddingStage(shedder),
                limits,
            ]
        )
        headers = HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=1000)
        self.seen: list[Exchange] = []
        record = ExchangeRecords(
            recorder=self.recorder,
            observers=[self.recorder.observe, self.seen.append],
            on_failure=settlement.on_failure,
        )
        self.fast_path = FastPath(
            record=record,
            admission=admission,
            headers=headers,
            router=router,
            limit_headers=limit_headers,
            clock=lambda: self.now,
            clock_ns=lambda: self.now_ns,
        )
        self.explainer = Explainer(
            admission=admission,
            headers=headers,
            router=router,
            limits=limits,
            limiter=self.limiter,
            shedder=shedder,
            header="X-Client-ID",
            clock=lambda: self.now,
            clock_ns=lambda: self.now_ns,
        )

    @property
    def now(self) -> float:
        return self.now_ns / NANOSECONDS

    def state(self) -> Any:
        """Everything a request could change."""
        breakers = [attributes_of(one.breaker) for one in self.upstreams]
        targets = [(target.in_flight, target.credit) for one in self.upstreams for target in one.targets]
        limiter = self.limiter
        table = limiter._table
        tables = dict(table.current), dict(table.previous), dict(limiter._overflow), table.rotated_at_ns
        return breakers, targets, tables, dict(self.recorder.would_refuse), len(self.recorder.requests_by_client)

    async def request(self, question: ExplainRequest) -> dict[str, Any]:
        """Make the request that the question is about; return status and problem."""
        messages: list[Message] = []

        async def send(message: Message) -> None:
            messages.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        headers = [(b"host", question.host.encode())]
        if question.client_id is not None:
            headers.append((b"x-client-id", question.client_id.encode()))
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": question.method,
            "path": unquote(question.path),
            "raw_path": question.path.encode(),
            "query_string": b"",
            "scheme": "http",
            "headers": headers,
            "client": (question.address, 50_000),
        }
        await self.fast_path.serve(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in messages[1:])
        return {"status": messages[0]["status"], "headers": dict(messages[0]["headers"]), "body": body}


COSTS = (CostRule(frozenset({"POST"}), "/api/one/export", 4.5, 2), CostRule(None, "/api/one/never", 21))

questions = st.builds(
    ExplainRequest,
    client_id=st.sampled_from([None, "a", "b", "paid"]),
    method=st.sampled_from(["GET", "GET", "POST", "PUT", "TRACE"]),
    path=st.sampled_from(
        (
            *("/api/one", "/api/one", "/api/one/x", "/api/one/export", "/api/one//export", "/api/one/never"),
            *(
                "/api/one/export;v=1",
                "/api/one/export//..",
                "/api/one/x%5Cexport%20",
                "/api/one/..%3B/x",
                "/api/one%00",
            ),
            *("/api/pair/1", "/api/pair", "/api//pair", "/api", "/api/other", "/api/static", "/api/instead"),
        )
    ),
    host=st.sampled_from(["pair.test", "pair.test:80", "other.test"]),
    address=st.sampled_from(["192.0.2.7", "192.0.2.8", "2001:db8::1"]),
)
moods = st.sampled_from([200, 200, 200, 500, 0])
steps = st.lists(
    st.tuples(st.sampled_from((0, 1)) | st.integers(0, 6 * NANOSECONDS), moods, st.integers(0, 7), questions),
    max_size=30,
)


def assert_predicted(told: Explanation, got: dict[str, Any], exchange: Exchange, mood: int) -> None:
    """Compare the result with the response to the request."""
    result = told.result
    assert exchange.client is not None
    assert (told.client.id, told.client.tier.name) == (exchange.client.id, exchange.client.quota.name)
    assert (told.route.name if told.route else None) == exchange.route
    if result.decision == "allowed":
        assert exchange.decision is not None
        assert exchange.decision.allowed
        assert got["status"] == (mood or (203 if exchange.fallback == "static" else 502))
        return
    if result.decision == "fallback":
        assert told.fallback is not None
        assert exchange.reason == result.reason
        assert got["status"] == (result.status or mood or 503)
        if got["status"] != 503:
            assert (exchange.fallback, got["headers"][b"x-gateway-fallback"].decode()) == (told.fallback.name,) * 2
        return
    problem = json.loads(got["body"])
    assert (result.status, result.reason, result.detail) == (got["status"], problem["reason"], problem["detail"])
    assert result.retry_after_seconds == pytest.approx(problem.get("retry_after_seconds"), abs=0.001)
    assert (result.retry_after_seconds is None) == (b"retry-after" not in got["headers"])
    expected = {"rate_limited": "limited", "cost_exceeds_capacity": "exceeds_capacity"}.get(
        problem["reason"], "refused"
    )
    assert result.decision == expected
    if exchange.decision is not None and not exchange.decision.allowed:
        assert told.limiting_bucket == exchange.decision.key


PLAIN = ExplainRequest(client_id=None, path="/api/one", address="192.0.2.7")
NEVER = ExplainRequest(client_id="a", path="/api/one/never", address="192.0.2.7")


@given(script=steps)
@example(script=[*[(0, 200, 0, PLAIN)] * 4, (0, 200, 0, NEVER)])  # two buckets that never hold it: the first is named
@settings(max_examples=150)
@pytest.mark.timeout(900)
def test_the_result_is_what_the_request_then_gets_and_explaining_changes_nothing(
    script: list[tuple[int, int, int, ExplainRequest]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    stage = Stage(tmp_path_factory.getbasetemp())

    async def play() -> None:
        for gap_ns, mood, health, question in script:
            stage.now_ns += gap_ns
            stage.transport.status = mood
            targets = [target for one in stage.upstreams for target in one.targets]
            for bit, target in enumerate(targets):
                target.is_healthy = bool(health >> bit & 1) or health == 0
            before = stage.state()
            told = await stage.explainer.explain(question)
            assert await stage.explainer.explain(question) == told
            assert stage.state() == before
            got = await stage.request(question)
            assert_predicted(told, got, stage.seen[-1], mood)

    asyncio.run(play())


@given(script=steps, question=questions)
@settings(max_examples=50)
def test_what_is_limited_passes_the_limiter_when_it_was_said_to(
    script: list[tuple[int, int, int, ExplainRequest]],
    question: ExplainRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    stage = Stage(tmp_path_factory.getbasetemp())

    async def play() -> None:
        for gap_ns, _, _, other in script:
            stage.now_ns += gap_ns
            await stage.request(other)
        told = await stage.explainer.explain(question)
        waits = [bucket.retry_after_seconds for bucket in told.buckets]
        if told.result.decision == "limited":
            assert all(wait is not None for wait in waits)
            wait_ns = round(max(wait or 0 for wait in waits) * NANOSECONDS)
            stage.now_ns += wait_ns
            assert (await stage.explainer.explain(question)).result.decision != "limited"
            stage.now_ns -= 1
            assert (await stage.explainer.explain(question)).result.decision == "limited"

    asyncio.run(play())


# What it shows


@pytest.mark.parametrize(
    ("path", "pair_is_up", "outcome", "fallback"),
    [
        ("/api/static", True, "fallback", {"name": "static", "status": 203, "used": True}),
        ("/api/instead", True, "fallback", {"name": "pair", "status": None, "used": True}),
        ("/api/instead", False, "refused", {"name": "pair", "status": None, "used": False}),
    ],
)
async def test_it_shows_the_fallback_and_whether_it_would_respond(
    tmp_path: Path, path: str, outcome: str, fallback: dict[str, Any], *, pair_is_up: bool
) -> None:
    stage = Stage(tmp_path)
    question = ExplainRequest(client_id="a", path=path, address="192.0.2.7")
    told = await stage.explainer.explain(question)
    assert told.result.decision == "allowed"
    assert told.fallback is not None
    assert told.fallback.model_dump() == fallback | {"used": False}
    for upstream in stage.upstreams[: 1 if pair_is_up else 2]:
        for target in upstream.targets:
            target.is_healthy = False
    told = await stage.explainer.explain(question)
    assert (told.result.decision, told.result.reason) == (outcome, "no_healthy_upstream")
    assert told.fallback is not None
    assert told.fallback.model_dump() == fallback


async def test_it_has_every_figure(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    question = ExplainRequest(client_id="a", method="POST", path="/api/one/export?all", address="192.0.2.7")
    assert (await stage.request(question.model_copy(update={"path": "/api/one"})))["status"] == 200
    stage.now_ns += NANOSECONDS // 4
    told = await stage.explainer.explain(question)
    assert told.result.model_dump() == {
        "decision": "limited",
        "status": 429,
        "reason": "rate_limited",
        "retry_after_seconds": 0.25,
        "detail": told.result.detail,
    }
    assert told.client.model_dump() == {
        "id": "a",
        "tier_source": "default",
        "detail": told.client.detail,
        "registered": False,
        "proved_by": None,
        "verified_only": False,
        "address_limited": True,
        "tier": {"name": "FREE", "rate": 1, "capacity": 5},
    }
    assert "X-Client-ID" in told.client.detail
    assert told.route is not None
    assert told.route.model_dump() == {
        "name": "plain",
        "path": "/api/one",
        "match": "prefix",
        "host": None,
        "conditions": [],
        "upstream": "one",
        "destination": "upstream one",
        "cost": 4.5,
        "cost_source": "rule: POST /api/one/export",
    }
    own, address = told.buckets
    assert own.model_dump() == {
        "key": "client:a",
        "policy": "free",
        "tokens": 4.25,
        "capacity": 5,
        "processes": None,
        "cost": 4.5,
        "allowed": False,
        "retry_after_seconds": 0.25,
        "reset_after_seconds": 0.75,
    }
    assert (address.key, address.policy, address.tokens, address.allowed) == ("peer:192.0.2.7", "address", 5.5, True)
    assert told.limiting_bucket == "client:a"
    assert told.candidate is not None
    assert (told.candidate.key, told.candidate.cost, told.candidate.allowed) == ("candidate:client:a", 2, True)
    assert told.upstream is not None
    assert told.upstream.model_dump() == {
        "name": "one",
        "circuit_breaker": "CLOSED",
        "next_probe_in_seconds": None,
        "healthy_targets": 0,
        "unchecked_targets": 1,
        "targets": 1,
        "concurrency": None,
        "workers": None,
    }
    assert told.decision_source == "memory"


async def test_of_those_that_pass_the_one_that_will_bind_first_binds(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    for client in ("a", "b"):
        await stage.request(ExplainRequest(client_id=client, path="/api/one", address="192.0.2.7"))
    told = await stage.explainer.explain(ExplainRequest(client_id="a", path="/api/one", address="192.0.2.7"))
    assert [bucket.tokens for bucket in told.buckets] == [4, 4]
    assert told.limiting_bucket == "client:a"
    await stage.request(ExplainRequest(client_id="b", path="/api/one", address="192.0.2.7"))
    told = await stage.explainer.explain(ExplainRequest(client_id="a", path="/api/one", address="192.0.2.7"))
    assert (told.result.decision, told.limiting_bucket) == ("allowed", "peer:192.0.2.7")


@pytest.mark.parametrize(
    ("client_id", "source", "count"), [(None, "address", 2), ("a", "default", 2), ("paid", "configured", 1)]
)
async def test_it_shows_the_client_and_how_it_was_identified(
    tmp_path: Path, client_id: str | None, source: str, count: int
) -> None:
    told = await Stage(tmp_path).explainer.explain(ExplainRequest(client_id=client_id, path="/api/one"))
    assert (told.client.tier_source, len(told.buckets)) == (source, count)
    assert told.client.registered == (count == 1)
    assert told.route is not None
    assert told.route.cost_source == "route"


async def test_a_breaker_whose_time_has_come_is_shown_as_it_would_be_met(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    question = ExplainRequest(client_id="paid", path="/api/one")
    stage.transport.status = 500
    for _ in range(2):
        await stage.request(question)
    told = await stage.explainer.explain(question)
    assert (told.result.reason, told.result.status) == ("circuit_open", 503)
    assert told.upstream is not None
    assert (told.upstream.circuit_breaker, told.upstream.next_probe_in_seconds) == ("OPEN", 4)
    stage.now_ns += 4 * NANOSECONDS
    told = await stage.explainer.explain(question)
    assert told.upstream is not None
    assert (told.result.decision, told.upstream.circuit_breaker) == ("allowed", "HALF_OPEN")
    assert stage.upstreams[0].breaker.state is State.OPEN


# Over HTTP


@pytest.fixture
def running(gateway: StartGateway, upstream: StartUpstream) -> RunningGateway:
    return gateway(in_front_of(upstream().url) | {"tiers": {"FREE": {"rate": 0.01, "capacity": 2}}})


def explained(running: RunningGateway, body: Any, **headers: str) -> Any:
    return ask(
        f"{running.url}/explain",
        method="POST",
        headers={"Content-Type": "application/json", **headers},
        body=json.dumps(body).encode(),
    )


def test_it_is_asked_by_post_and_costs_nothing(running: RunningGateway) -> None:
    for method in ("GET", "get", "FOO1", "M_X", "!#"):  # any token is forwarded
        answer = explained(running, {"client_id": "c", "method": method, "path": "/api/x"})
        assert answer.status == 200
        found = Explanation.model_validate(answer.json())
        assert (found.result.decision, found.buckets[0].tokens) == ("allowed", 2)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"client_id": "a b", "path": "/api/x"}, 400, "client_id_invalid"),
        ({"client_id": "", "path": "/api/x"}, 400, "client_id_invalid"),
        ({"client_id": "ü", "path": "/api/x"}, 400, "client_id_invalid"),
        ({"client_id": "c", "path": "/health"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api/ü"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "api"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api", "method": "get it"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api", "method": "G,T"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api", "method": ""}, 422, "invalid_value"),
        ({"path": "/api"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api", "more": 1}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api", "address": "999.1.1.1"}, 422, "invalid_value"),
        ({"client_id": "c", "path": "/api", "address": ""}, 422, "invalid_value"),
    ],
)
def test_an_invalid_explain_request_is_refused_with_the_reason(
    running: RunningGateway, body: dict[str, Any], status: int, reason: str
) -> None:
    answer = explained(running, body)
    assert (answer.status, answer.json()["reason"]) == (status, reason)


def test_it_needs_an_operator(running: RunningGateway) -> None:
    answer = explained(running, {"client_id": "c", "path": "/api"}, Forwarded="for=192.0.2.1")
    assert (answer.status, answer.json()["reason"]) == (401, "unauthorized")
    answer = ask(f"{running.url}/clients", headers={"Forwarded": "for=192.0.2.1"})
    assert (answer.status, answer.json()["reason"]) == (401, "unauthorized")


def test_the_most_frequent_clients_are_listed(running: RunningGateway) -> None:
    for client, times in (("eager", 6), ("busy", 2), ("busier", 3)):
        for _ in range(times):
            ask(f"{running.url}/api/x", headers={"X-Client-ID": client})
    ask(f"{running.url}/api/x")
    found = ask(f"{running.url}/clients?sort=limited").json()
    assert [(one["client_id"], one["limited"], one["requests"]) for one in found["clients"]] == [
        ("eager", 4, 6),
        ("busier", 1, 3),
    ]
    assert found["clients"][0] == {
        "client_id": "eager",
        "tier_source": "default",
        "tier": "FREE",
        "limited": 4,
        "limited_error_bound": 0,
        "requests": 6,
        "requests_error_bound": 0,
        "bare": 0,
        "bare_error_bound": 0,
    }
    found = ask(f"{running.url}/clients?sort=requests&limit=3").json()
    assert [one["client_id"] for one in found["clients"]] == ["eager", "busier", "busy"]
    everyone = ask(f"{running.url}/clients?sort=requests").json()["clients"]
    assert (everyone[-1]["client_id"], everyone[-1]["tier_source"]) == ("127.0.0.1", "address")
    for query in ("sort=size", "limit=0", "limit=1001"):
        assert ask(f"{running.url}/clients?{query}").status == 422


@pytest.mark.parametrize(
    ("limit", "address", "is_limited"),
    [
        ({"rate": 1, "capacity": 5}, "192.0.2.7", True),
        ({"rate": 1, "capacity": 5}, "127.0.0.1", False),
        ({"rate": 0}, "192.0.2.7", False),
    ],
    ids=["limited", "exempt", "no limit"],
)
def test_an_address_that_is_exempt_is_not_said_to_be_limited(
    gateway: Any, upstream: Any, limit: dict[str, Any], address: str, *, is_limited: bool
) -> None:
    running = gateway(in_front_of(upstream().url) | {"address_limit": limit})
    question = json.dumps({"client_id": "c", "path": "/api/x", "address": address}).encode()
    headers = {"Content-Type": "application/json"}
    found = ask(f"{running.url}/explain", method="POST", headers=headers, body=question).json()
    assert found["client"]["address_limited"] is is_limited
    assert ("address limit applies" in found["client"]["detail"]) is is_limited
    assert len(found["buckets"]) == 1 + is_limited
    shown = found["upstream"]
    assert (shown["healthy_targets"], shown["unchecked_targets"], shown["targets"]) == (0, 1, 1)
