"""The receive buffer that all connections of an event loop share; it limits the size of one read.

Without it, asyncio reads up to 256 KiB at once; an `asyncio.BufferedProtocol` provides the buffer itself. One buffer
is enough for all connections of a loop, because each connection copies its bytes before the loop reads again.
"""

import asyncio
from weakref import WeakKeyDictionary

READ_SIZE = 64 * 1024  # bytes read at once
RELAY_SIZE = 128 * 1024  # bytes read at once if they are written immediately: fewer system calls for large bodies

_buffers: WeakKeyDictionary[asyncio.AbstractEventLoop, memoryview] = WeakKeyDictionary()


def receive_buffer(loop: asyncio.AbstractEventLoop) -> memoryview:
    """Return the buffer of RELAY_SIZE bytes that all connections of this event loop share."""
    buffer = _buffers.get(loop)
    if buffer is None:
        buffer = _buffers[loop] = memoryview(bytearray(RELAY_SIZE))
    return buffer
