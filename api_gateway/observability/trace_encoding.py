"""Spans of exchanges in OTLP (protobuf), by the HTTP semantic conventions.

The only module that knows the library opentelemetry-proto (extra `otel`). What many spans have in common is encoded by
it and remembered; the values that differ in each span are written here in protobuf's wire format, because building
messages for them costs several times as much.
"""

import os
import struct
from binascii import unhexlify
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from api_gateway.models import NANOSECONDS, SPAN_ID, TRACE_FLAGS, TRACE_ID, Exchange, Trace
from api_gateway.observability.span_format import SpanHeads, TextHeads, heads_of_number, varint
from api_gateway.printable_text import OTHER_METHOD, shown_method

SCHEMA_URL = "https://opentelemetry.io/schemas/1.45.0"
TRACED_METHODS = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"}  # of the conventions
)
MAX_REMEMBERED_PARTS, MAX_REMEMBERED_HOSTS = 4096, 256
_STEP = 128  # exchanges that are encoded at a stretch, in half a millisecond: each stretch waits for the interpreter
_LEFT = 499  # the client has left: no response was sent
_SERVER_ERROR, _ERROR = 500, 400
_LOCAL_PARENT, _REMOTE_PARENT = 0x100, 0x300  # flags that say where the parent of a span is
# Keys of fields in the wire format: number and kind of a field of `Span`, and of messages in it.
_SCOPE_SPANS = b"\x12"  # of ResourceSpans: 2, bytes
_RESOURCE_SPANS = b"\x0a"  # of ExportTraceServiceRequest: 1, bytes
_TRACE, _SPAN, _PARENT = b"\x0a\x10", b"\x12\x08", b"\x22\x08"  # ids (1, 2 and 4), with their lengths
_STATE = b"\x1a"  # trace_state (3)
# The bytes after the key of the start (7): start, end (8) and flags (16).
_times = struct.Struct("<QsQ2sI").pack
_START, _END, _FLAGS = b"\x39", b"\x41", b"\x85\x01"
_LAST_FLAG, _FLAG_BITS = TRACE_FLAGS.stop - 1, 3  # the digit of the flags, and which of its bits are flags

_SPAN_HEADS = SpanHeads()
_PATH, _REQUEST_ID = TextHeads("url.path"), TextHeads("gateway.request.id")
_FULL_URL, _SERVER_ADDRESS = TextHeads("url.full"), TextHeads("server.address")
_CLIENT_ADDRESS, _CLIENT_ID = TextHeads("client.address"), TextHeads("gateway.client.id")
_REMAINING = heads_of_number("gateway.tokens.remaining")

AttributeValue = str | int | float | bool
_KINDS = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}


class SpanEncoder:
    """Encodes exchanges that have ended. Its only state is caches; `paths` and `has_client` change on reload."""

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
        self, exchanges: Sequence[Exchange], offset: float, pause: Callable[[], object] = bool
    ) -> tuple[bytes, int]:
        """Return the body of a request to a collector, and the number of its spans.

        `offset` is the difference of the wall clock to the monotonic clock, in seconds. `pause` is called between
        steps.
        """
        spans: list[bytes] = []
        ids, since = os.urandom(8 * len(exchanges)), round(offset * NANOSECONDS)
        for number, exchange in enumerate(exchanges):
            if exchange.trace is not None:
                self._add_spans(spans, exchange, exchange.trace, ids[8 * number : 8 * number + 8], since)
            if number % _STEP == _STEP - 1:
                pause()
        body = self._scope + b"".join(spans)
        body = self._resource + _SCOPE_SPANS + varint(len(body)) + body
        return _RESOURCE_SPANS + varint(len(body)) + body, len(spans) // 2

    def _add_spans(self, spans: list[bytes], exchange: Exchange, trace: Trace, span_id: bytes, since: int) -> None:
        """Add the spans of an exchange and of its attempts: each one's key and length, and its content.

        `since` is the time of the monotonic clock's zero, in nanoseconds since the epoch.
        """
        trace_id, flags = unhexlify(trace.fields[TRACE_ID]), trace.fields[_LAST_FLAG] & _FLAG_BITS
        path = _encoded(exchange.path)
        redacted = self._redact(exchange.path)
        shown = path if redacted is exchange.path else _encoded(redacted)
        finished = since + round(exchange.finished * NANOSECONDS)
        span = self._server(exchange, trace, shown, trace_id, span_id, since, finished, flags)
        spans.append(_SPAN_HEADS[len(span)])
        spans.append(span)
        attempts = trace.attempts()
        for index, (fields, attempt) in enumerate(attempts):
            upstream, target, raw, breaker, started = attempt
            if raw != path:
                raw = raw.partition(b"?")[0]
            if (
                len(attempts) == 1
                and exchange.source == "upstream"
                and exchange.head_at is not None
                and not exchange.failures
            ):
                status, error, end = exchange.status, None, finished  # `_end_of`, inlined for nearly all
            else:
                status, error, ended = _end_of(exchange, len(attempts), index)
                end = since + round(ended * NANOSECONDS)
            state = breaker._value_  # its property is a function in Python
            common, place = _client_part(exchange.method, upstream, target, status, error, index, state)
            url = place + (shown if raw == path else _encoded(self._redact(raw.decode("latin-1"))))
            times = _times(since + round(started * NANOSECONDS), _END, end, _FLAGS, flags | _LOCAL_PARENT)
            own_id, head = unhexlify(fields[SPAN_ID]), _FULL_URL[len(url)]
            span = b"".join((common, _TRACE, trace_id, _SPAN, own_id, _PARENT, span_id, _START, times, head, url))
            spans.append(_SPAN_HEADS[len(span)])
            spans.append(span)

    def _server(
        self,
        exchange: Exchange,
        trace: Trace,
        path: bytes,
        trace_id: bytes,
        span_id: bytes,
        since: int,
        finished: int,
        flags: int,
    ) -> bytes:
        """Return the span of an exchange that has `finished`, in nanoseconds since the epoch."""
        client, decision, request_id = exchange.client, exchange.decision, _encoded(self._redact(exchange.id))
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
        more = _server_address(trace.host) if trace.host else b""
        if decision is not None:
            remaining = varint(decision.remaining)
            more += _REMAINING[len(remaining)] + remaining
        if trace.parent_id or trace.link is not None or self.has_client:
            more += self._optional(exchange, trace)
        times = _times(
            since + round(exchange.started * NANOSECONDS),
            _END,
            finished,
            _FLAGS,
            flags | (_REMOTE_PARENT if trace.parent_id else _LOCAL_PARENT),
        )
        heads = _PATH[len(path)], _REQUEST_ID[len(request_id)]
        return b"".join(
            (common, _TRACE, trace_id, _SPAN, span_id, _START, times, heads[0], path, heads[1], request_id, more)
        )

    def _optional(self, exchange: Exchange, trace: Trace) -> bytes:
        """Return the optional fields of a request's span: the client's span as parent or link, and the client."""
        parts: list[bytes] = []
        if trace.parent_id:
            parts += _PARENT, unhexlify(trace.parent_id)
        if trace.state:
            parts += _STATE, varint(len(trace.state)), trace.state
        if trace.link is not None:
            parts.append(_link(trace.link))
        if self.has_client:
            parts.append(_text(_CLIENT_ADDRESS, exchange.client_address))
            if exchange.client is not None:
                parts.append(_text(_CLIENT_ID, self._redact(exchange.client.id)))
        return b"".join(parts)


def _end_of(exchange: Exchange, attempts: int, index: int) -> tuple[int, str | None, float]:
    """Return status (0 without a response), error and end (monotonic seconds) of one of `attempts`.

    Each attempt that has failed has its row in `failures`, in their order; one that is followed by another has failed.
    """
    is_last = index == attempts - 1
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
) -> tuple[bytes, bytes]:
    """Return the common part of the spans of many attempts, and the URL of their target.

    It has name, kind, status, and attributes.
    """
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
    return _part(name, Span.SPAN_KIND_CLIENT, attributes, is_failed=is_failed), target.encode()


def _method(method: str) -> dict[str, AttributeValue]:
    """Return the attributes of a method; one that the conventions do not know is `_OTHER`."""
    if method in TRACED_METHODS:
        return {"http.request.method": method}
    shown = shown_method(method)
    original = {} if shown == OTHER_METHOD else {"http.request.method_original": shown}
    return {"http.request.method": OTHER_METHOD, **original}


def _part(name: str, kind: Any, attributes: Mapping[str, AttributeValue], *, is_failed: bool) -> bytes:
    status = Status(code=Status.STATUS_CODE_ERROR) if is_failed else None
    pairs = [_key_value(key, value) for key, value in attributes.items()]
    found: bytes = Span(name=name, kind=kind, attributes=pairs, status=status).SerializeToString()
    return found


def _key_value(name: str, value: AttributeValue) -> Any:
    typed: Any = {_KINDS[type(value)]: value}
    return KeyValue(key=name, value=AnyValue(**typed))


def _link(link: tuple[str, str]) -> bytes:
    """Return a link of a span, as its field in the wire format."""
    trace_id, span_id = map(bytes.fromhex, link)
    found: bytes = Span(links=[Span.Link(trace_id=trace_id, span_id=span_id)]).SerializeToString()
    return found


def _encoded(text: str) -> bytes:
    return text.encode() if text.isascii() else text.encode("utf-8", "replace")


def _text(heads: TextHeads, text: str) -> bytes:
    """Return an attribute of a span that is text, as its field in the wire format."""
    value = _encoded(text)
    return heads[len(value)] + value


@lru_cache(maxsize=MAX_REMEMBERED_HOSTS)
def _server_address(host: str) -> bytes:
    return _text(_SERVER_ADDRESS, host)
