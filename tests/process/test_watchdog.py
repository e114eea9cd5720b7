"""A process whose event loop hangs is ended, and says where it hung; one that was only stopped for a while is not.

A signal handler blocks the loop, as it runs in the loop's thread; a hook puts it into every process. It gives the
report more time than it has otherwise, as a busy machine may take long to write it. What must pass before is shorter.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

from api_gateway.errors import BLOCKED, DRAIN_INCOMPLETE
from api_gateway.process.watchdog import Watchdog
from tests.kit import RawClient, RawUpstream, ask, eventually
from tests.measured import VARIABLE
from tests.processes import WAYS, Running, children, config_file, hooked, is_alive, process

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.timeout(240),
]

LEAST_TIMEOUT = 2.0  # that `server.worker_timeout` may be
PATIENCE = LEAST_TIMEOUT / 2  # the hook halves it
DRAIN = 1.0
STOP_MARGIN = 0.5  # that the hook gives a process beyond its time to drain
MARGIN = 5.0  # what a process that hangs may take beyond its time to drain
SLACK = 60.0  # for a busy machine, where a test does not ask for punctuality
HOOK = """
import ctypes, signal, time
from api_gateway.process import stop_times, supervisor, watchdog

create = watchdog.Watchdog.__init__
watchdog.Watchdog.__init__ = lambda dog, timeout, *rest, **named: create(dog, timeout / 2, *rest, **named)
watchdog.NATIVE_MARGIN = 0.5
for function in (stop_times.stop_within, stop_times.watchdog_of):
    function.__defaults__ = (0.5,)
supervisor.DRAIN_MARGIN, supervisor.SUPERVISOR_STOP_MARGIN = 1.0, 2.0  # they are apart as they are without the hook

def wait_for_the_report():
    watchdog.REPORT_TIMEOUT, watchdog.NATIVE_MARGIN = 10, 100  # SIGPROF would end the process before the report

def spin_visibly(*_):
    wait_for_the_report()
    while True:
        pass

def wait_visibly(*_):
    wait_for_the_report()
    while True:
        time.sleep(0.001)

def wait_outside_of_the_interpreter(*_):
    wait_for_the_report()
    mutex = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)

def spin_in_native_code(*_):
    sum(range(10**15))

for number, hang in (
    (signal.SIGURG, spin_visibly),
    (signal.SIGVTALRM, wait_visibly),
    (signal.SIGWINCH, wait_outside_of_the_interpreter),
    (signal.SIGIO, spin_in_native_code),
):
    signal.signal(number, hang)
"""
SPINNING, WAITING, OUTSIDE, NATIVELY = signal.SIGURG, signal.SIGVTALRM, signal.SIGWINCH, signal.SIGIO

UNOBSERVED = {"LOOP_WATCH_REPORTS": "", VARIABLE: ""}  # their loops are blocked, and they end without writing data

Process = AbstractContextManager[Running]
Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path, upstream: Callable[..., RawUpstream]) -> Start:
    """Return what starts a gateway in which a signal blocks the loop."""
    hook = hooked(tmp_path, HOOK)
    up = upstream()

    def run(*, workers: int = 1, timeout: float = LEAST_TIMEOUT, drain: float = DRAIN) -> Process:
        settings = f"server: {{worker_timeout: {timeout}, drain_timeout: {drain}}}\n"
        options = ("--config", config_file(tmp_path, up.url, settings), "--workers", str(workers))
        return process(*WAYS["python -m"], *options, cwd=tmp_path, **hook, **UNOBSERVED)

    return run


def workers_of(running: Running) -> list[int]:
    return [pid for pid, words in children(running.popen.pid).items() if words and "gateway worker" in words[-1]]


def port_of(running: Running) -> int:
    """Return its port, once it listens: a busy machine takes its time."""
    eventually(
        lambda: "Listening on" in running.output or running.popen.poll() is not None, "it listens", within=SLACK
    )
    return running.port


def serves(port: int) -> bool:
    with suppress(OSError, AssertionError), RawClient(port) as client:
        client.sock.settimeout(2)
        return client.get("/api/up").status == 200
    return False


@pytest.mark.parametrize("how", [SPINNING, OUTSIDE])
def test_a_process_whose_loop_is_blocked_says_where_and_ends(start: Start, how: int) -> None:
    with start() as running:
        assert serves(port_of(running))
        running.signal(how)
        assert running.popen.wait(PATIENCE + SLACK) == BLOCKED
        assert f"the event loop has been blocked for {PATIENCE:g} s" in running.errors
        assert "hook.py" in running.errors


def test_native_code_that_holds_the_interpreter_is_ended_by_its_cpu_time(start: Start) -> None:
    with start() as running:
        assert serves(port_of(running))
        running.signal(NATIVELY)
        assert running.popen.wait(PATIENCE + SLACK) == -signal.SIGPROF
        assert "spin_in_native_code" in running.errors


def test_a_worker_whose_loop_is_blocked_is_replaced(start: Start) -> None:
    """It waits and does not compute: that counts in full on a busy machine, too, where the supervisor ends others."""
    with start(workers=2) as running:
        port = port_of(running)
        before = workers_of(running)
        os.kill(before[0], OUTSIDE)
        eventually(lambda: not is_alive(before[0]), "it ends", within=PATIENCE + SLACK)
        eventually(lambda: len(set(workers_of(running)) - {before[0]}) == 2, "another follows", within=SLACK)
        eventually(lambda: serves(port), "the gateway serves", within=SLACK)
        assert f"the event loop has been blocked for {PATIENCE:g} s" in running.errors
        eventually(lambda: f"exited (code {BLOCKED})" in running.errors, "the supervisor says so")
        running.signal(signal.SIGTERM)
        assert running.popen.wait(SLACK) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_was_stopped_for_longer_goes_on_when_continued(start: Start, workers: int) -> None:
    with start(workers=workers) as running:
        port = port_of(running)
        everyone = [running.popen.pid, *workers_of(running)]
        for _ in range(2):
            for pid in everyone:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(1.5 * PATIENCE)
            for pid in everyone:
                os.kill(pid, signal.SIGCONT)
            eventually(lambda: serves(port), "it serves again", within=SLACK)
        assert [running.popen.pid, *workers_of(running)] == everyone
        assert "blocked" not in running.errors
        running.signal(signal.SIGTERM)
        assert running.popen.wait(SLACK) == 0


@pytest.mark.parametrize(("how", "before"), [(WAITING, True), (OUTSIDE, True), (WAITING, False)])
def test_a_stop_signal_ends_a_process_that_hangs(start: Start, how: int, *, before: bool) -> None:
    """In its time to drain and a few seconds, with an exit code that says that not everything was answered."""
    with start(timeout=120) as running:
        assert serves(port_of(running))
        with socket.create_connection(("127.0.0.1", port_of(running))) as held:
            held.sendall(b"GET /api/up HTTP/1.1\r\nHost: x\r\nX-Never-")  # keeps the drain from ending at once
            if before:
                running.signal(how)
                eventually(lambda: not serves(port_of(running)), "it hangs")
            running.signal(signal.SIGTERM)
            if not before:
                running.signal(how)
            assert running.popen.wait(DRAIN + MARGIN + SLACK) == DRAIN_INCOMPLETE
        assert f"has not ended {DRAIN + STOP_MARGIN:g} s after the stop signal" in running.errors
        assert "hook.py" in running.errors


def test_a_stop_signal_ends_a_gateway_whose_worker_hangs(start: Start) -> None:
    with start(workers=2, timeout=120) as running:
        port = port_of(running)
        assert serves(port)
        for pid in workers_of(running):
            os.kill(pid, OUTSIDE)
        running.signal(signal.SIGTERM)
        assert running.popen.wait(DRAIN + MARGIN + SLACK) == DRAIN_INCOMPLETE


def test_a_stop_signal_ends_a_supervisor_that_hangs(start: Start) -> None:
    with start(workers=2, timeout=120) as running:
        assert serves(port_of(running))
        workers = workers_of(running)
        running.signal(OUTSIDE)
        running.signal(signal.SIGTERM)
        assert running.popen.wait(DRAIN + MARGIN + SLACK) == DRAIN_INCOMPLETE
        eventually(lambda: not any(map(is_alive, workers)), "its workers end, too", within=DRAIN + MARGIN + SLACK)


STARVED = """
import asyncio, os, sys, threading
from api_gateway.process.watchdog import Watchdog

async def main():
    dog = Watchdog(0.3, 1000, blocked=5, overdue=4)
    with dog.active():
        dog.watch()
        print("watching", flush=True)
        processor = {int(sys.argv[1])}
        os.sched_setaffinity(threading.get_native_id(), processor)
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        while True:
            await asyncio.sleep(0.01)

asyncio.run(main())
"""
GREEDY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel keeps no times of waiting")
def test_a_loop_that_gets_no_processor_is_not_blocked(tmp_path: Path) -> None:
    """Its thread has the lowest priority there is, on a processor that four other processes want all of."""
    processor = str(min(os.sched_getaffinity(0)))
    greedy: list[subprocess.Popen[bytes]] = []
    with process("-c", STARVED, processor, cwd=tmp_path) as running:
        try:
            eventually(lambda: "watching" in running.output, "it watches", within=SLACK)
            greedy += (subprocess.Popen([sys.executable, "-c", GREEDY, processor]) for _ in range(4))
            with pytest.raises(subprocess.TimeoutExpired):
                running.popen.wait(1.8)  # six times what a loop may be blocked for
        finally:
            for one in greedy:
                one.kill()
                one.wait()
    assert "blocked" not in running.errors


def test_a_report_is_logged_while_the_main_thread_holds_the_lock_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    """A loop that hangs where it gets a logger, for example when it accepts a connection."""
    with logging._lock:  # type: ignore[attr-defined]
        assert codes_of_an_overdue_end() == [DRAIN_INCOMPLETE]
    assert "the process has not ended 0 s after the stop signal; exiting with code 4." in caplog.text
    assert "in codes_of_an_overdue_end" in caplog.text


def test_a_report_that_cannot_be_logged_is_written_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that hangs in a handler, for example in one that writes to a server."""
    monkeypatch.setattr("api_gateway.process.watchdog.REPORT_TIMEOUT", 0.5)
    caplog.handler.acquire()
    try:
        assert codes_of_an_overdue_end() == [DRAIN_INCOMPLETE]
    finally:
        caplog.handler.release()
    assert "the process has not ended 0 s after the stop signal" in capfd.readouterr().err


def test_a_report_that_cannot_be_written_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_gateway.process.watchdog.REPORT_TIMEOUT", 0.1)
    monkeypatch.setattr(Watchdog, "_report", lambda *_: time.sleep(3))
    assert codes_of_an_overdue_end() == [DRAIN_INCOMPLETE]


def codes_of_an_overdue_end() -> list[int]:
    """Return the exit codes with which a watchdog would have ended this process."""
    codes: list[int] = []
    watchdog = Watchdog(10, 0.0, blocked=BLOCKED, overdue=DRAIN_INCOMPLETE, end=codes.append)
    watchdog.expect_end()
    watchdog._check()
    return codes


def test_a_gateway_that_stops_while_idle_ends_at_once_and_with_zero(start: Start) -> None:
    with start(drain=30) as running:
        assert ask(f"http://127.0.0.1:{port_of(running)}/healthz").status == 200
        running.signal(signal.SIGTERM)
        assert running.popen.wait(SLACK) == 0
        assert "blocked" not in running.errors
