"""Who a client is, on the wire: ids that need a proof, on the fast path and on the ASGI path."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from api_gateway.assembly import credential_watch
from api_gateway.clients.api_keys import new_key
from api_gateway.clients.records import MAX_VALID_KEYS
from tests.kit import (
    PATIENCE,
    Answer,
    FakeClocks,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    _config,
    ask,
    eventually,
    in_front_of,
    reason,
    running_gateway,
)

Gateway = Callable[[dict[str, Any]], RunningGateway]
VERIFIED = {"clients": {"acme": {"tier": "PREMIUM", "verified_only": True}, "open": {"tier": "PREMIUM"}}}


def told(answer: Answer) -> tuple[int, str | None]:
    """Return status and reason of a response."""
    return answer.status, answer.json()["reason"] if answer.status >= 400 else None


@pytest.mark.parametrize("method", ["GET", "TRACK"])
def test_an_id_that_must_be_proved_is_refused_on_both_paths(gateway: Gateway, up: RawUpstream, method: str) -> None:
    running = gateway(in_front_of(up.url) | VERIFIED)
    for _ in range(3):
        answer = ask(f"{running.url}/api/x", method=method, headers={"X-Client-ID": "acme"})
        assert told(answer) == (401, "credentials_required")
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="api-gateway"'
        assert "'acme'" in answer.json()["detail"]
        assert ask(f"{running.url}/api/x", method=method, headers={"X-Client-ID": "open"}).status == 200
    assert len(up.requests) == 3


def test_observing_refuses_nothing(gateway: Gateway, up: RawUpstream) -> None:
    running = gateway(in_front_of(up.url) | VERIFIED | {"identity": {"mode": "observe"}})
    for _ in range(3):
        assert ask(f"{running.url}/api/x", headers={"X-Client-ID": "acme"}).status == 200


def test_what_observing_admits_is_counted_and_logged(
    gateway: Gateway, up: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    running = gateway(in_front_of(up.url) | VERIFIED | {"identity": {"mode": "observe"}})
    for _ in range(3):
        assert ask(f"{running.url}/api/x", headers={"X-Client-ID": "acme"}).status == 200
    assert ask(f"{running.url}/api/x", headers={"X-API-Key": "agw_wrong", "X-Client-ID": "open"}).status == 200
    with RawClient(running.port) as client:
        client.request("GET", headers=("X-API-Key: agw_wrong",) * 2)
        assert client.answer().status == 200
    call(running, "POST", "/explain", {"path": "/api/x", "client_id": "acme"})
    counts = ask(f"{running.url}/metrics").json()["identity"]
    assert counts["would_refuse"] == {
        "credentials_required": 3,
        "credentials_invalid": 1,
        "credentials_insufficient": 0,
        "client_id_invalid": 0,
        "bad_request": 1,
        "store_unavailable": 0,
        "issuer_unavailable": 0,
    }
    assert counts["bare_client_ids"] == {"admitted": 3, "refused": 0}
    text = ask(f"{running.url}/metrics?format=prometheus").body.decode()
    assert 'gateway_identity_would_refuse_total{reason="credentials_required"} 3.0' in text
    assert 'gateway_identity_bare_client_ids_total{result="admitted"} 3.0' in text
    first = call(running, "GET", "/clients?sort=bare")["clients"][0]
    assert (first["client_id"], first["bare"]) == ("acme", 3)
    assert "would be refused: credentials_required" in caplog.text


def test_explain_tells_which_ids_anyone_can_claim(gateway: Gateway, up: RawUpstream) -> None:
    running = gateway(in_front_of(up.url) | VERIFIED)
    made = call(running, "POST", "/clients/acme/keys", {})
    for name, outcome, verified_only in (("acme", "refused", None), ("open", "allowed", False)):
        told = call(running, "POST", "/explain", {"path": "/api/x", "client_id": name})
        assert told["result"]["decision"] == outcome
        assert told["client"]["proved_by"] is None
        assert ("a credential must prove" in told["client"]["detail"]) is (outcome == "refused")
        if verified_only is not None:
            assert told["client"]["verified_only"] is verified_only
    with_key = call(running, "POST", "/explain", {"path": "/api/x", "client_id": None, "key_id": made["id"]})
    assert with_key["result"]["decision"] == "allowed"
    assert (with_key["client"]["id"], with_key["client"]["proved_by"]) == ("acme", "api_key")
    assert "identified by api_key" in with_key["client"]["detail"]
    assert made["key"] not in json.dumps(with_key)
    answer = ask(
        f"{running.url}/explain",
        method="POST",
        body=b'{"path": "/api/x", "client_id": null, "key_id": "none"}',
        headers={"Content-Type": "application/json"},
    )
    assert (answer.status, "no API key 'none'" in answer.json()["detail"]) == (422, True)
    assert call(running, "GET", "/clients/acme")["verified_only"] is True
    assert call(running, "GET", "/clients/open")["verified_only"] is False
    assert ask(f"{running.url}/metrics").json()["identity"]["bare_client_ids"] == {"admitted": 0, "refused": 0}


# API keys

ROUTES: list[dict[str, Any]] = [
    {"name": "all", "path": "/api", "upstream": "up"},
    {"name": "kept", "path": "/api/kept", "upstream": "up", "forward_credentials": True},
]


@pytest.fixture
def keyed(gateway: Gateway, up: RawUpstream) -> RunningGateway:
    """A gateway without configured clients."""
    return gateway(in_front_of(up.url) | {"routes": ROUTES})


def call(running: RunningGateway, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Call an operator endpoint, which must succeed."""
    given = None if body is None else json.dumps(body).encode()
    answer = ask(f"{running.url}{path}", method=method, body=given, headers={"Content-Type": "application/json"})
    assert answer.status < 300, answer.body
    return answer.json()


def basic(user: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:".encode()).decode()


def test_a_key_identifies_its_client_wherever_it_is_sent(keyed: RunningGateway, up: RawUpstream) -> None:
    call(keyed, "POST", "/clients/acme/tier", {"tier": "PREMIUM"})
    made = call(keyed, "POST", "/clients/acme/keys", {"label": "laptop"})
    key = made["key"]
    assert (made["client_id"], made["label"], made["verified_only"]) == ("acme", "laptop", True)
    for method in ("GET", "TRACK"):
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}, {"Authorization": basic(key)}):
            for path in ("/api/x", "/api/kept/x"):
                for _ in range(2):
                    answer = ask(f"{keyed.url}{path}", method=method, headers=headers)
                    assert answer.status == 200
                    assert answer.headers["X-RateLimit-Limit"] == "200", "the tier of the client"
                    name, value = next(iter(headers.items()))
                    assert up.requests[-1].all(name) == ([value.encode()] if "kept" in path else [])
                    assert "kept" in path or key.encode() not in up.requests[-1].head
    told_now = ask(f"{keyed.url}/api/x", headers={"X-Client-ID": "acme"})
    assert told(told_now) == (401, "credentials_required")


def test_a_list_shows_everything_but_the_key(keyed: RunningGateway) -> None:
    made = call(keyed, "POST", "/clients/acme/keys", {"label": "ci", "expires_in_seconds": 3600, "routes": ["all"]})
    assert ask(f"{keyed.url}/api/x", headers={"X-API-Key": made["key"]}).status == 200
    answer = ask(f"{keyed.url}/clients/acme/keys")
    assert made["key"][4:] not in answer.body.decode()
    (shown,) = answer.json()["keys"]
    assert shown["id"] == made["id"] == hashlib.sha256(made["key"].encode()).hexdigest()[:16]
    assert (shown["label"], shown["expires_at"], shown["routes"]) == ("ci", made["expires_at"], ["all"])
    assert shown["last_used_at"].endswith(":00Z") or ":00.000" in shown["last_used_at"]
    assert answer.json()["verified_only"] is True


def test_a_key_for_other_routes_is_refused_with_403(keyed: RunningGateway) -> None:
    made = call(keyed, "POST", "/clients/acme/keys", {"routes": ["kept"]})
    for _ in range(2):
        assert ask(f"{keyed.url}/api/kept", headers={"X-API-Key": made["key"]}).status == 200
        answer = ask(f"{keyed.url}/api/x", headers={"X-API-Key": made["key"]})
        assert told(answer) == (403, "credentials_insufficient")


def test_a_rotated_key_and_its_successor_are_both_valid_for_the_overlap(keyed: RunningGateway) -> None:
    old = call(keyed, "POST", "/clients/acme/keys", {"label": "ci"})
    new = call(keyed, "POST", f"/clients/acme/keys/{old['id']}/rotate", {"overlap_seconds": 600})
    for one in (old, new):
        assert ask(f"{keyed.url}/api/x", headers={"X-API-Key": one["key"]}).status == 200
    assert (new["label"], new["previous_id"]) == ("ci", old["id"])
    at_once = call(keyed, "POST", f"/clients/acme/keys/{new['id']}/rotate", {"overlap_seconds": 0})
    assert told(ask(f"{keyed.url}/api/x", headers={"X-API-Key": new["key"]})) == (401, "credentials_invalid")
    assert ask(f"{keyed.url}/api/x", headers={"X-API-Key": at_once["key"]}).status == 200


def rotated_again(running: RunningGateway, key_id: str, **body: float) -> str:
    """Rotate a key that has been rotated; return the detail of the refusal."""
    headers = {"Content-Type": "application/json"}
    path = f"{running.url}/clients/acme/keys/{key_id}/rotate"
    answer = ask(path, method="POST", body=json.dumps(body).encode(), headers=headers)
    assert told(answer) == (409, "conflict")
    detail: str = answer.json()["detail"]
    return detail


def test_a_rotation_that_is_sent_again_is_refused_and_names_the_key_to_rotate(keyed: RunningGateway) -> None:
    """Its response may be lost. Another successor would inherit the end of the overlap as its expiry."""
    old = call(keyed, "POST", "/clients/acme/keys", {"label": "ci"})
    lost = call(keyed, "POST", f"/clients/acme/keys/{old['id']}/rotate", {"overlap_seconds": 600})
    before = call(keyed, "GET", "/clients/acme/keys")["keys"]
    assert {key["id"]: key["replaced_by"] for key in before} == {old["id"]: lost["id"], lost["id"]: None}
    remedy = "rotate key '{}' with overlap_seconds: 0 if the new key was lost."
    detail = rotated_again(keyed, old["id"])
    assert detail == f"Key '{old['id']}' has been replaced by key '{lost['id']}'; {remedy.format(lost['id'])}"
    listed = call(keyed, "GET", "/clients/acme/keys")["keys"]
    assert [(key["id"], key["expires_at"]) for key in listed] == [(key["id"], key["expires_at"]) for key in before]
    new = call(keyed, "POST", f"/clients/acme/keys/{lost['id']}/rotate", {"overlap_seconds": 0})
    assert new["expires_at"] is None, "as the key that was rotated first"
    codes = [ask(f"{keyed.url}/api/x", headers={"X-API-Key": one["key"]}).status for one in (old, lost, new)]
    assert codes == [200, 401, 200]
    for one in (old, lost):
        assert remedy.format(new["id"]) in rotated_again(keyed, one["id"], overlap_seconds=0)
    call(keyed, "DELETE", f"/clients/acme/keys/{new['id']}")
    assert rotated_again(keyed, old["id"]).endswith("; create a new key.")


def test_of_rotations_of_a_key_at_once_one_is_made(keyed: RunningGateway) -> None:
    old = call(keyed, "POST", "/clients/acme/keys", {})
    path = f"{keyed.url}/clients/acme/keys/{old['id']}/rotate"
    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(path, method="POST", body=b"{}", headers=headers), range(6)))
    assert sorted(answer.status for answer in answers) == [201] + [409] * 5
    (new,) = (answer.json() for answer in answers if answer.status == 201)
    assert all(new["id"] in answer.json()["detail"] for answer in answers if answer.status == 409)
    assert {key["id"] for key in call(keyed, "GET", "/clients/acme/keys")["keys"]} == {old["id"], new["id"]}


def test_a_revoked_key_is_refused_at_once_and_the_id_stays_closed(keyed: RunningGateway) -> None:
    made = call(keyed, "POST", "/clients/acme/keys", {})
    headers = {"Authorization": f"Bearer {made['key']}"}
    for _ in range(3):
        assert ask(f"{keyed.url}/api/x", headers=headers).status == 200
    assert call(keyed, "DELETE", f"/clients/acme/keys/{made['id']}")["keys_left"] == 0
    for method in ("GET", "TRACK"):
        answer = ask(f"{keyed.url}/api/x", method=method, headers=headers)
        assert told(answer) == (401, "credentials_invalid")
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="api-gateway", error="invalid_token"'
        assert made["key"] not in answer.body.decode()
    assert told(ask(f"{keyed.url}/api/x", headers={"X-Client-ID": "acme"})) == (401, "credentials_required")
    call(keyed, "POST", "/clients/acme/verified-only", {"verified_only": False})
    assert ask(f"{keyed.url}/api/x", headers={"X-Client-ID": "acme"}).status == 200


def test_a_client_may_have_keys_and_a_bare_id(keyed: RunningGateway) -> None:
    made = call(keyed, "POST", "/clients/acme/keys", {"verified_only": False})
    assert made["verified_only"] is False
    assert ask(f"{keyed.url}/api/x", headers={"X-Client-ID": "acme"}).status == 200
    assert ask(f"{keyed.url}/api/x", headers={"X-API-Key": made["key"]}).status == 200
    both = {"X-API-Key": made["key"], "X-Client-ID": "initech"}
    assert told(ask(f"{keyed.url}/api/x", headers=both)) == (400, "client_id_invalid")


def test_forgetting_a_client_revokes_its_keys(keyed: RunningGateway) -> None:
    made = call(keyed, "POST", "/clients/acme/keys", {})
    call(keyed, "DELETE", "/clients/acme")
    assert told(ask(f"{keyed.url}/api/x", headers={"X-API-Key": made["key"]})) == (401, "credentials_invalid")
    assert ask(f"{keyed.url}/api/x", headers={"X-Client-ID": "acme"}).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("/clients/acme/keys", {"routes": ["none"]}, 422, "there is no route 'none'"),
        ("/clients/acme/keys", {"routes": []}, 422, "routes"),
        ("/clients/acme/keys", {"expires_at": "2001-01-01T00:00:00Z"}, 422, "in the future"),
        ("/clients/acme/keys", {"expires_at": "2101-01-01T00:00:00Z", "expires_in_seconds": 5}, 422, "got both"),
        ("/clients/acme/keys", {"expires_in_seconds": 0}, 422, "expires_in_seconds"),
        ("/clients/acme/keys", {"label": "a\x1b[2Jb"}, 422, "label"),
        ("/clients/acme/keys", {"label": "a\nb"}, 422, "no control characters"),
        ("/clients/acme/keys/0123456789abcdef/rotate", {}, 404, "has no key '0123456789abcdef'"),
        ("/clients/a%20b/keys", {}, 400, "visible ASCII"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(
    keyed: RunningGateway, path: str, body: dict[str, Any], status: int, part: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = ask(f"{keyed.url}{path}", method="POST", body=json.dumps(body).encode(), headers=headers)
    assert answer.status == status
    assert part in answer.json()["detail"]


def test_the_number_of_keys_of_a_client_is_limited(keyed: RunningGateway) -> None:
    for _ in range(MAX_VALID_KEYS):
        call(keyed, "POST", "/clients/acme/keys", {})
    headers, body = {"Content-Type": "application/json"}, b'{"verified_only": false}'
    answer = ask(f"{keyed.url}/clients/acme/keys", method="POST", body=body, headers=headers)
    assert answer.status == 422
    assert "32 valid keys" in answer.json()["detail"]
    assert call(keyed, "GET", "/clients/acme/keys")["verified_only"], "nothing else is changed"


def test_a_rotation_keeps_to_the_number_of_keys(keyed: RunningGateway) -> None:
    """Otherwise rotations within the overlap would add valid keys without end."""
    made = [call(keyed, "POST", "/clients/acme/keys", {}) for _ in range(MAX_VALID_KEYS)]
    path = f"/clients/acme/keys/{made[0]['id']}/rotate"
    answer = ask(f"{keyed.url}{path}", method="POST", body=b"{}", headers={"Content-Type": "application/json"})
    assert answer.status == 422
    assert "overlap_seconds: 0" in answer.json()["detail"]
    new = call(keyed, "POST", path, {"overlap_seconds": 0})
    assert ask(f"{keyed.url}/api/x", headers={"X-API-Key": new["key"]}).status == 200
    valid = [key for key in call(keyed, "GET", "/clients/acme/keys")["keys"] if not key["expired"]]
    assert len(valid) == MAX_VALID_KEYS


def test_keys_that_expired_long_ago_are_removed_by_any_new_key(up: RawUpstream, tmp_path: Path) -> None:
    """Also by a rotation: a client whose key is only ever rotated would else keep all of them."""
    fake = FakeClocks()
    with running_gateway(in_front_of(up.url), tmp_path, fake.clocks) as running:
        key = call(running, "POST", "/clients/acme/keys", {})
        for _ in range(3):
            key = call(running, "POST", f"/clients/acme/keys/{key['id']}/rotate", {"overlap_seconds": 60})
            fake.advance(31 * 86_400.0)
        key = call(running, "POST", f"/clients/acme/keys/{key['id']}/rotate", {"overlap_seconds": 60})
        assert len(call(running, "GET", "/clients/acme/keys")["keys"]) == 2


def test_a_key_of_the_configuration_is_valid_and_cannot_be_changed_here(gateway: Gateway, up: RawUpstream) -> None:
    key = new_key(b"\1" * 32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    clients = {"acme": {"tier": "PREMIUM", "keys": {"laptop": {"digest": f"sha256:{digest}"}}}}
    running = gateway(in_front_of(up.url) | {"clients": clients})
    answer = ask(f"{running.url}/api/x", headers={"X-API-Key": key})
    assert (answer.status, answer.headers["X-RateLimit-Limit"]) == (200, "200")
    assert told(ask(f"{running.url}/api/x", headers={"X-Client-ID": "acme"})) == (401, "credentials_required")
    (shown,) = call(running, "GET", "/clients/acme/keys")["keys"]
    assert (shown["label"], shown["configured"], shown["id"]) == ("laptop", True, digest[:16])
    refused = ask(f"{running.url}/clients/acme/keys/{digest[:16]}", method="DELETE")
    assert (refused.status, "configuration" in refused.json()["detail"]) == (422, True)


def test_keys_are_not_created_where_they_are_not_accepted(gateway: Gateway, up: RawUpstream) -> None:
    running = gateway(in_front_of(up.url) | {"identity": {"sources": ["header", "address"]}})
    headers = {"Content-Type": "application/json"}
    answer = ask(f"{running.url}/clients/acme/keys", method="POST", body=b"{}", headers=headers)
    assert (answer.status, "does not name api_key" in answer.json()["detail"]) == (422, True)
    key = new_key(b"\1" * 32)
    assert ask(f"{running.url}/api/x", headers={"X-API-Key": key}).status == 200
    assert up.requests[-1].all("x-api-key") == [key.encode()], "it belongs to the upstream"


def test_keys_of_a_renamed_route_are_named_by_a_reload_a_start_and_their_list(
    up: RawUpstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a key gets 403 from then on, which its client would notice first."""
    sections = in_front_of(up.url) | {"routes": [route.copy() for route in ROUTES]}
    warning = "API keys are limited to routes that do not exist: 'kept' (keys: 1, clients: acme). If"
    unused = "stored API keys prove nothing, and upstreams receive them (keys: 2, clients: "
    running = RunningGateway(sections, tmp_path, read=lambda: _config(sections, tmp_path))
    try:
        made = call(running, "POST", "/clients/acme/keys", {"routes": ["kept", "all"]})
        call(running, "POST", "/clients/other/keys", {"routes": ["all"]})
        call(running, "POST", "/reload")
        assert warning not in caplog.text
        sections["routes"][1]["name"] = "renamed"
        call(running, "POST", "/reload")
        eventually(lambda: caplog.text.count(warning) == 1, "the reload names it")
        answer = ask(f"{running.url}/api/kept", headers={"X-API-Key": made["key"]})
        assert told(answer) == (403, "credentials_insufficient")
        (shown,) = call(running, "GET", "/clients/acme/keys")["keys"]
        assert (shown["routes"], shown["unknown_routes"]) == (["kept", "all"], ["kept"])
        (shown,) = call(running, "GET", "/clients/other/keys")["keys"]
        assert (shown["routes"], shown["unknown_routes"]) == (["all"], [])
    finally:
        running.stop()
    caplog.clear()
    sections["identity"] = {"sources": ["header", "address"]}
    with running_gateway(sections, tmp_path):
        eventually(lambda: caplog.text.count(unused) == 1, "the start names the keys")
    del sections["identity"]
    caplog.clear()
    with running_gateway(sections, tmp_path):
        eventually(lambda: caplog.text.count(warning) == 1, "the start names the key")


def test_keys_survive_a_restart(up: RawUpstream, tmp_path: Path) -> None:
    with running_gateway(in_front_of(up.url), tmp_path) as running:
        made = call(running, "POST", "/clients/acme/keys", {"label": "ci"})
        assert ask(f"{running.url}/api/x", headers={"X-API-Key": made["key"]}).status == 200
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if path.name == "clients.sqlite3"]
    assert not [path for path in files if made["key"][4:].encode() in path.read_bytes()]
    with running_gateway(in_front_of(up.url), tmp_path) as running:
        assert ask(f"{running.url}/api/x", headers={"X-API-Key": made["key"]}).status == 200
        (shown,) = call(running, "GET", "/clients/acme/keys")["keys"]
        assert shown["last_used_at"] is not None


# Streams and tunnels

HEAD = b"HTTP/1.1 200 OK\r\n%b\r\n\r\n"
STREAMS = {
    "a download": (HEAD % b"Content-Length: 1000" + b"begun", ("GET", ())),
    "a chunked download": (HEAD % b"Transfer-Encoding: chunked" + b"5\r\nbegun\r\n", ("GET", ())),
    "an event stream": (
        HEAD % b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked" + b"5\r\nbegun\r\n",
        ("GET", ()),
    ),
    "a download on the ASGI path": (HEAD % b"Content-Length: 1000" + b"begun", ("TRACK", ())),
    "an event stream on the ASGI path": (
        HEAD % b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked" + b"5\r\nbegun\r\n",
        ("TRACK", ()),
    ),
    "a tunnel": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nbegun",
        ("GET", ("Upgrade: websocket", "Connection: Upgrade")),
    ),
}


@pytest.fixture
def _quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway looks at its open exchanges more often than once a second."""
    monkeypatch.setattr(credential_watch, "INTERVAL", 0.05)


@pytest.mark.parametrize(
    ("name", "ending"),
    [*((name, "revoked") for name in STREAMS), ("an event stream", "expired"), ("a tunnel", "expired")],
)
@pytest.mark.usefixtures("_quick_watch")
def test_a_stream_ends_with_its_key(gateway: Gateway, up: RawUpstream, name: str, ending: str) -> None:
    """That of another key goes on, and so does a request that has no response yet."""
    response, (method, fields) = STREAMS[name]
    running = gateway(in_front_of(up.url))
    released = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        if b"/slow" in request.line:
            released.wait(PATIENCE)
            wire.send(HEAD % b"Content-Length: 2" + b"ok")
        else:
            wire.send(response)
            released.wait(PATIENCE)

    up.behave = behave
    terms = {"expires_in_seconds": 3} if ending == "expired" else {}
    made, other = (call(running, "POST", "/clients/acme/keys", one) for one in (terms, {}))
    with RawClient(running.port) as ended, RawClient(running.port) as going, RawClient(running.port) as slow:
        for client, key in ((ended, made), (going, other)):
            client.request(method, "/api/x", (f"X-API-Key: {key['key']}", *fields))
            assert client.read_until(b"begun") is not None
        slow.request("GET", "/api/slow", (f"X-API-Key: {made['key']}",))
        if ending == "revoked":
            call(running, "DELETE", f"/clients/acme/keys/{made['id']}")
        ended.read_exactly(10_000)  # to the end of the connection
        going.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            going.fill()
        released.set()
        assert slow.answer().status == 200
    live = running.live.recorder
    eventually(lambda: live.refusals["credentials_invalid"] == 1, "the end has its reason")


@pytest.mark.parametrize("name", ["an event stream", "an event stream on the ASGI path"])
@pytest.mark.usefixtures("_quick_watch")
def test_a_stream_that_begins_after_the_only_key_was_revoked_ends_too(
    gateway: Gateway, up: RawUpstream, name: str
) -> None:
    """The request was admitted before and gets its response, but no stream without an end."""
    response, (method, fields) = STREAMS[name]
    running = gateway(in_front_of(up.url))
    released, over = threading.Event(), threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        released.wait(PATIENCE)
        wire.send(response)
        over.wait(PATIENCE)

    up.behave = behave
    made = call(running, "POST", "/clients/acme/keys", {})
    with RawClient(running.port) as late:
        late.request(method, "/api/x", (f"X-API-Key: {made['key']}", *fields))
        eventually(lambda: len(up.requests) > 0, "the upstream has the request")
        call(running, "DELETE", f"/clients/acme/keys/{made['id']}")
        time.sleep(2 * credential_watch.INTERVAL)  # the open exchanges are looked at meanwhile
        released.set()
        assert late.read_until(b"begun") is not None
        late.read_exactly(10_000)  # to the end of the connection
    over.set()


def test_an_operator_endpoint_stores_no_key_as_a_name(keyed: RunningGateway) -> None:
    key = new_key(bytes(32))
    for path, body, expected in (
        (f"/clients/{key}/tier", {"tier": "FREE"}, "client_id_invalid"),
        (f"/clients/x:{key}/keys", {}, "client_id_invalid"),
        ("/clients/acme/keys", {"label": f"was {key}"}, "invalid_value"),
    ):
        answer = ask(
            f"{keyed.url}{path}",
            method="POST",
            body=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        assert answer.json()["reason"] == expected
        assert key not in answer.json()["detail"]


@pytest.mark.parametrize("spelling", ["X-Client-ID", "x-client-id", "X_Client_ID"])
@pytest.mark.parametrize("way", ["fast path", "general parser", "a body in chunks"])
def test_an_id_that_identifies_nobody_is_not_forwarded(
    gateway: Gateway, up: RawUpstream, spelling: str, way: str
) -> None:
    """An upstream could take it for proved."""
    running = gateway(in_front_of(up.url) | {"identity": {"sources": ["api_key", "address"]}})
    more = {
        "fast path": (),
        "general parser": ("X-Odd:  blanks",),
        "a body in chunks": ("Transfer-Encoding: chunked",),
    }
    body = b"2\r\nok\r\n0\r\n\r\n" if way == "a body in chunks" else b""
    with RawClient(running.port) as client:
        for name in ("acme", "other", "acme"):
            client.request("POST" if body else "GET", "/api/x", (f"{spelling}: {name}", *more[way]), body)
            assert client.answer().status == 200
    assert len(up.requests) == 3
    for request in up.requests:
        assert not request.all("x-client-id")
        assert not request.all("x_client_id")


@pytest.mark.parametrize("odd", [(), ("X-Odd:  blanks",)], ids=["plain", "odd"])
@pytest.mark.parametrize("path", ["/api/x", "/api/kept"])
def test_no_credential_and_no_id_is_forwarded_as_a_trailer(
    keyed: RunningGateway, up: RawUpstream, trailing: list[bytes], path: str, odd: tuple[str, ...]
) -> None:
    """Nothing has verified it; also not where credentials are forwarded."""
    key = call(keyed, "POST", "/clients/acme/keys", {})["key"]
    names = ("X-API-Key", "x-api-key", "X_API_Key", "Authorization", "X-Client-ID", "X_Client_ID", "Cookie")
    trailers = "".join(f"{name}: {value}\r\n" for name in names for value in (key, "theirs"))
    fields = (f"X-API-Key: {key}", "Transfer-Encoding: chunked", "Trailer: X-API-Key", *odd)
    with RawClient(keyed.port) as client:
        client.request("POST", path, fields, f"2\r\nok\r\n0\r\n{trailers}X-Late: 1\r\n\r\n".encode())
        assert client.answer().status == 200
    assert trailing == [b"X-Late: 1\r\n\r\n"]
    assert up.requests[-1].head.count(key.encode()) == (path == "/api/kept")


@pytest.mark.parametrize("method", ["GET", "TRACK"])
def test_a_key_in_another_form_is_refused_and_not_forwarded(
    keyed: RunningGateway, up: RawUpstream, method: str
) -> None:
    key = call(keyed, "POST", "/clients/acme/keys", {})["key"]
    forms = (
        *(f"Authorization: Bearer\t{key}", f'Authorization: Bearer "{key}"', f"Authorization: Bearer {key}, x"),
        *(f"X-API-Key: Bearer {key}", f"X_API_Key: {key}", f"X-API_Key: {key}", f"x-api-key: x, {key}"),
        *(f"Authorization: {basic(f'{user}:{key}')}" for user in ("", "u", "us")),
    )
    for form in forms:
        with RawClient(keyed.port) as client:
            for _ in range(2):
                client.request(method, headers=(form, "X-Client-ID: other"))
                assert reason(client.answer()) == (401, "credentials_invalid"), form
    assert not up.requests


@pytest.mark.parametrize("method", ["GET", "TRACK"])
def test_a_request_that_repeats_its_credential_is_malformed_even_if_all_are_valid(
    keyed: RunningGateway, up: RawUpstream, method: str
) -> None:
    """400 `invalid_request` (RFC 6750 section 3.1); but one key in two fields says one thing."""
    first, second = (call(keyed, "POST", "/clients/acme/keys", {})["key"] for _ in range(2))
    bearer, own = (f"Authorization: Bearer {first}", f"X-API-Key: {first}")
    with RawClient(keyed.port) as client:
        for fields in (
            (bearer, bearer),
            (bearer, "Authorization: Basic eDp5"),
            (bearer, f"Authorization: Bearer {second}"),
            (own, own),
            (own, "X-API-Key: theirs"),
            (own, f"Authorization: {basic(second)}"),
        ):
            client.request(method, headers=fields)
            answer = client.answer()
            assert reason(answer) == (400, "bad_request"), fields
            assert answer.all("www-authenticate") == [b'Bearer realm="api-gateway", error="invalid_request"']
            assert first[4:].encode() not in answer.body
        assert not up.requests
        for fields in ((own, bearer), ("Authorization: Basic eDp5",) * 2, ("X-API-Key: theirs",) * 2):
            client.request(method, headers=fields)
            assert client.answer().status == 200, fields
        assert [len(request.all("x-api-key")) for request in up.requests] == [0, 0, 2]
        assert [len(request.all("authorization")) for request in up.requests] == [0, 2, 0]


@pytest.mark.parametrize("method", ["GET", "TRACK"])
def test_a_key_in_the_usual_field_never_reaches_an_upstream_where_another_field_is_configured(
    gateway: Gateway, up: RawUpstream, method: str
) -> None:
    running = gateway(in_front_of(up.url) | {"identity": {"api_key": {"header": "X-Token"}}})
    key = call(running, "POST", "/clients/acme/keys", {})["key"]
    with RawClient(running.port) as client:
        for name in ("X-API-Key", "x_api_key"):
            client.request(method, headers=(f"{name}: {key}",))
            answer = client.answer()
            assert reason(answer) == (401, "credentials_invalid")
            assert b"send the key in X-Token" in answer.body
            assert not up.requests
        for value in ("theirs", "agw", "theirs"):
            client.request(method, headers=(f"X-API-Key: {value}", f"X-Token: {key}"))
            assert client.answer().status == 200
            assert up.requests[-1].all("x-api-key") == [value.encode()], "it belongs to the upstream"
            assert not up.requests[-1].all("x-token")


@pytest.mark.parametrize("method", ["GET", "TRACK"])
def test_a_key_outside_the_fields_of_keys_identifies_nobody(
    keyed: RunningGateway, up: RawUpstream, method: str
) -> None:
    """It belongs to the upstream, as the page says; `Proxy-Authorization` is for this hop alone."""
    call(keyed, "POST", "/clients/acme/tier", {"tier": "PREMIUM"})
    key = call(keyed, "POST", "/clients/acme/keys", {})["key"]
    with RawClient(keyed.port) as client:
        for path, field, arrives in (
            (f"/api/x?api_key={key}", "X-Other: 1", True),
            ("/api/x", f"Cookie: key={key}", True),
            ("/api/x", f"X-Other: {key}", True),
            ("/api/x", f"Proxy-Authorization: Bearer {key}", False),
        ):
            client.request(method, path, (field,))
            answer = client.answer()
            assert answer.status == 200
            assert answer.all("x-ratelimit-limit") != [b"200"], "not the tier of the client"
            assert (key.encode() in up.requests[-1].head) is arrives, (path, field)
