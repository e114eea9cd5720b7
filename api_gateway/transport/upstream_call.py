"""The upstream's side as an exchange uses it: one request and its response, on a connection or in a task.

`UpstreamConnection` is the gateway's own HTTP/1.1 connection, `HttpxCall` a task around any httpx transport.
"""

from collections.abc import Sequence
from typing import Protocol

from api_gateway.transport.response import ResponseSource, UpstreamResponse


class UpstreamCall(ResponseSource, Protocol):
    """One request and its response, which is reported by `UpstreamResponse.on_progress`."""

    @property
    def is_write_paused(self) -> bool:
        """True while the upstream reads more slowly than the client sends."""
        ...

    def start(self, response: UpstreamResponse, request: bytes, *further: bytes) -> None:
        """Send a complete request as bytes, and receive into `response`."""
        ...

    def begin(
        self, response: UpstreamResponse, request: Sequence[bytes], left: int | None, *, gathers: bool = False
    ) -> None:
        """Send the beginning of a request, of whose body `left` bytes follow; see `UpstreamConnection.begin`."""
        ...

    def send_piece(self, piece: bytes) -> None:
        """Send a piece of the request body; drop it if no more of the body is wanted."""
        ...

    def end_body(self, end: bytes) -> None:
        """Send the end of the framing of the request body, which is complete then."""
        ...

    def close(self) -> None:
        """End the call at once. Idempotent."""
        ...
