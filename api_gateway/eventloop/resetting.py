"""Resets of connections. `abort` of a transport only discards what is unsent: the peer sees a regular end (FIN).

Where the end of the connection would be the end of a body, as for clients of HTTP/1.0, only a reset (RST) shows that
the body is incomplete (RFC 9112 section 8).
"""

import asyncio
import os
import socket
import struct
from contextlib import suppress

_DISCARD = struct.pack("ii", 1, 0)  # SO_LINGER: closing discards what is unsent, and resets (socket(7))


def reset_connection(transport: asyncio.Transport) -> None:
    """Abort a connection, by a reset if it is one of TCP."""
    sock = transport.get_extra_info("socket")
    # uvloop's socket objects set no options; those of a duplicate are of the same connection. The errors suppressed:
    # there is no socket, or it is closed already.
    with suppress(AttributeError, OSError, ValueError), socket.socket(fileno=os.dup(sock.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DISCARD)
    transport.abort()
