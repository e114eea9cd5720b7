"""Plain chunks: what is taken as such is a chunked body to the general parser too, with the same content."""

from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.http1.chunked import ARRIVING, ENDED, INVALID, MAX_CHUNKS, NOT_PLAIN, ChunkedBody, ChunkedEnd
from tests.cases import each

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Reader:
    """What the general parser makes of a chunked body."""

    def __init__(self) -> None:
        self.parser: Any = httptools.HttpResponseParser(self)
        self.parser.feed_data(HEAD)
        self.content = b""
        self.is_complete = False

    def on_body(self, piece: bytes) -> None:
        self.content += piece

    def on_message_complete(self) -> None:
        self.is_complete = True


def chunked(pieces: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


def cuts(draw: Any, data: bytes) -> list[bytes]:
    """Return `data` in pieces, cut at random places."""
    places = sorted(draw(st.sets(st.integers(0, len(data)), max_size=8)))
    return [data[one:other] for one, other in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.data(), st.lists(st.binary(max_size=40), max_size=8))
def test_a_body_is_passed_on_unchanged_however_it_is_cut(data: st.DataObject, pieces: list[bytes]) -> None:
    body, sent = ChunkedBody(), b""
    for piece in cuts(data.draw, chunked(pieces)):
        assert body.state in (ARRIVING, ENDED)
        sent += body.feed(piece)
        assert len(body.rest) <= 12, "no more than the beginning of a line is held"
    assert (body.state, sent, body.content) == (ENDED, chunked(pieces), sum(map(len, pieces)))


WORDS = st.sampled_from(
    [b"0", b"1", b"2", b"a", b"F", b"\r", b"\n", b"\r\n", b"x", b";a=b", b" ", b"-", b"+", b"00000001"]
)


@given(st.data(), st.lists(WORDS, max_size=14), st.lists(st.binary(min_size=1, max_size=3), max_size=2))
def test_no_other_bytes_are_taken_than_those_that_the_parser_takes(
    data: st.DataObject, words: list[bytes], pieces: list[bytes]
) -> None:
    """What has been checked has no error to the parser either; the rest is left to it, or invalid to it too."""
    text = chunked(pieces)[:-5] + b"".join(words)
    body, sent = ChunkedBody(), b""
    for piece in cuts(data.draw, text):
        sent += body.feed(piece)
        if body.state is not ARRIVING:
            break
    reader = Reader()
    reader.parser.feed_data(sent)  # raises for what is invalid
    assert (len(reader.content), reader.is_complete) == (body.content, body.state is ENDED)
    if body.state is INVALID:
        with pytest.raises(httptools.HttpParserError):
            reader.parser.feed_data(body.rest)


@each(
    ("text", "checked", "state"),
    [
        (b"2;a\r\nok\r\n", b"", NOT_PLAIN),
        (b"2\r\nok\r\n2;a\r\nok\r\n", b"2\r\nok\r\n", NOT_PLAIN),
        (b"2\r\nok\r\n0\r\nX: a\r\n\r\n", b"2\r\nok\r\n", NOT_PLAIN),
        (b"2\r\nok\r\n0\r\n\r\nHTTP", b"2\r\nok\r\n", NOT_PLAIN),
        (b"2\r\nok\r\n0\r\n", b"2\r\nok\r\n", ARRIVING),
        (b"2\r\nok\r", b"2\r\nok", ARRIVING),
        (b"2\r\nokX", b"2\r\nok", ARRIVING),
        (b"2\r\nokXX", b"2\r\n", INVALID),
        (b"123456789\r\n", b"", NOT_PLAIN),
        (b"2\nok", b"", NOT_PLAIN),
    ],
)
def test_what_is_not_plain_is_left_from_the_beginning_of_its_chunk(text: bytes, checked: bytes, state: object) -> None:
    body = ChunkedBody()
    assert (body.feed(text), body.state) == (checked, state)
    assert checked + body.rest == text


def test_many_small_chunks_in_one_read_are_left_to_the_parser() -> None:
    body = ChunkedBody()
    checked = body.feed(b"1\r\nx\r\n" * (MAX_CHUNKS + 1))
    assert (checked, body.rest, body.state) == (b"1\r\nx\r\n" * MAX_CHUNKS, b"1\r\nx\r\n", NOT_PLAIN)


LINES = st.sampled_from([b"0", b"00", b"1", b"a", b"1;x=y", b'2;x="y"', b"5 ", b"", b"g", b"X: y", b"x", b"0;\n"])


@given(st.data())
def test_the_end_of_a_body_is_where_the_general_parser_finds_it(data: st.DataObject) -> None:
    """Of whatever that accepts, in any segments; what follows is never taken for a part of the body."""
    pieces = data.draw(st.lists(st.binary(min_size=1, max_size=20), max_size=4))
    extension = data.draw(st.sampled_from([b"", b";a=b", b';a="b;c"']))
    trailers = data.draw(st.sampled_from([b"", b"X: 1\r\n", b"X: 1\r\nYy: 0\r\n"]))
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    body += b"0%b\r\n%b\r\n" % (extension, trailers)
    end, position, found = ChunkedEnd(), 0, None
    for piece in cuts(data.draw, body + b"GET / HTTP/1.1\r\n\r\n"):
        inside = end.find(piece)
        if inside is not None:
            found = position + inside
            break
        position += len(piece)
    assert found == len(body)


@each("zeros", [14, 15, 16, 17, 40])
def test_zeros_before_a_size_do_not_matter_in_however_many_reads_it_arrives(zeros: int) -> None:
    """If they did, the content would be taken for a size: of a chunk without end, or for the end of the body."""
    body = (
        b"0" * zeros + b"1c\r\n" + b"abFFFFFF\r\n\r\n0\r\n\r\n".ljust(28, b"x") + b"\r\n" + b"0" * zeros + b"0\r\n\r\n"
    )
    assert _read(body) is True
    text = body + b"GET / HTTP/1.1\r\n\r\n"
    for cut in range(1, len(body)):
        end = ChunkedEnd()
        assert end.find(text[:cut]) is None
        assert end.find(text[cut:]) == len(body) - cut
    end = ChunkedEnd()
    assert [end.find(body[index : index + 1]) for index in range(len(body))] == [None] * (len(body) - 1) + [1]


@given(st.lists(LINES, max_size=8))
def test_no_other_end_is_found_than_that_of_the_general_parser(lines: list[bytes]) -> None:
    text = b"\r\n".join([*lines, b""])
    found = ChunkedEnd().find(text)
    if found is None:
        return
    assert _read(text[:found]) is not False
    assert not any(_read(text[:size]) for size in range(found))


def _read(text: bytes) -> bool | None:
    """Return whether the general parser takes the body to be complete; None if it refuses it."""
    reader = Reader()
    try:
        reader.parser.feed_data(text)
    except httptools.HttpParserError:
        return None
    return reader.is_complete
