"""The body of a request as it arrives: counted, forwarded piece by piece, and kept for another attempt."""

import asyncio
from collections.abc import AsyncIterator

import httpx

from api_gateway.errors import BodyTooLarge, ClientDisconnected
from api_gateway.http1.asgi import Receive
from api_gateway.models import Exchange
from api_gateway.transport.request import NoBody


class StreamedBody(httpx.AsyncByteStream):
    """The client's body, piece by piece as it arrives; raises BodyTooLarge and ClientDisconnected.

    The first `keep` bytes are kept, so that it can be sent from its start again; one that has more of them cannot.
    """

    def __init__(self, receive: Receive, limit: int, exchange: Exchange, keep: int = 0) -> None:
        self._receive = receive
        self._limit = limit
        self._exchange = exchange
        self._keep = keep
        self._kept: list[bytes] = []
        self.is_started = False
        self.is_finished = False
        self._waited = 0.0  # seconds, for pieces that have come
        self._awaited_since: float | None = None  # the next piece

    @property
    def is_awaited(self) -> bool:
        """True while the next piece is waited for; also after that was ended by the failure of an attempt."""
        return self._awaited_since is not None

    @property
    def waited(self) -> float:
        """Seconds for which the attempt has waited for the client to send."""
        if self._awaited_since is None:
            return self._waited
        return self._waited + asyncio.get_running_loop().time() - self._awaited_since

    @property
    def is_kept(self) -> bool:
        """True while it can be sent from its start."""
        return not self.is_started or self._exchange.bytes_in <= self._keep

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what was kept, then what the client sends."""
        if not self.is_kept:
            raise RuntimeError("a body that was not kept cannot be sent again")
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
                raise ClientDisconnected("The client left while sending.")
            piece = message.get("body", b"")
            self._exchange.bytes_in += len(piece)
            if self._exchange.bytes_in > self._limit:
                raise body_too_large(self._limit)
            self.is_finished = not message.get("more_body", False)
            if piece:
                self._hold(piece)
                yield piece

    def _hold(self, piece: bytes) -> None:
        if self._exchange.bytes_in <= self._keep:
            self._kept.append(piece)
        else:
            self._kept.clear()


class SentBody(NoBody):
    """The body of a request that has been sent whole already; `kept` is None if it cannot be once more."""

    is_started = True

    def __init__(self, kept: bytes | None) -> None:
        self._kept = kept
        self.is_kept = kept is not None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield it again."""
        if self._kept:
            yield self._kept


def body_too_large(limit: int) -> BodyTooLarge:
    """Return the refusal of a body; the connection is closed, as the rest of it may still come."""
    return BodyTooLarge(f"The body is larger than {limit} bytes.", headers={"connection": "close"})
