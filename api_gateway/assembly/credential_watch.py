"""Ends open streams and tunnels whose credential is revoked, has expired, or is no longer accepted."""

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
from api_gateway.proxy.identity_sources import Claim, CredentialCheck, CredentialQuery, Proof
from api_gateway.proxy.open_exchanges import OpenExchanges

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between two looks at the open exchanges
_BATCH = 500  # connections looked at before the event loop runs other tasks


class CredentialWatch:
    """Examines the open connections once a second, from when a credential may first have admitted a request.

    An exchange counts as a stream or tunnel once the head of its response has been sent. A request that has no
    response yet gets it: it was admitted while its credential was valid. If the response lasts, it is looked at then.
    """

    def __init__(
        self,
        clients: ClientRegistry,
        *,
        connections: Callable[[], Iterable[Any]],
        open_exchanges: OpenExchanges,
        has_credentials: Callable[[], bool],
        adopted: Callable[[Claim], Claim | None],
        clock_ns: Callable[[], int],
    ) -> None:
        """`connections` returns those of a server with the gateway's own protocol.

        `open_exchanges` are the exchanges that arrive by ASGI, of any server. `adopted` returns a claim as one under
        the configuration in force, None if that does not accept it.
        """
        self._open_exchanges = open_exchanges
        self._clients = clients
        self._connections = connections
        self._has_credentials = has_credentials
        self._adopted = adopted
        self._had_credentials = False  # also before the last reload
        self._clock_ns = clock_ns
        self._first_version = clients.version  # another one: there may have been keys, which are gone by now

    def __repr__(self) -> str:
        return f"<CredentialWatch [{'watching' if self._may_have_admitted() else 'idle'}]>"

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
            if self._may_have_admitted():
                await self.look()

    def _may_have_admitted(self) -> bool:
        """Return whether requests may have been admitted by a credential, also by one that exists no more."""
        self._had_credentials = self._had_credentials or self._has_credentials()
        return self._had_credentials or self._clients.version != self._first_version

    async def look(self) -> None:
        """End the streams and tunnels whose credential is no longer valid."""
        for count, connection in enumerate(list(self._connections()), 1):
            exchange = _exchange_of(connection)
            error = None if exchange is None else await self._error_of(exchange)
            if exchange is not None and error is not None and not exchange.finished:
                note_failure(exchange, error)
                _log_end(exchange)
                connection.transport.abort()
            if count % _BATCH == 0:
                await asyncio.sleep(0)
        for count, one in enumerate(self._open_exchanges, 1):
            exchange = one.exchange
            error = None if exchange is None else await self._error_of(exchange)
            if error is not None and one.exchange is not None and one.exchange.reason != error.reason:
                _log_end(one.exchange)
                one.end(error)
            if count % _BATCH == 0:
                await asyncio.sleep(0)

    async def _error_of(self, exchange: Exchange) -> CredentialsInvalid | None:
        """Return the error with which to end a stream or tunnel; None if it stays open, or is neither."""
        proof = exchange.credential
        if not exchange.status or exchange.finished or not isinstance(proof, Proof):
            return None
        for one in (proof, *proof.beside):
            error = await self._fault_of(one)
            if error is not None:
                return error
        return None

    async def _fault_of(self, proof: Proof) -> CredentialsInvalid | None:
        """Return why a credential is no longer valid. Until a change, a confirmed one can only expire."""
        version, claim = self._clients.version, self._adopted(proof.claim)
        if claim is None:
            return CredentialsInvalid("The configuration does not accept the credential any more.")
        is_confirmed = claim is proof.claim and proof.confirmed_version == version
        if is_confirmed and self._clock_ns() < proof.expires_ns:
            return None
        found: object = claim.source.verify(claim, self._clock_ns())
        while isinstance(found, CredentialCheck):
            found = found.do()
            await asyncio.sleep(0)  # after a reload, the signatures of all streams may have to be verified
        if isinstance(found, CredentialQuery):
            found = await found.ask()
        if isinstance(found, Proof):
            proof.claim, proof.confirmed_version = claim, version
        return found if isinstance(found, CredentialsInvalid) else None


def _exchange_of(connection: Any) -> Exchange | None:
    """Return the exchange of a connection with the gateway's own protocol, unless it has arrived by ASGI."""
    if not isinstance(connection, DownstreamConnection):
        return None
    in_flight: Any = connection.exchange
    exchange: Exchange | None = None if in_flight is None else in_flight.exchange
    return exchange


def _log_end(exchange: Exchange) -> None:
    logger.info("request %s: aborted because its credential is no longer valid", exchange.id)
