"""Upstreams that are reached by an httpx transport: the same exchange, by the other kind of `UpstreamCall`."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api_gateway.transport.httpx_call import RUNNING
from tests.kit import (
    PATIENCE,
    RawClient,
    RawRequest,
    RawUpstream,
    RunningGateway,
    Wire,
    eventually,
    in_front_of,
    reason,
    reply,
)

CHUNKED = "Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def sections(shared: RawUpstream) -> dict[str, Any]:
    return in_front_of(
        shared.url,
        circuit_breaker={"minimum_calls": 1000},
        retry={"budget": 1, "min_retries_per_second": 100},
    ) | {"server": {"max_body_bytes": 1_000_000}}


@pytest.fixture(autouse=True)
def other_transport(running: RunningGateway) -> Iterator[None]:
    """The upstream is reached by httpx's transport."""
    client = running.server._app.state.gateway.upstream_clients["up"]
    before, other = client.transport, httpx.AsyncHTTPTransport()
    client._connect(other)
    yield
    eventually(lambda: not RUNNING and running.live.recorder.in_flight == 0, "no task is left")
    client._connect(before)
    loop: Any = running.server.servers[0].get_loop()
    asyncio.run_coroutine_threadsafe(other.aclose(), loop).result(PATIENCE)


@pytest.mark.parametrize(
    "response", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_a_request_and_its_response_are_forwarded(
    client: RawClient, up: RawUpstream, asgi_forwards: list[Any], method: str, response: bytes
) -> None:
    def behave(wire: Wire, request: RawRequest) -> None:
        head, end, body = response.partition(b"\r\n\r\n")
        wire.send(b"HTTP/1.1 200 Fine\r\nX-Up: 1\r\n" + head + end + (b"" if method == "HEAD" else body))

    up.behave = behave
    for _ in range(2):
        sent = b"ok" if method == "PUT" else b""
        client.request(method, "/api/x?y=%2F", ("X-Two:  2", f"Content-Length: {len(sent)}"), sent)
        answer = client.answer(method)
        assert (answer.status, answer.body, answer.all("x-up")) == (200, b"" if method == "HEAD" else b"hello", [b"1"])
    assert up.requests[0].line == f"{method} /api/x?y=%2F HTTP/1.1".encode()
    assert up.requests[0].body == (b"ok" if method == "PUT" else b"")
    assert not asgi_forwards


def test_a_body_in_chunks_arrives_in_chunks(client: RawClient, up: RawUpstream) -> None:
    client.request("POST", "/api/x", (CHUNKED,))
    client.send(b"3\r\nabc\r\n")
    client.send(b"2\r\nde\r\n0\r\nX-Trailer: 1\r\n\r\n")
    assert client.answer().status == 200
    assert (up.requests[0].body, up.requests[0].all("transfer-encoding")) == (b"abcde", [b"chunked"])


def test_a_body_is_not_read_faster_than_the_upstream_reads(
    running: RunningGateway, client: RawClient, up: RawUpstream
) -> None:
    gate = threading.Event()

    def behave(wire: Wire, request: RawRequest) -> None:
        gate.wait(PATIENCE)
        request.body, request.is_complete = wire.read_body(request.headers)
        reply()(wire, request)

    up.behave, up.reads_body = behave, False
    body = b"x" * 900_000
    client.request("PUT", "/api/x", (f"Content-Length: {len(body)}",))
    client.send(body)
    eventually(lambda: len(up.requests) == 1, "it is with the upstream")
    gate.set()
    assert client.answer().status == 200
    assert len(up.requests[0].body) == len(body)


def test_the_gateway_asks_for_a_body_that_is_withheld(client: RawClient, up: RawUpstream) -> None:
    """These transports do not report the upstream's 100 (Continue)."""
    client.request("PUT", "/api/x", ("Content-Length: 2", "Expect: 100-continue"))
    interim = client.read_until(b"\r\n\r\n")
    assert interim is not None
    assert interim.startswith(b"HTTP/1.1 100 ")
    client.send(b"ok")
    assert client.answer().status == 200
    assert up.requests[0].all("expect") == []


def test_a_client_that_leaves_ends_the_call(running: RunningGateway, up: RawUpstream) -> None:
    gone = threading.Event()

    def behave(wire: Wire, _request: RawRequest) -> bool:
        if wire.is_closed():
            gone.set()
        return False

    up.behave = behave
    with RawClient(running.port) as client:
        client.request()
        eventually(lambda: len(up.requests) == 1, "it is with the upstream")
    assert gone.wait(PATIENCE), "the upstream's connection is closed"
    assert running.live.upstreams["up"].breaker.consecutive_failures == 0


def test_a_failed_attempt_is_repeated_if_that_is_safe(client: RawClient, up: RawUpstream) -> None:
    def behave(wire: Wire, request: RawRequest) -> Any:
        return reply()(wire, request) if len(up.requests) % 2 == 0 else False

    up.behave = behave
    assert client.get().status == 200
    client.request("POST", "/api/x", ("Content-Length: 1",), b"x")
    assert reason(client.answer()) == (502, "upstream_protocol_error")
    assert len(up.requests) == 3


def test_a_response_that_is_cut_off_is_incomplete(client: RawClient, up: RawUpstream) -> None:
    def behave(wire: Wire, _request: RawRequest) -> bool:
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        return False

    up.behave = behave
    answer = client.get()
    assert (answer.status, answer.body, answer.is_complete) == (200, b"half", False)


def test_requests_are_refused_while_too_many_aborted_ones_have_not_ended(
    running: RunningGateway, up: RawUpstream
) -> None:
    """The transport does not end a call that is cancelled. Nothing is sent to the upstream, and nothing is charged."""
    gateway = running.server._app.state.gateway
    client = gateway.upstream_clients["up"]
    gate, loop = asyncio.Event(), running.server.servers[0].get_loop()

    class Stubborn(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            while not gate.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await gate.wait()
            raise httpx.ReadError("the end")

    before, other = client.transport, Stubborn()
    client._connect(other, 1)
    try:
        with RawClient(running.port) as leaving:
            leaving.request()
            eventually(lambda: len(RUNNING) == 1, "it is with the transport")
        eventually(lambda: client.calls.aborted == 1, "it is aborted and has not ended")
        with RawClient(running.port) as refused:
            answer = refused.get("/api/x", ("X-Client-ID: refunded",))
        assert reason(answer) == (503, "overloaded")
        assert answer.all("retry-after") == [b"1"]
        assert answer.all("x-ratelimit-remaining") == answer.all("x-ratelimit-limit"), "nothing is charged"
        (state,) = client.resources()
        assert (state.resource, state.limit, state.in_use, state.refused, state.status) == (
            "aborted_calls",
            1,
            1,
            1,
            "warn",
        )
        assert not up.requests
        loop.call_soon_threadsafe(gate.set)
        eventually(lambda: client.calls.aborted == 0, "it has ended")
        with RawClient(running.port) as served:
            assert served.get().status == 502, "it is asked again"
    finally:
        loop.call_soon_threadsafe(gate.set)
        client._connect(before)
