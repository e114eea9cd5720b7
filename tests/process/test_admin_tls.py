"""TLS on the listener for operators: its certificates and their renewal, and the commands that call it."""

import json
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from api_gateway import cli
from api_gateway.downstream.tls_terminator import TLS_COUNTERS
from api_gateway.process import server_certificates
from tests.kit import RawClient, RawUpstream, RunningGateway, _config, eventually, free_port, in_front_of
from tests.processes import START, Running, process
from tests.tls_kit import HOST, Authority, Pair, TlsClient

COMMANDS = (
    ("top", "--count", "1"),
    ("clients",),
    ("explain", "--path", "/api/x", "--certificate", "uri=spiffe://test/a=b", "--certificate", "dns=a.test"),
    ("breakers",),
    ("limits",),
    ("tail", "--no-follow"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("admin-tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def operator(authority: Authority) -> Pair:
    return authority.issue("operator", subject="operator")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("pair", HOST, "localhost", subject="before")


@pytest.fixture(scope="module")
def running(folder: Path, authority: Authority, pair: Pair, port: int) -> Iterator[Running]:
    """A gateway whose operators, as its clients, need a certificate."""
    clients = {"ca": str(authority.file), "mode": "required"}
    sections = {
        "server": {"port": 0, "tls": {"certificates": [pair.setting], "client_certificates": clients}},
        "admin": {"listen": f"127.0.0.1:{port}", "tls": True},
        "state_dir": str(folder / "state"),
        "upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:9"}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(sections))
    with process("-m", "api_gateway", "--config", str(folder / "gateway.yaml"), cwd=folder) as one:
        eventually(lambda: "Operator" in one.output or one.popen.poll() is not None, "it listens", START)
        assert f"(https://localhost:{port})" in one.output, one.output + one.errors
        yield one
        assert one.terminate() == 0


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """A command of the command line, in this process; it returns the exit code and what was written."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return cli.main(list(arguments)), *capsys.readouterr()

    return run


def test_commands_reach_operators_by_tls_with_an_authority_and_a_certificate(
    folder: Path, running: Running, authority: Authority, operator: Pair, port: int, command: Command
) -> None:
    """By `--url` the name is verified, by the authority of `--ca`; one of the commands uses the configured address."""
    assert running.popen.poll() is None
    place = ("--config", str(folder / "gateway.yaml"))
    ours = ("--cert", str(operator.certificate), "--key", str(operator.key))
    for arguments in COMMANDS:
        there = () if arguments[0] == "limits" else ("--url", f"https://localhost:{port}", "--ca", str(authority.file))
        code, out, errors = command(*arguments, *place, *ours, *there)
        assert (code, errors) == (0, ""), arguments
        assert out or arguments[0] == "tail", arguments


def test_commands_say_what_they_need(
    folder: Path, running: Running, authority: Authority, operator: Pair, port: int, command: Command
) -> None:
    place, url = ("--config", str(folder / "gateway.yaml")), f"https://127.0.0.1:{port}"
    key = str(operator.key)
    cases: dict[str, tuple[tuple[str, ...], int, str]] = {
        "no certificate": ((), 6, "Its TLS requires a certificate of clients: name one with --cert."),
        "unknown authority": (("--url", url), 6, "Name a file with the authority of its certificate with --ca"),
        "other name": (("--url", url, "--ca", str(authority.file)), 6, "and a host in the certificate with --url"),
        "no file": (("--ca", "none.pem"), 1, "none.pem: cannot be used: No such file or directory"),
        "no authority": (("--ca", key), 1, f"{key}: cannot be used: "),
        "no certificate for the key": (("--key", key), 1, "--key: needs --cert"),
        "key of another": (("--cert", str(folder / "pair.pem"), "--key", key), 1, "pair.pem with "),
        "plain": (("--url", f"http://127.0.0.1:{port}", "--ca", key), 1, "begin --url with https://"),
    }
    for wrong, got in (("uri", "one without '='"), ("ip=::1", "'ip'"), ("=x", "''")):
        code, _, errors = command("explain", "--path", "/api/x", "--certificate", wrong, *place)
        message = (
            "--certificate: must be 'KIND=NAME' with one of uri, dns, email, common_name, subject, each name once"
        )
        assert (code, f"{message}, got {got}" in errors) == (1, True), errors
    locked = authority.issue("locked")
    secret = serialization.load_pem_private_key(locked.key.read_bytes(), None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.key.write_bytes(secret.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    encrypted = ("--cert", str(locked.certificate), "--key", str(locked.key))  # without a question at the terminal
    cases["encrypted key"] = (encrypted, 1, f"{locked.key}: cannot be used")
    assert running.popen.poll() is None
    for name, (arguments, code, message) in cases.items():
        found, out, errors = command("limits", *place, *arguments)
        assert (found, out) == (code, ""), (name, errors)
        assert message in errors, name
        assert "Traceback" not in errors, name


def test_a_hangup_renews_the_certificate_of_operators(
    running: Running, authority: Authority, operator: Pair, pair: Pair, port: int
) -> None:
    context = authority.context(operator)

    def served() -> str:
        with TlsClient(port, context) as client:
            return client.served_by

    assert served() == "before"
    pair.replace(authority.issue("hangup", HOST, "localhost", subject="after"))
    running.signal(signal.SIGHUP)
    eventually(lambda: served() == "after", "operators get the other certificate")


def test_changed_files_and_reloads_apply_to_operators_and_plain_http_is_refused(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxied paths do not exist there; `admin.tls` itself is changed by a reload, for new connections."""
    monkeypatch.setattr(server_certificates.ServerCertificates.__init__, "__defaults__", (time.time, 0.05))
    pair = authority.issue("changing", HOST, x509.DNSName("b.test"), subject="before")
    upstream = RawUpstream()

    def config_of(*, tls: bool) -> Any:
        sections = in_front_of(upstream.url) | {"server": {"tls": {"certificates": [pair.setting]}}}
        return _config(sections | {"admin": {"listen": "127.0.0.1:0", "tls": tls}}, tmp_path)

    given = [config_of(tls=True)]
    gateway = RunningGateway(given[0], tmp_path, read=lambda: given[0])
    context = authority.context()
    try:
        port = gateway.server._sockets.admin[0].getsockname()[1]
        token = (tmp_path / "state" / "operator-token").read_text().strip()
        fields = (f"Authorization: Bearer {token}",)
        with TlsClient(port, context) as kept:
            assert kept.served_by == "before"
            assert kept.get("/metrics").status == 401
            assert kept.get("/metrics", fields).status == 200
            assert json.loads(kept.get("/api/x").body)["reason"] == "no_route"
            pair.replace(authority.issue("changed", HOST, subject="after"))

            def served() -> str:
                with TlsClient(port, context) as client:
                    return client.served_by

            eventually(lambda: served() == "after", "the changed certificate is used")
            assert kept.get("/metrics", fields).status == 200
            before = TLS_COUNTERS.failures["plain_http"]
            with RawClient(port) as plain:
                answer = plain.get("/metrics", fields)
                assert (answer.status, answer.all("strict-transport-security")) == (400, [])
                assert plain.is_closed()
            assert TLS_COUNTERS.failures["plain_http"] == before + 1
            given[0] = config_of(tls=False)
            kept.request("POST", "/reload", (*fields, "Content-Length: 0"))
            assert kept.answer().status == 200
        with RawClient(port) as plain:
            assert plain.get("/metrics", fields).status == 200
        with pytest.raises((ssl.SSLError, OSError)):
            TlsClient(port, context)
    finally:
        gateway.stop()
        upstream.close()
