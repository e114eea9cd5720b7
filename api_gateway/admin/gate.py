"""The operator gate: pure ASGI, which checks every request for an operator endpoint before the framework.

The checks, in order: the path is classified; a request made by a page of another origin is refused; the operator is
identified by token or as local; the operator's request limit is applied; the operator must have the required role; the
content type is checked. Only then is the body read, up to `MAX_BODY` bytes, and the framework called.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from api_gateway.admin.cross_site import check_content_type, is_foreign, is_forged
from api_gateway.admin.health_cache import HealthCache
from api_gateway.admin.locality import Locality
from api_gateway.admin.operator_limits import OperatorLimits
from api_gateway.admin.operators import LOCAL, Operator, Role, Tokens, bearer_token
from api_gateway.admin.page_access import is_of_allowed_page, preflight_response, with_cors
from api_gateway.admin.pages import StaticPages
from api_gateway.admin.request_body import read_body, replay, without_body
from api_gateway.clients.api_keys import quoted_path
from api_gateway.downstream.uvicorn_server import TRAILERS_MIXED, may_hold_trailers
from api_gateway.errors import (
    BadRequest,
    ClientDisconnected,
    CredentialsRepeated,
    Forbidden,
    GatewayError,
    LengthRequired,
    MethodNotAllowed,
    NoRoute,
    Unauthorized,
    not_started,
)
from api_gateway.http1.asgi import ADMIN, SERVER_EXTENSION, ASGIApp, Message, Receive, Scope, Send
from api_gateway.http1.forwarded import X_FORWARDED_FOR, client_address
from api_gateway.http1.headers import Fields, Network, ambiguity, fields_of, framing
from api_gateway.http1.plain_types import complete_scope
from api_gateway.http1.request_paths import RequestTarget, first_segment, path_as_sent, target_of
from api_gateway.middleware import respond_to_server_options
from api_gateway.proxy.cors import CorsPolicy
from api_gateway.proxy.problem_response import instance_in, send_problem
from api_gateway.proxy.request_id import given_request_id, new_request_id

logger = logging.getLogger(__name__)

OPERATOR = "gateway.operator"  # key of the admitted operator in the ASGI scope
SERVER = "gateway.server"  # key of the server's extension, for streams only
REQUEST_ID = "gateway.request_id"  # key of the id of an operator's request
REASONS = ("missing_token", "invalid_token", "insufficient_role", "cross_site")  # of refusals
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_QUERIES = frozenset({"explain"})  # endpoints that change nothing although their method is POST
_TEXT = b"text/plain; charset=utf-8"
_JSON = b"application/json"
_ADVICE = (
    "This endpoint requires the header 'Authorization: Bearer <token>', with a configured token or the one in the file"
    " operator-token in state_dir. If no token is configured, programs that the operator runs on this machine"
    " need none; the log has the reason if one is refused."
)
_EVENTS = ("dashboard", "events")
_OWN_USAGE = ("usage", "me")
_MAX_LOGGED = 100  # characters of a path


@dataclass(frozen=True, slots=True)
class Access:
    """The access rules of the operator endpoints. A reload replaces them as a whole."""

    tokens: Tokens
    locality: Locality
    trusted_proxies: Collection[Network] = ()
    forwarded_by: bytes = X_FORWARDED_FOR  # the field in which trusted proxies report clients
    cors: CorsPolicy | None = None  # of what clients may ask here, such as their own usage


class OperatorGate:
    """Admits operators to the framework, and serves `/health`, `/healthz` and `/readyz` from memory.

    `access` may be replaced at any time. `refusals` counts refused requests by cause (`REASONS`).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        endpoints: Collection[str],
        has_admin_listener: bool,
        readiness: Callable[[], tuple[bool, str]],
        health: Callable[[], HealthCache | None],
        limits: OperatorLimits,
        refused: Counter[str],
    ) -> None:
        """Guard all paths whose first segment is one of `endpoints`.

        With `has_admin_listener`, other listeners serve the health endpoints only and return 404 for the rest.
        `readiness` returns whether the gateway serves requests, and its phase as a word. `health` returns None before
        the start is complete. `refused` counts the error responses generated here, by reason.
        """
        self.app = app
        self.access = access
        self.refusals: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self._endpoints = frozenset(endpoints)
        self._has_admin_listener = has_admin_listener
        self._readiness = readiness
        self._health = health
        self._limits = limits
        self._refused = refused
        self._pages = StaticPages()
        self._views: dict[str, Callable[[Scope, Fields, Send], Awaitable[None]]] = {
            "health": self._show_health,
            "healthz": self._show_liveness,
            "readyz": self._show_readiness,
        }

    def __repr__(self) -> str:
        return f"<OperatorGate of {', '.join(sorted(self._endpoints))}>"

    def guards(self, scope: Scope) -> bool:
        """Return whether the path is guarded, with an encoded slash read as a separator or as a character."""
        return first_segment(scope) in self._endpoints or target_of(scope).segments[0] in self._endpoints

    def _is_hidden(self, scope: Scope) -> bool:
        """Return whether the request came through a listener that does not serve operator endpoints."""
        return self._has_admin_listener and ADMIN not in scope

    def _is_for_clients(self, scope: Scope) -> bool:
        """Return whether pages of other origins may send this request.

        They may ask for a client's own usage, and for paths that are not operator endpoints.
        """
        segments = target_of(scope).segments
        if segments == _OWN_USAGE:
            return True
        return ADMIN not in scope and not self.guards(scope) and not StaticPages.serves(segments)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; a path that is not guarded gets status 404."""
        complete_scope(scope)
        fields = fields_of(scope["headers"])
        if scope["method"] == "HEAD":
            send = without_body(send)
        if self._is_for_clients(scope):
            send = with_cors(send, self.access.cors, fields)
        try:
            await self._serve(scope, fields, receive, send)
        except ClientDisconnected:
            return
        except GatewayError as error:
            self._refused[error.reason] += 1
            if framing(fields) is not None:  # the unread body would be taken for the next request
                error.headers["connection"] = "close"
            await send_problem(error, send, instance=instance_in(scope), request_id=None, headers=[])

    async def _serve(self, scope: Scope, fields: Fields, receive: Receive, send: Send) -> None:
        target = target_of(scope)
        view = self._views.get(target.segments[0]) if len(target.segments) == 1 else None
        fault = ambiguity(fields, scope["http_version"])
        is_simple = view is not None and b"host" not in fields and framing(fields) is None
        if fault is not None and not is_simple:  # simple health checks omit Host
            raise BadRequest(f"The request is ambiguous: {fault}.", headers={"connection": "close"})
        if SERVER_EXTENSION not in scope and may_hold_trailers(fields, receive):
            raise LengthRequired(TRAILERS_MIXED)
        if scope["path"] == "*" and scope["method"] == "OPTIONS":
            await respond_to_server_options(send)
            return
        if view is not None:
            await self._show(view, scope, fields, send)
            return
        if target.segments == _OWN_USAGE:
            await self._show_own_usage(scope, fields, receive, send)
            return
        is_page = scope["method"] in _READS and StaticPages.serves(target.segments)
        if not (is_page or self.guards(scope)) or self._is_hidden(scope):
            raise no_endpoint(scope["path"])
        if is_forged(scope["method"], fields, holds_data=not is_page):
            error = Forbidden(
                "A web page of another origin made this request (Origin, Sec-Fetch-Site)."
                " Operator endpoints refuse such requests."
            )
            raise self._refusal("cross_site", scope, error)
        if is_page:
            await self._show_page(scope["method"], target.segments, fields, send)
        else:
            await self._serve_endpoint(scope, fields, target, receive, send)

    async def _serve_endpoint(
        self, scope: Scope, fields: Fields, target: RequestTarget, receive: Receive, send: Send
    ) -> None:
        """Identify the operator, and pass the request to the framework."""
        method, first = scope["method"], target.segments[0]
        operator = await self._admitted(scope, fields)
        needed = Role.READ if method in _READS or first in _QUERIES else Role.OPERATE
        if not operator.may(needed):
            raise self._refusal(
                "insufficient_role",
                scope,
                Forbidden(f"The token '{operator.name}' has the role 'read'; {method} requires the role 'operate'."),
            )
        check_content_type(method, fields)
        body = await read_body(fields, receive)
        identity = given_request_id(fields) or new_request_id()
        inner = {**scope, "method": "GET" if method == "HEAD" else method, "path": target.path}
        inner |= {OPERATOR: operator, REQUEST_ID: identity}
        server = inner.pop(SERVER_EXTENSION, None)  # refers to the connection, which the server must be able to free
        if target.segments == _EVENTS:  # a stream ends when the server stops
            inner[SERVER] = server
        await self.app(inner, replay(body, receive), _with_field(send, b"x-request-id", identity.encode()))
        health = self._health()
        if needed is Role.OPERATE and health is not None:
            health.expire()

    # Identification

    async def _identify(self, scope: Scope, fields: Fields) -> Operator | None:
        token = bearer_token(fields)
        if token is not None:
            return self.access.tokens.find(token)
        return LOCAL if await self.access.locality.is_local(scope) else None

    async def _admitted(self, scope: Scope, fields: Fields) -> Operator:
        """Return the operator. Raises Unauthorized, RateLimited, or, if no token is configured, Forbidden."""
        operator = await self._identify(scope, fields)
        if operator is not None:
            self._limits.charge_operator(operator)
            return operator
        error = self._unidentified(scope, fields)
        self._limits.charge_failure(self._address(scope, fields))
        raise error

    def _unidentified(self, scope: Scope, fields: Fields) -> GatewayError:
        """Return the error for a request that identifies no operator, and count it."""
        is_wrong = bearer_token(fields) is not None
        error: GatewayError
        if len(fields.get(b"authorization", ())) > 1:
            error = CredentialsRepeated("Authorization was sent several times; send it once.")
        elif is_wrong or self.access.tokens:
            error = Unauthorized(
                "The bearer token is not valid." if is_wrong else _ADVICE,
                headers={"www-authenticate": 'Bearer realm="api-gateway"'},
            )
        else:
            error = Forbidden(
                "Without an admin token this endpoint accepts only direct requests from this machine to localhost. "
                "Set admin.token (GATEWAY_ADMIN__TOKEN) to use it from elsewhere."
            )
        return self._refusal("invalid_token" if is_wrong else "missing_token", scope, error)

    def _address(self, scope: Scope, fields: Fields) -> str:
        peer = scope["client"][0] if scope.get("client") else "unknown"
        access = self.access
        return client_address(peer, fields, access.trusted_proxies, access.forwarded_by).address

    def _refusal(self, reason: str, scope: Scope, error: GatewayError) -> GatewayError:
        """Count a refusal, log it within the limit on log lines, and return the error."""
        self.refusals[reason] += 1
        unlogged = self._limits.log_line()
        if unlogged is not None:
            logger.warning(
                "operator endpoint refused: %s: %s %s from %s%s",
                reason,
                scope["method"],
                ascii(path_as_sent(scope)[:_MAX_LOGGED])[1:-1],
                self._address(scope, fields_of(scope["headers"])),
                f" ({unlogged} refusals not logged since the last line)" if unlogged else "",
            )
        return error

    # Views from memory

    async def _show_page(self, method: str, segments: tuple[str, ...], fields: Fields, send: Send) -> None:
        """Send a file without data, for which no operator is needed."""
        if method == "OPTIONS":
            await _respond(send, 204, [(b"allow", b"GET, HEAD, OPTIONS")])
            return
        if not self._pages.is_read:
            await asyncio.to_thread(self._pages.read)
        status, headers, body = self._pages.find(segments).response(fields)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _show(
        self, view: Callable[[Scope, Fields, Send], Awaitable[None]], scope: Scope, fields: Fields, send: Send
    ) -> None:
        allow = {"allow": "GET, HEAD, OPTIONS"}
        if scope["method"] == "OPTIONS":
            await _respond(send, 204, [(b"allow", allow["allow"].encode())])
        elif scope["method"] not in _READS:
            raise MethodNotAllowed("This endpoint supports GET and HEAD.", headers=allow)
        else:
            await view(scope, fields, send)

    async def _show_own_usage(self, scope: Scope, fields: Fields, receive: Receive, send: Send) -> None:
        """Pass a client's request for its own usage to the framework: it needs no operator, at any listener."""
        policy = self.access.cors
        allowed = preflight_response(policy, scope["method"], fields)
        if allowed is not None:
            await _respond(send, 204, allowed)
            return
        if is_foreign(fields) and not is_of_allowed_page(policy, fields):
            error = Forbidden("A web page of another origin made this request (Origin, Sec-Fetch-Site).")
            raise self._refusal("cross_site", scope, error)
        self._limits.charge_view(self._address(scope, fields))
        body = await read_body(fields, receive)
        inner = {**scope, "method": "GET" if scope["method"] == "HEAD" else scope["method"], "path": "/usage/me"}
        inner.pop(SERVER_EXTENSION, None)
        await self.app(inner, replay(body, receive), send)

    async def _show_liveness(self, _scope: Scope, _fields: Fields, send: Send) -> None:
        await _respond(send, 200, body=b"ok\n", kind=_TEXT)

    async def _show_readiness(self, _scope: Scope, _fields: Fields, send: Send) -> None:
        is_ready, word = self._readiness()
        await _respond(send, 200 if is_ready else 503, body=f"{word}\n".encode(), kind=_TEXT)

    async def _show_health(self, scope: Scope, fields: Fields, send: Send) -> None:
        """Send the whole view to operators, and the status alone to others and to pages of another origin."""
        health = self._health()
        if health is None:
            raise not_started()
        operator = None if is_foreign(fields) else await self._identify(scope, fields)
        if operator is not None:
            self._limits.charge_operator(operator)
            await _respond(send, 200, body=await health.detailed(), kind=_JSON)
            return
        if bearer_token(fields) is not None:
            self._unidentified(scope, fields)  # counted and logged, but served the status
        self._limits.charge_view(self._address(scope, fields))
        await _respond(send, 200, body=await health.status_only(), kind=_JSON)


def no_endpoint(path: str) -> NoRoute:
    """Return the error for a path that neither an endpoint nor a route has."""
    return NoRoute(f"No endpoint or route matches {quoted_path(path)}.")


def _with_field(send: Send, name: bytes, value: bytes) -> Send:
    """Return `send` that adds a header field to the response."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (name, value)]
        await send(message)

    return sending


async def _respond(
    send: Send, status: int, headers: Sequence[tuple[bytes, bytes]] = (), *, body: bytes = b"", kind: bytes = b""
) -> None:
    fields = [*headers, (b"cache-control", b"no-store")]
    if kind:
        fields += [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": False})
