"""The gateway under uvicorn: no trailer becomes a header field, and its own protocol has what its own server has."""

import asyncio
import json
import logging
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api_gateway.assembly import credential_watch
from api_gateway.config import GatewayConfig
from api_gateway.downstream import listener as listener_module
from api_gateway.downstream.uvicorn_server import COMMAND
from api_gateway.http1.asgi import SERVER_EXTENSION
from api_gateway.main import GatewayApp, create_app
from api_gateway.settings.addresses import AddressesSection
from tests.kit import PATIENCE, RawClient, RawUpstream, Wire, case, eventually, in_front_of, reason, reply

OWN = "api_gateway.server:protocol"
TOKEN = "correct-horse-battery"
CHUNKED = "POST {} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n{}\r\n2\r\nhi\r\n0\r\n{}\r\n"
TRAILERS = f"Authorization: Bearer {TOKEN}\r\nX-Client-ID: forged\r\nX-Forwarded-For: 10.0.0.1\r\n"

Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Run applications in uvicorn with one of its protocols, or another one."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any, http: str, *, listener: socket.socket | None = None, **options: Any) -> int:
        listener = listener or socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=http, log_config=None, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running.append((server, thread))
        thread.start()
        eventually(lambda: server.started or not thread.is_alive(), "uvicorn starts")
        return 0 if listener.family == socket.AF_UNIX else int(listener.getsockname()[1])

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def build(up: RawUpstream, tmp_path: Path) -> Callable[..., GatewayApp]:
    def made(**server: Any) -> GatewayApp:
        return create_app(config(up, tmp_path, **server), server_headers=frozenset({b"date", b"server"}))

    return made


def config(up: RawUpstream, folder: Path, **server: Any) -> GatewayConfig:
    options = {"state_dir": folder, "admin": {"token": TOKEN}, "log": {"access": False}}
    limits = {"max_event_loop_lag": None, "drain_timeout": 2} | server
    return GatewayConfig.model_validate(in_front_of(up.url) | options | {"server": limits})


def mounted(gateway: GatewayApp, prefix: str = "") -> FastAPI:
    """Return an application with the gateway at `prefix`, behind middleware that hides the server."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway.router.lifespan_context(gateway):
            yield

    async def pass_on(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    outer = FastAPI(lifespan=lifespan)
    outer.mount(prefix or "/", gateway)
    outer.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    return outer


def extended(gateway: GatewayApp) -> FastAPI:
    """Return the gateway with middleware of the embedding program, which hides the server from it."""

    async def pass_on(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    gateway.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    return gateway


@pytest.mark.parametrize("way", [lambda gateway: gateway, mounted, extended], ids=["alone", "mounted", "extended"])
@pytest.mark.parametrize("trailers", [TRAILERS, ""], ids=["trailers", "none"])
def test_httptools_makes_trailers_header_fields_so_chunked_requests_are_refused(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, way: Callable[..., Any], trailers: str
) -> None:
    """Also without trailers, which is known too late; a request with a length is served."""
    port = serve(way(build()), "httptools")
    for path in ("/api/x", "/clients/c/tier"):
        with RawClient(port) as client:
            client.send(CHUNKED.format(path, "Content-Type: application/json\r\n", trailers).encode())
            answer = client.answer()
            assert reason(answer) == (411, "length_required")
            assert COMMAND in json.loads(answer.body)["detail"]
            assert answer.all("connection") == [b"close"]
    assert not up.requests
    with RawClient(port) as client:
        client.request("POST", headers=("Content-Length: 2",), body=b"hi")
        assert client.answer().status == 200
    assert up.requests[-1].body == b"hi"


def chunks_read(wire: Wire) -> bytes:
    """Return the end of a chunked body, from behind its last chunk on."""
    while (line := wire.read_until(b"\r\n")) != b"0\r\n":
        assert line is not None
        wire.read_exactly(int(line, 16) + 2)
    end = b""
    while not end.endswith(b"\r\n\r\n") and end != b"\r\n":
        end += wire.read_until(b"\r\n") or b"\r\n\r\n"
    return end


@pytest.mark.parametrize("pieces", [1, 3])
def test_h11_discards_trailers_so_chunked_requests_are_served(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, pieces: int
) -> None:
    """In one packet with the head, and after it."""
    port = serve(build(), "h11")
    message = CHUNKED.format("/api/x", "", TRAILERS).encode()
    size = len(message) // pieces + 1
    with RawClient(port) as client:
        for start in range(0, len(message), size):
            client.send(message[start : start + size])
        assert client.answer().status == 200
        client.send(CHUNKED.format("/clients/c/tier", "", TRAILERS).encode())
        assert reason(client.answer()) == (401, "unauthorized"), "the token in the trailer is not read"
    (request,) = up.requests
    assert request.body == b"hi"
    for name in ("authorization", "x-client-id"):
        assert not request.all(name)
    assert request.all("x-forwarded-for") == [b"127.0.0.1"]


class Reframing:
    """Middleware that adds the header fields of the request field `X-Framing` (`name=value;…`) to the request."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"x-framing", b"")
        added = [tuple(field.split(b"=")) for field in given.split(b";") if field]
        await self.app({**scope, "headers": [*scope.get("headers", ()), *added]}, receive, send)


def reframing(gateway: GatewayApp) -> FastAPI:
    """Return the gateway with middleware that changes the framing of requests."""
    gateway.add_middleware(Reframing)
    return gateway


@pytest.mark.parametrize(
    ("http", "way", "fields"),
    [
        ("h11", lambda gateway: gateway, "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n"),
        ("h11", mounted, "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n"),
        ("h11", reframing, "Transfer-Encoding: chunked\r\nX-Framing: content-length=4\r\n"),
        ("httptools", reframing, "Content-Length: 5\r\nX-Framing: transfer-encoding=chunked\r\n"),
        (OWN, reframing, "Transfer-Encoding: chunked\r\nX-Framing: content-length=4\r\n"),
        (OWN, reframing, "Content-Length: 5\r\nX-Framing: content-length=4\r\n"),
    ],
)
def test_a_request_with_two_framings_is_refused_whatever_server_or_middleware_leaves_them(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, http: str, way: Callable[..., Any], fields: str
) -> None:
    """An upstream that takes the length would serve the rest of the body as the next request."""
    port = serve(way(build()), http)
    paths = ("/api/x",) if way is reframing else ("/api/x", "/clients/c/tier", "/health")
    for path in paths:  # middleware of the program is in front of what is proxied only
        with RawClient(port) as client:
            client.send(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n".encode())
            client.send(b"0\r\n\r\n")
            answer = client.answer()
            assert answer.status in (400, 411), path
            assert answer.all("connection") == [b"close"]
    assert not up.requests


class PassingOn:
    """Middleware that replaces `receive` and `send`, and hides the server from the gateway."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def receiving() -> Any:
            return await receive()

        async def sending(message: Any) -> None:
            await send(message)

        await self.app({**scope}, receiving, sending)


def wrapped(gateway: GatewayApp) -> FastAPI:
    """Return the gateway with middleware that passes on all messages."""
    gateway.add_middleware(PassingOn)
    return gateway


class Dropping(PassingOn):
    """Middleware that does not know trailers."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] != "http.response.trailers":
                await send(message)

        await self.app(scope, receive, sending)


def dropping(gateway: GatewayApp) -> FastAPI:
    """Return the gateway with middleware that drops trailers."""
    gateway.add_middleware(Dropping)
    return gateway


EVERY_WAY = pytest.mark.parametrize(
    "way",
    [lambda gateway: gateway, mounted, extended, wrapped, dropping],
    ids=["alone", "mounted", "extended", "wrapped", "dropping"],
)


class AwaitingBody(PassingOn):
    """Middleware that waits until a part of the body has come."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while scope["type"] == "http" and scope[SERVER_EXTENSION].awaits_continue:  # noqa: ASYNC110 - there is none
            await asyncio.sleep(0)
        await self.app(scope, receive, send)


def test_no_expectation_goes_upstream_if_a_part_of_the_body_has_come_while_middleware_waited(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve
) -> None:
    gateway = build()
    gateway.add_middleware(AwaitingBody)
    with RawClient(serve(gateway, OWN)) as client:
        for first, rest in ((b"", b"abc"), (b"a", b"bc"), (b"abc", b"")):
            client.send(b"PUT /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n" + first)
            client.send(rest)
            assert client.answer().status == 200
            assert (up.requests[-1].body, up.requests[-1].all("expect")) == (b"abc", [])


@EVERY_WAY
def test_the_gateways_protocol_forwards_trailers_as_trailers(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, way: Callable[..., Any]
) -> None:
    """Also in an application that mounts the gateway; its middleware sees no trailer either."""
    ends: list[bytes] = []

    def behave(wire: Wire, _request: Any) -> None:
        ends.append(chunks_read(wire))
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    up.behave, up.reads_body = behave, False
    port = serve(way(build()), OWN)
    with RawClient(port) as client:
        client.send(CHUNKED.format("/api/x", "Trailer: X-Sum\r\n", "X-Sum: 1\r\nX-Client-ID: forged\r\n").encode())
        assert client.answer().status == 200
    assert not up.requests[-1].all("x-client-id")
    assert b"X-Sum: 1" in ends[0]


def test_the_gateways_protocol_takes_what_applications_pass_for_pairs_and_bytes(serve: Serve) -> None:
    """ASGI permits any iterables; frameworks also pass other objects than bytes."""
    heads: Iterator[Any] = iter(
        [
            [[b"Content-Length", b"2"]],
            iter([(bytearray(b"Content-Length"), memoryview(b"2"))]),
            ((b"content-length", b"2"),),
            [],
        ]
    )

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": next(heads)})
            await send({"type": "http.response.body", "body": bytearray(b"o"), "more_body": True})
            await send({"type": "http.response.body", "body": memoryview(b"k")})

    with RawClient(serve(app, OWN)) as client:
        for _ in range(4):
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = client.answer()
            assert (answer.status, answer.body) == (200, b"ok")


@EVERY_WAY
def test_the_gateways_protocol_forwards_trailers_of_responses(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, way: Callable[..., Any]
) -> None:
    """Unless middleware drops them, and then the response is complete nevertheless."""
    up.behave = lambda wire, _: wire.send(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\nX-Client-ID: a\r\n\r\n"
    )
    port = serve(way(build()), OWN)
    with RawClient(port) as client:
        for _ in range(2):
            client.request("GET", "/api/x", ("TE: trailers",))
            head = client.read_until(b"\r\n\r\n")
            assert head is not None
            assert head.startswith(b"HTTP/1.1 200 ")
            expected = b"X-Sum: 1\r\n\r\n" if way not in (mounted, extended, dropping) else b"\r\n"
            assert chunks_read(client) == expected


@pytest.mark.parametrize("way", [lambda gateway: gateway, wrapped], ids=["alone", "wrapped"])
def test_the_gateways_protocol_forwards_interim_responses_and_websockets(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, way: Callable[..., Any]
) -> None:
    def behave(wire: Wire, request: Any) -> bool:
        if request.all("upgrade"):
            wire.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            wire.send(wire.read_exactly(4))
            return False
        wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        return True

    up.behave = behave
    port = serve(way(build()), OWN)
    with RawClient(port) as client:
        client.request()
        hints = client.read_until(b"\r\n\r\n")
        assert hints is not None
        assert hints.startswith(b"HTTP/1.1 103 ")
        assert client.answer().status == 200
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        client.request(
            "GET", "/api/ws", ("Upgrade: websocket", "Connection: Upgrade", key, "Sec-WebSocket-Version: 13")
        )
        switch = client.read_until(b"\r\n\r\n")
        assert switch is not None
        assert switch.startswith(b"HTTP/1.1 101 ")
        client.send(b"\x01\x02\x03\x04")
        assert client.read_exactly(4) == b"\x01\x02\x03\x04"


def test_the_gateways_protocol_has_the_fast_path_the_limits_and_the_shares(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, fast_path_spy: list[bool]
) -> None:
    app = build(max_header_bytes=2048, max_connections=4, max_connections_per_peer=1)
    port = serve(app, OWN)
    up.behave = reply(b"ok", headers=((b"Server", b"upstream"), (b"Date", b"Sun, 06 Nov 1994 08:49:37 GMT")))
    with RawClient(port) as client:
        client.get()
        fast_path_spy.clear()
        for field in ("X-Plain: 1", "X-General:  two blanks"):
            answer = client.get("/api/y", (field, "X-Forwarded-For: 10.0.0.1"))
            assert answer.status == 200
            assert answer.all("server") == [b"upstream"], "uvicorn adds none"
            assert answer.all("date") == [b"Sun, 06 Nov 1994 08:49:37 GMT"]
        assert fast_path_spy == [True, False]
        assert up.requests[-1].all("x-forwarded-for") == [b"127.0.0.1"], "server.trusted_proxies decides"
        with RawClient(port) as second:
            second.request()
            assert reason(second.answer()) == (503, "overloaded")
        client.request("GET", "/health", (f"Authorization: Bearer {TOKEN}",))
        resources = json.loads(client.answer().body)["resources"]
        assert resources[0] | {"in_use": 1} == resources[0]
        assert (resources[0]["resource"], resources[0]["limit"]) == ("connections", 4)
        client.request("GET", "/api/x", (f"X-Long: {'x' * 4000}",))
        assert reason(client.answer()) == (431, "headers_too_large")
    assert app.listener is not None
    assert app.listener.shares.total == 4


def below(prefix: str) -> Callable[[GatewayApp], FastAPI]:
    """Return what mounts the gateway at a prefix."""
    return lambda gateway: mounted(gateway, prefix)


@pytest.mark.parametrize("http", ["h11", OWN])
def test_below_a_prefix_no_spelling_avoids_the_rules_of_a_route(
    up: RawUpstream, tmp_path: Path, serve: Serve, http: str
) -> None:
    """Whether the route has served a usual path before, or an unusual one, makes no difference."""
    routes = [
        {"name": "all", "path": "/api", "upstream": "up"},
        {"name": "keys", "path": "/api/keys", "upstream": "up", "addresses": {"deny": ["127.0.0.0/8"]}},
    ]
    base = config(up, tmp_path).model_dump(exclude_unset=True)
    app = below("/gateway")(create_app(GatewayConfig.model_validate(base | {"routes": routes})))
    port = serve(app, http)
    rows = [("/api/x", 200), ("/api/KEYS/1", 403), ("/api/x", 200), ("/api/Keys", 403), ("/api/X", 200)]
    for path, status in rows:
        with RawClient(port) as client:
            answer = client.get(f"/gateway{path}")
        assert answer.status == status, path


@pytest.mark.parametrize("http", ["h11", "httptools", OWN])
@pytest.mark.parametrize(
    ("way", "root_path", "prefix", "public"),
    [
        (below("/gateway"), "", "/gateway", "/gateway"),
        (below("/gateway"), "/v1", "/gateway", "/v1/gateway"),
        (below("/a{tenant}"), "", "/a%20b%0D", "/a%20b%0D"),
        (lambda gateway: gateway, "/v1", "", "/v1"),
        (extended, "/v1", "", "/v1"),
    ],
    ids=["mounted", "mounted below a root", "mounted by a template", "root", "extended root"],
)
def test_below_a_prefix_the_upstream_gets_the_path_without_it_and_clients_get_urls_with_it(
    up: RawUpstream,
    tmp_path: Path,
    serve: Serve,
    http: str,
    way: Callable[[GatewayApp], Any],
    root_path: str,
    prefix: str,
    public: str,
) -> None:
    """A proxy in front has removed `root_path`. Requests of both paths, and one whose path is spelt oddly."""
    routes = [
        {"name": "plain", "path": "/api/plain", "upstream": "up"},
        {"name": "kept", "path": "/api/kept", "upstream": "up", "rewrite_urls": False},
        {"name": "cut", "path": "/api/cut", "upstream": "up", "strip_prefix": "/api", "rewrite_cookies": True},
        {"name": "new", "path": "/api/new", "upstream": "up", "rewrite": {"prefix": "/v2"}},
        {
            "name": "split",
            "path": "/api/split",
            "upstreams": [{"name": "up"}],
            "strip_prefix": "/api",
            "response_headers": {"set": {"X-Edited": "1"}},
        },
        {"name": "moved", "path": "/api/moved", "redirect": {"to": "/shop{path}{query}"}},
        {"name": "away", "path": "/api/away", "redirect": {"to": "https://a.example{path}"}},
    ]
    base = config(up, tmp_path).model_dump(exclude_unset=True)
    app = way(create_app(GatewayConfig.model_validate(base | {"routes": routes})))
    port = serve(app, http, **({"root_path": root_path} if root_path else {}))
    rows: list[Any] = [
        # request, what the upstream gets, its Location, the client's, X-Forwarded-Prefix
        ("/api/plain/a%2Fb?x=1", "/api/plain/a%2Fb?x=1", "/api/plain/x", "P/api/plain/x", ["P"]),
        ("/api/plain/x", "/api/plain/x", "P/api/plain/x", "P/api/plain/x", ["P"]),
        ("/api/plain/x", "/api/plain/x", f"{up.url}/api/plain/x/", "P/api/plain/x/", ["P"]),
        ("/api/plain/x", "/api/plain/x", "https://other.example/", "https://other.example/", ["P"]),
        ("/api/kept/x", "/api/kept/x", "/api/kept/y", "/api/kept/y", []),
        ("/api/cut/7", "/cut/7", "/cut/7", "P/api/cut/7", ["P/api"]),
        ("/api/cut/7", "/cut/7", "/api/cut/7", "P/api/cut/7", ["P/api"]),
        ("/api/cut/7", "/cut/7", "P/api/cut/7", "P/api/cut/7", ["P/api"]),
        ("/api/split/7", "/split/7", "/split/7", "P/api/split/7", ["P/api"]),
        ("/api/new/7", "/v2/7", "/v2/8", "P/api/new/8", []),
        ("/api/new/7", "/v2/7", "/other", "P/other", []),
    ]
    with RawClient(port) as client:
        for path, sent, *urls, prefixes in rows:
            location, expected = (url.replace("P", public) for url in urls)
            fields = ((b"Location", location.encode()), (b"Set-Cookie", b"a=b; Path=/cut"))
            up.behave = reply(b"ok", b"302 Found", fields)
            with case(f"{path} {location}"):
                answer = client.get(f"{prefix}{path}")
                assert (answer.status, answer.all("location")) == (302, [expected.encode()])
                cookie = f"{public}/api/cut" if path.startswith("/api/cut") else "/cut"
                assert answer.all("set-cookie") == [f"a=b; Path={cookie}".encode()]
                assert up.requests[-1].line == f"GET {sent} HTTP/1.1".encode()
                assert up.requests[-1].all("x-forwarded-prefix") == [
                    one.replace("P", public).encode() for one in prefixes
                ]
        assert client.get(f"{prefix}/api/moved/x?q=1").all("location") == [f"{public}/shop/api/moved/x?q=1".encode()]
        assert client.get(f"{prefix}/api/away/x").all("location") == [b"https://a.example/api/away/x"]
        assert client.get(f"{prefix}/health").status == 200
        assert reason(client.get(f"{prefix}/nothing"))[1] == "no_route"
        client.send(f"GET {prefix}/api/cut/old HTTP/1.0\r\nHost: a\r\n\r\n".encode())
        assert client.answer().all("location")
        assert up.requests[-1].line == b"GET /cut/old HTTP/1.1"


def reporting(gateway: GatewayApp) -> FastAPI:
    """Return an application that mounts the gateway, and itself reports the address of clients."""
    outer = mounted(gateway)

    async def report(request: Request) -> Response:
        return Response(f"{request.client.host if request.client else None} {request.url.scheme}")

    outer.router.routes.insert(0, Route("/outer", report))
    return outer


FORGED = ("X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https")


@pytest.mark.parametrize("way", [lambda gateway: gateway, reporting, extended], ids=["alone", "mounted", "extended"])
@pytest.mark.parametrize("http", ["h11", "httptools", OWN])
def test_the_gateway_alone_decides_the_clients_address_under_every_protocol(
    up: RawUpstream, serve: Serve, tmp_path: Path, http: str, way: Callable[..., Any]
) -> None:
    """By default uvicorn believes any local peer, also for an application that mounts the gateway."""

    def started(name: str, **server: Any) -> int:
        rules = {"addresses": AddressesSection.model_validate({"deny": ["192.0.2.0/24"]})}
        return serve(way(create_app(config(up, tmp_path / name, **server).model_copy(update=rules))), http)

    with RawClient(started("strict")) as client:
        for field in FORGED[0], "X-Forwarded-For: 203.0.113.1, 192.0.2.1":
            assert client.get("/api/x", (field, FORGED[1])).status == 200
            assert up.requests[-1].all("x-forwarded-for") == [b"127.0.0.1"]
            assert up.requests[-1].all("x-forwarded-proto") == [b"http"]
        if way is reporting:
            assert client.get("/outer", FORGED).body == b"192.0.2.1 https", "its own routes have uvicorn's"
    with RawClient(started("trusting", trusted_proxies=["127.0.0.1"])) as client:
        assert reason(client.get("/api/x", FORGED)) == (403, "address_denied")
        assert client.get("/api/x", ("X-Forwarded-For: 192.0.2.1, 203.0.113.1",)).status == 200
        assert up.requests[-1].all("x-forwarded-for") == [b"192.0.2.1, 203.0.113.1, 127.0.0.1"]


class Renaming(PassingOn):
    """Middleware of an embedding program that knows the client's address better."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app({**scope, "client": ("192.0.2.9", 1)} if scope["type"] == "http" else scope, receive, send)


@pytest.mark.parametrize("field", ["X-Forwarded-For: 192.0.2.1", "X-Plain: 1"])
def test_the_address_that_other_middleware_sets_is_believed(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, field: str
) -> None:
    with RawClient(serve(Renaming(build()), "httptools")) as client:
        assert client.get("/api/x", (field,)).status == 200
    assert up.requests[-1].all("x-forwarded-for") == [b"192.0.2.9"]


@pytest.mark.parametrize("http", ["httptools", "h11", OWN])
def test_a_proxy_on_a_unix_socket_is_trusted_by_its_name(
    up: RawUpstream, tmp_path: Path, serve: Serve, http: str
) -> None:
    """Such clients have no address under uvicorn."""
    path = tmp_path / "gateway.sock"
    app = create_app(config(up, tmp_path, trusted_proxies=["unix"]))
    serve(app, http, listener=socket.create_server(str(path), family=socket.AF_UNIX))
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(b"GET /api/x HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 OK\r\n")
    assert up.requests[-1].all("x-forwarded-for") == [b"192.0.2.1, unix"]


BEGUN = b"Transfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n"
STREAMS = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nbegun",
    "chunks": b"HTTP/1.1 200 OK\r\n" + BEGUN,
    "events": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + BEGUN,
}


@pytest.mark.parametrize("way", [lambda gateway: gateway, mounted, extended], ids=["alone", "mounted", "extended"])
@pytest.mark.parametrize("http", ["h11", "httptools", OWN])
def test_a_stream_ends_with_its_key_under_every_protocol(
    build: Callable[..., GatewayApp],
    up: RawUpstream,
    serve: Serve,
    http: str,
    way: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of another key go on, and a request without a response is completed."""
    monkeypatch.setattr(credential_watch, "INTERVAL", 0.05)
    released = threading.Event()

    def behave(wire: Wire, request: Any) -> bool:
        name = request.line.split()[1].removeprefix(b"/api/").decode()
        if name == "slow":
            released.wait(PATIENCE)
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
            return True
        wire.send(STREAMS[name])
        released.wait(PATIENCE)
        return False

    up.behave = behave
    port = serve(way(build()), http)
    made, other = (operate(port, "POST", "/clients/acme/keys", b"{}") for _ in range(2))
    with ExitStack() as stack, RawClient(port) as slow:
        ended, going = ({name: stack.enter_context(RawClient(port)) for name in STREAMS} for _ in range(2))
        for clients, one in ((ended, made), (going, other)):
            for name, client in clients.items():
                client.request("GET", f"/api/{name}", (f"X-API-Key: {one['key']}",))
                assert client.read_until(b"begun") is not None
        slow.request("GET", "/api/slow", (f"X-API-Key: {made['key']}",))
        eventually(lambda: len(up.requests) == 2 * len(STREAMS) + 1, "all requests are on their way")
        operate(port, "DELETE", f"/clients/acme/keys/{made['id']}")
        for name, client in ended.items():
            with case(name):
                rest = client.read_exactly(10_000)
                assert b"0\r\n" not in rest, "what is missing is not hidden by the end of the chunks"
        ready, _, _ = select.select([client.sock for client in going.values()], [], [], 0.2)
        assert ready == [], "nothing more comes, nor an end"
        released.set()
        assert slow.answer().status == 200


@pytest.mark.parametrize("way", [lambda gateway: gateway, mounted, extended], ids=["alone", "mounted", "extended"])
@pytest.mark.parametrize("http", ["h11", "httptools", OWN])
def test_a_response_that_the_upstream_cuts_is_incomplete_for_the_client_under_every_protocol(
    build: Callable[..., GatewayApp], up: RawUpstream, serve: Serve, http: str, way: Callable[..., Any]
) -> None:
    def behave(wire: Wire, _request: Any) -> bool:
        wire.send(STREAMS["chunks"])
        return False

    up.behave = behave
    with RawClient(serve(way(build()), http)) as client:
        client.request()
        assert client.read_until(b"begun\r\n") is not None
        assert client.read_exactly(100) == b"", "the connection ends"


def operate(port: int, method: str, path: str, body: bytes = b"") -> Any:
    """Call an operator endpoint, which must succeed."""
    fields = (f"Authorization: Bearer {TOKEN}", "Content-Type: application/json", f"Content-Length: {len(body)}")
    with RawClient(port) as client:
        client.request(method, path, fields, body)
        answer = client.answer()
    assert answer.status < 300, answer.body
    return json.loads(answer.body)


def test_a_reload_changes_its_limits(up: RawUpstream, serve: Serve, tmp_path: Path) -> None:
    changed = config(up, tmp_path, max_header_bytes=2048, max_connections=5)
    app = create_app(config(up, tmp_path), read=lambda: changed)
    port = serve(app, OWN)
    with RawClient(port) as client:
        assert client.get("/api/x", (f"X-Long: {'x' * 4000}",)).status == 200
        client.request("POST", "/reload", (f"Authorization: Bearer {TOKEN}", "Content-Length: 0"))
        assert client.answer().status == 200
    with RawClient(port) as client:
        client.request("GET", "/api/x", (f"X-Long: {'x' * 4000}",))
        assert reason(client.answer()) == (431, "headers_too_large")
    assert app.listener is not None
    assert app.listener.shares.total == 5


def test_a_stop_waits_for_requests_up_to_the_drain_timeout(
    build: Callable[..., GatewayApp], up: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle connections are closed, and a request in progress is completed with `Connection: close`."""
    monkeypatch.setattr(listener_module, "DRAIN_LINGER", 0.2)
    go_on = threading.Event()

    def behave(wire: Wire, _request: Any) -> None:
        assert go_on.wait(PATIENCE)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    up.behave = behave
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build(drain_timeout=PATIENCE), http=OWN, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    eventually(lambda: server.started, "uvicorn starts")
    port = listener.getsockname()[1]
    with RawClient(port) as client, RawClient(port) as idle:
        idle.request("GET", "/healthz")
        assert idle.answer().status == 200
        client.request()
        eventually(lambda: bool(up.requests), "the request is on its way")
        server.should_exit = True
        assert idle.is_closed()
        go_on.set()
        answer = client.answer()
        assert (answer.status, answer.all("connection")) == (200, [b"close"])
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert server.config.timeout_graceful_shutdown == PATIENCE


@pytest.mark.parametrize(
    ("http", "words"),
    [("httptools", ["chunked requests get 411", "WebSockets", COMMAND]), ("h11", ["WebSockets", COMMAND]), (OWN, [])],
)
def test_the_log_says_what_is_missing_and_the_command_that_has_it(
    build: Callable[..., GatewayApp], serve: Serve, caplog: pytest.LogCaptureFixture, http: str, words: list[str]
) -> None:
    with caplog.at_level(logging.WARNING, "api_gateway"):
        serve(build(), http)
    text = caplog.text
    assert all(word in text for word in words)
    assert ("411" in text) == (http == "httptools")
    assert ("uvicorn" in text) == bool(words)


@pytest.mark.parametrize(
    ("http", "way"), [("httptools", lambda gateway: gateway), (OWN, lambda gateway: gateway), (OWN, mounted)]
)
def test_the_log_says_which_settings_about_proxies_have_no_effect_here(
    up: RawUpstream,
    tmp_path: Path,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
    http: str,
    way: Callable[..., Any],
) -> None:
    """Only those that an operator has set: uvicorn trusts local peers by default."""
    unread = [] if http == OWN and way is not mounted else ["server.proxy_protocol", "10.0.0.7", COMMAND]
    rows: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
        ({}, {}, []),
        ({"forwarded_allow_ips": "::1, 127.0.0.1"}, {}, []),
        ({"forwarded_allow_ips": ["10.0.0.5", "127.0.0.1"]}, {}, ["FORWARDED_ALLOW_IPS", "10.0.0.5: set server.t"]),
        ({"forwarded_allow_ips": "*"}, {}, ["FORWARDED_ALLOW_IPS", "got *: set server.trusted_proxies"]),
        ({"forwarded_allow_ips": "*"}, {"trusted_proxies": ["10.0.0.0/8"]}, []),
        ({"forwarded_allow_ips": "*", "proxy_headers": False}, {}, []),
        ({}, {"proxy_protocol": ["10.0.0.7"]}, unread),
    ]
    for number, (options, server, words) in enumerate(rows):
        caplog.clear()
        with case(f"{options} {server}"), caplog.at_level(logging.WARNING, "api_gateway"):
            serve(way(create_app(config(up, tmp_path / str(number), **server))), http, **options)
            text = "\n".join(line for line in caplog.messages if "has no effect" in line)
            assert bool(text) == bool(words)
            assert all(word in text for word in words), text


def test_without_a_lifespan_the_gateways_protocol_serves_with_default_limits(
    build: Callable[..., GatewayApp], serve: Serve
) -> None:
    """The gateway has not started then, and says so."""
    port = serve(build(), OWN, lifespan="off")
    with RawClient(port) as client:
        client.request()
        assert reason(client.answer()) == (503, "draining")
