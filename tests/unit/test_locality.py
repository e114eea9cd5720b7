"""The look-up of local programs: once for each connection, one at a time, limited. Its rules: test_local_operator."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from api_gateway.admin import local_operator
from api_gateway.admin.local_operator import LocalProcesses
from api_gateway.http1.asgi import ADMIN, SERVER_EXTENSION, UNIX_PEER
from api_gateway.system.peer_process import EstablishedConnection, NotEstablished, PeerProcesses
from api_gateway.system.socket_table import Endpoint
from tests.kit import FakeClock, soon

HEADERS = [(b"host", b"localhost:8000")]


class Peers(PeerProcesses):
    """Answers by itself, and counts what it is asked."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(os.geteuid())
        self.reason = reason
        self.asked = 0
        self.at_once = 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._running = 0

    def examine(self, connection: EstablishedConnection) -> None:
        self.asked += 1
        self._running += 1
        self.at_once = max(self.at_once, self._running)
        self.may_answer.wait(10)
        self._running -= 1
        if self.reason is not None:
            raise NotEstablished(self.reason)


class Transport:
    """A connection's transport, with a real socket."""

    def __init__(self) -> None:
        self._sock, self._other = socket.socketpair()
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._sock if name == "socket" else default

    def __del__(self) -> None:
        self._sock.close()
        self._other.close()


class Link:
    def __init__(self) -> None:
        self.connection = type("Connection", (), {})()
        self.connection.transport = Transport()


def scope(link: Link | None = None, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "client": ("127.0.0.1", 40_000),
        "server": ("127.0.0.1", 8000),
        "headers": HEADERS,
    }
    return made | ({SERVER_EXTENSION: link} if link is not None else {}) | changes


@pytest.mark.parametrize("reason", [None, "it listens"])
async def test_a_look_up_is_made_once_for_a_connection(reason: str | None) -> None:
    peers = Peers(reason)
    locality = LocalProcesses(peers)
    connection = Link()
    for _ in range(3):
        assert await locality.is_local(scope(connection)) is (reason is None)
    assert peers.asked == 1
    peers.reason = None if reason else "it listens"
    assert await locality.is_local(scope(Link())) is (reason is not None), "the same addresses, another connection"
    assert await locality.is_local(scope(connection)) is (reason is None)


async def test_without_a_connection_the_result_of_a_look_up_is_not_kept() -> None:
    peers = Peers()
    locality = LocalProcesses(peers)
    assert await locality.is_local(scope())
    peers.reason = "it listens"
    assert not await locality.is_local(scope())


@pytest.mark.parametrize(
    "changes",
    [
        {"client": None},
        {"client": UNIX_PEER},
        {"client": ("192.0.2.1", 1)},
        {"server": None},
        {"server": ("192.0.2.2", 8000)},
        {"server": ("/run/gateway.sock", None), "client": UNIX_PEER},
        {"headers": []},
        {"headers": [(b"host", b"gateway.example")]},
        {"headers": [*HEADERS, (b"x-forwarded-for", b"127.0.0.1")]},
        {"headers": [*HEADERS, (b"via", b"1.1 x")]},
    ],
)
async def test_what_cannot_be_local_is_not_looked_up(changes: dict[str, Any]) -> None:
    peers = Peers()
    assert not await LocalProcesses(peers).is_local(scope(Link(), **changes))
    assert not peers.asked


async def test_a_connection_that_is_over_is_not_local() -> None:
    link = Link()
    link.connection.transport.closing = True
    peers = Peers()
    assert not await LocalProcesses(peers).is_local(scope(link))
    assert not peers.asked


async def test_look_ups_run_one_at_a_time_and_beyond_a_number_requests_are_not_local() -> None:
    """They are not told for good: the same connection may ask again."""
    peers = Peers()
    locality = LocalProcesses(peers)
    peers.may_answer.clear()
    links = [Link() for _ in range(local_operator.MAX_WAITING + 1)]
    asked = [asyncio.create_task(locality.is_local(scope(link))) for link in links]
    await soon(lambda: peers.asked == 1, "the first is looked up")
    surplus = Link()
    assert not await locality.is_local(scope(surplus))
    peers.may_answer.set()
    assert all(await asyncio.gather(*asked))
    assert peers.at_once == 1
    assert await locality.is_local(scope(surplus))


async def test_a_request_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_operator, "MAX_WAIT", 0.01)
    peers = Peers()
    locality = LocalProcesses(peers)
    peers.may_answer.clear()
    first = asyncio.create_task(locality.is_local(scope(Link())))
    await soon(lambda: peers.asked == 1, "the first is looked up")
    assert not await locality.is_local(scope(Link()))
    peers.may_answer.set()
    assert await first


async def test_look_ups_take_a_share_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = FakeClock(), []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock.advance(seconds)

    def timed(examine: Callable[[], None]) -> tuple[None, float]:
        examine()
        return None, 0.4

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(local_operator, "_timed", timed)
    locality = LocalProcesses(Peers(), clock=clock)
    for _ in range(20):
        assert await locality.is_local(scope(Link()))
    assert local_operator.CPU_BURST + 0.4 + clock.now * local_operator.CPU_SHARE >= 20 * 0.4
    assert sum(waited) == pytest.approx((20 * 0.4 - local_operator.CPU_BURST - 0.4) / local_operator.CPU_SHARE)


async def test_the_reason_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    locality = LocalProcesses(Peers("process 4 holds a TCP listener"), clock=clock)
    with caplog.at_level("INFO"):
        for _ in range(5):
            await locality.is_local(scope(Link()))
        assert caplog.text.count("process 4 holds a TCP listener") == 1
        clock.advance(61)
        await locality.is_local(scope(Link()))
    assert caplog.text.count("process 4 holds a TCP listener") == 2


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux only")
async def test_the_peer_of_a_unix_socket_for_operators_is_known_by_its_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []
    peers = Peers()
    monkeypatch.setattr(peers, "examine_process", lambda pid, uid: asked.append((pid, uid)))
    unix = {"client": UNIX_PEER, "server": ("/run/admin.sock", None), ADMIN: True}
    assert await LocalProcesses(peers).is_local(scope(Link(), **unix))
    assert asked == [(os.getpid(), os.geteuid())]


# The look-up itself, on this process


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux only")
def test_ports_that_another_connection_has_by_now_are_noticed() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        accepted, peer = listener.accept()
        with accepted:
            ours, theirs = Endpoint.of(*accepted.getsockname()), Endpoint.of(*peer)
            peers = PeerProcesses(os.geteuid())
            with pytest.raises(NotEstablished, match="another one uses its ports"):
                peers.examine(EstablishedConnection(ours, theirs, os.fstat(client.fileno()).st_ino))
            # The second: a socket of the tests that is bound and does not listen, whichever is looked at first.
            with pytest.raises(NotEstablished, match=r"TCP listener|TCP socket in an unknown state"):
                peers.examine(EstablishedConnection(ours, theirs, os.fstat(accepted.fileno()).st_ino))
            client.close()
            with pytest.raises(NotEstablished, match="has ended"):
                peers.examine(EstablishedConnection(ours, theirs))


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux only")
def test_without_the_files_of_proc_nothing_is_available(tmp_path: Path) -> None:
    assert PeerProcesses(0).is_available
    assert not PeerProcesses(0, tmp_path).is_available
    with pytest.raises(NotEstablished):
        PeerProcesses(0, tmp_path).examine(
            EstablishedConnection(Endpoint.of("127.0.0.1", 1), Endpoint.of("127.0.0.1", 2))
        )
