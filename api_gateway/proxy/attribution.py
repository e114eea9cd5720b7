"""The attribution table: how each end of an attempt counts for the circuit breakers. Pure.

An attempt counts once: as a failure if a row attributes one, else as a success if the head of a response has arrived,
else not at all. So a probe never remains without an outcome once its upstream has responded.
"""

from enum import Enum, StrEnum
from typing import NamedTuple

from api_gateway.errors import (
    BadRequest,
    GatewayError,
    Overloaded,
    UpstreamConnectError,
    UpstreamConnectTimeout,
    UpstreamProtocolError,
    UpstreamReset,
    UpstreamTimeout,
)
from api_gateway.models import Outcome
from api_gateway.proxy.deadline import Deadline

MAX_CLIENT_PAUSE = (
    1.0  # seconds of waiting for a client, after which an upstream may have closed the connection for that
)


class ClientProgress(NamedTuple):
    """The client's part in the end of an attempt.

    `has_sent_all`: the gateway has the whole request. `is_awaited`: the gateway was waiting for a piece of the body.
    `waited`: seconds for which the upstream waited because the client sent or read slowly.
    """

    has_sent_all: bool = True
    is_awaited: bool = False
    waited: float = 0.0


NO_PROGRESS = ClientProgress()


class ResponsibleParty(StrEnum):
    """The party to which an outcome is attributed.

    TARGET: no connection could be made, which no client can cause. UPSTREAM: the upstream and its target; a failure
    is also attributed to the client, because its request may have caused it. NOBODY: the cause is unknown, or the
    gateway is the cause.
    """

    TARGET = "target"
    UPSTREAM = "upstream"
    CLIENT = "client"
    NOBODY = "nobody"


class DetectedAt(Enum):
    """Where a cause is detected: the words for the documentation, and whether the head has arrived (both: None)."""

    ADMISSION = "before an attempt", None  # `proxy.admission`, `upstreams.upstream`
    CONNECTING = "connecting", None  # `transport.pool`, `transport.http1_transport`
    AWAITING_HEAD = "waiting for the head", False  # `transport.upstream_connection`
    HEAD = "at the head", None  # `OutcomeReporter.on_head`, `Router`
    BODY = "within the body", True  # `transport.upstream_connection`
    STREAM = "after the head of a stream", None  # `transport.upstream_connection`, `proxy.websocket_tunnel`

    @property
    def words(self) -> str:
        """The words for the documentation."""
        words: str = self.value[0]
        return words

    @property
    def has_head(self) -> bool | None:
        """Whether the head of a response has arrived; None: both."""
        has_head: bool | None = self.value[1]
        return has_head


class Cause(StrEnum):
    """The cause of the end of an attempt; the values are the words for the documentation."""

    NOT_ATTEMPTED = "the gateway refuses the request: admission, breaker, concurrency limit, no healthy target"
    NO_CONNECTION = (
        "no connection becomes free in time, the client's share of connections is used up, or this process or machine"
        " has no descriptor, port or socket memory left (503 `overloaded`)"
    )
    CONNECT_ERROR = "no connection can be made: refused, reset, unreachable, the name cannot be resolved, or TLS fails"
    CONNECT_TIMEOUT = "connecting, or the TLS handshake, takes longer than `timeouts.connect`"
    UNSENDABLE = "the request cannot be sent as it is: its body contradicts `Content-Length`"
    LOST = "the connection is closed or reset"
    INVALID = "invalid HTTP, or a switch of protocols that was not requested"
    TIMEOUT = "nothing arrives, or the upstream reads nothing, for `timeouts.response` or `timeouts.idle`"
    INTERIM = "an interim response (100, 102, 103)"
    SERVER_ERROR = "a status of 500 or above, with or without `Retry-After`"
    COMPLETE = "a response with a status below 500, 401, 404 and 429 included, is complete"
    SLOW = "a status below 500 after `slow_call_duration` or later: in addition it counts as slow"
    STREAM_BEGUN = "an event stream begins, or the protocol is switched (101)"
    STREAM_ENDED = "the end of an event stream or a tunnel, whatever ends it: silence, a reset, a deadline, a close"
    CLIENT_DEADLINE = "the client's own deadline (`X-Request-Timeout`) passes"
    UPSTREAM_DEADLINE = "a deadline of the route or of the upstream passes; the upstream had at least half of the time"
    SHARED_DEADLINE = "a deadline of the route or of the upstream passes; the upstream had less than half of the time"
    ABORTED_BY_CLIENT = "the client disconnects, sends or reads too slowly, or sends more than it may"
    ABORTED_BY_GATEWAY = (
        "the gateway aborts the exchange: a deadline passes before anything is sent, the drain ends, or a defect"
    )


class ClientState(Enum):
    """The state of the client when an attempt ended: the first that applies, in this order."""

    AWAITED = 1  # the gateway was waiting for a piece of the request's body
    SENDING = 2  # the request was not complete, but the upstream did not read on
    DELAYED = 3  # the upstream had waited for MAX_CLIENT_PAUSE or longer, for sending or reading
    PUNCTUAL = 4

    @classmethod
    def of(cls, client: ClientProgress) -> "ClientState":
        """Return the state of a client."""
        if client.is_awaited:
            return cls.AWAITED
        if not client.has_sent_all:
            return cls.SENDING
        return cls.DELAYED if client.waited >= MAX_CLIENT_PAUSE else cls.PUNCTUAL


class ClientStates(NamedTuple):
    """The states of the client for which a row applies, and the words for the documentation."""

    words: str
    states: frozenset[ClientState]


ANY = ClientStates("", frozenset(ClientState))
PUNCTUAL = ClientStates(
    f"the request was sent, and its client had delayed it by less than {MAX_CLIENT_PAUSE:g} s",
    frozenset({ClientState.PUNCTUAL}),
)
NOT_PUNCTUAL = ClientStates(
    f"the request was not yet sent, or its client had delayed it by {MAX_CLIENT_PAUSE:g} s or more, by sending or"
    " reading slowly",
    ANY.states - PUNCTUAL.states,
)
SENT = ClientStates("the request was sent", frozenset({ClientState.PUNCTUAL, ClientState.DELAYED}))
NOT_SENT = ClientStates("the request was not yet sent", ANY.states - SENT.states)
AWAITED = ClientStates("the client was awaited, for the rest of the request", frozenset({ClientState.AWAITED}))
NOT_AWAITED = ClientStates("the client was not awaited", ANY.states - AWAITED.states)


class Attribution(NamedTuple):
    """One row of the table: what ended an attempt, where it is detected, and how the attempt counts."""

    cause: Cause
    phase: DetectedAt
    client: ClientStates
    party: ResponsibleParty
    outcome: Outcome


_WORDS = {Outcome.FAILURE: "failure", Outcome.SUCCESS: "success", Outcome.IGNORED: "not counted"}
_FAILURE, _SUCCESS, _IGNORED = Outcome.FAILURE, Outcome.SUCCESS, Outcome.IGNORED
ATTRIBUTIONS = (
    Attribution(Cause.NOT_ATTEMPTED, DetectedAt.ADMISSION, ANY, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.NO_CONNECTION, DetectedAt.CONNECTING, ANY, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.CONNECT_ERROR, DetectedAt.CONNECTING, ANY, ResponsibleParty.TARGET, _FAILURE),
    Attribution(Cause.CONNECT_TIMEOUT, DetectedAt.CONNECTING, ANY, ResponsibleParty.TARGET, _FAILURE),
    Attribution(Cause.UNSENDABLE, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.CLIENT, _IGNORED),
    Attribution(Cause.LOST, DetectedAt.AWAITING_HEAD, PUNCTUAL, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.LOST, DetectedAt.AWAITING_HEAD, NOT_PUNCTUAL, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.INVALID, DetectedAt.AWAITING_HEAD, PUNCTUAL, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.INVALID, DetectedAt.AWAITING_HEAD, NOT_PUNCTUAL, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.TIMEOUT, DetectedAt.AWAITING_HEAD, NOT_AWAITED, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.TIMEOUT, DetectedAt.AWAITING_HEAD, AWAITED, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.CLIENT_DEADLINE, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.CLIENT, _IGNORED),
    Attribution(Cause.UPSTREAM_DEADLINE, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.SHARED_DEADLINE, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.ABORTED_BY_CLIENT, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.CLIENT, _IGNORED),
    Attribution(Cause.ABORTED_BY_GATEWAY, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.INTERIM, DetectedAt.AWAITING_HEAD, ANY, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.SERVER_ERROR, DetectedAt.HEAD, SENT, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.SERVER_ERROR, DetectedAt.HEAD, NOT_SENT, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.SLOW, DetectedAt.HEAD, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.STREAM_BEGUN, DetectedAt.HEAD, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.STREAM_ENDED, DetectedAt.STREAM, ANY, ResponsibleParty.NOBODY, _IGNORED),
    Attribution(Cause.COMPLETE, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.LOST, DetectedAt.BODY, PUNCTUAL, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.LOST, DetectedAt.BODY, NOT_PUNCTUAL, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.INVALID, DetectedAt.BODY, PUNCTUAL, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.INVALID, DetectedAt.BODY, NOT_PUNCTUAL, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.TIMEOUT, DetectedAt.BODY, NOT_AWAITED, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.TIMEOUT, DetectedAt.BODY, AWAITED, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.UNSENDABLE, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.CLIENT_DEADLINE, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.UPSTREAM_DEADLINE, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _FAILURE),
    Attribution(Cause.SHARED_DEADLINE, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.ABORTED_BY_CLIENT, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
    Attribution(Cause.ABORTED_BY_GATEWAY, DetectedAt.BODY, ANY, ResponsibleParty.UPSTREAM, _SUCCESS),
)
_BY_KEY = {
    (row.cause, has_head, state): row
    for row in ATTRIBUTIONS
    for has_head in ((False, True) if row.phase.has_head is None else (row.phase.has_head,))
    for state in row.client.states
}
_CAUSE_OF_ERROR: dict[type[GatewayError], Cause] = {  # all that `error_mapping.translate` returns
    Overloaded: Cause.NO_CONNECTION,
    UpstreamConnectError: Cause.CONNECT_ERROR,
    UpstreamConnectTimeout: Cause.CONNECT_TIMEOUT,
    BadRequest: Cause.UNSENDABLE,
    UpstreamReset: Cause.LOST,
    UpstreamProtocolError: Cause.INVALID,
    UpstreamTimeout: Cause.TIMEOUT,
}


def attribution(cause: Cause, *, has_head: bool, client: ClientProgress = NO_PROGRESS) -> Attribution:
    """Return the row for a cause. `has_head`: the head of a final response has arrived."""
    return _BY_KEY[cause, has_head, ClientState.of(client)]


def cause_of(error: GatewayError) -> Cause:
    """Return the cause that an error of the transport stands for."""
    return _CAUSE_OF_ERROR[type(error)]


def cause_of_deadline(deadline: Deadline, spent: float, client: ClientProgress) -> Cause:
    """Return the cause if a deadline ends an attempt on which the upstream has spent `spent` seconds.

    The upstream had its part of the time if it had the whole request for at least half of it.
    """
    if deadline.is_of_client:
        return Cause.CLIENT_DEADLINE
    had_its_part = client.has_sent_all and spent >= deadline.seconds / 2
    return Cause.UPSTREAM_DEADLINE if had_its_part else Cause.SHARED_DEADLINE


def outcome_of_abort(*, has_head: bool) -> Outcome:
    """Return the outcome of an attempt that ends without any other cause: the client or the gateway aborted it."""
    return attribution(Cause.ABORTED_BY_GATEWAY, has_head=has_head).outcome


def attribution_table() -> str:
    """Return the table for the documentation, in Markdown."""
    lines = ["| what happens | where | and if | attributed to | counts as |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.cause} | {row.phase.words} | {row.client.words} | {row.party} | {_WORDS[row.outcome]} |"
        for row in ATTRIBUTIONS
    ]
    return "\n".join(lines)
