"""ASGI types, scope keys, and the server extension for features that a proxy needs and ASGI does not define."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple, Protocol

from api_gateway.errors import GatewayError
from api_gateway.http1.headers import UNIX
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import HeaderList

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# Keys of the scope.
FIELDS = "gateway.fields"  # the request's header fields by name
SERVER_EXTENSION = "gateway.link"  # the request's `ServerExtension`
ADMIN = "gateway.admin"  # present if the request arrived through the operators' listener
RELAYED = "gateway.relayed"  # present if a load balancer has begun the connection with a PROXY protocol header

CERTIFICATE = "gateway.certificate"  # the `ClientCertificate` of the connection, present if there is one

UNIX_PEER = (UNIX, 0)  # the address of every client on a Unix socket


class DownstreamAbilities(NamedTuple):
    """The abilities of a client's side.

    `framing`: it gets bodies with their framing, in chunks if they have no length; otherwise the content alone.
    `upgrade`: `switch_protocols` can be called.
    """

    framing: bool
    upgrade: bool


class InFlight(Protocol):
    """A request in flight on the fast path, as its connection uses it."""

    keep_alive: bool  # whether the connection stays open after the response
    is_handshake: bool  # whether the request asks for another protocol, which follows it then

    @property
    def is_last(self) -> bool:
        """True if the client has announced that it sends no further request."""
        ...

    @property
    def is_head_sent(self) -> bool:
        """True once the head of the response has been sent, and with it the `Connection` field."""
        ...

    def on_writable(self) -> None:
        """Continue sending: the write buffer is below its low-water mark."""
        ...

    def on_client_disconnected(self) -> None:
        """Abort the exchange: the connection is lost."""
        ...

    def on_forced_close(self) -> None:
        """Abort the exchange: the drain timeout has passed."""
        ...

    def on_refused(self, error: GatewayError) -> None:
        """Respond with an error of the connection, which ends after it: the body is malformed or overdue."""
        ...

    def on_drain(self) -> None:
        """Note that the server begins to stop."""
        ...


class BodyReceiver(Protocol):
    """A request whose body arrives, as its connection uses it: of a request cycle, or of the fast path."""

    awaits_continue: bool  # the client waits for 100 (Continue) before it sends the body
    body_rate: float | None  # minimum bytes per second, if not the connection's limit; 0 for none
    body_due: float | None  # loop time at which the next body piece is due; set by the connection
    body_credit: float  # loop time until which the minimum rate is met without more input; set by the connection

    @property
    def is_started(self) -> bool:
        """True once the head of the response has been sent."""
        ...

    @property
    def is_response_complete(self) -> bool:
        """True once the response is complete: pieces of the body are discarded then, unless it is continued."""
        ...

    @property
    def is_body_continued(self) -> bool:
        """True while the body is passed on to its end, also after the response is complete."""
        ...

    def feed(self, piece: bytes) -> bool:
        """Take a piece of the body; return True if reading from the client shall be paused."""
        ...

    def announce(self, size: int) -> None:
        """Note that at least `size` more bytes of the body follow."""
        ...

    def end_body(self) -> None:
        """Note the end of the body."""
        ...

    def discard_body(self) -> None:
        """Note that no more of the body is received."""
        ...

    def disconnect(self) -> None:
        """Note that the client has disconnected. Idempotent."""
        ...


class FastPathHandler(Protocol):
    """The fast path of an application, for requests that do not need ASGI."""

    def try_handle(self, client: Any, received: bytes) -> bool:
        """Serve the received request and return True, or change nothing and return False.

        `client` is the connection, see `exchanges.client_port.Downstream`.
        """
        ...

    def try_head(self, client: Any, head: RequestHead, trailers: HeaderList) -> bool:
        """Serve a request whose head the general parser has read, as `try_handle` does.

        Its body follows in pieces; `trailers` is filled before the end of a chunked one.
        """
        ...

    def refusal_fields(self, headers: HeaderList, target: bytes) -> HeaderList:
        """Return the CORS fields of a response with which the connection itself refuses a request."""
        ...

    def below(self, root: bytes) -> "FastPathHandler":
        """Return the same for requests whose paths begin with `root` for clients: URLs in responses get it."""
        ...


class FastPathProvider(Protocol):
    """Holds the current fast path, which a reload replaces; an application offers it as `fast_path`."""

    @property
    def current(self) -> FastPathHandler:
        """The current one."""
        ...


class ServerExtension(Protocol):
    """Features of the server for one request, in addition to ASGI's `receive` and `send`.

    `target` and `headers` are the request target and the header fields as received, `trailers` the trailer fields
    after its body. `upgrade` is the requested protocol in lower case, or empty. `awaits_continue`: the client waits
    for 100 (Continue), and no part of the body has come.
    """

    target: bytes
    headers: HeaderList
    trailers: HeaderList
    upgrade: bytes
    awaits_continue: bool
    is_disconnected: bool
    on_disconnect: Callable[[], object] | None  # called when the client disconnects before the response is complete
    on_shutdown: Callable[[], object] | None  # called when the server begins to stop, not if it is stopping already
    connection: Any  # the request's connection; has a `transport`
    is_stopping: bool  # the server stops: streams and tunnels shall end soon
    is_cut: bool  # set if the rest of the response is missing: a failure of the application is not a defect

    def defer_continue(self) -> None:
        """Do not send 100 (Continue) for `Expect: 100-continue`: the upstream decides."""
        ...

    def require_body_rate(self, rate: float) -> None:
        """Set the minimum rate of the request body in bytes per second, instead of the server's; 0 for none."""
        ...

    def continue_body(self) -> None:
        """Let `receive` return the body to its end, also after the response is complete; see `discard_body`."""
        ...

    def discard_body(self) -> None:
        """Undo `continue_body`: discard the rest of the body."""
        ...

    def send_interim(self, status: int, reason: bytes, headers: HeaderList) -> None:
        """Send an interim response (1xx) before the final response."""
        ...

    def switch_protocols(self, reason: bytes, headers: HeaderList) -> tuple[asyncio.Transport, bytes]:
        """Send 101 and return the transport, with the bytes that the client has already sent in the new protocol."""
        ...
