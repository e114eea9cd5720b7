"""Two connections joined after a switch of protocols (WebSocket): what one side sends the other gets, byte for byte.

What the frames hold is nobody's business here, so text, binary, ping, pong, close codes and extensions all pass. A
slow reader makes the other side wait, and the end of one direction is passed on while the other may still flow. Only
a gateway that stops puts in a frame of its own, between two of the upstream's.
"""

import asyncio

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.eventloop.receive_buffer import READ_SIZE, receive_buffer
from api_gateway.proxy.websocket_frames import GOING_AWAY, FrameBoundary

HALF_CLOSE_TIMEOUT = 1.0  # seconds of silence that one direction may fall into after the other has ended


class Tunnel:
    """Joins `client` and `upstream` until both are gone, or until nothing has passed for `idle_timeout` seconds.

    Each transport's protocol is replaced; the one before hears of the connection's loss, and of nothing else.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        idle_timeout: float,
    ) -> None:
        self.bytes_in = 0  # from the client
        self.bytes_out = 0  # to the client
        self.idle_timeout = idle_timeout
        self.alarm = DeadlineTimer(loop, self.abort)
        self._ended: asyncio.Future[None] = loop.create_future()
        buffer = receive_buffer(loop)[:READ_SIZE]
        self._client = _Side(self, client, buffer)
        self._upstream = _UpstreamSide(self, upstream, buffer)
        self._client.other, self._upstream.other = self._upstream, self._client

    def __repr__(self) -> str:
        return f"<Tunnel [{self.bytes_in} bytes in, {self.bytes_out} bytes out]>"

    async def run(self, from_client: bytes, from_upstream: bytes) -> None:
        """Pass on what has already come, then everything else, to the end."""
        self.alarm.set(self.idle_timeout)
        for end, already in ((self._client, from_client), (self._upstream, from_upstream)):
            end.attach()
            if already:
                end.data_received(already)
        try:
            await self._ended
        finally:
            self.alarm.stop()
            self.abort()
            self.bytes_in, self.bytes_out = self._client.received, self._upstream.received
            self._client.let_go()
            self._upstream.let_go()

    def abort(self) -> None:
        """End it now, both ways."""
        self._client.transport.abort()
        self._upstream.transport.abort()

    def go_away(self) -> None:
        """Ask the client to close the connection and come back on another one."""
        if not self._ended.done():
            self._upstream.go_away()

    def on_lost(self) -> None:
        """One side is gone; so is the tunnel once the other is."""
        if self._client.is_lost and self._upstream.is_lost and not self._ended.done():
            self._ended.set_result(None)


class _Side(asyncio.BufferedProtocol):
    """One side: passes on what it hears."""

    def __init__(self, tunnel: Tunnel, transport: asyncio.Transport, buffer: memoryview) -> None:
        self.other: _Side = self
        self.transport = transport
        self.is_lost = False
        self.has_ended = False  # it will send no more
        self.received = 0
        self._tunnel = tunnel
        self._before = transport.get_protocol()
        self._buffer = buffer

    def __repr__(self) -> str:
        return f"<_Side [{'lost' if self.is_lost else 'open'}, {self.received} bytes received]>"

    def attach(self) -> None:
        """Replace the transport's protocol. Reading is paused meanwhile: how to read is decided where it begins."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
        self.transport.set_protocol(self)
        if self.transport.is_closing():
            self.connection_lost(None)
        else:
            self.transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Return where the event loop writes what it reads."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        self.received += len(data)
        self._tunnel.alarm.set(self._tunnel.idle_timeout)
        if not self.other.is_lost:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        """Pass on that no more will come from here; once neither side will send, both are closed."""
        self.has_ended = True
        other = self.other
        if other.has_ended or not other.transport.can_write_eof():
            self.transport.close()
            other.transport.close()
        elif not other.is_lost and not other.transport.is_closing():
            other.transport.write_eof()
        self._tunnel.idle_timeout = min(self._tunnel.idle_timeout, HALF_CLOSE_TIMEOUT)
        self._tunnel.alarm.set(self._tunnel.idle_timeout)
        return True

    def pause_writing(self) -> None:
        """Make the other side wait."""
        if not self.other.is_lost and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other side go on."""
        if not self.other.is_lost and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the other side too, after it has been sent everything if this one ended in peace."""
        if self.is_lost:
            return
        self.is_lost = True
        before = self._before
        if before is not None:
            before.connection_lost(exc)
        if not self.other.is_lost:
            if exc is None:
                self.other.transport.close()
            else:
                self.other.transport.abort()
        self._tunnel.on_lost()

    def let_go(self) -> None:
        """Refer to the other side no more. Of a transport that is not lost yet the protocol before hears the end."""
        if not self.is_lost and self._before is not None:
            self.transport.set_protocol(self._before)
        del self.other, self._tunnel


class _UpstreamSide(_Side):
    """The upstream's side, which can be interrupted between two frames."""

    def __init__(self, tunnel: Tunnel, transport: asyncio.Transport, buffer: memoryview) -> None:
        super().__init__(tunnel, transport, buffer)
        self._edges = FrameBoundary()
        self._is_leaving = self._has_left = False

    def data_received(self, data: bytes) -> None:
        """Pass it on, and follow the frames; behind a close frame of ours comes nothing more."""
        if self._is_leaving and not self._has_left and (rest := self._edges.rest(data)) is not None:
            super().data_received(data[:rest])
            self._leave()
        elif self._has_left:
            self.received += len(data)
        else:
            if not self._is_leaving:
                self._edges.feed(data)
            super().data_received(data)

    def go_away(self) -> None:
        """Send the client a close frame as soon as the frame that has begun is over."""
        if not self._is_leaving and not self._edges.has_closed:
            self._is_leaving = True
            if self._edges.is_between:
                self._leave()

    def _leave(self) -> None:
        self._has_left = True
        if not self._edges.has_closed and not self.other.is_lost and not self.other.transport.is_closing():
            self.other.transport.write(GOING_AWAY)
