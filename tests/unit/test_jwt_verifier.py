"""Tokens: what is recognised, what is refused and why (RFC 8725), what is remembered, and what claims mean."""

import hashlib
import json
from typing import Any

import pytest
from joserfc.jwk import OctKey, RSAKey

from api_gateway.clients.claim_paths import ClaimPath, scopes_of
from api_gateway.clients.jose import JoseKey, key_of_secret, keys_of_set
from api_gateway.clients.jwt_reader import IssuerTerms, ReadToken, TokenFault, TokenReader
from api_gateway.clients.jwt_verifier import ClaimMeanings, Issuer, JwtVerifier, KeyNeeded, VerifiedToken
from api_gateway.models import NANOSECONDS
from api_gateway.settings.jwt import ASYMMETRIC, HMAC
from tests.cases import each
from tests.jwt_kit import (
    AUDIENCE,
    BROKEN,
    ISSUER,
    LEEWAY,
    MAX_BYTES,
    NOW,
    Keys,
    claims_of,
    encoded,
    key_for,
    key_set,
    signed,
)

NOW_NS = 5_000 * NANOSECONDS


class Checked:
    """A reader and a verifier of one issuer."""

    def __init__(self, *algorithms: str, limit: int = 100, secret: bytes | None = None, **meanings: Any) -> None:
        published = [key_for(name) for name in algorithms or ("ES256",) if name not in HMAC]
        self.keys = Keys(*keys_of_set(key_set(*published), ASYMMETRIC)) if published else Keys()
        if secret is not None:
            self.keys = Keys(key_of_secret(secret, ("HS256",)))
        permitted = ("HS256",) if secret is not None else ASYMMETRIC
        terms = IssuerTerms("one", frozenset({AUDIENCE, "other"}), frozenset(permitted))
        self.reader = TokenReader({ISSUER: terms}, max_bytes=MAX_BYTES)
        kept = [ClaimPath.of("realm_access.roles")]
        issuer = Issuer(terms, ClaimMeanings(**meanings), self.keys)
        self.verifier = JwtVerifier({"one": issuer}, max_remembered=limit, kept=kept)

    def result(self, token: bytes, now: float = NOW) -> VerifiedToken | TokenFault | KeyNeeded | None:
        read = self.reader.read(token)
        return None if read is None else self.verifier.verify(read, now, NOW_NS)


@pytest.fixture
def checked() -> Checked:
    return Checked()


@each("algorithm", ASYMMETRIC)
def test_a_valid_token_names_its_client(algorithm: str) -> None:
    found = Checked(algorithm).result(signed(algorithm=algorithm))
    assert isinstance(found, VerifiedToken)
    assert (found.client_id, found.issuer) == ("acme", "one")
    assert found.expires_ns == NOW_NS + (3600 + LEEWAY) * NANOSECONDS


def test_an_hmac_needs_the_configured_secret() -> None:
    secret = b"a secret of more than thirty-two bytes"
    token = signed(algorithm="HS256", key=OctKey.import_key(secret), header={"kid": None})
    assert isinstance(Checked(secret=secret).result(token), VerifiedToken)
    other = signed(algorithm="HS256", key=OctKey.import_key(secret + b"!"), header={"kid": "any"})
    assert Checked(secret=secret).result(other) == KeyNeeded(TokenFault.SIGNATURE)


def test_a_public_key_is_no_secret() -> None:
    with pytest.raises(ValueError, match="public keys must not be used"):
        key_of_secret(key_for("RS256").as_pem(private=False), ("HS256",))


# What is not for the gateway: another issuer's token, or no token at all


@each(
    "value",
    [
        pytest.param(signed(claims_of(iss="https://elsewhere.test")), id="another issuer"),
        pytest.param(signed(claims_of(iss=ISSUER + "/")), id="another spelling of the issuer"),
        pytest.param(signed(claims_of(iss=None)), id="no issuer"),
        pytest.param(signed(claims_of(iss=[ISSUER])), id="a list of issuers"),
        pytest.param(b"agw_0123456789", id="a key"),
        pytest.param(b"a.b.c", id="dots"),
        pytest.param(b"eyJ", id="the beginning of a token"),
        pytest.param(b"", id="nothing"),
        pytest.param(signed() + b".aa.bb", id="five segments, as an encrypted token has"),
        pytest.param(b".".join(signed().split(b".")[:2]), id="two segments"),
        pytest.param(signed() + b"=", id="padding"),
        pytest.param(signed(header=b'{ "alg": "ES256"}'), id="a header that begins with a space"),
        pytest.param(signed().replace(b".", b". ", 1), id="a space"),
        pytest.param(encoded([1]) + b"." + encoded(claims_of()) + b".c2ln", id="a header that is a list"),
        pytest.param(encoded({}) + b"." + encoded(claims_of()) + b".c2ln", id="a header without an algorithm"),
        pytest.param(signed(b"no JSON"), id="claims that are no JSON"),
        pytest.param(signed(b"\xff\xfe{}"), id="claims that are no UTF-8"),
        pytest.param(signed(json.dumps(claims_of()).encode("utf-16")), id="claims in UTF-16"),
        pytest.param(signed(b'{"a":' * 2_000 + b"1" + b"}" * 2_000)[:MAX_BYTES], id="deeply nested claims"),
        pytest.param(signed([claims_of()]), id="a list of claims"),
        pytest.param(signed(b'{"iss": NaN}'), id="NaN"),
    ],
)
def test_what_names_no_configured_issuer_is_left_alone(checked: Checked, value: bytes) -> None:
    assert checked.reader.read(value) is None


# Broken tokens: the list of RFC 8725, and a few more


@each("name", BROKEN)
def test_a_broken_token_is_refused_with_its_cause(checked: Checked, name: str) -> None:
    token, fault = BROKEN[name]
    found = checked.result(token)
    assert (found.fault if isinstance(found, KeyNeeded) else found) == fault


@each("name", BROKEN)
def test_no_text_about_a_token_contains_a_part_of_it(checked: Checked, name: str) -> None:
    token, fault = BROKEN[name]
    read = checked.reader.read(token)
    shown = f"{read!r} {fault} {checked.verifier!r} {checked.reader!r}"
    for part in (*token.decode().split("."), "acme", "admin"):
        assert not part or part not in shown


def test_leeway_applies_to_each_time(checked: Checked) -> None:
    token = signed(claims_of(iat=NOW + LEEWAY, nbf=NOW + LEEWAY, exp=NOW + LEEWAY + 1))
    assert isinstance(checked.result(token), VerifiedToken)
    assert isinstance(checked.result(token, NOW + 2 * LEEWAY + 0.9), VerifiedToken)
    assert checked.result(token, NOW + 2 * LEEWAY + 1) == TokenFault.EXPIRED


def test_a_token_without_a_type_or_a_key_id_is_valid(checked: Checked) -> None:
    assert isinstance(checked.result(signed(header={"typ": None, "kid": None})), VerifiedToken)
    assert isinstance(checked.result(signed(header={"typ": "application/at+JWT"})), VerifiedToken)
    assert isinstance(checked.result(signed(claims_of(aud=["else", "other"]))), VerifiedToken)


# Memory


def read(checked: Checked, token: bytes) -> ReadToken:
    found = checked.reader.read(token)
    assert found is not None
    return found


def test_a_token_is_remembered_until_it_expires(checked: Checked) -> None:
    token = signed(claims_of(exp=NOW + 100))
    assert checked.verifier.recall(read(checked, token), NOW_NS) is None
    verified = checked.result(token)
    end_ns = NOW_NS + (100 + LEEWAY) * NANOSECONDS
    assert checked.verifier.recall(read(checked, token), end_ns - 1) is verified
    assert checked.verifier.recall(read(checked, token), end_ns) is None
    assert "0 of 100" in repr(checked.verifier)


def test_a_refused_token_is_not_remembered(checked: Checked) -> None:
    for token, _ in BROKEN.values():
        checked.result(token)
    assert "0 of 100" in repr(checked.verifier)


def test_the_number_of_remembered_tokens_is_bounded() -> None:
    checked = Checked(limit=3)
    tokens = [signed(claims_of(sub=f"client-{number}")) for number in range(5)]
    for token in tokens:
        checked.result(token)
    recalled = [checked.verifier.recall(read(checked, token), NOW_NS) is not None for token in tokens]
    assert recalled == [False, False, True, True, True]


def test_a_token_is_forgotten_when_its_key_is_withdrawn(checked: Checked) -> None:
    token = signed()
    assert isinstance(checked.result(token), VerifiedToken)
    checked.keys.keys[0].is_withdrawn = True
    assert checked.verifier.recall(read(checked, token), NOW_NS) is None


def test_a_token_is_remembered_by_its_hash(checked: Checked) -> None:
    token = signed()
    checked.result(token)
    assert list(checked.verifier._remembered) == [hashlib.sha256(token).digest()]


# The meaning of claims


@each(
    ("path", "value"),
    [
        ("sub", "acme"),
        ("realm_access.roles", ["reader"]),
        ("/realm_access/roles", ["reader"]),
        ("https://api.test/tier", "gold"),
        ("/https:~1~1api.test~1tier", "gold"),
        ("/a~01", 1),
        ("sub.more", None),
        ("realm_access.missing", None),
    ],
)
def test_a_path_names_a_claim(path: str, value: Any) -> None:
    claims = {"sub": "acme", "realm_access": {"roles": ["reader"]}, "https://api.test/tier": "gold", "a~1": 1}
    assert ClaimPath.of(path).value(claims) == value


def test_scopes_are_text_or_a_list() -> None:
    paths = [ClaimPath.of("scope"), ClaimPath.of("scp")]
    assert scopes_of({"scope": "read write", "scp": ["admin", 1]}, paths) == {"read", "write", "admin"}
    assert scopes_of({"scope": {"read": 1}}, paths) == set()


def test_claims_mean_client_tier_and_organisation() -> None:
    checked = Checked(
        client=ClaimPath.of("azp"),
        client_prefix="one:",
        tier=ClaimPath.of("realm_access.roles"),
        tiers={"PREMIUM": "PREMIUM", "gold": "ENTERPRISE"},
        organisation=ClaimPath.of("org.id"),
    )
    claims = claims_of(azp="app", realm_access={"roles": ["reader", "premium"]}, org={"id": 7}, scope="read write")
    found = checked.result(signed(claims))
    assert isinstance(found, VerifiedToken)
    assert (found.client_id, found.tier, found.organisation) == ("one:app", "PREMIUM", "7")
    assert found.scopes == {"read", "write"}
    assert found.claims == {"realm_access.roles": ("reader", "premium")}
    other = checked.result(signed(claims_of(azp="app", realm_access={"roles": ["none such"]})))
    assert isinstance(other, VerifiedToken)
    assert (other.tier, other.organisation) == (None, None)


# Key sets


def test_only_usable_public_keys_are_read_from_a_key_set() -> None:
    usable = key_for("ES256").as_dict(private=False)
    members: list[Any] = [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"},
        {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"},
        {**usable, "kid": "for encryption", "use": "enc"},
        {**usable, "kid": "not for verifying", "use": None, "key_ops": ["sign"]},
        {**usable, "kid": 1},
        {**usable, "kid": "not on the curve", "y": usable["x"]},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "small"},
        {"kty": "RSA", "n": "A" * 400, "e": "A" * 400, "kid": "large exponent"},
        {"kty": "RSA", "n": "_" * 4000, "e": "AQAB", "kid": "large"},
        {"kty": "OKP", "crv": "X25519", "x": "A" * 43, "kid": "for key agreement"},
        "no object",
        usable,
    ]
    found = keys_of_set(json.dumps({"keys": members}).encode(), ASYMMETRIC)
    assert [key.kid for key in found] == ["ES256-1"]
    assert [key.algorithms for key in found] == [{"ES256"}]


def test_a_private_key_in_a_key_set_is_read_as_its_public_one() -> None:
    private = json.dumps({"keys": [key_for("RS256").as_dict(private=True)]}).encode()
    (key,) = keys_of_set(private, ("RS256",))
    assert not key._key.is_private
    assert key.verify("RS256", *split(signed(algorithm="RS256")))


def split(token: bytes) -> tuple[bytes, bytes]:
    read = Checked("RS256").reader.read(token)
    assert read is not None
    return read.signed, read.signature


@each("document", [b"", b"[]", b'{"keys": {}}', b'{"keys": []}', b"[" * 100_000, b"\xff"])
def test_a_document_without_usable_keys_is_an_error(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"no JSON|none of its"):
        keys_of_set(document, ASYMMETRIC)


def test_a_key_is_for_the_permitted_algorithms_of_its_type_and_its_own() -> None:
    rsa = RSAKey.generate_key(2048, {"kid": "a", "alg": "PS256"})
    (key,) = keys_of_set(key_set(rsa), ASYMMETRIC)
    assert key.algorithms == {"PS256"}
    with pytest.raises(ValueError, match="none of its 1 keys"):
        keys_of_set(key_set(rsa), ("RS256",))
    assert isinstance(key, JoseKey)
    assert repr(key) == "<JoseKey 'a' [PS256]>"


@each("bits", [512, 1024, 2047])
def test_a_weak_key_is_not_used_however_it_is_encoded(bits: int) -> None:
    """Leading zeros do not make it stronger."""
    weak = 2 ** (bits - 1) + 1
    for size in (bits // 8 + 1, 256, 512):
        modulus = encoded(weak.to_bytes(size)).decode()
        document = {"keys": [{"kty": "RSA", "kid": "weak", "n": modulus, "e": "AQAB"}]}
        with pytest.raises(ValueError, match="none of its 1 keys"):
            keys_of_set(json.dumps(document).encode(), ASYMMETRIC)


def test_text_of_a_claim_can_be_written_to_files_and_stores() -> None:
    """JSON can escape half of a pair of surrogates, which is not a character."""
    claims = {"org": "a\ud800é", "groups": ["\udfff", "é\U0001f600", 7, True]}
    assert ClaimPath.of("org").text_value(claims) == "a\\ud800é"
    assert ClaimPath.of("org").values(claims) == ("a\\ud800é",)
    assert ClaimPath.of("groups").values(claims) == ("\\udfff", "é\U0001f600", 7, True)
