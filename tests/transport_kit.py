"""A client on the transport to upstreams: it sends a request in pieces and reads the response, as an exchange does."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from api_gateway.models import HeaderList
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.request import Origin
from api_gateway.transport.response import UpstreamResponse
from api_gateway.transport.upstream_connection import UpstreamConnection
from tests.kit import PATIENCE, soon


@dataclass
class Outgoing:
    """A request. `body` is sent in pieces, framed as `headers` say; `limits` are seconds by name."""

    url: str
    method: str
    target: bytes
    headers: Sequence[tuple[bytes, bytes]]
    body: AsyncIterable[bytes] | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    expects_continue: bool = False


class Upload:
    """The `ResponseListener` of a request: sends its body while the connection takes it."""

    upgrade = False

    def __init__(self, request: Outgoing, connection: UpstreamConnection) -> None:
        self.expects_continue = request.expects_continue
        self._request = request
        self._connection = connection
        self._writable = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None
        self.is_continued = False

    def begin(self, response: UpstreamResponse) -> None:
        """Send the head, with what is at hand of the body."""
        request = self._request
        lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.target), *map(b": ".join, request.headers)]
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        fields = {name.lower(): value for name, value in request.headers}
        if request.body is None:
            self._connection.start(response, head)
            return
        length = None if b"transfer-encoding" in fields else int(fields[b"content-length"])
        self._sending = asyncio.create_task(self._send(request.body, is_chunked=length is None))
        self._connection.begin(response, [head], length, gathers=True)

    async def _send(self, body: AsyncIterable[bytes], *, is_chunked: bool) -> None:
        async for piece in body:
            if not piece:
                continue
            self._connection.send_piece(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            while self._connection.is_write_paused and not self._connection.is_closed:
                self._writable.clear()
                await self._writable.wait()
        self._connection.end_body(b"0\r\n\r\n" if is_chunked else b"")

    def end(self) -> None:
        """Send no more, unless the connection still takes the rest of the body."""
        if self._sending is not None and not self.is_continued:
            self._sending.cancel()

    def on_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Ignore it."""

    def continue_body(self) -> None:
        """Go on after the response."""
        self.is_continued = True

    def discard_body(self) -> None:
        """Send no more."""
        self.is_continued = False
        self.end()

    def on_writable(self) -> None:
        """Go on sending."""
        self._writable.set()


async def send(transport: UpstreamTransport, request: Outgoing) -> UpstreamResponse:
    """Send a request on a connection of the transport's pool; return its response when the head has come."""
    pool = transport.pool(Origin.of(httpx.URL(request.url)))
    limits = {"connect": PATIENCE, "read": PATIENCE, **request.limits}
    connection = pool.acquire_idle(None) or await pool.acquire(limits["connect"], limits.get("pool"))
    upload = Upload(request, connection)
    response = UpstreamResponse(connection, request.method, limits, upload)
    upload.begin(response)
    try:
        await response.wait_head()
    except BaseException:
        _end(response, upload)
        raise
    return response


async def pieces_of(response: UpstreamResponse) -> AsyncIterator[bytes]:
    """Yield the rest of the body as it comes. Raises the error of the response after what came before it."""
    is_over = False
    while not is_over:
        await _progress(response)
        is_over = response.is_complete
        if response.pieces:
            yield response.take()
        elif response.error is not None:
            raise response.error
        if response.connection is not None:
            response.connection.resume_reading()


async def read(response: UpstreamResponse) -> bytes:
    """Return the rest of the body, and close the response."""
    try:
        return b"".join([piece async for piece in pieces_of(response)])
    finally:
        listener = response.listener
        assert isinstance(listener, Upload)
        _end(response, listener)


async def _progress(response: UpstreamResponse) -> None:
    """Wait for more of the response, within the limit on silence."""
    connection = response.connection
    if connection is not None:
        connection.set_timer("idle")
    await soon(lambda: bool(response.pieces or response.is_complete or response.error), "the response goes on")
    if response.connection is not None:
        response.connection.timer.clear()


def _end(response: UpstreamResponse, upload: Upload) -> None:
    response.close()
    upload.end()


async def fetch(transport: UpstreamTransport, request: Outgoing) -> bytes:
    """Send a request and return the body of the response."""
    return await read(await send(transport, request))
