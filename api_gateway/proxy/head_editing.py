"""Changes to header fields of requests and responses of a route: fields that are removed, set or added. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from api_gateway.http1.headers import cgi_form
from api_gateway.models import Exchange, HeaderList
from api_gateway.proxy.url_rewriting import Authorities, UrlRewriter
from api_gateway.proxy.value_template import ValueTemplate, path_parameters


@dataclass(frozen=True, slots=True)
class HeaderEdits:
    """Changes to header fields: those named in `removed` (lower case) and `assigned` go, then both sorts come.

    A hyphen in a name that goes also stands for an underscore, and vice versa: CGI does not distinguish the two, so a
    client could have its own value read in place of, or together with, the one that is set.
    """

    removed: frozenset[bytes] = frozenset()
    assigned: tuple[tuple[bytes, ValueTemplate], ...] = ()
    added: tuple[tuple[bytes, ValueTemplate], ...] = ()
    _gone: frozenset[bytes] = field(init=False, repr=False)
    _lines: re.Pattern[bytes] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gone = frozenset(map(cgi_form, (*self.removed, *(name for name, _ in self.assigned))))
        names = b"|".join(re.escape(name).replace(rb"\-", b"[-_]") for name in sorted(gone))
        object.__setattr__(self, "_gone", gone)
        object.__setattr__(self, "_lines", re.compile(rb"\r\n(?i:%b):[^\r]*" % names) if gone else None)

    @property
    def names(self) -> frozenset[str]:
        """The names of all placeholders."""
        return frozenset().union(*(template.names for _, template in (*self.assigned, *self.added)))

    def new(self, values: Mapping[str, bytes]) -> HeaderList:
        """Return the fields that come."""
        return [(name, template.filled(values)) for name, template in (*self.assigned, *self.added)]

    def kept(self, headers: HeaderList) -> HeaderList:
        """Return the fields that stay."""
        return [pair for pair in headers if cgi_form(pair[0]) not in self._gone] if self._gone else headers

    def kept_lines(self, lines: bytes) -> bytes:
        """Return lines, each with a line break before it, without those that go."""
        return lines if self._lines is None else self._lines.sub(b"", lines)


@dataclass(frozen=True, slots=True)
class HeadEditor:
    """Changes the heads of requests and responses of a route, in place of its `UrlRewriter`, which it applies first.

    `path` is that of the route if it is a template whose placeholders the values use, else empty.
    """

    request: HeaderEdits
    response: HeaderEdits
    urls: UrlRewriter | None = None
    path: str = ""

    @property
    def request_line(self) -> bytes:
        """See `UrlRewriter`."""
        return b"" if self.urls is None else self.urls.request_line

    def edited(self, lines: bytes, exchange: Exchange, raw_target: bytes) -> bytes:
        """Return the header lines for the upstream, which begin and end with a line break."""
        lines = self.request.kept_lines(lines)
        new = self.request.new(self.values_of(exchange, raw_target))
        return lines + b"".join([b"%b: %b\r\n" % pair for pair in new])

    def request_trailers(self, trailers: HeaderList) -> HeaderList:
        """Return the trailers for the upstream: none has the name of a field that goes from the head."""
        return self.request.kept(trailers)

    def later_fields(self, fields: HeaderList) -> HeaderList:
        """Return the trailers, or the fields of an interim response, for the client, likewise."""
        return self.response.kept(fields)

    def bound(self, exchange: Exchange, raw_target: bytes) -> "BoundEditor":
        """Return what changes the response to a request."""
        return BoundEditor(self, self.response.new(self.values_of(exchange, raw_target)))

    def values_of(self, exchange: Exchange, raw_target: bytes) -> Mapping[str, bytes]:
        """Return the values for the placeholders. Raises BadRequest as `path_parameters` does."""
        client = exchange.client
        values = {
            "client": b"" if client is None else client.id.encode(),
            "request_id": exchange.id.encode(),
        }
        if self.path:
            values |= path_parameters(self.path, raw_target.partition(b"?")[0])
        return values


class BoundEditor:
    """Changes the head of one response, as `UrlRewriter` does."""

    def __init__(self, editor: HeadEditor, new: HeaderList) -> None:
        self._editor = editor
        self._new = new

    def rewrite(self, headers: HeaderList, authorities: Authorities) -> HeaderList:
        """Return the header fields for the client."""
        if self._editor.urls is not None:
            headers = self._editor.urls.rewrite(headers, authorities)
        return self._editor.response.kept(headers) + self._new

    def rewrite_lines(self, head: bytes, authorities: Authorities) -> bytes:
        """Return a plain head for the client."""
        if self._editor.urls is not None:
            head = self._editor.urls.rewrite_lines(head, authorities)
        return self._editor.response.kept_lines(head) + b"".join([b"\r\n%b: %b" % pair for pair in self._new])


ResponseEditor = UrlRewriter | BoundEditor  # what changes the head of one response
