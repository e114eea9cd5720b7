"""Requests that a page of another site makes with the operator's browser are refused."""

import pytest

from api_gateway.admin.cross_site import check_content_type, is_foreign, is_forged
from api_gateway.errors import InvalidValue
from api_gateway.http1.headers import fields_of
from api_gateway.models import HeaderList
from tests.cases import each

HOST = (b"host", b"localhost:8000")


def from_(*headers: tuple[bytes, bytes]) -> dict[bytes, list[bytes]]:
    return fields_of([HOST, *headers])


@each(
    "headers",
    [
        [],
        [(b"origin", b"http://localhost:8000")],
        [(b"Origin", b"HTTP://LocalHost:8000")],
        [(b"origin", b"https://localhost:8000")],  # TLS may end in front of us
        [(b"sec-fetch-site", b"same-origin"), (b"origin", b"http://localhost:8000")],
        [(b"sec-fetch-site", b"none")],  # typed into the address bar
    ],
)
def test_the_own_origin_and_no_page_at_all_are_not_foreign(headers: HeaderList) -> None:
    assert not is_foreign(from_(*headers))


@each(
    ("host", "origin"),
    [
        (b"gateway.example", b"https://gateway.example"),
        (b"gateway.example", b"https://gateway.example:443"),
        (b"gateway.example:443", b"https://gateway.example"),
        (b"gateway.example:80", b"http://gateway.example"),
        (b"[::1]:8000", b"http://[::1]:8000"),
    ],
)
def test_the_default_port_may_be_left_out(host: bytes, origin: bytes) -> None:
    assert not is_foreign(fields_of([(b"host", host), (b"origin", origin)]))


FOREIGN: list[HeaderList] = [
    [(b"origin", b"https://evil.example")],
    [(b"origin", b"http://localhost:3000")],
    [(b"origin", b"http://localhost")],
    [(b"origin", b"http://localhost:8000.evil.example")],
    [(b"origin", b"http://127.0.0.1:8000")],
    [(b"origin", b"null")],
    [(b"origin", b"")],
    [(b"origin", b"localhost:8000")],
    [(b"origin", b"file://localhost:8000")],
    [(b"origin", b"chrome-extension://localhost:8000")],
    [(b"origin", b"http://localhost:8000"), (b"origin", b"https://evil.example")],
    [(b"sec-fetch-site", b"cross-site")],
    [(b"sec-fetch-site", b"same-site")],
    [(b"Sec-Fetch-Site", b"CROSS-SITE")],
    [(b"sec-fetch-site", b"unheard-of")],
    [(b"sec-fetch-site", b"")],
    [(b"sec-fetch-site", b"same-origin"), (b"sec-fetch-site", b"cross-site")],
    [(b"sec-fetch-site", b"cross-site"), (b"origin", b"http://localhost:8000")],
]


@each("headers", FOREIGN)
def test_any_other_origin_is_refused(headers: HeaderList) -> None:
    for method in ("GET", "POST", "DELETE"):
        assert is_forged(method, from_(*headers), holds_data=True)


@pytest.mark.parametrize("hosts", [[], [HOST, HOST]])
def test_without_one_host_no_origin_is_the_own(hosts: HeaderList) -> None:
    assert is_foreign(fields_of([*hosts, (b"origin", b"http://localhost:8000")]))


NAVIGATION = ((b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate"))


def test_a_link_may_lead_to_a_page_that_holds_no_data() -> None:
    fields = from_(*NAVIGATION, (b"sec-fetch-dest", b"document"))
    assert not is_forged("GET", fields, holds_data=False)
    for method, holds_data in (("GET", True), ("POST", False), ("DELETE", False)):
        assert is_forged(method, fields, holds_data=holds_data)


@each("destination", [b"iframe", b"image", b"empty", b""])
def test_a_page_is_not_embedded_in_another(destination: bytes) -> None:
    assert is_forged("GET", from_(*NAVIGATION, (b"sec-fetch-dest", destination)), holds_data=False)


LENGTH = (b"content-length", b"5")


@each(
    ("method", "headers"),
    [
        ("POST", [LENGTH, (b"content-type", b"application/json")]),
        ("POST", [LENGTH, (b"Content-Type", b"Application/JSON; charset=utf-8")]),
        ("POST", [(b"transfer-encoding", b"chunked"), (b"content-type", b"application/json ;x=y")]),
        ("POST", []),
        ("POST", [(b"content-length", b"0")]),
        ("DELETE", []),
        ("GET", [(b"content-type", b"text/plain")]),
    ],
)
def test_json_and_no_body_are_taken(method: str, headers: HeaderList) -> None:
    check_content_type(method, from_(*headers))


@each("method", ["POST", "DELETE", "PUT", "PATCH", "ANYTHING"])
@each(
    "headers",
    [
        [LENGTH],
        [(b"transfer-encoding", b"chunked")],
        [LENGTH, (b"content-type", b"text/plain")],
        [LENGTH, (b"content-type", b"application/x-www-form-urlencoded")],
        [LENGTH, (b"content-type", b"text/plain; application/json")],
        [LENGTH, (b"content-type", b"application/jsonx")],
        [LENGTH, (b"content-type", b"application/json, text/plain")],
        [LENGTH, (b"content-type", b"application/json"), (b"content-type", b"text/plain")],
        [LENGTH, (b"content-type", b"")],
        [(b"content-length", b"0"), (b"content-type", b"text/plain")],  # an empty form
        [(b"content-type", b"multipart/form-data; boundary=x")],
    ],
)
def test_what_a_form_can_send_is_refused(method: str, headers: HeaderList) -> None:
    with pytest.raises(InvalidValue, match="'Content-Type: application/json'"):
        check_content_type(method, from_(*headers))


def test_the_message_shows_what_was_sent_and_no_more_than_that() -> None:
    with pytest.raises(InvalidValue) as caught:
        check_content_type("POST", from_(LENGTH, (b"content-type", b"a\xe9\x1b[1m" + b"x" * 500)))
    assert caught.value.detail.isascii()
    assert caught.value.detail.isprintable()
    assert len(caught.value.detail) < 250
