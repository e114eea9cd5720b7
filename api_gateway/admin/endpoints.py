"""Installation of the operator endpoints in an application, with their schema and error responses."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from api_gateway.admin import (
    audit,
    breakers,
    clients,
    configuration,
    dashboard,
    explain,
    health,
    history,
    keys,
    limits,
    metrics,
    quotas,
    usage,
)
from api_gateway.errors import (
    BadRequest,
    GatewayError,
    InternalError,
    InvalidValue,
    MethodNotAllowed,
    NoRoute,
    problem,
)
from api_gateway.http1.request_paths import path_as_sent

_ROUTERS = (
    health.router,
    configuration.router,
    audit.router,
    dashboard.router,
    metrics.router,
    breakers.router,
    explain.router,
    history.router,
    clients.overview_router,
    clients.router,
    limits.router,
    keys.router,
    quotas.router,
    usage.router,
)


def install(app: FastAPI, refused: Counter[str]) -> frozenset[str]:
    """Add the operator endpoints and their error handling to `app`; return the first segments of their paths.

    `refused` counts error responses by reason.
    """
    app.state.refused = refused
    app.state.rendered_schemas = {}
    for router in _ROUTERS:
        app.router.routes.extend(router.routes)  # `include_router` would build their models anew for each application
    app.add_exception_handler(GatewayError, _error_response)
    app.add_exception_handler(RequestValidationError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(Exception, _error_response)  # the framework re-raises it, and the server logs it
    app.router.routes.insert(0, Route("/openapi.json", _schema))
    return frozenset(route.path.split("/")[1] for route in _routes(app)) | {"docs"}


async def _schema(request: Request) -> Response:
    """Return the schema from memory; the framework would render it for each request."""
    rendered: dict[str, Response] = request.app.state.rendered_schemas
    root = request.scope.get("root_path", "")
    if root not in rendered:
        schema = await asyncio.to_thread(request.app.openapi)  # the first call is slow
        rendered[root] = JSONResponse({**schema, "servers": [{"url": root}]} if root else schema)
    return rendered[root]


async def _error_response(request: Request, raised: Exception) -> Response:
    """Return problem details for an error of an operator endpoint; for OPTIONS, 204 with `Allow`."""
    error = _gateway_error(raised)
    if isinstance(error, MethodNotAllowed):
        error.headers["allow"] = _allow(request)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": error.headers["allow"]})
    request.app.state.refused[error.reason] += 1
    return JSONResponse(
        problem(error, instance=path_as_sent(request.scope)),
        status_code=error.status,
        headers={**error.headers, "cache-control": "no-store"},
        media_type="application/problem+json",
    )


def _allow(request: Request) -> str:
    """Return the `Allow` value: the methods of the endpoints at the request's path."""
    methods = {"OPTIONS"}
    for route in _routes(request.app):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _routes(app: FastAPI) -> Iterator[Route]:
    """Return the routes of the operator endpoints."""
    return (route for route in app.routes if isinstance(route, Route))


def _gateway_error(raised: Exception) -> GatewayError:
    if isinstance(raised, GatewayError):
        return raised
    if isinstance(raised, RequestValidationError):
        return InvalidValue(f"{'; '.join(_validation_message(item) for item in raised.errors())}.")
    if isinstance(raised, HTTPException):
        if raised.status_code == 404:  # noqa: PLR2004 - no endpoint has the path
            return NoRoute("No endpoint has this path, and it is below neither /api nor a route.")
        if raised.status_code == 405:  # noqa: PLR2004 - the endpoint exists, but not for this method
            return MethodNotAllowed("The endpoint does not support this method.")
        return BadRequest(str(raised.detail))
    return InternalError(f"Internal error: {type(raised).__name__}.")


def _validation_message(item: Mapping[str, Any]) -> str:
    """Return a message with place, error and value; the value is left out if it is an object or a list."""
    given = item.get("input")
    value = f", got {given!r}" if isinstance(given, str | int | float) else ""
    return f"{'.'.join(map(str, item['loc']))}: {item['msg']}{value}"
