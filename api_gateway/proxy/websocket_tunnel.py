"""Tunnels between a client and an upstream after a switch of protocols (WebSocket).

Bytes are forwarded unchanged, so all frame types, close codes and extensions pass. Back-pressure applies in both
directions, and one direction may end before the other. The gateway inserts a frame of its own only when it stops: a
close frame between two frames of the upstream.
"""

import asyncio

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.eventloop.last_reads import last_reads
from api_gateway.eventloop.receive_buffer import READ_SIZE, receive_buffer
from api_gateway.proxy.websocket_frames import GOING_AWAY, FrameBoundary

HALF_CLOSE_TIMEOUT = 1.0  # idle timeout in seconds after one direction has ended


class Tunnel:
    """Forwards bytes between `client` and `upstream` until both are closed or idle for `idle_timeout` seconds.

    The protocol of each transport is replaced; the previous protocol only receives `connection_lost`.

    States: open, half-closed (one side has ended), ended (both connections are lost).
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        client: asyncio.Transport,
        upstream: asyncio.Transport,
        idle_timeout: float,
    ) -> None:
        self.idle_timeout = idle_timeout
        self.timer = DeadlineTimer(loop, self.abort)
        self._ended: asyncio.Future[None] = loop.create_future()
        buffer = receive_buffer(loop)[:READ_SIZE]
        self._client = _Side(self, client, buffer)
        self._upstream = _UpstreamSide(self, upstream, buffer)
        self._client.other, self._upstream.other = self._upstream, self._client

    def __repr__(self) -> str:
        return f"<Tunnel [{self.bytes_in} bytes in, {self.bytes_out} bytes out]>"

    @property
    def bytes_in(self) -> int:
        """The number of bytes from the client."""
        return self._client.received

    @property
    def bytes_out(self) -> int:
        """The number of bytes to the client."""
        return self._upstream.received

    async def run(self, from_client: bytes, from_upstream: bytes) -> None:
        """Forward the bytes received before, then all others until the tunnel ends. Aborts it when cancelled."""
        self.timer.set(self.idle_timeout)
        for end, already in ((self._client, from_client), (self._upstream, from_upstream)):
            end.attach()
            if already:
                end.data_received(already)
        try:
            await self._ended
        finally:
            self.timer.stop()
            self.abort()
            self._client.release()
            self._upstream.release()

    def abort(self) -> None:
        """Abort both connections."""
        self._client.transport.abort()
        self._upstream.transport.abort()

    def request_close(self) -> None:
        """Send the client a close frame with status 1001 (going away), so that it reconnects."""
        if not self._ended.done():
            self._upstream.request_close()

    def on_lost(self) -> None:
        """End the tunnel once both connections are lost."""
        if self._client.is_lost and self._upstream.is_lost and not self._ended.done():
            self._ended.set_result(None)


class _Side(asyncio.BufferedProtocol):
    """One side of a tunnel: forwards the bytes that it receives to the other side."""

    def __init__(self, tunnel: Tunnel, transport: asyncio.Transport, buffer: memoryview) -> None:
        self.other: _Side = self
        self.transport = transport
        self.is_lost = False
        self.has_ended = False  # EOF received
        self.received = 0
        self._tunnel = tunnel
        self._before = transport.get_protocol()
        self._buffer = buffer

    def __repr__(self) -> str:
        state = "lost" if self.is_lost else "ended" if self.has_ended else "open"
        return f"<{type(self).__name__} [{state}, {self.received} bytes received]>"

    def attach(self) -> None:
        """Replace the transport's protocol, with reading paused: asyncio selects the read method when it resumes."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
        self.transport.set_protocol(self)
        if self.transport.is_closing():
            self.connection_lost(None)
        else:
            self.transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        """Return the buffer for the next read."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes in the buffer."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Forward the bytes to the other side."""
        self.received += len(data)
        self._tunnel.timer.set(self._tunnel.idle_timeout)
        if not self.other.is_lost:
            self.other.transport.write(data)

    def eof_received(self) -> bool:
        """Forward EOF to the other side; close both once both have ended."""
        self.has_ended = True
        other = self.other
        if other.has_ended or not other.transport.can_write_eof():
            self.transport.close()
            other.transport.close()
        elif not other.is_lost and not other.transport.is_closing():
            other.transport.write_eof()
        self._tunnel.idle_timeout = min(self._tunnel.idle_timeout, HALF_CLOSE_TIMEOUT)
        self._tunnel.timer.set(self._tunnel.idle_timeout)
        return True

    def pause_writing(self) -> None:
        """Pause reading from the other side."""
        if not self.other.is_lost and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Resume reading from the other side."""
        if not self.other.is_lost and not self.other.transport.is_closing():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side after its buffer is flushed: within HALF_CLOSE_TIMEOUT if this side had an error."""
        if self.is_lost:
            return
        if exc is not None:
            self._forward_last()
        self.is_lost = True
        before = self._before
        if before is not None:
            before.connection_lost(exc)
        if not self.other.is_lost:
            self.other.transport.close()
        self._tunnel.on_lost()

    def _forward_last(self) -> None:
        """Forward what had arrived when sending failed: a peer may send a close frame, and close without reading."""
        for size in last_reads(self.transport, self._buffer):
            self.buffer_updated(size)
        self._tunnel.idle_timeout = min(self._tunnel.idle_timeout, HALF_CLOSE_TIMEOUT)
        self._tunnel.timer.set(self._tunnel.idle_timeout)

    def release(self) -> None:
        """Drop references to the tunnel, and restore the previous protocol of a transport that is not yet lost."""
        if not self.is_lost and self._before is not None:
            self.transport.set_protocol(self._before)
        del self.other, self._tunnel


class _UpstreamSide(_Side):
    """The upstream's side, which follows frames so that a close frame can be inserted between two of them.

    States: forwarding; leaving (`_is_close_due`: the current frame is completed); left (`_is_close_sent`: the close
    frame is sent, and further bytes of the upstream are discarded).
    """

    def __init__(self, tunnel: Tunnel, transport: asyncio.Transport, buffer: memoryview) -> None:
        super().__init__(tunnel, transport, buffer)
        self._frame_boundary = FrameBoundary()
        self._is_close_due = self._is_close_sent = False

    def data_received(self, data: bytes) -> None:
        """Forward the bytes and follow the frames; discard everything after the inserted close frame."""
        if self._is_close_due and not self._is_close_sent and (rest := self._frame_boundary.rest(data)) is not None:
            super().data_received(data[:rest])
            self._send_close()
        elif self._is_close_sent:
            self.received += len(data)
        else:
            if not self._is_close_due:
                self._frame_boundary.feed(data)
            super().data_received(data)

    def request_close(self) -> None:
        """Send the client a close frame once the current frame is complete."""
        if not self._is_close_due and not self._frame_boundary.has_closed:
            self._is_close_due = True
            if self._frame_boundary.is_between:
                self._send_close()

    def _send_close(self) -> None:
        self._is_close_sent = True
        if not self._frame_boundary.has_closed and not self.other.is_lost and not self.other.transport.is_closing():
            self.other.transport.write(GOING_AWAY)
