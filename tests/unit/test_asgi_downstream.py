"""The exchange by ASGI without a socket: messages, disconnects, cancellation, middleware, and the task that sends."""

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest

from api_gateway.circuit_breaker import CircuitBreaker
from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.errors import CredentialsInvalid, RateLimited, ResponseIncomplete
from api_gateway.exchanges import asgi_downstream
from api_gateway.exchanges.fast_path import FastPath
from api_gateway.http1.asgi import SERVER_EXTENSION, Message, Receive, Scope, Send
from api_gateway.limits.ratelimit_headers import RateLimitHeaders
from api_gateway.metrics import Recorder
from api_gateway.middleware import EXCHANGE, ExchangeRecords
from api_gateway.models import Exchange, HeaderList, Quota
from api_gateway.proxy.admission import Admission, RequestPlan, StageResult
from api_gateway.proxy.header_facts import HeaderFacts, HeaderReader
from api_gateway.proxy.open_exchanges import OpenExchanges
from api_gateway.proxy.route_table import Route, RouteTable
from api_gateway.proxy.stages import (
    AmbiguityStage,
    DeadlineStage,
    FinalRecipientStage,
    IdentityStage,
    RouteStage,
)
from api_gateway.resilience.breaker_policy import BreakerPolicy
from api_gateway.resilience.priorities import SINGLE_PRIORITY
from api_gateway.resilience.retry import RetryPolicy
from api_gateway.router import Router
from api_gateway.transport.httpx_call import RUNNING
from api_gateway.upstreams.load_balancing import round_robin
from api_gateway.upstreams.target import Target
from api_gateway.upstreams.upstream import Upstream
from api_gateway.upstreams.upstream_client import Timeouts, UpstreamClient
from tests.kit import soon, turns
from tests.virtual_time import in_virtual_time

FREE = Quota.per_second("FREE", 1, 10)
LAST: Message = {"type": "http.request", "body": b"", "more_body": False}
GONE: Message = {"type": "http.disconnect"}
OMITTED = frozenset({b"date", b"server"})


class Dripping(httpx.AsyncByteStream):
    """A body without end, and whether it was closed."""

    is_closed = False
    given = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.001)
            self.given += 10_000
            yield b"x" * 10_000

    async def aclose(self) -> None:
        self.is_closed = True


class Pieces(httpx.AsyncByteStream):
    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


class Stub(httpx.AsyncBaseTransport):
    """An upstream that responds, drips its body, fails at once, or never answers."""

    status = 200
    pieces: tuple[Any, ...] = (b"o", b"k")
    headers: HeaderList = [(b"X-Up", b"1"), (b"Date", b"today"), (b"Content-Length", b"2")]  # noqa: RUF012 - replaced

    def __init__(self, kind: str = "responding") -> None:
        self.kind = kind
        self.requests: list[httpx.Request] = []
        self.bodies: list[bytes] = []
        self.body = Dripping()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.kind == "silent":
            await asyncio.Event().wait()
        if self.kind == "failing":
            await asyncio.sleep(0.01)
            raise httpx.ReadError("reset")
        if self.kind == "dripping":
            return httpx.Response(200, stream=self.body)
        if self.kind == "early":
            return httpx.Response(413, headers=[(b"Content-Length", b"2")], stream=Pieces(b"no"))
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self.bodies.append(b"".join([piece async for piece in request.stream]))
        body = Pieces() if request.method == "HEAD" or self.status in (204, 304) else Pieces(*self.pieces)
        extensions = {"reason_phrase": b"Fine"}
        return httpx.Response(self.status, headers=self.headers, stream=body, extensions=extensions)


class Refusing:
    """A stage that does what it is told. Implements `Stage`, without the base class of stages, which is compiled."""

    do: Callable[[], StageResult] = staticmethod(lambda: None)

    def decide(self, _plan: RequestPlan) -> StageResult:
        return self.do()

    def inspect(self, _plan: RequestPlan) -> StageResult:
        return self.do()

    def concerns(self, _facts: HeaderFacts) -> bool:
        return True


class World:
    """A gateway without limits in front of a stub."""

    def __init__(self, folder: Path, stub: Stub, total: float | None = None, limit: int = 100) -> None:
        self.stub = stub
        self.breaker = CircuitBreaker(BreakerPolicy(10_000), 0.0)
        self.target = Target("http://up.test")
        upstream = Upstream("up", [self.target], self.breaker, round_robin)
        client = UpstreamClient(upstream, stub, Timeouts(1, 1, 1, total), retry=RetryPolicy(10_000, budget=1.0))
        router = Router(
            RouteTable([Route("all", "/api", "up")]),
            {"up": client},
            clock=time.monotonic,
            max_body_bytes=limit,
            omit=OMITTED,
            observe_attempt=lambda *_: None,
            on_transition=lambda *_: None,
        )
        self.refusing = Refusing()
        admission = Admission(
            [
                AmbiguityStage(),
                IdentityStage(
                    clients=ClientRegistry({"FREE": FREE}, "FREE", {}, SqliteClientStore(folder)),
                    priorities=SINGLE_PRIORITY,
                ),
                RouteStage(router.routes),
                DeadlineStage({"up": total}),
                self.refusing,
                FinalRecipientStage(),
            ]
        )
        self.recorder = Recorder(["all"], ["up"], ["FREE"], [50], 0.0)
        self.ended: list[Exchange] = []
        self.open_exchanges = OpenExchanges()
        self.app = FastPath(
            record=ExchangeRecords(recorder=self.recorder, observers=[self.ended.append]),
            admission=admission,
            headers=HeaderReader(id_header="X-Client-ID", trusted_proxies=(), max_body_bytes=limit),
            router=router,
            limit_headers=RateLimitHeaders(),
            clock=time.monotonic,
            clock_ns=time.monotonic_ns,
            open_exchanges=self.open_exchanges,
        ).serve

    @property
    def exchange(self) -> Exchange:
        """The record of the request, which has ended."""
        (exchange,) = self.ended
        assert exchange.finished
        assert (self.recorder.in_flight, self.target.in_flight) == (0, 0)
        assert list(self.open_exchanges) == []
        return exchange


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, Stub())


def http(method: str = "GET", *headers: tuple[bytes, bytes], path: str = "/api/x", **options: Any) -> Scope:
    """Return the scope of a request as another server makes it."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": [(b"host", b"gateway.test"), *headers],
        "client": ("192.0.2.1", 1),
    } | options


class Client:
    """The client: messages that it sends, and those that it gets, with the task that sent each."""

    def __init__(self, *messages: Message) -> None:
        self._messages = list(messages)
        self.got: list[Message] = []
        self.senders: set[Any] = set()

    async def receive(self) -> Message:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def send(self, message: Message) -> None:
        self.senders.add(asyncio.current_task())
        self.got.append(message)

    @property
    def status(self) -> int:
        return int(self.got[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.got[1:])

    @property
    def is_complete(self) -> bool:
        return bool(self.got) and self.got[-1].get("more_body", True) is False

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.got[0]["headers"] if key.lower() == name]


def piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def ask(world: World, scope: Scope, *messages: Message) -> Client:
    client = Client(*messages)
    await asyncio.wait_for(world.app(scope, client.receive, client.send), 5)
    return client


# Requests and responses


async def test_a_request_and_its_response_are_forwarded(world: World) -> None:
    client = await ask(world, http("GET", (b"x-own", b"1"), path="/api/a%2Fb", query_string=b"q=1"))
    (request,) = world.stub.requests
    assert (request.method, request.extensions["target"]) == ("GET", b"/api/a%2Fb?q=1")
    sent = dict(request.headers.raw)
    assert (sent[b"x-own"], sent[b"host"], sent[b"x-forwarded-for"]) == (b"1", b"up.test", b"192.0.2.1")
    start = client.got[0]
    assert (start["type"], start["status"], start["reason"]) == ("http.response.start", 200, b"Fine")
    assert (client.all(b"x-up"), client.all(b"date"), client.all(b"content-length")) == ([b"1"], [], [b"2"])
    assert (client.body, client.is_complete) == (b"ok", True)
    exchange = world.exchange
    assert (exchange.status, exchange.source, exchange.bytes_out, exchange.reason) == (200, "upstream", 2, None)
    assert (exchange.client_address, exchange.path) == ("192.0.2.1", "/api/a%2Fb")


@pytest.mark.parametrize(
    ("part", "sent"),
    [
        ({"headers": [[b"host", b"gateway.test"]]}, {}),
        ({"headers": iter([(bytearray(b"host"), memoryview(b"gateway.test"))])}, {}),
        ({"client": ["192.0.2.1", 1]}, {}),
        ({"client": ("192.0.2.1", None)}, {}),
        ({"client": None}, {b"x-forwarded-for": b"unknown"}),
        ({"query_string": None, "raw_path": None, "path": "/api/é"}, {b"target": b"/api/%C3%A9"}),
        ({"query_string": bytearray(b"q=1")}, {b"target": b"/api/x?q=1"}),
    ],
    ids=["lists", "buffers", "list", "no port", "no client", "none", "query"],
)
async def test_a_server_may_leave_out_what_is_optional_and_pass_other_types(
    world: World, part: Scope, sent: dict[bytes, bytes]
) -> None:
    client = await ask(world, {**http(), **part})
    (request,) = world.stub.requests
    found = dict(request.headers.raw) | {b"target": request.extensions["target"]}
    wanted = {b"host": b"up.test", b"x-forwarded-host": b"gateway.test", b"x-forwarded-for": b"192.0.2.1"}
    assert found | wanted | sent == found
    assert (client.status, client.body) == (200, b"ok")


async def test_optional_keys_of_a_scope_may_be_absent(world: World) -> None:
    scope = http()
    for key in ("raw_path", "query_string", "scheme", "client"):
        del scope[key]
    assert (await ask(world, scope)).status == 200
    assert world.stub.requests[0].extensions["target"] == b"/api/x"
    del (scope := http())["headers"]
    assert (await ask(world, scope)).status == 400, "it has no Host"


async def test_bodies_may_be_any_objects_with_a_buffer(world: World) -> None:
    world.stub.pieces = (bytearray(b"o"), memoryview(b"k"))
    pieces: list[Message] = [
        {"type": "http.request", "body": bytearray(b"ab"), "more_body": 1},
        {"type": "http.request", "body": memoryview(b"c")},
    ]
    client = await ask(world, http("POST", (b"content-length", b"3")), *pieces)
    assert (client.status, client.body, world.stub.bodies) == (200, b"ok", [b"abc"])
    assert [type(message["body"]) for message in client.got[1:]] == [bytes] * (len(client.got) - 1)


@pytest.mark.parametrize("status", [200, 204, 304])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_body_is_not_framed_and_complete_with_its_last_message(world: World, method: str, status: int) -> None:
    """The server frames it. Other servers than the gateway's own announce what they are told, so 304 has no length."""
    world.stub.status, world.stub.headers = status, [(b"Transfer-Encoding", b"chunked")]
    client = await ask(world, http(method))
    assert client.all(b"transfer-encoding") == []
    assert client.body == (b"ok" if method == "GET" and status == 200 else b"")
    assert client.is_complete
    world.stub.headers = [(b"Content-Length", b"2")]
    assert (await ask(world, http(method))).all(b"content-length") == ([b"2"] if status == 200 else [])


async def test_a_body_arrives_piece_by_piece_and_is_counted(world: World) -> None:
    fields = (b"content-length", b"3"), (b"expect", b"100-continue")
    client = await ask(world, http("POST", *fields), piece(b"ab", more=True), piece(b"c", more=False))
    assert (client.status, world.stub.bodies, world.exchange.bytes_in) == (200, [b"abc"], 3)
    assert "expect" not in world.stub.requests[0].headers, "the server has sent 100 (Continue)"


async def test_a_chunked_body_above_the_limit_is_refused_with_the_piece_that_exceeds_it(tmp_path: Path) -> None:
    world = World(tmp_path, Stub(), limit=3)
    pieces = piece(b"abc", more=True), piece(b"d", more=True)
    client = await ask(world, http("POST", (b"transfer-encoding", b"chunked")), *pieces)
    assert (client.status, world.exchange.reason, world.stub.bodies) == (413, "body_too_large", [])
    client = await ask(world, http("POST", (b"content-length", b"4")))
    assert client.status == 413, "without reading the body"


@pytest.mark.parametrize(
    "pieces",
    [
        [piece(b"a", more=False)],
        [piece(b"abc", more=True)],
        [piece(b"abc", more=False)],
        [piece(b"ab", more=True), piece(b"c", more=False)],
    ],
    ids=["short", "long at once", "long and complete", "long at the end"],
)
async def test_a_body_that_middleware_has_given_another_length_is_refused(world: World, pieces: list[Message]) -> None:
    """It would be read as the beginning of another request."""
    client = await ask(world, http("POST", (b"content-length", b"2")), *pieces)
    assert (client.status, world.exchange.reason) == (500, "internal_error")
    assert world.stub.bodies == []


@pytest.mark.parametrize("length", [b"+2", b"2_0", b"two", b"2, 2", b"9" * 5_000])
async def test_a_length_that_is_no_number_is_refused(world: World, length: bytes) -> None:
    """No parser passes one; middleware may."""
    client = await ask(world, http("POST", (b"content-length", length)), piece(b"ab", more=False))
    assert (client.status, world.exchange.reason) == (400, "bad_request")
    assert world.stub.bodies == []


async def test_an_early_response_ends_the_body(tmp_path: Path) -> None:
    world = World(tmp_path, Stub("early"))
    client = await ask(world, http("POST", (b"content-length", b"9")), piece(b"ab", more=True))
    assert (client.status, client.body, client.is_complete) == (413, b"no", True)
    assert world.exchange.source == "upstream"


async def test_a_body_is_not_received_faster_than_the_upstream_takes_it(tmp_path: Path) -> None:
    world = World(tmp_path, Stub("silent"), limit=10_000_000)
    received = 0

    async def receive() -> Message:
        nonlocal received
        received += 1
        return piece(b"x" * 10_000, more=True)

    client = Client()
    task = asyncio.create_task(world.app(http("POST", (b"transfer-encoding", b"chunked")), receive, client.send))
    await soon(lambda: bool(world.stub.requests), "it is with the upstream")
    await turns(100)
    assert 5 < received < 20
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.exchange.reason == "draining"


@in_virtual_time
async def test_a_response_is_not_read_faster_than_the_client_reads(tmp_path: Path) -> None:
    world = World(tmp_path, Stub("dripping"))
    gate = asyncio.Event()

    async def send(_message: Message) -> None:
        await gate.wait()

    task = asyncio.create_task(world.app(http(), Client().receive, send))
    await soon(lambda: world.stub.body.given > 60_000, "the upstream responds")
    await asyncio.sleep(0.1)
    assert world.stub.body.given < 150_000
    before = world.stub.body.given
    gate.set()
    await soon(lambda: world.stub.body.given > before + 100_000, "it goes on")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await soon(lambda: world.stub.body.is_closed, "the response is closed")


@pytest.mark.parametrize("given", [b"a", b"x" * 128, b"7f3a-{}"])
async def test_a_request_id_is_taken_over(world: World, given: bytes) -> None:
    client = await ask(world, http("GET", (b"x-request-id", given)))
    assert world.exchange.id == given.decode()
    assert client.all(b"x-request-id") == [given]


@pytest.mark.parametrize("given", [[], [b""], [b"x" * 129], [b"a b"], [b"\xff"], [b"a", b"b"]])
async def test_a_request_id_that_cannot_be_used_is_made(world: World, given: list[bytes]) -> None:
    client = await ask(world, http("GET", *((b"x-request-id", value) for value in given)))
    assert re.fullmatch("[0-9a-f]{32}", world.exchange.id)
    assert client.all(b"x-request-id") == [world.exchange.id.encode()]


async def test_a_peer_without_address_is_unknown(world: World) -> None:
    await ask(world, http(client=None))
    assert world.exchange.client_address == "unknown"


async def test_options_to_the_final_recipient_are_answered(world: World) -> None:
    client = await ask(world, http("OPTIONS", (b"max-forwards", b"0")))
    assert (client.status, client.is_complete, world.stub.requests) == (204, True, [])
    assert b"GET" in client.all(b"allow")[0]
    assert world.exchange.status == 204
    await ask(world, http("OPTIONS", (b"max-forwards", b"1")))
    assert world.stub.requests[0].headers["max-forwards"] == "0"


# Refusals and defects


async def test_an_error_becomes_a_response_with_its_reason(world: World) -> None:
    error = RateLimited("Wait.", retry_after=2.5, extra={"tier": "FREE"})
    world.refusing.do = lambda: error
    client = await ask(world, http("GET", (b"x-request-id", b"id-1"), path="/api/ü"))
    body = json.loads(client.body)
    assert (client.status, client.is_complete, client.all(b"retry-after")) == (429, True, [b"3"])
    assert (body["reason"], body["detail"], body["instance"]) == ("rate_limited", "Wait.", "/api/%C3%BC")
    assert (body["request_id"], client.all(b"x-request-id")) == ("id-1", [b"id-1"])
    exchange = world.exchange
    assert (exchange.status, exchange.source, exchange.bytes_out) == (429, "gateway", len(client.body))


async def test_a_defect_is_a_500_and_is_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> StageResult:
        raise ZeroDivisionError("a secret of ours")

    world.refusing.do = fail
    with caplog.at_level(logging.ERROR):
        client = await ask(world, http("GET", (b"x-request-id", b"id-1")))
    assert (client.status, json.loads(client.body)["reason"]) == (500, "internal_error")
    assert b"secret" not in client.body
    (record,) = caplog.records
    assert "id-1" in record.getMessage()


async def test_a_cause_is_logged_and_not_sent_to_the_client(world: World) -> None:
    world.stub.kind = "failing"
    client = await ask(world, http("POST"))
    assert client.status == 502
    assert "reset" in (world.exchange.detail or "")
    assert b"reset" not in client.body.replace(b"upstream_reset", b"")


# The limit on a whole exchange


@pytest.mark.parametrize("kind", ["silent", "failing"])
@in_virtual_time
async def test_the_total_limit_ends_waiting_and_retrying(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path, Stub(kind), total=0.1)
    client = await ask(world, http())
    assert client.status in ((504,) if kind == "silent" else (502, 504)), "no time is left for a retry, or its attempt"
    assert client.is_complete
    assert world.exchange.status == client.status


@in_virtual_time
async def test_the_total_limit_ends_a_body_without_end(tmp_path: Path) -> None:
    """What has begun remains incomplete, and the server gets a message and an error that make it close."""
    world, client = World(tmp_path, Stub("dripping"), total=0.1), Client()
    with pytest.raises(ResponseIncomplete):
        await world.app(http(), client.receive, client.send)
    assert client.got.pop()["type"] == "http.response.cut"
    assert (client.status, client.is_complete, world.exchange.reason) == (200, False, "upstream_timeout")
    await soon(lambda: world.stub.body.is_closed, "the response is closed")


# A client that disconnects, and cancellation


@pytest.mark.parametrize("kind", ["silent", "dripping"])
@pytest.mark.parametrize("has_body", [False, True])
@in_virtual_time
async def test_a_client_that_disconnects_ends_the_exchange_without_a_fault(
    tmp_path: Path, kind: str, *, has_body: bool
) -> None:
    world, client = World(tmp_path, Stub(kind)), Client()

    async def leaves() -> Message:
        await soon(lambda: bool(world.stub.requests and (client.got or kind == "silent")), "the upstream responds")
        return GONE

    fields = [(b"content-length", b"2")] if has_body else []
    await asyncio.wait_for(world.app(http("PUT", *fields), leaves, client.send), 5)
    assert not client.is_complete
    calls = 1 if kind == "dripping" else 0  # the head of the response counts
    assert world.breaker.window_counts(time.monotonic())[:2] == (calls, 0)
    assert (world.exchange.status, world.exchange.reason) == (499, "client_disconnected")
    assert len(world.stub.requests) == 1
    await soon(lambda: not RUNNING, "the call has ended")


@in_virtual_time
async def test_polling_for_a_disconnect_yields_to_the_loop(world: World) -> None:
    """Another server, or a middleware, may say again and again that the body is complete."""
    asked = 0
    world.stub.kind = "silent"

    async def receive() -> Message:
        nonlocal asked
        asked += 1
        return LAST

    task = asyncio.create_task(world.app(http(), receive, Client().send))
    await asyncio.sleep(0.3)
    assert 1 <= asked < 20
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("has_body", [False, True])
async def test_a_cancellation_from_outside_stays_one(world: World, *, has_body: bool) -> None:
    """The server ends exchanges by cancelling them; that is not a client that left."""
    world.stub.kind = "silent"
    fields = [(b"content-length", b"2")] if has_body else []
    task = asyncio.create_task(world.app(http("PUT", *fields), Client().receive, Client().send))
    await soon(lambda: bool(world.stub.requests), "the upstream is asked")
    assert world.recorder.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (world.exchange.status, world.exchange.reason) == (499, "draining")


# What middleware relies on


async def test_only_the_task_that_called_sends_and_no_task_is_left(world: World) -> None:
    before = asyncio.all_tasks()
    fields = ((b"content-length", b"3"),)
    client = Client(piece(b"ab", more=True), piece(b"c", more=False))
    await world.app(http("POST", *fields), client.receive, client.send)
    assert client.senders == {asyncio.current_task()}
    assert asyncio.all_tasks() - before <= RUNNING


@in_virtual_time
async def test_no_receiver_is_left_behind_an_early_response(tmp_path: Path) -> None:
    world, receiving, ended = World(tmp_path, Stub("early")), list[str](), list[str]()

    async def receive() -> Message:
        receiving.append("begun")
        try:
            return await Client().receive()
        finally:
            await asyncio.sleep(0.01)
            ended.append("ended")

    await world.app(http("POST", (b"content-length", b"9")), receive, Client().send)
    assert (receiving, ended) == (["begun"], ["ended"])


async def test_context_variables_of_middleware_hold_where_it_receives_and_sends(world: World) -> None:
    of_request: ContextVar[str] = ContextVar("of_request", default="none")
    seen: list[str] = []
    client = Client(piece(b"ab", more=False))

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        of_request.set("this one")

        async def receiving() -> Message:
            seen.append(of_request.get())
            return await receive()

        async def sending(message: Message) -> None:
            seen.append(of_request.get())
            await send(message)

        await world.app(scope, receiving, sending)

    await middleware(http("POST", (b"content-length", b"2")), client.receive, client.send)
    assert len(seen) > 2
    assert set(seen) == {"this one"}


@pytest.mark.parametrize("kind", ["silent", "dripping"])
@in_virtual_time
async def test_cancel_scopes_of_anyio_work_around_and_within(tmp_path: Path, kind: str) -> None:
    """A scope of a middleware ends the exchange; one that is entered for a message is left by the same task."""
    world, client = World(tmp_path, Stub(kind)), Client()

    async def receive() -> Message:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)
            return await client.receive()
        raise AssertionError

    async def send(message: Message) -> None:
        with anyio.fail_after(5):
            await client.send(message)

    with anyio.move_on_after(0.2) as scope:
        await world.app(http("PUT", (b"content-length", b"2")), receive, send)
    assert scope.cancelled_caught
    assert world.exchange.reason == "draining"


async def test_a_failing_receive_is_a_500(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> Message:
        raise ValueError("of a middleware")

    client = Client()
    await world.app(http("POST", (b"content-length", b"2")), receive, client.send)
    assert (client.status, client.is_complete, world.exchange.reason) == (500, True, "internal_error")
    assert "of a middleware" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError("closed"), "client_disconnected"), (ValueError("of a middleware"), "internal_error")],
)
async def test_a_failing_send_ends_the_exchange(tmp_path: Path, error: Exception, reason: str) -> None:
    world = World(tmp_path, Stub("dripping"))
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 2:
            raise error

    await asyncio.wait_for(world.app(http(), Client().receive, send), 5)
    assert (world.exchange.reason, len(sent)) == (reason, 2)
    await soon(lambda: world.stub.body.is_closed, "the response is closed")


async def test_a_failing_send_behind_the_end_is_the_callers(world: World) -> None:
    async def send(_message: Message) -> None:
        await soon(lambda: bool(world.ended), "the upstream has responded")
        raise ValueError("of a middleware")

    with pytest.raises(ValueError, match="of a middleware"):
        await world.app(http(), Client().receive, send)
    assert world.exchange.status == 200


class Extension:
    """The extension of the gateway's own server, as far as it is used."""

    def __init__(self, headers: HeaderList, target: bytes = b"/api/x") -> None:
        self.headers, self.target = headers, target
        self.trailers: HeaderList = []
        self.upgrade = b""
        self.is_disconnected = self.is_stopping = False
        self.on_disconnect: Callable[[], object] | None = None
        self.on_shutdown: Callable[[], object] | None = None
        self.calls: Counter[str] = Counter()
        self.connection = SimpleNamespace(transport=SimpleNamespace(abort=self._abort))

    def _abort(self) -> None:
        assert self.on_disconnect is not None
        self.on_disconnect()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.calls.update([name])


SENT: HeaderList = [(b"Host", b"gateway.test"), (b"X-Own", b"1")]


def on_own_server(scope: Scope, extension: Extension | None = None) -> Scope:
    """Return the scope of a request on the gateway's own server."""
    scope[SERVER_EXTENSION] = extension or Extension(SENT)
    return scope


async def test_the_upstream_gets_header_fields_in_the_spelling_of_the_client(world: World) -> None:
    await ask(world, on_own_server(http("GET", (b"x-own", b"1"))))
    assert (b"X-Own", b"1") in world.stub.requests[0].headers.raw


@pytest.mark.parametrize("has_extension", [False, True])
async def test_header_fields_that_middleware_has_replaced_identify_the_client_and_are_forwarded(
    world: World, *, has_extension: bool
) -> None:
    scope = http("GET", (b"x-own", b"2"), (b"x-client-id", b"acme"))
    if has_extension:
        on_own_server(scope)
    await ask(world, scope)
    assert world.exchange.client is not None
    assert world.exchange.client.id == "acme"
    sent = dict(world.stub.requests[0].headers.raw)
    assert (sent[b"x-own"], sent[b"x-client-id"]) == (b"2", b"acme")


@pytest.mark.parametrize("is_gone", [False, True], ids=["later", "before"])
async def test_the_own_server_reports_that_the_client_has_left(world: World, *, is_gone: bool) -> None:
    world.stub.kind = "silent"
    extension = Extension(SENT)
    extension.is_disconnected = is_gone
    scope = on_own_server(http("GET", (b"x-own", b"1")), extension)
    task = asyncio.create_task(world.app(scope, Client().receive, Client().send))
    if not is_gone:
        await soon(lambda: bool(world.stub.requests), "the upstream is asked")
        assert extension.on_disconnect is not None
        extension.on_disconnect()
    await asyncio.wait_for(task, 5)
    assert world.exchange.reason == "client_disconnected"
    assert extension.on_disconnect is extension.on_shutdown is None


@pytest.mark.parametrize("has_extension", [False, True])
async def test_a_stream_can_be_ended_with_its_credential(tmp_path: Path, *, has_extension: bool) -> None:
    world, client = World(tmp_path, Stub("dripping")), Client()
    scope = http("GET", (b"x-own", b"1"))
    if has_extension:
        on_own_server(scope)
    task = asyncio.create_task(world.app(scope, client.receive, client.send))
    await soon(lambda: len(client.got) > 1, "the response has begun")
    (one,) = world.open_exchanges
    assert one.exchange is scope[EXCHANGE]
    scope[EXCHANGE].credential = SimpleNamespace(fields=())
    one.end(CredentialsInvalid("It has been revoked."))
    with nullcontext() if has_extension else pytest.raises(ResponseIncomplete):  # the own connection has been aborted
        await asyncio.wait_for(task, 5)
    assert (client.is_complete, world.exchange.reason) == (False, "credentials_invalid")
    assert one.exchange is None
    one.end(CredentialsInvalid("Once more."))


async def test_what_has_ended_is_released_without_the_garbage_collector(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    run = asgi_downstream.AsgiDownstream.run

    def noting(self: Any) -> Awaitable[None]:
        made.append(self)
        return run(self)

    monkeypatch.setattr(asgi_downstream.AsgiDownstream, "run", noting)
    await ask(world, http("POST", (b"content-length", b"2")), piece(b"ab", more=False))
    (one,) = made
    assert (one._exchange, one._body, one._receiver) == (None, None, None)
