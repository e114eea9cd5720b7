"""The CPU time of a request within the gateway alone: a gateway in this process, on connections without sockets.

Whole processes of the same code differ by microseconds a request, and so does one of them from run to run. Here the
cases follow one another in blocks of a millisecond, in random order, and are compared block by block: what the machine
does otherwise is in both, and the CPU time of this thread has no time of other processes. The kernel's part is not in
it, which features of header fields do not change. No garbage is collected meanwhile.
"""

import asyncio
import gc
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import uvicorn
from uvicorn.server import ServerState

from api_gateway.config import from_values
from api_gateway.downstream.listener import protocol_of
from api_gateway.main import create_app
from api_gateway.resilience.fair_shares import FairShares
from api_gateway.transport import http1_transport
from api_gateway.transport.upstream_connection import UpstreamConnection
from benchmarks.load import Failed
from benchmarks.upstream import SMALL

_CONNECTIONS = 16
_WARM_UP = 200  # requests of each run
_BLOCK = 10  # requests of a run in a round: so few that the machine does the same in the whole round
_AGAIN = 5  # requests before each block, as other runs have used the caches of the processor
_TURNS = 50  # of the event loop, within which a connection to the upstream is opened
_MANY = 1 << 20
_RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: origin\r\nDate: Mon, 30 Nov 2026 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(SMALL), SMALL)
)


class Wire(asyncio.Transport):
    """One side of a connection without a socket: `on_write` is called for whatever the gateway sends."""

    def __init__(self, on_write: Callable[[bytes], None]) -> None:
        super().__init__({"peername": ("127.0.0.1", 40_000), "sockname": ("127.0.0.1", 8000)})
        self._on_write = on_write
        self._is_closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See `asyncio.WriteTransport`."""
        self._on_write(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        """See `asyncio.WriteTransport`."""
        self._on_write(b"".join(list_of_data))

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._is_closing

    def close(self) -> None:
        """See `asyncio.BaseTransport`."""
        self._is_closing = True

    def abort(self) -> None:
        """See `asyncio.WriteTransport`."""
        self._is_closing = True

    def get_write_buffer_size(self) -> int:
        """See `asyncio.WriteTransport`."""
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See `asyncio.WriteTransport`."""

    def pause_reading(self) -> None:
        """See `asyncio.ReadTransport`."""

    def resume_reading(self) -> None:
        """See `asyncio.ReadTransport`."""


class Upstream:
    """The upstream of all gateways: `respond` responds to the requests that have been sent since."""

    def __init__(self) -> None:
        self._asked: list[UpstreamConnection] = []

    async def connect(self, *_: object) -> UpstreamConnection:
        """Return an open connection, as `http1_transport._connect` does."""
        connection = UpstreamConnection(asyncio.get_running_loop())
        connection.connection_made(Wire(lambda _: self._asked.append(connection)))
        return connection

    def respond(self) -> None:
        """Respond to each request. A small response arrives in one piece."""
        while self._asked:
            connection = self._asked.pop()
            connection.get_buffer(-1)[: len(_RESPONSE)] = _RESPONSE
            connection.buffer_updated(len(_RESPONSE))


class Clients:
    """Connections to a gateway that send heads in turn. Each run has its own, as clients repeat their fields."""

    def __init__(self, connect: Callable[[], asyncio.Protocol], upstream: Upstream, heads: Sequence[bytes]) -> None:
        self._upstream = upstream
        self._heads = itertools.cycle(heads)
        self.responses: list[bytes] = []
        self._turn = itertools.cycle([self._opened(connect()) for _ in range(_CONNECTIONS)])

    def _opened(self, connection: asyncio.Protocol) -> asyncio.Protocol:
        connection.connection_made(Wire(self.responses.append))
        return connection

    def request(self, head: bytes) -> None:
        """Have one request served."""
        next(self._turn).data_received(head)
        self._upstream.respond()

    async def warm_up(self) -> None:
        """Have requests served until everything is open and remembered. Raises Failed."""
        for _ in range(_WARM_UP):
            self.request(next(self._heads))
            for _ in range(_TURNS):
                if self.responses:
                    break
                await asyncio.sleep(0)
                self._upstream.respond()
            self.check(1)

    def check(self, count: int) -> None:
        """Raise Failed unless there are that many responses, all with status 200; forget them."""
        found = [each[:100] for each in self.responses if not each.startswith(b"HTTP/1.1 200 ")]
        if found or len(self.responses) != count:
            raise Failed(f"{len(self.responses)} responses to {count} requests: {found[:1]}")
        self.responses.clear()

    async def microseconds(self) -> float:
        """Return the CPU time of a request, of a block of them. Raises Failed."""
        for head in itertools.islice(self._heads, _AGAIN):
            self.request(head)
        block = list(itertools.islice(self._heads, _BLOCK))
        began = time.thread_time_ns()
        for head in block:
            self.request(head)
        await asyncio.sleep(0)  # callbacks for later are a part of it
        spent = time.thread_time_ns() - began
        self.check(_AGAIN + _BLOCK)
        return spent / _BLOCK / 1000


def head_of(path: str, fields: Mapping[str, str]) -> bytes:
    """Return the head of a GET."""
    lines = [f"GET /api/{path} HTTP/1.1", "Host: 127.0.0.1:8000", *(f"{name}: {fields[name]}" for name in fields)]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def step_gateway(sections: Mapping[str, Any], folder: Path) -> AsyncIterator[Callable[[], asyncio.Protocol]]:
    """Run a gateway with these sections of a configuration; yield what creates a connection to it."""
    server = {"port": 1, "max_event_loop_lag": None, "max_connections": _MANY, "max_connections_per_peer": _MANY}
    own: dict[str, Any] = {"server": server, "state_dir": str(folder), "log": {"access": False}}
    # A gateway that serves few requests per second keeps a larger share of them: here, none of those measured.
    own["history"] = {"successes": 4, "successes_per_second": 0.001}
    own["tiers"] = {"FREE": {"rate": 1_000_000, "capacity": 1_000_000_000}}
    own["address_limit"] = {"rate": 1_000_000, "capacity": 1_000_000_000, "exempt": []}
    own["upstreams"] = {"up": {"targets": [{"url": "http://127.0.0.1:9"}]}}
    own["routes"] = [{"name": "all", "path": "/api", "upstream": "up"}]
    config = from_values({**own, **sections})
    app = create_app(config)
    async with app.router.lifespan_context(app):
        of_server = uvicorn.Config(app, lifespan="off", proxy_headers=False, log_config=None)
        factory: Any = protocol_of(config.server, Counter(), FairShares(_MANY))
        loop = asyncio.get_running_loop()
        yield lambda: factory(of_server, ServerState(), {}, loop)


def alternating_steps(
    gateways: Mapping[str, Mapping[str, Any]],
    cases: Mapping[str, Sequence[bytes]],
    runs: Sequence[tuple[str, str]],
    folder: Path,
    rounds: int,
    copies: int = 1,
) -> dict[str, list[float]]:
    """Return the CPU time of a request in microseconds in each round, by "case: gateway". Raises Failed.

    `gateways` are sections of configurations, and `cases` heads that are sent in turn, both by name. `runs` are pairs
    of a gateway and a case, each of which is measured in each round, in random order. Equal gateways differ by half a
    microsecond, by where their objects lie in memory; with `copies` the mean of so many equal ones is returned.
    """
    return asyncio.run(_alternating(gateways, cases, runs, folder, rounds, copies))


async def _alternating(
    gateways: Mapping[str, Mapping[str, Any]],
    cases: Mapping[str, Sequence[bytes]],
    runs: Sequence[tuple[str, str]],
    folder: Path,
    rounds: int,
    copies: int,
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {f"{case}: {gateway}": [] for gateway, case in runs}
    upstream = Upstream()
    with patch.object(http1_transport, "_connect", upstream.connect):
        async with AsyncExitStack() as stack:
            started = {
                (name, copy): await stack.enter_async_context(step_gateway(sections, folder / f"{number}-{copy}"))
                for copy in range(copies)
                for number, (name, sections) in enumerate(gateways.items())
            }
            clients = [
                (f"{case}: {gateway}", Clients(started[gateway, copy], upstream, cases[case]))
                for gateway, case in runs
                for copy in range(copies)
            ]
            for _, one in clients:
                await one.warm_up()
            with _without_collections():
                for _ in range(rounds):
                    spent = dict.fromkeys(found, 0.0)
                    for name, one in random.sample(clients, len(clients)):  # none always follows the same one
                        spent[name] += await one.microseconds() / copies
                    for name, each in spent.items():
                        found[name].append(each)
    return found


@contextmanager
def _without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
