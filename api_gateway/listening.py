"""The sockets that workers listen on: one set for each, held by the supervisor for as long as the gateway runs.

On Linux the kernel spreads new connections over them (SO_REUSEPORT). A connection that waits in the queue of a worker
that has died or is being relieved is not lost: the supervisor keeps the socket open, and the next worker inherits it.
Elsewhere all workers accept from the same sockets.
"""

import errno
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
IS_BALANCED = sys.platform == "linux"

Sockets = list[socket.socket]


def bind_for(workers: int, host: str, port: int) -> list[Sockets]:
    """Return the sockets of each worker, one for each address of `host`, bound and not yet listening.

    Port 0 takes any free one, the same for all. Raises OSError, also if another program has the port and would share
    it.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    with ExitStack() as stack:
        sets: list[Sockets] = [[] for _ in range(workers)]
        for family, address in addresses:
            try:
                free = _free_address(family, address, port)
            except OSError as error:
                if error.errno in _NOT_HERE and len(addresses) > 1:
                    continue  # as for the ::1 of `localhost` on a machine without IPv6
                raise
            port = free[1]
            if IS_BALANCED:
                bound = [stack.enter_context(_bound(family, free, is_shared=True)) for _ in sets]
            else:
                first = stack.enter_context(_bound(family, free, is_shared=False))
                bound = [first, *(stack.enter_context(first.dup()) for _ in sets[1:])]
            for one, sock in zip(sets, bound, strict=True):
                one.append(sock)
        if not sets[0]:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        stack.pop_all()
    return sets


def leave_group(sockets: Sequence[socket.socket]) -> None:
    """Have the kernel give these sockets no more connections until somebody listens on them again.

    For a worker that cannot be replaced soon: a client that is turned away tries again and gets another worker.
    """
    if IS_BALANCED:
        for sock in sockets:
            with suppress(OSError):  # it was not listening
                sock.shutdown(socket.SHUT_RDWR)


def _free_address(family: int, address: tuple[object, ...], port: int) -> tuple[str, int]:
    """Return the address with a port that nobody else has."""
    with _bound(family, (str(address[0]), port), is_shared=False) as probe:
        host, free, *_ = probe.getsockname()
        return host, free


def _bound(family: int, address: tuple[str, int], *, is_shared: bool) -> socket.socket:
    # The protocol is named because asyncio turns Nagle's delay off only for sockets that say they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock
