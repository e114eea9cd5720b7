"""The operator's endpoints: who may use them, and that the published schema tells the truth."""

from collections.abc import Iterator
from typing import Any

import pytest

from api_gateway import models
from tests.kit import RunningGateway, ask, in_front_of, running_gateway

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


def test_health_tells_others_the_status_word_only(tokened: RunningGateway) -> None:
    assert set(ask(f"{tokened.url}/health").json()) == {"status"}
    full = ask(f"{tokened.url}/health", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert {"status", "version", "uptime", "upstreams", "limits"} == set(full)
    assert full["limits"]["mode"] == "memory"


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
