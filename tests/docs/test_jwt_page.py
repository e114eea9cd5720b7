"""The page on tokens: its recipes fit the tokens that they show, its numbers and its program are right."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from api_gateway.assembly.issuers import meanings_of, terms_of
from api_gateway.clients.issuer_keys import FETCH_TIMEOUT
from api_gateway.clients.jose import MAX_KEYS, MAX_RSA_BITS, MIN_RSA_BITS, keys_of_set
from api_gateway.clients.jwt_reader import TokenReader
from api_gateway.clients.jwt_verifier import Issuer, JwtVerifier, VerifiedToken
from api_gateway.config import GatewayConfig
from api_gateway.settings.jwt import ASYMMETRIC, IssuerSection
from api_gateway.transport.document_fetch import MAX_DOCUMENT_BYTES
from benchmarks.tokens import LIMITS
from tests.jwt_kit import NOW, Keys, key_for, key_set, signed
from tests.kit import RawUpstream, ask, in_front_of, running_gateway

PAGE = (Path(__file__).parents[2] / "docs" / "jwt.md").read_text()
RECIPES = dict(re.findall(r"^### (.+?)\n(.*?)(?=^###|\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
TIERS = ("FREE", "BASIC", "PREMIUM", "ENTERPRISE")


def block(language: str, text: str) -> str:
    """Return the only block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    return str(found)


def section(title: str, **changes: Any) -> IssuerSection:
    (one,) = yaml.safe_load(block("yaml", RECIPES[title]))["identity"]["jwt"]["issuers"].values()
    return IssuerSection.model_validate(one | changes)


@pytest.mark.parametrize(
    ("title", "client", "tier", "organisation", "scopes"),
    [
        ("Keycloak", "web-shop", "PREMIUM", None, {"openid", "profile"}),
        (
            "Auth0",
            "auth0|6553da60a54af58e29493993",
            "PREMIUM",
            "org_9ybsU1dN2dKfDkBi",
            {"openid", "orders:read", "orders:refund"},
        ),
        (
            "Microsoft Entra ID",
            "99999999-8888-7777-6666-555555555555",
            None,
            "11111111-2222-3333-4444-555555555555",
            {"orders.read", "orders.write"},
        ),
        (
            "Amazon Cognito",
            "aaaaaaaa-bbbb-cccc-dddd-000000000000",
            "PREMIUM",
            None,
            {"aws.cognito.signin.user.admin"},
        ),
    ],
)
def test_a_recipe_fits_the_token_that_it_shows(
    title: str, client: str, tier: str | None, organisation: str | None, scopes: set[str]
) -> None:
    chosen, claims = section(title), json.loads(block("json", RECIPES[title]))
    assert chosen.document_url == chosen.issuer.removesuffix("/") + "/.well-known/openid-configuration"
    terms = terms_of("one", chosen)
    issuer = Issuer(terms, meanings_of(chosen, TIERS), Keys(*keys_of_set(key_set(key_for("RS256")), ASYMMETRIC)))
    read = TokenReader({chosen.issuer: terms}, max_bytes=8192).read(
        signed({**claims, "iat": NOW, "exp": NOW + 60}, algorithm="RS256")
    )
    assert read is not None
    found = JwtVerifier({"one": issuer}, max_remembered=1).verify(read, NOW, 0)
    assert isinstance(found, VerifiedToken), found
    assert (found.client_id, found.tier, found.organisation) == (client, tier, organisation)
    assert set(found.scopes) == scopes


def test_its_program_and_configuration_work_together(tmp_path: Path) -> None:
    recipe = RECIPES["Without an issuer"]
    command = [sys.executable, "-c", block("python", recipe)]
    token = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    identity = yaml.safe_load(block("yaml", recipe))["identity"]
    identity["jwt"]["issuers"]["main"]["jwks_file"] = str(tmp_path / "keys.json")
    upstream = RawUpstream()
    with running_gateway(in_front_of(upstream.url) | {"identity": identity}, tmp_path / "state") as gateway:
        headers = {"Authorization": f"Bearer {token}"}
        assert ask(f"{gateway.url}/api/x", headers=headers).status == 200
        assert "client:jane" in gateway.live.limiter._table.current
        assert ask(f"{gateway.url}/api/x", headers={"Authorization": f"Bearer {token[:-4]}AAAA"}).status == 401
    upstream.close()


def test_its_example_of_a_route_requires_what_it_says() -> None:
    _, example, _ = re.findall(r"```yaml\n(.*?)```", PAGE.partition("## Recipes")[0], flags=re.DOTALL)
    require = GatewayConfig.model_validate(yaml.safe_load(example)).routes[0].require
    assert require is not None
    assert (require.scopes, require.claims) == (["orders:refund"], {"realm_access.roles": ["clerk", "manager"]})


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"{FETCH_TIMEOUT:.0f} seconds at most" in " ".join(PAGE.split())
    assert f"at most {MAX_DOCUMENT_BYTES // 1024} KiB" in PAGE
    assert f"a key set {MAX_KEYS} keys" in PAGE
    assert f"{MIN_RSA_BITS} to {MAX_RSA_BITS} bits" in PAGE


def test_the_page_says_of_each_permitted_algorithm_whether_it_is_within_the_limit_that_the_benchmark_claims() -> None:
    rows = re.findall(r"^\| (`[A-Z].+?) \|.*\| (yes|no) \|$", PAGE, flags=re.MULTILINE)
    shown = {name: limit for names, limit in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(shown) == sorted(ASYMMETRIC)
    assert {name: "yes" if limit == 250 else "no" for name, limit in LIMITS.items()} == shown
