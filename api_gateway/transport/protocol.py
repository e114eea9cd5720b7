"""The asyncio protocol of a connection to an upstream.

asyncio requires a base class of a protocol with a buffer of its own, and mypyc compiles no class that has a base class
of others. So the protocol is a shell: what the event loop calls are the methods of the connection.
"""

import asyncio
from typing import Final

from api_gateway.transport.upstream_connection import UpstreamConnection

_CALLBACKS: Final = (
    "connection_made",
    "get_buffer",
    "buffer_updated",
    "eof_received",
    "pause_writing",
    "resume_writing",
    "connection_lost",
)


class UpstreamProtocol(asyncio.BufferedProtocol):
    """The protocol of one connection, whose methods it has as attributes, so that a call costs nothing more."""

    def __init__(self, connection: UpstreamConnection) -> None:
        vars(self).update((name, getattr(connection, name)) for name in _CALLBACKS)
        self._connection = connection

    def __repr__(self) -> str:
        return f"<UpstreamProtocol of {self._connection!r}>"
