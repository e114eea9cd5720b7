"""The service manager (systemd): it is notified of the state of the process, and may open the sockets to listen on.

See sd_notify(3) and sd_listen_fds(3). Without a service manager nothing is sent.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from api_gateway.errors import StartupError

logger = logging.getLogger(__name__)

NOTIFY_SOCKET = "NOTIFY_SOCKET"  # an address of a Unix socket; `@` begins an abstract one
LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"
_FIRST_DESCRIPTOR = 3  # of those that are passed


class ServiceManager:
    """Notifications to the service manager, and `passed`: the sockets that it opened, each with its name."""

    def __init__(self, address: str | None = None, passed: list[tuple[str, socket.socket]] | None = None) -> None:
        """`address` None: nothing is sent."""
        self.passed = passed or []
        self._address = address

    def __repr__(self) -> str:
        return f"<ServiceManager {self._address} [{len(self.passed)} sockets]>"

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> "ServiceManager":
        """Return the one of the environment, and remove its variables, which are for this process only.

        Raises StartupError if what was passed is not a listening stream socket.
        """
        address = environment.pop(NOTIFY_SOCKET, None)
        pid, count, names = (environment.pop(name, "") for name in (LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES))
        if pid != str(os.getpid()) or not count.isdecimal():
            return cls(address)
        named = names.split(":") if names else []
        named += ["unknown"] * (int(count) - len(named))
        return cls(address, [(name, _passed(number, name)) for number, name in enumerate(named, _FIRST_DESCRIPTOR)])

    def ready(self) -> None:
        """Notify that the gateway serves."""
        self._send("READY=1", "STATUS=serving")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Notify that a reload begins and, after the block, that the gateway serves: also if the reload has failed."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading")
        try:
            yield
        finally:
            self.ready()

    def stopping(self, within: float) -> None:
        """Notify that the gateway drains, for `within` seconds at most."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(within * 1e6)}", "STATUS=draining")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sending:
                sending.setblocking(False)
                sending.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            logger.warning("the service manager at %s could not be told %s: %s", self._address, lines[0], error)


def _passed(number: int, name: str) -> socket.socket:
    """Return the listening socket of a descriptor, which other processes do not inherit by themselves."""
    what = f"the service manager passed descriptor {number}, {name!r}"
    try:
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise StartupError(f"{what}, which is no socket: {error.strerror or error}") from error
    sock.set_inheritable(False)
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise StartupError(f"{what}, which is no listening stream socket; use ListenStream=")
    return sock
