"""An application behind a root path (`uvicorn --root-path`), whose fast path knows of it too."""

from typing import Any

from api_gateway.http1.asgi import FastPathHandler, FastPathProvider, Receive, Scope, Send
from api_gateway.http1.request_paths import raw_root


class RootedApp:
    """Passes requests to an application. They come with the root path; those of its fast path come without scopes."""

    def __init__(self, app: Any, root_path: str) -> None:
        self._app = app
        self._root = raw_root(root_path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        await self._app(scope, receive, send)

    @property
    def fast_path(self) -> FastPathProvider | None:
        """The fast path of the application, None if it has none."""
        provider: FastPathProvider | None = getattr(self._app, "fast_path", None)
        return None if provider is None else RootedFastPath(provider, self._root)


class RootedFastPath:
    """Offers a fast path for requests whose paths begin with a root for clients."""

    def __init__(self, provider: FastPathProvider, root: bytes) -> None:
        self._provider = provider
        self._root = root

    @property
    def current(self) -> FastPathHandler:
        """The current one."""
        return self._provider.current.below(self._root)
