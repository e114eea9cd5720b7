"""A downstream connection: reads requests, has them served, and ends, by the tables in `states`.

Differences from uvicorn's protocol for httptools, whose place it takes (see also `request_cycle`):

- One task serves all requests of a connection in order (`pipeline`); plain ones need no task (the fast path).
- Heads are limited in size, number of lines and time (`request_reader`), bodies in their minimum rate (`body_timer`),
  and connections in number for each address (`slots`). Refusals are problem details, which reach the client even while
  it is still sending (`closing`).
- The scope contains a `ServerExtension`. Trailers are kept apart from header fields.
- Requests that follow a refused request are discarded.

The module is long because the connection has three interfaces: the protocol for asyncio, the port for the fast path,
and the one for request cycles.
"""

import asyncio
from typing import Any, ClassVar, Final

from api_gateway.downstream.asgi_scope import ScopeBuilder, peer_of
from api_gateway.downstream.client_certificate import certificate_of
from api_gateway.downstream.closing import break_off, close_connection, end_connection, refuse_request
from api_gateway.downstream.draining import drain, drain_idle, owes_response
from api_gateway.downstream.listener_state import ListenerState
from api_gateway.downstream.pipeline import HeldInput, Pipeline
from api_gateway.downstream.plain_body import begin_body
from api_gateway.downstream.request_cycle import RequestResponseCycle
from api_gateway.downstream.request_input import RequestIntake, receive, replay_held
from api_gateway.downstream.request_reader import RequestReader
from api_gateway.downstream.server_context import ServerContext
from api_gateway.downstream.slots import SURPLUS_TIMEOUT
from api_gateway.downstream.states import ILLEGAL_EVENTS, START, ConnectionEvent, ConnectionState, InputState, Service
from api_gateway.downstream.timeouts import ConnectionTimeouts
from api_gateway.errors import GatewayError
from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.http1.asgi import (
    CERTIFICATE,
    SERVER_EXTENSION,
    UNIX_PEER,
    BodyReceiver,
    DownstreamAbilities,
    FastPathProvider,
    InFlight,
)
from api_gateway.http1.request_head import RequestHead
from api_gateway.http1.serializer import render_response_head
from api_gateway.models import ClientCertificate, HeaderList

_EXCHANGE_BEGUN: Final = ConnectionEvent.EXCHANGE_BEGUN  # attributes of an enumeration are slow to read
_EXCHANGE_ENDED: Final = ConnectionEvent.EXCHANGE_ENDED
_NO_HEADERS: Final[HeaderList] = []


class DownstreamConnection:
    """One downstream connection: the protocol of its transport, and the port of the fast path and request cycles.

    Many connections serve a single plain request. What such a request does not need is created when it is first used:
    `reader`, `pipeline`, `held`, `scopes` and `timeouts`.

    `accepts_plain` is True if the fast path may take the next read: if `state.is_idle` and the client reads what was
    sent before. `receiving` and `exchange`: see `ConnectionOwner`. asyncio requires no base class of a protocol.
    """

    abilities: ClassVar[DownstreamAbilities] = DownstreamAbilities(framing=True, upgrade=True)

    __slots__ = (
        "_fast_path",
        "_held",
        "_pipeline",
        "_reader",
        "_scopes",
        "_server",
        "_timeouts",
        "_writable",
        "accepts_plain",
        "app",
        "body_left",
        "certificate",
        "client",
        "discarded",
        "exchange",
        "expects_continue",
        "is_read_paused",
        "is_write_paused",
        "last_headers",
        "limits",
        "listener",
        "loop",
        "raw_headers",
        "receiving",
        "scheme",
        "secure_fields",
        "slot",
        "state",
        "tasks",
        "timer",
        "transport",
    )

    def __init__(self, listener: ListenerState, server: ServerContext) -> None:
        self.listener = listener
        self.app = server.app
        self.loop = server.loop
        self.limits = listener.limits
        self.tasks = server.state.tasks
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set by `connection_made`
        self.client: tuple[str, int] | None = None
        self.scheme = "http"
        self.secure_fields = _NO_HEADERS  # of all responses
        self.certificate: ClientCertificate | None = None
        self.state: ConnectionState = START
        self.accepts_plain = self.is_write_paused = self.is_read_paused = False
        self.last_headers: Any = None  # the header set of the previous request, cached by the fast path
        self.raw_headers = _NO_HEADERS  # of the request whose cycle is created
        self.expects_continue = False
        self.exchange: InFlight | None = None
        self.receiving: BodyReceiver | None = None
        self.body_left = self.discarded = 0
        self._server = server
        self._fast_path: FastPathProvider | None = None  # of `app`, set by `connection_made`
        self._reader: RequestReader | None = None
        self._pipeline: Pipeline | None = None
        self._held: HeldInput | None = None
        self._scopes: ScopeBuilder | None = None
        self._timeouts: ConnectionTimeouts | None = None
        self.timer = DeadlineTimer(server.loop, self._on_timeout)
        self._writable: asyncio.Future[None] | None = None  # done when the client reads again

    def __repr__(self) -> str:
        return f"<DownstreamConnection {self.client[0] if self.client else 'of an unknown client'} [{self.state}]>"

    @property
    def reader(self) -> RequestReader:
        """The general parser."""
        if self._reader is None:
            self._reader = RequestReader(self.limits, RequestIntake(self))
        return self._reader

    @property
    def pipeline(self) -> Pipeline:
        """The requests on the ASGI path."""
        if self._pipeline is None:
            self._pipeline = Pipeline()
        return self._pipeline

    @property
    def held(self) -> HeldInput:
        """The input that is kept and not parsed."""
        if self._held is None:
            self._held = HeldInput()
        return self._held

    @property
    def scopes(self) -> ScopeBuilder:
        """The builder of ASGI scopes."""
        if self._scopes is None:
            self._scopes = ScopeBuilder(self._server.root_path, self._server.app_state)
        return self._scopes

    @property
    def timeouts(self) -> ConnectionTimeouts:
        """The timeouts of bodies, and of states that plain requests do not reach."""
        if self._timeouts is None:
            self._timeouts = ConnectionTimeouts(self.limits)
        return self._timeouts

    def move(self, event: ConnectionEvent) -> None:
        """Change the state. An illegal event ends this connection; see `IllegalEvents`."""
        after = self.state.after.get(event)
        if after is not None:
            self.state = after
            return
        ILLEGAL_EVENTS.report(self, self.state, event)
        if ConnectionEvent.CLOSE in self.state.after:
            self.state = self.state.after[ConnectionEvent.CLOSE]
            self.stop_input()
        self.transport.abort()

    # The beginning and the end

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a slot and start the timeout of the first head (asyncio callback)."""
        self.transport = transport
        connections: set[Any] = self._server.state.connections  # uvicorn names its own protocols as members
        connections.add(self)
        self.client = client = self.client or peer_of(transport)
        if transport.get_extra_info("sslcontext") is not None:
            self.scheme = "https"
            self.secure_fields = self.listener.secure_fields
            self.certificate = certificate_of(transport.get_extra_info("peercert"))
            if self.certificate is not None:
                self.scopes.marks[CERTIFICATE] = self.certificate
        peer = client[0] if client and client != UNIX_PEER else ""
        self.slot = slot = self.listener.slots.acquire(peer, self.limits.connections_per_peer)
        self._fast_path = getattr(self.app, "fast_path", None)
        if not slot.surplus:
            self.timer.set(self.limits.header_timeout)
            self.accepts_plain = self._fast_path is not None
            return
        self.timer.set(SURPLUS_TIMEOUT)
        if slot.is_excess:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Release the connection's resources and abort its exchanges (asyncio callback)."""
        if self.state.is_lost:  # a tunnel that begins after the loss reports it again
            return
        is_tunnelled = self.state.service is Service.TUNNELLING
        self.move(ConnectionEvent.LOST)
        connections: set[Any] = self._server.state.connections  # as above
        connections.discard(self)
        self.slot.release()
        self.timer.stop()
        exchange, self.exchange = self.exchange, None
        if self.is_write_paused:
            self.resume_writing()
        self.stop_input()
        if self._pipeline is not None:
            self._pipeline.wake()
            if self._pipeline.current is not None:
                self._pipeline.current.disconnect()
        if self._reader is not None:
            self._reader.close()
        if exchange is not None and not is_tunnelled:  # a tunnel has both connections, and ends by itself
            exchange.on_client_disconnected()
        receiving, self.receiving = self.receiving, None
        if receiving is not None:
            receiving.disconnect()

    def eof_received(self) -> bool:
        """Return whether to keep the connection: a half-closed client may still read (RFC 9112 section 9.6)."""
        if owes_response(self):
            self.move(ConnectionEvent.CLIENT_EOF)
            return True
        if not self.state.is_ending:
            self.close()
        return False

    def shutdown(self) -> None:
        """Close the connection gracefully; see `drain`."""
        drain(self)

    @property
    def is_busy(self) -> bool:
        """True while a request is served, a tunnel is open, or a response is not completely written."""
        return self.exchange is not None or self.pipeline.is_working or self.transport.get_write_buffer_size() > 0

    def abort(self) -> None:
        """Abort the connection at the end of the drain, unless a task serves it: the server cancels tasks itself."""
        if self.pipeline.is_working:
            return
        self.transport.abort()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.on_forced_close()

    def refuse(self, error: GatewayError, head: RequestHead | None = None) -> None:
        """Refuse the request that is being read, and end the connection; see `closing`."""
        refuse_request(self, error, head)

    def close(self) -> None:
        """Close the connection after its write buffer is flushed; see `closing`."""
        close_connection(self)

    def stop_input(self) -> None:
        """Drop held input and queued requests; discard what still arrives."""
        self.accepts_plain = False
        if self._reader is not None:
            self._reader.stop()
        if self._held is not None:
            self._held.clear()
        if self._pipeline is not None:
            self._pipeline.drop_waiting()

    def _on_timeout(self) -> None:
        self.timeouts.expire(self)

    # Reading

    def data_received(self, data: bytes) -> None:
        """Process input: on the fast path if it is a plain request, else by the parser within the limits."""
        if self.accepts_plain:
            if self._fast_path.current.try_handle(self, data):  # type: ignore[union-attr]  # implied by the test
                return
            self.accepts_plain = False
            self.reader.forget_line_breaks()
        receive(self, data)

    def replay(self) -> None:
        """Parse the held input."""
        replay_held(self)

    def cycle_of(self, head: RequestHead) -> RequestResponseCycle:
        """Return the request cycle of a head."""
        self.raw_headers = head.headers
        self.expects_continue = head.expects_continue and not head.has_body_begun
        scope = self.scopes.scope(head, self.transport, self.client, self.scheme)
        scope[SERVER_EXTENSION] = cycle = RequestResponseCycle(self, scope, head.target)
        cycle.is_http10 = head.version == "1.0"
        cycle.keep_alive = head.keep_alive
        cycle.is_last = not head.keep_alive
        cycle.upgrade = head.upgrade
        return cycle

    def pause_reading(self) -> None:
        """Stop reading from the client, so that TCP applies back-pressure."""
        if not self.is_read_paused and not self.transport.is_closing():
            self.is_read_paused = True
            self.timeouts.on_read_paused(self)
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the client again, unless input is held."""
        if self.is_read_paused and (self._held is None or not self._held.data) and not self.transport.is_closing():
            self.is_read_paused = False
            self.timeouts.on_read_resumed(self)
            self.transport.resume_reading()

    def on_body_rate(self, request: BodyReceiver) -> None:
        """Apply a changed minimum rate to the body of this request."""
        self.timeouts.change_body_rate(self, request)

    # The fast path: implements `client_port.Downstream`

    def begin_exchange(self, exchange: InFlight) -> None:
        """Hold further input until the exchange ends, and report events of the connection to it."""
        self.exchange = exchange
        self.accepts_plain = False
        self.move(_EXCHANGE_BEGUN)
        if not self.state.is_ending:
            self.timer.clear()

    def end_exchange(self, *, keep_alive: bool) -> None:
        """Process the next request after a complete response, or close the connection."""
        exchange, self.exchange = self.exchange, None
        self._server.state.total_requests += 1
        if keep_alive and (self._held is None or not self._held.data):
            self.move(_EXCHANGE_ENDED)
            if not self.state.is_ending:
                self.become_idle()
            return
        self.move(ConnectionEvent.LAST_RESPONSE)
        if self.state.is_ending:
            return
        if keep_alive:
            self.held.replay_soon(self)
            self.timeouts.apply(self)
        else:
            is_last = exchange is not None and exchange.is_last
            end_connection(self, is_complete=is_last and self.receiving is None)

    def receive_body(self, body: BodyReceiver, left: int) -> None:
        """Pass the rest of the body of the exchange in flight to `body`: `left` bytes, or (0) what is parsed."""
        begin_body(self, body, left)

    @property
    def is_draining(self) -> bool:
        """True once the server has begun to stop."""
        return self.state.is_draining

    def write_response(self, response: bytes, *, keep_alive: bool, is_last: bool) -> None:
        """Send a complete response to a request for which `begin_exchange` was not called."""
        self.transport.write(response)
        self._server.state.total_requests += 1
        self.move(ConnectionEvent.PLAIN_RESPONSE)
        if keep_alive:
            self.become_idle()
        else:
            end_connection(self, is_complete=is_last)

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """Send 101 for the exchange in flight and give up the transport, see `detach_transport`."""
        return self.detach_transport(render_response_head(101, reason, headers))

    def become_idle(self) -> None:
        """Set the timeout for the next request; open the fast path if nothing of it has arrived."""
        state = self.state
        if state.is_idle and not self.is_write_paused:
            self.timer.set(self.limits.keep_alive_timeout)
            self.accepts_plain = self._fast_path is not None
            return
        self.timeouts.apply(self)
        if state.is_due or state.is_held or state.input is InputState.BODY:
            return
        if state.is_half_closed:
            self.close()
        elif state.is_draining:
            drain_idle(self)

    # Serving

    def on_worker_end(self) -> None:
        """Break the reference cycle with a request whose body did not end."""
        self.receiving = None

    def on_unfinished(self, cycle: RequestResponseCycle) -> None:
        """Terminate an incomplete response so that the client detects that it is incomplete."""
        if not self.state.is_ending:
            break_off(self, cycle)

    def on_cycle_complete(self, cycle: RequestResponseCycle) -> None:
        """Process the next request after a complete response, or close the connection."""
        self._server.state.total_requests += 1
        if not cycle.keep_alive and not self.state.is_ending:
            end_connection(self, is_complete=cycle.is_last and cycle.is_body_complete)
            return
        self.move(ConnectionEvent.RESPONSE if self.pipeline.waiting else ConnectionEvent.LAST_RESPONSE)
        if self.state.is_ending:
            return
        if cycle.upgrade:  # the handshake was refused, and the connection remains HTTP
            self.reader.renew()
        if not self.state.is_held:
            self.resume_reading()
        elif self.pipeline.may_refill:
            self.held.replay_soon(self)
        self.discarded = 0
        self.become_idle()

    def detach_transport(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the 101 response and give up the connection; see `ServerExtension.switch_protocols`."""
        self.move(ConnectionEvent.SWITCH)
        if not self.state.is_lost:
            self.timer.stop()
            self.transport.write(head)
            self.resume_reading()
        return self.transport, self.held.take()

    # Writing

    def pause_writing(self) -> None:
        """Start the idle timeout: the client reads more slowly than the gateway writes (asyncio callback)."""
        self.is_write_paused = True
        self._writable = self.loop.create_future()
        if not self.state.is_ending:
            self.timer.set(self.limits.idle_timeout)

    def resume_writing(self) -> None:
        """Resume sending: the write buffer is below its low-water mark (asyncio callback)."""
        self.is_write_paused = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
            if not self.state.is_ending:
                self.timeouts.apply(self)
        self._writable = None
        if self.exchange is not None:
            self.exchange.on_writable()

    async def wait_until_writable(self) -> None:
        """Wait until the client reads on or disconnects."""
        while self._writable is not None:
            await asyncio.wait({self._writable})  # awaiting the shared future itself would cancel it with this task
