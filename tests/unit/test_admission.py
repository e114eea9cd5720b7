"""The stages of admission, each by itself, and in their order: clocks that stand still, no server."""

import asyncio
import math
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.errors import (
    BadRequest,
    ClientIdInvalid,
    CostExceedsCapacity,
    GatewayError,
    MethodNotAllowed,
    NoRoute,
    RateLimited,
)
from api_gateway.http1.headers import fields_of
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.models import NANOSECONDS, Charge, Client, HeaderList, Quota
from api_gateway.proxy.admission import Admission, RequestPlan, Stage, StageResponse, StageResult, Wait
from api_gateway.proxy.header_facts import HeaderFacts, HeaderReader
from api_gateway.proxy.limit_stage import RateLimitStage
from api_gateway.proxy.route_table import CostRule, Route, RouteTable
from api_gateway.proxy.stages import (
    AmbiguityStage,
    DeadlineStage,
    IdentityStage,
    RouteStage,
)
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from tests.cases import each

HOST = (b"host", b"gateway.test")
FREE = Quota.per_second("FREE", 1, 10)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
ADDRESS = Quota.per_second("address", 2, 4)
STRANGER = Client("acme", "client:acme", FREE, "default")


def request(
    path: str = "/api/users",
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    peer: str = "192.0.2.7",
    host: tuple[bytes, bytes] | None = HOST,
    trusted: tuple[str, ...] = (),
    id_header: str = "X-Client-ID",
    now_ns: int = 0,
) -> RequestPlan:
    """Return the plan of a request that has just arrived."""
    reader = HeaderReader(
        id_header=id_header,
        trusted_proxies=[ip_network(one) for one in trusted],
        max_body_bytes=0,
    )
    fields = fields_of([*([] if host is None else [host]), *headers])
    return Admission.plan(reader.read(peer, fields, "1.1"), method, path, path.encode(), now_ns)


def error_in(result: StageResult) -> GatewayError:
    assert isinstance(result, GatewayError)
    return result


# Ambiguity


@each(
    ("host", "headers"),
    [
        (None, []),
        (HOST, [HOST]),
        ((b"host", b"a b"), []),
        (HOST, [(b"transfer-encoding", b"gzip, chunked")]),
    ],
)
def test_an_ambiguous_request_is_refused_and_its_connection_closed(
    host: tuple[bytes, bytes] | None, headers: HeaderList
) -> None:
    error = error_in(AmbiguityStage().decide(request("/api", *headers, host=host)))
    assert isinstance(error, BadRequest)
    assert error.headers == {"connection": "close"}


def test_an_unambiguous_request_passes() -> None:
    assert AmbiguityStage().decide(request()) is None


# Identity


@pytest.fixture
def registry(tmp_path: Path) -> ClientRegistry:
    """Clients with one that is configured; the store is not opened."""
    return ClientRegistry(
        {"FREE": FREE, "PREMIUM": PREMIUM}, "FREE", {"acme": "PREMIUM"}, SqliteClientStore(tmp_path / "unused")
    )


@pytest.fixture
def identified(registry: ClientRegistry) -> Callable[[RequestPlan], Client]:
    """Let the stage identify the client of a request."""
    stage = IdentityStage(clients=registry, priorities=SINGLE_PRIORITY)

    def identify(plan: RequestPlan) -> Client:
        assert stage.decide(plan) is None
        assert plan.exchange.client is not None
        return plan.exchange.client

    return identify


Identify = Callable[[RequestPlan], Client]


@pytest.mark.parametrize(("name", "tier"), [(b"acme", "PREMIUM"), (b"initech", "FREE")])
def test_the_client_id_names_the_client(identified: Identify, name: bytes, tier: str) -> None:
    client = identified(request("/api", (b"x-client-id", name)))
    assert (client.id, client.quota.name, client.key) == (name.decode(), tier, f"client:{name.decode()}")


def test_the_header_may_have_another_name(identified: Identify) -> None:
    plan = request("/api", (b"x-client-id", b"one"), (b"X-KEY", b"two"), id_header="X-Key")
    assert identified(plan).id == "two"


@pytest.mark.parametrize(
    ("peer", "identity"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("unknown", "unknown"),
    ],
)
def test_a_client_without_an_id_is_its_address(identified: Identify, peer: str, identity: str) -> None:
    plan = request("/api", (b"x-forwarded-for", b"203.0.113.9"), peer=peer)
    client = identified(plan)
    assert (client.id, client.source) == (identity, "address")
    assert plan.exchange.client_address == peer
    assert plan.facts.is_trusted is False


def test_a_trusted_proxy_reports_the_address(identified: Identify) -> None:
    given = (b"x-forwarded-for", b"198.51.100.1, 2001:db8:1:2::9")
    plan = request("/api", given, peer="10.0.0.1", trusted=("10.0.0.0/8",))
    assert identified(plan).id == "2001:db8:1:2::/64"
    assert plan.exchange.client_address == "2001:db8:1:2::9"
    assert plan.facts.is_trusted is True


def test_other_peers_are_not_trusted(identified: Identify) -> None:
    plan = request("/api", (b"x-forwarded-for", b"203.0.113.9"), peer="192.0.2.7", trusted=("10.0.0.0/8",))
    identified(plan)
    assert (plan.exchange.client_address, plan.facts.is_trusted) == ("192.0.2.7", False)


def test_an_invalid_client_id_is_refused(registry: ClientRegistry) -> None:
    plan = request("/api", (b"x-client-id", b"a b"))
    stage = IdentityStage(clients=registry, priorities=SINGLE_PRIORITY)
    for _ in range(2):
        assert isinstance(stage.decide(plan), ClientIdInvalid)
    assert plan.exchange.client is None


def test_remembered_facts_follow_a_change_of_the_registry(registry: ClientRegistry, identified: Identify) -> None:
    plan = request("/api", (b"x-client-id", b"acme"))
    first = identified(plan)
    assert identified(plan) is first
    registry.version += 1
    again = identified(plan)
    assert again is not first or again == first
    assert plan.facts.version == registry.version
    assert plan.facts.cost == -1, "charges for the earlier client are not used again"


# Route and cost

EXPORT = CostRule(frozenset({"POST"}), "/api/users/export", 5.0)
USERS = Route("users", "/api/users", "people", methods=frozenset({"GET", "POST"}), cost=2.0, costs=(EXPORT,))
PARTNER = Route("partner", "/api/users", "people", host="partner.test")
STRIPPED = Route("stripped", "/api/cut", "people", strip_prefix="/api/cut")
ROUTES = RouteTable([USERS, PARTNER, STRIPPED])


@each(
    ("plan", "route", "cost"),
    [
        (request("/api/users"), "users", 2.0),
        (request("/api/users/7/x", method="POST"), "users", 2.0),
        (request("/api/users/export", method="POST"), "users", 5.0),
        (request("/api/users/export/all", method="POST"), "users", 5.0),
        (request("/api/users/x/../export", method="POST"), "users", 5.0),  # a spelling does not buy a cheaper rule
        (request("/api/users//export", method="POST"), "users", 5.0),
        (request("/api/users/export"), "users", 2.0),
        (request("/api/users", method="DELETE", host=(b"Host", b"Partner.test:8000")), "partner", 1.0),
    ],
)
def test_a_request_has_a_route_and_its_cost(plan: RequestPlan, route: str, cost: float) -> None:
    assert RouteStage(ROUTES).decide(plan) is None
    assert plan.route is not None
    assert (plan.exchange.route, plan.exchange.cost, plan.route.name) == (route, cost, route)


@each(
    ("plan", "error"),
    [
        (request("/api/usersx"), NoRoute),
        (request("/api"), NoRoute),
        (request("/api/users/../orders"), NoRoute),
        (request("/api/users", method="PUT"), MethodNotAllowed),
        (request("/api/users", method="TRACE", host=(b"Host", b"partner.test")), MethodNotAllowed),
    ],
)
def test_a_request_without_a_route_is_refused(plan: RequestPlan, error: type[GatewayError]) -> None:
    assert isinstance(RouteStage(ROUTES).decide(plan), error)
    assert plan.exchange.route is None


def test_the_target_for_the_upstream_lacks_the_prefix() -> None:
    plan = request("/api/cut/x?y")
    plan.exchange.path = "/api/cut/x"
    assert RouteStage(ROUTES).decide(plan) is None
    assert (plan.raw_target, plan.target) == (b"/api/cut/x?y", b"/x?y")
    plan = request("/api/c%75t/x")
    plan.exchange.path = "/api/cut/x"
    assert isinstance(RouteStage(ROUTES).decide(plan), BadRequest), "the prefix is spelt differently"


# Deadline


def test_the_shortest_timeout_is_the_deadline() -> None:
    stage = DeadlineStage({"people": 3.0})
    for given, seconds in (((), 3.0), (((b"x-request-timeout", b"2"),), 2.0)):
        plan = request("/api/users", *given, now_ns=NANOSECONDS)
        plan.route = USERS
        assert stage.decide(plan) is None
        assert plan.deadline is not None
        assert (plan.deadline.seconds, plan.deadline.at) == (seconds, 1 + seconds)


def test_an_invalid_timeout_is_refused() -> None:
    plan = request("/api/users", (b"x-request-timeout", b"soon"))
    plan.route = USERS
    assert isinstance(DeadlineStage({}).decide(plan), BadRequest)


# Rate limits


class Limiting:
    """The stage with buckets of its own and a clock that stands still."""

    def __init__(self, address_quota: Quota | None = None, *exempt: str) -> None:
        self.now_ns = 5 * NANOSECONDS
        self.limiter = MemoryLimiter([FREE, PREMIUM, ADDRESS])
        self.stage = RateLimitStage(
            limiter=self.limiter, address_quota=address_quota, exempt=[ip_network(one) for one in exempt]
        )

    def ask(
        self, client: Client = STRANGER, cost: float = 1.0, peer: str = "192.0.2.7"
    ) -> tuple[HeaderList, GatewayError | None]:
        """Return the fields for the decision, and the error of a refusal."""
        plan = request(peer=peer, now_ns=self.now_ns)
        exchange = plan.exchange
        exchange.client, exchange.cost = client, cost
        result = self.stage.decide(plan)
        assert exchange.decision is not None
        assert exchange.decision.allowed == (result is None)
        return RateLimitHeaders().headers(exchange.decision), None if result is None else error_in(result)

    def passes(self, client: Client = STRANGER, cost: float = 1.0, peer: str = "192.0.2.7") -> bool:
        return (self.ask(client, cost, peer))[1] is None

    def admitted(self, client: Client = STRANGER, peer: str = "192.0.2.7", of: int = 20) -> int:
        """Return how many of so many requests at one moment pass."""
        return sum([self.passes(client, peer=peer) for _ in range(of)])

    def left(self, key: str, quota: Quota) -> int:
        return self.limiter.preview(Charge(key, quota, 0), self.now_ns).remaining


def limit_fields(headers: HeaderList) -> dict[str, str]:
    found = {name.decode(): value.decode() for name, value in headers}
    assert len(found) == len(headers)
    return found


def test_an_answer_tells_the_limit_and_what_is_left() -> None:
    """draft-ietf-httpapi-ratelimit-headers-11, and the older trio in delta seconds."""
    headers, _ = Limiting().ask()
    assert limit_fields(headers) == {
        "ratelimit-policy": '"free";q=10;w=10',
        "ratelimit": '"free";r=9;t=9',
        "x-ratelimit-limit": "10",
        "x-ratelimit-remaining": "9",
        "x-ratelimit-reset": "1",
    }


def test_a_refusal_tells_the_limit_and_when_to_come_back() -> None:
    limiting = Limiting()
    assert limiting.admitted() == 10
    limiting.now_ns += NANOSECONDS // 4
    headers, error = limiting.ask(cost=3)
    assert isinstance(error, RateLimited)
    assert error.headers["retry-after"] == "3"
    assert error.retry_after == 2.75
    assert limit_fields(headers) == {
        "ratelimit-policy": '"free";q=10;w=10',
        "ratelimit": '"free";r=0;t=3',
        "x-ratelimit-limit": "10",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": "10",
    }


def test_a_refusal_says_who_is_limited_by_what() -> None:
    limiting = Limiting()
    limiting.admitted()
    _, error = limiting.ask()
    assert error is not None
    for part in ("acme", "FREE", "10 tokens", "1 per second", "1.000 s"):
        assert part in error.detail
    assert {name: error.extra[name] for name in ("client_id", "tier", "policy", "cost", "limit", "remaining")} == {
        "client_id": "acme",
        "tier": "FREE",
        "policy": "free",
        "cost": 1.0,
        "limit": 10,
        "remaining": 0,
    }


@each("rate", [0.3, 1, 3, 7, 1000])
@each("cost", [0.7, 1, 3])
def test_a_client_that_waits_exactly_as_long_as_it_is_told_passes(rate: float, cost: float) -> None:
    client = Client("acme", "client:acme", Quota.per_second("T", rate, 3), "default")
    limiting = Limiting()
    while limiting.passes(client, cost):
        limiting.now_ns += 1  # also at odd moments
    _, error = limiting.ask(client, cost)
    assert error is not None
    assert error.retry_after is not None
    refused_at = limiting.now_ns
    limiting.now_ns = refused_at + round(error.retry_after * NANOSECONDS) - 1
    assert not limiting.passes(client, cost)
    limiting.now_ns = refused_at + int(error.headers["retry-after"]) * NANOSECONDS
    assert int(error.headers["retry-after"]) == max(1, math.ceil(error.retry_after))
    assert limiting.passes(client, cost)


def test_a_refused_client_loses_nothing_by_asking() -> None:
    limiting = Limiting()
    assert limiting.admitted(of=1000) == 10
    limiting.now_ns += NANOSECONDS
    assert limiting.admitted(of=1000) == 1


def test_a_cost_that_no_wait_can_pay_is_forbidden_and_not_limited() -> None:
    limiting = Limiting()
    headers, error = limiting.ask(cost=11)
    assert isinstance(error, CostExceedsCapacity)
    assert error.status == 403
    assert "retry-after" not in error.headers
    assert error.retry_after is None
    for part in ("11 tokens", "acme", "bucket of 10"):
        assert part in error.detail
    assert limit_fields(headers)["x-ratelimit-remaining"] == "10"
    assert limiting.passes(cost=10)


def test_a_request_that_costs_nothing_always_passes() -> None:
    limiting = Limiting(ADDRESS)
    limiting.admitted()
    assert limiting.passes(cost=0)


def test_each_client_has_a_bucket_of_its_own() -> None:
    limiting = Limiting()
    assert limiting.admitted() == 10
    assert limiting.admitted(Client("other", "client:other", FREE, "default")) == 10
    assert limiting.admitted(Client("vip", "client:vip", PREMIUM, "configured"), of=300) == 200


# The second bucket of clients nobody vouches for


def named(name: str, source: Any = "default") -> Client:
    return Client(name, f"client:{name}", FREE, source)


def test_invented_names_do_not_get_around_the_limit_of_their_address() -> None:
    limiting = Limiting(ADDRESS)
    assert sum([limiting.passes(named(f"c{number}")) for number in range(20)]) == 4
    assert limiting.passes(named("c21"), peer="192.0.2.8")


def test_a_refusal_of_the_address_says_so() -> None:
    limiting = Limiting(ADDRESS)
    limiting.admitted()
    headers, error = limiting.ask(named("other"), peer="192.0.2.7")
    assert isinstance(error, RateLimited)
    assert "Address '192.0.2.7'" in error.detail
    assert (error.extra["policy"], error.extra["tier"], error.extra["limit"]) == ("address", "FREE", 4)
    assert limit_fields(headers)["ratelimit-policy"] == '"address";q=4;w=2'
    assert error.headers["retry-after"] == "1"


def test_the_hosts_of_one_ipv6_site_share_a_bucket() -> None:
    limiting = Limiting(ADDRESS)
    assert limiting.admitted(named("one"), peer="2001:db8:1:2::1") == 4
    assert not limiting.passes(named("two"), peer="2001:db8:1:2:ffff::")
    assert limiting.passes(named("two"), peer="2001:db8:1:3::")


def test_both_buckets_are_charged_or_neither() -> None:
    limiting = Limiting(ADDRESS)
    buckets = (("client:acme", FREE), ("peer:192.0.2.7", ADDRESS))
    assert limiting.passes(cost=3)
    assert [limiting.left(*bucket) for bucket in buckets] == [7, 1]
    assert not limiting.passes(cost=2)  # the address has not enough
    assert [limiting.left(*bucket) for bucket in buckets] == [7, 1]
    assert not limiting.passes(cost=8, peer="192.0.2.8")  # neither has the client
    assert [limiting.left(*bucket) for bucket in buckets] == [7, 1]
    assert limiting.left("peer:192.0.2.8", ADDRESS) == 4


@pytest.mark.parametrize("source", ["registered", "configured"])
def test_a_client_somebody_vouches_for_is_not_charged_to_its_address(source: str) -> None:
    limiting = Limiting(ADDRESS)
    assert limiting.admitted(named("acme", source)) == 10
    assert limiting.left("peer:192.0.2.7", ADDRESS) == 4


def test_a_client_without_a_name_is_charged_to_its_address_too() -> None:
    limiting = Limiting(ADDRESS)
    assert limiting.admitted(Client("192.0.2.7", "address:192.0.2.7", FREE, "address")) == 4


@each("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_exempt_addresses_are_not_counted(peer: str) -> None:
    limiting = Limiting(ADDRESS, "127.0.0.0/8", "::1/128")
    assert limiting.admitted(peer=peer) == 10
    assert limiting.admitted(named("other"), peer=peer) == 10
    assert limiting.admitted(named("third"), peer="192.0.2.7") == 4


def test_the_limit_of_addresses_can_be_off() -> None:
    limiting = Limiting(None)
    assert sum([limiting.passes(named(f"c{number}")) for number in range(50)]) == 50


# The order


class Question:
    """A stage that waits for replies: "pass", "again" for another question, or the detail of a refusal."""

    def __init__(self, *replies: str) -> None:
        self._replies = list(replies)

    def decide(self, plan: RequestPlan) -> StageResult:
        return self._ask()

    inspect = decide

    def concerns(self, facts: HeaderFacts) -> bool:
        return True

    def _ask(self) -> StageResult:
        return Wait.on(self._reply, self._resume)

    async def _reply(self) -> str:
        return self._replies.pop(0)

    def _resume(self, plan: RequestPlan, reply: str) -> StageResult:
        plan.exchange.retried += (str(plan.now_ns),)
        return self._ask() if reply == "again" else BadRequest(reply) if reply != "pass" else None


async def decide(admission: Admission, plan: RequestPlan) -> GatewayError | None:
    """Decide as a port does, with a later time at each reply."""
    result = admission.decide(plan)
    while isinstance(result, Wait):
        result = admission.resume(plan, result, await result.reply(), plan.now_ns + 1)
    assert not isinstance(result, StageResponse)
    return result


async def test_stages_follow_each_other_also_after_a_reply() -> None:
    plan = request("/api/nowhere")
    admission = Admission([Question("pass"), Question("again", "pass"), RouteStage(ROUTES)])
    assert isinstance(await decide(admission, plan), NoRoute)
    assert plan.exchange.retried == ("1", "2", "3"), "each reply has a time of its own"


async def test_a_refusal_ends_admission() -> None:
    plan = request()
    error = await decide(Admission([Question("no"), RouteStage(ROUTES)]), plan)
    assert isinstance(error, BadRequest)
    assert error.detail == "no"
    assert plan.exchange.route is None


async def test_a_question_that_fails_fails_the_request() -> None:
    plan = request()

    class Broken(Question):
        async def _reply(self) -> str:
            raise ZeroDivisionError

    for method in (decide, Admission.inspect):
        with pytest.raises(ZeroDivisionError):
            await method(Admission([Broken()]), plan)


class Noted(Question):
    """A stage that notes each decision, and is concerned by requests with a timeout only."""

    def __init__(self, name: str, noted: list[str]) -> None:
        super().__init__()
        self._name, self._noted = name, noted

    def decide(self, plan: RequestPlan) -> StageResult:
        self._noted.append(self._name)
        return None

    def concerns(self, facts: HeaderFacts) -> bool:
        return self._name == "always" or bool(facts.timeout)


def test_header_fields_that_are_used_again_skip_the_stages_that_they_do_not_concern() -> None:
    """Also after another configuration has used them in between, whose stages are others."""
    noted: list[str] = []
    admission, other = Admission([Noted("some", noted), Noted("always", noted)]), Admission([Noted("some", noted)])
    plain, limited = request(), request("/api", (b"x-request-timeout", b"1"))

    def decisions(admission: Admission, plan: RequestPlan) -> list[str]:
        noted.clear()
        assert admission.decide(plan) is None
        return list(noted)

    assert [decisions(admission, plain) for _ in range(3)] == [["some", "always"], ["always"], ["always"]]
    assert [decisions(admission, limited) for _ in range(3)] == [["some", "always"]] * 3
    assert [decisions(other, plain) for _ in range(3)] == [["some"], [], []]
    assert [decisions(admission, plain) for _ in range(2)] == [["some", "always"], ["always"]]


async def test_a_wait_of_a_selected_stage_goes_on_with_the_selected_ones() -> None:
    noted: list[str] = []
    admission = Admission([Noted("some", noted), Question("pass", "pass", "pass"), Noted("always", noted)])
    plan = request()
    for expected in (["some", "always"], ["always"], ["always"]):
        noted.clear()
        assert await decide(admission, plan) is None
        assert noted == expected


@each(
    ("stage", "header", "concerned"),
    [
        (AmbiguityStage(), (b"x-other", b"1"), False),
        (AmbiguityStage(), HOST, True),  # the second Host
        (DeadlineStage({"up": None}, have_routes_timeouts=False), (b"x-other", b"1"), False),
        (DeadlineStage({"up": None}, have_routes_timeouts=False), (b"x-request-timeout", b"1"), True),
        (DeadlineStage({"up": None}, have_routes_timeouts=True), (b"x-other", b"1"), True),
        (DeadlineStage({"up": 1.0}, have_routes_timeouts=False), (b"x-other", b"1"), True),
    ],
)
def test_a_stage_is_not_concerned_where_it_could_have_no_effect(
    stage: Stage, header: tuple[bytes, bytes], *, concerned: bool
) -> None:
    assert stage.concerns(request("/api/users", header).facts) is concerned


async def test_a_cancelled_request_does_not_cancel_its_question() -> None:
    asked, replies = asyncio.Event(), asyncio.Event()
    ended = []

    async def question() -> None:
        asked.set()
        await replies.wait()
        ended.append(True)

    task = asyncio.ensure_future(Wait.on(question, lambda _plan, _reply: None).reply())
    await asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    replies.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert ended


@pytest.mark.parametrize(("is_reversed", "error"), [(False, MethodNotAllowed), (True, BadRequest)])
async def test_inspecting_names_the_first_refusal_and_finds_all_figures(
    error: type[GatewayError], *, is_reversed: bool
) -> None:
    limiting = Limiting()
    plan = request("/api/users", method="PUT", now_ns=limiting.now_ns)
    plan.exchange.client = STRANGER
    stages: list[Stage] = [RouteStage(ROUTES), Question("no"), limiting.stage]
    assert isinstance(await Admission(stages[::-1] if is_reversed else stages).inspect(plan), error)
    assert [decision.remaining for decision in plan.inspected] == [10]
    assert limiting.left("client:acme", FREE) == 10
