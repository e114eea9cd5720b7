"""Notices that the client has left while its request is served, and ends the request then."""

import asyncio

from api_gateway.errors import ClientDisconnected
from api_gateway.http1.asgi import Receive, ServerExtension
from api_gateway.proxy.request_body import RequestBody
from api_gateway.transport.request import NoBody

LEFT = "The client left before its answer was complete."
PATIENCE = 0.05  # seconds an upstream may take before we also watch for the client's leaving


class LeavingWatch:
    """Turns the cancellation by which our own server tells that the client has left into ClientDisconnected.

    Used as `with`. Raises it at once if the client has left before.
    """

    def __init__(self, link: ServerExtension) -> None:
        self._link = link

    def __enter__(self) -> None:
        """Ask to be told."""
        if self._link.is_disconnected:
            raise ClientDisconnected(LEFT)
        self._link.on_leaving = self._link.task.cancel

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop being told."""
        self._link.on_leaving = None
        if kind is asyncio.CancelledError and self._link.is_disconnected and self._link.task.uncancel() == 0:
            raise ClientDisconnected(LEFT) from error


class DisconnectWatch:
    """Ends the current task once the client has left, before a server that does not tell so by itself.

    It asks after `PATIENCE` only: most answers are faster. Used as `with`; what the task was doing is cancelled, and
    leaves the block as ClientDisconnected.
    """

    def __init__(self, receive: Receive, body: RequestBody | NoBody) -> None:
        self._receive = receive
        self._body = body
        self._has_left = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        """Start the clock."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs is in a task
        self._task = task
        self._timer = loop.call_later(PATIENCE, self._start, loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop looking; turn our own cancellation into ClientDisconnected."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._has_left:
            if kind is asyncio.CancelledError and self._task.uncancel() == 0:
                raise ClientDisconnected(LEFT) from error
            self._task.uncancel()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._body.is_finished:
            self._watcher = loop.create_task(self._watch())
        else:  # the body's own reading notices a client that leaves
            self._timer = loop.call_later(PATIENCE, self._start, loop)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":  # noqa: ASYNC110 - the server tells, when asked
            await asyncio.sleep(PATIENCE)  # it, or a middleware, may repeat that the body is complete
        self._has_left = True
        self._task.cancel()
