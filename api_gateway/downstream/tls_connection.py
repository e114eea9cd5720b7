"""TLS of one downstream connection: a protocol of the TCP transport, and the transport of the connection behind it.

It takes the place of `ssl=` of the event loop, which hides connections until their handshake has ended: those would
count for no limit, failures would have no reason, and a PROXY protocol header could not come first. Unlike the TLS of
asyncio and uvloop, it can end its own side alone (RFC 8446 section 6.1), so lingering and half-closed clients work as
without TLS.

Encrypted bytes are buffered by the TCP transport alone, whose limits are those of the connection: writing never waits
here, and reading is paused there. Long because it has two interfaces of asyncio.
"""

import asyncio
import ssl
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from typing import Any, Final, Protocol

from uvicorn.server import ServerState

from api_gateway.downstream.asgi_scope import peer_of
from api_gateway.downstream.closing import last_response
from api_gateway.downstream.listener_state import ListenerState
from api_gateway.downstream.slots import SURPLUS_TIMEOUT, Slot
from api_gateway.downstream.tls_terminator import TLS_COUNTERS, TlsTerminator, failure_of
from api_gateway.errors import BadRequest
from api_gateway.http1.asgi import UNIX_PEER
from api_gateway.resilience.fair_shares import FairShares

_READ_SIZE: Final = 65_536  # more than a record
_MAX_JOINED: Final = 262_144  # bytes that are passed on at once
_MAX_REPLIES: Final = 65_536  # bytes of replies to key updates that a client does not read
_HANDSHAKE_RECORD: Final = 0x16
PLAIN_HTTP = "This port is for HTTPS: send the request to https:// instead of http://."


class TlsPhase(Enum):
    """The phases of a connection, in their only order. In `CLOSED`, its TCP transport ends."""

    HANDSHAKE = 0
    OPEN = 1
    WRITE_ENDED = 2  # its own side has ended; the client's is read
    CLOSED = 3


_HANDSHAKE, _OPEN, _WRITE_ENDED, _CLOSED = TlsPhase  # attributes of an enumeration are slow to read


class InnerConnection(Protocol):
    """The connection behind TLS: a protocol of asyncio that can be shut down."""

    client: tuple[str, int] | None
    loop: asyncio.AbstractEventLoop

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin (asyncio callback)."""
        ...

    def shutdown(self) -> None:
        """Close the connection gracefully."""
        ...


class TlsConnection:
    """TLS of one downstream connection; the module's docstring describes it.

    `phase` is its state. It is in the server's set of connections during the handshake.

    During the handshake it has a slot of its listener, as a connection of its address, and one of the handshakes in
    progress, which are shared fairly. asyncio requires no base class of a transport or a protocol.
    """

    __slots__ = (
        "_has_ended",
        "_incoming",
        "_inner",
        "_is_draining",
        "_is_reading",
        "_is_write_paused",
        "_listener",
        "_loop",
        "_outgoing",
        "_peer_ended",
        "_principal",
        "_protocol",
        "_reply_bytes",
        "_server_state",
        "_shares",
        "_slot",
        "_ssl",
        "_terminator",
        "_timer",
        "_transport",
        "phase",
    )

    def __init__(
        self, inner: InnerConnection, listener: ListenerState, terminator: TlsTerminator, server_state: ServerState
    ) -> None:
        self.phase = _HANDSHAKE
        self._inner = inner
        self._loop = inner.loop
        self._listener = listener
        self._terminator = terminator
        self._server_state = server_state
        self._protocol: Any = inner
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set by `connection_made`
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl: ssl.SSLObject | None = None  # created with the first bytes
        self._slot: Slot | None = None
        self._shares: FairShares | None = None  # of handshakes, while this one has a slot, as one of `_principal`
        self._principal: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        self._is_reading = True
        self._is_write_paused = False
        self._peer_ended = False  # the client has ended its side, and the protocol knows
        self._has_ended = False  # the TCP connection is lost
        self._reply_bytes = 0

    def __repr__(self) -> str:
        return f"<TlsConnection [{self.phase.name}]>"

    # The protocol of the TCP transport: beginning and end

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take the slots, and wait for the handshake (asyncio callback)."""
        self._transport = transport
        connections: set[object] = self._server_state.connections  # type: ignore[assignment]  # uvicorn names its own protocols
        connections.add(self)
        client = self._inner.client or peer_of(transport)
        peer = client[0] if client and client != UNIX_PEER else ""
        limits, terminator = self._listener.limits, self._terminator
        self._slot = slot = self._listener.slots.acquire(peer, limits.connections_per_peer)
        principal = self._listener.slots.share_principal(peer) if peer else None
        if slot.is_excess or not terminator.handshakes.try_acquire(principal):
            self._fail("too_many")
            transport.abort()
            return
        self._principal, self._shares = principal, terminator.handshakes
        limit = terminator.section.handshake_timeout
        self._set_timer(min(limit, SURPLUS_TIMEOUT) if slot.surplus else limit)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the resources, and report the loss to the protocol (asyncio callback)."""
        if self._has_ended:
            return
        self._has_ended = True
        if self.phase is _HANDSHAKE:
            self._fail("disconnected")
            return
        self.phase = _CLOSED
        if self._ssl is not None:  # the handshake has succeeded
            self._protocol.connection_lost(exc)

    def shutdown(self) -> None:
        """Let a handshake end within `drain_linger`; the connection behind it then drains."""
        self._is_draining = True
        if self.phase is _HANDSHAKE:
            self._set_timer(self._listener.limits.drain_linger)

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._on_timeout)

    def _on_timeout(self) -> None:
        if self.phase is _HANDSHAKE:
            self._fail("timeout")
            self._transport.abort()

    def _fail(self, reason: str) -> None:
        """End the handshake; what remains is to close the TCP transport."""
        TLS_COUNTERS.failures[reason] += 1
        self.phase = _CLOSED
        self._ssl = None
        self._leave_handshake()

    def _leave_handshake(self) -> None:
        connections: set[object] = self._server_state.connections  # type: ignore[assignment]  # as above
        connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()
        shares, self._shares = self._shares, None
        if shares is not None:
            shares.release(self._principal)

    # The protocol of the TCP transport: input

    def data_received(self, data: bytes) -> None:
        """Continue the handshake, or decrypt (asyncio callback)."""
        if self.phase is _CLOSED or self._peer_ended:
            return
        if self._ssl is None:
            if data[0] != _HANDSHAKE_RECORD:
                self._refuse_plain(data)
                return
            self._ssl = self._terminator.front.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._incoming.write(data)
        if self.phase is _HANDSHAKE:
            self._shake_hands(self._ssl)
        else:
            self._decrypt()

    def eof_received(self) -> bool:
        """Report the end of the client's side; return whether the connection stays open (asyncio callback)."""
        if self.phase is _HANDSHAKE or self.phase is _CLOSED:
            return False
        if not self._peer_ended:
            self._on_peer_ended()
        return self.phase is not _CLOSED

    def _shake_hands(self, handshake: ssl.SSLObject) -> None:
        try:
            handshake.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._flush()  # the alert
            self._fail(failure_of(error))
            self._transport.close()
            return
        version = handshake.version() or ""
        TLS_COUNTERS.handshakes[f"{version}/{'resumed' if handshake.session_reused else 'new'}"] += 1
        self._flush()  # the session tickets
        self.phase = _OPEN
        self._leave_handshake()
        self._inner.connection_made(self)  # type: ignore[arg-type]  # a transport without a base class
        if self._is_write_paused:
            self._protocol.pause_writing()
        if self._is_draining:
            self._inner.shutdown()
        if self._incoming.pending:
            self._decrypt()

    def _refuse_plain(self, data: bytes) -> None:
        """Respond to plain HTTP, and close anything else."""
        if not data[:1].isalpha():
            self._fail("not_tls")
            self._transport.close()
            return
        self._fail("plain_http")
        self._listener.refused[BadRequest.reason] += 1
        self._transport.write(last_response(BadRequest(PLAIN_HTTP), []))
        self._transport.close()

    def _decrypt(self) -> None:
        """Pass on what has arrived, while the protocol reads."""
        while self._is_reading and self.phase is not _CLOSED and not self._peer_ended:
            pieces: list[bytes] = []
            has_ended = self._read_into(pieces)
            if self._outgoing.pending:
                self._send_replies()
            if pieces:
                self._protocol.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            if has_ended and not self._peer_ended and self.phase is not _CLOSED:
                self._on_peer_ended()
            if not pieces:
                return

    def _read_into(self, pieces: list[bytes]) -> bool:
        """Decrypt what has arrived, up to a limit; return True at the end of the client's side."""
        connection, size = self._ssl, 0
        assert connection is not None  # noqa: S101 - the handshake has succeeded
        try:
            while size < _MAX_JOINED and (self._incoming.pending or connection.pending()):
                piece = connection.read(_READ_SIZE)
                if not piece:
                    return True
                pieces.append(piece)
                size += len(piece)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:  # a forged or broken record, or one behind the end of its own side
            if self.phase is _OPEN:
                pieces.clear()
                self.abort()
            return True
        return False

    def _send_replies(self) -> None:
        """Send the output of reading, such as replies to key updates; abort if the client leaves too much unread."""
        if self._is_write_paused:
            self._reply_bytes += self._outgoing.pending
            if self._reply_bytes > _MAX_REPLIES:
                self.abort()
                return
        self._flush()

    def _on_peer_ended(self) -> None:
        self._peer_ended = True
        if not self._protocol.eof_received():
            self.close()

    # The protocol of the TCP transport: output

    def pause_writing(self) -> None:
        """Pass it on (asyncio callback)."""
        self._is_write_paused = True
        if self.phase is not _HANDSHAKE and self._ssl is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on (asyncio callback)."""
        self._is_write_paused = False
        self._reply_bytes = 0
        if self.phase is not _HANDSHAKE and self._ssl is not None:
            self._protocol.resume_writing()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self._transport.write(data)

    # The transport of the connection behind it

    def write(self, data: bytes) -> None:
        """Encrypt and send (see `asyncio.Transport`)."""
        if self.phase is not _OPEN or not data:
            return
        assert self._ssl is not None  # noqa: S101 - it is open
        try:
            self._ssl.write(data)
        except ssl.SSLError:  # the connection is broken
            self.abort()
            return
        self._transport.write(self._outgoing.read())

    def writelines(self, pieces: Iterable[bytes]) -> None:
        """Encrypt and send (see `asyncio.Transport`)."""
        self.write(b"".join(pieces))

    def can_write_eof(self) -> bool:
        """Return True: `write_eof` ends one side alone."""
        return True

    def write_eof(self) -> None:
        """Send what was written and a close_notify; the client may send on."""
        if self.phase is _OPEN:
            self.phase = _WRITE_ENDED
            self._notify_close()
            self._transport.write_eof()

    def close(self) -> None:
        """Send what was written and a close_notify, and close."""
        if self.phase is _CLOSED:
            return
        if self.phase is _OPEN:
            self._notify_close()
        self.phase = _CLOSED
        self._transport.close()

    def _notify_close(self) -> None:
        """Send close_notify. `unwrap` raises an error if the client's close_notify has not arrived; it is ignored."""
        assert self._ssl is not None  # noqa: S101 - it is open
        with suppress(OSError):
            self._ssl.unwrap()
        self._flush()

    def abort(self) -> None:
        """Reset the connection."""
        if not self._has_ended:
            self.phase = _CLOSED
            self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether it is closed or closing."""
        return self.phase is _CLOSED or self._transport.is_closing()

    def pause_reading(self) -> None:
        """Stop reading; what has arrived stays encrypted."""
        self._is_reading = False
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, soon: the caller may be in `data_received`."""
        if self._is_reading or self._has_ended:
            return
        self._is_reading = True
        self._transport.resume_reading()
        if self._incoming.pending or (self._ssl is not None and self._ssl.pending()):
            self._loop.call_soon(self._decrypt)

    def is_reading(self) -> bool:
        """See `asyncio.ReadTransport`."""
        return self._is_reading

    def get_write_buffer_size(self) -> int:
        """Return the bytes that the TCP transport has not sent."""
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the limits of the TCP transport."""
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of the TCP transport."""
        self._transport.set_write_buffer_limits(high, low)

    def set_protocol(self, protocol: Any) -> None:
        """Replace the protocol behind it."""
        self._protocol = protocol

    def get_protocol(self) -> Any:
        """Return the protocol behind it."""
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a value about the connection by its name, as transports of asyncio do; `tcp_transport` carries it."""
        if name == "tcp_transport":
            return self._transport
        connection = self._ssl
        if connection is not None:
            if name == "ssl_object":
                return connection
            if name == "sslcontext":
                return connection.context
            if name == "peercert":
                return connection.getpeercert()
        return self._transport.get_extra_info(name, default)
