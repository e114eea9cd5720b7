"""The fast path: both peers see the same as on the ASGI path, which takes over every request that is not plain."""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.middleware.gzip import GZipMiddleware

from api_gateway import GatewayConfig, create_app
from api_gateway.models import Exchange
from tests.cases import each
from tests.faulty import Fault, FaultyUpstream, Listening
from tests.kit import (
    PATIENCE,
    FakeClocks,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    ask,
    case,
    eventually,
    in_front_of,
    reason,
    reply,
    stalled,
)

StartGateway = Callable[..., RunningGateway]
StartUpstream = Callable[..., RawUpstream]

ODD = "X-Odd:  two blanks"  # nothing but a blank more, which the general parser reads
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BOTH_WAYS = pytest.mark.parametrize("headers", [(), (ODD,)], ids=["fast path", "general parser"])


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    sections = in_front_of(
        shared.url,
        circuit_breaker={"minimum_calls": 1000},
        retry={"budget": 1, "min_retries_per_second": 100},
    )
    sections["routes"].append({"name": "cut", "path": "/api/cut", "upstream": "up", "strip_prefix": "/api/cut"})
    return sections


@pytest.fixture
def up(shared: RawUpstream) -> Iterator[RawUpstream]:
    """An upstream that answers `ok` by default."""
    shared.behave = reply()
    yield shared
    shared.behave = reply()
    shared.requests.clear()


@pytest.fixture
def running(running: RunningGateway, up: RawUpstream) -> Iterator[RunningGateway]:
    """A gateway with a connection to its upstream, so that the fast path is open."""
    record = lane(running).record
    observers = record._observers
    yield warm(running, up)
    record._observers = observers


@pytest.fixture
def impatient(gateway: StartGateway, sections: dict[str, Any], up: RawUpstream) -> RunningGateway:
    """The same with short timeouts, which a busy machine may exceed while it is prepared."""
    running = gateway(sections | {"upstreams": {"up": sections["upstreams"]["up"] | {"timeouts": SHORT}}})
    eventually(lambda: ask(f"{running.url}/api/warm").status == 200, "there is a connection")
    return calmed(running, up)


SHORT = {"response": 0.4, "idle": 0.4}


def warm(running: RunningGateway, up: RawUpstream) -> RunningGateway:
    assert ask(f"{running.url}/api/warm").status == 200
    return calmed(running, up)


def calmed(running: RunningGateway, up: RawUpstream) -> RunningGateway:
    """Return a gateway once its requests so far are over, and forget them."""
    eventually(lambda: is_calm(running, up), "it is recorded")
    up.requests.clear()
    return running


def lane(running: RunningGateway) -> Any:
    """Return the fast path of a gateway; None if it is closed."""
    app: Any = running.server._app
    return None if app.fast_path is None else app.fast_path.current


def finished(running: RunningGateway) -> list[Exchange]:
    """Return the list into which every exchange goes from now on, those of ended requests excepted."""
    eventually(lambda: running.live.recorder.in_flight == 0, "the requests before are over")
    done: list[Exchange] = []
    record = lane(running).record
    record._observers = (*record._observers, done.append)
    return done


def is_calm(running: RunningGateway, up: RawUpstream) -> bool:
    """Return whether nothing is held by a request that is over."""
    recorder, upstream = running.live.recorder, running.live.upstreams["up"]
    return recorder.in_flight == 0 and all(target.in_flight == 0 for target in upstream.targets)


def says(*pieces: bytes, pause: float = 0.05, closes: bool = False) -> Callable[[Wire, RawRequest], bool]:
    """Return a behaviour that sends `pieces`, each once the gateway has read those before, and some time apart."""

    def behave(wire: Wire, _request: RawRequest) -> bool:
        for number, piece in enumerate(pieces):
            if number:
                with suppress(OSError):  # it has closed the connection
                    eventually(lambda: wire.unread_by_peer() == 0, "the gateway reads")
                time.sleep(pause)
            wire.send(piece)
        return not closes

    return behave


# The same as the ASGI path


def normal(head: bytes) -> bytes:
    """Return a head without what differs from request to request, and without the odd header."""
    head = re.sub(rb"(?i)(x-request-id|x-ratelimit-[a-z]+|ratelimit|date): [^\r]*", rb"\1: *", head)
    head = re.sub(rb"api-gateway-\w+", b"*", head)  # the pseudonym, of which each gateway has one
    return re.sub(rb"X-Odd: [^\r]*\r\n", b"", head)


def same(one: bytes, other: bytes) -> bool:
    """Return whether two heads are the same but for what differs from request to request."""
    return normal(re.sub(rb"(content-length|retry-after): \d+", rb"\1: *", one)) == normal(
        re.sub(rb"(content-length|retry-after): \d+", rb"\1: *", other)
    )


def assert_closed(expected: bool, *clients: RawClient) -> None:  # noqa: FBT001 - the comparison's right side
    """Compare which connections the gateway has closed, now that the exchanges on them are over."""
    for client in clients:
        assert client.is_closed(within=PATIENCE if expected else 0.01) == expected


REQUESTS: dict[str, tuple[str, str, tuple[str, ...], bytes]] = {
    "plain": ("GET", "/api/x", (), b""),
    "named": ("GET", "/api/x", ("X-Client-ID: me", "Accept: */*", "accept: text/html"), b""),
    "query": ("GET", "/api/a%2Fb/%C3%A4//c/../d?", ("X-Client-ID: me",), b""),
    "questions": ("DELETE", "/api?a=b?c&d=%FF", (), b""),
    "root": ("GET", "/api", (), b""),
    "forged": ("GET", "/api/x", ("X-Forwarded-For: 1.2.3.4", "X_Client_Id: a", "Forwarded: for=b", "Via: 1.1 a"), b""),
    "hops": ("GET", "/api/x", ("Keep-Alive: 5", "Proxy-Authorization: a", "Connection: keep-alive"), b""),
    "own id": ("GET", "/api/x", ("X-Request-ID: mine",), b""),
    "unusable id": ("GET", "/api/x", ("X-Request-ID: m\xefne",), b""),
    "non-ASCII": ("GET", "/api/x", ("X-Name: J\xfcrgen",), b""),
    "head": ("HEAD", "/api/x", (), b""),
    "options": ("OPTIONS", "/api/x", (), b""),
    "body": ("POST", "/api/x", ("Content-Length: 4", "Content-Type: a/b"), b"body"),
    "empty body": ("PUT", "/api/x", ("Content-Length: 0",), b""),
    "last": ("GET", "/api/x", ("Connection: close",), b""),
}


@each("prefix", ["/api", "/api/cut"])
@each(("method", "target", "headers", "body"), REQUESTS.values(), ids=REQUESTS)
def test_upstream_client_and_record_get_the_same_on_both_paths(
    running: RunningGateway,
    up: RawUpstream,
    fast_path_spy: list[bool],
    method: str,
    target: str,
    headers: tuple[str, ...],
    body: bytes,
    prefix: str,
) -> None:
    up.requests.clear()
    up.behave = reply(b"ok", headers=((b"ETag", b"x"), (b"Keep-Alive", b"timeout=5"), (b"X-Empty-Not", b"\xe4")))
    done = finished(running)
    fast_path_spy.clear()
    seen = []
    with RawClient(running.port) as plain, RawClient(running.port) as odd:
        for client, extra in ((plain, ()), (odd, (ODD,))):
            client.request(method, target.replace("/api", prefix, 1), (*headers, *extra), body)
            answer = client.answer(method)
            seen.append((normal(answer.head), answer.body, answer.is_complete))
        eventually(lambda: len(done) == 2, "both end")
        assert_closed("Connection: close" in headers, plain, odd)
    assert fast_path_spy == [True, False]
    assert seen[0] == seen[1]
    fast, asgi = up.requests
    assert normal(fast.head) == normal(asgi.head)
    assert fast.body == asgi.body == body
    for name in ("method", "path", "client_address", "client", "route", "upstream", "target", "cost", "attempts"):
        assert getattr(done[0], name) == getattr(done[1], name), name
    for name in ("status", "source", "reason", "detail", "bytes_in", "bytes_out"):
        assert getattr(done[0], name) == getattr(done[1], name), name
    for exchange in done:
        times: list[Any] = [exchange.started, exchange.sent_at, exchange.head_at, exchange.finished]
        assert times == sorted(times)
    assert done[0].decision is not None
    assert done[0].decision.allowed


IN_CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
ANSWERS = {
    "error": (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nno", b"no"),
    "no content": (b"HTTP/1.1 204 None\r\nX: y\r\n\r\n", b""),
    "not modified": (b'HTTP/1.1 304 Same\r\nETag: "a"\r\nContent-Length: 9\r\n\r\n', b""),
    "cookies": (b"HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nset-cookie: b\r\nContent-Length: 0\r\n\r\n", b""),
    "with their id": (b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nVia: x\r\nContent-Length: 0\r\n\r\n", b""),
    "dated": (b"HTTP/1.1 200 OK\r\nDATE: Wed, 25 Nov 2026 01:24:31 GMT\r\nContent-Length: 0\r\n\r\n", b""),
    "large": (b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000, b"x" * 300_000),
    "gzip": (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nVary: Accept-Encoding\r\n" + IN_CHUNKS, b"ok"),
    "chunks, dated": (b"HTTP/1.1 200 OK\r\nDate: Wed, 25 Nov 2026 01:24:31 GMT\r\n" + IN_CHUNKS, b"ok"),
    "zeros": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n00A\r\n0123456789\r\n00\r\n\r\n", b"0123456789"),
    "no chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b""),
    "chunks and a cost": (b"HTTP/1.1 404 No\r\nX-Request-Id: theirs\r\nX-Gateway-Cost: 1\r\n" + IN_CHUNKS, b"ok"),
    "an extension": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0;c\r\n\r\n",
        b"ok",
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTrailer: X-T\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: a\r\n\r\n",
        b"ok",
    ),
    "unannounced trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nConnection: close\r\n\r\n",
        b"ok",
    ),
    "large chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%b\r\n" % (size, b"x" * size) for size in (300_000, 1, 70_000))
        + b"0\r\n\r\n",
        b"x" * 370_001,
    ),
    "many chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5_000 + b"0\r\n\r\n",
        b"x" * 5_000,
    ),
    "hop-by-hop fields": (
        b"HTTP/1.1 200 OK\r\nConnection: X-Hop, keep-alive\r\nX-Hop: a\r\nContent-Length: 2\r\nX-Cost: 1\r\n\r\nok",
        b"ok",
    ),
    "an empty field": (b"HTTP/1.1 200 OK\r\nX-Empty:\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "an odd 304": (b"HTTP/1.1 304 Same\r\nX-Empty:\r\nContent-Length: 9\r\n\r\n", b""),
    "an odd 204": (b"HTTP/1.1 204 None\r\nX-Empty:\r\nContent-Length: 0\r\n\r\n", b""),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", b"ok"),
    "a redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: /there\r\nX-Empty:\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"",
    ),
    "to the end": (b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\nall of it", b"all of it"),
}


@each("method", ["GET", "HEAD"])
@each("last", [(), ("Connection: close",)], ids=["kept", "closed"])
@each(("answer", "body"), ANSWERS.values(), ids=ANSWERS)
def test_a_response_is_the_same_on_both_paths(
    running: RunningGateway,
    up: RawUpstream,
    fast_path_spy: list[bool],
    asgi_forwards: list[Any],
    answer: bytes,
    body: bytes,
    last: tuple[str, ...],
    method: str,
) -> None:
    head, _, rest = answer.partition(b"\r\n\r\n")
    behave = says(answer if method == "GET" else head + b"\r\n\r\n", closes=rest == b"all of it")
    done = finished(running)
    seen = []
    with RawClient(running.port) as plain, RawClient(running.port) as odd:
        for client, extra in ((plain, ()), (odd, (ODD,))):
            up.behave = reply()
            warm(running, up)
            up.behave = behave
            fast_path_spy.clear()
            client.request(method, "/api/x", (*extra, *last))
            got = client.answer(method)
            seen.append((normal(got.head), got.body))
            assert got.is_complete
            assert fast_path_spy == [not extra]
        eventually(lambda: len(done) == 4 and is_calm(running, up), "all end")
        assert_closed(bool(last), plain, odd)
    assert not asgi_forwards
    assert seen[0] == seen[1]
    assert seen[0][1] == (body if method == "GET" else b"")
    fast, asgi = done[1], done[3]
    for name in ("status", "source", "reason", "detail", "bytes_in", "bytes_out", "attempts", "cost", "target"):
        assert getattr(fast, name) == getattr(asgi, name), name


@pytest.mark.parametrize("headers", [(), (ODD,)], ids=["fast path", "general parser"])
def test_a_trailer_spoils_no_later_response(client: RawClient, up: RawUpstream, headers: tuple[str, ...]) -> None:
    """It is not a header field, so the connection is kept, and the general parser is ready for the next response."""
    up.behave = says(ANSWERS["unannounced trailers"][0])
    for _ in range(3):
        client.request("POST", headers=("Content-Length: 0", *headers))
        answer = client.answer()
        assert (answer.status, answer.body) == (200, b"ok")


def test_a_head_and_a_body_in_separate_segments_are_one_response(client: RawClient, up: RawUpstream) -> None:
    up.behave = says(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n", b"half", b"half")
    assert client.get().body == b"halfhalf"
    assert client.get().body == b"halfhalf"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECES = {
    "each byte": [CHUNKED, *(bytes([byte]) for byte in b"2\r\nok\r\n0\r\n\r\n")],
    "a size in two": [CHUNKED + b"1", b"0\r", b"\n0123456789abcdef\r", b"\n0\r\n", b"\r\n"],
    "an extension later": [CHUNKED + b"2\r\nok\r\n", b"2;a=b\r\nok\r\n", b"0\r\n\r\n"],
    "trailers later": [CHUNKED + b"2\r\nok\r\n2\r\no", b"k\r\n0\r\nX-T: a\r\n", b"X-U: b\r\n\r\n"],
    "an end in pieces": [b"HTTP/1.1 200 OK\r\nX:\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok", b"\r\n0\r\n", b"\r\n"],
    "a counted body": [b"HTTP/1.1 200 OK\r\nX:\r\nContent-Length: 4\r\n\r\no", b"k", b"ok"],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_response_in_pieces_is_the_same_on_both_paths(
    running: RunningGateway,
    client: RawClient,
    up: RawUpstream,
    fast_path_spy: list[bool],
    asgi_forwards: list[Any],
    pieces: list[bytes],
) -> None:
    up.behave = says(*pieces, pause=0.01)
    done = finished(running)
    fast_path_spy.clear()
    seen = [client.get(headers=headers) for headers in ((), (ODD,), ())]
    assert fast_path_spy == [True, False, True]
    assert not asgi_forwards
    assert all(answer.is_complete for answer in seen)
    assert len({(normal(answer.head), answer.body) for answer in seen}) == 1
    eventually(lambda: len(done) == 3 and is_calm(running, up), "all end")
    assert len({(one.bytes_out, one.attempts) for one in done}) == 1
    assert done[0].bytes_out == len(seen[0].body)


BROKEN = {
    "no line break after a chunk": [CHUNKED + b"2\r\nokXX0\r\n\r\n"],
    "no line break after a later chunk": [CHUNKED + b"2\r\nok\r\n", b"2\r\nokXX", b"0\r\n\r\n"],
    "no size": [CHUNKED + b"2\r\nok\r\n", b"oops\r\n"],
    "a negative size": [CHUNKED + b"2\r\nok\r\n", b"-2\r\nok\r\n"],
    "a size of 17 digits": [CHUNKED + b"2\r\nok\r\n", b"10000000000000002\r\nok\r\n0\r\n\r\n"],
    "a bare line feed": [CHUNKED + b"2\r\nok\r\n", b"2\nok\r\n0\r\n\r\n"],
    "a space before the size": [CHUNKED + b"2\r\nok\r\n", b" 2\r\nok\r\n0\r\n\r\n"],
    "more than announced": [b"HTTP/1.1 200 OK\r\nX:\r\nContent-Length: 4\r\n\r\nok", b"okmore"],
    "more behind the last chunk": [CHUNKED + b"2\r\nok\r\n", b"0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"],
}


@each("pieces", BROKEN.values(), ids=BROKEN)
def test_a_response_with_broken_framing_ends_equally_on_both_paths(
    running: RunningGateway, up: RawUpstream, fast_path_spy: list[bool], pieces: list[bytes]
) -> None:
    """Whether it is complete, the reason, and what the breaker counts; no byte of another response is sent."""
    done = finished(running)
    breaker = running.live.upstreams["up"].breaker
    seen = []
    for headers in ((), (ODD,)):
        up.behave = reply()
        warm(running, up)
        up.behave = says(*pieces, pause=0.03)
        failures = breaker.consecutive_failures
        with RawClient(running.port) as client:
            client.request("POST", headers=(*headers, "Content-Length: 0"))
            answer = client.answer()
        eventually(lambda: is_calm(running, up), "it has ended")
        seen.append((answer.status, answer.is_complete, done[-1].reason, breaker.consecutive_failures > failures))
        assert b"HTTP/1.1 200 OK" not in answer.body
    assert seen[0] == seen[1]


# Back to the ASGI path


UNUSUAL = {
    "chunks": says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    "an end": says(b"HTTP/1.1 200 OK\r\n\r\nok", closes=True),
    "a head in pieces": says(OK[:9], OK[9:30], OK[30:]),
    "an odd head": says(b"HTTP/1.1 200 OK\r\nX:\r\nContent-Length:   2\r\n\r\nok"),
    "an interim answer": says(b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n" + OK),
    "an interim answer before": says(b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\n", OK),
}


@pytest.mark.parametrize("behave", UNUSUAL.values(), ids=UNUSUAL)
def test_a_response_that_is_not_plain_is_served_all_the_same(
    running: RunningGateway, client: RawClient, up: RawUpstream, fast_path_spy: list[bool], behave: Any
) -> None:
    up.behave = behave
    fast_path_spy.clear()
    done = finished(running)
    before = running.live.recorder.attempt_results["up"]["2xx"]
    for _ in range(2):
        client.request()
        if behave in (UNUSUAL["an interim answer"], UNUSUAL["an interim answer before"]):
            head = client.read_until(b"\r\n\r\n") or b""
            assert re.sub(rb"gateway-\w+", b"*", head) == b"HTTP/1.1 103 Early\r\nLink: a\r\nvia: 1.1 api-*\r\n\r\n"
        answer = client.answer()
        assert (answer.status, answer.body, answer.is_complete) == (200, b"ok", True)
    assert fast_path_spy == [True, True]
    eventually(lambda: is_calm(running, up), "nothing is held")
    assert [(one.status, one.attempts, one.bytes_out) for one in done] == [(200, 1, 2)] * 2
    assert len(up.requests) == 2
    assert running.live.recorder.attempt_results["up"]["2xx"] == before + 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_connection_that_died_meanwhile_is_made_good_where_that_is_safe(
    running: RunningGateway, client: RawClient, up: RawUpstream, asgi_forwards: list[Any], method: str
) -> None:
    """The keep-alive race: nothing came, so what may be repeated is (RFC 9110 section 9.2.2)."""
    calls = []
    done = finished(running)

    def behave(wire: Wire, request: RawRequest) -> bool:
        calls.append(request)
        if len(calls) == 1:
            return False
        wire.send(OK)
        return True

    up.behave = behave
    client.request(method, headers=("Content-Length: 0",))
    assert client.answer().status == (200 if method == "GET" else 502)
    assert not asgi_forwards
    eventually(lambda: is_calm(running, up), "nothing is held")
    assert len(up.requests) == (2 if method == "GET" else 1)
    eventually(lambda: len(done) == 1, "it is recorded")
    assert (done[0].attempts, done[0].retried) == (1, ())


@BOTH_WAYS
@pytest.mark.parametrize("kind", [Listening.REFUSES, Listening.IS_FULL])
def test_a_connection_that_died_meanwhile_and_cannot_be_opened_again(
    gateway: StartGateway, headers: tuple[str, ...], kind: Listening
) -> None:
    """The request was sent before, so the failure is that of a lost connection, and its charge stays."""
    dead = FaultyUpstream()
    options: dict[str, Any] = {"retry": {"attempts": 1}, "circuit_breaker": {"minimum_calls": 1000}}
    running = warm(gateway(in_front_of(dead.url, timeouts={"connect": 0.3}, **options)), dead)
    done = finished(running)
    with dead.failing(Fault("went away", listening=kind)), RawClient(running.port) as client:
        # The gateway may see the end of the idle connection before it sends the request, and then opens another one.
        client.request(headers=headers)
        answer = client.answer()
    dead.close()
    eventually(lambda: len(done) == 1 and is_calm(running, dead), "nothing is held")
    assert answer.status in (502, 504)
    assert done[0].attempts == 1


NOT_NOW = b"HTTP/1.1 503 Not now\r\nX-From: upstream\r\nContent-Length: 2\r\n\r\nno"
LONG = b"x" * 300_000
KEY = "Idempotency-Key: a"
BODY = "Content-Length: 4"

# What is asked, what the upstream does try by try, and what comes of it: status, body, tries, causes of retries.
Try = bytes | None  # what it sends; None ends the connection within a head
AGAIN: dict[str, tuple[str, tuple[str, ...], bytes, tuple[Try, ...], tuple[int, bytes, int, tuple[str, ...]]]] = {
    "a status": ("GET", (), b"", (NOT_NOW, OK), (200, b"ok", 2, ("503",))),
    "a status twice": ("GET", (), b"", (NOT_NOW, NOT_NOW), (503, b"no", 2, ("503",))),
    "then a failure": ("GET", (), b"", (NOT_NOW, None), (502, b"upstream_reset", 2, ("503",))),
    "after a failure": ("GET", (), b"", (None, NOT_NOW), (503, b"no", 2, ("upstream_reset",))),
    "an effect": ("POST", (BODY,), b"body", (NOT_NOW,), (503, b"no", 1, ())),
    "an effect unseen": ("POST", (BODY,), b"body", (None,), (502, b"upstream_reset", 1, ())),
    "a key": ("POST", (BODY, KEY), b"body", (NOT_NOW, OK), (200, b"ok", 2, ("503",))),
    "a key unseen": ("PATCH", (BODY, KEY), b"body", (None, OK), (200, b"ok", 2, ("upstream_reset",))),
    "a kept body": ("PUT", (BODY,), b"body", (NOT_NOW, OK), (200, b"ok", 2, ("503",))),
    "another status": ("GET", (), b"", (NOT_NOW.replace(b"503", b"500"),), (500, b"no", 1, ())),
    "asked to wait": ("GET", (), b"", (NOT_NOW.replace(b"X-From: upstream", b"Retry-After: 2"),), (503, b"no", 1, ())),
    "not for long": (
        *("GET", (), b""),
        (NOT_NOW.replace(b"X-From: upstream", b"Retry-After: 0"), OK),
        (200, b"ok", 2, ("503",)),
    ),
    "a long one": (
        *("GET", (), b""),
        (b"HTTP/1.1 503 Not now\r\nContent-Length: 300000\r\n\r\n" + LONG,) * 2,
        (503, LONG, 2, ("503",)),
    ),
    "half of one": (
        *("GET", (), b""),
        (b"HTTP/1.1 503 Not now\r\nContent-Length: 300000\r\n\r\nhalf", OK),
        (200, b"ok", 2, ("503",)),
    ),
    "in chunks": (
        *("GET", (), b""),
        (b"HTTP/1.1 503 Not now\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",) * 2,
        (503, b"no", 2, ("503",)),
    ),
}


@each(("method", "headers", "body", "tries", "expected"), AGAIN.values(), ids=AGAIN)
def test_retries_are_the_same_on_both_paths(
    running: RunningGateway,
    up: RawUpstream,
    fast_path_spy: list[bool],
    method: str,
    headers: tuple[str, ...],
    body: bytes,
    tries: tuple[Try, ...],
    expected: tuple[int, bytes, int, tuple[str, ...]],
) -> None:
    """Nothing of a response that is not the last reaches the client, and the last one does as it came."""
    left: list[Try] = []

    def behave(wire: Wire, _request: RawRequest) -> bool:
        answer = left.pop(0)
        wire.send(answer or b"HTTP")
        return answer is not None

    up.behave = reply()
    warm(running, up)  # a success, after the failures of the case before
    up.behave = behave
    done = finished(running)
    fast_path_spy.clear()
    status, content, count, causes = expected
    for extra in ((), (ODD,)):
        left[:] = tries
        up.requests.clear()
        with RawClient(running.port) as client:
            client.request(method, "/api/x", (*headers, *extra), body)
            answer = client.answer()
        assert (answer.status, answer.is_complete) == (status, True)
        assert content in answer.body
        assert answer.all("x-from") == ([b"upstream"] if content == b"no" and b"X-From" in (tries[-1] or b"") else [])
        assert [request.body for request in up.requests] == [body] * count
    assert fast_path_spy == [True, False]
    eventually(lambda: len(done) == 2 and is_calm(running, up), "nothing is held")
    assert [(one.attempts, one.retried) for one in done] == [(count, causes)] * 2


@pytest.mark.parametrize(("method", "tries"), [("PUT", 2), ("POST", 1)])
def test_a_body_that_was_sent_is_sent_again_only_where_that_is_safe(
    running: RunningGateway, client: RawClient, up: RawUpstream, method: str, tries: int
) -> None:
    up.behave = lambda _wire, _request: False
    client.request(method, headers=("Content-Length: 4",), body=b"body")
    answer = client.answer()
    assert answer.status == 502
    assert b"upstream_reset" in answer.body
    assert [request.body for request in up.requests] == [b"body"] * tries
    eventually(lambda: is_calm(running, up), "nothing is held")


def test_a_silent_upstream_is_a_timeout(impatient: RunningGateway, up: RawUpstream) -> None:
    up.behave = lambda wire, _request: wire.is_closed() and False
    with RawClient(impatient.port) as client:
        client.request("POST", headers=("Content-Length: 0",))
        assert client.answer().status == 504
    eventually(lambda: is_calm(impatient, up), "nothing is held")


def test_half_a_response_does_not_look_complete_when_the_upstream_closes(
    running: RunningGateway, up: RawUpstream
) -> None:
    sends_half(running, up, "upstream_reset", closes=True)


def test_half_a_response_does_not_look_complete_when_the_upstream_falls_silent(
    impatient: RunningGateway, up: RawUpstream
) -> None:
    sends_half(impatient, up, "upstream_timeout", closes=False)


def sends_half(running: RunningGateway, up: RawUpstream, reason: str, *, closes: bool) -> None:
    """Let the upstream send half of a response; check what the client and the record have."""
    up.behave = says(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf", b"", closes=closes)
    done = finished(running)
    with RawClient(running.port) as client:
        client.request()
        answer = client.answer()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"half", False)
    eventually(lambda: is_calm(running, up) and len(done) == 1, "nothing is held")
    assert done[0].reason == reason
    assert running.live.upstreams["up"].breaker.consecutive_failures == 1


# Connecting


RECORDED = ("status", "source", "reason", "detail", "attempts", "bytes_in", "upstream", "target", "cost", "retried")
REQUESTS_TO_CONNECT = {
    "no body": ("GET", (), b""),
    "a body": ("PUT", (BODY,), b"body"),
    "an effect": ("POST", (BODY,), b"body"),
}
TO_CONNECT = pytest.mark.parametrize(
    ("method", "headers", "body"), REQUESTS_TO_CONNECT.values(), ids=REQUESTS_TO_CONNECT
)


@TO_CONNECT
def test_the_first_request_opens_a_connection_on_both_paths(
    gateway: StartGateway,
    up: RawUpstream,
    fast_path_spy: list[bool],
    asgi_forwards: list[Any],
    method: str,
    headers: tuple[str, ...],
    body: bytes,
) -> None:
    seen = []
    for extra in ((), (ODD,)):
        running = gateway(in_front_of(up.url))
        done = finished(running)
        with RawClient(running.port) as client:
            client.request(method, "/api/x", (*headers, *extra), body)
            seen.append((normal(client.answer().head), normal(up.requests[-1].head), up.requests[-1].body))
        eventually(lambda: len(done) == 1 and is_calm(running, up), "it ends")  # noqa: B023 - called at once
        seen[-1] += tuple(getattr(done[0], name) for name in RECORDED)
    assert fast_path_spy == [True, False]
    assert not asgi_forwards
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("listening", "limits"),
    [
        (Listening.REFUSES, ("", "X-Request-Timeout: 9")),
        # Not if it refuses: then a retry may begin before that or not.
        (Listening.IS_FULL, ("", "X-Request-Timeout: 9", "X-Request-Timeout: 0.25")),
    ],
)
def test_a_connection_that_cannot_be_opened_ends_equally_on_both_paths(
    gateway: StartGateway, listening: Listening, limits: tuple[str, ...]
) -> None:
    """Response, record, refund, retries and what the breaker counts; each request has an upstream of its own."""
    dead = FaultyUpstream()
    cases = list(itertools.product(REQUESTS_TO_CONNECT, limits, (1, 2)))
    names = {
        f"{way}-{number}": (*one, extra)
        for number, one in enumerate(cases)
        for way, extra in (("plain", ()), ("other", (ODD,)))
    }
    sections = {
        "upstreams": {
            name: {
                "targets": [{"url": dead.url}],
                "timeouts": {"connect": 0.5},
                "retry": {"attempts": attempts, "budget": 1, "min_retries_per_second": 100},
                "circuit_breaker": {"minimum_calls": 1000},
            }
            for name, (_, _, attempts, _) in names.items()
        },
        "routes": [{"name": name, "path": f"/{name}/x", "upstream": name} for name in names],
        "tiers": {"FREE": {"rate": 1000, "capacity": 100_000}},
    }
    running = gateway(sections)
    done = finished(running)
    seen: dict[str, tuple[Any, ...]] = {}
    with dead.failing(Fault("cannot be reached", listening=listening)), ExitStack() as stack:
        clients = {name: stack.enter_context(RawClient(running.port)) for name in names}
        for name, (kind, limit, _, extra) in names.items():
            method, headers, body = REQUESTS_TO_CONNECT[kind]
            clients[name].request(method, f"/{name}/x", (*headers, *filter(None, [limit]), *extra), body)
        for name, client in clients.items():
            answer = client.answer()
            told = json.loads(answer.body)
            seen[name] = answer.status, told["reason"], told["detail"], answer.all("retry-after")
        eventually(lambda: len(done) == len(names), "all are recorded")
        eventually(lambda: running.live.recorder.in_flight == 0, "nothing is held")
    dead.close()
    for exchange in done:
        name = exchange.path.split("/")[1]
        upstream = running.live.upstreams[name]
        assert not any(target.in_flight for target in upstream.targets)
        seen[name] += (upstream.breaker.consecutive_failures, *(getattr(exchange, one) for one in RECORDED))
    for number, one in enumerate(cases):
        with case(*one):
            assert repr(seen[f"plain-{number}"]).replace("plain-", "other-") == repr(seen[f"other-{number}"])


@pytest.mark.parametrize("ends", ["is released", "never becomes free", "is not awaited"])
@TO_CONNECT
def test_a_connection_of_the_pool_is_awaited_equally_on_both_paths(
    gateway: StartGateway, up: RawUpstream, method: str, headers: tuple[str, ...], body: bytes, ends: str
) -> None:
    patience = 0.2 if ends == "never becomes free" else PATIENCE
    sections = in_front_of(up.url, pool={"max_connections": 1}, timeouts={"connect": patience})
    running = warm(gateway(sections), up)
    done = finished(running)
    seen: list[tuple[Any, ...]] = []
    for extra in ((), (ODD,)):
        gate = threading.Event()

        def behave(wire: Wire, request: RawRequest, gate: threading.Event = gate) -> None:
            if request.line.startswith(b"GET /api/held"):
                gate.wait(PATIENCE)
            wire.send(OK)

        up.behave = behave
        up.requests.clear()
        before = len(done)
        with RawClient(running.port) as holder, RawClient(running.port) as client:
            holder.request("GET", "/api/held")
            eventually(lambda: len(up.requests) == 1, "the connection is in use")
            client.request(method, "/api/x", (*headers, *extra), body)
            eventually(lambda: running.live.recorder.in_flight == 2, "it waits")
            if ends == "is released":
                gate.set()
                seen.append((client.answer().status, up.requests[-1].body))
            elif ends == "never becomes free":
                answer = client.answer()
                seen.append((answer.status, json.loads(answer.body)["reason"], answer.all("retry-after")))
            else:
                client.close()
                eventually(lambda: running.live.recorder.in_flight == 1, "it is aborted")
                seen.append(("aborted",))
            gate.set()
            assert holder.answer().status == 200
        eventually(partial(_is_over, running, up, done, before + 2), "nothing is held")
        (one,) = (exchange for exchange in done[before:] if exchange.path == "/api/x")
        seen[-1] += tuple(getattr(one, name) for name in RECORDED)
        with RawClient(running.port) as client:
            assert client.get("/api/held").status == 200, "the connection is free"
        eventually(partial(_is_over, running, up, done, before + 3), "that is recorded, too")
    assert seen[0] == seen[1]


def _is_over(running: RunningGateway, up: RawUpstream, done: list[Exchange], count: int) -> bool:
    return len(done) == count and is_calm(running, up)


def _are_in_flight(running: RunningGateway, count: int) -> bool:
    return bool(running.live.recorder.in_flight == count)


def test_waiting_requests_get_connections_in_their_order(gateway: StartGateway, up: RawUpstream) -> None:
    running = warm(gateway(in_front_of(up.url, pool={"max_connections": 1})), up)
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        if request.line.startswith(b"GET /api/held"):
            gate.wait(PATIENCE)
        wire.send(OK)

    up.behave = behave
    clients = [RawClient(running.port) for _ in range(6)]
    for number, client in enumerate(clients):
        client.request("GET", "/api/held" if not number else f"/api/{number}", (ODD,) if number % 2 else ())
        eventually(partial(_are_in_flight, running, number + 1), "it waits")
    gate.set()
    assert [client.answer().status for client in clients] == [200] * 6
    assert [request.line.split()[1] for request in up.requests[1:]] == [b"/api/%d" % number for number in range(1, 6)]
    for client in clients:
        client.close()
    assert is_calm(running, up)


# Not taken


def test_a_rate_limited_request_is_refused_as_on_the_asgi_path(
    gateway: StartGateway, up: RawUpstream, fast_path_spy: list[bool]
) -> None:
    sections = in_front_of(up.url) | {"tiers": {"FREE": {"rate": 0.01, "capacity": 3}}}
    running = warm(gateway(sections), up)
    done = finished(running)
    fast_path_spy.clear()
    with RawClient(running.port) as client:
        answers = [client.get(headers=("X-Client-ID: a",)) for _ in range(5)]
        odd = client.get(headers=("X-Client-ID: a", ODD))
        client.request("HEAD", headers=("X-Client-ID: a",))
        head = client.answer("HEAD")
        last = client.get(headers=("X-Client-ID: a", "Connection: close"))
        assert client.is_closed()
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    assert [answer.all("x-ratelimit-remaining") for answer in answers[:3]] == [[b"2"], [b"1"], [b"0"]]
    assert fast_path_spy == [True] * 5 + [False, True, True]
    assert len(up.requests) == 3
    assert same(answers[4].head, odd.head)
    assert json.loads(answers[4].body).keys() == json.loads(odd.body).keys()
    assert json.loads(answers[4].body)["reason"] == "rate_limited"
    assert (head.status, head.all("content-type")) == (429, odd.all("content-type"))
    assert (last.status, last.all("connection")) == (429, [b"close"])
    eventually(lambda: len(done) == 8, "all are recorded")
    assert {(one.status, one.reason, one.source, one.route, one.upstream, one.attempts) for one in done[3:]} == {
        (429, "rate_limited", "gateway", "all", None, 0)
    }
    assert running.live.recorder.limited["FREE"] == 5
    assert is_calm(running, up)


def test_a_tier_counts_from_the_next_request_on_the_same_connection(running: RunningGateway, up: RawUpstream) -> None:
    body, kind = b'{"tier": "PREMIUM"}', {"Content-Type": "application/json"}
    with RawClient(running.port) as client:
        limits = [client.get(headers=("X-Client-ID: a",)).all("x-ratelimit-limit")]
        assert ask(f"{running.url}/clients/a/tier", method="POST", headers=kind, body=body).status == 200
        limits.append(client.get(headers=("X-Client-ID: a",)).all("x-ratelimit-limit"))
        assert ask(f"{running.url}/clients/a", method="DELETE").status == 200
        limits.append(client.get(headers=("X-Client-ID: a",)).all("x-ratelimit-limit"))
    assert limits == [[b"100000"], [b"200"], [b"100000"]]


def test_a_client_to_be_looked_up_waits_on_the_fast_path(
    running: RunningGateway, fast_path_spy: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = running.live.clients
    with RawClient(running.port) as client:
        assert client.get(headers=("X-Client-ID: b",)).status == 200
        fast_path_spy.clear()
        with monkeypatch.context() as patched:
            patched.setattr(clients, "try_get", lambda client_id: None)
            clients.version += 1
            answers = [client.get(headers=("X-Client-ID: b",)) for _ in range(2)]
        answers.append(client.get(headers=("X-Client-ID: b",)))
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert fast_path_spy == [True, True, True]


@pytest.mark.parametrize("headers", [(), (ODD,)], ids=["fast path", "general parser"])
@pytest.mark.parametrize("ramp", [0, 0.5])
def test_a_breaker_refuses_probes_and_recovers_equally_on_both_paths(
    gateway: StartGateway,
    up: RawUpstream,
    fast_path_spy: list[bool],
    asgi_forwards: list[Any],
    caplog: pytest.LogCaptureFixture,
    headers: tuple[str, ...],
    ramp: float,
) -> None:
    caplog.set_level("INFO")
    breaker = {"failure_threshold": 1, "recovery_timeout": 0.2, "jitter": 0, "ramp": ramp}
    clocks = FakeClocks()
    running = warm(gateway(in_front_of(up.url, circuit_breaker=breaker), clocks.clocks), up)
    done = finished(running)
    up.behave = reply(b"no", b"500 Oops")
    with RawClient(running.port) as client:
        fast_path_spy.clear()
        assert client.get(headers=headers).status == 500
        refused = client.get(headers=headers)
        assert (reason(refused), refused.all("retry-after")) == ((503, "circuit_open"), [b"1"])
        clocks.advance(0.25)
        up.behave = reply()
        assert client.get(headers=headers).status == 200
        eventually(lambda: running.live.upstreams["up"].breaker.state == "CLOSED", "the probe is settled")
        clocks.advance(ramp)
        assert client.get(headers=headers).status == 200
    assert fast_path_spy == [not headers] * 4
    assert not asgi_forwards
    eventually(lambda: len(done) == 4 and is_calm(running, up), "nothing is held")
    assert [(one.status, one.reason, one.attempts, one.upstream) for one in done] == [
        (500, None, 1, "up"),
        (503, "circuit_open", 0, "up"),
        (200, None, 1, "up"),
        (200, None, 1, "up"),
    ]
    for words in ("CLOSED -> OPEN", "HALF_OPEN -> CLOSED"):
        assert f"circuit breaker up: {words}" in caplog.text


@pytest.mark.parametrize("header", [(), (ODD,)], ids=["fast path", "general parser"])
def test_slow_responses_open_the_breaker_on_both_paths(
    gateway: StartGateway, up: RawUpstream, caplog: pytest.LogCaptureFixture, header: tuple[str, ...]
) -> None:
    """Though all of them succeed; what is written down of them has route, duration and request id."""
    breaker = {"slow_call_duration": 0.05, "slow_call_rate": 1, "minimum_calls": 2, "window_calls": 2}
    clocks = FakeClocks()
    running = warm(gateway(in_front_of(up.url, circuit_breaker=breaker), clocks.clocks), up)

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        clocks.advance(0.1)
        return reply()(wire, request)

    up.behave = behave
    with RawClient(running.port) as client:
        statuses = [client.get(headers=(f"X-Request-ID: slow-{number}", *header)).status for number in range(3)]
        assert statuses == [200, 200, 503]
    (move,) = ask(f"{running.url}/circuit-breakers/up/history").json()["history"]
    assert move["detail"] == "2 of the last 2 calls took 0.05 s or longer"
    assert (move["window_calls"], move["window_failures"], move["window_slow_calls"]) == (2, 0, 2)
    assert [(call["request_id"], call["route"]) for call in move["last_failures"]] == [
        ("slow-1", "all"),
        ("slow-0", "all"),
    ]
    assert [call["duration_seconds"] for call in move["last_failures"]] == [0.1, 0.1]
    assert "circuit breaker up: CLOSED -> OPEN: 2 of the last 2 calls took" in caplog.text


@pytest.mark.parametrize("header", [(), (ODD,)], ids=["fast path", "general parser"])
def test_a_failure_is_recorded_equally_on_both_paths(
    gateway: StartGateway, up: RawUpstream, header: tuple[str, ...]
) -> None:
    running = warm(gateway(in_front_of(up.url, circuit_breaker={"failure_threshold": 2})), up)
    with RawClient(running.port) as client:
        up.behave = reply(b"no", b"500 Oops")
        assert client.get(headers=("X-Request-ID: r-0", *header)).status == 500

        def break_off(wire: Wire, _request: RawRequest) -> bool:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            time.sleep(0.05)
            return False

        up.behave = break_off
        assert not client.get(headers=("X-Request-ID: r-1", *header)).is_complete
    (move,) = ask(f"{running.url}/circuit-breakers/up/history").json()["history"]
    assert [(call["request_id"], call["route"], call["detail"]) for call in move["last_failures"]] == [
        ("r-1", "all", "upstream_reset within the body"),
        ("r-0", "all", "status 500"),
    ]
    assert all(0 <= call["duration_seconds"] < PATIENCE for call in move["last_failures"])


def breaks_off(wire: Wire, _request: RawRequest) -> bool:
    """End the connection within the head, so that it cannot pass for one that was closed while idle."""
    wire.send(b"HTTP")
    return False


def with_a_bad_target(
    gateway: StartGateway,
    up: RawUpstream,
    bad: RawUpstream,
    headers: tuple[str, ...],
    clocks: FakeClocks,
    **options: Any,
) -> RunningGateway:
    """Return a gateway in front of both, the bad one ejected for having failed twice."""
    sections = in_front_of(
        up.url,
        bad.url,
        circuit_breaker={"failure_threshold": 2, "minimum_calls": 1000, "recovery_timeout": 0.4},
        **{"slow_start": 0, **options},
    )
    running = warm(gateway(sections, clocks.clocks), up)
    warm(running, bad)
    bad.behave = reply(b"no", b"500 Oops")
    with RawClient(running.port) as client:
        assert sorted(client.get(headers=headers).status for _ in range(4)) == [200, 200, 500, 500]
    target = running.live.upstreams["up"].targets[1]
    assert target.breaker.state == "OPEN"
    assert running.live.upstreams["up"].breaker.state == "CLOSED"
    bad.requests.clear()
    up.requests.clear()
    return running


@BOTH_WAYS
def test_an_ejected_target_gets_nothing_on_both_paths(
    gateway: StartGateway,
    up: RawUpstream,
    upstream: StartUpstream,
    fast_path_spy: list[bool],
    headers: tuple[str, ...],
) -> None:
    bad = upstream()
    clocks = FakeClocks()
    running = with_a_bad_target(gateway, up, bad, headers, clocks)
    fast_path_spy.clear()
    with RawClient(running.port) as client:
        assert [client.get(headers=headers).status for _ in range(6)] == [200] * 6
    assert (len(up.requests), len(bad.requests)) == (6, 0)
    assert fast_path_spy == [not headers] * 6, "it keeps no request from the fast path"
    assert is_calm(running, up)


@BOTH_WAYS
def test_a_failed_probe_of_a_target_is_retried_on_another_on_both_paths(
    gateway: StartGateway, up: RawUpstream, upstream: StartUpstream, headers: tuple[str, ...]
) -> None:
    bad = upstream()
    clocks = FakeClocks()
    running = with_a_bad_target(gateway, up, bad, headers, clocks)
    bad.behave = breaks_off
    clocks.advance(0.45)
    done = finished(running)
    with RawClient(running.port) as client:
        assert [client.get(headers=headers).status for _ in range(6)] == [200] * 6
    assert (len(up.requests), len(bad.requests)) == (6, 1)
    eventually(lambda: len(done) == 6, "all are recorded")
    assert sorted(exchange.attempts for exchange in done) == [1, 1, 1, 1, 1, 2]
    assert running.live.upstreams["up"].targets[1].breaker.state == "OPEN"
    assert is_calm(running, up)


@BOTH_WAYS
def test_a_probe_of_a_target_that_succeeds_brings_it_back_on_both_paths(
    gateway: StartGateway, up: RawUpstream, upstream: StartUpstream, headers: tuple[str, ...]
) -> None:
    bad = upstream()
    clocks = FakeClocks()
    running = with_a_bad_target(gateway, up, bad, headers, clocks)
    bad.behave = reply()
    clocks.advance(0.45)
    with RawClient(running.port) as client:
        assert [client.get(headers=headers).status for _ in range(8)] == [200] * 8
    assert running.live.upstreams["up"].targets[1].breaker.state == "CLOSED"
    assert len(bad.requests) >= 3
    assert len(up.requests) + len(bad.requests) == 8
    assert is_calm(running, up)


@BOTH_WAYS
def test_a_probe_with_a_long_response_reports_its_outcome_before_the_end_on_both_paths(
    gateway: StartGateway,
    up: RawUpstream,
    upstream: StartUpstream,
    monkeypatch: pytest.MonkeyPatch,
    headers: tuple[str, ...],
) -> None:
    monkeypatch.setattr("api_gateway.router.PROBE_SETTLES_AFTER", 0.05)
    bad, may_end = upstream(), threading.Event()
    clocks = FakeClocks()
    running = with_a_bad_target(gateway, up, bad, headers, clocks)

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(OK[:-1])
        may_end.wait(PATIENCE)
        wire.send(OK[-1:])

    bad.behave = behave
    target = running.live.upstreams["up"].targets[1]
    clocks.advance(0.45)
    with RawClient(running.port) as one, RawClient(running.port) as other:
        for client in (one, other):  # one of them is the probe
            client.request(headers=headers)
        eventually(lambda: target.breaker.state == "CLOSED", "it is back")
        assert target.in_flight == 1
        may_end.set()
        assert [client.answer().body for client in (one, other)] == [b"ok", b"ok"]
    assert is_calm(running, up)


def test_hashing_by_a_header_field(
    gateway: StartGateway, up: RawUpstream, upstream: StartUpstream, fast_path_spy: list[bool]
) -> None:
    other = upstream()
    sections = in_front_of(up.url, other.url, balance="hash", hash_on="header:X-Tenant")
    running = gateway(sections)
    both = (up, other)
    with RawClient(running.port) as client:
        homes = []
        for tenant in range(30):
            for one in both:
                one.requests.clear()
            for name in ("a", "b", "c"):
                assert client.get(headers=(f"X-Tenant: {tenant}", f"X-Client-ID: {name}")).status == 200
            homes.append([len(one.requests) for one in both])
        assert sorted(map(sorted, homes)) == [[0, 3]] * 30, "a tenant has one home, whoever asks"
        assert len({tuple(home) for home in homes}) == 2, "and not all have the same"
        for one in both:
            one.requests.clear()
        for name in map(str, range(20)):
            assert client.get(headers=(f"X-Client-ID: {name}",)).status == 200
        assert all(one.requests for one in both), "without the header it goes by client"
    assert all(fast_path_spy)


def test_limits_hold(gateway: StartGateway, up: RawUpstream) -> None:
    server = {"max_header_lines": 10, "max_header_bytes": 3000, "max_body_bytes": 4}
    running = warm(gateway(in_front_of(up.url) | {"server": server}), up)
    many = tuple(f"X-{number}: y" for number in range(9))
    for headers, body, status in (
        (many, b"", 200),
        ((*many, "X: y"), b"", 431),
        (("X: " + "y" * 2_900,), b"", 200),
        (("X: " + "y" * 3_000,), b"", 431),
        (("Content-Length: 4",), b"body", 200),
        (("Content-Length: 5",), b"body!", 413),
    ):
        with RawClient(running.port) as client:
            client.request("POST", headers=headers, body=body)
            assert client.answer().status == status


def test_what_one_client_sent_is_not_mistaken_for_anothers(running: RunningGateway, up: RawUpstream) -> None:
    """Lines are remembered only as long as they are the same to the byte."""
    with RawClient(running.port) as one, RawClient(running.port) as other:
        for name in ("a", "b", "a", "c"):
            for client in (one, other):
                assert client.get(headers=(f"X-Client-ID: {name}", f"Cookie: {name}")).status == 200
                assert (up.requests[-1].all("x-client-id"), up.requests[-1].all("cookie")) == ([name.encode()],) * 2


def test_the_client_id_is_distinguished_from_the_header_fields_beside_it(
    running: RunningGateway, up: RawUpstream, fast_path_spy: list[bool]
) -> None:
    """What the others come to is worked out once for all names, and an invalid one is refused."""
    done = finished(running)
    fast_path_spy.clear()
    names = ("new-1", "new-2", "n\xefw", "new-3", "", "new-1")
    with RawClient(running.port) as client:
        answers = [
            client.get(headers=("X-Request-ID: mine", f"X-Client-ID: {name}", "X_Client_Id: forged")) for name in names
        ]
        twice = client.get(headers=("X-Request-ID: mine", "X-Client-ID: new-1", "x-client-id: new-2"))
    assert [answer.status for answer in (*answers, twice)] == [200, 200, 400, 200, 400, 200, 400]
    assert fast_path_spy == [True, True, True, True, False, True, True], "an empty value is not plain"
    eventually(lambda: len(done) == 7, "all end")
    named = [exchange.client.id for exchange in done if exchange.client is not None]
    assert named == ["new-1", "new-2", "new-3", "new-1"]
    assert [exchange.charges[0].key for exchange in done if exchange.client] == [f"client:{name}" for name in named]
    assert {exchange.id for exchange in done} == {"mine"}
    assert [request.all("x-client-id") for request in up.requests] == [[name.encode()] for name in named]
    assert not any(request.all("x_client_id") for request in up.requests)


def test_a_name_may_lie_in_a_header_that_says_something_else_too(
    gateway: StartGateway, up: RawUpstream, fast_path_spy: list[bool]
) -> None:
    running = warm(gateway(in_front_of(up.url) | {"identity": {"header": "X-Request-ID"}}), up)
    done = finished(running)
    fast_path_spy.clear()
    with RawClient(running.port) as client:
        answers = [client.get(headers=(f"X-Request-ID: {name}",)) for name in "ab"]
    assert fast_path_spy == [True, True]
    assert [answer.all("x-request-id") for answer in answers] == [[b"a"], [b"b"]]
    eventually(lambda: len(done) == 2, "both end")
    assert [exchange.client and exchange.client.id for exchange in done] == ["a", "b"]


# One after the other


def test_requests_in_a_pipeline_are_answered_in_order(client: RawClient, up: RawUpstream) -> None:
    up.behave = lambda wire, request: wire.send(
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(request.line), request.line)
    )
    for count in (1, 2, 5):
        for number in range(count):
            client.request("GET", f"/api/{number}")
        for number in range(count):
            assert client.answer().body == b"GET /api/%d HTTP/1.1" % number


def test_a_request_that_comes_during_another_is_served_after_it(client: RawClient, up: RawUpstream) -> None:
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        if request.line.startswith(b"GET /api/first"):
            gate.wait(PATIENCE)
        wire.send(OK)

    up.behave = behave
    client.request("GET", "/api/first")
    eventually(lambda: len(up.requests) == 1, "the first is with the upstream")
    client.request("GET", "/api/second")
    time.sleep(0.1)
    assert len(up.requests) == 1
    gate.set()
    assert [client.answer().status for _ in range(2)] == [200, 200]
    assert client.get().status == 200


@pytest.mark.parametrize("when", ["before the head", "within the body"])
def test_a_client_that_disconnects_ends_the_exchange(running: RunningGateway, up: RawUpstream, when: str) -> None:
    arrived, left = threading.Event(), threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool:
        if when == "within the body":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        arrived.set()
        if wire.is_closed(PATIENCE):
            left.set()
        return False

    up.behave = behave
    done = finished(running)
    with RawClient(running.port) as client:
        client.request()
        assert arrived.wait(PATIENCE)
        if when == "within the body":
            assert client.read_until(b"half") is not None
    assert left.wait(0.4)
    eventually(lambda: is_calm(running, up) and len(done) == 1, "nothing is held")
    assert (done[0].status, done[0].reason) == (499, "client_disconnected")
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0


def test_a_half_closed_client_with_connection_close_gets_its_response(client: RawClient, up: RawUpstream) -> None:
    up.behave = says(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n", b"half", b"half", pause=0.1)
    client.request(headers=("Connection: close",))
    client.sock.shutdown(1)
    assert client.answer().body == b"halfhalf"
    assert client.is_closed()


def test_a_slow_reader_holds_the_upstream_back(running: RunningGateway, up: RawUpstream) -> None:
    """And loses nothing, nor the idle time of the upstream, which it is that waits."""
    size, sent = 32 * 1024 * 1024, []

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65_536):
            wire.send(b"x" * 65_536)
            sent.append(65_536)

    up.behave = behave
    with RawClient(running.port) as client:
        client.request()
        assert stalled(lambda: sum(sent)) < size / 2
        assert client.read_until(b"\r\n\r\n") is not None
        left = size - len(client.buffer)
        client.buffer = b""
        while left > 0:
            left -= len(client.sock.recv(min(left, 1 << 20)))
        up.behave = reply()
        assert client.get().status == 200
    eventually(lambda: is_calm(running, up), "nothing is held")


def test_a_client_that_reads_nothing_cannot_accumulate_responses(running: RunningGateway, up: RawUpstream) -> None:
    """While a response waits to be read, the next request waits too."""
    up.behave = reply(b"x" * 200_000)
    with RawClient(running.port) as client:
        for _ in range(400):
            client.sock.settimeout(0.3)
            try:
                client.request()
                time.sleep(0.002)
            except TimeoutError:
                break
        assert stalled(lambda: len(up.requests)) < 100


def test_a_server_that_stops_lets_it_end_and_closes(gateway: StartGateway, up: RawUpstream) -> None:
    running = warm(gateway(in_front_of(up.url)), up)

    def behave(wire: Wire, _request: RawRequest) -> None:
        time.sleep(0.4)
        wire.send(OK)

    up.behave = behave
    with RawClient(running.port) as client:
        client.request()
        eventually(lambda: len(up.requests) == 1, "it is with the upstream")
        running.server.should_exit = True
        answer = client.answer()
        assert (answer.status, answer.all("connection")) == (200, [b"close"])
        assert client.is_closed()


def test_with_other_middleware_every_request_uses_the_asgi_path(
    gateway: StartGateway, up: RawUpstream, fast_path_spy: list[bool], tmp_path: Path
) -> None:
    """So the fast path is closed where there is one."""
    app = create_app(GatewayConfig.model_validate(in_front_of(up.url) | {"state_dir": tmp_path}))
    assert app.fast_path is not None
    app.add_middleware(GZipMiddleware)
    assert app.fast_path is None
    running = warm(gateway(in_front_of(up.url)), up)
    running.server._app.fast_path = app.fast_path  # as an application with middleware has it
    fast_path_spy.clear()
    with RawClient(running.port) as client:
        assert client.get().status == 200
    assert fast_path_spy == []


# What once went wrong


def test_an_upstream_that_was_held_back_for_a_moment_goes_on(
    client: RawClient, up: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when more than is held for a slow reader arrives at once; TLS can deliver that."""
    monkeypatch.setattr("api_gateway.transport.upstream_connection.RESPONSE_HIGH_WATER", 10)
    up.behave = says(b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n" + b"x" * 20, b"x" * 20, b"x" * 20)
    assert client.get().body == b"x" * 60


@pytest.mark.parametrize(
    ("last_words", "reason"), [(b"", "client_disconnected"), (b"GET /api/z HTTP/1.0\r\n\r\n", "upstream_timeout")]
)
def test_a_stream_that_begins_as_its_client_disconnects_holds_nothing(
    impatient: RunningGateway, up: RawUpstream, last_words: bytes, reason: str
) -> None:
    """Answer and end come within one turn of the loop, which is kept busy meanwhile.

    What the client has sent behind its request is held, and may be a last request, which is owed a response.
    """
    gate = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        gate.wait(PATIENCE)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        wire.is_closed()

    up.behave = behave
    done = finished(impatient)
    with RawClient(impatient.port) as client:
        client.request()
        eventually(lambda: len(up.requests) == 1, "it is with the upstream")
        (protocol,) = (one for one in impatient.server.server_state.connections if getattr(one, "exchange", None))
        protocol.loop.call_soon_threadsafe(time.sleep, 0.2)
        time.sleep(0.05)
        gate.set()
        client.send(last_words)
    eventually(lambda: is_calm(impatient, up) and len(done) == 1, "nothing is held")
    assert done[0].reason == reason


def test_a_last_request_behind_another_is_answered_though_its_client_sends_no_more(
    client: RawClient, up: RawUpstream
) -> None:
    def behave(wire: Wire, _request: RawRequest) -> None:
        time.sleep(0.2)
        wire.send(OK)

    up.behave = behave
    client.request()
    eventually(lambda: len(up.requests) == 1, "the first is with the upstream")
    client.request(headers=("Connection: close",))
    client.sock.shutdown(1)
    assert [client.answer().body for _ in range(2)] == [b"ok", b"ok"]
    assert client.is_closed()


@pytest.mark.parametrize("begun", [False, True])
def test_what_outlasts_the_time_to_drain_is_cut_off_and_recorded(
    gateway: StartGateway, up: RawUpstream, *, begun: bool
) -> None:
    running = warm(gateway(in_front_of(up.url) | {"server": {"drain_timeout": 0.3}}), up)
    up.behave = says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf" if begun else b"", b"", pause=3)
    done = finished(running)
    with RawClient(running.port) as client:
        client.request()
        eventually(lambda: len(up.requests) == 1, "it is with the upstream")
        if begun:
            assert client.read_until(b"half") is not None
        running.server.should_exit = True
        assert client.is_closed()
    eventually(lambda: is_calm(running, up) and len(done) == 1, "nothing is held")
    assert (done[0].status, done[0].reason) == (200 if begun else 499, "draining")
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0


def test_a_record_that_cannot_be_written_breaks_nothing(
    running: RunningGateway, client: RawClient, up: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_exchange: Exchange) -> None:
        raise OSError("no space left")

    record, wires = lane(running).record, len(up.wires)
    record._observers = (fail, *record._observers)
    for headers in ((), (ODD,), ()):
        assert client.get(headers=headers).status == 200
    assert len(up.wires) == wires
    eventually(lambda: is_calm(running, up), "nothing is held")
    eventually(lambda: caplog.text.count("could not be recorded") == 3, "each is told of")


def test_a_client_that_reads_nothing_holds_no_request_for_ever(gateway: StartGateway, up: RawUpstream) -> None:
    running = warm(gateway(in_front_of(up.url) | {"server": {"idle_timeout": 0.4}}), up)
    up.behave = reply(b"x" * 400_000)
    with RawClient(running.port) as client:
        client.sock.settimeout(0.3)
        for _ in range(200):
            try:
                client.request()
                time.sleep(0.002)
            except (TimeoutError, ConnectionError):
                break
        eventually(lambda: not running.server.server_state.connections, "it is let go")
    eventually(lambda: is_calm(running, up), "its request has ended")


@pytest.mark.parametrize("headers", [(), (ODD,)])
def test_an_unsolicited_interim_response_gives_the_upstream_no_more_time(
    impatient: RunningGateway, up: RawUpstream, headers: tuple[str, ...]
) -> None:
    up.behave = says(b"HTTP/1.1 100 Continue\r\n\r\n", b"", pause=1.5)
    with RawClient(impatient.port) as client:
        client.request("POST", headers=("Content-Length: 0", *headers))
        assert client.answer().status == 504
