"""Ends open streams and tunnels whose credential has been revoked or has expired."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from api_gateway.clients.registry import ClientRegistry
from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.errors import CredentialsInvalid
from api_gateway.eventloop.tasks import cancel_and_wait
from api_gateway.models import Exchange
from api_gateway.proxy.failure_record import note_failure
from api_gateway.proxy.identity_sources import Proof, Question, Work
from api_gateway.proxy.open_exchanges import OpenExchanges

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between two looks at the open exchanges
_BATCH = 500  # connections looked at before the event loop runs other tasks


class CredentialWatch:
    """Looks at the open connections once a second while there are credentials.

    An exchange counts as a stream or tunnel once the head of its response has been sent. A request that has no
    response yet is completed: it was admitted while its credential was valid.
    """

    def __init__(
        self,
        clients: ClientRegistry,
        *,
        connections: Callable[[], Iterable[Any]],
        open_exchanges: OpenExchanges,
        has_credentials: Callable[[], bool],
        clock_ns: Callable[[], int],
    ) -> None:
        """`connections` returns those of a server with the gateway's own protocol.

        `open_exchanges` are the exchanges that come by ASGI, of any server.
        """
        self._open_exchanges = open_exchanges
        self._clients = clients
        self._connections = connections
        self._has_credentials = has_credentials
        self._clock_ns = clock_ns
        self._version = -1  # of the registry at the last look: what was valid then has only to be looked at for expiry

    def __repr__(self) -> str:
        return f"<CredentialWatch [{'idle' if not self._has_credentials() else 'watching'}]>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch within this block."""
        task = asyncio.create_task(self.run(), name="streams with credentials")
        try:
            yield
        finally:
            await cancel_and_wait(task)

    async def run(self) -> None:
        """Look at the open exchanges every `INTERVAL` seconds, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            if self._has_credentials():
                await self.look()

    async def look(self) -> None:
        """End the streams and tunnels whose credential is not valid any more."""
        version, is_changed = self._clients.version, self._clients.version != self._version
        for count, connection in enumerate(list(self._connections()), 1):
            exchange = _exchange_of(connection)
            error = None if exchange is None else await self._error_of(exchange, is_changed=is_changed)
            if exchange is not None and error is not None and not exchange.finished:
                note_failure(exchange, error)
                _log_end(exchange)
                connection.transport.abort()
            if count % _BATCH == 0:
                await asyncio.sleep(0)
        for count, one in enumerate(self._open_exchanges, 1):
            exchange = one.exchange
            error = None if exchange is None else await self._error_of(exchange, is_changed=is_changed)
            if error is not None and one.exchange is not None and one.exchange.reason != error.reason:
                _log_end(one.exchange)
                one.end(error)
            if count % _BATCH == 0:
                await asyncio.sleep(0)
        self._version = version

    async def _error_of(self, exchange: Exchange, *, is_changed: bool) -> CredentialsInvalid | None:
        """Return why a stream or tunnel is to be ended; None if it is not, or is no such exchange.

        Unless the registry `is_changed`, credentials can only have expired.
        """
        proof = exchange.credential
        if not exchange.status or exchange.finished or not isinstance(proof, Proof):
            return None
        if not is_changed and self._clock_ns() < proof.expires_ns:
            return None
        claim = proof.claim
        found: object = claim.source.verify(claim, self._clock_ns())
        while isinstance(found, Work):
            found = found.do()
        if isinstance(found, Question):
            found = await found.ask()
        return found if isinstance(found, CredentialsInvalid) else None


def _exchange_of(connection: Any) -> Exchange | None:
    """Return the exchange of a connection with the gateway's own protocol, unless it has come by ASGI."""
    if not isinstance(connection, DownstreamConnection):
        return None
    in_flight: Any = connection.exchange
    exchange: Exchange | None = None if in_flight is None else in_flight.exchange
    return exchange


def _log_end(exchange: Exchange) -> None:
    logger.info("request %s: aborted, as its credential is not valid any more", exchange.id)
