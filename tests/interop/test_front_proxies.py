"""The files of deploy/proxies, run by the proxies: TLS, HTTP/2, clients' addresses, streams, WebSockets, refusals."""

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.processes import free_port
from tests.interop.test_load_balancers import started
from tests.kit import RawRequest, RawUpstream, RunningGateway, Wire, ask, eventually, in_front_of, running_gateway

pytestmark = pytest.mark.interop

DEPLOY = Path(__file__).parents[2] / "deploy" / "proxies"
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg", "caddy": "Caddyfile", "envoy": "envoy.yaml"}
CLIENT = "127.0.0.3"  # the proxies connect from 127.0.0.1
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WEBSOCKET_KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455, section 1.3
UPGRADE = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", WEBSOCKET_KEY)


def behave(wire: Wire, request: RawRequest) -> bool | None:
    """Respond as the path says."""
    path = request.line.split()[1]
    if path.endswith(b"/events"):
        wire.send(EVENTS + b"c\r\ndata: begun\n\r\n")
        wire.read_until(b"never")  # until the gateway closes the connection
        return False
    if path.endswith(b"/socket"):
        wire.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n")
        wire.send(b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x05hello")
        wire.read_until(b"never")
        return False
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    return None


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    found = RawUpstream(behave)
    yield found
    found.close()


def command_of(name: str, folder: Path, port: int, gateway: int) -> list[str]:
    """Write the file of a proxy with these ports and a certificate; return the command that runs it."""
    certificate, key, both = (folder / file for file in ("certificate.pem", "key.pem", "both.pem"))
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        ["openssl", "req", *options, *names, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    file = DEPLOY / FILES[name]
    text = file.read_text()
    changes = {
        "127.0.0.1:8000": f"127.0.0.1:{gateway}",
        "8443": str(port),
        "/etc/nginx/certificate.pem": str(certificate),
        "/etc/nginx/key.pem": str(key),
        "/etc/haproxy/certificate-and-key.pem": str(both),
        "/etc/envoy/certificate.pem": str(certificate),
        "/etc/envoy/key.pem": str(key),
        "port_value: 8000": f"port_value: {gateway}",
        "              - endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 8001}}}\n": "",
        "gateway.example.com {": f"https://localhost:{port} {{\n\ttls {certificate} {key}",
        "  server second 127.0.0.1:8001\n": "",
        "events {}\nhttp {": "events {}\ndaemon off; master_process off; pid %s/pid; error_log stderr;\nhttp {\n"
        "access_log off; client_body_temp_path %s; proxy_temp_path %s; fastcgi_temp_path %s; uwsgi_temp_path %s;"
        " scgi_temp_path %s;" % ((folder,) * 6),
    }
    for old, new in changes.items():
        text = text.replace(old, str(new))
    path = folder / file.name
    path.write_text(text if name != "caddy" else "{\n\tadmin off\n\tauto_https disable_redirects\n}\n" + text)
    return {
        "nginx": ["nginx", "-c", str(path), "-p", str(folder)],
        "haproxy": ["haproxy", "-db", "-f", str(path)],
        "caddy": ["caddy", "run", "--config", str(path), "--adapter", "caddyfile"],
        "envoy": ["envoy", "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"],
    }[name]


@contextmanager
def client(port: int) -> Iterator[Wire]:
    """Connect by TLS."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port), 10, source_address=(CLIENT, 0))
    with context.wrap_socket(plain, server_hostname="localhost") as secure:
        yield Wire(secure)


def send(wire: Wire, port: int, path: str, *headers: str) -> None:
    lines = [f"GET {path} HTTP/1.1", f"Host: localhost:{port}", "X-Client-ID: c", *headers, "", ""]
    wire.send("\r\n".join(lines).encode())


@pytest.mark.parametrize("name", FILES)
def test_the_configuration_of_a_proxy_in_front(name: str, upstream: RawUpstream, tmp_path: Path) -> None:
    port = free_port()
    trust = {"trusted_proxies": ["127.0.0.1"]}
    sections = in_front_of(upstream.url) | {"server": trust, "tiers": {"FREE": {"rate": 0.001, "capacity": 6}}}
    (tmp_path / "front").mkdir()
    with running_gateway(sections, tmp_path) as running:
        command = command_of(name, tmp_path / "front", port, running.port)
        with started(command, port):
            check(port, upstream, running)


def check(port: int, upstream: RawUpstream, running: RunningGateway) -> None:
    """Send requests of each kind through a proxy. The client has six tokens."""

    def status() -> bytes:
        with client(port) as wire:
            send(wire, port, "/healthz", "Connection: close")
            return wire.read_until(b"\r\n") or b""

    eventually(lambda: b" 200" in status(), "the proxy has found the gateway to be ready")
    with client(port) as wire:
        send(wire, port, "/api/x")
        assert b" 200" in (wire.read_until(b"\r\n\r\nok") or b"")
    (request,) = upstream.requests
    assert request.all("x-forwarded-for")[0].split(b",")[0] == CLIENT.encode()
    assert request.all("x-forwarded-proto") == [b"https"]
    assert request.all("host") != [b"gateway"]
    curl = shutil.which("curl")
    assert curl is not None
    wanted = ["-sk", "--http2", "-o", "/dev/null", "-w", "%{http_version} %{http_code}", "-H", "X-Client-ID: c"]
    url = f"https://localhost:{port}"
    found = subprocess.run([curl, *wanted, f"{url}/api/x"], check=True, capture_output=True, text=True)
    assert found.stdout == "2 200"
    for path in ("/metrics", "/clients", "/", "/apix"):
        with client(port) as wire:
            send(wire, port, path)
            assert b" 404" in (wire.read_until(b"\r\n") or b"")
    with client(port) as wire:
        send(wire, port, "/api/events")
        assert wire.read_until(b"data: begun"), "an event passes before the stream ends"
    with client(port) as wire:
        send(wire, port, "/api/socket", *UPGRADE)
        assert b" 101" in (wire.read_until(b"\x81\x05hello") or b"")
    for expected in (b" 200", b" 200", b" 429"):
        with client(port) as wire:
            send(wire, port, "/api/x")
            head = wire.read_until(b"\r\n\r\n") or b""
            assert expected in head.partition(b"\r\n")[0]
    assert b"retry-after: " in head.lower()
    assert b"ratelimit: " in head.lower()
    assert ask(f"{running.url}/healthz").status == 200
