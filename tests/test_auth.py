"""Who may ask: what a client may call itself, and whom the operator's endpoints answer."""

import pytest

from api_gateway.auth import AdminGuard, client_id
from api_gateway.errors import ClientIdInvalid, Forbidden, Unauthorized
from api_gateway.headers import FORWARDING, fields_of
from api_gateway.models import HeaderList

TOKEN = "a-long-enough-token"
LOCAL: HeaderList = [(b"host", b"localhost:8000")]


# Clients


@pytest.mark.parametrize(
    ("sent", "name"), [(b"a", "a"), (b"x" * 128, "x" * 128), (b"!~\"{}'", "!~\"{}'"), (b" acme\t", "acme")]
)
def test_a_client_is_what_it_calls_itself(sent: bytes, name: str) -> None:
    assert client_id(fields_of([(b"X-CLIENT-id", sent), (b"other", b"x")]), b"x-client-id") == name


def test_a_client_need_not_say_who_it_is() -> None:
    assert client_id(fields_of([(b"x-client", b"acme")]), b"x-client-id") is None


@pytest.mark.parametrize(
    "sent",
    [b"", b" ", b"x" * 129, "é".encode(), b"\xff", b"two words", b"tab\there", b"line\nbreak", b"nul\0", b"\x7f"],
)
def test_a_client_cannot_call_itself_anything(sent: bytes) -> None:
    with pytest.raises(ClientIdInvalid) as caught:
        client_id(fields_of([(b"x-client-id", sent)]), b"x-client-id")
    assert caught.value.status == 400
    assert "X-Client-ID" in caught.value.detail
    assert caught.value.detail.isascii()
    assert caught.value.detail.isprintable()


def test_a_long_name_is_not_echoed_in_full() -> None:
    with pytest.raises(ClientIdInvalid) as caught:
        client_id(fields_of([(b"x-client-id", b"x" * 10_000)]), b"x-client-id")
    assert len(caught.value.detail) < 200
    assert "10000" in caught.value.detail


def test_a_name_sent_twice_is_refused_even_if_it_is_the_same() -> None:
    with pytest.raises(ClientIdInvalid, match=r"X-Key.* 2 times"):
        client_id(fields_of([(b"X-Key", b"acme"), (b"x-key", b"acme")]), b"x-key")


# The operator, without a token


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:8000", b"[::1]:8000", b"[::1]"])
def test_without_a_token_this_machine_may_pass(host: bytes) -> None:
    guard = AdminGuard(None)
    guard.check([(b"Host", host)], is_loopback=True)
    assert guard.allows([(b"Host", host)], is_loopback=True)


@pytest.mark.parametrize("name", sorted(FORWARDING | {b"via"}))
def test_without_a_token_what_a_proxy_forwarded_may_not_pass(name: bytes) -> None:
    refused_without_token([*LOCAL, (name.title(), b"127.0.0.1")])


@pytest.mark.parametrize(
    "headers",
    [[(b"host", b"gateway.example")], [(b"host", b"localhost.evil.example")], [(b"host", b"")], [], [*LOCAL, *LOCAL]],
)
def test_without_a_token_a_request_for_another_host_may_not_pass(headers: HeaderList) -> None:
    """A page in a local browser can reach us through a name that resolves here (DNS rebinding)."""
    refused_without_token(headers)


def test_without_a_token_another_machine_may_not_pass() -> None:
    refused_without_token(LOCAL, is_loopback=False)


def test_without_a_token_no_authorization_helps() -> None:
    refused_without_token([*LOCAL, (b"authorization", b"Bearer None")], is_loopback=False)


def refused_without_token(headers: HeaderList, *, is_loopback: bool = True) -> None:
    guard = AdminGuard(None)
    with pytest.raises(Forbidden, match=r"admin\.token"):
        guard.check(headers, is_loopback=is_loopback)
    assert not guard.allows(headers, is_loopback=is_loopback)


# The operator, with a token


@pytest.mark.parametrize("headers", [[], [(b"host", b"gateway.example"), (b"via", b"1.1 x")]])
@pytest.mark.parametrize("is_loopback", [True, False])
def test_the_token_opens_from_anywhere(headers: HeaderList, is_loopback: bool) -> None:  # noqa: FBT001 - parametrised
    guard = AdminGuard(TOKEN)
    headers = [*headers, (b"Authorization", f"Bearer {TOKEN}".encode())]
    guard.check(headers, is_loopback=is_loopback)
    assert guard.allows(headers, is_loopback=is_loopback)


@pytest.mark.parametrize(
    "given",
    [
        [],
        [b""],
        [b"Bearer "],
        [b"Bearer wrong"],
        [f"Bearer {TOKEN}x".encode()],
        [f"Bearer {TOKEN[:-1]}".encode()],
        [f"Bearer {TOKEN.upper()}".encode()],
        [f"Basic {TOKEN}".encode()],
        [TOKEN.encode()],
        [b"Bearer \xff\xfe"],
        [f"Bearer {TOKEN}".encode()] * 2,
        [b"Bearer wrong", f"Bearer {TOKEN}".encode()],
    ],
)
def test_without_the_right_token_once_nobody_may_pass(given: list[bytes]) -> None:
    """Once a token is set it is always needed, also from this machine."""
    guard = AdminGuard(TOKEN)
    headers = [*LOCAL, *((b"authorization", value) for value in given)]
    with pytest.raises(Unauthorized) as caught:
        guard.check(headers, is_loopback=True)
    assert caught.value.headers["www-authenticate"].startswith("Bearer")
    assert TOKEN not in caught.value.detail
    assert not guard.allows(headers, is_loopback=True)


def test_a_token_may_hold_any_text() -> None:
    assert AdminGuard("gehëim-tøken").allows([(b"authorization", "Bearer gehëim-tøken".encode())], is_loopback=False)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_the_scheme_may_be_spelt_in_any_case(scheme: str) -> None:
    """RFC 9110 section 11.1: the name of a scheme is case-insensitive."""
    assert AdminGuard(TOKEN).allows([(b"authorization", f"{scheme} {TOKEN}".encode())], is_loopback=False)


def test_the_guard_tells_its_state_and_not_its_token() -> None:
    assert TOKEN not in repr(AdminGuard(TOKEN))
    assert repr(AdminGuard(TOKEN)) != repr(AdminGuard(None))
    assert "loopback" in repr(AdminGuard(None))
