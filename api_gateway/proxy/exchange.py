"""The life of a request: its phase, its request body and its response, as three tables, and their legal combinations.

Each table maps a state to the events that the state allows, and each of those to the next state, in the manner of h11.
An event that occurs in several tables must be allowed by each of them. `exchanges` performs the actions that belong to
the events; here are the states only.

Phases whose work is done within one callback (admitting, selecting) allow no event from outside, because events are
not delivered re-entrantly. Events that may be late, such as the reply to a question of admission or an expired timer,
carry the generation of the exchange and are dropped if it has changed since: they never reach the tables.
"""

from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Final, Literal, NamedTuple

from api_gateway.transport.response import ResponseListener, ResponseSource, TimeoutExtension, UpstreamResponse

ExchangePhase = Literal[
    "admitting",
    "waiting",
    "selecting",
    "connecting",
    "exchanging",
    "backing off",
    "falling back",
    "tunnelling",
    "done",
    "aborted",
]
RequestBodyState = Literal["none", "withheld for 100", "flowing", "paused", "complete", "discarded"]
ResponseState = Literal["none", "flowing", "paused", "complete", "aborted"]
ExchangeEvent = Literal[
    "ask",
    "reply",
    "admit",
    "refuse",
    "connect",
    "send",
    "retry",
    "resume",
    "final",
    "fall back",
    "select",
    "continue",
    "body",
    "body pause",
    "body resume",
    "body end",
    "head",
    "data",
    "pause",
    "writable",
    "switch",
    "tunnel end",
    "end",
    "break",
    "client gone",
    "drain",
    "defect",
]

# Phases
ADMITTING: Final = "admitting"  # the stages of admission decide
WAITING: Final = "waiting"  # for the reply to a question of admission
SELECTING: Final = "selecting"  # an attempt is acquired, and a connection if one is idle
CONNECTING: Final = "connecting"  # a connection is opened, or awaited from the pool
EXCHANGING: Final = "exchanging"  # the request is sent, the response arrives
BACKING_OFF: Final = "backing off"  # the delay before a retry
FALLING_BACK: Final = "falling back"  # the fallback of the route responds, or another upstream is asked
TUNNELLING: Final = "tunnelling"  # the connections carry another protocol
DONE: Final = "done"  # the client has a complete response
ABORTED: Final = "aborted"  # the connection of the client is closed without one

# Request bodies, as they arrive from the client. A body that has arrived with its head is complete from the beginning.
NONE: Final = "none"
WITHHELD: Final = "withheld for 100"  # the client waits for 100 (Continue)
FLOWING: Final = "flowing"  # it arrives; of a response: the head is sent, and part of the body
PAUSED: Final = "paused"  # likewise, but the receiver takes it more slowly than the sender sends
COMPLETE: Final = "complete"  # it has arrived; of a response: it is sent
DISCARDED: Final = (
    "discarded"  # the exchange ended before: the rest is dropped, or sent within the connection's limits
)

# Events: decisions of the exchange
ASK: Final = "ask"  # admission asks a question
ADMIT: Final = "admit"
REFUSE: Final = "refuse"  # the gateway responds itself
CONNECT: Final = "connect"  # also once more, if the connection was closed while it was idle
SEND: Final = "send"
RETRY: Final = "retry"  # the attempt failed before the head, or with a status that is retried
FINAL: Final = "final"  # no target is available for the retry, so the response of the last attempt is final
FALL_BACK: Final = "fall back"  # the upstream has failed, and the fallback of the route applies
SELECT: Final = "select"  # another upstream, which is the fallback
PAUSE: Final = "pause"
BODY_PAUSE: Final = "body pause"  # as much is kept as may be, or the upstream reads more slowly than the client sends
BODY_RESUME: Final = "body resume"
# Events of the ports
BODY: Final = "body"  # a piece of the request body has arrived
BODY_END: Final = "body end"
CONTINUE: Final = "continue"  # the upstream has sent 100 (Continue)
REPLY: Final = "reply"  # to a question of admission
RESUME: Final = "resume"  # the delay before a retry has passed
HEAD: Final = "head"
DATA: Final = "data"
SWITCH: Final = "switch"  # of protocols, by a 101
TUNNEL_END: Final = "tunnel end"  # both connections are closed
END: Final = "end"  # of the response, whose last part arrived
BREAK: Final = "break"  # after the head was sent to the client, the upstream fails or the deadline passes
WRITABLE: Final = "writable"  # the client reads on
CLIENT_GONE: Final = "client gone"
DRAIN: Final = "drain"  # the drain timeout has passed
DEFECT: Final = "defect"  # an event came that the state does not allow

_STOPS: Final[Mapping[ExchangeEvent, ExchangePhase]] = {CLIENT_GONE: ABORTED, DRAIN: ABORTED, DEFECT: ABORTED}


def _body_events(phase: ExchangePhase) -> Mapping[ExchangeEvent, ExchangePhase]:
    """Return the events of an arriving request body, which do not change the phase."""
    return {BODY: phase, BODY_PAUSE: phase, BODY_RESUME: phase, BODY_END: phase}


PHASES: Final[Mapping[ExchangePhase, Mapping[ExchangeEvent, ExchangePhase]]] = {
    ADMITTING: {ASK: WAITING, ADMIT: SELECTING, REFUSE: DONE},
    WAITING: {REPLY: ADMITTING, REFUSE: DONE, **_body_events(WAITING), **_STOPS},
    SELECTING: {
        BODY_PAUSE: SELECTING,
        BODY_RESUME: SELECTING,
        CONNECT: CONNECTING,
        SEND: EXCHANGING,
        FINAL: EXCHANGING,
        FALL_BACK: FALLING_BACK,
        REFUSE: DONE,
    },
    CONNECTING: {
        SEND: EXCHANGING,
        RETRY: BACKING_OFF,
        FALL_BACK: FALLING_BACK,
        REFUSE: DONE,
        **_body_events(CONNECTING),
        **_STOPS,
    },
    EXCHANGING: {
        HEAD: EXCHANGING,
        DATA: EXCHANGING,
        PAUSE: EXCHANGING,
        WRITABLE: EXCHANGING,
        SWITCH: TUNNELLING,
        END: DONE,
        REFUSE: DONE,
        CONNECT: CONNECTING,
        RETRY: BACKING_OFF,
        FALL_BACK: FALLING_BACK,
        BREAK: ABORTED,
        CONTINUE: EXCHANGING,
        **_body_events(EXCHANGING),
        **_STOPS,
    },
    BACKING_OFF: {
        RESUME: SELECTING,
        FALL_BACK: FALLING_BACK,
        REFUSE: DONE,
        **_body_events(BACKING_OFF),
        **_STOPS,
    },
    FALLING_BACK: {SELECT: SELECTING, REFUSE: DONE},
    TUNNELLING: {TUNNEL_END: DONE, **_STOPS},
    DONE: {},
    ABORTED: {},
}
_ENDS: Final = (REFUSE, END, BREAK, CLIENT_GONE, DRAIN, DEFECT)
REQUEST_BODIES: Final[Mapping[RequestBodyState, Mapping[ExchangeEvent, RequestBodyState]]] = {
    NONE: {SWITCH: NONE, **dict.fromkeys(_ENDS, NONE)},
    WITHHELD: {CONTINUE: FLOWING, BODY: FLOWING, **dict.fromkeys(_ENDS, DISCARDED)},
    FLOWING: {
        CONTINUE: FLOWING,  # another one, or one that the client has not waited for
        BODY: FLOWING,
        BODY_PAUSE: PAUSED,
        BODY_END: COMPLETE,
        **dict.fromkeys(_ENDS, DISCARDED),
    },
    PAUSED: {
        CONTINUE: PAUSED,
        BODY: PAUSED,  # of one read that began before the pause
        BODY_RESUME: FLOWING,
        BODY_END: COMPLETE,
        **dict.fromkeys(_ENDS, DISCARDED),
    },
    COMPLETE: {CONTINUE: COMPLETE, **dict.fromkeys(_ENDS, COMPLETE)},  # a late one
    DISCARDED: {},
}
RESPONSES: Final[Mapping[ResponseState, Mapping[ExchangeEvent, ResponseState]]] = {
    NONE: {
        HEAD: FLOWING,
        SWITCH: FLOWING,
        WRITABLE: NONE,  # an interim response may have filled the write buffer
        REFUSE: COMPLETE,
        CONNECT: NONE,
        RETRY: NONE,
        FALL_BACK: NONE,
        CLIENT_GONE: ABORTED,
        DRAIN: ABORTED,
        DEFECT: ABORTED,
    },
    FLOWING: {
        TUNNEL_END: COMPLETE,
        DATA: FLOWING,
        PAUSE: PAUSED,
        WRITABLE: FLOWING,
        END: COMPLETE,
        BREAK: ABORTED,
        CLIENT_GONE: ABORTED,
        DRAIN: ABORTED,
        DEFECT: ABORTED,
    },
    PAUSED: {
        WRITABLE: FLOWING,
        DATA: PAUSED,  # of one read that began before the pause
        END: COMPLETE,
        BREAK: ABORTED,
        CLIENT_GONE: ABORTED,
        DRAIN: ABORTED,
        DEFECT: ABORTED,
    },
    COMPLETE: {},
    ABORTED: {},
}
# The states of the other two machines that each phase may be combined with.
_UNENDED: Final = frozenset[RequestBodyState]({NONE, WITHHELD, FLOWING, PAUSED, COMPLETE})
_ENDED: Final = frozenset[RequestBodyState]({NONE, COMPLETE, DISCARDED})
COMBINATIONS: Final[Mapping[ExchangePhase, tuple[frozenset[RequestBodyState], frozenset[ResponseState]]]] = {
    ADMITTING: (_UNENDED, frozenset({NONE})),
    WAITING: (_UNENDED, frozenset({NONE})),
    SELECTING: (_UNENDED, frozenset({NONE})),
    CONNECTING: (_UNENDED, frozenset({NONE})),
    EXCHANGING: (_UNENDED, frozenset({NONE, FLOWING, PAUSED})),
    BACKING_OFF: (_UNENDED, frozenset({NONE})),
    FALLING_BACK: (_UNENDED, frozenset({NONE})),
    TUNNELLING: (frozenset({NONE}), frozenset({FLOWING})),
    DONE: (_ENDED, frozenset({COMPLETE})),
    ABORTED: (_ENDED, frozenset({ABORTED})),
}
# The resources that an exchange holds in a phase, in addition to the client's connection, and then releases. A phase
# that is not here holds nothing beyond the callback in which it begins and ends.
HELD_RESOURCES: Final[Mapping[ExchangePhase, frozenset[str]]] = {
    WAITING: frozenset({"question"}),
    CONNECTING: frozenset({"attempt", "task", "timer"}),  # the timer is that of the deadline, if there is one
    EXCHANGING: frozenset({"attempt", "connection", "timer"}),
    BACKING_OFF: frozenset({"delay", "last response", "timer"}),
    TUNNELLING: frozenset({"attempt", "task"}),  # the task has both transports
}
_OF_REQUEST_BODIES: Final = frozenset(event for events in REQUEST_BODIES.values() for event in events)
_OF_RESPONSES: Final = frozenset(event for events in RESPONSES.values() for event in events)


class States(NamedTuple):
    """The states of one exchange."""

    phase: ExchangePhase = ADMITTING
    request_body: RequestBodyState = NONE
    response: ResponseState = NONE

    def __str__(self) -> str:
        return f"{self.phase} (request body {self.request_body}, response {self.response})"


class IllegalEvent(Exception):
    """An event that the states of an exchange do not allow: a defect of the gateway."""

    def __init__(self, states: States, event: ExchangeEvent) -> None:
        super().__init__(f"{event!r} is not allowed while {states}")


def successor(states: States, event: ExchangeEvent) -> States | None:
    """Return the states after an event, or None if one of the tables does not allow it."""
    phase = PHASES[states.phase].get(event)
    body = REQUEST_BODIES[states.request_body].get(event) if event in _OF_REQUEST_BODIES else states.request_body
    response = RESPONSES[states.response].get(event) if event in _OF_RESPONSES else states.response
    return None if phase is None or body is None or response is None else States(phase, body, response)


@cache  # some hundred combinations occur
def _moved(
    phase: ExchangePhase, request_body: RequestBodyState, response: ResponseState, event: ExchangeEvent
) -> States | None:
    """Return `successor` of these states, remembered: a body that arrives in pieces has several events."""
    return successor(States(phase, request_body, response), event)


class ProxyExchange(UpstreamResponse):
    """The states of one exchange; it is also the response of its upstream while it arrives.

    On the path that most requests take, the states are assigned; `move` checks them where an order other than the
    tables' is possible. `generation` changes whenever a question or a timer becomes void.
    """

    is_strict: ClassVar[bool] = False  # illegal events raise, as in tests

    __slots__ = ("generation", "phase", "request_body", "response")

    def __init__(
        self, connection: ResponseSource | None, method: str, timeouts: TimeoutExtension, listener: ResponseListener
    ) -> None:
        """See `UpstreamResponse`."""
        super().__init__(connection, method, timeouts, listener)
        self.phase: ExchangePhase = ADMITTING
        self.request_body: RequestBodyState = NONE
        self.response: ResponseState = NONE
        self.generation = 0

    @property
    def states(self) -> States:
        """The states of its three machines."""
        return States(self.phase, self.request_body, self.response)

    def move(self, event: ExchangeEvent) -> None:
        """Change the states by an event. Raises IllegalEvent, and changes nothing, if they do not allow it."""
        states = _moved(self.phase, self.request_body, self.response, event)
        if states is None:
            raise IllegalEvent(self.states, event)
        self.phase, self.request_body, self.response = states
