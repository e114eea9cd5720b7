"""Protects other `httpx.AsyncBaseTransport`s, such as httpx's for HTTP/2, from cancellation.

Transports based on httpcore lose a connection's slot when a request is cancelled inside them (encode/httpcore#1093),
and a gateway cancels requests whenever a client disconnects. So each step runs in a separate task that is never
cancelled; a response that arrives after a cancellation is closed.
"""

import asyncio
import importlib.util
import ssl
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx

from api_gateway.transport.local_resources import LocalResourcesExhausted, is_local_exhaustion


class ShieldedTransport(httpx.AsyncBaseTransport):
    """Wraps the transport `inner` so that cancellation does not reach it."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self._running = 0  # requests whose response is not closed
        self._left: set[asyncio.Task[Any]] = set()  # tasks that finish in the background
        self.abandoned = 0  # requests that were cancelled before their response, and have not ended

    def __repr__(self) -> str:
        return f"<ShieldedTransport {self._inner!r} [{self._running} running, {len(self._left)} in the background]>"

    def is_of(self, transports: Iterable[httpx.AsyncBaseTransport]) -> bool:
        """Return whether `inner` is one of these transports."""
        return any(transport is self._inner for transport in transports)

    @property
    def is_idle(self) -> bool:
        """True if no request is in flight and no task runs in the background."""
        return not self._running and not self._left

    def on_closed(self) -> None:
        """Count a closed response."""
        self._running -= 1

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`; if this is cancelled, the response is closed when it arrives."""
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
        """Wait up to 1 s for tasks in the background, and close `inner`."""
        if self._left:
            await asyncio.wait(self._left, timeout=1)
        await self._inner.aclose()

    async def finish(self, step: Coroutine[Any, Any, Any]) -> None:
        """Run `step` to its end, even if the caller is cancelled."""
        await asyncio.shield(self._leave(step))

    def _leave(self, step: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.ensure_future(step)
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        return task

    async def _close_when_there(self, task: "asyncio.Future[httpx.Response]") -> None:
        self.abandoned += 1
        try:
            response = await task
            await response.aclose()
        except Exception:  # noqa: BLE001 - a failed request has no response to close, and its caller is gone
            return
        finally:
            self.abandoned -= 1


class _Body(httpx.AsyncByteStream):
    """A response body whose reading can be cancelled without cancelling the inner transport."""

    def __init__(self, guard: ShieldedTransport, stream: httpx.AsyncByteStream) -> None:
        self._guard = guard
        self._stream = stream
        self._pieces = aiter(stream)
        self._next: asyncio.Future[bytes] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<_Body [{'closed' if self._is_closed else 'open'}]>"

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
        """Close the body after the piece that is being read has arrived."""
        if not self._is_closed:
            self._is_closed = True
            self._guard.on_closed()
        await self._guard.finish(self._close())

    async def _close(self) -> None:
        if self._next is not None:
            await asyncio.wait([self._next])
            if not self._next.cancelled():
                self._next.exception()  # marks the exception as retrieved
        await self._stream.aclose()


_H2: Final = "h2"  # the name of HTTP/2 in ALPN (RFC 9113 section 3.2)


class NoHttp2(httpx.ConnectError):
    """The TLS handshake with a target did not choose HTTP/2."""


class Http2Transport(httpx.AsyncBaseTransport):
    """httpx's transport with HTTP/2 alone, for https targets.

    There is no fall-back to HTTP/1.1: httpx's connections of HTTP/1.1 take bytes that follow a response for the
    response to the next request, which may be another client's.
    """

    def __init__(self, limits: httpx.Limits, tls: ssl.SSLContext | None) -> None:
        self._inner: httpx.AsyncBaseTransport = httpx.AsyncHTTPTransport(
            http1=False, http2=True, limits=limits, verify=True if tls is None else tls
        )

    def __repr__(self) -> str:
        return "<Http2Transport>"

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request`. Raises NoHttp2 if the target does not offer HTTP/2."""
        request.extensions = {**request.extensions, "trace": _check_protocol}
        with _blaming_the_target():
            response = await self._inner.handle_async_request(request)
        stream: Any = response.stream
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Http2Body(stream),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._inner.aclose()


class _Http2Body(httpx.AsyncByteStream):
    """A response body of HTTP/2, whose errors are those of the target."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    def __repr__(self) -> str:
        return f"<_Http2Body {self._stream!r}>"

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the body piece by piece. Raises httpx.TransportError."""
        with _blaming_the_target():
            async for piece in self._stream:
                yield piece

    async def aclose(self) -> None:
        """Close the body."""
        await self._stream.aclose()


@contextmanager
def _blaming_the_target() -> Iterator[None]:
    """Raise RemoteProtocolError for what httpcore takes for an error of the request.

    It reports frames that break HTTP/2 as LocalProtocolError, and a status that is no number as ValueError. The
    request is not the cause: its head was checked, and its body has the announced length.
    """
    try:
        yield
    except (httpx.LocalProtocolError, ValueError) as error:
        raise httpx.RemoteProtocolError(str(error)) from error


async def _check_protocol(event: str, info: dict[str, Any]) -> None:
    """Close a new connection whose handshake did not choose HTTP/2, and raise NoHttp2 (httpcore's trace)."""
    if event == "connection.start_tls.complete":
        stream = info["return_value"]
        if stream.get_extra_info("ssl_object").selected_alpn_protocol() != _H2:
            await stream.aclose()
            raise NoHttp2("the handshake did not choose HTTP/2")


def http2_transport(max_connections: int, idle_timeout: float, tls: ssl.SSLContext | None) -> ShieldedTransport:
    """Return a transport with HTTP/2. `idle_timeout` is in seconds.

    Raises ImportError if the package h2 is not installed.
    """
    limits = httpx.Limits(
        max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=idle_timeout
    )
    if importlib.util.find_spec("h2") is None:  # httpx checks this only when it connects
        raise ImportError("the package h2 is not installed")
    return ShieldedTransport(Http2Transport(limits, tls))
