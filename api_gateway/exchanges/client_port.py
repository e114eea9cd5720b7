"""The port of the client's side: what an exchange asks of it."""

import asyncio
from typing import Protocol

from api_gateway.http1.asgi import BodyReceiver, DownstreamAbilities, InFlight
from api_gateway.models import ClientCertificate, HeaderList
from api_gateway.proxy.header_facts import RewrittenHeaders


class HeaderLimits(Protocol):
    """Limits of a request head."""

    @property
    def header_bytes(self) -> int:
        """Maximum size of the head in bytes, line breaks included."""
        ...

    @property
    def header_lines(self) -> int:
        """Maximum number of header lines."""
        ...


class Downstream(Protocol):
    """The client's side as an exchange uses it: the gateway's own connection, or `AsgiDownstream`."""

    loop: asyncio.AbstractEventLoop
    client: tuple[str, int] | None
    scheme: str
    certificate: ClientCertificate | None
    limits: HeaderLimits
    is_write_paused: bool
    last_headers: RewrittenHeaders | None  # of the previous plain request

    @property
    def abilities(self) -> DownstreamAbilities:
        """The abilities of this kind of client's side."""
        ...

    @property
    def transport(self) -> asyncio.Transport:
        """The transport that responses are written to."""
        ...

    def begin_exchange(self, exchange: InFlight) -> None:
        """Hold further input until the exchange ends, and report events of the connection to it."""
        ...

    def end_exchange(self, *, keep_alive: bool) -> None:
        """Process the next request after a complete response, or close the connection."""
        ...

    @property
    def is_draining(self) -> bool:
        """True once the server has begun to stop."""
        ...

    def receive_body(self, body: BodyReceiver, left: int) -> None:
        """Pass the rest of the body of the exchange in flight to `body`, also after the exchange.

        After a plain head it has `left` bytes. 0: the general parser has read the head, and reads the body too.
        """
        ...

    def pause_reading(self) -> None:
        """Stop reading from the client."""
        ...

    def resume_reading(self) -> None:
        """Read from the client again, unless input is held."""
        ...

    def write_response(self, response: bytes, *, keep_alive: bool, is_last: bool) -> None:
        """Send a complete response to a request for which `begin_exchange` was not called.

        `is_last`: the client has announced that it sends no further request.
        """
        ...

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """Send 101 and return the transport, with the bytes that the client has already sent in the new protocol."""
        ...
