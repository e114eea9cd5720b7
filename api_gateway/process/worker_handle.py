"""A worker process as its supervisor sees it: the process, the channel to it, and its last report."""

import asyncio
import json
import logging
import math
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from api_gateway.process.listeners import Sockets
from api_gateway.process.worker_config import ENTRY, WorkerConfig
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reporting.snapshot import WorkerSnapshot
from api_gateway.reporting.snapshot_parts import split
from api_gateway.reporting.worker_channel import MAX_MESSAGE, REPLACED_SIGNAL, encode

logger = logging.getLogger(__name__)

Gather = Callable[[], Awaitable[dict[str, Any]]]
Reload = Callable[[str], Awaitable[ReloadOutcome]]  # given where the wish came from

WORKER_START_TIMEOUT = 30.0  # seconds until a worker must serve
MAX_SILENT_CHECKS = 10  # that must find a worker silent before it is taken to hang
MAX_SKEW = 60.0  # seconds that a message may have been on its way before the clocks are taken to be different


class Objection(NamedTuple):
    """Why a worker has not done a phase of a reload. `is_of_all`: the configuration is wrong, wherever it is tried."""

    problem: str
    is_of_all: bool = False


class WorkerHandle:
    """One worker. `report` is kept current by the worker; it may be looked at and not changed while it lives."""

    def __init__(
        self,
        number: int,
        process: Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        gather: Gather,
        reload: Reload,
        silence_timeout: float,
    ) -> None:
        """Kill it when, after its start, it has given no sign of life for `patience` seconds."""
        self.started = time.monotonic()
        self._served_since = math.inf
        self.snapshot = WorkerSnapshot.blank(str(number))
        self.cut_off = 0  # requests that it could not end in its time to drain
        self.drains_within = math.inf  # seconds it has to end, once it is told to
        self._number = number
        self._process = process
        self._reader, self._writer = streams
        self._gather = gather
        self._reload = reload
        self._ready = asyncio.get_running_loop().create_future()
        self._pending: dict[int, asyncio.Future[None]] = {}
        self._configuring: asyncio.Future[Objection | None] | None = None  # its answer to a phase of a reload
        self._configurations = 0
        self._replies: set[asyncio.Task[None]] = set()
        self._has_reported = False  # since the last look
        self._listening = asyncio.create_task(self._listen(), name=f"worker {number}")
        watching = asyncio.create_task(self._watch(silence_timeout), name=f"watch over worker {number}")
        self._listening.add_done_callback(lambda _: watching.cancel())

    def __repr__(self) -> str:
        return f"<worker {self._number} [{self._process.pid}]>"

    async def is_ready(self, within: float) -> bool:
        """Wait until it serves; False if it ends before, or takes too long."""
        await asyncio.wait({self._ready}, timeout=within)
        return self.has_served

    @property
    def has_served(self) -> bool:
        """Tell whether it has ever been ready."""
        return self._ready.done() and bool(self._ready.result())

    @property
    def seconds_served(self) -> float:
        """The seconds since it was ready; 0 if it has never been: how long its start took says nothing of it."""
        return max(0.0, time.monotonic() - self._served_since)

    async def wait(self) -> int:
        """Wait for its end and its last word; return the exit code, negative for a signal."""
        code = await self._process.wait()
        await asyncio.wait({self._listening})
        return code

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._signal(signal.SIGTERM)

    def replace(self) -> None:
        """Tell it that another one has taken its place; it drains and ends."""
        self._signal(REPLACED_SIGNAL)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def request_snapshot(self, number: int) -> asyncio.Future[None]:
        """Ask for a report; the future is done when `report` is newer than this, or will not get any newer."""
        reply = asyncio.get_running_loop().create_future()
        if self._listening.done() or not self._ready.done():
            reply.set_result(None)
        else:
            self._pending[number] = reply
            self._writer.write(encode("report", id=number))
        return reply

    @property
    def is_serving(self) -> bool:
        """True from when it is ready until it has ended or said its last word."""
        return self.has_served and not self._listening.done()

    async def configure(self, phase: str, within: float, **fields: Any) -> Objection | None:
        """Have it do a phase of a reload (`prepare` or `commit`); return what is in the way, None if nothing is."""
        self._configurations = number = self._configurations + 1
        reply: asyncio.Future[Objection | None] = asyncio.get_running_loop().create_future()
        self._configuring = reply
        if not self._listening.done():
            self._writer.write(encode(phase, id=number, **fields))
        waited: set[asyncio.Future[Any]] = {reply, self._listening}
        await asyncio.wait(waited, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        if reply.done():
            return reply.result()
        return Objection("it has ended" if self._listening.done() else f"it has not answered within {within:g} s")

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _listen(self) -> None:
        """Take its messages, until it closes the channel."""
        try:
            with suppress(OSError):
                while (line := await self._reader.readline()).endswith(b"\n"):
                    self._receive(json.loads(line))
        finally:
            self._writer.close()
            if not self._ready.done():
                self._ready.set_result(False)
            self._resolve(None)

    async def _watch(self, silence_timeout: float) -> None:
        """Kill it when it hangs. Looks are counted and not seconds: a supervisor that was stopped blames nobody.

        Before it serves it has nothing to say, so its time for that is added.
        """
        await asyncio.wait({self._ready}, timeout=WORKER_START_TIMEOUT)
        silent = 0
        while silent < MAX_SILENT_CHECKS:
            await asyncio.sleep(silence_timeout / MAX_SILENT_CHECKS)
            silent = 0 if self._has_reported else silent + 1
            self._has_reported = False
        logger.error("%r has given no sign of life for %g s and is ended", self, silence_timeout)
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
        if message["kind"] == "reload":
            self._reply_later(self._reply_to_reload(message["id"], message["origin"]))
            return
        self.snapshot.update(message["report"])
        if message["kind"] == "left":
            self.cut_off = message["cut_off"]
            self._resolve(None)
        elif message["kind"] == "gather":
            self._reply_later(self._reply_to_gather(message["id"], message["with_histories"]))
        else:
            self._resolve(message["answers"])

    def _on_ready(self, clock: float) -> None:
        """Believe that it serves, if its times mean here what they mean there."""
        is_shared = abs(time.monotonic() - clock) < MAX_SKEW
        if not is_shared:
            logger.error("%r has another monotonic clock: its windows cannot be added to the others'", self)
        if not self._ready.done():
            self._ready.set_result(is_shared)
            self._served_since = time.monotonic()

    def _reply_later(self, answering: Coroutine[Any, Any, None]) -> None:
        reply = asyncio.create_task(answering, name="answer")
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)

    async def _reply_to_reload(self, number: int, origin: str) -> None:
        outcome = await self._reload(origin)
        if not self._writer.is_closing():
            self._writer.write(encode("reloaded", id=number, outcome=outcome.state()))

    async def _reply_to_gather(self, number: int, with_histories: bool) -> None:  # noqa: FBT001 - as the message says
        snapshot = await self._gather()
        if not with_histories:
            snapshot = {**snapshot, "histories": {}}
        parts = list(split(snapshot))
        for count, part in enumerate(parts, 1):
            if self._writer.is_closing():
                return
            self._writer.write(encode("gathered", id=number, report=part, is_last=count == len(parts)))

    def _resolve(self, number: int | None) -> None:
        """Wake who has asked for this report or an earlier one; None wakes all."""
        for asked in [asked for asked in self._pending if number is None or asked <= number]:
            reply = self._pending.pop(asked)
            if not reply.done():
                reply.set_result(None)


async def spawn(
    number: int,
    config: dict[str, Any],
    sockets: Sockets,
    inherited: Sequence[int],
    gather: Gather,
    reload: Reload,
    silence_timeout: float,
) -> WorkerHandle:
    """Start a worker, by exec and not by fork: it takes the code as it is now, and nothing of this process's loop.

    It inherits `sockets` and the descriptors `inherited`; `gather` answers when it asks how all workers stand, and
    `reload` when it wants the configuration reloaded. Once it serves, or START_TIMEOUT is over, it is killed when it
    gives no sign of life for `patience` seconds.
    """
    ours, theirs = socket.socketpair()
    try:
        streams = await asyncio.open_unix_connection(sock=ours, limit=MAX_MESSAGE)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    listeners = [sock.fileno() for sock in sockets.public]
    admin = [sock.fileno() for sock in sockets.admin]
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", ENTRY, f"gateway worker {number}"),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=(theirs.fileno(), *listeners, *admin, *inherited),
            process_group=0,  # an interrupt at the terminal is for the supervisor, who passes it on
        )
    except BaseException:
        streams[1].close()
        theirs.close()
        raise
    worker_config = WorkerConfig(number, config, theirs.fileno(), listeners, admin)
    theirs.close()  # the worker has its own by that number
    worker = WorkerHandle(number, process, streams, gather, reload, silence_timeout)
    assert process.stdin is not None  # noqa: S101 - piped above
    process.stdin.write(worker_config.encode())
    process.stdin.close()
    return worker
