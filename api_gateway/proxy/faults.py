"""The fault of a failed attempt: client, upstream, target, gateway or nobody. Pure."""

from typing import NamedTuple

from api_gateway.errors import Fault, GatewayError, UpstreamTimeout
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
# A TARGET fault is attributed to no principal, see `CircuitBreaker.settle`.
OUTCOME_OF_FAULT = {
    Fault.CLIENT: Outcome.IGNORED,
    Fault.UPSTREAM: Outcome.FAILURE,
    Fault.TARGET: Outcome.FAILURE,
    Fault.GATEWAY: Outcome.IGNORED,
    Fault.NOBODY: Outcome.IGNORED,
}


def fault_of(error: GatewayError, client: ClientProgress = NO_PROGRESS) -> Fault:
    """Return the fault of a failed attempt: nobody instead of the upstream if the client may have caused it.

    | error | client | fault |
    |---|---|---|
    | class with the fault client, gateway or target (connecting) | any | as the error's class says |
    | the connection broke | had not sent the whole request, or `waited` >= CLIENT_PAUSE | nobody |
    | the upstream timed out | was being waited for | nobody |
    | any other | any | upstream |
    """
    if error.fault is not Fault.UPSTREAM:
        return error.fault
    if isinstance(error, UpstreamTimeout):
        may_be_client = client.is_awaited
    else:
        may_be_client = not client.has_sent_all or client.waited >= MAX_CLIENT_PAUSE
    return Fault.NOBODY if may_be_client else Fault.UPSTREAM


def fault_of_status(status: int, client: ClientProgress = NO_PROGRESS) -> Fault:
    """Return the fault of an error status: the upstream for 5xx if the request was sent completely, else nobody."""
    if status < 500:  # noqa: PLR2004 - the class of server errors
        return Fault.CLIENT
    return Fault.UPSTREAM if client.has_sent_all else Fault.NOBODY


def fault_of_deadline(deadline: Deadline, spent: float, client: ClientProgress) -> Fault:
    """Return the fault if a deadline ends an attempt on which the upstream has spent `spent` seconds.

    It is the client for the client's own deadline; the upstream if it had the whole request and at least half of the
    time; else nobody.
    """
    if not deadline.is_upstream_fault:
        return Fault.CLIENT
    return Fault.UPSTREAM if client.has_sent_all and spent >= deadline.seconds / 2 else Fault.NOBODY
