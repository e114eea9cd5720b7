"""The detector of callbacks that hold the event loop: it finds them, and a busy machine does not trouble it."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api_gateway.eventloop.lag_sampler import LagSampler
from tests.kit import RawUpstream, RunningGateway, ask, eventually, in_front_of
from tests.loop_watch import LoopWatch, Watched, cpu_limit
from tests.processes import REPORTS, config_file, process, reports_of_processes

Start = Callable[[dict[str, Any]], RunningGateway]


def sleep() -> None:
    time.sleep(0.2)


def spin(seconds: float | None = None) -> None:
    """Use this much of the thread's CPU time; without an argument, more than is allowed."""
    end = time.thread_time() + (4 * cpu_limit() if seconds is None else seconds)
    while time.thread_time() < end:
        pass


def compute() -> None:
    """Use CPU time in one call that does not return to the interpreter."""
    end = time.thread_time() + 4 * cpu_limit()
    while time.thread_time() < end:
        sum(range(5_000_000))


def wait_for_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=0.2)


@pytest.mark.parametrize("hold", [sleep, spin, compute, wait_for_lock])
def test_a_callback_that_holds_the_loop_is_named(
    hold: Callable[[], None],
    gateway: Start,
    upstream: Callable[..., RawUpstream],
    loop_reports: list[str],
) -> None:
    """The callback is of a module that is not compiled: the stack of a thread shows no others."""
    running = gateway(in_front_of(upstream().url))
    loop = running.server.servers[0].get_loop()
    sampler = LagSampler(loop, lambda _lag: hold())
    loop.call_soon_threadsafe(sampler.start)  # it calls until it is stopped: samples may come late
    eventually(lambda: bool(loop_reports), "it is reported")
    loop.call_soon_threadsafe(sampler.stop)
    running.stop()
    found = loop_reports[:]
    loop_reports.clear()  # they do not fail this test
    assert all(hold.__name__ in report for report in found), found


@dataclass(eq=False)
class Sampled(Watched):
    """A thread whose CPU time and voluntary context switches are given."""

    used: float = 0.0
    counted: int = 0

    def now(self) -> float:
        return self.used

    def state(self) -> tuple[str, int]:
        return "R", self.counted


@pytest.mark.parametrize(("switches_per_second", "is_reported"), [(10, True), (150, False)])
async def test_many_calls_between_two_samples_are_not_one(switches_per_second: int, *, is_reported: bool) -> None:
    """The watch waits for the interpreter lock, which the thread gives to others meanwhile, or does not give."""
    reports: list[str] = []
    watch, watched, frame = LoopWatch(reports.append), Sampled(asyncio.get_running_loop()), sys._getframe()
    watch._sample(watched, None, 0.0, 0.0)
    watched.used = 2 * watched.cpu_limit
    watched.counted = int(watched.used * switches_per_second)
    watch._sample(watched, frame, watched.used, watched.used)
    assert bool(reports) is is_reported


def test_a_gateway_in_a_process_of_its_own_is_watched_too(
    tmp_path: Path, upstream: Callable[..., RawUpstream]
) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time\n"
        "from api_gateway import cli\n"
        "from api_gateway.eventloop.lag_sampler import LagSampler\n"
        "begin = LagSampler.__init__\n"
        "def slowed(self, loop, on_lag):\n"
        "    begin(self, loop, lambda lag: (time.sleep(0.2), on_lag(lag)))\n"
        "LagSampler.__init__ = slowed\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    config = config_file(tmp_path, upstream().url)
    with process(str(program), "--config", config, "--port", "0", cwd=tmp_path) as running:
        eventually(lambda: any(REPORTS.iterdir()), "it is reported")
        assert running.terminate() == 0
    found = reports_of_processes()
    assert found
    assert all("asleep" in report for report in found), found


FIRST_REQUESTS: dict[str, dict[str, Any]] = {
    "/metrics": {},
    "/clients/x/tier": {"method": "POST", "body": b'{"tier": "premium"}'},
    "/circuit-breakers": {},
    "/clients/x": {},
    "/explain": {"method": "POST", "body": b'{"client_id": "x", "path": "/api/up"}'},
    "/health": {},
    "/openapi.json": {},
    "/docs": {},
}


def test_first_requests_to_operator_endpoints_neither_hold_the_loop_nor_set_up_the_framework(tmp_path: Path) -> None:
    """What is set up while it serves is noted: modules that are loaded, and models of parameters that are built."""
    program = tmp_path / "noting.py"
    program.write_text(
        "import sys, threading\n"
        "import pydantic\n"
        "from api_gateway import cli\n"
        "from api_gateway.process import server\n"
        "def note(what):\n"
        "    if serves and threading.current_thread() is threading.main_thread():\n"
        "        sys.stderr.write(f'late: {what}\\n')\n"
        "serves = []\n"
        "announce = server.GatewayServer.announce\n"
        "server.GatewayServer.announce = lambda self: (announce(self), serves.append(True))\n"
        "build = pydantic.TypeAdapter.__init__\n"
        "def noted(self, *given, **options):\n"
        "    note(given)\n"
        "    build(self, *given, **options)\n"
        "pydantic.TypeAdapter.__init__ = noted\n"
        "sys.addaudithook(lambda event, given: event == 'import' and note(given[0]))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    config = config_file(tmp_path, "http://127.0.0.1:9")
    with process(str(program), "--config", config, "--port", "0", cwd=tmp_path) as running:
        for path, request in FIRST_REQUESTS.items():
            headers = {"Content-Type": "application/json"} if "body" in request else {}
            assert running.ask(path, headers=headers, **request).status == 200, path
        assert running.terminate() == 0
    assert reports_of_processes() == []
    assert "late: " not in running.errors


def test_many_short_callbacks_and_a_busy_machine_are_no_finding(
    gateway: Start, upstream: Callable[..., RawUpstream], loop_reports: list[str]
) -> None:
    """More processes than processors, and a thread that wants the interpreter's lock all the time."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    is_over = threading.Event()

    def contend() -> None:
        while not is_over.is_set():
            spin(0.01)

    contender = threading.Thread(target=contend)
    contender.start()
    try:
        running = gateway(in_front_of(upstream().url))
        for _ in range(30):
            assert ask(f"{running.url}/api/x").status == 200
    finally:
        is_over.set()
        contender.join()
        for one in spinning:
            one.kill()
            one.wait()
    assert loop_reports == []
