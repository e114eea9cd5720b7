"""The number of sent bytes that a peer has not acknowledged, which shows whether a slow reader makes progress.

The write buffer of an asyncio transport does not show it: the kernel reports a socket as writable only once a third of
its send buffer is free, which may be more than 1 MB. Until then, the transport's buffer does not shrink even if the
peer reads steadily.
"""

import asyncio
import fcntl
import struct
import termios

_COUNT = struct.Struct("i")


def unacknowledged(transport: asyncio.WriteTransport) -> int:
    """Return the number of bytes in the transport's write buffer and in the kernel's send queue.

    If the kernel does not report its queue (not Linux, no socket), only the transport's buffer is counted.
    """
    buffered = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    try:
        queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_COUNT.size))  # SIOCOUTQ, see tcp(7)
    except (AttributeError, OSError, ValueError):
        return buffered
    return buffered + int(_COUNT.unpack(queued)[0])
