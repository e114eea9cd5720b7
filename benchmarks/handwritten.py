"""Peers written in Python, run by uvicorn as `benchmarks.handwritten:<factory>`; the upstream is in `UPSTREAM`."""

import importlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware

from benchmarks.upstream import SMALL

_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_RATE, _CAPACITY = 1e6, 1e9
_TIMEOUT = httpx.Timeout(60)

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def constant() -> Callable[[Scope, Any, Send], Awaitable[None]]:
    """Return the lower bound: an ASGI application that responds with the small body itself."""
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(SMALL))]

    async def app(scope: Scope, _receive: Any, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": head})
            await send({"type": "http.response.body", "body": SMALL})

    return app


def proxy_lib() -> Any:
    """Return the reverse proxy of fastapi-proxy-lib, without a rate limit."""
    library = importlib.import_module("fastapi_proxy_lib.fastapi.app")
    client = httpx.AsyncClient(timeout=_TIMEOUT)
    return library.reverse_http_app(client=client, base_url=f"{os.environ['UPSTREAM']}/")


class Limit(BaseHTTPMiddleware):
    """A token bucket for each client in a dict."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._buckets: dict[str, tuple[float, float]] = {}

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse with 429 or forward."""
        key = request.headers.get("x-client-id") or (request.client.host if request.client else "")
        now = time.monotonic()
        tokens, at = self._buckets.get(key, (_CAPACITY, now))
        tokens = min(_CAPACITY, tokens + (now - at) * _RATE)
        if tokens < 1:
            return JSONResponse({"error": "rate limited"}, 429, {"Retry-After": "1"})
        self._buckets[key] = (tokens - 1, now)
        return await call_next(request)


class Count(BaseHTTPMiddleware):
    """Requests and time by status."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self._by_status: dict[int, tuple[int, float]] = {}

    async def dispatch(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Measure the time of a request."""
        began = time.perf_counter()
        response = await call_next(request)
        count, total = self._by_status.get(response.status_code, (0, 0.0))
        self._by_status[response.status_code] = (count + 1, total + time.perf_counter() - began)
        return response


def gateway() -> FastAPI:
    """Return a minimal gateway: FastAPI, two middlewares, a shared httpx client, streaming."""
    client = httpx.AsyncClient(base_url=os.environ["UPSTREAM"], timeout=_TIMEOUT)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(Limit)
    app.add_middleware(Count)

    async def proxy(request: Request) -> Response:
        headers = [(k, v) for k, v in request.headers.items() if k not in _HOP_BY_HOP and k != "host"]
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        content = request.stream() if has_body else None
        outgoing = client.build_request(request.method, url, headers=headers, content=content)
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.TimeoutException:
            return JSONResponse({"error": "upstream timeout"}, 504)
        except httpx.TransportError:
            return JSONResponse({"error": "bad gateway"}, 502)
        kept = {name: value for name, value in answer.headers.items() if name not in _HOP_BY_HOP}
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose)
        )

    app.add_api_route("/api/{path:path}", proxy, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
    return app
