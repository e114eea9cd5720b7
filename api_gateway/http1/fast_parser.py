"""Plain heads, parsed by regular expressions instead of the general parser.

Most heads arrive in one piece, exactly in the form of RFC 9112, and use no unusual feature. One match of a regular
expression parses such a head. A head that does not match (additional white space, an unknown method, a transfer
coding, an upgrade, an invalid length) is not refused here but left to the general parser: plain heads are a strict
subset of what that parser accepts, with the same meaning. Pure functions on bytes.
"""

import re

from api_gateway.http1.headers import BODILESS, COST, GATEWAY_HEADERS, HOP_BY_HOP, Fields
from api_gateway.models import HeaderList

# Possessive quantifiers (`*+`) prevent backtracking: matching takes linear time for any input. A group guarded by
# `(?(n)(?!)|…)` matches at most once, so a head with a repeated framing field is not plain.
_NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_VALUE = rb"(?! )[\x20-\x7e\x80-\xff]++(?<! )"
_LINES = re.compile(rb"(?:\r\n" + _NAME + rb": " + _VALUE + rb")++\r\n")
_PLAIN_VALUE, _PLAIN_NAME = re.compile(_VALUE), re.compile(rb"(" + _NAME + rb"): ")
_PAIR = re.compile(rb"\r\n([^:]++): ([^\r]*+)")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_REQUEST_LINE = re.compile(
    rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[\x21\x22\x24-\x3e\x40-\x7e]*+)((?:\?[\x21\x22\x24-\x7e]*+)?+)"
    rb" HTTP/1\.1(?=\r\n)"
)
# Response fields that are not forwarded unchanged. First letters are listed apart, because most lines fail on those.
_INSPECTED = HOP_BY_HOP | GATEWAY_HEADERS | {b"content-length", b"date"}
_IS_INSPECTED = rb"[%b](?i:%b):" % (
    b"".join(sorted({letter for name in _INSPECTED for letter in (name[:1], name[:1].upper())})),
    b"|".join(sorted({name[1:] for name in _INSPECTED})),
)
_STATUS_LINE = re.compile(
    rb"HTTP/1\.1 ([2-5][0-9][0-9]) [\x20-\x7e\x80-\xff]*+"
    rb"(?:\r\n(?!" + _IS_INSPECTED + rb")" + _NAME + rb": " + _VALUE +
    rb"|(?(2)(?!)|\r\n(?i:content-length): ([0-9]{1,15}))"
    rb"|(?(3)(?!)|(\r\n(?i:date): " + _VALUE + rb"))"
    rb"|(?(4)(?!)|(\r\n(?i:connection: (?:keep-alive|(close)))))"
    rb"|(?(6)(?!)|(\r\n(?i:keep-alive): " + _VALUE + rb"))"
    rb"|(?(7)(?!)|(\r\n(?i:x-request-id): " + _VALUE + rb"))"
    rb"|(?(8)(?!)|(\r\n(?i:" + COST + rb"): " + _VALUE + rb"))"
    rb"|(?(9)(?!)|(\r\n(?i:transfer-encoding: chunked)))"
    rb")*+\r\n\r\n"
)  # fmt: skip
_EVENT_STREAM = re.compile(rb"\r\n(?i:content-type: text/event-stream)")

_METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
_COMPLEX_IN_REQUESTS = frozenset(
    {
        b"transfer-encoding",
        b"upgrade",
        b"te",
        b"trailer",
        b"max-forwards",
        b"proxy-connection",
    }
)
_NO_LENGTH, _KEEP_ALIVE = [b"0"], [b"keep-alive"]


class InspectedHeaders:
    """Finds the header lines of requests whose names (`inspected`, lower case) the gateway inspects.

    A hyphen in a name also matches an underscore, because CGI variables do not distinguish the two.
    """

    def __init__(self, inspected: frozenset[bytes]) -> None:
        by_letter: dict[bytes, list[bytes]] = {}
        for name in sorted({name.replace(b"_", b"-") for name in inspected}):
            by_letter.setdefault(re.escape(name[:1]), []).append(re.escape(name[1:]).replace(rb"\-", b"[-_]"))
        names = (b"[%b%b](?i:%b)" % (first, first.upper(), b"|".join(rest)) for first, rest in by_letter.items())
        self._pattern = re.compile(rb"\r\n(%b): ([^\r]++)" % b"|".join(names))

    def find(self, lines: bytes) -> HeaderList | None:
        """Return the inspected fields among `lines` (see `parse_request_head`), or None if a line is not plain."""
        return None if _LINES.fullmatch(lines) is None else self._pattern.findall(lines)


def framing_of(fields: Fields) -> tuple[int, bool] | None:
    """Return the length of a request's body in bytes and whether the connection is kept alive, or None if not plain.

    `fields` are the inspected fields by name. `Expect` is plain if it is `100-continue`, and there is a body.
    """
    if not _COMPLEX_IN_REQUESTS.isdisjoint(fields):
        return None
    lengths, connection = fields.get(b"content-length", _NO_LENGTH), fields.get(b"connection", _KEEP_ALIVE)
    if len(lengths) > 1 or len(connection) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
        return None
    if b"expect" in fields:
        (expectation, *others), length = fields[b"expect"], lengths[0]
        if others or expectation.lower() != b"100-continue" or not length.strip(b"0"):
            return None
    option = connection[0].lower()
    return (int(lengths[0]), option == b"keep-alive") if option in (b"keep-alive", b"close") else None


def remove_lines(lines: bytes, headers: HeaderList) -> bytes:
    """Return header lines without the first line that equals each of `headers`."""
    for pair in headers:
        lines = lines.replace(b"\r\n%b: %b\r\n" % pair, b"\r\n", 1)
    return lines


def parse_request_head(received: bytes) -> tuple[str, bytes, bytes, bytes, bytes] | None:
    """Return method, path, query (with question mark), header lines and the bytes after the head; None if not plain.

    The header lines are not checked here; they are one string from the line break before to the line break after them.
    """
    line = _REQUEST_LINE.match(received)
    if line is None:
        return None
    start = line.end()
    end = received.find(b"\r\n\r\n", start)
    if end < 0:
        return None
    method, path, query = line.groups()
    return _METHODS[method], path, query, received[start : end + 2], received[end + 4 :]


def parse_response_head(  # noqa: C901 - each branch is one field, or one kind of body
    received: bytes, *, is_to_head: bool
) -> tuple[int, bytes, int, int | None, bool, bool, bytes | None, bytes | None] | None:
    """Return status, head, head size, body length, persistence, presence of `Date`, cost and `Keep-Alive`.

    None unless it is a plain final response whose body has a known length, or is chunked (length None) and no event
    stream. Cost and `Keep-Alive` are the values of fields, None if they are absent. Sizes are in bytes. The returned
    head lacks the final line breaks and the lines that are not forwarded.
    """
    match = _STATUS_LINE.match(received)
    if match is None:
        return None
    digits, length, date, connection, close, keep_alive, request_id, cost, coding = match.groups()
    status, size = int(digits), match.end()
    head = received[: size - 4]
    for line in (connection, keep_alive, request_id, coding):
        if line is not None:
            head = head.replace(line, b"", 1)
    if cost is not None:
        head, cost = head.replace(cost, b"", 1), cost[len(COST) + 4 :]
    body_length: int | None = 0
    if is_to_head or status in BODILESS:
        # Content-Length is forbidden in a 204 (RFC 9110 section 8.6).
        if coding is not None or (status == 204 and length is not None):  # noqa: PLR2004
            return None
    elif coding is not None:
        if length is not None or _EVENT_STREAM.search(head) is not None:
            return None
        body_length = None
    elif length is None:
        return None
    else:
        body_length = int(length)
    if keep_alive is not None:
        keep_alive = keep_alive[len(b"\r\nkeep-alive: ") :]
    return status, head, size, body_length, close is None, date is not None, cost, keep_alive


def is_plain_value(value: bytes) -> bool:
    """Return whether a plain head may have a field with this value."""
    return _PLAIN_VALUE.fullmatch(value) is not None


def field_name(line: bytes) -> bytes:
    """Return the name in a header line of a plain head, empty if it is not such a line."""
    match = _PLAIN_NAME.match(line)
    return b"" if match is None else match[1]


def pairs_of(head: bytes) -> HeaderList:
    """Return the header lines of a plain head, or of `lines_of`, as pairs of name and value."""
    return _PAIR.findall(head)


def lines_of(headers: HeaderList) -> bytes:
    """Return header fields as the lines of a plain head, from the line break before to the one after them."""
    return b"\r\n%b\r\n" % b"\r\n".join(map(b": ".join, headers)) if headers else b"\r\n"


def reason_phrase(head: bytes) -> bytes:
    """Return the reason phrase of a plain response head."""
    return head[13 : head.index(b"\r")]
