"""The TCP and Unix sockets of a network namespace, from `/proc/<pid>/net` on Linux (proc(5))."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from api_gateway.ip_addresses import parse_address

ESTABLISHED, LISTEN = b"01", b"0A"
_WORD = 4  # bytes: addresses are printed as words of the machine's byte order
NEWLINE = b"\n"
_INODE = 9  # the column, in `tcp` and `tcp6`
_UNIX_FLAGS, _UNIX_STATE, _UNIX_INODE, _UNIX_NAME = 3, 5, 6, 7  # the columns in `unix`
_ACCEPTS, _CONNECTED = 0x10000, b"03"  # __SO_ACCEPTCON of the flags, SS_CONNECTED of the states
_MAPPED = b"0000000000000000" + (b"FFFF0000" if sys.byteorder == "little" else b"0000FFFF")  # ::ffff:0:0/96


class Endpoint(NamedTuple):
    """One end of a connection: an address in the notation of the table, IPv4 if it is IPv4-mapped, and a port."""

    address: bytes
    port: int

    @classmethod
    def of(cls, address: str, port: int) -> "Endpoint":
        """Return the endpoint at an IP address. Raises ValueError for other text."""
        packed = parse_address(address).packed
        words = [packed[start : start + _WORD] for start in range(0, len(packed), _WORD)]
        if sys.byteorder == "little":
            words = [word[::-1] for word in words]
        return cls(b"".join(words).hex().upper().encode(), port)


class SocketRow(NamedTuple):
    """One TCP socket. `uid` is the user who created it; `inode` is its number in `/proc/<pid>/fd`."""

    local: Endpoint
    remote: Endpoint
    state: bytes
    uid: int
    inode: int


class UnixRow(NamedTuple):
    """One Unix socket. `name` is its path, or `@` and its abstract name; empty if it is not bound."""

    is_listening: bool
    is_connected: bool
    name: bytes


class SocketTable:
    """A snapshot, kept as text: few of possibly many thousand rows are needed, and searching bytes is fast."""

    def __init__(self, tcp: bytes, tcp6: bytes = b"", unix: bytes = b"") -> None:
        self._tcp = tcp
        self._tcp6 = tcp6
        self._unix = unix

    def __repr__(self) -> str:
        return f"<SocketTable [{self._tcp.count(NEWLINE) + self._tcp6.count(NEWLINE)} lines]>"

    @classmethod
    def read(cls, process: Path) -> "SocketTable":
        """Read the sockets of the network namespace of a process (`/proc/<pid>`). Raises OSError."""
        six = process / "net/tcp6"  # absent on a machine without IPv6
        return cls(
            (process / "net/tcp").read_bytes(),
            six.read_bytes() if six.exists() else b"",
            (process / "net/unix").read_bytes(),
        )

    def between(self, local: Endpoint, remote: Endpoint) -> SocketRow | None:
        """Return the TCP socket with these two endpoints, or None."""
        plain = b" %b %b " % (_spelled(local), _spelled(remote))
        mapped = b" %b%b %b%b " % (_MAPPED, _spelled(local), _MAPPED, _spelled(remote))
        rows = (*_rows_with(self._tcp, plain), *_rows_with(self._tcp6, plain), *_rows_with(self._tcp6, mapped))
        return next((row for row in rows if (row.local, row.remote) == (local, remote)), None)

    def socket(self, inode: int) -> SocketRow | None:
        """Return the TCP socket with this inode; None if it is neither bound nor connected, or not a TCP socket."""
        rows = (row for text in (self._tcp, self._tcp6) for row in _rows_with(text, b" %d " % inode))
        return next((row for row in rows if row.inode == inode), None)

    def is_listening(self, port: int) -> bool:
        """Return whether any socket listens on this port, at any address."""
        return self.listener(port) is not None

    def listener(self, port: int) -> SocketRow | None:
        """Return a socket that listens on this port, at any address, or None."""
        cursor = b":%04X " % port
        rows = (row for text in (self._tcp, self._tcp6) for row in _rows_with(text, cursor))
        return next((row for row in rows if row.state == LISTEN and row.local.port == port), None)

    def unix_socket(self, inode: int) -> UnixRow | None:
        """Return the Unix socket with this inode, or None."""
        spelled = b"%d" % inode
        for line in _lines_with(self._unix, b" %b" % spelled):
            fields = line.split(maxsplit=_UNIX_NAME)
            if len(fields) > _UNIX_INODE and fields[_UNIX_INODE] == spelled:
                return _unix_row(fields)
        return None

    def is_accepted_unix(self, row: UnixRow) -> bool:
        """Return whether a listener has accepted this Unix socket: an accepted socket has the name of its listener.

        A client may bind an abstract name before it connects, as D-Bus clients do; no client binds a path.
        """
        if not row.is_connected or not row.name:
            return False
        return not row.name.startswith(b"@") or self._has_unix_listener(row.name)

    def _has_unix_listener(self, name: bytes) -> bool:
        lines = (line.split(maxsplit=_UNIX_NAME) for line in _lines_with(self._unix, b" " + name))
        rows = (_unix_row(fields) for fields in lines if len(fields) > _UNIX_INODE)
        return any(row.is_listening and row.name == name for row in rows)


def _rows_with(text: bytes, cursor: bytes) -> Iterator[SocketRow]:
    """Yield the rows whose line contains `cursor`."""
    return (row for line in _lines_with(text, cursor) if (row := _row(line)) is not None)


def _lines_with(text: bytes, cursor: bytes) -> Iterator[bytes]:
    at = text.find(cursor)
    while at >= 0:
        start, end = text.rfind(NEWLINE, 0, at) + 1, text.find(NEWLINE, at)
        yield text[start : end if end >= 0 else len(text)]
        at = text.find(cursor, max(end, at + 1)) if end >= 0 else -1


def _unix_row(fields: list[bytes]) -> UnixRow:
    name = fields[_UNIX_NAME] if len(fields) > _UNIX_NAME else b""
    return UnixRow(bool(int(fields[_UNIX_FLAGS], 16) & _ACCEPTS), fields[_UNIX_STATE] == _CONNECTED, name)


def _row(line: bytes) -> SocketRow | None:
    """Parse a line; return None for the heading."""
    fields = line.split()
    if len(fields) <= _INODE or not fields[_INODE].isdigit():
        return None
    return SocketRow(_endpoint(fields[1]), _endpoint(fields[2]), fields[3], int(fields[7]), int(fields[_INODE]))


def _endpoint(spelled: bytes) -> Endpoint:
    address, _, port = spelled.rpartition(b":")
    return Endpoint(address.removeprefix(_MAPPED), int(port, 16))


def _spelled(end: Endpoint) -> bytes:
    return b"%b:%04X" % end
