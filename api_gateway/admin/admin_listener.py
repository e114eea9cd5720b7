"""The application of the admin listener: the operator endpoints without the data plane."""

from api_gateway.errors import NoRoute
from api_gateway.http1.asgi import ADMIN, ASGIApp, Receive, Scope, Send
from api_gateway.middleware import is_proxied
from api_gateway.proxy.problem_response import instance_in, send_problem


class AdminListener:
    """Marks requests of the admin listener in their scope (`ADMIN`), and refuses those to be proxied."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; paths of the data plane get status 404."""
        if is_proxied(scope["path"]):
            error = NoRoute("The admin listener proxies nothing; send this request to the gateway's public address.")
            await send_problem(error, send, instance=instance_in(scope), request_id=None, headers=[])
        else:
            await self._app({**scope, ADMIN: True}, receive, send)
