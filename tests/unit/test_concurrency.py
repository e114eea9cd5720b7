"""Concurrency limits in one process: which slots a request takes, all or nothing, and their return at every end."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from api_gateway.errors import ConcurrencyExceeded, CostExceedsCapacity, GatewayError, RateLimited, Reason
from api_gateway.limits.concurrency import (
    DURATIONS,
    LONGEST_HINT,
    SHORTEST_HINT,
    ConcurrencyQuota,
    LocalSlots,
    SlottedCharges,
)
from api_gateway.limits.concurrency_headers import ConcurrencyHeaders
from api_gateway.limits.concurrency_leases import RENEWAL_INTERVAL
from api_gateway.limits.concurrency_ops import LEASE
from api_gateway.limits.limit import Limit
from api_gateway.limits.period_counters import PeriodCounters
from api_gateway.limits.periods import Calendar
from api_gateway.limits.quota_limiter import QuotaLimiter
from api_gateway.limits.quota_state import PeriodQuota
from api_gateway.metrics import Recorder
from api_gateway.models import NANOSECONDS, Charge, Client, ConcurrencySlot, Exchange, Quota
from api_gateway.observability.access_log import AccessLog
from api_gateway.proxy.admission import Admission, RequestPlan, Wait
from api_gateway.proxy.concurrency_stage import ConcurrencyStage
from api_gateway.proxy.cost_settlement import CostSettlement
from api_gateway.proxy.header_facts import HeaderReader
from api_gateway.proxy.problem_response import problem_body
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.rate_limiter import MemoryLimiter
from tests.cases import each

FREE = Quota.per_second("FREE", 1, 10)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
ACME = Client("acme", "client:acme", FREE, "configured")
RICH = Client("rich", "client:rich", PREMIUM, "configured")
FIVE = Limit("five", ("client",), ConcurrencyQuota.of("five", 5, "five"))
TWO_ON_X = Limit("two", ("route",), ConcurrencyQuota.of("two", 2, "two"), routes=frozenset({"x"}))
MIDDAY = 1_800_014_400.0  # 15 January 2027, 12:00 UTC
ROUTES = RouteTable([Route("all", "/api", "up"), Route("x", "/api/x", "up")])


class Slotted:
    """A stage with concurrency limits, on a clock that stands still unless a test sets it."""

    def __init__(self, *concurrency: Limit, limits: Sequence[Limit] = ()) -> None:
        self.now_ns = 1_000 * NANOSECONDS
        quotas = [quota for limit in limits for quota in limit.all_quotas if not isinstance(quota, PeriodQuota)]
        self.buckets = MemoryLimiter([FREE, PREMIUM, *quotas])
        self.limiter = QuotaLimiter(self.buckets, PeriodCounters(100), wall_clock=lambda: MIDDAY)
        self.in_flight: Counter[str] = Counter()
        self.slots = LocalSlots(self.in_flight)
        self.configure(concurrency, limits)
        self.headers = HeaderReader(
            id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=100, limit_fields=frozenset({b"x-team"})
        )

    def configure(self, concurrency: Sequence[Limit], limits: Sequence[Limit] = ()) -> None:
        self.stage = ConcurrencyStage(
            limiter=self.limiter,
            address_quota=None,
            exempt=(),
            limits=limits,
            concurrency=concurrency,
            routes=ROUTES,
            slots=self.slots,
        )

    def plan(self, client: Client = ACME, path: str = "/api/x", team: str | None = None) -> RequestPlan:
        facts = self.headers.read("192.0.2.7", {} if team is None else {b"x-team": [team.encode()]}, "1.1")
        plan = Admission.plan(facts, "GET", path, path.encode(), self.now_ns)
        plan.route, _ = ROUTES.find("", "GET", path, plan.raw_target)
        plan.exchange.route, plan.exchange.client, plan.exchange.cost = plan.route.name, client, 1.0
        plan.exchange.started = self.now_ns / NANOSECONDS
        return plan

    def begin(self, **described: Any) -> tuple[Exchange, GatewayError | None]:
        plan = self.plan(**described)
        error = self.stage.decide(plan)
        assert error is None or isinstance(error, GatewayError)
        return plan.exchange, error

    def end(self, exchange: Exchange, seconds: float = 0.1) -> None:
        exchange.finished = exchange.started + seconds
        self.slots.release(exchange)

    def tokens(self, key: str, quota: Quota) -> int:
        return self.buckets.preview(Charge(key, quota, 0), self.now_ns).remaining


def test_five_at_a_time() -> None:
    slotted = Slotted(FIVE)
    open_ = [slotted.begin()[0] for _ in range(5)]
    _, error = slotted.begin()
    assert isinstance(error, ConcurrencyExceeded)
    assert (error.status, error.reason) == (429, Reason.CONCURRENCY_EXCEEDED)
    assert slotted.begin(client=RICH)[1] is None, "another client"
    slotted.end(open_[2])
    assert slotted.begin()[1] is None
    assert isinstance(slotted.begin()[1], ConcurrencyExceeded)
    assert slotted.in_flight == {"five": 6}


def test_a_request_takes_all_its_slots_and_tokens_or_none() -> None:
    slotted = Slotted(FIVE, TWO_ON_X)
    for _ in range(2):
        assert slotted.begin()[1] is None
    refused, error = slotted.begin()
    assert isinstance(error, ConcurrencyExceeded)
    assert slotted.slots.in_flight("limit:five:client:acme") == 2, "the free slot is not taken"
    assert slotted.tokens("client:acme", FREE) == 8, "the bucket is not charged"
    assert not refused.slots
    slotted.end(refused)
    assert slotted.in_flight == {"five": 2, "two": 2}


def test_a_request_without_tokens_takes_no_slot() -> None:
    slotted = Slotted(FIVE)
    for _ in range(10):
        slotted.end(slotted.begin()[0])
    exchange, error = slotted.begin()
    assert isinstance(error, RateLimited)
    assert not exchange.slots
    assert slotted.in_flight == {"five": 0}
    assert not slotted.slots.counters


def test_a_slot_is_returned_once_however_often_the_end_is_recorded() -> None:
    slotted = Slotted(FIVE)
    first, second = slotted.begin()[0], slotted.begin()[0]
    for _ in range(3):
        slotted.end(first)
    assert slotted.slots.in_flight("limit:five:client:acme") == 1
    slotted.end(second)
    assert not slotted.slots.counters


def test_tiers_have_numbers_of_their_own_and_one_that_is_not_named_has_no_limit() -> None:
    numbers = {"FREE": ConcurrencyQuota.of("each:FREE", 1, "each"), "PREMIUM": ConcurrencyQuota.of("each:PREMIUM", 3)}
    slotted = Slotted(Limit("each", ("client",), None, numbers, tiers=frozenset({"FREE", "PREMIUM"})))
    assert [slotted.begin()[1] is None for _ in range(2)] == [True, False]
    assert [slotted.begin(client=RICH)[1] is None for _ in range(4)] == [True, True, True, False]
    basic = Client("b", "client:b", Quota.per_second("BASIC", 5, 50), "configured")
    assert all(slotted.begin(client=basic)[1] is None for _ in range(9))
    upgraded = replace(ACME, quota=PREMIUM)
    assert [slotted.begin(client=upgraded)[1] is None for _ in range(3)] == [True, True, False], "the client's one key"


def test_the_key_may_be_a_tuple_with_a_header_field() -> None:
    slotted = Slotted(Limit("team", ("header:x-team", "route"), ConcurrencyQuota.of("team", 1, "team")))
    assert [slotted.begin(team="red")[1] is None for _ in range(2)] == [True, False]
    assert slotted.begin(team="blue")[1] is None
    assert slotted.begin(team="red", path="/api/y")[1] is None
    assert all(slotted.begin()[1] is None for _ in range(3)), "without the field the limit does not apply"


def test_a_reload_adopts_open_requests_by_the_name_of_the_limit() -> None:
    slotted = Slotted(FIVE)
    open_ = [slotted.begin()[0] for _ in range(4)]
    slotted.configure([replace(FIVE, quota=ConcurrencyQuota.of("five", 3, "five"))])
    assert isinstance(slotted.begin()[1], ConcurrencyExceeded)
    slotted.end(open_.pop())
    assert isinstance(slotted.begin()[1], ConcurrencyExceeded), "three are open"
    slotted.end(open_.pop())
    assert slotted.begin()[1] is None
    slotted.configure([TWO_ON_X])
    for exchange in open_:
        slotted.end(exchange)
    assert slotted.slots.in_flight("limit:five:client:acme") == 1, "one was admitted under the second configuration"


def test_a_refusal_names_the_limits_and_its_wait_is_the_median_duration_of_the_key() -> None:
    slotted = Slotted(TWO_ON_X, replace(FIVE, quota=ConcurrencyQuota.of("five", 3, "five")))
    kept = slotted.begin(client=RICH)[0]
    for seconds in (2.0, 30.0, 7.0, 500.0, 1.0):
        slotted.end(slotted.begin(client=RICH)[0], seconds)
    slotted.begin(client=RICH)
    exchange, error = slotted.begin(client=RICH)
    assert isinstance(error, ConcurrencyExceeded)
    assert (error.retry_after, error.headers["retry-after"]) == (7.0, "7")
    body = json.loads(problem_body(error, instance="/api/x", request_id="1"))
    assert body["violated-policies"] == ["two"]
    assert (body["policy"], body["limit"], body["in_flight"]) == ("two", 2, 2)
    assert "cost" not in body
    assert body["detail"] == "Limit 'two' allows 2 requests in flight. Retry in about 7 s, when one has ended."
    assert exchange.decision is not None
    assert not exchange.decision.allowed
    slotted.end(kept)


SLOW = Limit("slow", ("client",), Quota.per_second("slow", 0.1, 5))
DAILY = Limit("daily", ("client",), PeriodQuota.of("daily", 5, Calendar("day", ZoneInfo("UTC"))))


@pytest.mark.parametrize(("limit", "wait"), [(SLOW, 10.0), (DAILY, 43_200.0)], ids=["bucket", "quota"])
async def test_a_refusal_for_lack_of_a_slot_names_the_limits_without_tokens_and_has_their_wait(
    limit: Limit, wait: float
) -> None:
    """In the explanation, too. It charges nothing, and when the slots are free again the wait is the same."""
    slotted = Slotted(TWO_ON_X, limits=[limit])
    for _ in range(3):
        slotted.end(slotted.begin()[0])
    open_ = [slotted.begin()[0] for _ in range(2)]
    plan = slotted.plan()
    outcome = slotted.stage.inspect(plan)
    while isinstance(outcome, Wait):
        outcome = outcome.resume(plan, await outcome.reply())
    for error in (outcome, *[slotted.begin()[1] for _ in range(2)]):
        assert isinstance(error, RateLimited)
        assert (error.reason, error.retry_after) == (Reason.RATE_LIMITED, wait)
        body = json.loads(problem_body(error, instance="/api/x", request_id="1"))
        assert (body["policy"], body["violated-policies"]) == (limit.name, ["two", limit.name])
    assert slotted.tokens("client:acme", FREE) == 5
    for exchange in open_:
        slotted.end(exchange)
    _, error = slotted.begin()
    assert isinstance(error, RateLimited)
    assert error.retry_after == wait


def test_a_refusal_has_the_hint_of_the_slots_if_that_is_the_longer_wait() -> None:
    slotted = Slotted(TWO_ON_X, limits=[SLOW])
    for _ in range(3):
        slotted.end(slotted.begin()[0], 30.0)
    for _ in range(2):
        slotted.begin()
    _, error = slotted.begin()
    assert isinstance(error, ConcurrencyExceeded)
    assert error.retry_after == 30.0
    assert error.extra["violated-policies"] == ["two", "slow"]
    too_dear = slotted.plan()
    too_dear.exchange.cost = 6.0
    assert isinstance(slotted.stage.decide(too_dear), CostExceedsCapacity), "it will never be admitted"


def test_the_wait_has_bounds_and_is_that_of_other_keys_without_own_durations() -> None:
    one = replace(FIVE, quota=ConcurrencyQuota.of("five", 1, "five"))
    slotted = Slotted(one)
    slot = ConcurrencySlot("limit:five:client:acme", one.quota or FREE)
    assert slotted.slots.hint(slot) == SHORTEST_HINT
    for _ in range(2 * DURATIONS):
        slotted.end(slotted.begin(client=RICH)[0], 12.0)
    assert slotted.slots.hint(slot) == 12.0
    for _ in range(2 * DURATIONS):
        slotted.end(slotted.begin(client=RICH)[0], 9_999.0)
    assert slotted.slots.hint(slot) == LONGEST_HINT
    assert not slotted.slots.counters


def test_fields_list_the_limit_as_concurrent_requests() -> None:
    slotted, headers = Slotted(FIVE), ConcurrencyHeaders()
    exchange, _ = slotted.begin()
    assert exchange.decision is not None
    assert dict(headers.headers(exchange.decision, exchange.charges)) == {
        b"ratelimit-policy": b'"free";q=10;w=10, "five";q=5;qu="concurrent-requests"',
        b"ratelimit": b'"free";r=9;t=9',
        b"x-ratelimit-limit": b"10",
        b"x-ratelimit-remaining": b"9",
        b"x-ratelimit-reset": b"1",
    }
    for _ in range(4):
        slotted.begin()
    refused, _ = slotted.begin()
    assert refused.decision is not None
    assert dict(headers.headers(refused.decision, refused.charges)) == {
        b"ratelimit-policy": b'"free";q=10;w=10, "five";q=5;qu="concurrent-requests"',
        b"ratelimit": b'"five";r=0',
        b"x-ratelimit-limit": b"5",
        b"x-ratelimit-remaining": b"0",
        b"x-ratelimit-reset": b"1",
    }


def test_a_settlement_keeps_the_slots_and_the_policy() -> None:
    slotted = Slotted(FIVE)
    exchange, _ = slotted.begin()
    recorder = Recorder([], [], [], [50], 0.0)
    settlement = CostSettlement(
        limiter=slotted.limiter,
        clock_ns=lambda: slotted.now_ns,
        recorder=recorder,
    )
    settlement.settle(exchange, 3.0)
    assert isinstance(exchange.charges, SlottedCharges)
    assert slotted.tokens("client:acme", FREE) == 7
    assert slotted.slots.in_flight("limit:five:client:acme") == 1


async def test_an_explanation_takes_no_slot_and_predicts_the_refusal() -> None:
    slotted = Slotted(TWO_ON_X)

    async def inspected() -> tuple[RequestPlan, Any]:
        plan = slotted.plan()
        outcome = slotted.stage.inspect(plan)
        while isinstance(outcome, Wait):
            outcome = outcome.resume(plan, await outcome.reply())
        return plan, outcome

    for expected in (0, 1):
        plan, outcome = await inspected()
        assert (outcome, [use.in_flight for use in plan.slot_uses]) == (None, [expected])
        assert slotted.begin()[1] is None
    plan, outcome = await inspected()
    assert isinstance(outcome, ConcurrencyExceeded)
    assert len(plan.inspected) == 1
    assert [one.name for one, _ in slotted.stage.lacking(slotted.plan(path="/api/y"))] == ["two"]


@each("seed", range(20))
def test_a_random_walk_agrees_with_sets_of_open_requests(seed: int) -> None:
    choose = random.Random(seed)
    limits = [FIVE, TWO_ON_X, Limit("team", ("header:x-team",), ConcurrencyQuota.of("team", 4, "team"))]
    slotted = Slotted(*limits)
    model: dict[str, set[int]] = {}
    most = {"limit:five": 5, "limit:two": 2, "limit:team": 4}
    open_: dict[int, tuple[Exchange, list[str]]] = {}
    outcomes: Counter[str] = Counter()
    for step in range(600):
        slotted.now_ns += choose.randrange(NANOSECONDS)
        if open_ and choose.random() < 0.45:
            number = choose.choice([*open_])
            exchange, keys = open_.pop(number)
            for key in keys:
                model[key].discard(number)
            for _ in range(choose.choice((1, 1, 2))):
                slotted.end(exchange)
            continue
        client, path = choose.choice((ACME, RICH)), choose.choice(("/api/x", "/api/y"))
        team = choose.choice((None, "red", "blue"))
        keys = [f"limit:five:{client.key}"]
        keys += ["limit:two:x"] if path == "/api/x" else []
        keys += [] if team is None else [f"limit:team:{team}"]
        full = [key for key in keys if len(model.get(key, ())) >= most[":".join(key.split(":")[:2])]]
        before = slotted.tokens(client.key, client.quota)
        exchange, error = slotted.begin(client=client, path=path, team=team)
        after = slotted.tokens(client.key, client.quota)
        if full:
            outcomes["full"] += 1
            assert isinstance(error, ConcurrencyExceeded)
            assert exchange.decision is not None
            assert {quota.policy for quota in exchange.decision.violated} == {key.split(":")[1] for key in full}
            assert after == before
        elif before == 0:
            outcomes["tokens"] += 1
            assert isinstance(error, RateLimited)
        else:
            outcomes["admitted"] += 1
            assert error is None
            assert after == before - 1
            open_[step] = exchange, keys
            for key in keys:
                model.setdefault(key, set()).add(step)
        assert {key: counter.in_flight for key, counter in slotted.slots.counters.items()} == {
            key: len(held) for key, held in model.items() if held
        }
    assert outcomes["full"] > 20
    assert outcomes["admitted"] > 100
    for exchange, _ in open_.values():
        slotted.end(exchange)
    assert not slotted.slots.counters
    assert not any(slotted.in_flight.values())


def test_the_access_log_names_no_limit_as_charged_by_a_refused_request() -> None:
    slotted, written = Slotted(TWO_ON_X), list[str]()
    for _ in range(3):
        exchange, _ = slotted.begin()
        written.append(AccessLog().line(exchange, 1_800_000_000.0))
    decisions = [json.loads(line)["decision"] for line in written]
    assert [(one["limits"], one["limit"]) for one in decisions] == [
        (["FREE"], "FREE"),
        (["FREE"], "FREE"),
        ([], "two"),
    ]


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    section = " ".join(page.split("## Requests in flight\n")[1].split("\n## ")[0].split())
    assert f"the last {DURATIONS} requests of the same key" in section
    assert f"from {SHORTEST_HINT:g} s to {LONGEST_HINT:g} s" in section
    assert f"renews it every {RENEWAL_INTERVAL:g} s" in section
    assert f"until the lease ends, {LEASE:g} s after its last renewal" in section
