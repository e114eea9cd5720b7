"""Recognises connect errors that are caused by exhausted resources of this process or machine.

Such an error does not indicate a failure of the upstream.
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
    """No connection could be opened because this process or machine has no descriptor, port or socket memory left."""


def exhaustion_behind(error: BaseException | None) -> OSError | None:
    """Return the operating system's error for an exhausted local resource, if `error` is or was caused by one."""
    for cause in causes(error, with_context=False):
        if isinstance(cause, socket.gaierror):
            if not _has_descriptor():  # without a descriptor, the resolver reports the name as unknown
                return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        elif isinstance(cause, OSError) and cause.errno in _EXHAUSTION:
            return cause
    return None


def is_local_exhaustion(error: BaseException, address: str, port: int) -> bool:
    """Return whether connecting to `address` failed because a local resource is exhausted.

    EADDRNOTAVAIL means that no port is free, or that this machine has no source address for `address`, such as `::1`
    without IPv6. A datagram socket, which needs no stream port, distinguishes the two.
    """
    exhaustion = exhaustion_behind(error)
    if exhaustion is None or exhaustion.errno != errno.EADDRNOTAVAIL:
        return exhaustion is not None
    try:
        version = ip_address(address.partition("%")[0]).version
    except ValueError:
        return True  # a host name
    with suppress(OSError), socket.socket(_FAMILIES[version], socket.SOCK_DGRAM) as probe:
        return probe.connect_ex((address, port)) == 0
    return False


def _has_descriptor() -> bool:
    with suppress(OSError):
        os.close(os.open(os.devnull, os.O_RDONLY))
        return True
    return False


class ExhaustionLog:
    """Logs exhaustion of local resources, at most once in `EXHAUSTION_LOG_INTERVAL`; counts errors in between."""

    def __init__(self) -> None:
        self._due = float("-inf")
        self._unreported = 0

    def __repr__(self) -> str:
        return f"<ExhaustionLog [{self._unreported} unreported]>"

    def note(self, upstream: str, error: Exception, now: float) -> None:
        """Count one refused request, and log if the interval since the last log line has passed."""
        self._unreported += 1
        if now < self._due:
            return
        logger.error(
            "upstream %s: %s; requests refused for this reason since the last report: %d",
            upstream,
            error,
            self._unreported,
        )
        self._due, self._unreported = now + EXHAUSTION_LOG_INTERVAL, 0
