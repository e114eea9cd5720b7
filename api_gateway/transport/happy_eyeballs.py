"""Connects to a host name that has several addresses: Happy Eyeballs (RFC 8305), also for addresses of one family.

The next address is tried when an attempt has failed, or has taken ATTEMPT_DELAY without a result; earlier attempts go
on meanwhile. The first established connection is used, and the other attempts are closed. So an address that does not
respond costs ATTEMPT_DELAY instead of the whole connect timeout.

asyncio's `happy_eyeballs_delay` is not used, because uvloop does not have it.
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any

from api_gateway.transport.local_resources import exhaustion_behind

ATTEMPT_DELAY = 0.25  # seconds, as RFC 8305 section 8 recommends

AddressInfo = tuple[int, int, int, str, Any]  # an item of `getaddrinfo`'s result
ConnectionAttempt = Callable[[], Coroutine[Any, Any, socket.socket]]


async def connect_to_name(host: str, port: int) -> socket.socket:
    """Resolve `host`; return a socket that is connected to one of its addresses. The caller limits the time.

    Raises OSError: of the resolver, or if no attempt has succeeded.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return await first_connected([partial(_connect, loop, info) for info in interleaved(found)])


def interleaved(found: Sequence[AddressInfo]) -> list[AddressInfo]:
    """Return addresses without repetitions, families by turns, beginning with the family of the first (section 4)."""
    families: dict[int, list[AddressInfo]] = {}
    for info in dict.fromkeys(found):
        families.setdefault(info[0], []).append(info)
    return [info for info in chain.from_iterable(zip_longest(*families.values())) if info is not None]


async def first_connected(attempts: Sequence[ConnectionAttempt]) -> socket.socket:
    """Return the first socket that one of `attempts` connects; close all others. Raises OSError if all fail."""
    left = list(attempts)
    errors: list[OSError] = []
    running: set[asyncio.Task[socket.socket]] = set()
    try:
        while left or running:
            if left:
                running.add(asyncio.ensure_future(left.pop(0)()))
            delay = ATTEMPT_DELAY if left else None
            done, running = await asyncio.wait(running, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            connected: list[socket.socket] = []
            for task in done:
                try:
                    connected.append(task.result())
                except OSError as error:
                    errors.append(error)
            if connected:
                for surplus in connected[1:]:
                    surplus.close()
                return connected[0]
        raise _summary(errors)
    finally:
        for task in running:
            if not task.cancel() and not task.cancelled() and task.exception() is None:
                task.result().close()


def _summary(errors: Sequence[OSError]) -> OSError:
    """Return one error for all attempts, of the kind of the first one that is not due to this process or machine."""
    if not errors:
        return OSError("the name has no address")
    first = next((error for error in errors if exhaustion_behind(error) is None), errors[0])
    if len(errors) == 1:
        return first
    texts = dict.fromkeys(error.strerror or str(error) for error in errors)
    return OSError(first.errno, f"{len(errors)} addresses: {'; '.join(texts)}")


async def _connect(loop: asyncio.AbstractEventLoop, info: AddressInfo) -> socket.socket:
    family, kind, protocol, _, address = info
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock
