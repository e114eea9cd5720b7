"""The middleware steps of a proxied request, each alone: small inner applications, fixed clocks, no server."""

import asyncio
import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from api_gateway.errors import (
    ClientDisconnected,
    NoRoute,
    RateLimited,
    UpstreamReset,
)
from api_gateway.http1.asgi import FIELDS, ASGIApp, Message, Receive, Scope, Send
from api_gateway.http1.headers import fields_of
from api_gateway.metrics import Recorder
from api_gateway.middleware import (
    EXCHANGE,
    DataPlaneSlot,
    DataPlaneSplit,
    ExchangeMiddleware,
)
from api_gateway.models import Client, Exchange, HeaderList, Quota
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
