"""Real load balancers and proxies in front of the gateway: the client that they name is the client."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import free_port
from tests.kit import RawUpstream, RunningGateway, ask, eventually, in_front_of, running_gateway

pytestmark = pytest.mark.interop

# Its clients come from loopback too, so the load balancer has an address of its own.
BALANCER = "127.0.0.2"
HAPROXY = """
global
  maxconn 100
defaults
  mode {mode}
  timeout connect 5s
  timeout client 5s
  timeout server 5s
listen in
  bind 127.0.0.1:{port}
  {options}
  server gateway 127.0.0.1:{gateway} source {balancer} {sends}
"""
NGINX_STREAM = """
load_module {module};
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{}}
stream {{
  server {{
    listen 127.0.0.1:{port};
    proxy_bind {balancer};
    proxy_pass 127.0.0.1:{gateway};
    proxy_protocol on;
  }}
}}
"""
NGINX_HTTP = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_bind {balancer};
      proxy_pass http://127.0.0.1:{gateway};
      {fields}
    }}
  }}
}}
"""
STREAM_MODULES = [Path(folder) / "nginx/modules/ngx_stream_module.so" for folder in ("/usr/lib", "/usr/lib64")]


@contextmanager
def started(command: list[str], port: int) -> Iterator[str]:
    """Run a load balancer until the end of the block; return its URL."""
    program = shutil.which(command[0]) or shutil.which(command[0], path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip(f"needs {command[0]}")
    process = subprocess.Popen([program, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: process.poll() is not None or accepts(port), f"{command[0]} starts")
        assert process.poll() is None, process.stdout and process.stdout.read()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def accepts(port: int) -> bool:
    """Return whether something listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def haproxy(folder: Path, gateway: int, *, mode: str = "tcp", sends: str = "", options: str = "") -> Iterator[str]:
    port = free_port()
    path = folder / "haproxy.cfg"
    terms = {"mode": mode, "port": port, "gateway": gateway, "balancer": BALANCER, "sends": sends, "options": options}
    path.write_text(HAPROXY.format(**terms))
    with started(["haproxy", "-db", "-f", str(path)], port) as url:
        yield url


@contextmanager
def nginx(folder: Path, template: str, gateway: int, **terms: str) -> Iterator[str]:
    port = free_port()
    path = folder / "nginx.conf"
    path.write_text(template.format(port=port, gateway=gateway, balancer=BALANCER, folder=folder, **terms))
    with started(["nginx", "-c", str(path), "-p", str(folder)], port) as url:
        yield url


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    found = RawUpstream()
    yield found
    found.close()


@contextmanager
def trusting(upstream: RawUpstream, folder: Path, **server: Any) -> Iterator[RunningGateway]:
    with running_gateway(in_front_of(upstream.url) | {"server": server}, folder) as running:
        yield running


def reported(upstream: RawUpstream, url: str, **headers: str) -> bytes:
    """Return the client's address that the upstream gets, for a request through a load balancer."""
    upstream.requests.clear()
    assert ask(f"{url}/api/x", headers=headers).status == 200
    (values,) = (request.all("x-forwarded-for") for request in upstream.requests)
    (value,) = values
    return value


@pytest.mark.parametrize("sends", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id,crc32c"])
def test_haproxy_names_the_client(upstream: RawUpstream, tmp_path: Path, sends: str) -> None:
    with trusting(upstream, tmp_path, proxy_protocol=[BALANCER]) as running:
        with haproxy(tmp_path, running.port, sends=sends) as url:
            assert reported(upstream, url) == b"127.0.0.1"
        assert ask(f"{running.url}/api/x").status == 200, "other peers send no header"


@pytest.mark.parametrize("sends", ["send-proxy", "send-proxy-v2"])
def test_haproxy_checks_the_health_of_the_gateway(upstream: RawUpstream, tmp_path: Path, sends: str) -> None:
    """Its checks begin with LOCAL or UNKNOWN; traffic flows only if they succeed."""
    options = (
        "option httpchk GET /healthz\n  http-check send hdr Host localhost\n  default-server inter 200ms rise 1 fall 1"
    )
    checked = f"{sends} check check-send-proxy"
    with (
        trusting(upstream, tmp_path, proxy_protocol=[BALANCER]) as running,
        haproxy(tmp_path, running.port, sends=checked, options=options) as url,
    ):
        assert reported(upstream, url) == b"127.0.0.1"
        before = running.server.server_state.total_requests
        eventually(lambda: running.server.server_state.total_requests > before + 3, "checks succeed")
        assert reported(upstream, url) == b"127.0.0.1"


def test_haproxy_without_the_header_is_refused_and_so_is_a_stranger_with_it(
    upstream: RawUpstream, tmp_path: Path
) -> None:
    with (
        trusting(upstream, tmp_path, proxy_protocol=[BALANCER]) as running,
        haproxy(tmp_path, running.port) as url,
    ):
        answer = ask(f"{url}/api/x")
        assert (answer.status, answer.json()["reason"]) == (400, "bad_request")
        assert "must begin with a PROXY protocol header" in answer.json()["detail"]
    with trusting(upstream, tmp_path, proxy_protocol=["192.0.2.1"]) as running:
        for sends in ("send-proxy", "send-proxy-v2"):
            with haproxy(tmp_path, running.port, sends=sends) as url:
                answer = ask(f"{url}/api/x")
                assert (answer.status, answer.json()["reason"]) == (400, "bad_request")
    assert upstream.requests == []


def test_haproxy_of_http_behind_one_of_tcp(upstream: RawUpstream, tmp_path: Path) -> None:
    """The field of the inner proxy is believed because the header of the outer one names that proxy."""
    (tmp_path / "http").mkdir()
    (tmp_path / "tcp").mkdir()
    server = {"proxy_protocol": [BALANCER], "trusted_proxies": [BALANCER]}
    with (
        trusting(upstream, tmp_path, **server) as running,
        haproxy(tmp_path / "tcp", running.port, sends="send-proxy-v2") as inner,
        haproxy(tmp_path / "http", int(inner.rpartition(":")[2]), mode="http", options="option forwardfor") as url,
    ):
        assert reported(upstream, url) == b"127.0.0.1, 127.0.0.2"


def test_nginx_names_the_client_of_a_stream(upstream: RawUpstream, tmp_path: Path) -> None:
    module = next((path for path in STREAM_MODULES if path.exists()), None)
    if module is None:
        pytest.skip("needs the stream module of nginx")
    with (
        trusting(upstream, tmp_path, proxy_protocol=[BALANCER]) as running,
        nginx(tmp_path, NGINX_STREAM, running.port, module=str(module)) as url,
    ):
        assert reported(upstream, url) == b"127.0.0.1"


@pytest.mark.parametrize(
    ("fields", "read", "chain"),
    [
        (
            "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
            "x-forwarded-for",
            b"198.51.100.1, 127.0.0.1, 127.0.0.2",
        ),
        (
            'proxy_set_header Forwarded "$http_forwarded, for=$remote_addr;proto=$scheme";',
            "forwarded",
            b"192.0.2.66, 127.0.0.1, 127.0.0.2",
        ),
    ],
)
def test_nginx_names_the_client_in_a_field(
    upstream: RawUpstream, tmp_path: Path, fields: str, read: str, chain: bytes
) -> None:
    """What the client has forged stays to the left, and is not believed."""
    server = {"trusted_proxies": [BALANCER], "forwarded": {"read": read}}
    with (
        trusting(upstream, tmp_path, **server) as running,
        nginx(tmp_path, NGINX_HTTP, running.port, fields=fields) as url,
    ):
        forged = {"X-Forwarded-For": "198.51.100.1", "Forwarded": "for=192.0.2.66"}
        assert reported(upstream, url, **forged) == chain
