"""Who else serves: nobody, or the other workers, whom the supervisor asks on a worker's behalf.

Messages are lines of JSON over a socket pair. A worker sends `ready` once, `report` every second and when asked,
`gather` to hear how all stand, `reload` to have all take the configuration anew, `configured` in answer to `prepare`
and `commit`, and as its last word `left`; the supervisor sends `report` to ask, `prepare` and `commit` for the two
phases of a reload, and `gathered` and `reloaded` to answer.
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

from api_gateway.errors import StartupError
from api_gateway.eventloop.pacing import Steps, paced
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reporting.snapshot import UpstreamSnapshot, WorkerSnapshot, oldest_changed
from api_gateway.reporting.snapshot_parts import joined

logger = logging.getLogger(__name__)

TakeSnapshot = Callable[[], Steps[WorkerSnapshot]]

REPLACED_SIGNAL = signal.SIGUSR1  # tells a worker that another one has taken its place

SNAPSHOT_INTERVAL = 1.0  # seconds: what is counted in them is what a killed worker takes with it
GATHER_TIMEOUT = 1.0  # seconds for the supervisor to answer, who gives the workers half of that
MAX_MESSAGE = 64 * 1024 * 1024  # bytes
MAX_UNSENT = 8 * 1024 * 1024  # bytes: a supervisor that does not read gets nothing new


class Reconfigurable(Protocol):
    """What serves in this process, as the supervisor brings it to another configuration in two phases."""

    async def prepare(self, values: dict[str, Any]) -> None:
        """Do all that may fail on the way to a configuration that was handed over. Raises StartupError."""
        ...

    def commit(self) -> None:
        """Put what was prepared last into force."""
        ...

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration of this process, where it serves alone."""
        ...


class Aggregator(Protocol):
    """Those who serve."""

    def register(self, take_snapshot: TakeSnapshot, configured: "Reconfigurable | None" = None) -> None:
        """Say how to look at the process that serves here, and how to bring it to another configuration."""
        ...

    async def reload(self, origin: str) -> ReloadOutcome:
        """Have all take the configuration anew, or none. `origin` says who wants it."""
        ...

    async def gather(self, *, with_histories: bool = False) -> WorkerSnapshot:
        """Return the report of all together; the histories of the breakers come when asked for, as they are large."""
        ...


class SingleProcess:
    """The crew of a single process: its report is the report of all, and the recorder in it is the live one."""

    def __init__(self) -> None:
        self._take_snapshot: TakeSnapshot = _nothing
        self._reconfigurable: Reconfigurable | None = None

    def register(self, take_snapshot: TakeSnapshot, configured: Reconfigurable | None = None) -> None:
        """See `Aggregator`."""
        self._take_snapshot, self._reconfigurable = take_snapshot, configured

    async def gather(self, *, with_histories: bool = False) -> WorkerSnapshot:  # noqa: ARG002 - they are at hand
        """See `Aggregator`."""
        return await paced(self._take_snapshot())

    async def reload(self, origin: str) -> ReloadOutcome:
        """See `Aggregator`."""
        assert self._reconfigurable is not None  # noqa: S101 - whoever asks is served
        return await self._reconfigurable.reload(origin)


class SupervisorChannel:
    """One of several workers: tells the supervisor how it stands, and asks it how all stand."""

    def __init__(self, channel: socket.socket, on_orphaned: Callable[[], None]) -> None:
        """`on_orphaned` is called when the supervisor is gone."""
        self._channel = channel
        self._on_orphaned = on_orphaned
        self._take_snapshot: TakeSnapshot = _nothing
        self._reconfigurable: Reconfigurable | None = None
        self._since = 0  # the first slice that the supervisor may not know as it is
        self._known: dict[str, UpstreamSnapshot] = {}  # what it was last told of each upstream
        self._send_lock = asyncio.Lock()  # a report that was begun earlier is sent earlier
        self._number = 0
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._parts: dict[int, list[dict[str, Any]]] = {}  # of answers that are not complete
        self._last: Any = None  # what was last gathered
        self._tasks: list[asyncio.Task[None]] = []
        self._preparing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<SupervisorChannel [{len(self._pending)} asked]>"

    def register(self, take_snapshot: TakeSnapshot, configured: Reconfigurable | None = None) -> None:
        """See `Aggregator`."""
        self._take_snapshot, self._reconfigurable = take_snapshot, configured

    async def connect(self) -> None:
        """Begin to listen to the supervisor."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_MESSAGE)
        self._tasks.append(asyncio.create_task(self._listen(reader), name="crew"))

    def announce_ready(self) -> None:
        """Tell that this worker serves, and report from now on."""
        self._send("ready", clock=time.monotonic())
        self._tasks.append(asyncio.create_task(self._report_periodically(), name="reports"))

    async def close(self, cut_off: int = 0) -> None:
        """Report for the last time, with what could not be ended in time, and stop listening."""
        for task in self._tasks:
            task.cancel()
        await self._send_snapshot("left", cut_off=cut_off)
        with suppress(OSError):  # the supervisor may have gone before
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()

    async def gather(self, *, with_histories: bool = False) -> WorkerSnapshot:
        """Return the report of all together.

        What is shown has passed through the supervisor, who keeps it: so nothing that was shown once falls when this
        worker or another dies. For the same reason a supervisor that does not answer is made up for by its last
        answer, and by this worker's own report only if there was none.
        """
        self._number = number = self._number + 1
        reply = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send_snapshot("gather", id=number, with_histories=with_histories)
            async with asyncio.timeout(GATHER_TIMEOUT):
                self._last = await reply
        except TimeoutError:
            logger.warning("the supervisor has not answered within %g s; what is shown may be old", GATHER_TIMEOUT)
        finally:
            del self._pending[number]
        own = await paced(self._take_snapshot())
        if self._last is None:
            return own
        snapshot = WorkerSnapshot.blank(percentiles=own.recorder.percentiles)
        await paced(snapshot.updating(self._last))
        return snapshot

    async def reload(self, origin: str) -> ReloadOutcome:
        """See `Aggregator`; the supervisor reads the configuration and has every worker take it."""
        self._number = number = self._number + 1
        reply = self._pending[number] = asyncio.get_running_loop().create_future()
        self._send("reload", id=number, origin=origin)
        try:
            return ReloadOutcome.from_state(await reply)
        finally:
            del self._pending[number]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while (line := await reader.readline()).endswith(b"\n"):
                message = json.loads(line)
                if message["kind"] == "report":
                    await self._report(replies=message["id"])
                elif message["kind"] == "prepare":
                    self._preparing = asyncio.create_task(self._prepare(message), name="configuration")
                elif message["kind"] == "commit":
                    self._commit(message["id"])
                elif message["kind"] == "gathered":
                    self._receive_part(message)
                else:
                    self._resolve(message["id"], message["outcome"])
                await asyncio.sleep(0)  # lines that have all arrived are read without a pause
        self._on_orphaned()

    def _receive_part(self, message: dict[str, Any]) -> None:
        """Take one part of a report; the last completes it."""
        parts = self._parts.setdefault(message["id"], [])
        parts.append(message["report"])
        if message["is_last"]:
            self._resolve(message["id"], joined(self._parts.pop(message["id"])))

    def _resolve(self, number: int, reply: dict[str, Any]) -> None:
        asked = self._pending.get(number)
        if asked is not None and not asked.done():
            asked.set_result(reply)

    async def _prepare(self, message: dict[str, Any]) -> None:
        """Do the first phase of a reload, and say whether anything is in its way."""
        assert self._reconfigurable is not None  # noqa: S101 - nobody is asked who has not said that it is ready
        objection: tuple[str, bool] | None = None
        try:
            await self._reconfigurable.prepare(message["config"])
        except StartupError as error:
            objection = str(error), True
        except Exception as error:
            logger.exception("configuration")
            objection = f"it failed: {type(error).__name__}", False
        self._send("configured", id=message["id"], objection=objection)

    def _commit(self, number: int) -> None:
        """Do the second phase. What fails here ends the worker: another takes its place, on the new configuration."""
        assert self._reconfigurable is not None  # noqa: S101 - it was asked to prepare before
        objection = None
        try:
            self._reconfigurable.commit()
        except Exception as error:
            logger.exception("configuration")
            objection = f"it failed: {type(error).__name__}", False
        self._send("configured", id=number, objection=objection)

    async def _report_periodically(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL)
            await self._report()

    async def _report(self, replies: int = 0) -> None:
        if self._writer.transport.get_write_buffer_size() < MAX_UNSENT:
            await self._send_snapshot("report", answers=replies)

    async def _send_snapshot(self, kind: str, **fields: Any) -> None:
        """Send a message with what has changed since the last time."""
        async with self._send_lock:
            since = oldest_changed(time.monotonic())
            snapshot = await paced(self._take_snapshot())
            state = await paced(snapshot.describing(self._since, self._known))
            self._since, self._known = since, snapshot.upstreams
            self._send(kind, **fields, report=state)

    def _send(self, kind: str, **fields: Any) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(kind, **fields))


def _nothing() -> Steps[WorkerSnapshot]:
    yield from ()
    return WorkerSnapshot.blank()


def encode(kind: str, **fields: Any) -> bytes:
    """Return a message as it travels."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"
