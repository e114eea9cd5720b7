"""Adds the operator endpoints to an application, with their schema and their error responses."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from api_gateway.admin import breakers, clients, configuration, explain, health, metrics
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
    metrics.router,
    breakers.router,
    explain.router,
    clients.overview_router,
    clients.router,
)


def install(app: FastAPI, refused: Counter[str]) -> frozenset[str]:
    """Add the operator endpoints and their error handling to `app`; return the first segments of their paths.

    `refused` counts the problems that are answered, by reason.
    """
    app.state.refused = refused
    app.state.rendered_schemas = {}
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(GatewayError, _error_response)
    app.add_exception_handler(RequestValidationError, _error_response)
    app.add_exception_handler(HTTPException, _error_response)
    app.add_exception_handler(Exception, _error_response)  # the framework raises it again, and the server logs it
    app.router.routes.insert(0, Route("/openapi.json", _schema))
    return frozenset(route.path.split("/")[1] for route in _routes(app))


async def _schema(request: Request) -> Response:
    """Answer the schema, which the framework would render anew for each request."""
    rendered: dict[str, Response] = request.app.state.rendered_schemas
    root = request.scope.get("root_path", "")
    if root not in rendered:
        schema = await asyncio.to_thread(request.app.openapi)  # the first time it takes long
        rendered[root] = JSONResponse({**schema, "servers": [{"url": root}]} if root else schema)
    return rendered[root]


async def _error_response(request: Request, raised: Exception) -> Response:
    """Answer any error of an operator endpoint as problem details, and OPTIONS by the methods there are."""
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
    """Return the methods of the endpoints at the request's path, for the `Allow` field."""
    methods = {"OPTIONS"}
    for route in _routes(request.app):
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _routes(app: FastAPI) -> Iterator[Route]:
    """Return the routes of the operator endpoints; an included router is not among the application's own."""
    routes = itertools.chain(app.routes, *(router.routes for router in _ROUTERS))
    return (route for route in routes if isinstance(route, Route))


def _gateway_error(raised: Exception) -> GatewayError:
    if isinstance(raised, GatewayError):
        return raised
    if isinstance(raised, RequestValidationError):
        return InvalidValue(f"{'; '.join(_validation_message(item) for item in raised.errors())}.")
    if isinstance(raised, HTTPException):
        if raised.status_code == 404:  # noqa: PLR2004 - no endpoint of that name
            return NoRoute("There is nothing here. Requests to be proxied begin with /api/.")
        if raised.status_code == 405:  # noqa: PLR2004 - an endpoint, but not for this method
            return MethodNotAllowed("The endpoint does not take this method.")
        return BadRequest(str(raised.detail))
    return InternalError(f"The gateway failed: {type(raised).__name__}.")


def _validation_message(item: Mapping[str, Any]) -> str:
    """Name place and value; of a value that is a whole body, only what is wrong with it."""
    given = item.get("input")
    value = f", got {given!r}" if isinstance(given, str | int | float) else ""
    return f"{'.'.join(map(str, item['loc']))}: {item['msg']}{value}"
