"""A downstream connection as its parts use it.

The parts have one subject each. They do not refer to the connection, which passes itself: that makes no cycles.
"""

import asyncio
from typing import Any, Protocol

from api_gateway.downstream.connection_limits import ConnectionLimits
from api_gateway.downstream.listener_state import ListenerState
from api_gateway.downstream.pipeline import HeldInput, Pipeline
from api_gateway.downstream.request_cycle import RequestResponseCycle
from api_gateway.downstream.request_reader import RequestReader
from api_gateway.downstream.slots import Slot
from api_gateway.downstream.states import ConnectionEvent, ConnectionState
from api_gateway.errors import GatewayError
from api_gateway.eventloop.deadline_timer import DeadlineTimer
from api_gateway.http1.asgi import BodyReceiver, InFlight
from api_gateway.http1.request_head import RequestHead
from api_gateway.models import HeaderList


class TimeoutsPart(Protocol):
    """`ConnectionTimeouts`, as the input uses them."""

    def apply(self, owner: "ConnectionOwner") -> None:
        """Set the timeout of the current state."""
        ...

    def begin_body(self) -> None:
        """Begin with the body of the next request."""
        ...

    def receive_body(self, size: int) -> None:
        """Count a piece of the body."""
        ...

    def await_body(self, owner: "ConnectionOwner") -> None:
        """Set the deadline of the next body piece, if a body is incomplete."""
        ...


class ConnectionOwner(Protocol):
    """The connection to which a part belongs.

    `receiving` is the request whose body is not complete, `exchange` the request in flight on the fast path.
    `body_left` is the number of bytes of a body that is received without the parser, after a plain head; `discarded`
    is the number of bytes that were discarded since the last response.
    """

    app: Any
    loop: asyncio.AbstractEventLoop
    tasks: set["asyncio.Task[None]"]
    limits: ConnectionLimits
    transport: asyncio.Transport
    secure_fields: HeaderList
    state: ConnectionState
    accepts_plain: bool
    is_write_paused: bool
    is_read_paused: bool
    receiving: BodyReceiver | None
    body_left: int
    discarded: int
    exchange: InFlight | None
    timer: DeadlineTimer
    slot: Slot
    listener: ListenerState

    @property
    def reader(self) -> RequestReader:
        """The general parser."""
        ...

    @property
    def pipeline(self) -> Pipeline:
        """The requests on the ASGI path."""
        ...

    @property
    def held(self) -> HeldInput:
        """The input that is kept and not parsed."""
        ...

    @property
    def timeouts(self) -> TimeoutsPart:
        """The timeouts of the connection's phases."""
        ...

    def move(self, event: ConnectionEvent) -> None:
        """Change the state."""
        ...

    def stop_input(self) -> None:
        """Drop held input and queued requests; discard what still arrives."""
        ...

    def cycle_of(self, head: RequestHead) -> RequestResponseCycle:
        """Return the request cycle of a head."""
        ...

    def become_idle(self) -> None:
        """Set the timeout for the next request; open the fast path if nothing of it has arrived."""
        ...

    def replay(self) -> None:
        """Parse the held input."""
        ...

    def pause_reading(self) -> None:
        """Stop reading from the client."""
        ...

    def resume_reading(self) -> None:
        """Read from the client again, unless input is held."""
        ...

    def on_unfinished(self, cycle: RequestResponseCycle) -> None:
        """Terminate the incomplete response of an application that has returned."""
        ...

    def on_worker_end(self) -> None:
        """Release what refers to the last request."""
        ...

    def refuse(self, error: GatewayError, head: RequestHead | None = None) -> None:
        """Refuse the request that is being read; `head` is its head, if that is complete and was not queued."""
        ...

    def close(self) -> None:
        """Close the connection after its write buffer is flushed."""
        ...
