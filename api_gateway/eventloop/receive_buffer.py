"""The buffer that the connections of an event loop read into: it bounds what one read can bring.

Event loops read up to 256 KiB at once; with `asyncio.BufferedProtocol` a protocol says where to and how much. One
buffer serves all connections of a loop, as each takes its bytes before the next one's turn.
"""

import asyncio
from weakref import WeakKeyDictionary

READ_SIZE = 64 * 1024  # bytes read at once
RELAY_SIZE = 192 * 1024  # the same where what is read is written at once: fewer system calls for large bodies

_buffers: WeakKeyDictionary[asyncio.AbstractEventLoop, memoryview] = WeakKeyDictionary()


def receive_buffer(loop: asyncio.AbstractEventLoop) -> memoryview:
    """Return the buffer of RELAY_SIZE bytes that all connections of this event loop share."""
    buffer = _buffers.get(loop)
    if buffer is None:
        buffer = _buffers[loop] = memoryview(bytearray(RELAY_SIZE))
    return buffer
