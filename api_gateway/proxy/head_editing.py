"""Changes to header fields of requests and responses of a route: fields that are removed, set or added. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from api_gateway.http1.headers import cgi_form
from api_gateway.models import Exchange, HeaderList
from api_gateway.proxy.edited_lines import EditedLinesCache
from api_gateway.proxy.url_rewriting import Authorities, UrlRewriter
from api_gateway.proxy.value_template import ValueTemplate, path_parameters


@dataclass(frozen=True, slots=True)
class HeaderEdits:
    """Changes to header fields: removal of those named in `removed` (lower case) and `assigned`, then addition.

    The fields in `assigned` and `added` are added.

    A hyphen in the name of a removed field also stands for an underscore, and vice versa: CGI does not distinguish the
    two, so a client could have its own value read in place of, or together with, the one that is set.

    `new_lines` are the lines of the added fields, each with a line break before it.
    """

    removed: frozenset[bytes] = frozenset()
    assigned: tuple[tuple[bytes, ValueTemplate], ...] = ()
    added: tuple[tuple[bytes, ValueTemplate], ...] = ()
    new_lines: ValueTemplate = field(init=False, repr=False, compare=False)
    _gone: frozenset[bytes] = field(init=False, repr=False)
    _lines: re.Pattern[bytes] | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gone = frozenset(map(cgi_form, (*self.removed, *(name for name, _ in self.assigned))))
        new = [(b"\r\n%b: " % name, template) for name, template in (*self.assigned, *self.added)]
        object.__setattr__(self, "new_lines", ValueTemplate.joined([part for line in new for part in line]))
        object.__setattr__(self, "_gone", gone)
        object.__setattr__(self, "_lines", _pattern_of(gone) if gone else None)

    @property
    def is_empty(self) -> bool:
        """True if nothing is changed."""
        return not (self.removed or self.assigned or self.added)

    @property
    def names(self) -> frozenset[str]:
        """The names of all placeholders."""
        return self.new_lines.names

    def new(self, values: Mapping[str, bytes]) -> HeaderList:
        """Return the added fields."""
        return [(name, template.filled(values)) for name, template in (*self.assigned, *self.added)]

    def kept(self, headers: HeaderList) -> HeaderList:
        """Return the fields that are not removed."""
        return [pair for pair in headers if cgi_form(pair[0]) not in self._gone] if self._gone else headers

    def kept_lines(self, lines: bytes) -> bytes:
        """Return lines, each with a line break before it, without those of removed fields."""
        return lines if self._lines is None else self._lines.sub(b"", lines)


def _pattern_of(gone: frozenset[bytes]) -> re.Pattern[bytes]:
    """Return the pattern of the lines whose names in CGI's form are in `gone`."""
    names = b"|".join(re.escape(name).replace(rb"\-", b"[-_]") for name in sorted(gone))
    # Most lines fail on their first letter, as in `UrlRewriter`.
    letters = {b"-", b"_", *(letter for name in gone for letter in (name[:1], name[:1].upper()))}
    return re.compile(rb"\r\n(?=[%b])(?i:%b):[^\r]*" % (b"".join(map(re.escape, sorted(letters))), names))


@dataclass(frozen=True, slots=True)
class HeadEditor:
    """Changes the heads of requests and responses of a route, in place of its `UrlRewriter`, which it applies first.

    `path` is that of the route if it is a template whose placeholders the values use, else empty.
    """

    request: HeaderEdits
    response: HeaderEdits
    urls: UrlRewriter | None = None
    path: str = ""
    needs_authorities: bool = field(init=False, repr=False)
    _varying: ValueTemplate | None = field(init=False, repr=False)  # lines of requests whose values differ

    def __post_init__(self) -> None:
        new = self.request.new_lines
        object.__setattr__(self, "needs_authorities", self.urls is not None)
        object.__setattr__(self, "_varying", None if new.constant is not None else new)

    @property
    def request_line(self) -> bytes:
        """See `UrlRewriter`."""
        return b"" if self.urls is None else self.urls.request_line

    def edited(self, lines: bytes, facts: EditedLinesCache, exchange: Exchange, raw_target: bytes) -> bytes:
        """Return the header lines for the upstream, which begin and end with a line break.

        Clients repeat their fields, so what is the same for all requests with these lines is kept with their `facts`.
        """
        editor, known, kept = facts.edited
        if editor is not self or known is not lines:
            kept = self._repeated(lines)
            facts.edited = self, lines, kept
        new = self._varying
        return kept if new is None else b"%b%b\r\n" % (kept, new.filled(self.values_of(exchange, raw_target)))

    def _repeated(self, lines: bytes) -> bytes:
        """Return the bytes that all requests with these lines share, without the last line break if more follows."""
        constant = self.request.new_lines.constant
        return self.request.kept_lines(lines[:-2]) + (b"" if constant is None else constant + b"\r\n")

    def request_trailers(self, trailers: HeaderList) -> HeaderList:
        """Return the trailers for the upstream: none has the name of a field that is removed from the head."""
        return self.request.kept(trailers)

    def later_fields(self, fields: HeaderList) -> HeaderList:
        """Return the trailers, or the fields of an interim response, for the client, likewise."""
        return self.response.kept(fields)

    def bound(self, exchange: Exchange, raw_target: bytes) -> "UrlRewriter | BoundEditor | None":
        """Return the editor of the response to a request, None if it is not changed."""
        return self.urls if self.response.is_empty else BoundEditor(self, exchange, raw_target)

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

    __slots__ = ("_editor", "_exchange", "_raw_target")

    def __init__(self, editor: HeadEditor, exchange: Exchange, raw_target: bytes) -> None:
        self._editor = editor
        self._exchange = exchange
        self._raw_target = raw_target

    def rewrite(self, headers: HeaderList, authorities: Authorities) -> HeaderList:
        """Return the header fields for the client."""
        editor = self._editor
        if editor.urls is not None:
            headers = editor.urls.rewrite(headers, authorities)
        new = editor.response.new(editor.values_of(self._exchange, self._raw_target))
        return editor.response.kept(headers) + new

    def rewrite_lines(self, head: bytes, authorities: Authorities) -> bytes:
        """Return a plain head for the client."""
        editor = self._editor
        if editor.urls is not None:
            head = editor.urls.rewrite_lines(head, authorities)
        new = editor.response.new_lines
        constant = new.constant
        if constant is None:
            constant = new.filled(editor.values_of(self._exchange, self._raw_target))
        return editor.response.kept_lines(head) + constant


ResponseEditor = UrlRewriter | BoundEditor  # what changes the head of one response
