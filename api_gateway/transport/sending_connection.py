"""The sending half of a connection to an upstream: the request, the rest of its body after an early response, the end.

`connection` has the receiving half.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

import httpx

from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.eventloop.send_queue import unacknowledged
from api_gateway.transport.abilities import CallAbilities
from api_gateway.transport.lifetime import ConnectionLifetime
from api_gateway.transport.pool import Pool
from api_gateway.transport.response import ResponseListener, UpstreamResponse

MAX_GATHERED = 64 * 1024  # bytes of head and body that are gathered for one write
# The rest of a request body is still sent after an early response, because closing the connection costs the next
# request a new one: two to four round trips, in which a path of 100 Mbit/s and 10 ms carries about MAX_REST. A client
# that takes longer than REST_TIMEOUT would occupy a place in the pool for longer than a new connection is worth.
MAX_REST = 256 * 1024  # bytes of the body that are sent after the response is complete
REST_TIMEOUT = 2.0  # seconds within which they must be sent
STALL_BASELINE = 0.05  # seconds of a pause after which the unacknowledged bytes are counted: most pauses are shorter


class SendingConnection:
    """A connection that sends one request at a time. `UpstreamConnection` also receives its response.

    States: connecting (no transport), idle, busy (`_response` is set), finishing (`_finishing` is set: the response is
    complete, and the rest of the request body is being sent), closed (`is_closed`). While busy, the request body may
    still be incomplete (`_is_uploading`), and writing and reading may be paused. A beginning that `gathers` is kept
    (`_gathered`) until the callback of the event loop ends, so that a body at hand leaves with its head in one write.
    """

    abilities: ClassVar[CallAbilities] = CallAbilities(interim=True, trailers=True, upgrade=True)

    # Slots: the interpreter does not share the keys of more than 30 attributes, which makes each access slower.
    __slots__ = (
        "_body_left",
        "_finishing",
        "_gathered",
        "_gathered_size",
        "_is_reading_paused",
        "_is_uploading",
        "_is_writing_paused",
        "_paused_at",
        "_received",
        "_remaining",
        "_response",
        "_rest",
        "_resumed_at",
        "_stall",
        "_timeout",
        "_transport",
        "idle_since",
        "is_closed",
        "is_reused",
        "lifetime",
        "loop",
        "pool",
        "principal",
        "timer",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pool: Pool[Any] | None = None  # of this connection and others
        self.idle_since = 0.0
        self.lifetime: ConnectionLifetime | None = None  # None: no limits but those of the pool
        self.is_closed = False
        self.is_reused = False
        self.principal: str | None = None
        self.timer = DeadlineTimer(loop, self._on_timeout)
        self._timeout = 0.0  # seconds to which the alarm was last set
        self._transport: Any = None  # an asyncio.Transport, from connection_made on
        self._response: UpstreamResponse | None = None
        self._received = 0  # bytes of this response so far
        self._remaining = 0  # bytes of the body that have not arrived, after a plain head
        self._is_uploading = False  # the request body is incomplete
        self._gathered: list[bytes] | None = None  # the beginning of a request with a body, before its first write
        self._gathered_size = 0  # bytes
        self._finishing: ResponseListener | None = None  # of the complete response
        self._body_left: int | None = None  # bytes of the body to be sent; None if their number is unknown
        self._rest = 0  # bytes that may still be sent while finishing
        self._is_writing_paused = False  # the upstream reads more slowly than the client sends
        self._is_reading_paused = False
        self._paused_at = self._resumed_at = 0.0
        self._stall: asyncio.TimerHandle | None = None  # limits how long the upstream may stop reading

    def __repr__(self) -> str:
        if self.is_closed:
            state = "closed"
        elif self._finishing is not None:
            state = "finishing"
        else:
            state = "idle" if self._response is None else "busy"
        return f"<{type(self).__name__} [{state}]>"

    # Sending

    def _flush(self) -> None:
        """Write what was gathered, and gather no more."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None and not self.is_closed:
            self._transport.writelines(gathered)

    def _write(self, piece: bytes) -> None:
        """Write a part of the request body, or gather it with the head."""
        if self._gathered is None:
            self._transport.write(piece)
            return
        self._gathered.append(piece)
        self._gathered_size += len(piece)
        if self._gathered_size > MAX_GATHERED:
            self._flush()

    def start(self, response: UpstreamResponse, request: bytes, *further: bytes) -> None:
        """Send a complete request as bytes, and receive into `response`."""
        self._response = response
        self._received = self._remaining = 0
        if further:
            self._transport.writelines([request, *further])
        else:
            self._transport.write(request)
        seconds = response.timeouts.get("read")
        self._timeout = seconds or 0.0
        self.timer.set(seconds)

    def begin(
        self, response: UpstreamResponse, request: Sequence[bytes], left: int | None, *, gathers: bool = False
    ) -> None:
        """Send the beginning of a request, of whose body `left` bytes follow, None if their number is unknown.

        `send_piece` and `end_body` send the rest. `on_writable` of the listener is called when the upstream reads on.
        `gathers`: more of the body may follow in the same callback of the event loop, and leaves in the same write.
        """
        self._response = response
        self._received = self._remaining = 0
        self._is_uploading = True
        self._body_left = left
        if response.listener.expects_continue:
            self.set_timer("read")
        if gathers:
            self._gathered, self._gathered_size = [*request], sum(map(len, request))
            self.loop.call_soon(self._flush)
        else:
            self._transport.writelines(request)

    def send_piece(self, piece: bytes) -> None:
        """Send a piece of the request body, framed if it is chunked; drop it if no more of the body is wanted."""
        if not self._is_uploading:
            return
        if self._finishing is not None:
            self._rest -= len(piece)
            if self._rest < 0:
                self.close()
                return
        elif self._response is not None and self._response.listener.expects_continue:
            self.timer.clear()
        if self._body_left is not None:
            self._body_left -= len(piece)
        self._write(piece)

    def end_body(self, end: bytes) -> None:
        """Send the end of the framing of the request body, which is complete then."""
        if not self._is_uploading:
            return
        if end:
            self._write(end)
        self._is_uploading = False
        self._end_stall()
        self._flush()
        if self._finishing is not None:
            self._on_body_sent()
        elif self._response is not None and not self._response.is_head_complete:
            self.set_timer("read")

    @property
    def is_write_paused(self) -> bool:
        """True while the upstream reads more slowly than the client sends."""
        return self._is_writing_paused

    def _end_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _begin_stall(self, seconds: float) -> None:
        """Count the unacknowledged bytes, a system call, and check after `seconds` whether there are fewer."""
        self._stall = self.loop.call_later(seconds, self._check_stall, seconds, unacknowledged(self._transport))

    def _check_stall(self, seconds: float, before: int) -> None:
        """Fail the response if the upstream has read nothing for `seconds`, unless reading from it was paused.

        `before` is the number of unacknowledged bytes at the last check.
        """
        unsent = unacknowledged(self._transport)
        since = self.loop.time() if self._is_reading_paused or unsent < before else self._resumed_at
        left = since + seconds - self.loop.time()
        if left > 0:
            self._stall = self.loop.call_later(left, self._check_stall, seconds, unsent)
        else:
            self._time_out(seconds)

    def set_timer(self, name: str) -> None:
        """Start a timeout of the response by name: `read` for the head, `idle` between body pieces."""
        if self._response is not None:
            timeouts = self._response.timeouts
            seconds = timeouts.get(name, timeouts.get("read"))
            self._timeout = seconds or 0.0
            self.timer.set(seconds)

    def pause_writing(self) -> None:
        """Pause sending: the upstream reads more slowly than the client sends (asyncio callback).

        While the request body is sent, the upstream has its idle timeout to read on; that of the response is separate.
        """
        self._is_writing_paused = True
        if self._is_uploading and self._response is not None:
            timeouts = self._response.timeouts
            seconds = timeouts.get("idle", timeouts.get("read"))
            if seconds is not None:
                self._stall = self.loop.call_later(STALL_BASELINE, self._begin_stall, seconds)

    def resume_writing(self) -> None:
        """Resume sending: the write buffer is below its low-water mark (asyncio callback)."""
        self._end_stall()
        self._is_writing_paused = False
        if self._finishing is not None and not self._is_uploading:
            self._on_body_sent()
        elif self._finishing is not None:
            self._finishing.on_writable()
        elif self._is_uploading and self._response is not None:
            self._response.listener.on_writable()

    # Ending

    def pause_reading(self) -> None:
        """Stop reading from the upstream, so that TCP applies back-pressure."""
        if not self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = True
            self._paused_at = self.loop.time()
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the upstream again, and add the pause to `reader_waited`."""
        if self._is_reading_paused and not self.is_closed:
            self._is_reading_paused = False
            self._resumed_at = self.loop.time()
            if self._response is not None:
                self._response.reader_waited += self._resumed_at - self._paused_at
            self._transport.resume_reading()

    def move_to_tunnels(self) -> None:
        """Count this connection as a tunnel instead of a pooled connection. Raises ShareExceeded."""
        if self.pool is not None:
            self.pool.move_to_tunnels(self)

    def detach_transport(self) -> asyncio.Transport:
        """Return the transport after a 101, with reading paused; the new owner must call `connection_lost`."""
        transport: asyncio.Transport = self._transport
        self._detach()
        self.timer.stop()
        return transport

    def _on_timeout(self) -> None:
        if self._finishing is not None:
            self.close()
        else:
            self._time_out(self._timeout)

    def _time_out(self, seconds: float) -> None:
        """Fail the response with ReadTimeout and close the connection."""
        if self._response is not None:
            self._response.fail(httpx.ReadTimeout(f"no data for {seconds:g} s"))
            self.close()

    def abandon(self, response: UpstreamResponse) -> None:
        """Discard the response and close the connection, unless the response is complete."""
        if self._response is response:
            self._detach()
            self.close()

    def pass_on(self, response: UpstreamResponse, successor: UpstreamResponse) -> None:
        """Receive what follows of `response` into `successor`."""
        if self._response is response:
            self._response = successor

    def close(self) -> None:
        """Abort the connection, fail its response, and remove it from the pool. Idempotent."""
        self._stop_upload()
        self._discard_rest()
        if not self.is_closed:
            self.is_closed = True
            self.timer.stop()
            if self._response is not None:
                self._response.fail(httpx.ReadError("connection closed"))
            if self._transport is not None:
                self._transport.abort()
            if self.pool is not None:
                self.pool.discard(self)

    def _stop_upload(self) -> None:
        """Stop sending the request's body: another attempt may need the rest of it."""
        self._is_uploading = False
        self._end_stall()

    def _finish(self, response: UpstreamResponse) -> None:
        """Return the connection to the pool, send the rest of the request's body before, or close the connection.

        It is closed if the upstream does not keep it alive, or has responded before the request was begun.
        """
        self._response = response.connection = None
        self.timer.clear()
        if self.is_closed or not response.keeps_alive or self._gathered is not None:
            self.close()
            return
        if self._is_reading_paused:
            self.resume_reading()
        if self._is_uploading or self._is_writing_paused:
            self._send_rest(response.listener)
        elif self.pool is not None:
            self.pool.release(self)

    def _send_rest(self, listener: ResponseListener) -> None:
        """Send the rest of the body within MAX_REST and REST_TIMEOUT; close the connection if that is not possible.

        A client that has not sent its body for lack of a 100 (Continue) may never send it.
        """
        if self._is_uploading and (listener.expects_continue or (self._body_left or 0) > MAX_REST):
            self.close()
            return
        self._finishing, self._rest = listener, MAX_REST
        self.timer.set(REST_TIMEOUT)
        if self._is_uploading:
            listener.continue_body()

    def _on_body_sent(self) -> None:
        """Return the connection to the pool if the rest of the body has been written and little of it is buffered."""
        if not self._is_uploading and not self._is_writing_paused:
            self._finishing = None
            self.timer.clear()
            if self.pool is not None:
                self.pool.release(self)

    def _discard_rest(self) -> None:
        """Give up the rest of the body, if it is being sent."""
        listener, self._finishing = self._finishing, None
        if listener is not None:
            listener.discard_body()

    def _detach(self) -> None:
        response, self._response = self._response, None
        if response is not None:
            response.connection = None
        self.timer.clear()
