"""The operator endpoints: access, and that the published schema is correct."""

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from api_gateway import models
from api_gateway.admin import client_schema
from api_gateway.clients.api_keys import new_key
from api_gateway.reporting import metrics_schema, upstream_schema
from tests.cases import each
from tests.kit import RawUpstream, RunningGateway, ask, eventually, in_front_of, reply, running_gateway

StartGateway = Callable[[dict[str, Any]], RunningGateway]
StartUpstream = Callable[..., RawUpstream]

TOKEN = "correct-horse-battery"
GUARDED = [
    "/metrics",
    "/metrics/latency",
    "/circuit-breakers",
    "/circuit-breakers/up/history",
    "/clients",
    "/clients/acme",
    "/audit",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway without an admin token."""
    with running_gateway(in_front_of("http://127.0.0.1:9"), tmp_path_factory.mktemp("plain")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def tokened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway with one."""
    sections = in_front_of("http://127.0.0.1:9") | {"admin": {"token": TOKEN}}
    with running_gateway(sections, tmp_path_factory.mktemp("tokened")) as gateway:
        yield gateway


@each("path", GUARDED)
def test_without_a_token_local_requests_are_served(plain: RunningGateway, path: str) -> None:
    assert ask(plain.url + path).status == 200


@each("path", GUARDED)
@each("header", [{"X-Forwarded-For": "203.0.113.9"}, {"Via": "1.1 edge"}, {"Host": "gateway.example:8000"}])
def test_without_a_token_forwarded_requests_are_refused(
    plain: RunningGateway, path: str, header: dict[str, str]
) -> None:
    answer = ask(plain.url + path, headers=header)
    assert (answer.status, answer.json()["reason"]) == (401, "unauthorized")


@each("path", GUARDED)
def test_a_configured_token_is_always_needed(tokened: RunningGateway, path: str) -> None:
    refused = ask(tokened.url + path)
    assert (refused.status, refused.json()["reason"]) == (401, "unauthorized")
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert ask(tokened.url + path, headers={"Authorization": "Bearer wrong"}).status == 401
    assert ask(tokened.url + path, headers={"Authorization": f"Bearer {TOKEN}"}).status == 200


def test_changing_a_tier_is_guarded(tokened: RunningGateway) -> None:
    url, body = f"{tokened.url}/clients/acme/tier", b'{"tier": "BASIC"}'
    headers = {"Content-Type": "application/json"}
    assert ask(url, method="POST", headers=headers, body=body).status == 401
    assert ask(url, method="POST", headers=headers | {"Authorization": f"Bearer {TOKEN}"}, body=body).status == 200


@each(
    ("method", "path", "body"),
    [
        ("POST", "/clients/acme/grants", b'{"tier": "BASIC", "duration_seconds": 1}'),
        ("DELETE", "/clients/acme/grants", None),
        ("POST", "/clients/acme/reset", b""),
        ("POST", "/circuit-breakers/up", b'{"mode": "auto"}'),
    ],
)
def test_grants_resets_and_modes_are_guarded(
    tokened: RunningGateway, method: str, path: str, body: bytes | None
) -> None:
    headers = {"Content-Type": "application/json"}
    assert ask(tokened.url + path, method=method, headers=headers, body=body).status == 401
    headers["Authorization"] = f"Bearer {TOKEN}"
    assert ask(tokened.url + path, method=method, headers=headers, body=body).status == 200


def post(url: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
    answer = ask(
        url, method=method, headers={"Content-Type": "application/json"}, body=json.dumps(body or {}).encode()
    )
    return answer.json() | {"http": answer.status}


def test_a_grant_stands_over_the_tier_until_it_is_ended(plain: RunningGateway) -> None:
    url = f"{plain.url}/clients/granted"
    post(f"{url}/tier", {"tier": "BASIC"})
    changed = post(f"{url}/grants", {"tier": "premium", "until": "2999-12-01T00:00:00+01:00"})
    assert client_schema.GrantChanged.model_validate({key: changed[key] for key in changed if key != "http"})
    assert (changed["previous"]["name"], changed["current"]["name"]) == ("BASIC", "PREMIUM")
    assert changed["until"] == "2999-11-30T23:00:00.000+00:00"
    assert (changed["tokens_before"], changed["tokens_after"]) == (50, 200)
    view = ask(url).json()
    assert (view["tier"]["name"], view["tier_source"], view["confirmed"]) == ("PREMIUM", "granted", True)
    assert view["grant"] == {"tier": "PREMIUM", "until": "2999-11-30T23:00:00.000+00:00", "tier_after": "BASIC"}
    ended = post(f"{url}/grants", method="DELETE")
    assert (ended["previous"]["name"], ended["current"]["name"], ended["until"]) == ("PREMIUM", "BASIC", None)
    view = ask(url).json()
    assert (view["tier_source"], view["grant"]) == ("registered", None)


def test_a_grant_ends_by_itself_and_its_bucket_is_taken_over_once(plain: RunningGateway) -> None:
    """Of 200 tokens 100 are spent, which leaves half of the bucket, and more at its end: 25 of 50, and more."""
    url = f"{plain.url}/clients/brief"
    post(f"{url}/tier", {"tier": "BASIC"})
    post(f"{url}/grants", {"tier": "PREMIUM", "duration_seconds": 2})
    live = plain.live
    client = live.clients.by_id("brief")
    charge = models.Charge(client.key, client.quota, client.quota.cost_ns(100))
    spent = live.limiter.decide([charge], time.monotonic_ns())
    assert spent.remaining == 100
    eventually(lambda: ask(url).json()["tier_source"] == "registered", "the grant ends")
    assert 25 <= ask(url).json()["bucket"]["tokens"] < 45


def test_a_reset_fills_the_bucket(plain: RunningGateway) -> None:
    url, live = f"{plain.url}/clients/spent", plain.live
    client = live.clients.by_id("spent")
    live.limiter.decide([models.Charge(client.key, client.quota, client.quota.burst_ns)], time.monotonic_ns())
    filled = post(f"{url}/reset")
    assert filled.pop("http") == 200
    client_schema.BucketReset.model_validate(filled)
    assert filled["tokens_before"] < filled["tokens_after"] == client.quota.capacity
    assert ask(url).json()["bucket"]["tokens"] == client.quota.capacity


@each(
    ("body", "named"),
    [
        ({"tier": "GOLD", "duration_seconds": 1}, ["'GOLD'", "PREMIUM"]),
        ({"tier": "FREE"}, ["until", "duration_seconds", "neither"]),
        (
            {"tier": "FREE", "duration_seconds": 60, "until": "2999-12-01T00:00:00Z"},
            ["until", "duration_seconds: 60", "2999"],
        ),
        ({"tier": "FREE", "until": "2001-12-01T00:00:00Z"}, ["body.until", "2001-12-01", "future"]),
        ({"tier": "FREE", "until": "2999-12-01T00:00:00"}, ["body.until", "2999-12-01", "timezone"]),
        ({"tier": "FREE", "until": "tomorrow"}, ["body.until", "'tomorrow'"]),
        ({"tier": "FREE", "duration_seconds": 0}, ["body.duration_seconds", "got 0"]),
        ({"tier": "FREE", "duration_seconds": -5}, ["body.duration_seconds", "got -5"]),
        ({"tier": "FREE", "duration_seconds": 1e300}, ["body.duration_seconds", "got 1e+300"]),
    ],
)
def test_a_grant_that_makes_no_sense_is_refused_by_place_and_value(
    plain: RunningGateway, body: dict[str, Any], named: list[str]
) -> None:
    answer = post(f"{plain.url}/clients/acme/grants", body)
    assert (answer["http"], answer["reason"]) == (422, "invalid_value")
    assert all(word in answer["detail"] for word in named), answer["detail"]


def test_a_breaker_is_put_into_a_mode_and_back(tokened: RunningGateway) -> None:
    authorized = {"Authorization": f"Bearer {TOKEN}"}

    def change(body: dict[str, Any]) -> Any:
        headers = authorized | {"Content-Type": "application/json"}
        answer = ask(
            f"{tokened.url}/circuit-breakers/up", method="POST", headers=headers, body=json.dumps(body).encode()
        )
        assert answer.status == 200, answer.body
        upstream_schema.ModeChanged.model_validate(answer.json())
        return answer.json()

    def shown() -> Any:
        return ask(f"{tokened.url}/circuit-breakers", headers=authorized).json()["circuit_breakers"]["up"]

    assert (shown()["mode"], shown()["override"]) == ("auto", None)
    changed = change({"mode": "forced_open", "duration_seconds": 600, "comment": "moving house"})
    assert (changed["name"], changed["previous"]["mode"], changed["current"]["mode"]) == ("up", "auto", "forced_open")
    assert shown()["override"] == changed["current"]
    assert (changed["current"]["comment"], changed["current"]["set_by"]) == (
        "moving house",
        "token 'admin', from 127.0.0.1",
    )
    since, until = (datetime.fromisoformat(changed["current"][key]) for key in ("since", "until"))
    assert (until - since).total_seconds() == 600
    refused = ask(f"{tokened.url}/api/x").json()
    assert (refused["reason"], refused["circuit_breaker"]) == ("circuit_open", "CLOSED")
    assert "forced open by an operator for another" in refused["detail"]
    assert "moving house" not in refused["detail"]
    assert 590 < refused["retry_after_seconds"] <= 600
    assert ask(f"{tokened.url}/health", headers=authorized).json()["upstreams"]["up"]["status"] == "fail"
    observed = change({"mode": "observe", "duration_seconds": None})
    assert (observed["previous"], observed["current"]["until"]) == (changed["current"], None)
    assert ask(f"{tokened.url}/api/x").json()["reason"] == "upstream_connect_error"
    assert change({"mode": "auto"})["previous"]["mode"] == "observe"
    assert (shown()["mode"], shown()["override"]) == ("auto", None)


def test_in_observe_nothing_is_refused_and_what_would_have_been_is_shown(gateway: StartGateway) -> None:
    sections = in_front_of("http://127.0.0.1:9", circuit_breaker={"failure_threshold": 2}, retry={"attempts": 1})
    running = gateway(sections)
    post(f"{running.url}/circuit-breakers/up", {"mode": "observe"})
    assert {ask(f"{running.url}/api/x").json()["reason"] for _ in range(5)} == {"upstream_connect_error"}
    shown = ask(f"{running.url}/circuit-breakers").json()["circuit_breakers"]["up"]
    assert (shown["state"], shown["opened_total"], shown["rejected_total"]) == ("OPEN", 0, 0)
    assert (shown["would_open_total"], shown["would_reject_total"]) == (1, 3)
    assert ask(f"{running.url}/health").json()["upstreams"]["up"]["status"] == "warn"
    (move,) = ask(f"{running.url}/circuit-breakers/up/history").json()["history"]
    assert (move["from"], move["to"], move["mode"]) == ("CLOSED", "OPEN", "observe")


def test_the_history_shows_the_cause_of_each_transition(gateway: StartGateway, upstream: StartUpstream) -> None:
    up = upstream(reply(b"no", b"500 Internal Server Error"))
    sections = in_front_of(up.url, circuit_breaker={"failure_threshold": 2, "recovery_timeout": 0.2, "jitter": 0})
    running = gateway(sections)
    for number in range(2):
        assert ask(f"{running.url}/api/x", headers={"X-Request-ID": f"request-{number}"}).status == 500
    up.behave = reply()
    eventually(lambda: ask(f"{running.url}/api/x").status == 200, "it recovers")
    answer = ask(f"{running.url}/circuit-breakers/up/history").json()
    upstream_schema.HistoryView.model_validate(answer)
    closed, half_open, opened = answer["history"]
    assert [(move["from"], move["to"]) for move in answer["history"]] == [
        ("HALF_OPEN", "CLOSED"),
        ("OPEN", "HALF_OPEN"),
        ("CLOSED", "OPEN"),
    ]
    assert opened["detail"] == "2 consecutive failures; last: status 500"
    assert (opened["window_calls"], opened["window_failures"], opened["window_slow_calls"]) == (2, 2, 0)
    assert [(call["request_id"], call["route"], call["detail"]) for call in opened["last_failures"]] == [
        ("request-1", "all", "status 500"),
        ("request-0", "all", "status 500"),
    ]
    assert all(0 < call["duration_seconds"] < 5 for call in opened["last_failures"])
    moments = [datetime.fromisoformat(move["at"]) for move in (opened, half_open, closed)]
    assert moments == sorted(moments)
    wait = datetime.fromisoformat(opened["next_probe_at"]) - moments[0]
    assert abs(wait.total_seconds() - 0.2) < 0.01
    assert (closed["next_probe_at"], opened["worker"], opened["target_url"]) == (None, None, None)
    assert 0 <= ask(f"{running.url}/circuit-breakers").json()["circuit_breakers"]["up"]["ramp_ratio"] < 1


@each(
    ("body", "named"),
    [
        ({"mode": "open"}, ["body.mode", "forced_open", "got 'open'"]),
        ({}, ["body.mode", "missing"]),
        ({"mode": "observe", "duration_seconds": 0}, ["body.duration_seconds", "got 0"]),
        ({"mode": "observe", "duration_seconds": 1e300}, ["body.duration_seconds", "got 1e+300"]),
        ({"mode": "auto", "duration_seconds": 60}, ["body.duration_seconds", "got 60"]),
        ({"mode": "observe", "comment": "x" * 501}, ["body.comment", "500"]),
        ({"mode": "observe", "comment": "a\x1b[31m"}, ["body.comment", "no control characters or line breaks"]),
        ({"mode": "observe", "comment": "a\nb"}, ["body.comment", "no control characters or line breaks"]),
        ({"mode": "observe", "minutes": 5}, ["body.minutes", "got 5"]),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused_by_place_and_value(
    plain: RunningGateway, body: dict[str, Any], named: list[str]
) -> None:
    answer = post(f"{plain.url}/circuit-breakers/up", body)
    assert (answer["http"], answer["reason"]) == (422, "invalid_value")
    assert all(word in answer["detail"] for word in named), answer["detail"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("upp", "There is no circuit breaker 'upp'; did you mean 'up'?"),
        ("zzz", "There is no circuit breaker 'zzz'; existing: up."),
    ],
)
def test_an_unknown_breaker_is_refused_with_the_nearest_name(plain: RunningGateway, name: str, words: str) -> None:
    for answer in (
        post(f"{plain.url}/circuit-breakers/{name}", {"mode": "auto"}),
        ask(f"{plain.url}/circuit-breakers/{name}/history").json() | {"http": 404},
    ):
        assert (answer["http"], answer["status"], answer["detail"]) == (404, 404, words)


def test_an_unusable_file_of_modes_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "state" / "circuit_breakers.json"
    file.parent.mkdir()
    file.write_text('{"circuit_breakers": {"up": {"mode": "on"}}}')
    with running_gateway(in_front_of("http://127.0.0.1:9"), tmp_path) as running:
        told = ask(f"{running.url}/circuit-breakers").json()
        assert told["modes_error"].startswith(f"{file}: circuit_breakers.up: must have mode, since")
        assert told["circuit_breakers"]["up"]["mode"] == "auto"
        answer = post(f"{running.url}/circuit-breakers/up", {"mode": "observe"})
        assert (answer["http"], answer["reason"]) == (503, "store_unavailable")
        assert str(file) in answer["detail"]
        file.unlink()
        assert "modes_error" not in ask(f"{running.url}/circuit-breakers").json()
        assert post(f"{running.url}/circuit-breakers/up", {"mode": "observe"})["http"] == 200


def test_health_shows_the_status_word_only_to_others(tokened: RunningGateway) -> None:
    assert set(ask(f"{tokened.url}/health").json()) == {"status"}
    full = ask(f"{tokened.url}/health", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert {
        "status",
        "version",
        "uptime_seconds",
        "upstreams",
        "store",
        "client_store",
        "state",
        "tls",
        "issuers",
        "event_loop",
        "resources",
        "configuration",
    } == set(full)
    assert full["store"]["decision_source"] == "memory"
    assert full["client_store"] == {"status": "pass", "error": None}


@each(
    ("method", "path", "words"),
    [
        ("PUT", "/metrics", "The endpoint supports only GET, HEAD, OPTIONS."),
        (
            "POST",
            "/clients/acme/tier",
            "The body is not JSON: Expecting property name enclosed in double quotes, at character 1.",
        ),
        (
            "GET",
            "/history?status=9xx",
            "query.status: must be a status such as 429, or a class such as 4xx, got '9xx'.",
        ),
        ("GET", "/history?reason=none", "query.reason: must be one of rate_limited, "),
        (
            "GET",
            "/history?result=none",
            "query.result: must be one of success, refusal, error, got 'none'.",
        ),
    ],
)
def test_a_message_says_what_would_be_accepted(plain: RunningGateway, method: str, path: str, words: str) -> None:
    answer = ask(plain.url + path, method=method, headers={"Content-Type": "application/json"}, body=b"{tier: FREE}")
    assert words in answer.json()["detail"]


@each(
    ("path", "body", "words"),
    [
        (
            "/circuit-breakers/up",
            {"mode": "off"},
            "body.mode: must be one of auto, observe, forced_closed, forced_open, got 'off'.",
        ),
        ("/clients/acme/tier", {"tier": "FREE", "extra": 1}, "body.extra: unknown key, got 1."),
        ("/clients/acme/tier", {}, "body.tier: is missing."),
        ("/clients/acme/tier", [], "body: must be an object."),
        ("/clients/acme/tier", {"tier": 1}, "body.tier: must be text, got 1."),
        ("/clients/acme/keys", {"expires_in_seconds": -1}, "body.expires_in_seconds: must be greater than 0, got -1."),
    ],
)
def test_a_mistake_in_a_body_is_named_in_the_words_for_files(
    plain: RunningGateway, path: str, body: object, words: str
) -> None:
    answer = ask(
        plain.url + path, method="POST", headers={"Content-Type": "application/json"}, body=json.dumps(body).encode()
    )
    assert (answer.status, answer.json()["detail"]) == (422, words)


@each(
    ("path", "shown"),
    [
        ("/nowhere", "'/nowhere'"),
        ("/clients/acme/nothing", "'/clients/acme/nothing'"),
        ("/a%1b%5b31m%0ab%e2%80%ae", r"'/a\x1b[31m\nb\u202e'"),
        (f"/{'x' * 500}", f"'/{'x' * 99}'"),
        (f"/{'x' * 70}{new_key(bytes(32))}", f"'/{'x' * 70}agw_...'"),
    ],
)
def test_an_unknown_path_is_named_in_a_form_that_can_do_no_harm(plain: RunningGateway, path: str, shown: str) -> None:
    answer = ask(plain.url + path)
    assert (answer.status, answer.json()["reason"]) == (404, "no_route")
    assert answer.json()["detail"] == f"No endpoint or route matches {shown}."


@each(
    ("body", "words"),
    [
        (b'{"tier": "\xff"}', "it is not text in UTF-8"),
        (b"\x1f\x8b\x08", "it is not text in UTF-8"),
        (b"[" * 60_000, "it is nested too deeply"),
        (b"9" * 5_000, "a number in it has too many digits"),
        (b"{tier: FREE}", "Expecting property name enclosed in double quotes, at character 1"),
    ],
)
def test_a_body_that_is_not_json_is_refused_with_the_cause(plain: RunningGateway, body: bytes, words: str) -> None:
    media = {"Content-Type": "application/json"}
    answer = ask(f"{plain.url}/clients/acme/tier", method="POST", headers=media, body=body)
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
    assert answer.json()["detail"] == f"The body is not JSON: {words}."


@each(
    ("path", "body"),
    [
        ("/clients/acme/grants", {"tier": "PREMIUM", "duration_seconds": True}),
        ("/clients/acme/keys", {"expires_in_seconds": True}),
        ("/clients/acme/keys/abc/rotate", {"overlap_seconds": True}),
        ("/clients/acme/quotas/daily/top-up", {"amount": True}),
        ("/clients/acme/quotas/daily/carry-over", {"amount": True}),
        ("/circuit-breakers/users", {"mode": "forced_open", "duration_seconds": True}),
    ],
)
def test_true_is_no_number(plain: RunningGateway, path: str, body: dict[str, Any]) -> None:
    media = {"Content-Type": "application/json"}
    answer = ask(plain.url + path, method="POST", headers=media, body=json.dumps(body).encode())
    name = next(name for name, value in body.items() if value is True)
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
    assert re.match(rf"body\.{name}: must be a (whole )?number, ", answer.json()["detail"])
    assert answer.json()["detail"].endswith(", got true.")


@each(
    ("method", "path", "body", "status", "reason"),
    [
        ("GET", "/nowhere", None, 404, "no_route"),
        ("PUT", "/metrics", b"", 405, "method_not_allowed"),
        ("POST", "/clients/acme/tier", b"{}", 422, "invalid_value"),
        ("POST", "/clients/acme/tier", b"not json", 422, "invalid_value"),
        ("POST", "/clients/acme/tier", b'{"tier": "FREE", "extra": 1}', 422, "invalid_value"),
        ("POST", "/clients/%20/tier", b'{"tier": "FREE"}', 400, "client_id_invalid"),
        ("GET", "/clients/caf%C3%A9", None, 400, "client_id_invalid"),
        ("GET", "/metrics?format=xml", None, 422, "invalid_value"),
    ],
)
def test_every_mistake_is_answered_as_a_problem(
    plain: RunningGateway, method: str, path: str, body: bytes | None, status: int, reason: str
) -> None:
    answer = ask(plain.url + path, method=method, headers={"Content-Type": "application/json"}, body=body)
    assert (answer.status, answer.json()["reason"]) == (status, reason)
    assert answer.headers["content-type"] == "application/problem+json"
    models.Problem.model_validate(answer.json())


def test_the_schema_describes_every_endpoint(plain: RunningGateway) -> None:
    schema = ask(f"{plain.url}/openapi.json").json()
    assert set(schema["paths"]) == {
        "/healthz",
        "/readyz",
        "/audit",
        "/configuration",
        "/dashboard/events",
        "/dashboard/problems",
        "/history",
        "/explain/{request_id}",
        "/reload",
        "/health",
        "/metrics",
        "/metrics/latency",
        "/circuit-breakers",
        "/circuit-breakers/{name}",
        "/circuit-breakers/{name}/history",
        "/clients",
        "/clients/{client_id}/tier",
        "/clients/{client_id}/grants",
        "/clients/{client_id}/keys",
        "/clients/{client_id}/keys/{key_id}",
        "/clients/{client_id}/keys/{key_id}/rotate",
        "/clients/{client_id}/verified-only",
        "/clients/{client_id}/quotas",
        "/clients/{client_id}/quotas/{name}/top-up",
        "/clients/{client_id}/quotas/{name}/carry-over",
        "/clients/{client_id}/quotas/{name}/reset",
        "/clients/{client_id}/reset",
        "/clients/{client_id}",
        "/explain",
        "/usage",
        "/usage/me",
        "/limits",
        "/limits/snapshot",
        "/limits/{name}/buckets",
        "/limits/{name}/buckets/reset",
        "/limits/{name}/buckets/top-up",
        "/limits/{name}/buckets/carry-over",
        "/tiers",
    }


@each(
    ("path", "message"),
    [
        ("/usage?form=csv", "query.form: unknown parameter; did you mean 'format'; the parameters are by, client,"),
        (
            "/clients?teir=PREMIUM",
            "query.teir: unknown parameter; did you mean 'tier'; the parameters are sort, limit,",
        ),
        ("/clients/acme?x=1", "query.x: unknown parameter; the endpoint has none."),
        ("/metrics?fromat=prometheus", "query.fromat: unknown parameter; did you mean 'format'"),
        ("/limits?key=a", "query.key: unknown parameter; the endpoint has none."),
        ("/usage/me?mnth=2027-01", "query.mnth: unknown parameter; did you mean 'month'"),
    ],
)
def test_a_misspelt_parameter_is_refused_with_those_that_exist(plain: RunningGateway, path: str, message: str) -> None:
    answer = ask(f"{plain.url}{path}")
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
    assert message in answer.json()["detail"]


def test_every_operator_endpoint_checks_its_parameters(plain: RunningGateway) -> None:
    """Also one that is added: each gets its context by the same dependency."""
    paths = ask(f"{plain.url}/openapi.json").json()["paths"]
    gets = [path for path, operations in paths.items() if "get" in operations and "security" in operations["get"]]
    values = {"client_id": "acme", "name": "up", "request_id": "1", "key_id": "1"}
    assert len(gets) > 15
    for path in gets:
        answer = ask(f"{plain.url}{path.format(**values)}?no-such-parameter=1")
        assert answer.status == 422, path
        assert "query.no-such-parameter: unknown parameter" in answer.json()["detail"], path


def test_the_schema_says_which_endpoints_take_a_token(plain: RunningGateway) -> None:
    """The page of the documentation offers to enter one for it."""
    schema = ask(f"{plain.url}/openapi.json").json()
    (scheme,) = schema["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    open_ones = {
        path
        for path, operations in schema["paths"].items()
        if any("security" not in operation for operation in operations.values())
    }
    assert open_ones == {"/healthz", "/readyz", "/health", "/usage/me"}


@each(
    ("path", "model"),
    [
        ("/health", upstream_schema.HealthView),
        ("/metrics", metrics_schema.MetricsView),
        ("/metrics/latency", metrics_schema.LatencyView),
        ("/circuit-breakers", upstream_schema.BreakersView),
        ("/circuit-breakers/up/history", upstream_schema.HistoryView),
        ("/clients/acme", client_schema.ClientView),
        ("/clients", client_schema.HeavyClients),
    ],
)
def test_responses_are_what_the_schema_says(plain: RunningGateway, path: str, model: Any) -> None:
    body = ask(plain.url + path).json()
    model.model_validate(body)
    schema = ask(f"{plain.url}/openapi.json").json()
    name = path.replace("/clients/acme", "/clients/{client_id}").replace("/up/", "/{name}/")
    shown = schema["paths"][name]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert {"$ref": f"#/components/schemas/{model.__name__}"} in shown.get("anyOf", [shown])


def test_the_documentation_page_is_served(plain: RunningGateway) -> None:
    assert b"openapi.json" in ask(f"{plain.url}/docs").body
