"""Who is local: programs that the operator runs on this machine, and nothing that comes through a proxy there.

Every proxy says nothing of whom it forwards, most by their stock configuration, Caddy as it is configured here. Each
must be seen to forward: the data plane and `/health` answer through it.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit import PATIENCE, Answer, RawUpstream, ask, eventually, free_port
from tests.processes import START, Running, children, config_file, process

linux = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="processes are looked up in /proc")
curl_only = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
pytestmark = [linux, pytest.mark.timeout(180)]

FORWARDER = """
import socket, sys, threading
def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    client = listener.accept()[0]
    if "once" in sys.argv:
        listener.close()
    server = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    threading.Thread(target=copy, args=(client, server), daemon=True).start()
    thread = threading.Thread(target=copy, args=(server, client), daemon=True)
    thread.start()
    if "once" in sys.argv:
        thread.join()
        break
"""
NGINX = """
{user}
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{gateway}; }} }}
}}
"""
HAPROXY = """
global
  {mode}
defaults
  mode http
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend in
  bind 127.0.0.1:{port}
  default_backend out
backend out
  server gateway 127.0.0.1:{gateway}
"""
CADDY = """
{{
  admin off
  auto_https off
}}
:{port} {{
  bind 127.0.0.1
  reverse_proxy 127.0.0.1:{gateway} {{
    header_up -X-Forwarded-For
    header_up -X-Forwarded-Proto
    header_up -X-Forwarded-Host
    header_up Host localhost
  }}
}}
"""


def nginx(port: int, gateway: int, folder: Path, user: str = "") -> list[str]:
    (folder / "nginx.conf").write_text(NGINX.format(port=port, gateway=gateway, folder=folder, user=user))
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]


def nginx_as_us(port: int, gateway: int, folder: Path) -> list[str]:
    """Without being root nginx has no choice, and only warns of the directive."""
    return nginx(port, gateway, folder, "user root;" if os.geteuid() == 0 else "")


def haproxy(port: int, gateway: int, folder: Path, mode: str = "") -> list[str]:
    (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port, gateway=gateway, mode=mode))
    return ["haproxy", "-f", str(folder / "haproxy.cfg")]


def haproxy_with_master(port: int, gateway: int, folder: Path) -> list[str]:
    return haproxy(port, gateway, folder, "master-worker")


def caddy(port: int, gateway: int, folder: Path) -> list[str]:
    (folder / "Caddyfile").write_text(CADDY.format(port=port, gateway=gateway))
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(folder / "Caddyfile")]


def socat(port: int, gateway: int, _folder: Path) -> list[str]:
    return ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork", f"TCP:127.0.0.1:{gateway}"]


def forwarder(port: int, gateway: int, _folder: Path) -> list[str]:
    return [sys.executable, "-c", FORWARDER, str(port), str(gateway)]


def socat_once(port: int, gateway: int, _folder: Path) -> list[str]:
    """For one connection: it has closed its listener by the time it dials."""
    return ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr", f"TCP:127.0.0.1:{gateway}"]


def forwarder_once(port: int, gateway: int, folder: Path) -> list[str]:
    return [*forwarder(port, gateway, folder), "once"]


REFUSED = (401, 429)  # an address that was refused often is limited; who is local is neither refused nor limited
Command = Callable[[int, int, Path], list[str]]
PROXIES: list[Command] = [nginx, nginx_as_us, haproxy, haproxy_with_master, caddy, socat, forwarder]
ONCE: list[Command] = [socat_once, forwarder_once]


# A shell between this process, which listens, and the proxy: its parent must not be what gives it away.
PARENT = '"$@" & child=$!; trap "kill $child" TERM; wait $child; wait $child'


@contextmanager
def proxy(command: Command, gateway: int, folder: Path) -> Iterator[tuple[int, int]]:
    """Run a proxy in front of a gateway; yield its port and process id, and stop it by that."""
    port = free_port()
    arguments = command(port, gateway, folder)
    if shutil.which(arguments[0], path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip(f"there is no {arguments[0]}")
    environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin", "HOME": str(folder)}
    with (folder / "proxy.txt").open("wb") as output:
        popen = subprocess.Popen(
            ["sh", "-c", PARENT, "sh", *arguments], stdout=output, stderr=output, env=environment, cwd=folder
        )
    try:
        eventually(lambda: is_listening(port) or popen.poll() is not None, "the proxy listens")
        assert popen.poll() is None, (folder / "proxy.txt").read_text()
        (child,) = children(popen.pid)
        yield port, child
    finally:
        popen.terminate()
        try:
            popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def is_listening(port: int) -> bool:
    """Tell without connecting, which would use up a proxy for one connection."""
    mark = f"0100007F:{port:04X} 00000000:0000 0A"
    return mark in Path("/proc/self/net/tcp").read_text()


@contextmanager
def running(folder: Path, *arguments: str, extra: str = "", url: str = "http://127.0.0.1:9") -> Iterator[Running]:
    file = config_file(folder, url, extra)
    with process("-m", "api_gateway", "--port", "0", "--config", file, *arguments, cwd=folder) as one:
        assert one.port
        yield one


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    upstream = RawUpstream()
    with running(tmp_path_factory.mktemp("gateway"), url=upstream.url) as one:
        yield one
    upstream.close()


def curl(*arguments: str, shell: str = "sh") -> Answer:
    """Run curl from a shell, as an operator does: the shell does not replace itself by the last command."""
    command = [shell, "-c", 'curl -s -i -m 10 --noproxy "*" "$@"; true', shell, *arguments]
    ran = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE * 2)
    head, _, body = ran.stdout.partition(b"\r\n\r\n")
    return Answer(int(head.split(b" ")[1]), head, body)


TIER = ("-X", "POST", "-H", "Content-Type: application/json", "-d", '{"tier": "PREMIUM"}')


# The operator's own shell


@curl_only
@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_commands_of_an_operator_in_a_shell_need_no_token(gateway: Running, host: str, shell: str) -> None:
    url = f"http://{host}:{gateway.port}"
    for path in ("/metrics", "/metrics/latency", "/circuit-breakers", "/clients/x"):
        assert curl(f"{url}{path}", shell=shell).status == 200
    assert curl(*TIER, f"{url}/clients/client-123/tier", shell=shell).status == 200
    assert b'"upstreams"' in curl(f"{url}/health", shell=shell).body


@curl_only
def test_a_pipeline_and_two_requests_on_one_connection_are_local(gateway: Running) -> None:
    url = f"http://127.0.0.1:{gateway.port}/metrics"
    command = f"curl -s -o /dev/null -w '%{{http_code}} %{{num_connects}}\\n' {url} {url} | cat"
    ran = subprocess.run(["sh", "-c", command], capture_output=True, check=True, text=True)
    assert "200" in ran.stdout
    assert "401" not in ran.stdout


@curl_only
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_one_socket_for_both_kinds_of_addresses_has_local_clients_of_both(tmp_path: Path, workers: str) -> None:
    """The gateway's end is then an IPv6 socket, and the client's an IPv4 one."""
    with running(tmp_path, "--host", "::", "--workers", workers) as one:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            assert curl(f"http://{host}:{one.port}/metrics").status == 200


@curl_only
def test_another_server_has_local_clients_too(tmp_path: Path) -> None:
    port = free_port()
    arguments = ["-m", "uvicorn", "api_gateway.main:app", "--host", "127.0.0.1", "--port", str(port)]
    with process(*arguments, cwd=tmp_path) as one:
        eventually(lambda: is_listening(port) or one.popen.poll() is not None, "it listens", START)
        assert curl(f"http://127.0.0.1:{port}/metrics").status == 200
        with proxy(forwarder, port, tmp_path) as (through, _):
            assert ask(f"http://127.0.0.1:{through}/api/users").status == 200
            assert ask(f"http://127.0.0.1:{through}/metrics").status == 401


def test_a_program_that_serves_others_itself_is_not_local(gateway: Running) -> None:
    """Such as this one, whose upstream listens here: it may be passing on somebody else's request."""
    listener = socket.create_server(("127.0.0.1", 0))
    assert ask(f"{gateway.url}/metrics").status in REFUSED
    listener.close()


@curl_only
@pytest.mark.parametrize(
    "field", ["Host: gateway.example", "X-Forwarded-For: 127.0.0.1", "Via: 1.1 proxy", "Forwarded: for=127.0.0.1"]
)
def test_a_request_for_another_host_or_of_a_proxy_is_not_local(gateway: Running, field: str) -> None:
    assert curl("-H", field, f"{gateway.url}/metrics").status in REFUSED


@curl_only
def test_admin_local_false_admits_only_tokens(tmp_path: Path) -> None:
    with running(tmp_path, extra=f"admin: {{local: false}}\nstate_dir: {tmp_path}/state\n") as one:
        assert curl(f"{one.url}/metrics").status == 401
        token = (tmp_path / "state/state/operator-token").read_text().strip()
        assert curl("-H", f"Authorization: Bearer {token}", f"{one.url}/metrics").status == 200


@curl_only
def test_a_peer_that_is_a_trusted_proxy_is_not_local(tmp_path: Path) -> None:
    with running(tmp_path, extra="server: {trusted_proxies: [127.0.0.0/8]}\n") as one:
        assert curl(f"{one.url}/metrics").status == 401


@curl_only
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_of_the_machine_is_not_local(gateway: Running) -> None:
    command = f"curl -s -o /dev/null -w '%{{http_code}}' {gateway.url}/metrics; true"
    ran = subprocess.run(
        ["sh", "-c", command], capture_output=True, check=True, text=True, user=65_534, group=65_534, extra_groups=[]
    )
    assert int(ran.stdout) in REFUSED


# Through a proxy


def outside(port: int, path: str, **options: Any) -> Answer:
    """Make a request as a stranger's browser does, which the proxy passes on."""
    return ask(f"http://127.0.0.1:{port}{path}", **options)


@pytest.mark.parametrize("command", PROXIES)
def test_no_operator_endpoint_responds_through_a_proxy(gateway: Running, tmp_path: Path, command: Command) -> None:
    body, json_type = json.dumps({"tier": "ENTERPRISE"}).encode(), {"Content-Type": "application/json"}
    with proxy(command, gateway.port, tmp_path) as (port, _):
        assert outside(port, "/api/up/x").status == 200, "it is no proxy"
        for path in ("/metrics", "/circuit-breakers", "/clients", "/clients/x", "/dashboard/events", "/openapi.json"):
            assert outside(port, path).status in REFUSED, path
            assert outside(port, path, headers={"Host": f"localhost:{gateway.port}"}).status in REFUSED, path
        posted = outside(port, "/clients/x/tier", method="POST", headers=json_type, body=body)
        assert posted.status in REFUSED
        assert set(outside(port, "/health").json()) == {"status"}


@pytest.mark.parametrize("command", ONCE)
def test_a_forwarder_that_has_closed_its_listener_is_a_proxy_still(
    gateway: Running, tmp_path: Path, command: Command
) -> None:
    with proxy(command, gateway.port, tmp_path) as (port, _):
        assert outside(port, "/metrics", headers={"Connection": "close"}).status in REFUSED


def test_a_proxy_that_drains_after_a_reload_is_a_proxy_still(gateway: Running, tmp_path: Path) -> None:
    """HAProxy's old process has closed its listeners, and dials when the rest of a request comes."""
    with (
        proxy(haproxy, gateway.port, tmp_path) as (port, child),
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        client.settimeout(PATIENCE)
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        eventually(lambda: established(port) >= 2, "the proxy has accepted")
        os.kill(child, signal.SIGUSR1)
        eventually(lambda: not is_listening(port), "it listens no more")
        client.sendall(b"Host: localhost\r\n\r\n")
        assert int(client.recv(65_536).split(b" ")[1]) in REFUSED


@pytest.mark.skipif(shutil.which("socat") is None, reason="no socat")
@pytest.mark.parametrize("how", ["UNIX-LISTEN:{},fork", "UNIX-LISTEN:{}", "ABSTRACT-LISTEN:{},fork"])
def test_a_proxy_that_another_one_reaches_on_a_unix_socket_is_no_local_client(
    gateway: Running, tmp_path: Path, how: str
) -> None:
    """It has no TCP listener and has accepted nothing by TCP."""
    path = str(tmp_path / "s")
    arguments = ["socat", how.format(path), f"TCP:127.0.0.1:{gateway.port}"]
    popen = subprocess.Popen(["sh", "-c", PARENT, "sh", *arguments])
    try:
        eventually(lambda: path.encode() in Path("/proc/net/unix").read_bytes(), "it listens")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(f"\0{path}" if how.startswith("ABSTRACT") else path)
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert int(client.recv(65_536).split(b" ")[1]) in REFUSED
    finally:
        popen.terminate()
        popen.wait(PATIENCE)


def established(port: int) -> int:
    """Return how many sockets are ends of an established connection to this port, with a process on it."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(f":{port:04X}" in (row[1][8:], row[2][8:]) and row[3] == "01" and row[9] != "0" for row in rows)


@pytest.mark.skipif(shutil.which("socat") is None or shutil.which("curl") is None, reason="no socat or no curl")
def test_a_client_that_a_forwarder_starts_is_not_local(gateway: Running, tmp_path: Path) -> None:
    """Its parent has accepted the connection whose request it makes."""
    url = f"http://127.0.0.1:{gateway.port}/metrics"

    def command(port: int, _gateway: int, _folder: Path) -> list[str]:
        run = f"curl -s -o /dev/null -w '%{{http_code}}' {url}"
        return ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork", f'EXEC:"{run}"']

    with proxy(command, gateway.port, tmp_path) as (port, _), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(PATIENCE)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while len(answer) < 3 and (data := client.recv(16)):
                answer += data
        assert int(answer) in REFUSED


@curl_only
def test_an_operator_is_served_while_others_come_through_a_proxy(gateway: Running, tmp_path: Path) -> None:
    """Look-ups are bounded: at worst the operator waits, or needs the token, and clients notice nothing."""
    stop = threading.Event()

    def flood(port: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                assert outside(port, "/metrics").status in REFUSED

    with proxy(forwarder, gateway.port, tmp_path) as (port, _), ExitStack() as stack:
        threads = [threading.Thread(target=flood, args=(port,)) for _ in range(8)]
        for thread in threads:
            stack.callback(thread.join, PATIENCE)
            thread.start()
        stack.callback(stop.set)
        statuses = [curl(f"{gateway.url}/metrics").status for _ in range(3)]
        assert set(statuses) <= {200, *REFUSED}
        assert ask(f"{gateway.url}/api/up/x").status == 200
    assert curl(f"{gateway.url}/metrics").status == 200
