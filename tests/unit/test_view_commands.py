"""What the commands print about a running gateway: complete, in columns, and inert on a terminal."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin.explain_schema import ExplainRequest
from api_gateway.printable_text import MAX_CELL_WIDTH, table
from api_gateway.process import operator_client, top_command, view_commands
from api_gateway.process.operator_client import NOT_AUTHORIZED, NOT_REACHED, CommandFailed, OperatorClient, run_action
from api_gateway.process.top_command import run_top, screen_lines, shares
from api_gateway.process.view_commands import line_of, run_view
from tests.cases import each

EVIL = "a\x1b[31m\n\r\t<b>\u202e\x07"
ROW: dict[str, Any] = {
    "number": 7,
    "time": "2027-01-15T08:00:01.250+00:00",
    "request_id": EVIL,
    "trace_id": "0af7651916cd43dd8448eb211c80319c",
    "result": "error",
    "client_id": EVIL,
    "client_address": "10.0.0.1",
    "tier": "FREE",
    "tier_source": "default",
    "method": "GET",
    "path": f"/api/{EVIL}",
    "status": 502,
    "reason": "upstream_reset",
    "detail": EVIL,
    "source": "gateway",
    "route": "all",
    "upstream": "up",
    "target": "http://10.0.0.9",
    "attempts": 2,
    "fallback": None,
    "cost": 1,
    "duration_ms": 12.5,
    "upstream_duration_ms": None,
    "bytes_received": 0,
    "bytes_sent": 10,
}
SPENDING = {name: ROW[name] for name in ("number", "time", "request_id", "client_id", "method", "path", "status")}
EXPLAINED = ROW | {
    "decision": {"allowed": False, "limit": "free", "source": "memory", "retry_after_seconds": 0.75},
    "limits": [
        {
            "limit": "free",
            "capacity": 3,
            "refill_per_second": 1,
            "cost": 1,
            "allowed": False,
            "tokens_before": 0.25,
            "tokens_after": 0.25,
            "confirmed": False,
            "retry_after_seconds": 0.75,
            "processes": 3,
            "concurrent": None,
            "spent_by": {
                "requests": [SPENDING | {"cost": 3, "tokens_before": 3}],
                "complete": False,
                "missing_tokens": 1.5,
            },
        },
        dict.fromkeys(("capacity", "tokens_before", "tokens_after", "processes", "spent_by", "retry_after_seconds"))
        | {"limit": "parallel", "cost": 1, "allowed": True, "confirmed": True, "concurrent": 4},
    ],
    "upstream_attempts": [
        {
            "upstream": "up",
            "target": "http://10.0.0.9",
            "started_after_ms": 1,
            "duration_ms": 2,
            "status": None,
            "failure": "upstream_reset",
            "detail": EVIL,
        }
    ],
    "settlements": [{"after_ms": 3, "cost_before": 1, "cost_after": 2}],
}


class Gateway:
    """Stands for a client of a gateway: has a response, or an error, for each path."""

    url = "http://gateway"

    def __init__(self, **responses: Any) -> None:
        self.responses = responses
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.bodies: list[Any] = []

    def call(self, method: str, path: str, body: Any) -> Any:
        assert method == "POST"
        self.bodies.append(body)
        return self.get(path)

    def get(self, path: str, **query: Any) -> Any:
        self.asked.append((path, {name: value for name, value in query.items() if value is not None}))
        found = self.responses[path.strip("/").split("/")[0]]
        found = found.pop(0) if isinstance(found, list) else found
        if isinstance(found, CommandFailed):
            raise found
        return found


def run(monkeypatch: pytest.MonkeyPatch, gateway: Gateway, *arguments: str) -> int:
    monkeypatch.setattr(view_commands, "client_of", lambda _: gateway)
    return run_view(arguments)


SHARED = {"tokens": 1.5, "capacity": 2.5, "processes": 2}
UNCONFIRMED = (
    "the client store is unavailable, so it is unknown whether it has a record of this client with another tier"
)
OF_A_SHARE = "the store is unavailable: the figures are those of the share of one of 2 processes"


def is_inert(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ({"bucket": {"tokens": 1.5, "capacity": 5, "reset_after_seconds": 7}}, "1.5 of 5 tokens, full in 7 s"),
        ({"bucket": SHARED | {"reset_after_seconds": 7}}, f"1.5 of 2.5 tokens, full in 7 s; {OF_A_SHARE}"),
        (
            {
                "quota": {
                    "remaining": 1_500_000.5,
                    "used": 500_000,
                    "quota": 2_000_000,
                    "period": "month",
                    "period_end": "2027-02-01",
                    "top_up": 0,
                    "carried_over": 0.5,
                }
            },
            (
                "1500000.5 tokens left, 500000 of 2000000 used in this month, which ends 2027-02-01; top-ups: 0,"
                " carried over: 0.5"
            ),
        ),
        ({"concurrency": {"in_flight": 1, "concurrent": 2}}, "1 of 2 requests in flight"),
        (
            {"concurrency": {"in_flight": 1, "concurrent": 2, "processes": 2}},
            f"1 of 2 requests in flight; {OF_A_SHARE}",
        ),
        (
            {"concurrency": {"in_flight": 1, "concurrent": 2}, "confirmed": False},
            f"1 of 2 requests in flight; {UNCONFIRMED}",
        ),
    ],
)
def test_what_one_key_of_a_limit_has_left_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own: dict[str, Any], shown: str
) -> None:
    found = {"limit": "own", "key": ["a", EVIL], "tier": "FREE", "bucket": None, "quota": None, "concurrency": None}
    gateway = Gateway(limits=found | own)
    assert run(monkeypatch, gateway, "limits", "own", "a", "b/c", "--tier", "FREE") == 0
    assert gateway.asked == [("/limits/own/buckets", {"key": ["a", "b/c"], "tier": "FREE"})]
    out = capsys.readouterr().out
    assert out.startswith("own a, ")
    assert out.rstrip().endswith(f", tier FREE: {shown}")
    assert is_inert(out)


def test_an_explained_request_shows_all_that_is_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = Gateway(explain={"requests": [EXPLAINED], "complete": False})
    assert run(monkeypatch, gateway, "explain", "a/b") == 0
    out = capsys.readouterr().out
    assert gateway.asked == [("/explain/a%2Fb", {})]
    assert is_inert(out)
    for part in (
        "502 upstream_reset  GET /api/a\\x1b[31m\\n",
        "refused, 0.75 s to wait; decided by the limit free, from memory",
        "the tokens of free were spent by 1 request, and 1.5 tokens by requests that were not kept:",
        "upstream_reset: a\\x1b",
        "cost settled from 1 to 2 after 3 ms",
        ", trace 0af7651916cd43dd8448eb211c80319c",
        "A worker did not respond in time",
        "parallel  -              1     -             4 in flight  allowed",
        "the store was unavailable: the figures are those of the share of one of 3 processes",
        "not confirmed by the store, which was unavailable: free\n",
    ):
        assert part in out, part


BUCKET = {"policy": "free", "tokens": 0.5, "cost": 1, "capacity": 1.5, "allowed": False, "retry_after_seconds": 1}
SLOT = {"policy": "parallel", "in_flight": 2, "concurrent": 2, "allowed": False}
PREDICTED: dict[str, Any] = {
    "result": {"decision": "limited", "detail": EVIL},
    "worker": "2",
    "address": {"address": "10.0.0.1", "detail": "the peer of the connection"},
    "client": {"id": "acme", "tier": {"name": "FREE"}, "detail": EVIL},
    "route": {
        "name": "wide",
        "path": "/api/x",
        "match": "exact",
        "host": "a.test",
        "conditions": [f"header x-beta = {EVIL!r}"],
        "upstream": "up",
        "destination": "upstream up",
        "cost": 1,
        "cost_source": "route",
    },
    "routes_passed_over": [{"name": "narrow", "detail": "only for POST"}],
    "buckets": [BUCKET | {"processes": 2}],
    "concurrency": [SLOT],
    "limits_not_applied": [{"name": "tenant", "detail": "the request has no header:X-Tenant"}],
    "candidate": BUCKET | {"policy": "wider", "processes": None},
    "candidate_concurrency": [SLOT | {"policy": "more", "in_flight": 1, "allowed": True}],
    "upstream": {
        "name": "up",
        "circuit_breaker": "OPEN",
        "workers": {"1": "CLOSED", "2": "OPEN"},
        "next_probe_in_seconds": 1.5,
        "targets": 2,
        "healthy_targets": 1,
        "unchecked_targets": 0,
        "concurrency": {"in_flight": 3, "tier_limit": 4},
    },
    "fallback": {"name": "static", "used": True},
    "event_loop": {"shed_ratio": 0.25},
    "extensions": [{"extension": EVIL, "hook": "cost", "result": "2.0"}],
}


def test_a_described_request_has_all_options_and_its_explanation_is_shown_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = Gateway(explain=PREDICTED)
    options = ["--client", "c", "--host", "a.example", "--address", "10.0.0.9", "--key-id", "k"]
    options += ["--forwarded", "192.0.2.1", "--organisation", "o"]
    options += ["--header", "X-Tenant: a:b", "--header", "X-Other:1", "--claim", "plan=a=b", "--certificate", "dns=x"]
    assert run(monkeypatch, gateway, "explain", "--path", "/api/x", *options) == 0
    described = {
        "method": "GET",
        "path": "/api/x",
        "client_id": "c",
        "host": "a.example",
        "address": "10.0.0.9",
        "key_id": "k",
        "forwarded": "192.0.2.1",
        "organisation": "o",
        "headers": {"X-Tenant": "a:b", "X-Other": "1"},
        "claims": {"plan": "a=b"},
        "certificate": {"dns": "x"},
    }
    assert set(described) == set(ExplainRequest.model_fields)
    assert gateway.bodies == [described]
    out = capsys.readouterr().out
    assert is_inert(out)
    for part in (
        "address 10.0.0.1: the peer of the connection",
        "route wide: a.test/api/x (exact, header x-beta = ",
        ") -> upstream up\n  cost 1 (route)",
        "free             0.5   1     1.5       refused, 1 s to wait",
        "parallel         0     1     2         refused, 2 in flight",
        "candidate wider  0.5",
        "candidate more   1     1     2         allowed, 1 in flight",
        "the figures are those of the share of one of 2 processes",
        "the limit tenant does not apply: the request has no header:X-Tenant",
        "not the route narrow: only for POST",
        "cost: 2.0",
        "upstream up: breaker OPEN (worker 1: CLOSED, worker 2: OPEN), next probe in 1.5 s; 1 of 2 targets healthy",
        "3 in flight, admitted below 4",
        "fallback static: used",
        "load shedding refuses 25.0%",
        "decided by worker 2",
    ):
        assert part in out, (part, out)


def test_one_client_is_shown_with_its_quotas_and_what_is_in_flight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client: dict[str, Any] = {
        "client_id": EVIL,
        "tier": {"name": "FREE", "rate": 1, "capacity": 5},
        "tier_source": "default",
        "grant": None,
        "bucket": {"tokens": 5, "capacity": 5, "reset_after_seconds": 0},
        "limits": [],
        "concurrency": [{"limit": "parallel", "route": None, "in_flight": 1, "concurrent": 2}],
        "quotas": [
            {
                "limit": "monthly",
                "route": None,
                "period": "month",
                "used": 3,
                "quota": 10,
                "carried_over": 1,
                "top_up": 0,
                "remaining": 8,
                "period_end": "2027-02-01T00:00:00+00:00",
            }
        ],
    }
    assert run(monkeypatch, Gateway(clients=client), "clients", "a/b") == 0
    out = capsys.readouterr().out
    assert is_inert(out)
    assert "monthly  -      month   3     10  1             0       8          2027-02-01T00:00:00+00:00" in out
    assert "parallel     -      1          2" in out
    assert "the store is unavailable" not in out
    gateway = Gateway(clients=client)
    assert run(monkeypatch, gateway, "clients", "a/b", "--json") == 0
    assert json.loads(capsys.readouterr().out) == client
    assert [path for path, _ in gateway.asked] == ["/clients/a%2Fb", "/clients/a%2Fb/quotas"]
    client |= {"bucket": client["bucket"] | SHARED, "concurrency": []}
    gateway = Gateway(clients=[client, CommandFailed("503: unavailable", status=503)] * 2)
    assert run(monkeypatch, gateway, "clients", "a/b") == 0
    shown = capsys.readouterr()
    assert shown.out.rstrip().endswith(OF_A_SHARE)
    assert "QUOTA" not in shown.out
    assert shown.err == "quotas: 503: unavailable\n"
    assert run(monkeypatch, gateway, "clients", "a/b", "--json") == 0
    assert json.loads(capsys.readouterr().out)["quotas"] is None
    for is_confirmed in (True, False):
        assert (
            run(monkeypatch, Gateway(clients=client | {"confirmed": is_confirmed, "quotas": []}), "clients", "a") == 0
        )
        assert (UNCONFIRMED in capsys.readouterr().out) is not is_confirmed
    gateway = Gateway(clients=[client, CommandFailed("403: refused", NOT_AUTHORIZED, 403)])
    assert run(monkeypatch, gateway, "clients", "a/b") == NOT_AUTHORIZED


def test_a_followed_request_is_one_inert_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway = Gateway(history={"requests": [ROW, ROW], "next": 7, "complete": True})
    assert run(monkeypatch, gateway, "tail", "--no-follow", "--status", "5xx", "--client", "c", "--lines", "5") == 0
    out = capsys.readouterr().out
    assert gateway.asked == [("/history", {"limit": 5, "status": "5xx", "client": "c"})]
    assert out.count("\n") == 2
    assert is_inert(out)
    assert out.startswith("08:00:01.250  502  GET  /api/a\\x1b")
    assert "2 attempts  upstream_reset  [a\\x1b" in out
    assert " trace 0af7651916cd43dd8448eb211c80319c]" in out
    for status, is_shown in ((200, False), (404, True), (502, True)):  # those of an upstream, which have no reason
        row = ROW | {"status": status, "reason": None}
        assert ("[a\\x1b" in view_commands.line_of(row).replace("\x1b", "\\x1b")) is is_shown
    assert run(monkeypatch, gateway, "tail", "--no-follow", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [ROW, ROW]
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_tail_goes_on_from_the_last_position_and_through_a_restart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    rows = [ROW | {"path": f"/{number}", "client_id": "c", "request_id": "i"} for number in range(4)]
    gateway = Gateway(
        history=[
            {"requests": rows[:1], "next": 1, "not_kept": 5},
            CommandFailed("gone", NOT_REACHED),
            CommandFailed("gone", NOT_REACHED),
            {"requests": rows[1:3], "next": 3, "not_kept": 12},
            {"requests": rows[3:], "next": 4, "not_kept": 3},
            CommandFailed("refused", NOT_AUTHORIZED),
        ]
    )
    assert run(monkeypatch, gateway, "tail", "--lines", "0") == NOT_AUTHORIZED
    captured = capsys.readouterr()
    assert [line.split("  ")[3] for line in captured.out.splitlines()] == ["/1", "/2", "/3"]
    assert [query.get("after") for _, query in gateway.asked] == [None, 1, 1, 1, 3, 4]
    assert captured.err.count("asking again") == 1
    assert captured.err.count("7 more requests (of all clients) not in the history") == 1
    assert captured.err.count("not in the history") == 1, "the counts begin anew after a restart"


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain",),
        ("explain", "id", "--path", "/api"),
        ("explain", "--path", "/api", "--header", "X-Tenant"),
        ("explain", "--path", "/api", "--claim", "plan=a", "--claim", "plan=b"),
        ("tail", "--lines", "-1"),
    ],
)
def test_a_wrong_combination_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(monkeypatch, Gateway(), *arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_header_field_that_is_no_pair_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be a credential without its colon."""
    assert run(monkeypatch, Gateway(), "explain", "--path", "/api", "--header", "Authorization Bearer s3cret") == 1
    errors = capsys.readouterr().err
    assert "--header: must be 'NAME: VALUE'" in errors
    assert "s3cret" not in errors


def test_a_table_is_inert_and_bounded() -> None:
    lines = table(("A", "B"), [(EVIL, None), ("x" * 500, 0.5)])
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) <= 2 * MAX_CELL_WIDTH
    assert lines[1].endswith("-")
    assert lines[2].endswith("0.5")


def test_a_screen_is_inert_and_has_upstreams_in_trouble_first() -> None:
    upstream = {"circuit_breaker": "CLOSED", "targets": 1, "unhealthy_targets": 0, "in_flight": 0, "latency_ms": {}}
    figures = {
        "url": "http://gateway",
        "version": "1",
        "status": "warn",
        "problems": [],
        "uptime_seconds": 3_725.0,
        "requests_per_second": 12.5,
        "in_flight": 3,
        "limited_ratio": 0.25,
        "error_ratio": 0.0,
        "latency_ms": {"p50": 1.5, "p99": None},
        "event_loop_lag_seconds": 0.002,
        "decision_source": "memory",
        "upstreams": [
            upstream | {"name": "quiet", "status": "pass", "calls_last_60s": 1},
            upstream | {"name": "busy", "status": "pass", "calls_last_60s": 9},
            upstream | {"name": "down", "status": "fail", "calls_last_60s": 0},
        ],
        "clients": [{"client_id": EVIL, "tier": "FREE", "limited": 5, "requests": 9}],
        "last_refusals_and_errors": [ROW],
    }
    lines = screen_lines(figures)
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "http://gateway  api-gateway 1  warn  up 1:02:05"
    assert lines[1].startswith("12.5 requests/s  3 in flight  25.0% limited")
    names = [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in ("quiet", "busy", "down")]
    assert names == ["down", "busy", "quiet"]
    assert line_of(ROW).split("  ")[1] == "502"
    assert "LAST REFUSALS" not in "".join(screen_lines(figures | {"last_refusals_and_errors": None}))
    assert "WRONG" not in "".join(lines)
    wrong = [{"severity": "fail", "text": f"Problem {number}.", "link": "#/"} for number in range(30)]
    many = figures | {
        "problems": wrong,
        "upstreams": [upstream | {"name": f"u{i}", "status": "pass", "calls_last_60s": i} for i in range(40)],
        "last_refusals_and_errors": [ROW | {"path": f"/{number}", "client_id": "c"} for number in range(6)],
    }
    lines = screen_lines(many, 23)
    assert len(lines) == 23, "the screen is full"
    headings = [line for line in lines if line.isupper() or " are shown)" in line]
    assert [line.partition("  ")[0] for line in headings] == [
        "WHAT IS WRONG NOW",
        "UPSTREAM",
        "MOST LIMITED CLIENT",
        "LAST REFUSALS AND ERRORS",
    ]
    assert headings[1].endswith("P99 MS  (4 of 40 are shown)")
    assert [line.split()[0] for line in lines[lines.index(headings[1]) :][1:5]] == ["u39", "u38", "u37", "u36"]
    assert "  /5  " in lines[lines.index(headings[3]) + 1], "the newest failure is among those that are shown"
    assert len(screen_lines(many)) > 80, "without a terminal, all is printed"
    for rows in range(1, 60):
        assert len(screen_lines(many, rows)) <= max(rows, 11), "four headings with their gaps are never left out"


@pytest.mark.parametrize(
    ("wanted", "room", "given"),
    [
        ([3, 40, 8, 6], 12, [3, 3, 3, 3]),
        ([0, 40, 1, 6], 12, [0, 6, 1, 5]),
        ([1, 2], 50, [1, 2]),
        ([5, 5], 3, [2, 1]),
        ([5], -4, [0]),
        ([], 9, []),
    ],
)
def test_the_parts_of_a_screen_share_its_rows_evenly(wanted: list[int], room: int, given: list[int]) -> None:
    assert shares(wanted, room) == given


@pytest.mark.parametrize(
    ("token", "token_from", "part"),
    [
        ("wrong", "/etc/token", "The token is from /etc/token; --token-file"),
        (None, "none: no file", "No token was sent (none: no file); --token-file"),
    ],
)
def test_a_refused_token_names_its_place_and_the_remedy(token: str | None, token_from: str, part: str) -> None:
    refused = OperatorClient("http://gateway", token, token_from)._refused(401, "Not valid.")
    assert refused.code == NOT_AUTHORIZED
    assert str(refused).startswith("http://gateway: 401: Not valid. ")
    assert part in str(refused)
    assert "wrong" not in str(refused)


def test_an_error_of_a_gateway_is_inert_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise CommandFailed(f"one\ntwo {EVIL}")

    assert run_action(fail) == operator_client.FAILED
    assert is_inert(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [("clients", "\udcff"), ("tail", "--client", "\udcff"), ("explain", "\udcff")])
def test_an_argument_that_is_no_text_is_a_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_view(arguments) == operator_client.FAILED
    assert "must be text in UTF-8, got '\\udcff'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "1e30", "often"])
def test_an_interval_is_a_number_of_seconds(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for run_command in (partial(run_view, ["tail", "--interval", text]), partial(run_top, ["--interval", text])):
        with pytest.raises(SystemExit):
            run_command()
        error = capsys.readouterr().err
        assert f"argument --interval: must be from 0 to 86400 seconds, got '{text}'" in error


@pytest.mark.parametrize("text", ["-3", "1.5", "many", "", "9" * 10])
def test_a_count_is_a_whole_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_top([f"--count={text}"])
    assert f"argument --count: must be a whole number of at most 9 digits, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("clients", ""), "client id"), (("limits", ""), "limit"), (("explain", ""), "request id")],
)
def test_a_name_in_a_path_is_not_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], name: str
) -> None:
    """An empty one would ask another endpoint."""
    gateway = Gateway()
    assert run(monkeypatch, gateway, *arguments) == operator_client.FAILED
    assert capsys.readouterr().err == f"{name}: must not be empty, got ''\n"
    assert gateway.asked == []


def test_top_goes_on_through_a_restart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gone = CommandFailed("http://gateway: no usable response", NOT_REACHED)
    figures: Iterator[Any] = iter([{"requests": 5}, gone, gone, {"requests": 1}])

    def next_figures(_: object, before: dict[str, Any] | None) -> dict[str, Any]:
        found = next(figures)
        if isinstance(found, CommandFailed):
            raise found
        return {**found, "before": None if before is None else before["requests"]}

    monkeypatch.setattr(top_command, "client_of", lambda _: Gateway())
    monkeypatch.setattr(top_command, "_figures", next_figures)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert run_top(["--json", "--count", "4"]) == 0
    out, errors = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"requests": 5, "before": None},
        {"requests": 1, "before": 5},
    ]
    assert errors == "http://gateway  no response; asking again\n"


@pytest.mark.parametrize("content", [b"secret\nsecond", "secret\u20ac".encode(), b"secret\x1b[31m", b"\xffsecret"])
def test_a_token_file_with_something_else_is_not_quoted(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "token").write_bytes(content)
    assert run_view(["limits", "--url", "http://127.0.0.1:1", "--token-file", str(file)]) == operator_client.FAILED
    errors = capsys.readouterr().err
    assert f"{file}: must be one token" in errors
    assert "secret" not in errors


def test_an_interrupt_has_the_code_of_shells() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_action(interrupted) == 130


@each(
    "options",
    [
        ["--token-file", "a-credential"],
        ["--token-file", "aGk/a-credential=="],
        ["--url", "http://a-credential@127.0.0.1:1"],
        ["--url", "https://user:a-credential@127.0.0.1:1"],
        ["--url", "user:a-credential@127.0.0.1:1"],
    ],
)
def test_a_credential_in_place_of_its_file_or_in_the_address_is_not_shown(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = options if "--url" in options else ["--url", "http://127.0.0.1:1", *options]
    assert run_view(["limits", *given]) == operator_client.FAILED
    captured = capsys.readouterr()
    assert "token" in captured.err
    assert "a-credential" not in captured.out + captured.err
