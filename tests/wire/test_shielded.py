"""Other transports: they are shielded from cancellation, and none of their connections is lost."""

import asyncio
import random
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from api_gateway import GatewayConfig, create_app
from api_gateway.errors import StartupError, UpstreamProtocolError
from api_gateway.settings.upstreams import UpstreamSection
from api_gateway.transport.error_mapping import translate
from api_gateway.transport.shielded import Http2Transport, NoHttp2, ShieldedTransport, http2_transport
from tests.kit import RawRequest, RawUpstream, Wire, in_front_of, reply, turns


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


async def test_a_cancelled_request_runs_to_its_end_and_is_closed() -> None:
    inner = Slow()
    guard = ShieldedTransport(inner)
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
    guard = ShieldedTransport(inner)
    response = await guard.handle_async_request(REQUEST)
    assert response.extensions["reason_phrase"] == b"Fine"
    assert isinstance(response.stream, httpx.AsyncByteStream)
    pieces = aiter(response.stream)
    assert await anext(pieces) == b"first"
    reading = asyncio.ensure_future(anext(pieces))
    await turns()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    closing = asyncio.ensure_future(response.stream.aclose())
    await turns()
    inner.body.gate.set()
    await closing
    assert (inner.body.was_cancelled, inner.body.is_closed) == (False, True)


async def test_a_failure_of_a_cancelled_request_reaches_no_caller() -> None:
    class Failing(Slow):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await self.gate.wait()
            raise httpx.ReadError("reset")

    inner = Failing()
    guard = ShieldedTransport(inner)
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
    guard = ShieldedTransport(httpx.AsyncHTTPTransport(limits=limits))
    try:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await guard.handle_async_request(httpx.Request("GET", up.url))
        timeout = {"timeout": {"connect": 60, "pool": 60, "read": 60}}
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


async def test_a_response_left_anywhere_gives_its_connection_back() -> None:
    """Cancelled before the head, within the body, or closed unread; sixty requests on a pool of two."""

    def behave(wire: Wire, _request: RawRequest) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            asyncio.run(asyncio.sleep(0.002))
            wire.send(b"2\r\nok\r\n")
        wire.send(b"0\r\n\r\n")

    up = RawUpstream(behave)
    limits = httpx.Limits(max_connections=2, max_keepalive_connections=2)
    guard = ShieldedTransport(httpx.AsyncHTTPTransport(limits=limits))
    timeout = {"timeout": {"connect": 60, "pool": 60, "read": 60}}

    async def ask() -> bytes:
        response = await guard.handle_async_request(httpx.Request("GET", up.url, extensions=timeout))
        try:
            return await response.aread()
        finally:
            await response.aclose()

    source = random.Random(7)
    cancelled = 0
    try:
        for _ in range(20):
            tasks = [asyncio.ensure_future(ask()) for _ in range(3)]
            await asyncio.sleep(source.uniform(0, 0.012))
            cancelled += sum(task.cancel() for task in tasks)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result == b"ok" * 4 or isinstance(result, asyncio.CancelledError)
        assert cancelled > 20
        assert tuple(await asyncio.gather(ask(), ask())) == (b"ok" * 4,) * 2
        assert "[0 running, 0 in the background]" in repr(guard)
    finally:
        await guard.aclose()
        up.close()


def app_config(tmp_path: Path, **upstream: object) -> GatewayConfig:
    sections = in_front_of("https://app.test", **upstream)
    return GatewayConfig.model_validate(sections | {"state_dir": tmp_path, "log": {"access": False}})


async def test_a_failure_of_another_transport_is_translated(tmp_path: Path) -> None:
    class Refusing(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    gateway = create_app(app_config(tmp_path), transports={"up": Refusing()})
    async with gateway.router.lifespan_context(gateway):
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            answer = await client.get("/api/users")
    assert (answer.status_code, answer.json()["reason"]) == (502, "upstream_connect_error")


async def test_another_transport_gets_the_request_as_ours_would_and_is_closed_at_the_end(tmp_path: Path) -> None:
    class Noting(Slow):
        seen: list[tuple[str, str, httpx.Headers, bytes]]

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.seen = [(request.method, str(request.url), request.headers, await request.aread())]
            return httpx.Response(201, headers=[("X-Up", "1")], content=b"made")

    inner = Noting()
    gateway = create_app(app_config(tmp_path), transports={"up": inner})
    async with gateway.router.lifespan_context(gateway):
        transport = httpx.ASGITransport(gateway)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway.test") as client:
            answer = await client.put(
                "/api/a%2Fb?c=%20", content=b"body", headers={"Connection": "X-Hop", "X-Hop": "1"}
            )
        assert not inner.is_closed
    assert (answer.status_code, answer.content, answer.headers["x-up"]) == (201, b"made", "1")
    ((method, url, headers, body),) = inner.seen
    assert (method, url, body) == ("PUT", "https://app.test/api/a%2Fb?c=%20", b"body")
    assert (headers["host"], headers["x-forwarded-host"]) == ("app.test", "gateway.test")
    assert "x-hop" not in headers
    assert inner.is_closed


async def test_http2_without_its_package_does_not_start_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h2", None)  # as if it were not installed
    gateway = create_app(app_config(tmp_path, http2=True))
    with pytest.raises(StartupError, match=r"upstreams\.up\.http2: .*pip install 'httpx\[http2\]'"):
        async with gateway.router.lifespan_context(gateway):
            pass


class Breaking(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """Raises an error before the head of a response, or within its body."""

    def __init__(self, error: Exception, *, within_body: bool) -> None:
        self.error = error
        self.within_body = within_body
        self.is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self.within_body:
            raise self.error
        return httpx.Response(200, stream=self, extensions={"http_version": b"HTTP/2"})

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"first"
        raise self.error

    async def aclose(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("within_body", [False, True])
@pytest.mark.parametrize(
    "error", [httpx.LocalProtocolError("Expected 5 bytes, received 2"), ValueError("invalid literal: 'abc'")]
)
async def test_a_response_that_breaks_http2_is_the_upstreams_error(error: Exception, *, within_body: bool) -> None:
    """The library takes it for an error of the request, which would be a 400 for the client."""
    transport = Http2Transport(httpx.Limits(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    transport._inner = breaking = Breaking(error, within_body=within_body)
    with pytest.raises(httpx.RemoteProtocolError, match=str(error)) as raised:
        await read(ShieldedTransport(transport))
    assert isinstance(translate(raised.value, "up"), UpstreamProtocolError)
    assert breaking.is_closed == within_body


async def read(transport: httpx.AsyncBaseTransport) -> bytes:
    """Send a request; return the body of the response, which is closed."""
    response = await transport.handle_async_request(httpx.Request("GET", "https://up.test/"))
    try:
        return await response.aread()
    finally:
        await response.aclose()


@pytest.mark.parametrize("offered", [None, ["http/1.1"], ["h2", "http/1.1"]], ids=["nothing", "http/1.1", "both"])
async def test_http2_does_not_fall_back_to_http1(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, offered: list[str] | None
) -> None:
    """Connections of HTTP/1.1 in httpx would give surplus bytes of one response to the next client."""
    is_usual = offered is not None and "h2" in offered
    if is_usual:
        pytest.importorskip("h2")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: True)  # h2 is imported after the handshake
    received: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received.put_nowait(await reader.read(24))  # up to the end, or the preface of HTTP/2
        except ConnectionResetError:
            received.put_nowait(b"")
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "here.pem", certificates / "here.key")
    if offered is not None:
        context.set_alpn_protocols(offered)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    guard = http2_transport(1, 5, ssl.create_default_context(cafile=str(certificates / "here.pem")))
    request = httpx.Request("GET", f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    async with server:
        if is_usual:
            with pytest.raises(httpx.RemoteProtocolError):  # the server closes at the preface
                await guard.handle_async_request(request)
            assert await received.get() == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        else:
            with pytest.raises(NoHttp2) as raised:
                await guard.handle_async_request(request)
            assert "does not offer HTTP/2, which http2: true requires" in str(translate(raised.value, "up"))
            assert await received.get() == b""
        await guard.aclose()


@pytest.mark.parametrize(("urls", "uses"), [("https", True), ("http", False), ("https http", False)])
def test_http2_is_for_https_targets(urls: str, *, uses: bool) -> None:
    targets = [{"url": f"{scheme}://{scheme}.test"} for scheme in urls.split()]
    assert UpstreamSection.model_validate({"targets": targets, "http2": True}).uses_http2 is uses
    assert not UpstreamSection.model_validate({"targets": targets}).uses_http2
