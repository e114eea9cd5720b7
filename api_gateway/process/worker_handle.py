"""The supervisor's handle of a worker: the process, the channel to it, and its last snapshot."""

import asyncio
import json
import logging
import math
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from api_gateway.process.listeners import WorkerSockets
from api_gateway.process.worker_config import ENTRY, WorkerConfig
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.reporting.snapshot_parts import split
from api_gateway.reporting.worker_channel import MAX_MESSAGE, REPLACED_SIGNAL, encode

logger = logging.getLogger(__name__)

Gather = Callable[[], Awaitable[dict[str, Any]]]
Reload = Callable[[str], Awaitable[ReloadOutcome]]  # takes the origin of the request
Query = Callable[[dict[str, Any]], Awaitable[tuple[list[str], bool]]]  # the results of all workers; are they complete

WORKER_START_TIMEOUT = 30.0  # seconds for a worker to become ready
MAX_SILENT_CHECKS = 10  # consecutive checks without a message, after which a worker counts as hanging
MAX_SKEW = 60.0  # seconds: the largest transit time of a message; beyond it the clocks are considered different


class Objection(NamedTuple):
    """Why a worker has not completed a phase of a reload. `is_of_all`: the configuration is wrong for every worker."""

    problem: str
    is_of_all: bool = False


class WorkerHandle:
    """One worker process. `snapshot` is updated by the worker's messages and is read-only for others while it runs.

    States: starting, serving (`is_serving`), ended (the channel is closed). A worker that ends before it is ready
    goes from starting to ended.
    """

    def __init__(
        self,
        number: int,
        process: Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        gather: Gather,
        reload: Reload,
        query: Query,
        silence_timeout: float,
    ) -> None:
        """Kill the worker if, after its start, it sends no message for `silence_timeout` seconds."""
        self.started = time.monotonic()
        self._served_since = math.inf
        self.snapshot = WorkerSnapshot.blank(str(number))
        self.cut_off = 0  # requests that did not end within the drain time
        self.drains_within = math.inf  # seconds to exit after a stop signal
        self._number = number
        self._process = process
        self._reader, self._writer = streams
        self._gather = gather
        self._reload = reload
        self._query = query
        self._queried: dict[int, asyncio.Future[str | None]] = {}
        self._ready = asyncio.get_running_loop().create_future()
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._configuring: asyncio.Future[Objection | None] | None = None  # the reply to a phase of a reload
        self._configurations = 0
        self._replies: set[asyncio.Task[None]] = set()
        self._has_reported = False  # since the last check
        self._listening = asyncio.create_task(self._listen(), name=f"worker {number}")
        watching = asyncio.create_task(self._watch(silence_timeout), name=f"watch over worker {number}")
        self._listening.add_done_callback(lambda _: watching.cancel())

    def __repr__(self) -> str:
        return f"<worker {self._number} [{self._process.pid}]>"

    async def is_ready(self, within: float) -> bool:
        """Wait until the worker serves; return False if it ends before, or is not ready `within` seconds."""
        await asyncio.wait({self._ready}, timeout=within)
        return self.has_served

    @property
    def has_served(self) -> bool:
        """True once the worker has been ready."""
        return self._ready.done() and bool(self._ready.result())

    @property
    def seconds_served(self) -> float:
        """The seconds since the worker became ready, without the time of its start; 0 if it never did."""
        return max(0.0, time.monotonic() - self._served_since)

    async def wait(self) -> int:
        """Wait for the exit and the last message; return the exit code, negative for a signal."""
        code = await self._process.wait()
        await asyncio.wait({self._listening})
        return code

    def terminate(self) -> None:
        """Send SIGTERM: the worker drains and exits."""
        self._signal(signal.SIGTERM)

    def replace(self) -> None:
        """Signal that another worker has replaced this one: it drains without delay and exits."""
        self._signal(REPLACED_SIGNAL)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def request_snapshot(self, number: int) -> asyncio.Future[None]:
        """Request a snapshot; the future is done when `snapshot` has been updated since, or the worker has ended."""
        reply = asyncio.get_running_loop().create_future()
        if self._listening.done() or not self._ready.done():
            reply.set_result(None)
        else:
            self._pending[number] = reply
            self._writer.write(encode("snapshot", id=number))
        return reply

    def query(self, number: int, query: dict[str, Any]) -> asyncio.Future[str | None]:
        """Run a query in the worker; the future has the result as JSON, None if the worker does not serve."""
        reply: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        if self.is_serving:
            self._queried[number] = reply
            reply.add_done_callback(lambda _: self._queried.pop(number, None))
            self._writer.write(encode("query", id=number, query=query))
        else:
            reply.set_result(None)
        return reply

    @property
    def is_serving(self) -> bool:
        """True from ready until the channel is closed."""
        return self.has_served and not self._listening.done()

    async def configure(self, phase: str, within: float, **fields: Any) -> Objection | None:
        """Run a phase of a reload (`prepare` or `commit`) in the worker; return its objection, or None."""
        self._configurations = number = self._configurations + 1
        reply: asyncio.Future[Objection | None] = asyncio.get_running_loop().create_future()
        self._configuring = reply
        if not self._listening.done():
            self._writer.write(encode(phase, id=number, **fields))
        waited: set[asyncio.Future[Any]] = {reply, self._listening}
        await asyncio.wait(waited, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            return reply.result()
        return Objection("it has exited" if self._listening.done() else f"no reply within {within:g} s")

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _listen(self) -> None:
        """Process the messages of the worker until it closes the channel.

        A worker whose messages cannot be processed is killed, so that another replaces it: without its figures and
        replies it would be counted as serving and take part in nothing.
        """
        try:
            with suppress(OSError):
                while (line := await self._reader.readline()).endswith(b"\n"):
                    self._receive(json.loads(line))
        except Exception:  # whatever is wrong with a message, the worker has to be replaced
            logger.exception("%r has sent a message that cannot be processed, and is killed", self)
            self.kill()
        finally:
            self._writer.close()
            if not self._ready.done():
                self._ready.set_result(False)
            self._resolve(None)
            for queried in list(self._queried.values()):
                if not queried.done():
                    queried.set_result(None)

    async def _watch(self, silence_timeout: float) -> None:
        """Kill the worker if it sends no message in MAX_SILENT_CHECKS checks.

        Checks are counted and not seconds, so that no worker is killed because the supervisor was stopped (SIGSTOP).
        A worker sends nothing before it serves, so the checks begin after WORKER_START_TIMEOUT at the latest.
        """
        await asyncio.wait({self._ready}, timeout=WORKER_START_TIMEOUT)
        silent = 0
        while silent < MAX_SILENT_CHECKS:
            await asyncio.sleep(silence_timeout / MAX_SILENT_CHECKS)
            silent = 0 if self._has_reported else silent + 1
            self._has_reported = False
        logger.error("%r has sent no message for %g s and is killed", self, silence_timeout)
        self.kill()

    def _receive(self, message: dict[str, Any]) -> None:
        self._has_reported = True
        if message["kind"] == "ready":
            self._on_ready(message["clock"])
            return
        if message["kind"] == "configured":
            if message["id"] == self._configurations and self._configuring and not self._configuring.done():
                objection = message["objection"]
                self._configuring.set_result(None if objection is None else Objection(*objection))
            return
        if message["kind"] == "result":
            queried = self._queried.get(message["id"])
            if queried is not None and not queried.done():
                queried.set_result(message["result"])
            return
        if message["kind"] == "query":
            self._reply_later(self._reply_to_query(message["id"], message["query"]))
            return
        if message["kind"] == "reload":
            self._reply_later(self._reply_to_reload(message["id"], message["origin"]))
            return
        self.snapshot.update(message["snapshot"])
        if message["kind"] == "left":
            self.cut_off = message["cut_off"]
            self._resolve(None)
        elif message["kind"] == "gather":
            self._reply_later(self._reply_to_gather(message))
        else:
            self._resolve(message["replies"])

    def _on_ready(self, clock: float) -> None:
        """Accept that the worker serves if its monotonic clock is the same as here."""
        is_shared = abs(time.monotonic() - clock) < MAX_SKEW
        if not is_shared:
            logger.error(
                "%r has a different monotonic clock; its windows cannot be merged with those of other workers", self
            )
        if not self._ready.done():
            self._ready.set_result(is_shared)
            self._served_since = time.monotonic()

    def _reply_later(self, replying: Coroutine[Any, Any, None]) -> None:
        reply = asyncio.create_task(replying, name="reply")
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)

    async def _reply_to_reload(self, number: int, origin: str) -> None:
        outcome = await self._reload(origin)
        if not self._writer.is_closing():
            self._writer.write(encode("reloaded", id=number, outcome=outcome.state()))

    async def _reply_to_query(self, number: int, query: dict[str, Any]) -> None:
        results, is_complete = await self._query(query)
        if not self._writer.is_closing():
            self._writer.write(encode("results", id=number, results=results, is_complete=is_complete))

    async def _reply_to_gather(self, message: Mapping[str, Any]) -> None:
        number, snapshot = message["id"], await self._gather()
        if not message["with_histories"]:
            snapshot = {**snapshot, "histories": {}}
        if not message["with_points"]:
            snapshot = {**snapshot, "points": []}
        parts = list(split(snapshot))
        for count, part in enumerate(parts, 1):
            if self._writer.is_closing():
                return
            self._writer.write(encode("gathered", id=number, snapshot=part, is_last=count == len(parts)))

    def _resolve(self, number: int | None) -> None:
        """Complete the requests for this snapshot and earlier ones; None completes all."""
        for queried in [queried for queried in self._pending if number is None or queried <= number]:
            reply = self._pending.pop(queried)
            if not reply.done():
                reply.set_result(None)


async def spawn(
    number: int,
    config: dict[str, Any],
    sockets: WorkerSockets,
    inherited: Sequence[int],
    gather: Gather,
    reload: Reload,
    query: Query,
    silence_timeout: float,
) -> WorkerHandle:
    """Start a worker, by exec and not by fork: it runs the installed code and shares no state of this process's loop.

    It inherits `sockets` and the descriptors `inherited`. `gather` is called when it requests the merged snapshot,
    `reload` when it requests a reload, `query` when it asks all workers. Once it serves, or after
    WORKER_START_TIMEOUT, it is killed if it sends no message for `silence_timeout` seconds.
    """
    supervisor_end, worker_end = socket.socketpair()
    try:
        streams = await asyncio.open_unix_connection(sock=supervisor_end, limit=MAX_MESSAGE)
    except BaseException:
        supervisor_end.close()
        worker_end.close()
        raise
    listeners = [sock.fileno() for sock in sockets.public]
    admin = [sock.fileno() for sock in sockets.admin]
    redirect = [sock.fileno() for sock in sockets.redirect]
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", ENTRY, f"gateway worker {number}"),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(worker_end.fileno(), *listeners, *admin, *redirect, *inherited),
            process_group=0,  # a SIGINT of the terminal goes to the supervisor, which stops the workers
        )
    except BaseException:
        streams[1].close()
        worker_end.close()
        raise
    worker_config = WorkerConfig(number, config, worker_end.fileno(), listeners, admin, redirect)
    worker_end.close()  # the worker has inherited it
    worker = WorkerHandle(number, process, streams, gather, reload, query, silence_timeout)
    assert process.stdin is not None  # noqa: S101 - piped above
    process.stdin.write(worker_config.encode())
    process.stdin.close()
    return worker
