"""The scanners of response contents, beside `json.loads`, on generated texts that are cut at every byte."""

import gzip
import json
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api_gateway.proxy.content_cost import MAX_DECODED, ContentCost, ContentScan
from api_gateway.proxy.event_scanner import EventScanner
from api_gateway.proxy.json_scanner import JsonScanner
from api_gateway.settings.json_pointer import parse_pointer
from tests.cases import each

PATH = ("usage", "total_tokens")
NAMES = ["usage", "total_tokens", "0", "1", "", "a/b", "m~n", "ä", "\U0001f600", '"', "\\", "us"]
names = st.sampled_from(NAMES) | st.text(max_size=4)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=6) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
paths = st.lists(names, max_size=3).map(tuple)


def by_loads(text: str | bytes, path: tuple[str, ...]) -> float | None:
    """Return the number at a path, by the standard parser."""
    value: Any = json.loads(text)
    for token in path:
        if isinstance(value, dict):
            value = value.get(token)
        elif isinstance(value, list):
            is_index = token.isascii() and token.isdecimal() and str(int(token)) == token
            value = value[int(token)] if is_index and int(token) < len(value) else None
        else:
            return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def scanned(text: bytes, path: tuple[str, ...], *cuts: int) -> float | None:
    scanner = JsonScanner(path)
    for begin, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        scanner.feed(text[begin:end])
    scanner.finish()
    return scanner.value


def spelled(value: Any, draw: Any) -> str:
    """Return a JSON text of a value, with white space or escapes now and then."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, None, 1])))
    before, after = draw(st.sampled_from(["", " \r\n\t"])), draw(st.sampled_from(["", "\n"]))
    return f"{before}{text}{after}"


@given(data=st.data(), value=values, path=paths)
@settings(max_examples=100, deadline=None)
def test_it_finds_what_json_loads_finds_wherever_the_text_is_cut(
    data: st.DataObject, value: Any, path: tuple[str, ...]
) -> None:
    nested: Any = value
    if data.draw(st.booleans(), label="the path leads to it"):
        for token in reversed(path):
            others = data.draw(st.dictionaries(names, st.integers(), max_size=2))
            nested = {**others, token: nested}
    text = spelled(nested, data.draw).encode("utf-8", "surrogatepass")
    expected = by_loads(text, path)
    for cut in range(len(text) + 1):
        assert scanned(text, path, cut) == expected
    assert scanned(text, path, *range(1, len(text))) == expected


@each(
    ("text", "expected"),
    [
        (b'{"usage":{"total_tokens":15}}', 15),
        (b'{"usage":{"total_tokens":15},"usage":{"total_tokens":16}}', 16),
        (b'{"usage":{"total_tokens":15},"usage":{}}', None),
        (b'{"usage":{"total_tokens":15},"usage":null}', None),
        (b'{"usage":{"total_tokens":15,"total_tokens":"x"}}', None),
        (b'{"\\u0075sage":{"total\\u005ftokens":1.5e3}}', 1500),
        (b'{"x":"{\\"usage\\":{\\"total_tokens\\":1}}","usage":{"total_tokens":2}}', 2),
        (b'{"x":[{"usage":{"total_tokens":1}}]}', None),
        (b'{"x":{"y":[1,[2]]},"usage":{"total_tokens":3}}', 3),
        (b'{"usage":{"x":[1]},"usage":{"total_tokens":3}}', 3),
        (b'{"usage":[{"total_tokens":1}]}', None),
        (b'{"usage":{"total_tokens":true}}', None),
        (b'{"usage":{"total_tokens":-0}}', 0),
        (b'\xef\xbb\xbf{"usage":{"total_tokens":7}}', 7),
        (b'{"usage":{"total_tokens":1' + b"0" * 80 + b"}}", None),
        (b'{"usage":{"total_tokens":1e999}}', None),
        (b'{"usage":7}', None),
    ],
)
def test_the_last_member_of_a_name_counts_and_only_a_number(text: bytes, expected: float | None) -> None:
    for cut in range(len(text) + 1):
        assert scanned(text, PATH, cut) == expected


@each(("index", "expected"), [("0", None), ("1", 5), ("2", 7), ("3", None), ("01", None)])
def test_elements_of_arrays_are_counted(index: str, expected: float | None) -> None:
    text = b'[{"n":[]}, {"n":[4,5]}, {"n":[[6],7]}]'
    for cut in range(len(text) + 1):
        assert scanned(text, (index, "n", "1"), cut) == expected


@given(text=st.binary(max_size=60) | st.text('{}[]":,\\ \n0a1usage', max_size=60).map(str.encode), path=paths)
@settings(max_examples=100, deadline=None)
def test_what_is_not_json_raises_nothing(text: bytes, path: tuple[str, ...]) -> None:
    assert scanned(text, path) == scanned(text, path, *range(1, len(text)))


def test_its_state_is_bounded_whatever_the_text() -> None:
    scanner = JsonScanner(PATH)
    for text in (b"[" * 100_000, b'"' + b"x" * 100_000, b"\\" * 99_999, b'"' + b"]" * 100_000, b'{"' + b"n" * 100_000):
        scanner.feed(text)
    assert len(scanner._start) < 1_000
    assert len(scanner._indices) <= len(PATH)
    deep = JsonScanner(PATH)
    deep.feed(b'{"a":' * 100_000 + b"1" + b"}" * 99_999 + b',"usage":{"total_tokens":3}}')
    assert deep.finish()
    assert deep.value == 3


@each(
    ("pointer", "tokens"),
    [
        ("", ()),
        ("/", ("",)),
        ("/usage/total_tokens", PATH),
        ("/a~1b/m~0n", ("a/b", "m~n")),
        ("/~01", ("~1",)),
        ("/0//", ("0", "", "")),
    ],
)
def test_pointers_are_those_of_rfc_6901(pointer: str, tokens: tuple[str, ...]) -> None:
    assert parse_pointer(pointer) == tokens


@each("pointer", ["usage", "usage/total", "#/usage", "/a~", "/a~2b"])
def test_a_malformed_pointer_is_refused(pointer: str) -> None:
    with pytest.raises(ValueError, match="RFC 6901"):
        parse_pointer(pointer)


# Event streams


def event(value: Any, line_end: str = "\n") -> str:
    return f"id: 1{line_end}data: {json.dumps(value)}{line_end}{line_end}"


FIVE = {"usage": {"total_tokens": 5}}
STREAMS = {
    "the last event with it": (event({"usage": None}) + event(FIVE) + "data: [DONE]\n\n", 5),
    "the last of several": (
        event(FIVE) + event({"usage": {"total_tokens": 9}}) + event({}),
        9,
    ),
    "CRLF": (event(FIVE, "\r\n") + event({}, "\r\n"), 5),
    "CR": (event(FIVE, "\r") + event({}, "\r"), 5),
    "several data lines": ('data: {"usage":\ndata:{"total_tokens"\nid: 7\ndata: :5}}\n\n', 5),
    "several data lines, CRLF": ('data: {"usage":\r\ndata:{"total_tokens"\r\ndata: :5}}\r\n\r\n', 5),
    "no blank line at the end": ('data: {"usage":{"total_tokens":5}}\n', 5),
    "other fields and comments": (':{"usage":{"total_tokens":1}}\nevent: x\nda\ndatas: 1\nretry: 5\n\n', None),
    "an empty stream": ("", None),
    "a byte order mark": ("\ufeff" + event(FIVE), 5),
    "a byte order mark before data": ('\ufeffdata: {"usage":{"total_tokens":5}}\n\n', 5),
    "a byte order mark later": ('\n\ufeffdata: {"usage":{"total_tokens":5}}\n\n', None),
    "two byte order marks": ('\ufeff\ufeffdata: {"usage":{"total_tokens":5}}\n\n', None),
    "without its end": ('data: {"usage":{"total_tokens":5}\n\n', None),
    "no space": ('data:{"usage":{"total_tokens":5}}\n\n', 5),
}


def test_a_text_whose_end_is_missing_is_not_whole() -> None:
    text = b' {"a": [1, {"b": "x"}], "usage": {"total_tokens": 57}} '
    for cut in range(len(text)):
        scanner = JsonScanner(PATH)
        scanner.feed(text[:cut])
        assert scanner.finish() == (cut == len(text) - 1)
        assert scanner.value == (57 if cut > text.index(b"57") + 2 else None)


@each(("stream", "expected"), STREAMS.values(), ids=STREAMS)
def test_the_last_event_with_a_number_counts(stream: str, expected: float | None) -> None:
    text = stream.encode()
    for cut in range(len(text) + 1):
        scanner = EventScanner(PATH)
        scanner.feed(text[:cut])
        scanner.feed(text[cut:])
        assert scanner.finish()
        assert scanner.value == expected
    scanner = EventScanner(PATH)
    for at in range(len(text)):
        scanner.feed(text[at : at + 1])
    assert scanner.finish()
    assert scanner.value == expected


def test_an_event_that_was_cut_off_does_not_count() -> None:
    scanner = EventScanner(PATH)
    scanner.feed((event({"usage": {"total_tokens": 5}}) + 'data: {"usage":{"total_tokens":150').encode())
    assert scanner.value == 5


DONE = {
    "data: [DONE]\n\n": True,
    "data:[DONE]\r\n\r\n": True,
    "id: 7\ndata: [DONE] \n\n" + event({}): True,
    "data: [DONE]\n": False,  # the event may go on
    'data: "[DONE]"\n\n': False,
    "data: [DONE], almost\n\n": False,
    "data: [DONE\ndata: ]\n\n": False,
    "[DONE]\n\n": False,
    ": [DONE]\n\n": False,
    "data: " + " " * 20 + "[DONE]\n\n": False,
}


@each(("text", "is_done"), DONE.items(), ids=map(repr, DONE))
def test_the_event_that_ends_a_stream_is_recognised(text: str, *, is_done: bool) -> None:
    stream = (event(FIVE) + text).encode()
    for cut in range(len(stream) + 1):
        scanner = EventScanner(PATH)
        scanner.feed(stream[:cut])
        scanner.feed(stream[cut:])
        assert (scanner.is_done, scanner.value) == (is_done, 5)


# Responses


def cost_of(
    body: bytes, *fields: tuple[bytes, bytes], cost: ContentCost | None = None, step: int = 7, is_complete: bool = True
) -> float | None:
    found: list[float | None] = []
    by_name = {b"content-type": [b"application/json"]} | {name: [value] for name, value in fields}
    scan = (cost or ContentCost(PATH)).scan(by_name, lambda _cost, value, _is_complete: found.append(value))
    for at in range(0, len(body), step):
        scan.feed(body[at : at + step])
    scan.end(is_complete=is_complete)
    scan.end(is_complete=False)
    (value,) = found
    return value


TEXT = b'{"usage":{"total_tokens":1500}}'


def test_the_unit_is_divided_and_a_number_out_of_range_is_none() -> None:
    assert cost_of(TEXT, cost=ContentCost(PATH, per=1000)) == 1.5
    assert cost_of(b'{"usage":{"total_tokens":-1}}') is None
    assert cost_of(b'{"usage":{"total_tokens":1e10}}') is None
    assert cost_of(b'{"usage":{"total_tokens":1}}', cost=ContentCost(PATH, per=3)) == 0.333333333


@each(
    ("media_type", "expected"),
    [
        (b"application/json", 1500),
        (b"Application/Problem+JSON; charset=utf-8", 1500),
        (b"text/json", 1500),
        (b"text/plain", None),
        (b"", None),
    ],
)
def test_json_is_scanned_and_nothing_else(media_type: bytes, expected: float | None) -> None:
    assert cost_of(TEXT, (b"content-type", media_type)) == expected


@each("step", [1, 7, 10_000])
def test_gzip_and_deflate_are_decompressed_and_other_codings_have_no_number(step: int) -> None:
    stream = STREAMS["the last of several"][0].encode() * 50
    members = gzip.compress(stream[:60]) + gzip.compress(stream[60:])
    as_events = (b"content-type", b"text/event-stream; charset=utf-8")
    assert cost_of(members, as_events, (b"content-encoding", b"GZIP"), step=step) == 9
    assert cost_of(zlib.compress(TEXT), (b"content-encoding", b"deflate"), step=step) == 1500
    assert cost_of(TEXT, (b"content-encoding", b"identity"), step=step) == 1500
    assert cost_of(TEXT, (b"content-encoding", b"br"), step=step) is None
    assert cost_of(TEXT, (b"content-encoding", b"gzip"), step=step) is None  # it is not


def test_the_decompressed_size_is_limited() -> None:
    text = b'{"usage":{"total_tokens":15},"more":"' + b"x" * MAX_DECODED
    bomb = gzip.compress(text + b'"}')
    assert len(bomb) < MAX_DECODED // 100
    assert cost_of(bomb, (b"content-encoding", b"gzip"), step=len(bomb)) is None


MANY = 3_000_000  # repetitions that compress to some thousand bytes


@each(
    ("media_type", "text"),
    [
        (b"application/json", b"{" + b'"a":1,' * (MANY // 3)),
        (b"application/json", b'{"x":[' + b"[]" * MANY),
        (b"text/event-stream", b"data:1\n\n" * (MANY // 4)),
        (b"text/event-stream", b"\n" * MANY),
    ],
    ids=["members", "arrays", "events", "lines"],
)
def test_the_work_for_a_compressed_response_is_limited(media_type: bytes, text: bytes) -> None:
    """In one piece, which nothing else can interrupt, and in many."""
    found: list[Any] = []
    for step in (10_000, 1):
        scan = ContentCost(PATH).scan(
            {b"content-type": [media_type], b"content-encoding": [b"gzip"]}, lambda *args: found.append(args[1:])
        )
        scanner: Any = scan._scanner
        bomb = gzip.compress(text)
        for begin in range(0, len(bomb), step):
            scan.feed(bomb[begin : begin + step])
        assert scanner.steps < 100_000 + 20 * len(bomb)
        scan.end(is_complete=True)
    assert found == [(None, True)] * 2


@each("line", [b"\n", b"\r\n", b":\n", b"data\n", b"id:1\r\n\r\n", b"data: \n\n"])
def test_lines_of_a_stream_without_effect_take_no_step_each(line: bytes) -> None:
    """Reads end anywhere, also within a line end; the number before and after the lines is found."""
    for before in (b"", b'data: {"usage":{"total_tokens":7}}\n\n', b'data: {"usage":\n'):
        scanner = EventScanner(("usage", "total_tokens"))
        scanner.feed(before)
        text = line * 50_000 if not before.endswith(b":\n") else b": comment\r\n" * 20_000
        pieces = [text[at : at + 16_383] for at in range(0, len(text), 16_383)]
        for piece in pieces:
            scanner.feed(piece)
        assert scanner.steps < 100 + 20 * len(pieces)
        scanner.feed(b'data: {"total_tokens":9}}\n\n' if before.endswith(b":\n") else b"\ndata: [DONE]\n\n")
        expected = {b"": None, b'data: {"usage":\n': 9.0}
        assert scanner.finish()
        assert scanner.value == expected.get(before, 7.0)


def test_content_of_tiny_values_is_scanned_within_a_limit_and_then_given_up() -> None:
    found: list[float | None] = []
    scan = ContentCost(("9", "9")).scan({b"content-type": [b"application/json"]}, lambda *args: found.append(args[1]))
    scanner = scan._scanner
    assert scanner is not None
    text = b'[1,1,1,1,1,1,1,1,1,{"9":5}' + b",1" * 1_000_000 + b"]"
    for at in range(0, len(text), 65_536):
        scan.feed(text[at : at + 65_536])
    assert scanner.steps < 400_000
    scan.end(is_complete=True)
    assert found == [None]


def test_a_long_compressed_stream_of_events_is_read() -> None:
    compressor, found = zlib.compressobj(wbits=31), []
    scan = ContentCost(PATH).scan(
        {b"content-type": [b"text/event-stream"], b"content-encoding": [b"gzip"]}, lambda *args: found.append(args[1])
    )
    event = (
        b'data: {"id":"c-1","object":"chunk","created":1700000000,"choices":[{"index":0,"delta":{"content":"%d"}}]}'
    )
    for number in range(10_000):
        scan.feed(compressor.compress(event % number + b"\n\n") + compressor.flush(zlib.Z_SYNC_FLUSH))
    scan.feed(compressor.compress(b"data: " + TEXT + b"\n\ndata: [DONE]\n\n") + compressor.flush())
    scan.end(is_complete=True)
    assert found == [1500]


def test_a_response_that_was_cut_off_has_what_was_complete() -> None:
    assert cost_of(TEXT[:-1], is_complete=False) == 1500
    assert cost_of(TEXT[:-2], is_complete=False) is None  # the number may go on
    assert cost_of(b"", is_complete=False) is None
    stream = (b"content-type", b"text/event-stream")
    assert cost_of(b"data: " + TEXT, stream, is_complete=False) is None  # the event may go on
    assert cost_of(b"data: " + TEXT, stream) == 1500


def test_reprs() -> None:
    scan = ContentCost(PATH).scan({b"content-type": [b"application/json"]}, lambda *_: None)
    assert isinstance(scan, ContentScan)
    assert repr(scan) == "<ContentScan [open] <JsonScanner [value] None>>"
    assert repr(EventScanner(PATH)) == "<EventScanner None>"
