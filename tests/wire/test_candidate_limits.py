"""Candidates: evaluated beside the limits in force on the same requests, counted, and without effect on them."""

import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.config import GatewayConfig, load_config
from api_gateway.limits.concurrency import LocalSlots
from api_gateway.metrics import Recorder
from api_gateway.models import NANOSECONDS, Charge, Client, Decision, Exchange, Quota
from api_gateway.proxy.candidate_limits import CandidateCost, CandidateLimits
from api_gateway.proxy.route_table import CostRule, Route
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.settings.diagnostics import ConfigError
from tests.cases import each
from tests.kit import RawClient, RawUpstream, RunningGateway, ask, eventually, in_front_of, reply

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

ODD = "X-Odd:  two blanks"  # which the general parser reads
WAYS = {"fast path": (), "general parser": (ODD,)}
both_ways = pytest.mark.parametrize("way", WAYS)

FREE = Quota.per_second("FREE", 1, 10)
TIGHTER = Quota.per_second("FREE candidate", 1, 4)
PAID = Quota.per_second("PAID", 10, 100)
ROUTE = Route("r", "/api/x", "up", costs=(CostRule(frozenset({"POST"}), "/api/x/export", 5, 8),))


class Trying:
    """Candidate limits and the limits in force beside them, on one clock."""

    def __init__(self, routes: tuple[Route, ...] = (), candidates: dict[str, Quota] | None = None) -> None:
        self.now_ns = 1_000 * NANOSECONDS
        self.limiter = MemoryLimiter([FREE, TIGHTER, PAID])
        self.recorder = Recorder(["r"], ["up"], ["FREE", "PAID"], [50], 0.0)
        self.quotas, self.routes = candidates or {}, routes
        self.candidates = self.candidates_with(self.limiter)

    def candidates_with(self, limiter: Any) -> CandidateLimits:
        return CandidateLimits(
            limiter=limiter,
            clock_ns=lambda: self.now_ns,
            recorder=self.recorder,
            candidates=self.quotas,
            routes=self.routes,
            slots=LocalSlots(Counter()),
        )

    def request(
        self, quota: Quota = FREE, cost: float = 1, method: str = "GET", path: str = "/api/x", client: str = "c"
    ) -> Exchange:
        exchange = Exchange("id", method, path, "192.0.2.7", 0.0, Client(client, f"client:{client}", quota, "default"))
        exchange.route, exchange.cost = "r", cost
        exchange.decision = self.limiter.decide([Charge(f"client:{client}", quota, quota.cost_ns(cost))], self.now_ns)
        self.candidates.observe(exchange)
        return exchange

    @property
    def counted(self) -> tuple[int, int]:
        return self.recorder.would_refuse.total(), self.recorder.would_allow.total()


def test_a_lower_candidate_counts_requests_it_would_limit() -> None:
    trying = Trying(candidates={"FREE": TIGHTER})
    for _ in range(10):
        trying.request()
    assert trying.counted == (6, 0)
    assert trying.recorder.would_refuse == {"FREE": 6, "PAID": 0}
    trying.request()  # both refuse: nothing would change
    assert trying.counted == (6, 0)


def test_a_higher_candidate_counts_requests_it_would_allow() -> None:
    trying = Trying(candidates={"FREE": Quota.per_second("FREE candidate", 1, 12)})
    for _ in range(15):
        trying.request()
    assert trying.counted == (0, 2)


@pytest.mark.parametrize("most", [1, 4096])
def test_charges_that_are_remembered_have_their_own_candidate_charges(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway keeps the charges of a client's requests with its header set; others may take their place."""
    monkeypatch.setattr("api_gateway.proxy.candidate_limits._MOST_REMEMBERED", most)
    trying = Trying(candidates={"FREE": TIGHTER})
    clients = [Client(name, f"client:{name}", FREE, "default") for name in "ab"]
    charges = [[Charge(client.key, FREE, FREE.cost_ns(cost))] for client, cost in zip(clients, (1, 2), strict=True)]
    for number in range(3):
        for client, own in zip(clients, charges, strict=True):
            exchange = Exchange("id", "GET", "/api/x", "192.0.2.7", 0.0, client)
            exchange.cost, exchange.charges = float(own[0].increment_ns // FREE.emission_ns), own
            exchange.decision = trying.limiter.decide(own, trying.now_ns)
            trying.candidates.observe(exchange)
            assert exchange.candidate is not None
            assert exchange.candidate[0][0].key == f"candidate:{client.key}"
            assert exchange.candidate[1].remaining == max(4 - (number + 1) * exchange.cost, 0)
        assert len(trying.candidates._remembered) == min(most, 2)
    assert trying.counted == (1, 0)  # the third request of two tokens


def test_a_tier_without_a_candidate_is_not_looked_at() -> None:
    trying = Trying(candidates={"FREE": TIGHTER})
    before = len(trying.limiter)
    assert trying.request(PAID).candidate is None
    assert len(trying.limiter) == before + 1  # the enforced bucket


@each("path", ["/api/x/export", "/api/x/export/7", "/api/x//./export"])
def test_a_candidate_cost_counts_what_the_bucket_would_no_longer_hold(path: str) -> None:
    """Everything else a client asks for is charged to the candidate's bucket as well, which it shares."""
    trying = Trying((ROUTE,))
    for _ in range(3):
        trying.request()
    assert trying.request(cost=5, method="POST", path=path).decision.allowed  # type: ignore[union-attr]  # as above
    assert trying.counted == (1, 0)  # 3 + 8 of 10
    assert trying.request(cost=5, method="GET", path=path).candidate is not None


@each(
    ("method", "path", "cost"),
    [("GET", "/api/x/export", None), ("POST", "/api/x/export", 8.0), ("POST", "/api/x", None)],
)
def test_a_candidate_cost_is_its_rules(method: str, path: str, cost: float | None) -> None:
    assert CandidateCost(ROUTE).of(method, path) == cost
    assert ROUTE.has_candidate
    assert not Route("r", "/api/x", "up", costs=(CostRule(None, None, 5),)).has_candidate
    assert CandidateCost(Route("r", "/api/x", "up", candidate_cost=0)).of("GET", "/api/x") == 0


def test_a_candidate_cost_above_the_capacity_would_limit() -> None:
    trying = Trying((Route("r", "/api/x", "up", candidate_cost=11),))
    trying.request()
    assert trying.counted == (1, 0)


@given(
    steps=st.lists(st.tuples(st.integers(0, 3 * NANOSECONDS), st.sampled_from((0, 0.5, 1, 3, 12))), max_size=40),
    rate=st.sampled_from((0.5, 1, 2)),
    capacity=st.integers(1, 20),
)
def test_it_counts_exactly_what_the_candidate_would_have_decided_otherwise(
    steps: list[tuple[int, float]], rate: float, capacity: int
) -> None:
    """Against a limiter with the candidate in force; and the one in force decides as without a candidate."""
    candidate = Quota.per_second("FREE candidate", rate, capacity)
    trying, alone, other = Trying(candidates={"FREE": candidate}), MemoryLimiter([FREE]), MemoryLimiter([candidate])
    would_refuse = would_allow = 0
    for gap_ns, cost in steps:
        trying.now_ns += gap_ns
        exchange = trying.request(cost=cost)
        assert exchange.decision == alone.decide([Charge("client:c", FREE, FREE.cost_ns(cost))], trying.now_ns)
        tried = other.decide([Charge("k", candidate, candidate.cost_ns(cost))], trying.now_ns)
        assert exchange.decision is not None
        would_refuse += exchange.decision.allowed and not tried.allowed
        would_allow += tried.allowed and not exchange.decision.allowed
    assert trying.counted == (would_refuse, would_allow)


class Waiting:
    """A limiter with a store that has not responded yet for any candidate."""

    def __init__(self) -> None:
        self.replies: list[Callable[[Decision], None]] = []

    def decide(self, _charges: Any, _now_ns: int) -> None:
        return None

    def decide_async(self, _charges: Any, _now_ns: int, reply: Callable[[Decision], None]) -> None:
        self.replies.append(reply)


def test_a_decision_of_the_store_counts_once_the_store_has_responded() -> None:
    trying, store = Trying(candidates={"FREE": TIGHTER}), Waiting()
    trying.candidates = trying.candidates_with(store)
    exchange = trying.request()
    assert (exchange.candidate, trying.counted) == (None, (0, 0))
    store.replies[0](Decision("candidate:client:c", TIGHTER, allowed=False, remaining=0, wait_ns=1, reset_ns=1))
    assert trying.counted == (1, 0)


LOGIN = Quota.per_second("login", 1, 9)
CANDIDATES = {"login": Quota.per_second("login candidate", 1, 5, "login")}


def request_of(trying: Trying, *further: Charge) -> Exchange:
    exchange = Exchange("id", "GET", "/api/x", "192.0.2.7", 0.0, Client("c", "client:c", FREE, "default"))
    exchange.route, exchange.cost = "r", 1
    exchange.charges = [Charge("client:c", FREE, FREE.cost_ns(1)), *further]
    exchange.decision = trying.limiter.decide(exchange.charges, trying.now_ns)
    trying.candidates.observe(exchange)
    return exchange


def test_a_candidate_of_a_limit_is_evaluated_with_all_limits_of_the_request() -> None:
    trying = Trying(candidates=CANDIDATES)
    login = Charge("limit:login:192.0.2.7", LOGIN, LOGIN.cost_ns(1), 1)
    for _ in range(12):
        exchange = request_of(trying, login)
    assert exchange.candidate is not None
    keys = [charge.key for charge in exchange.candidate[0]]
    assert keys == ["candidate:client:c", "candidate:limit:login:192.0.2.7"]
    assert exchange.candidate[1].quota is CANDIDATES["login"]
    assert trying.recorder.would_refuse == {"FREE": 4, "PAID": 0}
    assert trying.recorder.candidate_refusals == {("login", "FREE"): 4}
    assert request_of(trying).candidate is None, "none of its limits has a candidate"


# Seen from outside


@both_ways
def test_a_candidate_refuses_nothing_and_is_not_sent_to_clients_and_the_metrics_count_it(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    up = upstream()
    tier = {"rate": 0.01, "capacity": 10, "candidate": {"rate": 0.01, "capacity": 4}}
    running = gateway(in_front_of(up.url) | {"tiers": {"FREE": tier}})
    assert ask(f"{running.url}/api/warm", headers={"X-Client-ID": "warm"}).status == 200
    with RawClient(running.port) as client:
        answers = [client.get("/api/x", ("X-Client-ID: c", *WAYS[way])) for _ in range(12)]
    assert [answer.status for answer in answers] == [200] * 10 + [429] * 2
    assert not [line for answer in answers for line in answer.head.split(b"\r\n") if b"candidate" in line]
    figures = ask(f"{running.url}/metrics").json()["rate_limiter"]
    assert figures["would_refuse"]["FREE"] == 6
    assert figures["would_allow"]["FREE"] == 0
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_rate_limit_would_refuse_total{tier="FREE"} 6.0' in text
    assert 'gateway_rate_limit_would_allow_total{tier="FREE"} 0.0' in text


@both_ways
def test_what_is_settled_is_settled_for_the_candidate_too(
    gateway: StartGateway, upstream: StartUpstream, way: str
) -> None:
    """Refunds would otherwise drain the candidate during an outage, and tell of limits nobody would have met."""
    up = upstream()
    tier = {"rate": 0.01, "capacity": 10, "candidate": {"rate": 0.01, "capacity": 4}}
    running = gateway(in_front_of(up.url) | {"tiers": {"FREE": tier}})
    assert ask(f"{running.url}/api/warm", headers={"X-Client-ID": "warm"}).status == 200
    up.behave = reply(headers=((b"X-Gateway-Cost", b"0"),))
    with RawClient(running.port) as client:
        for _ in range(12):
            assert client.get("/api/x", ("X-Client-ID: c", *WAYS[way])).status == 200
    assert ask(f"{running.url}/metrics").json()["rate_limiter"]["would_refuse"]["FREE"] == 0


def test_a_candidate_of_a_concurrency_limit_refuses_nothing_and_is_shown(
    gateway: StartGateway, upstream: StartUpstream
) -> None:
    up, held, plain = upstream(), threading.Event(), reply()
    up.behave = lambda wire, request: held.wait(30) and plain(wire, request)
    limit = {"name": "three", "concurrent": 3, "candidate": {"concurrent": 1}}
    running = gateway(in_front_of(up.url) | {"limits": [limit]})

    def in_flight() -> Any:
        return ask(f"{running.url}/metrics").json()["rate_limiter"]["in_flight"]

    def explained() -> Any:
        body = json.dumps({"path": "/api/x", "client_id": "c"}).encode()
        fields = {"Content-Type": "application/json"}
        return ask(f"{running.url}/explain", method="POST", headers=fields, body=body).json()

    assert in_flight() == {"three": 0, "three candidate": 0}
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(running.port)) for _ in range(4)]
        for client, way in zip(clients[:3], ("fast path", "general parser", "fast path"), strict=True):
            client.request("GET", "/api/x", ("X-Client-ID: c", *WAYS[way]))
        eventually(lambda: in_flight() == {"three": 3, "three candidate": 1}, "three requests are in flight")
        assert clients[3].get("/api/x", ("X-Client-ID: c",)).status == 429
        (shown,) = explained()["candidate_concurrency"]
        assert (shown["policy"], shown["in_flight"], shown["concurrent"]) == ("three candidate", 1, 1)
        assert not shown["allowed"]
        assert explained()["result"]["reason"] == "concurrency_exceeded"
        held.set()
        assert [client.answer().status for client in clients[:3]] == [200] * 3
    assert in_flight() == {"three": 0, "three candidate": 0}
    assert explained()["candidate_concurrency"][0]["allowed"]
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_rate_limit_candidate_refusals_total{limit="three",tier="FREE"} 2.0' in text


# Configuration


def test_candidates_are_configured_beside_what_they_would_change() -> None:
    config = GatewayConfig.model_validate(
        {
            "tiers": {"free": {"candidate": {"rate": 2, "capacity": 20}}},
            "upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:9"}]}},
            "routes": [
                {"name": "r", "path": "/api", "upstream": "up", "candidate_cost": 2, "costs": [
                    {"methods": ["POST"], "cost": 5, "candidate_cost": 8}
                ]}
            ],
        }
    )  # fmt: skip
    assert config.tiers["FREE"].candidate is not None
    assert (config.tiers["FREE"].rate, config.tiers["FREE"].candidate.capacity) == (1, 20)
    assert (config.routes[0].candidate_cost, config.routes[0].costs[0].candidate_cost) == (2, 8)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("tiers: {FREE: {candidate: {rate: 0, capacity: 1}}}", "tiers.FREE.candidate.rate"),
        ("tiers: {FREE: {candidate: {rate: 0.000001, capacity: 1000}}}", "tiers.FREE.candidate: the bucket must fill"),
        ("tiers: {FREE: {rate: 0.000001, capacity: 1000}}", "tiers.FREE: the bucket must fill within"),
        ("address_limit: {rate: 0.000001, capacity: 1000}", "address_limit: the bucket must fill within"),
    ],
)
def test_what_no_bucket_can_be_is_refused_by_name(tmp_path: Path, yaml: str, words: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert words in str(raised.value)


def test_a_candidate_cost_no_tier_can_pay_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(
        'upstreams: {up: {targets: [{url: "http://127.0.0.1:9"}]}}\n'
        "routes: [{name: r, path: /api, upstream: up, candidate_cost: 1001}]\n"
    )
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert "candidate_cost: above the capacity of every tier" in str(raised.value)
