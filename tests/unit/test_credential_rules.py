"""Rules between the API keys of the configuration, the ids that must be proved, and the sources that prove them."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from api_gateway.clients.api_keys import ApiKey, KnownKey
from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.records import Change, KeyChange
from api_gateway.clients.unusable_keys import warning_of
from api_gateway.config import load_config
from api_gateway.eventloop.steps import run_at_once
from api_gateway.process import key_commands
from api_gateway.process.key_commands import run_keys
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import access_warnings
from tests.cases import each
from tests.unit.test_client_registry import HeldStore, following

DIGEST, OTHER = "9f" * 32, "0a" * 32


def client(**keys: str) -> dict[str, Any]:
    return {"keys": {label: {"digest": digest} for label, digest in keys.items()}}


@each(
    ("clients", "problem"),
    [
        (
            {"acme": client(a=DIGEST), "b": client(x=DIGEST)},
            "clients.b.keys.x.digest: is the same key as clients.acme.keys.a; remove one of them",
        ),
        (
            {"acme": client(a=OTHER, b=DIGEST, c=f"sha256:{DIGEST.upper()}")},
            "clients.acme.keys.c.digest: is the same key as clients.acme.keys.b; remove one of them",
        ),
    ],
)
def test_a_key_that_is_configured_twice_is_refused_with_both_places(clients: dict[str, Any], problem: str) -> None:
    """Else the last client would get it, and the first one would silently lose its key and its protection."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"clients": clients})
    assert caught.value.problems == [f"command line: {problem}"]


def test_of_a_key_that_is_configured_twice_and_wrong_only_the_mistake_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"clients": {"acme": client(a="short"), "b": client(x="short")}})
    assert not [one for one in caught.value.problems if "same key" in one]


def test_a_key_in_several_places_is_named_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        f"clients:\n  acme: {{keys: {{a: {{digest: {DIGEST}}}}}}}\n  b: {{keys: {{x: {{digest: {DIGEST}}}}}}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    (line,) = caught.value.problems
    assert line.startswith(f"{file}:3: clients.b.keys.x.digest: is the same key as clients.acme.keys.a")
    assert DIGEST not in line


async def test_a_stored_key_that_the_configuration_has_too_is_that_of_the_configuration() -> None:
    """Its revocation in the store changes nothing; without the configuration, the stored key is valid again."""
    rules = IdentityRules(keys={DIGEST: KnownKey("acme", ApiKey(DIGEST, "of the file"))})
    store = HeldStore()
    await store.write("b", Change(keys=KeyChange(add=ApiKey(DIGEST, "stored"))))
    async with following(store, rules=rules) as registry:
        known = registry.keys.find(DIGEST)
        assert isinstance(known, KnownKey)
        assert (known.client_id, known.key.label) == ("acme", "of the file")
        assert registry.by_id("b").is_verified_only
        registry.change_tiers(registry.tiers, "FREE", {}, IdentityRules())
        known = registry.keys.find(DIGEST)
        assert isinstance(known, KnownKey)
        assert (known.client_id, known.key.label) == ("b", "stored")
        registry.change_tiers(registry.tiers, "FREE", {}, rules)
        await registry.keys.revoke("b", DIGEST)
        assert registry.keys.find(DIGEST) == rules.keys[DIGEST]


def told(identity: dict[str, Any], **more: Any) -> list[str]:
    """Return what the start warns of."""
    return [str(one) for one in access_warnings(load_config(None, {"identity": identity, **more}))]


BARE = {"sources": ["header", "address"]}
NO_KEYS = "identity.sources: does not name api_key: keys of clients prove nothing, and upstreams receive them: "
NO_PROOF = "identity.sources: names no source that proves an id (api_key, jwt or certificate), which is required of: "
VERIFIED = {"verified_only": True}
GOLD = {"GOLD": {"rate": 5, "capacity": 5, "verified_only": True}}
ISSUER = {"issuers": {"one": {"issuer": "https://one.test", "audiences": ["api"]}}}
WITH_JWT = {"sources": ["jwt", "header", "address"], "jwt": ISSUER}


@each(
    ("identity", "more", "expected"),
    [
        (BARE, {"clients": {"acme": client(a=DIGEST)}}, [f"{NO_KEYS}clients.acme", f"{NO_PROOF}clients.acme"]),
        (BARE, {"clients": {"acme": client(a=DIGEST) | {"verified_only": False}}}, [f"{NO_KEYS}clients.acme"]),
        (BARE, {"clients": {"b": VERIFIED}, "tiers": GOLD}, [f"{NO_PROOF}tiers.GOLD, clients.b"]),
        (
            BARE,
            {"clients": {f"c{number}": VERIFIED for number in range(50)}},
            [f"{NO_PROOF}clients.c0, clients.c1, clients.c2 and 47 more"],
        ),
        (BARE | {"mode": "observe"}, {"clients": {"b": VERIFIED}}, [f"{NO_PROOF}clients.b"]),
        (WITH_JWT, {"clients": {"acme": client(a=DIGEST), "b": VERIFIED}}, [f"{NO_KEYS}clients.acme"]),
        (WITH_JWT, {"clients": {"b": VERIFIED}, "tiers": GOLD}, []),
        ({}, {"clients": {"acme": client(a=DIGEST), "b": VERIFIED}, "tiers": GOLD}, []),
        ({"sources": ["certificate", "address"]}, {"clients": {"b": VERIFIED}}, []),
        (BARE, {"clients": {"b": {}, "c": {"verified_only": False}}}, []),
        (BARE, {"clients": {"b": VERIFIED}, "extensions": [{"name": "x", "use": "some_module:object"}]}, []),
    ],
)
def test_what_no_source_can_prove_is_a_warning_at_the_start(
    identity: dict[str, Any], more: dict[str, Any], expected: list[str]
) -> None:
    """Else such a client gets 401 for ever, and its keys travel to upstreams, without a word."""
    assert told(identity, **more) == expected


OF_OLD = ApiKey(DIGEST, routes=("old", "all"))
MANY = [(f"c{number}", replace(OF_OLD, routes=(f"old{number}",))) for number in range(5)]
NO_ROUTE = "API keys are limited to routes that do not exist: "
REMEDY = ". If a route was renamed, give it its former name, or create other keys"
UNUSED = "identity.sources does not name api_key: stored API keys prove nothing, and upstreams receive them "
IN_MEMORY = ", of those in memory; those that only the store has were not examined"


@each(
    ("keys", "options", "expected"),
    [
        ([], {"is_source": False}, None),
        ([("acme", ApiKey(DIGEST)), ("b", ApiKey(OTHER, routes=("all",)))], {}, None),
        ([("acme", replace(OF_OLD, expires_at=99.0))], {}, None),
        ([("acme", OF_OLD)] * 2, {}, f"{NO_ROUTE}'old' (keys: 2, clients: acme){REMEDY}"),
        ([("acme", OF_OLD)], {"is_complete": False}, f"{NO_ROUTE}'old' (keys: 1, clients: acme){IN_MEMORY}{REMEDY}"),
        (
            MANY,
            {},
            f"{NO_ROUTE}'old0', 'old1', 'old2' and 2 more (keys: 5, clients: c0, c1, c2 and 2 more){REMEDY}",
        ),
        (MANY, {"is_source": False}, f"{UNUSED}(keys: 5, clients: c0, c1, c2 and 2 more)"),
        (MANY[:1], {"is_source": False, "is_complete": False}, f"{UNUSED}(keys: 1, clients: c0){IN_MEMORY}"),
    ],
)
def test_stored_keys_that_cannot_be_used_are_named_within_bounds(
    keys: list[tuple[str, ApiKey]], options: dict[str, bool], expected: str | None
) -> None:
    terms = {"is_source": True, "is_complete": True} | options
    held = [KnownKey(*one) for one in keys]
    assert run_at_once(warning_of(held, 100.0, routes=frozenset({"all"}), **terms)) == expected


def test_the_list_of_keys_marks_routes_that_do_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"id": "1", "label": "", "configured": True, "expired": False, "expires_at": None, "replaced_by": None}
    key |= {"last_used_at": None}
    unlimited: dict[str, Any] = {"routes": None, "unknown_routes": []}
    limited = {"routes": ["a", "old"], "unknown_routes": ["old"]}
    client = Mock(**{"call.return_value": {"keys": [key | unlimited, key | limited]}})
    monkeypatch.setattr(key_commands, "client_of", lambda _options: client)
    assert run_keys(["list", "acme"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("  all")
    assert second.endswith("  a, old (no such route)")
