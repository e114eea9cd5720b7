"""Which parts of a message the gateway keeps and which it changes: trailers, names, targets, lengths."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.kit import (
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reason,
    reply,
)

SOON = 3.0
CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    return in_front_of(shared.url) | {"server": {"drain_timeout": 1}}


def says(answer: bytes) -> Callable[[Wire, RawRequest], None]:
    """Return a behaviour that sends exactly this."""
    return lambda wire, _request: wire.send(answer)


# Trailers


def test_trailers_of_a_request_arrive_as_trailers(client: RawClient, up: RawUpstream, trailing: list[bytes]) -> None:
    late = b"X-MiXed: 1\r\nChecksum: caf\xe9\r\nX-MiXed: 2\r\n\r\n"
    client.request("POST", "/api/x", (CHUNKED, "Trailer: Checksum"), b"2\r\nok\r\n0\r\n" + late)
    assert client.answer().status == 200
    assert trailing == [late]
    assert up.requests[0].all("x-mixed") == up.requests[0].all("checksum") == []


@pytest.mark.parametrize(
    "forged",
    [
        *("X-Forwarded-For: 1.2.3.4", "X_Forwarded_For: 1.2.3.4", "x-client-id: other", "x_client_id: other"),
        *("Transfer_Encoding: chunked", "Content_Length: 9"),
        *("Host: evil.test", "Authorization: Basic x", "Cookie: a=b"),
        *("Forwarded: for=1.2.3.4", "X-Request-ID: mine", "Connection: close", "Via: 1.1 x", "TE: gzip", "Proxy: h:1"),
    ],
)
def test_fields_that_decide_about_a_request_cannot_be_trailers(
    client: RawClient, up: RawUpstream, trailing: list[bytes], forged: str
) -> None:
    body = b"2\r\nok\r\n0\r\n" + forged.encode() + b"\r\nX-Kept: 1\r\n\r\n"
    client.request("POST", "/api/x", (CHUNKED, "X-Client-ID: acme"), body)
    assert client.answer().status == 200
    assert trailing == [b"X-Kept: 1\r\n\r\n"]
    name, value = forged.split(": ")
    assert value.encode() not in up.requests[0].all(name)


@pytest.mark.parametrize("forged", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_framing_fields_cannot_be_trailers(
    client: RawClient, up: RawUpstream, trailing: list[bytes], forged: bytes
) -> None:
    client.request("POST", "/api/x", (CHUNKED,), b"2\r\nok\r\n0\r\n" + forged + b"\r\n\r\n")
    assert reason(client.answer()) == (400, "bad_request")
    assert client.is_closed()
    assert trailing in ([], [b"\r\n\r\n"])  # the upstream sees the body broken off


ANSWER_WITH_TRAILERS = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-MiXed\r\n\r\n"
    b"2\r\nok\r\n0\r\nX-MiXed: 1\r\nX-RateLimit-Limit: 7\r\nSet-Cookie: a=b\r\n\r\n"
)


@pytest.mark.parametrize(
    ("te", "end"),
    [
        (("TE: trailers",), b"X-MiXed: 1\r\n\r\n"),
        (("TE: gzip, Trailers",), b"X-MiXed: 1\r\n\r\n"),
        (("TE: gzip",), b"\r\n"),
        ((), b"\r\n"),
    ],
)
def test_trailers_of_a_response_reach_who_asked_for_them(
    client: RawClient, up: RawUpstream, te: tuple[str, ...], end: bytes
) -> None:
    up.behave = says(ANSWER_WITH_TRAILERS)
    client.request(headers=te)
    head = client.read_until(b"\r\n\r\n")
    assert head is not None
    assert b"MiXed: 1" not in head
    assert client.read_until(b"0\r\n") == b"2\r\nok\r\n0\r\n"
    assert client.read_exactly(len(end)) == end
    up.behave = reply()
    assert client.get().body == b"ok"


@pytest.mark.parametrize(
    "line",
    [
        b"HEAD /api/x HTTP/1.1",
        b"GET /api/304 HTTP/1.1",
        b"GET /api/x HTTP/1.0",
    ],
)
def test_a_response_that_cannot_have_trailers_is_complete_without_them(
    running: RunningGateway, client: RawClient, up: RawUpstream, line: bytes
) -> None:
    before = running.live.recorder.refusals["internal_error"]
    answer = ANSWER_WITH_TRAILERS
    if b"HEAD" in line or b"304" in line:
        answer = answer[: answer.index(b"\r\n\r\n") + 4].replace(b"200 OK", b"304 No" if b"304" in line else b"200 OK")
    up.behave = says(answer)
    client.send(line + b"\r\nHost: a\r\nTE: trailers\r\n\r\n")
    got = client.answer("HEAD" if b"HEAD" in line else "GET")
    assert (got.status, got.body) in ((200, b""), (200, b"ok"), (304, b""))
    eventually(lambda: running.live.recorder.in_flight == 0, "the exchange ends", within=SOON)
    assert running.live.recorder.refusals["internal_error"] == before


@pytest.mark.parametrize(
    "late",
    [
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Connection: close\r\n",
        b"X: a\x01b\r\n",
        b"X: a\0b\r\n",
        b"X: a\r\n b\r\n",
        b"no colon\r\n",
        b": no name\r\n",
        b"X : a\r\n",
        b"X-Big: " + b"x" * 300_000 + b"\r\n",
        b"X-Many: 1\r\n" * 30_000,
    ],
)
@pytest.mark.parametrize("te", [(), ("TE: trailers",)])
def test_no_trailer_spoils_a_response(client: RawClient, up: RawUpstream, te: tuple[str, ...], late: bytes) -> None:
    chunks = b"2\r\nok\r\n0\r\nX-First: 1\r\n"
    up.behave = says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + late + b"\r\n")
    for _ in range(2):
        client.request(headers=te)
        answer = client.answer()
        assert (answer.status, answer.body, answer.is_complete) == (200, b"ok", True)
    up.behave = reply()
    assert client.get().body == b"ok"


# Heads on their way


@pytest.mark.parametrize(
    "interim",
    [
        b"",
        b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n",
        b"HTTP/1.1 103 Early\x01Hints\r\nLink: a\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: \x01a\x1b\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\x7f\r\n\r\n",
    ],
    ids=["none", "plain", "reason", "field", "second"],
)
@pytest.mark.parametrize("cut", [0, 30, 64, 90])
def test_control_characters_in_a_field_of_a_response_become_spaces(
    client: RawClient, up: RawUpstream, cut: int, interim: bytes
) -> None:
    """RFC 9110 section 5.5."""
    head = b"HTTP/1.1 200 OK\r\nX-A: a\x01b\x7fc\r\nX-Tab: a\tb\r\nX-B: \x0b\x1b[1m\x1f\r\nContent-Length: 3\r\n\r\n"

    def behave(wire: Wire, _request: RawRequest) -> None:
        whole = interim + head + b"\x01ok"
        wire.send(whole[:cut])
        time.sleep(0.05 if cut else 0)
        wire.send(whole[cut:])

    up.behave = behave
    for _ in range(2):
        client.request()
        for _ in range(interim.count(b"103")):
            assert (client.read_until(b"\r\n\r\n") or b"").startswith(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n")
        answer = client.answer()
        assert (answer.status, answer.body) == (200, b"\x01ok")
        assert (answer.all("x-a"), answer.all("x-tab"), answer.all("x-b")) == ([b"a b c"], [b"a\tb"], [b"[1m"])


@pytest.mark.parametrize("head", [b"HTTP/0.9 200", b"HTTP/2.0 200", b"RTSP/1.0 200", b"ICE/1.0 200", b"HTTP/2.0 103"])
def test_a_response_of_another_version_or_protocol_is_a_502(client: RawClient, up: RawUpstream, head: bytes) -> None:
    up.behave = says(head + b" OK\r\nContent-Length: 2\r\n\r\nok")
    assert reason(client.get()) == (502, "upstream_protocol_error")
    up.behave = reply()
    assert client.get().status == 200  # and the breaker stays closed


@pytest.mark.parametrize(
    "field",
    [
        b"Content-Length: 2\x01",
        b"Content-Length: \x002",
        b"Transfer-Encoding: \x0bchunked",
        b"X\x01: a",
        b"X: a\rb",
        b"X: a\0b",
        b"X: a\r\n b",
    ],
)
def test_what_could_change_the_framing_is_not_repaired(
    gateway: Callable[..., RunningGateway], upstream: Callable[..., RawUpstream], field: bytes
) -> None:
    origin = upstream(says(b"HTTP/1.1 200 OK\r\nX: a\x01\r\n" + field + b"\r\nX-Last: 1\r\n\r\nok"))
    with RawClient(gateway(in_front_of(origin.url)).port) as client:
        assert reason(client.get()) == (502, "upstream_protocol_error")


def test_names_keep_their_spelling_in_both_directions(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(headers=((b"X-pOwErEd", b"1"), (b"ETAG", b'"x"'), (b"x-lower", b"2")))
    answer = client.get(headers=("X-mIxEd: 1", "ACCEPT: */*", "user-agent: me"))
    assert {(b"X-mIxEd", b"1"), (b"ACCEPT", b"*/*"), (b"user-agent", b"me")} <= set(up.requests[0].headers)
    assert {(b"X-pOwErEd", b"1"), (b"ETAG", b'"x"'), (b"x-lower", b"2")} <= set(answer.headers)


def test_control_characters_in_the_head_of_a_switch_and_in_a_reason_phrase_become_spaces(
    client: RawClient, up: RawUpstream
) -> None:
    up.behave = reply(status=b"200 O\x01K\x1b[1m\x7f")
    assert client.get().head.startswith(b"HTTP/1.1 200 O K [1m \r\n")
    lines = b"Upgrade: websocket\r\nX-C: a\x01b\r\nConnection: Upgrade\r\n\r\n"
    up.behave = lambda wire, _: wire.send(b"HTTP/1.1 101 Switching\x02Protocols\r\n" + lines + b"\x01\r\n\r\n\x02")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    client.request("GET", "/api/ws", ("Upgrade: websocket", "Connection: Upgrade", key, "Sec-WebSocket-Version: 13"))
    head = client.read_until(b"\r\n\r\n") or b""
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
    assert b"\r\nX-C: a b\r\n" in head
    assert client.read_exactly(6) == b"\x01\r\n\r\n\x02", "what follows the switch is no head"


@pytest.mark.parametrize("status", [b"200 Fine By Me", b"299 Odd", b"404 Nothing Here", b"503 Later"])
def test_the_reason_phrase_is_kept(client: RawClient, up: RawUpstream, status: bytes) -> None:
    up.behave = reply(status=status)
    assert client.get().head.split(b"\r\n")[0] == b"HTTP/1.1 " + status


def test_a_field_that_is_there_twice_stays_so_but_the_first_date_counts(client: RawClient, up: RawUpstream) -> None:
    """Which of two values counts is the client's decision, as it is without the gateway."""
    twice = [(name, value) for name in (b"Content-Type", b"Location", b"Date") for value in (b"one", b"other")]
    up.behave = reply(headers=tuple(twice))
    answer = client.get()
    assert [pair for pair in answer.headers if pair in twice] == twice[:5]


def test_date_and_server_are_those_of_the_upstream(client: RawClient, up: RawUpstream) -> None:
    up.behave = reply(headers=((b"Date", b"Tue, 01 Jan 2030 00:00:00 GMT"), (b"Server", b"theirs")))
    answer = client.get()
    assert (answer.all("date"), answer.all("server")) == ([b"Tue, 01 Jan 2030 00:00:00 GMT"], [b"theirs"])


@pytest.mark.parametrize("target", ["/api/x", "/nowhere"])
def test_a_date_is_added_where_none_comes(client: RawClient, target: str) -> None:
    answer = client.get(target)
    (date,) = answer.all("date")
    assert re.fullmatch(rb"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", date)
    assert answer.all("server") == []


@pytest.mark.parametrize("target", ["/api/x?", "/api/x??", "/api?", "/api/x?a=&&=b"])
def test_a_query_is_kept_as_it_is(client: RawClient, up: RawUpstream, target: str) -> None:
    assert client.get(target).status == 200
    assert up.requests[0].line == f"GET {target} HTTP/1.1".encode()


@pytest.mark.parametrize(
    ("target", "authority", "origin"),
    [
        ("http://shop.test/api/x?y", b"shop.test", b"/api/x?y"),
        ("http://shop.test:8080/api/x", b"shop.test:8080", b"/api/x"),
        ("http://[::1]:8080/api/x", b"[::1]:8080", b"/api/x"),
        ("http://shop.test:080/api/x", b"shop.test:80", b"/api/x"),
    ],
)
def test_the_authority_of_an_absolute_target_wins_over_host(
    client: RawClient, up: RawUpstream, target: str, authority: bytes, origin: bytes
) -> None:
    """RFC 9112 section 3.2.2."""
    assert client.get(target).status == 200
    assert up.requests[0].all("x-forwarded-host") == [authority]
    assert up.requests[0].line == b"GET " + origin + b" HTTP/1.1"


def test_an_absolute_target_with_a_user_is_refused(client: RawClient, up: RawUpstream) -> None:
    """Nothing of a user's name may pass for a path (RFC 9110 section 4.2.4)."""
    assert reason(client.get("http://xapi%2Fsecret@h/")) == (400, "bad_request")
    assert up.requests == []


def test_an_absolute_target_without_a_path_has_none_in_its_query(client: RawClient, up: RawUpstream) -> None:
    answer = client.get("http://shop.test?api/x")
    assert b"<title>" in answer.body, "it is the page at /"
    assert up.requests == []


@pytest.mark.parametrize(("hops", "left"), [("7", b"6"), ("1", b"0"), ("many", b"many")])
def test_max_forwards_counts_down(client: RawClient, up: RawUpstream, hops: str, left: bytes) -> None:
    client.request("OPTIONS", "/api/x", (f"Max-Forwards: {hops}",))
    assert client.answer().status == 200
    assert up.requests[0].all("max-forwards") == [left]


def test_a_request_at_its_max_forwards_gets_its_response_from_the_gateway(client: RawClient, up: RawUpstream) -> None:
    """RFC 9110 section 7.6.2."""
    client.request("OPTIONS", "/api/x", ("Max-Forwards: 0",))
    answer = client.answer()
    assert (answer.status, answer.all("content-length")) == (204, [])
    assert b"GET" in answer.all("allow")[0]
    assert up.requests == []
    assert client.get(headers=("Max-Forwards: 0",)).status == 200


def test_max_forwards_without_end_is_no_defect_of_ours(client: RawClient) -> None:
    client.request("OPTIONS", "/api/x", ("Max-Forwards: " + "9" * 5000,))
    assert client.answer().status < 500


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [
        ("GET", b"204 No Content", []),
        ("HEAD", b"204 No Content", []),
        ("GET", b"304 Not Modified", [b"12345"]),
        ("HEAD", b"304 Not Modified", [b"12345"]),
        ("HEAD", b"200 OK", [b"12345"]),
    ],
)
def test_a_length_without_a_body_is_kept_where_it_may_be(
    client: RawClient, up: RawUpstream, method: str, status: bytes, length: list[bytes]
) -> None:
    """RFC 9110 section 8.6. Nothing follows it, so that the connection goes on."""
    up.behave = says(b"HTTP/1.1 " + status + b"\r\nContent-Length: 12345\r\nETag: x\r\n\r\n")
    for _ in range(2):
        client.request(method)
        answer = client.answer(method)
        assert (answer.status, answer.all("content-length")) == (int(status[:3]), length)
        assert answer.all("transfer-encoding") == []
    up.behave = reply()
    assert client.get().body == b"ok"
