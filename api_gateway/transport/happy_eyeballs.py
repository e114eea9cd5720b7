"""Connects to a host name that has several addresses: Happy Eyeballs (RFC 8305), also for addresses of one family.

The next address is tried when an attempt has failed, or has taken ATTEMPT_DELAY without a result; earlier attempts go
on meanwhile. The first established connection is used, and the other attempts are closed. So an address that does not
respond costs ATTEMPT_DELAY instead of the whole connect timeout. It costs that once: it is remembered and tried last
from then on (section 4: earlier results may determine the order). The addresses that work keep the order of the
resolver, which may spread connections by it.

asyncio's `happy_eyeballs_delay` is not used, because uvloop does not have it.
"""

import asyncio
import math
import socket
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from itertools import chain, zip_longest
from typing import Any

from api_gateway.transport.local_resources import exhaustion_behind

ATTEMPT_DELAY = 0.25  # seconds, as RFC 8305 section 8 recommends
REMEMBERED_FOR = 600.0  # seconds for which a failed attempt determines the order (RFC 6555 section 4.2)
MAX_FAILED_ADDRESSES = 1_024  # addresses of one transport

AddressInfo = tuple[int, int, int, str, Any]  # an item of `getaddrinfo`'s result
ConnectionAttempt = Callable[[], Coroutine[Any, Any, socket.socket]]
OnResult = Callable[[int, bool], object]  # the number of an attempt, and whether it has connected in time


class FailedAddresses:
    """The addresses to which the last attempt failed, or had no result in time. `now` is monotonic seconds.

    An address is removed when an attempt succeeds, and is no longer considered after REMEMBERED_FOR. One that the
    resolver no longer returns has no effect.
    """

    def __init__(self) -> None:
        self._failed_at: dict[AddressInfo, float] = {}  # the longest ago first

    def __repr__(self) -> str:
        return f"<FailedAddresses [{len(self._failed_at)}]>"

    def note(self, info: AddressInfo, now: float, *, has_connected: bool) -> None:
        """Record the result of an attempt."""
        self._failed_at.pop(info, None)
        if has_connected:
            return
        self._failed_at[info] = now
        if len(self._failed_at) > MAX_FAILED_ADDRESSES:
            del self._failed_at[next(iter(self._failed_at))]

    def in_order(self, found: Sequence[AddressInfo], now: float) -> list[AddressInfo]:
        """Return addresses in the order of attempts: failed ones last, the longest ago first."""
        if not self._failed_at:
            return list(found)
        since = now - REMEMBERED_FOR
        failed_at = {info: at for info in found if (at := self._failed_at.get(info, -math.inf)) > since}
        return sorted(found, key=lambda info: failed_at.get(info, -math.inf))


async def connect_to_name(host: str, port: int, failed: FailedAddresses) -> socket.socket:
    """Resolve `host`; return a socket that is connected to one of its addresses. The caller limits the time.

    Those in `failed` are tried last, and results are recorded there. Raises OSError: of the resolver, or if no attempt
    has succeeded.
    """
    loop = asyncio.get_running_loop()
    found = interleaved(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    order = failed.in_order(found, loop.time())

    def on_result(number: int, has_connected: bool) -> None:  # noqa: FBT001 - see `OnResult`
        failed.note(order[number], loop.time(), has_connected=has_connected)

    return await first_connected([partial(_connect, loop, info) for info in order], on_result)


def interleaved(found: Sequence[AddressInfo]) -> list[AddressInfo]:
    """Return addresses without repetitions, families by turns, beginning with the family of the first (section 4)."""
    families: dict[int, list[AddressInfo]] = {}
    for info in dict.fromkeys(found):
        families.setdefault(info[0], []).append(info)
    return [info for info in chain.from_iterable(zip_longest(*families.values())) if info is not None]


def _ignore(_number: int, _has_connected: bool) -> None:  # noqa: FBT001 - see `OnResult`
    """Do nothing; the default of `on_result`."""


async def first_connected(attempts: Sequence[ConnectionAttempt], on_result: OnResult = _ignore) -> socket.socket:
    """Return the first socket that one of `attempts` connects; close all others. Raises OSError if all fail.

    `on_result` gets the results: not of attempts that this process or machine has failed, and not of the last one that
    was begun if it has no result at the end, because it may have had less time than ATTEMPT_DELAY.
    """
    begun = 0
    errors: list[OSError] = []
    running: dict[asyncio.Task[socket.socket], int] = {}
    try:
        while begun < len(attempts) or running:
            if begun < len(attempts):
                running[asyncio.ensure_future(attempts[begun]())] = begun
                begun += 1
            delay = ATTEMPT_DELAY if begun < len(attempts) else None
            done, _ = await asyncio.wait(running, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            connected: list[socket.socket] = []
            for task in done:
                _collect(task, partial(on_result, running.pop(task)), connected, errors)
            if connected:
                for surplus in connected[1:]:
                    surplus.close()
                return connected[0]
        raise _summary(errors)
    finally:
        for task, number in running.items():
            if not task.cancel() and not task.cancelled() and task.exception() is None:
                task.result().close()
            elif number < begun - 1:
                on_result(number, False)


def _collect(
    task: "asyncio.Task[socket.socket]",
    on_result: Callable[[bool], object],
    connected: list[socket.socket],
    errors: list[OSError],
) -> None:
    """Add the result of an attempt that has ended to one of the lists, and report it."""
    try:
        connected.append(task.result())
    except OSError as error:
        errors.append(error)
        if exhaustion_behind(error) is None:
            on_result(False)
    else:
        on_result(True)


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
