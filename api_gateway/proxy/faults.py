"""Who is at fault for an attempt that failed: client, upstream, target, gateway or nobody. Pure."""

from typing import NamedTuple

from api_gateway.errors import Fault, GatewayError, UpstreamTimeout
from api_gateway.models import Outcome
from api_gateway.proxy.deadline import Deadline

CLIENT_PAUSE = 1.0  # seconds for which a client keeps an upstream waiting, after which the upstream may have given up


class ClientShare(NamedTuple):
    """What the client had to do with the end of an attempt.

    `has_sent_all`: the gateway has the whole request. `is_awaited`: the next piece of its body was being waited for.
    `waited` is how many seconds the client kept the upstream waiting, by sending or by reading slowly.
    """

    has_sent_all: bool = True
    is_awaited: bool = False
    waited: float = 0.0


NO_SHARE = ClientShare()

# What a fault says about the upstream. The principal of a TARGET's fault is nobody: see `CircuitBreaker.settle`.
OUTCOME_OF_FAULT = {
    Fault.CLIENT: Outcome.IGNORED,
    Fault.UPSTREAM: Outcome.FAILURE,
    Fault.TARGET: Outcome.FAILURE,
    Fault.GATEWAY: Outcome.IGNORED,
    Fault.NOBODY: Outcome.IGNORED,
}


def fault_of(error: GatewayError, client: ClientShare = NO_SHARE) -> Fault:
    """Return who is at fault for a failed attempt: nobody instead of the upstream where it may be the client.

    | error | client | fault |
    |---|---|---|
    | its own, the gateway's, or the target's (connecting) | any | as the error's class says |
    | the connection broke | had not sent all of the request, or had kept the upstream waiting | nobody |
    | the upstream was silent | was the one waited for | nobody |
    | any other | any | upstream |
    """
    if error.fault is not Fault.UPSTREAM:
        return error.fault
    if isinstance(error, UpstreamTimeout):
        may_be_client = client.is_awaited
    else:
        may_be_client = not client.has_sent_all or client.waited >= CLIENT_PAUSE
    return Fault.NOBODY if may_be_client else Fault.UPSTREAM


def fault_of_status(status: int, client: ClientShare = NO_SHARE) -> Fault:
    """Return who is at fault for a status: for a server error the upstream, unless it came before all was sent."""
    if status < 500:  # noqa: PLR2004 - the class of server errors
        return Fault.CLIENT
    return Fault.UPSTREAM if client.has_sent_all else Fault.NOBODY


def fault_of_deadline(deadline: Deadline, spent: float, client: ClientShare) -> Fault:
    """Return who is at fault when a deadline ends an attempt on which the upstream has spent so many seconds.

    The client for a deadline of its own; else the upstream, if it had the whole request and at least half of the time.
    """
    if not deadline.is_upstream_fault:
        return Fault.CLIENT
    return Fault.UPSTREAM if client.has_sent_all and spent >= deadline.seconds / 2 else Fault.NOBODY
