"""`fast_parser` accepts a subset of what the full parser accepts, with the same meaning."""

from typing import Any

import httptools
from hypothesis import example, given
from hypothesis import strategies as st

from api_gateway.http1.fast_parser import (
    InspectedHeaders,
    framing_of,
    pairs_of,
    parse_request_head,
    parse_response_head,
    reason_phrase,
    remove_lines,
)
from api_gateway.http1.headers import (
    COST,
    FORWARDING,
    GATEWAY_HEADERS,
    HOP_BY_HOP,
    fields_of,
    inspected_headers,
    stripped_headers,
)
from tests.cases import each

REQUEST = b"POST /api/x?y=%20 HTTP/1.1\r\nHost: a\r\nAccept: b\r\nX-Client-ID: me\r\nContent-Length: 2\r\n\r\nok"
ANSWER = b"HTTP/1.1 200 Fine\r\nDate: now\r\nContent-Length: 2\r\nConnection: keep-alive\r\nETag: x\r\n\r\nok"
NOTED = inspected_headers(frozenset({b"x-client-id"}))
LINES_OF_NOTE = InspectedHeaders(NOTED)


class Parsed:
    """What httptools makes of a message."""

    def __init__(self) -> None:
        self.parser: httptools.HttpRequestParser | httptools.HttpResponseParser | None = None
        self.keeps_alive: bool | None = None  # asked with the head: at the end of a message, llhttp forgets it
        self.url = self.body = self.reason = b""
        self.pairs: list[tuple[bytes, bytes]] = []
        self.messages = 0

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.pairs.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self.parser is not None
        self.keeps_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.messages += 1


# Requests


def test_a_request_is_split_into_its_parts() -> None:
    parts = parse_request_head(REQUEST)
    assert parts == (
        "POST",
        b"/api/x",
        b"?y=%20",
        b"\r\nHost: a\r\nAccept: b\r\nX-Client-ID: me\r\nContent-Length: 2\r\n",
        b"ok",
    )
    found = LINES_OF_NOTE.find(parts[3])
    assert found == [(b"Host", b"a"), (b"X-Client-ID", b"me"), (b"Content-Length", b"2")]
    assert framing_of(fields_of(found)) == (2, True)
    assert remove_lines(parts[3], found[:1]) == parts[3].replace(b"Host: a\r\n", b"")


@each("name", sorted(NOTED))
@each("spell", [bytes.lower, bytes.upper, bytes.title])
def test_a_noted_name_is_found_in_every_spelling_and_no_name_that_holds_it(name: bytes, spell: Any) -> None:
    lookalikes = b"\r\nX-%b: a\r\n%b-x: a\r\nX: %b: a\r\n" % (name, name, name)
    found = InspectedHeaders(frozenset({name})).find(lookalikes + spell(name) + b": a\r\n")
    assert found == [(spell(name), b"a")]


@each(
    "line",
    [
        b"GET  /api HTTP/1.1",
        b"GET /api HTTP/1.0",
        b"GET /api HTTP/1.2",
        b"get /api HTTP/1.1",
        b"PROPFIND /api HTTP/1.1",
        b"CONNECT a:1 HTTP/1.1",
        b"TRACE /api HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"GET http://a/api HTTP/1.1",
        b"GET /api#x HTTP/1.1",
        b"GET /api?x#y HTTP/1.1",
        b"GET /\xc3\xa4 HTTP/1.1",
        b"GET /a\tb HTTP/1.1",
        b"\r\nGET /api HTTP/1.1",
    ],
)
def test_an_unusual_request_line_is_left_to_the_parser(line: bytes) -> None:
    assert parse_request_head(line + b"\r\nHost: a\r\n\r\n") is None


def test_an_incomplete_head_is_left_to_the_parser() -> None:
    for end in range(len(REQUEST) - 2):
        assert parse_request_head(REQUEST[:end]) is None


@each(
    "lines",
    [
        b"",
        b"Host : a\r\n",
        b" Host: a\r\n",
        b"Host:a\r\n",
        b"Host:  a\r\n",
        b"Host: a \r\n",
        b"Host: a\r\n b\r\n",
        b"Host: a\nX: b\r\n",
        b"Host: a\rX: b\r\n",
        b"Host: a\0\r\n",
        b"Host: a\tb\r\n",
        b"Host: \r\n",
        b": a\r\n",
        b"Ho st: a\r\n",
        b"H\xf6st: a\r\n",
        b"Host: a\r\nTransfer-Encoding: chunked\r\n",
        b"Host: a\r\nUpgrade: websocket\r\n",
        b"Host: a\r\nExpect: 100-continue\r\n",
        b"Host: a\r\nTE: trailers\r\n",
        b"Host: a\r\nMax-Forwards: 1\r\n",
        b"Host: a\r\nConnection: X-Client-ID\r\n",
        b"Host: a\r\nConnection: close\r\nConnection: close\r\n",
        b"Host: a\r\nContent-Length: 2\r\nContent-Length: 2\r\n",
        b"Host: a\r\nContent-Length: +2\r\n",
        b"Host: a\r\nContent-Length: 2, 2\r\n",
        b"Host: a\r\nContent-Length: 9999999999999999\r\n",
    ],
)
def test_unusual_header_lines_are_left_to_the_parser(lines: bytes) -> None:
    found = LINES_OF_NOTE.find(b"\r\n" + lines)
    assert found is None or framing_of(fields_of(found)) is None


NAMES = st.sampled_from(
    [b"Host", b"X-Client-ID", b"x_client-id", b"content-length", b"Connection", b"TE", b"X", b"Ho st", b"", b"\xff"]
)
VALUES = st.one_of(
    st.sampled_from([b"a", b"2", b"close", b"keep-alive", b"", b" a", b"a\tb", b"\xe4", b"a\r\n b", b"a\rb", b"2, 2"]),
    st.binary(max_size=4),
)
COLONS = st.sampled_from([b": ", b": ", b": ", b":", b" :", b":  "])
BREAKS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b" \r\n", b"\r\n\r\n"])
LINES = st.lists(st.tuples(NAMES, COLONS, VALUES, BREAKS).map(b"".join), max_size=5).map(b"".join)
STARTS = st.sampled_from(
    [b"GET /api HTTP/1.1\r\n", b"POST /a?b=c HTTP/1.1\r\n", b"PUT /a%2Fb HTTP/1.1\r\n", b"HEAD /? HTTP/1.1\r\n"]
)


@given(STARTS, LINES, st.binary(max_size=3))
@example(b"POST /a HTTP/1.1\r\n", b"Host: a\r\nContent-Length: 2\r\n", b"ok")
@example(b"GET /api HTTP/1.1\r\n", b"Host: a\r\nConnection: close\r\n", b"")
def test_a_plain_request_means_to_the_parser_what_it_means_here(start: bytes, lines: bytes, body: bytes) -> None:
    parts = parse_request_head(start + lines + b"\r\n" + body)
    if parts is None:
        return
    method, path, query, split_lines, behind = parts
    found = LINES_OF_NOTE.find(split_lines)
    framing = None if found is None else framing_of(fields_of(found))
    if found is None or framing is None or len(behind) != framing[0]:
        return
    parsed = Parsed()
    parser = parsed.parser = httptools.HttpRequestParser(parsed)
    parser.feed_data(start + lines + b"\r\n" + body)
    assert (parser.get_method().decode(), parsed.url) == (method, path + query)
    assert parsed.pairs == pairs_of(split_lines)
    assert found == [pair for pair in parsed.pairs if pair[0].lower() in NOTED]
    dropped = stripped_headers(frozenset({b"x-client-id"}), FORWARDING)
    kept = [pair for pair in parsed.pairs if pair[0].lower() not in dropped]
    assert pairs_of(remove_lines(split_lines, [pair for pair in found if pair[0].lower() in dropped])) == kept
    assert (parsed.messages, parsed.body) == (1, behind)
    assert parsed.keeps_alive == framing[1]
    assert not parser.should_upgrade()


# Answers


def test_a_response_is_split_into_its_parts() -> None:
    head = b"HTTP/1.1 200 Fine\r\nDate: now\r\nContent-Length: 2\r\nETag: x"
    assert parse_response_head(ANSWER, is_to_head=False) == (200, head, len(ANSWER) - 2, 2, True, True, None, None)
    assert reason_phrase(ANSWER) == b"Fine"
    assert pairs_of(ANSWER)[0] == (b"Date", b"now")


@each(
    ("line", "keeps_alive"),
    [
        (b"Connection: close", False),
        (b"connection: Keep-Alive", True),
        (b"Keep-Alive: timeout=5", True),
        (b"X-Request-Id: theirs", True),
    ],
)
def test_a_line_that_goes_no_further_is_taken_out_and_no_other_that_looks_like_it(
    line: bytes, *, keeps_alive: bool
) -> None:
    lookalikes = b"X-%b\r\nX: %b" % (line, line)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + lookalikes
    parts = parse_response_head(head + b"\r\n" + line + b"\r\n\r\n", is_to_head=False)
    assert parts is not None
    assert (parts[1], parts[4]) == (head, keeps_alive)
    assert parts[7] == (b"timeout=5" if line.startswith(b"Keep") else None)


@each(
    "lines",
    [
        b"",
        b"Content-Length: 2\r\nContent-Length: 2\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTrailer: X\r\n",
        b"Content-Type: text/Event-Stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 2\r\nConnection: close, x\r\n",
        b"Content-Length: 2\r\nConnection: close\r\nConnection: close\r\n",
        b"Content-Length: 2\r\nUpgrade: h2c\r\n",
        b"Content-Length: 2\r\nX-RateLimit-Limit: 7\r\n",
        b"Content-Length: 0x2\r\n",
        b"Content-Length: -2\r\n",
        b"Content-Length: 2 \r\n",
        b"Content-Length: 1234567890123456\r\n",
        b"Content-Length : 2\r\n",
        b"Content-Length: 2\r\nX: a\r\n b\r\n",
        b"Content-Length: 2\r\nX: a\0\r\n",
        b"Content-Length: 2\nX: a\r\n",
    ],
)
def test_an_unusual_response_is_left_to_the_parser(lines: bytes) -> None:
    assert parse_response_head(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\nok", is_to_head=False) is None


def test_a_chunked_response_has_no_length_and_its_coding_is_not_forwarded() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nX-Type: text/event-stream"
    received = head + b"\r\nTransfer-encoding: Chunked\r\n\r\n2\r\nok"
    parts = parse_response_head(received, is_to_head=False)
    assert parts == (200, head, len(received) - 5, None, True, False, None, None)
    assert parse_response_head(received, is_to_head=True) is None
    assert parse_response_head(received.replace(b"200 OK", b"204 No"), is_to_head=False) is None


@each("start", [b"HTTP/1.0 200 OK", b"HTTP/1.1 103 Early", b"HTTP/1.1 200", b"HTTP/1.1 600 Odd"])
def test_an_unusual_status_line_is_left_to_the_parser(start: bytes) -> None:
    assert parse_response_head(start + b"\r\nContent-Length: 0\r\n\r\n", is_to_head=False) is None


@each(
    ("status", "lines", "is_to_head", "length"),
    [
        (b"204 No", b"", False, 0),
        (b"204 No", b"Content-Length: 0\r\n", False, None),
        (b"304 No", b"Content-Length: 7\r\n", False, 0),
        (b"200 OK", b"Content-Length: 7\r\n", True, 0),
        (b"200 OK", b"", True, 0),
    ],
)
def test_some_responses_end_with_their_head(
    status: bytes, lines: bytes, length: int | None, *, is_to_head: bool
) -> None:
    parts = parse_response_head(b"HTTP/1.1 " + status + b"\r\n" + lines + b"\r\n", is_to_head=is_to_head)
    assert (None if parts is None else parts[3]) == length


ANSWER_NAMES = st.sampled_from(
    [
        b"Content-Length",
        b"content-length",
        b"Connection",
        b"Keep-Alive",
        b"Date",
        b"De",
        b"Te",
        b"X-Request-ID",
        b"X-Gateway-Cost",
        b"ETag",
    ]
)
ANSWER_LINE = st.tuples(ANSWER_NAMES, COLONS, VALUES, BREAKS).map(b"".join)
CODING = st.just(b"Transfer-Encoding: chunked\r\n")
ANSWER_LINES = st.lists(st.one_of(ANSWER_LINE, ANSWER_LINE, CODING), max_size=5).map(b"".join)
STATUSES = st.sampled_from([b"200 OK", b"204 No Content", b"304 ", b"404 \xe4", b"599 a  b"])


@given(STATUSES, ANSWER_LINES, st.booleans())
@example(b"200 OK", b"Content-Length: 2\r\nConnection: close\r\nDe: x\r\n", False)
@example(b"200 OK", b"Content-Length: 0\r\nConnection: close\r\n", False)
@example(b"304 Not Modified", b"Connection: close\r\n", False)
@example(b"200 OK", b"Transfer-Encoding: chunked\r\nConnection: close\r\n", False)
def test_a_plain_response_means_to_the_parser_what_it_means_here(
    status: bytes,
    lines: bytes,
    is_to_head: bool,  # noqa: FBT001 - as drawn
) -> None:
    head = b"HTTP/1.1 " + status + b"\r\n" + lines + b"\r\n"
    parts = parse_response_head(head, is_to_head=is_to_head)
    if parts is None:
        return
    code, passed, size, length, keeps_alive, has_date, cost, keep_alive = parts
    parsed = Parsed()
    parser = parsed.parser = httptools.HttpResponseParser(parsed)
    parser.feed_data(head[:size])
    assert (parser.get_status_code(), parsed.reason) == (code, reason_phrase(head))
    assert parsed.pairs == pairs_of(head[:size])
    kept = [pair for pair in parsed.pairs if pair[0].lower() not in HOP_BY_HOP | GATEWAY_HEADERS]
    assert pairs_of(passed) == kept
    assert has_date == any(name.lower() == b"date" for name, _ in kept)
    assert [value for name, value in parsed.pairs if name.lower() == COST] == ([] if cost is None else [cost])
    announced = [value for name, value in parsed.pairs if name.lower() == b"keep-alive"]
    assert announced == ([] if keep_alive is None else [keep_alive])
    assert is_to_head or parsed.keeps_alive == keeps_alive  # what was asked is unknown to this parser
    if length is None:
        parser.feed_data(b"2\r\nok\r\n0\r\n\r\n")
        assert (parsed.messages, parsed.body) == (1, b"ok")
    elif length:
        parser.feed_data(b"x" * min(length, 10))
        assert (parsed.messages, len(parsed.body)) == (length <= 10, min(length, 10))
