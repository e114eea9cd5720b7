"""The table of TCP sockets: the kernel's notation of addresses, on real sockets and on text from other machines."""

import os
import socket
from pathlib import Path

import pytest

from api_gateway.system.socket_table import ESTABLISHED, LISTEN, Endpoint, SocketRow, SocketTable
from tests.cases import each

pytestmark = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux lists them in /proc")
HEADING = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def line(local: bytes, remote: bytes, state: bytes = b"01", uid: int = 0, inode: int = 7) -> bytes:
    return (
        b"   0: %b %b %b 00000000:00000000 00:00000000 00000000 %5d        0 %d 1 00000000ad7878c1 100 0 0 10 0\n"
        % (local, remote, state, uid, inode)
    )


@each(
    ("listening", "dialled"),
    [
        ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.1")),
        ((socket.AF_INET6, "::1"), (socket.AF_INET6, "::1")),
        ((socket.AF_INET6, "::"), (socket.AF_INET, "127.0.0.1")),
        ((socket.AF_INET6, "::"), (socket.AF_INET6, "::ffff:127.0.0.1")),
        ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1")),
    ],
)
def test_both_ends_of_a_connection_are_found(
    listening: tuple[socket.AddressFamily, str], dialled: tuple[socket.AddressFamily, str]
) -> None:
    """Whichever kinds of sockets the two ends are."""
    family, host = listening
    dual = family == socket.AF_INET6 and host == "::"
    with (
        socket.create_server((host, 0), family=family, dualstack_ipv6=dual) as listener,
        socket.socket(dialled[0]) as client,
    ):
        client.connect((dialled[1], listener.getsockname()[1]))
        accepted, peer = listener.accept()
        with accepted:
            ours, theirs = Endpoint.of(*accepted.getsockname()[:2]), Endpoint.of(*peer[:2])
            table = SocketTable.read(Path("/proc/self"))
            for sock, local, remote in ((accepted, ours, theirs), (client, theirs, ours)):
                inode = os.fstat(sock.fileno()).st_ino
                expected = SocketRow(local, remote, ESTABLISHED, os.geteuid(), inode)
                assert table.between(local, remote) == expected
                assert table.socket(inode) == expected
            found = table.socket(os.fstat(listener.fileno()).st_ino)
            assert found is not None
            assert found.state == LISTEN
            assert table.is_listening(listener.getsockname()[1])
            assert not table.is_listening(client.getsockname()[1])


def test_a_port_or_an_inode_is_not_mistaken_for_another_number() -> None:
    text = (
        HEADING
        + line(b"0100007F:1F90", b"0100007F:9C40", inode=80)
        + line(b"0100007F:0050", b"0100007F:0000", b"0A", 8000)
    )
    table = SocketTable(text)
    assert table.socket(8000) is None
    assert table.socket(0) is None
    found = table.socket(80)
    assert found is not None
    assert found.local == Endpoint.of("127.0.0.1", 8080)
    assert table.is_listening(80)
    assert not table.is_listening(0x1F90)
    assert table.between(Endpoint.of("127.0.0.1", 8080), Endpoint.of("127.0.0.1", 40_001)) is None


def test_a_table_may_end_anywhere() -> None:
    text = HEADING + line(b"0100007F:1F90", b"0100007F:9C40")
    for end in range(len(text) + 1):
        SocketTable(text[:end]).between(Endpoint.of("127.0.0.1", 8080), Endpoint.of("127.0.0.1", 40_000))
        SocketTable(text[:end]).socket(7)


def test_what_is_no_address_is_an_error() -> None:
    with pytest.raises(ValueError, match="unix"):
        Endpoint.of("unix", 0)


@pytest.mark.parametrize("is_abstract", [True, False])
def test_listening_and_accepted_unix_sockets_are_distinguished_from_a_clients(
    tmp_path: Path, *, is_abstract: bool
) -> None:
    """Also from one that has bound a name of its own, as clients of D-Bus do."""
    name = f"\0{tmp_path}/a name" if is_abstract else str(tmp_path / "a name")
    one, other = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client, one, other:
        listener.bind(name)
        listener.listen()
        client.bind(f"\0{tmp_path}/own")
        client.connect(name)
        accepted, _ = listener.accept()
        with accepted:
            table = SocketTable.read(Path("/proc/self"))
            rows = [table.unix_socket(os.fstat(sock.fileno()).st_ino) for sock in (listener, accepted, client, one)]
    assert [row is not None and row.is_listening for row in rows] == [True, False, False, False]
    assert [row is not None and table.is_accepted_unix(row) for row in rows] == [False, True, False, False]


def test_a_unix_socket_that_is_not_there_is_not_found() -> None:
    assert SocketTable.read(Path("/proc/self")).unix_socket(2**40) is None
