"""Who else serves: nobody, or the other workers, whom the supervisor asks on a worker's behalf.

Messages are lines of JSON over a socket pair. A worker sends `ready` once, `report` every second and when asked,
`gather` to hear how all stand, and as its last word `left`; the supervisor sends `report` to ask and `gathered` to
answer.
"""

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from api_gateway.report import Report, oldest_changed

logger = logging.getLogger(__name__)

Look = Callable[[], Report]

RELIEF = signal.SIGUSR1  # tells a worker that another one has taken its place

REPORT_INTERVAL = 1.0  # seconds: what is counted in them is what a killed worker takes with it
PATIENCE = 1.0  # seconds for the supervisor to answer, who gives the workers half of that
MAX_MESSAGE = 64 * 1024 * 1024  # bytes
MAX_UNSENT = 8 * 1024 * 1024  # bytes: a supervisor that does not read gets nothing new


class Crew(Protocol):
    """Those who serve."""

    def enlist(self, look: Look) -> None:
        """Say how to look at the process that serves here."""
        ...

    async def gather(self, *, with_histories: bool = False) -> Report:
        """Return the report of all together; the histories of the breakers come when asked for, as they are large."""
        ...


class Alone:
    """The crew of a single process: its report is the report of all, and the recorder in it is the live one."""

    def __init__(self) -> None:
        self._look: Look = Report.blank

    def enlist(self, look: Look) -> None:
        """See `Crew`."""
        self._look = look

    async def gather(self, *, with_histories: bool = False) -> Report:  # noqa: ARG002 - they are at hand
        """See `Crew`."""
        return self._look()


class Member:
    """One of several workers: tells the supervisor how it stands, and asks it how all stand."""

    def __init__(self, channel: socket.socket, on_orphaned: Callable[[], None]) -> None:
        """`on_orphaned` is called when the supervisor is gone."""
        self._channel = channel
        self._on_orphaned = on_orphaned
        self._look: Look = Report.blank
        self._since = 0  # the first slice that the supervisor may not know as it is
        self._number = 0
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._last: Any = None  # what was last gathered
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<Member [{len(self._asked)} asked]>"

    def enlist(self, look: Look) -> None:
        """See `Crew`."""
        self._look = look

    async def join(self) -> None:
        """Begin to listen to the supervisor."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_MESSAGE)
        self._tasks.append(asyncio.create_task(self._listen(reader), name="crew"))

    def say_ready(self) -> None:
        """Tell that this worker serves, and report from now on."""
        self._say("ready", clock=time.monotonic())
        self._tasks.append(asyncio.create_task(self._report_regularly(), name="reports"))

    async def leave(self, cut_off: int = 0) -> None:
        """Report for the last time, with what could not be ended in time, and stop listening."""
        for task in self._tasks:
            task.cancel()
        self._say("left", cut_off=cut_off, report=self._state())
        with suppress(OSError):  # the supervisor may have gone before
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()

    async def gather(self, *, with_histories: bool = False) -> Report:
        """Return the report of all together.

        What is shown has passed through the supervisor, who keeps it: so nothing that was shown once falls when this
        worker or another dies. For the same reason a supervisor that does not answer is made up for by its last
        answer, and by this worker's own report only if there was none.
        """
        self._number = number = self._number + 1
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self._say("gather", id=number, with_histories=with_histories, report=self._state())
        try:
            async with asyncio.timeout(PATIENCE):
                self._last = await answer
        except TimeoutError:
            logger.warning("the supervisor has not answered within %g s; what is shown may be old", PATIENCE)
        finally:
            del self._asked[number]
        own = self._look()
        if self._last is None:
            return own
        report = Report.blank(percentiles=own.recorder.percentiles)
        report.update(self._last)
        return report

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while (line := await reader.readline()).endswith(b"\n"):
                message = json.loads(line)
                if message["kind"] == "report":
                    self._report(answers=message["id"])
                elif (asked := self._asked.get(message["id"])) is not None and not asked.done():
                    asked.set_result(message["report"])
        self._on_orphaned()

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL)
            self._report()

    def _report(self, answers: int = 0) -> None:
        if self._writer.transport.get_write_buffer_size() < MAX_UNSENT:
            self._say("report", answers=answers, report=self._state())

    def _state(self) -> dict[str, Any]:
        """Return what has changed since the last time."""
        since, self._since = self._since, oldest_changed(time.monotonic())
        return self._look().state(since)

    def _say(self, kind: str, **fields: Any) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(kind, **fields))


def encode(kind: str, **fields: Any) -> bytes:
    """Return a message as it travels."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"
