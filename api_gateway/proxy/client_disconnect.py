"""Notices that the client has left while its request is served, and ends the request then."""

import asyncio

from api_gateway.errors import ClientDisconnected
from api_gateway.http1.asgi import Receive, ServerExtension
from api_gateway.proxy.request_body import StreamedBody
from api_gateway.transport.request import NoBody

CLIENT_LEFT = "The client left before its answer was complete."
DISCONNECT_CHECK_DELAY = 0.05  # seconds an upstream may take before we also watch for the client's leaving


class LeavingWatch:
    """Turns the cancellation by which our own server tells that the client has left into ClientDisconnected.

    Used as `with`. Raises it at once if the client has left before.
    """

    def __init__(self, extension: ServerExtension) -> None:
        self._extension = extension

    def __enter__(self) -> None:
        """Ask to be told."""
        if self._extension.is_disconnected:
            raise ClientDisconnected(CLIENT_LEFT)
        self._extension.on_disconnect = self._extension.task.cancel

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop being told."""
        self._extension.on_disconnect = None
        if kind is asyncio.CancelledError and self._extension.is_disconnected and self._extension.task.uncancel() == 0:
            raise ClientDisconnected(CLIENT_LEFT) from error


class DisconnectWatch:
    """Ends the current task once the client has left, before a server that does not tell so by itself.

    It asks after `DISCONNECT_CHECK_DELAY` only: most answers are faster. Used as `with`; what the task was doing is
    cancelled, and leaves the block as ClientDisconnected.
    """

    def __init__(self, receive: Receive, body: StreamedBody | NoBody) -> None:
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
        self._timer = loop.call_later(DISCONNECT_CHECK_DELAY, self._start, loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop looking; turn our own cancellation into ClientDisconnected."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._has_left:
            if kind is asyncio.CancelledError and self._task.uncancel() == 0:
                raise ClientDisconnected(CLIENT_LEFT) from error
            self._task.uncancel()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._body.is_finished:
            self._watcher = loop.create_task(self._watch())
        else:  # the body's own reading notices a client that leaves
            self._timer = loop.call_later(DISCONNECT_CHECK_DELAY, self._start, loop)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":  # noqa: ASYNC110 - the server tells, when asked
            await asyncio.sleep(DISCONNECT_CHECK_DELAY)  # it, or a middleware, may repeat that the body is complete
        self._has_left = True
        self._task.cancel()
