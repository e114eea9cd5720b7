"""The split of requests between the data plane and the operators' application, without a server."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from api_gateway.http1.asgi import FIELDS, ASGIApp, Message, Receive, Scope, Send
from api_gateway.http1.headers import fields_of
from api_gateway.middleware import DataPlaneSplit, DataPlaneSwitch
from api_gateway.models import HeaderList

HOST = (b"host", b"gateway.test")


# What the steps are called with


def http(
    path: str = "/api/users",
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    peer: str | None = "192.0.2.7",
    host: tuple[bytes, bytes] = HOST,
) -> Scope:
    """Return the scope of a request as a server makes it."""
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


async def answers(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer as the data plane does."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


async def never(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise AssertionError("the next step was called")


# Split


def split(inner: ASGIApp, data_plane: ASGIApp | None = None) -> DataPlaneSplit:
    switch = DataPlaneSwitch()
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
