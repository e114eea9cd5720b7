"""API keys: their form, where they are recognised, and what is not a key of the gateway's or not a valid one."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.clients.api_keys import (
    PATTERN,
    RANDOM_BYTES,
    ApiKey,
    KnownKey,
    api_keys_of,
    as_members,
    digest_of,
    fault_of,
    has_key,
    keys_as_json,
    new_key,
    without_keys,
)
from api_gateway.clients.identity_rules import IdentityRules
from api_gateway.clients.records import Change, ClientRecord, KeyChange, KeyRefusal, Replacement
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.errors import CredentialsInsufficient, CredentialsInvalid, CredentialsRepeated
from api_gateway.http1.headers import fields_of
from api_gateway.models import NANOSECONDS, HeaderList, Quota
from api_gateway.proxy.api_key_source import ApiKeySource, KeyProof
from api_gateway.proxy.identity_sources import NO_EXPIRY
from api_gateway.proxy.request_id import given_request_id
from api_gateway.proxy.route_table import Route
from tests.cases import each
from tests.kit import FakeClock

KEY = new_key(bytes(range(RANDOM_BYTES))).encode()
OTHER = new_key(bytes(RANDOM_BYTES)).encode()
DIGEST = digest_of(KEY)
NOW = 1_800_000_000.0


def basic(user: bytes, password: bytes = b"") -> bytes:
    return b"Basic " + base64.b64encode(user + b":" + password)


# The form


@given(st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES))
def test_a_key_is_well_formed_and_scanners_find_it(random_bytes: bytes) -> None:
    key = new_key(random_bytes)
    assert fault_of(key.encode()) is None
    assert re.fullmatch(PATTERN, key)
    assert re.search(rf"\b{PATTERN}\b", f"curl -H 'X-API-Key: {key}' x")


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_different_bytes_make_different_keys(one: bytes, other: bytes) -> None:
    assert (new_key(one) == new_key(other)) is (one == other)


@given(st.integers(4, len(KEY) - 1), st.sampled_from("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"))
def test_a_typing_error_is_recognised_without_a_look_up(place: int, character: str) -> None:
    typed = KEY[:place] + character.encode() + KEY[place + 1 :]
    assert (fault_of(typed) is None) is (typed == KEY)


def test_two_characters_in_the_wrong_order_are_recognised() -> None:
    for place in range(4, len(KEY) - 1):
        typed = KEY[:place] + KEY[place + 1 : place + 2] + KEY[place : place + 1] + KEY[place + 2 :]
        assert (fault_of(typed) is None) is (typed == KEY)


def test_a_key_needs_all_its_random_bytes() -> None:
    with pytest.raises(ValueError, match="32 random bytes, got 31"):
        new_key(bytes(31))


def test_keys_are_stored_and_read_again() -> None:
    keys = (ApiKey("a" * 64, "one", 5.0, None, None), ApiKey("b" * 64, "two", 6.125, 7.5, ("r", "s")))
    assert api_keys_of({key.digest: as_members(key) for key in keys}) == keys
    assert keys_as_json(()) == "{}"
    with pytest.raises(ValueError, match="key 'aaaaaaaaaaaaaaaa'"):
        api_keys_of({"a" * 64: {"label": "one"}})


# Where keys are recognised


@pytest.fixture
def wall() -> FakeClock:
    return FakeClock(NOW)


@pytest.fixture
def source(registry: ClientRegistry) -> ApiKeySource:
    return ApiKeySource(registry.keys, "X-API-Key")


@pytest.fixture
def registry(tmp_path: Path, wall: FakeClock) -> ClientRegistry:
    keys = {
        DIGEST: KnownKey("acme", ApiKey(DIGEST)),
        digest_of(OTHER): KnownKey("acme", ApiKey(digest_of(OTHER), expires_at=NOW + 5, routes=("users",))),
    }
    quota = Quota.per_second("FREE", 1, 10)
    store = SqliteClientStore(tmp_path / "unused")
    return ClientRegistry({"FREE": quota}, "FREE", {}, store, wall_clock=wall, rules=IdentityRules(keys=keys))


@pytest.mark.parametrize(
    "field",
    [
        (b"X-API-Key", KEY),
        (b"x-api-key", b" " + KEY),
        (b"Authorization", b"Bearer " + KEY),
        (b"authorization", b"bearer   " + KEY),
        (b"Authorization", basic(KEY)),
        (b"Authorization", basic(KEY, b"x")),
        (b"Authorization", basic(KEY, b"a:b")),
    ],
)
def test_a_key_is_accepted_in_three_places(source: ApiKeySource, field: tuple[bytes, bytes]) -> None:
    claim = source.claim(fields_of([field]))
    assert claim is not None
    assert claim.names == {field[0].lower()}
    assert any(marker in field[1] for marker in source.markers), "else the fast path would not look"
    proof = source.verify(claim, 0)
    assert isinstance(proof, KeyProof)
    assert (proof.client_id, proof.expires_ns, proof.is_restricted) == ("acme", NO_EXPIRY, False)


def test_the_same_key_may_be_in_two_places(source: ApiKeySource) -> None:
    claim = source.claim(fields_of([(b"x-api-key", KEY), (b"authorization", b"Bearer " + KEY)]))
    assert claim is not None
    assert claim.fault is None
    assert claim.names == {b"x-api-key", b"authorization"}


@pytest.mark.parametrize(
    "field",
    [
        (b"X-API-Key", b"theirs"),
        (b"X-API-Key", b"AGW_" + KEY[4:]),
        (b"Authorization", b"Bearer eyJhbGciOiJIUzI1NiJ9.e30.x"),
        (b"Authorization", b"Bearer eyJhbGciOiJSUzI1NiJ9.e30.x" + KEY + b"-x"),  # a signature may have any characters
        (b"Authorization", b"Bearer eyJhbGciOiJSUzI1NiJ9.e30." + KEY + b"_x"),
        (b"X-API-Key", b"theirs-" + KEY),
        (b"Authorization", basic(b"user", b"password")),
        (b"Authorization", b"Digest username=agw_x"),
        (b"Authorization", basic(b"user", KEY[:16])),
        (b"Authorization", b"Basic YWd3XFnd1hZ3df"),
        (b"Cookie", b"key=" + KEY),
    ],
)
def test_other_values_belong_to_the_upstream(source: ApiKeySource, field: tuple[bytes, bytes]) -> None:
    assert source.claim(fields_of([field])) is None


def test_a_key_expires_at_its_time(source: ApiKeySource, wall: FakeClock) -> None:
    claim = source.claim(fields_of([(b"x-api-key", OTHER)]))
    assert claim is not None
    wall.advance(3)
    proof = source.verify(claim, 7)
    assert isinstance(proof, KeyProof)
    assert proof.expires_ns == 7 + 2 * NANOSECONDS
    wall.advance(2)
    error = source.verify(claim, 0)
    assert isinstance(error, CredentialsInvalid)
    assert "expired" in error.detail


def test_a_key_may_be_for_some_routes_only(source: ApiKeySource) -> None:
    claim = source.claim(fields_of([(b"x-api-key", OTHER)]))
    assert claim is not None
    proof = source.verify(claim, 0)
    assert isinstance(proof, KeyProof)
    assert proof.is_restricted
    assert proof.refusal(Route("users", "/api", "up")) is None
    error = proof.refusal(Route("orders", "/api", "up"))
    assert isinstance(error, CredentialsInsufficient)
    assert "'orders'" in error.detail


UNKNOWN = new_key(b"\xff" * RANDOM_BYTES).encode()
BROKEN: dict[str, HeaderList] = {
    "unknown": [(b"x-api-key", UNKNOWN)],
    "too short": [(b"x-api-key", KEY[:-1])],
    "too long": [(b"x-api-key", KEY + b"0")],
    "wrong checksum": [(b"x-api-key", KEY[:-1] + b"~")],
    "typing error": [(b"x-api-key", KEY[:10] + b"0" + KEY[11:] if KEY[10:11] != b"0" else KEY[:10] + b"1" + KEY[11:])],
    "prefix alone": [(b"x-api-key", b"agw_")],
    "foreign characters": [(b"x-api-key", b"agw_" + b"\xe4" * 49)],
    "two keys": [(b"x-api-key", KEY), (b"x-api-key", OTHER)],
    "sent twice": [(b"x-api-key", KEY), (b"x-api-key", KEY)],
    "two places": [(b"x-api-key", KEY), (b"authorization", b"Bearer " + OTHER)],
    "no scheme": [(b"authorization", KEY)],
    "another scheme": [(b"authorization", b"Token " + KEY)],
    "beside another credential": [(b"authorization", b"Bearer " + KEY), (b"authorization", b"Basic eA==")],
    "a tab behind the scheme": [(b"authorization", b"Bearer\t" + KEY)],
    "a tab and spaces": [(b"authorization", b"Bearer \t " + KEY)],
    "a parameter behind it": [(b"authorization", b"Bearer " + KEY + b", x=y")],
    "a key as a parameter": [(b"authorization", b'Token token="' + KEY + b'"')],
    "in quotes, as a bearer token": [(b"authorization", b'Bearer "' + KEY + b'"')],
    "with a scheme in its own field": [(b"x-api-key", b"Bearer " + KEY)],
    "in a list": [(b"x-api-key", b"theirs, " + KEY)],
    "a name with underscores": [(b"x_api_key", KEY)],
    "a name with one underscore, beside the other": [(b"x-api-key", KEY), (b"x-api_key", OTHER)],
    "base64 with other characters": [(b"authorization", b"Basic *" + basic(KEY)[6:])],
    "base64 with a line of its own": [(b"authorization", basic(KEY)[:-8] + b" " + basic(KEY)[-8:])],
    "truncated base64": [(b"authorization", basic(KEY)[:-3])],
    "in quotes": [(b"authorization", b'Bearer agw_"' + KEY + b'"')],
    **{f"as the password of {user!r}": [(b"authorization", basic(user, KEY))] for user in (b"", b"u", b"us", b"user")},
    "as a user name behind a space": [(b"authorization", basic(b" " + KEY))],
    "as a password, in base64 with other characters": [
        (b"authorization", basic(b"u", KEY)[:60] + b"*" + basic(b"u", KEY)[60:])
    ],
}


REPEATED = {
    *("two keys", "sent twice", "two places", "beside another credential"),
    "a name with one underscore, beside the other",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_key_is_recognised_and_its_refusal_shows_nothing_of_it(source: ApiKeySource, name: str) -> None:
    """A request with several is malformed, whether or not they are valid (RFC 6750 section 3.1)."""
    fields = BROKEN[name]
    claim = source.claim(fields_of(fields))
    assert claim is not None
    assert any(marker in value for _, value in fields for marker in source.markers), (
        "else the fast path would not look"
    )
    error = source.verify(claim, 0)
    assert isinstance(error, CredentialsRepeated if name in REPEATED else CredentialsInvalid)
    shown = f"{error.detail} {error.headers} {error.extra} {claim!r}"
    for _, value in fields:
        for start in range(len(value) - 12):
            assert value[start : start + 12].decode("latin-1") not in shown
    assert DIGEST[:12] not in shown


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("two keys", "several API keys"),
        ("sent twice", "sent several times"),
        ("beside another credential", "sent several times"),
        ("no scheme", "neither a Bearer token nor"),
        ("another scheme", "neither a Bearer token nor"),
        ("a tab behind the scheme", "neither a Bearer token nor"),
        ("as the password of b'user'", "neither a Bearer token nor"),
        ("a name with underscores", "has underscores"),
        ("prefix alone", "is malformed"),
    ],
)
def test_the_refusal_says_what_is_wrong_with_the_request(source: ApiKeySource, name: str, words: str) -> None:
    claim = source.claim(fields_of(BROKEN[name]))
    assert claim is not None
    assert claim.fault is not None
    assert words in claim.fault


@each("name", [b"x-api-key", b"x_api_key", b"x-api_key"])
def test_a_key_in_the_usual_field_is_refused_where_another_one_is_configured(
    registry: ClientRegistry, name: bytes
) -> None:
    """An upstream that reads the field might serve the key's client, while the address pays."""
    other = ApiKeySource(registry.keys, "X-Token")
    beside: HeaderList = [(b"authorization", b"Bearer " + KEY)]
    for fields in ([(name, KEY)], [(name, b"x, " + KEY)], [(name, KEY), *beside], [(name, KEY), (b"x-token", KEY)]):
        claim = other.claim(fields_of(fields))
        assert claim is not None
        assert name in claim.names
        assert claim.fault == "The header field X-API-Key has an API key; send the key in X-Token."
    assert other.claim(fields_of([(name, b"theirs")])) is None, "it belongs to the upstream"
    claim = other.claim(fields_of([(name, b"theirs"), (b"x-token", KEY)]))
    assert claim is not None
    assert claim.names == {b"x-token"}
    assert claim.fault is None
    claim = other.claim(fields_of([(b"x_token", KEY)]))
    assert claim is not None
    assert claim.fault == "The name of the header field with the API key has underscores."


def test_a_text_that_is_shown_has_no_token_either() -> None:
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhY21lIn0.c2lnbmF0dXJlLW9mLWl0"
    assert without_keys(f"GET /confirm/{token}?x=1 200") == "GET /confirm/eyJ...?x=1 200"
    assert without_keys(f"{token.rpartition('.')[0]} {token}.") == "eyJ... eyJ...."
    for text in ("/keyJar.html", "/eyJ.css", "eyJhbGciOiJFUzI1NiJ9"):
        assert without_keys(text) == text


@each("spelled", [KEY, KEY.replace(b"_", b"%5F"), b"x" + KEY])
def test_a_key_is_no_request_id_as_those_are_logged_and_sent_back(spelled: bytes) -> None:
    assert given_request_id({b"x-request-id": [spelled]}) is None
    assert given_request_id({b"x-request-id": [b"agw_order-7"]}) == "agw_order-7"


def test_a_line_of_a_log_has_no_key() -> None:
    key = KEY.decode()
    assert without_keys(f"GET /clients/{key}/keys?a={key} agw_x") == "GET /clients/agw_.../keys?a=agw_... agw_x"
    assert without_keys("nothing of 100%") == "nothing of 100%"


@each(
    "spelled",
    [
        KEY.decode().replace("_", "%5F"),
        KEY.decode().replace("_", "%5f"),
        KEY.decode().replace("_", "%255F"),
        KEY.decode().replace("_", "%25255f"),
        KEY.decode().replace("a", "%61"),
        "".join(f"%{ord(character):02x}" for character in KEY.decode()),
        "".join(f"%25{ord(character):02X}" for character in KEY.decode()),
        "".join(f"%{ord(one):02X}" if number % 2 else one for number, one in enumerate(KEY.decode())),
        basic(KEY)[6:].decode(),
        basic(KEY, b"x")[6:].decode(),
    ],
)
def test_a_line_of_a_log_has_no_key_in_another_spelling(spelled: str) -> None:
    shown = without_keys(f'{{"path": "/api/x/{spelled}?a=%41"}}')
    assert "agw_..." in shown
    assert shown.startswith('{"path": "/api/x/')
    for start in range(4, len(spelled) - 12):
        assert spelled[start : start + 12] not in shown


@each("spelled", [KEY, KEY.replace(b"_", b"%5F"), KEY.replace(b"w", b"%2577")])
def test_a_key_is_no_name_in_any_spelling(spelled: bytes) -> None:
    assert has_key(b"x:" + spelled)
    assert not has_key(spelled[:16])


# Changes of keys

OLD, NEW, THIRD = (ApiKey(character * 64, character, number) for number, character in enumerate("abc"))


def test_a_rotation_is_one_change() -> None:
    change = KeyChange(add=NEW, replaces=Replacement(OLD.digest, 50.0))
    old, new = change.applied_to([OLD])
    assert (old.digest, old.expires_at, old.replaced_by, new) == (OLD.digest, 50.0, NEW.id, NEW)
    assert change.refusal([THIRD]) is KeyRefusal.ABSENT, "the key was revoked meanwhile"
    assert change.refusal([old, new]) is KeyRefusal.REPLACED


def test_a_replaced_key_never_expires_later_than_before() -> None:
    change = KeyChange(add=NEW, replaces=Replacement(OLD.digest, 50.0))
    key, _ = change.applied_to([ApiKey(OLD.digest, expires_at=20.0)])
    assert key.expires_at == 20.0


def test_a_refused_change_of_keys_changes_nothing_else() -> None:
    before = ClientRecord("acme", "FREE", version=1, keys=(THIRD,), verified_only=True)
    keys = KeyChange(add=NEW, replaces=Replacement(OLD.digest, 50.0))
    after = Change(tier="BASIC", keys=keys, verified_only=False).applied_to(before, 2, 5.0)
    assert after == replace(before, version=2, changed_at=5.0)


def test_keys_are_removed_one_by_one_or_all() -> None:
    assert KeyChange(remove=(OLD.digest,)).applied_to([OLD, NEW]) == (NEW,)
    assert KeyChange(clear=True).applied_to([OLD, NEW]) == ()


@each(
    ("before", "given", "after"), [(None, ..., True), (False, ..., False), (None, False, False), (False, True, True)]
)
def test_the_first_key_makes_a_client_verified_only_unless_told_otherwise(
    before: bool | None,  # noqa: FBT001 - a parameter of the test
    given: object,
    after: bool,  # noqa: FBT001 - likewise
) -> None:
    keys = KeyChange(add=NEW)
    change = Change(keys=keys) if given is ... else Change(keys=keys, verified_only=bool(given))
    record = change.applied_to(ClientRecord("acme", verified_only=before), 1, 0.0)
    assert record.verified_only is after
    emptied = Change(keys=KeyChange(remove=(NEW.digest,))).applied_to(record, 2, 0.0)
    assert emptied.verified_only is after, "without its last key, the id is not open to everyone"
    assert not emptied.is_empty
