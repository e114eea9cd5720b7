"""Every change by an operator is in the audit log, with who made it, from where, and what was in force before."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from api_gateway.admin.audit_log import AuditAction
from tests.kit import Answer, RunningGateway, ask, in_front_of, running_gateway

TOKEN, READER = "correct-horse-battery-staple", "correct-horse-battery-reader"
CHANGES: list[tuple[str, str, dict[str, Any] | None, AuditAction]] = [
    ("POST", "/clients/acme/tier", {"tier": "BASIC"}, AuditAction.TIER_SET),
    ("POST", "/clients/acme/grants", {"tier": "BASIC", "duration_seconds": 60}, AuditAction.GRANT_SET),
    ("DELETE", "/clients/acme/grants", None, AuditAction.GRANT_ENDED),
    ("POST", "/clients/acme/reset", {}, AuditAction.BUCKETS_FILLED),
    ("POST", "/clients/acme/keys", {"label": "ci"}, AuditAction.KEY_CREATED),
    ("POST", "/clients/acme/keys/{key}/rotate", {}, AuditAction.KEY_ROTATED),
    ("DELETE", "/clients/acme/keys/{key}", None, AuditAction.KEY_REVOKED),
    ("POST", "/clients/acme/verified-only", {"verified_only": True}, AuditAction.PROOF_SET),
    ("DELETE", "/clients/acme", None, AuditAction.CLIENT_REMOVED),
    ("POST", "/circuit-breakers/up", {"mode": "observe", "comment": "why"}, AuditAction.BREAKER_MODE_SET),
]
# Tested with gateways that have a file or quotas: `process/test_reload.py`, `wire/test_quotas.py`.
ELSEWHERE = {
    ("POST", "/reload"): AuditAction.CONFIGURATION_RELOADED,
    ("POST", "/clients/{client_id}/quotas/{name}/top-up"): AuditAction.QUOTA_CHANGED,
    ("POST", "/clients/{client_id}/quotas/{name}/carry-over"): AuditAction.QUOTA_CHANGED,
    ("POST", "/clients/{client_id}/quotas/{name}/reset"): AuditAction.QUOTA_CHANGED,
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    sections = in_front_of("http://127.0.0.1:9")
    sections["tiers"]["BASIC"] = {"rate": 5, "capacity": 50}
    sections["admin"] = {
        "tokens": {"alice": {"token": TOKEN, "role": "operate"}, "bob": {"token": READER, "role": "read"}}
    }
    sections["identity"] = {"sources": ["api_key", "header", "address"]}
    with running_gateway(sections, tmp_path_factory.mktemp("audit")) as running:
        yield running


def call(gateway: RunningGateway, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **headers}
    return ask(
        gateway.url + path, method=method, headers=sent, body=None if body is None else json.dumps(body).encode()
    )


def last(gateway: RunningGateway, count: int = 1) -> list[dict[str, Any]]:
    view = call(gateway, "GET", f"/audit?limit={count}")
    assert view.status == 200
    entries: list[dict[str, Any]] = view.json()["entries"]
    return entries


@pytest.fixture(scope="module")
def key(gateway: RunningGateway) -> str:
    created = call(gateway, "POST", "/clients/acme/keys", {"label": "before"})
    return str(created.json()["id"])


def test_the_list_of_changes_is_complete(gateway: RunningGateway) -> None:
    """Each operation that is not a GET is in the list, except those that change nothing."""
    schema = call(gateway, "GET", "/openapi.json").json()
    operations = {
        (method.upper(), path)
        for path, methods in schema["paths"].items()
        for method in methods
        if method not in ("get", "head")
    }
    tested = {
        (method, path.replace("acme", "{client_id}").replace("{key}", "{key_id}").replace("/up", "/{name}"))
        for method, path, _, _ in CHANGES
    }
    assert operations - {("POST", "/explain")} == tested | set(ELSEWHERE)
    assert {action for *_, action in CHANGES} | set(ELSEWHERE.values()) == set(AuditAction)


@pytest.mark.parametrize(("method", "path", "body", "action"), CHANGES)
def test_a_change_is_recorded(
    gateway: RunningGateway, key: str, method: str, path: str, body: Any, action: AuditAction
) -> None:
    answer = call(gateway, method, path.format(key=key), body, **{"X-Request-ID": f"request-{action}"})
    (entry,) = last(gateway)
    assert answer.status in (200, 201), answer.body
    assert answer.headers["x-request-id"] == f"request-{action}"
    assert entry["request_id"] == f"request-{action}"
    assert (entry["operator"], entry["address"], entry["action"]) == ("alice", "127.0.0.1", action)
    assert entry["subject"] == ("up" if path.startswith("/circuit-breakers") else "acme")
    if action is AuditAction.TIER_SET:
        assert (entry["before"]["tier"], entry["after"]["tier"]) == ("FREE", "BASIC")
    if action is AuditAction.BREAKER_MODE_SET:
        assert (entry["before"]["mode"], entry["after"]["mode"]) == ("auto", "observe")
        assert entry["after"]["comment"] == "why"


def test_no_secret_is_recorded(gateway: RunningGateway) -> None:
    secret = call(gateway, "POST", "/clients/other/keys", {"label": "ci"}).json()["key"]
    (entry,) = last(gateway)
    assert entry["action"] == "key_created"
    assert secret not in json.dumps(entry)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/clients/acme/tier", {"tier": "NONE"}),
        ("POST", "/circuit-breakers/none", {"mode": "observe"}),
        ("DELETE", "/clients/acme/keys/none", None),
        ("POST", "/reload", None),  # fails: there is no file
        ("POST", "/explain", {"method": "GET", "path": "/api/x"}),
        ("GET", "/clients/acme", None),
    ],
)
def test_what_changes_nothing_is_not_recorded(gateway: RunningGateway, method: str, path: str, body: Any) -> None:
    before = last(gateway)
    call(gateway, method, path, body)
    assert last(gateway) == before


def test_refused_operators_change_nothing_and_readers_may_read(gateway: RunningGateway) -> None:
    before = last(gateway)
    reader = {"Authorization": f"Bearer {READER}"}
    assert call(gateway, "POST", "/clients/acme/tier", {"tier": "BASIC"}, **reader).status == 403
    assert call(gateway, "GET", "/audit", **reader).status == 200
    assert ask(gateway.url + "/audit").status == 401
    assert last(gateway) == before


@pytest.mark.parametrize("limit", ["0", "1001", "x"])
def test_a_wrong_limit_is_refused(gateway: RunningGateway, limit: str) -> None:
    answer = call(gateway, "GET", f"/audit?limit={limit}")
    assert answer.status == 422
    assert "limit" in answer.json()["detail"]


def test_changes_are_counted(gateway: RunningGateway) -> None:
    call(gateway, "POST", "/clients/counted/tier", {"tier": "BASIC"})
    text = call(gateway, "GET", "/metrics?format=prometheus").body.decode()
    counts = {
        line.split('"')[1]: float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("gateway_operator_changes_total{")
    }
    assert set(counts) == set(map(str, AuditAction))
    assert counts["tier_set"] >= 1
