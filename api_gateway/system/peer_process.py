"""Finds the local process at the other end of a connection, and whether it could be forwarding requests of others.

A reverse proxy or a port forwarder has accepted the connection that it forwards. So it or its parent holds a listener
(TCP, or a Unix socket to which another proxy connects), or it holds at least the accepted connection (an old process
that drains after a reload). A client that the operator started holds none of these. Linux only; for the files read
here see proc(5).

Everything is read twice. The inode of a socket identifies it while it exists; the gateway's own end is compared by
inode too, so that both readings are of this connection and not of a later one between the same ports.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from api_gateway.system.socket_table import ESTABLISHED, LISTEN, Endpoint, SocketRow, SocketTable

PROC = Path("/proc")
PORT_RANGE = "sys/net/ipv4/ip_local_port_range"
_HARMLESS = ("NETLINK", "UDP", "PING", "RAW", "PACKET", "ALG")  # families that accept no connections
_UNIX = "UNIX"  # prefix of the protocols of that family
_ROOT = 0
_INIT = 1  # the system's first process, which listens for others and forwards nothing


class NotEstablished(Exception):
    """The peer does not qualify, or cannot be identified; the message gives the reason for the log."""


@dataclass(frozen=True, slots=True)
class EstablishedConnection:
    """A connection between two processes of this machine. `inode` is that of the gateway's socket, if known."""

    local: Endpoint
    remote: Endpoint
    inode: int | None = None


class PeerProcesses:
    """Examines the processes at the other end of connections, for a gateway of user `uid`. Blocks for some ms."""

    def __init__(self, uid: int, proc: Path = PROC) -> None:
        self._users = (uid, _ROOT)
        self._proc = proc

    def __repr__(self) -> str:
        return f"<PeerProcesses [{self._proc}, users {self._users}]>"

    @property
    def is_available(self) -> bool:
        """True if this system has the required files in /proc."""
        return (self._proc / "self/net/tcp").exists() and (self._proc / "self/fd").exists()

    def examine(self, connection: EstablishedConnection) -> None:
        """Examine all processes that hold the peer's socket. Raises NotEstablished unless they all qualify."""
        try:
            table = SocketTable.read(self._proc / "self")
            row = self._peer(connection, table)
            holders = self._holders(row.inode)
            self._examine_all(holders, table, connection, row.inode)
            table = SocketTable.read(self._proc / "self")
            if self._peer(connection, table).inode != row.inode:
                raise NotEstablished("the connection changed during the examination")
            self._examine_all(holders, table, connection, row.inode)
        except OSError as error:
            raise NotEstablished(f"{error.filename}: {error.strerror}") from error

    def examine_process(self, pid: int, uid: int) -> None:
        """Examine a process by its id, as for the peer of a Unix socket. Raises NotEstablished unless it qualifies."""
        if uid not in self._users:
            raise NotEstablished(f"the peer belongs to user {uid}")
        try:
            self._examine(pid, SocketTable.read(self._proc / "self"), 0)
        except OSError as error:
            raise NotEstablished(f"{error.filename}: {error.strerror}") from error

    def _peer(self, connection: EstablishedConnection, table: SocketTable) -> SocketRow:
        """Return the peer's socket if both ends are connected and the user who created the peer's qualifies."""
        local = table.between(connection.local, connection.remote)
        remote = table.between(connection.remote, connection.local)
        if local is None or remote is None or not local.state == remote.state == ESTABLISHED:
            raise NotEstablished("the peer's socket is not on this machine, or the connection has ended")
        if connection.inode not in (None, local.inode):
            raise NotEstablished("the connection has ended, and another one uses its ports")
        if remote.uid not in self._users:
            raise NotEstablished(f"the peer's socket belongs to user {remote.uid}")
        return remote

    def _holders(self, inode: int) -> list[int]:
        """Return every visible process that holds the socket."""
        extension = f"socket:[{inode}]"
        found = [pid for pid in self._processes() if any(extension == target for _, target in self._descriptors(pid))]
        if not found:
            raise NotEstablished("no visible process holds the peer's socket")
        return found

    def _processes(self) -> Iterator[int]:
        return (int(name) for name in os.listdir(self._proc) if name.isdecimal())  # noqa: PTH208 - names alone

    def _descriptors(self, pid: int, *, must_exist: bool = False) -> Iterator[tuple[str, str]]:
        """Yield the path of each descriptor and the target of its link."""
        folder = f"{self._proc}/{pid}/fd"
        try:
            names = os.listdir(folder)  # noqa: PTH208 - as above
        except OSError:
            if must_exist:
                raise
            return
        for name in names:
            path = f"{folder}/{name}"
            try:
                yield path, os.readlink(path)  # noqa: PTH115 - the text of the link, and fast
            except FileNotFoundError:  # closed meanwhile
                continue
            except OSError:
                if must_exist:
                    raise

    def _examine_all(
        self, holders: list[int], table: SocketTable, connection: EstablishedConnection, inode: int
    ) -> None:
        for pid in holders:
            self._examine(pid, table, connection.local.port, holds=inode)

    def _examine(self, pid: int, table: SocketTable, port: int, *, holds: int | None = None) -> None:
        """Raise NotEstablished unless the process and its parent qualify, and it still holds the socket `holds`."""
        self._check_user(pid)
        sockets = self._sockets(pid)
        if holds is not None and holds not in sockets:
            raise NotEstablished(f"process {pid} has closed the connection")
        self._check_sockets(pid, sockets, table, port)
        parent = self._parent(pid)
        if parent:  # 0: the parent is outside this PID namespace, as with `docker exec`
            self._check_sockets(parent, self._sockets(parent), table, port, is_parent=True)

    def _check_user(self, pid: int) -> None:
        status = (self._proc / str(pid) / "status").read_text(errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("Uid:"))
        real, effective = (int(word) for word in line.split()[1:3])
        if not {real, effective} <= set(self._users):
            raise NotEstablished(f"process {pid} runs as user {effective}")

    def _parent(self, pid: int) -> int:
        return int((self._proc / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])

    def _sockets(self, pid: int) -> dict[int, str]:
        """Return the protocol of each socket of the process by inode; "" if it was closed meanwhile."""
        found = {}
        for path, target in self._descriptors(pid, must_exist=True):
            if target.startswith("socket:["):
                try:
                    protocol = os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode("ascii", "replace")
                except FileNotFoundError:
                    protocol = ""
                found[int(target[8:-1])] = protocol
        return found

    def _check_sockets(
        self, pid: int, sockets: dict[int, str], table: SocketTable, port: int, *, is_parent: bool = False
    ) -> None:
        """Raise NotEstablished if the process can accept connections or has accepted one."""
        tables = [table]
        if os.readlink(self._proc / str(pid) / "ns/net") != os.readlink(self._proc / "self/ns/net"):  # noqa: PTH115
            tables.append(SocketTable.read(self._proc / str(pid)))
        name = f"process {pid}{', the parent,' if is_parent else ''}"
        for inode, protocol in sockets.items():
            if not protocol or protocol.startswith(_HARMLESS):
                continue
            if protocol in ("TCP", "TCPv6"):
                self._check_tcp_socket(name, inode, tables, port)
            elif not protocol.startswith(_UNIX):
                raise NotEstablished(f"{name} holds a socket of {protocol}")
            elif pid != _INIT:
                self._check_unix_socket(name, inode, tables)

    def _check_tcp_socket(self, name: str, inode: int, tables: list[SocketTable], port: int) -> None:
        found = [(one, row) for one in tables if (row := one.socket(inode)) is not None]
        if not found:
            raise NotEstablished(f"{name} holds a TCP socket in an unknown state")
        for one, row in found:
            if row.state == LISTEN:
                raise NotEstablished(f"{name} holds a TCP listener")
            if self._is_accepted(row, one, port):
                raise NotEstablished(f"{name} holds a connection that it has accepted")

    def _check_unix_socket(self, name: str, inode: int, tables: list[SocketTable]) -> None:
        found = [(one, row) for one in tables if (row := one.unix_socket(inode)) is not None]
        if not found:
            raise NotEstablished(f"{name} holds a Unix socket in an unknown state")
        for one, row in found:
            if row.is_listening:
                raise NotEstablished(f"{name} listens on a Unix socket")
            if one.is_accepted_unix(row):
                raise NotEstablished(f"{name} holds a connection that it has accepted on a Unix socket")

    def _is_accepted(self, row: SocketRow, table: SocketTable, port: int) -> bool:
        """Return whether the connection may have been accepted.

        It was not if it leads to the gateway, or from a dynamic port without a listener to a server port.
        """
        if row.remote.port == port and row.remote.address == row.local.address:
            return False
        low, high = map(int, (self._proc / PORT_RANGE).read_text().split())
        is_dialled = low <= row.local.port <= high and not low <= row.remote.port <= high
        return not is_dialled or table.is_listening(row.local.port)
