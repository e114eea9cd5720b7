"""The operator's endpoints: who may use them, and that the published schema tells the truth."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from api_gateway import models
from tests.kit import RunningGateway, ask, eventually, in_front_of, running_gateway

TOKEN = "correct-horse-battery"
GUARDED = ["/metrics", "/metrics/latency", "/circuit-breakers", "/clients", "/clients/acme"]


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


@pytest.mark.parametrize("path", GUARDED)
def test_without_a_token_this_machine_may(plain: RunningGateway, path: str) -> None:
    assert ask(plain.url + path).status == 200


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "header", [{"X-Forwarded-For": "203.0.113.9"}, {"Via": "1.1 edge"}, {"Host": "gateway.example:8000"}]
)
def test_without_a_token_nothing_forwarded_may(plain: RunningGateway, path: str, header: dict[str, str]) -> None:
    answer = ask(plain.url + path, headers=header)
    assert (answer.status, answer.json()["reason"]) == (403, "forbidden")


@pytest.mark.parametrize("path", GUARDED)
def test_with_a_token_it_is_always_needed(tokened: RunningGateway, path: str) -> None:
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


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/clients/acme/grants", b'{"tier": "BASIC", "for": 1}'),
        ("DELETE", "/clients/acme/grants", None),
        ("POST", "/clients/acme/reset", b""),
    ],
)
def test_grants_and_resets_are_guarded(tokened: RunningGateway, method: str, path: str, body: bytes | None) -> None:
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
    assert models.GrantChanged.model_validate({key: changed[key] for key in changed if key != "http"})
    assert (changed["previous"]["name"], changed["current"]["name"]) == ("BASIC", "PREMIUM")
    assert changed["until"] == "2999-11-30T23:00:00.000+00:00"
    assert (changed["tokens_before"], changed["tokens_after"]) == (50, 200)
    view = ask(url).json()
    assert (view["tier"]["name"], view["source"], view["confirmed"]) == ("PREMIUM", "granted", True)
    assert view["grant"] == {"tier": "PREMIUM", "until": "2999-11-30T23:00:00.000+00:00", "then": "BASIC"}
    ended = post(f"{url}/grants", method="DELETE")
    assert (ended["previous"]["name"], ended["current"]["name"], ended["until"]) == ("PREMIUM", "BASIC", None)
    view = ask(url).json()
    assert (view["source"], view["grant"]) == ("registered", None)


def test_a_grant_ends_by_itself_and_its_bucket_is_taken_over_once(plain: RunningGateway) -> None:
    """Of 200 tokens 100 are spent, which leaves half of the bucket: 25 of 50 when the grant has ended."""
    url = f"{plain.url}/clients/brief"
    post(f"{url}/tier", {"tier": "BASIC"})
    post(f"{url}/grants", {"tier": "PREMIUM", "for": 0.5})
    console = plain.console
    client = console.clients.named("brief")
    charge = models.Charge(client.key, client.quota, client.quota.cost_ns(100))
    spent = console.limiter.decide([charge], time.monotonic_ns())
    assert spent.remaining == 100
    eventually(lambda: ask(url).json()["source"] == "registered", "the grant ends")
    assert 25 <= ask(url).json()["bucket"]["tokens"] < 32


def test_a_reset_fills_the_bucket(plain: RunningGateway) -> None:
    url, console = f"{plain.url}/clients/spent", plain.console
    client = console.clients.named("spent")
    console.limiter.decide([models.Charge(client.key, client.quota, client.quota.burst_ns)], time.monotonic_ns())
    filled = post(f"{url}/reset")
    assert filled.pop("http") == 200
    models.BucketReset.model_validate(filled)
    assert filled["tokens_before"] < filled["tokens_after"] == client.quota.capacity
    assert ask(url).json()["bucket"]["tokens"] == client.quota.capacity


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tier": "GOLD", "for": 1}, ["'GOLD'", "PREMIUM"]),
        ({"tier": "FREE"}, ["until", "for", "neither"]),
        ({"tier": "FREE", "for": 60, "until": "2999-12-01T00:00:00Z"}, ["until", "for: 60", "2999"]),
        ({"tier": "FREE", "until": "2001-12-01T00:00:00Z"}, ["body.until", "2001-12-01", "future"]),
        ({"tier": "FREE", "until": "2999-12-01T00:00:00"}, ["body.until", "2999-12-01", "timezone"]),
        ({"tier": "FREE", "until": "tomorrow"}, ["body.until", "'tomorrow'"]),
        ({"tier": "FREE", "for": 0}, ["body.for", "got 0"]),
        ({"tier": "FREE", "for": -5}, ["body.for", "got -5"]),
        ({"tier": "FREE", "for": 1e300}, ["body.for", "got 1e+300"]),
    ],
)
def test_a_grant_that_makes_no_sense_is_refused_by_place_and_value(
    plain: RunningGateway, body: dict[str, Any], named: list[str]
) -> None:
    answer = post(f"{plain.url}/clients/acme/grants", body)
    assert (answer["http"], answer["reason"]) == (422, "invalid_value")
    assert all(word in answer["detail"] for word in named), answer["detail"]


def test_health_tells_others_the_status_word_only(tokened: RunningGateway) -> None:
    assert set(ask(f"{tokened.url}/health").json()) == {"status"}
    full = ask(f"{tokened.url}/health", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert {"status", "version", "uptime", "upstreams", "limits", "clients", "event_loop"} == set(full)
    assert full["limits"]["mode"] == "memory"
    assert full["clients"] == {"status": "pass", "error": None}


@pytest.mark.parametrize(
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
        "/health",
        "/metrics",
        "/metrics/latency",
        "/circuit-breakers",
        "/clients",
        "/clients/{client_id}/tier",
        "/clients/{client_id}/grants",
        "/clients/{client_id}/reset",
        "/clients/{client_id}",
        "/explain",
    }


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/health", models.HealthView),
        ("/metrics", models.MetricsView),
        ("/metrics/latency", models.LatencyView),
        ("/circuit-breakers", models.BreakersView),
        ("/clients/acme", models.ClientView),
        ("/clients", models.HeavyClients),
    ],
)
def test_answers_are_what_the_schema_says(plain: RunningGateway, path: str, model: Any) -> None:
    body = ask(plain.url + path).json()
    model.model_validate(body)
    schema = ask(f"{plain.url}/openapi.json").json()
    name = "/clients/{client_id}" if path.startswith("/clients/") else path
    shown = schema["paths"][name]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert shown == {"$ref": f"#/components/schemas/{model.__name__}"}


def test_the_documentation_page_is_served(plain: RunningGateway) -> None:
    assert b"/openapi.json" in ask(f"{plain.url}/docs").body
