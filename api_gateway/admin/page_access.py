"""CORS for the operator gate's responses to clients: their own usage, and 404 for paths without route or endpoint."""

from api_gateway.errors import Forbidden
from api_gateway.http1.asgi import Message, Send
from api_gateway.http1.headers import Fields
from api_gateway.models import HeaderList
from api_gateway.proxy.cors import CorsPolicy, origin_of, preflight_of, with_cors_fields

_METHODS = ("GET", "HEAD")


def with_cors(send: Send, policy: CorsPolicy | None, fields: Fields) -> Send:
    """Return `send` that adds the CORS fields for a request with these fields to its response."""
    if policy is None:
        return send
    cors = policy.fields(origin_of(fields))

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = with_cors_fields(cors, [*message["headers"]])
        await send(message)

    return sending


def is_of_allowed_page(policy: CorsPolicy | None, fields: Fields) -> bool:
    """Return whether a page of an origin that the policy allows made the request."""
    origin = origin_of(fields)
    return policy is not None and origin is not None and policy.allows(origin)


def preflight_response(policy: CorsPolicy | None, method: str, fields: Fields) -> HeaderList | None:
    """Return the fields of the response to a preflight, None if it is none. Raises Forbidden for other origins."""
    asked, origin = preflight_of(fields), origin_of(fields)
    if method != "OPTIONS" or policy is None or asked is None or origin is None:
        return None
    if not policy.allows(origin):
        raise Forbidden(f"CORS: pages of the origin {origin[:100].decode('latin-1')!a} may not use this endpoint.")
    return policy.preflight_fields(origin, asked, _METHODS)
