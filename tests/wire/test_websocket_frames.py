"""The boundaries between WebSocket frames are found, however the bytes are divided."""

import time
from collections.abc import Callable
from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from api_gateway.proxy.websocket_frames import GOING_AWAY, FrameBoundary
from tests.cases import each
from tests.wire.test_websocket import BINARY, CLOSE, frame

READ = 64 * 1024  # bytes: what the tunnel takes at once

FRAMES = st.lists(
    st.builds(
        lambda size, masked: frame(BINARY, bytes(size), masked=masked),
        st.one_of(st.integers(0, 130), st.sampled_from([65_535, 65_536, 70_000])),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(FRAMES, st.data())
def test_a_stream_is_between_frames_exactly_at_their_ends(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frames)
    ends = {0, *accumulate(map(len, frames))}
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    edges = FrameBoundary()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        edges.feed(stream[start:end])
        assert edges.is_between == (end in ends)


@given(FRAMES, st.data())
def test_the_rest_of_a_frame_is_known_to_the_byte(frames: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frames)
    ends = sorted({0, *accumulate(map(len, frames))})
    cut = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(cut, len(stream)))
    edges = FrameBoundary()
    edges.feed(stream[:cut])
    following = next(end for end in ends if end >= cut)
    assert edges.rest(stream[cut:stop]) == (following - cut if following <= stop else None)


def heads(stream: bytes) -> list[tuple[int, int]]:
    """Return where each frame begins whose length is known, and where it ends, written as plainly as can be."""
    found, at = [], 0
    while at + 2 <= len(stream):
        length, behind = stream[at + 1] % 128, at + 2
        if length >= 126:
            size = 2 if length == 126 else 8
            if behind + size > len(stream):
                break
            length, behind = int.from_bytes(stream[behind : behind + size], "big"), behind + size
        end = behind + length + (4 if stream[at + 1] >= 128 else 0)
        found.append((at, end))
        at = end
    return found


# Any bytes at all, and runs of frames as short as they can be, some with the length in a form longer than needed.
SMALL = {
    "empty": b"\0\0",
    "one byte": b"\x81\x01a",
    "masked": b"\x82\x80kkkk",
    "16-bit length": b"\x82\x7e\0\0",
    "64-bit length": b"\x82\x7f" + bytes(8),
    "close": b"\x88\0",
}
STREAMS = st.one_of(
    st.binary(max_size=200), st.lists(st.sampled_from(list(SMALL.values())), max_size=60).map(b"".join)
)


@given(STREAMS, st.data())
def test_whatever_the_bytes_and_however_cut_every_frame_is_followed(stream: bytes, data: st.DataObject) -> None:
    known = heads(stream)
    edges_known = {0, *(end for _, end in known)}
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=30).map(sorted))
    edges = FrameBoundary()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        piece = stream[start:end]
        if data.draw(st.booleans()):
            rest = edges.rest(piece)
            following = min((edge for edge in edges_known if start <= edge <= end), default=None)
            assert rest == (None if following is None else following - start)
            piece = b"" if rest is None else piece[rest:]
        edges.feed(piece)
        assert edges.is_between == (end in edges_known)
        assert edges.has_closed == any(stream[at] % 16 == 8 for at, _ in heads(stream[:end]))


@each("small", SMALL.values(), ids=SMALL)
def test_a_read_full_of_small_frames_costs_a_few_steps_each(small: bytes) -> None:
    stream = small * (READ // len(small))
    assert quickest(lambda: FrameBoundary().feed(stream)) < 10 * quickest(lambda: count(stream))


def count(stream: bytes) -> int:
    """Walk over a stream in steps of two, the least a frame can be."""
    at = found = 0
    while at < len(stream):
        if stream[at] & 0x0F == 8:
            found += 1
        at += 2
    return found


def quickest(work: Callable[[], object]) -> float:
    """Return the least CPU time of ten runs."""
    times = []
    for _ in range(10):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


@each("at", range(1, 14))
def test_a_head_may_come_byte_by_byte(at: int) -> None:
    edges = FrameBoundary()
    long = frame(BINARY, bytes(70_000), masked=True)
    edges.feed(long[:at])
    edges.feed(long[at:])
    assert edges.is_between


@given(FRAMES)
def test_a_close_frame_is_noticed_and_no_other_is_mistaken_for_one(frames: list[bytes]) -> None:
    edges = FrameBoundary()
    for one in frames:
        edges.feed(one)
    assert not edges.has_closed
    edges.feed(frame(CLOSE))
    assert edges.has_closed


def test_the_frame_that_is_put_in_is_a_close_frame_that_says_going_away() -> None:
    assert frame(CLOSE, (1001).to_bytes(2, "big")) == GOING_AWAY
