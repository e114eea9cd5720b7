"""Other transports in the place of ours: cancellation is kept out of them, and nothing they hold is lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from api_gateway import GatewayConfig, create_app
from api_gateway.guarded import GuardedTransport
from tests.kit import RawRequest, RawUpstream, Wire, in_front_of, reply


class Body(httpx.AsyncByteStream):
    """Two pieces, the second when it is let through."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.was_cancelled = self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"first"
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        yield b"second"

    async def aclose(self) -> None:
        self.is_closed = True


class Slow(httpx.AsyncBaseTransport):
    """Answers when it is let through; remembers whether it was cancelled."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.body = Body()
        self.was_cancelled = self.is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return httpx.Response(200, stream=self.body, extensions={"reason_phrase": b"Fine"})

    async def aclose(self) -> None:
        self.is_closed = True


REQUEST = httpx.Request("GET", "http://up.test/")


async def test_a_request_that_is_cancelled_finishes_for_nobody_and_is_closed() -> None:
    inner = Slow()
    guard = GuardedTransport(inner)
    task = asyncio.ensure_future(guard.handle_async_request(REQUEST))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    inner.gate.set()
    await guard.aclose()
    assert (inner.was_cancelled, inner.body.is_closed, inner.is_closed) == (False, True, True)


async def test_reading_that_is_cancelled_does_not_reach_the_body() -> None:
    inner = Slow()
    inner.gate.set()
    guard = GuardedTransport(inner)
    response = await guard.handle_async_request(REQUEST)
    assert response.extensions["reason_phrase"] == b"Fine"
    assert isinstance(response.stream, httpx.AsyncByteStream)
    pieces = aiter(response.stream)
    assert await anext(pieces) == b"first"
    reading = asyncio.ensure_future(anext(pieces))
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    closing = asyncio.ensure_future(response.stream.aclose())
    await asyncio.sleep(0.01)
    inner.body.gate.set()
    await closing
    assert (inner.body.was_cancelled, inner.body.is_closed) == (False, True)


async def test_a_failure_for_nobody_is_nobodys() -> None:
    class Failing(Slow):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await self.gate.wait()
            raise httpx.ReadError("reset")

    inner = Failing()
    guard = GuardedTransport(inner)
    task = asyncio.ensure_future(guard.handle_async_request(REQUEST))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    inner.gate.set()
    await guard.aclose()
    assert inner.is_closed


async def test_httpx_own_transport_loses_no_connection_to_cancelled_requests() -> None:
    """Unguarded, its pool of two is exhausted for good after two of them."""

    def behave(wire: Wire, request: RawRequest) -> None:
        asyncio.run(asyncio.sleep(0.05))
        reply()(wire, request)

    up = RawUpstream(behave)
    limits = httpx.Limits(max_connections=2, max_keepalive_connections=2)
    guard = GuardedTransport(httpx.AsyncHTTPTransport(limits=limits))
    try:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await guard.handle_async_request(httpx.Request("GET", up.url))
        timeout = {"timeout": {"connect": 5, "pool": 5, "read": 5}}
        response = await guard.handle_async_request(httpx.Request("GET", up.url, extensions=timeout))
        assert await response.aread() == b"ok"
    finally:
        await guard.aclose()
        up.close()


async def test_an_application_can_be_the_upstream(tmp_path: Path) -> None:
    async def app(scope: dict[str, object], _receive: object, send: object) -> None:
        assert callable(send)
        body = f"{scope['method']} {scope['path']}".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Up", b"1")]})
        await send({"type": "http.response.body", "body": body})

    config = GatewayConfig.model_validate(
        in_front_of("http://app.test") | {"state_dir": tmp_path, "log": {"access": False}}
    )
    gateway = create_app(config, transports={"up": httpx.ASGITransport(app)})  # type: ignore[arg-type]  # httpx's narrower type
    async with gateway.router.lifespan_context(gateway):
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            answer = await client.get("/api/users")
    assert (answer.status_code, answer.text, answer.headers["x-up"]) == (200, "GET /api/users", "1")
