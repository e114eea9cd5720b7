"""The listener for operators: it serves them and nothing else, and then the public one serves clients alone."""

import json
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin.operator_token import token_file
from api_gateway.process.listeners import WorkerSockets
from tests.kit import PATIENCE, RawUpstream, RunningGateway, ask, eventually, free_port, in_front_of, running_gateway
from tests.processes import START, config_file, process

GUARDED = ["/metrics", "/metrics/latency", "/circuit-breakers", "/clients", "/clients/x", "/openapi.json"]
PAGES = ["/", "/dashboard", "/dashboard/app.js", "/docs"]  # served without a token, where operator endpoints are
curl_only = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    upstream = RawUpstream()
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def gateway(upstream: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    sections = in_front_of(upstream.url) | {"admin": {"listen": "127.0.0.1:0"}}
    with running_gateway(sections, tmp_path_factory.mktemp("admin")) as running:
        yield running


@pytest.fixture(scope="module")
def operators(gateway: RunningGateway) -> str:
    sockets: WorkerSockets = gateway.server._sockets
    return f"http://127.0.0.1:{sockets.admin[0].getsockname()[1]}"


@pytest.mark.parametrize("path", [*GUARDED, *PAGES])
def test_operators_are_served_there_and_the_public_port_knows_of_nothing(
    gateway: RunningGateway, operators: str, path: str
) -> None:
    assert ask(f"{operators}{path}").status == 200
    hidden, unknown = ask(f"{gateway.url}{path}"), ask(f"{gateway.url}/unknown")
    assert (hidden.status, unknown.status) == (404, 404)
    varying = ("content-length", "date")
    assert [pair for pair in hidden.headers.items() if pair[0] not in varying] == [
        pair for pair in unknown.headers.items() if pair[0] not in varying
    ]
    expected = unknown.json()
    assert hidden.json() == expected | {"instance": path, "detail": expected["detail"].replace("/unknown", path)}


def test_not_even_a_token_opens_the_public_port(gateway: RunningGateway, operators: str) -> None:
    token = token_file(gateway.config.state_dir).read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    change: dict[str, Any] = {"method": "POST", "headers": headers, "body": b'{"tier": "PREMIUM"}'}
    assert ask(f"{gateway.url}/clients/x/tier", **change).status == 404
    assert ask(f"{gateway.url}/clients%2Fx/tier", **change).status == 404
    assert ask(f"{operators}/clients/x/tier", **change).status == 200


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz"])
def test_both_serve_health(gateway: RunningGateway, operators: str, path: str) -> None:
    assert ask(f"{gateway.url}{path}").status == ask(f"{operators}{path}").status == 200


@pytest.mark.parametrize("path", ["/api", "/api/x", "/api/x/y?z"])
def test_nothing_is_proxied_there(gateway: RunningGateway, operators: str, upstream: RawUpstream, path: str) -> None:
    assert ask(f"{gateway.url}{path}").status == 200
    before = len(upstream.requests)
    answer = ask(f"{operators}{path}")
    assert (answer.status, answer.json()["reason"]) == (404, "no_route")
    assert len(upstream.requests) == before


def test_the_gate_protects_it_too(operators: str) -> None:
    foreign = {"Origin": "https://evil.example", "Content-Type": "application/json"}
    assert ask(f"{operators}/clients/x/reset", method="POST", headers=foreign).status == 403
    assert ask(f"{operators}/metrics", headers={"Host": "gateway.example"}).status == 401
    assert ask(f"{operators}/metrics", headers={"Authorization": "Bearer wrong-token"}).status == 401


@curl_only
@pytest.mark.parametrize("workers", [1, 2])
def test_a_unix_socket_for_operators(tmp_path: Path, workers: int) -> None:
    """Its peer is known by its credentials; all workers accept there, and each shows what all have counted."""
    upstream, path = RawUpstream(), tmp_path / "admin.sock"
    ample = "tiers: {FREE: {rate: 1000, capacity: 1000}}\n"  # for the share of a worker whose store is late
    extra = f"admin: {{listen: 'unix:{path}'}}\nserver: {{port: 0, workers: {workers}}}\n{ample}"
    with process("-m", "api_gateway", "--config", config_file(tmp_path, upstream.url, extra), cwd=tmp_path) as running:
        eventually(lambda: "Operator" in running.output or running.popen.poll() is not None, "it listens", START)
        assert f"Operator endpoints on unix:{path} (curl --unix-socket {path} http://localhost)" in running.output
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for _ in range(10):
            assert ask(f"{running.url}/api/up/x").status == 200
        assert ask(f"{running.url}/metrics").status == 404
        command = f"curl -s --unix-socket {path} http://localhost/metrics; true"
        for _ in range(4):
            ran = subprocess.run(["sh", "-c", command], capture_output=True, check=True, text=True)
            assert json.loads(ran.stdout)["requests"]["total"] == 10
        with socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(64).split(b" ")[1] == b"401", "a program that serves others may be a proxy"
        assert running.terminate() == 0
    assert not path.exists()
    upstream.close()


@curl_only
def test_several_workers_serve_operators_on_a_port(tmp_path: Path) -> None:
    port = free_port()
    extra = f"admin: {{listen: '127.0.0.1:{port}'}}\nserver: {{port: 0, workers: 2}}\n"
    with process(
        *("-m", "api_gateway", "--config", config_file(tmp_path, "http://127.0.0.1:9", extra)), cwd=tmp_path
    ) as running:
        assert running.port != port
        assert f"Operator endpoints on 127.0.0.1:{port} (http://localhost:{port})" in running.output
        command = (
            f"for i in 1 2 3 4; do curl -s -o /dev/null -w '%{{http_code}} ' http://localhost:{port}/metrics; done"
        )
        ran = subprocess.run(["sh", "-c", command], capture_output=True, check=True, text=True)
        assert ran.stdout == "200 200 200 200 "
        assert ask(f"http://127.0.0.1:{port}/api/up").status == 404


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_another_server_serves_no_operators_and_says_so(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["-m", "uvicorn", "api_gateway.main:app", "--host", "127.0.0.1", "--port", str(port)]
    with process(*arguments, cwd=tmp_path, GATEWAY_ADMIN__LISTEN="127.0.0.1:9901") as running:
        eventually(lambda: is_open(port) or running.popen.poll() is not None, "it listens", START)
        assert ask(f"http://127.0.0.1:{port}/metrics").status == 404
        assert "admin.listen: only the gateway's own server opens it" in running.errors
