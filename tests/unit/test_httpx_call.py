"""A call on an httpx transport: its queue, its pauses, and its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from api_gateway.transport.error_mapping import translate
from api_gateway.transport.httpx_call import QUEUE_HIGH_WATER, RUNNING, HttpxCall, HttpxCalls
from api_gateway.transport.request import Origin
from api_gateway.transport.response import NO_LIMITS, NO_LISTENER, UpstreamResponse
from api_gateway.transport.shielded import ShieldedTransport


class Scripted(httpx.AsyncBaseTransport):
    """A transport that reads the request body as it is told, and responds with pieces."""

    def __init__(
        self,
        pieces: list[bytes],
        headers: dict[str, str] | list[tuple[bytes, bytes]] | None = None,
        error: BaseException | None = None,
        reason: bytes = b"OK",
    ) -> None:
        self._pieces = pieces
        self._headers = headers
        self._error = error
        self._reason = reason
        self.gate = asyncio.Event()
        self.given = 0
        self.on_piece: Callable[[], None] | None = None  # called before each piece is given

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await self.gate.wait()
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self.body = b"".join([piece async for piece in request.stream])
        if self._error is not None:
            raise self._error
        return httpx.Response(
            200, headers=self._headers, stream=Stream(self), extensions={"reason_phrase": self._reason}
        )


class Stream(httpx.AsyncByteStream):
    def __init__(self, transport: Scripted) -> None:
        self._transport = transport

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._transport._pieces:
            self._transport.given += 1
            if self._transport.on_piece is not None:
                self._transport.on_piece()
            yield piece


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


ORIGIN = Origin.of(httpx.URL("http://up.test"))


def call_on(
    transport: httpx.AsyncBaseTransport, listener: Any = NO_LISTENER, calls: HttpxCalls | None = None
) -> tuple[HttpxCall, UpstreamResponse]:
    call = HttpxCall(transport, ORIGIN, calls or HttpxCalls(transport, 9), None)
    return call, UpstreamResponse(call, "GET", NO_LIMITS, listener)


HEAD = b"PUT /x HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n"


@pytest.mark.parametrize("error", [httpx.ReadError("lost"), asyncio.CancelledError()], ids=["error", "cancelled"])
@pytest.mark.parametrize("is_late", [False, True])
async def test_a_transport_that_fails_or_cancels_itself_fails_the_response(
    error: BaseException, *, is_late: bool
) -> None:
    """Otherwise the request would wait for ever."""
    transport = Scripted([b"x"], error=None if is_late else error)
    transport.gate.set()

    def fail() -> None:
        raise error

    transport.on_piece = fail
    call, response = call_on(transport)
    call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
    await turns()
    assert isinstance(response.error, httpx.ReadError)
    assert not RUNNING


async def test_the_queue_of_a_request_body_is_bounded() -> None:
    writable: list[bool] = []

    class Listener:
        def __getattr__(self, name: str) -> Any:
            return getattr(NO_LISTENER, name)

        def on_writable(self) -> None:
            writable.append(call.is_write_paused)

    transport = Scripted([b"ok"])
    call, response = call_on(transport, Listener())
    call.begin(response, [HEAD], 200_000)
    call.send_piece(b"x" * QUEUE_HIGH_WATER)
    assert not call.is_write_paused
    call.send_piece(b"x" * (200_000 - QUEUE_HIGH_WATER))
    assert call.is_write_paused
    transport.gate.set()
    await turns()
    assert writable == [False]
    call.end_body(b"")
    await turns()
    assert (response.is_complete, response.take(), transport.body) == (True, b"ok", b"x" * 200_000)


async def test_no_piece_is_taken_while_reading_is_paused() -> None:
    transport = Scripted([b"1", b"2", b"3"])
    call, response = call_on(transport)
    transport.on_piece = call.pause_reading
    transport.gate.set()
    call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
    for count in (1, 2, 3):
        await turns()
        assert (transport.given, response.take()) == (count, str(count).encode())
        call.resume_reading()
    await turns()
    assert response.is_complete


@pytest.mark.parametrize(
    ("pieces", "length", "cause"),
    [([b"abc"], "2", "more bytes"), ([b"abc"], "4", "closed before"), ([], "1", "closed before")],
)
async def test_a_body_of_another_length_than_announced_is_an_error(
    pieces: list[bytes], length: str, cause: str
) -> None:
    transport = Scripted(pieces, {"content-length": length})
    call, response = call_on(transport)
    transport.gate.set()
    call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
    await turns()
    assert not response.is_complete
    assert cause in str(response.error)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *(([(b"x-a", b"1%b2" % octet)], b"OK") for octet in (b"\r\n", b"\n", b"\r", b"\x00", b"\r\n\r\n")),
        *(([(name, b"1")], b"OK") for name in (b"x a", b"x:a", b"x\r\nb", b"", b"x\x00", b"\xe9")),
        *(
            ([(b"content-length", length)], b"OK")
            for length in (b"x", b"-1", b"+1", b"1_0", b"", b"1, 2", b"9" * 5000)
        ),
        ([(b"content-length", b"1"), (b"content-length", b"2")], b"OK"),
        ([(b"transfer-encoding", b"chunked"), (b"content-length", b"\xb2")], b"OK"),
        ([(b"Transfer-Encoding", b"chunked"), (b"Content-Length", b"1")], b"OK"),
        ([(b"Content-Length", b"\x011")], b"OK"),
        ([(b"connection", b"x\x7f")], b"OK"),
        ([], b"OK\r\nx-a: 1"),
    ],
)
async def test_a_head_that_a_client_would_read_differently_is_an_error(
    fields: list[tuple[bytes, bytes]], reason: bytes
) -> None:
    for method in (b"GET", b"HEAD"):
        transport = Scripted([b"1"], fields, reason=reason)
        call, response = call_on(transport)
        transport.gate.set()
        call.start(response, method + b" /x HTTP/1.1\r\nhost: a\r\n\r\n")
        await turns()
        assert not response.is_head_complete
        assert "an invalid" in str(response.error)


async def test_a_control_character_becomes_a_space_and_a_method_keeps_its_letters() -> None:
    """As with the gateway's own transport, which sends the bytes of the request line itself."""
    seen: list[str] = []

    class Noting(Scripted):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.method)
            return await super().handle_async_request(request)

    for method in ("get", "version-control", "M_x", "GET"):
        transport = Noting([b"1"], [(b"X-A", b"1\x012\x7f3\t4\xe9")], reason=b"O\x0bK")
        call, response = call_on(transport)
        transport.gate.set()
        call.start(response, method.encode() + b" /x HTTP/1.1\r\nhost: a\r\n\r\n")
        await turns()
        assert (response.headers, response.reason) == ([(b"X-A", b"1 2 3\t4\xe9")], b"O K")
        assert seen.pop() == method


async def test_closing_returns_at_once_and_reports_nothing() -> None:
    call, response = call_on(Scripted([]))
    call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
    await turns()
    assert len(RUNNING) == 1
    response.close()
    assert response.connection is None
    await turns()
    assert (response.error, response.is_complete, len(RUNNING)) == (None, False, 0)


async def test_any_failure_of_a_transport_fails_the_response() -> None:
    transport = Scripted([], error=ValueError("a defect"))
    call, response = call_on(transport)
    transport.gate.set()
    call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
    await turns()
    assert isinstance(response.error, ValueError)


class Stubborn(httpx.AsyncBaseTransport):
    """A transport that does not end a call although it is cancelled, before its response or within its body."""

    def __init__(self, *, has_head: bool) -> None:
        self._has_head = has_head
        self.gate = asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self._has_head:
            await self.wait()
        return httpx.Response(200, stream=Unending(self))

    async def wait(self) -> None:
        while not self.gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.gate.wait()


class Unending(httpx.AsyncByteStream):
    def __init__(self, transport: Stubborn) -> None:
        self._transport = transport

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await self._transport.wait()
        yield b"late"


@pytest.mark.parametrize("has_head", [False, True], ids=["before the head", "within the body"])
@pytest.mark.parametrize("is_shielded", [False, True], ids=["bare", "shielded"])
async def test_calls_that_do_not_end_are_counted_and_limited(*, has_head: bool, is_shielded: bool) -> None:
    stubborn = Stubborn(has_head=has_head)
    transport: httpx.AsyncBaseTransport = ShieldedTransport(stubborn) if is_shielded else stubborn
    calls = HttpxCalls(transport, 2)
    for count in (1, 2):
        assert calls.begin(ORIGIN, None) is not None
        call, response = call_on(transport, calls=calls)
        call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
        await turns()
        assert calls.aborted == count - 1, "those in flight are not counted"
        call.close()
        await turns()
        assert calls.aborted == count
    assert calls.begin(ORIGIN, None) is None
    error = translate(calls.refusal(), "up")
    assert (error.status, error.reason, calls.refused) == (503, "overloaded", 1)
    assert "2 aborted requests to it have not ended" in error.detail
    stubborn.gate.set()
    await turns(20)
    assert (calls.aborted, len(RUNNING)) == (0, 0)
    assert calls.begin(ORIGIN, None) is not None


async def test_a_call_that_has_ended_is_not_aborted() -> None:
    transport = Scripted([b"ok"])
    calls = HttpxCalls(transport, 1)
    call, response = call_on(transport, calls=calls)
    transport.gate.set()
    call.start(response, b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n")
    await turns()
    assert response.is_complete
    call.close()
    assert calls.aborted == 0
