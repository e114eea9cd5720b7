"""The end of a downstream connection: the refusal that is its last response, lingering, and closing.

Closing a connection while the client is sending resets it, and the client may lose the response (RFC 9112 section
9.6). So the gateway ends its own side first and discards input, within limits of bytes and time.
"""

import json
import time

from api_gateway.downstream.owner import ConnectionOwner
from api_gateway.downstream.request_cycle import RequestResponseCycle
from api_gateway.downstream.states import ConnectionEvent
from api_gateway.errors import GatewayError, InternalError, problem
from api_gateway.eventloop.resetting import reset_connection
from api_gateway.http1.asgi import FastPathProvider
from api_gateway.http1.headers import http_date
from api_gateway.http1.request_head import RequestHead
from api_gateway.http1.serializer import render_response_head
from api_gateway.models import HeaderList

MAX_DISCARDED = 1_048_576  # bytes of a body discarded after an early response before the connection is closed
MAX_LINGERED = 8_388_608  # bytes discarded after a refusal
LINGER_TIMEOUT = 2.0  # seconds for which input is discarded after a refusal


def refuse_request(owner: ConnectionOwner, error: GatewayError, head: RequestHead | None = None) -> None:
    """Send problem details without the application and end the connection.

    Nothing is sent if it could be taken for a part of, or the whole of, the response to an earlier request. An
    exchange of the fast path responds itself.
    """
    if owner.state.is_ending:
        return
    if owner.transport.is_closing():  # the client cannot receive a refusal
        close_connection(owner)
        return
    if owner.exchange is not None:
        owner.exchange.on_refused(error)
        return
    due = owner.pipeline.due
    owner.listener.refused[error.reason] += 1
    if due is None or (due is owner.receiving and not due.is_started):
        _respond(owner, error, due or head)
    elif due.is_started:
        break_off(owner, due)
    else:
        linger(owner)
    if due is not None:
        due.disconnect()


def _respond(owner: ConnectionOwner, error: GatewayError, request: RequestResponseCycle | RequestHead | None) -> None:
    """Send problem details as the last response, to a request whose head is known or not."""
    provider: FastPathProvider | None = getattr(owner.app, "fast_path", None)
    more = owner.secure_fields
    if request is not None and provider is not None:
        more = [*more, *provider.current.refusal_fields(request.headers, request.target)]
    owner.transport.write(last_response(error, more))
    linger(owner)


def break_off(owner: ConnectionOwner, cycle: RequestResponseCycle) -> None:
    """Terminate a response that an application has left incomplete."""
    if not cycle.is_started:
        _respond(owner, InternalError("The gateway failed to generate a response."), cycle)
    elif cycle.is_http10:  # a regular close would be the end of the body, so the connection is reset
        reset_connection(owner.transport)
        close_connection(owner)
    else:
        linger(owner)


def end_connection(owner: ConnectionOwner, *, is_complete: bool) -> None:
    """End the connection after its last response.

    `is_complete`: the client has sent everything, and has announced that it sends nothing more.
    """
    if is_complete:
        close_connection(owner)
    else:
        linger(owner)


def linger(owner: ConnectionOwner) -> None:
    """Half-close and discard input for LINGER_TIMEOUT, so that no reset destroys the last response.

    For connections whose client may still be sending; others are closed.
    """
    owner.move(ConnectionEvent.LINGER)
    owner.discarded = 0
    owner.stop_input()
    if owner.receiving is not None:
        owner.receiving.discard_body()  # no more of it is parsed
    transport = owner.transport
    if owner.state.is_half_closed or transport.is_closing() or not transport.can_write_eof():
        close_connection(owner)
        return
    transport.write_eof()
    owner.resume_reading()
    owner.timer.set(LINGER_TIMEOUT)


def close_connection(owner: ConnectionOwner) -> None:
    """Close after the write buffer is flushed; abort if the client makes no progress within `idle_timeout`."""
    owner.move(ConnectionEvent.CLOSE)
    owner.discarded = 0
    owner.stop_input()
    owner.transport.close()
    owner.timer.set(owner.limits.idle_timeout)


def discard_input(owner: ConnectionOwner, size: int) -> None:
    """Count bytes received after the end; abort above MAX_LINGERED."""
    owner.discarded += size
    if owner.discarded > MAX_LINGERED:
        owner.transport.abort()


def discard_body(owner: ConnectionOwner, size: int) -> None:
    """Count bytes of a body received after the response; end the connection above MAX_DISCARDED."""
    owner.discarded += size
    if owner.discarded > MAX_DISCARDED:
        linger(owner)


def last_response(error: GatewayError, more: HeaderList) -> bytes:
    """Return problem details as a complete response that closes the connection, with `more` header fields."""
    body = json.dumps(problem(error, instance="")).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
        *more,
        (b"date", http_date(int(time.time()))),
        (b"connection", b"close"),
    ]
    return render_response_head(error.status, None, headers) + body
