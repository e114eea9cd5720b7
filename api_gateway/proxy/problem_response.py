"""Problem details (RFC 9457) as a response in HTTP/1.1 format, and as ASGI messages."""

import json
import re
from functools import lru_cache
from urllib.parse import quote

from api_gateway.clients.api_keys import without_keys
from api_gateway.errors import GatewayError, problem
from api_gateway.http1.asgi import Scope, Send
from api_gateway.http1.request_paths import path_as_sent
from api_gateway.http1.serializer import render_fields, status_line
from api_gateway.limits.limit_reached import LimitReached
from api_gateway.models import HeaderList, Trace

_encode = json.JSONEncoder(ensure_ascii=False).encode
_IN_PATHS = "/%:@!$&'()*+,;=~"  # besides letters, digits and `-._`, see RFC 3986 section 3.3
_is_plain = re.compile(rb"[A-Za-z0-9._/:@!$&'()*+,;=~-]*+(?:\?|\Z)").match  # of the path in a target


def instance_of(path: str, raw_target: bytes) -> str:
    """Return the path of a request as a URI reference (RFC 9457 section 3.1.5), as it was sent, without the query."""
    if _is_plain(raw_target) is not None:
        return path
    return quote(raw_target.partition(b"?")[0], safe=_IN_PATHS)


def instance_in(scope: Scope) -> str:
    """Return the path of an ASGI request, see `instance_of`."""
    return instance_of(scope["path"], path_as_sent(scope).encode("latin-1"))


def problem_body(error: GatewayError, *, instance: str, request_id: str | None, trace: Trace | None = None) -> bytes:
    """Return the problem details of `error` in JSON; `trace` is that of the exchange, None if tracing is off.

    `instance` is a URI reference.
    A key in the path or in a value that is refused is not shown: clients log errors.
    """
    if isinstance(error, LimitReached) and request_id is not None:
        body = error.body(without_keys(instance), request_id)
    else:
        body = without_keys(_encode(problem(error, instance=instance, request_id=request_id))).encode()
    return body if trace is None else b'%b, "trace_id": "%b"}' % (body[:-1], trace.trace_id.encode())


def problem_message(
    error: GatewayError, *, instance: str, request_id: str, lines: bytes, trace: Trace | None = None
) -> tuple[bytes, bytes]:
    """Return head and body of the response in HTTP/1.1 format.

    `lines` are further lines of the head, valid and each with its line break. Raises RuntimeError if a header field
    of the error contains a line break or NUL.
    """
    body = problem_body(error, instance=instance, request_id=request_id, trace=trace)
    fields = error.field_lines if isinstance(error, LimitReached) else render_fields(error.headers)
    head = b"%b%d\r\ncache-control: no-store\r\n%b%b\r\n" % (
        _start(error.status),
        len(body),
        fields,
        lines,
    )
    return head, body


@lru_cache(maxsize=64)
def _start(status: int) -> bytes:
    """Return the beginning of a head, up to the length of the body."""
    return status_line(status, None) + b"\r\ncontent-type: application/problem+json\r\ncontent-length: "


async def send_problem(
    error: GatewayError,
    send: Send,
    *,
    instance: str,
    request_id: str | None,
    headers: HeaderList,
    trace: Trace | None = None,
) -> int:
    """Send `error` as problem details (RFC 9457); return the size of the body in bytes."""
    body = problem_body(error, instance=instance, request_id=request_id, trace=trace)
    own = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": own + headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
    return len(body)
