"""What TLS costs beside other proxies: CPU time of a handshake and of a request on a kept connection.

`python -m benchmarks.tls` runs the gateway, and nginx, Envoy and Caddy where they are installed, on one core with one
worker; upstream and load use the other. All run at the same time and are driven in turns, so that ratios hold on a
machine that is not idle. Each has a certificate with an ECDSA key (P-256) and one with an RSA key of 2048 bits, chosen
by name. A handshake is a connection of TLS 1.3 that ends without a request. Needs the extra jwt.
"""

import argparse
import asyncio
import json
import shutil
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from benchmarks.processes import cpu_seconds, free_port, pinned, running

ROOT = Path(__file__).parent.parent
PROXY_CORE, LOAD_CORE = 0, 1
NAMES = {"ECDSA P-256": "ecdsa.test", "RSA 2048": "rsa.test"}
PLAIN = "gateway, plain HTTP"
BODY = b'{"status": "ok"}'
REQUEST = b"GET /api/small HTTP/1.1\r\nHost: %b\r\nX-Client-ID: bench\r\n\r\n"
_TIMEOUT = 10.0
_ENVOY = "type.googleapis.com/envoy.extensions"


@dataclass(frozen=True)
class Site:
    """Where a proxy runs: its folder with the certificates `ecdsa.test.pem` and so on, its port and its upstream's."""

    folder: Path
    certificates: Path
    port: int
    upstream: int

    def write(self, name: str, text: str) -> str:
        """Write a file into the folder and return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def pair(self, name: str) -> tuple[str, str]:
        """Return the files of the certificate and the key for a name."""
        return str(self.certificates / f"{name}.pem"), str(self.certificates / f"{name}.key")


def gateway(site: Site, *, is_tls: bool = True) -> list[str]:
    """Return the command of this gateway."""
    pairs = [dict(zip(("certificate", "key"), site.pair(name), strict=True)) for name in NAMES.values()]
    config = {
        "server": {"port": site.port, "tls": {"certificates": pairs} if is_tls else None},
        "state_dir": str(site.folder / "state"),
        "log": {"access": False},
        "address_limit": {"rate": 0},
        "tiers": {"FREE": {"rate": 1_000_000, "capacity": 1_000_000_000}},
        "upstreams": {"up": {"targets": [{"url": f"http://127.0.0.1:{site.upstream}"}]}},
        "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
    }
    return [sys.executable, str(ROOT / "run_gateway.py"), "--config", site.write("gateway.yaml", json.dumps(config))]


def plain_gateway(site: Site) -> list[str]:
    """Return the command of this gateway without TLS."""
    return gateway(site, is_tls=False)


def nginx(site: Site) -> list[str]:
    """Return the command of nginx."""
    servers = "".join(
        f"""
    server {{
        listen 127.0.0.1:{site.port} ssl; server_name {name};
        ssl_certificate {site.pair(name)[0]}; ssl_certificate_key {site.pair(name)[1]}; ssl_protocols TLSv1.2 TLSv1.3;
        keepalive_requests 1000000000; keepalive_timeout 1h;
        location /api/ {{ proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}"""
        for name in NAMES.values()
    )
    folder = site.folder
    config = f"""
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr crit;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    upstream up {{ server 127.0.0.1:{site.upstream}; keepalive 16; keepalive_requests 1000000000; }}
    {servers}
}}
"""
    return ["nginx", "-p", str(folder), "-c", site.write("nginx.conf", config)]


def envoy(site: Site) -> list[str]:
    """Return the command of Envoy."""
    manager = {
        "@type": f"{_ENVOY}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "codec_type": "HTTP1",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/api/"}, "route": {"cluster": "up", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{_ENVOY}.filters.http.router.v3.Router"}},
        ],
    }

    def chain(name: str) -> dict[str, Any]:
        certificate, key = site.pair(name)
        files = {"certificate_chain": {"filename": certificate}, "private_key": {"filename": key}}
        tls = {
            "@type": f"{_ENVOY}.transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "tls_certificates": [files],
                "alpn_protocols": ["http/1.1"],
                "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
            },
        }
        return {
            "filter_chain_match": {"server_names": [name]},
            "filters": [{"name": "http", "typed_config": manager}],
            "transport_socket": {"name": "tls", "typed_config": tls},
        }

    inspector = {"@type": f"{_ENVOY}.filters.listener.tls_inspector.v3.TlsInspector"}
    endpoint = {"endpoint": {"address": _address(site.upstream)}}
    config = {
        "static_resources": {
            "listeners": [
                {
                    "address": _address(site.port),
                    "listener_filters": [{"name": "inspector", "typed_config": inspector}],
                    "filter_chains": [chain(name) for name in NAMES.values()],
                }
            ],
            "clusters": [
                {
                    "name": "up",
                    "connect_timeout": "5s",
                    "load_assignment": {"cluster_name": "up", "endpoints": [{"lb_endpoints": [endpoint]}]},
                }
            ],
        }
    }
    path = site.write("envoy.json", json.dumps(config))
    return ["envoy", "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "error"]


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def caddy(site: Site) -> list[str]:
    """Return the command of Caddy."""
    sites = "".join(
        f"""
https://{name}:{site.port} {{
    tls {" ".join(site.pair(name))}
    reverse_proxy 127.0.0.1:{site.upstream}
}}"""
        for name in NAMES.values()
    )
    config = f"""{{
    admin off
    auto_https off
    persist_config off
    servers {{
        protocols h1
    }}
}}
{sites}
"""
    return ["caddy", "run", "--adapter", "caddyfile", "--config", site.write("Caddyfile", config)]


PROXIES: dict[str, tuple[Callable[[Site], list[str]], str | None]] = {
    "gateway": (gateway, None),
    PLAIN: (plain_gateway, None),
    "nginx": (nginx, "nginx"),
    "Envoy": (envoy, "envoy"),
    "Caddy": (caddy, "caddy"),
}


def create_certificates(folder: Path) -> Path:
    """Create an authority and a certificate for each name; return the file of the authority."""
    now = datetime.now(UTC)
    own = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "benchmark")])

    def save(name: str, subject: x509.Name, key: Any, *, is_authority: bool) -> None:
        signed = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own.public_key()), critical=False)
            .add_extension(_key_usage(is_authority=is_authority), critical=True)
            .sign(own, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (folder / f"{name}.key").chmod(0o600)

    save("authority", issuer, own, is_authority=True)
    for name, key in (
        ("ecdsa.test", ec.generate_private_key(ec.SECP256R1())),
        ("rsa.test", rsa.generate_private_key(public_exponent=65_537, key_size=2048)),
    ):
        save(name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key, is_authority=False)
    return folder / "authority.pem"


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


class _Origin(asyncio.Protocol):
    """Responds to every request head with the same response."""

    transport: asyncio.Transport
    received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            _, _, self.received = self.received.partition(b"\r\n\r\n")
            self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY))


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Origin, "127.0.0.1", port)
    await server.serve_forever()


# The load


def connect(port: int, name: str, context: ssl.SSLContext | None, session: ssl.SSLSession | None = None) -> Any:
    """Return a connection, after its handshake if there is a context."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plain if context is None else context.wrap_socket(plain, server_hostname=name, session=session)


def exchange(connection: Any, name: str) -> None:
    """Send a request and read its response. Raises RuntimeError."""
    connection.sendall(REQUEST % name.encode())
    received = b""
    while not received.endswith(BODY):
        piece = connection.recv(65_536)
        if not piece:
            raise RuntimeError(f"the response was cut off: {received[:200]!r}")
        received += piece
    if not received.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"an unexpected response: {received[:200]!r}")


@contextmanager
def handshakes(port: int, name: str, context: ssl.SSLContext, *, is_resumed: bool) -> Iterator[Callable[[], None]]:
    """Yield what makes one connection; a resumed one uses the session of a first one. Raises RuntimeError."""
    session = None
    if is_resumed:
        with connect(port, name, context) as first:
            exchange(first, name)  # the tickets come with the response
            session = first.session

    def once() -> None:
        with connect(port, name, context, session) as connection:
            if connection.session_reused is not is_resumed:
                raise RuntimeError(f"the session was {'not ' if is_resumed else ''}resumed")

    yield once


@contextmanager
def requests(port: int, name: str, context: ssl.SSLContext | None) -> Iterator[Callable[[], None]]:
    """Yield what sends one request on a connection that stays open."""
    with connect(port, name, context) as connection:
        yield lambda: exchange(connection, name)


def cost(pid: int, once: Callable[[], None], seconds: float) -> float:
    """Return the CPU time of a process for each call, in microseconds, over so many seconds."""
    for _ in range(20):
        once()
    before, count, end = cpu_seconds(pid), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            once()
        count += 20
    return (cpu_seconds(pid) - before) / count * 1_000_000


def measure(seconds: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the costs by case and proxy, in each round. Raises RuntimeError."""
    costs: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        context = ssl.create_default_context(cafile=create_certificates(folder))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        upstream = free_port()
        command = [sys.executable, "-m", "benchmarks.tls", "--upstream", str(upstream)]
        (folder / "origin").mkdir()
        env = {"PYTHONPATH": str(ROOT)}
        stack.enter_context(running(command, core=LOAD_CORE, port=upstream, folder=folder / "origin", env=env))
        ports: dict[str, tuple[int, int]] = {}
        for title, (launch, program) in PROXIES.items():
            if program is not None and shutil.which(program) is None:
                sys.stderr.write(f"{title} is not installed and left out.\n")
                continue
            own = folder / title.replace(" ", "-").replace(",", "")
            own.mkdir()
            site = Site(own, folder, free_port(), upstream)
            pid = stack.enter_context(running(launch(site), core=PROXY_CORE, port=site.port, folder=own))
            ports[title] = pid, site.port
        stack.enter_context(pinned(LOAD_CORE))
        for _ in range(rounds):
            for title, (pid, port) in ports.items():
                for case, once in _cases(port, context, is_plain=title == PLAIN):
                    with once as call:
                        found = cost(pid, call, seconds)
                    costs.setdefault(case, {}).setdefault(title, []).append(found)
    return costs


def _cases(port: int, context: ssl.SSLContext, *, is_plain: bool) -> Iterator[tuple[str, Any]]:
    """Yield the cases: a title, and the block that yields what is measured."""
    name = NAMES["ECDSA P-256"]
    if is_plain:
        yield "request on a kept connection", requests(port, name, None)
        return
    for kind, host in NAMES.items():
        yield f"new session, {kind}", handshakes(port, host, context, is_resumed=False)
        yield f"resumed session, {kind}", handshakes(port, host, context, is_resumed=True)
    yield "request on a kept connection", requests(port, name, context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the medians of the rounds, and the ratios to this gateway."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tls", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.upstream is not None:
        asyncio.run(_serve(options.upstream))
        return 0
    costs = measure(options.seconds, options.rounds)
    titles = list(dict.fromkeys(title for found in costs.values() for title in found))
    lines = [
        f"CPU time of the proxy in microseconds, median of {options.rounds} rounds of {options.seconds:g} s\n",
        f"| case | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(titles)}",
    ]
    for case, found in costs.items():
        cells = [f"{statistics.median(found[title]):.0f}" if title in found else "" for title in titles]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
