"""The demo upstreams: four small HTTP servers on free loopback ports, run in a thread.

They are the upstreams while none is configured. Their state is in memory.
"""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

import uvicorn

Response = tuple[int, Any]
Handler = Callable[[str, str, Mapping[str, str], bytes], Awaitable[Response]]

DEMO_NAMES = ("users", "orders", "slow", "flaky")
MAX_DELAY = 30.0
_START_TIMEOUT = 10.0
_LOGGERS = ("uvicorn.error", "uvicorn.access")

USERS = [
    {"id": 1, "name": "Ada Lovelace", "email": "ada@example.com"},
    {"id": 2, "name": "Alan Turing", "email": "alan@example.com"},
    {"id": 3, "name": "Grace Hopper", "email": "grace@example.com"},
]
ORDERS = [
    {"id": 101, "user_id": 1, "item": "punched cards", "total": 12.5},
    {"id": 102, "user_id": 3, "item": "nanosecond wire", "total": 0.3},
]


def _listing(name: str, rows: list[dict[str, Any]]) -> Handler:
    async def handle(method: str, path: str, _query: Mapping[str, str], body: bytes) -> Response:
        key = path.removeprefix(f"/{name}").strip("/")
        if method == "POST":
            return 201, {"created": json.loads(body) if body else None}
        if not key:
            return 200, {name: rows}
        found = next((row for row in rows if str(row["id"]) == key), None)
        return (200, found) if found else (404, {"error": f"no {name} {key}"})

    return handle


async def _slow(_method: str, _path: str, query: Mapping[str, str], _body: bytes) -> Response:
    seconds = min(max(float(query.get("seconds", 1)), 0.0), MAX_DELAY)
    await asyncio.sleep(seconds)
    return 200, {"waited_seconds": seconds}


def _flaky() -> Handler:
    is_failing = False

    async def handle(method: str, path: str, query: Mapping[str, str], _body: bytes) -> Response:
        nonlocal is_failing
        if method == "POST" and path == "/flaky/fail":
            is_failing = True
            return 200, {"failing": True}
        if method == "POST" and path == "/flaky/recover":
            is_failing = False
            return 200, {"failing": False}
        if is_failing or query.get("fail") == "1":
            return 500, {"error": "flaky failed as requested"}
        return 200, {"flaky": "fine"}

    return handle


def _application(handler: Handler) -> Callable[..., Awaitable[None]]:
    """Wrap a handler as an ASGI application with a health endpoint."""

    async def app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        query = {key: found[-1] for key, found in parse_qs(scope["query_string"].decode("latin-1")).items()}
        try:
            is_health = scope["path"] == "/health"
            status, value = (
                (200, {"status": "ok"}) if is_health else await handler(scope["method"], scope["path"], query, body)
            )
        except ValueError as error:
            status, value = 400, {"error": str(error)}
        text = json.dumps(value).encode() + b"\n"
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    return app


class DemoUpstreams:
    """The four servers. `urls` has their addresses from the construction on.

    States: bound, after construction; serving, after `start`; ended, after `stop` or, instead of `start`, `close`.
    """

    def __init__(self) -> None:
        handlers: dict[str, Handler] = {
            "users": _listing("users", USERS),
            "orders": _listing("orders", ORDERS),
            "slow": _slow,
            "flaky": _flaky(),
        }
        self._sockets = {name: _free_socket() for name in DEMO_NAMES}
        self.urls = {name: f"http://127.0.0.1:{sock.getsockname()[1]}" for name, sock in self._sockets.items()}
        self._servers = {
            name: uvicorn.Server(
                uvicorn.Config(
                    _application(handlers[name]),
                    log_config=None,
                    lifespan="off",
                    ws="none",
                    timeout_keep_alive=120,
                    timeout_graceful_shutdown=1,
                )
            )
            for name in DEMO_NAMES
        }
        self._thread = threading.Thread(target=self._run, name="demo-upstreams", daemon=True)

    def __repr__(self) -> str:
        return f"<DemoUpstreams {self.urls}>"

    async def start(self) -> None:
        """Start the servers; return when all accept connections. Raises TimeoutError."""
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._is_logged)
        self._thread.start()
        await asyncio.to_thread(self._wait_until_started)

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not all(server.started for server in self._servers.values()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the demo upstreams did not start within {_START_TIMEOUT:g} s")
            time.sleep(0.01)

    async def stop(self) -> None:
        """Stop the servers and wait for their thread, at most 10 s."""
        for server in self._servers.values():
            server.should_exit = True
        await asyncio.to_thread(self._thread.join, _START_TIMEOUT)
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._is_logged)

    def _is_logged(self, record: logging.LogRecord) -> bool:
        """Return False for what the demo's servers log, errors excepted; uvicorn may serve the gateway too."""
        return record.levelno >= logging.ERROR or record.thread != self._thread.ident

    def close(self) -> None:
        """Release the ports if the servers were not started."""
        for sock in self._sockets.values():
            sock.close()

    def sections(self) -> dict[str, Any]:
        """Return the sections `upstreams` and `routes` of the demo."""
        return demo_sections(self.urls)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        await asyncio.gather(*(server.serve([self._sockets[name]]) for name, server in self._servers.items()))


def demo_sections(urls: Mapping[str, str]) -> dict[str, Any]:
    """Return the sections `upstreams` and `routes` of the demo, whose services have these URLs by name."""
    check = {"path": "/health", "interval": 5}
    upstreams: dict[str, Any] = {
        name: {"targets": [{"url": url}], "health_check": check} for name, url in urls.items()
    }
    # Low enough that a user sees the breaker open and recover within a minute.
    upstreams["flaky"]["circuit_breaker"] = {"failure_threshold": 3, "recovery_timeout": 5, "jitter": 0}
    routes: list[dict[str, Any]] = [
        {"name": name, "path": f"/api/{name}", "upstream": name, "strip_prefix": "/api"} for name in urls
    ]
    routes[1]["costs"] = [{"methods": ["POST"], "path": "/api/orders/export", "cost": 5}]
    return {"upstreams": upstreams, "routes": routes}


def _free_socket() -> socket.socket:
    # The protocol is given because asyncio sets TCP_NODELAY only on sockets that were created with IPPROTO_TCP.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    return sock


def banner(place: str, url: str, curl: str = "curl", operators: str = "") -> str:
    """Return the startup message of the demo.

    `place` is the bound address; `curl` and `url` are the command and URL to reach it; `operators` is the command for
    the operator endpoints if it differs.
    """
    request = f"{curl} -H 'X-Client-ID: client-123' {url}"
    return "\n".join(
        (
            f"Listening on {place}. No upstream is configured, so four demo services are running:",
            *(f"  {url}/api/{name:<7} {text}" for name, text in _ABOUT.items()),
            "Try:",
            f"  {request}/api/users",
            f"  for i in $(seq 12); do {request}/api/orders -s -o /dev/null -w '%{{http_code}} '; done; echo",
            f"  {operators or f'{curl} {url}'}/circuit-breakers",
        )
    )


_ABOUT = {
    "users": "three users; /api/users/1 is one of them",
    "orders": "two orders; POST /api/orders/export costs 5 tokens",
    "slow": "takes a second, or ?seconds=N",
    "flaky": "fails with ?fail=1, or from POST /api/flaky/fail until POST /api/flaky/recover",
}
