"""The body of a request: counted, forwarded piece by piece, and kept for another attempt."""

import asyncio
from collections.abc import AsyncIterator

import httpx

from api_gateway.errors import BodyTooLarge, ClientDisconnected
from api_gateway.http1.asgi import Receive
from api_gateway.models import Exchange


class StreamedBody(httpx.AsyncByteStream):
    """The client's body, piece by piece as it arrives. Iteration raises BodyTooLarge and ClientDisconnected.

    A body of up to `keep` bytes is kept, so that it can be iterated again from its start; a longer body cannot.

    States: unread, started (`is_started`), finished (`is_started` and `is_finished`).
    """

    def __init__(self, receive: Receive, limit: int, exchange: Exchange, keep: int = 0) -> None:
        self._receive = receive
        self._limit = limit
        self._exchange = exchange
        self._keep = keep
        self._kept: list[bytes] = []
        self.is_started = False
        self.is_finished = False
        self._waited = 0.0  # seconds, for the pieces that have arrived
        self._awaited_since: float | None = None  # loop time since which the next piece has been awaited

    def __repr__(self) -> str:
        state = "finished" if self.is_finished else "started" if self.is_started else "unread"
        return f"<StreamedBody [{state}, {self._exchange.bytes_in} bytes]>"

    @property
    def is_awaited(self) -> bool:
        """True while the next piece is awaited; it remains True if the attempt failed in that state."""
        return self._awaited_since is not None

    @property
    def waited(self) -> float:
        """Seconds for which the current attempt has waited for the client to send."""
        if self._awaited_since is None:
            return self._waited
        return self._waited + asyncio.get_running_loop().time() - self._awaited_since

    @property
    def is_replayable(self) -> bool:
        """True while the body can be iterated from its start."""
        return not self.is_started or self._exchange.bytes_in <= self._keep

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield the kept pieces, then those that the client sends. Raises RuntimeError if the body is not kept."""
        if not self.is_replayable:
            raise RuntimeError("the body cannot be sent again: it was not kept")
        self.is_started = True
        self._waited, self._awaited_since = 0.0, None
        for piece in tuple(self._kept):
            yield piece
        clock = asyncio.get_running_loop().time
        while not self.is_finished:
            self._awaited_since = since = clock()
            message = await self._receive()
            self._waited, self._awaited_since = self._waited + clock() - since, None
            if message["type"] == "http.disconnect":
                raise ClientDisconnected("The client disconnected before the request was complete.")
            piece = message.get("body", b"")
            self._exchange.bytes_in += len(piece)
            if self._exchange.bytes_in > self._limit:
                raise body_too_large(self._limit)
            self.is_finished = not message.get("more_body", False)
            if piece:
                self._keep_piece(piece)
                yield piece

    def _keep_piece(self, piece: bytes) -> None:
        if self._exchange.bytes_in <= self._keep:
            self._kept.append(piece)
        else:
            self._kept.clear()


def body_too_large(limit: int) -> BodyTooLarge:
    """Return the error for a body above `limit` bytes; it closes the connection, because the rest is not read."""
    return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})
