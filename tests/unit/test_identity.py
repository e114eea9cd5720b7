"""The identifier that a client may send."""

import pytest

from api_gateway.clients.api_keys import new_key
from api_gateway.clients.identity import client_id
from api_gateway.errors import ClientIdInvalid
from api_gateway.http1.headers import fields_of
from tests.cases import each


@each(("sent", "name"), [(b"a", "a"), (b"x" * 128, "x" * 128), (b"!~\"{}'", "!~\"{}'"), (b" acme\t", "acme")])
def test_a_client_is_what_it_calls_itself(sent: bytes, name: str) -> None:
    assert client_id(fields_of([(b"X-CLIENT-id", sent), (b"other", b"x")]), b"x-client-id") == name


def test_a_client_need_not_say_who_it_is() -> None:
    assert client_id(fields_of([(b"x-client", b"acme")]), b"x-client-id") is None


@each(
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


def test_an_api_key_is_no_client_id_and_is_not_shown() -> None:
    key = new_key(b"\1" * 32)
    with pytest.raises(ClientIdInvalid, match="an API key instead of a client id") as caught:
        client_id(fields_of([(b"x-client-id", key.encode())]), b"x-client-id")
    assert key[4:] not in caught.value.detail
    assert client_id(fields_of([(b"x-client-id", b"agw_team")]), b"x-client-id") == "agw_team"


@each("before", [b"", b"k:", b"Bearer ", b"x" * 200])
def test_a_value_with_a_key_is_refused_without_showing_it(before: bytes) -> None:
    key = new_key(bytes(32)).encode()
    with pytest.raises(ClientIdInvalid) as caught:
        client_id(fields_of([(b"x-client-id", before + key)]), b"x-client-id")
    assert "API key" in caught.value.detail
    assert key[4:12].decode() not in caught.value.detail
