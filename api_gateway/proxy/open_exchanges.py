"""Exchanges on the ASGI path whose client is proved by a credential, so that they can be ended with it.

Under the gateway's own protocol an exchange ends with its connection. Other ASGI servers do not give access to the
connection; there the response is left incomplete, upon which servers close the connection or reset the stream.
"""

import asyncio
from collections.abc import Iterator

from api_gateway.errors import GatewayError
from api_gateway.http1.asgi import ServerExtension
from api_gateway.models import Exchange
from api_gateway.proxy.failure_record import note_failure


class OpenExchange:
    """A context manager: within its block, the exchange can be ended from outside.

    States: open; ending (`end` was called, and the task is being cancelled); closed (the block is left).
    """

    __slots__ = ("_error", "_extension", "_owner", "_task", "exchange")

    def __init__(self, owner: "OpenExchanges", exchange: Exchange, extension: ServerExtension | None) -> None:
        self.exchange = exchange
        self._owner = owner
        self._extension = extension
        self._task: asyncio.Task[object] | None = None
        self._error: GatewayError | None = None

    def __repr__(self) -> str:
        state = "closed" if self._task is None else "open" if self._error is None else "ending"
        return f"<OpenExchange {self.exchange.id} [{state}]>"

    def __enter__(self) -> None:
        """Add the exchange to the open ones."""
        self._task = asyncio.current_task()
        self._owner.add(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove the exchange; replace the cancellation by the error that ended it."""
        self._owner.discard(self)
        task, self._task = self._task, None
        if self._error is None or task is None:
            return
        if task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise self._error from None

    def end(self, error: GatewayError) -> None:
        """End the exchange with an error. Only the first call counts."""
        if self._error is not None or self._task is None:
            return
        if self._extension is not None:
            note_failure(self.exchange, error)
            self._extension.connection.transport.abort()
            return
        self._error = error
        self._task.cancel()


class OpenExchanges:
    """The exchanges with a credential that are open on the ASGI path of one gateway."""

    def __init__(self) -> None:
        self._open: set[OpenExchange] = set()

    def __repr__(self) -> str:
        return f"<OpenExchanges [{len(self._open)}]>"

    def __iter__(self) -> Iterator[OpenExchange]:
        """Yield those that are open now; they may end meanwhile."""
        return iter(list(self._open))

    def holding(self, exchange: Exchange, extension: ServerExtension | None) -> OpenExchange:
        """Return a context manager in whose block the exchange is open. `extension` is that of its server, if any."""
        return OpenExchange(self, exchange, extension)

    def add(self, one: OpenExchange) -> None:
        """Add an exchange whose block is entered."""
        self._open.add(one)

    def discard(self, one: OpenExchange) -> None:
        """Remove an exchange whose block is left."""
        self._open.discard(one)
