"""Names with several addresses: the next address is tried in time, and only one connection remains."""

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from functools import partial
from typing import Any

import httpx
import pytest
import uvloop

from api_gateway.transport import happy_eyeballs
from api_gateway.transport.happy_eyeballs import (
    MAX_FAILED_ADDRESSES,
    REMEMBERED_FOR,
    AddressInfo,
    FailedAddresses,
    first_connected,
    interleaved,
)
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.probe import probe
from tests.kit import PATIENCE, RawUpstream

NAME = "upstream.test"
STREAM = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
StartUpstream = Callable[..., RawUpstream]


def at(port: int) -> AddressInfo:
    return (socket.AF_INET, *STREAM, ("127.0.0.1", port))


@contextmanager
def black_hole() -> Iterator[int]:
    """Yield a port on which the kernel drops SYN packets, because the backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextmanager
def refusing() -> Iterator[int]:
    """Yield a port that is bound and on which nobody listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def resolves_to(monkeypatch: pytest.MonkeyPatch, *ports: int) -> None:
    """Resolve NAME to 127.0.0.1 with these ports; uvloop also resolves addresses, which stay as they are."""

    def patch(loop: Any) -> None:
        resolve = loop.getaddrinfo

        async def getaddrinfo(self: Any, host: str, port: int, **options: Any) -> Any:
            return [at(port) for port in ports] if host == NAME else await resolve(self, host, port, **options)

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)

    patch(asyncio.BaseEventLoop)
    patch(uvloop.Loop)


async def get(connect: float = PATIENCE) -> int:
    """Return the status of a request to the name, by a transport that has connected to nothing before."""
    async with aclosing(UpstreamTransport()) as transport:
        return await get_by(transport, connect)


async def get_by(transport: UpstreamTransport, connect: float = PATIENCE) -> int:
    """Return the status of a request to the name; the connection is closed after it."""
    return await probe(transport, f"http://{NAME}:1/", connect)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as made:
        yield made


def test_an_address_that_does_not_respond_costs_a_delay(
    runner: asyncio.Runner, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the connect timeout; and its attempt is closed."""
    up = upstream()
    with black_hole() as hole:
        resolves_to(monkeypatch, hole, up.port)
        began = time.monotonic()
        assert runner.run(get()) == 200
        assert happy_eyeballs.ATTEMPT_DELAY <= time.monotonic() - began < PATIENCE / 2
    assert len(up.wires) == 1


def test_an_address_that_refuses_costs_no_delay(
    runner: asyncio.Runner, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(happy_eyeballs, "ATTEMPT_DELAY", 3600.0)
    up = upstream()
    with refusing() as port:
        resolves_to(monkeypatch, port, up.port)
        assert runner.run(asyncio.wait_for(get(), PATIENCE)) == 200


def test_the_connect_timeout_covers_all_addresses(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    with black_hole() as one, black_hole() as other:
        resolves_to(monkeypatch, one, other)
        with pytest.raises(httpx.ConnectTimeout, match=f"no connection to {NAME}:1 within 0.4 s"):
            runner.run(get(connect=0.4))


def test_an_address_that_does_not_respond_costs_the_delay_once(
    runner: asyncio.Runner, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these requests needs a new connection; but the first, none waits for the address that failed."""
    up = upstream()

    async def three() -> None:
        async with aclosing(UpstreamTransport(max_requests=1)) as transport:
            assert await get_by(transport) == 200
            monkeypatch.setattr(happy_eyeballs, "ATTEMPT_DELAY", 3600.0)
            for _ in range(2):
                assert await asyncio.wait_for(get_by(transport), PATIENCE) == 200

    with black_hole() as hole:
        resolves_to(monkeypatch, hole, up.port)
        runner.run(three())
    assert len(up.wires) == 3


def test_a_connect_timeout_that_the_first_addresses_use_up_is_not_repeated(
    runner: asyncio.Runner, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address behind them has its turn at the next connection."""
    up = upstream()

    async def until_it_connects() -> int:
        async with aclosing(UpstreamTransport()) as transport:
            for attempt in range(4):
                with suppress(httpx.ConnectTimeout):
                    assert await get_by(transport, 0.4) == 200
                    return attempt
        raise AssertionError("no connection")

    with black_hole() as one, black_hole() as other:
        resolves_to(monkeypatch, one, other, up.port)
        assert 0 < runner.run(until_it_connects()) < 3


def test_a_failed_address_is_tried_last_until_it_connects_or_its_time_is_over() -> None:
    failed = FailedAddresses()
    one, other, third = (at(port) for port in (1, 2, 3))
    everyone = [one, other, third]
    assert failed.in_order(everyone, 0) == everyone
    failed.note(one, 10, has_connected=False)
    assert failed.in_order(everyone, 10) == [other, third, one]
    assert failed.in_order([third, one, other], 10) == [third, other, one], "the rest is in the resolver's order"
    failed.note(other, 11, has_connected=False)
    failed.note(third, 12, has_connected=False)
    assert failed.in_order([third, one, other], 12) == everyone, "the longest ago first"
    failed.note(third, 13, has_connected=True)
    assert failed.in_order(everyone, 13) == [third, one, other]
    assert failed.in_order(everyone, 10 + REMEMBERED_FOR) == [one, third, other]
    assert failed.in_order([one], 13) == [one]
    assert failed.in_order([], 13) == []


def test_few_addresses_are_remembered() -> None:
    failed = FailedAddresses()
    for port in range(2 * MAX_FAILED_ADDRESSES):
        failed.note(at(port), port, has_connected=False)
    assert str(MAX_FAILED_ADDRESSES) in repr(failed)
    assert failed.in_order([at(2 * MAX_FAILED_ADDRESSES - 1), at(0)], 0)[0] == at(0), "the longest ago is forgotten"


def test_the_error_names_all_attempts(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing() as one, refusing() as other:
        resolves_to(monkeypatch, one, other)
        with pytest.raises(httpx.ConnectError, match=rf"no connection to {NAME}:1: 2 addresses: "):
            runner.run(get())


def test_families_take_turns() -> None:
    """Beginning with the resolver's first choice, and without repetitions."""
    six = [(socket.AF_INET6, *STREAM, (f"fd00::{number}", 80, 0, 0)) for number in range(3)]
    four = [(socket.AF_INET, *STREAM, (f"10.0.0.{number}", 80)) for number in range(2)]
    assert interleaved([*six, *four, *six]) == [six[0], four[0], six[1], four[1], six[2]]
    assert interleaved([*four, six[0]]) == [four[0], six[0], four[1]]
    assert interleaved(four) == four
    assert interleaved([]) == []


class Attempts:
    """Attempts that end when told to, and the sockets they have made."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self.sockets: dict[int, socket.socket] = {}
        self.ends: dict[int, asyncio.Future[None]] = {}

    def __call__(self, count: int) -> list[Any]:
        return [partial(self._attempt, number) for number in range(count)]

    async def _attempt(self, number: int) -> socket.socket:
        self.begun.append(number)
        self.ends[number] = asyncio.get_running_loop().create_future()
        try:
            await self.ends[number]
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        self.sockets[number] = socket.socket()
        return self.sockets[number]

    async def has_begun(self, number: int) -> None:
        while number not in self.ends:  # noqa: ASYNC110 - the attempt tells nobody
            await asyncio.sleep(0)

    def is_open(self, number: int) -> bool:
        return self.sockets[number].fileno() >= 0


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(happy_eyeballs, "ATTEMPT_DELAY", 0.0)


@pytest.mark.usefixtures("at_once")
async def test_the_first_connection_wins_and_the_other_attempts_are_closed() -> None:
    """Whichever attempt it is; a second one that is established at the same moment is closed too."""
    attempts = Attempts()
    results: list[tuple[int, bool]] = []
    racing = asyncio.create_task(first_connected(attempts(4), lambda *result: results.append(result)))
    await attempts.has_begun(3)
    attempts.ends[2].set_result(None)
    attempts.ends[1].set_result(None)
    winner = await racing
    assert sorted(attempts.sockets) == [1, 2]
    (number,) = (number for number in (1, 2) if attempts.sockets[number] is winner)
    assert attempts.is_open(number)
    assert not attempts.is_open(3 - number)
    await asyncio.sleep(0)
    assert sorted(attempts.cancelled) == [0, 3]
    assert sorted(results) == [(0, False), (1, True), (2, True)], "the last one may have had too little time"
    winner.close()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("turns", range(4))
async def test_a_cancelled_race_leaves_no_socket_open(turns: int) -> None:
    attempts = Attempts()
    racing = asyncio.create_task(first_connected(attempts(2)))
    await attempts.has_begun(1)
    attempts.ends[0].set_result(None)
    for _ in range(turns):
        await asyncio.sleep(0)
    racing.cancel()
    result = (await asyncio.gather(racing, return_exceptions=True))[0]
    if isinstance(result, socket.socket):  # it had won before
        result.close()
    await asyncio.sleep(0)
    assert not any(map(attempts.is_open, attempts.sockets))


async def test_a_failed_attempt_is_followed_at_once_and_the_last_error_is_a_summary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the kind of a failure of the upstream, if there is one beside those of this process."""
    monkeypatch.setattr(happy_eyeballs, "ATTEMPT_DELAY", 3600.0)
    attempts = Attempts()
    results: list[tuple[int, bool]] = []
    racing = asyncio.create_task(first_connected(attempts(3), lambda *result: results.append(result)))
    failures = (OSError(errno.EMFILE, "no descriptor"), OSError(errno.ECONNREFUSED, "refused"))
    for number, error in enumerate((*failures, failures[1])):
        await attempts.has_begun(number)
        attempts.ends[number].set_exception(error)
    with pytest.raises(ConnectionRefusedError, match="3 addresses: no descriptor; refused"):
        await racing
    assert results == [(1, False), (2, False)], "the first one is not the upstream's failure"
    with pytest.raises(OSError, match="no address"):
        await first_connected([])
