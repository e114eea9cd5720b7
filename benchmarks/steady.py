"""Requests at a fixed rate, independent of responses, with the result of each."""

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

import httptools

PATIENCE = 5.0  # seconds that a response may take
SLOW_CALL = 1.0
_GOOD = 200
_LENGTH = 2  # bytes of a successful response's body
_REQUEST = b"GET /api/%d HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Client-ID: chaos\r\n\r\n"


@dataclass(slots=True)
class Call:
    """One request: its due time, the time of sending, and the result. Status 0: no complete response."""

    number: int
    due: float
    status: int = 0
    lasted: float = PATIENCE
    sent: float = 0.0

    def is_failed(self) -> bool:
        """True without a complete, successful response."""
        return self.status != _GOOD

    def is_slow(self) -> bool:
        """True if the response was late."""
        return self.status == _GOOD and self.lasted > SLOW_CALL


class Caller(asyncio.Protocol):
    """One connection to the proxy; it adds itself to `idle` after a response."""

    transport: asyncio.Transport

    def __init__(self, idle: "list[Caller]") -> None:
        self._idle = idle
        self._call: Call | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._length = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP
        self.transport = transport

    def ask(self, call: Call) -> None:
        """Send a request."""
        self._call = call
        self.transport.write(_REQUEST % call.number)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes; anything but HTTP counts as no response."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        """Count the bytes; called by the parser."""
        self._length += len(body)

    def on_message_complete(self) -> None:
        """Record the response; called by the parser."""
        call, self._call = self._call, None
        length, self._length = self._length, 0
        if call is None:
            return
        call.lasted, status = time.monotonic() - call.due, self._parser.get_status_code()
        call.status = status if status != _GOOD or length == _LENGTH else 0
        if self._parser.should_keep_alive():
            self._idle.append(self)
        else:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the signature is asyncio's
        """Record a failed call, and leave `idle`."""
        if self._call is not None:
            self._call.lasted = time.monotonic() - self._call.due
            self._call = None
        elif self in self._idle:
            self._idle.remove(self)


class Load:
    """Sends requests at a fixed rate until stopped."""

    def __init__(self, port: int, rate: float) -> None:
        self.calls: list[Call] = []
        self.lag = 0.0  # seconds: the largest delay of sending after the due time
        self._port = port
        self._rate = rate
        self._idle: list[Caller] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._opened: list[Caller] = []

    async def run(self, until: "asyncio.Future[None]") -> None:
        """Send requests when they are due; after `until`, wait for the last responses."""
        began = time.monotonic() + 0.01
        while not until.done():
            call = Call(len(self.calls), began + len(self.calls) / self._rate)
            await asyncio.sleep(max(0.0, call.due - time.monotonic()))
            call.sent = time.monotonic()
            self.lag = max(self.lag, call.sent - call.due)
            self.calls.append(call)
            if self._idle:
                self._idle.pop().ask(call)
            else:
                task = asyncio.ensure_future(self._open(call))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)
        end = time.monotonic() + PATIENCE
        while len(self._idle) < len(self._opened) and time.monotonic() < end:
            self._opened = [caller for caller in self._opened if not caller.transport.is_closing()]
            await asyncio.sleep(0.05)
        for caller in self._opened:
            caller.transport.abort()

    async def _open(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            _, caller = await loop.create_connection(lambda: Caller(self._idle), "127.0.0.1", self._port)
            self._opened.append(caller)
            caller.ask(call)
