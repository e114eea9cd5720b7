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
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from api_gateway.brief import ENTRY, Brief
from api_gateway.crew import MAX_MESSAGE, RELIEF, encode
from api_gateway.listening import Sockets
from api_gateway.report import Report, split

logger = logging.getLogger(__name__)

Gather = Callable[[], Awaitable[dict[str, Any]]]

LOOKS = 10  # that must find a worker silent before it is taken to hang
MAX_SKEW = 60.0  # seconds that a message may have been on its way before the clocks are taken to be different


class Worker:
    """One worker. `report` is kept current by the worker; it may be looked at and not changed while it lives."""

    def __init__(
        self,
        number: int,
        process: Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        gather: Gather,
        patience: float,
    ) -> None:
        """Kill it when it has given no sign of life for `patience` seconds."""
        self.started = time.monotonic()
        self.report = Report.blank(str(number))
        self.cut_off = 0  # requests that it could not end in its time to drain
        self.drains_within = math.inf  # seconds it has to end, once it is told to
        self._number = number
        self._process = process
        self._reader, self._writer = streams
        self._gather = gather
        self._ready = asyncio.get_running_loop().create_future()
        self._asked: dict[int, asyncio.Future[None]] = {}
        self._answers: set[asyncio.Task[None]] = set()
        self._is_heard = False  # since the last look
        self._listening = asyncio.create_task(self._listen(), name=f"worker {number}")
        watching = asyncio.create_task(self._watch(patience), name=f"watch over worker {number}")
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

    async def wait(self) -> int:
        """Wait for its end and its last word; return the exit code, negative for a signal."""
        code = await self._process.wait()
        await asyncio.wait({self._listening})
        return code

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._signal(signal.SIGTERM)

    def relieve(self) -> None:
        """Tell it that another one has taken its place; it drains and ends."""
        self._signal(RELIEF)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def ask(self, number: int) -> asyncio.Future[None]:
        """Ask for a report; the future is done when `report` is newer than this, or will not get any newer."""
        answer = asyncio.get_running_loop().create_future()
        if self._listening.done() or not self._ready.done():
            answer.set_result(None)
        else:
            self._asked[number] = answer
            self._writer.write(encode("report", id=number))
        return answer

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _listen(self) -> None:
        """Take its messages, until it closes the channel."""
        try:
            with suppress(OSError):
                while (line := await self._reader.readline()).endswith(b"\n"):
                    self._take(json.loads(line))
        finally:
            self._writer.close()
            if not self._ready.done():
                self._ready.set_result(False)
            self._answered(None)

    async def _watch(self, patience: float) -> None:
        """Kill it when it hangs. Looks are counted and not seconds: a supervisor that was stopped blames nobody."""
        silent = 0
        while silent < LOOKS:
            await asyncio.sleep(patience / LOOKS)
            silent = 0 if self._is_heard else silent + 1
            self._is_heard = False
        logger.error("%r has given no sign of life for %g s and is ended", self, patience)
        self.kill()

    def _take(self, message: dict[str, Any]) -> None:
        self._is_heard = True
        if message["kind"] == "ready":
            self._on_ready(message["clock"])
            return
        self.report.update(message["report"])
        if message["kind"] == "left":
            self.cut_off = message["cut_off"]
            self._answered(None)
        elif message["kind"] == "gather":
            answer = asyncio.create_task(self._answer(message["id"], message["with_histories"]), name="answer")
            self._answers.add(answer)
            answer.add_done_callback(self._answers.discard)
        else:
            self._answered(message["answers"])

    def _on_ready(self, clock: float) -> None:
        """Believe that it serves, if its times mean here what they mean there."""
        is_shared = abs(time.monotonic() - clock) < MAX_SKEW
        if not is_shared:
            logger.error("%r has another monotonic clock: its windows cannot be added to the others'", self)
        if not self._ready.done():
            self._ready.set_result(is_shared)

    async def _answer(self, number: int, with_histories: bool) -> None:  # noqa: FBT001 - as the message says
        report = await self._gather()
        if not with_histories:
            report = {**report, "histories": {}}
        parts = list(split(report))
        for count, part in enumerate(parts, 1):
            if self._writer.is_closing():
                return
            self._writer.write(encode("gathered", id=number, report=part, is_last=count == len(parts)))

    def _answered(self, number: int | None) -> None:
        """Wake who has asked for this report or an earlier one; None wakes all."""
        for asked in [asked for asked in self._asked if number is None or asked <= number]:
            answer = self._asked.pop(asked)
            if not answer.done():
                answer.set_result(None)


async def hire(
    number: int,
    config: dict[str, Any],
    sockets: Sockets,
    inherited: Sequence[int],
    gather: Gather,
    patience: float,
) -> Worker:
    """Start a worker, by exec and not by fork: it takes the code as it is now, and nothing of this process's loop.

    It inherits `sockets` and the descriptors `inherited`; `gather` answers when it asks how all workers stand. One
    that gives no sign of life for `patience` seconds is killed.
    """
    ours, theirs = socket.socketpair()
    streams = await asyncio.open_unix_connection(sock=ours, limit=MAX_MESSAGE)
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
    brief = Brief(number, config, theirs.fileno(), listeners, admin)
    theirs.close()  # the worker has its own by that number
    worker = Worker(number, process, streams, gather, patience)
    assert process.stdin is not None  # noqa: S101 - piped above
    process.stdin.write(brief.encode())
    process.stdin.close()
    return worker
