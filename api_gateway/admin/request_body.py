"""Reading of the bodies of operator requests before the framework runs, and responses to HEAD without a body."""

from api_gateway.errors import BodyTooLarge, ClientDisconnected
from api_gateway.http1.asgi import Message, Receive, Send
from api_gateway.http1.headers import Fields, framing

MAX_BODY = 65_536  # bytes


async def read_body(fields: Fields, receive: Receive) -> bytes:
    """Return the body, at most `MAX_BODY` bytes.

    Raises ClientDisconnected, and BodyTooLarge: at once if `Content-Length` exceeds the limit, else while reading.
    """
    if framing(fields) is None:
        return b""
    lengths = fields.get(b"content-length", ())
    if lengths and (not lengths[0].isdigit() or len(lengths[0]) > len(str(MAX_BODY)) or int(lengths[0]) > MAX_BODY):
        raise _too_large()
    body, has_more = bytearray(), True
    while has_more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnected("The client disconnected while sending the body.")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        has_more = message.get("more_body", False)
    return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body in one message, and then the messages of the server."""
    is_read = False

    async def again() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def without_body(send: Send) -> Send:
    """Return a `send` for the response to HEAD: the header fields of GET, and no body (RFC 9110 section 9.3.2)."""

    async def head_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            if message.get("more_body", False):
                return
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await send(message)

    return head_only


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(
        f"The body of an operator request must have at most {MAX_BODY} bytes.", headers={"connection": "close"}
    )
