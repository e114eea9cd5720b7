"""The TLS connection in memory: bytes arrive whole however they are divided, and every end is the right one."""

import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.listener_state import ListenerState
from api_gateway.downstream.slots import ConnectionSlots
from api_gateway.downstream.tls_connection import TlsConnection, TlsPhase
from api_gateway.downstream.tls_terminator import PreparedTls, TlsTerminator
from api_gateway.settings.tls import ServerTlsSection
from tests.kit import LIMITS
from tests.tls_kit import HOST, Authority


class FakeLoop:
    """An event loop that runs what is scheduled when it is told to."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        self.timers.append((delay, callback))
        return self

    def cancel(self) -> None:
        self.timers.clear()

    def run(self) -> None:
        while self.soon:
            self.soon.pop(0)()


class FakeTransport:
    """A TCP transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.events: list[str] = []
        self.is_reading = True

    def write(self, data: bytes) -> None:
        assert "close" not in self.events
        self.written += data

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.events.append(name)

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def is_closing(self) -> bool:
        return "close" in self.events or "abort" in self.events

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 4711) if name == "peername" else default


class FakeInner:
    """The connection behind TLS, which records what it gets."""

    client: tuple[str, int] | None = None

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.received = bytearray()
        self.events: list[str] = []
        self.keeps = False
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.events.append("made")

    def data_received(self, data: bytes) -> None:
        assert self.transport.is_reading()
        self.received += data

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.keeps

    def connection_lost(self, _error: Exception | None) -> None:
        self.events.append("lost")

    def __getattr__(self, name: str) -> Any:
        return lambda: self.events.append(name)


class Pair:
    """A client, and the gateway's side of its connection."""

    def __init__(self, terminator: TlsTerminator, context: ssl.SSLContext, limits: ConnectionLimits = LIMITS) -> None:
        self.loop: Any = FakeLoop()
        self.inner, self.tcp = FakeInner(self.loop), FakeTransport()
        self.slots = ConnectionSlots()
        self.state = ServerState()
        listener = ListenerState(limits, Counter(), self.slots)
        self.tls = TlsConnection(self.inner, listener, terminator, self.state)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self.incoming, self.outgoing, server_hostname=HOST)
        self.tls.connection_made(self.tcp)  # type: ignore[arg-type]

    def sent(self) -> bytes:
        """Return what the client sends now."""
        return self.outgoing.read()

    def deliver(self) -> None:
        """Bring what the gateway has written to the client."""
        self.incoming.write(bytes(self.tcp.written))
        self.tcp.written.clear()

    def shake_hands(self, size: int = 100_000) -> None:
        """Complete the handshake, in pieces of at most `size` bytes."""
        for _ in range(4):
            with suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
            data = self.sent()
            for place in range(0, len(data), size):
                self.tls.data_received(data[place : place + size])
            self.deliver()
        assert self.tls.phase is TlsPhase.OPEN

    def read(self) -> bytes:
        """Return what the client can read."""
        self.deliver()
        found = b""
        try:
            while piece := self.client.read(65_536):
                found += piece
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return found


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def terminator(authority: Authority) -> TlsTerminator:
    section = ServerTlsSection.model_validate({"certificates": [authority.issue("one", HOST).setting]})
    return TlsTerminator(PreparedTls.of(section), lambda: 0.0)


@pytest.fixture
def pair(terminator: TlsTerminator, authority: Authority) -> Iterator[Pair]:
    yield Pair(terminator, authority.context())
    assert terminator.handshakes.in_use == 0


@given(
    st.lists(st.tuples(st.integers(1, 60_000), st.integers(1, 40_000), st.booleans()), max_size=8),
    st.integers(1, 700),
)
def test_bytes_arrive_whole_however_they_are_divided(
    terminator: TlsTerminator, authority: Authority, writes: list[tuple[int, int, bool]], first: int
) -> None:
    pair = Pair(terminator, authority.context())
    pair.shake_hands(first)
    expected = b""
    for number, (size, piece, is_paused) in enumerate(writes):
        content = bytes([number]) * size
        expected += content
        pair.client.write(content)
        data = pair.sent()
        if is_paused:
            pair.tls.pause_reading()
        for place in range(0, len(data), piece):
            pair.tls.data_received(data[place : place + piece])
        if is_paused:
            pair.tls.resume_reading()
            pair.loop.run()
        assert pair.inner.received == expected
        pair.tls.writelines([content, b"end"])
        assert pair.read() == content + b"end"
    assert pair.slots.peers == {}


def test_a_client_that_ends_its_side_is_answered_if_the_connection_says_so(pair: Pair) -> None:
    pair.shake_hands()
    pair.inner.keeps = True
    pair.client.write(b"last")
    with pytest.raises(ssl.SSLWantReadError):
        pair.client.unwrap()
    pair.tls.data_received(pair.sent())
    assert (bytes(pair.inner.received), pair.inner.events) == (b"last", ["made", "eof"])
    assert pair.tls.eof_received()  # the end of TCP follows, and is not another one
    pair.tls.write(b"response")
    pair.tls.close()
    assert pair.read() == b"response"
    assert pair.inner.events == ["made", "eof"]
    pair.tls.connection_lost(None)
    assert pair.inner.events == ["made", "eof", "lost"]


def test_an_end_of_tcp_without_one_of_tls_is_an_end_too(pair: Pair) -> None:
    pair.shake_hands()
    assert not pair.tls.eof_received()
    assert pair.inner.events == ["made", "eof"]
    assert pair.tls.phase is TlsPhase.CLOSED


def test_its_own_side_can_end_alone(pair: Pair) -> None:
    pair.shake_hands()
    pair.tls.write(b"response")
    pair.tls.write_eof()
    pair.tls.write(b"dropped")
    pair.client.write(b"more")
    pair.tls.data_received(pair.sent())
    assert bytes(pair.inner.received) == b"more"
    assert pair.read() == b"response"
    assert pair.tcp.events == ["write_eof"]
    pair.tls.close()
    assert pair.tcp.events == ["write_eof", "close"]


def test_nothing_is_kept_of_what_arrives_behind_the_end(pair: Pair) -> None:
    pair.shake_hands()
    pair.tls.close()
    pair.client.write(b"x" * 50_000)
    pair.tls.data_received(pair.sent())
    assert pair.tls._incoming.pending == 0
    assert bytes(pair.inner.received) == b""


def test_a_loss_in_the_handshake_releases_everything_and_nobody_else_hears_of_it(pair: Pair) -> None:
    assert len(pair.state.connections) == 1
    pair.tls.data_received(b"\x16\x03\x01")
    pair.tls.connection_lost(None)
    assert (pair.state.connections, pair.slots.peers, pair.inner.events) == (set(), {}, [])
    pair.tls.connection_lost(None)


def test_a_handshake_during_the_drain_ends_and_the_connection_behind_it_drains(pair: Pair) -> None:
    pair.tls.shutdown()
    assert pair.loop.timers[-1][0] == LIMITS.drain_linger
    pair.shake_hands()
    assert pair.inner.events == ["made", "shutdown"]


def test_a_timeout_of_the_handshake_aborts(pair: Pair) -> None:
    (delay, expire) = pair.loop.timers[0]
    assert delay == 10
    expire()
    assert pair.tcp.events == ["abort"]
    pair.tls.connection_lost(None)
    assert pair.inner.events == []


def test_writing_pauses_as_the_tcp_transport_says(pair: Pair) -> None:
    pair.shake_hands()
    pair.tls.pause_writing()
    pair.tls.resume_writing()
    assert pair.inner.events == ["made", "pause_writing", "resume_writing"]
