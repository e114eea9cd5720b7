"""TLS of clients on the wire: certificates by name, their reload, limits of handshakes, and HTTP as without TLS."""

import json
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.sync.server import ServerConnection, serve

from api_gateway.config import GatewayConfig
from api_gateway.downstream.tls_terminator import TLS_COUNTERS
from api_gateway.process import server_certificates
from tests.kit import (
    PATIENCE,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    _config,
    eventually,
    free_port,
    in_front_of,
    reason,
    reply,
    running_gateway,
)
from tests.tls_kit import HOST, Authority, Pair, TlsClient

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def redirect_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def sections(shared: RawUpstream, authority: Authority, redirect_port: int) -> dict[str, Any]:
    pairs = authority.issue("first", HOST), authority.issue("wild", "*.b.test"), authority.issue("exact", "c.b.test")
    challenges = authority.folder / "challenges"
    challenges.mkdir()
    (challenges / "token-1").write_text("token-1.thumbprint")
    (authority.folder / "secret").write_text("secret")
    tls = {
        "certificates": [pair.setting for pair in pairs],
        "handshake_timeout": 1,
        "max_handshakes": 8,
        "redirect_from": f"127.0.0.1:{redirect_port}",
        "redirect_port": 443,
        "acme_challenges": str(challenges),
        "hsts": "max-age=86400; includeSubDomains",
    }
    return in_front_of(shared.url) | {"server": {"tls": tls, "proxy_protocol": ["127.0.0.2"]}}


@pytest.fixture
def client(running: RunningGateway, authority: Authority) -> Iterator[TlsClient]:
    with TlsClient(running.port, authority.context()) as found:
        yield found


@contextmanager
def counting(of: Counter[str], *names: str) -> Iterator[None]:
    """Check that each of these is counted once more within the block."""
    before = dict(of)
    yield
    eventually(lambda: all(of[name] - before[name] >= 1 for name in names), f"counted: {names}, found {of}")


@pytest.mark.parametrize(
    ("name", "certificate"),
    [(HOST, "first"), ("x.b.test", "wild"), ("C.B.test", "exact"), ("x.y.b.test", "first"), (None, "first")],
)
def test_the_name_that_a_client_asks_for_chooses_the_certificate(
    running: RunningGateway, authority: Authority, name: str | None, certificate: str
) -> None:
    context = authority.context()
    context.check_hostname = False
    with TlsClient(running.port, context, name) as client:
        assert client.served_by == certificate
        assert client.tls.selected_alpn_protocol() == "http/1.1"


def test_requests_are_forwarded_as_https_and_responses_have_hsts(
    client: TlsClient, up: RawUpstream, running: RunningGateway
) -> None:
    for headers in ((), ("Connection: keep-alive, x-odd",)):
        answer = client.get(headers=headers)
        assert answer.status == 200
        assert answer.all("strict-transport-security") == [b"max-age=86400; includeSubDomains"]
        assert up.requests[-1].all("x-forwarded-proto") == [b"https"]
    refused = client.get("/api/..%2f/x", ("X-Client-ID: " + "é",))
    assert refused.status >= 400
    assert refused.all("strict-transport-security") == [b"max-age=86400; includeSubDomains"]
    assert client.get("/healthz").body == b"ok\n"
    assert running.live.recorder.tls_handshakes is TLS_COUNTERS.handshakes


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 401),
        (b"GET /unknown HTTP/1.1\r\nHost: a\r\n\r\n", 404),
        (b"GET /api/x HTTP/1.0\r\nHost: a\r\n\r\n", 200),
        (b"GET /api/x HTTP/1.1\r\n\r\n", 400),
        (b"\x00 / HTTP/1.1\r\n\r\n", 400),
        (b"GET /api/x HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431),
        (b"GET /api/x HTTP/1.1\r\nHost: a\r\nX-Request-Timeout: 0\r\nX-Client-ID: \xff\r\n\r\n", 400),
    ],
)
def test_every_response_over_tls_has_hsts_once_and_none_of_plain_http(
    client: TlsClient, up: RawUpstream, redirect_port: int, request_head: bytes, status: int
) -> None:
    client.send(request_head)
    answer = client.answer()
    assert (answer.status, answer.all("strict-transport-security")) == (
        status,
        [b"max-age=86400; includeSubDomains"],
    )
    assert len(up.requests) <= 1
    with RawClient(redirect_port) as plain:
        plain.send(request_head)
        assert plain.answer().all("strict-transport-security") == []


def test_old_versions_are_refused(running: RunningGateway, authority: Authority) -> None:
    old = authority.context()
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        old.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSVersion"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with counting(TLS_COUNTERS.failures, "protocol_version"), pytest.raises(ssl.SSLError):
        TlsClient(running.port, old)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed(running: RunningGateway, authority: Authority, version: ssl.TLSVersion) -> None:
    context = authority.context()
    context.minimum_version = context.maximum_version = version
    with TlsClient(running.port, context) as first:
        assert first.get().status == 200  # the tickets of TLS 1.3 come with it
        session = first.tls.session
    kind = f"TLSv1.{2 if version is ssl.TLSVersion.TLSv1_2 else 3}/resumed"
    with counting(TLS_COUNTERS.handshakes, kind), TlsClient(running.port, context, session=session) as second:
        assert second.tls.session_reused
        assert second.get().status == 200


def test_plain_http_gets_a_response_and_noise_none(running: RunningGateway) -> None:
    with counting(TLS_COUNTERS.failures, "plain_http"), RawClient(running.port) as client:
        assert reason(client.get()) == (400, "bad_request")
        assert client.is_closed()
    with counting(TLS_COUNTERS.failures, "not_tls"), RawClient(running.port) as client:
        client.send(b"\x00\x01\x02")
        assert client.is_closed()


def test_a_name_that_is_no_text_fails_its_handshake_and_fills_no_log(
    running: RunningGateway, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    for _ in range(2):
        server_certificates.ignore_unreadable_names()
    outgoing = ssl.MemoryBIO()
    hello = authority.context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="name.test")
    with suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    with counting(TLS_COUNTERS.failures, "unknown_name"), RawClient(running.port) as client:
        client.send(outgoing.read().replace(b"name.test", b"\xff\xfe\r\n.test"))
        while client.fill():  # the alert
            pass
    assert not seen
    other = SimpleNamespace(exc_type=UnicodeDecodeError, object=object())
    sys.unraisablehook(other)
    assert seen == [other]


def test_a_slow_handshake_ends_and_their_number_is_limited(running: RunningGateway, authority: Authority) -> None:
    with counting(TLS_COUNTERS.failures, "too_many", "timeout"):
        idle = [RawClient(running.port) for _ in range(6)]  # an address gets half of eight, and no more than are free
        begun = RawClient(running.port)
        begun.send(b"\x16\x03\x01")
        for one in (*idle, begun):
            assert one.is_closed()
            one.close()
    with TlsClient(running.port, authority.context()) as client:
        assert client.get().status == 200


def test_a_forged_record_ends_the_connection(client: TlsClient) -> None:
    assert client.get().status == 200
    with socket.socket(fileno=client.tls.detach()) as plain:
        plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        plain.settimeout(PATIENCE)
        assert b"HTTP" not in plain.recv(1000)  # an alert, or the end


def test_bodies_pass_whole_both_ways_and_a_slow_reader_holds_the_sender_back(
    running: RunningGateway, authority: Authority, up: RawUpstream
) -> None:
    size = 24 * MIB
    sent = 0

    def behave(wire: Wire, request: RawRequest) -> None:
        nonlocal sent
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body, is_complete = wire.read_body(request.headers)
        assert is_complete
        assert body == b"x" * (3 * MIB)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65_536):
            wire.send(b"y" * 65_536)
            sent += 65_536

    up.behave, up.reads_body = behave, False
    with TlsClient(running.port, authority.context()) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        client.request("POST", headers=(f"Content-Length: {3 * MIB}", "Expect: 100-continue"))
        interim = client.read_until(b"\r\n\r\n")
        assert interim is not None
        assert interim.startswith(b"HTTP/1.1 100 ")
        client.send(b"x" * (3 * MIB))

        def is_held_back() -> bool:
            before = sent
            time.sleep(0.05)
            return 0 < before == sent

        eventually(is_held_back, "the sender waits")
        assert sent < size
        answer = client.answer()
        assert answer.is_complete
        assert answer.body == b"y" * size


def test_a_client_that_ends_its_side_gets_its_response(client: TlsClient, up: RawUpstream) -> None:
    has_ended, respond = threading.Event(), reply(b"late")

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        has_ended.wait(PATIENCE)
        return respond(wire, request)

    up.behave = behave
    client.request(headers=("Connection: close",))
    client.tls.setblocking(False)
    with pytest.raises(ssl.SSLWantReadError):  # close_notify is sent, that of the server has not come
        client.tls.unwrap()
    has_ended.set()
    client.tls.settimeout(PATIENCE)
    assert client.answer().status == 200
    with pytest.raises(ssl.SSLZeroReturnError):
        client.tls.read(1)
    assert len(up.requests) == 1


def test_the_end_of_a_connection_is_announced(client: TlsClient, up: RawUpstream) -> None:
    assert client.get(headers=("Connection: close",)).status == 200
    assert up.requests
    assert client.tls.read(1) == b""  # a close_notify; without, this raises an error


async def test_websockets_pass(authority: Authority, tmp_path: Path) -> None:
    """The client has no threads: before Python 3.13 two must not read and write with TLS at the same time."""

    def echo(peer: ServerConnection) -> None:
        for text in peer:
            peer.send(text)

    with serve(echo, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        tls = {"certificates": [authority.issue("ws", HOST).setting]}
        with running_gateway(in_front_of(url) | {"server": {"tls": tls}}, tmp_path) as gateway:
            address: dict[str, Any] = {"host": "127.0.0.1", "port": gateway.port}
            async with connect(f"wss://{HOST}/api/x", ssl=authority.context(), proxy=None, **address) as client:
                for text in ("one", "x" * 300_000):
                    await client.send(text)
                    assert await client.recv() == text
        server.shutdown()


def test_the_proxy_protocol_comes_before_tls(authority: Authority, shared: RawUpstream, tmp_path: Path) -> None:
    tls = {"certificates": [authority.issue("behind", HOST).setting]}
    server = {"tls": tls, "proxy_protocol": ["127.0.0.1"]}
    with running_gateway(in_front_of(shared.url) | {"server": server}, tmp_path) as gateway:
        header = b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 443\r\n"
        with TlsClient(gateway.port, authority.context(), first=header) as client:
            assert client.get().status == 200
            assert shared.requests[-1].all("x-forwarded-for") == [b"203.0.113.9"]
            assert shared.requests[-1].all("x-forwarded-proto") == [b"https"]


def test_plain_http_is_redirected_and_challenges_are_served(redirect_port: int, running: RunningGateway) -> None:
    with RawClient(redirect_port) as client:
        answer = client.get("/api/x?q=%2f")
        assert (answer.status, answer.all("location")) == (308, [b"https://gateway.test/api/x?q=%2f"])
        assert client.get("//other.test/x").all("location") == [b"https://gateway.test//other.test/x"]
        found = client.get("/.well-known/acme-challenge/token-1")
        assert (found.status, found.body) == (200, b"token-1.thumbprint")
        for path in ("..%2fsecret", "../secret", "token-2", ""):
            assert reason(client.get(f"/.well-known/acme-challenge/{path}")) == (404, "no_route"), path
    for host in ("a b", "a.test/x", "user@a.test", ""):
        with RawClient(redirect_port) as client:
            client.send(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert client.answer().status == 400, host
    assert running.server.started


# Reload


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_certificates.ServerCertificates.__init__, "__defaults__", (time.time, 0.05))


def test_changed_files_are_used_without_losing_a_request(
    authority: Authority, shared: RawUpstream, tmp_path: Path, quick_watch: None
) -> None:
    pair, other = authority.issue("pair", HOST, subject="before"), authority.issue("other", HOST, subject="after")
    tls = {"certificates": [pair.setting]}
    done: Counter[str] = Counter()
    stop = threading.Event()
    with running_gateway(in_front_of(shared.url) | {"server": {"tls": tls}}, tmp_path) as gateway:

        def load() -> None:
            context = authority.context()
            while not stop.is_set():
                with TlsClient(gateway.port, context) as client:
                    for _ in range(3):
                        assert client.get().status == 200
                    done[client.served_by] += 1

        kept = TlsClient(gateway.port, authority.context())
        session_context = authority.context()
        with TlsClient(gateway.port, session_context) as first:
            assert first.get().status == 200
            session = first.tls.session
        failures: list[BaseException] = []

        def run() -> None:
            try:
                load()
            except BaseException as error:  # noqa: BLE001 - reported below
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: done["before"] > 3, "the first certificate is used")
        pair.replace(other)
        eventually(lambda: done["after"] > 3 or bool(failures), "the changed certificate is used")
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert not failures
        assert kept.get().status == 200
        assert kept.served_by == "before"
        kept.close()
        with TlsClient(gateway.port, session_context, session=session) as resumed:  # the keys of tickets have stayed
            assert resumed.tls.session_reused
            assert resumed.get().status == 200


def test_a_broken_pair_changes_nothing_and_is_reported(
    authority: Authority,
    shared: RawUpstream,
    tmp_path: Path,
    quick_watch: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pair = authority.issue("broken", HOST, subject="good")
    expired, soon = authority.issue("old", HOST, days=-1), authority.issue("soon", HOST, subject="soon", days=3)
    sections = in_front_of(shared.url) | {"server": {"tls": {"certificates": [pair.setting]}}}
    config = _config(sections, tmp_path)
    gateway = RunningGateway(config, tmp_path, read=lambda: config)

    def health() -> Any:
        with TlsClient(gateway.port, authority.context()) as client:
            served = client.served_by
            token = (tmp_path / "state" / "operator-token").read_text().strip()
            return served, json.loads(client.get("/health", (f"Authorization: Bearer {token}",)).body)

    def problems() -> Any:
        return health()[1]["tls"]["problems"]

    try:
        assert health()[1]["tls"]["status"] == "pass"
        with counting(TLS_COUNTERS.reloads, "failure"):
            pair.key.write_bytes(expired.key.read_bytes())
        eventually(lambda: any("does not belong" in text for text in problems()), "the mismatch is reported")
        assert str(pair.key) in caplog.text
        served, view = health()
        assert (served, view["status"], view["tls"]["status"]) == ("good", "warn", "warn")
        pair.replace(expired)
        eventually(lambda: any("has expired" in text for text in problems()), "the expired one is refused")
        assert health()[0] == "good"
        with counting(TLS_COUNTERS.reloads, "success"):
            pair.replace(soon)
        eventually(lambda: health()[0] == "soon", "the good one is used")
        eventually(lambda: all("expires in 3.0 days" in text for text in problems()), "only the expiry is reported")
        assert len(problems()) == 1
    finally:
        gateway.stop()


def test_a_reload_of_the_configuration_puts_other_certificates_into_force_or_none(
    authority: Authority, shared: RawUpstream, tmp_path: Path
) -> None:
    pairs = [authority.issue(f"r{number}", HOST) for number in range(2)]

    def config_of(pair: Pair) -> GatewayConfig:
        return _config(in_front_of(shared.url) | {"server": {"tls": {"certificates": [pair.setting]}}}, tmp_path)

    given = [config_of(pairs[0])]
    gateway = RunningGateway(given[0], tmp_path, read=lambda: given[0])
    token = ""

    def reload() -> int:
        with TlsClient(gateway.port, authority.context()) as client:
            client.request("POST", "/reload", (f"Authorization: Bearer {token}", "Content-Length: 0"))
            return client.answer().status

    def served() -> str:
        with TlsClient(gateway.port, authority.context()) as client:
            return client.served_by

    try:
        token = (tmp_path / "state" / "operator-token").read_text().strip()
        given[0] = config_of(pairs[1])
        assert (reload(), served()) == (200, "r1")
        given[0] = config_of(authority.issue("gone", HOST, days=-1))
        assert reload() == 422
        assert served() == "r1"
    finally:
        gateway.stop()


def test_unknown_names_are_rejected_if_that_is_configured(
    authority: Authority, shared: RawUpstream, tmp_path: Path
) -> None:
    port = free_port()
    tls = {
        "certificates": [authority.issue("rsa", HOST, kind="rsa").setting, authority.issue("ecdsa", HOST).setting],
        "reject_unknown_names": True,
        "minimum_version": "1.3",
        "redirect_from": f"127.0.0.1:{port}",
        "redirect_port": 8443,
    }
    with running_gateway(in_front_of(shared.url) | {"server": {"tls": tls}}, tmp_path) as gateway:
        context = authority.context()
        context.check_hostname = False
        for name in ("other.test", None):
            with counting(TLS_COUNTERS.failures, "unknown_name"), pytest.raises(ssl.SSLError):
                TlsClient(gateway.port, context, name)
        with TlsClient(gateway.port, context) as client:
            assert client.served_by == "ecdsa"  # one of each kind of key for the same names
            assert client.tls.version() == "TLSv1.3"
        with RawClient(port) as plain:
            assert plain.get().status == 400  # gateway.test has no certificate
            plain.send(b"GET / HTTP/1.1\r\nHost: A.test:80\r\n\r\n")
            assert plain.answer().all("location") == [b"https://a.test:8443/"]


def test_pages_of_allowed_origins_follow_the_redirect(
    authority: Authority, shared: RawUpstream, tmp_path: Path
) -> None:
    """Browsers follow a redirect for a page of another origin only if the page may read it."""
    port = free_port()
    tls = {"certificates": [authority.issue("pages", HOST).setting], "redirect_from": f"127.0.0.1:{port}"}
    sections = in_front_of(shared.url) | {"server": {"tls": tls}, "cors": {"origins": ["https://app.example"]}}
    with running_gateway(sections, tmp_path), RawClient(port) as plain:
        for target in (b"/api/x", b"/other"):
            for origin, allowed in ((b"https://app.example", [b"https://app.example"]), (b"https://evil.example", [])):
                plain.send(b"GET %b HTTP/1.1\r\nHost: gateway.test\r\nOrigin: %b\r\n\r\n" % (target, origin))
                answer = plain.answer()
                assert answer.status == 308
                assert answer.all("access-control-allow-origin") == allowed
                assert answer.all("vary") == [b"Origin"]


def test_a_drain_serves_what_is_in_flight(authority: Authority, tmp_path: Path) -> None:
    held = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        held.wait(PATIENCE)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    upstream = RawUpstream(behave)
    tls = {"certificates": [authority.issue("drain", HOST).setting]}
    with (
        running_gateway(in_front_of(upstream.url) | {"server": {"tls": tls}}, tmp_path) as gateway,
        TlsClient(gateway.port, authority.context()) as client,
        RawClient(gateway.port) as handshaking,
    ):
        client.request()
        eventually(lambda: len(upstream.requests) == 1, "the request arrives")
        gateway.server.should_exit = True
        eventually(lambda: not _accepts(gateway.port), "no connection is accepted any more")
        held.set()
        answer = client.answer()
        assert (answer.status, answer.all("connection")) == (200, [b"close"])
        assert client.tls.read(1) == b""
        assert handshaking.is_closed()
    upstream.close()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
