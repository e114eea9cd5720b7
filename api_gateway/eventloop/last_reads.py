"""Reads what a peer had sent before writing to it failed.

A peer may send its last bytes and close without having read everything, such as an upstream that refuses a request
before its body has arrived. The kernel then answers further bytes with a reset. If asyncio learns of that by a failed
write, it reports the loss of the connection without reading what had arrived.
"""

import asyncio
import os
from collections.abc import Iterator

MAX_LAST_READS = 8  # of the size of the buffer, because what follows them has no back-pressure


def last_reads(transport: asyncio.Transport, buffer: memoryview) -> Iterator[int]:
    """Read into `buffer` what had arrived, and yield the number of bytes of each read.

    To be called within `connection_lost`, after which asyncio and uvloop close the socket. Yields nothing for a
    connection with TLS, whose bytes can no longer be decrypted, and for a transport without a socket.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or transport.get_extra_info("sslcontext") is not None:
        return
    for _ in range(MAX_LAST_READS):
        try:
            size = os.readv(sock.fileno(), [buffer])
        except OSError:
            return
        if not size:
            return
        yield size
