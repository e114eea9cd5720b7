"""The keys of an issuer: fetched once for all, at a bounded rate, used while it is down, and replaced by rotation."""

import asyncio
import json
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from api_gateway.assembly.issuers import keys_of, meanings_of, terms_of
from api_gateway.clients import issuer_keys
from api_gateway.clients.issuer_keys import FETCH_TIMEOUT, IssuerKeys, KeysUnavailable, VerificationKey
from api_gateway.clients.jose import keys_of_set
from api_gateway.errors import StartupError
from api_gateway.settings.jwt import ASYMMETRIC, IssuerSection
from api_gateway.transport.document_fetch import MAX_DOCUMENT_BYTES, DocumentUnavailable, fetch_document
from tests.cases import each
from tests.jwt_kit import AUDIENCE, DISCOVERY, ISSUER, Published, key_for, key_set
from tests.kit import FakeClock, refusing_url, soon

REFRESH, UNKNOWN, STALE = 300.0, 10.0, 3600.0


class Issuer:
    """An issuer whose keys a test publishes, or which is down."""

    def __init__(self) -> None:
        self.numbers: Sequence[int] = (1,)
        self.error: Exception | None = None
        self.loads = 0
        self.gate: asyncio.Event | None = None

    async def load(self) -> Sequence[VerificationKey]:
        self.loads += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return keys_of_set(key_set(*(key_for("ES256", number) for number in self.numbers)), ASYMMETRIC)


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def withdrawals() -> list[None]:
    return []


@pytest.fixture
def keys(issuer: Issuer, clock: FakeClock, withdrawals: list[None]) -> IssuerKeys:
    return IssuerKeys(
        "one",
        issuer.load,
        clock=clock,
        refresh_interval=REFRESH,
        unknown_key_interval=UNKNOWN,
        stale_for=STALE,
        on_withdrawal=lambda: withdrawals.append(None),
    )


def found(keys: IssuerKeys, number: int = 1) -> list[VerificationKey]:
    return keys.candidates(f"ES256-{number}", "ES256")


async def test_all_who_wait_share_one_fetch(keys: IssuerKeys, issuer: Issuer) -> None:
    issuer.gate = asyncio.Event()
    assert keys.may_find()
    waiting = [asyncio.create_task(keys.fetched()) for _ in range(100)]
    await soon(lambda: issuer.loads > 0, "a fetch")
    assert keys.may_find()
    issuer.gate.set()
    await asyncio.gather(*waiting)
    assert (issuer.loads, len(found(keys))) == (1, 1)


async def test_a_request_that_saw_a_fetch_which_has_ended_starts_no_other(keys: IssuerKeys, issuer: Issuer) -> None:
    issuer.gate = asyncio.Event()
    fetch = asyncio.create_task(keys.fetched())
    await soon(lambda: issuer.loads > 0, "a fetch")
    assert keys.may_find()  # what a request sees that is to wait
    issuer.gate.set()
    await fetch
    await keys.look_for_new()
    assert (issuer.loads, len(found(keys))) == (1, 1)


async def test_one_who_leaves_does_not_end_the_fetch_for_the_others(keys: IssuerKeys, issuer: Issuer) -> None:
    issuer.gate = asyncio.Event()
    waiting = [asyncio.create_task(keys.fetched()) for _ in range(2)]
    await soon(lambda: issuer.loads > 0, "a fetch")
    waiting[0].cancel()
    issuer.gate.set()
    await waiting[1]
    assert found(keys)


async def test_unknown_keys_cause_fetches_at_a_bounded_rate(
    keys: IssuerKeys, issuer: Issuer, clock: FakeClock
) -> None:
    await keys.fetched()
    for _ in range(1000):
        if keys.may_find():
            await keys.fetched()
        clock.advance(0.1)
    assert issuer.loads <= 1 + 100 / UNKNOWN


async def test_rotated_keys_are_found_and_old_ones_withdrawn(
    keys: IssuerKeys, issuer: Issuer, clock: FakeClock, withdrawals: list[None]
) -> None:
    await keys.fetched()
    (first,) = found(keys)
    issuer.numbers = (1, 2)
    clock.advance(UNKNOWN)
    assert keys.may_find()
    await keys.fetched()
    assert found(keys) == [first]  # the same object, so that tokens verified with it stay verified
    assert (len(found(keys, 2)), first.is_withdrawn, withdrawals) == (1, False, [])
    issuer.numbers = (2,)
    await keys.fetched()
    assert (found(keys), first.is_withdrawn, withdrawals) == ([], True, [None])


async def test_keys_are_used_while_the_issuer_is_down_for_a_limited_time(
    keys: IssuerKeys, issuer: Issuer, clock: FakeClock, withdrawals: list[None]
) -> None:
    await keys.fetched()
    (key,) = found(keys)
    issuer.error = KeysUnavailable("connection refused")
    clock.advance(STALE)
    await keys.fetched()
    assert (found(keys), keys.error, withdrawals) == ([key], "connection refused", [])
    assert "stale" in repr(keys)
    clock.advance(1)
    await keys.fetched()
    assert keys.is_empty
    assert (key.is_withdrawn, withdrawals) == (True, [None])
    assert keys.fetched_at == clock() - STALE - 1, "the last success is known, although its keys are not used any more"
    issuer.error = None
    await keys.fetched()
    assert (len(found(keys)), keys.error) == (1, None)
    assert not found(keys)[0].is_withdrawn


async def test_an_issuer_that_is_down_is_asked_less_and_less_often(keys: IssuerKeys, issuer: Issuer) -> None:
    issuer.error = KeysUnavailable("down")
    waits = []
    for _ in range(8):
        await keys.fetched()
        waits.append(keys._next_delay())
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert (keys.fetches, keys.failures) == (8, 8)


async def test_a_request_that_waits_as_it_was_told_starts_a_fetch(
    keys: IssuerKeys, issuer: Issuer, clock: FakeClock
) -> None:
    issuer.error = KeysUnavailable("down")
    await keys.fetched()
    assert keys.retry_after == 1
    clock.advance(1)
    assert keys.may_find()
    issuer.error = None
    await keys.fetched()
    clock.advance(UNKNOWN)
    issuer.error = KeysUnavailable("down")
    await keys.fetched()
    clock.advance(3.5)
    assert keys.retry_after == UNKNOWN - 3.5
    clock.advance(UNKNOWN - 3.5 - 1e-9)
    assert not keys.may_find()
    clock.advance(1e-9)
    assert keys.may_find()


async def test_a_defect_of_a_fetch_is_a_failure_after_which_it_is_repeated(keys: IssuerKeys, issuer: Issuer) -> None:
    issuer.error = RuntimeError("a defect, with a secret")
    await keys.fetched()
    assert (keys.is_empty, keys.error) == (True, "internal error: RuntimeError")
    issuer.error = None
    await keys.fetched()
    assert found(keys)


async def test_keys_are_fetched_in_the_background_before_anyone_needs_them(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(issuer_keys, "_FIRST_RETRY", 0.01)
    loop = asyncio.get_running_loop()
    keys = IssuerKeys(
        "one", issuer.load, clock=loop.time, refresh_interval=0.01, unknown_key_interval=UNKNOWN, stale_for=STALE
    )
    task = asyncio.create_task(keys.run())
    await soon(lambda: issuer.loads > 3, "several fetches")
    issuer.numbers = (2,)
    await soon(lambda: bool(found(keys, 2)), "the new key")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_end_of_the_task_ends_its_fetch_and_frees_those_who_wait(keys: IssuerKeys, issuer: Issuer) -> None:
    issuer.gate = asyncio.Event()
    task = asyncio.create_task(keys.run())
    await soon(lambda: issuer.loads > 0, "a fetch")
    waiting = asyncio.create_task(keys.fetched())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await waiting
    assert keys.is_empty


# Where keys come from


def section(**settings: Any) -> IssuerSection:
    return IssuerSection.model_validate({"issuer": ISSUER, "audiences": [AUDIENCE], **settings})


def built(clock: FakeClock, **settings: Any) -> IssuerKeys:
    return keys_of("one", section(**settings), clock=clock)


@pytest.fixture
def published() -> Iterator[Published]:
    issuer = Published()
    yield issuer
    issuer.server.close()


@pytest.mark.parametrize("slash", ["", "/"])
async def test_keys_are_discovered(clock: FakeClock, slash: str) -> None:
    published = Published(slash)
    keys = built(clock, issuer=published.issuer)
    await keys.fetched()
    published.server.close()
    assert found(keys), keys.error


async def test_keys_are_fetched_from_their_url(published: Published, clock: FakeClock) -> None:
    keys = built(clock, jwks_url=f"{published.server.url}/keys")
    await keys.fetched()
    assert found(keys), keys.error
    assert [request.line for request in published.server.requests] == [b"GET /keys HTTP/1.1"]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"issuer": "https://attacker.test"}, "not the configured"),
        ({"issuer": None}, "not the configured"),
        ({"jwks_uri": None}, "not an https URL"),
        ({"jwks_uri": "file:///etc/passwd"}, "not an https URL"),
        ({"jwks_uri": "http://keys.test/keys"}, "not an https URL"),
        ({"jwks_uri": "https://user:secret@keys.test/keys"}, "not an https URL"),
        ({"jwks_uri": "http://keys.test/keys?code=secret"}, "not an https URL"),
    ],
)
async def test_a_wrong_configuration_of_the_issuer_is_not_followed(
    published: Published, clock: FakeClock, changes: dict[str, Any], cause: str
) -> None:
    published.configuration |= changes
    keys = built(clock, issuer=published.issuer)
    await keys.fetched()
    assert keys.is_empty
    assert cause in str(keys.error)
    assert "secret" not in str(keys.error)


async def test_the_query_of_a_url_is_in_no_message(published: Published, clock: FakeClock) -> None:
    keys = built(clock, jwks_url=f"{published.server.url}/keys?code=secret")
    await keys.fetched()
    assert keys.error == f"{published.server.url}/keys?…: status 404"
    assert published.server.requests[0].line == b"GET /keys?code=secret HTTP/1.1"


@pytest.mark.parametrize(
    ("settings", "is_fetched"),
    [({"issuer": "https://sso.test"}, False), ({"issuer": "https://sso.test", "allow_http": True}, True)],
)
async def test_a_remote_configuration_does_not_have_services_of_this_machine_fetched(
    clock: FakeClock, settings: dict[str, Any], *, is_fetched: bool
) -> None:
    fetched: list[str] = []

    async def fetch(url: str, _context: Any) -> bytes:
        fetched.append(url)
        keys_of_document = {"issuer": "https://sso.test", "jwks_uri": "http://127.0.0.1:9000/keys"}
        return json.dumps(keys_of_document).encode() if "well-known" in url else key_set(key_for("ES256"))

    keys = keys_of("one", section(**settings), clock=clock, fetch=fetch)
    await keys.fetched()
    assert ("http://127.0.0.1:9000/keys" in fetched) is is_fetched
    assert keys.is_empty is not is_fetched


@pytest.mark.parametrize(
    ("status", "document", "cause"),
    [
        (b"302 Found", b"{}", "status 302"),
        (b"500 Internal Server Error", b"{}", "status 500"),
        (b"200 OK", b"<html>", "no JSON"),
        (b"200 OK", b'{"keys": []}', "none of its 0 keys"),
        (b"200 OK", b" " * (MAX_DOCUMENT_BYTES + 1), "larger than"),
    ],
)
async def test_a_response_without_keys_is_a_failure(
    published: Published, clock: FakeClock, status: bytes, document: bytes, cause: str
) -> None:
    published.status, published.documents["/keys"] = status, document
    keys = built(clock, jwks_url=f"{published.server.url}/keys")
    await keys.fetched()
    assert keys.is_empty
    assert cause in str(keys.error)


async def test_an_issuer_that_cannot_be_reached_is_a_failure(clock: FakeClock) -> None:
    keys = built(clock, jwks_url=f"{refusing_url()}/keys")
    await keys.fetched()
    assert "failed" in str(keys.error)
    assert await unavailable("https://[::1")


async def unavailable(url: str) -> str:
    with pytest.raises(DocumentUnavailable) as caught:
        await fetch_document(url, ssl.create_default_context())
    return str(caught.value)


async def test_a_fetch_takes_a_limited_time(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_url: str, _context: ssl.SSLContext) -> bytes:
        await asyncio.Event().wait()
        return b""

    assert FETCH_TIMEOUT <= 5
    monkeypatch.setattr("api_gateway.clients.issuer_keys.FETCH_TIMEOUT", 0.01)
    keys = keys_of("one", section(), clock=clock, fetch=never)
    await keys.fetched()
    assert keys.error == "no response within 0.01 s"


async def test_keys_are_read_from_a_file_each_time(tmp_path: Path, clock: FakeClock) -> None:
    file = tmp_path / "keys.json"
    file.write_bytes(key_set(key_for("ES256")))
    keys = built(clock, jwks_file=file)
    await keys.fetched()
    assert found(keys)
    file.write_bytes(key_set(key_for("ES256", 2)))
    await keys.fetched()
    assert found(keys, 2)


async def test_a_secret_is_a_key_for_any_key_id(clock: FakeClock) -> None:
    keys = built(clock, secret="x" * 32)
    await keys.fetched()
    assert len(keys.candidates("any", "HS256")) == len(keys.candidates(None, "HS256")) == 1
    assert not keys.candidates(None, "RS256")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jwks_file": "missing.json"}, "jwks_file: cannot be used: No such file"),
        ({"jwks_file": "empty.json"}, "jwks_file: cannot be used: it is no JSON"),
        ({"secret_file": "public.pem"}, "secret: Asymmetric public keys must not be used"),
        ({"ca_file": "missing.pem"}, "ca_file: cannot be used"),
        ({"ca_file": "empty.json"}, "ca_file: cannot be used"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_at_the_start(
    tmp_path: Path, clock: FakeClock, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty.json").touch()
    public = "ssh-ed25519 " + "AAAAC3NzaC1lZDI1NTE5AAAAIGPKSUTyz1HwHReFVvD5obVsALAgJRNarH4TRpNePnAS a@b"
    (tmp_path / "public.pem").write_text(public)
    with pytest.raises(StartupError, match=message) as caught:
        built(clock, **settings)
    assert str(caught.value).startswith("identity.jwt.issuers.one.")
    assert public not in str(caught.value)


def test_a_missing_library_is_an_error_that_names_the_extra(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'joserfc'")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(StartupError, match=r"pip install 'api-gateway\[jwt\]'"):
        built(clock)


def test_sections_become_terms_and_meanings() -> None:
    given = section(types=["application/at+JWT"], tier_claim="plan", algorithms=["RS256"], leeway=5)
    terms, meanings = terms_of("one", given), meanings_of(given, {"FREE": 1})
    assert (terms.name, set(terms.types), set(terms.algorithms)) == ("one", {"at+jwt"}, {"RS256"})
    assert terms.leeway == 5
    assert (str(meanings.client), str(meanings.tier), meanings.tiers) == ("sub", "plan", {"FREE": "FREE"})


# The section


@each(
    ("settings", "message"),
    [
        ({"audiences": []}, "at least 1 item"),
        ({"issuer": "http://issuer.test"}, "issuer must be an https URL"),
        ({"issuer": "issuer.test"}, "issuer must be an https URL"),
        ({"issuer": "https://issuer.test/\n"}, "visible ASCII"),
        ({"jwks_url": "http://issuer.test/keys"}, "jwks_url must be an https URL"),
        ({"jwks_url": "ftp://issuer.test/keys"}, "must be an https URL"),
        ({"jwks_url": "https://a:b@issuer.test/keys"}, "neither a user name"),
        ({"jwks_url": "https://issuer.test/keys", "jwks_file": "keys"}, "one source of keys"),
        ({"algorithms": ["none"]}, "Input should be"),
        ({"algorithms": ["HS256"]}, "needs a secret"),
        ({"algorithms": ["RS256"], "secret": "x" * 32}, "a secret is for"),
        ({"secret": "x" * 31}, "at least 32 bytes"),
        ({"secret": "x" * 32, "algorithms": ["HS512"]}, "at least 64 bytes"),
        ({"client_prefix": "a b"}, "match pattern"),
        ({"leeway": -1}, "greater than"),
        ({"headers": {"Authorization": "sub"}}, "has a meaning of its own"),
        ({"headers": {"X-Forwarded-For": "sub"}}, "has a meaning of its own"),
        ({"headers": {"X_User": "sub"}}, "match pattern"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**settings)


def test_keys_may_come_without_tls_from_loopback_or_if_that_is_permitted() -> None:
    assert section(issuer="http://127.0.0.1:8080/realms/a").document_url == (
        f"http://127.0.0.1:8080/realms/a{DISCOVERY}"
    )
    assert section(issuer="http://keycloak:8080/realms/a", allow_http=True).document_url
    assert section(issuer="any:text", jwks_file="keys.json").document_url is None
