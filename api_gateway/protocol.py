"""The server side of HTTP/1.1: uvicorn's httptools protocol, with bounds on a request's head in size and in time."""

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api_gateway.errors import BadRequest, GatewayError, HeadersTooLarge, HeadTimeout, problem


class GatewayProtocol(HttpToolsProtocol):
    """Refuses a head that is too large (431) or too slow (408), which uvicorn would wait for without end."""

    max_header_bytes: ClassVar[int] = 65_536
    header_timeout: ClassVar[float] = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Start of a connection: its first head is awaited from now on."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._is_in_head = True
        self._is_refused = False
        self._has_begun = False
        self._framing_bytes = 0  # since the last piece of a body
        self._served: Any = None  # the cycle whose answer is under way; `cycle` is the newest
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End of the connection."""
        self._stop_head_timer()
        super().connection_lost(exc)
        served = self._served
        if served is not None and not served.response_complete:  # uvicorn tells only the newest
            served.disconnected = True
            served.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the bounds."""
        if self._is_refused:
            return
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._await_head()
        else:
            self._framing_bytes += len(data)
        super().data_received(data)
        if (self._head_bytes if self._is_in_head else self._framing_bytes) > self.max_header_bytes:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """A request starts."""
        super().on_message_begin()
        self._is_in_head = self._has_begun = True
        self._counted = 0
        if self._head_timer is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count one header; a head that came in one piece is bounded here. Trailers never become headers."""
        self._counted += len(name) + len(value) + 4
        if self._is_in_head:
            super().on_header(name, value)
        elif self._counted > self.max_header_bytes:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head_bytes = self._framing_bytes = 0
        self._has_begun = False
        self._stop_head_timer()
        if self._is_refused:  # what was sent behind a refused request is not a request
            return
        if self._counted + len(self.url) > self.max_header_bytes:
            self._refuse_head()
        else:
            self._is_in_head = False
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Body of a request; none belongs to one that was refused."""
        self._framing_bytes = 0
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End of a request; the next head may follow at once."""
        if not self._is_refused:
            super().on_message_complete()
        self._is_in_head = True

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        if not self._is_refused:
            self._send(BadRequest(f"The request is not well-formed HTTP/1.1: {msg.rstrip('.')}."))

    def _refuse_head(self) -> None:
        self._send(HeadersTooLarge(f"The request's head is larger than {self.max_header_bytes} bytes."))

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.header_timeout, self._time_out_head)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_out_head(self) -> None:
        self._head_timer = None
        if self._is_refused or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # reading may be paused until the answer is complete
        elif self._head_bytes or self._has_begun:
            self._send(HeadTimeout(f"The request's head did not arrive within {self.header_timeout:g} s."))
        else:
            self.transport.close()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._served = cycle
        super()._start_asgi_task(cycle, app)

    def _send(self, error: GatewayError) -> None:
        """Answer by ourselves, without an application, and close."""
        self._is_refused = True
        self._stop_head_timer()
        if self._would_interrupt():
            self.transport.close()
            return
        body = json.dumps(problem(error, instance="")).encode()
        head = (
            f"HTTP/1.1 {error.status} {error.reason.value}\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _would_interrupt(self) -> bool:
        """Tell whether a word of ours would get into, or pass for, an answer that is due or under way."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        return self._is_in_head or bool(self.pipeline) or cycle.response_started


def bounded_protocol(max_header_bytes: int, header_timeout: float) -> type[GatewayProtocol]:
    """Return the protocol class with these bounds (bytes, seconds), for uvicorn's `Config(http=...)`."""
    bounds: dict[str, Any] = {"max_header_bytes": max_header_bytes, "header_timeout": header_timeout}
    return type("BoundedProtocol", (GatewayProtocol,), bounds)
