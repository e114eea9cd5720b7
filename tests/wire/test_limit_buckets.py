"""Operators see, reset, top up and carry over one key of any limit, with buckets in memory and in a store."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from api_gateway.process.view_commands import run_view
from tests.kit import (
    Answer,
    FakeClocks,
    RawClient,
    RawUpstream,
    RunningGateway,
    ask,
    eventually,
    in_front_of,
    refusing_url,
    reply,
    running_gateway,
)
from tests.store_kit import SERVERS, StoreServer

HEADERS = {"Authorization": "Bearer operator"}
SLOW = {"rate": 0.001, "capacity": 5}
LIMITS = [
    {"name": "team", "key": "header:x-team", **SLOW},
    {"name": "llm", "key": "header:x-org", "quota": 10, "period": "month", "carry_over": 5},
    {"name": "routeq", "key": ["client", "route"], "quota": 4, "period": "day", "routes": ["small"]},
    {"name": "paid", "key": ["route", "header:x-plan"], "tiers": {"FREE": SLOW, "BASIC": {"rate": 1, "capacity": 50}}},
    {"name": "better", "key": ["client", "header:x-plan"], "tiers": ["BASIC"], **SLOW},
    {"name": "by-address", "key": "address", "quota": 1000, "period": "hour"},
    {"name": "two", "key": "header:x-held", "concurrent": 2},
]


class Subject:
    """A gateway with all kinds of limits, which it keeps for the tests of this module: each has keys of its own."""

    def __init__(self, running: RunningGateway, up: RawUpstream) -> None:
        self.running, self.up = running, up

    def statuses(self, count: int, path: str = "/api/x", **fields: str) -> list[int]:
        """Send requests with these header fields; return their statuses."""
        headers = {name.replace("_", "-"): value for name, value in fields.items()}
        return [ask(f"{self.running.url}{path}", headers=headers).status for _ in range(count)]

    def get(self, path: str) -> Answer:
        """Ask an operator endpoint."""
        return ask(f"{self.running.url}{path}", headers=HEADERS)

    def post(self, path: str, /, **body: Any) -> Answer:
        """Call an operator endpoint."""
        fields = HEADERS | {"Content-Type": "application/json"}
        return ask(f"{self.running.url}{path}", method="POST", headers=fields, body=json.dumps(body).encode())


@pytest.fixture(scope="module", params=["memory", "store"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with ExitStack() as stack:
        up = RawUpstream(reply())
        stack.callback(up.close)
        sections = in_front_of(up.url) | {"limits": LIMITS}
        sections["routes"] += [{"name": "small", "path": "/api/small", "upstream": "up"}]
        sections["tiers"] |= {"BASIC": {"rate": 1000, "capacity": 100_000}}
        sections["address_limit"] = {"rate": 0.01, "capacity": 5000, "exempt": []}
        sections["admin"] = {
            "local": False,
            "tokens": {
                "ops": {"role": "operate", "token": "operator"},
                "viewer": {"role": "read", "token": "viewer-x"},
            },
        }
        if request.param == "store":
            sections["store"] = {
                "url": stack.enter_context(StoreServer(SERVERS["valkey"] or "")).url,
                "decision_timeout": 5,
            }
        yield Subject(stack.enter_context(running_gateway(sections, tmp_path_factory.mktemp("state"))), up)


def test_a_bucket_by_a_header_field_is_shown_and_reset(subject: Subject) -> None:
    assert subject.statuses(6, X_Team="blue") == [200] * 5 + [429]
    shown = subject.get("/limits/team/buckets?key=blue").json()
    assert (shown["limit"], shown["key"], shown["tier"]) == ("team", ["blue"], None)
    assert 0 <= shown["bucket"]["tokens"] < 1
    assert (shown["bucket"]["capacity"], shown["quota"], shown["concurrency"]) == (5, None, None)
    assert subject.get("/limits/team/buckets?key=never-seen").json()["bucket"]["tokens"] == 5
    after = subject.post("/limits/team/buckets/reset", key=["blue"])
    assert (after.status, after.json()["bucket"]["tokens"]) == (200, 5)
    assert subject.statuses(6, X_Team="blue") == [200] * 5 + [429]
    entry = subject.get("/audit").json()["entries"][0]
    assert (entry["action"], entry["subject"], entry["operator"]) == ("buckets_filled", "team: blue", "ops")
    assert (entry["before"]["limit"], entry["before"]["tokens"] < 1, entry["after"]["tokens"]) == ("team", True, 5)


def test_the_tokens_of_an_organisation_are_topped_up_carried_over_and_reset(subject: Subject) -> None:
    """The limit counts by a header field here; an organisation has the same counters."""
    assert subject.statuses(11, X_Org="acme") == [200] * 10 + [429]
    quota = subject.get("/limits/llm/buckets?key=acme").json()["quota"]
    assert (quota["used"], quota["remaining"], quota["period"], quota["route"]) == (10, 0, "month", None)
    added = subject.post("/limits/llm/buckets/top-up", key=["acme"], amount=3)
    assert (added.status, added.json()["quota"]["remaining"], added.json()["quota"]["top_up"]) == (200, 3, 3)
    assert subject.statuses(4, X_Org="acme") == [200] * 3 + [429]
    carried = subject.post("/limits/llm/buckets/carry-over", key=["acme"], amount=2).json()["quota"]
    assert (carried["carried_over"], carried["remaining"]) == (2, 2)
    assert subject.statuses(3, X_Org="acme") == [200] * 2 + [429]
    assert subject.post("/limits/llm/buckets/reset", key=["acme"]).json()["quota"]["used"] == 0
    assert subject.statuses(1, X_Org="acme") == [200]
    assert subject.statuses(1, X_Org="other") == [200]
    entries = subject.get("/audit").json()["entries"][:3]
    assert [(one["action"], one["subject"]) for one in entries] == [("quota_changed", "llm: acme")] * 3


def test_a_quota_by_client_and_route_is_one_of_the_client_and_one_of_the_limit(subject: Subject) -> None:
    assert subject.statuses(5, path="/api/small", X_Client_ID="carl") == [200] * 4 + [429]
    listed = {
        (one["limit"], one["route"]): one["used"] for one in subject.get("/clients/carl/quotas").json()["quotas"]
    }
    assert listed == {("routeq", "small"): 4}
    added = subject.post("/clients/carl/quotas/routeq/top-up?route=small", amount=1)
    assert (added.status, added.json()["remaining"], added.json()["route"]) == (200, 1, "small")
    assert subject.statuses(2, path="/api/small", X_Client_ID="carl") == [200, 429]
    again = subject.post("/limits/routeq/buckets/reset", key=["carl", "small"])
    assert (again.status, again.json()["quota"]["used"], again.json()["tier"]) == (200, 0, "FREE")
    assert subject.statuses(5, path="/api/small", X_Client_ID="carl") == [200] * 4 + [429]
    assert subject.post("/clients/carl/quotas/routeq/carry-over?route=small", amount=1).json()["remaining"] == 1
    assert subject.post("/clients/carl/quotas/routeq/reset?route=small").json()["used"] == 0


def test_tiers_with_allowances_of_their_own_have_buckets_of_their_own(subject: Subject) -> None:
    assert subject.statuses(2, X_Plan="gold") == [200, 200]

    def tokens(tier: str) -> float:
        found = subject.get(f"/limits/paid/buckets?key=all&key=gold&tier={tier}").json()
        assert found["tier"] == tier.upper()
        return float(found["bucket"]["tokens"])

    assert (round(tokens("FREE")), tokens("basic")) == (3, 50)
    subject.post("/limits/paid/buckets/reset", key=["all", "gold"], tier="FREE")
    assert tokens("FREE") == 5


def test_addresses_count_by_the_limit_that_needs_no_entry_too(subject: Subject) -> None:
    subject.statuses(1, X_Client_ID="dora")
    assert subject.get("/limits/address/buckets?key=127.0.0.1").json()["bucket"]["tokens"] < 5000
    assert subject.post("/limits/address/buckets/reset", key=["127.0.0.1"]).json()["bucket"]["tokens"] == 5000
    assert subject.get("/limits/by-address/buckets?key=127.0.0.1").json()["quota"]["used"] > 0
    shown = subject.get("/limits/by-address/buckets?key=2001:db8::1").json()
    assert (shown["key"], shown["quota"]["used"]) == (["2001:db8::/64"], 0)


def test_a_key_with_a_client_says_whether_the_clients_record_was_read(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        raise OSError("no response")

    path = "/limits/routeq/buckets?key=acme&key=small"
    assert subject.get(path).json()["confirmed"] is True
    assert subject.get("/limits/team/buckets?key=blue").json()["confirmed"] is None
    monkeypatch.setattr(subject.running.server._app.state.admin_context.clients._store, "look_up", fail)
    assert subject.get(path).json()["confirmed"] is False


def test_requests_in_flight_are_shown_and_not_reset(subject: Subject) -> None:
    held, plain = threading.Event(), reply()
    assert subject.statuses(1, X_Held="other") == [200], "the gateway has a connection"
    subject.up.behave = lambda wire, request: held.wait(30) and plain(wire, request)
    with RawClient(subject.running.port) as client:
        client.request("GET", "/api/x", ("X-Held: h",))
        eventually(
            lambda: (
                subject.get("/limits/two/buckets?key=h").json()["concurrency"]
                == {"in_flight": 1, "concurrent": 2, "processes": None}
            ),
            "the request is in flight",
        )
        refused = subject.post("/limits/two/buckets/reset", key=["h"])
        assert refused.status == 422
        assert "a concurrency limit, which cannot be reset" in refused.json()["detail"]
        held.set()
        assert client.answer().status == 200
    subject.up.behave = plain


def test_while_the_store_is_unavailable_each_state_is_said_to_be_that_of_a_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Capacity 5 for two gateways: each has 2.5, and of five requests in flight two."""
    up, held = RawUpstream(reply()), threading.Event()
    up.behave = lambda wire, request: held.wait(30) and reply()(wire, request)
    store = {"url": refusing_url().replace("http", "redis"), "min_gateway_processes": 2, "clients": "sqlite"}
    limits = [
        {"name": "own", "key": "client", "rate": 1, "capacity": 20},
        {"name": "five", "key": "client", "concurrent": 5},
        {"name": "monthly", "key": "client", "quota": 100, "period": "month"},
    ]
    tiers = {"FREE": {"rate": 1, "capacity": 5}, "BASIC": {"rate": 2, "capacity": 10}}
    sections = in_front_of(up.url) | {"limits": limits, "tiers": tiers, "address_limit": {"rate": 0}}
    sections["store"] = store | {"decision_timeout": 0.2, "timeout": 0.2}
    sections["admin"] = {"local": False, "token": "operator"}
    with running_gateway(sections, tmp_path, FakeClocks().clocks) as running, ExitStack() as stack:
        subject = Subject(running, up)
        stack.callback(up.close)
        stack.callback(held.set)
        in_flight = [stack.enter_context(RawClient(running.port)) for _ in range(2)]
        for client in in_flight:
            client.request("GET", "/api/x", ("X-Client-ID: acme",))
        eventually(lambda: len(up.requests) == len(in_flight), "the requests are in flight")
        bucket = {"tokens": 0.5, "capacity": 2.5, "processes": 2, "reset_after_seconds": 4}
        wide = {"tokens": 8, "capacity": 10, "processes": 2, "reset_after_seconds": 4}
        slots = {"in_flight": 2, "concurrent": 2, "processes": 2}
        seen = subject.get("/clients/acme").json()
        assert seen["bucket"] == bucket
        assert seen["limits"] == [wide | {"limit": "own", "route": None}]
        assert seen["concurrency"] == [slots | {"limit": "five", "route": None}]
        assert subject.get("/limits/own/buckets?key=acme").json()["bucket"] == wide
        assert subject.get("/limits/five/buckets?key=acme").json()["concurrency"] == slots
        assert subject.get("/limits/monthly/buckets?key=acme").status == 503, "the store alone knows it"
        told = subject.post("/explain", path="/api/x", client_id="acme").json()
        assert [(one["policy"], one["tokens"], one["processes"]) for one in told["buckets"][:2]] == [
            ("free", 0.5, 2),
            ("own", 8, 2),
        ]
        assert [{name: one[name] for name in slots} for one in told["concurrency"]] == [slots]
        assert (told["concurrency"][0]["allowed"], told["result"]["reason"]) == (False, "concurrency_exceeded")
        assert subject.statuses(1, X_Client_ID="acme") == [429]
        command = ["--url", running.url, "--token-file", str(tmp_path / "token")]
        (tmp_path / "token").write_text("operator")
        (tmp_path / "token").chmod(0o600)
        assert run_view(["clients", "acme", *command]) == 0
        out, err = capsys.readouterr()
        assert "the store is unavailable: the figures are those of the share of one of 2 processes" in out
        assert "quotas: " in err
        assert "503" in err
        assert run_view(["limits", "own", "acme", *command]) == 0
        assert "8 of 10 tokens, full in 4 s; the store is unavailable: the figures" in capsys.readouterr().out
        assert subject.post("/clients/acme/reset").status == 503
        changed = subject.post("/clients/acme/tier", tier="BASIC").json()
        assert (changed["tokens_before"], changed["tokens_after"], changed["processes"]) == (0.5, 1, 2)
        entry = subject.get("/audit").json()["entries"][0]
        assert [entry[name]["processes"] for name in ("before", "after")] == [2, 2]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/limits/teem/buckets?key=a", None, "path.name: there is no limit 'teem'; the limits are team, llm, routeq"),
        ("/limits/free/buckets?key=a", None, "That is a tier: its buckets are those of clients, at /clients/{id}."),
        ("/limits/team/buckets", None, "query.key: the limit 'team' counts by header:x-team: give 1 value, got 0."),
        ("/limits/routeq/buckets?key=acme", None, "counts by client, route: give 2 values in this order, got 1."),
        (
            "/limits/routeq/buckets?key=acme&key=nope",
            None,
            "query.key[1]: must be a route of the limit: small; got 'nope'",
        ),
        ("/limits/routeq/buckets?key=a%20b&key=small", None, "query.key[0]: a client id is 1 to 128 visible ASCII"),
        (
            "/limits/routeq/buckets?key=a&key=small&tier=FREE",
            None,
            "query.tier: the client has the tier FREE: remove it",
        ),
        ("/limits/team/buckets?key=", None, "query.key[0]: a value of header:x-team has 1 to 4096 characters, got 0."),
        (
            "/limits/team/buckets?key=a&tier=FREE",
            None,
            "query.tier: all tiers share the buckets of this limit: remove",
        ),
        (
            "/limits/address/buckets?key=localhost",
            None,
            "query.key[0]: must be an IPv4 or IPv6 address, got 'localhost'",
        ),
        ("/limits/paid/buckets?key=all&key=g", None, "an allowance for each of the tiers FREE, BASIC, got nothing."),
        ("/limits/paid/buckets?key=all&key=g&tier=X", None, "each of the tiers FREE, BASIC, got 'X'."),
        ("/limits/better/buckets?key=c&key=g", None, "for each of the tiers BASIC, got 'FREE' of client 'c'."),
        ("/limits/team/buckets/top-up", {"key": ["a"], "amount": 1}, "'team' has a bucket, which reset fills."),
        ("/limits/two/buckets/carry-over", {"key": ["a"], "amount": 1}, "'two' has requests in flight, which end by"),
        ("/limits/llm/buckets/top-up", {"key": ["a"], "amount": 0}, "body.amount"),
        ("/limits/llm/buckets/top-up", {"key": "a", "amount": 1}, "body.key"),
        ("/limits/llm/buckets/reset", {"key": ["a"] * 9}, "body.key"),
        ("/limits/llm/buckets/reset", {"key": []}, "body.key: the limit 'llm' counts by header:x-org"),
        (
            "/clients/a/quotas/routeq/top-up",
            {"amount": 1},
            "query.route: the quota 'routeq' counts by client and route",
        ),
        ("/clients/a/quotas/routeq/top-up?route=x", {"amount": 1}, "set ?route= to one of small, got 'x'."),
        ("/clients/a/quotas/llm/top-up", {"amount": 1}, "Quotas by something else are at /limits/{name}/buckets."),
    ],
)
def test_a_bad_key_is_refused_with_its_place_its_value_and_what_to_do(
    subject: Subject, path: str, body: Any, message: str
) -> None:
    answer = subject.get(path) if body is None else subject.post(path, **body)
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
    assert message in answer.json()["detail"]


def test_to_change_a_bucket_a_token_needs_the_role_operate(subject: Subject) -> None:
    viewer = {"Authorization": "Bearer viewer-x", "Content-Type": "application/json"}
    url = f"{subject.running.url}/limits/team/buckets"
    assert ask(f"{url}?key=red", headers=viewer).status == 200
    assert ask(f"{url}/reset", method="POST", headers=viewer, body=b'{"key":["red"]}').status == 403
    assert ask(f"{url}?key=red").status == 401
