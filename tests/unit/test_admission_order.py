"""One admission: the server's own protocol, the ASGI application and `/explain` decide alike, in whatever order."""

import random
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

from api_gateway.admin.explain_schema import ExplainRequest
from api_gateway.admin.explainer import Explainer
from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.errors import GatewayError
from api_gateway.exchanges.fast_path import FastPath
from api_gateway.http1.asgi import Message, Scope
from api_gateway.limits.limit import Limit
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.metrics import Recorder
from api_gateway.middleware import ExchangeRecords
from api_gateway.models import NANOSECONDS, Exchange, Quota
from api_gateway.proxy.address_rules import AddressRules
from api_gateway.proxy.address_stages import AddressStage, RouteAddressStage
from api_gateway.proxy.admission import Admission, Stage
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.jwt_source import RequirementStage
from api_gateway.proxy.limit_stage import LimitListStage, RateLimitStage
from api_gateway.proxy.requirements import Requirement
from api_gateway.proxy.route_table import CostRule, Route, RouteTable
from api_gateway.proxy.stages import (
    AmbiguityStage,
    DeadlineStage,
    IdentityStage,
    LoadSheddingStage,
    RouteStage,
)
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.event_loop_limit import LAG_SAMPLES, EventLoopShedder
from api_gateway.resilience.priorities import PriorityClasses
from api_gateway.router import Router
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.response import UpstreamResponse
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient

FREE = Quota.per_second("FREE", 1, 10)
PAID = Quota.per_second("PAID", 10, 40)
ADDRESS = Quota.per_second("address", 2, 12)
ROUTES = [
    Route(
        "plain", "/api/one", "up", methods=frozenset({"GET", "POST"}), costs=(CostRule(None, "/api/one/dear", 4.5),)
    ),
    Route("never", "/api/never", "up", cost=50),
    Route("cut", "/api/cut", "up", cost=2, strip_prefix="/api/cut", host="cut.test"),
    Route("office", "/api/office", "up", addresses=AddressRules(deny=[ip_network("192.0.2.8/32")])),
    Route("scoped", "/api/scoped", "up", requirement=Requirement(("read",))),
]
DENIED = AddressRules(deny=[ip_network("198.51.100.0/24")])
LIMITS = (
    Limit("team", ("header:x-team",), Quota.per_second("team", 3, 9)),
    Limit(
        "posts",
        ("client", "route"),
        Quota.per_second("posts", 1, 4),
        {"PAID": Quota.per_second("posts:PAID", 2, 8, "posts")},
        routes=frozenset({"plain", "cut"}),
        methods=frozenset({"POST"}),
        cost=1,
    ),
    Limit("all", ("route",), Quota.per_second("all", 30, 60), routes=frozenset({"plain"})),
)
ORDER = (
    *("ambiguity", "identity", "addresses", "route", "route addresses", "requirement"),
    *("deadline", "shedding", "limits"),
)


class InstantCall:
    """A call of an upstream whose response is complete at once."""

    def __init__(self, _holder: str | None) -> None:
        pass

    def start(self, response: UpstreamResponse, _request: bytes) -> None:
        response.set_head(200, b"OK", [], {})
        response.is_complete = response.keeps_alive = True
        response.on_progress()


def _without_connections(upstream: Upstream) -> UpstreamClient:
    """Return a client that responds itself."""
    client = UpstreamClient(upstream, UpstreamTransport(), Timeouts(1, 1, 1, None))
    client._acquire_idle = dict.fromkeys(upstream.targets, InstantCall)  # type: ignore[arg-type]  # as far as it is used
    return client


class Paths:
    """All that decides on requests, with stages in some order, on a clock that is moved by hand."""

    def __init__(self, folder: Path, order: Sequence[str] = ORDER, further: Sequence[Limit] = ()) -> None:
        self.now_ns = 1_000 * NANOSECONDS
        own = [quota for limit in further for quota in limit.all_quotas]
        self.limiter = limiter = MemoryLimiter([FREE, PAID, ADDRESS, *own])
        priorities = PriorityClasses({"FREE": 1, "PAID": 2})
        self.shedder = EventLoopShedder(1.0, priorities, source=random.Random(1))
        upstream = Upstream("up", [Target("http://127.0.0.1:1")], CircuitBreaker(BreakerPolicy(), 0.0), round_robin)
        router = Router(
            RouteTable(ROUTES),
            {"up": _without_connections(upstream)},
            clock=lambda: 0.0,
            max_body_bytes=100,
            observe_attempt=lambda *_: None,
            on_transition=lambda *_: None,
        )
        headers = HeaderReader(
            id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=100, limit_fields=frozenset({b"x-team"})
        )
        clients = ClientRegistry({"FREE": FREE, "PAID": PAID}, "FREE", {"paid": "PAID"}, SqliteClientStore(folder))
        limits = RateLimitStage(limiter=limiter, address_quota=ADDRESS, exempt=())
        if further:
            limits = LimitListStage(
                limiter=limiter, address_quota=ADDRESS, exempt=(), limits=further, routes=router.routes
            )
        stages: dict[str, Stage] = {
            "ambiguity": AmbiguityStage(),
            "identity": IdentityStage(clients=clients, priorities=priorities),
            "addresses": AddressStage(DENIED),
            "route": RouteStage(router.routes),
            "route addresses": RouteAddressStage(),
            "requirement": RequirementStage(),
            "deadline": DeadlineStage({}),
            "shedding": LoadSheddingStage(self.shedder),
            "limits": limits,
        }
        admission = Admission([stages[name] for name in order])
        limit_headers = RateLimitHeaders()
        self.seen: list[Exchange] = []
        record = ExchangeRecords(
            recorder=Recorder([route.name for route in ROUTES], ["up"], ["FREE", "PAID"], [50], 0.0),
            observers=[self.seen.append],
        )
        self.fast_path = FastPath(
            record=record,
            admission=admission,
            headers=headers,
            router=router,
            limit_headers=limit_headers,
            clock=lambda: self.now_ns / NANOSECONDS,
            clock_ns=lambda: self.now_ns,
        )
        self.explainer = Explainer(
            admission=admission,
            headers=headers,
            router=router,
            limits=limits,
            limiter=limiter,
            shedder=self.shedder,
            header="X-Client-ID",
            clock=lambda: self.now_ns / NANOSECONDS,
            clock_ns=lambda: self.now_ns,
        )

    def shed(self, *, is_on: bool) -> None:
        """Have all requests of FREE shed and none of PAID, or none at all."""
        for _ in range(LAG_SAMPLES):
            self.shedder.observe(1.5 if is_on else 0.0)

    async def through_asgi(self, request: ExplainRequest) -> dict[str, Any]:
        """Return the figures of the request by ASGI."""
        await self.fast_path.serve(scope_of(request), unread, ignore)
        return figures_of(self.seen.pop())

    async def through_the_protocol(self, request: ExplainRequest) -> dict[str, Any]:
        """Return the figures of the request in the server's own protocol, which may leave it to ASGI."""
        lines = [b"%b: %b" % pair for pair in headers_of(request)]
        head = b"\r\n".join([f"{request.method} {request.path} HTTP/1.1".encode(), *lines, b"", b""])
        client = SimpleNamespace(
            client=(request.address, 50_000),
            scheme="http",
            certificate=None,
            abilities=DownstreamConnection.abilities,
            last_headers=None,
            limits=SimpleNamespace(header_bytes=10_000, header_lines=100),
            transport=SimpleNamespace(write=lambda _: None),
            write_response=lambda *_, **__: None,
            begin_exchange=lambda _: None,
            end_exchange=lambda **_: None,
        )
        if not self.fast_path.try_handle(client, head):
            return await self.through_asgi(request)
        return figures_of(self.seen.pop())

    async def explained(self, request: ExplainRequest) -> dict[str, Any]:
        """Return the figures of the request according to `/explain`."""
        try:
            told = await self.explainer.explain(request)
        except GatewayError as error:
            return {"reason": error.reason.value, "status": error.status}
        return {
            "reason": told.result.reason,
            "status": told.result.status or 200,
            "client": told.client.id,
            "route": told.route and told.route.name,
            "cost": told.route.cost if told.route else 0.0,
            "charges": [(bucket.key, bucket.cost) for bucket in told.buckets],
        }


def figures_of(exchange: Exchange) -> dict[str, Any]:
    charges = [(one.key, round(one.increment_ns / one.quota.emission_ns, 6)) for one in exchange.charges]
    return {
        "reason": exchange.reason,
        "status": exchange.status,
        "client": exchange.client and exchange.client.id,
        "route": exchange.route,
        "cost": exchange.cost if exchange.route else None,
        "charges": charges or None,
    }


def headers_of(request: ExplainRequest) -> list[tuple[bytes, bytes]]:
    named = [] if request.client_id is None else [(b"X-Client-ID", request.client_id.encode())]
    others = [(name.encode(), value.encode()) for name, value in request.headers.items()]
    return [(b"Host", request.host.encode()), *named, *others]


def scope_of(request: ExplainRequest) -> Scope:
    return {
        "type": "http",
        "http_version": "1.1",
        "method": request.method,
        "path": unquote(request.path),
        "raw_path": request.path.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": headers_of(request),
        "client": (request.address, 50_000),
    }


async def unread() -> Message:
    raise AssertionError("nothing here reads the body")


async def ignore(_message: Message) -> None:
    pass


def assert_agree(told: dict[str, Any], protocol: dict[str, Any], asgi: dict[str, Any]) -> None:
    """Compare all figures of both paths, and what `/explain` told with those that the decision came to."""
    assert protocol == asgi
    reached = {name for name, value in protocol.items() if value is not None}
    assert {name: told[name] for name in told.keys() & reached} == {
        name: protocol[name] for name in told.keys() & reached
    }
    assert (told["reason"], told["status"]) == (protocol["reason"], protocol["status"])


@pytest.mark.parametrize("further", [(), LIMITS], ids=["tiers", "list"])
async def test_thousands_of_requests_are_decided_alike_on_all_paths(tmp_path: Path, further: Sequence[Limit]) -> None:
    choose = random.Random(14)
    protocol, asgi = Paths(tmp_path, further=further), Paths(tmp_path, further=further)
    reasons: Counter[str | None] = Counter()
    charged: Counter[int] = Counter()
    for number in range(5_000):  # 10,000 by both variants
        if number % 250 == 0:
            for one in (protocol, asgi):
                one.shed(is_on=number % 1_000 == 0)
        gap_ns = choose.choice((0, 0, 1, NANOSECONDS // 100, NANOSECONDS // 10))
        for one in (protocol, asgi):
            one.now_ns += gap_ns
        request = ExplainRequest(
            client_id=choose.choice((None, "a", "b", "paid", "paid", "not valid")),
            method=choose.choice(("GET", "GET", "GET", "POST", "POST", "PUT", "TRACE")),
            path=choose.choice(
                (
                    "/api/one",
                    "/api/one/x",
                    "/api/one/dear",
                    "/api//one/./dear",
                    "/api/one/dear;v=1",
                    "/api/one/x%2F../dear",
                    "/api/one/..;/one/dear",
                    "/api/cut/x",
                    "/api/never",
                    "/api/none",
                    "/api/office",
                    "/api/scoped/x",
                )
            ),
            host=choose.choice(("cut.test", "cut.test", "cut.test:80", "other.test", "other.test", "not/valid")),
            address=choose.choice(("192.0.2.7", "192.0.2.8", "2001:db8::1", "198.51.100.7")),
            headers=choose.choice(({}, {"X-Team": "red"}, {"X-Team": "blue"})),
        )
        told = await protocol.explained(request)
        got = await protocol.through_the_protocol(request)
        assert_agree(told, got, await asgi.through_asgi(request))
        reasons[got["reason"]] += 1
        charged[len(got["charges"] or ())] += 1
    everything = {
        *("bad_request", "client_id_invalid", "no_route", "method_not_allowed"),
        *("overloaded", "rate_limited", "cost_exceeds_capacity"),
        *("address_denied", "credentials_required"),
    }
    assert reasons.keys() == {None, *everything}
    assert min(reasons.values()) > 10, reasons
    assert max(charged) == (5 if further else 2)


@pytest.mark.parametrize(
    ("first", "second", "request_", "reasons"),
    [
        (
            "ambiguity",
            "identity",
            {"host": "not/valid", "client_id": "not valid"},
            ("bad_request", "client_id_invalid"),
        ),
        ("identity", "route", {"client_id": "not valid", "path": "/api/none"}, ("client_id_invalid", "no_route")),
        ("shedding", "limits", {"path": "/api/never"}, ("overloaded", "cost_exceeds_capacity")),
        ("addresses", "route", {"path": "/api/none", "address": "198.51.100.7"}, ("address_denied", "no_route")),
        ("requirement", "shedding", {"path": "/api/scoped"}, ("credentials_required", "overloaded")),
    ],
)
async def test_another_order_of_two_stages_is_another_order_on_all_paths(
    tmp_path: Path, first: str, second: str, request_: dict[str, str], reasons: tuple[str, str]
) -> None:
    request = ExplainRequest(**({"client_id": None, "path": "/api/one", "address": "192.0.2.7"} | request_))
    swapped = {first: second, second: first}
    for order, reason in zip((ORDER, [swapped.get(name, name) for name in ORDER]), reasons, strict=True):
        paths = Paths(tmp_path, order)
        paths.shed(is_on=True)
        figures = [
            await decide(request) for decide in (paths.explained, paths.through_the_protocol, paths.through_asgi)
        ]
        assert [one["reason"] for one in figures] == [reason] * 3
