"""The gateway as the application of its own server, without the framework until an operator needs it."""

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace

from api_gateway.admin.late_framework import LateFramework
from api_gateway.assembly.serving import operator_gate
from api_gateway.errors import StartupError
from api_gateway.http1.asgi import ADMIN, FastPathProvider, Receive, Scope, Send
from api_gateway.middleware import DataPlaneSwitch
from api_gateway.models import HeaderList
from api_gateway.system.clocks import Clocks


class ServerApp:
    """The operator gate and the data plane. For a program that embeds the gateway there is `main.GatewayApp`."""

    def __init__(
        self,
        switch: DataPlaneSwitch,
        refused: Counter[str],
        serving: Callable[["ServerApp"], AbstractAsyncContextManager[None]],
        *,
        clocks: Clocks,
        has_admin_listener: bool,
    ) -> None:
        """`serving` returns the block within which the application serves."""
        self.fast_path: FastPathProvider | None = switch  # nothing else must see requests that the data plane gets
        self._switch = switch
        self.state = SimpleNamespace()
        self._serving = serving
        self.gate = operator_gate(
            LateFramework(vars(self.state), refused),
            self.state,
            has_admin_listener=has_admin_listener,
            refused=refused,
            clocks=clocks,
        )

    def __repr__(self) -> str:
        return f"<ServerApp with {self._switch!r}>"

    def cors_fields(self, headers: HeaderList, target: bytes) -> HeaderList:
        """Return the CORS fields of a response that is given before the application sees the request."""
        return self._switch.current.refusal_fields(headers, target)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or the lifespan (ASGI); the protocol serves WebSockets itself."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif ADMIN not in scope and self._switch.is_proxied(scope["path"]):
            await self._switch.data_plane(scope, receive, send)
        else:
            await self.gate(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Serve until the server ends the lifespan. A StartupError gives the server its reason in one line."""
        await receive()
        phase = "startup"
        try:
            async with self._serving(self):
                await send({"type": "lifespan.startup.complete"})
                phase = "shutdown"
                await receive()
        except BaseException as error:  # as the framework: the server logs or ends
            message = str(error) if isinstance(error, StartupError) else traceback.format_exc()
            await send({"type": f"lifespan.{phase}.failed", "message": message})
            raise
        await send({"type": "lifespan.shutdown.complete"})
