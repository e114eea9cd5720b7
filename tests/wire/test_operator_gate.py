"""The operator gate: what is refused before the framework runs and the body is read."""

import json
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from tests.cases import each
from tests.kit import FakeClocks, RunningGateway, Wire, ask, in_front_of, running_gateway

TOKEN = "correct-horse-battery"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}
CROSS_SITE = {"Origin": "https://evil.example"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway without a token: local requests are an operator's."""
    with running_gateway(in_front_of("http://127.0.0.1:9"), tmp_path_factory.mktemp("plain")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def tokened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway with a token."""
    sections = in_front_of("http://127.0.0.1:9") | {"admin": {"token": TOKEN}}
    with running_gateway(sections, tmp_path_factory.mktemp("tokened")) as gateway:
        yield gateway


StartGateway = Callable[..., RunningGateway]
Connect = Callable[[RunningGateway], Wire]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open connections; they are closed at the end."""
    with ExitStack() as stack:

        def open_connection(gateway: RunningGateway) -> Wire:
            return Wire(stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port))))

        yield open_connection


def read_answer(wire: Wire) -> tuple[int, dict[bytes, bytes], bytes]:
    """Read one response with a body of stated length: status, fields in lower case, body."""
    head = wire.read_until(b"\r\n\r\n")
    assert head is not None
    lines = head.rstrip(b"\r\n").split(b"\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    return int(lines[0].split()[1]), fields, wire.read_exactly(int(fields.get(b"content-length", b"0")))


# The body


@pytest.mark.parametrize("authorization", [b"", b"Authorization: Bearer wrong\r\n"])
@pytest.mark.parametrize("framing", [b"Content-Length: 400000000", b"Transfer-Encoding: chunked"])
def test_without_a_token_nothing_of_the_body_is_awaited(
    connect: Connect, tokened: RunningGateway, authorization: bytes, framing: bytes
) -> None:
    wire = connect(tokened)
    wire.send(
        b"POST /clients/x/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%b%b\r\n\r\n"
        % (authorization, framing)
    )
    status, fields, body = read_answer(wire)
    assert (status, json.loads(body)["reason"], fields[b"connection"]) == (401, "unauthorized", b"close")


def test_a_body_sent_without_a_token_takes_no_memory(connect: Connect, tokened: RunningGateway) -> None:
    """The refusal can be read although the client goes on sending."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wire = connect(tokened)
    wire.send(
        b"POST /clients/x/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 400000000\r\n\r\n"
    )
    piece = bytes(1 << 20)
    with suppress(ConnectionError):  # it is reset once it has gone on for too long
        for _ in range(400):
            wire.send(piece)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes
    assert read_answer(wire)[0] == 401


@pytest.mark.parametrize("length", [65_537, 400_000_000, 10**30])
def test_a_body_stated_to_be_too_long_is_refused_at_once(
    connect: Connect, tokened: RunningGateway, length: int
) -> None:
    wire = connect(tokened)
    wire.send(
        b"POST /clients/x/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (TOKEN.encode(), length)
    )
    status, fields, body = read_answer(wire)
    expected = (400, "bad_request") if length > 2**64 else (413, "body_too_large")
    assert (status, json.loads(body)["reason"], fields[b"connection"]) == (*expected, b"close")


def test_a_chunked_body_is_refused_once_it_is_too_long(connect: Connect, plain: RunningGateway) -> None:
    wire = connect(plain)
    wire.send(
        b"POST /clients/x/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    wire.send(b"8000\r\n%b\r\n" % (b" " * 0x8000) * 2 + b"1\r\n \r\n")
    status, fields, body = read_answer(wire)
    assert (status, json.loads(body)["reason"], fields[b"connection"]) == (413, "body_too_large", b"close")


def test_a_body_of_the_greatest_size_is_read(plain: RunningGateway) -> None:
    body = b'{"tier": "FREE"}'
    answer = ask(f"{plain.url}/clients/x/tier", method="POST", headers=JSON, body=body + b" " * (65_536 - len(body)))
    assert answer.status == 200


def test_what_follows_a_refused_body_is_not_served(connect: Connect, plain: RunningGateway) -> None:
    """A request hidden in a body that was not read must not be taken for one."""
    wire = connect(plain)
    hidden = b"POST /clients/hidden/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    hidden += b"Content-Length: 19\r\n\r\n" + b'{"tier": "PREMIUM"}'
    head = b"POST /clients/x/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    wire.send(head + b"Content-Length: 70000\r\n\r\n" + hidden * 2)
    assert read_answer(wire)[0] == 413
    assert not wire.fill()
    assert ask(f"{plain.url}/clients/hidden").json()["tier_source"] == "default"


def test_a_client_that_disconnects_within_its_body_changes_nothing(connect: Connect, plain: RunningGateway) -> None:
    body = b'{"tier": "PREMIUM"}'
    wire = connect(plain)
    wire.send(
        b"POST /clients/left/tier HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body) + 1, body)
    )
    wire.close()
    assert ask(f"{plain.url}/clients/left").json()["tier_source"] == "default"


# Pages of other origins


WRITES: list[tuple[str, str, bytes | None]] = [
    ("POST", "/clients/acme/tier", b'{"tier": "BASIC"}'),
    ("POST", "/clients/acme/grants", b'{"tier": "BASIC", "duration_seconds": 1}'),
    ("DELETE", "/clients/acme/grants", None),
    ("POST", "/clients/acme/reset", None),
    ("DELETE", "/clients/acme", None),
    ("POST", "/circuit-breakers/up", b'{"mode": "auto"}'),
    ("POST", "/explain", b'{"client_id": "acme", "method": "GET", "path": "/api/x"}'),
]
READS: list[tuple[str, str, bytes | None]] = [
    ("GET", path, None)
    for path in (
        "/metrics",
        "/metrics/latency",
        "/circuit-breakers",
        "/circuit-breakers/up/history",
        "/clients",
        "/clients/acme",
        "/openapi.json",
        "/docs",
    )
]
FOREIGN = [
    CROSS_SITE,
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@each(("method", "path", "body"), WRITES + READS)
@each("header", FOREIGN)
def test_a_page_of_another_origin_is_refused(
    plain: RunningGateway, tokened: RunningGateway, method: str, path: str, body: bytes | None, header: dict[str, str]
) -> None:
    for gateway, more in ((plain, {}), (tokened, AUTHORIZED)):
        answer = ask(gateway.url + path, method=method, headers=JSON | header | more, body=body)
        assert (answer.status, answer.json()["reason"]) == (403, "forbidden"), answer.body


@each(("method", "path", "body"), WRITES + READS)
def test_the_own_origin_is_served(plain: RunningGateway, method: str, path: str, body: bytes | None) -> None:
    headers = JSON | {"Origin": plain.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(plain.url + path, method=method, headers=headers, body=body).status == 200


def test_a_link_from_another_site_leads_to_the_documentation_and_nowhere_else(plain: RunningGateway) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert ask(f"{plain.url}/docs", headers=followed).status == 200
    assert {ask(plain.url + path, headers=followed).status for path in ("/metrics", "/clients", "/openapi.json")} == {
        403
    }
    assert ask(f"{plain.url}/docs", headers=followed | {"Sec-Fetch-Dest": "iframe"}).status == 403


@each("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
@each(("method", "path", "body"), WRITES)
def test_what_a_form_can_send_changes_nothing(
    plain: RunningGateway, kind: str, method: str, path: str, body: bytes | None
) -> None:
    """Also of a browser that states no origin."""
    answer = ask(plain.url + path, method=method, headers={"Content-Type": kind}, body=body or b"")
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")
    assert "'Content-Type: application/json'" in answer.json()["detail"]


def test_a_request_without_a_body_needs_no_content_type(plain: RunningGateway) -> None:
    assert ask(f"{plain.url}/clients/acme/reset", method="POST").status == 200


def test_a_page_of_another_origin_sees_no_more_health_than_an_unauthenticated_caller(plain: RunningGateway) -> None:
    assert "upstreams" in ask(f"{plain.url}/health").json()
    assert set(ask(f"{plain.url}/health", headers=CROSS_SITE).json()) == {"status"}


# HEAD


@each("path", ["/healthz", "/readyz", "/health", *(path for _, path, _ in READS)])
def test_head_is_answered_wherever_get_is(plain: RunningGateway, path: str) -> None:
    got, head = ask(plain.url + path), ask(plain.url + path, method="HEAD")
    assert (got.status, head.status, head.body) == (200, 200, b"")
    assert got.body
    assert set(got.headers) == set(head.headers)
    assert got.headers["content-type"] == head.headers["content-type"]


def test_head_leaves_the_connection_usable(connect: Connect, plain: RunningGateway) -> None:
    wire = connect(plain)
    for _ in range(2):
        wire.send(b"HEAD /clients/acme HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = wire.read_until(b"\r\n\r\n")
        assert head is not None
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert b"content-length:" in head.lower()
    wire.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_answer(wire)[::2] == (200, b"ok\n")


# Client ids


IDS = ["a/b", "team/grants", "team/tier", "team/reset", "a%2Fgrants", "..", ".", "%", "100%", "a?b", "a#b", "/", "//"]


def encoded(client_id: str) -> str:
    return "".join(f"%{byte:02X}" for byte in client_id.encode())


@each("client_id", IDS)
def test_any_id_is_one_segment_of_the_path(plain: RunningGateway, client_id: str) -> None:
    url = f"{plain.url}/clients/{encoded(client_id)}"
    tier = json.dumps({"tier": "PREMIUM"}).encode()

    def told(path: str = "", method: str = "GET", body: bytes | None = None) -> Any:
        answer = ask(url + path, method=method, headers=JSON, body=body)
        assert answer.status == 200, answer.body
        return answer.json()

    assert told()["client_id"] == client_id
    assert told("/tier", "POST", tier)["client_id"] == client_id
    assert told()["tier_source"] == "registered"
    assert told("/grants", "POST", b'{"tier": "BASIC", "duration_seconds": 600}')["current"]["name"] == "BASIC"
    assert told("/reset", "POST")["client_id"] == client_id
    assert told("/grants", "DELETE")["current"]["name"] == "PREMIUM"
    assert told("", "DELETE")["client_id"] == client_id
    assert told()["tier_source"] == "default"


@each("resource", ["grants", "tier", "reset"])
def test_an_id_with_a_slash_is_not_a_resource_of_another_client(plain: RunningGateway, resource: str) -> None:
    url = f"{plain.url}/clients/team"
    for path, body in (("/tier", b'{"tier": "PREMIUM"}'), ("/grants", b'{"tier": "BASIC", "duration_seconds": 600}')):
        assert ask(url + path, method="POST", headers=JSON, body=body).status == 200
    before = ask(url).json()
    assert ask(f"{url}%2F{resource}", method="DELETE").json()["client_id"] == f"team/{resource}"
    assert ask(f"{url}%2f{resource}").json()["client_id"] == f"team/{resource}"
    assert ask(f"{url}%2F{resource}", method="POST").status == 405
    after = ask(url).json()
    assert (after["tier_source"], after["tier"], after["grant"]) == ("granted", before["tier"], before["grant"])


@each("path", ["/clients/a/b", "/clients/a/b/tier", "/clients//tier", "/clients/", "/clients/a/"])
def test_a_plain_slash_is_not_part_of_an_id(plain: RunningGateway, path: str) -> None:
    assert ask(plain.url + path, method="DELETE").status == 404


@each("client_id", ["café", "a b", "a\nb", "\x00", "x" * 129, "\udcff"])
def test_an_id_that_no_client_can_send_is_refused(plain: RunningGateway, client_id: str) -> None:
    spelt = "".join(f"%{byte:02X}" for byte in client_id.encode(errors="surrogateescape"))
    for method, path in (("GET", ""), ("DELETE", ""), ("DELETE", "/grants"), ("POST", "/reset")):
        answer = ask(f"{plain.url}/clients/{spelt}{path}", method=method)
        assert (answer.status, answer.json()["reason"]) == (400, "client_id_invalid")


# Spellings of a path


TARGETS = [
    b"/metrics/",
    b"//metrics",
    b"/./metrics",
    b"/x/../metrics",
    b"/METRICS",
    b"/%6detrics",
    b"/metrics%2Flatency",
    b"/%2Fmetrics",
    b"/metrics;x",
    b"/metrics%00",
    b"/metrics%20",
    b"/metrics?x=/healthz",
    b"/metrics%3Fx",
    b"http://localhost/metrics",
    b"http://healthz/metrics",
    b"/healthz/../metrics",
    b"/healthz/metrics",
    b"/healthz%2F..%2Fmetrics",
    b"/api/../metrics",
    b"/api%2F..%2Fmetrics",
]


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_no_spelling_of_a_path_bypasses_the_gate(gateway: StartGateway, connect: Connect, version: bytes) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9", retry={"attempts": 1}) | {"admin": {"token": TOKEN}})
    for target in TARGETS:
        wire = connect(running)
        wire.send(b"GET %b HTTP/%b\r\nHost: localhost\r\nConnection: close\r\n\r\n" % (target, version))
        status, _, body = read_answer(wire)
        assert status in (401, 404, 502, 503), (target, body)
        assert b"in_flight" not in body


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"Authorization: Bearer wrong\r\nAuthorization: Bearer TOKEN\r\n", 400),
        (b"Authorization: Bearer TOKEN\r\nAuthorization: Bearer TOKEN\r\n", 400),
        (b"Authorization: Bearer TOKEN, Bearer TOKEN\r\n", 401),
        (b"Authorization: Bearer  TOKEN x\r\n", 401),
        (b"Authorization: Basic TOKEN\r\n", 401),
        (b"Authorization: TOKEN\r\n", 401),
        (b"Proxy-Authorization: Bearer TOKEN\r\n", 401),
        (b"Authorization_: Bearer TOKEN\r\n", 401),
    ],
)
def test_only_one_authorization_that_is_right_admits(
    connect: Connect, tokened: RunningGateway, lines: bytes, status: int
) -> None:
    """A repeated field is a malformed request, 400 (RFC 6750 section 3.1)."""
    wire = connect(tokened)
    wire.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % lines.replace(b"TOKEN", TOKEN.encode()))
    assert read_answer(wire)[0] == status


@pytest.mark.parametrize(
    "lines",
    [b"Host: localhost\r\nHost: localhost\r\n", b"", b"Host: localhost\r\nTransfer-Encoding: gzip, chunked\r\n"],
)
def test_an_ambiguous_request_is_refused(connect: Connect, plain: RunningGateway, lines: bytes) -> None:
    wire = connect(plain)
    wire.send(b"POST /clients/x/reset HTTP/1.1\r\n%b\r\n" % lines)
    status, fields, _ = read_answer(wire)
    assert (status, fields[b"connection"]) == (400, b"close")


@pytest.mark.parametrize(
    "line", [b"GET /health", b"GET /healthz", b"GET /metrics", b"OPTIONS *", b"GET http://a.b/health"]
)
@pytest.mark.parametrize("host", [b"", b"Host: a\r\nHost: a\r\n", b"Host: a%zz\r\n", b"Host: u@a\r\n"])
def test_a_host_that_is_missing_double_or_invalid_is_refused_on_every_path(
    connect: Connect, plain: RunningGateway, line: bytes, host: bytes
) -> None:
    """RFC 9112 section 3.2; but simple health checks omit Host, see below."""
    if not host and b"/health" in line:
        return
    wire = connect(plain)
    wire.send(b"%b HTTP/1.1\r\n%b\r\n" % (line, host))
    status, fields, _ = read_answer(wire)
    assert (status, fields[b"connection"]) == (400, b"close")


# Methods


@each(
    ("path", "allow"),
    [
        ("/healthz", "GET, HEAD, OPTIONS"),
        ("/readyz", "GET, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
        ("/metrics", "GET, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
        ("/explain", "OPTIONS, POST"),
        ("/clients", "GET, HEAD, OPTIONS"),
        ("/clients/acme", "DELETE, GET, HEAD, OPTIONS"),
        ("/clients/a%2Fgrants", "DELETE, GET, HEAD, OPTIONS"),
        ("/clients/acme/grants", "DELETE, OPTIONS, POST"),
        ("/clients/acme/tier", "OPTIONS, POST"),
        ("/circuit-breakers/up", "OPTIONS, POST"),
        ("/circuit-breakers/up/history", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_and_a_wrong_method_name_the_methods_there_are(plain: RunningGateway, path: str, allow: str) -> None:
    options = ask(plain.url + path, method="OPTIONS")
    assert (options.status, options.body, options.headers["allow"]) == (204, b"", allow)
    wrong = ask(plain.url + path, method="PUT")
    assert (wrong.status, wrong.json()["reason"], wrong.headers["allow"]) == (405, "method_not_allowed", allow)


def test_a_preflight_of_another_origin_is_refused(plain: RunningGateway) -> None:
    headers = CROSS_SITE | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answer = ask(f"{plain.url}/clients/acme/tier", method="OPTIONS", headers=headers)
    assert answer.status == 403
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


# Tokens and roles

READ, OPERATE, OLD = "read-only-token", "alice-may-operate", "alice-had-this-before"
NAMED = {
    "prometheus": {"role": "read", "token": READ},
    "alice": {"role": "operate", "token": OPERATE},
    "alice-old": {"role": "operate", "token": OLD},
}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway with named tokens beside the first one, one of them from a file."""
    folder = tmp_path_factory.mktemp("named")
    file = folder / "token"
    file.write_text("token-from-a-file\n")
    admin = {"token": TOKEN, "tokens": NAMED | {"from-file": {"token_file": str(file)}}}
    with running_gateway(in_front_of("http://127.0.0.1:9") | {"admin": admin}, folder) as running:
        yield running


@each("token", [TOKEN, READ, OPERATE, OLD, "token-from-a-file"])
def test_any_of_the_tokens_may_read(named: RunningGateway, token: str) -> None:
    for _, path, _ in READS:
        assert ask(named.url + path, headers=bearer(token)).status == 200
        assert ask(named.url + path, method="HEAD", headers=bearer(token)).status == 200
    assert "upstreams" in ask(f"{named.url}/health", headers=bearer(token)).json()


@each("token", [TOKEN, OPERATE, OLD])
@each(("method", "path", "body"), WRITES)
def test_a_token_to_operate_may_write(
    named: RunningGateway, token: str, method: str, path: str, body: bytes | None
) -> None:
    assert ask(named.url + path, method=method, headers=JSON | bearer(token), body=body).status == 200


@each("token", [READ, "token-from-a-file"])
@each(("method", "path", "body"), WRITES)
def test_a_token_to_read_may_not_write(
    named: RunningGateway, token: str, method: str, path: str, body: bytes | None
) -> None:
    answer = ask(named.url + path, method=method, headers=JSON | bearer(token), body=body)
    if path == "/explain":  # a question, which changes nothing
        assert answer.status == 200
        return
    assert (answer.status, answer.json()["reason"]) == (403, "forbidden")
    name = "prometheus" if token == READ else "from-file"
    assert answer.json()["detail"] == f"The token '{name}' has the role 'read'; {method} requires the role 'operate'."


def test_a_mode_names_the_token_that_set_it(named: RunningGateway) -> None:
    for token, who in ((OPERATE, "alice"), (OLD, "alice-old"), (TOKEN, "admin")):
        answer = ask(
            f"{named.url}/circuit-breakers/up",
            method="POST",
            headers=JSON | bearer(token),
            body=b'{"mode": "observe"}',
        )
        assert answer.json()["current"]["set_by"] == f"token '{who}', from 127.0.0.1"


# Limits


def statuses(running: RunningGateway, path: str, count: int, headers: dict[str, str] | None = None) -> list[int]:
    return [ask(running.url + path, headers=headers).status for _ in range(count)]


def test_an_address_that_fails_too_often_is_limited_and_nobody_else_is(gateway: StartGateway) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9") | {"admin": {"token": TOKEN}}, FakeClocks().clocks)
    failed = statuses(running, "/metrics", 60, bearer("wrong-token"))
    assert failed[:50] == [401] * 50
    refused = ask(f"{running.url}/metrics", headers=bearer("wrong-token"))
    assert (refused.status, refused.json()["reason"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) >= 1
    assert ask(f"{running.url}/clients").status == 429  # without a token, too
    assert statuses(running, "/metrics", 20, AUTHORIZED) == [200] * 20
    assert statuses(running, "/healthz", 20) + statuses(running, "/readyz", 20) == [200] * 40
    assert statuses(running, "/health", 20) == [200] * 20


def test_without_a_token_configured_what_is_not_local_is_limited_and_local_requests_are_not(
    gateway: StartGateway,
) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9"), FakeClocks().clocks)
    forwarded = statuses(running, "/metrics", 60, {"X-Forwarded-For": "203.0.113.9"})
    assert (forwarded[0], forwarded[-1]) == (401, 429)
    assert statuses(running, "/metrics", 20) == [200] * 20


def test_behind_a_trusted_proxy_the_forwarded_address_is_limited(gateway: StartGateway) -> None:
    sections = in_front_of("http://127.0.0.1:9") | {"admin": {"token": TOKEN}}
    running = gateway(sections | {"server": {"trusted_proxies": ["127.0.0.1"]}})
    assert statuses(running, "/metrics", 60, {"X-Forwarded-For": "2001:db8::1"})[-1] == 429
    assert ask(f"{running.url}/metrics", headers={"X-Forwarded-For": "2001:db8::2"}).status == 429  # the same /64
    assert ask(f"{running.url}/metrics", headers={"X-Forwarded-For": "2001:db8:0:1::1"}).status == 401
    assert ask(f"{running.url}/metrics").status == 401


def test_refused_attempts_are_counted_and_a_few_are_logged(
    gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9") | {"admin": {"token": TOKEN, "tokens": NAMED}})
    statuses(running, "/clients/a%1b[1m", 60, bearer("a-secret-mistyped"))
    assert ask(f"{running.url}/metrics").status == 429
    assert ask(f"{running.url}/metrics", headers=AUTHORIZED | CROSS_SITE).status == 403
    assert ask(f"{running.url}/clients/x", method="DELETE", headers=bearer(READ)).status == 403
    assert ask(f"{running.url}/health", headers=bearer("a-secret-mistyped")).status == 200
    told = ask(f"{running.url}/metrics", headers=AUTHORIZED).json()
    assert told["operator_refusals"] == {
        "invalid_token": 61,
        "missing_token": 1,
        "cross_site": 1,
        "insufficient_role": 1,
    }
    assert told["refusals"]["unauthorized"] >= 50
    assert told["refusals"]["rate_limited"] >= 1
    text = ask(f"{running.url}/metrics?format=prometheus", headers=AUTHORIZED).body
    assert b'gateway_operator_refusals_total{reason="invalid_token"} 61.0' in text
    lines = [record.getMessage() for record in caplog.records if "operator endpoint refused" in record.getMessage()]
    assert 1 <= len(lines) <= 7
    assert lines[0] == "operator endpoint refused: invalid_token: GET /clients/a%1b[1m from 127.0.0.1"
    assert "mistyped" not in caplog.text


def test_an_operator_that_asks_too_often_is_limited_alone(gateway: StartGateway, connect: Connect) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9") | {"admin": {"tokens": NAMED}})
    wire = connect(running)
    for _ in range(5000):
        wire.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n\r\n" % READ.encode())
        status, fields, body = read_answer(wire)
        if status != 200:
            break
    assert (status, json.loads(body)["reason"], fields[b"retry-after"]) == (429, "rate_limited", b"1")
    assert b"Requests of operator 'prometheus' exceed the limit of 500 at once" in body
    assert ask(f"{running.url}/health", headers=bearer(OPERATE)).status == 200
    assert ask(f"{running.url}/health").status == 200


def test_an_unauthenticated_caller_that_asks_for_health_too_often_is_limited(
    gateway: StartGateway, connect: Connect
) -> None:
    running = gateway(in_front_of("http://127.0.0.1:9") | {"admin": {"token": TOKEN}})
    wire = connect(running)
    for _ in range(2000):
        wire.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        status, _, body = read_answer(wire)
        if status != 200:
            break
        assert json.loads(body) == {"status": "pass"}
    assert (status, json.loads(body)["reason"]) == (429, "rate_limited")
    assert "upstreams" in ask(f"{running.url}/health", headers=AUTHORIZED).json()
    for path in (b"/healthz", b"/readyz"):
        for _ in range(600):
            wire.send(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
            assert read_answer(wire)[0] == 200


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz", b"/health"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_probe_that_names_no_host_is_answered(
    connect: Connect, plain: RunningGateway, path: bytes, version: bytes
) -> None:
    """As HAProxy's `option httpchk` sends them."""
    wire = connect(plain)
    wire.send(b"GET %b HTTP/%b\r\n\r\n" % (path, version))
    status, _, body = read_answer(wire)
    assert status == 200
    assert b"upstreams" not in body


# What a body may hold


@each(
    ("path", "body"),
    [
        ("/clients/x/tier", rb'{"tier": "\ud800"}'),
        ("/clients/x/grants", rb'{"tier": "\udfff", "duration_seconds": 1}'),
        ("/circuit-breakers/up", rb'{"mode": "\ud800"}'),
        ("/circuit-breakers/up", rb'{"mode": "auto", "reason": "\ud800"}'),
        ("/explain", rb'{"client_id": "\ud800", "path": "/api/x"}'),
        ("/explain", rb'{"client_id": "x", "path": "/api/x", "host": "\ud800"}'),
        ("/explain", rb'{"client_id": "x", "path": "/api/x", "address": "\ud800"}'),
        ("/explain", rb'{"client_id": "x", "path": "/api/\ud800"}'),
        ("/clients/x/grants", b'{"tier": "FREE", "duration_seconds": Infinity}'),
        ("/clients/x/grants", b'{"tier": "FREE", "duration_seconds": NaN}'),
    ],
)
def test_text_that_is_no_text_and_numbers_that_are_none_are_mistakes(
    plain: RunningGateway, path: str, body: bytes
) -> None:
    answer = ask(plain.url + path, method="POST", headers=JSON, body=body)
    assert (answer.status, answer.json()["reason"]) == (422, "invalid_value")


@each("body", [b"[" * 60_000, b'{"a":' * 12_000, b'{"tier": ' + b"9" * 60_000 + b"}", b'"\xff"'])
def test_json_that_cannot_be_parsed_is_a_mistake(plain: RunningGateway, body: bytes) -> None:
    answer = ask(f"{plain.url}/clients/x/tier", method="POST", headers=JSON, body=body)
    assert answer.status in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_defect_of_the_gateway_is_a_problem_too(plain: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> Any:
        raise ZeroDivisionError("of no concern to the caller")

    monkeypatch.setattr(type(plain.server._app.state.admin_context.clients), "inspect", fail)
    answer = ask(f"{plain.url}/clients/x")
    assert (answer.status, answer.json()["reason"]) == (500, "internal_error")
    assert answer.json()["detail"] == "Internal error: ZeroDivisionError."
    assert ask(f"{plain.url}/metrics").json()["refusals"]["internal_error"] == 1
