"""The supervisor of several workers: starts, replaces and stops them, and merges their figures.

It serves no request. It holds what outlives a worker: the listening sockets, the embedded store, the demo services,
and the counters of workers that have exited, so that counters never decrease.

Long because what workers share is started, replaced and stopped in one order.
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
from api_gateway.printable_text import counted
from api_gateway.process.config_watch import ConfigSource, ConfigWatch
from api_gateway.process.listeners import Listeners, WorkerSockets, leave_group
from api_gateway.process.message_log import change_logging
from api_gateway.process.startup_message import announce_start
from api_gateway.process.stop_times import stop_within, watchdog_of
from api_gateway.process.worker_handle import WORKER_START_TIMEOUT, Objection, WorkerHandle, spawn
from api_gateway.reload.outcome import ReloadOutcome, ReloadState
from api_gateway.reload.reloader import ApplyError, Reloader, refused_reload
from api_gateway.reload.serialization import serialized
from api_gateway.reporting.merge import merge
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.reporting.traffic_history import TrafficHistory, seconds_to_next
from api_gateway.storage.embedded_server import EmbeddedStore, NoServer, find_server
from api_gateway.system.collection import settle_objects
from api_gateway.system.held_signals import unblocked_signals
from api_gateway.system.service_manager import ServiceManager
from api_gateway.system.state_folder import own_folder

logger = logging.getLogger(__name__)

DRAIN_MARGIN = 3.5  # seconds that a worker may take after its drain time; its own watchdog ends it sooner
SUPERVISOR_STOP_MARGIN = 4.5  # seconds that the supervisor may take after that time
REPORT_MARGIN = 3.0  # seconds that a blocked worker has, after `worker_timeout`, to log its stack and exit
QUERY_ROUND_TIMEOUT = 1.5  # seconds for the workers to respond to a query
GATHER_ROUND_TIMEOUT = 0.5  # seconds for the workers to report; after that their last reports are used
PREPARE_TIMEOUT = 20.0  # seconds for a worker to prepare another configuration
COMMIT_TIMEOUT = 5.0  # seconds for a worker to apply it
STABLE_AFTER = 5.0  # seconds of service after which the exit of a worker is not counted as a failed start
MIN_RESPAWN_DELAY, MAX_RESPAWN_DELAY = 0.25, 10.0  # seconds before a worker that exited soon is replaced
LEAVE_GROUP_AFTER = 1.0  # seconds: from this delay on, new connections go to the other workers


def respawn_delay(failures: int) -> float:
    """Return the seconds to wait before the next start after this many consecutive failed ones."""
    return min(MAX_RESPAWN_DELAY, MIN_RESPAWN_DELAY * 2.0 ** min(failures - 1, 20)) if failures else 0.0


@dataclass(eq=False, slots=True)
class WorkerSlot:
    """A slot for one worker: its number, its sockets, the current worker, and consecutive failed starts."""

    number: int
    sockets: WorkerSockets
    worker: WorkerHandle | None = None
    failures: int = 0


@dataclass(eq=False, slots=True)
class CounterLedger:
    """The figures of the workers. `retired` has the merged counters of workers that have exited."""

    workers: list[WorkerHandle] = field(default_factory=list)
    retired: WorkerSnapshot = field(default_factory=lambda: merge([]))
    configuration: Callable[[], ReloadState] = ReloadState
    history: TrafficHistory = field(default_factory=TrafficHistory)
    _requested: int = 0
    _queried: int = 0
    _running: "asyncio.Task[dict[str, Any]] | None" = None
    _next: "asyncio.Task[dict[str, Any]] | None" = None

    async def gather(self) -> dict[str, Any]:
        """Return the merged snapshot of all workers, collected after this call.

        A call during a round of collection waits for the next one, which all waiting calls share.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._round(self._running), name="gathering")
        return await asyncio.shield(self._next)

    async def query(self, query: dict[str, Any]) -> tuple[list[str], bool]:
        """Send a query to all serving workers; return their results as JSON, and whether all responded."""
        self._queried += 1
        replies = [worker.query(self._queried, query) for worker in self.workers if worker.is_serving]
        if replies:
            await asyncio.wait(replies, timeout=QUERY_ROUND_TIMEOUT)
        results = [reply.result() for reply in replies if reply.done()]
        for reply in replies:
            reply.cancel()
        return [result for result in results if result is not None], len(results) == len(replies)

    def retire(self, worker: WorkerHandle) -> None:
        """Keep the counters of a worker that has exited, and drop the rest of its snapshot."""
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
        merged.points = self.history.points
        return merged.state()

    async def sample_traffic(self) -> None:
        """Add a point to the history of traffic every `POINT_SECONDS`, until cancelled."""
        while True:
            await asyncio.sleep(seconds_to_next(time.monotonic()))
            recorders = [self.retired.recorder, *(worker.snapshot.recorder for worker in self.workers)]
            self.history.sample(recorders, time.monotonic(), time.time())


class Supervisor:
    """Runs a gateway with several workers. States: starting, serving, rolling (restart), stopping (from any)."""

    def __init__(
        self,
        config: GatewayConfig,
        read: Callable[[], GatewayConfig],
        *,
        is_watched: bool = False,
        manager: ServiceManager | None = None,
    ) -> None:
        """`read` reads the configuration again; it raises ConfigError.

        `is_watched`: a change of its files triggers a reload. `manager` is notified of the state of the gateway, and
        may provide the sockets to listen on.
        """
        self._manager = manager or ServiceManager()
        self._watch: ConfigWatch | None = None
        if is_watched and isinstance(read, ConfigSource):
            self._watch = ConfigWatch(read, partial(self.reload, "--watch"))
        self._config = config  # for new workers
        self._reloader = Reloader(config, read, self._apply, wall_clock=time.time)
        self._ledger = CounterLedger(configuration=lambda: self._reloader.state)
        self._watchdog = watchdog_of(config.server, SUPERVISOR_STOP_MARGIN)
        self._spawn_lock = asyncio.Lock()  # no worker starts while a reload is applied to the others
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
        """Serve until a stop signal; return the exit code. Raises StartupError."""
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
        """Stop; at the second SIGINT without waiting."""
        if self._stopping.is_set():
            for worker in self._ledger.workers:
                worker.kill()
        self._stopping.set()

    # Life

    async def _live(self) -> None:
        server = self._config.server
        await self._start_shared(self._config)
        listeners = Listeners.of(self._config, server.workers, self._manager.passed)
        self._stack.callback(listeners.close)
        self._slots = [WorkerSlot(number, sockets) for number, sockets in enumerate(listeners.sets, 1)]
        self._stack.push_async_callback(self._stop_all)
        await self._start_all()
        announce_start(self._config, listeners.sets[0], server.workers)
        self._manager.ready()
        settle_objects()
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._respawn(slot), name=f"post {slot.number}")
            group.create_task(self._serve_signals(), name="signals")
            group.create_task(self._ledger.sample_traffic(), name="history of traffic")
            if self._watch is not None:
                group.create_task(self._watch.run(), name="watch")

    async def _start_shared(self, config: GatewayConfig) -> None:
        """Start what all workers share: the demo services and the embedded store. Raises StartupError."""
        if config.is_demo and self._demo is None:
            self._demo = DemoUpstreams()
            await self._demo.start()
            self._stack.push_async_callback(self._demo.stop)
        if not config.store.is_shared and self._store is None:
            try:
                has_quotas = any(limit.period is not None for limit in config.limits)
                self._store = EmbeddedStore(
                    find_server(), own_folder(config.state_dir) / "store" if has_quotas else None
                )
                self._stack.push_async_callback(self._store.stop)
                await self._store.start()
            except NoServer as error:
                raise StartupError(str(error)) from error

    async def _start_all(self) -> None:
        """Start a worker in each slot; the first alone, so that an error common to all is logged once."""
        first, *others = self._slots
        await self._start(first)
        await asyncio.gather(*(self._start(slot) for slot in others))

    async def _start(self, slot: WorkerSlot) -> None:
        async with self._spawn_lock:
            slot.worker = await self._spawn(slot)
        if not await slot.worker.is_ready(WORKER_START_TIMEOUT):
            raise StartupError(f"worker {slot.number} did not start")

    async def _stop_all(self) -> None:
        """Stop all workers; kill those that take too long."""
        self._manager.stopping(stop_within(self._config.server, SUPERVISOR_STOP_MARGIN))
        for slot in self._slots:
            for sock in slot.sockets:
                sock.close()  # the workers close theirs when they drain; from then on connections are refused
        workers = list(self._ledger.workers)
        for worker in workers:
            worker.terminate()
        await asyncio.gather(*(self._await_exit(worker) for worker in workers))
        if self._cut_off:
            logger.error("cut off in total: %s", counted(self._cut_off, "request"))

    # Workers

    def _serialized_config(self, config: GatewayConfig) -> dict[str, Any]:
        """Return a configuration as it is sent to workers."""
        values = serialized(config, self._demo.sections() if self._demo and config.is_demo else {})
        if self._store is not None:
            values["store"] |= {
                "url": self._store.url,
                "clients": "sqlite",
            }  # the embedded store does not survive a restart, a file does
        return values

    async def _spawn(self, slot: WorkerSlot) -> WorkerHandle:
        """Start a worker. Raises StartupError if no process can be started at present."""
        config = self._serialized_config(self._config)
        inherited = [] if self._store is None else [self._store.guardian_pipe]
        server = self._config.server
        try:
            worker = await spawn(
                slot.number,
                config,
                slot.sockets,
                inherited,
                self._ledger.gather,
                self.reload,
                self._ledger.query,
                server.worker_timeout + REPORT_MARGIN,
            )
        except (
            Exception
        ) as error:  # lack of descriptors, processes, threads or memory: asyncio raises more than OSError
            raise StartupError(
                f"worker {slot.number} could not be started: {str(error) or type(error).__name__}"
            ) from error
        worker.drains_within = _drains_within(self._config)
        self._ledger.workers.append(worker)
        return worker

    async def _drain_replaced(self, worker: WorkerHandle) -> None:
        """Stop a worker that was replaced, and wait for its exit."""
        worker.replace()
        await self._await_exit(worker)

    async def _await_exit(self, worker: WorkerHandle) -> None:
        """Wait for the exit of a stopping worker, kill it if it takes too long, and count the requests it cut off."""
        try:
            async with asyncio.timeout(worker.drains_within):
                code = await worker.wait()
        except TimeoutError:
            logger.warning("%s did not stop in time and is killed", worker)
            worker.kill()
            code = await worker.wait()
        if code != 0 and worker.has_served:  # it was blocked: at least the request that blocked it
            worker.cut_off = max(1, worker.cut_off)
        self._cut_off += worker.cut_off
        if worker in self._ledger.workers:
            self._ledger.retire(worker)

    async def _respawn(self, slot: WorkerSlot) -> None:
        """Replace the worker of a slot whenever it exits unexpectedly."""
        while True:
            worker = slot.worker
            assert worker is not None  # noqa: S101 - started before
            code = await worker.wait()
            if worker is not slot.worker:  # a rolling restart has replaced it
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
        """Start a worker in place of one that has exited. Retry until that succeeds; the others keep serving."""
        while True:
            async with self._spawn_lock:
                if slot.worker is not removed:  # a rolling restart has started one
                    return
                try:
                    slot.worker = await self._spawn(slot)
                except StartupError as error:
                    slot.failures += 1
                    delay = respawn_delay(slot.failures)
                    logger.error("%s; retrying in %g s", error, delay)  # noqa: TRY400 - one line
                else:
                    return
            await asyncio.sleep(delay)

    # Configuration

    async def _serve_signals(self) -> None:
        """Perform the actions of signals one by one, also of those that arrived before the start was complete."""
        while True:
            do = await self._wanted.get()
            await do()

    async def _reload_by_signal(self) -> None:
        with self._manager.reloading():
            await self._reloader.reload("SIGHUP")

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration in all workers, or in none; UNAVAILABLE during a rolling restart or a stop."""
        if self._is_rolling:
            return self._reloader.record(refused_reload("a rolling restart is in progress"), origin)
        if self._stopping.is_set():
            return self._reloader.record(refused_reload("the gateway is draining"), origin)
        return await self._reloader.reload(origin)

    async def _apply(self, config: GatewayConfig) -> None:
        """Apply a configuration to all workers in two phases: all prepare, then all commit; or none does.

        A worker that fails to commit is replaced, with `config`. Raises StartupError and ApplyError.
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
                logger.error("%s could not apply the configuration and is replaced: %s", worker, objection.problem)
                worker.kill()
            for worker in workers:
                worker.drains_within = _drains_within(config)
        self._watchdog.set_stop_timeout(stop_within(config.server, SUPERVISOR_STOP_MARGIN))
        change_logging(config.log)

    async def _roll(self) -> None:
        """Replace the workers one by one.

        Each replacement starts beside the old worker and runs the installed code.
        """
        self._is_rolling = True  # no reload begins from here on
        try:
            await self._reloader.idle()
            for slot in self._slots:
                if not await self._replace(slot):
                    logger.error("rolling restart aborted: new worker %d did not start; the others serve", slot.number)
                    return
        finally:
            self._is_rolling = False
        logger.info("rolling restart complete: %s restarted", counted(len(self._slots), "worker"))

    async def _replace(self, slot: WorkerSlot) -> bool:
        """Start a new worker beside the old one, then stop the old one; return whether the new one serves."""
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
            old.snapshot.is_over = True  # its breakers and targets no longer count
            await self._drain_replaced(old)
        return True


def _drains_within(config: GatewayConfig) -> float:
    """Return the seconds that a worker has to exit after a stop signal."""
    return config.server.drain_delay + config.server.drain_timeout + DRAIN_MARGIN


async def _all(
    workers: Sequence[WorkerHandle], phase: str, within: float, **fields: Any
) -> dict[WorkerHandle, Objection]:
    """Run a phase of a reload in all workers; return the objections of those that still serve."""
    replies = await asyncio.gather(*(worker.configure(phase, within, **fields) for worker in workers))
    found = zip(workers, replies, strict=True)
    return {worker: reply for worker, reply in found if reply is not None and worker.is_serving}


def _error_of(objections: Mapping[WorkerHandle, Objection]) -> StartupError | ApplyError:
    """Return the error for these objections: StartupError for a mistake in the configuration, else ApplyError."""
    mistake = next((objection.problem for objection in objections.values() if objection.is_of_all), None)
    if mistake is not None:
        return StartupError(mistake)
    return ApplyError("; ".join(f"{worker}: {objection.problem}" for worker, objection in objections.items()))
