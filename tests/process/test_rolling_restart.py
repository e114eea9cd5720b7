"""Two gateways behind HAProxy are restarted one after the other, and no request is lost."""

import json
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from api_gateway.settings.server import ServerSection
from benchmarks.target import steady_port
from tests.kit import RawClient, RawUpstream, eventually, free_port
from tests.processes import Running, process

CLIENTS = 8
PAUSE = 0.005  # seconds between an answer and a client's next request
CHECKS = 0.1  # seconds between HAProxy's looks at /readyz
DRAINING = {"drain_timeout": 2, "drain_delay": 10 * CHECKS}
KNOWN = {name: value for name, value in DRAINING.items() if name in ServerSection.model_fields}

pytestmark = [
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy on the PATH"),
    pytest.mark.skipif(KNOWN != DRAINING, reason="server.drain_delay does not exist yet"),
]


@contextmanager
def haproxy(folder: Path, gateways: tuple[int, ...], *, keeps: bool) -> Iterator[int]:
    """Run HAProxy before the gateways; it repeats nothing, so that what a gateway drops is seen. Yields its port.

    With `keeps` it keeps connections to the gateways; otherwise each request has one of its own.
    """
    port = free_port()
    servers = "\n".join(f"  server gateway-{number} 127.0.0.1:{there}" for number, there in enumerate(gateways))
    file = folder / "haproxy.cfg"
    file.write_text(f"""
defaults
  mode http
  timeout connect 2s
  timeout client 20s
  timeout server 20s
  timeout check 5s
  retries 0
  {"option http-keep-alive" if keeps else "option http-server-close"}
frontend clients
  bind 127.0.0.1:{port}
  default_backend gateways
backend gateways
  balance roundrobin
  option httpchk GET /readyz
  default-server check inter {CHECKS * 1000:.0f}ms fall 1 rise 1
{servers}
""")
    with subprocess.Popen(["haproxy", "-db", "-q", "-f", str(file)]) as popen:
        try:
            yield port
        finally:
            popen.kill()


class Load:
    """Clients on connections that are kept, each asking again when it has its answer; `seen` counts what they got."""

    def __init__(self, port: int) -> None:
        self.seen: Counter[str] = Counter()
        self._port = port
        self._has_ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self) -> None:
        while not self._has_ended.is_set():
            try:
                with RawClient(self._port) as client:
                    while not self._has_ended.wait(PAUSE):
                        answer = client.get()
                        self.seen[f"{answer.status} {answer.body.decode()}"] += 1
                        if answer.all("connection") == [b"close"]:
                            break
            except (OSError, AssertionError) as problem:
                self.seen[repr(problem)] += 1


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Running]]:
    """Start gateways on given ports, before one upstream."""
    upstream = RawUpstream()
    with ExitStack() as stack:
        stack.callback(upstream.close)
        count = 0

        def run(port: int) -> Running:
            nonlocal count
            count += 1
            folder = tmp_path / f"gateway-{count}"
            folder.mkdir()
            sections = {
                "server": KNOWN,
                "log": {"access": False},
                "upstreams": {"up": {"targets": [{"url": upstream.url}]}},
                "routes": [{"name": "all", "path": "/api", "upstream": "up"}],
                "tiers": {"FREE": {"rate": 100_000, "capacity": 1_000_000}},
            }
            file = folder / "gateway.yaml"
            file.write_text(json.dumps(sections))
            arguments = ("-m", "api_gateway", "--port", str(port), "--config", str(file))
            running = stack.enter_context(process(*arguments, cwd=folder))
            assert running.port == port
            return running

        yield run


def requests_of(running: Running) -> int:
    """Return how many requests a gateway has had."""
    answer = running.ask("/metrics", headers={"Accept": "application/json"})
    found: int = answer.json()["requests"]["total"]
    return found


@pytest.mark.parametrize("keeps", [True, False], ids=["connections kept", "a new connection each"])
def test_a_rolling_restart_loses_no_request(tmp_path: Path, start: Callable[[int], Running], *, keeps: bool) -> None:
    ports = (steady_port(), steady_port())  # nobody else may get one while its gateway is away
    gateways = [start(port) for port in ports]
    with haproxy(tmp_path, ports, keeps=keeps) as port:
        eventually(lambda: answers(port), "HAProxy passes requests on")
        with Load(port) as load:
            for number, there in enumerate(ports):
                eventually(lambda: all(requests_of(one) > 20 for one in gateways), "both are in use")
                assert gateways[number].terminate() == 0
                time.sleep(CHECKS)
                gateways[number] = start(there)
            eventually(lambda: all(requests_of(one) > 20 for one in gateways), "both are in use again")
    assert sum(load.seen.values()) > 100
    assert load.seen.keys() == {"200 ok"}, load.seen


def answers(port: int) -> bool:
    """Return whether a request gets through."""
    try:
        with RawClient(port) as client:
            return client.get().status == 200
    except (OSError, AssertionError):
        return False
