"""Any other `httpx.AsyncBaseTransport` in the place of ours, httpx's own for HTTP/2 above all.

Transports built on httpcore lose a connection's slot when a request is cancelled inside them (encode/httpcore#1093),
and a gateway's requests are cancelled whenever a client hangs up. So here nothing inside them ever is: each step runs
in a task of its own that is left to finish, and what it yields for nobody is closed.
"""

import asyncio
import importlib.util
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any

import httpx

from api_gateway.transport.local_resources import LocalResourcesExhausted, is_local_exhaustion


class ShieldedTransport(httpx.AsyncBaseTransport):
    """Keeps cancellation out of `inner`."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self._running = 0  # requests whose response is not closed
        self._left: set[asyncio.Task[Any]] = set()  # tasks that finish for nobody

    def __repr__(self) -> str:
        return f"<ShieldedTransport {self._inner!r} [{len(self._left)} left to finish]>"

    def is_of(self, transports: Iterable[httpx.AsyncBaseTransport]) -> bool:
        """Tell whether it guards one of these."""
        return any(transport is self._inner for transport in transports)

    @property
    def is_idle(self) -> bool:
        """True if no response is under way."""
        return not self._running and not self._left

    def on_closed(self) -> None:
        """Count a response less."""
        self._running -= 1

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; if that is cancelled, the response is closed once it is there."""
        task = asyncio.ensure_future(self._inner.handle_async_request(request))
        self._running += 1
        try:
            response = await asyncio.shield(task)
        except BaseException as error:
            self._running -= 1
            if isinstance(error, asyncio.CancelledError):
                self._leave(self._close_when_there(task))
            raise
        except httpx.ConnectError as error:
            if is_local_exhaustion(error, request.url.host, request.url.port or 0):
                raise LocalResourcesExhausted(str(error)) from error
            raise
        stream: Any = response.stream
        extensions = response.extensions
        return httpx.Response(
            response.status_code, headers=response.headers, stream=_Body(self, stream), extensions=extensions
        )

    async def aclose(self) -> None:
        """Wait for what was left to finish, and close `inner`."""
        if self._left:
            await asyncio.wait(self._left, timeout=1)
        await self._inner.aclose()

    async def finish(self, step: Coroutine[Any, Any, Any]) -> None:
        """Run a step to its end whoever cancels."""
        await asyncio.shield(self._leave(step))

    def _leave(self, step: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.ensure_future(step)
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        return task

    async def _close_when_there(self, task: "asyncio.Future[httpx.Response]") -> None:
        try:
            response = await task
        except Exception:  # noqa: BLE001 - whatever it failed with, there is nothing to close and nobody to tell
            return
        await response.aclose()


class _Body(httpx.AsyncByteStream):
    """A body whose reading may be cancelled without the transport below noticing."""

    def __init__(self, guard: ShieldedTransport, stream: httpx.AsyncByteStream) -> None:
        self._guard = guard
        self._stream = stream
        self._pieces = aiter(stream)
        self._next: asyncio.Future[bytes] | None = None
        self._is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body piece by piece."""
        while True:
            self._next = asyncio.ensure_future(anext(self._pieces))
            try:
                piece = await asyncio.shield(self._next)
            except StopAsyncIteration:
                return
            self._next = None
            yield piece

    async def aclose(self) -> None:
        """Let go of the body, once the piece that is being read has come."""
        if not self._is_closed:
            self._is_closed = True
            self._guard.on_closed()
        await self._guard.finish(self._close())

    async def _close(self) -> None:
        if self._next is not None:
            await asyncio.wait([self._next])
            if not self._next.cancelled():
                self._next.exception()  # seen
        await self._stream.aclose()


def http2_transport(max_connections: int, idle_timeout: float, tls: ssl.SSLContext | None) -> ShieldedTransport:
    """Return httpx's transport speaking HTTP/2 where the upstream does. Raises ImportError without the package h2.

    `idle_timeout` is in seconds.
    """
    limits = httpx.Limits(
        max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=idle_timeout
    )
    if importlib.util.find_spec("h2") is None:  # httpx itself looks for it no sooner than it connects
        raise ImportError("the package h2 is not installed")
    verify = tls if tls is not None else True
    return ShieldedTransport(httpx.AsyncHTTPTransport(http2=True, limits=limits, verify=verify))
