"""Problem details (RFC 9457) as header fields and body, and as ASGI messages."""

import json

from api_gateway.errors import GatewayError, problem
from api_gateway.http1.asgi import Send
from api_gateway.models import HeaderList


def problem_response(error: GatewayError, *, instance: str, request_id: str | None) -> tuple[HeaderList, bytes]:
    """Return header fields and body of the problem details for `error` (RFC 9457)."""
    body = json.dumps(problem(error, instance=instance, request_id=request_id), ensure_ascii=False).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    return headers, body


async def send_problem(
    error: GatewayError, send: Send, *, instance: str, request_id: str | None, headers: HeaderList
) -> int:
    """Send `error` as problem details (RFC 9457); return the size of the body in bytes."""
    own, body = problem_response(error, instance=instance, request_id=request_id)
    await send({"type": "http.response.start", "status": error.status, "headers": own + headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
    return len(body)
