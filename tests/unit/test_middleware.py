"""The middleware steps of a proxied request, each alone: small inner applications, fixed clocks, no server."""

import asyncio
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from api_gateway.clients.registry import ClientRegistry
from api_gateway.clients.sqlite_store import SqliteClientStore
from api_gateway.errors import (
    ClientDisconnected,
    ClientIdInvalid,
    CostExceedsCapacity,
    GatewayError,
    MethodNotAllowed,
    NoRoute,
    RateLimited,
    UpstreamReset,
)
from api_gateway.http1.asgi import FIELDS, ASGIApp, Message, Receive, Scope, Send
from api_gateway.http1.headers import fields_of
from api_gateway.metrics import Recorder
from api_gateway.middleware import (
    EXCHANGE,
    IS_TRUSTED,
    ROUTE,
    DataPlaneSlot,
    DataPlaneSplit,
    ExchangeMiddleware,
    IdentityMiddleware,
    ProxyApp,
    RateLimitMiddleware,
    RoutingMiddleware,
)
from api_gateway.models import NANOSECONDS, Charge, Client, Exchange, HeaderList, Quota
from api_gateway.proxy.route_table import CostRule, Route, RouteTable
from api_gateway.rate_limiter import MemoryLimiter
from api_gateway.router import Router
from tests.kit import FakeClock

HOST = (b"host", b"gateway.test")
FREE = Quota.per_second("FREE", 1, 10)
PREMIUM = Quota.per_second("PREMIUM", 20, 200)
ADDRESS = Quota.per_second("address", 2, 4)
STRANGER = Client("acme", "client:acme", FREE, "default")


# What the steps are called with


def http(
    path: str = "/api/users",
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    peer: str | None = "192.0.2.7",
    host: tuple[bytes, bytes] = HOST,
) -> Scope:
    """Return the scope of a request as a server makes it, and `ExchangeMiddleware` completes it."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "headers": [host, *headers],
        FIELDS: fields_of([host, *headers]),
        "client": None if peer is None else (peer, 50_000),
    }


@dataclass
class Answer:
    """What was sent."""

    messages: list[Message] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> HeaderList:
        headers: HeaderList = self.messages[0]["headers"]
        return headers

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]

    def json(self) -> Any:
        assert [message["type"] for message in self.messages] == ["http.response.start", "http.response.body"]
        assert self.messages[1]["more_body"] is False
        body = self.messages[1]["body"]
        assert self.all(b"content-length") == [str(len(body)).encode()]
        return json.loads(body)


async def unread() -> Message:
    raise AssertionError("nothing here reads the body")


async def ask(app: ASGIApp, scope: Scope) -> Answer:
    """Call an application and return what it sent."""
    answer = Answer()
    await app(scope, unread, answer.send)
    return answer


async def answers(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer as the router does: the exchange is told first."""
    exchange = scope.get(EXCHANGE)
    own = exchange.response_headers if exchange else []
    if exchange:
        exchange.status, exchange.source = 200, "upstream"
    await send({"type": "http.response.start", "status": 200, "headers": own})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


async def never(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise AssertionError("the next step was called")


def raises(error: BaseException) -> ASGIApp:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise error

    return app


# Split


def split(inner: ASGIApp, data_plane: ASGIApp | None = None) -> DataPlaneSplit:
    switch = DataPlaneSlot()
    if data_plane is not None:
        switch.data_plane = data_plane
    return DataPlaneSplit(inner, switch=switch)


@pytest.mark.parametrize("path", ["/api", "/api/", "/api/users", "/api//", "/api/../health"])
async def test_api_and_all_below_it_goes_to_the_data_plane(path: str) -> None:
    assert (await ask(split(never, answers), http(path))).status == 200


@pytest.mark.parametrize("path", ["/health", "/apix", "/apis/x", "/", "", "/ap", "/API/users", "//api", "/x/api"])
async def test_all_else_goes_to_the_operators_application(path: str) -> None:
    assert (await ask(split(answers, never), http(path))).status == 200


async def test_the_lifespan_goes_to_the_operators_application() -> None:
    called = []

    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        called.append(scope["type"])

    await ask(split(app, never), {"type": "lifespan"})
    assert called == ["lifespan"]


@pytest.mark.parametrize("path", ["/api", "/api/chat"])
async def test_a_websocket_below_api_is_closed_and_not_dropped(path: str) -> None:
    answer = await ask(split(never, never), {"type": "websocket", "path": path})
    (message,) = answer.messages
    assert (message["type"], message["code"]) == ("websocket.close", 1013)
    assert "WebSocket" in message["reason"]


async def test_before_the_start_the_gateway_is_not_ready_yet() -> None:
    answer = await ask(split(never), http("/api/users"))
    body = answer.json()
    assert (answer.status, body["reason"], body["instance"]) == (503, "draining", "/api/users")
    assert answer.all(b"retry-after") == [b"1"]
    assert answer.all(b"content-type") == [b"application/problem+json"]


# Record


class Recording:
    """A `ExchangeMiddleware` around some application, and all that can be seen of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.clock = FakeClock(100.0)
        self.recorder = Recorder([], [], [], [50], 100.0)
        self.seen: list[Exchange] = []
        self.in_flight: list[int] = []
        self._inner = app
        self.app = ExchangeMiddleware(
            self._watched,
            clock=self.clock,
            recorder=self.recorder,
            observers=[self.seen.append, lambda _: self.in_flight.append(self.recorder.in_flight)],
        )

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.in_flight.append(self.recorder.in_flight)
        self.clock.advance(0.25)
        await self._inner(scope, receive, send)

    @property
    def exchange(self) -> Exchange:
        """The finished exchange, which every observer got once."""
        (exchange,) = self.seen
        assert self.in_flight in ([1, 0], [0])
        assert self.recorder.in_flight == 0
        return exchange


async def test_the_record_of_a_request_goes_to_the_observers_once_it_is_finished() -> None:
    recording = Recording(answers)
    await ask(recording.app, http("/api/users/7", method="PUT"))
    exchange = recording.exchange
    assert (exchange.method, exchange.path, exchange.peer) == ("PUT", "/api/users/7", "192.0.2.7")
    assert (exchange.started, exchange.finished) == (100.0, 100.25)
    assert (exchange.status, exchange.source, exchange.reason) == (200, "upstream", None)
    assert recording.in_flight == [1, 0]


@pytest.mark.parametrize("given", [b"a", b"x" * 128, b"7f3a-{}"])
async def test_a_request_id_is_taken_over(given: bytes) -> None:
    recording = Recording(answers)
    answer = await ask(recording.app, http("/api", (b"X-Request-ID", given)))
    assert recording.exchange.id == given.decode()
    assert answer.all(b"x-request-id") == [given]


@pytest.mark.parametrize(
    "given", [[], [b""], [b"x" * 129], [b"a b"], [b"\xff"], [b"a\r\nSet-Cookie: b"], [b"a", b"b"]]
)
async def test_a_request_id_that_cannot_be_used_is_made(given: list[bytes]) -> None:
    recording = Recording(answers)
    answer = await ask(recording.app, http("/api", *((b"x-request-id", value) for value in given)))
    assert re.fullmatch("[0-9a-f]{32}", recording.exchange.id)
    assert answer.all(b"x-request-id") == [recording.exchange.id.encode()]


async def test_every_request_without_an_id_gets_another() -> None:
    recording = Recording(answers)
    for _ in range(3):
        await ask(recording.app, http())
    assert len({exchange.id for exchange in recording.seen}) == 3


async def test_a_peer_without_address_is_unknown() -> None:
    recording = Recording(answers)
    await ask(recording.app, http(peer=None))
    assert recording.exchange.peer == "unknown"


async def test_an_error_becomes_a_response_with_its_reason() -> None:
    error = RateLimited("Wait.", retry_after=2.5, extra={"tier": "FREE"})
    recording = Recording(raises(error))
    answer = await ask(recording.app, http("/api/ü", (b"x-request-id", b"id-1")))
    assert answer.status == 429
    body = answer.json()
    assert (body["reason"], body["detail"], body["instance"]) == ("rate_limited", "Wait.", "/api/ü")
    assert (body["request_id"], body["tier"]) == ("id-1", "FREE")
    assert answer.all(b"retry-after") == [b"3"]
    assert answer.all(b"content-type") == [b"application/problem+json"]
    assert answer.all(b"cache-control") == [b"no-store"]
    assert answer.all(b"x-request-id") == [b"id-1"]
    exchange = recording.exchange
    assert (exchange.status, exchange.source, exchange.reason) == (429, "gateway", "rate_limited")
    assert exchange.detail == "Wait."
    assert exchange.bytes_out == len(answer.messages[1]["body"])


async def test_the_headers_that_earlier_steps_left_go_on_an_error_too() -> None:
    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        scope[EXCHANGE].response_headers.append((b"ratelimit", b"r"))
        raise NoRoute("No.")

    assert (await ask(Recording(app).app, http())).all(b"ratelimit") == [b"r"]


async def test_a_cause_is_logged_and_not_sent_to_the_client() -> None:
    error = UpstreamReset("It broke.")
    error.__cause__ = OSError("connection to 10.0.0.9 reset")
    recording = Recording(raises(error))
    answer = await ask(recording.app, http())
    assert "10.0.0.9" not in str(answer.messages)
    assert "10.0.0.9" in (recording.exchange.detail or "")


async def test_a_defect_is_a_500_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    recording = Recording(raises(ZeroDivisionError("a secret of ours")))
    with caplog.at_level(logging.ERROR):
        answer = await ask(recording.app, http("/api/x", (b"x-request-id", b"id-1")))
    body = answer.json()
    assert (answer.status, body["reason"]) == (500, "internal_error")
    assert "secret" not in str(body)
    assert (recording.exchange.status, recording.exchange.reason) == (500, "internal_error")
    (record,) = caplog.records
    assert "id-1" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("error", [UpstreamReset("It broke."), ValueError("defect")])
async def test_once_a_response_has_begun_nothing_more_is_sent(error: Exception) -> None:
    """Leaving it unfinished makes the server close the connection, which is how the client learns of it."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        scope[EXCHANGE].status, scope[EXCHANGE].source = 200, "upstream"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    recording = Recording(app)
    answer = await ask(recording.app, http())
    assert [message["type"] for message in answer.messages] == ["http.response.start"]
    exchange = recording.exchange
    assert (exchange.status, exchange.source) == (200, "upstream")
    assert exchange.reason == ("upstream_reset" if isinstance(error, UpstreamReset) else "internal_error")


@pytest.mark.parametrize("status", [0, 200])
async def test_a_client_that_left_is_sent_nothing(status: int) -> None:
    async def app(scope: Scope, _receive: Receive, _send: Send) -> None:
        scope[EXCHANGE].status = status
        raise ClientDisconnected("It left.")

    recording = Recording(app)
    assert (await ask(recording.app, http())).messages == []
    exchange = recording.exchange
    assert (exchange.status, exchange.source, exchange.reason) == (499, "gateway", "client_disconnected")


async def test_a_request_that_is_cancelled_is_recorded_and_stays_cancelled() -> None:
    called = asyncio.Event()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        called.set()
        await asyncio.Event().wait()

    recording = Recording(app)
    task = asyncio.create_task(ask(recording.app, http()))
    await called.wait()
    assert recording.recorder.in_flight == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (recording.exchange.status, recording.exchange.reason) == (499, "draining")


@pytest.mark.parametrize(
    "headers",
    [[], [HOST, HOST], [(b"host", b"a b")], [HOST, (b"transfer-encoding", b"gzip, chunked")]],
)
async def test_an_ambiguous_request_is_refused_before_any_other_step(headers: HeaderList) -> None:
    recording = Recording(never)
    answer = await ask(recording.app, {**http(), "headers": headers})
    assert (answer.status, answer.json()["reason"]) == (400, "bad_request")
    assert answer.all(b"connection") == [b"close"]
    assert recording.exchange.status == 400


# Identify


def begun(scope: Scope, client: Client | None = None, cost: float = 1.0) -> Exchange:
    """Put an exchange into the scope as `ExchangeMiddleware` does, and what the steps before this one wrote."""
    peer = scope["client"][0] if scope["client"] else "unknown"
    exchange = Exchange("id-1", scope["method"], scope["path"], peer, 100.0, client=client, cost=cost)
    scope[EXCHANGE] = exchange
    return exchange


@pytest.fixture
def identified(tmp_path: Path) -> Callable[..., Awaitable[Exchange]]:
    """Let `IdentityMiddleware` look at a request; return the exchange."""
    registry = ClientRegistry(
        {"FREE": FREE, "PREMIUM": PREMIUM}, "FREE", {"acme": "PREMIUM"}, SqliteClientStore(tmp_path / "unused")
    )

    async def identify(scope: Scope, *trusted: str, header: str = "X-Client-ID") -> Exchange:
        exchange = begun(scope)
        step = IdentityMiddleware(
            answers, clients=registry, header=header, trusted_proxies=[ip_network(one) for one in trusted]
        )
        assert (await ask(step, scope)).status == 200
        return exchange

    return identify


IdentifyIt = Callable[..., Awaitable[Exchange]]


@pytest.mark.parametrize(("name", "tier"), [(b"acme", "PREMIUM"), (b"initech", "FREE")])
async def test_a_client_is_whom_its_header_names(identified: IdentifyIt, name: bytes, tier: str) -> None:
    client = (await identified(http("/api", (b"x-client-id", name)))).client
    assert client is not None
    assert (client.id, client.quota.name, client.key) == (name.decode(), tier, f"client:{name.decode()}")


async def test_the_header_may_have_another_name(identified: IdentifyIt) -> None:
    scope = http("/api", (b"x-client-id", b"one"), (b"X-KEY", b"two"))
    client = (await identified(scope, header="X-Key")).client
    assert client is not None
    assert client.id == "two"


@pytest.mark.parametrize(
    ("peer", "identity"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        (None, "unknown"),
    ],
)
async def test_a_client_without_a_name_is_its_address(identified: IdentifyIt, peer: str | None, identity: str) -> None:
    scope = http("/api", (b"x-forwarded-for", b"203.0.113.9"), peer=peer)
    exchange = await identified(scope)
    assert exchange.client is not None
    assert (exchange.client.id, exchange.client.source) == (identity, "address")
    assert exchange.peer == (peer or "unknown")
    assert scope[IS_TRUSTED] is False


async def test_behind_a_trusted_proxy_the_peer_is_the_one_it_names(identified: IdentifyIt) -> None:
    scope = http("/api", (b"x-forwarded-for", b"198.51.100.1, 2001:db8:1:2::9"), peer="10.0.0.1")
    exchange = await identified(scope, "10.0.0.0/8")
    assert exchange.peer == "2001:db8:1:2::9"
    assert exchange.client is not None
    assert exchange.client.id == "2001:db8:1:2::/64"
    assert scope[IS_TRUSTED] is True


async def test_an_untrusted_peer_is_not_trusted_because_another_is(identified: IdentifyIt) -> None:
    scope = http("/api", (b"x-forwarded-for", b"203.0.113.9"), peer="192.0.2.7")
    assert (await identified(scope, "10.0.0.0/8")).peer == "192.0.2.7"
    assert scope[IS_TRUSTED] is False


async def test_a_client_id_that_is_none_goes_no_further(tmp_path: Path) -> None:
    registry = ClientRegistry({"FREE": FREE}, "FREE", {}, SqliteClientStore(tmp_path))
    step = IdentityMiddleware(never, clients=registry, header="X-Client-ID", trusted_proxies=[])
    scope = http("/api", (b"x-client-id", b"a b"))
    exchange = begun(scope)
    with pytest.raises(ClientIdInvalid):
        await ask(step, scope)
    assert exchange.client is None


# Match

EXPORT = CostRule(frozenset({"POST"}), "/api/users/export", 5.0)
USERS = Route("users", "/api/users", "people", methods=frozenset({"GET", "POST"}), cost=2.0, costs=(EXPORT,))
PARTNER = Route("partner", "/api/users", "people", host="partner.test")


class SilentRouter(Router):
    """A router with routes and no services, which remembers what it was to forward."""

    def __init__(self, *routes: Route) -> None:
        super().__init__(
            RouteTable(routes),
            {},
            clock=lambda: 100.0,
            max_body_bytes=0,
            observe_attempt=lambda *_: None,
            on_transition=lambda *_: None,
        )
        self.forwarded: list[tuple[Any, ...]] = []

    async def forward(self, *arguments: Any, **options: Any) -> None:
        self.forwarded.append((*arguments, options))


def matching(inner: ASGIApp) -> RoutingMiddleware:
    return RoutingMiddleware(inner, router=SilentRouter(USERS, PARTNER))


@pytest.mark.parametrize(
    ("scope", "route", "cost"),
    [
        (http("/api/users"), "users", 2.0),
        (http("/api/users/7/x", method="POST"), "users", 2.0),
        (http("/api/users/export", method="POST"), "users", 5.0),
        (http("/api/users/export/all", method="POST"), "users", 5.0),
        (http("/api/users/x/../export", method="POST"), "users", 5.0),  # a spelling does not buy a cheaper rule
        (http("/api/users//export", method="POST"), "users", 5.0),
        (http("/api/users/export"), "users", 2.0),
        (http("/api/users", method="DELETE", host=(b"Host", b"Partner.test:8000")), "partner", 1.0),
    ],
)
async def test_a_request_has_a_route_and_its_cost(scope: Scope, route: str, cost: float) -> None:
    exchange = begun(scope)
    assert (await ask(matching(answers), scope)).status == 200
    assert (exchange.route, exchange.cost, scope[ROUTE].name) == (route, cost, route)


@pytest.mark.parametrize(
    ("scope", "error"),
    [
        (http("/api/usersx"), NoRoute),
        (http("/api"), NoRoute),
        (http("/api/users/../orders"), NoRoute),
        (http("/api/users", method="PUT"), MethodNotAllowed),
    ],
)
async def test_a_request_without_a_route_goes_no_further(scope: Scope, error: type[GatewayError]) -> None:
    exchange = begun(scope)
    with pytest.raises(error):
        await ask(matching(never), scope)
    assert exchange.route is None


# Limit


class Limiting:
    """A `RateLimitMiddleware` with buckets of its own and a clock that stands still."""

    def __init__(self, address_quota: Quota | None = None, *exempt: str) -> None:
        self.now_ns = 5 * NANOSECONDS
        self.limiter = MemoryLimiter([FREE, PREMIUM, ADDRESS])
        self.step = RateLimitMiddleware(
            answers,
            limiter=self.limiter,
            clock_ns=lambda: self.now_ns,
            address_quota=address_quota,
            exempt=[ip_network(one) for one in exempt],
        )

    async def ask(
        self, client: Client = STRANGER, cost: float = 1.0, peer: str = "192.0.2.7"
    ) -> tuple[HeaderList, GatewayError | None]:
        """Return the limit's headers and what it refused with."""
        scope = http(peer=peer)
        exchange = begun(scope, client, cost)
        try:
            await ask(self.step, scope)
        except GatewayError as error:
            assert exchange.decision is not None
            assert not exchange.decision.allowed
            return exchange.response_headers, error
        assert exchange.decision is not None
        assert exchange.decision.allowed
        return exchange.response_headers, None

    async def passes(self, client: Client = STRANGER, cost: float = 1.0, peer: str = "192.0.2.7") -> bool:
        return (await self.ask(client, cost, peer))[1] is None

    async def admitted(self, client: Client = STRANGER, peer: str = "192.0.2.7", of: int = 20) -> int:
        """Return how many of so many requests at one moment pass."""
        return sum([await self.passes(client, peer=peer) for _ in range(of)])

    def left(self, key: str, quota: Quota) -> int:
        return self.limiter.preview(Charge(key, quota, 0), self.now_ns).remaining


def limit_fields(headers: HeaderList) -> dict[str, str]:
    found = {name.decode(): value.decode() for name, value in headers}
    assert len(found) == len(headers)
    return found


async def test_a_response_has_the_limit_and_the_remaining_tokens() -> None:
    """draft-ietf-httpapi-ratelimit-headers-11, and the older trio in delta seconds."""
    headers, _ = await Limiting().ask()
    assert limit_fields(headers) == {
        "ratelimit-policy": '"free";q=10;w=10',
        "ratelimit": '"free";r=9;t=9',
        "x-ratelimit-limit": "10",
        "x-ratelimit-remaining": "9",
        "x-ratelimit-reset": "1",
    }


async def test_a_refusal_has_the_limit_and_retry_after() -> None:
    limiting = Limiting()
    assert await limiting.admitted() == 10
    limiting.now_ns += NANOSECONDS // 4
    headers, error = await limiting.ask(cost=3)
    assert isinstance(error, RateLimited)
    assert error.headers["retry-after"] == "3"
    assert error.retry_after == 2.75
    assert limit_fields(headers) == {
        "ratelimit-policy": '"free";q=10;w=10',
        "ratelimit": '"free";r=0;t=3',
        "x-ratelimit-limit": "10",
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": "10",
    }


async def test_a_refusal_says_who_is_limited_by_what() -> None:
    limiting = Limiting()
    await limiting.admitted()
    _, error = await limiting.ask()
    assert error is not None
    for part in ("acme", "FREE", "10 tokens", "1 per second", "1.000 s"):
        assert part in error.detail
    assert {name: error.extra[name] for name in ("client_id", "tier", "policy", "cost", "limit", "remaining")} == {
        "client_id": "acme",
        "tier": "FREE",
        "policy": "free",
        "cost": 1.0,
        "limit": 10,
        "remaining": 0,
    }


@pytest.mark.parametrize("rate", [0.3, 1, 3, 7, 1000])
@pytest.mark.parametrize("cost", [0.7, 1, 3])
async def test_a_client_that_waits_exactly_retry_after_passes(rate: float, cost: float) -> None:
    client = Client("acme", "client:acme", Quota.per_second("T", rate, 3), "default")
    limiting = Limiting()
    while await limiting.passes(client, cost):
        limiting.now_ns += 1  # also at odd moments
    _, error = await limiting.ask(client, cost)
    assert error is not None
    assert error.retry_after is not None
    refused_at = limiting.now_ns
    limiting.now_ns = refused_at + round(error.retry_after * NANOSECONDS) - 1
    assert not await limiting.passes(client, cost)
    limiting.now_ns = refused_at + int(error.headers["retry-after"]) * NANOSECONDS
    assert int(error.headers["retry-after"]) == max(1, math.ceil(error.retry_after))
    assert await limiting.passes(client, cost)


async def test_a_refused_client_loses_nothing_by_asking() -> None:
    limiting = Limiting()
    assert await limiting.admitted(of=1000) == 10
    limiting.now_ns += NANOSECONDS
    assert await limiting.admitted(of=1000) == 1


async def test_a_cost_that_no_wait_can_pay_is_forbidden_and_not_limited() -> None:
    limiting = Limiting()
    headers, error = await limiting.ask(cost=11)
    assert isinstance(error, CostExceedsCapacity)
    assert error.status == 403
    assert "retry-after" not in error.headers
    assert error.retry_after is None
    for part in ("11 tokens", "acme", "bucket of 10"):
        assert part in error.detail
    assert limit_fields(headers)["x-ratelimit-remaining"] == "10"
    assert await limiting.passes(cost=10)


async def test_a_request_that_costs_nothing_always_passes() -> None:
    limiting = Limiting(ADDRESS)
    await limiting.admitted()
    assert await limiting.passes(cost=0)


async def test_each_client_has_a_bucket_of_its_own() -> None:
    limiting = Limiting()
    assert await limiting.admitted() == 10
    assert await limiting.admitted(Client("other", "client:other", FREE, "default")) == 10
    assert await limiting.admitted(Client("vip", "client:vip", PREMIUM, "configured"), of=300) == 200


# The address limit of clients that are not registered


def named(name: str, source: Any = "default") -> Client:
    return Client(name, f"client:{name}", FREE, source)


async def test_invented_names_do_not_get_around_the_limit_of_their_address() -> None:
    limiting = Limiting(ADDRESS)
    assert sum([await limiting.passes(named(f"c{number}")) for number in range(20)]) == 4
    assert await limiting.passes(named("c21"), peer="192.0.2.8")


async def test_a_refusal_of_the_address_says_so() -> None:
    limiting = Limiting(ADDRESS)
    await limiting.admitted()
    headers, error = await limiting.ask(named("other"), peer="192.0.2.7")
    assert isinstance(error, RateLimited)
    assert "Address '192.0.2.7'" in error.detail
    assert (error.extra["policy"], error.extra["tier"], error.extra["limit"]) == ("address", "FREE", 4)
    assert limit_fields(headers)["ratelimit-policy"] == '"address";q=4;w=2'
    assert error.headers["retry-after"] == "1"


async def test_the_hosts_of_one_ipv6_site_share_a_bucket() -> None:
    limiting = Limiting(ADDRESS)
    assert await limiting.admitted(named("one"), peer="2001:db8:1:2::1") == 4
    assert not await limiting.passes(named("two"), peer="2001:db8:1:2:ffff::")
    assert await limiting.passes(named("two"), peer="2001:db8:1:3::")


async def test_both_buckets_are_charged_or_neither() -> None:
    limiting = Limiting(ADDRESS)
    buckets = (("client:acme", FREE), ("peer:192.0.2.7", ADDRESS))
    assert await limiting.passes(cost=3)
    assert [limiting.left(*bucket) for bucket in buckets] == [7, 1]
    assert not await limiting.passes(cost=2)  # the address has not enough
    assert [limiting.left(*bucket) for bucket in buckets] == [7, 1]
    assert not await limiting.passes(cost=8, peer="192.0.2.8")  # neither has the client
    assert [limiting.left(*bucket) for bucket in buckets] == [7, 1]
    assert limiting.left("peer:192.0.2.8", ADDRESS) == 4


@pytest.mark.parametrize("source", ["registered", "configured"])
async def test_a_registered_client_is_not_charged_to_its_address(source: str) -> None:
    limiting = Limiting(ADDRESS)
    assert await limiting.admitted(named("acme", source)) == 10
    assert limiting.left("peer:192.0.2.7", ADDRESS) == 4


async def test_a_client_without_a_name_is_charged_to_its_address_too() -> None:
    limiting = Limiting(ADDRESS)
    assert await limiting.admitted(Client("192.0.2.7", "address:192.0.2.7", FREE, "address")) == 4


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_exempt_addresses_are_not_counted(peer: str) -> None:
    limiting = Limiting(ADDRESS, "127.0.0.0/8", "::1/128")
    assert await limiting.admitted(peer=peer) == 10
    assert await limiting.admitted(named("other"), peer=peer) == 10
    assert await limiting.admitted(named("third"), peer="192.0.2.7") == 4


async def test_the_limit_of_addresses_can_be_off() -> None:
    limiting = Limiting(None)
    assert sum([await limiting.passes(named(f"c{number}")) for number in range(50)]) == 50


# Proxy


@pytest.mark.parametrize("is_trusted", [True, False])
async def test_the_last_step_hands_the_exchange_to_the_router(is_trusted: bool) -> None:  # noqa: FBT001 - parametrised
    router = SilentRouter(USERS)
    scope = http()
    exchange = begun(scope)
    scope[ROUTE], scope[IS_TRUSTED] = USERS, is_trusted
    answer = Answer()
    await ProxyApp(router=router)(scope, unread, answer.send)
    assert router.forwarded == [(exchange, USERS, scope, unread, answer.send, {"is_trusted": is_trusted})]


# All of them


async def test_the_steps_together_refuse_with_everything_that_is_known(tmp_path: Path) -> None:
    router = SilentRouter(USERS)
    registry = ClientRegistry({"FREE": FREE}, "FREE", {}, SqliteClientStore(tmp_path))
    limiting = Limiting()
    limiting.step.app = ProxyApp(router=router)
    matching_step = RoutingMiddleware(limiting.step, router=router)
    recording = Recording(
        IdentityMiddleware(matching_step, clients=registry, header="X-Client-ID", trusted_proxies=[])
    )
    for _ in range(6):
        answer = await ask(recording.app, http("/api/users", (b"x-client-id", b"acme")))
    assert len(router.forwarded) == 5
    body = answer.json()
    assert (answer.status, body["reason"], body["cost"]) == (429, "rate_limited", 2.0)
    assert answer.all(b"retry-after") == [b"2"]
    assert answer.all(b"ratelimit") == [b'"free";r=0;t=2']
    exchange = recording.seen[-1]
    assert (exchange.route, exchange.client and exchange.client.id, exchange.reason) == (
        "users",
        "acme",
        "rate_limited",
    )
