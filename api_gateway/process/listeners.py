"""The sockets that workers listen on: a set for each worker, held open by the supervisor while the gateway runs.

On Linux the kernel distributes new connections over the TCP sockets (SO_REUSEPORT). Connections in the accept queue of
a worker that has exited or is being replaced are not lost: the supervisor keeps the socket open, and the next worker
inherits it. On other systems, on a Unix socket, and on sockets that a service manager has opened, all workers accept
from one socket.
"""

import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.settings.bind_address import BindAddress

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_EVERY_ADDRESS = "::"
IS_BALANCED = sys.platform == "linux"
ACCEPTED_PER_TURN = 4
ADMIN_SOCKET = "admin"  # the name of a passed socket that is for operators
REDIRECT_SOCKET = "redirect"  # of one for plain HTTP that is redirected
REDIRECT_SETTING = "server.tls.redirect_from"


@dataclass(frozen=True, slots=True)
class WorkerSockets:
    """The sockets of one worker: `public` for clients, `admin` for the operator listener if there is one.

    `redirect` are those for plain HTTP, if it is redirected. `are_shared`: other workers accept from the same sockets.
    """

    public: list[socket.socket]
    admin: list[socket.socket] = field(default_factory=list)
    redirect: list[socket.socket] = field(default_factory=list)
    are_shared: bool = False

    def __iter__(self) -> Iterator[socket.socket]:
        yield from self.public
        yield from self.admin
        yield from self.redirect

    @property
    def by_setting(self) -> Iterator[tuple[str, list[socket.socket]]]:
        """The sockets of each listener, after the setting of its address."""
        yield from (("server", self.public), ("admin.listen", self.admin), (REDIRECT_SETTING, self.redirect))


class Listeners:
    """The sockets of all workers. Closing them also removes the files of Unix sockets that were not replaced."""

    def __init__(self, workers: int, *, are_shared: bool = False) -> None:
        self.sets = [WorkerSockets([], are_shared=are_shared) for _ in range(workers)]
        self._files: list[tuple[Path, os.stat_result]] = []

    def __repr__(self) -> str:
        return f"<Listeners [{len(self.sets)} sets]>"

    @classmethod
    def of(cls, config: GatewayConfig, workers: int, passed: Sequence[tuple[str, socket.socket]] = ()) -> "Listeners":
        """Bind all configured addresses, or use the sockets that a service manager has passed, with their names.

        Raises StartupError, and then nothing stays bound.
        """
        if passed:
            return cls._of_passed(config, workers, passed)
        server, admin = config.server, config.admin
        listeners = cls(workers)
        try:
            address = BindAddress.of(server.host, server.port, server.socket_mode)
            listeners._bind("server", address, lambda sockets: sockets.public)
            if admin.listen is not None:
                address = BindAddress.parse(admin.listen, admin.socket_mode)
                listeners._bind("admin.listen", address, lambda sockets: sockets.admin)
            redirect_from = None if server.tls is None else server.tls.redirect_from
            if redirect_from is not None:
                address = BindAddress.parse(redirect_from, server.socket_mode)
                listeners._bind(REDIRECT_SETTING, address, lambda sockets: sockets.redirect)
        except BaseException:
            listeners.close()
            raise
        return listeners

    @classmethod
    def _of_passed(
        cls, config: GatewayConfig, workers: int, passed: Sequence[tuple[str, socket.socket]]
    ) -> "Listeners":
        """Use passed sockets: those named `admin` for operators, `redirect` for plain HTTP, all others for clients."""
        admin = [sock for name, sock in passed if name == ADMIN_SOCKET]
        redirect = [sock for name, sock in passed if name == REDIRECT_SOCKET]
        public = [sock for name, sock in passed if name not in (ADMIN_SOCKET, REDIRECT_SOCKET)]
        if bool(admin) != (config.admin.listen is not None):
            raise StartupError(
                f"admin.listen: is {config.admin.listen or 'not set'}, and the service manager passed {len(admin)} "
                f"sockets named {ADMIN_SOCKET}; set it and pass one with FileDescriptorName={ADMIN_SOCKET}, or neither"
            )
        if not public:
            raise StartupError(f"the service manager passed only sockets named {ADMIN_SOCKET!r}, and none for clients")
        redirect_from = None if config.server.tls is None else config.server.tls.redirect_from
        if bool(redirect) != (redirect_from is not None):
            raise StartupError(
                f"server.tls.redirect_from: is {redirect_from or 'not set'}, and the service manager passed"
                f" {len(redirect)} sockets named {REDIRECT_SOCKET}; set it and pass one with"
                f" FileDescriptorName={REDIRECT_SOCKET}, or neither"
            )
        listeners = cls(workers, are_shared=workers > 1)
        for number, sockets in enumerate(listeners.sets):
            for own, given in ((sockets.public, public), (sockets.admin, admin), (sockets.redirect, redirect)):
                own.extend(given if number == 0 else [sock.dup() for sock in given])
        return listeners

    def _bind(
        self, setting: str, address: BindAddress, choose: Callable[[WorkerSockets], list[socket.socket]]
    ) -> None:
        workers = len(self.sets)
        try:
            if address.path:
                bound = bind_path(workers, address.path, address.mode)
                self._files.append((Path(address.path), os.stat(address.path)))  # noqa: PTH116
            else:
                bound = bind_for(workers, address.host, address.port)
        except socket.gaierror as error:
            reason = (error.strerror or str(error)).lower()
            raise StartupError(f"{setting}: the host '{address.host}' cannot be resolved: {reason}") from error
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise StartupError(f"{setting}: cannot listen on {address}: {reason}") from error
        taken = {sock.getsockname()[:2] for sock in self.sets[0] if sock.family != socket.AF_UNIX}
        is_twice = any(sock.family != socket.AF_UNIX and sock.getsockname()[:2] in taken for sock in bound[0])
        for sockets, own in zip(self.sets, bound, strict=True):
            choose(sockets).extend(own)
        if is_twice:  # by another name of the host; the rules of the configuration know the rest
            raise StartupError(f"{setting}: cannot listen on {address}: another listener of the gateway does")

    def close(self) -> None:
        """Close the sockets in this process, and remove the files of Unix sockets."""
        for sock in (sock for sockets in self.sets for sock in sockets):
            sock.close()
        for path, made in self._files:
            with suppress(OSError):
                if os.path.samestat(path.lstat(), made):  # otherwise another gateway has replaced the file
                    path.unlink()
        self._files.clear()


def bind_for(workers: int, host: str, port: int) -> list[list[socket.socket]]:
    """Return the sockets of each worker, one for each address of `host`, bound and not yet listening.

    Port 0 selects a free one, the same for all. `::` accepts IPv4 too. Raises OSError, also if another program uses
    the port with SO_REUSEPORT.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    is_dual = host == _EVERY_ADDRESS
    with ExitStack() as stack:
        sets: list[list[socket.socket]] = [[] for _ in range(workers)]
        for family, address in addresses:
            try:
                free = _free_address(family, address, port, is_dual=is_dual)
            except OSError as error:
                if error.errno in _NOT_HERE and len(addresses) > 1:
                    continue  # such as ::1 for `localhost` on a machine without IPv6
                raise
            port = free[1]
            if IS_BALANCED and workers > 1:
                bound = [stack.enter_context(_bound(family, free, is_shared=True, is_dual=is_dual)) for _ in sets]
            else:
                first = stack.enter_context(_bound(family, free, is_shared=False, is_dual=is_dual))
                bound = [first, *(stack.enter_context(first.dup()) for _ in sets[1:])]
            for one, sock in zip(sets, bound, strict=True):
                one.append(sock)
        if not sets[0]:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        stack.pop_all()
    return sets


def bind_path(workers: int, path: str, mode: int) -> list[list[socket.socket]]:
    """Return duplicates of one Unix socket for the workers, bound and not yet listening.

    A socket file on which no process listens is replaced. Raises OSError, also if a process listens, or if the path
    exists and is not a socket.
    """
    _remove_stale(Path(path))
    with ExitStack() as stack:
        first = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        first.bind(path)
        Path(path).chmod(mode)  # before a client can connect, because it does not listen yet
        others = [stack.enter_context(first.dup()) for _ in range(workers - 1)]
        stack.pop_all()
    return [[sock] for sock in (first, *others)]


@contextmanager
def watched(sockets: Iterable[socket.socket]) -> Iterator[list[socket.socket]]:
    """Yield each socket and its duplicates, ACCEPTED_PER_TURN in all; close the duplicates after the block.

    In one turn of the event loop, uvloop accepts one connection for each socket that it watches. With duplicates it
    accepts several, and their requests proceed side by side: that takes 0.9 of the CPU time of a request on a new
    connection. An accept on an empty queue, of which a lone connection causes three, takes less than a microsecond.
    """
    listening = list(sockets)
    for sock in listening:
        # `dup` repeats the timeout of the object. A blocking one would make `accept` block in every process that
        # shares the socket, and their event loops with it.
        sock.setblocking(False)
    with ExitStack() as stack:
        yield [
            one
            for sock in listening
            for one in (sock, *(stack.enter_context(sock.dup()) for _ in range(ACCEPTED_PER_TURN - 1)))
        ]


def leave_group(sockets: WorkerSockets) -> None:
    """Remove these sockets from the kernel's distribution of connections until a process listens on them again.

    For a worker that cannot be replaced soon: a refused client that connects again gets another worker. Sockets from
    which other workers accept too are not affected.
    """
    if IS_BALANCED and not sockets.are_shared:
        for sock in sockets:
            if sock.family != socket.AF_UNIX:
                with suppress(OSError):  # it was not listening
                    sock.shutdown(socket.SHUT_RDWR)


def _remove_stale(path: Path) -> None:
    """Remove the file of a Unix socket on which no process listens. Raises OSError if one does."""
    if not path.is_socket():
        return  # another kind of file makes `bind` fail
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except (TimeoutError, BlockingIOError):  # its accept queue is full
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        else:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _free_address(family: int, address: tuple[object, ...], port: int, *, is_dual: bool) -> tuple[str, int]:
    """Return the address with a port that no other program uses."""
    with _bound(family, (str(address[0]), port), is_shared=False, is_dual=is_dual) as probe:
        host, free, *_ = probe.getsockname()
        return host, free


def _bound(family: int, address: tuple[str, int], *, is_shared: bool, is_dual: bool) -> socket.socket:
    # The protocol is given because asyncio sets TCP_NODELAY only on sockets that were created with IPPROTO_TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if is_dual else 1)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock
