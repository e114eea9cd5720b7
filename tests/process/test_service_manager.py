"""What the gateway tells a service manager such as systemd, and the sockets that it accepts from one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.process.listeners import Listeners
from api_gateway.system.service_manager import ServiceManager
from benchmarks.processes import free_port
from tests.kit import PATIENCE, RawUpstream, ask, eventually
from tests.processes import START, Running, config_file, hooked, process

WORKERS = [1, 2]
# Runs the gateway as a service manager does: with the descriptors from 3 on, and a variable with its process id.
ACTIVATE = """
import fcntl, os, sys
passed = [int(number) for number in sys.argv[1].split(",")]
kept = [fcntl.fcntl(number, fcntl.F_DUPFD, 100) for number in passed]
for place, number in enumerate(kept, 3):
    os.dup2(number, place)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": sys.argv[2]}
os.execv(sys.executable, [sys.executable, "-m", "api_gateway", *sys.argv[3:]])
"""


# Does the same in a fork of a process that has imported the gateway; the sockets come on another one.
ACTIVATE_FORK = """
import os, socket
from api_gateway.system import service_manager

service_manager._FIRST_DESCRIPTOR = 200  # beyond those of the fork
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect({address!r})
    _, passed, *_ = socket.recv_fds(sock, 1, 16)
for place, number in enumerate(passed, 200):
    os.dup2(number, place)
    os.close(number)
os.environ |= {{"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": {names!r}}}
"""


class Notifications:
    """The socket of a service manager; `messages` are the fields of each message so far."""

    def __init__(self, address: str) -> None:
        self.messages: list[dict[str, str]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._sock.setblocking(False)

    def states(self) -> list[str]:
        """Return the first field of each message, such as READY."""
        while True:
            try:
                text = self._sock.recv(65_536).decode()
            except BlockingIOError:
                return [next(iter(message)) for message in self.messages]
            self.messages.append(dict(line.split("=", 1) for line in text.split("\n")))

    def expect(self, *states: str) -> None:
        """Wait for these states, and no others, since the start."""
        eventually(lambda: len(self.states()) >= len(states), f"{states}, got {self.states()}", START)
        assert self.states() == list(states)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


@pytest.mark.parametrize(("workers", "kind"), [(1, "path"), (2, "abstract")])
def test_the_states_of_the_gateway_are_told(up: RawUpstream, tmp_path: Path, workers: int, kind: str) -> None:
    address = str(tmp_path / "notify") if kind == "path" else f"@{os.getpid()}-{tmp_path.name}"[:100]
    received = Notifications(address)
    file = config_file(tmp_path, up.url, f"server: {{workers: {workers}, port: 0, drain_timeout: 7}}")
    with process("-m", "api_gateway", "--config", file, cwd=tmp_path, NOTIFY_SOCKET=address) as running:
        received.expect("READY")
        assert received.messages[0] == {"READY": "1", "STATUS": "serving"}
        running.signal(signal.SIGHUP)
        received.expect("READY", "RELOADING", "READY")
        assert int(received.messages[1]["MONOTONIC_USEC"]) > 0
        Path(file).write_text("upstreams: 5")
        running.signal(signal.SIGHUP)  # what cannot be read is not applied, and the reload ends too
        received.expect("READY", "RELOADING", "READY", "RELOADING", "READY")
        assert ask(f"{running.url}/api/up").status == 200
        assert running.terminate() == 0
        received.expect("READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING")
        assert 7e6 < int(received.messages[-1]["EXTEND_TIMEOUT_USEC"]) < 20e6
    received.close()


def test_a_service_manager_that_is_gone_does_not_matter(up: RawUpstream, tmp_path: Path) -> None:
    file = config_file(tmp_path, up.url, "server: {port: 0}")
    gone = str(tmp_path / "gone")
    with process("-m", "api_gateway", "--config", file, cwd=tmp_path, NOTIFY_SOCKET=gone) as running:
        assert ask(f"{running.url}/api/up").status == 200
        eventually(lambda: f"the service manager at {gone} could not be told READY=1" in running.errors, "a warning")
        assert running.terminate() == 0


def listening(path: Path | None = None) -> socket.socket:
    """Return a socket as a service manager opens it."""
    sock = socket.socket(socket.AF_INET if path is None else socket.AF_UNIX)
    sock.bind(("127.0.0.1", 0) if path is None else str(path))
    sock.listen(100)
    return sock


@contextmanager
def activated(tmp_path: Path, file: str, **sockets: socket.socket) -> Iterator[Running]:
    """Run the gateway with passed sockets."""
    numbers = [sock.fileno() for sock in sockets.values()]
    out, err = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        popen = subprocess.Popen(
            [
                *(sys.executable, "-c", ACTIVATE, ",".join(map(str, numbers)), ":".join(sockets)),
                *("--config", file),
            ],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "XDG_STATE_HOME": str(tmp_path / "xdg")},
            stdout=stdout,
            stderr=stderr,
            pass_fds=numbers,
        )
    try:
        yield Running(popen, out, err)
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()


@contextmanager
def activated_fork(tmp_path: Path, file: str, **sockets: socket.socket) -> Iterator[Running]:
    """Run the gateway with passed sockets, in a fork."""
    address = f"\0{os.getpid()}-{tmp_path.name}"[:100]
    hook = hooked(tmp_path, ACTIVATE_FORK.format(address=address, names=":".join(sockets)))
    with socket.socket(socket.AF_UNIX) as passing:
        passing.bind(address)
        passing.listen()
        passing.settimeout(START)
        with process("-m", "api_gateway", "--config", file, cwd=tmp_path, **hook) as running:
            with passing.accept()[0] as peer:
                socket.send_fds(peer, [b"."], [sock.fileno() for sock in sockets.values()])
            yield running


@pytest.mark.parametrize("workers", WORKERS)
def test_no_connection_is_lost_while_the_gateway_restarts_on_passed_sockets(
    up: RawUpstream, tmp_path: Path, workers: int
) -> None:
    # The configured port is not opened: it is another's.
    taken = listening()
    file = config_file(tmp_path, up.url, f"server: {{workers: {workers}, port: {taken.getsockname()[1]}}}")
    sock = listening()
    host, port = sock.getsockname()
    request = b"GET /api/up HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    for _ in range(2):
        with socket.create_connection((host, port), PATIENCE) as client:
            client.sendall(request)  # before the gateway runs
            client.settimeout(START)
            with (activated if workers == 1 else activated_fork)(tmp_path, file, public=sock) as running:
                assert client.recv(15) == b"HTTP/1.1 200 OK"
                assert running.url == f"http://127.0.0.1:{port}"
                assert running.terminate() == 0
    sock.close()
    taken.close()


def test_a_passed_socket_may_be_that_of_operators(up: RawUpstream, tmp_path: Path) -> None:
    file = config_file(tmp_path, up.url, "admin: {listen: '127.0.0.1:1'}")
    public, admin = listening(), listening()
    with activated_fork(tmp_path, file, web=public, admin=admin) as running:
        eventually(lambda: "Operator endpoints on" in running.output, "it listens", START)
        assert f"127.0.0.1:{admin.getsockname()[1]}" in running.output
        assert ask(f"http://127.0.0.1:{public.getsockname()[1]}/api/up").status == 200
        assert ask(f"http://127.0.0.1:{public.getsockname()[1]}/metrics").status == 404
        assert ask(f"http://127.0.0.1:{admin.getsockname()[1]}/healthz").status == 200
        assert ask(f"http://127.0.0.1:{admin.getsockname()[1]}/api/up").status == 404
    public.close()
    admin.close()


@pytest.mark.parametrize(
    ("names", "admin", "message"),
    [
        (["admin"], "127.0.0.1:1", "passed only sockets named 'admin', and none for clients"),
        (["web", "admin"], None, "admin.listen: is not set, and the service manager passed 1 sockets named admin"),
        (["web"], "127.0.0.1:1", "admin.listen: is 127.0.0.1:1, and the service manager passed 0 sockets named admin"),
    ],
)
def test_sockets_that_do_not_suit_the_configuration_are_refused(
    names: list[str], admin: str | None, message: str
) -> None:
    config = GatewayConfig.model_validate({"admin": {"listen": admin}})
    sockets = [(name, listening()) for name in names]
    with pytest.raises(StartupError, match=re.escape(message)):
        Listeners.of(config, 2, sockets)
    for _, sock in sockets:
        sock.close()


# The variables


def test_the_variables_are_removed_and_those_of_another_process_ignored() -> None:
    theirs = {"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "NOTIFY_SOCKET": "@x", "HOME": "/"}
    found = ServiceManager.of(theirs)
    assert (found.passed, theirs, repr(found)) == ([], {"HOME": "/"}, "<ServiceManager @x [0 sockets]>")
    assert ServiceManager.of({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}).passed == []
    assert ServiceManager.of({}).passed == []


@pytest.mark.parametrize("kind", ["a file", "a datagram socket", "a socket that does not listen"])
def test_what_is_no_listening_socket_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if kind == "a file":
        number = os.open(tmp_path, os.O_RDONLY)
    else:
        type_ = socket.SOCK_DGRAM if kind == "a datagram socket" else socket.SOCK_STREAM
        number = socket.socket(socket.AF_INET, type_).detach()
    monkeypatch.setattr("api_gateway.system.service_manager._FIRST_DESCRIPTOR", number)
    variables = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
    with pytest.raises(StartupError, match=f"passed descriptor {number}, 'web', which is no "):
        ServiceManager.of(variables)
    if kind == "a file":
        os.close(number)


# The real one


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="needs systemd-socket-activate")
def test_systemd_passes_its_socket(up: RawUpstream, tmp_path: Path) -> None:
    port = free_port()
    file = config_file(tmp_path, up.url)
    command = ["systemd-socket-activate", "--listen", f"127.0.0.1:{port}", "--fdname", "web"]
    variables = [f"--setenv=XDG_STATE_HOME={tmp_path / 'xdg'}", "--setenv=PATH=/usr/bin:/bin"]
    popen = subprocess.Popen(
        [*command, *variables, sys.executable, "-m", "api_gateway", "--config", file],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def accepts() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        eventually(accepts, "systemd listens")
        assert ask(f"http://127.0.0.1:{port}/api/up").status == 200
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(START) == 0
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()
