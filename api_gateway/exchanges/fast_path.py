"""The two ways of a request to its exchange: in callbacks of the event loop (the fast path), or by ASGI.

Most requests wait for nothing but the rest of their body and the upstream's response. They need no ASGI scope, no
coroutine and no task. A head that is not plain is left to the general parser, which offers it again with what it has
read (`try_head`). Requests of HTTP/1.0, those that follow others before their response, and those to other servers or
behind middleware arrive by ASGI (`serve`); the exchange is the same. `proxy.exchange` has the states of an exchange,
`http_exchange` the actions.
"""

from urllib.parse import unquote

from api_gateway.downstream.uvicorn_server import TRAILERS_MIXED, may_hold_trailers
from api_gateway.errors import GatewayError
from api_gateway.exchanges.asgi_downstream import AsgiDownstream
from api_gateway.exchanges.client_port import Downstream
from api_gateway.exchanges.exchange_context import ExchangeContext
from api_gateway.exchanges.http_exchange import HttpExchange
from api_gateway.exchanges.tunnelling_exchange import TunnellingExchange
from api_gateway.http1.asgi import FIELDS, SERVER_EXTENSION, Receive, Scope, Send, ServerExtension
from api_gateway.http1.fast_parser import parse_request_head
from api_gateway.http1.headers import fields_of, host_name
from api_gateway.http1.plain_types import complete_scope
from api_gateway.http1.request_head import RequestHead
from api_gateway.http1.request_paths import raw_root
from api_gateway.middleware import EXCHANGE
from api_gateway.models import Exchange, HeaderList
from api_gateway.observability.trace_context import split_lines, split_pairs
from api_gateway.proxy.admission import Admission, RequestPlan, Stage, StageResponse, Wait
from api_gateway.proxy.cors import origin_of
from api_gateway.proxy.header_facts import MAX_REMEMBERED_BYTES, RewrittenHeaders
from api_gateway.proxy.mounted_routes import MountedRouteStage
from api_gateway.proxy.stages import RouteStage

_MAX_ROOTS = 64  # that a fast path is kept for


class FastPath(ExchangeContext):
    """Admits plain requests; see the module. Has no state but configuration."""

    exchange_kind: type[HttpExchange] = HttpExchange
    _below: "dict[bytes, FastPath] | None" = None

    def below(self, root: bytes) -> "FastPath":
        """Return the same for requests from whose paths `root` was stripped: URLs in their responses get it.

        It is kept for few roots: one may be a part of the request, as `{tenant}` of a mounting application.
        """
        known = self._below
        if known is None:
            known = self._below = {}
        found = known.get(root)
        if found is None:
            stages: list[Stage] = [
                MountedRouteStage(stage, root) if isinstance(stage, RouteStage) else stage
                for stage in self.admission.stages
            ]
            found = FastPath(
                record=self.record,
                admission=Admission(stages),
                headers=self.headers,
                router=self.router,
                limit_headers=self.limit_headers,
                clock=self.clock,
                clock_ns=self.clock_ns,
                cors=self.cors,
                open_exchanges=self.open_exchanges,
                tracer=self.tracer,
                added=self._added,
            )
            found.exchange_kind, found.response_hooks = self.exchange_kind, self.response_hooks
            found.mirrors = self.mirrors
            if len(known) < _MAX_ROOTS:
                known[root] = found
        return found

    def try_handle(self, client: Downstream, received: bytes) -> bool:  # noqa: C901, PLR0911, PLR0912 - each branch is a reason
        """Start or refuse the received request and return True, or change nothing and return False.

        `received` is everything that one read returned: one complete head with a part of the body of its request at
        most, or False is returned.
        """
        parts = parse_request_head(received)
        if parts is None:
            return False
        method, raw_path, query, lines, body = parts
        parent, state = None, b""
        headers = client.last_headers
        if headers is None or headers.received != lines or headers.facts.owner is not self.headers:
            if self.tracer is None:
                headers = self._read(client, lines)
            else:
                lines, parent, state = split_lines(lines)
                headers = self._read_without_context(client, lines)
        if headers is None:
            return False
        facts, received_length = headers.facts, len(body)
        if received_length > facts.length:  # type: ignore[operator]  # a plain head has a length
            return False
        if len(received) - received_length > client.limits.header_bytes:
            return False
        path = raw_path.decode("ascii")
        if "%" in path:
            path = unquote(path)
        if not self.is_proxied(path):
            return False
        target = raw_path + query if query else raw_path
        plan = self.admission.plan(facts, method, path, target, self.clock_ns())
        plan.headers = headers
        if self.tracer is not None:
            plan.exchange.trace = trace = self.tracer.begin(parent, state)
            trace.host, trace.scheme = facts.host, client.scheme
        self.record.begin(plan.exchange)
        try:
            result = self.admission.decide(plan)
        except Exception as error:  # noqa: BLE001 - a defect, which must not end the connection without a response
            result = self.record.internal_error(plan.exchange, error)
        if result is not None and isinstance(result, Wait):
            self.exchange_kind(self, client, plan, body).wait(result)
            return True
        exchange = None
        if result is None:
            exchange = self.exchange_kind(self, client, plan, body)
            try:
                result = exchange.forward()
            except Exception as error:  # noqa: BLE001 - as above
                exchange.end_by_defect(error)
        if result is None:
            return True
        if received_length == facts.length:
            self._refuse(client, plan, result)
        else:
            (exchange or self.exchange_kind(self, client, plan, body)).refuse(result)
        return True

    def try_head(self, client: Downstream, head: RequestHead, trailers: HeaderList) -> bool:
        """Start or refuse a request whose head the general parser has read, as `try_handle` does.

        `trailers` is filled before the end of its body.
        """
        path = unquote(head.target.partition(b"?")[0].decode("ascii"))
        if not self.is_proxied(path):
            return False
        self._begin(client, head, path, trailers)
        return True

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request by ASGI: the application for all paths that are proxied."""
        complete_scope(scope)
        scope[FIELDS] = fields_of(scope["headers"])
        client = AsgiDownstream(scope, receive, send, self.router.omit)
        extension: ServerExtension | None = scope.get(SERVER_EXTENSION)
        head = client.head_of(scope, _raw_target(scope, extension))
        trailers = [] if extension is None else extension.trailers
        mixes_trailers = extension is None and may_hold_trailers(scope[FIELDS], receive)
        root = raw_root(scope.get("root_path") or "")
        own = self.below(root) if root else self
        with self.open_exchanges.holding(client):
            scope[EXCHANGE] = own._begin(  # noqa: SLF001 - of the same class
                client, head, scope["path"], trailers, mixes_trailers=mixes_trailers
            )
            await client.run()

    def _begin(
        self, client: Downstream, head: RequestHead, path: str, trailers: HeaderList, *, mixes_trailers: bool = False
    ) -> Exchange:
        """Start or refuse a request whose body follows in pieces; return its record.

        `mixes_trailers`: the header fields may contain trailers.
        """
        parent, state = None, b""
        if self.tracer is not None:
            head.headers, parent, state = split_pairs(head.headers)
        headers = self._read_head(client, head)
        if mixes_trailers and headers.facts.ambiguity is None:
            headers.facts.require_length(TRAILERS_MIXED)
        plan = self.admission.plan(headers.facts, head.method, path, head.target, self.clock_ns())
        plan.headers = headers
        if self.tracer is not None:
            plan.exchange.trace = trace = self.tracer.begin(parent, state)
            trace.host, trace.scheme, trace.version = headers.facts.host, client.scheme, head.version
        self.record.begin(plan.exchange)
        try:
            result = self.admission.decide(plan)
        except Exception as error:  # noqa: BLE001 - as in `try_handle`
            result = self.record.internal_error(plan.exchange, error)
        kind = TunnellingExchange if head.upgrade and client.abilities.upgrade else self.exchange_kind
        exchange = kind(self, client, plan, b"", trailers)
        if result is not None and isinstance(result, Wait):
            exchange.wait(result)
            return plan.exchange
        if result is None:
            try:
                result = exchange.forward()
            except Exception as error:  # noqa: BLE001 - as in `try_handle`
                exchange.end_by_defect(error)
        if result is not None:
            if exchange.upload is None:
                self._refuse(client, plan, result)
            else:
                exchange.refuse(result)
        return plan.exchange

    def refusal_fields(self, headers: HeaderList, target: bytes) -> HeaderList:
        """Return the CORS fields of a response with which the connection itself refuses a request."""
        if self.cors is None:
            return []
        path = unquote(target.partition(b"?")[0].decode("latin-1"))
        fields = fields_of(headers)
        cors = self.cors.at(host_name(fields), path, target, fields, origin_of(fields))
        return [] if cors is None else [*cors.pairs]

    def _read(self, client: Downstream, lines: bytes) -> RewrittenHeaders | None:
        """Return the meaning of header lines, which the connection keeps for its next request; None if not plain."""
        headers = self.headers.read_lines(
            _peer_of(client), client.scheme, lines, client.limits.header_lines, client.last_headers
        )
        if client.certificate is not None and headers is not None:
            headers = self.headers.certified(headers, client.certificate)
        client.last_headers = headers if len(lines) <= MAX_REMEMBERED_BYTES else None
        return headers

    def _read_without_context(self, client: Downstream, lines: bytes) -> RewrittenHeaders | None:
        """Do as `_read`, with lines without the trace context, which are often those of the request before."""
        headers = client.last_headers
        if headers is not None and headers.received == lines and headers.facts.owner is self.headers:
            return headers
        return self._read(client, lines)

    def _read_head(self, client: Downstream, head: RequestHead) -> RewrittenHeaders:
        """Return the meaning of the header fields of a head that the general parser has read."""
        headers = self.headers.read_head(_peer_of(client), client.scheme, head)
        if client.certificate is not None:
            self.headers.certify(headers.facts, client.certificate)
        return headers

    def _refuse(self, client: Downstream, plan: RequestPlan, error: GatewayError | StageResponse) -> None:
        """Refuse a request for which `begin_exchange` was not called."""
        exchange = plan.exchange
        response, keep_alive = self.refusal(plan, error, keep_alive=plan.facts.keep_alive)
        client.write_response(response, keep_alive=keep_alive, is_last=not plan.facts.keep_alive)
        self.record.end(exchange, self.clock())


def _peer_of(client: Downstream) -> str:
    """Return the address of the connection of a client."""
    return client.client[0] if client.client else "unknown"


def _raw_target(scope: Scope, extension: ServerExtension | None) -> bytes:
    """Return path and query from a scope, in which an empty query is none, and the path may be below a root."""
    query: bytes = scope["query_string"]
    path: bytes = scope["raw_path"]
    has_query = bool(query) or (extension is not None and extension.target.endswith(b"?"))
    return path + b"?" + query if has_query else path
