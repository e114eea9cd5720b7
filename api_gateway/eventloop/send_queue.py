"""How much of what was sent a peer has still to take: the measure of whether a slow reader makes progress.

The buffer of an asyncio transport alone does not tell. The kernel reports a socket as writable again only once a third
of its own send buffer is free, which may be more than a megabyte: a steady reader moves nothing in the transport's
buffer until then.
"""

import asyncio
import fcntl
import struct
import termios

_COUNT = struct.Struct("i")


def unacknowledged(transport: asyncio.WriteTransport) -> int:
    """Return the bytes in the transport's buffer and in the kernel's send queue.

    Where the kernel cannot be asked (not Linux, no socket), the transport's buffer alone is counted.
    """
    buffered = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    try:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_COUNT.size))  # SIOCOUTQ, see tcp(7)
    except (AttributeError, OSError, ValueError):
        return buffered
    return buffered + int(_COUNT.unpack(queued)[0])
