"""What is wrong now: one sentence for each problem, with a link to its cause."""

from dataclasses import replace
from typing import Any

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.models import LimiterState
from api_gateway.reload.outcome import ReloadState
from api_gateway.reporting.issuer_snapshot import IssuerSnapshot
from api_gateway.reporting.problems import MAX_PROBLEMS, Alert, find_problems, status_of
from api_gateway.reporting.snapshot import (
    BreakerSnapshot,
    HostNameSnapshot,
    OutlierSnapshot,
    TargetSnapshot,
    UpstreamSnapshot,
    WorkerSnapshot,
)
from api_gateway.resilience.breaker_policy import BreakerPolicy, Mode, State
from api_gateway.resilience.fair_shares import ResourceState
from api_gateway.upstreams.target import CheckRecord
from tests.cases import each

NOW = 1000.0
EJECTED = OutlierSnapshot(
    state=State.OPEN,
    is_ejected=True,
    withheld=0,
    consecutive_failures=5,
    next_probe_at=NOW,
    opened_at=NOW,
    opened_cause="5 consecutive failures",
    ejections_total=1,
)
BREAKER = BreakerSnapshot.of(CircuitBreaker(BreakerPolicy(), NOW), NOW)


def snapshot(
    breaker: dict[str, Any] | None = None, target: dict[str, Any] | None = None, **more: Any
) -> WorkerSnapshot:
    targets = (
        TargetSnapshot("http://10.0.0.1", True, 0),
        replace(TargetSnapshot("http://10.0.0.2", True, 0), **(target or {})),
    )
    upstream = UpstreamSnapshot("pass", replace(BREAKER, **(breaker or {})), targets, more.pop("names", ()))
    return replace(WorkerSnapshot.blank(), upstreams={"a/b": upstream}, **more)


def point(**counts: Any) -> dict[str, Any]:
    return {"requests": 0, "refused": 0, "errors": 0, "kinds": {}, "lost": {}, **counts}


def without_audit_log(changes: int) -> WorkerSnapshot:
    found = snapshot()
    found.recorder.dropped_lines["audit"] = changes
    return found


CASES: list[tuple[WorkerSnapshot, list[dict[str, Any]], str, str, str]] = [
    (
        snapshot({"state": State.OPEN, "opened_cause": "5 in a row."}),
        [],
        "fail",
        "The breaker of 'a/b' is open: 5 in a row.",
        "#/upstreams/a%2Fb",
    ),
    (snapshot({"state": State.HALF_OPEN}), [], "warn", "is half-open", "#/upstreams/a%2Fb"),
    (snapshot({"mode": Mode.FORCED_OPEN}), [], "fail", "forced the breaker of 'a/b' open", "#/upstreams/a%2Fb"),
    (
        snapshot({"mode": Mode.FORCED_CLOSED, "state": State.OPEN}),
        [],
        "warn",
        "closed; it rejects no request",
        "#/upstreams/a%2Fb",
    ),
    (snapshot({"mode": Mode.OBSERVE}), [], "warn", "only observes", "#/upstreams/a%2Fb"),
    (
        snapshot(target={"passive": EJECTED}),
        [],
        "warn",
        "Target http://10.0.0.2 of 'a/b' is ejected: 5 consecutive failures.",
        "#/upstreams/a%2Fb",
    ),
    (
        snapshot(target={"is_healthy": False, "checks": CheckRecord(last_error="status 500")}),
        [],
        "warn",
        "fails its health checks: status 500.",
        "#/upstreams/a%2Fb",
    ),
    (
        snapshot(names=(HostNameSnapshot("db", 80, (), None, "no such host"),)),
        [],
        "warn",
        "The name db of 'a/b' was not resolved: no such host.",
        "#/upstreams/a%2Fb",
    ),
    (
        snapshot(limiter=LimiterState("local_share", 3, last_error="timeout")),
        [],
        "fail",
        "each of 3 processes applies its share of the limits: timeout.",
        "#/configuration/store",
    ),
    (snapshot(limiter=LimiterState("deny")), [], "fail", "requests are refused.", "#/configuration/store"),
    (
        snapshot(limiter=LimiterState(warning="keys are evicted")),
        [],
        "warn",
        "Limits may be inexact: keys are evicted.",
        "#/configuration/store",
    ),
    (
        snapshot(issuers={"sso": IssuerSnapshot(0, None, "status 500.")}),
        [],
        "fail",
        "The keys of issuer 'sso' cannot be fetched; there are none, so its tokens are refused: status 500.",
        "#/configuration/identity",
    ),
    (
        snapshot(issuers={"sso": IssuerSnapshot(2, 0.0, "timeout"), "other": IssuerSnapshot(1, 0.0, None)}),
        [],
        "warn",
        "The keys of issuer 'sso' cannot be fetched; the last ones are still used: timeout.",
        "#/configuration/identity",
    ),
    (
        snapshot(unwritten={"quotas": "disk full", "usage": None}),
        [],
        "warn",
        "Charges of quotas are not stored, so a restart forgets what clients have used since: disk full.",
        "#/clients",
    ),
    (snapshot(client_store_error="locked"), [], "warn", "The client store is unavailable", "#/clients"),
    (
        snapshot(configuration=ReloadState(problems=("gateway.yaml:3: bad", "x"))),
        [],
        "warn",
        "The last reload failed, so the former configuration is in force: gateway.yaml:3: bad (and 1 more).",
        "#/configuration",
    ),
    (snapshot(lag=0.25), [], "warn", "The event loop is 250 ms late", "#/"),
    (
        snapshot(resources=[ResourceState("requests", "a/b", 100, 95, 0)]),
        [],
        "warn",
        "Nearly all requests of upstream 'a/b' are in use: 95 of 100.",
        "#/upstreams/a%2Fb",
    ),
    (
        snapshot(resources=[ResourceState("connections", None, 400, 125, 0, fullest=0.95)]),
        [],
        "warn",
        "Nearly all connections are in use: 95 % in one worker, 125 of 400 in all.",
        "#/",
    ),
    (
        snapshot(),
        [point(requests=100, errors=30, kinds={"upstream_timeout": 30})],
        "fail",
        "30 % of the last minute's requests had an error 5xx, mostly upstream_timeout.",
        "#/",
    ),
    (
        snapshot(),
        [point(requests=100, refused=40, kinds={"rate_limited": 40})],
        "warn",
        "40 % of the last minute's requests were refused, mostly rate_limited.",
        "#/clients",
    ),
    (
        snapshot(),
        [point(requests=100, kinds={"overloaded": 2})],
        "fail",
        "2 requests were refused in the last minute because of load.",
        "#/upstreams",
    ),
    (
        snapshot(),
        [point(requests=5, kinds={"issuer_unavailable": 3})],
        "fail",
        "because the keys of an issuer were missing",
        "#/configuration/identity",
    ),
    (
        snapshot(),
        [point(lost={"spans": 60}), point(lost={"spans": 3})],
        "warn",
        "63 spans of traces were lost in the last minute",
        "#/configuration/tracing",
    ),
    (
        snapshot(),
        [point(lost={"lines": 7})],
        "warn",
        "7 lines of the access log or the log were not written in the last minute.",
        "#/configuration/log",
    ),
    (
        without_audit_log(2),
        [],
        "warn",
        "2 changes by operators since the start are in the log alone",
        "#/configuration",
    ),
]


@each(("state", "points", "severity", "text", "link"), CASES, ids=lambda one: one if isinstance(one, str) else "")
def test_each_problem_is_one_sentence_with_a_link(
    state: WorkerSnapshot, points: list[dict[str, Any]], severity: str, text: str, link: str
) -> None:
    (found,) = find_problems(state, points, None)
    assert (found.severity, found.link) == (severity, link)
    assert text in found.text
    assert found.text.endswith(".")
    assert status_of([found]) == severity


def test_nothing_is_wrong_with_a_gateway_that_serves() -> None:
    points = [point(requests=100, refused=3, errors=1, kinds={"rate_limited": 3, "upstream_5xx": 1})] * 6
    assert find_problems(snapshot(), points, None) == []
    assert status_of([]) == "pass"
    assert find_problems(snapshot(), [point(requests=4, errors=4)], None) == [], "too few requests for a share"
    assert find_problems(snapshot(), [point(requests=99, errors=99), *[point()] * 6], None) == [], (
        "more than a minute ago"
    )


def test_the_file_of_modes_that_cannot_be_used_is_a_problem() -> None:
    assert [found.text for found in find_problems(snapshot(), [], "not JSON.")] == [
        "The file of breaker modes cannot be used: not JSON."
    ]


def test_the_gravest_come_first_and_their_number_is_limited() -> None:
    down = snapshot(target={"passive": EJECTED})
    down.upstreams = {f"up{number}": down.upstreams["a/b"] for number in range(400)}
    down.limiter = LimiterState("allow")
    found = find_problems(down, [], None)
    assert len(found) == MAX_PROBLEMS
    assert found[0].severity == "fail"
    assert found[-1] == Alert("warn", "302 more problems are not listed.", "#/upstreams")
