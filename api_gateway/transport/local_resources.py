"""Errors caused by a lack of descriptors, ports or memory in this process or machine.

Such an error says nothing about the upstream that a connection was meant for.
"""

import errno
import logging
import os
import socket
from contextlib import suppress
from ipaddress import ip_address

import httpx

from api_gateway.errors import causes

EXHAUSTION_LOG_INTERVAL = 60.0  # seconds between two log lines
_EXHAUSTION = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})

_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

logger = logging.getLogger(__name__)


class LocalResourcesExhausted(httpx.ConnectError):
    """No connection could be opened because this process or machine lacks a descriptor, a port or socket memory."""


def exhaustion_behind(error: BaseException | None) -> OSError | None:
    """Return the error of the operating system that names a lack of our own, if one is behind `error`."""
    for cause in causes(error, with_context=False):
        if isinstance(cause, socket.gaierror):
            if not _has_descriptor():  # the resolver could not open its files, and says that the name is unknown
                return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        elif isinstance(cause, OSError) and cause.errno in _EXHAUSTION:
            return cause
    return None


def is_local_exhaustion(error: BaseException, address: str, port: int) -> bool:
    """Tell whether connecting to `address` failed for a lack of our own.

    EADDRNOTAVAIL says that no port is free, but also that this machine has no address to reach `address` from, such
    as `::1` without IPv6. A datagram socket, which needs no free stream port, tells the two apart.
    """
    exhaustion = exhaustion_behind(error)
    if exhaustion is None or exhaustion.errno != errno.EADDRNOTAVAIL:
        return exhaustion is not None
    try:
        version = ip_address(address.partition("%")[0]).version
    except ValueError:
        return True  # a name: each of its addresses failed alike
    with suppress(OSError), socket.socket(_FAMILIES[version], socket.SOCK_DGRAM) as probe:
        return probe.connect_ex((address, port)) == 0
    return False


def _has_descriptor() -> bool:
    with suppress(OSError):
        os.close(os.open(os.devnull, os.O_RDONLY))
        return True
    return False


class ExhaustionLog:
    """Logs that connections could not be opened for a lack of our own, at most once in `EXHAUSTION_LOG_INTERVAL`."""

    def __init__(self) -> None:
        self._due = float("-inf")
        self._unreported = 0

    def __repr__(self) -> str:
        return f"<ExhaustionLog [{self._unreported} unreported]>"

    def note(self, upstream: str, error: Exception, now: float) -> None:
        """Count one request that was refused for it, and log it if the last line is old enough."""
        self._unreported += 1
        if now < self._due:
            return
        logger.error(
            "upstream %s: %s; requests refused for this since the last report: %d", upstream, error, self._unreported
        )
        self._due, self._unreported = now + EXHAUSTION_LOG_INTERVAL, 0
