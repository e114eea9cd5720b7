"""Where the gateway listens: both kinds of addresses, Unix sockets, and what is said when it cannot."""

import json
import shutil
import socket
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from api_gateway.config import from_values
from api_gateway.process.listeners import WorkerSockets
from api_gateway.process.startup_message import startup_banner
from tests.kit import PATIENCE, RawUpstream, eventually, in_front_of, running_gateway
from tests.processes import START, Running, config_file, process

CURL = shutil.which("curl")
WORKERS = [
    1,
    pytest.param(
        2, marks=pytest.mark.skipif(not shutil.which("valkey-server"), reason="several workers need a store")
    ),
]
ipv6 = pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")


def get(path: str, *, host: str = "127.0.0.1", port: int = 0, unix: Path | None = None) -> tuple[int, bytes]:
    """Make one request; return the status and the body."""
    family = socket.AF_UNIX if unix is not None else socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(PATIENCE)
        client.connect(str(unix) if unix is not None else (host, port))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while data := client.recv(65_536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


def listens(running: Running) -> str:
    """Wait until it listens, and return the line that says where."""
    eventually(lambda: "Listening on" in running.output or running.popen.poll() is not None, "it listens", START)
    assert running.popen.poll() is None, running.errors
    return next(line for line in running.output.splitlines() if line.startswith("Listening on"))


@ipv6
@pytest.mark.parametrize("workers", [1, 2])
def test_the_address_of_everything_serves_both_kinds(tmp_path: Path, workers: int) -> None:
    arguments = ["-m", "api_gateway", "--host", "::", "--port", "0", "--workers", str(workers)]
    with process(*arguments, cwd=tmp_path) as running:
        line = listens(running)
        port = running.port
        assert line.startswith(f"Listening on [::]:{port} (http://localhost:{port})")
        for host in ("127.0.0.1", "::1"):
            assert get("/healthz", host=host, port=port) == (200, b"ok\n")


@ipv6
def test_a_client_that_comes_by_ipv4_is_named_by_its_ipv4_address(tmp_path: Path) -> None:
    upstream = RawUpstream()
    with running_gateway(in_front_of(upstream.url) | {"server": {"host": "::"}}, tmp_path) as running:
        assert get("/api/x", port=running.port)[0] == 200
    assert upstream.requests[0].all("x-forwarded-for") == [b"127.0.0.1"]
    upstream.close()


@pytest.mark.parametrize(("host", "workers"), [("0.0.0.0", 2), ("127.0.0.1", 1)])
def test_the_banner_names_the_address_it_is_bound_to(tmp_path: Path, host: str, workers: int) -> None:
    arguments = ["-m", "api_gateway", "--host", host, "--port", "0", "--workers", str(workers)]
    with process(*arguments, cwd=tmp_path) as running:
        assert listens(running).startswith(f"Listening on {host}:{running.port} (http://localhost:{running.port}).")


def test_the_routes_at_the_start_differ_by_what_they_match() -> None:
    routes: list[dict[str, Any]] = [
        {"name": "beta", "path": "/api/x", "match": {"headers": {"X-Beta": "1"}, "query": {"v": {"present": True}}}},
        {"name": "writes", "path": "/api/x", "methods": ["POST", "PUT"], "match": {"path": "exact"}},
        {"name": "shop", "path": "/api/x", "host": "*.shop.test"},
    ]
    config = from_values({"upstreams": {"up": "http://a"}, "routes": [{**one, "upstream": "up"} for one in routes]})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        lines = startup_banner(config, WorkerSockets([listener])).splitlines()
    assert lines[1:4] == [
        "  /api/x (header x-beta = '1', query v is present) -> up",
        "  /api/x (exact, POST, PUT) -> up",
        "  *.shop.test/api/x -> up",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unix_socket_serves_and_is_removed_at_the_end(tmp_path: Path, workers: int) -> None:
    """A client without an address is `unix` in the log, to the upstream and to `max_connections_per_peer`."""
    upstream, path = RawUpstream(), tmp_path / "gateway.sock"
    extra = f"server: {{host: 'unix:{path}', socket_mode: 0640, workers: {workers}, max_connections_per_peer: 1}}\n"
    with process("-m", "api_gateway", "--config", config_file(tmp_path, upstream.url, extra), cwd=tmp_path) as running:
        assert listens(running) == f"Listening on unix:{path} (curl --unix-socket {path} http://localhost)"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert get("/healthz", unix=path) == (200, b"ok\n")
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(str(path))
            for _ in range(3):
                assert get("/api/up/x", unix=path) == (200, b"ok"), "clients without an address are not one peer"
        eventually(lambda: len(running.logged) == 3, "it is logged")
        assert {entry["client_address"] for entry in running.logged} == {"unix"}
        assert running.terminate() == 0
        assert not path.exists()
    assert upstream.requests[0].all("x-forwarded-for") == [b"unix"]
    upstream.close()


def is_logged(running: Running, text: str) -> bool:
    return text in (running.output + running.errors).replace(": ", ":")


def test_a_proxy_on_a_unix_socket_can_be_trusted(tmp_path: Path) -> None:
    upstream, path = RawUpstream(), tmp_path / "gateway.sock"
    for trusted, sent in (([], b"unix"), (["unix"], b"192.0.2.7, unix")):
        sections = {"server": {"host": f"unix:{path}", "trusted_proxies": trusted}}
        file = config_file(tmp_path, upstream.url, json.dumps(sections)[1:-1].replace('"server": ', "server: "))
        with (
            process("-m", "api_gateway", "--config", file, cwd=tmp_path) as running,
            socket.socket(socket.AF_UNIX) as client,
        ):
            listens(running)
            client.connect(str(path))
            client.sendall(
                b"GET /api/up HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 192.0.2.7\r\nConnection: close\r\n\r\n"
            )
            assert client.recv(64).split(b" ")[1] == b"200"
            peer = '"client_address":"192.0.2.7"' if trusted else '"client_address":"unix"'
            eventually(partial(is_logged, running, peer), "the request is logged")
        assert upstream.requests[-1].all("x-forwarded-for") == [sent]
    upstream.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unix_socket_that_was_left_behind_by_a_killed_gateway_is_replaced(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "gateway.sock"
    arguments = ["-m", "api_gateway", "--host", f"unix:{path}", "--workers", str(workers)]
    with process(*arguments, cwd=tmp_path) as killed:
        listens(killed)
        killed.popen.kill()
        killed.popen.wait()
    assert path.is_socket()
    eventually(lambda: not serves(path), "the workers have followed")
    with process(*arguments, cwd=tmp_path) as running:
        listens(running)
        assert get("/healthz", unix=path)[0] == 200


def serves(path: Path) -> bool:
    with suppress(OSError):
        get("/healthz", unix=path)
        return True
    return False


def test_a_gateway_that_ends_leaves_the_socket_of_the_one_that_took_its_place(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    (tmp_path / "other").mkdir()
    arguments = ["-m", "api_gateway", "--host", f"unix:{path}"]
    with process(*arguments, cwd=tmp_path) as first:
        listens(first)
        path.unlink()
        with process(*arguments, cwd=tmp_path / "other") as second:
            listens(second)
            assert first.terminate() == 0
            assert get("/healthz", unix=path)[0] == 200


# What is said when it cannot listen: one line, exit code 3


def cannot_listen(tmp_path: Path, *arguments: str, **environment: str) -> str:
    """Start it; return what it says."""
    with process("-m", "api_gateway", *arguments, cwd=tmp_path, **environment) as running:
        assert running.exit_code() == 3
        assert "Traceback" not in running.errors + running.output
        assert "Listening" not in running.output
    (line,) = running.errors.splitlines()
    return line


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use_is_one_line(tmp_path: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        said = cannot_listen(tmp_path, "--port", port, "--workers", workers)
        assert said == f"server: cannot listen on 127.0.0.1:{port}: address already in use"
        listen = {"GATEWAY_ADMIN__LISTEN": f"127.0.0.1:{port}"}
        said = cannot_listen(tmp_path, "--port", "0", "--workers", workers, **listen)
        assert said == f"admin.listen: cannot listen on 127.0.0.1:{port}: address already in use"


def test_two_listeners_of_one_address_are_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    for arguments in (("--check",), (), ("--workers", "2")):
        said = cannot_listen(tmp_path, *arguments, "--port", "9901", GATEWAY_ADMIN__LISTEN="0.0.0.0:9901")
        assert "admin.listen: needs another address than server.host and server.port (127.0.0.1:9901)" in said


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_unknown_host_is_one_line(tmp_path: Path, workers: str) -> None:
    said = cannot_listen(tmp_path, "--host", "no-such-host.invalid", "--workers", workers)
    assert said.startswith("server: the host 'no-such-host.invalid' cannot be resolved: ")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_unix_socket_in_use_is_one_line(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "busy.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen()
        said = cannot_listen(tmp_path, "--host", f"unix:{path}", "--workers", workers)
        assert said == f"server: cannot listen on unix:{path}: address already in use"
    said = cannot_listen(tmp_path, "--host", f"unix:{tmp_path}/nowhere/a.sock", "--workers", workers)
    assert said.endswith("no such file or directory")


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("GATEWAY_SERVER__HOST", "unix:relative", "absolute path"),
        ("GATEWAY_SERVER__HOST", "unix:/" + "x" * 200, "at most 107 bytes"),
        ("GATEWAY_SERVER__SOCKET_MODE", "rw", "octal permissions"),
        ("GATEWAY_SERVER__SOCKET_MODE", "9999", "octal permissions"),
        ("GATEWAY_ADMIN__LISTEN", "9901", "host:port or unix:/path"),
        ("GATEWAY_ADMIN__LISTEN", "127.0.0.1:99999", "host:port or unix:/path"),
        ("GATEWAY_ADMIN__LISTEN", "::1:9901", "brackets"),
    ],
)
def test_an_address_that_is_none_is_a_mistake_in_the_configuration(
    tmp_path: Path, setting: str, value: str, said: str
) -> None:
    assert said in cannot_listen(tmp_path, "--check", **{setting: value})
