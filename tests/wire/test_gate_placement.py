"""The operator gate works wherever the application runs: stock servers, mounted, with other routes and middleware."""

import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api_gateway.config import GatewayConfig
from api_gateway.main import create_app
from tests.kit import Wire, ask, eventually, in_front_of

TOKEN = "correct-horse-battery"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def build(state_dir: Path, **admin: Any) -> FastAPI:
    sections = in_front_of("http://127.0.0.1:9") | {"state_dir": state_dir, "admin": admin}
    return create_app(GatewayConfig.model_validate(sections))


@asynccontextmanager
async def asking(gateway: FastAPI, app: Any = None, url: str = "http://localhost:8000") -> AsyncIterator[Any]:
    """Yield a client of `app`, which is the gateway or has it inside."""
    async with gateway.router.lifespan_context(gateway):
        transport = httpx.ASGITransport(app or gateway, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=url) as client:
            yield client


class Reading:
    """A body that counts what is taken of it."""

    def __init__(self) -> None:
        self.taken = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.taken < 100_000_000:
            self.taken += 65_536
            yield bytes(65_536)


async def test_nothing_of_a_body_is_taken_without_a_token_and_little_with_one(tmp_path: Path) -> None:
    async with asking(build(tmp_path, token=TOKEN)) as client:
        headers = {"Content-Type": "application/json"}
        body = Reading()
        answer = await client.post("/clients/x/tier", content=body, headers=headers)
        assert (answer.status_code, body.taken) == (401, 0)
        answer = await client.post("/clients/x/tier", content=body, headers=headers | AUTHORIZED)
        assert (answer.status_code, answer.json()["reason"]) == (413, "body_too_large")
        assert body.taken <= 3 * 65_536


async def test_nothing_of_a_body_to_an_unknown_path_is_taken(tmp_path: Path) -> None:
    async with asking(build(tmp_path)) as client:
        body = Reading()
        answer = await client.post("/nowhere", content=body)
        assert (answer.status_code, answer.json()["reason"], body.taken) == (404, "no_route", 0)


@pytest.mark.parametrize("path", ["/metrics", "/clients/x", "/openapi.json", "/configuration"])
async def test_mounted_in_another_application_it_holds(tmp_path: Path, path: str) -> None:
    gateway, outer = build(tmp_path, token=TOKEN), FastAPI()
    outer.mount("/gw", gateway)
    async with asking(gateway, outer) as client:
        assert (await client.get(f"/gw{path}")).status_code == 401
        assert (await client.get(f"/gw{path}", headers=AUTHORIZED)).status_code == 200
        assert (await client.get("/gw/healthz")).text == "ok\n"
        for page in ("/gw/", "/gw/dashboard", "/gw/docs", "/gw/dashboard/app.js"):
            assert (await client.get(page)).status_code == 200
        found = await client.get("/gw/clients/a%2Fgrants", headers=AUTHORIZED)
        assert found.json()["client_id"] == "a/grants"
        assert (await client.get("/gw/openapi.json", headers=AUTHORIZED)).json()["servers"] == [{"url": "/gw"}]


async def test_routes_and_mounts_of_others_are_not_the_gates(tmp_path: Path) -> None:
    gateway, other = build(tmp_path, token=TOKEN), FastAPI()

    @gateway.get("/hello")
    async def hello() -> str:
        return "hello"

    @other.post("/echo")
    async def echo(said: dict[str, str]) -> dict[str, str]:
        return said

    gateway.mount("/other", other)
    async with asking(gateway) as client:
        assert (await client.get("/hello", headers={"Origin": "https://elsewhere.example"})).json() == "hello"
        assert (await client.post("/other/echo", json={"a": "b"})).json() == {"a": "b"}
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/nowhere")).status_code == 404


class Moved:
    """Middleware that serves the operator endpoints under other paths as well."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/moved"):
            scope = {**scope, "path": scope["path"].removeprefix("/moved")}
        await self.app(scope, receive, send)


async def test_a_middleware_that_rewrites_paths_cannot_bypass_the_gate(tmp_path: Path) -> None:
    """What did not come through the gate has no operator."""
    gateway = build(tmp_path, token=TOKEN)
    gateway.add_middleware(Moved)
    async with asking(gateway) as client:
        for method, path in (
            ("GET", "/metrics"),
            ("GET", "/clients/x"),
            ("DELETE", "/clients/x"),
            ("POST", "/clients/x/reset"),
        ):
            answer = await client.request(method, f"/moved{path}", headers=AUTHORIZED)
            assert (answer.status_code, answer.json()["reason"]) == (403, "forbidden")
        assert (await client.get("/metrics", headers=AUTHORIZED)).status_code == 200
        assert set((await client.get("/moved/health", headers=AUTHORIZED)).json()) == {"status"}


Serve = Callable[[FastAPI], int]


@pytest.fixture(params=["httptools", "h11"])
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Run applications in uvicorn with a protocol of its own."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http=request.param, log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running.append((server, thread))
        thread.start()
        eventually(lambda: server.started or not thread.is_alive(), "uvicorn starts")
        return int(listener.getsockname()[1])

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def connected(port: int) -> Iterator[Wire]:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        yield Wire(sock)


def test_stock_uvicorn_has_the_gate_too(serve: Serve, tmp_path: Path) -> None:
    port = serve(build(tmp_path, token=TOKEN))
    url, json = f"http://127.0.0.1:{port}", {"Content-Type": "application/json"}
    assert ask(f"{url}/metrics").status == 401
    assert ask(f"{url}/metrics", headers=AUTHORIZED | {"Origin": "https://evil.example"}).status == 403
    head = ask(f"{url}/metrics", method="HEAD", headers=AUTHORIZED)
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 0
    tier = b'{"tier": "PREMIUM"}'
    for client_id in ("team", "team%2Fgrants"):
        answer = ask(f"{url}/clients/{client_id}/tier", method="POST", headers=AUTHORIZED | json, body=tier)
        assert answer.status == 200
    assert (
        ask(f"{url}/clients/team%2Fgrants", method="DELETE", headers=AUTHORIZED).json()["client_id"] == "team/grants"
    )
    assert ask(f"{url}/clients/team", headers=AUTHORIZED).json()["tier_source"] == "registered"
    with connected(port) as wire:
        wire.send(b"POST /clients/x/tier HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000000\r\n\r\n")
        refused = wire.read_until(b"\r\n\r\n")
        assert refused is not None
        assert refused.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in refused.lower()
