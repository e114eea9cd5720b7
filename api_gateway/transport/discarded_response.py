"""A response that is discarded: its bytes are counted and dropped as they arrive."""

import asyncio

from api_gateway.transport.response import NO_LISTENER, ResponseSource, TimeoutExtension, UpstreamResponse


class DiscardedResponse(UpstreamResponse):
    """An `UpstreamResponse` of which only status and size matter.

    `ended` is done at its end, or once there are more than `limit` bytes.
    """

    def __init__(self, connection: ResponseSource, method: str, timeouts: TimeoutExtension, limit: int) -> None:
        super().__init__(connection, method, timeouts, NO_LISTENER)
        self.left = limit
        self.ended: asyncio.Future[None] = connection.loop.create_future()

    @property
    def is_too_large(self) -> bool:
        """True if the body is larger than the limit."""
        return self.left < 0

    def on_progress(self) -> None:
        """Throw away what has arrived."""
        if self.buffered:
            self.left -= len(self.take())
        if (self.is_complete or self.error is not None or self.left < 0) and not self.ended.done():
            self.ended.set_result(None)
