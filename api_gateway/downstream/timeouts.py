"""The timeouts of a downstream connection: of a head, a body, the next request, and a client that does not read."""

from api_gateway.downstream.body_timer import BodyTimer
from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.states import InputState
from api_gateway.errors import RequestTimeout
from api_gateway.eventloop.resetting import reset_connection
from api_gateway.eventloop.send_queue import unacknowledged
from api_gateway.http1.asgi import BodyReceiver


class ConnectionTimeouts:
    """Sets the timer of a connection, its `owner`, by the state, and handles the expiry."""

    __slots__ = ("_body", "_unsent")

    def __init__(self, limits: ConnectionLimits) -> None:
        self._body = BodyTimer(limits)
        self._unsent = 0  # bytes that the client had not acknowledged at the last check

    def __repr__(self) -> str:
        return f"<ConnectionTimeouts [{self._body!r}]>"

    def apply(self, owner: ConnectionOwner) -> None:
        """Set the timeout of the current state; none while an upstream's timeouts apply."""
        state, limits = owner.state, owner.limits
        if state.input is InputState.BODY or owner.is_write_paused:
            owner.timer.set(limits.idle_timeout)
        elif state.is_due:
            owner.timer.clear()
        elif state.input is InputState.HEAD:
            owner.timer.set(limits.header_timeout)
        else:
            owner.timer.set(limits.keep_alive_timeout)

    def begin_body(self) -> None:
        """Begin with the body of the next request."""
        self._body.received = 0

    def receive_body(self, size: int) -> None:
        """Count a piece of the body."""
        self._body.received += size

    def await_body(self, owner: ConnectionOwner) -> None:
        """Set the deadline of the next body piece, if a body is incomplete."""
        if owner.receiving is not None and not owner.state.is_ending:
            owner.timer.set(self._body.seconds_left(owner.receiving, owner.loop.time()))

    def change_body_rate(self, owner: ConnectionOwner, request: BodyReceiver) -> None:
        """Apply a changed minimum rate to the body of this request."""
        if request is owner.receiving:
            request.body_due = None
            self.await_body(owner)

    def on_read_paused(self, owner: ConnectionOwner) -> None:
        """Note the time: the client does not cause the delay of its body from now on."""
        self._body.pause(owner.loop.time())

    def on_read_resumed(self, owner: ConnectionOwner) -> None:
        """Extend the deadline of the body by the time for which reading was paused."""
        if owner.receiving is not None and not owner.state.is_ending:
            left = self._body.resume(owner.receiving, owner.loop.time())
            if left is not None:
                owner.timer.set(left)

    def expire(self, owner: ConnectionOwner) -> None:
        """Handle the expiry."""
        current: BodyReceiver | None = owner.pipeline.current if owner.exchange is None else owner.receiving
        if owner.state.is_ending or owner.is_write_paused or owner.transport.is_closing():
            self._check_reader(owner)
        elif current is not None and not current.is_response_complete:
            self._check_sender(owner, current)
        elif owner.state.input is InputState.HEAD:
            limit = owner.limits.header_timeout
            owner.refuse(RequestTimeout(f"The request's head did not arrive within {limit:g} s."))
        else:
            owner.close()

    def _check_reader(self, owner: ConnectionOwner) -> None:
        """Extend the timeout if the client has acknowledged bytes since the last check; abort otherwise.

        A connection without unwritten bytes is aborted too: it is only waiting to be closed.
        """
        transport = owner.transport
        unsent = unacknowledged(transport)
        if not transport.get_write_buffer_size():
            transport.abort()
            return
        if unsent == self._unsent:
            reset_connection(transport)
            return
        self._unsent = unsent
        owner.timer.set(owner.limits.idle_timeout)

    def _check_sender(self, owner: ConnectionOwner, request: BodyReceiver) -> None:
        """Terminate a request whose body is overdue."""
        now = owner.loop.time()
        if owner.receiving is not request:  # the body is complete; a pipelined head may wait for the response
            owner.timer.set(owner.limits.header_timeout)
        elif owner.is_read_paused or request.awaits_continue:  # the client does not cause the delay
            owner.timer.set(owner.limits.idle_timeout)
        elif request.body_due is not None and request.body_due > now:  # the deadline was extended
            owner.timer.set(request.body_due - now)
        elif request.is_started:
            reset_connection(owner.transport)
        else:
            owner.refuse(self._body.lateness(request))
