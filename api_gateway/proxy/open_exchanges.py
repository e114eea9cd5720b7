"""Exchanges that arrive by ASGI, so that streams and tunnels can be ended with the credential of their client.

Under the gateway's own protocol such an exchange ends with its connection. Other ASGI servers do not give access to
the connection; there the response is left incomplete, upon which servers close the connection or reset the stream.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from api_gateway.errors import GatewayError
from api_gateway.models import Exchange


class OpenExchange(Protocol):
    """An exchange that can be ended from outside."""

    @property
    def exchange(self) -> Exchange | None:
        """Its record; None before it has begun and after its end."""
        ...

    def end(self, error: GatewayError) -> None:
        """End a stream or tunnel with an error. No effect after its end."""
        ...


class OpenExchanges:
    """The exchanges of one gateway that arrive by ASGI and are open."""

    def __init__(self) -> None:
        self._open: set[OpenExchange] = set()

    def __repr__(self) -> str:
        return f"<OpenExchanges [{len(self._open)}]>"

    def __iter__(self) -> Iterator[OpenExchange]:
        """Yield those that are open now; they may end meanwhile."""
        return iter(list(self._open))

    @contextmanager
    def holding(self, one: OpenExchange) -> Iterator[None]:
        """Have an exchange among the open ones within this block."""
        self._open.add(one)
        try:
            yield
        finally:
            self._open.discard(one)
