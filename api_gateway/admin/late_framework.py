"""The framework behind the operator gate: imported, in a thread, when the first request passes the gate."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from api_gateway.errors import InternalError
from api_gateway.eventloop.late_imports import import_gently
from api_gateway.http1.asgi import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class LateFramework:
    """The operator endpoints as an ASGI application, which is built for its first request.

    The framework and its models take a sixth of the time of a start.
    """

    def __init__(self, state: dict[str, Any], refused: Counter[str]) -> None:
        """`state` is that of the endpoints, by name. `refused` counts error responses by reason."""
        self._state = state
        self._refused = refused
        self._app: ASGIApp | None = None

    def __repr__(self) -> str:
        return f"<LateFramework [{'absent' if self._app is None else 'present'}]>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Raises InternalError if the framework cannot be imported."""
        app = self._app
        if app is None:
            built = await imported_in_thread(self._build)
            app = self._app = self._app or built  # another request may have been faster
        await app(scope, receive, send)

    def _build(self) -> ASGIApp:
        app: ASGIApp = import_gently("api_gateway.admin.endpoints").operator_app(self._state, self._refused)
        return app


async def imported_in_thread(import_: Callable[[], _Result]) -> _Result:
    """Import in a thread, and return the result.

    Raises InternalError if that fails: the files may be those of another release by now.
    """
    try:
        return await asyncio.to_thread(import_)
    except Exception as error:  # whatever a module that does not fit the others raises
        logger.exception("the operator endpoint cannot be imported")
        raise InternalError(
            f"The endpoint cannot be imported: {type(error).__name__}. If the package was replaced since the"
            " start, restart the gateway."
        ) from error
