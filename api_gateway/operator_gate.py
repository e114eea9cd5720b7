"""The gate in front of the operator endpoints: pure ASGI, ahead of the framework and of the request's body.

In this order, and with nothing of the body read before the last step: the path is classified; a request made by a
page of another origin is refused; the operator is identified by token or as local, and must hold the role that the
request needs; the content type is checked; the body is read, up to `MAX_BODY`. Only then the framework runs.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from api_gateway.cross_site import check_content_type, check_origin, is_foreign
from api_gateway.errors import (
    BadRequest,
    BodyTooLarge,
    ClientDisconnected,
    Forbidden,
    GatewayError,
    MethodNotAllowed,
    Unauthorized,
)
from api_gateway.headers import Fields, fields_of, flaw, framing
from api_gateway.link import LINK
from api_gateway.locality import Locality
from api_gateway.middleware import ASGIApp, send_problem
from api_gateway.operators import LOCAL, Operator, Role, Tokens, bearer_token
from api_gateway.request import Message, Receive, Scope, Send

OPERATOR = "gateway.operator"  # the scope's key for the operator who was admitted; None for a stranger at an open view
MAX_BODY = 65_536  # bytes
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_QUESTIONS = frozenset({"explain"})  # endpoints that change nothing although they take a body
_PAGES = frozenset({"docs"})  # pages that hold no data: other sites may link to them
_CHALLENGE = {"www-authenticate": 'Bearer realm="api-gateway"'}


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use the operator endpoints, as configured. Immutable; a reload replaces it."""

    tokens: Tokens
    locality: Locality


class Target(NamedTuple):
    """The path of a request below the application's root: its segments, decoded one by one."""

    root: str
    segments: tuple[str, ...]

    @property
    def path(self) -> str:
        """The path as the framework is to match it: a slash within a segment stays encoded."""
        return self.root + "/" + "/".join(map(escaped, self.segments))


class OperatorGate:
    """Decides who reaches the framework; answers `/healthz` and `/readyz` by itself.

    `endpoints` are the first segments of the operator endpoints; any other path is not the gate's business.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        endpoints: Collection[str],
        readiness: Callable[[], tuple[bool, str]],
        refused: Counter[str],
    ) -> None:
        """`readiness` tells whether the gateway serves, and the word for it; `refused` counts refusals by reason."""
        self.app = app
        self.access = access
        self._endpoints = frozenset(endpoints)
        self._readiness = readiness
        self._refused = refused
        self._views: dict[str, Callable[[], tuple[int, bytes]]] = {"healthz": self._live, "readyz": self._ready}

    def __repr__(self) -> str:
        return f"<OperatorGate of {', '.join(sorted(self._endpoints))}>"

    def guards(self, scope: Scope) -> bool:
        """Tell whether the path is one of the gate's. Both readings of an encoded slash are looked at."""
        target = target_of(scope)
        first = unescaped_first(scope, target.root)
        return target.segments[0] in self._endpoints or first in self._endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request whose path is the gate's."""
        fields = fields_of(scope["headers"])
        if scope["method"] == "HEAD":
            send = without_body(send)
        try:
            await self._serve(scope, fields, receive, send)
        except ClientDisconnected:
            return
        except GatewayError as error:
            self._refused[error.reason] += 1
            if framing(fields) is not None:  # its body is not read
                error.headers["connection"] = "close"
            await send_problem(error, send, instance=path_as_sent(scope), request_id=None, headers=[])

    async def _serve(self, scope: Scope, fields: Fields, receive: Receive, send: Send) -> None:
        target = target_of(scope)
        first = target.segments[0]
        fault = flaw(fields, scope["http_version"])
        if fault is not None:
            raise BadRequest(f"The request is ambiguous: {fault}.", headers={"connection": "close"})
        if len(target.segments) == 1 and first in self._views:
            await self._view(self._views[first], scope["method"], send)
            return
        method = scope["method"]
        operator = await self._stranger_or_operator(scope, fields) if first == "health" else None
        if first != "health":
            check_origin(method, fields, holds_data=first not in _PAGES)
            operator = await self._admitted(scope, fields)
            self._authorize(operator, method, first)
            check_content_type(method, fields)
        body = await read_body(fields, receive)
        inner = {**scope, "method": "GET" if method == "HEAD" else method, "path": target.path, OPERATOR: operator}
        inner.pop(LINK, None)
        await self.app(inner, replay(body, receive), send)

    async def _stranger_or_operator(self, scope: Scope, fields: Fields) -> Operator | None:
        """Return who asks for an open view, of which strangers, and pages of another origin, see less."""
        return None if is_foreign(fields) else await self._identify(scope, fields)

    async def _identify(self, scope: Scope, fields: Fields) -> Operator | None:
        token = bearer_token(fields)
        if token is not None:
            return self.access.tokens.find(token)
        return LOCAL if await self.access.locality.is_local(scope) else None

    async def _admitted(self, scope: Scope, fields: Fields) -> Operator:
        """Return the operator. Raises Unauthorized, or Forbidden where no token could help."""
        operator = await self._identify(scope, fields)
        if operator is not None:
            return operator
        if self.access.tokens:
            raise Unauthorized("This endpoint needs the header 'Authorization: Bearer <token>'.", headers=_CHALLENGE)
        raise Forbidden(
            "Without an admin token this endpoint answers only direct requests from this machine to localhost. "
            "Set admin.token (GATEWAY_ADMIN__TOKEN) to reach it from elsewhere."
        )

    def _authorize(self, operator: Operator, method: str, first: str) -> None:
        needed = Role.READ if method in _READS or first in _QUESTIONS else Role.OPERATE
        if not operator.may(needed):
            raise Forbidden(
                f"The token '{operator.name}' has the role 'read'; {method} needs a token of role 'operate'."
            )

    async def _view(self, view: Callable[[], tuple[int, bytes]], method: str, send: Send) -> None:
        if method not in ("GET", "HEAD"):
            raise MethodNotAllowed("This endpoint takes GET and HEAD.", headers={"allow": "GET, HEAD"})
        status, body = view()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _live(self) -> tuple[int, bytes]:
        return 200, b"ok\n"

    def _ready(self) -> tuple[int, bytes]:
        is_ready, word = self._readiness()
        return 200 if is_ready else 503, f"{word}\n".encode()


def target_of(scope: Mapping[str, Any]) -> Target:
    """Return the path below the application's root, from its spelling on the wire where the server states that."""
    root = scope.get("root_path", "")
    path = path_as_sent(scope)
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return Target(root, tuple(map(unquote, path.removeprefix("/").split("/"))))


def unescaped_first(scope: Mapping[str, Any], root: str) -> str:
    """Return the first segment of the path if an encoded slash were a slash, as a framework reads it."""
    path = scope["path"]
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    return str(path.removeprefix("/").partition("/")[0])


def path_as_sent(scope: Mapping[str, Any]) -> str:
    """Return the path as spelt on the wire, unless the server does not state that, or something changed the path."""
    raw = (scope.get("raw_path") or b"").decode("latin-1")
    return raw if unquote(raw) == scope["path"] else quote(scope["path"])


def escaped(segment: str) -> str:
    """Return a segment with only the characters encoded that would be taken for structure; see `unescaped`."""
    return segment.replace("%", "%25").replace("/", "%2F")


def unescaped(segment: str) -> str:
    """Return the segment that was `escaped`."""
    return segment.replace("%2F", "/").replace("%25", "%")


async def read_body(fields: Fields, receive: Receive) -> bytes:
    """Read the body. Raises BodyTooLarge: at once if `Content-Length` states it, else when the bytes arrive."""
    if framing(fields) is None:
        return b""
    lengths = fields.get(b"content-length", ())
    if lengths and (not lengths[0].isdigit() or len(lengths[0]) > len(str(MAX_BODY)) or int(lengths[0]) > MAX_BODY):
        raise _too_large()
    pieces, size, has_more = [], 0, True
    while has_more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnected("The client left while sending.")
        piece = message.get("body", b"")
        size += len(piece)
        if size > MAX_BODY:
            raise _too_large()
        pieces.append(piece)
        has_more = message.get("more_body", False)
    return b"".join(pieces)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body, whole, and then what the server says."""
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
        f"A body of an operator endpoint holds at most {MAX_BODY} bytes.", headers={"connection": "close"}
    )
