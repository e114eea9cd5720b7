"""The stage that charges a request to a list of limits: which apply, what is charged, and what is remembered."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

from api_gateway.assembly.stores import Quotas
from api_gateway.config import GatewayConfig
from api_gateway.errors import CostExceedsCapacity, GatewayError, RateLimited, StoreUnavailable
from api_gateway.limits.concurrency import LocalSlots
from api_gateway.limits.limit import Limit, client_buckets, limit_of, moved_buckets
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.limits.script_ops import MultiNodeCharge
from api_gateway.metrics import Recorder
from api_gateway.models import NANOSECONDS, Charge, Client, Decision, Quota
from api_gateway.proxy.admission import Admission, RequestPlan
from api_gateway.proxy.candidate_limits import CandidateLimits
from api_gateway.proxy.cost_settlement import CostSettlement, _settled_to
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.limit_stage import MOST_REMEMBERED, LimitListStage, RateLimitStage
from api_gateway.proxy.problem_response import problem_body
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.rate_limiter import MemoryLimiter
from tests.cases import each

FREE = Quota.per_second("FREE", 1, 10)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
LOGIN = Quota.per_second("login", 0.2, 3)
TEAM = Quota.per_second("team", 10, 30)
ACME = Client("acme", "client:acme", FREE, "configured")
ROUTES = RouteTable([Route("all", "/api", "up"), Route("login", "/api/login", "up"), Route("x", "/api/x", "up")])
BY_ADDRESS = Limit("login", ("address",), LOGIN, routes=frozenset({"login"}), methods=frozenset({"POST"}))
BY_TEAM = Limit("team", ("header:x-team",), TEAM)


class Credential:
    """What a token says of a client."""

    fields: Sequence[Any] = ()

    def __init__(self, organisation: str | None) -> None:
        self.organisation = organisation


class Limited:
    """A stage with limits, on buckets of its own and a clock that stands still."""

    def __init__(self, *limits: Limit) -> None:
        self.now_ns = 1_000 * NANOSECONDS
        quotas = [quota for limit in limits for quota in limit.all_quotas]
        self.limiter = MemoryLimiter([FREE, PREMIUM, *quotas])
        self.stage = LimitListStage(limiter=self.limiter, address_quota=None, exempt=(), limits=limits, routes=ROUTES)
        self.headers = HeaderReader(
            id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=100, limit_fields=frozenset({b"x-team"})
        )

    def plan(
        self,
        path: str = "/api/x",
        method: str = "GET",
        client: Client = ACME,
        team: str | None = None,
        peer: str = "192.0.2.7",
        organisation: str | None = None,
        cost: float = 1.0,
    ) -> RequestPlan:
        fields = {} if team is None else {b"x-team": [team.encode()]}
        facts = self.headers.read(peer, fields, "1.1")
        plan = Admission.plan(facts, method, path.replace("%2f", "/"), path.encode(), self.now_ns)
        exchange = plan.exchange
        plan.route, _ = ROUTES.find("", method, plan.exchange.path, plan.raw_target)
        exchange.route, exchange.client, exchange.cost = plan.route.name, client, cost
        if organisation is not None:
            exchange.credential = Credential(organisation)  # type: ignore[assignment]  # what the stage needs of it
        return plan

    def ask(self, **described: Any) -> tuple[RequestPlan, GatewayError | None]:
        plan = self.plan(**described)
        error = self.stage.decide(plan)
        assert error is None or isinstance(error, GatewayError)
        return plan, error

    def admitted(self, of: int = 50, **described: Any) -> int:
        return sum(self.ask(**described)[1] is None for _ in range(of))

    def keys(self, **described: Any) -> list[str]:
        return [charge.key for charge in self.ask(**described)[0].exchange.charges]


def test_a_limit_applies_to_its_routes_methods_and_tiers_only() -> None:
    limited = Limited(replace(BY_ADDRESS, tiers=frozenset({"FREE"})))
    on = "limit:login:192.0.2.7"
    assert limited.keys(path="/api/login", method="POST") == ["client:acme", on]
    assert limited.keys(path="/api/login", method="post") == ["client:acme", on], "frameworks read it as POST"
    assert limited.keys(path="/api/login") == ["client:acme"]
    assert limited.keys(method="POST") == ["client:acme"]
    rich = Client("rich", "client:rich", PREMIUM, "configured")
    assert limited.keys(path="/api/login", method="POST", client=rich) == ["client:rich"]


@each("path", ["/api/x/../login", "/api//login", "/api/x;/..%2flogin"])
def test_no_spelling_of_a_path_avoids_the_limit_of_a_route(path: str) -> None:
    limited = Limited(BY_ADDRESS)
    plan = limited.plan(path=path, method="POST")
    if limited.stage._routes.read_as("", "POST", plan.exchange.path, plan.raw_target) >= {"login"}:
        assert limited.keys(path=path, method="POST")[1:] == ["limit:login:192.0.2.7"]
    else:
        assert plan.exchange.route != "login"


def test_a_route_with_several_readings_is_charged_by_each() -> None:
    limited = Limited(BY_ADDRESS)
    plan = limited.plan(path="/api/x/../login", method="POST")
    plan.exchange.route = "x"
    assert limited.stage.decide(plan) is None
    assert [charge.key for charge in plan.exchange.charges][1:] == ["limit:login:192.0.2.7"]


def test_a_key_that_anyone_could_have_invented_is_charged_as_such() -> None:
    keys = (("client",), ("address",), ("organisation",), ("client", "route"), ("client", "header:x-team"))
    limits = [Limit("-".join([part.partition(":")[0] for part in key]), key, TEAM) for key in keys]
    limited = Limited(*limits)

    def unverified(client: Client) -> set[str]:
        plan, _ = limited.ask(client=client, team="red", organisation="acme")
        assert len(plan.exchange.charges) == 1 + len(limits)
        return {limit_of(charge.key) for charge in plan.exchange.charges[1:] if charge.is_unverified}

    assert unverified(ACME) == {"address", "client-header"}
    invented = replace(ACME, id="new", key="client:new", source="default")
    assert unverified(invented) == unverified(ACME) | {"client", "client-route"}
    assert unverified(replace(invented, has_keys=True)) == unverified(ACME)
    assert unverified(replace(invented, source="credential")) == unverified(ACME)


def test_invented_ids_take_no_room_from_the_quotas_of_others_through_a_candidate() -> None:
    """The counters of a candidate are in the table of those in force, which has room for registered clients apart."""
    monthly = {"name": "monthly", "quota": 9, "period": "month", "cost": 2, "candidate": {"quota": 4}}
    quotas = Quotas.of(GatewayConfig.model_validate({"limits": [monthly]}))
    limited, counters = Limited(*quotas.limits), PeriodCounters(4)
    limiter = QuotaLimiter(limited.limiter, counters, wall_clock=lambda: 1_800_000_000.0)
    recorder = Recorder((), (), ["FREE"], (50.0,), 0.0)
    candidate_limits = CandidateLimits(
        limiter=limiter,
        clock_ns=lambda: limited.now_ns,
        recorder=recorder,
        candidates=quotas.all_candidates,
        routes=(),
        slots=LocalSlots(Counter()),
    )
    limited.stage = LimitListStage(
        limiter=limiter,
        address_quota=None,
        exempt=(),
        limits=quotas.limits,
        routes=ROUTES,
        candidate_limits=candidate_limits,
    )
    settlement = CostSettlement(limiter=limiter, clock_ns=lambda: limited.now_ns, recorder=recorder)
    for index in range(50):
        invented = Client(f"new-{index}", f"client:new-{index}", FREE, "default")
        exchange = limited.ask(client=invented)[0].exchange
        assert exchange.candidate is not None
        assert [charge.is_unverified for charge in exchange.candidate[0]] == [False, True]
        settlement.settle(exchange, 0.0, is_whole=True)
    assert (len(counters), counters.unverified) == (4, 4)
    in_force, tried = "limit:monthly:client:acme", "candidate:limit:monthly:client:acme"
    assert limited.admitted(of=3) == 3
    assert recorder.candidate_refusals == {("monthly", "FREE"): 1}, "of two requests that the candidate admits"
    assert [counters.counters[key].count.used for key in (in_force, tried)] == [3 * 2_000, 2 * 2_000]


def test_only_clients_that_are_not_registered_are_charged_to_their_address() -> None:
    address = Quota.per_second("address", 1, 10)
    stage = RateLimitStage(limiter=MemoryLimiter([FREE]), address_quota=address, exempt=[ip_network("192.0.2.0/24")])
    invented = replace(ACME, source="default")

    def keys(client: Client, peer: str) -> list[str]:
        return [charge.key for charge in stage.charges(client, peer, 1)]

    assert keys(invented, "198.51.100.7") == ["client:acme", "peer:198.51.100.7"]
    assert keys(ACME, "198.51.100.7") == keys(invented, "192.0.2.7") == ["client:acme"]


def test_a_settlement_leaves_a_cost_of_its_own_unless_the_whole_charge_is_refunded() -> None:
    charges = [Charge("a", FREE, FREE.cost_ns(2)), Charge("b", TEAM, TEAM.cost_ns(1), 1.0, is_unverified=True)]
    for cost, is_whole, expected in ((5, False, (5, 1)), (0, False, (0, 1)), (0, True, (0, 0))):
        after, changes = _settled_to(charges, cost, is_whole=is_whole)
        assert [one.increment_ns // one.quota.emission_ns for one in after] == list(expected)
        for one, change, before in zip(after, changes, charges, strict=True):
            assert change.increment_ns == one.increment_ns - before.increment_ns
            assert one.is_unverified == change.is_unverified == before.is_unverified


def test_all_buckets_are_charged_or_none() -> None:
    limited = Limited(BY_TEAM, BY_ADDRESS)
    assert limited.admitted(path="/api/login", method="POST", team="red") == 3
    left = [
        limited.limiter.preview(Charge(key, quota, 0), limited.now_ns).remaining
        for key, quota in (("client:acme", FREE), ("limit:team:red", TEAM), ("limit:login:192.0.2.7", LOGIN))
    ]
    assert left == [7, 27, 0], "refusals charge nothing"


def test_a_refusal_names_all_limits_that_refuse_and_the_longest_wait() -> None:
    limited = Limited(BY_ADDRESS)
    assert limited.admitted(path="/api/login", method="POST") == 3
    assert limited.admitted() == 7
    _, error = limited.ask(path="/api/login", method="POST")
    assert isinstance(error, RateLimited)
    assert (error.extra["policy"], error.extra["violated-policies"]) == ("login", ["free", "login"])
    assert "Limit 'login' allows 3 tokens at once and 0.2 per second" in error.detail
    assert error.headers["retry-after"] == "5"
    assert b'"violated-policies": ["free", "login"]' in problem_body(error, instance="/", request_id="id")
    limited.now_ns += 5 * NANOSECONDS
    assert limited.ask(path="/api/login", method="POST")[1] is None


def test_the_tightest_limit_is_reported_and_all_policies_are() -> None:
    limited = Limited(BY_TEAM, BY_ADDRESS)
    plan, _ = limited.ask(path="/api/login", method="POST", team="red")
    exchange = plan.exchange
    assert exchange.decision is not None
    fields = dict(RateLimitHeaders().headers(exchange.decision, exchange.charges))
    assert fields[b"ratelimit-policy"] == b'"free";q=10;w=10, "team";q=30;w=3, "login";q=3;w=15'
    assert fields[b"ratelimit"] == b'"login";r=2;t=10'
    assert (fields[b"x-ratelimit-limit"], fields[b"x-ratelimit-remaining"]) == (b"3", b"2")


def test_a_limit_may_have_a_cost_of_its_own() -> None:
    limited = Limited(replace(BY_ADDRESS, cost=1.5))
    assert limited.admitted(path="/api/login", method="POST", cost=0.1) == 2
    _, error = limited.ask(path="/api/login", method="POST", cost=0.1)
    assert error is not None
    assert error.extra["cost"] == 1.5


def test_a_cost_above_the_capacity_of_a_limit_is_never_allowed() -> None:
    _, error = Limited(BY_ADDRESS).ask(path="/api/login", method="POST", cost=4)
    assert isinstance(error, CostExceedsCapacity)
    assert "Limit 'login' has a bucket of 3 tokens" in error.detail


def test_a_part_of_a_key_that_a_request_lacks_leaves_the_limit_out() -> None:
    organisation = Limit("org", ("organisation", "client"), TEAM)
    limited = Limited(BY_TEAM, organisation)
    assert limited.keys() == ["client:acme"]
    assert limited.keys(team="red", organisation="o|1%") == [
        "client:acme",
        "limit:team:red",
        "limit:org:o%7C1%25|client:acme",
    ]
    plan, _ = limited.ask()
    assert [(limit.name, why) for limit, why in limited.stage.lacking(plan)] == [
        ("team", "the request has no header:x-team"),
        ("org", "the request has no organisation"),
    ]


def test_values_of_tuples_cannot_be_confused() -> None:
    pair = Limit("p", ("header:x-team", "route"), TEAM)
    keys = {pair.bucket_key(values, "FREE") for values in (("a|b", "c"), ("a", "b|c"), ("a%7Cb", "c"), ("a", "b"))}
    assert len(keys) == 4
    long = {pair.bucket_key((f"{'a' * 300}{end}", "r"), "FREE") for end in "xy"}
    assert len(long) == 2
    assert all(len(key) < 200 for key in long)


def test_tiers_have_values_of_their_own() -> None:
    exports = Limit(
        "exports",
        ("client",),
        None,
        {
            "FREE": Quota.per_second("exports:FREE", 1, 2, "exports"),
            "PREMIUM": Quota.per_second("exports:PREMIUM", 1, 6, "exports"),
        },
        tiers=frozenset({"FREE", "PREMIUM"}),
    )
    limited = Limited(exports, replace(exports, name="shared", key=("address",)))
    rich, poor = Client("c", "client:c", PREMIUM, "granted"), Client("c", "client:c", FREE, "default")
    assert limited.keys(client=rich) == ["client:c", "limit:exports:client:c", "limit:shared:PREMIUM:192.0.2.7"]
    assert limited.keys(client=poor) == ["client:c", "limit:exports:client:c", "limit:shared:FREE:192.0.2.7"]
    assert [key for key, *_ in client_buckets([exports], rich)] == ["client:c", "limit:exports:client:c"]
    (_, (key, old, new)) = moved_buckets([exports], poor, rich)
    assert (key, old.capacity, new.capacity) == ("limit:exports:client:c", 2, 6)
    assert exports.client_key(key) == "client:c"
    assert (limit_of(key), exports.previous_quota(key, "FREE")) == ("exports", old)


def test_what_applies_is_computed_once_for_route_method_and_cost() -> None:
    limited = Limited(BY_TEAM, BY_ADDRESS)
    facts = limited.plan(team="red").facts

    def charges(path: str, cost: float, client: Client = ACME) -> Sequence[Charge]:
        plan = limited.plan(path, "POST", cost=cost)
        again = Admission.plan(facts, "POST", path, path.encode(), limited.now_ns)
        again.exchange.route, again.exchange.cost, again.exchange.client = plan.exchange.route, cost, client
        facts.client = facts.client or client
        assert limited.stage.decide(again) is None
        return again.exchange.charges

    first, login = charges("/api/x", 0), charges("/api/login", 0)
    assert (len(first), len(login)) == (2, 3)
    assert charges("/api/x", 0) is first
    assert charges("/api/login", 0) is login
    assert charges("/api/x", 0.001) is not first
    facts.cost = -1.0  # as after a change of the client
    assert charges("/api/x", 0) is not first
    for number in range(3 * MOST_REMEMBERED):
        charges("/api/x", number / 1_000_000)
    assert len(facts.charged) <= MOST_REMEMBERED
    other = Client("other", "client:other", FREE, "default")
    assert charges("/api/x", 0, other)[0].key == "client:other"


def test_the_buckets_of_a_client_by_route_are_known() -> None:
    pair = Limit("pair", ("route", "client"), TEAM, routes=frozenset({"login", "x"}))
    every = Limit("every", ("client", "route"), TEAM)
    other = Limit("other", ("client", "address"), TEAM)
    buckets = client_buckets([pair, every, other], ACME, ["all", "login"])
    assert [(bucket.key, bucket.limit, bucket.route) for bucket in buckets] == [
        ("client:acme", None, None),
        ("limit:pair:login|client:acme", "pair", "login"),
        ("limit:pair:x|client:acme", "pair", "x"),
        ("limit:every:client:acme|all", "every", "all"),
        ("limit:every:client:acme|login", "every", "login"),
    ]
    assert moved_buckets([pair], ACME, ACME) == [("client:acme", FREE, FREE)]


# On a cluster


class Nodes:
    """The parts of a limiter whose buckets are on several nodes, each with a clock of its own."""

    def __init__(self, *replies: Decision) -> None:
        self.replies = list(replies)
        self.settled: list[Charge] = []
        self.batcher = self
        self.store_key = str

    def submit(self, op: Any) -> None:
        op._on_decision(self.replies.pop(0))

    def settle(self, changes: Sequence[Charge], _decision: Decision, _now_ns: int) -> None:
        self.settled += changes


def joint(charges: list[Charge], *replies: Decision) -> tuple[Decision, list[Charge]]:
    found: list[Decision] = []
    nodes = Nodes(*replies)
    MultiNodeCharge(nodes, charges, 0, found.append).submit()  # type: ignore[arg-type]  # what it uses of a limiter
    (decision,) = found
    return decision, nodes.settled


def test_a_refusal_gives_back_no_tokens_that_it_has_not_taken() -> None:
    """As one of a silent store, which asks the client to come again."""
    limited = Limited()
    settlement = CostSettlement(
        limiter=limited.limiter,
        clock_ns=lambda: limited.now_ns,
        recorder=Recorder(["all"], ["up"], ["FREE"], [50], 0.0),
    )
    admitted, _ = limited.ask(cost=7)
    refused, error = limited.ask(cost=5)
    assert isinstance(error, RateLimited)
    for plan, left in ((refused, 3), (admitted, 10)):
        settlement.on_failure(plan.exchange, StoreUnavailable("The store is unavailable."))
        assert limited.limiter.decide([Charge(ACME.key, FREE, 0)], limited.now_ns).remaining == left


def test_on_a_cluster_the_tightest_bucket_is_reported_and_each_settled_on_its_own_clock() -> None:
    charges = [Charge("client:acme", FREE, FREE.cost_ns(1)), Charge("limit:login:a", LOGIN, LOGIN.cost_ns(1))]
    first = Decision("client:acme", FREE, True, 9, 0, FREE.cost_ns(1), 1_000, source="store")
    other = Decision("limit:login:a", LOGIN, True, 2, 0, LOGIN.cost_ns(1), 3_000, source="store")
    decision, settled = joint(charges, first, other)
    assert (decision.key, decision.remaining, settled) == ("limit:login:a", 2, [])
    assert [decision.at_ns + debt_ns for debt_ns in decision.debts_ns] == [
        1_000 + FREE.cost_ns(1),
        3_000 + LOGIN.cost_ns(1),
    ]


def test_on_a_cluster_a_refusal_refunds_the_others_and_names_all_that_refuse() -> None:
    quotas = [FREE, LOGIN, TEAM]
    charges = [Charge(quota.name, quota, quota.cost_ns(1)) for quota in quotas]
    replies = [Decision(quota.name, quota, quota is FREE, 0, 0 if quota is FREE else 5, 5, 1_000) for quota in quotas]
    decision, settled = joint(charges, *replies)
    assert (decision.allowed, decision.violated) == (False, (LOGIN, TEAM))
    assert [(change.key, change.increment_ns) for change in settled] == [("FREE", -FREE.cost_ns(1))]
