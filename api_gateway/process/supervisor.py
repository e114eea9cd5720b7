"""The supervisor of several workers: starts, replaces, relieves and stops them, and adds up what they count.

It serves no request. It holds what outlives a worker: the listening sockets, the embedded store, the demo services,
and the counts of the workers that have ended, so that no counter goes back.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from api_gateway.config import GatewayConfig
from api_gateway.demo import DemoUpstreams
from api_gateway.errors import DRAIN_INCOMPLETE, StartupError
from api_gateway.process.config_watch import ConfigSource, ConfigWatch
from api_gateway.process.listeners import Listeners, Sockets, leave_group
from api_gateway.process.server import set_log_level, stop_within, watchdog_of
from api_gateway.process.startup_message import startup_banner
from api_gateway.process.worker_handle import WORKER_START_TIMEOUT, Objection, WorkerHandle, spawn
from api_gateway.reload.outcome import ReloadOutcome, ReloadState
from api_gateway.reload.reloader import ApplyError, Reloader, refused_reload
from api_gateway.reload.serialization import serialized
from api_gateway.reporting.merge import merge
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.storage.embedded_server import EmbeddedStore, NoServer, find_server
from api_gateway.system.held_signals import unblocked_signals

logger = logging.getLogger(__name__)

DRAIN_MARGIN = 3.5  # seconds a worker may take beyond its time to drain: its own watchdog ends it sooner
SUPERVISOR_STOP_MARGIN = 4.5  # seconds the supervisor may take beyond that time
REPORT_MARGIN = 3.0  # seconds a worker that hangs has, beyond its time, to say where it hangs and end by itself
GATHER_ROUND_TIMEOUT = 0.5  # seconds for the workers to report, before what they said last is taken
PREPARE_TIMEOUT = 20.0  # seconds for a worker to prepare another configuration
COMMIT_TIMEOUT = 5.0  # seconds for it to put that into force
STABLE_AFTER = 5.0  # seconds of service after which a worker's end is not put down to its start
MIN_RESPAWN_DELAY, MAX_RESPAWN_DELAY = (
    0.25,
    10.0,
)  # seconds before a worker is replaced that has ended soon after its start
LEAVE_GROUP_AFTER = 1.0  # seconds of such a delay from which on new connections go to the other workers


def respawn_delay(failures: int) -> float:
    """Return the seconds to wait before a start, after so many in a row that failed."""
    return min(MAX_RESPAWN_DELAY, MIN_RESPAWN_DELAY * 2.0 ** min(failures - 1, 20)) if failures else 0.0


@dataclass(eq=False, slots=True)
class WorkerSlot:
    """A place for one worker: its number, its sockets, who is there, and starts in a row that failed."""

    number: int
    sockets: Sockets
    worker: WorkerHandle | None = None
    failures: int = 0


@dataclass(eq=False, slots=True)
class CounterLedger:
    """What the workers count. `gone` is the sum of those that have ended."""

    workers: list[WorkerHandle] = field(default_factory=list)
    retired: WorkerSnapshot = field(default_factory=lambda: merge([]))
    configuration: Callable[[], ReloadState] = ReloadState
    _requested: int = 0
    _running: "asyncio.Task[dict[str, Any]] | None" = None
    _next: "asyncio.Task[dict[str, Any]] | None" = None

    async def gather(self) -> dict[str, Any]:
        """Return the state of all together, as it is now or later.

        Whoever asks while workers are being asked waits for the round after, as what he has seen may have happened
        behind the first one's back; all who wait share it.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._round(self._running), name="gathering")
        return await asyncio.shield(self._next)

    def retire(self, worker: WorkerHandle) -> None:
        """Keep what a worker that has ended had counted, and forget the rest."""
        self.workers.remove(worker)
        worker.snapshot.end()
        self.retired = merge([self.retired, worker.snapshot])

    async def _round(self, before: "asyncio.Task[dict[str, Any]] | None") -> dict[str, Any]:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        self._requested += 1
        replies = [worker.request_snapshot(self._requested) for worker in self.workers]
        if replies:
            await asyncio.wait(replies, timeout=GATHER_ROUND_TIMEOUT)
        merged = merge([self.retired, *(worker.snapshot for worker in self.workers)])
        merged.configuration = self.configuration()
        return merged.state()


class Supervisor:
    """Runs a gateway of several workers."""

    def __init__(self, config: GatewayConfig, read: Callable[[], GatewayConfig], *, is_watched: bool = False) -> None:
        """`read` reads the configuration anew; it raises ConfigError.

        `is_watched`: a change of its files is a reload.
        """
        self._watch: ConfigWatch | None = None
        if is_watched and isinstance(read, ConfigSource):
            self._watch = ConfigWatch(read, partial(self.reload, "--watch"))
        self._config = config  # which workers are started with
        self._reloader = Reloader(config, read, self._apply, wall_clock=time.time)
        self._ledger = CounterLedger(configuration=lambda: self._reloader.state)
        self._watchdog = watchdog_of(config.server, SUPERVISOR_STOP_MARGIN)
        self._spawn_lock = asyncio.Lock()  # nobody is started while a configuration is brought to those who are there
        self._is_rolling = False
        self._slots: list[WorkerSlot] = []
        self._stack = AsyncExitStack()
        self._store: EmbeddedStore | None = None
        self._demo: DemoUpstreams | None = None
        self._cut_off = 0
        self._stopping = asyncio.Event()
        self._wanted: asyncio.Queue[Callable[[], Awaitable[object]]] = asyncio.Queue()

    def __repr__(self) -> str:
        return f"<Supervisor [{len(self._ledger.workers)} workers]>"

    async def run(self) -> int:
        """Serve until told to stop; return the exit code. Raises StartupError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        loop.add_signal_handler(signal.SIGHUP, self._wanted.put_nowait, self._reload_by_signal)
        loop.add_signal_handler(signal.SIGUSR2, self._wanted.put_nowait, self._roll)
        loop.add_signal_handler(signal.SIGUSR1, logger.warning, "SIGUSR1 is ignored")
        with unblocked_signals(), self._watchdog.active():
            self._watchdog.watch()
            async with self._stack:
                await self._until_stopped(self._live())
        return DRAIN_INCOMPLETE if self._cut_off else 0

    async def _until_stopped(self, life: Coroutine[Any, Any, None]) -> None:
        living = asyncio.create_task(life, name="supervision")
        stopped = asyncio.create_task(self._stopping.wait(), name="stop")
        await asyncio.wait({living, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        living.cancel()
        with suppress(asyncio.CancelledError):
            await living

    def _on_interrupt(self) -> None:
        """Stop; at the second interrupt without waiting."""
        if self._stopping.is_set():
            for worker in self._ledger.workers:
                worker.kill()
        self._stopping.set()

    # Life

    async def _live(self) -> None:
        server = self._config.server
        await self._start_shared(self._config)
        listeners = Listeners.of(self._config, server.workers)
        self._stack.callback(listeners.close)
        self._slots = [WorkerSlot(number, sockets) for number, sockets in enumerate(listeners.sets, 1)]
        self._stack.push_async_callback(self._stop_all)
        await self._start_all()
        print(startup_banner(self._config, listeners.sets[0], server.workers), flush=True)  # noqa: T201 - for the person there
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._respawn(slot), name=f"post {slot.number}")
            group.create_task(self._serve_signals(), name="signals")
            if self._watch is not None:
                group.create_task(self._watch.run(), name="watch")

    async def _start_shared(self, config: GatewayConfig) -> None:
        """Start what the workers have in common."""
        if config.is_demo and self._demo is None:
            self._demo = DemoUpstreams()
            await self._demo.start()
            self._stack.push_async_callback(self._demo.stop)
        if not config.store.is_shared and self._store is None:
            try:
                self._store = EmbeddedStore(find_server())
                self._stack.push_async_callback(self._store.stop)
                await self._store.start()
            except NoServer as error:
                raise StartupError(str(error)) from error

    async def _start_all(self) -> None:
        """Start a worker at every post: the first alone, so that what none can do is said once."""
        first, *others = self._slots
        await self._start(first)
        await asyncio.gather(*(self._start(slot) for slot in others))

    async def _start(self, slot: WorkerSlot) -> None:
        async with self._spawn_lock:
            slot.worker = await self._spawn(slot)
        if not await slot.worker.is_ready(WORKER_START_TIMEOUT):
            raise StartupError(f"worker {slot.number} did not start")

    async def _stop_all(self) -> None:
        """Stop all workers; whoever takes too long is ended."""
        for slot in self._slots:
            for sock in slot.sockets:
                sock.close()  # the workers close theirs once they drain: from then on connections are refused
        workers = list(self._ledger.workers)
        for worker in workers:
            worker.terminate()
        await asyncio.gather(*(self._await_exit(worker) for worker in workers))
        if self._cut_off:
            logger.error("%d requests were cut off in all", self._cut_off)

    # Workers

    def _serialized_config(self, config: GatewayConfig) -> dict[str, Any]:
        """Return a configuration as workers get it."""
        values = serialized(config, self._demo.sections() if self._demo and config.is_demo else {})
        if self._store is not None:
            values["store"] |= {"url": self._store.url, "clients": "sqlite"}  # it outlives no restart; the file does
        return values

    async def _spawn(self, slot: WorkerSlot) -> WorkerHandle:
        """Start a worker. Raises StartupError if this machine cannot start another process now."""
        config = self._serialized_config(self._config)
        inherited = [] if self._store is None else [self._store.lifeline]
        server = self._config.server
        try:
            worker = await spawn(
                slot.number,
                config,
                slot.sockets,
                inherited,
                self._ledger.gather,
                self.reload,
                server.worker_timeout + REPORT_MARGIN,
            )
        except Exception as error:  # no descriptor, process, thread or memory: asyncio raises more than OSError
            raise StartupError(
                f"worker {slot.number} could not be started: {str(error) or type(error).__name__}"
            ) from error
        worker.drains_within = _drains_within(self._config)
        self._ledger.workers.append(worker)
        return worker

    async def _drain_replaced(self, worker: WorkerHandle) -> None:
        """Stop one worker whose place another has taken, and wait for its end."""
        worker.replace()
        await self._await_exit(worker)

    async def _await_exit(self, worker: WorkerHandle) -> None:
        """Wait for the end of a worker that was told to stop, and add up what it could not end."""
        try:
            async with asyncio.timeout(worker.drains_within):
                code = await worker.wait()
        except TimeoutError:
            logger.warning("%s did not stop in time and is ended", worker)
            worker.kill()
            code = await worker.wait()
        if code != 0 and worker.has_served:  # it hung and was ended: at least what it hung on
            worker.cut_off = max(1, worker.cut_off)
        self._cut_off += worker.cut_off
        if worker in self._ledger.workers:
            self._ledger.retire(worker)

    async def _respawn(self, slot: WorkerSlot) -> None:
        """Put another worker in the place of one that has ended by itself."""
        while True:
            worker = slot.worker
            assert worker is not None  # noqa: S101 - started before
            code = await worker.wait()
            if worker is not slot.worker:  # it was relieved
                continue
            self._ledger.retire(worker)
            lived = time.monotonic() - worker.started
            slot.failures = slot.failures + 1 if worker.seconds_served < STABLE_AFTER else 0
            delay = respawn_delay(slot.failures)
            how = f"code {code}" if code >= 0 else f"signal {-code}"
            logger.error("%s exited (%s) after %.1f s, restarting in %g s", worker, how, lived, delay)
            if delay >= LEAVE_GROUP_AFTER:
                leave_group(slot.sockets)
            await asyncio.sleep(delay)
            await self._fill(slot, worker)

    async def _fill(self, slot: WorkerSlot, removed: WorkerHandle) -> None:
        """Start a worker in the place of one that has ended, however often that fails: the others go on serving."""
        while True:
            async with self._spawn_lock:
                if slot.worker is not removed:  # a rolling restart has started one
                    return
                try:
                    slot.worker = await self._spawn(slot)
                except StartupError as error:
                    slot.failures += 1
                    delay = respawn_delay(slot.failures)
                    logger.error("%s; trying again in %g s", error, delay)  # noqa: TRY400 - one line
                else:
                    return
            await asyncio.sleep(delay)

    # Configuration

    async def _serve_signals(self) -> None:
        """Do what signals ask for, one after the other; they may have come before the start was done."""
        while True:
            do = await self._wanted.get()
            await do()

    async def _reload_by_signal(self) -> None:
        await self._reloader.reload("SIGHUP")

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration in all workers, or in none. It is refused where a worker that asks has to leave."""
        if self._is_rolling:
            return self._reloader.record(refused_reload("the workers are being restarted one by one"), origin)
        if self._stopping.is_set():
            return self._reloader.record(refused_reload("the gateway is draining"), origin)
        return await self._reloader.reload(origin)

    async def _apply(self, config: GatewayConfig) -> None:
        """Bring all workers to a configuration in two phases: all prepare, then all commit, or none does.

        Raises StartupError and ApplyError. A worker that does not commit is ended: the one that replaces it starts
        with `config`.
        """
        async with self._spawn_lock:
            workers = list(self._ledger.workers)
            await asyncio.gather(*(worker.is_ready(WORKER_START_TIMEOUT) for worker in workers))
            await self._start_shared(config)
            workers = [worker for worker in workers if worker.is_serving]
            values = self._serialized_config(config)
            objections = await _all(workers, "prepare", PREPARE_TIMEOUT, config=values)
            if objections:
                raise _error_of(objections)
            self._config = config
            for worker, objection in (await _all(workers, "commit", COMMIT_TIMEOUT)).items():
                logger.error("%s is replaced, it could not take the configuration: %s", worker, objection.problem)
                worker.kill()
            for worker in workers:
                worker.drains_within = _drains_within(config)
        self._watchdog.set_stop_timeout(stop_within(config.server, SUPERVISOR_STOP_MARGIN))
        set_log_level(config.log.level)

    async def _roll(self) -> None:
        """Replace the workers one by one, each by one that is started beside it: with the code as it is now."""
        self._is_rolling = True  # from here on no reload begins
        try:
            await self._reloader.idle()
            for slot in self._slots:
                if not await self._replace(slot):
                    logger.error("not restarted: a new worker %d did not start; the old ones go on", slot.number)
                    return
        finally:
            self._is_rolling = False
        logger.info("rolling restart complete: %d workers restarted", len(self._slots))

    async def _replace(self, slot: WorkerSlot) -> bool:
        """Start a new worker beside the old one, then relieve that; tell whether the new one serves."""
        try:
            new = await self._spawn(slot)
        except StartupError as error:
            logger.error("%s", error)  # noqa: TRY400 - one line
            return False
        if not await new.is_ready(WORKER_START_TIMEOUT):
            await self._drain_replaced(new)
            return False
        old, slot.worker, slot.failures = slot.worker, new, 0
        if old is not None and old in self._ledger.workers:
            old.snapshot.is_over = True  # what it says of breakers and targets is not asked for any more
            await self._drain_replaced(old)
        return True


def _drains_within(config: GatewayConfig) -> float:
    """Return the seconds within which a worker must have ended that was told to."""
    return config.server.drain_delay + config.server.drain_timeout + DRAIN_MARGIN


async def _all(
    workers: Sequence[WorkerHandle], phase: str, within: float, **fields: Any
) -> dict[WorkerHandle, Objection]:
    """Have all workers do a phase of a reload; return what is in the way of those that serve and have not done it."""
    replies = await asyncio.gather(*(worker.configure(phase, within, **fields) for worker in workers))
    found = zip(workers, replies, strict=True)
    return {worker: reply for worker, reply in found if reply is not None and worker.is_serving}


def _error_of(objections: Mapping[WorkerHandle, Objection]) -> StartupError | ApplyError:
    """Return what to raise: the mistake in the configuration, if it is one, or what is wrong with each worker."""
    mistake = next((objection.problem for objection in objections.values() if objection.is_of_all), None)
    if mistake is not None:
        return StartupError(mistake)
    return ApplyError("; ".join(f"{worker}: {objection.problem}" for worker, objection in objections.items()))
