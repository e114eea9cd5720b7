"""The states of a downstream connection, as tables of state, event and next state.

Reading and serving overlap, because a client may send further requests before it has received a response (RFC 9112
section 9.3.2). So there is one table for each, and a third one for whether further requests may follow. One event may
change several of them. An event that a table knows, but not in its current state, is illegal; an event that a table
does not know does not concern it.

`START` is the first of the combined states; each knows the next one for every legal event. `docs/architecture.md`
shows the tables as diagrams, which `python -m tests.unit.test_connection_states` draws.
"""

import logging
from collections import Counter
from enum import IntEnum, auto
from typing import Final, TypeVar

logger = logging.getLogger(__name__)


class ConnectionEvent(IntEnum):
    """The events of a connection."""

    HEAD_BEGUN = auto()  # a part of a head has arrived
    HEAD_COMPLETE = auto()  # the request is queued; its body follows
    BODY_COMPLETE = auto()
    HOLD = auto()  # the next input may not be parsed before a response is complete
    RELEASE = auto()  # it may be parsed now
    EXCHANGE_BEGUN = auto()  # the fast path has taken a request; also when it begins to forward that
    BODY_AWAITED = auto()  # the request that the fast path has taken has a body, which is incomplete
    EXCHANGE_BODY_COMPLETE = auto()  # that body is complete, and the exchange in flight
    EXCHANGE_ENDED = auto()  # the fast path has completed its response, and no input is held
    PLAIN_RESPONSE = auto()  # the fast path has responded to a complete request at once
    RESPONSE = auto()  # a response is complete; another request is queued
    LAST_RESPONSE = auto()  # a response is complete; no request is queued
    SWITCH = auto()  # 101: the connection carries another protocol
    LINGER = auto()  # the last response is complete, and the client may still be sending
    CLOSE = auto()  # nothing more is served
    LOST = auto()  # the transport is closed
    DRAIN = auto()  # the server stops
    CLIENT_EOF = auto()  # the client has ended its side, and is owed a response


class InputState(IntEnum):
    """The state of the input."""

    NEW = auto()  # nothing has arrived since the connection was made
    IDLE = auto()  # no part of the next request has arrived
    HEAD = auto()  # a head is incomplete
    BODY = auto()  # a body is incomplete; it is passed on, or discarded after an early response
    HELD = auto()  # input is kept and not parsed
    DISCARDING = auto()  # input is discarded
    TUNNELLED = auto()  # input belongs to another protocol


class Service(IntEnum):
    """The state of the responses."""

    IDLE = auto()  # none is due
    FORWARDING = auto()  # one is due, from the fast path
    SERVING = auto()  # one or more are due, from the ASGI path
    TUNNELLING = auto()
    LINGERING = auto()  # our side has ended; wait until the client ends its own
    CLOSING = auto()  # the transport is closed once it has written its buffer
    LOST = auto()


class Persistence(IntEnum):
    """Whether the connection persists after the responses that are due."""

    PERSISTENT = auto()
    DRAINING = auto()  # the next response closes it
    HALF_CLOSED = auto()  # the client has ended its side
    FINAL = auto()  # both


_END: Final = dict.fromkeys(
    (ConnectionEvent.LINGER, ConnectionEvent.CLOSE, ConnectionEvent.LOST), InputState.DISCARDING
)
INPUT: Final[dict[InputState, dict[ConnectionEvent, InputState]]] = {
    InputState.NEW: {
        ConnectionEvent.HEAD_BEGUN: InputState.HEAD,
        ConnectionEvent.EXCHANGE_BEGUN: InputState.HELD,
        ConnectionEvent.PLAIN_RESPONSE: InputState.IDLE,
        ConnectionEvent.DRAIN: InputState.IDLE,  # a head that begins from now on has a timeout of its own
        **_END,
    },
    InputState.IDLE: {
        ConnectionEvent.HEAD_BEGUN: InputState.HEAD,
        ConnectionEvent.HOLD: InputState.HELD,
        ConnectionEvent.EXCHANGE_BEGUN: InputState.HELD,
        ConnectionEvent.PLAIN_RESPONSE: InputState.IDLE,
        **_END,
    },
    InputState.HEAD: {
        ConnectionEvent.HEAD_COMPLETE: InputState.BODY,
        ConnectionEvent.EXCHANGE_BEGUN: InputState.HELD,
        ConnectionEvent.PLAIN_RESPONSE: InputState.IDLE,
        **_END,
    },
    InputState.BODY: {
        ConnectionEvent.BODY_COMPLETE: InputState.IDLE,
        ConnectionEvent.EXCHANGE_BEGUN: InputState.BODY,
        ConnectionEvent.EXCHANGE_BODY_COMPLETE: InputState.HELD,
        ConnectionEvent.EXCHANGE_ENDED: InputState.BODY,  # an early response
        **_END,
    },
    InputState.HELD: {
        ConnectionEvent.EXCHANGE_BEGUN: InputState.HELD,
        ConnectionEvent.BODY_AWAITED: InputState.BODY,
        ConnectionEvent.EXCHANGE_ENDED: InputState.IDLE,
        ConnectionEvent.RELEASE: InputState.IDLE,
        ConnectionEvent.SWITCH: InputState.TUNNELLED,
        **_END,
    },
    InputState.DISCARDING: {
        ConnectionEvent.EXCHANGE_BEGUN: InputState.DISCARDING,
        ConnectionEvent.BODY_AWAITED: InputState.DISCARDING,
        ConnectionEvent.EXCHANGE_ENDED: InputState.DISCARDING,
        ConnectionEvent.SWITCH: InputState.DISCARDING,
        ConnectionEvent.CLOSE: InputState.DISCARDING,
        ConnectionEvent.LOST: InputState.DISCARDING,
    },
    InputState.TUNNELLED: {ConnectionEvent.LOST: InputState.DISCARDING},
}

_LAST: Final = (
    ConnectionEvent.EXCHANGE_ENDED,
    ConnectionEvent.LAST_RESPONSE,
    ConnectionEvent.SWITCH,
)  # of a request whose client is gone
_LATE: Final = (
    *_LAST,
    ConnectionEvent.EXCHANGE_BEGUN,
    ConnectionEvent.BODY_AWAITED,
    ConnectionEvent.RESPONSE,
)  # of one whose client leaves
SERVICE: Final[dict[Service, dict[ConnectionEvent, Service]]] = {
    Service.IDLE: {
        ConnectionEvent.HEAD_COMPLETE: Service.SERVING,
        ConnectionEvent.EXCHANGE_BEGUN: Service.FORWARDING,
        ConnectionEvent.PLAIN_RESPONSE: Service.IDLE,
        ConnectionEvent.LINGER: Service.LINGERING,
        ConnectionEvent.CLOSE: Service.CLOSING,
        ConnectionEvent.LOST: Service.LOST,
    },
    Service.FORWARDING: {
        ConnectionEvent.EXCHANGE_BEGUN: Service.FORWARDING,
        ConnectionEvent.BODY_AWAITED: Service.FORWARDING,
        ConnectionEvent.EXCHANGE_ENDED: Service.IDLE,
        ConnectionEvent.LAST_RESPONSE: Service.IDLE,
        ConnectionEvent.SWITCH: Service.TUNNELLING,
        ConnectionEvent.CLOSE: Service.CLOSING,
        ConnectionEvent.LOST: Service.LOST,
    },
    Service.SERVING: {
        ConnectionEvent.HEAD_COMPLETE: Service.SERVING,
        ConnectionEvent.RESPONSE: Service.SERVING,
        ConnectionEvent.LAST_RESPONSE: Service.IDLE,
        ConnectionEvent.SWITCH: Service.TUNNELLING,
        ConnectionEvent.LINGER: Service.LINGERING,
        ConnectionEvent.CLOSE: Service.CLOSING,
        ConnectionEvent.LOST: Service.LOST,
    },
    Service.TUNNELLING: {
        ConnectionEvent.LAST_RESPONSE: Service.TUNNELLING,  # the exchange was aborted; the transport follows
        ConnectionEvent.LOST: Service.LOST,
    },
    Service.LINGERING: {ConnectionEvent.CLOSE: Service.CLOSING, ConnectionEvent.LOST: Service.LOST},
    Service.CLOSING: {
        **dict.fromkeys(_LATE, Service.CLOSING),
        ConnectionEvent.CLOSE: Service.CLOSING,
        ConnectionEvent.LOST: Service.LOST,
    },
    Service.LOST: dict.fromkeys(_LAST, Service.LOST),
}
PERSISTENCE: Final[dict[Persistence, dict[ConnectionEvent, Persistence]]] = {
    Persistence.PERSISTENT: {
        ConnectionEvent.DRAIN: Persistence.DRAINING,
        ConnectionEvent.CLIENT_EOF: Persistence.HALF_CLOSED,
    },
    Persistence.DRAINING: {ConnectionEvent.CLIENT_EOF: Persistence.FINAL},
    Persistence.HALF_CLOSED: {ConnectionEvent.DRAIN: Persistence.FINAL},
    Persistence.FINAL: {},
}

# The input states with which each service may be combined. BODY is combined with IDLE after an early response, HELD
# until the held input is parsed in the next turn of the event loop.
INPUTS_BY_SERVICE: Final[dict[Service, tuple[InputState, ...]]] = {
    Service.IDLE: (InputState.NEW, InputState.IDLE, InputState.HEAD, InputState.BODY, InputState.HELD),
    Service.FORWARDING: (InputState.BODY, InputState.HELD),
    Service.SERVING: (InputState.IDLE, InputState.HEAD, InputState.BODY, InputState.HELD),
    Service.TUNNELLING: (InputState.TUNNELLED,),
    Service.LINGERING: (InputState.DISCARDING,),
    Service.CLOSING: (InputState.DISCARDING,),
    Service.LOST: (InputState.DISCARDING,),
}

_S = TypeVar("_S", InputState, Service, Persistence)
_DUE: Final = (Service.FORWARDING, Service.SERVING)
_OPEN: Final = (Service.IDLE, *_DUE)


class ConnectionState:
    """One combination of `input`, `service` and `persistence`. `after` has the next state for each legal event.

    - `is_between`: no part of the next request has arrived.
    - `is_idle`: in addition, no response is due, and further requests may follow.
    - `is_due`: a response is due.
    - `is_held`: input is kept and not parsed.
    - `is_ending`: nothing more is served; the input is discarded or belongs to a tunnel.
    - `is_draining`, `is_half_closed`: see `Persistence`.
    """

    __slots__ = (
        "after",
        "input",
        "is_between",
        "is_draining",
        "is_due",
        "is_ending",
        "is_half_closed",
        "is_held",
        "is_idle",
        "is_lost",
        "persistence",
        "service",
    )

    def __init__(self, input_state: InputState, service: Service, persistence: Persistence) -> None:
        self.input = input_state
        self.service = service
        self.persistence = persistence
        self.after: dict[ConnectionEvent, ConnectionState] = {}
        self.is_between = input_state in (InputState.NEW, InputState.IDLE)
        self.is_held = input_state is InputState.HELD
        self.is_due = service in _DUE
        self.is_ending = service not in _OPEN
        self.is_lost = service is Service.LOST
        self.is_draining = persistence in (Persistence.DRAINING, Persistence.FINAL)
        self.is_half_closed = persistence in (Persistence.HALF_CLOSED, Persistence.FINAL)
        self.is_idle = self.is_between and service is Service.IDLE and persistence is Persistence.PERSISTENT

    def __repr__(self) -> str:
        return f"<ConnectionState {self}>"

    def __str__(self) -> str:
        names = (self.input.name, self.service.name, self.persistence.name)
        return "input {}, service {}, persistence {}".format(*names).lower()


def _next(table: dict[_S, dict[ConnectionEvent, _S]], state: _S, event: ConnectionEvent) -> _S | None:
    """Return the next state in one table, `state` if the event does not concern it, or None if it is illegal."""
    if event in table[state]:
        return table[state][event]
    return None if any(event in row for row in table.values()) and event not in _ANY_TIME else state


_ANY_TIME: Final = (
    ConnectionEvent.DRAIN,
    ConnectionEvent.CLIENT_EOF,
)  # events of `Persistence` that are legal in each of its states


def _start() -> ConnectionState:
    """Return the first state, and with it all that can be reached from it."""
    start = ConnectionState(InputState.NEW, Service.IDLE, Persistence.PERSISTENT)
    known = {(start.input, start.service, start.persistence): start}
    pending = [start]
    while pending:
        state = pending.pop()
        for event in ConnectionEvent:
            input_state = _next(INPUT, state.input, event)
            service = _next(SERVICE, state.service, event)
            persistence = _next(PERSISTENCE, state.persistence, event)
            if input_state is None or service is None or persistence is None:
                continue
            if input_state in INPUTS_BY_SERVICE[service]:
                key = (input_state, service, persistence)
                if key not in known:
                    known[key] = ConnectionState(*key)
                    pending.append(known[key])
                state.after[event] = known[key]
    return start


START: Final = _start()


class IllegalConnectionEvent(Exception):
    """An event that the table does not allow in the current state: a defect of the gateway."""


class IllegalEvents:
    """The treatment of illegal events: logged and counted by event, and raised if `raises`, as in tests."""

    __slots__ = ("counts", "raises")

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.raises = False

    def __repr__(self) -> str:
        return f"<IllegalEvents [{self.counts.total()}]>"

    def report(self, what: object, state: ConnectionState, event: ConnectionEvent) -> None:
        """Report the event. Raises IllegalConnectionEvent if `raises`."""
        self.counts[event.name.lower()] += 1
        message = f"illegal event {event.name.lower()} in state {state} of {what!r}"
        if self.raises:
            raise IllegalConnectionEvent(message)
        logger.error("%s; the connection is closed", message)


ILLEGAL_EVENTS: Final = IllegalEvents()  # of this process
