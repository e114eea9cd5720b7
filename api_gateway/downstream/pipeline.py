"""The requests of one connection, in order: one task serves them all, and input behind them may be held.

uvicorn starts one task for each request instead.
"""

import asyncio
import logging
from collections import deque
from functools import partial
from typing import Any, Protocol

from api_gateway.downstream.request_cycle import REQUEST_HIGH_WATER, RequestResponseCycle
from api_gateway.downstream.states import ConnectionState
from api_gateway.eventloop.resetting import reset_connection
from api_gateway.http1.asgi import SERVER_EXTENSION

logger = logging.getLogger(__name__)

MAX_PIPELINED = 16  # requests that may be queued on one connection


class PipelineOwner(Protocol):
    """The connection as its pipeline uses it."""

    app: Any
    loop: asyncio.AbstractEventLoop
    tasks: set["asyncio.Task[None]"]
    transport: asyncio.Transport
    state: ConnectionState

    def on_unfinished(self, cycle: RequestResponseCycle) -> None:
        """Terminate the incomplete response of an application that has returned."""
        ...

    def on_worker_end(self) -> None:
        """Release what refers to the last request."""
        ...


class Pipeline:
    """The queue of requests, and the task that serves them.

    `current` is the request being served, or the last one that was; `waiting` are those behind it. The task exists
    from the first request until the connection is lost.
    """

    __slots__ = ("_idle_waiter", "_worker", "current", "waiting")

    def __init__(self) -> None:
        self.current: RequestResponseCycle | None = None
        self.waiting: deque[RequestResponseCycle] | None = None  # None until the first request
        self._worker: asyncio.Task[None] | None = None
        self._idle_waiter: asyncio.Future[None] | None = None  # awaited by the task while no request is queued

    def __repr__(self) -> str:
        return f"<Pipeline [{self.current!r}, {len(self.waiting or ())} waiting]>"

    @property
    def last(self) -> RequestResponseCycle | None:
        """The last request that has arrived, whether or not it has been served."""
        return self.waiting[-1] if self.waiting else self.current

    @property
    def due(self) -> RequestResponseCycle | None:
        """The request to which the next byte of a response belongs."""
        current = self.current
        if current is None or current.is_response_complete:
            return self.waiting[0] if self.waiting else None
        return current

    @property
    def is_full(self) -> bool:
        """True while no further request may be queued."""
        return self.waiting is not None and len(self.waiting) > MAX_PIPELINED

    @property
    def may_refill(self) -> bool:
        """True if held input may be parsed: half of the queue is free, and no handshake awaits its response."""
        waiting = self.waiting or ()
        return len(waiting) < MAX_PIPELINED // 2 and not any(cycle.upgrade for cycle in waiting)

    @property
    def is_working(self) -> bool:
        """True while the task serves a request."""
        return self._worker is not None and self._idle_waiter is None and not self._worker.done()

    def enqueue(self, owner: PipelineOwner, cycle: RequestResponseCycle) -> None:
        """Queue a request for the task, which is started if necessary."""
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append(cycle)
        if self._worker is None or self._worker.done():
            self._worker = owner.loop.create_task(self._serve(owner))
            owner.tasks.add(self._worker)
            self._worker.add_done_callback(partial(_on_worker_done, owner))
        else:
            self.wake()

    def wake(self) -> None:
        """Let the task look at the queue, and at the state of the connection."""
        if self._idle_waiter is not None and not self._idle_waiter.done():
            self._idle_waiter.set_result(None)

    def drop_waiting(self) -> None:
        """Drop the queued requests."""
        if self.waiting:
            for cycle in self.waiting:
                cycle.disconnect()
            self.waiting = deque()

    async def _serve(self, owner: PipelineOwner) -> None:
        """Serve the queued requests in order until the connection is lost."""
        while self.waiting or not owner.state.is_lost:
            if not self.waiting:
                self._idle_waiter = owner.loop.create_future()
                await self._idle_waiter
                self._idle_waiter = None
                continue
            cycle = self.current = self.waiting.popleft()
            if owner.state.is_draining:
                cycle.stop()
            try:
                await owner.app(cycle.scope, cycle.receive, cycle.send)
            except Exception:
                if not cycle.is_cut:
                    logger.exception("the application failed")
            finally:
                # These references form cycles, which only the garbage collector would free.
                del cycle.scope[SERVER_EXTENSION]
                cycle.on_shutdown = None
            if not cycle.is_disconnected and not cycle.is_response_complete and not cycle.end_without_trailers():
                owner.on_unfinished(cycle)
        self.current = None  # breaks reference cycles
        owner.on_worker_end()


def _on_worker_done(owner: PipelineOwner, task: "asyncio.Task[None]") -> None:
    """Abort the connection if the server has cancelled its task at the end of the drain, even before it began."""
    owner.tasks.discard(task)
    if task.cancelled() or task.exception() is not None:
        reset_connection(owner.transport)


class HeldInput:
    """Input that may not be parsed before a preceding request has its response."""

    __slots__ = ("_replay", "data")

    def __init__(self) -> None:
        self.data = bytearray()
        self._replay: asyncio.Handle | None = None

    def __repr__(self) -> str:
        return f"<HeldInput [{len(self.data)} bytes]>"

    def add(self, data: bytes | memoryview) -> bool:
        """Append received bytes; return True above REQUEST_HIGH_WATER, when reading shall be paused."""
        self.data += data
        return len(self.data) > REQUEST_HIGH_WATER

    def clear(self) -> None:
        """Drop all bytes."""
        if self.data:
            self.data = bytearray()

    def take(self) -> bytes:
        """Return all bytes, and hold none afterwards."""
        taken, self.data = bytes(self.data), bytearray()
        return taken

    def replay_soon(self, owner: "ReplayOwner") -> None:
        """Schedule parsing of the held input after the current callback. Idempotent."""
        if self._replay is None:
            self._replay = owner.loop.call_soon(self._on_replay, owner)

    def _on_replay(self, owner: "ReplayOwner") -> None:
        self._replay = None
        owner.replay()


class ReplayOwner(Protocol):
    """The connection as its held input uses it."""

    loop: asyncio.AbstractEventLoop

    def replay(self) -> None:
        """Parse the held input."""
        ...
