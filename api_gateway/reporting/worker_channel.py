"""The channel between a worker and the supervisor, for snapshots and reloads; and its counterpart in a single process.

Messages are lines of JSON over a socket pair. A worker sends `ready` once; `snapshot` every second and on request;
`gather` to request the merged snapshot; `reload` to request a reload in all workers; `query` to have all workers
queried; `configured` in response to `prepare` and `commit`, `result` in response to `query`; and `left` as its last
message. The supervisor sends `snapshot` to request a snapshot; `prepare` and `commit` for the two phases of a reload;
`query`; and `gathered`, `reloaded` and `results` in response.
"""

import asyncio
import json
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from api_gateway.errors import StartupError
from api_gateway.eventloop.steps import Steps, run_in_steps
from api_gateway.reload.outcome import ReloadOutcome
from api_gateway.reporting.snapshot import UpstreamSnapshot, WorkerSnapshot, oldest_changed
from api_gateway.reporting.snapshot_parts import joined

logger = logging.getLogger(__name__)

TakeSnapshot = Callable[[], Steps[WorkerSnapshot]]
RunQuery = Callable[[dict[str, Any]], Steps[Any]]  # a query and its result, as JSON values

REPLACED_SIGNAL = signal.SIGUSR1  # sent to a worker that another one replaces

SNAPSHOT_INTERVAL = 1.0  # seconds; counts of the last interval are lost if a worker is killed
QUERY_TIMEOUT = 2.0  # seconds for the supervisor to respond with the results of all workers
GATHER_TIMEOUT = 5.0  # seconds for the supervisor to respond, half of what Prometheus waits by default
MAX_MESSAGE = 64 * 1024 * 1024  # bytes
MAX_UNSENT = 8 * 1024 * 1024  # bytes unread by the supervisor from which no snapshot is sent


class QueryResults(NamedTuple):
    """The results of a query in all workers. `is_complete` False: a worker did not respond in time."""

    values: list[Any]
    is_complete: bool = True


class Reconfigurable(Protocol):
    """The gateway in this process, to which a new configuration is applied in two phases."""

    async def prepare(self, values: dict[str, Any]) -> None:
        """Do all steps to the given configuration that may fail. Raises StartupError."""
        ...

    def commit(self) -> None:
        """Put the configuration that was prepared last into force."""
        ...

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration of a single process, in both phases."""
        ...


class Aggregator(Protocol):
    """Access to all workers of the gateway: their merged snapshot, queries of each, and reloads.

    `worker` is the name of this process among several workers; empty if it is the only one.
    """

    worker: str

    def register(self, take_snapshot: TakeSnapshot, configured: "Reconfigurable | None" = None) -> None:
        """Set the source of this process's snapshots, and the object that applies configurations."""
        ...

    def respond_by(self, run_query: RunQuery) -> None:
        """Set the function that runs queries in this process."""
        ...

    async def query(self, query: dict[str, Any]) -> QueryResults:
        """Run a query, a JSON object, in all workers, and return their results."""
        ...

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration in all workers or none. `origin` names the cause, for the log."""
        ...

    async def gather(self, *, with_histories: bool = False, with_points: bool = False) -> WorkerSnapshot:
        """Return the merged snapshot of all workers.

        With the histories of breakers and the points of the last hour's traffic, which are large, on request.
        """
        ...


class SingleProcess:
    """The aggregator of a single process. The recorder in its snapshots is the live one."""

    def __init__(self) -> None:
        self.worker = ""
        self._take_snapshot: TakeSnapshot = _nothing
        self._run_query: RunQuery = _no_result
        self._reconfigurable: Reconfigurable | None = None

    def respond_by(self, run_query: RunQuery) -> None:
        """Set the function that runs queries."""
        self._run_query = run_query

    async def query(self, query: dict[str, Any]) -> QueryResults:
        """Return the result of this process."""
        return QueryResults([await run_in_steps(self._run_query(query))])

    def register(self, take_snapshot: TakeSnapshot, configured: Reconfigurable | None = None) -> None:
        """Set the source of snapshots, and the object that applies configurations."""
        self._take_snapshot, self._reconfigurable = take_snapshot, configured

    async def gather(self, *, with_histories: bool = False, with_points: bool = False) -> WorkerSnapshot:  # noqa: ARG002 - always included
        """Return the snapshot of this process, with histories and points."""
        return await run_in_steps(self._take_snapshot())

    async def reload(self, origin: str) -> ReloadOutcome:
        """Reload the configuration of this process."""
        assert self._reconfigurable is not None  # noqa: S101 - a process that gets requests has registered
        return await self._reconfigurable.reload(origin)


class SupervisorChannel:
    """A worker's end of the channel: sends its snapshots to the supervisor, and requests merged ones and reloads.

    States, in this order: created; connected (`connect`: messages are read); ready (`announce_ready`: a snapshot is
    sent every second); closed (`close`). `gather` and `reload` require a connected channel.
    """

    def __init__(self, channel: socket.socket, on_orphaned: Callable[[], None], worker: str = "1") -> None:
        """`on_orphaned` is called when the supervisor has ended. `worker` is the name of this worker."""
        self.worker = worker
        self._channel = channel
        self._on_orphaned = on_orphaned
        self._take_snapshot: TakeSnapshot = _nothing
        self._run_query: RunQuery = _no_result
        self._queries: set[asyncio.Task[None]] = set()
        self._reconfigurable: Reconfigurable | None = None
        self._since = 0  # number of the first slice that may have changed since the last message
        self._known: dict[str, UpstreamSnapshot] = {}  # upstreams as in the last message
        self._send_lock = asyncio.Lock()  # snapshots are sent in the order in which they were begun
        self._number = 0
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._parts: dict[int, list[dict[str, Any]]] = {}  # of incomplete responses
        self._last: Any = None  # the last merged state
        self._tasks: list[asyncio.Task[None]] = []
        self._preparing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<SupervisorChannel [{len(self._pending)} pending]>"

    def register(self, take_snapshot: TakeSnapshot, configured: Reconfigurable | None = None) -> None:
        """Set the source of this worker's snapshots, and the object that applies configurations."""
        self._take_snapshot, self._reconfigurable = take_snapshot, configured

    def respond_by(self, run_query: RunQuery) -> None:
        """Set the function that runs queries in this worker."""
        self._run_query = run_query

    async def connect(self) -> None:
        """Begin to read messages from the supervisor."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._channel, limit=MAX_MESSAGE)
        self._tasks.append(asyncio.create_task(self._listen(reader), name="supervisor channel"))

    def announce_ready(self) -> None:
        """Announce that this worker accepts requests, and begin to send snapshots."""
        self._send("ready", clock=time.monotonic())
        self._tasks.append(asyncio.create_task(self._send_periodically(), name="snapshots"))

    async def close(self, cut_off: int = 0) -> None:
        """Send the last snapshot and close the channel. `cut_off` is the number of exchanges aborted at the stop."""
        for task in self._tasks:
            task.cancel()
        await self._send_snapshot("left", cut_off=cut_off)
        with suppress(OSError):  # the supervisor may have ended before
            await self._writer.drain()
            self._writer.close()
            await self._writer.wait_closed()

    async def gather(self, *, with_histories: bool = False, with_points: bool = False) -> WorkerSnapshot:
        """Return the merged snapshot of all workers from the supervisor.

        The supervisor keeps all counts, so none that was shown decreases when a worker ends. For the same reason, if
        the supervisor does not respond within `GATHER_TIMEOUT`, its last response is used, and this worker's own
        snapshot only if there was none.
        """
        self._number = number = self._number + 1
        response = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send_snapshot("gather", id=number, with_histories=with_histories, with_points=with_points)
            async with asyncio.timeout(GATHER_TIMEOUT):
                self._last = await response
        except TimeoutError:
            logger.warning("no response from the supervisor within %g s; figures may be out of date", GATHER_TIMEOUT)
        finally:
            del self._pending[number]
        own = await run_in_steps(self._take_snapshot())
        if self._last is None:
            return own
        snapshot = WorkerSnapshot.blank(percentiles=own.recorder.percentiles)
        await run_in_steps(snapshot.update_in_steps(self._last))
        return snapshot

    async def query(self, query: dict[str, Any]) -> QueryResults:
        """Have the supervisor query all workers; if it does not respond, return the result of this worker only."""
        self._number = number = self._number + 1
        response = self._pending[number] = asyncio.get_running_loop().create_future()
        self._send("query", id=number, query=query)
        try:
            async with asyncio.timeout(QUERY_TIMEOUT):
                found = await response
        except TimeoutError:
            return QueryResults([await run_in_steps(self._run_query(query))], is_complete=False)
        finally:
            del self._pending[number]
        values = []
        for text in found["results"]:
            values.append(json.loads(text))
            await asyncio.sleep(0)
        return QueryResults(values, found["is_complete"])

    async def reload(self, origin: str) -> ReloadOutcome:
        """Request a reload: the supervisor reads the configuration and applies it in all workers or none."""
        self._number = number = self._number + 1
        response = self._pending[number] = asyncio.get_running_loop().create_future()
        self._send("reload", id=number, origin=origin)
        try:
            return ReloadOutcome.from_state(await response)
        finally:
            del self._pending[number]

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while (line := await reader.readline()).endswith(b"\n"):
                message = json.loads(line)
                if message["kind"] == "snapshot":
                    await self._send_next(replies=message["id"])
                elif message["kind"] == "prepare":
                    self._preparing = asyncio.create_task(self._prepare(message), name="configuration")
                elif message["kind"] == "commit":
                    self._commit(message["id"])
                elif message["kind"] == "query":
                    running = asyncio.create_task(self._send_result(message), name="query")
                    self._queries.add(running)
                    running.add_done_callback(self._queries.discard)
                elif message["kind"] == "results":
                    self._resolve(message["id"], message)
                elif message["kind"] == "gathered":
                    self._receive_part(message)
                else:
                    self._resolve(message["id"], message["outcome"])
                await asyncio.sleep(0)  # `readline` does not yield to the loop while lines are buffered
        self._on_orphaned()

    async def _send_result(self, message: dict[str, Any]) -> None:
        """Send the result of a query as text, which the supervisor passes on without parsing it."""
        result = json.dumps(await run_in_steps(self._run_query(message["query"])), separators=(",", ":"))
        self._send("result", id=message["id"], result=result)

    def _receive_part(self, message: dict[str, Any]) -> None:
        """Store one part of a response; the last part completes it."""
        parts = self._parts.setdefault(message["id"], [])
        parts.append(message["snapshot"])
        if message["is_last"]:
            self._resolve(message["id"], joined(self._parts.pop(message["id"])))

    def _resolve(self, number: int, response: dict[str, Any]) -> None:
        pending = self._pending.get(number)
        if pending is not None and not pending.done():
            pending.set_result(response)

    async def _prepare(self, message: dict[str, Any]) -> None:
        """Run the first phase of a reload, and send the error if it fails."""
        assert self._reconfigurable is not None  # noqa: S101 - the supervisor addresses only workers that are ready
        objection: tuple[str, bool] | None = None
        try:
            await self._reconfigurable.prepare(message["config"])
        except StartupError as error:
            objection = str(error), True
        except Exception as error:
            logger.exception("preparing the new configuration failed")
            objection = f"it failed: {type(error).__name__}", False
        self._send("configured", id=message["id"], objection=objection)

    def _commit(self, number: int) -> None:
        """Run the second phase. After an error the supervisor replaces this worker, on the new configuration."""
        assert self._reconfigurable is not None  # noqa: S101 - `prepare` precedes `commit`
        objection = None
        try:
            self._reconfigurable.commit()
        except Exception as error:
            logger.exception("applying the new configuration failed")
            objection = f"it failed: {type(error).__name__}", False
        self._send("configured", id=number, objection=objection)

    async def _send_periodically(self) -> None:
        while True:
            await asyncio.sleep(SNAPSHOT_INTERVAL)
            await self._send_next()

    async def _send_next(self, replies: int = 0) -> None:
        if self._writer.transport.get_write_buffer_size() < MAX_UNSENT:
            await self._send_snapshot("snapshot", replies=replies)

    async def _send_snapshot(self, kind: str, **fields: Any) -> None:
        """Send a message with the changes since the last one."""
        async with self._send_lock:
            since = oldest_changed(time.monotonic())
            snapshot = await run_in_steps(self._take_snapshot())
            state = await run_in_steps(snapshot.state_in_steps(self._since, self._known))
            self._since, self._known = since, snapshot.upstreams
            self._send(kind, **fields, snapshot=state)

    def _send(self, kind: str, **fields: Any) -> None:
        if not self._writer.is_closing():
            self._writer.write(encode(kind, **fields))


def _nothing() -> Steps[WorkerSnapshot]:
    yield from ()
    return WorkerSnapshot.blank()


def _no_result(_query: dict[str, Any]) -> Steps[Any]:
    yield from ()
    return None


def encode(kind: str, **fields: Any) -> bytes:
    """Return a message as one line of JSON."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"
