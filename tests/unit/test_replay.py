"""Replays of access logs: lines, files, order, clients divided among processes, conditions, and what is reported."""

import base64
import gzip
import hashlib
import html
import json
import math
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from api_gateway.cli import main
from api_gateway.config import GatewayConfig, from_values
from api_gateway.http1.headers import address_key
from api_gateway.metrics import Recorder
from api_gateway.models import Charge, Client, Decision, Exchange, Quota
from api_gateway.observability.access_log import AccessLog
from api_gateway.observability.decision_numbers import DecisionNumbers
from api_gateway.proxy.admission import RequestPlan, StageResult
from api_gateway.proxy.cost_settlement import CostSettlement
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.replay import log_files, log_lines, log_replay
from api_gateway.replay.condition import MAX_LENGTH, ClientCondition
from api_gateway.replay.errors import ReplayError
from api_gateway.replay.external_sort import RunWriter, merged
from api_gateway.replay.log_files import blocks_of, log_parts
from api_gateway.replay.log_lines import ForeignLine, LogEvent, NotDecided, events_of
from api_gateway.replay.log_replay import ReplayResult, read_part, replay_logs
from api_gateway.replay.logged_routes import LoggedRouteStage
from api_gateway.replay.page import page_of
from api_gateway.replay.report import document_of, text_of
from api_gateway.replay.saved_state import read_snapshot
from api_gateway.replay.sharding import SharedBuckets, shards
from api_gateway.replay.simulation import Simulation
from tests.cases import each
from tests.unit.test_access_log import EXCHANGES, OfAnOrganisation, bare

SECOND = 1_000_000_000
UP = {"upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:1"}]}}}


def config(**sections: Any) -> GatewayConfig:
    return from_values({**UP, **sections})


class Traffic:
    """Requests of one process: decided by a real limiter, and logged in another order."""

    def __init__(self, process: str = "a", *, start_ns: int = SECOND) -> None:
        self.quotas = {"FREE": Quota.per_second("FREE", 1, 10), "BASIC": Quota.per_second("BASIC", 5, 50)}
        self.limiter = MemoryLimiter(self.quotas.values())
        self.numbers = DecisionNumbers(process, lambda: 0, lambda: 1_700_000_000.0)
        self.now_ns = start_ns
        self.exchanges: list[Exchange] = []

    def request(
        self,
        client_id: str,
        tier: str = "FREE",
        *,
        after: float = 0.0,
        path: str = "/api/up/x",
        route: str = "up",
        cost: float = 1.0,
    ) -> Exchange:
        """Decide on a request, `after` seconds after the one before."""
        self.now_ns += round(after * SECOND)
        quota = self.quotas[tier]
        client = Client(client_id, f"client:{client_id}", quota, "registered")
        exchange = Exchange("1", "GET", path, "192.0.2.1", self.now_ns / SECOND, client, route=route, cost=cost)
        exchange.charges = [Charge(client.key, quota, quota.cost_ns(cost))]
        exchange.number = self.numbers.next()
        exchange.decision = self.limiter.decide(exchange.charges, self.now_ns)
        exchange.finished = exchange.started + 1
        self.exchanges.append(exchange)
        return exchange

    def check(self, address: str, *, is_refused: bool = False) -> Exchange:
        """Charge an address for the verification of a credential, which is wrong."""
        quota = Quota.per_second("address", 1, 2)
        exchange = Exchange("1", "GET", "/api/up/x", address, self.now_ns / SECOND, None, route="up")
        decision = Decision(f"peer:{address}", quota, not is_refused, 0, int(is_refused), 0, self.now_ns)
        exchange.number = self.numbers.next()
        if is_refused:
            exchange.client = Client(address_key(address), f"peer:{address}", self.quotas["FREE"], "address")
            exchange.charges, exchange.decision = [Charge(decision.key, quota, quota.emission_ns)], decision
        else:
            exchange.credential_check = exchange.number, decision
        exchange.finished = exchange.started + 1
        self.exchanges.append(exchange)
        return exchange

    def lines(self, seed: int = 1) -> list[str]:
        """Return the lines, in a random order of completion."""
        log = AccessLog(numbers=self.numbers)
        shuffled = random.Random(seed).sample(self.exchanges, len(self.exchanges))
        return [log.line(exchange, 1_700_000_000.0) for exchange in shuffled]


def log_of(folder: Path, lines: Sequence[str], name: str = "access.log") -> Path:
    path = folder / name
    path.write_text("".join(lines))
    return path


def reported(found: ReplayResult, candidate: GatewayConfig, current: GatewayConfig | None = None) -> dict[str, Any]:
    return document_of(found, ("new.yaml", candidate), None if current is None else ("now.yaml", current))


# Lines


@given(EXCHANGES)
@example(bare())
def test_both_parsers_read_the_same_of_every_line(exchange: Exchange) -> None:
    """The fast one leaves what it does not know to the general one, which reads any JSON."""
    line = AccessLog().line(exchange, 0.0)

    def read(parse: Any) -> list[LogEvent] | type:
        try:
            found: list[LogEvent] = parse(line, 7)
        except NotDecided:
            return NotDecided
        except ForeignLine:
            return ForeignLine
        return found

    assert read(events_of) == read(log_lines._events_of_any)


def test_the_usual_line_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_lines, "_events_of_any", None)
    traffic = Traffic()
    for _ in range(12):
        traffic.request("acme")
    assert len([event for line in traffic.lines() for event in events_of(line, 1)]) == 12


def test_foreign_lines_are_counted_and_named_and_never_end_a_replay(tmp_path: Path) -> None:
    traffic = Traffic()
    traffic.request("acme")
    (line,) = traffic.lines()
    earlier = json.loads(line)
    del earlier["decision"]
    broken = json.loads(line) | {"decision": {"at_ns": "soon"}}
    foreign = ["Listening on http://x\n", "[1]\n", '{"level": "info"}\n', "\xff\x00\n", "[" * 50_000 + "\n", "\n"]
    lines = [*foreign, json.dumps(earlier) + "\n", json.dumps(broken) + "\n", line]
    path = tmp_path / "access.log"
    path.write_bytes("".join(lines).encode("latin-1") + line[:100].encode())
    found = reported(replay_logs([path], config(), None), config())
    log = found["log"]
    assert (log["lines"], log["foreign_lines"], log["incomplete_lines"]) == (10, 7, 1)
    assert found["totals"]["decisions"] == 1
    assert log["messages"][0] == f"{path}, line 1: is not JSON"
    assert log["messages"][2] == f"{path}, line 3: is not a line of the access log"
    path.write_text("".join(lines[6:8]))
    log = reported(replay_logs([path], config(), None), config())["log"]
    assert log["messages"] == [
        f"{path}, line 1: has no 'decision': it was written by an earlier version of the gateway",
        f"{path}, line 2: has no usable decision: KeyError: 'process'",
    ]


# Files


HOSTILE = (
    *("null", "true", "-2", "1e999", "NaN", "1" + "0" * 400, "9" * 5000, "..", "--", '"x"', '""', "[]", "{}", "1e300"),
    *('"\\ud800"', '"\\u0000\\u001b[31m\\u202e"', f'"{"A" * 50_000}"', '"<script>"', '"%zz"', '["address"]'),
    *(f'[{{"at_ns":1,"number":2,"cost":{cost}}}]' for cost in ("NaN", "1e999", "-5")),
)


@pytest.mark.parametrize(
    "name",
    [
        *("at_ns", "number", "process", "source", "limits", "limit", "wait_ns", "cost", "remaining", "settlements"),
        "wall_us",
    ],
)
def test_no_value_of_a_decision_ends_a_replay_or_reaches_a_terminal(tmp_path: Path, name: str) -> None:
    traffic = Traffic()
    traffic.request("acme")
    (line,) = traffic.lines()
    counted = config(limits=[{"name": "daily", "quota": 2, "period": "day", "starts": "client"}])
    for value in HOSTILE:
        members = json.loads(line)
        (members if name == "remaining" else members["decision"])[name] = "@"
        changed = json.dumps(members, separators=(",", ":")).replace('"@"', value) + "\n"
        found = reported(replay_logs([log_of(tmp_path, [changed, line])], counted, None), counted)
        assert found["log"]["lines"] == 2
        assert found["totals"]["decisions"] + found["log"]["foreign_lines"] + found["log"]["not_decided"] == 2
        assert all(len(message) < 500 for message in found["log"]["messages"])
        assert text_of(found, 20).replace("\n", "").isprintable()
        assert "<script>" not in page_of(found)


def test_a_refusal_by_a_concurrency_limit_charges_nothing_and_is_not_missing(tmp_path: Path) -> None:
    traffic = Traffic()
    for _ in range(3):
        traffic.request("acme")
    lines = traffic.lines()
    members = json.loads(lines[1])
    members["decision"] |= {"limits": [], "limit": "five", "wait_ns": 1_000_000_000}
    changed = [lines[0], json.dumps(members, separators=(",", ":")) + "\n", lines[2]]
    found = reported(replay_logs([log_of(tmp_path, changed)], config(), None), config())
    assert (found["totals"]["decisions"], found["log"]["not_decided"], found["log"]["missing_decisions"]) == (2, 1, 0)


def test_no_value_of_a_client_ends_a_replay_or_reaches_a_terminal(tmp_path: Path) -> None:
    traffic = Traffic()
    traffic.request("acme")
    (line,) = traffic.lines()
    for name in ("client_address", "client_id", "tier", "tier_source", "organisation", "method", "path", "route"):
        for value in HOSTILE:
            changed = json.dumps(json.loads(line) | {name: "@"}, separators=(",", ":")).replace('"@"', value) + "\n"
            found = reported(replay_logs([log_of(tmp_path, [changed, line])], config(), None), config())
            text = text_of(found, 20)
            assert text.replace("\n", "").isprintable()
            assert len(text) < 10_000
            assert "<script>" not in page_of(found)


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=30), st.integers(1, 50))
def test_each_line_belongs_to_one_part(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int
) -> None:
    assume(not b"\n".join(lines).startswith(b"\x1f\x8b"))  # is a compressed log
    path = tmp_path_factory.getbasetemp() / "parts.log"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    found = [
        line.encode("latin-1") for part in log_parts([path], size) for block, _ in blocks_of(part) for line in block
    ]
    assert found == lines


def test_a_compressed_log_that_is_cut_off_is_read_as_far_as_possible(tmp_path: Path) -> None:
    traffic = Traffic()
    for _ in range(2_000):
        traffic.request("acme", after=0.5)
    whole = tmp_path / "whole.gz"
    whole.write_bytes(gzip.compress("".join(traffic.lines()).encode()))
    assert replay_logs([whole], config(), None).tally.decisions == 2_000
    cut = tmp_path / "cut.gz"
    cut.write_bytes(whole.read_bytes()[:-20])
    (message,) = reported(replay_logs([cut], config(), None), config())["log"]["messages"]
    assert message.startswith(f"{cut}: cannot be read after line ")


def test_a_log_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"none\.log: cannot be read: no such file"):
        replay_logs([tmp_path / "none.log"], config(), None)


# Order


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=300), st.integers(1, 40))
def test_events_are_merged_in_the_order_of_time_and_number(
    tmp_path_factory: pytest.TempPathFactory, given_times: list[tuple[int, int]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    writer = RunWriter(folder, "run", size)
    events = [(at_ns, number, place, 0, "x") for place, (at_ns, number) in enumerate(given_times)]
    for begin in range(0, len(events), 7):
        writer.add(events[begin : begin + 7])
    writer.flush()
    assert [event for block in merged(writer.runs) for event in block] == sorted(events)


# Decisions


def test_a_log_in_any_order_and_in_any_files_gives_the_same_decisions(tmp_path: Path) -> None:
    traffic, rng = Traffic(), random.Random(4)
    for _ in range(3_000):
        number = rng.randrange(20)
        traffic.request(f"client-{number}", "BASIC" if number % 4 else "FREE", after=rng.random() * 0.05)
    refused = [exchange for exchange in traffic.exchanges if exchange.decision and not exchange.decision.allowed]
    assert refused
    lines = traffic.lines()
    paths = [log_of(tmp_path, lines[begin::3], f"{begin}.log") for begin in range(3)]
    found = replay_logs(paths, config(tiers={"BASIC": {"rate": 1, "capacity": 10}}), config())
    agreement = found.tally.current_agreement
    assert agreement.same == agreement.compared == 3_000
    assert found.tally.limited_by_current == found.tally.limited_in_log == len(refused)
    assert found.tally.newly_limited_by.keys() == {"BASIC"}


def test_what_is_remembered_of_a_client_and_a_path_changes_no_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most decisions repeat the ones before of the same client, path and method; all stages give the same."""
    traffic, rng = Traffic(), random.Random(9)
    paths = ["/api/up/x", "/api/up/y", "/api/dear/z", "/api/nowhere", "/api/up/../dear"]
    clients = [dict[str, Any](tier="BASIC", path="/api/up/x", method="GET", source="default") for _ in range(6)]
    for _ in range(4_000):
        number = rng.randrange(6)
        is_as_before, own = rng.random() < 0.7, clients[number]
        if not is_as_before:
            changed: dict[str, Any] = {
                "tier": rng.choice(["FREE", "BASIC", "BASIC"]),
                "path": rng.choice(paths),
                "method": rng.choice(["GET", "POST"]),
                "source": rng.choice(["default", "granted", "configured"]),
                "has_keys": rng.random() < 0.5,
                "address": f"192.0.2.{rng.randrange(3)}",
            }
            name = rng.choice(list(changed))
            own[name] = changed[name]
        exchange = traffic.request(f"client-{number}", own["tier"], after=rng.random() * 0.4, path=own["path"])
        exchange.client_address, exchange.method = own.get("address", "192.0.2.1"), own["method"]
        assert exchange.client is not None
        exchange.client = replace(exchange.client, source=own["source"], has_keys=own.get("has_keys", False))
    log = log_of(tmp_path, traffic.lines())
    routes = [
        {"name": "up", "path": "/api/up", "upstream": "up", "costs": [{"methods": ["POST"], "cost": 2}]},
        {"name": "dear", "path": "/api/dear", "upstream": "up", "cost": 3},
    ]
    candidate = config(routes=routes, address_limit={"rate": 2, "capacity": 5, "exempt": []})

    def figures() -> dict[str, Any]:
        found = reported(replay_logs([log], candidate, config()), candidate, config())
        return {name: found[name] for name in found if name != "seconds"}

    remembered = figures()
    assert remembered["totals"]["refused_otherwise"] > 0
    assert remembered["newly_limited_by"].keys() >= {"FREE", "address"}
    monkeypatch.setattr(LoggedRouteStage, "decide", _afresh)
    monkeypatch.setattr(Simulation, "decide", _by_stages)
    assert figures() == remembered


def _afresh(self: LoggedRouteStage, plan: RequestPlan) -> StageResult:
    self._routes._found.clear()
    return self._routes.decide(plan, self.logged)


def _by_stages(self: Simulation, event: LogEvent) -> Decision | None:
    return self._decide_by_stages(self._buckets_of(event[4], event[5]), event)


def test_each_process_of_a_gateway_without_a_store_has_buckets_of_its_own(tmp_path: Path) -> None:
    """Such as after a restart; their numbers begin anew, and a number that is not in the log is reported."""
    before, after = Traffic("a"), Traffic("b", start_ns=2 * SECOND)
    for traffic in (before, after):
        for _ in range(15):
            traffic.request("acme")
    del before.exchanges[12]  # one that was refused
    found = reported(replay_logs([log_of(tmp_path, before.lines() + after.lines())], config(), None), config())
    assert found["totals"]["limited"] == 9 == found["totals"]["limited_in_log"]
    assert found["log"]["missing_decisions"] == 1
    assert found["log"]["processes"] == 2


def test_processes_with_a_store_share_its_buckets(tmp_path: Path) -> None:
    one, other = Traffic("a"), Traffic("b")
    other.limiter = one.limiter
    for index in range(60):
        traffic, before = (one, other) if index % 2 else (other, one)
        traffic.now_ns = before.now_ns
        decision = traffic.request("acme", after=0.1).decision
        assert decision is not None
        decision.source = "store"
    agreement = replay_logs([log_of(tmp_path, one.lines() + other.lines())], config(), None).tally.agreement
    assert agreement.same == agreement.compared == 60


def test_each_settlement_is_made_again_at_its_time(tmp_path: Path) -> None:
    """Also several of one request, and of requests that are open at the same time."""
    traffic, rng, open_ones = Traffic(), random.Random(8), list[Exchange]()
    settlement = CostSettlement(
        limiter=traffic.limiter,
        clock_ns=lambda: traffic.now_ns,
        recorder=Recorder((), (), (), (50.0,), 0.0),
        next_number=traffic.numbers.next,
    )
    for _ in range(1_000):
        open_ones.append(traffic.request(f"client-{rng.randrange(4)}", "BASIC", after=rng.random() * 0.2, cost=3))
        while len(open_ones) > 5:
            traffic.now_ns += rng.randrange(SECOND // 50)
            place = rng.randrange(5)
            settlement.settle(open_ones[place], rng.randrange(9))
            if rng.random() < 0.6:
                del open_ones[place]
    settled = [len(exchange.settlements) for exchange in traffic.exchanges]
    assert min(settled.count(1), settled.count(2), settled.count(3)) > 10
    found = replay_logs([log_of(tmp_path, traffic.lines())], config(routes=[PLAIN | {"cost": 3}]), None)
    assert found.tally.agreement.same == found.tally.agreement.compared == 1_000
    assert found.tally.limited > 100


@each(
    ("source", "has_keys", "limited"),
    [
        ("default", False, 3),
        ("configured", False, 3),  # the candidate does not have it
        ("default", True, 0),
        ("registered", False, 0),
        ("granted", False, 0),
        ("credential", False, 0),
    ],
)
def test_who_is_registered_is_not_charged_to_its_address(
    tmp_path: Path,
    source: Any,
    has_keys: bool,  # noqa: FBT001
    limited: int,
) -> None:
    traffic = Traffic()
    for _ in range(5):
        exchange = traffic.request("acme", "BASIC")
        assert exchange.client is not None
        exchange.client = replace(exchange.client, source=source, has_keys=has_keys)
    candidate = config(address_limit={"rate": 0.001, "capacity": 2, "exempt": []}, default_tier="BASIC")
    found = replay_logs([log_of(tmp_path, traffic.lines())], candidate, None)
    assert found.tally.newly_limited_by == ({"address": limited} if limited else {})


def test_an_id_that_looks_like_an_address_is_another_client_than_that_address(tmp_path: Path) -> None:
    traffic = Traffic()
    for source in ("default", "address"):
        exchange = traffic.request("192.0.2.1")
        assert exchange.client is not None
        exchange.client = replace(exchange.client, source=source)
    assert len(replay_logs([log_of(tmp_path, traffic.lines())], config(), None).tally.clients) == 2


def test_verifications_of_credentials_charge_their_address(tmp_path: Path) -> None:
    """IPv6 addresses of one network are one, and what the address is refused for is a decision on it alone."""
    traffic = Traffic()
    for index in range(5):
        traffic.check(f"2001:db8::{index}")
    refused = traffic.check("2001:db8::9", is_refused=True)
    limited = config(address_limit={"rate": 0.001, "capacity": 2, "exempt": []})
    log = log_of(tmp_path, traffic.lines())
    found = reported(replay_logs([log], limited, limited), limited, limited)
    assert (found["totals"]["credential_checks_refused"], found["totals"]["decisions"]) == (3, 1)
    assert (found["totals"]["limited_in_log"], found["totals"]["limited"], refused.status) == (1, 1, 0)
    clients = read_part(log_parts([log])[0], 0, tmp_path, SharedBuckets([limited])).clients
    assert clients.counts == {"a:2001:db8::/64": 6}


def test_clients_that_the_candidate_refuses_less_are_listed(tmp_path: Path) -> None:
    traffic = Traffic()
    for _ in range(15):
        traffic.request("acme")
    candidate = config(tiers={"FREE": {"rate": 1, "capacity": 12}})
    found = reported(replay_logs([log_of(tmp_path, traffic.lines())], candidate, None), candidate)
    assert (found["totals"]["newly_allowed"], found["totals"]["limited"]) == (2, 3)
    assert re.search(r"^acme +FREE +15 +5 +3 +0 +2 ", text_of(found, 5), re.MULTILINE)


def test_what_is_newly_limited_says_who_when_how_long_and_by_which_limit(tmp_path: Path) -> None:
    traffic = Traffic()
    for after in (0.0, 1.0, 1.0, 10.0):
        traffic.request("acme", "BASIC", after=after)
    candidate = config(tiers={"BASIC": {"rate": 0.1, "capacity": 1}})
    found = reported(replay_logs([log_of(tmp_path, traffic.lines())], candidate, None), candidate)
    (client,) = found["clients"]
    assert client == {
        "client": "acme",
        "tier": "BASIC",
        "requests": 4,
        "limited_before": 0,
        "limited": 2,
        "newly_limited": 2,
        "newly_allowed": 0,
        "not_evaluable": 0,
        "longest_wait_seconds": 9.0,
        "limited_seconds": 11.0,
        "limits": {"BASIC": 2},
        "first_newly_limited": "2023-11-14T22:13:22.000+00:00",
        "last_newly_limited": "2023-11-14T22:13:23.000+00:00",
    }
    text = text_of(found, 5)
    assert "newly limited 2, newly allowed 0, not evaluable 0; clients newly limited 1 of 1" in text
    assert "by limit BASIC: 2" in text


def test_a_bucket_keeps_its_filled_fraction_when_the_tier_changes_in_the_log(tmp_path: Path) -> None:
    traffic = Traffic()
    traffic.quotas["BASIC"] = Quota.per_second("BASIC", 5, 100)  # which takes twice as long to fill
    traffic.limiter = MemoryLimiter(traffic.quotas.values())
    for _ in range(5):
        traffic.request("acme")
    traffic.limiter.change_quota("client:acme", traffic.quotas["FREE"], traffic.quotas["BASIC"], traffic.now_ns)
    for _ in range(60):
        traffic.request("acme", "BASIC")
    candidate = config(tiers={"BASIC": {"rate": 5, "capacity": 100}})
    tally = replay_logs([log_of(tmp_path, traffic.lines())], candidate, None).tally
    assert (tally.agreement.same, tally.limited) == (65, 10)


def test_what_the_log_does_not_suffice_for_is_reported(tmp_path: Path) -> None:
    traffic = Traffic()
    exchange = traffic.request("acme", "BASIC")
    assert exchange.decision is not None
    exchange.decision.source = "local_share"
    route = {"name": "up", "path": "/api/up", "upstream": "up", "host": "a.example"}
    candidate = config(tiers={"BASIC": None}, routes=[route])
    found = reported(replay_logs([log_of(tmp_path, traffic.lines())], candidate, None), candidate)
    tier, outage = found["not_evaluable"]
    assert tier.startswith("tier BASIC:")
    assert outage.startswith("1 decisions by local_share:")
    assert found["totals"]["refused_otherwise"] == 0, "the request has the host of its route"
    assert found["agreement"]["candidate"]["compared"] == 0


def test_a_configuration_without_routes_has_those_of_the_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic = Traffic()
    for _ in range(10):
        traffic.request("acme", path="/api/users/1", route="users")
    candidate = tmp_path / "new.yaml"
    candidate.write_text("tiers: {FREE: {rate: 1, capacity: 4}}\n")
    assert main(["replay", str(log_of(tmp_path, traffic.lines())), "--config", str(candidate), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["totals"]["refused_otherwise"], found["totals"]["newly_limited"]) == (0, 6)
    assert found["not_evaluable"] == []


BETA = {"name": "beta", "path": "/api/up", "upstream": "up", "cost": 5, "match": {"headers": {"X-Beta": "1"}}}
SHOP = {"name": "shop", "path": "/api/up", "upstream": "up", "cost": 2, "host": "*.shop.example"}
PLAIN = {"name": "up", "path": "/api/up", "upstream": "up"}
LARGE = {"tiers": {"BASIC": {"rate": 5, "capacity": 50}}}


def replayed_with_conditions(
    folder: Path, routes: Sequence[Any], current: Sequence[Any] | None = None, **sections: Any
) -> dict[str, Any]:
    """Replay ten requests of the route `up`, four of `beta` and two of `shop`, which their log names."""
    traffic = Traffic()
    for route, cost, count in (("up", 1, 10), ("beta", 5, 4), ("shop", 2, 2)):
        for _ in range(count):
            traffic.request("acme", "BASIC", route=route, cost=cost)
    candidate = config(routes=list(routes), **LARGE, **sections)
    wrote = None if current is None else config(routes=list(current), **LARGE)
    return reported(replay_logs([log_of(folder, traffic.lines())], candidate, wrote, jobs=1), candidate, wrote)


def test_requests_have_the_route_with_conditions_that_the_log_names(tmp_path: Path) -> None:
    """By the configuration that wrote the log, all others have not met its conditions: every decision is the same."""
    written = [BETA, SHOP, PLAIN]
    found = replayed_with_conditions(tmp_path, written, written)
    assert found["agreement"]["candidate"] == found["agreement"]["current"]
    assert found["agreement"]["candidate"]["same"] == found["totals"]["decisions"] == 16
    assert (found["not_evaluable"], found["totals"]["not_evaluable"]) == ([], 0)


STRICTER = {"limits": [{"name": "shops", "key": "client", "rate": 1, "capacity": 2, "routes": ["new"]}]}
NEW = SHOP | {"name": "new", "host": "new.shop.example", "match": {"query": {"v": "2"}}}


@pytest.mark.parametrize(
    ("routes", "current", "sections", "notes"),
    [
        ([BETA, SHOP, PLAIN], None, {}, {"beta": 10, "shop": 14}),
        ([BETA, SHOP, PLAIN, NEW], [BETA, SHOP, PLAIN], {}, {"new": 14}),  # the requests of `shop` cost the same
        ([BETA, SHOP, PLAIN, NEW], [BETA, SHOP, PLAIN], STRICTER, {"new": 16}),  # and now they are limited
        ([BETA | {"match": {"headers": {"X-Beta": "2"}}}, SHOP, PLAIN], [BETA, SHOP, PLAIN], {}, {"beta": 14}),
        ([BETA | {"cost": 1}, SHOP | {"cost": 1}, PLAIN], None, {}, {}),  # whichever it was, it costs the same
        ([BETA], None, {}, {"beta": 12}),  # else the request has no route
    ],
)
def test_requests_that_may_have_another_route_are_reported_by_route(
    tmp_path: Path, routes: list[Any], current: list[Any] | None, sections: dict[str, Any], notes: dict[str, int]
) -> None:
    found = replayed_with_conditions(tmp_path, routes, current, **sections)
    counts = [
        re.match(r"route (\w+): (.+), which is not logged; (\d+) requests", one) for one in found["not_evaluable"]
    ]
    assert {one[1]: int(one[3]) for one in counts if one} == notes
    assert all(("--current" in one) is (current is None) for one in found["not_evaluable"])
    if "new" in notes:
        assert "route new: host new.shop.example, query v = '2', which is not logged" in found["not_evaluable"][0]


def test_a_condition_can_fail_a_check_for_requests_that_are_not_evaluable(tmp_path: Path) -> None:
    found = replayed_with_conditions(tmp_path, [BETA, PLAIN])
    assert found["totals"]["not_evaluable"] == 12, "those of the route that the candidate does not have, too"
    assert ClientCondition("not_evaluable > 0").holds({"not_evaluable": 12})


def test_limits_on_values_that_are_not_logged_are_not_evaluated(tmp_path: Path) -> None:
    traffic = Traffic()
    for index in range(8):
        traffic.request(f"client-{index % 2}", "BASIC")
    strict = {"rate": 1, "capacity": 1}
    tenants = {"name": "tenants", "key": ["header:x-tenant", "client"], **strict}
    candidate = config(limits=[tenants, {"name": "all", "key": "route", **strict}])
    found = reported(replay_logs([log_of(tmp_path, traffic.lines())], candidate, None), candidate)
    (note,) = found["not_evaluable"]
    assert note == "limit tenants: its key has header:x-tenant, which is not logged; it is not evaluated"
    assert (found["newly_limited_by"], found["totals"]["newly_limited"]) == ({"all": 7}, 7)


@pytest.mark.parametrize("has_current", [False, True])
def test_a_request_that_a_limit_by_an_unlogged_value_refused_is_not_evaluable_and_charges_nothing(
    tmp_path: Path, *, has_current: bool
) -> None:
    """So a replay under the configuration that wrote the log finds no client newly limited or allowed."""
    team = {"name": "team", "key": "header:x-team", "tiers": {"BASIC": {"rate": 0.001, "capacity": 2}}}
    own = config(limits=[{"name": "daily", "quota": 4, "period": "day"}, team])
    traffic = Traffic()
    of_team = Quota.per_second("team:BASIC", 0.001, 2, "team")
    traffic.limiter = MemoryLimiter([*traffic.quotas.values(), of_team])
    for number in range(7):
        exchange = traffic.request("acme", "BASIC", after=0.1)
        if 1 <= number < 6:
            team_charge = Charge("limit:team:BASIC:a", of_team, of_team.cost_ns(1))
            exchange.charges = [*exchange.charges, team_charge]
            exchange.decision = traffic.limiter.decide(exchange.charges, traffic.now_ns)
    log = log_of(tmp_path, traffic.lines())
    assert log.read_text().count('"limit":"team:BASIC","wait_ns":0') == 2, "the other three are refused"

    def replayed(candidate: GatewayConfig) -> dict[str, Any]:
        current = own if has_current else None
        return reported(replay_logs([log], candidate, current), candidate, current)

    found = replayed(own)
    totals = {name: found["totals"][name] for name in ("newly_limited", "newly_allowed", "limited", "not_evaluable")}
    assert totals == {"newly_limited": 0, "newly_allowed": 0, "limited": 0, "not_evaluable": 3}
    assert (found["totals"]["limited_in_log"], found["totals"]["refused_otherwise"]) == (3, 0)
    assert found["totals"]["limited_by_current"] == (3 if has_current else None)
    assert found["agreement"]["candidate"]["compared"] == 4, "of 7"
    note = "limit team: its key has header:x-team, which is not logged; it is not evaluated, and neither are 3"
    assert any(one.startswith(note) for one in found["not_evaluable"]), found["not_evaluable"]
    assert "not evaluable 3" in text_of(found, 5)
    without = replayed(config(limits=[{"name": "daily", "quota": 4, "period": "day"}]))
    totals = {name: without["totals"][name] for name in totals}
    shown = "without the limit its refusals are decided: the first of three is allowed, and the last request is not"
    assert totals == {"newly_limited": 1, "newly_allowed": 1, "limited": 3, "not_evaluable": 0}, shown


def test_calendar_quotas_are_evaluated_by_the_wall_clock_of_the_log_across_restarts(tmp_path: Path) -> None:
    """A period ends when the logged wall clock says so; counters outlive a process, buckets do not."""
    before, after = Traffic("a"), Traffic("b", start_ns=400 * SECOND)
    midnight = 1_700_006_400
    for traffic, walls in ((before, (-10, -9, -8.5, 0)), (after, (1, 2, 3))):
        for wall in walls:
            exchange = traffic.request("acme", after=1)
            assert exchange.decision is not None
            exchange.charges = [*exchange.charges, Charge("limit:daily:client:acme", traffic.quotas["FREE"], 0)]
            exchange.decision.wall_us = round((midnight + wall) * 1_000_000)
    candidate = config(limits=[{"name": "daily", "quota": 2, "period": "day"}])
    log = log_of(tmp_path, before.lines() + after.lines())
    assert '"wall_us":1700006391500000' in log.read_text()
    found = reported(replay_logs([log], candidate, None), candidate)
    (client,) = found["clients"]
    assert (client["requests"], client["limits"]) == (7, {"daily": 3})
    assert client["longest_wait_seconds"] == 86_400 - 2
    (note,) = found["not_evaluable"]
    assert note.startswith("limit daily: what was used of its calendar period before the log is not known")


def test_the_time_of_a_period_is_logged_to_the_microsecond() -> None:
    """The simulation gives it to the limiter, which rounds up, without an error of rounding."""
    one = Simulation(config(limits=[{"name": "daily", "quota": 2, "period": "day"}]))
    rng = random.Random(3)
    for _ in range(10_000):
        now_us = rng.randrange(10**15, 4 * 10**15)
        one._set_wall(now_us)
        assert math.ceil(one.wall * 1_000_000) == now_us


def test_clients_of_an_organisation_share_its_limit_and_a_shard(tmp_path: Path) -> None:
    traffic = Traffic()
    for index in range(9):
        traffic.request(f"client-{index % 3}", "BASIC").credential = OfAnOrganisation()
    issuer = {"issuer": "https://issuer.example", "audiences": ["api"], "organisation_claim": "org"}
    candidate = config(
        limits=[{"name": "teams", "key": "organisation", "rate": 1, "capacity": 4}],
        identity={"sources": ["jwt", "header", "address"], "jwt": {"issuers": {"one": issuer}}},
    )
    log = log_of(tmp_path, traffic.lines())
    found = replay_logs([log], candidate, None)
    assert found.tally.newly_limited_by == {"teams": 5}
    clients = read_part(log_parts([log])[0], 0, tmp_path, SharedBuckets([candidate])).clients
    shard_of, _ = shards(clients.counts, clients.links, 3)
    assert len({shard_of[f"c:client-{index}"] for index in range(3)}) == 1


def test_requests_that_the_candidate_refuses_otherwise_are_not_limited(tmp_path: Path) -> None:
    traffic = Traffic()
    traffic.request("acme", path="/api/elsewhere")
    found = reported(replay_logs([log_of(tmp_path, traffic.lines())], config(), None), config())
    assert (found["totals"]["refused_otherwise"], found["totals"]["limited"]) == (1, 0)
    assert found["agreement"]["candidate"]["same_decision"] == 0
    for _ in range(11):
        traffic.request("acme", path="/api/elsewhere")
    found = reported(replay_logs([log_of(tmp_path, traffic.lines())], config(), None), config())
    assert (found["totals"]["limited_in_log"], found["agreement"]["candidate"]["same_decision"]) == (2, 2)


# Snapshots


QUOTAS = {"limits": [{"name": "monthly", "quota": 40, "period": "month"}]}


def test_clients_are_held_once_however_many_parts_a_log_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic()
    for index in range(60):
        traffic.request(f"client-{index % 3}")
    monkeypatch.setattr(log_replay, "log_parts", partial(log_parts, size=4_000))
    found = replay_logs([log_of(tmp_path, traffic.lines())], config(), None)
    assert found.tally.decisions == sum(part.lines for part in found.parts) == 60
    assert [part for part in found.parts if part.lines][1:]
    assert not any(part.clients.counts or part.clients.links for part in found.parts)
    broken = log_of(tmp_path, [*traffic.lines(), "no line\n", *traffic.lines()[:20], '{"cut'])
    log = reported(replay_logs([broken], config(), None), config())["log"]
    assert log["messages"][0] == f"{broken}, line 61: is not JSON"
    assert (log["lines"], log["foreign_lines"], log["incomplete_lines"]) == (82, 1, 1)


def test_a_line_that_is_cut_off_is_recognised_after_any_number_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "BLOCK_BYTES", 700)
    traffic = Traffic()
    for _ in range(20):
        traffic.request("acme")
    found = replay_logs([log_of(tmp_path, [*traffic.lines(), '{"cut'])], config(), None)
    assert [(part.lines, part.foreign, part.incomplete) for part in found.parts] == [(21, 0, 1)]


def test_a_log_in_two_parts_is_replayed_from_the_state_at_the_end_of_the_first(tmp_path: Path) -> None:
    """Decisions until the snapshot are passed over, so the whole log gives the same as its second part."""
    traffic, rng = Traffic(), random.Random(5)
    for _ in range(400):
        number = rng.randrange(9)
        traffic.request(f"client-{number}", "BASIC" if number % 2 else "FREE", after=rng.random() * 0.1)
    first, exchanges = Traffic(), traffic.exchanges
    first.exchanges = exchanges[:200]
    both = config(**QUOTAS)
    whole = replay_logs([log_of(tmp_path, traffic.lines())], both, None)
    replay_logs([log_of(tmp_path, first.lines(), "1.log")], both, None, jobs=2).state.write(tmp_path / "state.json")
    state = read_snapshot(tmp_path / "state.json")
    assert (len(state.counters), len(state.buckets)) == (9, 1)
    found = replay_logs([tmp_path / "access.log"], both, both, snapshot=state)
    document = reported(found, both, both)
    assert (document["totals"]["decisions"], document["totals"]["before_snapshot"]) == (200, 200)
    assert document["not_evaluable"] == []
    assert "200 decisions before the snapshot" in text_of(document, 5)
    before = replay_logs([tmp_path / "1.log"], both, None)
    assert found.tally.limited == found.tally.limited_by_current == whole.tally.limited - before.tally.limited > 0
    assert any("monthly" in (one.limits or ()) for one in found.tally.clients.values())
    assert found.state.counters == whole.state.counters
    assert found.state.buckets == whole.state.buckets


def test_buckets_of_a_snapshot_keep_their_filled_fraction_under_the_candidate(tmp_path: Path) -> None:
    traffic = Traffic()
    for _ in range(8):
        traffic.request("acme")  # 8 of 10 are used
    replay_logs([log_of(tmp_path, traffic.lines())], config(), None).state.write(tmp_path / "state.json")
    later = Traffic(start_ns=SECOND + 1)
    for _ in range(40):
        later.request("acme")
    wide = config(tiers={"FREE": {"rate": 1, "capacity": 100}})
    state = read_snapshot(tmp_path / "state.json")
    found = replay_logs([log_of(tmp_path, later.lines())], wide, config(), snapshot=state)
    assert found.tally.limited_by_current == 40 - 2
    assert found.tally.limited == 40 - 20


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "is not JSON; a snapshot is what GET /limits/snapshot returns"),
        ("[]", "is no snapshot of limits: TypeError"),
        ("{}", "is no snapshot of limits: KeyError: 'format'"),
        ('{"format": 2}', "format: expected 1, got 2"),
        (
            '{"format": 1, "at_ns": "x", "buckets": {}, "counters": []}',
            "expected nanoseconds since the epoch, got 'x'",
        ),
        (
            '{"format": 1, "at_ns": 1, "buckets": {"a": {"b": -1}}, "counters": []}',
            "nanoseconds since the epoch, got -1",
        ),
        ('{"format": 1, "at_ns": 1, "buckets": [], "counters": []}', "is no snapshot"),
        ('{"format": 1, "at_ns": 1, "buckets": {}, "counters": [["k"]]}', "is no snapshot"),
        ('{"format": 1, "at_ns": 1, "buckets": {}, "counters": [["k", "year"' + ", 1" * 16 + "]]}", "unit 'year'"),
        (
            '{"format": 1, "at_ns": 1, "buckets": {}, "counters": [["k", "day", 1' + "0" * 25 + ", 1" * 15 + "]]}",
            "a number is too large",
        ),
    ],
)
def test_a_snapshot_that_cannot_be_used_is_named_with_the_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, cause: str
) -> None:
    path = tmp_path / "snapshot.json"
    path.write_text(text)
    with pytest.raises(ReplayError, match=cause):
        read_snapshot(path)
    candidate = tmp_path / "new.yaml"
    candidate.write_text('upstreams: {up: {targets: [{url: "http://127.0.0.1:1"}]}}\n')
    log = log_of(tmp_path, [])
    assert main(["replay", str(log), "--config", str(candidate), "--from", str(path)]) == 3
    assert str(path) in capsys.readouterr().err
    assert main(["replay", str(log), "--config", str(candidate), "--save", str(tmp_path / "no" / "x")]) == 3
    assert "x: cannot be written" in capsys.readouterr().err


# Clients divided among processes


def test_the_figures_of_all_shards_together_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_replay, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    traffic, rng = Traffic(), random.Random(6)
    of_team = Quota.per_second("team", 0.001, 2)
    for index in range(600):
        number = rng.randrange(30)
        route = rng.choice(["up", "beta", "up"])
        exchange = traffic.request(f"client-{number}", "BASIC" if number % 3 else "FREE", after=0.02, route=route)
        assert exchange.client is not None
        exchange.client_address = f"192.0.2.{number}"
        if number % 5 == 0:
            exchange.client = replace(exchange.client, source="default")
        if number in (3, 4, 5) and index > 200:
            exchange.charges = [*exchange.charges, Charge("limit:team:a", of_team, of_team.cost_ns(1))]
            exchange.decision = Decision("limit:team:a", of_team, False, 0, 7, 7, traffic.now_ns)
        if index % 4 == 0:
            traffic.check(f"192.0.2.{100 + number}")
    team = {"name": "team", "key": ["client", "header:x-team"], "rate": 0.001, "capacity": 2, "cost": 1}
    current = config(routes=[BETA, PLAIN], limits=[team, *QUOTAS["limits"]])
    candidate = config(
        routes=[BETA | {"cost": 2}, PLAIN],
        limits=[team, *QUOTAS["limits"]],
        address_limit={"rate": 0.1, "capacity": 2, "exempt": []},
        tiers={"BASIC": {"rate": 1, "capacity": 5}},
    )
    first = Traffic()
    first.exchanges = traffic.exchanges[:200]
    snapshot = replay_logs([log_of(tmp_path, first.lines(), "1.log")], current, None, jobs=1).state
    log = log_of(tmp_path, traffic.lines())
    clients = read_part(log_parts([log])[0], 0, tmp_path, SharedBuckets([candidate, current])).clients
    shard_of, _ = shards(clients.counts, clients.links, 3)
    assert {shard for key, shard in shard_of.items() if key.startswith("c:")} == {0, 1, 2}
    documents, states = [], []
    for jobs, before in ((1, current), (3, current), (1, None), (3, None)):
        found = replay_logs([log], candidate, before, jobs=jobs, snapshot=snapshot)
        assert found.processes == jobs
        document = reported(found, candidate, before)
        documents.append({name: document[name] for name in document if name not in ("seconds", "processes")})
        states.append(found.state)
    assert documents[0] == documents[1]
    assert documents[2] == documents[3]
    assert states[0] == states[1]
    assert states[2] == states[3]
    for name in ("before_snapshot", "newly_limited", "not_evaluable", "credential_checks_refused"):
        assert documents[2]["totals"][name], name
    notes = "; ".join(documents[2]["not_evaluable"])
    assert "requests that may have had this route" in notes
    assert "requests that it refused in the log" in notes
    assert documents[2]["agreement"]["candidate"]["first_difference"] is not None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40), st.integers(1, 4))
def test_no_bucket_is_in_two_shards(pairs: list[tuple[int, int]], number: int) -> None:
    links = [(f"c:{client}", f"a:{address}") for client, address in pairs]
    counts = {key: 1 + index for index, key in enumerate(sorted({key for link in links for key in link} | {"c:x"}))}
    shard_of, largest = shards(counts, links, number)
    assert shard_of.keys() == counts.keys()
    assert all(shard_of[client] == shard_of[address] for client, address in links)
    loads = [sum(count for key, count in counts.items() if shard_of[key] == shard) for shard in range(number)]
    assert max(loads) == largest
    assert sum(loads) == sum(counts.values())


# Conditions

FIGURES = {
    "client": "acme",
    "tier": "PREMIUM",
    "requests": 10,
    "limited": 4,
    "limited_before": 1,
    "newly_limited": 3,
    "newly_allowed": 0,
    "not_evaluable": 0,
    "longest_wait_seconds": 2.5,
    "limited_seconds": 7.0,
}


@each(
    ("text", "holds"),
    [
        ('tier == "PREMIUM" and newly_limited > 0', True),
        ("tier == 'FREE' and newly_limited > 0", False),
        ("newly_limited / requests >= 0.3", True),
        ("not (limited > limited_before + newly_limited)", True),
        ("0 < newly_limited <= 2 or longest_wait_seconds > 2", True),
        ('client != "acme"', False),
        ("-newly_limited * 2 < -5 - newly_allowed", True),
        ("0 < newly_limited <= 2", False),
        ("newly_limited <= 3 and limited >= 4", True),
        ("requests < 10 or limited > 4", False),
    ],
)
def test_a_condition_is_evaluated(text: str, holds: object) -> None:
    assert ClientCondition(text).holds(FIGURES) is holds


@each(
    ("text", "cause"),
    [
        (
            "newly_limitd > 0",
            "column 1 of 'newly_limitd > 0': unknown name .* did you mean newly_limited?",
        ),
        ("requests > 0 and zzz", "column 18 .*unknown name 'zzz'; known are client, tier"),
        ("tier == PREMIUM", "column 9 .*unknown name 'PREMIUM'; known are .*; text needs quotes"),
        ("tier > 0", "column 8 .*text is compared with a number"),
        ("newly_limited", "column 1 .*a condition is needed, such as newly_limited > 0, got a number"),
        ("requests and limited > 1", "column 1 .*a condition is needed, got a number"),
        ("requests > ", "column 11 .*invalid syntax"),
        ("", "column 1 .*invalid syntax"),
        ("__import__('os').system('x')", "column 1 .*Call is not allowed"),
        ("tier.upper() == 'X'", "Call is not allowed"),
        ("(lambda: 1)() == 1", "Call is not allowed"),
        ("tier in ('A', 'B')", "Tuple is not allowed"),
        ("tier is 'A'", "Is is not allowed"),
        ("2 ** 999999999 > 1", "BinOp is not allowed"),
        ("tier + 'x' == 'Ax'", "a number is needed, got text"),
        ("True", "Constant is not allowed"),
        ("requests > 1\x00", "--fail-if: "),
        ("requests > 1or limited > 1", "column 12 .*invalid decimal literal"),
        ('client == "\\d"', "invalid escape sequence"),
        ("(" * 400 + "1" + ")" * 400, "--fail-if"),
        ("1 < " * MAX_LENGTH + "2", f"at most {MAX_LENGTH} characters"),
    ],
)
def test_a_mistake_in_a_condition_names_its_place(text: str, cause: str) -> None:
    with pytest.raises(ReplayError, match=cause):
        ClientCondition(text)


@each(
    ("text", "cause"),
    [
        ("requests / newly_allowed > 1", "division by zero"),
        (f"longest_wait_seconds * {'9' * 400} > 1", "a number is too large"),
        (f"{'9' * 400} / requests > 1", "a number is too large"),
    ],
)
def test_what_cannot_be_computed_names_the_client(text: str, cause: str) -> None:
    with pytest.raises(ReplayError, match=f"{cause} for client 'acme'"):
        ClientCondition(text).holds(FIGURES)


# The page and the command


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script(tmp_path: Path) -> None:
    """Its policy permits its own style only; ids of clients are text."""
    traffic = Traffic()
    for _ in range(20):
        traffic.request('<script>alert("x")</script>', "BASIC")
    candidate = config(tiers={"BASIC": {"rate": 1, "capacity": 10}})
    current = config()
    page = page_of(reported(replay_logs([log_of(tmp_path, traffic.lines())], candidate, current), candidate, current))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert html.unescape(policy).startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert page.count("<svg") == 3
    assert page.count("<polyline") == 3
    assert not re.search(r"<script|style=|href=|src=| on\w+=|url\(", page)
    assert "&lt;script&gt;" in page


def test_the_command_fails_with_the_place_of_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = Traffic()
    for _ in range(20):
        traffic.request("acme\x1b[31m", "BASIC")
    log = str(log_of(tmp_path, traffic.lines()))
    candidate = tmp_path / "new.yaml"
    candidate.write_text(
        'upstreams: {up: {targets: [{url: "http://127.0.0.1:1"}]}}\ntiers: {BASIC: {rate: 1, capacity: 10}}\n'
    )
    options = ["--config", str(candidate)]
    assert main(["replay", log, *options, "--fail-if", 'tier == "BASIC" and newly_limited > 5']) == 1
    told = capsys.readouterr()
    assert "is true of 1 client: 'acme\\x1b[31m'" in told.err
    assert "\x1b" not in told.out
    assert main(["replay", log, *options, "--fail-if", "newly_limited > 100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fail_if"] == {"condition": "newly_limited > 100", "clients": []}
    empty, cut = tmp_path / "empty.log", tmp_path / "cut.gz"
    empty.write_text("02:17:03.808  200  GET  /api/orders\n")
    cut.write_bytes(gzip.compress(Path(log).read_bytes())[:-20])
    none = tmp_path / "none.log"
    none.touch()
    causes = ((empty, "no decision in 1 line,"), (none, "no decision in 0 lines"), (cut, f"{cut} cannot be read to"))
    for unusable, cause in causes:
        assert main(["replay", str(unusable), *options]) == 0
        told = capsys.readouterr()
        assert told.out.startswith(f"{unusable}: ")
        assert " from None" not in told.out
        assert main(["replay", str(unusable), *options, "--fail-if", "newly_limited > 0"]) == 3
        assert f"--fail-if: {cause}" in capsys.readouterr().err
    assert main(["replay", log, *options, "--fail-if", "newly > 1"]) == 3
    assert "--fail-if: column 1" in capsys.readouterr().err
    assert main(["replay", log, "--config", str(tmp_path / "none.yaml")]) == 3
    assert "none.yaml" in capsys.readouterr().err
    assert main(["replay", log, *options, "--html", str(tmp_path / "no" / "page.html")]) == 3
    assert "page.html: cannot be written" in capsys.readouterr().err


def test_the_command_never_fails_as_if_the_condition_were_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 is that of a condition, also if a folder cannot be written."""
    traffic = Traffic()
    traffic.request("acme")
    log, candidate = str(log_of(tmp_path, traffic.lines())), tmp_path / "new.yaml"
    candidate.write_text('upstreams: {up: {targets: [{url: "http://127.0.0.1:1"}]}}\n')
    command = ["replay", log, "--config", str(candidate)]
    assert main([*command, "--temporary", str(tmp_path / "none")]) == 3
    assert re.fullmatch(r".*none.*: no such file or directory\n", capsys.readouterr().err)
    for value in ("0", "-1", "x", "9" * 5000):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--jobs", value])
        assert "argument --jobs: expected a whole number from 1, got" in capsys.readouterr().err


def test_a_log_that_is_given_twice_is_reported(tmp_path: Path) -> None:
    traffic = Traffic()
    for _ in range(5):
        traffic.request("acme")
    log = log_of(tmp_path, traffic.lines())
    found = reported(replay_logs([log, log], config(), None), config())["log"]
    assert found["missing_decisions"] == 0
    assert found["messages"] == ["5 or more decisions occur twice: the logs overlap, and the result is wrong"]
