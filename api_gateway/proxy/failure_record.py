"""Records in an exchange the error that ended it, or the error for which a fallback responded."""

from api_gateway.errors import ClientDisconnected, GatewayError, LoadShed, Reason, RequestRefused
from api_gateway.models import Exchange


def note_failure(exchange: Exchange, error: GatewayError) -> None:
    """Record reason and detail of a failure; for a client's disconnect also the status of the exchange.

    A stream that was ended because of its credential keeps that reason.
    """
    if isinstance(error, ClientDisconnected) and exchange.reason == Reason.CREDENTIALS_INVALID and exchange.credential:
        return
    exchange.reason = str(error.reason)  # the attribute `value` of an enumeration is slow to read
    cause = "" if error.__cause__ is None else str(error.__cause__)
    exchange.detail = f"{error.detail} ({cause})" if cause else error.detail
    if isinstance(error, RequestRefused):  # which leaves nothing else to record
        return
    note_shed(exchange, error)
    if isinstance(error, ClientDisconnected):
        exchange.status, exchange.source = error.status, "gateway"


def note_shed(exchange: Exchange, error: GatewayError) -> None:
    """Record once which upstream shed the request; None stands for the gateway itself."""
    if isinstance(error, LoadShed) and exchange.upstream not in exchange.shed_by:
        exchange.shed_by += (exchange.upstream,)
