"""What the supervisor merges, how long it waits between starts, and what a reload may change."""

import asyncio
import errno
import signal
import socket
import time
from typing import Any, cast

import pytest

from api_gateway.config import GatewayConfig, load_config
from api_gateway.errors import StartupError
from api_gateway.metrics import Recorder
from api_gateway.process import supervisor
from api_gateway.process.listeners import WorkerSockets
from api_gateway.process.supervisor import (
    MAX_RESPAWN_DELAY,
    MIN_RESPAWN_DELAY,
    CounterLedger,
    Supervisor,
    WorkerSlot,
    respawn_delay,
)
from api_gateway.process.worker_handle import Objection, WorkerHandle
from api_gateway.reload.changes import keep_restart_settings
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.reporting.worker_channel import encode
from tests.kit import soon, turns


def test_a_worker_is_restarted_soon_after_its_first_failure_and_later_after_further_ones() -> None:
    delays = [respawn_delay(failures) for failures in range(12)]
    assert delays[:4] == [0, MIN_RESPAWN_DELAY, 2 * MIN_RESPAWN_DELAY, 4 * MIN_RESPAWN_DELAY]
    assert delays == sorted(delays)
    assert delays[-1] == MAX_RESPAWN_DELAY
    assert respawn_delay(5000) == MAX_RESPAWN_DELAY


class Puppet:
    """A worker that reports what it is told to, when it is told to."""

    def __init__(self, number: int) -> None:
        self.snapshot = WorkerSnapshot(str(number), Recorder(["users"], [], ["FREE"], (50,), 0.0))
        self.count = 0
        self.asked: list[asyncio.Future[None]] = []

    def request_snapshot(self, _number: int) -> asyncio.Future[None]:
        self.asked.append(asyncio.get_running_loop().create_future())
        return self.asked[-1]

    def answer(self) -> None:
        self.snapshot.recorder.allowed["FREE"] = self.count
        for asked in self.asked:
            if not asked.done():
                asked.set_result(None)


def ledger_of(*puppets: Puppet) -> CounterLedger:
    return CounterLedger([cast("WorkerHandle", puppet) for puppet in puppets])


def allowed(state: dict[str, Any]) -> int:
    found: int = state["recorder"]["allowed"]["FREE"]
    return found


class Process:
    """The process of a worker, as far as its handle uses it."""

    pid = 1

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.is_killed = asyncio.Event()

    def send_signal(self, number: int) -> None:
        self.signals.append(number)
        self.is_killed.set()

    async def wait(self) -> int:
        await self.is_killed.wait()
        return -self.signals[0]


async def nothing(*_: object) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    "message",
    [b"{}\n", b"no JSON\n", b'{"kind": "configured"}\n', b'{"kind": "snapshot", "snapshot": []}\n', b"x" * 100_000],
    ids=["no kind", "no JSON", "no id", "no snapshot", "no end"],
)
async def test_a_worker_whose_message_cannot_be_processed_is_killed_and_reported(
    message: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Its end is awaited as that of any other, so that another replaces it."""
    process = Process()
    ours, theirs = socket.socketpair()
    streams = await asyncio.open_unix_connection(sock=ours)
    with theirs:
        worker = WorkerHandle(3, cast("Any", process), streams, nothing, nothing, nothing, 60)
        theirs.sendall(encode("ready", clock=time.monotonic()))
        assert await worker.is_ready(10)
        waiting = worker.request_snapshot(1)
        theirs.sendall(message)
        async with asyncio.timeout(10):
            assert await worker.wait() == -signal.SIGKILL
            await waiting
    assert not worker.is_serving
    assert "<worker 3 [1]> has sent a message that cannot be processed, and is killed" in caplog.text


async def test_a_worker_that_is_slow_to_start_is_not_taken_to_hang() -> None:
    """It has nothing to say before it serves; from then on it is."""
    process, patience = Process(), 0.1
    ours, theirs = socket.socketpair()
    streams = await asyncio.open_unix_connection(sock=ours)
    with theirs:
        worker = WorkerHandle(1, cast("Any", process), streams, nothing, nothing, nothing, patience)
        await asyncio.sleep(3 * patience)
        assert not process.is_killed.is_set()
        assert worker.seconds_served == 0
        theirs.sendall(encode("ready", clock=time.monotonic()))
        assert await worker.is_ready(10)
        assert worker.seconds_served <= time.monotonic() - worker.started - 3 * patience, "its start does not count"
        async with asyncio.timeout(10):
            await process.is_killed.wait()
    await asyncio.wait({worker._listening})


async def test_all_workers_are_asked_and_their_counts_summed() -> None:
    one, other = Puppet(1), Puppet(2)
    one.count, other.count = 3, 4
    gathering = asyncio.create_task(ledger_of(one, other).gather())
    await turns()
    assert not gathering.done()
    one.answer()
    other.answer()
    assert allowed(await gathering) == 7


async def test_a_request_during_a_collection_waits_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Puppet(1), Puppet(2)
    ledger = ledger_of(one, other)
    first = asyncio.create_task(ledger.gather())
    await turns()
    one.answer()
    one.count = 5  # behind the back of the first round
    late = [asyncio.create_task(ledger.gather()) for _ in range(3)]
    await turns()
    other.answer()
    assert allowed(await first) == 0
    await turns()
    assert len(one.asked) == 2, "those who wait share a round"
    one.answer()
    other.answer()
    assert [allowed(state) for state in await asyncio.gather(*late)] == [5, 5, 5]


async def test_a_worker_that_does_not_reply_is_shown_with_its_last_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "GATHER_ROUND_TIMEOUT", 0.01)
    one, other = Puppet(1), Puppet(2)
    other.count = 2
    other.answer()
    other.count = 9
    one.count = 1
    gathering = asyncio.create_task(ledger_of(one, other).gather())
    await turns()
    one.answer()
    assert allowed(await gathering) == 3


async def test_a_worker_that_ends_leaves_only_its_counts() -> None:
    one, other = Puppet(1), Puppet(2)
    ledger = ledger_of(one, other)
    one.count, one.snapshot.recorder.in_flight, one.snapshot.buckets = 4, 2, 10
    one.answer()
    ledger.retire(cast("WorkerHandle", one))
    gathering = asyncio.create_task(ledger.gather())
    await turns()
    other.answer()
    state = await gathering
    assert (allowed(state), state["recorder"]["in_flight"], state["buckets"]) == (4, 0, 0)


async def test_a_collection_that_one_caller_cancels_continues_for_the_others() -> None:
    one = Puppet(1)
    ledger = ledger_of(one)
    impatient, patient = asyncio.create_task(ledger.gather()), asyncio.create_task(ledger.gather())
    await turns()
    impatient.cancel()
    await turns()
    one.answer()
    assert allowed(await patient) == 0


class Leaver:
    """A worker that was told to stop, and ends when it is killed or its time has come."""

    has_served = True
    seconds_served = started = 0.0

    def __init__(self, seconds: float, cut_off: int = 0) -> None:
        self.cut_off = cut_off
        self.snapshot = WorkerSnapshot("1", Recorder(["up"], [], ["FREE"], (50,), 0.0))
        self.drains_within = 0.0
        self._seconds = seconds
        self._killed = asyncio.Event()

    async def wait(self) -> int:
        try:
            async with asyncio.timeout(self._seconds):
                await self._killed.wait()
        except TimeoutError:
            return 0
        return -signal.SIGKILL

    def replace(self) -> None:
        """Nothing more is needed."""

    terminate = replace

    def kill(self) -> None:
        self._killed.set()


def supervisor_of(*leavers: Leaver | Exception, monkeypatch: pytest.MonkeyPatch, drain_timeout: float) -> Supervisor:
    """Return one whose starts of workers come to these, one after the other."""
    left = iter(leavers)

    async def hire(*_: object) -> Leaver:
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(supervisor, "spawn", hire)
    monkeypatch.setattr(supervisor, "DRAIN_MARGIN", 0.0)
    return Supervisor(drains_in(drain_timeout), lambda: drains_in(1))


def drains_in(seconds: float) -> GatewayConfig:
    return load_config(None, {"server": {"drain_timeout": seconds}})


@pytest.mark.parametrize(
    "lack", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread"), MemoryError()]
)
async def test_a_worker_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: Exception
) -> None:
    """The others serve on meanwhile: nothing leaves the task that keeps the place."""
    monkeypatch.setattr(supervisor, "MIN_RESPAWN_DELAY", 0.001)
    boss = supervisor_of(Leaver(0), lack, lack, Leaver(30), monkeypatch=monkeypatch, drain_timeout=30)
    post = WorkerSlot(1, WorkerSockets([]))
    first = post.worker = await boss._spawn(post)
    keeping = asyncio.create_task(boss._respawn(post))
    await soon(lambda: post.worker is not first, "another worker follows")
    assert not keeping.done()
    keeping.cancel()
    found = [one for one in caplog.records if "could not be started" in one.getMessage()]
    assert [(one.exc_info, one.getMessage().count("\n")) for one in found] == [(None, 0)] * 2
    assert found[0].getMessage() == f"worker 1 could not be started: {str(lack) or 'MemoryError'}; retrying in 0.002 s"
    assert "retrying in 0.004 s" in found[1].getMessage()


async def test_a_rolling_restart_that_cannot_start_a_worker_leaves_the_old_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boss = supervisor_of(Leaver(30), OSError(errno.EAGAIN, "try again"), monkeypatch=monkeypatch, drain_timeout=30)
    post = WorkerSlot(1, WorkerSockets([]))
    old = post.worker = await boss._spawn(post)
    assert not await boss._replace(post)
    assert post.worker is old
    assert "worker 1 could not be started: [Errno 11] try again" in caplog.text


async def test_a_first_worker_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    boss = supervisor_of(OSError(errno.EAGAIN, "try again"), monkeypatch=monkeypatch, drain_timeout=30)
    with pytest.raises(StartupError, match="worker 1 could not be started"):
        await boss._start(WorkerSlot(1, WorkerSockets([])))


async def test_a_worker_has_the_drain_time_it_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload may shorten it, but the worker does not know."""
    boss = supervisor_of(Leaver(0.05), monkeypatch=monkeypatch, drain_timeout=30)
    worker = await boss._spawn(WorkerSlot(1, WorkerSockets([])))
    boss._config = drains_in(0.01)
    await boss._drain_replaced(worker)
    assert worker.cut_off == boss._cut_off == 0


@pytest.mark.parametrize("is_ready", [True, False])
async def test_a_worker_that_is_killed_has_cut_off_what_it_served(
    monkeypatch: pytest.MonkeyPatch, *, is_ready: bool
) -> None:
    leaver = Leaver(30)
    leaver.has_served = is_ready
    boss = supervisor_of(leaver, monkeypatch=monkeypatch, drain_timeout=30)
    worker = await boss._spawn(WorkerSlot(1, WorkerSockets([])))
    worker.kill()
    await boss._drain_replaced(worker)
    assert boss._cut_off == int(is_ready)


async def test_requests_cut_off_by_replaced_workers_are_added_to_those_of_the_last_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boss = supervisor_of(Leaver(0, 2), Leaver(0, 3), monkeypatch=monkeypatch, drain_timeout=30)
    await boss._drain_replaced(await boss._spawn(WorkerSlot(1, WorkerSockets([]))))
    await boss._spawn(WorkerSlot(1, WorkerSockets([])))
    await boss._stop_all()
    assert boss._cut_off == 5


def test_what_only_a_restart_can_change_stays_and_is_named() -> None:
    def read(**sections: Any) -> Any:
        return load_config(None, {"log": {"level": "error"}, **sections})

    before = read(server={"port": 1, "workers": 2})
    now = read(
        server={"port": 2, "workers": 3, "drain_timeout": 5}, store={"url": "redis://cache"}, default_tier="BASIC"
    )
    settled, needs_restart = keep_restart_settings(before, now)
    assert needs_restart == ["server.port", "server.workers", "store.url"]
    assert (settled.server.port, settled.server.workers, settled.store.url.get_secret_value()) == (1, 2, "memory://")
    assert (settled.server.drain_timeout, settled.default_tier) == (5, "BASIC")


class Obedient:
    """A worker that serves, and answers the phases of a reload as it is told."""

    is_serving = True

    def __init__(self, **objections: Objection) -> None:
        self.objections = objections
        self.phases: list[str] = []
        self.is_killed = False
        self.drains_within = 0.0

    async def is_ready(self, _within: float) -> bool:
        return True

    async def configure(self, phase: str, _within: float, **_fields: Any) -> Objection | None:
        self.phases.append(phase)
        return self.objections.get(phase)

    def kill(self) -> None:
        self.is_killed = True


def supervisor_with(*workers: Obedient) -> tuple[Supervisor, GatewayConfig]:
    shared = {
        "store": {"url": "redis://127.0.0.1:1"},
        "upstreams": {"up": {"targets": [{"url": "http://127.0.0.1:1"}]}},
    }
    before, after = (load_config(None, {**shared, "default_tier": tier}) for tier in ("FREE", "BASIC"))
    boss = Supervisor(before, lambda: after)
    boss._ledger.workers = [cast("WorkerHandle", worker) for worker in workers]
    return boss, after


async def test_all_workers_take_a_configuration_in_two_phases() -> None:
    workers = Obedient(), Obedient()
    boss, after = supervisor_with(*workers)
    outcome = await boss.reload("a test")
    assert outcome.result == "success"
    assert [worker.phases for worker in workers] == [["prepare", "commit"]] * 2
    assert boss._config == after


@pytest.mark.parametrize(("is_of_all", "result"), [(True, "invalid"), (False, "failed")])
async def test_what_one_worker_cannot_prepare_no_worker_takes(*, is_of_all: bool, result: str) -> None:
    workers = Obedient(), Obedient(prepare=Objection("it has not answered", is_of_all))
    boss, after = supervisor_with(*workers)
    outcome = await boss.reload("a test")
    assert outcome.result == result
    assert "it has not answered" in outcome.problems[0]
    assert [worker.phases for worker in workers] == [["prepare"]] * 2
    assert boss._config != after
    assert not any(worker.is_killed for worker in workers)


async def test_a_worker_that_does_not_commit_is_replaced_by_one_that_starts_with_the_new_configuration() -> None:
    workers = Obedient(), Obedient(commit=Objection("it failed"))
    boss, after = supervisor_with(*workers)
    assert (await boss.reload("a test")).result == "success"
    assert [worker.is_killed for worker in workers] == [False, True]
    assert boss._config == after


async def test_reloads_are_refused_while_workers_are_restarted_or_the_gateway_drains() -> None:
    boss, _ = supervisor_with(Obedient())
    boss._is_rolling = True
    assert (await boss.reload("a test")).result == "unavailable"
    boss._is_rolling = False
    boss._stopping.set()
    assert (await boss.reload("a test")).result == "unavailable"
    assert boss._reloader.state.counts["unavailable"] == 2
