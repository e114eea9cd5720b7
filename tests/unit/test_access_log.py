"""One JSON line for each exchange, whatever ids clients send."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.clients.api_keys import without_keys
from api_gateway.models import Charge, Client, Decision, Exchange, HeaderList, Quota, Settlement
from api_gateway.observability.access_log import AccessLog
from api_gateway.observability.decision_numbers import DecisionNumbers
from api_gateway.printable_text import OTHER_METHOD, REGISTERED_METHODS, shown_method
from api_gateway.settings.admin import MIN_TOKEN_LENGTH
from tests.cases import each

FREE = Quota.per_second("FREE", 1, 10)


def logged(*exchanges: Exchange) -> list[dict[str, Any]]:
    """Return what is written of these, one object a line."""
    log = AccessLog()
    text = "".join(log.line(exchange, 1_700_000_000.25) for exchange in exchanges)
    assert text.isascii()
    lines = text.split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def bare(client: str = "acme", path: str = "/api/x") -> Exchange:
    return Exchange("id-1", "GET", path, "192.0.2.7", 100.0, Client(client, f"client:{client}", FREE, "default"))


class OfAnOrganisation:
    """A credential of a client of an organisation."""

    organisation: str | None = 'a "quoted" one'
    fields: HeaderList = []  # noqa: RUF012 - empty


def test_a_line_has_the_organisation_that_a_credential_states() -> None:
    exchange, credential = bare(), OfAnOrganisation()
    exchange.credential = credential
    (line,) = logged(exchange)
    assert line["organisation"] == OfAnOrganisation.organisation
    credential.organisation = None
    assert "organisation" not in logged(exchange)[0]


def test_a_line_has_every_field_of_a_proxied_request() -> None:
    exchange = Exchange(
        id="id-1",
        method="POST",
        path="/api/users/7",
        client_address="192.0.2.7",
        started=100.0,
        client=Client("acme", "client:acme", FREE, "configured"),
        route="users",
        upstream="people",
        target="http://127.0.0.1:9001",
        cost=2.0,
        decision=Decision("client:acme", FREE, allowed=True, remaining=8, wait_ns=0, reset_ns=2),
        attempts=2,
        sent_at=100.01,
        head_at=100.0145,
        status=201,
        source="upstream",
        bytes_in=12,
        bytes_out=345,
        finished=100.0201234,
    )
    (line,) = logged(exchange)
    expected = {
        "time": "2023-11-14T22:13:20.250+00:00",
        "request_id": "id-1",
        "client_address": "192.0.2.7",
        "client_id": "acme",
        "tier": "FREE",
        "method": "POST",
        "path": "/api/users/7",
        "status": 201,
        "reason": None,
        "source": "upstream",
        "route": "users",
        "upstream": "people",
        "target": "http://127.0.0.1:9001",
        "attempts": 2,
        "cost": 2.0,
        "remaining": 8,
        "bytes_received": 12,
        "bytes_sent": 345,
        "duration_ms": 20.123,
        "upstream_duration_ms": 4.5,
        "tier_source": "configured",
        "decision": {
            "at_ns": 0,
            "number": 0,
            "process": "0",
            "source": "memory",
            "limits": [],
            "limit": "FREE",
            "wait_ns": 0,
            "cost": 2.0,
        },
    }
    assert {key: line.get(key, "missing") for key in expected} == expected


def test_a_line_of_a_request_that_was_refused_at_once_has_empty_places() -> None:
    exchange = Exchange("id-1", "GET", "/api/x", "192.0.2.7", 100.0, status=404, reason="no_route", finished=100.5)
    exchange.detail = "No route matches /api/x."
    (line,) = logged(exchange)
    assert (line["status"], line["reason"], line["source"], line["duration_ms"]) == (404, "no_route", "gateway", 500)
    assert "No route matches /api/x." in line.values()
    for key in ("client_id", "tier", "route", "upstream", "target", "remaining", "upstream_duration_ms"):
        assert line[key] is None


def test_the_page_has_every_field_of_a_line() -> None:
    exchange = bare()
    before = Decision("client:acme", FREE, allowed=True, remaining=8, wait_ns=0, reset_ns=2)
    exchange.decision = before
    exchange.settlements = (Settlement(1, 2, before, 1.0, 3.0),)
    exchange.credential_check = (1, before)
    exchange.credential = OfAnOrganisation()
    exchange.client = Client("acme", "client:acme", FREE, "default", has_keys=True)
    (line,) = logged(exchange)
    page = (Path(__file__).parents[2] / "docs" / "access-log.md").read_text()
    fields = [*line, *line["decision"], *line["decision"]["settlements"][0], *line["credential_check"]]
    assert not [field for field in fields if f"`{field}`" not in page]


def test_an_exchange_is_one_line() -> None:
    assert [line["client_id"] for line in logged(bare("a"), bare("b"), bare("c"))] == ["a", "b", "c"]


@given(st.text(), st.text())
@example('"},{"status":200', "/api/\r\n{}")
@example("\u2028\u2029\x85\x0b\x0c\x1c\x00\x1b[31m", "/api/\ud800é😀")
def test_odd_names_and_paths_are_data_and_never_lines(client: str, path: str) -> None:
    lines = logged(bare(client, path))
    assert [(line["client_id"], line["path"], line["request_id"]) for line in lines] == [(client, path, "id-1")]


KEY = "agw_" + "0" * 43 + "123456"


@each("place", ["id", "client_address", "method", "path", "detail", "route", "target", "fallback", "client"])
def test_a_line_has_no_key_wherever_a_client_or_an_operator_has_put_one(place: str) -> None:
    exchange = bare()
    if place == "client":
        exchange.client = Client(f"x {KEY}", "k", FREE, "default")
    else:
        setattr(exchange, place, f"x {KEY}")
    line = AccessLog(without_keys).line(exchange, 0.0)
    assert KEY not in line
    assert ('"_OTHER"' if place == "method" else '"x agw_..."') in line
    assert json.loads(line)["status"] == 0


@each(
    ("method", "shown"),
    [
        *((name, name) for name in ("GET", "get", "VERSION-CONTROL", "propfind", "PURGE", "BAN", "x")),
        *((name, OTHER_METHOD) for name in ("", "SUBSCRIBE", "a1b2", "hunter2", "\x1b[31m", "GET\n", KEY)),
    ],
)
def test_a_method_is_shown_if_it_is_registered_or_shorter_than_any_credential(method: str, shown: str) -> None:
    assert shown_method(method) == shown
    assert shown_method("A" * (MIN_TOKEN_LENGTH - 1)) != OTHER_METHOD == shown_method("A" * MIN_TOKEN_LENGTH)
    assert {"QUERY", "UPDATEREDIRECTREF"} <= REGISTERED_METHODS


TEXT = st.text(max_size=12)
NAME = st.none() | TEXT
TIME = st.floats(0, 1e9)  # above, a double has no three decimals of milliseconds
QUOTA = st.builds(Quota.per_second, TEXT, st.just(1.0), st.just(10))
CLIENT = st.builds(
    Client, id=TEXT, key=TEXT, quota=QUOTA, source=st.sampled_from(["default", "granted"]), has_keys=st.booleans()
)
COUNT = st.integers(0, 10**15)
DECISION = st.builds(
    Decision,
    st.just("k"),
    QUOTA,
    st.booleans(),
    remaining=COUNT,
    wait_ns=st.integers(-1, 10**18),
    reset_ns=st.just(0),
    at_ns=COUNT,
    source=st.sampled_from(["memory", "store", "deny_cache"]),
)
COST = st.floats(0, 1e9)
SETTLEMENT = st.builds(Settlement, COUNT, COUNT, DECISION, COST, COST)
CHARGE = st.builds(Charge, TEXT, QUOTA, COUNT)
EXCHANGES = st.builds(
    Exchange,
    id=TEXT,
    method=TEXT,
    path=TEXT,
    client_address=TEXT,
    started=TIME,
    client=st.none() | CLIENT,
    route=NAME,
    upstream=NAME,
    target=NAME,
    cost=st.floats(0, 1e9) | st.integers(0, 10**9).map(float),
    decision=st.none() | DECISION,
    attempts=COUNT,
    sent_at=st.none() | TIME,
    head_at=st.none() | TIME,
    status=st.integers(0, 599),
    source=st.sampled_from(["gateway", "upstream"]),
    reason=NAME,
    detail=NAME,
    bytes_in=COUNT,
    bytes_out=COUNT,
    finished=TIME,
    retried=st.lists(TEXT, max_size=3).map(tuple),
    fallback=NAME,
    number=COUNT,
    charges=st.lists(CHARGE, max_size=3),
    settlements=st.lists(SETTLEMENT, max_size=2).map(tuple),
    credential_check=st.none() | st.tuples(COUNT, DECISION),
)


def documented_decision(exchange: Exchange, decision: Decision) -> dict[str, Any]:
    """Return the member about the decision; times are taken to be since the epoch."""
    changes = exchange.settlements
    first = changes[0].decision if changes else decision
    members: dict[str, Any] = {
        "at_ns": first.at_ns,
        "number": exchange.number,
        "process": "0",
        "source": first.source,
        "limits": [charge.quota.name for charge in exchange.charges],
        "limit": first.quota.name,
        "wait_ns": first.wait_ns,
        "cost": changes[0].charged if changes else exchange.cost,
    }
    if changes:
        members["remaining"] = first.remaining
        members["settlements"] = [
            {"at_ns": change.at_ns, "number": change.number, "cost": change.cost} for change in changes
        ]
    return members


def documented(exchange: Exchange, now: float) -> str:
    """Return the line of an exchange by the general encoder."""
    client, decision, waited = exchange.client, exchange.decision, exchange.upstream_duration
    members = {
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        "request_id": exchange.id,
        "client_address": exchange.client_address,
        "client_id": client.id if client else None,
        "tier": client.quota.name if client else None,
        "tier_source": client.source if client else None,
        **({"has_keys": True} if client and client.has_keys else {}),
        "method": shown_method(exchange.method),
        "path": exchange.path,
        "status": exchange.status,
        "reason": exchange.reason,
        "detail": exchange.detail,
        "source": exchange.source,
        "route": exchange.route,
        "upstream": exchange.upstream,
        "target": exchange.target,
        "attempts": exchange.attempts,
        "retry_reasons": exchange.retried,
        "fallback": exchange.fallback,
        "cost": exchange.cost,
        "remaining": decision.remaining if decision else None,
        "bytes_received": exchange.bytes_in,
        "bytes_sent": exchange.bytes_out,
        "duration_ms": round(exchange.duration * 1000, 3),
        "upstream_duration_ms": None if waited is None else round(waited * 1000, 3),
        "decision": documented_decision(exchange, decision) if decision else None,
    }
    check = exchange.credential_check
    if check is not None:
        members["credential_check"] = {
            "at_ns": check[1].at_ns,
            "number": check[0],
            "process": "0",
            "source": check[1].source,
        }
    return json.dumps(members, separators=(",", ":")) + "\n"


@given(
    st.floats(0, 4e9),
    st.lists(st.floats(-0.003, 0.003) | st.sampled_from([0.0, 1e-7, 4e-7, 0.0005, 0.001, 1.0, -1.0])),
)
@example(1_700_000_000.000999, [1e-7] * 30)
@example(1_700_000_000.999, [1e-7] * 30)
@example(1_700_000_000.0019985, [1e-7] * 30)
def test_the_time_of_each_line_is_its_own_whatever_the_clock_does(first: float, steps: list[float]) -> None:
    """The log renders a time once for each millisecond."""
    now, log = first, AccessLog()
    for step in (0.0, *steps):
        now = max(0.0, now + step)
        assert log.line(bare(), now) == documented(bare(), now)


def test_times_of_decisions_are_since_the_epoch_whatever_the_wall_clock_does() -> None:
    """The store's are so already; others are converted by one difference, which keeps their order."""
    wall, monotonic, written = 1_700_000_000.5, 7_000, list[str]()
    numbers = DecisionNumbers("0", lambda: monotonic, lambda: wall)
    log = AccessLog(numbers=numbers)
    exchange = bare()
    for source, at_ns in (("memory", 8_000), ("store", 8_000), ("memory", 9_000)):
        wall -= 100
        exchange.decision = Decision("k", FREE, True, 1, 0, 0, at_ns, source=source)  # type: ignore[arg-type]
        exchange.number = numbers.next()
        written.append(log.line(exchange, wall))
    decisions = [json.loads(line)["decision"] for line in written]
    assert [one["at_ns"] for one in decisions] == [1_700_000_000_500_001_000, 8_000, 1_700_000_000_500_002_000]
    assert [one["number"] for one in decisions] == [1, 2, 3]


@given(EXCHANGES, st.floats(0, 4e9))
@example(bare(), 0.9999999)
@example(bare(), 1_700_000_000.0009999)
@example(bare('"\\', "/api/\x7f\ud800"), 1_700_000_000.9999999)
def test_a_line_is_that_of_the_general_encoder(exchange: Exchange, now: float) -> None:
    assert AccessLog().line(exchange, now) == documented(exchange, now)
