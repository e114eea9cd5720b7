"""uvicorn's proxy headers: its middleware replaces a peer that it trusts, any local one by default, in the scope.

`server.trusted_proxies` alone decides which proxies the gateway trusts. An application that mounts the gateway may
need what the middleware writes. So the middleware stays, what it replaces is recorded, and the gateway restores that
for itself.
"""

import asyncio
from collections.abc import Iterator

import uvicorn
from uvicorn.lifespan.on import LifespanOn
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api_gateway.http1.asgi import ASGIApp, Receive, Scope, Send

REPLACED = "gateway.replaced"  # key of the scope: by key, the value of the server and that of the middleware
_KEYS = ("client", "scheme")
_BY_DEFAULT = {"127.0.0.1", "::1"}  # the peers that uvicorn trusts if nothing is set


class RecordedProxyHeaders:
    """uvicorn's middleware for proxy headers, which also records what it replaces in the scope of a request."""

    def __init__(self, middleware: ProxyHeadersMiddleware) -> None:
        """Take the place of `middleware` in front of its application."""
        self.app: ASGIApp = middleware.app  # type: ignore[assignment]  # uvicorn's types of ASGI are narrower
        self._middleware = middleware
        middleware.app = self._record  # type: ignore[assignment]  # as above

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or lifespan (ASGI)."""
        scope[REPLACED] = {key: (scope.get(key), None) for key in _KEYS}
        await self._middleware(scope, receive, send)  # type: ignore[arg-type]  # as above

    async def _record(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[REPLACED] = {key: (before, scope.get(key)) for key, (before, _) in scope[REPLACED].items()}
        await self.app(scope, receive, send)


def with_own_peer(scope: Scope) -> Scope:
    """Return a scope with the peer of the connection where uvicorn's middleware has replaced it.

    What another middleware has written since then stays.
    """
    replaced = scope.get(REPLACED)
    if replaced is None:
        return scope
    own = {key: before for key, (before, after) in replaced.items() if before != after and scope.get(key) == after}
    return {**scope, **own} if own else scope


def record_proxy_headers() -> set[str]:
    """Record what uvicorn's middleware replaces, in the servers whose lifespan includes this call.

    Return the peers that operators have told them to trust, which has no effect on the gateway.
    """
    told: set[str] = set()
    for config in _configs():
        app = config.loaded_app
        if isinstance(app, ProxyHeadersMiddleware):
            config.loaded_app = RecordedProxyHeaders(app)
        if config.proxy_headers:
            allowed = config.forwarded_allow_ips
            told.update(peer.strip() for peer in (allowed.split(",") if isinstance(allowed, str) else allowed))
    return told - _BY_DEFAULT - {""}


def _configs() -> Iterator[uvicorn.Config]:
    """Yield the configurations of the servers that run a lifespan on this event loop.

    An application that mounts the gateway passes nothing on from which its server could be known; its task shows it.
    """
    for task in asyncio.all_tasks():
        coroutine = task.get_coro()
        if getattr(coroutine, "cr_code", None) is LifespanOn.main.__code__:
            yield coroutine.cr_frame.f_locals["self"].config  # type: ignore[union-attr]  # implied by the test
