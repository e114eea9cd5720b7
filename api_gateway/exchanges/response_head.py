"""Heads of responses for the client: the upstream's fields, and those of the gateway."""

import time

from api_gateway.exchanges.exchange_context import ExchangeContext
from api_gateway.http1.headers import BODILESS, FALLBACK, LENGTH, forwardable_interim, http_date, rewrite_response
from api_gateway.http1.serializer import COLON, render_response_head, status_line
from api_gateway.models import Exchange, HeaderList
from api_gateway.proxy.cors import complete, complete_lines
from api_gateway.proxy.fallback import Fallback
from api_gateway.proxy.head_editing import HeadEditor, ResponseEditor
from api_gateway.proxy.url_rewriting import Authorities, UrlRewriter
from api_gateway.transport.response import UpstreamResponse

_EARLY_HINTS = frozenset({b"link", b"via"})
_NOTHING = frozenset[bytes]()


def plain_head(
    response: UpstreamResponse,
    exchange: Exchange,
    context: ExchangeContext,
    rewriter: ResponseEditor | None,
    authorities: Authorities,
    *,
    is_chunked: bool,
    keep_alive: bool,
) -> bytes:
    """Return the head for the client of a response whose head was plain. `authorities` are of the request."""
    passed = response.passed
    if rewriter is not None:
        passed = rewriter.rewrite_lines(passed, authorities)
    assert exchange.decision is not None  # noqa: S101 - the request is admitted
    end = b"" if keep_alive else b"connection: close\r\n"
    if is_chunked:
        end = b"transfer-encoding: chunked\r\n" + end
    if exchange.cors is not None:
        passed, lines = complete_lines(exchange.cors, passed)
        end = lines + end
    return b"%b%bx-request-id: %b\r\n%b%b%b\r\n" % (
        passed,
        context.via_line,
        exchange.id.encode(),
        context.limit_headers.lines(exchange.decision, exchange.charges),
        b"" if response.has_date else b"date: %b\r\n" % http_date(int(time.time())),
        end,
    )


def parsed_head(
    response: UpstreamResponse,
    exchange: Exchange,
    context: ExchangeContext,
    rewriter: ResponseEditor | None,
    authorities: Authorities,
    *,
    is_chunked: bool,
    keep_alive: bool,
) -> bytes:
    """Return the head for the client of a response that the general parser has parsed, see `plain_head`."""
    fields, headers = response.fields, response.headers
    if rewriter is not None:
        headers = rewriter.rewrite(headers, authorities)
    omit = LENGTH if response.status == 204 else _NOTHING  # noqa: PLR2004 - see there
    own, via = context.response_headers(exchange), context.via_field(response.version)
    if exchange.cors is not None:
        headers, added = complete(exchange.cors, headers)
        own += added
    kept = rewrite_response(headers, fields, own, omit, via)
    lines = [status_line(response.status, response.reason), *map(COLON, kept)]
    if b"date" not in fields:
        lines.append(b"date: " + http_date(int(time.time())))
    if is_chunked:
        lines.append(b"transfer-encoding: chunked")
    if not keep_alive:
        lines.append(b"connection: close")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def interim_response(
    status: int,
    reason: bytes,
    headers: HeaderList,
    context: ExchangeContext,
    editor: HeadEditor | UrlRewriter | None,
) -> bytes:
    """Return an interim response for the client; `editor` is that of the route.

    Extensions see the head of the final response only. What they would remove from that must not come before it, so
    with extensions an interim response has `Link` alone (RFC 8297).
    """
    fields = forwardable_interim(headers, context.via)
    if context.response_hooks is not None:
        fields = [pair for pair in fields if pair[0].lower() in _EARLY_HINTS]
    return render_response_head(status, reason, fields if editor is None else editor.later_fields(fields))


def static_response(fallback: Fallback, exchange: Exchange, context: ExchangeContext, *, keep_alive: bool) -> bytes:
    """Record and return the static response of a route whose upstream has failed."""
    exchange.status, exchange.bytes_out = fallback.status, len(fallback.body)
    headers = fallback.fields(exchange.cors)
    own = context.response_headers(exchange)
    lines = [status_line(fallback.status, None), *map(COLON, headers), *map(COLON, own)]
    lines.append(b"%b: %b" % (FALLBACK, fallback.name.encode()))
    if all(name.lower() != b"date" for name, _ in headers):
        lines.append(b"date: " + http_date(int(time.time())))
    if not keep_alive:
        lines.append(b"connection: close")
    head = b"\r\n".join([*lines, b"\r\n"])
    return head if exchange.method == "HEAD" or fallback.status in BODILESS else head + fallback.body
