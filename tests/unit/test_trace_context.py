"""W3C Trace Context: which values are valid, what is sent on, and which traces are sampled."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api_gateway.http1.fast_parser import lines_of
from api_gateway.models import SPAN_ID, TRACE_FLAGS, TRACE_ID, Exchange, Trace
from api_gateway.observability.trace_context import (
    parent_context,
    split_lines,
    split_pairs,
    state_of,
)
from api_gateway.observability.tracing import Sampling, Tracer
from api_gateway.resilience.breaker_policy import State
from tests.cases import each

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01".encode()
MALFORMED = [
    b"",
    b"00",
    VALID[:-1],
    VALID[:-2],
    VALID + b"-",
    VALID + b"-extra",
    VALID + b"0",
    b" " + VALID,
    VALID.upper(),
    VALID.replace(b"0af7", b"0AF7"),
    VALID.replace(b"0af7", b"0xf7"),
    b"ff" + VALID[2:],
    b"0" + VALID[2:],
    b"000" + VALID[2:],
    b"FF" + VALID[2:],
    b"zz" + VALID[2:],
    b"cc" + VALID[2:] + b"extra",
    b"cc" + VALID[2:] + b".01",
    b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01",
    b"00-0af7651916cd43dd8448eb211c80319c-" + b"0" * 16 + b"-01",
    VALID.replace(b"-01", b"-0"),
    VALID.replace(b"-01", b"-0g"),
    VALID.replace(b"-01", b"-001"),
    VALID.replace(b"-", b"_"),
    VALID + b"," + VALID,
    VALID + b"\n",
]


@each("value", MALFORMED)
def test_a_malformed_traceparent_is_none(value: bytes) -> None:
    assert parent_context([value]) is None


@each(
    ("value", "flags"),
    [
        (VALID, 1),
        (VALID[:-2] + b"00", 0),
        (VALID[:-2] + b"ff", 255),
        (b"cc" + VALID[2:], 1),
        (b"01" + VALID[2:] + b"-x", 1),
    ],
)
def test_a_valid_traceparent_has_trace_span_and_flags(value: bytes, flags: int) -> None:
    assert parent_context([value]) == (TRACE, SPAN, flags)


def test_two_values_are_none() -> None:
    assert parent_context([VALID, VALID]) is None
    assert parent_context([]) is None


@given(st.binary(max_size=80))
def test_any_bytes_are_read_without_an_error(value: bytes) -> None:
    assert parent_context([value]) is None or len(value) >= 55
    assert isinstance(state_of([value]), bytes)


@each(
    ("values", "found"),
    [
        ([], b""),
        ([b"a=1"], b"a=1"),
        ([b" a=1 , b=2 "], b"a=1 , b=2"),
        ([b"a=1", b"t0@v=x y"], b"a=1,t0@v=x y"),
        ([b"a=1,,b=2"], b"a=1,,b=2"),
        ([b","], b""),
        ([b"a"], b""),
        ([b"a="], b""),
        ([b"A=1"], b""),
        ([b"a=1,a=2"], b""),
        ([b"a=1=2"], b""),
        ([b"a=\x7f"], b""),
        ([b",".join(b"k%d=1" % number for number in range(33))], b""),
        ([b",".join(b"k%d=1" % number for number in range(32))], b",".join(b"k%d=1" % number for number in range(32))),
    ],
)
def test_tracestate_is_sent_on_or_dropped_as_a_whole(values: list[bytes], found: bytes) -> None:
    assert state_of(values) == found


def test_both_fields_are_removed_from_lines_and_nothing_else() -> None:
    lines = b"\r\nHost: x\r\nTraceParent: " + VALID + b"\r\nX-Traceparent: a\r\ntracestate: a=1\r\ntracestate: b=2\r\n"
    context = parent_context([VALID])
    assert split_lines(lines) == (b"\r\nHost: x\r\nX-Traceparent: a\r\n", context, b"a=1,b=2")
    assert split_lines(b"\r\nTRACEPARENT: x\r\ntracestate: a=1\r\n") == (b"\r\n", None, b"")
    assert split_lines(b"\r\nTRACEPARENT: " + VALID + b"\r\n") == (b"\r\n", context, b"")
    assert split_lines(b"\r\na: b\r\ntraceparent: " + VALID + b"\r\nc: d\r\n") == (
        b"\r\na: b\r\nc: d\r\n",
        context,
        b"",
    )
    twice = b"\r\ntraceparent: " + VALID
    assert split_lines(twice * 2 + b"\r\nc: d\r\n") == (b"\r\nc: d\r\n", None, b"")
    assert split_lines(b"\r\nx-traceparent: a\r\n") == (b"\r\nx-traceparent: a\r\n", None, b"")
    pairs = [(b"Host", b"x"), (b"TraceParent", VALID), (b"TRACESTATE", b" a=1")]
    assert split_pairs(pairs) == ([(b"Host", b"x")], context, b"a=1")


@given(
    st.lists(st.sampled_from([VALID, VALID[:-1], b"x"]), max_size=2),
    st.lists(st.sampled_from([b"a=1", b"B"]), max_size=2),
)
def test_lines_and_pairs_are_read_alike(parents: list[bytes], states: list[bytes]) -> None:
    pairs = [(b"a", b"b"), *((b"Traceparent", one) for one in parents), *((b"tracestate", one) for one in states)]
    kept, *context = split_pairs(pairs)
    assert split_lines(lines_of(pairs)) == (lines_of(kept), *context)


@each(
    "line",
    [
        b"traceparent:x",
        b"traceparent:  x",
        b"traceparent: x ",
        b"traceparent: x\nTransfer-Encoding: chunked",
        b"traceparent: x\x00",
        b"traceparent : x",
        b"traceparent: ",
        b" traceparent: x",
    ],
)
def test_a_line_that_is_not_plain_is_left_to_the_general_parser(line: bytes) -> None:
    lines = b"\r\nHost: x\r\n" + line + b"\r\n"
    assert split_lines(lines) == (lines, None, b"")


# Sampling


def tracer(export: Callable[[Exchange], object] = bool, **sampling: Any) -> Tracer:
    return Tracer(Sampling(**sampling), export, random.Random(1))


def lines(flags: str = "01", trace_id: str = TRACE, state: bytes = b"") -> bytes:
    given = b"\r\ntraceparent: 00-%b-%b-%b\r\n" % (trace_id.encode(), SPAN.encode(), flags.encode())
    return given + (b"tracestate: %b\r\n" % state if state else b"")


def begun(one: Tracer, received: bytes = b"\r\nhost: x\r\n") -> Trace:
    """Return the trace that begins with header lines."""
    _, parent, state = split_lines(received)
    return one.begin(parent, state)


@pytest.mark.parametrize(("ratio", "flags"), [(1.0, b"03"), (0.0, b"02")])
def test_a_new_trace_has_random_ids_and_says_so(ratio: float, flags: bytes) -> None:
    one = tracer(ratio=ratio)
    traces = [begun(one) for _ in range(200)]
    for place in (TRACE_ID, SPAN_ID):
        assert len({trace.fields[place] for trace in traces}) == 200
    assert {trace.is_sampled for trace in traces} == {flags == b"03"}
    assert {trace.parent_id for trace in traces} == {""}
    for trace in traces:
        name, value = trace.fields[2:].split(b": ")
        assert (name, value[-2:]) == (b"traceparent", flags)
        assert parent_context([value]) is not None
        assert trace.trace_id == value[3:35].decode()


def test_a_ratio_selects_its_share_of_new_traces_by_their_last_56_bits() -> None:
    one = tracer(ratio=0.25)
    traces = [begun(one) for _ in range(4000)]
    assert 850 < sum(trace.is_sampled for trace in traces) < 1150
    for trace in traces:
        assert trace.is_sampled is (int(trace.trace_id[-14:], 16) >= 0.75 * 2**56)
        assert trace.fields[TRACE_FLAGS] == (b"03" if trace.is_sampled else b"02")


def test_an_attempt_has_its_own_span_in_the_trace_of_the_client() -> None:
    trace = begun(tracer(), lines(state=b"a=1"))
    assert (trace.trace_id, trace.parent_id, trace.is_sampled) == (TRACE, SPAN, True)
    sent = []
    for number in range(3):
        if number:
            trace.next_attempt()
        trace.attempt = "up", "http://a", b"/", State.CLOSED, float(number)
        sent.append(trace.fields)
    assert [attempt[-1] for _, attempt in trace.attempts()] == [0.0, 1.0, 2.0]
    assert [fields for fields, _ in trace.attempts()] == sent
    spans = [fields[SPAN_ID] for fields in sent]
    assert len({SPAN.encode(), *spans}) == 4
    assert sent == [b"\r\ntraceparent: 00-%b-%b-01\r\ntracestate: a=1" % (TRACE.encode(), span) for span in spans]


@each(
    ("parent", "flags", "ratio", "is_sampled"),
    [
        ("obey", "01", 0.0, True),
        ("obey", "00", 1.0, False),
        ("obey", "03", 0.0, True),
        ("obey", "02", 1.0, False),
        ("ignore", "01", 0.0, False),
        ("ignore", "00", 1.0, True),
        ("restart", "01", 0.0, False),
        ("restart", "00", 1.0, True),
    ],
)
def test_the_parents_decision_is_obeyed_or_not(parent: Any, flags: str, ratio: float, *, is_sampled: bool) -> None:
    trace = begun(tracer(parent=parent, ratio=ratio), lines(flags, state=b"a=1"))
    sent_flags = int(trace.fields[TRACE_FLAGS], 16)
    assert trace.is_sampled is is_sampled
    assert sent_flags & 1 == is_sampled
    if parent == "restart":
        assert trace.trace_id != TRACE
        assert (trace.parent_id, trace.state, trace.link) == ("", b"", (TRACE, SPAN))
    else:
        assert (trace.trace_id, trace.parent_id, trace.state, trace.link) == (TRACE, SPAN, b"a=1", None)
        assert sent_flags & 2 == int(flags, 16) & 2


@each("value", [one for one in MALFORMED if one.strip() == one and one.isascii() and b"\n" not in one])
def test_a_malformed_traceparent_is_replaced_and_tracestate_with_it(value: bytes) -> None:
    trace = begun(tracer(), b"\r\ntraceparent: %b\r\ntracestate: a=1\r\n" % value)
    assert (trace.parent_id, trace.state, trace.link) == ("", b"", None)
    assert trace.trace_id != TRACE


def test_the_ratio_selects_by_the_trace_id_alone() -> None:
    source = random.Random(7)
    ids = [f"{source.getrandbits(128):032x}" for _ in range(4000)]
    chosen = [
        {one for one in ids if begun(some, lines(trace_id=one)).is_sampled}
        for some in (tracer(ratio=0.1, parent="ignore"), tracer(ratio=0.1, parent="ignore"))
    ]
    assert chosen[0] == chosen[1]
    assert 300 < len(chosen[0]) < 500
    other = tracer(ratio=0.5, parent="ignore")
    half = {one for one in ids if begun(other, lines(trace_id=one)).is_sampled}
    assert chosen[0] < half, "a larger ratio selects the same traces, and more"


def exchange(one: Tracer, flags: str = "00", **values: Any) -> Exchange:
    found = Exchange("id", "GET", "/api", "192.0.2.1", 10.0, status=200, finished=10.1)
    found.trace = begun(one, lines(flags))
    for name, value in values.items():
        setattr(found, name, value)
    return found


@each(
    ("values", "is_kept"),
    [
        ({}, False),
        ({"status": 500}, True),
        ({"status": 503, "reason": "circuit_open"}, True),
        ({"reason": "upstream_reset"}, True),
        ({"status": 429, "reason": "rate_limited"}, False),
        ({"status": 499, "reason": "client_disconnected"}, False),
        ({"finished": 12.0}, True),
        ({"finished": 12.0, "head_at": 10.5}, False),
        ({"finished": 12.0, "head_at": 11.5}, True),
        ({"finished": 99.0, "status": 101}, False),
    ],
)
def test_failed_and_slow_exchanges_are_kept(values: dict[str, Any], *, is_kept: bool) -> None:
    exported: list[Exchange] = []
    one = tracer(exported.append, slow_after=1.0)
    one.record(exchange(one, **values))
    assert bool(exported) is is_kept


def test_as_many_are_kept_in_a_second_as_is_set_and_sampled_ones_do_not_count() -> None:
    exported: list[Exchange] = []
    one = tracer(exported.append, max_kept=3)
    for _ in range(10):
        one.record(exchange(one, status=500))
        one.record(exchange(one, "01", status=500))
    assert len(exported) == 13
    one.record(exchange(one, status=500, finished=11.2))
    assert len(exported) == 14
    none = tracer(exported.append, keep_errors=False)
    none.record(exchange(none, status=500))
    untraced = exchange(none)
    untraced.trace = None
    none.record(untraced)
    assert len(exported) == 14
