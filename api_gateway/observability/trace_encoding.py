"""Spans of exchanges in OTLP (protobuf), by the HTTP semantic conventions.

The only module that knows the library opentelemetry-proto (extra `otel`). What many spans have in common is encoded by
it and remembered; the values that differ in each span are written here in protobuf's wire format, as building messages
for them costs several times as much.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from api_gateway.models import NANOSECONDS, Exchange, Trace

SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"
TRACED_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}  # of the conventions
)
MAX_REMEMBERED_PARTS = 4096
_STEP = 16  # exchanges that are encoded at a stretch
_LEFT = 499  # the client has left: no response was sent
_SERVER_ERROR, _ERROR = 500, 400
_LOCAL_PARENT, _REMOTE_PARENT = 0x100, 0x300  # flags that say where the parent of a span is
# Keys of fields in the wire format: number and kind of a field of `Span`, and of messages in it.
_SPANS = b"\x12"  # of ScopeSpans: 2, bytes
_SCOPE_SPANS = b"\x12"  # of ResourceSpans: 2, bytes
_RESOURCE_SPANS = b"\x0a"  # of ExportTraceServiceRequest: 1, bytes
_SHORT = 124  # bytes of name and value
_ATTRIBUTE = b"J"  # of Span: 9, bytes
_SPAN = struct.Struct("<2s16s2s8ssQsQ2sI").pack  # trace and span (1 and 2), start and end (7 and 8), flags (16)
_PARENT = b"\x22\x08%b"  # parent_span_id (4)

AttributeValue = str | int | float | bool
_KINDS = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}


class SpanEncoder:
    """Encodes exchanges that have ended. Its only state are caches; `paths` and `has_client` change on reload."""

    def __init__(
        self,
        resource: Mapping[str, str],
        version: str,
        *,
        redact: Callable[[str], str] = str,
        paths: Mapping[str, str] | None = None,
        has_client: bool = False,
    ) -> None:
        """`resource` are the attributes of the gateway. `paths` has the path of each route by name.

        `redact` returns a path without secrets that a client has put there. `has_client`: spans have the client's id
        and address.
        """
        self.paths: Mapping[str, str] = paths or {}
        self.has_client = has_client
        self._redact = redact
        attributes = [_key_value(name, value) for name, value in resource.items()]
        self._resource = ResourceSpans(
            resource=Resource(attributes=attributes), schema_url=SCHEMA_URL
        ).SerializeToString()
        scope = InstrumentationScope(name="api-gateway", version=version)
        self._scope = ScopeSpans(scope=scope, schema_url=SCHEMA_URL).SerializeToString()

    def __repr__(self) -> str:
        return f"<SpanEncoder [{_server_part.cache_info().currsize} parts remembered]>"

    def request(
        self, exchanges: Iterable[Exchange], offset: float, pause: Callable[[], object] = bool
    ) -> tuple[bytes, int]:
        """Return the body of a request to a collector, and the number of its spans.

        `offset` is the difference of the wall clock to the monotonic clock, in seconds. `pause` is called between
        steps.
        """
        spans: list[bytes] = []
        for number, exchange in enumerate(exchanges, 1):
            trace = exchange.trace
            if trace is not None:
                spans.append(self._server(exchange, trace, offset))
                spans += [self._client(exchange, trace, index, offset) for index in range(len(trace.attempts))]
            if not number % _STEP:
                pause()
        body = self._scope + b"".join([_SPANS + _length(len(span)) + span for span in spans])
        body = self._resource + _SCOPE_SPANS + _length(len(body)) + body
        return _RESOURCE_SPANS + _length(len(body)) + body, len(spans)

    def _server(self, exchange: Exchange, trace: Trace, offset: float) -> bytes:
        """Return the span of an exchange."""
        client, decision = exchange.client, exchange.decision
        common = _server_part(
            exchange.method,
            exchange.status,
            exchange.source,
            exchange.reason,
            trace.scheme,
            trace.version,
            exchange.route,
            self.paths.get(exchange.route or ""),
            exchange.upstream,
            exchange.fallback,
            exchange.attempts,
            None if client is None else client.quota.name,
            None if decision is None else (decision.quota.policy, decision.source, decision.allowed),
            exchange.cost,
        )
        own = [
            common,
            _own_part(
                trace,
                trace.span_id,
                exchange.started + offset,
                exchange.finished + offset,
                _REMOTE_PARENT if trace.parent_id else _LOCAL_PARENT,
            ),
            _text(_PATH, self._redact(exchange.path)),
            _text(_REQUEST_ID, self._redact(exchange.id)),
        ]
        if trace.parent_id:
            own.append(_PARENT % bytes.fromhex(trace.parent_id))
        if trace.state:
            own.append(b"\x1a" + _length(len(trace.state)) + trace.state)
        if trace.host:
            own.append(_text(_SERVER_ADDRESS, trace.host))
        if decision is not None:
            own.append(_attribute("gateway.tokens.remaining", decision.remaining))
        if trace.link is not None:
            own.append(_link(trace.link))
        if self.has_client:
            own.append(_text(_CLIENT_ADDRESS, exchange.peer))
            if client is not None:
                own.append(_text(_CLIENT_ID, self._redact(client.id)))
        return b"".join(own)

    def _client(self, exchange: Exchange, trace: Trace, index: int, offset: float) -> bytes:
        """Return the span of an attempt."""
        span_id, upstream, target, path_and_query, breaker, started = trace.attempts[index]
        status, error, ended = _end_of(exchange, trace, index)
        path = path_and_query.partition(b"?")[0].decode("latin-1")
        common = _client_part(exchange.method, upstream, target, status, error, index, breaker.value)
        return b"".join(
            (
                common,
                _own_part(trace, span_id, started + offset, ended + offset, _LOCAL_PARENT),
                _PARENT % bytes.fromhex(trace.span_id),
                _text(_FULL_URL, target + self._redact(path)),
            )
        )


def _end_of(exchange: Exchange, trace: Trace, index: int) -> tuple[int, str | None, float]:
    """Return status (0 without a response), error and end (monotonic seconds) of an attempt.

    Each attempt that has failed has its row in `failures`, in their order; one that is followed by another has failed.
    """
    is_last = index == len(trace.attempts) - 1
    status, error, ended = 0, None, exchange.finished
    if index < len(exchange.failures):
        row = exchange.failures[index]
        status, error = row.status or 0, row.failure
        if error is not None or not is_last:
            ended = row.ended
    if is_last and not status and exchange.head_at is not None and exchange.source == "upstream":
        status = exchange.status
    if error is None and not status:  # it was given up: the client has left, or the drain has ended
        error = exchange.reason
    return status, error, ended


def rejected_spans(response: bytes) -> tuple[int, str]:
    """Return how many spans a collector has rejected, and why, by the body of its successful response."""
    partial = ExportTraceServiceResponse.FromString(response).partial_success
    return partial.rejected_spans, partial.error_message


def _own_part(trace: Trace, span_id: str, started: float, ended: float, parent: int) -> bytes:
    """Return ids, times (seconds since the epoch) and flags of a span. `parent` says where its parent is."""
    return _SPAN(
        b"\x0a\x10",
        bytes.fromhex(trace.trace_id),
        b"\x12\x08",
        bytes.fromhex(span_id),
        b"\x39",
        round(started * NANOSECONDS),
        b"\x41",
        round(ended * NANOSECONDS),
        b"\x85\x01",
        int(trace.flags, 16) | parent,
    )


@lru_cache(maxsize=MAX_REMEMBERED_PARTS)
def _server_part(
    method: str,
    status: int,
    source: str,
    reason: str | None,
    scheme: str,
    version: str,
    route: str | None,
    path: str | None,
    upstream: str | None,
    fallback: str | None,
    attempts: int,
    tier: str | None,
    decision: tuple[str, str, bool] | None,
    cost: float,
) -> bytes:
    """Return name, kind, status and attributes that the spans of many exchanges have in common."""
    known = method if method in TRACED_METHODS else "HTTP"
    attributes = {
        **_method(method),
        "url.scheme": scheme,
        "network.protocol.version": version,
        "gateway.response.source": source,
        "gateway.attempts": attempts,
        "gateway.cost": float(cost),
    }
    is_failed = status >= _SERVER_ERROR or (reason is not None and status < _ERROR and fallback is None)
    if status != _LEFT:
        attributes["http.response.status_code"] = status
    optional = {
        "http.route": path,
        "error.type": (reason or str(status)) if is_failed or status == _LEFT else None,
        "gateway.reason": reason,
        "gateway.route": route,
        "gateway.upstream": upstream,
        "gateway.fallback": fallback,
        "gateway.client.tier": tier,
    }
    attributes |= {name: value for name, value in optional.items() if value is not None}
    if decision is not None:
        attributes["gateway.limit"], attributes["gateway.limit.decision_source"], is_allowed = decision
        attributes["gateway.limit.allowed"] = is_allowed
    return _part(f"{known} {path}" if path else known, Span.SPAN_KIND_SERVER, attributes, is_failed=is_failed)


@lru_cache(maxsize=MAX_REMEMBERED_PARTS)
def _client_part(
    method: str, upstream: str, target: str, status: int, error: str | None, index: int, breaker: str
) -> bytes:
    """Return name, kind, status and attributes that the spans of many attempts have in common."""
    place = urlsplit(target)
    attributes: dict[str, AttributeValue] = {
        **_method(method),
        "server.address": place.hostname or "",
        "server.port": place.port or (443 if place.scheme == "https" else 80),
        "network.protocol.version": "1.1",
        "gateway.upstream": upstream,
        "gateway.circuit_breaker.state": breaker.lower(),
    }
    is_failed = error is not None or status >= _ERROR
    if status:
        attributes["http.response.status_code"] = status
    if is_failed:
        attributes["error.type"] = error or str(status)
    if index:
        attributes["http.request.resend_count"] = index
    name = method if method in TRACED_METHODS else "HTTP"
    return _part(name, Span.SPAN_KIND_CLIENT, attributes, is_failed=is_failed)


def _method(method: str) -> dict[str, AttributeValue]:
    """Return the attributes of a method; one that the conventions do not know is `_OTHER`."""
    if method in TRACED_METHODS:
        return {"http.request.method": method}
    return {"http.request.method": "_OTHER", "http.request.method_original": method}


def _part(name: str, kind: Any, attributes: Mapping[str, AttributeValue], *, is_failed: bool) -> bytes:
    status = Status(code=Status.STATUS_CODE_ERROR) if is_failed else None
    pairs = [_key_value(key, value) for key, value in attributes.items()]
    found: bytes = Span(name=name, kind=kind, attributes=pairs, status=status).SerializeToString()
    return found


def _key_value(name: str, value: AttributeValue) -> Any:
    typed: Any = {_KINDS[type(value)]: value}
    return KeyValue(key=name, value=AnyValue(**typed))


@lru_cache(maxsize=MAX_REMEMBERED_PARTS)
def _attribute(name: str, value: AttributeValue) -> bytes:
    """Return an attribute of a span, as its field in the wire format."""
    found: bytes = Span(attributes=[_key_value(name, value)]).SerializeToString()
    return found


def _link(link: tuple[str, str]) -> bytes:
    """Return a link of a span, as its field in the wire format."""
    trace_id, span_id = map(bytes.fromhex, link)
    found: bytes = Span(links=[Span.Link(trace_id=trace_id, span_id=span_id)]).SerializeToString()
    return found


def _name_of(name: str) -> bytes:
    """Return the name of an attribute, as its field in the wire format (KeyValue: 1, bytes)."""
    return b"\x0a" + _length(len(name)) + name.encode()


def _text(name: bytes, text: str) -> bytes:
    """Return an attribute of a span that is text: KeyValue (name; value: 2, bytes) with AnyValue (text: 1, bytes)."""
    value = text.encode("utf-8", "replace")
    size = len(value)
    if len(name) + size < _SHORT:  # each length has one byte
        return b"J%c%b\x12%c\x0a%c%b" % (len(name) + size + 4, name, size + 2, size, value)
    value = b"\x0a" + _length(len(value)) + value
    pair = name + b"\x12" + _length(len(value)) + value
    return _ATTRIBUTE + _length(len(pair)) + pair


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits in each byte
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


_LENGTHS = [_varint(number) for number in range(1024)]


def _length(number: int) -> bytes:
    """Return a length in the wire format."""
    return _LENGTHS[number] if number < len(_LENGTHS) else _varint(number)


_PATH, _REQUEST_ID = _name_of("url.path"), _name_of("gateway.request.id")
_SERVER_ADDRESS, _FULL_URL = _name_of("server.address"), _name_of("url.full")
_CLIENT_ADDRESS, _CLIENT_ID = _name_of("client.address"), _name_of("gateway.client.id")
