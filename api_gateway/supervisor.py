"""The supervisor of several workers: starts, replaces, relieves and stops them, and adds up what they count.

It serves no request. It holds what outlives a worker: the listening sockets, the embedded store, the demo services,
and the counts of the workers that have ended, so that no counter goes back.
"""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from api_gateway.brief import hand_over
from api_gateway.config import GatewayConfig
from api_gateway.demo import DemoUpstreams
from api_gateway.diagnosis import ConfigError
from api_gateway.embedded import EmbeddedStore, NoServer, find_server
from api_gateway.errors import CUT_OFF, StartupError
from api_gateway.listening import Listeners, Sockets, leave_group
from api_gateway.merging import merge
from api_gateway.report import Report
from api_gateway.server import configure_logging, watchdog_of
from api_gateway.staff import Worker, hire
from api_gateway.welcome import welcome

logger = logging.getLogger(__name__)

START_TIMEOUT = 30.0  # seconds until a worker must serve
DRAIN_MARGIN = 3.5  # seconds a worker may take beyond its time to drain: its own watchdog ends it sooner
STOP_MARGIN = 4.5  # seconds the supervisor may take beyond that time
REPORT_MARGIN = 3.0  # seconds a worker that hangs has, beyond its time, to say where it hangs and end by itself
ANSWER_TIMEOUT = 0.5  # seconds for the workers to report, before what they said last is taken
SETTLED = 5.0  # seconds of life after which a worker's end is not put down to its start
FIRST_DELAY, LONGEST_DELAY = 0.25, 10.0  # seconds before a worker is replaced that has ended soon after its start
LEAVE_AFTER = 1.0  # seconds of such a delay from which on new connections go to the other workers


def delay_after(failures: int) -> float:
    """Return the seconds to wait before a start, after so many in a row that failed."""
    return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** min(failures - 1, 20)) if failures else 0.0


@dataclass(eq=False, slots=True)
class Post:
    """A place for one worker: its number, its sockets, who is there, and starts in a row that failed."""

    number: int
    sockets: Sockets
    worker: Worker | None = None
    failures: int = 0


@dataclass(eq=False, slots=True)
class Ledger:
    """What the workers count. `gone` is the sum of those that have ended."""

    workers: list[Worker] = field(default_factory=list)
    gone: Report = field(default_factory=lambda: merge([]))
    _asked: int = 0
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

    def strike(self, worker: Worker) -> None:
        """Keep what a worker that has ended had counted, and forget the rest."""
        self.workers.remove(worker)
        worker.report.end()
        self.gone = merge([self.gone, worker.report])

    async def _round(self, before: "asyncio.Task[dict[str, Any]] | None") -> dict[str, Any]:
        if before is not None:
            await asyncio.wait({before})
        self._running, self._next = self._next, None
        self._asked += 1
        answers = [worker.ask(self._asked) for worker in self.workers]
        if answers:
            await asyncio.wait(answers, timeout=ANSWER_TIMEOUT)
        return merge([self.gone, *(worker.report for worker in self.workers)]).state()


class Supervisor:
    """Runs a gateway of several workers."""

    def __init__(self, config: GatewayConfig, read: Callable[[], GatewayConfig]) -> None:
        """`read` reads the configuration anew; it raises ConfigError."""
        self._config = config
        self._read = read
        self._ledger = Ledger()
        self._posts: list[Post] = []
        self._stack = AsyncExitStack()
        self._store: EmbeddedStore | None = None
        self._demo: DemoUpstreams | None = None
        self._cut_off = 0
        self._stopping = asyncio.Event()
        self._reloading = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Supervisor [{len(self._ledger.workers)} workers]>"

    async def run(self) -> int:
        """Serve until told to stop; return the exit code. Raises StartupError."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        loop.add_signal_handler(signal.SIGHUP, self._reloading.set)
        watchdog = watchdog_of(self._config.server, STOP_MARGIN)
        with watchdog.on_duty():
            watchdog.watch()
            async with self._stack:
                await self._until_stopped(self._live())
        return CUT_OFF if self._cut_off else 0

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
        await self._provide()
        listeners = Listeners.of(self._config, server.workers)
        self._stack.callback(listeners.close)
        self._posts = [Post(number, sockets) for number, sockets in enumerate(listeners.sets, 1)]
        self._stack.push_async_callback(self._dismiss)
        await self._man()
        print(welcome(self._config, listeners.sets[0], server.workers), flush=True)  # noqa: T201 - for the person there
        async with asyncio.TaskGroup() as group:
            for post in self._posts:
                group.create_task(self._keep(post), name=f"post {post.number}")
            group.create_task(self._reload_when_asked(), name="reload")

    async def _provide(self) -> None:
        """Start what the workers have in common."""
        if self._config.is_demo and self._demo is None:
            self._demo = DemoUpstreams()
            await self._demo.start()
            self._stack.push_async_callback(self._demo.stop)
        if not self._config.store.is_shared and self._store is None:
            try:
                self._store = EmbeddedStore(find_server())
                self._stack.push_async_callback(self._store.stop)
                await self._store.start()
            except NoServer as error:
                raise StartupError(str(error)) from error

    async def _man(self) -> None:
        """Start a worker at every post: the first alone, so that what none can do is said once."""
        first, *others = self._posts
        await self._start(first)
        await asyncio.gather(*(self._start(post) for post in others))

    async def _start(self, post: Post) -> None:
        post.worker = await self._hire(post)
        if not await post.worker.is_ready(START_TIMEOUT):
            raise StartupError(f"worker {post.number} did not start")

    async def _dismiss(self) -> None:
        """Stop all workers; whoever takes too long is ended."""
        for post in self._posts:
            for sock in post.sockets:
                sock.close()  # the workers close theirs once they drain: from then on connections are refused
        workers = list(self._ledger.workers)
        for worker in workers:
            worker.terminate()
        await asyncio.gather(*(self._see_off(worker) for worker in workers))
        if self._cut_off:
            logger.error("%d requests were cut off in all", self._cut_off)

    # Workers

    async def _hire(self, post: Post) -> Worker:
        config = hand_over(self._config, self._demo.sections() if self._demo and self._config.is_demo else {})
        inherited = []
        if self._store is not None:
            config["store"] |= {"url": self._store.url, "clients": "sqlite"}  # it outlives no restart; the file does
            inherited.append(self._store.lifeline)
        server = self._config.server
        worker = await hire(
            post.number, config, post.sockets, inherited, self._ledger.gather, server.worker_timeout + REPORT_MARGIN
        )
        worker.drains_within = server.drain_delay + server.drain_timeout + DRAIN_MARGIN
        self._ledger.workers.append(worker)
        return worker

    async def _relieve(self, worker: Worker) -> None:
        """Stop one worker whose place another has taken, and wait for its end."""
        worker.relieve()
        await self._see_off(worker)

    async def _see_off(self, worker: Worker) -> None:
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
            self._ledger.strike(worker)

    async def _keep(self, post: Post) -> None:
        """Put another worker in the place of one that has ended by itself."""
        while True:
            worker = post.worker
            assert worker is not None  # noqa: S101 - started before
            code = await worker.wait()
            if worker is not post.worker:  # it was relieved
                continue
            self._ledger.strike(worker)
            lived = time.monotonic() - worker.started
            post.failures = post.failures + 1 if lived < SETTLED else 0
            delay = delay_after(post.failures)
            logger.error("%s ended with %d after %.1f s; another follows in %g s", worker, code, lived, delay)
            if delay >= LEAVE_AFTER:
                leave_group(post.sockets)
            await asyncio.sleep(delay)
            if worker is post.worker:
                post.worker = await self._hire(post)

    # Reloading

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reloading.wait()
            self._reloading.clear()
            await self._reload()

    async def _reload(self) -> None:
        """Take the configuration anew and relieve the workers one by one, or change nothing if it is wrong."""
        before = self._config
        try:
            self._config = self._settled(self._read())
            await self._provide()
        except ConfigError as error:
            self._config = before
            for problem in error.problems:
                logger.error("not reloaded: %s", problem)  # noqa: TRY400 - the message is all there is to say
            return
        configure_logging(self._config.log.level)
        for post in self._posts:
            if not await self._replace(post):
                if post is self._posts[0]:
                    self._config = before
                logger.error("not reloaded: a new worker %d did not start; the old ones go on", post.number)
                return
        logger.info("reloaded: all %d workers are new", len(self._posts))

    def _settled(self, read: GatewayConfig) -> GatewayConfig:
        """Return the configuration with what only a restart can change as it was."""
        was, server = self._config, read.server
        kept = {name: getattr(was.server, name) for name in ("host", "port", "workers")}
        changed = [f"server.{name}" for name, value in kept.items() if getattr(server, name) != value]
        if read.store.url != was.store.url:
            changed.append("store.url")
        for name in changed:
            logger.warning("%s has changed; that needs a restart of the gateway", name)
        sections = {
            "server": server.model_copy(update=kept),
            "store": read.store.model_copy(update={"url": was.store.url}),
        }
        return read.model_copy(update=sections)

    async def _replace(self, post: Post) -> bool:
        """Start a new worker beside the old one, then relieve that; tell whether the new one serves."""
        new = await self._hire(post)
        if not await new.is_ready(START_TIMEOUT):
            await self._relieve(new)
            return False
        old, post.worker, post.failures = post.worker, new, 0
        if old is not None and old in self._ledger.workers:
            old.report.is_over = True  # what it says of breakers and targets is not asked for any more
            await self._relieve(old)
        return True
