"""A response that is discarded: its bytes are counted and dropped as they arrive."""

from collections.abc import Callable

from api_gateway.transport.response import NO_LISTENER, ResponseSource, TimeoutExtension, UpstreamResponse


class DiscardedResponse(UpstreamResponse):
    """An `UpstreamResponse` of which only status and size matter."""

    def __init__(
        self,
        connection: ResponseSource,
        method: str,
        timeouts: TimeoutExtension,
        limit: int,
        on_end: "Callable[[DiscardedResponse], None]",
    ) -> None:
        """`on_end` is called once: at its end, or as soon as there are more than `limit` bytes."""
        super().__init__(connection, method, timeouts, NO_LISTENER)
        self.left = limit
        self._on_end: Callable[[DiscardedResponse], None] | None = on_end

    @property
    def is_too_large(self) -> bool:
        """True if the body is larger than the limit."""
        return self.left < 0

    def on_progress(self) -> None:
        """Throw away what has arrived."""
        if self.buffered:
            self.left -= len(self.take())
        if self.is_complete or self.error is not None or self.left < 0:
            on_end, self._on_end = self._on_end, None
            if on_end is not None:
                on_end(self)
