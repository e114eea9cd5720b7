"""Rules between the settings of tokens and others."""

from typing import Any

import pytest

from api_gateway.config import load_config
from api_gateway.settings.diagnostics import ConfigError
from api_gateway.settings.rules import find_warnings
from tests.cases import each

ONE = {"issuer": "https://one.test", "audiences": ["api"]}
UPSTREAM = {"up": {"targets": [{"url": "http://127.0.0.1:9001"}]}}
ROUTE = {"name": "all", "path": "/api", "upstream": "up"}


def sections(
    issuers: dict[str, Any] | None = None, *, sources: tuple[str, ...] = ("jwt", "address"), **more: Any
) -> dict[str, Any]:
    identity = {"sources": list(sources), "jwt": {"issuers": {"one": ONE} if issuers is None else issuers}}
    return {"identity": identity, "upstreams": UPSTREAM, **more}


@each(
    ("given", "problem"),
    [
        (sections({}), "identity.jwt.issuers: needs an issuer, as identity.sources names jwt"),
        (
            sections({"one": ONE, "two": ONE}),
            "identity.jwt.issuers.two.issuer: is also that of 'one', got 'https://one.test'",
        ),
        (
            sections({"one": ONE | {"tiers": {"gold": "GOLD"}}}),
            "identity.jwt.issuers.one.tiers.gold: no such tier, got 'GOLD'",
        ),
        (
            sections({"one": ONE | {"headers": {"x-client-id": "sub"}}}),
            "identity.jwt.issuers.one.headers.x-client-id: clients send it",
        ),
        (
            sections(sources=("header", "address"), routes=[ROUTE | {"require": {"scopes": ["read"]}}]),
            "routes[0] (all).require: needs jwt in identity.sources, or no request is admitted",
        ),
        (sections(routes=[ROUTE | {"require": {}}]), "routes[0].require: must have scopes or claims"),
        (sections(routes=[ROUTE | {"require": {"scopes": ["a b"]}}]), "must be one scope, without spaces"),
        (sections({"one": ONE | {"client_claim": "a b"}}), "must be the path of a claim"),
        (sections({"one": ONE | {"secret": "x" * 31}}), "the secret must have at least 32 bytes"),
    ],
)
def test_a_contradiction_is_refused_with_its_place(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, given)
    assert problem in " ".join(caught.value.problems)
    assert "x" * 31 not in " ".join(caught.value.problems)


def test_issuers_that_no_source_uses_are_a_warning() -> None:
    config = load_config(None, sections(sources=("header", "address")))
    assert "identity.jwt.issuers: has no effect, as identity.sources does not name jwt" in map(
        str, find_warnings(config)
    )


def test_a_value_of_a_required_claim_may_stand_alone() -> None:
    config = load_config(None, sections(routes=[ROUTE | {"require": {"claims": {"a": True, "b": [1, "x"]}}}]))
    assert config.routes[0].require is not None
    assert config.routes[0].require.claims == {"a": [True], "b": [1, "x"]}
