"""The application behind the listener for operators: the operator endpoints, and nothing of the data plane."""

from api_gateway.errors import NoRoute
from api_gateway.http1.asgi import ADMIN, ASGIApp, Receive, Scope, Send
from api_gateway.middleware import is_proxied
from api_gateway.proxy.problem_response import send_problem


class AdminListener:
    """Marks a request as one that came through the listener for operators."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if is_proxied(scope["path"]):
            error = NoRoute("Nothing is proxied here; requests to be proxied go to the gateway's public address.")
            await send_problem(error, send, instance=scope["path"], request_id=None, headers=[])
        else:
            await self._app({**scope, ADMIN: True}, receive, send)
