"""Loops over input end, whatever the peer sends and however its connection ends at the same moment."""

import asyncio
import errno
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from api_gateway.downstream.connection import DownstreamConnection
from api_gateway.downstream.connection_factory import ConnectionFactory
from api_gateway.errors import causes
from api_gateway.transport.lifetime import ConnectionLifetime
from api_gateway.transport.local_resources import exhaustion_behind
from api_gateway.transport.pool import Pool
from tests.kit import LIMITS, RawClient, RawUpstream, RunningGateway, in_front_of, reply, running_gateway

HANDSHAKE = (
    b"GET /api/chat HTTP/1.1\r\nHost: gateway.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
BAD_ID = b"X-Client-ID: a b\r\n"
PEER, OWN = ("192.0.2.1", 4711), ("192.0.2.2", 80)
TRIES = 800
WITHIN = 20.0  # seconds for all tries


class ClosingTransport(asyncio.Transport):
    """A transport whose connection has ended, of which its protocol has not been told yet."""

    def __init__(self, *, is_closing: bool) -> None:
        sock = SimpleNamespace(family=socket.AF_INET, getpeername=lambda: PEER, getsockname=lambda: OWN)
        super().__init__({"peername": PEER, "sockname": OWN, "socket": sock})
        self.sent = b""
        self._is_closing = is_closing

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    def abort(self) -> None:
        self._is_closing = True

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


async def _refuse_all(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def connected(transport: asyncio.Transport, app: Any = _refuse_all) -> DownstreamConnection:
    """Return a protocol on that transport, whose application refuses everything at once, or is `app`."""
    config = uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False)
    config.load()
    factory = ConnectionFactory(LIMITS, Counter())
    protocol = factory.connection(
        config=config, server_state=ServerState(), app_state={}, _loop=asyncio.get_running_loop()
    )
    protocol.connection_made(transport)
    return protocol


async def ended(protocol: DownstreamConnection) -> None:
    """End the connection, and wait for the task that served it."""
    protocol.connection_lost(None)
    await asyncio.gather(*protocol.tasks)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "data",
    [b"junk\r\n\r\n", b"GET /api/x HTTP/1.1\r\nHost: a\r\nHost\r\n\r\n", b"\x00" * 100_000, b"GET " + b"x" * 100_000],
    ids=["no HTTP", "a header line without a value", "nulls", "an endless target"],
)
async def test_what_cannot_be_parsed_is_given_up_on_while_the_transport_closes(data: bytes) -> None:
    protocol = connected(ClosingTransport(is_closing=True))
    protocol.data_received(data)
    assert protocol.state.is_ending
    protocol.data_received(data)  # what comes still is not parsed
    await ended(protocol)


@pytest.mark.timeout(10)
async def test_junk_behind_a_refused_handshake_is_given_up_on_when_the_client_has_ended() -> None:
    transport = ClosingTransport(is_closing=False)
    protocol = connected(transport)
    protocol.data_received(HANDSHAKE + b"\r\n" + b"junk\r\n\r\n")
    if not protocol.eof_received():
        transport.close()
    for _ in range(10):
        await asyncio.sleep(0)
    assert protocol.state.is_ending
    await ended(protocol)


@pytest.mark.timeout(10)
async def test_input_after_a_handshake_is_not_parsed_before_its_response() -> None:
    """Refusals before it that are all sent in one step must not release it once for each."""
    transport = ClosingTransport(is_closing=False)
    protocol = connected(transport)
    protocol.data_received(
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2000 + b"\r\n\r\n") * 24 + HANDSHAKE + b"\r\n" + b"\x81\x85junk"
    )
    for _ in range(50):
        await asyncio.sleep(0)
    assert transport.sent.count(b"HTTP/1.1 404") == 25  # its own refusal included
    assert protocol.state.is_ending  # of what is no HTTP
    await ended(protocol)


async def test_a_client_that_has_left_is_not_asked_for_its_body() -> None:
    """A transport that is closed raises when it is written to."""
    has_left = asyncio.Event()
    received: list[dict[str, Any]] = []

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await has_left.wait()
        received.append(await receive())

    transport = ClosingTransport(is_closing=False)
    protocol = connected(transport, app)
    protocol.data_received(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    await asyncio.sleep(0)
    protocol.connection_lost(ConnectionResetError())
    has_left.set()
    await asyncio.gather(*protocol.tasks)
    assert received == [{"type": "http.disconnect"}]
    assert transport.sent == b""


class FakeConnection:
    """A pooled connection that does not tell its pool when it is closed."""

    is_closed = is_reused = False
    idle_since = 0.0
    lifetime: ConnectionLifetime | None = None
    principal: str | None = None

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()

    def close(self) -> None:
        self.is_closed = True


async def _connect(_seconds: float | None) -> FakeConnection:
    return FakeConnection()


@pytest.mark.timeout(10)
async def test_a_pool_gives_up_an_idle_connection_once_whatever_that_does() -> None:
    pool = Pool(_connect, limit=1, idle_timeout=60)
    pool.release(await pool.acquire(None, None))
    with pytest.raises(httpx.PoolTimeout):
        await pool.acquire(None, 0.05, is_fresh=True)
    pool.close()


@pytest.mark.timeout(10)
async def test_a_request_for_an_unused_connection_gets_no_used_one() -> None:
    pool = Pool(_connect, limit=1, idle_timeout=60)
    used = await pool.acquire(None, None)
    waiting = asyncio.create_task(pool.acquire(None, 5.0, is_fresh=True))
    await asyncio.sleep(0)
    pool.release(used)
    taken = await waiting
    assert taken is not used
    assert used.is_closed
    pool.release(taken)
    assert await pool.acquire(None, 1.0) is taken  # the one slot there is came back
    pool.close()


@pytest.mark.timeout(10)
def test_a_circular_chain_of_errors_has_an_end() -> None:
    first, second = OSError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]
    assert exhaustion_behind(first) is None


@pytest.mark.timeout(10)
def test_a_circular_chain_of_groups_has_an_end() -> None:
    inner = OSError(errno.EMFILE, "inner")
    group, around = ExceptionGroup("group", [inner, OSError("other")]), OSError("around")
    around.__cause__ = group
    assert list(causes(around)) == [around, group, inner]
    assert exhaustion_behind(around) is inner
    inner.errno, inner.__cause__ = errno.ECONNREFUSED, around
    assert list(causes(around)) == [around, group, inner]
    assert exhaustion_behind(around) is None


def test_what_was_being_handled_led_to_an_error_only_if_that_is_asked_for() -> None:
    first, second = OSError("first"), OSError("second")
    second.__context__ = first
    assert list(causes(second)) == [second, first]
    assert list(causes(second, with_context=False)) == [second]


@pytest.mark.timeout(10)
async def test_a_cancelled_wait_for_a_slow_reader_does_not_end_the_wait_of_others() -> None:
    protocol = connected(ClosingTransport(is_closing=False))
    protocol.pause_writing()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(protocol.wait_until_writable(), 0.01)
    waiting = asyncio.create_task(protocol.wait_until_writable())
    await asyncio.sleep(0)
    assert not waiting.done()
    protocol.resume_writing()
    await waiting
    await ended(protocol)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """Run a gateway in front of an upstream."""
    upstream = RawUpstream()
    upstream.behave = reply()
    with running_gateway(in_front_of(upstream.url), tmp_path_factory.mktemp("state")) as gateway:
        yield gateway
    upstream.close()


def test_a_client_that_disconnects_after_a_refused_handshake_with_junk_behind_it_does_no_harm(
    running: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    until = time.monotonic() + WITHIN
    for attempt in range(TRIES):
        if time.monotonic() > until:
            break
        with RawClient(running.port) as client:
            client.send(HANDSHAKE + BAD_ID + b"\r\n" + b"junk\r\n\r\n")
            time.sleep((attempt % 40) * 25e-6)  # the end comes before, between and behind the steps taken here
            client.sock.shutdown(socket.SHUT_WR)
            if attempt % 5 == 4:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    with RawClient(running.port) as client:
        assert client.get().status == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("coding", ["identity", "foo", "gzip, chunkedx"])
def test_an_upgrade_with_a_body_that_cannot_be_read_is_refused(
    running: RunningGateway, caplog: pytest.LogCaptureFixture, coding: str
) -> None:
    """Such a request is parsed twice, and the parser may find fault only the second time."""
    with RawClient(running.port) as client:
        client.request("POST", "/api/x", ("Connection: Upgrade", "Upgrade: h2c", f"Transfer-Encoding: {coding}"))
        assert client.answer().status in (400, 501)
        assert client.is_closed()
    assert "Fatal error" not in caplog.text
