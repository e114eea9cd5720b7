"""The gateway inside another application: it works with its lifespan, and reports that it is missing otherwise."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from api_gateway.config import GatewayConfig
from api_gateway.main import GatewayApp, create_app
from tests.kit import RawUpstream, in_front_of


def gateway_of(up: RawUpstream, folder: Path) -> GatewayApp:
    return create_app(GatewayConfig.model_validate(in_front_of(up.url) | {"state_dir": folder}))


async def get(app: ASGIApp, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.get(path)


@pytest.mark.parametrize("outer", [FastAPI, Starlette])
@pytest.mark.parametrize("path", ["/api/x", "/health"])
async def test_without_its_lifespan_it_says_what_is_missing(
    up: RawUpstream, tmp_path: Path, outer: type[Starlette], path: str
) -> None:
    """A framework does not run the lifespan of what is mounted."""
    app = outer()
    app.mount("/", gateway_of(up, tmp_path))
    answer = await get(app, path)
    assert (answer.status_code, answer.json()["reason"]) == (503, "draining")
    assert "docs/embedding.md" in answer.json()["detail"]


@pytest.mark.parametrize("outer", [FastAPI, Starlette])
@pytest.mark.parametrize("prefix", ["", "/gateway", "/api"])
async def test_with_its_lifespan_it_works_below_any_path(
    up: RawUpstream, tmp_path: Path, outer: type[Starlette], prefix: str
) -> None:
    gateway = gateway_of(up, tmp_path)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with gateway.router.lifespan_context(gateway):
            yield

    app = outer(lifespan=lifespan)
    app.mount(prefix or "/", gateway)
    async with app.router.lifespan_context(app):
        answer = await get(app, f"{prefix}/api/a%2Fb?x=1")
        assert (answer.status_code, answer.text) == (200, "ok")
        assert (await get(app, f"{prefix}/health")).json() == {"status": "pass"}
        assert (await get(app, f"{prefix}/nothing")).json()["reason"] == "no_route"
    assert [request.line for request in up.requests] == [b"GET /api/a%2Fb?x=1 HTTP/1.1"]


async def test_a_root_path_that_the_server_puts_before_every_path_is_taken_off(
    up: RawUpstream, tmp_path: Path
) -> None:
    """As `uvicorn --root-path` does behind a proxy that takes a prefix off."""
    gateway = gateway_of(up, tmp_path)

    async def behind_a_prefix(scope: Scope, receive: Receive, send: Send) -> None:
        raw = b"/v1" + scope["raw_path"]
        await gateway({**scope, "root_path": "/v1", "path": "/v1" + scope["path"], "raw_path": raw}, receive, send)

    async with gateway.router.lifespan_context(gateway):
        assert (await get(behind_a_prefix, "/api/x")).status_code == 200
    assert up.requests[0].line == b"GET /api/x HTTP/1.1"


async def test_it_sends_no_hsts_as_its_connections_may_be_plain(up: RawUpstream, tmp_path: Path) -> None:
    """`server.tls` has no effect under another server, so its field must not be on plain HTTP (RFC 6797, 7.2)."""
    tls = {"certificates": [{"certificate": "none.pem"}], "hsts": "max-age=86400"}
    sections = in_front_of(up.url) | {"state_dir": tmp_path, "server": {"tls": tls}}
    gateway = create_app(GatewayConfig.model_validate(sections))
    async with gateway.router.lifespan_context(gateway):
        answer = await get(gateway, "/api/x")
    assert (answer.status_code, answer.headers.get("strict-transport-security")) == (200, None)
