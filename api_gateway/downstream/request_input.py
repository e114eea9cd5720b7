"""The input of a downstream connection: parsed into requests, held behind a response that is due, or discarded."""

from collections import Counter
from typing import Final

from api_gateway.downstream.closing import discard_body, discard_input
from api_gateway.downstream.draining import announce_close
from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.plain_body import take_body
from api_gateway.downstream.states import ConnectionEvent, InputState, Persistence, Service
from api_gateway.errors import GatewayError, Overloaded
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import HeaderList

PARSED_HEADS: Final[Counter[str]] = Counter()  # heads read in this process, by parser; plain ones are not counted
_LONG_READ = 65_536  # bytes at once, behind which more is probably waiting
PROBES = (b"/healthz", b"/readyz")  # request targets that are served on surplus connections too


class RequestIntake:
    """Takes the requests that the general parser reads. Implements `RequestSink`.

    While no request of the connection is being served, the next one is offered to the fast path: at its end if it has
    no body, else when its head is complete. Other requests are queued for the ASGI path.
    """

    __slots__ = ("_is_taken", "_offered", "_owner")

    def __init__(self, owner: ConnectionOwner) -> None:
        self._owner = owner
        self._offered: RequestHead | None = None  # without a body, to be offered at its end
        self._is_taken = False  # the fast path has taken the last one of those

    def __repr__(self) -> str:
        return f"<RequestIntake of {self._owner!r}>"

    def on_head_begun(self) -> None:
        """Start the timeout of a head; that of the first one runs since the connection was made."""
        owner = self._owner
        if owner.state.is_between:
            if owner.state.input is not InputState.NEW:
                owner.timer.set(owner.limits.header_timeout)
            owner.move(ConnectionEvent.HEAD_BEGUN)
            owner.accepts_plain = False  # what follows a body in one read has not been offered to the fast path

    def on_request(self, head: RequestHead, trailers: HeaderList) -> None:
        """Take a request whose head the general parser has read; its body follows."""
        PARSED_HEADS["general"] += 1
        if not _is_for_fast_path(self._owner, head):
            self._enqueue(head, trailers)
        elif head.length == 0:
            self._offered = head
        elif not self._owner.app.fast_path.current.try_head(self._owner, head, trailers):
            self._enqueue(head, trailers)

    def _enqueue(self, head: RequestHead, trailers: HeaderList) -> None:
        """Queue a request for the ASGI path."""
        owner = self._owner
        surplus = owner.slot.surplus
        if surplus and head.target not in PROBES:
            owner.refuse(Overloaded(surplus, retry_after=1), head)
            return
        owner.receiving = cycle = owner.cycle_of(head)
        cycle.trailers = trailers
        if surplus:
            cycle.keep_alive = False
        owner.timeouts.begin_body()
        owner.move(ConnectionEvent.HEAD_COMPLETE)
        owner.pipeline.enqueue(owner, cycle)

    def on_body_piece(self, piece: bytes) -> None:
        """Pass a body piece to the request; discard it if the response is complete.

        After the response, pieces of a body that is continued count as discarded ones do.
        """
        owner = self._owner
        request = owner.receiving
        assert request is not None  # noqa: S101 - set by `on_request`, or by the fast path
        owner.timeouts.receive_body(len(piece))
        if not request.is_response_complete or request.is_body_continued:
            if request.feed(piece):
                owner.pause_reading()
            if not request.is_response_complete:
                return
        discard_body(owner, len(piece))

    def on_body_announced(self, size: int) -> None:
        """Let the request refuse a body that will be larger than its limit."""
        request = self._owner.receiving
        if request is not None and not request.is_response_complete:
            request.announce(size)

    def on_body_complete(self) -> None:
        """End the request; offer it to the fast path if it had no body."""
        owner = self._owner
        head, self._offered = self._offered, None
        self._is_taken = False
        if head is not None:
            if owner.app.fast_path.current.try_head(owner, head, []):
                self._is_taken = True
                return
            self._enqueue(head, [])
        request, owner.receiving = owner.receiving, None
        assert request is not None  # noqa: S101 - as above
        if owner.exchange is None:
            owner.move(ConnectionEvent.BODY_COMPLETE)
        else:
            owner.resume_reading()  # while the exchange is in flight, input is held up to a limit of its own
            owner.move(ConnectionEvent.EXCHANGE_BODY_COMPLETE)
        request.end_body()
        if request.is_response_complete:
            owner.become_idle()
        else:
            owner.timeouts.apply(owner)

    def on_handshake(self) -> None:
        """Hold the input after a WebSocket handshake until its response, as the fast path does with any request."""
        if self._is_taken:
            self._owner.reader.renew()
        else:
            self._owner.move(ConnectionEvent.HOLD)

    def refuse(self, error: GatewayError) -> None:
        """Refuse the request that is being read."""
        self._owner.refuse(error)


def _is_for_fast_path(owner: ConnectionOwner, head: RequestHead) -> bool:
    """Return whether the fast path may take a request whose head the general parser has read."""
    state = owner.state
    return (
        head.version == "1.1"
        and not owner.slot.surplus
        and not owner.is_write_paused
        and state.service is Service.IDLE
        and state.persistence is Persistence.PERSISTENT
        and getattr(owner.app, "fast_path", None) is not None
    )


def receive(owner: ConnectionOwner, data: bytes) -> None:
    """Process received bytes that the fast path has not taken."""
    state = owner.state
    if state.is_ending:
        discard_input(owner, len(data))
    elif state.is_held:
        _hold(owner, data)
    else:
        if owner.body_left:
            _parse_rest(owner, take_body(owner, data))
        else:
            _parse(owner, data)
            if len(data) >= _LONG_READ and owner.receiving is not None:
                _let_others_read(owner)
        if owner.state.is_draining:
            announce_close(owner)


def _let_others_read(owner: ConnectionOwner) -> None:
    """Read on in the next turn of the event loop.

    A body in chunks of one byte takes 0.1 s of CPU time for each MB, and uvloop would read up to 8 MB at once.
    """
    if not owner.is_read_paused and not owner.transport.is_closing():
        owner.transport.pause_reading()
        owner.loop.call_soon(_read_on, owner)


def _read_on(owner: ConnectionOwner) -> None:
    if not owner.is_read_paused and not owner.transport.is_closing():
        owner.transport.resume_reading()


def replay_held(owner: ConnectionOwner) -> None:
    """Parse the held input and resume reading."""
    if not owner.state.is_held:  # the connection has ended meanwhile
        return
    owner.move(ConnectionEvent.RELEASE)
    _parse(owner, owner.held.take())
    if not owner.state.is_ending and not owner.state.is_due:
        owner.become_idle()
    elif owner.state.is_draining:
        announce_close(owner)
    owner.resume_reading()


def _parse_rest(owner: ConnectionOwner, rest: memoryview) -> None:
    """Hold or parse what follows a body in one read."""
    if rest and owner.state.is_held:
        _hold(owner, rest)
    elif rest and not owner.state.is_ending:
        owner.accepts_plain = False
        owner.reader.forget_line_breaks()
        _parse(owner, bytes(rest))


def _hold(owner: ConnectionOwner, data: bytes | memoryview) -> None:
    """Hold input that may not be parsed yet; pause reading above REQUEST_HIGH_WATER."""
    if owner.held.add(data):
        owner.pause_reading()


def _parse(owner: ConnectionOwner, data: bytes) -> None:
    """Parse `data` piece by piece; hold the rest once the pipeline is full."""
    reader = owner.reader
    view = reader.begin(data)
    while view and not owner.state.is_ending:
        if owner.state.is_between and owner.pipeline.is_full:
            owner.move(ConnectionEvent.HOLD)
            owner.pause_reading()
        if owner.state.is_held:
            _hold(owner, view)
            return
        size = reader.feed(view)
        if not size and not owner.state.is_held and not owner.state.is_ending:
            owner.close()
        view = view[size:]
    if not owner.state.is_ending:
        reader.check_sizes()
        owner.timeouts.await_body(owner)
