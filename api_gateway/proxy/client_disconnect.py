"""Detects that the client has disconnected while its request is served, and aborts the request."""

import asyncio

from api_gateway.errors import ClientDisconnected
from api_gateway.http1.asgi import Receive, ServerExtension
from api_gateway.proxy.request_body import StreamedBody
from api_gateway.transport.request import NoBody

CLIENT_LEFT = "The client disconnected before the response was complete."
DISCONNECT_CHECK_DELAY = 0.05  # seconds before a `DisconnectPoller` starts to call `receive`, and between its calls


class DisconnectListener:
    """Context manager that cancels the block when the client disconnects, and raises ClientDisconnected instead.

    For the gateway's own server, which reports a disconnect through `ServerExtension.on_disconnect`. Raises
    ClientDisconnected on entry if the client has already disconnected.
    """

    def __init__(self, extension: ServerExtension) -> None:
        self._extension = extension

    def __enter__(self) -> None:
        """Register the cancellation of the task."""
        if self._extension.is_disconnected:
            raise ClientDisconnected(CLIENT_LEFT)
        self._extension.on_disconnect = self._extension.task.cancel

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove the registration, and replace the cancellation by ClientDisconnected."""
        self._extension.on_disconnect = None
        if kind is asyncio.CancelledError and self._extension.is_disconnected and self._extension.task.uncancel() == 0:
            raise ClientDisconnected(CLIENT_LEFT) from error


class DisconnectPoller:
    """Context manager that cancels the block when the client disconnects, and raises ClientDisconnected instead.

    For servers that report a disconnect only through `receive`, which is called after `DISCONNECT_CHECK_DELAY`: most
    responses are faster. States: delayed, watching, disconnected.
    """

    def __init__(self, receive: Receive, body: StreamedBody | NoBody) -> None:
        self._receive = receive
        self._body = body
        self._is_disconnected = False
        self._watcher: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "disconnected" if self._is_disconnected else "delayed" if self._watcher is None else "watching"
        return f"<DisconnectWatch [{state}]>"

    def __enter__(self) -> None:
        """Start the delay."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine that runs is in a task
        self._task = task
        self._timer = loop.call_later(DISCONNECT_CHECK_DELAY, self._start, loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Stop watching, and replace the cancellation by ClientDisconnected."""
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._is_disconnected:
            if kind is asyncio.CancelledError and self._task.uncancel() == 0:
                raise ClientDisconnected(CLIENT_LEFT) from error
            self._task.uncancel()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._body.is_finished:
            self._watcher = loop.create_task(self._watch())
        else:  # meanwhile, reading the body detects a disconnect
            self._timer = loop.call_later(DISCONNECT_CHECK_DELAY, self._start, loop)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":  # noqa: ASYNC110 - ASGI has no event to wait for
            await asyncio.sleep(DISCONNECT_CHECK_DELAY)  # a server or middleware may return `http.request` repeatedly
        self._is_disconnected = True
        self._task.cancel()
