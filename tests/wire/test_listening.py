"""The listening sockets of the workers: one port for all, not shared with other programs, and removable on request."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import uvloop

from api_gateway.config import GatewayConfig
from api_gateway.errors import StartupError
from api_gateway.process import listeners
from api_gateway.process.listeners import (
    ACCEPTED_PER_TURN,
    Listeners,
    WorkerSockets,
    bind_for,
    bind_path,
    leave_group,
    watched,
)
from api_gateway.process.server import GatewayServer
from tests.kit import free_port

linux = pytest.mark.skipif(not listeners.IS_BALANCED, reason="the kernel does not balance there")


@contextmanager
def bound(workers: int, host: str = "127.0.0.1", port: int = 0) -> Iterator[list[list[socket.socket]]]:
    sets = bind_for(workers, host, port)
    try:
        yield sets
    finally:
        for sock in (sock for one in sets for sock in one):
            sock.close()


def accepted(sock: socket.socket) -> int:
    """Accept what waits; return how many."""
    sock.settimeout(0.05)
    count = 0
    with suppress(TimeoutError):
        while True:
            sock.accept()[0].close()
            count += 1
    return count


def connect(port: int, times: int) -> None:
    for _ in range(times):
        socket.create_connection(("127.0.0.1", port), 1).close()


@pytest.mark.parametrize("is_balanced", [pytest.param(True, marks=linux), False])
def test_any_free_port_is_the_same_for_all(monkeypatch: pytest.MonkeyPatch, *, is_balanced: bool) -> None:
    monkeypatch.setattr(listeners, "IS_BALANCED", is_balanced)
    with bound(3) as sets:
        (port,) = {sock.getsockname()[1] for one in sets for sock in one}
        assert port
        for one in sets:
            one[0].listen()
        connect(port, 30)
        counts = [accepted(one[0]) for one in sets]
        assert sum(counts) == 30
        assert not is_balanced or sum(count > 0 for count in counts) > 1


@linux
def test_a_port_that_another_would_share_is_refused() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            bind_for(2, "127.0.0.1", other.getsockname()[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_two_names_of_one_address_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int) -> None:
    """With several workers, the kernel would divide connections between both listeners."""
    resolve = socket.getaddrinfo

    def resolved(host: Any, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "other.test" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    port = free_port()
    sections = {"server": {"port": port}, "admin": {"listen": f"other.test:{port}"}, "state_dir": tmp_path}
    with pytest.raises(StartupError, match=r"admin\.listen: cannot listen on other\.test:\d+: another listener"):
        Listeners.of(GatewayConfig.model_validate(sections), workers)


@pytest.mark.parametrize("listener", ["server", "admin.listen"])
def test_a_program_that_listens_after_the_sockets_were_bound_makes_the_start_fail(
    tmp_path: Path, listener: str
) -> None:
    """Such as a second gateway that is started at the same moment. uvloop does not report it."""
    with bound(1) as ((ours,),), bound(1) as ((other,),), socket.socket() as theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        theirs.bind(ours.getsockname())
        theirs.listen()
        sections = {"server": {"port": 0}, "admin": {"listen": "127.0.0.1:0"}, "state_dir": tmp_path}
        public, admin = ([ours], [other]) if listener == "server" else ([other], [ours])
        with pytest.raises(StartupError, match="cannot listen: address already in use"):
            GatewayServer(GatewayConfig.model_validate(sections)).run_on(WorkerSockets(public, admin))


def test_a_host_that_is_not_ours_is_refused() -> None:
    with pytest.raises(OSError, match="assign"):
        bind_for(2, "192.0.2.1", 0)


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(OSError, match=r"."):
        bind_for(2, "no.such.host.invalid", 0)


@linux
def test_a_socket_that_left_the_group_gets_no_connection_until_it_listens_again() -> None:
    with bound(2) as ((one,), (other,)):
        leave_group(WorkerSockets([one]))  # it has not listened yet, which does no harm
        port = one.getsockname()[1]
        one.listen()
        other.listen()
        leave_group(WorkerSockets([one]))
        connect(port, 20)
        assert accepted(other) == 20
        one.listen()
        connect(port, 40)
        assert accepted(one) > 0


def test_every_address_of_a_name_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, 1, 6, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2", "192.0.2.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with bound(2, "several") as sets:
        names = [[sock.getsockname() for sock in one] for one in sets]
        assert names[0] == names[1]
        assert [host for host, _ in names[0]] == ["127.0.0.1", "127.0.0.2"], "what this machine lacks is left out"
        assert len({port for _, port in names[0]}) == 1


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_address_of_everything_takes_both_kinds(workers: int) -> None:
    with bound(workers, "::") as sets:
        port = sets[0][0].getsockname()[1]
        for one in sets:
            one[0].listen()
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), 1).close()
        assert sum(accepted(one[0]) for one in sets) == 2
        with pytest.raises(OSError, match="in use"):
            bind_for(1, "0.0.0.0", port)


def test_a_single_process_does_not_share_its_port() -> None:
    with bound(1) as ((one,),), socket.socket() as other:
        one.listen()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(one.getsockname())


# Unix sockets


@contextmanager
def bound_path(workers: int, path: Path, mode: int = 0o660) -> Iterator[list[socket.socket]]:
    sockets = [sock for (sock,) in bind_path(workers, str(path), mode)]
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def connect_to(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_all_workers_accept_from_one_unix_socket_of_the_given_permissions(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    old = os.umask(0)
    try:
        with bound_path(3, path, 0o640) as sockets:
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
            for sock in sockets:
                sock.listen()
            connect_to(path)
            assert accepted(sockets[2]) == 1
            leave_group(WorkerSockets(sockets[:1]))
            connect_to(path)
            assert accepted(sockets[1]) == 1, "one worker that leaves takes nothing from the others"
    finally:
        os.umask(old)


def test_a_unix_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    with bound_path(1, path) as (left,):
        left.listen()
    assert path.is_socket()
    with bound_path(1, path) as (sock,):
        sock.listen()
        connect_to(path)


def test_a_unix_socket_that_another_process_serves_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    with bound_path(1, path) as (served,):
        served.listen()
        with pytest.raises(OSError, match="in use"):
            bind_path(1, str(path), 0o600)
        connect_to(path)


def test_what_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError, match="in use") as caught:
        bind_path(1, str(path), 0o600)
    assert caught.value.errno == errno.EADDRINUSE
    assert path.read_text() == "data"


def test_several_connections_are_accepted_in_one_turn_of_the_loop() -> None:
    """And none once the server has closed its sockets, duplicates among them."""
    count = 3 * ACCEPTED_PER_TURN

    async def accepted_by_turn(sockets: list[socket.socket]) -> list[int]:
        made: list[asyncio.Protocol] = []

        def connection() -> asyncio.Protocol:
            made.append(asyncio.Protocol())
            return made[-1]

        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(connection, sock=sock, backlog=count) for sock in sockets]
        counts = [0]
        while counts[-1] < count:
            await asyncio.sleep(0)
            counts.append(len(made))
        for server in servers:
            server.close()
            await server.wait_closed()
        return [after - before for before, after in pairwise(counts)]

    with (
        bound(1) as ((sock,),),
        watched([sock]) as sockets,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        assert len({one.fileno() for one in sockets}) == len(sockets) == ACCEPTED_PER_TURN
        port = sock.getsockname()[1]
        sock.listen(count)
        connect(port, count)
        assert max(runner.run(accepted_by_turn(sockets))) == ACCEPTED_PER_TURN
        sock.close()
        with pytest.raises(ConnectionRefusedError):
            connect(port, 1)


def test_a_worker_that_starts_does_not_make_a_shared_socket_blocking_for_the_others() -> None:
    """Otherwise `accept` on an empty queue blocks the event loop of a worker that already serves."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        passed.setblocking(False)  # as the service manager and the workers that serve have set it
        with socket.socket(fileno=os.dup(passed.fileno())) as inherited, watched([inherited]):
            assert not os.get_blocking(passed.fileno())
