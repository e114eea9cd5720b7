"""Every change by an operator is in the audit log, with who made it, from where, and what was in force before."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from unittest.mock import MagicMock

import pytest

from api_gateway.admin.audit_log import AuditAction
from api_gateway.clients.records import OutcomeUnknown
from api_gateway.errors import ChangeUnconfirmed
from tests.kit import Answer, RunningGateway, ask, in_front_of, running_gateway

TOKEN, READER = "correct-horse-battery-staple", "correct-horse-battery-reader"
CHANGES: list[tuple[str, str, dict[str, Any] | None, AuditAction]] = [
    ("POST", "/clients/acme/tier", {"tier": "BASIC"}, AuditAction.TIER_SET),
    ("POST", "/clients/acme/grants", {"tier": "BASIC", "duration_seconds": 60}, AuditAction.GRANT_SET),
    ("DELETE", "/clients/acme/grants", None, AuditAction.GRANT_ENDED),
    ("POST", "/clients/acme/reset", {}, AuditAction.BUCKETS_FILLED),
    (
        "POST",
        "/clients/acme/keys",
        {"label": "ci", "expires_in_seconds": 60, "routes": ["all"]},
        AuditAction.KEY_CREATED,
    ),
    ("POST", "/clients/acme/keys/{key}/rotate", {}, AuditAction.KEY_ROTATED),
    ("DELETE", "/clients/acme/keys/{key}", None, AuditAction.KEY_REVOKED),
    ("POST", "/clients/acme/verified-only", {"verified_only": True}, AuditAction.PROOF_SET),
    ("DELETE", "/clients/acme", None, AuditAction.CLIENT_REMOVED),
    ("POST", "/circuit-breakers/up", {"mode": "observe", "comment": "why"}, AuditAction.BREAKER_MODE_SET),
]
FREE, BASIC = {"tier": "FREE", "tokens": 100_000}, {"tier": "BASIC", "tokens": 50}
KEY = {"key": "an id", "expires_at": None, "routes": None}
NEW_KEY = {"label": "ci", "expires_at": "a time", "routes": ["all"]}
PROVED, BARE = {"verified_only": True}, {"verified_only": False}
# What is recorded before and after each of `CHANGES`, which are made in their order.
RECORDED: dict[AuditAction, tuple[Any, Any]] = {
    AuditAction.TIER_SET: (FREE, BASIC),
    AuditAction.GRANT_SET: (BASIC | {"until": None}, BASIC | {"until": "a time"}),
    AuditAction.GRANT_ENDED: (BASIC | {"until": "a time"}, BASIC | {"until": None}),
    AuditAction.BUCKETS_FILLED: ({"tokens": [50]}, {"tokens": [50]}),
    AuditAction.KEY_CREATED: (BARE, KEY | NEW_KEY | BARE),
    AuditAction.KEY_ROTATED: (
        KEY | {"label": "before"},
        KEY | {"label": "before", "previous_expires_at": "a time"},
    ),
    AuditAction.KEY_REVOKED: (KEY | {"label": "before", "expires_at": "a time"} | BARE, BARE),
    AuditAction.PROOF_SET: (BARE, PROVED),
    AuditAction.CLIENT_REMOVED: (
        BASIC | {"registered": "BASIC", "until": None, "keys": ["an id", "an id"]} | PROVED,
        FREE | {"registered": None, "until": None, "keys": []} | BARE,
    ),
    AuditAction.BREAKER_MODE_SET: (
        {"mode": "auto", "comment": ""},
        {"mode": "observe", "since": "a time", "comment": "why", "set_by": "token 'alice', from 127.0.0.1"},
    ),
}


def shape(value: Any, name: str = "") -> Any:
    """Return a recorded value with words instead of times and ids of keys."""
    if isinstance(value, dict):
        return {one: shape(inner, one) for one, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner, name) for inner in value]
    if value is not None and name in ("until", "since", "expires_at", "previous_expires_at"):
        return "a time" if datetime.fromisoformat(value).tzinfo else value
    return "an id" if name in ("key", "keys") else value


# Tested with gateways that have a file or quotas: `process/test_reload.py`, `wire/test_quotas.py`.
ELSEWHERE = {
    ("POST", "/reload"): AuditAction.CONFIGURATION_RELOADED,
    ("POST", "/clients/{client_id}/quotas/{name}/top-up"): AuditAction.QUOTA_CHANGED,
    ("POST", "/clients/{client_id}/quotas/{name}/carry-over"): AuditAction.QUOTA_CHANGED,
    ("POST", "/clients/{client_id}/quotas/{name}/reset"): AuditAction.QUOTA_CHANGED,
    ("POST", "/limits/{name}/buckets/top-up"): AuditAction.QUOTA_CHANGED,
    ("POST", "/limits/{name}/buckets/carry-over"): AuditAction.QUOTA_CHANGED,
    ("POST", "/limits/{name}/buckets/reset"): AuditAction.BUCKETS_FILLED,
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    sections = in_front_of("http://127.0.0.1:9")
    sections["tiers"]["BASIC"] = {"rate": 5, "capacity": 50}
    sections["admin"] = {
        "tokens": {"alice": {"token": TOKEN, "role": "operate"}, "bob": {"token": READER, "role": "read"}}
    }
    sections["limits"] = [
        {"name": "monthly", "key": "client", "quota": 1000, "period": "month"},
        {"name": "by-route", "key": "route", "rate": 5, "capacity": 50},
    ]
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


def test_each_change_is_recorded_with_what_was_before_and_what_is_after(gateway: RunningGateway) -> None:
    """One after another, as each begins with what the one before it left."""
    created = call(gateway, "POST", "/clients/acme/keys", {"label": "before", "verified_only": False})
    key = created.json()["id"]
    for method, path, body, action in CHANGES:
        answer = call(gateway, method, path.format(key=key), body, **{"X-Request-ID": f"request-{action}"})
        (entry,) = last(gateway)
        assert answer.status in (200, 201), answer.body
        assert answer.headers["x-request-id"] == f"request-{action}"
        assert entry["request_id"] == f"request-{action}"
        assert (entry["operator"], entry["address"], entry["action"]) == ("alice", "127.0.0.1", action)
        assert entry["subject"] == ("up" if path.startswith("/circuit-breakers") else "acme")
        assert [shape(entry["before"]), shape(entry["after"])] == list(RECORDED[action]), action


def test_the_first_key_of_a_client_changes_that_its_bare_id_is_accepted(gateway: RunningGateway) -> None:
    call(gateway, "POST", "/clients/fresh/keys", {"label": "ci"})
    (entry,) = last(gateway)
    assert (entry["before"], entry["after"]["verified_only"]) == (BARE, True)


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


UNCONFIRMED: list[tuple[str, str, dict[str, Any] | None, AuditAction, str]] = [
    *((method, path, body, action, "") for method, path, body, action in CHANGES[:-1]),
    ("POST", "/clients/acme/quotas/monthly/reset", None, AuditAction.QUOTA_CHANGED, ""),
    ("POST", "/clients/acme/quotas/monthly/top-up", {"amount": 5}, AuditAction.QUOTA_CHANGED, ""),
    ("POST", "/clients/acme/quotas/monthly/carry-over", {"amount": 5}, AuditAction.QUOTA_CHANGED, ""),
    ("POST", "/limits/monthly/buckets/reset", {"key": ["acme"]}, AuditAction.QUOTA_CHANGED, "monthly: acme"),
    ("POST", "/limits/by-route/buckets/reset", {"key": ["all"]}, AuditAction.BUCKETS_FILLED, "by-route: all"),
]


def test_a_change_that_may_have_been_made_is_recorded_as_unconfirmed(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response says so, too, and names the endpoint that shows what is in force."""
    key = call(gateway, "POST", "/clients/acme/keys", {"label": "before"}).json()["id"]
    context = gateway.server._app.state.admin_context

    async def lost(*_: Any, **__: Any) -> None:
        raise OutcomeUnknown("no response")

    async def unconfirmed(*_: Any, **__: Any) -> None:
        raise ChangeUnconfirmed(retry_after=1)

    monkeypatch.setattr(context.clients._store, "write", lost)
    limiter = MagicMock(wraps=context.limiter)  # the compiled variant has no attributes to replace
    limiter.refill = unconfirmed
    monkeypatch.setattr(context, "limiter", limiter)
    monkeypatch.setattr(type(context.quotas()), "adjust", unconfirmed)
    for method, path, body, action, subject in UNCONFIRMED:
        answer = call(gateway, method, path.format(key=key), body)
        assert answer.status == 503, path
        assert "retry-after" in answer.headers
        words = answer.json()["detail"]
        assert words.startswith("The change may or may not have been made: no response from "), words
        assert " GET /" in words
        assert words.endswith(" when the store is available again.")
        (entry,) = last(gateway)
        assert (entry["action"], entry["subject"]) == (action, subject or "acme")
        assert (entry["after"], entry["confirmed"]) == (None, False)
        assert entry["before"]
    monkeypatch.undo()
    assert call(gateway, "POST", "/clients/acme/verified-only", {"verified_only": False}).status == 200
    assert last(gateway)[0]["confirmed"] is True


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
