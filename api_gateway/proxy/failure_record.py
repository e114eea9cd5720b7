"""How the record of an exchange notes an error that ended it, or a fallback's reason."""

from api_gateway.errors import ClientDisconnected, GatewayError, LoadShed
from api_gateway.models import Exchange


def note_failure(exchange: Exchange, error: GatewayError) -> None:
    """Write into the record why an exchange failed; of one whose client has left also that this was its end."""
    exchange.reason = error.reason.value
    note_shed(exchange, error)
    cause = str(error.__cause__ or "")
    exchange.detail = f"{error.detail} ({cause})" if cause else error.detail
    if isinstance(error, ClientDisconnected):
        exchange.status, exchange.source = error.status, "gateway"


def note_shed(exchange: Exchange, error: GatewayError) -> None:
    """Write down who had no room for it, once each: its upstream of the moment, or None for the gateway itself."""
    if isinstance(error, LoadShed) and exchange.upstream not in exchange.shed_by:
        exchange.shed_by += (exchange.upstream,)
