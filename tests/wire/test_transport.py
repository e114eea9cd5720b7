"""The transport to upstreams, alone: pool, framing, failures, timeouts, back-pressure."""

import asyncio
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509

from api_gateway.transport import sending_connection
from api_gateway.transport.http1_transport import UpstreamTransport, tls_context
from api_gateway.transport.pool import StaleConnection
from api_gateway.transport.probe import probe
from api_gateway.transport.request import Origin
from api_gateway.transport.response import NO_LISTENER, UpstreamResponse
from api_gateway.transport.sending_connection import MAX_REST
from api_gateway.transport.upstream_connection import UpstreamConnection
from tests.cases import each
from tests.kit import PATIENCE, Behaviour, RawRequest, RawUpstream, Wire, case, reply, soon, turns
from tests.tls_kit import Authority
from tests.transport_kit import Outgoing, fetch, pieces_of, read, send

StartUpstream = Callable[..., RawUpstream]
MIB = 1024 * 1024
TO_FILL_EVERY_BUFFER = 64 * MIB
BUFFERS = 24 * MIB  # more than the kernel holds for one loopback connection in both directions
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
async def transport() -> AsyncIterator[UpstreamTransport]:
    async with aclosing(UpstreamTransport(max_connections=4)) as made:
        yield made


class Pieces:
    """A request's body, and how much of it was asked for."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.taken = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.taken += len(piece)
            yield piece
            await asyncio.sleep(0)


class Stalling:
    """A request's body that stops after its first piece; `is_ended` once nobody waits for the rest."""

    def __init__(self) -> None:
        self.is_ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            self.is_ended = True


CHUNKED = ((b"Transfer-Encoding", b"chunked"),)


def request_to(
    up: RawUpstream | str,
    target: str = "/",
    *,
    method: str = "GET",
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: AsyncIterable[bytes] | None = None,
    **limits: float,
) -> Outgoing:
    url = up if isinstance(up, str) else up.url
    return Outgoing(url, method, target.encode("latin-1"), [(b"Host", b"up"), *headers], body, limits)


def state(transport: UpstreamTransport) -> str:
    """What the repr says of the only pool, such as `0 busy, 1 idle, 0 waiting`; empty before there is one."""
    found = re.findall(r"\[([^]]*)\]", repr(transport))
    assert len(found) <= 1, repr(transport)
    return "".join(found)


async def settles(transport: UpstreamTransport, expected: str) -> None:
    await soon(lambda: state(transport) == expected, f"the pool is {expected}")


def raw(*pieces: bytes, closes: bool = False) -> Behaviour:
    """Answer with these bytes, each in a segment of its own."""

    def behave(wire: Wire, _request: RawRequest) -> bool | None:
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.03)
            wire.send(piece)
        return False if closes else None

    return behave


def first_then(first: Behaviour, then: Behaviour | None = None) -> Behaviour:
    """Answer the very first request in one way and all later ones in another."""
    seen: list[RawRequest] = []

    def behave(wire: Wire, request: RawRequest) -> bool | None:
        seen.append(request)
        return (first if len(seen) == 1 else then or reply())(wire, request)

    return behave


def silent(wire: Wire, _request: RawRequest) -> bool:
    """Never answer; leave when the other side does."""
    wire.is_closed()
    return False


def held_until(gate: threading.Event) -> Behaviour:
    """Answer `/held` once the gate opens and everything else at once."""

    def behave(wire: Wire, request: RawRequest) -> None:
        if b"/held" in request.line:
            gate.wait(PATIENCE)
        wire.send(OK)

    return behave


def dies_on_reuse(wire: Wire, _request: RawRequest, *, served: set[int]) -> bool | None:
    if id(wire) in served:
        return False
    served.add(id(wire))
    wire.send(OK)
    return None


def swallow(wire: Wire, size: int) -> int:
    """Read and forget; return how much came, `size` at most."""
    left = size - len(wire.buffer)
    while left > 0 and (data := wire.sock.recv(min(left, MIB))):
        left -= len(data)
    return size - left


# The pool


async def test_a_connection_is_used_again(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream()
    assert [await fetch(transport, request_to(up)) for _ in range(3)] == [b"ok"] * 3
    assert len(up.wires) == 1
    assert state(transport) == "0 busy, 1 idle, 0 waiting"


async def test_the_connection_given_back_last_is_taken_first(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """Last in, first out: the surplus of a quiet hour stays unused and expires."""
    gate = threading.Event()
    ports: dict[bytes, int] = {}

    def behave(wire: Wire, request: RawRequest) -> None:
        ports[request.line.split(b" ")[1]] = wire.sock.getpeername()[1]
        held_until(gate)(wire, request)

    up = upstream(behave)
    held = asyncio.create_task(fetch(transport, request_to(up, "/held")))
    await soon(lambda: b"/held" in ports, "the first request arrives")
    await fetch(transport, request_to(up, "/other"))
    gate.set()
    await held
    for target in ("/a", "/b", "/c"):
        await fetch(transport, request_to(up, target))
    assert ports[b"/other"] != ports[b"/held"]
    assert ports[b"/a"] == ports[b"/b"] == ports[b"/c"] == ports[b"/held"]


async def test_requests_wait_for_a_connection_in_order(upstream: StartUpstream) -> None:
    gate = threading.Event()
    up = upstream(held_until(gate))
    async with aclosing(UpstreamTransport(max_connections=1)) as transport:
        tasks = [asyncio.create_task(fetch(transport, request_to(up, f"/held{number}"))) for number in range(5)]
        await settles(transport, "1 busy, 0 idle, 4 waiting")
        gate.set()
        await asyncio.gather(*tasks)
        assert [request.line for request in up.requests] == [b"GET /held%d HTTP/1.1" % n for n in range(5)]
        assert len(up.wires) == 1


async def test_no_more_connections_than_the_limit_are_open(upstream: StartUpstream) -> None:
    gate = threading.Event()
    up = upstream(held_until(gate))
    async with aclosing(UpstreamTransport(max_connections=3)) as transport:
        tasks = [asyncio.create_task(fetch(transport, request_to(up, "/held"))) for _ in range(12)]
        await settles(transport, "3 busy, 0 idle, 9 waiting")
        await soon(lambda: len(up.requests) == 3, "three requests arrive")
        gate.set()
        assert await asyncio.gather(*tasks) == [b"ok"] * 12
        assert len(up.wires) == 3


async def test_waiting_for_a_connection_ends_in_pool_timeout(upstream: StartUpstream) -> None:
    gate = threading.Event()
    up = upstream(held_until(gate))
    async with aclosing(UpstreamTransport(max_connections=1)) as transport:
        held = asyncio.create_task(fetch(transport, request_to(up, "/held")))
        await settles(transport, "1 busy, 0 idle, 0 waiting")
        with pytest.raises(httpx.PoolTimeout):
            await fetch(transport, request_to(up, pool=0.1))
        gate.set()
        assert await held == b"ok"
        assert state(transport) == "0 busy, 1 idle, 0 waiting"
        assert len(up.requests) == 1


async def test_each_origin_has_a_pool_of_its_own(upstream: StartUpstream) -> None:
    gate = threading.Event()
    one, other = upstream(held_until(gate)), upstream()
    async with aclosing(UpstreamTransport(max_connections=1)) as transport:
        held = asyncio.create_task(fetch(transport, request_to(one, "/held")))
        assert await fetch(transport, request_to(other, pool=0.5)) == b"ok"
        gate.set()
        await held


async def serves_at_once(transport: UpstreamTransport, up: RawUpstream, count: int) -> None:
    """Assert that `count` requests are with the upstream at the same time."""
    gate = threading.Event()
    up.behave = held_until(gate)
    tasks = [asyncio.create_task(fetch(transport, request_to(up, "/held", pool=2))) for _ in range(count)]
    try:
        await soon(lambda: sum(b"/held" in request.line for request in up.requests) == count, "all arrive")
    finally:
        gate.set()
    assert await asyncio.gather(*tasks) == [b"ok"] * count
    assert state(transport) == f"0 busy, {count} idle, 0 waiting"


@pytest.mark.parametrize("seed", range(4))
async def test_requests_cancelled_anywhere_leak_no_slot(upstream: StartUpstream, seed: int) -> None:
    """Waiting, connecting, sending, or reading: whatever a cancelled request was doing, its slot is free again."""
    source = random.Random(seed)

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nha")
        time.sleep(source.uniform(0, 0.01))
        wire.send(b"lf")

    up = upstream(behave)
    async with aclosing(UpstreamTransport(max_connections=4)) as transport:
        tasks = []
        for _ in range(50):
            tasks.append(asyncio.create_task(fetch(transport, request_to(up, pool=PATIENCE))))
            await asyncio.sleep(source.choice((0, 0, 0.001, 0.005)))
            source.choice(tasks).cancel()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result == b"half" or isinstance(result, asyncio.CancelledError) for result in results)
        await soon(lambda: state(transport).startswith("0 busy"), "no slot is taken")
        assert state(transport).endswith("0 waiting")
        await serves_at_once(transport, up, 4)


@pytest.mark.parametrize("turns", range(10))
async def test_a_request_cancelled_after_any_turn_of_the_loop_gives_its_slot_back_once(
    upstream: StartUpstream, turns: int
) -> None:
    """A slot freed twice would let the pool grow past its limit."""
    up = upstream()
    async with aclosing(UpstreamTransport(max_connections=2)) as transport:
        task = asyncio.create_task(fetch(transport, request_to(up)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        calm = ("", "0 busy, 0 idle, 0 waiting", "0 busy, 1 idle, 0 waiting")
        await soon(lambda: state(transport) in calm, "a connection that was being made is dropped")
        await serves_at_once(transport, up, 2)


async def test_a_cancelled_waiter_is_skipped(upstream: StartUpstream) -> None:
    gate = threading.Event()
    up = upstream(held_until(gate))
    async with aclosing(UpstreamTransport(max_connections=1)) as transport:
        tasks = [asyncio.create_task(fetch(transport, request_to(up, f"/held{number}"))) for number in range(3)]
        await settles(transport, "1 busy, 0 idle, 2 waiting")
        tasks[1].cancel()
        gate.set()
        assert await tasks[2] == b"ok"
        assert state(transport) == "0 busy, 1 idle, 0 waiting"


async def test_a_waiter_cancelled_as_it_is_served_hands_the_connection_on(upstream: StartUpstream) -> None:
    gate = threading.Event()
    up = upstream(held_until(gate))
    async with aclosing(UpstreamTransport(max_connections=1)) as transport:
        first, second, third = (
            asyncio.create_task(fetch(transport, request_to(up, f"/held{number}"))) for number in range(3)
        )
        await settles(transport, "1 busy, 0 idle, 2 waiting")
        first.add_done_callback(lambda _: second.cancel())
        gate.set()
        assert await third == b"ok"
        await settles(transport, "0 busy, 1 idle, 0 waiting")
        await asyncio.gather(first, second, return_exceptions=True)


async def test_a_cancelled_request_closes_its_connection_at_once(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    left: list[bool] = []
    up = upstream(lambda wire, _request: left.append(wire.is_closed()))
    task = asyncio.create_task(fetch(transport, request_to(up)))
    await soon(lambda: len(up.requests) == 1, "the request arrives")
    task.cancel()
    await soon(lambda: left == [True], "the upstream sees the connection closed")


async def test_an_unread_response_closes_its_connection(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nha"))
    response = await send(transport, request_to(up))
    response.close()
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_an_idle_connection_expires(upstream: StartUpstream) -> None:
    up = upstream()
    async with aclosing(UpstreamTransport(idle_timeout=0.2)) as transport:
        await fetch(transport, request_to(up))
        assert state(transport) == "0 busy, 1 idle, 0 waiting"
        await settles(transport, "0 busy, 0 idle, 0 waiting")
        await fetch(transport, request_to(up))
        assert len(up.wires) == 2


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 2\r\n\r\nok", b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize(
    "announced",
    [b"Keep-Alive: timeout=1, max=9\r\n", b"Keep-Alive: timeout=900\r\nKeep-Alive: timeout=1.9, max=9\r\n"],
)
async def test_an_announced_idle_timeout_is_obeyed(upstream: StartUpstream, announced: bytes, framing: bytes) -> None:
    """By responses with plain and with other heads; of two fields, the shorter timeout."""
    up = upstream(raw(b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n" + announced + framing))
    async with aclosing(UpstreamTransport(idle_timeout=3600)) as transport:
        assert [await fetch(transport, request_to(up)) for _ in range(2)] == [b"ok"] * 2
        assert len(up.wires) == 1
        await settles(transport, "0 busy, 0 idle, 0 waiting")


async def test_the_number_of_requests_and_the_age_of_a_connection_are_limited(upstream: StartUpstream) -> None:
    up = upstream()
    async with aclosing(UpstreamTransport(idle_timeout=3600, max_requests=2)) as transport:
        for _ in range(5):
            await fetch(transport, request_to(up))
        assert len(up.wires) == 3
        transport.change(4, 4, 3600, None, max_age=0.2)
        assert state(transport) == "0 busy, 0 idle, 0 waiting"
        await fetch(transport, request_to(up))
        await settles(transport, "0 busy, 0 idle, 0 waiting")


async def test_an_idle_connection_the_upstream_closes_leaves_the_pool(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    up = upstream(raw(OK, closes=True))
    await fetch(transport, request_to(up))
    await settles(transport, "0 busy, 0 idle, 0 waiting")
    assert await fetch(transport, request_to(up, method="POST")) == b"ok"


async def test_connection_close_is_obeyed(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream(reply(headers=((b"Connection", b"close"),)))
    assert await fetch(transport, request_to(up)) == b"ok"
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_aclose_closes_every_connection(upstream: StartUpstream) -> None:
    left: list[bool] = []

    def behave(wire: Wire, request: RawRequest) -> None:
        if b"/silent" in request.line:
            left.append(wire.is_closed())
        else:
            wire.send(OK)

    up = upstream(behave)
    transport = UpstreamTransport(max_connections=2)
    silence = asyncio.create_task(fetch(transport, request_to(up, "/silent")))
    await soon(lambda: len(up.requests) == 1, "the request arrives")
    await fetch(transport, request_to(up))
    assert state(transport) == "1 busy, 1 idle, 0 waiting"
    await transport.aclose()
    with pytest.raises(httpx.ReadError):
        await silence
    assert state(transport) == "0 busy, 0 idle, 0 waiting"
    await soon(lambda: left == [True], "the upstream sees the connection closed")


# Responses before the end of the request


class Counted:
    """A body in pieces, each of which follows once `gate` is set; without a gate, all are at hand."""

    def __init__(self, pieces: Sequence[bytes], gate: asyncio.Event | None = None) -> None:
        self._pieces = pieces
        self._gate = gate

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if self._gate is not None:
                await self._gate.wait()
            yield piece


def refuses_by_the_head(wire: Wire, request: RawRequest) -> None:
    """Answer before the body, then read the body and forget it, as nginx does for `return`."""
    wire.send(OK)
    wire.read_body(request.headers)


def posted(up: RawUpstream, pieces: Sequence[bytes], gate: asyncio.Event | None, *, chunked: bool) -> Outgoing:
    headers = CHUNKED if chunked else ((b"Content-Length", b"%d" % sum(map(len, pieces))),)
    return request_to(up, method="POST", headers=headers, body=Counted(pieces, gate))


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_at_hand_leaves_with_its_head(
    transport: UpstreamTransport, upstream: StartUpstream, *, chunked: bool
) -> None:
    """In one write: an upstream that responds to the head alone has received the whole request."""
    came: list[bytes] = []

    def behave(wire: Wire, request: RawRequest) -> None:
        came.append(bytes(wire.buffer))
        refuses_by_the_head(wire, request)

    up = upstream(behave, reads_body=False)
    for _ in range(3):
        assert await fetch(transport, posted(up, [b"on", b"ly"], None, chunked=chunked)) == b"ok"
    assert came == [b"2\r\non\r\n2\r\nly\r\n0\r\n\r\n" if chunked else b"only"] * 3
    assert len(up.wires) == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_rest_of_a_body_follows_an_early_response(
    transport: UpstreamTransport, upstream: StartUpstream, *, chunked: bool
) -> None:
    """The connection is taken again only when the request has been sent completely."""
    up = upstream(refuses_by_the_head, reads_body=False)
    for _ in range(3):
        gate = asyncio.Event()
        assert await fetch(transport, posted(up, [b"x" * 40_000] * 5, gate, chunked=chunked)) == b"ok"
        assert state(transport) == "1 busy, 0 idle, 0 waiting"
        gate.set()
        await settles(transport, "0 busy, 1 idle, 0 waiting")
    assert await fetch(transport, request_to(up)) == b"ok"
    assert len(up.wires) == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_rest_above_the_limit_closes_the_connection(
    transport: UpstreamTransport, upstream: StartUpstream, *, chunked: bool
) -> None:
    up = upstream(refuses_by_the_head, reads_body=False)
    gate = asyncio.Event()
    pieces = [bytes(MAX_REST // 4)] * 5
    assert await fetch(transport, posted(up, pieces, gate, chunked=chunked)) == b"ok"
    gate.set()
    await settles(transport, "0 busy, 0 idle, 0 waiting")


async def test_a_rest_that_does_not_come_closes_the_connection(
    transport: UpstreamTransport, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending_connection, "REST_TIMEOUT", 0.1)
    up = upstream(refuses_by_the_head, reads_body=False)
    body = Stalling()
    request = request_to(up, method="POST", headers=((b"Content-Length", b"9"),), body=body)
    assert await fetch(transport, request) == b"ok"
    assert state(transport) == "1 busy, 0 idle, 0 waiting"
    await settles(transport, "0 busy, 0 idle, 0 waiting")
    await soon(lambda: body.is_ended, "nobody waits for the rest")


async def test_an_upstream_that_does_not_read_the_rest_is_given_up(
    transport: UpstreamTransport, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a body that no buffer holds, when the response comes while sending is paused."""
    monkeypatch.setattr(sending_connection, "REST_TIMEOUT", 0.1)
    monkeypatch.setattr(sending_connection, "MAX_REST", TO_FILL_EVERY_BUFFER)

    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(OK)
        time.sleep(1)
        return False

    up = upstream(behave, reads_body=False)
    body = Counted([bytes(MIB)] * 64)
    headers = ((b"Content-Length", b"%d" % TO_FILL_EVERY_BUFFER),)
    assert await fetch(transport, request_to(up, method="POST", headers=headers, body=body)) == b"ok"
    await settles(transport, "0 busy, 0 idle, 0 waiting")


@pytest.mark.parametrize(
    "early",
    [
        b"HTTP/1.1 401 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno",
        b"HTTP/1.0 401 No\r\nContent-Length: 2\r\n\r\nno",
    ],
    ids=["close", "HTTP/1.0"],
)
async def test_an_early_response_that_ends_the_connection_ends_it(
    transport: UpstreamTransport, upstream: StartUpstream, early: bytes
) -> None:
    up = upstream(raw(early), reads_body=False)
    response = await send(transport, posted(up, [b"data"], asyncio.Event(), chunked=False))
    assert response.status == 401
    response.close()
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_a_byte_after_an_early_response_closes_the_connection(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """While the rest of the body is sent, as on an idle connection."""
    up = upstream(raw(OK, b"?"), reads_body=False)
    gate = asyncio.Event()
    assert await fetch(transport, posted(up, [b"data"], gate, chunked=False)) == b"ok"
    await settles(transport, "0 busy, 0 idle, 0 waiting")


async def test_an_early_response_to_an_expectation_closes_the_connection(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """The client may never send the body for which no 100 (Continue) came (RFC 9110 section 10.1.1)."""
    up = upstream(raw(OK), reads_body=False)
    request = posted(up, [b"data"], asyncio.Event(), chunked=False)
    request.expects_continue = True
    assert await fetch(transport, request) == b"ok"
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


# Reused connections that turn out to be dead


async def test_a_request_fails_as_stale_only_if_nothing_came_on_a_connection_that_was_used_before(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """Then it may be repeated; one byte of a response, or a new connection, shows that the upstream acted on it."""
    cases = {
        "used": (first_then(reply(), raw(closes=True)), True),
        "used, after a byte": (first_then(reply(), raw(b"HTTP/1.1 2", closes=True)), False),
        "new": (raw(closes=True), False),
    }
    for name, (behave, is_stale) in cases.items():
        with case(name):
            up = upstream(behave)
            if name != "new":
                await fetch(transport, request_to(up))
            with pytest.raises(httpx.ReadError) as failed:
                await fetch(transport, request_to(up))
            assert isinstance(failed.value, StaleConnection) == is_stale


async def test_a_probe_on_a_dead_connection_is_sent_once_more(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """On a new one, which is the last."""
    up = upstream(first_then(reply(), first_then(raw(closes=True))))
    assert [await probe(transport, up.url, 5) for _ in range(2)] == [200, 200]
    assert (len(up.requests), len(up.wires)) == (3, 2)
    dying = upstream(first_then(reply(), raw(closes=True)))
    assert await probe(transport, dying.url, 5) == 200
    with pytest.raises(httpx.ReadError):
        await probe(transport, dying.url, 5)
    assert (len(dying.requests), len(dying.wires)) == (3, 2)


# Failures and time limits


async def test_a_closed_port_is_a_connect_error(transport: UpstreamTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(httpx.ConnectError):
        await fetch(transport, request_to(f"http://127.0.0.1:{port}"))
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_a_connection_that_is_not_accepted_is_a_connect_timeout(transport: UpstreamTransport) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # fill the queue of connections to be accepted
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with pytest.raises(httpx.ConnectTimeout):
            await fetch(transport, request_to(f"http://127.0.0.1:{listener.getsockname()[1]}", connect=0.2))
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_silence_before_the_head_is_a_read_timeout(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    up = upstream(silent)
    with pytest.raises(httpx.ReadTimeout):
        await fetch(transport, request_to(up, read=0.2, idle=PATIENCE))
    assert len(up.requests) == 1
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


@pytest.mark.parametrize("limits", [{"read": 0.2}, {"read": PATIENCE, "idle": 0.2}])
async def test_silence_within_the_body_is_a_read_timeout(
    transport: UpstreamTransport, upstream: StartUpstream, limits: dict[str, Any]
) -> None:
    up = upstream(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"))
    response = await send(transport, request_to(up, **limits))
    with pytest.raises(httpx.ReadTimeout):
        await read(response)
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_the_limit_on_silence_is_not_one_on_the_whole_response(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n", *[b"x"] * 20]
    up = upstream(raw(*pieces))  # takes 0.6 s
    assert await fetch(transport, request_to(up, read=0.3)) == b"x" * 20


async def test_the_time_to_the_head_runs_once_the_body_is_sent(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """A slow client does not count against the upstream."""

    class Slow:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for _ in range(5):
                await asyncio.sleep(0.1)
                yield b"x"

    up = upstream()
    request = request_to(up, method="POST", headers=CHUNKED, body=Slow(), read=0.3)
    assert await fetch(transport, request) == b"ok"
    assert up.requests[0].body == b"xxxxx"


async def test_silence_after_an_early_head_is_noticed_although_the_upload_ended_later(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """The end of an upload does not stop the clock that runs for the response's body."""
    gate = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        gate.wait(PATIENCE)
        swallow(wire, 32 * MIB)
        wire.is_closed()

    up = upstream(behave, reads_body=False)
    body = Pieces([bytes(MIB)] * 32)
    headers = [(b"Content-Length", b"%d" % (32 * MIB))]
    request = request_to(up, method="POST", headers=headers, body=body, idle=2.0)
    response = await send(transport, request)
    reading = asyncio.create_task(read(response))
    await asyncio.sleep(0.1)
    assert body.taken < 32 * MIB
    gate.set()
    await soon(lambda: body.taken == 32 * MIB, "the upload ends")
    with pytest.raises(httpx.ReadTimeout):
        await asyncio.wait_for(reading, PATIENCE)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\nTrailer: x\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
    ],
)
async def test_a_truncated_body_never_looks_complete(
    transport: UpstreamTransport, upstream: StartUpstream, answer: bytes
) -> None:
    """What arrived is handed over first, then the failure."""
    up = upstream(raw(answer, closes=True))
    response = await send(transport, request_to(up))
    got = b""
    with pytest.raises(httpx.ReadError):  # noqa: PT012 - what came before the failure is part of the property
        async for piece in pieces_of(response):
            got += piece
    assert got == (b"half" if b"half" in answer else b"")
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_a_body_that_breaks_its_chunking_is_a_protocol_error(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    up = upstream(raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"zz\r\n"))
    response = await send(transport, request_to(up))
    with pytest.raises(httpx.RemoteProtocolError):
        await read(response)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\n"])
async def test_a_body_delimited_by_the_connection_ends_with_it(
    transport: UpstreamTransport, upstream: StartUpstream, head: bytes
) -> None:
    up = upstream(raw(head + b"all", b" of it", closes=True))
    assert await fetch(transport, request_to(up)) == b"all of it"
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


async def test_a_body_delimited_by_a_connection_that_is_reset_is_broken(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    gate = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        gate.wait(PATIENCE)
        wire.reset()

    up = upstream(behave)
    response = await send(transport, request_to(up))
    pieces = aiter(pieces_of(response))
    assert await anext(pieces) == b"half"
    gate.set()
    with pytest.raises(httpx.ReadError):
        await anext(pieces)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 600 High\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 999 High\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 20 Short\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX : space\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: folded\r\n line\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_a_protocol_error(
    transport: UpstreamTransport, upstream: StartUpstream, answer: bytes
) -> None:
    """So is a response in a transfer coding that nobody asked for, whose bytes the client could not read."""
    up = upstream(raw(answer))
    with pytest.raises(httpx.RemoteProtocolError):
        await fetch(transport, request_to(up, read=1))
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


@pytest.mark.parametrize("line", [b"X: %b\r\n" % (b"x" * 70_000), b"X: y\r\n" * 20_000, b"x" * 70_000])
async def test_a_head_above_the_limit_is_a_protocol_error(
    transport: UpstreamTransport, upstream: StartUpstream, line: bytes
) -> None:
    up = upstream(raw(b"HTTP/1.1 200 OK\r\n" + line))
    with pytest.raises(httpx.RemoteProtocolError):
        await fetch(transport, request_to(up, read=2))


async def test_one_response_may_have_a_large_head_after_another(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """The limit is on each head, not on all that a connection has brought."""
    up = upstream(reply(b"x" * 50_000, headers=((b"X", b"x" * 50_000),)))
    for _ in range(3):
        assert await fetch(transport, request_to(up)) == b"x" * 50_000
    assert len(up.wires) == 1


# Framing of responses


@pytest.mark.parametrize(
    ("method", "answer", "body"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nextra", b""),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + OK, b""),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nextra", b"ok"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\nextra", b""),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nextra", b""),
    ],
)
@pytest.mark.parametrize("pause", [False, True])
async def test_bytes_after_the_response_never_reach_the_next_one(
    transport: UpstreamTransport, upstream: StartUpstream, method: str, answer: bytes, body: bytes, *, pause: bool
) -> None:
    """They close the connection, whether they come with the response or while the connection is idle."""
    end = len(answer) - (len(OK) if answer.endswith(OK) else len(b"extra"))
    pieces = (answer[:end], answer[end:]) if pause else (answer,)
    up = upstream(first_then(raw(*pieces), reply(b"next")))
    assert await fetch(transport, request_to(up, method=method)) == body
    await settles(transport, "0 busy, 0 idle, 0 waiting")
    assert await fetch(transport, request_to(up)) == b"next"


@pytest.mark.parametrize("surplus", [b"extra", OK], ids=["garbage", "an answer"])
@pytest.mark.parametrize("head", [b"Content-Length: 2\r\n", b"Content-Length:  2\r\n"], ids=["plain", "parsed"])
@pytest.mark.parametrize("cut", [0, 1], ids=["with the head", "behind a piece of the body"])
async def test_a_response_longer_than_announced_fails(
    transport: UpstreamTransport, upstream: StartUpstream, head: bytes, surplus: bytes, cut: int
) -> None:
    """How it was meant, nobody can tell; what was announced must not pass for all of it."""
    answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\nok" + surplus
    at = answer.index(b"ok") + cut if cut else len(answer)
    up = upstream(first_then(raw(answer[:at], answer[at:]), reply(b"next")))
    with pytest.raises(httpx.RemoteProtocolError, match="more bytes than announced"):
        await fetch(transport, request_to(up))
    await settles(transport, "0 busy, 0 idle, 0 waiting")
    assert await fetch(transport, request_to(up)) == b"next"


async def test_bytes_behind_a_response_that_was_complete_close_the_connection(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    """They came too late to be seen with it."""
    up = upstream(first_then(raw(OK, b"extra"), reply(b"next")))
    assert await fetch(transport, request_to(up)) == b"ok"
    await settles(transport, "0 busy, 0 idle, 0 waiting")
    assert await fetch(transport, request_to(up)) == b"next"


@pytest.mark.parametrize(
    ("method", "answer", "status"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", 200),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 200),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", 204),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304),
        ("GET", b"HTTP/1.1 304 Not Modified\r\n\r\n", 304),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
    ],
)
async def test_a_response_without_a_body_ends_with_its_head(
    transport: UpstreamTransport, upstream: StartUpstream, method: str, answer: bytes, status: int
) -> None:
    up = upstream(raw(answer))
    for _ in range(2):
        response = await send(transport, request_to(up, method=method, read=1))
        assert response.status == status
        assert await read(response) == b""
    assert len(up.wires) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", OK),
        (b"HTTP/1.1 102 Pro", b"cessing\r\n\r\nHTTP/1.1 2", OK[len("HTTP/1.1 2") :]),
    ],
)
async def test_interim_responses_are_discarded(
    transport: UpstreamTransport, upstream: StartUpstream, pieces: tuple[bytes, ...]
) -> None:
    up = upstream(raw(*pieces))
    response = await send(transport, request_to(up))
    assert (response.status, response.reason) == (200, b"OK")
    assert response.headers == [(b"Content-Length", b"2")]
    assert await read(response) == b"ok"
    assert state(transport) == "0 busy, 1 idle, 0 waiting"


async def test_a_response_may_come_byte_by_byte(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    answer = b"HTTP/1.1 200 Fine\r\nX-Y: z\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nT: t\r\n\r\n"

    def behave(wire: Wire, _request: RawRequest) -> None:
        for byte in answer:
            wire.send(bytes([byte]))
            time.sleep(0.001)

    up = upstream(behave)
    response = await send(transport, request_to(up))
    assert response.reason == b"Fine"
    assert response.headers == [(b"X-Y", b"z"), (b"Transfer-Encoding", b"chunked")]
    assert await read(response) == b"ok"


# What is sent


async def test_a_request_goes_out_as_it_is(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    """No header is added, renamed or put elsewhere; the target is not normalised."""
    up = upstream()
    headers = [(b"x-B", b"1"), (b"X-a", b"caf\xc3\xa9 \xff"), (b"x-B", b"2"), (b"X-Empty", b"")]
    await fetch(transport, request_to(up, "/a%2f/../b//c?q=%zz&&", headers=headers))
    assert up.requests[0].head == (
        b"GET /a%2f/../b//c?q=%zz&& HTTP/1.1\r\n"
        b"Host: up\r\nx-B: 1\r\nX-a: caf\xc3\xa9 \xff\r\nx-B: 2\r\nX-Empty: \r\n\r\n"
    )


async def test_headers_of_the_response_come_as_they_are(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    """Names, order, repetition, empty values, and bytes beyond ASCII."""
    pairs = ((b"set-Cookie", b"a=1"), (b"X-Name", b"\xff"), (b"set-Cookie", b"b=2"), (b"X-Empty", b""))
    up = upstream(reply(headers=pairs))
    response = await send(transport, request_to(up))
    assert response.headers == [*pairs, (b"Content-Length", b"2")]
    await read(response)


async def test_a_chunked_body_is_framed_piece_by_piece(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    """An empty piece is not a chunk: it would end the body."""
    wire_bytes: list[bytes | None] = []

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire_bytes.append(wire.read_until(b"0\r\n\r\n"))
        wire.send(OK)

    up = upstream(behave, reads_body=False)
    body = Pieces([b"ab", b"", b"c" * 17])
    assert await fetch(transport, request_to(up, method="POST", headers=CHUNKED, body=body)) == b"ok"
    assert wire_bytes == [b"2\r\nab\r\n11\r\n" + b"c" * 17 + b"\r\n0\r\n\r\n"]


async def test_a_body_of_known_length_is_sent_as_it_is(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream()
    for _ in range(2):
        request = request_to(up, method="POST", headers=[(b"content-length", b"4")], body=Pieces([b"ab", b"cd"]))
        assert await fetch(transport, request) == b"ok"
    assert [request.body for request in up.requests] == [b"abcd", b"abcd"]
    assert len(up.wires) == 1


async def test_a_response_that_comes_before_the_body_is_sent_ends_the_sending(
    transport: UpstreamTransport, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is not used again: what was left unsent has no end."""
    monkeypatch.setattr(sending_connection, "REST_TIMEOUT", 0.3)
    up = upstream(first_then(reply(b"no", b"413 Content Too Large")), reads_body=False)
    body = Stalling()
    response = await send(transport, request_to(up, method="POST", headers=CHUNKED, body=body))
    assert response.status == 413
    assert await read(response) == b"no"
    await settles(transport, "0 busy, 0 idle, 0 waiting")
    assert await fetch(transport, request_to(up)) == b"ok"


@pytest.mark.parametrize(
    ("early", "expected"),
    [
        (b"Content-Length: 2\r\n\r\nno", b"no"),
        (b"Connection: close\r\nContent-Length: 2\r\n\r\nno", b"no"),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n", b"no"),
        (b"Content-Length: 3\r\n\r\nno", httpx.ReadError),
        (b"\r\nno", httpx.ReadError),
    ],
)
async def test_a_response_that_came_before_a_reset_is_read_although_sending_fails_first(
    transport: UpstreamTransport, upstream: StartUpstream, early: bytes, expected: bytes | type[Exception]
) -> None:
    """An upstream that refuses a body without reading it resets the connection right after its response."""
    is_blocked, has_reset = threading.Event(), threading.Event()

    def refuses(wire: Wire, _request: RawRequest) -> bool:
        assert is_blocked.wait(PATIENCE)
        wire.send(b"HTTP/1.1 413 Content Too Large\r\n" + early)
        wire.reset()
        has_reset.set()
        return False

    async def body() -> AsyncIterator[bytes]:
        yield b"ab"
        await turns()
        is_blocked.set()
        assert has_reset.wait(PATIENCE)  # the event loop reads nothing before the next piece is sent
        yield b"cd"
        await asyncio.sleep(PATIENCE)

    up = upstream(refuses, reads_body=False)
    request = request_to(up, method="POST", headers=CHUNKED, body=body())
    if isinstance(expected, bytes):
        response = await send(transport, request)
        assert (response.status, await read(response)) == (413, expected)
    else:
        with pytest.raises(expected):
            await send(transport, request)
    await settles(transport, "0 busy, 0 idle, 0 waiting")


@pytest.mark.parametrize("host", [b"a\r\nInjected: yes", b"a\nInjected: yes", b"a\rInjected: yes"])
async def test_a_line_break_in_a_field_of_a_probe_is_refused(
    transport: UpstreamTransport, upstream: StartUpstream, host: bytes
) -> None:
    up = upstream()
    with pytest.raises(httpx.LocalProtocolError):
        await probe(transport, up.url, 5, host=host)
    assert up.requests == []
    assert await probe(transport, up.url, 5) == 200


# Back-pressure


async def stalls(measure: Callable[[], int]) -> int:
    """Return what `measure` gives once it no longer grows."""
    before = -1
    while measure() != before:
        before = measure()
        await asyncio.sleep(0.2)
    return before


async def test_a_reader_that_pauses_makes_the_upstream_wait(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    sent = [0]

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % TO_FILL_EVERY_BUFFER)
        while sent[0] < TO_FILL_EVERY_BUFFER:
            wire.send(bytes(65_536))
            sent[0] += 65_536

    up = upstream(behave)
    response = await send(transport, request_to(up))
    assert await stalls(lambda: sent[0]) < BUFFERS
    assert len(await read(response)) == TO_FILL_EVERY_BUFFER
    assert state(transport) == "0 busy, 1 idle, 0 waiting"


async def test_an_upstream_that_pauses_makes_the_sender_wait(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        gate.wait(PATIENCE)
        request.body = b"%d" % swallow(wire, TO_FILL_EVERY_BUFFER)
        wire.send(OK)

    up = upstream(behave, reads_body=False)
    body = Pieces([bytes(65_536)] * (TO_FILL_EVERY_BUFFER // 65_536))
    headers = [(b"Content-Length", b"%d" % TO_FILL_EVERY_BUFFER)]
    sending = asyncio.create_task(
        fetch(transport, request_to(up, method="PUT", headers=headers, body=body, idle=PATIENCE))
    )
    assert await stalls(lambda: body.taken) < BUFFERS
    gate.set()
    assert await sending == b"ok"
    assert up.requests[0].body == b"%d" % TO_FILL_EVERY_BUFFER


async def test_an_upstream_that_stops_reading_is_a_read_timeout(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    gate = threading.Event()
    up = upstream(lambda _wire, _request: not gate.wait(PATIENCE), reads_body=False)
    body = Pieces([bytes(MIB)] * 64)
    with pytest.raises(httpx.ReadTimeout):
        await fetch(transport, request_to(up, method="PUT", headers=CHUNKED, body=body, idle=0.3))
    gate.set()
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


# Targets that were resolved


@each(
    ("address", "url", "sni"),
    [
        (None, "https://users.test:8443/a%2Fb?c", None),
        ("10.0.0.1", "https://10.0.0.1:8443/a%2Fb?c", "users.test"),
        ("fd00::1", "https://[fd00::1]:8443/a%2Fb?c", "users.test"),
    ],
)
def test_another_transport_gets_the_address_and_the_expected_name(
    address: str | None, url: str, sni: str | None
) -> None:
    origin = Origin.of(httpx.URL("https://users.test:8443"), address)
    request = origin.plain_request("GET", [(b"host", origin.netloc)], b"/a%2Fb?c", extensions={"timeout": {}})
    assert (str(request.url), request.headers["host"]) == (url, "users.test:8443")
    assert request.extensions.get("sni_hostname") == sni


async def test_a_probe_by_another_transport_connects_to_the_address() -> None:
    asked: list[httpx.Request] = []

    class Other(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return httpx.Response(204)

    assert await probe(Other(), "http://users.test:80/up?x", 1, address="10.0.0.1") == 204
    assert (str(asked[0].url), asked[0].headers["host"]) == ("http://10.0.0.1/up?x", "users.test")


# Targets that are gone


async def test_what_is_retired_keeps_no_idle_connection_and_is_forgotten(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    up = upstream()
    origin = Origin.of(httpx.URL(up.url))
    await fetch(transport, request_to(up))
    assert state(transport) == "0 busy, 1 idle, 0 waiting"
    assert transport.retire(origin)
    assert transport._pools == {}
    assert transport.retire(origin), "there is nothing left to retire"


async def test_what_is_retired_while_in_use_is_closed_when_given_back(
    transport: UpstreamTransport, upstream: StartUpstream
) -> None:
    up = upstream()
    origin = Origin.of(httpx.URL(up.url))
    connection = await transport.pool(origin).acquire(1, 1)
    assert not transport.retire(origin)
    transport.pool(origin).release(connection)
    assert connection.is_closed
    assert transport.retire(origin)


async def test_what_was_retired_can_be_revived(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream()
    pool = transport.pool(Origin.of(httpx.URL(up.url)))
    pool.retire()
    await fetch(transport, request_to(up))
    assert state(transport) == "0 busy, 0 idle, 0 waiting"
    pool.revive()
    await fetch(transport, request_to(up))
    assert state(transport) == "0 busy, 1 idle, 0 waiting"


# TLS


async def tls_exchange(
    certificates: Path, name: str, tls: ssl.SSLContext, count: int = 1, *, host: str | None = None
) -> tuple[list[bytes], int]:
    """Make requests to an upstream with the certificate `name`; return the responses and how many connections it saw.

    `host` is a name that was resolved to its address.
    """
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(OK)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with server, aclosing(UpstreamTransport(tls=tls)) as transport:
            if host is not None:
                return [b"%d" % await probe(transport, url.replace("127.0.0.1", host), 5, address="127.0.0.1")], 1
            return [await fetch(transport, request_to(url)) for _ in range(count)], connections
    finally:
        await asyncio.sleep(0)  # lets the server's side of a refused handshake end


def trusting(certificates: Path, name: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates / f"{name}.pem"))


async def test_an_upstream_whose_certificate_is_trusted_is_served_over_tls(certificates: Path) -> None:
    answers, connections = await tls_exchange(certificates, "here", trusting(certificates, "here"), count=3)
    assert answers == [b"ok"] * 3
    assert connections == 1


async def test_an_authority_without_the_extensions_of_strict_verification_is_trusted(tmp_path: Path) -> None:
    authority = Authority(tmp_path, is_plain=True)
    authority.issue("here", x509.IPAddress(IPv4Address("127.0.0.1")))
    answers, _ = await tls_exchange(tmp_path, "here", tls_context(authority.file))
    assert answers == [b"ok"]


async def test_a_certificate_of_an_unknown_authority_is_a_connect_error(certificates: Path) -> None:
    with pytest.raises(httpx.ConnectError):
        await tls_exchange(certificates, "here", tls_context())


async def test_a_certificate_for_another_name_is_a_connect_error(certificates: Path) -> None:
    with pytest.raises(httpx.ConnectError):
        await tls_exchange(certificates, "other", trusting(certificates, "other"))


async def test_a_resolved_address_must_show_the_certificate_of_its_name(certificates: Path) -> None:
    answers, _ = await tls_exchange(certificates, "other", trusting(certificates, "other"), host="other.test")
    assert answers == [b"200"]
    with pytest.raises(httpx.ConnectError):
        await tls_exchange(certificates, "here", trusting(certificates, "here"), host="other.test")


# Health checks


async def test_a_probe_returns_the_status(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream(reply(status=b"503 Service Unavailable"))
    assert await probe(transport, f"{up.url}/healthy?yes", 1) == 503
    assert up.requests[0].line == b"GET /healthy?yes HTTP/1.1"
    assert up.requests[0].all("host") == [up.url.removeprefix("http://").encode()]


async def test_a_probe_does_not_wait_for_a_body(transport: UpstreamTransport, upstream: StartUpstream) -> None:
    up = upstream(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"))
    assert await probe(transport, up.url, 1) == 200
    assert state(transport) == "0 busy, 0 idle, 0 waiting"


@pytest.mark.parametrize("behave", [silent, raw(closes=True), raw(b"garbage\r\n")])
async def test_a_probe_without_a_response_raises(
    transport: UpstreamTransport, upstream: StartUpstream, behave: Behaviour
) -> None:
    up = upstream(behave)
    probing: Awaitable[int] = probe(transport, up.url, 0.2)
    with pytest.raises(httpx.TransportError):
        await asyncio.wait_for(probing, 2)


async def test_a_piece_that_is_gathered_does_not_cost_a_look_at_all_others() -> None:
    """A client may send a body in thousands of small pieces in one read."""
    looks = 0

    class Piece(bytes):
        def __len__(self) -> int:
            nonlocal looks
            looks += 1
            return super().__len__()

    class Taker:
        taken = 0

        def writelines(self, pieces: Sequence[bytes]) -> None:
            self.taken += sum(map(len, pieces))

        def write(self, piece: bytes) -> None:
            self.taken += len(piece)

    upstream, taker = UpstreamConnection(asyncio.get_running_loop()), Taker()
    upstream.connection_made(taker)  # type: ignore[arg-type]  # as far as it is used
    response = UpstreamResponse(upstream, "POST", {}, NO_LISTENER)
    upstream.begin(response, [b"head"], None, gathers=True)
    for _ in range(5_000):
        upstream.send_piece(Piece(b"x"))
    await asyncio.sleep(0)
    assert looks <= 10 * 5_000
    assert taker.taken == len(b"head") + 5_000
