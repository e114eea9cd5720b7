"""The operator endpoints of an application, with their schema and error responses.

The modules of endpoints, whose models take a third of the time of a start, are imported when a request needs them.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from api_gateway._version import __version__
from api_gateway.admin.gate import no_endpoint
from api_gateway.admin.late_framework import imported_in_thread
from api_gateway.admin.routers import ROUTERS, SCHEMA
from api_gateway.clients.api_keys import without_keys
from api_gateway.errors import (
    BadRequest,
    GatewayError,
    InternalError,
    InvalidValue,
    MethodNotAllowed,
    problem,
)
from api_gateway.eventloop.late_imports import import_gently
from api_gateway.http1.asgi import ASGIApp, Receive, Scope, Send
from api_gateway.http1.request_paths import first_segment
from api_gateway.proxy.problem_response import instance_in
from api_gateway.settings.error_words import error_words

# Words for mistakes in bodies and parameters that differ from those for mistakes in files.
_WORDS = {
    "string_type": "must be text",
    "list_type": "must be a list",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "missing": "is missing",
    "extra_forbidden": "unknown key",
}
# Of the application, as its schema states them; the gateway has a page of its own at /docs.
APPLICATION: Mapping[str, Any] = {
    "title": "API Gateway",
    "version": __version__,
    "description": "The operator endpoints. Requests below `/api/` are proxied and not described here.",
    "redirect_slashes": False,
    "license_info": {"name": "MIT", "identifier": "MIT"},
    "docs_url": None,
    "redoc_url": None,
}
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# Why a body that the framework cannot read is not JSON; mistakes within JSON text have an error of their own.
_UNREADABLE = (
    (UnicodeDecodeError, "it is not text in UTF-8"),
    (RecursionError, "it is nested too deeply"),
    (ValueError, "a number in it has too many digits"),
)
# Imported with the first router, because the event loop would import them otherwise: the backend of the framework's
# thread pool, and what several endpoints ask.
_SHARED = ("anyio._backends._asyncio", f"{__package__}.explainer")


class Endpoints:
    """The routes of the operator endpoints, which are added to `app` when the first request needs them.

    States of a router: absent, present; none is removed.
    """

    def __init__(self, app: FastAPI, refused: Counter[str]) -> None:
        """`refused` counts error responses by reason."""
        self._routes = app.router.routes
        self._counts: dict[int, int] = {}  # routes of each router that is present, by its place in ROUTERS
        app.state.refused = refused
        app.state.rendered_schemas = {}
        app.add_middleware(LazyRoutes, endpoints=self)
        app.add_exception_handler(GatewayError, _error_response)
        app.add_exception_handler(RequestValidationError, _error_response)
        app.add_exception_handler(HTTPException, _error_response)
        app.add_exception_handler(Exception, _error_response)  # the framework re-raises it, and the server logs it
        self._routes.insert(0, Route(f"/{SCHEMA}", _schema))
        self._first = len(self._routes)  # index of the first route of a router

    def __repr__(self) -> str:
        return f"<Endpoints [{len(self._counts)} of {len(ROUTERS)} routers present]>"

    @property
    def present_routes(self) -> int:
        """The number of routes in the application that are the gateway's own."""
        return self._first + sum(self._counts.values())

    async def add_for(self, scope: Scope) -> None:
        """Add what the path of a request needs. Raises InternalError."""
        absent = self._absent(first_segment(scope))
        if absent:
            await imported_in_thread(partial(_import, absent))
            self._add(absent)

    def complete(self) -> None:
        """Add all routes that are absent. Blocks."""
        places = range(len(ROUTERS))
        _import(places)
        self._add(places)

    def _absent(self, segment: str) -> list[int]:
        """Return the places of the routers that a path with this first segment needs and that are not present."""
        return [
            place
            for place, (_, _, segments) in enumerate(ROUTERS)
            if place not in self._counts and (segment in segments or segment == SCHEMA)
        ]

    def _add(self, places: Collection[int]) -> None:
        """Add the routes of imported routers that are absent, in the order of ROUTERS, before the embedding program's.

        Only in the thread of the event loop, once there is one, so that no request finds a part of it.
        """
        for place in places:
            if place not in self._counts:
                routes = _router(place).routes
                first = self._first + sum(count for other, count in self._counts.items() if other < place)
                self._routes[first:first] = routes  # `include_router` would build their models for each application
                self._counts[place] = len(routes)


def operator_app(state: dict[str, Any], refused: Counter[str]) -> FastAPI:
    """Return an application that has the operator endpoints alone, ready for its first request."""
    app = FastAPI(**APPLICATION)
    app.state = State(state)
    Endpoints(app, refused)
    app.middleware_stack = app.build_middleware_stack()
    return app


class LazyRoutes:
    """ASGI middleware next to the routes, behind that of an embedding program, which may have changed the path."""

    def __init__(self, app: ASGIApp, endpoints: Endpoints) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or lifespan (ASGI)."""
        serve = self._app
        if scope["type"] == "http":
            try:
                await self._endpoints.add_for(scope)
            except InternalError as error:
                serve = await _error_response(Request(scope), error)
        await serve(scope, receive, send)


def _import(places: Collection[int]) -> None:
    for name in _SHARED:
        import_gently(name)
    for place in places:
        _router(place)


def _router(place: int) -> APIRouter:
    module, name, _ = ROUTERS[place]
    router: APIRouter = getattr(import_gently(f"{__package__}.{module}"), name)
    return router


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
    error = _gateway_error(raised, request.scope["path"])
    if isinstance(error, MethodNotAllowed):
        allowed = _allow(request)
        error = MethodNotAllowed(f"The endpoint supports only {allowed}.", headers={"allow": allowed})
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=error.headers)
    request.app.state.refused[error.reason] += 1
    return Response(
        without_keys(_encode(problem(error, instance=instance_in(request.scope)))),
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
    return (route for route in app.router.routes if isinstance(route, Route))


def _gateway_error(raised: Exception, path: str) -> GatewayError:
    if isinstance(raised, GatewayError):
        return raised
    if isinstance(raised, RequestValidationError):
        return InvalidValue(f"{'; '.join(_validation_message(item) for item in raised.errors())}.")
    if isinstance(raised, HTTPException):
        if raised.status_code == 404:  # noqa: PLR2004 - no endpoint has the path
            return no_endpoint(path)
        if raised.status_code == 405:  # noqa: PLR2004 - the endpoint exists, but not for this method
            return MethodNotAllowed("The endpoint does not support this method.")
        return _unreadable(raised)
    return InternalError(f"Internal error: {type(raised).__name__}.")


def _unreadable(raised: HTTPException) -> GatewayError:
    """Return the error for a body that the framework could not read."""
    for kind, cause in _UNREADABLE:
        if isinstance(raised.__cause__, kind):
            return InvalidValue(f"The body is not JSON: {cause}.")
    return BadRequest(str(raised.detail))


def _validation_message(item: Mapping[str, Any]) -> str:
    """Return a message with place, error and value; the value is left out if it is an object or a list."""
    if item["type"] == "json_invalid":
        return f"The body is not JSON: {item['ctx']['error']}, at character {item['loc'][-1]}"
    place, words = ".".join(map(str, item["loc"])), error_words(item["type"], item["msg"], item.get("ctx", {}), _WORDS)
    if item["type"] == "missing":
        return f"{place}: {words}"
    given = item.get("input")
    shown = json.dumps(given) if isinstance(given, bool) else repr(given)
    value = f", got {shown}" if isinstance(given, str | int | float) else ""
    return f"{place}: {words}{value}"
