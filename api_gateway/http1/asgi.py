"""The ASGI of this gateway: its types, the keys of the scope, and what a proxy needs of a server beyond ASGI."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from api_gateway.http1.headers import UNIX
from api_gateway.models import HeaderList

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

FIELDS = "gateway.fields"  # the key of the scope under which the request's headers lie by name
DEADLINE = "gateway.deadline"  # and its deadline, if it has one
SERVER_EXTENSION = "gateway.link"  # the key of what our own server offers beyond ASGI
UNIX_PEER = (UNIX, 0)  # the address of every client on a Unix socket
ADMIN = "gateway.admin"  # the scope's key of a request that came through the listener for operators


class InFlight(Protocol):
    """A request that has taken the lane."""

    keep_alive: bool  # whether the connection may serve another one after it

    @property
    def is_head_sent(self) -> bool:
        """Tell whether it is too late to say that the connection will be closed."""
        ...

    def on_writable(self) -> None:
        """Hear that the client has read on after it was too slow."""
        ...

    def on_client_left(self) -> None:
        """Hear that the connection is lost."""
        ...

    def on_forced_close(self) -> None:
        """Hear that the server stops without waiting any longer."""
        ...


class FastPathHandler(Protocol):
    """A faster way than ASGI for requests that need nothing of it; an application may offer one as `lane`."""

    def try_handle(self, client: Any, received: bytes) -> bool:
        """Take a request as it was received, or change nothing and return False. `client` is its connection."""
        ...


class FastPathProvider(Protocol):
    """Where a connection finds the lane in force: a reload sets another one."""

    current: FastPathHandler


class ServerExtension(Protocol):
    """The server's side of one request, beside ASGI's `receive` and `send`.

    `target` and `headers` are the request's as it was spelt, `trailers` those that came after its body. `upgrade` is
    the protocol it asks to switch to (lower case), or nothing.
    """

    target: bytes
    headers: HeaderList
    trailers: HeaderList
    upgrade: bytes
    task: "asyncio.Task[None]"  # which serves the request
    is_disconnected: bool
    on_disconnect: Callable[[], object] | None  # called when the client leaves before the answer is complete
    on_shutdown: Callable[[], object] | None  # called when the server begins to stop, not if it already does
    connection: Any  # which the request came on; has a `transport`, and can be referred to weakly
    is_stopping: bool  # the server stops: what has no end of its own shall end soon

    def defer_continue(self) -> None:
        """Leave it to the upstream to ask for the body a client has announced with `Expect: 100-continue`."""
        ...

    def require_body_rate(self, rate: float) -> None:
        """Have the client send its body at that many bytes a second, not at what the server asks for; 0: at any."""
        ...

    def send_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Send an interim answer (1xx) ahead of the final one."""
        ...

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """Answer 101 and hand over the connection, with what the client has already sent in the new protocol."""
        ...
