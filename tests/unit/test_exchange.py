"""The states of an exchange: its tables, their picture in the docs, and every event of a port in every state.

`python -m tests.unit.test_exchange` draws the picture in docs/architecture.md again.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast, get_args

import httpx
import pytest

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.eventloop.receive_buffer import READ_SIZE
from api_gateway.exchanges.exchange_body import ExchangeBody
from api_gateway.exchanges.fast_path import FastPath
from api_gateway.exchanges.http_exchange import HttpExchange
from api_gateway.exchanges.tunnelling_exchange import TunnellingExchange
from api_gateway.http1.asgi import BodyReceiver, DownstreamAbilities, InFlight
from api_gateway.http1.request_head import RequestHead
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.metrics import Recorder
from api_gateway.middleware import ExchangeRecords
from api_gateway.models import NANOSECONDS, Charge, ClientCertificate, Decision, Exchange, Outcome, Quota
from api_gateway.proxy import exchange as states
from api_gateway.proxy.admission import Admission
from api_gateway.proxy.cost_settlement import CostSettlement
from api_gateway.proxy.exchange import (
    COMBINATIONS,
    HELD_RESOURCES,
    PHASES,
    REQUEST_BODIES,
    RESPONSES,
    ExchangeEvent,
    IllegalEvent,
    ProxyExchange,
    States,
    successor,
)
from api_gateway.proxy.header_facts import HeaderReader, RewrittenHeaders
from api_gateway.proxy.limit_stage import RateLimitStage
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.proxy.stages import DeadlineStage, IdentityStage, RouteStage
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.concurrency_limit import ConcurrencyLimit
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from api_gateway.resilience.retry import RetryPolicy
from api_gateway.router import Router
from api_gateway.transport.http1_transport import UpstreamTransport
from api_gateway.transport.response import NO_LIMITS, NO_LISTENER, UpstreamResponse
from api_gateway.transport.upstream_connection import UpstreamConnection
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient
from tests import virtual_time
from tests.cases import each
from tests.kit import PATIENCE, case

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
BEGIN, END = "<!-- exchange: begin -->\n", "<!-- exchange: end -->"
LIVE = [phase for phase, events in PHASES.items() if events]
ENDED = [phase for phase, events in PHASES.items() if not events]


# The tables


def all_states() -> set[States]:
    """Return the states that can be reached from the beginning of an exchange, with and without a body."""
    reached: set[States] = set()
    left = [States(request_body=body) for body in (states.NONE, states.WITHHELD, states.FLOWING, states.COMPLETE)]
    while left:
        one = left.pop()
        if one not in reached:
            reached.add(one)
            left += [after for event in get_args(ExchangeEvent) if (after := successor(one, event)) is not None]
    return reached


def test_the_tables_name_every_state_and_no_other_event() -> None:
    for table, kind in (
        (PHASES, states.ExchangePhase),
        (REQUEST_BODIES, states.RequestBodyState),
        (RESPONSES, states.ResponseState),
    ):
        rows: Mapping[str, Mapping[str, str]] = table  # type: ignore[assignment]  # of three types
        assert set(rows) == set(get_args(kind))
        assert {state for events in rows.values() for state in events.values()} <= set(rows)
        assert {event for events in rows.values() for event in events} <= set(get_args(ExchangeEvent))
    assert set(COMBINATIONS) == set(PHASES)


def test_every_combination_that_can_be_reached_is_legal_and_every_legal_one_can_be_reached() -> None:
    legal = {States(phase, *rest) for phase, others in COMBINATIONS.items() for rest in product(*others)}
    assert all_states() <= legal
    assert {one.phase for one in all_states()} == set(PHASES)
    assert {one.response for one in all_states()} == set(RESPONSES)
    assert {one.request_body for one in all_states()} == set(REQUEST_BODIES)


def test_every_event_of_a_table_is_allowed_in_some_state() -> None:
    used = {event for one in all_states() for event in get_args(ExchangeEvent) if successor(one, event) is not None}
    assert used == set(get_args(ExchangeEvent))


def test_an_exchange_that_waits_for_others_ends_when_its_client_leaves_or_the_drain_ends() -> None:
    for one in all_states():
        if one.phase in HELD_RESOURCES:
            for event in (states.CLIENT_GONE, states.DRAIN, states.DEFECT):
                after = successor(one, event)
                assert after is not None
                assert (after.phase, after.response) == (states.ABORTED, states.ABORTED), one


@each(
    ("body", "after"),
    [
        (states.WITHHELD, states.FLOWING),
        (states.FLOWING, states.FLOWING),
        (states.PAUSED, states.PAUSED),
        (states.COMPLETE, states.COMPLETE),
    ],
)
def test_an_upstream_may_send_100_continue_whatever_has_become_of_the_body(
    body: states.RequestBodyState, after: states.RequestBodyState
) -> None:
    """Early, twice, or when it has everything."""
    exchanging = States(states.EXCHANGING, body)
    assert states.successor(exchanging, states.CONTINUE) == States(states.EXCHANGING, after)


def test_an_exchange_has_no_more_defaults_than_instances_share_keys_for() -> None:
    """An instance with an attribute beyond these gets a dictionary of its own, which costs more than a slot."""
    defaults = {
        name
        for kind in HttpExchange.__mro__[:-1]
        for name, value in vars(kind).items()
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
    }
    assert len(defaults - {"is_handshake", "is_strict"}) <= 30, "further attributes need slots, set in __init__"


def test_an_illegal_event_changes_nothing_and_names_state_and_event() -> None:
    exchange = ProxyExchange(None, "GET", NO_LIMITS, NO_LISTENER)
    exchange.phase = states.WAITING
    with pytest.raises(IllegalEvent, match=r"'end' is not allowed while waiting \(request body none, response none\)"):
        exchange.move(states.END)
    assert exchange.states == States(states.WAITING)


# The picture


def machine(table: Mapping[Any, Mapping[Any, Any]]) -> str:
    """Return one table as a Mermaid diagram, with the events that have the same effect in one line."""
    lines = ["stateDiagram-v2", "    direction LR", f"    [*] --> {next(iter(table)).replace(' ', '_')}"]
    for state, events in table.items():
        if " " in state:
            lines.append(f"    {state.replace(' ', '_')}: {state}")
        targets: dict[str, list[str]] = {}
        for event, after in events.items():
            targets.setdefault(after, []).append(event)
        lines += [
            f"    {state.replace(' ', '_')} --> {after.replace(' ', '_')}: {', '.join(names)}"
            for after, names in targets.items()
        ]
        if not events:
            lines.append(f"    {state.replace(' ', '_')} --> [*]")
    return "\n".join(["```mermaid", *lines, "```"])


def picture() -> str:
    """Return the three tables as diagrams, and a table of the legal combinations."""

    def words(found: Sequence[Any], order: Mapping[Any, Any]) -> str:
        return ", ".join(state for state in order if state in found)

    rows = [
        f"| {phase} | {words(tuple(bodies), REQUEST_BODIES)} | {words(tuple(responses), RESPONSES)} |"
        f" {', '.join(sorted(HELD_RESOURCES.get(phase, ())))} |"
        for phase, (bodies, responses) in COMBINATIONS.items()
    ]
    parts = [
        "Phase:",
        machine(PHASES),
        "Request body:",
        machine(REQUEST_BODIES),
        "Response:",
        machine(RESPONSES),
        "\n".join(["| phase | request body | response | holds |", "|---|---|---|---|", *rows]),
    ]
    return "\n\n".join(parts) + "\n"


def page_with(drawn: str) -> str:
    """Return the page with the picture between its markers."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{PAGE} has lost its markers"
    assert end, f"{PAGE} has lost its markers"
    return before + BEGIN + drawn + END + after


def test_the_picture_in_the_docs_is_this_one() -> None:
    assert PAGE.read_text() == page_with(picture()), "run `python -m tests.unit.test_exchange`"


# Every event of a port in every state


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf"
RETRIED = b"HTTP/1.1 503 Not now\r\nContent-Length: 0\r\n\r\n"


class FakeTransport:
    """The transport of a connection without a socket."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_aborted = self.is_paused = False

    def write(self, piece: bytes) -> None:
        self.sent.append(piece)

    def writelines(self, pieces: Sequence[bytes]) -> None:
        self.sent += pieces

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_aborted

    def get_protocol(self) -> None:
        """There is none."""

    def set_protocol(self, _protocol: Any) -> None:
        """Do nothing: nothing arrives."""


@pytest.mark.parametrize(
    ("framing", "is_paused"),
    [(b"Transfer-Encoding: chunked", True), (b"Content-Length: 90000", False), (b"Server: a", False)],
)
async def test_a_long_read_of_small_chunks_lets_other_connections_read(framing: bytes, is_paused: object) -> None:
    """Otherwise a fast upstream would occupy the event loop for as long as the parser's callbacks take."""
    connection, transport = UpstreamConnection(asyncio.get_running_loop()), FakeTransport()
    connection.connection_made(transport)  # type: ignore[arg-type]  # as far as it is used
    response = UpstreamResponse(connection, "GET", NO_LIMITS, NO_LISTENER)
    connection.start(response, b"")
    head = b"HTTP/1.1 200 OK\r\nX:\r\nLong: %b\r\n%b\r\n\r\n" % (b"x" * 40_000, framing)  # so that little is buffered
    data = (head + b"1\r\nx\r\n" * 11_000)[:READ_SIZE]
    connection.get_buffer(-1)[:READ_SIZE] = data
    connection.buffer_updated(READ_SIZE)
    assert (response.error, transport.is_paused) == (None, is_paused)
    await turns()
    assert not transport.is_paused


class FakeDownstream:
    """The client's side: it notes what the exchange asks of it."""

    abilities = DownstreamAbilities(framing=True, upgrade=True)

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: Any = FakeTransport()
        self.client: tuple[str, int] | None = ("127.0.0.1", 1)
        self.scheme = "http"
        self.certificate: ClientCertificate | None = None
        self.limits: Any = SimpleNamespace(header_bytes=60_000, header_lines=100)
        self.is_write_paused = False
        self.last_headers: RewrittenHeaders | None = None
        self.exchange: HttpExchange | None = None
        self.begun: list[HttpExchange] = []
        self.ends: list[bool] = []  # whether the connection is kept
        self.body: BodyReceiver | None = None
        self.is_draining = self.is_read_paused = False

    def begin_exchange(self, exchange: InFlight) -> None:
        assert isinstance(exchange, HttpExchange)
        if self.exchange is not exchange:
            self.begun.append(exchange)
        self.exchange = exchange

    def end_exchange(self, *, keep_alive: bool) -> None:
        assert self.exchange is not None, "an exchange ends once"
        self.exchange = None
        self.ends.append(keep_alive)

    def write_response(self, response: bytes, *, keep_alive: bool, is_last: bool) -> None:
        raise AssertionError("the exchange has begun")

    def receive_body(self, body: BodyReceiver, left: int) -> None:
        self.body = body

    def switch_protocols(self, reason: bytes, headers: Any) -> tuple[Any, bytes]:
        return self.transport, b""

    def pause_reading(self) -> None:
        self.is_read_paused = True

    def resume_reading(self) -> None:
        self.is_read_paused = False


class AskingLimiter:
    """A limiter whose decisions may take time, as those of a store do; it notes its settlements."""

    def __init__(self, quota: Quota) -> None:
        self._limiter = MemoryLimiter([quota])
        self.is_remote = self.replies_at_once = False
        self.asked: list[Callable[[], None]] = []
        self.settled: list[Sequence[Charge]] = []

    def decide(self, charges: Sequence[Charge], now_ns: int) -> Decision | None:
        return None if self.is_remote else self._limiter.decide(charges, now_ns)

    def decide_async(self, charges: Sequence[Charge], now_ns: int, on_decision: Callable[[Decision], None]) -> None:
        decision = self._limiter.decide(charges, now_ns)  # it is charged, whoever waits for the reply
        self.asked.append(partial(on_decision, decision))
        if self.replies_at_once:
            on_decision(decision)

    def settle(
        self, changes: Sequence[Charge], decision: Decision, now_ns: int, settled_to: Sequence[Charge] = ()
    ) -> Decision:
        self.settled.append(changes)
        return self._limiter.settle(changes, decision, now_ns, settled_to)


class Body(NamedTuple):
    """The body of a request: what arrives with the head, and what follows."""

    first: bytes = b""
    rest: bytes = b""
    is_expected: bool = False  # the client waits for 100 (Continue)
    is_chunked: bool = False  # and the general parser has read the head

    @property
    def state(self) -> states.RequestBodyState:
        """The state in which the exchange begins."""
        if self.is_expected:
            return states.WITHHELD
        return states.FLOWING if self.rest else states.COMPLETE if self.first else states.NONE


NO_BODY, WHOLE, PART, LATE = Body(), Body(b"body"), Body(b"bo", b"dy"), Body(b"", b"body")
EXPECTED_BODY = Body(b"", b"body", is_expected=True)
CHUNKED_BODY = Body(b"", b"body", is_chunked=True)
CHUNKED_EXPECTED = Body(b"", b"body", is_expected=True, is_chunked=True)


class World:
    """A gateway without sockets: one route to one upstream with one target, and one client."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, body: Body = NO_BODY, timeout: float | None = 2.0
    ) -> None:
        quota = Quota.per_second("FREE", 1, 1000)
        self.now = 1_000.0
        self.body = body
        self.limiter = AskingLimiter(quota)
        limiter = cast("Any", self.limiter)  # as far as it is used
        self.breaker = CircuitBreaker(BreakerPolicy(), 0.0)
        self.limit = ConcurrencyLimit(10, source=random.Random(1))
        self.target = Target("http://127.0.0.1:1")
        upstream = Upstream("up", [self.target], self.breaker, round_robin, limit=self.limit)
        self.transport = UpstreamTransport()
        retry = RetryPolicy(attempts=2, budget=1.0, statuses=frozenset({503}), base=1.5, cap=1.5)
        longest: Any = SimpleNamespace(uniform=lambda _, high: high)  # a delay that does not end by itself
        self.upstream_client = UpstreamClient(
            upstream, self.transport, Timeouts(PATIENCE, PATIENCE, PATIENCE, None), retry=retry, source=longest
        )
        self.recorder = Recorder(["all"], ["up"], ["FREE"], [50], 0.0)
        limit_headers = RateLimitHeaders()
        settlement = CostSettlement(limiter=limiter, clock_ns=self.clock_ns, recorder=self.recorder)
        router = Router(
            RouteTable([Route("all", "/api", "up", timeout=timeout)]),
            {"up": self.upstream_client},
            clock=self.clock,
            max_body_bytes=100,
            observe_attempt=self.recorder.observe_attempt,
            on_transition=lambda *_: None,
            on_cost=settlement.on_cost,
        )
        headers = HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=100)
        clients = ClientRegistry({"FREE": quota}, "FREE", {}, SqliteClientStore(folder))
        admission = Admission(
            [
                IdentityStage(clients=clients, priorities=SINGLE_PRIORITY),
                RouteStage(router.routes),
                DeadlineStage({}),
                RateLimitStage(limiter=limiter, address_quota=None, exempt=()),
            ]
        )
        self.ended: list[Exchange] = []
        record = ExchangeRecords(
            recorder=self.recorder,
            observers=[self.ended.append],
            on_failure=settlement.on_failure,
        )
        self.fast_path = FastPath(
            record=record,
            admission=admission,
            headers=headers,
            router=router,
            limit_headers=limit_headers,
            clock=self.clock,
            clock_ns=self.clock_ns,
        )
        self.client = FakeDownstream()
        self.upstream: list[UpstreamConnection] = []
        self.opened: asyncio.Future[None] | None = None  # when a connection is open; None: at once
        monkeypatch.setattr("api_gateway.transport.http1_transport._connect", self._connect)

    def clock(self) -> float:
        return self.now

    def clock_ns(self) -> int:
        return int(self.now * NANOSECONDS)

    async def _connect(self, *_: Any) -> UpstreamConnection:
        if self.opened is not None:
            await self.opened
        connection = UpstreamConnection(asyncio.get_running_loop())
        connection.connection_made(FakeTransport())  # type: ignore[arg-type]  # as far as it is used
        self.upstream.append(connection)
        return connection

    @property
    def pool(self) -> Any:
        return self.transport.pool(self.upstream_client.origins[self.target])

    async def connect(self) -> None:
        """Put an idle connection into the pool."""
        self.pool.release(await self.pool.acquire(None, None))

    def request(self) -> HttpExchange:
        """Receive a request of the client, and return its exchange."""
        self.send_request()
        return self.client.begun[-1]

    def send_request(self) -> None:
        """Receive a request of the client."""
        if self.body.is_chunked:
            self.send_chunked()
            return
        size = len(self.body.first + self.body.rest)
        method, length = ("PUT", f"Content-Length: {size}\r\n") if size else ("GET", "")
        length += "Expect: 100-continue\r\n" if self.body.is_expected else ""
        head = f"{method} /api/x HTTP/1.1\r\nHost: a\r\nX-Client-ID: a\r\n{length}\r\n"
        assert self.fast_path.try_handle(self.client, head.encode() + self.body.first)

    def send_chunked(self) -> None:
        """Receive a request of the client with a body in chunks."""
        fields = [(b"Host", b"a"), (b"X-Client-ID", b"a"), (b"Transfer-Encoding", b"chunked")]
        fields += [(b"Expect", b"100-continue")] if self.body.is_expected else []
        head = RequestHead("PUT", b"/api/x", fields, "1.1", None, keep_alive=True)
        head.expects_continue = self.body.is_expected
        assert self.fast_path.try_head(self.client, head, [])

    def receive(self, data: bytes) -> None:
        """Receive bytes of the upstream."""
        connection = self.upstream[-1]
        connection.get_buffer(-1)[: len(data)] = data
        connection.buffer_updated(len(data))

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The outcomes of the attempts that have ended, failures first. The breaker does not count ignored ones."""
        counts = self.breaker.window_counts(self.now)
        ended = sum(one.exchange.attempts for one in self.client.begun) - self.target.in_flight
        successes = counts.calls - counts.failures
        return FAILURE * counts.failures + SUCCESS * successes + IGNORED * (ended - counts.calls)

    def held(self) -> set[str]:
        """Return what is held by an exchange."""
        busy = self.recorder.in_flight, self.target.in_flight, self.limit.in_flight, self.pool.shares.in_use
        exchange = self.client.begun[-1]
        assert busy[1] == busy[2] or isinstance(exchange, TunnellingExchange), "an attempt has a slot of the limit"
        held = {"exchange"} if busy[0] else set()
        held |= {"timer"} if exchange.timer is not None else set()
        held |= {"task"} if exchange.task is not None else set()
        held |= {"delay"} if exchange.delay is not None else set()
        held |= {"last response"} if exchange.last is not None or exchange.failure is not None else set()
        held |= {"attempt"} if busy[1] else set()
        return held | ({"connection"} if busy[3] and exchange.task is None else set())


async def waiting(world: World) -> HttpExchange:
    world.limiter.is_remote, world.limiter.replies_at_once = True, False
    await world.connect()
    return world.request()


async def sent(world: World) -> HttpExchange:
    await world.connect()
    return world.request()


async def connecting(world: World) -> HttpExchange:
    world.opened = asyncio.get_running_loop().create_future()
    exchange = world.request()
    await turns()
    return exchange


async def turns() -> None:
    """Let the loop run what is ready, a few times."""
    for _ in range(5):
        await asyncio.sleep(0)


async def flowing(world: World) -> HttpExchange:
    exchange = await sent(world)
    world.receive(HALF)
    return exchange


async def paused(world: World) -> HttpExchange:
    exchange = await sent(world)
    world.client.is_write_paused = True
    world.receive(HALF)
    assert world.upstream[-1]._transport.is_paused
    return exchange


async def backing_off(world: World) -> HttpExchange:
    exchange = await sent(world)
    if world.body.rest:  # then a response is not retried, because the rest of the body goes to its target
        lose(world, exchange)
    else:
        world.receive(RETRIED)
    return exchange


async def tunnelling(world: World) -> HttpExchange:
    await world.connect()
    fields = [(b"Host", b"a"), (b"X-Client-ID", b"a"), (b"Upgrade", b"websocket"), (b"Connection", b"Upgrade")]
    head = RequestHead("GET", b"/api/x", fields, "1.1", 0, keep_alive=True)
    head.upgrade = b"websocket"
    assert world.fast_path.try_head(world.client, head, [])
    await turns()
    world.receive(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
    await turns()
    return world.client.begun[-1]


async def done(world: World) -> HttpExchange:
    exchange = await flowing(world)
    world.receive(b"half")
    return exchange


async def aborted(world: World) -> HttpExchange:
    exchange = await flowing(world)
    exchange.on_client_disconnected()
    return exchange


async def admitting(world: World) -> HttpExchange:
    """An event within a callback, which no port may deliver."""
    exchange = await waiting(world)
    exchange.phase = states.ADMITTING
    return exchange


async def selecting(world: World) -> HttpExchange:
    """As `admitting`."""
    exchange = await waiting(world)
    exchange.phase = states.SELECTING
    return exchange


async def falling_back(world: World) -> HttpExchange:
    """As `admitting`."""
    exchange = await waiting(world)
    exchange.phase = states.FALLING_BACK
    return exchange


SITUATIONS: dict[str, tuple[Callable[[World], Any], States]] = {
    "admitting": (admitting, States(states.ADMITTING)),
    "waiting": (waiting, States(states.WAITING)),
    "selecting": (selecting, States(states.SELECTING)),
    "connecting": (connecting, States(states.CONNECTING)),
    "sent": (sent, States(states.EXCHANGING)),
    "flowing": (flowing, States(states.EXCHANGING, response=states.FLOWING)),
    "paused": (paused, States(states.EXCHANGING, response=states.PAUSED)),
    "backing off": (backing_off, States(states.BACKING_OFF)),
    "falling back": (falling_back, States(states.FALLING_BACK)),
    "tunnelling": (tunnelling, States(states.TUNNELLING, response=states.FLOWING)),
    "done": (done, States(states.DONE, response=states.COMPLETE)),
    "aborted": (aborted, States(states.ABORTED, response=states.ABORTED)),
}


def receive(world: World, exchange: HttpExchange, first: bytes, further: bytes) -> None:
    """Receive the beginning of a response, or more of it; without a connection, report progress all the same."""
    if exchange.phase == states.EXCHANGING:
        world.receive(first if exchange.response == states.NONE else further)
    else:
        exchange.on_progress()


def lose(world: World, exchange: HttpExchange) -> None:
    if world.opened is not None and exchange.phase == states.CONNECTING:
        world.opened.set_exception(httpx.ConnectError("refused"))
    elif exchange.phase == states.EXCHANGING:
        world.upstream[-1].is_reused = False  # not the keep-alive race
        world.upstream[-1].connection_lost(None)
    else:
        exchange.error = OSError("reset")
        exchange.on_progress()


def pass_deadline(world: World, exchange: HttpExchange) -> None:
    """Let the timer of the deadline fire, if there is one; an exchange without it never gets the event."""
    timer = exchange.timer
    if timer is not None:
        world.now += 2.0
        timer._run()  # as the loop does


def body_of(exchange: HttpExchange) -> ExchangeBody:
    """Return the body of the request."""
    assert exchange.upload is not None
    return exchange.upload


# The events of the ports, each with the events of the tables that it may stand for.
EVENTS: dict[str, tuple[Callable[[World, HttpExchange], object], tuple[ExchangeEvent, ...]]] = {
    "a part": (partial(receive, first=HALF, further=b"ha"), (states.HEAD, states.DATA)),
    "the end": (partial(receive, first=HALF + b"half", further=b"half"), (states.HEAD, states.END)),
    "the loss of the upstream": (lose, (states.RETRY, states.BREAK)),
    "the client reads on": (lambda _, exchange: exchange.on_writable(), (states.WRITABLE,)),
    "the client leaves": (lambda _, exchange: exchange.on_client_disconnected(), (states.CLIENT_GONE,)),
    "the drain ends": (lambda _, exchange: exchange.on_forced_close(), (states.DRAIN,)),
    "the deadline passes": (pass_deadline, (states.REFUSE, states.BREAK)),
    "a piece of the body": (lambda _, exchange: body_of(exchange).feed(b"d"), (states.BODY,)),
    "the end of the body": (lambda _, exchange: body_of(exchange).end_body(), (states.BODY_END,)),
    "100 (Continue)": (lambda _, exchange: exchange.on_continue(), (states.CONTINUE,)),
}
OF_THE_BODY = ("a piece of the body", "the end of the body", "100 (Continue)")


class Expected(NamedTuple):
    """What a legal event leads to: states, outcomes of the breaker, and status and reason of an ended exchange."""

    phase: states.ExchangePhase
    response: states.ResponseState
    outcomes: tuple[Outcome, ...] = ()
    record: tuple[int, str | None] | None = None


SUCCESS, FAILURE, IGNORED = (Outcome.SUCCESS,), (Outcome.FAILURE,), (Outcome.IGNORED,)
LEFT, CUT = "client_disconnected", "draining"
EXPECTED: dict[tuple[str, str], Expected] = {
    ("waiting", "the client leaves"): Expected("aborted", "aborted", (), (499, LEFT)),
    ("waiting", "the drain ends"): Expected("aborted", "aborted", (), (499, CUT)),
    ("sent", "a part"): Expected("exchanging", "flowing"),
    ("sent", "the end"): Expected("done", "complete", SUCCESS, (200, None)),
    ("sent", "the loss of the upstream"): Expected("backing off", "none", FAILURE),
    ("sent", "the client reads on"): Expected("exchanging", "none"),
    ("sent", "the client leaves"): Expected("aborted", "aborted", IGNORED, (499, LEFT)),
    ("sent", "the drain ends"): Expected("aborted", "aborted", IGNORED, (499, CUT)),
    ("flowing", "a part"): Expected("exchanging", "flowing"),
    ("flowing", "the end"): Expected("done", "complete", SUCCESS, (200, None)),
    ("flowing", "the loss of the upstream"): Expected("aborted", "aborted", FAILURE, (200, "upstream_reset")),
    ("flowing", "the client reads on"): Expected("exchanging", "flowing"),
    ("flowing", "the client leaves"): Expected("aborted", "aborted", SUCCESS, (499, LEFT)),
    ("flowing", "the drain ends"): Expected("aborted", "aborted", SUCCESS, (200, CUT)),
    ("paused", "a part"): Expected("exchanging", "paused"),
    ("paused", "the end"): Expected("done", "complete", SUCCESS, (200, None)),
    ("paused", "the loss of the upstream"): Expected("aborted", "aborted", FAILURE, (200, "upstream_reset")),
    ("paused", "the client reads on"): Expected("exchanging", "flowing"),
    ("paused", "the client leaves"): Expected("aborted", "aborted", SUCCESS, (499, LEFT)),
    ("paused", "the drain ends"): Expected("aborted", "aborted", SUCCESS, (200, CUT)),
}
EXPECTED |= {
    ("tunnelling", "the client leaves"): Expected("aborted", "aborted", SUCCESS, (499, LEFT)),
    ("tunnelling", "the drain ends"): Expected("aborted", "aborted", SUCCESS, (101, CUT)),
}
EXPECTED |= {
    ("connecting", "the loss of the upstream"): Expected("backing off", "none", FAILURE),
    ("connecting", "the client leaves"): Expected("aborted", "aborted", IGNORED, (499, LEFT)),
    ("connecting", "the drain ends"): Expected("aborted", "aborted", IGNORED, (499, CUT)),
    ("connecting", "the deadline passes"): Expected("done", "complete", IGNORED, (504, "upstream_timeout")),
    ("backing off", "the client leaves"): Expected("aborted", "aborted", FAILURE, (499, LEFT)),
    ("backing off", "the drain ends"): Expected("aborted", "aborted", FAILURE, (499, CUT)),
    ("backing off", "the deadline passes"): Expected("done", "complete", FAILURE, (504, "upstream_timeout")),
    ("sent", "the deadline passes"): Expected("done", "complete", FAILURE, (504, "upstream_timeout")),
    ("flowing", "the deadline passes"): Expected("aborted", "aborted", FAILURE, (200, "upstream_timeout")),
    ("paused", "the deadline passes"): Expected("aborted", "aborted", SUCCESS, (200, "upstream_timeout")),
}
# The outcomes that differ while the client is awaited, for the rest of its request.
AWAITED: dict[tuple[str, str], tuple[Outcome, ...]] = {
    ("sent", "the loss of the upstream"): IGNORED,
    ("sent", "the deadline passes"): IGNORED,
    ("flowing", "the loss of the upstream"): SUCCESS,
    ("flowing", "the deadline passes"): SUCCESS,
    ("paused", "the loss of the upstream"): SUCCESS,
    ("backing off", "the client leaves"): IGNORED,
    ("backing off", "the drain ends"): IGNORED,
    ("backing off", "the deadline passes"): IGNORED,
}
BODIES = each(
    "body",
    [NO_BODY, WHOLE, PART, LATE, EXPECTED_BODY, CHUNKED_BODY, CHUNKED_EXPECTED],
    ids=[
        *("without a body", "whole body", "part of a body", "body to come", "body to be asked for"),
        *("chunked body", "chunked body to be asked for"),
    ],
)
# The events of a situation are the cases of one test: most of them take less time than a test of their own.
IN_EVERY_SITUATION = each("situation", SITUATIONS)


def body_state(body: Body, before: States) -> states.RequestBodyState:
    """Return the state of a body of which no more has arrived since the exchange began."""
    if before.phase in (states.DONE, states.ABORTED) and body.rest:
        return states.DISCARDED
    return body.state


def is_deliverable(situation: str, event: str, body: Body) -> bool:
    """Return whether a port may deliver an event; none delivers pieces of a body that is complete."""
    if situation == "tunnelling" and body != NO_BODY:
        return False  # a handshake has none
    if event == "the end of the body" and body.is_expected:
        return False  # a piece comes first
    return event not in OF_THE_BODY or bool(body.rest)


def is_legal(situation: str, event: str, body: Body) -> bool:
    """Return whether the tables allow an event of a port."""
    _, before = SITUATIONS[situation]
    if before.phase not in HELD_RESOURCES or (event == "the deadline passes" and before.phase == states.WAITING):
        return False
    before = before._replace(request_body=body_state(body, before))
    return any(successor(before, one) is not None for one in EVENTS[event][1])


def expected_of(situation: str, event: str, body: Body) -> Expected:
    """Return what is expected; an incomplete body counts for the client."""
    if event in OF_THE_BODY:
        _, before = SITUATIONS[situation]
        outcomes = IGNORED if situation == "backing off" else ()
        return Expected(before.phase, before.response, outcomes)
    expected = EXPECTED[situation, event]
    return (
        expected._replace(outcomes=AWAITED[situation, event])
        if body.rest and (situation, event) in AWAITED
        else expected
    )


def test_every_pair_that_the_tables_allow_has_an_expectation() -> None:
    assert set(EXPECTED) == {
        (situation, event)
        for situation, event in product(SITUATIONS, EVENTS)
        if event not in OF_THE_BODY and is_legal(situation, event, NO_BODY)
    }
    assert {before.phase for _, before in SITUATIONS.values()} == set(PHASES)


@BODIES
@IN_EVERY_SITUATION
def test_an_event_in_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, situation: str, body: Body) -> None:
    """Attribution, charge and record are as expected, and whatever is not held in the new phase has been returned."""

    async def run(event: str) -> None:
        world = World(tmp_path, monkeypatch, body)
        begin, before = SITUATIONS[situation]
        exchange = await begin(world)
        assert (exchange.phase, exchange.response) == (before.phase, before.response)
        deliver, _ = EVENTS[event]
        if event == "the deadline passes" and exchange.timer is None:
            return
        if not is_deliverable(situation, event, body) or (event in OF_THE_BODY and exchange.phase in ENDED):
            return  # the rest of a body is not an event of an exchange that has ended
        if not is_legal(situation, event, body):
            with pytest.raises(IllegalEvent):
                deliver(world, exchange)
            return
        deliver(world, exchange)
        await turns()
        expected = expected_of(situation, event, body)
        assert (exchange.phase, exchange.response) == expected[:2]
        assert world.outcomes == expected.outcomes
        assert [(one.status, one.reason) for one in world.ended] == ([expected.record] if expected.record else [])
        is_refunded = (situation, event) == ("connecting", "the deadline passes")
        assert bool(world.limiter.settled) == is_refunded, "the charge stays if anything was sent"
        check_resources(world, exchange)

    for event in EVENTS:
        with case(situation, event):
            virtual_time.run(run(event))


def illegal_events(situation: str, body: Body) -> Iterator[str]:
    """Yield the events that a port may deliver, and that the tables do not allow."""
    has_ended = SITUATIONS[situation][1].phase in ENDED
    for event in EVENTS:
        is_possible = event != "the deadline passes" and is_deliverable(situation, event, body)
        if is_possible and not is_legal(situation, event, body) and not (event in OF_THE_BODY and has_ended):
            yield event


def check_resources(world: World, exchange: HttpExchange) -> None:
    """Check that an exchange holds what its phase may hold, and that an ended one has ended everything."""
    held = world.held()
    if exchange.phase in ENDED:
        if exchange.upload is not None and exchange.upload.is_body_continued:
            held.remove("connection")  # which gets the rest of the body
        assert held == set()
        assert len(world.ended) == len(world.client.ends) == 1
        assert exchange.attempt is None
        assert exchange.connection is None
        assert world.client.exchange is None
        return
    assert held - {"exchange"} == set(HELD_RESOURCES[exchange.phase]) - {"question"}
    assert not world.ended


@BODIES
@IN_EVERY_SITUATION
def test_an_illegal_event_is_counted_and_aborts_its_exchange_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    situation: str,
    body: Body,
) -> None:
    monkeypatch.setattr(ProxyExchange, "is_strict", False)
    (tmp_path / "other").mkdir(exist_ok=True)

    async def run(event: str) -> None:
        world = World(tmp_path, monkeypatch, body)
        other = World(tmp_path / "other", monkeypatch, timeout=None)  # nothing but an event may end it
        undisturbed = await flowing(other)
        begin, before = SITUATIONS[situation]
        monkeypatch.setattr("api_gateway.transport.http1_transport._connect", world._connect)
        exchange = await begin(world)
        for _ in range(2):
            EVENTS[event][0](world, exchange)
        await turns()
        assert sum(world.recorder.illegal_exchange_events.values()) == 2
        assert {phase for phase, _ in world.recorder.illegal_exchange_events} <= {before.phase, states.ABORTED}
        if before.phase in HELD_RESOURCES:
            assert exchange.phase == states.ABORTED
            assert world.ended[0].reason == "internal_error"
        if exchange.phase in ENDED:
            check_resources(world, exchange)
        assert undisturbed.phase == states.EXCHANGING

    for event in illegal_events(situation, body):
        with case(situation, event):
            caplog.clear()
            virtual_time.run(run(event))
            assert caplog.text.count("is not allowed while") in (1, 2), "each state and event once"


@BODIES
@each("is_open", [True, False])
def test_the_end_of_connecting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: Body, *, is_open: bool) -> None:
    """The request is sent, or there is another attempt after a delay."""

    async def run() -> None:
        world = World(tmp_path, monkeypatch, body)
        exchange = await connecting(world)
        assert world.opened is not None
        if is_open:
            world.opened.set_result(None)
        else:
            world.opened.set_exception(httpx.ConnectError("refused"))
        await turns()
        check_resources(world, exchange)
        if is_open:
            world.receive(HALF + b"half")
            check_resources(world, exchange)
        assert exchange.phase == (states.DONE if is_open else states.BACKING_OFF)

    virtual_time.run(run())


@each("is_open", [True, False])
def test_a_connection_that_was_closed_while_idle_is_replaced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_open: bool
) -> None:
    """It is the same attempt (RFC 9110 section 9.2.2); a second failure is that of a request that was sent."""

    async def run() -> None:
        world = World(tmp_path, monkeypatch)
        exchange = await sent(world)
        world.opened = asyncio.get_running_loop().create_future()
        world.upstream[-1].connection_lost(None)
        await turns()
        check_resources(world, exchange)
        assert exchange.task is not None
        assert not world.outcomes
        if is_open:
            world.opened.set_result(None)
            await turns()
            check_resources(world, exchange)
            assert world.upstream[-1]._transport.sent == world.upstream[0]._transport.sent
            world.upstream[-1].connection_lost(None)
        else:
            world.opened.set_exception(httpx.ConnectError("refused"))
        await turns()
        assert exchange.states.phase == states.BACKING_OFF
        assert exchange.cause == "upstream_reset"
        assert exchange.exchange.has_reached
        assert world.outcomes == FAILURE
        check_resources(world, exchange)

    virtual_time.run(run())


@BODIES
@each("has_failed", [True, False])
@each("is_available", [True, False])
def test_the_end_of_a_delay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: Body, *, has_failed: bool, is_available: bool
) -> None:
    """The next attempt begins; without a target for it, what the last one came to is final."""
    if body.rest and not has_failed:
        return  # not retried: the rest of the body goes to the target that has responded
    first = IGNORED if body.rest else FAILURE

    async def run() -> None:
        world = World(tmp_path, monkeypatch, body)
        exchange = await sent(world)
        if has_failed:
            lose(world, exchange)
        else:
            world.receive(RETRIED)
        world.target.is_healthy = is_available
        delay = exchange.delay
        assert delay is not None
        delay._run()
        await turns()
        check_resources(world, exchange)
        assert exchange.exchange.attempts == 1 + is_available
        if is_available:
            assert exchange.phase == states.EXCHANGING
            assert exchange.exchange.retried == ("upstream_reset" if has_failed else "503",)
            world.receive(HALF + b"half")
            assert b"".join(world.upstream[-1]._transport.sent).endswith(b"\r\n\r\n" + body.first)
        assert exchange.states.phase == states.DONE
        status = 200 if is_available else 502 if has_failed else 503
        assert [one.status for one in world.ended] == [status]
        assert Counter(world.outcomes) == Counter(first + SUCCESS if is_available else first)
        check_resources(world, exchange)

    virtual_time.run(run())


def test_a_delay_and_a_deadline_of_an_ended_exchange_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if they fire: their generation has passed, which is what counts where cancelling comes too late."""

    async def run() -> None:
        world = World(tmp_path, monkeypatch, NO_BODY)
        exchange = await sent(world)
        lose(world, exchange)
        assert exchange.states.phase == states.BACKING_OFF
        generation, last = exchange.generation, exchange._last_attempt
        exchange.on_client_disconnected()
        assert exchange.generation != generation
        assert exchange.delay is exchange.timer is None
        exchange._last_attempt = last  # as if nothing else told that it is over
        exchange._on_delay(generation)
        exchange._on_deadline(generation)
        await turns()
        assert exchange.exchange.attempts == 1
        assert len(world.ended) == 1
        check_resources(world, exchange)

    virtual_time.run(run())


@BODIES
def test_a_connection_that_opens_as_the_client_leaves_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: Body
) -> None:
    async def run() -> None:
        world = World(tmp_path, monkeypatch, body)
        exchange = await connecting(world)
        assert world.opened is not None
        world.opened.set_result(None)  # the task runs at the next turn
        exchange.on_client_disconnected()
        await turns()
        check_resources(world, exchange)
        assert all(connection.is_closed for connection in world.upstream)
        assert world.pool.is_empty

    virtual_time.run(run())


@BODIES
@each("situation", sorted(SITUATIONS.keys() - {"admitting", "selecting", "falling back"}))
def test_a_late_reply_of_the_store_is_dropped_in_every_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, situation: str, body: Body
) -> None:
    """A reply after the end of its exchange, or a second one to the same question. The charge stays."""

    async def run() -> None:
        world = World(tmp_path, monkeypatch, body)
        world.limiter.is_remote = world.limiter.replies_at_once = True
        begin, _ = SITUATIONS[situation]
        exchange = await begin(world)
        (reply,) = world.limiter.asked
        if situation == "waiting":
            reply()
            assert exchange.phase == states.EXCHANGING
            assert exchange.request_body == body.state
        before = exchange.states
        for _ in range(2):
            reply()
        await turns()
        assert exchange.states == before
        assert not world.limiter.settled
        assert not world.recorder.illegal_exchange_events
        check_resources(world, exchange)

    virtual_time.run(run())


@each("event", ["the client leaves", "the drain ends"])
def test_a_reply_to_an_exchange_that_was_aborted_meanwhile_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """A client that leaves before the decision of the store is charged."""

    async def run() -> None:
        world = World(tmp_path, monkeypatch)
        exchange = await waiting(world)
        (reply,) = world.limiter.asked
        EVENTS[event][0](world, exchange)
        reply()
        assert exchange.phase == states.ABORTED
        check_resources(world, exchange)
        assert not world.limiter.settled
        assert not world.recorder.illegal_exchange_events

    virtual_time.run(run())


if __name__ == "__main__":
    PAGE.write_text(page_with(picture()))
